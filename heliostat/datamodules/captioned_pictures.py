"""Pictures with captions from tables, webdataset shards, Hugging Face data sets and Twemoji, listed at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from heliostat.datamodules.captions import Captions, caption_texts
from heliostat.datamodules.hub import check_columns, is_dataset, is_saved_dataset, load_dataset
from heliostat.datamodules.image_readers import (
    IMAGE_SUFFIXES,
    DatasetPictures,
    FilePictures,
    ImageFile,
    ListedPictures,
    open_pictures,
)
from heliostat.datamodules.readers import SUFFIXES, Row, read_rows
from heliostat.datamodules.sources.digits import NAMES, digits
from heliostat.datamodules.sources.twemoji import twemoji
from heliostat.datamodules.webdataset_shards import index_shards, looks_like_shards

_TABLES = tuple(suffix for suffix in SUFFIXES if suffix != ".txt")  # lines have no columns
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")
_DATA_FILES = (".parquet", ".arrow", ".csv", ".tsv", ".jsonl")  # of a data set, even with pictures beside them


@dataclass
class CaptionedPictures:
    """Encoded pictures, their captions, and what else is known of them.

    Attributes:
        pictures: The pictures.
        captions: The captions of each: at least one, or none of any.
        class_names: The class of each, "" if unknown; None: there are no classes.
        concepts: What each shows; rows of one concept belong in the same part of a split. None: rows with the same
            captions do.
    """

    pictures: ListedPictures
    captions: Captions
    class_names: Sequence[str] | None = None
    concepts: Sequence[str] | None = None


@dataclass
class Columns:
    """Where pictures, captions and classes stand in a source.

    Attributes:
        image: Column of the pictures.
        captions: Columns of the captions; none: they are not read, nor missed.
        label: Column of the classes; None: no classes.
        image_root: Folder of the paths in a table; None: that of the table.
        encoding: Encoding of a text file.
    """

    image: str | int
    captions: list[Any]
    label: str | int | None
    image_root: str | None
    encoding: str


def is_picture_dataset(source: str | Sequence[str]) -> bool:
    """Tell a Hugging Face data set from files; an image folder, with pictures and no data files, is none."""
    if source in ("twemoji", "digits") or not is_dataset(source, (*SUFFIXES, *_ARCHIVES)):
        return False
    folder = Path(str(source)).expanduser()
    return not folder.is_dir() or is_saved_dataset(folder) or not _is_image_folder(folder)


def _is_image_folder(folder: Path) -> bool:
    for _, _, names in os.walk(folder, followlinks=True):
        if any(name.lower().endswith(_DATA_FILES) for name in names):
            return False
        if any(name.lower().endswith(IMAGE_SUFFIXES) for name in names):
            return True
    return False


def open_captioned(
    source: str | Sequence[str],
    argument: str,
    columns: Columns,
    *,
    split: str,
    cache_dir: Path | None,
    unsorted: bool = False,
) -> CaptionedPictures:
    """List the pictures of a source that have a caption; what has none is counted in a warning.

    Args:
        source: ``"twemoji"``; ``"digits"``; image folders and zip archives of such (see `open_pictures`), whose
            captions are the names of the classes; webdataset shards (see `index_shards`), tables of paths and captions
            (see `read_rows`), or a Hugging Face data set.
        argument: The caller's argument that holds ``source``, for error messages.
        columns: Where things stand.
        split: Split of a data set.
        cache_dir: Where the index of shards is kept.
        unsorted: Take image folders whose pictures lie in no class folder, too: without class and caption.

    Raises:
        FileNotFoundError: There is no such file or data set; or none of the first pictures of a table.
        ValueError: Nothing in it, a missing column, a malformed row, or a path that leads out of ``image_root``.
    """
    if source == "twemoji":
        emoji = twemoji()
        return CaptionedPictures(
            FilePictures([ImageFile("", one.path) for one in emoji]),
            Captions([one.caption] for one in emoji),
            [one.category for one in emoji],
            [one.concept for one in emoji],
        )
    if source == "digits":
        pictures = digits()
        names = [NAMES[label] for label in pictures.labels]
        return CaptionedPictures(
            pictures, Captions([name] for name in names), [str(label) for label in pictures.labels], _each(names)
        )
    if is_picture_dataset(source):
        return _open_dataset(str(source), argument, columns, split)
    paths = [source] if isinstance(source, str) else list(source)
    if paths and all(map(looks_like_shards, paths)):
        return _open_shards(paths, argument, columns, cache_dir)
    if paths and all(path.lower().endswith(".zip") or Path(path).expanduser().is_dir() for path in paths):
        return _open_folders(paths, argument, unsorted)
    if unknown := [path for path in paths if not path.lower().endswith(_TABLES)]:
        raise ValueError(
            f"{argument}: cannot tell what {unknown[0]!r} is. Give 'twemoji', 'digits', shards (all named .tar), "
            f"tables (named {', '.join(_TABLES)}), image folders or .zip archives of such, a directory that holds a "
            "Hugging Face data set, or its id on the Hub"
        )
    return _open_tables(paths, argument, columns)


def _open_folders(paths: list[str], argument: str, unsorted: bool) -> CaptionedPictures:
    pictures = open_pictures(paths, argument, split="", image_column="", label_column="", unsorted=unsorted)
    names = pictures.class_names
    if "" not in names:
        return CaptionedPictures(pictures, Captions([name] for name in names), names, _each(names))
    return CaptionedPictures(pictures, Captions([] for _ in names), None, _each(names))


def _each(rows: Sequence[str]) -> list[str]:
    """Every picture a concept of its own, where captions are classes, which no part of a split may lack."""
    return [str(row) for row in range(len(rows))]


def _open_shards(paths: list[str], argument: str, columns: Columns, cache_dir: Path | None) -> CaptionedPictures:
    named = [*columns.captions, columns.label]
    if numbers := [column for column in named if isinstance(column, int)]:
        raise ValueError(
            f"{argument}: the keys of .json members have names; got the position {numbers[0]} in caption_column or "
            "label_column"
        )
    label = None if columns.label is None else str(columns.label)
    shards = index_shards(paths, argument, caption_columns=columns.captions, label_column=label, cache_dir=cache_dir)
    return CaptionedPictures(*shards)


def _open_tables(paths: list[str], argument: str, columns: Columns) -> CaptionedPictures:
    wanted = [columns.image, *columns.captions, *([] if columns.label is None else [columns.label])]
    names = "image_column, caption_column and label_column"
    files: list[ImageFile] = []
    captions: list[list[str]] = []
    total = 0
    for row in read_rows(paths, wanted, encoding=columns.encoding, argument=names):
        total += 1
        texts = caption_texts(row.values[1 : 1 + len(columns.captions)], row.where)
        if row.values[0] and (texts or not columns.captions):
            label = row.values[-1] if columns.label is not None else None
            files.append(ImageFile("" if label is None else str(label), _picture_path(row, argument, columns)))
            captions.append(texts)
    if not files:
        raise ValueError(f"{argument}={paths!r:.200}: none of {total} rows has both a path and a caption")
    if len(files) < total:
        rank_zero_warn(f"{argument}: passed over {total - len(files)} of {total} rows, which lack a path or a caption")
    if not any(os.path.exists(file.path) for file in files[:100]):
        raise FileNotFoundError(
            f"{argument}: there is no picture {files[0].path!r}, nor any other of the first {len(files[:100])} rows; "
            "the folder that the paths start from is the argument image_root (default: the folder of the table)"
        )
    pictures = FilePictures(files)
    return CaptionedPictures(pictures, Captions(captions), None if columns.label is None else pictures.class_names)


def _picture_path(row: Row, argument: str, columns: Columns) -> str:
    if not isinstance(row.values[0], str):
        raise ValueError(f"{row.where}: the path of a picture must be text, got {row.values[0]!r:.200}")
    root = Path(row.source).parent if columns.image_root is None else Path(columns.image_root).expanduser()
    root_path = os.path.abspath(root)
    path = os.path.normpath(os.path.join(root_path, row.values[0]))
    if os.path.commonpath([path, root_path]) != root_path:
        raise ValueError(
            f"{argument}: {row.where}: the path {row.values[0]!r} leads out of {root_path!r}; give as image_root a "
            "folder that holds all pictures"
        )
    return path


def _open_dataset(source: str, argument: str, columns: Columns, split: str) -> CaptionedPictures:
    data = load_dataset(source, split, argument, streaming=False)
    name = f"{argument}={source!r}"
    check_columns(data.column_names, columns.captions, name, "caption_column")
    label = None if columns.label is None else str(columns.label)
    values = zip(*(data[column][:] for column in columns.captions), strict=True)
    rows = [caption_texts(row, f"{source} ({split}), row {number}") for number, row in enumerate(values, 1)]
    if not columns.captions:
        rows = [[] for _ in range(len(data))]
    if kept := [number for number, texts in enumerate(rows) if texts or not columns.captions]:
        if len(kept) < len(rows):
            rank_zero_warn(f"{argument}: passed over {len(rows) - len(kept)} of {len(rows)} rows without a caption")
            data = data.select(kept)
        pictures = DatasetPictures(data, name, str(columns.image), label)
        captions = Captions(rows[number] for number in kept)
        return CaptionedPictures(pictures, captions, pictures.class_names if label is not None else None)
    raise ValueError(f"{name}: none of {len(rows)} rows has a caption")
