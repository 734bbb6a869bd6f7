from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from heliostat import CompletionTable
from tests.harness import quiet_trainer


class Talker(BoringModel):
    """Somebody's module, which counts its validations."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.changes, self.said = changes, 0

    def on_validation_epoch_start(self) -> None:
        self.said += 1

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if "outputs" in self.changes:
            return self.changes["outputs"]
        texts = [f"{prompt}{self.said}|a\n<b>" for prompt in batch["prompt"]]
        return {"completion": texts, "rewards": torch.tensor([0.5] * len(texts))}

    def on_validation_epoch_end(self) -> None:
        pass

    def val_dataloader(self) -> DataLoader:
        rows = [{"prompt": f"p{i}", "answer": None if i == 1 else f"a{i}"} for i in range(5)]
        columns = self.changes.get("columns", ("prompt", "answer"))
        return DataLoader(
            rows, batch_size=2, collate_fn=lambda some: {name: [row[name] for row in some] for name in columns}
        )


def fit(directory: Path, table: CompletionTable, module: Any = None, ckpt_path: Any = None, **settings: Any) -> Any:
    settings = {
        "max_steps": 4,
        "val_check_interval": 2,
        "limit_train_batches": 4,
        "num_sanity_val_steps": -1,
        "logger": CSVLogger(directory, name="", version=""),
        **settings,
    }
    trainer = quiet_trainer(directory, callbacks=[table], **settings)
    trainer.fit(Talker() if module is None else module, ckpt_path=ckpt_path)
    return trainer


def rows_of(directory: Path) -> list[dict[str, str]]:
    with (directory / "completions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_history_and_table(tmp_path: Path) -> None:
    fit(tmp_path, CompletionTable(num_prompts=3))
    rows = rows_of(tmp_path)
    assert [(row["step"], row["prompt"]) for row in rows] == [(s, p) for s in "024" for p in ("p0", "p1", "p2")]
    assert rows[4] == {"step": "2", "prompt": "p1", "answer": "", "completion": "p12|a\n<b>", "reward": "0.5"}
    lines = (tmp_path / "completions.md").read_text().splitlines()
    assert lines[:3] == [
        "| prompt | answer | step 0 | step 4 |",
        "| --- | --- | --- | --- |",
        "| p0 | a0 | p01\\|a<br>&lt;b> (0.5) | p03\\|a<br>&lt;b> (0.5) |",
    ]
    assert len(lines) == 5


def test_long_texts_are_cut_in_the_table_alone(tmp_path: Path) -> None:
    fit(tmp_path, CompletionTable(num_prompts=1, max_characters=2), num_sanity_val_steps=2)
    assert "| p0 | a0 | p0... (0.5) | p0... (0.5) |" in (tmp_path / "completions.md").read_text()
    assert [row["step"] for row in rows_of(tmp_path)] == ["2", "4"]  # a partial sanity check is no validation
    assert rows_of(tmp_path)[0]["completion"] == "p02|a\n<b>"


def test_resumed_run_goes_on(tmp_path: Path) -> None:
    fit(tmp_path, CompletionTable(1), max_steps=2).save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    fit(tmp_path, CompletionTable(1), ckpt_path=tmp_path / "a.ckpt")
    assert [row["step"] for row in rows_of(tmp_path)] == ["0", "2", "4"]


def test_loggers_get_the_table(tmp_path: Path) -> None:
    class Tables(CSVLogger):
        sent: Any = None

        def log_table(self, key: str, columns: list, data: list) -> None:
            self.sent = key, columns, data

    logger = Tables(tmp_path, name="", version="")
    fit(tmp_path, CompletionTable(2), logger=logger)
    key, columns, data = logger.sent
    assert key == "completions"
    assert columns == ["prompt", "answer", "step 0", "step 4"]
    assert [row[0] for row in data] == ["p0", "p1"]


def test_rewards_and_answers_may_be_missing(tmp_path: Path) -> None:
    module = Talker(outputs={"completion": ["x", "y"]}, columns=("prompt",))
    fit(tmp_path, CompletionTable(2), module)
    assert "| p0 |  | x | x |" in (tmp_path / "completions.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": None}, "validation_step of Talker to return the texts 'completion', got NoneType"),
        ({"outputs": {"loss": 1}}, r"the texts 'completion', got dict with \['loss'\]"),
        (
            {"columns": ("answer",), "outputs": {"completion": []}},
            r"with the texts 'prompt', got dict with \['answer'\]",
        ),
    ],
)
def test_refusals(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, CompletionTable(), Talker(**changes))


@pytest.mark.parametrize("name", ["num_prompts", "max_characters"])
def test_wrong_settings(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        CompletionTable(**{name: 0})
