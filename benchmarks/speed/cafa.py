"""Test-time adaptation: the cost of a batch under CAFA against plain inference and TENT, and of its distances alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed import Case, Factory, Run, Speed
from heliostat.components import ClassGaussians, TestTimeAdapter, mahalanobis_sq

BATCH = 64
SHAPES = [(classes, dim) for dim in (512, 2048) for classes in (10, 100, 1000)]
CLASS_LIMIT = 10**9  # numbers in the factors of all classes, 4 GB of float32; beyond it only the tied covariance fits


def classifier(classes: int, dim: int) -> nn.Module:
    """Two hidden layers of the features' width, with BatchNorm."""
    return nn.Sequential(
        nn.Linear(256, dim),
        nn.BatchNorm1d(dim),
        nn.ReLU(),
        nn.Linear(dim, dim),
        nn.BatchNorm1d(dim),
        nn.ReLU(),
        nn.Linear(dim, classes),
    )


def gaussians(classes: int, dim: int, covariance: str) -> ClassGaussians:
    """Statistics as of well separated classes."""
    scales = torch.linspace(0.5, 2.0, dim, dtype=torch.float64).diag()
    return ClassGaussians(
        count=torch.full((classes,), 100),
        mean=torch.randn(classes, dim, dtype=torch.float64),
        covariance=scales if covariance == "tied" else scales.repeat(classes, 1, 1),
    )


def adapter(classes: int, dim: int, **settings: Any) -> Factory:
    """One batch of a stream, prediction and update; streams differ after it, so no results are compared."""

    def prepare(device: torch.device) -> Run:
        torch.manual_seed(0)
        if settings["method"] == "cafa":
            statistics = gaussians(classes, dim, settings["covariance"])
            adapting = TestTimeAdapter(classifier(classes, dim).to(device), gaussians=statistics, **settings)
            adapting.gaussians = None  # in double precision; only needed to save the state
        else:
            adapting = TestTimeAdapter(classifier(classes, dim).to(device), **settings)
        batch = torch.randn(BATCH, 256, device=device)

        def run() -> tuple[Tensor, ...]:
            adapting(batch)
            return ()

        return run

    return prepare


def class_by_class(features: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """Distances as a loop over the classes with explicit inverses, the way they are often written."""
    columns = []
    for centre, inverse in zip(mean, precision, strict=True):
        centred = features - centre
        columns.append(((centred @ inverse) * centred).sum(1))
    return torch.stack(columns, dim=1)


def distances(classes: int, dim: int, compute: Any, inverse: bool) -> Factory:
    """Squared Mahalanobis distances and their gradient."""

    def prepare(device: torch.device) -> Run:
        torch.manual_seed(0)
        statistics = gaussians(classes, dim, "class")
        factor = statistics.precision_factor("class", shrinkage=0.1)
        prepared = torch.cholesky_inverse(factor) if inverse else factor
        mean, prepared = statistics.mean.float().to(device), prepared.float().to(device)
        features = torch.randn(BATCH, dim, device=device).requires_grad_()
        cotangent = torch.rand(BATCH, classes, device=device)

        def run() -> tuple[Tensor, Tensor]:
            d = compute(features, mean, prepared)
            (gradient,) = torch.autograd.grad(d, features, cotangent)
            return d.detach(), gradient

        return run

    return prepare


def _stream(classes: int, dim: int, covariance: str) -> Case:
    build = partial(adapter, classes, dim)
    return Case(
        ours={"CAFA": build(method="cafa", covariance=covariance)},
        peers={"plain inference": build(method="none"), "TENT": build(method="tent")},
    )


SPEED = Speed(
    summary=f"Stream: predict a batch of {BATCH} and adapt to it, float32; a classifier with two layers of D units "
    "with BatchNorm, C classes. Peers do less: plain inference does not adapt, TENT needs no distances; the ratios are "
    "what the class statistics cost. Covariance: one for all classes (tied) or one for each (class; left out where the "
    "factors exceed 4 GB). Distances: forward and backward of the squared Mahalanobis distances alone, against a loop "
    "over classes with explicit inverses, which are less exact.",
    cases={
        **{f"stream, tied, C={c} D={d}": _stream(c, d, "tied") for c, d in SHAPES},
        **{f"stream, class, C={c} D={d}": _stream(c, d, "class") for c, d in SHAPES if c * d * d < CLASS_LIMIT},
        **{
            f"distances, C={c} D={d}": Case(
                ours={"mahalanobis_sq": distances(c, d, mahalanobis_sq, inverse=False)},
                peers={"loop over classes": distances(c, d, class_by_class, inverse=True)},
            )
            for c, d in ((10, 512), (100, 512), (10, 2048))
        },
    },
)
