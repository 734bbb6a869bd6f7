"""DYPO's gate as a callback (arXiv 2604.08926): difficulty decides whether a prompt is imitated or reinforced."""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from heliostat.components.distributed import default_group
from heliostat.components.dypo import EASY, HARD, MID, SKIP, grade_groups, sample_teachers


class DYPOGate(Callback):
    """Route every prompt by the rewards of its rollouts: imitate, reinforce, or leave it.

    Works with any module that puts ``rewards`` ``(B, G)`` into its training batches before ``on_train_batch_start``,
    as `heliostat.GroupPolicy` does in ``on_after_batch_transfer``; the batch must be a mapping that can be written to.
    The gate grades the prompts and writes, of shape ``(B,)``,

    - ``rl_weight``: 1 for Mid prompts, of which some rollouts succeed and some fail, else 0;
    - ``sft_weight``: ``gamma`` for Hard prompts, of which all fail, if they have a demonstration, else 0;
    - ``teacher_index``: whose demonstration to imitate, drawn at random from those that there are, anew at every step;
      -1 where nobody's;
    - ``gal_weight``: 0, the share of the group alignment loss, before ``start_step`` alone.

    The module multiplies its prompts' losses by these weights and averages over all prompts with rollouts, Easy ones
    too, of which all rollouts succeed. GRPO and the group alignment loss of Mid prompts are the module's: DYPO is
    ``GroupPolicy(gal_weight=0.5)``. The batch may have ``rollout_mask`` ``(B, G)``, False for rollouts that do not
    count, ``demonstration_available`` boolean ``(B, M)``, and ``index`` ``(B,)``, the prompts' stable numbers, from
    which, with the seed and the step, draws follow, so that they do not depend on how prompts are divided among
    processes.

    Logged are, over the prompts of all processes, ``dypo/frac_hard``, ``dypo/frac_mid``, ``dypo/frac_easy``,
    ``dypo/offline_ratio`` (Hard among Hard and Mid), ``dypo/hard_without_teacher`` (how many) and ``dypo/reward``. The
    number of batches that have passed is in the checkpoint.

    Args:
        gamma: Weight of imitation, > 0; the paper gives none.
        success_threshold: A reward above it is a success.
        hard_max_successes: Hard are prompts with at most so many successes.
        easy_max_failures: Easy are others with at most so many failures.
        start_step: Batches before the gate acts. Until then every prompt is reinforced, by GRPO alone, and none
            imitated.
        seed: Seed of the draws.

    Raises:
        ValueError: Settings out of range.
        MisconfigurationException: In training, if a batch is not a mapping that can be written to, or has no
            ``rewards``, or such that cannot be graded.
    """

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        success_threshold: float = 0.5,
        hard_max_successes: int = 0,
        easy_max_failures: int = 0,
        start_step: int = 0,
        seed: int = 0,
    ) -> None:
        if not gamma > 0:
            raise ValueError(f"gamma must be > 0, got {gamma}")
        for name, number in (
            ("hard_max_successes", hard_max_successes),
            ("easy_max_failures", easy_max_failures),
            ("start_step", start_step),
        ):
            if number < 0:
                raise ValueError(f"{name} must be >= 0, got {number}")
        self.gamma, self.start_step, self.seed = gamma, start_step, seed
        self.grading: dict[str, Any] = {
            "success_threshold": success_threshold,
            "hard_max_successes": hard_max_successes,
            "easy_max_failures": easy_max_failures,
        }
        self.step = 0
        self._warned = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Grade and route."""
        rewards = _rewards_of(batch, pl_module)
        valid = batch.get("rollout_mask")
        try:
            tier = grade_groups(rewards, valid, **self.grading)
        except ValueError as error:
            raise MisconfigurationException(
                f"DYPOGate cannot grade the batch of {_name(pl_module)}: {error}"
            ) from error
        available = self._demonstrations(batch, rewards)
        acts = self.step >= self.start_step
        rl_weight = (tier == MID if acts else tier != SKIP).to(rewards.dtype)
        hard = (tier == HARD) & acts
        teacher = self._draw(available, hard, self._indices(batch, trainer, rewards))
        taught = teacher >= 0
        batch["rl_weight"], batch["sft_weight"] = rl_weight, self.gamma * taught.to(rewards.dtype)
        batch["teacher_index"] = teacher
        if not acts:
            batch["gal_weight"] = torch.zeros_like(rl_weight)
        counts = [(tier == code).sum() for code in (HARD, MID, EASY, SKIP)]
        counts += [(hard & ~taught).sum(), *_total(rewards, valid)]
        self._log(pl_module, torch.stack([count.double() for count in counts]), len(rewards))
        self.step += 1

    def _demonstrations(self, batch: MutableMapping[str, Any], rewards: Tensor) -> Tensor:
        available = batch.get("demonstration_available")
        if available is None:
            if not self._warned:
                self._warned = True
                rank_zero_warn(
                    "DYPOGate: the batches have no demonstration_available, so that Hard prompts teach nothing: give "
                    "the data module teachers"
                )
            return torch.zeros(len(rewards), 0, dtype=torch.bool, device=rewards.device)
        if available.ndim != 2 or len(available) != len(rewards) or available.dtype != torch.bool:
            raise MisconfigurationException(
                f"demonstration_available must be boolean (B, M) with B = {len(rewards)} of rewards, got "
                f"{available.dtype} {tuple(available.shape)}"
            )
        return available

    def _indices(self, batch: MutableMapping[str, Any], trainer: Trainer, rewards: Tensor) -> list[int]:
        index = batch.get("index")
        if index is None:  # the place in the batch of all processes
            return [trainer.global_rank * len(rewards) + row for row in range(len(rewards))]
        if index.shape != rewards.shape[:1]:
            raise MisconfigurationException(
                f"index must have shape (B,) = ({len(rewards)},) of rewards, got {tuple(index.shape)}"
            )
        return index.tolist()

    def _draw(self, available: Tensor, hard: Tensor, indices: list[int]) -> Tensor:
        teacher = torch.full_like(hard, -1, dtype=torch.long)
        for row in hard.nonzero()[:, 0].tolist():
            name = f"{self.seed}/{indices[row]}/{self.step}"
            seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
            generator = torch.Generator().manual_seed(seed)
            teacher[row] = sample_teachers(available[row : row + 1], generator)[0]
        return teacher

    def _log(self, module: LightningModule, sums: Tensor, prompts: int) -> None:
        group = default_group()
        if group is not None:
            dist.all_reduce(sums, group=group)
        hard, mid, easy, skip, without, reward, rollouts = sums
        graded = (hard + mid + easy + skip).clamp_min(1)
        statistics = {
            "frac_hard": hard / graded,
            "frac_mid": mid / graded,
            "frac_easy": easy / graded,
            "offline_ratio": hard / (hard + mid).clamp_min(1),
            "hard_without_teacher": without,
            "reward": reward / rollouts.clamp_min(1),
        }
        module.log_dict({f"dypo/{name}": value for name, value in statistics.items()}, batch_size=prompts)

    def state_dict(self) -> dict[str, Any]:
        """The number of batches."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the count of the run that is continued."""
        self.step = state_dict["step"]


