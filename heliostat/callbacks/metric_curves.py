"""The curves of a training as one picture, and where each metric started and ended as a table."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from heliostat._extras import require
from heliostat.callbacks._figures import run_directory, save_figure


class MetricCurves(Callback):
    """Draw every logged metric over the steps, one panel a metric, and print start, end, lowest and highest.

    Works with any module and callback: it reads what they log under a name with a slash, ``val/x`` in validation, all
    others, such as ``train/x`` and ``dypo/x``, in training. Names that are alike behind the slash share a panel. With
    ``Trainer(num_sanity_val_steps=-1)`` the whole validation set is measured before training: the curves' first point.
    The picture goes to the run's directory and to every logger that takes images; the history survives a resume.

    Args:
        filename: Name of the picture inside the run's directory.
    """

    def __init__(self, filename: str = "curves.png") -> None:
        self.filename = filename
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before training, not after it, that the figure cannot be drawn."""
        require("matplotlib", "MetricCurves")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Record training metrics at the logger's pace."""
        step = trainer.global_step
        pace = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step != self._last_step and (step == 1 or step % pace == 0):
            self._record(trainer, step, validation=False)
        self._last_step = step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record validation metrics, those of the sanity check included."""
        whole_set = trainer.num_sanity_val_steps == float("inf")
        if not trainer.sanity_checking or whole_set:
            self._record(trainer, trainer.global_step, validation=True)

    def _record(self, trainer: Trainer, step: int, validation: bool) -> None:
        for name, value in trainer.callback_metrics.items():
            if "/" in name and name.startswith("val/") == validation and not name.endswith(("_step", "_epoch")):
                points = self.history.setdefault(name, [])
                if not points or points[-1][0] != step:
                    points.append((step, float(value)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and print."""
        path = run_directory(trainer) / self.filename
        if not trainer.is_global_zero or not self.history or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        rank_zero_info(self.table())
        save_figure(trainer, self.figure(), path)
        rank_zero_info(f"curves: {path}")

    def table(self) -> str:
        """Every metric's first, last, lowest and highest value."""
        width = max(len(name) for name in self.history)
        lines = [f"{'metric':{width}} {'start':>9} {'end':>9} {'lowest':>9} {'highest':>9}"]
        for name, points in sorted(self.history.items()):
            values = [value for _, value in points]
            shown = (values[0], values[-1], min(values), max(values))
            lines.append(f"{name:{width}} " + " ".join(f"{value:9.4f}" for value in shown))
        return "\n".join(lines)

    def figure(self) -> Any:
        """The curves as a `matplotlib.figure.Figure`, outside pyplot, so that no display or global state is touched."""
        figure_class = require("matplotlib.figure", "MetricCurves").Figure
        panels: dict[str, list[str]] = {}
        for name in sorted(self.history):
            if len({value for _, value in self.history[name]}) > 1:  # a constant is not worth a panel
                panels.setdefault(name.split("/", 1)[-1], []).append(name)
        columns = max(1, len(panels) if len(panels) < 4 else math.ceil(math.sqrt(len(panels))))
        rows = max(1, math.ceil(len(panels) / columns))
        figure = figure_class(figsize=(4.2 * columns, 3 * rows), layout="constrained")
        for place, (title, names) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(rows, columns, place)
            for name in names:
                steps, values = zip(*self.history[name], strict=True)
                axes.plot(steps, values, marker="o" if len(steps) < 30 else None, markersize=3, label=name)
            axes.set(title=title, xlabel="step")
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize="small")
        return figure

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"history": self.history, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of the run that is continued."""
        self.history, self._last_step = state_dict["history"], state_dict["last_step"]
