"""Multi-similarity loss with mining, forward and backward, against pytorch-metric-learning's miner and loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed import Case, Factory, Run, Speed
from heliostat.components import multi_similarity_loss

DIM, SAMPLES_PER_CLASS = 512, 4
SETTINGS = {"alpha": 2.0, "beta": 50.0, "base": 0.5}
EPSILON = 0.1

Loss = Callable[[Tensor, Tensor], Tensor]


def pytorch_metric_learning() -> Loss:
    """Its documented use: the miner finds the pairs, the loss is given them."""
    from pytorch_metric_learning import losses, miners

    miner, loss = miners.MultiSimilarityMiner(epsilon=EPSILON), losses.MultiSimilarityLoss(**SETTINGS)
    return lambda embeddings, labels: loss(embeddings, labels, miner(embeddings, labels))


def contender(rows: int, spread: float, make: Callable[[], Loss]) -> Factory:
    """Build the factory of one forward and backward; it returns the loss and the gradient."""

    def prepare(device: torch.device) -> Run:
        generator = torch.Generator().manual_seed(0)  # the same data for all contenders, on every device
        labels = torch.randperm(rows, generator=generator) // SAMPLES_PER_CLASS
        centres = torch.randn(rows // SAMPLES_PER_CLASS, DIM, generator=generator)
        embeddings = centres[labels] + spread * torch.randn(rows, DIM, generator=generator)
        embeddings, labels = embeddings.to(device).requires_grad_(), labels.to(device)
        loss = make()

        def run() -> tuple[Tensor, Tensor]:
            value = loss(embeddings, labels)
            (gradient,) = torch.autograd.grad(value, embeddings)
            return value.detach(), gradient

        return run

    return prepare


def _case(rows: int, spread: float) -> Case:
    ours = partial(multi_similarity_loss, epsilon=EPSILON, **SETTINGS)
    return Case(
        ours={"heliostat": contender(rows, spread, lambda: ours)},
        peers={"pytorch-metric-learning": contender(rows, spread, pytorch_metric_learning)},
        repeats=3 if rows > 10_000 else None,
    )


SPEED = Speed(
    summary=f"Miner and loss, forward and backward, float32, d = {DIM}, {SAMPLES_PER_CLASS} rows a class, epsilon "
    f"{EPSILON}, beta 50. Peer: `MultiSimilarityMiner` and `MultiSimilarityLoss` of pytorch-metric-learning as its "
    "documentation uses them together. Begun: embeddings that tell nothing yet, so that the miner keeps nearly all "
    "pairs. Trained: rows scatter about the centre of their class, and about a tenth of the negatives is kept.",
    cases={
        f"{state}, N={rows}": _case(rows, spread)
        for rows in (256, 1024, 4096, 16384)
        for state, spread in (("begun", 20.0), ("trained", 2.0))
        if rows < 10_000 or state == "trained"  # where a call of the peer takes minutes
    },
)
