"""DYPO: difficulty decides whether a prompt is imitated or reinforced (ACL 2026 Findings, arXiv 2604.08926).

Each prompt's rollouts, with verifiable rewards, say how hard it is for the present policy. Where all fail it learns a
demonstration, drawn from several teachers; where some succeed it learns from its own rollouts, by GRPO mixed with a
pairwise loss; where all succeed it learns nothing. For models that fail outright on a part of the data, where GRPO has
no signal, with demonstrations that are not good enough to imitate throughout. No code has been published: this follows
the paper's text. What stands at tokens and rollouts that are masked is never read.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from heliostat.components.distributed import default_group
from heliostat.components.policy_gradient import (
    RatioLevel,
    check_groups,
    check_mask,
    check_rollouts,
    check_shape,
    clipped_surrogate_loss,
    group_relative_advantages,
    shared_count,
)

HARD, MID, EASY, SKIP = 0, 1, 2, -1

LengthReduction = Literal["token_mean", "sum"]
Normalize = Literal["prompts", "branch"]


class DYPOOutput(NamedTuple):
    """What `dypo_loss` returns. Losses of prompts are 0 outside of their branch, and before alpha and gamma."""

    loss: Tensor
    """Scalar."""
    tier: Tensor
    """``(B,)``, see `grade_groups`."""
    grpo: Tensor
    """``(B,)``."""
    gal: Tensor
    """``(B,)``."""
    sft: Tensor
    """``(B,)``."""
    n_pairs: Tensor
    """``(B,)``: pairs of rollouts of different reward, of every prompt."""
    stats: dict[str, Tensor]
    """Over the prompts of all processes, without gradient: ``frac_hard``, ``frac_mid``, ``frac_easy``, ``frac_skip``;
    ``offline_ratio``, Hard among Hard and Mid; ``hard_without_teacher``, their number; ``reward``; ``gal_margin`` and
    ``pair_accuracy`` (share of d > 0) of the pairs of Mid prompts."""


def grade_groups(
    rewards: Tensor,
    rollout_mask: Tensor | None = None,
    *,
    success_threshold: float = 0.5,
    hard_max_successes: int = 0,
    easy_max_failures: int = 0,
) -> Tensor:
    """How hard each prompt is for the policy that drew its rollouts.

    Args:
        rewards: ``(B, G)``.
        rollout_mask: Boolean ``(B, G)``, rollouts that count; default: all.
        success_threshold: A reward above it is a success.
        hard_max_successes: Hard are prompts with at most so many successes, in 0..G-1; the paper's is 0.
        easy_max_failures: Easy are others with at most so many failures, in 0..G-1; the paper's is 0.

    Returns:
        ``(B,)`` integers: 0 Hard, 1 Mid, 2 Easy, -1 Skip (no rollout counts). Hard comes before Easy.

    Raises:
        ValueError: On shapes that do not fit, settings out of range, or a reward that counts and is NaN.
    """
    valid = check_groups(rewards, rollout_mask)
    for name, value in (("hard_max_successes", hard_max_successes), ("easy_max_failures", easy_max_failures)):
        if not 0 <= value < max(1, rewards.shape[1]):
            raise ValueError(f"{name} must lie in 0..G-1 with G = rewards.shape[1] = {rewards.shape[1]}, got {value}")
    failed = int((rewards.isnan() & valid).sum())
    if failed:
        raise ValueError(
            f"rewards holds {failed} NaN, which can be no success or failure: leave them out by rollout_mask"
        )
    count = valid.sum(1)
    successes = ((rewards > success_threshold) & valid).sum(1)
    tier = torch.full_like(count, MID)
    tier[count - successes <= easy_max_failures] = EASY
    tier[successes <= hard_max_successes] = HARD
    tier[count == 0] = SKIP
    return tier


def group_alignment_loss(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    token_mask: Tensor | None = None,
    rollout_mask: Tensor | None = None,
    *,
    beta: float = 1.0,
    reduction: Literal["none", "mean"] = "none",
) -> Tensor:
    """Pairwise preference loss over all pairs of a prompt's rollouts with different rewards (GAL).

        L = mean over (s, f) with r_s > r_f of  -log sigmoid(beta d_sf)
        d_sf = (S_s - S^ref_s) - (S_f - S^ref_f),   S_i = sum_t log pi(t)

    DPO's form on the policy's own rollouts: a pair that is set apart already weighs sigmoid(-beta d), next to nothing.
    Sums of log-probabilities, not means. On the first step after the reference every d is 0, and the gradient is
    GRPO's times a number, so the reference must be an older policy than the one that drew the rollouts.

    Args:
        logps: log pi of tokens, ``(B, G, T)``, or their sums, ``(B, G)``.
        ref_logps: Those of the reference, of the same shape; detached here.
        rewards: ``(B, G)``. Only their order counts; a NaN is in no pair.
        token_mask: Boolean ``(B, G, T)``, needed with tokens.
        rollout_mask: Boolean ``(B, G)``; default: all.
        beta: > 0.
        reduction: ``"none"``, or ``"mean"`` over the prompts of all processes that have a pair.

    Returns:
        ``(B,)`` or a scalar, float32 (float64 for float64 input); 0, attached to the graph, without pairs.

    Raises:
        ValueError: On shapes that do not fit, or settings out of range.
    """
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    if reduction not in ("none", "mean"):
        raise ValueError(f"reduction must be 'none' or 'mean', got {reduction!r}")
    with torch.autocast(logps.device.type, enabled=False):
        margins, pairs = _pair_margins(logps, ref_logps, rewards, token_mask, rollout_mask)
        loss = _mean_over_pairs(-F.logsigmoid(beta * margins), pairs)
        if reduction == "mean":
            loss = loss.sum() / shared_count(pairs.any(2).any(1).sum().to(loss.dtype))
        return loss


def _pair_margins(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, token_mask: Tensor | None, rollout_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """d_sf and whether (s, f) is a pair, ``(B, G, G)``; d is 0 where it is none."""
    valid = check_groups(rewards, rollout_mask)
    if logps.ndim not in (2, 3) or logps.shape[:2] != rewards.shape:
        raise ValueError(
            f"logps must have shape (B, G, T) or (B, G) with (B, G) of rewards, {tuple(rewards.shape)}, "
            f"got {tuple(logps.shape)}"
        )
    check_shape("ref_logps", ref_logps, logps.shape, "of logps")
    dtype = torch.promote_types(logps.dtype, torch.float32)
    current, reference = logps.to(dtype), ref_logps.detach().to(dtype)
    if logps.ndim == 3:
        if token_mask is None:
            raise ValueError("token_mask is needed with logps of shape (B, G, T)")
        check_mask("token_mask", token_mask, logps.shape, "(B, G, T) of logps")
        current, reference = (x.where(token_mask, 0).sum(2) for x in (current, reference))
    gain = current - reference  # (B, G)
    pairs = (rewards[:, :, None] > rewards[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    return (gain[:, :, None] - gain[:, None, :]).where(pairs, 0), pairs


def _mean_over_pairs(values: Tensor, pairs: Tensor) -> Tensor:
    return values.where(pairs, 0).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)


def sample_teachers(available: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one of the available teachers for each prompt, all with the same probability.

    Args:
        available: Boolean ``(B, M)``.
        generator: Of the random numbers; M are drawn a prompt. For draws that do not depend on how prompts are divided
            among processes, call this prompt by prompt with generators seeded by seed, prompt and step.

    Returns:
        ``(B,)`` integers in 0..M-1, or -1 without any.

    Raises:
        ValueError: If ``available`` is not boolean ``(B, M)``.
    """
    if available.ndim != 2 or available.dtype != torch.bool:
        raise ValueError(f"available must be boolean (B, M), got {available.dtype} {tuple(available.shape)}")
    if available.shape[1] == 0:
        return available.new_full((len(available),), -1, dtype=torch.long)
    device = available.device if generator is None else generator.device
    lots = torch.rand(available.shape, generator=generator, device=device).to(available.device)
    return lots.where(available, -1).argmax(1).where(available.any(1), -1)


