from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

import heliostat._extras
from heliostat import SampleGrid
from tests.harness import ProcessPool, quiet_trainer

Rows = list[dict[str, Any]]


class Generative(LightningModule):
    """Nothing of ours: its sample is its weight, the condition, and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls: list[dict[str, Any]] = []

    def sample(self, batch: Any, *, num_steps: int, guidance_scale: float, generator: torch.Generator | None) -> Tensor:
        like = batch["latents"] if "latents" in batch else batch["pixel_values"]
        noise = torch.randn(like.shape, generator=generator)
        self.calls.append(
            {"steps": num_steps, "guidance": guidance_scale, "batch": batch, "weight": float(self.weight)}
        )
        return self.weight + batch["labels"].view(-1, 1, 1, 1) / 10 + 0.01 * noise

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows(count: int = 10, **further: Any) -> Rows:
    return [
        {"pixel_values": torch.zeros(3, 4, 4), "labels": torch.tensor(i), "text": f"picture {i}", **further}
        for i in range(count)
    ]


def loader(given: Rows) -> DataLoader:
    return DataLoader(given, batch_size=4)


class Spy(SampleGrid):
    """Keeps what is drawn."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.drawn: list[tuple[Tensor, list[str] | None]] = []

    def _figure(self, samples: Tensor, captions: Any, trainer: Any) -> Any:
        self.drawn.append((samples, captions))
        self.last = super()._figure(samples, captions, trainer)
        return self.last


def fit(directory: Path, *callbacks: Any, given: Rows | None = None, module: Any = None, **settings: Any) -> Generative:
    module = module or Generative()
    trainer = quiet_trainer(directory, **{"max_epochs": 1, "callbacks": list(callbacks)} | settings)
    trainer.fit(module, loader(rows(4)), loader(rows() if given is None else given))
    return module


