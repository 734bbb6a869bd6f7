from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, WeightedRandomSampler

from heliostat import SourceStatistics
from heliostat.components import ClassGaussians
from heliostat.components.source_statistics import fit_class_gaussians
from tests.harness import ProcessPool, quiet_trainer, weights

COUNT, CLASSES = 40, 3


class Foreign(LightningModule):
    """Nothing of ours: a module that is its own network, with BatchNorm and dropout."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(6, CLASSES)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.rate)


class Waiting(Foreign):
    """One that asks for statistics."""

    source_gaussians: ClassGaussians | None = None


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(COUNT) % CLASSES
    return torch.randn(COUNT, 5, generator=generator) + labels[:, None], labels


def rows() -> list[tuple[Tensor, Tensor]]:
    return list(zip(*inputs(), strict=True))


def loader(data: Any = None, **settings: Any) -> DataLoader:
    settings = {"batch_size": 8, "shuffle": "sampler" not in settings, **settings}
    return DataLoader(rows() if data is None else data, **settings)


def fit(directory: Path, callbacks: list, model: LightningModule | None = None, train: Any = None, **settings: Any):
    settings = {"max_steps": 6, "max_epochs": 9, "val_check_interval": 2, **settings}
    trainer = quiet_trainer(directory, callbacks=callbacks, **settings)
    torch.manual_seed(5)
    trainer.fit(model or Foreign(), loader() if train is None else train, loader(shuffle=False))
    return trainer


def direct(model: nn.Module, chosen: list[int] | None = None, **settings: Any) -> ClassGaussians:
    """In the order of the set."""
    x, y = inputs()
    rows = list(range(COUNT)) if chosen is None else chosen
    return fit_class_gaussians(model, [(x[rows], y[rows])], **settings)


def assert_equal(actual: ClassGaussians | None, expected: ClassGaussians) -> None:
    assert actual is not None
    assert torch.equal(actual.count, expected.count)
    torch.testing.assert_close(actual.mean, expected.mean)
    torch.testing.assert_close(actual.covariance, expected.covariance)


def test_every_checkpoint_has_those_of_its_weights(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    callback = SourceStatistics()
    trainer = fit(tmp_path, [callback, keeper], enable_checkpointing=True)
    assert_equal(callback.gaussians, direct(trainer.lightning_module))
    means = []
    for step in range(1, 7):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        model = Foreign()
        model.load_state_dict(checkpoint["state_dict"])
        state = checkpoint["source_statistics"]
        kept = ClassGaussians(*(state[name] for name in ("count", "mean", "covariance")))
        assert_equal(kept, direct(model))
        means.append(kept.mean)
    assert not torch.allclose(means[0], means[-1])


def test_training_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Shuffling, dropout, modes: with a pass after every step, the weights are those of a training without."""

    def generators() -> list[float]:
        return [float(torch.rand(())), float(np.random.rand()), random.random()]

    ends = []
    for callbacks in ([], [SourceStatistics()]):
        keeper = ModelCheckpoint(tmp_path, every_n_train_steps=1)
        np.random.seed(0)
        random.seed(0)
        trainer = fit(tmp_path, [*callbacks, keeper], enable_checkpointing=True)
        ends.append((weights(trainer.lightning_module), generators()))
        assert trainer.lightning_module.training
    assert not [name for name, value in ends[0][0].items() if not torch.equal(value, ends[1][0][name])]
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("sampler", ["subset", "weighted", "batches"])
def test_samplers(tmp_path: Path, sampler: str) -> None:
    """A part of the set is kept to, repetitions are not; a training under way is left alone."""
    part = list(range(0, COUNT, 2))
    expected = list(range(COUNT))
    settings: dict[str, Any]
    if sampler == "subset":
        settings, expected = {"sampler": SubsetRandomSampler(part)}, part
    elif sampler == "weighted":
        settings = {"sampler": WeightedRandomSampler([1.0] * COUNT, COUNT)}
    else:
        batches = [part[:10], part[10:], part[:10]]
        settings, expected = {"batch_sampler": batches, "batch_size": 1, "shuffle": None}, part
    callback = SourceStatistics()
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    plain = fit(tmp_path, [], train=loader(**settings), max_steps=4, val_check_interval=1)
    trainer = fit(
        tmp_path,
        [callback, keeper],
        train=loader(**settings),
        max_steps=4,
        val_check_interval=1,
        enable_checkpointing=True,
    )
    if sampler == "weighted":
        assert callback.gaussians is not None
        drawn = int(callback.gaussians.count.sum())
        assert COUNT / 2 < drawn < COUNT
    else:
        assert_equal(callback.gaussians, direct(trainer.lightning_module, expected))
    after = weights(trainer.lightning_module)
    assert not [name for name, value in weights(plain.lightning_module).items() if not torch.equal(value, after[name])]


