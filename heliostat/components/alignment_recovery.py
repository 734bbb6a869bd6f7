"""Alignment recovery: put a few weights of a fine-tuned model back to their aligned values (arXiv 2504.09757).

Yang, Tao, Chen, Xu, "Alleviating the Fear of Losing Alignment in LLM Fine-tuning", S&P 2025. Fine-tuning makes an
aligned model answer harmful prompts again. A step takes the gradient of the cosine between the model's representation
of harmful prompts and the aligned model's, and copies back the small share of weights whose restoration, to first
order, turns the one towards the other. A rollback undoes the part that hurts the task most. Nothing is trained: every
weight has either its fine-tuned or its aligned value, and a log of what was restored brings back any earlier step bit
by bit. For a model whose aligned ancestor's weights are at hand.

With several processes each takes whole batches (a cosine of a batch mean cannot be divided further) and all take the
same decisions.
"""

from __future__ import annotations

import fnmatch
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from heliostat.components.distributed import default_group

Rollback = Literal["auto"] | bool
Mode = Literal["max", "min"]
Tensors = Mapping[Any, Tensor] | Sequence[Tensor]
_ADAPTER = re.compile(r"(^|\.)lora_")  # what peft calls its own parameters


def mean_representation(model_fn: Callable[[Any], Tensor], batches: Iterable[Any]) -> Tensor:
    """Mean over all prompts of ``model_fn``: the direction ``d_harm`` of the aligned or ``d_task`` of the tuned model.

    Args:
        model_fn: Maps a batch to representations h ``(B, d)``.
        batches: The prompts, batch by batch; with several processes the same batches on every one.

    Returns:
        Shape ``(d,)``, float32 at least, without gradient; the same on all processes.

    Raises:
        ValueError: If there is no batch, or if the mean is zero or not finite and so has no direction.
    """
    rank, world = _place()
    total: Tensor | None = None
    count = 0
    with torch.no_grad():
        for position, batch in enumerate(batches):
            own = position % world == rank
            if own or total is None:  # without a batch of its own a process still has to learn the shape
                rows = _checked(model_fn(batch))
                share = rows.sum(0) * own
                total = share if total is None else total + share
                count += len(rows) * own
        if total is None:
            raise ValueError("batches: there is none, so there is no direction to take the mean of")
        parts = torch.cat([total, total.new_tensor([count])])
        _all_reduce(parts)
        mean = parts[:-1] / parts[-1]
    if not mean.isfinite().all() or not mean.any():
        found = "zero" if mean.isfinite().all() else "not finite"
        raise ValueError(
            f"batches: the mean of their representations is {found}, which is no direction. Check the weights, the "
            "prompts, and where the representation is taken"
        )
    return mean


def sign_agreement_mask(param: Tensor, target: Tensor, grad: Tensor) -> Tensor:
    """Where moving ``param`` to ``target`` decreases the loss to first order: ``(param - target) * grad > 0``.

    Decided by signs, so that no product underflows. Equal values, zero and NaN gradients are out.

    Args:
        param: Current weights, any shape.
        target: What they may be set to; compared in the dtype of ``param``.
        grad: Gradient of the loss.

    Returns:
        Booleans of the same shape.
    """
    if not param.shape == target.shape == grad.shape:
        raise ValueError(
            "param, target and grad must have one shape, got "
            f"{tuple(param.shape)}, {tuple(target.shape)} and {tuple(grad.shape)}"
        )
    param, target, grad = param.detach(), target.detach().to(param), grad.detach()
    return ((param > target) & (grad > 0)) | ((param < target) & (grad < 0))


