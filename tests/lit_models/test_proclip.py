from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from heliostat import ProCLIP
from heliostat.components import ContrastiveTuningLoss, cross_modal_recall, ema_update_
from heliostat.datamodules.loading import GlobalBatchSampler, ResumableLoader
from tests.harness import ModuleContract, ProcessPool, quiet_trainer, weights

CLASSES, PER_CLASS, WIDTH, OUT = 6, 9, 12, 8

# Adam makes a full step of a gradient that is zero but for rounding, so processes are compared under SGD.
NO_DROPOUT: dict = {"dropout": 0.0, "optimizer": lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.01)}


class Pairs(LightningDataModule):
    """54 pictures with a caption, in batches of 16: three steps an epoch. In validation two captions fit a picture."""

    def __init__(self, size: int = 8, channels: int = 1, eval_batch_size: int = 10, order: str = "itp") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def noisy(centres: Tensor) -> Tensor:
            return centres + 0.5 * torch.randn(centres.shape, generator=generator)

        labels = torch.arange(CLASSES).repeat(PER_CLASS)
        pictures = noisy(torch.randn(CLASSES, channels, size, size, generator=generator)[labels])
        classes = torch.randn(CLASSES, WIDTH, generator=generator)
        texts, teachers = noisy(classes[labels]), noisy(torch.randn(CLASSES, OUT, generator=generator)[labels])
        index = torch.arange(len(labels))
        self.train = rows_of(pixel_values=pictures, text_embeddings=texts, teacher_embeddings=teachers, index=index)
        self.images = rows_of(pixel_values=pictures, group=index, labels=labels, index=index)
        captions = {"text_embeddings": torch.cat([texts, noisy(texts)]), "teacher_embeddings": teachers.repeat(2, 1)}
        self.texts = rows_of(**captions, group=index.repeat(2), index=torch.arange(2 * len(labels)))
        prompts = torch.arange(CLASSES).repeat(3)
        self.prompts = rows_of(text_embeddings=noisy(classes[prompts]), labels=prompts, index=torch.arange(18))
        self.order, self.eval_batch_size = order, eval_batch_size

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        world, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = GlobalBatchSampler(self.train, 16, num_replicas=world, rank=rank)
        return ResumableLoader(self.train, batch_size=sampler.local_batch_size, sampler=sampler)

    def val_dataloader(self) -> list[DataLoader]:
        sets = {"i": self.images, "t": self.texts, "p": self.prompts}
        return [DataLoader(sets[kind], batch_size=self.eval_batch_size) for kind in self.order]

    test_dataloader = predict_dataloader = val_dataloader


def rows_of(**columns: Tensor) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def stacked(rows: list[dict[str, Any]], name: str) -> Tensor:
    return torch.stack([row[name] for row in rows])


def tiny_tower(dropout: float = 0.1, batchnorm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(16) if batchnorm else nn.Identity()
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, OUT))


def tiny_module(stage: int = 2, tower: nn.Module | None = None, dropout: float = 0.1, **settings: Any) -> ProCLIP:
    tower = tiny_tower(dropout) if tower is None else tower
    torch.manual_seed(1)
    settings = {
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.05),
        "expansion_factor": 2,
        "ema_decay": 0.9,
        **settings,
    }
    return ProCLIP(tower, WIDTH, OUT, stage=stage, dropout=dropout, **settings)  # type: ignore[arg-type]


class TestStage1(ModuleContract):
    """Every contract, with the settings under which two processes equal one."""

    settings: dict = {"stage": 1, "reduction": "mean", "gather": True}  # noqa: RUF012

    def module(self, *, dropout: bool = True) -> LightningModule:
        return tiny_module(**self.settings, **({} if dropout else NO_DROPOUT))

    def data(self, directory: Path) -> LightningDataModule:
        return Pairs()

    def test_validation_on_two_processes_equals_one(self, tmp_path: Path, two_processes: ProcessPool) -> None:
        """53 pictures, 107 texts and 17 prompts: the sampler repeats one of each, which must not count twice."""
        stage = self.settings["stage"]
        expected = _validate(0, tmp_path, stage)
        assert len(expected) == 7 + (stage == 1)
        for actual in two_processes.run(_validate, tmp_path, stage, "ddp"):
            assert actual == pytest.approx(expected, abs=1e-6)


