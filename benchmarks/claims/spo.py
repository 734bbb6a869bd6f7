"""SPO against GRPO at the same number of rollouts, 128 x 1 against 16 x 8: a tiny model's right answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.claims import Arm, Claim, Metric
from benchmarks.post_training import METRICS, SHARED, UPDATES, Probability, means, reinforce
from heliostat.advantages import AdvantageEstimator, ValueTracker
from heliostat.components.spo import whiten_advantages
from heliostat.datamodules.sources.arithmetic import arithmetic_model

LR, PRODUCTS = 2e-3, 0.1
ROLLOUTS, GROUP = 128, 8
EARLY = UPDATES // 3


class Whitened(AdvantageEstimator):
    """No baseline but the mean of the batch."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Write ``advantages``."""
        batch["advantages"] = whiten_advantages(batch["rewards"][:, 0])[:, None].to(batch["rewards"].dtype)
        return {}


def arm(num_generations: int, estimator: type[AdvantageEstimator] | None = None, **settings: Any) -> Arm:
    """One division of the rollouts among prompts; without estimator it is GRPO."""

    def run(seed: int, data: Path | None) -> dict[str, float]:
        model, early = arithmetic_model(seed, multiplication=PRODUCTS), Probability(EARLY)
        reinforce(
            model,
            seed,
            lr=LR,
            batch_size=ROLLOUTS // num_generations,
            num_generations=num_generations,
            advantages=None if estimator is None else estimator(),
            callbacks=[early],
            **settings,
        )
        return {**means(model), "early_probability": early.value}

    return run


def base(seed: int, data: Path | None) -> dict[str, float]:
    """The model before."""
    metrics = means(arithmetic_model(seed, multiplication=PRODUCTS))
    return {**metrics, "early_probability": metrics["probability"]}


SINGLE: dict[str, Any] = {"loss_type": "dapo", "clip_high": 0.28, "dual_clip": 10.0}

CLAIM = Claim(
    statement="At the same number of rollouts, one for each of many prompts teaches more than groups for few.",
    source="SPO, ICLR 2026, arXiv 2509.13232 (there: Qwen3-8B, maj@32 over five contests: GRPO 60.4, SPO 63.8)",
    metrics={
        **{name: METRICS[name] for name in ("probability", "accuracy")},
        "early_probability": Metric("higher", ".1f"),
    },
    arms={
        "base model": base,
        "GRPO, 16 x 8": arm(GROUP),
        "SPO, 128 x 1": arm(1, ValueTracker, prioritized=True, **SINGLE),
        "SPO, uniform sampling": arm(1, ValueTracker, **SINGLE),
        "128 x 1, no tracker": arm(1, Whitened, **SINGLE),
    },
    baseline="GRPO, 16 x 8",
    method="SPO, 128 x 1",
    budget=(
        f"{SHARED.format(0.9, 0.5, PRODUCTS)}; early_probability: the same after {EARLY} updates. {ROLLOUTS} rollouts "
        f"an update, learning rate {LR:g}, reward 1 for the right answer. SPO starts its trackers from 8 rollouts of "
        "every prompt, 1,176 in all, as many as in 9 updates, which GRPO does not get. Without tracker, rewards are "
        "whitened over the batch, whose mean is the baseline of all prompts. Of 147 prompts 128 are drawn anyway, so "
        "that the order of preference can change little"
    ),
)
