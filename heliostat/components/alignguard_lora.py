"""AlignGuard-LoRA: keep an aligned model's alignment through fine-tuning (arXiv 2508.02079).

Once, the Fisher information of alignment data (prompts with the aligned model's answers) tells in which directions of
each weight matrix that behaviour is sensitive. In training, the update X of a matrix, X = s B A for LoRA, is split into
the part inside those directions and the rest; the first is penalised by the Fisher curvature, the second mildly. For
learning a task from an aligned checkpoint without alignment data in the training batches. Only what the alignment data
exercises is protected, and only near the checkpoint: the Fisher information is local.

    L = L_task + sum over matrices of  lambda_A E_A + lambda_T E_T + lambda_NC (alpha E_RM + (1 - alpha) E_geo)
    E_A = sum_k Lam_k K_k^2,  E_T = h (|X|^2 - sum_k K_k^2),  K_k = <u_k, X>  for orthonormal critical directions u_k

E_geo is 0 with gradient 0 for every orthogonal projector, which all of these are; `geodesic_overlap` is here for other
metrics. The update and its gradients are handled in factors: no d_out x d_in matrix is formed but by E_RM, in row
chunks, and by `DenseFisher`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heliostat.components.distributed import default_group

Normalization = Literal["mean", "layer", "none"]
Reduction = Literal["mean", "sum"]
LossFunction = Callable[[nn.Module, Any], Tensor]

_LARGEST_EIGH = 1024  # larger moments get subspace iteration,
_MOST_ITERATIONS = 100  # of which twenty are usual
_MOMENT_BYTES = 2**32  # of the layers whose moments are gathered in one pass
_CHUNK_ELEMENTS = 2**22  # of the rows of X that E_RM forms at a time


class KroneckerFisher(NamedTuple):
    """Fisher information of a weight matrix, diagonal in the basis of pairs u_i v_j^T.

    All fields may have leading dimensions in common, for layers of the same shape handled at once.

    Attributes:
        basis_out: U_out, eigenvectors of the output gradients' second moment, ``(d_out, k_out)``, orthonormal columns.
        basis_in: U_in, eigenvectors of the inputs' second moment, ``(d_in, k_in)``, orthonormal columns.
        eigenvalues: Lam, the Fisher information's exact diagonal in that basis, ``(k_out, k_in)``, >= 0.
        mask: M, which pairs are critical directions, ``(k_out, k_in)`` bool.
        trace: tr F of the whole matrix, scalar.
    """

    basis_out: Tensor
    basis_in: Tensor
    eigenvalues: Tensor
    mask: Tensor
    trace: Tensor

    @classmethod
    def from_samples(
        cls,
        inputs: Tensor,
        output_grads: Tensor,
        rank_out: int = 32,
        rank_in: int = 32,
        top_m: int | None = None,
        valid: Tensor | None = None,
    ) -> KroneckerFisher:
        """Estimate from all samples at once.

        Args:
            inputs: What the layer got, x, ``(N, T, d_in)``.
            output_grads: Gradients of each sample's own loss with respect to the layer's output, g, ``(N, T, d_out)``;
                0 at padding.
            rank_out: k_out, at most d_out are used.
            rank_in: k_in, at most d_in are used.
            top_m: Keep the pairs with the m largest eigenvalues, and those that tie with the last. Default: all.
            valid: Which positions are not padding, ``(N, T)`` bool; default: all.

        Raises:
            ValueError: On shapes that do not fit, or without samples.
        """
        x, g = _check_samples(inputs, output_grads)
        second_in, second_out = second_moments(x, g, valid)
        basis_out, basis_in = top_eigenvectors(second_out, rank_out), top_eigenvectors(second_in, rank_in)
        squares, norms = _project_samples(x, g, basis_out, basis_in)
        eigenvalues = squares / len(x)
        return cls(basis_out, basis_in, eigenvalues, _top_mask(eigenvalues, top_m), norms / len(x))

    def project(self, delta: Tensor) -> Tensor:
        """P(X), the part of ``delta`` ``(d_out, d_in)`` in the critical directions."""
        return self.combine(self.coefficients(delta))

    def coefficients(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        """Coordinates K of X = ``left @ right``, or of X = ``left``, in the critical directions."""
        inside = self.basis_in if right is None else right @ self.basis_in
        outside = self.basis_out.mT @ left
        return self.mask * (outside @ inside)

    def combine(self, coefficients: Tensor, rows: slice = slice(None)) -> Tensor:
        """Rows of the matrix with these coordinates."""
        return self.basis_out[..., rows, :] @ (self.mask * coefficients) @ self.basis_in.mT

    def coefficients_of_rows(self, delta: Tensor, rows: slice) -> Tensor:
        """Coordinates of a matrix that is ``delta`` in these rows and 0 elsewhere."""
        return self.mask * (self.basis_out[..., rows, :].mT @ (delta @ self.basis_in))

    def pull_back(self, core: Tensor, left: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of <``core``, coefficients(left, right)> with respect to ``left`` and ``right``."""
        core = self.mask * core
        if right is None:
            return self.combine(core), None
        grad_left = self.basis_out @ (core @ (right @ self.basis_in).mT)
        grad_right = ((self.basis_out.mT @ left).mT @ core) @ self.basis_in.mT
        return grad_left, grad_right


