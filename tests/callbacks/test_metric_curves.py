from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

import heliostat._extras
from heliostat import MetricCurves
from tests.harness import quiet_trainer


class Logging(BoringModel):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("train/loss", loss)
        self.log("train/constant", 3.0)
        self.log("method/share", float(batch_idx))
        self.log("unnamed", float(batch_idx))
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", super().validation_step(batch, batch_idx)["x"])


def fit(directory: Path, curves: MetricCurves, ckpt_path: str | None = None, **settings):
    settings = {
        "max_steps": 8,
        "limit_train_batches": 8,
        "limit_val_batches": 2,
        "val_check_interval": 4,
        "log_every_n_steps": 2,
        "num_sanity_val_steps": -1,
        "logger": CSVLogger(directory, name="", version=""),
    } | settings
    trainer = quiet_trainer(directory, callbacks=[curves], **settings)
    trainer.fit(Logging(), ckpt_path=ckpt_path)
    return trainer


def test_history_table_and_picture(tmp_path: Path) -> None:
    curves = MetricCurves()
    fit(tmp_path, curves)
    assert [step for step, _ in curves.history["train/loss"]] == [1, 2, 4, 6, 8]
    assert [step for step, _ in curves.history["val/loss"]] == [0, 4, 8]  # 0: before training
    assert curves.history["method/share"] == [(1, 0), (2, 1), (4, 3), (6, 5), (8, 7)]
    assert "unnamed" not in curves.history
    values = [value for _, value in curves.history["val/loss"]]
    row = next(line for line in curves.table().splitlines() if line.startswith("val/loss")).split()
    assert [float(v) for v in row[1:]] == pytest.approx([values[0], values[-1], min(values), max(values)], abs=1e-4)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    axes = curves.figure().axes
    assert [a.get_title() for a in axes] == ["share", "loss"]  # both stages share a panel; a constant has none
    assert [len(a.lines) for a in axes] == [1, 2]


def test_a_partial_sanity_check_is_no_measurement(tmp_path: Path) -> None:
    curves = MetricCurves()
    fit(tmp_path, curves, num_sanity_val_steps=1)
    assert [step for step, _ in curves.history["val/loss"]] == [4, 8]


def test_history_survives_a_resume(tmp_path: Path) -> None:
    first = MetricCurves()
    fit(tmp_path, first, max_steps=4).save_checkpoint(tmp_path / "a.ckpt")
    second = MetricCurves()
    fit(tmp_path, second, ckpt_path=str(tmp_path / "a.ckpt"))
    assert second.history["val/loss"][:2] == first.history["val/loss"]
    assert [step for step, _ in second.history["train/loss"]] == [1, 2, 4, 6, 8]


def test_loggers_with_pictures_get_the_figure(tmp_path: Path) -> None:
    class Images(CSVLogger):
        sent: list

        def log_image(self, key: str, images: list) -> None:
            self.sent = [key, *images]

    logger = Images(tmp_path, name="", version="")
    fit(tmp_path, MetricCurves("all.png"), logger=logger)
    assert logger.sent == ["all", str(tmp_path / "all.png")]


def test_missing_matplotlib_is_said_before_training(tmp_path: Path, monkeypatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(heliostat._extras.importlib, "import_module", absent)
    with pytest.raises(ModuleNotFoundError, match=r"MetricCurves needs .* pip install 'heliostat\[data\]'"):
        fit(tmp_path, MetricCurves())
