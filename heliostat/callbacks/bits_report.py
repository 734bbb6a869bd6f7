"""What a quantised encoder costs in accuracy, by its bits: a table, a picture, and a file of numbers."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from heliostat._extras import require
from heliostat.callbacks._figures import run_directory, save_figure

_COLUMNS = {"average_bits": ".3f", "megabytes": ".1f", "spearman": ".4f", "cosine": ".4f"}


class BitsReport(Callback):
    """Print bits, size and rank correlation of every variant of an encoder, and draw what it keeps over bits.

    Works with any module that has ``results`` when training ends: a mapping from variant to an object with
    ``average_bits``, ``megabytes``, ``spearman`` and ``cosine``, the float32 encoder first; and ``chosen``, the name of
    the variant taken (`heliostat.TwoBitEncoder` has both). ``two_bit.png`` and ``two_bit.csv`` go to the run's
    directory, the picture also to every logger that takes images.

    Args:
        filename: Name of the picture inside the run's directory; the numbers have the same name, ending in .csv.

    Raises:
        MisconfigurationException: In ``setup``, if the module has no ``results``.
        ModuleNotFoundError: In ``setup``, if matplotlib is missing.
    """

    def __init__(self, filename: str = "two_bit.png") -> None:
        self.filename = filename

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before any time is spent that there will be nothing to report."""
        require("matplotlib", "BitsReport")
        if not hasattr(pl_module, "results"):
            raise MisconfigurationException(
                f"BitsReport reads `results` of the module, which {type(pl_module).__name__} does not have. Use "
                "heliostat.TwoBitEncoder, or remove the callback."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print, draw and write."""
        path = run_directory(trainer) / self.filename
        results: Any = pl_module.results
        if not trainer.is_global_zero or not results or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        chosen: Any = getattr(pl_module, "chosen", None)
        print(table(results, chosen), flush=True)
        save_figure(trainer, figure(results, chosen), path)
        write_csv(results, path.with_suffix(".csv"))
        rank_zero_info(f"bits: {path}")


def table(results: Mapping[str, Any], chosen: str | None = None) -> str:
    """A line a variant, with what it loses against the first; the one taken is marked."""
    (first, *_) = results.values()
    lines = [["weights", "bits", "MB", "spearman", "drop", "cosine"]]
    for name, result in results.items():
        bits, megabytes, spearman, cosine = (format(getattr(result, key), form) for key, form in _COLUMNS.items())
        drop = "" if result is first else format(first.spearman - result.spearman, ".4f")
        mark = " <- taken" if name == chosen else ""
        lines.append([name, bits, megabytes, spearman, drop, cosine + mark])
    widths = [max(len(line[place]) for line in lines) for place in range(5)]
    return "\n".join(
        f"{line[0]:{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(line[1:5], widths[1:], strict=True))
        + f"  {line[5]}"
        for line in lines
    )


def figure(results: Mapping[str, Any], chosen: str | None = None) -> Any:
    """Spearman and cosine over average bits as a `matplotlib.figure.Figure` outside pyplot; float32 is a line."""
    drawn = require("matplotlib.figure", "BitsReport").Figure(figsize=(10, 4), layout="constrained")
    (first, *names) = results
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(", ")[2], []).append(name)
    titles = {"spearman": "Spearman of cosine and score", "cosine": "cosine with the float32 embedding"}
    for axes, (key, title) in zip(drawn.subplots(1, 2), titles.items(), strict=True):
        axes.axhline(getattr(results[first], key), color="#7f7f7f", linestyle=":", label=first)
        for kind, members in kinds.items():
            points = [(results[name].average_bits, getattr(results[name], key)) for name in members]
            axes.plot(*zip(*points, strict=True), marker="o", linestyle="-" if len(points) > 1 else "none", label=kind)
            for name, point in zip(members, points, strict=True) if kind != "tuned" else ():
                label = name.removesuffix(f", {kind}") + (" (taken)" if name == chosen else "")
                axes.annotate(label, point, xytext=(4, 4), textcoords="offset points", fontsize="small")
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set_xlabel("average bits of a quantised weight")
        axes.margins(x=0.15)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    return drawn


def write_csv(results: Mapping[str, Any], path: Path) -> None:
    """One line a variant."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["weights", *_COLUMNS])
        for name, result in results.items():
            writer.writerow([name, *(f"{getattr(result, key):.6f}" for key in _COLUMNS)])
