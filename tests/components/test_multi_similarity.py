from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from heliostat.components import MultiSimilarityLoss, multi_similarity_loss, multi_similarity_mine
from heliostat.components.distributed import default_group
from tests.harness import GoldenCase, OperatorContract, ProcessPool, golden, relative_error

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
CASES = {name: case for name, case in golden("multi_similarity").items() if name.startswith("case")}


def batch(rows: int = 16, dim: int = 6, classes: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, dim, generator=generator)
    return {"embeddings": centres[labels] + torch.randn(rows, dim, generator=generator), "labels": labels}


def settings_of(case: dict) -> dict:
    threshold = float(case.get("duplicate_threshold", math.nan))
    return {
        "alpha": float(case["alpha"]),
        "beta": float(case["beta"]),
        "base": float(case["lam"]),
        "epsilon": float(case["epsilon"]),
        "mining": bool(case.get("mining", True)),
        "duplicate_threshold": None if math.isnan(threshold) else threshold,
    }


def references_of(case: dict) -> dict[str, Tensor]:
    return {name: torch.as_tensor(case[name]) for name in ("ref_labels", "own_index") if name in case}


def plain_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float = 0.1,
) -> Tensor:
    """The equations, anchor by anchor, with autograd."""
    f = torch.nn.functional.normalize(embeddings, dim=1)
    total = f.new_zeros(())
    for i in range(len(f)):
        s = f[i] @ f.T
        positive = (labels == labels[i]) & (torch.arange(len(f)) != i)
        negative = labels != labels[i]
        if positive.any() and negative.any():
            p = s[positive][s[positive] - epsilon < s[negative].max()]
            n = s[negative][s[negative] + epsilon > s[positive].min()]
            total = total + (1 + (-alpha * (p - base)).exp().sum()).log() / alpha
            total = total + (1 + (beta * (n - base)).exp().sum()).log() / beta
    return total / len(f)


