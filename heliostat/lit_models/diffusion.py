"""Training of diffusion and flow-matching denoisers, as it is; the ground of U-REPA and SoftREPA."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from heliostat._extras import require
from heliostat.components.diffusion import Path, interpolant
from heliostat.lit_models._evaluation import gather_once
from heliostat.lit_models._hparams import save_plain_hyperparameters
from heliostat.lit_models._optimization import Schedule, configure_optimizers
from heliostat.pretrained import load_denoiser

_GOLDEN_RATIO = 0.6180339887498949
_SPATIAL_SCALE = 8  # pixels a side of a latent, of every VAE that SDXL is used with

# What denoisers take -> the batch's field for it, and the argument of the data module that brings it.
_CONDITIONS = {
    "encoder_hidden_states": ("prompt_embeds", "text_encoder"),
    "pooled_projections": ("pooled_prompt_embeds", "text_encoder"),
    "class_labels": ("labels", "pictures"),
}


class Noised(NamedTuple):
    """What a denoiser gets, and what it is to predict.

    Attributes:
        noisy: Noised data, the shape of the data.
        timestep: As the denoiser takes it, ``(B,)``.
        target: What it is to predict, the shape of the data.
    """

    noisy: Tensor
    timestep: Tensor
    target: Tensor


class Diffusion(LightningModule):
    """Train a denoiser of diffusers: flow matching, or to predict noise, velocity or the data.

    Batches hold what is denoised, ``latents`` or else ``pixel_values`` ``(B, C, H, W)``, and what the denoiser is
    conditioned on: ``prompt_embeds`` ``(B, L, d)``, ``pooled_prompt_embeds`` ``(B, p)``, ``labels`` ``(B,)``.
    Evaluation also needs ``index`` ``(B,)``, the position of a row in its set; sampling with guidance the same
    conditions of nothing, ``negative_prompt_embeds`` and so on. `heliostat.DiffusionDataModule` gives all of them.

    Logged are ``train/loss``, and for ``val`` and ``test``, of the whole set and with noise and time that depend on
    nothing but the row: ``loss``; with prompts also ``right_caption``, the share of rows whose own prompt gives a
    smaller error than that of the next row in the batch, and ``caption_gap``, by how much it is smaller on average.
    Next rows with the same prompt are left out.

    Averaged weights are Lightning's ``EMAWeightAveraging``; it then validates and samples with them.

    Args:
        denoiser: A UNet2DModel, UNet2DConditionModel (of Stable Diffusion 1, 2 or XL), SD3Transformer2DModel or
            DiTTransformer2DModel of diffusers; a module that is called as one of these; or a directory or hub id of a
            diffusers model or pipeline.
        scheduler: A scheduler of diffusers. One with ``alphas_cumprod`` is trained as its ``prediction_type`` says, any
            other by flow matching. None: that of the pipeline, if ``denoiser`` names one, or
            ``FlowMatchEulerDiscreteScheduler()``.
        path: Of flow matching, see `heliostat.components.interpolant`.
        optimizer: Makes the optimizer from the trainable parameters.
        lr_scheduler: ``"linear"`` (to zero), ``"cosine"``, ``"constant"``, or a callable.

    Raises:
        ValueError: ``path="cosine"`` without flow matching, or an unknown prediction type.
        ModuleNotFoundError: diffusers is not installed.
        MisconfigurationException: A batch lacks what the denoiser needs.
    """

    def __init__(
        self,
        denoiser: str | nn.Module,
        scheduler: Any = None,
        *,
        path: Path = "linear",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0),
        lr_scheduler: Schedule | LRSchedulerCallable = "constant",
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        if isinstance(denoiser, str):
            denoiser, of_pipeline = load_denoiser(denoiser)
            scheduler = scheduler or of_pipeline
        if scheduler is None:
            scheduler = require("diffusers", "Diffusion").FlowMatchEulerDiscreteScheduler()
        self.denoiser: Any = denoiser
        self._signal: Tensor | None
        self.scheduler = scheduler
        self.path = path
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.prediction_type = "flow"
        signal = getattr(scheduler, "alphas_cumprod", None)
        if signal is not None:
            self.prediction_type = scheduler.config.prediction_type
            if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
                raise ValueError(
                    f"scheduler has prediction_type={self.prediction_type!r}; known are 'epsilon', 'v_prediction' and "
                    "'sample'"
                )
            if path != "linear":
                raise ValueError(
                    f"path={path!r} is one of flow matching, but {type(scheduler).__name__} has its own noise schedule"
                )
        self.register_buffer("_signal", signal, persistent=False)
        parameters = inspect.signature(self.denoiser.forward).parameters
        self._takes = [name for name in _CONDITIONS if name in parameters and self._conditioned_on(name)]
        self._errors: list[tuple[Tensor, Tensor, Tensor]] = []

    def _conditioned_on(self, name: str) -> bool:
        """Whether a denoiser whose ``forward`` has an argument for classes was made with any."""
        config = getattr(self.denoiser, "config", {})
        if name != "class_labels" or not isinstance(config, Mapping):
            return True
        classes = config.get("num_class_embeds"), config.get("class_embed_type"), config.get("num_embeds_ada_norm")
        return any(kind is not None for kind in classes)

    def forward(self, noisy: Tensor, timestep: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Predict from ``noisy`` ``(B, C, H, W)`` at ``timestep`` ``(B,)``, on the batch's conditions.

        Raises:
            MisconfigurationException: ``batch`` lacks a condition, or the prediction has another shape than the data.
        """
        conditions: dict[str, Any] = {name: self._condition(batch, *_CONDITIONS[name]) for name in self._takes}
        if getattr(getattr(self.denoiser, "config", None), "addition_embed_type", None) == "text_time":  # SDXL
            pooled = self._condition(batch, "pooled_prompt_embeds", "text_encoder")
            time_ids = batch.get("time_ids")
            if time_ids is None:  # original size, upper left corner of the crop, size
                height, width = (side * (_SPATIAL_SCALE if "latents" in batch else 1) for side in noisy.shape[2:])
                time_ids = pooled.new_tensor([height, width, 0, 0, height, width]).expand(len(noisy), -1)
            conditions["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
        output = self.denoiser(noisy, timestep=timestep, **conditions)
        prediction = output if isinstance(output, Tensor) else output.sample
        if prediction.shape[1] == 2 * noisy.shape[1]:  # DiT predicts variances too
            prediction = prediction[:, : noisy.shape[1]]
        if prediction.shape != noisy.shape:
            raise MisconfigurationException(
                f"the denoiser made {tuple(prediction.shape)} of data of shape {tuple(noisy.shape)}; in_channels, "
                "out_channels and sample_size of its configuration must be those of the data"
            )
        return prediction

    def _condition(self, batch: Mapping[str, Any], field: str, argument: str) -> Tensor:
        if field not in batch:
            raise MisconfigurationException(
                f"{type(self.denoiser).__name__} is conditioned on {field!r}, and the batch has only "
                f"{', '.join(map(repr, batch))}. DiffusionDataModule gives it with a fitting {argument}=..."
            )
        return batch[field]

    def clean(self, batch: Mapping[str, Any]) -> Tensor:
        """What is to be denoised: the batch's ``latents``, or else its ``pixel_values``."""
        if "latents" in batch:
            return batch["latents"]
        if "pixel_values" in batch:
            return batch["pixel_values"]
        raise MisconfigurationException(
            f"the batch has neither 'latents' nor 'pixel_values', only {', '.join(map(repr, batch))}"
        )

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Noised:
        """Mix data with noise.

        Args:
            clean: Data, ``(B, C, H, W)``.
            noise: Standard normal, the same shape.
            t: How far each is on its way from data to noise, in [0, 1), ``(B,)``.
        """
        steps = self.scheduler.config.num_train_timesteps
        if self._signal is None:
            x_t, velocity = interpolant(clean, noise, t, self.path)
            return Noised(x_t.to(clean.dtype), t * steps, velocity)
        timestep = (t * steps).long()
        signal = self._signal[timestep].view(-1, *(1,) * (clean.ndim - 1))
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        targets = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}
        return Noised((alpha * clean + sigma * noise).to(clean.dtype), timestep, targets[self.prediction_type])

    def draw(self, clean: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Noise, the shape of the data, and times ``(B,)`` of a training batch."""
        # Times in float32: in bf16 there are only 256 between 1/2 and 1.
        return torch.randn_like(clean), torch.rand(len(clean), dtype=torch.float32, device=clean.device)

    def training_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what else of it is to be logged under ``train/``."""
        clean = self.clean(batch)
        noisy, timestep, target = self.noised(clean, *self.draw(clean, batch))
        return F.mse_loss(at_least_float32(self(noisy, timestep, batch)), at_least_float32(target)), {}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The mean squared error of the prediction."""
        loss, parts = self.training_loss(batch)
        for name, value in {"loss": loss, **parts}.items():
            rows = len(self.clean(batch))
            self.log(f"train/{name}", value, prog_bar=name == "loss", sync_dist=True, batch_size=rows)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start anew."""
        self._errors.clear()

    def on_test_epoch_start(self) -> None:
        """Start anew."""
        self._errors.clear()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measure the error with the right prompts and with wrong ones."""
        self._measure(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measure the error with the right prompts and with wrong ones."""
        self._measure(batch)

    def _measure(self, batch: dict[str, Any]) -> None:
        clean, index = self.clean(batch), batch["index"]
        noised = self.noised(clean, *fixed_noise(clean, index))
        errors = self._squared_errors(noised, batch)
        others = torch.full_like(errors, torch.nan)
        if "prompt_embeds" in batch:
            wrong = {name: value.roll(-1, 0) for name, value in batch.items() if name.endswith("prompt_embeds")}
            differs = (wrong["prompt_embeds"] != batch["prompt_embeds"]).flatten(1).any(1)
            others = self._squared_errors(noised, {**batch, **wrong}).where(differs, torch.nan)
        self._errors.append((index, errors, others))

    def _squared_errors(self, noised: Noised, batch: Mapping[str, Any]) -> Tensor:
        prediction = self(noised.noisy, noised.timestep, batch)
        return (at_least_float32(prediction) - noised.target).square().flatten(1).mean(1)

    def on_validation_epoch_end(self) -> None:
        """Log what was measured."""
        self._log_errors("val")

    def on_test_epoch_end(self) -> None:
        """Log what was measured."""
        self._log_errors("test")

    def _log_errors(self, stage: str) -> None:
        if not self._errors:
            return
        errors, others = gather_once(*(torch.cat(column) for column in zip(*self._errors, strict=True)))
        self._errors.clear()
        self.log(f"{stage}/loss", errors.mean(), prog_bar=True)
        compared = ~others.isnan()
        if compared.any():
            gaps = (others - errors)[compared]
            self.log(f"{stage}/right_caption", (gaps > 0).float().mean(), prog_bar=True)
            self.log(f"{stage}/caption_gap", gaps.mean())

    @torch.no_grad()
    def sample(
        self,
        batch: Mapping[str, Any],
        *,
        num_steps: int = 30,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw samples on the conditions of a batch, by the steps of the scheduler, in evaluation mode.

        Args:
            batch: Conditions, and data for the shape alone.
            num_steps: Calls of the denoiser; with guidance each is of twice the rows.
            guidance_scale: g of classifier-free guidance, ``nothing + g (condition - nothing)``; 1: none. Other values
                need the ``negative_...`` fields.
            generator: Of the noise. One on the CPU gives the same noise on every device.

        Returns:
            Samples in the shape and on the device of the batch's data, float32.

        Raises:
            ValueError: ``num_steps`` is below 1.
            MisconfigurationException: The batch lacks a condition.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {num_steps}")
        like = self.clean(batch)
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # its state is of one trajectory
        scheduler.set_timesteps(num_steps, device=like.device)
        device = like.device if generator is None else generator.device
        x = torch.randn(like.shape, generator=generator, device=device).to(like.device)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        fields = ("prompt_embeds", "pooled_prompt_embeds", "labels", "time_ids")
        conditions = {name: batch[name] for name in fields if name in batch}
        if guidance_scale != 1:
            for name, value in conditions.items():
                nothing = value if name == "time_ids" else self._condition(batch, f"negative_{name}", "text_encoder")
                conditions[name] = torch.cat([nothing, value])
        if "latents" in batch:
            conditions["latents"] = like  # tells forward in what units the data's size is
        stochastic = "generator" in inspect.signature(scheduler.step).parameters
        modes = {part: part.training for part in self.modules()}
        self.eval()
        for timestep in scheduler.timesteps:
            noisy = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            if guidance_scale != 1:
                noisy = torch.cat([noisy, noisy])
            prediction = self(noisy, timestep.expand(len(noisy)), conditions).float()
            if guidance_scale != 1:
                nothing, condition = prediction.chunk(2)
                prediction = nothing + guidance_scale * (condition - nothing)
            chance = {"generator": generator} if stochastic else {}
            x = scheduler.step(prediction, timestep, x, **chance).prev_sample
        for part, training in modes.items():
            part.training = training
        return x

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and schedule given to ``__init__``."""
        return configure_optimizers(self, self.optimizer, self.lr_scheduler)


def at_least_float32(x: Tensor) -> Tensor:
    """The same in float32, unless it is more precise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fixed_noise(clean: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Noise, the shape of ``clean`` ``(B, ...)``, and times ``(B,)`` that depend on each row's ``index`` alone.

    Times of successive rows cover [0, 1) evenly.
    """
    generator = torch.Generator()
    rows = [torch.randn(clean.shape[1:], generator=generator.manual_seed(i)) for i in index.tolist()]
    times = ((index.double() + 0.5) * _GOLDEN_RATIO).frac().float()
    return torch.stack(rows).to(clean), times