def select_top_gradients(
    grads: Tensors,
    eligible: Tensors,
    count: int,
    *,
    strict: bool = True,
) -> tuple[Any, float]:
    """The entries with the largest gradients over all tensors together.

    T is the count-th largest ``|g|`` among the eligible entries, and an entry is selected if ``|g| > T``. The strict
    comparison is the released code's: it takes ``count - 1`` entries without ties, fewer with them. If it takes none
    although there are candidates, ``>=`` is used, so that small models do not stall.

    Args:
        grads: Gradients by name, or a sequence of them.
        eligible: Booleans of the same shapes, in the same form.
        count: How many; more than there are candidates means all of them (but for the strict comparison).
        strict: ``False``: ``|g| >= T``.

    Returns:
        Booleans in the form of ``grads``, and T; infinity if there is no candidate or ``count`` is 0.
    """
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    named_grads, named_eligible = dict(_items(grads)), dict(_items(eligible))
    if named_grads.keys() != named_eligible.keys():
        raise ValueError(
            f"grads and eligible must name the same tensors, got {list(named_grads)} and {list(named_eligible)}"
        )
    largest: Tensor | None = None  # the count largest so far: never all magnitudes of the model at once
    for name, grad in named_grads.items():
        magnitudes, candidates = _magnitudes(grad), named_eligible[name].bool()
        if largest is not None and 0 < count == largest.numel():  # smaller ones cannot be among them any more
            candidates = candidates & (magnitudes > largest.min())
        magnitudes = magnitudes[candidates]
        largest = _top(magnitudes if largest is None else torch.cat([largest, _top(magnitudes, count)]), count)
    if largest is None or largest.numel() == 0:
        masks = {name: torch.zeros_like(mask, dtype=torch.bool) for name, mask in named_eligible.items()}
        return _like(grads, masks), math.inf
    threshold = float(largest.min())
    strict = strict and bool((largest > threshold).any())
    masks = {}
    for name, grad in named_grads.items():
        magnitudes = _magnitudes(grad)
        passes = magnitudes > threshold if strict else magnitudes >= threshold
        masks[name] = passes & named_eligible[name].bool()
    return _like(grads, masks), threshold


def restore_(
    params: Tensors,
    targets: Tensors,
    masks: Tensors,
) -> int:
    """Set the selected entries to their targets, in place and exactly.

    Args:
        params: Tensors by name, or a sequence of them.
        targets: Tensors of the same shapes; in another precision they are rounded to that of ``params``.
        masks: Booleans of the same shapes.

    Returns:
        How many entries were selected.
    """
    restored = 0
    with torch.no_grad():
        for name, param in _items(params):
            mask = masks[name].bool()
            selected = int(mask.sum())
            if selected:
                param[mask] = targets[name].to(param)[mask]
            restored += selected
    return restored


class RestorationLog:
    """What was restored, step by step, so that it can be undone bit by bit.

    Holds flat index and former value of every restored entry, on the CPU: 8 bytes and a value for each.

    Attributes:
        steps: For each step, name -> (flat indices int64, former values).
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[Tensor, Tensor]]] = []

    def restore_(self, params: Mapping[str, Tensor], targets: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> int:
        """`restore_`, remembered as one more step."""
        entries = {}
        for name, mask in masks.items():
            index = mask.flatten().nonzero().squeeze(1)
            if len(index):
                entries[name] = (index.cpu(), params[name].detach().flatten()[index].cpu())
                target = targets[name]
                _write_(params[name], index, target.flatten()[index.to(target.device)])
        self.steps.append(entries)
        return sum(len(index) for index, _ in entries.values())

    def rollback_(self, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], rate: float) -> int:
        """Undo that part of the last step's entries which hurts most: the method's rollback step.

        Args:
            params: The tensors.
            grads: Gradient of the task loss, by the same names.
            rate: Share to undo of the entries whose undoing, by the sign test, decreases the task loss.

        Returns:
            How many entries were undone.
        """
        entries = {name: (index.to(params[name].device), former) for name, (index, former) in self.steps[-1].items()}
        picked = {name: grads[name].flatten()[index] for name, (index, _) in entries.items()}
        eligible = {
            name: sign_agreement_mask(params[name].detach().flatten()[index], former, picked[name])
            for name, (index, former) in entries.items()
        }
        candidates = sum(int(mask.sum()) for mask in eligible.values())
        undo, _ = select_top_gradients(picked, eligible, math.ceil(rate * candidates))
        for name, mask in undo.items():
            index, former = self.steps[-1][name]
            mask = mask.cpu()
            _write_(params[name], index[mask], former[mask])
            self.steps[-1][name] = (index[~mask], former[~mask])
        return sum(int(mask.sum()) for mask in undo.values())

    def undo_(self, params: Mapping[str, Tensor], step: int = 0) -> None:
        """Bring back the weights as they were after ``step`` steps, and forget the later ones."""
        while len(self.steps) > step:
            for name, (index, former) in self.steps.pop().items():
                _write_(params[name], index, former)

    def counts(self) -> dict[str, int]:
        """How many entries of each tensor are restored now."""
        counts: dict[str, int] = {}
        for entries in self.steps:
            for name, (index, _) in entries.items():
                counts[name] = counts.get(name, 0) + len(index)
        return {name: count for name, count in counts.items() if count}


class RecoveryStep(NamedTuple):
    """One line of a recovery's history."""

    step: int
    loss: float  # of the harmful prompts before the step: minus the cosine, mean over the batches
    restored: int  # entries set to their aligned values in this step
    undone: int  # of these, set back by the rollback
    restored_share: float  # of the parameters of all blocks, after the step
    score: float | None  # of the task after the step, where it was measured
    harmful_rate: float | None


