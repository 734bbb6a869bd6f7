"""GRAO against fine-tuning on the reference and GRPO: what a tiny model then answers rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.claims import Arm, Claim, Metric
from benchmarks.post_training import METRICS, SHARED, UPDATES, Probability, imitate, means, reinforce
from heliostat.advantages import ReferenceInGroup
from heliostat.datamodules.sources.arithmetic import ArithmeticPrompts, arithmetic_model

LR, ERROR = 2e-3, 0.35
EARLY = 2 * UPDATES // 3


def references(seed: int) -> ArithmeticPrompts:
    """One teacher's answers."""
    return ArithmeticPrompts(teachers=1, teacher_error=ERROR, seed=seed)


def base(seed: int, data: Path | None) -> dict[str, float]:
    """The model before."""
    metrics = means(arithmetic_model(seed))
    return {**metrics, "early_probability": metrics["probability"]}


def sft(seed: int, data: Path | None) -> dict[str, float]:
    """Imitate the reference, right or wrong."""
    model, early = arithmetic_model(seed), Probability(EARLY)
    imitate(model, seed, references(seed), lr=LR, callbacks=[early])
    return {**means(model), "early_probability": early.value}


def grpo(seed: int, data: Path | None) -> dict[str, float]:
    """Rewards alone."""
    model, early = arithmetic_model(seed), Probability(EARLY)
    reinforce(model, seed, lr=LR, callbacks=[early])
    return {**means(model), "early_probability": early.value}


def grao(**settings: Any) -> Arm:
    """Both, by advantage."""

    def run(seed: int, data: Path | None) -> dict[str, float]:
        model, early = arithmetic_model(seed), Probability(EARLY)
        estimator = ReferenceInGroup(**settings)
        reinforce(model, seed, references(seed), lr=LR, advantages=estimator, loss_type="prompt", callbacks=[early])
        return {**means(model), "early_probability": early.value}

    return run


CLAIM = Claim(
    statement="Imitating a reference as far as it is better than one's own answers beats GRPO, which has none.",
    source="GRAO, arXiv 2508.07750 (there: Qwen2.5-7B helpful-base, NAG: SFT 0.3, GRPO 60.7, GRAO 68.0)",
    metrics={**METRICS, "early_probability": Metric("higher", ".1f")},
    arms={
        "base model": base,
        "SFT on the reference": sft,
        "GRPO": grpo,
        "GRAO": grao(),
        "GRAO, statistics of rollouts only": grao(reference_in_group=False),
        "GRAO without alignment regulariser": grao(lam=0.0),
        "GRAO without imitation": grao(beta=0.0),
    },
    baseline="GRPO",
    method="GRAO",
    budget=(
        f"{SHARED.format(0.9, 0.5, 0.0)}; early_probability: the same after {EARLY} updates. Batches of 32 prompts, of "
        f"which GRPO and GRAO draw 8 answers each, learning rate {LR:g}. The reference is one teacher, wrong on "
        f"{100 * ERROR:.0f} % of the prompts; GRPO does not see it. The reward is 1 for the right answer, for rollouts "
        "and reference alike; beta 0.5 and lambda 0.6 of the paper"
    ),
)
