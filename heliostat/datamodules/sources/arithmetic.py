"""Sums, differences and products of small numbers: prompts whose answers a program can check, with wrong teachers.

A prompt is ``3*4=``, with numbers from 0 to 6 and one of ``+``, ``-``, ``*``, 147 in all; its answer is the result in
two digits without sign, ``12``. Teachers answer too, each wrong on prompts of its own. A model that has seen mostly
right sums, half right differences and random products makes prompts of three degrees of difficulty: post-training has
something to keep, something to sharpen, and something that it can hardly find by itself.
"""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heliostat._extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = tuple[str, str, tuple[str, ...]]  # prompt, answer, a demonstration of each teacher

OPERATIONS = "+-*"
PAD, EOS = range(2)

_HIGHEST = 6
_RESULTS = range(_HIGHEST * _HIGHEST + 1)
_PROMPT_LENGTH = 4
_CHARACTERS = "0123456789+-*="


class ArithmeticPrompts:
    """The 147 prompts with their answers and teachers' demonstrations, in a fixed order.

    Iterating gives ``(prompt, answer, demonstrations)``.

    Args:
        teachers: How many teachers there are.
        teacher_error: Share of the prompts on which each teacher is wrong. Which they are, and what it answers instead,
            is its own and stays the same.
        seed: Of the teachers' errors.

    Raises:
        ValueError: A negative number of teachers, or a share outside [0, 1].
    """

    def __init__(self, *, teachers: int = 3, teacher_error: float = 0.35, seed: int = 0) -> None:
        if teachers < 0:
            raise ValueError(f"teachers must be >= 0, got {teachers}")
        if not 0 <= teacher_error <= 1:
            raise ValueError(f"teacher_error must be a share from 0 to 1, got {teacher_error}")
        self.teachers, self.teacher_error, self.seed = teachers, teacher_error, seed

    def __iter__(self) -> Iterator[Row]:
        problems = _problems()
        columns = [self._demonstrations([answer for *_, answer in problems], i) for i in range(self.teachers)]
        for row, (prompt, _, answer) in enumerate(problems):
            yield prompt, _digits(answer), tuple(_digits(column[row]) for column in columns)

    def _demonstrations(self, answers: list[int], teacher: int) -> list[int]:
        rng = random.Random(f"{self.seed} {teacher}")
        demonstrations = list(answers)
        for row in rng.sample(range(len(answers)), round(self.teacher_error * len(answers))):
            demonstrations[row] = rng.choice([number for number in _RESULTS if number != answers[row]])
        return demonstrations


class NoisyArithmetic:
    """Prompts drawn at random, with answers that are often wrong: to pre-train a model that is to be improved.

    Iterating gives ``(prompt, answer, ())``. An answer is right with a probability that belongs to the operation, and
    else a random number from 0 to 36, which may happen to be right.

    Args:
        n: How many; the default makes 300 batches of 128.
        addition: Probability that the answer to a sum is right.
        subtraction: The same for a difference.
        multiplication: The same for a product.
        seed: Of all draws.

    Raises:
        ValueError: No rows, or a probability outside [0, 1].
    """

    def __init__(
        self,
        n: int = 38_400,
        *,
        addition: float = 0.9,
        subtraction: float = 0.5,
        multiplication: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.accuracy = dict(zip(OPERATIONS, (addition, subtraction, multiplication), strict=True))
        if n < 1 or not all(0 <= accuracy <= 1 for accuracy in self.accuracy.values()):
            raise ValueError(
                "n must be >= 1, and addition, subtraction and multiplication from 0 to 1, got "
                f"n={n}, {addition}, {subtraction}, {multiplication}"
            )
        self.n, self.seed = n, seed

    def __iter__(self) -> Iterator[Row]:
        rng, problems = random.Random(self.seed), _problems()
        for _ in range(self.n):
            prompt, operation, answer = rng.choice(problems)
            right = rng.random() < self.accuracy[operation]
            yield prompt, _digits(answer if right else rng.choice(_RESULTS)), ()


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of transformers with a token for every character of the prompts, padding, EOS and unknown ones.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    purpose = "The tokenizer of the arithmetic prompts"
    tokenizers, transformers = require("tokenizers", purpose), require("transformers", purpose)
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocabulary = {token: i for i, token in enumerate([*special.values(), *_CHARACTERS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token=special["unk_token"]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )


def arithmetic_model(
    seed: int = 0,
    *,
    addition: float = 0.9,
    subtraction: float = 0.5,
    multiplication: float = 0.0,
    steps: int = 300,
    dim: int = 64,
    num_layers: int = 1,
) -> nn.Module:
    """Train a tiny model on `NoisyArithmetic`: some seconds on one core.

    It answers about half of the prompts rightly by its likeliest answer. Random numbers outside are left alone, and the
    same arguments give the same weights again, at once in the same process.

    Args:
        seed: Of its initial weights and its training.
        addition: Probability that the answer to a sum is right in its training.
        subtraction: The same for a difference.
        multiplication: The same for a product.
        steps: Batches of 128 rows that it is trained on.
        dim: Width; a multiple of 4.
        num_layers: Blocks.

    Returns:
        A ``GPT2LMHeadModel`` of transformers without dropout, for up to 16 tokens of `arithmetic_tokenizer`, in eval
        mode; 52,000 parameters by default.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: As for `NoisyArithmetic`.
    """
    return copy.deepcopy(_arithmetic_model(seed, addition, subtraction, multiplication, steps, dim, num_layers))


@cache
def _arithmetic_model(
    seed: int, addition: float, subtraction: float, multiplication: float, steps: int, dim: int, num_layers: int
) -> nn.Module:
    transformers = require("transformers", "Building the arithmetic model")
    accuracy = {"addition": addition, "subtraction": subtraction, "multiplication": multiplication}
    prompts, answers, _ = zip(*NoisyArithmetic(128 * steps, **accuracy, seed=seed), strict=True)
    tokens = arithmetic_tokenizer()([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    ids = F.pad(torch.tensor(tokens["input_ids"]), (0, 1), value=EOS)
    config = transformers.GPT2Config(
        vocab_size=3 + len(_CHARACTERS),
        n_positions=16,
        n_embd=dim,
        n_layer=num_layers,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        torch.set_num_threads(1)  # sums, and so weights, do not depend on the number of cores then
        try:
            model = transformers.GPT2LMHeadModel(config)
            _train(model, ids, steps)
        finally:
            torch.set_num_threads(threads)
    return model.eval()


def _train(model: Any, ids: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for batch in ids.chunk(steps):
        logits = model(input_ids=batch[:, :-1]).logits[:, _PROMPT_LENGTH - 1 :]
        optimizer.zero_grad()
        F.cross_entropy(logits.mT, batch[:, _PROMPT_LENGTH:]).backward()
        optimizer.step()
        schedule.step()


@cache
def _problems() -> list[tuple[str, str, int]]:
    """Prompt, operation and result of all."""
    results = {"+": operator.add, "-": lambda x, y: abs(x - y), "*": operator.mul}
    numbers = range(_HIGHEST + 1)
    return [(f"{x}{sign}{y}=", sign, results[sign](x, y)) for sign in OPERATIONS for x, y in product(numbers, numbers)]


def _digits(number: int) -> str:
    return f"{number:02d}"
