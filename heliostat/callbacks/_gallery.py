"""What galleries share: when they are drawn, an embedded set of all processes, and the picture itself."""

from __future__ import annotations

import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from heliostat._extras import require
from heliostat.callbacks._figures import run_directory, save_figure
from heliostat.components.distributed import default_group

_ROW = 1.25  # how far rows are apart; a picture with its margin has width 1
_SIGNS = {True: "\N{CHECK MARK}", False: "\N{BALLOT X}"}
_COLOURS = {True: "#1a9850", False: "#d73027"}
_MISSING_GLYPH = r"Glyph \d+ .*missing from|Matplotlib currently does not support"


class LookUp(NamedTuple):
    """A query and what was found; rows of their sets in the order of the index."""

    kind: str
    query: int
    neighbors: list[int]
    cosines: list[float]


class Limited:
    """The first batches of a loader, as often as they are asked for."""

    def __init__(self, loader: Any, limit: float, dataloader_idx: int) -> None:
        self.loader, self.limit = loader, None if limit == float("inf") else int(limit)
        self.dataloader_idx = dataloader_idx

    def __iter__(self) -> Iterator[Any]:
        return islice(self.loader, self.limit)


class Gallery(Callback):
    """Draws at the end of fit, validate and test; refuses what it cannot draw from before training."""

    def __init__(self, num_queries: int, num_neighbors: int, filename: str, seed: int) -> None:
        if num_queries < 1 or num_neighbors < 1:
            raise ValueError(f"num_queries and num_neighbors must be >= 1, got {num_queries} and {num_neighbors}")
        self.num_queries, self.num_neighbors, self.filename, self.seed = num_queries, num_neighbors, filename, seed

    def _check(self, batch: Any, dataloader_idx: int) -> None:
        """Refuse an evaluation batch that nothing can be drawn from."""
        raise NotImplementedError

    def _find(
        self, trainer: Trainer, pl_module: LightningModule, stage: str, loaders: list[Limited]
    ) -> tuple[Any, ...] | str:
        """What `_figure` draws, on all processes, or why there is nothing to draw."""
        raise NotImplementedError

    def _figure(self, *found: Any) -> Any:
        """A `matplotlib.figure.Figure`."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before training, not after it, that the figure cannot be drawn."""
        require("matplotlib", type(self).__name__)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a training without validation set."""
        if not trainer.enable_validation:
            raise MisconfigurationException(
                f"{type(self).__name__} draws pictures of the validation set, and this training has none. Give the "
                "data a validation loader and the module a validation_step, or remove the callback."
            )

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Refuse batches that nothing can be drawn from."""
        self._check(batch, dataloader_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Refuse batches that nothing can be drawn from."""
        self._check(batch, dataloader_idx)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the validation set."""
        self._draw(trainer, pl_module, "validation", trainer.val_dataloaders, trainer.num_val_batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the validation set, if this is no validation within a training."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._draw(trainer, pl_module, "validation", trainer.val_dataloaders, trainer.num_val_batches)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the test set."""
        self._draw(trainer, pl_module, "test", trainer.test_dataloaders, trainer.num_test_batches)

    def _draw(self, trainer: Trainer, pl_module: LightningModule, stage: str, loaders: Any, limits: Any) -> None:
        path = run_directory(trainer) / self.filename
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        found: tuple[Any, ...] | str = "training ended before the first validation"
        if loaders is not None:
            loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
            loaders, limits = (x if isinstance(x, (list, tuple)) else [x] for x in (loaders, limits))
            numbered = enumerate(zip(loaders, limits, strict=True))
            found = self._find(trainer, pl_module, stage, [Limited(*pair, i) for i, pair in numbered])
        if isinstance(found, str):
            rank_zero_warn(f"{type(self).__name__} has drawn nothing: {found}")
        elif trainer.is_global_zero:
            with one_warning_of_missing_glyphs():
                save_figure(trainer, self._figure(*found), path)
            rank_zero_info(f"gallery: {path}")


def describe(batch: Any) -> str:
    """What a batch is, to end a message with."""
    return (
        f"has the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}"
    )


@contextmanager
def ready_to_embed(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """The module in evaluation mode and on this process's device, afterwards as it was."""
    modes = [(part, part.training) for part in module.modules()]
    home = module.device
    module.eval()
    module.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU when a training ends
    try:
        yield
    finally:
        module.to(home)
        for part, training in modes:
            part.training = training


@torch.no_grad()
def embed(
    trainer: Trainer, loader: Limited, encode: Callable[[Mapping[str, Any]], Tensor], column: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Index, ``column`` and embeddings of the set of all processes, sorted by index, each once."""
    parts = []
    for given in loader:
        converted = trainer.precision_plugin.convert_input(given)
        batch = trainer.strategy.batch_to_device(converted, dataloader_idx=loader.dataloader_idx)
        with trainer.precision_plugin.val_step_context():
            embeddings = encode(batch)
        parts.append((batch["index"].cpu(), batch[column].cpu(), embeddings.float().cpu()))
    index, values, embeddings = (torch.cat(tensors) for tensors in zip(*_all_gather(parts), strict=True))
    # A distributed sampler repeats rows to give every process as many.
    order = index.argsort(stable=True)
    order = order[torch.cat([torch.ones(1, dtype=torch.bool), index[order].diff() != 0])]
    return index[order], values[order], embeddings[order]


def draw_queries(
    cosines: Tensor,
    neighbors: Tensor,
    has_answer: Tensor,
    first_right: Tensor,
    *,
    count: int,
    seed: int,
    title: str,
) -> tuple[list[LookUp], str]:
    """Half of the queries from all that have a right answer, half from those whose first neighbour is wrong.

    Args:
        cosines: Of each row to its neighbours, ``(N, k)``.
        neighbors: Their rows, ``(N, k)``, the nearest first.
        has_answer: Whether there is a right neighbour at all, ``(N,)``; at least one has.
        first_right: Whether the first neighbour is right, ``(N,)``.
        count: Queries to draw.
        seed: Of the draw.
        title: With ``{}`` for the number of rows that have an answer.

    Returns:
        The queries, and the title with Recall@1 and, in words, how they were drawn.
    """
    wrong = has_answer & ~first_right
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(wrong), generator=generator)
    num_wrong = min(count // 2, int(wrong.sum()))
    at_random = order[has_answer[order]][: count - num_wrong]
    wrong_left = wrong.clone()
    wrong_left[at_random] = False
    from_wrong = order[wrong_left[order]][:num_wrong]
    kinds = [("random", int(row)) for row in at_random] + [("1st wrong", int(row)) for row in from_wrong]
    lookups = [LookUp(kind, row, neighbors[row].tolist(), cosines[row].tolist()) for kind, row in kinds]
    total = int(has_answer.sum())
    title = f"{title.format(f'{total:,}')}: {1 - int(wrong.sum()) / total:.3f}\n"
    title += f"first {len(at_random)} queries: drawn from all of them"
    if len(from_wrong):
        title += f"; last {len(from_wrong)}: from the {int(wrong.sum()):,} whose first neighbour is wrong"
    return lookups, title


def collect(loader: Limited, key: str, index: Tensor, rows: set[int]) -> dict[int, Any]:
    """What batches hold under ``key``, for some rows; a second pass over the set, so that it never has to be held."""
    wanted = {int(index[row]): row for row in rows}
    found: dict[int, Any] = {}
    for batch in loader:
        for position, value in zip(batch["index"].tolist(), batch[key], strict=True):
            if position in wanted:
                # A copy, as a view would hold the whole batch.
                found[wanted[position]] = value.float().cpu().clone() if isinstance(value, Tensor) else value
        if len(found) == len(wanted):
            break
    return dict(_all_gather(list(found.items())))


def _all_gather(items: list[Any]) -> list[Any]:
    """The items of all processes."""
    group = default_group()
    if group is None:
        return items
    gathered: list[list[Any]] = [[] for _ in range(group.size())]
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def gallery_figure(
    lookups: list[LookUp],
    groups: tuple[Tensor, Tensor],
    pictures: dict[int, Tensor],
    title: str,
    *,
    neighbors_from: float,
    show_query: Callable[[Any, int, float], None],
) -> Any:
    """A `matplotlib.figure.Figure`, one row a query: the query, then its neighbours from the nearest on.

    Args:
        lookups: The rows.
        groups: Of all queries, and of all that can be neighbours; a neighbour is right if they are equal.
        pictures: Those to show, by row.
        title: Above all.
        neighbors_from: How far from the left the neighbours begin.
        show_query: Draws a query, given axes, its row and the height of its lower edge.
    """
    figure_class = require("matplotlib.figure", "A gallery").Figure
    width, height = neighbors_from + len(lookups[0].neighbors), _ROW * len(lookups)
    figure = figure_class(figsize=(0.9 * width, 0.9 * height))
    axes = figure.add_axes((0, 0, 1, 1))  # of all pictures: axes for each would take seconds to lay out
    axes.set_title(title, fontsize=10)
    query_groups, neighbor_groups = groups
    for line, one in enumerate(lookups):
        bottom = -_ROW * (line + 1)
        show_query(axes, one.query, bottom)
        axes.text(-0.08, bottom + 0.45, one.kind, rotation=90, ha="center", va="center", fontsize=8)
        for place, (neighbor, cosine) in enumerate(zip(one.neighbors, one.cosines, strict=True)):
            left, right = neighbors_from + place, bool(neighbor_groups[neighbor] == query_groups[one.query])
            show_picture(axes, pictures[neighbor], left, bottom, _COLOURS[right], linewidth=2.5)
            # A sign too, as not everyone tells red from green; in the font that has it and comes with matplotlib.
            text = f"{_SIGNS[right]} {cosine:.2f}"
            style = {"fontsize": 8, "color": _COLOURS[right], "family": "DejaVu Sans"}
            axes.text(left + 0.45, bottom + 0.95, text, ha="center", va="bottom", **style)
    axes.set(xlim=(-0.2, width), ylim=(-height - 0.05, 0), aspect="equal")
    axes.axis("off")
    return figure


def show_picture(
    axes: Any,
    picture: Tensor,
    left: float,
    bottom: float,
    frame: str,
    linewidth: float,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw a picture ``(C, H, W)`` into a square of side 0.9; black and white are ``limits``, or its own extremes."""
    low, high = limits or (picture.min(), picture.max())
    picture = ((picture - low) / max(high - low, 1e-12)).clamp(0, 1)
    rows, columns = picture.shape[1:]
    height, width = (0.9 * side / max(rows, columns) for side in (rows, columns))
    left, bottom = left + (0.9 - width) / 2, bottom + (0.9 - height) / 2
    pixels = picture.permute(1, 2, 0) if len(picture) == 3 else picture.mean(0)
    extent = (left, left + width, bottom, bottom + height)
    axes.imshow(pixels.numpy(), extent=extent, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    rectangle = require("matplotlib.patches", "A gallery").Rectangle
    axes.add_patch(rectangle((left, bottom), width, height, fill=False, edgecolor=frame, linewidth=linewidth))


def wrap(caption: str, columns: int, lines: int) -> str:
    """The lines of a caption; what does not fit is left out, with an ellipsis."""
    caption = caption.encode("utf-8", "replace").decode().replace("\0", "")  # half a surrogate pair cannot be drawn
    # Chinese, Japanese and Korean characters are two columns wide, of which a NUL stands for the second.
    wide = "".join(c + "\0" if unicodedata.east_asian_width(c) in "WF" else c for c in caption)
    return textwrap.fill(wide, columns, max_lines=lines, placeholder=" …").replace("\0", "")


@contextmanager
def one_warning_of_missing_glyphs() -> Iterator[None]:
    """Say once what matplotlib says of every character that its fonts lack, every time it draws one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=_MISSING_GLYPH)
        yield
    missing = {str(one.message) for one in caught if str(one.message).startswith("Glyph")}
    for one in caught:
        if not str(one.message).startswith(("Glyph", "Matplotlib currently")):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if missing:
        rank_zero_warn(
            f"{len(missing)} characters in the gallery are not in matplotlib's font, and are drawn as boxes. Name a "
            "font that has them in a matplotlibrc file (font.family: DejaVu Sans, ...)"
        )
