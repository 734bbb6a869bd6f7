"""Log-probabilities of tokens, forward and backward, against log_softmax and gather and against cross_entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed import Case, Factory, Run, Speed
from heliostat.components import token_log_probs

VOCABULARY, DIM = 151_936, 896  # of Qwen2.5-0.5B

LogProbs = Callable[..., Tensor]  # of hidden, tokens and weight, or of logits and tokens


def log_softmax_and_gather(hidden: Tensor, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
    logits = hidden if weight is None else hidden @ weight.T
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def cross_entropy(hidden: Tensor, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
    return -F.cross_entropy(hidden if weight is None else hidden @ weight.T, tokens, reduction="none")


def contender(rows: int, given: str, compute: LogProbs) -> Factory:
    """Build the factory of one forward and backward; it returns the values and the gradients."""

    def prepare(device: torch.device) -> Run:
        generator = torch.Generator().manual_seed(0)  # the same data for all contenders, on every device
        tokens = torch.randint(VOCABULARY, (rows,), generator=generator).to(device)
        cotangent = torch.randn(rows, generator=generator).to(device)
        width = VOCABULARY if given == "logits" else DIM
        hidden = torch.randn(rows, width, generator=generator).to(device).requires_grad_()
        inputs = [hidden, tokens]
        if given != "logits":
            weight = 0.02 * torch.randn(VOCABULARY, DIM, generator=generator)
            inputs.append(weight.to(device).requires_grad_(given == "hidden states"))
        leaves = [tensor for tensor in inputs if tensor.requires_grad]

        def run() -> tuple[Tensor, ...]:
            value = compute(*inputs)
            return value.detach(), *torch.autograd.grad(value, leaves, cotangent)

        return run

    return prepare


def _case(rows: int, given: str) -> Case:
    return Case(
        ours={"heliostat": contender(rows, given, token_log_probs)},
        peers={
            "log_softmax and gather": contender(rows, given, log_softmax_and_gather),
            "cross_entropy": contender(rows, given, cross_entropy),
        },
        repeats=3 if rows > 1000 else 5,
    )


SPEED = Speed(
    summary=f"Forward and backward, float32, vocabulary {VOCABULARY:,}, states of {DIM} dimensions, N tokens. Hidden "
    "states: the output embedding is multiplied with and gets its gradient too; frozen head: it gets none, as with "
    "LoRA; logits: they are there already. Peers hold all logits and what is derived from them; ours forms them in "
    "blocks, and a second time in backward, which is a quarter of its products.",
    cases={
        f"{given}, N={rows}": _case(rows, given)
        for given, rows in (("hidden states", 512), ("hidden states", 2048), ("frozen head", 512), ("logits", 512))
    },
)
