"""Group whitening: make the covariance of every group of channels the identity over the batch.

The operator inside WhitenedCSE (arXiv 2305.17746), Shuffled-DBN (arXiv 2105.00470), decorrelated BatchNorm
(arXiv 1804.08450), IterNorm (arXiv 1904.03441) and W-MSE (arXiv 2007.06346). The d channels are cut, after an optional
permutation, into G groups of m = d / G, and each group of the batch is whitened by itself: decorrelation at
O(N d m + d m^2) instead of O(N d^2 + d^3). A new random permutation at every call turns it into an augmentation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from heliostat.components.distributed import default_group
from heliostat.cuda import group_whitening as kernels

WhiteningMethod = Literal["eigh", "newton_schulz", "cholesky"]

RELATIVE_EPS = 1e-5  # ridge of `eps=None`, in units of the group's mean channel variance


class WhiteningTransform(NamedTuple):
    """What whitening measured and applied, in permuted channel order: ``y = (x - mean) @ matrix`` in every group.

    Attributes:
        mean: ``([V,] d)`` channel means.
        matrix: ``([V,] G, m, m)`` whitening matrices W.
        eigenvalues: ``([V,] G, m)`` of the covariance, ascending, with the ridge; None unless ``method="eigh"``.
    """

    mean: Tensor
    matrix: Tensor
    eigenvalues: Tensor | None


# --- W as a function of Sigma, and dL/dSigma from Q = A^T C ----------------------------------------------------------
# A transform is a pair. Forward: Sigma (P, m, m) -> W, eigenvalues or None, tensors to save. Backward: Q (P, m, m), the
# product of the centred slab and the output's cotangent, with W and the saved tensors -> S = dL/dSigma (symmetric).
# The backward is closed form: autograd through eigh divides by eigenvalue gaps, infinite on ties and lossy near them.


def _symmetric(a: Tensor) -> Tensor:
    return (a + a.mT) / 2


def _eigh_forward(sigma: Tensor, _: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """W = Sigma^(-1/2) = U diag(lam^-1/2) U^T."""
    lam, u = torch.linalg.eigh(sigma)
    # Rounding can make an eigenvalue of a singular covariance negative: hold it at the precision of the largest.
    largest = lam[:, -1:]
    root = lam.maximum(torch.where(largest > 0, largest * torch.finfo(lam.dtype).eps, 1.0)).sqrt()
    return (u / root[:, None, :]) @ u.mT, lam, (u, root)


def _eigh_backward(q: Tensor, _: Tensor, u: Tensor, root: Tensor) -> Tensor:
    # K_ij = (lam_i^-1/2 - lam_j^-1/2) / (lam_i - lam_j), written without the differences
    k = -1 / (root[:, :, None] * root[:, None, :] * (root[:, :, None] + root[:, None, :]))
    return u @ (k * (u.mT @ _symmetric(q) @ u)) @ u.mT


def _newton_schulz_forward(sigma: Tensor, iterations: int) -> tuple[Tensor, None, tuple[Tensor, ...]]:
    """W_T = P_T / sqrt(tau), tau = tr Sigma, by the coupled iteration R = 1.5 I - 0.5 P Y; Y <- Y R; P <- R P.

    In exact arithmetic P_T is that of IterNorm's P <- 1.5 P - 0.5 P^3 Sigma / tau, which float32 loses after ten steps.
    """
    eye = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)
    tau = sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    tau = tau.clamp_min(torch.finfo(sigma.dtype).tiny)  # a constant group whitens to zero, not to NaN
    y, p = sigma / tau, eye.expand_as(sigma)
    steps = []
    for _ in range(iterations):
        r = torch.baddbmm(eye, p, y, beta=1.5, alpha=-0.5)
        steps += [y, p, r]
        y, p = y @ r, r @ p
    return p / tau.sqrt(), None, (sigma, tau, *steps)


def _newton_schulz_backward(q: Tensor, w: Tensor, sigma: Tensor, tau: Tensor, *steps: Tensor) -> Tensor:
    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((-2, -1), keepdim=True)

    gw = _symmetric(q)
    gp, gy = gw / tau.sqrt(), torch.zeros_like(gw)
    for k in range(len(steps) - 3, -1, -3):
        y, p, r = steps[k : k + 3]
        gr = y.mT @ gy + gp @ p.mT
        gy = torch.baddbmm(gy @ r.mT, p.mT, gr, alpha=-0.5)
        gp = torch.baddbmm(r.mT @ gp, gr, y.mT, alpha=-0.5)
    gtau = -0.5 * inner(gw, w) / tau - inner(gy, sigma) / tau.square()
    return _symmetric(gy) / tau + gtau * torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device)


def _cholesky_forward(sigma: Tensor, _: int) -> tuple[Tensor, None, tuple[Tensor, ...]]:
    """W = L^-T with Sigma = L L^T: cheaper, not ZCA, and dependent on the order of the channels (W-MSE)."""
    lower = torch.linalg.cholesky(sigma)
    eye = torch.eye(sigma.shape[-1], dtype=sigma.dtype, device=sigma.device).expand_as(sigma)
    return torch.linalg.solve_triangular(lower, eye, upper=False).mT, None, ()


def _cholesky_backward(q: Tensor, w: Tensor) -> Tensor:
    phi = (q.mT @ w).tril()  # lower triangle of C^T Y, its diagonal halved
    phi.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    return -_symmetric(w @ phi @ w.mT)


class _Transform(NamedTuple):
    forward: Callable[[Tensor, int], tuple[Tensor, Tensor | None, tuple[Tensor, ...]]]
    backward: Callable[..., Tensor]


_TRANSFORMS = {
    "eigh": _Transform(_eigh_forward, _eigh_backward),
    "newton_schulz": _Transform(_newton_schulz_forward, _newton_schulz_backward),
    "cholesky": _Transform(_cholesky_forward, _cholesky_backward),
}


def _regularise(sigma: Tensor, eps: float | None) -> Tensor:
    """Add the ridge: ``eps``, or RELATIVE_EPS times the group's mean variance (a constant for the gradient)."""
    ridge: Tensor | float = eps if eps is not None else RELATIVE_EPS
    if eps is None:
        variance = sigma.diagonal(dim1=-2, dim2=-1).mean(-1)
        ridge = (ridge * variance).clamp_min(1e-12)[:, None]  # a constant group stays invertible
    sigma = sigma.clone()
    sigma.diagonal(dim1=-2, dim2=-1).add_(ridge)
    return sigma


