"""Launches of the kernels in ``two_bit.cu``: products with a weight in the TB2 format, and its decoding.

`heliostat.components.two_bit` is the entry for users, and holds the operators and the format; here is which launches
they take on a CUDA device. ``arrays`` are those of a `PackedArrays`, in its order.

Few rows of x are multiplied while the weight is decoded. Many rows, and the transposed product, which has no natural
order of summation to fuse, take the weight decoded to float32, a bounded number of rows at a time, and a float32
product of torch. Decoded to 16 bits it would have tensor cores, but W^ has up to 20 significant bits, and its rounding
would be the larger part of the error.

Nothing waits for the device: what the host must know (how many 4-bit groups there are) it reads off the shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from heliostat.cuda import _launch

THREADS = 256
BLOCK_ROWS, TILE_COLUMNS = 16, 2048  # of W^, of a block and of what it decodes at a time
SCALES_BYTES = 8 * BLOCK_ROWS * 145

# Where one way of multiplying takes over from another, by numbers of rows of x. Estimates, not yet tuned on a GPU.
FEWEST_FOR_TENSOR_CORES = 2  # and x of 16 bits
MOST_FUSED = {torch.float32: 32, torch.float16: 256, torch.bfloat16: 256}
WORKSPACE = 2**24  # weights decoded at a time beyond that: 64 MiB in float32


def plan(dtype: torch.dtype, batch: int) -> tuple[int, bool]:
    """Rows of x that a block of the fused product takes, and whether it does so by tensor cores."""
    if dtype != torch.float32 and batch >= FEWEST_FOR_TENSOR_CORES:
        return (8 if batch <= 8 else 16), True
    return next((rows for rows in (1, 2, 4) if batch <= rows), 8), False


def defines(dtype: torch.dtype, rows: int = 0, tensor_cores: bool = False) -> _launch.Defines:
    """The macros to compile with; without ``rows``, for decoding alone."""
    return (("DTYPE", _launch.DTYPES[dtype]), ("BATCH", rows), ("TENSOR_CORES", int(tensor_cores)))


def shared_bytes(rows: int = 0, tensor_cores: bool = False) -> int:
    """Shared memory that a block needs, as ``two_bit.cu`` lays it out."""
    if tensor_cores:
        return rows * TILE_COLUMNS * 2 + SCALES_BYTES + BLOCK_ROWS * rows * 4
    return rows * TILE_COLUMNS // 64 * 68 * 4 + SCALES_BYTES


LARGEST_SHARED = max(shared_bytes(8, tensor_cores=False), shared_bytes(16, tensor_cores=True))


def usable(dtype: torch.dtype, arrays: Sequence[Tensor]) -> bool:
    """Whether the kernels take x, or give a decoded weight, of ``dtype``; False is always right."""
    device = arrays[0].device
    if dtype not in _launch.DTYPES:
        return False
    return _launch.shared_memory_for_kernels(device.type, device.index, "two_bit_linear") >= LARGEST_SHARED


def dequantize(arrays: Sequence[Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
    """W^ ``(O, I)``: exact in float32, rounded once in float16 and bfloat16."""
    packed = _packed(arrays)
    dense = packed[1].new_empty(len(packed[1]), in_features, dtype=dtype)
    _dequantize(packed, 0, dense)
    return dense


def linear(x: Tensor, arrays: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """``x W^^T + bias`` in the dtype of ``x`` ``(N, I)``, summed in float32.

    Raises:
        ValueError: If the bias is on another device.
    """
    packed = _packed(arrays)
    batch, in_features = x.shape
    out_features = len(packed[1])
    if batch > MOST_FUSED[x.dtype]:
        y = x.new_empty(batch, out_features, dtype=torch.float32)
        inputs = x.float()
        with _float32_products(x.device.type):
            for first, block in _decoded_rows(packed, in_features):
                torch.mm(inputs, block.mT, out=y[:, first : first + len(block)])
        return (y if bias is None else y.add_(bias)).to(x.dtype)
    y = x.new_empty(batch, out_features)
    if batch == 0:
        return y
    rows, tensor_cores = plan(x.dtype, batch)
    x = x.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype in _launch.DTYPES else bias.float()).contiguous()
    bias_dtype = 0 if bias is None else _launch.DTYPES[bias.dtype]
    rest: list[_launch.Argument] = [x, bias, y, batch, bias_dtype, int(_in_chunks(x))]
    grid = (-(-out_features // BLOCK_ROWS), -(-batch // rows))
    macros, need = defines(x.dtype, rows, tensor_cores), shared_bytes(rows, tensor_cores)
    arguments = [*packed, *_sizes(packed, in_features), *rest]
    _launch.launch("two_bit", macros, "linear", grid, THREADS, need, arguments)
    return y


def linear_transposed(grad: Tensor, arrays: Sequence[Tensor], in_features: int) -> Tensor:
    """``grad W^`` in the dtype of ``grad`` ``(N, O)``, summed in float32."""
    y = grad.new_zeros(len(grad), in_features, dtype=torch.float32)
    if len(grad):
        inputs = grad.float()
        with _float32_products(grad.device.type):
            for first, block in _decoded_rows(_packed(arrays), in_features):
                y.addmm_(inputs[:, first : first + len(block)], block)
    return y.to(grad.dtype)


def _packed(arrays: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous, and the codes where 128 bits can be read at a time, which a slice need not be."""
    packed = [array.contiguous() for array in arrays]
    if packed[1].data_ptr() % 16:
        packed[1] = packed[1].clone()
    return packed


def _sizes(packed: Sequence[Tensor], in_features: int) -> tuple[int, int, int]:
    codes, codes_hi = packed[1:3]
    return len(codes), in_features, codes_hi.shape[1]


def _in_chunks(matrix: Tensor) -> bool:
    """Whether its rows can be read or written 16 bytes at a time."""
    return matrix.data_ptr() % 16 == 0 and matrix.shape[1] * matrix.element_size() % 16 == 0


def _dequantize(packed: Sequence[Tensor], first_block: int, out: Tensor) -> None:
    """Decode the rows from 16 * ``first_block`` on to ``out``, which ends with a block of rows or the matrix."""
    count, in_features = out.shape
    grid = (-(-count // BLOCK_ROWS), -(-in_features // TILE_COLUMNS))
    rest: list[_launch.Argument] = [out, first_block, int(_in_chunks(out))]
    arguments = [*packed, *_sizes(packed, in_features), *rest]
    _launch.launch("two_bit", defines(out.dtype), "dequantize", grid, THREADS, shared_bytes(), arguments)


def _decoded_rows(packed: Sequence[Tensor], in_features: int) -> Iterator[tuple[int, Tensor]]:
    """The first row and the float32 values of every part of the weight, all in the same memory."""
    rows = len(packed[1])
    blocks = max(1, WORKSPACE // (BLOCK_ROWS * in_features))
    workspace = packed[1].new_empty(min(rows, BLOCK_ROWS * blocks), in_features, dtype=torch.float32)
    for first in range(0, rows, len(workspace)):
        part = workspace[: rows - first]
        _dequantize(packed, first // BLOCK_ROWS, part)
        yield first, part


@contextmanager
def _float32_products(device_type: str) -> Iterator[None]:
    """Neither autocast nor TF32, whatever the user's settings."""
    settings = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(settings, "fp32_precision") else "allow_tf32"  # torch before 2.9
    before = getattr(settings, name)
    setattr(settings, name, "ieee" if name == "fp32_precision" else False)
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        setattr(settings, name, before)
