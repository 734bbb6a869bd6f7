"""Sentences to train a text encoder on, and graded sentence pairs to rank its embeddings by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from heliostat._extras import require
from heliostat.datamodules.hub import check_columns, is_dataset, load_dataset, share_stream
from heliostat.datamodules.loading import GlobalBatchSampler, ResumableLoader, StreamLoader, local_batch_size
from heliostat.datamodules.readers import SUFFIXES, Row, find_files, read_rows
from heliostat.datamodules.sources.docstrings import docstring_pairs, docstring_sentences
from heliostat.pretrained import load_tokenizer

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


class TextDataModule(LightningDataModule):
    r"""Sentences for training, graded sentence pairs for validation and test.

    Each of ``sentences``, ``val_pairs`` and ``test_pairs`` is one of:

    - ``"docstrings"``: the docstrings of Python's standard library, with structural grades
      (:mod:`heliostat.datamodules.sources.docstrings`); needs no file and no download. The three share no sentence.
    - a file, a glob pattern, or a list of them: .txt (sentences only), .csv, .tsv, .json, .jsonl, .parquet; see
      :func:`~heliostat.datamodules.readers.read_rows` for ``sentence_column`` and ``pair_columns``.
    - a directory that holds a Hugging Face data set (from ``save_to_disk``, or a folder of data files), or a data set's
      id on the Hub (``"mteb/stsbenchmark-sts"``).

    Batches:

    - train, predict: ``{"input_ids": (B, T), "attention_mask": (B, T), ...}``, int64, padded to the longest of the
      batch; ``...`` is whatever else the tokenizer gives, such as ``token_type_ids``.
    - validation, test: ``{"first": {...}, "second": {...}, "score": (B,), "index": (B,)}``; the tokens of the two
      sentences, the score scaled from ``score_range`` to float32 in [0, 1], and the int64 position of the pair in the
      set. On several processes Lightning repeats some pairs to give each process as many; drop repeated indices.

    Rows with an empty sentence are passed over, with a warning that counts them. Training batches depend on ``seed``
    and the epoch, not on the number of processes or workers (a stream's do), and a resumed run goes on at the next one.

    Args:
        sentences: Training sentences.
        val_pairs: Validation pairs; None for no validation.
        test_pairs: Test pairs; None for no test.
        sentence_column: Column of the sentences (a position, for .csv and .tsv without a header). Unused for .txt.
        pair_columns: Columns of first sentence, second sentence and score (positions, as above).
        score_range: Lowest and highest score that the pairs may have (STS: 0 to 5). The embedded pairs do not use it.
        splits: Splits of a Hugging Face data set for training, validation and test.
        encoding: Encoding of text files.
        streaming: Read the training sentences while training instead of before, for sets larger than memory. A stream
            is shuffled within ``shuffle_buffer`` rows and keeps duplicates. Each process and each worker has its own
            share of it, and each worker drops its last, incomplete batch, so here batches do depend on both numbers.
            Resuming reads the interrupted epoch again up to the next batch. On several processes the shares differ in
            length, so each starts over at its end, and ``limit_train_batches`` or ``max_steps`` must say when to stop.
        shuffle_buffer: Rows held in memory to shuffle a stream.
        drop_duplicates: Keep only the first of equal training sentences: a duplicate in the batch is a false negative.
        tokenizer: None: the attribute ``tokenizer`` of the LightningModule, so that the two cannot disagree. Or a
            tokenizer; or ``"minilm"``, a directory or a Hub id to load one from.
        max_length: Longest sequence in tokens; the rest is cut off.
        batch_size: Training sentences in a batch, over all processes together. The last, incomplete batch is dropped.
        eval_batch_size: Pairs (for predict: sentences) in a batch of each process.
        num_workers: Worker processes of each loader.
        seed: Seed of the shuffling.

    Raises:
        ValueError: An argument out of range; or, when the data are read, a missing column, a malformed row, a score
            that is no number or outside ``score_range``, fewer sentences than ``batch_size``. Names file and line.
        FileNotFoundError: A file or data set that is not there.
        MisconfigurationException: ``tokenizer=None`` and a LightningModule without ``tokenizer``.
    """

    def __init__(
        self,
        sentences: str | Sequence[str] = "docstrings",
        val_pairs: str | Sequence[str] | None = "docstrings",
        test_pairs: str | Sequence[str] | None = "docstrings",
        *,
        sentence_column: int | str = "sentence",
        pair_columns: Sequence[int | str] = ("sentence1", "sentence2", "score"),
        score_range: tuple[float, float] = (0.0, 5.0),
        splits: tuple[str, str, str] = ("train", "validation", "test"),
        encoding: str = "utf-8",
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        drop_duplicates: bool = True,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        max_length: int = 32,
        batch_size: int = 64,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(pair_columns) != 3:
            raise ValueError(f"pair_columns must name first sentence, second sentence and score, got {pair_columns!r}")
        if not score_range[0] < score_range[1]:
            raise ValueError(f"score_range must be (lowest, highest) with lowest < highest, got {score_range!r}")
        if streaming and sentences == "docstrings":
            raise ValueError("streaming=True is for files and data sets; the embedded 'docstrings' fit in memory")
        self.sentences = sentences
        self.val_pairs = val_pairs
        self.test_pairs = test_pairs
        self.sentence_column = sentence_column
        self.pair_columns = tuple(pair_columns)
        self.score_range = score_range
        self.splits = splits
        self.encoding = encoding
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.drop_duplicates = drop_duplicates
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._train: list[str] | None = None
        self._pairs: dict[str, list[_Pair]] = {}

    def setup(self, stage: str) -> None:
        """Read what the stage needs, once."""
        if stage in ("fit", "predict") and self._train is None and not self.streaming:
            self._train = self._read_sentences()
        if stage in ("fit", "validate") and self.val_pairs is not None:
            self._read_pairs("validation", self.val_pairs, self.splits[1])
        if stage == "test" and self.test_pairs is not None:
            self._read_pairs("test", self.test_pairs, self.splits[2])

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of ``batch_size`` sentences over all processes."""
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        collate = _Collate(self._tokenizer(), self.max_length).sentences
        if self.streaming:
            return StreamLoader(
                self._stream(),
                self.trainer,
                batch_size=local_batch_size(self.batch_size, world_size),
                drop_last=True,
                collate_fn=collate,
                **self._loader_arguments(),
            )
        assert self._train is not None, "setup('fit') reads the sentences"
        sampler = GlobalBatchSampler(self._train, self.batch_size, num_replicas=world_size, rank=rank, seed=self.seed)
        return ResumableLoader(
            self._train,
            batch_size=sampler.local_batch_size,
            sampler=sampler,
            collate_fn=collate,
            **self._loader_arguments(),
        )

    def val_dataloader(self) -> DataLoader | list:
        """Validation pairs in order; no loader if ``val_pairs`` is None."""
        return self._pair_loader("validation")

    def test_dataloader(self) -> DataLoader | list:
        """Test pairs in order; no loader if ``test_pairs`` is None."""
        return self._pair_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Training sentences in order (those kept: no empty ones, and no duplicates under ``drop_duplicates``)."""
        if self._train is None:
            raise MisconfigurationException(
                "TextDataModule(streaming=True) has no order to predict in; streaming=False has"
            )
        collate = _Collate(self._tokenizer(), self.max_length).sentences
        texts: Any = self._train
        return DataLoader(texts, batch_size=self.eval_batch_size, collate_fn=collate, **self._loader_arguments())

    def _pair_loader(self, name: str) -> DataLoader | list:
        if name not in self._pairs:
            return []  # Lightning's word for no loader
        collate = _Collate(self._tokenizer(), self.max_length).pairs
        pairs: Any = self._pairs[name]  # a list is a data set to DataLoader, if not to its type
        return DataLoader(pairs, batch_size=self.eval_batch_size, collate_fn=collate, **self._loader_arguments())

    def _loader_arguments(self) -> dict[str, Any]:
        # Without a generator of its own, each pass of a loader draws from the global one, and validating more often
        # would change the dropout of training.
        return {"num_workers": self.num_workers, "generator": torch.Generator().manual_seed(self.seed)}

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: Any = self.tokenizer
        if tokenizer is None:
            module = self.trainer.lightning_module if self.trainer else None
            tokenizer = getattr(module, "tokenizer", None)
            if tokenizer is None:
                found = "there is none (no Trainer)" if module is None else f"{type(module).__name__} has none"
                raise MisconfigurationException(
                    "TextDataModule(tokenizer=None) takes the attribute `tokenizer` of the LightningModule, but "
                    f"{found}. Pass tokenizer= a tokenizer, a directory, a Hub id, or 'minilm'"
                )
        elif isinstance(tokenizer, str):
            tokenizer = self.tokenizer = load_tokenizer(tokenizer)
        if tokenizer.pad_token is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no padding token, which batches need; "
                "set it, for example tokenizer.pad_token = tokenizer.eos_token"
            )
        return tokenizer

    def _read_sentences(self) -> list[str]:
        if self.sentences == "docstrings":
            return docstring_sentences("train")
        rows = self._rows("sentences", self.sentences, self.splits[0], [self.sentence_column], "sentence_column")
        texts = [row.values[0] for row in _without_empty(rows, "sentences")]
        if self.drop_duplicates:
            unique = list(dict.fromkeys(texts))
            if len(unique) < len(texts):
                rank_zero_info(f"sentences: dropped {len(texts) - len(unique)} duplicates of {len(texts)} sentences")
            texts = unique
        return texts

    def _read_pairs(self, name: str, source: str | Sequence[str], split: str) -> None:
        if name in self._pairs:
            return
        argument = "val_pairs" if name == "validation" else "test_pairs"
        if source == "docstrings":
            # Not self.seed: runs of several seeds are to be compared on the same pairs.
            graded = docstring_pairs("validation" if name == "validation" else "test")
            self._pairs[name] = [_Pair(i, a, b, grade / 3) for i, (a, b, grade) in enumerate(graded)]
            return
        rows = self._rows(argument, source, split, self.pair_columns, "pair_columns")
        kept = list(_without_empty(rows, argument, sentences=2))
        self._pairs[name] = [_Pair(i, row.values[0], row.values[1], self._score(row)) for i, row in enumerate(kept)]
        if not kept:
            raise ValueError(f"{argument}={source!r} has no pairs")

    def _score(self, row: Row) -> float:
        lowest, highest = self.score_range
        try:
            score = float(row.values[2])
        except (TypeError, ValueError):
            raise ValueError(
                f"{row.where}: the score {row.values[2]!r} (column {self.pair_columns[2]!r}) is no number"
            ) from None
        if not lowest <= score <= highest:  # NaN too
            raise ValueError(
                f"{row.where}: the score {score} is outside score_range=({lowest}, {highest}); "
                "pass the lowest and highest score of your pairs as score_range"
            )
        return (score - lowest) / (highest - lowest)

    def _rows(
        self, argument: str, source: str | Sequence[str], split: str, columns: Sequence[str | int], column_argument: str
    ) -> Iterator[Row]:
        if is_dataset(source, SUFFIXES):
            data = load_dataset(str(source), split, argument, streaming=False)
            check_columns(data.column_names, columns, f"{argument}={source!r}", column_argument)
            data = data.select_columns(list(columns))
            name = f"{source} ({split})"
            return (Row(tuple(row[c] for c in columns), name, number) for number, row in enumerate(data, 1))
        return read_rows(source, columns, encoding=self.encoding, argument=column_argument)

    def _stream(self) -> _SentenceStream:
        datasets = require("datasets", "TextDataModule(streaming=True)")
        column: str | int = self.sentence_column
        if is_dataset(self.sentences, SUFFIXES):
            rows = load_dataset(str(self.sentences), self.splits[0], "sentences", streaming=True)
            if rows.column_names is not None:
                check_columns(rows.column_names, [column], f"sentences={self.sentences!r}", "sentence_column")
        else:
            # Our reader rather than the builders of `datasets`: the same columns, encodings and errors as in memory.
            options = {"files": find_files(self.sentences), "column": column, "encoding": self.encoding}
            rows = datasets.IterableDataset.from_generator(_read_files, gen_kwargs=options)
            column = "sentence"
        rows = rows.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        rows = share_stream(rows, self.trainer, "TextDataModule(streaming=True)")
        return _SentenceStream(rows, column, endless=bool(self.trainer and self.trainer.world_size > 1))


class _Pair(NamedTuple):
    position: int
    first: str
    second: str
    score: float  # in [0, 1]


@dataclass
class _Collate:
    """Make batches of tokens."""

    tokenizer: Any
    max_length: int

    def sentences(self, texts: list[str]) -> dict[str, Tensor]:
        return dict(
            self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        )

    def pairs(self, pairs: list[_Pair]) -> dict[str, Any]:
        position, first, second, score = zip(*pairs, strict=True)
        return {
            "first": self.sentences(list(first)),
            "second": self.sentences(list(second)),
            "score": torch.tensor(score, dtype=torch.float32),
            "index": torch.tensor(position),
        }


class _SentenceStream(IterableDataset):
    """The non-empty sentences of a Hugging Face stream, which shares its shards among the loader's workers."""

    def __init__(self, rows: datasets.IterableDataset, column: str | int, endless: bool) -> None:
        self.rows = rows
        self.column = column
        self.endless = endless
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[str]:
        epoch = self.epoch
        found = True
        while found:
            self.rows.set_epoch(epoch)
            found = False
            for number, row in enumerate(self.rows, 1):
                text = _text(row.get(self.column), f"sentences, row {number} of the stream")
                if text.strip():
                    found = True
                    yield text
            if not self.endless:
                return
            epoch += 1


def _read_files(files: list[Path], column: str | int, encoding: str) -> Iterator[dict[str, Any]]:
    for row in read_rows(files, [column], encoding=encoding, argument="sentence_column"):
        yield {"sentence": _text(row.values[0], row.where)}


def _text(value: object, where: str) -> str:
    """Check that a sentence is text; a null counts as empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: a sentence must be text, got {value!r:.200}")
    return value


def _without_empty(rows: Iterable[Row], argument: str, sentences: int = 1) -> Iterator[Row]:
    """Pass over rows whose first ``sentences`` values hold an empty one, and warn of their number at the end."""
    empty = total = 0
    for row in rows:
        total += 1
        if all(_text(value, row.where).strip() for value in row.values[:sentences]):
            yield row
        else:
            empty += 1
    if empty:
        rank_zero_warn(f"{argument}: passed over {empty} of {total} rows, which have an empty sentence")
