"""ProCLIP (arXiv 2510.18795): a CLIP image tower meets a language model's text embedder, and keeps what it knows.

A small adapter maps the embedder's vectors into CLIP's space. First it is distilled from CLIP's own text tower, row by
row and in the distances among the rows of a batch (representation inheritance); then it and the image tower are tuned
contrastively, while the same two terms hold the image tower near a slow average of itself. For long, multilingual or
fine-grained text with 1e5 to 1e7 pairs, where plain contrastive tuning of a fresh adapter would cost the image tower
its zero-shot ability. The training is `heliostat.ProCLIP`, the contrastive term `heliostat.components.contrastive`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from heliostat.components.contrastive import grouped_contrastive_loss
from heliostat.components.distributed import gather_rows

Reduction = Literal["sum", "mean"]
Penalty = Literal["smooth_l1", "squared"]


class InheritanceLoss(NamedTuple):
    """What `representation_inheritance_loss` returns."""

    total: Tensor
    """The weighted sum of the other two."""
    instance: Tensor
    """L_ins, of both captions if there is a second."""
    structure: Tensor
    """L_struct, of the first caption."""


class TuningLoss(NamedTuple):
    """What `ContrastiveTuningLoss` returns."""

    total: Tensor
    """L_info + reg_weight * L_reg."""
    contrastive: Tensor
    """L_info."""
    instance: Tensor
    """L_ins of the images and their teacher; 0 without one."""
    structure: Tensor
    """L_struct of the images and their teacher; 0 without one."""


def instance_alignment_loss(
    student: Tensor, teacher: Tensor, *, reduction: Reduction = "sum", normalize: bool = True
) -> Tensor:
    """Squared distance of each row to its teacher.

        L_ins(a, b) = sum_i ||a_i - b_i||^2,   a_i, b_i of unit length

    Args:
        student: a, ``(B, d)``, any scale unless ``normalize=False``.
        teacher: b, ``(B, d)``. No gradient flows to it.
        reduction: ``"sum"`` over the rows is the paper's; ``"mean"`` divides by B, so that the loss does not grow with
            the batch, and DDP's average is the one-process loss.
        normalize: Scale rows to unit length. The gradient passes through.

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: On shapes that do not fit, or without rows.
    """
    _check_settings(reduction)
    _check_rows(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        a, b = _prepare(student, teacher, normalize)
        return (a - b).square().sum() / (len(a) if reduction == "mean" else 1)


def structure_alignment_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    penalty: Penalty = "smooth_l1",
    reduction: Reduction = "sum",
    normalize: bool = True,
    gather: bool = False,
) -> Tensor:
    """How much the distances among the student's rows differ from those among the teacher's.

        D(x)_ij = ||x_i - x_j||,   L_struct(a, b) = sum_{i<j} h(D(a)_ij - D(b)_ij),   a_i, b_i of unit length
        h(u) = u^2 / 2 where |u| < 1, else |u| - 1/2        or        h(u) = u^2

    Equal rows have distance 0 and no gradient from their pair. One row makes no pair: 0, attached to the graph. Kept
    for backward is one number a pair, and the gradient takes two products of the B x B matrix with the rows.

    Args:
        student: a, ``(B, d)``, any scale unless ``normalize=False``.
        teacher: b, ``(B, d)``. No gradient flows to it.
        penalty: h, ``"smooth_l1"`` of the released code or ``"squared"`` of the paper.
        reduction: ``"sum"`` over the B (B - 1) / 2 pairs is the paper's and grows with B^2; ``"mean"`` divides by their
            number.
        normalize: Scale rows to unit length. The gradient passes through.
        gather: Form the pairs of all processes' rows, which must be as many on each. Every process then has the value
            of one process with the whole batch, and DDP's average of the gradients is its gradient. Otherwise each
            process pairs its own rows, as the released code does.

    Returns:
        Scalar, float32 (float64 for float64 input). It can be differentiated once.

    Raises:
        ValueError: On shapes that do not fit, without rows, or for an unknown penalty or reduction.
    """
    _check_settings(reduction, penalty)
    _check_rows(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        a, b = _prepare(student, teacher, normalize)
        if gather:
            a, b = gather_rows(a), gather_rows(b)
        pairs = len(a) * (len(a) - 1) // 2
        total: Tensor = _StructureAlignment.apply(a, b, penalty)
        return total / (max(pairs, 1) if reduction == "mean" else 1)


class _StructureAlignment(torch.autograd.Function):
    """The sum over pairs. The backward of `torch.pdist` holds B x B x d numbers on a GPU, and takes few rows there."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, penalty: Penalty) -> Tensor:
        distances = torch.pdist(a)  # of differences, not of the Gram matrix, which loses all digits near 0
        u = distances - torch.pdist(b).to(distances.dtype)
        slope = 2 * u if penalty == "squared" else u.clamp(-1, 1)  # h'(u)
        # a_i's gradient is sum_j slope_ij / D_ij (a_i - a_j)
        ctx.save_for_backward(a, (slope / distances).masked_fill(distances == 0, 0))
        return (
            u.square() if penalty == "squared" else F.smooth_l1_loss(u, torch.zeros_like(u), reduction="none")
        ).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        a, weights = ctx.saved_tensors
        rows = a.double()  # near-equal rows have large weights, whose products nearly cancel
        upper = rows.new_zeros(len(a), len(a))
        upper.masked_scatter_(torch.ones_like(upper, dtype=torch.bool).triu(1), weights.double())
        gradient = (upper.sum(0) + upper.sum(1))[:, None] * rows - upper @ rows - upper.T @ rows
        return gradient.to(a.dtype) * grad, None, None


