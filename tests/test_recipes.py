"""Every packaged recipe runs, and what the first one promises about processes and interruptions holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import pandas as pd
import pytest
import torch

from heliostat.cli import main, recipes
from heliostat.datamodules import captioned_pictures
from heliostat.datamodules.sources import refusals, tiny_clip
from heliostat.datamodules.sources.twemoji import twemoji
from heliostat.lit_models import two_bit
from heliostat.pretrained import load_text_encoder
from tests.lit_models.test_whitened_cse import NO_DROPOUT, tiny_module, write_files


def _shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer emoji, and less training of what recipes begin with; nothing of it outlives the test."""
    monkeypatch.setattr(captioned_pictures, "twemoji", lambda: twemoji()[::4])
    monkeypatch.setattr(tiny_clip, "fit_towers", partial(tiny_clip.fit_towers, steps=20))
    monkeypatch.setattr(tiny_clip, "_tiny_clip", cache(tiny_clip._tiny_clip.__wrapped__))
    train = refusals._train
    monkeypatch.setattr(refusals, "_train", lambda *args, steps, **settings: train(*args, steps=20, **settings))
    monkeypatch.setattr(refusals, "_aligned_model", cache(refusals._aligned_model.__wrapped__))
    few = {name: two_bit.VARIANTS[name] for name in ("2-bit, to nearest", "2/4/16-bit, compensated")}
    monkeypatch.setattr(two_bit, "VARIANTS", few)
    monkeypatch.setattr(two_bit, "load_text_encoder", lambda name, num_layers: load_text_encoder(name, num_layers=1))


@pytest.mark.parametrize("name", recipes())
def test_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Two steps and a validation of one batch; then validate and test from its checkpoint and its saved config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _shrink(monkeypatch)
    short = [
        "--trainer.limit_val_batches",
        "1",
        "--trainer.limit_test_batches",
        "1",
        "--trainer.enable_progress_bar",
        "false",
    ]
    steps = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2"]
    monkeypatch.setattr(sys, "argv", ["heliostat", "fit", "--config", name, *steps, *short])
    assert not main()
    (run,) = (tmp_path / "runs" / name).iterdir()
    run = max(run.glob("*/config.yaml"), default=run / "config.yaml", key=os.path.getmtime).parent  # of the last stage
    assert {"config.yaml", "metrics.csv", "checkpoints", "curves.png"} <= {path.name for path in run.iterdir()}
    config = str(run / "config.yaml")
    (checkpoint, *_) = (run / "checkpoints").glob("*.ckpt")
    for command in ("validate", "test"):
        monkeypatch.setattr(
            sys, "argv", ["heliostat", command, "--config", config, "--ckpt_path", str(checkpoint), *short]
        )
        assert not main()
    assert "test/" in capsys.readouterr().out


@pytest.mark.parametrize("path", recipes().values(), ids=recipes())
def test_recipe_header_says_what_it_is_and_how_long_it_takes(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert "arXiv" in header[0]
    assert any(line.startswith("# Time: ") for line in header)
    assert any(line.startswith("# What to see: ") for line in header)


def test_missing_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["heliostat", "fit", "--config", "whitened_cse", "--data.sentences", "no.txt"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "error: there is no file 'no.txt'" in error
    assert "Traceback" not in error


@pytest.fixture
def tiny_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that put a tiny encoder and small files into the recipe."""
    write_files(tmp_path)
    tiny_module(NO_DROPOUT["dropout"]).save_pretrained(tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pairs = str(tmp_path / "pairs.csv")
    arguments = {
        "model.encoder": tmp_path / "encoder",
        "model.num_layers": "null",
        "model.group_size": 4,
        "data.sentences": tmp_path / "sentences.txt",
        "data.val_pairs": pairs,
        "data.test_pairs": pairs,
        "data.batch_size": 16,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    command = [sys.executable, "-m", "heliostat", "fit", "--config", "whitened_cse"]
    return command + [f"--{key}={value}" for key, value in arguments.items()]


def losses(run: Path) -> list[float]:
    return pd.read_csv(run / "metrics.csv")["train/loss"].dropna().tolist()


@pytest.mark.slow
def test_two_processes_give_the_one_process_loss(tiny_recipe: list[str], tmp_path: Path) -> None:
    """By the command a user types; without dropout, whose masks no two runs on different processes share."""
    short = ["--trainer.max_steps=6", "--trainer.precision=64-true", "--trainer.accelerator=cpu"]
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    for name, more in {"one": [], "two": ddp}.items():
        directory = [f"--trainer.default_root_dir={tmp_path / name}"]
        subprocess.run([*tiny_recipe, *short, *more, *directory], check=True, timeout=240)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    assert len(losses(tmp_path / "one")) == 6


@pytest.mark.slow
def test_killed_and_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tiny_recipe: list[str], tmp_path: Path
) -> None:
    keep = [
        "--trainer.max_steps=40",
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.filename={step}",
        "--trainer.callbacks.every_n_train_steps=5",
        "--trainer.callbacks.save_top_k=-1",
    ]
    subprocess.run([*tiny_recipe, *keep, f"--trainer.default_root_dir={tmp_path / 'whole'}"], check=True, timeout=240)
    checkpoints = tmp_path / "killed" / "checkpoints"
    killed = subprocess.Popen([*tiny_recipe, *keep, f"--trainer.default_root_dir={tmp_path / 'killed'}"])
    deadline = time.monotonic() + 240
    while not (checkpoints / "step=20.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (checkpoints / "step=40.ckpt").exists(), "it was killed too late for this test to say anything"
    resume = f"--ckpt_path={checkpoints / 'step=15.ckpt'}"
    subprocess.run([*tiny_recipe, *keep, resume], check=True, timeout=240)
    expected, actual = (
        torch.load(tmp_path / run / "checkpoints" / "step=40.ckpt", weights_only=True) for run in ("whole", "killed")
    )
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(tensor, actual["state_dict"][name]), name
    assert {p.name for p in (tmp_path / "killed").iterdir()} >= {"metrics.csv", "metrics.1.csv", "curves.png", "model"}
