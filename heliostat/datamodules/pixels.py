"""From encoded pictures to normalised pixels, for every data module of pictures: decode, augment, resize, normalise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from heliostat._extras import require
from heliostat.datamodules.affine import jitter_affine
from heliostat.datamodules.image_readers import Pictures, read_picture, resize_and_crop

Augment = Literal["none", "light", "crop_flip"]

_MEMORY = 2**30  # bytes that in_memory=None takes for the pictures of one set


@dataclass(eq=False)
class PixelPipeline:
    """What pictures go through. Decoded ones are uint8 tensors ``(C, H, W)``, prepared ones float32 in 0..1.

    Args:
        size: Height and width. Other pictures are scaled by their shorter side and cropped in the middle.
        channels: 1 (grey) or 3 (RGB).
        mean: Subtracted from the pixels in 0..1; one number or one a channel.
        std: Divides them; one number or one a channel.
        augment: ``"none"``, ``"light"``, ``"crop_flip"``, or a callable from a decoded picture to one of uint8 or of
            floats in 0..1.

    Raises:
        ValueError: An argument out of range.
        ModuleNotFoundError: ``"crop_flip"`` without torchvision.
    """

    size: int
    channels: int
    mean: float | Sequence[float]
    std: float | Sequence[float]
    augment: Augment | torch.nn.Module | Callable[[Tensor], Tensor] = "none"

    def __post_init__(self) -> None:
        if self.size < 1 or self.channels not in (1, 3):
            raise ValueError(
                f"size must be >= 1 and channels 1 or 3, got size={self.size} and channels={self.channels}"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not isinstance(values, (int, float)) and len(values) not in (1, self.channels):
                raise ValueError(
                    f"{name} must be one number or one for each of {self.channels} channels, got {values!r}"
                )
        if not callable(self.augment) and self.augment not in get_args(Augment):
            known = ", ".join(map(repr, get_args(Augment)))
            raise ValueError(f"augment must be one of {known}, or a callable, got {self.augment!r}")
        # What needs the decoded picture in its own size, so that it cannot be prepared once for all epochs.
        self.transform: Callable[[Tensor], Tensor] | None = None
        if self.augment not in ("none", "light"):
            self.transform = self.augment if callable(self.augment) else _crop_flip(self.size)

    def fits(self, count: int, in_memory: bool | None) -> bool:
        """Whether ``count`` pictures are to be prepared once: if asked for, or by default if they take up to 1 GiB."""
        if self.transform is not None:
            return False
        return count * self.channels * self.size**2 <= _MEMORY if in_memory is None else in_memory

    def read_all(self, pictures: Pictures, rows: Sequence[int], name: str) -> tuple[Tensor, list[int]]:
        """Decode and resize pictures; return them as uint8, and which of ``rows``, by position, could be read.

        Raises:
            ValueError: None of them; ``name`` is what the message calls them.
        """
        read, readable, errors = [], [], []
        for i, row in enumerate(rows):
            try:
                read.append(resize_and_crop(read_picture(pictures, row, self.channels), self.size))
                readable.append(i)
            except ValueError as error:  # noqa: PERF203 - nothing beside decoding
                errors.append(str(error))
        if not read:
            raise ValueError(f"{name}: none of {len(rows)} pictures can be read; the first: {errors[0]}")
        if errors:
            rank_zero_warn(
                f"{name}: left out {len(errors)} of {len(rows)} pictures, which cannot be read: {'; '.join(errors[:3])}"
                + ("; ..." if len(errors) > 3 else "")
            )
        return torch.stack(read), readable

    def prepare(self, pictures: Pictures | Tensor, row: int, key: int) -> Tensor:
        """Prepare one picture, but for ``"light"``; ``key`` seeds what the transform draws.

        Raises:
            ValueError: It cannot be read.
        """
        picture = pictures[row] if isinstance(pictures, Tensor) else read_picture(pictures, row, self.channels)
        if self.transform is not None:
            state = torch.get_rng_state()
            torch.default_generator.manual_seed(key)  # not torch.manual_seed, which seeds the GPUs too
            try:
                picture = self.transform(picture)
            finally:
                torch.set_rng_state(state)
        picture = resize_and_crop(picture, self.size)
        return picture if picture.is_floating_point() else picture.float() / 255

    def prepare_batch(self, pictures: Pictures | Tensor, rows: Tensor, keys: Sequence[int]) -> Tensor:
        """Prepare several pictures, but for ``"light"``: ``(B, C, size, size)``."""
        if isinstance(pictures, Tensor) and self.transform is None:
            return pictures[rows].float() / 255
        return torch.stack([self.prepare(pictures, row, key) for row, key in zip(rows.tolist(), keys, strict=True)])

    def jitter(self, pixels: Tensor, keys: Sequence[int]) -> Tensor:
        """Do what ``"light"`` does to prepared pictures ``(B, C, size, size)``, with draws that ``keys`` seed."""
        if self.augment != "light":
            return pixels
        generator = torch.Generator()
        draws = torch.stack([torch.rand(4, generator=generator.manual_seed(key)) for key in keys])
        return jitter_affine(pixels, draws, degrees=10, scale=0.1, shift=0.08)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Subtract the mean and divide by the standard deviation."""
        mean, std = (torch.tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (self.mean, self.std))
        return (pixels - mean) / std


def _crop_flip(size: int) -> Callable[[Tensor], Tensor]:
    transforms = require("torchvision.transforms.v2", "augment='crop_flip'")
    return transforms.Compose([transforms.RandomResizedCrop(size, antialias=True), transforms.RandomHorizontalFlip()])
