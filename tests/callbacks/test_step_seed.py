from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from heliostat import StepSeed
from tests.harness import quiet_trainer


class Drawing(BoringModel):
    """Keeps what each training step draws."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[float, float, float]] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.drawn.append((torch.rand(()).item(), float(np.random.rand()), random.random()))
        return super().training_step(batch, batch_idx)["loss"]


def draws(directory: Path, seed: int, ckpt_path: str | None = None) -> list:
    torch.manual_seed(seed)
    model = Drawing()
    keep = ModelCheckpoint(directory, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = quiet_trainer(
        directory,
        max_steps=6,
        limit_train_batches=4,
        limit_val_batches=0,
        callbacks=[StepSeed(), keep],
        enable_checkpointing=True,
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    return model.drawn


def test_every_step_draws_other_numbers_and_the_same_in_every_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    first = draws(tmp_path, 0)
    assert len(set(first)) == len(first) == 6
    assert draws(tmp_path, 1) == first
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    assert draws(tmp_path, 0) != first


def test_resumed_run_keeps_the_seed_of_the_checkpoint(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    whole = draws(tmp_path, 3)
    assert draws(tmp_path / "resumed", 4, ckpt_path=str(tmp_path / "step=3.ckpt")) == whole[3:]
