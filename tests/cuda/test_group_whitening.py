"""The whitening kernels without a GPU: compiled for GPUs, and run by the emulator, through torch's operators."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from heliostat.components import group_whiten, group_whiten_views
from heliostat.cuda import _launch
from heliostat.cuda import group_whitening as kernels
from tests.cuda import nvrtc
from tests.cuda.emulator import Builder, Emulator, KernelError, replay
from tests.harness import golden, relative_error

CASES = golden("group_whitening")


@pytest.fixture
def emulator(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """CPU tensors take the kernels, which the emulator runs."""
    return _emulate(Emulator(builder), monkeypatch)


@pytest.fixture
def race_checker(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    return _emulate(Emulator(builder, "races"), monkeypatch)


def _emulate(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    monkeypatch.setattr(_launch, "launch", emulator.launch)
    monkeypatch.setattr(_launch, "shared_memory_for_kernels", _a_hopper)
    return emulator


@torch.compiler.assume_constant_result
def _a_hopper(*_: object) -> int:
    return 227 * 1024


def in_slabs(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Make the kernels take as few rows a slab, as they do for large N."""
    for name in ("ONE_LAUNCH_ROWS", "STATS_ROWS", "APPLY_ROWS"):
        monkeypatch.setattr(kernels, name, rows)


