from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from heliostat import CAFA, SourceStatistics, StepSeed
from heliostat.components import SmallConvNet, TestTimeAdapter
from heliostat.components.source_statistics import fit_class_gaussians
from heliostat.datamodules.loading import GlobalBatchSampler, ResumableLoader
from tests.harness import ModuleContract, ProcessPool, quiet_trainer

CLASSES, COUNT = 3, 48
METHODS = ("none", "batchnorm", "tent", "cafa")


class Streams(LightningDataModule):
    """48 noisy pictures of 3 classes, three batches an epoch; two test streams, one brighter, one noisier."""

    def __init__(self, names: tuple[str, ...] = ("bright", "noisy"), keys: tuple[str, ...] = ("stream",)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(COUNT) % CLASSES
        centres = torch.randn(CLASSES, 1, 8, 8, generator=generator)
        self.pictures = centres[self.labels] + 0.8 * torch.randn(COUNT, 1, 8, 8, generator=generator)
        noise = torch.randn(COUNT, 1, 8, 8, generator=generator)
        shifted = {"clean": self.pictures, "bright": 2 * self.pictures + 1, "noisy": self.pictures + noise}
        self.shifted = {name: shifted[name] for name in names}
        self.keys, self.names = keys, names

    def rows(self, pictures: Tensor, stream: str = "", keys: tuple[str, ...] = ("index", "labels")) -> list[dict]:
        every = [
            {"pixel_values": picture, "labels": label, "index": torch.tensor(i), "stream": stream}
            for i, (picture, label) in enumerate(zip(pictures, self.labels, strict=True))
        ]
        return [{key: row[key] for key in ("pixel_values", *keys)} for row in every]

    def train_dataloader(self) -> ResumableLoader:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        rows = self.rows(self.pictures)
        sampler = GlobalBatchSampler(rows, 16, num_replicas=world, rank=rank)
        return ResumableLoader(rows, batch_size=sampler.local_batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows(self.pictures), batch_size=10)

    def test_dataloader(self) -> list[DataLoader]:
        keys = ("index", "labels", *self.keys)
        return [
            DataLoader(self.rows(pictures, name, keys), batch_size=12, collate_fn=_collate)
            for name, pictures in self.shifted.items()
        ]

    def predict_dataloader(self) -> list[DataLoader]:
        return [DataLoader(self.rows(pictures, keys=()), batch_size=12) for pictures in self.shifted.values()]


def _collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "stream"}
    return {**batch, "stream": rows[0]["stream"]} if "stream" in rows[0] else batch


def adam(rate: float) -> Any:
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def convnet() -> SmallConvNet:
    torch.manual_seed(0)
    return SmallConvNet(widths=(4, 8), num_classes=CLASSES)


def module(methods: tuple[str, ...] = METHODS, network: nn.Module | None = None, **settings: Any) -> CAFA:
    settings = {"optimizer": adam(1e-2), "adaptation_optimizer": adam(1e-2), **settings}
    return CAFA(network or convnet(), methods, **settings)


def trained(methods: tuple[str, ...] = METHODS, **settings: Any) -> CAFA:
    """Weights and running statistics that are not the initial ones, with the statistics that belong to them."""
    model, data = module(methods, **settings), Streams()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(10):
        torch.nn.functional.cross_entropy(model(data.pictures), data.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.source_gaussians = fit_class_gaussians(model.network, [(data.pictures, data.labels)])
    return model


class TestSourceTraining(ModuleContract):
    """Without BatchNorm, whose statistics are each process's own."""

    methods: tuple[str, ...] = ("none",)

    def network(self, dropout: float) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, CLASSES))

    def module(self, *, dropout: bool = True) -> LightningModule:
        torch.manual_seed(0)
        # Adam makes a full step of a gradient that is zero but for rounding, so processes are compared under SGD.
        sgd = {} if dropout else {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1)}
        return module(self.methods, self.network(0.1 if dropout else 0.0), **sgd)

    def data(self, directory: Path) -> LightningDataModule:
        return Streams()

    def callbacks(self) -> list[Any]:
        return [StepSeed(), SourceStatistics()]

    def test_validation_on_two_processes_equals_one(self, tmp_path: Path, two_processes: ProcessPool) -> None:
        """47 pictures: the sampler repeats one, which must not count twice."""
        expected = _validate(0, tmp_path)
        assert 0 < expected["val/accuracy"] < 1
        for actual in two_processes.run(_validate, tmp_path, "ddp"):
            assert actual == pytest.approx(expected, abs=1e-6)


