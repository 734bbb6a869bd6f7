"""U-REPA against plain flow matching, alignment without the manifold term, and a random teacher, on small digits."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.claims import Claim, Metric
from heliostat import UREPA, Diffusion

TRAIN, HELD_OUT = slice(1400), slice(1400, None)
STEPS, EVALUATIONS, BATCH, LR, DECAY = 500, (200, 300, 400, 500), 64, 2e-3, 0.99
SAMPLES, EULER_STEPS = 500, 12
TOKEN_DIM, WIDTHS = 64, (24, 48)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Pictures (1797, 1, 8, 8) in [-1, 1] in random order, and what they show."""
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].float().view(-1, 1, 8, 8) / 8 - 1, labels[order]


class Tokens(nn.Module):
    """A teacher: a convolutional classifier whose last maps are 64 tokens of 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, TOKEN_DIM, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(TOKEN_DIM, TOKEN_DIM, 3, padding=1),
        )
        self.head = nn.Linear(TOKEN_DIM, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        """Class logits."""
        return self.head(self.convs(pictures).relu().mean((2, 3)))


class Judge(nn.Module):
    """What samples are judged by: another classifier, of another shape, with 16 features before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(192, 16),
            nn.Tanh(),
        )
        self.head = nn.Linear(16, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        """Class logits."""
        return self.head(self.features(pictures))


def classifier(network: nn.Module, seed: int) -> float:
    """Train on the training digits, and return the accuracy on the others."""
    pictures, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(15):
        for rows in torch.randperm(TRAIN.stop, generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(pictures[rows]), labels[rows]).backward()
            optimizer.step()
    network.eval().requires_grad_(False)
    return (network(pictures[HELD_OUT]).argmax(1) == labels[HELD_OUT]).float().mean().item()


@cache
def teacher_tokens(seed: int, trained: bool) -> Tensor:
    """Of all digits (1797, 64, 64)."""
    torch.manual_seed(seed)
    network = Tokens()
    if trained and (accuracy := classifier(network, seed)) < 0.85:
        raise RuntimeError(f"seed {seed}: the teacher has not learned, its accuracy is {accuracy:.2f}")
    with torch.no_grad():
        return network.convs(digits()[0]).flatten(2).mT.contiguous()


@cache
def judge() -> nn.Module:
    """The same for all seeds, so that their distances are on one scale."""
    torch.manual_seed(1234)
    network = Judge()
    if (accuracy := classifier(network, 1234)) < 0.9:
        raise RuntimeError(f"the judge has not learned, its accuracy is {accuracy:.2f}")
    return network.features


@torch.no_grad()
def moments(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the judge's features."""
    features = judge()(pictures).double()
    return features.mean(0), features.T.cov()


def frechet_distance(pictures: Tensor) -> float:
    """Squared Fréchet distance of the judge's features to those of the training digits."""
    mean, covariance = moments(pictures)
    real_mean, real_covariance = moments(digits()[0][TRAIN])
    roots = torch.linalg.eigvals(covariance @ real_covariance).real.clamp_min(0).sqrt().sum()
    return float((mean - real_mean).square().sum() + covariance.trace() + real_covariance.trace() - 2 * roots)


class Curve(Callback):
    """Draw samples with the averaged weights, which are in place until the epoch of validation ends."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.figures: dict[str, float] = {}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and judge."""
        if trainer.global_step in EVALUATIONS:
            like = {"pixel_values": torch.zeros(SAMPLES, 1, 8, 8)}
            generator = torch.Generator().manual_seed(self.seed)
            samples = pl_module.sample(like, num_steps=EULER_STEPS, generator=generator)  # type: ignore[operator]
            self.figures[f"fd_{trainer.global_step}"] = frechet_distance(samples)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the error, which is logged now."""
        if trainer.global_step in EVALUATIONS[-2:]:
            self.figures[f"loss_{trainer.global_step}"] = float(trainer.callback_metrics["val/loss"])


def arm(**settings: Any) -> Any:
    """Train with these settings of U-REPA; without any, plainly. ``teacher`` is whether the teacher was trained."""

    def run(seed: int, data: Path | None) -> dict[str, float]:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message=".*(does not have many workers|isinstance.treespec).*")
        alignment = dict(settings)
        columns = {"pixel_values": digits()[0], "index": torch.arange(len(digits()[0]))}
        if alignment:
            columns["teacher_features"] = teacher_tokens(seed, alignment.pop("teacher"))
        rows: Any = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        judge()
        torch.manual_seed(seed)  # the teachers and the judge have drawn
        denoiser = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=WIDTHS,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )
        training: dict[str, Any] = {"optimizer": lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.0)}
        if settings:
            module: Diffusion = UREPA(denoiser, teacher_dim=TOKEN_DIM, hidden_dim=128, **alignment, **training)
        else:
            module = Diffusion(denoiser, **training)
        shuffle = torch.Generator().manual_seed(seed)
        train = DataLoader(rows[TRAIN], BATCH, shuffle=True, drop_last=True, generator=shuffle)
        curve = Curve(seed)
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_steps=STEPS,
            val_check_interval=100,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            callbacks=[curve, EMAWeightAveraging(decay=DECAY)],
        )
        torch.manual_seed(seed)
        trainer.fit(module, train, DataLoader(rows[HELD_OUT], 397))
        return curve.figures

    return run


BASELINE, METHOD = "flow matching", "U-REPA"

CLAIM = Claim(
    statement="At the same number of steps a U-Net that is trained with U-REPA gives better samples.",
    source="arXiv 2503.18414, abstract and ablations (ImageNet 256: FID 10.91 without alignment, 5.72 with U-REPA)",
    metrics={
        **{f"fd_{step}": Metric("lower", ".2f") for step in reversed(EVALUATIONS)},
        **{f"loss_{step}": Metric("lower", ".4f") for step in reversed(EVALUATIONS[-2:])},
    },
    arms={
        BASELINE: arm(),
        METHOD: arm(teacher=True),
        "U-REPA, w = 0 (token term alone)": arm(teacher=True, manifold_weight=0.0),
        "U-REPA, random teacher": arm(teacher=False),
    },
    baseline=BASELINE,
    method=METHOD,
    budget=(
        f"scikit-learn's digits of 8 x 8, 1,400 to train, unconditional. A U-Net of two levels, widths {WIDTHS}, 4 x 4 "
        f"in the middle; {STEPS} steps of {BATCH} pictures, AdamW at {LR:g}, weights averaged with decay {DECAY}. The "
        "teacher: a classifier of three convolutions, trained on the same 1,400 digits with their labels, of which it "
        "gives 64 tokens; or the same one untrained. lambda 0.5, w 3, projector of width 128. fd_N: Fréchet distance "
        f"at step N of {SAMPLES} samples in {EULER_STEPS} Euler steps to the training digits, in 16 features of "
        "another classifier; loss_N: error of the velocity on 397 held-out digits"
    ),
)
