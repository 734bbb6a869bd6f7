from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heliostat.components import alignguard_lora
from heliostat.components.alignguard_lora import (
    DenseFisher,
    DiagonalFisher,
    KroneckerFisher,
    estimate_kronecker_fisher,
    geodesic_overlap,
    lora_fisher_penalty,
    normalize_fisher,
    riemannian_overlap,
    second_moments,
    top_eigenvectors,
    weight_fisher_penalty,
)
from tests.harness import GoldenCase, OperatorContract, ProcessPool, golden, relative_error

GOLDEN = golden("alignguard_lora")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


def cases(kind: str) -> list[str]:
    return [name for name in GOLDEN if name.startswith(kind)]


def tensors(case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    arrays = {name: torch.as_tensor(array) for name, array in GOLDEN[case].items()}
    return {n: t.to(dtype) if t.is_floating_point() and "expected" not in n else t for n, t in arrays.items()}


def number(value: Tensor) -> Any:
    return value.item()


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


# --- the penalty -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("kron"))
def test_penalty_matches_reference_vectors(case: str, dtype: torch.dtype) -> None:
    vectors, tolerance = tensors(case, dtype), TOLERANCE[dtype]
    fields = [vectors[name] for name in ("basis_out", "basis_in", "eigenvalues")]
    fisher = KroneckerFisher(*fields, vectors["mask"].bool(), vectors["eigenvalues"].sum())
    factors = (vectors["lora_A"], vectors["lora_B"], number(vectors["scaling"]), fisher)
    names = ("lambda_align", "lambda_task", "task_curvature", "lambda_collision", "alpha", "beta", "tau")
    settings = {name: number(vectors[name]) for name in names}
    reduction = "mean" if vectors["collision_mean"] else "sum"
    energies, grad_A, grad_B = lora_fisher_penalty(*factors, reduction=reduction, **settings)
    assert relative_error(energies.align, vectors["expected_align_energy"]) < tolerance
    assert relative_error(energies.task, vectors["expected_task_energy"]) < tolerance
    assert relative_error(energies.total, vectors["expected_total"]) < tolerance
    assert relative_error(grad_A, vectors["expected_grad_lora_A"]) < tolerance
    assert relative_error(grad_B, vectors["expected_grad_lora_B"]) < tolerance
    # E_RM is left out where it does not count; the vectors have it always.
    settings["lambda_collision"] = 0.1
    overlap = lora_fisher_penalty(*factors, reduction=reduction, **settings)[0].overlap
    assert relative_error(overlap, vectors["expected_riemannian_overlap"]) < tolerance
    _, grad_A, grad_B = lora_fisher_penalty(*factors, lambda_align=1.0, lambda_task=0.0)
    assert relative_error(grad_A, vectors["expected_align_grad_lora_A"]) < tolerance
    assert relative_error(grad_B, vectors["expected_align_grad_lora_B"]) < tolerance
    delta = number(vectors["scaling"]) * vectors["lora_B"] @ vectors["lora_A"]
    assert relative_error(fisher.project(delta), vectors["expected_delta_align"]) < tolerance


def samples(rows: int = 12, length: int = 4, d_in: int = 7, d_out: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, d_in, generator=generator, dtype=torch.float64) * torch.linspace(1, 3, d_in)
    return x, torch.randn(rows, length, d_out, generator=generator, dtype=torch.float64)


FISHERS = {
    "kronecker": lambda: KroneckerFisher.from_samples(*samples(), rank_out=4, rank_in=5, top_m=11),
    "dense": lambda: DenseFisher.from_samples(*samples(), top_m=5),
    "diagonal": lambda: DiagonalFisher.from_samples(*samples(), top_m=9),
}
SETTINGS = {"lambda_align": 0.4, "lambda_task": 0.3, "task_curvature": 0.7, "lambda_collision": 0.2, "beta": 3.0}


def penalty_by_definition(fisher: Any, delta: Tensor, reduction: str) -> Tensor:
    """The terms as the paper writes them, of the whole matrix."""
    aligned = fisher.project(delta)
    coefficients = fisher.coefficients(delta)
    align = (fisher.eigenvalues * coefficients.square()).sum()
    task = 0.7 * (delta - aligned).square().sum()
    overlap = riemannian_overlap(aligned, delta - aligned, beta=3.0, reduction=reduction)  # type: ignore[arg-type]
    return 0.4 * align + 0.3 * task + 0.2 * 0.5 * overlap


@pytest.mark.parametrize("kind", FISHERS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [1, 17, 2**22])
def test_gradients_are_those_of_autograd(
    kind: str, reduction: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignguard_lora, "_CHUNK_ELEMENTS", chunk)
    fisher = FISHERS[kind]()
    lora_A = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    lora_B = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    expected = penalty_by_definition(fisher, 1.5 * lora_B @ lora_A, reduction)
    expected.backward()
    energies, grad_A, grad_B = lora_fisher_penalty(lora_A, lora_B, 1.5, fisher, reduction=reduction, **SETTINGS)
    assert energies.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative_error(grad_A, lora_A.grad) < 1e-12
    assert relative_error(grad_B, lora_B.grad) < 1e-12

    weight, reference = torch.randn(2, 6, 7, dtype=torch.float64)
    weight.requires_grad_()
    expected = penalty_by_definition(fisher, weight - reference, reduction)
    expected.backward()
    energies, gradient = weight_fisher_penalty(weight, fisher, reference=reference, reduction=reduction, **SETTINGS)
    assert energies.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative_error(gradient, weight.grad) < 1e-12


@pytest.mark.parametrize("kind", FISHERS)
def test_projectors_are_orthogonal(kind: str) -> None:
    fisher, delta = FISHERS[kind](), torch.randn(6, 7, dtype=torch.float64)
    aligned = fisher.project(delta)
    assert 0.01 < aligned.norm() / delta.norm() < 0.99
    torch.testing.assert_close(fisher.project(aligned), aligned)
    assert (aligned * (delta - aligned)).sum().abs() < 1e-12
    # so that the geodesic term has nothing to say, and for entries the overlap neither
    assert geodesic_overlap(aligned, delta - aligned) < 1e-24
    assert (riemannian_overlap(aligned, delta - aligned) == 0) == (kind == "diagonal")


def test_diagonal_and_dense_energies_are_those_of_the_fisher_information() -> None:
    x, g = samples()
    gradients = torch.einsum("nti,ntj->nij", g, x)
    delta = torch.randn(6, 7, dtype=torch.float64)
    everything = {"lambda_align": 1.0, "lambda_task": 0.0}
    dense = DenseFisher.from_samples(x, g, top_m=12)  # rank of F: the number of samples
    energies, _ = weight_fisher_penalty(delta, dense, reference=torch.zeros_like(delta), **everything)
    expected = torch.einsum("nij,ij->n", gradients, delta).square().mean()
    assert energies.align.item() == pytest.approx(expected.item(), rel=1e-10)
    diagonal = DiagonalFisher.from_samples(x, g, top_m=42)
    energies, _ = weight_fisher_penalty(delta, diagonal, reference=torch.zeros_like(delta), **everything)
    expected = (gradients.square().mean(0) * delta.square()).sum()
    assert energies.align.item() == pytest.approx(expected.item(), rel=1e-10)
    trace = gradients.square().sum().item() / 12
    for fisher in (dense, diagonal, KroneckerFisher.from_samples(x, g)):
        assert fisher.trace.item() == pytest.approx(trace, rel=1e-12)
    whole = KroneckerFisher.from_samples(x, g)  # a complete basis: its diagonal has the whole trace
    assert whole.eigenvalues.sum().item() == pytest.approx(trace, rel=1e-12)


def test_a_stack_of_layers_is_its_layers() -> None:
    fishers = [KroneckerFisher.from_samples(*samples(seed=i), 4, 5, top_m=11 + i) for i in range(3)]
    stack = KroneckerFisher(*(torch.stack(field) for field in zip(*fishers, strict=True)))
    lora_A, lora_B = torch.randn(3, 2, 7, dtype=torch.float64), torch.randn(3, 6, 2, dtype=torch.float64)
    scaling, curvature = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.3, 0.0, 1.0])
    settings = {**SETTINGS, "task_curvature": curvature}
    energies, grad_A, grad_B = lora_fisher_penalty(lora_A, lora_B, scaling, stack, **settings)  # type: ignore[arg-type]
    for i, fisher in enumerate(fishers):
        settings = {**SETTINGS, "task_curvature": curvature[i].item()}
        one, one_A, one_B = lora_fisher_penalty(lora_A[i], lora_B[i], scaling[i].item(), fisher, **settings)
        for value, expected in zip(energies, one, strict=True):
            assert value[i].item() == pytest.approx(expected.item(), rel=1e-10)
        assert relative_error(grad_A[i], one_A) < 1e-12
        assert relative_error(grad_B[i], one_B) < 1e-12


