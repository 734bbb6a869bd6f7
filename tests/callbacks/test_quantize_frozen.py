from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from heliostat import QuantizeFrozen
from heliostat.components import TwoBitLinear, quantize_model
from tests.harness import ProcessPool, quiet_trainer, weights
from tests.lit_models.test_group_policy import FLOAT64, policy, prompts, tiny_model


class Distiller(LightningModule):
    """A student of a frozen teacher; the optimizer is given the frozen parameters too, as many modules do it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.teacher = nn.Sequential(nn.Linear(20, 48), nn.GELU(), nn.Linear(48, 4)).requires_grad_(False)
        self.student = nn.Linear(20, 4)
        self.on_device: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return (self(batch["input"]) - self.teacher(batch["input"])).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.teacher(batch["input"])

    def configure_optimizers(self) -> Any:
        self.on_device.append(isinstance(self.teacher[0], TwoBitLinear))
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Waiting(Distiller):
    """Its teacher is there only when training starts."""

    def on_fit_start(self) -> None:
        if not isinstance(self.teacher[0], TwoBitLinear):
            self.teacher.load_state_dict(Distiller(7).teacher.state_dict())


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.rows = [{"input": row} for row in torch.randn(96, 20)]
        self.towers = {"embedder": nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 8))}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=32)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def quantized_teacher(seed: int = 0, batches: Any = None, **options: Any) -> nn.Module:
    teacher = Distiller(seed).teacher
    quantize_model(teacher, calibration=batches, **options)
    return teacher


def check_state(actual: nn.Module, expected: nn.Module) -> None:
    state = actual.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("cls", [Distiller, Waiting])
@pytest.mark.parametrize("calibrated", [False, True], ids=["to nearest", "compensated"])
def test_teacher_is_quantised_before_the_first_step(tmp_path: Path, cls: Any, calibrated: bool) -> None:
    callback = QuantizeFrozen("teacher", calibration_batches=2 * calibrated, inputs={"input": "input"})
    if not calibrated:
        callback.inputs = None
    module, data = cls(), Data()
    trainer = quiet_trainer(tmp_path, max_steps=3, callbacks=[callback])
    trainer.fit(module, data)
    batches = [batch["input"] for batch in data.train_dataloader()][:2] if calibrated else None
    expected = quantized_teacher(7 if cls is Waiting else 0, batches)
    check_state(module.teacher, expected)
    assert module.on_device == [cls is Distiller]  # before optimizers are made, unless the module has to come first
    (group,) = trainer.optimizers[0].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}
    (report,) = callback.reports.values()
    assert report.layers[0].method == ("gptq" if calibrated else "rtn")

    student = cls(7 if cls is Waiting else 0).student  # the same training by hand, on the quantised teacher
    student.load_state_dict(Distiller(0).student.state_dict())
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    for batch in data.train_dataloader():
        optimizer.zero_grad()
        (student(batch["input"]) - expected(batch["input"])).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(module.student.weight, student.weight)


@pytest.mark.parametrize("cls", [Distiller, Waiting])
def test_resumed_run_goes_on_with_the_packed_weights(tmp_path: Path, cls: Any) -> None:
    def fit(steps: int, module: LightningModule, callback: Callback, path: Path | None = None) -> dict[str, Tensor]:
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = quiet_trainer(
            tmp_path, max_steps=steps, max_epochs=9, callbacks=[callback, keep], enable_checkpointing=True
        )
        trainer.fit(module, Data(), ckpt_path=path)
        return weights(module)

    whole = fit(5, cls(), QuantizeFrozen("teacher"))
    again = QuantizeFrozen("teacher", four_bit_fraction=1.0)  # what the checkpoint holds wins
    resumed = fit(5, cls(1), again, tmp_path / "step=3.ckpt")
    assert not again.reports
    assert whole.keys() == resumed.keys()
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]
    for run in ("validate", "test", "predict"):
        module = cls(1)
        getattr(quiet_trainer(tmp_path, callbacks=[QuantizeFrozen("teacher")]), run)(
            module, Data(), ckpt_path=tmp_path / "step=5.ckpt"
        )
        check_state(module.teacher, quantized_teacher(7 if cls is Waiting else 0))


def test_dense_checkpoint_is_loaded_then_quantised_and_the_data_module_is_reached(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(Distiller(3), Data())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    module, data = Distiller(0), Data()
    callback = QuantizeFrozen(["teacher", "datamodule.towers.embedder"], include="0", calibration_batches=1)
    callback.inputs = {"input": "input"}
    tester = quiet_trainer(tmp_path, callbacks=[callback])
    for _ in range(2):  # once
        tester.test(
            module, data, ckpt_path=None if isinstance(module.teacher[0], TwoBitLinear) else tmp_path / "dense.ckpt"
        )
    check_state(module.teacher, quantized_teacher(3, [next(iter(data.train_dataloader()))["input"]], include="0"))
    assert isinstance(data.towers["embedder"][0], TwoBitLinear)
    assert list(callback.reports) == ["teacher", "datamodule.towers.embedder"]


def test_reference_of_a_policy_and_base_under_an_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    reference = QuantizeFrozen("reference.network")
    module = policy(kl_coef=0.1)
    quiet_trainer(tmp_path, max_steps=2, max_epochs=9, callbacks=[reference], **FLOAT64).fit(module, prompts())
    expected = tiny_model()
    quantize_model(expected)
    names = [name for name, layer in expected.named_modules() if isinstance(layer, TwoBitLinear)]
    assert names
    for name in names:
        assert torch.equal(module.reference.network.get_submodule(name).codes, expected.get_submodule(name).codes)
        assert not isinstance(module.model.get_submodule(name), TwoBitLinear)

    adapted = policy(kl_coef=0.1, lora={"target_modules": ["c_attn"]})
    before = copy.deepcopy(adapted.model)
    base = QuantizeFrozen(
        "model", calibration_batches=1, inputs={"input_ids": "prompt_ids", "attention_mask": "prompt_mask"}
    )
    quiet_trainer(tmp_path, max_steps=2, max_epochs=9, callbacks=[base], **FLOAT64).fit(adapted, prompts())
    lora = {name: p for name, p in adapted.model.named_parameters() if "lora_B" in name}
    assert lora
    assert all(not torch.equal(p, before.get_parameter(name)) for name, p in lora.items())
    assert {layer.method for layer in base.reports["model"].layers} == {"gptq"}
    assert len(base.reports["model"].layers) == len(names)


def _fit_on_rank(rank: int, directory: Path, cls: Any, devices: int, strategy: str) -> dict[str, Tensor]:
    module = cls(rank)  # what differs between processes is made equal, as DDP does it
    if rank:
        module.student.load_state_dict(cls(0).student.state_dict())
    callback = QuantizeFrozen("teacher", calibration_batches=2, inputs={"input": "input"})
    trainer = quiet_trainer(
        directory, max_steps=2, callbacks=[callback], devices=devices, strategy=strategy, precision="64-true"
    )
    trainer.fit(module, DataLoader(Data().rows, 96 // devices, shuffle=False))  # type: ignore[arg-type]
    return weights(module)


def test_two_processes_hold_the_same_weights(tmp_path: Path, two_processes: ProcessPool) -> None:
    for cls in (Distiller, Waiting):
        first, second = two_processes.run(_fit_on_rank, tmp_path, cls, 2, "ddp")
        assert "teacher.0.codes" in first
        assert not [name for name in first if not torch.equal(first[name], second[name])]


class Trained(Distiller):
    def __init__(self) -> None:
        super().__init__()
        self.teacher[2].requires_grad_(True)


@pytest.mark.parametrize(
    ("cls", "settings", "match"),
    [
        (Trained, {"networks": "teacher"}, "1 layers of teacher are trained \\(2\\)"),
        (Distiller, {"networks": "student.weight"}, "no network"),
        (Distiller, {"networks": "teachers"}, "Distiller has no 'teachers'; it has teacher, student"),
        (Distiller, {"networks": "datamodule.towers.none"}, "dict has no 'none'; it has embedder"),
        (Distiller, {"networks": "teacher", "include": "7"}, "'7' matches no linear layer"),
        (Distiller, {"networks": "teacher", "calibration_batches": 1, "inputs": {"x": "y"}}, "a training batch has"),
    ],
)
def test_refusals(tmp_path: Path, cls: Any, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[QuantizeFrozen(**settings)]).fit(cls(), Data())


def test_trained_layers_may_be_left_out_and_shards_are_refused(tmp_path: Path) -> None:
    module = Trained()
    quiet_trainer(tmp_path, max_steps=1, callbacks=[QuantizeFrozen("teacher", exclude="2")]).fit(module, Data())
    assert [type(module.teacher[place]) for place in (0, 2)] == [TwoBitLinear, nn.Linear]
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.__class__ = ModelParallelStrategy
    with pytest.raises(MisconfigurationException, match="shards the weights"):
        QuantizeFrozen("teacher").setup(trainer, module, "fit")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"networks": []}, "networks is an empty list"),
        ({"calibration_batches": -1}, "calibration_batches must be >= 0"),
        ({"error_compensation": "gptq"}, "needs calibration_batches"),
        ({"four_bit_fraction": 1.5}, "four_bit_fraction must lie in 0..1"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        QuantizeFrozen(**{"networks": "teacher", **settings})
