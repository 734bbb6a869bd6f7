"""Pictures with captions in webdataset shards: tar files in which the members of one stem make a sample.

Each shard is gone through once, for the captions and the places of the pictures; then any picture can be read by its
place, and nothing is unpacked. So a set of shards has a length and an order like any other: batches depend on neither
the number of processes nor that of workers, and a resumed run goes on at the next one. What it asks for is a disk that
reads small pieces fast, such as a local SSD.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from heliostat.datamodules.captions import Captions, caption_texts

_PICTURES = ("jpg", "jpeg", "png", "webp")
_COMPRESSED = re.compile(rb"(?P<gzip>\x1f\x8b)|(?P<bzip2>BZh[1-9]1AY)|(?P<xz>\xfd7zXZ)|(?P<zstd>\x28\xb5\x2f\xfd)")
_COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_FORMAT = "1"  # of the saved index


class Shards(NamedTuple):
    """The samples of all shards, in order."""

    pictures: ShardPictures
    captions: Captions
    class_names: list[str] | None  # "" where a sample has none


class ShardPictures:
    """Encoded pictures by their places in tar files."""

    def __init__(self, paths: Sequence[str], firsts: Sequence[int], offsets: Tensor, sizes: Tensor) -> None:
        self.paths, self.firsts = list(paths), list(firsts)
        self.offsets, self.sizes = offsets, sizes

    def content(self, position: int) -> bytes:
        """The encoded picture."""
        size = int(self.sizes[position])
        content = self._read(position, 0, size)
        if len(content) < size:
            raise OSError("the shard has become shorter since it was indexed")
        return content

    def where(self, position: int) -> str:
        """The shard and the member's name, which stands in the block before its content."""
        try:
            name = self._read(position, -tarfile.BLOCKSIZE, 100).split(b"\0")[0].decode("utf-8", "replace")
        except OSError:
            name = f"byte {int(self.offsets[position])}"
        return f"{self._path(position)}/{name}"

    def fingerprint(self) -> str:
        """A hash of the shards' places, sizes and times of change, and of the pictures' places in them."""
        states = [(os.path.abspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in self.paths]
        digest = hashlib.blake2b(json.dumps(states).encode(), digest_size=16)
        digest.update(self.offsets.numpy().tobytes())
        return digest.hexdigest()

    def _path(self, position: int) -> str:
        return self.paths[bisect_right(self.firsts, position) - 1]

    def _read(self, position: int, shift: int, size: int) -> bytes:
        # Opened for each picture: a handle kept open would be one a shard and process, and forked workers share it.
        with open(self._path(position), "rb", buffering=0) as stream:
            stream.seek(int(self.offsets[position]) + shift)
            return stream.read(size)


def looks_like_shards(source: str) -> bool:
    """Tell tar files, also compressed ones (which are refused later on), by their names."""
    return source.lower().endswith((".tar", *_COMPRESSED_SUFFIXES))


def find_shards(source: str | Sequence[str], argument: str) -> list[str]:
    """Expand braces (``shards/{000..009}.tar``, ``{train,extra}.tar``) and glob patterns, in order.

    Raises:
        FileNotFoundError: A shard is not there, or a pattern matches none.
        ValueError: There is no shard, or the same one twice.
    """
    paths: list[str] = []
    for pattern in [source] if isinstance(source, str) else source:
        for name in expand_braces(str(Path(pattern).expanduser())):
            found = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
            if not found:
                raise FileNotFoundError(f"{argument}: there is no shard {name!r} (from {Path.cwd()})")
            paths += found
    if not paths:
        raise ValueError(f"{argument} is an empty list; give tar files")
    if repeated := [path for path, count in Counter(paths).items() if count > 1]:
        raise ValueError(f"{argument}: {len(repeated)} shards are named more than once, such as {repeated[0]!r}")
    return paths


def expand_braces(pattern: str) -> list[str]:
    """Expand ``{a,b}`` to its parts and ``{08..12}`` to the numbers, padded with zeros as the first is."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, parts = match.groups()
    if parts is None:
        parts = ",".join(f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for part in parts.split(",") for name in expand_braces(f"{before}{part}{after}")]


def index_shards(
    source: str | Sequence[str],
    argument: str,
    *,
    caption_columns: Sequence[str],
    label_column: str | None,
    cache_dir: Path | None,
) -> Shards:
    """List the samples that have a picture (.jpg, .jpeg, .png, .webp) and a caption; the others are counted.

    Args:
        source: Tar files, see `find_shards`.
        argument: The caller's argument that holds ``source``, for error messages.
        caption_columns: Keys of the captions (texts or lists of texts) in .json members; samples without one have
            their caption in .txt. ``"txt"``: the .txt member in any case.
        label_column: Key of the class in .json members; samples without one have it in .cls. None: no classes.
        cache_dir: Keep the index of each shard here. The name of an index tells the size and the time of the last
            change of its shard, so that of a changed one is not found. One that is damaged is made anew with a
            warning. None: do not.

    Raises:
        FileNotFoundError: A shard is not there.
        ValueError: No tar file, or a compressed one; a member's name that leads out of it; no sample at all.
    """
    paths = find_shards(source, argument)
    states = [_cached_index(path, argument, tuple(caption_columns), label_column, cache_dir) for path in paths]
    counts = sum((Counter(state["counts"]) for state in states), Counter())
    total = counts.pop("samples", 0)
    truncated = [path for path, state in zip(paths, states, strict=True) if state["truncated"]]
    captions = Captions.join([state["captions"] for state in states])
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    if truncated:
        reasons += f"{'; ' if reasons else ''}{len(truncated)} shards are cut off: {', '.join(truncated[:3])}"
        reasons += ", ..." if len(truncated) > 3 else ""
    if not len(captions):
        keys = sorted({key for state in states for key in state["keys"]})
        found = f"the .json members have {keys}" if keys else "there are no .json members"
        raise ValueError(
            f"{argument}={source!r:.200}: none of {total} samples has both a picture ({', '.join(_PICTURES)}) and a "
            f"caption ({reasons or 'the shards are empty'}). {found}; name the captions' key in caption_column, or "
            "'txt' for the .txt members"
        )
    if reasons:
        rank_zero_warn(f"{argument}: passed over {total - len(captions)} of {total} samples: {reasons}")
    firsts = [0]
    for state in states:
        firsts.append(firsts[-1] + len(state["offsets"]))
    pictures = ShardPictures(
        paths,
        firsts[:-1],
        torch.cat([state["offsets"] for state in states]),
        torch.cat([state["sizes"] for state in states]),
    )
    labels = [name for state in states for name in state["labels"]] if label_column is not None else None
    return Shards(pictures, captions, labels)


def _cached_index(
    path: str, argument: str, caption_columns: tuple[str, ...], label_column: str | None, cache_dir: Path | None
) -> dict[str, Any]:
    if cache_dir is None:
        return _index(path, argument, caption_columns, label_column)
    status = os.stat(path)
    identity = [_FORMAT, str(Path(path).resolve()), status.st_size, status.st_mtime_ns, caption_columns, label_column]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    file = cache_dir / "shards" / f"{name}.pt"
    if file.is_file():
        try:
            return torch.load(file, weights_only=True)
        except Exception as error:  # a damaged file raises errors of many kinds
            rank_zero_warn(f"the index of {path!r} in {file} is damaged ({type(error).__name__}), and made anew")
    state = _index(path, argument, caption_columns, label_column)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as temporary:
            torch.save(state, temporary)
        os.replace(temporary.name, file)  # whole or not at all, whoever else writes it
    except OSError as error:
        rank_zero_warn(f"the index of {path!r} cannot be kept in cache_dir, so every process makes it ({error})")
    return state


def _index(path: str, argument: str, caption_columns: tuple[str, ...], label_column: str | None) -> dict[str, Any]:
    """Go through one shard: the places of its pictures, captions, labels, and counts of what is left out."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with open(path, "rb") as stream:
        truncated, links = _list_members(path, stream, argument, samples)

        def read(place: tuple[int, int]) -> bytes:
            stream.seek(place[0])
            return stream.read(place[1])

        places, captions, labels = [], [], []
        keys: set[str] = set()
        counts = Counter({"samples": len(samples), "links": links} if links else {"samples": len(samples)})
        for stem, members in samples.items():
            picture = next((members[kind] for kind in _PICTURES if kind in members), None)
            if picture is None:
                counts["without a picture"] += 1
                continue
            try:
                record = json.loads(read(members["json"])) if "json" in members else {}
                if not isinstance(record, dict):
                    raise ValueError("no object")
                text = read(members["txt"]).decode() if "txt" in members else None
                label = read(members["cls"]).decode().strip() if "cls" in members else ""
            except ValueError:
                counts["whose text is malformed"] += 1
                continue
            keys |= record.keys()
            values = [
                text if column == "txt" or "json" not in members else record.get(column) for column in caption_columns
            ]
            if not (texts := caption_texts(values, f"{path}/{stem}")):
                counts["without a caption"] += 1
                continue
            places.append(picture)
            captions.append(texts)
            if label_column is not None:
                value = record.get(label_column)
                labels.append(label if value is None else str(value))
    offsets, sizes = torch.tensor(places, dtype=torch.int64).view(-1, 2).unbind(1)
    return {
        "offsets": offsets,
        "sizes": sizes,
        "captions": Captions(captions).state_dict(),
        "labels": labels,
        "counts": dict(counts),
        "keys": sorted(keys),
        "truncated": truncated,
    }


def _list_members(
    path: str, stream: Any, argument: str, samples: dict[str, dict[str, tuple[int, int]]]
) -> tuple[bool, int]:
    """Fill in ``samples[stem][suffix] = (offset, size)``; return whether the file is cut off, and the links in it."""
    if compressed := _COMPRESSED.match(stream.read(8)):
        raise ValueError(
            f"{argument}: the shard {path!r} is compressed ({compressed.lastgroup}), so no picture can be read without "
            "all before it; decompress it to a plain .tar, which is hardly larger (pictures are compressed themselves)"
        )
    length = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if length < tarfile.BLOCKSIZE:  # not one header
        return True, 0
    links = 0
    try:
        archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115 - the stream stays open
    except tarfile.TarError as error:
        raise ValueError(f"{argument}: {path!r} is no tar file ({error})") from error
    try:
        for member in archive:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{argument}: {path!r} holds the name {member.name!r}, which leads out of it")
            if member.isdir() or any(part.startswith(".") for part in name.parts):
                continue
            if not member.isreg() or member.issparse():
                links += 1
                continue
            if member.offset_data + member.size > length:
                return True, links
            stem, _, suffix = name.name.partition(".")
            sample = samples.setdefault(str(name.parent / stem), {})
            if suffix.lower() in sample:
                raise ValueError(f"{argument}: {path!r} holds {member.name!r} twice")
            sample[suffix.lower()] = (member.offset_data, member.size)
    except tarfile.TarError:
        return True, links
    # A header that is cut off or spoilt ends the listing like the mark of the end, a block of zeros.
    stream.seek(archive.offset)
    return stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE), links