def test_coordinates_of_the_reference_are_enough_without_task_term() -> None:
    fisher, (weight, reference) = FISHERS["kronecker"](), torch.randn(2, 6, 7, dtype=torch.float64)
    expected, expected_gradient = weight_fisher_penalty(weight, fisher, reference=reference, lambda_task=0.0)
    energies, gradient = weight_fisher_penalty(
        weight, fisher, reference_coefficients=fisher.coefficients(reference), lambda_task=0.0
    )
    assert energies.total.item() == pytest.approx(expected.total.item(), rel=1e-12)
    assert energies.task is None
    assert relative_error(gradient, expected_gradient) < 1e-12


@pytest.mark.parametrize("kind", FISHERS)
def test_no_update_no_penalty(kind: str) -> None:
    energies, grad_A, grad_B = lora_fisher_penalty(
        torch.randn(3, 7), torch.zeros(6, 3), 2.0, FISHERS[kind](), **SETTINGS
    )
    for value in (*energies, grad_A, grad_B):
        assert (value == 0).all()


def test_half_precision_factors_are_computed_in_float32() -> None:
    fisher = FISHERS["kronecker"]()
    lora_A, lora_B = torch.randn(3, 7).bfloat16(), torch.randn(6, 3).bfloat16()
    expected = lora_fisher_penalty(lora_A.float(), lora_B.float(), 2.0, fisher, **SETTINGS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = lora_fisher_penalty(lora_A, lora_B, 2.0, fisher, **SETTINGS)
    assert actual[1].dtype == torch.float32
    assert actual[0] == expected[0]
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[2], expected[2])


