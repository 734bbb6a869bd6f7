"""Pictures, and what an embedding takes for their nearest neighbours: one look that no metric replaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from heliostat.callbacks._gallery import (
    Gallery,
    Limited,
    LookUp,
    collect,
    describe,
    draw_queries,
    embed,
    gallery_figure,
    ready_to_embed,
    show_picture,
)
from heliostat.components.retrieval import nearest_neighbors

_KEYS = ("pixel_values", "labels", "index")


class RetrievalGallery(Gallery):
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
        super().__init__(num_queries, num_neighbors, filename, seed)

    def _check(self, batch: Any, dataloader_idx: int) -> None:
        missing = [key for key in _KEYS if not isinstance(batch, Mapping) or key not in batch]
        if missing or dataloader_idx:
            problem = f"lacks {', '.join(missing)}: it {describe(batch)}" if missing else "comes from a second loader"
            raise MisconfigurationException(
                "RetrievalGallery needs one evaluation loader whose batches are dicts with pixel_values, labels and "
                f"index, but a batch {problem}. Change the data module, or remove the callback."
            )

    def _find(
        self, trainer: Trainer, pl_module: LightningModule, stage: str, loaders: list[Limited]
    ) -> tuple[Any, ...] | str:
        with ready_to_embed(trainer, pl_module):
            index, labels, embeddings = embed(
                trainer, loaders[0], lambda batch: pl_module(batch["pixel_values"]), "labels"
            )
        if not embeddings.isfinite().all():
            return "there are embeddings that are not finite"
        _, members, counts = labels.unique(return_inverse=True, return_counts=True)
        has_partner = counts[members] > 1
        if not has_partner.any():
            return f"no two pictures of the {stage} set share a class"
        cosines, neighbors = nearest_neighbors(embeddings, k=min(self.num_neighbors, len(labels) - 1))
        lookups, title = draw_queries(
            cosines,
            neighbors,
            has_partner,
            labels[neighbors[:, 0]] == labels,
            count=self.num_queries,
            seed=self.seed,
            title=f"Recall@1 of all {{}} {stage} pictures",
        )
        shown = {row for one in lookups for row in (one.query, *one.neighbors)}
        return lookups, labels, collect(loaders[0], "pixel_values", index, shown), title

    def _figure(self, lookups: list[LookUp], labels: Tensor, pictures: dict[int, Tensor], title: str) -> Any:
        def show_query(axes: Any, row: int, bottom: float) -> None:
            show_picture(axes, pictures[row], 0, bottom, "grey", linewidth=0.5)
            axes.text(0.45, bottom + 0.95, "query", ha="center", va="bottom", fontsize=8)

        return gallery_figure(lookups, (labels, labels), pictures, title, neighbors_from=1.2, show_query=show_query)
