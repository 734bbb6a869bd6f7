"""Time contenders interleaved in one process: median and quartiles, time ratio, peak memory, wins and losses."""

from __future__ import annotations

import argparse
import gc
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import benchmarks.speed
from benchmarks import frame
from benchmarks.speed import Case, Run, Speed

WARM_UP = 3  # calls of each contender before the clock: allocator, thread pools, lazy initialisation


def time_interleaved(
    contenders: dict[str, Run], repeats: int, device: torch.device, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Milliseconds of each call, in rounds A B A B ... so that a change of the machine's pace hits all alike."""
    samples: dict[str, list[float]] = {label: [] for label in contenders}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection inside one call would be charged to whoever is running
    try:
        for number in range(warm_up + repeats):
            for label, run in contenders.items():
                _synchronize(device)
                start = time.perf_counter()
                run()
                _synchronize(device)
                if number >= warm_up:
                    samples[label].append(1000 * (time.perf_counter() - start))
    finally:
        if collecting:
            gc.enable()
    return samples


def peak_bytes(run: Run, device: torch.device) -> int:
    """Most bytes of tensors alive at one time during a call, beyond those alive before it; the result counts."""
    if device.type == "cuda":
        _synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    # Kineto records every allocation (bytes > 0) and release (bytes < 0) of torch's CPU allocator as "[memory]".
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def difference(result: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float | None:
    """Largest deviation of any tensor, relative to the reference's largest entry; None without tensors."""
    ratios = [
        ((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny)).item()
        for a, b in zip(result, reference, strict=True)
    ]
    return max(ratios, default=None)


def measure(case: Case, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Build and measure the contenders of a case; the first of the returned records is ours."""
    contenders = {label: factory(device) for label, factory in {**case.ours, **case.peers}.items()}
    results = {label: run() for label, run in contenders.items()}  # a warm-up too
    few = case.repeats is not None and case.repeats < repeats
    samples = time_interleaved(contenders, case.repeats if few else repeats, device, 0 if few else WARM_UP)
    reference = next(iter(case.ours))
    records = []
    for label, run in contenders.items():
        q1, median, q3 = statistics.quantiles(samples[label], n=4, method="inclusive")
        records.append(
            {
                "label": label,
                "ours": label in case.ours,
                "median_ms": median,
                "q1_ms": q1,
                "q3_ms": q3,
                "time_ratio": median / statistics.median(samples[reference]),
                "peak_bytes": peak_bytes(run, device),
                "difference": difference(results[label], results[reference]),
                "samples_ms": samples[label],
            }
        )
    return records


def verdicts(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Say in words where ours is faster or slower, and where it takes more memory, than each peer."""
    pairs = [(case, records[0], peer) for case, records in results.items() for peer in records if not peer["ours"]]
    outcome: dict[str, list[str]] = {"faster": [], "slower": [], "level": []}
    heavier = []
    for case, ours, peer in pairs:
        name = f"{case}, against {peer['label']}"
        if ours["q3_ms"] < peer["q1_ms"]:
            outcome["faster"].append(f"{name}: {peer['time_ratio']:.2f} times as fast")
        elif ours["q1_ms"] > peer["q3_ms"]:
            outcome["slower"].append(f"{name}: {1 / peer['time_ratio']:.2f} times its time")
        else:
            outcome["level"].append(f"{name}: {peer['time_ratio']:.2f} times as fast, interquartile ranges overlap")
        if ours["peak_bytes"] > peer["peak_bytes"]:
            heavier.append(f"{name}: {_mib(ours['peak_bytes'])} MiB against {_mib(peer['peak_bytes'])} MiB")
    count = len(pairs)
    lines = []
    for word, names in (*outcome.items(), ("more peak memory", heavier)):
        lines += [f"- {word} in {len(names)} of {count} comparisons", *(f"  - {name}" for name in names)]
    return lines


def markdown(name: str, speed: Speed, document: dict[str, Any]) -> str:
    """Build the page that a reader sees."""
    header = ["case", "contender", "median ms", "quartiles ms", "time / ours", "peak MiB", "difference"]
    rows = []
    for case, records in document["cases"].items():
        for record in records:
            deviation = "" if record["difference"] is None else f"{record['difference']:.0e}"
            rows.append(
                [
                    "" if record is not records[0] else case,
                    f"{'ours' if record['ours'] else 'peer'}: {record['label']}",
                    f"{record['median_ms']:.3g}",
                    f"{record['q1_ms']:.3g} to {record['q3_ms']:.3g}",
                    f"{record['time_ratio']:.2f}",
                    _mib(record["peak_bytes"]),
                    "" if record is records[0] else deviation,
                ]
            )
    few = {case: len(records[0]["samples_ms"]) for case, records in document["cases"].items()}
    few = {case: count for case, count in few.items() if count < document["repeats"]}
    fewer = "".join(f"; {case}: {count} after 1" for case, count in few.items())
    parts = [
        f"# {name}",
        speed.summary,
        "Ours (the first row of a case) is:",
        "\n".join(verdicts(document["cases"])),
        frame.table(header, rows),
        f"Medians of {document['repeats']} interleaved calls after {WARM_UP} to warm up{fewer}. `time / ours` above 1: "
        "ours is faster. Peak: tensor bytes alive during one call beyond those before it. Difference: of the results "
        "from those of ours, relative to the largest entry.",
        frame.how_measured(document["command"], document["environment"], [document]),
    ]
    return "\n\n".join(parts) + "\n"


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str]) -> None:
    """Run the command line of ``python -m benchmarks.speed``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("name", nargs="?", help="a file of benchmarks/speed; without it, all are listed")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; one is steadiest on a shared machine")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=frame.RESULTS)
    args = parser.parse_args(argv)
    if args.name is None:
        frame.print_available(benchmarks.speed)
        return
    if args.repeats < 3:
        parser.error(f"--repeats must be at least 3 for quartiles to mean anything, got {args.repeats}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notices would be printed between the figures
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    speed: Speed = frame.load(benchmarks.speed, args.name).SPEED
    document: dict[str, Any] = {
        "benchmark": f"speed/{args.name}",
        "summary": speed.summary,
        "command": f"python -m benchmarks.speed {shlex.join(argv)}",
        "repeats": args.repeats,
        "environment": frame.environment(device),
        **frame.provenance(),
        "cases": {},
    }
    stem = args.name
    if device.type == "cuda":  # figures of several GPUs stand side by side
        stem += "-" + re.sub(r"[^a-z0-9]+", "-", document["environment"]["device"].lower()).strip("-")
    final = args.out / "speed" / f"{stem}.json"
    for title, case in speed.cases.items():
        torch.manual_seed(0)
        document["cases"][title] = measure(case, args.repeats, device)
        print(title)
        for record in document["cases"][title]:
            print(
                f"  {record['label']:45} {record['median_ms']:9.3f} ms  {record['time_ratio']:6.2f} x ours  "
                f"{_mib(record['peak_bytes']):>8} MiB",
                flush=True,
            )
        # After every case: what an interruption leaves are the finished ones.
        frame.write_json(final, document)
        frame.write_text(final.with_suffix(".md"), markdown(stem, speed, document))
    print("\n".join(["Ours is:", *verdicts(document["cases"])]))
    print(f"Written: {final} and {final.with_suffix('.md')}")


if __name__ == "__main__":
    main(sys.argv[1:])
