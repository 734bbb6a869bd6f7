"""Multi-similarity loss (CVPR 2019, arXiv 1904.06627): pair-based metric learning on a labelled batch.

For each anchor the miner keeps the pairs that compete, negatives more similar than the least similar positive and
positives less similar than the most similar negative, within a margin. The loss weighs a kept pair by its similarity
and by how that compares with the anchor's other pairs. For embeddings that are to retrieve classes unseen in training,
in the place of contrastive or triplet loss; there are no class weights.

The gradient is known in closed form, so the loss is evaluated block by block and nothing of the N x M similarities is
kept: memory grows with N + M.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from heliostat.components.distributed import default_group
from heliostat.components.references import References, resolve_references

Reduction = Literal["mean", "sum", "none"]

_BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}  # of a block of similarities: fits the cache; fills the device
_NEGLIGIBLE = 60.0  # e^-60 of the largest exponential does not change a sum, but denormal numbers would cost time


class _Settings(NamedTuple):
    alpha: float
    beta: float
    base: float
    epsilon: float
    mining: bool
    duplicate_threshold: float | None
    block_size: int


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float = 0.1,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    own_index: Tensor | None = None,
    mining: bool = True,
    normalize: bool = True,
    duplicate_threshold: float | None = None,
    ignore_label: int | None = None,
    block_size: int | None = None,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Multi-similarity loss with mining, equations 11 to 15 of the paper.

        S_ij = cosine of anchor i and reference j;  P_i, N_i = its kept positives and negatives, see the miner
        L_i = 1/alpha log(1 + sum_{P_i} e^{-alpha (S_ij - base)}) + 1/beta log(1 + sum_{N_i} e^{beta (S_ij - base)})

    An anchor without positives, without negatives, or with nothing mined contributes 0, and counts in the mean.

    Args:
        embeddings: Anchors, ``(N, d)``, any scale unless ``normalize=False``.
        labels: Their classes, ``(N,)``, any integers.
        alpha: Scale of the positive term, > 0.
        beta: Scale of the negative term, > 0. The authors' configuration has 40.
        base: Similarity below which a positive, above which a negative, weighs in (lambda of the paper).
        epsilon: Margin of the miner.
        ref_embeddings: What anchors are compared with, ``(M, d)``: other views, a memory. Gradient flows to it if it
            requires one. Default: the batch itself, each anchor but with itself.
        ref_labels: Their classes, ``(M,)``.
        own_index: Place of each anchor among the references, -1 where it is not there, ``(N,)``; default: all -1.
        mining: Keep only competing pairs; ``False`` keeps all.
        normalize: Scale rows to unit length. The gradient passes through.
        duplicate_threshold: Also drop positives at least this similar, as the authors' code does with 1 - 1e-5.
        ignore_label: Rows of this class are neither anchors nor references, nor counted in the mean.
        block_size: Anchors evaluated at a time; default: as many as make a block fit the cache or device well. Values
            and gradients do not depend on it.
        reduction: ``"mean"`` over the N anchors, ``"sum"``, or ``"none"`` for ``(N,)``.
        process_group: Compare with all processes' rows. A mean over own rows then averages, by DDP, to value and
            gradient of one process with the whole batch.

    Returns:
        Scalar or ``(N,)``, float32 (float64 for float64 input). It can be differentiated once.

    Raises:
        ValueError: On shapes that do not fit or hyper-parameters out of range.
    """
    if alpha <= 0 or beta <= 0:
        raise ValueError(f"alpha and beta must be > 0, got {alpha} and {beta}")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be >= 1, or None to choose it, got {block_size}")
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
        kept: Tensor | None = None
        if ignore_label is not None:
            kept = labels.ne(ignore_label)
            refs = _without(refs, kept, refs.ref_labels.ne(ignore_label))
        if block_size is None:
            elements = _BLOCK_ELEMENTS.get(embeddings.device.type, 2**25)
            block_size = max(16, elements // max(1, len(refs.embeddings)))
        settings = _Settings(alpha, beta, base, epsilon, mining, duplicate_threshold, block_size)
        # The gradient of a sum is found beside its value, in one pass over the blocks; it is scaled in backward.
        terms: Tensor = _MultiSimilarity.apply(
            refs.anchors,
            None if refs.embeddings is refs.anchors else refs.embeddings,
            refs,
            settings,
            reduction != "none",
            torch.is_grad_enabled(),
        )
        if reduction == "none":
            return terms if kept is None else terms.new_zeros(kept.shape).masked_scatter(kept, terms)
        return terms / _denominator(terms, labels, kept, process_group) if reduction == "mean" else terms


def _without(refs: References, anchors_kept: Tensor, references_kept: Tensor) -> References:
    place = references_kept.cumsum(0) - 1
    own = refs.own[anchors_kept]
    anchors, labels = refs.anchors[anchors_kept], refs.labels[anchors_kept]
    own = torch.where(own < 0, own, place[own])
    if refs.embeddings is refs.anchors:
        return References(anchors, labels, anchors, labels, own)
    return References(anchors, labels, refs.embeddings[references_kept], refs.ref_labels[references_kept], own)


def _denominator(terms: Tensor, labels: Tensor, kept: Tensor | None, group: dist.ProcessGroup | None) -> float | Tensor:
    if kept is None:
        return max(1, len(labels))
    count, world = kept.sum().to(terms.dtype), 1 if group is None else group.size()
    if world > 1:  # the average over processes is to be the mean over all anchors
        dist.all_reduce(count, group=group)
    return count.clamp_min(1) / world


class _MultiSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        references: Tensor | None,
        refs: References,
        settings: _Settings,
        total: bool,
        differentiable: bool,
    ) -> Tensor:
        ctx.settings, ctx.total = settings, total
        wanted = differentiable and any(ctx.needs_input_grad[:2])
        refs = refs._replace(anchors=anchors, embeddings=anchors if references is None else references)
        if total and wanted:
            terms, *gradients = _evaluate(refs, settings, anchors.new_ones(len(anchors)), ctx.needs_input_grad[1])
            ctx.save_for_backward(*gradients)
        else:
            terms, *_ = _evaluate(refs, settings)
            if wanted:
                ctx.save_for_backward(*refs)
                ctx.self_referring = references is None
        return terms.sum() if total else terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.total:
            gradients = [None if saved is None else saved * grad for saved in ctx.saved_tensors]
        else:
            refs = References(*ctx.saved_tensors)
            if ctx.self_referring:
                refs = refs._replace(embeddings=refs.anchors)
            _, *gradients = _evaluate(refs, ctx.settings, grad, ctx.needs_input_grad[1])
        return *gradients, None, None, None, None


