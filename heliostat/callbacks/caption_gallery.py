"""Captions, and the pictures that an image-text model finds for them: one look that no metric replaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
    wrap,
)
from heliostat.components.retrieval import nearest_neighbors

_KEYS = {"pictures": ("pixel_values", "group", "index"), "texts": ("text", "text_embeddings", "group", "index")}
_LINE = 30  # columns of text that fit beside the pictures, and lines that fit into a row
_LINES = 6


class CaptionGallery(Gallery):
    """Draw captions of the validation set beside the pictures of it that are nearest, right and wrong ones marked.

    Works with any module that has ``encode_image(pixel_values)`` and ``encode_text(text_embeddings)``, which give
    embeddings in one space, and with evaluation loaders as `heliostat.ImageTextDataModule` has them: one of pictures,
    whose batches are dicts with ``pixel_values`` ``(B, C, H, W)``, ``group`` ``(B,)`` and ``index`` ``(B,)``, and one
    of texts, with ``text``, ``text_embeddings``, ``group`` and ``index``. They are told apart by these keys; loaders
    whose batches have neither ``pixel_values`` nor ``group``, such as class prompts, are passed over. A picture is
    right if its group is the caption's. Without pictures, as where texts alone are trained on, it warns and draws
    nothing.

    Draws at the end of fit, after the callbacks before it in the list (behind `ExportBest` it shows the best weights),
    and at the end of ``trainer.validate`` and, of the test set, of ``trainer.test``. The picture goes to the run's
    directory and to every logger that takes images. Both loaders are passed through twice, for embeddings and for what
    is shown, and never held.

    Half of the captions are drawn at random from all of them, half at random from those whose first picture is wrong:
    the first half shows how good it is, the second what goes wrong. The title says how frequent that is: text-to-image
    Recall@1. Captions of which no picture is in the set are not drawn, and do not count. Each picture is scaled to its
    own darkest and brightest value, so that any normalisation will do. Captions are written in matplotlib's own font;
    for scripts that it lacks, name one in a ``matplotlibrc`` file (``font.family``).

    Args:
        num_queries: Captions to look up.
        num_neighbors: Pictures for each.
        filename: Name of the picture inside the run's directory.
        seed: Seed of the draw.

    Raises:
        ModuleNotFoundError: In ``setup``, if matplotlib is missing.
        MisconfigurationException: If the module lacks one of the two methods, if there is no validation, no loader of
            texts, a second one of texts or pictures, or if a key is missing; before training.
    """

    def __init__(
        self, num_queries: int = 8, num_neighbors: int = 8, filename: str = "captions.png", seed: int = 0
    ) -> None:
        super().__init__(num_queries, num_neighbors, filename, seed)
        self._keys: dict[int, list[str]] = {}  # of the batches of each loader

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before training, not after it, that the figure cannot be drawn."""
        super().setup(trainer, pl_module, stage)
        for method in ("encode_image", "encode_text"):
            if not callable(getattr(pl_module, method, None)):
                raise MisconfigurationException(
                    "CaptionGallery needs a module with encode_image(pixel_values) and encode_text(text_embeddings), "
                    f"but {type(pl_module).__name__} has no {method}. Add it, or remove the callback."
                )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what loaders there were."""
        self._keys = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what loaders there were."""
        self._keys = {}

    def _check(self, batch: Any, dataloader_idx: int) -> None:
        if not isinstance(batch, Mapping):
            raise MisconfigurationException(_refusal(f"a batch of loader {dataloader_idx} {describe(batch)}"))
        self._keys[dataloader_idx] = list(batch)
        kind = _kind(list(batch))
        if kind is None:
            return
        if missing := [key for key in _KEYS[kind] if key not in batch]:
            problem = f"a batch of loader {dataloader_idx} lacks {', '.join(missing)}: it {describe(batch)}"
            raise MisconfigurationException(_refusal(problem))
        if others := [i for i in self._loaders(kind) if i != dataloader_idx]:
            problem = f"the loaders {others[0]} and {dataloader_idx} are both of {kind}"
            raise MisconfigurationException(_refusal(problem))

    def _loaders(self, kind: str) -> list[int]:
        return [i for i, keys in self._keys.items() if _kind(keys) == kind]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a validation, and be it the sanity check, without captions."""
        if not self._loaders("texts"):
            found = "; ".join(f"loader {i}: {', '.join(map(str, keys))}" for i, keys in self._keys.items())
            raise MisconfigurationException(_refusal(f"there is none of texts; the keys are: {found}"))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a test without captions."""
        self.on_validation_epoch_end(trainer, pl_module)

    def _find(
        self, trainer: Trainer, pl_module: LightningModule, stage: str, loaders: list[Limited]
    ) -> tuple[Any, ...] | str:
        if not self._keys:
            return "training ended before the first validation"
        if not self._loaders("pictures"):
            return f"the {stage} set has texts but no pictures"
        module: Any = pl_module
        of_texts, of_pictures = (loaders[self._loaders(kind)[0]] for kind in ("texts", "pictures"))
        with ready_to_embed(trainer, module):
            text_index, text_groups, texts = embed(
                trainer, of_texts, lambda batch: module.encode_text(batch["text_embeddings"]), "group"
            )
            picture_index, picture_groups, pictures = embed(
                trainer, of_pictures, lambda batch: module.encode_image(batch["pixel_values"]), "group"
            )
        if not (texts.isfinite().all() and pictures.isfinite().all()):
            return "there are embeddings that are not finite"
        has_picture = torch.isin(text_groups, picture_groups)
        if not has_picture.any():
            return f"no caption of the {stage} set has the group of a picture in it"
        cosines, neighbors = nearest_neighbors(texts, pictures, k=min(self.num_neighbors, len(pictures)))
        lookups, title = draw_queries(
            cosines,
            neighbors,
            has_picture,
            picture_groups[neighbors[:, 0]] == text_groups,
            count=self.num_queries,
            seed=self.seed,
            title=f"text-to-image Recall@1 of all {{}} {stage} captions",
        )
        captions = collect(of_texts, "text", text_index, {one.query for one in lookups})
        shown = collect(of_pictures, "pixel_values", picture_index, {row for one in lookups for row in one.neighbors})
        return lookups, (text_groups, picture_groups), captions, shown, title

    def _figure(
        self,
        lookups: list[LookUp],
        groups: tuple[Tensor, Tensor],
        captions: dict[int, str],
        pictures: dict[int, Tensor],
        title: str,
    ) -> Any:
        def show_query(axes: Any, row: int, bottom: float) -> None:
            # A dollar sign does not begin a formula, and what is too wide in spite of all goes behind the pictures.
            style = {"va": "center", "fontsize": 8, "parse_math": False, "zorder": -1}
            axes.text(0.05, bottom + 0.45, wrap(captions[row], _LINE, _LINES), **style)

        return gallery_figure(lookups, groups, pictures, title, neighbors_from=2.5, show_query=show_query)


def _kind(keys: list[str]) -> str | None:
    if "pixel_values" in keys:
        return "pictures"
    return "texts" if "group" in keys else None


def _refusal(problem: str) -> str:
    return (
        "CaptionGallery needs an evaluation loader of pictures, whose batches are dicts with pixel_values, group and "
        f"index, and one of texts, with text, text_embeddings, group and index, but {problem}. Change the data module, "
        "or remove the callback."
    )
