import copy
import json
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from heliostat import TextDataModule
from heliostat.datamodules.sources import docstrings
from heliostat.datamodules.sources.docstrings import docstring_pairs, docstring_sentences
from tests.harness import word_tokenizer

transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


@pytest.fixture
def sentences(tmp_path):
    """60 sentences of one word."""
    file = tmp_path / "train.txt"
    file.write_text("\n".join(WORDS) + "\n")
    return str(file)


def write_pairs(path, rows):
    names = ("sentence1", "sentence2", "score")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return str(path)


def words(batch):
    """The sentences of a batch of one-word sentences."""
    return [WORDS[row[1] - 5] for row in batch["input_ids"].tolist()]


def ready(module, stage="fit"):
    module.setup(stage)
    return module


class Encoder(pl.LightningModule):
    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.embedding = torch.nn.Embedding(len(tokenizer), 2)
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(words(batch))
        return self.embedding(batch["input_ids"]).mean()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["index"].tolist()

    def test_step(self, batch, batch_idx):
        self.validated += batch["index"].tolist()

    def predict_step(self, batch, batch_idx):
        return words(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**{"accelerator": "cpu", "enable_checkpointing": False, "max_epochs": 1} | quiet | kwargs)


class TestDocstrings:
    def test_splits_share_no_sentence(self):
        splits = [docstring_sentences(split) for split in ("train", "validation", "test")]
        assert len({s.casefold() for split in splits for s in split}) == sum(map(len, splits))
        assert len(splits[0]) > 4000
        assert 400 < len(splits[1]) < 900
        assert 400 < len(splits[2]) < 900

    @pytest.mark.parametrize("split", ["train", "validation", "test"])
    def test_pairs(self, split):
        pairs = docstring_pairs(split, n=403, seed=1)
        assert pairs == docstring_pairs(split, n=403, seed=1)
        assert pairs != docstring_pairs(split, n=403, seed=2)
        grades = [grade for *_, grade in pairs]
        assert [grades.count(grade) for grade in (0.0, 1.0, 2.0, 3.0)] == [103, 100, 100, 100]
        assert len({frozenset(pair[:2]) for pair in pairs}) == 403
        by_sentence = {d.sentence: d for d in docstrings._docstrings(split)}
        for first, second, grade in pairs:
            a, b = by_sentence[first], by_sentence[second]
            assert (a.package == b.package) == (grade >= 1)
            assert (a.module == b.module) == (grade >= 2)
            assert (a.owner == b.owner != "") == (grade == 3)

    def test_sentences_are_one_line_of_words(self):
        for sentence in docstring_sentences("validation"):
            assert 5 < len(sentence) <= 200
            assert "\n" not in sentence

    def test_same_in_every_process(self):
        code = "from heliostat.datamodules.sources.docstrings import _split_of as s; print(s('json'), s('email'))"
        outputs = {
            subprocess.run(
                [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
            ).stdout
            for seed in ("1", "2")
        }
        assert outputs == {f"{docstrings._split_of('json')} {docstrings._split_of('email')}\n"}

    def test_errors(self):
        with pytest.raises(ValueError, match="split must be one of 'train', 'validation', 'test', got 'dev'"):
            docstring_sentences("dev")
        with pytest.raises(ValueError, match=r"n=1000000 asks for 250000 pairs .*give n <= "):
            docstrings.docstring_pairs("validation", n=1_000_000)

    def test_python_without_sources(self, tmp_path, monkeypatch):
        monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        with pytest.raises(FileNotFoundError, match="comes without the sources of its standard library"):
            docstrings._all_docstrings.__wrapped__()

    def test_default_module(self, tokenizer):
        data = ready(TextDataModule(tokenizer=tokenizer))
        batch = next(iter(data.train_dataloader()))
        assert batch["input_ids"].shape[0] == 64
        assert batch["input_ids"].shape[1] <= 32
        pairs = [batch for loader in (data.val_dataloader(), ready(data, "test").test_dataloader()) for batch in loader]
        assert sorted({round(s, 4) for batch in pairs for s in batch["score"].tolist()}) == [0, 0.3333, 0.6667, 1]


class TestBatches:
    def test_training(self, sentences, tokenizer):
        data = ready(TextDataModule(sentences, None, None, tokenizer=tokenizer, batch_size=8))
        loader = data.train_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader) == 7
        assert batches[0].keys() >= {"input_ids", "attention_mask"}
        assert type(batches[0]) is dict
        assert batches[0]["input_ids"].shape == (8, 3)
        assert batches[0]["input_ids"].dtype == torch.int64
        seen = [word for batch in batches for word in words(batch)]
        assert len(set(seen)) == 56
        assert seen != WORDS[:56]

    def test_padding_and_truncation(self, tmp_path, tokenizer):
        (tmp_path / "a.txt").write_text("w1\nw1 w2 w3\n" + "w4 " * 50)
        data = ready(
            TextDataModule(str(tmp_path / "a.txt"), None, None, tokenizer=tokenizer, batch_size=3, max_length=10)
        )
        batch = next(iter(data.train_dataloader()))
        assert batch["input_ids"].shape == (3, 10)
        assert sorted(batch["attention_mask"].sum(1).tolist()) == [3, 5, 10]

    def test_pairs(self, tmp_path, sentences, tokenizer):
        file = write_pairs(tmp_path / "val.jsonl", [("w1", "w2 w3", 5), ("w4", "w5", "0"), ("w6", "w7", 1.25)])
        data = TextDataModule(sentences, file, file, tokenizer=tokenizer, eval_batch_size=2)
        first, second = ready(data).val_dataloader()
        assert first["first"]["input_ids"].shape == (2, 3)
        assert first["second"]["input_ids"].shape == (2, 4)
        assert words(first["first"]) == ["w1", "w4"]
        assert words(second["second"]) == ["w7"]
        assert first["score"].dtype == torch.float32
        assert first["score"].tolist() == [1.0, 0.0]
        assert second["score"].tolist() == [0.25]
        assert second["index"].tolist() == [2]
        assert [batch["index"].tolist() for batch in ready(data, "test").test_dataloader()] == [[0, 1], [2]]

    def test_score_range(self, tmp_path, sentences, tokenizer):
        file = write_pairs(tmp_path / "val.jsonl", [("w1", "w2", -1), ("w4", "w5", 0), ("w6", "w7", 1)])
        data = ready(TextDataModule(sentences, file, tokenizer=tokenizer, score_range=(-1, 1)))
        assert next(iter(data.val_dataloader()))["score"].tolist() == [0.0, 0.5, 1.0]

    def test_headerless_csv(self, tmp_path, tokenizer):
        (tmp_path / "a.csv").write_text("x,w1,w2,4\ny,w3,w4,1\n")
        data = TextDataModule(
            [str(tmp_path / "*.csv")],
            str(tmp_path / "a.csv"),
            tokenizer=tokenizer,
            sentence_column=1,
            pair_columns=[1, 2, 3],
            batch_size=2,
        )
        ready(data)
        assert sorted(words(next(iter(data.train_dataloader())))) == ["w1", "w3"]
        assert next(iter(data.val_dataloader()))["score"].tolist() == pytest.approx([0.8, 0.2])

    def test_seed(self, sentences, tokenizer):
        def order(seed, **kwargs):
            data = ready(TextDataModule(sentences, None, None, tokenizer=tokenizer, batch_size=8, seed=seed, **kwargs))
            return [words(batch) for batch in data.train_dataloader()]

        assert order(0) == order(0)
        assert order(0) != order(1)
        assert order(0) == order(0, num_workers=2)

    def test_ranks_split_the_global_batch(self, sentences, tokenizer):
        def batches(rank, world_size):
            data = TextDataModule(sentences, None, None, tokenizer=tokenizer, batch_size=8)
            data.trainer = type(
                "Trainer", (), {"world_size": world_size, "global_rank": rank, "lightning_module": None}
            )()
            return [words(batch) for batch in ready(data).train_dataloader()]

        assert [a + b for a, b in zip(batches(0, 2), batches(1, 2), strict=True)] == batches(0, 1)
        with pytest.raises(ValueError, match=r"multiple of their number \(3\), got 8"):
            batches(0, 3)


