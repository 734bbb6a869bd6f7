"""AlignGuard: what the callback adds to a training step of a LoRA layout of real size."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.speed import Case, Factory, Run, Speed
from heliostat import AlignGuard

LAYERS, DIM, VOCABULARY = 24, 1024, 1000
ROWS, LENGTH = 4, 128  # of a training batch
ALIGNMENT_ROWS = 8  # the time of the estimate is not part of a step, and its size not of the penalty's cost
RANKS = (8, 16, 64)


class Tuned(LightningModule):
    """A decoder with random weights and LoRA on its seven linear layers a block."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=DIM,
            intermediate_size=2816,
            num_hidden_layers=LAYERS,
            num_attention_heads=16,
        )
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
        self.model = get_peft_model(LlamaForCausalLM(config), lora)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of the language model."""
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the adapters."""
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-4, fused=True)


def texts(rows: int, length: int) -> dict[str, Tensor]:
    """Random tokens."""
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def step(rank: int, guarded: bool) -> Factory:
    """A training step as the Trainer makes it; the guard has been set up by a real fit of one step."""

    def prepare(device: torch.device) -> Run:
        torch.manual_seed(0)
        module = Tuned(rank)
        batch = texts(ROWS, LENGTH)
        guard = AlignGuard([texts(ALIGNMENT_ROWS, 32)])
        trainer = Trainer(
            max_steps=1,
            accelerator="cpu" if device.type == "cpu" else "gpu",
            callbacks=[guard] if guarded else [],
            default_root_dir=tempfile.gettempdir(),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
        module.to(device)
        logged: Any = lambda *_, **__: None  # noqa: E731 - outside of a fit nothing can be logged
        module.log_dict = logged
        optimizer = trainer.optimizers[0]
        batch = {name: value.to(device) for name, value in batch.items()}
        before_step: Callable[[], None] = partial(guard.on_before_optimizer_step, trainer, module, optimizer)

        def run() -> tuple[Tensor, ...]:
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            if guarded:
                before_step()
            optimizer.step()
            return ()

        return run

    return prepare


SPEED = Speed(
    summary=f"A training step (forward, backward, AdamW) of a decoder of {LAYERS} blocks, d = {DIM}, with LoRA of rank "
    f"r on its {7 * LAYERS} linear layers, {ROWS} x {LENGTH} tokens, float32, random weights; with the callback at its "
    "defaults (32 x 32 directions, E_A and E_T) against the same step without it. The Fisher information is estimated "
    "once, before training, and is not part of a step.",
    cases={
        f"r={rank}": Case(
            ours={"with AlignGuard": step(rank, guarded=True)},
            peers={"plain LoRA": step(rank, guarded=False)},
            repeats=5,
        )
        for rank in RANKS
    },
)