def _validate(rank: int, directory: Path, stage: int, strategy: str = "auto") -> dict[str, float]:
    data = Pairs(eval_batch_size=7)
    for rows in (data.images, data.texts, data.prompts):
        rows.pop()
    trainer = quiet_trainer(directory, devices=1 if strategy == "auto" else 2, strategy=strategy)
    trainer.validate(tiny_module(stage), data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class TestStage2(TestStage1):
    settings = {"stage": 2, "reduction": "mean", "gather": True, "reg_weight": 0.5, "image_lr_scale": 0.5}  # noqa: RUF012


class TestStage2Sums(TestStage1):
    """The paper's sums, gathered; with a schedule that warms up."""

    settings = {"stage": 2, "gather": True, "reg_weight": 1e-2, "warmup_steps": 2}  # noqa: RUF012


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def test_stage_1_trains_the_adapter_alone(tmp_path: Path) -> None:
    module = tiny_module(1, tiny_tower(batchnorm=True))
    before = weights(module)
    assert not module.image_encoder.training
    assert module.adapter.training
    trainer = quiet_trainer(tmp_path, max_steps=4, val_check_interval=1)
    trainer.fit(module, Pairs())
    changed = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
    assert changed == {f"adapter.{name}" for name, _ in module.adapter.named_parameters()}
    assert not module.image_encoder.training
    assert {"train/loss", "train/instance", "train/structure"} <= trainer.callback_metrics.keys()
    assert trainer.callback_metrics["val/zero_shot_accuracy"].isfinite()


def test_batchnorm_of_the_tower_keeps_its_statistics(tmp_path: Path) -> None:
    """So that the teacher, in evaluation mode, and the student begin as one."""
    module = tiny_module(2, tiny_tower(0.0, batchnorm=True), **NO_DROPOUT, reg_weight=0.5)
    before = weights(module)
    seen = {}

    class FirstLoss(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.setdefault("instance", float(trainer.callback_metrics["train/instance"]))

    quiet_trainer(tmp_path, max_steps=2, callbacks=[FirstLoss()]).fit(module, Pairs())
    assert seen["instance"] == pytest.approx(0, abs=1e-10)
    for name, value in module.state_dict().items():
        if "running_" in name:
            assert torch.equal(value, before[name]), name
    assert not torch.equal(module.image_encoder[2].weight, before["image_encoder.2.weight"])


def test_stage_1_without_image_tower(tmp_path: Path) -> None:
    module = ProCLIP(None, WIDTH, OUT)
    data = Pairs(order="t")
    trainer = quiet_trainer(tmp_path, max_steps=1, val_check_interval=1)
    trainer.fit(module, data)
    texts, teachers = stacked(data.texts, "text_embeddings"), F.normalize(stacked(data.texts, "teacher_embeddings"))
    expected = (module.eval().encode_text(texts) - teachers).detach().square().sum(1).mean()
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(MisconfigurationException, match="image_encoder is None, and there are pictures to embed"):
        quiet_trainer(tmp_path).validate(module, Pairs(), verbose=False)


def test_second_caption() -> None:
    module = tiny_module(1, dropout=0.0)
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    first = {name: stacked(Pairs().train, name) for name in ("text_embeddings", "teacher_embeddings")}
    second = {f"second_{name}": value.flip(0) for name, value in first.items()}
    structure_and_instance = module.training_step(dict(first), 0)
    module.inheritance["structure_weight"] = 0.0
    instance = module.training_step(dict(first), 0)
    module.inheritance["structure_weight"] = 1.0
    torch.testing.assert_close(module.training_step({**first, **second}, 0), structure_and_instance + instance)
    del second["second_teacher_embeddings"]
    with pytest.raises(MisconfigurationException, match="needs 'second_teacher_embeddings'"):
        module.training_step({**first, **second}, 0)


# --- stage 2 ---------------------------------------------------------------------------------------------------------


class _Students(Callback):
    """The image tower after each batch."""

    def __init__(self) -> None:
        self.seen: list[nn.Module] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.seen.append(copy.deepcopy(pl_module.image_encoder))


def test_teacher_follows_once_a_step_of_the_optimizer(tmp_path: Path) -> None:
    """Two batches accumulated: only the second of them ends in a step. 3 batches an epoch: steps after 2, 3, 5, 6."""
    module, students = tiny_module(tower=tiny_tower(batchnorm=True)), _Students()
    expected = copy.deepcopy(module.image_encoder)
    quiet_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[students]).fit(module, Pairs())
    for batch in (2, 3, 5, 6):
        ema_update_(expected, students.seen[batch - 1], 0.9)
    for name, value in module.teacher.network.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], msg=name)
    assert not torch.equal(expected[1].weight, module.image_encoder[1].weight)
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert not module.teacher.network.training
    assert module.image_encoder.training


