"""Networks in the TB2 format of `heliostat.components.two_bit`: from a configuration, from a state dict, under DDP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from heliostat.components.two_bit import TwoBitLinear, _matrix_of, quantize_model


def two_bit_network(
    network: nn.Module,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    four_bit_fraction: float = 0.125,
    outlier_fraction: float = 0.0025,
) -> nn.Module:
    """Quantise a network in place, to nearest, and return it: what a configuration writes around a frozen network.

    A ``fingerprint`` that the network has computed before is forgotten: caches keep what it makes under a new one.

    Args:
        network: Any module, in eval mode as it will run.
        include: See `heliostat.components.quantize_model`, as the following.
        exclude: Patterns of layers to leave.
        four_bit_fraction: f.
        outlier_fraction: p.

    Returns:
        ``network``.
    """
    quantize_model(
        network,
        include=include,
        exclude=exclude,
        four_bit_fraction=four_bit_fraction,
        outlier_fraction=outlier_fraction,
    )
    vars(network).pop("fingerprint", None)
    return network


def prepare_two_bit(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Replace the linear layers that a state dict holds in two bits by empty `TwoBitLinear` layers, in place.

    ``model.load_state_dict(state_dict)`` then fills them. Layers that are in two bits already stay, and biases are the
    same parameters as before.

    Args:
        model: Any module.
        state_dict: Its state dict, or one in which its names begin with ``prefix``.
        prefix: Ends with a dot.

    Returns:
        Names of the layers that were replaced.
    """
    replaced: dict[str, TwoBitLinear] = {}
    layers: dict[nn.Module, TwoBitLinear] = {}  # under all its names a layer stays one
    for name, module in model.named_modules(remove_duplicate=False):
        weight = None if isinstance(module, TwoBitLinear) or not name else _matrix_of(module)
        if weight is None or f"{prefix}{name}.codes" not in state_dict:
            continue
        if module not in layers:
            rows, columns = weight.shape  # if those of the state dict differ, loading will say so
            layers[module] = TwoBitLinear(columns, rows, bias=False, device=weight.device)
            layers[module].bias = getattr(module, "bias", None)
            layers[module].train(module.training)
        replaced[name] = layers[module]
    for name, layer in replaced.items():
        model.set_submodule(name, layer)
    return list(replaced)


def packed_names(model: nn.Module) -> list[str]:
    """Names of all buffers that hold packed weights, which DDP must leave alone.

    It would send them to all processes at every step, and NCCL knows no integers of 16 bits. As LightningModule, set
    ``self._ddp_params_and_buffers_to_ignore = packed_names(self)``.
    """
    return [
        f"{name}.{buffer}".removeprefix(".")
        for name, module in model.named_modules()
        if isinstance(module, TwoBitLinear)
        for buffer in module._buffers
    ]
