"""MC-GRPO against GRPO with 2, 4 and 8 rollouts, and with as many as MC-GRPO draws: a tiny model's right answers."""

from __future__ import annotations

from pathlib import Path

from benchmarks.claims import Arm, Claim
from benchmarks.post_training import METRICS, SHARED, means, reinforce
from heliostat.advantages import AdvantageEstimator, MedianCentered
from heliostat.components.mc_grpo import Scale
from heliostat.datamodules.sources.arithmetic import arithmetic_model
from heliostat.rewards import CharacterMatch

LR, LOWER_LR, PRODUCTS = 2e-3, 1e-3, 0.1


def arm(num_generations: int, scale: Scale | None = None, lr: float = LR) -> Arm:
    """One group size; without scale it is GRPO."""

    def run(seed: int, data: Path | None) -> dict[str, float]:
        model = arithmetic_model(seed, multiplication=PRODUCTS)
        estimator: AdvantageEstimator | None = None if scale is None else MedianCentered(scale=scale)
        reinforce(model, seed, lr=lr, num_generations=num_generations, reward=CharacterMatch(), advantages=estimator)
        return means(model)

    return run


def base(seed: int, data: Path | None) -> dict[str, float]:
    """The model before."""
    return means(arithmetic_model(seed, multiplication=PRODUCTS))


def arms(group: int, lr: float = LR) -> dict[str, Arm]:
    """All ways at one group size."""
    rate = "" if lr == LR else f", rate {lr:g}"
    return {
        f"GRPO, {group} rollouts{rate}": arm(group, lr=lr),
        f"GRPO, {group + 1} rollouts{rate}": arm(group + 1, lr=lr),
        f"MC-GRPO, {group} of {group + 1} rollouts, MAD{rate}": arm(group, "mad", lr),
        f"MC-GRPO, {group} of {group + 1} rollouts, std{rate}": arm(group, "std", lr),
    }


CLAIM = Claim(
    statement="With two rollouts, the median of three as baseline makes right answers likelier than GRPO's mean.",
    source="MC-GRPO, arXiv 2601.22582 (there: GSM8K, Qwen3-1.7B, 2 rollouts: + 4.6 points)",
    metrics={name: METRICS[name] for name in ("probability", "accuracy")},
    arms={"base model": base} | arms(2) | arms(4) | arms(8) | arms(2, LOWER_LR),
    baseline="GRPO, 2 rollouts",
    method="MC-GRPO, 2 of 3 rollouts, MAD",
    budget=(
        f"{SHARED.format(0.9, 0.5, PRODUCTS)}. Batches of 32 prompts, learning rate {LR:g}; the reward is the share of "
        "right digits, 0, a half or 1. MC-GRPO draws one rollout more than it trains on; GRPO with that number draws "
        "as many and trains on all. The authors scale by the median absolute deviation (MAD), which is 0 whenever most "
        "rewards of a group are equal; std is this library's recipe. Rates and rewards come from an "
        "earlier experiment"
    ),
)