@pytest.mark.parametrize("num_samples", [3, 6, 10, 50])
def test_first_validation_pictures_with_their_captions(tmp_path: Path, num_samples: int) -> None:
    grid = Spy(num_samples=num_samples, num_steps=7, guidance_scale=3.0, seed=1)
    module = fit(tmp_path, grid)
    (call,) = module.calls
    count = min(num_samples, 10)
    assert (call["steps"], call["guidance"]) == (7, 3.0)
    assert call["batch"]["labels"].tolist() == list(range(count))
    ((samples, captions),) = grid.drawn
    assert captions == [f"picture {i}" for i in range(count)]
    noise = torch.randn((count, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    expected = module.weight.detach() + torch.arange(count).view(-1, 1, 1, 1) / 10 + 0.01 * noise
    assert torch.allclose(samples, expected)
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = grid.last.axes
    assert [text.get_text() for text in axes.texts] == captions
    assert len(axes.images) == count
    for image, sample in zip(axes.images, samples, strict=True):  # black is -1 and white 1, whatever the sample
        assert torch.allclose(torch.tensor(image.get_array()), ((sample + 1) / 2).clamp(0, 1).permute(1, 2, 0))
    assert axes.get_title() == "epoch 0, step 1: 7 steps, guidance 3"


def test_successive_epochs_compare(tmp_path: Path) -> None:
    grid = Spy(every_n_epochs=2, num_samples=4)
    module = fit(tmp_path, grid, max_epochs=5, num_sanity_val_steps=2)
    (first, captions), (second, again) = grid.drawn
    assert [call["weight"] for call in module.calls] == pytest.approx([0.2, 0.4])
    assert torch.allclose(second - first, torch.tensor(0.2))
    assert captions == again


def test_averaged_weights(tmp_path: Path) -> None:
    for callbacks in ((Spy(), EMAWeightAveraging(decay=0.5)), (EMAWeightAveraging(decay=0.5), Spy())):
        module = fit(tmp_path, *callbacks, max_epochs=3)
        averages, average = [], 0.1
        for step in (1, 2, 3):  # the first is a copy
            average = 0.5 * average + 0.5 * step / 10
            averages.append(average)
        assert [call["weight"] for call in module.calls] == pytest.approx(averages)
        assert float(module.weight) == pytest.approx(averages[-1])  # as the callback leaves it


def test_validate_and_loggers(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    class Logger(CSVLogger):
        images: list[Any] = []  # noqa: RUF012

        def log_image(self, key: str, images: list[str]) -> None:
            self.images.append((key, images))

    grid, logger = Spy(every_n_epochs=7, filename="b.png"), Logger(tmp_path)
    trainer = quiet_trainer(tmp_path, callbacks=[grid], logger=logger)
    trainer.validate(Generative(), [loader(rows(5)), loader(rows(9))], verbose=False)
    ((samples, _),) = grid.drawn
    assert len(samples) == 5  # of the first loader
    path = Path(logger.log_dir) / "b.png"
    assert path.is_file()
    assert logger.images == [("b", [str(path)])]


def test_without_captions(tmp_path: Path) -> None:
    grid = Spy()
    fit(tmp_path, grid, given=[{k: v for k, v in row.items() if k != "text"} for row in rows()])
    fit(tmp_path, unasked := Spy(captions=False))
    for one in (grid, unasked):
        assert one.drawn[0][1] is None
        assert len(one.last.axes[0].texts) == 0


def test_latents(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        latent_channels=2, block_out_channels=(4,), norm_num_groups=2, scaling_factor=0.5, shift_factor=0.25
    ).eval()
    given = [{**row, "latents": torch.zeros(2, 4, 4)} for row in rows()]
    vae.save_pretrained(tmp_path / "vae")
    for autoencoder in (vae, str(tmp_path / "vae")):
        grid = Spy(vae=autoencoder)
        module = fit(tmp_path, grid, given=given)
        noise = torch.randn((10, 2, 4, 4), generator=torch.Generator().manual_seed(0))
        latents = module.weight.detach() + torch.arange(10).view(-1, 1, 1, 1) / 10 + 0.01 * noise
        with torch.no_grad():
            expected = vae.decode(latents / 0.5 + 0.25).sample.clamp(-1, 1)
        assert torch.allclose(grid.drawn[0][0], expected, atol=1e-5)
        assert list(module.state_dict()) == ["weight"]
    grid = Spy()
    with pytest.warns(UserWarning, match="the samples are latents; without vae the mean of their channels is shown"):
        fit(tmp_path, grid, given=given)
    assert grid.drawn[0][0].shape == (10, 1, 4, 4)
    assert grid.drawn[0][0].abs().max() == 1


def test_not_finite(tmp_path: Path) -> None:
    class Diverged(Generative):
        def sample(self, *args: Any, **settings: Any) -> Tensor:
            samples = super().sample(*args, **settings)
            samples[2] = torch.nan
            return samples

    grid = Spy()
    with pytest.warns(UserWarning, match="1 of 10 samples are not finite"):
        fit(tmp_path, grid, module=Diverged())
    assert (grid.drawn[0][0][2] == 0).all()


def test_captions_of_every_kind(tmp_path: Path) -> None:
    given = rows(5)
    for row, text in zip(given, ("$\\no{$", "猫" * 50, "", "\0\x1b", "word " * 50), strict=True):
        row["text"] = text
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Spy(), given=given)
    assert sum("not in matplotlib's font" in str(one.message) for one in caught) == 1
    assert (tmp_path / "samples.png").exists()


def test_our_module_and_data(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    diffusers = pytest.importorskip("diffusers")
    from heliostat import Diffusion, DiffusionDataModule

    blocks = {"block_out_channels": (4, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 8}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    denoiser = diffusers.UNet2DModel(in_channels=1, out_channels=1, num_class_embeds=11, **blocks, **kinds)
    data = DiffusionDataModule("digits", size=8, channels=1)
    grid = Spy(num_samples=4, num_steps=2, guidance_scale=2.0)
    trainer = quiet_trainer(tmp_path, max_steps=1, val_check_interval=1, limit_val_batches=1, callbacks=[grid])
    trainer.fit(Diffusion(denoiser), data)
    ((samples, captions),) = grid.drawn
    assert samples.shape == (4, 1, 8, 8)
    assert captions == next(iter(data.val_dataloader()))["text"][:4]


def test_two_processes(tmp_path: Path, two_processes: ProcessPool) -> None:
    first, second = two_processes.run(_drawn, tmp_path)
    assert first == [f"picture {i}" for i in range(0, 10, 2)]
    assert second is None
    assert (tmp_path / "samples.png").exists()


def _drawn(rank: int, directory: Path) -> list[str] | None:
    grid = Spy()
    fit(directory, grid, devices=2, strategy="ddp", max_epochs=2)
    return grid.drawn[-1][1] if grid.drawn else None


def test_fast_dev_run_and_sanity_check_leave_nothing(tmp_path: Path) -> None:
    fit(tmp_path, SampleGrid(), fast_dev_run=True)
    module = fit(tmp_path, SampleGrid(), num_sanity_val_steps=2, check_val_every_n_epoch=2)
    assert module.calls == []
    assert not (tmp_path / "samples.png").exists()


class TestRefusals:
    def test_module_without_sample(self, tmp_path: Path) -> None:
        module: Any = Generative()
        module.sample = None
        with pytest.raises(
            MisconfigurationException, match=r"needs a module with sample\(batch.*but Generative has none"
        ):
            fit(tmp_path, SampleGrid(), module=module)

    def test_no_validation(self, tmp_path: Path) -> None:
        with pytest.raises(MisconfigurationException, match="SampleGrid draws on .* this training has none"):
            fit(tmp_path, SampleGrid(), limit_val_batches=0)

    def test_batches_that_are_no_dicts(self, tmp_path: Path) -> None:
        tuples: Any = [(torch.zeros(3, 4, 4), 1)] * 4
        with pytest.raises(MisconfigurationException, match="a batch is a list"):
            fit(tmp_path, SampleGrid(), given=tuples)

    @pytest.mark.parametrize("name", ["every_n_epochs", "num_samples", "num_steps"])
    def test_settings(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            SampleGrid(**{name: 0})

    def test_missing_matplotlib_is_said_before_training(self, tmp_path: Path, monkeypatch) -> None:
        def absent(name: str) -> None:
            raise ModuleNotFoundError(name=name)

        monkeypatch.setattr(heliostat._extras.importlib, "import_module", absent)
        with pytest.raises(ModuleNotFoundError, match=r"SampleGrid needs .* pip install 'heliostat\[data\]'"):
            fit(tmp_path, SampleGrid())
