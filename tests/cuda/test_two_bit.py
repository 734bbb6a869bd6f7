"""The kernels of two-bit weights without a GPU: compiled for GPUs, and run by the emulator behind the operators."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from heliostat.components import TwoBitLinear, TwoBitWeight, dequantize_two_bit, quantize_two_bit, two_bit_linear
from heliostat.cuda import _launch
from heliostat.cuda import two_bit as kernels
from tests.components.test_two_bit import GOLDEN, heavy_tailed, packed
from tests.cuda import nvrtc
from tests.cuda.emulator import Builder, Emulator, KernelError, replay

# Rounding of the output: relative, and the floor where float16 becomes subnormal.
ROUNDING = {torch.float32: (0.0, 0.0), torch.float16: (2**-11, 2**-24), torch.bfloat16: (2**-8, 0.0)}


SECOND_SUM = "if (!is_finite(value)) return false;"


@pytest.fixture
def whole_emulator(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """CPU tensors take the kernels, which the emulator runs."""
    return _emulate(Emulator(builder), monkeypatch)


@pytest.fixture
def emulator(whole_emulator: Emulator) -> Emulator:
    """The same without the second sum of what is not finite, behind which a slip that gives NaN could hide."""
    assert SECOND_SUM in _launch.source("two_bit")
    whole_emulator.edit = lambda source: source.replace(SECOND_SUM, "")
    return whole_emulator


@pytest.fixture
def race_checker(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    return _emulate(Emulator(builder, "races"), monkeypatch)


def _emulate(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    monkeypatch.setattr(_launch, "launch", emulator.launch)
    monkeypatch.setattr(_launch, "shared_memory_for_kernels", lambda *_: 227 * 1024)
    return emulator


def problem(rows: int, columns: int, f: float = 0.3, p: float = 0.02, seed: int = 0) -> TwoBitWeight:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return quantize_two_bit(heavy_tailed(rows, columns), four_bit_fraction=f, outlier_fraction=p)


def inputs(batch: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(batch)).to(dtype)


def exact(w: TwoBitWeight) -> Tensor:
    """W^ by torch's operations, which alone take float64."""
    return dequantize_two_bit(w, torch.float64)


def assert_product(actual: Tensor, x: Tensor, w: Tensor, bias: Tensor | float = 0.0) -> None:
    """``actual`` is x W + bias within the rounding of a float32 sum and of the output, for W (I, O)."""
    assert actual.dtype == x.dtype
    x, expected = x.double(), x.double() @ w + bias
    relative, floor = ROUNDING[actual.dtype]
    allowed = 1e-5 * x.abs() @ w.abs() + relative * expected.abs() + floor
    assert ((actual.double() - expected).abs() <= allowed).all()


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN)
def test_reference_vectors(emulator: Emulator, case: str) -> None:
    arrays, w = GOLDEN[case], packed(case)
    assert np.array_equal(dequantize_two_bit(w).numpy(), arrays["dequant"].astype(np.float32))
    magnitude = torch.tensor(arrays["dequant"])
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), (None, torch.float32)):
        if name and f"dequant_{name}_bits" in arrays:
            bits = dequantize_two_bit(w, dtype).view(torch.int16).numpy()
            assert np.array_equal(bits, arrays[f"dequant_{name}_bits"].view(np.int16))
        if dtype == torch.float16 and case == "case7":
            continue  # results of 1e23 are no float16
        for rows in (1, 4, 16) if dtype != torch.bfloat16 else (4,):
            x = torch.tensor(arrays[f"x{rows}"]).to(dtype).requires_grad_()  # in all dtypes the same numbers
            y = two_bit_linear(x, w)
            assert_product(y.detach(), x.detach(), magnitude.T)
            np.testing.assert_array_equal(x.detach().double() @ magnitude.T, arrays[f"y{rows}"])
        grad = torch.tensor(arrays["grad_y4"]).to(dtype)
        x = torch.tensor(arrays["x4"]).to(dtype).requires_grad_()
        two_bit_linear(x, w).backward(grad)
        assert_product(x.grad, grad, magnitude)