def test_teacher_is_up_to_date_when_a_callback_saves(tmp_path: Path) -> None:
    """Callbacks are called before the module at the end of a batch: what they save must have followed already."""

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    module = tiny_module()
    quiet_trainer(tmp_path, max_steps=2, callbacks=[Save()]).fit(module, Pairs())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in weights(module).items())


@pytest.mark.parametrize("ema_decay", [1.0, 0.0])
def test_teacher_begins_as_the_loaded_image_tower(tmp_path: Path, ema_decay: float) -> None:
    module = tiny_module(ema_decay=ema_decay)
    with torch.no_grad():  # after it was made, as load_state_dict does
        module.image_encoder[1].weight.add_(1.0)
    loaded = module.image_encoder[1].weight.clone()
    quiet_trainer(tmp_path, max_steps=2).fit(module, Pairs())
    expected = loaded if ema_decay == 1 else module.image_encoder[1].weight
    assert torch.equal(module.teacher.network[1].weight, expected)
    assert not torch.equal(module.image_encoder[1].weight, loaded)


def test_teacher_goes_on_in_a_second_fit(tmp_path: Path) -> None:
    module = tiny_module(ema_decay=1.0)
    first = module.image_encoder[1].weight.clone()
    for _ in range(2):
        quiet_trainer(tmp_path, max_steps=1).fit(module, Pairs())
    assert torch.equal(module.teacher.network[1].weight, first)


def test_steps_that_a_gradient_scaler_leaves_out_move_no_teacher() -> None:
    module = tiny_module(lr_scheduler="constant", ema_decay=0.5)
    with torch.no_grad():
        module.teacher.network[1].weight.zero_()
    optimizer: Any = module.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, moves in ((math.inf, False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale(factor * module.image_encoder[1].weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert module.teacher.network[1].weight.any() == moves


def test_logit_scale_is_kept_in_its_range() -> None:
    module = tiny_module(optimizer=lambda params: torch.optim.SGD(params, lr=1.0), lr_scheduler="constant")
    optimizer: Any = module.configure_optimizers()
    for gradient, expected in ((-10.0, math.log(100)), (10.0, 0.0)):
        module.log_logit_scale.grad = torch.tensor(gradient)
        optimizer.step()
        assert module.log_logit_scale.item() == pytest.approx(expected)


def test_without_regulariser_there_is_no_teacher(tmp_path: Path) -> None:
    module = tiny_module(reg_weight=0.0)
    assert module.teacher is None
    assert not [name for name in module.state_dict() if name.startswith("teacher")]
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(module, Pairs())
    assert trainer.callback_metrics["train/loss"] == trainer.callback_metrics["train/contrastive"]


def test_the_first_loss_is_that_of_the_parts(tmp_path: Path) -> None:
    data = Pairs()
    data.train = data.train[:16]
    trainer = quiet_trainer(tmp_path, max_steps=1)
    module = tiny_module(dropout=0.0, reg_weight=0.1, reduction="mean", structure_penalty="squared")
    image, text = (stacked(data.train, name) for name in ("pixel_values", "text_embeddings"))
    features = module.image_encoder(image)
    loss = ContrastiveTuningLoss(0.1, reduction="mean", penalty="squared")
    expected = loss(features, module.adapter(text), 1 / 0.07, features)
    assert expected.instance < 1e-10  # the teacher begins as the student
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(expected.total), rel=1e-5)
    assert float(trainer.callback_metrics["train/logit_scale"]) == pytest.approx(1 / 0.07, rel=1e-5)


def test_bf16_true_keeps_the_teacher_in_float32(tmp_path: Path) -> None:
    """In bfloat16 an average with decay 0.999 would not move at all."""
    module = tiny_module(ema_decay=0.999, optimizer=lambda params: torch.optim.SGD(params, lr=0.5))
    start = module.image_encoder[1].weight.detach().bfloat16().float()
    quiet_trainer(tmp_path, max_steps=3, precision="bf16-true").fit(module, Pairs())
    teacher = module.teacher.network[1].weight
    assert module.image_encoder[1].weight.dtype == torch.bfloat16
    assert teacher.dtype == torch.float32
    distance, moved = (module.image_encoder[1].weight.float() - start).norm(), (teacher - start).norm()
    assert 0 < moved < 0.01 * distance


def test_parameter_groups() -> None:
    module = tiny_module(image_lr_scale=0.1, lr_scheduler="constant")
    optimizer: Any = module.configure_optimizers()
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = [
        ({names[p] for p in group["params"]}, round(group["lr"], 9), group["weight_decay"])
        for group in optimizer.param_groups
    ]
    adapter = {f"adapter.{name}" for name, _ in module.adapter.named_parameters()}
    matrices = {"adapter.blocks.0.1.weight", "adapter.blocks.0.4.weight", "adapter.projection.weight"}
    assert groups == [
        (matrices, 0.01, 0.05),
        ({"log_logit_scale", *adapter - matrices}, 0.01, 0.0),
        ({"image_encoder.1.weight", "image_encoder.5.weight"}, 0.001, 0.05),
        ({"image_encoder.1.bias", "image_encoder.5.bias"}, 0.001, 0.0),
    ]


def test_a_bias_of_two_dimensions_is_not_decayed() -> None:
    tower = tiny_tower()
    tower[5].bias = nn.Parameter(torch.zeros(1, OUT))
    optimizer: Any = tiny_module(tower=tower, lr_scheduler="constant").configure_optimizers()
    (group,) = [group for group in optimizer.param_groups if any(p is tower[5].bias for p in group["params"])]
    assert group["weight_decay"] == 0


def test_learning_rates_warm_up_and_decay(tmp_path: Path) -> None:
    seen = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]))

    module = tiny_module(image_lr_scale=0.1, warmup_steps=2)
    quiet_trainer(tmp_path, max_steps=6, callbacks=[Rates()]).fit(module, Pairs())
    factors = [0.5, 1.0, *((1 + math.cos(math.pi * step / 4)) / 2 for step in range(4))]
    assert [base for base, _ in seen] == pytest.approx([0.01 * factor for factor in factors])
    assert [tower for _, tower in seen] == pytest.approx([0.001 * factor for factor in factors])