class TestCleaning:
    def test_empty_and_duplicate_sentences(self, tmp_path, tokenizer, caplog):
        (tmp_path / "a.txt").write_text("w1\n\nw2\n  \t\nw1\nw3\n")
        file = str(tmp_path / "a.txt")
        data = TextDataModule(file, None, None, tokenizer=tokenizer, batch_size=3)
        with (
            caplog.at_level("INFO", "lightning.pytorch"),
            pytest.warns(UserWarning, match="sentences: passed over 2 of 6 rows"),
        ):
            data.setup("fit")
        assert "dropped 1 duplicates of 4 sentences" in caplog.text
        assert [word for batch in data.predict_dataloader() for word in words(batch)] == ["w1", "w2", "w3"]
        data = TextDataModule(file, None, None, tokenizer=tokenizer, drop_duplicates=False)
        with pytest.warns(UserWarning, match="passed over"):
            data.setup("predict")
        assert words(next(iter(data.predict_dataloader()))) == ["w1", "w2", "w1", "w3"]

    def test_pairs_with_an_empty_sentence(self, tmp_path, sentences, tokenizer):
        file = write_pairs(tmp_path / "val.jsonl", [("w1", " ", 5), ("w4", None, 0), ("w6", "w7", 5)])
        data = TextDataModule(sentences, file, tokenizer=tokenizer)
        with pytest.warns(UserWarning, match="val_pairs: passed over 2 of 3 rows"):
            data.setup("validate")
        assert next(iter(data.val_dataloader()))["index"].tolist() == [0]

    def test_too_few_sentences(self, sentences, tokenizer):
        data = ready(TextDataModule(sentences, None, None, tokenizer=tokenizer, batch_size=61))
        with pytest.raises(ValueError, match="batch_size=61 exceeds the 60 rows"):
            data.train_dataloader()