def _solve(sigma: Tensor, method: str, iterations: int) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    try:
        return _TRANSFORMS[method].forward(sigma, iterations)
    except torch.linalg.LinAlgError as error:
        if not sigma.isfinite().all():
            raise ValueError("x holds NaN or infinite values, so its covariance cannot be whitened") from error
        raise ValueError(
            "a group's covariance is singular to working precision: raise `eps`, use larger batches or smaller groups"
        ) from error


# Inside, a channel is a row (V, d, N): a permutation then moves whole rows, and a group's slab (m, N) is contiguous.
# Data are moved view by view, so that temporaries are small enough to stay in the cache.


def _to_channels(x: Tensor, order: Tensor | None) -> Tensor:
    """(V, N, d) -> (V, d, N), a new contiguous tensor with the channels in the given order, float32 at least."""
    views, rows, dim = x.shape
    channels = torch.empty(views, dim, rows, dtype=_statistics_dtype(x), device=x.device)
    for v in range(views):
        if order is None:
            channels[v].copy_(x[v].T)
        else:
            torch.index_select(x[v].T.contiguous().to(channels.dtype), 0, order[v], out=channels[v])
    return channels


def _put_channels(target: Tensor, channels: Tensor, inverse: Tensor | None) -> None:
    """Write a view's channels (d, N) to ``target`` (N, d), put back by the inverse of their order."""
    target.copy_((channels if inverse is None else channels.index_select(0, inverse)).T)


