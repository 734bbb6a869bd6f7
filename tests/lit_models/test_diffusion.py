from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from heliostat.components import interpolant
from heliostat.lit_models.diffusion import Diffusion, fixed_noise
from heliostat.pretrained import load_denoiser
from tests.denoisers import Rows, batch_of, rows, tiny_denoiser
from tests.harness import ModuleContract, quiet_trainer

diffusers = pytest.importorskip("diffusers")

FAMILIES = ["unet", "classes", "text", "sdxl", "sd3", "dit"]


class FixedDiffusion(Diffusion):
    """Without chance, to compare processes."""

    def draw(self, clean: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        return fixed_noise(clean, batch["index"])


class TestDiffusion(ModuleContract):
    def module(self, *, dropout: bool = True) -> Diffusion:
        kind = Diffusion if dropout else FixedDiffusion
        return kind(tiny_denoiser("text"), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))

    def data(self, directory: Path) -> LightningDataModule:
        return Rows(rows())

    def test_averaged_weights_are_resumed(self, tmp_path: Path) -> None:
        whole = self._fit_averaged(tmp_path / "whole", 4)
        self._fit_averaged(tmp_path / "part", 2)
        resumed = self._fit_averaged(tmp_path / "part", 4, str(tmp_path / "part/last.ckpt"))
        assert whole == pytest.approx(resumed, rel=1e-6)

    def _fit_averaged(self, directory: Path, steps: int, ckpt_path: str | None = None) -> float:
        keeper = ModelCheckpoint(directory, "last", every_n_train_steps=2)
        callbacks = [*self.callbacks(), EMAWeightAveraging(decay=0.5), keeper]
        trainer = quiet_trainer(directory, max_steps=steps, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(self.module(), self.data(directory), ckpt_path=ckpt_path)
        (result,) = trainer.validate(trainer.lightning_module, self.data(directory), verbose=False)
        return result["val/loss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_and_samples_with_what_each_family_takes(family) -> None:
    module, batch = Diffusion(tiny_denoiser(family)), batch_of()
    loss, _ = module.training_loss(batch)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)
    generator = torch.Generator().manual_seed(0)
    guided = module.sample(batch, num_steps=2, guidance_scale=3.0, generator=generator)
    plain = module.sample(batch, num_steps=2, generator=generator.manual_seed(0))
    again = module.sample(batch, num_steps=2, generator=generator.manual_seed(0))
    assert guided.shape == plain.shape == batch["pixel_values"].shape
    assert torch.equal(plain, again)
    assert torch.equal(guided, plain) == (family == "unet")
    assert module.training


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_targets_are_those_of_the_scheduler(prediction_type) -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction_type)
    module = Diffusion(tiny_denoiser("unet"), scheduler)
    clean, noise, t = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.tensor([0.0, 0.25, 0.5, 0.9999])
    noisy, timestep, target = module.noised(clean, noise, t)
    assert timestep.tolist() == [0, 250, 500, 999]
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, timestep))
    velocity = scheduler.get_velocity(clean, noise, timestep)
    torch.testing.assert_close(target, {"epsilon": noise, "v_prediction": velocity, "sample": clean}[prediction_type])


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_flow_matching(path) -> None:
    module = Diffusion(tiny_denoiser("unet"), path=path)
    clean, noise, t = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.tensor([0.0, 0.25, 0.5])
    noisy, timestep, target = module.noised(clean, noise, t)
    assert timestep.tolist() == [0, 250, 500]
    for actual, expected in zip((noisy, target), interpolant(clean, noise, t, path), strict=True):
        torch.testing.assert_close(actual, expected)


class _Oracle(nn.Module):
    """Knows what the data are, and predicts what leads to them."""

    def __init__(self, clean: Tensor, path: str) -> None:
        super().__init__()
        self.clean, self.path = clean, path

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        t = (timestep / 1000).view(-1, 1, 1, 1)
        if self.path == "epsilon":
            signal = diffusers.DDIMScheduler().alphas_cumprod[timestep].view(-1, 1, 1, 1)
            return (sample - signal.sqrt() * self.clean) / (1 - signal).sqrt()
        if self.path == "linear":
            return (sample - self.clean) / t
        noise = (sample - (math.pi / 2 * t).cos() * self.clean) / (math.pi / 2 * t).sin()
        return interpolant(self.clean, noise, t.flatten(), "cosine").velocity


@pytest.mark.parametrize("path", ["linear", "cosine", "epsilon"])
def test_sampling_follows_a_perfect_denoiser_to_the_data(path) -> None:
    clean = torch.rand(2, 3, 8, 8) * 2 - 1
    scheduler = diffusers.DDIMScheduler() if path == "epsilon" else None
    module = Diffusion(_Oracle(clean, path), scheduler, path="cosine" if path == "cosine" else "linear")
    samples = module.sample({"pixel_values": clean}, num_steps=50)
    torch.testing.assert_close(samples, clean, atol=0.05, rtol=0)


