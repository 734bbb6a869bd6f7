"""Advantages of rollouts: what makes GRPO, MC-GRPO, GRAO or SPO of `heliostat.GroupPolicy`.

An estimator gets the batch once its rewards are there and writes ``advantages`` ``(B, G)`` into it; it may write the
weights of prompts too, ``rl_weight`` and ``sft_weight`` ``(B,)``. What it remembers is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast, get_args

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from heliostat.components.distributed import default_group, gather_rows
from heliostat.components.grao import grao_advantages
from heliostat.components.mc_grpo import Scale, drop_pivots, median_centered_advantages
from heliostat.components.policy_gradient import Aggregation, group_relative_advantages
from heliostat.components.spo import BetaValueTracker, forgetting_factor, policy_drift, whiten_advantages

Forgetting = Literal["drift", "constant"]
Whitening = Literal["sequence", "token"]
Score = Callable[[Tensor, Tensor], Tensor]

_OTHER_PROMPTS = (
    "has the values of other training prompts (their tokens or their order differ): train on the same ones, or begin "
    "with a new ValueTracker"
)


class AdvantageEstimator(nn.Module):
    """What all estimators have. Called with a batch, they write into it and return what is worth logging.

    The batch has ``rewards`` ``(B, G)``, ``rollout_mask`` ``(B, G)``, which is False for rollouts that could not be
    judged, ``completion_ids`` and ``completion_mask`` ``(B, G, T)``, ``completion`` (B lists of G texts), and what the
    data module gave.
    """

    extra_generations = 0
    """Rollouts that are drawn of each prompt beyond those that are trained on."""
    scores_demonstrations = False
    """Whether it needs ``demonstration_rewards`` ``(B, M)``."""
    loss_type: ClassVar[Aggregation] = "grpo"
    """How its paper averages the loss, see `heliostat.components.clipped_surrogate_loss`."""

    @property
    def offline_generations(self) -> int:
        """Rollouts of each prompt that `start` needs before training begins; 0 once it has them."""
        return 0

    def check(self, num_generations: int) -> None:
        """Refuse a number of rollouts that it cannot work with.

        Raises:
            ValueError: It cannot.
        """

    def setup(self, num_prompts: int | None, fingerprint: int | None = None) -> None:
        """Learn how many training prompts there are, and which, None if nobody knows.

        Called before a checkpoint is loaded.
        """

    def start(self, successes: Tensor, trials: Tensor) -> None:
        """Take in the sums of the rewards of ``offline_generations``, ``(n,)``, and of how many they are."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Write ``advantages``."""
        raise NotImplementedError

    def after_update(self, batch: dict[str, Any], score: Score) -> dict[str, Tensor]:
        """Take notice of the updated policy.

        Args:
            batch: The one that was trained on.
            score: Maps completions ``(B, G, T)`` of the batch's prompts, and their mask, to their tokens' present
                log-probabilities.
        """
        return {}

    def sampling_probabilities(self) -> Tensor | None:
        """With which probability each prompt ``(n,)`` should be drawn next; None: no opinion."""
        return None


class GroupRelative(AdvantageEstimator):
    """GRPO's (arXiv 2402.03300): reward less the group's mean, in its standard deviations.

    Args:
        ddof: See `heliostat.components.group_relative_advantages`.
        eps: >= 0.
    """

    def __init__(self, *, ddof: int = 1, eps: float = 1e-6) -> None:
        super().__init__()
        self.ddof, self.eps = ddof, eps

    def check(self, num_generations: int) -> None:
        """Refuse groups of one, which have no spread."""
        if num_generations < 2:
            raise ValueError(
                f"num_generations must be >= 2 for GroupRelative, which compares them, got {num_generations}"
            )

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Write ``advantages``."""
        batch["advantages"] = group_relative_advantages(
            batch["rewards"], batch["rollout_mask"], ddof=self.ddof, eps=self.eps
        )
        return {}


class MedianCentered(AdvantageEstimator):
    """MC-GRPO's (arXiv 2601.22582): one rollout more, reward less the group's median, and the median one left out.

    Logged are ``zero_mad``, the share of groups whose median absolute deviation is 0 although they have spread, and
    ``max_advantage``.

    Args:
        scale: See `heliostat.components.median_centered_advantages`, so are the others. With rewards of few values
            ``"std"`` keeps the advantages from being huge.
        eps: >= 0.
        min_scale: >= 0.
        nonzero_rescale: As the authors do for GSM8K.
    """

    extra_generations = 1

    def __init__(
        self, *, scale: Scale = "mad", eps: float = 1e-3, min_scale: float = 0.0, nonzero_rescale: bool = False
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "scale": scale,
            "eps": eps,
            "min_scale": min_scale,
            "nonzero_rescale": nonzero_rescale,
        }

    def check(self, num_generations: int) -> None:
        """Refuse odd numbers, with which the median would be no rollout."""
        if num_generations < 2 or num_generations % 2:
            raise ValueError(
                "num_generations must be even for MedianCentered, which draws one more, so that the median is one of "
                f"them; got {num_generations}"
            )

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Write ``advantages`` and leave the median rollout out of everything."""
        rewards = batch["rewards"].masked_fill(~batch["rollout_mask"], torch.nan)
        found = median_centered_advantages(rewards, **self.settings)
        place = torch.arange(rewards.shape[1], device=rewards.device).expand(rewards.shape)
        names = ("completion_ids", "completion_mask", "rewards")
        kept = drop_pivots(found.keep_mask, found.advantages, found.keep_mask, place, *(batch[name] for name in names))
        batch["advantages"], batch["rollout_mask"], place = kept[:3]
        batch.update(zip(names, kept[3:], strict=True))
        batch["completion"] = [
            [texts[i] for i in row] for texts, row in zip(batch["completion"], place.tolist(), strict=True)
        ]
        spread = (found.advantages != 0).any(1)
        return {
            "zero_mad": ((found.mad == 0) & spread).to(rewards.dtype).mean(),
            "max_advantage": found.advantages.abs().max(),
        }


