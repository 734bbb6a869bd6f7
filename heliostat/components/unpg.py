"""UNPG: Unified Negative Pair Generation for margin-softmax heads (arXiv 2203.11593).

A head such as ArcFace (arXiv 1801.07698) or CosFace (arXiv 1801.09414) compares a sample with class centres only. UNPG
adds the batch's similarities of samples of different classes, without outliers by the box-and-whisker rule, to the
denominator of every sample's cross-entropy. For verification and open-set retrieval embeddings trained with class
labels; costs one N x N similarity matrix and no parameter. Training only: inference is the embedding.

The defaults are those of the released code. Its defects are not kept: one class in a batch is the plain head instead
of an error, and a cosine of 1 has a finite gradient.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from heliostat.components.distributed import gather_rows

MarginHead = Literal["arcface", "cosface"]
Reduction = Literal["mean", "sum", "none"]


class NegativeStatistics(NamedTuple):
    """What the whiskers did. Scalars without gradient; NaN where there is nothing to measure.

    Attributes:
        kept: Number of negatives kept, |S'|, int64.
        total: Number of negatives K0 = |Sn|, int64.
        q1: First quartile, the value of rank floor(K0 / 4) from 0.
        q3: Third quartile, the value of rank floor(3 K0 / 4) from 0.
        lower: Smallest similarity that is kept; -inf without a filter.
        upper: Largest similarity that is kept; inf without a filter.
        max_kept: Largest similarity kept.
        max_removed: Largest similarity removed, of either tail.
    """

    kept: Tensor
    total: Tensor
    q1: Tensor
    q3: Tensor
    lower: Tensor
    upper: Tensor
    max_kept: Tensor
    max_removed: Tensor


class UnifiedNegatives(NamedTuple):
    """The similarities of a batch's samples of different classes, see `unified_negatives`.

    Attributes:
        values: Sn, each unordered pair once, ``(K0,)``, in the order of ``(i, j)`` with i < j; carries the gradient.
        keep_mask: Which of them are in S', ``(K0,)`` bool.
        info: Quartiles, bounds and counts.
    """

    values: Tensor
    keep_mask: Tensor
    info: NegativeStatistics


class _Negatives(NamedTuple):
    similarity: Tensor  # (N, N)
    pairs: Tensor  # (N, N) bool: i < j, different labels
    keep: Tensor  # (N, N) bool: those within the whiskers
    info: NegativeStatistics


def margin_logits(cosines: Tensor, labels: Tensor, *, head: MarginHead = "arcface", margin: float) -> Tensor:
    """Put the margin m on the true class's cosine, and leave the others as they are.

        arcface: z_iy = cos(arccos(cos_iy) + m)        cosface: z_iy = cos_iy - m

    ArcFace's angle is taken by the addition theorem, which is exact at a cosine of 1 or -1 too; where the derivative
    sin(theta + m) / sin(theta) is infinite, it is cos(m). There is no correction for theta + m > pi.

    Args:
        cosines: Similarities to the class centres, ``(N, C)``, in [-1, 1].
        labels: True classes, ``(N,)`` integers in 0..C-1. Checked on the CPU; on an accelerator, and in compiled code,
            where looking at them would wait for the device, the indexing itself fails.
        head: ``"arcface"``, an additive angle, or ``"cosface"``, an additive cosine.
        margin: m >= 0, in radians for ArcFace.

    Returns:
        Logits z, not yet scaled, ``(N, C)``, float32 (float64 for float64 input).

    Raises:
        ValueError: On shapes that do not fit, a label out of range, an unknown head or a negative margin.
    """
    _check_head(head, margin)
    _check_logits("cosines", cosines, labels)
    target = labels.long()[:, None]
    with torch.autocast(cosines.device.type, enabled=False):
        cosines = cosines.to(torch.promote_types(cosines.dtype, torch.float32))
        cosine = cosines.gather(1, target)
        if head == "cosface":
            return cosines.scatter(1, target, cosine - margin)
        square = (1 - cosine) * (1 + cosine)  # sin^2; a cosine may exceed 1 by rounding
        inside = square > 0
        sine = torch.where(inside, torch.where(inside, square, 1.0).sqrt(), 0.0)  # no 0 * inf in backward
        return cosines.scatter(1, target, cosine * math.cos(margin) - sine * math.sin(margin))


def unified_negatives(embeddings: Tensor, labels: Tensor, whisker: float | None = 1.5) -> UnifiedNegatives:
    """Similarities of samples of different classes, and which of them the box-and-whisker rule keeps.

        Sn = { f_i . f_j : i < j, y_i != y_j },   f = x / |x|
        S' = { v in Sn : Q1 - r IQR <= v <= Q3 + r IQR },   IQR = Q3 - Q1

    The upper whisker is meant for label noise and duplicates. The rule assumes a nearly symmetric distribution: where
    it is skewed to the right, as late in training, it removes the informative negatives, so watch ``info``.

    The result's length depends on the data, which waits for the device and cannot be compiled; `unpg_loss` avoids it.

    Args:
        embeddings: x, ``(N, d)``, any scale.
        labels: ``(N,)``, any integers.
        whisker: r >= 0; 0 keeps [Q1, Q3], ``None`` or inf everything.

    Returns:
        Values, mask and statistics, float32 (float64 for float64 input).

    Raises:
        ValueError: On shapes that do not fit or a negative whisker.
    """
    _check_embeddings(embeddings, labels)
    with torch.autocast(embeddings.device.type, enabled=False):
        f = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)
        similarity, pairs, keep, info = _filtered_negatives(f, labels, whisker)
        return UnifiedNegatives(similarity[pairs], keep[pairs], info)


def unpg_loss(
    margin_logits: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    scale: float = 64.0,
    whisker: float | None = 1.5,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Cross-entropy of a margin head whose denominators also hold the batch's negatives S', see `unified_negatives`.

        A = log sum_{v in S'} e^{s v}
        L = 1/N sum_i -log( e^{s z_i,yi} / ( sum_c e^{s z_ic} + e^A ) )

    The same A stands in every row. S' is that of all processes' rows; averaged over processes, value and gradient are
    those of one process with the whole batch. Without samples of different classes this is the plain head's loss.

    Args:
        margin_logits: z, ``(N, C)`` cosines with the margin on the true class, not scaled: from `margin_logits`, or of
            any other head.
        embeddings: x, ``(N, d)``, any scale.
        labels: True classes, ``(N,)`` integers in 0..C-1, checked as in `margin_logits`.
        scale: s > 0, the inverse temperature.
        whisker: r >= 0 of the outlier rule; ``None`` or inf: no filter.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over this process's rows.
        process_group: The processes whose rows form the batch; default: all of them.

    Returns:
        Scalar, or ``(N,)`` for ``"none"``; float32 (float64 for float64 input).

    Raises:
        ValueError: On shapes that do not fit, a label out of range, or a setting outside of its range.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    _check_scale(scale)
    _check_embeddings(embeddings, labels)
    _check_logits("margin_logits", margin_logits, labels)
    dtype = torch.promote_types(torch.promote_types(margin_logits.dtype, embeddings.dtype), torch.float32)
    with torch.autocast(embeddings.device.type, enabled=False):
        f = F.normalize(embeddings.to(dtype), dim=1)
        auxiliary, _ = _auxiliary_logit(f, labels, scale, whisker, process_group)
        rows = _cross_entropy(margin_logits.to(dtype), labels, scale, auxiliary)  # (N,)
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()


class UNPGHead(nn.Module):
    """ArcFace or CosFace head with its class centres and `unpg_loss`: a loss of embeddings and labels.

    After a training step ``diagnostics`` holds what is worth logging, of all processes' rows: ``kept_fraction``,
    ``q1``, ``q3``, ``max_kept`` and ``max_removed``, see `NegativeStatistics`, but ``max_removed`` is -1 where nothing
    was removed, so that a mean over steps stays a number. A ``max_removed`` close to 1 is label noise or duplicates;
    one not far above ``max_kept`` means that the whiskers cut away hard negatives: raise ``whisker``.

    Args:
        in_features: Dimension d of the embeddings.
        num_classes: C.
        head: ``"arcface"`` or ``"cosface"``.
        scale: s > 0, the inverse temperature.
        margin: m >= 0, in radians for ArcFace, in cosine for CosFace (the released class has 0.35 there).
        whisker: r >= 0 of the outlier rule; ``None`` or inf: no filter.
        use_unpg: ``False`` is the plain head, the baseline.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        head: MarginHead = "arcface",
        scale: float = 64.0,
        margin: float = 0.5,
        whisker: float | None = 1.5,
        use_unpg: bool = True,
    ) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 1:
            raise ValueError(f"in_features and num_classes must be >= 1, got {in_features} and {num_classes}")
        _check_head(head, margin)
        _check_scale(scale)
        _check_whisker(whisker)
        self.head: MarginHead = head
        self.scale, self.margin, self.whisker, self.use_unpg = scale, margin, whisker, use_unpg
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        nn.init.xavier_uniform_(self.weight)
        self.diagnostics: dict[str, Tensor] = {}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of this process's ``embeddings (N, d)`` with ``labels (N,)``."""
        _check_embeddings(embeddings, labels)
        if embeddings.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"embeddings must have in_features = {self.weight.shape[1]} columns, got {embeddings.shape[1]}"
            )
        dtype = torch.promote_types(torch.promote_types(embeddings.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(embeddings.device.type, enabled=False):
            f = F.normalize(embeddings.to(dtype), dim=1)
            cosines = f @ F.normalize(self.weight.to(dtype), dim=1).T  # (N, C)
            logits = margin_logits(cosines, labels, head=self.head, margin=self.margin)
            auxiliary = None
            if self.use_unpg:
                auxiliary, info = _auxiliary_logit(f, labels, self.scale, self.whisker)
                self.diagnostics = {
                    "kept_fraction": info.kept / info.total,
                    "q1": info.q1,
                    "q3": info.q3,
                    "max_kept": info.max_kept,
                    "max_removed": info.max_removed.nan_to_num(nan=-1.0),
                }
            return _cross_entropy(logits, labels, self.scale, auxiliary).mean()


def _filtered_negatives(f: Tensor, labels: Tensor, whisker: float | None) -> _Negatives:
    """Sn and S' of unit rows ``(N, d)`` as masks, so that on an accelerator no shape depends on the data."""
    _check_whisker(whisker)
    similarity = f @ f.T
    pairs = (labels[:, None] != labels).triu(diagonal=1)
    with torch.no_grad():
        q1, q3 = _quartiles(similarity, pairs)
        if whisker is None or math.isinf(whisker):
            lower, upper = torch.full_like(q1, -math.inf), torch.full_like(q3, math.inf)
            keep = pairs
        else:
            lower, upper = q1 - whisker * (q3 - q1), q3 + whisker * (q3 - q1)
            keep = pairs & ~((similarity < lower) | (similarity > upper))  # keeps NaN, which must reach the loss
        info = NegativeStatistics(
            kept=keep.sum(),
            total=pairs.sum(),
            q1=q1,
            q3=q3,
            lower=lower,
            upper=upper,
            max_kept=_max_or_nan(similarity, keep),
            max_removed=_max_or_nan(similarity, pairs & ~keep),
        )
    return _Negatives(similarity, pairs, keep, info)


def _quartiles(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The masked values of rank floor(K0 / 4) and floor(3 K0 / 4), from 0 in ascending order; NaN for K0 = 0."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling():  # there a selection is cheaper than a sort
        chosen = values[mask]
        if len(chosen) == 0:
            return values.new_tensor(math.nan), values.new_tensor(math.nan)
        q1, q3 = (chosen.kthvalue(quarter * len(chosen) // 4 + 1).values for quarter in (1, 3))
        return q1, q3
    count = mask.sum()
    ordered = values.masked_fill(~mask, math.inf).flatten().sort().values
    q1, q3 = ordered.gather(0, torch.stack([count // 4, 3 * count // 4])).where(count > 0, math.nan)
    return q1, q3


def _max_or_nan(values: Tensor, mask: Tensor) -> Tensor:
    largest = values.masked_fill(~mask, -math.inf).amax()
    return largest.where(largest > -math.inf, math.nan)


def _auxiliary_logit(
    f: Tensor, labels: Tensor, scale: float, whisker: float | None, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, NegativeStatistics]:
    """A of all processes' unit rows, -inf if S' is empty."""
    similarity, _, keep, info = _filtered_negatives(gather_rows(f, group), gather_rows(labels, group), whisker)
    # `where` comes last, so that backward through an empty sum multiplies no gradient by inf - inf
    return torch.where(keep, scale * similarity, -math.inf).logsumexp((0, 1)), info


def _cross_entropy(logits: Tensor, labels: Tensor, scale: float, auxiliary: Tensor | None) -> Tensor:
    """Loss of every row, ``(N,)``, with e^auxiliary added to its denominator."""
    logits = scale * logits
    total = logits.logsumexp(1)
    if auxiliary is not None:
        total = torch.logaddexp(total, auxiliary)
    return total - logits.gather(1, labels.long()[:, None])[:, 0]


def _check_head(head: str, margin: float) -> None:
    if head not in get_args(MarginHead):
        raise ValueError(f"head must be one of {get_args(MarginHead)}, got {head!r}")
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be >= 0 and finite, got {margin}")


def _check_scale(scale: float) -> None:
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be > 0 and finite, got {scale}")


def _check_whisker(whisker: float | None) -> None:
    if whisker is not None and not whisker >= 0:
        raise ValueError(f"whisker must be >= 0, or None for no filter, got {whisker}")


def _check_embeddings(embeddings: Tensor, labels: Tensor) -> None:
    if embeddings.ndim != 2 or embeddings.shape[0] == 0:
        raise ValueError(f"embeddings must have shape (N, d) with N >= 1, got {tuple(embeddings.shape)}")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"labels must have shape (N,) with N = embeddings.shape[0] = {len(embeddings)}, got {tuple(labels.shape)}"
        )


def _check_logits(name: str, logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"{name} must have shape (N, C) with N, C >= 1, got {tuple(logits.shape)}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels must have shape (N,) with N = {name}.shape[0] = {len(logits)}, got {tuple(labels.shape)}"
        )
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(f"labels must lie in 0..{logits.shape[1] - 1}, the classes of {name}, got {low}..{high}")
