"""Group whitening's kernels on a GPU, against eigh on the host, batched eigh on the device, and torch.compile."""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import frame
from benchmarks.gpu import milliseconds
from benchmarks.speed import Case, Speed
from benchmarks.speed.group_whitening import EPS, VIEWS, contender
from heliostat.components import group_whiten_views
from heliostat.cuda import group_whitening as kernels

SHAPES = [(256, 768, 6), (256, 768, 48), (256, 768, 96), (4096, 4096, 64)]  # N, d, m
PEAKS = {  # name of a device -> bytes a second of a copy, float32 operations a second outside tensor cores
    "H100": (3.0e12, 67e12),
    "H200": (4.3e12, 67e12),
    "A100": (1.4e12, 19.5e12),
}


def whiten_by_eigh(x: Tensor, permutations: Tensor, *, group_size: int, on_host: bool) -> Tensor:
    """As published: a view at a time, W detached; ``on_host`` moves each covariance to the CPU for eigh and back."""
    rows, dim = x.shape[1:]
    outputs = []
    for view, permutation in zip(x, permutations, strict=True):
        slabs = view[:, permutation].view(rows, dim // group_size, group_size).permute(1, 2, 0)
        centred = slabs - slabs.mean(-1, keepdim=True)
        covariance = (centred.bmm(centred.mT) / rows + EPS * torch.eye(group_size, device=x.device)).detach()
        lam, u = torch.linalg.eigh(covariance.cpu() if on_host else covariance)
        lam, u = lam.to(x.device), u.to(x.device)
        whitened = (u / lam.sqrt()[:, None, :]).bmm(u.mT).bmm(centred)
        outputs.append(whitened.permute(2, 0, 1).reshape(rows, dim)[:, permutation.argsort()])
    return torch.stack(outputs)


def without_kernels(whiten: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The plain torch operations of the same function."""

    def plain(*arguments: Any, **settings: Any) -> Tensor:
        with mock.patch.object(kernels, "usable", return_value=False):
            return whiten(*arguments, **settings)

    return plain


def roofline_seconds(rows: int, dim: int, size: int, method: str, device_name: str) -> float | None:
    """Least time of forward and detached backward: moving x, y, dy and dx once each, or the arithmetic."""
    peak = next((peak for name, peak in PEAKS.items() if name in device_name), None)
    if peak is None:
        return None
    bandwidth, flops = peak
    root = 6 * 10 * size**3 if method == "newton_schulz" else 11 * size**3
    work = VIEWS * (6 * rows * dim * size + dim // size * root)
    return max(4 * 4 * VIEWS * rows * dim / bandwidth, work / flops)


def _contenders(size: int) -> dict[str, Callable[..., Tensor]]:
    ours = {
        f"heliostat, {method}": partial(group_whiten_views, method=method, group_size=size, eps=EPS)
        for method in ("eigh", "newton_schulz")
    }
    plain = partial(group_whiten_views, group_size=size, eps=EPS)
    detached: dict[str, Callable[..., Tensor]] = {
        **{label: partial(whiten, detach_transform=True) for label, whiten in ours.items()},
        "(i) covariance to the host, eigh, back": partial(whiten_by_eigh, group_size=size, on_host=True),
        "(ii) torch.linalg.eigh batched on the device": partial(whiten_by_eigh, group_size=size, on_host=False),
        "(iii) torch.compile of the torch path": without_kernels(
            torch.compile(partial(plain, method="newton_schulz", detach_transform=True), dynamic=False)
        ),
    }
    return detached


SPEED = Speed(
    summary=f"Forward and backward with a constant transform, {VIEWS} views (N, d), float32, a random permutation a "
    "view. Peers: (i) and (ii) the published way, (iii) the same Newton-Schulz as ours in compiled torch operations.",
    cases={
        f"N={n} d={d} m={m}": Case(
            ours={k: contender(n, d, f) for k, f in _contenders(m).items() if k.startswith("heliostat")},
            peers={k: contender(n, d, f) for k, f in _contenders(m).items() if not k.startswith("heliostat")},
        )
        for n, d, m in SHAPES
    },
)


def main(argv: Sequence[str]) -> None:
    """Device time, eager call time and fraction of the roofline, of every contender; writes JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.group_whitening_gpu", description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, default=frame.RESULTS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("This machine has no CUDA device: nothing was timed and nothing was written.")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    if not kernels.usable(torch.empty(1, 256, 12, device=device), 2, "eigh"):
        raise SystemExit("the kernels cannot run here; the warning above says why")
    from benchmarks.speed.__main__ import difference, time_interleaved

    name = torch.cuda.get_device_name(device)
    flush = torch.empty(64 * 2**20, device=device)  # 256 MiB, more than any cache
    records: list[dict[str, Any]] = []
    for (n, d, m), case in zip(SHAPES, SPEED.cases.values(), strict=True):
        runs = {label: factory(device) for label, factory in {**case.ours, **case.peers}.items()}
        results = {label: run() for label, run in runs.items()}
        eager = time_interleaved(runs, args.repeats, device)
        for label, run in runs.items():
            method = "newton_schulz" if "newton_schulz" in label or "(iii)" in label else "eigh"
            ms, bound = milliseconds(run, args.repeats, flush)[0], roofline_seconds(n, d, m, method, name)
            records.append(
                {
                    "case": f"N={n} d={d} m={m}",
                    "label": label,
                    "device_ms": ms,
                    "call_ms": statistics.median(eager[label]),
                    "roofline_fraction": None if bound is None else 1000 * bound / ms,
                    "difference": difference(results[label], results[next(iter(case.ours))]),
                }
            )
            print(records[-1], flush=True)
    document = {
        "benchmark": "speed/group_whitening_gpu",
        "command": f"python -m benchmarks.speed.group_whitening_gpu {' '.join(argv)}".strip(),
        "repeats": args.repeats,
        "environment": frame.environment(device),
        **frame.provenance(),
        "records": records,
    }
    stem = "group_whitening_gpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    final = args.out / "speed" / f"{stem}.json"
    frame.write_json(final, document)
    rows = [
        [
            record["case"],
            record["label"],
            f"{record['device_ms']:.3g}",
            f"{record['call_ms']:.3g}",
            "" if record["roofline_fraction"] is None else f"{record['roofline_fraction']:.0%}",
            f"{record['difference']:.0e}",
        ]
        for record in records
    ]
    header = ["case", "contender", "device ms", "call ms", "of the roofline", "difference"]
    parts = [
        f"# {stem}",
        SPEED.summary,
        frame.table(header, rows),
        f"Medians of {args.repeats}. Device ms: by events, from a CUDA graph where the call can be captured, with the "
        "caches flushed. Call ms: an eager call with synchronisation on either side.",
        frame.how_measured(document["command"], document["environment"], [document]),
    ]
    frame.write_text(final.with_suffix(".md"), "\n\n".join(parts) + "\n")
    print(f"Written: {final} and {final.with_suffix('.md')}")


if __name__ == "__main__":
    main(sys.argv[1:])