def test_nan_is_not_hidden() -> None:
    energies, grad_A, _ = lora_fisher_penalty(
        torch.full((3, 7), torch.nan), torch.randn(6, 3), 2.0, FISHERS["kronecker"](), **SETTINGS
    )
    assert energies.total.isnan()
    assert grad_A.isnan().all()


PENALTY_ERRORS = {
    "factors": (lambda f, a, b: lora_fisher_penalty(b, a, 1.0, f), r"lora_A must be \(r, d_in\).* got \(6, 3\) and"),
    "shape": (lambda f, a, b: lora_fisher_penalty(b.mT, a.mT, 1.0, f), "fisher was estimated for a matrix of another"),
    "lambda": (lambda f, a, b: lora_fisher_penalty(a, b, 1.0, f, lambda_task=-1.0), "lambda_task must be >= 0, got -1"),
    "alpha": (lambda f, a, b: lora_fisher_penalty(a, b, 1.0, f, alpha=2.0), r"alpha must lie in \[0, 1\], got 2.0"),
    "reduction": (lambda f, a, b: lora_fisher_penalty(a, b, 1.0, f, reduction="max"), "reduction must be one of"),
    "no reference": (lambda f, a, b: weight_fisher_penalty(b @ a, f), "either reference or reference_coefficients"),
    "other reference": (lambda f, a, b: weight_fisher_penalty(b @ a, f, reference=a), r"weight's shape \(6, 7\)"),
    "coordinates": (
        lambda f, a, b: weight_fisher_penalty(b @ a, f, reference_coefficients=torch.zeros(4, 5)),
        "lambda_task=0.1 and lambda_collision=0.0 need the reference weights",
    ),
}


@pytest.mark.parametrize("name", PENALTY_ERRORS)
@pytest.mark.parametrize("kind", FISHERS)
def test_wrong_calls(name: str, kind: str) -> None:
    call, pattern = PENALTY_ERRORS[name]
    with pytest.raises(ValueError, match=pattern):
        call(FISHERS[kind](), torch.randn(3, 7), torch.randn(6, 3))


# --- collision -------------------------------------------------------------------------------------------------------


