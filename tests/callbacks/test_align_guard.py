from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler

from heliostat.callbacks import align_guard
from heliostat.callbacks.align_guard import AlignGuard
from heliostat.components.alignguard_lora import riemannian_overlap
from tests.harness import ProcessPool, quiet_trainer, weights, word_tokenizer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")


# --- three modules that know nothing of the callback -----------------------------------------------------------------


class Foreign(LightningModule):
    """What the three have in common is the optimiser, to be varied by the tests."""

    optimizer: Callable[..., Any] = torch.optim.AdamW
    term: Callable[[Foreign], Tensor] | None = None  # a penalty written into the loss, for comparison

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        if self.term is not None:
            with torch.autocast("cpu", enabled=False):
                loss = loss + self.term(self)
        return loss

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        return type(self).optimizer([p for p in self.parameters() if p.requires_grad], lr=0.01)


class LanguageModel(Foreign):
    guard: ClassVar[dict[str, Any]] = {}

    def __init__(self, **lora: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        model = transformers.LlamaForCausalLM(config)
        lora = {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1, **lora}
        self.model = peft.get_peft_model(model, peft.LoraConfig(**lora))

    def loss(self, batch: Any) -> Tensor:
        return self.model(**batch).loss

    @staticmethod
    def data(seed: int, rows: int = 8) -> list[Any]:
        ids = torch.randint(20, (rows, 6), generator=torch.Generator().manual_seed(seed))
        return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


class VisionTransformer(Foreign):
    guard: ClassVar[dict[str, Any]] = {"lambda_collision": 0.1}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
        model = timm.create_model("vit_tiny_patch16_224", **size)
        self.net = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"]))

    def loss(self, batch: Any) -> Tensor:
        pictures, labels = batch
        return F.cross_entropy(self.net(pictures), labels)

    @staticmethod
    def data(seed: int, rows: int = 8) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        pictures = torch.randn(rows, 3, 16, 16, generator=generator)
        return [(picture, torch.tensor(i % 5)) for i, picture in enumerate(pictures)]


class Plain(Foreign):
    guard: ClassVar[dict[str, Any]] = {"target_modules": ["0", "2"]}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(7, 9), nn.ReLU(inplace=True), nn.Linear(9, 4))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]), batch["y"])

    @staticmethod
    def data(seed: int, rows: int = 8) -> list[Any]:
        features = torch.randn(rows, 7, generator=torch.Generator().manual_seed(seed))
        return [{"x": row, "y": torch.tensor(i % 4)} for i, row in enumerate(features)]


MODULES = [LanguageModel, VisionTransformer, Plain]
STRONG = {"lambda_align": 2.0, "lambda_task": 0.5, "rank_out": 5, "rank_in": 4}


@pytest.fixture(params=MODULES, ids=lambda cls: cls.__name__)
def cls(request: pytest.FixtureRequest) -> Any:
    return request.param


def guard_for(cls: Any, **settings: Any) -> AlignGuard:
    return AlignGuard(DataLoader(cls.data(1), batch_size=4), **{**STRONG, **cls.guard, **settings})


def loader_for(cls: Any, batch_size: int = 2) -> DataLoader:
    return DataLoader(cls.data(2), batch_size=batch_size)


def fit(directory: Path, module: Any, guard: AlignGuard | None, **settings: Any) -> Trainer:
    batch_size, ckpt_path = settings.pop("batch_size", 2), settings.pop("ckpt_path", None)
    callbacks = [*([] if guard is None else [guard]), *settings.pop("callbacks", [])]
    trainer = quiet_trainer(directory, **{"max_epochs": 2, "callbacks": callbacks, **settings})
    torch.manual_seed(1)  # of dropout
    trainer.fit(module, loader_for(type(module), batch_size), ckpt_path=ckpt_path)
    return trainer


