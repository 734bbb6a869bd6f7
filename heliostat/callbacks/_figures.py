"""Where callbacks leave their files, and how a figure reaches disk and logger."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run_directory(trainer: Trainer) -> Path:
    """The run's directory, the same on all processes (all of them must call this)."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def save_figure(trainer: Trainer, figure: Figure, path: Path) -> None:
    """Write a figure as PNG and hand it to every logger that takes pictures. Call on rank zero."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    logger: Any
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # Weights & Biases and its like
            logger.log_image(key=path.stem, images=[str(path)])
        elif hasattr(logger.experiment, "add_figure"):  # TensorBoard
            logger.experiment.add_figure(path.stem, figure, trainer.global_step)
