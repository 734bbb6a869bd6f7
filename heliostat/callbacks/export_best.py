"""Leave the best weights of a training in a form that other libraries load."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from heliostat.callbacks._figures import run_directory


class ExportBest(Callback):
    """At the end of training, load the best checkpoint into the module and write it with its ``save_pretrained``.

    The best checkpoint is that of the first `ModelCheckpoint` with a ``monitor``; without one the last weights are
    written, and a line says so.

    Args:
        dirname: Directory to write, inside the run's directory.

    Raises:
        MisconfigurationException: In ``setup``, if the module has no ``save_pretrained(directory)``.
    """

    def __init__(self, dirname: str = "model") -> None:
        self.dirname = dirname

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that cannot be exported before any time is spent on it."""
        if not callable(getattr(pl_module, "save_pretrained", None)):
            raise MisconfigurationException(
                f"ExportBest calls `save_pretrained(directory)`, which {type(pl_module).__name__} does not define. "
                "Add that method to the module, or remove the callback."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the best weights and export them."""
        directory = run_directory(trainer) / self.dirname
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        monitored = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
        best = trainer.strategy.broadcast(monitored[0].best_model_path) if monitored else ""
        if best:
            if Path(best).is_dir():
                raise MisconfigurationException(
                    f"ExportBest reads single-file checkpoints, and {best} is sharded. Remove the callback, or set "
                    "`save_distributed_checkpoint=False` on the strategy."
                )
            state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            pl_module.load_state_dict(state)
        if trainer.is_global_zero:
            pl_module.save_pretrained(str(directory))  # type: ignore[operator]
            origin = f"best by {monitored[0].monitor}: {Path(best).name}" if best else "last weights"
            rank_zero_info(f"exported ({origin}): {directory}")
