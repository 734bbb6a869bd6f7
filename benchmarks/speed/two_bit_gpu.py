"""The product with 2/4/16-bit weights on a GPU, against float16 and other libraries' 2 and 4-bit layers."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import frame
from benchmarks.gpu import milliseconds
from benchmarks.speed import Case, Factory, Run, Speed
from benchmarks.speed.two_bit import matrix
from heliostat.components import TwoBitLinear, quantize_two_bit
from heliostat.cuda import two_bit as kernels

SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096)]  # O, I
BATCHES = (1, 4, 16)
ROTATED_BYTES = 250 * 10**6  # of weights, all different: more than any cache holds, so that each is read from memory
COPY_BYTES = 2**30

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """A layer to time.

    Args:
        label: As printed.
        module: What must be importable for it.
        dtype: Of the input.
        build: W (O, I) float32 on the device -> the layer.
    """

    label: str
    module: str
    dtype: torch.dtype
    build: Callable[[Tensor], Layer]

    @property
    def available(self) -> bool:
        """Whether its library is installed."""
        return importlib.util.find_spec(self.module) is not None


def build_ours(weight: Tensor) -> Layer:
    """With the defaults: 2.855 bits a weight for 4096 x 11008."""
    return TwoBitLinear.from_weight(quantize_two_bit(weight))


def build_dense(weight: Tensor) -> Layer:
    """A dense layer in float16."""
    return _linear(weight, torch.float16)


def build_bitsandbytes(weight: Tensor) -> Layer:
    """4-bit NormalFloat, 64 weights a scale."""
    import bitsandbytes

    rows, columns = weight.shape
    layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.float16, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight.half().cpu(), requires_grad=False, quant_type="nf4")
    return layer.to(weight.device)


def build_torchao(weight: Tensor) -> Layer:
    """4-bit integers, 128 weights a scale, in the layout of its kernel for small batches."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    model = nn.Sequential(_linear(weight, torch.bfloat16))
    quantize_(model, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    return model


def build_hqq(weight: Tensor) -> Layer:
    """2-bit integers, 64 weights a scale."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=2, group_size=64, axis=1)
    dense = _linear(weight, torch.float16)
    return HQQLinear(dense, config, compute_dtype=torch.float16, device=str(weight.device))


def build_gptqmodel(weight: Tensor) -> Layer:
    """2-bit integers, 64 weights a scale: random ones, since its quantiser takes whole models."""
    from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2QuantLinear

    rows, columns = weight.shape
    layer = TritonV2QuantLinear(
        bits=2, group_size=64, desc_act=False, sym=True, in_features=columns, out_features=rows, bias=False
    )
    for name in ("qweight", "qzeros"):
        getattr(layer, name).random_(-(2**31), 2**31 - 1)
    layer.scales.fill_(0.01)
    layer = layer.to(weight.device)
    layer.post_init()
    return layer.eval()


def _linear(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, device=weight.device, dtype=dtype)
    layer.weight.data.copy_(weight)
    return layer


OURS = Contender("heliostat", "cupy", torch.float16, build_ours)
DENSE = Contender("torch, float16", "torch", torch.float16, build_dense)
PEERS = (
    Contender("bitsandbytes, 4 bits (nf4)", "bitsandbytes", torch.float16, build_bitsandbytes),
    Contender("torchao, 4 bits, bfloat16", "torchao", torch.bfloat16, build_torchao),
    Contender("hqq, 2 bits", "hqq", torch.float16, build_hqq),
    Contender("gptqmodel, 2 bits (Triton)", "gptqmodel", torch.float16, build_gptqmodel),
)


class Rotation:
    """One layer after the other, with equal but separate weights, so that no weight is found in a cache.

    Args:
        contender: Whose layers.
        rows: O.
        columns: I.
        device: Where.
    """

    def __init__(self, contender: Contender, rows: int, columns: int, device: torch.device) -> None:
        if device.type != "cuda":
            raise SystemExit("this benchmark is for a GPU: run it with --device cuda on a machine that has one")
        self.contender = contender
        before = _allocated(device)
        weight = matrix(rows, columns).to(device)
        self.layers = [contender.build(weight)]
        del weight
        self.bytes_each = max(1, _allocated(device) - before)
        self.layers += [copy.deepcopy(self.layers[0]) for _ in range(ROTATED_BYTES // self.bytes_each)]

    def run(self, batch: int, columns: int, device: torch.device) -> Run:
        """The call to time: x by every weight once."""
        x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(2)).to(device, self.contender.dtype)

        def call() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return ([layer(x) for layer in self.layers][-1],)

        return call


def _allocated(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def factory(contender: Contender, rows: int, columns: int, batch: int) -> Factory:
    """For ``python -m benchmarks.speed``: a pass over all copies."""
    return lambda device: Rotation(contender, rows, columns, device).run(batch, columns, device)


SPEED = Speed(
    summary="x (batch, I) by a weight (O, I), in float16 unless said: by one copy of the weight after the other, as "
    f"many as fill {ROTATED_BYTES / 1e6:.0f} MB. Ours has the defaults of `quantize_two_bit`; other libraries round "
    "otherwise, so that their results differ.",
    cases={
        f"{o} x {i}, batch {batch}": Case(
            ours={OURS.label: factory(OURS, o, i, batch)},
            peers={peer.label: factory(peer, o, i, batch) for peer in (DENSE, *PEERS) if peer.available},
        )
        for o, i in SHAPES
        for batch in BATCHES
    },
)


def copy_bandwidth(repeats: int, device: torch.device) -> float:
    """Bytes a second, read and written, of a copy much larger than any cache."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms, _ = milliseconds(lambda: (target.copy_(source),), repeats)
    return 2 * COPY_BYTES / ms * 1000


def measure(contender: Contender, repeats: int, bandwidth: float, device: torch.device) -> list[dict[str, Any]]:
    """All shapes and batches of one contender."""
    records = []
    for rows, columns in SHAPES:
        rotation = Rotation(contender, rows, columns, device)
        for batch in BATCHES:
            total, captured = milliseconds(rotation.run(batch, columns, device), repeats)
            seconds = total / 1000 / len(rotation.layers)
            records.append(
                {
                    "case": f"{rows} x {columns}, batch {batch}",
                    "label": contender.label,
                    "microseconds": 1e6 * seconds,
                    "captured": captured,
                    "megabytes": rotation.bytes_each / 1e6,
                    "copies": len(rotation.layers),
                    "bandwidth_fraction": rotation.bytes_each / seconds / bandwidth,
                }
            )
            print(records[-1], flush=True)
    return records


def attempt(
    contender: Contender, repeats: int, bandwidth: float, device: torch.device
) -> tuple[list[dict[str, Any]], list[str]]:
    """What was measured, or why it could not be: other libraries may not know the device."""
    try:
        return measure(contender, repeats, bandwidth, device), []
    except Exception as error:
        if contender not in PEERS:
            raise
        return [], [f"{contender.label}: {type(error).__name__}: {error}"]


def deviation(device: torch.device) -> float:
    """Largest difference of ours from a float64 product with the decoded weight, relative to the largest result."""
    layer = TwoBitLinear.from_weight(quantize_two_bit(matrix(*SHAPES[0]).to(device)))
    x = torch.randn(BATCHES[-1], SHAPES[0][1], device=device).half()
    expected = F.linear(x.double(), layer.weight.double())
    return ((layer(x).double() - expected).abs().max() / expected.abs().max()).item()


def main(argv: Sequence[str]) -> None:
    """Device time, and the fraction of the copy bandwidth, of every contender; writes JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.two_bit_gpu", description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, default=frame.RESULTS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("This machine has no CUDA device: nothing was timed and nothing was written.")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    if not kernels.usable(OURS.dtype, [torch.empty(0, device=device)]):
        raise SystemExit("the kernels cannot run here; the warning above says why")
    name = torch.cuda.get_device_name(device)
    bandwidth = copy_bandwidth(args.repeats, device)
    notes = [f"{peer.label}: {peer.module} is not installed" for peer in PEERS if not peer.available]
    records: list[dict[str, Any]] = []
    for contender in (OURS, DENSE, *(peer for peer in PEERS if peer.available)):
        measured, failure = attempt(contender, args.repeats, bandwidth, device)
        records += measured
        notes += failure
    dense = {record["case"]: record["microseconds"] for record in records if record["label"] == DENSE.label}
    document = {
        "benchmark": "speed/two_bit_gpu",
        "command": f"python -m benchmarks.speed.two_bit_gpu {' '.join(argv)}".strip(),
        "repeats": args.repeats,
        "copy_bytes_per_second": bandwidth,
        "deviation": deviation(device),
        "not_timed": notes,
        "environment": frame.environment(device),
        **frame.provenance(),
        "records": records,
    }
    stem = "two_bit_gpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    final = args.out / "speed" / f"{stem}.json"
    frame.write_json(final, document)
    rows = [
        [
            record["case"],
            record["label"] + ("" if record["captured"] else ", not captured"),
            f"{record['microseconds']:.3g}",
            f"{dense[record['case']] / record['microseconds']:.2f}",
            f"{record['megabytes']:.1f}",
            f"{record['bandwidth_fraction']:.0%}",
        ]
        for record in sorted(records, key=lambda record: list(dense).index(record["case"]))
    ]
    header = ["case", "contender", "microseconds", "times float16's speed", "MB", "of the copy bandwidth"]
    parts = [
        f"# {stem}",
        SPEED.summary,
        frame.table(header, rows),
        f"Medians of {args.repeats} passes over all copies by events, from a CUDA graph where the layer can be "
        f"captured. MB: of one weight as held. Copy bandwidth: {bandwidth / 1e12:.2f} TB/s, read and written. Ours "
        f"is {document['deviation']:.0e} of the largest result from a float64 product with the decoded weight.",
        "\n".join(["Not timed:", "", *(f"- {note}" for note in notes)]) if notes else "",
        frame.how_measured(document["command"], document["environment"], [document]),
    ]
    frame.write_text(final.with_suffix(".md"), "\n\n".join(filter(None, parts)) + "\n")
    print(f"Written: {final} and {final.with_suffix('.md')}")


if __name__ == "__main__":
    main(sys.argv[1:])
