"""How fast is it against what a user would pick instead? One file an operation, which declares ``SPEED``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], Sequence[torch.Tensor]]
Factory = Callable[[torch.device], Run]


@dataclass(frozen=True)
class Case:
    """Contenders for the same job on the same input.

    A contender is a label and a factory: given the device it prepares the inputs, outside the clock, and returns the
    call to time. The call returns the tensors by which contenders are compared (empty where that has no meaning).

    Args:
        ours: Our implementations. The first is the one that ratios and the verdict refer to.
        peers: What a user would pick instead. Compare like with like: other mathematics is another case.
        repeats: Timed calls at most, for a case whose calls take minutes; it is then warmed up by one call.
    """

    ours: dict[str, Factory]
    peers: dict[str, Factory]
    repeats: int | None = None

    def __post_init__(self) -> None:
        if not self.ours or not self.peers or set(self.ours) & set(self.peers):
            raise ValueError("a case needs ours and peers, under different labels")
        if self.repeats is not None and self.repeats < 3:
            raise ValueError(f"repeats must be at least 3 for quartiles to mean anything, got {self.repeats}")


@dataclass(frozen=True)
class Speed:
    """A speed benchmark.

    Args:
        summary: What is timed (forward, backward, dtype, data) and who the peers are.
        cases: Title to contenders.
    """

    summary: str
    cases: dict[str, Case]
