"""Statistics of the training data's features, kept beside the weights that they belong to."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from heliostat.components.distributed import default_group
from heliostat.components.gaussians import ClassGaussians, Covariance
from heliostat.components.source_statistics import fit_class_gaussians, weights_fingerprint

_KEY = "source_statistics"  # in a checkpoint; modules that hold statistics write and read the same


class SourceStatistics(Callback):
    """Fit one Gaussian per class to the features of the training data, and keep them with the weights.

    Test-time adaptation by CAFA needs them (arXiv 2206.00205). Works with any classifier whose ``forward`` takes the
    pictures of a batch: a dict with ``pixel_values`` and ``labels``, or a pair of inputs and labels. The features are
    the inputs of its classification head, in eval mode.

    Statistics never stand for other weights than those that they were fitted with: a fingerprint of the weights is kept
    beside them. They are fitted when a checkpoint is saved, of the weights in it, and written into it under
    ``source_statistics``; when training ends; and at the start of test and predict if the loaded weights have none. A
    pass takes about a third of an epoch's time: to save often, give ``num_samples``, or save less often. Weights
    that have not changed since are not passed again.

    A module with an attribute ``source_gaussians`` gets them there (`heliostat.CAFA` has it); for any other they are in
    the callback's ``gaussians``.

    The pass leaves training as it is: it takes the samples from the training loader's data set, with their
    augmentation, each once, by a loader of its own; random numbers are restored. On several processes each takes a
    share, and all get the statistics of the whole.

    Args:
        num_samples: Use that many samples, drawn at random, the same ones each time. None: all.
        network: Name of the submodule that classifies. Default: the module's ``network`` if it is a module, else the
            module itself.
        head: Name of the classification head within it, see `heliostat.components.TestTimeAdapter`. Default: the
            module's ``head`` if that is a text, else the head is looked for.
        covariance: ``"class"``, or ``"tied"`` for one matrix of all classes; C D^2 or D^2 numbers of 8 bytes, in memory
            and in every checkpoint: 33 GB or 34 MB for a ResNet-50 on ImageNet. Default: the module's ``covariance`` if
            that is a text, else ``"class"``.

    Attributes:
        gaussians: The statistics, `heliostat.components.ClassGaussians`, or None before the first pass.

    Raises:
        MisconfigurationException: If there is no training loader, or not one over a data set with random access; when
            training starts, or at test if the weights have no statistics.
        ValueError: On a batch, head or label that does not fit; when training starts.
    """

    def __init__(
        self,
        num_samples: int | None = None,
        *,
        network: str | None = None,
        head: str | None = None,
        covariance: Covariance | None = None,
    ) -> None:
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples must be >= 1, got {num_samples}")
        self.num_samples, self.network, self.head = num_samples, network, head
        self.covariance: Covariance | None = covariance
        self.gaussians: ClassGaussians | None = None
        self._fingerprint: str | None = None  # of the weights that they belong to

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try one batch, so that what does not fit is refused now and not when the first checkpoint is saved."""
        loader = _training_loader(trainer, pl_module)
        if loader is None:
            raise MisconfigurationException("SourceStatistics found no training loader")
        self._fit(trainer, pl_module, loader, only_a_batch=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the final weights."""
        self._update(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Fit the weights that are being saved, and write the statistics beside them."""
        if not self._update(trainer, pl_module):
            rank_zero_warn("SourceStatistics: a checkpoint is saved without, as there is no training loader to fit on")
            return
        assert self.gaussians is not None
        checkpoint[_KEY] = {**self.gaussians.state_dict(), "weights": self._fingerprint}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the statistics of a checkpoint."""
        if state := checkpoint.get(_KEY):
            self.gaussians = ClassGaussians(**{name: state[name] for name in ("count", "mean", "covariance")})
            self._fingerprint = state["weights"]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See to it that the weights to be tested have statistics."""
        if not self._update(trainer, pl_module):
            raise MisconfigurationException(
                "SourceStatistics: the weights to be tested have no statistics, and there is no training loader to fit "
                "them on. Load a checkpoint that was saved with this callback (ckpt_path=...), or pass a data module "
                "that has a train_dataloader"
            )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for predict."""
        self.on_test_start(trainer, pl_module)

    def _update(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Make the statistics those of the current weights. False if it cannot be done."""
        network = self._network(pl_module)
        if default_group() is not None:
            # Running statistics are each process's own between two forwards; rank 0's are those that count and are
            # saved, and DDP would do this before the next forward.
            for buffer in network.buffers():
                dist.broadcast(buffer, src=0)
        fingerprint = weights_fingerprint(network)
        if self.gaussians is None or fingerprint != self._fingerprint:
            loader = _training_loader(trainer, pl_module)
            if loader is None:
                return False
            is_first = self.gaussians is None
            self.gaussians, self._fingerprint = self._fit(trainer, pl_module, loader), fingerprint
            if is_first:
                count = self.gaussians.count
                rank_zero_info(f"source statistics: {int(count.sum())} samples of {int((count > 0).sum())} classes")
        if hasattr(pl_module, "source_gaussians"):
            module: Any = pl_module
            module.source_gaussians = self.gaussians
        return True

    def _network(self, pl_module: LightningModule) -> nn.Module:
        if self.network is not None:
            try:
                return pl_module.get_submodule(self.network)
            except AttributeError:
                raise MisconfigurationException(
                    f"SourceStatistics(network={self.network!r}): {type(pl_module).__name__} has no such submodule; it "
                    f"has {', '.join(name for name, _ in pl_module.named_children())}"
                ) from None
        network = getattr(pl_module, "network", None)
        return network if isinstance(network, nn.Module) else pl_module

    def _fit(
        self, trainer: Trainer, pl_module: LightningModule, loader: DataLoader, only_a_batch: bool = False
    ) -> ClassGaussians:
        head = self.head or _text(pl_module, "head")
        covariance: Any = self.covariance or _text(pl_module, "covariance") or "class"
        rows = _rows(loader)
        limit = (loader.batch_size or 64) * trainer.world_size if only_a_batch else self.num_samples
        if limit is not None and limit < len(rows):
            chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:limit]
            rows = [rows[i] for i in chosen.sort().values.tolist()]
        if len(rows) < trainer.world_size:
            raise MisconfigurationException(
                f"SourceStatistics: {len(rows)} samples cannot be shared among {trainer.world_size} processes"
            )
        own_rows = rows[trainer.global_rank :: trainer.world_size]
        with isolate_rng(), trainer.precision_plugin.val_step_context():
            torch.manual_seed(0)  # the same augmentation each time
            np.random.seed(0)  # noqa: NPY002 - the global generator is what users' augmentations draw from
            random.seed(0)
            return fit_class_gaussians(
                self._network(pl_module),
                _batches(trainer, loader, own_rows, num_workers=0 if only_a_batch else loader.num_workers),
                head=head,
                covariance=covariance,
            )


