"""Common corruptions of pictures: noise, blur, weather and digital, five severities each (arXiv 1903.12261).

The fifteen families of ImageNet-C in plain torch, for pictures of any size: the test bed of robustness and test-time
adaptation. Noise, brightness, contrast and JPEG use ImageNet-C's constants. Lengths are fractions of the picture's
shorter side and larger than there, because a small picture has little detail to lose; fog and frost are thinner,
because it has little to show through them. So figures do not compare with published tables. Where a kind differs more
than that, its function says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def corrupt(images: Tensor, kind: str, severity: int = 5, *, seed: int | Sequence[int] = 0) -> Tensor:
    """Corrupt pictures, the same way for the same seed.

    Picture i draws from a generator of its own, seeded with ``seed + i``, and is changed without regard to the others:
    a stream may be cut into batches anywhere, ``corrupt(x[a:b], kind, seed=seed + a)`` being rows a to b of
    ``corrupt(x, kind, seed=seed)``. Numbers are drawn on the CPU, so a GPU gives the same result up to rounding, and
    the global random state is left alone.

    Args:
        images: ``(N, C, H, W)``, floating point, in 0..1 (before normalisation). Three channels are taken for RGB.
        kind: One of ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: Seed of the first picture, or one for each.

    Returns:
        The corrupted pictures, of the shape and dtype of ``images``, in 0..1.

    Raises:
        ValueError: Unknown ``kind``, ``severity`` out of range, wrong shape or dtype, values outside 0..1, or not as
            many seeds as pictures.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(CORRUPTIONS)}, got {kind!r}")
    if severity not in range(1, 6):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity!r}")
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating point (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    seeds = range(seed, seed + len(images)) if isinstance(seed, int) else seed
    if len(seeds) != len(images):
        raise ValueError(f"seed must be one number, or one for each of the {len(images)} pictures, got {len(seeds)}")
    if images.numel() == 0:
        return images.clone()
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"images must lie in 0..1, got {low:.3g}..{high:.3g}: corrupt first, and normalise what comes out"
        )
    function, levels = _KINDS[kind]
    with torch.autocast(images.device.type, enabled=False):
        corrupted = function(images.float(), _Draws(seeds, images.device), levels[severity - 1])
    return corrupted.clamp(0, 1).to(images.dtype)


class _Draws:
    """Random numbers for N pictures, each from its own generator: shapes are of one picture, results ``(N, ...)``."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.device = device

    def uniform(self, *shape: int) -> Tensor:
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators]).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)

    def poisson(self, rates: Tensor) -> Tensor:
        pairs = zip(rates.cpu(), self.generators, strict=True)
        return torch.stack([torch.poisson(rate, generator=g) for rate, g in pairs]).to(self.device)


# --- what several kinds use ------------------------------------------------------------------------------------------


def _side(x: Tensor) -> int:
    return min(x.shape[-2:])


def _filter(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve every channel with one odd kernel ``(k, k)``, normalised; the border is repeated."""
    channels, pad = x.shape[1], kernel.shape[-1] // 2
    weight = (kernel / kernel.sum()).to(x).expand(channels, 1, *kernel.shape)
    return F.conv2d(F.pad(x, (pad, pad, pad, pad), mode="replicate"), weight, groups=channels)


def _gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    reach = torch.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    profile = (-0.5 * (reach / sigma) ** 2).exp()
    return _filter(x, profile[:, None] * profile)


