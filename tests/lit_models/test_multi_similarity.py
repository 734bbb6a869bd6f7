from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from heliostat import MetricLearning
from heliostat.components import (
    CrossBatchMemory,
    MultiSimilarityLoss,
    SmallConvNet,
    UNPGHead,
    retrieval_metrics,
)
from heliostat.datamodules.loading import GlobalBatchSampler, ResumableLoader
from tests.harness import ModuleContract, ProcessPool, quiet_trainer

CLASSES, PER_CLASS = 6, 9

# Adam makes a full step of a gradient that is zero but for rounding, so processes are compared under SGD.
NO_DROPOUT: dict = {"dropout": 0.0, "optimizer": lambda params: torch.optim.SGD(params, lr=0.1)}


class Pictures(LightningDataModule):
    """54 noisy pictures of 6 classes, by default in batches of 16: three steps an epoch."""

    def __init__(self, channels: int = 1, eval_batch_size: int = 10, size: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(CLASSES).repeat(PER_CLASS)
        centres = torch.randn(CLASSES, channels, size, size, generator=generator)
        pictures = centres[labels] + 0.8 * torch.randn(len(labels), channels, size, size, generator=generator)
        self.rows = [
            {"pixel_values": picture, "labels": label, "index": torch.tensor(i)}
            for i, (picture, label) in enumerate(zip(pictures, labels, strict=True))
        ]
        self.pictures, self.labels, self.eval_batch_size = pictures, labels, eval_batch_size

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        world, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = GlobalBatchSampler(self.rows, 16, num_replicas=world, rank=rank)
        return ResumableLoader(self.rows, batch_size=sampler.local_batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=self.eval_batch_size)

    test_dataloader = predict_dataloader = val_dataloader


def tiny_network(dropout: float = 0.1, dim: int = 8) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, dim))


def tiny_module(loss: nn.Module | None = None, dropout: float = 0.1, **settings: object) -> MetricLearning:
    torch.manual_seed(0)
    settings.setdefault("optimizer", lambda params: torch.optim.AdamW(params, lr=1e-2))
    return MetricLearning(tiny_network(dropout), loss, **settings)


class TestMultiSimilarity(ModuleContract):
    def loss(self) -> nn.Module | None:
        return None

    def module(self, *, dropout: bool = True) -> LightningModule:
        torch.manual_seed(1)
        return tiny_module(self.loss(), **({} if dropout else NO_DROPOUT))

    def data(self, directory: Path) -> LightningDataModule:
        return Pictures()

    def test_validation_on_two_processes_equals_one(self, tmp_path: Path, two_processes: ProcessPool) -> None:
        """54 pictures, the last one left out: the sampler repeats one of 53, which must not count twice."""
        expected = _validate(0, tmp_path)
        for actual in two_processes.run(_validate, tmp_path, "ddp"):
            assert actual == pytest.approx(expected, abs=1e-6)


def _validate(rank: int, directory: Path, strategy: str = "auto") -> dict[str, float]:
    data = Pictures(eval_batch_size=7)
    data.rows.pop()
    trainer = quiet_trainer(directory, devices=1 if strategy == "auto" else 2, strategy=strategy)
    (metrics,) = trainer.validate(tiny_module(), data, verbose=False)
    return metrics


class TestUNPG(TestMultiSimilarity):
    """A loss with parameters, which are trained, saved, and averaged over processes."""

    def loss(self) -> nn.Module:
        return UNPGHead(8, CLASSES, head="cosface", scale=16.0, margin=0.2)


class TestCrossBatchMemory(TestMultiSimilarity):
    """A loss with a memory, which a resumed run must go on with."""

    def loss(self) -> nn.Module:
        return CrossBatchMemory(MultiSimilarityLoss(), size=40, embedding_dim=8)


def test_metrics_are_those_of_the_whole_set(tmp_path: Path) -> None:
    module, data = tiny_module(recall_at=(1, 4)), Pictures()
    (logged,) = quiet_trainer(tmp_path).test(module, data, verbose=False)
    embeddings = module.eval()(data.pictures)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(embeddings)))
    recall = retrieval_metrics(embeddings, data.labels, (1, 4)).recall_at
    expected = {"test/recall_at_1": recall[1], "test/recall_at_4": recall[4]}
    expected["test/map_at_r"] = retrieval_metrics(embeddings, data.labels).map_at_r
    assert logged == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-6)


def test_predict_gives_the_embeddings(tmp_path: Path) -> None:
    module, data = tiny_module(), Pictures()
    predicted = torch.cat(quiet_trainer(tmp_path).predict(module, data))
    torch.testing.assert_close(predicted, module.eval()(data.pictures))


def test_training_helps_and_diagnostics_are_logged(tmp_path: Path) -> None:
    data = Pictures()
    module = tiny_module(UNPGHead(8, CLASSES, scale=16.0, margin=0.2))
    (before,) = quiet_trainer(tmp_path).validate(module, data, verbose=False)
    trainer = quiet_trainer(tmp_path, max_epochs=20)
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/map_at_r"] > before["val/map_at_r"] + 0.2
    assert 0 < trainer.callback_metrics["train/kept_fraction"] <= 1


def test_the_loss_gets_raw_embeddings_from_any_module(tmp_path: Path) -> None:
    class Outside(nn.Module):  # as a loss of another library: no relation to ours, called by position
        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
            self.seen = embeddings.detach()
            return (embeddings.square().sum(1) - 1).square().mean()

    loss = Outside()
    quiet_trainer(tmp_path, max_steps=1).fit(tiny_module(loss), Pictures())
    assert not torch.allclose(loss.seen.norm(dim=1), torch.ones(16), atol=1e-2)


