import io
import pickle
import random
import zipfile

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from heliostat import LabelledImageDataModule
from heliostat.components import CORRUPTIONS, corrupt
from heliostat.datamodules.image_readers import open_pictures, read_picture, resize_and_crop
from tests.harness import quiet_trainer

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

NINE = "abcdefghi"


def png(value, size=(12, 10), mode="L"):
    """An encoded picture of one grey level."""
    stream = io.BytesIO()
    Image.new(mode, size, value).save(stream, "PNG")
    return stream.getvalue()


def tree(classes=6, per_class=8):
    """The files of an image folder: class k of alphabet a; grey level = 10 k + number."""
    return {f"{'AB'[k % 2]}/character{k}/{i}.png": png(10 * k + i) for k in range(classes) for i in range(per_class)}


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


def archive(path, files, prefix=""):
    with zipfile.ZipFile(path, "w") as out:
        for name, content in files.items():
            out.writestr(prefix + name, content)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "pictures", tree())


def ready(module, *stages):
    for stage in stages or ("fit",):
        module.setup(stage)
    return module


def small(images="glyphs", *args, **settings):
    """A module over nine letters, or over files: raw pixels, small batches."""
    if images == "glyphs":
        settings.setdefault("classes", NINE)
    return LabelledImageDataModule(
        images, *args, **{"size": 8, "mean": 0.0, "std": 1.0, "batch_size": 24, "eval_batch_size": 50} | settings
    )


def everything(loader):
    """All pictures of a loader, joined."""
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in ("pixel_values", "labels", "index")}


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a if key != "stream"
    )


class TestBatches:
    def test_training(self):
        data = ready(small(batch_size=40))
        loader = data.train_dataloader()
        batches = list(loader)
        train = len(data._sets["train"])
        assert len(batches) == len(loader) == train // 40
        for batch in batches:
            assert batch.keys() == {"pixel_values", "labels", "index"}
            assert batch["pixel_values"].shape == (40, 1, 8, 8)
            assert batch["pixel_values"].dtype == torch.float32
            assert batch["labels"].dtype == batch["index"].dtype == torch.int64
            assert 0 <= batch["pixel_values"].min() < batch["pixel_values"].max() <= 1
        index = torch.cat([batch["index"] for batch in batches])
        assert len(index.unique()) == len(index)
        assert index.tolist() != sorted(index.tolist())

    def test_normalisation_and_channels(self):
        plain = next(iter(ready(small(), "predict").predict_dataloader()))["pixel_values"]
        data = ready(small(mean=[0.1, 0.2, 0.3], std=[1, 2, 4], channels=3), "predict")
        batch = next(iter(data.predict_dataloader()))["pixel_values"]
        assert batch.shape == (50, 3, 8, 8)
        for channel in range(3):
            expected = (plain[:, 0] - (channel + 1) / 10) / 2**channel
            torch.testing.assert_close(batch[:, channel], expected)
        data = ready(small(mean=0.5, std=0.25), "predict")
        torch.testing.assert_close(next(iter(data.predict_dataloader()))["pixel_values"], (plain - 0.5) / 0.25)

    def test_validation_in_order_and_predict_all(self):
        data = ready(small(), "fit", "predict")
        validation = everything(data.val_dataloader())
        assert validation["index"].tolist() == list(range(len(validation["index"])))
        whole = everything(data.predict_dataloader())
        assert whole["index"].tolist() == list(range(len(whole["index"])))
        assert sorted(set(whole["labels"].tolist())) == list(range(9))

    @pytest.mark.parametrize("images", ["glyphs", "files", "zip", "lazy zip"])
    def test_workers_change_nothing(self, tmp_path, images):
        settings = {"augment": "light", "samples_per_class": 4, "batch_size": 8}
        if images == "files":
            images = write(tmp_path / "pictures", tree())
        elif images != "glyphs":
            settings["in_memory"] = None if images == "zip" else False
            images = archive(tmp_path / "a.zip", tree())
        alone = ready(small(images, **settings))
        list(alone.train_dataloader())  # handles are open when the workers fork
        several = ready(small(images, num_workers=2, **settings))
        assert same(list(alone.train_dataloader()), list(several.train_dataloader()))
        assert same(list(alone.val_dataloader()), list(several.val_dataloader()))

    @pytest.mark.parametrize("samples_per_class", [None, 4])
    def test_two_processes_share_the_batches_of_one(self, samples_per_class):
        def batches(rank=0, world_size=1):
            data = ready(small(augment="light", samples_per_class=samples_per_class, batch_size=16))
            data.trainer = type("Trainer", (), {"world_size": world_size, "global_rank": rank})()
            return list(data.train_dataloader())

        joined = [
            {key: torch.cat([first[key], second[key]]) for key in first}
            for first, second in zip(batches(0, 2), batches(1, 2), strict=True)
        ]
        assert same(joined, batches())

    def test_seed(self):
        def first(**settings):
            return next(iter(ready(small(augment="light", **settings)).train_dataloader()))

        assert same([first()], [first()])
        assert not same([first()], [first(seed=1)])
        parts = [ready(small(seed=seed))._sets["train"].rows.tolist() for seed in range(2)]
        assert parts[0] == parts[1]

    def test_pickled(self, tmp_path):
        data = ready(small(archive(tmp_path / "a.zip", tree()), in_memory=False, batch_size=8))
        expected = list(data.train_dataloader())
        copied = pickle.loads(pickle.dumps(data))  # noqa: S301
        assert same(list(copied.train_dataloader()), expected)

    def test_global_random_state_is_left_alone(self):
        def transform(picture):
            return picture + torch.randint(2, picture.shape, dtype=torch.uint8)

        state = torch.get_rng_state()
        data = ready(small(augment=transform, corruptions=["fog"]), "fit", "test")
        everything(data.train_dataloader())
        everything(data.test_dataloader()[0])
        assert torch.equal(torch.get_rng_state(), state)


