"""Pictures with captions: to train image-text models, and to test them by retrieval and zero-shot classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from heliostat.components.text_cache import CachedTextEmbeddings
from heliostat.datamodules.captioned_pictures import Columns, is_picture_dataset, open_captioned
from heliostat.datamodules.loading import (
    GlobalBatchSampler,
    ResumableLoader,
    StreamLoader,
    loader_arguments,
    local_batch_size,
    whole_batch,
)
from heliostat.datamodules.pairs import (
    PARTS_OF,
    FrozenModel,
    Listed,
    PairStream,
    PicturesOfPart,
    StreamRow,
    draw_captions,
    has_fingerprint,
    list_parts,
    positions_and_keys,
    user_cache,
)
from heliostat.datamodules.pixels import Augment, PixelPipeline
from heliostat.datamodules.splits import check_fractions

TextTower = Callable[[list[str]], Tensor]


class ImageTextDataModule(LightningDataModule):
    r"""Pictures with captions for training, validation and test.

    Each of ``pairs``, ``val_pairs`` and ``test_pairs`` is one of:

    - ``"twemoji"``: 3,778 emoji with their names, class = category (:mod:`heliostat.datamodules.sources.twemoji`;
      graphics by Twitter and other contributors, CC-BY 4.0); needs no download. Parts of it share no concept: the skin
      tones of one stay together.
    - an image folder, a zip archive of one, or a list of them, with the name of its folder as a picture's class and
      caption; or ``"digits"`` (:mod:`heliostat.datamodules.sources.digits`).
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
            if tower is not None and cache:
                has_fingerprint(name, tower, "cache=False")
        if streaming and self._towers and cache:
            raise ValueError(
                "streaming=True does not know all texts before training, so their embeddings cannot be cached; give "
                "cache=False, or streaming=False"
            )
        if streaming and not is_picture_dataset(pairs):
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
        self.cache_dir = user_cache(cache_dir)
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
            embed = FrozenModel(
                tower, device, f"{key}: embedding those of {len(texts)} texts that {self.cache_dir} lacks"
            )
            CachedTextEmbeddings.get_or_build(texts, embed, self._embeddings_folder, fingerprint=tower.fingerprint)
            if isinstance(tower, torch.nn.Module):
                tower.cpu()

    def setup(self, stage: str) -> None:
        """Open the cache, list the sources, and read what the stage needs, once."""
        if self.cache and self._towers:
            self._caches.update({key: self._open_cache(key, tower) for key, tower in self._towers.items()})
            self._towers = {}
        for name in PARTS_OF[stage]:
            if name not in self._sets and name in self._listed.parts:
                self._sets[name] = self._read(name)

    def teardown(self, stage: str) -> None:
        """Say how many pictures could not be read."""
        for name in PARTS_OF[stage]:
            if name in self._sets:
                self._sets[name].report_unreadable()

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of ``batch_size`` pairs over all processes."""
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        if self.streaming:
            stream = _Stream.open(
                str(self.pairs),
                "pairs",
                self._columns,
                self.splits[0],
                None if self.text_only else self._pipeline,
                seed=self.seed,
                shuffle_buffer=self.shuffle_buffer,
                trainer=self.trainer,
                owner="ImageTextDataModule",
                second_caption=self.second_caption,
            )
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
                    device = batch["index"].device
                    embeddings = FrozenModel(tower, device)(batch[f"{prefix}text"])
                    batch[prefix + key] = embeddings.to(device, torch.float32)
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
    def _listed(self) -> Listed:
        """What there is: the sources, the parts made of them, and the labels."""
        return list_parts(
            {"pairs": self.pairs, "val_pairs": self.val_pairs, "test_pairs": self.test_pairs},
            lambda *args: open_captioned(args[0], args[1], self._columns, split=args[2], cache_dir=self.cache_dir),
            splits=self.splits,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            split_seed=self.split_seed,
            streaming=self.streaming,
        )

    def _read(self, name: str) -> _Pairs:
        """Make a data set of a part, with its pictures in memory if they are to be there."""
        part = self._listed.parts[name]
        second_caption = self.second_caption and name == "train"
        if second_caption and part.source.captions.total == len(part.source.captions):
            raise ValueError("second_caption=True, but no picture of pairs has more than one caption")
        pipeline = self._pipeline if name == "train" else replace(self._pipeline, augment="none")
        return _Pairs.read(
            part,
            name,
            None if self.text_only else pipeline,
            self.in_memory,
            caches=self._caches,
            second_caption=second_caption,
        )


@dataclass(eq=False, kw_only=True)
class _Pairs(PicturesOfPart):
    """A part as batches; an item is a position, or a pair of position and key, as the samplers yield them."""

    caches: dict[str, CachedTextEmbeddings]
    second_caption: bool

    def __getitems__(self, items: list[Any]) -> dict[str, Any]:
        positions, keys = positions_and_keys(items)
        index = torch.tensor(positions)
        batch = {}
        if self.pipeline is not None:
            pixels, index = self.pictures(index, keys)
            batch["pixel_values"] = self.pipeline.normalise(self.pipeline.jitter(pixels, keys))
        captions = [self.captions(position) for position in index.tolist()]
        drawn = [
            draw_captions(texts, item[1] if isinstance(item, tuple) else 0)
            for texts, item in zip(captions, items, strict=True)
        ]
        batch |= _text_fields([first for first, _ in drawn], self.caches)
        if self.second_caption:
            batch |= _text_fields([second for _, second in drawn], self.caches, "second_")
        return {**batch, "index": index}


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


def _text_fields(texts: list[str], caches: dict[str, CachedTextEmbeddings], prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}text": texts, **{prefix + key: cache.lookup(texts) for key, cache in caches.items()}}


@dataclass(eq=False)
class _Stream(PairStream):
    """A stream as batches."""

    second_caption: bool

    def collate(self, rows: list[StreamRow]) -> dict[str, Any]:
        batch: dict[str, Any] = {"text": [row.texts[0] for row in rows], "index": torch.full((len(rows),), -1)}
        if self.second_caption:
            batch["second_text"] = [row.texts[1] for row in rows]
        if self.pipeline is not None:
            pixels = torch.stack([row.picture for row in rows if row.picture is not None])
            jittered = self.pipeline.jitter(pixels, [row.key for row in rows])
            batch["pixel_values"] = self.pipeline.normalise(jittered)
        return batch
