from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from heliostat.components import GroupWhitening, ShuffledGroupWhitening, group_whiten, group_whiten_views
from heliostat.components.distributed import default_group
from tests.harness import GoldenCase, OperatorContract, ProcessPool, golden, relative_error


def batch(rows: int = 16, dim: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator) @ torch.randn(dim, dim, generator=generator) + 1


class WhiteningContract(OperatorContract):
    differentiable = ("x",)
    split = {"x": 0}  # noqa: RUF012 - a declaration, never changed
    settings: dict[str, object] = {}  # noqa: RUF012
    keys: tuple[str, str] = ("", "")

    def call(self, x: Tensor, permutation: Tensor) -> Tensor:
        return group_whiten(
            x, num_groups=3, permutation=permutation, eps=1e-3, process_group=default_group(), **self.settings
        )

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return {"x": batch(rows), "permutation": torch.randperm(12, generator=torch.Generator().manual_seed(1))}

    def golden_settings(self, case: dict) -> dict[str, object]:
        return self.settings

    def golden_cases(self) -> dict[str, GoldenCase]:
        output, gradient = self.keys

        def make(name: str, case: dict) -> GoldenCase:
            def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
                y, (mean, matrix, eigenvalues) = group_whiten(
                    inputs["input"],
                    num_groups=int(case["num_groups"]),
                    permutation=inputs["permutation"],
                    eps=float(case["eps"]),
                    return_transform=True,
                    **self.golden_settings(case),
                )
                return {output: y, "mean": mean, "whitening_matrix": matrix, "eigenvalues": eigenvalues}

            names = [output]
            if output == "zca_output":
                names += ["whitening_matrix", "eigenvalues"] + (["mean"] if name != "case5" else [])
            return GoldenCase(
                inputs={key: case[key] for key in ("input", "permutation")},
                call=call,
                outputs={key: case[key] for key in names},
                gradients={"input": case[gradient]},
                cotangent=(output, case["cotangent"]),
                tolerance={
                    torch.float64: 1e-9,
                    torch.float32: {"case2": 2e-5, "case4": 2e-5, "case6": 2e-4}.get(name, 1e-5),
                },
            )

        return {name: make(name, case) for name, case in golden("group_whitening").items()}

    def degenerate_cases(self) -> dict[str, dict[str, Tensor]]:
        order = torch.arange(12)
        duplicate = batch()
        duplicate[:, 1] = duplicate[:, 0]
        constant = batch()
        constant[:, :4] = 3.0
        return {
            "two rows": {"x": batch(2), "permutation": order},
            "duplicate channel": {"x": duplicate, "permutation": order},
            "constant group": {"x": constant, "permutation": order},
            "all rows equal": {"x": torch.ones(16, 12), "permutation": order},
            "white +-1 (ties)": {"x": torch.sign(batch(16)), "permutation": order},
            "large mean": {"x": batch() + 1e4, "permutation": order},
        }


class TestEigh(WhiteningContract):
    keys = ("zca_output", "zca_grad")


@pytest.mark.filterwarnings("ignore:detach_transform with")
class TestEighDetached(WhiteningContract):
    keys = ("zca_output", "zca_grad_detached")
    settings = {"detach_transform": True}  # noqa: RUF012

    def test_gradcheck(self) -> None:
        """A detached gradient is not the derivative: it is that of x with W held fixed."""
        x = batch(16).double().requires_grad_()
        y, (_, w, _) = group_whiten(x, num_groups=1, eps=0.0, return_transform=True, **self.settings)
        y.backward(torch.ones_like(y).cumsum(0))
        fixed = x.detach().clone().requires_grad_()
        ((fixed - fixed.mean(0)) @ w[0]).backward(torch.ones_like(y).cumsum(0))
        torch.testing.assert_close(x.grad, fixed.grad)


class TestNewtonSchulz(WhiteningContract):
    keys = ("ns_output", "ns_grad")
    settings = {"method": "newton_schulz"}  # noqa: RUF012

    def golden_settings(self, case: dict) -> dict[str, object]:
        return {"method": "newton_schulz", "ns_iters": int(case["ns_iters"])}


