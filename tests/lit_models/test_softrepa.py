from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from heliostat import Diffusion, ExportBest, SoftREPA
from heliostat.components import SoftTokenBank, attach_soft_tokens, denoising_contrastive_loss
from heliostat.datamodules.loading import GlobalBatchSampler, ResumableLoader
from tests.denoisers import Rows, batch_of, rows, tiny_denoiser
from tests.harness import ModuleContract, quiet_trainer, weights

diffusers = pytest.importorskip("diffusers")


def tiny_module(family: str = "text", **settings: Any) -> SoftREPA:
    denoiser = settings.pop("denoiser", None) or tiny_denoiser(family)
    settings.setdefault("optimizer", lambda params: torch.optim.SGD(params, lr=0.5))
    torch.manual_seed(1)
    return SoftREPA(denoiser, **{"num_tokens": 2, "num_time_buckets": 5, "temperature": 2.0, **settings})


class Few(Rows):
    """Batches of 4, so that there are but 16 pairs."""

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        sampler = GlobalBatchSampler(self.rows, 4, num_replicas=self.trainer.world_size, rank=self.trainer.global_rank)
        return ResumableLoader(self.rows, batch_size=sampler.local_batch_size, sampler=sampler)


class TestSoftREPA(ModuleContract):
    """On two processes each has half of the pictures, all prompts, and the noise and time of the first process."""

    def module(self, *, dropout: bool = True) -> SoftREPA:
        return tiny_module(temperature="auto", init="first_token", denoising_weight=1.0, chunk_size=5)

    def data(self, directory: Path) -> LightningDataModule:
        made = rows(12)
        for row in made[1::3]:
            row["prompt_embeds"] = made[0]["prompt_embeds"]  # repeated within processes and across them
        return Few(made)


class TestSD3(ModuleContract):
    steps = 2

    def module(self, *, dropout: bool = True) -> SoftREPA:
        return tiny_module("sd3")

    def data(self, directory: Path) -> LightningDataModule:
        return Few(rows(4))

    test_killed_and_resumed_equals_uninterrupted = None
    test_accumulates_gradients = None


@pytest.mark.parametrize("family", ["text", "sdxl", "sd3"])
def test_gradient_reaches_the_bank_alone_and_chunks_do_not_change_it(family: str) -> None:
    """Also against the loss written out pair by pair."""
    module, batch = tiny_module(family), batch_of(3)
    torch.manual_seed(5)
    loss, parts = module.training_loss(batch)
    loss.backward()
    expected = {name: parameter.grad for name, parameter in module.bank.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    assert all(parameter.grad is None for parameter in module.denoiser.parameters())

    torch.manual_seed(5)
    noise, t = torch.randn(1, 3, 8, 8), torch.rand(1)
    errors = torch.empty(3, 3)
    for i in range(3):
        noisy, timestep, target = module.noised(batch["pixel_values"][i : i + 1], noise, t)
        for j in range(3):
            prompt = {name: value[j : j + 1] for name, value in batch.items() if name != "index"}
            errors[i, j] = (module(noisy, timestep, prompt) - target).square().mean()
    torch.testing.assert_close(denoising_contrastive_loss(errors, temperature=2.0).loss, loss)

    module.zero_grad()
    module.chunk_size = 2
    torch.manual_seed(5)
    module.training_loss(batch)[0].backward()
    for name, parameter in module.bank.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)
    assert parts["saturated"] == 0


def test_denoiser_stays_as_it_is(tmp_path: Path) -> None:
    denoiser = tiny_denoiser("text")
    before = copy.deepcopy(denoiser.state_dict())
    module = tiny_module(denoiser=denoiser)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, Few(rows(12)))
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())
    assert not any(part.training for part in module.denoiser.modules())
    optimized = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in module.bank.parameters()}
    logged = {"loss", "accuracy", "positive_error", "negative_error", "saturated", "temperature"}
    assert {f"train/{name}" for name in logged} <= trainer.callback_metrics.keys()
    assert {"val/loss", "val/caption_gap"} <= trainer.callback_metrics.keys()


