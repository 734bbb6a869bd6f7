from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from heliostat import UREPA, Diffusion, StepSeed
from heliostat.components import token_alignment_loss, u_repa_loss
from heliostat.lit_models.diffusion import fixed_noise
from tests.denoisers import Rows, batch_of, rows, tiny_denoiser
from tests.harness import ModuleContract, ProcessPool, quiet_trainer, weights

pytest.importorskip("diffusers")

TEACHER = (64, 6)  # tokens on a grid of 8 x 8, and their width; the middle of the U-Net has 4 x 4


class FixedUREPA(UREPA):
    """Without chance, to compare processes."""

    def draw(self, clean: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        return fixed_noise(clean, batch["index"])


def tiny_module(kind: type[UREPA] = UREPA, family: str = "unet", **settings: Any) -> UREPA:
    settings = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1), "hidden_dim": 10, **settings}
    return kind(tiny_denoiser(family), teacher_dim=TEACHER[1], **settings)


def data() -> Rows:
    return Rows(rows(teacher=TEACHER))


class TestUREPA(ModuleContract):
    """With similarities over all processes."""

    def module(self, *, dropout: bool = True) -> UREPA:
        return tiny_module(UREPA if dropout else FixedUREPA, relation="batch", max_tokens=16 if dropout else None)

    def data(self, directory: Path) -> LightningDataModule:
        return data()


class Stopping(TestUREPA):
    __test__ = False

    def module(self, *, dropout: bool = True) -> UREPA:
        return tiny_module(FixedUREPA, stop_step=1)


def test_stopping_on_two_processes(tmp_path: Path, two_processes: ProcessPool) -> None:
    """The projector still is a parameter that DistributedDataParallel waits for."""
    Stopping().test_two_processes_equal_one(tmp_path, two_processes)


def test_averaged_weights_are_validated_and_resumed(tmp_path: Path) -> None:
    def validated(directory: Path, steps: int, ckpt_path: str | None = None) -> dict[str, float]:
        keeper = ModelCheckpoint(directory, "last", every_n_train_steps=2)
        callbacks = [StepSeed(), EMAWeightAveraging(decay=0.5), keeper]
        trainer = quiet_trainer(directory, max_steps=steps, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(tiny_module(), data(), ckpt_path=ckpt_path)
        (result,) = trainer.validate(trainer.lightning_module, data(), verbose=False)
        return result

    whole = validated(tmp_path / "whole", 4)
    validated(tmp_path / "part", 2)
    resumed = validated(tmp_path / "part", 4, str(tmp_path / "part/last.ckpt"))
    assert {f"val/{name}" for name in ("loss", "cosine", "shuffled_cosine", "manifold")} <= set(whole)
    assert whole == pytest.approx(resumed, rel=1e-5)


def test_loss_and_gradient_are_those_of_the_parts() -> None:
    batch = batch_of(teacher=TEACHER)
    module = tiny_module(FixedUREPA, align_weight=0.3, manifold_weight=2.0, relation="sample", center=True)
    plain, _ = Diffusion.training_loss(module, batch)
    loss, report = module.training_loss(batch)
    features = []
    module.denoiser.mid_block.register_forward_hook(lambda _, __, output: features.append(output))
    Diffusion.training_loss(module, batch)
    projected = module.aligner.projector(features[0], TEACHER[0])
    assert features[0].shape == (4, 16, 4, 4)
    expected = u_repa_loss(
        projected, batch["teacher_features"], align_weight=0.3, manifold_weight=2.0, relation="sample", center=True
    )
    torch.testing.assert_close(loss, plain + expected.total)
    torch.testing.assert_close(report["cosine"], -token_alignment_loss(projected, batch["teacher_features"]))
    module.zero_grad()
    (loss - plain).backward()
    reached = {name.split(".")[1] for name, p in module.denoiser.named_parameters("denoiser") if p.grad is not None}
    decoder = [p.grad for p in module.denoiser.up_blocks.parameters()]
    assert {"conv_in", "down_blocks", "mid_block"} <= reached
    assert all(gradient is None or not gradient.any() for gradient in decoder)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [({"align_weight": 0.0}, False), ({"stop_step": 0}, False), ({"align_weight": 1e-3, "stop_step": 1}, True)],
    ids=["weight 0", "stopped", "aligned once"],
)
def test_without_alignment_it_is_diffusion_bit_by_bit(tmp_path: Path, settings: dict, trained: bool) -> None:
    def fitted(module: Diffusion) -> dict[str, Tensor]:
        trainer = quiet_trainer(tmp_path, max_steps=3, gradient_clip_val=0.5)
        torch.manual_seed(3)
        trainer.fit(module, data())
        return {"train/loss": trainer.callback_metrics["train/loss"], **weights(module)}

    torch.manual_seed(0)
    optimizer: Any = lambda params: torch.optim.AdamW(params, lr=1e-2)  # noqa: E731
    expected = fitted(Diffusion(tiny_denoiser("unet"), optimizer=optimizer))
    actual = fitted(tiny_module(optimizer=optimizer, **settings))
    same = all(torch.equal(actual[name], value) for name, value in expected.items())
    assert same != trained


