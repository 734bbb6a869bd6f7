from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heliostat.components import grao_advantages, group_direct_alignment_loss
from heliostat.components.grao import direct_alignment_terms
from tests.harness import GoldenCase, OperatorContract, ProcessPool, golden

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
INPUTS = (
    *("logps", "token_mask", "rewards", "rollout_mask"),
    *("target_logps", "target_token_mask", "target_reward", "target_available"),
)


def batch(prompts: int = 16, group: int = 4, length: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def masks(*shape: int) -> Tensor:
        return torch.arange(length) < torch.randint(0, length + 1, (*shape, 1), generator=generator)

    return {
        "logps": -torch.rand(prompts, group, length, generator=generator),
        "token_mask": masks(prompts, group),
        "rewards": torch.rand(prompts, group, generator=generator).round(decimals=1),
        "rollout_mask": torch.rand(prompts, group, generator=generator) < 0.8,
        "target_logps": -torch.rand(prompts, length, generator=generator),
        "target_token_mask": masks(prompts),
        "target_reward": torch.rand(prompts, generator=generator),
        "target_available": torch.rand(prompts, generator=generator) < 0.7,
    }


def loss_of(inputs: dict[str, Tensor], in_group: bool = True, eps: float = 1e-6, **settings: object) -> Tensor:
    x = dict(inputs)
    masks = {name: x[name] for name in ("rollout_mask", "target_available")}
    a, a_y = grao_advantages(x["rewards"], x["target_reward"], **masks, reference_in_group=in_group, eps=eps)
    return group_direct_alignment_loss(
        x["logps"], x["token_mask"], a, x["target_logps"], x["target_token_mask"], a_y, **masks, **settings
    )


class TestGRAO(OperatorContract):
    differentiable = ("logps", "target_logps")
    split = dict.fromkeys(INPUTS, 0)

    def call(self, **inputs: Tensor) -> Tensor:
        return loss_of(inputs)

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return batch(rows)

    def golden_cases(self) -> dict[str, GoldenCase]:
        return {str(case["name"]): self._golden(case) for case in golden("grao").values()}

    @staticmethod
    def _golden(case: dict) -> GoldenCase:
        beta, lam, eps = (float(case[f"param/{name}"]) for name in ("beta", "lam", "eps"))

        def call(x: dict[str, Tensor]) -> dict[str, Tensor]:
            masks = {name: x[name] for name in ("rollout_mask", "target_available")}
            in_group = bool(case["param/reference_in_group"])
            a, a_y = grao_advantages(x["rewards"], x["target_reward"], **masks, reference_in_group=in_group, eps=eps)
            arguments = x["logps"], x["token_mask"], a, x["target_logps"], x["target_token_mask"], a_y
            settings = {**masks, "beta": beta, "lam": lam}
            terms = direct_alignment_terms(*arguments, **settings)
            return {
                "advantages": a,
                "target_advantage": a_y,
                **{name: getattr(terms, name) for name in ("exploration", "imitation", "alignment")},
                "loss_per_prompt": group_direct_alignment_loss(*arguments, **settings, reduction="none"),
                "loss": group_direct_alignment_loss(*arguments, **settings),
            }

        return GoldenCase(
            inputs={name: case[f"in/{name}"] for name in INPUTS},
            call=call,
            outputs={name.removeprefix("out/"): value for name, value in case.items() if name.startswith("out/")},
            gradients={name: case[f"grad/{name}"] for name in ("logps", "target_logps")},
            cotangent=("loss", 1.0),
            tolerance=TOLERANCE,
        )

    def degenerate_cases(self):
        x = batch()
        return {
            "no token": {
                **x,
                "token_mask": x["token_mask"] & False,
                "target_token_mask": x["target_token_mask"] & False,
            },
            "no rollout": {**x, "rollout_mask": x["rollout_mask"] & False},
            "no target": {**x, "target_available": x["target_available"] & False},
            "no spread": {**x, "rewards": x["rewards"] * 0 + 0.1, "target_reward": x["target_reward"] * 0 + 0.1},
            "no prompt": {name: t[:0] for name, t in x.items()},
        }

    def error_cases(self):
        x = batch()
        r, r_y = x["rewards"], x["target_reward"]
        arguments = (x["logps"], x["token_mask"], r, x["target_logps"], x["target_token_mask"], r_y)

        def call(place: int | None = None, value: object = None, **settings: object) -> object:
            changed = [value if i == place else argument for i, argument in enumerate(arguments)]
            return lambda: group_direct_alignment_loss(*changed, **settings)

        return {
            "eps": (lambda: grao_advantages(r, r_y, eps=-1.0), "eps must be >= 0, got -1.0"),
            "target reward": (lambda: grao_advantages(r, r), r"target_reward must have the shape \(B,\), \(16,\), got"),
            "available": (lambda: grao_advantages(r, r_y, None, r_y), "target_available must be boolean"),
            "beta": (call(beta=-1.0), "beta must be >= 0, got -1.0"),
            "lam": (call(lam=-1.0), "lam must be >= 0, got -1.0"),
            "exploration": (call(exploration_weight=-1.0), "exploration_weight must be >= 0, got -1.0"),
            "reduction": (call(reduction="sum"), "reduction must be 'mean' or 'none', got 'sum'"),
            "logps": (call(0, r), r"logps must have shape \(B, G, T\), got \(16, 4\)"),
            "advantages": (call(2, r_y), r"advantages must have the shape \(B, G\) of logps, \(16, 4\), got \(16,\)"),
            "target": (call(3, r[:3]), r"target_logps must have shape \(B, T\) with B = 16, got \(3, 4\)"),
            "target mask": (call(4, r), "target_token_mask must be boolean"),
            "target advantage": (call(5, r), r"target_advantage must have the shape \(B,\)"),
        }


def test_all_wrong_and_all_right() -> None:
    rewards = torch.stack([torch.zeros(4), torch.ones(4)]).double()
    target = torch.ones(2, dtype=torch.float64)
    a, a_y = grao_advantages(rewards, target, eps=0.0)
    torch.testing.assert_close(a[0], torch.full((4,), -0.5, dtype=torch.float64))  # -1 / sqrt(G)
    assert a_y[0].item() == pytest.approx(2.0)  # sqrt(G)
    assert (a[1] == 0).all()
    assert a_y[1] == 0
    for part in grao_advantages(rewards, target, reference_in_group=False):  # nothing to be learnt from either
        assert (part == 0).all()


def test_no_spread_is_exact_in_float32() -> None:
    rewards, target = torch.full((1, 7), 0.1), torch.ones(1)
    a, a_y = grao_advantages(rewards, target, reference_in_group=False)
    assert (a == 0).all()
    assert a_y == 0  # and not 0.9 / eps


def test_a_judge_lets_go_of_the_target() -> None:
    """Rewards -1, 0, 1 against the target, which ties with itself."""
    losing, winning = torch.tensor([-1.0, -1, 0, -1]), torch.tensor([1.0, 0, 1, 1])
    _, a_y = grao_advantages(torch.stack([losing, winning]), torch.zeros(2))
    assert a_y[0] > 0 > a_y[1]


def test_weights_have_the_closed_form() -> None:
    x = {name: t.double() if t.is_floating_point() else t for name, t in batch().items()}
    x["token_mask"][:], x["target_token_mask"][:] = True, True
    x["rollout_mask"][:], x["target_available"][:] = True, True
    for in_group in (True, False):
        a, a_y = grao_advantages(x["rewards"], x["target_reward"], reference_in_group=in_group, eps=0.0)
        logps, target = x["logps"].clone().requires_grad_(), x["target_logps"].clone().requires_grad_()
        loss = loss_of({**x, "logps": logps, "target_logps": target}, in_group, 0.0, beta=0.5, lam=0.6)
        of_rollouts, of_target = torch.autograd.grad(loss, (logps, target))
        w = 1.6 * a / 4
        w_y = (0.5 + 0.6 / 4) * a_y if in_group else 0.5 * a_y  # the coupling vanishes over rollouts alone
        torch.testing.assert_close(of_rollouts, (-w / (5 * 16))[:, :, None].expand(-1, -1, 5))
        torch.testing.assert_close(of_target, (-w_y / (5 * 16))[:, None].expand(-1, 5))
        terms = direct_alignment_terms(logps, x["token_mask"], a, target, x["target_token_mask"], a_y)
        torch.testing.assert_close(terms.target_share, w_y.abs() / (w_y.abs() + w.abs().sum(1)))
        torch.testing.assert_close(terms.target_log_prob, target.detach().mean(1))


def test_without_a_target_there_is_plain_exploration() -> None:
    x = batch()
    x["target_available"][:] = False
    a, a_y = grao_advantages(x["rewards"], x["target_reward"] * torch.nan, x["rollout_mask"], x["target_available"])
    assert (a_y == 0).all()
    x["target_logps"] = (x["target_logps"] - torch.inf).requires_grad_()
    j = (x["logps"] * x["token_mask"]).sum(2) / x["token_mask"].sum(2).clamp_min(1)
    expected = -(a * j).sum(1) / x["rollout_mask"].sum(1).clamp_min(1)
    loss = loss_of(x, reduction="none")
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), x["target_logps"])
    assert (gradient == 0).all()


