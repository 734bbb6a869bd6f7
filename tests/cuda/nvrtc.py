"""Compiles kernels for GPUs that are not there: by NVRTC, which torch's CUDA packages bring, without a driver."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Binary(NamedTuple):
    code: bytes
    ptx: str
    registers: dict[str, int]  # of each kernel
    stack_and_spills: int  # bytes, of all kernels


@functools.cache
def library() -> Any:
    """NVRTC, or None where it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("**/libnvrtc*.so.*") if ".alt." not in file.name)
    # The compiler looks for its builtins by name, and finds them only if they are loaded already.
    for file in sorted(files, key=lambda file: "builtins" not in file.name):
        loaded = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
        if "builtins" not in file.name:
            return loaded
    return None


def architectures() -> list[int]:
    """Those that the compiler knows, as 80 for sm_80."""
    count = ctypes.c_int()
    library().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    library().nvrtcGetSupportedArchs(numbers)
    return sorted(numbers)


def compile_for(architecture: int, source: str, options: Sequence[str]) -> Binary:
    """Compile to machine code, with the options that CuPy adds."""
    nvrtc = library()
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    flags = [*options, f"-arch=sm_{architecture}", "-ftz=true", "--device-as-default-execution-space"]
    flags += ["--ptxas-options=-v"]
    array = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    failed = nvrtc.nvrtcCompileProgram(program, len(flags), array)

    def fetch(what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    log = fetch("ProgramLog").rstrip(b"\0").decode()
    assert not failed, log
    binary, ptx = fetch("CUBIN"), fetch("PTX").decode()
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    names = re.findall(r"Compiling entry function '(\w+)'", log)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", log)]
    spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)
    return Binary(binary, ptx, dict(zip(names, registers, strict=True)), sum(map(int, spills)))
