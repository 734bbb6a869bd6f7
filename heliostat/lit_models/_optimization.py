"""Optimizer and learning-rate schedule of a module, from the two arguments that all modules share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

Schedule = Literal["linear", "cosine", "constant"]

_DECAY: dict[str, Callable[[float], float]] = {  # part of training that is over -> factor of the learning rate
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def configure_optimizers(
    module: LightningModule,
    optimizer: OptimizerCallable,
    lr_scheduler: Schedule | LRSchedulerCallable,
    *,
    groups: Sequence[dict[str, Any]] | None = None,
    warmup_steps: int = 0,
) -> OptimizerLRScheduler:
    """Build what ``LightningModule.configure_optimizers`` returns.

    Args:
        module: Its trainable parameters are optimised.
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: ``"linear"`` and ``"cosine"`` decay to zero over the whole training, whose length they take from
            the trainer; ``"constant"`` does nothing; a callable makes a scheduler from the optimizer. All are stepped
            after every optimizer step.
        groups: Parameter groups in the place of one; a group's ``lr_scale`` multiplies the optimizer's learning rate.
        warmup_steps: Steps over which the learning rate of ``"linear"`` and ``"cosine"`` first rises linearly.
    """
    if warmup_steps < 0 or (warmup_steps and lr_scheduler not in _DECAY):
        raise ValueError(
            f"warmup_steps must be >= 0, and goes with lr_scheduler {[*_DECAY]}, got {warmup_steps} with "
            f"lr_scheduler={lr_scheduler!r}"
        )
    optim = optimizer([p for p in module.parameters() if p.requires_grad] if groups is None else groups)
    for group in optim.param_groups:
        if "lr_scale" in group:
            group["lr"] *= group["lr_scale"]
    if lr_scheduler == "constant":
        return optim
    scheduler: LRScheduler | ReduceLROnPlateau
    if callable(lr_scheduler):
        scheduler = lr_scheduler(optim)
    elif lr_scheduler not in _DECAY:
        raise ValueError(f"lr_scheduler must be one of {[*_DECAY, 'constant']} or a callable, got {lr_scheduler!r}")
    else:
        decay, trainer = _DECAY[lr_scheduler], module.trainer
        if trainer.max_steps == -1 and trainer.max_epochs == -1:
            raise ValueError(
                f"lr_scheduler={lr_scheduler!r} needs to know how long training is: set the trainer's max_steps or "
                "max_epochs, or lr_scheduler='constant'"
            )

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            if step == warmup_steps:
                return 1.0
            # Asked for only once training runs: Lightning 2.6 sets up the loader to answer, and a loader that is set up
            # before a checkpoint's loops are restored is never told where to go on.
            length = max(trainer.estimated_stepping_batches - warmup_steps, 1)
            return decay(min((step - warmup_steps) / length, 1.0))

        # A function is not saved with the scheduler: a run resumed for longer decays over its new length.
        scheduler = LambdaLR(optim, factor)
    config: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
    if isinstance(scheduler, ReduceLROnPlateau):
        config |= {"interval": "epoch", "monitor": scheduler.monitor}
    return {"optimizer": optim, "lr_scheduler": config}  # type: ignore[return-value]