def test_one_rollout() -> None:
    rewards, target = torch.tensor([[0.0], [1.0], [2.0]]), torch.ones(3)
    a, a_y = grao_advantages(rewards, target, eps=0.0)
    assert a[:, 0].tolist() == [-1.0, 0.0, 1.0]
    assert a_y.tolist() == [1.0, 0.0, -1.0]
    assert all((part == 0).all() for part in grao_advantages(rewards, target, reference_in_group=False))


def test_what_is_masked_is_never_read() -> None:
    x = batch()
    hidden = ~(x["token_mask"] & x["rollout_mask"][:, :, None])
    garbage = {**x, "logps": x["logps"].masked_fill(hidden, -torch.inf)}
    garbage["rewards"] = x["rewards"].masked_fill(~x["rollout_mask"], torch.nan)
    garbage["target_reward"] = x["target_reward"].masked_fill(~x["target_available"], torch.nan)
    garbage["logps"].requires_grad_()
    loss = loss_of(garbage)
    torch.testing.assert_close(loss, loss_of(x))
    (gradient,) = torch.autograd.grad(loss, garbage["logps"])
    assert (gradient[hidden] == 0).all()


def test_bounded_target_advantage_never_unlearns() -> None:
    x = batch()
    x["target_available"][:], x["target_token_mask"][:] = True, True
    x["target_logps"].requires_grad_()
    settings = {"lam": 0.0, "reduction": "none"}
    _, a_y = grao_advantages(x["rewards"], x["target_reward"], x["rollout_mask"])
    assert (a_y < 0).any()
    (free,) = torch.autograd.grad(loss_of(x, **settings).sum(), x["target_logps"])
    (bounded,) = torch.autograd.grad(loss_of(x, **settings, min_target_advantage=0.0).sum(), x["target_logps"])
    assert (free > 0).any()
    torch.testing.assert_close(bounded, free.clamp_max(0))


