"""GRAO: group relative alignment optimisation (2025, arXiv 2508.07750).

Each prompt has a reference answer, the target, and sampled answers; all are scored by the same reward, and their
relative advantages say how far each one's likelihood is pushed, the target's too. A target that the samples beat is no
longer imitated, and a group that fails throughout still has a direction. For preference tuning with a judge, or
verifiable tasks with imperfect answers at hand. There is no ratio, no clipping and no reference model: one update a
batch of rollouts, with clipped gradients. No code has been published; where the paper's formulas disagree, this follows
its equation 3 and the decomposition of its gradient.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from heliostat.components.policy_gradient import (
    check_groups,
    check_mask,
    check_rollouts,
    check_shape,
    group_moments,
    shared_count,
)


class AlignmentTerms(NamedTuple):
    """What `direct_alignment_terms` returns; all ``(B,)``."""

    exploration: Tensor
    """1/G sum_i A_i J_i, times its weight."""
    imitation: Tensor
    """beta A_y J_y."""
    alignment: Tensor
    """lam/G sum_i A_i (J_i - J_y)."""
    target_log_prob: Tensor
    """J_y, detached; 0 without a target."""
    target_share: Tensor
    """|w_y| / (|w_y| + sum_i |w_i|), detached: the target's part of the push, in [0, 1]."""


def grao_advantages(
    rewards: Tensor,
    target_reward: Tensor,
    rollout_mask: Tensor | None = None,
    target_available: Tensor | None = None,
    *,
    reference_in_group: bool = True,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """How much better than their group the rollouts and the target are.

        A_i = (r_i - mu) / (sigma + eps),   A_y = (r_y - mu) / (sigma + eps)

    mu and sigma (of the population) are over the rollouts and the target. With ``reference_in_group=False`` they are
    over the rollouts alone, as the paper's formula has it and not its text: a group that fails throughout then teaches
    nothing, and the alignment term only scales exploration.

    Args:
        rewards: r, ``(B, G)``, of any scale.
        target_reward: r_y, ``(B,)``; with a judge that compares with the target, what a tie is worth.
        rollout_mask: Boolean ``(B, G)``, rollouts that count; default: all.
        target_available: Boolean ``(B,)``, prompts that have a target; default: all.
        reference_in_group: See above.
        eps: >= 0; the paper has none.

    Returns:
        A ``(B, G)`` and A_y ``(B,)`` without gradient, float32 (float64 for float64 input). 0 for what does not count,
        and for the whole prompt where sigma <= 1e-12. A NaN makes its group NaN.

    Raises:
        ValueError: On shapes that do not fit, or ``eps < 0``.
    """
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    valid = check_groups(rewards, rollout_mask)
    available = _check_target(target_reward, "target_reward", target_available, rewards.shape[:1])
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, target_reward.dtype), torch.float32)
    r, r_y = rewards.detach().to(dtype), target_reward.detach().to(dtype)
    member = available & reference_in_group
    mean, std = group_moments(torch.cat([r, r_y[:, None]], 1), torch.cat([valid, member[:, None]], 1), ddof=0)
    flat = std <= 1e-12
    advantages = ((r - mean[:, None]) / (std + eps)[:, None]).masked_fill(flat[:, None], 0)
    target = ((r_y - mean) / (std + eps)).masked_fill(flat, 0)
    return advantages.where(valid, 0), target.where(available, 0)


