from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heliostat.components import (
    clipped_surrogate_loss,
    dypo_loss,
    grade_groups,
    group_alignment_loss,
    group_relative_advantages,
    multi_teacher_nll,
    sample_teachers,
)
from tests.harness import GoldenCase, OperatorContract, ProcessPool, golden, relative_error

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
HARD, MID, EASY, SKIP = 0, 1, 2, -1
INPUTS = (
    *("logps", "old_logps", "ref_logps", "rewards", "token_mask", "rollout_mask"),
    *("teacher_logps", "teacher_token_mask", "teacher_available", "teacher_index"),
)


def batch(prompts: int = 16, group: int = 4, length: int = 5, teachers: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def masks(*shape: int) -> Tensor:
        return torch.arange(length) < torch.randint(1, length + 1, (*shape, 1), generator=generator)

    logps = -1 - 0.3 * noise(prompts, group, length).abs()
    available = torch.rand(prompts, teachers, generator=generator) < 0.7
    return {
        "logps": logps,
        "old_logps": logps + 0.1 * noise(prompts, group, length),
        "ref_logps": logps + 0.3 * noise(prompts, group, length),
        # Hard, Mid and Easy prompts, unevenly: the first half has no Easy one
        "rewards": (
            torch.rand(prompts, group, generator=generator) < torch.linspace(-0.3, 1.3, prompts)[:, None]
        ).float(),
        "token_mask": masks(prompts, group),
        "rollout_mask": torch.rand(prompts, group, generator=generator) < 0.9,
        "teacher_logps": -1 - noise(prompts, teachers, length).abs(),
        "teacher_token_mask": masks(prompts, teachers),
        "teacher_available": available,
        "teacher_index": sample_teachers(available, generator),
    }


class TestDYPO(OperatorContract):
    differentiable = ("logps", "teacher_logps")
    split = dict.fromkeys(INPUTS, 0)
    compiles = False  # the gate looks at its data and breaks the graph; GRPO's loss is compiled in its own test

    def call(self, **inputs: Tensor) -> Tensor:
        return dypo_loss(**inputs, alpha=0.3, beta_gal=2.0, gamma=0.7, kl_coef=0.04).loss

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return batch(rows, group=3, length=3, teachers=2)

    def golden_cases(self) -> dict[str, GoldenCase]:
        return {str(case["name"]): self._golden(case) for case in golden("dypo").values()}

    @staticmethod
    def _golden(case: dict) -> GoldenCase:
        settings = {key.removeprefix("param/"): value.item() for key, value in case.items() if key.startswith("param/")}
        expectation = settings.pop("teacher_reduction") == "expectation"

        def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            output = dypo_loss(**{**inputs, "teacher_index": None} if expectation else inputs, **settings)
            parts = {name: getattr(output, name) for name in ("loss", "tier", "gal", "sft", "n_pairs")}
            return {**parts, "grpo + 1": output.grpo + 1}  # it is 0 but for rounding on the first on-policy step

        return GoldenCase(
            inputs={name: case[f"in/{name}"] for name in INPUTS},
            call=call,
            outputs={
                "loss": case["out/loss"],
                "tier": case["out/tier"],
                "gal": case["out/gal_per_prompt"],
                "sft": case["out/sft_per_prompt"],
                "n_pairs": case["out/n_pairs"],
                "grpo + 1": case["out/grpo_per_prompt"] + 1,
            },
            gradients={name: case[f"grad/{name}"] for name in ("logps", "teacher_logps")},
            cotangent=("loss", 1.0),
            tolerance=TOLERANCE,
        )

    def degenerate_cases(self):
        x = batch()
        return {
            "no token": {**x, "token_mask": x["token_mask"] & False},
            "no rollout": {**x, "rollout_mask": x["rollout_mask"] & False},
            "no teacher": {
                **x,
                "teacher_available": x["teacher_available"] & False,
                "teacher_index": x["teacher_index"] * 0 - 1,
            },
            "empty demonstrations": {**x, "teacher_token_mask": x["teacher_token_mask"] & False},
            "no prompt": {name: t[:0] for name, t in x.items()},
            "margins of hundreds": {**x, "ref_logps": x["ref_logps"] + 60 * torch.randn(16, 4, 1).sign()},
        }

    def error_cases(self):
        x = batch()

        def call(**changes: object) -> object:
            return lambda: dypo_loss(**{**x, **changes})

        nan = x["rewards"].clone()
        nan[x["rollout_mask"]] = torch.nan
        return {
            "alpha": (call(alpha=1.5), r"alpha must be in \[0, 1\], got 1.5"),
            "gamma": (call(gamma=-1.0), "gamma must be >= 0, got -1.0"),
            "normalize": (call(normalize="batch"), "normalize must be one of .* got 'batch'"),
            "reference": (call(ref_logps=None), "ref_logps is needed for GAL at alpha=0.5: pass it, or set alpha=1"),
            "rewards": (call(rewards=x["rewards"][:3]), r"rewards must have the shape \(B, G\) of logps, \(16, 4\)"),
            "nan": (call(rewards=nan), "rewards holds 5. NaN, .* leave them out by rollout_mask"),
            "teacher mask": (call(teacher_token_mask=None), "teacher_token_mask and teacher_available are needed"),
            "teachers": (call(teacher_logps=x["teacher_logps"][:3]), "teacher_logps must have B = 16 prompts, got 3"),
            "index": (
                call(teacher_index=x["teacher_index"] * 0 + 7),
                "must name an available teacher or be -1, got .*7",
            ),
            "length": (call(sft_length="mean"), "length_reduction must be one of"),
            "gate": (call(hard_max_successes=4), r"hard_max_successes must lie in 0..G-1 .* = 4, got 4"),
            "beta": (call(beta_gal=0.0), "beta must be > 0, got 0.0"),
        }


def test_golden_advantages() -> None:
    for case in golden("dypo").values():
        rewards, mask = torch.as_tensor(case["in/rewards"]).double(), torch.as_tensor(case["in/rollout_mask"])
        a = group_relative_advantages(rewards, mask, ddof=int(case["param/adv_ddof"]), eps=float(case["param/adv_eps"]))
        assert relative_error(a, case["out/advantages"]) < 1e-10


# --- grading ---------------------------------------------------------------------------------------------------------


def test_tiers() -> None:
    rewards = torch.tensor([[0, 0, 0.5], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1], [1, 1, 1]])
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[4, 0] = mask[5, :] = False
    assert grade_groups(rewards, mask).tolist() == [HARD, MID, MID, EASY, EASY, SKIP]
    assert grade_groups(rewards, mask, hard_max_successes=1).tolist() == [HARD, HARD, MID, EASY, EASY, SKIP]
    assert grade_groups(rewards, mask, easy_max_failures=1).tolist() == [HARD, MID, EASY, EASY, EASY, SKIP]
    # both hold: Hard is asked first
    assert grade_groups(rewards, mask, hard_max_successes=2, easy_max_failures=2).tolist() == [HARD] * 3 + [
        EASY,
        HARD,
        SKIP,
    ]
    assert grade_groups(rewards, success_threshold=0.4)[0] == MID
    assert (grade_groups(torch.rand(20, 1).round()) != MID).all()  # one rollout is never mixed
    assert grade_groups(torch.tensor([[1, 0]])).tolist() == [MID]  # integer rewards
    assert grade_groups(torch.tensor([[torch.nan, 1.0]]), torch.tensor([[False, True]])).tolist() == [EASY]


