"""Labelled pictures in folders, zip archives and Hugging Face data sets, listed at once and decoded when asked for."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from heliostat._extras import require
from heliostat.datamodules.hub import check_columns, is_saved_dataset, load_dataset, looks_like_hub_id

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


class Pictures(Protocol):
    """Encoded pictures."""

    def content(self, position: int) -> bytes:
        """The encoded picture."""
        ...

    def where(self, position: int) -> str:
        """The picture's place, for error messages."""
        ...


class ListedPictures(Pictures, Protocol):
    """Encoded pictures that can be told from others."""

    def fingerprint(self) -> str:
        """A text that changes when the pictures do, or their order; made without reading them."""
        ...


class LabelledPictures(ListedPictures, Protocol):
    """Encoded pictures with the names of their classes."""

    class_names: list[str]


def open_pictures(
    source: str | Sequence[str],
    argument: str,
    *,
    split: str,
    image_column: str,
    label_column: str,
    unsorted: bool = False,
) -> LabelledPictures:
    """List the pictures of an image folder, a zip archive, a list of these, or a Hugging Face data set.

    The class of a file is the folder that holds it, as a path relative to the root. In an archive the folders that all
    classes share are left out. Hidden files (``.DS_Store``, ``__MACOSX``) and files that are no pictures by their
    names are ignored; folders without pictures, and pictures that lie in no folder, are counted in a warning.

    Args:
        source: What to open. A directory is a data set if ``save_to_disk`` wrote it or it holds .parquet files.
        argument: The caller's argument that holds ``source``, for error messages.
        split: Split of a data set.
        image_column: Column of the pictures in a data set.
        label_column: Column of the classes in a data set: class labels, numbers or strings.
        unsorted: Where no picture of a folder or archive lies in a class folder, take all, each of the class "".

    Raises:
        FileNotFoundError: There is no such folder, file or data set.
        ValueError: No picture in it, no archive, an archive with names that lead out of it, or columns that do not fit.
    """
    if isinstance(source, str):
        path = Path(source).expanduser()
        is_dataset = is_saved_dataset(path) or any(path.glob("**/*.parquet")) if path.is_dir() else not path.exists()
        if is_dataset:
            if not path.exists() and not looks_like_hub_id(source, (".zip", *IMAGE_SUFFIXES)):
                raise FileNotFoundError(f"{argument}: there is no folder or archive {source!r} (from {Path.cwd()})")
            data = load_dataset(source, split, argument, streaming=False)
            return DatasetPictures(data, f"{argument}={source!r}", image_column, label_column)
    files: list[ImageFile] = []
    for entry in [source] if isinstance(source, str) else source:
        path = Path(entry).expanduser()
        if path.is_dir():
            files += _list_folder(path, argument, unsorted)
        elif not path.exists():
            raise FileNotFoundError(f"{argument}: there is no folder or archive {entry!r} (from {Path.cwd()})")
        elif zipfile.is_zipfile(path):
            files += _list_archive(path, argument, unsorted)
        else:
            raise ValueError(f"{argument}: {entry!r} is neither a folder nor a zip archive")
    if not files:
        raise ValueError(f"{argument} is an empty list; give folders and archives")
    return FilePictures(sorted(files))


class ImageFile(NamedTuple):
    """A picture's class, if it has one, and its place: a file, or a member of an archive."""

    class_name: str
    path: str
    member: str = ""


class FilePictures:
    """Pictures that are files, or members of zip archives, which every process opens for itself."""

    def __init__(self, files: Sequence[ImageFile]) -> None:
        self.files = files
        self.class_names = [file.class_name for file in self.files]
        self._archives: dict[str, zipfile.ZipFile] = {}
        self._process = os.getpid()

    def content(self, position: int) -> bytes:
        """The encoded picture."""
        _, path, member = self.files[position]
        if not member:
            return Path(path).read_bytes()
        if self._process != os.getpid():  # a forked worker shares the file position of its parent's handles
            self._archives, self._process = {}, os.getpid()
        if path not in self._archives:
            self._archives[path] = zipfile.ZipFile(path)
        return self._archives[path].read(member)

    def where(self, position: int) -> str:
        """The picture's path."""
        _, path, member = self.files[position]
        return f"{path}/{member}" if member else path

    def fingerprint(self) -> str:
        """A hash of places, sizes and times of change."""
        states: dict[str, list[int]] = {}
        digest = hashlib.blake2b(digest_size=16)
        for _, path, member in self.files:
            if path not in states:
                status = os.stat(path) if os.path.exists(path) else None
                states[path] = [status.st_size, status.st_mtime_ns] if status else []
            digest.update(json.dumps([os.path.abspath(path), member, states[path]]).encode())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archives": {}}


