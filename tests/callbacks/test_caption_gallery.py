from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

import heliostat._extras
from heliostat import CaptionGallery
from heliostat.components import cross_modal_recall
from tests.harness import ProcessPool, quiet_trainer

Rows = list[dict[str, Any]]


class TwoTowers(LightningModule):
    """Nothing of ours: any module that encodes pictures and texts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(15, 15))
        nn.init.eye_(self.image[2].weight)
        self.text = nn.Linear(15, 15)
        nn.init.eye_(self.text.weight)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        return self.image(pixel_values.flatten(1)[:, 1:16])  # without the number

    def encode_text(self, text_embeddings: Tensor) -> Tensor:
        return self.text(text_embeddings)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.encode_image(batch["pixel_values"]).square().mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def pictures_and_texts(count: int = 41, groups: int = 20) -> tuple[Rows, Rows]:
    """The first pixel of a picture is its number, by which it is recognised; two captions a group."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(groups, 16, generator=generator)
    group = torch.arange(count) % groups
    values = centres[group] + torch.randn(count, 16, generator=generator)
    values[:, 0] = torch.arange(count).float()
    pictures = [
        {"pixel_values": one.view(1, 4, 4), "group": g, "labels": torch.tensor(-1), "index": torch.tensor(i)}
        for i, (one, g) in enumerate(zip(values, group, strict=True))
    ]
    embeddings = centres.repeat(2, 1) + 0.5 * torch.randn(2 * groups, 16, generator=generator)
    texts = [
        {"text": f"caption {i}", "text_embeddings": one[1:], "group": torch.tensor(i % groups), "index": i}
        for i, one in enumerate(embeddings)
    ]
    return pictures, texts


PROMPTS = [{"text": "a thing", "text_embeddings": torch.ones(15), "labels": 0, "index": i} for i in range(3)]


def loaders(*sets: Rows) -> list[DataLoader]:
    return [DataLoader(rows, batch_size=6) for rows in sets]


class Spy(CaptionGallery):
    """Keeps what is drawn."""

    drawn: tuple[Any, ...] | None = None

    def _figure(self, *args: Any) -> Any:
        self.drawn = args
        return super()._figure(*args)


def validate(directory: Path, gallery: CaptionGallery, *sets: Rows, module: Any = None, **settings: Any) -> TwoTowers:
    module = TwoTowers() if module is None else module
    trainer = quiet_trainer(directory, callbacks=[gallery], **settings)
    trainer.validate(module, loaders(*(sets or pictures_and_texts())), verbose=False)
    return module


def column(rows: Rows, key: str) -> Tensor:
    return torch.stack([row[key] for row in rows])


def test_shows_the_nearest_pictures_under_the_final_weights(tmp_path: Path) -> None:
    pictures, texts = pictures_and_texts()
    gallery, module = Spy(num_queries=6, num_neighbors=3), TwoTowers()
    shuffled = [DataLoader(rows, batch_size=6, shuffle=True) for rows in (PROMPTS, texts, pictures)]
    quiet_trainer(tmp_path, max_steps=2, val_check_interval=1, callbacks=[gallery]).fit(
        module, *loaders(pictures), shuffled
    )
    assert (tmp_path / "captions.png").read_bytes().startswith(b"\x89PNG")
    assert gallery.drawn is not None
    lookups, (text_groups, picture_groups), captions, shown, title = gallery.drawn
    assert torch.equal(text_groups, column(texts, "group"))  # in the order of the index, though the loader shuffles
    assert torch.equal(picture_groups, column(pictures, "group"))
    assert module.training
    with torch.no_grad():
        of_pictures = module.eval().encode_image(column(pictures, "pixel_values"))
        of_texts = module.encode_text(column(texts, "text_embeddings"))
    similarity = nn.functional.cosine_similarity(of_texts[:, None], of_pictures[None], dim=2)
    for one in lookups:
        expected = similarity[one.query].topk(3)
        assert one.neighbors == expected.indices.tolist()
        assert one.cosines == pytest.approx(expected.values.tolist(), abs=1e-5)
        assert captions[one.query] == f"caption {one.query}"
        for row in one.neighbors:
            assert shown[row][0, 0, 0] == row
            assert shown[row].untyped_storage().nbytes() == 64  # a picture, not a view that holds its batch
    recall = float(cross_modal_recall(of_texts, of_pictures, text_groups, picture_groups, (1,))[1])
    assert 0 < recall < 1
    assert f"text-to-image Recall@1 of all 40 validation captions: {recall:.3f}" in title
    first_right = picture_groups[similarity.argmax(1)] == text_groups
    assert "first 3 queries: drawn from all of them" in title
    assert f"last 3: from the {int((~first_right).sum())} whose first neighbour is wrong" in title
    assert [one.kind for one in lookups] == ["random"] * 3 + ["1st wrong"] * 3
    assert not first_right[[one.query for one in lookups[3:]]].any()
    assert len({one.query for one in lookups}) == 6


