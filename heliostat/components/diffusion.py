"""What diffusion models learn from: noised samples and the velocity of the path between data and noise."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

from torch import Tensor

Path = Literal["linear", "cosine"]


class Interpolant(NamedTuple):
    """A point between data and noise.

    Attributes:
        x_t: ``alpha_t x + sigma_t e``, shape of the data.
        velocity: Its derivative with respect to t, shape of the data.
    """

    x_t: Tensor
    velocity: Tensor


def interpolant(x0: Tensor, noise: Tensor, t: Tensor, path: Path = "linear") -> Interpolant:
    """Mix data with noise along a path, as flow matching trains on it.

        linear:  x_t = (1 - t) x + t e,                          v = e - x
        cosine:  x_t = cos(pi t / 2) x + sin(pi t / 2) e,        v = pi / 2 (cos(pi t / 2) e - sin(pi t / 2) x)

    Both are the stochastic interpolants that SiT (arXiv 2401.08740) and REPA (arXiv 2410.06940) train on; t = 0 is data
    and t = 1 noise.

    Args:
        x0: Data x, ``(B, ...)``.
        noise: e, the same shape.
        t: Time of each sample in [0, 1], ``(B,)``.
        path: ``"linear"`` or ``"cosine"``.

    Raises:
        ValueError: If shapes differ, or for an unknown path.
    """
    if noise.shape != x0.shape:
        raise ValueError(f"noise must have the shape of x0, {tuple(x0.shape)}, got {tuple(noise.shape)}")
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t must have shape (B,) with B = x0.shape[0] = {len(x0)}, got {tuple(t.shape)}")
    t = t.view(-1, *(1,) * (x0.ndim - 1))
    if path == "linear":
        return Interpolant((1 - t) * x0 + t * noise, noise - x0)
    if path == "cosine":
        alpha, sigma = (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()
        return Interpolant(alpha * x0 + sigma * noise, math.pi / 2 * (alpha * noise - sigma * x0))
    raise ValueError(f"path must be one of {get_args(Path)}, got {path!r}")
