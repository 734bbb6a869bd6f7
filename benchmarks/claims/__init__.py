"""Does a method beat its paper's baseline at the same budget? One file a paper, which declares ``CLAIM``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Arm = Callable[[int, "Path | None"], dict[str, float]]


@dataclass(frozen=True)
class Metric:
    """How to read one figure.

    Args:
        better: Which direction is an improvement.
        format: Format specification of the printed figure, such as ``".1f"``.
    """

    better: Literal["higher", "lower"]
    format: str = ".3f"


@dataclass(frozen=True)
class Claim:
    """A statement of a paper and the runs that test it.

    Args:
        statement: The claim in one line.
        source: Paper and table or figure that make it.
        metrics: What every arm returns. The first one is what the claim is about; the others are reported beside it.
        arms: Name to function ``(seed, data) -> {metric: value}``. ``data`` is the ``--data`` path, or None for the
            claim's own data. Python's, numpy's and torch's random states are seeded before each call.
        baseline: The arm that the paper compares with.
        method: The paper's arm.
        budget: What all arms share (steps, batch size, data, tuning), in words.
    """

    statement: str
    source: str
    metrics: dict[str, Metric]
    arms: dict[str, Arm]
    baseline: str
    method: str
    budget: str

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError("a claim needs at least one metric")
        if self.baseline == self.method or not {self.baseline, self.method} <= set(self.arms):
            raise ValueError(
                f"baseline {self.baseline!r} and method {self.method!r} must be two of the arms {sorted(self.arms)}"
            )
