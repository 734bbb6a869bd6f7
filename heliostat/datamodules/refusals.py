"""Fine-tuning data that wears an aligned model's refusals away, with all that is needed to keep or repair them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from heliostat.datamodules.loading import GlobalBatchSampler, ResumableLoader
from heliostat.datamodules.sources.refusals import PROMPT_LENGTH, Kind, Split, refusal_rows


class RefusalDataModule(LightningDataModule):
    """The made-up language of `heliostat.datamodules.sources.refusals`: made when asked for, no file, no download.

    Batches hold ``input_ids`` and ``attention_mask``, with answers also ``labels``, int64. Training rows are of the
    task alone. Validation and test rows, mixed, are as many of the task as flagged ones with their refusals, with
    symbols that no other split has; measure them by `heliostat.datamodules.sources.refusals.refusal_metrics`. What is
    kept or repaired comes from the symbols of training.

    Args:
        batch_size: Training rows in a batch, over all processes together.
        eval_batch_size: Rows in a batch of each process elsewhere.
        eval_samples: Rows of either kind in validation and in test.
        aligned_samples: Rows of ``alignment_dataloader``, `heliostat.AlignGuard`'s data.
        prompts: Rows of ``harmful_dataloader`` and of ``task_dataloader``, `heliostat.AlignmentRecovery`'s.
        prompt_batch_size: Rows in a batch of these two.
        seed: Of the order of the training rows.

    Raises:
        ValueError: More rows than there are, or none.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        eval_batch_size: int = 200,
        eval_samples: int = 300,
        aligned_samples: int = 256,
        prompts: int = 256,
        prompt_batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size, self.eval_samples = batch_size, eval_batch_size, eval_samples
        self.aligned_samples, self.prompts, self.prompt_batch_size = aligned_samples, prompts, prompt_batch_size
        self.seed = seed

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of ``batch_size`` rows of the task over all processes."""
        rows: Any = _rows("task", "train", None)
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = GlobalBatchSampler(rows, self.batch_size, num_replicas=world_size, rank=rank, seed=self.seed)
        return ResumableLoader(rows, batch_size=sampler.local_batch_size, sampler=sampler, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader:
        """Rows of the task and refusals, mixed."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader:
        """Rows of the task and refusals, mixed."""
        return self._eval_loader("test")

    def alignment_dataloader(self) -> DataLoader:
        """Flagged prompts with the aligned model's refusals."""
        return _loader(_rows("refusal", "train", self.aligned_samples), self.eval_batch_size)

    def harmful_dataloader(self) -> DataLoader:
        """Flagged prompts without answers."""
        return _loader(_prompts("refusal", self.prompts), self.prompt_batch_size)

    def task_dataloader(self) -> DataLoader:
        """Prompts of the task without answers."""
        return _loader(_prompts("task", self.prompts), self.prompt_batch_size)

    def _eval_loader(self, split: Split) -> DataLoader:
        rows = _rows("task", split, self.eval_samples) + _rows("refusal", split, self.eval_samples)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))  # both kinds on every process
        return _loader([rows[i] for i in order.tolist()], self.eval_batch_size)


def _rows(kind: Kind, split: Split, n: int | None) -> list[dict[str, Tensor]]:
    columns = refusal_rows(kind, split, n)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _prompts(kind: Kind, n: int) -> list[dict[str, Tensor]]:
    rows = _rows(kind, "train", n)
    return [{name: row[name][:PROMPT_LENGTH] for name in ("input_ids", "attention_mask")} for row in rows]


def _loader(rows: Any, batch_size: int) -> DataLoader:
    # A generator of its own: each pass would draw from the global one, and measuring more often change the training.
    return DataLoader(rows, batch_size=batch_size, generator=torch.Generator())
