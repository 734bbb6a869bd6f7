"""Labelled pictures: to train and test classifiers and image retrieval, and to adapt them to corrupted pictures."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from heliostat.components.corruptions import CORRUPTIONS, corrupt
from heliostat.datamodules.hub import has_splits
from heliostat.datamodules.image_readers import DatasetPictures, Pictures, open_pictures
from heliostat.datamodules.loading import (
    ClassBatchSampler,
    GlobalBatchSampler,
    ResumableLoader,
    loader_arguments,
    whole_batch,
)
from heliostat.datamodules.pixels import Augment, PixelPipeline
from heliostat.datamodules.sources.glyphs import CHARACTERS, glyphs
from heliostat.datamodules.splits import check_fractions, split_groups

Split = Literal["classes", "images"]


class LabelledImageDataModule(LightningDataModule):
    r"""Pictures with class labels for training, validation and test.

    Each of ``images``, ``val_images`` and ``test_images`` is one of:

    - ``"glyphs"``: characters in the fonts of matplotlib, class = character, white on black
      (:mod:`heliostat.datamodules.sources.glyphs`); needs no file and no download.
    - an image folder, a zip archive of one (read in place, nothing is unpacked), or a list of them. The class is the
      folder that holds the picture, as a path relative to the root (``"Greek/character01"``); in an archive the folders
      that all classes share are left out.
    - a directory that holds a Hugging Face data set (from ``save_to_disk``, or with .parquet files), or a data set's id
      on the Hub. Its classes are numbered anew, see below.

    Batches everywhere: ``{"pixel_values": (B, C, size, size), "labels": (B,), "index": (B,)}``: float32 pixels, scaled
    to 0..1 and normalised; int64 labels, 0 to ``num_classes`` - 1 for the training classes in the sorted order of their
    names and above for classes that only validation and test have; and the int64 position of the picture in its set. On
    several processes Lightning repeats some pictures to give each process as many; drop repeated indices. Batches of
    the test loaders also say which ``"stream"`` they are of: ``"clean"``, or the name of a corruption.

    Training batches depend on ``seed`` and the epoch, and on the number of neither processes nor workers, and a resumed
    run goes on at the next one: what a random augmentation draws belongs to the picture's place in the epoch. The test
    pictures come in a random order that is always the same, because adaptation at test time depends on the order.

    Pictures that cannot be read are counted in a warning at setup and left out (if ``in_memory``), or raise an error
    when they are reached (if not). Folders without pictures and classes with too few are counted in a warning.

    Args:
        images: Training pictures.
        val_images: Validation pictures; None: a part of ``images``.
        test_images: Test pictures; None: a part of ``images``.
        classes: Use only these classes of all three; for glyphs the characters, as one string. None: all.
        image_column: Column of the pictures in a Hugging Face data set.
        label_column: Column of the classes in a Hugging Face data set.
        splits: Splits of a Hugging Face data set for ``images``, ``val_images`` and ``test_images``.
        split: How parts are taken from ``images``. ``"classes"``: whole classes, unseen in training, for retrieval.
            ``"images"``: pictures of every class, in equal shares, for classification; validation and test may then
            have no class that training has not.
        val_fraction: Share of the classes or pictures for validation, if ``val_images`` is None; 0: no validation.
        test_fraction: The same for test.
        split_seed: Seed of the parts. Not ``seed``, so that runs of several seeds compare on the same ones.
        size: Height and width. Other pictures are scaled by their shorter side and cropped in the middle.
        channels: 1 (grey) or 3 (RGB).
        mean: Subtracted from the pixels in 0..1; one number or one a channel.
        std: Divides them; one number or one a channel.
        augment: What training pictures go through: ``"none"``; ``"light"``, a small turn, shift and change of size, no
            flip, for characters; ``"crop_flip"``, a random crop of 8 to 100 % of the area and a horizontal flip, for
            photographs (needs torchvision); or a callable, such as a transform of ``torchvision.transforms.v2``, from a
            picture ``(C, H, W)``, uint8 and not yet resized, to one of uint8 or of floats in 0..1. It must draw from
            torch's global generator, which is seeded for each picture.
        batch_size: Training pictures in a batch, over all processes together. The last, incomplete batch is dropped.
        samples_per_class: K: compose each batch of ``batch_size`` / K classes with K pictures each, every class equally
            often, as metric learning needs it. A class with fewer pictures repeats them. None: shuffle all pictures.
        corruptions: Make one test loader for each of these (see `heliostat.components.corrupt`; ``"clean"`` is the
            pictures as they are), or for ``"all"`` fifteen. None: one loader of clean pictures.
        severity: Severity of the corruptions, 1 to 5.
        eval_batch_size: Pictures in a batch of each process in validation, test and predict.
        in_memory: Decode and resize the pictures of files once, at setup, and keep them as uint8. None: if a set takes
            at most 1 GiB. Training pictures for ``"crop_flip"`` or a callable are decoded anew every time.
        num_workers: Worker processes of each loader.
        seed: Seed of shuffling and augmentation.

    Attributes:
        class_names: Name of every label. Listing the sources for it is done once, when it is first asked for.
        num_classes: Number of training classes.
        test_names: The streams of the test loaders, in their order.

    Raises:
        ValueError: An argument out of range; or, when the data are listed or read, a source without pictures, an
            unknown class or column, a part that comes out empty, or more in a batch than there is.
        FileNotFoundError: A folder, archive or data set that is not there.
        ModuleNotFoundError: matplotlib (which brings Pillow) or, for data sets, ``datasets`` is not installed.
    """

    def __init__(
        self,
        images: str | Sequence[str] = "glyphs",
        val_images: str | Sequence[str] | None = None,
        test_images: str | Sequence[str] | None = None,
        *,
        classes: str | Sequence[str] | None = None,
        image_column: str = "image",
        label_column: str = "label",
        splits: tuple[str, str, str] = ("train", "validation", "test"),
        split: Split = "classes",
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        size: int = 32,
        channels: int = 1,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        augment: Augment | torch.nn.Module | Callable[[Tensor], Tensor] = "none",
        batch_size: int = 64,
        samples_per_class: int | None = None,
        corruptions: str | Sequence[str] | None = None,
        severity: int = 5,
        eval_batch_size: int = 128,
        in_memory: bool | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if split not in get_args(Split):
            raise ValueError(f"split must be one of {', '.join(map(repr, get_args(Split)))}, got {split!r}")
        check_fractions(val_fraction, test_fraction)
        self._pipeline = PixelPipeline(size, channels, mean, std, augment)
        self.test_names = _stream_names(corruptions)
        if severity not in range(1, 6):
            raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity!r}")
        self.images, self.val_images, self.test_images = images, val_images, test_images
        self.classes = classes
        self.image_column, self.label_column, self.splits = image_column, label_column, splits
        self.split: Split = split
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed
        self.size, self.channels, self.augment = size, channels, augment
        self.batch_size, self.samples_per_class = batch_size, samples_per_class
        self.corruptions, self.severity = corruptions, severity
        self.eval_batch_size, self.in_memory = eval_batch_size, in_memory
        self.num_workers, self.seed = num_workers, seed
        self._sets: dict[str, _Images] = {}

    @property
    def class_names(self) -> list[str]:
        """Name of every label, those of training first."""
        return list(self._listed.labels)

    @property
    def num_classes(self) -> int:
        """Number of training classes."""
        return self._listed.num_classes

    def setup(self, stage: str) -> None:
        """List the sources, and read what the stage needs, once."""
        for name in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("all",)}[stage]:
            if name not in self._sets and name in self._listed.parts:
                self._sets[name] = self._read(name)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of ``batch_size`` pictures over all processes, or of P classes with K pictures each."""
        dataset = self._sets["train"]
        common: dict[str, Any] = {
            "num_replicas": self.trainer.world_size if self.trainer else 1,
            "rank": self.trainer.global_rank if self.trainer else 0,
            "seed": self.seed,
            "keyed": self.augment != "none",
        }
        sampler = (
            GlobalBatchSampler(dataset, self.batch_size, **common)
            if self.samples_per_class is None
            else ClassBatchSampler(dataset.labels.tolist(), self.batch_size, self.samples_per_class, **common)
        )
        return ResumableLoader(
            dataset, batch_size=sampler.local_batch_size, sampler=sampler, **self._loader_arguments()
        )

    def val_dataloader(self) -> DataLoader | list:
        """Validation pictures in order; no loader if there are none."""
        return self._eval_loader(self._sets["val"]) if "val" in self._sets else []

    def test_dataloader(self) -> DataLoader | list:
        """Test pictures in their fixed random order: one loader, or a list of one a stream if ``corruptions``."""
        if "test" not in self._sets:
            return []  # Lightning's word for no loader
        loaders = [
            self._eval_loader(replace(self._sets["test"], stream=name, severity=self.severity))
            for name in self.test_names
        ]
        return loaders[0] if self.corruptions is None else loaders

    def predict_dataloader(self) -> DataLoader:
        """All of ``images`` in order, without augmentation."""
        return self._eval_loader(self._sets["all"])

    def _eval_loader(self, dataset: _Images) -> DataLoader:
        return DataLoader(dataset, batch_size=self.eval_batch_size, **self._loader_arguments())

    def _loader_arguments(self) -> dict[str, Any]:
        return {**loader_arguments(self.num_workers, self.seed), "collate_fn": whole_batch}

    @cached_property
    def _listed(self) -> _Listed:
        """What there is: the sources, the parts made of them, and the labels."""
        given = {"images": self.images, "val_images": self.val_images, "test_images": self.test_images}
        sources = {
            argument: self._open(argument, source, split)
            for (argument, source), split in zip(given.items(), self.splits, strict=True)
            if source is not None
        }
        self._check_classes(sources)
        val_fraction = 0 if "val_images" in sources else self.val_fraction
        test_fraction = 0 if "test_images" in sources else self.test_fraction
        source = sources["images"]
        train, val, test = _split_off(source, self.split, val_fraction, test_fraction, self.split_seed)
        parts = {"train": _Part(source, train), "all": _Part(source, source.rows)}
        for name, rows in (("val", val), ("test", test)):
            if f"{name}_images" in sources:
                other = sources[f"{name}_images"]
                parts[name] = _Part(other, other.rows)
            elif rows:
                parts[name] = _Part(source, rows)
        trained = sorted(parts["train"].names())
        others = sorted({name for part in parts.values() for name in part.names()} - set(trained))
        for name in ("val", "test"):
            if f"{name}_images" in sources:
                self._check_disjoint(f"{name}_images", parts[name].names(), set(trained))
        labels = {name: label for label, name in enumerate(trained + others)}
        return _Listed(parts, labels, len(trained))

    def _open(self, argument: str, source: str | Sequence[str], split: str) -> _Source:
        if source == "glyphs":
            characters = CHARACTERS if self.classes is None else "".join(c for c in self.classes if len(c) == 1)
            rendered = glyphs(characters, size=self.size)
            names = [characters[label] for label in rendered.labels.tolist()]
            pictures: Pictures | Tensor = rendered.images.expand(-1, self.channels, -1, -1)
        else:
            opened = open_pictures(
                source, argument, split=split, image_column=self.image_column, label_column=self.label_column
            )
            pictures, names = opened, opened.class_names
        own_split = isinstance(pictures, DatasetPictures) and has_splits(str(source)) and split != self.splits[0]
        if argument != "images" and source == self.images and not own_split:
            raise ValueError(f"{argument}={source!r} are the training pictures; None takes a part of them")
        wanted = None if self.classes is None else set(self.classes)
        rows = [row for row, name in enumerate(names) if wanted is None or name in wanted]
        if not rows:
            raise ValueError(f"{argument}={source!r} has no picture of classes={self.classes!r:.200}")
        return _Source(pictures, names, rows)

    def _check_classes(self, sources: dict[str, _Source]) -> None:
        known = {name for source in sources.values() for name in source.class_names}
        for name in self.classes or ():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                hint = f"; near names: {', '.join(near)}" if near else f"; there are {', '.join(sorted(known)):.200}"
                raise ValueError(f"classes: no source has the class {name!r}{hint}")

    def _check_disjoint(self, argument: str, names: set[str], trained: set[str]) -> None:
        if self.split == "images" and (unknown := sorted(names - trained)):
            raise ValueError(
                f"{argument} has {len(unknown)} classes that images has not: {', '.join(unknown[:5]):.300}. "
                "split='images' means the same classes; for unseen ones, give split='classes'"
            )
        if self.split == "classes" and (shared := sorted(names & trained)):
            rank_zero_warn(
                f"{argument} shares {len(shared)} of its {len(names)} classes with images, though split='classes' "
                f"means unseen ones: {', '.join(shared[:5]):.300}"
            )

    def _read(self, name: str) -> _Images:
        """Make a data set of a part, with its pictures in memory if they are to be there."""
        source, rows = self._listed.parts[name]
        pictures = source.pictures
        pipeline = self._pipeline if name == "train" else replace(self._pipeline, augment="none")
        names = [source.class_names[row] for row in rows]
        if isinstance(pictures, Tensor):
            pictures = pictures[rows]
            rows = list(range(len(rows)))
        elif pipeline.fits(len(rows), self.in_memory):
            pictures, readable = pipeline.read_all(pictures, rows, name)
            names = [names[i] for i in readable]
            rows = list(range(len(readable)))
        if name in ("val", "test") and self.split == "classes":
            counts = Counter(names)
            if single := sum(count == 1 for count in counts.values()):
                rank_zero_warn(
                    f"{name}: {single} of {len(counts)} classes have a single picture, for which there is none of its "
                    "class to retrieve"
                )
        order = torch.arange(len(rows))
        if name == "test":
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.split_seed))
        return _Images(
            pictures=pictures,
            rows=torch.tensor(rows),
            labels=torch.tensor([self._listed.labels[name] for name in names]),
            order=order,
            pipeline=pipeline,
        )


