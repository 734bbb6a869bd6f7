"""Hugging Face data sets: told from files, loaded from a directory or the Hub, with errors that say what is there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from heliostat._extras import require

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def looks_like_hub_id(source: str, file_suffixes: tuple[str, ...]) -> bool:
    """Tell an id such as ``"mteb/stsbenchmark-sts"`` from the name of a file with one of ``file_suffixes``."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source)) and not source.lower().endswith(file_suffixes)


def is_dataset(source: Any, file_suffixes: tuple[str, ...]) -> bool:
    """Tell a data set (a directory or an id on the Hub) from files, by its name where nothing exists."""
    if not isinstance(source, str):
        return False
    path = Path(source).expanduser()
    return path.is_dir() or (not path.is_file() and looks_like_hub_id(source, file_suffixes))


def is_saved_dataset(folder: Path) -> bool:
    """Tell a directory that ``save_to_disk`` wrote."""
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def has_splits(source: str) -> bool:
    """Tell whether a data set may have splits; one that ``Dataset.save_to_disk`` wrote has none."""
    return not (Path(source).expanduser() / "state.json").is_file()


def load_dataset(source: str, split: str, argument: str, *, streaming: bool) -> Any:
    """Load one split: a ``datasets.Dataset``, or an ``IterableDataset`` if ``streaming``.

    Args:
        source: A directory (from ``save_to_disk``, or of data files), or an id on the Hub.
        split: Which split; ignored if the data set has none.
        argument: The caller's argument that holds ``source``, for error messages.
        streaming: Do not read it into memory or the cache.

    Raises:
        FileNotFoundError: It is no directory, and neither in the cache nor to be fetched.
        ValueError: It has no such split.
        ModuleNotFoundError: ``datasets`` is not installed.
    """
    datasets = require("datasets", f"{argument}={source!r}")
    folder = Path(source).expanduser()
    try:
        if is_saved_dataset(folder):
            data = datasets.load_from_disk(str(folder))
        else:
            data = datasets.load_dataset(str(folder) if folder.is_dir() else source, streaming=streaming)
    except OSError as error:
        if folder.is_dir():
            raise
        raise FileNotFoundError(
            f"{argument}={source!r} is no local file or directory, and as a data set of the Hugging Face Hub it is "
            "neither in the cache nor can be fetched (offline, misspelt, or private). Give a path that exists, or "
            f"download it first where there is a network: hf download --repo-type dataset {source}"
        ) from error
    if isinstance(data, dict):
        if split not in data:
            raise ValueError(f"{argument}={source!r} has no split {split!r}, only {list(data)}; choose with splits=")
        data = data[split]
    # Shards are what workers and processes share; a saved data set is one file, so it is cut here.
    return data.to_iterable_dataset(min(len(data), 64)) if streaming and isinstance(data, datasets.Dataset) else data


def check_columns(found: Sequence[str], columns: Sequence[str | int], source: str, argument: str) -> None:
    """Raise a ValueError that lists the columns ``found`` in ``source`` if one of ``columns`` is not among them."""
    if missing := [column for column in columns if column not in found]:
        raise ValueError(
            f"{source} has no column {missing[0]!r}; it has {list(found)}. Name columns of these in {argument}"
        )


def share_stream(rows: Any, trainer: Trainer | None, owner: str) -> Any:
    """Return this process's share of a stream.

    Raises:
        MisconfigurationException: There are several processes, and nothing says when their epoch ends; ``owner`` is
            what the message says of the caller.
    """
    if trainer is None or trainer.world_size == 1:
        return rows
    if trainer.max_steps == -1 and not isinstance(trainer.limit_train_batches, int):
        raise MisconfigurationException(
            f"{owner} on {trainer.world_size} processes: their shares of the stream differ in length, so they cannot "
            "tell together when an epoch ends. Set Trainer(limit_train_batches=<int>) or Trainer(max_steps=...)"
        )
    distributed = require("datasets.distributed", owner)
    return distributed.split_dataset_by_node(rows, trainer.global_rank, trainer.world_size)