class TestErrors:
    @pytest.mark.parametrize("score", [5.1, -0.5, float("nan"), "6"])
    def test_score_out_of_range(self, tmp_path, sentences, score):
        file = write_pairs(tmp_path / "val.jsonl", [("a", "b", 1), ("c", "d", score)])
        with pytest.raises(
            ValueError, match=rf"val\.jsonl, line 2: the score {float(score)} is outside score_range=\(0.0, 5.0"
        ):
            ready(TextDataModule(sentences, file))

    def test_score_that_is_no_number(self, tmp_path, sentences):
        (tmp_path / "val.csv").write_text("a,b,1\na,b,high\n")
        with pytest.raises(ValueError, match=r"val\.csv, line 2: the score 'high' \(column 2\) is no number"):
            ready(TextDataModule(sentences, str(tmp_path / "val.csv"), pair_columns=[0, 1, 2]))

    def test_sentence_that_is_no_text(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"sentence": 3}\n')
        with pytest.raises(ValueError, match=r"a\.jsonl, line 1: a sentence must be text, got 3"):
            ready(TextDataModule(str(tmp_path / "a.jsonl"), None))

    def test_wrong_column_names_the_argument(self, tmp_path):
        (tmp_path / "a.csv").write_text("text\nw1\n")
        with pytest.raises(ValueError, match=r"no column 'sentence'; .*\['text'\].* sentence_column"):
            ready(TextDataModule(str(tmp_path / "a.csv"), None))

    def test_no_pairs(self, tmp_path, sentences):
        with pytest.raises(ValueError, match=r"test_pairs='.*' has no pairs"):
            ready(TextDataModule(sentences, None, write_pairs(tmp_path / "test.jsonl", [])), "test")

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"pair_columns": ("a", "b")}, "pair_columns must name"),
            ({"score_range": (5, 0)}, r"score_range must be \(lowest, highest\)"),
            ({"streaming": True}, "streaming=True is for files"),
        ],
    )
    def test_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            TextDataModule(**kwargs)

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no file .*train\.txt"):
            ready(TextDataModule(str(tmp_path / "train.txt"), None))


class TestTokenizer:
    def test_of_the_module(self, sentences, tokenizer):
        module = Encoder(tokenizer)
        trainer().fit(module, TextDataModule(sentences, None, None, batch_size=8))
        assert len(module.trained) == 7

    def test_none(self, sentences, tokenizer):
        data = ready(TextDataModule(sentences, None, None))
        with pytest.raises(MisconfigurationException, match=r"tokenizer=None.* but there is none \(no Trainer\)"):
            data.train_dataloader()
        module = Encoder(tokenizer)
        del module.tokenizer
        with pytest.raises(MisconfigurationException, match=r"but Encoder has none\. Pass tokenizer="):
            trainer().fit(module, TextDataModule(sentences, None, None))

    def test_directory(self, tmp_path, sentences, tokenizer):
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        data = ready(TextDataModule(sentences, None, None, tokenizer=str(tmp_path / "tokenizer"), batch_size=60))
        assert sorted(words(next(iter(data.train_dataloader())))) == sorted(WORDS)

    def test_without_padding_token(self, sentences, tokenizer):
        bare = copy.deepcopy(tokenizer)
        bare.pad_token = None
        data = ready(TextDataModule(sentences, None, None, tokenizer=bare, batch_size=8))
        with pytest.raises(ValueError, match=r"has no padding token.*tokenizer\.pad_token = tokenizer\.eos_token"):
            data.train_dataloader()


