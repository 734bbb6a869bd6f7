"""Pictures with captions: to train image-text models, and to test them by retrieval and zero-shot classification."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from heliostat._extras import require
from heliostat.components.text_cache import CachedTextEmbeddings
from heliostat.datamodules.captioned_pictures import CaptionedPictures, Columns, is_dataset, open_captioned
from heliostat.datamodules.captions import caption_texts
from heliostat.datamodules.hub import check_columns, has_splits, load_dataset, share_stream
from heliostat.datamodules.image_readers import encoded_image
from heliostat.datamodules.loading import (
    GlobalBatchSampler,
    ResumableLoader,
    StreamLoader,
    loader_arguments,
    local_batch_size,
    whole_batch,
)
from heliostat.datamodules.pixels import Augment, PixelPipeline
from heliostat.datamodules.splits import check_fractions, split_groups

TextTower = Callable[[list[str]], Tensor]

_MESSAGE_EVERY = 30  # seconds
_IN_A_ROW = 100  # unreadable pictures one after another, after which something else must be wrong


class ImageTextDataModule(LightningDataModule):
    r"""Pictures with captions for training, validation and test.

    Each of ``pairs``, ``val_pairs`` and ``test_pairs`` is one of:

    - ``"twemoji"``: 3,778 emoji with their names, class = category (:mod:`heliostat.datamodules.sources.twemoji`;
      graphics by Twitter and other contributors, CC-BY 4.0); needs no download. Parts of it share no concept: the skin
      tones of one stay together.
    - webdataset shards: tar files, as names with braces (``"shards/{000..009}.tar"``), glob patterns or a list of them;
      see :mod:`heliostat.datamodules.webdataset_shards`. They are read in place, by random access.
    - tables of paths and captions: .csv, .tsv, .json, .jsonl, .parquet; see
      :func:`~heliostat.datamodules.readers.read_rows` for the columns, and ``image_root``.
    - a directory that holds a Hugging Face data set (from ``save_to_disk``, or a folder of data files), or a data set's
      id on the Hub.

    Batches:

    - train, predict: ``{"pixel_values": (B, 3, size, size), "text": [B strings], "text_embeddings": (B, d_L),
      "teacher_embeddings": (B, d), "index": (B,)}``, float32 and int64. Of several captions, one is drawn in every
      epoch; predict takes the first.
    - validation, test: a list of loaders, told apart by the keys of their batches. Pictures: ``pixel_values``,
      ``group``, ``labels`` (the class, -1 if unknown), ``index``. Texts, every caption of these pictures: ``text``,
      their embeddings, ``group``, ``index``. If there are classes, prompts: ``text``, their embeddings, ``labels`` (the
      class that the prompt describes), ``index``. A text fits a picture exactly if their groups are equal; pictures
      with the same captions are one group.

    ``index`` is the position in its set, -1 in a stream. On several processes Lightning repeats some rows in evaluation
    to give each process as many; drop repeated indices. Embeddings are there if ``embedder`` or ``teacher`` is.

    Training batches depend on ``seed`` and the epoch, and on the number of neither processes nor workers, and a resumed
    run goes on at the next one (a stream's: see ``streaming``).

    A picture that cannot be read is left out at setup if pictures are kept in memory. Otherwise the next one of the set
    takes its place in the batch, with its caption: the first is warned of at once, and all are counted when the stage
    ends.

    Args:
        pairs: Training pairs.
        val_pairs: Validation pairs; None: a part of ``pairs``.
        test_pairs: Test pairs; None: a part of ``pairs``.
        image_column: Column of the pictures: paths in a table, images in a Hugging Face data set. Unused for shards.
        caption_column: Column or columns of the captions; a value is a text or a list of texts. In shards, a key of the
            .json members, or ``"txt"``; samples without .json have their caption in .txt in any case.
        second_caption: Draw a second caption of each picture for training, another one if there is any; its fields are
            ``second_text``, ``second_text_embeddings`` and ``second_teacher_embeddings``.
        label_column: Column of the classes, for zero-shot classification; in shards, a key of the .json members, and
            samples without it have their class in .cls. None: no classes.
        image_root: Folder that the paths of a table start from, and must not lead out of. None: that of the table.
        splits: Splits of a Hugging Face data set for ``pairs``, ``val_pairs`` and ``test_pairs``.
        encoding: Encoding of text files.
        streaming: Read the training pairs of a Hugging Face data set while training instead of before. A stream is
            shuffled within ``shuffle_buffer`` rows, gives no parts for validation and test, and passes over rows
            without caption or readable picture. Each process and each worker has its own share of it, so batches depend
            on both numbers; on several processes ``limit_train_batches`` or ``max_steps`` must say when to stop.
            Resuming reads the interrupted epoch again up to the next batch.
        shuffle_buffer: Rows held in memory, pictures encoded, to shuffle a stream.
        val_fraction: Share of the concepts for validation, if ``val_pairs`` is None; 0: no validation. Where nothing
            is known of concepts, pictures with the same captions are one.
        test_fraction: The same for test.
        split_seed: Seed of the parts. Not ``seed``, so that runs of several seeds compare on the same ones.
        prompts: Texts that describe a class, with ``{}`` for its name; several are for averaging. None: no prompts.
        embedder: Frozen model of the text embeddings, from a list of B strings to ``(B, d_L)``, such as
            `heliostat.TextEmbedder`.
        teacher: The same for ``teacher_embeddings``, such as `heliostat.OpenCLIPTextTower`.
        cache: Embed all texts once, in ``prepare_data``, and look them up afterwards; a cache is found again as long as
            the ``fingerprint`` of the model is the same, and only missing texts are added. Once it is open, the two
            models are dropped from this object, to give their memory back. False: embed each batch on its device.
        cache_dir: Folder of the embeddings, and of the index of shards. None: ``heliostat`` in the user's cache folder
            (``$XDG_CACHE_HOME``, or ``~/.cache``).
        text_only: Give no pictures, and decode none: batches lack ``pixel_values``, and in evaluation there is the
            loader of texts alone.
        size: Height and width. Other pictures are scaled by their shorter side and cropped in the middle; what is
            transparent becomes white.
        mean: Subtracted from the pixels in 0..1; one number or one a channel. Pretrained towers know theirs.
        std: Divides them; one number or one a channel.
        augment: What training pictures go through: ``"none"``, ``"light"``, ``"crop_flip"`` or a callable, as in
            :class:`~heliostat.LabelledImageDataModule`. A flip makes captions such as "left arrow" wrong.
        in_memory: Decode and resize the pictures once, at setup, and keep them as uint8. None: if a set takes at most
            1 GiB. Training pictures for ``"crop_flip"`` or a callable are decoded anew every time.
        batch_size: Training pairs in a batch, over all processes together. The last, incomplete batch is dropped.
        eval_batch_size: Pictures, or texts, in a batch of each process in validation, test and predict.
        num_workers: Worker processes of each loader.
        seed: Seed of shuffling, augmentation and the choice of captions.

    Attributes:
        class_names: Name of every label, sorted. Listing the sources for it is done once, when it is first asked for.

    Raises:
        ValueError: An argument out of range, or without effect; or, when the data are listed or read, a missing column,
            a malformed row, a path or a name that leads out of its folder or shard, a compressed shard, or too little.
        FileNotFoundError: A file or data set that is not there.
        ModuleNotFoundError: Pillow, the packages of ``"twemoji"``, or for data sets ``datasets`` is not installed.
    """

    def __init__(
        self,
        pairs: str | Sequence[str] = "twemoji",
        val_pairs: str | Sequence[str] | None = None,
        test_pairs: str | Sequence[str] | None = None,
        *,
        image_column: int | str = "image",
        caption_column: int | str | Sequence[int | str] = "caption",
        second_caption: bool = False,
        label_column: int | str | None = None,
        image_root: str | None = None,
        splits: tuple[str, str, str] = ("train", "validation", "test"),
        encoding: str = "utf-8",
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        prompts: Sequence[str] | None = ("a picture of {}",),
        embedder: torch.nn.Module | TextTower | None = None,
        teacher: torch.nn.Module | TextTower | None = None,
        cache: bool = True,
        cache_dir: str | None = None,
        text_only: bool = False,
        size: int = 64,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        augment: Augment | torch.nn.Module | Callable[[Tensor], Tensor] = "none",
        in_memory: bool | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_fractions(val_fraction, test_fraction)
        captions = list(caption_column) if not isinstance(caption_column, (int, str)) else [caption_column]
        if not captions:
            raise ValueError("caption_column is an empty list; name at least one column")
        if isinstance(prompts, str) or not all("{}" in prompt for prompt in prompts or ()):
            raise ValueError(f"prompts must be a list of texts with {{}} for the class, got {prompts!r}")
        self._towers: dict[str, Any] = {"text_embeddings": embedder, "teacher_embeddings": teacher}
        self._towers = {key: tower for key, tower in self._towers.items() if tower is not None}
        for name, tower in (("embedder", embedder), ("teacher", teacher)):
            if tower is not None and cache and not isinstance(getattr(tower, "fingerprint", None), str):
                raise ValueError(
                    f"{name}={type(tower).__name__} has no attribute fingerprint (a string that stands for its weights "
                    "and settings), without which a stale cache could not be told; give it one, or cache=False"
                )
        if streaming and self._towers and cache:
            raise ValueError(
                "streaming=True does not know all texts before training, so their embeddings cannot be cached; give "
                "cache=False, or streaming=False"
            )
        if streaming and not is_dataset(pairs):
            raise ValueError(
                f"streaming=True is for Hugging Face data sets, got pairs={pairs!r:.200}; shards and the pictures of "
                "tables are read while training in any case"
            )
        self._pipeline = PixelPipeline(size, 3, mean, std, augment)
        self._columns = Columns(image_column, captions, label_column, image_root, encoding)
        self.pairs, self.val_pairs, self.test_pairs = pairs, val_pairs, test_pairs
        self.second_caption = second_caption
        self.splits = splits
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed
        self.prompts = list(prompts or ())
        self.cache = cache
        self.cache_dir = _user_cache() if cache_dir is None else Path(cache_dir).expanduser()
        self.text_only = text_only
        self.in_memory = in_memory
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self._caches: dict[str, CachedTextEmbeddings] = {}
        self._sets: dict[str, _Pairs] = {}

    @property
    def class_names(self) -> list[str]:
        """Name of every label; empty if there are no classes."""
        return list(self._listed.labels)

    def prepare_data(self) -> None:
        """List the sources, and embed the texts that the cache lacks; on one process of each machine."""
        listed = self._listed
        if not self.cache or not self._towers:
            return
        texts = list(dict.fromkeys(listed.texts() + self._prompts()[0]))
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        for key, tower in self._towers.items():
            embed = _Embed(tower, device, f"{key}: embedding those of {len(texts)} texts that {self.cache_dir} lacks")
            CachedTextEmbeddings.get_or_build(texts, embed, self._embeddings_folder, fingerprint=tower.fingerprint)
            if isinstance(tower, torch.nn.Module):
                tower.cpu()

    def setup(self, stage: str) -> None:
        """Open the cache, list the sources, and read what the stage needs, once."""
        if self.cache and self._towers:
            self._caches.update({key: self._open_cache(key, tower) for key, tower in self._towers.items()})
            self._towers = {}
        for name in _PARTS_OF[stage]:
            if name not in self._sets and name in self._listed.parts:
                self._sets[name] = self._read(name)

    def teardown(self, stage: str) -> None:
        """Say how many pictures could not be read."""
        for name in _PARTS_OF[stage]:
            if name in self._sets and (count := int(self._sets[name].unreadable.sum())):
                warnings.warn(
                    f"{name}: {count} of {len(self._sets[name])} pictures that this process asked for cannot be read; "
                    "the next ones took their places",
                    stacklevel=2,
                )

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of ``batch_size`` pairs over all processes."""
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        if self.streaming:
            stream = self._stream(rank)
            return StreamLoader(
                stream,
                self.trainer,
                batch_size=local_batch_size(self.batch_size, world_size),
                drop_last=True,
                collate_fn=stream.collate,
                **loader_arguments(self.num_workers, self.seed),
            )
        pairs = self._sets["train"]
        sampler = GlobalBatchSampler(
            pairs, self.batch_size, num_replicas=world_size, rank=rank, seed=self.seed, keyed=True
        )
        return ResumableLoader(
            pairs,
            batch_size=sampler.local_batch_size,
            sampler=sampler,
            collate_fn=whole_batch,
            **loader_arguments(self.num_workers, self.seed),
        )

    def val_dataloader(self) -> list[DataLoader]:
        """Loaders of pictures, texts and prompts in order; no loader if there is no validation."""
        return self._evaluation_loaders("val")

    def test_dataloader(self) -> list[DataLoader]:
        """Loaders of pictures, texts and prompts in order; no loader if there is no test."""
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> DataLoader:
        """All of ``pairs`` in order, without augmentation."""
        if self.streaming:
            raise MisconfigurationException(
                "ImageTextDataModule(streaming=True) has no order to predict in; streaming=False has"
            )
        return self._evaluation_loader(self._sets["all"])

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Embed the texts on the batch's device, unless they were looked up."""
        for prefix in ("", "second_"):
            if f"{prefix}text" in batch:
                for key, tower in self._towers.items():
                    batch[prefix + key] = _Embed(tower, batch["index"].device)(batch[f"{prefix}text"])
        return batch

    def _evaluation_loaders(self, name: str) -> list[DataLoader]:
        if name not in self._sets:
            return []  # Lightning's word for no loader
        pairs = self._sets[name]
        groups: dict[tuple[str, ...], int] = {}
        group = torch.tensor([groups.setdefault(tuple(pairs.captions(i)), len(groups)) for i in range(len(pairs))])
        texts = [text for captions in groups for text in captions]
        group_of_text = torch.tensor([number for captions, number in groups.items() for _ in captions])
        sets: list[Dataset] = [_Texts(texts, {"group": group_of_text}, self._caches)]
        if not self.text_only:
            labels = torch.full((len(pairs),), -1)
            if (names := pairs.source.class_names) is not None:
                labels = torch.tensor([self._listed.labels.get(names[row], -1) for row in pairs.rows.tolist()])
            sets.insert(0, _EvaluationPictures(pairs, group, labels))
            prompts, described = self._prompts()
            if prompts and (labels >= 0).any():
                sets.append(_Texts(prompts, {"labels": torch.tensor(described)}, self._caches))
        return [self._evaluation_loader(one) for one in sets]

    def _evaluation_loader(self, dataset: Dataset) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.eval_batch_size,
            collate_fn=whole_batch,
            **loader_arguments(self.num_workers, self.seed),
        )

    def _open_cache(self, key: str, tower: Any) -> CachedTextEmbeddings:
        try:
            return CachedTextEmbeddings.open(self._embeddings_folder, tower.fingerprint)
        except ValueError as error:
            raise ValueError(f"{key} are not there; without a Trainer, call prepare_data() first: {error}") from error

    def _prompts(self) -> tuple[list[str], list[int]]:
        """The prompts, and the label that each describes."""
        pairs = [(p.replace("{}", name), label) for name, label in self._listed.labels.items() for p in self.prompts]
        return [prompt for prompt, _ in pairs], [label for _, label in pairs]

    @property
    def _embeddings_folder(self) -> Path:
        return self.cache_dir / "text_embeddings"

    @cached_property
    def _listed(self) -> _Listed:
        """What there is: the sources, the parts made of them, and the labels."""
        parts: dict[str, _Part] = {}
        for name, given, split in (("val", self.val_pairs, self.splits[1]), ("test", self.test_pairs, self.splits[2])):
            if given is not None:
                own_split = is_dataset(given) and has_splits(str(given)) and split != self.splits[0]
                if given == self.pairs and not own_split:
                    raise ValueError(f"{name}_pairs={given!r} are the training pairs; None takes a part of them")
                source = self._open(given, f"{name}_pairs", split)
                parts[name] = _Part(source, range(len(source.captions)))
        if not self.streaming:
            source = self._open(self.pairs, "pairs", self.splits[0])
            rows = range(len(source.captions))
            parts |= {"all": _Part(source, rows), **self._split(source, rows, set(parts))}
        found = {name for part in parts.values() for name in part.source.class_names or () if name}
        return _Listed(parts, {name: label for label, name in enumerate(sorted(found))})

    def _open(self, source: str | Sequence[str], argument: str, split: str) -> CaptionedPictures:
        return open_captioned(source, argument, self._columns, split=split, cache_dir=self.cache_dir)

    def _split(self, source: CaptionedPictures, rows: Sequence[int], given: set[str]) -> dict[str, _Part]:
        fractions = {"val": self.val_fraction, "test": self.test_fraction}
        val, test = (0 if name in given else fraction for name, fraction in fractions.items())
        if not val and not test:
            return {"train": _Part(source, rows)}
        concepts = source.concepts or ["\0".join(captions) for captions in source.captions]
        groups: dict[str, list[int]] = {}
        for row in rows:
            groups.setdefault(concepts[row], []).append(row)
        divided = split_groups([groups[concept] for concept in sorted(groups)], val, test, self.split_seed)
        if not divided[0]:
            raise ValueError(
                f"pairs has {len(rows)} pictures of {len(groups)} concepts; val_fraction={self.val_fraction} and "
                f"test_fraction={self.test_fraction} of these leave none for training"
            )
        return {name: _Part(source, part) for name, part in zip(("train", "val", "test"), divided, strict=True) if part}

    def _read(self, name: str) -> _Pairs:
        """Make a data set of a part, with its pictures in memory if they are to be there."""
        source, rows = self._listed.parts[name]
        second_caption = self.second_caption and name == "train"
        if second_caption and source.captions.total == len(source.captions):
            raise ValueError("second_caption=True, but no picture of pairs has more than one caption")
        pipeline = self._pipeline if name == "train" else replace(self._pipeline, augment="none")
        pixels = None
        if not self.text_only and pipeline.fits(len(rows), self.in_memory):
            pixels, readable = pipeline.read_all(source.pictures, rows, name)
            rows = [rows[i] for i in readable]
        return _Pairs(
            name=name,
            source=source,
            rows=torch.tensor(rows),
            pixels=pixels,
            pipeline=None if self.text_only else pipeline,
            caches=self._caches,
            second_caption=second_caption,
        )

    def _stream(self, rank: int) -> _Stream:
        captions, image = [str(column) for column in self._columns.captions], str(self._columns.image)
        rows = load_dataset(str(self.pairs), self.splits[0], "pairs", streaming=True)
        if rows.column_names is not None:
            check_columns(rows.column_names, captions, f"pairs={self.pairs!r}", "caption_column")
            if not self.text_only:
                check_columns(rows.column_names, [image], f"pairs={self.pairs!r}", "image_column")
        rows = rows.select_columns(captions if self.text_only else [image, *captions])
        if not self.text_only:
            rows = rows.cast_column(image, require("datasets", "streaming=True").Image(decode=False))
        rows = rows.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        rows = share_stream(rows, self.trainer, "ImageTextDataModule(streaming=True)")
        several = self.trainer is not None and self.trainer.world_size > 1
        pipeline = None if self.text_only else self._pipeline
        return _Stream(rows, image, captions, pipeline, self.second_caption, f"{self.seed}/{rank}", endless=several)