def test_sampling_and_evaluation_see_the_tokens_but_for_disabled(tmp_path: Path) -> None:
    module, plain = tiny_module(init_std=1.0), Diffusion(tiny_denoiser("text"))
    batch = batch_of()

    def sample(of: Diffusion, scale: float) -> Tensor:
        return of.sample(batch, num_steps=2, guidance_scale=scale, generator=torch.Generator().manual_seed(0))

    for scale in (1.0, 3.0):
        assert not torch.allclose(sample(module, scale), sample(plain, scale))
        with module.soft_tokens.disabled():
            assert torch.equal(sample(module, scale), sample(plain, scale))
    (with_tokens,) = quiet_trainer(tmp_path).validate(module, Few(rows(12)), verbose=False)
    with module.soft_tokens.disabled():
        (without,) = quiet_trainer(tmp_path).validate(module, Few(rows(12)), verbose=False)
    (expected,) = quiet_trainer(tmp_path).validate(plain, Few(rows(12)), verbose=False)
    assert without == expected
    assert with_tokens["val/loss"] != expected["val/loss"]


def test_repeated_captions_are_no_negatives() -> None:
    module, batch = tiny_module(), batch_of(4)
    batch["prompt_embeds"][2] = batch["prompt_embeds"][0]
    equal = module._repeated(batch, batch["prompt_embeds"], batch["prompt_embeds"])
    assert equal.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    texts = {**batch, "text": ["a", "b", "c", "b"]}
    named = module._repeated(texts, batch["prompt_embeds"], batch["prompt_embeds"])
    assert named.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    for name in ("prompt_embeds", "pooled_prompt_embeds"):  # nothing to tell apart: nothing to learn
        batch[name] = batch[name][:1].expand_as(batch[name]).clone()
    loss, parts = module.training_loss(batch)
    assert loss == 0
    assert parts["negative_error"].isnan()


def test_temperature_of_the_first_batch_and_of_time() -> None:
    module, batch = tiny_module(temperature="auto"), batch_of(4)
    _, parts = module.training_loss(batch)
    found = float(parts["temperature"])
    assert found == float(module.state_dict()["_found_temperature"])
    module.training_loss({**batch, "pixel_values": 10 * batch["pixel_values"]})
    assert float(module._found_temperature) == found

    times: list[Tensor] = []
    module = tiny_module(temperature=lambda t: times.append(t) or 0.1 + t / 1000)
    _, parts = module.training_loss(batch)
    assert times[0].shape == ()
    assert parts["temperature"] == 0.1 + times[0] / 1000


