"""Torch operators of the group whitening kernels: ``heliostat::group_whiten`` and its backward.

`heliostat.components.group_whiten` is the entry for users and holds the mathematics; here is which launches it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heliostat.cuda import _launch

METHODS = {"eigh": 0, "newton_schulz": 1}  # the value of METHOD
LARGEST = 96  # channels a group; beyond, whitening is plain large products, which torch does as well
THREADS = 256
# Up to so many rows one block whitens a group, all phases in one launch. Beyond, each phase is a launch over slabs of
# rows: its blocks fill the device, and the sums over rows must be complete before the root. Not yet tuned on a GPU.
ONE_LAUNCH_ROWS = 512
STATS_ROWS = 512
APPLY_ROWS = 256


def _tile(size: int) -> int:
    return min(tile for tile in (1, 2, 3, 4, 6) if size <= 16 * tile)


def shared_bytes(size: int, method: str, kernel: str) -> int:
    """Shared memory that a kernel's block needs, as ``group_whitening.cu`` lays it out."""
    tile = _tile(size)
    lanes = -(-size // (2 * tile if tile <= 4 else tile))
    even = size + size % 2
    ld = even + 1
    matrix, rows = size * ld, THREADS // lanes * 4 * ld
    jacobi = 2 * even * ld + size + 5 * even // 2
    phases = {
        "forward_stats": matrix + rows,
        "forward_root": jacobi if method == "eigh" else 3 * matrix,
        "forward_apply": matrix + rows,
        "backward_stats": matrix + 2 * rows,
        "backward_root": 3 * matrix + size if method == "eigh" else 6 * matrix,
        "backward_apply": 2 * matrix + 2 * rows,
    }
    work = max(need for name, need in phases.items() if name.startswith(kernel))
    return 4 * (2 * size + THREADS + work)


def usable(x: Tensor, groups: int, method: str) -> bool:
    """Whether the kernels whiten ``x`` (V, N, d); False is always right, and the plain torch operations do it."""
    size = x.shape[2] // groups
    allowed = _launch.shared_memory_for_kernels(x.device.type, x.device.index, "group_whiten")
    if not allowed or x.dtype not in _launch.DTYPES or method not in METHODS or size > LARGEST:
        return False
    return max(shared_bytes(size, method, direction) for direction in ("forward", "backward")) <= allowed


def whiten(
    x: Tensor,
    order: Tensor | None,
    groups: int,
    eps: float,
    relative: bool,
    method: str,
    iterations: int,
    detach_transform: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Whiten ``x`` (V, N, d), for which `usable` must hold.

    Args:
        x: Shape ``(V, N, d)``.
        order: int64 ``(V, d)``, the channels group after group; None: as they lie. On a GPU it must be a permutation,
            unchecked but for its range.
        groups: G, a divisor of d.
        eps: Ridge.
        relative: Whether ``eps`` is in units of a group's mean variance.
        method: A key of `METHODS`.
        iterations: Steps of Newton-Schulz.
        detach_transform: Take W as a constant in backward.

    Returns:
        y as ``x``; and without gradient, in float32: mean ``(V, d)``, W ``(V, G, m, m)``, eigenvalues ``(V, G, m)``
        (empty for Newton-Schulz), covariance ``(V, G, m, m)``. Non-finite input gives NaN: to refuse it, the host would
        have to wait for the device.
    """
    keep = not detach_transform and x.requires_grad and torch.is_grad_enabled()
    settings = groups, eps, relative, method, iterations, detach_transform
    y, *auxiliary = torch.ops.heliostat.group_whiten(x.contiguous(), order, *settings, keep)
    mean, covariance, w, lam, _ = (tensor.detach() for tensor in auxiliary)
    return y, mean, w, lam, covariance


# --- operators -------------------------------------------------------------------------------------------------------

_SETTINGS = "int groups, float eps, bool relative, str method, int iterations, bool detached"


class _Plan(NamedTuple):
    """The launches of one direction: which kernel, with how many blocks, over how many rows a slab."""

    launches: list[tuple[str, tuple[int, ...], int]]
    slabs: int  # of the sums over rows


def _plan(direction: str, rows: int, problems: int) -> _Plan:
    if rows <= ONE_LAUNCH_ROWS:
        return _Plan([(direction, (problems,), rows)], 1)
    slabs = -(-rows // STATS_ROWS)
    launches = [
        (f"{direction}_stats", (problems, slabs), STATS_ROWS),
        (f"{direction}_root", (problems,), STATS_ROWS),
        (f"{direction}_apply", (problems, -(-rows // APPLY_ROWS)), APPLY_ROWS),
    ]
    return _Plan(launches, slabs)


def defines(dtype: torch.dtype, size: int, method: str, *, one_launch: bool) -> _launch.Defines:
    """The macros to compile with."""
    dtype_code = _launch.DTYPES[dtype]
    return (("DTYPE", dtype_code), ("TILE", _tile(size)), ("METHOD", METHODS[method]), ("SLABS", int(not one_launch)))


def _run(plan: _Plan, x: Tensor, size: int, method: str, pointers: Sequence[Tensor | None], *settings: float) -> None:
    rows, dim = x.shape[1:]
    macros = defines(x.dtype, size, method, one_launch=len(plan.launches) == 1)
    for kernel, grid, slab_rows in plan.launches:
        arguments = (*pointers, rows, dim, size, plan.slabs, slab_rows, *settings)
        need = shared_bytes(size, method, kernel)
        _launch.launch("group_whitening", macros, kernel, grid, THREADS, need, arguments)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order[:, None, :].expand_as(x))


def _split_order(rows: int, order: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The order that the kernels follow and the order to bring x into first; one of them is None.

    One launch follows the order itself, entry by entry, while the rows stay in the cache. With more rows than that,
    reading single entries would fetch eight times the bytes: the channels are brought into order once, row by row.
    """
    return (order, None) if rows <= ONE_LAUNCH_ROWS else (None, order)


@torch.library.custom_op(
    "heliostat::group_whiten",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? order, {_SETTINGS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    x: Tensor,
    order: Tensor | None,
    groups: int,
    eps: float,
    relative: bool,
    method: str,
    iterations: int,
    detached: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    outputs = _forward_outputs(x, order, groups, eps, relative, method, iterations, detached, keep)
    y, mean, covariance, w, lam, saved = outputs
    views, rows, dim = x.shape
    size = dim // groups
    order, first = _split_order(rows, order)
    if first is not None:
        x = _in_order(x, first)
    plan = _plan("forward", rows, views * groups)
    means = mean.new_empty(views * groups, plan.slabs, size)
    products = mean.new_empty(views * groups, plan.slabs, size, size)
    pointers = (x, order, means, products, mean, covariance, w, lam, saved, y)
    _run(plan, x, size, method, pointers, eps, int(relative), iterations)
    if first is not None:
        y = _in_order(y, first.argsort(1))
    return y, mean, covariance, w, lam, saved


@_forward.register_fake
def _forward_outputs(
    x: Tensor,
    order: Tensor | None,
    groups: int,
    eps: float,
    relative: bool,
    method: str,
    iterations: int,
    detached: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    views, _, dim = x.shape
    size = dim // groups
    mean = x.new_empty((views, dim), dtype=torch.float32)
    covariance = mean.new_empty(views, groups, size, size)
    lam = mean.new_empty((views, groups, size) if method == "eigh" else (0,))
    steps = () if method == "eigh" else (iterations, 2)
    saved = mean.new_empty((views, groups, *steps, size, size) if keep else (0,))
    return torch.empty_like(x), mean, covariance, torch.empty_like(covariance), lam, saved


@torch.library.custom_op(
    "heliostat::group_whiten_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor? order, Tensor mean, Tensor covariance, Tensor w, Tensor lam, "
    f"Tensor saved, {_SETTINGS}) -> Tensor",
)
def _backward(
    grad: Tensor,
    x: Tensor,
    order: Tensor | None,
    mean: Tensor,
    covariance: Tensor,
    w: Tensor,
    lam: Tensor,
    saved: Tensor,
    groups: int,
    eps: float,
    relative: bool,
    method: str,
    iterations: int,
    detached: bool,
) -> Tensor:
    views, rows, dim = x.shape
    size = dim // groups
    order, first = _split_order(rows, order)
    if first is not None:
        x, grad = _in_order(x, first), _in_order(grad, first)
    plan = _plan("backward", rows, views * groups)
    sums = mean.new_empty(views * groups, plan.slabs, size)
    grad_mean = torch.empty_like(mean)
    # Constant transforms need no products of x and grad, and no gradient of the covariance.
    products = mean.new_empty(views * groups, plan.slabs, size, size) if not detached else None
    grad_sigma = torch.empty_like(w) if not detached else None
    dx = torch.empty_like(x)
    pointers = (x, grad, order, mean, covariance, w, lam, saved, sums, products, grad_mean, grad_sigma, dx)
    _run(plan, x, size, method, pointers, eps, int(relative), iterations, int(detached))
    return dx if first is None else _in_order(dx, first.argsort(1))


@_backward.register_fake
def _(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, order, *ctx.settings, _ = inputs
    ctx.save_for_backward(x, order, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    dx = torch.ops.heliostat.group_whiten_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return dx, *(None,) * 8


_forward.register_autograd(_differentiate, setup_context=_setup_context)