class DatasetPictures:
    """Pictures of a Hugging Face data set; without ``label_column``, they have no class names."""

    def __init__(self, data: Any, source: str, image_column: str, label_column: str | None) -> None:
        datasets = require("datasets", source)
        check_columns(data.column_names, [image_column], source, "image_column")
        if label_column is not None:
            check_columns(data.column_names, [label_column], source, "label_column")
        if not isinstance(data.features[image_column], datasets.Image):
            raise ValueError(
                f"{source}: the column {image_column!r} holds {data.features[image_column]}, not images; name the "
                "column of the pictures in image_column"
            )
        self.class_names: list[str] = []
        if label_column is not None:
            label = data.features[label_column]
            values = data[label_column][:]
            if missing := sum(value is None or value == -1 for value in values):
                raise ValueError(
                    f"{source}: {missing} of {len(values)} rows have no class in the column {label_column!r}"
                )
            self.class_names = [label.int2str(v) if isinstance(label, datasets.ClassLabel) else str(v) for v in values]
        self._fingerprint: str = data._fingerprint
        self.data = data.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        self.source, self.image_column = source, image_column

    def content(self, position: int) -> bytes:
        """The encoded picture."""
        return encoded_image(self.data[position][self.image_column])

    def where(self, position: int) -> str:
        """The picture's row."""
        return f"{self.source}, row {position + 1}"

    def fingerprint(self) -> str:
        """That of the data set."""
        return self._fingerprint


def encoded_image(value: dict[str, Any]) -> bytes:
    """Return the file that a value of an undecoded ``datasets.Image`` column holds or names."""
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def read_picture(pictures: Pictures, position: int, channels: int) -> Tensor:
    """Decode one picture: ``(channels, H, W)`` uint8, grey for one channel and RGB for three.

    What is transparent becomes white.

    Raises:
        ValueError: It cannot be read; names its place.
    """
    image = require("PIL.Image", "Reading pictures")
    operations = require("PIL.ImageOps", "Reading pictures")
    try:
        picture = image.open(io.BytesIO(pictures.content(position)))
        picture = operations.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):  # convert() would clip 16 bits at 255
            values = torch.from_numpy(np.array(picture, dtype=np.float64))
            if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
                raise ValueError(f"pixels of mode {picture.mode!r} outside 16 bits have no known range")
            return (values / 257).round().to(torch.uint8).expand(channels, -1, -1)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = image.alpha_composite(image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # decoders raise errors of many kinds
        raise ValueError(f"{pictures.where(position)}: the picture cannot be read ({error})") from error
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, channels).permute(2, 0, 1)


def resize_and_crop(picture: Tensor, size: int) -> Tensor:
    """Scale the shorter side of ``(C, H, W)`` to ``size``, with antialiasing, and cut out the middle square."""
    h, w = picture.shape[-2:]
    if min(h, w) != size:
        scale = size / min(h, w)
        h, w = max(size, round(h * scale)), max(size, round(w * scale))
        picture = F.interpolate(picture[None], size=(h, w), mode="bilinear", antialias=True)[0]
    top, left = (h - size) // 2, (w - size) // 2
    return picture[:, top : top + size, left : left + size]


def _list_folder(root: Path, argument: str, unsorted: bool) -> list[ImageFile]:
    files: list[PurePosixPath] = []
    folders: list[PurePosixPath] = []
    for folder, below, names in os.walk(root, followlinks=True):
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        below[:] = [name for name in below if not _is_hidden(name)]
        folders += [relative / name for name in below]
        files += [relative / name for name in names if not _is_hidden(name)]
    found = _pictures_in_folders(files, folders, str(root), argument, unsorted)
    return [ImageFile("/".join(file.parent.parts), str(root / file)) for file in found]


def _list_archive(path: Path, argument: str, unsorted: bool) -> list[ImageFile]:
    files: list[PurePosixPath] = []
    folders: list[PurePosixPath] = []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = PurePosixPath(info.filename)
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{argument}: {str(path)!r} holds the name {info.filename!r}, which leads out of it")
            if not any(map(_is_hidden, name.parts)):
                (folders if info.is_dir() else files).append(name)
    found = _pictures_in_folders(files, folders, str(path), argument, unsorted)
    classes = {file.parent.parts for file in found}
    levels = zip(*(folders[:-1] for folders in classes), strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    return [ImageFile("/".join(file.parent.parts[shared:]), str(path), file.as_posix()) for file in found]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _pictures_in_folders(
    files: Iterable[PurePosixPath], folders: Iterable[PurePosixPath], source: str, argument: str, unsorted: bool
) -> list[PurePosixPath]:
    """Keep the pictures that have a class, and warn of what has been left out."""
    files = list(files)
    pictures = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not pictures:
        suffixes = ", ".join(sorted({file.suffix for file in files})) or "no file at all"
        raise ValueError(
            f"{argument}: there is no picture in {source!r}, only {suffixes}; "
            f"the names of pictures end in {', '.join(IMAGE_SUFFIXES)}"
        )
    found = [file for file in pictures if len(file.parts) > 1]
    if not found and unsorted:
        return pictures
    if not found:
        raise ValueError(
            f"{argument}: the pictures of {source!r} lie in no folder, and the folder is the class; sort them into "
            "folders, one a class"
        )
    if len(found) < len(pictures):
        rank_zero_warn(
            f"{argument}: passed over {len(pictures) - len(found)} of {len(pictures)} pictures of {source!r}, which "
            "lie in no class folder"
        )
    used = {folder for file in found for folder in file.parents}
    inner = {folder.parent for folder in folders}
    if empty := sorted(str(folder) for folder in set(folders) - used - inner):
        rank_zero_warn(
            f"{argument}: {len(empty)} folders of {source!r} hold no picture and make no class: {_some(empty)}"
        )
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
