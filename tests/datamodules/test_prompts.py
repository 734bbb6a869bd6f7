from __future__ import annotations

import json
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from heliostat import PromptDataModule
from heliostat.datamodules.prompts import PrioritizedPromptSampler
from heliostat.datamodules.sources import arithmetic
from heliostat.datamodules.sources.arithmetic import (
    EOS,
    PAD,
    ArithmeticPrompts,
    NoisyArithmetic,
    arithmetic_model,
    arithmetic_tokenizer,
)
from tests.harness import quiet_trainer

transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a character; all of them known."""
    return characters()


def characters(**special: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models

    names = ["<unused>", "<eos>", "<pad>", *map(chr, range(10, 127))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ready(stage: str = "fit", rank: int | None = None, **arguments: Any) -> PromptDataModule:
    """A data module after setup, on one of two processes if ``rank`` is given."""
    data = PromptDataModule(**arguments)
    if rank is not None:
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, lightning_module=None)  # type: ignore[assignment]
    data.setup(stage)
    return data


def whole(data: PromptDataModule) -> dict[str, Any]:
    """All training prompts in one batch, in order."""
    (batch,) = data.predict_dataloader()
    return batch


def said(batch: dict[str, Any], tokenizer: Any) -> list[list[str | None]]:
    """The demonstrations of a batch as text."""
    return [
        [tokenizer.decode(i[m]) if a else None for i, m, a in zip(*row, strict=True)]
        for row in zip(
            batch["demonstration_ids"],
            batch["demonstration_mask"],
            batch["demonstration_available"].tolist(),
            strict=True,
        )
    ]


def result(prompt: str) -> str:
    """The right answer."""
    x, sign, y, _ = prompt
    return f"{ {'+': int(x) + int(y), '-': abs(int(x) - int(y)), '*': int(x) * int(y)}[sign]:02d}"


def indices(loader: Any) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


class TestArithmetic:
    def test_prompts_and_answers(self) -> None:
        rows = list(ArithmeticPrompts())
        assert len({prompt for prompt, *_ in rows}) == len(rows) == 147
        for prompt, answer, demonstrations in rows:
            assert answer == result(prompt)
            assert len(demonstrations) == 3
            assert all(len(text) == 2 and 0 <= int(text) <= 36 for text in demonstrations)

    @pytest.mark.parametrize(("error", "wrong"), [(0.35, 51), (0.6, 88), (0.0, 0), (1.0, 147)])
    def test_each_teacher_is_wrong_on_its_own_share(self, error: float, wrong: int) -> None:
        rows = list(ArithmeticPrompts(teachers=5, teacher_error=error, seed=4))
        assert rows == list(ArithmeticPrompts(teachers=5, teacher_error=error, seed=4))
        columns = [{row for row, (_, answer, given) in enumerate(rows) if given[i] != answer} for i in range(5)]
        assert [len(column) for column in columns] == [wrong] * 5
        if 0 < error < 1:
            assert len(set(map(frozenset, columns))) == 5
            assert rows != list(ArithmeticPrompts(teachers=5, teacher_error=error, seed=5))

    def test_a_teacher_does_not_depend_on_the_others(self) -> None:
        few, many = ArithmeticPrompts(teachers=1), ArithmeticPrompts(teachers=4)
        assert [row[2] for row in few] == [row[2][:1] for row in many]
        assert all(row[2] == () for row in ArithmeticPrompts(teachers=0))

    def test_noise_follows_the_operation(self) -> None:
        right = {prompt: answer for prompt, answer, _ in ArithmeticPrompts()}
        rows = list(NoisyArithmetic(9000, addition=0.9, subtraction=0.5, multiplication=0.0, seed=1))
        assert rows == list(NoisyArithmetic(9000, seed=1)) != list(NoisyArithmetic(9000, seed=2))
        for operation, share in (("+", 0.9), ("-", 0.5), ("*", 0.0)):
            hits = [answer == right[prompt] for prompt, answer, _ in rows if operation in prompt]
            assert len(hits) > 2800
            expected = share + (1 - share) / 37  # a random number may happen to be right
            assert sum(hits) / len(hits) == pytest.approx(expected, abs=4 * (0.25 / 2800) ** 0.5)

    def test_tokenizer_is_a_real_one(self, tmp_path: Path) -> None:
        tokenizer = arithmetic_tokenizer()
        ids = tokenizer("6*6=36")["input_ids"]
        assert tokenizer.decode(ids) == "6*6=36"
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, EOS)
        assert tokenizer.decode([*ids, EOS, PAD], skip_special_tokens=True) == "6*6=36"
        assert tokenizer("a")["input_ids"] == [tokenizer.unk_token_id]
        tokenizer.save_pretrained(tmp_path)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path)("6*6=36")["input_ids"] == ids

    def test_model_follows_from_its_arguments_alone(self) -> None:
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        model: Any = arithmetic_model(5, steps=2, dim=16)
        assert torch.equal(torch.rand(3), expected)
        with torch.no_grad():
            first = next(model.parameters()).clone()
            next(model.parameters()).zero_()
        again = next(arithmetic_model(5, steps=2, dim=16).parameters())
        arithmetic._arithmetic_model.cache_clear()
        afresh, other = (next(arithmetic_model(seed, steps=2, dim=16).parameters()) for seed in (5, 6))
        assert torch.equal(again, first)
        assert torch.equal(afresh, first)
        assert not torch.equal(other, first)
        assert not model.training
        ids = torch.tensor(arithmetic_tokenizer()(["1+1="])["input_ids"])
        assert model.generate(ids, attention_mask=torch.ones_like(ids).bool(), max_new_tokens=3).shape[1] > 4

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: ArithmeticPrompts(teachers=-1), "teachers must be >= 0, got -1"),
            (lambda: ArithmeticPrompts(teacher_error=1.5), "teacher_error must be .* got 1.5"),
            (lambda: NoisyArithmetic(0), "n must be >= 1.*n=0"),
            (lambda: NoisyArithmetic(subtraction=2.0), "from 0 to 1, got .*2.0"),
        ],
    )
    def test_errors(self, call: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call()


class TestBatches:
    ROWS = (
        {"prompt": "long prompt", "answer": "a", "one": "first", "two": None},
        {"prompt": "p", "answer": None, "one": "", "two": "second teacher"},
        {"prompt": "pp", "answer": 3, "one": None, "two": None},
    )

    def test_what_they_hold(self, tmp_path: Path, tokenizer: Any) -> None:
        with pytest.warns(UserWarning, match="prompts: 1 of 3 prompts have no answer"):
            data = ready(
                prompts=write(tmp_path / "a.jsonl", list(self.ROWS)),
                demonstration_columns=["one", "two"],
                tokenizer=tokenizer,
            )
        batch = whole(data)
        assert batch["prompt"] == ["long prompt", "p", "pp"]
        assert batch["answer"] == ["a", None, "3"]
        assert batch["index"].tolist() == [0, 1, 2]
        assert data.num_prompts == 3
        assert (batch["prompt_ids"].dtype, batch["prompt_mask"].dtype) == (torch.int64, torch.bool)
        assert batch["prompt_mask"].sum(1).tolist() == [11, 1, 2]
        for ids, mask, prompt in zip(batch["prompt_ids"], batch["prompt_mask"], batch["prompt"], strict=True):
            assert tokenizer.decode(ids[mask]) == prompt
            assert mask[-1]  # padded on the left
            assert mask.int().diff().ge(0).all()
            assert ids[~mask].eq(tokenizer.pad_token_id).all()
        assert batch["demonstration_available"].tolist() == [[True, False], [False, True], [False, False]]
        assert batch["demonstration_ids"].shape == batch["demonstration_mask"].shape == (3, 2, 15)
        assert said(batch, tokenizer) == [["first<eos>", None], [None, "second teacher<eos>"], [None, None]]
        missing = ~batch["demonstration_available"]
        assert not batch["demonstration_ids"][missing].any()
        assert not batch["demonstration_mask"][missing].any()
        assert batch["demonstration_mask"][0, 0].tolist() == [True] * 6 + [False] * 9

    def test_without_teachers(self, tokenizer: Any) -> None:
        batch = whole(ready(prompts=[("p", "a", ()), ("q", "b", ())], tokenizer=tokenizer))
        assert batch["demonstration_ids"].shape == (2, 0, 1)
        assert batch["demonstration_available"].shape == (2, 0)

    def test_arithmetic_is_the_default_with_its_own_tokenizer(self) -> None:
        data = ready(val_prompts="arithmetic", batch_size=32)
        batches = list(data.train_dataloader())
        assert len(batches) == 147 // 32
        assert {batch["demonstration_ids"].shape for batch in batches} == {(32, 3, 3)}
        for batch in batches:
            assert data.tokenizer.batch_decode(batch["prompt_ids"]) == batch["prompt"]
            assert batch["answer"] == [result(prompt) for prompt in batch["prompt"]]
        assert [i for batch in indices(data.val_dataloader()) for i in batch] == list(range(147))
        assert data.test_dataloader() == []

    def test_a_model_generates_from_them(self) -> None:
        """Greedy completions of left-padded prompts are those of each prompt by itself."""
        rows = [("1+1=", None, ()), ("=", None, ()), ("2*3=", None, ())]
        data = ready(prompts=rows, answer_column=None, tokenizer="arithmetic")
        model: Any = arithmetic_model(0, steps=5, dim=16)
        batch = whole(data)
        together = model.generate(
            input_ids=batch["prompt_ids"], attention_mask=batch["prompt_mask"], max_new_tokens=3, do_sample=False
        )
        ids = batch["prompt_ids"][1, -1:][None]
        alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        assert together[1, 4:].tolist()[: alone.shape[1] - 1] == alone[0, 1:].tolist()


class TestSources:
    @pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "dataset", "python"])
    def test_forms(self, tmp_path: Path, tokenizer: Any, form: str) -> None:
        rows = [{"q": "one\ntwo", "a": "1", "d": "x"}, {"q": "three", "a": "2", "d": None}]
        arguments: dict[str, Any] = {"prompt_column": "q", "answer_column": "a", "demonstration_columns": ["d"]}
        path: Any = str(tmp_path / f"rows.{form}")
        if form == "jsonl":
            write(Path(path), rows)
        elif form == "csv":
            Path(path).write_text('"one\ntwo",1,x\nthree,2,\n')
            arguments = {"prompt_column": 0, "answer_column": 1, "demonstration_columns": [2]}
        elif form == "parquet":
            pytest.importorskip("pyarrow.parquet").write_table(
                pytest.importorskip("pyarrow").Table.from_pylist(rows), path
            )
        elif form == "dataset":
            datasets = pytest.importorskip("datasets")
            datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
        else:
            path, arguments = [(row["q"], row["a"], [row["d"]]) for row in rows], {}
        batch = whole(ready(prompts=path, tokenizer=tokenizer, **arguments))
        assert batch["prompt"] == ["one\ntwo", "three"]
        assert batch["answer"] == ["1", "2"]
        assert said(batch, tokenizer) == [["x<eos>"], [None]]

    def test_gsm8k(self, tmp_path: Path, tokenizer: Any) -> None:
        solutions = ["She has 2*500=<<2*500=1000>>1000.\n#### 1,000", "No.\n#### -3"]
        rows = [{"question": f"How many {i}?", "answer": text} for i, text in enumerate(solutions)]
        file = write(tmp_path / "train.jsonl", rows)
        arguments: dict[str, Any] = {"prompt_column": "question", "answer_format": "gsm8k", "tokenizer": tokenizer}
        batch = whole(ready(prompts=file, prompt_template="Q: {}\nA:", **arguments))
        assert batch["prompt"] == ["Q: How many 0?\nA:", "Q: How many 1?\nA:"]
        assert batch["answer"] == ["1000", "-3"]
        assert said(batch, tokenizer) == [[text + "<eos>"] for text in solutions]
        file = write(tmp_path / "bad.jsonl", [*rows, {"question": "x", "answer": "42"}])
        with pytest.raises(
            ValueError, match=r"bad.jsonl, line 3: answer_format='gsm8k' needs .* '#### number', got '42'"
        ):
            ready(prompts=file, **arguments)

    def test_a_column_of_lists(self, tmp_path: Path, tokenizer: Any) -> None:
        rows = [{"prompt": "a", "d": ["x", None, "y"]}, {"prompt": "b", "d": []}, {"prompt": "c", "d": ["z"]}]
        data = ready(
            prompts=write(tmp_path / "a.jsonl", rows),
            answer_column=None,
            demonstration_columns=["d"],
            tokenizer=tokenizer,
        )
        assert said(whole(data), tokenizer) == [["x<eos>", None, "y<eos>"], [None] * 3, ["z<eos>", None, None]]

    def test_teacher_files_are_matched_by_prompt(self, tmp_path: Path, tokenizer: Any) -> None:
        prompts = [{"prompt": p, "answer": "1", "own": "o"} for p in ("a", "b", "c")]
        teachers = [
            write(tmp_path / "t1.jsonl", [{"prompt": "c", "completion": "c1"}, {"prompt": "a", "completion": "a1"}]),
            write(
                tmp_path / "t2.jsonl",
                [{"prompt": p, "completion": p + str(i)} for i, p in enumerate(("b", "x", "b", "y"))]
                + [{"prompt": "a", "completion": None}],
            ),
        ]
        with pytest.warns(UserWarning, match="count as missing") as caught:
            data = ready(
                prompts=write(tmp_path / "p.jsonl", prompts),
                demonstration_columns=["own"],
                teacher_files=teachers,
                tokenizer=tokenizer,
            )
        assert said(whole(data), tokenizer) == [
            ["o<eos>", "a1<eos>", None],
            ["o<eos>", None, "b0<eos>"],
            ["o<eos>", "c1<eos>", None],
        ]
        messages = [str(warning.message).split("': ")[-1] for warning in caught]
        assert [m for m in messages if " of 5 " in m] == [
            "1 of 5 demonstrations are empty, and count as missing",
            "2 of 5 demonstrations are for prompts that `prompts` does not have, and unused",
            "1 of 5 demonstrations repeat a prompt, of which only the first is used",
        ]

    def test_parts_keep_equal_prompts_together(self, tokenizer: Any) -> None:
        rows = [(f"p{i % 20}", str(i), ()) for i in range(60)]
        arguments: dict[str, Any] = {"prompts": rows, "val_fraction": 0.2, "test_fraction": 0.1, "tokenizer": tokenizer}
        data = ready(batch_size=1, **arguments)
        data.setup("test")
        parts = [data.predict_dataloader(), data.val_dataloader(), data.test_dataloader()]
        texts = [[text for batch in part for text in batch["prompt"]] for part in parts]
        assert [len(part) for part in texts] == [42, 12, 6]
        assert len(set.union(*map(set, texts))) == 20 == sum(len(set(part)) for part in texts)
        assert indices(parts[0]) == [list(range(42))] == [list(range(data.num_prompts))]


class TestTemplates:
    def test_chat(self, tokenizer: Any) -> None:
        data = ready(
            prompts=[("hi", None, ["yo"])],
            answer_column=None,
            tokenizer=tokenizer,
            chat_template=TEMPLATE,
            system_prompt="Be brief",
            prompt_template="<{}>",
        )
        batch = whole(data)
        assert batch["prompt"] == ["sBe brief;u<hi>;a"]
        assert tokenizer.decode(batch["prompt_ids"][0]) == batch["prompt"][0]
        assert said(batch, tokenizer) == [["yo<eos>"]]

    def test_the_tokenizers_own_template_and_conversations(self, tmp_path: Path) -> None:
        tokenizer = characters()
        conversation = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        rows = [{"prompt": [*conversation, {"role": "user", "content": "3"}]}, {"prompt": conversation[:1]}]
        arguments: dict[str, Any] = {"prompts": write(tmp_path / "a.jsonl", rows), "answer_column": None}
        with pytest.raises(ValueError, match="has no chat template, which chat_template=True asks for"):
            ready(tokenizer=tokenizer, chat_template=True, **arguments)
        tokenizer.chat_template = TEMPLATE
        data = ready(tokenizer=tokenizer, chat_template=True, **arguments)
        assert whole(data)["prompt"] == ["u1;a2;u3;a", "u1;a"]
        with pytest.raises(ValueError, match=r"line 1: the prompt is a conversation, which needs chat_template=True"):
            ready(tokenizer=tokenizer, **arguments)

    def test_special_tokens_come_once(self) -> None:
        """A plain prompt begins as the tokenizer has it; a template writes its own special tokens."""
        from tokenizers import processors

        tokenizer = characters(bos_token="<bos>")
        bos = tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", bos)]
        )
        arguments: dict[str, Any] = {"prompts": [("p", None, ["d"])], "answer_column": None, "tokenizer": tokenizer}
        plain, chat = (whole(ready(chat_template=t, **arguments)) for t in (False, "<bos>" + TEMPLATE))
        for batch, length in ((plain, 2), (chat, 5)):
            assert batch["prompt_ids"].shape == (1, length)
            assert batch["prompt_ids"].eq(bos).sum() == 1
            assert not batch["demonstration_ids"].eq(bos).any()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"system_prompt": "s"}, "system_prompt has no effect without chat_template"),
            ({"prompt_template": "Q:"}, r"prompt_template must have \{\} for the prompt, got 'Q:'"),
            (
                {"chat_template": "{{ messages[-1]['content'] }}", "system_prompt": "s"},
                "the chat template passes over system messages",
            ),
            (
                {"prompts": [([{"role": "system", "content": "x"}], None, ())], "system_prompt": "s"}
                | {"chat_template": TEMPLATE},
                "prompts, row 1: the prompt has a system message; give no system_prompt",
            ),
            ({"prompts": [(5, None, ())]}, "prompts, row 1: a prompt must be text or a list of messages, got 5"),
        ],
    )
    def test_errors(self, tokenizer: Any, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ready(**{"prompts": [("p", None, ())], "answer_column": None, "tokenizer": tokenizer, **arguments})


class TestWhatIsLeftOut:
    def test_long_and_empty_prompts(self, tokenizer: Any) -> None:
        rows = [("12345", "a", ["123", "1234"]), ("123456", "b", ()), (" ", "c", ()), ("1", "d", ()), (None, "e", ())]
        with pytest.warns(UserWarning, match="left out") as caught:
            data = ready(prompts=rows, tokenizer=tokenizer, max_prompt_length=5, max_demonstration_length=4)
        messages = [str(warning.message) for warning in caught]
        assert messages == [
            "prompts: 2 of 5 prompts are empty, and left out",
            "prompts: 1 of 5 prompts are longer than max_prompt_length=5 tokens (up to 6), and left out",
            "prompts: 1 of 2 demonstrations are longer than max_demonstration_length=4 tokens, and count as missing",
        ]
        batch = whole(data)
        assert batch["prompt"] == ["12345", "1"]
        assert batch["index"].tolist() == [0, 1]
        assert said(batch, tokenizer) == [["123<eos>", None], [None, None]]

    def test_nothing_left(self, tokenizer: Any) -> None:
        data = PromptDataModule([("", "a", ())], tokenizer=tokenizer)
        with (
            pytest.warns(UserWarning, match="1 of 1 prompts are empty"),
            pytest.raises(ValueError, match="prompts has no"),
        ):
            data.setup("fit")

    def test_nothing_is_warned_of_without_need(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ready(val_prompts="arithmetic")

    def test_an_end_in_the_text_is_not_doubled(self, tokenizer: Any) -> None:
        batch = whole(ready(prompts=[("p", "a", ["x<eos>"])], tokenizer=tokenizer))
        assert batch["demonstration_ids"][0, 0].tolist() == [*tokenizer("x")["input_ids"], tokenizer.eos_token_id]


class TestTokenizers:
    ROWS = (("p", "a", ()),)

    def test_without_padding(self) -> None:
        with pytest.raises(ValueError, match=r"has no padding token.*or pass pad_with_eos=True .* '<eos>'"):
            ready(prompts=self.ROWS, tokenizer=characters(pad_token=None))
        data = ready(prompts=[*self.ROWS, ("pp", "b", ())], tokenizer=characters(pad_token=None), pad_with_eos=True)
        assert whole(data)["prompt_ids"][0, 0] == data.tokenizer.eos_token_id == data.tokenizer.pad_token_id
        assert not whole(data)["prompt_mask"][0, 0]

    def test_without_end(self) -> None:
        with pytest.raises(ValueError, match="has no EOS token, without which no completion ends"):
            ready(prompts=self.ROWS, tokenizer=characters(eos_token=None))

    def test_that_ends_prompts(self) -> None:
        from tokenizers import processors

        tokenizer = characters()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", 1)]
        )
        with pytest.raises(ValueError, match="puts EOS behind a prompt.*add_eos_token=False"):
            ready(prompts=self.ROWS, tokenizer=tokenizer)

    def test_the_modules_own_comes_first(self, tokenizer: Any) -> None:
        data = PromptDataModule()
        module = SimpleNamespace(tokenizer=tokenizer)
        data.trainer = SimpleNamespace(world_size=1, global_rank=0, lightning_module=module)  # type: ignore[assignment]
        data.setup("fit")
        assert data.tokenizer is tokenizer
        with pytest.raises(MisconfigurationException, match="takes the attribute `tokenizer`.* there is none"):
            ready(prompts=self.ROWS)


class TestOrder:
    def test_depends_on_seed_and_epoch(self) -> None:
        def order(seed: int, epoch: int) -> list[list[int]]:
            loader: Any = ready(batch_size=40, seed=seed).train_dataloader()
            loader.sampler.set_epoch(epoch)
            return indices(loader)

        orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
        assert len({str(rows) for rows in orders}) == 4
        assert order(1, 0) == orders[2]

    @pytest.mark.parametrize("prioritized", [False, True])
    def test_two_processes_share_the_batch_of_one(self, prioritized: bool) -> None:
        runs = [
            indices(ready(rank=rank, batch_size=40, prioritized=prioritized).train_dataloader())
            for rank in (None, 0, 1)
        ]
        assert runs[0] == [first + second for first, second in zip(*runs[1:], strict=True)]
        assert len(set(map(tuple, runs[0]))) == 3

    def test_resumes_at_the_next_batch(self) -> None:
        batches = indices(ready(batch_size=20).train_dataloader())
        loader: Any = ready(batch_size=20).train_dataloader()
        loader.load_state_dict({"epoch": 0, "batches": 3})
        assert indices(loader) == batches[3:]

    def test_reading_leaves_random_numbers_alone(self) -> None:
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        data = ready(val_prompts="arithmetic", prioritized=True)
        next(iter(data.train_dataloader()))
        next(iter(data.val_dataloader()))
        assert torch.equal(torch.rand(3), expected)


class TestPrioritizedPromptSampler:
    def test_draws_in_proportion(self) -> None:
        sampler = PrioritizedPromptSampler(4, 1)
        sampler.set_weights(torch.tensor([1.0, 2.0, 0.0, 5.0]))
        draws: list[int] = []
        for epoch in range(1000):
            sampler.set_epoch(epoch)
            draws += list(sampler)
        counts = torch.bincount(torch.tensor(draws), minlength=4) / 4000
        torch.testing.assert_close(counts, torch.tensor([0.125, 0.25, 0.0, 0.625]), atol=0.03, rtol=0)

    def test_a_prompt_comes_once_where_the_batch_fits(self) -> None:
        sampler = PrioritizedPromptSampler(10, 4)
        sampler.set_weights(torch.tensor([1e6, *[1.0] * 9]))
        rows = list(sampler)
        assert len(rows) == 8  # two batches an epoch
        assert len(set(rows[:4])) == len(set(rows[4:])) == 4
        sampler.set_weights(torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, *[0.0] * 5]))
        rows = list(sampler)
        assert set(rows) <= {2, 3, 4}
        assert len(rows) == 8
        assert len(list(PrioritizedPromptSampler(3, 8))) == 8  # fewer prompts than rows: one batch, with replacement

    def test_weights_hold_from_the_next_batch_on(self) -> None:
        data = ready(prompts=ArithmeticPrompts(), prioritized=True, batch_size=4)
        loader: Any = data.train_dataloader()
        batches = iter(loader)
        for chosen in (range(8), range(50, 60), range(100, 104)):
            weights = torch.zeros(147)
            weights[chosen] = 1
            loader.sampler.set_weights(weights)
            assert set(next(batches)["index"].tolist()) <= set(chosen)

    def test_state(self) -> None:
        data = ready(prioritized=True, batch_size=32)
        assert data.state_dict() == {}
        loader: Any = data.train_dataloader()
        loader.sampler.set_weights(torch.arange(147))
        state = data.state_dict()
        other = ready(prioritized=True, batch_size=32)
        other.load_state_dict(state)
        assert indices(other.train_dataloader()) == indices(loader)
        assert indices(other.train_dataloader()) == indices(loader)  # a loader made again keeps them
        assert ready().state_dict() == {}

    def test_weights_of_other_prompts_are_refused(self) -> None:
        loader: Any = (data := ready(prioritized=True, batch_size=32)).train_dataloader()
        loader.sampler.set_weights(torch.arange(147))
        state = data.state_dict()
        rows = [(prompt, answer, []) for prompt, answer, _ in ArithmeticPrompts()]
        for change in (rows[::-1], [("1+1+1=", "03", []), *rows[1:]]):
            data = ready(prompts=change, tokenizer="arithmetic", prioritized=True, batch_size=32)
            data.load_state_dict(state)
            with pytest.raises(MisconfigurationException, match="prioritized drawing are of other training prompts"):
                data.train_dataloader()
        data = ready(prompts=rows, tokenizer="arithmetic", prioritized=True, batch_size=32)
        data.load_state_dict(state)
        assert indices(data.train_dataloader()) == indices(loader)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            (torch.ones(3), r"weights must have shape \(num_prompts,\) = \(4,\), got \(3,\)"),
            (torch.zeros(4), "one of them above 0"),
            (torch.tensor([1.0, -1, 1, 1]), "weights must be finite and >= 0"),
            (torch.tensor([1.0, float("nan"), 1, 1]), "weights must be finite and >= 0"),
        ],
    )
    def test_errors(self, weights: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            PrioritizedPromptSampler(4, 2).set_weights(weights)

    def test_no_prompts(self) -> None:
        with pytest.raises(ValueError, match="num_prompts must be >= 1, got 0"):
            PrioritizedPromptSampler(0, 2)


class Policy(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen.append(batch["index"].tolist())
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Skip(pl.Callback):
    """Draw nothing that the last batch had."""

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        weights = torch.ones(trainer.datamodule.num_prompts)
        weights[batch["index"]] = 0
        trainer.train_dataloader.sampler.set_weights(weights)


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_killed_and_resumed_draws_the_same(tmp_path: Path, stop: int) -> None:
    """In the middle of an epoch of four batches, at its end, and in the next."""

    def run(max_steps: int, ckpt_path: str | None = None) -> list[list[int]]:
        keeper = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        settings: dict[str, Any] = {"callbacks": [Skip(), keeper], "enable_checkpointing": True, "max_epochs": 100}
        policy = Policy()
        quiet_trainer(tmp_path, max_steps=max_steps, **settings).fit(
            policy, PromptDataModule(prioritized=True), ckpt_path=ckpt_path
        )
        return policy.seen

    seen = run(9)
    checkpoint = str(tmp_path / f"step={stop}.ckpt")
    assert torch.load(checkpoint, weights_only=True)["PromptDataModule"]["weights"].shape == (147,)
    assert run(9, checkpoint) == seen[stop:]
    assert all(set(last).isdisjoint(rows) for last, rows in pairwise(seen))  # nothing was drawn ahead


class TestSupervised:
    def test_labels(self, tokenizer: Any) -> None:
        rows = [("ab", "xyz", ["d"]), ("abcd", "x", ()), ("a", None, ())]
        with pytest.warns(UserWarning, match="prompts: 1 of 3 prompts have no answer, and are left out"):
            data = ready(prompts=rows, tokenizer=tokenizer, supervised="answer")
        batch = whole(data)
        ids, labels = batch["input_ids"], batch["labels"]
        assert batch.keys() == {"input_ids", "attention_mask", "labels"}
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
        assert tokenizer.batch_decode(ids) == ["abxyz<eos>", "abcdx<eos>"]
        assert torch.equal(labels >= 0, torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]).bool())
        assert torch.equal(labels[labels >= 0], ids[labels >= 0])
        assert labels[labels < 0].eq(-100).all()
        short = whole(ready(prompts=[("a", "b", ()), *rows[:1]], tokenizer=tokenizer, supervised="answer"))
        assert short["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
        assert short["labels"][0].tolist()[3:] == [-100] * 3

    def test_a_demonstration_is_drawn_in_every_epoch(self) -> None:
        rows = list(ArithmeticPrompts(teachers=3, teacher_error=1.0))
        given = {prompt: demonstrations for prompt, _, demonstrations in rows}

        def epoch(number: int, rank: int | None = None) -> list[str]:
            data = ready(prompts=rows, rank=rank, tokenizer="arithmetic", supervised="demonstration", batch_size=140)
            loader: Any = data.train_dataloader()
            loader.sampler.set_epoch(number)
            (batch,) = loader
            return data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)

        texts = epoch(0)
        assert all(text[4:] in given[text[:4]] for text in texts)
        chosen = [given[text[:4]].index(text[4:]) for text in texts]
        assert all(chosen.count(teacher) > 25 for teacher in range(3))
        assert epoch(0) == texts == epoch(0, 0) + epoch(0, 1)
        again = {text[:4]: text[4:] for text in epoch(1)}
        assert sum(again.get(text[:4], text[4:]) != text[4:] for text in texts) > 50

    def test_evaluation_takes_the_first_there_is(self, tokenizer: Any) -> None:
        rows = [("a", None, ["x", "y"]), ("b", None, [None, "z"])]
        data = ready(
            prompts=rows, val_prompts=rows, tokenizer=tokenizer, supervised="demonstration", answer_column=None
        )
        (batch,) = data.val_dataloader()
        assert tokenizer.batch_decode(batch["input_ids"]) == ["ax<eos>", "bz<eos>"]

    def test_trains_a_model_on_noisy_pairs(self, tmp_path: Path) -> None:
        from heliostat.lit_models.fine_tuning import FineTuning

        config = transformers.GPT2Config(vocab_size=17, n_positions=8, n_embd=16, n_layer=1, n_head=2)
        data = PromptDataModule(
            NoisyArithmetic(96), "arithmetic", supervised="answer", tokenizer="arithmetic", batch_size=32
        )
        trainer = quiet_trainer(tmp_path, max_epochs=1)
        trainer.fit(FineTuning(transformers.GPT2LMHeadModel(config)), data)
        assert trainer.global_step == 3
        assert trainer.callback_metrics["val/loss"].isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"answer_format": "math"}, "answer_format must be one of .*got 'math'"),
        ({"answer_format": "gsm8k", "answer_column": None}, "answer_format='gsm8k' needs an answer_column"),
        ({"supervised": "both"}, "supervised must be None or one of .*got 'both'"),
        ({"supervised": "answer", "answer_column": None}, "supervised='answer' needs an answer_column"),
        ({"supervised": "answer", "prioritized": True}, "prioritized=True is for prompts alone"),
        ({"demonstration_columns": "d"}, "lists with one entry for each teacher, got .*'d'"),
        ({"max_prompt_length": 0}, "must be >= 1, got 0 and 1024"),
        ({"val_fraction": 1.0}, "must be >= 0 and leave something for training"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptDataModule(**arguments)


class TestWrongData:
    def test_missing_column(self, tmp_path: Path, tokenizer: Any) -> None:
        file = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
        with pytest.raises(
            ValueError, match=r"line 1: no 'prompt'; the row has \['question', 'answer'\].*prompt_column"
        ):
            ready(prompts=file, tokenizer=tokenizer)
        with pytest.raises(FileNotFoundError, match=r"there is no file .*b\.jsonl"):
            ready(prompts=str(tmp_path / "b.jsonl"), tokenizer=tokenizer)

    def test_wrong_values(self, tokenizer: Any) -> None:
        with pytest.raises(ValueError, match=r"prompts, row 1: an answer must be text or a number, got \['a'\]"):
            ready(prompts=[("p", ["a"], ())], tokenizer=tokenizer)
        with pytest.raises(ValueError, match="prompts, row 1: a demonstration must be text, got 5"):
            ready(prompts=[("p", "a", [5])], tokenizer=tokenizer)

    def test_too_few_for_a_batch(self, tokenizer: Any) -> None:
        with pytest.raises(ValueError, match="batch_size=32 exceeds the 1 rows there are"):
            ready(prompts=[("p", "a", ())], tokenizer=tokenizer).train_dataloader()
        with pytest.raises(MisconfigurationException, match="num_prompts is known after"):
            _ = PromptDataModule().num_prompts


def test_recipes_can_build_it() -> None:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PromptDataModule, "data")
    source = {"class_path": "heliostat.datamodules.sources.arithmetic.ArithmeticPrompts", "init_args": {"teachers": 5}}
    init_args = {"prompts": source, "val_prompts": "arithmetic", "chat_template": True}
    spec = {"class_path": "heliostat.PromptDataModule", "init_args": init_args}
    data = parser.instantiate(parser.parse_object({"data": spec})).data
    assert data.prompts.teachers == 5
    assert (data.val_prompts, data.chat_template) == ("arithmetic", True)