def multi_teacher_nll(
    teacher_logps: Tensor,
    token_mask: Tensor,
    available: Tensor,
    teacher_index: Tensor | None = None,
    *,
    length_reduction: LengthReduction = "token_mean",
) -> Tensor:
    """Negative log-likelihood of the drawn teacher's demonstration, or its mean over the available teachers.

    The mean is the expectation of the draw: the same gradient on average, without its noise.

    Args:
        teacher_logps: log pi of the demonstrations' tokens, ``(B, M, T)``.
        token_mask: Boolean ``(B, M, T)``.
        available: Boolean ``(B, M)``: which teachers have a demonstration.
        teacher_index: ``(B,)`` in 0..M-1, e.g. of `sample_teachers`, or -1 for none; default: the mean.
        length_reduction: ``"token_mean"``, or ``"sum"`` over tokens as the paper's equation has it.

    Returns:
        ``(B,)``, float32 (float64 for float64 input); 0, attached to the graph, for prompts without a teacher.

    Raises:
        ValueError: On shapes that do not fit, an unknown reduction, or an index of a teacher that is not available.
    """
    if length_reduction not in get_args(LengthReduction):
        raise ValueError(f"length_reduction must be one of {get_args(LengthReduction)}, got {length_reduction!r}")
    if teacher_logps.ndim != 3:
        raise ValueError(f"teacher_logps must have shape (B, M, T), got {tuple(teacher_logps.shape)}")
    check_mask("token_mask", token_mask, teacher_logps.shape, "(B, M, T) of teacher_logps")
    check_mask("available", available, teacher_logps.shape[:2], "(B, M) of teacher_logps")
    used = available
    if teacher_index is not None:
        check_shape("teacher_index", teacher_index, teacher_logps.shape[:1], "(B,) of teacher_logps")
        teachers = torch.arange(available.shape[1], device=available.device)
        used = (teacher_index[:, None] == teachers) & available
        wrong = (teacher_index != -1) & ~used.any(1)
        if wrong.any():
            raise ValueError(
                f"teacher_index must name an available teacher or be -1, got {teacher_index[wrong].tolist()} "
                f"at {wrong.nonzero()[:, 0].tolist()}"
            )
    keep = token_mask & used[:, :, None]
    logps = teacher_logps.to(torch.promote_types(teacher_logps.dtype, torch.float32)).where(keep, 0)
    nll = -logps.sum(2)
    if length_reduction == "token_mean":
        nll = nll / keep.sum(2).clamp_min(1)
    return nll.sum(1) / used.sum(1).clamp_min(1)


