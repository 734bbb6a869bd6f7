"""What a language model says to the first validation prompts as it trains: one look that no metric replaces."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from heliostat.callbacks._figures import run_directory


class _Row(NamedTuple):
    step: int
    prompt: str
    answer: str | None
    completion: str
    reward: float | None


class CompletionTable(Callback):
    """Write down the completions of the first validation prompts, at every validation.

    Works with any module whose ``validation_step`` returns a dict with the texts ``completion`` and, if it likes, their
    ``rewards`` ``(B,)``, as `heliostat.GroupPolicy` does, and with batches that have the texts ``prompt`` and, if they
    like, ``answer``. On several processes the prompts are those of the first one.

    In the run's directory, ``completions.csv`` has the completions of all validations, and ``completions.md`` those of
    the first and of the latest side by side, with rewards. Loggers that take texts or tables get the latter too. With
    ``Trainer(num_sanity_val_steps=-1)`` the first is the model before training. What was written survives a resume.

    Args:
        num_prompts: How many prompts.
        max_characters: Longest text in the table of ``completions.md``; the other file has all of it.

    Raises:
        ValueError: On a number below 1.
        MisconfigurationException: In validation, if the module or the batches do not have the texts.
    """

    def __init__(self, num_prompts: int = 16, max_characters: int = 300) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be >= 1, got {num_prompts}")
        if max_characters < 1:
            raise ValueError(f"max_characters must be >= 1, got {max_characters}")
        self.num_prompts, self.max_characters = num_prompts, max_characters
        self.history: list[_Row] = []
        self._rows: list[_Row] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last time."""
        self._rows = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take rows until there are enough."""
        missing = self.num_prompts - len(self._rows)
        if dataloader_idx or missing <= 0:
            return
        name = type(pl_module).__name__
        completions = _field(outputs, "completion", f"validation_step of {name} to return")
        prompts = _field(batch, "prompt", f"validation batches of {name} with")
        answers = batch.get("answer") or [None] * len(prompts)
        rewards = outputs.get("rewards")
        values = rewards.tolist() if isinstance(rewards, Tensor) else rewards or [None] * len(prompts)
        rows = zip(prompts, answers, completions, values, strict=True)
        self._rows += [_Row(trainer.global_step, *row) for row in rows][:missing]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        partial = trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf")
        directory = run_directory(trainer)
        if partial or trainer.fast_dev_run or not self._rows:  # type: ignore[attr-defined]
            return
        step = trainer.global_step
        self.history = [row for row in self.history if row.step != step] + self._rows
        if not trainer.is_global_zero:
            return
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "completions.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_Row._fields)
            writer.writerows(self.history)
        header, body = self._table()
        lines = [header, ["---"] * len(header), *body]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        (directory / "completions.md").write_text(text, encoding="utf-8")
        logger: Any
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):  # Weights & Biases and its like
                logger.log_table(key="completions", columns=header, data=body)
            elif hasattr(logger.experiment, "add_text"):  # TensorBoard
                logger.experiment.add_text("completions", text, step)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Prompts, answers, and the completions of the first and of the latest validation."""
        steps = sorted({self.history[0].step, self.history[-1].step})
        rows: dict[tuple[str, str | None], dict[int, str]] = {}
        for row in self.history:
            if row.step in steps:
                rows.setdefault((row.prompt, row.answer), {})[row.step] = self._shown(row)
        header = ["prompt", "answer", *(f"step {step:,}" for step in steps)]
        body = [
            [self._cell(prompt), self._cell(answer or ""), *(said.get(step, "") for step in steps)]
            for (prompt, answer), said in rows.items()
        ]
        return header, body

    def _shown(self, row: _Row) -> str:
        return self._cell(row.completion) + ("" if row.reward is None else f" ({row.reward:g})")

    def _cell(self, text: str) -> str:
        """A text for a cell of Markdown."""
        cut = text if len(text) <= self.max_characters else text[: self.max_characters] + "..."
        return cut.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")

    def state_dict(self) -> dict[str, Any]:
        """What has been written down."""
        return {"history": [tuple(row) for row in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of the run that is continued."""
        self.history = [_Row(*row) for row in state_dict["history"]]


def _field(where: Any, name: str, needs: str) -> Any:
    if not isinstance(where, Mapping) or name not in where:
        got = f"{type(where).__name__}" + (f" with {sorted(map(str, where))}" if isinstance(where, Mapping) else "")
        raise MisconfigurationException(
            f"CompletionTable needs {needs} the texts {name!r}, got {got}. heliostat.GroupPolicy and "
            "heliostat.PromptDataModule have them; or remove the callback"
        )
    return where[name]