class ReferenceInGroup(AdvantageEstimator):
    """GRAO's (arXiv 2508.07750): the first demonstration is a member of the group, imitated as far as it is better.

        advantage of a rollout  (1 + lam) A_i,   weight of the demonstration  beta A_y - lam mean_i A_i

    which is the gradient of `heliostat.components.group_direct_alignment_loss` with one update a batch and its own
    average over each prompt's rollouts. There is no ratio in GRAO, so more updates a batch are not corrected for.
    Prompts without demonstration have A_i alone. Logged are ``target_advantage`` and ``target_reward``, means over
    demonstrations.

    Args:
        beta: See `heliostat.components.group_direct_alignment_loss`, so are the next three.
        lam: >= 0.
        exploration_weight: >= 0.
        min_target_advantage: Lower bound of A_y.
        target_reward: What the demonstration's reward is, such as that of a tie where a judge compares with it; None:
            that of the reward function for its text.
        reference_in_group: See `heliostat.components.grao_advantages`.
        eps: >= 0.

    Raises:
        ValueError: For a negative weight.
        MisconfigurationException: If batches have no demonstrations.
    """

    loss_type = "prompt"

    def __init__(
        self,
        *,
        beta: float = 0.5,
        lam: float = 0.6,
        exploration_weight: float = 1.0,
        min_target_advantage: float | None = None,
        target_reward: float | None = None,
        reference_in_group: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        for name, value in (("beta", beta), ("lam", lam), ("exploration_weight", exploration_weight)):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        self.beta, self.lam, self.exploration_weight = beta, lam, exploration_weight
        self.min_target_advantage, self.target_reward = min_target_advantage, target_reward
        self.reference_in_group, self.eps = reference_in_group, eps
        self.scores_demonstrations = target_reward is None

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Write ``advantages``, ``sft_weight`` and ``teacher_index``."""
        available = batch.get("demonstration_available")
        if available is None or available.shape[1] == 0:
            raise MisconfigurationException(
                "ReferenceInGroup needs demonstrations in its batches (demonstration_ids, demonstration_mask and "
                "demonstration_available), and they have none: give the data module teachers"
            )
        rewards, valid = batch["rewards"], batch["rollout_mask"]
        if self.target_reward is None:
            of_demonstrations = batch["demonstration_rewards"]
            available = available & of_demonstrations.isfinite()
        else:
            of_demonstrations = torch.full_like(available, self.target_reward, dtype=rewards.dtype)
        has_target, teacher = available.any(1), available.to(torch.uint8).argmax(1)
        target = of_demonstrations.gather(1, teacher[:, None])[:, 0].where(has_target, 0)
        a, a_y = grao_advantages(
            rewards, target, valid, has_target, reference_in_group=self.reference_in_group, eps=self.eps
        )
        mean_a = a.sum(1) / valid.sum(1).clamp_min(1)
        lam = self.lam * has_target.to(a.dtype)
        if self.min_target_advantage is not None:
            a_y = a_y.clamp_min(self.min_target_advantage)
        batch["advantages"] = (self.exploration_weight + lam)[:, None] * a
        batch["sft_weight"] = (self.beta * a_y - lam * mean_a).where(has_target, 0)
        batch["teacher_index"] = teacher.where(has_target, -1)
        count = has_target.sum().clamp_min(1)
        return {"target_advantage": a_y.where(has_target, 0).sum() / count, "target_reward": target.sum() / count}


class ValueTracker(AdvantageEstimator):
    """SPO's (arXiv 2509.13232): reward less the prompt's tracked success rate, whitened over the batch.

    For one rollout a prompt, or few; the loss is averaged over the tokens of the batch. After every update each
    prompt's tracker forgets by how far the policy has moved on the response that it gave last time, which is kept with
    its log-probabilities, and takes in the rewards, which must lie in [0, 1]. Where the training loader's sampler has
    ``set_weights`` (``PromptDataModule(prioritized=True)``), prompts whose outcome is uncertain are drawn more often.
    Logged are ``value``, ``drift``, ``rho`` and ``rho_clipped``, the share of forgetting factors at a bound.

    Args:
        offline_generations: Rollouts of every prompt that start the trackers; the paper found that they are needed. 0:
            all start from ``prior``.
        prior: See `heliostat.components.BetaValueTracker.from_offline`.
        forgetting: ``"drift"``, or ``"constant"`` by ``rho_min``, which keeps no responses and spares two passes of the
            model.
        half_life: See `heliostat.components.forgetting_factor`, so are the next two.
        rho_min: In (0, 1).
        rho_max: In [``rho_min``, 1].
        explore: See `heliostat.components.BetaValueTracker.sampling_probabilities`, so is the next.
        gamma: In [0, 1].
        whiten: Over ``"sequence"``, as the authors do, or ``"token"``, as the loss is.

    Raises:
        ValueError: For an unknown choice, or a negative number of rollouts.
        MisconfigurationException: If the number of prompts is not known, it has the values of other ones, or batches
            have no ``index``.
        RuntimeError: A checkpoint's values are of other prompts.
    """

    loss_type = "dapo"
    tracker: BetaValueTracker | None
    started: Tensor
    fingerprint: Tensor
    stored_ids: Tensor
    stored_lengths: Tensor
    stored_logps: Tensor

    def __init__(
        self,
        *,
        offline_generations: int = 8,
        prior: float = 0.5,
        forgetting: Forgetting = "drift",
        half_life: float = 0.06,
        rho_min: float = 0.875,
        rho_max: float = 0.96,
        explore: float = 0.05,
        gamma: float = 0.0,
        whiten: Whitening = "sequence",
    ) -> None:
        super().__init__()
        if offline_generations < 0:
            raise ValueError(f"offline_generations must be >= 0, got {offline_generations}")
        for name, choice, choices in (
            ("forgetting", forgetting, get_args(Forgetting)),
            ("whiten", whiten, get_args(Whitening)),
        ):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {choice!r}")
        forgetting_factor(torch.zeros(()), half_life, rho_min, rho_max)  # refuses what is out of range
        self.num_offline, self.prior, self.forgetting = offline_generations, prior, forgetting
        self.half_life, self.rho_min, self.rho_max = half_life, rho_min, rho_max
        self.explore, self.gamma, self.whiten = explore, gamma, whiten
        self.register_module("tracker", None)  # once the number of prompts is known
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("fingerprint", torch.zeros((), dtype=torch.long))  # of the prompts; 0: not known
        self._forget_responses(0, 0)

    @property
    def offline_generations(self) -> int:
        """Rollouts of each prompt to start the trackers from; 0 once they have started."""
        return 0 if self.started else self.num_offline

    def setup(self, num_prompts: int | None, fingerprint: int | None = None) -> None:
        """Make the trackers, or see that those there are belong to these prompts."""
        if self.tracker is None:
            if num_prompts is None:
                raise MisconfigurationException(
                    "ValueTracker keeps a value for every training prompt, and the data module has no num_prompts: use "
                    "PromptDataModule, or give yours this attribute and batches an index from 0 to num_prompts - 1"
                )
            self._make(num_prompts)
        elif num_prompts not in (None, len(self.stored_lengths)) or self._is_of_others(fingerprint):
            raise MisconfigurationException(f"ValueTracker {_OTHER_PROMPTS}")
        if fingerprint is not None:
            self.fingerprint.fill_(fingerprint)

    def _make(self, num_prompts: int) -> None:
        self.tracker = BetaValueTracker(num_prompts, self.prior or 0.5).to(self.started.device)
        self._forget_responses(num_prompts, 0)

    def _is_of_others(self, fingerprint: int | Tensor | None) -> bool:
        return int(fingerprint or 0) not in (0, int(self.fingerprint)) and bool(self.fingerprint)

    def start(self, successes: Tensor, trials: Tensor) -> None:
        """Start the trackers from the initial policy's rollouts."""
        self.tracker = BetaValueTracker.from_offline(successes, trials, self.rho_min, self.prior)
        self.started.fill_(True)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Write ``advantages``."""
        if "index" not in batch:
            raise MisconfigurationException(
                f"ValueTracker needs the prompts' index in its batches, which have {sorted(batch)}"
            )
        assert self.tracker is not None, "setup comes first"
        rewards, valid = batch["rewards"], batch["rollout_mask"]
        value = self.tracker.value(batch["index"])
        surplus = (rewards.double() - value[:, None])[valid]
        counts = batch["completion_mask"].sum(2)[valid] if self.whiten == "token" else None
        whitened = whiten_advantages(surplus, token_counts=counts)
        batch["advantages"] = torch.zeros_like(rewards).masked_scatter(valid, whitened.to(rewards.dtype))
        return {"value": value.mean()}

    @torch.no_grad()
    def after_update(self, batch: dict[str, Any], score: Score) -> dict[str, Tensor]:
        """Forget, take in the rewards, and keep the responses."""
        assert self.tracker is not None, "setup comes first"
        index, rewards = batch["index"], batch["rewards"]
        drift = torch.zeros_like(rewards[:, 0])
        if self.forgetting == "drift":
            if self.stored_ids.shape[1]:
                kept = torch.arange(self.stored_ids.shape[1], device=index.device) < self.stored_lengths[index][:, None]
                now = score(self.stored_ids[index].long()[:, None], kept[:, None])[:, 0]
                drift = policy_drift(self.stored_logps[index], now, kept).to(drift.dtype)
            rho = forgetting_factor(drift, self.half_life, self.rho_min, self.rho_max)
            self._store(batch, score)
        else:
            rho = torch.full_like(drift, self.rho_min)
        every = rewards.shape[1]
        observed = rewards.masked_fill(~batch["rollout_mask"], torch.nan)
        self.tracker.update(index.repeat_interleave(every), observed.flatten(), rho.repeat_interleave(every))
        clipped = (rho <= self.rho_min) | (rho >= self.rho_max)
        return {"drift": drift.mean(), "rho": rho.mean(), "rho_clipped": clipped.to(drift.dtype).mean()}

    def sampling_probabilities(self) -> Tensor | None:
        """Prompts of uncertain outcome come first."""
        assert self.tracker is not None, "setup comes first"
        return self.tracker.sampling_probabilities(self.explore, self.gamma)

    def _store(self, batch: dict[str, Any], score: Score) -> None:
        """Keep the first response to each prompt, with the log-probabilities after the update, on all processes."""
        ids, mask = batch["completion_ids"][:, :1], batch["completion_mask"][:, :1]
        logps = score(ids, mask)
        longest = torch.tensor([max(ids.shape[2], self.stored_ids.shape[1])], device=ids.device)
        group = default_group()
        if group is not None:
            dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
        width = int(longest)
        if width > self.stored_ids.shape[1]:
            more = width - self.stored_ids.shape[1]
            self.stored_ids = nn.functional.pad(self.stored_ids, (0, more))
            self.stored_logps = nn.functional.pad(self.stored_logps, (0, more))
        padded = (0, width - ids.shape[2])
        rows = [
            gather_rows(batch["index"]),
            gather_rows(nn.functional.pad(ids[:, 0], padded)).to(self.stored_ids.dtype),
            gather_rows(mask[:, 0].sum(1)),
            gather_rows(nn.functional.pad(logps[:, 0], padded)).to(self.stored_logps.dtype),
        ]
        for index, tokens, length, values in zip(*rows, strict=True):  # in this order: the last of a prompt stays
            self.stored_ids[index], self.stored_lengths[index], self.stored_logps[index] = tokens, length, values

    def _forget_responses(self, num_prompts: int, width: int) -> None:
        device = self.started.device
        self.register_buffer("stored_ids", torch.zeros(num_prompts, width, dtype=torch.int32, device=device))
        self.register_buffer("stored_lengths", torch.zeros(num_prompts, dtype=torch.long, device=device))
        self.register_buffer("stored_logps", torch.zeros(num_prompts, width, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueTracker:
        # Trainer(precision="bf16-true") turns the whole module into bfloat16, in which a drift is lost.
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor).device)

        return cast(ValueTracker, super()._apply(moved, recurse))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        ids = state_dict.get(f"{prefix}stored_ids")
        if ids is not None and f"{prefix}tracker.alpha" in state_dict:  # of a size that only the checkpoint knows
            if self.tracker is None:
                self._make(len(ids))
            if len(ids) == len(self.stored_ids):
                self._forget_responses(*ids.shape)
        if self._is_of_others(state_dict.get(f"{prefix}fingerprint")):
            args[-1].append(f"the ValueTracker of the checkpoint {_OTHER_PROMPTS}")  # raised by load_state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)
