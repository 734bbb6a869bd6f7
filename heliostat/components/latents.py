"""Latents of an autoencoder of diffusers: from pictures to what is diffused, and back."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from heliostat.components.source_statistics import weights_fingerprint


class LatentScale(NamedTuple):
    """Latents as diffused are ``(latents - shift) * scale``; each of shape ``(c, 1, 1)`` or ``(1, 1, 1)``."""

    shift: Tensor
    scale: Tensor

    @classmethod
    def of(cls, vae: Any) -> LatentScale:
        """Read the configuration: ``scaling_factor``, ``shift_factor``, or ``latents_mean`` and ``latents_std``."""
        names = ("latents_mean", "latents_std", "shift_factor", "scaling_factor")
        mean, std, shift, factor = (getattr(vae.config, name, None) for name in names)
        shift = mean if mean is not None else shift or 0.0
        scale = torch.tensor(1.0 if factor is None else float(factor))
        if std is not None:
            scale = scale / torch.tensor(std)
        return cls(torch.tensor(shift, dtype=torch.float32).view(-1, 1, 1), scale.view(-1, 1, 1))


class PosteriorEncoder(nn.Module):
    """The encoder of an autoencoder: pictures in, mean and standard deviation of their latents out.

    Args:
        vae: An autoencoder of diffusers, such as ``AutoencoderKL``.

    Attributes:
        scale: How its latents are diffused.
        fingerprint: Hexadecimal digits; the same for the same weights and configuration.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scale = LatentScale.of(vae)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            pixel_values: Pictures ``(B, C, H, W)`` in [-1, 1].

        Returns:
            Mean and standard deviation of the latents, ``(B, 2, c, h, w)``; of an autoencoder that is not variational
            the latents alone, ``(B, 1, c, h, w)``; float32, not scaled.
        """
        with torch.autocast(pixel_values.device.type, enabled=False):
            output = self.vae.encode(pixel_values.to(self.vae.dtype))
        if hasattr(output, "latent_dist"):
            return torch.stack([output.latent_dist.mean, output.latent_dist.std], dim=1).float()
        return (output.latents if hasattr(output, "latents") else output.latent)[:, None].float()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of weights and configuration."""
        config = {name: value for name, value in self.vae.config.items() if not name.startswith("_")}
        identity = [weights_fingerprint(self.vae), str(self.vae.dtype), config]
        encoded = json.dumps(identity, sort_keys=True, default=str).encode()
        return hashlib.blake2b(encoded, digest_size=16).hexdigest()


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pictures ``(B, C, H, W)`` in [-1, 1], float32, of latents ``(B, c, h, w)`` as they are diffused."""
    shift, scale = (value.to(latents.device) for value in LatentScale.of(vae))
    with torch.autocast(latents.device.type, enabled=False):
        return vae.decode((latents.float() / scale + shift).to(vae.dtype)).sample.float().clamp(-1, 1)
