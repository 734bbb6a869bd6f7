"""The emulator that stands in for a GPU must run right kernels right, and must catch wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from heliostat.cuda import _launch
from tests.cuda.emulator import Builder, Emulator, KernelError, replay

SOURCE = Path(__file__).with_name("defects.cu").read_text()
DEFECTS = SOURCE[SOURCE.index("{") + 1 : SOURCE.index("}")].replace(",", " ").split()
X = torch.arange(64.0).square()
EXPECTED = 3 * (X.flip(0) + X.flip(0)[torch.arange(64) ^ 16])


class Toy(Emulator):
    def __init__(self, builder: Builder, flavour: str) -> None:
        super().__init__(builder, flavour)
        self.edit = lambda source: source[: source.index("// Group whitening")] + SOURCE

    def run(self, kernel: str, *arguments: object, grid: int = 1, shared: int = 256, dtype: int = 0) -> None:
        self.launch("group_whitening", (("DTYPE", dtype),), kernel, (grid,), 64, shared, arguments)

    def defective(self, defect: str, grid: int = 1, shared: int = 256) -> Tensor:
        out = torch.full((64 * grid,), float("nan"))
        self.run("defective", X, out, DEFECTS.index(defect), grid=grid, shared=shared)
        return out


@pytest.mark.parametrize("flavour", ["plain", "races"])
@pytest.mark.parametrize("order", [0, 1, 5])
def test_right_kernel(builder: Builder, flavour: str, order: int) -> None:
    toy = Toy(builder, flavour)
    toy.order = order
    assert torch.equal(toy.defective("NONE", grid=3), EXPECTED.repeat(3))


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("SHUFFLE_IN_A_BRANCH", "two different places|deadlock"),
        ("BARRIER_IN_A_BRANCH", "two different places"),
        ("EARLY_RETURN", "a thread returned"),
        ("WRONG_MASK", "mask leaves it out"),
    ],
)
def test_misused_collectives_are_caught(builder: Builder, defect: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        Toy(builder, "plain").defective(defect)


def test_missing_barriers_show_in_the_result(builder: Builder) -> None:
    """Shared memory begins as NaN; what a missing barrier lets through depends on the order of the threads."""
    toy = Toy(builder, "plain")
    assert toy.defective("NO_BARRIER_BEFORE_USE").isnan().any()
    forwards = toy.defective("NO_BARRIER_AFTER_USE")
    toy.order = 1
    assert not torch.equal(toy.defective("NO_BARRIER_AFTER_USE"), forwards)


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("NO_BARRIER_BEFORE_USE", "race: thread"),
        ("NO_BARRIER_AFTER_USE", "race: thread"),
        ("NO_WARP_BARRIER", "race: thread"),
        ("BLOCKS_SHARE_OUTPUT", "race: blocks 0 and 1"),
    ],
)
@pytest.mark.parametrize("order", [0, 1, 5])
def test_races_are_caught_in_any_order(builder: Builder, defect: str, message: str, order: int) -> None:
    toy = Toy(builder, "races")
    toy.order = order
    with pytest.raises(KernelError, match=message):
        toy.defective(defect, grid=2)


def test_sanitizers_catch_what_leaves_its_memory(builder: Builder, sanitizer: None, tmp_path: Path) -> None:
    toy = Toy(builder, "plain")
    toy.record = []
    toy.defective("NONE", grid=2)
    toy.defective("NONE", shared=256)
    toy.defective("READ_PAST_THE_END")
    toy.record[1]["shared_bytes"] -= 4
    right, short, past = toy.record
    replay([right], tmp_path)
    with pytest.raises(KernelError, match=r"heap-buffer-overflow(.|\n)*defective"):
        replay([short], tmp_path)
    with pytest.raises(KernelError, match=r"heap-buffer-overflow(.|\n)*READ of size 4"):
        replay([past], tmp_path)
    write = {**past, "arguments": [*past["arguments"][:2], DEFECTS.index("WRITE_PAST_THE_END")]}
    with pytest.raises(KernelError, match=r"heap-buffer-overflow(.|\n)*WRITE of size 4"):
        replay([write], tmp_path)
    shift = {**past, "arguments": [*past["arguments"][:2], DEFECTS.index("SHIFT_TOO_FAR")]}
    with pytest.raises(KernelError, match="shift exponent 32 is too large"):
        replay([shift], tmp_path)


def test_collectives(builder: Builder) -> None:
    x, out = torch.arange(64.0), torch.empty(258)
    Toy(builder, "plain").run("collectives", x, out)
    lane = torch.arange(64) % 32
    torch.testing.assert_close(out[:64], torch.where(lane < 29, x + 3, x))
    torch.testing.assert_close(out[64:128], torch.tensor([5.0, 37.0]).repeat_interleave(32))
    assert (out[128:192] == 1).all()
    assert (out[192:256] == x.sum()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits_is_that_of_torch(builder: Builder, dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(2000) * 10.0 ** torch.randint(-8, 6, (2000,)), torch.tensor([0.0, -0.0, torch.inf])])
    x = torch.cat([x, torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 65520.0])])
    out, back = torch.empty(len(x), dtype=dtype), torch.empty(len(x))
    Toy(builder, "plain").run("round_trip", x, out, back, len(x), dtype=_launch.DTYPES[dtype])
    assert torch.equal(out, x.to(dtype))
    assert torch.equal(back, x.to(dtype).float())


def test_bits(builder: Builder) -> None:
    x = torch.randint(-(2**31), 2**31, (64,), dtype=torch.int32)
    out = torch.empty(128, dtype=torch.int32)
    Toy(builder, "plain").run("bits", x, out)
    assert out[:64].tolist() == [(int(value) & 0xFFFFFFFF).bit_count() for value in x]
    own, other = (bits.view(torch.uint8).view(64, 4) for bits in (x, x.flip(0)))
    expected = torch.stack([own[:, 0], own[:, 2], other[:, 1], other[:, 3]], 1)
    assert torch.equal(out[64:].view(torch.uint8).view(64, 4), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pairs_and_products_of_fragments(builder: Builder, dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    out, sums = torch.empty(16, 8), torch.empty(64, dtype=dtype)
    Toy(builder, "plain").run("pairs", a, b, out, sums, 32, dtype=_launch.DTYPES[dtype])
    torch.testing.assert_close(out, a.float() @ b.float())
    assert torch.equal(sums, a.flatten()[:64] + b.flatten()[:64])
    with pytest.raises(KernelError, match="deadlock"):
        Toy(builder, "plain").run("pairs", a, b, out, sums, 16, dtype=_launch.DTYPES[dtype])