class TestSplit:
    @pytest.mark.parametrize("kind", ["glyphs", "files"])
    def test_classes(self, folder, kind):
        data = ready(small(*([folder] if kind == "files" else []), batch_size=8, samples_per_class=2), "fit", "test")
        labels = [
            set(everything(loader)["labels"].tolist())
            for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        ]
        assert labels[0] == set(range(data.num_classes))
        assert not labels[0] & labels[1]
        assert not labels[1] & labels[2]
        assert set.union(*labels) == set(range(len(data.class_names)))
        trained = data.class_names[: data.num_classes]
        assert trained == sorted(trained)
        assert data.class_names[data.num_classes :] == sorted(set(data.class_names) - set(trained))

    def test_labels_are_the_names(self, folder):
        data = ready(small(folder, size=4), "predict")
        batch = everything(data.predict_dataloader())
        for pixels, label in zip((batch["pixel_values"] * 255).round(), batch["labels"], strict=True):
            k = int(pixels[0, 0, 0]) // 10
            assert data.class_names[label] == f"{'AB'[k % 2]}/character{k}"

    def test_images(self):
        data = ready(small(split="images", val_fraction=0.25, test_fraction=0.1, batch_size=8), "fit", "test")
        assert data.num_classes == len(data.class_names) == 9
        assert data.class_names == list(NINE)
        sizes = {name: len(data._sets[name]) for name in ("train", "val", "test")}
        total = sum(sizes.values())
        assert sizes["val"] == round(0.25 * total)
        assert sizes["test"] == round(0.1 * total)
        for name, share in (("val", 0.25), ("test", 0.1)):
            for label in range(9):
                count = int((data._sets[name].labels == label).sum())
                assert abs(count - share * total / 9) <= 1
        pictures = [set(data._listed.parts[name].rows) for name in ("train", "val", "test")]
        assert len(set.union(*pictures)) == total  # none in two parts

    def test_images_of_small_classes(self, tmp_path):
        """Classes too small for a share of their own give one now and then; one picture stays in training."""
        files = {f"{k}/{i}.png": png(k) for k in range(10) for i in range(1 if k == 0 else 3)}
        data = small(write(tmp_path / "a", files), split="images", val_fraction=0.2, test_fraction=0)
        parts = data._listed.parts
        assert len(parts["val"].rows) == round(0.2 * 28)
        assert parts["train"].names() == {str(k) for k in range(10)}
        assert "test" not in parts

    @pytest.mark.parametrize("split", ["classes", "images"])
    def test_depends_on_split_seed_alone(self, folder, split):
        def parts(**settings):
            listed = small(folder, split=split, **settings)._listed
            return [listed.parts[name].rows for name in ("train", "val", "test")]

        assert parts() == parts(seed=1, batch_size=3)
        assert parts() != parts(split_seed=1)

    def test_no_validation(self):
        data = ready(small(val_fraction=0, test_fraction=0), "fit", "test")
        assert data.val_dataloader() == data.test_dataloader() == []
        assert data.num_classes == 9

    def test_own_sources(self, tmp_path, folder):
        files = {f"A/character{k}/{i}.png": png(k) for k in (0, 2) for i in range(3)}
        val = write(tmp_path / "val", files)
        data = ready(small(folder, val, split="images", test_fraction=0.25), "fit", "test")
        assert data.num_classes == 6
        batch = everything(data.val_dataloader())
        assert [data.class_names[label] for label in batch["labels"]] == [f"A/character{k}" for k in (0, 0, 0, 2, 2, 2)]
        assert len(data._sets["train"]) == 36

        unseen = write(tmp_path / "unseen", {"C/new/1.png": png(1), "C/new/2.png": png(1)})
        with pytest.raises(ValueError, match=r"val_images has 1 classes that images has not: C/new.* split='classes'"):
            ready(small(folder, unseen, split="images"))
        data = ready(small(folder, unseen, test_fraction=0), "fit")
        assert data.class_names[6:] == ["C/new"]
        assert everything(data.val_dataloader())["labels"].tolist() == [6, 6]
        with pytest.warns(UserWarning, match="val_images shares 2 of its 2 classes with images"):
            ready(small(folder, val, test_fraction=0))

    def test_chosen_classes(self, folder):
        data = small(folder, classes=["A/character0", "B/character1", "A/character4"])
        assert sorted(data.class_names) == ["A/character0", "A/character4", "B/character1"]
        with pytest.raises(ValueError, match=r"no source has the class 'A/character9'; near names: A/character"):
            _ = small(folder, classes=["A/character9", "A/character0"]).class_names

    def test_errors(self, folder):
        for settings, message in [
            ({"split": "rows"}, "split must be one of 'classes', 'images', got 'rows'"),
            ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave something for training, got 0.5 and 0.5"),
            ({"val_fraction": -0.1}, "val_fraction and test_fraction must be >= 0"),
            ({"channels": 2}, "channels 1 or 3, got size=8 and channels=2"),
            ({"mean": [0.1, 0.2]}, "mean must be one number or one for each of 1 channels"),
            ({"augment": "heavy"}, "augment must be one of 'none', 'light', 'crop_flip', or a callable, got 'heavy'"),
            ({"severity": 0}, "severity must be 1, 2, 3, 4 or 5, got 0"),
            ({"corruptions": ["fog", "rain"]}, "corruptions must be 'all', or different names of clean, .*'rain'"),
            ({"corruptions": []}, "corruptions must be"),
            ({"corruptions": ["fog", "fog"]}, "different names"),
        ]:
            with pytest.raises(ValueError, match=message):
                small(**settings)
        with pytest.raises(ValueError, match="val_images='glyphs' are the training pictures"):
            ready(small(val_images="glyphs"))
        with pytest.raises(ValueError, match="test_images=.*pictures' are the training pictures; None takes a part"):
            ready(small(folder, test_images=folder))
        with pytest.raises(ValueError, match="of 1 classes; .* of its classes leave none for train"):
            ready(small(classes="a"))
        with pytest.raises(ValueError, match="images leave none for val"):
            ready(small(folder, split="images", val_fraction=0.01))
        with pytest.raises(ValueError, match="makes batches of 6 classes, and there are only 5"):
            ready(small(samples_per_class=4)).train_dataloader()
        with pytest.raises(ValueError, match="must be a multiple of samples_per_class=5"):
            ready(small(samples_per_class=5)).train_dataloader()


