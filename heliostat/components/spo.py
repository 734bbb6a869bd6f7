"""SPO: single-stream policy optimisation (ICLR 2026, arXiv 2509.13232).

Policy gradients with one response a prompt. The baseline is no group of siblings but a Beta tracker of each prompt's
success rate, kept through the whole run, that forgets the faster the more the policy has moved on that prompt;
advantages are whitened over the batch, and prompts are drawn by how uncertain their outcome is. For finite sets of
prompts that are met again and again, where most groups would fail or succeed throughout, or where generation takes
unequal time; a stream of prompts that never return leaves the tracker nothing to remember. Where paper and released
code differ, this follows the code. (Segment and Simple Policy Optimization share the acronym.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heliostat.components.distributed import default_group, gather_rows
from heliostat.components.policy_gradient import check_mask, check_shape, clipped_token_losses, shared_count

Reduction = Literal["token_mean", "sequence_mean", "none"]

_MAX_LOG_RATIO = 20.0  # verl's bound of log(pi / pi_old)


class BetaValueTracker(nn.Module):
    """Success rates of n prompts, as Beta distributions that forget.

        v = alpha / (alpha + beta),   N = alpha + beta
        alpha <- rho alpha + r,   beta <- rho beta + (1 - r)   or   v <- v + (r - v) / (rho N + 1),  N <- rho N + 1

    With constant rho, N goes to 1 / (1 - rho): the number of visits that count. The buffers ``alpha``, ``beta``
    (float64, whatever precision the module is turned to) and ``visits`` are in the state dict.

    Args:
        num_prompts: n >= 1. Index prompts by a stable id, not by their place in an epoch.
        prior: What alpha and beta start from, > 0. Better is `from_offline`.

    Raises:
        ValueError: For settings out of range.
    """

    alpha: Tensor
    beta: Tensor
    visits: Tensor

    def __init__(self, num_prompts: int, prior: float = 0.5) -> None:
        super().__init__()
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be >= 1, got {num_prompts}")
        if not prior > 0:
            raise ValueError(f"prior must be > 0, or prompts without trials have no value, got {prior}")
        self.register_buffer("alpha", torch.full((num_prompts,), float(prior), dtype=torch.float64))
        self.register_buffer("beta", torch.full((num_prompts,), float(prior), dtype=torch.float64))
        self.register_buffer("visits", torch.zeros(num_prompts, dtype=torch.long))

    @classmethod
    def from_offline(
        cls, successes: Tensor, trials: Tensor | int, rho_min: float = 0.875, prior: float = 0.5
    ) -> BetaValueTracker:
        """Start from rollouts of the initial policy, which the paper found to be needed.

            alpha = N0 (successes + prior) / (trials + 2 prior),   N0 = 1 / (1 - rho_min),   beta likewise of failures

        Args:
            successes: Sum of each prompt's rewards in [0, 1], ``(n,)``.
            trials: Number of rollouts, for all or each ``(n,)``; 8 in the paper. Prompts without start from ``prior``.
            rho_min: In (0, 1), the least of `forgetting_factor`.
            prior: >= 0. 0.5 is the code's; 0 is the paper's, whose v may be exactly 0 or 1 and then teaches nothing.

        Raises:
            ValueError: On shapes that do not fit, settings out of range, or neither trials nor prior for some prompt.
        """
        if successes.ndim != 1 or len(successes) == 0:
            raise ValueError(f"successes must have shape (n,), got {tuple(successes.shape)}")
        if not 0 < rho_min < 1:
            raise ValueError(f"rho_min must be in (0, 1), got {rho_min}")
        if not prior >= 0:
            raise ValueError(f"prior must be >= 0, got {prior}")
        s = successes.detach().double()
        count = torch.as_tensor(trials, device=s.device).double().expand_as(s)
        if not ((s >= 0) & (s <= count)).all():
            raise ValueError("successes must lie between 0 and trials")
        if prior == 0 and (count == 0).any():
            raise ValueError("prior=0 needs trials of every prompt: run some, or use prior=0.5")
        tracker = cls(len(s), prior or 0.5).to(s.device)
        tried = count > 0
        window = 1 / (1 - rho_min) / (count + 2 * prior).where(tried, 1)
        tracker.alpha = (window * (s + prior)).where(tried, tracker.alpha)
        tracker.beta = (window * (count - s + prior)).where(tried, tracker.beta)
        return tracker

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BetaValueTracker:
        # Trainer(precision="bf16-true") turns the whole module into bfloat16, in which small changes are lost.
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        return super()._apply(moved, recurse)

    def value(self, index: Tensor | None = None) -> Tensor:
        """The estimated success rates v of prompts ``index``, by default all, float64."""
        v = self.alpha / (self.alpha + self.beta)
        return v if index is None else v[index]

    def effective_size(self, index: Tensor | None = None) -> Tensor:
        """The number N of visits that the values of prompts ``index``, by default all, rest on, float64."""
        size = self.alpha + self.beta
        return size if index is None else size[index]

    @torch.no_grad()
    def update(self, index: Tensor, rewards: Tensor, rho: Tensor | float) -> None:
        """Take in the rewards of one step, of all processes, so that the trackers of all stay the same.

        A prompt that occurs several times forgets once, by the least of its factors, and takes all its rewards.

        Args:
            index: ``(B,)`` in 0..n-1; the same number on every process.
            rewards: r in [0, 1], ``(B,)``. NaN: missing, the row is passed over.
            rho: Forgetting factors in (0, 1], one or ``(B,)``, e.g. of `forgetting_factor`.

        Raises:
            ValueError: On shapes that do not fit or values out of range, on all processes alike.
        """
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"index must be integers (B,), got {index.dtype} {tuple(index.shape)}")
        check_shape("rewards", rewards, index.shape, "(B,) of index")
        factor = torch.as_tensor(rho, dtype=torch.float64, device=self.alpha.device)
        if factor.ndim:
            check_shape("rho", factor, index.shape, "(B,) of index")
        rows = [index.to(self.alpha.device).double(), rewards.to(self.alpha), factor.expand(len(index))]
        places, r, factors = gather_rows(torch.stack(rows, 1)).unbind(1)  # in order of rank, then of position
        if not ((factors > 0) & (factors <= 1)).all():
            raise ValueError("rho must be in (0, 1]")
        if not ((places >= 0) & (places < len(self.alpha))).all():
            raise ValueError(f"index must lie in 0..{len(self.alpha) - 1}, the prompts of this tracker")
        seen = ~r.isnan()
        places, r, factors = places[seen].long(), r[seen], factors[seen]
        if not ((r >= 0) & (r <= 1)).all():
            raise ValueError(f"rewards must lie in [0, 1], got {r.min().item()}..{r.max().item()}: scale them")
        forgetting = torch.ones_like(self.alpha).scatter_reduce(0, places, factors, "amin")
        self.alpha.mul_(forgetting).index_add_(0, places, r)
        self.beta.mul_(forgetting).index_add_(0, places, 1 - r)
        self.visits.index_add_(0, places, torch.ones_like(places))

    def sampling_probabilities(self, explore: float = 0.05, gamma: float = 0.0) -> Tensor:
        """With which probability each prompt is drawn: p ~ sqrt(v (1 - v)) / N^gamma + explore.

        Args:
            explore: What prompts of known outcome keep, > 0.
            gamma: In [0, 1]; above 0 prompts that have been visited often are drawn less. The paper's is 0.

        Returns:
            ``(n,)``, float64, of sum 1.

        Raises:
            ValueError: For settings out of range.
        """
        if not explore > 0:
            raise ValueError(f"explore must be > 0, or prompts of value 0 and 1 are never drawn again, got {explore}")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {gamma}")
        v = self.value()
        weights = (v * (1 - v)).sqrt() / self.effective_size() ** gamma + explore
        return weights / weights.sum()


def forgetting_factor(drift: Tensor, half_life: float = 0.06, rho_min: float = 0.875, rho_max: float = 0.96) -> Tensor:
    """How much of its past a tracker keeps after the policy has drifted: rho = clip(2^(-D / half_life)).

    With the defaults only drifts between 0.0035 and 0.0116 lie between the bounds: watch the share that is clipped.

    Args:
        drift: D >= 0, any shape, e.g. of `policy_drift`; 0 for a prompt's first visit.
        half_life: The drift that halves, > 0.
        rho_min: Lower bound, in (0, 1).
        rho_max: Upper bound, in [``rho_min``, 1].

    Returns:
        Of the shape of ``drift``, float32 (float64 for float64 input).

    Raises:
        ValueError: For settings out of range.
    """
    if not half_life > 0:
        raise ValueError(f"half_life must be > 0, got {half_life}")
    if not 0 < rho_min <= rho_max <= 1:
        raise ValueError(f"rho_min and rho_max must satisfy 0 < rho_min <= rho_max <= 1, got {rho_min} and {rho_max}")
    d = drift.to(torch.promote_types(drift.dtype, torch.float32))
    return torch.exp2(-d / half_life).clamp(rho_min, rho_max)


def policy_drift(stored_logps: Tensor, current_logps: Tensor, mask: Tensor) -> Tensor:
    """How far the policy has moved on a stored response: the mean over its tokens of |log pi_stored - log pi_now|.

    Args:
        stored_logps: Those of the policy just after the last update on this prompt, ``(B, T)``.
        current_logps: Those of the present policy for the same tokens, ``(B, T)``.
        mask: Boolean ``(B, T)``.

    Returns:
        ``(B,)`` without gradient, nats a token, float32 (float64 for float64 input); 0 for an empty response.

    Raises:
        ValueError: On shapes that do not fit.
    """
    check_shape("current_logps", current_logps, stored_logps.shape, "(B, T) of stored_logps")
    check_mask("mask", mask, stored_logps.shape, "(B, T) of stored_logps")
    dtype = torch.promote_types(torch.promote_types(stored_logps.dtype, current_logps.dtype), torch.float32)
    change = (stored_logps.detach().to(dtype) - current_logps.detach().to(dtype)).abs()
    return change.where(mask, 0).sum(-1) / (mask.sum(-1, dtype=dtype) + 1e-8)


def whiten_advantages(
    adv: Tensor,
    eps: float = 1e-8,
    process_group: dist.ProcessGroup | None = None,
    *,
    token_counts: Tensor | None = None,
) -> Tensor:
    """Shift and scale advantages to mean 0 and standard deviation 1 over the batch of all processes.

        A~ = (A - mean A) / (std A + eps)

    Args:
        adv: A, ``(B,)``, e.g. rewards less the tracker's values before this step.
        eps: >= 0.
        process_group: Whose batch it is; default: all processes.
        token_counts: Lengths of the responses, ``(B,)``: the moments are then over tokens, as the loss is, instead of
            over responses. Default: responses, as the authors do.

    Returns:
        ``(B,)`` without gradient, float32 (float64 for float64 input); 0 if all are equal, and A itself if the whole
        batch is one response (or token), which has no standard deviation. A NaN makes all NaN.

    Raises:
        ValueError: On shapes that do not fit, or ``eps < 0``.
    """
    if adv.ndim != 1:
        raise ValueError(f"adv must have shape (B,), got {tuple(adv.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if token_counts is not None:
        check_shape("token_counts", token_counts, adv.shape, "(B,) of adv")
    a = adv.detach().double()
    weights = torch.ones_like(a) if token_counts is None else token_counts.detach().to(a)
    group = process_group or default_group()
    # Relative to the least of all: equal advantages then leave no rounding to be divided by itself.
    least = -_reduced(-a.amin() if len(a) else a.new_tensor(-math.inf), group, dist.ReduceOp.MAX)
    offset = a - least
    total, count = _reduced(torch.stack([(weights * offset).sum(), weights.sum()]), group)
    mean = total / count.clamp_min(1)
    squares = _reduced((weights * (offset - mean).square()).sum(), group)
    std = (squares / (count - 1).clamp_min(1)).sqrt()
    whitened = ((offset - mean) / (std + eps)).masked_fill(std == 0, 0)
    return torch.where(count > 1, whitened, a).to(torch.promote_types(adv.dtype, torch.float32))


def _reduced(value: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    if group is not None:
        dist.all_reduce(value, op, group=group)
    return value


def clipped_policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 10.0,
    reduction: Reduction = "token_mean",
) -> Tensor:
    """PPO's clipped loss of single responses, bounded from both sides, as in verl.

        l_t = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),   but at most -dual_clip A for A < 0
        rho_t = e^{log pi(t) - log pi_old(t)},   the exponent within +-20

    Args:
        logps: log pi, ``(B, T)``.
        old_logps: log pi_old of the policy that drew the responses, ``(B, T)``; detached here.
        advantages: A, ``(B,)``, the same for all tokens of a response; detached here.
        mask: Boolean ``(B, T)``.
        clip_low: In (0, 1).
        clip_high: > 0.
        dual_clip: > 1; ``None``: no such bound. The script's is 10, verl's default 3.
        reduction: ``"token_mean"`` over the tokens of all processes; ``"sequence_mean"`` over the responses of all
            processes of their means; ``"none"``: ``(B, T)``, 0 where masked.

    Returns:
        Scalar or ``(B, T)``, float32 (float64 for float64 input); 0, attached to the graph, without tokens.

    Raises:
        ValueError: On shapes that do not fit, or settings out of range.
    """
    if logps.ndim != 2:
        raise ValueError(f"logps must have shape (B, T), got {tuple(logps.shape)}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1, or None for no bound, got {dual_clip}")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    check_shape("advantages", advantages, logps.shape[:1], "(B,) of logps")
    check_mask("mask", mask, logps.shape, "(B, T) of logps")
    losses = clipped_token_losses(
        logps,
        old_logps,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=math.inf if dual_clip is None else dual_clip,
        max_log_ratio=_MAX_LOG_RATIO,
    )
    if reduction == "none":
        return losses
    tokens = mask.sum(1).to(losses.dtype)
    if reduction == "token_mean":
        return losses.sum() / shared_count(tokens.sum())
    return (losses.sum(1) / tokens.clamp_min(1)).sum() / shared_count(tokens.new_tensor(float(len(tokens))))
