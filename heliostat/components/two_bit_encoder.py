"""From a matrix to the integers of the TB2 format: which groups get four bits, which weights stay, scales and codes.

The encoder of `heliostat.components.two_bit`, arXiv 2311.16442, all in float64: round-to-nearest in chunks of rows, or
with the error of every column made good in the columns to its right, as GPTQ does (arXiv 2210.17323).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from heliostat.components.two_bit_format import (
    GROUP,
    ROW_BLOCK,
    SCALE_LIMITS,
    Codes,
    empty_codes,
    row_chunks,
    stored_groups,
    two_powers,
)

_CHUNK = 2**19  # weights encoded at a time
_LAZY_COLUMNS = 128  # columns whose errors are spread over the rest of the matrix in one product


def check_weight(weight: Tensor) -> None:
    """Refuse what cannot be encoded."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (O, I) without empty dimensions, got {tuple(weight.shape)}")
    if not weight.is_floating_point() or weight.is_meta:
        kind = "on the meta device" if weight.is_meta else f"of dtype {weight.dtype}"
        raise ValueError(f"weight must hold floating-point numbers, got a tensor {kind}")
    count, first = 0, None
    for chunk in row_chunks(weight.shape[0], weight.shape[1], _CHUNK):
        bad = (~weight[chunk].isfinite()).nonzero()
        if len(bad) and first is None:
            first = (chunk.start + int(bad[0, 0]), int(bad[0, 1]))
        count += len(bad)
    if count:
        raise ValueError(f"weight has {count} entries that are NaN or infinite, the first at {first}")


def encode(
    weight: Tensor,
    four_bit_fraction: float,
    outlier_fraction: float,
    hessian: Tensor | None,
    compensate: bool,
    percdamp: float,
) -> Codes:
    """Quantise a matrix ``(O, I)`` whose entries are finite.

    Args:
        weight: W.
        four_bit_fraction: f, share of the groups with four bits.
        outlier_fraction: p, share of the weights kept in float16.
        hessian: A, ``(I, I)`` float64, mean of x x^T over the layer's inputs; its diagonal d weighs the columns in both
            choices. None: all alike.
        compensate: Make good the errors by ``hessian``; else round to nearest.
        percdamp: Ridge of the compensation, in units of the mean of d.
    """
    rows, columns = weight.shape
    groups = stored_groups(columns)
    largest = float(weight.abs().max())
    if largest > torch.finfo(torch.float32).max:
        raise ValueError(f"weight has an entry of magnitude {largest}, beyond float32's range: scale it down")
    exponent = math.frexp(largest)[1] - 12 if largest else 0
    factors = two_powers(-exponent)

    def stored(chunk: slice) -> Tensor:
        """Rows of 2^-e W, in float64, filled up with zeros to whole groups: (rows, G, 16)."""
        padded = weight.new_zeros(chunk.stop - chunk.start, GROUP * groups, dtype=torch.float64)
        padded[:, :columns] = weight[chunk]
        return padded.mul_(factors[0]).mul_(factors[1]).view(-1, groups, GROUP)

    importance = weight.new_zeros(GROUP * groups, dtype=torch.float64)  # d, 0 where there is no column
    importance[:columns] = 1 if hessian is None else hessian.diagonal()
    importance = importance.view(groups, GROUP)
    chunks = list(row_chunks(rows, GROUP * groups, _CHUNK))
    four_bit = _choose_four_bit_groups(stored, chunks, importance, columns, four_bit_fraction)
    score_weights = importance.masked_fill(four_bit[:, None], 0)
    outliers = _choose_outliers(
        stored, chunks, score_weights, columns, math.floor(outlier_fraction * weight.numel() + 0.5)
    )
    result = empty_codes(rows, four_bit, outliers, exponent)
    if compensate:
        assert hessian is not None
        _encode_compensated(stored(slice(0, rows)), _inverse_root(hessian, percdamp), result, columns)
        for name in ("scale2", "scale4", "outlier_val"):
            if not getattr(result, name).isfinite().all():
                raise ValueError(f"error compensation diverged, {name} overflows: raise percdamp, now {percdamp}")
    else:
        _encode_to_nearest(stored, chunks, result, columns)
    return result


# --- choices ---------------------------------------------------------------------------------------------------------