def collision_cases(prefix: str, cotangent: str) -> dict[str, GoldenCase]:
    found = {}
    for name in cases("collision"):
        vectors = GOLDEN[name]
        inputs = {key: vectors[key] for key in ("delta_align", "delta_task", "metric") if key in vectors}

        def call(tensors: dict[str, Tensor], vectors: dict[str, np.ndarray] = vectors) -> dict[str, Tensor]:
            pair = tensors["delta_align"], tensors["delta_task"]
            settings = {"beta": float(vectors["beta"]), "tau": float(vectors["tau"])}
            return {
                "riemannian_sum": riemannian_overlap(*pair, **settings, reduction="sum"),
                "riemannian_mean": riemannian_overlap(*pair, **settings),
                "geodesic": geodesic_overlap(*pair, metric=tensors.get("metric"), eps=float(vectors["eps"])),
            }

        found[name] = GoldenCase(
            inputs,
            call,
            {key: vectors[f"expected_{key}"] for key in ("riemannian_sum", "riemannian_mean", "geodesic")},
            {f"delta_{part}": vectors[f"expected_{cotangent}_grad_{part}"] for part in ("align", "task")},
            (cotangent, 1.0),
            TOLERANCE,
        )
    return found


class TestRiemannianOverlap(OperatorContract):
    differentiable = ("delta_align", "delta_task")

    def call(self, **inputs: Tensor) -> Tensor:
        return riemannian_overlap(**inputs)  # type: ignore[arg-type]

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return {"delta_align": torch.randn(rows, 5), "delta_task": torch.randn(rows, 5)}

    def golden_cases(self) -> dict[str, GoldenCase]:
        return collision_cases("riemannian", "riemannian_sum")

    def degenerate_cases(self) -> dict[str, dict[str, Tensor]]:
        return {
            "zero": {"delta_align": torch.zeros(3, 2), "delta_task": torch.zeros(3, 2)},
            "huge": {"delta_align": torch.full((3, 2), 1e4), "delta_task": torch.full((3, 2), -1e4)},
        }

    def error_cases(self) -> dict[str, Any]:
        ones = torch.ones(2, 3)
        return {
            "shapes": (lambda: riemannian_overlap(ones, ones.mT), r"one shape, got \(2, 3\) and \(3, 2\)"),
            "beta": (lambda: riemannian_overlap(ones, ones, beta=-1.0), "beta must be >= 0, got -1.0"),
            "reduction": (lambda: riemannian_overlap(ones, ones, reduction="no"), "reduction must be one of"),  # type: ignore[arg-type]
        }


class TestGeodesicOverlap(TestRiemannianOverlap):
    def call(self, **inputs: Tensor) -> Tensor:
        return geodesic_overlap(**inputs)  # type: ignore[arg-type]

    def golden_cases(self) -> dict[str, GoldenCase]:
        return collision_cases("geodesic", "geodesic")

    def error_cases(self) -> dict[str, Any]:
        ones = torch.ones(2, 3)
        return {
            "shapes": (lambda: geodesic_overlap(ones, ones.mT), r"one shape, got \(2, 3\) and \(3, 2\)"),
            "metric": (
                lambda: geodesic_overlap(ones, ones, metric=ones[0]),
                r"metric must have .* \(2, 3\), got \(3,\)",
            ),
        }


# --- Fisher information ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("fisher"))
def test_fisher_matches_reference_vectors(case: str, dtype: torch.dtype) -> None:
    vectors, tolerance = tensors(case, dtype), TOLERANCE[dtype]
    pair = vectors["inputs"], vectors["output_grads"]
    ranks = [int(vectors[name]) for name in ("rank_out", "rank_in", "top_m")]
    for moment, side in zip(second_moments(*pair), ("input", "output"), strict=True):
        assert relative_error(moment, vectors[f"expected_{side}_factor"]) < tolerance
        spectrum = torch.linalg.eigvalsh(moment).flip(0)
        assert relative_error(spectrum, vectors[f"expected_{side}_spectrum"]) < tolerance
    fisher = KroneckerFisher.from_samples(*pair, *ranks)
    for basis, side in ((fisher.basis_in, "in"), (fisher.basis_out, "out")):
        assert relative_error(basis @ basis.mT, vectors[f"expected_projector_{side}"]) < max(tolerance, 1e-8)
    assert relative_error(fisher.eigenvalues, vectors["expected_eigenvalues"]) < tolerance
    assert torch.equal(fisher.mask, vectors["expected_mask"].bool())
    assert relative_error(fisher.trace, vectors["expected_trace"]) < tolerance
    delta = vectors["test_delta"]
    only_align = {"reference": torch.zeros_like(delta), "lambda_align": 1.0, "lambda_task": 0.0}
    energies, _ = weight_fisher_penalty(delta, fisher, **only_align)  # type: ignore[arg-type]
    assert relative_error(energies.align, vectors["expected_test_align_energy"]) < tolerance
    assert relative_error(fisher.project(delta), vectors["expected_test_delta_align"]) < tolerance
    dense = DenseFisher.from_samples(*pair, top_m=int(vectors["dense_top_m"]))
    assert relative_error(dense.eigenvalues, vectors["expected_dense_eigenvalues"]) < tolerance
    energies, _ = weight_fisher_penalty(delta, dense, **only_align)  # type: ignore[arg-type]
    assert relative_error(energies.total, vectors["expected_dense_align_energy"]) < tolerance
    assert relative_error(dense.project(delta), vectors["expected_dense_delta_align"]) < tolerance