def test_exploration_weight() -> None:
    x = batch()
    full, without, coupling = (
        loss_of(x, exploration_weight=w, beta=b, lam=c)
        for w, b, c in ((1.0, 0.5, 0.6), (0.0, 0.5, 0.0), (0.0, 0.0, 0.6))
    )
    torch.testing.assert_close(full, without + coupling + loss_of(x, beta=0.0, lam=0.0))


def test_nan_shows() -> None:
    x = batch()
    x["rollout_mask"][:] = True
    x["rewards"][2, 1] = torch.nan
    assert loss_of(x, reduction="none").isnan().nonzero().tolist() == [[2]]
    assert math.isnan(loss_of(x))


def test_processes_with_unequal_shares_equal_one(two_processes: ProcessPool) -> None:
    x = {name: t.double() if t.is_floating_point() else t for name, t in batch().items()}
    loss, gradient = _grao(x)
    losses, gradients = zip(*two_processes.run(_grao_on_rank, x), strict=True)
    assert sum(losses) / 2 == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient, rtol=0, atol=1e-14)


def _grao(x: dict[str, Tensor]) -> tuple[float, Tensor]:
    target = x["target_logps"].clone().requires_grad_()
    loss = loss_of({**x, "target_logps": target})
    return loss.item(), torch.autograd.grad(loss, target)[0]


def _grao_on_rank(rank: int, x: dict[str, Tensor]) -> tuple[float, Tensor]:
    return _grao({name: t[:3] if rank == 0 else t[3:] for name, t in x.items()})