class _GroupWhiten(torch.autograd.Function):
    """All views and groups in one batch of P = V * G problems, with the closed-form backward.

    On a CUDA device the kernels of `heliostat.cuda.group_whitening` do the same where they fit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        order: Tensor | None,
        inverse: Tensor | None,
        groups: int,
        eps: float | None,
        method: str,
        iterations: int,
        detach_transform: bool,
        process_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        views, rows, dim = x.shape
        with torch.autocast(x.device.type, enabled=False):
            channels = _to_channels(x, order)
            total = channels.sum(2)  # (V, d)
            count = torch.full((), rows, dtype=total.dtype, device=x.device)
            if process_group is not None:
                packed = torch.cat([total.flatten(), count[None]])
                dist.all_reduce(packed, group=process_group)
                total, count = packed[:-1].view_as(total), packed[-1]
            mean = total / count
            at = channels.sub_(mean[:, :, None]).view(views * groups, dim // groups, rows)  # A^T (P, m, N)
            covariance = torch.bmm(at, at.mT).div_(count)
            if process_group is not None:
                dist.all_reduce(covariance, group=process_group)  # the ranks' shares sum to A^T A / N
            w, lam, saved = _solve(_regularise(covariance, eps), method, iterations)
            y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for v in range(views):
                own = slice(v * groups, (v + 1) * groups)
                _put_channels(
                    y[v], torch.bmm(w[own].mT, at[own]).flatten(0, 1), None if inverse is None else inverse[v]
                )
        ctx.order, ctx.inverse, ctx.dtype = order, inverse, x.dtype
        ctx.method, ctx.process_group = method, process_group
        ctx.save_for_backward(w, count, *(() if detach_transform else (at, *saved)))
        lead = views, groups
        lam = w.new_empty(0) if lam is None else lam.unflatten(0, lead)
        auxiliary = mean, w.unflatten(0, lead), lam, covariance.unflatten(0, lead)
        ctx.mark_non_differentiable(*auxiliary)
        return y, *auxiliary

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        w, count, *saved = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            views = len(grad)
            ct = _to_channels(grad, ctx.order).view(len(w), w.shape[1], -1)  # C^T (P, m, N)
            total = ct.sum(2)
            q = torch.bmm(saved[0], ct.mT) if saved else None
            if ctx.process_group is not None:
                packed = total.flatten() if q is None else torch.cat([total.flatten(), q.flatten()])
                dist.all_reduce(packed, group=ctx.process_group)
                total = packed[: total.numel()].view_as(total)
                q = None if q is None else packed[total.numel() :].view_as(q)
            ct.sub_((total / count)[:, :, None])
            s = None if q is None else _TRANSFORMS[ctx.method].backward(q, w, *saved[1:]) * (2 / count)
            dx = torch.empty(grad.shape, dtype=ctx.dtype, device=grad.device)
            groups = len(w) // views
            for v in range(views):
                own = slice(v * groups, (v + 1) * groups)
                d = torch.bmm(w[own], ct[own])
                if s is not None:
                    d.baddbmm_(s[own], saved[0][own])
                _put_channels(dx[v], d.flatten(0, 1), None if ctx.inverse is None else ctx.inverse[v])
        return dx, *(None,) * 8


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# --- arguments -------------------------------------------------------------------------------------------------------


def _resolve_groups(dim: int, rows: int, num_groups: int | None, group_size: int | None) -> int:
    """Number of groups from either argument; neither: the largest group size that divides d and is <= N / 2."""
    if num_groups is not None and group_size is not None and num_groups * group_size != dim:
        raise ValueError(
            f"num_groups={num_groups} and group_size={group_size} contradict each other for d = {dim}: pass only one"
        )
    name, value = ("group_size", group_size) if num_groups is None else ("num_groups", num_groups)
    if value is None:
        return dim // max(m for m in range(1, dim + 1) if dim % m == 0 and (m <= rows // 2 or m == 1))
    if value < 1 or dim % value:
        divisors = [m for m in range(1, dim + 1) if dim % m == 0]
        raise ValueError(f"{name} must divide the number of channels d = {dim}, got {value}; choose one of {divisors}")
    return value if num_groups is not None else dim // value


def _inverse_permutations(permutations: Tensor) -> Tensor:
    views, dim = permutations.shape
    # Asking a GPU for the answer would make the host wait for it at every step.
    if not permutations.is_cuda and (permutations.amin() < 0 or permutations.amax() >= dim):
        raise ValueError(f"permutations must hold every channel 0..{dim - 1} exactly once")
    places = torch.arange(dim, device=permutations.device).expand(views, -1)
    inverse = torch.full_like(permutations, -1).scatter_(1, permutations, places)
    if not permutations.is_cuda and inverse.amin() < 0:  # a channel that none of the d entries names
        raise ValueError(f"permutations must hold every channel 0..{dim - 1} exactly once")
    return inverse


def _check_statistics(
    x: Tensor, rows: int, group_size: int, eps: float | None, method: str, detach_transform: bool
) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    if rows < 2:
        raise ValueError(f"whitening needs at least 2 rows to measure a covariance, got N = {rows}")
    if eps is not None and not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be a finite number >= 0, or None for a relative ridge, got {eps}")
    if eps == 0 and rows - 1 < group_size and method != "newton_schulz":  # whose gain is bounded
        raise ValueError(
            f"with eps = 0 and N = {rows} rows the covariance of a group of {group_size} channels is singular: raise "
            f"eps or N, or use smaller groups (group_size <= {rows - 1})"
        )
    if detach_transform and rows < 2 * group_size:
        warnings.warn(
            f"detach_transform with N = {rows} rows and groups of {group_size} channels: the gradient grows as "
            f"eps^-1/2 when N is not well above the group size. Use group_size <= {rows // 2} or "
            "detach_transform=False.",
            stacklevel=4,
        )


def group_whiten_views(
    x: Tensor,
    permutations: Tensor | None = None,
    *,
    num_groups: int | None = None,
    group_size: int | None = None,
    eps: float | None = 1e-5,
    method: WhiteningMethod = "eigh",
    ns_iters: int | None = None,
    detach_transform: bool = False,
    process_group: dist.ProcessGroup | None = None,
    return_transform: bool = False,
) -> Any:
    """Whiten several views of a batch at once, each with its own statistics and channel permutation.

    The same as stacking ``group_whiten(x[v], permutation=permutations[v], ...)``, in one batched computation.

    Args:
        x: Shape ``(V, N, d)``.
        permutations: Shape ``(V, d)``, int64, one channel order a view; default: the given order.
        num_groups: See `group_whiten`, as all other arguments.
        group_size: Channels a group.
        eps: Ridge.
        method: How W is found.
        ns_iters: Iterations of Newton-Schulz.
        detach_transform: Take W as a constant in backward.
        process_group: Synchronise statistics over these processes.
        return_transform: Also return what was measured.

    Returns:
        Shape ``(V, N, d)``; with ``return_transform``, the pair of it and a `WhiteningTransform`.
    """
    y, transform, _ = _whiten(
        x, permutations, num_groups, group_size, eps, method, ns_iters, detach_transform, process_group
    )
    return (y, transform) if return_transform else y


def _whiten(
    x: Tensor,
    permutations: Tensor | None,
    num_groups: int | None,
    group_size: int | None,
    eps: float | None,
    method: WhiteningMethod,
    ns_iters: int | None,
    detach_transform: bool,
    process_group: dist.ProcessGroup | None,
) -> tuple[Tensor, WhiteningTransform, Tensor]:
    """Check the arguments and whiten; also returns the covariances (V, G, m, m) without the ridge."""
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must have shape (V, N, d) without empty dimensions, got {tuple(x.shape)}")
    views, rows, dim = x.shape
    all_rows = rows * (process_group.size() if process_group is not None else 1)
    groups = _resolve_groups(dim, all_rows, num_groups, group_size)
    size = dim // groups
    if method not in _TRANSFORMS:
        raise ValueError(f"method must be one of {sorted(_TRANSFORMS)}, got {method!r}")
    if ns_iters is not None and (method != "newton_schulz" or ns_iters < 1):
        raise ValueError(f"ns_iters must be >= 1 and belongs to method='newton_schulz', got {ns_iters} with {method!r}")
    use_kernels = process_group is None and kernels.usable(x, groups, method)
    inverse = None
    if permutations is not None:
        if tuple(permutations.shape) != (views, dim) or permutations.dtype != torch.int64:
            raise ValueError(
                f"permutations must be int64 of shape {(views, dim)}, got {permutations.dtype} of shape "
                f"{tuple(permutations.shape)}"
            )
        if not (use_kernels and permutations.is_cuda):  # the kernels need no inverse
            inverse = _inverse_permutations(permutations).to(x.device)
        permutations = permutations.to(x.device)
    _check_statistics(x, all_rows, size, eps, method, detach_transform)
    # Five steps do not whiten larger groups: a small direction gains at most a factor 1.5 a step.
    iterations = ns_iters or (5 if size <= 16 else 10)
    if use_kernels:
        ridge, relative = (RELATIVE_EPS, True) if eps is None else (eps, False)
        y, mean, matrix, lam, covariance = kernels.whiten(
            x, permutations, groups, ridge, relative, method, iterations, detach_transform
        )
        return y, WhiteningTransform(mean, matrix, lam if lam.numel() else None), covariance
    y, mean, matrix, lam, covariance = _GroupWhiten.apply(
        x, permutations, inverse, groups, eps, method, iterations, detach_transform, process_group
    )
    return y, WhiteningTransform(mean, matrix, lam if lam.numel() else None), covariance


def group_whiten(
    x: Tensor,
    *,
    num_groups: int | None = None,
    group_size: int | None = None,
    permutation: Tensor | None = None,
    eps: float | None = 1e-5,
    method: WhiteningMethod = "eigh",
    ns_iters: int | None = None,
    detach_transform: bool = False,
    process_group: dist.ProcessGroup | None = None,
    return_transform: bool = False,
) -> Any:
    """Whiten groups of channels over the batch, so that every group's covariance is the identity.

        Sigma_g = A_g^T A_g / N + eps I,   W_g = Sigma_g^(-1/2),   Y_g = A_g W_g

    where A_g (N, m) holds the centred channels of group g after the permutation; Y is put back into the order of the
    input. Population statistics, in float32 at least and outside autocast, whatever the input's dtype.

    Args:
        x: Batch of shape ``(N, d)``, N >= 2.
        num_groups: G, a divisor of d. Give this or ``group_size``; neither: the largest m that divides d with
            m <= N / 2.
        group_size: m = d / G, a divisor of d. Keep m well below N: for m >= N - 1 whitening makes every batch the
            same simplex and erases all similarity between its rows.
        permutation: int64 ``(d,)``: group g takes the channels ``permutation[g * m : (g + 1) * m]``; default: as given.
        eps: Ridge added to the variances, absolute, >= 0. ``None``: 1e-5 of the group's mean variance.
        method: ``"eigh"`` is exact ZCA. ``"newton_schulz"`` is ZCA by ``ns_iters`` matrix products (IterNorm), which
            amplifies a small direction by at most ``1.5 ** ns_iters / sqrt(trace)`` and so never blows up.
            ``"cholesky"`` is the W-MSE form: cheapest, not ZCA, dependent on the order of channels.
        ns_iters: Newton-Schulz steps; default: 5 (IterNorm) for m <= 16, else 10, since 5 do not whiten larger groups.
        detach_transform: Treat W as a constant in backward, as WhitenedCSE's released code does. Half the cost; the
            gradient grows as eps^-1/2 when N is not well above m.
        process_group: Synchronise the statistics over these processes, which then equal one process holding all rows
            (numbers of rows may differ). ``None``: each process by itself.
        return_transform: Also return mean, W and eigenvalues.

    Returns:
        Whitened batch ``(N, d)`` in the dtype of ``x``; with ``return_transform``, the pair of it and a
        `WhiteningTransform` ``(mean, matrix, eigenvalues)``.

    Raises:
        ValueError: If shapes or arguments do not fit, if N < 2, if ``eps == 0`` and N - 1 < m (singular; not for
            Newton-Schulz), or if x holds non-finite values (Newton-Schulz, and any method by the kernels of a CUDA
            device, returns them as NaN).

    On a CUDA device with CuPy, ``"eigh"`` and ``"newton_schulz"`` run as one kernel each way, for groups of up to 96
    channels in float32, bfloat16 or float16 and without ``process_group``; all else is plain torch operations.

    Example:
        >>> import torch
        >>> from heliostat.components import group_whiten
        >>> y = group_whiten(torch.randn(64, 24, generator=torch.Generator().manual_seed(0)), group_size=6, eps=0.0)
        >>> torch.allclose(y[:, :6].T @ y[:, :6] / 64, torch.eye(6), atol=1e-5)
        True
    """
    if x.ndim != 2:
        raise ValueError(f"x must have shape (N, d), got {tuple(x.shape)}; for several views use group_whiten_views")
    permutations = None if permutation is None else permutation[None]
    y, transform, _ = _whiten(
        x[None], permutations, num_groups, group_size, eps, method, ns_iters, detach_transform, process_group
    )
    if not return_transform:
        return y[0]
    mean, matrix, eigenvalues = transform
    return y[0], WhiteningTransform(mean[0], matrix[0], None if eigenvalues is None else eigenvalues[0])


# --- modules ---------------------------------------------------------------------------------------------------------


class GroupWhitening(nn.Module):
    """`group_whiten` as a layer for features of shape ``(N, d)``: decorrelated BatchNorm without affine parameters.

    In training it whitens with the batch's statistics. In evaluation it uses running statistics if it tracks them,
    else the batch's, as `torch.nn.BatchNorm1d` does.

    Args:
        num_features: Number of channels d.
        num_groups: See `group_whiten`, as ``group_size``, ``eps``, ``method``, ``ns_iters``, ``detach_transform``.
        group_size: Channels a group.
        eps: Ridge.
        method: How W is found.
        ns_iters: Iterations of Newton-Schulz.
        detach_transform: Take W as a constant in backward.
        track_running_stats: Keep averages of mean and covariance, for evaluation.
        momentum: Weight of the newest batch in the averages, in (0, 1].
        sync: Use the statistics of all processes whenever `torch.distributed` runs.
    """

    running_mean: Tensor | None
    running_covariance: Tensor | None

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int | None = None,
        group_size: int | None = None,
        eps: float | None = 1e-5,
        method: WhiteningMethod = "eigh",
        ns_iters: int | None = None,
        detach_transform: bool = False,
        track_running_stats: bool = False,
        momentum: float = 0.1,
        sync: bool = True,
    ) -> None:
        super().__init__()
        if num_groups is None and group_size is None:
            raise ValueError("GroupWhitening needs num_groups or group_size")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        self.num_features, self.eps, self.method, self.ns_iters = num_features, eps, method, ns_iters
        self.num_groups = _resolve_groups(num_features, 0, num_groups, group_size)
        self.detach_transform, self.momentum, self.sync = detach_transform, momentum, sync
        size = num_features // self.num_groups
        self.register_buffer("running_mean", torch.zeros(num_features) if track_running_stats else None)
        self.register_buffer(
            "running_covariance", torch.eye(size).repeat(self.num_groups, 1, 1) if track_running_stats else None
        )

    def extra_repr(self) -> str:
        """Show the settings that matter in ``print(module)``."""
        return f"{self.num_features}, num_groups={self.num_groups}, eps={self.eps}, method={self.method!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Whiten ``x`` of shape ``(N, d)``."""
        if x.ndim != 2 or x.shape[1] != self.num_features:
            raise ValueError(f"x must have shape (N, {self.num_features}), got {tuple(x.shape)}")
        if self.running_mean is not None and not self.training:
            return self._whiten_by_running_statistics(x)
        y, transform, covariance = _whiten(
            x[None],
            None,
            self.num_groups,
            None,
            self.eps,
            self.method,
            self.ns_iters,
            self.detach_transform,
            default_group() if self.sync else None,
        )
        if self.running_mean is not None and self.running_covariance is not None:
            self.running_mean.lerp_(transform.mean[0].to(self.running_mean), self.momentum)
            self.running_covariance.lerp_(covariance[0].to(self.running_covariance), self.momentum)
        return y[0]

    def _whiten_by_running_statistics(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_covariance is not None
        size = self.num_features // self.num_groups
        w, _, _ = _solve(
            _regularise(self.running_covariance, self.eps), self.method, self.ns_iters or (5 if size <= 16 else 10)
        )
        with torch.autocast(x.device.type, enabled=False):
            at = (x.to(w.dtype) - self.running_mean).T.unflatten(0, (self.num_groups, -1))
            return (w.mT @ at).flatten(0, 1).T.to(x.dtype)


class ShuffledGroupWhitening(nn.Module):
    """Group whitening with new random groups at every call (SGW), for one batch or for several views of it.

    For training only: in evaluation its output would depend on chance and on the rows that happen to share a batch, so
    it refuses. The permutations come from a generator of its own, saved in the state dict, so that neither dropout nor
    a resumed run is disturbed. With several processes all use the permutations of rank 0.

    Args:
        num_features: Number of channels d.
        num_groups: See `group_whiten`, as ``group_size``, ``eps``, ``method``, ``ns_iters``, ``detach_transform``.
        group_size: Channels a group.
        eps: Ridge.
        method: How W is found.
        ns_iters: Iterations of Newton-Schulz.
        detach_transform: Take W as a constant in backward.
        generator: CPU generator of the permutations; default: a new one, seeded from torch's global generator.
        sync: Use the statistics of all processes whenever `torch.distributed` runs.
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int | None = None,
        group_size: int | None = None,
        eps: float | None = 1e-5,
        method: WhiteningMethod = "eigh",
        ns_iters: int | None = None,
        detach_transform: bool = False,
        generator: torch.Generator | None = None,
        sync: bool = True,
    ) -> None:
        super().__init__()
        self.num_features, self.sync = num_features, sync
        self.settings: dict[str, Any] = {
            "num_groups": num_groups,
            "group_size": group_size,
            "eps": eps,
            "method": method,
            "ns_iters": ns_iters,
            "detach_transform": detach_transform,
        }
        if num_groups is not None or group_size is not None:
            _resolve_groups(num_features, 0, num_groups, group_size)
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self.generator = generator

    def extra_repr(self) -> str:
        """Show the settings in ``print(module)``."""
        return f"{self.num_features}, " + ", ".join(f"{k}={v!r}" for k, v in self.settings.items() if v is not None)

    def get_extra_state(self) -> Tensor:
        """State of the generator of permutations."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the generator of permutations."""
        self.generator.set_state(state.cpu())

    def draw_permutations(self, views: int, device: torch.device | None = None) -> Tensor:
        """Draw one channel order a view, ``(V, d)``, the same on all processes."""
        permutations = torch.stack([torch.randperm(self.num_features, generator=self.generator) for _ in range(views)])
        permutations = permutations.to(device)
        if self.sync and default_group() is not None:
            dist.broadcast(permutations, src=0)
        return permutations

    def forward(self, x: Tensor, permutations: Tensor | None = None) -> Tensor:
        """Whiten ``(N, d)`` or views ``(V, N, d)``; ``permutations`` ``(V, d)`` replace the random ones."""
        if not self.training:
            raise RuntimeError(
                "ShuffledGroupWhitening is for training: in evaluation its result would depend on chance and on the "
                "other rows of the batch. Use the features before it, or call group_whiten directly."
            )
        if x.ndim not in (2, 3) or x.shape[-1] != self.num_features:
            raise ValueError(f"x must have shape ([V,] N, {self.num_features}), got {tuple(x.shape)}")
        views = x if x.ndim == 3 else x[None]
        if permutations is None:
            permutations = self.draw_permutations(len(views), x.device)
        y = group_whiten_views(
            views, permutations, process_group=default_group() if self.sync else None, **self.settings
        )
        return y if x.ndim == 3 else y[0]