class TestTrainer:
    def test_all_stages(self, tmp_path, sentences, tokenizer):
        file = write_pairs(tmp_path / "val.jsonl", [("w1", "w2", 5)] * 3)
        data, module, runner = TextDataModule(sentences, file, file, batch_size=8), Encoder(tokenizer), trainer()
        runner.fit(module, data)
        assert module.validated[-3:] == [0, 1, 2]
        runner.validate(module, data)
        runner.test(module, data)
        predicted = runner.predict(module, data)
        assert [word for batch in predicted for word in batch] == WORDS

    def test_validating_draws_no_random_numbers(self, tmp_path, sentences, tokenizer):
        file = write_pairs(tmp_path / "val.jsonl", [("w1", "w2", 5)])
        data = ready(TextDataModule(sentences, file, tokenizer=tokenizer, batch_size=8))
        state = torch.get_rng_state()
        list(data.train_dataloader()), list(data.val_dataloader())
        assert torch.equal(torch.get_rng_state(), state)

    def test_without_pairs(self, sentences, tokenizer):
        module = Encoder(tokenizer)
        trainer().fit(module, TextDataModule(sentences, None, None, batch_size=8))
        assert not module.validated

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("step", [3, 7, 10])
    @pytest.mark.filterwarnings("ignore:Be aware that when using", "ignore:Checkpoint directory")
    def test_resumed_run_sees_the_same_batches(self, tmp_path, sentences, tokenizer, streaming, step):
        if streaming:
            pytest.importorskip("datasets")

        def fit(ckpt_path=None, **kwargs):
            module = Encoder(tokenizer)
            data = TextDataModule(sentences, None, None, batch_size=8, streaming=streaming, shuffle_buffer=20)
            trainer(max_epochs=2, **kwargs).fit(module, data, ckpt_path=ckpt_path)
            return module.trained

        whole = fit()
        assert len(whole) == 14
        assert whole[:7] != whole[7:]
        saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step)
        first = fit(max_steps=step, callbacks=[saver], enable_checkpointing=True)
        rest = fit(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert first + rest == whole


class TestHuggingFace:
    @pytest.fixture(autouse=True)
    def _datasets(self, tmp_path, monkeypatch):
        self.datasets = pytest.importorskip("datasets")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    def saved(self, folder):
        pairs = {"sentence": ["w1", "w3", ""], "sentence2": ["w2", "w4", "w5"], "score": [5.0, 2.5, 1.0]}
        self.datasets.DatasetDict(
            train=self.datasets.Dataset.from_dict({"sentence": WORDS}), dev=self.datasets.Dataset.from_dict(pairs)
        ).save_to_disk(folder)
        return str(folder)

    def module(self, folder, tokenizer, **kwargs):
        columns = ("sentence", "sentence2", "score")
        kwargs = {"splits": ("train", "dev", "dev"), "pair_columns": columns, "batch_size": 8} | kwargs
        return TextDataModule(folder, folder, None, tokenizer=tokenizer, **kwargs)

    def test_saved_to_disk(self, tmp_path, tokenizer):
        data = self.module(self.saved(tmp_path / "set"), tokenizer)
        with pytest.warns(UserWarning, match="val_pairs: passed over 1 of 3 rows"):
            data.setup("fit")
        assert len({word for batch in data.train_dataloader() for word in words(batch)}) == 56
        assert next(iter(data.val_dataloader()))["score"].tolist() == [1.0, 0.5]

    def test_folder_of_files(self, tmp_path, tokenizer):
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "train.csv").write_text("sentence\n" + "\n".join(WORDS))
        data = ready(TextDataModule(str(folder), None, None, tokenizer=tokenizer, batch_size=60))
        assert sorted(words(next(iter(data.train_dataloader())))) == sorted(WORDS)

    @pytest.mark.filterwarnings("ignore:val_pairs. passed over")
    def test_errors(self, tmp_path, tokenizer):
        folder = self.saved(tmp_path / "set")
        with pytest.raises(
            ValueError, match=r"sentences='.*' has no split 'training', only \['train', 'dev'\]; .*splits="
        ):
            ready(self.module(folder, tokenizer, splits=("training", "dev", "dev")))
        with pytest.raises(ValueError, match=r"has no column 'text'; it has \['sentence'\].* in sentence_column"):
            ready(self.module(folder, tokenizer, sentence_column="text"))
        with pytest.raises(ValueError, match=r"set \(dev\), row 1: the score 5.0 is outside"):
            ready(self.module(folder, tokenizer, score_range=(0, 1)))
        with pytest.raises(FileNotFoundError, match=r"sentences='no/such' is no local file .* hf download .* no/such"):
            ready(self.module("no/such", tokenizer))


