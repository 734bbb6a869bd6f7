"""Supervised fine-tuning of a causal language model, of all its weights or of LoRA adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from heliostat._extras import require
from heliostat.lit_models._hparams import save_plain_hyperparameters
from heliostat.lit_models._optimization import Schedule, configure_optimizers

Metrics = Callable[[Tensor, dict[str, Tensor]], Mapping[str, Tensor]]

IGNORED = -100  # the label of tokens that are not to be learned, as in transformers


def answer_metrics(logits: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is measured by default: ``loss`` and ``accuracy``, the mean of each row's own answer tokens.

    Args:
        logits: ``(B, T, V)``.
        batch: ``labels`` ``(B, T)``, -100 where there is nothing to learn.

    Returns:
        One value for each row that has an answer; the loss is float32 at least and has a gradient.
    """
    labels = batch["labels"][:, 1:]
    logits = logits[:, :-1]
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    learned = labels != IGNORED
    losses = F.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
    right = (logits.argmax(-1) == labels).to(losses.dtype)
    answered = learned.any(1)
    count = learned.sum(1)[answered]
    return {
        "loss": losses[answered].sum(1) / count,
        "accuracy": (right * learned)[answered].sum(1) / count,
    }


class FineTuning(LightningModule):
    """Train a causal language model on answers, with LoRA if asked for.

    Batches hold ``input_ids``, ``attention_mask`` and ``labels``, ``(B, T)`` each; labels are -100 on prompts and
    padding. The loss is the mean over rows of the mean over each row's answer tokens, so every row counts the same, and
    neither the number of processes nor gradient accumulation changes what is trained. Logged are ``train/loss`` and,
    for ``val`` and ``test``, the means of what ``metrics`` returns. On several processes Lightning repeats some rows of
    an evaluation set to give each as many; they count twice.

    Args:
        model: A causal language model of transformers: a local directory or hub id, loaded in float32, or a module that
            takes ``input_ids`` and ``attention_mask`` and whose output has ``logits``.
        lora: Settings of peft's ``LoraConfig`` (``r``, ``lora_alpha``, ``target_modules``, ...); the rest of the model
            is then frozen. ``None`` trains all weights.
        metrics: Called with the logits and the batch, returns named values, one for each row that they concern.
        optimizer: Makes the optimizer from the trainable parameters.
        lr_scheduler: ``"linear"`` (to zero), ``"cosine"``, ``"constant"``, or a callable.

    Raises:
        ModuleNotFoundError: ``model`` is a name and transformers is not installed, or ``lora`` is given without peft.
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        lora: dict[str, Any] | None = None,
        metrics: Metrics = answer_metrics,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0),
        lr_scheduler: Schedule | LRSchedulerCallable = "linear",
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        network: Any = model
        if isinstance(model, str):
            transformers = require("transformers", f"Loading the language model {model!r}")
            network = transformers.AutoModelForCausalLM.from_pretrained(model, use_safetensors=True).float()
        if lora is not None:
            peft = require("peft", "FineTuning(lora=...)")
            network = peft.get_peft_model(network, peft.LoraConfig(**lora))
        self.model = network
        self.model.train()  # transformers hands models over in eval mode
        self.metrics, self.optimizer, self.lr_scheduler = metrics, optimizer, lr_scheduler

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``(B, T, V)``."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of the answers."""
        rows = len(batch["input_ids"])
        logits = self(batch["input_ids"], batch.get("attention_mask"))
        loss = answer_metrics(logits, batch)["loss"].sum() / rows
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=rows)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure."""
        self._measure(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure."""
        self._measure(batch, "test")

    def _measure(self, batch: dict[str, Tensor], stage: str) -> None:
        logits = self(batch["input_ids"], batch.get("attention_mask"))
        for name, values in self.metrics(logits, batch).items():
            if len(values):
                self.log(
                    f"{stage}/{name}",
                    values.mean(),
                    on_step=False,
                    on_epoch=True,
                    sync_dist=True,
                    batch_size=len(values),
                )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and schedule given to ``__init__``."""
        return configure_optimizers(self, self.optimizer, self.lr_scheduler)