def _rewards_of(batch: Any, module: LightningModule) -> Tensor:
    remedy = (
        "Let the module draw and judge rollouts in on_after_batch_transfer, as heliostat.GroupPolicy does, and return "
        "a dict with rewards (B, G)"
    )
    if not isinstance(batch, MutableMapping):
        raise MisconfigurationException(
            f"DYPOGate writes weights into the batch, which must be a dict, but {_name(module)} trains on "
            f"{type(batch).__name__}. {remedy}"
        )
    rewards = batch.get("rewards")
    if rewards is None:
        raise MisconfigurationException(
            f"DYPOGate finds no rewards in the batch of {_name(module)}, which has {sorted(map(str, batch))}. {remedy}"
        )
    if not isinstance(rewards, Tensor) or rewards.ndim != 2 or not rewards.is_floating_point():
        got = f"{rewards.dtype} {tuple(rewards.shape)}" if isinstance(rewards, Tensor) else type(rewards).__name__
        raise MisconfigurationException(f"rewards must be a floating-point tensor (B, G), got {got}. {remedy}")
    return rewards


def _total(rewards: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum and number of the rewards that count."""
    counted = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    return rewards.double().where(counted, 0).sum(), counted.sum()


def _name(module: LightningModule) -> str:
    return type(module).__name__
