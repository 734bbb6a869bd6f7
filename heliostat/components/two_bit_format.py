"""The TB2 format: where the bits of a matrix of 2, 4 and 16-bit weights stand, and how they are read.

The storage of `heliostat.components.two_bit`, version 1, after the figures of arXiv 2311.16442: one 32-bit word a row
and group of 16 columns (the second half of a 4-bit group apart), the zeros and scale codes of three 2-bit groups in 16
bits, outliers in compressed sparse rows. Words are little-endian; unused bits are 0 and ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FORMAT_VERSION = 1

GROUP = 16  # columns that share a scale
ROW_BLOCK = 16  # rows whose scales of one group share a second-order scale
SCALE_LIMITS = (7, 7, 15)  # largest scale code and offset of the three groups that share a 16-bit word

_CHUNK = 2**20  # weights decoded at a time
_WIDE_COLUMNS = 65536  # with more, the column of an outlier takes 32 bits


class PackedArrays(NamedTuple):
    """The arrays of the format, all as signed integers: a cast of the module's floating-point dtype cannot touch them.

    For a matrix (O, I): G groups of 16 columns (filled up to fours), H of them with four bits and G2 = G - H with two,
    in T = ceil(G2 / 3) triples; R = ceil(O / 16) blocks of rows. Bits are counted from the least significant one.

    Attributes:
        four_bit_map: int32 ``(ceil(G / 32),)``, bit g mod 32 of word g div 32: group g has four bits.
        codes: int32 ``(O, G)``. 2-bit group: its 16 codes. 4-bit group: the codes of its columns 0..7.
        codes_hi: int32 ``(O, H)``, codes of columns 8..15 of the 4-bit groups.
        scale_zero: int16 ``(O, T)``, zeros at bits 0, 2, 4 and scale codes at 6, 9, 12 of three 2-bit groups.
        scale2: int16 ``(R, G2)``, bits of the float16 second-order scales.
        zero2: int16 ``(R, T)``, offsets at bits 0, 4, 8 of three 2-bit groups.
        scale4: int16 ``(O, H)``, bits of the float16 scales of the 4-bit groups.
        zero4: int32 ``(O, ceil(H / 8))``, zeros of the 4-bit groups.
        outlier_row_ptr: int32 ``(O + 1,)``, where each row's outliers begin.
        outlier_col: int16, bits of uint16 (int32 if I > 65536) ``(nnz,)``, increasing in every row.
        outlier_val: int16 ``(nnz,)``, bits of the float16 values.
        exponent: int32 scalar, e.
    """

    four_bit_map: Tensor
    codes: Tensor
    codes_hi: Tensor
    scale_zero: Tensor
    scale2: Tensor
    zero2: Tensor
    scale4: Tensor
    zero4: Tensor
    outlier_row_ptr: Tensor
    outlier_col: Tensor
    outlier_val: Tensor
    exponent: Tensor


STATE_NAMES = ("format_version", "weight_shape", *PackedArrays._fields)

# What a file may call the same bits.
_SAME_BITS: dict[str, torch.dtype] = {
    **dict.fromkeys(("four_bit_map", "codes", "codes_hi", "zero4"), torch.uint32),
    **dict.fromkeys(("scale_zero", "zero2", "outlier_col"), torch.uint16),
    **dict.fromkeys(("scale2", "scale4", "outlier_val"), torch.float16),
}


class Codes(NamedTuple):
    """A quantised matrix before its integers are packed; stored value 2^-e W^ = (code - zero) scale.

    Attributes:
        codes: ``(O, G, 16)`` uint8.
        zero: ``(O, G)`` uint8.
        four_bit: ``(G,)`` bool, which groups have four bits: H of them, and G2 = G - H have two.
        scale_code: ``(O, G2)`` uint8, first-order scale code of the 2-bit groups.
        scale2: ``(R, G2)`` float16, their second-order scales, one a block of 16 rows.
        zero2: ``(R, G2)`` uint8, their second-order offsets: scale = (scale_code + zero2) scale2.
        scale4: ``(O, H)`` float16, scales of the 4-bit groups.
        outlier_index: ``(nnz,)`` int64, row * I + column, increasing.
        outlier_val: ``(nnz,)`` float16, their stored values.
        exponent: e.
    """

    codes: Tensor
    zero: Tensor
    four_bit: Tensor
    scale_code: Tensor
    scale2: Tensor
    zero2: Tensor
    scale4: Tensor
    outlier_index: Tensor
    outlier_val: Tensor
    exponent: int


def stored_groups(in_features: int) -> int:
    """G: groups of 16 columns, filled up to fours so that every row of words is a multiple of 128 bits."""
    return 4 * math.ceil(in_features / (4 * GROUP))


def two_powers(exponent: int) -> tuple[float, float]:
    """2^e as a product of two factors, normal float32 numbers even where 2^e is not; mostly 2^e and 1."""
    first = exponent if abs(exponent) <= 64 else exponent // 2
    return 2.0**first, 2.0 ** (exponent - first)


def row_chunks(rows: int, columns: int, elements: int) -> Iterator[slice]:
    """Slices of whole row blocks with about this many elements."""
    step = ROW_BLOCK * max(1, elements // (ROW_BLOCK * columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def empty_codes(rows: int, four_bit: Tensor, outliers: Tensor, exponent: int) -> Codes:
    """All-zero codes of a matrix with these 4-bit groups and outlier positions, to be filled in."""
    groups, device = len(four_bit), four_bit.device
    four = int(four_bit.sum())
    blocks = math.ceil(rows / ROW_BLOCK)

    def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    return Codes(
        codes=empty(rows, groups, GROUP),
        zero=empty(rows, groups),
        four_bit=four_bit,
        scale_code=empty(rows, groups - four),
        scale2=empty(blocks, groups - four, dtype=torch.float16),
        zero2=empty(blocks, groups - four),
        scale4=empty(rows, four, dtype=torch.float16),
        outlier_index=outliers,
        outlier_val=empty(len(outliers), dtype=torch.float16),
        exponent=exponent,
    )


def _pack_bits(values: Tensor, shifts: Sequence[int]) -> Tensor:
    """Place small integers (..., n) at these bits of one int32 word (...)."""
    return (values.int() << torch.tensor(shifts, dtype=torch.int32, device=values.device)).sum(-1, dtype=torch.int32)


def _pack_rows(values: Tensor, bits: int) -> Tensor:
    """Pack (..., n) densely into int32 words (..., ceil(n bits / 32))."""
    per_word = 32 // bits
    values = F.pad(values.to(torch.uint8), (0, -values.shape[-1] % per_word))
    return _pack_bits(values.unflatten(-1, (-1, per_word)), range(0, 32, bits))


def _unpack_rows(words: Tensor, bits: int) -> Tensor:
    """Undo `_pack_rows`: (..., n) words to (..., n, 32 / bits) values. Masked after the shift, which keeps the sign."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts).bitwise_and_(2**bits - 1)


