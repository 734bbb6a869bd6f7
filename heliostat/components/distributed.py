"""Collectives that gradients pass through: the one place where losses and layers meet the other processes.

Convention of the whole library: a loss that couples the rows of a batch is computed on every rank for the rank's own
rows against all ranks' rows, as a mean over the own rows. DDP averages the ranks' gradients, and the backward of
`gather_rows` adds what the other ranks' losses owe to a row, so value (averaged over ranks) and gradient are exactly
those of one process holding the whole batch. No factor of the world size appears anywhere.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def default_group() -> dist.ProcessGroup | None:
    """The default process group if there is more than one process, else ``None``."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.count = group, rows.shape[0]  # type: ignore[attr-defined]
        pieces = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(pieces, rows.contiguous(), group=group)
        return torch.cat(pieces)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        group, count = ctx.group, ctx.count  # type: ignore[attr-defined]
        grad = grad.clone(memory_format=torch.contiguous_format)  # all_reduce works in place
        dist.all_reduce(grad, group=group)
        return grad[group.rank() * count :][:count], None


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenate the rows of all processes in rank order, with gradient to every process's own rows.

    Args:
        rows: This process's rows, shape ``(N, ...)``; the same shape and dtype on every process (use ``drop_last``).
        group: The processes to gather from; default: all of them. Without `torch.distributed`, or with one process,
            ``rows`` is returned as it is.

    Returns:
        Shape ``(N * world_size, ...)``. Rank r's rows stand at ``r * N``.
    """
    group = group or default_group()
    if group is None or group.size() == 1:
        return rows
    return _GatherRows.apply(rows, group)
