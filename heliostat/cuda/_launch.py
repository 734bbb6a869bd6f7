"""Compiling and launching the kernels of this folder: through CuPy, on torch's tensors, device and stream.

CuPy (with NVRTC) is imported by the first launch only. It compiles and launches; all memory is torch's.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # the value of DTYPE
SWITCH = "HELIOSTAT_KERNELS"  # environment variable; "off" keeps to torch's operations

Defines = tuple[tuple[str, int], ...]
Argument = Tensor | int | float | None

_lock = threading.Lock()
_shared_bytes_allowed: dict[tuple[Any, ...], int] = {}


@functools.cache
def source(stem: str) -> str:
    """The whole source of ``STEM.cu``: its text behind the prelude's.

    One string, because CuPy's cache on disk knows the string and the options, not the content of included files.
    """
    folder = Path(__file__).parent
    return "".join((folder / name).read_text(encoding="utf-8") for name in ("prelude.cuh", f"{stem}.cu"))


def options(defines: Defines) -> tuple[str, ...]:
    """Compiler options, the same for every compiler."""
    return ("-std=c++17", *(f"-D{name}={value}" for name, value in defines))


@functools.cache
def _module(stem: str, defines: Defines) -> Any:
    import cupy

    return cupy.RawModule(code=source(stem), options=options(defines))


def launch(
    stem: str,
    defines: Defines,
    kernel: str,
    grid: tuple[int, ...],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[Argument],
) -> None:
    """Launch a kernel on the current stream of its tensors' device, without waiting for it.

    Args:
        stem: The kernel's file, ``STEM.cu``.
        defines: Macros it is compiled with.
        kernel: Its name.
        grid: Numbers of blocks, one to three.
        threads: Threads a block.
        shared_bytes: Dynamic shared memory a block.
        arguments: Contiguous tensors (their address), None or empty tensors (null), int (int32), float (float32).
    """
    import cupy
    import numpy as np

    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    device = _common_device(tensors)
    values = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            values.append(argument.data_ptr())
        elif argument is None:
            values.append(0)
        else:
            values.append(np.int32(argument) if isinstance(argument, int) else np.float32(argument))
    with torch.cuda.device(device), cupy.cuda.Device(device.index), _lock:
        function = _module(stem, defines).get_function(kernel)
        key = (stem, defines, kernel, device.index)
        if shared_bytes > _shared_bytes_allowed.get(key, 48 * 1024):
            function.max_dynamic_shared_size_bytes = shared_bytes
            _shared_bytes_allowed[key] = shared_bytes
        function((*grid, 1, 1)[:3], (threads, 1, 1), tuple(values), shared_mem=shared_bytes, stream=_stream(device))


def _common_device(tensors: Sequence[Tensor]) -> torch.device:
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise ValueError(f"a kernel's tensors must be on one device, got {sorted(map(str, devices))}")
    (device,) = devices
    if device.type != "cuda":
        raise ValueError(f"kernels run on CUDA devices, got tensors on {device}")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("a kernel's tensors must be contiguous")
    return device


def _stream(device: torch.device) -> Any:
    import cupy

    stream = torch.cuda.current_stream(device)
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, device.index)


# --- whether to -----------------------------------------------------------------------------------------------------


@functools.cache
def _obstacle(index: int) -> str | None:
    """Why kernels cannot run on a CUDA device, or None."""
    if torch.version.cuda is None:
        return "this build of torch is not for NVIDIA's CUDA"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "its compute capability is below 8.0"
    try:
        import cupy
    except ImportError:
        major = torch.version.cuda.split(".")[0]
        return f"CuPy is not installed. Run: pip install 'heliostat[cuda{major if major in ('12', '13') else 13}]'"
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy does not find the device ({error})"
    return None


@functools.cache
def _warn_once(operation: str, index: int, reason: str) -> None:
    warnings.warn(
        f"{operation} has a kernel, but cuda:{index} falls back to plain torch operations: {reason}. "
        f"{SWITCH}=off silences this.",
        stacklevel=2,
    )


@torch.compiler.assume_constant_result
def shared_memory_for_kernels(device_type: str, index: int | None, operation: str) -> int:
    """Bytes of shared memory that a block may have on a device; 0 if kernels cannot run there.

    Warns, once, when a CUDA device cannot run them.

    Args:
        device_type: Of the tensors.
        index: Of their device.
        operation: The operation's name, for the warning.
    """
    if device_type != "cuda" or index is None or os.environ.get(SWITCH) == "off":
        return 0
    reason = _obstacle(index)
    if reason is not None:
        _warn_once(operation, index, reason)
        return 0
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin
