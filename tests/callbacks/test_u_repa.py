from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from heliostat import StepSeed, UREPACallback
from heliostat.components import FeatureTap, u_repa_loss
from tests.denoisers import Rows, rows
from tests.harness import ModuleContract, quiet_trainer, weights

TEACHER = (16, 5)
CALLBACK: dict[str, Any] = {"teacher_dim": 5, "hidden_dim": 6}


class Foreign(LightningModule):
    """A denoiser and its training, by somebody who has never heard of any of this."""

    def __init__(self, returns: str = "tensor", only_denoiser: bool = True, chance: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.returns, self.only_denoiser, self.chance = returns, only_denoiser, chance
        self.denoiser = nn.ModuleDict(
            {"down": nn.Conv2d(3, 8, 2, 2), "mid_block": nn.Conv2d(8, 8, 1), "up": nn.ConvTranspose2d(8, 3, 2, 2)}
        )
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))
        self.losses: list[float] = []

    def predict(self, x: Tensor) -> Tensor:
        return self.denoiser["up"](F.silu(self.denoiser["mid_block"](F.silu(self.denoiser["down"](x))))) * self.scale

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        clean = batch["pixel_values"] if isinstance(batch, dict) else batch[0]
        self.seen += 1
        noise = torch.randn_like(clean) if self.chance else clean.flip(3).sin()
        loss = F.mse_loss(self.predict(clean + noise), noise)
        with torch.no_grad():
            self.predict(clean)  # what it looks at is not what is trained
        self.log("train/loss", loss, sync_dist=True)
        self.losses.append(loss.item())
        if self.returns == "none":
            return None if batch_idx == 1 else loss
        return loss if self.returns == "tensor" else {"loss": loss, "clean": clean}

    def configure_optimizers(self) -> Any:
        modules = self.denoiser if self.only_denoiser else self
        optimizer = torch.optim.SGD(modules.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class WithTerm(Foreign):
    """The same, with the alignment written into it by hand."""

    def __init__(self, projector: nn.Module, callback: dict[str, Any], **settings: Any) -> None:
        super().__init__(**settings)
        self.projector, self.callback = projector, callback
        self.tap = FeatureTap(self.denoiser["mid_block"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with self.tap:
            loss = super().training_step(batch, batch_idx)
        return loss + u_repa_loss(self.projector(self.tap.take(), 16), batch["teacher_features"], **self.callback).total

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        configured["optimizer"].param_groups[0]["params"].extend(self.projector.parameters())
        return configured


def data() -> Rows:
    return Rows(rows(teacher=TEACHER))


def fit(directory: Path, module: LightningModule, *callbacks: Any, **settings: Any) -> Any:
    trainer = quiet_trainer(directory, **{"max_steps": 5, "callbacks": [StepSeed(), *callbacks], **settings})
    trainer.fit(module, data())
    return trainer


class TestCallback(ModuleContract):
    """With similarities over all processes; the projector is compared too."""

    def module(self, *, dropout: bool = True) -> LightningModule:
        return Keeping(chance=dropout)

    def data(self, directory: Path) -> LightningDataModule:
        return data()

    def callbacks(self) -> list[Any]:
        return [StepSeed(), UREPACallback(relation="batch", stop_step=4, **CALLBACK)]


class Keeping(Foreign):
    """So that the harness compares the projector, which is in the module for the fit alone."""

    def on_fit_end(self) -> None:
        self.kept = next(cb for cb in self.trainer.callbacks if isinstance(cb, UREPACallback)).projector  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        assert not [name for name in state_dict if "u_repa" in name or "kept" in name]
        return super().load_state_dict(state_dict, *args, **kwargs)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"accumulate_grad_batches": 2, "max_steps": 3},
    {"precision": "bf16-mixed"},
    {"gradient_clip_val": 0.1},
]


@pytest.mark.parametrize("only_denoiser", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_equals_the_term_written_into_the_loss(tmp_path: Path, settings: dict, only_denoiser: bool) -> None:
    given: dict[str, Any] = {"align_weight": 0.7, "relation": "sample", "center": True}
    callback = UREPACallback(**CALLBACK, **given)
    torch.manual_seed(9)
    module = Foreign(only_denoiser=only_denoiser)
    fit(tmp_path, module, callback, **settings)
    again = UREPACallback(**CALLBACK, **given)
    torch.manual_seed(9)
    other = Foreign(only_denoiser=only_denoiser)
    again.setup(quiet_trainer(tmp_path, callbacks=[again]), other, "fit")
    again.teardown(None, other, "fit")  # type: ignore[arg-type]
    by_hand = WithTerm(again.projector, given, only_denoiser=True)  # type: ignore[arg-type]
    if not only_denoiser:
        by_hand.configure_optimizers = lambda: Foreign.configure_optimizers(by_hand)  # type: ignore[method-assign]
        by_hand.only_denoiser = False
    fit(tmp_path, by_hand, **settings)
    expected = weights(by_hand)
    actual = {**weights(module), **{f"projector.{k}": v for k, v in callback.projector.state_dict().items()}}  # type: ignore[union-attr]
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("settings", [{"align_weight": 0.0}, {"stop_step": 0}], ids=str)
def test_without_weight_nothing_changes_bit_by_bit(tmp_path: Path, settings: dict) -> None:
    results = []
    for callbacks in ([], [UREPACallback(**CALLBACK, **settings)]):
        torch.manual_seed(4)
        module = Foreign(only_denoiser=False)
        trainer = fit(tmp_path, module, *callbacks, gradient_clip_val=0.1)
        results.append((module.losses, weights(module), {**trainer.callback_metrics}))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())
    assert set(results[0][2]) == set(results[1][2])


def test_alignment_begins_with_the_same_loss_and_changes_what_follows(tmp_path: Path) -> None:
    """The projector does not shift the random numbers; stopping is at the step that was named."""
    plain, aligned, stopped = Foreign(), Foreign(), Foreign()
    for module, settings in ((plain, {"align_weight": 0.0}), (aligned, {}), (stopped, {"stop_step": 1})):
        torch.manual_seed(4)
        trainer = fit(tmp_path, module, UREPACallback(**CALLBACK, **settings))  # type: ignore[arg-type]
        named = {name for name in trainer.callback_metrics if "u_repa" in name}
        parts = {"cosine", "shuffled_cosine", "manifold"} if module is aligned else set()
        assert module is stopped or named == {f"train/u_repa_{part}" for part in parts}
    assert plain.losses[0] == aligned.losses[0] == stopped.losses[0]
    assert aligned.losses[1] == stopped.losses[1] != plain.losses[1]
    assert aligned.losses[2] != stopped.losses[2]


@pytest.mark.parametrize("returns", ["dict", "none"])
def test_what_training_step_may_return(tmp_path: Path, returns: str) -> None:
    outputs = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, output: Any, *_: Any) -> None:
            outputs.append(output)

    module, callback = Foreign(returns), UREPACallback(**CALLBACK)
    fit(tmp_path, module, callback, Look(), max_steps=-1, max_epochs=1)
    assert len(outputs) == 3
    assert [not output for output in outputs] == [False, returns == "none", False]
    assert returns == "none" or {"loss", "clean"} == set(outputs[0])
    assert outputs[0]["loss"] != pytest.approx(module.losses[0])


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    module, callback = Foreign(), UREPACallback(**CALLBACK)
    seen: list[Any] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append((set(pl_module.state_dict()), dict(pl_module.named_parameters())))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            assert callback._guest is not None
            assert callback._guest.aligner.tap._features is None

    before = set(module.state_dict()), [*module._modules]
    fit(tmp_path, module, callback, Look())
    assert "training_step" not in vars(module)
    assert (set(module.state_dict()), [*module._modules]) == before
    assert not module.denoiser["mid_block"]._forward_hooks
    assert seen[0][0] == before[0]  # in training its state dict is its own, and the projector is trained
    assert any("projector" in name for name in seen[0][1])

    class Broken(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            raise RuntimeError("broken")

    module = Broken()
    own = module.training_step
    vars(module)["training_step"] = own
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, module, UREPACallback(**CALLBACK))
    assert vars(module)["training_step"] is own
    assert [*module._modules] == before[1]
    assert not module.denoiser["mid_block"]._forward_hooks


def test_another_fit_goes_on_with_the_projector(tmp_path: Path) -> None:
    module, callback = Foreign(), UREPACallback(**CALLBACK)
    fit(tmp_path, module, callback)
    first = {name: value.clone() for name, value in callback.projector.state_dict().items()}  # type: ignore[union-attr]
    starts = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            starts.append({name: value.clone() for name, value in callback.projector.state_dict().items()})  # type: ignore[union-attr]

    fit(tmp_path, module, callback, Look())
    assert all(torch.equal(value, first[name]) for name, value in starts[0].items())
    assert not torch.equal(callback.projector.mlp[0].weight, first["mlp.0.weight"])  # type: ignore[union-attr]


def test_checkpoints_load_without_it(tmp_path: Path) -> None:
    module = Foreign()
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, module, UREPACallback(**CALLBACK), keeper, enable_checkpointing=True)
    loaded = Foreign.load_from_checkpoint(tmp_path / "step=5.ckpt")
    assert all(torch.equal(value, weights(module)[name]) for name, value in weights(loaded).items())
    trainer = quiet_trainer(tmp_path, max_steps=6)
    warned, refused = pytest.warns(match="UREPACallback"), pytest.raises(ValueError, match="size of optimizer's group")
    with warned, refused:
        trainer.fit(loaded, data(), ckpt_path=str(tmp_path / "step=5.ckpt"))