def _bounds(w: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of each group, with 0 among them so that 0 can always be represented."""
    low, high = w.aminmax(dim=-1)
    return low.clamp_max(0), high.clamp_min(0)


def _choose_four_bit_groups(
    stored: Callable[[slice], Tensor], chunks: list[slice], importance: Tensor, columns: int, fraction: float
) -> Tensor:
    """The H groups with the largest (sum of d) (sum of squared ranges): those whose promotion saves most error."""
    spread = importance.new_zeros(len(importance))
    for chunk in chunks:
        low, high = _bounds(stored(chunk))
        spread += (high - low).square().sum(0)
    real = math.ceil(columns / GROUP)
    score = (importance.sum(1) * spread)[:real]
    chosen = score.sort(descending=True, stable=True).indices[: math.floor(fraction * real + 0.5)]
    four_bit = torch.zeros(len(importance), dtype=torch.bool, device=importance.device)
    four_bit[chosen] = True
    return four_bit


def _choose_outliers(
    stored: Callable[[slice], Tensor], chunks: list[slice], weights: Tensor, columns: int, count: int
) -> Tensor:
    """Positions row * I + column of the ``count`` largest scores d w^2 > 0, increasing; of equal ones the first win."""
    best = weights.new_zeros(0)
    index = torch.zeros(0, dtype=torch.int64, device=weights.device)
    for chunk in chunks if count else ():
        score = (stored(chunk).square() * weights).flatten(1)[:, :columns].flatten()
        # Later positions lose ties, so only a larger score than the last of a full list can enter it.
        candidates = (score > (best[-1] if len(best) == count else 0)).nonzero().squeeze(1)
        best, order = torch.cat([best, score[candidates]]).sort(descending=True, stable=True)
        best = best[:count]
        index = torch.cat([index, candidates + chunk.start * columns])[order[:count]]
    return index.sort().values


# --- scales and codes ------------------------------------------------------------------------------------------------


def _to_half(x: Tensor) -> Tensor:
    """Round to float32, then to float16, both to nearest even."""
    return x.float().half()


def _fit_second_order(scale: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise wanted scales once more: the offset that leaves the least squared error in each row block.

    Args:
        scale: (R, 16, K) wanted scales of K groups.
        limit: (K,) largest code and offset.

    Returns:
        Second-order scales (R, K) float16, offsets (R, K) and scale codes (R, 16, K).
    """
    largest = scale.amax(1)
    least = torch.full_like(largest, torch.inf)
    scale2, zero2 = torch.zeros_like(largest), torch.zeros_like(largest)
    code = torch.zeros_like(scale)
    for offset in range(int(limit.max()) + 1 if limit.numel() else 0):
        step = _to_half(largest / (limit + offset)).double()
        tried = ((scale / step[:, None]).round_() - offset).clamp_min_(0).minimum(limit)
        tried.masked_fill_(scale == 0, 0)
        error = (scale - (tried + offset) * step[:, None]).square_().masked_fill_(scale == 0, 0).sum(1)
        better = (error < least) & (step > 0) & (offset <= limit)
        least = torch.where(better, error, least)
        scale2, zero2 = torch.where(better, step, scale2), torch.where(better, offset, zero2)
        code = torch.where(better[:, None], tried, code)
    return scale2.half(), zero2, code


def _zero_of(low: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """The code of 0 in groups with these lower bounds and decoded scales; 0 where the scale is."""
    live = scale > 0
    return (-low / torch.where(live, scale, 1.0)).round_().minimum(levels).mul_(live)


def _codes_of(w: Tensor, zero: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """Codes of weights on the grid of their group, 0 to ``levels``; 0 where the scale is."""
    live = scale > 0
    codes = (w / torch.where(live, scale, 1.0)).round_().add_(zero).clamp_min_(0)
    return codes.minimum(levels).mul_(live)


def _limits(count: int, device: torch.device) -> Tensor:
    """Largest scale code of 2-bit groups 0..count-1."""
    return torch.tensor(SCALE_LIMITS, dtype=torch.float64, device=device)[torch.arange(count, device=device) % 3]


def _in_blocks(x: Tensor) -> Tensor:
    """Rows (r, K) in blocks of 16, (R, 16, K); the last is filled up with zeros, which no scale depends on."""
    missing = -len(x) % ROW_BLOCK
    x = torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x
    return x.view(len(x) // ROW_BLOCK, ROW_BLOCK, x.shape[1])


def _fit_two_bit_scales(wanted: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decoded scales (r, K) of the wanted ones (r, K), with second-order scales, offsets and scale codes."""
    scale2, zero2, code = _fit_second_order(_in_blocks(wanted), limit)
    decoded = ((code + zero2[:, None]) * scale2.double()[:, None]).flatten(0, 1)[: len(wanted)]
    return decoded, scale2, zero2, code.flatten(0, 1)[: len(wanted)]


def _encode_to_nearest(stored: Callable[[slice], Tensor], chunks: list[slice], result: Codes, columns: int) -> None:
    four_bit = result.four_bit
    limit = _limits(result.scale2.shape[1], four_bit.device)
    levels = torch.where(four_bit, 15.0, 3.0).double()
    bounds = torch.searchsorted(
        result.outlier_index, torch.tensor([c.start * columns for c in chunks], device=four_bit.device)
    ).tolist()
    for chunk, first, last in zip(chunks, bounds, [*bounds[1:], len(result.outlier_index)], strict=True):
        blocks = slice(chunk.start // ROW_BLOCK, math.ceil(chunk.stop / ROW_BLOCK))
        w = stored(chunk)
        index = result.outlier_index[first:last] - chunk.start * columns
        row, column = index // columns, index % columns
        flat = w.flatten(1)
        result.outlier_val[first:last] = _to_half(flat[row, column])
        flat[row, column] = 0  # they leave their group; code = zero follows
        low, high = _bounds(w)
        spread = high - low
        scale = torch.empty_like(spread)
        result.scale4[chunk] = _to_half(spread[:, four_bit] / 15)
        scale[:, four_bit] = result.scale4[chunk].double()
        decoded, result.scale2[blocks], zero2, code = _fit_two_bit_scales(spread[:, ~four_bit] / 3, limit)
        result.zero2[blocks], result.scale_code[chunk] = zero2, code
        scale[:, ~four_bit] = decoded
        zero = _zero_of(low, scale, levels)
        result.zero[chunk] = zero
        result.codes[chunk] = _codes_of(w, zero[..., None], scale[..., None], levels[:, None])


# --- error compensation ----------------------------------------------------------------------------------------------


def _inverse_root(hessian: Tensor, percdamp: float) -> Tensor:
    """U, upper triangular, with (A + ridge)^-1 = U^T U."""
    matrix = hessian.clone()
    diagonal = matrix.diagonal()
    diagonal.masked_fill_(diagonal == 0, 1)  # an input that was always 0: its column is rounded, and left alone
    diagonal += percdamp * diagonal.mean()
    # Factor from the other end, A = V V^T with V upper triangular: then U = V^-1, without inverting A itself.
    factor, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(info):
        raise ValueError(
            f"hessian is not positive definite even with percdamp={percdamp} of its mean diagonal added; it must be a "
            "mean of x x^T. Raise percdamp"
        )
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True)


def _encode_compensated(w: Tensor, root: Tensor, result: Codes, columns: int) -> None:
    """Encode (O, G, 16) group after group; a column's error is taken from the columns to its right, weighed by U.

    The updates are those of the textbook order, but reach columns beyond the group, and beyond 128 columns, in one
    matrix product each.
    """
    flat = w.flatten(1)
    row, column = result.outlier_index // columns, result.outlier_index % columns
    by_column = column.sort(stable=True)
    starts = torch.searchsorted(by_column.values, torch.arange(columns + 1, device=w.device)).tolist()
    limits = _limits(result.scale2.shape[1], w.device)
    two, four = 0, 0
    errors = torch.zeros_like(flat[:, :columns][:, :_LAZY_COLUMNS])
    for g, is_four in enumerate(result.four_bit.tolist()):
        begin, end = g * GROUP, min((g + 1) * GROUP, columns)
        if begin >= columns:
            two += 1  # what fills up the quad decodes to 0
            continue
        picks = [by_column.indices[starts[j] : starts[j + 1]] for j in range(begin, end)]
        group = w[:, g].clone()
        for k, pick in enumerate(picks):
            group[row[pick], k] = 0
        low, high = _bounds(group)
        if is_four:
            result.scale4[:, four] = _to_half((high - low) / 15)
            scale = result.scale4[:, four].double()
            four += 1
        else:
            decoded, scale2, zero2, code = _fit_two_bit_scales((high - low)[:, None] / 3, limits[two : two + 1])
            result.scale2[:, two], result.zero2[:, two] = scale2[:, 0], zero2[:, 0]
            result.scale_code[:, two] = code[:, 0]
            scale = decoded[:, 0]
            two += 1
        levels = scale.new_tensor(15 if is_four else 3)
        zero = _zero_of(low, scale, levels)
        result.zero[:, g] = zero
        result.codes[:, g] = zero[:, None]  # of padded columns
        lazy = begin // _LAZY_COLUMNS * _LAZY_COLUMNS
        for k, pick in enumerate(picks):
            j = begin + k
            current = flat[:, j]
            codes = _codes_of(current, zero, scale, levels)
            decoded_column = (codes - zero) * scale
            if len(pick):
                kept = _to_half(current[row[pick]])
                result.outlier_val[pick] = kept
                codes[row[pick]] = zero[row[pick]]
                decoded_column[row[pick]] = kept.double()
            result.codes[:, g, k] = codes
            error = (current - decoded_column) / root[j, j]
            flat[:, j + 1 : end] -= error[:, None] * root[j, j + 1 : end]
            errors[:, j - lazy] = error
        stop = min(lazy + _LAZY_COLUMNS, columns)
        flat[:, end:stop] -= errors[:, begin - lazy : end - lazy] @ root[begin:end, end:stop]
        if end == stop:
            flat[:, stop:columns] -= errors[:, : stop - lazy] @ root[lazy:stop, stop:]
