"""Alignment recovery after fine-tuning (arXiv 2504.09757), as a callback."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torchmetrics import Metric

from heliostat._extras import require
from heliostat.callbacks._figures import run_directory, save_figure
from heliostat.callbacks._loaders import named_loader
from heliostat.callbacks._recovery import (
    NOT_IN_PLAIN_MODEL,
    Layout,
    block_output,
    figure,
    find_layout,
    on_cpu,
    plain_name,
    read_reference,
    report,
    run_recovery,
    table,
)
from heliostat.components.alignment_recovery import (
    Mode,
    RecoveryResult,
    RestorationLog,
    Rollback,
    check_settings,
    mean_representation,
)
from heliostat.components.pooling import Pooling


class AlignmentRecovery(Callback):
    """Put a few weights of the fine-tuned module back to their aligned values, for as long as the task allows.

    Works on any module whose network has a list of blocks: fully fine-tuned, or with LoRA layers of peft. At the end of
    training (or every ``every_n_epochs``) it runs `heliostat.components.recover_alignment`, prints what was restored
    and undone, and leaves that (``alignment_recovery.json``), a picture of it (``.png``, with matplotlib) and the
    weights, ``recovered.safetensors``, in the run's directory: checkpoints are written before the end of training and
    do not have them.

    LoRA layers are folded: the update is added to the base weight, what is aligned is the base weight before, and the
    adapter is set to zero. The module stays as it was otherwise, and its state dict holds the recovered model; saving
    the adapter alone saves nothing.

    The aligned weights are kept in CPU memory, or read from disk tensor by tensor. All of this runs in eval mode and in
    the precision of the weights, without autocast; random numbers are restored.

    Args:
        harmful_dataloader: Batches of harmful prompts, without answers; or the name of a method of the data module or
            the module that returns them. The loss is of batch means: the size of the batches is part of the method.
            Paper: 256 prompts in batches of 8. Read once for each recovery.
        task_dataloader: Batches of prompts of the task, or such a name; ``None`` if ``rollback`` is False.
        task_score: Called with the module, returns a number; or the name of a metric that ``validation_step`` logs.
        reference: Aligned weights: a ``.safetensors`` file, the directory of a transformers model, or a state dict.
            ``None``: the weights that the module has before training, before a checkpoint is loaded.
        representation_fn: Called with the module and a batch, returns h ``(B, d)``. Default: the output of the last
            kept block, pooled.
        layers: Name of the list of blocks, or the names of the blocks in order. Default: the list of like modules that
            holds most parameters.
        layer_end: How many blocks are kept; default: two thirds.
        pooling: How ``(B, T, d)`` becomes h; ``"last"`` is the last token that ``attention_mask`` does not mask, with
            padding on either side. See `heliostat.components.pool_tokens`.
        network: Name of the submodule that is called with a batch. Default: the module's child that has the blocks.
        recovery_rate: Share of the parameters of all blocks restored in a step.
        steps: Most steps.
        warmup_steps: Steps after which ``rollback="auto"`` decides.
        save_every: Steps between candidates, at which the task is measured.
        rollback: ``"auto"``, or always or never.
        rollback_rate: Share undone of the restored entries that hurt the task.
        metric_drop: How much worse the score may become, relatively.
        mode: ``"max"`` if a higher score is better, ``"min"`` if a lower one is.
        accumulate_gradients: Add gradients up over the steps without rollback.
        exclude: Patterns of parameter names that are never restored.
        harmful_rate: As ``task_score``, measured at the start and at every candidate; reported, and decides nothing.
        every_n_epochs: Recover then, in place, and let training go on; ``None``: at the end. Not with LoRA.
        zero_moments: After a recovery during training, set the optimiser's state of restored entries to zero.
        save_path: File for the weights instead of ``recovered.safetensors`` in the run's directory.

    Attributes:
        result: What the last recovery did, `heliostat.components.RecoveryResult`; ``None`` before.
        reports: One dict for each recovery, as in the json file.
        restorations: What undoes the last recovery.

    Raises:
        MisconfigurationException: In ``setup``, with what to do, if no block or no parameter to restore is found; if
            names or shapes differ from ``reference``; on quantised or sharded weights and on adapters other than LoRA.
            At the start of the fit, if prompts have no direction or the metric is not logged.
    """

    def __init__(
        self,
        harmful_dataloader: Iterable[Any] | str,
        task_dataloader: Iterable[Any] | str | None,
        task_score: str | Callable[[LightningModule], float],
        *,
        reference: str | Path | Mapping[str, Tensor] | None = None,
        representation_fn: Callable[[LightningModule, Any], Tensor] | None = None,
        layers: str | Sequence[str] | None = None,
        layer_end: int | None = None,
        pooling: Pooling = "last",
        network: str | None = None,
        recovery_rate: float = 0.002,
        steps: int = 20,
        warmup_steps: int = 5,
        save_every: int = 5,
        rollback: Rollback = "auto",
        rollback_rate: float = 0.2,
        metric_drop: float = 0.05,
        mode: Mode = "max",
        accumulate_gradients: bool = True,
        exclude: Sequence[str] = (),
        harmful_rate: str | Callable[[LightningModule], float] | None = None,
        every_n_epochs: int | None = None,
        zero_moments: bool = False,
        save_path: str | Path | None = None,
    ) -> None:
        self.settings: dict[str, Any] = {
            "recovery_rate": recovery_rate,
            "steps": steps,
            "warmup_steps": warmup_steps,
            "save_every": save_every,
            "rollback": rollback,
            "rollback_rate": rollback_rate,
            "metric_drop": metric_drop,
            "mode": mode,
        }
        check_settings(**self.settings)
        self.settings["accumulate_gradients"] = accumulate_gradients
        if task_dataloader is None and rollback is not False:
            raise ValueError(f"task_dataloader may be None only with rollback=False, got rollback={rollback!r}")
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be >= 1, or None for the end of training, got {every_n_epochs}")
        self.harmful_dataloader, self.task_dataloader = harmful_dataloader, task_dataloader
        self.task_score, self.harmful_rate, self.reference = task_score, harmful_rate, reference
        self.representation_fn, self.pooling, self.network = representation_fn, pooling, network
        self.layers, self.layer_end, self.exclude = layers, layer_end, tuple(exclude)
        self.every_n_epochs, self.zero_moments, self.save_path = every_n_epochs, zero_moments, save_path
        self.result: RecoveryResult | None = None
        self.reports: list[dict[str, Any]] = []
        self.restorations = RestorationLog()
        self._layout: Layout | None = None
        self._aligned: Mapping[str, Tensor] = {}
        self._fingerprint: str | None = None  # of the weights before training

    # --- before training ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the weights and keep their aligned values, before a checkpoint is loaded over them."""
        if stage != "fit":
            return
        require("safetensors", "AlignmentRecovery")
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
            raise MisconfigurationException(
                "AlignmentRecovery compares whole tensors, which a sharded strategy does not keep. Save the fine-tuned "
                "model, and recover it afterwards with heliostat.recover_checkpoint"
            )
        if (names := self._metrics()) and not is_overridden("validation_step", pl_module):
            raise MisconfigurationException(
                f"AlignmentRecovery: {names[0]!r} names a metric, but {type(pl_module).__name__} has no "
                "validation_step to log it. Give a function of the module that returns the score"
            )
        for name, loader in self._loaders():
            _prompts(trainer, pl_module, loader, name)
        self._layout = layout = find_layout(
            pl_module, self.layers, self.layer_end, self.exclude, self.network, fixed=self.reference is None
        )
        if layout.adapted and self.every_n_epochs is not None:
            raise MisconfigurationException(
                "AlignmentRecovery(every_n_epochs=...) cannot be used with LoRA, because folding the adapters takes "
                "what the optimiser trains. Leave every_n_epochs=None: recovery at the end of training"
            )
        self._aligned, self._fingerprint = {}, None
        if self.reference is not None:
            self._aligned = read_reference(self.reference, pl_module, layout)
        else:
            self._aligned = {name: on_cpu(pl_module.get_parameter(name)) for name in layout.trained}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try the prompts, so that what does not fit is refused now and not after training."""
        for name, loader in self._loaders():
            with _evaluating(pl_module):
                self._try(trainer, pl_module, loader, name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out now whether a metric is logged."""
        for name in self._metrics():
            with _evaluating(pl_module), torch.no_grad():
                _validated(trainer, pl_module, name, max_batches=1)

    # --- recovery ----------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recover every n epochs; checkpoint callbacks come later, so that their files have the result."""
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._recover(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recover, while the module is still on its device."""
        if self.every_n_epochs is None:
            self._recover(trainer, pl_module)
        path = run_directory(trainer)
        if trainer.is_global_zero and self.reports and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            assert self._layout is not None
            file = Path(self.save_path or path / "recovered.safetensors")
            path.mkdir(parents=True, exist_ok=True)
            _save(pl_module.get_submodule(self._layout.network), file)
            (path / "alignment_recovery.json").write_text(json.dumps(self.reports, indent=1), encoding="utf-8")
            rank_zero_info(f"recovered weights: {file}; report: {path / 'alignment_recovery.json'}")
            try:
                save_figure(trainer, figure(self.reports), path / "alignment_recovery.png")
            except ModuleNotFoundError as error:  # the weights are what matters
                rank_zero_warn(f"AlignmentRecovery: {error}")

    def undo(self, pl_module: LightningModule) -> None:
        """Bring back the fine-tuned weights as they were before the last recovery, bit by bit."""
        self.restorations.undo_(dict(pl_module.named_parameters()))

    def _recover(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._layout is not None
        rate, known = self.harmful_rate, {*self._layout.trained, *self._layout.base}
        late = {name for name in self._layout.relevant if pl_module.get_parameter(name).requires_grad} - known
        if late and self.reference is None:
            rank_zero_warn(
                f"AlignmentRecovery: {len(late)} parameters, such as {min(late)}, are trained now and were not "
                "in setup, so their aligned values are not known and they are not restored. Give reference="
            )
        with _evaluating(pl_module):
            self.result = run_recovery(
                pl_module,
                self._layout,
                self._aligned,
                functools.partial(self._represent, trainer, pl_module),
                list(_prompts(trainer, pl_module, self.harmful_dataloader, "harmful")),
                list(_prompts(trainer, pl_module, self.task_dataloader or (), "task")),
                functools.partial(self._score, trainer, pl_module, self.task_score),
                harmful_rate=functools.partial(self._score, trainer, pl_module, rate) if rate else None,
                settings=self.settings,
            )
        self.restorations = self.result.log
        self.reports.append({"epoch": trainer.current_epoch, "global_step": trainer.global_step, **report(self.result)})
        rank_zero_info(table(self.result))
        if self.zero_moments and self.every_n_epochs is not None:
            _zero_moments(trainer, dict(pl_module.named_parameters()), self.restorations)

    def _try(self, trainer: Trainer, pl_module: LightningModule, loader: Iterable[Any] | str, name: str) -> None:
        assert self._layout is not None
        represent = functools.partial(self._represent, trainer, pl_module)
        eligible = [pl_module.get_parameter(own) for own in self._layout.eligible]
        flags = [parameter.requires_grad for parameter in eligible]
        try:
            first = list(itertools.islice(_prompts(trainer, pl_module, loader, name), 1))
            mean_representation(represent, first)
            for parameter in eligible:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                attached = represent(first[0]).requires_grad
        except ValueError as error:
            raise MisconfigurationException(f"AlignmentRecovery, {name}_dataloader: {error}") from error
        finally:
            for parameter, flag in zip(eligible, flags, strict=True):
                parameter.requires_grad_(flag)
        if not attached:
            raise MisconfigurationException(
                "AlignmentRecovery: the representation has no gradient to the weights that may be restored. "
                "representation_fn must not detach, nor run under no_grad, and must use the blocks"
            )

    def _loaders(self) -> list[tuple[str, Iterable[Any] | str]]:
        loaders = (("harmful", self.harmful_dataloader), ("task", self.task_dataloader))
        return [(name, loader) for name, loader in loaders if loader is not None]

    def _metrics(self) -> list[str]:
        """Names of metrics among what is measured."""
        return [score for score in (self.task_score, self.harmful_rate) if isinstance(score, str)]

    def _represent(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Tensor:
        assert self._layout is not None
        batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
        # The precision's context first: under half precision it sets the dtype of new tensors; but no autocast.
        with trainer.precision_plugin.forward_context(), torch.autocast(pl_module.device.type, enabled=False):
            if self.representation_fn is not None:
                return self.representation_fn(pl_module, batch)
            return block_output(pl_module, self._layout, batch, self.pooling)

    @staticmethod
    def _score(trainer: Trainer, pl_module: LightningModule, score: Callable[[LightningModule], float] | str) -> float:
        if isinstance(score, str):
            return _validated(trainer, pl_module, score)
        with trainer.precision_plugin.val_step_context():
            return score(pl_module)

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Reports, what undoes the last recovery, and a mark of the aligned weights."""
        if self._fingerprint is None and self.reference is None and self._aligned:
            self._fingerprint = _fingerprint(self._aligned)
        return {"reports": self.reports, "restored": self.restorations.steps, "aligned": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on; refuse to take other weights for the aligned ones than the run that is continued did."""
        self.reports, self.restorations.steps = state_dict["reports"], state_dict["restored"]
        expected = state_dict["aligned"]
        if expected and self.reference is None and self._aligned and _fingerprint(self._aligned) != expected:
            raise MisconfigurationException(
                "AlignmentRecovery: the weights that the module was built with are not those that the run to be "
                "resumed started from, so what is aligned is not known. Build the module from the same aligned "
                "weights, or name them by reference="
            )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and random numbers of its own meanwhile."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with isolate_rng():
            yield
    finally:
        for child, training in modes:
            child.training = training


def _prompts(trainer: Trainer, pl_module: LightningModule, loader: Iterable[Any] | str, name: str) -> Iterable[Any]:
    """The batches, found by name if need be; refused if processes or recoveries would not see the same ones."""
    if isinstance(loader, str):
        loader = named_loader(trainer, pl_module, loader, f"AlignmentRecovery({name}_dataloader=...)")
    if isinstance(loader, Iterator):
        raise MisconfigurationException(
            f"AlignmentRecovery: {name}_dataloader is an iterator, which can be read once only. Give a DataLoader or a "
            "list of batches"
        )
    if trainer.world_size > 1 and isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler):
        raise MisconfigurationException(
            f"AlignmentRecovery: {name}_dataloader shuffles, so that processes would see different batches. Set "
            "shuffle=False; each process takes its share of the batches"
        )
    return loader


def _validated(trainer: Trainer, pl_module: LightningModule, metric: str, max_batches: int | None = None) -> float:
    """Value of a metric that the module logs in validation, by a pass of our own over the validation data."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    with suppress(MisconfigurationException):  # there is no validation loader
        loop.setup_data()
    loaders = trainer.val_dataloaders
    loader = loaders[0] if isinstance(loaders, (list, tuple)) and len(loaders) == 1 else loaders
    if not loader or isinstance(loader, (list, tuple, dict)):
        found = "there are several" if loader else "there is none"
        raise MisconfigurationException(
            f"AlignmentRecovery(task_score={metric!r}) needs one validation loader, and {found}. Give a function of "
            "the module that returns the score"
        )
    sums: dict[str, tuple[float, float]] = {}
    metrics: dict[str, Metric] = {}
    weight = 1.0

    def record(name: str, value: Any, *_: object, batch_size: int | None = None, **__: object) -> None:
        if isinstance(value, Metric):
            metrics[name] = value
        else:
            share = float(batch_size or weight)
            total, count = sums.get(name, (0.0, 0.0))
            sums[name] = total + share * float(value), count + share

    module: Any = pl_module
    module.log = record  # in front of the method, which wants a running loop
    try:
        module.on_validation_epoch_start()
        limit = max_batches or (None if loop.max_batches[0] == float("inf") else int(loop.max_batches[0]))
        for i, batch in enumerate(itertools.islice(loader, limit)):
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            weight = float(extract_batch_size(batch))
            with trainer.precision_plugin.val_step_context():
                module.validation_step(batch, i)
        module.on_validation_epoch_end()
    finally:
        del module.log
    values = {name: total / count for name, (total, count) in sums.items()}
    for name, value in metrics.items():
        values[name] = float(value.compute())
        value.reset()
    if metric not in values:
        raise MisconfigurationException(
            f"AlignmentRecovery(task_score={metric!r}): {type(pl_module).__name__} never logs that in validation; it "
            f"logs {', '.join(sorted(values)) or 'nothing'}. Name one of these, or give a function of the module"
        )
    return values[metric]


def _zero_moments(trainer: Trainer, named: Mapping[str, Tensor], log: RestorationLog) -> None:
    for entries, optimizer in itertools.product(log.steps, trainer.optimizers):
        for name, (index, _) in entries.items():
            for value in optimizer.state.get(named[name], {}).values():
                if isinstance(value, Tensor) and value.shape == named[name].shape:
                    value[torch.unravel_index(index.to(value.device), value.shape)] = 0


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _save(network: nn.Module, file: Path) -> None:
    """Write the weights without adapters, under the names of the model without them; tied tensors once."""
    state, seen = {}, set()
    for name, value in network.state_dict().items():
        place = (value.data_ptr(), value.shape) if value.numel() else name
        if isinstance(value, Tensor) and not NOT_IN_PLAIN_MODEL.search(name) and place not in seen:
            seen.add(place)
            state[plain_name(name)] = value.contiguous()
    file.parent.mkdir(parents=True, exist_ok=True)
    require("safetensors.torch", "AlignmentRecovery").save_file(state, file, metadata={"format": "pt"})