class RecoveryResult(NamedTuple):
    """What a recovery did."""

    history: list[RecoveryStep]
    chosen_step: int  # 0: the fine-tuned weights as they were
    used_rollback: bool
    initial_score: float  # s_0, of the fine-tuned weights
    initial_harmful_rate: float | None
    score_limit: float  # the worst that the task score may become
    warmup_score: float | None  # after the warm-up, if that was to decide whether to roll back
    log: RestorationLog


def score_limit(score: float, metric_drop: float, mode: Mode = "max") -> float:
    """The worst score allowed: ``metric_drop`` of the score's magnitude away from it, or that much itself if it is 0.

    Args:
        score: s_0.
        metric_drop: Relative tolerance.
        mode: ``"max"`` if a higher score is better, ``"min"`` if a lower one is.
    """
    if score == 0:
        return -metric_drop if mode == "max" else metric_drop
    return score * (1 - metric_drop) if (mode == "max") == (score > 0) else score * (1 + metric_drop)


def recover_alignment(
    params: Mapping[str, Tensor],
    aligned: Mapping[str, Tensor],
    represent: Callable[[Any], Tensor],
    harmful_batches: Sequence[Any],
    task_batches: Sequence[Any],
    task_score: Callable[[], float],
    *,
    harmful_direction: Tensor,
    num_hidden: int,
    recovery_rate: float = 0.002,
    steps: int = 20,
    warmup_steps: int = 5,
    save_every: int = 5,
    rollback: Rollback = "auto",
    rollback_rate: float = 0.2,
    metric_drop: float = 0.05,
    mode: Mode = "max",
    accumulate_gradients: bool = True,
    harmful_rate: Callable[[], float] | None = None,
) -> RecoveryResult:
    """Restore aligned weights step by step, in place, for as long as the task allows.

    A step: g = sum over batches b of the gradient of ``-cos(mean_{x in b} h(x), d_harm)``; of the entries where
    ``(theta - theta_aligned) * g > 0``, the ``ceil(recovery_rate * num_hidden)`` with the largest ``|g|`` get their
    aligned value. With rollback: the same with task prompts, d_task and the fine-tuned values, among the entries just
    restored. Without rollback g adds up over the steps; with it, g is fresh in every step.

    Candidates are the weights after every ``save_every`` steps and those at the end. The result is the last candidate
    before the first one whose task score is at the limit or worse; the fine-tuned weights if that is the first one. If
    this raises, the weights are as they were.

    Args:
        params: Eligible tensors of the fine-tuned model, leaves; see `eligible_parameters`. Changed in place.
        aligned: Their aligned values, by the same names. Looked up one at a time, so it may read from disk.
        represent: Maps a batch to representations h ``(B, d)`` of the model that ``params`` belong to, with gradient.
            The model should be in eval mode.
        harmful_batches: Harmful prompts; the same batches on every process. Paper: 256 prompts in batches of 8.
        task_batches: Prompts of the task; used by the rollback alone.
        task_score: Measures the task; averaged over processes.
        harmful_direction: d_harm ``(d,)``, `mean_representation` of the harmful prompts by the aligned model.
        num_hidden: Number of parameters of all blocks, of which ``recovery_rate`` is a share.
        recovery_rate: Share restored in a step.
        steps: Most steps.
        warmup_steps: With ``rollback="auto"``: steps without rollback before the score decides. If it is worse than
            the limit then, recovery starts anew with rollback.
        save_every: Steps between candidates. 1 is better where the score is cheap.
        rollback: ``"auto"``, or always or never.
        rollback_rate: Share undone of the restored entries that hurt the task.
        metric_drop: How much worse the score may become, relative to the fine-tuned model's; see `score_limit`.
        mode: ``"max"`` if a higher score is better, ``"min"`` if a lower one is.
        accumulate_gradients: Without rollback, add g up over the steps as the released code does; ``False``: fresh.
        harmful_rate: Measured at the start and at every candidate; decides nothing.

    Returns:
        What was done, with the log that undoes it.

    Raises:
        ValueError: On settings out of range, shapes that do not fit, representations without gradient, gradients or
            scores that are not finite.
    """
    check_settings(
        recovery_rate=recovery_rate,
        steps=steps,
        warmup_steps=warmup_steps,
        save_every=save_every,
        rollback=rollback,
        rollback_rate=rollback_rate,
        metric_drop=metric_drop,
        mode=mode,
    )
    if not params:
        raise ValueError("params is empty: there is nothing to restore")
    if missing := [name for name in params if name not in aligned]:
        raise ValueError(f"aligned lacks {missing[0]!r} and {len(missing) - 1} more of the names in params")
    worse = (lambda a, b: a < b) if mode == "max" else (lambda a, b: a > b)
    count = math.ceil(recovery_rate * num_hidden)
    log = RestorationLog()
    flags = {name: param.requires_grad for name, param in params.items()}
    for param in params.values():
        param.requires_grad_(True)
    try:
        initial = _measure(task_score, "task_score")
        initial_rate = _measure(harmful_rate, "harmful_rate") if harmful_rate else None
        limit = score_limit(initial, metric_drop, mode)
        rolls, undecided, warmup_score = rollback is True, rollback == "auto", None
        task_direction = mean_representation(represent, task_batches) if rolls else None
        history: list[RecoveryStep] = []
        candidates: list[tuple[int, bool]] = []  # step, and whether its score is good enough
        grads: dict[str, Tensor] = {}
        step = 0
        while step < steps:
            if rolls or not accumulate_gradients:
                grads = {}
            loss = _add_gradient(grads, params, represent, harmful_batches, harmful_direction)
            eligible = {name: sign_agreement_mask(p, aligned[name], grads[name]) for name, p in params.items()}
            masks, _ = select_top_gradients(grads, eligible, count)
            if not any(mask.any() for mask in masks.values()):
                break
            step += 1
            restored, undone = log.restore_(params, aligned, masks), 0
            del eligible, masks
            if task_direction is not None:
                grads = {}
                _add_gradient(grads, params, represent, task_batches, task_direction)
                undone = log.rollback_(params, grads, rollback_rate)
            decides = undecided and step == min(warmup_steps, steps)
            is_candidate = step % save_every == 0 or step == steps
            score = _measure(task_score, "task_score") if is_candidate or decides else None
            rate = _measure(harmful_rate, "harmful_rate") if is_candidate and harmful_rate else None
            share = sum(log.counts().values()) / num_hidden
            history.append(RecoveryStep(step, loss, restored, undone, share, score, rate))
            if decides and score is not None:
                undecided, warmup_score = False, score
                if worse(score, limit):
                    log.undo_(params)
                    task_direction = mean_representation(represent, task_batches)
                    rolls, step = True, 0
                    history.clear()
                    candidates.clear()
                    continue
            if is_candidate and score is not None:
                candidates.append((step, worse(limit, score)))
            if not undecided and not all(fine for _, fine in candidates):
                break
        if step % save_every and not (candidates and candidates[-1][0] == step):  # nothing was left to restore
            score = _measure(task_score, "task_score")
            rate = _measure(harmful_rate, "harmful_rate") if harmful_rate else None
            history[-1] = history[-1]._replace(score=score, harmful_rate=rate)
            candidates.append((step, worse(limit, score)))
        chosen = 0
        for candidate, fine in candidates:
            if not fine:
                break
            chosen = candidate
        log.undo_(params, chosen)
    except BaseException:
        log.undo_(params)
        raise
    finally:
        for name, param in params.items():
            param.requires_grad_(flags[name])
    return RecoveryResult(history, chosen, rolls, initial, initial_rate, limit, warmup_score, log)


