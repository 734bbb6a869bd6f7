from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heliostat.components import (
    HessianAccumulator,
    TwoBitLinear,
    TwoBitWeight,
    dequantize_two_bit,
    quantize_model,
    quantize_two_bit,
    two_bit_encoder,
    two_bit_format,
    two_bit_linear,
)
from heliostat.components.two_bit import PackedArrays
from heliostat.components.two_bit_format import Codes
from tests.harness import GoldenCase, OperatorContract, ProcessPool, golden, relative_error

GOLDEN = golden("two_bit")
ENCODED = [name for name, arrays in GOLDEN.items() if "weight" in arrays]


def packed(case: str) -> TwoBitWeight:
    """The reference arrays, in the dtypes of the format's definition (uint32, uint16, float16)."""
    arrays = GOLDEN[case]
    state = {key[len("packed/") :]: torch.tensor(a) for key, a in arrays.items() if key.startswith("packed/")}
    shape = torch.tensor([int(arrays["out_features"]), int(arrays["in_features"])])
    return TwoBitWeight.from_state_dict({"format_version": torch.tensor(1), "weight_shape": shape, **state})


def encoded(case: str) -> TwoBitWeight:
    arrays = GOLDEN[case]
    return quantize_two_bit(
        torch.tensor(arrays["weight"]),
        four_bit_fraction=float(arrays["four_bit_fraction"]),
        outlier_fraction=float(arrays["outlier_fraction"]),
        hessian=torch.tensor(arrays["hessian"]) if "hessian" in arrays else None,
        error_compensation=str(arrays["method"]),
    )


def assert_same(actual: TwoBitWeight, expected: TwoBitWeight) -> None:
    assert actual.shape == expected.shape
    for name in PackedArrays._fields:
        assert torch.equal(getattr(actual.arrays, name), getattr(expected.arrays, name)), name


def heavy_tailed(rows: int, columns: int) -> Tensor:
    return torch.distributions.StudentT(4.0).sample((rows, columns)) * 0.02


def example_weight(rows: int = 24, columns: int = 100) -> TwoBitWeight:
    torch.manual_seed(1)
    return quantize_two_bit(heavy_tailed(rows, columns), four_bit_fraction=0.3, outlier_fraction=0.02)


# --- reference vectors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ENCODED)
def test_encoder_gives_the_reference_integers(case: str) -> None:
    assert_same(encoded(case), packed(case))


@pytest.mark.parametrize("case", GOLDEN)
def test_decoder_gives_the_reference_values(case: str) -> None:
    arrays, w = GOLDEN[case], packed(case)
    for actual, name in zip(w.unpack(), ("codes", "zero", "scale"), strict=True):
        assert np.array_equal(actual.numpy(), arrays[name]), name
    assert w.total_bits() == arrays["total_bits"]
    assert w.average_bits() == arrays["avg_bits"]
    exact = dequantize_two_bit(w, torch.float64)
    assert np.array_equal(exact.numpy(), arrays["dequant"])
    assert torch.equal(dequantize_two_bit(w), exact.float())
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        if f"dequant_{name}_bits" in arrays:
            bits = dequantize_two_bit(w, dtype).view(torch.int16).numpy()
            assert np.array_equal(bits, arrays[f"dequant_{name}_bits"].view(np.int16))


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize(
    ("dtype", "ulp", "floor"), [(torch.float32, 0, 0), (torch.float16, 2**-11, 2**-24), (torch.bfloat16, 2**-8, 0)]
)
def test_products_match_the_reference(case: str, dtype: torch.dtype, ulp: float, floor: float) -> None:
    arrays, w = GOLDEN[case], packed(case)
    if dtype == torch.float16 and case == "case7":
        return  # results of 1e23 are no float16
    magnitude = torch.tensor(arrays["dequant"]).abs()
    for rows in (1, 4, 16):
        x, y = torch.tensor(arrays[f"x{rows}"]), torch.tensor(arrays[f"y{rows}"])
        x = x.to(dtype).requires_grad_()
        actual = two_bit_linear(x, w)
        assert actual.dtype == dtype
        bound = 1e-5 * x.detach().double().abs() @ magnitude.T + ulp * y.abs() + floor
        assert ((actual.double() - y).abs() <= bound).all()
        if rows == 4:
            grad, expected = torch.tensor(arrays["grad_y4"]), torch.tensor(arrays["grad_x4"])
            actual.backward(grad.to(dtype))
            bound = 1e-5 * grad.double().abs() @ magnitude + ulp * expected.abs() + floor
            assert ((x.grad.double() - expected).abs() <= bound).all()


# --- the operator ----------------------------------------------------------------------------------------------------


