"""CAFA against TENT, batch statistics and no adaptation: accuracy over fifteen corruptions by learning rate."""

from __future__ import annotations

import copy
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.claims import Claim, Metric
from heliostat import CAFA, LabelledImageDataModule, StepSeed
from heliostat.components import CORRUPTIONS, ClassGaussians, SmallConvNet, fit_class_gaussians

SEVERITY = 3
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def pictures(data: Path | None, seed: int) -> LabelledImageDataModule:
    """Glyphs; or a folder or archive of pictures, a folder a class."""
    own: dict[str, Any] = {"images": "glyphs", "classes": CHARACTERS} if data is None else {"images": str(data)}
    return LabelledImageDataModule(
        **own,
        split="images",
        val_fraction=0.0,
        test_fraction=0.4,
        size=20,
        augment="light",
        batch_size=64,
        eval_batch_size=64,
        corruptions=list(CORRUPTIONS),
        severity=SEVERITY,
        seed=seed,
    )


@lru_cache(maxsize=1)
def source(seed: int, data: Path | None) -> tuple[nn.Module, ClassGaussians]:
    """Train the source model, and take the statistics of its features over the training pictures."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    images = pictures(data, seed)
    module = CAFA(
        SmallConvNet(in_channels=1, num_classes=images.num_classes),
        ["none"],
        optimizer=lambda params: torch.optim.Adam(params, lr=3e-3),
    )
    Trainer(max_epochs=15, callbacks=[StepSeed()], **QUIET).fit(module, images)
    return module.network, fit_class_gaussians(module.network, images.train_dataloader())


@lru_cache(maxsize=1)
def streams(data: Path | None) -> list[DataLoader]:
    """The batches of every corruption, the same for all seeds: making them costs more than adapting to them."""
    images = pictures(data, seed=0)
    images.setup("test")
    return [DataLoader(list(loader), batch_size=None) for loader in images.test_dataloader()]  # type: ignore[arg-type]


def arm(method: Any, lr: float = 1e-3, **settings: Any) -> Any:
    """One way of adapting to each of the fifteen streams, the source model anew for each."""

    def run(seed: int, data: Path | None) -> dict[str, float]:
        network, gaussians = source(seed, data)
        module = CAFA(
            copy.deepcopy(network),
            [method],
            adaptation_optimizer=lambda params: torch.optim.Adam(params, lr=lr),
            **settings,
        )
        module.source_gaussians = gaussians
        metrics = Trainer(**QUIET).test(module, streams(data), verbose=False)
        merged = {name: value for part in metrics for name, value in part.items()}
        accuracies = [merged[f"test/{method}/{name}"] for name in CORRUPTIONS]
        return {"accuracy": sum(accuracies) / len(accuracies), "worst": min(accuracies)}

    return run


TENT, METHOD = "TENT, lr 0.01", "CAFA, lr 0.01"

CLAIM = Claim(
    statement="On streams of corrupted pictures CAFA predicts better than TENT at the same learning rate.",
    source="Jung et al., ICCV 2023, arXiv 2206.00205 (its tables could not be read by us)",
    metrics={"accuracy": Metric("higher", ".3f"), "worst": Metric("higher", ".3f")},
    arms={
        "no adaptation": arm("none"),
        "batch statistics": arm("batchnorm"),
        **{f"TENT, lr {lr:g}": arm("tent", lr) for lr in LEARNING_RATES},
        **{f"CAFA, lr {lr:g}": arm("cafa", lr) for lr in LEARNING_RATES},
        **{f"CAFA tied, lr {lr:g}": arm("cafa", lr, covariance="tied") for lr in (1e-2, 1e-1)},
    },
    baseline=TENT,
    method=METHOD,
    budget=(
        "one source model a seed (three convolutions with BatchNorm, 15 epochs on characters a-z and 0-9 in all fonts, "
        f"held-out pictures for the streams); 15 corruptions at severity {SEVERITY}, batches of 64, one Adam step a "
        "batch on BatchNorm's scale and shift; every learning rate is reported, none is selected. accuracy is the mean "
        "over the corruptions of the predictions made before each update, worst the lowest of the fifteen."
    ),
)
