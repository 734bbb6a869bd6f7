from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from heliostat import AlignmentRecovery, cli, recover_checkpoint
from heliostat.callbacks import _recovery
from tests.harness import ProcessPool, quiet_trainer, weights, word_tokenizer

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

# --- modules that know nothing of the callback -----------------------------------------------------------------------


def tiny_llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config)


def with_lora(model: nn.Module, targets: list[str], **settings: Any) -> nn.Module:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=16, target_modules=targets, **settings))


class Foreign(LightningModule):
    rate = 0.05

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.rate)


class LanguageModel(Foreign):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    @staticmethod
    def batches(seed: int, count: int = 3) -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 32, (count, 4, 6), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, 1::2, 4:] = 0  # padding on the right
        rows = [{"input_ids": i * m, "attention_mask": m, "labels": i} for i, m in zip(ids, mask, strict=True)]
        return DataLoader(rows, batch_size=None)


class Classifier(Foreign):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.accuracy = MulticlassAccuracy(4, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self.model(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val/accuracy", self.accuracy)
        self.log_dict({"val/loss": nn.functional.cross_entropy(logits, batch[1])}, prog_bar=True)


def loader(shape: tuple[int, ...], seed: int, shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(12, *shape, generator=generator), torch.randint(4, (12,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=shuffle)


def language_model() -> LanguageModel:
    return LanguageModel(with_lora(tiny_llama(), ["q_proj", "up_proj"]))


def vision_transformer(adapt: bool = True) -> Classifier:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=4
    )
    return Classifier(with_lora(model, ["qkv", "fc1"]) if adapt else model)


def linear_network() -> Classifier:
    torch.manual_seed(0)
    return Classifier(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)))


def always(module: LightningModule) -> float:
    return 1.0


SMALL = {"recovery_rate": 0.02, "steps": 4, "save_every": 1, "warmup_steps": 2}
FOREIGN: dict[str, tuple] = {
    "peft-lm": (language_model, LanguageModel.batches, {}),
    "timm-vit-peft": (vision_transformer, lambda seed: loader((3, 8, 8), seed), {"pooling": "cls"}),
    "linear": (linear_network, lambda seed: loader((8,), seed), {"layers": "model", "layer_end": 4}),
}


@pytest.fixture(params=FOREIGN)
def foreign(request) -> tuple:
    return FOREIGN[request.param]


def recovery(foreign: tuple, score=always, **settings: Any) -> AlignmentRecovery:
    _, batches, own = foreign
    return AlignmentRecovery(batches(2), batches(3), score, **{**SMALL, **own, **settings})


def fit(directory: Path, foreign: tuple, *callbacks: Any, module: Any = None, ckpt_path=None, **settings: Any):
    make, batches, _ = foreign
    trainer = quiet_trainer(directory, callbacks=[*callbacks], **{"max_epochs": 3, **settings})
    trainer.fit(module or make(), batches(1), ckpt_path=ckpt_path)
    return trainer


def plain(module: LightningModule) -> dict[str, Tensor]:
    """Weights of the module's network with its adapters merged."""
    model = copy.deepcopy(module.model)
    model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


# --- what it does ----------------------------------------------------------------------------------------------------


def test_every_weight_is_the_aligned_or_the_tuned_one(tmp_path: Path, foreign: tuple) -> None:
    aligned = plain(foreign[0]())
    tuned = plain(fit(tmp_path / "without", foreign).lightning_module)
    scored: list[dict[str, Tensor]] = []

    def score(module: LightningModule) -> float:
        assert not module.training
        assert not torch.is_grad_enabled()
        scored.append(weights(module))
        return 1.0

    callback = recovery(foreign, score)
    module = fit(tmp_path, foreign, callback).lightning_module
    result = callback.result
    assert module.training
    assert all(p.grad is None or p.requires_grad for p in module.parameters())
    assert result.chosen_step == len(result.history) == 4
    assert result.history[-1].loss < result.history[0].loss
    assert_equal(weights(module), scored[-1])  # what was scored is what is left
    recovered = plain(module)
    assert recovered.keys() == aligned.keys()
    changed = {}
    for name, value in recovered.items():
        restored = value != tuned[name]
        assert torch.equal(value[restored], aligned[name][restored])
        changed[name] = int(restored.sum())
    assert not [name for name, count in changed.items() if count and ("norm" in name or "embed" in name)]
    saved = safetensors.load_file(tmp_path / "recovered.safetensors")
    assert saved.keys() == recovered.keys()
    assert_equal(saved, recovered)
    report = json.loads((tmp_path / "alignment_recovery.json").read_text())[0]
    assert report["chosen_step"] == 4
    assert len(report["history"]) == 4
    assert sorted(report["restored"].values()) == sorted(count for count in changed.values() if count)
    callback.undo(module)
    assert_equal(weights(module), scored[0])
    assert_equal(plain(module), tuned)


def test_state_dict_of_a_folded_module_is_the_recovered_model(tmp_path: Path) -> None:
    """Loaded into a new module with adapters, it must not add the adapters' update a second time."""
    foreign = FOREIGN["peft-lm"]
    trainer = fit(tmp_path, foreign, recovery(foreign))
    assert not [layer for layer in trainer.lightning_module.modules() if getattr(layer, "merged", False)]
    again = language_model()
    again.load_state_dict(trainer.lightning_module.state_dict())
    batch = next(iter(LanguageModel.batches(5)))
    with torch.no_grad():
        expected = trainer.lightning_module.model(**batch).logits
        torch.testing.assert_close(again.model(**batch).logits, expected)
        loaded = tiny_llama(seed=9)
        loaded.load_state_dict(safetensors.load_file(tmp_path / "recovered.safetensors"), strict=False)
        torch.testing.assert_close(loaded(**batch).logits, expected)


def test_padding_is_not_the_last_token(tmp_path: Path) -> None:
    """Padding on the left, on the right, and none: one representation."""
    directions = []
    for left, right in ((0, 0), (3, 0), (0, 3)):
        ids = torch.arange(1, 9).view(2, 4)
        ids, mask = (nn.functional.pad(t, (left, right)) for t in (ids, torch.ones_like(ids)))
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        callback = recovery(FOREIGN["peft-lm"], rollback=False)
        callback.harmful_dataloader = [batch]
        fit(tmp_path, FOREIGN["peft-lm"], callback)
        directions.append(torch.tensor([line.loss for line in callback.result.history]))
    torch.testing.assert_close(directions[1], directions[0])
    torch.testing.assert_close(directions[2], directions[0])


@pytest.mark.parametrize("kind", ["file", "directory", "state dict"])
def test_reference_is_read_from_disk(tmp_path: Path, kind: str) -> None:
    foreign = FOREIGN["peft-lm"]
    expected = fit(tmp_path / "own", foreign, recovery(foreign)).lightning_module
    tiny_llama().save_pretrained(tmp_path / "aligned", max_shard_size="4KB")
    assert (tmp_path / "aligned" / "model.safetensors.index.json").exists()
    reference: Any = tmp_path / "aligned"
    if kind == "file":
        tiny_llama().save_pretrained(tmp_path / "whole")
        reference = str(tmp_path / "whole" / "model.safetensors")
    if kind == "state dict":
        reference = tiny_llama().state_dict()
    trainer = fit(tmp_path, foreign, recovery(foreign, reference=reference))
    assert_equal(weights(trainer.lightning_module), weights(expected))


def test_bf16_model(tmp_path: Path) -> None:
    foreign = FOREIGN["linear"]
    callback = recovery(foreign)
    trainer = fit(tmp_path, foreign, callback, precision="bf16-true")
    assert trainer.lightning_module.model[0].weight.dtype == torch.bfloat16
    assert callback.result.chosen_step > 0
    aligned = {f"model.{name}": value.bfloat16() for name, value in plain(linear_network()).items()}
    for entries in callback.restorations.steps:
        for name, (index, _) in entries.items():
            restored = trainer.lightning_module.get_parameter(name).flatten()[index]
            assert torch.equal(restored, aligned[name].flatten()[index])


def test_mixed_precision_recovers_in_float32(tmp_path: Path) -> None:
    callback = recovery(FOREIGN["timm-vit-peft"], lambda module: float(not torch.is_autocast_enabled("cpu")) + 1)
    dtypes = set()
    fit_module = vision_transformer()
    handle = fit_module.model.get_submodule("base_model.model.blocks.0").register_forward_hook(
        lambda block, args, output: dtypes.add((torch.is_autocast_enabled("cpu"), block.training))
    )
    fit(tmp_path, FOREIGN["timm-vit-peft"], callback, module=fit_module, precision="bf16-mixed")
    handle.remove()
    assert dtypes == {(True, True), (False, False)}  # training; recovery
    assert callback.result.initial_score == 1.0  # the task is measured as in validation, under autocast


def test_choice_of_representation(tmp_path: Path) -> None:
    foreign = FOREIGN["linear"]
    named = recovery(foreign, layers=["model.0", "model.2", "model.4"], layer_end=2)
    own = recovery(foreign, representation_fn=lambda module, batch: module.model[:3](batch[0]), layer_end=3)
    results = []
    for callback in (named, own):
        fit(tmp_path, foreign, callback)
        results.append([line[:4] for line in callback.result.history])
    assert results[0] == results[1]


def test_what_is_above_the_kept_blocks_builds_no_graph(tmp_path: Path) -> None:
    module, graphs = linear_network(), set()
    module.model[4].register_forward_hook(lambda *_: graphs.add((module.training, torch.is_grad_enabled())))
    fit(tmp_path, FOREIGN["linear"], recovery(FOREIGN["linear"]), module=module)
    assert graphs == {(True, True), (False, False)}  # training; recovery
    assert torch.is_grad_enabled()


def test_weights_that_are_unfrozen_later_are_said_to_be_left_out(tmp_path: Path) -> None:
    class Unfreeze(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            pl_module.requires_grad_(True)

    module = linear_network()
    module.model[2].requires_grad_(False)
    with pytest.warns(UserWarning, match="2 parameters, such as model.2.bias, are trained now and were not in setup"):
        fit(tmp_path, FOREIGN["linear"], recovery(FOREIGN["linear"]), Unfreeze(), module=module)


def test_exclude_and_harmful_rate(tmp_path: Path) -> None:
    foreign = FOREIGN["linear"]
    callback = recovery(foreign, exclude=["*.bias"], harmful_rate=lambda module: 0.25)
    fit(tmp_path, foreign, callback)
    assert callback.restorations.counts().keys() == {"model.0.weight", "model.2.weight"}
    assert {line.harmful_rate for line in callback.result.history} == {0.25}
    assert callback.result.initial_harmful_rate == 0.25


def test_picture_of_the_recovery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Score and harmful rate from the start on; without matplotlib the weights are saved all the same."""
    foreign = FOREIGN["linear"]
    callback = recovery(foreign, harmful_rate=lambda module: 0.25)
    fit(tmp_path, foreign, callback)
    assert (tmp_path / "alignment_recovery.png").stat().st_size > 5000
    (axes,) = _recovery.figure(callback.reports).axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert curves["harmful rate"] == [[step, 0.25] for step in range(5)]
    history = [(0, callback.result.initial_score), *((line.step, line.score) for line in callback.result.history)]
    assert curves["task score"] == [list(point) for point in history]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r"picture of a recovery needs the package `matplotlib`.*heliostat\[data\]"):
        fit(tmp_path / "without", foreign, recovery(foreign))
    assert (tmp_path / "without" / "recovered.safetensors").is_file()


# --- the task's score ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "mode"), [("val/accuracy", "max"), ("val/loss", "min")])
def test_a_metric_that_validation_logs(tmp_path: Path, metric: str, mode) -> None:
    callback = recovery(FOREIGN["linear"], metric, mode=mode, metric_drop=9.0)
    module, validation = linear_network(), loader((8,), 4)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2)
    trainer.fit(module, loader((8,), 1), validation)
    assert callback.result.initial_score == pytest.approx(float(trainer.callback_metrics[metric]), rel=1e-5)
    trainer.validate(module, validation, verbose=False)
    assert callback.result.history[-1].score == pytest.approx(float(trainer.callback_metrics[metric]), rel=1e-5)


def test_a_metric_that_is_not_logged_is_refused_before_training(tmp_path: Path) -> None:
    module, before = linear_network(), weights(linear_network())
    trainer = quiet_trainer(tmp_path, callbacks=[recovery(FOREIGN["linear"], "val/f1")], max_epochs=1)
    with pytest.raises(
        MisconfigurationException, match=r"never logs that .* it logs val/accuracy, val/loss\. Name one"
    ):
        trainer.fit(module, loader((8,), 1), loader((8,), 4))
    assert_equal(weights(module), before)
    with pytest.raises(MisconfigurationException, match="needs one validation loader, and there is none"):
        fit(tmp_path, FOREIGN["linear"], recovery(FOREIGN["linear"], "val/accuracy"))
    with pytest.raises(MisconfigurationException, match="LanguageModel has no validation_step"):
        fit(tmp_path, FOREIGN["peft-lm"], recovery(FOREIGN["peft-lm"], "val/accuracy"))


def test_prompts_and_harmful_rate_by_name(tmp_path: Path) -> None:
    """As a config file gives them."""

    class WithPrompts(Classifier):
        def flagged_prompts(self) -> DataLoader:
            return loader((8,), 2)

    module = WithPrompts(linear_network().model)
    callback = recovery(FOREIGN["linear"], "val/accuracy", harmful_rate="val/loss", metric_drop=9.0)
    callback.harmful_dataloader = "flagged_prompts"
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1).fit(module, loader((8,), 1), loader((8,), 4))
    assert callback.result.history[0].harmful_rate > 0
    callback.harmful_dataloader = "unknown"
    with pytest.raises(MisconfigurationException, match="neither the data module nor Classifier has a method"):
        fit(tmp_path, FOREIGN["linear"], callback, module=linear_network())


# --- during training -------------------------------------------------------------------------------------------------


def test_every_n_epochs_in_place_and_in_checkpoints(tmp_path: Path) -> None:
    foreign = FOREIGN["linear"]
    callback = recovery(foreign, every_n_epochs=2, zero_moments=True)
    keeper = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)
    module = linear_network()
    identity = [id(p) for p in module.parameters()]
    trainer = fit(tmp_path, foreign, keeper, callback, module=module, max_epochs=4, enable_checkpointing=True)
    assert [id(p) for p in module.parameters()] == identity
    assert [line["epoch"] for line in callback.reports] == [1, 3]
    kept = torch.load(tmp_path / "kept" / "epoch=3.ckpt", weights_only=True)
    assert_equal(kept["state_dict"], weights(module))
    moments = trainer.optimizers[0].state
    index, _ = callback.restorations.steps[0]["model.0.weight"]
    assert not moments[module.model[0].weight]["exp_avg"].flatten()[index].any()
    assert moments[module.model[0].weight]["exp_avg"].any()


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    foreign = FOREIGN["linear"]
    whole = recovery(foreign, every_n_epochs=2)
    expected = fit(tmp_path / "whole", foreign, whole, max_epochs=4).lightning_module
    first = fit(tmp_path / "first", foreign, recovery(foreign, every_n_epochs=2), max_epochs=3)
    first.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    second = recovery(foreign, every_n_epochs=2)
    resumed = fit(tmp_path / "second", foreign, second, max_epochs=4, ckpt_path=tmp_path / "a.ckpt").lightning_module
    assert_equal(weights(resumed), weights(expected))
    assert second.reports == whole.reports
    other = linear_network()
    nn.init.ones_(other.model[0].weight)
    with pytest.raises(MisconfigurationException, match="Build the module from the same aligned weights"):
        fit(tmp_path, foreign, recovery(foreign), module=other, ckpt_path=tmp_path / "a.ckpt")


# --- several processes -----------------------------------------------------------------------------------------------


def on_rank(rank: int, name: str, directory: Path, devices: int, strategy: str) -> tuple[dict[str, Tensor], list]:
    foreign = FOREIGN[name]
    callback = recovery(foreign, rollback=True)
    module = foreign[0]()
    module.rate = 0.0  # what training does on two processes is not the matter here
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    if name == "linear":
        callback.reference = {key: value.double() for key, value in plain(linear_network()).items()}
    settings = {"precision": "64-true", "devices": devices, "strategy": strategy, "max_epochs": 1}
    trainer = fit(directory, foreign, callback, module=module, **settings)
    return weights(trainer.lightning_module), [line[:4] for line in callback.result.history]


@pytest.mark.parametrize("name", ["peft-lm", "linear"])
def test_two_processes_equal_one(tmp_path: Path, name: str, two_processes: ProcessPool) -> None:
    expected, history = on_rank(0, name, tmp_path, 1, "auto")
    assert sum(line[2] for line in history) > 0
    for actual, lines in two_processes.run(on_rank, name, tmp_path, 2, "ddp"):
        assert_equal(actual, expected)
        for line, other in zip(lines, history, strict=True):
            assert line == pytest.approx(other, rel=1e-9)


def metric_on_rank(rank: int, directory: Path) -> tuple[float, float, int]:
    """Each process validates its share of the data; all must act on the whole."""
    callback = recovery(FOREIGN["linear"], "val/loss", mode="min", metric_drop=9.0)
    trainer = quiet_trainer(directory, callbacks=[callback], max_epochs=1, devices=2, strategy="ddp")
    module, validation = linear_network(), loader((8,), 4)
    trainer.fit(module, loader((8,), 1), validation)
    callback.undo(module)
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(module.model(x), y) for x, y in validation]
    return callback.result.initial_score, float(sum(losses)) / len(losses), callback.result.chosen_step


def test_a_logged_metric_is_that_of_all_processes(tmp_path: Path, two_processes: ProcessPool) -> None:
    answers = two_processes.run(metric_on_rank, tmp_path)
    assert answers[0] == answers[1]
    assert answers[0][0] == pytest.approx(answers[0][1], rel=1e-5)


def shuffled_on_rank(rank: int, directory: Path) -> str:
    callback = recovery(FOREIGN["linear"])
    callback.harmful_dataloader = loader((8,), 2, shuffle=True)
    try:
        fit(directory, FOREIGN["linear"], callback, devices=2, strategy="ddp")
    except MisconfigurationException as error:
        return str(error)
    return ""


def test_shuffled_prompts_are_refused_on_several_processes(tmp_path: Path, two_processes: ProcessPool) -> None:
    assert all("Set shuffle=False" in message for message in two_processes.run(shuffled_on_rank, tmp_path))


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(directory: Path, message: str, name: str = "linear", module: Any = None, **settings: Any) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(directory, FOREIGN[name], recovery(FOREIGN[name], **settings), module=module)


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    refused(tmp_path, "Classifier has no list of like blocks. Name the submodules", layers=None)
    refused(tmp_path, "layer_end must lie in 1..5, the number of blocks, got 7", layer_end=7)
    refused(tmp_path, "has no attribute `nonsense`", layers="nonsense")
    refused(tmp_path, "has no attribute `other`", network="other")
    refused(tmp_path, r"no parameter .* left by exclude=\['\*'\]", exclude=["*"])
    only_top = LanguageModel(with_lora(tiny_llama(), ["q_proj"], layers_to_transform=[2]))
    refused(tmp_path, "first 2 of 3 blocks .* is trained, or has a LoRA layer", "peft-lm", only_top)
    refused(tmp_path, "cannot be used with LoRA", "peft-lm", every_n_epochs=1)
    refused(
        tmp_path, "is no plain LoRA layer", "peft-lm", LanguageModel(with_lora(tiny_llama(), ["q_proj"], use_dora=True))
    )
    merged = language_model()
    merged.model.merge_adapter()
    refused(tmp_path, "has merged adapters already", "peft-lm", merged)


def test_aligned_weights_that_differ_are_refused(tmp_path: Path) -> None:
    aligned = dict(linear_network().model.state_dict())
    refused(tmp_path, "no weight for model.0.weight; it has a, .* same architecture", reference={"a": torch.ones(2)})
    wrong = {**aligned, "2.weight": torch.ones(3, 16)}
    refused(tmp_path, r"1 parameters .*model.2.weight: \(3, 16\) instead of \(16, 16\)", reference=wrong)
    missing = {name: value for name, value in aligned.items() if name != "2.bias"}
    refused(tmp_path, "model.2.bias: missing", reference=missing)
    refused(tmp_path, "no safetensors weights at", reference=tmp_path)
    lower = {name: value for name, value in aligned.items() if not name.startswith("4")}
    fit(tmp_path, FOREIGN["linear"], recovery(FOREIGN["linear"], reference=lower))  # what is above does not matter
    blocks = {name: value for name, value in tiny_llama().state_dict().items() if "layers" in name}
    callback = recovery(FOREIGN["peft-lm"], reference=blocks)
    with pytest.warns(UserWarning, match="2 parameters are not in reference .*embed_tokens.weight, .*norm.weight"):
        fit(tmp_path, FOREIGN["peft-lm"], callback)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    module = language_model()
    module.model.get_base_model().is_quantized = True
    refused(tmp_path, "PeftModel is quantised", "peft-lm", module)
    module = linear_network()
    module.model[0].weight = nn.Parameter(torch.ones(16, 8, dtype=torch.int8), requires_grad=False)
    reference = linear_network().model.state_dict()
    refused(tmp_path, r"model.0.weight \(torch.int8\) is quantised", module=module, reference=reference)


def test_prompts_that_give_no_direction_are_refused_before_training(tmp_path: Path) -> None:
    zero = {"representation_fn": lambda module, batch: torch.zeros(2, 3)}
    refused(tmp_path, "harmful_dataloader: .* is zero, which is no direction", **zero)
    detached = {"representation_fn": lambda module, batch: module.model[:3](batch[0]).detach()}
    refused(tmp_path, "has no gradient .* must not detach", **detached)
    callback = recovery(FOREIGN["linear"])
    for batches, message in (([], "there is none"), (iter([]), "is an iterator")):
        callback.task_dataloader = batches
        with pytest.raises(MisconfigurationException, match=message):
            fit(tmp_path, FOREIGN["linear"], callback)
    with pytest.raises(ValueError, match="task_dataloader may be None only with rollback=False"):
        AlignmentRecovery([], None, always)
    with pytest.raises(ValueError, match="every_n_epochs must be >= 1"):
        recovery(FOREIGN["linear"], every_n_epochs=0)


def test_weights_tied_to_the_embedding_are_left_out(tmp_path: Path) -> None:
    module = linear_network()
    module.copy = nn.ModuleDict({"head": nn.Linear(8, 16)})
    module.copy["head"].weight = module.model[0].weight
    callback = recovery(FOREIGN["linear"])
    with pytest.warns(UserWarning, match="1 parameters are shared with modules outside the blocks"):
        fit(tmp_path, FOREIGN["linear"], callback, module=module)
    assert callback.result.chosen_step > 0
    assert "model.0.weight" not in callback.restorations.counts()


# --- a saved model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_checkpoint_of_transformers(tmp_path: Path, kind: str) -> None:
    aligned = tiny_llama().bfloat16()
    aligned.save_pretrained(tmp_path / "aligned")
    tokenizer = word_tokenizer([f"w{i}" for i in range(27)])
    tokenizer.save_pretrained(tmp_path / "aligned")
    tuned = with_lora(tiny_llama().bfloat16(), ["q_proj", "up_proj"])
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    if kind == "adapter":
        tuned.save_pretrained(tmp_path / "tuned")
        tuned = tuned.float().merge_and_unload().bfloat16()  # as it is done: merged in float32
    else:
        tuned = tuned.merge_and_unload()
        tuned.save_pretrained(tmp_path / "tuned")
    (tmp_path / "flagged.txt").write_text("w1 w2 w3\nw4 w5\n\nw6\n")
    examples = [{"prompt": "w7 w8", "answer": "w9"}, {"prompt": "w1", "answer": "w2 w3"}]
    result = recover_checkpoint(
        tmp_path / "tuned",
        tmp_path / "aligned",
        tmp_path / "out",
        tmp_path / "flagged.txt",
        examples,
        batch_size=2,
        task_score=always,
        device="cpu",
        **SMALL,
    )
    assert result.chosen_step == 4
    recovered = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert recovered.dtype == torch.bfloat16
    before, after = dict(tuned.named_parameters()), dict(recovered.named_parameters())
    originals = dict(tiny_llama().bfloat16().named_parameters())
    assert after.keys() == before.keys()
    changes = 0
    for name, value in after.items():
        changed = value != before[name]
        assert torch.equal(value[changed], originals[name][changed])
        changes += int(changed.sum())
    restored = sum(result.log.counts().values())
    assert changes == restored if kind == "model" else 0 < changes <= restored  # rounded, some are the same again
    report = json.loads((tmp_path / "out" / "alignment_recovery.json").read_text())
    assert report["chosen_step"] == 4
    with pytest.raises(ValueError, match="exists. Name a new directory"):
        recover_checkpoint(tmp_path / "tuned", tmp_path / "aligned", tmp_path / "out", ["w1"], examples)


def test_checkpoint_is_scored_by_the_answers_tokens(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    tokenizer = word_tokenizer([f"w{i}" for i in range(27)])
    tokenizer.save_pretrained(tmp_path / "model")
    prompts = ["w7 w8", "w1 w2 w3"]
    with torch.no_grad():
        logits = [model(torch.tensor([tokenizer(p)["input_ids"]])).logits[0, -1] for p in prompts]
    best = [tokenizer.decode(int(values.argmax())) for values in logits]
    answers = [best[0], "w1" if best[1] != "w1" else "w2"]
    examples = [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]
    result = recover_checkpoint(
        tmp_path / "model", tmp_path / "model", tmp_path / "out", ["w1"], examples, device="cpu"
    )
    assert (result.initial_score, result.chosen_step, result.history) == (0.5, 0, [])
    for wrong, message in (
        ([{"prompt": "w1"}], "entry 1 has no answer; it has prompt"),
        ([], "task_examples is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            recover_checkpoint(tmp_path / "model", tmp_path / "model", tmp_path / "new", ["w1"], wrong)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("aligned")
    word_tokenizer([f"w{i}" for i in range(27)]).save_pretrained("aligned")
    tuned = tiny_llama()
    with torch.no_grad():
        for parameter in tuned.model.layers.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    tuned.save_pretrained("tuned")
    Path("flagged.txt").write_text("w1 w2 w3\nw4 w5\n")
    Path("task.jsonl").write_text(json.dumps({"prompt": "w7 w8", "answer": "w9"}) + "\n")
    command = ["heliostat", "recover", "tuned", "--aligned", "aligned", "--harmful", "flagged.txt"]
    command += ["--task", "task.jsonl", "--batch_size", "2", "--steps", "2", "--metric_drop", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", "out"])
    assert cli.main() is None
    assert "recovered model: out" in capsys.readouterr().out
    assert Path("out/alignment_recovery.json").is_file()
    transformers.AutoModelForCausalLM.from_pretrained("out")
    monkeypatch.setattr(sys, "argv", [*command, "--output", "out"])
    with pytest.raises(SystemExit):  # not a second time into the same directory
        cli.main()
    assert "error: output out exists" in capsys.readouterr().err