class TestNewtonSchulzTen(WhiteningContract):
    keys = ("ns10_output", "ns10_grad")
    settings = {"method": "newton_schulz", "ns_iters": 10}  # noqa: RUF012


class TestCholesky(WhiteningContract):
    keys = ("cholesky_output", "cholesky_grad")
    settings = {"method": "cholesky"}  # noqa: RUF012


class TestViews(OperatorContract):
    """Several views at once, and the arguments' error messages, which all forms share."""

    differentiable = ("x",)
    split = {"x": 1}  # noqa: RUF012

    def call(self, x: Tensor, permutations: Tensor) -> Tensor:
        return group_whiten_views(x, permutations, group_size=4, eps=None, process_group=default_group())

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return {
            "x": torch.stack([batch(rows, seed=v) for v in range(3)]),
            "permutations": torch.stack([torch.randperm(12, generator=generator) for _ in range(3)]),
        }

    def test_gradcheck(self) -> None:
        """The relative ridge is a constant of the gradient, which numerical differentiation cannot know; see below."""
        x = self.example()["x"].double().requires_grad_()
        ridge = 1e-5 * x.detach()[0].var(0, unbiased=False).mean()
        free = group_whiten(x[0], num_groups=1, eps=None)
        fixed = group_whiten(x[0], num_groups=1, eps=float(ridge))
        torch.testing.assert_close(free, fixed)
        (expected,) = torch.autograd.grad(fixed.square().cumsum(0).sum(), x)
        (actual,) = torch.autograd.grad(free.square().cumsum(0).sum(), x)
        torch.testing.assert_close(actual, expected)

    def error_cases(self):
        x, order = batch(), torch.arange(12)
        return {
            "shape": (lambda: group_whiten(x[0], group_size=4), r"x must have shape \(N, d\), got \(12,\)"),
            "views": (lambda: group_whiten(x[None], group_size=4), "group_whiten_views"),
            "empty": (lambda: group_whiten(x[:0], group_size=4), r"without empty dimensions, got \(1, 0, 12\)"),
            "one row": (lambda: group_whiten(x[:1], group_size=4), "at least 2 rows .* got N = 1"),
            "singular": (
                lambda: group_whiten(x[:4], group_size=4, eps=0.0),
                r"eps = 0 and N = 4 .*\(group_size <= 3\)",
            ),
            "eps": (lambda: group_whiten(x, group_size=4, eps=-1.0), "eps must be .* got -1.0"),
            "group_size": (lambda: group_whiten(x, group_size=5), "group_size must divide .* d = 12, got 5"),
            "num_groups": (lambda: group_whiten(x, num_groups=0), "num_groups must divide"),
            "both": (lambda: group_whiten(x, num_groups=2, group_size=4), "contradict"),
            "method": (lambda: group_whiten(x, group_size=4, method="svd"), "method must be one of .*, got 'svd'"),
            "ns_iters": (lambda: group_whiten(x, group_size=4, ns_iters=5), "belongs to method='newton_schulz'"),
            "integers": (lambda: group_whiten(x.long(), group_size=4), "floating point, got torch.int64"),
            "permutation shape": (
                lambda: group_whiten(x, group_size=4, permutation=order[:5]),
                r"int64 of shape \(1, 12\)",
            ),
            "permutation values": (
                lambda: group_whiten(x, group_size=4, permutation=order.clamp_max(10)),
                "every channel 0..11 exactly once",
            ),
            "not finite": (lambda: group_whiten(x / 0, group_size=4), "NaN or infinite"),
            "module size": (lambda: GroupWhitening(12), "needs num_groups or group_size"),
            "module momentum": (lambda: GroupWhitening(12, group_size=4, momentum=0), r"momentum must be in \(0, 1\]"),
            "module input": (lambda: GroupWhitening(12, group_size=4)(x[:, :8]), r"shape \(N, 12\), got \(16, 8\)"),
        }


@pytest.mark.parametrize("method", ["eigh", "newton_schulz", "cholesky"])
def test_output_covariance_is_the_identity(method: str) -> None:
    x = batch(256, 12).double()
    y = group_whiten(x, group_size=4, eps=0.0, method=method, ns_iters=30 if method == "newton_schulz" else None)
    for group in y.split(4, dim=1):
        torch.testing.assert_close(group.T @ group / 256, torch.eye(4).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.mean(0), torch.zeros(12).double())