@pytest.mark.parametrize(
    ("rows", "columns", "f", "p"),
    [(35, 2100, 0.3, 0.02), (7, 5, 0.0, 0.0), (16, 130, 1.0, 0.0), (50, 4096, 0.125, 0.0025)],
    ids=["two tiles", "tiny", "all 4-bit", "even"],
)
def test_ragged_shapes(emulator: Emulator, rows: int, columns: int, f: float, p: float) -> None:
    w = problem(rows, columns, f, p)
    dense, bias = exact(w).T, torch.randn(rows, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(dequantize_two_bit(w, dtype), dense.T.to(dtype))
    for batch, dtype, bias_dtype in (
        (2, torch.float32, torch.float32),
        (11, torch.float32, torch.float64),  # blocks of 8 and 3
        (1, torch.float16, torch.bfloat16),
        (3, torch.float16, torch.float16),
        (19, torch.float16, torch.float32),  # 16 and 3
    ):
        x, b = inputs(batch, columns, dtype), bias.to(bias_dtype)
        assert_product(two_bit_linear(x, w, b), x, dense, b.double())


def test_more_columns_than_16_bits_count(emulator: Emulator) -> None:
    w = problem(2, 65600, p=0.001)
    dense, x = exact(w), inputs(2, 65600)
    assert w.arrays.outlier_col.dtype == torch.int32
    assert torch.equal(dequantize_two_bit(w), dense.float())
    assert_product(two_bit_linear(x, w), x, dense.T)


def test_many_rows_and_the_transposed_product(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """By parts of the decoded weight, in float32 whatever the user has set."""
    monkeypatch.setattr(kernels, "MOST_FUSED", dict.fromkeys(_launch.DTYPES, 4))
    monkeypatch.setattr(kernels, "WORKSPACE", 16 * 100)
    w = problem(50, 100)
    dense, bias = exact(w), torch.randn(50)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for dtype in _launch.DTYPES:
            x, grad = inputs(5, 100, dtype).requires_grad_(), inputs(5, 50, dtype)
            with torch.autocast("cpu", torch.bfloat16):
                y = two_bit_linear(x, w, bias)
            y.backward(grad)
            assert_product(y.detach(), x.detach(), dense.T, bias.double())
            assert_product(x.grad, grad, dense)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert two_bit_linear(torch.zeros(0, 100), w).shape == (0, 50)


FORMS = pytest.mark.parametrize(("batch", "dtype"), [(2, torch.float32), (3, torch.float16)])


@FORMS
def test_nan_stays_in_its_row(emulator: Emulator, batch: int, dtype: torch.dtype) -> None:
    w = problem(20, 71)  # 9 columns of the last group, and 48 beyond it, are padding
    memory = torch.full((batch * 71 + 64,), torch.nan, dtype=dtype)  # behind the last row
    x = memory[: batch * 71].view(batch, 71).copy_(inputs(batch, 71, dtype))
    x[1] = torch.nan
    y = two_bit_linear(x, w)
    assert y[1].isnan().all()
    others = [row for row in range(batch) if row != 1]
    assert_product(y[others], x[others], exact(w).T)


@FORMS
def test_what_is_not_finite_spreads_as_in_a_dense_layer(
    whole_emulator: Emulator, batch: int, dtype: torch.dtype
) -> None:
    w = problem(20, 70, p=0.05)
    dense, x = exact(w), inputs(batch, 70, dtype)
    outlier = int(w.arrays.outlier_col[0])
    for columns in ([3], [outlier], [3, outlier]):
        x[0] = 1.0
        x[0, columns] = torch.inf
        expected = x.double() @ dense.T  # NaN where a weight is 0
        y = two_bit_linear(x, w)
        torch.testing.assert_close(y[0].double(), expected[0], equal_nan=True)
        assert expected[0].isinf().any()
        assert_product(y[1:], x[1:], dense.T)
    if dtype == torch.float32:  # 15 x would overflow, 15 x s does not
        x = 1e38 * inputs(batch, 70).clamp(-3, 3)
        assert_product(two_bit_linear(x, w), x, dense.T)


@pytest.mark.parametrize("factor", [1e-35, 1e37])
def test_far_exponents(emulator: Emulator, factor: float) -> None:
    """2^e is no normal number: it must come as two factors."""
    weight = torch.randn(20, 70, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    w = quantize_two_bit(weight * factor, outlier_fraction=0.02)
    assert abs(int(w.arrays.exponent)) > 100
    dense, x = exact(w), inputs(2, 70) * 2.0**-8
    assert torch.equal(dequantize_two_bit(w), dense.float())
    assert_product(two_bit_linear(x, w), x, dense.T)


def test_misaligned_and_strided_tensors(emulator: Emulator) -> None:
    w = problem(20, 128)
    dense, arrays = exact(w), w.arrays
    words = torch.zeros(arrays.codes.numel() + 1, dtype=torch.int32)
    words[1:] = arrays.codes.flatten()
    moved = arrays._replace(
        codes=words[1:].view_as(arrays.codes), scale_zero=arrays.scale_zero.T.contiguous().T, exponent=arrays.exponent
    )
    assert moved.codes.data_ptr() % 16
    for batch, dtype in ((2, torch.float32), (3, torch.float16)):
        x = inputs(batch, 129, dtype)
        for view in (x[:, 1:], x.flatten()[1 : 1 + 128 * batch].view(batch, 128)):
            assert_product(two_bit_linear(view, TwoBitWeight(moved, 128)), view, dense.T)
    assert torch.equal(dequantize_two_bit(TwoBitWeight(moved, 128)), dense.float())


def test_order_of_threads_does_not_matter_to_the_bit(emulator: Emulator) -> None:
    w = problem(20, 2100)
    runs = []
    for emulator.order in (0, 1, 7):
        products = [two_bit_linear(inputs(n, 2100, d), w) for n, d in ((2, torch.float32), (3, torch.float16))]
        runs.append([*products, dequantize_two_bit(w)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


# --- memory ----------------------------------------------------------------------------------------------------------


USES = {"decoding": None, "scalar": (2, torch.float32), "tensor cores": (3, torch.float16)}


def use(kind: str) -> None:
    """In two tiles, rows and columns ragged, with a result that is not finite."""
    w = problem(5, 2100)
    if kind == "decoding":
        dequantize_two_bit(w)
        return
    batch, dtype = USES[kind]
    x = inputs(batch, 2100, dtype)
    x[0, 0] = torch.inf
    two_bit_linear(x, w, torch.ones(5, dtype=dtype))


def test_sanitizers_find_nothing_and_would_find_a_slip(
    whole_emulator: Emulator, sanitizer: None, tmp_path: Path
) -> None:
    whole_emulator.record = []
    for kind in USES:
        use(kind)
    replay(whole_emulator.record, tmp_path)
    _, scalar, tensor_cores = whole_emulator.record
    with pytest.raises(KernelError, match="heap-buffer-overflow"):  # 40 bytes are padding
        replay([{**scalar, "shared_bytes": scalar["shared_bytes"] - 44}], tmp_path)
    x = 15  # behind the arrays and the sizes
    shorter = [*tensor_cores["arguments"]]
    shorter[x] = shorter[x][:-2]
    with pytest.raises(KernelError, match=r"heap-buffer-overflow(.|\n)*READ of size 2"):
        replay([{**tensor_cores, "arguments": shorter}], tmp_path)


def test_no_race_and_every_barrier_is_needed(race_checker: Emulator) -> None:
    """Leaves out one barrier after the other: the race check must notice each."""
    text = _launch.source("two_bit").splitlines()
    starts = [n for n, line in enumerate(text, 1) if line.startswith('extern "C"')]
    assert len(starts) == len(USES)
    for kind, start, end in zip(USES, starts, [*starts[1:], len(text)], strict=True):
        race_checker.skipped_line = 0
        use(kind)
        barriers = [n for n in range(start, end) if "__syncthreads" in text[n - 1]]
        assert len(barriers) == (4 if kind == "tensor cores" else 2)
        for race_checker.skipped_line in barriers:
            with pytest.raises(KernelError, match="race: thread"):
                use(kind)


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "dtype", "batch"),
    [(80, torch.float32, 8), (90, torch.float16, 1), (90, torch.bfloat16, 16), (None, torch.float16, 0)],
)
def test_compiles_for_gpus(architecture: int | None, dtype: torch.dtype, batch: int) -> None:
    """One of each; ``python -m tests.cuda.compile_all`` compiles every combination."""
    if nvrtc.library() is None:
        pytest.skip("NVRTC is not installed: it comes with torch's packages for CUDA")
    rows, tensor_cores = kernels.plan(dtype, batch) if batch else (0, False)
    options = _launch.options(kernels.defines(dtype, rows, tensor_cores))
    binary = nvrtc.compile_for(architecture or nvrtc.architectures()[-1], _launch.source("two_bit"), options)
    assert re.search(
        r"ld\.global\.nc\.v4\.[ub]32" if batch else r"st\.global\.v4\.[ub]32", binary.ptx
    )  # 128 bits a time
    assert ("mma.sync" in binary.ptx) == tensor_cores
    assert set(binary.registers) == {"linear" if batch else "dequantize"}
    assert binary.code[:4] == b"\x7fELF"
    assert binary.stack_and_spills == 0
    assert max(binary.registers.values()) <= 128  # two blocks on a processor


def test_shared_memory_fits_every_gpu_that_has_tensor_cores_for_bfloat16() -> None:
    assert kernels.LARGEST_SHARED <= 99 * 1024


# --- the operators ---------------------------------------------------------------------------------------------------


def test_registration(emulator: Emulator) -> None:
    w = problem(20, 18)
    arrays, operators = list(w.arrays), torch.ops.heliostat
    for operator, arguments in (
        (operators.two_bit_dequantize, (arrays, 18, torch.float16)),
        (operators.two_bit_linear, (inputs(2, 18), arrays, torch.ones(20))),
        (operators.two_bit_linear_transposed, (inputs(2, 20), arrays, 18)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_layer_compiled_without_a_graph_break_equals_eager(emulator: Emulator) -> None:
    layer = TwoBitLinear.from_weight(problem(20, 18), torch.ones(20))

    def run(function: torch.nn.Module) -> list[Tensor]:
        leaf = inputs(2, 18).requires_grad_()
        y = function(2 * leaf)
        return [y, *torch.autograd.grad(y.square().sum(), leaf)]

    torch._dynamo.reset()
    compiled = run(torch.compile(layer, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(run(layer), compiled, strict=True))


# --- whether the kernels are taken -----------------------------------------------------------------------------------


def test_which_kernel_is_taken(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int, int]] = []

    def launch(stem: str, defines: _launch.Defines, kernel: str, *rest: object) -> None:
        taken.append((kernel, dict(defines)["BATCH"], dict(defines)["TENSOR_CORES"]))

    w = problem(4, 4)
    monkeypatch.setattr(_launch, "launch", launch)
    for dtype in _launch.DTYPES:
        few = [(1, 0), (2, 0), (4, 0), (8, 0), (8, 0)] if dtype == torch.float32 else [(1, 0), *[(8, 1)] * 3, (16, 1)]
        for batch, (rows, tensor_cores) in zip((1, 2, 3, 8, 16), few, strict=True):
            two_bit_linear(torch.ones(batch, 4, dtype=dtype), w)
            assert taken.pop() == ("linear", rows, tensor_cores)
        two_bit_linear(torch.ones(kernels.MOST_FUSED[dtype] + 1, 4, dtype=dtype), w)
        assert taken.pop() == ("dequantize", 0, 0)
    two_bit_linear(torch.ones(2, 4, dtype=torch.float64), w)
    for allowed, used in ((48 * 1024, 0), (99 * 1024, 1)):
        monkeypatch.setattr(_launch, "shared_memory_for_kernels", lambda *_, allowed=allowed: allowed)
        two_bit_linear(torch.ones(2, 4), w)
        assert len(taken) == used


def test_other_devices_keep_to_torch() -> None:
    w = problem(4, 4)
    assert not kernels.usable(torch.float32, w.arrays)  # on the CPU
    pytest.importorskip("cupy")
    with pytest.raises(ValueError, match="kernels run on CUDA devices, got tensors on cpu"):
        kernels.dequantize(w.arrays, 4, torch.float32)
