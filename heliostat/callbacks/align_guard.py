"""AlignGuard-LoRA as a callback (arXiv 2508.02079): fine-tune an aligned model and keep its alignment."""

from __future__ import annotations

import difflib
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.data import DistributedSampler

from heliostat.callbacks._loaders import named_loader
from heliostat.components.alignguard_lora import (
    FisherEnergies,
    KroneckerFisher,
    Normalization,
    Reduction,
    check_penalty_settings,
    estimate_kronecker_fisher,
    lora_fisher_penalty,
    normalize_fisher,
    weight_fisher_penalty,
)
from heliostat.pretrained import load_tokenizer

TaskMetric = Literal["scaled_identity", "identity"]

# Initialisations of peft that take the adapters' product out of the base weights: s B A is then not the update.
_CHANGES_BASE = re.compile(r"pissa.*|olora|corda|loftq|lora_ga")


class AlignGuard(Callback):
    """Penalise what fine-tuning changes in the directions that the aligned behaviour depends on.

    Works with any LightningModule that trains peft LoRA adapters on linear layers, or linear layers themselves; nothing
    in it is changed. When training starts, the Fisher information of the guarded weights is estimated on alignment
    data; from then on the penalty's gradient, in closed form, is added to the task's before every optimiser step, which
    equals adding the penalty to the loss. See `heliostat.components.lora_fisher_penalty` for the terms.

    Logged: ``align_guard/align`` (E_A), ``align_guard/task`` (E_T) and ``align_guard/penalty``, what would be added to
    the loss; with ``lambda_collision`` also ``align_guard/overlap`` (E_RM), and ``align_guard/geodesic``, always 0.

    The state holds Fisher information and reference weights: a resumed training goes on with them, and nothing is
    estimated again.

    Args:
        alignment_dataloader: Prompts with the aligned model's own answers, 64 to 1000 of them: a loader, a list of
            batches, the name of a method of the data module or the module that returns them, or the path of a .jsonl
            file whose lines have ``prompt`` (a text, or a list of chat messages) and ``completion``. On several
            processes each gets all of it, and they share it out. A file makes batches of one sample with
            ``input_ids``, ``attention_mask`` and ``labels`` (-100 on the prompt).
        loss_fn: ``loss_fn(module, batch)``: one loss a sample, ``(B,)``, each the mean over the sample's own targets;
            or a scalar for batches of one. Default: the module's own ``training_step`` on one sample at a time, without
            its logging; for this the batches must be such as it trains on.
        target_modules: Names, or endings of names (``"q_proj"``, ``"blocks.0.mlp.fc1"``), of the layers to guard; a
            single text is a regular expression for the whole name. Default: every LoRA layer. `torch.nn.Linear` layers
            that are trained themselves must be named.
        tokenizer: For a .jsonl file: a transformers tokenizer, or its name or directory.
        lambda_align: lambda_A, weight of E_A.
        lambda_task: lambda_T, weight of E_T. For layers trained themselves it keeps a copy of their weights.
        lambda_collision: lambda_NC, weight of the collision terms. They cost more than all else; off by default.
        alpha: Share of E_RM in the collision terms.
        beta: Of E_RM, see `heliostat.components.riemannian_overlap`.
        tau: Of E_RM.
        collision_reduction: ``"mean"`` or ``"sum"`` over the entries of a matrix in E_RM.
        rank_out: Output directions kept for each matrix, at most d_out are used.
        rank_in: Input directions kept for each matrix, at most d_in are used.
        top_m: Pairs of directions that are critical. Default: all.
        num_samples: Samples to estimate with, the first ones that the data gives.
        fisher_normalization: See `heliostat.components.normalize_fisher`.
        task_metric: h of E_T: ``"scaled_identity"``, tr F / (d_out d_in) of each matrix, or ``"identity"``, 1.
        refresh_every_n_epochs: Estimate anew, at the weights of then, when that many epochs have passed.

    Attributes:
        fisher: The normalised Fisher information by layer, or None before training.

    Raises:
        MisconfigurationException: In ``setup``, or when training starts for modules that are built only then: nothing
            to guard; DoRA and other variants of LoRA; merged adapters; initialisations that change the base weights;
            quantised base weights; frozen layers; alignment data that is empty or not finite; FSDP1, DeepSpeed or
            tensor parallelism.
        ValueError: Settings out of range.
    """

    def __init__(
        self,
        alignment_dataloader: Iterable[Any] | str | Path,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        target_modules: str | Sequence[str] | None = None,
        *,
        tokenizer: Any = None,
        lambda_align: float = 0.25,
        lambda_task: float = 0.1,
        lambda_collision: float = 0.0,
        alpha: float = 0.5,
        beta: float = 4.0,
        tau: float = 0.01,
        collision_reduction: Reduction = "mean",
        rank_out: int = 32,
        rank_in: int = 32,
        top_m: int | None = None,
        num_samples: int = 256,
        fisher_normalization: Normalization = "mean",
        task_metric: TaskMetric = "scaled_identity",
        refresh_every_n_epochs: int | None = None,
    ) -> None:
        check_penalty_settings(lambda_align, lambda_task, 1.0, lambda_collision, alpha, beta, tau, collision_reduction)
        for name, count in (
            ("rank_out", rank_out),
            ("rank_in", rank_in),
            ("top_m", top_m),
            ("num_samples", num_samples),
            ("refresh_every_n_epochs", refresh_every_n_epochs),
        ):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be >= 1, got {count}")
        for name, choice, choices in (
            ("fisher_normalization", fisher_normalization, get_args(Normalization)),
            ("task_metric", task_metric, get_args(TaskMetric)),
        ):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {choice!r}")
        self.alignment_dataloader, self.loss_fn = alignment_dataloader, loss_fn
        self.target_modules, self.tokenizer = target_modules, tokenizer
        self.lambda_task, self.lambda_collision = lambda_task, lambda_collision
        self.rank_out, self.rank_in, self.top_m, self.num_samples = rank_out, rank_in, top_m, num_samples
        self.fisher_normalization, self.task_metric = fisher_normalization, task_metric
        self.refresh_every_n_epochs = refresh_every_n_epochs
        self._penalty: dict[str, Any] = {
            "lambda_align": lambda_align,
            "lambda_task": lambda_task,
            "lambda_collision": lambda_collision,
            "alpha": alpha,
            "beta": beta,
            "tau": tau,
            "reduction": collision_reduction,
        }
        self.fisher: dict[str, KroneckerFisher] | None = None
        self._references: dict[str, Tensor] = {}
        self._layers: dict[str, _Layer] = {}
        self._groups: list[_LoraStack | _Weight] = []
        self._batches: list[Any] = []

    # --- before training ---

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise MisconfigurationException(
                f"AlignGuard does not work with {type(trainer.strategy).__name__}, whose parameters are not the "
                "layers' own: use strategy='ddp', or ModelParallelStrategy with fully_shard (FSDP2)"
            )
        if self.loss_fn is None and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "AlignGuard cannot take the loss from the training_step of a module with manual optimisation: give "
                "loss_fn(module, batch), which returns the losses of the batch's samples"
            )
        built_later = is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)
        layers = _find_layers(pl_module, self.target_modules, may_be_missing=built_later)
        if layers:
            rank_zero_info(f"AlignGuard guards {len(layers)} layers")
        source = self.alignment_dataloader
        named = isinstance(source, str) and source.isidentifier()  # which the path of a .jsonl file is not
        if named:
            source = named_loader(trainer, pl_module, str(source), "AlignGuard(alignment_dataloader=...)")
        self._batches = self._read(source)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate the Fisher information, unless a checkpoint or an earlier fit has brought it."""
        self._layers = _find_layers(pl_module, self.target_modules)  # anew, as the module has built and wrapped them
        if self.fisher is not None and set(self.fisher) != set(self._layers):
            differing = sorted(set(self.fisher) ^ set(self._layers))
            raise MisconfigurationException(
                f"AlignGuard's Fisher information is of other layers than it is to guard now: {_listed(differing)} "
                "differ. Resume with the same model and target_modules, or make a new AlignGuard"
            )
        if self.fisher is None:
            self._take_references()
            self._estimate(trainer, pl_module, adapters=False)
        self._make_groups()
        if self.refresh_every_n_epochs is None:
            self._batches = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate it anew where that is asked for."""
        every, epoch = self.refresh_every_n_epochs, trainer.current_epoch
        if every is not None and epoch > 0 and epoch % every == 0:
            self._estimate(trainer, pl_module, adapters=True)
            self._make_groups()

    def _read(self, source: Iterable[Any] | str | Path) -> list[Any]:
        """The first batches of the alignment data, the same ones on every process."""
        batches: list[Any] = []
        with isolate_rng():
            # A shuffled loader is to give every process the same order.
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002 - the global generator is what users' transforms draw from
            random.seed(0)
            if isinstance(source, (str, Path)):
                source = self._read_prompts(Path(source))
            elif isinstance(getattr(source, "sampler", None), DistributedSampler):
                raise MisconfigurationException(
                    "alignment_dataloader has a DistributedSampler, which repeats samples to fill up: give a loader "
                    "without one, AlignGuard shares the samples out itself"
                )
            samples = 0
            for batch in source:
                if not all(tensor.isfinite().all() for tensor in _tensors(batch) if tensor.is_floating_point()):
                    raise MisconfigurationException(
                        f"batch {len(batches)} of the alignment data holds NaN or infinite values: repair or drop it"
                    )
                batches.append(batch)
                samples += _num_rows(batch) or 1
                if samples >= self.num_samples:
                    break
        if not batches:
            raise MisconfigurationException(
                "the alignment data is empty: AlignGuard needs prompts with the aligned model's answers to know what "
                "is to be kept"
            )
        if self.loss_fn is None:
            batches = [sample for batch in batches for sample in _split(batch)][: self.num_samples]
        return batches

    def _read_prompts(self, path: Path) -> Iterator[dict[str, Tensor]]:
        if self.tokenizer is None:
            raise MisconfigurationException(
                f"the alignment data {str(path)!r} is text: give tokenizer, the model's own, or its name or directory"
            )
        tokenizer = load_tokenizer(self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer
        if not path.is_file():
            raise MisconfigurationException(f"alignment_dataloader: there is no file {str(path)!r}")
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    prompt, completion = row["prompt"], row["completion"]
                except (ValueError, TypeError, KeyError) as error:
                    raise MisconfigurationException(
                        f"{path}, line {number}: expected an object with prompt and completion, got "
                        f"{line.strip()!r:.200}"
                    ) from error
                if isinstance(prompt, str):
                    start = tokenizer(prompt)["input_ids"]
                else:
                    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
                    start = tokenizer(text, add_special_tokens=False)["input_ids"]
                answer = tokenizer(completion, add_special_tokens=False)["input_ids"]
                if tokenizer.eos_token_id is not None:
                    answer = [*answer, tokenizer.eos_token_id]
                ids = torch.tensor([[*start, *answer]])
                labels = ids.clone()
                labels[:, : len(start)] = -100
                yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def _estimate(self, trainer: Trainer, pl_module: LightningModule, adapters: bool) -> None:
        def loss(module: nn.Module, batch: Any) -> Tensor:
            rows = _num_rows(batch)
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            with (
                trainer.precision_plugin.forward_context(),
                torch.autocast(pl_module.device.type, enabled=False),
            ):
                losses = _training_loss(pl_module, batch) if self.loss_fn is None else self.loss_fn(pl_module, batch)
            if not losses.ndim and rows is not None and rows > 1:
                raise ValueError(
                    f"loss_fn returned a scalar for a batch of {rows} samples: return their losses, ({rows},), or give "
                    "batches of one sample"
                )
            return losses

        layers = {name: layer.module for name, layer in self._layers.items()}
        rank_zero_info(f"AlignGuard estimates the Fisher information of {len(layers)} layers")
        try:
            with isolate_rng(), _without_logging(pl_module), _adapters(pl_module, adapters):
                fisher = estimate_kronecker_fisher(
                    pl_module, layers, self._batches, loss, self.rank_out, self.rank_in, self.top_m
                )
            silent = [name for name, one in fisher.items() if not float(one.trace) > 0]
            self.fisher = normalize_fisher(fisher, self.fisher_normalization)
        except ValueError as error:
            raise MisconfigurationException(f"AlignGuard: {error}") from error
        if silent:
            rank_zero_warn(
                f"the alignment data gives no gradient at {len(silent)} of {len(layers)} layers, which stay unguarded: "
                f"{_listed(silent)}"
            )

    def _take_references(self) -> None:
        self._references = {
            name: _full(layer.module.weight).detach().clone()  # type: ignore[arg-type]
            for name, layer in self._layers.items()
            if layer.adapters is None
        }

    def _make_groups(self) -> None:
        """LoRA layers of the same shape are handled together: a step of many small products would be all overhead."""
        assert self.fisher is not None
        keep_weights = self.lambda_task or self.lambda_collision or self.refresh_every_n_epochs
        self._groups = []
        stacks: dict[Any, dict[str, list[_Adapter]]] = {}
        for name, layer in self._layers.items():
            device = next(layer.module.parameters()).device
            fisher = KroneckerFisher(*(field.to(device) for field in self.fisher[name]))
            self.fisher[name] = fisher
            if layer.adapters is None:
                reference = self._references[name].to(device)
                if not keep_weights and reference.shape != fisher.eigenvalues.shape:
                    reference = fisher.coefficients(reference.to(fisher.basis_out))
                self._references[name] = reference
                weight = cast(nn.Parameter, layer.module.weight)
                self._groups.append(_Weight(weight, fisher, self._curvature(fisher), reference, bool(keep_weights)))
            else:
                ranks = tuple(adapter.lora_A.shape[0] for adapter in layer.adapters)
                shapes = (fisher.basis_out.shape, fisher.basis_in.shape, ranks, device)
                stacks.setdefault(shapes, {})[name] = layer.adapters
        for members in stacks.values():
            fields = zip(*(self.fisher[name] for name in members), strict=True)
            stacked = KroneckerFisher(*(torch.stack(list(field)) for field in fields))
            for i, name in enumerate(members):  # views, so that memory holds it once
                self.fisher[name] = KroneckerFisher(*(field[i] for field in stacked))
            self._groups.append(_LoraStack(list(members.values()), stacked, self._curvature(stacked)))

    def _curvature(self, fisher: KroneckerFisher) -> Tensor:
        entries = fisher.basis_out.shape[-2] * fisher.basis_in.shape[-2]
        return fisher.trace / entries if self.task_metric == "scaled_identity" else torch.ones_like(fisher.trace)

    # --- training ---

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the penalty's gradient to what backward has left."""
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        wanted = {id(parameter) for parameter in parameters if parameter.grad is not None}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # Such an optimiser divides by the scale itself, later; for all others it has been done.
        divides = getattr(optimizer, "_step_supports_amp_scaling", False)
        scale = scaler.get_scale() if scaler is not None and divides else 1.0
        parts = []
        for group in self._groups:
            if any(id(parameter) in wanted for parameter in group.parameters()):
                energies, increments = group.penalty(self._penalty)
                parts.append(energies)
                _add_to_gradients([pair for pair in increments if id(pair[0]) in wanted], scale)
        if parts:
            pl_module.log_dict(self._summary(parts))

    def _summary(self, parts: list[FisherEnergies]) -> dict[str, Tensor | float]:
        def total(values: Iterable[Tensor | None]) -> Tensor:
            return torch.stack([value.sum() for value in values if value is not None]).sum()

        summary: dict[str, Tensor | float] = {
            "align_guard/align": total(part.align for part in parts),
            "align_guard/penalty": total(part.total for part in parts),
        }
        if any(part.task is not None for part in parts):
            summary["align_guard/task"] = total(part.task for part in parts)
        if any(part.overlap is not None for part in parts):
            summary["align_guard/overlap"] = total(part.overlap for part in parts)
            summary["align_guard/geodesic"] = 0.0
        return summary

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Fisher information and references by layer, plain tensors."""
        if self.fisher is None:
            return {}
        return {
            "fisher": {name: fisher._asdict() for name, fisher in self.fisher.items()},
            "references": self._references,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was estimated at the start of the run that is continued."""
        if state_dict:
            self.fisher = {name: KroneckerFisher(**fields) for name, fields in state_dict["fisher"].items()}
            self._references = dict(state_dict["references"])


# --- what is guarded -------------------------------------------------------------------------------------------------


class _Adapter(NamedTuple):
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float


class _Layer(NamedTuple):
    module: nn.Module
    adapters: list[_Adapter] | None  # None: its weight is trained itself


class _LoraStack:
    """LoRA layers of the same shape."""

    def __init__(self, layers: list[list[_Adapter]], fisher: KroneckerFisher, curvature: Tensor) -> None:
        self.layers, self.fisher, self.curvature = layers, fisher, curvature
        # Several adapters of a layer are one of all their ranks: [s_1 B_1, s_2 B_2] [A_1; A_2].
        columns = [[one.scaling for one in layer for _ in range(one.lora_A.shape[0])] for layer in layers]
        self.scaling = torch.tensor(columns, device=fisher.trace.device)[:, None]  # (L, 1, r)

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for layer in self.layers for adapter in layer for parameter in adapter[:2])

    def penalty(self, settings: dict[str, Any]) -> tuple[FisherEnergies, list[tuple[nn.Parameter, Tensor]]]:
        lora_A = torch.stack([_joined([one.lora_A for one in layer], 0) for layer in self.layers])
        lora_B = torch.stack([_joined([one.lora_B for one in layer], 1) for layer in self.layers])
        scaling = self.scaling.to(torch.promote_types(lora_B.dtype, torch.float32))
        energies, grad_A, grad_B = lora_fisher_penalty(
            lora_A, lora_B * scaling, 1.0, self.fisher, task_curvature=self.curvature, **settings
        )
        grad_B = grad_B * scaling
        increments: list[tuple[nn.Parameter, Tensor]] = []
        for layer, of_A, of_B in zip(self.layers, grad_A, grad_B, strict=True):
            ranks = [one.lora_A.shape[0] for one in layer]
            for one, part_A, part_B in zip(layer, of_A.split(ranks), of_B.split(ranks, 1), strict=True):
                increments += [(one.lora_A, part_A), (one.lora_B, part_B)]
        return energies, increments


