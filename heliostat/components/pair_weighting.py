"""General pair weighting (CVPR 2019, arXiv 1904.06627, section 3): pair-based losses by the weights of their pairs.

The gradient of any loss L of the similarities S is that of sum over anchors i of

    sum_{negatives j} w_ij S_ij - sum_{positives j} w_ij S_ij,    w_ij = |dL / dS_ij| held constant,

so a loss is told by its weights: contrastive sees a pair's own similarity, lifted structure its similarity relative to
the negatives, triplet relative to the positives, multi-similarity all three. Here are the weights, to look at or build
on, and the four classical losses that they define, as baselines. They hold N x M matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heliostat.components.distributed import default_group
from heliostat.components.multi_similarity import Reduction, mine, pair_masks
from heliostat.components.references import References, resolve_references

PairScheme = Literal["contrastive", "triplet", "lifted", "binomial"]


class _Settings(NamedTuple):
    alpha: float
    beta: float
    base: float
    margin: float


_Weighting = tuple[Tensor, Tensor, Tensor]  # loss of each anchor (N,), weights of positives and of negatives (N, M)


def _contrastive(s: Tensor, positive: Tensor, negative: Tensor, settings: _Settings) -> _Weighting:
    """L_i = sum_neg [S - base]_+ - sum_pos S."""
    w_pos, w_neg = positive.to(s), (negative & (s > settings.base)).to(s)
    return (w_neg * (s - settings.base) - w_pos * s).sum(1), w_pos, w_neg


def _triplet(s: Tensor, positive: Tensor, negative: Tensor, settings: _Settings) -> _Weighting:
    """L_i = sum over positives p and negatives n of [S_in - S_ip + margin]_+; a pair weighs its active triplets."""
    margin, columns = settings.margin, s.shape[1]
    positives = s.masked_fill(~positive, math.inf).sort(1).values
    negatives = s.masked_fill(~negative, -math.inf).sort(1).values
    w_neg = torch.searchsorted(positives, s + margin).to(s) * negative
    w_pos = (columns - torch.searchsorted(negatives, s - margin, right=True)).to(s) * positive
    return (w_neg * s - w_pos * (s - margin)).sum(1), w_pos, w_neg


def _lifted(s: Tensor, positive: Tensor, negative: Tensor, settings: _Settings) -> _Weighting:
    """L_i = [log sum_pos e^{base - S} + log sum_neg e^S]_+."""
    near = (settings.base - s).masked_fill(~positive, -math.inf)
    far = s.masked_fill(~negative, -math.inf)
    log_near, log_far = near.logsumexp(1, keepdim=True), far.logsumexp(1, keepdim=True)
    inactive = log_near + log_far <= 0  # false for NaN, which is to be seen
    w_pos = (near - log_near).exp().masked_fill(inactive, 0)
    w_neg = (far - log_far).exp().masked_fill(inactive, 0)
    return (log_near + log_far).masked_fill(inactive, 0).squeeze(1), w_pos, w_neg


def _binomial(s: Tensor, positive: Tensor, negative: Tensor, settings: _Settings) -> _Weighting:
    """L_i = mean_pos log(1 + e^{alpha (base - S)}) + mean_neg log(1 + e^{beta (S - base)})."""
    near, far = settings.alpha * (settings.base - s), settings.beta * (s - settings.base)
    share_pos = positive / positive.sum(1, keepdim=True).clamp_min(1).to(s)
    share_neg = negative / negative.sum(1, keepdim=True).clamp_min(1).to(s)
    log_one_plus = nn.functional.softplus
    loss = (share_pos * log_one_plus(near) + share_neg * log_one_plus(far)).sum(1)
    return loss, share_pos * settings.alpha * near.sigmoid(), share_neg * settings.beta * far.sigmoid()


def _multi_similarity(s: Tensor, positive: Tensor, negative: Tensor, settings: _Settings) -> _Weighting:
    """See `heliostat.components.multi_similarity_loss`; of an anchor, the weights of either kind sum to less than 1."""
    near = (settings.alpha * (settings.base - s)).masked_fill(~positive, -math.inf)
    far = (settings.beta * (s - settings.base)).masked_fill(~negative, -math.inf)
    zero = s.new_zeros(len(s), 1)
    log_near = torch.cat([zero, near], 1).logsumexp(1, keepdim=True)
    log_far = torch.cat([zero, far], 1).logsumexp(1, keepdim=True)
    loss = (log_near / settings.alpha + log_far / settings.beta).squeeze(1)
    return loss, (near - log_near).exp(), (far - log_far).exp()


_SCHEMES: dict[str, Callable[[Tensor, Tensor, Tensor, _Settings], _Weighting]] = {
    "contrastive": _contrastive,
    "triplet": _triplet,
    "lifted": _lifted,
    "binomial": _binomial,
    "multi_similarity": _multi_similarity,
}


def pair_weights(
    similarity: Tensor,
    labels: Tensor,
    scheme: PairScheme | Literal["multi_similarity"],
    *,
    ref_labels: Tensor | None = None,
    own_index: Tensor | None = None,
    epsilon: float | None = None,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    margin: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Weight |dL_i / dS_ij| that a pair-based loss gives to every pair of an anchor.

    Args:
        similarity: S, ``(N, M)``.
        labels: Classes of the anchors, ``(N,)``.
        scheme: The loss: ``"contrastive"`` (uses ``base``), ``"triplet"`` (``margin``), ``"lifted"`` (``base``),
            ``"binomial"`` or ``"multi_similarity"`` (``alpha``, ``beta``, ``base``).
        ref_labels: Classes of the references, ``(M,)``; default: the anchors are compared with themselves.
        own_index: Place of each anchor among the references, -1 where it is not there; default: row i is column i if
            there are no ``ref_labels``, else -1.
        epsilon: Margin of the multi-similarity miner; default: all pairs count.
        alpha: Scale of positive similarities.
        beta: Scale of negative similarities.
        base: Similarity threshold lambda.
        margin: By how much a positive should be more similar than a negative.

    Returns:
        Weights of positive and of negative pairs, ``(N, M)`` each, not negative, zero at all other pairs.

    Raises:
        ValueError: On an unknown scheme or shapes that do not fit.
    """
    if scheme not in _SCHEMES:
        raise ValueError(f"scheme must be one of {[*_SCHEMES]}, got {scheme!r}")
    own = torch.full_like(labels, -1) if own_index is None else own_index
    if ref_labels is None:
        own = torch.arange(len(labels), device=labels.device) if own_index is None else own
        ref_labels = labels
    if similarity.shape != (len(labels), len(ref_labels)):
        raise ValueError(
            f"similarity must have shape (N, M) = ({len(labels)}, {len(ref_labels)}), got {tuple(similarity.shape)}"
        )
    refs = References(similarity, labels, similarity, ref_labels, own)
    with torch.no_grad():
        return _weigh(similarity, refs, scheme, epsilon, _Settings(alpha, beta, base, margin))[1:]


