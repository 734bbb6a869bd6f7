"""Run a claim: seeds x arms, resumable, written as JSON (all figures) and Markdown (table and computed verdict)."""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning import seed_everything

import benchmarks.claims
from benchmarks import frame
from benchmarks.claims import Claim, Metric


def identify_data(path: Path) -> dict[str, str]:
    """Name and SHA-256 of a file, or of all files of a folder with their relative paths."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return {"name": path.stem if path.is_file() else path.name, "sha256": digest.hexdigest()}


def describe(claim: Claim) -> dict[str, Any]:
    """Turn the declaration into JSON types."""
    return {
        "statement": claim.statement,
        "source": claim.source,
        "budget": claim.budget,
        "metrics": {name: vars(metric) for name, metric in claim.metrics.items()},
        "arms": list(claim.arms),
        "baseline": claim.baseline,
        "method": claim.method,
    }


def config_hash(module: ModuleType, data: dict[str, str] | None, env: dict[str, Any]) -> str:
    """Hash what makes two runs comparable: the claim's code without comments and layout, data, and environment.

    The commit is left out, so that a long benchmark survives commits elsewhere; every run carries its own.
    """
    config = [ast.dump(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))), data, env]
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def finished_runs(paths: Sequence[Path], config: str) -> list[dict[str, Any]]:
    """Runs of the first of ``paths`` that exists and has this configuration."""
    for path in paths:
        if path.exists():
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["config_hash"] == config:
                return document["runs"]
            print(f"{path} holds runs of another configuration (code, data or environment): not reused")
    return []


def run_arm(claim: Claim, arm: str, seed: int, data: Path | None) -> dict[str, Any]:
    """Run one arm with one seed."""
    # Whatever ran before, in this process or before a resumption, must not change the figures.
    seed_everything(seed, verbose=False)
    start = time.perf_counter()
    metrics = claim.arms[arm](seed, data)
    seconds = time.perf_counter() - start
    if set(metrics) != set(claim.metrics):
        raise ValueError(f"arm {arm!r} must return the metrics {sorted(claim.metrics)}, got {sorted(metrics)}")
    metrics = {name: float(metrics[name]) for name in claim.metrics}
    return {"arm": arm, "seed": seed, "metrics": metrics, "seconds": round(seconds, 3), **frame.provenance()}


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # JSON's null: the run gave no finite figure


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def verdict(differences: Sequence[float], metric: Metric) -> str:
    """Say in words whether the method beat the baseline, given its paired differences (method - baseline)."""
    count = len(differences)
    gains = [d if metric.better == "higher" else -d for d in differences]
    wins = sum(gain > 0 and math.isfinite(gain) for gain in gains)  # against a diverged baseline nothing is measured
    seeds = "seed" if count == 1 else "seeds"
    undefined = sum(not math.isfinite(d) for d in differences)
    if undefined:
        figures = f"{undefined} of {count} {seeds} gave no finite difference"
    else:
        mean, low, high = (
            f"{value:+{metric.format}}" for value in (statistics.mean(differences), min(differences), max(differences))
        )
        figures = f"difference {mean} on average, {low} to {high}; {metric.better} is better"
    if wins == count:
        return f"won in {wins} of {count} {seeds} ({figures})"
    return f"did not win: better in {wins} of {count} {seeds} ({figures})"


def summarise(claim: Claim, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample deviation of every arm, paired differences and verdicts, over seeds that all arms finished."""
    results = {(run["arm"], run["seed"]): run["metrics"] for run in runs}
    seeds = sorted({seed for _, seed in results if all((arm, seed) in results for arm in claim.arms)})
    summary: dict[str, Any] = {"seeds": seeds, "metrics": {}}
    for name, metric in claim.metrics.items():
        values = {arm: [_number(results[arm, seed][name]) for seed in seeds] for arm in claim.arms}
        differences = [m - b for m, b in zip(values[claim.method], values[claim.baseline], strict=True)]
        summary["metrics"][name] = {
            "arms": {arm: {"mean": statistics.mean(v), "sd": _deviation(v)} for arm, v in values.items()},
            "differences": differences,
            "verdict": verdict(differences, metric),
        }
    return summary


