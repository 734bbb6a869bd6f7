"""Weights in under three bits, and the linear layer on them: the TB2 format (after arXiv 2311.16442).

"Fast and Efficient 2-bit LLM Inference on GPU: 2/4/16-bit in a Weight Matrix with Asynchronous Dequantization". Inside
one matrix most groups of 16 input columns get two bits, the most sensitive ones four, and the largest weights left in
2-bit groups stay in float16; the scales of the 2-bit groups are themselves quantised. For frozen networks: teachers,
reference policies, language models that embed text. Gradients reach the input and the bias, never the packed weight.

    W^ = 2^e (c - z) s + 2^e outlier                       2-bit group: s = (q + z2) s2;  4-bit group: s stored

with codes c and zeros z of 2 or 4 bits, scale codes q and offsets z2 of 3 or 4 bits, s2 one float16 a block of 16 rows
and group. The paper's text leaves details open; the exact layout of the bits is ours.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heliostat.components.distributed import default_group
from heliostat.components.two_bit_encoder import check_weight, encode
from heliostat.components.two_bit_format import (
    STATE_NAMES,
    PackedArrays,
    TwoBitWeight,
    decoded_rows,
    empty_codes,
    stored_groups,
)
from heliostat.cuda import two_bit as kernels

ErrorCompensation = Literal["auto", "rtn", "gptq"]

# --- operators -------------------------------------------------------------------------------------------------------
# Three operators, so that compiled graphs see one node each. On a CUDA device the kernels of `heliostat.cuda.two_bit`
# take over where they fit; what stands here beside them is torch, for every device. The two products are each other's
# backward, so they can be differentiated any number of times.


@torch.library.custom_op(
    "heliostat::two_bit_dequantize",
    mutates_args=(),
    schema="(Tensor[] arrays, int in_features, ScalarType dtype) -> Tensor",
)
def _dequantize_op(arrays: list[Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
    if kernels.usable(dtype, arrays):
        return kernels.dequantize(arrays, in_features, dtype)
    packed = PackedArrays(*arrays)
    dense = packed.codes.new_empty(len(packed.codes), in_features, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for rows, block in decoded_rows(packed, in_features, wide):
        dense[rows] = block
    return dense


@_dequantize_op.register_fake
def _(arrays: list[Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
    codes = PackedArrays(*arrays).codes
    return codes.new_empty(codes.shape[0], in_features, dtype=dtype)


@torch.library.custom_op(
    "heliostat::two_bit_linear", mutates_args=(), schema="(Tensor x, Tensor[] arrays, Tensor? bias) -> Tensor"
)
def _linear_op(x: Tensor, arrays: list[Tensor], bias: Tensor | None) -> Tensor:
    if kernels.usable(x.dtype, arrays):
        return kernels.linear(x, arrays, bias)
    packed = PackedArrays(*arrays)
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        inputs = x.to(wide)
        y = inputs.new_empty(x.shape[0], len(packed.codes))
        for rows, block in decoded_rows(packed, x.shape[1], wide):
            y[:, rows] = inputs @ block.mT
        if bias is not None:
            y += bias.to(wide)
        return y.to(x.dtype)


@_linear_op.register_fake
def _(x: Tensor, arrays: list[Tensor], bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], PackedArrays(*arrays).codes.shape[0])


@torch.library.custom_op(
    "heliostat::two_bit_linear_transposed",
    mutates_args=(),
    schema="(Tensor grad, Tensor[] arrays, int in_features) -> Tensor",
)
def _transposed_op(grad: Tensor, arrays: list[Tensor], in_features: int) -> Tensor:
    if kernels.usable(grad.dtype, arrays):
        return kernels.linear_transposed(grad, arrays, in_features)
    wide = torch.promote_types(grad.dtype, torch.float32)
    with torch.autocast(grad.device.type, enabled=False):
        inputs = grad.to(wide)
        y = inputs.new_zeros(grad.shape[0], in_features)
        for rows, block in decoded_rows(PackedArrays(*arrays), in_features, wide):
            y.addmm_(inputs[:, rows], block)
        return y.to(grad.dtype)


@_transposed_op.register_fake
def _(grad: Tensor, arrays: list[Tensor], in_features: int) -> Tensor:
    return grad.new_empty(grad.shape[0], in_features)


_NO_GRADIENT = [None] * len(PackedArrays._fields)


def _linear_setup(ctx: Any, inputs: tuple[Tensor, list[Tensor], Tensor | None], output: Tensor) -> None:
    x, arrays, bias = inputs
    ctx.save_for_backward(*arrays)
    ctx.in_features, ctx.bias_dtype = x.shape[1], None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, list[None], Tensor | None]:
    grad_bias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(ctx.bias_dtype)
    grad_x = _transposed_op(grad, list(ctx.saved_tensors), ctx.in_features) if ctx.needs_input_grad[0] else None
    return grad_x, _NO_GRADIENT, grad_bias


def _transposed_setup(ctx: Any, inputs: tuple[Tensor, list[Tensor], int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1])


def _transposed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None], None]:
    return _linear_op(grad, list(ctx.saved_tensors), None), _NO_GRADIENT, None


_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)
_transposed_op.register_autograd(_transposed_backward, setup_context=_transposed_setup)


def _apply_linear(x: Tensor, arrays: Sequence[Tensor], in_features: int, bias: Tensor | None) -> Tensor:
    if x.ndim == 0 or x.shape[-1] != in_features or not x.is_floating_point():
        raise ValueError(
            f"x must hold floating-point numbers of shape (..., {in_features}), got {x.dtype} {tuple(x.shape)}"
        )
    if x.device != arrays[0].device:
        raise ValueError(f"x is on {x.device}, the weight on {arrays[0].device}: move one of them")
    return _linear_op(x.reshape(-1, in_features), list(arrays), bias).view(*x.shape[:-1], arrays[1].shape[0])


# --- functions -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantize_two_bit(
    weight: Tensor,
    *,
    four_bit_fraction: float = 0.125,
    outlier_fraction: float = 0.0025,
    hessian: Tensor | None = None,
    error_compensation: ErrorCompensation = "auto",
    percdamp: float = 0.01,
) -> TwoBitWeight:
    """Quantise a matrix to the TB2 format: 2.855 bits a weight for 4096 x 11008 with the defaults.

    Deterministic, in float64, on the weight's device.

    Args:
        weight: W, shape ``(O, I)``, finite.
        four_bit_fraction: f in 0..1, the share of the groups of 16 columns that get four bits: those whose promotion
            saves most of the expected error at the layer's output. The default meets the paper's bits.
        outlier_fraction: p in 0..0.05, the share of the weights that stay in float16 (32 bits each with their column).
        hessian: A = mean of x x^T over the layer's inputs, ``(I, I)``, of `HessianAccumulator`. Its diagonal weighs the
            columns in both choices.
        error_compensation: ``"gptq"`` corrects the columns to the right of a rounded one by A, at the cost of I^3;
            ``"rtn"`` rounds to nearest. ``"auto"``: ``"gptq"`` if there is a Hessian.
        percdamp: Ridge of the compensation in units of A's mean diagonal, > 0.

    Returns:
        The packed weight, on the same device.

    Raises:
        ValueError: If the weight is no matrix, empty, not finite or beyond float32's range, if the Hessian does not
            fit it, or on an argument out of range.
    """
    check_weight(weight)
    if not 0 <= four_bit_fraction <= 1:
        raise ValueError(f"four_bit_fraction must lie in 0..1, got {four_bit_fraction}")
    if not 0 <= outlier_fraction <= 0.05:
        raise ValueError(f"outlier_fraction must lie in 0..0.05, got {outlier_fraction}")
    if not 0 < percdamp < math.inf:
        raise ValueError(f"percdamp must be > 0, got {percdamp}")
    if error_compensation not in get_args(ErrorCompensation):
        raise ValueError(f"error_compensation must be one of {get_args(ErrorCompensation)}, got {error_compensation!r}")
    if error_compensation == "gptq" and hessian is None:
        raise ValueError("error_compensation='gptq' needs a hessian: give one (see HessianAccumulator), or use 'rtn'")
    columns = weight.shape[1]
    if hessian is not None:
        if hessian.shape != (columns, columns):
            raise ValueError(f"hessian must have shape ({columns}, {columns}), got {tuple(hessian.shape)}")
        hessian = hessian.to(weight.device, torch.float64)
        count = int((~hessian.isfinite()).sum())
        if count or (hessian.diagonal() < 0).any():
            what = f"{count} entries that are NaN or infinite" if count else "negative entries on its diagonal"
            raise ValueError(f"hessian has {what}; it must be a mean of x x^T over finite inputs")
    compensate = hessian is not None and error_compensation != "rtn"
    codes = encode(weight.detach(), four_bit_fraction, outlier_fraction, hessian, compensate, percdamp)
    return TwoBitWeight.from_codes(codes, columns)


def dequantize_two_bit(w: TwoBitWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode the whole matrix W^.

    Args:
        w: Packed weight.
        dtype: Of the result. float32 and float64 are exact; float16 and bfloat16 are rounded once.

    Returns:
        Shape ``(O, I)``.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, got {dtype}")
    return _dequantize_op(list(w.arrays), w.in_features, dtype)


def two_bit_linear(x: Tensor, w: TwoBitWeight, bias: Tensor | None = None) -> Tensor:
    """Linear map ``x W^^T + bias`` by a packed weight, decoded block by block.

    On a CUDA device with CuPy the kernels of `heliostat.cuda.two_bit` do it, else torch's operations. Accumulates in
    float32 at least; autocast does not reach it. Differentiable in x and bias any number of times, by reverse mode
    only: `torch.func.jvp` does not know the operator.

    Args:
        x: Shape ``(..., I)``, float16, bfloat16, float32 or float64.
        w: Packed weight (O, I), on the device of x.
        bias: Shape ``(O,)``, added in float32 before the last rounding.

    Returns:
        Shape ``(..., O)`` in the dtype of x.

    Raises:
        ValueError: If shapes or devices do not fit.
    """
    if bias is not None and bias.shape != (w.out_features,):
        raise ValueError(f"bias must have shape ({w.out_features},), got {tuple(bias.shape)}")
    return _apply_linear(x, w.arrays, w.in_features, bias)


# --- the layer -------------------------------------------------------------------------------------------------------


class TwoBitLinear(nn.Module):
    """`torch.nn.Linear` on a weight in the TB2 format, which is frozen; the bias is a parameter as usual.

    Casts (``.half()``, ``.bfloat16()``, precision plugins) reach the bias alone: the weight is made of integer buffers.
    A new layer is all zero, and takes whatever state a quantised layer of its shape has, with any number of 4-bit
    groups and outliers; use `from_linear` to quantise.

    Args:
        in_features: I.
        out_features: O.
        bias: Whether there is a bias.
        device: Of the buffers and the bias.
        dtype: Of the bias.
    """

    format_version: Tensor
    weight_shape: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features and out_features must be >= 1, got {in_features} and {out_features}")
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        four_bit = torch.zeros(stored_groups(in_features), dtype=torch.bool, device="cpu")
        zero = empty_codes(out_features, four_bit, torch.zeros(0, dtype=torch.int64, device="cpu"), exponent=0)
        self._hold(TwoBitWeight.from_codes(zero, in_features).to(device or torch.get_default_device()))

    @classmethod
    def from_weight(cls, weight: TwoBitWeight, bias: Tensor | None = None) -> TwoBitLinear:
        """Build the layer of a packed weight; ``bias`` ``(O,)`` is taken as it is, a parameter with its gradient."""
        if bias is not None and bias.shape != (weight.out_features,):
            raise ValueError(f"bias must have shape ({weight.out_features},), got {tuple(bias.shape)}")
        layer = cls(1, 1, bias=False)
        layer.in_features, layer.out_features = weight.in_features, weight.out_features
        layer._hold(weight)
        layer.bias = bias if isinstance(bias, nn.Parameter) or bias is None else nn.Parameter(bias)
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Module, **options: Any) -> TwoBitLinear:
        """Quantise a `torch.nn.Linear`, or a ``Conv1D`` of transformers; ``options`` go to `quantize_two_bit`."""
        weight = _matrix_of(linear)
        if weight is None:
            raise ValueError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        bias = linear.bias
        assert bias is None or isinstance(bias, Tensor)
        layer = cls.from_weight(quantize_two_bit(weight, **options), bias)
        return layer.train(linear.training)

    def _hold(self, weight: TwoBitWeight) -> None:
        for name, tensor in weight.state_dict().items():
            self.register_buffer(name, tensor)

    @property
    def arrays(self) -> PackedArrays:
        """The buffers of the weight."""
        return PackedArrays(*(self._buffers[name] for name in PackedArrays._fields))  # type: ignore[arg-type]

    @property
    def packed_weight(self) -> TwoBitWeight:
        """The weight, sharing the layer's buffers."""
        return TwoBitWeight(self.arrays, self.in_features)

    @property
    def weight(self) -> Tensor:
        """W^ ``(O, I)``, float32, decoded anew at every access: for code that reads a layer's weight or its dtype."""
        return _dequantize_op(list(self.arrays), self.in_features, torch.float32)

    def average_bits(self) -> float:
        """Bits a weight, exact."""
        return self.packed_weight.average_bits()

    def extra_repr(self) -> str:
        """Show shape and bits in ``print(module)``."""
        bits = self.average_bits()
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {bits=:.3f}"

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., I)`` to ``(..., O)`` in the dtype of the input."""
        return _apply_linear(input, self.arrays, self.in_features, self.bias)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check version and shapes, then take arrays of whatever length the state has."""
        state = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        arrays = {name: state[prefix + name] for name in STATE_NAMES if prefix + name in state}
        try:
            if not arrays and prefix + "weight" in state:
                raise ValueError("the state holds a dense weight: load it into the dense model, then quantise")
            if arrays:
                weight = TwoBitWeight.from_state_dict(arrays)
                if weight.shape != (self.out_features, self.in_features):
                    shapes = f"{weight.shape}, but the layer's is {(self.out_features, self.in_features)}"
                    raise ValueError(f"the weight's shape (O, I) is {shapes}")
                for name, tensor in weight.state_dict().items():
                    state[prefix + name] = tensor
                    self.register_buffer(name, torch.empty_like(tensor, device=self.arrays.codes.device))
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {error}")
            return
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def _matrix_of(module: nn.Module) -> Tensor | None:
    """The weight (O, I) of a plain linear layer; None for anything else.

    Subclasses are something else: they may compute differently, or hold their weight for another module's use, as the
    output projection of `torch.nn.MultiheadAttention` does.
    """
    weight = getattr(module, "weight", None)
    if type(module) is nn.Linear:
        return weight
    if type(module).__module__ == "transformers.pytorch_utils" and type(module).__name__ == "Conv1D":
        return None if weight is None else weight.T  # GPT-2's linear layer
    return None