def test_partly_frozen_tower_stays_so_and_a_wholly_frozen_one_is_trained() -> None:
    tower = tiny_tower()
    tower[1].requires_grad_(False)
    assert [p.requires_grad for p in tiny_module(2, tower).image_encoder.parameters()] == [False, False, True, True]
    tiny_module(1, tower)
    assert not any(p.requires_grad for p in tower.parameters())
    assert all(p.requires_grad for p in tiny_module(2, tower).image_encoder.parameters())


# --- from stage to stage ---------------------------------------------------------------------------------------------


def first_stage(directory: Path, **settings: Any) -> tuple[ProCLIP, Path]:
    module = tiny_module(1, init_logit_scale=1.5, **settings)
    trainer = quiet_trainer(directory, max_steps=2)
    trainer.fit(module, Pairs())
    path = directory / "stage1.ckpt"
    trainer.save_checkpoint(path)
    return module, path


def test_hand_over(tmp_path: Path) -> None:
    first, path = first_stage(tmp_path)
    by_state = tiny_module()
    keys = by_state.load_state_dict(first.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all(name.startswith("teacher.") for name in keys.missing_keys)
    for second in (by_state, tiny_module(init_from=path), tiny_module(init_from=str(path))):
        for name, parameter in first.adapter.named_parameters():
            assert torch.equal(parameter, second.adapter.get_parameter(name))
        assert second.log_logit_scale.item() == 1.5
        assert second.log_logit_scale.requires_grad
    trainer = quiet_trainer(tmp_path, max_steps=1)
    second = tiny_module(init_from=str(path))
    trainer.fit(second, Pairs())
    trainer.save_checkpoint(tmp_path / "stage2.ckpt")
    path.unlink()  # what stage 2 saves stands for itself
    loaded = ProCLIP.load_from_checkpoint(tmp_path / "stage2.ckpt", image_encoder=tiny_tower())
    assert loaded.stage == 2
    assert loaded.teacher.started
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(loaded).items())


