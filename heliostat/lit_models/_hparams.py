"""Hyper-parameters that every checkpoint can be loaded with."""

from __future__ import annotations

import inspect
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters


def save_plain_hyperparameters(module: LightningModule) -> None:
    """Save what a module's ``__init__`` was given, as plain values. Call it in ``__init__`` after ``super()``.

    From the command line the configuration itself is saved, networks as class paths, so that
    ``load_from_checkpoint(path)`` rebuilds everything. From Python, arguments that are no plain values (networks,
    optimizer factories) are left out, because a checkpoint holding them cannot be read with ``weights_only=True``:
    pass those again, ``load_from_checkpoint(path, encoder=encoder)``.
    """
    frame = inspect.currentframe()
    assert frame is not None
    caller = frame.f_back
    assert caller is not None
    ignored = []
    if _given_hyperparameters.get() is None:
        ignored = [name for name, value in caller.f_locals.items() if not _is_plain(value)]
    module.save_hyperparameters(ignore=ignored, frame=caller)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    return value is None or type(value) in (bool, int, float, str)
