"""What the data modules of pictures with captions share: parts of sources, their pictures, and streams of them."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from heliostat._extras import require
from heliostat.datamodules.captioned_pictures import CaptionedPictures, Columns, is_picture_dataset
from heliostat.datamodules.captions import caption_texts
from heliostat.datamodules.hub import check_columns, has_splits, load_dataset, share_stream
from heliostat.datamodules.image_readers import encoded_image
from heliostat.datamodules.pixels import PixelPipeline
from heliostat.datamodules.splits import split_groups

if TYPE_CHECKING:
    from typing_extensions import Self

PARTS_OF = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("all",)}

_IN_A_ROW = 100  # unreadable pictures one after another, after which something else must be wrong
_MESSAGE_EVERY = 30  # seconds


class Part(NamedTuple):
    """What a loader serves: rows of a source."""

    source: CaptionedPictures
    rows: Sequence[int]


class Listed(NamedTuple):
    """The parts there are (``train``, ``val``, ``test``, and ``all`` of the training source), and the classes."""

    parts: dict[str, Part]
    labels: dict[str, int]  # of every class name

    def sources(self) -> list[CaptionedPictures]:
        """Each source once."""
        return list({id(part.source): part.source for part in self.parts.values()}.values())

    def texts(self) -> list[str]:
        """All captions."""
        return [text for source in self.sources() for captions in source.captions for text in captions]


def list_parts(
    given: Mapping[str, str | Sequence[str] | None],
    open_source: Callable[[str | Sequence[str], str, str], CaptionedPictures],
    *,
    splits: tuple[str, str, str],
    val_fraction: float,
    test_fraction: float,
    split_seed: int,
    streaming: bool = False,
) -> Listed:
    """Open the sources, and take parts of the first for validation and test where no other is given.

    Args:
        given: The sources by the caller's argument, for error messages: training, validation, test.
        open_source: Opens a source; gets its argument and, if it is a data set, its split.
        splits: Split of each.
        val_fraction: Share of the concepts for validation. Where none are known, rows with the same captions are one.
        test_fraction: The same for test.
        split_seed: Seed of the parts.
        streaming: Leave the training source out.

    Raises:
        ValueError: A source is given twice, or nothing is left for training.
    """
    (argument, training), *others = given.items()
    parts: dict[str, Part] = {}
    for name, (other, source), split in zip(("val", "test"), others, splits[1:], strict=True):
        if source is not None:
            own_split = is_picture_dataset(source) and has_splits(str(source)) and split != splits[0]
            if source == training and not own_split:
                raise ValueError(f"{other}={source!r} are the training {argument}; None takes a part of them")
            opened = open_source(source, other, split)
            parts[name] = Part(opened, range(len(opened.captions)))
    if not streaming:
        assert training is not None
        opened = open_source(training, argument, splits[0])
        val, test = (0 if n in parts else f for n, f in (("val", val_fraction), ("test", test_fraction)))
        whole = Part(opened, range(len(opened.captions)))
        parts |= {"all": whole, **_split(whole, argument, val, test, split_seed)}
    found = {name for part in parts.values() for name in part.source.class_names or () if name}
    return Listed(parts, {name: label for label, name in enumerate(sorted(found))})


def _split(whole: Part, argument: str, val: float, test: float, seed: int) -> dict[str, Part]:
    if not val and not test:
        return {"train": whole}
    source, rows = whole
    concepts = source.concepts or ["\0".join(captions) for captions in source.captions]
    groups: dict[str, list[int]] = {}
    for row in rows:
        groups.setdefault(concepts[row], []).append(row)
    divided = split_groups([groups[concept] for concept in sorted(groups)], val, test, seed)
    if not divided[0]:
        raise ValueError(
            f"{argument} has {len(rows)} pictures of {len(groups)} concepts; val_fraction={val} and "
            f"test_fraction={test} of these leave none for training"
        )
    return {name: Part(source, part) for name, part in zip(("train", "val", "test"), divided, strict=True) if part}


@dataclass(eq=False)
class PicturesOfPart(Dataset):
    """A part with its pictures; a subclass makes batches of it."""

    name: str
    source: CaptionedPictures
    rows: Tensor  # in the source, of each position
    pixels: Tensor | None  # of each position, if they are in memory
    pipeline: PixelPipeline | None  # None: no pictures
    unreadable: Tensor = field(init=False)  # whether the picture at each position was found so

    def __post_init__(self) -> None:
        self.unreadable = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()  # workers write into it
        self._warned = False

    @classmethod
    def read(
        cls, part: Part, name: str, pipeline: PixelPipeline | None, in_memory: bool | None, **further: Any
    ) -> Self:
        """Make one of a part, with its pictures in memory if they are to be there."""
        source, rows = part
        pixels = None
        if pipeline is not None and pipeline.fits(len(rows), in_memory):
            pixels, readable = pipeline.read_all(source.pictures, rows, name)
            rows = [rows[i] for i in readable]
        return cls(name=name, source=source, rows=torch.tensor(rows), pixels=pixels, pipeline=pipeline, **further)

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self, position: int) -> list[str]:
        """All captions of a picture."""
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

    def report_unreadable(self) -> None:
        """Warn of how many pictures could not be read."""
        if count := int(self.unreadable.sum()):
            warnings.warn(
                f"{self.name}: {count} of {len(self)} pictures that this process asked for cannot be read; "
                "the next ones took their places",
                stacklevel=3,
            )


def positions_and_keys(items: Sequence[Any]) -> tuple[list[int], list[int]]:
    """What samplers yield: pairs of position and key, or positions, which are their own keys."""
    pairs = [item if isinstance(item, tuple) else (item, item) for item in items]
    return [position for position, _ in pairs], [key for _, key in pairs]


def draw_captions(captions: list[str], key: int) -> tuple[str, str]:
    """Two captions, different ones if there are two."""
    other, first = divmod(key, len(captions))
    second = (first + 1 + other % max(1, len(captions) - 1)) % len(captions)
    return captions[first], captions[second]


class StreamRow(NamedTuple):
    """A row of a stream."""

    picture: Tensor | None
    texts: tuple[str, str]
    key: int


@dataclass(eq=False)
class PairStream(IterableDataset):
    """The rows of a Hugging Face stream with caption and picture; its shards are shared among the loader's workers."""

    rows: Any
    argument: str
    image_column: str
    caption_columns: list[str]
    pipeline: PixelPipeline | None  # None: no pictures
    salt: str  # of the keys: the seed and the process
    endless: bool
    epoch: int = field(default=0, kw_only=True)

    @classmethod
    def open(
        cls,
        source: str,
        argument: str,
        columns: Columns,
        split: str,
        pipeline: PixelPipeline | None,
        *,
        seed: int,
        shuffle_buffer: int,
        trainer: Trainer | None,
        owner: str,
        **further: Any,
    ) -> Self:
        """Open this process's share of a data set.

        Args:
            source: The data set.
            argument: The caller's argument that holds it, for error messages.
            columns: Where things stand.
            split: Split of the data set.
            pipeline: Prepares the pictures; None: no pictures.
            seed: Seed of the order and of the keys.
            shuffle_buffer: Rows held in memory to shuffle.
            trainer: Knows the processes.
            owner: What messages say of the caller.
            **further: Fields of a subclass.
        """
        captions, image = [str(column) for column in columns.captions], str(columns.image)
        rows = load_dataset(source, split, argument, streaming=True)
        if rows.column_names is not None:
            check_columns(rows.column_names, captions, f"{argument}={source!r}", "caption_column")
            if pipeline is not None:
                check_columns(rows.column_names, [image], f"{argument}={source!r}", "image_column")
        rows = rows.select_columns(captions if pipeline is None else [image, *captions])
        if pipeline is not None:
            rows = rows.cast_column(image, require("datasets", "streaming=True").Image(decode=False))
        rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        rows = share_stream(rows, trainer, f"{owner}(streaming=True)")
        several = trainer is not None and trainer.world_size > 1
        salt = f"{seed}/{trainer.global_rank if trainer else 0}"
        return cls(rows, argument, image, captions, pipeline, salt, several, **further)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[StreamRow]:
        epoch = self.epoch
        worker = get_worker_info()
        found = True
        while found:
            self.rows.set_epoch(epoch)
            found = False
            passed_over: list[str] = []
            total = 0
            for total, row in enumerate(self.rows, 1):
                where = f"{self.argument}, row {total} of the stream"
                captions = caption_texts([row.get(column) for column in self.caption_columns], where)
                key = _hash(f"{self.salt}/{worker.id if worker else 0}/{epoch}/{total}")
                try:
                    if self.caption_columns and not captions:
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
                yield StreamRow(picture, draw_captions(captions or [""], key), key)
            if passed_over:
                warnings.warn(
                    f"{self.argument}: passed over {len(passed_over)} of {total} rows in a pass of this process's "
                    f"share of the stream: {'; '.join(passed_over[:3])}{'; ...' if len(passed_over) > 3 else ''}",
                    stacklevel=2,
                )
            if not self.endless:
                return
            epoch += 1

    def collate(self, rows: list[StreamRow]) -> dict[str, Any]:
        """Make a batch."""
        raise NotImplementedError


