"""Evaluation over a whole set: the rows of all processes, each once."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from heliostat.components.distributed import default_group


def gather_once(index: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """Gather an evaluation set from all processes, in its own order.

    A distributed sampler repeats rows to give every process as many: each row is kept once.

    Args:
        index: Positions of this process's rows in the set, ``(N,)``.
        *columns: What belongs to these rows, ``(N, ...)`` each.

    Returns:
        The columns of all processes' rows, sorted by index, the same on every process.
    """
    if default_group() is not None:
        index, *columns = (torch.cat(gather_all_tensors(t)) for t in (index, *columns))  # type: ignore[assignment]
    order = index.argsort(stable=True)
    order = order[torch.cat([order.new_ones(1, dtype=torch.bool), index[order].diff() != 0])]
    return tuple(column[order] for column in columns)
