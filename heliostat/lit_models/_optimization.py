"""Optimizer and learning-rate schedule of a module, from the two arguments that all modules share."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

Schedule = Literal["linear", "cosine", "constant"]


def configure_optimizers(
    module: LightningModule, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | Schedule
) -> OptimizerLRScheduler:
    """Build what ``LightningModule.configure_optimizers`` returns.

    Args:
        module: Its trainable parameters are optimised.
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: ``"linear"`` and ``"cosine"`` decay to zero over the whole training, whose length they take from
            the trainer; ``"constant"`` does nothing; a callable makes a scheduler from the optimizer. All are stepped
            after every optimizer step.
    """
    optim = optimizer([p for p in module.parameters() if p.requires_grad])
    if lr_scheduler == "constant":
        return optim
    if callable(lr_scheduler):
        scheduler = lr_scheduler(optim)
    else:
        steps = module.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError(
                f"lr_scheduler={lr_scheduler!r} needs to know how long training is: set the trainer's max_steps or "
                "max_epochs, or lr_scheduler='constant'"
            )
        if lr_scheduler == "linear":
            scheduler = LinearLR(optim, start_factor=1.0, end_factor=0.0, total_iters=int(steps))
        elif lr_scheduler == "cosine":
            scheduler = CosineAnnealingLR(optim, T_max=int(steps))
        else:
            raise ValueError(f"lr_scheduler must be linear, cosine, constant or a callable, got {lr_scheduler!r}")
    config = {"scheduler": scheduler, "interval": "step"}
    if isinstance(scheduler, ReduceLROnPlateau):
        config |= {"interval": "epoch", "monitor": scheduler.monitor}
    return {"optimizer": optim, "lr_scheduler": config}  # type: ignore[return-value]
