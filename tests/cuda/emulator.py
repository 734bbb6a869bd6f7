"""Builds kernels for the CPU and launches them there: the stand-in for `heliostat.cuda._launch.launch`.

The same source as on a GPU, compiled by g++ against ``emulator.hpp``, in three flavours: "plain"; "sanitized", with the
address and the undefined-behaviour sanitizer, whose runs take a process of their own (`replay`); "races", in which
``emulator.cpp`` checks every memory access.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-g", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", f"-I{HERE}"]
FLAVOURS = {
    "plain": (["-O1"], ["-O1"]),
    "sanitized": (["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], ["-DEMULATOR_SANITIZED"]),
    "races": (["-O1", "-fsanitize=thread"], ["-O2", "-DEMULATOR_RACES"]),
}  # flags for the kernel and for the emulator itself


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class KernelError(AssertionError):
    """A kernel did what it must not."""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("order", ctypes.c_uint),
        ("skipped_line", ctypes.c_int),
        ("message", ctypes.c_char * 512),
    )


def run(command: Sequence[str | Path], **settings: Any) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **settings)
    if result.returncode:
        raise KernelError(f"{' '.join(map(str, command))}\n{result.stdout[-3000:]}{result.stderr[-6000:]}")
    return result


class Builder:
    """Compiles kernels into a folder, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cache  # noqa: B019 - lives as long as the test session
    def library(self, source: str, options: tuple[str, ...], flavour: str) -> Path:
        """The shared library of a kernel file's source, with one ``launch_NAME`` for each of its kernels."""
        kernel_flags, own_flags = FLAVOURS[flavour]
        emulator, library = (
            self.folder / f"emulator_{flavour}.o",
            self.folder / f"{_digest(source, options)}_{flavour}.so",
        )
        unit, compiled = library.with_suffix(".cpp"), library.with_suffix(".o")
        with (self.folder / "lock").open("w") as lock:  # the processes of a test run share the folder
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not emulator.exists():
                run([COMPILER, *FLAGS, *own_flags, "-c", HERE / "emulator.cpp", "-o", emulator])
            if not library.exists():
                unit.write_text(source)
                flags = [*FLAGS, *kernel_flags, "-DHELIOSTAT_HOST", *options]
                # The kernels' names are known after the preprocessor, which also writes those that macros make.
                names = re.findall(
                    r'extern "C"[^;{}()]*\s(\w+)\(\s*[^{};]*\)\s*\{', run([COMPILER, *flags, "-E", "-P", unit]).stdout
                )
                tail = "".join(f"EMULATOR_KERNEL({name})\n" for name in names)
                unit.write_text(source + tail)
                run([COMPILER, *flags, "-c", unit, "-o", compiled])
                sanitizers = [flag for flag in kernel_flags if "address" in flag]
                run([COMPILER, "-shared", *sanitizers, compiled, emulator, "-o", library])
        return library


def call(
    library: Path,
    kernel: str,
    grid: tuple[int, ...],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[tuple[str, Any]],
    order: int = 0,
    skipped_line: int = 0,
) -> None:
    """Run a kernel; arguments are ("pointer", address), ("int", value) or ("float", value)."""
    types = {"pointer": ctypes.c_void_p, "int": ctypes.c_int, "float": ctypes.c_float}
    values = [types[kind](value) for kind, value in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    launch = _Launch((ctypes.c_uint * 3)(*(*grid, 1, 1)[:3]), threads, shared_bytes, order, skipped_line)
    if getattr(ctypes.CDLL(str(library)), f"launch_{kernel}")(ctypes.byref(launch), pointers):
        raise KernelError(f"{kernel}: {launch.message.decode()}")


class Emulator:
    """Runs launches on CPU tensors. Set `order` (of the threads) or `skipped_line` (a barrier to leave out) as wanted.

    With ``record`` a list, every launch is noted there with its inputs, for `replay`.
    """

    def __init__(self, builder: Builder, flavour: str = "plain") -> None:
        self.builder, self.flavour = builder, flavour
        self.order = self.skipped_line = 0
        self.record: list[dict[str, Any]] | None = None
        self.edit: Callable[[str], str] = lambda source: source

    def library(self, stem: str, defines: Sequence[tuple[str, int]], flavour: str | None = None) -> Path:
        from heliostat.cuda import _launch

        source = self.edit(_launch.source(stem))
        return self.builder.library(source, _launch.options(tuple(defines)), flavour or self.flavour)

    def launch(
        self,
        stem: str,
        defines: Sequence[tuple[str, int]],
        kernel: str,
        grid: tuple[int, ...],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Any],
    ) -> None:
        import torch

        values: list[tuple[str, Any]] = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                assert argument.is_contiguous()
                values.append(("pointer", argument.data_ptr()))
            elif argument is None:
                values.append(("pointer", None))
            else:
                values.append(("int" if isinstance(argument, int) else "float", argument))
        if self.record is not None:
            copies = [
                bytes(a.view(-1).view(torch.uint8).tolist()) if isinstance(a, torch.Tensor) else a for a in arguments
            ]
            self.record.append(
                {
                    "library": self.library(stem, defines, "sanitized"),
                    "kernel": kernel,
                    "grid": grid,
                    "threads": threads,
                    "shared_bytes": shared_bytes,
                    "arguments": copies,
                }
            )
        call(
            self.library(stem, defines),
            kernel,
            grid,
            threads,
            shared_bytes,
            values,
            self.order,
            self.skipped_line,
        )


def replay(launches: list[dict[str, Any]], folder: Path) -> None:
    """Run recorded launches under the sanitizers, every tensor a heap block of its own and exact size."""
    path = folder / "launches.pickle"
    path.write_bytes(pickle.dumps(launches))
    runtime = run([COMPILER, "-print-file-name=libasan.so"]).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    run([sys.executable, "-S", "-m", "tests.cuda.emulator", path], env=environment, cwd=HERE.parents[1])


def _replay(path: str) -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    for launch in pickle.loads(Path(path).read_bytes()):  # noqa: S301 - written by `replay`
        values: list[tuple[str, Any]] = []
        for argument in launch.pop("arguments"):
            if isinstance(argument, bytes):
                place = libc.malloc(ctypes.c_size_t(len(argument)))
                ctypes.memmove(place, argument, len(argument))
                values.append(("pointer", place if argument else None))
            elif argument is None:
                values.append(("pointer", None))
            else:
                values.append(("int" if isinstance(argument, int) else "float", argument))
        call(**launch, arguments=values)


if __name__ == "__main__":
    _replay(sys.argv[1])
