"""Rows from .txt, .csv, .tsv, .json, .jsonl and .parquet files, with errors that name the file and the line."""

from __future__ import annotations

import csv
import difflib
import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from heliostat._extras import require

SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")


class Row(NamedTuple):
    """The wanted values of one row, and where they stand."""

    values: tuple[Any, ...]
    source: str
    number: int  # from 1; of the line in a text file, else of the row

    @property
    def where(self) -> str:
        """The row's place, for error messages."""
        lines = Path(self.source).suffix.lower() in (".txt", ".csv", ".tsv", ".jsonl")
        return f"{self.source}, {'line' if lines else 'row'} {self.number}"


def read_rows(
    paths: str | Path | Sequence[str | Path],
    columns: Sequence[str | int],
    *,
    encoding: str = "utf-8",
    argument: str = "columns",
) -> Iterator[Row]:
    r"""Read columns of one or more files, row by row.

    ========== ======================================================= =====================================
    suffix     contents                                                 ``columns``
    ========== ======================================================= =====================================
    .txt       one text a line                                          one column, of any name
    .csv       comma separated, quoted with ``"``                       names in the first line; or positions
                                                                        from 0 for a file without such a line
    .tsv       tab separated; quotes have no meaning                    as .csv
    .json      an array of objects (or what .jsonl holds)               names
    .jsonl     one object a line; blank lines are passed over           names
    .parquet   any; needs pyarrow                                       names
    ========== ======================================================= =====================================

    Args:
        paths: A file, a glob pattern (``"data/*.csv"``, ``**`` for any depth), or several of them. Files of a pattern
            come in sorted order.
        columns: The columns wanted, all of them names or all of them positions.
        encoding: Text encoding; with ``"utf-8"`` a byte-order mark is passed over.
        argument: What the caller's own argument for ``columns`` is called, for error messages.

    Returns:
        An iterator of ``Row`` with the values in the order of ``columns``: strings from .txt, .csv and .tsv.

    Raises:
        FileNotFoundError: A file does not exist, or a pattern matches none. Raised by the call; those below come from
            the iterator, when the row is reached.
        ValueError: Unknown suffix (raised by the call), wrong encoding, missing column, or a malformed row.
        ModuleNotFoundError: A .parquet file without pyarrow.
    """
    files = find_files(paths)
    kinds = {type(column) for column in columns}
    if kinds not in ({str}, {int}):
        raise ValueError(f"{argument} must be all names (str) or all positions (int), got {list(columns)!r}")
    if negative := [column for column in columns if isinstance(column, int) and column < 0]:
        raise ValueError(f"{argument}: positions count from 0, got {negative[0]}")
    return (row for file in files for row in _read(file, columns, encoding, argument))


def find_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Expand glob patterns and check that every file exists and has a suffix that can be read.

    Raises:
        FileNotFoundError: A file does not exist (names like it are listed), or a pattern matches none.
        ValueError: Unknown suffix, or no path at all.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        found = [Path(path).expanduser()]
        if not found[0].exists() and glob.has_magic(str(path)):
            found = [Path(match) for match in sorted(glob.glob(str(found[0]), recursive=True))]
            if not found:
                raise FileNotFoundError(f"no file matches the pattern {str(path)!r} (from {Path.cwd()})")
        files += found
    if not files:
        raise ValueError("no files given")
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise ValueError(f"cannot read {str(file)!r}: its name must end in one of {', '.join(SUFFIXES)}")
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {str(file)!r}{_suggestion(file)}")
    return files


def _suggestion(file: Path) -> str:
    if not file.parent.is_dir():
        return f": there is no directory {str(file.parent)!r} (from {Path.cwd()})"
    near = difflib.get_close_matches(file.name, [entry.name for entry in file.parent.iterdir()], n=3)
    return f"; near names in {str(file.parent)!r}: {', '.join(near)}" if near else f" in {str(file.parent.resolve())!r}"


def _read(file: Path, columns: Sequence[str | int], encoding: str, argument: str) -> Iterator[Row]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(file, columns, argument)
        return
    reader = {".txt": _read_txt, ".csv": _read_csv, ".tsv": _read_csv, ".json": _read_json, ".jsonl": _read_json}[
        suffix
    ]
    try:
        yield from reader(file, columns, _codec(encoding), argument)
    except UnicodeDecodeError as error:
        raise _encoding_error(file, encoding, error) from error


def _codec(encoding: str) -> str:
    return "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding


def _encoding_error(file: Path, encoding: str, error: UnicodeDecodeError) -> ValueError:
    """Find the place again: the error at hand counts from the start of some block of the file."""
    try:
        file.read_bytes().decode(encoding)
    except UnicodeDecodeError as whole:
        error = whole
    content, at = error.object, error.start
    line, column = content.count(b"\n", 0, at) + 1, at - content.rfind(b"\n", 0, at)
    return ValueError(
        f"{file}, line {line}, byte {column} of the line: 0x{content[at]:02x} is not {encoding} ({error.reason}); "
        "pass the file's encoding, such as encoding='latin-1' or 'cp1252'"
    )


def _read_txt(file: Path, columns: Sequence[str | int], encoding: str, argument: str) -> Iterator[Row]:
    if len(columns) != 1:
        raise ValueError(
            f"{file} has one text a line, but {argument}={list(columns)!r} asks for {len(columns)} columns"
        )
    with file.open(encoding=encoding) as stream:
        for number, line in enumerate(stream, 1):
            yield Row((line.rstrip("\n"),), str(file), number)


def _read_csv(file: Path, columns: Sequence[str | int], encoding: str, argument: str) -> Iterator[Row]:
    tabs = file.suffix.lower() == ".tsv"
    with file.open(encoding=encoding, newline="") as stream:
        rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(stream, strict=True)
        positions: list[int] | None = [c for c in columns if isinstance(c, int)] or None
        number = 1
        while True:
            try:
                fields = next(rows, None)
            except csv.Error as error:
                raise ValueError(
                    f'{file}, line {number}: {error} (a quote that is not closed, or not doubled as ""?)'
                ) from error
            if fields is None:
                return
            if positions is None:
                positions = _header_positions(file, fields, columns, argument)
            elif fields:  # csv gives [] for a blank line
                if len(fields) <= max(positions):
                    raise ValueError(
                        f"{file}, line {number}: {argument}={list(columns)!r} needs {max(positions) + 1} fields, "
                        f"got {len(fields)}: {fields!r:.200}"
                    )
                yield Row(tuple(fields[position] for position in positions), str(file), number)
            number = rows.line_num + 1  # a quoted field may hold line breaks: the number of the row's first line


def _header_positions(file: Path, header: list[str], columns: Sequence[str | int], argument: str) -> list[int]:
    names = [name.strip() for name in header]
    if missing := [column for column in columns if column not in names]:
        raise ValueError(
            f"{file} has no column {missing[0]!r}; its first line has {names!r:.500}. "
            f"Name columns of these in {argument}; or, if that line is data, give positions: "
            f"{argument}={0 if len(columns) == 1 else list(range(len(columns)))}"
        )
    return [names.index(str(column)) for column in columns]


def _read_json(file: Path, columns: Sequence[str | int], encoding: str, argument: str) -> Iterator[Row]:
    _require_names(file, columns, argument)
    with file.open(encoding=encoding) as stream:
        if file.suffix.lower() == ".json" and stream.read(4096).lstrip()[:1] == "[":
            stream.seek(0)
            try:
                objects = json.load(stream)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {error.lineno}: malformed JSON ({error.msg})") from error
            rows: Iterator[tuple[int, Any]] = iter(enumerate(objects, 1))
        else:
            stream.seek(0)
            rows = _json_lines(file, stream)
        for number, record in rows:
            row = Row((), str(file), number)
            if not isinstance(record, dict):
                raise ValueError(f"{row.where}: expected an object with the names {list(columns)}, got {record!r:.200}")
            if missing := [column for column in columns if column not in record]:
                raise ValueError(
                    f"{row.where}: no {missing[0]!r}; the row has {list(record)!r:.500}. "
                    f"Name columns of these in {argument}"
                )
            yield row._replace(values=tuple(record[column] for column in columns))


def _json_lines(file: Path, stream: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{file}, line {number}: malformed JSON ({error.msg}): {line.strip()!r:.200}"
                ) from error


def _read_parquet(file: Path, columns: Sequence[str | int], argument: str) -> Iterator[Row]:
    _require_names(file, columns, argument)
    parquet = require("pyarrow.parquet", f"Reading {str(file)!r}")
    with parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        if missing := [column for column in columns if column not in names]:
            raise ValueError(
                f"{file} has no column {missing[0]!r}; it has {names!r:.500}. Name columns of these in {argument}"
            )
        number = 0
        for batch in table.iter_batches(columns=list(columns)):
            for values in zip(*(batch.column(column).to_pylist() for column in columns), strict=True):
                number += 1
                yield Row(values, str(file), number)


def _require_names(file: Path, columns: Sequence[str | int], argument: str) -> None:
    if not all(isinstance(column, str) for column in columns):
        raise ValueError(f"{file}: columns of a {file.suffix} file have names; got {argument}={list(columns)!r}")