class TestTwoBitLinear(OperatorContract):
    differentiable = ("x", "bias")
    half_tolerance = 1e-2

    def call(self, x: Tensor, bias: Tensor) -> Tensor:
        return two_bit_linear(x, _SMALL, bias)

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return {"x": torch.randn(rows // 4, 18), "bias": torch.randn(20)}

    def golden_cases(self) -> dict[str, GoldenCase]:
        def case(name: str) -> GoldenCase:
            w, arrays = packed(name), GOLDEN[name]
            return GoldenCase(
                inputs={"x": arrays["x4"]},
                call=lambda inputs: {"y": two_bit_linear(inputs["x"], w)},
                outputs={"y": arrays["y4"]},
                gradients={"x": arrays["grad_x4"]},
                cotangent=("y", arrays["grad_y4"]),
                tolerance={torch.float64: 1e-13, torch.float32: 1e-6},
            )

        return {name: case(name) for name in ("case1", "case5", "case7")}

    def degenerate_cases(self) -> dict[str, dict[str, Tensor]]:
        return {
            "no rows": {"x": torch.zeros(0, 18), "bias": torch.zeros(20)},
            "no rows in a batch": {"x": torch.zeros(0, 3, 18), "bias": torch.zeros(20)},
            "one vector": {"x": torch.ones(18), "bias": torch.zeros(20)},
        }

    def error_cases(self) -> dict[str, tuple[Callable[[], object], str]]:
        x, w, flat = torch.randn(2, 100), _WEIGHT, torch.randn(16, 32)
        return {
            "columns": (lambda: two_bit_linear(torch.randn(2, 99), w), r"x must hold .* \(\.\.\., 100\)"),
            "integers": (lambda: two_bit_linear(torch.ones(2, 100, dtype=torch.int64), w), "floating-point"),
            "scalar": (lambda: two_bit_linear(torch.tensor(1.0), w), "x must hold"),
            "bias": (lambda: two_bit_linear(x, w, torch.zeros(23)), r"bias must have shape \(24,\)"),
            "device": (lambda: two_bit_linear(x.to("meta"), w), "x is on meta"),
            "dtype": (lambda: dequantize_two_bit(w, torch.int8), "dtype"),
            "NaN": (lambda: quantize_two_bit(flat.index_fill(1, torch.tensor([5, 9]), torch.nan)), r"32 .* \(0, 5\)"),
            "infinity": (lambda: quantize_two_bit(torch.tensor([[0.0], [torch.inf]])), r"1 entries .* \(1, 0\)"),
            "vector": (lambda: quantize_two_bit(torch.ones(4)), r"shape \(O, I\)"),
            "empty": (lambda: quantize_two_bit(torch.ones(0, 4)), "without empty dimensions"),
            "integer weight": (lambda: quantize_two_bit(torch.ones(4, 4, dtype=torch.int32)), "floating-point"),
            "huge": (lambda: quantize_two_bit(torch.full((1, 1), 1e300, dtype=torch.float64)), "beyond float32"),
            "fraction": (lambda: quantize_two_bit(flat, four_bit_fraction=1.1), "four_bit_fraction must lie"),
            "outliers": (lambda: quantize_two_bit(flat, outlier_fraction=0.06), "outlier_fraction must lie"),
            "damping": (lambda: quantize_two_bit(flat, percdamp=0.0), "percdamp must be > 0"),
            "method": (lambda: quantize_two_bit(flat, error_compensation="gpt"), "error_compensation must be one of"),
            "no Hessian": (lambda: quantize_two_bit(flat, error_compensation="gptq"), "needs a hessian"),
            "Hessian's shape": (lambda: quantize_two_bit(flat, hessian=torch.eye(31)), r"hessian .* \(32, 32\)"),
            "Hessian's NaN": (lambda: quantize_two_bit(flat, hessian=torch.full((32, 32), torch.nan)), "1024 entries"),
            "Hessian's sign": (lambda: quantize_two_bit(flat, hessian=-torch.eye(32)), "negative"),
            "indefinite": (lambda: quantize_two_bit(flat, hessian=torch.eye(32) + 9 * (1 - torch.eye(32))), "definite"),
            "shard": (lambda: w.slice_rows(0, 8), "multiples of 16"),
        }


_WEIGHT, _SMALL = example_weight(), example_weight(20, 18)


def test_second_derivatives_and_operator_registration() -> None:
    x = torch.randn(2, 18, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(20, dtype=torch.float64, requires_grad=True)
    # The map is linear, so its second derivative is that of what stands around it.
    assert torch.autograd.gradgradcheck(lambda x, b: two_bit_linear(x, _SMALL, b).square(), (x, bias))
    arrays = list(_SMALL.arrays)
    ops = torch.ops.heliostat
    torch.library.opcheck(ops.two_bit_linear.default, (x, arrays, bias))
    torch.library.opcheck(ops.two_bit_linear_transposed.default, (torch.randn(2, 20, requires_grad=True), arrays, 18))
    torch.library.opcheck(ops.two_bit_dequantize.default, (arrays, 18, torch.bfloat16))


def test_bits_outside_the_matrix_are_ignored() -> None:
    garbage = copy.deepcopy(_WEIGHT.arrays)
    assert garbage.codes.shape[1] == 8  # columns 100..127 are padding: a part of group 6, and group 7
    garbage.codes[:, 7] = -1
    four_bit = bool(garbage.four_bit_map[0] >> 6 & 1)
    garbage.codes[:, 6] |= -1 << (16 if four_bit else 8)
    garbage.zero2[:] |= -1 << 12
    garbage.zero4[:] |= -1 << 4 * garbage.codes_hi.shape[1]
    garbage.four_bit_map[:] |= -1 << 8
    other = TwoBitWeight(garbage, 100)
    x = torch.randn(5, 100)
    assert torch.equal(two_bit_linear(x, other), two_bit_linear(x, _WEIGHT))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 7, 99])
def test_non_finite_inputs_spread_as_in_a_dense_layer(value: float, column: int) -> None:
    for w in (_WEIGHT, TwoBitWeight.from_codes(random_codes(40, 100, seed=column), 100)):
        x = torch.randn(3, 100)
        x[1, column] = value
        expected = value * dequantize_two_bit(w)[:, column]  # NaN where the weight is 0
        y = two_bit_linear(x, w)
        torch.testing.assert_close(y[1], expected, equal_nan=True)
        assert y[[0, 2]].isfinite().all()


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = heavy_tailed(70, 130).mul(8).round().div(8)  # many ties
    options = {"four_bit_fraction": 0.25, "outlier_fraction": 0.03}
    whole, x = quantize_two_bit(dense, **options), torch.randn(4, 130)
    expected = two_bit_linear(x, whole), dequantize_two_bit(whole)
    for module in (two_bit_encoder, two_bit_format):
        monkeypatch.setattr(module, "_CHUNK", 1)  # 16 rows at a time
    assert_same(quantize_two_bit(dense, **options), whole)
    assert torch.equal(dequantize_two_bit(whole), expected[1])
    torch.testing.assert_close(two_bit_linear(x, whole), expected[0])


def test_the_linear_layer_never_holds_the_whole_matrix() -> None:
    weight = TwoBitLinear(4096, 1024).packed_weight
    x = torch.randn(1, 4096, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        two_bit_linear(x, weight).sum().backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert peak < 0.9 * 4 * 1024 * 4096


# --- traps of the encoder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (15, 17), (16, 64), (17, 65), (33, 15)])
@pytest.mark.parametrize("fraction", [0.0, 0.125, 1.0])
def test_ragged_shapes(shape: tuple[int, int], fraction: float) -> None:
    dense = torch.randn(shape)
    w = quantize_two_bit(dense, four_bit_fraction=fraction)
    decoded, x = dequantize_two_bit(w), torch.randn(2, shape[1])
    assert (decoded - dense).norm() < 0.6 * dense.norm()
    torch.testing.assert_close(two_bit_linear(x, w), x @ decoded.T)
    rows, columns = shape
    groups, four = 4 * -(-columns // 64), w.arrays.codes_hi.shape[1]
    two, blocks, kept = groups - four, -(-rows // 16), len(w.arrays.outlier_val)
    triples = -(-two // 3)
    bits = 32 * rows * (groups + four) + 16 * rows * triples + 16 * blocks * (two + triples) + 16 * rows * four
    bits += 32 * rows * -(-four // 8) + 32 * kept + 32 * (rows + 1) + 32 * -(-groups // 32) + 32
    assert w.total_bits() == bits


def test_average_bits_of_large_layers() -> None:
    for shape, bits in (((4096, 4096), 2.8600), ((768, 768), 2.9032)):
        four = round(shape[1] / 16 / 8)
        groups = torch.arange(shape[1] // 16) < four
        kept = torch.arange(int(0.0025 * shape[0] * shape[1] + 0.5))
        zero = two_bit_format.empty_codes(shape[0], groups, kept, 0)
        assert round(TwoBitWeight.from_codes(zero, shape[1]).average_bits(), 4) == bits


def test_what_is_zero_stays_zero() -> None:
    dense = torch.randn(20, 70)
    dense[3], dense[:, 16:32] = 0, 0
    decoded = dequantize_two_bit(quantize_two_bit(dense, outlier_fraction=0.0))
    assert not decoded[3].any()
    assert not decoded[:, 16:32].any()
    zero = quantize_two_bit(torch.zeros(20, 70), outlier_fraction=0.05)
    assert not dequantize_two_bit(zero).any()
    assert len(zero.arrays.outlier_val) == 0  # a score of 0 is no outlier
    assert int(zero.arrays.exponent) == 0


@pytest.mark.parametrize(("value", "code", "zero"), [(0.5, 3, 0), (-0.5, 0, 3)])
def test_constant_groups_use_the_end_of_the_grid(value: float, code: int, zero: int) -> None:
    w = quantize_two_bit(torch.full((16, 64), value), four_bit_fraction=0.0, outlier_fraction=0.0)
    codes, zeros, _ = w.unpack()
    assert (codes == code).all()
    assert (zeros == zero).all()
    assert relative_error(dequantize_two_bit(w), torch.full((16, 64), value)) < 2**-10  # s2 is a float16


def test_a_small_group_errs_by_less_than_its_own_range() -> None:
    dense = torch.rand(16, 64)
    dense[0] *= 1e-4
    w = quantize_two_bit(dense, four_bit_fraction=0.0, outlier_fraction=0.0)
    error = (dequantize_two_bit(w) - dense)[0].abs().view(4, 16).amax(1)
    assert (error <= dense[0].view(4, 16).amax(1)).all()


@pytest.mark.parametrize("power", [-93, -13, 76])
def test_scale_of_the_matrix_moves_into_the_exponent(power: int) -> None:
    dense = torch.randn(16, 48).double()
    reference, scaled = quantize_two_bit(dense), quantize_two_bit((dense * 2.0**power).float().double())
    dense = dense.float().double()
    reference = quantize_two_bit(dense)
    assert int(scaled.arrays.exponent) == int(reference.arrays.exponent) + power
    assert_same(scaled, TwoBitWeight(reference.arrays._replace(exponent=scaled.arrays.exponent), 48))
    assert torch.equal(dequantize_two_bit(scaled).double(), dequantize_two_bit(reference).double() * 2.0**power)


def test_subnormal_results_are_rounded_once() -> None:
    w = quantize_two_bit(torch.randn(16, 48) * 1e-38)
    assert torch.equal(dequantize_two_bit(w), dequantize_two_bit(w, torch.float64).float())


@pytest.mark.parametrize("columns", [40_000, 65_552])
def test_columns_beyond_signed_and_unsigned_16_bits(columns: int) -> None:
    dense = torch.randn(2, columns) * 0.01
    dense[1, columns - 1] = 1.0
    w = quantize_two_bit(dense, four_bit_fraction=0.0, outlier_fraction=1e-4)
    assert w.arrays.outlier_col.dtype == (torch.int32 if columns > 65_536 else torch.int16)
    assert dequantize_two_bit(w)[1, columns - 1] == 1.0
    assert_same(TwoBitWeight.from_state_dict(w.state_dict()), w)


def test_error_falls_with_the_bits() -> None:
    dense = heavy_tailed(512, 1024)

    def error(**options: Any) -> float:
        return float((dequantize_two_bit(quantize_two_bit(dense, **options)) - dense).norm() / dense.norm())

    assert error(four_bit_fraction=0.0, outlier_fraction=0.0) == pytest.approx(0.366, abs=0.01)
    assert error() == pytest.approx(0.322, abs=0.01)
    assert error(four_bit_fraction=1.0) == pytest.approx(0.076, abs=0.005)


def test_compensation_lowers_the_error_of_the_output() -> None:
    x = torch.randn(512, 40) @ torch.randn(40, 160) + 0.3 * torch.randn(512, 160)
    dense, hessian = torch.randn(32, 160), x.double().T @ x.double() / len(x)

    def error(method: str) -> Tensor:
        w = quantize_two_bit(dense, hessian=hessian, error_compensation=method)
        return (two_bit_linear(x, w) - x @ dense.T).norm()

    assert error("gptq") < 0.7 * error("rtn")
    assert_same(  # round-to-nearest knows the diagonal alone
        quantize_two_bit(dense, hessian=hessian, error_compensation="rtn"),
        quantize_two_bit(dense, hessian=hessian.diagonal().diag(), error_compensation="rtn"),
    )


def test_a_column_without_input_leaves_the_others_alone() -> None:
    hessian = torch.rand(48, 48).double()
    hessian = hessian @ hessian.T
    hessian[5], hessian[:, 5] = 0, 0
    dense = torch.rand(16, 48) * 4 - 2
    dense[:, 0], dense[:, 1] = -2, 2
    other = dense.clone()
    other[:, 5] *= -1  # still within its group's range, so the grid is the same
    options = {"hessian": hessian, "outlier_fraction": 0.0}
    first, second = (dequantize_two_bit(quantize_two_bit(d, **options)) for d in (dense, other))
    assert (first[:, 5] - dense[:, 5]).abs().max() <= 0.7  # half a step of 4 / 3
    columns = torch.arange(48) != 5
    assert torch.equal(first[:, columns], second[:, columns])
    assert not torch.equal(first[:, 5], second[:, 5])


def test_shards_of_rows_are_exact() -> None:
    w = example_weight(40)
    dense, x = dequantize_two_bit(w), torch.randn(3, 100)
    shards = [w.slice_rows(start, stop) for start, stop in ((0, 16), (16, 32), (32, 40))]
    assert torch.equal(torch.cat([dequantize_two_bit(shard) for shard in shards]), dense)
    torch.testing.assert_close(torch.cat([two_bit_linear(x, shard) for shard in shards], 1), x @ dense.T)


# --- packing ---------------------------------------------------------------------------------------------------------


def random_codes(rows: int, columns: int, seed: int) -> Codes:
    """Integers of every allowed kind, with zeros where the format has none."""
    rng = np.random.default_rng(seed)
    groups = 4 * -(-columns // 64)
    four_bit = torch.tensor(rng.random(groups) < rng.random())
    two, blocks = int((~four_bit).sum()), -(-rows // 16)
    levels = torch.where(four_bit, 16, 4).numpy()
    limits = np.array([8, 8, 16])[np.arange(two) % 3]
    kept = np.sort(rng.choice(rows * columns, min(rows * columns, rng.integers(9)), replace=False))
    return Codes(
        codes=torch.tensor(rng.integers(0, levels[:, None], (rows, groups, 16)), dtype=torch.uint8),
        zero=torch.tensor(rng.integers(0, levels, (rows, groups)), dtype=torch.uint8),
        four_bit=four_bit,
        scale_code=torch.tensor(rng.integers(0, limits, (rows, two)), dtype=torch.uint8),
        scale2=torch.tensor(rng.random((blocks, two)), dtype=torch.float16),
        zero2=torch.tensor(rng.integers(0, limits, (blocks, two)), dtype=torch.uint8),
        scale4=torch.tensor(rng.random((rows, groups - two)), dtype=torch.float16),
        outlier_index=torch.tensor(kept, dtype=torch.int64),
        outlier_val=torch.tensor(rng.normal(size=len(kept)), dtype=torch.float16),
        exponent=int(rng.integers(-100, 100)),
    )


SIZES = {"rows": st.integers(1, 40), "columns": st.integers(1, 200), "seed": st.integers(0, 2**32 - 1)}
few = hypothesis.settings(max_examples=25, deadline=None, database=None)


@few
@hypothesis.given(**SIZES)
def test_unpacking_undoes_packing(rows: int, columns: int, seed: int) -> None:
    integers = random_codes(rows, columns, seed)
    w = TwoBitWeight.from_codes(integers, columns)
    codes, zero, scale = w.unpack()
    assert torch.equal(codes.view_as(integers.codes), integers.codes)
    assert torch.equal(zero, integers.zero)
    block = torch.arange(rows) // 16
    expected = torch.empty_like(scale)
    expected[:, ~integers.four_bit] = (integers.scale_code + integers.zero2[block]) * integers.scale2.double()[block]
    expected[:, integers.four_bit] = integers.scale4.double()
    assert torch.equal(scale, expected)
    dense = ((codes.double().view(rows, -1, 16) - zero[..., None]) * scale[..., None]).flatten(1)[:, :columns]
    dense.view(-1, columns)[integers.outlier_index // columns, integers.outlier_index % columns] += (
        integers.outlier_val.double()
    )
    assert torch.equal(dequantize_two_bit(w, torch.float64), dense * 2.0**integers.exponent)
    assert_same(TwoBitWeight.from_state_dict(w.state_dict()), w)


@few
@hypothesis.given(**SIZES)
def test_products_by_any_integers_are_those_of_the_decoded_matrix(rows: int, columns: int, seed: int) -> None:
    w = TwoBitWeight.from_codes(random_codes(rows, columns, seed), columns)
    exact = dequantize_two_bit(w, torch.float64)
    assert torch.equal(dequantize_two_bit(w), exact.float())
    x = torch.randn(3, columns, requires_grad=True)
    y = two_bit_linear(x, w)
    y.backward(torch.ones_like(y))
    bound = 1e-5 * x.detach().abs().double() @ exact.abs().T
    assert ((y - x.double() @ exact.T).abs() <= bound).all()
    assert ((x.grad - exact.sum(0)).abs() <= 1e-5 * exact.abs().sum(0)).all()


@few
@hypothesis.given(**SIZES, data=st.data())
def test_an_array_of_another_shape_or_dtype_is_refused(rows: int, columns: int, seed: int, data: Any) -> None:
    state = TwoBitWeight.from_codes(random_codes(rows, columns, seed), columns).state_dict()
    name = data.draw(st.sampled_from(PackedArrays._fields))
    array = state[name]
    wrong = [array.long(), array.double(), array[None]]
    if array.numel():
        wrong += [array[:-1]] if array.ndim else []
    state[name] = data.draw(st.sampled_from(wrong))
    with pytest.raises(ValueError, match=f"{name}|outlier_|four_bit_map|codes"):
        TwoBitWeight.from_state_dict(state)


def broken(**changes: Any) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in _WEIGHT.state_dict().items()}
    for name, change in changes.items():
        state[name] = change(state[name])
    return state


BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "newer version": (broken(format_version=lambda v: v + 1), "format version 2 .* newer heliostat"),
    "version 0": (broken(format_version=lambda v: v - 1), "format version 0 is not the 1"),
    "no version": (broken(format_version=lambda v: v[None][:0]), "format version"),
    "map": (broken(four_bit_map=lambda a: a ^ 1), "four_bit_map marks . groups, but codes_hi holds 2"),
    "shape": (broken(weight_shape=lambda a: a + torch.tensor([1, 0])), "weight_shape is"),
    "columns": (broken(weight_shape=lambda a: a + torch.tensor([0, 64])), "must be .* for 24 x 164 weights"),
    "truncated": (broken(codes=lambda a: a[:-1]), "weight_shape is"),
    "scale": (broken(scale2=lambda a: a.fill_(0x7C00)), "scale2 holds NaN or infinity"),
    "column": (broken(outlier_col=lambda a: a + 100), "outlier_col must increase"),
    "order": (broken(outlier_col=lambda a: a.flip(0)), "outlier_col must increase"),
    "pointers": (broken(outlier_row_ptr=lambda a: a + 1), "outlier_row_ptr must rise"),
    "missing": ({k: v for k, v in broken().items() if k != "zero4"}, "zero4 is missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_state_is_refused(name: str) -> None:
    state, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        TwoBitWeight.from_state_dict(state)
    layer = TwoBitLinear(100, 24, bias=False)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, strict=False)
    assert not dequantize_two_bit(layer.packed_weight).any()  # nothing was taken


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_of_the_module_cannot_touch_the_weight(dtype: torch.dtype) -> None:
    layer = TwoBitLinear.from_linear(nn.Linear(100, 24))
    before = copy.deepcopy(layer.packed_weight)
    network = nn.Sequential(layer, nn.LayerNorm(24)).to(dtype)
    assert_same(layer.packed_weight, before)
    assert layer.bias.dtype == dtype
    x = torch.randn(3, 100, dtype=dtype, requires_grad=True)
    y = network(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == layer.bias.grad.dtype == dtype


def test_the_bias_is_added_before_the_last_rounding() -> None:
    w = quantize_two_bit(torch.ones(1, 16), four_bit_fraction=1.0)
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    x[0, 0] = 1 + 2**-7
    exact = two_bit_linear(x.double(), w)
    bias = -exact.detach().flatten().bfloat16()
    y = two_bit_linear(x, w, bias)
    assert y.double().item() == pytest.approx((exact + bias).item(), rel=2**-7)
    assert y.item() != 0


def test_layer_maps_trains_its_bias_and_shows_itself() -> None:
    linear = nn.Linear(100, 24)
    layer = TwoBitLinear.from_linear(linear, four_bit_fraction=1.0)
    assert layer.bias is linear.bias
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    x = torch.randn(2, 3, 100)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert relative_error(layer(x), linear(x).detach()) < 0.2
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((24,), 6.0))
    assert "100, 24, bias=True, bits=" in repr(layer)
    with pytest.raises(ValueError, match=r"x must hold .* \(\.\.\., 100\)"):
        layer(x[..., :99])
    for call in (
        lambda: TwoBitLinear(0, 3),
        lambda: TwoBitLinear.from_linear(nn.Conv1d(3, 3, 1)),
        lambda: TwoBitLinear.from_weight(_WEIGHT, torch.zeros(3)),
    ):
        with pytest.raises(ValueError, match="in_features|linear must be|bias must"):
            call()


@pytest.mark.parametrize("how", ["state_dict", "assign", "torch.save", "safetensors", "meta"])
def test_state_round_trip_into_a_new_layer(how: str, tmp_path: Path) -> None:
    source = nn.Sequential(TwoBitLinear.from_weight(_WEIGHT, torch.randn(24)), nn.ReLU())
    with torch.device("meta" if how == "meta" else "cpu"):
        target = nn.Sequential(TwoBitLinear(100, 24), nn.ReLU())
    state = source.state_dict()
    if how == "torch.save":
        torch.save(state, tmp_path / "x.pt")
        state = torch.load(tmp_path / "x.pt", weights_only=True)
    elif how == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(state, tmp_path / "x.safetensors")
        state = safetensors.load_file(tmp_path / "x.safetensors")
        whole = (tmp_path / "x.safetensors").read_bytes()
        (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(Exception, match="(?i)incomplete|invalid"):
            safetensors.load_file(tmp_path / "half.safetensors")
    target.load_state_dict(state, assign=how in ("assign", "meta"))
    assert_same(target[0].packed_weight, _WEIGHT)
    x = torch.randn(2, 100)
    assert torch.equal(target(x), source(x))
    if how == "state_dict":
        source[0].codes.zero_()
        assert target[0].codes.any()  # a copy


def test_the_layer_compiles_into_one_graph() -> None:
    network = nn.Sequential(TwoBitLinear.from_weight(_SMALL, torch.randn(20)), nn.GELU())
    x = torch.randn(2, 3, 18)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(network, backend="aot_eager", fullgraph=True)(x), network(x))


def test_loading_what_does_not_fit_says_why() -> None:
    network = nn.Sequential(TwoBitLinear(100, 24))
    for other, message in (
        (nn.Sequential(TwoBitLinear(100, 40)), r"0: .*\(40, 100\), but the layer's is \(24, 100\)"),
        (nn.Sequential(nn.Linear(100, 24)), "0: the state holds a dense weight"),
        (nn.Sequential(nn.ReLU()), "Missing key.*0.codes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            network.load_state_dict(other.state_dict())


# --- calibration -----------------------------------------------------------------------------------------------------


def test_hessian_is_the_mean_over_all_inputs() -> None:
    linear = nn.Linear(5, 3)
    accumulator = HessianAccumulator(5)
    handle = linear.register_forward_hook(accumulator)
    batches = [torch.randn(2, 7, 5), torch.randn(11, 5), torch.randn(5)]
    for batch in batches:
        linear(batch)
    handle.remove()
    rows = torch.cat([batch.reshape(-1, 5) for batch in batches]).double()
    assert relative_error(accumulator.finalize(), rows.T @ rows / 26) < 1e-12
    accumulator.valid = torch.tensor([[1, 1, 0], [1, 0, 0]])
    accumulator.update(torch.randn(2, 3, 5))
    assert accumulator.rows == 29
    accumulator.update(torch.full((1, 5), torch.nan))
    with pytest.raises(ValueError, match="NaN or infinity"):
        accumulator.finalize()
    with pytest.raises(ValueError, match="no input was seen"):
        HessianAccumulator(5).finalize()
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 5\)"):
        accumulator.update(torch.randn(2, 4))


class Residual(nn.Module):
    """Blocks of two linear layers with dropout, and an output layer that shares the embedding's weight."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 48), "down": nn.Linear(48, width)}) for _ in range(2)
        )
        self.dropout = nn.Dropout()
        self.unused = nn.Linear(width, width)
        self.out = nn.Linear(width, 20, bias=False)
        self.out.weight = self.embed.weight
        self.calls = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embed(input_ids)
        self.calls += 1
        for block in self.blocks:
            h = h + self.dropout(block["down"](input=block["up"](h).relu()))
        return self.out(h)


def tokens(count: int = 3, seed: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(20, (8, 16), generator=generator) for _ in range(count)]
    mask = torch.arange(16) < torch.arange(9, 17)[:, None]
    return [{"input_ids": batch, "attention_mask": mask.long()} for batch in ids]


def by_hand(model: Residual, batches: list[dict[str, Tensor]]) -> None:
    """What quantize_model is to do, block after block on the quantised blocks before."""
    model.eval()
    for block in model.blocks:
        inputs: dict[str, list[Tensor]] = {"up": [], "down": []}
        handles = [
            block[name].register_forward_pre_hook(
                lambda _, a, k, seen=inputs[name]: seen.append(a[0] if a else k["input"]), with_kwargs=True
            )
            for name in inputs
        ]
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        for handle in handles:
            handle.remove()
        for name, seen in inputs.items():
            rows = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches, strict=True)]).double()
            block[name] = TwoBitLinear.from_linear(block[name], hessian=rows.T @ rows / len(rows))


def test_blocks_are_calibrated_on_the_quantised_blocks_before() -> None:
    model = Residual().train()
    model.dropout.eval()
    expected = copy.deepcopy(model)
    by_hand(expected, tokens())
    random_state = torch.get_rng_state()
    with (
        pytest.warns(UserWarning, match="1 layers share their weight and were left: out"),
        pytest.warns(UserWarning, match="1 layers did not run on the calibration data .* to nearest: unused"),
    ):
        report = quantize_model(model, calibration=tokens(5), max_batches=3)
    for block, other in zip(model.blocks, expected.blocks, strict=True):
        for name in ("up", "down"):
            assert_same(block[name].packed_weight, other[name].packed_weight)
    assert model.calls == 1 + 3 + 3
    assert model.training
    assert model.blocks[0]["up"].training
    assert not model.dropout.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.out.weight is model.embed.weight
    assert report.skipped == {"out": "its weight is also that of a Embedding"}
    rows = 3 * int(tokens()[0]["attention_mask"].sum())
    assert [(layer.name, layer.method, layer.rows) for layer in report.layers] == [
        ("blocks.0.up", "gptq", rows),
        ("blocks.0.down", "gptq", rows),
        ("blocks.1.up", "gptq", rows),
        ("blocks.1.down", "gptq", rows),
        ("unused", "rtn", 0),
    ]
    layers = [module for module in model.modules() if isinstance(module, TwoBitLinear)]
    bits = sum(layer.packed_weight.total_bits() for layer in layers)
    assert report.total_bits == bits
    assert report.average_bits == bits / (4 * 32 * 48 + 32 * 32)
    assert "out: left" in str(report)


def test_memory_for_hessians_is_bounded() -> None:
    model = Residual()
    with pytest.warns(UserWarning, match="share their weight"):
        quantize_model(model, exclude="unused", calibration=tokens(), hessian_bytes=8 * 48**2)
    assert model.calls == 1 + 4 * 3  # every layer takes a pass of its own


def test_without_calibration_and_with_names() -> None:
    model = Residual()
    dense = model.blocks[0]["up"].weight.detach().clone()
    report = quantize_model(model, include=["blocks.*", "unused"], exclude=["*.down"], four_bit_fraction=0.5)
    assert [layer.name for layer in report.layers] == ["blocks.0.up", "blocks.1.up", "unused"]
    assert report.skipped == {"blocks.0.down": "excluded", "blocks.1.down": "excluded"}
    assert_same(model.blocks[0]["up"].packed_weight, quantize_two_bit(dense, four_bit_fraction=0.5))
    again = quantize_model(model, include="blocks.*")
    assert [layer.name for layer in again.layers] == ["blocks.0.down", "blocks.1.down"]
    assert again.skipped["blocks.0.up"] == "already in two bits"


def test_a_layer_in_two_places_stays_one_layer() -> None:
    shared = nn.Linear(16, 16)
    network = nn.Sequential(shared, nn.ReLU(), shared)
    report = quantize_model(network, calibration=[torch.randn(64, 16)])
    assert network[0] is network[2]
    assert isinstance(network[0], TwoBitLinear)
    assert [(layer.name, layer.rows) for layer in report.layers] == [("0", 128)]


@pytest.mark.filterwarnings("ignore:.*share their weight")
def test_what_cannot_be_replaced_is_left_or_refused() -> None:
    attention = nn.MultiheadAttention(16, 2)  # uses its projection's weight, and never calls it
    network = nn.ModuleDict({"attention": attention, "linear": nn.Linear(16, 16)})
    report = quantize_model(network)
    assert "not a plain linear layer" in report.skipped["attention.out_proj"]
    x = torch.randn(5, 1, 16)
    assert attention(x, x, x)[0].isfinite().all()
    batches = tokens()
    broken_model = Residual()
    broken_model.blocks[1]["up"].weight.data[2, 3] = torch.nan
    for call, message in (
        (
            lambda: quantize_model(Residual(), include="out"),
            "'out' cannot be quantised: its weight is also that of a Emb",
        ),
        (lambda: quantize_model(Residual(), include=["blocks.*", "head"]), "'head' matches no linear layer; there are"),
        (lambda: quantize_model(Residual(), exclude="lm_head"), "'lm_head' matches no linear layer"),
        (lambda: quantize_model(Residual(), include="blocks.*", exclude="*"), "no linear layer is left"),
        (lambda: quantize_model(nn.ReLU()), "matches no linear layer; there are: none"),
        (lambda: quantize_model(nn.Linear(4, 4)), "the model itself"),
        (lambda: quantize_model(broken_model), r"'blocks.1.up': weight has 1 entries .* \(2, 3\)"),
        (lambda: quantize_model(Residual(), include="blocks.*", calibration=iter(batches)), "iterable many times"),
        (lambda: quantize_model(Residual(), include="blocks.*", calibration=[]), "no batch"),
        (lambda: quantize_model(Residual(), include="blocks.*", calibration=batches, max_batches=0), "max_batches"),
        (lambda: quantize_model(Residual(), error_compensation="gptq"), "needs calibration"),
        (lambda: quantize_model(Residual(), error_compensation="gtpq"), "error_compensation must be one of"),
        (
            lambda: quantize_model(nn.Sequential(nn.Linear(4, 4)), calibration=[torch.full((8, 4), torch.nan)]),
            "'0': .* NaN",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not any(isinstance(module, TwoBitLinear) for module in broken_model.modules())  # nothing half done


def test_few_rows_are_warned_about_and_forward_may_be_given() -> None:
    network = nn.Sequential(nn.Linear(32, 8))
    with pytest.warns(UserWarning, match="1 layers saw fewer calibration rows than they have inputs"):
        quantize_model(network, calibration=[(torch.randn(4, 32), "label")], forward=lambda model, pair: model(pair[0]))


def test_transformers_models_with_tied_heads_and_conv1d() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(50, (8, 16))
    dense, before = copy.deepcopy(model), model(ids).logits
    with pytest.warns(UserWarning, match="share their weight"):
        report = quantize_model(model, calibration=[{"input_ids": ids}], four_bit_fraction=1.0)
    assert len(report.layers) == 8
    assert report.skipped.keys() == {"lm_head"}
    assert (
        relative_error(model.transformer.h[0].attn.c_attn.weight, dense.transformer.h[0].attn.c_attn.weight.T.detach())
        < 0.2
    )
    assert relative_error(model(ids).logits, before.detach()) < 0.3
    embeddings = torch.randn(2, 4, 32, requires_grad=True)
    model(inputs_embeds=embeddings).logits.square().sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_timm_models() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=5
    ).eval()
    x = torch.randn(40, 3, 32, 32)
    before = model(x)
    report = quantize_model(model, exclude="head", calibration=[x], four_bit_fraction=1.0)
    assert len(report.layers) == 8
    assert {layer.method for layer in report.layers} == {"gptq"}
    assert relative_error(model(x), before.detach()) < 0.5


def _quantize_on_rank(rank: int, state: dict[str, Tensor], world: int) -> dict[str, Tensor]:
    model = Residual()
    model.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_model(model.double(), calibration=tokens(4)[rank::world])
    return model.state_dict()


def test_two_processes_equal_one(two_processes: ProcessPool) -> None:
    state = Residual().state_dict()
    expected = _quantize_on_rank(0, state, 1)
    for actual in two_processes.run(_quantize_on_rank, state, 2):
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), name