def test_normalisation_matches_reference_vectors(dtype: torch.dtype) -> None:
    arrays = tensors("normalise0", dtype)
    layers = [f"layer{i}" for i in range(3)]
    eye = torch.eye(1, dtype=dtype)
    fishers = {
        name: KroneckerFisher(
            eye, eye, arrays[f"{name}/eigenvalues"], arrays[f"{name}/mask"].bool(), arrays[f"{name}/eigenvalues"].sum()
        )
        for name in layers
    }
    normalised = normalize_fisher(fishers)
    for name in layers:
        assert relative_error(normalised[name].eigenvalues, arrays[f"{name}/expected_normalised"]) < TOLERANCE[dtype]
        scale = normalised[name].trace / fishers[name].trace
        assert relative_error(scale, arrays["expected_scale"]) < TOLERANCE[dtype]
    by_layer = normalize_fisher(fishers, "layer")
    for fisher in by_layer.values():
        assert fisher.eigenvalues[fisher.mask].mean().item() == pytest.approx(1, rel=1e-5)
    assert normalize_fisher(fishers, "none") == fishers


def test_normalisation_refuses_what_cannot_be_scaled() -> None:
    fisher = KroneckerFisher.from_samples(*samples())
    silent = fisher._replace(eigenvalues=fisher.eigenvalues * 0)
    with pytest.raises(ValueError, match="all layers together sums to 0.0: the alignment data gives no usable"):
        normalize_fisher({"a": silent})
    with pytest.raises(ValueError, match="all layers together sums to nan"):
        normalize_fisher({"a": fisher._replace(eigenvalues=fisher.eigenvalues * torch.nan), "b": fisher})
    with pytest.raises(ValueError, match="layer 'b' sums to 0.0"):
        normalize_fisher({"a": fisher, "b": silent}, "layer")
    with pytest.raises(ValueError, match="mode must be one of .*, got 'sum'"):
        normalize_fisher({"a": fisher}, "sum")  # type: ignore[arg-type]


def test_ranks_are_clamped_and_ties_kept() -> None:
    x, g = samples(rows=1, length=1)
    fisher = KroneckerFisher.from_samples(x, g, 100, 100, top_m=3)
    assert fisher.eigenvalues.shape == (6, 7)
    assert fisher.eigenvalues[0, 0].item() == pytest.approx(fisher.trace.item())  # one sample, one direction
    tied = torch.tensor([[4.0, 2.0, 2.0], [2.0, 1.0, 0.0]])
    assert alignguard_lora._top_mask(tied, 2).tolist() == [[True, True, True], [True, False, False]]


def test_large_moments_by_subspace_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    basis = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64))[0]
    moment = basis @ torch.diag(0.8 ** torch.arange(200, dtype=torch.float64)) @ basis.mT
    exact = top_eigenvectors(moment, 8)
    monkeypatch.setattr(alignguard_lora, "_LARGEST_EIGH", 100)
    found = top_eigenvectors(moment, 8)
    torch.testing.assert_close(found.mT @ found, torch.eye(8, dtype=torch.float64))
    assert (found @ found.mT - exact @ exact.mT).norm() < 0.02
    assert (found.mT @ moment @ found).diagonal().diff().max() < 0