def test_hand_over_that_does_not_fit(tmp_path: Path) -> None:
    _, path = first_stage(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit: .*adapter.blocks.0.1.weight \(24, 12\) instead of \(48, 12\)"):
        tiny_module(init_from=path, expansion_factor=4)
    with pytest.raises(ValueError, match=r"does not fit: it lacks \['adapter.blocks.1.0.bias'"):
        tiny_module(init_from=path, num_blocks=2)
    with pytest.raises(ValueError, match=r"has besides \['adapter.blocks.0.0.bias'"):
        tiny_module(init_from=path, num_blocks=0)
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"does not fit: it lacks \['adapter.blocks.0.0.bias'"):
        tiny_module(init_from=tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="nothing.ckpt"):
        tiny_module(init_from=tmp_path / "nothing.ckpt")


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["itp", "pti"])
def test_metrics_are_those_of_the_whole_set(tmp_path: Path, order: str) -> None:
    module, data = tiny_module(recall_at=(1, 4)), Pairs(order=order)
    for row in data.images[::5]:
        row["labels"] = torch.tensor(-1)
    trainer = quiet_trainer(tmp_path)
    trainer.test(module, data, verbose=False)
    module.eval()
    images = module.encode_image(stacked(data.images, "pixel_values"))
    texts = module.encode_text(stacked(data.texts, "text_embeddings"))
    torch.testing.assert_close(images.norm(dim=1), torch.ones(len(images)))
    image_groups, text_groups = stacked(data.images, "group"), stacked(data.texts, "group")
    expected = {
        **{
            f"test/image_to_text_recall@{k}": value
            for k, value in cross_modal_recall(images, texts, image_groups, text_groups, (1, 4)).items()
        },
        **{
            f"test/text_to_image_recall@{k}": value
            for k, value in cross_modal_recall(texts, images, text_groups, image_groups, (1, 4)).items()
        },
    }
    prompts = module.encode_text(stacked(data.prompts, "text_embeddings"))
    right = []
    for image, label in zip(images, stacked(data.images, "labels"), strict=True):
        means = [F.normalize(prompts[c::CLASSES].mean(0), dim=0) for c in range(CLASSES)]
        if label != -1:
            right.append(int(torch.stack([image @ mean for mean in means]).argmax()) == int(label))
    expected["test/zero_shot_accuracy"] = torch.tensor(sum(right) / len(right))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-6)


def test_classes_without_a_prompt_count_as_wrong(tmp_path: Path) -> None:
    data = Pairs()
    data.prompts = [row for row in data.prompts if row["labels"] != 2]
    with pytest.warns(UserWarning, match="9 of 54 pictures are of a class without a prompt, and count as wrong"):
        quiet_trainer(tmp_path).validate(tiny_module(), data, verbose=False)


