from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from heliostat.components import (
    BetaValueTracker,
    clipped_policy_loss,
    forgetting_factor,
    policy_drift,
    whiten_advantages,
)
from tests.harness import GoldenCase, OperatorContract, ProcessPool, golden, relative_error

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
CASES = golden("spo")
TRACES = [name for name in CASES if name.startswith("trace")]


def batch(rows: int = 16, length: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logps = -1 - 0.3 * torch.randn(rows, length, generator=generator).abs()
    return {
        "logps": logps,
        "old_logps": logps + 0.5 * torch.randn(rows, length, generator=generator),
        "advantages": torch.randn(rows, generator=generator),
        "mask": torch.arange(length) < torch.randint(0, length + 1, (rows, 1), generator=generator),
    }


class TestLoss(OperatorContract):
    differentiable = ("logps",)
    split = dict.fromkeys(("logps", "old_logps", "advantages", "mask"), 0)

    def call(self, **inputs: Tensor) -> Tensor:
        return clipped_policy_loss(**inputs)

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return batch(rows)

    def golden_cases(self) -> dict[str, GoldenCase]:
        return {name: self._golden(case) for name, case in CASES.items() if name.startswith("loss")}

    @staticmethod
    def _golden(case: dict) -> GoldenCase:
        settings = {name: float(case[f"param/{name}"]) for name in ("clip_low", "clip_high", "dual_clip")}
        return GoldenCase(
            inputs={name: case[f"in/{name}"] for name in ("logps", "old_logps", "advantages", "response_mask")},
            call=lambda x: {"loss": clipped_policy_loss(*x.values(), **settings)},
            outputs={"loss": case["out/loss"]},
            gradients={"logps": case["grad/logps"]},
            cotangent=("loss", 1.0),
            tolerance=TOLERANCE,
        )

    def degenerate_cases(self):
        x = batch()
        return {
            "no token": {**x, "mask": x["mask"] & False},
            "no response": {name: t[:0] for name, t in x.items()},
            "far from the old policy": {**x, "old_logps": x["logps"] + 1000 * x["advantages"][:, None].sign()},
            "far the other way": {**x, "old_logps": x["logps"] - 1000 * x["advantages"][:, None].sign()},
        }

    def error_cases(self):
        x = batch()

        def call(**changes: object) -> object:
            return lambda: clipped_policy_loss(**{**x, **changes})

        a, logps = x["advantages"], x["logps"]
        return {
            "logps": (call(logps=a), r"logps must have shape \(B, T\), got \(16,\)"),
            "old": (call(old_logps=a), "old_logps must have the shape of logps"),
            "advantages": (call(advantages=logps), r"advantages must have the shape \(B,\) of logps, \(16,\), got"),
            "mask": (call(mask=logps), "mask must be boolean"),
            "dual": (call(dual_clip=1.0), "dual_clip must be > 1, or None for no bound, got 1.0"),
            "reduction": (call(reduction="mean"), "reduction must be one of .* got 'mean'"),
            "drift": (lambda: policy_drift(logps, a, x["mask"]), "current_logps must have the shape"),
            "half life": (lambda: forgetting_factor(a, half_life=0.0), "half_life must be > 0, got 0.0"),
            "bounds": (lambda: forgetting_factor(a, rho_min=0.97), "0 < rho_min <= rho_max <= 1, got 0.97 and 0.96"),
            "whiten": (lambda: whiten_advantages(logps), r"adv must have shape \(B,\), got \(16, 5\)"),
            "eps": (lambda: whiten_advantages(a, -1.0), "eps must be >= 0, got -1.0"),
            "counts": (lambda: whiten_advantages(a, token_counts=a[:2]), "token_counts must have the shape"),
        }


def test_loss_equals_its_definition() -> None:
    x = {name: t.double() if t.is_floating_point() else t for name, t in batch().items()}
    x["old_logps"] = x["old_logps"] + 25 * (torch.rand(16, 5) < 0.2)  # beyond the bound of the exponent
    log_ratio = (x["logps"] - x["old_logps"]).clamp(-20, 20)
    a = x["advantages"][:, None]
    for dual_clip in (None, 1.5):
        losses = -torch.minimum(log_ratio.exp() * a, log_ratio.exp().clamp(0.8, 1.28) * a)
        if dual_clip is not None:
            losses = losses.where(a >= 0, losses.minimum(-dual_clip * a))
        losses = losses * x["mask"]
        tokens = x["mask"].sum(1)
        expected = {
            "none": losses,
            "token_mean": losses.sum() / tokens.sum(),
            "sequence_mean": (losses.sum(1) / tokens.clamp_min(1)).mean(),
        }
        for reduction, value in expected.items():
            actual = clipped_policy_loss(**x, dual_clip=dual_clip, reduction=reduction)
            torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-12)


