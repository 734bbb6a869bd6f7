"""Networks of timm, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from heliostat._extras import require


def timm_network(name: str, *, pretrained: bool, num_classes: int | None, in_channels: int | None) -> nn.Module:
    """Build a network of timm.

    Args:
        name: A name that timm knows, ``"local-dir:PATH"`` or ``"hf-hub:ID"``, the last two with their weights.
        pretrained: Load timm's pretrained weights.
        num_classes: Outputs of its last layer, which is new then; None: as it comes.
        in_channels: Channels of the pictures; None: as it comes.

    Raises:
        ValueError: If timm does not know the name.
        ModuleNotFoundError: If timm is not installed.
    """
    timm = require("timm", f"The network {name!r}")
    has_source = has_weights(name)
    if not has_source and not timm.is_model(name):
        raise ValueError(
            f"network={name!r} is no model of timm {timm.__version__}: timm.list_models('*{name[:6]}*') lists those of "
            "a like name; your own are written local-dir:PATH, those of the Hub hf-hub:ID"
        )
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}  # timm passes over None
    return timm.create_model(name, pretrained=pretrained or has_source, **arguments)


def has_weights(name: str) -> bool:
    """Whether a name stands for a network with its own weights."""
    return name.startswith(("local-dir:", "hf-hub:"))