def term_of(guard: AlignGuard) -> Callable[[Foreign], Tensor]:
    """The penalty by its definition, with whole matrices and autograd."""
    fishers, references = guard.fisher, guard._references
    settings = guard._penalty
    assert fishers is not None

    def term(module: Foreign) -> Tensor:
        total = torch.zeros(())
        for name, fisher in fishers.items():
            layer: Any = module.get_submodule(name)
            if hasattr(layer, "lora_A"):
                delta = sum(layer.scaling[a] * layer.lora_B[a].weight @ layer.lora_A[a].weight for a in layer.lora_A)
            else:
                delta = layer.weight - references[name]
            aligned, curvature = fisher.project(delta), fisher.trace / delta.numel()
            total = total + settings["lambda_align"] * (fisher.eigenvalues * fisher.coefficients(delta) ** 2).sum()
            total = total + settings["lambda_task"] * curvature * (delta - aligned).square().sum()
            total = total + settings["lambda_collision"] * 0.5 * riemannian_overlap(aligned, delta - aligned)
        return total

    return term


def assert_close(actual: Any, expected: Any, atol: float = 2e-6) -> None:
    expected, actual = weights(expected), weights(actual)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=atol, msg=name)


def compare_with_loss_term(directory: Path, cls: Any, atol: float = 2e-6, **settings: Any) -> AlignGuard:
    """Train with the callback, and with the penalty written into the loss."""
    plugins = settings.pop("plugins", lambda: None)
    guard, guarded, written, plain = guard_for(cls), cls(), cls(), cls()
    trainer = fit(directory, guarded, guard, plugins=plugins(), **settings)
    written.term = term_of(guard)
    fit(directory, written, None, plugins=plugins(), **settings)
    fit(directory, plain, None, plugins=plugins(), **settings)
    assert_close(guarded, written, atol)
    apart = max((a - b).abs().max().item() for a, b in zip(plain.parameters(), guarded.parameters(), strict=True))
    assert apart > 50 * atol, "the penalty made no difference"
    assert trainer.global_step > 0
    return guard


# --- the gradient ----------------------------------------------------------------------------------------------------


def test_equals_the_penalty_in_the_loss(tmp_path: Path, cls: Any) -> None:
    compare_with_loss_term(tmp_path, cls, accumulate_grad_batches=2, gradient_clip_val=0.3)


@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
def test_equals_it_under_a_gradient_scaler(tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unscaled before the hook, or inside a fused optimiser's step after it."""
    chosen = torch.optim.SGD if optimizer == "sgd" else lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True)
    monkeypatch.setattr(Plain, "optimizer", staticmethod(chosen))

    def plugins() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))

    compare_with_loss_term(tmp_path, Plain, atol=2e-5, plugins=plugins)


def test_equals_it_in_bf16(tmp_path: Path) -> None:
    compare_with_loss_term(tmp_path, LanguageModel, atol=5e-5, precision="bf16-mixed")


def test_half_precision_parameters(tmp_path: Path) -> None:
    module, guard = Plain(), guard_for(Plain)
    trainer = fit(tmp_path, module, guard, precision="bf16-true")
    assert module.net[0].weight.dtype == torch.bfloat16
    assert guard.fisher["net.0"].basis_in.dtype == torch.float32  # type: ignore[index]
    assert trainer.callback_metrics["align_guard/align"] > 0


def test_several_adapters_are_one_of_all_their_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_adapters(self: LanguageModel) -> None:
        original(self)
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "v_proj", "down_proj"])
        self.model.add_adapter("second", config)
        self.model.base_model.set_adapter(["default", "second"])

    original = LanguageModel.__init__
    monkeypatch.setattr(LanguageModel, "__init__", two_adapters)
    compare_with_loss_term(tmp_path, LanguageModel)


def test_without_task_term_only_coordinates_are_kept(tmp_path: Path) -> None:
    guard, guarded, written = guard_for(Plain, lambda_task=0.0), Plain(), Plain()
    start = {
        name: module.weight.detach().clone() for name, module in written.named_modules() if hasattr(module, "weight")
    }
    trainer = fit(tmp_path, guarded, guard)
    assert {name: kept.shape for name, kept in guard._references.items()} == {"net.0": (5, 4), "net.2": (4, 4)}
    assert "align_guard/task" not in trainer.callback_metrics
    guard._references = start
    written.term = term_of(guard)
    fit(tmp_path, written, None)
    assert_close(guarded, written)


