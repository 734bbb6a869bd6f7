"""Samples of a generative model as it trains, always from the same noise on the same conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from heliostat._extras import require
from heliostat.callbacks._figures import run_directory, save_figure
from heliostat.callbacks._gallery import describe, one_warning_of_missing_glyphs, show_picture, wrap
from heliostat.components.latents import decode_latents
from heliostat.pretrained import load_autoencoder

_COLUMNS = 22  # of text that fit under a picture
_LINES = 3


class SampleGrid(Callback):
    """Draw what a generative model makes of the conditions of the first validation pictures, with their captions.

    Works with any module that has ``sample(batch, *, num_steps, guidance_scale, generator)``, which gives samples in
    the shape of the batch's data: pictures in [-1, 1], or latents if the batch has ``latents``. Validation batches are
    dicts, as `heliostat.DiffusionDataModule` makes them; those of the first loader are used.

    The samples are drawn within the validation, so with the averaged weights where ``EMAWeightAveraging`` puts them in.
    Noise and conditions are the same every time, so that the pictures of several epochs compare. On several processes
    the conditions are those of the first one; all of them sample, since a sharded model needs all, and the first one
    draws. The picture goes to the run's directory, where it replaces the one before, and to every logger that takes
    images.

    Args:
        every_n_epochs: Draw in the validation of every n-th epoch of a training; ``trainer.validate`` always draws.
        num_samples: Samples to draw, at most as many as there are validation pictures.
        num_steps: Steps of a sample.
        guidance_scale: Of classifier-free guidance; 1: none.
        vae: Autoencoder of diffusers that decodes the latents, or the name of one, see
            `heliostat.pretrained.load_autoencoder`. It is no part of the module, and of no checkpoint.
        captions: Write the batch's ``text`` under the samples; not for unconditional models.
        seed: Seed of the noise.
        filename: Name of the picture inside the run's directory.

    Raises:
        ValueError: On a number below 1.
        ModuleNotFoundError: In ``setup``, if matplotlib is missing.
        MisconfigurationException: If the module has no ``sample``, if there is no validation, or its batches are no
            dicts; before training.
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        num_samples: int = 16,
        num_steps: int = 30,
        guidance_scale: float = 1.0,
        vae: torch.nn.Module | str | None = None,
        captions: bool = True,
        seed: int = 0,
        filename: str = "samples.png",
    ) -> None:
        numbers = {"every_n_epochs": every_n_epochs, "num_samples": num_samples, "num_steps": num_steps}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.every_n_epochs, self.num_samples = every_n_epochs, num_samples
        self.num_steps, self.guidance_scale = num_steps, guidance_scale
        self.vae: Any = load_autoencoder(vae) if isinstance(vae, str) else vae
        self.captions, self.seed, self.filename = captions, seed, filename
        self._rows: list[Mapping[str, Any]] = []  # of the batches so far
        self._samples: Tensor | None = None
        self._captions: list[str] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before training, not after it, that nothing can be drawn."""
        require("matplotlib", "SampleGrid")
        if not callable(getattr(pl_module, "sample", None)):
            raise MisconfigurationException(
                "SampleGrid needs a module with sample(batch, *, num_steps, guidance_scale, generator), but "
                f"{type(pl_module).__name__} has none. Add it, or remove the callback."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a training without validation set."""
        if not trainer.enable_validation:
            raise MisconfigurationException(
                "SampleGrid draws on the conditions of the validation set, and this training has none. Give the data a "
                "validation loader and the module a validation_step, or remove the callback."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last time."""
        self._rows, self._samples = [], None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Refuse batches that are no dicts."""
        if dataloader_idx == 0 and not isinstance(batch, Mapping):
            raise MisconfigurationException(
                f"SampleGrid needs validation batches that are dicts, but a batch {describe(batch)}. Change the data "
                "module, or remove the callback."
            )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Sample as soon as there are enough conditions, or no more."""
        # Not at the end of the epoch, when a callback before this one has put back the weights that are trained.
        if dataloader_idx > 0 or self._samples is not None or not self._is_due(trainer):
            return
        self._rows.append(batch)
        is_last = batch_idx + 1 >= trainer.num_val_batches[0]
        if is_last or sum(map(_length, self._rows)) >= self.num_samples:
            joined = _first_rows(self._rows, self.num_samples)
            self._rows = []
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                samples = pl_module.sample(  # type: ignore[operator]
                    joined,
                    num_steps=self.num_steps,
                    guidance_scale=self.guidance_scale,
                    generator=torch.Generator().manual_seed(self.seed),
                )
            pictures = self._decode(samples, "latents" in joined)
            if lost := int((~pictures.isfinite().flatten(1).all(1)).sum()):
                rank_zero_warn(f"SampleGrid: {lost} of {len(pictures)} samples are not finite; there they are grey")
            self._captions = joined.get("text") if self.captions else None
            self._samples = pictures.nan_to_num(0.0, 0.0, 0.0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what was sampled."""
        if self._samples is None:
            return
        path = run_directory(trainer) / self.filename
        if trainer.is_global_zero:
            with one_warning_of_missing_glyphs():
                save_figure(trainer, self._figure(self._samples, self._captions, trainer), path)
        self._samples = None

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return False
        return trainer.state.fn != TrainerFn.FITTING or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _decode(self, samples: Tensor, are_latents: bool) -> Tensor:
        if not are_latents:
            return samples.float().cpu()
        if self.vae is None:
            rank_zero_warn("SampleGrid: the samples are latents; without vae the mean of their channels is shown")
            means = samples.float().cpu().mean(1, keepdim=True)
            return means / means.abs().max().clamp_min(1e-12)
        self.vae.to(samples.device)
        pictures = [decode_latents(self.vae, one[None]).cpu() for one in samples]  # one by one, as decoding is large
        self.vae.cpu()
        return torch.cat(pictures)

    def _figure(self, samples: Tensor, captions: Sequence[str] | None, trainer: Trainer) -> Any:
        """A `matplotlib.figure.Figure`."""
        columns = math.ceil(math.sqrt(len(samples)))
        rows = math.ceil(len(samples) / columns)
        wrapped = [wrap(caption, _COLUMNS, _LINES) for caption in captions or ()]
        pitch = 1.0 + 0.12 * max((text.count("\n") + 1 for text in wrapped), default=0)  # how far rows are apart
        figure = require("matplotlib.figure", "SampleGrid").Figure(figsize=(1.3 * columns, 1.3 * pitch * rows))
        axes = figure.add_axes((0, 0, 1, 1))  # of all pictures: axes for each would take seconds to lay out
        axes.set_title(
            f"epoch {trainer.current_epoch}, step {trainer.global_step:,}: {self.num_steps} steps, "
            f"guidance {self.guidance_scale:g}",
            fontsize=9,
        )
        for i, sample in enumerate(samples):
            left, bottom = i % columns, -pitch * (i // columns) - 0.9
            show_picture(axes, sample, left, bottom, "none", linewidth=0, limits=(-1.0, 1.0))
            if wrapped:
                style = {"ha": "center", "va": "top", "fontsize": 6, "parse_math": False}
                axes.text(left + 0.45, bottom - 0.03, wrapped[i], **style)
        axes.set(xlim=(-0.05, columns), ylim=(-pitch * rows, 0.05), aspect="equal")
        axes.axis("off")
        return figure


def _length(batch: Mapping[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)


def _first_rows(batches: Sequence[Mapping[str, Any]], count: int) -> dict[str, Any]:
    """One batch of the first rows of several."""
    rows: dict[str, Any] = {}
    for key, first in batches[0].items():
        values = [batch[key] for batch in batches]
        if isinstance(first, Tensor) and first.ndim:
            rows[key] = torch.cat(values)[:count]
        elif isinstance(first, list):
            rows[key] = [item for value in values for item in value][:count]
        else:
            rows[key] = first
    return rows
