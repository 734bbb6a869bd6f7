"""Deep metric learning: Multi-Similarity (CVPR 2019, arXiv 1904.06627), or any loss of embeddings and labels.

Trains a network so that pictures of one class lie close, of classes never seen in training as well: retrieval,
re-identification, near-duplicate search. The mathematics is in `heliostat.components.multi_similarity`; UNPG (arXiv
2203.11593) is this module with `heliostat.components.UNPGHead` as its loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from heliostat._extras import require
from heliostat.components.multi_similarity import MultiSimilarityLoss
from heliostat.components.retrieval import retrieval_metrics
from heliostat.lit_models._evaluation import gather_once
from heliostat.lit_models._hparams import save_plain_hyperparameters
from heliostat.lit_models._optimization import Schedule, configure_optimizers
from heliostat.towers import has_weights, timm_network


class MetricLearning(LightningModule):
    """An embedding network, trained with a loss of embeddings and labels, and measured by retrieval.

    Batches hold ``pixel_values`` ``(B, C, H, W)``, ``labels`` ``(B,)`` and, for evaluation, ``index`` ``(B,)`` (see
    `heliostat.LabelledImageDataModule`). Logged are ``train/loss``, the loss's ``diagnostics`` if it has that attribute
    (a dict of scalars), and for ``val`` and ``test`` ``recall_at_1`` and so on and ``map_at_r``: every picture of the
    set is looked up among all others of it.

    ``forward`` gives unit-length embeddings. The loss gets them as the network gives them, before that: the losses here
    normalise by themselves, so that those which use the length can.

    Args:
        network: Maps pictures to embeddings ``(B, d)``: a module; or a timm name, such as ``"resnet50"``,
            ``"local-dir:PATH"`` (as `save_pretrained` writes it) or ``"hf-hub:ID"``, the last two with their weights.
        loss: Called as ``loss(embeddings, labels)``, with a scalar as result: of `heliostat.components`, of
            pytorch-metric-learning, or your own. Its parameters are trained and its state is saved with the module's.
            Default: `MultiSimilarityLoss`.
        embedding_dim: Dimension d, for a network given by name; 512 in the paper. Left out, ``local-dir:`` and
            ``hf-hub:`` keep their last layer; given, that layer is new.
        pretrained: Load timm's pretrained weights, which needs a network or a filled cache the first time.
        in_channels: Channels of the pictures, for a network given by name; default: 3, or what a directory says.
        freeze_batchnorm: Keep the running statistics of BatchNorm as they are, and normalise by them in training too,
            as the authors do with pretrained networks. Several processes then equal one, with BatchNorm as well.
        recall_at: Depths k of Recall@k.
        optimizer: Makes the optimizer from the trainable parameters, those of the loss included. The default is the
            authors' for pretrained networks.
        lr_scheduler: ``"linear"`` (to zero), ``"cosine"``, ``"constant"``, or a callable.

    Raises:
        ValueError: For settings that contradict each other or the network.
    """

    def __init__(
        self,
        network: str | nn.Module,
        loss: nn.Module | None = None,
        *,
        embedding_dim: int | None = None,
        pretrained: bool = False,
        in_channels: int | None = None,
        freeze_batchnorm: bool = False,
        recall_at: Sequence[int] = (1, 5, 10),
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=3e-5, weight_decay=5e-4),
        lr_scheduler: Schedule | LRSchedulerCallable = "cosine",
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        if not recall_at or min(recall_at) < 1:
            raise ValueError(f"recall_at must hold depths >= 1, got {list(recall_at)}")
        if isinstance(network, str):
            if embedding_dim is None and not has_weights(network):
                raise ValueError(
                    f"network={network!r} ends in a classifier: give embedding_dim, such as the paper's 512, and it "
                    "ends in a linear layer of that many outputs instead"
                )
            network = timm_network(network, pretrained=pretrained, num_classes=embedding_dim, in_channels=in_channels)
        elif embedding_dim is not None or pretrained or in_channels is not None:
            raise ValueError(
                "embedding_dim, pretrained and in_channels build a network given by name; "
                f"{type(network).__name__} is one already: build it as you want it"
            )
        self.network = network
        self.loss = MultiSimilarityLoss() if loss is None else loss
        self.recall_at, self.optimizer, self.lr_scheduler = tuple(recall_at), optimizer, lr_scheduler
        self.freeze_batchnorm = freeze_batchnorm
        if freeze_batchnorm and not any(isinstance(m, _BatchNorm) for m in network.modules()):
            raise ValueError(f"freeze_batchnorm: {type(network).__name__} has no BatchNorm")
        self.train()
        self._rows: list[tuple[Tensor, ...]] = []

    def train(self, mode: bool = True) -> MetricLearning:
        """Set training mode, in which frozen BatchNorm stays in evaluation mode."""
        super().train(mode)
        if self.freeze_batchnorm:
            for module in self.network.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Unit-length embeddings ``(B, d)``, float32 at least, of pictures ``(B, C, H, W)``."""
        embeddings = self.network(pixel_values)
        return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Embed and compare."""
        labels = batch["labels"]
        loss = self.loss(self.network(batch["pixel_values"]), labels)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(labels))
        for name, value in getattr(self.loss, "diagnostics", {}).items():
            self.log(f"train/{name}", value, sync_dist=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Embed."""
        self._rows.append((batch["index"], batch["labels"], self(batch["pixel_values"])))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation set."""
        self._log_retrieval_metrics("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Embed."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole test set."""
        self._log_retrieval_metrics("test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Embeddings."""
        return self(batch["pixel_values"])

    def _log_retrieval_metrics(self, stage: str) -> None:
        labels, embeddings = gather_once(*(torch.cat(parts) for parts in zip(*self._rows, strict=True)))
        self._rows.clear()
        metrics = retrieval_metrics(embeddings, labels, self.recall_at)
        for k, recall in metrics.recall_at.items():
            self.log(f"{stage}/recall_at_{k}", recall, prog_bar=k == self.recall_at[0], sync_dist=True)
        self.log(f"{stage}/map_at_r", metrics.map_at_r, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and schedule given to ``__init__``."""
        return configure_optimizers(self, self.optimizer, self.lr_scheduler)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the network, without the loss, so that others load it.

        A timm network is written as timm does: ``timm.create_model("local-dir:DIRECTORY", pretrained=True)`` gives it
        back, and so does ``MetricLearning("local-dir:DIRECTORY")``. Of any other module the weights are written, for
        ``safetensors.torch.load_model(network, "DIRECTORY/model.safetensors")``. Either gives embeddings that are not
        yet of unit length.

        Args:
            directory: Where to write; made if missing.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if hasattr(self.network, "pretrained_cfg"):
            timm = require("timm", "save_pretrained of a timm network")
            channels = _input_channels(self.network)
            arguments = {} if channels is None else {"in_chans": channels}  # older timm takes them as three
            timm.models.save_for_hf(self.network, directory, model_args=arguments, safe_serialization=True)
        else:
            safetensors = require("safetensors.torch", "save_pretrained")
            safetensors.save_model(self.network, str(directory / "model.safetensors"))


def _input_channels(network: Any) -> int | None:
    first = network.pretrained_cfg["first_conv"]
    return getattr(network.get_submodule(first if isinstance(first, str) else first[0]), "in_channels", None)
