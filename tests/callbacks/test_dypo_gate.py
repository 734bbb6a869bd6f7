from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from heliostat import DYPOGate
from tests.harness import ProcessPool, quiet_trainer

ACTIONS, PROMPTS = 5, 8
REWARDS = torch.tensor(  # Hard, Mid, Easy, Hard without teacher, Mid, Hard, nothing judged, Mid
    [[0, 0], [0, 1], [1, 1], [0, 0.5], [1, 0], [0, 0], [0, 0], [0.6, 0.4]], dtype=torch.float64
)
AVAILABLE = torch.tensor([[1, 1], [1, 1], [1, 0], [0, 0], [0, 1], [0, 1], [1, 1], [0, 0]], dtype=torch.bool)


class Bandit(LightningModule):
    """Somebody's module: a table of logits, rollouts of one token, and a loss that uses the gate's weights alone."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(PROMPTS, ACTIONS))
        self.fields, self.seen = fields, []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        rows = batch["index"]
        mask = torch.ones_like(REWARDS, dtype=torch.bool)
        mask[6] = False
        values = {"rewards": REWARDS[rows], "rollout_mask": mask[rows], "demonstration_available": AVAILABLE[rows]}
        values |= {name: value[rows] if isinstance(value, Tensor) else value for name, value in self.fields.items()}
        batch = {**batch, **{name: value for name, value in values.items() if value is not None}}
        return values.get("batch", batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.seen.append(batch)
        log_probs = self.table[batch["index"]].log_softmax(1)
        imitation = -log_probs.gather(1, batch["teacher_index"].clamp_min(0)[:, None])[:, 0]  # its action is its index
        loss = batch["sft_weight"] * imitation - batch["rl_weight"] * log_probs[:, 4]
        return loss.mean()

    def train_dataloader(self) -> DataLoader:
        return DataLoader([{"index": i} for i in range(PROMPTS)], batch_size=PROMPTS)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(directory: Path, module: Bandit, gate: DYPOGate, **settings: Any) -> Any:
    trainer = quiet_trainer(directory, **{"callbacks": [gate], "max_steps": 3, "max_epochs": 9, **settings})
    trainer.fit(module, ckpt_path=settings.get("ckpt_path"))
    return trainer


def test_routes_the_prompts_of_a_foreign_module(tmp_path: Path) -> None:
    module = Bandit()
    trainer = fit(tmp_path, module, DYPOGate(gamma=0.5))
    for batch in module.seen:
        assert batch["rl_weight"].tolist() == [0, 1, 0, 0, 1, 0, 0, 1]
        assert batch["sft_weight"].tolist() == [0.5, 0, 0, 0, 0, 0.5, 0, 0]
        teacher = batch["teacher_index"].tolist()
        assert teacher[0] in (0, 1)
        assert teacher[1:] == [-1, -1, -1, -1, 1, -1, -1]
    gained = module.table.detach().argmax(1).tolist()
    assert [gained[i] for i in (1, 4, 5, 7)] == [4, 4, 1, 4]
    assert not module.table[[2, 3, 6]].any()
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged == pytest.approx(
        {
            "dypo/frac_hard": 3 / 8,
            "dypo/frac_mid": 3 / 8,
            "dypo/frac_easy": 1 / 8,
            "dypo/offline_ratio": 0.5,
            "dypo/hard_without_teacher": 1,
            "dypo/reward": 5.5 / 14,
        }
    )


def test_settings_of_the_grades(tmp_path: Path) -> None:
    module = Bandit()
    fit(tmp_path, module, DYPOGate(success_threshold=0.45, hard_max_successes=1), max_steps=1)
    assert module.seen[0]["rl_weight"].tolist() == [0, 0, 0, 0, 0, 0, 0, 0]  # one success of two is Hard
    module = Bandit()
    fit(tmp_path, module, DYPOGate(easy_max_failures=1), max_steps=1)
    assert module.seen[0]["rl_weight"].tolist() == [0] * 8  # and one failure of two is Easy
    assert module.seen[0]["sft_weight"].tolist() == [1, 0, 0, 0, 0, 1, 0, 0]


def test_start_step_and_state(tmp_path: Path) -> None:
    """Before it everything is reinforced; a resumed run goes on where it was."""
    whole, first, second = Bandit(), Bandit(), Bandit()
    fit(tmp_path, whole, DYPOGate(start_step=2), max_steps=6)
    assert whole.seen[1]["rl_weight"].tolist() == [1, 1, 1, 1, 1, 1, 0, 1]
    assert not whole.seen[1]["sft_weight"].any()
    assert whole.seen[1]["gal_weight"].tolist() == [0] * 8
    assert "gal_weight" not in whole.seen[2]  # the module's own
    assert whole.seen[2]["rl_weight"].tolist() == [0, 1, 0, 0, 1, 0, 0, 1]
    trainer = fit(tmp_path, first, DYPOGate(start_step=2), max_steps=3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    gate = DYPOGate(start_step=2)
    resumed = quiet_trainer(tmp_path, callbacks=[gate], max_steps=6, max_epochs=9)
    resumed.fit(second, ckpt_path=tmp_path / "a.ckpt")
    assert gate.state_dict() == {"step": 6}
    assert torch.equal(second.table, whole.table)


def draws(seed: int, indices: list[int], steps: int = 40, available: Any = None) -> list[list[int]]:
    """Teachers of Hard prompts, step by step."""
    gate, module = DYPOGate(seed=seed), Bandit()
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    found = []
    for _ in range(steps):
        batch: dict[str, Any] = {"rewards": torch.zeros(len(indices), 2), "index": torch.tensor(indices)}
        batch["demonstration_available"] = torch.ones(len(indices), 3, dtype=torch.bool)
        gate.on_train_batch_start(None, module, batch, 0)  # type: ignore[arg-type]
        found.append(batch["teacher_index"].tolist())
    return found


def test_draws_follow_from_seed_prompt_and_step() -> None:
    """And from nothing else: neither the place in the batch, nor the other prompts, nor the global generator."""
    expected = draws(0, [3, 5])
    torch.manual_seed(99)
    assert [row[::-1] for row in draws(0, [5, 3])] == expected
    assert draws(0, [3]) == [[row[0]] for row in expected]
    assert draws(1, [3, 5]) != expected
    counts = torch.tensor(draws(0, list(range(30)))).flatten().bincount()
    assert (counts / counts.sum() - 1 / 3).abs().max() < 0.04


def test_two_processes_log_and_route_like_one(tmp_path: Path, two_processes: ProcessPool) -> None:
    expected = _route(0, tmp_path)
    actual = two_processes.run(_route, tmp_path, "ddp")
    for name, value in expected["logged"].items():
        assert [one["logged"][name] for one in actual] == pytest.approx([value] * 2)
    torch.testing.assert_close(actual[0]["table"], expected["table"])


def _route(rank: int, directory: Path, strategy: str = "auto") -> dict[str, Any]:
    class Half(Bandit):
        def train_dataloader(self) -> DataLoader:
            return DataLoader([{"index": i} for i in range(PROMPTS)], batch_size=PROMPTS // self.trainer.world_size)

    module = Half().double()
    devices = 1 if strategy == "auto" else 2
    trainer = fit(directory, module, DYPOGate(), strategy=strategy, devices=devices, precision="64-true")
    return {"logged": {k: float(v) for k, v in trainer.callback_metrics.items()}, "table": module.table.detach()}


def test_without_demonstrations_hard_prompts_teach_nothing(tmp_path: Path) -> None:
    module = Bandit(demonstration_available=None)
    with pytest.warns(UserWarning, match="no demonstration_available, so that Hard prompts teach nothing"):
        trainer = fit(tmp_path, module, DYPOGate(), max_steps=1)
    assert not module.seen[0]["sft_weight"].any()
    assert (module.seen[0]["teacher_index"] == -1).all()
    assert trainer.callback_metrics["dypo/hard_without_teacher"] == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": (torch.zeros(8), torch.zeros(8))}, r"must be a dict, but Bandit trains on tuple.*GroupPolicy does"),
        ({"rewards": None}, r"no rewards in the batch of Bandit, which has \['demonstration_available', 'index'"),
        ({"rewards": torch.zeros(8)}, r"rewards must be a floating-point tensor \(B, G\), got torch.float32 \(8,\)"),
        ({"rewards": [0.0, 1.0]}, r"floating-point tensor \(B, G\), got list"),
        ({"rewards": torch.full((8, 2), torch.nan)}, "cannot grade the batch of Bandit: rewards holds 14 NaN"),
        ({"rollout_mask": torch.ones(8, 3, dtype=torch.bool)}, "cannot grade the batch of Bandit: rollout_mask must"),
        ({"demonstration_available": torch.ones(8, 2)}, r"must be boolean \(B, M\) with B = 8 of rewards, got"),
        (
            {"batch": {"rewards": torch.zeros(4, 2), "index": torch.zeros(8)}},
            r"shape \(B,\) = \(4,\) of rewards, got \(8",
        ),
    ],
)
def test_refusals(tmp_path: Path, fields: dict, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, Bandit(**fields), DYPOGate())


@pytest.mark.parametrize("settings", [{"gamma": 0.0}, {"hard_max_successes": -1}, {"start_step": -1}])
def test_wrong_settings(settings: dict) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} must be >"):
        DYPOGate(**settings)
