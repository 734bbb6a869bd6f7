from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import Tensor

import heliostat.components.gaussians as module
from heliostat.components.gaussians import ClassGaussians, class_gaussians, mahalanobis_sq
from tests.harness import OperatorContract, ProcessPool, golden, relative_error

KINDS = ["class", "tied"]


def samples(rows: int = 60, classes: int = 5, dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of uneven classes; the last class is missing."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(rows, generator=generator).square() * (classes - 1)).long()
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(rows, dim, generator=generator) @ mixing + labels[:, None], labels


def assert_same(actual: ClassGaussians, expected: ClassGaussians, tolerance: float = 1e-13) -> None:
    assert torch.equal(actual.count, expected.count)
    assert relative_error(actual.mean, expected.mean) < tolerance
    assert relative_error(actual.covariance, expected.covariance) < tolerance


def by_definition(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    x = features.double()
    mean, covariance = torch.zeros(classes, x.shape[1]).double(), torch.zeros(classes, *2 * x.shape[1:]).double()
    for c in labels.unique():
        rows = x[labels == c]
        mean[c] = rows.mean(0)
        covariance[c] = (rows - mean[c]).mT @ (rows - mean[c]) / len(rows)
    return mean, covariance


STATISTICS = {name: case for name, case in golden("cafa").items() if case["kind"] == "statistics"}


class TestStatistics:
    @pytest.mark.parametrize("case", STATISTICS.values(), ids=list(STATISTICS))
    def test_match_reference_vectors(self, case: dict) -> None:
        features, labels = torch.as_tensor(case["features"]), torch.as_tensor(case["labels"])
        g = class_gaussians(features, labels, int(case["num_classes"]))
        assert g.count.tolist() == case["expected_count"].tolist()
        assert relative_error(g.mean, case["expected_mean"]) < 1e-12
        assert relative_error(g.covariance, case["expected_class_covariance"]) < 1e-12
        settings = {key: float(case[key]) for key in ("shrinkage", "jitter")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            factor = g.precision_factor(str(case["covariance"]), **settings)
        matrix, precision = factor @ factor.mT, torch.cholesky_inverse(factor)
        assert relative_error(matrix.expand_as(g.covariance), case["expected_regularised_covariance"]) < 1e-12
        assert relative_error(precision.expand_as(g.covariance), case["expected_precision"]) < 1e-8
        tied = class_gaussians(features, labels, int(case["num_classes"]), covariance="tied")
        if case["covariance"] == "tied":
            assert relative_error(tied.precision_factor("tied", **settings), factor) < 1e-12

    @pytest.mark.parametrize("block", [2**22, 1, 200])
    def test_blocks_of_uneven_classes(self, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
        monkeypatch.setattr(module, "_BLOCK_NUMBERS", block)
        x, y = samples(200, 12)
        mean, covariance = by_definition(x, y, 12)
        g = class_gaussians(x, y, 12)
        assert relative_error(g.mean, mean) < 1e-14
        assert relative_error(g.covariance, covariance) < 1e-13

    @pytest.mark.parametrize("kind", KINDS)
    def test_updates_and_merges_equal_one_pass_in_any_order(self, kind: str) -> None:
        x, y = samples()
        whole = class_gaussians(x, y, 5, covariance=kind)
        streamed = ClassGaussians.empty(5, 6, kind)
        for rows, labels in zip(x.split(7), y.split(7), strict=True):
            streamed.update(rows, labels)
        assert_same(streamed, whole)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
        merged = ClassGaussians.empty(5, 6, kind)
        for rows, labels in zip(x[order].split(13), y[order].split(13), strict=True):
            merged = merged.merge(class_gaussians(rows, labels, 5, covariance=kind))
        assert_same(merged, whole)

    def test_tied_is_the_weighted_mean(self) -> None:
        x, y = samples()
        g, tied = class_gaussians(x, y, 5), class_gaussians(x, y, 5, covariance="tied")
        assert tied.covariance.shape == (6, 6)
        expected = sum(n * s for n, s in zip(g.count, g.covariance, strict=True)) / len(x)
        assert relative_error(tied.covariance, expected) < 1e-13
        assert relative_error(tied.precision_factor("tied"), g.precision_factor("tied")) < 1e-13

    @pytest.mark.parametrize("kind", KINDS)
    def test_large_offset_costs_no_more_than_float64_must(self, kind: str) -> None:
        x, y = samples()
        plain = class_gaussians(x, y, 5, covariance=kind)
        moved = ClassGaussians.empty(5, 6, kind)
        for rows, labels in zip((x.double() + 1e6).split(7), y.split(7), strict=True):
            moved.update(rows, labels)
        assert relative_error(moved.covariance, plain.covariance) < 1e-8  # E[x^2] - E[x]^2 would leave 1e-4
        half = class_gaussians(x[:30].double() + 1e6, y[:30], 5, covariance=kind)
        merged = half.merge(class_gaussians(x[30:].double() + 1e6, y[30:], 5, covariance=kind))
        assert relative_error(merged.covariance, plain.covariance) < 1e-8

    def test_many_classes_in_small_batches_touch_only_their_own(self) -> None:
        g = ClassGaussians.empty(1000, 16)
        x, y = torch.randn(256, 16), torch.randint(1000, (256,))
        storage = g.covariance.data_ptr()
        g.update(x, y)
        assert g.covariance.data_ptr() == storage
        mean, covariance = by_definition(x, y, 1000)
        assert relative_error(g.mean, mean) < 1e-14
        assert relative_error(g.covariance, covariance) < 1e-13

    def test_empty_batch_single_samples_and_half_precision(self) -> None:
        x, y = samples()
        g = class_gaussians(x.bfloat16(), y, 5)
        assert g.mean.dtype == g.covariance.dtype == torch.float64
        assert relative_error(g.mean, by_definition(x.bfloat16(), y, 5)[0]) < 1e-14
        before = ClassGaussians(**{key: value.clone() for key, value in g.state_dict().items()})
        g.update(x[:0], y[:0])
        assert_same(g, before, 1e-300)
        one = class_gaussians(x[:1], y[:1], 5)
        assert not one.covariance.any()
        assert class_gaussians(x[:0], y[:0], 5).count.sum() == 0

    @pytest.mark.parametrize("kind", KINDS)
    def test_two_processes_equal_one(self, two_processes: ProcessPool, kind: str) -> None:
        x, y = samples()
        whole = class_gaussians(x, y, 5, covariance=kind)
        for state in two_processes.run(_all_reduce_on_rank, x, y, kind):
            assert_same(ClassGaussians(**state), whole)
        assert whole.all_reduce() is whole

    def test_state_is_plain_tensors(self) -> None:
        g = class_gaussians(*samples(), 5)
        file = io.BytesIO()
        torch.save(g.to("cpu").state_dict(), file)
        file.seek(0)
        assert_same(ClassGaussians(**torch.load(file, weights_only=True)), g, 1e-300)

    def test_leaves_its_input_alone_and_works_in_inference_mode(self) -> None:
        x, y = samples()
        expected = class_gaussians(x, y, 5)
        with torch.inference_mode():
            rows = x.double()
            before = rows.clone()
            g = class_gaussians(rows[:30], y[:30], 5)
            assert torch.equal(rows, before)
            merged = g.merge(class_gaussians(rows[30:], y[30:], 5))
        g.update(rows[30:], y[30:])
        for gaussians in (g, merged):
            assert_same(gaussians, expected)
            gaussians.update(x[:0], y[:0])  # in place
            z = x.double().requires_grad_()
            mahalanobis_sq(z, gaussians.mean, gaussians.precision_factor()).sum().backward()
            assert z.grad.isfinite().all()

    def test_class_mask(self) -> None:
        g = class_gaussians(torch.randn(5, 3), torch.tensor([0, 0, 1, 1, 2]), 4)
        assert g.class_mask().tolist() == [True, True, False, False]
        assert g.class_mask("tied").tolist() == [True, True, True, False]

    def test_errors(self) -> None:
        x, y = samples()
        g = class_gaussians(x, y, 5)
        tied = class_gaussians(x, y, 5, covariance="tied")
        broken = x.clone()
        broken[3, 0], broken[4, 1] = torch.nan, torch.inf
        for call, pattern in [
            (lambda: class_gaussians(x[0], y, 5), r"features must be floating, \(N, D\)"),
            (lambda: class_gaussians(x.long(), y, 5), "features must be floating"),
            (lambda: class_gaussians(x, y[1:], 5), r"N = features.shape\[0\] = 60, got torch.int64 \(59,\)"),
            (lambda: class_gaussians(x, y.float(), 5), "labels must be integers"),
            (lambda: class_gaussians(x, y, 3), r"labels must lie in 0..2, got 0..3"),
            (lambda: class_gaussians(x, y - 1, 5), r"labels must lie in 0..4, got -1"),
            (lambda: class_gaussians(broken, y, 5), "NaN or infinite values in 2 of 60 rows"),
            (lambda: class_gaussians(x, y, 5, covariance="full"), "covariance must be one of"),
            (lambda: g.update(x[:, 1:], y), r"features must have shape \(N, 6\), got \(60, 5\)"),
            (lambda: ClassGaussians.empty(0, 3), "num_classes and dim must be >= 1, got 0"),
            (lambda: g.merge(tied), "kind of covariance can be merged"),
            (lambda: g.merge(class_gaussians(x, y, 6)), r"mean \(5, 6\) and \(6, 6\)"),
            (lambda: tied.precision_factor(), "keep the tied covariance only"),
            (lambda: g.precision_factor(shrinkage=1.5), r"shrinkage must be in \[0, 1\], got 1.5"),
            (lambda: g.precision_factor(jitter=-1.0), "jitter must be >= 0, got -1.0"),
            (lambda: g.precision_factor("full"), "covariance must be one of"),
            (lambda: ClassGaussians(g.count[1:], g.mean, g.covariance), r"count must be \(C,\) and mean \(C, D\)"),
            (lambda: ClassGaussians(g.count, g.mean, g.covariance[1:]), r"covariance must be \(5, 6, 6\) or, tied"),
        ]:
            with pytest.raises(ValueError, match=pattern):
                call()


def _all_reduce_on_rank(rank: int, x: Tensor, y: Tensor, kind: str) -> dict[str, Tensor]:
    rows = slice(0, 13) if rank == 0 else slice(13, None)  # uneven, and classes are missing on the first
    return class_gaussians(x[rows], y[rows], 5, covariance=kind).all_reduce().state_dict()


class TestPrecisionFactor:
    def test_fewer_samples_than_dimensions(self) -> None:
        x, y = samples(40, 5, 24)
        g = class_gaussians(x, y, 5)
        with pytest.warns(UserWarning, match=r"of 5 covariance matrices are singular.*use shrinkage > 0 or covariance"):
            plain = g.precision_factor(shrinkage=0.0)
        assert plain.isfinite().all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            shrunk = g.precision_factor()
            g.precision_factor("tied", shrinkage=0.0)
        far = x[:4] + torch.randn(4, 24, generator=torch.Generator().manual_seed(2))  # off the span of any class
        ratio = mahalanobis_sq(far, g.mean, plain) / mahalanobis_sq(far, g.mean, shrunk)
        assert (ratio[:, (g.count > 1) & (g.count < 20)] > 100).all()

    def test_dead_coordinates(self) -> None:
        x, y = samples()
        x = x.relu()
        x[:, :3] = 0
        g = class_gaussians(x, y, 5)
        assert mahalanobis_sq(x, g.mean, g.precision_factor()).isfinite().all()
        distances = mahalanobis_sq(x, g.mean, g.precision_factor(shrinkage=0.0, jitter=1e-4))
        assert distances.isfinite().all()
        assert (distances >= 0).all()

    def test_indefinite_by_rounding_gets_more_jitter(self) -> None:
        covariance = torch.diag_embed(torch.tensor([[1.0, 1.0], [1.0, -5e-5], [2.0, 1.0]]).double())
        g = ClassGaussians(torch.full((3,), 9), torch.zeros(3, 2), covariance)
        with pytest.warns(UserWarning, match="1 covariance matrices needed more jitter.* 0.0001 in place of 1e-05"):
            factor = g.precision_factor(shrinkage=0.0)
        expected = covariance + torch.tensor([1e-5, 1e-4, 1e-5])[:, None, None] * torch.eye(2)
        torch.testing.assert_close(factor @ factor.mT, expected, rtol=1e-9, atol=1e-11)

    def test_indefinite_for_good_names_the_class(self) -> None:
        covariance = torch.diag_embed(torch.tensor([[1.0, 1.0], [1.0, -0.02]]).double())
        g = ClassGaussians(torch.tensor([9, 7]), torch.zeros(2, 2), covariance)
        with pytest.raises(ValueError, match=r"covariance of class 1 \(7 samples\) .* even with jitter 0.01: raise"):
            g.precision_factor(shrinkage=0.0)
        tied = ClassGaussians(torch.tensor([9, 7]), torch.zeros(2, 2), covariance[1])
        with pytest.raises(ValueError, match=r"the tied covariance \(16 samples\)"):
            tied.precision_factor("tied", shrinkage=0.0)

    def test_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        g = class_gaussians(*samples(), 5)
        expected = g.precision_factor()
        monkeypatch.setattr(module, "_BLOCK_NUMBERS", 80)  # two matrices at a time
        assert torch.equal(g.precision_factor(), expected)


class MahalanobisContract(OperatorContract):
    differentiable = ("features", "mean", "factor")
    covariance = "class"

    def call(self, features: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
        return mahalanobis_sq(features, mean, factor)

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        g = class_gaussians(*samples(), 5)
        factor = g.precision_factor(self.covariance, jitter=0.1)
        return {"features": samples(rows, seed=3)[0], "mean": g.mean.float(), "factor": factor.float()}

    def degenerate_cases(self) -> dict[str, dict[str, Tensor]]:
        example = self.example()
        at_mean = example["features"].clone()
        at_mean[:5] = example["mean"]
        return {
            "at the means": {**example, "features": at_mean},
            "no rows": {**example, "features": at_mean[:0]},
            "one row": {**example, "features": at_mean[:1]},
            "equal means": {**example, "mean": torch.zeros(5, 6)},
        }

    def error_cases(self):
        z, mu, lower = self.example().values()
        return {
            "features": (lambda: mahalanobis_sq(z[0], mu, lower), r"features must be \(N, D\)"),
            "width": (lambda: mahalanobis_sq(z[:, 1:], mu, lower), r"of the same D, got \(16, 5\) and \(5, 6\)"),
            "factor": (lambda: mahalanobis_sq(z, mu, torch.eye(5)), r"factor must be \(5, 6, 6\) or \(6, 6\), got"),
        }


class TestClassDistances(MahalanobisContract):
    pass


class TestTiedDistances(MahalanobisContract):
    covariance = "tied"


class TestDistances:
    @pytest.mark.parametrize("kind", KINDS)
    def test_definition(self, kind: str) -> None:
        g = class_gaussians(*samples(), 5)
        factor = g.precision_factor(kind)
        z = samples(9, seed=3)[0].double()
        centred = z[:, None] - g.mean
        precision = (factor @ factor.mT).expand(5, 6, 6).inverse()
        expected = torch.einsum("ncd,cde,nce->nc", centred, precision, centred)
        assert relative_error(mahalanobis_sq(z, g.mean, factor), expected) < 1e-12
        repeated = mahalanobis_sq(z, g.mean, factor.expand(5, 6, 6))
        assert relative_error(mahalanobis_sq(z, g.mean, factor), repeated) < 1e-12

    @pytest.mark.parametrize("kind", KINDS)
    def test_zero_at_the_mean_and_exact_far_from_the_origin(self, kind: str) -> None:
        g = class_gaussians(*samples(), 5)
        factor = g.precision_factor(kind).float()
        mean = g.mean.float()
        assert not mahalanobis_sq(mean, mean, factor).diagonal().any()
        z = samples(9, seed=3)[0]
        offset = torch.full((6,), 1024.0)  # rounds z and mean, but the same for the expected value
        moved, moved_mean = z + offset, mean + offset
        expected = mahalanobis_sq(moved.double(), moved_mean.double(), factor.double())
        assert relative_error(mahalanobis_sq(moved, moved_mean, factor), expected) < 1e-4

    @pytest.mark.parametrize("block", [1, 100, 10**6])
    def test_blocked_equals_unblocked(self, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
        contract = TestClassDistances()
        example = {key: value.double() for key, value in contract.example().items()}
        expected, expected_gradients = contract.value_and_gradients(example)
        monkeypatch.setattr(module, "_BLOCK_NUMBERS", block)
        value, gradients = contract.value_and_gradients(example)
        assert torch.equal(value, expected)
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected_gradients[name]) < 1e-13

    @pytest.mark.parametrize("kind", KINDS)
    def test_backward_keeps_no_row_per_class_and_dimension(self, kind: str) -> None:
        rows, classes, dim = 16, 40, 32
        x, y = torch.randn(400, dim), torch.arange(400) % classes
        g = class_gaussians(x, y, classes)
        z = torch.randn(rows, dim, requires_grad=True)
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
            return tensor

        factor, mean = g.precision_factor(kind).float(), g.mean.float()
        given = {t.untyped_storage().data_ptr() for t in (factor, mean, z)}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            distances = mahalanobis_sq(z, mean, factor)
        added = sum(numbers for pointer, numbers in kept.items() if pointer not in given)
        assert added <= 2 * rows * classes + (rows + classes) * dim + dim * dim
        distances.sum().backward()
        assert z.grad is not None

    def test_dtypes(self) -> None:
        z, mean, factor = TestClassDistances().example().values()
        assert mahalanobis_sq(z.bfloat16(), mean.bfloat16(), factor.bfloat16()).dtype == torch.float32
        assert mahalanobis_sq(z, mean, factor.double()).dtype == torch.float64