# --- the authors' trace ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", TRACES)
def test_trace(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    settings = {key.removeprefix("param/"): value.item() for key, value in case.items() if key.startswith("param/")}
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    scores = torch.as_tensor(case["in/offline_scores"])
    tracker = BetaValueTracker.from_offline((scores > 0).sum(1), scores.shape[1], settings["rho_min"])

    def check(actual: Tensor, expected: object, slack: float = 1) -> None:
        torch.testing.assert_close(
            actual.double(), torch.as_tensor(expected).double(), rtol=tolerance * slack, atol=tolerance * slack
        )

    check(tracker.alpha, case["out/alpha0"])
    check(tracker.beta, case["out/beta0"])
    for step in range(settings["steps"]):
        given = {
            key.split("/")[-1]: torch.as_tensor(value)
            for key, value in case.items()
            if key.startswith(f"in/step{step}/")
        }
        given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
        out = {key.split("/")[-1]: value for key, value in case.items() if key.startswith(f"out/step{step}/")}
        check(tracker.sampling_probabilities(settings["exploration"]), out["sampling_prob"])
        index = given["prompt_index"]
        check(tracker.value(index), out["baseline"])
        raw = given["rewards"] - tracker.value(index).to(dtype)
        check(raw, out["raw_advantages"])
        check(whiten_advantages(raw, settings["adv_eps"]), out["advantages"])
        rho = torch.full(index.shape, settings["rho_min"], dtype=dtype)
        if settings["rho_type"] == "kl":
            drift = policy_drift(given["stored_logps"], given["current_logps"], given["response_mask"])
            drift = drift.where(~given["first_visit"], 0)
            check(drift, out["drift"])
            rho = forgetting_factor(drift, settings["drift_half_life"], settings["rho_min"], settings["rho_max"])
        check(rho, out["rho"], slack=10)  # the authors' is of float32
        tracker.update(index, given["rewards"], rho)
        check(tracker.alpha, out["alpha"], slack=10)
        check(tracker.beta, out["beta"], slack=10)
    assert tracker.visits.sum() == sum(len(case[f"in/step{step}/rewards"]) for step in range(settings["steps"]))


def test_papers_initialisation() -> None:
    case = CASES["init0"]
    scores = torch.as_tensor(case["in/offline_scores"])
    tracker = BetaValueTracker.from_offline(scores.sum(1), scores.shape[1], float(case["param/rho_min"]), prior=0.0)
    assert relative_error(tracker.alpha, case["out/alpha0"]) < 1e-12
    assert relative_error(tracker.beta, case["out/beta0"]) < 1e-12


# --- tracker ---------------------------------------------------------------------------------------------------------


def test_update_is_a_moving_average_whose_window_is_set_by_rho() -> None:
    tracker = BetaValueTracker.from_offline(torch.tensor([3, 0, 8]), 8)
    v, n = tracker.value(), tracker.effective_size()
    for step in range(400):
        r = torch.rand(3, dtype=torch.float64)
        tracker.update(torch.arange(3), r, 0.9)
        v, n = v + (r - v) / (0.9 * n + 1), 0.9 * n + 1
        if step < 5:
            torch.testing.assert_close(tracker.value(), v, rtol=0, atol=1e-12)
            torch.testing.assert_close(tracker.effective_size(), n, rtol=0, atol=1e-12)
    torch.testing.assert_close(tracker.effective_size(), torch.full((3,), 10.0, dtype=torch.float64))
    torch.testing.assert_close(tracker.effective_size(torch.tensor([1])), tracker.effective_size()[1:2])


def test_prompts_that_occur_twice_forget_once() -> None:
    tracker = BetaValueTracker.from_offline(torch.tensor([4, 4, 4]), 8)
    alpha, beta = tracker.alpha.clone(), tracker.beta.clone()
    tracker.update(torch.tensor([2, 0, 2]), torch.tensor([1.0, 0.25, 0.0]), torch.tensor([0.9, 0.96, 0.95]))
    rho = torch.tensor([0.96, 1.0, 0.9], dtype=torch.float32).double()
    torch.testing.assert_close(tracker.alpha, rho * alpha + torch.tensor([0.25, 0, 1]).double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(tracker.beta, rho * beta + torch.tensor([0.75, 0, 1]).double(), rtol=1e-7, atol=0)
    assert tracker.visits.tolist() == [1, 0, 2]


def test_missing_rewards_are_passed_over() -> None:
    tracker, other = BetaValueTracker(4), BetaValueTracker(4)
    tracker.update(torch.tensor([0, 1, 3]), torch.tensor([1.0, torch.nan, 0.0]), 0.9)
    other.update(torch.tensor([0, 3]), torch.tensor([1.0, 0.0]), 0.9)
    for name, value in other.state_dict().items():
        assert torch.equal(tracker.state_dict()[name], value)


def test_tracker_stays_in_float64_and_in_the_state_dict() -> None:
    module = nn.ModuleDict({"tracker": BetaValueTracker.from_offline(torch.tensor([1, 2]), 3)}).bfloat16()
    tracker = module["tracker"]
    assert tracker.alpha.dtype == tracker.beta.dtype == torch.float64
    assert tracker.alpha[0] == pytest.approx(8 * 1.5 / 4, rel=1e-15)
    assert sorted(module.state_dict()) == ["tracker.alpha", "tracker.beta", "tracker.visits"]
    tracker.update(torch.tensor([1]), torch.tensor([1.0]), 0.9)
    copy = BetaValueTracker(2)
    copy.load_state_dict(tracker.state_dict())
    assert torch.equal(copy.value(), tracker.value())
    assert module.to("meta")["tracker"].alpha.device.type == "meta"


def test_untried_prompts_start_from_the_prior() -> None:
    tracker = BetaValueTracker.from_offline(torch.tensor([0.0, 2.5]), torch.tensor([0, 5]))
    torch.testing.assert_close(tracker.alpha, torch.tensor([0.5, 4.0], dtype=torch.float64))
    torch.testing.assert_close(tracker.value(), torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_sampling_prefers_the_undecided() -> None:
    tracker = BetaValueTracker.from_offline(torch.tensor([0, 4, 8, 4]), 8, prior=0.0)
    p = tracker.sampling_probabilities(explore=0.05)
    weights = torch.tensor([0.05, 0.55, 0.05, 0.55], dtype=torch.float64)
    torch.testing.assert_close(p, weights / weights.sum())
    for _ in range(30):
        tracker.update(torch.tensor([1, 1]), torch.tensor([0.0, 1.0]), 1.0)
    rarer = tracker.sampling_probabilities(gamma=1.0)
    assert rarer[1] < rarer[3]
    weight = 0.5 / tracker.effective_size()[1] + 0.05
    torch.testing.assert_close(rarer[1] / rarer[0], weight / 0.05)


def test_tracker_errors() -> None:
    def raises(pattern: str):
        return pytest.raises(ValueError, match=pattern)

    tracker, index, r = BetaValueTracker(4), torch.tensor([0, 3]), torch.tensor([0.0, 1.0])
    with raises("num_prompts must be >= 1, got 0"):
        BetaValueTracker(0)
    with raises("prior must be > 0"):
        BetaValueTracker(3, prior=0.0)
    with raises(r"successes must have shape \(n,\)"):
        BetaValueTracker.from_offline(torch.tensor(3), 8)
    with raises("successes must lie between 0 and trials"):
        BetaValueTracker.from_offline(torch.tensor([9]), 8)
    with raises(r"rho_min must be in \(0, 1\), got 1.0"):
        BetaValueTracker.from_offline(torch.tensor([3]), 8, rho_min=1.0)
    with raises("prior must be >= 0, got -1"):
        BetaValueTracker.from_offline(torch.tensor([3]), 8, prior=-1)
    with raises("prior=0 needs trials of every prompt"):
        BetaValueTracker.from_offline(torch.tensor([0, 1]), torch.tensor([0, 1]), prior=0)
    with raises(r"index must be integers \(B,\), got torch.float32"):
        tracker.update(r, r, 0.9)
    with raises(r"index must lie in 0\.\.3"):
        tracker.update(index + 1, r, 0.9)
    with raises("rewards must have the shape"):
        tracker.update(index, r[:1], 0.9)
    with raises(r"rewards must lie in \[0, 1\], got 0.0..2.0: scale them"):
        tracker.update(index, 2 * r, 0.9)
    with raises(r"rho must be in \(0, 1\]"):
        tracker.update(index, r, 0.0)
    with raises("rho must have the shape"):
        tracker.update(index, r, torch.ones(3))
    with raises("explore must be > 0"):
        tracker.sampling_probabilities(0.0)
    with raises(r"gamma must be in \[0, 1\], got 2"):
        tracker.sampling_probabilities(gamma=2)
    assert torch.equal(tracker.value(), BetaValueTracker(4).value())  # nothing has changed


# --- drift and whitening ---------------------------------------------------------------------------------------------


def test_drift_and_forgetting() -> None:
    stored = torch.tensor([[-1.0, -2.0, 7.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    now = torch.tensor([[-1.5, -1.9, -torch.inf], [1.0, 1.0, 1.0]])
    drift = policy_drift(stored, now, mask)
    torch.testing.assert_close(drift, torch.tensor([0.3, 0.0]))
    rho = forgetting_factor(torch.tensor([0.0, 0.0035, 0.006, 0.0116, 0.3, torch.nan]))
    expected = [0.96, 0.96, 2**-0.1, 0.875, 0.875]
    torch.testing.assert_close(rho[:5], torch.tensor(expected), rtol=1e-3, atol=0)
    assert rho[5].isnan()
    assert forgetting_factor(torch.tensor([0.06]), rho_min=0.1, rho_max=1.0) == 0.5


def test_whitening() -> None:
    a = torch.randn(9) + 3
    whitened = whiten_advantages(a)
    torch.testing.assert_close(whitened, (a - a.mean()) / a.std())
    counts = torch.randint(1, 5, (9,))
    spread = a.repeat_interleave(counts)
    by_token = whiten_advantages(a, token_counts=counts)
    torch.testing.assert_close(by_token.repeat_interleave(counts), (spread - spread.mean()) / spread.std())
    assert (whiten_advantages(torch.full((7,), 0.1), eps=0.0) == 0).all()
    assert whiten_advantages(torch.tensor([0.7])) == torch.tensor([0.7])  # one has no deviation
    assert whiten_advantages(torch.zeros(0)).shape == (0,)
    assert whiten_advantages(torch.tensor([1.0, torch.nan, 0.0])).isnan().all()
    assert whiten_advantages(a.bfloat16()).dtype == torch.float32
    assert not whiten_advantages(a.requires_grad_()).requires_grad


def test_processes_keep_the_same_tracker_and_whiten_together(two_processes: ProcessPool) -> None:
    index, rewards = torch.tensor([4, 1, 1, 0, 3, 1]), torch.tensor([0.1, 1.0, 0.3, torch.nan, 0.0, 0.7])
    rho = torch.tensor([0.9, 0.95, 0.9, 0.9, 0.92, 0.94])
    expected = _spo(index, rewards, rho)
    parts = two_processes.run(_spo_on_rank, index, rewards, rho)
    for _, state in parts:
        for name, value in expected[1].items():
            torch.testing.assert_close(state[name], value, rtol=1e-15, atol=0)
    assert torch.equal(parts[0][1]["alpha"], parts[1][1]["alpha"])
    whitened = two_processes.run(_whiten_on_rank, rho)
    torch.testing.assert_close(torch.cat(whitened), whiten_advantages(rho.double()), rtol=0, atol=1e-14)


def _spo(index: Tensor, rewards: Tensor, rho: Tensor) -> tuple[None, dict[str, Tensor]]:
    tracker = BetaValueTracker(5)
    tracker.update(index, rewards, rho)
    return None, tracker.state_dict()


def _spo_on_rank(rank: int, *arguments: Tensor) -> tuple[None, dict[str, Tensor]]:
    return _spo(*(t.chunk(2)[rank] for t in arguments))


def _whiten_on_rank(rank: int, a: Tensor) -> Tensor:
    own = a.double()[:5] if rank == 0 else a.double()[5:]  # one response on rank 1, which has no deviation by itself
    return whiten_advantages(own)


def test_unwhitened_error_is_wrong_on_no_rank_alone(two_processes: ProcessPool) -> None:
    """A reward out of range on one rank is refused by both, so that neither waits for the other."""
    for message in two_processes.run(_refused_on_rank):
        assert "rewards must lie in [0, 1], got 0.5..2.0" in message


def _refused_on_rank(rank: int) -> str:
    try:
        BetaValueTracker(2).update(torch.tensor([rank]), torch.tensor([2.0 if rank else 0.5]), 0.9)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_golden_spans_the_bounds() -> None:
    """The traces hold rho at, between and beyond the bounds; were they all clipped, drift would go untested."""
    rho = torch.cat([torch.as_tensor(v) for c in TRACES for k, v in CASES[c].items() if k.endswith("/rho")])
    assert ((rho > 0.8751) & (rho < 0.9599)).any()
    assert math.isclose(rho.max(), 0.96, rel_tol=1e-6)