def test_sanity_check_does_not_warn_of_its_few_batches(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    trainer = quiet_trainer(tmp_path, num_sanity_val_steps=1, max_steps=1, limit_val_batches=0.0)
    trainer.limit_val_batches = 1.0
    trainer.fit(tiny_module(), Pairs(order="ti"))
    assert not [w for w in recwarn if "have no reference" in str(w.message)]


def test_logits_and_predictions(tmp_path: Path) -> None:
    module, data = tiny_module(init_logit_scale=1.0).eval(), Pairs()
    pictures, texts = stacked(data.images, "pixel_values"), stacked(data.texts, "text_embeddings")
    cosines = F.cosine_similarity(module.image_encoder(pictures)[:, None], module.adapter(texts)[None], dim=2)
    torch.testing.assert_close(module(pictures, texts), math.e * cosines)
    predicted = quiet_trainer(tmp_path).predict(module, data)
    torch.testing.assert_close(
        torch.cat([batch["image_embeds"] for batch in predicted[0]]), module.encode_image(pictures)
    )
    torch.testing.assert_close(torch.cat([batch["text_embeds"] for batch in predicted[1]]), module.encode_text(texts))


def test_training_both_stages_helps(tmp_path: Path) -> None:
    data = Pairs()
    first = tiny_module(1, dropout=0.0, reduction="mean")
    trainer = quiet_trainer(tmp_path, max_epochs=20)
    trainer.fit(first, data)
    assert trainer.callback_metrics["val/loss"] < 0.6
    second = tiny_module(2, first.image_encoder, dropout=0.0, reduction="mean", reg_weight=0.1)
    second.load_state_dict(first.state_dict(), strict=False)
    trainer = quiet_trainer(tmp_path, max_epochs=20)
    trainer.fit(second, data)
    assert trainer.callback_metrics["val/zero_shot_accuracy"] > 0.9
    assert trainer.callback_metrics["val/text_to_image_recall@1"] > 0.1  # by chance 0.02


# --- networks and settings -------------------------------------------------------------------------------------------


def test_real_open_clip_model_takes_a_step(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    from heliostat import OpenCLIPImageTower

    torch.manual_seed(0)
    tower = OpenCLIPImageTower("ViT-B-32")
    module = ProCLIP(tower, WIDTH, stage=2, reg_weight=0.1, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert module.adapter.output_dim == tower.output_dim == 512
    assert module.log_logit_scale.item() == pytest.approx(tower.logit_scale)
    before = weights(module)
    rows = rows_of(pixel_values=torch.randn(2, 3, 224, 224), text_embeddings=torch.randn(2, WIDTH))
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(module, DataLoader(rows, batch_size=2))
    assert trainer.callback_metrics["train/loss"].isfinite()
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    changed = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
    assert not trained - changed
    assert any(name.startswith("teacher.network") for name in changed)


@pytest.mark.parametrize(
    ("stage", "missing", "pattern"),
    [
        (1, "teacher_embeddings", "stage 1 needs 'teacher_embeddings' in its training batches.*CLIP's text tower"),
        (1, "text_embeddings", "stage 1 needs 'text_embeddings'"),
        (2, "pixel_values", "stage 2 needs 'pixel_values' in its training batches.*load pictures"),
    ],
)
def test_batches_that_lack_something(tmp_path: Path, stage: int, missing: str, pattern: str) -> None:
    data = Pairs()
    for row in data.train:
        del row[missing]
    with pytest.raises(MisconfigurationException, match=pattern):
        quiet_trainer(tmp_path, max_steps=1).fit(tiny_module(stage), data)


def test_image_tower_of_another_shape(tmp_path: Path) -> None:
    module = tiny_module(2, nn.Sequential(nn.Flatten(), nn.Linear(64, OUT + 1)))
    with pytest.raises(MisconfigurationException, match=r"\(B, output_dim = 8\), got \(16, 9\) for 16"):
        quiet_trainer(tmp_path, max_steps=1).fit(module, Pairs())


def test_sizes_come_from_the_tower() -> None:
    tower = tiny_tower()
    tower.output_dim, tower.logit_scale = OUT, 4.6051702  # CLIP's own: ln 100, rounded up
    module = ProCLIP(tower, WIDTH)
    assert module.adapter.output_dim == OUT
    assert module.log_logit_scale.item() <= torch.tensor(math.log(100)).item()
    with pytest.raises(ValueError, match="output_dim is 5, but the image encoder's is 8"):
        ProCLIP(tower, WIDTH, 5)


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"stage": 3}, "stage must be 1 .* or 2 .*, got 3"),
        ({"ema_decay": 1.5}, r"ema_decay must be in \[0, 1\], got 1.5"),
        ({"reg_weight": -1.0}, "reg_weight must be >= 0, got -1.0"),
        ({"reduction": "none"}, "reduction must be one of"),
        ({"structure_penalty": "l1"}, "penalty must be one of"),
        ({"image_lr_scale": 0.0}, "image_lr_scale must be > 0, got 0.0"),
        ({"recall_at": (0,)}, r"recall_at must hold depths >= 1, got \[0\]"),
        ({"init_logit_scale": 14.3}, "init_logit_scale is a logarithm, from 0 to ln 100 = 4.605, got 14.3"),
        ({"num_blocks": -1}, "num_blocks must be >= 0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_settings(settings: dict, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        tiny_module(**settings)


def test_wrong_combinations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_encoder is what stage 2 trains, got None"):
        ProCLIP(None, WIDTH, OUT, stage=2)
    with pytest.raises(ValueError, match="output_dim is needed: Sequential has no attribute of that name"):
        ProCLIP(tiny_tower(), WIDTH)
    with pytest.raises(ValueError, match="warmup_steps must be >= 0, and goes with lr_scheduler .*'constant'"):
        quiet_trainer(tmp_path, max_steps=1).fit(tiny_module(warmup_steps=2, lr_scheduler="constant"), Pairs())


def test_defaults_are_the_papers() -> None:
    optimizer = ProCLIP(tiny_tower(), WIDTH, OUT, stage=2, lr_scheduler="constant").configure_optimizers()
    group = optimizer.param_groups[0]  # type: ignore[union-attr]
    assert [group[name] for name in ("lr", "betas", "eps", "weight_decay")] == [1e-5, (0.9, 0.98), 1e-6, 0.05]