def test_guidance_is_linear_in_the_prediction() -> None:
    """One Euler step from the same noise: that of scale g is g times the prompt's, less g - 1 times that of nothing."""
    module, batch = Diffusion(tiny_denoiser("text")), batch_of()
    nothing = {name.removeprefix("negative_"): value for name, value in batch.items() if name.startswith("negative_")}

    def step(given: dict[str, Tensor], scale: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return module.sample({**batch, **given}, num_steps=1, guidance_scale=scale, generator=generator)

    torch.testing.assert_close(step({}, 3.0), 3 * step({}, 1.0) - 2 * step(nothing, 1.0), rtol=1e-4, atol=1e-4)


class _Reader(nn.Module):
    """Predicts the mean of its prompt: error and caption metrics are then known."""

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1).expand_as(sample)


def test_caption_metrics_leave_out_equal_prompts() -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type="sample")
    values = torch.tensor([0.0, 1.0, 1.0, 3.0])
    batch = {
        "pixel_values": values.view(-1, 1, 1, 1).expand(-1, 3, 8, 8) + 0.0,
        "prompt_embeds": torch.tensor([0.0, 1.0, 1.0, 0.0]).view(-1, 1, 1).expand(-1, 5, 4) + 0.0,
        "index": torch.arange(4),
    }
    module = Diffusion(_Reader(), scheduler)
    logged: dict[str, Any] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})  # type: ignore[method-assign, assignment]
    module.validation_step(batch, 0)
    module.on_validation_epoch_end()
    # Rows 0, 2 and 3 are compared with 1, 0 and 0; of row 3 its own prompt is the next one's too.
    assert logged["val/loss"] == pytest.approx((0 + 0 + 0 + 9) / 4)
    assert logged["val/right_caption"] == 1
    assert logged["val/caption_gap"] == pytest.approx((1 + 1) / 2)


def test_evaluation_depends_on_nothing_but_the_rows(tmp_path) -> None:
    module, data = Diffusion(tiny_denoiser("text")), Rows(rows(30))
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results += quiet_trainer(tmp_path).test(module, data, verbose=False)
    assert results[0] == results[1]
    assert set(results[0]) == {"test/loss", "test/right_caption", "test/caption_gap"}


def test_fixed_noise_covers_time_evenly() -> None:
    noise, t = fixed_noise(torch.zeros(100, 1, 4, 4), torch.arange(100))
    assert t.sort().values.diff().max() < 0.02
    assert torch.equal(fixed_noise(torch.zeros(1, 1, 4, 4), torch.tensor([7]))[0][0], noise[7])


def test_denoiser_by_directory(tmp_path) -> None:
    unet = tiny_denoiser("unet")
    unet.save_pretrained(tmp_path / "model")
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=100))
    pipeline.save_pretrained(tmp_path / "pipeline")
    for name, scheduler in (("model", "FlowMatchEulerDiscreteScheduler"), ("pipeline", "DDPMScheduler")):
        module = Diffusion(str(tmp_path / name))
        assert type(module.scheduler).__name__ == scheduler
        assert torch.equal(module.denoiser.conv_in.weight, unet.conv_in.weight)
    assert module.scheduler.config.num_train_timesteps == 100
    with pytest.raises(OSError, match="'nowhere' is no local directory"):
        load_denoiser("nowhere")
    (tmp_path / "pipeline/model_index.json").write_text('{"_class_name": "DDPMPipeline", "vae": ["diffusers", "X"]}')
    with pytest.raises(ValueError, match="neither a denoiser nor a pipeline"):
        load_denoiser(str(tmp_path / "pipeline"))


def test_errors() -> None:
    with pytest.raises(ValueError, match="path='cosine' is one of flow matching, but DDPMScheduler has its own"):
        Diffusion(tiny_denoiser("unet"), diffusers.DDPMScheduler(), path="cosine")
    batch = batch_of()
    bare = {"pixel_values": batch["pixel_values"]}
    with pytest.raises(MisconfigurationException, match="conditioned on 'prompt_embeds'.*with a fitting text_encoder="):
        Diffusion(tiny_denoiser("text")).training_loss(bare)
    given = {**bare, "prompt_embeds": batch["prompt_embeds"]}
    with pytest.raises(MisconfigurationException, match="conditioned on 'negative_prompt_embeds'"):
        Diffusion(tiny_denoiser("text")).sample(given, guidance_scale=2.0)
    with pytest.raises(MisconfigurationException, match="neither 'latents' nor 'pixel_values', only 'labels'"):
        Diffusion(tiny_denoiser("unet")).training_loss({"labels": batch["labels"]})
    with pytest.raises(MisconfigurationException, match=r"made \(4, 1, 8, 8\) of data of shape \(4, 3, 8, 8\)"):
        Diffusion(tiny_denoiser("unet", out_channels=1)).training_loss(batch)
    with pytest.raises(ValueError, match="num_steps must be >= 1, got 0"):
        Diffusion(tiny_denoiser("unet")).sample(batch, num_steps=0)
