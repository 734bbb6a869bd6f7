from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from heliostat.components import PairLoss, multi_similarity_loss, multi_similarity_mine, pair_loss, pair_weights
from tests.components.test_multi_similarity import batch
from tests.harness import OperatorContract, golden, relative_error

SCHEMES = ("contrastive", "triplet", "lifted", "binomial")


@pytest.mark.parametrize("scheme", [*SCHEMES, "multi_similarity"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_weights_match_reference_vectors(scheme: str, dtype: torch.dtype, tolerance: float) -> None:
    case = golden("multi_similarity")["gpw0"]
    weights = pair_weights(
        torch.as_tensor(case["similarity"]).to(dtype),
        torch.as_tensor(case["labels"]),
        scheme,
        alpha=float(case["alpha"]),
        beta=float(case["beta"]),
        base=float(case["lam"]),
        margin=float(case["margin"]),
    )
    for actual, side in zip(weights, ("pos", "neg"), strict=True):
        assert relative_error(actual, case[f"{scheme}_{side}"]) < tolerance


def plain_loss(scheme: str, s: Tensor, labels: Tensor, alpha=2.0, beta=50.0, base=0.5, margin=0.1) -> Tensor:
    """The losses anchor by anchor, with autograd."""
    losses = []
    for i in range(len(s)):
        p = s[i][(labels == labels[i]) & (torch.arange(len(s)) != i)]
        n = s[i][labels != labels[i]]
        zero = s.new_zeros(())
        if scheme == "contrastive":
            loss = (n - base).clamp_min(0).sum() - p.sum()
        elif scheme == "triplet":
            loss = (n[None] - p[:, None] + margin).clamp_min(0).sum()
        elif scheme == "lifted":
            loss = ((base - p).logsumexp(0) + n.logsumexp(0)).clamp_min(0) if len(p) and len(n) else zero
        else:
            near = (1 + (alpha * (base - p)).exp()).log()
            far = (1 + (beta * (n - base)).exp()).log()
            loss = sum((part.mean() for part in (near, far) if len(part)), zero)
        losses.append(loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_are_those_of_the_written_out_loss(scheme: str, seed: int) -> None:
    x = batch(20, classes=6, seed=seed)
    x["labels"][:2] = torch.tensor([50, 51])  # two classes with a single row
    actual, expected = (x["embeddings"].double().requires_grad_() for _ in range(2))
    value = pair_loss(actual, x["labels"], scheme=scheme, margin=0.3)
    value.backward()
    f = torch.nn.functional.normalize(expected, dim=1)
    reference = plain_loss(scheme, f @ f.T, x["labels"], margin=0.3)
    reference.backward()
    torch.testing.assert_close(value, reference)
    torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize("scheme", [*SCHEMES, "multi_similarity"])
def test_weights_are_the_size_of_the_gradient(scheme: str) -> None:
    x = batch(18, classes=5)
    f = torch.nn.functional.normalize(x["embeddings"].double(), dim=1)
    own = torch.arange(18)
    refs = {"ref_labels": x["labels"], "own_index": own}
    w_pos, w_neg = pair_weights(f @ f.T, x["labels"], scheme, **refs)
    references = f.clone().requires_grad_()
    settings = {"ref_embeddings": references, **refs, "normalize": False, "reduction": "none"}
    if scheme == "multi_similarity":
        losses = multi_similarity_loss(f, x["labels"], mining=False, **settings)
    else:
        losses = pair_loss(f, x["labels"], scheme=scheme, **settings)
    for i in range(18):  # dL_i / dr_j = (w_neg - w_pos)_ij f_i
        (gradient,) = torch.autograd.grad(losses[i], references, retain_graph=True)
        torch.testing.assert_close(gradient, (w_neg - w_pos)[i][:, None] * f[i])


def test_multi_similarity_bounds_both_forces() -> None:
    x = batch(40, classes=8)
    f = torch.nn.functional.normalize(x["embeddings"].double(), dim=1)
    for weights in pair_weights(f @ f.T, x["labels"], "multi_similarity"):
        assert (weights >= 0).all()
        assert (weights.sum(1) < 1).all()


@pytest.mark.parametrize("scheme", [*SCHEMES, "multi_similarity"])
def test_mining_leaves_only_the_miners_pairs(scheme: str) -> None:
    x = batch(24, classes=6)
    f = torch.nn.functional.normalize(x["embeddings"], dim=1)
    kept = multi_similarity_mine(**x, epsilon=0.05)
    assert not (kept[0] | kept[1]).all(1).any()
    for weights, mask in zip(pair_weights(f @ f.T, x["labels"], scheme, epsilon=0.05), kept, strict=True):
        assert not weights[~mask].any()
        assert weights[mask].any()


def test_an_anchor_is_not_its_own_positive_whatever_the_references() -> None:
    s, labels = torch.eye(4), torch.zeros(4, dtype=torch.int64)
    w_pos, _ = pair_weights(s, labels, "contrastive")
    assert torch.equal(w_pos, 1 - torch.eye(4))
    w_pos, _ = pair_weights(s, labels, "contrastive", ref_labels=labels)
    assert torch.equal(w_pos, torch.ones(4, 4))


def test_wrong_weights_call() -> None:
    with pytest.raises(ValueError, match="scheme must be one of .* got 'npair'"):
        pair_weights(torch.eye(2), torch.arange(2), "npair")
    with pytest.raises(ValueError, match=r"similarity must have shape \(N, M\) = \(2, 2\), got \(2, 3\)"):
        pair_weights(torch.ones(2, 3), torch.arange(2), "triplet")


class _PairLoss(OperatorContract):
    differentiable = ("embeddings",)
    split: ClassVar = {"embeddings": 0, "labels": 0}
    scheme: str

    def call(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return PairLoss(self.scheme, margin=0.2, beta=10.0)(embeddings, labels)

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return batch(rows)

    def degenerate_cases(self):
        x = batch()
        return {
            "one row": batch(1),
            "no rows": {"embeddings": torch.zeros(0, 6), "labels": torch.zeros(0, dtype=torch.int64)},
            "one class": {**x, "labels": torch.zeros(16, dtype=torch.int64)},
            "all distinct": {**x, "labels": torch.arange(16)},
            "zero vectors": {**x, "embeddings": torch.zeros(16, 6)},
        }

    def error_cases(self):
        e, y = batch().values()
        return {
            "scheme": (lambda: pair_loss(e, y, scheme="multi_similarity"), "scheme must be one of"),
            "reduction": (lambda: pair_loss(e, y, reduction="max"), "reduction must be one of .* got 'max'"),
            "labels": (lambda: pair_loss(e, y[:-1]), "labels must have shape"),
        }

    def test_nan_is_not_masked_away(self) -> None:
        x = batch()
        x["embeddings"][0] = math.nan
        assert self.call(**x).isnan()


class TestContrastive(_PairLoss):
    scheme = "contrastive"


class TestTriplet(_PairLoss):
    scheme = "triplet"


class TestLifted(_PairLoss):
    scheme = "lifted"


class TestBinomial(_PairLoss):
    scheme = "binomial"
