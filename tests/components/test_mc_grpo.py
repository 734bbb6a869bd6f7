from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from heliostat.components import clipped_surrogate_loss, drop_pivots, gather_rows, median_centered_advantages
from tests.harness import GoldenCase, OperatorContract, ProcessPool, golden, relative_error

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
TOKENS = ("logps", "old_logps", "ref_logps", "token_mask")


def batch(prompts: int = 16, group: int = 5, length: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logps = -1 - 0.3 * torch.randn(prompts, group, length, generator=generator).abs()
    return {
        "rewards": torch.randn(prompts, group, generator=generator),
        "logps": logps,
        "old_logps": logps + 0.3 * torch.randn(logps.shape, generator=generator),
        "ref_logps": logps + 0.3 * torch.randn(logps.shape, generator=generator),
        "token_mask": torch.arange(length) < torch.randint(0, length + 1, (prompts, group, 1), generator=generator),
    }


@pytest.mark.filterwarnings("ignore:more than half of the groups")
class TestMCGRPO(OperatorContract):
    """Advantages, the drop of the pivots and the loss together, as a training step has them."""

    differentiable = ("logps",)
    split = dict.fromkeys(("rewards", *TOKENS), 0)
    compiles = False  # the advantages are data without gradient, and the loss is compiled in its own test

    def call(self, rewards: Tensor, **tokens: Tensor) -> Tensor:
        a, keep = median_centered_advantages(rewards)[:2]
        keep, a, *parts = drop_pivots(keep, keep, a, *(tokens[name] for name in TOKENS))
        x = dict(zip(TOKENS, parts, strict=True))
        losses = clipped_surrogate_loss(**x, advantages=a, rollout_mask=keep, kl_coef=0.04, aggregation="dapo")
        return losses.sum() / max(1, len(losses))

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return batch(rows)

    def golden_cases(self) -> dict[str, GoldenCase]:
        return {
            f"{case['name']}, {way}": self._golden(case, way == "dropped")
            for case in golden("mc_grpo").values()
            for way in ("masked", "dropped")
        }

    @staticmethod
    def _golden(case: dict, dropped: bool) -> GoldenCase:
        def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            settings = {"eps": float(case["param/mad_eps"])}
            out = median_centered_advantages(
                inputs["rewards"], **settings, nonzero_rescale=bool(case["param/nonzero_rescale"])
            )
            keep, a, tokens = out.keep_mask, out.advantages, [inputs[name] for name in TOKENS]
            if dropped:
                keep, a, *tokens = drop_pivots(keep, keep, a, *tokens)
                assert keep.all()
            losses = clipped_surrogate_loss(
                **dict(zip(TOKENS, tokens, strict=True)),
                advantages=a,
                rollout_mask=keep,
                clip_low=float(case["param/clip_low"]),
                clip_high=float(case["param/clip_high"]),
                kl_coef=float(case["param/kl_coef"]),
                aggregation=str(case["param/loss_type"]),
                max_completion_length=int(case["param/max_completion_length"]),
            )
            return {
                **out._asdict(),
                "advantages_plain": median_centered_advantages(inputs["rewards"], **settings).advantages,
                "advantages_rescaled": median_centered_advantages(
                    inputs["rewards"], **settings, nonzero_rescale=True
                ).advantages,
                "keep_mask": out.keep_mask.long(),
                "loss": losses.mean(),
            }

        outputs = {name.removeprefix("out/"): value for name, value in case.items() if name.startswith("out/")}
        return GoldenCase(
            inputs={name: case[f"in/{name}"] for name in ("rewards", *TOKENS)},
            call=call,
            outputs={**outputs, "keep_mask": outputs["keep_mask"].astype(int)},
            gradients={"logps": case["grad/logps"]},
            cotangent=("loss", 1.0),
            tolerance=TOLERANCE,
        )

    def degenerate_cases(self):
        x = batch()
        missing = x["rewards"].clone()
        missing[0], missing[1:, 2] = torch.nan, torch.nan
        return {
            "equal rewards": {**x, "rewards": x["rewards"] * 0 + 0.1},
            "missing rewards": {**x, "rewards": missing},
            "no reward": {**x, "rewards": x["rewards"] * torch.nan},
            "no token": {**x, "token_mask": x["token_mask"] & False},
            "no prompt": {name: t[:0] for name, t in x.items()},
        }

    def error_cases(self):
        r = batch()["rewards"]
        keep = torch.ones(2, 3, dtype=torch.bool)
        keep[0, 1] = False
        return {
            "scale": (lambda: median_centered_advantages(r, scale="var"), "scale must be one of .* got 'var'"),
            "eps": (lambda: median_centered_advantages(r, eps=-1.0), "eps must be >= 0, got -1.0"),
            "least": (lambda: median_centered_advantages(r, min_scale=-1.0), "min_scale must be >= 0, got -1.0"),
            "even": (lambda: median_centered_advantages(r[:, 1:]), "odd number .* got K = 4: .* allow_even=True"),
            "one": (lambda: median_centered_advantages(r[:, :1]), "K = G .* 1 >= 3 .* got K = 1"),
            "flat": (lambda: median_centered_advantages(r.flatten()), "or flat with num_per_group, got .80,"),
            "number": (lambda: median_centered_advantages(r.flatten(), 7), r"num_per_group = 7, got \(80,\)"),
            "not flat": (lambda: median_centered_advantages(r, 5), r"must be flat, .* got \(16, 5\)"),
            "keep": (lambda: drop_pivots(r, r), r"keep_mask must be boolean \(N, K\), got torch.float32"),
            "tensor": (lambda: drop_pivots(keep, keep, r), r"keep_mask, \(2, 3\), got \(16, 5\) at place 1"),
            "ragged": (lambda: drop_pivots(keep, keep), "keeps all rollouts of 1 of 2 groups"),
        }


def test_ties_take_the_lowest_index_and_constant_groups_learn_nothing() -> None:
    out = median_centered_advantages(torch.tensor([[2.0, 1, 1, 0, 1], [7.0, 7, 7, 7, 7], [0.0, 3, 1, 2, 3]]))
    assert out.pivot_index.tolist() == [1, 0, 3]
    assert (~out.keep_mask).nonzero().tolist() == [[0, 1], [1, 0], [2, 3]]
    assert out.median.tolist() == [1.0, 7.0, 2.0]
    assert out.mad.tolist() == [0.0, 0.0, 1.0]
    assert (out.advantages[1] == 0).all()


@pytest.mark.parametrize("rewards", [[[1.0, 0, 0]], [[1.0, 1, 0]]])
def test_binary_rewards_teach_the_minority_only_and_hugely(rewards: list[list[float]]) -> None:
    with pytest.warns(UserWarning, match="deviation of 0, .* use scale='std' or min_scale"):
        a = median_centered_advantages(torch.tensor(rewards)).advantages
    torch.testing.assert_close(a.abs().sort().values, torch.tensor([[0.0, 0, 1000]]))
    assert a.sum().sign() == (1 if sum(rewards[0]) == 1 else -1)


def test_scales() -> None:
    r = torch.tensor([[1.0, 0, 0], [4.0, 1.0, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        centred = torch.tensor([[1.0, 0, 0], [3.0, 0, -1]])
        std = median_centered_advantages(r, scale="std").advantages
        torch.testing.assert_close(std, centred / (r.std(1, keepdim=True) + 1e-3))
        torch.testing.assert_close(median_centered_advantages(r, scale="none").advantages, centred)
        bounded = median_centered_advantages(r, min_scale=0.5).advantages
        torch.testing.assert_close(bounded, centred / torch.tensor([[0.5], [1.001]]))
    torch.testing.assert_close(median_centered_advantages(r, eps=0.0, min_scale=1e-9).advantages[1], centred[1])
    assert (median_centered_advantages(torch.ones(1, 3), eps=0.0).advantages == 0).all()


def test_rescaling_counts_all_rollouts_of_the_group() -> None:
    r = torch.tensor([[5.0, 1, 1, 1, 0], [3.0, 3, 3, 3, 3]])
    plain, rescaled = (
        median_centered_advantages(r, nonzero_rescale=rescale, min_scale=1.0).advantages for rescale in (False, True)
    )
    torch.testing.assert_close(rescaled[0], plain[0] * 5 / 2)
    assert (rescaled[1] == 0).all()


def test_missing_rewards_count_nowhere() -> None:
    nan = torch.nan
    out = median_centered_advantages(torch.tensor([[nan, 4.0, 0, 2, 1], [nan, nan, 5.0, 1.0, nan], [nan] * 5]))
    assert out.median[:2].tolist() == [1.0, 1.0]  # the lower of two
    assert out.median[2].isnan()
    assert out.mad[2].isnan()
    assert out.pivot_index.tolist() == [4, 3, -1]
    assert out.keep_mask.tolist() == [[False, True, True, True, False], [False, False, True, False, False], [False] * 5]
    assert (out.advantages[~out.keep_mask] == 0).all()
    assert out.advantages.isfinite().all()
    (left,) = drop_pivots(out.keep_mask, out.keep_mask)
    assert left.sum(1).tolist() == [3, 1, 0]  # what was missing is masked, what was kept is still there


def test_even_groups_in_evaluation_keep_all() -> None:
    out = median_centered_advantages(torch.tensor([[3.0, 1, 2, 0]]), allow_even=True)
    assert out.median == 1  # the lower middle
    assert out.keep_mask.all()
    assert drop_pivots(out.keep_mask, out.advantages)[0] is out.advantages


def test_dropping_keeps_the_order() -> None:
    rewards = torch.tensor([[1.0, 3, 2], [2.0, 1, 3], [1.0, 2, 3]])
    keep = median_centered_advantages(rewards).keep_mask
    left, tokens = drop_pivots(keep, rewards, rewards[:, :, None].expand(-1, -1, 4))
    assert left.tolist() == [[1, 3], [1, 3], [1, 3]]
    assert tokens.shape == (3, 2, 4)
    assert torch.equal(tokens[..., 0], left)


def test_shift_and_order_do_not_matter() -> None:
    r = batch()["rewards"].double()
    a = median_centered_advantages(r).advantages
    order = torch.randperm(5)
    torch.testing.assert_close(median_centered_advantages(r[:, order]).advantages, a[:, order])
    torch.testing.assert_close(median_centered_advantages(r + 3).advantages, a)
    torch.testing.assert_close(median_centered_advantages(r.flatten(), 5).advantages, a)


@pytest.mark.parametrize(
    ("group", "outliers", "by_mean", "by_median"),
    [(2, False, 0.250, 0.126), (4, False, 0.167, 0.109), (8, False, 0.115, 0.091), (4, True, 0.203, 0.110)],
)
def test_how_often_an_advantage_has_the_wrong_sign(group, outliers, by_mean, by_median) -> None:
    """Against the true mean, 0: Gaussian rewards, and those of standard deviation 0.2 with 5 % outliers of +-3."""
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(100_000, group + 1, generator=generator)
    if outliers:
        far = torch.where(torch.rand(r.shape, generator=generator) < 0.5, 3.0, -3.0)
        r = torch.where(torch.rand(r.shape, generator=generator) < 0.05, far, 0.2 * r)
    out = median_centered_advantages(r)
    wrong = (out.advantages.sign() != r.sign())[out.keep_mask]
    assert wrong.float().mean().item() == pytest.approx(by_median, abs=0.005)
    few = r[:, :group]
    wrong = (few - few.mean(1, keepdim=True)).sign() != few.sign()
    assert wrong.float().mean().item() == pytest.approx(by_mean, abs=0.005)


def test_groups_spread_over_processes(two_processes: ProcessPool) -> None:
    """Two groups of 3; rank 0 holds two rows of the first, rank 1 the other four."""
    rewards = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]]).flatten()
    whole = median_centered_advantages(rewards, 3)
    parts = two_processes.run(_advantages_on_rank, rewards)
    assert torch.equal(torch.cat([part[0] for part in parts]), whole.advantages.flatten())
    assert torch.equal(torch.cat([part[1] for part in parts]), whole.keep_mask.flatten())


def _advantages_on_rank(rank: int, rewards: Tensor) -> tuple[Tensor, Tensor]:
    rows = slice(2 * rank, 2 * rank + 2) if rank == 0 else slice(2, 6)
    own = torch.full((4,), torch.nan)  # as many on both, for the gathering
    own[: len(rewards[rows])] = rewards[rows]
    gathered = gather_rows(own)
    out = median_centered_advantages(gathered[[0, 1, 4, 5, 6, 7]], 3)
    return out.advantages.flatten()[rows], out.keep_mask.flatten()[rows]


def test_no_gradient_to_rewards() -> None:
    assert not median_centered_advantages(batch()["rewards"].requires_grad_()).advantages.requires_grad
    assert relative_error(median_centered_advantages(torch.tensor([[3, 1, 2]])).median, [2.0]) == 0  # integers