# --- facts of the method ---------------------------------------------------------------------------------------------


def test_on_the_first_step_gal_is_grpo_reweighted() -> None:
    """With theta = old = ref: grad GAL = beta / (2 sqrt(p (1 - p))) grad GRPO. The reference must be an older one."""
    logps = -torch.rand(7, 8, 4, dtype=torch.float64).requires_grad_()
    mask = torch.ones(7, 8, 4, dtype=torch.bool)
    rewards = (torch.arange(8) < torch.arange(1, 8)[:, None]).double()
    advantages = group_relative_advantages(rewards, ddof=0, eps=0.0)
    grpo = clipped_surrogate_loss(logps, logps, advantages, mask, ratio_level="sequence")
    gal = group_alignment_loss(logps, logps, rewards, mask, beta=1.7)
    (of_grpo,), (of_gal,) = (torch.autograd.grad(x.sum(), logps) for x in (grpo, gal))
    p = rewards.mean(1)
    factor = 1.7 / (2 * (p * (1 - p)).sqrt())
    torch.testing.assert_close(of_gal, factor[:, None, None] * of_grpo, rtol=1e-12, atol=1e-15)


def test_gal_has_the_gradient_of_the_sheet() -> None:
    sums, reference = (torch.randn(1, 5, dtype=torch.float64) for _ in range(2))
    sums.requires_grad_()
    rewards = torch.tensor([[0.2, 0.9, 0.2, 0.5, 0.0]])
    (gradient,) = torch.autograd.grad(group_alignment_loss(sums, reference, rewards, beta=0.8).sum(), sums)
    expected, pairs = torch.zeros(5, dtype=torch.float64), 0
    gain = (sums - reference).detach()[0]
    for s in range(5):
        for f in range(5):
            if rewards[0, s] > rewards[0, f]:
                weight = torch.sigmoid(-0.8 * (gain[s] - gain[f]))
                expected[s] -= 0.8 * weight
                expected[f] += 0.8 * weight
                pairs += 1
    torch.testing.assert_close(gradient[0], expected / pairs)


