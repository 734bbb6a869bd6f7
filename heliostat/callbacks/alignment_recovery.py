"""Alignment recovery after fine-tuning (arXiv 2504.09757): as a callback, or on a saved transformers model."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import json
import re
import sys
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

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
from heliostat.callbacks._figures import run_directory
from heliostat.components.alignment_recovery import (
    Mode,
    RecoveryResult,
    RestorationLog,
    Rollback,
    check_settings,
    eligible_parameters,
    find_blocks,
    mean_representation,
    recover_alignment,
)
from heliostat.components.pooling import Pooling, pool_tokens

_FOLDABLE = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")  # of peft's LoRA layers: those with a plain weight
_NOT_IN_PLAIN_MODEL = re.compile(r"(^|\.)(lora_|original_module\.)")


class AlignmentRecovery(Callback):
    """Put a few weights of the fine-tuned module back to their aligned values, for as long as the task allows.

    Works on any module whose network has a list of blocks: fully fine-tuned, or with LoRA layers of peft. At the end of
    training (or every ``every_n_epochs``) it runs `heliostat.components.recover_alignment`, prints what was restored
    and undone, and leaves ``alignment_recovery.json`` and the weights, ``recovered.safetensors``, in the run's
    directory: checkpoints are written before the end of training and do not have them.

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
        harmful_rate: As ``task_score``, measured at every candidate; reported, and decides nothing.
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
        self._layout: _Layout | None = None
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
                "model, and recover it afterwards with heliostat.callbacks.alignment_recovery.recover_checkpoint"
            )
        if (names := self._metrics()) and not is_overridden("validation_step", pl_module):
            raise MisconfigurationException(
                f"AlignmentRecovery: {names[0]!r} names a metric, but {type(pl_module).__name__} has no "
                "validation_step to log it. Give a function of the module that returns the score"
            )
        for name, loader in self._loaders():
            _prompts(trainer, pl_module, loader, name)
        self._layout = layout = _find_layout(
            pl_module, self.layers, self.layer_end, self.exclude, self.network, fixed=self.reference is None
        )
        if layout.adapted and self.every_n_epochs is not None:
            raise MisconfigurationException(
                "AlignmentRecovery(every_n_epochs=...) cannot be used with LoRA, because folding the adapters takes "
                "what the optimiser trains. Leave every_n_epochs=None: recovery at the end of training"
            )
        self._aligned, self._fingerprint = {}, None
        if self.reference is not None:
            self._aligned = _reference(self.reference, pl_module, layout)
        else:
            self._aligned = {name: _on_cpu(pl_module.get_parameter(name)) for name in layout.trained}

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
            self.result = _run(
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
            return _block_output(pl_module, self._layout, batch, self.pooling)

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


def report(result: RecoveryResult) -> dict[str, Any]:
    """What a recovery did, in plain values."""
    return {
        "chosen_step": result.chosen_step,
        "used_rollback": result.used_rollback,
        "initial_score": result.initial_score,
        "warmup_score": result.warmup_score,
        "score_limit": result.score_limit,
        "history": [line._asdict() for line in result.history],
        "restored": result.log.counts(),
    }


def table(result: RecoveryResult) -> str:
    """The history as lines of text, with a mark at the chosen step."""
    reason = "" if result.warmup_score is None else f" (score after the warm-up: {result.warmup_score:.4g})"
    lines = [
        f"alignment recovery: score {result.initial_score:.4g}, limit {result.score_limit:.4g}, "
        f"{'with' if result.used_rollback else 'without'} rollback{reason}",
        f"{'step':>6} {'loss':>9} {'restored':>10} {'undone':>10} {'share':>8} {'score':>9} {'harmful':>9}",
    ]
    for line in result.history:
        score, harmful = ("" if v is None else f"{v:.4f}" for v in (line.score, line.harmful_rate))
        mark = " <- chosen" if line.step == result.chosen_step else ""
        lines.append(
            f"{line.step:6} {line.loss:9.4f} {line.restored:10} {line.undone:10} {line.restored_share:8.3%} "
            f"{score:>9} {harmful:>9}{mark}"
        )
    if result.chosen_step == 0:
        lines.append("nothing was restored: " + ("the first candidate failed" if result.history else "nothing differs"))
    return "\n".join(lines)


# --- which weights ---------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """Names within the module."""

    network: str
    block: str  # the last that is kept
    eligible: list[str]
    relevant: list[str]  # all parameters but those of adapters and of the blocks above, which h does not depend on
    trained: list[str]  # those that training changes directly
    base: list[str]  # those that folding the LoRA layers changes
    adapted: list[str]  # the LoRA layers
    num_hidden: int


def _find_layout(
    module: nn.Module,
    layers: str | Sequence[str] | None,
    layer_end: int | None,
    exclude: Sequence[str],
    network: str | None,
    *,
    fixed: bool,
) -> _Layout:
    """Find blocks and parameters; ``fixed``: what is neither trained nor adapted is aligned and stays out."""
    try:
        layers = find_blocks(module) if layers is None else layers
        names = [layers] if isinstance(layers, str) else list(layers)
        if len(names) == 1:
            names = [f"{names[0]}.{child}".lstrip(".") for child, _ in module.get_submodule(names[0]).named_children()]
        blocks = [module.get_submodule(name) for name in names]
        end = max(1, 2 * len(blocks) // 3) if layer_end is None else layer_end
        params, num_hidden = eligible_parameters(module, blocks, end, exclude=exclude)
        module.get_submodule(network or "")
    except (ValueError, AttributeError) as error:
        raise MisconfigurationException(f"AlignmentRecovery(layers, layer_end, network): {error}") from error
    _refuse_quantised(module, params)
    adapted = _lora_layers(module)
    above = {id(p) for block in blocks[end:] for p in block.parameters()}
    above -= {id(p) for block in blocks[:end] for p in block.parameters()}
    named = {n: p for n, p in module.named_parameters() if not _NOT_IN_PLAIN_MODEL.search(n) and id(p) not in above}
    trained = [name for name, p in named.items() if p.requires_grad]
    base = [name for own in adapted.values() for name in own if name in named]
    if fixed:
        params = {name: p for name, p in params.items() if name in {*trained, *base}}
    if not params:
        raise MisconfigurationException(
            f"AlignmentRecovery: no parameter of the first {end} of {len(blocks)} blocks ({names[0]} ...) is "
            + (f"left by exclude={list(exclude)}" if exclude else "trained, or has a LoRA layer")
            + ". Check layers and layer_end, or train the blocks"
        )
    if network is None:
        child = names[0].split(".")[0]
        common = all(name.split(".")[0] == child for name in names)
        callable_child = common and child not in names and not isinstance(module.get_submodule(child), nn.ModuleList)
        network = child if callable_child else ""
    return _Layout(network, names[end - 1], [*params], [*named], trained, base, [*adapted], num_hidden)


def _lora_layers(module: nn.Module) -> dict[str, list[str]]:
    """LoRA layers of peft and the parameters that folding them changes; what cannot be folded is refused."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {}
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]
    layer: Any
    for name, layer in layers:
        plain = isinstance(layer, LoraLayer) and type(layer).__name__ in _FOLDABLE and not layer.lora_variant
        if not plain or layer.merged_adapters:
            state = "has merged adapters already" if plain else "is no plain LoRA layer"
            raise MisconfigurationException(
                f"AlignmentRecovery: {name} ({type(layer).__name__}) {state}, so its aligned weight is not known. "
                "Save the model after peft's merge_and_unload(), and recover it with reference= or recover_checkpoint"
            )
        adapted[name] = [f"{name}.base_layer.{own}" for own, _ in layer.base_layer.named_parameters(recurse=False)]
    return adapted


def _refuse_quantised(module: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
    quantised = [type(m).__name__ for m in module.modules() if getattr(m, "is_quantized", False)]
    narrow = [f"{n} ({p.dtype})" for n, p in params.items() if not p.is_floating_point() or p.element_size() < 2]
    if quantised or narrow:
        raise MisconfigurationException(
            f"AlignmentRecovery: {[*quantised, *narrow][0]} is quantised, and single weights of it cannot be restored. "
            "Load the model in float32 or bfloat16, merge the adapter there, and recover that"
        )
    if empty := [name for name, p in params.items() if p.is_meta]:
        raise MisconfigurationException(
            f"AlignmentRecovery: {empty[0]} has no values in setup. Load the weights in the module's __init__, not in "
            "configure_model"
        )


def _plain_name(name: str) -> str:
    """Name of a parameter in the model without adapters."""
    name = re.sub(r"\.base_layer(?=\.)|\.modules_to_save\.[^.]+", "", name)
    return re.sub(r"(^|\.)base_model\.model\.", r"\1", name)


class _Renamed(Mapping[str, Tensor]):
    """Tensors of another mapping under our names."""

    def __init__(self, source: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.source, self.names = source, names

    def __getitem__(self, name: str) -> Tensor:
        return self.source[self.names[name]]

    def __contains__(self, name: object) -> bool:  # the inherited one would read the tensor
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Safetensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, or of a transformers model's directory, each read when asked for."""

    def __init__(self, path: Path) -> None:
        index = path / "model.safetensors.index.json"
        if index.is_file():
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self.files = {name: path / file for name, file in places.items()}
            return
        file = path / "model.safetensors" if path.is_dir() else path
        if not file.is_file() or file.suffix != ".safetensors":
            raise MisconfigurationException(
                f"AlignmentRecovery: no safetensors weights at {path}. Name a .safetensors file, or a directory "
                "written by save_pretrained of transformers"
            )
        self.files = dict.fromkeys(_open(file).keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        return _open(self.files[name]).get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(_open(self.files[name]).get_slice(name).get_shape())


@functools.lru_cache(maxsize=64)
def _open(file: Path) -> Any:
    return require("safetensors", "Reading aligned weights").safe_open(file, framework="pt")


def _reference(reference: str | Path | Mapping[str, Tensor], module: nn.Module, layout: _Layout) -> _Renamed:
    """The aligned weights under the module's names; refused if one that may be restored is missing or differs."""
    source = reference if isinstance(reference, Mapping) else _Safetensors(Path(reference))
    parts = _plain_name(layout.eligible[0]).split(".")
    prefixes = ("".join(f"{part}." for part in parts[:i]) for i in range(len(parts)))
    prefix = next((p for p in prefixes if _plain_name(layout.eligible[0]).removeprefix(p) in source), None)
    if prefix is None:
        raise MisconfigurationException(
            f"AlignmentRecovery: reference has no weight for {_plain_name(layout.eligible[0])}; it has "
            f"{', '.join(itertools.islice(source, 3))}, ... Give the aligned weights of the same architecture"
        )
    names, unmatched = {}, []
    for name in layout.relevant:
        key, parameter = _plain_name(name).removeprefix(prefix), module.get_parameter(name)
        if key not in source:
            unmatched.append((name, "missing"))
            continue
        shape = source.shape(key) if isinstance(source, _Safetensors) else tuple(source[key].shape)
        if shape == tuple(parameter.shape):
            names[name] = key
        else:
            unmatched.append((name, f"{shape} instead of {tuple(parameter.shape)}"))
    if wrong := [f"{name}: {what}" for name, what in unmatched if name in layout.eligible]:
        raise MisconfigurationException(
            f"AlignmentRecovery: {len(wrong)} parameters differ from reference in name or shape "
            f"({'; '.join(wrong[:3])}). Give the aligned weights of the same architecture"
        )
    if unmatched:
        rank_zero_warn(
            f"AlignmentRecovery: {len(unmatched)} parameters are not in reference and are taken as they are: "
            + ", ".join(name for name, _ in unmatched[:4])
        )
    return _Renamed(source, names)


# --- the run ---------------------------------------------------------------------------------------------------------


def _run(
    module: nn.Module,
    layout: _Layout,
    aligned: Mapping[str, Tensor],
    represent: Callable[[Any], Tensor],
    harmful: list[Any],
    task: list[Any],
    score: Callable[[], float],
    *,
    harmful_rate: Callable[[], float] | None,
    settings: Mapping[str, Any],
) -> RecoveryResult:
    """Fold the adapters, take the aligned model's direction, recover."""
    named = dict(module.named_parameters())
    base = {name: _on_cpu(named[name]) for name in layout.base if name not in aligned}
    for name in layout.adapted:
        _fold(module.get_submodule(name))
    values = ChainMap(dict(base), aligned)  # type: ignore[arg-type]
    with _weights(named, values):
        direction = mean_representation(represent, harmful)
    return recover_alignment(
        {name: named[name] for name in layout.eligible},
        values,
        represent,
        harmful,
        task,
        score,
        harmful_direction=direction,
        num_hidden=layout.num_hidden,
        harmful_rate=harmful_rate,
        **settings,
    )


def _fold(layer: Any) -> None:
    """Add a LoRA layer's update to its base weight and make the update zero, so that the layer stays what it is."""
    if layer.disable_adapters:
        return
    layer.merge()
    for adapter in layer.merged_adapters:
        for factors in (layer.lora_B, layer.lora_embedding_B):
            if adapter in factors:
                factor = factors[adapter]
                for parameter in factor.parameters() if isinstance(factor, nn.Module) else (factor,):
                    parameter.detach().zero_()
    layer.merged_adapters.clear()


def _on_cpu(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", copy=True)


@contextmanager
def _weights(named: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values in the parameters meanwhile; what they replace waits in CPU memory."""
    parked = {}
    try:
        for name in values:
            value = values[name].to(named[name])
            if not torch.equal(value, named[name]):
                parked[name] = _on_cpu(named[name])
                named[name].detach().copy_(value)
        yield
    finally:
        for name, value in parked.items():
            named[name].detach().copy_(value)


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
        owners = (trainer.datamodule, pl_module)  # type: ignore[attr-defined]
        methods = [method for owner in owners if callable(method := getattr(owner, loader, None))]
        if not methods:
            raise MisconfigurationException(
                f"AlignmentRecovery({name}_dataloader={loader!r}): neither the data module nor "
                f"{type(pl_module).__name__} has a method of that name. Add it, or give the batches"
            )
        loader = methods[0]()
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


def _block_output(module: nn.Module, layout: _Layout, batch: Any, pooling: Pooling) -> Tensor:
    """Call the network and pool what the last kept block returns."""
    outputs: list[Any] = []

    def keep(block: nn.Module, args: object, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, (tuple, list)) else output)
        torch.set_grad_enabled(False)  # what comes after h needs no graph

    handle = module.get_submodule(layout.block).register_forward_hook(keep)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # restores the mode
            _call(module.get_submodule(layout.network), batch)
    finally:
        handle.remove()
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].ndim not in (2, 3):
        got = [tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__ for h in outputs]
        raise ValueError(
            f"{layout.block} must return (B, d) or (B, T, d) once in a forward, got {got or 'no call'}. Say by "
            "representation_fn what the representation is"
        )
    h = outputs[0]
    if h.ndim == 2:
        return h
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None or mask.shape != h.shape[:2]:
        mask = torch.ones(h.shape[:2], device=h.device)
    return pool_tokens([h], mask, pooling)


def _call(network: nn.Module, batch: Any) -> Any:
    """Call with those of a dict's tensors whose names the network knows, or else with the first tensor."""
    if not isinstance(batch, Mapping):
        return network(batch[0] if isinstance(batch, (tuple, list)) else batch)
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name != "labels"}
    unwrapped: Any = network.get_base_model() if hasattr(network, "get_base_model") else network  # type: ignore[operator]
    known = inspect.signature(unwrapped.forward).parameters
    named = {name: value for name, value in inputs.items() if name in known}
    return network(**named) if named else network(*itertools.islice(inputs.values(), 1))


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
        if isinstance(value, Tensor) and not _NOT_IN_PLAIN_MODEL.search(name) and place not in seen:
            seen.add(place)
            state[_plain_name(name)] = value.contiguous()
    file.parent.mkdir(parents=True, exist_ok=True)
    require("safetensors.torch", "AlignmentRecovery").save_file(state, file, metadata={"format": "pt"})


# --- a saved model ---------------------------------------------------------------------------------------------------


def recover_checkpoint(
    checkpoint: str | Path,
    aligned: str | Path,
    output: str | Path,
    harmful_prompts: Sequence[str] | str | Path,
    task_examples: Sequence[Mapping[str, str]] | str | Path,
    *,
    task_score: Callable[[Any], float] | None = None,
    harmful_rate: Callable[[Any], float] | None = None,
    layers: str | Sequence[str] | None = None,
    layer_end: int | None = None,
    exclude: Sequence[str] = (),
    batch_size: int = 8,
    max_length: int = 512,
    device: str | torch.device | None = None,
    **settings: Any,
) -> RecoveryResult:
    """Recover a saved causal language model of transformers, and save the result beside a report.

    Works in float32; the result is saved in the precision of the checkpoint's weights. Prompts are taken as they are
    written: put the chat template into them.

    Args:
        checkpoint: Directory of the fine-tuned model, or of a LoRA adapter of peft, whose base is ``aligned``.
        aligned: Directory of the aligned model, with safetensors weights, which are read one at a time.
        output: Directory to write; must not exist, or be empty.
        harmful_prompts: Texts, or a file: ``.jsonl`` with a field ``prompt``, or any other with one prompt a line.
        task_examples: Dicts with ``prompt`` and ``answer``, or a ``.jsonl`` file of them.
        task_score: Called with the model, returns a number. Default: the share of the answers' tokens that the model
            predicts rightly after the prompt and the tokens before.
        harmful_rate: Called with the model at every candidate; reported only.
        layers: See `AlignmentRecovery`.
        layer_end: See `AlignmentRecovery`.
        exclude: See `AlignmentRecovery`.
        batch_size: Prompts a batch; part of the method.
        max_length: Tokens kept of a text, its last ones.
        device: Default: CUDA if there is one.
        **settings: As of `heliostat.components.recover_alignment`.

    Returns:
        What was done.

    Raises:
        MisconfigurationException: As `AlignmentRecovery` does.
        ValueError: On settings out of range, or files that do not have what is needed.
    """
    transformers = require("transformers", "recover_checkpoint")
    checkpoint, aligned, output = Path(checkpoint), Path(aligned), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists. Name a new directory")
    prompts = [row["prompt"] for row in _rows(harmful_prompts, "harmful_prompts", ("prompt",))]
    examples = _rows(task_examples, "task_examples", ("prompt", "answer"))
    source = _Safetensors(aligned)
    is_adapter = (checkpoint / "adapter_config.json").is_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(aligned if is_adapter else checkpoint)
    saved_as = next(p.dtype for p in model.parameters())
    if is_adapter:
        model = require("peft", "A LoRA adapter").PeftModel.from_pretrained(model, checkpoint)
    layout = _find_layout(model, layers, layer_end, exclude, "", fixed=False)
    model.float().eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer_at = checkpoint if (checkpoint / "tokenizer_config.json").is_file() else aligned
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_at)

    def batches(texts: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
        return [_padded(texts[i : i + batch_size], model.device) for i in range(0, len(texts), batch_size)]

    def encode(text: str) -> list[int]:
        return tokenizer(text)["input_ids"][-max_length:]

    def answers_predicted() -> float:
        right = total = 0
        for start in range(0, len(examples), batch_size):
            pairs = [
                (encode(e["prompt"]), tokenizer(e["answer"], add_special_tokens=False)["input_ids"])
                for e in examples[start : start + batch_size]
            ]
            batch = _padded([[*prompt, *answer] for prompt, answer in pairs], model.device)
            predicted = model(**batch).logits.argmax(-1).cpu()
            for row, (prompt, answer) in zip(predicted, pairs, strict=True):
                own = row[len(prompt) - 1 :][: len(answer)]
                right, total = right + int((own == torch.tensor(answer)).sum()), total + len(answer)
        return right / total

    result = _run(
        model,
        layout,
        _reference(source, model, layout),
        lambda batch: _block_output(model, layout, batch, "last"),
        batches([encode(prompt) for prompt in prompts]),
        batches([encode(example["prompt"]) for example in examples]),
        answers_predicted if task_score is None else functools.partial(task_score, model),
        harmful_rate=functools.partial(harmful_rate, model) if harmful_rate else None,
        settings=settings,
    )
    rank_zero_info(table(result))
    model = model.merge_and_unload() if is_adapter else model  # the adapter is zero: nothing but the wrapping goes
    model.to(saved_as).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "alignment_recovery.json").write_text(json.dumps(report(result), indent=1), encoding="utf-8")
    return result


def _padded(texts: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Token ids padded on the right, with their mask."""
    length = max(len(text) for text in texts)
    ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _rows(source: Sequence[Any] | str | Path, name: str, fields: Sequence[str]) -> list[dict[str, str]]:
    if isinstance(source, (str, Path)):
        lines = [line for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
        source = [json.loads(line) for line in lines] if Path(source).suffix == ".jsonl" else lines
    rows = [{"prompt": row} if isinstance(row, str) else dict(row) for row in source]
    for number, row in enumerate(rows, start=1):
        if missing := [field for field in fields if not row.get(field)]:
            raise ValueError(f"{name}: entry {number} has no {' and '.join(missing)}; it has {', '.join(row)}")
    if not rows:
        raise ValueError(f"{name} is empty")
    return rows