class TestSources:
    def test_folder_zip_and_list_agree(self, tmp_path, folder):
        files = tree()
        plain = archive(tmp_path / "plain.zip", files)
        wrapped = archive(tmp_path / "wrapped.zip", files, prefix="top/images/")
        halves = [
            archive(tmp_path / f"{a}.zip", {n: c for n, c in files.items() if n.startswith(a)} | {"B/x/": b""}, "top/")
            for a in "AB"
        ]
        expected = everything(ready(small(folder), "predict").predict_dataloader())
        assert len(expected["labels"]) == 48
        for source in (plain, wrapped):
            data = ready(small(source), "predict")
            assert sorted(data.class_names) == sorted(small(folder).class_names)
            assert same([everything(data.predict_dataloader())], [expected])
        with pytest.warns(UserWarning, match="1 folders of .*.zip' hold no picture and make no class: "):
            data = ready(small(halves, size=4), "predict")
        # an archive of one alphabet: what all its classes share is left out
        assert sorted(data.class_names) == sorted(f"character{k}" for k in range(6))

    def test_in_memory_equals_lazy(self, folder):
        memory, lazy = (ready(small(folder, in_memory=value, augment="light", batch_size=8)) for value in (True, False))
        assert isinstance(memory._sets["train"].pictures, torch.Tensor)
        assert not isinstance(lazy._sets["train"].pictures, torch.Tensor)
        assert same(list(memory.train_dataloader()), list(lazy.train_dataloader()))

    def test_hidden_and_other_files_are_ignored(self, tmp_path, recwarn):
        files = tree(4, 5)
        extra = {
            "A/.DS_Store": b"x",
            "A/character0/._0.png": b"x",
            "__MACOSX/A/character0/0.png": b"x",
            ".git/b/c.png": b"x",
            "readme.txt": b"x",
            "A/character0/notes.md": b"x",
        }
        for source in (write(tmp_path / "a", files | extra), archive(tmp_path / "a.zip", files | extra)):
            data = small(source)
            assert len(data._listed.parts["all"].rows) == 20
            assert len(data.class_names) == 4
        assert not [str(w.message) for w in recwarn if issubclass(w.category, UserWarning)]

    def test_empty_folders_and_loose_pictures_are_counted(self, tmp_path):
        root = tmp_path / "a"
        write(root, tree(4, 5) | {"loose.png": png(1), "C/empty/readme.txt": b"x"})
        (root / "D").mkdir()
        with pytest.warns(UserWarning, match="images: ") as warned:
            assert len(small(str(root)).class_names) == 4
        messages = [str(w.message) for w in warned]
        assert any("passed over 1 of 21 pictures" in m and "in no class folder" in m for m in messages)
        assert any("2 folders of" in m and "make no class: C/empty, D" in m for m in messages)

    def test_nothing_there(self, tmp_path):
        root = tmp_path / "a"
        write(root, {"A/notes.txt": b"x"})
        with pytest.raises(ValueError, match=r"images: there is no picture in '.*', only .txt; the names of"):
            ready(small(str(root)))
        with pytest.raises(ValueError, match="lie in no folder, and the folder is the class"):
            ready(small(write(tmp_path / "b", {"1.png": png(1)})))
        with pytest.raises(FileNotFoundError, match=r"images: there is no folder or archive './missing.zip'"):
            ready(small("./missing.zip"))
        with pytest.raises(FileNotFoundError, match=r"test_images: there is no folder or archive"):
            ready(small(write(tmp_path / "c", tree()), test_images=[str(tmp_path / "no")]))
        with pytest.raises(ValueError, match="is neither a folder nor a zip archive"):
            ready(small(str(root / "A/notes.txt")))
        with pytest.raises(ValueError, match="images is an empty list"):
            ready(small([]))

    def test_archive_whose_names_lead_out(self, tmp_path):
        for name in ("../../escape/1.png", "/etc/a/1.png", "a/../../b/1.png"):
            source = archive(tmp_path / "evil.zip", {"a/1.png": png(1), name: png(1)})
            with pytest.raises(ValueError, match="which leads out of it"):
                ready(small(source))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.zip"]

    def broken(self, tmp_path):
        files = tree(4, 6)
        files["A/character0/0.png"] = b"no picture"
        files["B/character1/3.png"] = files["B/character1/3.png"][:-30]
        return write(tmp_path / "a", files)

    def test_unreadable_pictures_are_counted(self, tmp_path):
        with pytest.warns(UserWarning, match=r"all: left out 2 of 24 .*A/character0/0.png: .*cannot be read"):
            data = ready(small(self.broken(tmp_path)), "predict")
        batch = everything(data.predict_dataloader())
        assert batch["index"].tolist() == list(range(22))
        assert batch["labels"].bincount().sort().values.tolist() == [5, 5, 6, 6]

    def test_unreadable_picture_met_in_a_loader(self, tmp_path):
        data = ready(small(self.broken(tmp_path), in_memory=False), "predict")
        with pytest.raises(ValueError, match=r"A/character0/0.png: the picture cannot be read \("):
            everything(data.predict_dataloader())

    def test_nothing_readable(self, tmp_path):
        files = {f"{k}/{i}.png": b"x" for k in range(3) for i in range(2)}
        with pytest.raises(ValueError, match="none of 6 pictures can be read; the first: .*0/0.png"):
            ready(small(write(tmp_path / "a", files)), "predict")

    def test_classes_with_one_picture(self, tmp_path):
        files = {f"{k}/{i}.png": png(k) for k in range(10) for i in range(1 if k < 8 else 4)}
        data = small(write(tmp_path / "a", files), samples_per_class=2, batch_size=4)
        with pytest.warns(UserWarning, match=r"val: \d of 2 classes have a single picture"):
            ready(data)
        with pytest.warns(UserWarning, match=r"\d of 6 classes have fewer than samples_per_class=2 rows"):
            data.train_dataloader()

    def test_geometry(self, tmp_path):
        """The shorter side is scaled and the middle cut out."""
        pixels = np.zeros((20, 40), np.uint8)
        pixels[:, 8:32] = 200
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        pictures = open_pictures(
            write(tmp_path / "a", {"a/1.png": stream.getvalue(), "a/2.png": png((10, 20, 30), mode="RGB")}),
            "images",
            split="",
            image_column="",
            label_column="",
        )
        picture = read_picture(pictures, 0, 1)
        assert torch.equal(picture, torch.from_numpy(pixels)[None])
        assert torch.equal(resize_and_crop(picture, 10), torch.full((1, 10, 10), 200, dtype=torch.uint8))
        assert resize_and_crop(picture, 64).shape == (1, 64, 64)
        assert read_picture(pictures, 1, 3)[:, 0, 0].tolist() == [10, 20, 30]
        assert read_picture(pictures, 1, 1).shape == (1, 10, 12)

    def test_sixteen_bits(self, tmp_path):
        stream = io.BytesIO()
        Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)).save(stream, "PNG")
        source = write(tmp_path / "a", {"a/1.png": stream.getvalue()})
        pictures = open_pictures(source, "images", split="", image_column="", label_column="")
        assert read_picture(pictures, 0, 3).unique().tolist() == [100]

    @pytest.mark.parametrize("form", ["saved", "splits", "parquet"])
    def test_hugging_face(self, tmp_path, form):
        datasets = pytest.importorskip("datasets")
        names = ["cat", "ape", "bee"]
        features = datasets.Features({"img": datasets.Image(), "y": datasets.ClassLabel(names=names)})
        rows = {
            "img": [{"bytes": png(60 * (i % 3) + i), "path": None} for i in range(30)],
            "y": [i % 3 for i in range(30)],
        }
        data = datasets.Dataset.from_dict(rows, features)
        place = tmp_path / "set"
        if form == "saved":
            data.save_to_disk(place)
        elif form == "splits":
            datasets.DatasetDict({"train": data, "dev": data.select(range(3))}).save_to_disk(place)
        else:
            place.mkdir()
            data.to_parquet(place / "train.parquet")
        settings = {"image_column": "img", "label_column": "y", "split": "images", "batch_size": 4, "num_workers": 1}
        if form == "splits":
            settings |= {"val_images": str(place), "splits": ("train", "dev", "dev")}
        elif form == "saved":  # without splits: validation would be on the training pictures
            with pytest.raises(ValueError, match="val_images='.*' are the training pictures; None takes a part"):
                ready(small(str(place), str(place), **settings))
        for in_memory in (True, False):
            module = ready(small(str(place), in_memory=in_memory, **settings), "fit", "predict")
            assert module.class_names == ["ape", "bee", "cat"]
            batch = everything(module.predict_dataloader())
            assert batch["labels"].tolist() == [(2, 0, 1)[i % 3] for i in range(30)]
            levels = (batch["pixel_values"][:, 0, 0, 0] * 255).round().int().tolist()
            assert levels == [60 * (i % 3) + i for i in range(30)]
            if form == "splits":
                assert everything(module.val_dataloader())["labels"].tolist() == [2, 0, 1]
        with pytest.raises(ValueError, match=r"has no column 'image'; it has \['img', 'y'\].* in image_column"):
            ready(small(str(place)))
        with pytest.raises(ValueError, match="the column 'y' holds ClassLabel.*, not images"):
            ready(small(str(place), image_column="y", label_column="y"))