def test_zca_ignores_shift_and_scale_and_the_order_inside_a_group() -> None:
    x = batch(64).double()
    y = group_whiten(x, group_size=4, eps=0.0)
    torch.testing.assert_close(group_whiten(5 * x - 3, group_size=4, eps=0.0), y)
    inside = torch.tensor([3, 1, 2, 0, 4, 5, 6, 7, 8, 9, 10, 11])
    torch.testing.assert_close(group_whiten(x, group_size=4, eps=0.0, permutation=inside), y)


def test_group_size_one_standardises_and_one_group_is_full_zca() -> None:
    x = batch(64).double()
    standard = (x - x.mean(0)) / x.std(0, unbiased=False)
    torch.testing.assert_close(group_whiten(x, group_size=1, eps=0.0), standard)
    full = group_whiten(x, num_groups=1, eps=0.0)
    torch.testing.assert_close(full.T @ full / 64, torch.eye(12).double())


def test_views_equal_single_calls() -> None:
    example = TestViews().example()
    together = group_whiten_views(example["x"], example["permutations"], group_size=4)
    for view, order, whole in zip(example["x"], example["permutations"], together, strict=True):
        torch.testing.assert_close(group_whiten(view, group_size=4, permutation=order), whole)


@pytest.mark.parametrize(("rows", "groups"), [(8, 3), (24, 1), (2, 12), (13, 2)])
def test_default_groups_are_the_largest_with_twice_as_many_rows(rows: int, groups: int) -> None:
    _, transform = group_whiten(batch(rows), return_transform=True)
    assert transform.matrix.shape[0] == groups


@pytest.mark.parametrize(("size", "spread"), [(6, 0.98), (48, 0.95)])
def test_default_newton_schulz_whitens_groups_of_that_size(size: int, spread: float) -> None:
    x = torch.randn(20 * size, size)
    assert group_whiten(x, group_size=size, method="newton_schulz").std() > spread


def test_newton_schulz_survives_a_singular_covariance_in_float32() -> None:
    x = torch.randn(16, 1).repeat(1, 12).requires_grad_()
    y = group_whiten(x, num_groups=1, eps=1e-12, method="newton_schulz", ns_iters=40)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("seed", range(5))
def test_numerically_singular_covariance_without_ridge_stays_finite(seed: int) -> None:
    x = batch(32, 8, seed)
    x[:, 1] = x[:, 0]  # rank 7, which no count of rows and channels can tell
    x.requires_grad_()
    y = group_whiten(x, num_groups=1, eps=0.0)
    y.square().cumsum(0).sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert torch.equal(group_whiten(torch.ones(32, 8), num_groups=1, eps=0.0), torch.zeros(32, 8))


def test_exact_whitening_of_tiny_values_is_that_of_large_ones() -> None:
    x = batch(64).double()
    torch.testing.assert_close(group_whiten(1e-9 * x, num_groups=1, eps=0.0), group_whiten(x, num_groups=1, eps=0.0))


def test_newton_schulz_needs_no_ridge() -> None:
    y = group_whiten(batch(4), num_groups=1, eps=0.0, method="newton_schulz")
    assert y.isfinite().all()


def test_exact_gradient_is_bounded_under_rank_deficiency_and_the_detached_one_is_not() -> None:
    x, c = torch.randn(32, 64, dtype=torch.float64), torch.randn(32, 64, dtype=torch.float64)

    def gain(eps: float, detach: bool) -> float:
        z = x.clone().requires_grad_()
        group_whiten(z, num_groups=1, eps=eps, detach_transform=detach).backward(c)
        return float(z.grad.norm() / c.norm())

    with pytest.warns(UserWarning, match="N = 32 rows and groups of 64"):
        assert gain(1e-8, True) > 1e3
    assert gain(1e-8, False) == pytest.approx(gain(1e-3, False), rel=0.05)