def test_captions_beside_pictures_whose_sign_and_colour_say_if_they_are_right(tmp_path: Path) -> None:
    gallery = Spy(num_queries=4, num_neighbors=5)
    validate(tmp_path, gallery)
    assert gallery.drawn is not None
    lookups, (text_groups, picture_groups), _, _, title = gallery.drawn
    (axes,) = CaptionGallery()._figure(*gallery.drawn).axes
    assert axes.get_title() == title
    texts = [text.get_text() for text in axes.texts]
    assert [text for text in texts if text.startswith("caption")] == [f"caption {one.query}" for one in lookups]
    right = [bool(picture_groups[n] == text_groups[one.query]) for one in lookups for n in one.neighbors]
    assert [text[0] == "✓" for text in texts if text[0] in "✓✗"] == right
    assert 0 < sum(right) < len(right)
    frames = [patch.get_edgecolor() for patch in axes.patches]
    assert len({(mark, frame) for mark, frame in zip(right, frames, strict=True)}) == 2
    assert len(axes.images) == 4 * 5


def test_seed_decides_the_captions(tmp_path: Path) -> None:
    queries = []
    for seed in (0, 0, 1):
        gallery = Spy(4, 1, seed=seed)
        validate(tmp_path, gallery)
        assert gallery.drawn is not None
        queries.append([one.query for one in gallery.drawn[0]])
    assert queries[0] == queries[1] != queries[2]


def test_test_set_with_limit(tmp_path: Path) -> None:
    gallery = Spy(3, filename="b.png")
    trainer = quiet_trainer(tmp_path, callbacks=[gallery], limit_test_batches=2)
    trainer.test(TwoTowers(), loaders(*pictures_and_texts()), verbose=False)
    assert gallery.drawn is not None
    assert "of all 12 test captions" in gallery.drawn[-1]
    assert len(gallery.drawn[1][1]) == 12
    assert (tmp_path / "b.png").exists()


def test_captions_without_picture_are_not_drawn_and_do_not_count(tmp_path: Path) -> None:
    pictures, texts = pictures_and_texts()
    gallery = Spy(100, 100)
    validate(tmp_path, gallery, [row for row in pictures if row["group"] < 7], texts)
    assert gallery.drawn is not None
    assert "of all 14 validation captions" in gallery.drawn[-1]
    assert sorted(one.query for one in gallery.drawn[0]) == [*range(7), *range(20, 27)]
    assert all(len(one.neighbors) == len(gallery.drawn[1][1]) for one in gallery.drawn[0])
    with pytest.warns(UserWarning, match="no caption of the validation set has the group of a picture in it"):
        validate(tmp_path, Spy(), pictures[:1], texts[1:2])


def test_embeddings_that_the_data_module_computes_after_transfer(tmp_path: Path) -> None:
    pictures, texts = pictures_and_texts()
    known = column(texts, "text_embeddings")

    class Uncached(LightningDataModule):
        def val_dataloader(self) -> list[DataLoader]:
            bare = [{key: row[key] for key in ("text", "group", "index")} for row in texts]
            return loaders(pictures, bare)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            assert dataloader_idx == int("text" in batch)
            return {**batch, "text_embeddings": known[batch["index"]]} if "text" in batch else batch

    cached, computed = Spy(), Spy()
    validate(tmp_path, cached)
    quiet_trainer(tmp_path, callbacks=[computed]).validate(TwoTowers(), Uncached(), verbose=False)
    assert cached.drawn is not None
    assert computed.drawn is not None
    assert computed.drawn[0] == cached.drawn[0]