class _Weight(NamedTuple):
    """A linear layer that is trained itself."""

    weight: nn.Parameter
    fisher: KroneckerFisher
    curvature: Tensor
    reference: Tensor  # the aligned weights, or only their coordinates
    whole: bool

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter([self.weight])

    def penalty(self, settings: dict[str, Any]) -> tuple[FisherEnergies, list[tuple[nn.Parameter, Tensor]]]:
        energies, gradient = weight_fisher_penalty(
            _full(self.weight),
            self.fisher,
            reference=self.reference if self.whole else None,
            reference_coefficients=None if self.whole else self.reference,
            task_curvature=self.curvature,
            **settings,
        )
        return energies, [(self.weight, gradient)]


def _joined(parameters: list[nn.Parameter], dim: int) -> Tensor:
    return _full(parameters[0]) if len(parameters) == 1 else torch.cat([_full(one) for one in parameters], dim)


def _full(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _add_to_gradients(increments: list[tuple[nn.Parameter, Tensor]], scale: float) -> None:
    plain: tuple[list[Tensor], list[Tensor]] = ([], [])
    for parameter, increment in increments:
        gradient = parameter.grad
        assert gradient is not None
        if scale != 1:
            increment = increment * scale
        if isinstance(gradient, DTensor):  # every process has the whole increment and takes its own part of it
            gradient.add_(
                distribute_tensor(
                    increment.to(gradient.dtype), gradient.device_mesh, gradient.placements, src_data_rank=None
                )
            )
        else:
            plain[0].append(gradient)
            plain[1].append(increment.to(gradient.dtype))
    if plain[0]:
        torch._foreach_add_(*plain)


class _NoLora(nn.Module):
    """Nothing is of this class."""


def _find_layers(
    module: nn.Module, targets: str | Sequence[str] | None, may_be_missing: bool = False
) -> dict[str, _Layer]:
    """The layers to guard by name, or the reason why there are none."""
    peft = sys.modules.get("peft.tuners.lora")  # no layer is of a package that was never imported
    lora_class: type[nn.Module] = peft.LoraLayer if peft is not None else _NoLora
    inner: set[int] = set()  # the parts of LoRA layers
    lora: dict[str, Any] = {}
    linear: dict[str, nn.Linear] = {}
    for name, part in module.named_modules():
        if isinstance(part, lora_class):
            lora[name] = part
            inner |= {id(one) for one in part.modules()}
        elif isinstance(part, nn.Linear) and id(part) not in inner:
            linear[name] = part
    if targets is None:
        chosen = list(lora)
        if not chosen and may_be_missing:
            return {}
        if not chosen:
            raise MisconfigurationException(
                f"AlignGuard found no LoRA layer in {type(module).__name__}: add adapters by peft's get_peft_model "
                f"with a LoraConfig, or name in target_modules the torch.nn.Linear layers to guard, of "
                f"{_listed(list(linear))}"
            )
    else:
        names = [*lora, *linear]
        chosen = []
        for target in [targets] if isinstance(targets, str) else targets:
            if isinstance(targets, str):
                found = [name for name in names if re.fullmatch(target, name)]
            else:
                found = [name for name in names if name == target or name.endswith("." + target)]
            if not found and may_be_missing:
                return {}
            if not found:
                near = difflib.get_close_matches(target, {*names, *(name.rsplit(".", 1)[-1] for name in names)})
                raise MisconfigurationException(
                    f"target_modules: no LoRA or torch.nn.Linear layer of {type(module).__name__} is called "
                    f"{target!r}; there are {_listed(near or names)}"
                )
            chosen += [name for name in found if name not in chosen]
    _check_initialisation(module, {adapter for name in chosen if name in lora for adapter in lora[name].lora_A})
    layers, skipped = {}, []
    for name in chosen:
        if name in linear:
            layers[name] = _linear_layer(name, linear[name])
        elif isinstance(lora[name].get_base_layer(), nn.Linear) or _is_conv1d(lora[name].get_base_layer()):
            layers[name] = _lora_layer(name, lora[name])
        elif targets is None:
            skipped.append(name)
        else:
            raise MisconfigurationException(
                f"AlignGuard: {name!r} adapts a {type(lora[name].get_base_layer()).__name__}; only linear layers can "
                "be guarded: leave it out of target_modules"
            )
    if skipped:
        rank_zero_warn(f"{len(skipped)} LoRA layers adapt no linear layer and are not guarded: {_listed(skipped)}")
    if layers and not any(
        parameter.requires_grad
        for layer in layers.values()
        for parameter in (
            [layer.module.weight] if layer.adapters is None else [p for a in layer.adapters for p in a[:2]]
        )
    ):
        raise MisconfigurationException(
            f"nothing of the {len(layers)} layers that AlignGuard is to guard is trained: their adapters or weights "
            "have requires_grad=False (loaded by peft with is_trainable=False?)"
        )
    if not layers:
        raise MisconfigurationException("AlignGuard: none of the LoRA layers adapts a linear layer")
    return layers


def _is_conv1d(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D"  # the linear layer of GPT-2 in transformers


def _check_initialisation(module: nn.Module, adapters: set[str]) -> None:
    for part in module.modules():
        configs = getattr(part, "peft_config", None)
        for adapter in adapters & set(configs if isinstance(configs, dict) else ()):
            method = getattr(configs[adapter], "init_lora_weights", True)  # type: ignore[index]
            if isinstance(method, str) and _CHANGES_BASE.fullmatch(method):
                raise MisconfigurationException(
                    f"adapter {adapter!r} was initialised by init_lora_weights={method!r}, which changes the base "
                    "weights, so that the adapter is not the update: use init_lora_weights=True or 'gaussian'"
                )


def _lora_layer(name: str, layer: Any) -> _Layer:
    _check_base(name, layer.get_base_layer(), layer)
    if layer.merged:
        raise MisconfigurationException(
            f"AlignGuard: the adapters of {name!r} are merged into the base weights: call unmerge_adapter() first"
        )
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    for adapter in active:
        variant = getattr(layer, "lora_variant", {}).get(adapter)
        if variant is not None or layer.use_dora.get(adapter):
            kind = "DoRA" if variant is None or "Dora" in type(variant).__name__ else type(variant).__name__
            raise MisconfigurationException(
                f"AlignGuard: adapter {adapter!r} of {name!r} is {kind}, whose update is not scaling * B A: use plain "
                "LoRA (use_dora=False)"
            )
    if not active:
        raise MisconfigurationException(
            f"AlignGuard: {name!r} has no active adapter: call set_adapter() with one of {list(layer.lora_A)}"
        )
    return _Layer(
        layer,
        [_Adapter(layer.lora_A[one].weight, layer.lora_B[one].weight, float(layer.scaling[one])) for one in active],
    )


def _linear_layer(name: str, layer: nn.Linear) -> _Layer:
    _check_base(name, layer, layer)
    if not layer.weight.requires_grad:
        raise MisconfigurationException(
            f"AlignGuard: the weight of {name!r} is frozen, so there is nothing to guard: leave it out of "
            "target_modules, or train it"
        )
    return _Layer(layer, None)


def _check_base(name: str, base: nn.Module, layer: nn.Module) -> None:
    weight = getattr(base, "weight", None)
    plain = type(weight) in (nn.Parameter, Tensor, DTensor)
    half_at_least = plain and weight.is_floating_point() and weight.element_size() >= 2  # type: ignore[union-attr]
    if not half_at_least or getattr(layer, "quantization_backend", None) is not None:
        kind = f"{type(weight).__name__}, {getattr(weight, 'dtype', 'no dtype')}"
        raise MisconfigurationException(
            f"AlignGuard: the base weight of {name!r} is quantised ({kind}): load the model in float32 or bfloat16, "
            "without quantization_config"
        )
    if isinstance(weight, DTensor) and any(
        size > 1 and "tensor" in axis
        for axis, size in zip(weight.device_mesh.mesh_dim_names or (), weight.device_mesh.shape, strict=False)
    ):
        raise MisconfigurationException(
            f"AlignGuard: {name!r} is divided by tensor parallelism, for which it was not made: use "
            "tensor_parallel_size=1"
        )


def _listed(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(repr(name) for name in names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


@contextmanager
def _adapters(module: nn.Module, enabled: bool) -> Iterator[None]:
    """With the adapters off, unless ``enabled``: at dW = 0 whatever they hold."""
    peft = sys.modules.get("peft.tuners.lora")
    lora = [] if enabled or peft is None else [part for part in module.modules() if isinstance(part, peft.LoraLayer)]
    # Switching sets requires_grad, by which a sharded network decides once and for all how it handles a parameter.
    trained = [(parameter, parameter.requires_grad) for layer in lora for parameter in layer.parameters()]

    def switch(on: bool) -> None:
        for layer in lora:
            layer.enable_adapters(on)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    with ExitStack() as stack:
        stack.callback(switch, True)
        switch(False)
        yield


# --- samples ---------------------------------------------------------------------------------------------------------


def _training_loss(module: LightningModule, batch: Any) -> Tensor:
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    output = module.training_step(batch, 0) if takes_index else module.training_step(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"training_step returned {type(output).__name__} for a sample of the alignment data, not a loss: give "
            "loss_fn(module, batch)"
        )
    return loss


@contextmanager
def _without_logging(module: LightningModule) -> Iterator[None]:
    """What training_step logs on alignment data is not to be seen among the training metrics."""
    own = vars(module).get("log")
    vars(module)["log"] = lambda *_, **__: None
    try:
        yield
    finally:
        del vars(module)["log"]
        if own is not None:
            vars(module)["log"] = own


def _leaves(batch: Any) -> Iterator[Any]:
    """Tensors, and lists of one plain value a sample."""
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from _leaves(value)
    elif isinstance(batch, (list, tuple)) and any(isinstance(one, (Tensor, Mapping, list, tuple)) for one in batch):
        for value in batch:
            yield from _leaves(value)
    elif isinstance(batch, (Tensor, list, tuple)):
        yield batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _leaves(batch) if isinstance(leaf, Tensor))


def _num_rows(batch: Any) -> int | None:
    """Samples of a batch, or None if that cannot be seen."""
    sizes = {len(leaf) for leaf in _leaves(batch) if not isinstance(leaf, Tensor) or leaf.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def _split(batch: Any) -> list[Any]:
    """The batch's samples, as batches of one."""
    rows = _num_rows(batch)
    if rows is None:
        raise MisconfigurationException(
            f"AlignGuard cannot divide a batch of type {type(batch).__name__} into its samples, since its parts differ "
            "in length or hold no tensor: give loss_fn(module, batch), which returns one loss a sample"
        )
    return [batch] if rows == 1 else [_take(batch, slice(i, i + 1)) for i in range(rows)]


def _take(batch: Any, rows: slice) -> Any:
    if isinstance(batch, Mapping):
        taken = {key: _take(value, rows) for key, value in batch.items()}
        return taken if type(batch) is dict else type(batch)(taken)  # type: ignore[call-arg]
    if isinstance(batch, (list, tuple)) and any(isinstance(one, (Tensor, Mapping, list, tuple)) for one in batch):
        parts = [_take(value, rows) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, (list, tuple)) or (isinstance(batch, Tensor) and batch.ndim):
        return batch[rows]
    return batch