def markdown(name: str, claim: Claim, document: dict[str, Any]) -> str:
    """Build the page that a reader sees; every figure and every verdict comes from the runs."""
    summary = document["summary"]
    seconds = {arm: [r["seconds"] for r in document["runs"] if r["arm"] == arm] for arm in claim.arms}

    def cell(arm: str, metric: str) -> str:
        figures, form = summary["metrics"][metric]["arms"][arm], claim.metrics[metric].format
        spread = "" if figures["sd"] is None else f" ± {figures['sd']:{form}}"
        return f"{figures['mean']:{form}}{spread}"

    roles = {claim.baseline: " (baseline)", claim.method: " (method)"}
    header = ["arm", *(f"{m} ({metric.better} is better)" for m, metric in claim.metrics.items()), "seconds a run"]
    rows = [
        [arm + roles.get(arm, ""), *(cell(arm, m) for m in claim.metrics), f"{statistics.mean(seconds[arm]):.1f}"]
        for arm in claim.arms
    ]
    verdicts = [f"- {m}: {summary['metrics'][m]['verdict']}" for m in claim.metrics]
    headline, *others = verdicts
    data = "the claim's own" if document["data"] is None else "{name}, SHA-256 {sha256}".format(**document["data"])
    seeds = ", ".join(map(str, summary["seeds"]))
    parts = [
        f"# {name}",
        f"Claim: {claim.statement}",
        f"Source: {claim.source}",
        f"Budget of every arm: {claim.budget}",
        f"**Verdict** on the claim, {claim.method} against {claim.baseline}:",
        headline,
        *(["Beside it:", "\n".join(others)] if others else []),
        frame.table(header, rows),
        f"Mean ± sample standard deviation over seeds {seeds}. Differences are {claim.method} - {claim.baseline}, "
        "paired by seed.",
        f"{frame.how_measured(document['command'], document['environment'], document['runs'])}\n- Data: {data}",
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str]) -> None:
    """Run the command line of ``python -m benchmarks.claims``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("name", nargs="?", help="a file of benchmarks/claims; without it, all are listed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, help="file or folder to use in place of the claim's own data")
    parser.add_argument("--out", type=Path, default=frame.RESULTS)
    parser.add_argument("--fresh", action="store_true", help="run everything anew, also what is finished")
    args = parser.parse_args(argv)
    if args.name is None:
        frame.print_available(benchmarks.claims)
        return
    if args.data is not None and not args.data.exists():
        parser.error(f"--data {args.data} does not exist")

    module = frame.load(benchmarks.claims, args.name)
    claim: Claim = module.CLAIM
    env = frame.environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    data = None if args.data is None else identify_data(args.data)
    stem = args.name if data is None else f"{args.name}-{data['name']}"
    final, partial = (args.out / "claims" / f"{stem}{end}" for end in (".json", ".partial.json"))
    config = config_hash(module, data, env)
    runs = [] if args.fresh else finished_runs([partial, final], config)
    document: dict[str, Any] = {
        "benchmark": f"claims/{stem}",
        "claim": describe(claim),
        "config_hash": config,
        "data": data,
        "command": f"python -m benchmarks.claims {shlex.join(argv)}",
        "environment": env,
        "runs": runs,
    }
    # Seeds outside, arms inside: a machine that slows down, or an interruption, hits all arms alike.
    todo = [(arm, seed) for seed in dict.fromkeys(args.seeds) for arm in claim.arms]
    done = {(run["arm"], run["seed"]): run for run in runs}
    for number, (arm, seed) in enumerate(todo, start=1):
        label = f"[{number}/{len(todo)}] seed {seed}, {arm}:"
        if (arm, seed) in done:
            old = done[arm, seed]
            print(f"{label} kept from {old['date']}, commit {old['commit']} (--fresh runs it anew)")
            continue
        print(label, "...", flush=True)
        runs.append(run_arm(claim, arm, seed, args.data))
        frame.write_json(partial, document)
        figures = ", ".join(f"{m} {runs[-1]['metrics'][m]:{metric.format}}" for m, metric in claim.metrics.items())
        print(f"{label} {figures} ({runs[-1]['seconds']:.1f} s)", flush=True)

    document["summary"] = summarise(claim, runs)
    frame.write_json(final, document)
    frame.write_text(final.with_suffix(".md"), markdown(stem, claim, document))
    partial.unlink(missing_ok=True)
    for metric, figures in document["summary"]["metrics"].items():
        print(f"{metric}: {figures['verdict']}")
    print(f"Written: {final} and {final.with_suffix('.md')}")


if __name__ == "__main__":
    main(sys.argv[1:])
