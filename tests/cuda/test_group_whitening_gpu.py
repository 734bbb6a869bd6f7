"""The whitening kernels on a GPU, also under compute-sanitizer. On a machine with one: ``pytest -m gpu``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heliostat.components import group_whiten_views
from heliostat.cuda import group_whitening as kernels
from tests.cuda.test_group_whitening import problem, reference, whiten_and_differentiate
from tests.harness import relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _kernels_run() -> None:
    """Without CuPy everything here would compare torch with torch."""
    pytest.importorskip("cupy", reason="the kernels need CuPy: pip install 'heliostat[cuda13]' or 'heliostat[cuda12]'")
    assert kernels.usable(torch.empty(1, 64, 12, device="cuda"), 2, "eigh")


def on_gpu(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


@pytest.mark.parametrize("method", kernels.METHODS)
@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(method: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    size, groups, views = draw(1, 96), draw(1, 9), draw(1, 4)
    rows = draw(2 * size + 16, 2 * size + (2000 if seed % 3 == 0 else 300))
    x, order, cotangent = problem(views, rows, size * groups, seed=seed)
    settings: dict[str, Any] = {"num_groups": groups, "method": method, "eps": 1e-2}
    actual = whiten_and_differentiate(*on_gpu(x, order if seed % 2 else None, cotangent), **settings)
    expected = reference(x, order if seed % 2 else None, cotangent, **settings)
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a.cpu(), b) < 2e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("rows", [256, 1500])
def test_16_bits(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    x, order, cotangent = problem(3, rows, 96, dtype)
    settings: dict[str, Any] = {"group_size": 48, "method": "newton_schulz"}
    actual = whiten_and_differentiate(*on_gpu(x, order, cotangent), **settings)
    expected = reference(x, order, cotangent, **settings)
    assert relative_error(actual[0].cpu(), expected[0]) < tolerance
    assert relative_error(actual[-1].cpu(), expected[-1]) < tolerance


def test_repeats_to_the_bit() -> None:
    for rows in (256, 3000):
        inputs = on_gpu(*problem(2, rows, 96))
        first, second = (whiten_and_differentiate(*inputs, group_size=48) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_another_stream() -> None:
    x, order, cotangent = on_gpu(*problem(2, 256, 96))
    expected = whiten_and_differentiate(x, order, cotangent, group_size=6)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # work that a launch on the wrong stream would overtake
        late = x * 1.0
        actual = whiten_and_differentiate(late, order, cotangent, group_size=6)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_cuda_graph() -> None:
    x, order, cotangent = on_gpu(*problem(2, 256, 96))
    static = x.clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        y = group_whiten_views(static, order, group_size=48, method="newton_schulz")
        return y, torch.autograd.grad(y, static, cotangent)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles, and raises the limit of shared memory
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradient = step()
    new = problem(2, 256, 96, seed=1)[0].cuda()
    with torch.no_grad():
        static.copy_(new)
    graph.replay()
    expected = whiten_and_differentiate(new, order, cotangent, group_size=48, method="newton_schulz")
    assert torch.equal(y, expected[0])
    assert torch.equal(gradient, expected[-1])


def test_compiled_without_a_graph_break() -> None:
    x, order, cotangent = on_gpu(*problem(2, 256, 96))
    expected = whiten_and_differentiate(x, order, cotangent, group_size=6)
    leaf = x.clone().requires_grad_()
    torch._dynamo.reset()
    y = torch.compile(group_whiten_views, fullgraph=True)(leaf, order, group_size=6)
    y.backward(cotangent)
    assert torch.equal(y, expected[0])
    assert torch.equal(leaf.grad, expected[-1])


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(tool: str) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on the path: it comes with the CUDA toolkit")
    command = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "regex:forward|backward"]
    run = subprocess.run(
        [*command, sys.executable, "-m", "tests.cuda.test_group_whitening_gpu"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def _small_cases() -> None:
    for method in kernels.METHODS:
        for rows, dim, size in ((60, 12, 6), (600, 34, 17)):
            whiten_and_differentiate(*on_gpu(*problem(2, rows, dim)), group_size=size, method=method)
    torch.cuda.synchronize()


if __name__ == "__main__":
    _small_cases()
