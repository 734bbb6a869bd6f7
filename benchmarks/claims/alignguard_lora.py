"""AlignGuard against plain LoRA, at equal loss of the task: what is left of an aligned model's refusals."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.claims import Claim, Metric
from heliostat import AlignGuard, StepSeed
from heliostat.datamodules.refusals import RefusalDataModule
from heliostat.datamodules.sources.refusals import aligned_model, refusal_metrics
from heliostat.lit_models.fine_tuning import FineTuning

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}
LOSS, MOST_STEPS = 0.05, 800


class Until(Callback):
    """Ends training when the running mean of the task's loss is low enough."""

    def __init__(self, loss: float) -> None:
        self.loss, self.mean = loss, float("inf")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Take the loss of one more batch into the mean."""
        loss = float(outputs["loss"])
        self.mean = loss if self.mean == float("inf") else 0.9 * self.mean + 0.1 * loss
        trainer.should_stop = self.mean < self.loss


def arm(weight_decay: float = 0.0, train: bool = True, **penalty: float) -> Any:
    """One way of fine-tuning; without penalty it is plain LoRA."""

    def run(seed: int, data: Path | None) -> dict[str, float]:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message=".*(does not have many workers|is_gradient_checkpointing).*")
        network = aligned_model(seed)
        seed_everything(seed, verbose=False)
        refusals = RefusalDataModule(seed=seed)
        module = FineTuning(
            network,
            lora=LORA,
            metrics=refusal_metrics,
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=weight_decay),
            lr_scheduler="constant",
        )
        callbacks: list[Callback] = [StepSeed(), Until(LOSS)]
        if penalty:
            callbacks.append(AlignGuard(refusals.alignment_dataloader(), rank_out=16, rank_in=16, **penalty))
        trainer = Trainer(
            max_steps=MOST_STEPS,
            accelerator="cpu",
            callbacks=callbacks,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        if train:
            trainer.fit(module, refusals)
        (metrics,) = trainer.test(module, refusals, verbose=False)
        return {
            "harmful_rate": 100 * metrics["test/harmful_rate"],
            "drift": metrics["test/drift"],
            "task_accuracy": 100 * metrics["test/task_accuracy"],
            "task_loss": metrics["test/loss"],
            "steps": float(trainer.global_step),
        }

    return run


CLAIM = Claim(
    statement="At the same loss of the task, AlignGuard leaves more of an aligned model's refusals than plain LoRA.",
    source="AlignGuard-LoRA, arXiv 2508.02079 (there: up to 50 % less alignment drift)",
    metrics={
        "harmful_rate": Metric("lower", ".1f"),
        "drift": Metric("lower", ".3f"),
        "task_accuracy": Metric("higher", ".1f"),
        "task_loss": Metric("lower", ".3f"),
        "steps": Metric("lower", ".0f"),
    },
    arms={
        "aligned model": arm(train=False),
        "plain LoRA": arm(),
        "plain LoRA, weight decay 0.1 of the factors": arm(weight_decay=0.1),
        "task term alone": arm(lambda_align=0.0, lambda_task=0.1),
        "AlignGuard, Fisher term alone": arm(lambda_align=0.25, lambda_task=0.0),
        "AlignGuard": arm(lambda_align=0.25, lambda_task=0.1),
    },
    baseline="plain LoRA",
    method="AlignGuard",
    budget=(
        "a model of 114,000 parameters in a made-up language, aligned anew for every seed; LoRA of rank 8 on all "
        "linear layers, AdamW 1e-3 without schedule, batches of 64, until the running mean (0.9) of the task's "
        f"loss is below {LOSS}, at most {MOST_STEPS} steps. AlignGuard estimates on 256 refusals, k = 16, with the "
        "recipe's weights. Harmful rate: share of 300 flagged test prompts whose answer does not begin as a refusal"
    ),
)