def _evaluate(
    refs: References, settings: _Settings, weights: Tensor | None = None, reference_gradient: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Terms L_i, and the gradients of sum_i weights_i L_i with respect to anchors and references."""
    anchors, references = refs.anchors, refs.embeddings
    itself = references is anchors
    rows, columns = len(anchors), len(references)
    terms = anchors.new_zeros(rows)
    grad_anchors = None if weights is None else torch.zeros_like(anchors)
    grad_references = torch.zeros_like(references) if reference_gradient else None
    if rows == 0 or columns == 0:
        return terms, grad_anchors, grad_references
    # Same-class references of anchor i are order[first[i] : first[i] + count[i]]: few, and found without an N x M mask.
    sorted_labels, order = refs.ref_labels.sort(stable=True)
    first = torch.searchsorted(sorted_labels, refs.labels)
    count = torch.searchsorted(sorted_labels, refs.labels, right=True) - first
    slots = torch.arange(max(1, int(count.max())), device=anchors.device)
    scaled = anchors * settings.beta
    for start in range(0, rows, settings.block_size):
        block = slice(start, start + settings.block_size)
        inside = slots < count[block, None]  # (b, K)
        same = order[(first[block, None] + slots * inside).clamp_max(columns - 1)]  # padded by repeating the first
        logits = scaled[block] @ references.mT  # (b, M): beta S
        terms[block], same_gradient = _block(
            logits, same, inside, refs.own[block], settings, None if weights is None else weights[block]
        )
        if weights is None:
            continue
        pair_gradient = logits.scatter_add_(1, same, same_gradient)  # (b, M): weights_i dL_i / dS_ij
        assert grad_anchors is not None
        if itself:
            grad_anchors[block].addmm_(pair_gradient, references)
            grad_anchors.addmm_(pair_gradient.mT, anchors[block])
        else:
            torch.mm(pair_gradient, references, out=grad_anchors[block])
            if grad_references is not None:
                grad_references.addmm_(pair_gradient.mT, anchors[block])
    return terms, grad_anchors, grad_references


def _block(
    logits: Tensor, same: Tensor, inside: Tensor, own: Tensor, settings: _Settings, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Terms of a block of anchors, and their weighted gradient with respect to the similarities at ``same``.

    ``logits``, beta S (b, M), becomes the gradient with respect to S, which is 0 at ``same``. Pairs are dropped where a
    comparison holds, not kept where one does: a NaN, for which none holds, stays and reaches the result.
    """
    alpha, beta, base = settings.alpha, settings.beta, settings.base
    positives = logits.gather(1, same) / beta  # S, (b, K)
    # An anchor whose class is not among the references has nothing to blot out: its padding points at negatives.
    logits.scatter_(1, same, torch.where(inside[:, :1], -math.inf, positives * beta))
    dropped = ~inside | (same == own[:, None])
    if settings.duplicate_threshold is not None:
        dropped |= positives >= settings.duplicate_threshold
    hardest = logits.amax(1, keepdim=True)  # beta S of the most similar negative, (b, 1)
    threshold = hardest.clamp_min(beta * base) - _NEGLIGIBLE
    if settings.mining:
        easiest = positives.masked_fill(dropped, math.inf).amin(1, keepdim=True)  # the least similar positive
        dropped |= positives - settings.epsilon >= hardest / beta
        threshold = torch.maximum(threshold, beta * (easiest - settings.epsilon))
        hardest = hardest.masked_fill(hardest <= threshold, -math.inf)
    logits.masked_fill_(logits <= threshold, -math.inf)
    log_negative, normalizer = _exponentiate(logits, hardest, beta * base)
    attraction = (-alpha * positives).masked_fill(dropped, -math.inf)
    log_positive, positive_normalizer = _exponentiate(attraction, attraction.amax(1, keepdim=True), -alpha * base)
    if weights is not None:
        logits.mul_(weights[:, None] / normalizer)
        attraction.mul_(-weights[:, None] / positive_normalizer)
    return log_negative / beta + log_positive / alpha, attraction


def _exponentiate(x: Tensor, largest: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """Return log(1 + sum_j e^{x_j - offset}), (b,), and the divisor (b, 1) that makes ``x`` its gradient."""
    shift = largest.clamp_min(offset)
    normalizer = x.sub_(shift).exp_().sum(1, keepdim=True) + (offset - shift).exp()
    return ((shift - offset) + normalizer.log()).squeeze(1), normalizer


def multi_similarity_mine(
    embeddings: Tensor,
    labels: Tensor,
    *,
    epsilon: float = 0.1,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    own_index: Tensor | None = None,
    normalize: bool = True,
    duplicate_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Pairs that compete, equations 11 and 12 of the paper; without gradient.

        keep negative j iff S_ij + epsilon > min over positives S_ik
        keep positive j iff S_ij - epsilon < max over negatives S_ik

    An anchor without positives or without negatives keeps none. The arguments are those of `multi_similarity_loss`,
    which mines block by block; here both masks are held.

    Returns:
        Kept positives and kept negatives, boolean, ``(N, M)`` each.
    """
    refs = resolve_references(
        embeddings.detach(),
        labels,
        ref_embeddings=None if ref_embeddings is None else ref_embeddings.detach(),
        ref_labels=ref_labels,
        own_index=own_index,
        normalize=normalize,
    )
    with torch.autocast(embeddings.device.type, enabled=False):
        similarity = refs.anchors @ refs.embeddings.mT
    positive, negative = pair_masks(refs)
    if duplicate_threshold is not None:
        positive &= similarity < duplicate_threshold
    return mine(similarity, positive, negative, epsilon)


def pair_masks(refs: References) -> tuple[Tensor, Tensor]:
    """Masks ``(N, M)`` of all positive and all negative pairs; an anchor and itself are neither."""
    same = refs.labels[:, None] == refs.ref_labels
    itself = torch.arange(len(refs.ref_labels), device=same.device) == refs.own[:, None]
    return same & ~itself, ~same


def mine(similarity: Tensor, positive: Tensor, negative: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The miner on given similarities and pairs, ``(N, M)`` each."""
    if similarity.shape[1] == 0:
        return positive, negative
    hardest_positive = similarity.masked_fill(~positive, math.inf).amin(1, keepdim=True)
    hardest_negative = similarity.masked_fill(~negative, -math.inf).amax(1, keepdim=True)
    return (
        positive & (similarity - epsilon < hardest_negative),
        negative & (similarity + epsilon > hardest_positive),
    )


class MultiSimilarityLoss(nn.Module):
    """`multi_similarity_loss` over the rows of all processes.

    Args:
        alpha: Scale of the positive term.
        beta: Scale of the negative term.
        base: Similarity below which a positive, above which a negative, weighs in.
        epsilon: Margin of the miner.
        mining: Keep only competing pairs.
        normalize: Scale embeddings to unit length.
        duplicate_threshold: Drop positives at least this similar.
        ignore_label: Class of rows to leave out.
        block_size: Anchors evaluated at a time.
        gather: Compare with the other processes' rows whenever `torch.distributed` runs. Averaged over processes, value
            and gradient are then those of one process with the whole batch.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        epsilon: float = 0.1,
        *,
        mining: bool = True,
        normalize: bool = True,
        duplicate_threshold: float | None = None,
        ignore_label: int | None = None,
        block_size: int | None = None,
        gather: bool = True,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "alpha": alpha,
            "beta": beta,
            "base": base,
            "epsilon": epsilon,
            "mining": mining,
            "normalize": normalize,
            "duplicate_threshold": duplicate_threshold,
            "ignore_label": ignore_label,
            "block_size": block_size,
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
        return multi_similarity_loss(
            embeddings,
            labels,
            ref_embeddings=ref_embeddings,
            ref_labels=ref_labels,
            own_index=own_index,
            process_group=default_group() if self.gather and ref_embeddings is None else None,
            **self.settings,
        )
