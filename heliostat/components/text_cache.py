"""Embeddings of texts on disk: computed once by a frozen model, memory-mapped, looked up by text.

For methods whose text model does not change, such as ProCLIP (arXiv 2510.18795): with an LLM as embedder, its forward
is by far the largest part of a step. A cache belongs to one fingerprint, which stands for everything that decides an
embedding (weights, tokenizer, prompt, pooling); embeddings of another fingerprint are never returned.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from heliostat._extras import require

CacheDtype = Literal["float32", "float16"]
Embed = Callable[[list[str]], Tensor]
_DTYPES = {"float32": ("F32", torch.float32), "float16": ("F16", torch.float16)}


class CachedTextEmbeddings:
    """Embeddings that one model gave to texts, on disk.

    A folder may hold many caches. Each call of `build` adds one file, ``MODEL-DTYPE-TEXTS.safetensors``, where MODEL
    and TEXTS are hashes of the fingerprint and of the texts; a cache is all files of its fingerprint and dtype. Files
    are written under a temporary name (``*.tmp``, left behind only by a process that was killed) and renamed when they
    are complete, so that neither an interrupted nor a simultaneous build leaves a damaged one. Rows are memory-mapped:
    only those looked up are read, and the processes of a machine share them. Copies and pickles open the files anew.

    Of a text only a hash of 128 bits is kept.

    Args:
        files: The files of one cache, as `open` and `build` find them.
        fingerprint: That of the model; see `heliostat.TextEmbedder.fingerprint`.

    Attributes:
        fingerprint: As given.
        files: As given.
        dim: Width d of an embedding.

    Raises:
        ValueError: If a file is damaged, of another fingerprint, or of another width than the first.
        ModuleNotFoundError: If safetensors is not installed.
    """

    def __init__(self, files: Sequence[str | Path], fingerprint: str) -> None:
        self.files = [Path(file) for file in files]
        self.fingerprint = fingerprint
        self._tables = [_open_table(file, fingerprint) for file in self.files]
        self.dim = self._tables[0].embeddings.shape[1]
        for file, table in zip(self.files, self._tables, strict=True):
            if table.embeddings.shape[1] != self.dim:
                raise ValueError(
                    f"fingerprint {fingerprint!r} stands for embeddings of width {self.dim} in {self.files[0]} and "
                    f"{table.embeddings.shape[1]} in {file}, so it does not tell models apart; delete both files"
                )

    @classmethod
    def open(cls, folder: str | Path, fingerprint: str, *, dtype: CacheDtype = "float32") -> CachedTextEmbeddings:
        """Open what was built for a fingerprint.

        Args:
            folder: Where the caches are.
            fingerprint: Of the model whose embeddings are wanted.
            dtype: In which they were stored.

        Raises:
            ValueError: If there are none; embeddings of other models in the folder are counted in the message.
        """
        files = _find_files(folder, fingerprint, dtype)
        if not files:
            others = len(list(Path(folder).glob("*-*-*.safetensors")))
            raise ValueError(
                f"folder={str(folder)!r} holds no {dtype} embeddings with fingerprint {fingerprint!r}"
                + (f", but {others} files of another model, prompt, pooling or dtype, which do not fit" * bool(others))
                + "; make them by CachedTextEmbeddings.build"
            )
        return cls(files, fingerprint)

    @classmethod
    def build(
        cls,
        texts: Sequence[str],
        embed: Embed,
        folder: str | Path,
        *,
        fingerprint: str,
        dtype: CacheDtype = "float32",
        batch_size: int = 1024,
    ) -> CachedTextEmbeddings:
        """Embed texts and write them to a new file. On several processes, call it on one.

        Args:
            texts: Any number, at least one; each is embedded once, however often it comes.
            embed: Gives the embeddings ``(n, d)`` of up to ``batch_size`` texts. The same d for all, finite.
            folder: Where to write; made if need be.
            fingerprint: Whatever decides the embeddings, see `heliostat.TextEmbedder.fingerprint`; not empty.
            dtype: ``"float16"`` takes half the space, at a relative error of 5e-4.
            batch_size: Texts for each call of ``embed``. Only one batch of embeddings is in memory.

        Returns:
            All that the folder holds for this fingerprint and dtype.

        Raises:
            ValueError: If there is no text, the fingerprint is empty, or ``embed`` returns something else.
        """
        if not fingerprint:
            raise ValueError("fingerprint must not be empty: it tells the embeddings of one model from another's")
        if len(texts) == 0:
            raise ValueError("texts: there is none to embed")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        digests = _digests(texts)
        order = _lexsort(digests)
        is_new = torch.ones(len(order), dtype=torch.bool)
        is_new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(1)
        chosen = order[is_new].sort().values  # the first of each text, in the order given
        hashed = hashlib.blake2b(digests[chosen].numpy().tobytes(), digest_size=8).hexdigest()
        name = f"{_stem(fingerprint, dtype)}-{hashed}.safetensors"
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{name}.{secrets.token_hex(8)}.tmp"
        try:
            with open(temporary, "wb") as file:
                width = None
                for picked in chosen.split(batch_size):
                    batch = [texts[int(i)] for i in picked]
                    rows = _checked(embed(batch), batch, width, dtype)
                    if width is None:
                        width = rows.shape[1]
                        file.write(_preamble(digests[chosen], width, fingerprint, dtype))
                    file.write(rows.numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)
        return cls.open(folder, fingerprint, dtype=dtype)

    @classmethod
    def get_or_build(
        cls,
        texts: Sequence[str],
        embed: Embed,
        folder: str | Path,
        *,
        fingerprint: str,
        dtype: CacheDtype = "float32",
        batch_size: int = 1024,
    ) -> CachedTextEmbeddings:
        """Open the cache of a fingerprint, after embedding those of the texts that it lacks; arguments as `build`.

        Damaged files are deleted with a warning.
        """
        for file in _find_files(folder, fingerprint, dtype):
            try:
                _open_table(file, fingerprint)
            except ValueError as error:  # noqa: PERF203 - a few files
                warnings.warn(f"{error}. It is deleted, and its texts are embedded anew", stacklevel=2)
                file.unlink(missing_ok=True)
        if _find_files(folder, fingerprint, dtype):
            cache = cls.open(folder, fingerprint, dtype=dtype)
            texts = cache.missing(texts)
            if not texts:
                return cache
        return cls.build(texts, embed, folder, fingerprint=fingerprint, dtype=dtype, batch_size=batch_size)

    def lookup(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts.

        Args:
            texts: N texts, in any order, repeated or not.

        Returns:
            Shape ``(N, d)``, float32, on the CPU, a copy.

        Raises:
            ValueError: If some were never embedded.
        """
        digests = _digests(texts)
        embeddings = torch.empty(len(texts), self.dim)
        wanted = torch.arange(len(texts))
        for table in self._tables:
            rows = table.find(digests[wanted])
            found = rows >= 0
            embeddings[wanted[found]] = table.embeddings[rows[found]].float()
            wanted = wanted[~found]
        if len(wanted):
            raise ValueError(
                f"{len(wanted)} of {len(texts)} texts are not in the cache {self.files[0].parent}, "
                f"for example {texts[int(wanted[0])][:80]!r}: it was built from others. Add them by "
                "CachedTextEmbeddings.get_or_build"
            )
        return embeddings

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Those of the texts that `lookup` would refuse, each once, in order."""
        digests = _digests(texts)
        wanted = torch.arange(len(texts))
        for table in self._tables:
            wanted = wanted[table.find(digests[wanted]) < 0]
        return list(dict.fromkeys(texts[int(i)] for i in wanted))

    def __len__(self) -> int:
        """Number of embeddings on disk."""
        return sum(len(table.embeddings) for table in self._tables)

    def __reduce__(self) -> tuple[type[CachedTextEmbeddings], tuple[list[Path], str]]:
        return type(self), (self.files, self.fingerprint)


class _Table(NamedTuple):
    """One file: embeddings ``(U, d)`` in the order of the texts; hashes, sorted, in two columns, and their rows."""

    first: Tensor
    second: Tensor
    row: Tensor
    embeddings: Tensor

    def find(self, digests: Tensor) -> Tensor:
        """Row of each hash ``(N, 2)``, -1 where there is none."""
        first, second = digests.t().contiguous()
        position = torch.searchsorted(self.first, first)
        while True:  # once, but for texts that share the first half of their hashes
            here = position.clamp(max=len(self.first) - 1)
            candidate = (position < len(self.first)) & (self.first[here] == first)
            found = candidate & (self.second[here] == second)
            next_one = candidate & ~found
            if not next_one.any():
                return torch.where(found, self.row[here], -1)
            position = position + next_one


def _open_table(path: Path, fingerprint: str) -> _Table:
    safetensors = require("safetensors", "Reading cached text embeddings")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("fingerprint")
            # Views of the mapped file: nothing is read before it is indexed.
            table = _Table(*(file.get_tensor(field) for field in _Table._fields))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no file of cached text embeddings or is damaged; delete it: {error}") from error
    if found != fingerprint:
        raise ValueError(
            f"{path} holds embeddings with fingerprint {found!r}, not {fingerprint!r}: another model, prompt or "
            "pooling made them. Build them anew by CachedTextEmbeddings.build"
        )
    return table


def _preamble(digests: Tensor, width: int, fingerprint: str, dtype: CacheDtype) -> bytes:
    """What stands before the embeddings in a safetensors file: written by hand, so that they need not fit in memory."""
    order = _lexsort(digests)
    tables = [*digests[order].t().contiguous(), order]
    header: dict[str, dict] = {"__metadata__": {"fingerprint": fingerprint}}
    end = 0
    for field, count, code, size in (
        *((field, [len(order)], "I64", 8 * len(order)) for field in _Table._fields[:3]),
        ("embeddings", [len(order), width], _DTYPES[dtype][0], len(order) * width * _DTYPES[dtype][1].itemsize),
    ):
        header[field] = {"dtype": code, "shape": count, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the tensors
    return len(encoded).to_bytes(8, "little") + encoded + b"".join(t.numpy().tobytes() for t in tables)


def _checked(rows: Tensor, texts: list[str], width: int | None, dtype: CacheDtype) -> Tensor:
    shape = (len(texts), "d" if width is None else width)
    if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(texts) or width not in (None, rows.shape[1]):
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"embed must return a tensor ({shape[0]}, {shape[1]}) for {len(texts)} texts, got {got}")
    stored = rows.detach().cpu().to(_DTYPES[dtype][1])
    finite = stored.isfinite().all(1)
    if not finite.all():
        example = texts[int((~finite).nonzero()[0])][:80]
        raise ValueError(
            f"embed gave {int((~finite).sum())} embeddings that are NaN, infinite or out of the range of {dtype}, for "
            f"example that of {example!r}; nothing was written"
        )
    return stored


def _find_files(folder: str | Path, fingerprint: str, dtype: CacheDtype) -> list[Path]:
    return sorted(Path(folder).glob(f"{_stem(fingerprint, dtype)}-*.safetensors"))


def _stem(fingerprint: str, dtype: CacheDtype) -> str:
    if dtype not in get_args(CacheDtype):
        raise ValueError(f"dtype must be one of {get_args(CacheDtype)}, got {dtype!r}")
    return f"{hashlib.blake2b(fingerprint.encode(), digest_size=8).hexdigest()}-{dtype}"


def _digests(texts: Sequence[str]) -> Tensor:
    """Hashes of 128 bits, shape ``(N, 2)``, int64."""
    if isinstance(texts, str):
        raise ValueError(f"texts must be a sequence of strings, got one string, {texts[:80]!r}")
    if len(texts) == 0:
        return torch.empty(0, 2, dtype=torch.int64)
    joined = b"".join(hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=16).digest() for t in texts)
    return torch.frombuffer(bytearray(joined), dtype=torch.int64).view(-1, 2)


def _lexsort(digests: Tensor) -> Tensor:
    """Order by the first column, then the second, then the position."""
    order = digests[:, 1].argsort(stable=True)
    return order[digests[order, 0].argsort(stable=True)]