class DenseFisher(NamedTuple):
    """The leading eigenvectors of the Fisher information itself: the literal reading, for small matrices.

    Attributes:
        basis: u_k, orthonormal, ``(m, d_out, d_in)``.
        eigenvalues: w_k, descending, ``(m,)``.
        trace: tr F, scalar.
    """

    basis: Tensor
    eigenvalues: Tensor
    trace: Tensor

    @classmethod
    def from_samples(cls, inputs: Tensor, output_grads: Tensor, top_m: int) -> DenseFisher:
        """Estimate from all samples, see `KroneckerFisher.from_samples`; at most N eigenvalues are not 0."""
        x, g = _check_samples(inputs, output_grads)
        samples = torch.einsum("nti,ntj->nij", g, x) / len(x) ** 0.5  # F = sum_n vec(G_n) vec(G_n)^T
        gram = samples.flatten(1) @ samples.flatten(1).mT
        values, vectors = torch.linalg.eigh(gram)
        keep = values > values[-1].clamp_min(0) * len(x) * torch.finfo(values.dtype).eps
        values, vectors = values[keep].flip(0)[:top_m], vectors[:, keep].flip(1)[:, :top_m]
        basis = torch.einsum("nij,nk->kij", samples, vectors / values.sqrt())
        return cls(basis, values, gram.trace())

    def project(self, delta: Tensor) -> Tensor:
        """P(X), the part of ``delta`` ``(d_out, d_in)`` in the critical directions."""
        return self.combine(self.coefficients(delta))

    def coefficients(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        """Coordinates K of X = ``left @ right``, or of X = ``left``, in the critical directions."""
        return torch.einsum("kij,ij->k", self.basis, left if right is None else left @ right)

    def combine(self, coefficients: Tensor, rows: slice = slice(None)) -> Tensor:
        """Rows of the matrix with these coordinates."""
        return torch.einsum("kij,k->ij", self.basis[:, rows], coefficients)

    def coefficients_of_rows(self, delta: Tensor, rows: slice) -> Tensor:
        """Coordinates of a matrix that is ``delta`` in these rows and 0 elsewhere."""
        return torch.einsum("kij,ij->k", self.basis[:, rows], delta)

    def pull_back(self, core: Tensor, left: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of <``core``, coefficients(left, right)> with respect to ``left`` and ``right``."""
        gradient = self.combine(core)
        return (gradient, None) if right is None else (gradient @ right.mT, left.mT @ gradient)


class DiagonalFisher(NamedTuple):
    """The entries of a weight matrix with the largest Fisher information. The collision terms vanish for it.

    Attributes:
        rows: Their rows, ``(m,)`` int64.
        columns: Their columns, ``(m,)`` int64.
        eigenvalues: f, descending, ``(m,)``.
        trace: tr F of the whole matrix, scalar.
    """

    rows: Tensor
    columns: Tensor
    eigenvalues: Tensor
    trace: Tensor

    @classmethod
    def from_samples(cls, inputs: Tensor, output_grads: Tensor, top_m: int) -> DiagonalFisher:
        """Estimate from all samples, see `KroneckerFisher.from_samples`."""
        x, g = _check_samples(inputs, output_grads)
        squares = sum(torch.einsum("ti,tj->ij", *sample).square() for sample in zip(g, x, strict=True))
        assert isinstance(squares, Tensor)
        diagonal = squares / len(x)
        values, places = diagonal.flatten().topk(min(top_m, diagonal.numel()))
        return cls(places // diagonal.shape[1], places % diagonal.shape[1], values, diagonal.sum())

    def project(self, delta: Tensor) -> Tensor:
        """P(X), ``delta`` ``(d_out, d_in)`` at the critical entries and 0 elsewhere."""
        coefficients = self.coefficients(delta)
        return torch.zeros_like(delta).index_put((self.rows, self.columns), coefficients)

    def coefficients(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        """Critical entries K of X = ``left @ right``, or of X = ``left``."""
        if right is None:
            return left[self.rows, self.columns]
        return (left[self.rows] * right[:, self.columns].mT).sum(1)

    def pull_back(self, core: Tensor, left: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of <``core``, coefficients(left, right)> with respect to ``left`` and ``right``."""
        if right is None:
            return torch.zeros_like(left).index_put((self.rows, self.columns), core), None
        grad_left = torch.zeros_like(left).index_add(0, self.rows, core[:, None] * right[:, self.columns].mT)
        grad_right = torch.zeros_like(right).index_add(1, self.columns, left[self.rows].mT * core)
        return grad_left, grad_right


Fisher = KroneckerFisher | DenseFisher | DiagonalFisher
AnyFisher = TypeVar("AnyFisher", KroneckerFisher, DenseFisher, DiagonalFisher)


class FisherEnergies(NamedTuple):
    """The terms of the penalty, scalars without gradient (with the leading dimensions of a stack of layers).

    Attributes:
        align: E_A, size of the critical part in the Fisher metric.
        task: E_T, h times the squared size of the rest. None if the reference weights are not known.
        overlap: E_RM. None if ``lambda_collision * alpha`` is 0: it would cost more than all else.
        total: lambda_A E_A + lambda_T E_T + lambda_NC alpha E_RM.
    """

    align: Tensor
    task: Tensor | None
    overlap: Tensor | None
    total: Tensor


class _Settings(NamedTuple):
    lambda_align: float
    lambda_task: float
    task_curvature: float | Tensor
    lambda_collision: float
    alpha: float
    beta: float
    tau: float
    reduction: Reduction


def lora_fisher_penalty(
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    fisher: Fisher,
    *,
    lambda_align: float = 0.25,
    lambda_task: float = 0.1,
    task_curvature: float | Tensor = 1.0,
    lambda_collision: float = 0.0,
    alpha: float = 0.5,
    beta: float = 4.0,
    tau: float = 0.01,
    reduction: Reduction = "mean",
) -> tuple[FisherEnergies, Tensor, Tensor]:
    """The penalty on X = ``scaling * lora_B @ lora_A`` and its gradients in closed form, without forming X.

    With a `KroneckerFisher` of leading dimensions ``(L,)``, the layers' factors ``(L, r, d_in)`` and ``(L, d_out, r)``
    are handled at once; ``scaling`` and ``task_curvature`` may then be ``(L,)``.

    Args:
        lora_A: peft's ``lora_A.weight``, ``(r, d_in)``.
        lora_B: peft's ``lora_B.weight``, ``(d_out, r)``.
        scaling: s, peft's ``scaling``.
        fisher: The critical directions and their curvature.
        lambda_align: lambda_A, weight of E_A; 0.05 to 1 for a normalised Fisher information.
        lambda_task: lambda_T, weight of E_T; 0 to 0.5.
        task_curvature: h of E_T.
        lambda_collision: lambda_NC, weight of the collision terms. E_RM forms X in row chunks.
        alpha: Share of E_RM in the collision terms. The rest, E_geo, is identically 0.
        beta: Of E_RM, see `riemannian_overlap`.
        tau: Of E_RM.
        reduction: ``"mean"`` or ``"sum"`` over the entries in E_RM.

    Returns:
        The energies, and the gradients of ``total`` with respect to ``lora_A`` and ``lora_B``; float32 (float64 for
        float64 factors).

    Raises:
        ValueError: On shapes that do not fit or settings out of range.
    """
    if lora_A.ndim < 2 or lora_B.ndim < 2 or lora_A.shape[-2] != lora_B.shape[-1]:
        raise ValueError(
            f"lora_A must be (r, d_in) and lora_B (d_out, r), got {tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
        )
    settings = check_penalty_settings(
        lambda_align, lambda_task, task_curvature, lambda_collision, alpha, beta, tau, reduction
    )
    with torch.no_grad(), torch.autocast(lora_A.device.type, enabled=False):
        right, left = _wide(lora_A), _wide(lora_B)
        factor = _as_matrices(scaling, left)
        fisher = _match(fisher, left, left.shape[-2], right.shape[-1])
        left = left * factor
        energies, grad_left, grad_right = _penalty(left, right, fisher, fisher.coefficients(left, right), settings)
        assert grad_right is not None
        return energies, grad_right, grad_left * factor


def weight_fisher_penalty(
    weight: Tensor,
    fisher: Fisher,
    *,
    reference: Tensor | None = None,
    reference_coefficients: Tensor | None = None,
    lambda_align: float = 0.25,
    lambda_task: float = 0.1,
    task_curvature: float | Tensor = 1.0,
    lambda_collision: float = 0.0,
    alpha: float = 0.5,
    beta: float = 4.0,
    tau: float = 0.01,
    reduction: Reduction = "mean",
) -> tuple[FisherEnergies, Tensor]:
    """The penalty on X = ``weight - reference`` for a matrix that is trained itself, and its gradient.

    Args:
        weight: W, ``(d_out, d_in)``.
        fisher: The critical directions and their curvature.
        reference: W_ref, the aligned weights, ``(d_out, d_in)``.
        reference_coefficients: In its place, if ``lambda_task`` and ``lambda_collision`` are 0, its coordinates
            ``fisher.coefficients(W_ref)``, which take far less memory.
        lambda_align: This and all others as in `lora_fisher_penalty`.
        lambda_task: lambda_T.
        task_curvature: h.
        lambda_collision: lambda_NC.
        alpha: Share of E_RM.
        beta: Of E_RM.
        tau: Of E_RM.
        reduction: Of E_RM.

    Returns:
        The energies, and the gradient of ``total`` with respect to ``weight``.

    Raises:
        ValueError: On shapes that do not fit, settings out of range, or not exactly one reference.
    """
    if (reference is None) == (reference_coefficients is None):
        raise ValueError("give either reference or reference_coefficients, the one or the other")
    if reference is None and (lambda_task != 0 or lambda_collision != 0):
        raise ValueError(
            f"lambda_task={lambda_task} and lambda_collision={lambda_collision} need the reference weights: give "
            "reference, or set both to 0"
        )
    if reference is not None and reference.shape != weight.shape:
        raise ValueError(f"reference must have weight's shape {tuple(weight.shape)}, got {tuple(reference.shape)}")
    settings = check_penalty_settings(
        lambda_align, lambda_task, task_curvature, lambda_collision, alpha, beta, tau, reduction
    )
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        wide = _wide(weight)
        fisher = _match(fisher, wide, *wide.shape[-2:])
        if reference is not None:
            delta = wide - reference.to(wide)
            energies, gradient, _ = _penalty(delta, None, fisher, fisher.coefficients(delta), settings)
            return energies, gradient
        assert reference_coefficients is not None
        moved = fisher.coefficients(wide) - reference_coefficients.to(wide)
        energies, gradient, _ = _penalty(wide, None, fisher, moved, settings)
        return energies._replace(task=None), gradient


def check_penalty_settings(
    lambda_align: float,
    lambda_task: float,
    task_curvature: float | Tensor,
    lambda_collision: float,
    alpha: float,
    beta: float,
    tau: float,
    reduction: Reduction,
) -> _Settings:
    """The settings of a penalty together; a ValueError names the one that is out of range."""
    for name, value in (
        ("lambda_align", lambda_align),
        ("lambda_task", lambda_task),
        ("lambda_collision", lambda_collision),
        ("beta", beta),
    ):
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    return _Settings(lambda_align, lambda_task, task_curvature, lambda_collision, alpha, beta, tau, reduction)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _as_matrices(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number for each matrix of a stack, made ready to multiply it."""
    return value.to(like)[..., None, None] if isinstance(value, Tensor) else value


def _match(fisher: Fisher, like: Tensor, d_out: int, d_in: int) -> Fisher:
    """The Fisher information in the dtype and on the device of what it is used with, checked against its shape."""
    if isinstance(fisher, KroneckerFisher):
        fits = (fisher.basis_out.shape[-2], fisher.basis_in.shape[-2]) == (d_out, d_in)
    elif isinstance(fisher, DenseFisher):
        fits = fisher.basis.shape[1:] == (d_out, d_in)
    else:
        fits = not len(fisher.rows) or (int(fisher.rows.max()) < d_out and int(fisher.columns.max()) < d_in)
    if not fits:
        raise ValueError(f"fisher was estimated for a matrix of another shape than {(d_out, d_in)}")
    fields = (field.to(like) if field.is_floating_point() else field.to(like.device) for field in fisher)
    return type(fisher)(*fields)


def _penalty(
    left: Tensor, right: Tensor | None, fisher: Fisher, coefficients: Tensor, settings: _Settings
) -> tuple[FisherEnergies, Tensor, Tensor | None]:
    """Energies of X = ``left @ right`` (or ``left``), and gradients with respect to both."""
    stack = left.ndim - 2
    curvature = settings.task_curvature
    if isinstance(curvature, Tensor):
        curvature = curvature.to(left)
    squares = coefficients.square().flatten(stack).sum(-1)
    align = (fisher.eigenvalues * coefficients.square()).flatten(stack).sum(-1)
    gram_left = gram_right = left.new_empty(0)
    if right is None:
        size = left.square().sum((-2, -1))
    else:  # |X|^2 = <L^T L, R R^T>
        gram_left, gram_right = left.mT @ left, right @ right.mT
        size = (gram_left * gram_right).sum((-2, -1))
    task = curvature * (size - squares)
    total = settings.lambda_align * align + settings.lambda_task * task

    isotropic = 2 * settings.lambda_task * curvature
    wide = isotropic
    if isinstance(isotropic, Tensor):
        wide = isotropic.reshape(isotropic.shape + (1,) * (coefficients.ndim - stack))
    core = (2 * settings.lambda_align * fisher.eigenvalues - wide) * coefficients
    grad_left, grad_right = fisher.pull_back(core, left, right)
    if settings.lambda_task:
        isotropic = _as_matrices(isotropic, left)
        if right is None:
            grad_left = grad_left + isotropic * left
        else:
            assert grad_right is not None
            grad_left = grad_left + isotropic * (left @ gram_right)
            grad_right = grad_right + isotropic * (gram_left @ right)

    overlap = None
    weight = settings.lambda_collision * settings.alpha
    if weight:
        overlap = torch.zeros_like(align)
        if not isinstance(fisher, DiagonalFisher):  # for which X_A and X_T have no entry in common
            overlap, overlap_left, overlap_right = _overlap_in_chunks(left, right, fisher, coefficients, settings)
            grad_left = grad_left + weight * overlap_left
            if grad_right is not None:
                grad_right = grad_right + weight * overlap_right
        total = total + weight * overlap
    return FisherEnergies(align, task, overlap, total), grad_left, grad_right


def _overlap_in_chunks(
    left: Tensor,
    right: Tensor | None,
    fisher: KroneckerFisher | DenseFisher,
    coefficients: Tensor,
    settings: _Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """E_RM and its gradients with respect to ``left`` and ``right``, a few rows of X at a time."""
    beta, tau = settings.beta, settings.tau
    d_out, d_in = left.shape[-2], (left if right is None else right).shape[-1]
    chunk = max(1, _CHUNK_ELEMENTS // (left[..., 0, 0].numel() * d_in))
    overlap = left.new_zeros(left.shape[:-2])
    projected = torch.zeros_like(coefficients)
    grad_left = torch.empty_like(left)
    grad_right = left.new_zeros(()) if right is None else torch.zeros_like(right)
    for start in range(0, d_out, chunk):
        rows = slice(start, start + chunk)
        x = left[..., rows, :] if right is None else left[..., rows, :] @ right
        a = fisher.combine(coefficients, rows)
        t = x - a
        gate = (x.abs() - tau).sigmoid()
        eta = 1 + beta * gate
        overlap += (eta * (a * t).abs()).sum((-2, -1))
        grad_t = eta * t.sign() * a.abs()
        grad_a = eta * a.sign() * t.abs()
        grad_x = grad_t + (a * t).abs() * beta * gate * (1 - gate) * x.sign()  # of X beside that through A
        projected += fisher.coefficients_of_rows(grad_a - grad_t, rows)  # X_A is in t with a minus sign
        if right is None:
            grad_left[..., rows, :] = grad_x
        else:
            grad_left[..., rows, :] = grad_x @ right.mT
            grad_right += left[..., rows, :].mT @ grad_x
    pulled_left, pulled_right = fisher.pull_back(projected, left, right)
    grad_left += pulled_left
    if pulled_right is not None:
        grad_right += pulled_right
    scale = 1 / (d_out * d_in) if settings.reduction == "mean" else 1.0
    return overlap * scale, grad_left * scale, grad_right * scale


def riemannian_overlap(
    delta_align: Tensor, delta_task: Tensor, *, beta: float = 4.0, tau: float = 0.01, reduction: Reduction = "mean"
) -> Tensor:
    """Where both parts of an update change the same entries: E_RM.

        E_RM = mean (or sum) over ij of  eta_ij |A_ij T_ij|,  eta_ij = 1 + beta sigmoid(|A_ij + T_ij| - tau)

    Args:
        delta_align: A = X_A, any shape.
        delta_task: T = X_T, the same shape.
        beta: >= 0, how much more an entry counts where the whole update is large.
        tau: Size of an entry from which it is large.
        reduction: ``"mean"`` or ``"sum"``.

    Returns:
        Scalar, float32 (float64 for float64 input), with gradients to both; sign(0) = 0.

    Raises:
        ValueError: If the shapes differ or a setting is out of range.
    """
    _check_pair(delta_align, delta_task)
    if not beta >= 0:
        raise ValueError(f"beta must be >= 0, got {beta}")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    with torch.autocast(delta_align.device.type, enabled=False):
        a, t = _wide(delta_align), _wide(delta_task)
        terms = (1 + beta * ((a + t).abs() - tau).sigmoid()) * (a * t).abs()
        return terms.mean() if reduction == "mean" else terms.sum()


def geodesic_overlap(
    delta_align: Tensor, delta_task: Tensor, *, metric: Tensor | None = None, eps: float = 1e-12
) -> Tensor:
    """Squared cosine of both parts of an update: E_geo = <A, T>_G^2 / (<A, A>_G <T, T>_G + eps).

    It is 0 for parts split by an orthogonal projector that commutes with the metric.

    Args:
        delta_align: A = X_A, any shape.
        delta_task: T = X_T, the same shape.
        metric: G, a weight >= 0 for each entry, the same shape; default: ones.
        eps: Keeps the value 0 for an update of 0.

    Returns:
        Scalar, float32 (float64 for float64 input), with gradients to both.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_pair(delta_align, delta_task)
    if metric is not None and metric.shape != delta_align.shape:
        raise ValueError(
            f"metric must have the shape of the update, {tuple(delta_align.shape)}, got {tuple(metric.shape)}"
        )
    with torch.autocast(delta_align.device.type, enabled=False):
        a, t = _wide(delta_align), _wide(delta_task)
        weighted = a if metric is None else a * metric.to(a)
        across = (weighted * t).sum()
        lengths = (weighted * a).sum() * (t.square() if metric is None else metric.to(t) * t.square()).sum()
        return across.square() / (lengths + eps)


def _check_pair(delta_align: Tensor, delta_task: Tensor) -> None:
    if delta_align.shape != delta_task.shape:
        raise ValueError(
            f"delta_align and delta_task must have one shape, got {tuple(delta_align.shape)} and "
            f"{tuple(delta_task.shape)}"
        )


def normalize_fisher(fishers: Mapping[str, AnyFisher], mode: Normalization = "mean") -> dict[str, AnyFisher]:
    """Scale the Fisher information so that lambda_align means the same for every model.

    A well aligned model has a tiny Fisher information on its alignment data; unscaled, no lambda_align in reach works.

    Args:
        fishers: By layer.
        mode: ``"mean"``: one factor for all layers, that makes the mean kept eigenvalue 1. ``"layer"``: one factor a
            layer. ``"none"``: leave it as it is.

    Returns:
        New Fisher information, eigenvalues and traces scaled.

    Raises:
        ValueError: Unknown mode, or nothing to scale: all kept eigenvalues are 0, or one is not finite.
    """
    if mode not in get_args(Normalization):
        raise ValueError(f"mode must be one of {get_args(Normalization)}, got {mode!r}")
    if mode == "none":
        return dict(fishers)
    kept = {name: _kept(fisher) for name, fisher in fishers.items()}
    if mode == "mean":
        scale = _inverse_mean(list(kept.values()), "all layers together")
        scales = dict.fromkeys(kept, scale)
    else:
        scales = {name: _inverse_mean([values], f"layer {name!r}") for name, values in kept.items()}
    return {
        name: fisher._replace(eigenvalues=fisher.eigenvalues * scales[name], trace=fisher.trace * scales[name])
        for name, fisher in fishers.items()
    }


def _kept(fisher: Fisher) -> Tensor:
    return fisher.eigenvalues[fisher.mask.bool()] if isinstance(fisher, KroneckerFisher) else fisher.eigenvalues


def _inverse_mean(kept: Sequence[Tensor], of: str) -> float:
    count, total = sum(values.numel() for values in kept), sum(float(values.double().sum()) for values in kept)
    if not 0 < total < float("inf"):
        raise ValueError(
            f"the Fisher information of {of} sums to {total}: the alignment data gives no usable gradient; look at the "
            "losses on it, and at which layers it reaches"
        )
    return count / total


# --- estimation ------------------------------------------------------------------------------------------------------


def second_moments(inputs: Tensor, output_grads: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """C = (1 / #positions) sum x x^T ``(d_in, d_in)`` and S = (1 / N) sum g g^T ``(d_out, d_out)``.

    Args:
        inputs: x, ``(N, T, d_in)``.
        output_grads: g, ``(N, T, d_out)``.
        valid: Which positions are not padding, ``(N, T)`` bool; default: all.
    """
    second_in, second_out, positions = _sum_moments(inputs, output_grads, valid)
    return second_in / max(1, positions), second_out / len(inputs)


def _sum_moments(x: Tensor, g: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, int]:
    rows = x.flatten(0, 1) if valid is None else x[valid.bool()]
    g = g.flatten(0, 1)
    return rows.mT @ rows, g.mT @ g, len(rows)


def top_eigenvectors(matrix: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of a positive semi-definite matrix ``(d, d)``, as columns ``(d, min(rank, d))``.

    Decomposed in float64 up to d = 1024, and if a quarter of all is wanted. Otherwise by subspace iteration, until what
    the columns hold of the trace grows by less than a millionth: many times faster, and of eigenvectors whose
    eigenvalues hardly differ any combination will do.
    """
    if rank < 1:
        raise ValueError(f"rank_out and rank_in must be >= 1, got {rank}")
    dim = len(matrix)
    if dim <= _LARGEST_EIGH or 4 * rank > dim:
        return torch.linalg.eigh(matrix.double())[1].flip(1)[:, :rank].to(matrix.dtype).contiguous()
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(dim, rank + 16, generator=generator).to(matrix)  # more directions than are wanted: faster
    held = -1.0
    for _ in range(_MOST_ITERATIONS):
        basis = torch.linalg.qr(block)[0]
        block = matrix @ basis
        small = (basis.mT @ block).double()
        values, vectors = torch.linalg.eigh((small + small.mT) / 2)
        before, held = held, float(values[-rank:].sum())
        if held - before <= 1e-6 * held:
            break
    return basis @ vectors.flip(1)[:, :rank].to(basis)


def _project_samples(x: Tensor, g: Tensor, basis_out: Tensor, basis_in: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the samples of (U_out^T G_n U_in)^2 and of |G_n|^2."""
    inside = (g @ basis_out).mT @ (x @ basis_in)  # (N, k_out, k_in)
    length, d_in, d_out = x.shape[1], x.shape[2], g.shape[2]
    if length * (d_in + d_out) < d_in * d_out:
        norms = ((g @ g.mT) * (x @ x.mT)).sum()
    else:
        norms = sum(((b.mT @ a).square().sum() for a, b in zip(x, g, strict=True)), x.new_zeros(()))
    return inside.square().sum(0), norms


def _top_mask(eigenvalues: Tensor, top_m: int | None) -> Tensor:
    if top_m is None or top_m >= eigenvalues.numel():
        return torch.ones_like(eigenvalues, dtype=torch.bool)
    if top_m < 1:
        raise ValueError(f"top_m must be >= 1, or None for all pairs, got {top_m}")
    return eigenvalues >= eigenvalues.flatten().topk(top_m).values[-1]


def _check_samples(inputs: Tensor, output_grads: Tensor) -> tuple[Tensor, Tensor]:
    if inputs.ndim != 3 or output_grads.ndim != 3 or inputs.shape[:2] != output_grads.shape[:2] or not len(inputs):
        raise ValueError(
            "inputs must be (N, T, d_in) and output_grads (N, T, d_out) with N >= 1, got "
            f"{tuple(inputs.shape)} and {tuple(output_grads.shape)}"
        )
    return _wide(inputs), _wide(output_grads)


def estimate_kronecker_fisher(
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    loss_fn: LossFunction,
    rank_out: int = 32,
    rank_in: int = 32,
    top_m: int | None = None,
) -> dict[str, KroneckerFisher]:
    """Estimate the Fisher information of linear layers' weights on alignment data.

    Two passes over the data, forward and backward, in eval mode, outside autocast: the first finds the bases, the
    second the eigenvalues. Where the layers' second moments would take more than 4 GiB, the first pass is repeated for
    groups of layers. Modes and gradients are left as they were. Layers wrapped by peft count as the linear layer that
    they are for their callers.

    Args:
        module: The network that ``loss_fn`` runs.
        layers: Layers with ``in_features`` and ``out_features`` inside ``module``, by name. Their first input and
            their output have the samples of the batch as leading dimension, or a multiple of it.
        batches: The batches. Every process gives the same ones; they are shared out.
        loss_fn: ``loss_fn(module, batch)``: the losses of the batch's samples, ``(B,)``, each a mean over the sample's
            own targets; or a scalar for a batch of one sample. Batches that are dicts with an ``attention_mask``
            ``(B, T)`` have their padding left out of the inputs' second moment.
        rank_out: k_out, at most d_out are used.
        rank_in: k_in, at most d_in are used.
        top_m: Keep the pairs with the m largest eigenvalues, and those that tie with the last. Default: all.

    Returns:
        By name of the layer, in float32 (float64 for a network in float64).

    Raises:
        ValueError: No layer, no batch, a loss of another shape or that no layer has part in, losses or gradients that
            are not finite, or layer inputs that do not divide into samples.
    """
    if not layers:
        raise ValueError("layers is empty: name at least one layer")
    if not len(batches):
        raise ValueError("batches is empty: the Fisher information needs at least one sample")
    share = _Share(module, batches, loss_fn)
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    for group in _groups(layers):
        bases.update(_estimate_bases(share, group, rank_out, rank_in))
    sums: dict[str, list[Tensor]] = {
        name: [out.new_zeros(out.shape[1], inside.shape[1]), out.new_zeros(())] for name, (out, inside) in bases.items()
    }

    def add(name: str, x: Tensor, g: Tensor, valid: Tensor | None) -> None:
        for total, term in zip(sums[name], _project_samples(x, g, *bases[name]), strict=True):
            total += term

    samples = share.run(layers, add)
    fishers = {}
    for name, (out, inside) in bases.items():
        squares, norms = (_sum_over_processes(total) / samples for total in sums[name])
        _check_finite(name, norms)
        fishers[name] = KroneckerFisher(out, inside, squares, _top_mask(squares, top_m), norms)
    return fishers


def _groups(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """Layers whose second moments are held at the same time."""
    group: dict[str, nn.Module] = {}
    size = 0
    for name, layer in layers.items():
        d_out, d_in = _features(layer)
        needed = 4 * (d_out**2 + d_in**2)
        if group and size + needed > _MOMENT_BYTES:
            yield group
            group, size = {}, 0
        group[name] = layer
        size += needed
    yield group


def _features(layer: nn.Module) -> tuple[int, int]:
    return layer.out_features, layer.in_features  # type: ignore[return-value]


def _estimate_bases(
    share: _Share, layers: Mapping[str, nn.Module], rank_out: int, rank_in: int
) -> dict[str, tuple[Tensor, Tensor]]:
    moments: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        example = next(layer.parameters())
        dtype = torch.promote_types(example.dtype, torch.float32)
        moments[name] = [torch.zeros(d, d, dtype=dtype, device=example.device) for d in _features(layer)]

    def add(name: str, x: Tensor, g: Tensor, valid: Tensor | None) -> None:
        second_in, second_out, _ = _sum_moments(x, g, valid)
        moments[name][0] += second_out
        moments[name][1] += second_in

    share.run(layers, add)
    group = default_group()
    for name, pair in moments.items():
        for moment in pair:
            _sum_over_processes(moment)
            _check_finite(name, moment)
    # An eigenvector's sign is free and its rounding differs between devices: one process decides, a different one for
    # each layer, so that the work is divided.
    world, rank = (1, 0) if group is None else (group.size(), group.rank())
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    for i, (name, pair) in enumerate(moments.items()):
        ranks = rank_out, rank_in
        if i % world == rank:
            out, inside = (top_eigenvectors(moment, k) for moment, k in zip(pair, ranks, strict=True))
        else:
            out, inside = (
                moment.new_empty(len(moment), min(k, len(moment))) for moment, k in zip(pair, ranks, strict=True)
            )
        bases[name] = out.contiguous(), inside.contiguous()
    if group is not None:
        for i, pair_of_bases in enumerate(bases.values()):
            for basis in pair_of_bases:
                dist.broadcast(basis, src=dist.get_global_rank(group, i % world), group=group)
    return bases


def _sum_over_processes(tensor: Tensor) -> Tensor:
    group = default_group()
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def _check_finite(name: str, tensor: Tensor) -> None:
    """After the reduction, so that all processes raise together."""
    if not tensor.isfinite().all():
        raise ValueError(
            f"the alignment losses, or their gradients at layer {name!r}, are not finite; look for a sample without "
            "targets, and for values that the network's precision cannot hold"
        )


class _Share:
    """This process's share of the batches, and how to run over it."""

    def __init__(self, module: nn.Module, batches: Sequence[Any], loss_fn: LossFunction) -> None:
        group = default_group()
        world, rank = (1, 0) if group is None else (group.size(), group.rank())
        self.module, self.loss_fn = module, loss_fn
        # All make as many steps, since a sharded network runs on all processes together; one too many is not counted.
        rounds = range(rank, rank + len(batches) + (-len(batches)) % world, world)
        self.batches = [(batches[i % len(batches)], i < len(batches)) for i in rounds]

    def run(self, layers: Mapping[str, nn.Module], add: Callable[[str, Tensor, Tensor, Tensor | None], None]) -> int:
        """Hand inputs and output gradients of every layer and batch to ``add``; return all processes' samples."""
        samples = 0
        with _undisturbed(self.module), _Capture(layers) as capture:
            for batch, counted in self.batches:
                losses = self.loss_fn(self.module, batch)
                if losses.ndim > 1:
                    raise ValueError(
                        f"loss_fn must return the losses of the samples, (B,), got shape {tuple(losses.shape)}"
                    )
                capture.backward(losses, add if counted else None, batch)
                samples += losses.numel() * counted
            device = losses.device
        return int(_sum_over_processes(torch.tensor(samples, device=device)))


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Eval mode, gradients on, no autocast or compiled graphs; then everything as it was."""
    modes = {part: part.training for part in module.modules()}
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    device = next((parameter.device.type for parameter, _ in gradients), "cpu")
    for parameter, _ in gradients:
        parameter.grad = None
    module.eval()
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
            torch.compiler.set_stance("force_eager"),  # hooks on the parts of a compiled graph would not run
        ):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient


class _Capture:
    """Pairs each layer's inputs with the gradients of its outputs, by hooks."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
        self.calls = dict.fromkeys(layers, 0)
        self.finish: Callable[[str], None] = lambda name: None

    def __enter__(self) -> _Capture:
        self.handles = [
            layer.register_forward_hook(lambda _, args, output, name=name: self._called(name, args[0], output))
            for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _called(self, name: str, x: Tensor, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():  # activation checkpointing; it calls again in backward
            return None
        # An in-place function behind the layer may not change a leaf, and would lead the gradient of a view around it.
        if not output.requires_grad:  # nothing before it is trained
            output = output.detach().requires_grad_().clone()
        elif output._is_view():
            output = output.clone()
        x, version, place = x.detach(), x._version, output.output_nr
        self.calls[name] += 1

        def arrived(gradients: tuple[Tensor, ...]) -> None:
            if x._version != version:
                raise ValueError(
                    f"the input of layer {name!r} is changed in place after the layer has used it, so that its Fisher "
                    "information cannot be known: change the network there, or leave the layer out"
                )
            self.pairs[name].append((x, gradients[place].detach()))
            if len(self.pairs[name]) == self.calls[name]:
                self.finish(name)  # at once, so that the gradients of one layer are held at a time

        # Of the node, not of the tensor, which an in-place function may change afterwards.
        assert output.grad_fn is not None
        output.grad_fn.register_prehook(arrived)
        return output

    def backward(
        self, losses: Tensor, add: Callable[[str, Tensor, Tensor, Tensor | None], None] | None, batch: Any
    ) -> None:
        """Backward of the sum of the losses: no sample's gradient is touched by another's."""
        if not losses.requires_grad:
            raise ValueError(
                "the alignment loss does not depend on any of the layers: does loss_fn detach it, or run another model?"
            )
        samples = losses.numel()

        def finish(name: str) -> None:
            pairs, self.pairs[name] = self.pairs[name], []
            if add is None or not pairs:
                return
            parts = [(self._rows(name, x, samples), self._rows(name, g, samples)) for x, g in pairs]
            valid = [_attended(batch, x) for x, _ in parts]
            add(
                name,
                torch.cat([x for x, _ in parts], 1),
                torch.cat([g for _, g in parts], 1),
                None if any(mask is None for mask in valid) else torch.cat([m for m in valid if m is not None], 1),
            )

        self.finish = finish
        losses.sum().backward()
        for name in self.layers:  # those called more often than a gradient came back
            finish(name)
            self.calls[name] = 0

    def _rows(self, name: str, values: Tensor, samples: int) -> Tensor:
        if values.shape[0] % samples:
            raise ValueError(
                f"layer {name!r} gets {values.shape[0]} rows for {samples} samples, so that they cannot be told apart: "
                "give batches of one sample"
            )
        return _wide(values.reshape(samples, -1, values.shape[-1]))


def _attended(batch: Any, x: Tensor) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.to(x.device).bool() if isinstance(mask, Tensor) and mask.shape == x.shape[:2] else None