# --- the weight ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TwoBitWeight:
    """A matrix in the TB2 format.

    Args:
        arrays: See `PackedArrays`.
        in_features: I, number of columns.
        version: Of the format.

    Raises:
        ValueError: If the arrays are not those of one matrix with I columns in a version that this library knows.
    """

    arrays: PackedArrays
    in_features: int
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check_version(self.version)
        _check_arrays(self.arrays, self.in_features)

    @property
    def out_features(self) -> int:
        """O, number of rows."""
        return self.arrays.codes.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(O, I)``."""
        return self.out_features, self.in_features

    def total_bits(self) -> int:
        """Bits of all arrays, everything counted."""
        return sum(8 * array.element_size() * array.numel() for array in self.arrays)

    def average_bits(self) -> float:
        """Bits a weight, exact for this matrix: small ones pay for their padding."""
        return self.total_bits() / (self.out_features * self.in_features)

    def unpack(self) -> tuple[Tensor, Tensor, Tensor]:
        """The integers of the whole matrix, for inspection.

        Returns:
            Codes ``(O, 16 G)`` uint8, zeros ``(O, G)`` uint8 and scales ``(O, G)`` float64, without 2^e.
        """
        two, four = _group_indices(self.arrays)
        rows = slice(0, self.out_features)
        zero, scale = _zeros_and_scales(self.arrays, rows, two, four, torch.float64)
        codes = _codes(self.arrays, rows, four, self.arrays.codes.new_empty(*self.arrays.codes.shape, GROUP))
        return codes.flatten(1).to(torch.uint8), zero.to(torch.uint8), scale

    def to(self, device: torch.device | str) -> TwoBitWeight:
        """The same weight on another device."""
        return TwoBitWeight(PackedArrays(*(array.to(device) for array in self.arrays)), self.in_features)

    def slice_rows(self, start: int, stop: int) -> TwoBitWeight:
        """Rows ``start`` to ``stop``, exactly: a shard of a tensor-parallel layer.

        Args:
            start: A multiple of 16, since blocks of 16 rows share scales.
            stop: A multiple of 16, or O.
        """
        if (
            not 0 <= start < stop <= self.out_features
            or start % ROW_BLOCK
            or (stop % ROW_BLOCK and stop != self.out_features)
        ):
            raise ValueError(
                f"rows {start} to {stop} are no shard of {self.out_features}: both ends must be multiples of "
                f"{ROW_BLOCK} (or the last row), since {ROW_BLOCK} rows share scales"
            )
        a, rows, blocks = self.arrays, slice(start, stop), slice(start // ROW_BLOCK, math.ceil(stop / ROW_BLOCK))
        first, last = a.outlier_row_ptr[[start, stop]].tolist()
        shard = {name: getattr(a, name)[rows] for name in ("codes", "codes_hi", "scale_zero", "scale4", "zero4")}
        shard |= {name: getattr(a, name)[blocks] for name in ("scale2", "zero2")}
        shard |= {name: getattr(a, name)[first:last] for name in ("outlier_col", "outlier_val")}
        shard["outlier_row_ptr"] = a.outlier_row_ptr[start : stop + 1] - first
        return TwoBitWeight(a._replace(**{name: part.clone() for name, part in shard.items()}), self.in_features)

    def state_dict(self) -> dict[str, Tensor]:
        """The arrays with version and shape, all tensors: what safetensors can hold."""
        device = self.arrays.codes.device
        head = {"format_version": self.version, "weight_shape": self.shape}
        return {name: torch.tensor(value, device=device) for name, value in head.items()} | self.arrays._asdict()

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> TwoBitWeight:
        """Read what `state_dict` gave; unsigned integers and float16 stand for the same bits.

        Raises:
            ValueError: On missing arrays, another version, or arrays that do not belong together.
        """
        for name in STATE_NAMES:
            if name not in state:
                raise ValueError(f"a TB2 weight needs {', '.join(STATE_NAMES)}; {name} is missing")
            if name == "format_version":  # first, since another version may have other arrays
                _check_version(*state[name].flatten().tolist()[:1])
        shape = state["weight_shape"].flatten().tolist()
        if len(shape) != 2 or shape[:1] != list(state["codes"].shape[:1]):
            raise ValueError(f"weight_shape is {shape}, but codes have shape {tuple(state['codes'].shape)}")
        return cls(PackedArrays(*(_as_stored(name, state[name]) for name in PackedArrays._fields)), shape[1])

    @classmethod
    def from_codes(cls, codes: Codes, in_features: int) -> TwoBitWeight:
        """Pack integers."""
        rows, columns = len(codes.codes), codes.outlier_index % in_features
        four = codes.four_bit.nonzero().squeeze(1)
        words = codes.codes.new_zeros(rows, len(codes.four_bit), dtype=torch.int32)
        words_hi = words.new_zeros(rows, len(four))
        for chunk in row_chunks(rows, GROUP * words.shape[1], _CHUNK):
            words[chunk] = _pack_rows(codes.codes[chunk], 2).squeeze(-1)
            halves = _pack_rows(codes.codes[chunk][:, four], 4)  # (rows, H, 2)
            words[chunk, four], words_hi[chunk] = halves[..., 0], halves[..., 1]
        zeros, scale_codes = _triples(codes.zero[:, ~codes.four_bit]), _triples(codes.scale_code)
        row_ends = torch.searchsorted(
            codes.outlier_index, torch.arange(rows + 1, device=words.device) * in_features, out_int32=True
        )
        arrays = PackedArrays(
            four_bit_map=_pack_rows(codes.four_bit, 1),
            codes=words,
            codes_hi=words_hi,
            scale_zero=_pack_bits(torch.cat([zeros, scale_codes], -1), (0, 2, 4, 6, 9, 12)).short(),
            scale2=codes.scale2.view(torch.int16),
            zero2=_pack_bits(_triples(codes.zero2), (0, 4, 8)).short(),
            scale4=codes.scale4.view(torch.int16),
            zero4=_pack_rows(codes.zero[:, four], 4),
            outlier_row_ptr=row_ends,
            outlier_col=columns.to(_column_dtype(in_features)),
            outlier_val=codes.outlier_val.view(torch.int16),
            exponent=torch.tensor(codes.exponent, dtype=torch.int32, device=words.device),
        )
        return cls(arrays, in_features)


def _triples(values: Tensor) -> Tensor:
    """(n, G2) as (n, T, 3), with zeros for members past the end."""
    return F.pad(values, (0, -values.shape[1] % 3)).unflatten(1, (-1, 3))


def _column_dtype(in_features: int) -> torch.dtype:
    return torch.int32 if in_features > _WIDE_COLUMNS else torch.int16


def _as_stored(name: str, array: Tensor) -> Tensor:
    if array.dtype == _SAME_BITS.get(name):
        return array.view(torch.int32 if array.dtype == torch.uint32 else torch.int16)
    return array


def _check_version(version: int = 0) -> None:
    if version != FORMAT_VERSION:
        newer = "; a newer heliostat wrote it: update" if version > FORMAT_VERSION else ""
        raise ValueError(f"format version {version} is not the {FORMAT_VERSION} that this library reads{newer}")


def _check_arrays(arrays: PackedArrays, in_features: int) -> None:
    """Refuse arrays that are not one matrix."""
    if arrays.codes.ndim != 2 or arrays.codes_hi.ndim != 2 or not len(arrays.codes) or in_features < 1:
        shapes = f"{tuple(arrays.codes.shape)} and {tuple(arrays.codes_hi.shape)}, I = {in_features}"
        raise ValueError(f"codes (O, G) and codes_hi (O, H) must be matrices of at least one row, got {shapes}")
    rows, groups = len(arrays.codes), stored_groups(in_features)
    four = arrays.codes_hi.shape[1]
    two, blocks, outliers = groups - four, math.ceil(rows / ROW_BLOCK), len(arrays.outlier_val.flatten())
    shapes_of = {
        "four_bit_map": (math.ceil(groups / 32),),
        "codes": (rows, groups),
        "codes_hi": (rows, four),
        "scale_zero": (rows, math.ceil(two / 3)),
        "scale2": (blocks, two),
        "zero2": (blocks, math.ceil(two / 3)),
        "scale4": (rows, four),
        "zero4": (rows, math.ceil(four / 8)),
        "outlier_row_ptr": (rows + 1,),
        "outlier_col": (outliers,),
        "outlier_val": (outliers,),
        "exponent": (),
    }
    for name, array in arrays._asdict().items():
        wide = name in ("four_bit_map", "codes", "codes_hi", "zero4", "outlier_row_ptr", "exponent")
        dtype = _column_dtype(in_features) if name == "outlier_col" else torch.int32 if wide else torch.int16
        if array.dtype != dtype or tuple(array.shape) != shapes_of[name]:
            raise ValueError(
                f"{name} must be {dtype} of shape {shapes_of[name]} for {rows} x {in_features} weights with {four} "
                f"4-bit groups, got {array.dtype} of shape {tuple(array.shape)}"
            )
        if array.device != arrays.codes.device:
            raise ValueError(f"{name} is on {array.device}, codes are on {arrays.codes.device}: move all to one device")
    if arrays.codes.is_meta:
        return
    marked = int(_four_bit_groups(arrays).sum())
    if marked != four:
        raise ValueError(f"four_bit_map marks {marked} groups, but codes_hi holds {four}")
    for name in ("scale2", "scale4", "outlier_val"):
        if not getattr(arrays, name).view(torch.float16).isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
    pointers, columns = arrays.outlier_row_ptr.long(), _outlier_columns(arrays)
    counts = pointers.diff()
    if pointers[0] != 0 or pointers[-1] != outliers or (counts < 0).any():
        raise ValueError(f"outlier_row_ptr must rise from 0 to the {outliers} outliers")
    position = torch.repeat_interleave(torch.arange(rows, device=columns.device), counts) * in_features + columns
    if ((columns < 0) | (columns >= in_features)).any() or (position.diff() <= 0).any():
        raise ValueError(f"outlier_col must increase in every row, from 0 to at most {in_features - 1}")


# --- decoding, a block of rows at a time -----------------------------------------------------------------------------


def _four_bit_groups(arrays: PackedArrays) -> Tensor:
    return _unpack_rows(arrays.four_bit_map, 1).flatten()[: arrays.codes.shape[1]]


def _group_indices(arrays: PackedArrays) -> tuple[Tensor, Tensor]:
    """Which groups have two bits, and which four, in increasing order; their numbers are known from the shapes."""
    order = _four_bit_groups(arrays).argsort(stable=True)
    two = arrays.codes.shape[1] - arrays.codes_hi.shape[1]
    return order[:two], order[two:]


def _outlier_columns(arrays: PackedArrays, part: slice = slice(None)) -> Tensor:
    columns = arrays.outlier_col[part].long()
    return columns & 0xFFFF if arrays.outlier_col.dtype == torch.int16 else columns


def _codes(arrays: PackedArrays, rows: slice, four: Tensor, out: Tensor) -> Tensor:
    """Write the codes of some rows to ``out``, (r, G, 16) int32."""
    words = arrays.codes[rows]
    shifts = torch.arange(0, 32, 2, dtype=torch.int32, device=words.device)
    torch.bitwise_right_shift(words[..., None], shifts, out=out).bitwise_and_(3)
    if len(four):
        halves = torch.stack([words[:, four], arrays.codes_hi[rows]], -1)
        out.index_copy_(1, four, _unpack_rows(halves, 4).flatten(2))
    return out


def _zeros_and_scales(
    arrays: PackedArrays, rows: slice, two: Tensor, four: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Zeros and scales (r, G) of some rows in ``dtype``, without 2^e; ``rows`` begins with a block of 16."""
    blocks = slice(rows.start // ROW_BLOCK, math.ceil(rows.stop / ROW_BLOCK))
    words, offsets = arrays.scale_zero[rows].int(), arrays.zero2[blocks].int()
    block = torch.arange(len(words), device=words.device) // ROW_BLOCK
    second = arrays.scale2[blocks].view(torch.float16).to(dtype).index_select(0, block)
    count = len(two)
    zero = torch.empty(len(words), count + len(four), dtype=dtype, device=words.device)
    scale = torch.empty_like(zero)
    for member, limit in enumerate(SCALE_LIMITS):
        here = slice(member, count, 3)
        part = slice(0, len(range(count)[here]))  # the last triple may be short
        zero[:, here] = (words[:, part] >> 2 * member) & 3
        code = (words[:, part] >> 6 + 3 * member) & limit
        offset = (offsets[:, part] >> 4 * member) & limit
        scale[:, here] = code.add_(offset.index_select(0, block)) * second[:, here]  # exact: 5 bits times 11
    if len(four):
        zero[:, count:] = _unpack_rows(arrays.zero4[rows], 4).flatten(1)[:, : len(four)]
        scale[:, count:] = arrays.scale4[rows].view(torch.float16)
        place = torch.cat([two, four]).argsort()
        zero, scale = zero.index_select(1, place), scale.index_select(1, place)
    return zero, scale


def decoded_rows(arrays: PackedArrays, in_features: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Decode W^ in blocks of rows, (r, I) float32 or float64, each value exact or rounded once.

    Every block stands in the same memory: use it before the next.
    """
    two, four = _group_indices(arrays)
    rows, groups = arrays.codes.shape
    first_power, second_power = two_powers(int(arrays.exponent))
    chunks = list(row_chunks(rows, GROUP * groups, _CHUNK))
    bounds = arrays.outlier_row_ptr[[chunk.start for chunk in chunks]].tolist()
    codes = arrays.codes.new_empty(chunks[0].stop, groups, GROUP)
    values = torch.empty_like(codes, dtype=dtype)
    for chunk, first, last in zip(chunks, bounds, [*bounds[1:], len(arrays.outlier_val)], strict=True):
        count = chunk.stop - chunk.start
        zero, scale = _zeros_and_scales(arrays, chunk, two, four, dtype)
        scale *= first_power  # exact; it is the second factor that may make a result subnormal
        block = values[:count].copy_(_codes(arrays, chunk, four, codes[:count]))
        dense = block.sub_(zero[..., None]).mul_(scale[..., None]).flatten(1)[:, :in_features]
        if last > first:
            part = slice(first, last)
            row = torch.arange(count, device=two.device).repeat_interleave(
                arrays.outlier_row_ptr[chunk.start : chunk.stop + 1].diff()
            )
            dense[row, _outlier_columns(arrays, part)] += (
                arrays.outlier_val[part].view(torch.float16).to(dtype) * first_power
            )
        yield chunk, dense if second_power == 1 else dense.mul_(second_power)