def test_gal_reads_sums_or_tokens_and_only_the_order_of_rewards() -> None:
    x = batch()
    tokens = group_alignment_loss(x["logps"], x["ref_logps"], x["rewards"], x["token_mask"], x["rollout_mask"])
    sums = [(x[name] * x["token_mask"]).sum(2) for name in ("logps", "ref_logps")]
    torch.testing.assert_close(group_alignment_loss(*sums, x["rewards"], rollout_mask=x["rollout_mask"]), tokens)
    graded = 100 * x["rewards"] ** 3 - 7
    torch.testing.assert_close(group_alignment_loss(*sums, graded, rollout_mask=x["rollout_mask"]), tokens)
    some = tokens[tokens != 0]
    mean = group_alignment_loss(*sums, x["rewards"], rollout_mask=x["rollout_mask"], reduction="mean")
    torch.testing.assert_close(mean, some.mean())
    nan = x["rewards"].masked_fill(~x["rollout_mask"], torch.nan)
    torch.testing.assert_close(group_alignment_loss(*sums, nan), tokens)  # a NaN is in no pair


def test_gal_saturates_without_overflow() -> None:
    sums = torch.tensor([[300.0, -300.0], [-300.0, 300.0]]).requires_grad_()
    loss = group_alignment_loss(sums, torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert loss.tolist() == [0.0, 600.0]
    (gradient,) = torch.autograd.grad(loss.sum(), sums)
    assert gradient.tolist() == [[0.0, 0.0], [-1.0, 1.0]]


def test_gal_errors() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"logps must have shape \(B, G, T\) or \(B, G\) .* \(2, 3\), got \(3, 2\)"):
        group_alignment_loss(x.T, x, x)
    with pytest.raises(ValueError, match="token_mask is needed with logps of shape"):
        group_alignment_loss(x[..., None], x[..., None], x)
    with pytest.raises(ValueError, match="reduction must be 'none' or 'mean', got 'sum'"):
        group_alignment_loss(x, x, x, reduction="sum")