def _text(pl_module: LightningModule, name: str) -> str | None:
    value = getattr(pl_module, name, None)
    return value if isinstance(value, str) else None


def _training_loader(trainer: Trainer, pl_module: LightningModule) -> DataLoader | None:
    """The loader of the training, or one like it; None if there is none."""
    loader: Any = trainer.train_dataloader
    if loader is None and is_overridden("train_dataloader", pl_module):
        loader = pl_module.train_dataloader()
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    if loader is None and datamodule is not None and is_overridden("train_dataloader", datamodule):
        datamodule.setup("fit")
        loader = datamodule.train_dataloader()
    if loader is None:
        return None
    if (
        not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or loader.batch_sampler is None
    ):
        raise MisconfigurationException(
            "SourceStatistics takes every sample of the training set once, which needs one torch DataLoader that makes "
            f"batches of a data set with random access, got {type(loader).__name__}. Remove the callback, call "
            "heliostat.components.fit_class_gaussians(model, batches) yourself, and give the module "
            "what it returns"
        )
    return loader


def _rows(loader: DataLoader) -> list[Any]:
    """What the sampler asks the data set for in an epoch, over all processes, each once: all, or a part if it is one.

    Classes are described one by one, so how often a sampler repeats the samples of a class does not matter.
    """
    sampler, length = loader.sampler, len(loader.dataset)  # type: ignore[arg-type]
    covers = isinstance(sampler, (SequentialSampler, RandomSampler)) or (
        isinstance(sampler, DistributedSampler) and len(sampler.dataset) == length  # type: ignore[arg-type]
    )
    if covers and type(loader.batch_sampler) is BatchSampler:
        return list(range(length))
    with isolate_rng():
        # A copy, so that a pass of training that is under way goes on as if nothing had been; the data are shared.
        batches = copy.deepcopy(loader.batch_sampler, {id(loader.dataset): loader.dataset})
        rows = {row for batch in batches for row in batch}  # type: ignore[union-attr]
    group = default_group()
    if group is not None:
        shares: list[set[Any]] = [set()] * group.size()
        dist.all_gather_object(shares, rows)
        rows = set().union(*shares)
    return sorted(rows)


def _batches(trainer: Trainer, loader: DataLoader, rows: list[Any], num_workers: int) -> Iterator[Any]:
    """Batches of these samples as a step would get them, from a loader that has nothing in common with training's."""
    own = DataLoader(
        loader.dataset,
        batch_size=loader.batch_size or 64,
        sampler=rows,
        num_workers=num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if num_workers else None,
        generator=torch.Generator().manual_seed(0),
    )
    for batch in own:
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