class TestStreaming:
    @pytest.fixture(params=["txt", "jsonl", "parquet", "set"])
    def source(self, request, tmp_path):
        """The 60 words in three files (and an empty row), or in a saved data set."""
        datasets = pytest.importorskip("datasets")
        if request.param == "set":
            datasets.Dataset.from_dict({"sentence": WORDS}).save_to_disk(tmp_path / "set")
            return str(tmp_path / "set")
        for k in range(3):
            part = [*WORDS[k::3], ""]
            file = tmp_path / f"{k}.{request.param}"
            if request.param == "parquet":
                datasets.Dataset.from_dict({"sentence": part}).to_parquet(file)
            else:
                lines = part if request.param == "txt" else [json.dumps({"sentence": word}) for word in part]
                file.write_text("\n".join(lines) + "\n")
        return f"{tmp_path}/*.{request.param}"

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_every_sentence_once(self, source, tokenizer, num_workers):
        data = TextDataModule(
            source, None, None, tokenizer=tokenizer, streaming=True, batch_size=5, num_workers=num_workers
        )
        seen = [word for batch in ready(data).train_dataloader() for word in words(batch)]
        assert len(seen) == len(set(seen)) == 60
        assert seen != WORDS
        assert seen == [word for batch in data.train_dataloader() for word in words(batch)]

    def test_epochs_differ(self, source, tokenizer):
        module = Encoder(tokenizer)
        trainer(max_epochs=2).fit(module, TextDataModule(source, None, None, streaming=True, batch_size=20))
        first, second = sum(module.trained[:3], []), sum(module.trained[3:], [])  # noqa: RUF017
        assert sorted(first) == sorted(second) == sorted(WORDS)
        assert first != second

    def test_processes_get_their_own_share(self, source, tokenizer):
        def share(rank, **limits):
            limits = {"max_steps": -1, "limit_train_batches": 5} | limits
            data = TextDataModule(source, None, None, tokenizer=tokenizer, streaming=True, batch_size=10)
            data.trainer = type("Trainer", (), {"world_size": 2, "global_rank": rank, **limits})()
            loader = data.train_dataloader()
            loader.trainer = None
            return [words(batch) for batch, _ in zip(loader, range(12), strict=False)]

        zero, one = share(0), share(1)
        assert len(zero) == len(one) == 12  # each starts over at its end: 60 rows are twice its share
        assert {len(batch) for batch in zero + one} == {5}
        first_passes = [{word for batch in batches[:5] for word in batch} for batches in (zero, one)]
        assert len(first_passes[0]) == len(first_passes[1]) == 25
        assert not first_passes[0] & first_passes[1]
        with pytest.raises(MisconfigurationException, match=r"on 2 processes.*limit_train_batches=<int>"):
            share(0, limit_train_batches=1.0)

    def test_errors(self, tmp_path, tokenizer):
        pytest.importorskip("datasets")
        (tmp_path / "a.csv").write_text("text\nw1\n")
        data = TextDataModule(str(tmp_path / "a.csv"), None, None, tokenizer=tokenizer, streaming=True, batch_size=1)
        with pytest.raises(ValueError, match=r"no column 'sentence'.* sentence_column"):
            next(iter(ready(data).train_dataloader()))
        with pytest.raises(MisconfigurationException, match="no order to predict in"):
            data.predict_dataloader()
