from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from heliostat.rewards import (
    CharacterMatch,
    ExactMatch,
    Length,
    NumericAnswer,
    RegexMatch,
    Reward,
    WeightedSum,
    compute_rewards,
    final_number,
)


def judge(reward: Reward, pairs: list[tuple[str, str | None]]) -> list[float]:
    completions, answers = zip(*pairs, strict=True)
    return reward(["prompt"] * len(pairs), list(completions), list(answers))


def test_exact_match() -> None:
    pairs: list[tuple[str, str | None]] = [(" 07\n", "07"), ("7", "07"), ("", "07"), ("Yes", "yes")]
    assert judge(ExactMatch(), pairs) == [1, 0, 0, 0]
    assert judge(ExactMatch(ignore_case=True), pairs) == [1, 0, 0, 1]


def test_character_match_is_the_share_of_right_places() -> None:
    pairs: list[tuple[str, str | None]] = [
        ("12", "12"),
        ("13", "12"),
        ("21", "12"),
        ("", "12"),
        ("1234", "12"),
        ("", ""),
    ]
    assert judge(CharacterMatch(), pairs) == [1, 0.5, 0, 0, 0.5, 0]


class TestRegexMatch:
    def test_form_needs_no_answer(self) -> None:
        pairs: list[tuple[str, str | None]] = [("<a>1</a>", None), ("<a>1", None), ("x <a></a> y", None)]
        assert judge(RegexMatch("<a>.*</a>"), pairs) == [1, 0, 1]
        assert judge(RegexMatch(r"\A<a>.*</a>\Z"), pairs) == [1, 0, 0]

    def test_group_is_compared_and_the_last_match_decides(self) -> None:
        reward = RegexMatch("(?s)<a>(?P<answer>.*?)</a>")
        assert judge(reward, [("<a>\n4 </a>", "4"), ("<a>4</a><a>5</a>", "4"), ("4", "4")]) == [1, 0, 0]
        assert judge(RegexMatch("x(?P<answer>y)?"), [("x", "y"), ("xy", "y")]) == [0, 1]

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match=r"pattern='\(' is no regular expression: missing \)"):
            RegexMatch("(")
        with pytest.raises(ValueError, match=r"RegexMatch needs the answer .* answers\[0\] is None"):
            judge(RegexMatch("(?P<answer>.)"), [("a", None)])


class TestNumericAnswer:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("so 3 + 4 is 7.", 7),
            ("#### 1,234,567", 1234567),
            ("#### $-5 left\nI checked 3 times", -5),
            (r"\boxed{12} apples, in 3 bags", 12),
            (r"\boxed{1} or rather \boxed{\frac{3}{4}}", 0.75),
            (r"\boxed{\text{about } \$1{,}200.50}", 1200.5),
            (r"\boxed{none} #### 3 of 9", 9),
            ("10-3", 3),
            ("x=-3", -3),
            ("\u22123", -3),
            ("f(2)-1", 1),
            ("-$5", -5),
            (".5", 0.5),
            ("2.5e-3", 0.0025),
            ("-3/4", -0.75),
            ("18/3 = 6", 6),
            ("1, 2, 3", 3),
            ("1/0", None),
            ("no number", None),
            ("", None),
            ("9" * 500, None),
            ("1e999999999", None),
        ],
    )
    def test_final_number(self, text: str, number: float | None) -> None:
        assert final_number(text) == number

    def test_sources(self) -> None:
        text = "\\boxed{1}\n#### 2\nand 3"
        numbers = {source: final_number(text, source) for source in ("any", "boxed", "hashes", "last")}  # type: ignore[arg-type]
        assert numbers == {"any": 1, "boxed": 1, "hashes": 2, "last": 3}
        assert final_number("5", "boxed") is final_number("5", "hashes") is final_number(r"\boxed{5", "boxed") is None

    def test_judges_by_value(self) -> None:
        pairs: list[tuple[str, str | None]] = [
            ("7.0", "07"),
            ("1000", "1,000"),
            ("8", "7"),
            ("nothing", "7"),
            ("0.75", r"\frac{3}{4}"),
            ("0.7", r"\frac{3}{4}"),
        ]
        assert judge(NumericAnswer(), pairs) == [1, 1, 0, 0, 1, 0]
        assert judge(NumericAnswer(tolerance=0.1), pairs) == [1, 1, 0, 0, 1, 1]
        assert judge(NumericAnswer("hashes"), [("72", "#### 72"), ("#### 72", "72")]) == [0, 1]

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="source must be one of .*got 'first'"):
            NumericAnswer("first")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="tolerance must be >= 0, got -1"):
            NumericAnswer(tolerance=-1)
        with pytest.raises(ValueError, match=r"answers\[1\] holds no number: 'seven'"):
            judge(NumericAnswer(), [("7", "7"), ("7", "seven")])