class TestAugmentation:
    def test_light_moves_a_little(self):
        plain, light = (
            next(iter(ready(small(size=20, augment=augment)).train_dataloader())) for augment in ("none", "light")
        )
        assert torch.equal(plain["index"], light["index"])
        change = (plain["pixel_values"] - light["pixel_values"]).abs().mean((1, 2, 3))
        unrelated = (plain["pixel_values"] - light["pixel_values"].roll(1, 0)).abs().mean((1, 2, 3))
        assert (change > 0).all()
        assert change.mean() < 0.7 * unrelated.mean()

    def test_validation_is_left_alone(self):
        plain, light = (ready(small(augment=a)).val_dataloader() for a in ("none", "light"))
        assert same(list(plain), list(light))

    @pytest.mark.parametrize("augment", ["light", "crop_flip", "callable"])
    def test_epochs_and_repeats_differ(self, folder, augment):
        if augment == "crop_flip":
            pytest.importorskip("torchvision")
        if augment == "callable":
            augment = noise
        data = ready(small(augment=augment, size=16, samples_per_class=8))
        loader = data.train_dataloader()
        first = list(loader)
        assert same(list(loader), first)
        loader.sampler.set_epoch(1)
        second = list(loader)
        by_picture = {}
        for batch in first + second:
            for index, pixels in zip(batch["index"].tolist(), batch["pixel_values"], strict=True):
                by_picture.setdefault(index, []).append(pixels)
        repeated = [pictures for pictures in by_picture.values() if len(pictures) > 1]
        assert len(repeated) > 20
        assert sum(torch.equal(pictures[0], pictures[1]) for pictures in repeated) < 0.1 * len(repeated)

    def test_callable_gets_the_whole_picture(self, folder):
        data = ready(small(folder, augment=whole_picture, batch_size=8, size=6))
        batch = next(iter(data.train_dataloader()))
        assert batch["pixel_values"].shape == (8, 1, 6, 6)
        torch.testing.assert_close(batch["pixel_values"], torch.ones(8, 1, 6, 6))

    def test_crop_flip_is_torchvisions(self, tmp_path):
        pytest.importorskip("torchvision")
        left_to_right = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1))
        stream = io.BytesIO()
        Image.fromarray(left_to_right).save(stream, "PNG")
        files = {f"{k}/{i}.png": stream.getvalue() for k in range(4) for i in range(16)}
        data = ready(small(write(tmp_path / "a", files), augment="crop_flip", split="images", channels=3))
        pixels = next(iter(data.train_dataloader()))["pixel_values"]
        assert pixels.shape == (24, 3, 8, 8)
        rising = pixels[:, 0, :, -1].mean(1) > pixels[:, 0, :, 0].mean(1)
        assert 3 < rising.sum() < 21


