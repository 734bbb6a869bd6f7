r"""Verifiable rewards of completions, as plain callables on strings.

A reward is called with three lists of the same length, the prompts, the completions and the right answers, and returns
one number for each completion. Any function of that kind will do; those here are classes, so that a recipe can give
their settings. A reward that is NaN says that a completion could not be judged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

Reward = Callable[[list[str], list[str], list[str | None]], list[float]]

_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(  # a minus after a word or a bracket is subtraction
    rf"(?P<minus>(?<![\w)\]}}.])[-\u2212](?:\\?\$)?)?(?P<number>{_UNSIGNED})(?:\s*/\s*(?P<divisor>{_UNSIGNED}))?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_Source = Literal["any", "boxed", "hashes", "last"]


def compute_rewards(
    reward: Reward, prompts: list[str], completions: list[str], answers: list[str | None]
) -> list[float]:
    """Call a reward and check what it returns.

    Args:
        reward: Any reward.
        prompts: The prompt of each completion.
        completions: What is judged.
        answers: The right answer to each, None where it is not known.

    Returns:
        One number for each completion; NaN stays.

    Raises:
        ValueError: The lists differ in length, or the reward returned something else than a number for each completion.
    """
    if not len(prompts) == len(completions) == len(answers):
        raise ValueError(
            "prompts, completions and answers must have the same length, got "
            f"{len(prompts)}, {len(completions)} and {len(answers)}"
        )
    values = reward(prompts, completions, answers)
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        rewards = [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(f"the reward {name} must return a list of numbers, got {values!r:.200}") from None
    if len(rewards) != len(completions):
        raise ValueError(
            f"the reward {name} must return one number for each completion: got {len(rewards)} for {len(completions)}"
        )
    return rewards


class ExactMatch:
    """1 for a completion that is the answer, white space around both aside; else 0.

    Args:
        ignore_case: Take upper and lower case as the same.
    """

    def __init__(self, *, ignore_case: bool = False) -> None:
        self.ignore_case = ignore_case

    def __call__(self, prompts: list[str], completions: list[str], answers: list[str | None]) -> list[float]:
        """Judge; a ValueError if an answer is missing."""
        known = _known(answers, prompts, "ExactMatch")
        return [
            float(self._plain(completion) == self._plain(answer))
            for completion, answer in zip(completions, known, strict=True)
        ]

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()


class CharacterMatch:
    """The share of characters that stand where they stand in the answer: partial credit, from 0 to 1.

    White space around both is left aside, and the longer of the two counts as all characters.
    """

    def __call__(self, prompts: list[str], completions: list[str], answers: list[str | None]) -> list[float]:
        """Judge; a ValueError if an answer is missing."""
        rewards = []
        for completion, answer in zip(completions, _known(answers, prompts, "CharacterMatch"), strict=True):
            said, right = completion.strip(), answer.strip()
            same = sum(a == b for a, b in zip(said, right, strict=False))
            rewards.append(same / max(len(said), len(right), 1))
        return rewards


class RegexMatch:
    r"""1 for a completion in which a regular expression is found, else 0.

    If the expression has a group named ``answer``, the last match decides, and what the group holds must be the answer,
    white space around both aside: ``r"<answer>(?P<answer>.*?)</answer>"``.

    Args:
        pattern: Regular expression of Python. ``(?s)`` in front lets a dot match line breaks, and ``\A``, ``\Z`` are
            the ends of the completion.

    Raises:
        ValueError: It is no regular expression.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from error

    def __call__(self, prompts: list[str], completions: list[str], answers: list[str | None]) -> list[float]:
        """Judge; a ValueError if an answer is needed and missing."""
        if "answer" not in self.pattern.groupindex:
            return [float(self.pattern.search(completion) is not None) for completion in completions]
        rewards = []
        for completion, answer in zip(completions, _known(answers, prompts, "RegexMatch"), strict=True):
            found = [match["answer"] for match in self.pattern.finditer(completion)]
            rewards.append(float(bool(found) and (found[-1] or "").strip() == answer.strip()))
        return rewards