def test_it_needs_no_teacher_where_nothing_is_aligned(tmp_path: Path) -> None:
    without = Rows(rows())
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(tiny_module(align_weight=0.0), without)
    assert "val/cosine" not in trainer.callback_metrics
    with pytest.raises(MisconfigurationException, match="needs 'teacher_features' .* with teacher=..., such as"):
        quiet_trainer(tmp_path, max_steps=1).fit(tiny_module(), without)


@pytest.mark.parametrize(
    ("family", "layer", "settings"),
    [
        ("text", "mid_block", {}),
        ("text", "down_blocks.0", {"in_channels": 8}),
        ("sdxl", "up_blocks.1", {}),
        ("sd3", "transformer_blocks.1", {}),
        ("dit", "transformer_blocks.0", {"grid": (8, 8)}),
    ],
)
def test_layers_of_other_denoisers(family: str, layer: str, settings: dict) -> None:
    module, batch = tiny_module(family=family, layer=layer, **settings), batch_of(teacher=TEACHER)
    module.denoiser.enable_gradient_checkpointing()
    loss, report = module.training_loss(batch)
    loss.backward()
    assert module.aligner.tap._features is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.aligner.parameters())
    assert -1 < report["cosine"] < 1


def test_without_mid_block_it_is_the_last_down_block() -> None:
    denoiser = tiny_denoiser("unet", mid_block_type=None)
    assert denoiser.mid_block is None
    module, batch = UREPA(denoiser, teacher_dim=TEACHER[1], hidden_dim=10), batch_of(teacher=TEACHER)
    module.training_loss(batch)[0].backward()
    assert module.aligner.projector.mlp[0].weight.shape == (10, 16)
    assert module.aligner.projector.mlp[0].weight.grad.any()


def test_gradients_with_checkpointing_are_the_same() -> None:
    batch, gradients = batch_of(teacher=TEACHER), []
    for checkpointing in (False, True):
        module = tiny_module(FixedUREPA)
        if checkpointing:
            module.denoiser.enable_gradient_checkpointing()
        module.training_loss(batch)[0].backward()
        gradients.append([p.grad for p in module.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-7)


def test_wrong_prompts_are_not_what_is_aligned(tmp_path: Path) -> None:
    """In evaluation the denoiser is called with the right and with wrong prompts; the right ones count."""
    made = rows(4, teacher=TEACHER)
    module = tiny_module(family="text")
    features: list[Tensor] = []
    hook = module.denoiser.mid_block.register_forward_hook(lambda _, __, output: features.append(output))
    (result,) = quiet_trainer(tmp_path).test(module, Rows(made), verbose=False)
    hook.remove()
    assert len(features) == 2
    target = torch.stack([row["teacher_features"] for row in made])
    cosines = [-token_alignment_loss(module.aligner.projector(h, TEACHER[0]), target) for h in features]
    assert cosines[0] != cosines[1]
    assert result["test/cosine"] == pytest.approx(cosines[0].item(), abs=1e-6)
    other = module.aligner.projector(features[0], TEACHER[0])
    shuffled = -token_alignment_loss(other, target[[2, 3, 0, 1]])
    assert result["test/shuffled_cosine"] == pytest.approx(shuffled.item(), abs=1e-6)


def test_sampling_knows_nothing_of_it() -> None:
    module, batch = tiny_module(), batch_of(teacher=TEACHER)
    samples = [
        kind.sample(module, batch, num_steps=2, generator=torch.Generator().manual_seed(0))
        for kind in (UREPA, Diffusion)
    ]
    assert torch.equal(*samples)
    assert module.aligner.tap._features is None


def test_checkpoint_loads_with_its_settings(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(tiny_module(hidden_dim=12, relation="sample", optimizer=torch.optim.AdamW), data())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = UREPA.load_from_checkpoint(tmp_path / "model.ckpt", denoiser=tiny_denoiser("unet"))
    assert loaded.aligner.settings["relation"] == "sample"
    expected = weights(trainer.lightning_module)
    assert all(torch.equal(value, expected[name]) for name, value in weights(loaded).items())
    assert any("projector" in name for name in expected)


def test_errors() -> None:
    with pytest.raises(ValueError, match="layer 'middle' is the name of no module of UNet2DModel: it has conv_in"):
        tiny_module(layer="middle")
    with pytest.raises(ValueError, match="align_weight must be >= 0, got -1"):
        tiny_module(align_weight=-1)
    batch = batch_of(teacher=TEACHER)
    with pytest.raises(ValueError, match="have 16 channels, and the projector was made for in_channels=8"):
        tiny_module(in_channels=8).training_loss(batch)
    with pytest.raises(ValueError, match=r"B = 4 rows, as the denoiser has, and D = teacher_dim = 6, got \(4, 64, 5\)"):
        tiny_module().training_loss({**batch, "teacher_features": torch.randn(4, 64, 5)})
    with pytest.raises(ValueError, match="65 tokens of the teacher make no grid in the shape of 4 x 4"):
        tiny_module().training_loss({**batch, "teacher_features": torch.randn(4, 65, 6)})


def test_defaults_are_the_papers() -> None:
    module = UREPA(tiny_denoiser("unet"), teacher_dim=6)
    assert module.aligner.settings == {
        "align_weight": 0.5,
        "manifold_weight": 3.0,
        "relation": "token",
        "center": False,
        "max_tokens": None,
    }
    assert module.aligner.projector.mlp[2].weight.shape == (2048, 2048)