_PARTS_OF = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("all",)}


class _Part(NamedTuple):
    """What a loader serves: rows of a source."""

    source: CaptionedPictures
    rows: Sequence[int]


class _Listed(NamedTuple):
    parts: dict[str, _Part]
    labels: dict[str, int]  # of every class name

    def texts(self) -> list[str]:
        sources = {id(part.source): part.source for part in self.parts.values()}
        return [text for source in sources.values() for captions in source.captions for text in captions]


@dataclass
class _Embed:
    """A frozen tower on a device; says now and then how far it is, if ``task`` says with what."""

    tower: Any
    device: torch.device
    task: str = ""
    count: int = 0
    last_message: float = -inf

    def __call__(self, texts: list[str]) -> Tensor:
        if self.task and monotonic() > self.last_message + _MESSAGE_EVERY:
            rank_zero_info(f"{self.task}, on {self.device}: {self.count} done")
            self.last_message = monotonic()
        self.count += len(texts)
        if isinstance(self.tower, torch.nn.Module):
            self.tower.to(self.device).eval()
        with torch.no_grad():
            return self.tower(texts).to(self.device, torch.float32)


@dataclass(eq=False)
class _Pairs(Dataset):
    """A part as batches; an item is a position, or a pair of position and key, as the samplers yield them."""

    name: str
    source: CaptionedPictures
    rows: Tensor  # in the source, of each position
    pixels: Tensor | None  # of each position, if they are in memory
    pipeline: PixelPipeline | None
    caches: dict[str, CachedTextEmbeddings]
    second_caption: bool
    unreadable: Tensor = field(init=False)  # whether the picture at each position was found so

    def __post_init__(self) -> None:
        self.unreadable = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()  # workers write into it
        self._warned = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, items: list[Any]) -> dict[str, Any]:
        positions, keys = zip(*(item if isinstance(item, tuple) else (item, item) for item in items), strict=True)
        index = torch.tensor(positions)
        batch = {}
        if self.pipeline is not None:
            pixels, index = self.pictures(index, keys)
            batch["pixel_values"] = self.pipeline.normalise(self.pipeline.jitter(pixels, keys))
        captions = [self.captions(position) for position in index.tolist()]
        drawn = [
            _draw(texts, item[1] if isinstance(item, tuple) else 0) for texts, item in zip(captions, items, strict=True)
        ]
        batch |= _text_fields([first for first, _ in drawn], self.caches)
        if self.second_caption:
            batch |= _text_fields([second for _, second in drawn], self.caches, "second_")
        return {**batch, "index": index}

    def captions(self, position: int) -> list[str]:
        return self.source.captions[int(self.rows[position])]

    def pictures(self, index: Tensor, keys: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pictures in 0..1, and their positions: where one cannot be read, those of the next that can."""
        assert self.pipeline is not None
        if self.pixels is not None:
            return self.pipeline.prepare_batch(self.pixels, index, keys), index
        read = [self._next_readable(position, key) for position, key in zip(index.tolist(), keys, strict=True)]
        return torch.stack([picture for picture, _ in read]), torch.tensor([position for _, position in read])

    def _next_readable(self, start: int, key: int) -> tuple[Tensor, int]:
        assert self.pipeline is not None
        error: ValueError | None = None
        for position in (i % len(self) for i in range(start, start + len(self))):
            if self.unreadable[position]:
                continue
            try:
                row = int(self.rows[position])
                return self.pipeline.prepare(self.source.pictures, row, key), position
            except ValueError as reason:
                error = reason
                self.unreadable[position] = True
                if not self._warned:
                    warnings.warn(
                        f"{self.name}: {error}. The next one takes its place; all that follow are only counted",
                        stacklevel=2,
                    )
                    self._warned = True
            if (position - start) % len(self) >= _IN_A_ROW:
                break
        raise ValueError(f"{self.name}: no picture from position {start} on can be read; the last: {error}")


@dataclass(eq=False)
class _EvaluationPictures(Dataset):
    """The pictures of a part."""

    pairs: _Pairs
    group: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        assert self.pairs.pipeline is not None
        pixels, index = self.pairs.pictures(torch.tensor(positions), positions)
        return {
            "pixel_values": self.pairs.pipeline.normalise(pixels),
            "group": self.group[index],
            "labels": self.labels[index],
            "index": index,
        }


@dataclass(eq=False)
class _Texts(Dataset):
    """Texts with what else is known of each."""

    texts: list[str]
    columns: dict[str, Tensor]
    caches: dict[str, CachedTextEmbeddings]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        index = torch.tensor(positions)
        texts = [self.texts[position] for position in positions]
        columns = {name: column[index] for name, column in self.columns.items()}
        return {**_text_fields(texts, self.caches), **columns, "index": index}


def _draw(captions: list[str], key: int) -> tuple[str, str]:
    """Two captions, different ones if there are two."""
    other, first = divmod(key, len(captions))
    second = (first + 1 + other % max(1, len(captions) - 1)) % len(captions)
    return captions[first], captions[second]


def _text_fields(texts: list[str], caches: dict[str, CachedTextEmbeddings], prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}text": texts, **{prefix + key: cache.lookup(texts) for key, cache in caches.items()}}


class _Row(NamedTuple):
    """A row of a stream."""

    picture: Tensor | None
    texts: tuple[str, str]
    key: int


@dataclass(eq=False)
class _Stream(IterableDataset):
    """The rows of a Hugging Face stream with caption and picture; its shards are shared among the loader's workers."""

    rows: Any
    image_column: str
    caption_columns: list[str]
    pipeline: PixelPipeline | None
    second_caption: bool
    salt: str  # of the keys: the seed and the process
    endless: bool
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[_Row]:
        epoch = self.epoch
        worker = get_worker_info()
        found = True
        while found:
            self.rows.set_epoch(epoch)
            found = False
            passed_over: list[str] = []
            total = 0
            for total, row in enumerate(self.rows, 1):
                where = f"pairs, row {total} of the stream"
                captions = caption_texts([row.get(column) for column in self.caption_columns], where)
                key = _hash(f"{self.salt}/{worker.id if worker else 0}/{epoch}/{total}")
                try:
                    if not captions:
                        raise ValueError(f"{where}: no caption")
                    picture = None
                    if self.pipeline is not None:
                        picture = self.pipeline.prepare(_OnePicture(row[self.image_column], where), 0, key)
                except ValueError as error:
                    if not passed_over:
                        warnings.warn(f"{error}. The row is passed over, as are all such", stacklevel=2)
                    passed_over.append(str(error))
                    continue
                found = True
                yield _Row(picture, _draw(captions, key), key)
            if passed_over:
                warnings.warn(
                    f"pairs: passed over {len(passed_over)} of {total} rows in a pass of this process's share of the "
                    f"stream: {'; '.join(passed_over[:3])}{'; ...' if len(passed_over) > 3 else ''}",
                    stacklevel=2,
                )
            if not self.endless:
                return
            epoch += 1

    def collate(self, rows: list[_Row]) -> dict[str, Any]:
        batch: dict[str, Any] = {"text": [row.texts[0] for row in rows], "index": torch.full((len(rows),), -1)}
        if self.second_caption:
            batch["second_text"] = [row.texts[1] for row in rows]
        if self.pipeline is not None:
            pixels = torch.stack([row.picture for row in rows if row.picture is not None])
            jittered = self.pipeline.jitter(pixels, [row.key for row in rows])
            batch["pixel_values"] = self.pipeline.normalise(jittered)
        return batch


@dataclass
class _OnePicture:
    value: dict[str, Any]
    place: str

    def content(self, position: int) -> bytes:
        return encoded_image(self.value)

    def where(self, position: int) -> str:
        return self.place


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heliostat"
