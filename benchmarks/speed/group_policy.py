"""GroupPolicy: a training step of GRPO (rollouts, rewards, update) against TRL's GRPOTrainer."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import nn

from benchmarks.speed import Case, Factory, Run, Speed
from heliostat import GroupPolicy, PromptDataModule
from heliostat.datamodules.sources.arithmetic import ArithmeticPrompts, arithmetic_model, arithmetic_tokenizer
from heliostat.generation import TransformersGenerator
from heliostat.rewards import ExactMatch, Reward

GROUP = 8
VOCABULARY, PROMPT, COMPLETION = 4096, 32, 64  # words, and words of a prompt and of its completions


class Setting(NamedTuple):
    """What both trainers get."""

    prompts: Sequence[tuple[str, str | None, tuple[str, ...]]]  # of one batch, with their answers
    model: Callable[[], nn.Module]
    tokenizer: Callable[[], Any]
    reward: Reward
    max_new_tokens: int


def arithmetic() -> Setting:
    """The recipe's step."""
    prompts = list(ArithmeticPrompts(teachers=0))[::4][:32]
    return Setting(prompts, arithmetic_model, arithmetic_tokenizer, ExactMatch(), 3)


def words_tokenizer() -> Any:
    """A token for every word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def decoder() -> nn.Module:
    """A GPT-2 with random weights, of whose completions hardly any ends early."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=PROMPT + COMPLETION,
        n_embd=256,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval()


def ones(prompts: list[str], completions: list[str], answers: list[str | None]) -> list[float]:
    """The share of the digit 1: a reward that differs within groups and costs nothing."""
    return [text.count("1") / max(1, len(text)) for text in completions]


def small() -> Setting:
    """A decoder with long completions."""
    numbers = torch.randint(2, VOCABULARY, (8, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [(" ".join(f"w{i}" for i in row), None, ()) for row in numbers]
    return Setting(prompts, decoder, words_tokenizer, ones, COMPLETION)


def ours(make: Callable[[], Setting]) -> Factory:
    """A step as the Trainer makes it, after a fit of one step."""

    def prepare(device: torch.device) -> Run:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=UserWarning)
        setting = make()
        torch.manual_seed(0)
        policy = GroupPolicy(
            setting.model(),
            setting.reward,
            tokenizer=setting.tokenizer(),
            num_generations=GROUP,
            generator=TransformersGenerator(setting.max_new_tokens),
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0, fused=True),
        )
        trainer = Trainer(
            max_steps=1,
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=1,
            default_root_dir=tempfile.gettempdir(),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = PromptDataModule(setting.prompts, batch_size=len(setting.prompts))
        trainer.fit(policy, data)
        (batch,) = data.train_dataloader()
        policy.to(device)
        trainer.strategy.optimizers = [policy.optimizer(policy.parameters())]  # a fit leaves its state on the CPU
        trainer.training = True
        nothing: Any = lambda *_, **__: None  # noqa: E731 - outside of a fit nothing can be logged
        policy.log, policy.log_dict = nothing, nothing

        def run() -> tuple[torch.Tensor, ...]:
            moved = policy.transfer_batch_to_device(dict(batch), device, 0)
            policy.training_step(policy.on_after_batch_transfer(moved, 0), 0)
            return ()  # rollouts are random

        return run

    return prepare


def trl(make: Callable[[], Setting]) -> Factory:
    """A step of its training loop, after a training of one step."""

    def prepare(device: torch.device) -> Run:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        setting = make()
        torch.manual_seed(0)
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer, _ in setting.prompts]

        def reward(prompts: list[str], completions: list[str], answer: list[str | None], **_: Any) -> list[float]:
            return setting.reward(prompts, completions, answer)

        settings = GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=1,
            per_device_train_batch_size=GROUP * len(rows),
            gradient_accumulation_steps=1,
            num_generations=GROUP,
            max_completion_length=setting.max_new_tokens,
            loss_type="grpo",
            beta=0.0,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=device.type == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            setting.model(),
            reward,
            settings,
            Dataset.from_list(rows),
            processing_class=setting.tokenizer(),
        )
        trainer.train()
        trainer.model.train()
        inputs = [row for row in rows for _ in range(GROUP)]

        def run() -> tuple[torch.Tensor, ...]:
            trainer.training_step(trainer.model, [dict(row) for row in inputs], None)
            trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            return ()

        return run

    return prepare


def case(make: Callable[[], Setting], repeats: int | None = None) -> tuple[str, Case]:
    """Title and contenders of a setting."""
    setting = make()
    prompts, length = len(setting.prompts), setting.max_new_tokens
    title = f"{prompts} prompts x {GROUP} completions x {length} tokens = {prompts * GROUP * length:,}"
    return title, Case(ours={"GroupPolicy": ours(make)}, peers={"TRL's GRPOTrainer": trl(make)}, repeats=repeats)


SPEED = Speed(
    summary=(
        "A step of GRPO on one batch: sampling completions by generate of transformers with its cache, decoding and "
        "judging them, advantages, one forward and backward pass, clipping, AdamW; float32, no reference policy, no "
        "gradient checkpointing (a default of TRL, as is bfloat16), no loop and no logging. Tokens are those of the "
        "completions; per second it is the number in the title divided by the time. Of 3 tokens each: the arithmetic "
        "prompts and model of the recipe grpo, of 52,000 parameters, reward ExactMatch; ours leaves groups without "
        f"signal out of the update, TRL does not. Of {COMPLETION} each: prompts of {PROMPT} tokens, a GPT-2 of 4 "
        f"blocks, d = 256, {VOCABULARY:,} words, random weights, all groups with signal. TRL tokenizes prompts in each "
        "step, ours once at setup. Each draws its own samples, so that results differ; the learning rate of 1e-6 "
        "leaves the models as they are"
    ),
    cases=dict((case(arithmetic), case(small, repeats=5))),
)
