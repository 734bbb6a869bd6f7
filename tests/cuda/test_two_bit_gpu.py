"""The kernels of two-bit weights on a GPU, also under compute-sanitizer. On a machine with one: ``pytest -m gpu``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from heliostat.components import TwoBitLinear, dequantize_two_bit, two_bit_linear
from heliostat.cuda import _launch
from heliostat.cuda import two_bit as kernels
from tests.components.test_two_bit import GOLDEN, packed
from tests.cuda.test_two_bit import assert_product, exact, inputs, problem

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _kernels_run() -> None:
    """Without CuPy everything here would compare torch with torch."""
    pytest.importorskip("cupy", reason="the kernels need CuPy: pip install 'heliostat[cuda13]' or 'heliostat[cuda12]'")
    assert kernels.usable(torch.float16, [torch.empty(0, device="cuda")])


@pytest.mark.parametrize("case", GOLDEN)
def test_reference_vectors(case: str) -> None:
    arrays, w = GOLDEN[case], packed(case).to("cuda")
    dense = torch.tensor(arrays["dequant"])
    assert torch.equal(dequantize_two_bit(w).cpu(), dense.float())
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), (None, torch.float32)):
        if name and f"dequant_{name}_bits" in arrays:
            bits = dequantize_two_bit(w, dtype).view(torch.int16).cpu().numpy()
            assert np.array_equal(bits, arrays[f"dequant_{name}_bits"].view(np.int16))
        if dtype == torch.float16 and case == "case7":
            continue  # results of 1e23 are no float16
        for rows in (1, 4, 16):
            x = torch.tensor(arrays[f"x{rows}"]).to(dtype)
            assert_product(two_bit_linear(x.cuda(), w).cpu(), x, dense.T)
        grad = torch.tensor(arrays["grad_y4"]).to(dtype)
        x = torch.tensor(arrays["x4"]).to("cuda", dtype).requires_grad_()
        two_bit_linear(x, w).backward(grad.cuda())
        assert_product(x.grad.cpu(), grad, dense)


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    rows, columns = draw(1, 200), draw(1, 5000)
    columns = columns if seed % 2 else -(-columns // 64) * 64
    w = problem(rows, columns, f=draw(0, 8) / 8, p=draw(0, 5) / 100, seed=seed)
    dense, on_gpu, bias = exact(w), w.to("cuda"), torch.randn(rows, generator=generator)
    for dtype in _launch.DTYPES:
        assert torch.equal(dequantize_two_bit(on_gpu, dtype).cpu(), dense.to(dtype))
        for batch in (1, draw(2, 16), draw(17, kernels.MOST_FUSED[dtype]), kernels.MOST_FUSED[dtype] + 1):
            x = inputs(batch, columns, dtype)
            y = two_bit_linear(x.cuda(), on_gpu, bias.cuda())
            assert_product(y.cpu(), x, dense.T, bias.double())


def test_large_matrix_in_parts_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the precision that the user allows for float32 products."""
    monkeypatch.setattr(kernels, "WORKSPACE", 2**18)
    w = problem(512, 2048)
    dense, on_gpu = exact(w), w.to("cuda")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for dtype in _launch.DTYPES:
            x, grad = inputs(700, 2048, dtype), inputs(700, 512, dtype)
            leaf = x.cuda().requires_grad_()
            y = two_bit_linear(leaf, on_gpu)
            y.backward(grad.cuda())
            assert_product(y.detach().cpu(), x, dense.T)
            assert_product(leaf.grad.cpu(), grad, dense)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", _launch.DTYPES)
def test_what_is_not_finite_spreads_as_in_a_dense_layer(dtype: torch.dtype) -> None:
    w = problem(64, 700, p=0.05)
    outlier = int(w.arrays.outlier_col[0])
    for batch in (1, 3):
        x = inputs(batch, 700, dtype)
        x[0, outlier] = torch.inf
        y = two_bit_linear(x.cuda(), w.to("cuda")).cpu()
        torch.testing.assert_close(y[0].double(), x[0].double() @ exact(w).T, equal_nan=True)


def cases() -> list[tuple[Tensor, TwoBitLinear]]:
    layer = TwoBitLinear.from_weight(problem(200, 2500), torch.ones(200)).cuda()
    pairs = [(1, torch.float16), (3, torch.float32), (5, torch.bfloat16), (20, torch.float16), (40, torch.float32)]
    return [(inputs(batch, 2500, dtype).cuda(), layer) for batch, dtype in pairs]


@torch.no_grad()
def test_repeats_to_the_bit() -> None:
    for x, layer in cases():
        assert torch.equal(layer(x), layer(x))
        moved = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)  # where 128 bits cannot be read at a time
        assert torch.equal(layer(x), layer(moved))


@torch.no_grad()
def test_another_stream() -> None:
    for x, layer in cases():
        expected = layer(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # work that a launch on the wrong stream would overtake
            actual = layer(x * 1.0)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(actual, expected)


@torch.no_grad()
def test_cuda_graph() -> None:
    for x, layer in cases():
        static = x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(static)  # compiles, and raises the limit of shared memory
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # fails if anything waits for the host
            y = layer(static)
        static.copy_(x.flip(0))
        graph.replay()
        assert torch.equal(y, layer(x.flip(0)))


def test_compiled_without_a_graph_break() -> None:
    x, layer = cases()[1]
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True)(leaf)
    expected = layer(other)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(tool: str) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on the path: it comes with the CUDA toolkit")
    command = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "regex:linear|dequantize"]
    run = subprocess.run(
        [*command, sys.executable, "-m", "tests.cuda.test_two_bit_gpu"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def _small_cases() -> None:
    w = problem(50, 2100).to("cuda")
    for dtype in _launch.DTYPES:
        dequantize_two_bit(w, dtype)
        for batch in (1, 2, 3, 5, 11):
            two_bit_linear(inputs(batch, 2100, dtype).cuda(), w)
    torch.cuda.synchronize()


if __name__ == "__main__":
    _small_cases()
