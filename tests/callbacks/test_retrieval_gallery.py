from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

import heliostat._extras
from heliostat import RetrievalGallery
from heliostat.components import retrieval_metrics
from tests.harness import ProcessPool, quiet_trainer


class Embedding(LightningModule):
    """Nothing of ours: any module whose forward gives embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(15, 4))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.net(pixel_values.flatten(1)[:, 1:16])  # without the number

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(batch["pixel_values"]).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def pictures(count: int = 41, classes: int = 5) -> list[dict[str, Tensor]]:
    """Their first pixel is their number, by which a picture in the gallery is recognised."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    values = torch.randn(classes, 1, 4, 4, generator=generator)[labels]
    values = values + 0.6 * torch.randn(count, 1, 4, 4, generator=generator)
    values[:, 0, 0, 0] = torch.arange(count).float()
    return [
        {"pixel_values": picture, "labels": label, "index": torch.tensor(i)}
        for i, (picture, label) in enumerate(zip(values, labels, strict=True))
    ]


class Spy(RetrievalGallery):
    """Keeps what is drawn."""

    drawn: tuple[Any, ...] | None = None

    def _figure(self, *args: Any) -> Any:
        self.drawn = args
        return super()._figure(*args)


def fit(directory: Path, gallery: RetrievalGallery, rows: list | None = None, **settings: Any) -> Embedding:
    loader = DataLoader(pictures() if rows is None else rows, batch_size=6, shuffle=True)
    module = Embedding()
    quiet_trainer(directory, max_steps=2, val_check_interval=1, callbacks=[gallery], **settings).fit(
        module, loader, loader
    )
    return module