# --- calibration -----------------------------------------------------------------------------------------------------


class HessianAccumulator:
    """Mean of x x^T over everything that a linear layer is given, in float64.

    A forward hook or pre-hook: ``layer.register_forward_hook(accumulator)``. Remove it before `finalize`.

    Args:
        in_features: I.
        device: Where the I x I matrix stands.

    Attributes:
        total: Sum of x x^T, ``(I, I)``.
        rows: Number of x in it.
        valid: Which positions count, bool or 0/1, e.g. the attention mask of the next batch: applies to inputs of shape
            ``(*valid.shape, I)``. None: all.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.rows = 0
        self.valid: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object = None) -> None:
        """Take a layer's input; what a forward hook is called with."""
        self.update(args[0])

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add inputs ``(..., I)``."""
        if x.ndim == 0 or x.shape[-1] != len(self.total):
            raise ValueError(f"x must have shape (..., {len(self.total)}), got {tuple(x.shape)}")
        if self.valid is not None and self.valid.shape == x.shape[:-1]:
            x = x[self.valid.to(x.device).bool()]
        x = x.reshape(-1, x.shape[-1])
        self.rows += len(x)
        with torch.autocast(x.device.type, enabled=False):
            for part in x.split(4096):
                part = part.to(self.total)
                self.total.addmm_(part.mT, part)

    def count_rows(self) -> int:
        """Rows of all processes whenever `torch.distributed` runs; all of them must call it."""
        if default_group() is None:
            return self.rows
        count = torch.tensor(self.rows, device=self.total.device)
        dist.all_reduce(count)
        return int(count)

    def finalize(self) -> Tensor:
        """A ``(I, I)`` over the rows of all processes whenever `torch.distributed` runs; all of them must call it.

        Raises:
            ValueError: Without any row, or if an input was not finite.
        """
        rows, total = self.count_rows(), self.total
        if default_group() is not None:
            total = total.clone()
            dist.all_reduce(total)
        if rows == 0:
            raise ValueError("no input was seen: run calibration data through the layer first")
        if not total.isfinite().all():
            raise ValueError("the inputs held NaN or infinity: calibrate on data for which the network is finite")
        return total / rows


# --- models ----------------------------------------------------------------------------------------------------------


class QuantizedLayer(NamedTuple):
    """One layer of a `TwoBitReport`."""

    name: str
    out_features: int
    in_features: int
    total_bits: int
    """Bits of the packed weight, everything counted."""
    method: str
    """``"rtn"`` or ``"gptq"``."""
    rows: int
    """Calibration rows, of all processes; 0 without."""


class TwoBitReport(NamedTuple):
    """What `quantize_model` did."""

    layers: tuple[QuantizedLayer, ...]
    skipped: dict[str, str]
    """Linear layers that were left as they are, and why."""

    @property
    def total_bits(self) -> int:
        """Bits of all packed weights."""
        return sum(layer.total_bits for layer in self.layers)

    @property
    def average_bits(self) -> float:
        """Bits a quantised weight, exact."""
        return self.total_bits / sum(layer.out_features * layer.in_features for layer in self.layers)

    def __str__(self) -> str:
        weights = sum(layer.out_features * layer.in_features for layer in self.layers)
        lines = [f"{len(self.layers)} layers, {weights} weights at {self.average_bits:.4f} bits"]
        lines += [f"  {name}: left, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    calibration: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    max_batches: int | None = None,
    hessian_bytes: int = 2**31,
    four_bit_fraction: float = 0.125,
    outlier_fraction: float = 0.0025,
    error_compensation: ErrorCompensation = "auto",
    percdamp: float = 0.01,
) -> TwoBitReport:
    """Replace linear layers of a model by `TwoBitLinear`, in place.

    With calibration data the layers are quantised block after block, in the order in which they run, each on inputs
    from the blocks before it as they are quantised already. A block is what the last number in a layer's name says
    (``encoder.layer.3`` of ``encoder.layer.3.output.dense``). Each block takes one pass over the data, up to that
    block; only its own Hessians are in memory. Positions that a batch's ``attention_mask`` leaves out do not count.

    Output layers and classification heads are layers like all others: exclude them unless their loss is acceptable. A
    layer whose weight is also an embedding's, or another module's, is left as it is.

    Args:
        model: Any module; in evaluation mode meanwhile.
        include: Patterns as of file names for the layers' qualified names (``"encoder.*"``). A pattern without ``*``,
            ``?`` or ``[`` is a name: if that layer cannot be quantised, it is an error.
        exclude: Patterns of layers to leave.
        calibration: Batches, e.g. a list or a DataLoader: it is run through once for every block. Prefer full-length
            samples, and at least 4 I rows (an LLM: 128 x 2048 tokens). On several processes each gives its share.
            None: round to nearest.
        forward: ``forward(model, batch)`` runs the model. Default: ``model(**batch)`` for mappings, ``model(*batch)``
            for tuples and lists, else ``model(batch)``, moved to the model's device.
        max_batches: Calibrate on the first so many batches.
        hessian_bytes: A block whose Hessians (8 I^2 bytes each) need more is cut into several.
        four_bit_fraction: See `quantize_two_bit`, as the following.
        outlier_fraction: p.
        error_compensation: ``"rtn"`` with calibration data: only the two choices use them.
        percdamp: Ridge.

    Returns:
        What was quantised and what was left.

    Raises:
        ValueError: If a pattern matches no linear layer, none is left to quantise, a layer that was named cannot be
            quantised, a weight is not finite, or the calibration data are empty or can be read only once.
    """
    if error_compensation not in get_args(ErrorCompensation):
        raise ValueError(f"error_compensation must be one of {get_args(ErrorCompensation)}, got {error_compensation!r}")
    if error_compensation == "gptq" and calibration is None:
        raise ValueError("error_compensation='gptq' needs calibration data: give calibration, or use 'rtn'")
    if isinstance(calibration, Iterator):
        raise ValueError("calibration must be iterable many times (a list or a DataLoader), got an iterator")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be >= 1, got {max_batches}")
    names, skipped = _select_layers(model, include, exclude)
    options = {"four_bit_fraction": four_bit_fraction, "outlier_fraction": outlier_fraction, "percdamp": percdamp}
    done: dict[str, QuantizedLayer] = {}

    def replace(name: str, accumulator: HessianAccumulator | None = None, rows: int = 0) -> None:
        linear = model.get_submodule(name)
        method: ErrorCompensation = "rtn" if accumulator is None or error_compensation == "rtn" else "gptq"
        try:
            hessian = None if accumulator is None else accumulator.finalize()
            layer = TwoBitLinear.from_linear(linear, hessian=hessian, error_compensation=method, **options)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        for place, module in list(model.named_modules(remove_duplicate=False)):
            if module is linear:
                model.set_submodule(place, layer)
        weight = layer.packed_weight
        done[name] = QuantizedLayer(name, *weight.shape, weight.total_bits(), method, rows)

    if calibration is not None:
        calibrator = _Calibrator(model, calibration, forward, max_batches)
        with _evaluation(model):
            stages = calibrator.stages(names, hessian_bytes)
            for number, stage in enumerate(stages):
                following = stages[number + 1][0] if number + 1 < len(stages) else None
                accumulators = calibrator.accumulate(stage, following)
                for name in stage:
                    accumulator = accumulators.pop(name)
                    rows = accumulator.count_rows()
                    if rows:
                        replace(name, accumulator, rows)
        _warn_of_thin_calibration(done, names)
    for name in names:
        if name not in done:
            replace(name)
    return TwoBitReport(tuple(done[name] for name in names), skipped)


def _select_layers(
    model: nn.Module, include: str | Sequence[str], exclude: str | Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Names of the layers to quantise, and those left with the reason."""
    wanted = [include] if isinstance(include, str) else list(include)
    unwanted = [exclude] if isinstance(exclude, str) else list(exclude)
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter.data_ptr(), []).append(module)
    aliases: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, TwoBitLinear)) or _matrix_of(module) is not None:
            aliases.setdefault(module, []).append(name)
    for pattern in (*wanted, *unwanted):
        if not any(_matches(found, [pattern]) for found in aliases.values()):
            known = ", ".join(itertools.chain.from_iterable(aliases.values()))
            raise ValueError(f"{pattern!r} matches no linear layer; there are: {known or 'none'}")
    names: list[str] = []
    skipped: dict[str, str] = {}
    for module, found in aliases.items():
        name = found[0]
        if not _matches(found, wanted):
            continue
        if _matches(found, unwanted):
            skipped[name] = "excluded"
            continue
        reason = _obstacle(module, name, owners)
        if reason is None:
            try:
                check_weight(_matrix_of(module))  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
            names.append(name)
        elif set(found) & set(wanted):
            raise ValueError(f"layer {name!r} cannot be quantised: {reason}. Leave it out of include")
        else:
            skipped[name] = reason
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"no linear layer is left to quantise ({reasons})")
    shared = [name for name, reason in skipped.items() if reason.startswith("its weight")]
    if shared:
        warnings.warn(f"{len(shared)} layers share their weight and were left: {', '.join(shared)}", stacklevel=4)
    return names, skipped


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _obstacle(module: nn.Module, name: str, owners: Mapping[int, list[nn.Module]]) -> str | None:
    """Why a linear layer cannot be replaced, or None."""
    if isinstance(module, TwoBitLinear):
        return "already in two bits"
    if _matrix_of(module) is None:
        return f"a {type(module).__qualname__}, not a plain linear layer"
    if not name:
        return "the model itself: use TwoBitLinear.from_linear"
    if "forward" in vars(module):
        return "its forward was replaced"
    weight = module.weight
    assert isinstance(weight, Tensor)
    others = [] if weight.is_meta else [other for other in owners[weight.data_ptr()] if other is not module]
    return f"its weight is also that of a {type(others[0]).__name__}" if others else None


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and torch's random state as before at the end; layers may be replaced meanwhile."""
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    try:
        with torch.random.fork_rng(devices=[]):
            model.eval()
            yield
    finally:
        for name, module in model.named_modules(remove_duplicate=False):
            module.training = modes[name]