def _warp(x: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Take every pixel from ``(dx, dy)`` pixels beside it; both broadcast to ``(N, H, W)``. The border is repeated."""
    n, _, h, w = x.shape
    columns = torch.arange(w, device=x.device) + 0.5 + dx
    rows = torch.arange(h, device=x.device)[:, None] + 0.5 + dy
    grid = torch.stack([(columns * 2 / w - 1).expand(n, h, w), (rows * 2 / h - 1).expand(n, h, w)], dim=-1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _streak(x: Tensor, length: float, angle: Tensor) -> Tensor:
    """Mean along a line of ``length`` pixels; ``angle`` ``(N,)`` in radians."""
    steps = torch.linspace(-0.5, 0.5, 2 * math.ceil(length) + 1).tolist()
    dx, dy = (length * angle.cos())[:, None, None], (length * angle.sin())[:, None, None]
    return torch.stack([_warp(x, t * dx, t * dy) for t in steps]).mean(0)


def _clouds(draws: _Draws, size: torch.Size, decay: float, cells: int = 2) -> Tensor:
    """Random fields ``(N, 1, H, W)`` spanning 0..1: grids of ``cells``, 2 ``cells``, ..., each ``decay`` fainter."""
    h, w = size
    field, strength = torch.zeros(()), 1.0
    while cells <= max(h, w):
        grid = draws.uniform(1, cells + 1, cells + 1)
        field = field.to(grid) + strength * F.interpolate(grid, size=(h, w), mode="bilinear", align_corners=True)
        cells, strength = 2 * cells, strength / decay
    if field.ndim == 0:  # a picture too small for one cell
        field = draws.uniform(1, h, w)
    low, high = field.amin((2, 3), keepdim=True), field.amax((2, 3), keepdim=True)
    return (field - low) / (high - low).clamp_min(1e-6)


# --- the kinds: pictures in 0..1, their random numbers, and the constants of the severity -----------------------------


def _gaussian_noise(x: Tensor, draws: _Draws, deviation: float) -> Tensor:
    return x + deviation * draws.normal(*x.shape[1:])


def _shot_noise(x: Tensor, draws: _Draws, photons: float) -> Tensor:
    return draws.poisson(x * photons) / photons


def _impulse_noise(x: Tensor, draws: _Draws, share: float) -> Tensor:
    u = draws.uniform(*x.shape[1:])
    return x.masked_fill(u < share / 2, 0).masked_fill(u > 1 - share / 2, 1)


def _defocus_blur(x: Tensor, draws: _Draws, radius: float) -> Tensor:
    radius = radius * _side(x)
    points = torch.linspace(-radius, radius, 33)
    disk = (torch.hypot(points[:, None], points) <= radius).float()
    reach = torch.arange(-math.ceil(radius), math.ceil(radius) + 1)
    share = (1 - (reach[:, None] - points).abs()).clamp_min(
        0
    )  # of each pixel in each point: a disk of any radius blurs
    return _filter(x, share @ disk @ share.T)


def _glass_blur(x: Tensor, draws: _Draws, reach: float) -> Tensor:
    """Every pixel comes from a random place near it; ImageNet-C swaps neighbours one by one."""
    shift = (2 * draws.uniform(2, *x.shape[2:]) - 1) * reach * _side(x)
    return _gaussian_blur(_warp(x, shift[:, 0], shift[:, 1]), 0.4)


def _motion_blur(x: Tensor, draws: _Draws, length: float) -> Tensor:
    angle = (draws.uniform(1)[:, 0] - 0.5) * math.pi / 2  # within 45 degrees of the horizontal
    return _streak(x, length * _side(x), angle)


def _zoom_blur(x: Tensor, draws: _Draws, zoom: float) -> Tensor:
    h, w = x.shape[2:]
    from_centre_x = torch.arange(w, device=x.device) + 0.5 - w / 2
    from_centre_y = (torch.arange(h, device=x.device) + 0.5 - h / 2)[:, None]
    shrink = [1 / z - 1 for z in torch.linspace(1, zoom, 8).tolist()]
    return torch.stack([_warp(x, s * from_centre_x, s * from_centre_y) for s in shrink]).mean(0)


def _snow(x: Tensor, draws: _Draws, constants: tuple[float, float, float]) -> Tensor:
    density, length, whitening = constants
    h, w = x.shape[2:]
    flakes = (draws.uniform(1, h, w) < density) * (0.5 + 0.5 * draws.uniform(1, h, w))
    angle = -math.pi / 4 - draws.uniform(1)[:, 0] * math.pi / 2  # falling, within 45 degrees of the vertical
    flakes = _streak(flakes, length * _side(x), angle)
    flakes = flakes / flakes.amax((1, 2, 3), keepdim=True).clamp_min(1e-6)
    overcast = torch.maximum(x, 0.5 + 0.5 * x.mean(1, keepdim=True))
    return (1 - whitening) * x + whitening * overcast + flakes


def _frost(x: Tensor, draws: _Draws, constants: tuple[float, float]) -> Tensor:
    """Ridges of a random field stand for ImageNet-C's photographs of frost."""
    keep, add = constants
    field = _clouds(draws, x.shape[2:], decay=1.3, cells=4)
    crystals = (1 - (2 * field - 1).abs()) ** 2
    return keep * x + add * crystals


def _fog(x: Tensor, draws: _Draws, constants: tuple[float, float]) -> Tensor:
    thickness, decay = constants
    brightest = x.amax((1, 2, 3), keepdim=True)
    fogged = x + thickness * _clouds(draws, x.shape[2:], decay=decay)
    return fogged * brightest / (brightest + thickness)


def _brightness(x: Tensor, draws: _Draws, added: float) -> Tensor:
    """Added to every channel; ImageNet-C adds to HSV's value, which is the same for grey pictures."""
    return x + added


def _contrast(x: Tensor, draws: _Draws, factor: float) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _elastic_transform(x: Tensor, draws: _Draws, amplitude: float) -> Tensor:
    """A smooth random displacement; ImageNet-C adds a random affine map."""
    shift = [(2 * _clouds(draws, x.shape[2:], decay=4, cells=4)[:, 0] - 1) * amplitude * _side(x) for _ in range(2)]
    return _warp(x, *shift)


def _pixelate(x: Tensor, draws: _Draws, share: float) -> Tensor:
    h, w = x.shape[2:]
    coarse = F.interpolate(x, size=(max(1, round(h * share)), max(1, round(w * share))), mode="area")
    return F.interpolate(coarse, size=(h, w), mode="nearest-exact")


def _jpeg_compression(x: Tensor, draws: _Draws, quality: int) -> Tensor:
    """JPEG's loss: 8 x 8 cosine transform and quantisation (YCbCr for RGB); the chroma is not subsampled."""
    channels, h, w = x.shape[1:]
    if channels == 3:
        colours, tables = _TO_YCBCR.to(x), torch.stack([_LUMINANCE, _CHROMINANCE, _CHROMINANCE])
        middle = x.new_tensor([128 / 255, 0, 0])[:, None, None]
    else:
        colours, tables = torch.eye(channels).to(x), _LUMINANCE.expand(channels, 8, 8)
        middle = x.new_full((channels, 1, 1), 128 / 255)
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    step = (((tables * scale + 50) / 100).floor().clamp(1, 255) / 255).to(x)[:, None, None]
    cosine = _COSINE.to(x)
    x = torch.einsum("ij,njhw->nihw", colours, x) - middle
    x = F.pad(x, (0, -w % 8, 0, -h % 8), mode="replicate")
    blocks = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # (N, C, H/8, W/8, 8, 8)
    blocks = cosine.T @ (((cosine @ blocks @ cosine.T) / step).round() * step) @ cosine
    x = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :h, :w]
    return torch.einsum("ij,njhw->nihw", colours.inverse(), x + middle)


