from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heliostat.components.cafa import class_aware_alignment_loss
from heliostat.components.gaussians import mahalanobis_sq
from tests.harness import GoldenCase, OperatorContract, golden, relative_error

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


def distances(rows: int = 16, classes: int = 5) -> Tensor:
    return torch.randn(rows, classes, 3, generator=torch.Generator().manual_seed(0)).square().sum(2) + 0.1


def labels(rows: int = 16, classes: int = 5) -> Tensor:
    return torch.arange(rows) % classes


class LossContract(OperatorContract):
    differentiable = ("distances",)
    split = {"distances": 0, "pseudo_labels": 0}  # noqa: RUF012
    include = True

    def call(self, distances: Tensor, pseudo_labels: Tensor) -> Tensor:
        return class_aware_alignment_loss(distances, pseudo_labels, include_predicted_class=self.include)

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return {"distances": distances(rows), "pseudo_labels": labels(rows)}

    def degenerate_cases(self) -> dict[str, dict[str, Tensor]]:
        return {
            "no rows": {"distances": distances(0), "pseudo_labels": labels(0)},
            "one row": {"distances": distances(1), "pseudo_labels": labels(1)},
            "all zero": {"distances": torch.zeros(4, 5), "pseudo_labels": labels(4)},
            "all equal": {"distances": torch.ones(4, 5), "pseudo_labels": labels(4)},
            "two classes": {"distances": distances(4, 2), "pseudo_labels": labels(4, 2)},
            "huge": {"distances": distances() * 1e30, "pseudo_labels": labels()},
        }


class TestLoss(LossContract):
    """Features to loss, as a step has it, for the reference vectors."""

    def golden_cases(self) -> dict[str, GoldenCase]:
        cases = golden("cafa").items()
        return {name: self._golden(case) for name, case in cases if case["kind"] in ("loss", "masked_loss")}

    @staticmethod
    def _golden(case: dict) -> GoldenCase:
        def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            pseudo_labels = inputs["logits"].argmax(1)
            factor = torch.linalg.cholesky(inputs["covariance"])
            distance = mahalanobis_sq(inputs["features"], inputs["mean"], factor)
            mask = inputs.get("class_is_valid")
            loss = class_aware_alignment_loss(
                distance,
                pseudo_labels,
                include_predicted_class=bool(case["include_predicted_class"]),
                class_mask=mask,
                floor=float(case["floor"]),
            )
            used = pseudo_labels.new_ones(len(pseudo_labels)) if mask is None else mask[pseudo_labels]
            return {"loss": loss, "distance": distance, "pseudo_label": pseudo_labels, "sample_is_used": used}

        outputs = ("loss", "distance", "pseudo_label", "sample_is_used")
        return GoldenCase(
            inputs={k: case[k] for k in ("features", "mean", "covariance", "logits", "class_is_valid") if k in case},
            call=call,
            outputs={key: case[f"expected_{key}"] for key in outputs if f"expected_{key}" in case},
            gradients={"features": case["expected_grad_features"]},
            cotangent=("loss", 1.0),
            tolerance=TOLERANCE,
        )

    def error_cases(self):
        d, y = distances(), labels()
        loss = class_aware_alignment_loss
        return {
            "shape": (lambda: loss(d[0], y), r"distances must have shape \(N, C\) with C >= 2 classes"),
            "one class": (lambda: loss(d[:, :1], y * 0), r"C >= 2 classes to tell apart, got \(16, 1\)"),
            "labels": (lambda: loss(d, y[1:]), r"N = distances.shape\[0\] = 16, got torch.int64 \(15,\)"),
            "label dtype": (lambda: loss(d, y.float()), "pseudo_labels must be integers"),
            "mask": (lambda: loss(d, y, class_mask=torch.ones(4) > 0), r"class_mask must be boolean of shape \(C,\)"),
            "mask dtype": (lambda: loss(d, y, class_mask=torch.ones(5)), "class_mask must be boolean.*float32"),
            "floor": (lambda: loss(d, y, floor=0.0), "floor must be > 0, got 0.0"),
        }


class TestLossOverOtherClasses(LossContract):
    include = False


def test_range_and_limits() -> None:
    d, y = distances(), labels()
    assert class_aware_alignment_loss(d, y) < 0
    torch.testing.assert_close(
        class_aware_alignment_loss(torch.full((4, 5), 3.0), labels(4)), torch.tensor(-math.log(5))
    )
    for include in (True, False):
        value = class_aware_alignment_loss(d, y, include_predicted_class=include)
        scaled = class_aware_alignment_loss(7 * d, y, include_predicted_class=include)
        torch.testing.assert_close(scaled, value)
    order = torch.randperm(16)
    torch.testing.assert_close(class_aware_alignment_loss(d[order], y[order]), class_aware_alignment_loss(d, y))


def test_including_the_predicted_class_damps_doubtful_samples() -> None:
    d, y = distances().double().requires_grad_(), labels()
    (with_own,) = torch.autograd.grad(class_aware_alignment_loss(d, y), d)
    (without,) = torch.autograd.grad(class_aware_alignment_loss(d, y, include_predicted_class=False), d)
    intra = d.detach().gather(1, y[:, None])
    r = intra / (d.detach().sum(1, keepdim=True) - intra)
    torch.testing.assert_close(with_own, without / (1 + r))


def test_two_classes_compare_with_the_other() -> None:
    d, y = distances(16, 2), labels(16, 2)
    expected = (d.gather(1, y[:, None]) / d.gather(1, 1 - y[:, None])).log().mean()
    torch.testing.assert_close(class_aware_alignment_loss(d, y, include_predicted_class=False), expected)


@pytest.mark.parametrize("include", [True, False])
def test_masked_classes_do_not_exist(include: bool) -> None:
    d, y = distances().double(), labels()
    mask = torch.tensor([True, False, True, True, False])
    d[:, 1] = torch.nan  # nothing of them may leak
    d[:, 4] = 1e300
    d.requires_grad_()
    loss = class_aware_alignment_loss(d, y, include_predicted_class=include, class_mask=mask)
    loss.backward()
    used = mask[y]
    renumbered = torch.tensor([0, -1, 1, 2, -1])[y[used]]
    kept = d.detach()[used][:, mask]
    expected = class_aware_alignment_loss(kept, renumbered, include_predicted_class=include)
    torch.testing.assert_close(loss, expected)
    assert d.grad.isfinite().all()
    assert not d.grad[~used].any()
    assert not d.grad[:, ~mask].any()


@pytest.mark.parametrize("include", [True, False])
def test_no_sample_left_is_zero_on_the_graph(include: bool) -> None:
    d = distances().requires_grad_()
    mask = torch.zeros(5, dtype=torch.bool)
    mask[0] = not include  # without the predicted class, a single class has nothing to be compared with
    loss = class_aware_alignment_loss(d, labels(), include_predicted_class=include, class_mask=mask)
    loss.backward()
    assert loss == 0
    assert not d.grad.any()


def test_at_the_mean_only_the_other_classes_push() -> None:
    d, y = distances(1).double(), torch.zeros(1, dtype=torch.long)
    d[0, 0] = 0
    d.requires_grad_()
    class_aware_alignment_loss(d, y, include_predicted_class=False).backward()
    assert d.grad[0, 0] == 0
    assert relative_error(d.grad[0, 1:], (-1 / d[0].sum()).expand(4).detach()) < 1e-12


def test_nan_is_not_hidden() -> None:
    d = distances()
    d[3, 2] = torch.nan
    assert class_aware_alignment_loss(d, labels()).isnan()
