"""Pictures, and what an embedding takes for their nearest neighbours: one look that no metric replaces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from heliostat.components.retrieval import nearest_neighbors

_KEYS = ("pixel_values", "labels", "index")
_NEIGHBORS_FROM = 1.2  # where the neighbours begin, and how far rows are apart; a picture with its margin has width 1
_ROW = 1.25
_SIGNS = {True: "\N{CHECK MARK}", False: "\N{BALLOT X}"}
_COLOURS = {True: "#1a9850", False: "#d73027"}


class RetrievalGallery(Callback):
    """Draw pictures of the validation set beside their nearest neighbours in it, right and wrong ones marked.

    Works with any module whose ``forward(pixel_values)`` gives embeddings, and with one validation loader whose batches
    are dicts with ``pixel_values`` ``(B, C, H, W)``, ``labels`` ``(B,)`` and ``index`` ``(B,)``, the rows' positions in
    the set. Draws at the end of fit, after the callbacks before it in the list (behind `ExportBest` it shows the best
    weights), and at the end of ``trainer.validate`` and, of the test set, of ``trainer.test``. The picture goes to the
    run's directory and to every logger that takes images. The set is passed through twice, for embeddings and for the
    pictures that are shown, and never held.

    Half of the queries are drawn at random from all pictures, half at random from those whose first neighbour is wrong:
    the first half shows how good it is, the second what goes wrong. The title says how frequent that is. Pictures that
    are the only one of their class are no queries. Each picture is scaled to its own darkest and brightest value, so
    that any normalisation will do.

    Args:
        num_queries: Pictures to look up.
        num_neighbors: Neighbours of each.
        filename: Name of the picture inside the run's directory.
        seed: Seed of the draw.

    Raises:
        ModuleNotFoundError: In ``setup``, if matplotlib is missing.
        MisconfigurationException: If there is no validation, a second loader, or a key is missing; before training.
    """

    def __init__(
        self, num_queries: int = 8, num_neighbors: int = 8, filename: str = "gallery.png", seed: int = 0
    ) -> None:
        if num_queries < 1 or num_neighbors < 1:
            raise ValueError(f"num_queries and num_neighbors must be >= 1, got {num_queries} and {num_neighbors}")
        self.num_queries, self.num_neighbors, self.filename, self.seed = num_queries, num_neighbors, filename, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before training, not after it, that the figure cannot be drawn."""
        require("matplotlib", "RetrievalGallery")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a training without validation set."""
        if not trainer.enable_validation:
            raise MisconfigurationException(
                "RetrievalGallery draws pictures of the validation set, and this training has none. Give the data a "
                "validation loader and the module a validation_step, or remove the callback."
            )

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Refuse batches that nothing can be drawn from."""
        missing = [key for key in _KEYS if not isinstance(batch, Mapping) or key not in batch]
        if missing or dataloader_idx:
            is_dict = isinstance(batch, Mapping)
            given = f"has the keys {', '.join(map(str, batch))}" if is_dict else f"is a {type(batch).__name__}"
            problem = f"lacks {', '.join(missing)}: it {given}" if missing else "comes from a second loader"
            raise MisconfigurationException(
                "RetrievalGallery needs one evaluation loader whose batches are dicts with pixel_values, labels and "
                f"index, but a batch {problem}. Change the data module, or remove the callback."
            )

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Refuse batches that nothing can be drawn from."""
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

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
        loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
        if loader is None:
            rank_zero_warn("RetrievalGallery has drawn nothing: training ended before the first validation")
            return
        limit = limits[0] if isinstance(limits, (list, tuple)) else limits
        loader = _Limited(loader, None if limit == float("inf") else int(limit))
        index, labels, embeddings = _embed(trainer, pl_module, loader)
        if not embeddings.isfinite().all():
            rank_zero_warn("RetrievalGallery has drawn nothing: there are embeddings that are not finite")
            return
        lookups, title = self._look_up(labels, embeddings, stage)
        if not lookups:
            rank_zero_warn(f"RetrievalGallery has drawn nothing: no two pictures of the {stage} set share a class")
            return
        shown = {int(index[row]): row for one in lookups for row in (one.query, *one.neighbors)}
        pictures = _collect(loader, shown)
        if trainer.is_global_zero:
            save_figure(trainer, self._figure(lookups, labels, pictures, title), path)
            rank_zero_info(f"gallery: {path}")

    def _look_up(self, labels: Tensor, embeddings: Tensor, stage: str) -> tuple[list[_LookUp], str]:
        """Draw the queries, and say in words how."""
        _, members, counts = labels.unique(return_inverse=True, return_counts=True)
        has_partner = counts[members] > 1
        if not has_partner.any():
            return [], ""
        cosines, neighbors = nearest_neighbors(embeddings, k=min(self.num_neighbors, len(labels) - 1))
        wrong = has_partner & (labels[neighbors[:, 0]] != labels)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(labels), generator=generator)
        num_wrong = min(self.num_queries // 2, int(wrong.sum()))
        at_random = order[has_partner[order]][: self.num_queries - num_wrong]
        wrong_left = wrong.clone()
        wrong_left[at_random] = False
        from_wrong = order[wrong_left[order]][:num_wrong]
        kinds = [("random", int(row)) for row in at_random] + [("1st wrong", int(row)) for row in from_wrong]
        lookups = [_LookUp(kind, row, neighbors[row].tolist(), cosines[row].tolist()) for kind, row in kinds]
        total = int(has_partner.sum())
        title = f"Recall@1 of all {total:,} {stage} pictures: {1 - int(wrong.sum()) / total:.3f}\n"
        title += f"first {len(at_random)} queries: drawn from all of them"
        if len(from_wrong):
            title += f"; last {len(from_wrong)}: from the {int(wrong.sum()):,} whose first neighbour is wrong"
        return lookups, title

    def _figure(self, lookups: list[_LookUp], labels: Tensor, pictures: dict[int, Tensor], title: str) -> Any:
        """A `matplotlib.figure.Figure`, one row a query: the query, then its neighbours from the nearest on."""
        figure_class = require("matplotlib.figure", "RetrievalGallery").Figure
        width, height = _NEIGHBORS_FROM + len(lookups[0].neighbors), _ROW * len(lookups)
        figure = figure_class(figsize=(0.9 * width, 0.9 * height))
        axes = figure.add_axes((0, 0, 1, 1))  # of all pictures: axes for each would take seconds to lay out
        axes.set_title(title, fontsize=10)
        for line, one in enumerate(lookups):
            bottom = -_ROW * (line + 1)
            _show(axes, pictures[one.query], 0, bottom, "grey", linewidth=0.5)
            axes.text(-0.08, bottom + 0.45, one.kind, rotation=90, ha="center", va="center", fontsize=8)
            axes.text(0.45, bottom + 0.95, "query", ha="center", va="bottom", fontsize=8)
            for place, (neighbor, cosine) in enumerate(zip(one.neighbors, one.cosines, strict=True)):
                left, right = _NEIGHBORS_FROM + place, bool(labels[neighbor] == labels[one.query])
                _show(axes, pictures[neighbor], left, bottom, _COLOURS[right], linewidth=2.5)
                # A sign too, as not everyone tells red from green; in the font that has it and comes with matplotlib.
                text = f"{_SIGNS[right]} {cosine:.2f}"
                style = {"fontsize": 8, "color": _COLOURS[right], "family": "DejaVu Sans"}
                axes.text(left + 0.45, bottom + 0.95, text, ha="center", va="bottom", **style)
        axes.set(xlim=(-0.2, width), ylim=(-height - 0.05, 0), aspect="equal")
        axes.axis("off")
        return figure


class _LookUp(NamedTuple):
    kind: str
    query: int  # rows of the set in the order of its index
    neighbors: list[int]
    cosines: list[float]


class _Limited:
    """The first batches of a loader, as often as they are asked for."""

    def __init__(self, loader: Any, limit: int | None) -> None:
        self.loader, self.limit = loader, limit

    def __iter__(self) -> Iterator[Any]:
        return islice(self.loader, self.limit)


@torch.no_grad()
def _embed(trainer: Trainer, module: LightningModule, loader: _Limited) -> tuple[Tensor, Tensor, Tensor]:
    """Index, labels and embeddings of the set of all processes, sorted by index, each once."""
    modes = [(part, part.training) for part in module.modules()]
    home, device = module.device, trainer.strategy.root_device
    module.eval()
    module.to(device)  # Lightning has moved it to the CPU when a training ends
    parts = []
    try:
        for given in loader:
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(given))
            with trainer.precision_plugin.val_step_context():
                embeddings = module(batch["pixel_values"])
            parts.append((batch["index"].cpu(), batch["labels"].cpu(), embeddings.float().cpu()))
    finally:
        module.to(home)
        for part, training in modes:
            part.training = training
    index, labels, embeddings = (torch.cat(column) for column in zip(*_all_gather(parts), strict=True))
    # A distributed sampler repeats rows to give every process as many.
    order = index.argsort(stable=True)
    order = order[torch.cat([torch.ones(1, dtype=torch.bool), index[order].diff() != 0])]
    return index[order], labels[order], embeddings[order]


def _collect(loader: _Limited, wanted: dict[int, int]) -> dict[int, Tensor]:
    """The pictures to show, by row; a second pass over the set, so that it never has to be held."""
    found: dict[int, Tensor] = {}
    for batch in loader:
        for index, picture in zip(batch["index"].tolist(), batch["pixel_values"], strict=True):
            if index in wanted:
                found[wanted[index]] = picture.float().cpu()
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


def _show(axes: Any, picture: Tensor, left: float, bottom: float, frame: str, linewidth: float) -> None:
    """Draw a picture ``(C, H, W)``, from its own darkest to its own brightest value, into a square of side 0.9."""
    picture = picture - picture.min()
    picture = picture / picture.max().clamp_min(1e-12)
    rows, columns = picture.shape[1:]
    height, width = (0.9 * side / max(rows, columns) for side in (rows, columns))
    left, bottom = left + (0.9 - width) / 2, bottom + (0.9 - height) / 2
    pixels = picture.permute(1, 2, 0) if len(picture) == 3 else picture.mean(0)
    extent = (left, left + width, bottom, bottom + height)
    axes.imshow(pixels.numpy(), extent=extent, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    rectangle = require("matplotlib.patches", "RetrievalGallery").Rectangle
    axes.add_patch(rectangle((left, bottom), width, height, fill=False, edgecolor=frame, linewidth=linewidth))
