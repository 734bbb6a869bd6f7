"""Random numbers that depend on the step alone, so that a resumed run draws what the uninterrupted one would have."""

from __future__ import annotations

import hashlib
import os
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Seed torch, NumPy and Python before every training batch from (seed, epoch, batch, rank).

    Lightning checkpoints hold no random state, and a checkpoint could hold only rank 0's: after a resume, dropout and
    augmentation go on with other numbers. With this callback the numbers of a step follow from its place in training
    alone. The seed is that of `seed_everything`, else torch's initial one; it is kept in the checkpoint.
    """

    def __init__(self) -> None:
        self.seed: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle on one seed for all processes, unless a checkpoint brought it."""
        if self.seed is None:
            seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
            self.seed = trainer.strategy.broadcast(seed)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed for this batch."""
        place = f"{self.seed}/{trainer.current_epoch}/{batch_idx}/{trainer.global_rank}"
        seed = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little")
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is what users' augmentations draw from
        random.seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seed of the run that is continued."""
        self.seed = state_dict["seed"]