def dypo_loss(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    rewards: Tensor,
    token_mask: Tensor,
    rollout_mask: Tensor | None = None,
    *,
    teacher_logps: Tensor | None = None,
    teacher_token_mask: Tensor | None = None,
    teacher_available: Tensor | None = None,
    teacher_index: Tensor | None = None,
    alpha: float = 0.5,
    beta_gal: float = 1.0,
    gamma: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    adv_ddof: int = 1,
    adv_eps: float = 1e-6,
    ratio_level: RatioLevel = "token",
    sft_length: LengthReduction = "token_mean",
    success_threshold: float = 0.5,
    hard_max_successes: int = 0,
    easy_max_failures: int = 0,
    normalize: Normalize = "prompts",
) -> DYPOOutput:
    """The whole objective of a batch of prompts.

        L = 1/B' { sum_Hard gamma L_SFT + sum_Mid [ alpha L_GRPO + (1 - alpha) L_GAL ] }

    B' counts the prompts of all processes that have rollouts, Easy ones too. Averaged over processes, value and
    gradient are those of one process with all prompts.

    Args:
        logps: log pi of the rollouts' tokens, ``(B, G, T)``.
        old_logps: Those of the policy that drew them.
        ref_logps: Those of the reference, which the paper does not name: the policy before training, kept fixed.
            ``None`` if neither GAL (``alpha=1``) nor ``kl_coef`` needs it.
        rewards: ``(B, G)``. Success decides the branch; advantages and pairs take the rewards themselves.
        token_mask: Boolean ``(B, G, T)``.
        rollout_mask: Boolean ``(B, G)``; default: all.
        teacher_logps: log pi of the demonstrations' tokens, ``(B, M, T')``; ``None``: Hard prompts teach nothing.
        teacher_token_mask: Boolean ``(B, M, T')``.
        teacher_available: Boolean ``(B, M)``.
        teacher_index: ``(B,)``, see `multi_teacher_nll`; default: the mean over teachers.
        alpha: Share of GRPO for Mid prompts, in [0, 1].
        beta_gal: See `group_alignment_loss`.
        gamma: Weight of imitation, >= 0; the paper gives none.
        clip_low: See `clipped_surrogate_loss`, so are the next two; the paper gives no values.
        clip_high: > 0.
        kl_coef: >= 0.
        adv_ddof: See `group_relative_advantages`.
        adv_eps: See `group_relative_advantages`.
        ratio_level: See `clipped_surrogate_loss`.
        sft_length: See `multi_teacher_nll`.
        success_threshold: See `grade_groups`, so are the next two.
        hard_max_successes: In 0..G-1.
        easy_max_failures: In 0..G-1.
        normalize: ``"prompts"``, the equation; ``"branch"``: gamma times the mean over Hard prompts plus that over Mid.

    Returns:
        The loss and its parts. The loss is attached to ``logps`` and ``teacher_logps`` whatever the tiers are, so that
        a process with nothing to learn takes part in backward.

    Raises:
        ValueError: On shapes that do not fit, settings out of range, or what a setting needs and lacks.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if not gamma >= 0:
        raise ValueError(f"gamma must be >= 0, got {gamma}")
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize must be one of {get_args(Normalize)}, got {normalize!r}")
    if alpha < 1 and ref_logps is None:
        raise ValueError(f"ref_logps is needed for GAL at alpha={alpha}: pass it, or set alpha=1")
    valid = check_rollouts(logps, token_mask, rollout_mask)
    check_shape("rewards", rewards, logps.shape[:2], "(B, G) of logps")
    tier = grade_groups(
        rewards,
        valid,
        success_threshold=success_threshold,
        hard_max_successes=hard_max_successes,
        easy_max_failures=easy_max_failures,
    )
    hard, mid = tier == HARD, tier == MID
    learnt = valid & mid[:, None]  # other prompts' rollouts are masked from the start: they have value and gradient 0
    with torch.autocast(logps.device.type, enabled=False):
        grpo = clipped_surrogate_loss(
            logps,
            old_logps,
            group_relative_advantages(rewards, valid, ddof=adv_ddof, eps=adv_eps),
            token_mask,
            learnt,
            ref_logps=ref_logps,
            clip_low=clip_low,
            clip_high=clip_high,
            kl_coef=kl_coef,
            ratio_level=ratio_level,
        )
        reference = logps.detach() if ref_logps is None else ref_logps
        gal = group_alignment_loss(logps, reference, rewards, token_mask, learnt, beta=beta_gal)
        margins, pairs = _pair_margins(logps.detach(), reference, rewards, token_mask, valid)
        sft = torch.zeros_like(grpo)
        taught = torch.zeros_like(hard)
        if teacher_logps is not None:
            if teacher_token_mask is None or teacher_available is None:
                raise ValueError("teacher_token_mask and teacher_available are needed with teacher_logps")
            if len(teacher_logps) != len(tier):
                raise ValueError(f"teacher_logps must have B = {len(tier)} prompts, got {len(teacher_logps)}")
            check_mask("teacher_available", teacher_available, teacher_logps.shape[:2], "(B, M) of teacher_logps")
            index = None if teacher_index is None else teacher_index.where(hard, -1)
            sft = multi_teacher_nll(
                teacher_logps,
                teacher_token_mask,
                teacher_available & hard[:, None],
                index,
                length_reduction=sft_length,
            )
            taught = teacher_available.any(1) if index is None else index >= 0
        # A term of weight 0 is left out, not multiplied: 0 x inf is NaN.
        rl = sum((w * x for w, x in ((alpha, grpo), (1 - alpha, gal)) if w > 0), torch.zeros_like(grpo))
        imitation = gamma * sft if gamma > 0 else torch.zeros_like(sft)
        counts = torch.stack([tier != SKIP, hard, mid]).sum(1).to(rl.dtype)
        graded, hard_count, mid_count = shared_count(counts)
        if normalize == "prompts":
            loss = (rl + imitation).sum() / graded
        else:
            loss = imitation.sum() / hard_count + rl.sum() / mid_count
        stats = _statistics(rewards, valid, tier, hard & ~taught, margins, pairs & mid[:, None, None])
    return DYPOOutput(loss, tier, grpo, gal, sft, pairs.sum((1, 2)), stats)


@torch.no_grad()
def _statistics(
    rewards: Tensor, valid: Tensor, tier: Tensor, untaught: Tensor, margins: Tensor, pairs: Tensor
) -> dict[str, Tensor]:
    parts = [(tier == code).sum() for code in (HARD, MID, EASY, SKIP)]
    parts += [untaught.sum(), valid.sum(), rewards.where(valid, 0).sum(dtype=margins.dtype)]
    parts += [pairs.sum(), margins.where(pairs, 0).sum(), ((margins > 0) & pairs).sum()]
    sums = torch.stack([part.to(margins.dtype) for part in parts])
    group = default_group()
    if group is not None:
        dist.all_reduce(sums, group=group)
    hard, mid, easy, skip, without, rollouts, reward, count, margin, right = sums
    prompts = (hard + mid + easy + skip).clamp_min(1)
    return {
        "frac_hard": hard / prompts,
        "frac_mid": mid / prompts,
        "frac_easy": easy / prompts,
        "frac_skip": skip / prompts,
        "offline_ratio": hard / (hard + mid).clamp_min(1),
        "hard_without_teacher": without,
        "reward": reward / rollouts.clamp_min(1),
        "gal_margin": margin / count.clamp_min(1),
        "pair_accuracy": right / count.clamp_min(1),
    }
