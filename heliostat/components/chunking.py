"""Encode a large batch in chunks that do not keep their activations: large contrastive batches in little memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def chunked_forward(
    function: Callable[[dict[str, Tensor]], Tensor], inputs: Mapping[str, Tensor], chunk_size: int | None
) -> Tensor:
    """Apply ``function`` to chunks of rows, recomputing each chunk in backward instead of storing its activations.

    Exact, also with dropout and under DDP: a chunk's random state is restored when it is computed again. Gradients are
    those of one call with the same random numbers.

    Args:
        function: Maps a dict of tensors with B rows to one tensor with B rows.
        inputs: Tensors with the same number of rows N.
        chunk_size: Rows a chunk, >= 1; ``None`` makes one ordinary call.

    Returns:
        The outputs of all rows, ``(N, ...)``.
    """
    if chunk_size is None:
        return function(dict(inputs))
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, or None for one call, got {chunk_size}")
    names = list(inputs)

    def run(*tensors: Tensor) -> Tensor:
        return function(dict(zip(names, tensors, strict=True)))

    chunks = zip(*(inputs[name].split(chunk_size) for name in names), strict=True)
    return torch.cat([checkpoint(run, *chunk, use_reentrant=False) for chunk in chunks])