def test_tokens_start_at_the_first_token_of_the_prompts(tmp_path: Path) -> None:
    module = tiny_module(init="first_token", init_std=1e-4, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    data = Few(rows(4))
    quiet_trainer(tmp_path, max_epochs=2).fit(module, data)
    expected = torch.stack([row["prompt_embeds"][0] for row in data.rows]).mean(0)
    torch.testing.assert_close(module.bank.tokens.detach(), expected.expand(2, -1), atol=1e-3, rtol=0)


class TestCheckpoint:
    def _fitted(self, tmp_path: Path, module: SoftREPA) -> Path:
        trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
        trainer.fit(module, Few(rows(4)))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    def test_holds_the_bank_alone_and_loads_on_the_same_denoiser(self, tmp_path: Path) -> None:
        module = tiny_module()
        path = self._fitted(tmp_path, module)
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["state_dict"].keys() == {"bank.tokens", "bank.time_table"}
        loaded = SoftREPA.load_from_checkpoint(path, denoiser=tiny_denoiser("text"))
        assert all(torch.equal(value, weights(module)[name]) for name, value in weights(loaded).items())

    def test_refuses_another_denoiser(self, tmp_path: Path) -> None:
        path = self._fitted(tmp_path, tiny_module())
        torch.manual_seed(9)
        other = tiny_denoiser("text")
        torch.nn.init.normal_(other.conv_in.weight)
        with pytest.raises(MisconfigurationException, match="soft tokens without their denoiser, whose weights had"):
            SoftREPA.load_from_checkpoint(path, denoiser=other)
        module = tiny_module(denoiser=tiny_denoiser("text"))
        module.denoiser.load_state_dict(other.state_dict())
        with pytest.raises(MisconfigurationException, match="Make the module with the denoiser that the tokens were"):
            quiet_trainer(tmp_path, max_steps=2).fit(module, Few(rows(4)), ckpt_path=path)

    def test_keeps_a_denoiser_that_was_loaded_into_it(self, tmp_path: Path) -> None:
        """As the command does with the weights of the stage before."""
        base = Diffusion(tiny_denoiser("text"))
        torch.nn.init.normal_(base.denoiser.conv_in.weight)
        module = tiny_module()
        missing, unexpected = module.load_state_dict(base.state_dict(), strict=False)
        assert {name.split(".")[0] for name in missing} == {"bank"}
        assert not unexpected
        path = self._fitted(tmp_path, module)
        for again in (tiny_module(), tiny_module()):  # made with other weights, from which it goes on
            trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0)
            trainer.fit(again, Few(rows(4)), ckpt_path=path)
            assert torch.equal(again.denoiser.conv_in.weight, base.denoiser.conv_in.weight)
            trainer.save_checkpoint(path)

    def test_of_another_kind_is_refused(self, tmp_path: Path) -> None:
        trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
        trainer.fit(Diffusion(tiny_denoiser("text")), Few(rows(4)))
        trainer.save_checkpoint(tmp_path / "base.ckpt")
        with pytest.raises(RuntimeError, match=r"Missing key.*bank.tokens"):
            SoftREPA.load_from_checkpoint(tmp_path / "base.ckpt", denoiser=tiny_denoiser("text"))

    def test_best_tokens_are_exported(self, tmp_path: Path) -> None:
        keep = ModelCheckpoint(tmp_path, monitor="val/caption_gap", mode="max")
        module = tiny_module(stages=("down", "up"), position=0)
        callbacks = [keep, ExportBest("tokens")]
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(module, Few(rows(12)))
        bank = SoftTokenBank.load(tmp_path / "tokens" / "soft_tokens.safetensors")
        plain, batch = Diffusion(tiny_denoiser("text")), batch_of()
        plain.eval()
        attach_soft_tokens(plain.denoiser, bank)
        noised = plain.noised(batch["pixel_values"], *plain.draw(batch["pixel_values"], batch))
        assert torch.equal(plain(*noised[:2], batch), module(*noised[:2], batch))


def test_bf16_true_keeps_the_tokens_in_float32(tmp_path: Path) -> None:
    module = tiny_module()
    quiet_trainer(tmp_path, max_steps=1, precision="bf16-true").fit(module, Few(rows(4)))
    assert {p.dtype for p in module.bank.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("family", "settings", "pattern"),
    [
        ("unet", {}, "model is a UNet2DModel; soft tokens go into UNet2DConditionModel"),
        ("sd3", {"num_layers": 3}, "tokens for num_layers=3 blocks, the model 2"),
        ("sd3", {"stages": ["down"]}, "stages and position are of UNets"),
        ("sd3", {"init": "first_token"}, "init='first_token' is of UNets"),
        ("text", {"num_layers": 2}, "bank has num_layers=2; UNet2DConditionModel takes one with None"),
        ("text", {"init": "zeros"}, "init must be 'normal' or 'first_token', got 'zeros'"),
        ("text", {"temperature": "median"}, "temperature must be > 0, 'auto' or a function, got 'median'"),
        ("text", {"temperature": 0.0}, "temperature must be > 0, 'auto' or a function, got 0.0"),
    ],
)
def test_wrong_settings(family: str, settings: dict, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        tiny_module(family, **settings)


def test_one_denoiser_has_tokens_once() -> None:
    module = tiny_module()
    with pytest.raises(ValueError, match="model has soft tokens already"):
        tiny_module(denoiser=module.denoiser)


def test_batch_without_prompts_is_refused() -> None:
    batch = batch_of()
    del batch["prompt_embeds"]
    with pytest.raises(MisconfigurationException, match="conditioned on 'prompt_embeds', and the batch has only"):
        tiny_module().training_loss(batch)
