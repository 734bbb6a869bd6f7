from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from heliostat import ExportBest
from tests.harness import quiet_trainer


class Exporting(BoringModel):
    """Its score is best in the middle, so that best, last and first weights differ."""

    def on_validation_epoch_end(self) -> None:
        self.log("score", float(abs(self.global_step - 2)))

    def save_pretrained(self, directory: str) -> None:
        Path(directory).mkdir()
        torch.save(self.state_dict(), Path(directory) / "weights.pt")


def fit(directory: Path, callbacks: list, model: BoringModel | None = None, **settings):
    settings = {"max_steps": 3, "limit_train_batches": 3, "val_check_interval": 1, "limit_val_batches": 1} | settings
    trainer = quiet_trainer(directory, callbacks=callbacks, enable_checkpointing=True, **settings)
    trainer.fit(model or Exporting())
    return trainer


def test_best_weights_are_loaded_and_exported(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "checkpoints", monitor="score", mode="min", save_on_train_epoch_end=False)
    every = ModelCheckpoint(tmp_path / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = fit(tmp_path, [ExportBest("out"), keep, every])
    best = torch.load(keep.best_model_path, weights_only=True)
    last = torch.load(tmp_path / "checkpoints" / "step=3.ckpt", weights_only=True)
    assert best["global_step"] == 2
    exported = torch.load(tmp_path / "out" / "weights.pt", weights_only=True)
    for name, tensor in exported.items():
        assert torch.equal(tensor, best["state_dict"][name])
        assert torch.equal(tensor, trainer.lightning_module.state_dict()[name])
        assert not torch.equal(tensor, last["state_dict"][name])


def test_without_a_monitor_the_last_weights_are_exported(tmp_path: Path, caplog) -> None:
    with caplog.at_level("INFO"):
        trainer = fit(tmp_path, [ExportBest(), ModelCheckpoint(tmp_path / "checkpoints")])
    exported = torch.load(tmp_path / "model" / "weights.pt", weights_only=True)
    assert torch.equal(exported["layer.weight"], trainer.lightning_module.layer.weight)
    assert "last weights" in caplog.text


def test_module_that_cannot_be_exported_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="`save_pretrained.*BoringModel does not define"):
        fit(tmp_path, [ExportBest()], BoringModel())


def test_fast_dev_run_leaves_nothing(tmp_path: Path) -> None:
    fit(tmp_path, [ExportBest()], fast_dev_run=True)
    assert not (tmp_path / "model").exists()
