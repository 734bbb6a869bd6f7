from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from heliostat.advantages import GroupRelative, MedianCentered, ReferenceInGroup, ValueTracker
from heliostat.components import (
    BetaValueTracker,
    forgetting_factor,
    grao_advantages,
    group_relative_advantages,
    median_centered_advantages,
    whiten_advantages,
)
from tests.harness import ProcessPool


def batch_of(rewards: Any, mask: Any = None, **fields: Any) -> dict[str, Any]:
    rewards = torch.tensor(rewards, dtype=torch.float64)
    valid = rewards.isfinite() if mask is None else torch.tensor(mask)
    prompts, number = rewards.shape
    ids = torch.arange(prompts * number * 3).view(prompts, number, 3)
    return {
        "rewards": rewards,
        "rollout_mask": valid,
        "completion_ids": ids,
        "completion_mask": ids % 3 <= 1,
        "completion": [[f"{i}.{j}" for j in range(number)] for i in range(prompts)],
        "index": torch.arange(prompts),
        **fields,
    }


def test_group_relative() -> None:
    batch = batch_of([[0, 1, 1, 0.5], [1, 1, 1, 1], [0, float("nan"), 1, 0]])
    assert GroupRelative(ddof=0, eps=0.1)(batch) == {}
    expected = group_relative_advantages(batch["rewards"], batch["rollout_mask"], ddof=0, eps=0.1)
    assert torch.equal(batch["advantages"], expected)
    assert batch["advantages"][2, 1] == 0


def test_median_centered_leaves_one_out_of_everything() -> None:
    rewards = [[0.0, 0.5, 1.0], [1.0, 0.0, 0.0], [0.2, float("nan"), 0.6]]
    batch = batch_of(rewards)
    before = dict(batch)
    logged = MedianCentered(scale="std")(batch)
    found = median_centered_advantages(torch.tensor(rewards, dtype=torch.float64), scale="std")
    kept = [[0, 2], [0, 2], [1, 2]]  # of the last group the median, 0.2, goes, and the missing one is masked
    for row, places in enumerate(kept):
        assert batch["completion"][row] == [before["completion"][row][i] for i in places]
        for name in ("completion_ids", "completion_mask", "rewards"):
            torch.testing.assert_close(batch[name][row], before[name][row][places], equal_nan=True)
        assert torch.equal(batch["advantages"][row], found.advantages[row][places])
    assert batch["rollout_mask"].tolist() == [[True, True], [True, True], [False, True]]
    assert logged["max_advantage"] == found.advantages.abs().max()
    assert logged["zero_mad"] == pytest.approx(2 / 3)


def test_reference_in_group_takes_the_first_demonstration() -> None:
    fields = {
        "demonstration_available": torch.tensor([[False, True], [True, True], [False, False], [True, False]]),
        "demonstration_rewards": torch.tensor(
            [[torch.nan, 1], [0, 1], [torch.nan, torch.nan], [torch.nan, torch.nan]], dtype=torch.float64
        ),
    }
    batch = batch_of([[0, 0], [1, 0], [1, 0], [1, 0]], **fields)
    logged = ReferenceInGroup(beta=0.3, lam=0.5, exploration_weight=2.0)(batch)
    has = torch.tensor([True, True, False, False])  # the last one's demonstration could not be judged
    target = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    a, a_y = grao_advantages(batch["rewards"], target, None, has)
    torch.testing.assert_close(batch["advantages"], torch.tensor([[2.5], [2.5], [2.0], [2.0]]).double() * a)
    torch.testing.assert_close(batch["sft_weight"], torch.where(has, 0.3 * a_y - 0.5 * a.mean(1), 0))
    assert batch["teacher_index"].tolist() == [1, 0, -1, -1]
    assert logged["target_reward"] == 0.5
    fixed = batch_of([[0, 0], [1, 0], [1, 0], [1, 0]], **fields)
    estimator = ReferenceInGroup(target_reward=0.5, min_target_advantage=0.0)
    assert not estimator.scores_demonstrations
    estimator(fixed)
    assert fixed["teacher_index"].tolist() == [1, 0, -1, 0]
    _, a_y = grao_advantages(batch["rewards"], torch.full((4,), 0.5), None, fixed["teacher_index"] >= 0)
    assert (fixed["sft_weight"][0] > 0, a_y[0] > 0) == (True, True)