# JPEG's example tables (ITU-T T.81, annex K), colours, and orthonormal cosine transform.
_LUMINANCE = torch.tensor(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
_CHROMINANCE = torch.full((8, 8), 99)
_CHROMINANCE[:4, :4] = torch.tensor([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]])
_TO_YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_COSINE = torch.cos((2 * torch.arange(8.0) + 1) * torch.arange(8.0)[:, None] * math.pi / 16) / 2
_COSINE[0] /= math.sqrt(2)

_KINDS: dict[str, tuple[Callable[[Tensor, _Draws, Any], Tensor], tuple[Any, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60.0, 25.0, 12.0, 5.0, 3.0)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (_defocus_blur, (0.03, 0.045, 0.06, 0.08, 0.1)),
    "glass_blur": (_glass_blur, (0.02, 0.035, 0.05, 0.07, 0.1)),
    "motion_blur": (_motion_blur, (0.1, 0.15, 0.2, 0.27, 0.35)),
    "zoom_blur": (_zoom_blur, (1.11, 1.16, 1.21, 1.26, 1.33)),
    "snow": (_snow, ((0.02, 0.06, 0.1), (0.03, 0.07, 0.2), (0.05, 0.08, 0.3), (0.08, 0.09, 0.4), (0.12, 0.1, 0.5))),
    "frost": (_frost, ((1.0, 0.25), (0.9, 0.35), (0.8, 0.45), (0.75, 0.55), (0.7, 0.65))),
    "fog": (_fog, ((0.4, 2.0), (0.6, 2.0), (0.8, 1.9), (1.0, 1.8), (1.3, 1.7))),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (_elastic_transform, (0.04, 0.06, 0.085, 0.115, 0.15)),
    "pixelate": (_pixelate, (0.7, 0.55, 0.45, 0.35, 0.25)),
    "jpeg_compression": (_jpeg_compression, (25, 18, 15, 10, 7)),
}
CORRUPTIONS: tuple[str, ...] = tuple(_KINDS)
