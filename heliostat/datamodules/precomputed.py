"""What a frozen model makes of pictures, computed once and kept on disk: rows of one shape, memory-mapped.

A file belongs to an identity, which stands for everything that decides its rows: the model's fingerprint, the pictures
and how they are prepared. Of another identity, no file is ever opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FORMAT = 1  # of a file; part of every identity


class PrecomputedRows:
    """Rows in a .npy file, of which only those asked for are read; the processes of a machine share them.

    Args:
        path: The file.

    Attributes:
        path: As given.
        shape: Of a row.

    Raises:
        ValueError: If the file is damaged.
        OSError: If there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows = np.load(path, mmap_mode="r")
        self.shape: tuple[int, ...] = self._rows.shape[1:]

    @classmethod
    def find(cls, folder: Path, name: str, identity: Any, count: int) -> PrecomputedRows | None:
        """Open what `RowWriter` wrote; None if it is not there, damaged, or of another number of rows.

        Args:
            folder: Where the files are.
            name: What the rows are; begins the file's name.
            identity: Plain values, all that decides the rows.
            count: Number of rows.
        """
        try:
            found = cls(_path(folder, name, identity))
        except (OSError, ValueError, EOFError):
            return None
        return found if len(found) == count else None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Copies of rows ``(B,)`` in the file's own type, ``(B, *shape)``."""
        return torch.from_numpy(self._rows[rows.numpy()])

    def __reduce__(self) -> tuple[type[PrecomputedRows], tuple[Path]]:
        return type(self), (self.path,)


class RowWriter:
    """Writes rows, a batch at a time, to a file that is there whole or not at all. Use it in a ``with`` statement.

    They are written under a temporary name (``*.tmp``, left behind only by a process that was killed), and the file is
    renamed when the last row is there.

    Args:
        folder: Where to write; made if need be.
        name: What the rows are; begins the file's name.
        identity: Plain values, all that decides the rows.
        count: Number of rows to come.
        dtype: Of numpy.
    """

    def __init__(self, folder: Path, name: str, identity: Any, count: int, dtype: str) -> None:
        self.path = _path(folder, name, identity)
        self.count, self.dtype = count, np.dtype(dtype)
        self.written = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._temporary = folder / f"{self.path.name}.{secrets.token_hex(8)}.tmp"
        self._shape: Sequence[int] | None = None

    def __enter__(self) -> RowWriter:
        self._file = open(self._temporary, "wb")
        return self

    def write(self, rows: Tensor) -> None:
        """Append rows ``(B, *shape)``.

        Raises:
            ValueError: If they are of another shape than those before, not finite in the file's type, or too many.
        """
        stored = rows.detach().cpu().numpy().astype(self.dtype)
        if self._shape is None:
            self._shape = stored.shape[1:]
            header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count, *self._shape)}
            np.lib.format.write_array_header_2_0(self._file, header)
        if stored.shape[1:] != self._shape or self.written + len(stored) > self.count:
            raise ValueError(
                f"{self.path.stem}: {self.written} rows of shape {tuple(self._shape)} are followed by "
                f"{len(stored)} of {stored.shape[1:]}; expected {self.count} of one shape"
            )
        if not np.isfinite(stored).all():
            raise ValueError(
                f"{self.path.stem}: of the rows {self.written} to {self.written + len(stored) - 1}, some are NaN, "
                f"infinite or out of the range of {self.dtype}; nothing is kept"
            )
        self._file.write(stored.tobytes())
        self.written += len(stored)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
            if kind is None:
                if self.written < self.count:
                    raise ValueError(f"{self.path.stem}: {self.written} of {self.count} rows were written")
                os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


def _path(folder: Path, name: str, identity: Any) -> Path:
    encoded = json.dumps([_FORMAT, identity], sort_keys=True).encode()
    return folder / f"{name}-{hashlib.blake2b(encoded, digest_size=16).hexdigest()}.npy"
