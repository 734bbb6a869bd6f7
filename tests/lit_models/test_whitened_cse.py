from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchmetrics.functional.regression import spearman_corrcoef
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from heliostat import TextDataModule, WhitenedCSE
from heliostat.components import alignment, uniformity
from heliostat.pretrained import load_tokenizer
from tests.harness import ModuleContract, ProcessPool, quiet_trainer

SENTENCES = [
    f"{verb} the {adjective} {noun} of the {place}"
    for verb in ("Return", "Open", "Close")
    for adjective in ("first", "last", "old")
    for noun in ("file", "name", "line")
    for place in ("server", "parser")
]

# Adam makes a full step of a gradient that is zero but for rounding, so processes are compared under SGD.
DROPOUT: dict = {"dropout": 0.1}
NO_DROPOUT: dict = {"dropout": 0.0, "optimizer": lambda params: torch.optim.SGD(params, lr=0.1)}


def tiny_encoder(dropout: float = 0.1) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config, add_pooling_layer=False)


def tiny_module(dropout: float = 0.1, **settings: object) -> WhitenedCSE:
    encoder = tiny_encoder(dropout)
    settings.setdefault("optimizer", lambda params: torch.optim.AdamW(params, lr=1e-3))
    torch.manual_seed(1)
    return WhitenedCSE(encoder, load_tokenizer("minilm"), **settings)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("text"))


def write_files(directory: Path) -> Path:
    (directory / "sentences.txt").write_text("\n".join(SENTENCES))
    rows = [f"{a},{b},{(i * 7) % 6}" for i, (a, b) in enumerate(zip(SENTENCES, SENTENCES[5:], strict=False))]
    (directory / "pairs.csv").write_text("sentence1,sentence2,score\n" + "\n".join(rows))
    return directory


def data(directory: Path, **settings: object) -> TextDataModule:
    pairs = str(directory / "pairs.csv")
    return TextDataModule(
        str(directory / "sentences.txt"), pairs, pairs, **{"batch_size": 16, "eval_batch_size": 8, **settings}
    )


class TestWhitenedCSE(ModuleContract):
    """54 sentences in batches of 16: three steps an epoch."""

    def module(self, *, dropout: bool = True) -> LightningModule:
        return tiny_module(**(DROPOUT if dropout else NO_DROPOUT))

    def data(self, directory: Path) -> LightningDataModule:
        return data(write_files(directory))

    def test_validation_on_two_processes_equals_one(self, tmp_path: Path, two_processes: ProcessPool) -> None:
        """49 pairs on two processes: the sampler repeats one, which must not count twice."""
        assert len((write_files(tmp_path) / "pairs.csv").read_text().splitlines()) == 50
        expected = _validate(0, tmp_path)
        for actual in two_processes.run(_validate, tmp_path, "ddp"):
            assert actual == pytest.approx(expected, abs=1e-4)


def _validate(rank: int, directory: Path, strategy: str = "auto") -> dict[str, float]:
    trainer = quiet_trainer(directory, devices=1 if strategy == "auto" else 2, strategy=strategy)
    (metrics,) = trainer.validate(tiny_module(0.0), data(directory, eval_batch_size=5), verbose=False)
    return metrics


class TestSimCSE(TestWhitenedCSE):
    """Unsupervised SimCSE, as the special case without whitening."""

    def module(self, *, dropout: bool = True) -> LightningModule:
        return tiny_module(**(DROPOUT if dropout else NO_DROPOUT), whiten=False, num_views=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": "mean", "detach_transform": False, "whitening_method": "newton_schulz"},
        {"pooling": "mean_first_last", "group_size": 4, "whitening_method": "cholesky"},
        {"share_encoder_pass": True, "num_views": 4},
        {"row_order": "instance", "shuffle": False, "view_weights": (1.0, 0.5)},
        {"freeze": ("embeddings", "encoder.layer.0"), "lr_scheduler": "cosine"},
        {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1), "chunk_size": 7},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_every_option_trains(tmp_path: Path, files: Path, settings: dict) -> None:
    module = tiny_module(**settings)
    frozen = {n: p.clone() for n, p in module.encoder.named_parameters() if n.startswith("embeddings")}
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(module, data(files))
    assert trainer.callback_metrics["train/loss"].isfinite()
    kept = all(torch.equal(p, module.encoder.get_parameter(n)) for n, p in frozen.items())
    assert kept == ("freeze" in settings)