def problem(
    views: int, rows: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated channels with means, permutations, and a cotangent."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(views, rows, dim, generator=generator)
    x = x @ (torch.randn(dim, dim, generator=generator) / dim**0.5 + torch.eye(dim)) + torch.arange(float(dim)) / dim
    order = torch.stack([torch.randperm(dim, generator=generator) for _ in range(views)])
    return x.to(dtype), order, torch.randn(views, rows, dim, generator=generator).to(dtype)


def whiten_and_differentiate(x: Tensor, order: Tensor | None, cotangent: Tensor, **settings: Any) -> list[Tensor]:
    """y, mean, W, eigenvalues where there are, and the gradient."""
    x = x.detach().requires_grad_()
    y, transform = group_whiten_views(x, order, return_transform=True, **settings)
    y.backward(cotangent)
    return [y.detach(), *(part for part in transform if part is not None), x.grad]


def reference(x: Tensor, order: Tensor | None, cotangent: Tensor, **settings: Any) -> list[Tensor]:
    """The same by plain torch operations in float64, which the kernels do not take."""
    return whiten_and_differentiate(x.double(), order, cotangent.double(), **settings)


# --- results ---------------------------------------------------------------------------------------------------------

FORMS = {
    "zca": ({}, "zca_output", "zca_grad"),
    "detached": ({"detach_transform": True}, "zca_output", "zca_grad_detached"),
    "newton_schulz": ({"method": "newton_schulz", "ns_iters": None}, "ns_output", "ns_grad"),
    "newton_schulz_10": ({"method": "newton_schulz", "ns_iters": 10}, "ns10_output", "ns10_grad"),
}


@pytest.mark.filterwarnings("ignore:detach_transform with")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_reference_vectors(emulator: Emulator, name: str, form: str) -> None:
    case, (settings, output, gradient) = CASES[name], FORMS[form]
    if settings.get("ns_iters", 0) is None:
        settings = {**settings, "ns_iters": int(case["ns_iters"])}
    x = torch.as_tensor(case["input"]).float().requires_grad_()
    y, transform = group_whiten(
        x,
        num_groups=int(case["num_groups"]),
        permutation=torch.as_tensor(case["permutation"]),
        eps=float(case["eps"]),
        return_transform=True,
        **settings,
    )
    y.backward(torch.as_tensor(case["cotangent"]).float())
    tolerance = {"case2": 2e-5, "case4": 2e-5, "case6": 2e-4}.get(name, 1e-5)  # those of the plain torch operations
    assert relative_error(y, case[output]) < tolerance
    assert relative_error(x.grad, case[gradient]) < tolerance
    if form == "zca":
        assert relative_error(transform.matrix, case["whitening_matrix"]) < tolerance
        assert relative_error(transform.eigenvalues, case["eigenvalues"]) < tolerance
        np.testing.assert_allclose(transform.mean, case["mean"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("views", "rows", "dim", "size"),
    [(3, 16, 12, 6), (1, 150, 30, 15), (2, 37, 2, 1), (1, 60, 34, 17), (1, 400, 10, 5)],
)
@pytest.mark.parametrize("slabs", [False, True], ids=["one launch", "slabs"])
@pytest.mark.parametrize("method", kernels.METHODS)
def test_ragged_shapes(
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    slabs: bool,
    views: int,
    rows: int,
    dim: int,
    size: int,
) -> None:
    if slabs:
        in_slabs(monkeypatch, 13)
    x, order, cotangent = problem(views, rows, dim)
    settings = {"group_size": size, "method": method, "eps": 1e-3 if views > 1 else None}
    order = order if views > 1 else None
    actual, expected = (f(x, order, cotangent, **settings) for f in (whiten_and_differentiate, reference))
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < 3e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_16_bits(emulator: Emulator, dtype: torch.dtype, tolerance: float) -> None:
    method = "eigh" if dtype == torch.float16 else "newton_schulz"
    x, order, cotangent = problem(2, 40, 12, dtype)
    settings = {"group_size": 6, "method": method}
    y, mean, w, *_, gradient = whiten_and_differentiate(x, order, cotangent, **settings)
    expected = reference(x, order, cotangent, **settings)
    assert y.dtype == gradient.dtype == dtype
    assert mean.dtype == w.dtype == torch.float32
    assert relative_error(y, expected[0]) < tolerance
    assert relative_error(gradient, expected[-1]) < tolerance
    assert relative_error(w, expected[2]) < 2e-5  # the statistics are float32


def test_hard_input(emulator: Emulator) -> None:
    """Exact ties, a constant group, a duplicate channel, a far mean, NaN in one group."""
    for name, x in {
        "ties": torch.sign(problem(1, 16, 8)[0]),
        "constant": problem(1, 16, 8)[0] * torch.tensor([0.0] * 4 + [1.0] * 4),
        "duplicate": problem(1, 16, 4)[0].repeat(1, 1, 2),
        "far": problem(1, 16, 8)[0] + 1e4,
    }.items():
        settings = {"group_size": 4, "eps": 1e-3}
        cotangent = problem(1, 16, 8)[2]
        actual, expected = (f(x, None, cotangent, **settings) for f in (whiten_and_differentiate, reference))
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) < (2e-3 if name == "far" else 3e-5), name
    x = problem(1, 16, 8)[0]
    x[0, 3, 1] = torch.nan
    for method in kernels.METHODS:
        y = group_whiten(x[0], group_size=4, method=method)
        assert y[:, :4].isnan().all()
        assert y[:, 4:].isfinite().all()


def test_eigenvectors_as_accurate_as_lapack_for_an_ill_conditioned_covariance(emulator: Emulator) -> None:
    x, order, cotangent = problem(1, 60, 34)
    x = x * torch.logspace(0, -2, 34)
    settings: dict[str, Any] = {"group_size": 17, "eps": 0.0}
    actual, expected = (f(x, order, cotangent, **settings) for f in (whiten_and_differentiate, reference))
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(_launch, "shared_memory_for_kernels", lambda *_: 0)
        torch_actual = whiten_and_differentiate(x, order, cotangent, **settings)
    for ours, lapack, exact in zip(actual, torch_actual, expected, strict=True):
        assert relative_error(ours, exact) < max(3e-5, 3 * relative_error(lapack, exact))


@pytest.mark.parametrize("method", kernels.METHODS)
def test_order_of_threads_does_not_matter_to_the_bit(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    x, order, cotangent = problem(2, 30, 12)
    for slabs in (False, True):
        if slabs:
            in_slabs(monkeypatch, 13)
        runs = []
        for emulator.order in (0, 1, 7):
            runs.append(whiten_and_differentiate(x, order, cotangent, group_size=6, method=method))
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", kernels.METHODS)
def test_sanitizers_find_nothing_and_would_find_a_slip(
    emulator: Emulator, sanitizer: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    emulator.record = []
    x, order, cotangent = problem(2, 30, 12)
    for detached in (False, True):
        whiten_and_differentiate(x, order, cotangent, group_size=6, method=method, detach_transform=detached)
    replay(emulator.record, tmp_path)
    forward = emulator.record[0]
    with pytest.raises(KernelError, match="heap-buffer-overflow"):
        # Two floats: the leading dimension leaves the very last unused.
        replay([{**forward, "shared_bytes": forward["shared_bytes"] - 8}], tmp_path)
    shorter = [forward["arguments"][0][:-4], *forward["arguments"][1:]]
    with pytest.raises(KernelError, match=r"heap-buffer-overflow(.|\n)*READ of size 4"):
        replay([{**forward, "arguments": shorter}], tmp_path)


def test_no_race_and_every_barrier_is_needed(race_checker: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out one barrier after the other: the race check must notice each."""

    def run(method: str) -> None:
        # Several tiles of rows in one launch; and small slabs.
        for rows, dim, size, slab in ((210, 17, 17, 512), (20, 10, 5, 8)):
            in_slabs(monkeypatch, slab)
            x, _, cotangent = problem(1, rows, dim)
            steps = {"ns_iters": 2} if method == "newton_schulz" else {}
            whiten_and_differentiate(x, None, cotangent, group_size=size, method=method, **steps)

    def failure(method: str) -> str:
        try:
            run(method)
        except KernelError as error:
            return str(error)
        return ""

    def goes_unnoticed(barrier: int) -> bool:
        race_checker.skipped_line = barrier
        first, second = ("newton_schulz", "eigh") if barrier > newton_schulz else ("eigh", "newton_schulz")
        return "race" not in failure(first) and "race" not in failure(second)

    for method in kernels.METHODS:
        run(method)
    text = _launch.source("group_whitening").splitlines()
    newton_schulz = text.index("#else", text.index("#if METHOD == 0"))
    barriers = [n for n, line in enumerate(text, 1) if "__syncthreads" in line and not line.startswith(("//", "#"))]
    # Between phases each thread happens to read what it wrote itself; the kernels do not rely on that.
    between_phases = {n for n in barriers if "phases == ALL" in text[n - 1]}
    assert len(barriers) > 30
    assert len(between_phases) == 4
    assert not [text[n - 4 : n] for n in barriers if n not in between_phases and goes_unnoticed(n)]


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "dtype", "size", "method", "one_launch"),
    [
        (80, torch.float32, 96, "newton_schulz", True),
        (90, torch.float16, 48, "eigh", False),
        (None, torch.bfloat16, 6, "eigh", True),
    ],
)
def test_compiles_for_gpus(
    architecture: int | None, dtype: torch.dtype, size: int, method: str, one_launch: bool
) -> None:
    """One of each; ``python -m tests.cuda.compile_all`` compiles every combination."""
    if nvrtc.library() is None:
        pytest.skip("NVRTC is not installed: it comes with torch's packages for CUDA")
    options = _launch.options(kernels.defines(dtype, size, method, one_launch=one_launch))
    architecture = architecture or nvrtc.architectures()[-1]
    binary = nvrtc.compile_for(architecture, _launch.source("group_whitening"), options)
    parts = [""] if one_launch else ["_stats", "_root", "_apply"]
    assert set(binary.registers) == {direction + part for direction in ("forward", "backward") for part in parts}
    assert binary.code[:4] == b"\x7fELF"
    assert binary.stack_and_spills == 0
    assert max(binary.registers.values()) <= 255


def test_shared_memory_fits_an_h100_whatever_the_size() -> None:
    for method in kernels.METHODS:
        sizes = range(1, kernels.LARGEST + 1)
        assert (
            max(kernels.shared_bytes(m, method, kernel) for m in sizes for kernel in ("forward", "backward"))
            < 227 * 1024
        )


# --- the operator ----------------------------------------------------------------------------------------------------


def test_registration(emulator: Emulator) -> None:
    x, order, _ = problem(2, 16, 8)
    settings = (2, 1e-3, False, "newton_schulz", 3, False)
    torch.library.opcheck(torch.ops.heliostat.group_whiten.default, (x.requires_grad_(), order, *settings, True))
    torch.library.opcheck(torch.ops.heliostat.group_whiten.default, (x.detach(), None, *settings, False))


def test_compiled_without_a_graph_break_equals_eager(emulator: Emulator) -> None:
    x, _, cotangent = problem(2, 16, 8)

    def run(function: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = function(2 * leaf, group_size=4)
        y.backward(cotangent)
        return [y, leaf.grad]

    torch._dynamo.reset()
    compiled = run(torch.compile(group_whiten_views, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(run(group_whiten_views), compiled, strict=True))


def test_only_the_output_has_a_gradient_and_only_a_first(emulator: Emulator) -> None:
    x = problem(1, 16, 8)[0][0].requires_grad_()
    y, transform = group_whiten(x, group_size=4, return_transform=True)
    assert not any(part.requires_grad for part in transform)
    (gradient,) = torch.autograd.grad(y.square().cumsum(0).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not require grad|does not have a grad_fn|no autograd formula|autograd"):
        gradient.sum().backward()


def test_strided_input_and_gradient(emulator: Emulator) -> None:
    x, order, cotangent = problem(2, 16, 8)
    expected = whiten_and_differentiate(x, order, cotangent, group_size=4)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    y = group_whiten_views(strided, order, group_size=4)
    y.backward(cotangent.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(y, expected[0])
    assert torch.equal(strided.grad, expected[-1])


# --- whether the kernels are taken -----------------------------------------------------------------------------------


def test_what_the_kernels_do_not_do_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "shared_memory_for_kernels", _a_hopper)
    x = torch.empty(1, 256, 192)
    assert kernels.usable(x, 2, "eigh")
    assert not kernels.usable(x, 1, "eigh")  # groups of 192
    assert not kernels.usable(x.double(), 2, "eigh")
    assert not kernels.usable(x, 2, "cholesky")
    monkeypatch.setattr(_launch, "shared_memory_for_kernels", lambda *_: 99 * 1024)
    assert not kernels.usable(x, 2, "newton_schulz")  # too large for such a device
    assert kernels.usable(x, 4, "newton_schulz")
    monkeypatch.undo()
    assert not kernels.usable(x, 2, "eigh")  # on the CPU
    pytest.importorskip("cupy")
    with pytest.raises(ValueError, match="kernels run on CUDA devices, got tensors on cpu"):
        kernels.whiten(x, None, 2, 1e-5, False, "eigh", 1, False)


@pytest.mark.parametrize(
    ("cuda", "capability", "hidden", "message"),
    [
        ("13.2", (9, 0), "cupy", r"cuda:0 falls back .* CuPy is not installed. Run: pip install 'heliostat\[cuda13\]'"),
        ("12.8", (9, 0), "cupy", r"heliostat\[cuda12\]"),
        ("12.8", (7, 5), "", "compute capability is below 8.0"),
        (None, (9, 0), "", "not for NVIDIA's CUDA"),
    ],
)
def test_a_cuda_device_without_kernels_is_told_once(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, capability: tuple[int, int], hidden: str, message: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    if hidden:
        monkeypatch.setitem(__import__("sys").modules, hidden, None)
    _launch._obstacle.cache_clear()
    _launch._warn_once.cache_clear()
    try:
        with pytest.warns(UserWarning, match=message):
            assert _launch.shared_memory_for_kernels("cuda", 0, "group_whiten") == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert _launch.shared_memory_for_kernels("cuda", 0, "group_whiten") == 0
            monkeypatch.setenv(_launch.SWITCH, "off")
            assert _launch.shared_memory_for_kernels("cuda", 1, "group_whiten") == 0
    finally:
        _launch._obstacle.cache_clear()
        _launch._warn_once.cache_clear()


def test_cupy_without_a_driver_is_an_obstacle_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.is_available():
        pytest.skip("there is a driver")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    _launch._obstacle.cache_clear()
    assert "CuPy does not find the device" in _launch._obstacle(0)
    _launch._obstacle.cache_clear()
