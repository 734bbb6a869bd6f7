"""UNPG against its plain margin head, Recall@1 on classes that training never saw, with and without wrong labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims import Claim, Metric
from benchmarks.claims.multi_similarity import pictures, train
from heliostat import MetricLearning
from heliostat.components import SmallConvNet, UNPGHead

STEPS = 300
SETTINGS: dict[str, Any] = {"head": "cosface", "scale": 32.0, "margin": 0.35}


class _WrongLabels(MetricLearning):
    """Training in which a fixed tenth of the pictures has the label of another class, the same at every step."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        labels, classes = batch["labels"], len(self.loss.weight)
        draw = torch.frac(torch.sin(batch["index"].double() * 12.9898) * 43758.5453).abs()  # of the picture alone
        wrong = (labels + 1 + (draw * 1e4).long() % (classes - 1)) % classes
        return super().training_step({**batch, "labels": torch.where(draw < 0.1, wrong, labels)}, batch_idx)


def arm(head: dict[str, Any], lr: float = 3e-3, *, noise: bool = False, stage: str = "test", **source: Any) -> Any:
    """One head in the same training."""

    def run(seed: int, data: Path | None) -> dict[str, float]:
        images = pictures(data, seed, samples_per_class=None, batch_size=128, **source)
        module = (_WrongLabels if noise else MetricLearning)(
            SmallConvNet(in_channels=1, num_classes=64),
            UNPGHead(64, images.num_classes, **SETTINGS | head),
            optimizer=lambda params: torch.optim.Adam(params, lr=lr),
            lr_scheduler="linear",
        )
        return train(module, images, STEPS, stage)

    return run


BASELINE, METHOD, UNFILTERED = "CosFace", "CosFace + UNPG, whisker 1.5", "CosFace + UNPG, no filter"
HEADS: dict[str, dict[str, Any]] = {
    BASELINE: {"use_unpg": False},
    METHOD: {"whisker": 1.5},
    "CosFace + UNPG, whisker 3": {"whisker": 3.0},
    UNFILTERED: {"whisker": None},
}
FEW = {"val_fraction": 0.1, "test_fraction": 0.8}

CLAIM = Claim(
    statement="The batch's own negatives make the embeddings of a margin head retrieve unseen classes better.",
    source="Jung et al., arXiv 2203.11593 (there, faces: CosFace 89.38 to 90.61 TAR at FAR 1e-5 on IJB-B)",
    metrics={"recall_at_1": Metric("higher", ".3f"), "map_at_r": Metric("higher", ".3f")},
    arms={
        **{name: arm(head) for name, head in HEADS.items()},
        **{f"wrong labels: {name}": arm(HEADS[name], noise=True) for name in (BASELINE, METHOD, UNFILTERED)},
        **{f"few training classes: {name}": arm(HEADS[name], **FEW) for name in (BASELINE, METHOD, UNFILTERED)},
    },
    baseline=BASELINE,
    method=METHOD,
    budget=(
        f"{STEPS} steps of 128 pictures, three convolutions with BatchNorm, embeddings of 64, Adam at 3e-3 with linear "
        f"decay (of 1e-3, 3e-3 and 1e-2 the best on validation characters for both, one seed), scale "
        f"{SETTINGS['scale']:g}, margin {SETTINGS['margin']}. Metrics are those of all test pictures among themselves "
        "after the last step; no checkpoint is selected. Wrong labels: a tenth of the training pictures. Few training "
        "classes: 18, and the test characters are others too, so compare within the group."
    ),
)