@dataclass
class _OnePicture:
    value: dict[str, Any]
    place: str

    def content(self, position: int) -> bytes:
        return encoded_image(self.value)

    def where(self, position: int) -> str:
        return self.place


@dataclass
class FrozenModel:
    """A model on a device, without gradients; says now and then how far it is, if ``task`` says with what."""

    model: Any
    device: torch.device
    task: str = ""
    count: int = 0
    last_message: float = -inf

    def __call__(self, rows: Any) -> Any:
        """What the model gives for a batch of texts or pictures."""
        if self.task and monotonic() > self.last_message + _MESSAGE_EVERY:
            rank_zero_info(f"{self.task}, on {self.device}: {self.count} done")
            self.last_message = monotonic()
        self.count += len(rows)
        if isinstance(self.model, torch.nn.Module):
            self.model.to(self.device).eval()
        with torch.no_grad():
            return self.model(rows)


def has_fingerprint(name: str, model: Any, instead: str) -> None:
    """Raise a ValueError if what a model makes cannot be kept; ``instead`` is the setting that does not keep it."""
    if not isinstance(getattr(model, "fingerprint", None), str):
        raise ValueError(
            f"{name}={type(model).__name__} has no attribute fingerprint (a string that stands for its weights "
            f"and settings), without which a stale cache could not be told; give it one, or {instead}"
        )


def user_cache(cache_dir: str | None) -> Path:
    """The folder given, or by default ``heliostat`` in the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heliostat"


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