def test_averaged_weights(tmp_path: Path) -> None:
    def fitted(directory: Path, steps: int, ckpt_path: str | None = None) -> dict[str, Tensor]:
        keeper = ModelCheckpoint(directory, "last", every_n_train_steps=2)
        callbacks = [StepSeed(), UREPACallback(**CALLBACK), EMAWeightAveraging(decay=0.5), keeper]
        trainer = quiet_trainer(directory, max_steps=steps, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(Foreign(), data(), ckpt_path=ckpt_path)
        return weights(trainer.lightning_module)

    whole = fitted(tmp_path / "whole", 4)
    fitted(tmp_path / "part", 2)
    resumed = fitted(tmp_path / "part", 4, str(tmp_path / "part/last.ckpt"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    callbacks = (EMAWeightAveraging(), UREPACallback(**CALLBACK))
    with pytest.raises(MisconfigurationException, match="list UREPACallback before EMAWeightAveraging"):
        fit(tmp_path, Foreign(), *callbacks)


class Teacher(nn.Module):
    output_dim = 5

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.dropout = nn.Conv2d(3, 5, 2, 2), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.patches(x)).flatten(2).mT


def test_own_teacher_equals_its_cached_tokens(tmp_path: Path) -> None:
    teacher = Teacher()
    made = rows()
    for row in made:
        with torch.no_grad():
            row["teacher_features"] = teacher.patches(row["pixel_values"]).flatten(1).T
    results = []
    for batches, callback in (
        (made, UREPACallback(**CALLBACK)),
        (rows(), UREPACallback(teacher=teacher, hidden_dim=6)),
        (
            [(row["pixel_values"], row["index"]) for row in made],
            UREPACallback("mid_block", teacher, pixels_key=0, hidden_dim=6),
        ),
    ):
        torch.manual_seed(4)
        module, loader = Foreign(), DataLoader(batches, batch_size=16)  # type: ignore[arg-type, var-annotated]
        trainer = quiet_trainer(tmp_path, max_steps=3, callbacks=[StepSeed(), callback])
        trainer.fit(module, loader)
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        assert not any("patches" in name for name in torch.load(tmp_path / "model.ckpt")["state_dict"])
        results.append(weights(module))
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)


def test_optimizers_that_take_no_more_parameters(tmp_path: Path) -> None:
    module = Foreign()
    module.configure_optimizers = lambda: torch.optim.Adagrad(module.denoiser.parameters(), lr=0.1)  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match="cannot be added to Adagrad any more.*self.parameters()"):
        fit(tmp_path, module, UREPACallback(**CALLBACK))
    module.configure_optimizers = lambda: torch.optim.Adagrad(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    fit(tmp_path, module, UREPACallback(**CALLBACK))


def test_named_parameters_and_groups(tmp_path: Path) -> None:
    module, callback = Foreign(), UREPACallback(**CALLBACK)

    def configure() -> Any:
        groups = [
            {"params": [*module.denoiser["up"].named_parameters()], "lr": 0.01},
            {"params": [*module.denoiser["down"].named_parameters()]},
        ]
        return torch.optim.AdamW(groups, lr=0.1)

    module.configure_optimizers = configure  # type: ignore[method-assign]
    trainer = fit(tmp_path, module, callback)
    groups = trainer.optimizers[0].param_groups
    assert [len(group["params"]) for group in groups] == [2 + 6, 2]
    assert groups[0]["param_names"][-1] == "heliostat_u_repa.aligner.projector.mlp.4.bias"
    assert len(groups[0]["param_names"]) == 8


def test_refusals(tmp_path: Path) -> None:
    class Manual(Foreign):
        automatic_optimization = False

    cases: list[tuple[LightningModule, dict, str]] = [
        (Manual(), {}, "module with manual optimisation does not. Add heliostat.components.u_repa_loss"),
        (Foreign(), {"layer": "middle"}, "UREPACallback: layer 'middle' is the name of no module of Foreign: it has"),
        (Foreign(), {"features_key": "dino"}, "looks for 'dino' in the batch, which has only 'pixel_values'.*tokens"),
        (Foreign(), {"teacher": Teacher(), "pixels_key": "image"}, "looks for 'image' in .*: give pixels_key"),
    ]
    for module, settings, pattern in cases:
        with pytest.raises(MisconfigurationException, match=pattern):
            fit(tmp_path, module, UREPACallback(**{**CALLBACK, **settings}))
    sharded: Any = SimpleNamespace(strategy=FSDPStrategy())  # Lightning has none for the CPU
    with pytest.raises(MisconfigurationException, match="FSDPStrategy, which shards the parameters"):
        UREPACallback(**CALLBACK).setup(sharded, Foreign(), "fit")
    with pytest.raises(ValueError, match="teacher_dim, .* is needed: there is no teacher"):
        UREPACallback()
    with pytest.raises(ValueError, match="is needed: Identity has no output_dim"):
        UREPACallback(teacher=nn.Identity())
    with pytest.raises(ValueError, match="manifold_weight must be >= 0, got -1"):
        UREPACallback(**CALLBACK, manifold_weight=-1)