class Policy:
    """Scores tokens by their number, times what can be changed from outside."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, -0.01 * self.scale * ids.double(), 0)


def test_value_tracker_follows_the_policy() -> None:
    """Two visits: the second forgets by the drift on the response of the first."""
    estimator, policy = ValueTracker(offline_generations=0, half_life=1.0), Policy()
    estimator.setup(5)
    by_hand = BetaValueTracker(5)
    for visit, rewards in enumerate(([[1.0], [0.0], [0.5]], [[0.0], [1.0], [1.0]])):
        batch = batch_of(rewards, index=torch.tensor([4, 0, 2]))
        estimator(batch)
        surplus = batch["rewards"][:, 0] - by_hand.value(batch["index"])
        torch.testing.assert_close(batch["advantages"][:, 0], whiten_advantages(surplus))
        policy.scale = 1.0 + visit
        logged = estimator.after_update(batch, policy)
        # Tokens 0 and 1, 3 and 4, 6 and 7 are counted; their scores have moved by 0.01 times their numbers.
        drift = visit * 0.01 * torch.tensor([0.5, 3.5, 6.5], dtype=torch.float64)
        rho = forgetting_factor(drift, 1.0)
        by_hand.update(batch["index"], batch["rewards"][:, 0], rho)
        assert logged["drift"] == pytest.approx(drift.mean().item(), rel=1e-5)
        assert logged["rho"] == pytest.approx(rho.mean().item(), rel=1e-5)
        torch.testing.assert_close(estimator.tracker.alpha, by_hand.alpha, rtol=1e-6, atol=0)
    probabilities = estimator.sampling_probabilities()
    assert torch.allclose(probabilities, by_hand.sampling_probabilities())


def test_value_tracker_constant_forgetting_keeps_no_responses() -> None:
    estimator = ValueTracker(offline_generations=0, forgetting="constant", whiten="token")
    estimator.setup(3)
    by_hand = BetaValueTracker(3)
    batch = batch_of([[1.0, 0.0], [1.0, float("nan")]])
    estimator(batch)
    valid, counts = batch["rollout_mask"], batch["completion_mask"].sum(2)
    surplus = (batch["rewards"] - 0.5)[valid]
    expected = whiten_advantages(surplus, token_counts=counts[valid])
    torch.testing.assert_close(batch["advantages"][valid], expected)
    assert batch["advantages"][1, 1] == 0
    estimator.after_update(batch, lambda *_: pytest.fail("nothing is to be scored"))
    by_hand.update(torch.tensor([0, 0, 1, 1]), batch["rewards"].flatten(), 0.875)
    assert torch.equal(estimator.tracker.alpha, by_hand.alpha)
    assert estimator.stored_ids.shape == (3, 0)


def test_value_tracker_starts_once_and_its_state_is_whole() -> None:
    estimator = ValueTracker()
    assert estimator.offline_generations == 8
    estimator.setup(3)
    estimator.start(torch.tensor([8.0, 0.0, 4.0]), torch.tensor([8, 8, 8]))
    assert estimator.offline_generations == 0
    assert estimator.tracker.value().tolist() == pytest.approx([8.5 / 9, 0.5 / 9, 0.5])
    batch = batch_of([[1.0], [0.0], [1.0]])
    estimator(batch)
    estimator.after_update(batch, Policy())
    for fresh in (ValueTracker(), ValueTracker()):
        if fresh is not None:
            fresh.load_state_dict(estimator.state_dict())
            assert fresh.offline_generations == 0
            assert torch.equal(fresh.tracker.alpha, estimator.tracker.alpha)
            assert torch.equal(fresh.stored_ids, estimator.stored_ids)
    other = ValueTracker()
    other.setup(4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(estimator.state_dict())
    for ours, theirs, fits in ((1, 1, True), (1, 2, False), (1, None, True), (None, 2, True)):
        one, another = ValueTracker(), ValueTracker()
        one.setup(3, theirs)
        another.setup(3, ours)
        if fits:
            another.load_state_dict(one.state_dict())
        else:
            with pytest.raises(RuntimeError, match="has the values of other training prompts"):
                another.load_state_dict(one.state_dict())
    estimator.setup(3)  # a second fit
    with pytest.raises(MisconfigurationException, match="has the values of other training prompts"):
        estimator.setup(4)
    half = estimator.bfloat16()
    assert half.stored_logps.dtype == torch.float32
    assert half.tracker.alpha.dtype == torch.float64


def test_value_tracker_on_two_processes_equals_one(two_processes: ProcessPool) -> None:
    expected = _track(0, 1)
    for state in two_processes.run(_track, 2):
        for name, value in expected.items():
            # One process pads by two tokens, which nobody counts.
            actual = state[name][:, : value.shape[1]] if value.ndim == 2 else state[name]
            torch.testing.assert_close(actual, value, msg=name)


def _track(rank: int, world: int) -> dict[str, Tensor]:
    """Processes with completions of different lengths, and a prompt that both of them have."""
    estimator = ValueTracker(offline_generations=0)
    estimator.setup(6)
    policy = Policy()
    for step in range(3):
        index = torch.tensor([0, 3, 1, 3]) + step
        batch = batch_of([[1.0], [0.0], [step / 2], [1.0]], index=index)
        policy.scale = 1 + 0.5 * step
        rows = slice(None) if world == 1 else slice(2 * rank, 2 * rank + 2)
        local = {name: value[rows] for name, value in batch.items()}
        if world == 2 and rank == 0:
            local["completion_ids"] = torch.nn.functional.pad(local["completion_ids"], (0, 2))
            local["completion_mask"] = torch.nn.functional.pad(local["completion_mask"], (0, 2))
        estimator(local)
        estimator.after_update(local, policy)
    return {name: value.clone() for name, value in estimator.state_dict().items()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GroupRelative().check(1), "num_generations must be >= 2 for GroupRelative"),
        (lambda: MedianCentered().check(3), "num_generations must be even"),
        (lambda: ReferenceInGroup(beta=-1.0), "beta must be >= 0"),
        (lambda: ReferenceInGroup()(batch_of([[1.0]])), "needs demonstrations"),
        (lambda: ValueTracker(offline_generations=-1), "offline_generations must be >= 0"),
        (lambda: ValueTracker(forgetting="never"), "forgetting must be one of"),  # type: ignore[arg-type]
        (lambda: ValueTracker(whiten="batch"), "whiten must be one of"),  # type: ignore[arg-type]
        (lambda: ValueTracker(rho_min=0.97), "rho_min and rho_max must satisfy"),
        (lambda: ValueTracker().setup(None), "the data module has no num_prompts"),
        (lambda: ValueTracker()({"rewards": 1}), "needs the prompts' index"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        call()
