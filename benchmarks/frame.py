"""What both kinds of benchmark share: finding them, saying where a figure comes from, writing JSON and Markdown."""

from __future__ import annotations

import ast
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks/results")
PACKAGES = ("torch", "lightning", "transformers")  # whose versions belong to a figure


def available(package: ModuleType) -> dict[str, str]:
    """Map every benchmark of ``package`` to the first line of its docstring, without importing any of them."""
    files = [file for folder in package.__path__ for file in Path(folder).glob("*.py") if file.name[0] != "_"]
    docstrings = {file.stem: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) for file in files}
    return {name: (docstring or "").split("\n")[0] for name, docstring in sorted(docstrings.items())}


def load(package: ModuleType, name: str) -> ModuleType:
    """Import benchmark ``name`` of ``package``; exits with the list of names when there is none such."""
    names = available(package)
    if name not in names:
        raise SystemExit(f"{package.__name__} has no benchmark {name!r}; there are: {', '.join(names)}")
    return importlib.import_module(f"{package.__name__}.{name}")


def print_available(package: ModuleType) -> None:
    """List the benchmarks of ``package``."""
    print(f"Usage: python -m {package.__name__} NAME. There are:")
    for name, summary in available(package).items():
        print(f"  {name:24} {summary}")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, processor and threads that a figure depends on."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def provenance() -> dict[str, Any]:
    """Date, git commit and whether the tree differs from it (results aside: writing them is what benchmarks do)."""

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None  # an sdist, or no git: the commit is unknown
        return run.stdout.strip()

    changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def write_text(path: Path, text: str) -> None:
    """Write a file so that an interruption leaves either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, document: Any) -> None:
    """Write standard JSON: NaN and infinity, which it lacks, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list) else value

    write_text(path, json.dumps(finite(document), indent=1, allow_nan=False) + "\n")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Build a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def how_measured(command: str, env: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """Build the Markdown lines on origin: the command, `environment`, and the `provenance` of every run."""
    trees = {(run["commit"] or "unknown") + (" with uncommitted changes" if run["dirty"] else "") for run in runs}
    days = sorted({run["date"][:10] for run in runs})
    versions = ", ".join(f"{package} {version}" for package, version in env["versions"].items())
    lines = [
        f"Command: `{command}`",
        f"Device: {env['device']}; processor {env['cpu']}, {env['threads']} torch thread(s)",
        f"Versions: {versions}",
        f"Commit: {'; '.join(sorted(trees))}",
        f"Date: {' to '.join(dict.fromkeys((days[0], days[-1])))}",
    ]
    return "\n".join(f"- {line}" for line in lines)
