"""Alignment recovery on any module: which weights, from where, and the run; for the callback and saved models."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import re
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from heliostat._extras import require
from heliostat.components.alignment_recovery import (
    RecoveryResult,
    eligible_parameters,
    find_blocks,
    mean_representation,
    recover_alignment,
)
from heliostat.components.pooling import Pooling, pool_tokens

_FOLDABLE = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")  # of peft's LoRA layers: those with a plain weight
NOT_IN_PLAIN_MODEL = re.compile(r"(^|\.)(lora_|original_module\.)")


def report(result: RecoveryResult) -> dict[str, Any]:
    """What a recovery did, in plain values."""
    return {
        "chosen_step": result.chosen_step,
        "used_rollback": result.used_rollback,
        "initial_score": result.initial_score,
        "initial_harmful_rate": result.initial_harmful_rate,
        "warmup_score": result.warmup_score,
        "score_limit": result.score_limit,
        "history": [line._asdict() for line in result.history],
        "restored": result.log.counts(),
    }


def figure(reports: Sequence[Mapping[str, Any]]) -> Any:
    """Score and harmful rate over the steps, one panel for each recovery, as a `matplotlib.figure.Figure`."""
    figure_class = require("matplotlib.figure", "The picture of a recovery").Figure
    drawn = figure_class(figsize=(5 * len(reports), 3.4), layout="constrained")
    for place, one in enumerate(reports, start=1):
        axes = drawn.add_subplot(1, len(reports), place)
        axes.axhline(one["score_limit"], color="C0", linestyle=":", label="limit of the score")
        for name, label in (("score", "task score"), ("harmful_rate", "harmful rate")):
            points = [(line["step"], line[name]) for line in one["history"] if line[name] is not None]
            if one[f"initial_{name}"] is not None:
                steps, values = zip((0, one[f"initial_{name}"]), *points, strict=True)
                axes.plot(steps, values, marker="o", markersize=3, label=label)
        axes.axvline(one["chosen_step"], color="0.5", linestyle="--", label="chosen")
        axes.set(xlabel="recovery step", title=f"after epoch {one['epoch']}" if len(reports) > 1 else None)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize="small")
    return drawn


def table(result: RecoveryResult) -> str:
    """The history as lines of text, with a mark at the chosen step."""
    reason = "" if result.warmup_score is None else f" (score after the warm-up: {result.warmup_score:.4g})"
    lines = [
        f"alignment recovery: score {result.initial_score:.4g}, limit {result.score_limit:.4g}, "
        f"{'with' if result.used_rollback else 'without'} rollback{reason}",
        f"{'step':>6} {'loss':>9} {'restored':>10} {'undone':>10} {'share':>8} {'score':>9} {'harmful':>9}",
        f"{0:6} {'':9} {0:10} {0:10} {0:8.3%} {_shown(result.initial_score)} {_shown(result.initial_harmful_rate)}",
    ]
    for line in result.history:
        mark = " <- chosen" if line.step == result.chosen_step else ""
        lines.append(
            f"{line.step:6} {line.loss:9.4f} {line.restored:10} {line.undone:10} {line.restored_share:8.3%} "
            f"{_shown(line.score)} {_shown(line.harmful_rate)}{mark}"
        )
    if result.chosen_step == 0:
        lines.append("nothing was restored: " + ("the first candidate failed" if result.history else "nothing differs"))
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return f"{'' if value is None else format(value, '.4f'):>9}"


class Layout(NamedTuple):
    """Names within the module."""

    network: str
    block: str  # the last that is kept
    eligible: list[str]
    relevant: list[str]  # all parameters but those of adapters and of the blocks above, which h does not depend on
    trained: list[str]  # those that training changes directly
    base: list[str]  # those that folding the LoRA layers changes
    adapted: list[str]  # the LoRA layers
    num_hidden: int


def find_layout(
    module: nn.Module,
    layers: str | Sequence[str] | None,
    layer_end: int | None,
    exclude: Sequence[str],
    network: str | None,
    *,
    fixed: bool,
) -> Layout:
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
    named = {n: p for n, p in module.named_parameters() if not NOT_IN_PLAIN_MODEL.search(n) and id(p) not in above}
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
    return Layout(network, names[end - 1], [*params], [*named], trained, base, [*adapted], num_hidden)


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


def plain_name(name: str) -> str:
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


class Safetensors(Mapping[str, Tensor]):
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


def read_reference(reference: str | Path | Mapping[str, Tensor], module: nn.Module, layout: Layout) -> _Renamed:
    """The aligned weights under the module's names; refused if one that may be restored is missing or differs."""
    source = reference if isinstance(reference, Mapping) else Safetensors(Path(reference))
    parts = plain_name(layout.eligible[0]).split(".")
    prefixes = ("".join(f"{part}." for part in parts[:i]) for i in range(len(parts)))
    prefix = next((p for p in prefixes if plain_name(layout.eligible[0]).removeprefix(p) in source), None)
    if prefix is None:
        raise MisconfigurationException(
            f"AlignmentRecovery: reference has no weight for {plain_name(layout.eligible[0])}; it has "
            f"{', '.join(itertools.islice(source, 3))}, ... Give the aligned weights of the same architecture"
        )
    names, unmatched = {}, []
    for name in layout.relevant:
        key, parameter = plain_name(name).removeprefix(prefix), module.get_parameter(name)
        if key not in source:
            unmatched.append((name, "missing"))
            continue
        shape = source.shape(key) if isinstance(source, Safetensors) else tuple(source[key].shape)
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


def run_recovery(
    module: nn.Module,
    layout: Layout,
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
    base = {name: on_cpu(named[name]) for name in layout.base if name not in aligned}
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


def on_cpu(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", copy=True)


@contextmanager
def _weights(named: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values in the parameters meanwhile; what they replace waits in CPU memory."""
    parked = {}
    try:
        for name in values:
            value = values[name].to(named[name])
            if not torch.equal(value, named[name]):
                parked[name] = on_cpu(named[name])
                named[name].detach().copy_(value)
        yield
    finally:
        for name, value in parked.items():
            named[name].detach().copy_(value)


def block_output(module: nn.Module, layout: Layout, batch: Any, pooling: Pooling) -> Tensor:
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
