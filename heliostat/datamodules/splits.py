"""Parts of a set for validation and test, taken by whole groups of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise a ValueError if the fractions leave nothing for training."""
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ValueError(
            "val_fraction and test_fraction must be >= 0 and leave something for training, got "
            f"{val_fraction} and {test_fraction}"
        )


def split_groups(
    groups: Sequence[Sequence[int]], val_fraction: float, test_fraction: float, seed: int
) -> tuple[list[int], list[int], list[int]]:
    """Divide groups of rows, each as a whole, among training, validation and test.

    A fraction above 0 gives at least one group, and training what is left, which may be nothing. The rows of each part
    come in ascending order; the draw depends on ``seed`` and the number of groups alone.
    """
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    val, test = (max(1, round(f * len(groups))) if f else 0 for f in (val_fraction, test_fraction))
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for place, i in enumerate(order):
        parts[1 if place < val else 2 if place < val + test else 0].extend(groups[i])
    for rows in parts:
        rows.sort()
    return parts