class TestFrozenBatchNorm(ModuleContract):
    """A network with BatchNorm; frozen, it lets two processes equal one."""

    def module(self, *, dropout: bool = True) -> LightningModule:
        torch.manual_seed(0)
        network = SmallConvNet(widths=(4, 8), num_classes=8)
        return MetricLearning(network, freeze_batchnorm=True, optimizer=NO_DROPOUT["optimizer"])

    def data(self, directory: Path) -> LightningDataModule:
        return Pictures()

    def test_statistics_stay_and_the_rest_learns(self, tmp_path: Path) -> None:
        module = self.module()
        network = module.network
        before = {name: value.clone() for name, value in network.state_dict().items()}
        quiet_trainer(tmp_path, max_steps=4, val_check_interval=1).fit(module, Pictures())
        changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
        assert not {name for name in changed if "running" in name or "num_batches" in name}
        assert {name for name, _ in network.named_parameters()} == changed

    def test_by_default_they_follow_the_data(self, tmp_path: Path) -> None:
        network = SmallConvNet(widths=(4, 8), num_classes=8)
        quiet_trainer(tmp_path, max_steps=1).fit(MetricLearning(network), Pictures())
        assert network.stages[0][1].running_mean.abs().sum() > 0

    def test_mode(self) -> None:
        module = self.module()
        assert module.training
        assert not module.network.stages[0][1].training
        assert module.network.stages[0].training
        assert not module.eval().training


class TestExport:
    def test_weights_of_a_module(self, tmp_path: Path) -> None:
        from safetensors.torch import load_model

        module = tiny_module()
        module.save_pretrained(tmp_path / "a" / "model")
        again = tiny_network()
        load_model(again, tmp_path / "a" / "model" / "model.safetensors")
        pictures = Pictures().pictures
        torch.testing.assert_close(F.normalize(again.eval()(pictures)), module.eval()(pictures))


class TestTimm:
    """With a network of timm, by name."""

    NAME = "test_resnet.r160_in1k"

    @pytest.fixture(autouse=True)
    def _timm(self) -> None:
        pytest.importorskip("timm")

    def module(self, network: str, **settings: object) -> MetricLearning:
        torch.manual_seed(0)
        return MetricLearning(network, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), **settings)

    @pytest.mark.parametrize("channels", [1, 2, 3])
    def test_trained_exported_and_loaded(self, tmp_path: Path, channels: int) -> None:
        data = Pictures(channels, size=32)
        module = self.module(self.NAME, embedding_dim=12, in_channels=channels)
        trainer = quiet_trainer(tmp_path, max_steps=2, val_check_interval=2)
        trainer.fit(module, data)
        assert trainer.callback_metrics["val/map_at_r"].isfinite()
        module.save_pretrained(tmp_path / "model")
        expected = module.eval()(data.pictures)
        assert expected.shape == (54, 12)

        import timm

        name = f"local-dir:{tmp_path / 'model'}"
        network = timm.create_model(name, pretrained=True).eval()
        torch.testing.assert_close(F.normalize(network(data.pictures)), expected)
        torch.testing.assert_close(self.module(name).eval()(data.pictures), expected)
        other = self.module(name, embedding_dim=5).eval()  # its last layer is new
        assert other(data.pictures).shape == (54, 5)
        assert torch.equal(other.network.conv1[0].weight, module.network.conv1[0].weight)

    def test_frozen_batchnorm(self) -> None:
        module = self.module(self.NAME, embedding_dim=4, freeze_batchnorm=True)
        assert not module.network.bn1.training

    def test_checkpoint_rebuilds_it(self, tmp_path: Path) -> None:
        data = Pictures(size=32)
        module = self.module(self.NAME, embedding_dim=4, in_channels=1)
        trainer = quiet_trainer(tmp_path, max_steps=1)
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        loaded = MetricLearning.load_from_checkpoint(tmp_path / "a.ckpt").eval()
        torch.testing.assert_close(loaded(data.pictures), module.eval()(data.pictures))

    @pytest.mark.parametrize(
        ("network", "settings", "pattern"),
        [
            ("resnet18", {}, "network='resnet18' ends in a classifier: give embedding_dim"),
            ("resnot18", {"embedding_dim": 8}, "network='resnot18' is no model of timm .*local-dir:PATH"),
        ],
    )
    def test_wrong_names(self, network: str, settings: dict, pattern: str) -> None:
        with pytest.raises(ValueError, match=pattern):
            MetricLearning(network, **settings)

    def test_missing_directory(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nothing"):
            MetricLearning(f"local-dir:{tmp_path / 'nothing'}")


def test_checkpoint_from_python_takes_the_network_again(tmp_path: Path) -> None:
    module, data = tiny_module(UNPGHead(8, CLASSES), recall_at=(2,)), Pictures()
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    path = tmp_path / "a.ckpt"
    loaded = MetricLearning.load_from_checkpoint(path, network=tiny_network(), loss=UNPGHead(8, CLASSES))
    assert loaded.recall_at == (2,)
    assert torch.equal(loaded.loss.weight, module.loss.weight)
    torch.testing.assert_close(loaded.eval()(data.pictures), module.eval()(data.pictures))


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"recall_at": ()}, r"recall_at must hold depths >= 1, got \[\]"),
        ({"recall_at": (0, 1)}, r"recall_at must hold depths >= 1, got \[0, 1\]"),
        ({"embedding_dim": 8}, "build a network given by name; Sequential is one already"),
        ({"pretrained": True}, "build a network given by name; Sequential is one already"),
        ({"in_channels": 3}, "build a network given by name; Sequential is one already"),
        ({"freeze_batchnorm": True}, "freeze_batchnorm: Sequential has no BatchNorm"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_settings(settings: dict, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        tiny_module(**settings)
