"""Alignment recovery: a step against the forward and backward that it cannot do without."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed import Case, Factory, Run, Speed
from heliostat.components import eligible_parameters, mean_representation, recover_alignment

LAYERS, DIM, KEPT, VOCABULARY = 8, 1024, 5, 1000
BATCHES, ROWS, LENGTH = 4, 8, 32


class Setting:
    """A decoder with random weights, its aligned weights beside it, prompts and directions."""

    def __init__(self, device: torch.device) -> None:
        from transformers import LlamaConfig, LlamaModel

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=DIM,
            intermediate_size=2816,
            num_hidden_layers=LAYERS,
            num_attention_heads=16,
        )
        self.model = LlamaModel(config).to(device).eval()
        self.blocks: Any = self.model.layers
        self.params, self.num_hidden = eligible_parameters(self.model, list(self.blocks), KEPT)
        self.aligned = {
            name: (p.detach() + 1e-3 * torch.randn_like(p)).to("cpu", copy=True) for name, p in self.params.items()
        }
        ids = torch.randint(VOCABULARY, (BATCHES, ROWS, LENGTH))
        self.batches = list(ids.to(device))
        self.direction = mean_representation(self.represent, self.batches).roll(1)

    def represent(self, ids: Tensor) -> Tensor:
        """The last token after the last kept block; those above do not run."""
        hidden = self.model.embed_tokens(ids)
        positions = torch.arange(LENGTH, device=ids.device)[None]
        rotary = self.model.rotary_emb(hidden, positions)
        for block in self.blocks[:KEPT]:
            output = block(hidden, position_embeddings=rotary, position_ids=positions)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden[:, -1]


def recovery_step(rollback: bool) -> Factory:
    """One step, and its undoing."""

    def prepare(device: torch.device) -> Run:
        setting = Setting(device)
        recover = partial(
            recover_alignment,
            setting.params,
            setting.aligned,
            setting.represent,
            setting.batches,
            setting.batches,
            lambda: 1.0,
            harmful_direction=setting.direction,
            num_hidden=setting.num_hidden,
            steps=1,
            save_every=1,
            rollback=rollback,
        )

        def run() -> tuple[Tensor, ...]:
            recover().log.undo_(setting.params)
            return ()

        return run

    return prepare


def plain_backward(passes: int) -> Factory:
    """The gradients of the same batches, summed."""

    def prepare(device: torch.device) -> Run:
        setting = Setting(device)

        def run() -> tuple[Tensor, ...]:
            for _ in range(passes):
                totals = [torch.zeros_like(p) for p in setting.params.values()]
                for batch in setting.batches:
                    loss = -F.cosine_similarity(setting.represent(batch).mean(0), setting.direction, dim=0)
                    for total, grad in zip(
                        totals, torch.autograd.grad(loss, list(setting.params.values())), strict=True
                    ):
                        total += grad
            return ()

        return run

    return prepare


def _case(rollback: bool) -> Case:
    return Case(
        ours={"recovery step": recovery_step(rollback)},
        peers={"forward and backward": plain_backward(passes=1 + rollback)},
        repeats=5,
    )


SPEED = Speed(
    summary=f"One recovery step over {BATCHES} batches of {ROWS} prompts of {LENGTH} tokens, restored and undone "
    f"again, on the first {KEPT} of {LAYERS} blocks of a decoder, d = {DIM}, float32, random weights, aligned weights "
    "in CPU memory; against forward and backward of the same batches alone: once, or with rollback twice, as a step "
    "takes the gradient of as many task prompts then. The mean of those is part of the step too. The paper has 32 "
    "batches in a step, over which what is added here once would be spread.",
    cases={"without rollback": _case(rollback=False), "with rollback": _case(rollback=True)},
)
