"""A small random affine map for every picture of a batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def jitter_affine(images: Tensor, draws: Tensor, *, degrees: float, scale: float, shift: float) -> Tensor:
    """Scale, turn and shift pictures by random numbers, all in one operation. The border is repeated outside.

    Args:
        images: ``(N, C, H, W)``, floating point.
        draws: ``(N, 4)`` in 0..1, such as ``torch.rand`` gives: size, angle, and shift along the two axes, where 0.5
            leaves the picture as it is.
        degrees: Largest angle, either way.
        scale: Largest change of size, either way, as a fraction.
        shift: Largest shift along each axis, either way, as a fraction of the side.

    Returns:
        Shape and dtype of ``images``.
    """
    size, angle, dx, dy = (2 * draws - 1).unbind(1)
    size, angle = 1 + scale * size, math.radians(degrees) * angle
    dx, dy = 2 * shift * dx, 2 * shift * dy  # affine_grid measures in half sides
    cos, sin = angle.cos() / size, angle.sin() / size
    # From a point of the result back to the picture: undo the shift, then the turn and the scale.
    maps = torch.stack([cos, sin, -cos * dx - sin * dy, -sin, cos, sin * dx - cos * dy], 1).view(-1, 2, 3)
    grid = F.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
