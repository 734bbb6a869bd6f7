from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heliostat.components import (
    clipped_surrogate_loss,
    group_relative_advantages,
    kl_estimate,
    policy_gradient,
    token_log_probs,
)
from heliostat.components.policy_gradient import clipped_token_losses, shared_count, units_per_prompt
from tests.harness import OperatorContract, ProcessPool, relative_error

AGGREGATIONS = ("prompt", "grpo", "bnpo", "dapo", "dr_grpo")


# --- log-probabilities -----------------------------------------------------------------------------------------------


def states(rows: int = 16, dim: int = 6, vocabulary: int = 31) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(rows, dim, generator=generator),
        "tokens": torch.randint(vocabulary, (rows,), generator=generator),
        "weight": torch.randn(vocabulary, dim, generator=generator),
        "bias": torch.randn(vocabulary, generator=generator),
    }


def by_log_softmax(
    hidden: Tensor,
    tokens: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    logits = hidden if weight is None else F.linear(hidden, weight, bias)
    if logit_softcap is not None:
        logits = logit_softcap * (logits / logit_softcap).tanh()
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


class TestTokenLogProbs(OperatorContract):
    differentiable = ("hidden", "weight", "bias")

    def call(self, hidden: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return token_log_probs(hidden, tokens, weight, bias, temperature=0.7, logit_softcap=4.0)

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return states(rows)

    def degenerate_cases(self):
        x = states()
        return {
            "no token": {**x, "hidden": x["hidden"][:0], "tokens": x["tokens"][:0]},
            "one word": {**x, "tokens": x["tokens"] * 0, "weight": x["weight"][:1], "bias": x["bias"][:1]},
            "huge": {**x, "hidden": x["hidden"] * 1e18},
        }

    def error_cases(self):
        x = states()
        h, y, w, b = x.values()
        return {
            "hidden": (
                lambda: token_log_probs(y, y),
                r"hidden must be floating point of shape .* got torch.int",
            ),
            "tokens": (lambda: token_log_probs(h, y[1:], w), r"tokens must have the shape .*\(16,\), got \(15,\)"),
            "kind": (lambda: token_log_probs(h, y.float(), w), "tokens must be integers, got torch.float32"),
            "weight": (
                lambda: token_log_probs(h, y, w[:, 1:]),
                r"weight must have .* = 6, got \(31, 5\)",
            ),
            "bias": (lambda: token_log_probs(h, y, w, b[1:]), r"bias must have the shape \(V,\), \(31,\), got \(30,\)"),
            "bias alone": (lambda: token_log_probs(h, y, bias=b), "bias needs weight"),
            "temperature": (lambda: token_log_probs(h, y, w, temperature=0.0), "temperature must be > 0, got 0.0"),
            "softcap": (lambda: token_log_probs(h, y, w, logit_softcap=-1.0), "logit_softcap must be > 0"),
            "too large": (lambda: token_log_probs(h, y + 31, w), r"must lie in 0\.\.30, got 3\d\.\."),
            "ignored labels": (lambda: token_log_probs(h, y * 0 - 100, w), "such as labels of -100, out by mask"),
            "mask": (lambda: token_log_probs(h, y, w, mask=y), r"mask must be boolean, got torch.int64: mask.bool\(\)"),
        }


@pytest.mark.parametrize("blocks", [(2**20, 2**25), (2**20, 0), (64, 2**25), (64, 0)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.7}, {"temperature": 0.6, "logit_softcap": 2.0}], ids=str)
@pytest.mark.parametrize("given", ["weight and bias", "weight", "frozen weight", "logits"])
def test_equals_log_softmax_however_it_is_cut(monkeypatch, blocks, settings, given) -> None:
    monkeypatch.setattr(policy_gradient, "_BLOCK_ELEMENTS", {"cpu": blocks[0]})
    monkeypatch.setattr(policy_gradient, "_KEPT_ELEMENTS", blocks[1])
    x = {name: t.double() if t.is_floating_point() else t for name, t in states(14).items()}
    if given == "logits":
        x["hidden"] = F.linear(x["hidden"], x.pop("weight"), x.pop("bias"))
    elif given != "weight and bias":
        del x["bias"]
    x["hidden"], x["tokens"] = x["hidden"].view(2, 7, -1), x["tokens"].view(2, 7)
    names = ["hidden"] if given == "frozen weight" else [name for name in x if name != "tokens"]
    leaves = [x[name].requires_grad_() for name in names]
    cotangent = torch.randn(2, 7, dtype=torch.float64)
    actual, expected = token_log_probs(**x, **settings), by_log_softmax(**x, **settings)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    for a, b in zip(
        torch.autograd.grad(actual, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_backward_can_be_repeated_over_kept_logits() -> None:
    x = states()
    x["hidden"].requires_grad_()
    value = token_log_probs(**x).sum()
    first, second = (torch.autograd.grad(value, x["hidden"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


class _Largest(TorchDispatchMode):
    """The most elements that the result of any operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_the_logits(monkeypatch, dtype) -> None:
    monkeypatch.setattr(policy_gradient, "_BLOCK_ELEMENTS", {"cpu": 2**12})
    monkeypatch.setattr(policy_gradient, "_KEPT_ELEMENTS", 0)
    x = states(300, 4, 1000)
    hidden, weight = x["hidden"].to(dtype).requires_grad_(), x["weight"].to(dtype).requires_grad_()
    with _Largest() as largest:
        token_log_probs(hidden, x["tokens"], weight).sum().backward()
    assert largest.elements <= 4096  # a block; the weight has 4000, the logits would be 300,000
    monkeypatch.undo()
    with _Largest() as largest:
        by_log_softmax(hidden, x["tokens"], weight).sum().backward()
    assert largest.elements == 300_000


def test_bfloat16_is_computed_in_float32() -> None:
    x = {name: t.bfloat16() if t.is_floating_point() else t for name, t in states().items()}
    leaves = [x[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    value, expected = token_log_probs(**x), by_log_softmax(exact[0], x["tokens"], *exact[1:])
    assert value.dtype == torch.float32
    assert relative_error(value, expected.detach()) < 1e-6
    gradients = torch.autograd.grad(value.sum(), leaves)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient, wanted.bfloat16(), rtol=2**-7, atol=1e-6)  # rounded once, at the end


def test_masked_tokens_cost_nothing_and_may_hold_anything() -> None:
    x = states()
    mask = torch.arange(16) % 3 > 0
    hidden = x["hidden"].masked_fill(~mask[:, None], torch.nan).requires_grad_()
    tokens = x["tokens"].masked_fill(~mask, -100)
    value = token_log_probs(hidden, tokens, x["weight"], x["bias"], mask=mask)
    torch.testing.assert_close(value[mask], token_log_probs(**x)[mask])
    assert (value[~mask] == 0).all()
    value.sum().backward()
    assert (hidden.grad[~mask] == 0).all()
    assert (hidden.grad[mask] != 0).any()
    empty = token_log_probs(hidden, tokens, x["weight"], mask=torch.zeros_like(mask))
    assert (empty == 0).all()
    assert (torch.autograd.grad(empty.sum(), hidden)[0] == 0).all()


def test_nan_and_impossible_tokens_show() -> None:
    x = states()
    x["hidden"][3, 1] = torch.nan
    value = token_log_probs(**x)
    assert value[3].isnan()
    assert value.isnan().sum() == 1
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [-torch.inf, 1.0, -torch.inf]]).requires_grad_()
    value = token_log_probs(logits, torch.tensor([1, 1]))
    assert value.tolist() == [-torch.inf, 0.0]
    assert torch.autograd.grad(value.sum(), logits)[0].tolist() == [[-0.5, 1.0, -0.5], [0.0, 0.0, 0.0]]


def test_it_is_differentiated_once() -> None:
    x = states()
    x["hidden"].requires_grad_()
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(token_log_probs(**x).sum(), x["hidden"], create_graph=True)


# --- advantages ------------------------------------------------------------------------------------------------------


def test_advantages_are_standardised_over_what_counts() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 9.0], [0.3, 0.3, 0.3, 0.3], [2.0, 5.0, 7.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    for ddof in (0, 1):
        a = group_relative_advantages(rewards, mask, ddof=ddof, eps=1e-3)
        group = rewards[0, :3]
        torch.testing.assert_close(a[0, :3], (group - group.mean()) / (group.std(correction=ddof) + 1e-3))
        assert a[0, 3] == 0
        assert (a[1:] == 0).all()  # no spread, one rollout, none
    assert (group_relative_advantages(rewards, mask, eps=0.0)[1:] == 0).all()
    torch.testing.assert_close(
        group_relative_advantages(rewards + 1000), group_relative_advantages(rewards), rtol=1e-3, atol=1e-4
    )


def test_equal_rewards_leave_no_rounding_behind() -> None:
    rewards = torch.full((1, 7), 0.1)
    assert (rewards - rewards.mean(1, keepdim=True)).abs().max() > 0  # what the plain formula would divide by itself
    assert (group_relative_advantages(rewards, eps=0.0) == 0).all()


def test_nan_reward_shows_in_its_group_only() -> None:
    a = group_relative_advantages(torch.tensor([[1.0, torch.nan], [1.0, 0.0]]))
    assert a[0].isnan().all()
    assert a[1].isfinite().all()
    masked = group_relative_advantages(torch.tensor([[1.0, torch.nan, 0.0]]), torch.tensor([[True, False, True]]))
    assert masked.isfinite().all()


def test_advantages_errors() -> None:
    r = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"rewards must have shape \(B, G\), got \(3,\)"):
        group_relative_advantages(r[0])
    with pytest.raises(ValueError, match=r"rollout_mask must be boolean, got torch.float32: rollout_mask.bool\(\)"):
        group_relative_advantages(r, r)
    with pytest.raises(ValueError, match=r"rollout_mask must have the shape \(B, G\) of rewards, \(2, 3\), got \(3,\)"):
        group_relative_advantages(r, r[0].bool())
    with pytest.raises(ValueError, match="ddof must be 0 or 1, got 2"):
        group_relative_advantages(r, ddof=2)
    with pytest.raises(ValueError, match="eps must be >= 0, got -1"):
        group_relative_advantages(r, eps=-1)


# --- KL --------------------------------------------------------------------------------------------------------------


def test_kl_estimates_have_the_values_and_gradients_that_they_claim() -> None:
    """By enumeration of all tokens instead of samples."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, generator=generator).requires_grad_()
    log_p, log_q = logits.log_softmax(0), torch.randn(6, dtype=torch.float64, generator=generator).log_softmax(0)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    reverse = (log_q.exp() * (log_q - log_p)).sum()
    p = log_p.detach().exp()
    k1, k2, k3 = ((p * kl_estimate(log_p, log_q, estimator=name)).sum() for name in ("k1", "k2", "k3"))
    torch.testing.assert_close(k1, kl)
    torch.testing.assert_close(k3, kl)
    expected = {k1: torch.zeros(()), k2: kl, k3: reverse}
    for estimate, divergence in expected.items():
        (gradient,) = torch.autograd.grad(estimate, logits, retain_graph=True)
        wanted = (
            torch.autograd.grad(divergence, logits, retain_graph=True)[0]
            if divergence.requires_grad
            else torch.zeros_like(logits)
        )
        torch.testing.assert_close(gradient, wanted)
    assert (kl_estimate(log_p, log_q) >= 0).all()


def test_kl_is_exact_near_agreement() -> None:
    assert kl_estimate(torch.tensor(-1.0), torch.tensor(-1.0)) == 0
    small = kl_estimate(torch.tensor(0.0), torch.tensor(1e-3))
    assert small.item() == pytest.approx(5.0017e-7, rel=1e-4)
    with pytest.raises(ValueError, match="estimator must be one of .* got 'k4'"):
        kl_estimate(small, small, estimator="k4")
    with pytest.raises(ValueError, match=r"ref_logps must have the shape of logps, \(\), got \(1,\)"):
        kl_estimate(small, small[None])


# --- surrogate -------------------------------------------------------------------------------------------------------


def rollouts(prompts: int = 8, group: int = 4, length: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(prompts, group, length, generator=generator)

    logps = -1 - 0.3 * noise().abs()
    lengths = torch.randint(0, length + 1, (prompts, group, 1), generator=generator)
    return {
        "logps": logps,
        "old_logps": logps + 0.3 * noise(),
        "ref_logps": logps + 0.3 * noise(),
        "advantages": torch.randn(prompts, group, generator=generator),
        "token_mask": torch.arange(length) < lengths,
        "rollout_mask": torch.rand(prompts, group, generator=generator) < 0.8,
    }


class TestSurrogate(OperatorContract):
    differentiable = ("logps",)
    split = dict.fromkeys(("logps", "old_logps", "ref_logps", "advantages", "token_mask", "rollout_mask"), 0)

    def call(self, **inputs: Tensor) -> Tensor:
        losses = clipped_surrogate_loss(
            **inputs, clip_high=0.28, kl_coef=0.04, aggregation="dr_grpo", max_completion_length=7
        )
        return losses.sum() / shared_count(losses.new_tensor(len(losses)))

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return rollouts(rows)

    def degenerate_cases(self):
        x = rollouts()
        return {
            "no token": {**x, "token_mask": torch.zeros_like(x["token_mask"])},
            "no rollout": {**x, "rollout_mask": torch.zeros_like(x["rollout_mask"])},
            "no prompt": {name: t[:0] for name, t in x.items()},
            "overflow": {  # e^500
                **x,
                "old_logps": x["logps"] - 500,
                "advantages": x["advantages"].abs(),
                "ref_logps": x["logps"],
            },
        }

    def error_cases(self):
        x = rollouts()

        def call(**changes: object) -> object:
            return lambda: clipped_surrogate_loss(**{**x, **changes})

        return {
            "logps": (call(logps=x["logps"][0]), r"logps must have shape \(B, G, T\), got \(4, 5\)"),
            "old": (
                call(old_logps=x["logps"][1:]),
                r"old_logps must have the shape of logps, .* got \(7, 4, 5\)",
            ),
            "advantages": (call(advantages=x["logps"]), r"advantages must have the shape \(B, G\) of logps, \(8, 4\)"),
            "mask": (call(token_mask=x["logps"]), "token_mask must be boolean"),
            "rollout mask": (call(rollout_mask=x["token_mask"]), r"rollout_mask must have the shape \(B, G\) of logps"),
            "low": (call(clip_low=1.0), r"clip_low must be in \(0, 1\), got 1.0"),
            "high": (call(clip_high=0.0), "clip_high must be > 0, got 0.0"),
            "dual": (call(dual_clip=1.0), "dual_clip must be > 1, or None for no bound, got 1.0"),
            "kl": (call(kl_coef=-1.0), "kl_coef must be >= 0, got -1.0"),
            "reference": (call(kl_coef=0.1, ref_logps=None), "ref_logps is needed for kl_coef=0.1"),
            "level": (call(ratio_level="word"), "ratio_level must be one of .* got 'word'"),
            "aggregation": (call(aggregation="mean"), "aggregation must be one of .* got 'mean'"),
            "length": (call(aggregation="dr_grpo"), "needs max_completion_length >= 1"),
            "units": (lambda: units_per_prompt(x["token_mask"], aggregation="prompt"), "it has no units"),
        }


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_surrogate_equals_its_definition(aggregation: str, ratio_level: str) -> None:
    x = {name: t.double() if t.is_floating_point() else t for name, t in rollouts().items()}
    logps = x["logps"].requires_grad_()
    settings = {"clip_low": 0.1, "dual_clip": 1.3, "kl_coef": 0.2, "ratio_level": ratio_level}
    value = clipped_surrogate_loss(**x, **settings, aggregation=aggregation, max_completion_length=9)
    totals, means, tokens, bounded = [], [], 0, 0
    for b in range(8):
        totals.append([]), means.append([])
        for g in range(4):
            if not x["rollout_mask"][b, g]:
                continue
            m = x["token_mask"][b, g]
            log_ratio = (logps - x["old_logps"])[b, g][m]
            ratio = log_ratio.sum().exp().expand_as(log_ratio) if ratio_level == "sequence" else log_ratio.exp()
            a = x["advantages"][b, g]
            r = (x["ref_logps"] - logps)[b, g][m]
            losses = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.2) * a)
            if a < 0:
                bounded += int((ratio > 1.3).sum())
                losses = losses.minimum(-1.3 * a)
            losses = losses + 0.2 * (r.exp() - r - 1)
            totals[b].append(losses.sum())
            means[b].append(losses.sum() / max(1, len(losses)))
            tokens += len(losses)
    assert bounded
    kept = sum(len(m) for m in means)
    zero = torch.zeros((), dtype=torch.float64)
    expected = {
        "prompt": sum(sum(m, zero) / max(1, len(m)) for m in means) / 8,
        "grpo": sum(sum(m, zero) for m in means) / kept,
        "bnpo": sum(sum(t, zero) for t in totals) / tokens,
        "dapo": sum(sum(t, zero) for t in totals) / tokens,
        "dr_grpo": sum(sum(t, zero) for t in totals) / (9 * kept),
    }[aggregation]
    torch.testing.assert_close(value.mean(), expected)
    torch.testing.assert_close(
        torch.autograd.grad(value.mean(), logps, retain_graph=True)[0], torch.autograd.grad(expected, logps)[0]
    )


@pytest.mark.parametrize("aggregation", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_micro_batches_with_the_units_of_the_whole(aggregation: str) -> None:
    x = {name: t.double() if t.is_floating_point() else t for name, t in rollouts().items()}
    settings = {"aggregation": aggregation, "max_completion_length": 9}
    whole = clipped_surrogate_loss(**x, **settings)
    units = units_per_prompt(x["token_mask"], x["rollout_mask"], dtype=torch.float64, **settings)
    parts = [
        clipped_surrogate_loss(**{name: t[rows] for name, t in x.items()}, **settings, units=units)
        for rows in (slice(0, 3), slice(3, 8))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_processes_with_unequal_shares_equal_one(two_processes: ProcessPool, aggregation: str) -> None:
    x = {name: t.double() if t.is_floating_point() else t for name, t in rollouts().items()}
    expected, expected_gradient = _surrogate(x, aggregation)
    values, gradients = zip(*two_processes.run(_surrogate_on_rank, x, aggregation), strict=True)
    if aggregation == "bnpo":  # by its definition: each process divides by its own tokens
        assert sum(values) / 2 != pytest.approx(expected, rel=1e-6)
        return
    assert sum(values) / 2 == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(torch.cat(gradients) / 2, expected_gradient, rtol=0, atol=1e-14)


def _surrogate(x: dict[str, Tensor], aggregation: str) -> tuple[float, Tensor]:
    logps = x["logps"].clone().requires_grad_()
    value = clipped_surrogate_loss(**{**x, "logps": logps}, aggregation=aggregation, max_completion_length=9)
    loss = value.sum() / shared_count(value.new_tensor(len(value)))
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.item(), gradient


def _surrogate_on_rank(rank: int, x: dict[str, Tensor], aggregation: str) -> tuple[float, Tensor]:
    rows = (slice(0, 3), slice(3, 8))[rank]
    return _surrogate({name: t[rows] for name, t in x.items()}, aggregation)


def test_what_is_masked_is_never_read() -> None:
    x = rollouts()
    hidden = ~(x["token_mask"] & x["rollout_mask"][:, :, None])
    garbage = dict(x)
    for name, filler in (("logps", -torch.inf), ("old_logps", torch.inf), ("ref_logps", torch.nan)):
        garbage[name] = x[name].masked_fill(hidden, filler)
    garbage["advantages"] = x["advantages"].masked_fill(~x["rollout_mask"], torch.nan)
    garbage["logps"].requires_grad_()
    for level in ("token", "sequence"):
        value = clipped_surrogate_loss(**garbage, kl_coef=0.1, ratio_level=level)
        torch.testing.assert_close(value, clipped_surrogate_loss(**x, kl_coef=0.1, ratio_level=level))
        (gradient,) = torch.autograd.grad(value.sum(), garbage["logps"])
        assert (gradient[hidden] == 0).all()
        assert gradient.isfinite().all()


def test_without_kl_the_reference_is_not_read() -> None:
    x = rollouts()
    expected = clipped_surrogate_loss(**{**x, "ref_logps": None})
    assert torch.equal(clipped_surrogate_loss(**{**x, "ref_logps": x["logps"] - torch.inf}), expected)


def test_no_gradient_to_data() -> None:
    x = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in rollouts().items()}
    clipped_surrogate_loss(**x, kl_coef=0.1).sum().backward()
    assert x["logps"].grad is not None
    assert all(x[name].grad is None for name in ("old_logps", "ref_logps", "advantages"))


def test_where_the_gradient_stops() -> None:
    """Beyond the bound on the side that pays; on the other side never."""
    log_ratio = torch.tensor([-5.0, -0.1, 0.1, 5.0], dtype=torch.float64)
    for a, expected in ((1.0, [1, 1, 1, 0]), (-1.0, [0, 1, 1, 1])):
        logps = log_ratio.clone().requires_grad_()
        losses = clipped_token_losses(
            logps,
            torch.zeros(4, dtype=torch.float64),
            torch.tensor(a),
            torch.ones(4, dtype=torch.bool),
            clip_low=0.2,
            clip_high=0.2,
        )
        (gradient,) = torch.autograd.grad(losses.sum(), logps)
        torch.testing.assert_close(gradient, -a * log_ratio.exp() * torch.tensor(expected))


def test_nan_advantage_shows() -> None:
    x = rollouts()
    x["rollout_mask"][:] = x["token_mask"][:] = True
    x["advantages"][2, 1] = torch.nan
    assert clipped_surrogate_loss(**x).isnan().nonzero().tolist() == [[2]]