class Odd(Streams):
    """One picture fewer, so that two processes cannot share them equally."""

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows(self.pictures)[:-1], batch_size=7)


def _validate(rank: int, directory: Path, strategy: str = "auto") -> dict[str, float]:
    trainer = quiet_trainer(directory, devices=1 if strategy == "auto" else 2, strategy=strategy)
    (metrics,) = trainer.validate(module(("none",)), Odd(), verbose=False)
    return metrics


class TestWithBatchNorm(TestSourceTraining):
    """Resumed exactly, with statistics fitted at every save. DDP's BatchNorm is another training, so not compared."""

    methods = METHODS
    test_two_processes_equal_one = None  # type: ignore[assignment]
    test_validation_on_two_processes_equals_one = None  # type: ignore[assignment]

    def network(self, dropout: float) -> nn.Module:
        return convnet()


class TestTest:
    def expected(self, model: CAFA, data: Streams) -> dict[str, dict[str, Tensor]]:
        """By the adapters alone, a new one for every stream."""
        results: dict[str, dict[str, Tensor]] = {}
        for name, pictures in data.shifted.items():
            for method in model.methods:
                adapter = TestTimeAdapter(
                    model.network, method, gaussians=model.source_gaussians, optimizer=adam(0.1), shrinkage=0.2
                )
                logits = torch.cat([adapter(batch) for batch in pictures.split(12)])
                results.setdefault(name, {})[method] = logits.argmax(1) == data.labels
        return results

    @pytest.mark.parametrize("inference_mode", [True, False])
    def test_every_method_adapts_to_every_stream_anew(self, tmp_path: Path, inference_mode: bool) -> None:
        model, data = trained(shrinkage=0.2, adaptation_optimizer=adam(0.1)), Streams()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        logged = quiet_trainer(tmp_path, inference_mode=inference_mode).test(model, data, verbose=False)[0]
        expected = self.expected(model, data)
        assert list(model.stream_results) == ["bright", "noisy"]
        for stream, by_method in expected.items():
            for method, right in by_method.items():
                assert torch.equal(model.stream_results[stream][method], right), (stream, method)
                assert logged[f"test/{method}/{stream}"] == pytest.approx(float(right.float().mean()))
        for method in METHODS:
            mean = sum(float(by_method[method].float().mean()) for by_method in expected.values()) / 2
            assert logged[f"test/{method}"] == pytest.approx(mean)
        assert len(logged) == 12
        assert len({str(right.tolist()) for right in expected["noisy"].values()}) > 2  # the methods do differ
        assert [model.adapters[method].updates for method in METHODS] == [0, 0, 4, 4]
        after = model.state_dict()
        assert not [name for name in before if not torch.equal(before[name], after[name])]
        assert before.keys() == after.keys()

    def test_twice_is_the_same(self, tmp_path: Path) -> None:
        model, trainer = trained(), quiet_trainer(tmp_path)
        first, second = (trainer.test(model, Streams(), verbose=False)[0] for _ in range(2))
        assert first == second

    def test_streams_without_names_and_a_single_one(self, tmp_path: Path) -> None:
        model = trained(("batchnorm",))
        logged = quiet_trainer(tmp_path).test(model, Streams(keys=()), verbose=False)[0]
        assert set(logged) == {"test/batchnorm", "test/batchnorm/stream0", "test/batchnorm/stream1"}
        logged = quiet_trainer(tmp_path).test(model, Streams(("noisy",)), verbose=False)[0]
        assert set(logged) == {"test/batchnorm", "test/batchnorm/noisy"}

    def test_mixed_precision(self, tmp_path: Path) -> None:
        model = trained()
        logged = quiet_trainer(tmp_path, precision="bf16-mixed").test(model, Streams(), verbose=False)[0]
        assert model.adapters["cafa"].updates == 4
        assert all(0 <= value <= 1 for value in logged.values())

    def test_labels_are_needed(self, tmp_path: Path) -> None:
        loader = Streams().predict_dataloader()[0]
        with pytest.raises(MisconfigurationException, match="needs labels, .* predict adapts without them"):
            quiet_trainer(tmp_path).test(trained(), loader, verbose=False)

    def test_two_processes_equal_one(self, tmp_path: Path, two_processes: ProcessPool) -> None:
        """Every process sees every other picture, and the joint batches are those of one process."""
        expected = _test(0, tmp_path)
        for actual in two_processes.run(_test, tmp_path, "ddp"):
            assert actual == pytest.approx(expected, abs=1e-6)