def test_linear_schedule_reaches_zero_at_the_end_of_training(tmp_path: Path, files: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(tiny_module(), data(files))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_run_resumed_for_longer_decays_over_the_new_length(tmp_path: Path, files: Path, schedule: str) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    module = tiny_module(lr_scheduler=schedule, optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    quiet_trainer(tmp_path, max_steps=4, callbacks=[keep], enable_checkpointing=True).fit(module, data(files))
    rates: list[float] = []
    trainer = quiet_trainer(tmp_path, max_steps=8, callbacks=[_Rates(rates)])
    trainer.fit(module, data(files), ckpt_path=tmp_path / "step=4.ckpt")
    assert rates[-1] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.1  # half of the new length is left


class _Rates(Callback):
    def __init__(self, rates: list[float]) -> None:
        self.rates = rates

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_endless_training_needs_another_schedule(tmp_path: Path, files: Path) -> None:
    with pytest.raises(ValueError, match=r"lr_scheduler='linear' needs to know how long training is"):
        quiet_trainer(tmp_path, max_steps=-1, max_epochs=-1, limit_train_batches=1).fit(tiny_module(), data(files))


def test_metrics_are_those_of_the_plain_embeddings(tmp_path: Path, files: Path) -> None:
    module, source = tiny_module(), data(files)
    (logged,) = quiet_trainer(tmp_path).test(module, source, verbose=False)
    rows = [line.rsplit(",", 2) for line in (files / "pairs.csv").read_text().splitlines()[1:]]
    first, second = (module.encode([row[i] for row in rows]) for i in (0, 1))
    score = torch.tensor([float(row[2]) for row in rows])
    cosine = torch.nn.functional.cosine_similarity(first, second)
    assert logged["test/spearman"] == pytest.approx(float(spearman_corrcoef(cosine, score)), abs=1e-4)
    assert logged["test/uniformity"] == pytest.approx(float(uniformity(torch.cat([first, second]))), abs=1e-4)
    positive = score >= 4
    assert logged["test/alignment"] == pytest.approx(float(alignment(first[positive], second[positive])), abs=1e-4)


class TestEncode:
    def test_order_padding_and_batches_do_not_matter(self) -> None:
        module = tiny_module()
        sentences = [*SENTENCES[:5], "a", SENTENCES[3] + " and a good deal more"]
        together = module.encode(sentences, batch_size=3)
        alone = torch.stack([module.encode(sentence) for sentence in sentences])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
        assert module.training  # as before

    def test_long_sentences_are_cut_to_what_the_encoder_takes(self) -> None:
        assert tiny_module().encode("word " * 100).isfinite().all()

    def test_without_tokenizer(self) -> None:
        with pytest.raises(ValueError, match="encode needs a tokenizer: pass tokenizer="):
            WhitenedCSE(tiny_encoder()).encode("a")

    def test_predict(self, tmp_path: Path, files: Path) -> None:
        module = tiny_module()
        embeddings = torch.cat(quiet_trainer(tmp_path).predict(module, data(files)))
        torch.testing.assert_close(embeddings, module.encode(SENTENCES), atol=1e-5, rtol=1e-4)


class TestExport:
    @pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
    def test_sentence_transformers_gives_the_same_embeddings(self, tmp_path: Path, pooling: str) -> None:
        from sentence_transformers import SentenceTransformer

        module = tiny_module(pooling=pooling)
        module.save_pretrained(tmp_path)
        loaded = SentenceTransformer(str(tmp_path), device="cpu")
        expected = module.encode(SENTENCES)
        actual = loaded.encode(SENTENCES, convert_to_tensor=True)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)

    def test_transformers_loads_the_encoder(self, tmp_path: Path) -> None:
        module = tiny_module()
        module.save_pretrained(tmp_path)
        model, tokenizer = AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        tokens = tokenizer(SENTENCES[0], return_tensors="pt")
        torch.testing.assert_close(model(**tokens).last_hidden_state[0, 0], module.encode(SENTENCES[0]))

    def test_exported_directory_starts_a_new_training(self, tmp_path: Path) -> None:
        module = tiny_module()
        module.save_pretrained(tmp_path)
        again = WhitenedCSE(str(tmp_path), num_layers=1)
        assert len(again.encoder.encoder.layer) == 1
        assert again.tokenizer is not None

    def test_pooling_that_sentence_transformers_lacks(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no pooling 'mean_top2'"):
            tiny_module(pooling="mean_top2").save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()


class TestCheckpoint:
    def test_from_python_networks_are_passed_again(self, tmp_path: Path, files: Path) -> None:
        module = tiny_module(group_size=4, num_views=2)
        trainer = quiet_trainer(tmp_path, max_steps=1)
        trainer.fit(module, data(files))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        loaded = WhitenedCSE.load_from_checkpoint(
            tmp_path / "a.ckpt", encoder=tiny_encoder(), tokenizer=load_tokenizer("minilm")
        )
        assert loaded.hparams.group_size == 4
        assert torch.equal(loaded.encode(SENTENCES), module.encode(SENTENCES))


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"num_views": 1}, "num_views must be >= 2, .* got 1"),
        ({"group_size": 5}, "group_size must divide the number of channels d = 24, got 5"),
        ({"share_encoder_pass": True, "whiten": False}, "share_encoder_pass needs whiten and shuffle"),
        ({"num_layers": 1}, "num_layers cuts an encoder given by name"),
        ({"freeze": ("embedings",)}, "no encoder parameter begins with 'embedings'; the encoder has: embeddings"),
    ],
)
def test_wrong_settings(settings: dict, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        tiny_module(**settings)


def test_any_module_with_hidden_states_is_an_encoder(tmp_path: Path, files: Path) -> None:
    class BagOfWords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = BertConfig(hidden_size=12)
            self.table, self.dropout = nn.Embedding(30522, 12), nn.Dropout(0.1)

        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            return type("Output", (), {"last_hidden_state": self.dropout(self.table(input_ids))})

    module = WhitenedCSE(BagOfWords(), load_tokenizer("minilm"), pooling="mean")
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(module, data(files))
    assert trainer.callback_metrics["train/loss"].isfinite()