class _Source(NamedTuple):
    """The pictures that an argument gives, encoded or as a tensor, and the rows of those to use."""

    pictures: Pictures | Tensor
    class_names: Sequence[str]  # of every picture
    rows: list[int]


class _Part(NamedTuple):
    """What a loader serves: rows of a source."""

    source: _Source
    rows: list[int]

    def names(self) -> set[str]:
        return {self.source.class_names[row] for row in self.rows}


class _Listed(NamedTuple):
    parts: dict[str, _Part]
    labels: dict[str, int]  # of every class name, in the order of the labels
    num_classes: int


@dataclass(eq=False)
class _Images(Dataset):
    """A part as batches; an item is a position, or a pair of position and key, as the samplers yield them."""

    pictures: Pictures | Tensor
    rows: Tensor
    labels: Tensor
    order: Tensor  # the picture at each position
    pipeline: PixelPipeline
    stream: str | None = None
    severity: int = 5

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, items: list[Any]) -> dict[str, Any]:
        positions, keys = zip(*(item if isinstance(item, tuple) else (item, item) for item in items), strict=True)
        index = self.order[list(positions)]
        pixels = self.pipeline.prepare_batch(self.pictures, self.rows[index], keys)
        pixels = self.pipeline.jitter(pixels, keys)
        if self.stream not in (None, "clean"):
            pixels = corrupt(pixels, self.stream, self.severity, seed=index.tolist())
        batch = {"pixel_values": self.pipeline.normalise(pixels), "labels": self.labels[index], "index": index}
        return batch if self.stream is None else {**batch, "stream": self.stream}