class _StageDoneError(Exception):
    """Ends a forward pass when all that was wanted has been seen."""


class _Calibrator:
    """Runs calibration data through a model whose layers are being replaced."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Callable[[nn.Module, Any], object] | None,
        max_batches: int | None,
    ) -> None:
        self.model, self.batches, self.max_batches = model, batches, max_batches
        self.forward = forward or _call

    def _run(self, first: int | None, watch: Callable[[Any], None] | None = None) -> None:
        count = 0
        device = next(itertools.chain(self.model.parameters(), self.model.buffers())).device
        for batch in itertools.islice(self.batches, first):
            batch = _move(batch, device)
            count += 1
            if watch is not None:
                watch(batch)
            with suppress(_StageDoneError):
                self.forward(self.model, batch)
        if not count:
            raise ValueError("calibration holds no batch")

    def stages(self, names: Sequence[str], hessian_bytes: int) -> list[list[str]]:
        """Layers in the order of their first use, cut by block and by memory; without blocks that do not run."""
        order: list[str] = []

        def note(name: str) -> Callable[..., None]:
            return lambda *_: None if name in order else order.append(name)

        with _hooks(self.model, {name: note(name) for name in names}):
            self._run(1)
        called = [_block_of(name) for name in order]
        for name in names:  # of a block that runs, but not for this batch, as experts do
            if name not in order and _block_of(name) in called:
                last = len(called) - called[::-1].index(_block_of(name))
                order.insert(last, name)
                called.insert(last, _block_of(name))
        if default_group() is not None:  # all processes must reduce in the same order
            shared = [order]
            dist.broadcast_object_list(shared, src=0)
            (order,) = shared
        stages: list[list[str]] = []
        size = 0
        for name in order:
            columns = _columns(self.model.get_submodule(name))
            if not stages or _block_of(name) != _block_of(stages[-1][-1]) or size + 8 * columns**2 > hessian_bytes:
                stages.append([])
                size = 0
            stages[-1].append(name)
            size += 8 * columns**2
        return stages

    def accumulate(self, stage: Sequence[str], following: str | None) -> dict[str, HessianAccumulator]:
        """Run all batches, each up to the layer that follows."""
        accumulators = {}
        for name in stage:
            layer = self.model.get_submodule(name)
            assert isinstance(layer.weight, Tensor)
            accumulators[name] = HessianAccumulator(_columns(layer), layer.weight.device)

        def stop(*_: object) -> None:
            raise _StageDoneError

        def watch(batch: Any) -> None:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            for accumulator in accumulators.values():
                accumulator.valid = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

        hooks: dict[str, Callable[..., None]] = dict(accumulators)
        with _hooks(self.model, hooks | ({following: stop} if following else {})):
            self._run(self.max_batches, watch)
        return accumulators


@contextmanager
def _hooks(model: nn.Module, hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    """Call ``hook(module, args)`` before these submodules run."""
    handles = []
    for name, hook in hooks.items():

        def with_keywords(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hook: Callable[..., None] = hook
        ) -> None:
            hook(module, args or tuple(kwargs.values()))

        handles.append(model.get_submodule(name).register_forward_pre_hook(with_keywords, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _block_of(name: str) -> str:
    """A layer's name up to its last number: layers of one block are calibrated together."""
    found = re.match(r"(.*\.)?\d+(?=\.|$)", name)
    return found[0] if found else name


def _columns(layer: nn.Module) -> int:
    weight = _matrix_of(layer)
    assert weight is not None
    return weight.shape[1]


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _move(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _move(value, device) for name, value in batch.items()}
    return type(batch)(_move(value, device) for value in batch) if type(batch) in (tuple, list) else batch


def _warn_of_thin_calibration(done: Mapping[str, QuantizedLayer], names: Sequence[str]) -> None:
    unseen = [name for name in names if name not in done]
    thin = [layer.name for layer in done.values() if layer.rows < layer.in_features]
    if unseen:
        warnings.warn(
            f"{len(unseen)} layers did not run on the calibration data and are rounded to nearest: {', '.join(unseen)}",
            stacklevel=4,
        )
    if thin:
        warnings.warn(
            f"{len(thin)} layers saw fewer calibration rows than they have inputs, which makes a poor Hessian; give at "
            f"least 4 times as many as inputs: {', '.join(thin)}",
            stacklevel=4,
        )
