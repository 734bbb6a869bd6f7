"""CAFA (ICCV 2023, arXiv 2206.00205) and the methods it is compared with: classifiers that adapt while they are tested.

Trains a classifier, if it is not trained yet, and tests it on streams of shifted pictures, with any of no adaptation,
batch statistics, TENT (arXiv 2006.10726) and CAFA side by side. The mathematics is in `heliostat.components.cafa`, the
adaptation in `heliostat.components.test_time_adaptation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from heliostat.components.gaussians import ClassGaussians, Covariance
from heliostat.components.source_statistics import weights_fingerprint
from heliostat.components.test_time_adaptation import AdaptationMethod, AdaptedParameters, TestTimeAdapter
from heliostat.lit_models._evaluation import gather_once
from heliostat.lit_models._hparams import save_plain_hyperparameters
from heliostat.lit_models._optimization import Schedule, configure_optimizers
from heliostat.towers import has_weights, timm_network

_KEY = "source_statistics"  # in a checkpoint, as the callback SourceStatistics writes it


class CAFA(LightningModule):
    """A classifier that is trained on source data and adapts to the test data while it predicts them.

    Batches hold ``pixel_values`` ``(B, C, H, W)``; for training, validation and test also ``labels`` ``(B,)``; and, if
    they have them, ``index`` ``(B,)``, the position in the set, by which what several processes repeat is dropped, and
    ``stream``, the name of the test loader's data (see `heliostat.LabelledImageDataModule`). With a network that is
    trained already, go straight to ``trainer.test`` or ``trainer.predict``, or take `adapter` without a Trainer.

    Every test loader is one stream. Each of ``methods`` meets it with an adapter of its own, which starts from the
    source model, classifies a batch and then takes its step. Logged are ``train/loss``; ``val/loss`` and
    ``val/accuracy`` of the source model; and for each method ``test/METHOD/STREAM``, the accuracy of the predictions
    made before the updates, and ``test/METHOD``, the mean over the streams.

    CAFA needs statistics of the source features that belong to the very weights: the callback
    `heliostat.SourceStatistics` fits them and writes them into checkpoints, from where this module takes them; or
    assign ``source_gaussians``.

    Args:
        network: Maps pictures to logits ``(B, num_classes)``: a module; or a timm name, such as ``"resnet50"``,
            ``"local-dir:PATH"`` or ``"hf-hub:ID"``, the last two with their weights.
        methods: What to compare at test, of ``"none"``, ``"batchnorm"``, ``"tent"`` and ``"cafa"``. ``predict`` uses
            the last of them.
        num_classes: Outputs of a network given by name; needed unless it comes with its weights.
        pretrained: Load timm's pretrained weights, which needs a network connection or a filled cache the first time.
        in_channels: Channels of the pictures, for a network given by name.
        head: Name of the classification head within the network, see `heliostat.components.TestTimeAdapter`.
        parameters: What is adapted: ``"batchnorm_affine"``, or ``"norm_affine"`` for networks without BatchNorm.
        adaptation_optimizer: Makes the optimizer of the adaptation from the adapted parameters. For ImageNet-sized
            networks SGD with momentum 0.9 and learning rate 2.5e-4 is usual.
        steps: Updates a batch.
        episodic: Forget everything before each batch.
        min_batch_size: Smaller batches are predicted without an update.
        covariance: ``"class"`` or ``"tied"``, see `heliostat.components.ClassGaussians`; so are the next two.
        shrinkage: gamma of the covariance.
        jitter: eps of the covariance.
        include_predicted_class: See `heliostat.components.class_aware_alignment_loss`.
        optimizer: Makes the optimizer of the source training.
        lr_scheduler: Of the source training: ``"linear"`` (to zero), ``"cosine"``, ``"constant"``, or a callable.

    Attributes:
        adapters: The adapters of the last test or predict, by method, in the state in which they ended.
        stream_results: Of the last test: for every stream and method whether each prediction was right, ``(N,)``, in
            the order of the stream.

    Raises:
        ValueError: For settings that contradict each other or the network.
        MisconfigurationException: At the start of test or predict, if CAFA has no statistics of these weights.
    """

    def __init__(
        self,
        network: str | nn.Module,
        methods: Sequence[AdaptationMethod] = ("none", "batchnorm", "tent", "cafa"),
        *,
        num_classes: int | None = None,
        pretrained: bool = False,
        in_channels: int | None = None,
        head: str | None = None,
        parameters: AdaptedParameters = "batchnorm_affine",
        adaptation_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        steps: int = 1,
        episodic: bool = False,
        min_batch_size: int = 2,
        covariance: Covariance = "class",
        shrinkage: float = 0.1,
        jitter: float = 1e-5,
        include_predicted_class: bool = True,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        lr_scheduler: Schedule | LRSchedulerCallable = "cosine",
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        known = get_args(AdaptationMethod)
        if not methods or len(set(methods)) < len(methods) or not set(methods) <= set(known):
            raise ValueError(f"methods must be different ones of {known}, at least one, got {list(methods)}")
        if isinstance(network, str):
            if num_classes is None and not pretrained and not has_weights(network):
                raise ValueError(f"network={network!r} is new: give num_classes, or pretrained=True for timm's weights")
            network = timm_network(network, pretrained=pretrained, num_classes=num_classes, in_channels=in_channels)
        elif num_classes is not None or pretrained or in_channels is not None:
            raise ValueError(
                "num_classes, pretrained and in_channels build a network given by name; "
                f"{type(network).__name__} is one already: build it as you want it"
            )
        if (
            set(methods) != {"none"}
            and parameters == "batchnorm_affine"
            and not any(isinstance(module, _BatchNorm) for module in network.modules())
        ):
            raise ValueError(
                f"network: {type(network).__name__} has no BatchNorm to adapt; parameters='norm_affine' adapts other "
                "normalisation layers, methods=['none'] nothing"
            )
        self.network = network
        self.methods = tuple(methods)
        self.head, self.covariance = head, covariance
        self.adaptation: dict[str, Any] = {
            "parameters": parameters,
            "optimizer": adaptation_optimizer,
            "steps": steps,
            "episodic": episodic,
            "min_batch_size": min_batch_size,
            "shrinkage": shrinkage,
            "jitter": jitter,
            "include_predicted_class": include_predicted_class,
        }
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.adapters: dict[str, TestTimeAdapter] = {}  # no submodules: they are no part of the source model's state
        self.stream_results: dict[str, dict[str, Tensor]] = {}
        self._rows: dict[str, list[tuple[Tensor, ...]]] = {}
        self._gaussians: ClassGaussians | None = None
        self._fingerprint: str | None = None  # of the weights that they belong to

    @property
    def source_gaussians(self) -> ClassGaussians | None:
        """Statistics of the source features. Assign them to a network that has the weights they were fitted with."""
        return self._gaussians

    @source_gaussians.setter
    def source_gaussians(self, gaussians: ClassGaussians | None) -> None:
        self._gaussians = gaussians
        self._fingerprint = None if gaussians is None else weights_fingerprint(self.network)

    # --- the source model --------------------------------------------------------------------------------------------

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of the source model, without adaptation."""
        return self.network(pixel_values)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        labels = batch["labels"]
        loss = F.cross_entropy(self(batch["pixel_values"]), labels)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Classify by the source model."""
        logits, labels = self(batch["pixel_values"]), batch["labels"]
        losses = F.cross_entropy(logits, labels, reduction="none")
        rows = self._rows.setdefault("val", [])
        rows.append((self._index(batch, batch_idx), losses, logits.argmax(1) == labels))

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracy of the whole validation set."""
        losses, right = gather_once(*map(torch.cat, zip(*self._rows.pop("val"), strict=True)))
        self.log("val/loss", losses.float().mean(), sync_dist=True)
        self.log("val/accuracy", right.float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and schedule given to ``__init__``."""
        return configure_optimizers(self, self.optimizer, self.lr_scheduler)

    # --- adaptation --------------------------------------------------------------------------------------------------

    def adapter(self, method: AdaptationMethod | None = None) -> TestTimeAdapter:
        """A new adapter of the network as it is now, which works without a Trainer.

        Args:
            method: Default: the last of ``methods``.

        Raises:
            MisconfigurationException: For ``"cafa"`` without statistics of these weights.
            ValueError: As `heliostat.components.TestTimeAdapter`.
        """
        method = method or self.methods[-1]
        if method != "cafa":
            return TestTimeAdapter(self.network, method, **self.adaptation)
        remedy = (
            "Add the callback heliostat.SourceStatistics to the Trainer, which fits them on the training data and "
            "writes them into checkpoints; or assign source_gaussians = heliostat.components.source_statistics."
            "fit_class_gaussians(module.network, batches); or leave 'cafa' out of methods"
        )
        if self._gaussians is None:
            raise MisconfigurationException(f"method 'cafa' needs statistics of the source data. {remedy}")
        if self._fingerprint != weights_fingerprint(self.network):
            raise MisconfigurationException(
                f"the statistics of the source data are of other weights than the network now has. {remedy}"
            )
        return TestTimeAdapter(
            self.network,
            method,
            gaussians=self._gaussians,
            head=self.head,
            covariance=self.covariance,
            **self.adaptation,
        )

    def on_test_start(self) -> None:
        """Make the adapters."""
        self.adapters = {method: self.adapter(method) for method in self.methods}
        self._rows, self.stream_results = {}, {}

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Classify a batch, and adapt to it, by every method."""
        if "labels" not in batch:
            raise MisconfigurationException(
                "test measures accuracy, which needs labels, and a batch has none; predict adapts without them"
            )
        if batch_idx == 0:
            self._reset()
        pixels, labels = batch["pixel_values"], batch["labels"]
        right = [adapter(pixels).argmax(1) == labels for adapter in self.adapters.values()]
        stream = str(batch.get("stream", f"stream{dataloader_idx}"))
        rows = self._rows.setdefault(stream, [])
        rows.append((self._index(batch, batch_idx), torch.full_like(labels, batch_idx), *right))

    def on_test_epoch_end(self) -> None:
        """Log the accuracies."""
        for stream, rows in self._rows.items():
            number, *right = gather_once(*map(torch.cat, zip(*rows, strict=True)))
            order = number.argsort(stable=True).cpu()
            columns = (column.cpu()[order] for column in right)
            self.stream_results[stream] = dict(zip(self.methods, columns, strict=True))
        self._rows = {}
        for method in self.methods:
            accuracies = {stream: r[method].float().mean() for stream, r in self.stream_results.items()}
            for stream, accuracy in accuracies.items():
                self.log(f"test/{method}/{stream}", accuracy, sync_dist=True)
            self.log(f"test/{method}", torch.stack(list(accuracies.values())).mean(), sync_dist=True)

    def on_predict_start(self) -> None:
        """Make the adapter."""
        self.adapters = {self.methods[-1]: self.adapter()}

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Logits ``(B, num_classes)`` of the last of ``methods``, which then adapts to the batch."""
        if batch_idx == 0:
            self._reset()
        return self.adapters[self.methods[-1]](batch["pixel_values"])

    def _reset(self) -> None:
        for adapter in self.adapters.values():
            adapter.reset()

    def _index(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Position of every row in its set, or, without, numbers of which no two are the same."""
        labels = batch["labels"]
        if "index" in batch:
            return batch["index"]
        world, rank = self.trainer.world_size, self.trainer.global_rank
        if world > 1 and batch_idx == 0:
            rank_zero_warn("batches have no index: what Lightning repeats to give each process as much counts twice")
        return torch.arange(len(labels), device=labels.device) + (batch_idx * world + rank) * 2**32

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the statistics, if they are of these weights and the callback has not written them."""
        if self._gaussians is None or _KEY in checkpoint or self._fingerprint != weights_fingerprint(self.network):
            return
        checkpoint[_KEY] = {**self._gaussians.state_dict(), "weights": self._fingerprint}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the statistics."""
        state = checkpoint.get(_KEY)
        self._gaussians = self._fingerprint = None
        if state is not None:
            self._gaussians = ClassGaussians(**{name: state[name] for name in ("count", "mean", "covariance")})
            self._fingerprint = state["weights"]