def _stream_names(corruptions: str | Sequence[str] | None) -> list[str]:
    if corruptions is None:
        return ["clean"]
    names = [corruptions] if isinstance(corruptions, str) else list(corruptions)
    if names == ["all"]:
        return list(CORRUPTIONS)
    known = ("clean", *CORRUPTIONS)
    if not names or len(set(names)) < len(names) or not set(names) <= set(known):
        raise ValueError(f"corruptions must be 'all', or different names of {', '.join(known)}; got {corruptions!r}")
    return names


def _split_off(
    source: _Source, split: Split, val_fraction: float, test_fraction: float, seed: int
) -> tuple[list[int], list[int], list[int]]:
    """Divide rows among training, validation and test."""
    rows_of: dict[str, list[int]] = {}
    for row in source.rows:
        rows_of.setdefault(source.class_names[row], []).append(row)
    groups = [rows_of[name] for name in sorted(rows_of)]
    if split == "classes":
        parts = split_groups(groups, val_fraction, test_fraction, seed)
    else:
        parts = _split_each(groups, val_fraction, test_fraction, seed)
    for rows, name, wanted in zip(parts, ("train", "val", "test"), (True, val_fraction, test_fraction), strict=True):
        if wanted and not rows:
            raise ValueError(
                f"images has {len(source.rows)} pictures of {len(groups)} classes; val_fraction={val_fraction} and "
                f"test_fraction={test_fraction} of its {split} leave none for {name}"
            )
    return parts


def _split_each(
    groups: list[list[int]], val_fraction: float, test_fraction: float, seed: int
) -> tuple[list[int], list[int], list[int]]:
    """Divide every group among training, validation and test."""
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    total = 0
    for rows in groups:
        # Shares of the running total, so that small classes get theirs too; one picture stays for training.
        total += len(rows)
        shuffled = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        for part, fraction in ((1, val_fraction), (2, test_fraction)):
            take = min(max(0, round(fraction * total) - len(parts[part])), len(shuffled) - 1)
            parts[part].extend(shuffled[:take])
            shuffled = shuffled[take:]
        parts[0].extend(shuffled)
    for rows in parts:
        rows.sort()
    return parts