class TwoOptimizers(Plain):
    """Manual optimisation of two layers by an optimiser each; the second has a step in every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = self.loss(batch) if self.term is None else self.loss(batch) + self.term(self)
        first, second = self.optimizers()  # type: ignore[misc]
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2:
            second.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]


def losses_of_plain(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch["x"]), batch["y"], reduction="none")


def test_each_optimizer_gets_its_own(tmp_path: Path) -> None:
    guard, guarded, written = guard_for(Plain, loss_fn=losses_of_plain), TwoOptimizers(), TwoOptimizers()
    fit(tmp_path, guarded, guard)
    written.term = term_of(guard)
    fit(tmp_path, written, None)
    assert_close(guarded, written)


def test_no_step_by_the_penalty_alone(tmp_path: Path) -> None:
    class Skips(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
            return None if self.trainer.training and self.global_step else super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 1 and not hasattr(self, "after"):
                self.after = weights(self)

    module = Skips()
    fit(tmp_path, module, guard_for(Skips))
    assert all(torch.equal(value, module.after[name]) for name, value in weights(module).items())


def test_logs_its_terms(tmp_path: Path, cls: Any) -> None:
    trainer = fit(tmp_path, cls(), guard_for(cls))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["align_guard/align"] > 0
    assert metrics["align_guard/task"] > 0
    expected = 2.0 * metrics["align_guard/align"] + 0.5 * metrics["align_guard/task"]
    if cls is VisionTransformer:
        assert metrics["align_guard/overlap"] > 0
        assert metrics["align_guard/geodesic"] == 0
        expected += 0.1 * 0.5 * metrics["align_guard/overlap"]
    assert metrics["align_guard/penalty"] == pytest.approx(expected, rel=1e-5)


# --- the Fisher information ------------------------------------------------------------------------------------------


def test_leaves_the_module_and_its_metrics_alone(tmp_path: Path, cls: Any) -> None:
    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 0:
                self.seen = set(trainer.callback_metrics)
                self.modes = [part.training for part in module.modules()]
                self.trained = [parameter.requires_grad for parameter in module.parameters()]
                self.now = weights(module)
                self.grads = [parameter.grad for parameter in module.parameters()]

    module, watch = cls(), Watch()
    before, trained = weights(module), [p.requires_grad for p in module.parameters()]
    fit(tmp_path, module, guard_for(cls), callbacks=[watch])
    assert watch.seen == set()
    assert all(watch.modes)
    assert watch.trained == trained
    assert all(torch.equal(watch.now[name], before[name]) for name in before)
    assert all(gradient is None for gradient in watch.grads)
    assert "log" not in vars(module)
    assert not any(part._forward_hooks for part in module.modules())


def test_own_losses_give_what_the_modules_step_gives(tmp_path: Path) -> None:
    one, other = guard_for(Plain), guard_for(Plain, loss_fn=losses_of_plain)
    for guard in (one, other):
        fit(tmp_path, Plain(), guard, max_steps=1)
    for name, fisher in one.fisher.items():  # type: ignore[union-attr]
        torch.testing.assert_close(other.fisher[name].eigenvalues, fisher.eigenvalues)  # type: ignore[index]


def test_trained_adapters_do_not_change_it(tmp_path: Path) -> None:
    """Estimated at dW = 0, where adapters that come trained are off."""
    fresh, continued = guard_for(LanguageModel), guard_for(LanguageModel)
    fit(tmp_path, LanguageModel(), fresh, max_steps=1)
    module = LanguageModel()
    for layer in module.modules():
        if hasattr(layer, "lora_B"):
            nn.init.normal_(layer.lora_B["default"].weight)  # type: ignore[index, operator]
    fit(tmp_path, module, continued, max_steps=1)
    for name, fisher in fresh.fisher.items():  # type: ignore[union-attr]
        torch.testing.assert_close(continued.fisher[name].eigenvalues, fisher.eigenvalues)  # type: ignore[index]


def test_normalised_over_all_layers(tmp_path: Path) -> None:
    guard = guard_for(LanguageModel)
    fit(tmp_path, LanguageModel(), guard, max_steps=1)
    assert len(guard.fisher) == 6  # type: ignore[arg-type]
    eigenvalues = torch.cat([fisher.eigenvalues.flatten() for fisher in guard.fisher.values()])  # type: ignore[union-attr]
    assert eigenvalues.mean().item() == pytest.approx(1, rel=1e-5)


def test_num_samples(tmp_path: Path) -> None:
    read = []
    guard = guard_for(Plain, num_samples=5)
    guard._estimate = lambda *_, **__: read.append(len(guard._batches))  # type: ignore[method-assign]
    guard._make_groups = lambda: None  # type: ignore[method-assign]
    fit(tmp_path, Plain(), guard, max_steps=1)
    assert read == [5]


def test_refreshed_at_the_weights_of_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    estimate = AlignGuard._estimate

    def counted(self: AlignGuard, trainer: Trainer, *rest: Any, **settings: Any) -> None:
        epochs.append(trainer.current_epoch)
        estimate(self, trainer, *rest, **settings)

    monkeypatch.setattr(AlignGuard, "_estimate", counted)
    once, often = guard_for(Plain, lambda_task=0.0), guard_for(Plain, lambda_task=0.0, refresh_every_n_epochs=2)
    fit(tmp_path, Plain(), once, max_epochs=5)
    assert epochs == [0]
    fit(tmp_path, Plain(), often, max_epochs=5)
    assert epochs == [0, 0, 2, 4]
    assert not torch.allclose(once.fisher["net.0"].eigenvalues, often.fisher["net.0"].eigenvalues)  # type: ignore[index]


def test_layers_out_of_reach_are_said(tmp_path: Path) -> None:
    def first_layer_only(module: Any, batch: Any) -> Tensor:
        return module.net[0](batch["x"]).square().mean(1)

    guard = guard_for(Plain, loss_fn=first_layer_only)
    with pytest.warns(UserWarning, match="no gradient at 1 of 2 layers, which stay unguarded: 'net.2'"):
        fit(tmp_path, Plain(), guard, max_steps=1)


def test_prompts_from_a_file(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(["red", "green", "blue", "no", "thanks"])
    tokenizer.eos_token = "[SEP]"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}blue"
    rows = [
        {"prompt": "red green", "completion": "no thanks"},
        {"prompt": [{"role": "user", "content": "green"}], "completion": "no"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    guard = AlignGuard(path, tokenizer=tokenizer)
    first, second = guard._read(path)
    assert first["input_ids"].tolist() == [[2, 5, 6, 3, 8, 9, 3]]
    assert first["labels"].tolist() == [[-100, -100, -100, -100, 8, 9, 3]]
    assert second["input_ids"].tolist() == [[6, 7, 8, 3]]
    assert second["labels"].tolist() == [[-100, -100, 8, 3]]
    fit(tmp_path, LanguageModel(), guard, max_steps=1)
    assert guard.fisher
    path.write_text('{"prompt": "red"}\n')
    with pytest.raises(MisconfigurationException, match="prompts.jsonl, line 1: expected an object with prompt and"):
        guard._read(path)
    with pytest.raises(MisconfigurationException, match="is text: give tokenizer"):
        AlignGuard(path)._read(path)
    with pytest.raises(MisconfigurationException, match="there is no file"):
        AlignGuard(path, tokenizer=tokenizer)._read(tmp_path / "other.jsonl")


def test_batches_of_any_structure_divide_into_samples() -> None:
    batch = {
        "x": torch.arange(6).view(3, 2),
        "text": ["a", "b", "c"],
        "more": (torch.arange(3), [torch.ones(3)]),
        "k": 7,
    }
    second = align_guard._split(batch)[1]
    assert second["x"].tolist() == [[2, 3]]
    assert second["text"] == ["b"]
    assert second["more"][0].tolist() == [1]
    assert second["more"][1][0].tolist() == [1]
    assert second["k"] == 7
    encoding = transformers.BatchEncoding({"input_ids": torch.zeros(2, 3)})
    assert align_guard._split(encoding)[0].input_ids.shape == (1, 3)
    with pytest.raises(MisconfigurationException, match="cannot divide a batch of type dict into its samples"):
        align_guard._split({"x": torch.zeros(3), "y": torch.zeros(2)})


# --- state -----------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


class Kill(Callback):
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 6:
            raise KilledError


def test_resumed_equals_uninterrupted(tmp_path: Path, cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from heliostat import StepSeed

    whole = cls()
    guard = guard_for(cls)
    fit(tmp_path, whole, guard, callbacks=[StepSeed()])
    keeper = ModelCheckpoint(tmp_path / "kept", "{step}", save_on_train_epoch_end=True)
    with pytest.raises(KilledError):
        fit(tmp_path, cls(), guard_for(cls), callbacks=[StepSeed(), Kill(), keeper], enable_checkpointing=True)
    path = tmp_path / "kept" / "step=4.ckpt"
    torch.load(path, weights_only=True)  # nothing in it but plain values and tensors
    monkeypatch.setattr(align_guard, "estimate_kronecker_fisher", None)  # it is not estimated again
    resumed, again = cls(), guard_for(cls)
    trainer = fit(tmp_path, resumed, again, callbacks=[StepSeed()], ckpt_path=str(path))
    assert trainer.global_step == 8
    expected, actual = weights(whole), weights(resumed)
    assert not [name for name in expected if not torch.equal(expected[name], actual[name])]
    for name, fisher in guard.fisher.items():
        assert all(torch.equal(a, b) for a, b in zip(fisher, again.fisher[name], strict=True))


def test_state_of_other_layers_is_refused(tmp_path: Path) -> None:
    guard = guard_for(Plain)
    fit(tmp_path, Plain(), guard, max_steps=1)
    guard.target_modules = ["0"]
    with pytest.raises(MisconfigurationException, match="of other layers than it is to guard now: 'net.2' differ"):
        fit(tmp_path, Plain(), guard, max_steps=1)


# --- several processes -----------------------------------------------------------------------------------------------


class Sharded(LanguageModel):
    """As the strategy for sharded models wants it: divided in configure_model."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for layer in self.model.base_model.model.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


