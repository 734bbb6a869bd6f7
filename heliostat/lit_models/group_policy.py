"""Post-training of a language model by reinforcement, with groups of rollouts and demonstrations.

One module for GRPO (2024, arXiv 2402.03300), MC-GRPO (2026, arXiv 2601.22582), GRAO (2025, arXiv 2508.07750), SPO
(2025, arXiv 2509.13232) and DYPO (2026, arXiv 2604.08926): they differ in the estimator of advantages, see
`heliostat.advantages`, and DYPO in `heliostat.DYPOGate`, a callback that weighs the prompts. The losses are those of
`heliostat.components`.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from heliostat._extras import require
from heliostat.advantages import AdvantageEstimator, GroupRelative
from heliostat.components.distributed import default_group
from heliostat.components.dypo import group_alignment_loss
from heliostat.components.policy_gradient import (
    Aggregation,
    RatioLevel,
    clipped_token_losses,
    kl_estimate,
    shared_count,
    token_log_probs,
    units_per_prompt,
)
from heliostat.generation import (
    Generation,
    Generator,
    TransformersGenerator,
    context_length,
    evaluating,
    is_peft,
)
from heliostat.lit_models._evaluation import gather_once
from heliostat.lit_models._hparams import save_plain_hyperparameters
from heliostat.lit_models._optimization import Schedule, configure_optimizers
from heliostat.pretrained import load_tokenizer
from heliostat.rewards import Reward, compute_rewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROMPT_KEYS = ("prompt_ids", "prompt_mask", "prompt", "answer")
_DEMONSTRATION_KEYS = ("demonstration_ids", "demonstration_mask", "demonstration_available")


class GroupPolicy(LightningModule):
    """A causal language model that learns from rewards of its own completions, and from demonstrations.

    Training batches hold prompts as `heliostat.PromptDataModule` gives them: ``prompt_ids`` and ``prompt_mask``
    ``(B, P)``, padded on the left, the texts ``prompt`` and ``answer``, and if need be ``index`` and demonstrations. As
    soon as one is on the device, the policy draws G completions of each prompt, the reward function judges their texts
    and the estimator turns rewards into advantages. Every callback's ``on_train_batch_start`` thus finds in the batch:
    ``completion_ids`` and ``completion_mask`` ``(B, G, T)``, the texts ``completion`` (B lists of G), ``rewards``,
    ``rollout_mask`` (False for rollouts that could not be judged) and ``advantages`` ``(B, G)``. It may set
    ``rl_weight``, ``gal_weight``, ``sft_weight`` and ``teacher_index``, ``(B,)`` each, as `heliostat.DYPOGate` does.
    Then

        L = mean over prompts of  rl_weight [(1 - gal_weight) L_clip + gal_weight L_GAL] + sft_weight L_NLL

    with the clipped surrogate and the group alignment loss of `heliostat.components`, and the mean negative
    log-likelihood of a demonstration's tokens. Without anybody setting them, ``rl_weight`` is 1, ``gal_weight`` the
    argument of this name, ``sft_weight`` 0 and ``teacher_index`` the first available teacher. The mean is over the
    prompts of all processes that have rollouts or are taught. Log-probabilities are at the temperature of the rollouts.
    What has weight or advantage 0 is not computed; a process with nothing to learn takes part in the others' step all
    the same.

    Optimisation is manual: a batch makes ``inner_epochs`` steps, which ``max_steps`` and ``global_step`` count;
    ``micro_batch_size`` takes the place of ``accumulate_grad_batches`` and ``max_grad_norm`` that of
    ``gradient_clip_val``. Use models without dropout, or ratios are noisy. The reference policy of ``kl_coef`` and
    ``gal_weight`` is the model as training begins: a frozen copy, which is in the checkpoints, or with LoRA the model
    without its adapter.

    Logged in training: ``loss``, ``reward``, ``completion_length`` (tokens with EOS), ``truncated`` (share of rollouts
    without EOS), ``unjudged`` (share whose reward is not finite), ``no_signal`` (share of prompts without any
    advantage), ``clip_fraction`` and ``grad_norm``; where they apply ``nll`` of demonstrations, ``kl`` from the
    reference, and ``gal_margin`` and ``pair_accuracy`` (share of pairs of which the better has gained on the other
    since the reference); and what the estimator tells. Of the whole validation and test set: ``accuracy``, the share of
    greedy completions of a reward above ``success_threshold``, and ``reward``, the mean of sampled ones. ``predict``
    gives greedy completions.

    Args:
        model: A causal language model of transformers: a local directory or hub id, loaded in float32, or a module, of
            peft or not, whose output has ``logits``.
        reward: Called with the lists of prompts, completions and answers, returns a number for each completion, NaN
            where it cannot judge; see `heliostat.rewards`.
        tokenizer: Or its name; None: that of ``model`` if it is a name, else that of the data module.
        lora: Settings of peft's ``LoraConfig``; the rest of the model is then frozen. ``None`` trains all weights.
        num_generations: G, completions of a prompt that are trained on.
        generator: Draws them; None: `heliostat.generation.TransformersGenerator` with its defaults.
        advantages: Estimator; None: that of GRPO, `heliostat.advantages.GroupRelative`.
        kl_coef: Weight of the divergence from the reference policy, >= 0.
        clip_low: See `heliostat.components.clipped_surrogate_loss`, so are the next four.
        clip_high: > 0.
        ratio_level: ``"token"`` or ``"sequence"``.
        loss_type: Its ``aggregation``; None: the estimator's own, ``advantages.loss_type``. ``"dr_grpo"`` takes the
            longest completion from the generator.
        dual_clip: Largest ratio that counts for negative advantages, > 1; None: no such bound.
        gal_weight: Share of the group alignment loss (DYPO's 1 - alpha), in [0, 1], where a batch has no other.
        beta_gal: See `heliostat.components.group_alignment_loss`.
        inner_epochs: Steps of the optimizer with each batch of rollouts.
        micro_batch_size: Prompts of a process in one forward and backward pass; None: all. Changes memory and nothing
            else.
        max_grad_norm: Largest norm of the gradient; None: any.
        eval_generations: Completions of each prompt sampled in evaluation; 0: greedy ones only.
        eval_reward: Judges in evaluation; None: ``reward``.
        success_threshold: A reward above it is a success in evaluation.
        optimizer: Makes the optimizer from the trainable parameters.
        lr_scheduler: ``"linear"`` (to zero), ``"cosine"``, ``"constant"``, or a callable.
        warmup_steps: Steps over which ``"linear"`` and ``"cosine"`` first rise.
        seed: Seed of the rollouts, which depend on it, the batch and the process.

    Raises:
        ValueError: Settings out of range or in contradiction; or in training: prompts or demonstrations too long for
            the model's context, or a reward function that does not return a number for each completion.
        ModuleNotFoundError: ``model`` is a name and transformers is not installed, or ``lora`` is given without peft.
        MisconfigurationException: There is no tokenizer, or one without EOS; or a batch lacks something.
    """

    batches: Tensor

    def __init__(
        self,
        model: str | nn.Module,
        reward: Reward,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        lora: dict[str, Any] | None = None,
        num_generations: int = 8,
        generator: Generator | None = None,
        advantages: AdvantageEstimator | None = None,
        kl_coef: float = 0.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        ratio_level: RatioLevel = "token",
        loss_type: Aggregation | None = None,
        dual_clip: float | None = None,
        gal_weight: float = 0.0,
        beta_gal: float = 1.0,
        inner_epochs: int = 1,
        micro_batch_size: int | None = None,
        max_grad_norm: float | None = 1.0,
        eval_generations: int = 1,
        eval_reward: Reward | None = None,
        success_threshold: float = 0.5,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0),
        lr_scheduler: Schedule | LRSchedulerCallable = "constant",
        warmup_steps: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        self.automatic_optimization = False
        for name, value, least in (
            ("num_generations", num_generations, 1),
            ("inner_epochs", inner_epochs, 1),
            ("micro_batch_size", micro_batch_size, 1),
            ("eval_generations", eval_generations, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if not 0 < clip_low < 1:
            raise ValueError(f"clip_low must be in (0, 1), got {clip_low}")
        for name, number in (("clip_high", clip_high), ("beta_gal", beta_gal), ("max_grad_norm", max_grad_norm)):
            if number is not None and not number > 0:
                raise ValueError(f"{name} must be > 0, got {number}")
        if not kl_coef >= 0:
            raise ValueError(f"kl_coef must be >= 0, got {kl_coef}")
        if dual_clip is not None and not dual_clip > 1:
            raise ValueError(f"dual_clip must be > 1, or None for no bound, got {dual_clip}")
        if not 0 <= gal_weight <= 1:
            raise ValueError(f"gal_weight must be in [0, 1], got {gal_weight}")
        self.generator = generator or TransformersGenerator()
        self.advantages = advantages or GroupRelative()
        self.advantages.check(num_generations)
        loss_type = self.advantages.loss_type if loss_type is None else loss_type
        for name, choice, choices in (
            ("ratio_level", ratio_level, get_args(RatioLevel)),
            ("loss_type", loss_type, get_args(Aggregation)),
        ):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {choice!r}")
        self.max_completion_length = getattr(self.generator, "max_new_tokens", None)
        if loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError(f"loss_type='dr_grpo' needs max_new_tokens of {type(self.generator).__name__}")
        self.model = _load(model, lora)
        self.model.train()  # transformers hands models over in eval mode
        if isinstance(tokenizer, str) or (tokenizer is None and isinstance(model, str)):
            tokenizer = load_tokenizer(tokenizer or model)  # type: ignore[arg-type]
        self.tokenizer: Any = tokenizer
        self.reward, self.eval_reward = reward, eval_reward or reward
        self.num_generations, self.kl_coef = num_generations, kl_coef
        self.clip_low, self.clip_high, self.ratio_level = clip_low, clip_high, ratio_level
        self.loss_type: Aggregation = loss_type
        self.dual_clip, self.gal_weight, self.beta_gal = dual_clip, gal_weight, beta_gal
        self.inner_epochs, self.micro_batch_size, self.max_grad_norm = inner_epochs, micro_batch_size, max_grad_norm
        self.eval_generations, self.success_threshold = eval_generations, success_threshold
        self.optimizer, self.lr_scheduler, self.warmup_steps = optimizer, lr_scheduler, warmup_steps
        self.seed = seed
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))  # trained on so far
        self.uses_reference = kl_coef > 0 or gal_weight > 0
        self.reference = _Reference(self.model) if self.uses_reference and not is_peft(self.model) else None
        self._output_is_linear: bool | None = None
        self._warned_of_unjudged = False
        self._rows: list[tuple[Tensor, ...]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``(B, T, V)``."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    def setup(self, stage: str) -> None:
        """Take the data module's tokenizer, and tell the estimator of the prompts."""
        data = getattr(self.trainer, "datamodule", None)
        if self.tokenizer is None:
            self.tokenizer = getattr(data, "tokenizer", None)
        if self.tokenizer is None:
            raise MisconfigurationException(
                "GroupPolicy(tokenizer=None) takes the tokenizer of the model's name or of the data module, and there "
                "is none: pass tokenizer="
            )
        if self.tokenizer.eos_token_id is None:
            raise MisconfigurationException(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no EOS token, without which no completion ends: "
                "set the one that the model was trained with, for example tokenizer.eos_token = '</s>'"
            )
        if stage == "fit":
            self.advantages.setup(getattr(data, "num_prompts", None), getattr(data, "prompts_fingerprint", None))

    def on_fit_start(self) -> None:
        """Take the model as it is now, its weights loaded, for the reference, unless this run is a resumed one."""
        if self.reference is not None and not self.reference.started:
            self.reference.network.load_state_dict(self.model.state_dict())
            self.reference.started.fill_(True)

    # --- rollouts ----------------------------------------------------------------------------------------------------

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Draw, judge and compare completions of training prompts."""
        if not self.trainer.training:
            return batch
        self._check_keys(batch, _PROMPT_KEYS)
        batch = dict(batch)
        number = self.num_generations + self.advantages.extra_generations
        with self._seeded("rollouts", int(self.batches)):
            drawn = self._generate(batch, number)
        batch["completion_ids"], batch["completion_mask"] = drawn
        batch["completion"] = self._texts(drawn)
        batch["rewards"] = self._judge(self.reward, batch, batch["completion"])
        judged = batch["rollout_mask"] = batch["rewards"].isfinite()
        if self.advantages.scores_demonstrations and all(key in batch for key in _DEMONSTRATION_KEYS):
            batch["demonstration_rewards"] = self._judge_demonstrations(batch)
        batch["rollout_statistics"] = {"unjudged": (~judged).float().mean()} | self.advantages(batch)
        if not judged.all() and not self._warned_of_unjudged:
            self._warned_of_unjudged = True
            rank_zero_warn(
                f"the reward of {int((~judged).sum())} of {judged.numel()} rollouts of a batch is not finite; they are "
                "not learned from, and train/unjudged counts them from now on"
            )
        return batch

    def on_train_start(self) -> None:
        """Draw what the estimator needs before training, if it needs something."""
        if self.advantages.offline_generations:
            self._start_estimator(self.advantages.offline_generations)

    def _start_estimator(self, number: int) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        loader = data.predict_dataloader() if hasattr(data, "num_prompts") else None
        if not loader:
            rank_zero_warn(
                f"{type(self.advantages).__name__} starts without rollouts of the initial policy: there is no data "
                "module with num_prompts and a predict_dataloader of the training prompts"
            )
            return
        sums = torch.zeros(2, data.num_prompts, dtype=torch.float64, device=self.device)  # of rewards, and how many
        for place, batch in enumerate(loader):
            if place % self.trainer.world_size != self.global_rank:
                continue
            batch = move_data_to_device(batch, self.device)
            with self._seeded("start", place):
                drawn = self._generate(batch, number)
            rewards = self._judge(self.reward, batch, self._texts(drawn)).double()
            judged = rewards.isfinite()
            sums[:, batch["index"]] = torch.stack([rewards.where(judged, 0).sum(1), judged.sum(1).double()])
        group = default_group()
        if group is not None:
            dist.all_reduce(sums, group=group)
        self.advantages.start(*sums)
        self._weigh_prompts()

    def _weigh_prompts(self) -> None:
        probabilities = self.advantages.sampling_probabilities()
        sampler: Any = getattr(self.trainer.train_dataloader, "sampler", None)
        if probabilities is not None and hasattr(sampler, "set_weights"):
            sampler.set_weights(probabilities)

    def _generate(self, batch: dict[str, Any], number: int, greedy: bool = False) -> Generation:
        eos = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id
        with torch.no_grad(), self.trainer.precision_plugin.val_step_context():
            return self.generator.generate(
                self.model,
                batch["prompt_ids"],
                batch["prompt_mask"],
                number,
                eos_token_id=eos,
                pad_token_id=eos if pad is None else pad,  # masks, not tokens, say what is padding
                greedy=greedy,
            )

    def _texts(self, drawn: Generation) -> list[list[str]]:
        ids, mask = (tensor.flatten(0, 1).tolist() for tensor in drawn)
        tokens = [[i for i, kept in zip(*row, strict=True) if kept] for row in zip(ids, mask, strict=True)]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        number = drawn.completion_ids.shape[1]
        return [texts[i : i + number] for i in range(0, len(texts), number)]

    def _judge(self, reward: Reward, batch: dict[str, Any], texts: list[list[str]]) -> Tensor:
        """Rewards ``(B, G)``."""
        number = len(texts[0])
        prompts = [prompt for prompt in batch["prompt"] for _ in range(number)]
        answers = [answer for answer in batch["answer"] for _ in range(number)]
        values = compute_rewards(reward, prompts, [text for group in texts for text in group], answers)
        return torch.tensor(values, dtype=self._reward_dtype, device=self.device).view(-1, number)

    @property
    def _reward_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _judge_demonstrations(self, batch: dict[str, Any]) -> Tensor:
        """Rewards ``(B, M)``, NaN for missing demonstrations."""
        available = batch["demonstration_available"]
        rewards = torch.full(available.shape, math.nan, dtype=self._reward_dtype, device=self.device)
        place = rows, _ = available.nonzero(as_tuple=True)
        if len(rows):
            said = Generation(*(batch[name][place][:, None] for name in ("demonstration_ids", "demonstration_mask")))
            of = {name: [batch[name][row] for row in rows.tolist()] for name in ("prompt", "answer")}
            rewards[place] = self._judge(self.reward, of, self._texts(said))[:, 0]
        return rewards

    # --- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Make the steps of the optimizer."""
        task = self._task(batch)
        optimizer: Any = self.optimizers()
        sums = _Sums(self.device)
        whole = torch.zeros((), dtype=torch.float64, device=self.device)
        memory: dict[int, tuple[Tensor, Tensor | None]] = {}
        block: Callable[[], AbstractContextManager] = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        for _ in range(self.inner_epochs):
            optimizer.zero_grad()
            for number, rows in enumerate(task.micro_batches):
                with nullcontext() if number == len(task.micro_batches) - 1 else block():
                    loss = self._loss(batch, task, rows, memory.get(number), sums)
                    memory.setdefault(number, loss.memory)
                    self.manual_backward(loss.total)
                whole += loss.total.detach()
            optimizer.step()
            self._step_schedules()
        sums.add("loss", whole / self.inner_epochs, 1)
        self._count_rollouts(batch, sums)
        more = batch["rollout_statistics"] | self.advantages.after_update(batch, self._scorer(batch))
        self._weigh_prompts()
        self.batches += 1
        prompts = len(batch["prompt_ids"])
        self.log_dict({f"train/{name}": value for name, value in sums.means().items()}, batch_size=prompts)
        self.log_dict({f"train/{name}": value for name, value in more.items()}, sync_dist=True, batch_size=prompts)

    def _task(self, batch: dict[str, Any]) -> _Task:
        rewards, valid = batch["rewards"], batch["rollout_mask"]
        dtype = rewards.dtype
        rl_weight = self._weight(batch, "rl_weight", 1.0)
        gal_weight = self._weight(batch, "gal_weight", self.gal_weight)
        if not ((gal_weight >= 0) & (gal_weight <= 1)).all() or (gal_weight.any() and not self.uses_reference):
            raise MisconfigurationException(
                "gal_weight of a batch must be in [0, 1], and 0 for a GroupPolicy without reference, which gal_weight "
                f"> 0 or kl_coef > 0 gives it; got {gal_weight.min():g} to {gal_weight.max():g} with "
                f"GroupPolicy(gal_weight={self.gal_weight:g}, kl_coef={self.kl_coef:g})"
            )
        sft_weight = self._weight(batch, "sft_weight", 0.0)
        teacher = torch.zeros_like(valid[:, 0], dtype=torch.long)
        taught = sft_weight != 0
        without = taught
        available = batch.get("demonstration_available")
        if available is not None and available.shape[1]:
            self._check_demonstrations(batch)
            teacher = batch.get("teacher_index", available.to(torch.uint8).argmax(1)).clamp_min(-1)
            known = available.gather(1, teacher.clamp_min(0)[:, None])[:, 0] & (teacher >= 0)
            without = taught & ~known
        if without.any():
            raise MisconfigurationException(
                f"sft_weight is not 0 for {int(without.sum())} prompts that have no demonstration to imitate: set it "
                "to 0 there, or teacher_index to one that demonstration_available has, or give the data module teachers"
            )
        learnt = valid & (batch["advantages"] != 0)
        others = (rewards[:, :, None] != rewards[:, None, :]) & valid[:, None, :]
        learnt |= valid & others.any(2) & (gal_weight > 0)[:, None]
        if self.kl_coef > 0:
            learnt = valid.clone()
        learnt &= (rl_weight != 0)[:, None]
        counted = valid.any(1) | taught
        units = None
        if self.loss_type != "prompt":
            units = units_per_prompt(
                batch["completion_mask"][counted],
                valid[counted],
                aggregation=self.loss_type,
                max_completion_length=self.max_completion_length,
                dtype=dtype,
            )
        rows = (learnt.any(1) | taught).nonzero()[:, 0]
        micro_batches = list(rows.split(self.micro_batch_size or max(1, len(rows)))) if len(rows) else []
        number = torch.tensor(max(1, len(micro_batches)), device=self.device)
        group = default_group()
        if group is not None:  # as many passes on all processes, since a sharded model gathers its weights in each
            dist.all_reduce(number, dist.ReduceOp.MAX, group=group)
        micro_batches += [rows[:0]] * (int(number) - len(micro_batches))
        prompts = shared_count(counted.sum().to(dtype))
        return _Task(micro_batches, learnt, taught, rl_weight, gal_weight, sft_weight, teacher, units, prompts)

    def _loss(
        self,
        batch: dict[str, Any],
        task: _Task,
        rows: Tensor,
        memory: tuple[Tensor, Tensor | None] | None,
        sums: _Sums,
    ) -> _Loss:
        """The part of the loss that the prompts ``rows`` make."""
        if len(rows) == 0:  # nothing to learn here: the next token of a prompt, times zero, for the others' sake
            ids, mask = batch["prompt_ids"][:1], batch["prompt_mask"][:1]
            token = torch.full_like(ids[:, :1], self.tokenizer.eos_token_id)
            nothing = self._log_probs(self.model, ids, mask, token, torch.ones_like(token, dtype=torch.bool))
            return _Loss(nothing.sum() * 0, (nothing.detach(), None))
        # Rollouts, then demonstrations, of these prompts, in one pass.
        ids, mask = batch["completion_ids"][rows], batch["completion_mask"][rows]
        b, g = task.learnt[rows].nonzero(as_tuple=True)
        taught = task.taught[rows].nonzero()[:, 0]
        ids_of, mask_of, owner = ids[b, g], mask[b, g], rows[b]
        if len(taught):
            place = rows[taught], task.teacher[rows[taught]]
            said, said_mask = batch["demonstration_ids"][place], batch["demonstration_mask"][place]
            width = max(ids_of.shape[1], said.shape[1])
            ids_of, said, mask_of, said_mask = (
                F.pad(tensor, (0, width - tensor.shape[1])) for tensor in (ids_of, said, mask_of, said_mask)
            )
            ids_of, mask_of = torch.cat([ids_of, said]), torch.cat([mask_of, said_mask])
            owner = torch.cat([owner, rows[taught]])
        inputs = batch["prompt_ids"][owner], batch["prompt_mask"][owner], ids_of, mask_of
        flat = self._log_probs(self.model, *inputs)
        shape = ids.shape

        def grouped(values: Tensor) -> Tensor:
            return values.new_zeros(shape).index_put((b, g), values[: len(b), : shape[2]])

        logps = grouped(flat)
        if memory is None:
            reference = torch.zeros_like(logps) if self.uses_reference else None
            if self.uses_reference and len(b):
                network, context = self._reference_policy()
                with torch.no_grad(), context:
                    reference = grouped(self._log_probs(network, *(tensor[: len(b)] for tensor in inputs)))
            memory = logps.detach(), reference
        old, reference = memory
        rl = self._reinforcement(batch, task, rows, logps, old, reference, sums)
        total = (task.rl_weight[rows] * rl).where(task.learnt[rows].any(1), 0).sum()
        if len(taught):
            nll = -flat[len(b) :].sum(1) / mask_of[len(b) :].sum(1).clamp_min(1)
            total = total + (task.sft_weight[rows[taught]] * nll).sum()
            sums.add("nll", nll, len(nll))
        return _Loss(total / task.prompts, memory)

    def _reinforcement(
        self,
        batch: dict[str, Any],
        task: _Task,
        rows: Tensor,
        logps: Tensor,
        old: Tensor,
        reference: Tensor | None,
        sums: _Sums,
    ) -> Tensor:
        """What of each prompt's loss ``(b,)`` comes from its rollouts."""
        mask, valid, rewards = (batch[name][rows] for name in ("completion_mask", "rollout_mask", "rewards"))
        advantages = batch["advantages"][rows]
        share, keep = task.gal_weight[rows], mask & task.learnt[rows][:, :, None]
        loss = torch.zeros_like(share)
        if (share < 1).any():
            losses = clipped_token_losses(
                logps,
                old,
                advantages,
                keep,
                ref_logps=reference,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                kl_coef=self.kl_coef,
                ratio_level=self.ratio_level,
                dual_clip=self.dual_clip,
            )
            if self.loss_type in ("prompt", "grpo"):
                surrogate = (losses.sum(2) / keep.sum(2).clamp_min(1)).sum(1)
            else:
                surrogate = losses.sum((1, 2))
            surrogate = surrogate / (valid.sum(1).clamp_min(1) if task.units is None else task.units)
            loss = loss + (1 - share) * surrogate
        if share.any():
            assert reference is not None
            gal = group_alignment_loss(logps, reference, rewards, mask, valid, beta=self.beta_gal)
            loss = loss + share * gal
        with torch.no_grad():
            ratio = (logps - old).exp()
            up = advantages[:, :, None] > 0
            clipped = torch.where(up, ratio > 1 + self.clip_high, ratio < 1 - self.clip_low)
            sums.add("clip_fraction", (clipped & keep).to(loss.dtype), keep.sum())
            if reference is not None:
                sums.add("kl", kl_estimate(logps, reference).where(keep, 0), keep.sum())
            if reference is not None and share.any():
                gain = (logps - reference).where(keep, 0).sum(2)
                pairs = (rewards[:, :, None] > rewards[:, None, :]) & valid[:, :, None] & valid[:, None, :]
                pairs &= (task.rl_weight[rows] * share != 0)[:, None, None]
                margins = (gain[:, :, None] - gain[:, None, :]).where(pairs, 0)
                sums.add("gal_margin", margins, pairs.sum())
                sums.add("pair_accuracy", (margins > 0).to(loss.dtype), pairs.sum())
        return loss

    def _count_rollouts(self, batch: dict[str, Any], sums: _Sums) -> None:
        valid, mask, dtype = batch["rollout_mask"], batch["completion_mask"], batch["rewards"].dtype
        ended = ((batch["completion_ids"] == self.tokenizer.eos_token_id) & mask).any(2)
        sums.add("reward", batch["rewards"].where(valid, 0), valid.sum())
        sums.add("completion_length", mask.sum(2).to(dtype), valid.numel())
        sums.add("truncated", (~ended).to(dtype), ended.numel())
        sums.add("no_signal", (batch["advantages"] == 0).all(1).to(dtype), len(valid))

    def _weight(self, batch: dict[str, Any], name: str, default: float) -> Tensor:
        rewards = batch["rewards"]
        weight = batch.get(name)
        if weight is None:
            return torch.full_like(rewards[:, 0], default)
        if weight.shape != rewards.shape[:1]:
            raise MisconfigurationException(
                f"{name} must have shape (B,) = ({len(rewards)},), got {tuple(weight.shape)}"
            )
        return weight.to(rewards)

    def _check_keys(self, batch: Any, keys: tuple[str, ...]) -> None:
        missing = [key for key in keys if key not in batch] if isinstance(batch, dict) else keys
        if missing:
            has = sorted(batch) if isinstance(batch, dict) else f"the type {type(batch).__name__}"
            raise MisconfigurationException(
                f"GroupPolicy needs {missing} in its batches, which have {has}: use heliostat.PromptDataModule"
            )

    def _check_demonstrations(self, batch: dict[str, Any]) -> None:
        self._check_keys(batch, _DEMONSTRATION_KEYS)
        context = context_length(self.model)
        lengths = batch["prompt_mask"].sum(1) + batch["demonstration_mask"].flatten(1, -2).sum(-1).amax(-1)
        if context is not None and int(lengths.max()) > context:
            raise ValueError(
                f"a prompt with its demonstration, {int(lengths.max())} tokens, exceeds the model's context of "
                f"{context} tokens: lower max_demonstration_length or max_prompt_length of the data module"
            )

    def _scorer(self, batch: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
        """Present log-probabilities of completions ``(B, G, T)`` of the batch's prompts."""

        @torch.no_grad()
        def score(ids: Tensor, mask: Tensor) -> Tensor:
            each = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
            inputs = batch["prompt_ids"][each], batch["prompt_mask"][each], ids.flatten(0, 1), mask.flatten(0, 1)
            size = len(each) if self.micro_batch_size is None else self.micro_batch_size * ids.shape[1]
            with evaluating(self.model):
                parts = [
                    self._log_probs(self.model, *part)
                    for part in zip(*(tensor.split(size) for tensor in inputs), strict=True)
                ]
            return torch.cat(parts).view(ids.shape)

        return score

    def _reference_policy(self) -> tuple[nn.Module, AbstractContextManager]:
        if self.reference is not None:
            return self.reference.network, nullcontext()
        return self.model, _without_adapter(self.model)

    def _log_probs(self, network: Any, prompt_ids: Tensor, prompt_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities ``(N, T)`` of completions ``(N, T)`` at the temperature of the rollouts, 0 where masked."""
        tokens, keep = torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1)
        # Prompt and completion side by side, padding behind them: positions need no correction in any architecture.
        order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(keep.sum(1).max())]
        tokens, attention = tokens.gather(1, order), keep.gather(1, order).long()
        row, step = mask.nonzero(as_tuple=True)
        place = prompt_mask.sum(1)[row] + step - 1  # of the state that predicts the token
        arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": attention}
        if hasattr(getattr(network, "config", None), "use_cache"):
            arguments["use_cache"] = False
        if self._output_is_linear is None:
            self._output_is_linear = _output_is_linear(network, tokens[:1, :8])
        if self._output_is_linear:
            base = network.get_base_model() if is_peft(network) else network
            head = base.get_output_embeddings()
            states = base.base_model(**arguments).last_hidden_state[row, place]
            weight, bias = head.weight, head.bias
        else:
            states, weight, bias = network(**arguments).logits[row, place], None, None
        values = token_log_probs(states, ids[row, step], weight, bias, temperature=self.generator.temperature)
        return values.new_zeros(ids.shape).masked_scatter(mask, values)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradient."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if self.max_grad_norm is None else self.max_grad_norm)
        self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and schedule given to ``__init__``."""
        if self.inner_epochs > 1 and self.lr_scheduler in ("linear", "cosine") and self.trainer.max_steps == -1:
            raise MisconfigurationException(
                f"lr_scheduler={self.lr_scheduler!r} with inner_epochs={self.inner_epochs} needs the trainer's "
                "max_steps, which counts steps of the optimizer: max_epochs alone counts batches"
            )
        return configure_optimizers(self, self.optimizer, self.lr_scheduler, warmup_steps=self.warmup_steps)

    def _step_schedules(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == "step":
                config.scheduler.step()  # type: ignore[call-arg]

    def on_train_epoch_end(self) -> None:
        """Step schedules that follow a metric, which nobody does in manual optimisation."""
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                config.scheduler.step(self.trainer.callback_metrics[config.scheduler.monitor])

    # --- evaluation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Complete prompts, greedily and by sampling.

        Returns:
            The texts ``completion`` of the greedy ones, and their ``rewards`` ``(B,)``.
        """
        self._check_keys(batch, (*_PROMPT_KEYS, "index"))
        texts = self._texts(self._generate(batch, 1, greedy=True))
        rewards = self._judge(self.eval_reward, batch, texts)
        columns = [batch["index"], rewards[:, 0]]
        if self.eval_generations:
            with self._seeded("evaluation", batch_idx):  # the same at every time, and training goes on as without it
                drawn = self._generate(batch, self.eval_generations)
            columns.append(self._judge(self.eval_reward, batch, self._texts(drawn)).mean(1))
        self._rows.append(tuple(columns))
        return {"completion": [text for (text,) in texts], "rewards": rewards[:, 0]}

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation set."""
        self._log_metrics("val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Complete prompts, greedily and by sampling; see `validation_step`."""
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole test set."""
        self._log_metrics("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        """Greedy completions."""
        return [text for (text,) in self._texts(self._generate(batch, 1, greedy=True))]

    def _log_metrics(self, stage: str) -> None:
        rows, self._rows = self._rows, []
        greedy, *sampled = gather_once(*map(torch.cat, zip(*rows, strict=True)))
        unjudged = int((~greedy.isfinite()).sum())
        if unjudged:
            rank_zero_warn(f"the reward of {unjudged} of {len(greedy)} greedy completions is not finite: no success")
        success = (greedy > self.success_threshold).float().mean()
        self.log(f"{stage}/accuracy", success, prog_bar=True, sync_dist=True)
        if sampled:
            self.log(f"{stage}/reward", sampled[0].nanmean(), prog_bar=True, sync_dist=True)

    @contextmanager
    def _seeded(self, purpose: str, number: int) -> Iterator[None]:
        """Random numbers of a batch's own, whatever has been drawn before and is drawn after."""
        name = f"{self.seed}/{purpose}/{number}/{self.global_rank}"
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield


class _Task(NamedTuple):
    """What a batch has to teach."""

    micro_batches: list[Tensor]  # prompts of each, perhaps none
    learnt: Tensor  # (B, G): rollouts to learn from
    taught: Tensor  # (B,): prompts whose demonstration is imitated
    rl_weight: Tensor  # (B,)
    gal_weight: Tensor  # (B,)
    sft_weight: Tensor  # (B,)
    teacher: Tensor  # (B,)
    units: Tensor | None  # see units_per_prompt
    prompts: Tensor  # of all processes, divided by the number of processes


class _Loss(NamedTuple):
    total: Tensor
    memory: tuple[Tensor, Tensor | None]  # log-probabilities before the first step, and of the reference


class _Sums:
    """Sums and counts of what is logged."""

    names = (
        "loss",
        "reward",
        "completion_length",
        "truncated",
        "no_signal",
        "clip_fraction",
        "nll",
        "kl",
        "gal_margin",
        "pair_accuracy",
    )

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(len(self.names), 2, dtype=torch.float64, device=device)

    def add(self, name: str, values: Tensor, count: Tensor | int) -> None:
        """Add values and how many they are."""
        total = self.totals[self.names.index(name)]
        total[0] += values.detach().double().sum()
        total[1] += count

    def means(self) -> dict[str, Tensor]:
        """The means over all processes, of what there is."""
        group = default_group()
        if group is not None:
            dist.all_reduce(self.totals, group=group)
        pairs = zip(self.names, self.totals, strict=True)
        return {name: total / count for name, (total, count) in pairs if count > 0}


class _Reference(nn.Module):
    """A copy of the policy that is never trained, in evaluation mode."""

    started: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        # Whether it is the policy that training began with; saved, so that a resumed run keeps it.
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.train(False)

    def train(self, mode: bool = True) -> _Reference:
        return super().train(False)


def _load(model: str | nn.Module, lora: dict[str, Any] | None) -> Any:
    network: Any = model
    if isinstance(model, str):
        transformers = require("transformers", f"Loading the language model {model!r}")
        network = transformers.AutoModelForCausalLM.from_pretrained(model, use_safetensors=True).float()
    if lora is not None:
        peft = require("peft", "GroupPolicy(lora=...)")
        network = peft.get_peft_model(network, peft.LoraConfig(**lora))
    if is_peft(network) and network.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"model has adapters of the kind {type(network.active_peft_config).__name__}, which learns prompts; "
            "GroupPolicy takes those that change layers, such as LoRA"
        )
    return network


@contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """The model as it was before peft, in evaluation mode."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]  # switching sets it
    try:
        with model.disable_adapter(), evaluating(model):
            yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


@torch.no_grad()
def _output_is_linear(network: Any, tokens: Tensor) -> bool:
    """Whether logits are the last states times the output embedding, with no scaling, bound or norm on the way.

    Then log-probabilities are formed from states, without ever holding the logits. What a model does on the way is in
    no attribute that all of them have, so that it is looked at.
    """
    base = network.get_base_model() if is_peft(network) else network
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    body = getattr(base, "base_model", base)
    if type(head) is not nn.Linear or isinstance(head.weight, DTensor) or body is base:
        return False
    seen = []

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ramp = torch.linspace(-100, 100, output.shape[-1]).to(output).expand_as(output)
        seen.append((args[0], ramp))
        return ramp

    handle = head.register_forward_hook(replace)
    try:
        with evaluating(base):
            arguments = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            logits = base(**arguments).logits
            states = getattr(body(**arguments), "last_hidden_state", None)
    finally:
        handle.remove()
    if len(seen) != 1 or states is None:
        return False
    ((given, ramp),) = seen
    return (
        torch.equal(logits.to(ramp), ramp)
        and given.shape == states.shape
        and torch.allclose(given.float(), states.float(), rtol=1e-2, atol=1e-2 * float(states.abs().max()))
    )