def direct_alignment_terms(
    logps: Tensor,
    token_mask: Tensor,
    advantages: Tensor,
    target_logps: Tensor,
    target_token_mask: Tensor,
    target_advantage: Tensor,
    *,
    beta: float = 0.5,
    lam: float = 0.6,
    exploration_weight: float = 1.0,
    min_target_advantage: float | None = None,
    rollout_mask: Tensor | None = None,
    target_available: Tensor | None = None,
) -> AlignmentTerms:
    """The terms of `group_direct_alignment_loss`, whose arguments these are, for each prompt and as they are maximised.

    Returns:
        The three terms with their weights, and what is worth logging.

    Raises:
        ValueError: As `group_direct_alignment_loss`.
    """
    for name, value in (("beta", beta), ("lam", lam), ("exploration_weight", exploration_weight)):
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    valid = check_rollouts(logps, token_mask, rollout_mask)
    check_shape("advantages", advantages, logps.shape[:2], "(B, G) of logps")
    available = _check_target(target_advantage, "target_advantage", target_available, logps.shape[:1])
    if target_logps.ndim != 2 or len(target_logps) != len(logps):
        raise ValueError(f"target_logps must have shape (B, T) with B = {len(logps)}, got {tuple(target_logps.shape)}")
    check_mask("target_token_mask", target_token_mask, target_logps.shape, "(B, T) of target_logps")
    dtype = torch.promote_types(torch.promote_types(logps.dtype, target_logps.dtype), torch.float32)
    with torch.autocast(logps.device.type, enabled=False):
        j = _token_mean(logps.to(dtype), token_mask & valid[:, :, None])  # (B, G)
        j_y = _token_mean(target_logps.to(dtype), target_token_mask & available[:, None])  # (B,)
        count = valid.sum(1).clamp_min(1)
        a = advantages.detach().to(dtype).where(valid, 0)
        a_y = target_advantage.detach().to(dtype).where(available, 0)
        if min_target_advantage is not None:
            a_y = a_y.clamp_min(min_target_advantage).where(available, 0)
        lam_of = lam * available.to(dtype)  # nothing to be aligned with where there is no target
        explored, mean_a = (a * j).sum(1) / count, a.sum(1) / count
        terms = exploration_weight * explored, beta * a_y * j_y, lam_of * (explored - mean_a * j_y)
        # As weights of the log-likelihoods: w_i = (1 + lam) A_i / G, w_y = beta A_y - lam mean_i A_i.
        rollouts = (exploration_weight + lam_of) * a.abs().sum(1) / count
        target = (beta * a_y - lam_of * mean_a).abs()
        share = target / (target + rollouts).clamp_min(torch.finfo(dtype).tiny)
        return AlignmentTerms(*terms, j_y.detach(), share)


def group_direct_alignment_loss(
    logps: Tensor,
    token_mask: Tensor,
    advantages: Tensor,
    target_logps: Tensor,
    target_token_mask: Tensor,
    target_advantage: Tensor,
    *,
    beta: float = 0.5,
    lam: float = 0.6,
    exploration_weight: float = 1.0,
    min_target_advantage: float | None = None,
    rollout_mask: Tensor | None = None,
    target_available: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Exploration, imitation and their coupling, by length-normalised log-likelihoods J.

        L = -[ 1/G sum_i A_i J_i  +  beta A_y J_y  +  lam/G sum_i A_i (J_i - J_y) ],   J = mean_t log pi(t)

    So the weights of the log-likelihoods are w_i = (1 + lam) A_i / G and w_y = beta A_y - lam mean_i A_i; with the
    target in the group w_y = (beta + lam/G) A_y.

    Args:
        logps: log pi of the rollouts' tokens, ``(B, G, T)``.
        token_mask: Boolean ``(B, G, T)``.
        advantages: A, ``(B, G)``, of `grao_advantages`; detached here.
        target_logps: log pi of the target's tokens, ``(B, T')``.
        target_token_mask: Boolean ``(B, T')``.
        target_advantage: A_y, ``(B,)``; detached here.
        beta: Weight of imitation, >= 0.
        lam: Weight of the coupling, >= 0.
        exploration_weight: >= 0; ours, for ablations.
        min_target_advantage: Lower bound of A_y, ours: a negative one pushes the target's likelihood down without
            bound, and 0.0 forbids that. Default: none, as in the paper.
        rollout_mask: Boolean ``(B, G)``, G then being their number; default: all.
        target_available: Boolean ``(B,)``; a prompt without a target has exploration alone. Default: all.
        reduction: ``"mean"`` over the prompts of all processes, or ``"none"``.

    Returns:
        Scalar or ``(B,)``, float32 (float64 for float64 input); prompts where nothing counts add 0, attached to the
        graph.

    Raises:
        ValueError: On shapes that do not fit, or settings out of range.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    terms = direct_alignment_terms(
        logps,
        token_mask,
        advantages,
        target_logps,
        target_token_mask,
        target_advantage,
        beta=beta,
        lam=lam,
        exploration_weight=exploration_weight,
        min_target_advantage=min_target_advantage,
        rollout_mask=rollout_mask,
        target_available=target_available,
    )
    loss = -(terms.exploration + terms.imitation + terms.alignment)
    return loss if reduction == "none" else loss.sum() / shared_count(loss.new_tensor(float(len(loss))))


def _token_mean(logps: Tensor, keep: Tensor) -> Tensor:
    return logps.where(keep, 0).sum(-1) / keep.sum(-1).clamp_min(1)


def _check_target(values: Tensor, name: str, available: Tensor | None, shape: torch.Size) -> Tensor:
    check_shape(name, values, shape, "(B,)")
    if available is None:
        return torch.ones_like(values, dtype=torch.bool)
    check_mask("target_available", available, shape, "(B,)")
    return available