class ShardedPlain(Plain):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def fit_on_rank(rank: int, directory: Path, name: str, strategy: str, world: int, stop: bool = False) -> Any:
    """Two epochs; with ``stop`` the second is a training that is resumed."""
    cls = {one.__name__: one for one in (*MODULES, Sharded, ShardedPlain)}[name]
    rows = cls.data(2)[rank::world]  # a batch of all processes is one of one process
    checkpoint = None
    for epochs in (1, 2) if stop else (2,):
        module, guard = cls(), guard_for(cls, num_samples=7)  # odd, so that one process has a sample less
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        guard.alignment_dataloader = DataLoader(cls.data(1), batch_size=4, shuffle=True)
        torch.manual_seed(rank)  # the processes are to agree on the order all the same
        settings: dict[str, Any] = {"strategy": strategy, "precision": "64-true", "use_distributed_sampler": False}
        if strategy == "fsdp2":
            settings["strategy"] = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            settings["precision"] = "32-true"
        trainer = quiet_trainer(directory, max_epochs=epochs, devices=world, callbacks=[guard], **settings)
        if checkpoint is not None:
            guard._estimate = None  # type: ignore[assignment, method-assign] # the checkpoint has it
        trainer.fit(module, DataLoader(rows, batch_size=4 // world), ckpt_path=checkpoint)
        checkpoint = directory / "stopped.ckpt"
        if epochs == 1:
            trainer.save_checkpoint(checkpoint)
    state = {
        key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in weights(module).items()
    }
    eigenvalues = {key: fisher.eigenvalues for key, fisher in guard.fisher.items()}  # type: ignore[union-attr]
    return state, eigenvalues, float(trainer.callback_metrics["align_guard/penalty"])


def test_two_processes_equal_one(tmp_path: Path, cls: Any, two_processes: ProcessPool) -> None:
    expected, fisher, penalty = fit_on_rank(0, tmp_path, cls.__name__, "auto", 1)
    for state, own_fisher, own_penalty in two_processes.run(fit_on_rank, tmp_path, cls.__name__, "ddp", 2):
        assert own_penalty == pytest.approx(penalty, rel=1e-9)
        for name, value in fisher.items():
            torch.testing.assert_close(own_fisher[name], value, rtol=1e-6, atol=1e-9)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize(("cls", "name", "stop"), [(LanguageModel, "Sharded", False), (Plain, "ShardedPlain", True)])
def test_sharded_parameters_equal_one_process(
    tmp_path: Path, cls: Any, name: str, stop: bool, two_processes: ProcessPool
) -> None:
    expected, _, penalty = fit_on_rank(0, tmp_path, cls.__name__, "auto", 1)
    for state, _, own_penalty in two_processes.run(fit_on_rank, tmp_path, name, "fsdp2", 2, stop):
        assert own_penalty == pytest.approx(penalty, rel=1e-4)
        for key, value in expected.items():
            torch.testing.assert_close(state[key].double(), value, rtol=0, atol=2e-6, msg=key)


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(directory: Path, module: Any, guard: AlignGuard, pattern: str, **settings: Any) -> None:
    guard._estimate = None  # type: ignore[assignment, method-assign] # it is refused before that
    with pytest.raises(MisconfigurationException, match=pattern):
        fit(directory, module, guard, **settings)


class TestRefusals:
    def test_nothing_to_guard(self, tmp_path: Path) -> None:
        pattern = "found no LoRA layer in Plain: .* of 'net.0', 'net.2'"
        refused(tmp_path, Plain(), AlignGuard(Plain.data(1)), pattern)
        pattern = "no LoRA or torch.nn.Linear layer of Plain is called 'net.3'; there are 'net.2', 'net.0'"
        refused(tmp_path, Plain(), AlignGuard(Plain.data(1), target_modules=["net.3"]), pattern)
        refused(tmp_path, Plain(), AlignGuard(Plain.data(1), target_modules=r"n\d"), r"is called 'n\\\\d'")

    @pytest.mark.parametrize(
        ("lora", "pattern"),
        [
            ({"use_dora": True}, r"adapter 'default' of .*q_proj' is DoRA, whose update is not .* \(use_dora=False\)"),
            ({"init_lora_weights": "olora"}, "initialised by init_lora_weights='olora', which changes the base"),
            ({"target_modules": ["embed_tokens"]}, "none of the LoRA layers adapts a linear layer"),
        ],
    )
    def test_adapters_of_another_kind(self, tmp_path: Path, lora: dict[str, Any], pattern: str) -> None:
        refused(tmp_path, LanguageModel(**lora), guard_for(LanguageModel), pattern)

    def test_merged(self, tmp_path: Path) -> None:
        module = LanguageModel()
        module.model.merge_adapter()
        refused(tmp_path, module, guard_for(LanguageModel), "are merged into the base weights: call unmerge_adapter")

    def test_frozen(self, tmp_path: Path) -> None:
        module = LanguageModel()
        module.model.requires_grad_(False)
        refused(tmp_path, module, guard_for(LanguageModel), "6 layers that AlignGuard is to guard is trained")
        plain = Plain()
        plain.net[0].requires_grad_(False)
        refused(tmp_path, plain, guard_for(Plain), "the weight of 'net.0' is frozen")

    def test_quantised(self, tmp_path: Path) -> None:
        module = LanguageModel()
        base = module.model.base_model.model.model.layers[0].mlp.down_proj.base_layer
        base.weight = nn.Parameter(torch.zeros(16, 24, dtype=torch.int8), requires_grad=False)
        refused(tmp_path, module, guard_for(LanguageModel), r"down_proj' is quantised \(Parameter, torch.int8\): load")

    def test_alignment_data(self, tmp_path: Path) -> None:
        targets = Plain.guard
        refused(tmp_path, Plain(), AlignGuard([], **targets), "the alignment data is empty")
        broken = [
            {"x": torch.ones(2, 7), "y": torch.zeros(2)},
            {"x": torch.full((2, 7), torch.nan), "y": torch.zeros(2)},
        ]
        refused(tmp_path, Plain(), AlignGuard(broken, **targets), "batch 1 of the alignment data holds NaN")
        loader = DataLoader(Plain.data(1), sampler=DistributedSampler(range(8), num_replicas=2, rank=0))  # type: ignore[arg-type]
        refused(tmp_path, Plain(), AlignGuard(loader, **targets), "has a DistributedSampler")

    @pytest.mark.parametrize(
        ("loss_fn", "pattern"),
        [
            (
                lambda module, batch: module.loss(batch),
                r"a scalar for a batch of 4 samples: return their losses, \(4,\)",
            ),
            (lambda module, batch: losses_of_plain(module, batch) * torch.nan, "at layer 'net.0', are not finite"),
            (lambda module, batch: losses_of_plain(module, batch) * 0, "all layers together sums to 0.0"),
        ],
        ids=["scalar", "nan", "no signal"],
    )
    def test_losses(self, tmp_path: Path, loss_fn: Any, pattern: str) -> None:
        with pytest.raises(MisconfigurationException, match=pattern):
            fit(tmp_path, Plain(), guard_for(Plain, loss_fn=loss_fn))

    def test_manual_optimisation_without_loss(self, tmp_path: Path) -> None:
        refused(tmp_path, TwoOptimizers(), guard_for(Plain), "manual optimisation: give loss_fn")

    def test_strategies_without_parameters_of_the_layers(self) -> None:
        trainer = type("Fake", (), {"strategy": FSDPStrategy()})()
        with pytest.raises(MisconfigurationException, match="does not work with FSDPStrategy"):
            guard_for(Plain).setup(trainer, Plain(), "fit")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("settings", "pattern"),
        [
            ({"lambda_align": -1.0}, "lambda_align must be >= 0, got -1.0"),
            ({"rank_in": 0}, "rank_in must be >= 1, got 0"),
            ({"task_metric": "fisher"}, "task_metric must be one of .*, got 'fisher'"),
        ],
    )
    def test_settings(self, settings: dict[str, Any], pattern: str) -> None:
        with pytest.raises(ValueError, match=pattern):
            AlignGuard([], **settings)


def test_modules_that_build_their_network_late(tmp_path: Path) -> None:
    class Late(LanguageModel):
        def __init__(self) -> None:
            LightningModule.__init__(self)

        def configure_model(self) -> None:
            self.model = LanguageModel().model

    trainer = fit(tmp_path, Late(), guard_for(LanguageModel), max_steps=2)
    assert trainer.callback_metrics["align_guard/penalty"] > 0


def test_adapters_of_embeddings_are_left_out_and_said(tmp_path: Path) -> None:
    guard = guard_for(LanguageModel)
    with pytest.warns(UserWarning, match="1 LoRA layers adapt no linear layer and are not guarded: .*embed_tokens"):
        fit(tmp_path, LanguageModel(target_modules=["embed_tokens", "q_proj"]), guard, max_steps=1)
    assert len(guard.fisher) == 2  # type: ignore[arg-type]


def test_alignment_data_by_the_name_of_a_method(tmp_path: Path) -> None:
    """As a config file gives it."""

    class WithRefusals(Plain):
        def refusals(self) -> DataLoader:
            return DataLoader(Plain.data(1), batch_size=4)

    def penalty(source: Any) -> float:
        guard = AlignGuard(source, **{**STRONG, **Plain.guard})
        torch.manual_seed(0)
        trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[guard])
        trainer.fit(WithRefusals(), loader_for(Plain))
        return float(trainer.callback_metrics["align_guard/penalty"])

    assert penalty("refusals") == penalty(WithRefusals().refusals()) > 0
    with pytest.raises(MisconfigurationException, match="neither the data module nor WithRefusals has a method 'no'"):
        penalty("no")