def test_each_tier_touches_its_own_log_probabilities() -> None:
    x = batch()
    x["logps"].requires_grad_(), x["teacher_logps"].requires_grad_()
    for reward, tier in ((0.0, HARD), (1.0, EASY)):
        output = dypo_loss(**{**x, "rewards": torch.full((16, 4), reward)})
        assert (output.tier == tier).all()
        of_rollouts, of_teachers = torch.autograd.grad(output.loss, (x["logps"], x["teacher_logps"]))
        assert (of_rollouts == 0).all()
        assert (of_teachers != 0).any() == (tier == HARD)
    assert output.loss == 0
    assert output.loss.requires_grad
    assert dypo_loss(**{**x, "teacher_logps": None}).sft.sum() == 0  # Hard prompts then teach nothing


def test_alpha_one_needs_no_reference_and_equals_grpo() -> None:
    x = batch()
    plain = dypo_loss(**{**x, "ref_logps": None}, alpha=1.0)
    garbage = dypo_loss(**{**x, "ref_logps": x["logps"] - torch.inf}, alpha=1.0)
    assert torch.equal(plain.loss, garbage.loss)
    torch.testing.assert_close(plain.loss, (plain.grpo + plain.sft).sum() / 16)
    assert torch.isfinite(dypo_loss(**{**x, "old_logps": x["logps"] - 500}, alpha=0.0).loss)


def test_normalisation_counts_easy_prompts_but_not_skipped_ones() -> None:
    x = batch()
    x["rollout_mask"][:3] = False
    output = dypo_loss(**x, gamma=0.6, alpha=0.2)
    counts = [(output.tier == tier).sum() for tier in (HARD, MID, EASY, SKIP)]
    assert min(counts) > 0
    total = 0.6 * output.sft.sum() + 0.2 * output.grpo.sum() + 0.8 * output.gal.sum()
    torch.testing.assert_close(output.loss, total / 13)
    branch = dypo_loss(**x, gamma=0.6, alpha=0.2, normalize="branch").loss
    rl = (0.2 * output.grpo + 0.8 * output.gal).sum() / counts[MID]
    torch.testing.assert_close(branch, 0.6 * output.sft.sum() / counts[HARD] + rl)


def test_statistics() -> None:
    x = batch()
    x["rollout_mask"][0] = False
    x["teacher_index"][1], x["teacher_available"][1] = -1, False
    output = dypo_loss(**x)
    stats, tier = output.stats, output.tier
    assert tier[1] == HARD
    for code, name in ((HARD, "hard"), (MID, "mid"), (EASY, "easy"), (SKIP, "skip")):
        assert stats[f"frac_{name}"] == (tier == code).float().mean()
    hard, mid = (tier == HARD).sum(), (tier == MID).sum()
    torch.testing.assert_close(stats["offline_ratio"], hard / (hard + mid))
    assert stats["hard_without_teacher"] == ((tier == HARD) & (x["teacher_index"] == -1)).sum()
    torch.testing.assert_close(stats["reward"], x["rewards"][x["rollout_mask"]].mean())
    gain = ((x["logps"] - x["ref_logps"]) * x["token_mask"]).sum(2)
    margins = []
    for b in (tier == MID).nonzero()[:, 0]:
        right = x["rollout_mask"][b] & (x["rewards"][b] == 1)
        wrong = x["rollout_mask"][b] & (x["rewards"][b] == 0)
        margins.append((gain[b][right][:, None] - gain[b][wrong]).flatten())
    margins = torch.cat(margins)
    torch.testing.assert_close(stats["gal_margin"], margins.mean())
    torch.testing.assert_close(stats["pair_accuracy"], (margins > 0).float().mean())
    assert output.n_pairs[tier == MID].sum() == len(margins)


def test_bfloat16_rewards_and_sums_are_float32() -> None:
    long = torch.full((1, 2, 4096), -1.0, dtype=torch.bfloat16)  # a sum in bfloat16 would stop growing at 256
    mask = torch.ones(1, 2, 4096, dtype=torch.bool)
    mask[0, 1, 2048:] = False
    loss = group_alignment_loss(long, torch.zeros_like(long), torch.tensor([[0.0, 1.0]]), mask, beta=1e-3)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(torch.tensor([-2.048])))


# --- teachers --------------------------------------------------------------------------------------------------------