def test_length_falls_between_its_limits() -> None:
    pairs: list[tuple[str, str | None]] = [("", None), ("ab", None), ("a b c", None), ("a b c d e f", None)]
    assert judge(Length(2, 6), pairs) == [0, 0, -0.75, -1]
    assert judge(Length(2, 6, unit="words"), pairs) == [0, 0, -0.25, -1]
    with pytest.raises(ValueError, match="soft_limit < limit, got 6 and 6"):
        Length(6, 6)
    with pytest.raises(ValueError, match="unit must be .*got 'tokens'"):
        Length(2, 6, unit="tokens")  # type: ignore[arg-type]


class TestWeightedSum:
    def test_adds(self) -> None:
        reward = WeightedSum([NumericAnswer(), ExactMatch()], [1.5, 0.5])
        assert judge(reward, [("7", "7"), ("7.0", "7"), ("8", "7")]) == [2, 1.5, 0]
        assert judge(WeightedSum([ExactMatch(), ExactMatch()]), [("7", "7")]) == [2]

    def test_nan_stays(self) -> None:
        (value,) = judge(WeightedSum([ExactMatch(), lambda p, c, a: [math.nan]]), [("7", "7")])
        assert math.isnan(value)

    @pytest.mark.parametrize("weights", [[1.0], [1.0, math.inf], []])
    def test_errors(self, weights: list[float]) -> None:
        with pytest.raises(ValueError, match="rewards and weights must be as many.* got 2 rewards"):
            WeightedSum([ExactMatch(), ExactMatch()], weights)
        with pytest.raises(ValueError, match="got 0 rewards"):
            WeightedSum([])


class TestComputeRewards:
    def test_accepts_whatever_is_a_number(self) -> None:
        import torch

        assert compute_rewards(lambda p, c, a: torch.tensor([1, 0]), ["", ""], ["", ""], [None, None]) == [1.0, 0.0]  # type: ignore[arg-type, return-value]

    @pytest.mark.parametrize("returned", [None, 1.0, ["good"], [None]])
    def test_refuses_what_is_none(self, returned: Any) -> None:
        def mine(*_: Any) -> Any:
            return returned

        with pytest.raises(ValueError, match="the reward mine must return a list of numbers, got"):
            compute_rewards(mine, ["a"], ["b"], [None])

    def test_wrong_number(self) -> None:
        with pytest.raises(ValueError, match="one number for each completion: got 1 for 2"):
            compute_rewards(lambda p, c, a: [1.0], ["a", "b"], ["a", "b"], [None, None])
        with pytest.raises(ValueError, match=r"same length, got 1, 2 and 2"):
            compute_rewards(ExactMatch(), ["a"], ["a", "b"], [None, None])

    def test_missing_answer_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"ExactMatch needs the answer .* answers\[1\] is None \(prompt '2\+2'\)"):
            compute_rewards(ExactMatch(), ["1+1", "2+2"], ["2", "4"], ["2", None])


def test_recipes_can_build_them() -> None:
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    parts = [
        {"class_path": "heliostat.rewards.ExactMatch", "init_args": {"ignore_case": True}},
        {"class_path": "heliostat.rewards.Length", "init_args": {"soft_limit": 1, "limit": 3}},
    ]
    spec = {"class_path": "heliostat.rewards.WeightedSum", "init_args": {"rewards": parts, "weights": [2.0, 1.0]}}
    reward = parser.instantiate(parser.parse_object({"reward": spec})).reward
    assert judge(reward, [("AB", "ab")]) == [1.5]


def test_import_loads_no_torch() -> None:
    code = "import sys, heliostat.rewards; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