def test_a_number_of_samples(tmp_path: Path) -> None:
    callbacks = [SourceStatistics(num_samples=20) for _ in range(2)]
    for callback in callbacks:
        fit(tmp_path, [callback])
        assert callback.gaussians is not None
        assert callback.gaussians.count.sum() == 20
    assert_equal(callbacks[0].gaussians, callbacks[1].gaussians)


class Noisy(Dataset):
    """Augmentation drawn from the global generators."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        x, y = rows()[row]
        return x + torch.randn(5) * random.random() * np.random.rand(), y


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentation_is_the_same_each_time(tmp_path: Path, num_workers: int) -> None:
    model, callback = Foreign(rate=0.0), SourceStatistics()
    train = loader(Noisy(), num_workers=num_workers, persistent_workers=bool(num_workers))
    trainer = fit(tmp_path, [callback], model, train, max_steps=1)
    first = callback.gaussians
    callback._fingerprint = ""  # as if of other weights
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert callback.gaussians is not first
    assert first is not None
    assert_equal(callback.gaussians, first)
    assert float((first.mean - direct(model).mean).abs().max()) > 1e-4


class Both(LightningDataModule):
    def setup(self, stage: str) -> None:
        self.stages = [*getattr(self, "stages", []), stage]

    def train_dataloader(self) -> DataLoader:
        assert "fit" in self.stages
        return loader()

    def test_dataloader(self) -> DataLoader:
        return loader(shuffle=False)

    predict_dataloader = test_dataloader


class TestAtTest:
    @pytest.mark.parametrize("stage", ["test", "predict"])
    def test_fitted_on_the_data_module_if_missing(self, tmp_path: Path, stage: str) -> None:
        class Predicting(Waiting):
            def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
                return self(batch[0])

        model = Predicting()
        getattr(quiet_trainer(tmp_path, callbacks=[SourceStatistics()]), stage)(model, datamodule=Both())
        assert_equal(model.source_gaussians, direct(model))
        assert not model.source_gaussians.mean.is_inference()

    def test_taken_from_the_checkpoint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fit(tmp_path, [SourceStatistics()]).save_checkpoint(tmp_path / "a.ckpt")
        model, callback = Waiting(), SourceStatistics()
        monkeypatch.setattr(SourceStatistics, "_fit", None)  # no pass
        trainer = quiet_trainer(tmp_path, callbacks=[callback])
        trainer.test(model, loader(), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)
        assert_equal(model.source_gaussians, direct(model))

    def test_never_of_other_weights(self, tmp_path: Path) -> None:
        """Loaded with a checkpoint, then the weights change: fitted anew, or refused without data to do so."""
        fit(tmp_path, [SourceStatistics()]).save_checkpoint(tmp_path / "a.ckpt")
        checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
        checkpoint["state_dict"]["body.1.running_mean"] += 0.1
        torch.save(checkpoint, tmp_path / "b.ckpt")
        arguments: dict[str, Any] = {"ckpt_path": str(tmp_path / "b.ckpt"), "verbose": False}
        model = Waiting()
        with pytest.raises(MisconfigurationException, match="have no statistics, and there is no training loader"):
            quiet_trainer(tmp_path, callbacks=[SourceStatistics()]).test(model, loader(), **arguments)
        quiet_trainer(tmp_path, callbacks=[SourceStatistics()]).test(model, datamodule=Both(), **arguments)
        assert_equal(model.source_gaussians, direct(model))

    def test_after_a_training_whose_best_weights_are_not_the_last(self, tmp_path: Path) -> None:
        class Best(Waiting):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("score", float(abs(self.global_step - 4)))

        keeper, model = ModelCheckpoint(tmp_path, monitor="score", save_on_train_epoch_end=False), Best()
        trainer = fit(tmp_path, [SourceStatistics(), keeper], model, enable_checkpointing=True)
        final = model.source_gaussians
        assert_equal(final, direct(model))
        trainer.test(model, loader(shuffle=False), ckpt_path="best", verbose=False)
        assert_equal(model.source_gaussians, direct(model))
        assert not torch.allclose(model.source_gaussians.mean, final.mean)


def test_a_checkpoint_is_saved_even_without(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[SourceStatistics()])
    trainer.validate(Foreign(), loader(), verbose=False)
    with pytest.warns(UserWarning, match="a checkpoint is saved without"):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert "source_statistics" not in torch.load(tmp_path / "a.ckpt", weights_only=True)


class TestWhere:
    class Wrapping(LightningModule):
        """Its network is a part of it, and another linear layer comes last."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.add_module(name, Foreign())
            self.name = name
            self.last = nn.Linear(CLASSES, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.get_submodule(self.name)(x))

        training_step, validation_step = Foreign.training_step, Foreign.validation_step
        configure_optimizers, rate = Foreign.configure_optimizers, 0.1

    @pytest.mark.parametrize(("name", "argument"), [("network", None), ("classifier", "classifier")])
    def test_network(self, tmp_path: Path, name: str, argument: str | None) -> None:
        data = [(x, y % 2) for x, y in rows()]
        callback = SourceStatistics(network=argument)
        trainer = fit(tmp_path, [callback], self.Wrapping(name), loader(data))
        expected = fit_class_gaussians(trainer.lightning_module.get_submodule(name), loader(data, shuffle=False))
        assert_equal(callback.gaussians, expected)

    def test_head_and_covariance_of_the_module(self, tmp_path: Path) -> None:
        class Settled(Foreign):
            covariance = "tied"

            def __init__(self) -> None:
                super().__init__()
                self.top = self.head
                del self.head
                self.head = "top"
                self.auxiliary = nn.Linear(2, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.top(self.body(x))

        callback = SourceStatistics()
        trainer = fit(tmp_path, [callback], Settled())
        assert_equal(callback.gaussians, direct(trainer.lightning_module, head="top", covariance="tied"))
        callback = SourceStatistics(head="body.0", covariance="class")
        trainer = fit(tmp_path, [callback], Settled())
        assert_equal(callback.gaussians, direct(trainer.lightning_module, head="body.0"))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(rows())


class TestRefused:
    """Before the first step, and not when the first checkpoint is saved."""

    @pytest.mark.parametrize(
        ("train", "settings", "error", "pattern"),
        [
            (
                DataLoader(Stream(), batch_size=8),
                {},
                MisconfigurationException,
                "data set with random access, got Data",
            ),
            ([loader()], {}, MisconfigurationException, "one torch DataLoader .* got list"),
            (DataLoader(rows(), batch_size=None), {}, MisconfigurationException, "one torch DataLoader"),
            (
                None,
                {"network": "net"},
                MisconfigurationException,
                r"network='net'.*no such submodule; it has body, head",
            ),
            (None, {"head": "tail"}, ValueError, "no module 'tail'"),
            (loader([(x, y + 1) for x, y in rows()]), {}, ValueError, r"labels must lie in 0\.\.2"),
            (loader([{"x": x, "y": y} for x, y in rows()]), {}, ValueError, "lacks pixel_values and labels"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path: Path, train: Any, settings: dict, error: type, pattern: str) -> None:
        model = Foreign()
        before = weights(model)
        with pytest.raises(error, match=pattern):
            fit(tmp_path, [SourceStatistics(**settings)], model, train)
        assert not [name for name, value in weights(model).items() if not torch.equal(value, before[name])]

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match="num_samples must be >= 1, got 0"):
            SourceStatistics(num_samples=0)


def test_two_processes_equal_one(tmp_path: Path, two_processes: ProcessPool) -> None:
    """Their BatchNorm layers saw different data: what counts is the checkpoint, which rank 0 writes."""
    results = two_processes.run(_fit_on_rank, tmp_path)
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    state = checkpoint["source_statistics"]
    model = Foreign()
    model.load_state_dict(checkpoint["state_dict"])
    expected = direct(model, list(range(COUNT - 1)))
    for actual in (*results, ClassGaussians(*(state[name] for name in ("count", "mean", "covariance")))):
        assert_equal(actual, expected)


def _fit_on_rank(rank: int, directory: Path) -> ClassGaussians | None:
    callback = SourceStatistics()
    trainer = fit(
        directory, [callback], train=loader(rows()[:-1]), devices=2, strategy="ddp", max_steps=4, val_check_interval=1
    )
    trainer.save_checkpoint(directory / "a.ckpt")
    return callback.gaussians