@pytest.mark.parametrize("rows", [50, 5000])  # of rank 50; and with eigenvalues that hardly differ
def test_subspace_iteration_holds_as_much_of_the_trace(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(rows, 300) * torch.linspace(1, 3, 300)
    moment = x.mT @ x / rows
    exact = top_eigenvectors(moment, 16)
    monkeypatch.setattr(alignguard_lora, "_LARGEST_EIGH", 100)
    found = top_eigenvectors(moment, 16)
    held = [torch.trace(basis.mT @ moment @ basis).item() for basis in (found, exact)]
    assert held[0] == pytest.approx(held[1], rel=1e-4)
    assert torch.equal(found, top_eigenvectors(moment, 16))  # the same on every process


def test_padding_is_left_out_of_the_inputs_moment() -> None:
    x, g = samples()
    valid = torch.rand(12, 4) < 0.7
    second_in, second_out = second_moments(x, g * valid[..., None], valid)
    torch.testing.assert_close(second_in, x[valid].mT @ x[valid] / valid.sum())
    torch.testing.assert_close(second_out, torch.einsum("nti,ntj->ij", *[g * valid[..., None]] * 2) / 12)


# --- estimation on a network -----------------------------------------------------------------------------------------


class Net(nn.Module):
    """A layer that is called twice, an in-place function behind a layer, dropout, and checkpointing in two kinds."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.first, self.twice, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 11)
        self.dropout, self.reentrant = nn.Dropout(0.5), reentrant

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        if self.reentrant is None:
            return self.body(hidden)
        return checkpoint(self.body, hidden, use_reentrant=self.reentrant)

    def body(self, hidden: Tensor) -> Tensor:
        hidden = F.relu(self.first(hidden), inplace=True)
        hidden = self.dropout(self.twice(hidden.cumsum(1)).tanh())
        return self.last(self.twice(hidden))


def losses_of(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = module(batch["input_ids"])
    mask = batch["attention_mask"]
    terms = F.cross_entropy(logits.mT, batch["input_ids"].roll(1, 1), reduction="none") * mask
    return terms.sum(1) / mask.sum(1)


def token_batches(count: int = 5, rows: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        lengths = torch.randint(2, 6, (rows, 1), generator=generator)
        mask = (torch.arange(5) < lengths).long()
        batches.append({"input_ids": torch.randint(11, (rows, 5), generator=generator), "attention_mask": mask})
    return batches


def network(reentrant: bool | None = None) -> Net:
    torch.manual_seed(0)
    return Net(reentrant).double()


def layers_of(net: Net) -> dict[str, nn.Module]:
    return {"first": net.first, "twice": net.twice, "last": net.last}


def check_against_sample_gradients(net: Net, fishers: dict[str, KroneckerFisher]) -> None:
    net.eval()
    gradients: dict[str, list[Tensor]] = {name: [] for name in fishers}
    for batch in token_batches():
        for loss in losses_of(net, batch):
            net.zero_grad()
            loss.backward(retain_graph=True)
            for name, layer in layers_of(net).items():
                gradients[name].append(layer.weight.grad.clone())
    for name, fisher in fishers.items():
        stacked = torch.stack(gradients[name])
        inside = fisher.basis_out.mT @ stacked @ fisher.basis_in
        torch.testing.assert_close(fisher.eigenvalues, inside.square().mean(0))
        torch.testing.assert_close(fisher.trace, stacked.square().sum() / len(stacked))
        assert fisher.eigenvalues.sum() > 0.3 * fisher.trace


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant checkpoint"])
def test_estimate_is_that_of_sample_gradients(reentrant: bool | None) -> None:
    net = network(reentrant)
    fishers = estimate_kronecker_fisher(net, layers_of(net), token_batches(), losses_of, 4, 4)
    check_against_sample_gradients(net, fishers)


def test_frozen_networks_have_a_fisher_information_too() -> None:
    net = network()
    expected = estimate_kronecker_fisher(net, layers_of(net), token_batches(), losses_of)
    net.requires_grad_(False)
    actual = estimate_kronecker_fisher(net, layers_of(net), token_batches(), losses_of)
    for name in expected:
        torch.testing.assert_close(actual[name].eigenvalues, expected[name].eigenvalues)


def test_bases_are_those_of_the_moments_without_padding() -> None:
    net = network()
    fisher = estimate_kronecker_fisher(net, layers_of(net), token_batches(), losses_of, 3, 3)["first"]
    ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in token_batches()])
    x = net.embedding(ids)
    expected = top_eigenvectors((x.mT @ x).detach(), 3)
    torch.testing.assert_close(fisher.basis_in @ fisher.basis_in.mT, expected @ expected.mT)


def test_layers_in_groups_and_single_samples_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    expected = estimate_kronecker_fisher(net, layers_of(net), token_batches(), losses_of, 4, 4)
    monkeypatch.setattr(alignguard_lora, "_MOMENT_BYTES", 1)
    single = [{k: v[i : i + 1] for k, v in batch.items()} for batch in token_batches() for i in range(3)]
    actual = estimate_kronecker_fisher(net, layers_of(net), single, lambda m, b: losses_of(m, b)[0], 4, 4)
    for name, fisher in expected.items():
        torch.testing.assert_close(actual[name].eigenvalues, fisher.eigenvalues)
        torch.testing.assert_close(actual[name].trace, fisher.trace)


def test_estimate_leaves_the_network_as_it_was() -> None:
    net = network()
    net.twice.eval()
    losses_of(net, token_batches()[0]).sum().backward()
    modes = [part.training for part in net.modules()]
    before = [parameter.grad.clone() for parameter in net.parameters()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    estimate_kronecker_fisher(net, layers_of(net), token_batches(), losses_of)
    assert [part.training for part in net.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(part._forward_hooks for part in net.modules())


def test_two_processes_equal_one(two_processes: ProcessPool) -> None:
    """Five batches on two processes: one of them has a batch less."""
    expected = _estimate_on_rank(0)
    first, second = two_processes.run(_estimate_on_rank)
    for name, fisher in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))
        torch.testing.assert_close(first[name].trace, fisher.trace)
        torch.testing.assert_close(first[name].eigenvalues, fisher.eigenvalues)
        delta = torch.ones(len(fisher.basis_out), len(fisher.basis_in), dtype=torch.float64).cumsum(0)
        torch.testing.assert_close(first[name].project(delta), fisher.project(delta))  # the bases' signs are free


def _estimate_on_rank(rank: int) -> dict[str, KroneckerFisher]:
    net = network()
    return estimate_kronecker_fisher(net, layers_of(net), token_batches(), losses_of, 4, 4)


ESTIMATE_ERRORS = {
    "no layer": ({}, None, losses_of, "layers is empty"),
    "no batch": (None, [], losses_of, "batches is empty"),
    "shape": (None, None, lambda m, b: m(b["input_ids"])[..., 0], r"losses of the samples, \(B,\), got shape \(3, 5\)"),
    "not finite": (
        None,
        None,
        lambda m, b: losses_of(m, b) * torch.nan,
        "or their gradients at layer 'first', are not",
    ),
    "detached": (None, None, lambda m, b: losses_of(m, b).detach(), "does not depend on any of the layers"),
    "rows": (None, None, lambda m, b: losses_of(m, b)[:2], "gets 3 rows for 2 samples.* give batches of one sample"),
}


@pytest.mark.parametrize("name", ESTIMATE_ERRORS)
def test_wrong_estimates(name: str) -> None:
    layers, batches, loss_fn, pattern = ESTIMATE_ERRORS[name]
    net = network()
    given = layers_of(net) if layers is None else layers
    with pytest.raises(ValueError, match=pattern):
        estimate_kronecker_fisher(net, given, token_batches() if batches is None else batches, loss_fn)
    assert not any(part._forward_hooks for part in net.modules())
    assert net.training


def test_input_that_is_overwritten_is_refused() -> None:
    """Autograd itself would not mind: a frozen layer's input is not needed again."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x += self.layer(x)
            return x

    net = Residual()
    with pytest.raises(ValueError, match="the input of layer 'layer' is changed in place"):
        estimate_kronecker_fisher(
            net, {"layer": net.layer}, [torch.randn(3, 5)], lambda module, batch: module(batch).square().mean(1)
        )


@pytest.mark.parametrize("kind", [KroneckerFisher, DenseFisher, DiagonalFisher])
def test_samples_must_fit(kind: Any) -> None:
    x, g = samples()
    with pytest.raises(ValueError, match=r"got \(11, 4, 7\) and \(12, 4, 6\)"):
        kind.from_samples(x[1:], g, top_m=2)