class Halves(Streams):
    """An odd number of pictures, joint batches of 12."""

    def test_dataloader(self) -> list[DataLoader]:
        size = 12 // (self.trainer.world_size if self.trainer else 1)
        return [DataLoader(self.rows(pictures)[:-1], batch_size=size) for pictures in self.shifted.values()]


def _test(rank: int, directory: Path, strategy: str = "auto") -> dict[str, float]:
    settings = {"devices": 1 if strategy == "auto" else 2, "strategy": strategy, "precision": "64-true"}
    # Without the last batch, in which Lightning repeats a picture.
    trainer = quiet_trainer(directory, limit_test_batches=3, **settings)
    return trainer.test(trained(), Halves(), verbose=False)[0]


class TestPredict:
    def test_adapts_without_labels(self, tmp_path: Path) -> None:
        model, data = trained(("none", "cafa")), Streams()
        predicted = quiet_trainer(tmp_path).predict(model, data)
        assert predicted is not None
        for logits, pictures in zip(predicted, data.shifted.values(), strict=True):
            adapter = model.adapter("cafa")
            torch.testing.assert_close(torch.cat(logits), torch.cat([adapter(x) for x in pictures.split(12)]))
            assert not torch.allclose(torch.cat(logits), model.eval()(pictures))
        assert list(model.adapters) == ["cafa"]

    def test_in_one_call(self) -> None:
        model, data = trained(), Streams()
        adapter = model.adapter()
        assert adapter.method == "cafa"
        assert adapter(data.shifted["bright"]).shape == (COUNT, CLASSES)

    def test_an_interrupted_stream_goes_on(self, tmp_path: Path) -> None:
        model, batches = trained(), Streams().shifted["noisy"].split(12)
        whole, first = model.adapter(), model.adapter()
        expected = [whole(batch) for batch in batches]
        for batch in batches[:2]:
            first(batch)
        torch.save(first.state_dict(), tmp_path / "stream.pt")
        second = model.adapter()
        second.load_state_dict(torch.load(tmp_path / "stream.pt", weights_only=True))
        for batch, logits in zip(batches[2:], expected[2:], strict=True):
            assert torch.equal(second(batch), logits)


