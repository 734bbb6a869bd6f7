"""Pooling, chunked encoding, alignment and uniformity, the differentiable gather."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from heliostat.components import alignment, chunked_forward, gather_rows, pool_tokens, uniformity
from tests.harness import ProcessPool

HIDDEN = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3)
MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])  # padded right, padded left


class TestPooling:
    @pytest.mark.parametrize(
        ("pooling", "expected"),
        [
            ("cls", torch.stack([HIDDEN[0, 0], HIDDEN[1, 1]])),
            ("last", torch.stack([HIDDEN[0, 2], HIDDEN[1, 3]])),
            ("mean", torch.stack([HIDDEN[0, :3].mean(0), HIDDEN[1, 1:].mean(0)])),
        ],
    )
    def test_of_one_layer(self, pooling: str, expected: Tensor) -> None:
        torch.testing.assert_close(pool_tokens([HIDDEN], MASK, pooling), expected)

    def test_of_two_layers(self) -> None:
        layers = [HIDDEN, HIDDEN * 3, HIDDEN * 5]
        mean = pool_tokens([HIDDEN], MASK, "mean")
        torch.testing.assert_close(pool_tokens(layers, MASK, "mean_first_last"), 3 * mean)
        torch.testing.assert_close(pool_tokens(layers, MASK, "mean_top2"), 4 * mean)

    def test_fully_masked_text_is_finite(self) -> None:
        for pooling in ("cls", "last", "mean"):
            assert pool_tokens([HIDDEN], torch.zeros(2, 4), pooling).isfinite().all()

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="pooling must be one of .* got 'max'"):
            pool_tokens([HIDDEN], MASK, "max")
        with pytest.raises(ValueError, match=r"got \(2, 4, 3\) and \(2, 3\)"):
            pool_tokens([HIDDEN], MASK[:, :3])
        with pytest.raises(ValueError, match="needs the hidden states of two layers, got 1"):
            pool_tokens([HIDDEN], MASK, "mean_top2")


class TestChunkedForward:
    @pytest.mark.parametrize("size", [1, 3, 8, 100])
    def test_equals_one_call(self, size: int) -> None:
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        inputs = {"x": torch.randn(8, 4)}
        whole = chunked_forward(lambda i: net(i["x"]), inputs, None)
        whole.square().sum().backward()
        expected = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        chunked = chunked_forward(lambda i: net(i["x"]), inputs, size)
        chunked.square().sum().backward()
        torch.testing.assert_close(chunked, whole)
        for parameter, gradient in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)

    def test_dropout_is_the_same_in_forward_and_backward(self) -> None:
        x = torch.ones(64, 16, requires_grad=True)
        dropout = nn.Dropout(0.5)
        y = chunked_forward(lambda i: dropout(i["x"]), {"x": x}, 7)
        y.sum().backward()
        assert torch.equal(x.grad, y.detach())

    def test_bad_size(self) -> None:
        with pytest.raises(ValueError, match="chunk_size must be >= 1, or None for one call, got 0"):
            chunked_forward(lambda i: i["x"], {"x": torch.ones(2)}, 0)


class TestGeometry:
    def test_alignment_of_equal_and_opposite_pairs(self) -> None:
        x = torch.randn(5, 3)
        assert alignment(x, 2 * x) == pytest.approx(0, abs=1e-6)
        assert alignment(x, -x) == pytest.approx(4)

    def test_uniformity_against_all_pairs(self) -> None:
        x = torch.randn(2100, 8)  # more rows than one block
        unit = torch.nn.functional.normalize(x.double(), dim=1)
        expected = torch.pdist(unit).square().mul(-2).exp().mean().log()
        assert uniformity(x) == pytest.approx(float(expected), abs=1e-5)

    def test_uniformity_limits(self) -> None:
        assert uniformity(torch.ones(4, 3)) == pytest.approx(0, abs=1e-6)
        assert uniformity(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-8, abs=1e-4)
        assert -4.2 < uniformity(torch.randn(500, 1000)) < -3.9

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="N >= 2"):
            uniformity(torch.ones(1, 3))
        with pytest.raises(ValueError, match=r"both be \(N, d\)"):
            alignment(torch.ones(2, 3), torch.ones(3, 3))


class TestGatherRows:
    def test_one_process_returns_its_rows(self) -> None:
        x = torch.randn(3, 2)
        assert gather_rows(x) is x

    def test_order_and_gradient(self, two_processes: ProcessPool) -> None:
        (first, first_grad), (second, second_grad) = two_processes.run(_gather_and_weight)
        assert torch.equal(first, second)
        assert first.flatten().tolist() == [0, 0, 1, 1]
        # rank r weights row i by (r + 1) * (i + 1): a row's gradient is what both ranks owe to it
        assert first_grad.flatten().tolist() == [3, 6]
        assert second_grad.flatten().tolist() == [9, 12]


def _gather_and_weight(rank: int) -> tuple[Tensor, Tensor]:
    x = torch.full((2, 1), float(rank), requires_grad=True)
    rows = gather_rows(x.t().contiguous().t())
    ((rank + 1) * torch.arange(1.0, 5)[:, None] * rows).sum().backward()
    return rows.detach(), x.grad
