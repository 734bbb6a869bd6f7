from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heliostat.components import ShuffledGroupWhiteningHead, WhitenedInfoNCELoss, whitened_infonce_loss
from tests.harness import GoldenCase, OperatorContract, golden

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


def views(count: int = 3, rows: int = 16, dim: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1, rows, dim, generator=generator)
    return shared + 0.5 * torch.randn(count, rows, dim, generator=generator)


class TestLoss(OperatorContract):
    """The loss over all processes' rows."""

    differentiable = ("views",)
    split = {"views": 1}  # noqa: RUF012

    def call(self, views: Tensor) -> Tensor:
        return WhitenedInfoNCELoss(temperature=0.2, view_weights=(1.0, 0.7))(views)

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return {"views": views(rows=rows)}

    def degenerate_cases(self):
        return {
            "one row": {"views": views(rows=1)},
            "zero vectors": {"views": torch.zeros(3, 4, 12)},
            "all rows equal": {"views": torch.ones(3, 4, 12)},
            "huge": {"views": views() * 1e18},
        }

    def error_cases(self):
        z = views()
        return {
            "shape": (lambda: whitened_infonce_loss(z[0]), r"\(V, B, d\) with V >= 2 and B >= 1, got \(16, 12\)"),
            "one view": (lambda: whitened_infonce_loss(z[:1]), "V >= 2"),
            "empty": (lambda: whitened_infonce_loss(z[:, :0]), "B >= 1"),
            "temperature": (lambda: whitened_infonce_loss(z, 0.0), "temperature must be > 0, got 0.0"),
            "weights": (lambda: whitened_infonce_loss(z, view_weights=[1.0]), "V - 1 = 2 numbers"),
            "candidates": (
                lambda: whitened_infonce_loss(z, candidates=z[:2]),
                r"candidates must have shape \(3, M, 12\)",
            ),
            "first": (lambda: whitened_infonce_loss(z, first_candidate=1), r"first_candidate must lie in 0..0, got 1"),
        }


class TestHeadAndLoss(OperatorContract):
    """Whitening, projection and loss together, as a training step has them."""

    differentiable = ("hidden",)
    split = {"hidden": 1}  # noqa: RUF012
    autocast_tolerance = 5e-2
    compiles = False  # its parts do, see TestLoss and the whitening tests; `call` builds the module each time

    def call(self, hidden: Tensor, permutations: Tensor) -> Tensor:
        torch.manual_seed(0)
        head = ShuffledGroupWhiteningHead(12, 4, detach_transform=False, eps=1e-2).to(
            hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        )
        z = head.whiten(hidden, permutations)
        return WhitenedInfoNCELoss(temperature=0.2)(head.linear(z.to(head.linear.weight.dtype)).tanh())

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return {
            "hidden": views(rows=rows),
            "permutations": torch.stack([torch.randperm(12, generator=generator) for _ in range(3)]),
        }

    def golden_cases(self) -> dict[str, GoldenCase]:
        cases = {}
        for name, case in golden("whitened_cse").items():
            cases[name] = self._golden_case(case, "view", case["loss"], ("hidden", "weight", "bias"))
        case = golden("whitened_cse")["case0"] | {}
        case["grad_hidden"] = case["authors_row_order_grad_hidden"]
        cases["authors' row order"] = self._golden_case(case, "instance", case["authors_row_order_loss"], ("hidden",))
        return cases

    @staticmethod
    def _golden_case(case: dict, row_order: str, loss: object, gradients: tuple[str, ...]) -> GoldenCase:
        def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            hidden = inputs["hidden"]
            head = ShuffledGroupWhiteningHead(
                hidden.shape[2],
                num_groups=int(case["num_groups"]),
                eps=float(case["eps"]),
                detach_transform=bool(case["detach_transform"]),
                row_order=row_order,
            )
            parameters = {"linear.weight": inputs["weight"], "linear.bias": inputs["bias"]}
            z = torch.func.functional_call(head, parameters, (hidden, inputs["permutations"]))
            value = whitened_infonce_loss(z, float(case["temperature"]), case["view_weights"])
            return {"loss": value, "projected": z, "whitened": head.whiten(hidden, inputs["permutations"])}

        outputs = {"loss": loss}
        if row_order == "view":
            outputs |= {key: case[key] for key in ("projected", "whitened")}
        return GoldenCase(
            inputs={key: case[key] for key in ("hidden", "permutations", "weight", "bias")},
            call=call,
            outputs=outputs,
            gradients={key: case[f"grad_{key}"] for key in gradients},
            cotangent=("loss", 1.0),
            tolerance=TOLERANCE,
        )


def test_two_views_are_simcse() -> None:
    z = views(2)
    a, b = (torch.nn.functional.normalize(v, dim=1) for v in z)
    expected = torch.nn.functional.cross_entropy(a @ b.T / 0.05, torch.arange(16))
    torch.testing.assert_close(whitened_infonce_loss(z), expected)


def test_terms_are_summed_over_views_and_ignore_scale() -> None:
    z = views(3)
    parts = whitened_infonce_loss(z[[0, 1]]) + 0.8 * whitened_infonce_loss(z[[0, 2]])
    torch.testing.assert_close(whitened_infonce_loss(z, view_weights=(1, 0.8)), parts)
    torch.testing.assert_close(whitened_infonce_loss(7 * z, view_weights=(1, 0.8)), parts)


def test_candidates_of_other_processes_are_negatives() -> None:
    z = views()
    torch.testing.assert_close(
        whitened_infonce_loss(z[:, 4:8], candidates=z, first_candidate=4) * 4,
        sum(whitened_infonce_loss(z[:, i : i + 1], candidates=z, first_candidate=i) for i in range(4, 8)),
    )


class TestHead:
    def test_default_groups_have_six_channels_like_the_authors_128_of_768(self) -> None:
        head = ShuffledGroupWhiteningHead(768)
        _, transform = _transform_of(head, torch.randn(1, 32, 768))
        assert transform.matrix.shape == (1, 128, 6, 6)

    def test_views_get_different_permutations_unless_shuffle_is_off(self) -> None:
        h = torch.randn(32, 12).expand(3, -1, -1)
        shuffled = ShuffledGroupWhiteningHead(12, 4).whiten(h)
        assert not torch.allclose(shuffled[0], shuffled[1])
        fixed = ShuffledGroupWhiteningHead(12, 4, shuffle=False).whiten(h)
        assert torch.equal(fixed[0], fixed[1])

    def test_refuses_evaluation(self) -> None:
        with pytest.raises(RuntimeError, match="is for training"):
            ShuffledGroupWhiteningHead(12, 4).eval()(views())

    def test_generator_can_be_given(self) -> None:
        first, second = (
            ShuffledGroupWhiteningHead(12, 4, generator=torch.Generator().manual_seed(5)).whiten(views())
            for _ in range(2)
        )
        assert torch.equal(first, second)

    def test_wrong_row_order_and_shape(self) -> None:
        with pytest.raises(ValueError, match="row_order must be one of"):
            ShuffledGroupWhiteningHead(12, row_order="sentence")
        with pytest.raises(ValueError, match=r"\(V, B, d\), got \(16, 12\)"):
            ShuffledGroupWhiteningHead(12)(views()[0])


def _transform_of(head: ShuffledGroupWhiteningHead, h: Tensor):
    from heliostat.components import group_whiten_views

    return group_whiten_views(h, return_transform=True, **head.whitening.settings)
