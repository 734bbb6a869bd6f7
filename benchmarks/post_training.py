"""What the claims on post-training share: a tiny model, 300 updates of it, and how well it then knows its prompts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from benchmarks.claims import Metric
from heliostat import GroupPolicy, PromptDataModule
from heliostat.advantages import AdvantageEstimator
from heliostat.datamodules.sources.arithmetic import ArithmeticPrompts, arithmetic_tokenizer
from heliostat.generation import TransformersGenerator
from heliostat.lit_models.fine_tuning import FineTuning
from heliostat.rewards import ExactMatch, Reward

UPDATES, BATCH, GROUP = 300, 32, 8
TOKENS = 3  # two digits and EOS

METRICS = {"accuracy": Metric("higher", ".1f"), "probability": Metric("higher", ".1f")}
SHARED = (
    "the 147 prompts x op y = with x, y in 0..6 and op in +, -, *, answered by two digits, for training and measuring "
    "alike: what is measured is learning, not generalisation. A GPT-2 of 1 block, d = 64, trained anew for every seed "
    "and once for all arms, 300 steps of 128 on answers that are right with probability {:g}, {:g} and {:g}. Every "
    f"arm: {UPDATES} updates, AdamW without weight decay, learning rate falling linearly to a tenth, gradient norm at "
    "most 1, samples at temperature 1, one update a batch, no divergence from a reference. accuracy: of greedy "
    "answers, in per cent; probability: of the right answer (its digits and EOS), mean over prompts, in per cent, both "
    "computed from the model's probabilities without sampling"
)


@torch.no_grad()
def measure(model: Any) -> dict[str, Tensor]:
    """Of each prompt: whether the greedy answer is right, and how likely the right one is, in per cent."""
    data = PromptDataModule("arithmetic", supervised="answer", tokenizer=arithmetic_tokenizer(), eval_batch_size=147)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    learned = batch["labels"][:, 1:] >= 0
    labels = batch["labels"][:, 1:].clamp_min(0)
    training = model.training
    logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    model.train(training)
    logps = logits.log_softmax(-1).gather(2, labels[:, :, None])[:, :, 0]
    # Greedy decoding gives the right answer if, after each right beginning, the right token is the likeliest.
    right = ((logits.argmax(-1) == labels) | ~learned).all(1)
    return {"accuracy": 100 * right.double(), "probability": 100 * logps.where(learned, 0).sum(1).exp()}


def means(model: nn.Module) -> dict[str, float]:
    """Over all prompts."""
    return {name: values.mean().item() for name, values in measure(model).items()}


class Probability(Callback):
    """The mean probability of the right answer, in per cent, after some of the updates."""

    def __init__(self, update: int) -> None:
        self.update, self.value = update, float("nan")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure, if it is time."""
        if trainer.global_step == self.update:
            self.value = means(pl_module.model)["probability"]  # type: ignore[arg-type]


def imitate(
    model: nn.Module,
    seed: int,
    prompts: ArithmeticPrompts,
    *,
    lr: float,
    part: slice = slice(0, UPDATES),
    of: int = UPDATES,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Fine-tune on demonstrations, of each prompt one of its teachers' at random, for ``part`` ``of`` all updates."""
    data = PromptDataModule(
        prompts, supervised="demonstration", tokenizer=arithmetic_tokenizer(), batch_size=BATCH, seed=seed
    )
    module = FineTuning(model, **_optimization(lr, part, of))
    _fit(module, data, part.stop - part.start, seed, gradient_clip_val=1.0, callbacks=list(callbacks))


def reinforce(
    model: nn.Module,
    seed: int,
    prompts: ArithmeticPrompts | None = None,
    *,
    lr: float,
    part: slice = slice(0, UPDATES),
    of: int = UPDATES,
    batch_size: int = BATCH,
    num_generations: int = GROUP,
    reward: Reward | None = None,
    advantages: AdvantageEstimator | None = None,
    prioritized: bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> None:
    """Learn from rewards, by GRPO if nothing else is said, for ``part`` ``of`` all updates."""
    policy = GroupPolicy(
        model,
        reward or ExactMatch(),
        tokenizer=arithmetic_tokenizer(),
        num_generations=num_generations,
        generator=TransformersGenerator(TOKENS),
        advantages=advantages,
        seed=seed,
        **_optimization(lr, part, of),
        **settings,
    )
    data = PromptDataModule(
        prompts or ArithmeticPrompts(teachers=0), prioritized=prioritized, batch_size=batch_size, seed=seed
    )
    _fit(policy, data, part.stop - part.start, seed, callbacks=list(callbacks))


def _optimization(lr: float, part: slice, of: int) -> dict[str, Any]:
    """Stages of one training share one fall of the learning rate."""

    def factor(update: int) -> float:
        return 1 - 0.9 * (part.start + update) / of

    schedule = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=factor)
    return {"optimizer": partial(torch.optim.AdamW, lr=lr, weight_decay=0.0, fused=True), "lr_scheduler": schedule}


def _fit(module: LightningModule, data: PromptDataModule, updates: int, seed: int, **settings: Any) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|in eval mode|treespec, LeafSpec)")
    warnings.filterwarnings("ignore", message=".*(Total length of `list`|on_after_batch_transfer)")
    seed_everything(seed, verbose=False)
    trainer = Trainer(
        max_steps=updates,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, data)
