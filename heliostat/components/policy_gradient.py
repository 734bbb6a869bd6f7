"""Policy gradients of language models from rewards: what DYPO, GRAO, MC-GRPO and SPO share.

Log-probabilities of tokens without the log-softmax over the vocabulary, the advantages of GRPO (2024, arXiv
2402.03300), the clipped surrogate of PPO (2017, arXiv 1707.06347) in the ways in which its descendants average it
(DAPO, 2025, arXiv 2503.14476; Dr. GRPO, 2025, arXiv 2503.20783), and estimates of the KL divergence.

Shapes: B prompts, G rollouts a prompt, T tokens a rollout. A token mask says which tokens count, a rollout mask which
rollouts; what stands elsewhere is never read, whatever it is. Losses of prompts are averaged over the prompts of all
processes: a sum over own prompts divided by `shared_count`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from heliostat.components.distributed import default_group

KLEstimator = Literal["k1", "k2", "k3"]
RatioLevel = Literal["token", "sequence"]
Aggregation = Literal["prompt", "grpo", "bnpo", "dapo", "dr_grpo"]

_BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}  # of a block of logits: near the cache; fills the device
_KEPT_ELEMENTS = 2**25  # logits up to this number are kept for backward, which spares a quarter of the products


def token_log_probs(
    hidden: Tensor,
    tokens: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """Log-probabilities of given tokens, from the last hidden states and the output embedding.

        log p(y_t) = z_{y_t} - log sum_v e^{z_v},   z = c tanh(u / c) / temperature,   u = W h_t + b

    Logits are formed in blocks of tokens and vocabulary, forward and once more backward, and those of a large batch are
    never held whole: memory beyond the gradients is that of a few blocks, however large the vocabulary. On a GPU
    ``torch.set_float32_matmul_precision("high")`` makes the products several times as fast; with bf16 states and
    weights they stay exact.

    Args:
        hidden: h, the states that predict the tokens, ``(..., d)``; without ``weight`` the logits u, ``(..., V)``.
        tokens: y, integers in 0..V-1 of shape ``(...)``; anything where ``mask`` is False.
        weight: W, ``(V, d)``, e.g. ``model.get_output_embeddings().weight``.
        bias: b, ``(V,)``.
        mask: Boolean ``(...)``, tokens to compute; the others cost nothing and get 0. Default: all.
        temperature: > 0. A constant that a model divides its logits by belongs here too.
        logit_softcap: c > 0 of models that bound their logits (``final_logit_softcapping`` of Gemma 2). Logits that
            such a model returns are bounded already.

    Returns:
        Shape ``(...)``, float32 (float64 for float64 input). It can be differentiated once.

    Raises:
        ValueError: On shapes that do not fit, tokens outside of the vocabulary, or settings out of range.
        RuntimeError: In backward with ``create_graph=True``.
    """
    if hidden.ndim < 1 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point of shape (..., d), got {hidden.dtype} {tuple(hidden.shape)}")
    check_shape("tokens", tokens, hidden.shape[:-1], "(...) of hidden (..., d)")
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    if weight is None and bias is not None:
        raise ValueError("bias needs weight: without it, hidden are the logits, to which you can add the bias")
    if weight is not None:
        if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"weight must have shape (V, d) with d = hidden.shape[-1] = {hidden.shape[-1]}, "
                f"got {tuple(weight.shape)}"
            )
        if bias is not None:
            check_shape("bias", bias, weight.shape[:1], "(V,)")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap must be > 0, or None for no bound, got {logit_softcap}")
    if mask is not None:
        check_mask("mask", mask, tokens.shape, "(...) of hidden (..., d)")
        rows, chosen = hidden[mask], tokens[mask]
    else:
        rows, chosen = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1)
    vocabulary = hidden.shape[-1] if weight is None else len(weight)
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < vocabulary:
        raise ValueError(
            f"tokens must lie in 0..{vocabulary - 1}, got {int(chosen.min())}..{int(chosen.max())}: "
            "leave others, such as labels of -100, out by mask"
        )
    with torch.autocast(hidden.device.type, enabled=False):
        values = _TokenLogProbs.apply(rows, weight, bias, chosen.long(), float(temperature), logit_softcap)
    if mask is None:
        return values.view(tokens.shape)
    return values.new_zeros(tokens.shape).masked_scatter(mask, values)


class _TokenLogProbs(torch.autograd.Function):
    """Tokens (n,) under the states (n, d) and W (V, d), or under the logits (n, V) where W is None."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        softcap: float | None,
    ) -> Tensor:
        dtype = _arithmetic(hidden, weight, bias)
        picked = torch.zeros(len(tokens), dtype=dtype, device=hidden.device)
        log_sum = torch.full_like(picked, -math.inf)
        keep = weight is not None and any(ctx.needs_input_grad) and len(tokens) * len(weight) <= _KEPT_ELEMENTS
        kept = []
        for columns, blocks in _blocks(hidden, weight):
            table = None if weight is None else weight[columns].to(dtype)
            for rows in blocks:
                z = _logits(hidden[rows], table, bias, columns, dtype, temperature, softcap)
                log_sum[rows] = torch.logaddexp(log_sum[rows], z.logsumexp(1))
                place, inside = _place(tokens[rows], columns)
                picked[rows] = z.gather(1, place[:, None])[:, 0].where(inside, picked[rows])
                if keep:
                    kept.append(z)
        ctx.save_for_backward(hidden, weight, bias, tokens, log_sum, *kept)
        ctx.temperature, ctx.softcap = temperature, softcap
        return picked - log_sum

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # what `once_differentiable` does is silent where ``grad`` is a constant
            raise RuntimeError("token_log_probs can be differentiated once: do not call it with create_graph=True")
        hidden, weight, bias, tokens, log_sum, *kept = ctx.saved_tensors
        kept = iter(kept)
        temperature, softcap = ctx.temperature, ctx.softcap
        dtype = log_sum.dtype
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        grad_hidden = None
        if ctx.needs_input_grad[0]:  # sums over blocks of the vocabulary, unless it holds logits
            grad_hidden = torch.empty_like(hidden) if weight is None else torch.zeros_like(hidden, dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for columns, blocks in _blocks(hidden, weight):
                table = None if weight is None else weight[columns].to(dtype)
                of_table = torch.zeros_like(table) if grad_weight is not None and table is not None else None
                of_bias = log_sum.new_zeros(columns.stop - columns.start) if grad_bias is not None else None
                for rows in blocks:
                    z = next(kept, None)
                    if z is None:
                        z = _logits(hidden[rows], table, bias, columns, dtype, temperature, softcap)
                    slope = None if softcap is None else 1 - (z * (temperature / softcap)).square_()
                    share = grad[rows] / temperature
                    # Becomes the gradient of u: that of the token's logit less the probabilities.
                    z = (z - log_sum[rows, None]).exp_().mul_(-share[:, None])
                    place, inside = _place(tokens[rows], columns)
                    z.scatter_add_(1, place[:, None], share.where(inside, 0.0)[:, None])
                    if slope is not None:
                        z.mul_(slope)
                    if grad_hidden is not None:
                        if table is None:
                            grad_hidden[rows, columns] = z
                        else:
                            grad_hidden[rows].addmm_(z, table)
                    if of_table is not None:
                        of_table.addmm_(z.mT, hidden[rows].to(dtype))
                    if of_bias is not None:
                        of_bias += z.sum(0)
                if grad_weight is not None and of_table is not None:
                    grad_weight[columns] = of_table
                if grad_bias is not None and of_bias is not None:
                    grad_bias[columns] = of_bias
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _arithmetic(*tensors: Tensor | None) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def _blocks(hidden: Tensor, weight: Tensor | None) -> Iterator[tuple[slice, list[slice]]]:
    """Parts of the vocabulary, and of the rows for each: the vocabulary outside, so that W is converted once."""
    count, vocabulary = len(hidden), hidden.shape[1] if weight is None else len(weight)
    elements = _BLOCK_ELEMENTS.get(hidden.device.type, 2**25)
    width = min(max(math.isqrt(elements), elements // max(1, count)), max(1, vocabulary))
    height = max(1, elements // width)
    rows = [slice(top, min(top + height, count)) for top in range(0, count, height)]
    for left in range(0, vocabulary, width):
        yield slice(left, min(left + width, vocabulary)), rows


def _logits(
    hidden: Tensor,
    table: Tensor | None,
    bias: Tensor | None,
    columns: slice,
    dtype: torch.dtype,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """A block of z."""
    z = hidden[:, columns].to(dtype, copy=True) if table is None else hidden.to(dtype) @ table.mT
    if bias is not None:
        z += bias[columns]
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z if temperature == 1 else z.div_(temperature)


def _place(tokens: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where tokens stand within a part of the vocabulary, and whether they do."""
    inside = (tokens >= columns.start) & (tokens < columns.stop)
    return (tokens - columns.start).where(inside, 0), inside


def group_relative_advantages(
    rewards: Tensor, rollout_mask: Tensor | None = None, *, ddof: int = 1, eps: float = 1e-6
) -> Tensor:
    """How much better each rollout did than its prompt's others, in their standard deviations.

        A_i = (r_i - mean_j r_j) / (std_j r_j + eps)

    Args:
        rewards: r, ``(B, G)``.
        rollout_mask: Boolean ``(B, G)``, rollouts that count; default: all.
        ddof: What the variance divides by is n - ``ddof``: 1 is the usual of GRPO's implementations.
        eps: >= 0, absolute.

    Returns:
        ``(B, G)`` without gradient, float32 (float64 for float64 input). 0 for rollouts that do not count and for
        groups without spread, of one rollout or of none. A NaN makes its group NaN.

    Raises:
        ValueError: On shapes that do not fit, or settings out of range.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    valid = check_groups(rewards, rollout_mask)
    mean, std = group_moments(rewards, valid, ddof=ddof)
    r = rewards.detach().to(mean.dtype)
    advantages = ((r - mean[:, None]) / (std + eps)[:, None]).masked_fill(std[:, None] == 0, 0)
    return advantages.where(valid, 0)


def group_moments(rewards: Tensor, valid: Tensor, *, ddof: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(B,)`` of each group's valid rewards; the deviation of equal ones is exactly 0."""
    r = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    count = valid.sum(1)
    # Relative to the smallest: equal rewards leave no rounding behind, which would be divided by itself.
    least = r.where(valid, math.inf).amin(1).where(count > 0, 0)
    offset = (r - least[:, None]).where(valid, 0)
    mean = offset.sum(1) / count.clamp_min(1)
    squares = (offset - mean[:, None]).square().where(valid, 0).sum(1)
    return least + mean, (squares / (count - ddof).clamp_min(1)).sqrt()


def kl_estimate(logps: Tensor, ref_logps: Tensor, *, estimator: KLEstimator = "k3") -> Tensor:
    """Estimates of KL(policy || reference) from samples of the policy, one a token.

        k1 = -r,   k2 = r^2 / 2,   k3 = e^r - 1 - r,   r = log pi_ref - log pi

    k1 and k3 are unbiased; k3 is never negative and scatters less. Taken as a loss, k3 has on average the gradient of
    KL(reference || policy), k2 that of KL(policy || reference), and k1 none.

    Args:
        logps: log pi of sampled tokens, any shape.
        ref_logps: log pi_ref of the same tokens, detached here.
        estimator: ``"k3"`` is the papers'.

    Returns:
        Of the shape of ``logps``, float32 (float64 for float64 input).

    Raises:
        ValueError: On shapes that differ or an unknown estimator.
    """
    if estimator not in get_args(KLEstimator):
        raise ValueError(f"estimator must be one of {get_args(KLEstimator)}, got {estimator!r}")
    check_shape("ref_logps", ref_logps, logps.shape, "of logps")
    dtype = torch.promote_types(logps.dtype, torch.float32)
    r = ref_logps.detach().to(dtype) - logps.to(dtype)
    if estimator == "k1":
        return -r
    if estimator == "k2":
        return r.square() / 2
    return r.expm1() - r


def clipped_surrogate_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    token_mask: Tensor,
    rollout_mask: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    ratio_level: RatioLevel = "token",
    aggregation: Aggregation = "prompt",
    max_completion_length: int | None = None,
    units: Tensor | None = None,
) -> Tensor:
    """GRPO's loss of each prompt, and those of its descendants.

        l_t = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_coef k3_t
        rho_t = e^{log pi(t) - log pi_old(t)},   or of a whole rollout   rho = e^{sum_t log pi(t) - log pi_old(t)}

    The loss of a batch is the mean over its prompts, in every aggregation (i and t are what counts):

        "prompt"   mean_i mean_t l         of each prompt: its rollouts share its weight, however many they are
        "grpo"     mean_i mean_t l         over the rollouts of all prompts
        "dapo"     sum l / tokens          over the tokens of all prompts; long rollouts weigh more
        "bnpo"     the same, but the tokens are those of this process alone, so it changes with the number of processes
        "dr_grpo"  sum l / (rollouts x max_completion_length)

    Args:
        logps: log pi, ``(B, G, T)``.
        old_logps: log pi_old of the policy that drew the rollouts, ``(B, G, T)``, detached here.
        advantages: A, ``(B, G)``, detached here.
        token_mask: Boolean ``(B, G, T)``.
        rollout_mask: Boolean ``(B, G)``; default: all.
        ref_logps: log pi_ref, ``(B, G, T)``; needed for ``kl_coef > 0``, and else not read.
        clip_low: In (0, 1).
        clip_high: > 0.
        dual_clip: Largest ratio that counts where A < 0, > 1; ``None``: no such bound.
        kl_coef: >= 0.
        ratio_level: ``"token"`` or ``"sequence"``.
        aggregation: See above.
        max_completion_length: Of ``"dr_grpo"``: the longest completion that generation allows.
        units: What `units_per_prompt` gives for the whole batch, where this is one of its micro-batches; default: for
            the prompts given, of all processes.

    Returns:
        ``(B,)``, float32 (float64 for float64 input). 0, attached to the graph, for prompts where nothing counts; an
        empty rollout adds 0.

    Raises:
        ValueError: On shapes that do not fit, settings out of range, or what a setting needs and lacks.
    """
    _check_aggregation(aggregation, max_completion_length)
    valid = check_rollouts(logps, token_mask, rollout_mask)
    check_shape("advantages", advantages, logps.shape[:2], "(B, G) of logps")
    keep = token_mask & valid[:, :, None]
    losses = clipped_token_losses(
        logps,
        old_logps,
        advantages,
        keep,
        ref_logps=ref_logps,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        ratio_level=ratio_level,
    )
    if aggregation in ("prompt", "grpo"):
        total = (losses.sum(2) / keep.sum(2).clamp_min(1)).sum(1)
    else:
        total = losses.sum((1, 2))
    if aggregation == "prompt":
        return total / valid.sum(1).clamp_min(1)
    if units is None:
        units = units_per_prompt(
            token_mask,
            rollout_mask,
            aggregation=aggregation,
            max_completion_length=max_completion_length,
            dtype=total.dtype,
        )
    return total / units


def units_per_prompt(
    token_mask: Tensor,
    rollout_mask: Tensor | None = None,
    *,
    aggregation: Aggregation,
    max_completion_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What an aggregation of `clipped_surrogate_loss` divides a prompt's sum by: rollouts or tokens a prompt.

    Args:
        token_mask: Boolean ``(B, G, T)``.
        rollout_mask: Boolean ``(B, G)``; default: all.
        aggregation: Any but ``"prompt"``, which has no average over prompts.
        max_completion_length: Of ``"dr_grpo"``.
        dtype: That of the log-probabilities, float32 at least.

    Returns:
        Scalar: an average over the prompts of all processes (of this one for ``"bnpo"``).

    Raises:
        ValueError: On shapes that do not fit, or an aggregation that lacks something.
    """
    _check_aggregation(aggregation, max_completion_length)
    if aggregation == "prompt":
        raise ValueError('aggregation "prompt" divides each prompt by its own rollouts: it has no units')
    valid = check_rollouts(token_mask, token_mask, rollout_mask)
    units = valid.sum() if aggregation in ("grpo", "dr_grpo") else (token_mask & valid[:, :, None]).sum()
    counts = torch.stack([units, units.new_tensor(len(valid))]).to(dtype)
    units, prompts = counts.clamp_min(1) if aggregation == "bnpo" else shared_count(counts)
    if aggregation == "dr_grpo" and max_completion_length is not None:
        units = units * max_completion_length
    return units / prompts


def clipped_token_losses(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    ref_logps: Tensor | None = None,
    kl_coef: float = 0.0,
    ratio_level: RatioLevel = "token",
    max_log_ratio: float = math.inf,
) -> Tensor:
    """The l_t of `clipped_surrogate_loss` for ``(..., T)``, 0 where ``mask`` is False.

    log rho counts nowhere beyond +-``max_log_ratio``.
    """
    if not 0 < clip_low < 1:
        raise ValueError(f"clip_low must be in (0, 1), got {clip_low}")
    if not clip_high > 0:
        raise ValueError(f"clip_high must be > 0, got {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1, or None for no bound, got {dual_clip}")
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef must be >= 0, got {kl_coef}")
    if ratio_level not in get_args(RatioLevel):
        raise ValueError(f"ratio_level must be one of {get_args(RatioLevel)}, got {ratio_level!r}")
    check_shape("old_logps", old_logps, logps.shape, "of logps")
    if kl_coef > 0 and ref_logps is None:
        raise ValueError(f"ref_logps is needed for kl_coef={kl_coef}: pass it, or set kl_coef=0")
    dtype = torch.promote_types(logps.dtype, torch.float32)
    with torch.autocast(logps.device.type, enabled=False):
        current = logps.to(dtype).where(mask, 0)  # masked before any arithmetic: 0 x inf would be NaN in backward
        log_ratio = current - old_logps.detach().to(dtype).where(mask, 0)
        if ratio_level == "sequence":
            log_ratio = log_ratio.sum(-1, keepdim=True)
        a = advantages.detach().to(dtype)[..., None]
        # min(rho A, clip(rho) A) takes rho up to 1 + clip_high where A >= 0 and down to 1 - clip_low where A < 0.
        # Bounded before the exponential, a ratio that overflows there has no gradient, instead of NaN.
        lowest = torch.full_like(a, -max_log_ratio).masked_fill(a < 0, max(math.log1p(-clip_low), -max_log_ratio))
        highest = torch.full_like(a, min(math.log1p(clip_high), max_log_ratio)).masked_fill(
            a < 0, min(math.log(math.inf if dual_clip is None else dual_clip), max_log_ratio)
        )
        losses = -a * log_ratio.clamp(lowest, highest).exp()
        if kl_coef > 0 and ref_logps is not None:
            check_shape("ref_logps", ref_logps, logps.shape, "of logps")
            losses = losses + kl_coef * kl_estimate(current, ref_logps.where(mask, 0))
        return losses.where(mask, 0)


def shared_count(own: Tensor) -> Tensor:
    """Counts over all processes, at least 1, divided by the number of processes.

    What a sum over own rows is divided by to be a mean over everybody's, once DDP has averaged the processes.
    """
    group = default_group()
    if group is None:
        return own.clamp_min(1)
    total = own.detach().clone()
    dist.all_reduce(total, group=group)
    return total.clamp_min(1) / group.size()


def check_shape(name: str, tensor: Tensor, shape: torch.Size, meaning: str) -> None:
    """Refuse a tensor of another shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {meaning}, {tuple(shape)}, got {tuple(tensor.shape)}")


def check_mask(name: str, mask: Tensor, shape: torch.Size, meaning: str) -> None:
    """Refuse a mask of another shape, or of numbers."""
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be boolean, got {mask.dtype}: {name}.bool() makes it so")
    check_shape(name, mask, shape, meaning)


def check_groups(rewards: Tensor, rollout_mask: Tensor | None) -> Tensor:
    """Refuse rewards that are not ``(B, G)`` or a mask that does not fit them; return the mask."""
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have shape (B, G), got {tuple(rewards.shape)}")
    if rollout_mask is None:
        return torch.ones_like(rewards, dtype=torch.bool)
    check_mask("rollout_mask", rollout_mask, rewards.shape, "(B, G) of rewards")
    return rollout_mask


def check_rollouts(logps: Tensor, token_mask: Tensor, rollout_mask: Tensor | None) -> Tensor:
    """Refuse token tensors that are not ``(B, G, T)`` or masks that do not fit them; return the rollout mask."""
    if logps.ndim != 3:
        raise ValueError(f"logps must have shape (B, G, T), got {tuple(logps.shape)}")
    check_mask("token_mask", token_mask, logps.shape, "(B, G, T) of logps")
    if rollout_mask is None:
        return torch.ones(logps.shape[:2], dtype=torch.bool, device=logps.device)
    check_mask("rollout_mask", rollout_mask, logps.shape[:2], "(B, G) of logps")
    return rollout_mask


def _check_aggregation(aggregation: str, max_completion_length: int | None) -> None:
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation must be one of {get_args(Aggregation)}, got {aggregation!r}")
    if aggregation == "dr_grpo" and (max_completion_length is None or max_completion_length < 1):
        raise ValueError(
            f'aggregation "dr_grpo" needs max_completion_length >= 1, the limit of generation, '
            f"got {max_completion_length}"
        )
