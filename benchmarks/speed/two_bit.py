"""2/4/16-bit weights on the CPU: seconds to encode a matrix, and TwoBitLinear against torch.nn.Linear."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed import Case, Factory, Run, Speed
from heliostat.components import TwoBitWeight, dequantize_two_bit, quantize_two_bit, two_bit_linear

SHAPES = [(4096, 4096), (4096, 11008)]
BATCHES = (1, 16, 256)


def matrix(rows: int, columns: int) -> Tensor:
    """Normal weights, as large as a network's."""
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@lru_cache(maxsize=1)
def packed(rows: int, columns: int) -> TwoBitWeight:
    """The same, quantised once for all contenders."""
    return quantize_two_bit(matrix(rows, columns))


def encode(rows: int, columns: int, compensated: bool) -> Factory:
    """Quantise a matrix with the defaults."""

    def prepare(device: torch.device) -> Run:
        weight = matrix(rows, columns).to(device)
        hessian = None
        if compensated:
            inputs = torch.randn(2 * columns, columns, generator=torch.Generator().manual_seed(1)).to(device)
            hessian = (inputs.T @ inputs / len(inputs)).double()

        def run() -> tuple[Tensor, ...]:
            quantize_two_bit(weight, hessian=hessian)
            return ()

        return run

    return prepare


def plain_two_bit(rows: int, columns: int) -> Factory:
    """What takes ten lines: every 16 weights between their minimum and maximum, float16 for both, packed."""

    def prepare(device: torch.device) -> Run:
        weight = matrix(rows, columns).to(device)
        shifts = torch.arange(0, 32, 2, dtype=torch.int32, device=device)

        def run() -> tuple[Tensor, ...]:
            low, high = weight.view(rows, -1, 16).aminmax(dim=-1, keepdim=True)
            low, scale = low.half(), ((high - low) / 3).half()
            codes = ((weight.view(rows, -1, 16) - low) / scale).round_().clamp_(0, 3).int()
            (codes << shifts).sum(-1, dtype=torch.int32)
            return ()

        return run

    return prepare


def linear(rows: int, columns: int, batch: int, dtype: torch.dtype | None) -> Factory:
    """Multiply by the packed weight, or by the decoded one in a dense dtype."""

    def prepare(device: torch.device) -> Run:
        x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(2)).to(device)
        weight = packed(rows, columns).to(device)
        if dtype is None:
            return lambda: (two_bit_linear(x, weight),)
        dense = dequantize_two_bit(weight, dtype)
        return lambda: (F.linear(x.to(dtype), dense).float(),)

    return prepare


def megabytes(bits: float) -> str:
    """Bits as printed."""
    return f"{bits / 8e6:.1f} MB"


def held(rows: int, columns: int) -> str:
    """Bytes that stay in memory, by the formula of the format."""
    groups, four = 4 * -(-columns // 64), int(-(-columns // 16) / 8 + 0.5)
    two, blocks, kept = groups - four, -(-rows // 16), int(0.0025 * rows * columns + 0.5)
    triples, nibbles = -(-two // 3), -(-four // 8)
    a_row = 32 * (groups + four + nibbles + 1) + 16 * (triples + four)
    packed_bits = rows * a_row + 16 * blocks * (two + triples) + 32 * kept + 32 * -(-groups // 32) + 64
    return f"{megabytes(packed_bits)} of weights, float32 {megabytes(32 * rows * columns)}"


SPEED = Speed(
    summary="Encoding: `quantize_two_bit` of normal float32 weights with the defaults, by one thread unless said; "
    "compensated with a Hessian that is given. The peer does less: 2 bits alone with a float16 minimum and scale every "
    "16 weights (4 bits a weight), in float32, without choices or second-order scales. Product: x (batch, in_features) "
    "float32 by a weight that stays packed, against dense products with the same decoded weight. The titles name the "
    "weights' memory, which a peer in bfloat16 halves. On the CPU the packed product decodes blocks of rows by torch "
    "operations before it multiplies, which costs the same whatever the batch: expect it to lose in time, by least at "
    "large batches.",
    cases={
        **{
            f"encode {o} x {i}": Case(
                ours={"to nearest": encode(o, i, compensated=False)},
                peers={"plain 2-bit groups": plain_two_bit(o, i)},
                repeats=3,
            )
            for o, i in SHAPES
        },
        "encode 4096 x 4096, compensated": Case(
            ours={"compensated": encode(4096, 4096, compensated=True)},
            peers={"plain 2-bit groups": plain_two_bit(4096, 4096)},
            repeats=3,
        ),
        **{
            f"product {o} x {i}, batch {batch} ({held(o, i)})": Case(
                ours={"TwoBitLinear": linear(o, i, batch, None)},
                peers={
                    "nn.Linear, float32": linear(o, i, batch, torch.float32),
                    "nn.Linear, bfloat16": linear(o, i, batch, torch.bfloat16),
                },
            )
            for o, i in SHAPES
            for batch in BATCHES
        },
    },
)