def representation_inheritance_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    student_second: Tensor | None = None,
    teacher_second: Tensor | None = None,
    instance_weight: float = 1.0,
    structure_weight: float = 1.0,
    penalty: Penalty = "smooth_l1",
    reduction: Reduction = "sum",
    normalize: bool = True,
    gather: bool = False,
) -> InheritanceLoss:
    """Both alignment terms: stage 1 on texts, the regulariser of stage 2 on images.

        L = instance_weight * [ L_ins(a, b) + L_ins(a', b') ] + structure_weight * L_struct(a, b)

    Args:
        student: a, ``(B, d)``, any scale unless ``normalize=False``.
        teacher: b, ``(B, d)``. No gradient flows to it.
        student_second: a', of a second caption of each image, ``(B, d)``, as in the released code; default: none.
        teacher_second: b', ``(B, d)``, given with ``student_second``.
        instance_weight: Weight of the instance term, >= 0.
        structure_weight: Weight of the structure term, >= 0.
        penalty: See `structure_alignment_loss`.
        reduction: ``"sum"`` is the paper's: L_ins grows with B and L_struct with B^2, so settings found at one batch
            size do not hold at another. With ``"mean"`` they do.
        normalize: Scale rows to unit length.
        gather: Both terms over all processes' rows, see `structure_alignment_loss`. Without it DDP trains the mean over
            processes of their own losses, which ``"mean"`` makes exact for L_ins only.

    Returns:
        The total, and the two terms without their weights, float32 (float64 for float64 input).

    Raises:
        ValueError: On shapes that do not fit, settings out of range, or one second caption without the other.
    """
    _check_settings(reduction, penalty, instance_weight, structure_weight)
    if (student_second is None) != (teacher_second is None):
        raise ValueError("student_second and teacher_second belong together: give both or neither")
    _check_rows(student, teacher)
    with torch.autocast(student.device.type, enabled=False):

        def prepared(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            a, b = _prepare(a, b, normalize)
            return (gather_rows(a), gather_rows(b)) if gather else (a, b)

        a, b = prepared(student, teacher)
        instance = instance_alignment_loss(a, b, reduction=reduction, normalize=False)
        if student_second is not None and teacher_second is not None:
            _check_rows(student_second, teacher_second, "_second")
            second = prepared(student_second, teacher_second)
            instance = instance + instance_alignment_loss(*second, reduction=reduction, normalize=False)
        structure = structure_alignment_loss(a, b, penalty=penalty, reduction=reduction, normalize=False)
        return InheritanceLoss(instance_weight * instance + structure_weight * structure, instance, structure)


class ContrastiveTuningLoss(nn.Module):
    """The loss of stage 2: contrast with the texts, and hold on to the teacher's images.

        L = L_info(v, t) + reg_weight * [ instance_weight * L_ins(v, v*) + structure_weight * L_struct(v, v*) ]
        L_info = 1/2 [ CE(Z, diag) + CE(Z^T, diag) ],   Z = s v t^T,   each CE a mean over rows

    L_info is over the rows of all processes, see `heliostat.components.grouped_contrastive_loss`.

    Args:
        reg_weight: lambda, >= 0; 4e-4 was found for sums over 512 images. 0 needs no teacher.
        instance_weight: See `representation_inheritance_loss`; so are the next four.
        structure_weight: Weight of the structure term.
        penalty: ``"smooth_l1"`` or ``"squared"``.
        reduction: ``"sum"`` or ``"mean"``.
        gather: Take the regulariser over all processes' rows.
        column_chunk: Columns of Z evaluated at a time, see `heliostat.components.grouped_contrastive_loss`.

    Raises:
        ValueError: For settings out of range.
    """

    def __init__(
        self,
        reg_weight: float = 4e-4,
        *,
        instance_weight: float = 1.0,
        structure_weight: float = 1.0,
        penalty: Penalty = "smooth_l1",
        reduction: Reduction = "sum",
        gather: bool = False,
        column_chunk: int | None = None,
    ) -> None:
        super().__init__()
        _check_settings(reduction, penalty, instance_weight, structure_weight, reg_weight)
        self.reg_weight, self.column_chunk = reg_weight, column_chunk
        self.settings: dict[str, Any] = {
            "instance_weight": instance_weight,
            "structure_weight": structure_weight,
            "penalty": penalty,
            "reduction": reduction,
            "gather": gather,
        }

    def forward(
        self, image: Tensor, text: Tensor, logit_scale: Tensor | float, teacher_image: Tensor | None = None
    ) -> TuningLoss:
        """The loss and its parts.

        Args:
            image: v, ``(B, d)``, any scale.
            text: t, ``(B, d)``, any scale; row i belongs to image i.
            logit_scale: s, the factor itself and not its logarithm.
            teacher_image: v*, the teacher's ``(B, d)``; not needed with ``reg_weight=0``.

        Returns:
            The total, and its parts without their weights.

        Raises:
            ValueError: On shapes that do not fit, or without a teacher that is needed.
        """
        contrastive = grouped_contrastive_loss(image, text, logit_scale, column_chunk=self.column_chunk)
        if self.reg_weight == 0:
            zero = torch.zeros_like(contrastive)
            return TuningLoss(contrastive, contrastive, zero, zero)
        if teacher_image is None:
            raise ValueError(f"teacher_image is needed for reg_weight={self.reg_weight}: pass it, or set reg_weight=0")
        reg, instance, structure = representation_inheritance_loss(image, teacher_image, **self.settings)
        return TuningLoss(contrastive + self.reg_weight * reg, contrastive, instance, structure)


class TextAdapter(nn.Module):
    """Maps embeddings of a language model into CLIP's space: residual blocks and a projection.

        x_0 = n(g),   x_{k+1} = x_k + W2_k gelu(W1_k LN_k(x_k) + b1_k) + b2_k,   A(g) = W_o LN(x_nb) + b_o

    Args:
        embedding_dim: Width of the embedder, d_L.
        output_dim: Width of CLIP's joint space, d.
        expansion_factor: Hidden width of a block, in multiples of d_L.
        num_blocks: nb >= 0; 0 leaves LayerNorm and projection.
        dropout: After each linear layer's activation in the blocks, in [0, 1).
        normalize_input: Scale g to unit length first, as the released code does.

    Raises:
        ValueError: For settings out of range.
    """

    def __init__(
        self,
        embedding_dim: int,
        output_dim: int,
        expansion_factor: int = 8,
        num_blocks: int = 1,
        dropout: float = 0.0,
        normalize_input: bool = True,
    ) -> None:
        super().__init__()
        if embedding_dim < 1 or output_dim < 1 or expansion_factor < 1:
            raise ValueError(
                "embedding_dim, output_dim and expansion_factor must be >= 1, got "
                f"{embedding_dim}, {output_dim} and {expansion_factor}"
            )
        if num_blocks < 0:
            raise ValueError(f"num_blocks must be >= 0, got {num_blocks}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.embedding_dim, self.output_dim, self.normalize_input = embedding_dim, output_dim, normalize_input
        hidden = expansion_factor * embedding_dim
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(embedding_dim),
                nn.Linear(embedding_dim, hidden),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(hidden, embedding_dim),
                nn.Dropout(dropout),
            )
            for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(embedding_dim)
        self.projection = nn.Linear(embedding_dim, output_dim)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Text features ``(..., d)``, not normalised, of the embedder's ``(..., d_L)`` in any floating dtype."""
        if embeddings.shape[-1:] != (self.embedding_dim,):
            raise ValueError(
                f"embeddings must have shape (..., embedding_dim = {self.embedding_dim}), got "
                f"{tuple(embeddings.shape)}: is this the embedder that the adapter was made for?"
            )
        x = embeddings
        if self.normalize_input:
            x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        x = x.to(self.norm.weight.dtype)
        for block in self.blocks:
            x = x + block(x)
        return self.projection(self.norm(x))


@torch.no_grad()
def ema_update_(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Move the teacher towards the student, in place: theta* <- decay theta* + (1 - decay) theta.

    Every parameter is averaged, in the teacher's precision; buffers, such as BatchNorm's statistics, are copied.

    Args:
        teacher: A copy of the student, in float32 or better whatever the student's dtype: in bfloat16 steps of
            1 - decay = 1e-3 are lost.
        student: The network that is trained.
        decay: alpha in [0, 1]; 1 leaves the teacher as it is, 0 copies the student.

    Raises:
        ValueError: If ``decay`` is out of range, the two have different parameters or buffers, or the teacher is in
            half precision.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}")
    for kind in ("parameters", "buffers"):
        theirs, ours = (dict(getattr(network, f"named_{kind}")()) for network in (student, teacher))
        if {name: t.shape for name, t in theirs.items()} != {name: t.shape for name, t in ours.items()}:
            raise ValueError(f"teacher and student must have the same {kind}: make it by copy.deepcopy(student)")
        for name, target in ours.items():
            if decay == 1:
                continue
            if kind == "buffers" or decay == 0:
                target.copy_(theirs[name])
            elif target.dtype in (torch.bfloat16, torch.float16):
                raise ValueError(
                    f"teacher must be kept in float32 or better, but {name} is {target.dtype}: .float() it"
                )
            else:
                target.lerp_(theirs[name].to(target), 1 - decay)


def _prepare(student: Tensor, teacher: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Student and detached teacher of unit length, both in float32 or better."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    a, b = student.to(dtype), teacher.detach().to(dtype)
    return (F.normalize(a, dim=1), F.normalize(b, dim=1)) if normalize else (a, b)


def _check_settings(reduction: Reduction, penalty: Penalty = "smooth_l1", *weights: float) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    if penalty not in get_args(Penalty):
        raise ValueError(f"penalty must be one of {get_args(Penalty)}, got {penalty!r}")
    names = ("instance_weight", "structure_weight", "reg_weight")
    for name, weight in zip(names, weights, strict=False):
        if not weight >= 0:
            raise ValueError(f"{name} must be >= 0, got {weight}")


def _check_rows(student: Tensor, teacher: Tensor, suffix: str = "") -> None:
    if student.ndim != 2 or len(student) == 0:
        raise ValueError(f"student{suffix} must have shape (B, d) with B >= 1, got {tuple(student.shape)}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher{suffix} must have the shape of student{suffix}, {tuple(student.shape)}, "
            f"got {tuple(teacher.shape)}"
        )
