"""Small pictures with classes and captions that need no download: the handwritten digits of scikit-learn.

1,797 grey pictures of 8 x 8, white on black, of the ten digits by 43 writers: the test set of "Optical Recognition of
Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998 (CC-BY 4.0), as a copy comes with
scikit-learn. For smoke tests and miniature experiments.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from heliostat._extras import require

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits:
    """The pictures, encoded as PGM, and the digit that each shows."""

    def __init__(self, images: Tensor, labels: list[int]) -> None:
        self.images, self.labels = images, labels  # (N, 8, 8) uint8

    def content(self, position: int) -> bytes:
        """The encoded picture."""
        return b"P5 8 8 255\n" + self.images[position].numpy().tobytes()

    def where(self, position: int) -> str:
        """The picture's number."""
        return f"digits, picture {position}"

    def fingerprint(self) -> str:
        """A name, as they are the same everywhere."""
        return "sklearn digits"


@cache
def digits() -> Digits:
    """Read the digits.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    data = require("sklearn.datasets", "The source 'digits'").load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)
    return Digits(images, data.target.tolist())
