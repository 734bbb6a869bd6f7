"""Alignment recovery against no, random and full restoration: refusals won back, task kept."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from benchmarks.claims import Claim, Metric
from heliostat import StepSeed
from heliostat.components import eligible_parameters, mean_representation, recover_alignment
from heliostat.datamodules.refusals import RefusalDataModule
from heliostat.datamodules.sources.refusals import aligned_model, refusal_metrics
from heliostat.lit_models.fine_tuning import FineTuning

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}
DIM, STEPS, LR = 64, 400, 2e-3
MOST_RESTORED = 20  # steps


@cache
def fine_tuned(seed: int) -> Any:
    """The aligned model after LoRA on the task, merged; trained once for all arms."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|is_gradient_checkpointing).*")
    network = aligned_model(seed, DIM)
    seed_everything(seed, verbose=False)
    module = FineTuning(
        network,
        lora=LORA,
        optimizer=lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.0),
        lr_scheduler="constant",
    )
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=[StepSeed()],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, RefusalDataModule(seed=seed))
    merged: Any = module.model
    return merged.merge_and_unload().eval()


def measure(model: Any, split: str) -> dict[str, float]:
    """Harmful rate and task accuracy, in per cent."""
    data = RefusalDataModule()
    (batch,) = _whole(data.val_dataloader() if split == "validation" else data.test_dataloader())
    with torch.no_grad():
        metrics = refusal_metrics(model(batch["input_ids"]).logits, batch)
    return {name: 100 * metrics[name].mean().item() for name in ("harmful_rate", "task_accuracy")}


def _whole(loader: Any) -> list[dict[str, Tensor]]:
    batches = list(loader)
    return [{name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}]


def represent(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the last block returns at the prompt's last token."""
    outputs: list[Tensor] = []
    handle = model.model.decoder.layers[-1].register_forward_hook(
        lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    model(batch["input_ids"])
    handle.remove()
    return outputs[0][:, -1]


@cache
def recovered(seed: int, rollback: bool | str) -> tuple[Any, int]:
    """The model after recovery, and how many entries were restored."""
    aligned, model = aligned_model(seed, DIM), copy.deepcopy(fine_tuned(seed))
    data = RefusalDataModule(seed=seed)
    harmful, task = list(data.harmful_dataloader()), list(data.task_dataloader())
    blocks = model.model.decoder.layers
    params, num_hidden = eligible_parameters(model, list(blocks), len(blocks))
    result = recover_alignment(
        params,
        dict(aligned.named_parameters()),
        partial(represent, model),
        harmful,
        task,
        lambda: measure(model, "validation")["task_accuracy"],
        harmful_direction=mean_representation(partial(represent, aligned), harmful),
        num_hidden=num_hidden,
        steps=MOST_RESTORED,
        save_every=1,
        rollback=rollback,  # type: ignore[arg-type]
        harmful_rate=lambda: measure(model, "validation")["harmful_rate"],
    )
    return model, sum(result.log.counts().values())


def nothing(seed: int) -> tuple[Any, int]:
    """The fine-tuned model as it is."""
    return fine_tuned(seed), 0


def at_random(seed: int) -> tuple[Any, int]:
    """As many entries as the recovery restores, drawn from all that differ."""
    model, aligned = copy.deepcopy(fine_tuned(seed)), dict(aligned_model(seed, DIM).named_parameters())
    params, _ = eligible_parameters(model, list(model.model.decoder.layers), len(model.model.decoder.layers))
    flat = torch.cat([(p != aligned[name]).flatten() for name, p in params.items()])
    places = flat.nonzero().squeeze(1)
    count = recovered(seed, "auto")[1]
    chosen = torch.zeros_like(flat)
    chosen[places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:count]]] = True
    with torch.no_grad():
        for (name, p), mask in zip(params.items(), chosen.split([p.numel() for p in params.values()]), strict=True):
            p.copy_(torch.where(mask.view_as(p), aligned[name], p))
    return model, count


def in_full(seed: int) -> tuple[Any, int]:
    """The aligned model."""
    return aligned_model(seed, DIM), -1


def arm(build: Callable[[int], tuple[Any, int]]) -> Any:
    """Measure a model on test prompts."""

    def run(seed: int, data: Path | None) -> dict[str, float]:
        model, count = build(seed)
        total = sum(p.numel() for p in fine_tuned(seed).model.decoder.layers.parameters())
        return {**measure(model, "test"), "restored": 100.0 if count < 0 else 100 * count / total}

    return run


CLAIM = Claim(
    statement="Restoring few weights by their gradient brings refusals back that random restoration does not.",
    source="Alignment recovery, IEEE S&P 2025, arXiv 2504.09757 (there: harmful rate 33.25 % -> 1.74 %)",
    metrics={
        "harmful_rate": Metric("lower", ".1f"),
        "task_accuracy": Metric("higher", ".1f"),
        "restored": Metric("lower", ".2f"),
    },
    arms={
        "no recovery": arm(nothing),
        "random restoration of as many": arm(at_random),
        "recovery": arm(partial(recovered, rollback="auto")),
        "recovery, always with rollback": arm(partial(recovered, rollback=True)),
        "recovery, never with rollback": arm(partial(recovered, rollback=False)),
        "full restore": arm(in_full),
    },
    baseline="random restoration of as many",
    method="recovery",
    budget=(
        "a model of 200,000 parameters in a made-up language, aligned anew for every seed, then fine-tuned on the task "
        f"by LoRA of rank 8 for {STEPS} steps of 64, AdamW {LR:g}, once for all arms. Recovery: the method's defaults, "
        f"but all blocks and a candidate after each of {MOST_RESTORED} steps; prompts with symbols of training, task "
        "score on validation prompts (at most 5 % lost, relatively), the table on 300 + 300 test prompts. Restored: "
        "share of the blocks' parameters in per cent"
    ),
)