def noise(picture):
    """A transform that draws from torch's generator."""
    return (picture / 255 + 0.1 * torch.rand(picture.shape)).clamp(0, 1)


def whole_picture(picture):
    assert picture.shape == (1, 10, 12)
    assert picture.dtype == torch.uint8
    return torch.ones(1, 9, 7)


class TestStreams:
    def test_clean(self):
        data = ready(small(), "test")
        assert data.test_names == ["clean"]
        loader = data.test_dataloader()
        assert {batch["stream"] for batch in loader} == {"clean"}
        batch = everything(loader)
        assert sorted(batch["index"].tolist()) == list(range(len(batch["index"])))
        assert batch["index"].tolist() != sorted(batch["index"].tolist())
        half = batch["labels"][: len(batch["labels"]) // 2].bincount().float()  # the classes come mixed
        assert half[half > 0].min() > 0.3 * half.max()

    def test_corrupted(self):
        names = ["fog", "clean", "gaussian_noise"]
        settings = {"mean": 0.5, "std": 0.5, "split": "images"}
        data = ready(small(corruptions=names, severity=2, **settings), "test")
        assert data.test_names == names
        streams = [everything(loader) for loader in data.test_dataloader()]
        assert [next(iter(loader))["stream"] for loader in data.test_dataloader()] == names
        fog, clean, noisy = streams
        assert same([clean], [everything(ready(small(**settings), "test").test_dataloader())])
        for stream in (fog, noisy):
            assert torch.equal(stream["index"], clean["index"])
            assert torch.equal(stream["labels"], clean["labels"])
        original = (clean["pixel_values"] + 1) / 2
        expected = corrupt(original, "fog", 2, seed=clean["index"].tolist())
        torch.testing.assert_close((fog["pixel_values"] + 1) / 2, expected, atol=1e-5, rtol=0)

    def test_depends_on_neither_batch_size_nor_seed_nor_workers(self):
        def stream(**settings):
            data = ready(small(corruptions=["snow"], **settings), "test")
            return everything(data.test_dataloader()[0])

        expected = stream()
        for settings in ({"eval_batch_size": 7}, {"seed": 3}, {"num_workers": 2}):
            found = stream(**settings)
            assert torch.equal(found["index"], expected["index"])
            torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
        assert not torch.equal(stream(split_seed=4, split="images")["index"], stream(split="images")["index"])

    def test_all(self):
        data = ready(small(corruptions="all"), "test")
        assert data.test_names == list(CORRUPTIONS)
        assert len(data.test_dataloader()) == 15
        assert small(corruptions="fog").test_names == ["fog"]


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 1)
        self.seen, self.streams, self.tested = [], [], []

    def training_step(self, batch, batch_idx):
        self.seen.append({key: value.clone() for key, value in batch.items()})
        return self.layer(batch["pixel_values"].flatten(1)).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.streams.append((dataloader_idx, batch["stream"]))
        rows = zip(batch["index"].tolist(), batch["pixel_values"].sum((1, 2, 3)).tolist(), strict=True)
        self.tested += [(batch["stream"], index, round(total, 2)) for index, total in rows]

    def predict_step(self, batch, batch_idx):
        return batch["labels"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _evaluated_on_rank(rank, directory, devices, strategy):
    module = Recorder()
    trainer = quiet_trainer(directory, max_steps=4, devices=devices, strategy=strategy)
    data = small(augment="light", batch_size=16, corruptions=["snow", "clean"])
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    return module.seen, module.tested


class TestTrainer:
    def data(self, **settings):
        # nine letters, five of them for training: 13 batches an epoch
        return small(augment="light", samples_per_class=8, batch_size=32, corruptions=["fog", "clean"], **settings)

    def test_fit_test_predict(self, tmp_path):
        trainer, module = quiet_trainer(tmp_path, max_steps=3), Recorder()
        trainer.fit(module, self.data())
        trainer.test(module, self.data(), verbose=False)
        assert set(module.streams) == {(0, "fog"), (1, "clean")}
        labels = torch.cat(trainer.predict(module, self.data()))
        assert set(labels.tolist()) == set(range(9))

    def test_two_processes(self, tmp_path, two_processes):
        seen, tested = _evaluated_on_rank(0, tmp_path, 1, "auto")
        ranks = two_processes.run(_evaluated_on_rank, tmp_path, 2, "ddp")
        (first, first_tested), (second, second_tested) = ranks
        joined = [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(first, second, strict=True)]
        assert same(joined, seen)
        assert set(first_tested + second_tested) == set(tested)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_killed_and_resumed_sees_the_same_pictures(self, tmp_path, num_workers):
        def fit(steps, ckpt_path=None, **settings):
            module = Recorder()
            trainer = quiet_trainer(tmp_path, max_steps=steps, max_epochs=-1, limit_val_batches=0, **settings)
            trainer.fit(module, self.data(num_workers=num_workers), ckpt_path=ckpt_path)
            return module.seen

        per_epoch = len(ready(self.data()).train_dataloader())
        whole = fit(2 * per_epoch)
        assert len(whole) == 2 * per_epoch
        for stop in (2, per_epoch + 1):
            keeper = ModelCheckpoint(tmp_path / f"{stop}", "last", every_n_train_steps=stop)
            fit(stop, callbacks=[keeper], enable_checkpointing=True)
            torch.manual_seed(random.getrandbits(30))
            rest = fit(2 * per_epoch, tmp_path / f"{stop}" / "last.ckpt")
            assert same(rest, whole[stop:])
