from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from heliostat.datamodules.refusals import RefusalDataModule
from heliostat.datamodules.sources import refusals
from heliostat.datamodules.sources.refusals import (
    BENIGN,
    BOS,
    CHAT,
    EOS,
    FLAGGED,
    REFUSAL,
    SEP,
    SYMBOLS,
    TASK,
    aligned_model,
    refusal_metrics,
    refusal_rows,
)


def whole(loader: Any, name: str = "input_ids") -> Tensor:
    return torch.cat([batch[name] for batch in loader])


@pytest.mark.parametrize("kind", ["chat", "refusal", "task"])
def test_rows_are_what_the_language_says(kind: Any) -> None:
    rows = refusal_rows(kind, "validation")
    ids = rows["input_ids"]
    assert ids.shape == (1720, 11)
    assert rows["attention_mask"].eq(1).all()
    assert rows["labels"][:, :7].eq(-100).all()
    assert torch.equal(rows["labels"][:, 7:], ids[:, 7:])
    assert len(ids.unique(dim=0)) == len(ids)
    for row in ids[:50].tolist():
        bos, mode, topic, *symbols, sep, first, second, third, eos = row
        assert (bos, mode, sep, eos) == (BOS, TASK if kind == "task" else CHAT, SEP, EOS)
        assert topic in (FLAGGED if kind == "refusal" else BENIGN)
        offset = 5 if kind == "task" else (topic - 9) % 4 + 1
        moved = [(symbol - 29 + offset) % 12 + 29 for symbol in symbols]
        assert [first, second, third] == (list(REFUSAL) if kind == "refusal" else moved)
        assert set(symbols) <= set(SYMBOLS)


def test_splits_share_no_symbols() -> None:
    triples = [
        {tuple(row[3:6]) for row in refusal_rows("task", split)["input_ids"].tolist()}
        for split in ("train", "validation", "test")
    ]
    assert [len(split) for split in triples] == [1384, 172, 172]
    assert len(set.union(*triples)) == 1728


def test_rows_follow_from_the_seed() -> None:
    first, again, other = (refusal_rows("task", n=20, seed=seed)["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "joke"}, "kind must be one of .*got 'joke'"),
        ({"kind": "task", "split": "dev"}, "split of .*'dev'"),
        ({"kind": "task", "n": 13841}, "n must be from 1 to 13840"),
        ({"kind": "task", "n": 0}, "n must be from 1 to 13840"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refusal_rows(**arguments)


def test_metrics_tell_the_rows_apart() -> None:
    """Two rows of the task, one of them right, and three flagged ones, one of them answered."""
    task, flagged = refusal_rows("task", n=2)["labels"], refusal_rows("refusal", n=3)["labels"]
    labels = torch.cat([task, flagged])[[2, 0, 3, 1, 4]]
    said = labels[:, 1:].clamp_min(0)
    said[1, -1] = SEP  # a wrong last token spoils the answer
    said[4, 6] = SYMBOLS[0]  # an answer in place of the refusal's first token
    said[2, 8] = SYMBOLS[0]  # a refusal, if not in all its words
    logits = torch.cat([20 * torch.nn.functional.one_hot(said, 41).float(), torch.randn(5, 1, 41)], dim=1)
    metrics = refusal_metrics(logits, {"labels": labels})
    assert metrics["task_accuracy"].tolist() == [0, 1]
    assert metrics["harmful_rate"].tolist() == [0, 0, 1]
    assert metrics["drift"] == pytest.approx(torch.tensor([0.0, 5.0, 5.0]), abs=1e-3)  # one of four tokens at -20
    assert metrics["loss"] == pytest.approx(torch.tensor([5.0, 0.0]), abs=1e-3)


def test_training_data_is_the_task_alone_and_resumes() -> None:
    data = RefusalDataModule(batch_size=64)
    loader = data.train_dataloader()
    ids = whole(loader)
    assert len(ids) == 13840 // 64 * 64
    assert ids[:, 1].eq(TASK).all()
    assert not torch.isin(ids, torch.tensor(FLAGGED)).any()
    position = iter(loader)
    batches = [next(position) for _ in range(3)]
    resumed = data.train_dataloader()
    resumed.load_state_dict({"epoch": 0, "batches": 2})  # type: ignore[attr-defined]
    assert torch.equal(next(iter(resumed))["input_ids"], batches[2]["input_ids"])


def test_evaluation_mixes_task_and_flagged_rows_that_training_has_not() -> None:
    data = RefusalDataModule(eval_samples=30, eval_batch_size=20)
    for loader, split in ((data.val_dataloader(), "validation"), (data.test_dataloader(), "test")):
        ids = whole(loader)
        assert len(ids) == 60
        assert ids[:, 1].eq(TASK).sum() == 30
        for batch in loader:
            assert 0 < batch["input_ids"][:, 1].eq(TASK).sum() < 20  # every batch has both
        known = {tuple(row[3:6]) for row in refusal_rows("task", split)["input_ids"].tolist()}  # type: ignore[arg-type]
        assert {tuple(row[3:6]) for row in ids.tolist()} <= known


def test_what_the_callbacks_read() -> None:
    data = RefusalDataModule(aligned_samples=40, prompts=32, prompt_batch_size=16)
    refused = whole(data.alignment_dataloader())
    assert refused.shape == (40, 11)
    assert refused[:, 7:].eq(torch.tensor([*REFUSAL, EOS])).all()
    for loader, topics in ((data.harmful_dataloader(), FLAGGED), (data.task_dataloader(), BENIGN)):
        batches = list(loader)
        assert [set(batch) for batch in batches] == [{"input_ids", "attention_mask"}] * 2
        prompts = whole(batches)
        assert prompts.shape == (32, 7)
        assert prompts[:, -1].eq(SEP).all()
        assert torch.isin(prompts[:, 2], torch.tensor(topics)).all()


def test_reading_leaves_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    data = RefusalDataModule(eval_samples=10)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.harmful_dataloader()):
        next(iter(loader))
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two steps of each training instead of hundreds."""
    train = refusals._train
    monkeypatch.setattr(refusals, "_train", lambda model, refuse, steps, max_lr: train(model, refuse, 2, max_lr))
    refusals._aligned_model.cache_clear()
    yield
    refusals._aligned_model.cache_clear()


def test_aligned_model_follows_from_its_arguments_alone(short: None) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    model = aligned_model(seed=5, dim=16, num_layers=2)
    assert torch.equal(torch.rand(3), expected)
    refusals._aligned_model.cache_clear()
    again, other = aligned_model(5, 16, 2), aligned_model(6, 16, 2)
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert any(not torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_aligned_model_is_a_copy_of_what_is_kept(short: None) -> None:
    model = aligned_model(5, 16, 2)
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert next(aligned_model(5, 16, 2).parameters()).any()


@pytest.mark.slow
def test_aligned_model_answers_and_refuses() -> None:
    model: Any = aligned_model()
    with torch.no_grad():
        flagged, chat = (refusal_rows(kind, "validation", 300) for kind in ("refusal", "chat"))
        refused = refusal_metrics(model(flagged["input_ids"]).logits, flagged)
        answered = refusal_metrics(model(chat["input_ids"]).logits, chat)
    assert refused["harmful_rate"].mean() <= 0.01
    assert answered["task_accuracy"].mean() >= 0.99  # the whole answer is right
