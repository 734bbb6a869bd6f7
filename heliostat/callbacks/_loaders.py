"""Data that a callback is told about by the name of a method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def named_loader(trainer: Trainer, module: LightningModule, name: str, argument: str) -> Iterable[Any]:
    """What the data module's, or else the module's, method of that name returns.

    Args:
        trainer: Knows the data module.
        module: Asked second.
        name: Of the method.
        argument: Where the user wrote it, for the message (``"AlignGuard(alignment_dataloader=...)"``).

    Raises:
        MisconfigurationException: Neither has it.
    """
    owners = (trainer.datamodule, module)  # type: ignore[attr-defined]
    for owner in owners:
        if callable(method := getattr(owner, name, None)):
            return method()
    raise MisconfigurationException(
        f"{argument}: neither the data module nor {type(module).__name__} has a method {name!r}. Add it, or give the "
        "batches themselves"
    )