def check_settings(
    *,
    recovery_rate: float,
    steps: int,
    warmup_steps: int,
    save_every: int,
    rollback: Rollback,
    rollback_rate: float,
    metric_drop: float,
    mode: str,
) -> None:
    """Refuse settings of `recover_alignment` that are out of range, by a ValueError."""
    for name, rate in (("recovery_rate", recovery_rate), ("rollback_rate", rollback_rate)):
        if not 0 < rate <= 1:
            raise ValueError(f"{name} is a share and must lie in (0, 1], got {rate}")
    for name, number in (("steps", steps), ("warmup_steps", warmup_steps), ("save_every", save_every)):
        if number < 1:
            raise ValueError(f"{name} must be >= 1, got {number}")
    if rollback not in ("auto", True, False):
        raise ValueError(f'rollback must be "auto", True or False, got {rollback!r}')
    if not 0 <= metric_drop < math.inf:
        raise ValueError(f"metric_drop must be >= 0, got {metric_drop}")
    if mode not in ("max", "min"):
        raise ValueError(f'mode must be "max" or "min", got {mode!r}')


def find_blocks(model: nn.Module) -> str:
    """Name of the list of like blocks that holds most parameters: the layers of a transformer.

    Args:
        model: Any module.

    Returns:
        Name of a `torch.nn.ModuleList` or `torch.nn.Sequential` with at least two members, all of one class.

    Raises:
        ValueError: If there is none.
    """
    sizes = {}
    for name, module in model.named_modules():
        children = list(module.children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        if len(children) > 1 and len({type(child) for child in children}) == 1:
            sizes[name] = sum(p.numel() for p in module.parameters())
    if not sizes or not max(sizes.values()):
        raise ValueError(
            f"layers: {type(model).__name__} has no list of like blocks. Name the submodules that are blocks, in order"
        )
    return max(sizes, key=lambda name: sizes[name])


def eligible_parameters(
    model: nn.Module, blocks: Sequence[nn.Module], layer_end: int, *, exclude: Sequence[str] = ()
) -> tuple[dict[str, nn.Parameter], int]:
    """The parameters that may be restored, and how many parameters all blocks have.

    Eligible is every parameter of the first blocks but those of normalisation layers, adapters of peft, and parameters
    shared with a module outside the blocks, such as the embeddings; a warning names the latter.

    Args:
        model: What the names are relative to.
        blocks: All blocks in order, submodules of ``model``.
        layer_end: l*, how many of them are kept.
        exclude: Patterns as of file names (``"*.router.*"``); parameters whose names match are left out.

    Returns:
        Name -> parameter, each once; and N_hidden.
    """
    if not 1 <= layer_end <= len(blocks):
        raise ValueError(f"layer_end must lie in 1..{len(blocks)}, the number of blocks, got {layer_end}")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {id(module) for block in blocks for module in block.modules()}
    outside = {
        id(parameter): f"{name}.{own}".lstrip(".")
        for name, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if id(module) not in members
    }
    norms = {id(p) for block in blocks for m in block.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
    kept = {id(p) for block in blocks[:layer_end] for p in block.parameters()}
    hidden = {id(p): p for block in blocks for p in block.parameters() if not _ADAPTER.search(names[id(p)])}
    eligible, shared = {}, []
    for key, parameter in hidden.items():
        name = names[key]
        if key not in kept or key in norms or any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude):
            continue
        if key in outside:
            shared.append(outside[key])
        else:
            eligible[name] = parameter
    if shared:
        warnings.warn(
            f"{len(shared)} parameters are shared with modules outside the blocks and are not restored: "
            + ", ".join(shared[:4]),
            stacklevel=2,
        )
    return eligible, sum(p.numel() for p in hidden.values())


def _is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: torch's classes, and RMSNorm and its like under any name."""
    known = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
    return isinstance(module, known) or bool(re.search(r"norm\d*(d|act)?$", type(module).__name__, re.IGNORECASE))


def _place() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    group = default_group()
    return (0, 1) if group is None else (group.rank(), group.size())


def _all_reduce(values: Tensor) -> None:
    if group := default_group():
        dist.all_reduce(values, group=group)


def _measure(score: Callable[[], float], name: str) -> float:
    """Call a score; its mean over processes, so that all of them decide alike."""
    with torch.no_grad():
        value = float(score())
    if group := default_group():
        values = [0.0] * group.size()
        dist.all_gather_object(values, value)
        value = math.fsum(values) / len(values)
    if not math.isfinite(value):
        raise ValueError(f"{name} must return a finite number, got {value}")
    return value


def _checked(rows: Tensor) -> Tensor:
    if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) == 0:
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"a representation must be a tensor (B, d) with B >= 1, got {got}")
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _add_gradient(
    totals: dict[str, Tensor],
    params: Mapping[str, Tensor],
    represent: Callable[[Any], Tensor],
    batches: Sequence[Any],
    direction: Tensor,
) -> float:
    """Add the summed gradient of all batches to ``totals`` and return the mean of their losses."""
    rank, world = _place()
    for name, param in params.items():
        if name not in totals:
            totals[name] = torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
        elif rank:
            totals[name].zero_()  # the sum over processes must contain what there was once
    loss_sum = direction.new_zeros(())
    for batch in batches[rank::world]:
        with torch.enable_grad():
            mean = _checked(represent(batch)).mean(0)
            loss = -F.cosine_similarity(mean, direction.to(mean), dim=0, eps=1e-8)
            if not loss.requires_grad:
                raise ValueError("represent: its result has no gradient; it must not detach, nor run under no_grad")
            grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for total, grad in zip(totals.values(), grads, strict=True):
            if grad is not None:
                total += grad
        loss_sum += loss.detach()
    _all_reduce(loss_sum)
    for name, total in totals.items():
        _all_reduce(total)
        if not total.isfinite().all():
            raise ValueError(f"the gradient of {name} is not finite, so nothing can be chosen by it")
    return float(loss_sum) / len(batches)


def _write_(param: Tensor, index: Tensor, values: Tensor) -> None:
    """Set entries by flat index, whatever the tensor's strides."""
    data = param.detach()
    data = data.unsqueeze(0) if data.ndim == 0 else data
    data[torch.unravel_index(index.to(data.device), data.shape)] = values.to(data)


def _magnitudes(grad: Tensor) -> Tensor:
    return grad.detach().to(torch.promote_types(grad.dtype, torch.float32)).abs()


def _top(values: Tensor, count: int) -> Tensor:
    return values if values.numel() <= count else values.topk(count, sorted=False).values


def _items(tensors: Tensors) -> Iterable[tuple[Any, Tensor]]:
    return tensors.items() if isinstance(tensors, Mapping) else enumerate(tensors)


def _like(original: object, masks: dict[Any, Tensor]) -> Any:
    return masks if isinstance(original, Mapping) else list(masks.values())
