"""MC-GRPO: median-centred advantages for few rollouts a prompt (2026, arXiv 2601.22582).

With two to four rollouts the group's mean is a poor baseline: one outlying reward turns the sign of the others. Here G
+ 1 rollouts are drawn, their median is the baseline and the median absolute deviation (MAD) the scale, and the median
rollout, whose advantage is 0, is left out of the update. For graded or noisy rewards: with binary ones the MAD is 0 in
every group. The loss is any of `heliostat.components.clipped_surrogate_loss`. The equations are those of the released
code.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Scale = Literal["mad", "std", "none"]

_ZERO = 1e-6  # an advantage up to this counts as none in nonzero_rescale


class MedianAdvantages(NamedTuple):
    """What `median_centered_advantages` returns, for N prompts with K rollouts each."""

    advantages: Tensor
    """``(N, K)``; 0 for the pivot and for missing rollouts."""
    keep_mask: Tensor
    """Boolean ``(N, K)``: rollouts to learn from."""
    median: Tensor
    """``(N,)``; NaN where all rewards are missing."""
    mad: Tensor
    """``(N,)``, without eps; NaN where all rewards are missing."""
    pivot_index: Tensor
    """``(N,)``: the first rollout whose reward is the median; -1 where all are missing."""


def median_centered_advantages(
    rewards: Tensor,
    num_per_group: int | None = None,
    *,
    scale: Scale = "mad",
    eps: float = 1e-3,
    min_scale: float = 0.0,
    nonzero_rescale: bool = False,
    allow_even: bool = False,
) -> MedianAdvantages:
    """Advantages about the median of a prompt's K = G + 1 rollouts, and which one to drop.

        A_i = (r_i - med) / max(MAD + eps, min_scale),   MAD = median_i |r_i - med|

    A prompt where a majority has the same reward has MAD = 0, and its advantages are differences divided by eps: +-1000
    for rewards of 0 and 1. ``scale="std"`` or ``min_scale`` avoid that. A warning tells if it is so in more than half
    of the groups that have any spread.

    Args:
        rewards: r, ``(N, K)``, or flat ``(N * K,)`` with ``num_per_group``. NaN: missing, e.g. a reward function that
            failed; such a rollout counts nowhere. Where a group is spread over processes, give the gathered rewards, in
            the same order to all.
        num_per_group: K of flat rewards.
        scale: ``"mad"``, the authors'; ``"std"`` (unbiased); ``"none"`` divides by 1.
        eps: Added to the MAD or standard deviation, >= 0.
        min_scale: Least that is divided by, >= 0.
        nonzero_rescale: Multiply by K / (number of advantages that are not 0), as the authors do for GSM8K.
        allow_even: Accept an even K, as in evaluation: the median is then the lower middle and nothing is dropped.

    Returns:
        See `MedianAdvantages`; without gradient, float32 (float64 for float64 input).

    Raises:
        ValueError: On a shape that does not fit, K < 3 or even, or settings out of range.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale must be one of {get_args(Scale)}, got {scale!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if not min_scale >= 0:
        raise ValueError(f"min_scale must be >= 0, got {min_scale}")
    if num_per_group is not None:
        if rewards.ndim != 1 or num_per_group < 1 or len(rewards) % num_per_group:
            raise ValueError(
                f"rewards must be flat, (N * K,) with K = num_per_group = {num_per_group}, got {tuple(rewards.shape)}"
            )
        rewards = rewards.view(-1, num_per_group)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have shape (N, K), or flat with num_per_group, got {tuple(rewards.shape)}")
    k = rewards.shape[1]
    if k % 2 == 0 and not allow_even:
        raise ValueError(
            f"rewards must have an odd number of rollouts a prompt, G + 1 with even G, got K = {k}: "
            "draw one more, or set allow_even=True where nothing is to be dropped"
        )
    if k < 3 and not allow_even:
        raise ValueError(
            f"rewards must have K = G + 1 >= 3 rollouts a prompt: fewer leave nothing to learn, got K = {k}"
        )
    r = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    valid = ~r.isnan()
    count = valid.sum(1)
    median = _lower_median(r, valid)
    centred = r - median[:, None]
    mad = _lower_median(centred.abs(), valid)
    if scale == "mad":
        divisor = mad + eps
    elif scale == "std":
        offset = centred.where(valid, 0)
        mean = offset.sum(1) / count.clamp_min(1)
        squares = (offset - mean[:, None]).square().where(valid, 0).sum(1)
        divisor = (squares / (count - 1).clamp_min(1)).sqrt() + eps
    else:
        divisor = torch.ones_like(mad)
    divisor = divisor.clamp_min(min_scale)
    advantages = (centred / divisor[:, None]).where(valid & (centred != 0), 0)
    if scale == "mad":
        spread = (centred != 0).where(valid, False).any(1)
        if 2 * (spread & (mad == 0)).sum() > spread.sum() and min_scale <= eps:
            warnings.warn(
                "more than half of the groups with any spread have a median absolute deviation of 0, so their "
                f"advantages are differences divided by eps={eps}: use scale='std' or min_scale for such rewards",
                stacklevel=2,
            )
    if nonzero_rescale:
        nonzero = (advantages.abs() > _ZERO).sum(1)
        factor = count.to(r.dtype) / nonzero.clamp_min(1)
        advantages = advantages.where(advantages.abs() <= _ZERO, advantages * factor[:, None])
    pivot = (r == median[:, None]).to(torch.uint8).argmax(1)  # the first of equals
    keep = valid
    if k % 2:
        keep = valid & (torch.arange(k, device=r.device) != pivot[:, None])
    return MedianAdvantages(advantages, keep, median, mad, pivot.where(count > 0, -1))


def _lower_median(values: Tensor, valid: Tensor) -> Tensor:
    """The middle of each row's valid values, the lower one of two; NaN without any."""
    ordered = values.where(valid, math.inf).sort(1).values
    count = valid.sum(1)
    middle = ordered.gather(1, ((count - 1).clamp_min(0) // 2)[:, None])[:, 0]
    return middle.where(count > 0, math.nan)


def drop_pivots(keep_mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Leave one rollout out of every group: the first that is not kept.

    That is the pivot, or a missing rollout, in which case the pivot stays and is masked: give ``keep_mask`` itself
    among the tensors to have the mask of what is left, the ``rollout_mask`` of the loss.

    Args:
        keep_mask: Boolean ``(N, K)``, of `median_centered_advantages`.
        tensors: ``(N, K, ...)``: token ids, masks, log-probabilities, advantages.

    Returns:
        The tensors with ``(N, K - 1, ...)``; as they are where every rollout of every group is kept.

    Raises:
        ValueError: On shapes that do not fit, or if some groups keep all of their rollouts and others do not.
    """
    if keep_mask.ndim != 2 or keep_mask.dtype != torch.bool:
        raise ValueError(f"keep_mask must be boolean (N, K), got {keep_mask.dtype} {tuple(keep_mask.shape)}")
    for number, tensor in enumerate(tensors):
        if tensor.shape[:2] != keep_mask.shape:
            raise ValueError(
                f"tensors must have shape (N, K, ...) with (N, K) of keep_mask, {tuple(keep_mask.shape)}, "
                f"got {tuple(tensor.shape)} at place {number}"
            )
    whole = int(keep_mask.all(1).sum())
    if whole == len(keep_mask):
        return tensors
    if whole:
        raise ValueError(
            f"keep_mask keeps all rollouts of {whole} of {len(keep_mask)} groups: one of every group must be left out, "
            "so that all have the same number"
        )
    dropped = (~keep_mask).to(torch.uint8).argmax(1)
    order = torch.arange(keep_mask.shape[1] - 1, device=keep_mask.device)
    index = order + (order >= dropped[:, None]).long()  # (N, K-1)
    groups = torch.arange(len(keep_mask), device=keep_mask.device)[:, None]
    return tuple(tensor[groups, index] for tensor in tensors)
