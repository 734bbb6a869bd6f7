"""What adaptation at test time gains over doing nothing: a table, a figure, and a file of numbers."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from heliostat._extras import require
from heliostat.callbacks._figures import run_directory, save_figure

Results = Mapping[str, Mapping[str, Tensor]]  # stream -> method -> which predictions were right, in the stream's order

_COLOURS = {"none": "#7f7f7f", "batchnorm": "#1f77b4", "tent": "#ff7f0e", "cafa": "#d62728"}


class AdaptationReport(Callback):
    """Print the accuracy of every method on every stream, and draw how it develops along the streams.

    Works with any module that has ``stream_results`` when a test ends: a mapping from stream to method to a boolean
    tensor ``(N,)`` that says which predictions were right, in the order of the stream (`heliostat.CAFA` has it). The
    table is printed in the place of Lightning's. ``adaptation.png`` and ``adaptation.csv`` (columns stream, method,
    samples, accuracy) go to the run's directory, the picture also to every logger that takes images.

    Args:
        filename: Name of the picture inside the run's directory; the numbers have the same name, ending in .csv.

    Raises:
        MisconfigurationException: In ``setup``, if the module has no ``stream_results``.
        ModuleNotFoundError: In ``setup``, if matplotlib is missing.
    """

    def __init__(self, filename: str = "adaptation.png") -> None:
        self.filename = filename

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before any time is spent that there will be nothing to report."""
        require("matplotlib", "AdaptationReport")
        if not hasattr(pl_module, "stream_results"):
            raise MisconfigurationException(
                f"AdaptationReport reads `stream_results` of the module, which {type(pl_module).__name__} does not "
                "have. Use heliostat.CAFA, set that attribute in your test steps, or remove the callback."
            )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print, draw and write."""
        path = run_directory(trainer) / self.filename
        results: Any = pl_module.stream_results
        if not trainer.is_global_zero or not results:
            return
        print(table(results), flush=True)
        trainer.test_loop.verbose = False  # Lightning's table, which repeats every figure once a loader
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        save_figure(trainer, figure(results), path)
        write_csv(results, path.with_suffix(".csv"))
        rank_zero_info(f"adaptation: {path}")


def _accuracies(results: Results) -> dict[str, dict[str, float]]:
    return {
        stream: {method: float(right.float().mean()) for method, right in by_method.items()}
        for stream, by_method in results.items()
    }


def table(results: Results) -> str:
    """Accuracy in percent of every method (columns) on every stream (rows), the best of a row marked by a star."""
    rows = _accuracies(results)
    methods = list(next(iter(rows.values())))
    mean = {method: sum(row[method] for row in rows.values()) / len(rows) for method in methods}
    if len(rows) > 1:
        rows["mean"] = mean
    lines = [["accuracy (%)", *(f"test/{method} " for method in methods)]]
    for name, row in rows.items():
        shown = {method: f"{100 * accuracy:.1f}" for method, accuracy in row.items()}
        best = f"{100 * max(row.values()):.1f}"
        is_marked = {method: len(methods) > 1 and text == best for method, text in shown.items()}
        lines.append([name, *(text + ("*" if is_marked[method] else " ") for method, text in shown.items())])
    if "none" in methods and len(methods) > 1:
        gains = {method: f"{100 * (mean[method] - mean['none']):+.1f} " for method in methods}
        lines.append(["gain over none", *({**gains, "none": ""}.values())])
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        f"{name:{first}}" + "".join(f"{cell:>{width + 2}}" for cell, width in zip(cells, others, strict=True)).rstrip()
        for name, *cells in lines
    )


def figure(results: Results) -> Any:
    """Accuracy up to each prediction as a `matplotlib.figure.Figure` outside pyplot: a panel a stream, and their mean.

    A panel's range is that of the methods that adapt, which lie close together; where ``"none"`` ends outside of it,
    the title says where.
    """
    figure_class = require("matplotlib.figure", "AdaptationReport").Figure
    panels = {
        stream.replace("_", " "): {method: _so_far(right) for method, right in by_method.items()}
        for stream, by_method in results.items()
    }
    if len(panels) > 1:
        panels[f"mean of {len(panels)} streams"] = _mean_curves(list(panels.values()))
    columns = len(panels) if len(panels) < 4 else math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    drawn = figure_class(figsize=(max(3.3 * columns, 5), 2.5 * rows + 0.5), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False)
    lines: dict[str, Any] = {}
    for place, (title, curves) in enumerate(panels.items()):
        panel = axes.flat[place]
        for method, accuracy in curves.items():
            start = len(accuracy) // 10  # of a few predictions, a share says little
            seen = range(start + 1, len(accuracy) + 1)
            width = 1.8 if method == list(curves)[-1] else 1.2
            (lines[method],) = panel.plot(
                seen, accuracy[start:].tolist(), color=_COLOURS.get(method), label=method, linewidth=width
            )
        _set_range(panel, curves)
        is_mean = place == len(results)
        panel.set_title(title, loc="left", fontsize="medium", fontweight="bold" if is_mean else "normal")
        panel.grid(alpha=0.3)
        if place >= len(panels) - columns:
            panel.set_xlabel("predictions so far")
        if place % columns == 0:
            panel.set_ylabel("accuracy so far (%)")
    for panel in axes.flat[len(panels) :]:
        panel.set_axis_off()
    drawn.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=len(lines), frameon=False)
    return drawn


def _so_far(right: Tensor) -> Tensor:
    """Accuracy in percent up to each prediction."""
    return 100 * right.double().cumsum(0) / torch.arange(1, len(right) + 1)


def _mean_curves(streams: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean over the streams, up to the end of the shortest."""
    length = min(len(accuracy) for curves in streams for accuracy in curves.values())
    return {method: torch.stack([curves[method][:length] for curves in streams]).mean(0) for method in streams[0]}


def _set_range(panel: Any, curves: dict[str, Tensor]) -> None:
    adapted = [accuracy[len(accuracy) // 10 :] for method, accuracy in curves.items() if method != "none"]
    if not adapted:
        return
    low, high = (float(f(torch.cat(adapted))) for f in (torch.min, torch.max))
    margin = max(0.08 * (high - low), 2 - (high - low) / 2, 0.5)
    panel.set_ylim(low - margin, high + margin)
    if "none" in curves and not low - margin < float(curves["none"][-1]) < high + margin:
        panel.set_title(f"none: {curves['none'][-1]:.1f}", loc="right", fontsize="medium", color=_COLOURS["none"])


def write_csv(results: Results, path: Path) -> None:
    """One line a stream and method."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["stream", "method", "samples", "accuracy"])
        for stream, accuracies in _accuracies(results).items():
            for method, accuracy in accuracies.items():
                writer.writerow([stream, method, len(results[stream][method]), f"{accuracy:.6f}"])