def test_teachers_are_drawn_uniformly_from_the_available() -> None:
    available = torch.tensor([[True, False, True, True]]).expand(3000, -1)
    index = sample_teachers(available, torch.Generator().manual_seed(0))
    counts = index.bincount(minlength=4)
    assert counts[1] == 0
    assert ((counts[[0, 2, 3]] - 1000).abs() < 100).all()
    assert sample_teachers(torch.zeros(2, 3, dtype=torch.bool)).tolist() == [-1, -1]
    assert sample_teachers(torch.zeros(2, 0, dtype=torch.bool)).tolist() == [-1, -1]
    again = sample_teachers(available, torch.Generator().manual_seed(0))
    assert torch.equal(index, again)
    with pytest.raises(ValueError, match=r"available must be boolean \(B, M\), got torch.float32"):
        sample_teachers(torch.zeros(2, 3))


def test_the_mean_over_teachers_is_the_expectation_of_the_draw() -> None:
    x = batch()
    arguments = x["teacher_logps"], x["teacher_token_mask"], x["teacher_available"]
    for reduction in ("token_mean", "sum"):
        mean = multi_teacher_nll(*arguments, length_reduction=reduction)
        for b in range(16):
            draws = [
                multi_teacher_nll(*(t[b : b + 1] for t in arguments), torch.tensor([j]), length_reduction=reduction)
                for j in range(3)
                if x["teacher_available"][b, j]
            ]
            torch.testing.assert_close(mean[b], torch.stack(draws).mean() if draws else torch.tensor(0.0))
    one = x["teacher_logps"][0, 0][x["teacher_token_mask"][0, 0]]
    index, available = torch.zeros(16, dtype=torch.long), torch.ones(16, 3, dtype=torch.bool)
    torch.testing.assert_close(multi_teacher_nll(*arguments[:2], available, index)[0], -one.mean())
    torch.testing.assert_close(
        multi_teacher_nll(*arguments[:2], available, index, length_reduction="sum")[0], -one.sum()
    )


def test_other_teachers_may_hold_anything() -> None:
    x = batch()
    index = x["teacher_index"]
    used = (index[:, None] == torch.arange(3))[:, :, None] & x["teacher_token_mask"]
    garbage = x["teacher_logps"].masked_fill(~used, -torch.inf).requires_grad_()
    loss = multi_teacher_nll(garbage, x["teacher_token_mask"], x["teacher_available"], index)
    torch.testing.assert_close(loss, multi_teacher_nll(x["teacher_logps"], *list(x.values())[7:9], index))
    (gradient,) = torch.autograd.grad(loss.sum(), garbage)
    assert (gradient[~used] == 0).all()


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_process_with_nothing_to_learn(two_processes: ProcessPool) -> None:
    """Rank 0 has only Easy prompts, 5 of them; rank 1 has the others, 11."""
    x = {name: t.double() if t.is_floating_point() else t for name, t in batch().items()}
    x["rewards"][:5] = 1.0
    for normalize in ("prompts", "branch"):
        loss, gradient, stats = _dypo(x, normalize)
        results = two_processes.run(_dypo_on_rank, x, normalize)
        assert results[0][0] == 0
        assert sum(r[0] for r in results) / 2 == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(torch.cat([r[1] for r in results]) / 2, gradient, rtol=0, atol=1e-14)
        for _, _, ranks in results:
            for name, value in stats.items():
                torch.testing.assert_close(ranks[name], value, msg=name)


def _dypo(x: dict[str, Tensor], normalize: str) -> tuple[float, Tensor, dict[str, Tensor]]:
    logps = x["logps"].clone().requires_grad_()
    output = dypo_loss(**{**x, "logps": logps}, normalize=normalize)
    output.loss.backward()
    return output.loss.item(), logps.grad, output.stats


def _dypo_on_rank(rank: int, x: dict[str, Tensor], normalize: str) -> tuple[float, Tensor, dict[str, Tensor]]:
    return _dypo({name: t[:5] if rank == 0 else t[5:] for name, t in x.items()}, normalize)