def _weigh(s: Tensor, refs: References, scheme: str, epsilon: float | None, settings: _Settings) -> _Weighting:
    positive, negative = pair_masks(refs)
    if epsilon is not None:
        positive, negative = mine(s, positive, negative, epsilon)
    return _SCHEMES[scheme](s, positive, negative, settings)


def pair_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    scheme: PairScheme = "contrastive",
    epsilon: float | None = None,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    margin: float = 0.1,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    own_index: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Contrastive, triplet, lifted-structure or binomial-deviance loss of a labelled batch, on cosine similarities.

        contrastive  L_i = sum_neg [S - base]_+ - sum_pos S
        triplet      L_i = sum over positives p and negatives n of [S_in - S_ip + margin]_+
        lifted       L_i = [log sum_pos e^{base - S} + log sum_neg e^S]_+
        binomial     L_i = mean_pos log(1 + e^{alpha (base - S)}) + mean_neg log(1 + e^{beta (S - base)})

    Args:
        embeddings: Anchors, ``(N, d)``.
        labels: Their classes, ``(N,)``, any integers.
        scheme: The loss.
        epsilon: Keep only pairs that compete, by the miner of multi-similarity with this margin; default: all pairs.
        alpha: Scale of positive similarities.
        beta: Scale of negative similarities.
        base: Similarity threshold lambda.
        margin: By how much a positive should be more similar than a negative.
        ref_embeddings: What anchors are compared with, as in `multi_similarity_loss`.
        ref_labels: Their classes.
        own_index: Place of each anchor among the references.
        normalize: Scale rows to unit length.
        reduction: ``"mean"`` over the N anchors, ``"sum"``, or ``"none"`` for ``(N,)``.
        process_group: Compare with all processes' rows, as in `multi_similarity_loss`.

    Returns:
        Scalar or ``(N,)``, float32 (float64 for float64 input). It can be differentiated once.

    Raises:
        ValueError: On an unknown scheme or shapes that do not fit.
    """
    if scheme not in get_args(PairScheme):
        raise ValueError(f"scheme must be one of {get_args(PairScheme)}, got {scheme!r}")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    with torch.autocast(embeddings.device.type, enabled=False):
        refs = resolve_references(
            embeddings,
            labels,
            ref_embeddings=ref_embeddings,
            ref_labels=ref_labels,
            own_index=own_index,
            normalize=normalize,
            process_group=process_group,
        )
        s = refs.anchors @ refs.embeddings.mT
        loss, w_pos, w_neg = _weigh(s.detach(), refs, scheme, epsilon, _Settings(alpha, beta, base, margin))
        weighted = ((w_neg - w_pos) * s).sum(1)
        terms = loss + (weighted - weighted.detach())  # the loss's value, the weighted sum's gradient
    if reduction == "none":
        return terms
    return terms.sum() / (max(1, len(labels)) if reduction == "mean" else 1)


class PairLoss(nn.Module):
    """`pair_loss` over the rows of all processes.

    Args:
        scheme: ``"contrastive"``, ``"triplet"``, ``"lifted"`` or ``"binomial"``.
        epsilon: Margin of the multi-similarity miner; ``None``: all pairs.
        alpha: Scale of positive similarities (binomial).
        beta: Scale of negative similarities (binomial).
        base: Similarity threshold (contrastive, lifted, binomial).
        margin: Margin (triplet).
        normalize: Scale embeddings to unit length.
        gather: Compare with the other processes' rows whenever `torch.distributed` runs. Averaged over processes, value
            and gradient are then those of one process with the whole batch.
    """

    def __init__(
        self,
        scheme: PairScheme = "contrastive",
        *,
        epsilon: float | None = None,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        margin: float = 0.1,
        normalize: bool = True,
        gather: bool = True,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "scheme": scheme,
            "epsilon": epsilon,
            "alpha": alpha,
            "beta": beta,
            "base": base,
            "margin": margin,
            "normalize": normalize,
        }
        self.gather = gather

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        ref_embeddings: Tensor | None = None,
        ref_labels: Tensor | None = None,
        own_index: Tensor | None = None,
    ) -> Tensor:
        """Scalar loss of ``embeddings`` ``(N, d)`` with ``labels`` ``(N,)``; given references replace the batch."""
        return pair_loss(
            embeddings,
            labels,
            ref_embeddings=ref_embeddings,
            ref_labels=ref_labels,
            own_index=own_index,
            process_group=default_group() if self.gather and ref_embeddings is None else None,
            **self.settings,
        )