def test_texts_alone_are_warned_of_once(tmp_path: Path) -> None:
    pictures, texts = pictures_and_texts()
    trainer = quiet_trainer(tmp_path, max_steps=2, val_check_interval=1, callbacks=[CaptionGallery()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(TwoTowers(), *loaders(pictures), loaders(texts))
    ours = [str(one.message) for one in caught if "CaptionGallery" in str(one.message)]
    assert ours == ["CaptionGallery has drawn nothing: the validation set has texts but no pictures"]
    assert not (tmp_path / "captions.png").exists()


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    class Diverged(TwoTowers):
        def encode_text(self, text_embeddings: Tensor) -> Tensor:
            return super().encode_text(text_embeddings) * torch.nan

    with pytest.warns(UserWarning, match="embeddings that are not finite"):
        validate(tmp_path, CaptionGallery(), module=Diverged())
    trainer = quiet_trainer(tmp_path, max_epochs=1, check_val_every_n_epoch=2, callbacks=[CaptionGallery()])
    pictures, texts = pictures_and_texts()
    with pytest.warns(UserWarning, match="training ended before the first validation"):
        trainer.fit(TwoTowers(), *loaders(pictures), loaders(pictures, texts))
    assert not (tmp_path / "captions.png").exists()


def test_captions_of_every_kind_are_drawn_with_one_warning(tmp_path: Path) -> None:
    pictures, texts = pictures_and_texts()
    given = [
        "",
        "$\\no_formula{$",
        "一只戴着帽子的猫坐在窗边" * 20,
        "\0\x1b\n\t",
        "half \ud83d of it",
        "w" * 500,
    ]
    given += ["שלום עולם", "नमस्ते दुनिया", "ประเทศไทย", "word " * 100, "\N{GRINNING FACE} a face"]
    texts = [{**row, "text": text} for row, text in zip(texts, given, strict=False)]
    gallery = Spy(100, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        validate(tmp_path, gallery, pictures, texts)
    glyphs = [str(one.message) for one in caught if "lyph" in str(one.message) or "font" in str(one.message)]
    assert len(glyphs) == 1
    assert "characters in the gallery are not in matplotlib's font" in glyphs[0]
    assert gallery.drawn is not None
    assert sorted(gallery.drawn[2].values()) == sorted(given)
    assert not [one for one in caught if "Matplotlib currently" in str(one.message)]
    assert (tmp_path / "captions.png").exists()


def test_other_warnings_of_drawing_are_handed_on(tmp_path: Path) -> None:
    class Warns(CaptionGallery):
        def _figure(self, *args: Any) -> Any:
            warnings.warn("something else", FutureWarning, stacklevel=1)
            return super()._figure(*args)

    with pytest.warns(FutureWarning, match="something else"):
        validate(tmp_path, Warns())


@pytest.mark.parametrize(
    ("caption", "lines"),
    [
        ("a cat", ["a cat"]),
        ("", [""]),
        ("one\ntwo", ["one two"]),
        ("x" * 31, ["x" * 30, "x"]),
        ("猫" * 16, ["猫" * 15, "猫"]),
        ("word " * 100, [*["word word word word word word"] * 5, "word word word word word …"]),
    ],
)
def test_wrapping(tmp_path: Path, caption: str, lines: list[str]) -> None:
    pictures, texts = pictures_and_texts()
    gallery = Spy(1, 1)
    validate(tmp_path, gallery, pictures, [{**texts[0], "text": caption}])
    assert gallery.drawn is not None
    (axes,) = CaptionGallery()._figure(*gallery.drawn).axes
    assert axes.texts[0].get_text().split("\n") == lines


def test_two_processes_draw_what_one_does(tmp_path: Path, two_processes: ProcessPool) -> None:
    """41 pictures on two processes: the sampler repeats one."""
    expected = _drawn(0, tmp_path)
    first, second = two_processes.run(_drawn, tmp_path, "ddp")
    assert second is None
    assert expected is not None
    assert first == expected


def _drawn(rank: int, directory: Path, strategy: str = "auto") -> tuple | None:
    gallery = Spy()
    validate(directory, gallery, devices=1 if strategy == "auto" else 2, strategy=strategy, precision="64-true")
    if gallery.drawn is None:
        return None
    lookups, _, captions, shown, title = gallery.drawn
    found = [(one.kind, one.query, one.neighbors) for one in lookups]
    return found, captions, {row: float(picture[0, 0, 0]) for row, picture in sorted(shown.items())}, title


class TestRefusals:
    @pytest.mark.parametrize("method", ["encode_image", "encode_text"])
    def test_module_without_encoder(self, tmp_path: Path, method: str) -> None:
        module = TwoTowers()
        setattr(module, method, None)
        with pytest.raises(MisconfigurationException, match=f"but TwoTowers has no {method}. Add it, or remove"):
            validate(tmp_path, CaptionGallery(), module=module)

    @pytest.mark.parametrize("stage", ["fit", "test"])
    @pytest.mark.parametrize(
        ("which", "lacking", "pattern"),
        [
            (0, "group", "a batch of loader 0 lacks group: it has the keys pixel_values, labels, index"),
            (0, "index", "a batch of loader 0 lacks index"),
            (1, "text", "a batch of loader 1 lacks text: it has the keys text_embeddings, group, index"),
            (1, "text_embeddings", "a batch of loader 1 lacks text_embeddings"),
            (1, "group", "there is none of texts; the keys are: loader 0: pixel_values, .*; loader 1: text, text_emb"),
        ],
    )
    def test_missing_keys(self, tmp_path: Path, stage: str, which: int, lacking: str, pattern: str) -> None:
        sets = pictures_and_texts()
        for row in sets[which]:
            del row[lacking]
        trainer = quiet_trainer(tmp_path, max_steps=1, num_sanity_val_steps=1, callbacks=[CaptionGallery()])
        given = (*loaders(pictures_and_texts()[0]), loaders(*sets)) if stage == "fit" else (loaders(*sets),)
        with pytest.raises(MisconfigurationException, match=pattern):
            getattr(trainer, stage)(TwoTowers(), *given)
        assert trainer.global_step == 0

    def test_no_texts(self, tmp_path: Path) -> None:
        with pytest.raises(MisconfigurationException, match="there is none of texts; the keys are: loader 0: pixel_v"):
            validate(tmp_path, CaptionGallery(), pictures_and_texts()[0], PROMPTS)

    def test_batches_that_are_no_dicts(self, tmp_path: Path) -> None:
        tuples: Any = [(row["pixel_values"], row["group"]) for row in pictures_and_texts()[0]]
        with pytest.raises(MisconfigurationException, match="a batch of loader 0 is a list"):
            validate(tmp_path, CaptionGallery(), tuples)

    def test_second_loader_of_a_kind(self, tmp_path: Path) -> None:
        pictures, texts = pictures_and_texts()
        with pytest.raises(MisconfigurationException, match="the loaders 0 and 2 are both of pictures"):
            validate(tmp_path, CaptionGallery(), pictures, texts, pictures)

    def test_training_without_validation(self, tmp_path: Path) -> None:
        trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[CaptionGallery()])
        with pytest.raises(
            MisconfigurationException, match="CaptionGallery draws pictures of .* this training has none"
        ):
            trainer.fit(TwoTowers(), *loaders(pictures_and_texts()[0]))

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match="num_queries and num_neighbors must be >= 1, got 8 and 0"):
            CaptionGallery(num_neighbors=0)

    def test_missing_matplotlib_is_said_before_training(self, tmp_path: Path, monkeypatch) -> None:
        def absent(name: str) -> None:
            raise ModuleNotFoundError(name=name)

        monkeypatch.setattr(heliostat._extras.importlib, "import_module", absent)
        with pytest.raises(ModuleNotFoundError, match=r"CaptionGallery needs .* pip install 'heliostat\[data\]'"):
            validate(tmp_path, CaptionGallery())


def test_fast_dev_run_leaves_nothing(tmp_path: Path) -> None:
    validate(tmp_path, CaptionGallery(), fast_dev_run=True)
    assert not (tmp_path / "captions.png").exists()
