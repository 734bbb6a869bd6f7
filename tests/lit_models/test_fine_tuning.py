from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from heliostat.datamodules.loading import GlobalBatchSampler, ResumableLoader
from heliostat.lit_models.fine_tuning import FineTuning, answer_metrics
from tests.harness import ModuleContract, quiet_trainer, weights

transformers = pytest.importorskip("transformers")


def tiny_model(dropout: float = 0.1) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=24,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=12,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config)


class Answers(LightningDataModule):
    """48 rows of different lengths and answers, in batches of 16: three steps an epoch."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for _ in range(48):
            ids = torch.randint(2, 24, (10,), generator=generator)
            length, prompt = int(torch.randint(7, 11, (), generator=generator)), int(ids[0]) % 5 + 1
            mask = (torch.arange(10) < length).long()
            labels = torch.where((torch.arange(10) >= prompt) & mask.bool(), ids, -100)
            self.rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        rows: Any = self.rows
        sampler = GlobalBatchSampler(rows, 16, num_replicas=self.trainer.world_size, rank=self.trainer.global_rank)
        return ResumableLoader(rows, batch_size=sampler.local_batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        rows: Any = self.rows
        return DataLoader(rows, batch_size=20)

    test_dataloader = val_dataloader


class TestFineTuning(ModuleContract):
    def module(self, *, dropout: bool = True) -> LightningModule:
        model = tiny_model(0.1 if dropout else 0.0)
        if dropout:
            return FineTuning(model, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
        return FineTuning(model, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))

    def data(self, directory: Path) -> LightningDataModule:
        return Answers()


class TestLora(TestFineTuning):
    def module(self, *, dropout: bool = True) -> LightningModule:
        pytest.importorskip("peft")
        lora = {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}
        settings: dict[str, Any] = {"optimizer": lambda params: torch.optim.AdamW(params, lr=1e-2)}
        if not dropout:
            settings = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1)}
        return FineTuning(tiny_model(0.1 if dropout else 0.0), lora=lora, **settings)

    def test_trains_the_adapters_alone(self, tmp_path: Path) -> None:
        before = weights(self.module())
        after = weights(self.fit(tmp_path, max_steps=2).lightning_module)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed
        assert all("lora_" in name for name in changed)


def test_loss_is_the_mean_over_rows_of_their_answers() -> None:
    """By loops, and it is what training logs and descends."""
    batch = {name: torch.stack([row[name] for row in Answers().rows[:6]]) for name in Answers().rows[0]}
    module = FineTuning(tiny_model(dropout=0.0))
    logged: dict[str, Any] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign, assignment]
    loss = module.training_step(batch, 0)
    logits = module(batch["input_ids"], batch["attention_mask"])
    rows = []
    for scores, labels in zip(logits, batch["labels"], strict=True):
        chances = [scores[t - 1].log_softmax(0)[labels[t]] for t in range(1, 10) if labels[t] != -100]
        rows.append(-torch.stack(chances).mean())
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    torch.testing.assert_close(logged["train/loss"], loss)


def test_default_metrics() -> None:
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 5, -100, -100], [-100] * 4])
    logits = torch.zeros(3, 4, 8)
    logits[0, 1, 3] = 9.0  # says 3 where 3 is next
    logits[0, 2, 0] = 9.0  # and 0 where 4 is
    metrics = answer_metrics(logits, {"labels": labels})
    assert metrics["accuracy"].tolist() == [0.5, 0.0]  # the third row has no answer
    off = torch.log(torch.exp(torch.tensor(9.0)) + 7)
    expected = torch.stack([off - 4.5, torch.log(torch.tensor(8.0))])
    torch.testing.assert_close(metrics["loss"], expected)


def test_batch_without_answers_trains_nothing() -> None:
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.full((2, 4), -100)}
    module = FineTuning(tiny_model())
    module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    loss = module.training_step(batch, 0)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


def test_metrics_are_means_over_the_rows_that_they_concern(tmp_path: Path) -> None:
    def metrics(logits: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        first = batch["input_ids"][:, 0].float()
        return {"all": first, "large": first[first > 12], "none": first[:0]}

    module = FineTuning(tiny_model(), metrics=metrics)
    (logged,) = quiet_trainer(tmp_path).test(module, Answers(), verbose=False)
    first = torch.stack([row["input_ids"][0] for row in Answers().rows]).float()
    assert logged == pytest.approx({"test/all": first.mean().item(), "test/large": first[first > 12].mean().item()})


def test_loads_a_directory_in_float32(tmp_path: Path) -> None:
    tiny_model().bfloat16().save_pretrained(tmp_path)
    module = FineTuning(str(tmp_path))
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert module.model.training
