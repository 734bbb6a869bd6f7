"""Prompts to post-train a language model on: with the answers that rewards need, and demonstrations of teachers."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from heliostat.datamodules.hub import check_columns, is_dataset, load_dataset
from heliostat.datamodules.loading import GlobalBatchSampler, ResumableLoader, loader_arguments
from heliostat.datamodules.readers import SUFFIXES, Row, read_rows
from heliostat.datamodules.sources.arithmetic import ArithmeticPrompts, NoisyArithmetic, arithmetic_tokenizer
from heliostat.datamodules.splits import check_fractions, split_groups
from heliostat.pretrained import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptRow = tuple[str, str | None, Sequence[str | None]]  # prompt, answer, demonstrations
PromptSource = str | Sequence[str] | Iterable[PromptRow] | ArithmeticPrompts | NoisyArithmetic

AnswerFormat = Literal["plain", "gsm8k"]
Supervised = Literal["answer", "demonstration"]

IGNORED = -100  # the label of tokens that are not to be learned, as in transformers

_COLUMN_ARGUMENTS = "prompt_column, answer_column and demonstration_columns"
_PARTS_OF = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("train",)}


class PromptDataModule(LightningDataModule):
    r"""Prompts for training, validation and test, for reinforcement learning or supervised.

    Each of ``prompts``, ``val_prompts`` and ``test_prompts`` is one of:

    - ``"arithmetic"``: 147 small sums, differences and products with three teachers
      (:mod:`heliostat.datamodules.sources.arithmetic`); needs no file and no download. Its ``ArithmeticPrompts`` with
      other teachers, or ``NoisyArithmetic``, will do as well.
    - a file, a glob pattern, or a list of them: .csv, .tsv, .json, .jsonl, .parquet; see
      :func:`~heliostat.datamodules.readers.read_rows`. GSM8K's files are read with ``prompt_column="question"`` and
      ``answer_format="gsm8k"``.
    - a directory that holds a Hugging Face data set (from ``save_to_disk``, or a folder of data files), or a data set's
      id on the Hub (``"openai/gsm8k"``).
    - in Python, any iterable of ``(prompt, answer, demonstrations)``.

    Batches of prompts, in all stages:

    - ``prompt_ids`` int64 and ``prompt_mask`` bool, ``(B, P)``: tokens, padded on the left to the longest of the batch.
    - ``prompt``: B strings, as the model sees them, after templates; ``answer``: B strings, or None.
    - ``index`` ``(B,)`` int64: position of the prompt in its set, from 0 to ``num_prompts - 1`` in training; the same
      in every epoch and run with the same set and settings. On several processes Lightning repeats some prompts in
      evaluation to give each process as many; drop repeated indices.
    - ``demonstration_ids`` int64 and ``demonstration_mask`` bool, ``(B, M, T)``: of each of M teachers, the tokens with
      EOS, padded on the right; all zero where ``demonstration_available`` ``(B, M)`` bool is false.

    With ``supervised`` they are instead ``input_ids``, ``attention_mask`` and ``labels``, ``(B, T)`` int64, padded on
    the right: prompt, target and EOS; labels are -100 on prompts and padding.

    All is read and tokenized at setup. What cannot be used is left out and counted in a warning: empty prompts, prompts
    and demonstrations that are too long (nothing is ever cut off), and under ``supervised`` prompts without target.
    Training batches depend on ``seed`` and the epoch, not on the number of processes, and a resumed run goes on at the
    next one.

    Args:
        prompts: Training prompts.
        val_prompts: Validation prompts; None: a part of ``prompts``.
        test_prompts: Test prompts; None: a part of ``prompts``.
        prompt_column: Column of the prompts (a position, for .csv and .tsv without a header). A prompt is a text, or a
            conversation: a list of messages with ``role`` and ``content``.
        answer_column: Column of the answers, texts or numbers; None: there are none.
        answer_format: ``"plain"``: the answer as it stands. ``"gsm8k"``: a solution that ends in ``#### number``; the
            number, without commas, is the answer, and the whole text is the first demonstration.
        demonstration_columns: Columns of demonstrations, one for each teacher; what is null or empty is missing. If it
            is a single column, its values may be lists.
        teacher_files: Files with demonstrations for ``prompts``, one file (or pattern) for each further teacher, with
            ``prompt_column`` and ``teacher_column``; they are matched by the text of the prompt.
        teacher_column: Column of the demonstrations in these.
        splits: Splits of a Hugging Face data set for ``prompts``, ``val_prompts`` and ``test_prompts``.
        encoding: Encoding of text files.
        val_fraction: Share of ``prompts`` for validation, if ``val_prompts`` is None; 0: no validation. Equal prompts
            stay together.
        test_fraction: The same for test.
        split_seed: Seed of the parts. Not ``seed``, so that runs of several seeds compare on the same ones.
        tokenizer: None: the attribute ``tokenizer`` of the LightningModule, so that the two cannot disagree; if it has
            none, arithmetic prompts take their own. Or a tokenizer; or ``"arithmetic"``, a directory or a Hub id to
            load one from. After setup, the attribute of this name is the tokenizer.
        pad_with_eos: Pad with EOS if the tokenizer has no padding token, which sets it in the tokenizer. Masks, not
            tokens, say what is padding.
        prompt_template: Text with ``{}`` for the prompt, such as ``"Question: {}\nAnswer:"``.
        chat_template: Make each prompt a conversation by the tokenizer's chat template (True) or another one (a text in
            Jinja). False: the prompt is text to go on with.
        system_prompt: System message of the conversations.
        max_prompt_length: Longest prompt in tokens, after templates.
        max_demonstration_length: Longest demonstration, or target of ``supervised``, in tokens with EOS; longer ones
            count as missing.
        supervised: Give prompts with a target, for `heliostat.lit_models.fine_tuning.FineTuning`: ``"answer"``; or
            ``"demonstration"``, of which one is drawn in every epoch, and in evaluation the first is taken.
        prioritized: Draw training prompts in proportion to weights, equal at first, by `PrioritizedPromptSampler`.
        batch_size: Training prompts in a batch, over all processes together. The last, incomplete batch is dropped.
        eval_batch_size: Prompts in a batch of each process in validation, test and predict.
        seed: Seed of the order of training prompts, and of what is drawn.

    Attributes:
        num_prompts: Number of training prompts, known after setup for fit or predict.
        prompts_fingerprint: Stands for their tokens, in order; known like ``num_prompts``.

    Raises:
        ValueError: An argument out of range, or without effect; a tokenizer without EOS, padding or chat template; or,
            when the data are read, a missing column, a malformed row, or no prompt that can be used.
        FileNotFoundError: A file or data set that is not there.
        MisconfigurationException: There is no tokenizer.
    """

    def __init__(
        self,
        prompts: PromptSource = "arithmetic",
        val_prompts: PromptSource | None = None,
        test_prompts: PromptSource | None = None,
        *,
        prompt_column: int | str = "prompt",
        answer_column: int | str | None = "answer",
        answer_format: AnswerFormat = "plain",
        demonstration_columns: Sequence[int | str] = (),
        teacher_files: Sequence[str] = (),
        teacher_column: int | str = "completion",
        splits: tuple[str, str, str] = ("train", "validation", "test"),
        encoding: str = "utf-8",
        val_fraction: float = 0.0,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        pad_with_eos: bool = False,
        prompt_template: str = "{}",
        chat_template: bool | str = False,
        system_prompt: str | None = None,
        max_prompt_length: int = 512,
        max_demonstration_length: int = 1024,
        supervised: Supervised | None = None,
        prioritized: bool = False,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_fractions(val_fraction, test_fraction)
        if answer_format not in get_args(AnswerFormat):
            raise ValueError(f"answer_format must be one of {get_args(AnswerFormat)}, got {answer_format!r}")
        if answer_format == "gsm8k" and answer_column is None:
            raise ValueError("answer_format='gsm8k' needs an answer_column, got None")
        if supervised not in (None, *get_args(Supervised)):
            raise ValueError(f"supervised must be None or one of {get_args(Supervised)}, got {supervised!r}")
        if supervised == "answer" and answer_column is None:
            raise ValueError("supervised='answer' needs an answer_column, got None")
        if supervised and prioritized:
            raise ValueError("prioritized=True is for prompts alone; give supervised=None, or prioritized=False")
        if isinstance(teacher_files, str) or isinstance(demonstration_columns, str):
            raise ValueError(
                "teacher_files and demonstration_columns are lists with one entry for each teacher, got "
                f"{teacher_files!r} and {demonstration_columns!r}"
            )
        if "{}" not in prompt_template:
            raise ValueError(f"prompt_template must have {{}} for the prompt, got {prompt_template!r}")
        if system_prompt is not None and not chat_template:
            raise ValueError(
                "system_prompt has no effect without chat_template; give chat_template=True, or put it into "
                "prompt_template"
            )
        if min(max_prompt_length, max_demonstration_length) < 1:
            raise ValueError(
                "max_prompt_length and max_demonstration_length must be >= 1, got "
                f"{max_prompt_length} and {max_demonstration_length}"
            )
        self.prompts, self.val_prompts, self.test_prompts = prompts, val_prompts, test_prompts
        self.prompt_column, self.answer_column, self.answer_format = prompt_column, answer_column, answer_format
        self.demonstration_columns = list(demonstration_columns)
        self.teacher_files, self.teacher_column = list(teacher_files), teacher_column
        self.splits = splits
        self.encoding = encoding
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed
        self.tokenizer: Any = tokenizer
        self.pad_with_eos = pad_with_eos
        self.prompt_template, self.chat_template, self.system_prompt = prompt_template, chat_template, system_prompt
        self.max_prompt_length, self.max_demonstration_length = max_prompt_length, max_demonstration_length
        self.supervised = supervised
        self.prioritized = prioritized
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed = seed
        self._sets: dict[str, list[_Prompt]] = {}
        self._sampler_state: dict[str, Any] = {}
        self._sampler: PrioritizedPromptSampler | None = None

    @property
    def num_prompts(self) -> int:
        """Number of training prompts."""
        if "train" not in self._sets:
            raise MisconfigurationException("num_prompts is known after setup('fit') or setup('predict')")
        return len(self._sets["train"])

    @cached_property
    def prompts_fingerprint(self) -> int:
        """A hash of the training prompts' tokens, in order."""
        if "train" not in self._sets:
            raise MisconfigurationException("prompts_fingerprint is known after setup('fit') or setup('predict')")
        digest = hashlib.blake2b(digest_size=8)
        for prompt in self._sets["train"]:
            digest.update(array("q", [len(prompt.ids), *prompt.ids]))
        return int.from_bytes(digest.digest(), "little", signed=True)

    def setup(self, stage: str) -> None:
        """Read and tokenize what the stage needs, once."""
        self._prepare_tokenizer()
        for name in _PARTS_OF[stage]:
            if name not in self._sets and (examples := self._examples(name)) is not None:
                self._sets[name] = self._encode(name, examples)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, or drawn, batches of ``batch_size`` prompts over all processes."""
        rows = self._sets["train"]
        ranks = {
            "num_replicas": self.trainer.world_size if self.trainer else 1,
            "rank": self.trainer.global_rank if self.trainer else 0,
        }
        sampler: GlobalBatchSampler
        if self.prioritized:
            state = self.state_dict()
            sampler = self._sampler = PrioritizedPromptSampler(len(rows), self.batch_size, seed=self.seed, **ranks)
            if state:
                self._load_weights(state)
        else:
            keyed = self.supervised == "demonstration"
            sampler = GlobalBatchSampler(rows, self.batch_size, seed=self.seed, keyed=keyed, **ranks)
        return ResumableLoader(
            self._dataset("train"),
            batch_size=sampler.local_batch_size,
            sampler=sampler,
            collate_fn=self._collate,
            **loader_arguments(0, self.seed),
        )

    def val_dataloader(self) -> DataLoader | list:
        """Validation prompts in order; no loader if there are none."""
        return self._ordered_loader("val")

    def test_dataloader(self) -> DataLoader | list:
        """Test prompts in order; no loader if there are none."""
        return self._ordered_loader("test")

    def predict_dataloader(self) -> DataLoader | list:
        """Training prompts in order."""
        return self._ordered_loader("train")

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of prioritized drawing, and of which prompts they are."""
        if self._sampler is None:
            return self._sampler_state
        return {**self._sampler.state_dict(), "prompts_fingerprint": self.prompts_fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Draw with the weights of ``state_dict``.

        Raises:
            MisconfigurationException: They are of other prompts. Where these are not known yet, it comes later.
        """
        self._sampler_state = state_dict
        if self._sampler:
            self._load_weights(state_dict)

    def _load_weights(self, state: dict[str, Any]) -> None:
        assert self._sampler is not None
        if state["prompts_fingerprint"] != self.prompts_fingerprint:
            raise MisconfigurationException(
                "the checkpoint's weights of prioritized drawing are of other training prompts than PromptDataModule "
                "has (their tokens or their order differ): train on the same ones, or begin anew"
            )
        self._sampler.load_state_dict(state)

    def _ordered_loader(self, name: str) -> DataLoader | list:
        if name not in self._sets:
            return []  # Lightning's word for no loader
        return DataLoader(
            self._dataset(name),
            batch_size=self.eval_batch_size,
            collate_fn=self._collate,
            **loader_arguments(0, self.seed),
        )

    def _dataset(self, name: str) -> Any:
        rows = self._sets[name]  # a list is a data set to DataLoader
        return _Pairs(rows) if self.supervised else rows

    def _collate(self, rows: list[Any]) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id
        return _pair_batch(rows, pad) if self.supervised else _prompt_batch(rows, pad)

    def _prepare_tokenizer(self) -> None:
        tokenizer = self.tokenizer
        if tokenizer is None:
            module = self.trainer.lightning_module if self.trainer else None
            tokenizer = getattr(module, "tokenizer", None)
            if tokenizer is None and _is_arithmetic(self.prompts):
                tokenizer = "arithmetic"
            if tokenizer is None:
                found = "there is none (no Trainer)" if module is None else f"{type(module).__name__} has none"
                raise MisconfigurationException(
                    "PromptDataModule(tokenizer=None) takes the attribute `tokenizer` of the LightningModule, but "
                    f"{found}. Pass tokenizer= a tokenizer, a directory, or a Hub id"
                )
        if isinstance(tokenizer, str):
            tokenizer = arithmetic_tokenizer() if tokenizer == "arithmetic" else load_tokenizer(tokenizer)
        name = tokenizer.name_or_path
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {name!r} has no EOS token, without which no completion ends; set the one that the "
                "model was trained with, for example tokenizer.eos_token = '</s>'"
            )
        if tokenizer.pad_token_id is None:
            if not self.pad_with_eos:
                raise ValueError(
                    f"the tokenizer {name!r} has no padding token, which batches need; set tokenizer.pad_token, or "
                    f"pass pad_with_eos=True to pad with its EOS token {tokenizer.eos_token!r}"
                )
            tokenizer.pad_token = tokenizer.eos_token
        if self.chat_template is True and tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer {name!r} has no chat template, which chat_template=True asks for; pass one as "
                "chat_template= a text in Jinja, or False to give the model the prompts as they are"
            )
        self.tokenizer = tokenizer

    def _examples(self, name: str) -> list[_Example] | None:
        argument, source, split, fraction = {
            "train": ("prompts", self.prompts, self.splits[0], 1.0),
            "val": ("val_prompts", self.val_prompts, self.splits[1], self.val_fraction),
            "test": ("test_prompts", self.test_prompts, self.splits[2], self.test_fraction),
        }[name]
        if name != "train" and source is not None:
            return list(self._read(argument, source, split))
        return self._training_parts[name] if fraction else None

    @cached_property
    def _training_parts(self) -> dict[str, list[_Example]]:
        """What ``prompts`` holds, divided."""
        examples = list(self._read("prompts", self.prompts, self.splits[0]))
        if self.teacher_files:
            examples = self._add_teachers(examples)
        val = 0.0 if self.val_prompts is not None else self.val_fraction
        test = 0.0 if self.test_prompts is not None else self.test_fraction
        groups: dict[str, list[int]] = {}
        for row, example in enumerate(examples):
            groups.setdefault(str(example.prompt), []).append(row)
        parts = split_groups(list(groups.values()), val, test, self.split_seed)
        return {
            name: [examples[row] for row in rows] for name, rows in zip(("train", "val", "test"), parts, strict=True)
        }

    def _read(self, argument: str, source: Any, split: str) -> Iterator[_Example]:
        if isinstance(source, str) and source == "arithmetic":
            source = ArithmeticPrompts()
        columns = [self.prompt_column, *([] if self.answer_column is None else [self.answer_column])]
        columns += self.demonstration_columns
        rows: Iterable[Row]
        if is_dataset(source, SUFFIXES):
            data = load_dataset(source, split, argument, streaming=False)
            check_columns(data.column_names, columns, f"{argument}={source!r}", _COLUMN_ARGUMENTS)
            data = data.select_columns(columns)
            place = f"{source} ({split})"
            rows = (Row(tuple(row[c] for c in columns), place, number) for number, row in enumerate(data, 1))
        elif _is_paths(source):
            rows = read_rows(source, columns, encoding=self.encoding, argument=_COLUMN_ARGUMENTS)
        else:
            for number, (prompt, answer, demonstrations) in enumerate(source, 1):
                where = f"{argument}, row {number}"
                yield _Example(prompt, _answer(answer, where), [_text(d, where) for d in demonstrations], where)
            return
        for row in rows:
            yield self._example(row)

    def _example(self, row: Row) -> _Example:
        prompt, *values = row.values
        answer = _answer(values.pop(0), row.where) if self.answer_column is not None else None
        if len(values) == 1 and isinstance(values[0], (list, tuple)):
            values = list(values[0])
        demonstrations = [_text(value, row.where) for value in values]
        if self.answer_format == "gsm8k" and answer is not None:
            _, hashes, number = answer.rpartition("####")
            if not hashes or not number.strip():
                raise ValueError(
                    f"{row.where}: answer_format='gsm8k' needs a solution that ends in '#### number', got "
                    f"{answer!r:.200}"
                )
            demonstrations.insert(0, answer)
            answer = number.strip().replace(",", "")
        return _Example(prompt, answer, demonstrations, row.where)

    def _add_teachers(self, examples: list[_Example]) -> list[_Example]:
        own = max((len(example.demonstrations) for example in examples), default=0)
        added: list[list[str | None]] = [
            [*example.demonstrations, *[None] * (own - len(example.demonstrations))] for example in examples
        ]
        for number, file in enumerate(self.teacher_files):
            said: dict[str, str] = {}
            repeated = unknown = empty = total = 0
            known = {example.prompt for example in examples if isinstance(example.prompt, str)}
            columns = [self.prompt_column, self.teacher_column]
            for row in read_rows(file, columns, encoding=self.encoding, argument="prompt_column and teacher_column"):
                prompt, demonstration = (_text(value, row.where) for value in row.values)
                total += 1
                if prompt is None or demonstration is None:
                    empty += 1
                    continue
                unknown += prompt not in known
                repeated += prompt in said
                said.setdefault(prompt, demonstration)
            source = f"teacher_files[{number}]={file!r}"
            _warn_of(empty, total, source, "demonstrations are empty, and count as missing")
            _warn_of(unknown, total, source, "demonstrations are for prompts that `prompts` does not have, and unused")
            _warn_of(repeated, total, source, "demonstrations repeat a prompt, of which only the first is used")
            for demonstrations, example in zip(added, examples, strict=True):
                demonstrations.append(said.get(example.prompt) if isinstance(example.prompt, str) else None)
        return [example._replace(demonstrations=d) for example, d in zip(examples, added, strict=True)]

    def _encode(self, name: str, examples: list[_Example]) -> list[_Prompt]:
        """Apply templates, tokenize, and leave out what cannot be used."""
        argument, total = {"train": "prompts", "val": "val_prompts", "test": "test_prompts"}[name], len(examples)
        if self.supervised == "answer":
            examples = [example._replace(demonstrations=[example.answer]) for example in examples]
        elif self.answer_column is not None:
            unanswered = sum(example.answer is None for example in examples)
            _warn_of(unanswered, total, argument, "prompts have no answer")
        filled = [e for e in examples if (e.prompt.strip() if isinstance(e.prompt, str) else e.prompt)]
        _warn_of(total - len(filled), total, argument, "prompts are empty, and left out")
        texts = [self._render(example) for example in filled]
        prompts = self._tokenize(texts, add_special_tokens=not self.chat_template)
        if not self.chat_template and texts and prompts[0][-1:] == [self.tokenizer.eos_token_id]:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name_or_path!r} puts EOS behind a prompt, after which there is nothing "
                "to say; load it with add_eos_token=False"
            )
        kept = [i for i, ids in enumerate(prompts) if len(ids) <= self.max_prompt_length]
        _warn_of(
            len(filled) - len(kept),
            total,
            argument,
            f"prompts are longer than max_prompt_length={self.max_prompt_length} tokens (up to "
            f"{max(map(len, prompts), default=0)}), and left out",
        )
        teachers = max((len(filled[i].demonstrations) for i in kept), default=0)
        demonstrations = self._tokenize_demonstrations(argument, [filled[i].demonstrations for i in kept], teachers)
        if self.supervised:
            targeted = [i for i, given in enumerate(demonstrations) if any(given)]
            _warn_of(len(kept) - len(targeted), total, argument, f"prompts have no {self.supervised}, and are left out")
            kept, demonstrations = [kept[i] for i in targeted], [demonstrations[i] for i in targeted]
        if not kept:
            raise ValueError(f"{argument} has no prompt that can be used, of {total}")
        return [
            _Prompt(position, texts[i], prompts[i], filled[i].answer, given)
            for position, (i, given) in enumerate(zip(kept, demonstrations, strict=True))
        ]

    def _render(self, example: _Example) -> str:
        """Return what the model sees of a prompt."""
        prompt = example.prompt
        if isinstance(prompt, str):
            text = self.prompt_template.replace("{}", prompt)
            if not self.chat_template:
                return text
            messages: list[Any] = [{"role": "user", "content": text}]
        elif isinstance(prompt, (list, tuple)) and all(isinstance(m, dict) and "role" in m for m in prompt):
            if not self.chat_template or self.prompt_template != "{}":
                raise ValueError(
                    f"{example.where}: the prompt is a conversation, which needs chat_template=True (or a template) "
                    "and no prompt_template"
                )
            messages = list(prompt)
        else:
            raise ValueError(f"{example.where}: a prompt must be text or a list of messages, got {prompt!r:.200}")
        if self.system_prompt is not None:
            if any(message["role"] == "system" for message in messages):
                raise ValueError(f"{example.where}: the prompt has a system message; give no system_prompt")
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        template = self.chat_template if isinstance(self.chat_template, str) else None
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        if self.system_prompt is not None and self.system_prompt.strip() not in text:
            raise ValueError(
                f"the chat template passes over system messages; put system_prompt={self.system_prompt!r:.200} into "
                "prompt_template"
            )
        return text

    def _tokenize(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        unique = list(dict.fromkeys(texts))
        if not unique:
            return []
        ids = self.tokenizer(unique, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        tokens = dict(zip(unique, ids, strict=True))
        return [tokens[text] for text in texts]

    def _tokenize_demonstrations(
        self, argument: str, demonstrations: list[Sequence[str | None]], teachers: int
    ) -> list[list[list[int]]]:
        """Return for each prompt the tokens of each teacher, none where it is missing."""
        eos, longest = self.tokenizer.eos_token_id, self.max_demonstration_length
        tokens: list[list[list[int]]] = [[[] for _ in range(teachers)] for _ in demonstrations]
        places = {(i, j): text for i, given in enumerate(demonstrations) for j, text in enumerate(given) if text}
        too_long = 0
        for (i, j), ids in zip(places, self._tokenize(list(places.values()), add_special_tokens=False), strict=True):
            ids = ids if ids[-1:] == [eos] else [*ids, eos]
            if len(ids) <= longest:
                tokens[i][j] = ids
            else:
                too_long += 1
        what = f"demonstrations are longer than max_demonstration_length={longest} tokens, and count as missing"
        _warn_of(too_long, len(places), argument, what)
        return tokens


class PrioritizedPromptSampler(GlobalBatchSampler):
    """Draw every batch of prompts in proportion to weights that may change from batch to batch.

    Single-stream Policy Optimization (arXiv 2509.13232) draws prompts by the spread that it expects of their rewards.
    The batch is drawn once for all processes, and each yields its slice of it, so ``set_weights`` must be called with
    the same weights on all. A prompt comes once in a batch, unless there are fewer with a weight above 0 than the batch
    has rows; then all are drawn with replacement. An epoch has as many batches as prompts fill, one at least.

    A batch depends on seed, epoch, its number in the epoch and the weights when its first row is asked for. Weights set
    while the last batch is trained on therefore hold for the next one, provided that nothing is loaded ahead: give the
    loader no workers. From ``on_train_start`` on, the sampler is ``trainer.train_dataloader.sampler``. Set weights in
    ``training_step`` or in a callback's ``on_train_batch_end``; a module's own comes after checkpoints are saved.

    Args:
        num_prompts: Number of prompts.
        batch_size: Rows of all processes together.
        num_replicas: Number of processes.
        rank: This process.
        seed: Seed of the draws, together with the epoch.

    Raises:
        ValueError: ``batch_size`` is not a positive multiple of ``num_replicas``, or there are no prompts.
    """

    def __init__(
        self, num_prompts: int, batch_size: int, *, num_replicas: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be >= 1, got {num_prompts}")
        rows = range(max(num_prompts, batch_size))
        super().__init__(rows, batch_size, num_replicas=num_replicas, rank=rank, seed=seed)
        self.weights = torch.ones(num_prompts, dtype=torch.float64)

    def set_weights(self, weights: Tensor) -> None:
        """Draw the batches that follow in proportion to ``weights`` ``(num_prompts,)``, of any scale.

        Raises:
            ValueError: Another shape, a weight that is negative or not finite, or none above 0.
        """
        weights = weights.detach().to("cpu", torch.float64)
        if weights.shape != self.weights.shape:
            raise ValueError(
                f"weights must have shape (num_prompts,) = {tuple(self.weights.shape)}, got {tuple(weights.shape)}"
            )
        if not (weights.isfinite().all() and (weights >= 0).all() and weights.any()):
            raise ValueError("weights must be finite and >= 0, and one of them above 0")
        self.weights = weights.clone()

    def __iter__(self) -> Iterator[int]:
        for batch in range(self.first_batch, self.num_batches):
            start = self.rank * self.local_batch_size
            yield from self._draw(batch)[start : start + self.local_batch_size]

    def _draw(self, batch: int) -> list[int]:
        generator = self._generator(0x9E3779B1 * (batch + 1))
        replacement = int(self.weights.count_nonzero()) < self.batch_size
        return torch.multinomial(self.weights, self.batch_size, replacement, generator=generator).tolist()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights; the place in the epoch is the loader's."""
        return {"weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take up the weights of ``state_dict``."""
        self.set_weights(state_dict["weights"])


class _Example(NamedTuple):
    """A prompt as it was read."""

    prompt: Any  # a text, or the messages of a conversation
    answer: str | None
    demonstrations: Sequence[str | None]
    where: str


class _Prompt(NamedTuple):
    """A prompt as the model sees it."""

    position: int  # in its set
    text: str
    ids: list[int]
    answer: str | None
    demonstrations: list[list[int]]  # of each teacher, with EOS; empty where it is missing


class _Pairs:
    """Prompts, each with one of its demonstrations."""

    def __init__(self, rows: list[_Prompt]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int | tuple[int, int]) -> tuple[list[int], list[int]]:
        row, key = place if isinstance(place, tuple) else (place, 0)  # without key, in evaluation: the first
        given = [ids for ids in self.rows[row].demonstrations if ids]
        return self.rows[row].ids, given[key % len(given)]


def _prompt_batch(rows: list[_Prompt], pad: int) -> dict[str, Any]:
    given = [ids for row in rows for ids in row.demonstrations]
    available = torch.tensor([bool(ids) for ids in given], dtype=torch.bool)
    prompt_ids, prompt_mask = _padded([row.ids for row in rows], pad, left=True)
    ids, mask = _padded(given, pad)
    ids[~available] = 0
    shape = (len(rows), len(rows[0].demonstrations))  # (B, M)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "prompt": [row.text for row in rows],
        "answer": [row.answer for row in rows],
        "index": torch.tensor([row.position for row in rows]),
        "demonstration_ids": ids.view(*shape, ids.shape[1]),
        "demonstration_mask": mask.view(*shape, ids.shape[1]),
        "demonstration_available": available.view(shape),
    }


def _pair_batch(rows: list[tuple[list[int], list[int]]], pad: int) -> dict[str, Any]:
    ids, mask = _padded([prompt + target for prompt, target in rows], pad)
    labels, _ = _padded([[IGNORED] * len(prompt) + target for prompt, target in rows], IGNORED)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def _padded(rows: list[list[int]], pad: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return tokens ``(N, T)`` with T >= 1, and the mask of those that are no padding."""
    ids = torch.full((len(rows), max([1, *map(len, rows)])), pad)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        place = slice(ids.shape[1] - len(tokens), None) if left else slice(len(tokens))
        ids[row, place] = torch.tensor(tokens, dtype=ids.dtype)
        mask[row, place] = True
    return ids, mask


def _is_arithmetic(source: Any) -> bool:
    return isinstance(source, (ArithmeticPrompts, NoisyArithmetic)) or (
        isinstance(source, str) and source == "arithmetic"
    )


def _is_paths(source: Any) -> bool:
    return isinstance(source, (str, Path)) or (
        isinstance(source, (list, tuple)) and all(isinstance(path, (str, Path)) for path in source)
    )


def _answer(value: object, where: str) -> str | None:
    """Check that an answer is text or a number; null and empty texts are None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return None if math.isnan(value) else str(value)
    return _text(value, where, "an answer must be text or a number")


def _text(value: object, where: str, rule: str = "a demonstration must be text") -> str | None:
    """Check that a value is text; null and empty texts are None."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: {rule}, got {value!r:.200}")
    return value


def _warn_of(number: int, total: int, source: str, what: str) -> None:
    if number:
        rank_zero_warn(f"{source}: {number} of {total} {what}")
