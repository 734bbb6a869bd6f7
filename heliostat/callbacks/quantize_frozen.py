"""Frozen networks of a training in two bits (after arXiv 2311.16442): references, teachers, adapted base models."""

from __future__ import annotations

import fnmatch
import inspect
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from heliostat.callbacks._loaders import named_loader
from heliostat.callbacks._recovery import NOT_IN_PLAIN_MODEL
from heliostat.components.distributed import default_group
from heliostat.components.two_bit import ErrorCompensation, TwoBitLinear, TwoBitReport, quantize_model, quantize_two_bit
from heliostat.components.two_bit_networks import packed_names, prepare_two_bit

_DATA = "datamodule."


class QuantizeFrozen(Callback):
    """Hold networks that are not trained in under three bits a weight: linear layers become `TwoBitLinear`.

    Works with any LightningModule. It acts once, in fit, validate, test and predict alike: when module and data module
    are set up and a checkpoint is loaded, before the module goes to the device and DDP and optimizers are made. Only if
    the module has an ``on_fit_start``, where some take a copy of their model as `heliostat.GroupPolicy` does, fit waits
    until that is over. What is random in training goes on as without it.

    A checkpoint holds the packed weights, and a run that loads it needs this callback with the same networks: they are
    loaded as they are, and nothing is quantised again. A checkpoint with dense weights is loaded, then quantised.
    Networks of the data module are in no checkpoint.

    Under a peft adapter the base's layers are quantised, and the adapter's own are left. In fit, layers that are
    trained are refused. Do not name a network that follows another, as the moving average does that is ProCLIP's
    teacher.

    The report is printed, and the loggers get ``two_bit/NETWORK``, the average bits of its quantised weights.

    Args:
        networks: Dotted paths from the module: ``"model"``, ``"reference.network"``. Those of the data module begin
            with ``"datamodule."``; names may be keys of dicts. For embedders whose output is cached before any callback
            is asked, see `heliostat.components.two_bit_network`.
        include: Patterns of layers' names within each network, see `heliostat.components.quantize_model`.
        exclude: Patterns of layers to leave. A language model's output layer is a layer like others: ``"lm_head"``.
        calibration_batches: Quantise by as many batches of the training data, of each process; 0: to nearest.
        inputs: Which field of a batch is which argument of the network: ``{"input_ids": "prompt_ids"}``. None: those
            whose names its ``forward`` has; of batches that are no dicts, the first entry.
        four_bit_fraction: f, see `heliostat.components.quantize_two_bit`, as the following.
        outlier_fraction: p.
        error_compensation: ``"rtn"`` with calibration: only the choice of bits uses it.
        percdamp: Ridge.

    Attributes:
        reports: What was done, by network; without those that were in two bits already.

    Raises:
        ValueError: Settings out of range.
        MisconfigurationException: A path leads to no network; parameters are trained; a strategy shards the weights; a
            batch has not the network's arguments; or the network cannot be quantised.
    """

    def __init__(
        self,
        networks: str | Sequence[str],
        *,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        calibration_batches: int = 0,
        inputs: dict[str, str] | None = None,
        four_bit_fraction: float = 0.125,
        outlier_fraction: float = 0.0025,
        error_compensation: ErrorCompensation = "auto",
        percdamp: float = 0.01,
    ) -> None:
        self.networks = [networks] if isinstance(networks, str) else list(networks)
        if not self.networks:
            raise ValueError("networks is an empty list; name at least one, such as 'teacher'")
        if calibration_batches < 0:
            raise ValueError(f"calibration_batches must be >= 0, got {calibration_batches}")
        if error_compensation == "gptq" and calibration_batches == 0:
            raise ValueError("error_compensation='gptq' needs calibration_batches > 0")
        self._options: dict[str, Any] = {
            "four_bit_fraction": four_bit_fraction,
            "outlier_fraction": outlier_fraction,
            "percdamp": percdamp,
        }
        quantize_two_bit(torch.zeros(1, 1), **self._options)  # refuses now what is out of range
        self._options["error_compensation"] = error_compensation
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.calibration_batches, self.inputs = calibration_batches, inputs
        self.reports: dict[str, TwoBitReport] = {}
        self._done: set[str] = set()
        self._loading: Any = None

    # --- when ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Arrange for the right moment, which no hook of a callback is called at."""
        strategy: Any = trainer.strategy
        if strategy.restore_checkpoint_after_setup:
            raise MisconfigurationException(
                f"QuantizeFrozen does not work with {type(strategy).__name__}, which shards the weights. Use "
                "strategy='ddp', or quantise before training by heliostat.components.quantize_model"
            )
        self._done.clear()
        self._stop_watching()
        self._loading = pl_module.register_load_state_dict_pre_hook(self._prepare)
        set_up = strategy.setup

        def quantize_and_set_up(trainer: Trainer) -> None:
            strategy.setup = set_up
            self._before_device(trainer, pl_module)
            set_up(trainer)

        strategy.setup = quantize_and_set_up

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantise what had to wait for the module's ``on_fit_start``."""
        self._quantize(trainer, pl_module, self.networks)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantise what had to wait for the module's ``on_fit_start``."""
        self._quantize(trainer, pl_module, self.networks)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module's loading alone."""
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._loading is not None:
            self._loading.remove()
            self._loading = None

    def _prepare(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Before a state dict is loaded, make room for what it holds in two bits."""
        for path in self.networks:
            if not path.startswith(_DATA):
                prepare_two_bit(_find(module, path, path), state_dict, f"{prefix}{path}.")

    def _before_device(self, trainer: Trainer, pl_module: LightningModule) -> None:
        waits = trainer.state.fn == TrainerFn.FITTING and is_overridden("on_fit_start", pl_module)
        self._quantize(trainer, pl_module, [path for path in self.networks if path.startswith(_DATA) or not waits])
        ignored = [*getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ()), *packed_names(pl_module)]
        for path in self.networks:
            if path not in self._done:  # DDP would hold on to the dense weights
                named = _network(trainer, pl_module, path).named_parameters(prefix=path)
                ignored += [name for name, parameter in named if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, ignored)

    # --- what ---

    def _quantize(self, trainer: Trainer, pl_module: LightningModule, paths: Sequence[str]) -> None:
        for path in paths:
            if path in self._done:
                continue
            network = _network(trainer, pl_module, path)
            self._done.add(path)
            if any(isinstance(module, TwoBitLinear) for module in network.modules()):
                rank_zero_info(f"QuantizeFrozen: {path} is in two bits already")
                continue
            before = list(network.parameters())
            self.reports[path] = report = self._quantize_one(trainer, pl_module, path, network)
            _forget(trainer, before, network)
            left = Counter(report.skipped.values()).items()
            weights = sum(layer.out_features * layer.in_features for layer in report.layers)
            rank_zero_info(
                f"QuantizeFrozen: {path}: {len(report.layers)} layers, {weights} weights at {report.average_bits:.3f} "
                f"bits ({report.total_bits / 8e6:.1f} MB)" + "".join(f"; {count} left, {why}" for why, count in left)
            )
            for logger in trainer.loggers:
                logger.log_metrics({f"two_bit/{path}": report.average_bits}, step=trainer.global_step)

    def _quantize_one(
        self, trainer: Trainer, pl_module: LightningModule, path: str, network: nn.Module
    ) -> TwoBitReport:
        linear = {name: module for name, module in network.named_modules() if _is_linear(module)}
        own = [name for name in linear if NOT_IN_PLAIN_MODEL.search(name) or ".modules_to_save." in f".{name}"]
        trained = [
            name
            for name, module in linear.items()
            if name not in own
            and _matches(name, self.include)
            and not _matches(name, self.exclude)
            and module.get_parameter("weight").requires_grad
        ]
        if trained and trainer.state.fn == TrainerFn.FITTING and not path.startswith(_DATA):
            raise MisconfigurationException(
                f"QuantizeFrozen: {len(trained)} layers of {path} are trained ({', '.join(trained[:3])}"
                f"{', ...' if len(trained) > 3 else ''}), and packed weights cannot be. Freeze them by "
                "requires_grad_(False), leave them out by exclude, or do not name this network"
            )
        if trainer.strategy.root_device.type == "cuda":
            network.to(trainer.strategy.root_device)
        if default_group() is not None:  # as DDP does with what it is not told to ignore
            for parameter in network.parameters():
                dist.broadcast(parameter.data, src=0)
        try:
            with isolate_rng():
                return quantize_model(
                    network,
                    include=self.include,
                    exclude=[*self.exclude, *own],
                    calibration=self._calibration(trainer, pl_module, network) if self.calibration_batches else None,
                    **self._options,
                )
        except ValueError as error:
            raise MisconfigurationException(f"QuantizeFrozen: {path}: {error}") from error

    def _calibration(self, trainer: Trainer, pl_module: LightningModule, network: nn.Module) -> list[Any]:
        """The first training batches, of a loader of our own, as arguments of the network."""
        if trainer.state.fn == TrainerFn.FITTING:
            loader = trainer.fit_loop._data_source.dataloader()
        else:
            if trainer.datamodule is not None:  # type: ignore[attr-defined]
                trainer.datamodule.setup("fit")  # type: ignore[attr-defined]
            loader = named_loader(trainer, pl_module, "train_dataloader", "QuantizeFrozen(calibration_batches=...)")
        dtype = next(network.parameters()).dtype  # of precision="bf16-true" and its like, if that is done already
        return [
            apply_to_collection(
                self._arguments(network, batch), Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x
            )
            for batch in itertools.islice(loader, self.calibration_batches)
        ]

    def _arguments(self, network: Any, batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            return (batch[0],) if isinstance(batch, (tuple, list)) else batch
        fields = self.inputs
        if fields is None:
            plain = network.get_base_model() if hasattr(network, "get_base_model") else network
            known = inspect.signature(plain.forward).parameters
            fields = {name: name for name, value in batch.items() if name in known and isinstance(value, Tensor)}
            fields.pop("labels", None)
        if not fields or not set(fields.values()) <= set(batch):
            raise MisconfigurationException(
                f"QuantizeFrozen(inputs={self.inputs}): a training batch has {sorted(batch)}, of which "
                f"{type(network).__name__} cannot be called. Say by inputs which field is which argument, or quantise "
                "without calibration"
            )
        return {name: batch[field] for name, field in fields.items()}


def _network(trainer: Trainer, pl_module: LightningModule, path: str) -> nn.Module:
    if not path.startswith(_DATA):
        return _find(pl_module, path, path)
    if trainer.datamodule is None:  # type: ignore[attr-defined]
        raise MisconfigurationException(f"QuantizeFrozen(networks={path!r}): there is no data module")
    return _find(trainer.datamodule, path.removeprefix(_DATA), path)  # type: ignore[attr-defined]


def _find(owner: Any, path: str, whole: str) -> nn.Module:
    found = owner
    for part in path.split("."):
        inside = found
        found = inside[part] if isinstance(inside, Mapping) and part in inside else getattr(inside, part, None)
        if found is None:
            has = (
                dict(inside.named_children()) if isinstance(inside, nn.Module) else getattr(inside, "__dict__", inside)
            )
            raise MisconfigurationException(
                f"QuantizeFrozen(networks={whole!r}): {type(inside).__name__} has no {part!r}; it has "
                f"{', '.join(map(str, has)) or 'no network'}"
            )
    if not isinstance(found, nn.Module):
        raise MisconfigurationException(
            f"QuantizeFrozen(networks={whole!r}) is a {type(found).__name__}, and no network (torch.nn.Module)"
        )
    return found


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"  # that of GPT-2


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _forget(trainer: Trainer, before: Sequence[Tensor], network: nn.Module) -> None:
    """Drop the dense weights from optimizers, if these were made of frozen parameters too."""
    gone = {id(parameter) for parameter in before} - {id(parameter) for parameter in network.parameters()}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