def test_input_is_not_changed_and_no_second_derivative_is_claimed() -> None:
    x = batch().requires_grad_()
    kept = x.detach().clone()
    y = group_whiten(x, num_groups=1)
    assert torch.equal(x.detach(), kept)
    (gradient,) = torch.autograd.grad(y.square().cumsum(0).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class TestGroupWhiteningModule:
    def test_running_statistics_converge_to_those_of_the_data(self) -> None:
        layer = GroupWhitening(12, group_size=4, track_running_stats=True, momentum=0.2, eps=1e-6)
        x = batch(512)
        for _ in range(60):
            layer(x)
        layer.eval()
        torch.testing.assert_close(layer(x), group_whiten(x, group_size=4, eps=1e-6), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(layer(x[:1]), layer(x)[:1], atol=1e-5, rtol=1e-5)  # no batch mates needed

    def test_state_round_trip(self) -> None:
        layer = GroupWhitening(12, group_size=4, track_running_stats=True)
        layer(batch())
        other = GroupWhitening(12, group_size=4, track_running_stats=True)
        other.load_state_dict(layer.state_dict())
        x = batch(seed=3)
        assert torch.equal(layer.eval()(x), other.eval()(x))

    def test_without_tracking_evaluation_uses_the_batch(self) -> None:
        layer = GroupWhitening(12, group_size=4).eval()
        assert torch.equal(layer(batch()), group_whiten(batch(), group_size=4))


class TestShuffledGroupWhiteningModule:
    def test_every_call_draws_new_groups_and_state_restores_them(self) -> None:
        layer = ShuffledGroupWhitening(12, group_size=4)
        state = layer.state_dict()
        first, second = layer(batch()), layer(batch())
        assert not torch.allclose(first, second)
        other = ShuffledGroupWhitening(12, group_size=4)
        other.load_state_dict(state)
        assert torch.equal(other(batch()), first)
        assert torch.equal(other(batch()), second)

    def test_leaves_the_global_generator_alone(self) -> None:
        layer = ShuffledGroupWhitening(12, group_size=4)
        before = torch.get_rng_state()
        layer(batch())
        assert torch.equal(torch.get_rng_state(), before)

    def test_refuses_evaluation_and_wrong_shapes(self) -> None:
        layer = ShuffledGroupWhitening(12, group_size=4)
        with pytest.raises(ValueError, match=r"\(\[V,\] N, 12\), got \(16, 8\)"):
            layer(batch()[:, :8])
        with pytest.raises(RuntimeError, match="is for training"):
            layer.eval()(batch())

    def test_all_processes_use_the_permutations_of_the_first(self, two_processes: ProcessPool) -> None:
        first, second = two_processes.run(_draw_with_rank_seed)
        assert torch.equal(first, second)

    def test_default_groups_count_the_rows_of_all_processes(self, two_processes: ProcessPool) -> None:
        x = batch(16).double()
        parts = two_processes.run(_whiten_default, x)
        assert relative_error(torch.cat(parts), group_whiten(x)) < 1e-10

    def test_unequal_numbers_of_rows_are_weighted_by_count(self, two_processes: ProcessPool) -> None:
        x = batch(16).double()
        whole = group_whiten(x, group_size=4)
        parts = two_processes.run(_whiten_unequal, x)
        assert relative_error(torch.cat(parts), whole) < 1e-10


def _draw_with_rank_seed(rank: int) -> Tensor:
    layer = ShuffledGroupWhitening(12, group_size=4, generator=torch.Generator().manual_seed(rank))
    return layer.draw_permutations(3)


def _whiten_default(rank: int, x: Tensor) -> Tensor:
    return group_whiten(x.chunk(2)[rank], process_group=dist.group.WORLD)


def _whiten_unequal(rank: int, x: Tensor) -> Tensor:
    return group_whiten(x[:5] if rank == 0 else x[5:], group_size=4, process_group=dist.group.WORLD)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["eigh", "newton_schulz", "cholesky"])
def test_gpu_equals_cpu(method: str) -> None:
    x = batch(64).requires_grad_()
    y = group_whiten(x, group_size=4, method=method)
    y.square().cumsum(0).sum().backward()
    z = x.detach().cuda().requires_grad_()
    on_gpu = group_whiten(z, group_size=4, method=method)
    on_gpu.square().cumsum(0).sum().backward()
    assert relative_error(on_gpu.cpu(), y.detach()) < 1e-4
    assert relative_error(z.grad.cpu(), x.grad) < 1e-3
    assert math.isfinite(float(on_gpu.sum()))
