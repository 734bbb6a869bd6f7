"""Alignment and uniformity: two numbers that say what a contrastive embedding has learned (arXiv 2005.10242)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 2048  # rows compared at a time: memory stays linear in N


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance of positive pairs on the unit sphere, in [0, 4]; lower is closer.

    Args:
        first: ``(N, d)``, any scale.
        second: ``(N, d)``, row i the positive of row i of ``first``.

    Returns:
        Scalar; NaN for N = 0, as a mean over nothing.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"first and second must both be (N, d), got {tuple(first.shape)} and {tuple(second.shape)}")
    difference = F.normalize(first.float(), dim=1) - F.normalize(second.float(), dim=1)
    return difference.square().sum(1).mean()


def uniformity(embeddings: Tensor) -> Tensor:
    """Log of the mean Gaussian potential ``exp(-2 |x - y|^2)`` over all pairs of rows; lower is more uniform.

    0 when all rows coincide; about -4 for the uniform distribution on a sphere of many dimensions.

    Args:
        embeddings: ``(N, d)``, any scale, N >= 2.

    Returns:
        Scalar.
    """
    if embeddings.ndim != 2 or len(embeddings) < 2:
        raise ValueError(f"embeddings must be (N, d) with N >= 2, got {tuple(embeddings.shape)}")
    x = F.normalize(embeddings.float(), dim=1)
    count = len(x)
    # |x - y|^2 = 2 - 2 x.y on the sphere; a row's pair with itself contributes exp(0) = 1 and is taken out
    potentials = [(4 * (block @ x.T) - 4).exp().sum(dtype=torch.float64) for block in x.split(_BLOCK)]
    mean = (torch.stack(potentials).sum() - count) / (count * (count - 1))
    return mean.clamp_min(math.exp(-8)).log().float()  # exp(-8): every pair opposite, the least there is
