"""SoftREPA (arXiv 2503.08250): tune soft text tokens of a frozen text-to-image denoiser by contrast of its errors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from heliostat.components import diffusion
from heliostat.components.distributed import default_group, gather_rows
from heliostat.components.softrepa import (
    SoftTokenBank,
    attach_soft_tokens,
    denoising_contrastive_loss,
    error_grid,
    median_error,
)
from heliostat.components.source_statistics import weights_fingerprint
from heliostat.lit_models._hparams import save_plain_hyperparameters
from heliostat.lit_models._optimization import Schedule
from heliostat.lit_models.diffusion import Diffusion

FILENAME = "soft_tokens.safetensors"
_OF_PROMPTS = ("prompt_embeds", "pooled_prompt_embeds", "labels")
_BASE = "denoiser."


class SoftREPA(Diffusion):
    """Train soft tokens so that each picture is denoised better under its own prompt than under the others.

    The denoiser is frozen, in evaluation mode, and the tokens are attached to it for good: validation, sampling and
    both branches of guidance see them, but for ``with module.soft_tokens.disabled():``. A step takes the N pictures of
    a batch under the M prompts of all processes, N M calls in all, with one time and one noise map, the same for all
    pairs and processes: n processes give the step of one with the whole batch, if each has as many pictures. Prompts
    that repeat a picture's own (in ``text`` or ``prompt_embeds``) are no negatives of it. Train without dropped
    conditions (``condition_dropout: 0``).

    Checkpoints hold the tokens and not the denoiser, but a hash of its weights: they load only into a module that is
    made with the same ones. There is one exception: weights that were loaded into the module after it was made, as
    from a stage before, could not be had again by making it, so they stay in its checkpoints.

    Logged besides what `heliostat.Diffusion` logs, in training: ``accuracy`` (of retrieving the own prompt),
    ``positive_error``, ``negative_error``, ``saturated`` (see `heliostat.components.denoising_contrastive_loss`) and
    ``temperature``. ``caption_gap`` in evaluation is what the method widens.

    Args:
        denoiser: A UNet2DConditionModel or SD3Transformer2DModel of diffusers, trained; or a directory or hub id of a
            model or pipeline.
        scheduler: See `heliostat.Diffusion`.
        num_tokens: m, of each layer.
        num_layers: K, blocks of an SD3 with tokens; default: 5, or all if there are fewer. Not for UNets.
        stages: Of a UNet, see `heliostat.components.attach_soft_tokens`; so is the next. Default: ``("down",)``.
        position: Default: 1.
        num_time_buckets: See `heliostat.components.SoftTokenBank`.
        init: What tokens start at, besides noise: ``"normal"`` for nothing; ``"first_token"``, of a UNet, for what the
            prompts of the first batch begin with, as the released code does for SD 1.5.
        init_std: Standard deviation of the noise.
        temperature: tau > 0; ``"auto"`` for the median positive error of the first batch; or a function of the
            timestep, ``()``.
        logit_scale: a.
        denoising_weight: w; the released code has 0 for SD3, 10 for SD 1.5 and XL.
        chunk_size: Pairs that pass through the denoiser at once, see
            `heliostat.components.pairwise_denoising_errors`. None: all.
        path: See `heliostat.Diffusion`; so are the next two.
        optimizer: Makes the optimizer of the tokens.
        lr_scheduler: Its schedule.

    Raises:
        ValueError: For settings out of range, or that do not fit the denoiser.
        MisconfigurationException: A batch lacks prompts, or a checkpoint belongs to another denoiser.
    """

    _started: Tensor
    _found_temperature: Tensor

    def __init__(
        self,
        denoiser: str | nn.Module,
        scheduler: Any = None,
        *,
        num_tokens: int = 4,
        num_layers: int | None = None,
        stages: Sequence[str] | None = None,
        position: int | None = None,
        num_time_buckets: int | None = 100,
        init: Literal["normal", "first_token"] = "normal",
        init_std: float = 0.02,
        temperature: float | Literal["auto"] | Callable[[Tensor], Tensor] = 0.07,
        logit_scale: float = 4.0,
        denoising_weight: float = 0.0,
        chunk_size: int | None = None,
        path: diffusion.Path = "linear",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-4),
        lr_scheduler: Schedule | LRSchedulerCallable = "constant",
    ) -> None:
        super().__init__(denoiser, scheduler, path=path, optimizer=optimizer, lr_scheduler=lr_scheduler)
        save_plain_hyperparameters(self)
        self.bank = SoftTokenBank.for_model(
            self.denoiser, num_tokens, num_layers, num_time_buckets=num_time_buckets, init_std=init_std
        )
        if init not in ("normal", "first_token"):
            raise ValueError(f"init must be 'normal' or 'first_token', got {init!r}")
        if init == "first_token":
            if self.bank.num_layers is not None:
                raise ValueError("init='first_token' is of UNets; the tokens of an SD3 are no prompt embeddings")
            self.register_buffer("_started", torch.zeros((), dtype=torch.bool))
        if isinstance(temperature, str):
            if temperature != "auto":
                raise ValueError(f"temperature must be > 0, 'auto' or a function, got {temperature!r}")
            self.register_buffer("_found_temperature", torch.tensor(torch.nan))
        elif not callable(temperature) and not temperature > 0:
            raise ValueError(f"temperature must be > 0, 'auto' or a function, got {temperature}")
        self.init, self.temperature = init, temperature
        self.logit_scale, self.denoising_weight, self.chunk_size = logit_scale, denoising_weight, chunk_size
        self.denoiser.requires_grad_(False)
        self.soft_tokens = attach_soft_tokens(self.denoiser, self.bank, stages, position)
        self._base_was_loaded = False
        self._fingerprint: str | None = None
        self.register_load_state_dict_pre_hook(_complete)
        self.train()

    def train(self, mode: bool = True) -> SoftREPA:
        """Set training mode, in which the denoiser stays in evaluation mode."""
        super().train(mode)
        self.denoiser.eval()
        return self

    # --- training ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Start at the prompts' first token, if so asked."""
        if self.init == "first_token" and not self._started:
            self.bank.tokens.add_(gather_rows(self._prompts(batch)["prompt_embeds"][:, 0]).mean(0))
            self._started.fill_(True)

    def draw(self, clean: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """One noise map and one time for all rows of all processes: those of the first process."""
        noise, t = (gather_rows(x)[:1] for x in super().draw(clean[:1], batch))
        return noise.expand_as(clean), t.expand(len(clean))

    def training_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrastive loss of this process's pictures among all processes' prompts."""
        clean = self.clean(batch)
        noised = self.noised(clean, *self.draw(clean, batch))
        group = default_group()
        first = 0 if group is None else group.rank() * len(clean)
        own = self._prompts(batch)
        prompts = {name: gather_rows(value) for name, value in own.items()}

        def denoise(i: Tensor, j: Tensor) -> Tensor:
            conditions = {name: value[j] for name, value in prompts.items()}
            conditions |= {name: batch[name][i] for name in ("latents", "time_ids") if name in batch}
            return self(noised.noisy[i], noised.timestep[i], conditions)

        errors = error_grid(denoise, noised.target, len(prompts["prompt_embeds"]), self.chunk_size)
        targets = torch.arange(first, first + len(clean), device=errors.device)
        temperature = self._temperature(errors.detach().gather(1, targets[:, None])[:, 0], noised.timestep)
        parts = denoising_contrastive_loss(
            errors,
            targets,
            temperature=temperature,
            logit_scale=self.logit_scale,
            denoising_weight=self.denoising_weight,
            negative_mask=self._repeated(batch, own["prompt_embeds"], prompts["prompt_embeds"]),
        )._asdict()
        return parts.pop("loss"), {**parts, "temperature": torch.as_tensor(temperature, device=errors.device)}

    def _prompts(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What of a batch belongs to its prompts."""
        self._condition(batch, "prompt_embeds", "text_encoder")
        return {name: batch[name] for name in _OF_PROMPTS if name in batch}

    def _temperature(self, positive: Tensor, timestep: Tensor) -> float | Tensor:
        if isinstance(self.temperature, str):
            found = self._found_temperature
            return found.copy_(median_error(gather_rows(positive)).where(found.isnan(), found))
        return self.temperature(timestep[0]) if callable(self.temperature) else self.temperature

    def _repeated(self, batch: Mapping[str, Any], own: Tensor, everyones: Tensor) -> Tensor:
        """Which prompts are the same as a picture's own, ``(N, M)``."""
        same = torch.stack([(everyones == prompt).flatten(1).all(1) for prompt in own])
        if "text" in batch:  # embedded on line, equal texts may differ in their last digits
            digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in batch["text"])
            codes = torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
            codes = codes.to(own.device)
            same |= codes[:, None] == gather_rows(codes)
        return same

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the hash of the denoiser's weights before they are moved or rounded."""
        if stage == "fit" and not self._base_was_loaded:
            self._fingerprint = weights_fingerprint(self.denoiser)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the denoiser out, unless it was loaded into this module."""
        if self._base_was_loaded:
            return
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith(_BASE)}
        checkpoint["softrepa_denoiser"] = self._fingerprint or weights_fingerprint(self.denoiser)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse soft tokens that were trained on another denoiser."""
        if any(name.startswith(_BASE) for name in checkpoint["state_dict"]):
            return
        trained_on, here = checkpoint.get("softrepa_denoiser"), self._fingerprint or weights_fingerprint(self.denoiser)
        if trained_on != here:
            raise MisconfigurationException(
                f"this checkpoint holds soft tokens without their denoiser, whose weights had the hash {trained_on}; "
                f"those of the denoiser here have {here}. Make the module with the denoiser that the tokens were "
                "trained on, or load its weights into the module first"
            )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``soft_tokens.safetensors`` into a directory, for `heliostat.components.SoftTokenBank.load`."""
        self.bank.save(Path(directory) / FILENAME)


def _complete(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the denoiser's own weights for a state dict that comes without them."""
    assert isinstance(module, SoftREPA)
    base = prefix + _BASE
    if any(name.startswith(base) for name in state_dict):
        module._base_was_loaded = True
        module._fingerprint = None
    else:
        state_dict.update(module.denoiser.state_dict(prefix=base))