class NumericAnswer:
    r"""1 for a completion whose final number is that of the answer, else 0; 0 without a number.

    Numbers may have thousands separators, a decimal point, an exponent, or be fractions (``3/4``, ``\frac{3}{4}``).
    The answer is read in the same way, so a whole solution will do.

    Args:
        source: Where the final number stands: ``"boxed"``, in the last ``\boxed{}``; ``"hashes"``, after the last
            ``####`` (GSM8K's form); ``"last"``, the last number of all; ``"any"``, the first of these that there is.
        tolerance: Largest deviation, relative to the answer (absolute for answers below 1).

    Raises:
        ValueError: An unknown source or a negative tolerance.
    """

    def __init__(self, source: _Source = "any", *, tolerance: float = 1e-6) -> None:
        if source not in get_args(_Source):
            raise ValueError(f"source must be one of {get_args(_Source)}, got {source!r}")
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be >= 0, got {tolerance}")
        self.source: _Source = source
        self.tolerance = tolerance

    def __call__(self, prompts: list[str], completions: list[str], answers: list[str | None]) -> list[float]:
        """Judge; a ValueError if an answer is missing or holds no number."""
        rewards = []
        for row, (completion, answer) in enumerate(
            zip(completions, _known(answers, prompts, "NumericAnswer"), strict=True)
        ):
            right = final_number(answer)
            if right is None:
                raise ValueError(f"NumericAnswer: answers[{row}] holds no number: {answer!r:.200}")
            said = final_number(completion, self.source)
            rewards.append(float(said is not None and abs(said - right) <= self.tolerance * max(1.0, abs(right))))
        return rewards


class Length:
    """0 up to a length, then falling in a straight line to -1 (the soft overlong punishment of DAPO, arXiv 2503.14476).

    Args:
        soft_limit: Longest completion without punishment.
        limit: Shortest with all of it.
        unit: What is counted: ``"characters"`` or ``"words"``.

    Raises:
        ValueError: An unknown unit, or not ``0 <= soft_limit < limit``.
    """

    def __init__(self, soft_limit: int, limit: int, *, unit: Literal["characters", "words"] = "characters") -> None:
        if not 0 <= soft_limit < limit:
            raise ValueError(f"soft_limit and limit must be 0 <= soft_limit < limit, got {soft_limit} and {limit}")
        if unit not in ("characters", "words"):
            raise ValueError(f"unit must be 'characters' or 'words', got {unit!r}")
        self.soft_limit, self.limit, self.unit = soft_limit, limit, unit

    def __call__(self, prompts: list[str], completions: list[str], answers: list[str | None]) -> list[float]:
        """Judge; answers are not looked at."""
        lengths = [len(text) if self.unit == "characters" else len(text.split()) for text in completions]
        span = self.limit - self.soft_limit
        return [-min(1.0, max(0.0, (length - self.soft_limit) / span)) for length in lengths]


class WeightedSum:
    """A sum of rewards, each times its weight.

    Args:
        rewards: The rewards.
        weights: The weight of each; None: 1.

    Raises:
        ValueError: No rewards, or another number of weights, or one that is not finite.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if not rewards or len(weights) != len(rewards) or not all(map(math.isfinite, weights)):
            raise ValueError(
                f"rewards and weights must be as many, at least one, and weights finite, got {len(rewards)} rewards "
                f"and weights={weights}"
            )
        self.rewards, self.weights = list(rewards), weights

    def __call__(self, prompts: list[str], completions: list[str], answers: list[str | None]) -> list[float]:
        """Judge; a ValueError if a reward does not return a number for each completion."""
        parts = [compute_rewards(reward, prompts, completions, answers) for reward in self.rewards]
        return [
            sum(weight * value for weight, value in zip(self.weights, values, strict=True))
            for values in zip(*parts, strict=True)
        ]


def final_number(text: str, source: _Source = "any") -> float | None:
    r"""Find the number that a solution ends in.

    Args:
        text: The solution.
        source: Where it stands, as in `NumericAnswer`.

    Returns:
        The number; None if there is none at that place, or one divided by zero.
    """
    if source in ("any", "boxed"):
        boxed = _last_boxed(text)
        number = None if boxed is None else _last_number(boxed)
        if number is not None or source == "boxed":
            return number
    if source in ("any", "hashes"):
        _, hashes, rest = text.rpartition("####")
        number = _last_number(rest.strip().partition("\n")[0]) if hashes else None
        if number is not None or source == "hashes":
            return number
    return _last_number(text)


def _last_boxed(text: str) -> str | None:
    r"""Return what the last ``\boxed{}`` holds; None if it is not closed."""
    start = text.rfind(opening := r"\boxed{")
    if start < 0:
        return None
    start += len(opening)
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


def _last_number(text: str) -> float | None:
    text = _LATEX_FRACTION.sub(r"\1/\2", text).replace("{,}", ",")
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    last = found[-1]
    number, divisor = (float((last[part] or "1").replace(",", "")) for part in ("number", "divisor"))
    if divisor == 0 or not math.isfinite(number / divisor):
        return None
    return -number / divisor if last["minus"] else number / divisor


def _known(answers: list[str | None], prompts: list[str], reward: str) -> list[str]:
    known = [answer for answer in answers if answer is not None]
    if len(known) < len(answers):
        row = answers.index(None)
        raise ValueError(
            f"{reward} needs the answer to every prompt, but answers[{row}] is None (prompt {prompts[row]!r:.200}); "
            "leave prompts without answer out of the set, or use a reward that needs none"
        )
    return known