def embeddings_of(module: Embedding, rows: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        embeddings = module.eval()(torch.stack([row["pixel_values"] for row in rows]))
    return embeddings, torch.stack([row["labels"] for row in rows])


def test_shows_the_nearest_neighbours_under_the_final_weights(tmp_path: Path) -> None:
    gallery, rows = Spy(num_queries=6, num_neighbors=3), pictures()
    module = fit(tmp_path, gallery)
    assert (tmp_path / "gallery.png").read_bytes().startswith(b"\x89PNG")
    embeddings, labels = embeddings_of(module, rows)
    assert gallery.drawn is not None
    lookups, drawn_labels, shown, title = gallery.drawn
    assert torch.equal(drawn_labels, labels)  # in the order of the index, though the loader shuffles
    similarity = nn.functional.cosine_similarity(embeddings[:, None], embeddings[None], dim=2).fill_diagonal_(-2)
    for one in lookups:
        expected = similarity[one.query].topk(3)
        assert one.neighbors == expected.indices.tolist()
        assert one.cosines == pytest.approx(expected.values.tolist(), abs=1e-5)
        for row in (one.query, *one.neighbors):
            assert shown[row][0, 0, 0] == row
    recall = float(retrieval_metrics(embeddings, labels, (1,)).recall_at[1])
    assert 0 < recall < 1
    assert f"Recall@1 of all 41 validation pictures: {recall:.3f}" in title
    first_right = labels[similarity.argmax(1)] == labels
    assert "first 3 queries: drawn from all of them" in title
    assert f"last 3: from the {int((~first_right).sum())} whose first neighbour is wrong" in title
    assert [one.kind for one in lookups] == ["random"] * 3 + ["1st wrong"] * 3
    assert not first_right[[one.query for one in lookups[3:]]].any()
    assert len({one.query for one in lookups}) == 6


def test_right_and_wrong_differ_in_sign_and_colour(tmp_path: Path) -> None:
    gallery = Spy(num_queries=4, num_neighbors=5)
    fit(tmp_path, gallery)
    assert gallery.drawn is not None
    lookups, labels, _, title = gallery.drawn
    (axes,) = RetrievalGallery()._figure(*gallery.drawn).axes
    assert axes.get_title() == title
    signs = [text for text in axes.texts if text.get_text()[0] in "✓✗"]
    right = [bool(labels[n] == labels[one.query]) for one in lookups for n in one.neighbors]
    assert [text.get_text()[0] == "✓" for text in signs] == right
    assert 0 < sum(right) < len(right)
    frames = [patch.get_edgecolor() for patch in axes.patches if patch.get_linewidth() > 1]
    assert len({(mark, frame) for mark, frame in zip(right, frames, strict=True)}) == 2
    assert len(axes.images) == 4 * 6


def test_seed_decides_the_queries(tmp_path: Path) -> None:
    queries = []
    for seed in (0, 0, 1):
        gallery = Spy(4, 1, seed=seed)
        fit(tmp_path, gallery)
        assert gallery.drawn is not None
        queries.append([one.query for one in gallery.drawn[0]])
    assert queries[0] == queries[1] != queries[2]


@pytest.mark.parametrize(("stage", "word"), [("validate", "validation"), ("test", "test")])
def test_after_evaluation(tmp_path: Path, stage: str, word: str) -> None:
    gallery = Spy(3, filename="b.png")
    trainer = quiet_trainer(tmp_path, callbacks=[gallery], limit_val_batches=2, limit_test_batches=2)
    getattr(trainer, stage)(Embedding(), DataLoader(pictures(), batch_size=6), verbose=False)
    assert gallery.drawn is not None
    assert f"of all 12 {word} pictures" in gallery.drawn[3]
    assert (tmp_path / "b.png").exists()


def test_modes_and_place_of_the_module_are_kept(tmp_path: Path) -> None:
    class PartlyFrozen(Embedding):
        def __init__(self) -> None:
            super().__init__()
            self.net[1].eval()

    rows = pictures()
    module = PartlyFrozen()
    loader = DataLoader(rows, batch_size=6)
    quiet_trainer(tmp_path, max_steps=1, val_check_interval=1, callbacks=[RetrievalGallery()]).fit(
        module, loader, loader
    )
    assert module.training
    assert module.net.training
    assert not module.net[1].training


def test_single_members_of_a_class_are_no_queries(tmp_path: Path) -> None:
    rows = pictures(12, classes=2) + [
        {"pixel_values": torch.randn(1, 4, 4), "labels": torch.tensor(10 + i), "index": torch.tensor(12 + i)}
        for i in range(20)
    ]
    gallery = Spy(30, 2)
    fit(tmp_path, gallery, rows)
    assert gallery.drawn is not None
    assert sorted(one.query for one in gallery.drawn[0]) == list(range(12))
    assert "of all 12 validation pictures" in gallery.drawn[3]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_channels_and_flat_pictures(tmp_path: Path, channels: int) -> None:
    class Mean(Embedding):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return super().forward(pixel_values.mean(1))

    rows = [{**row, "pixel_values": row["pixel_values"].repeat(channels, 1, 1)} for row in pictures()]
    rows[3]["pixel_values"] = torch.full((channels, 4, 4), -7.0)
    loader = DataLoader(rows, batch_size=6)
    quiet_trainer(tmp_path, callbacks=[RetrievalGallery(41, 1)]).validate(Mean(), loader, verbose=False)
    assert (tmp_path / "gallery.png").exists()


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no two pictures of the validation set share a class"):
        fit(tmp_path, RetrievalGallery(), pictures(6, classes=6))

    class Diverged(Embedding):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return super().forward(pixel_values) * torch.nan

    loader = DataLoader(pictures(), batch_size=6)
    with pytest.warns(UserWarning, match="embeddings that are not finite"):
        quiet_trainer(tmp_path, callbacks=[RetrievalGallery()]).validate(Diverged(), loader, verbose=False)
    trainer = quiet_trainer(tmp_path, max_epochs=1, check_val_every_n_epoch=2, callbacks=[RetrievalGallery()])
    with pytest.warns(UserWarning, match="training ended before the first validation"):
        trainer.fit(Embedding(), loader, loader)
    assert not (tmp_path / "gallery.png").exists()


def test_loggers_with_pictures_get_the_figure(tmp_path: Path) -> None:
    class Images(CSVLogger):
        sent: list

        def log_image(self, key: str, images: list) -> None:
            self.sent = [key, *images]

    logger = Images(tmp_path, name="", version="")
    fit(tmp_path, RetrievalGallery(), logger=logger)
    assert logger.sent == ["gallery", str(tmp_path / "gallery.png")]


def test_two_processes_draw_what_one_does(tmp_path: Path, two_processes: ProcessPool) -> None:
    """41 pictures on two processes: the sampler repeats one."""
    expected = _drawn(0, tmp_path)
    first, second = two_processes.run(_drawn, tmp_path, "ddp")
    assert second is None
    assert first is not None
    assert expected is not None
    assert first[0] == expected[0]
    assert first[2] == expected[2]
    assert {row: float(picture[0, 0, 0]) for row, picture in first[1].items()} == {row: row for row in expected[1]}


def _drawn(rank: int, directory: Path, strategy: str = "auto") -> tuple | None:
    gallery = Spy()
    trainer = quiet_trainer(
        directory, devices=1 if strategy == "auto" else 2, strategy=strategy, callbacks=[gallery], precision="64-true"
    )
    trainer.validate(Embedding(), DataLoader(pictures(), batch_size=6), verbose=False)
    if gallery.drawn is None:
        return None
    lookups, _, shown, title = gallery.drawn
    return [(one.kind, one.query, one.neighbors) for one in lookups], shown, title


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "pattern"),
        [
            (
                lambda row: {k: row[k] for k in ("pixel_values", "labels")},
                "lacks index: it has the keys pixel_values,",
            ),
            (lambda row: {"pixels": row["pixel_values"]}, "lacks pixel_values, labels, index: it has the keys pixels"),
            (lambda row: (row["pixel_values"], row["labels"]), "lacks pixel_values, labels, index: it is a list"),
        ],
    )
    @pytest.mark.parametrize("stage", ["fit", "test"])
    def test_batches_without_the_keys(self, tmp_path: Path, change: Any, pattern: str, stage: str) -> None:
        loader = DataLoader([change(row) for row in pictures()], batch_size=6)
        trainer = quiet_trainer(tmp_path, max_steps=1, num_sanity_val_steps=1, callbacks=[RetrievalGallery()])
        with pytest.raises(MisconfigurationException, match=pattern):
            getattr(trainer, stage)(Embedding(), *([loader] * (2 if stage == "fit" else 1)))

    def test_second_loader(self, tmp_path: Path) -> None:
        class Several(Embedding):
            def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
                pass

        loader = DataLoader(pictures(), batch_size=6)
        with pytest.raises(MisconfigurationException, match="comes from a second loader"):
            quiet_trainer(tmp_path, callbacks=[RetrievalGallery()]).validate(Several(), [loader, loader])

    def test_training_without_validation(self, tmp_path: Path) -> None:
        loader = DataLoader(pictures(), batch_size=6)
        with pytest.raises(MisconfigurationException, match="this training has none"):
            quiet_trainer(tmp_path, max_steps=1, callbacks=[RetrievalGallery()]).fit(Embedding(), loader)

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match="num_queries and num_neighbors must be >= 1, got 0 and 8"):
            RetrievalGallery(0)

    def test_missing_matplotlib_is_said_before_training(self, tmp_path: Path, monkeypatch) -> None:
        def absent(name: str) -> None:
            raise ModuleNotFoundError(name=name)

        monkeypatch.setattr(heliostat._extras.importlib, "import_module", absent)
        with pytest.raises(ModuleNotFoundError, match=r"RetrievalGallery needs .* pip install 'heliostat\[data\]'"):
            fit(tmp_path, RetrievalGallery())


def test_fast_dev_run_leaves_nothing(tmp_path: Path) -> None:
    fit(tmp_path, RetrievalGallery(), fast_dev_run=True)
    assert not (tmp_path / "gallery.png").exists()