class TestLoss(OperatorContract):
    """Over all processes' rows, the whole batch in one block."""

    differentiable = ("embeddings",)
    split = {"embeddings": 0, "labels": 0}  # noqa: RUF012
    block_size: int | None = None

    def call(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return MultiSimilarityLoss(beta=10.0, epsilon=0.3, block_size=self.block_size)(embeddings, labels)

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return batch(rows)

    def golden_cases(self) -> dict[str, GoldenCase]:
        return {name: self._golden_case(case) for name, case in CASES.items()} | {
            f"{name}, unit features": self._golden_case(case, normalize=False)
            for name, case in CASES.items()
            if "grad_features" in case
        }

    def _golden_case(self, case: dict, normalize: bool = True) -> GoldenCase:
        inputs = {name: case[name] for name in ("embeddings", "ref_embeddings") if name in case}
        gradients = {name: case[f"grad_{name}"] for name in inputs}
        if not normalize:
            unit = {
                k: torch.nn.functional.normalize(torch.tensor(v).double(), dim=1).numpy() for k, v in inputs.items()
            }
            inputs, gradients = unit, {"embeddings": case["grad_features"]}

        def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            labels = torch.as_tensor(case["labels"])
            more = settings_of(case) | references_of(case)
            more |= {"normalize": normalize, "block_size": self.block_size}
            return {
                "loss": multi_similarity_loss(**inputs, labels=labels, **more),
                "per_anchor": multi_similarity_loss(**inputs, labels=labels, **more, reduction="none"),
            }

        return GoldenCase(
            inputs=inputs,
            call=call,
            outputs={"loss": case["loss"], "per_anchor": case["per_anchor"]},
            gradients=gradients,
            cotangent=("loss", 1.0),
            tolerance=TOLERANCE,
        )

    def degenerate_cases(self):
        x = batch()
        return {
            "one row": batch(1),
            "no rows": {"embeddings": torch.zeros(0, 6), "labels": torch.zeros(0, dtype=torch.int64)},
            "one class": {**x, "labels": torch.zeros(16, dtype=torch.int64)},
            "all distinct": {**x, "labels": torch.arange(16)},
            "zero vectors": {**x, "embeddings": torch.zeros(16, 6)},
            "all rows equal": {**x, "embeddings": torch.ones(16, 6)},
            "huge": {**x, "embeddings": x["embeddings"] * 1e15},
            "odd labels": {**x, "labels": torch.tensor([-1, 2**62, -(2**62), 7] * 4)},
        }

    def error_cases(self):
        e, y = batch().values()
        r = {"ref_embeddings": e, "ref_labels": y}
        return {
            "labels": (lambda: multi_similarity_loss(e, y[:-1]), r"labels must have shape \(N,\) .* = 16, got \(15,\)"),
            "float labels": (lambda: multi_similarity_loss(e, y.float()), "labels must be integers, got torch.float32"),
            "embeddings": (
                lambda: multi_similarity_loss(e[0], y),
                r"embeddings must be floating point .*\(N, d\)",
            ),
            "alpha": (lambda: multi_similarity_loss(e, y, alpha=0.0), "alpha and beta must be > 0, got 0.0 and 50.0"),
            "reduction": (
                lambda: multi_similarity_loss(e, y, reduction="max"),
                "reduction must be .* got 'max'",
            ),
            "block": (lambda: multi_similarity_loss(e, y, block_size=0), "block_size must be >= 1, .* got 0"),
            "no ref_labels": (lambda: multi_similarity_loss(e, y, ref_embeddings=e), "ref_embeddings needs ref_labels"),
            "no refs": (lambda: multi_similarity_loss(e, y, ref_labels=y), "belong to ref_embeddings, which is None"),
            "width": (
                lambda: multi_similarity_loss(e, y, ref_embeddings=e[:, 1:], ref_labels=y),
                "as wide as embeddings, d = 6, got 5",
            ),
            "own": (
                lambda: multi_similarity_loss(e, y, **r, own_index=torch.arange(3)),
                r"own_index must be int64 of shape \(N,\) = \(16,\), got torch.int64 of shape \(3,\)",
            ),
        }


class TestBlockedLoss(TestLoss):
    """The same in blocks of five anchors, the last one smaller."""

    block_size = 5


class TestEachAnchor(OperatorContract):
    """Losses of the anchors one by one, against references with their own gradient, with backward from each."""

    differentiable = ("embeddings", "ref_embeddings")

    def call(self, embeddings: Tensor, labels: Tensor, ref_embeddings: Tensor, ref_labels: Tensor) -> Tensor:
        return multi_similarity_loss(
            embeddings,
            labels,
            ref_embeddings=ref_embeddings,
            ref_labels=ref_labels,
            beta=10.0,
            epsilon=0.3,
            reduction="none",
            block_size=3,
        )

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        other = batch(rows + 5, classes=5, seed=1)
        return batch(rows) | {f"ref_{name}": value for name, value in other.items()}

    def degenerate_cases(self):
        x = self.example()
        return {
            "no references": x | {"ref_embeddings": torch.zeros(0, 6), "ref_labels": torch.zeros(0, dtype=torch.int64)},
            "unknown classes": x | {"ref_labels": x["ref_labels"] + 100},
            "only positives": x | {"labels": x["labels"] * 0, "ref_labels": x["ref_labels"] * 0},
        }


@pytest.mark.parametrize("name", [name for name in CASES if bool(CASES[name].get("mining", True))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_miner_keeps_the_reference_pairs(name: str, dtype: torch.dtype) -> None:
    case, settings = CASES[name], settings_of(CASES[name])
    embeddings = {k: torch.as_tensor(case[k]).to(dtype) for k in ("embeddings", "ref_embeddings") if k in case}
    kept = multi_similarity_mine(
        **embeddings,
        labels=torch.as_tensor(case["labels"]),
        **references_of(case),
        epsilon=settings["epsilon"],
        duplicate_threshold=settings["duplicate_threshold"],
    )
    for mask, expected in zip(kept, (case["positive_mask"], case["negative_mask"]), strict=True):
        assert np.array_equal(mask.numpy(), expected.astype(bool))


@pytest.mark.parametrize("block_size", [1, 7, 16, 100])
@pytest.mark.parametrize("mining", [True, False])
def test_block_size_changes_nothing(block_size: int, mining: bool) -> None:
    x = batch(33, classes=7)
    (expected, expected_gradient), (actual, gradient) = (
        _value_and_gradient(x, block_size=size, mining=mining) for size in (None, block_size)
    )
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def _value_and_gradient(x: dict[str, Tensor], **settings: object) -> tuple[Tensor, Tensor]:
    embeddings = x["embeddings"].double().requires_grad_()
    value = multi_similarity_loss(embeddings, x["labels"], **settings)
    value.backward()
    return value.detach(), embeddings.grad


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_equations_written_out(seed: int) -> None:
    x = batch(24, classes=6, seed=seed)
    value, gradient = _value_and_gradient(x, beta=40.0, epsilon=0.2)
    embeddings = x["embeddings"].double().requires_grad_()
    expected = plain_loss(embeddings, x["labels"], beta=40.0, epsilon=0.2)
    expected.backward()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, embeddings.grad)


def test_only_the_miners_pairs_have_gradient() -> None:
    x = batch(24, classes=6)
    features = torch.nn.functional.normalize(x["embeddings"].double(), dim=1)
    references = features.clone().requires_grad_()
    own = torch.arange(24)
    for i in range(24):
        (gradient,) = torch.autograd.grad(
            multi_similarity_loss(
                features[i : i + 1],
                x["labels"][i : i + 1],
                ref_embeddings=references,
                ref_labels=x["labels"],
                own_index=own[i : i + 1],
                normalize=False,
            ),
            references,
        )
        positive, negative = multi_similarity_mine(features, x["labels"])
        assert torch.equal(gradient.abs().sum(1) > 0, (positive | negative)[i])


def test_does_not_depend_on_order_scale_or_names_of_the_classes() -> None:
    x = batch(20)
    expected = multi_similarity_loss(**x)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(multi_similarity_loss(x["embeddings"][order], x["labels"][order]), expected)
    torch.testing.assert_close(multi_similarity_loss(7 * x["embeddings"], 100 - x["labels"]), expected)


def test_reductions_agree() -> None:
    x = batch(20)
    each = multi_similarity_loss(**x, reduction="none")
    assert each.shape == (20,)
    torch.testing.assert_close(multi_similarity_loss(**x, reduction="sum"), each.sum())
    torch.testing.assert_close(multi_similarity_loss(**x), each.mean())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_is_not_masked_away(reduction: str) -> None:
    x = batch(20)
    x["embeddings"][3, 2] = math.nan
    embeddings = x["embeddings"].requires_grad_()
    value = multi_similarity_loss(embeddings, x["labels"], reduction=reduction)
    assert value.isnan().all()  # row 3 is a reference of all others
    value.sum().backward()
    assert embeddings.grad[3].isnan().any()


def test_nothing_to_learn_gives_a_zero_attached_to_the_graph() -> None:
    embeddings = torch.randn(4, 3, requires_grad=True)
    loss = multi_similarity_loss(embeddings, torch.arange(4))
    loss.backward()
    assert loss == 0
    assert torch.equal(embeddings.grad, torch.zeros(4, 3))


def test_large_unnormalised_similarities_stay_finite() -> None:
    x = batch(12)
    embeddings = (50 * x["embeddings"]).requires_grad_()
    loss = multi_similarity_loss(embeddings, x["labels"], normalize=False)
    loss.backward()
    assert loss.isfinite()
    assert embeddings.grad.isfinite().all()


class TestIgnoreLabel:
    def test_ignored_rows_are_as_if_absent(self) -> None:
        x = batch(20)
        kept = x["labels"] != 2
        rest = {name: value[kept] for name, value in x.items()}
        assert torch.equal(multi_similarity_loss(**x, ignore_label=2), multi_similarity_loss(**rest))
        each = multi_similarity_loss(**x, ignore_label=2, reduction="none")
        assert torch.equal(each[kept], multi_similarity_loss(**rest, reduction="none"))
        assert not each[~kept].any()

    def test_with_references(self) -> None:
        x, own = batch(20), torch.arange(20)
        refs = {"ref_embeddings": x["embeddings"], "ref_labels": x["labels"], "own_index": own}
        torch.testing.assert_close(
            multi_similarity_loss(**x, **refs, ignore_label=2), multi_similarity_loss(**x, ignore_label=2)
        )

    def test_all_ignored(self) -> None:
        x = batch(4)
        assert multi_similarity_loss(x["embeddings"], torch.zeros(4, dtype=torch.int64), ignore_label=0) == 0

    def test_two_processes_with_unequal_shares(self, two_processes: ProcessPool) -> None:
        x = batch(16)
        x["labels"][:5] = 9
        expected, expected_gradient = _value_and_gradient(x, ignore_label=9)
        values, gradients = zip(*two_processes.run(_ignoring_rank, x), strict=True)
        torch.testing.assert_close(torch.stack(values).mean(), expected)
        assert relative_error(torch.cat(gradients) / 2, expected_gradient) < 1e-9


def _ignoring_rank(rank: int, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    local = {name: value.chunk(2)[rank] for name, value in x.items()}
    return _value_and_gradient(local, ignore_label=9, process_group=default_group())


def test_references_and_process_group_exclude_each_other(two_processes: ProcessPool) -> None:
    for message in two_processes.run(_refused):
        assert "gather the references yourself" in message


def _refused(rank: int) -> str:
    x = batch()
    with pytest.raises(ValueError, match="process_group would have no effect") as refusal:
        multi_similarity_loss(
            **x, ref_embeddings=x["embeddings"], ref_labels=x["labels"], process_group=default_group()
        )
    return str(refusal.value)


def test_memory_is_linear_in_the_rows() -> None:
    """Peak bytes of a forward and backward, as the allocator reports them, far below the similarity matrix."""
    rows = 2048
    x = batch(rows, dim=8, classes=rows // 4)
    embeddings = x["embeddings"].requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        multi_similarity_loss(embeddings, x["labels"], block_size=32).backward()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert 0 < peak < rows * rows  # bytes: a quarter of the float32 matrix, and its gradient would double it


def test_no_gradient_is_computed_when_none_is_wanted() -> None:
    x = batch()
    with torch.no_grad():
        loss = multi_similarity_loss(x["embeddings"].requires_grad_(), x["labels"])
    assert not loss.requires_grad