class TestStatistics:
    def test_go_with_the_checkpoint(self, tmp_path: Path) -> None:
        model, data = module(), Streams()
        trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[SourceStatistics()])
        trainer.fit(model, data)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        torch.load(tmp_path / "a.ckpt", weights_only=True)
        expected = quiet_trainer(tmp_path).test(model, data, verbose=False)
        other = module()
        actual = quiet_trainer(tmp_path).test(other, data, ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)
        assert actual == expected
        loaded = CAFA.load_from_checkpoint(tmp_path / "a.ckpt", network=convnet())
        assert loaded.source_gaussians is not None
        assert torch.equal(loaded.source_gaussians.mean, model.source_gaussians.mean)
        assert loaded.adapter("cafa")(data.pictures).shape == (COUNT, CLASSES)

    def test_assigned_ones_go_with_it_too(self, tmp_path: Path) -> None:
        model = trained()
        trainer = quiet_trainer(tmp_path)
        trainer.validate(model, Streams(), verbose=False)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        loaded = CAFA.load_from_checkpoint(tmp_path / "a.ckpt", network=convnet())
        assert torch.equal(loaded.source_gaussians.covariance, model.source_gaussians.covariance)
        loaded.adapter("cafa")

    @pytest.mark.parametrize("stage", ["test", "predict"])
    def test_missing(self, tmp_path: Path, stage: str) -> None:
        pattern = "needs statistics of the source data.*SourceStatistics.*fit_class_gaussians.*leave 'cafa' out"
        with pytest.raises(MisconfigurationException, match=pattern):
            getattr(quiet_trainer(tmp_path), stage)(module(), Streams())
        quiet_trainer(tmp_path).test(module(("none", "tent")), Streams(), verbose=False)

    @pytest.mark.parametrize("name", ["stages.0.0.weight", "stages.1.1.running_var", "classifier.bias"])
    def test_of_other_weights(self, tmp_path: Path, name: str) -> None:
        model = trained()
        model.adapter("cafa")
        model.network.state_dict()[name].mul_(1.01)
        with pytest.raises(MisconfigurationException, match="of other weights than the network now has"):
            quiet_trainer(tmp_path).test(model, Streams())
        trainer = quiet_trainer(tmp_path)
        trainer.validate(model, Streams(), verbose=False)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        assert "source_statistics" not in torch.load(tmp_path / "a.ckpt", weights_only=True)

    def test_of_another_classifier(self) -> None:
        model = trained()
        pictures = Streams().pictures
        other = SmallConvNet(widths=(4, 8), num_classes=4)
        labels = torch.arange(COUNT) % 4
        model.source_gaussians = fit_class_gaussians(other, [(pictures, labels)])
        with pytest.raises(ValueError, match="C = 4 classes and D = 8 features, but the model has C = 3"):
            model.adapter("cafa")(pictures)
        narrow = SmallConvNet(widths=(4, 6), num_classes=CLASSES)
        model.source_gaussians = fit_class_gaussians(narrow, [(pictures, Streams().labels)])
        with pytest.raises(ValueError, match="D = 6 features, but the model has C = 3 and, before 'classifier', D = 8"):
            model.adapter("cafa")(pictures)


class TestNetworks:
    def test_without_batchnorm(self) -> None:
        plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.LayerNorm(6), nn.Linear(6, CLASSES))
        with pytest.raises(ValueError, match=r"network: Sequential has no BatchNorm.*norm_affine.*\['none'\]"):
            module(network=plain)
        model = module(("tent",), plain, parameters="norm_affine")
        adapter = model.adapter()
        adapter(Streams().pictures)
        assert adapter.updates == 1
        module(("none",), plain)

    def test_timm(self, tmp_path: Path) -> None:
        pytest.importorskip("timm")
        model = CAFA("test_resnet.r160_in1k", ("none", "cafa"), num_classes=CLASSES, in_channels=1)
        x = torch.randn(12, 1, 32, 32)
        model.source_gaussians = fit_class_gaussians(model.network, [(x, torch.arange(12) % CLASSES)])
        adapter = model.adapter()
        assert adapter(x).shape == (12, CLASSES)
        assert adapter.updates == 1

    @pytest.mark.parametrize(
        ("network", "settings", "pattern"),
        [
            ("resnet18", {}, "network='resnet18' is new: give num_classes, or pretrained=True"),
            ("resnot18", {"num_classes": 3}, "network='resnot18' is no model of timm"),
            (convnet(), {"num_classes": 3}, "SmallConvNet is one already"),
            (convnet(), {"methods": []}, "methods must be different ones of"),
            (convnet(), {"methods": ["tent", "tent"]}, r"methods must be .*got \['tent', 'tent'\]"),
            (convnet(), {"methods": ["shot"]}, r"methods must be .*got \['shot'\]"),
        ],
    )
    def test_wrong_settings(self, network: str | nn.Module, settings: dict[str, Any], pattern: str) -> None:
        if isinstance(network, str):
            pytest.importorskip("timm")
        with pytest.raises(ValueError, match=pattern):
            CAFA(network, **settings)


def test_adaptation_helps_on_shifted_data(tmp_path: Path) -> None:
    """The bright stream moves every feature, which batch statistics undo."""
    logged = quiet_trainer(tmp_path).test(trained(), Streams(), verbose=False)[0]
    for method in ("batchnorm", "tent", "cafa"):
        assert logged[f"test/{method}/bright"] > logged["test/none/bright"] + 0.2
