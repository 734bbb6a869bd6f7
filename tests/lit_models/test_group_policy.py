from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from heliostat import DYPOGate, GroupPolicy, PromptDataModule
from heliostat.advantages import AdvantageEstimator, GroupRelative, MedianCentered, ReferenceInGroup, ValueTracker
from heliostat.components import (
    clipped_surrogate_loss,
    dypo_loss,
    grao_advantages,
    group_alignment_loss,
    group_direct_alignment_loss,
    kl_estimate,
)
from heliostat.datamodules.sources.arithmetic import EOS, PAD, arithmetic_tokenizer
from heliostat.generation import Generation, TransformersGenerator
from heliostat.lit_models.group_policy import _output_is_linear
from heliostat.rewards import CharacterMatch
from tests.harness import ModuleContract, ProcessPool, quiet_trainer, weights

# Prompts of different lengths, of two teachers, of which some are missing.
ROWS: list[tuple[str, str | None, tuple[str | None, ...]]] = [
    ("1+2=", "03", ("03", "04")),
    ("10+2=", "12", (None, "12")),
    ("3*4=", "12", (None, None)),
    ("0=", "00", ("00", None)),
    ("5-5=", "00", ("0", "00")),
    ("2*2=", "04", ("04", "4")),
    ("11-1=", "10", ("10", "1")),
    ("6=", "06", ("06", "06")),
]
FLOAT64 = {"precision": "64-true"}


def tiny_model(dropout: float = 0.0, **settings: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    drop = {f"{part}_pdrop": dropout for part in ("resid", "embd", "attn")}
    settings = {"n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3, **settings}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=17, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, **drop, **settings)
    )


class FixedGenerator:
    """Completions of a prompt that depend on the prompt alone: digits, the right answer among them now and then."""

    def __init__(self, temperature: float = 1.0, longest: int = 4) -> None:
        self.temperature, self.max_new_tokens = temperature, longest

    def generate(
        self,
        model: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        num_generations: int,
        *,
        eos_token_id: int,
        pad_token_id: int,
        greedy: bool = False,
    ) -> Generation:
        ids = torch.full((len(prompt_ids), num_generations, self.max_new_tokens), pad_token_id)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, kept) in enumerate(zip(prompt_ids, prompt_mask, strict=True)):
            generator = torch.Generator().manual_seed(int((prompt[kept] * torch.arange(1, kept.sum() + 1)).sum()))
            for number in range(num_generations):
                length = int(torch.randint(0, self.max_new_tokens + 1, (), generator=generator))
                tokens = torch.randint(3, 6, (length,), generator=generator)  # "0", "1" and "2"
                if length < self.max_new_tokens and length:
                    tokens = torch.cat([tokens, torch.tensor([eos_token_id])])
                ids[row, number, : len(tokens)], mask[row, number, : len(tokens)] = tokens, True
        return Generation(ids, mask)


def graded(prompts: list[str], completions: list[str], answers: list[str | None]) -> list[float]:
    """Rewards 0, 0.5 and 1 that are spread over all groups: the first digits of the completion."""
    return [min(2, "0123456789".find(text[:1])) / 2 if text[:1].isdigit() else 0.0 for text in completions]


def prompts(rows: Any = ROWS, **settings: Any) -> PromptDataModule:
    settings = {"tokenizer": arithmetic_tokenizer(), "batch_size": len(rows), **settings}
    return PromptDataModule(rows, **settings)


def policy(model: nn.Module | None = None, reward: Any = graded, **settings: Any) -> GroupPolicy:
    settings = {
        "generator": FixedGenerator(),
        "num_generations": 4,
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.5),
        "max_grad_norm": None,
        **settings,
    }
    return GroupPolicy(tiny_model() if model is None else model, reward, **settings)


class Batches(Callback):
    """Keeps the batches as callbacks see them, and may write into them."""

    def __init__(self, **values: Any) -> None:
        self.values, self.seen = values, []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        batch.update({name: value.clone() for name, value in self.values.items()})
        self.seen.append(dict(batch))


def fit(
    directory: Path,
    module: LightningModule,
    data: Any = None,
    callbacks: Any = (),
    ckpt_path: Path | None = None,
    **settings: Any,
) -> dict[str, float]:
    trainer = quiet_trainer(
        directory, **{"max_steps": 1, "max_epochs": 100, "callbacks": [*callbacks], **FLOAT64, **settings}
    )
    trainer.fit(module, prompts() if data is None else data, ckpt_path=ckpt_path)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def plain_log_probs(model: Any, batch: dict[str, Any], ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities ``(B, G, T)`` sequence by sequence, without padding, from the logits."""
    rows = []
    for row, number in [(b, g) for b in range(ids.shape[0]) for g in range(ids.shape[1])]:
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row]]
        tokens = ids[row, number][mask[row, number]]
        logits = model(input_ids=torch.cat([prompt, tokens])[None]).logits[0] / temperature
        found = logits[len(prompt) - 1 : -1].log_softmax(1).gather(1, tokens[:, None])[:, 0]
        rows.append(nn.functional.pad(found, (0, ids.shape[2] - len(tokens))))
    return torch.stack(rows).view(ids.shape)


def step_by_hand(model: nn.Module, loss: Tensor, lr: float = 0.5) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter -= lr * gradient


def check_weights(module: GroupPolicy, model: nn.Module) -> None:
    expected = dict(model.named_parameters())
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-9, atol=1e-12, msg=name)


# --- contracts -------------------------------------------------------------------------------------------------------


class Contract(ModuleContract):
    """Every contract; with the rollouts fixed where two processes are to equal one, and else drawn."""

    settings: dict[str, Any] = {}  # noqa: RUF012
    rows = [row for row in ROWS[:6] for _ in range(2)]  # noqa: RUF012 - three batches of four

    def estimator(self) -> AdvantageEstimator:
        return GroupRelative()

    def module(self, *, dropout: bool = True) -> LightningModule:
        settings = dict(self.settings)
        if dropout:
            settings["generator"] = TransformersGenerator(3)
            settings["optimizer"] = lambda params: torch.optim.AdamW(params, lr=1e-2)
        return policy(tiny_model(0.1 if dropout else 0.0), advantages=self.estimator(), max_grad_norm=1.0, **settings)

    def data(self, directory: Path) -> LightningDataModule:
        return prompts(self.rows, batch_size=4)

    def test_accumulates_gradients(self, tmp_path: Path) -> None:
        """By micro-batches, not by the trainer."""
        with pytest.raises(MisconfigurationException, match="accumulation is not supported for manual optimization"):
            self.fit(tmp_path, max_steps=2, accumulate_grad_batches=2)


class TestGRPO(Contract):
    settings = {"lr_scheduler": "linear", "loss_type": "dapo", "micro_batch_size": 3}  # noqa: RUF012


class TestDYPO(Contract):
    """With two steps a batch, a reference, and processes that have different numbers of prompts to learn from."""

    settings = {"gal_weight": 0.5, "kl_coef": 0.1, "micro_batch_size": 1}  # noqa: RUF012

    def callbacks(self) -> list[Any]:
        return [*super().callbacks(), DYPOGate()]


class TestSPO(Contract):
    """With trackers, stored responses and prioritised sampling."""

    settings = {"num_generations": 1, "dual_clip": 10.0}  # noqa: RUF012
    rows = ROWS + ROWS[:4]

    def estimator(self) -> AdvantageEstimator:
        return ValueTracker(offline_generations=2)

    def data(self, directory: Path) -> LightningDataModule:
        return prompts(self.rows, batch_size=4, prioritized=True)


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "grpo", "temperature": 0.7},
        {"loss_type": "bnpo", "ratio_level": "sequence", "micro_batch_size": 1},
        {"loss_type": "dr_grpo", "inner_epochs": 3, "clip_low": 0.05, "clip_high": 0.1},
        {"loss_type": "prompt", "kl_coef": 0.3, "inner_epochs": 2, "micro_batch_size": 3},
        {"loss_type": "dapo", "gal_weight": 0.4, "kl_coef": 0.2, "inner_epochs": 2, "micro_batch_size": 3},
        {"gal_weight": 1.0, "beta_gal": 0.7, "inner_epochs": 2},
        {"gal_weight": 0.4, "shares": [0.0, 1.0, 0.5, 0.0, 0.2, 1.0, 0.5, 0.0], "micro_batch_size": 3},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_steps_are_those_of_the_equations(tmp_path: Path, settings: dict) -> None:
    """Of the components' losses of log-probabilities that are computed in the plainest way."""
    settings = dict(settings)
    temperature = settings.pop("temperature", 1.0)
    share = torch.tensor(settings.pop("shares", [settings.get("gal_weight", 0.0)] * 8), dtype=torch.float64)
    written = {"rl_weight": torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0, 2.0, 1.0, 1.0], dtype=torch.float64)}
    recorder = Batches(**written, **({} if (share == share[0]).all() else {"gal_weight": share}))
    module = policy(generator=FixedGenerator(temperature), **settings)
    epochs = settings.get("inner_epochs", 1)
    logged = fit(tmp_path, module, callbacks=[recorder], max_steps=epochs)
    assert logged["train/unjudged"] == 0
    (batch,) = recorder.seen
    model = tiny_model().double()

    def now() -> Tensor:
        return plain_log_probs(model, batch, batch["completion_ids"], batch["completion_mask"], temperature)

    old = now().detach()
    mask, rewards = batch["completion_mask"], batch["rewards"]
    assert (mask.sum(2) == 0).any()  # an empty completion is among them
    losses = []
    for _ in range(epochs):
        logps = now()
        pairwise = group_alignment_loss(logps, old, rewards, mask, beta=settings.get("beta_gal", 1.0))
        surrogate = clipped_surrogate_loss(
            logps,
            old,
            batch["advantages"],
            mask,
            ref_logps=old,
            clip_low=settings.get("clip_low", 0.2),
            clip_high=settings.get("clip_high", 0.2),
            kl_coef=settings.get("kl_coef", 0.0),
            ratio_level=settings.get("ratio_level", "token"),
            aggregation=settings.get("loss_type", "grpo"),
            max_completion_length=4,
        )
        loss = (batch["rl_weight"] * (share * pairwise + (1 - share) * surrogate)).mean()
        step_by_hand(model, loss)
        losses.append(loss.item())
    check_weights(module, model)
    assert logged["train/loss"] == pytest.approx(sum(losses) / epochs)
    if settings.get("clip_low") == 0.05:
        assert logged["train/clip_fraction"] > 0
    if settings.get("kl_coef"):
        assert logged["train/kl"] > 0


def test_dual_clip_bounds_the_push_on_bad_rollouts(tmp_path: Path) -> None:
    """Uphill, so that bad rollouts become likelier: beyond the bound their loss, and gradient, stay as they are."""
    recorder, bound = Batches(), 1.1
    module = policy(inner_epochs=3, dual_clip=bound, loss_type="prompt")
    module.optimizer = lambda params: torch.optim.SGD(params, lr=0.5, maximize=True)
    fit(tmp_path, module, callbacks=[recorder], max_steps=3)
    (batch,) = recorder.seen
    model, mask, a = tiny_model().double(), batch["completion_mask"], batch["advantages"][:, :, None]
    old = plain_log_probs(model, batch, batch["completion_ids"], mask).detach()
    for _ in range(3):
        ratio = (plain_log_probs(model, batch, batch["completion_ids"], mask) - old).exp()
        losses = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        losses = torch.where(a < 0, torch.minimum(losses, -bound * a), losses)
        step_by_hand(model, ((losses * mask).sum(2) / mask.sum(2).clamp_min(1)).mean(), lr=-0.5)
    assert (ratio > bound)[(a < 0) & mask].any()
    check_weights(module, model)


def test_weights_of_prompts_choose_imitation_or_reinforcement(tmp_path: Path) -> None:
    """The plan of a gate: who is taught, by whom, and who is reinforced."""
    plan = {
        "rl_weight": torch.tensor([0, 1, 1, 0, 0, 1, 0, 0.0], dtype=torch.float64),
        "sft_weight": torch.tensor([1, 0, 0, 0.5, 0, 0, -0.2, 0.0], dtype=torch.float64),
        "teacher_index": torch.tensor([1, -1, -1, 0, -1, -1, 1, -1]),
    }
    index = [0, 1, 2, 3, 4, 5, 6, 7]
    recorder = Batches()

    class ByIndex(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
            batch.update({name: value[batch["index"]] for name, value in plan.items()})

    module = policy(micro_batch_size=2)
    logged = fit(tmp_path, module, callbacks=[ByIndex(), recorder])
    (batch,) = recorder.seen
    assert sorted(batch["index"].tolist()) == index
    model = tiny_model().double()
    logps = plain_log_probs(model, batch, batch["completion_ids"], batch["completion_mask"])
    rl = clipped_surrogate_loss(logps, logps, batch["advantages"], batch["completion_mask"], aggregation="grpo")
    teachers = plain_log_probs(model, batch, batch["demonstration_ids"], batch["demonstration_mask"])
    nll = -teachers.sum(2) / batch["demonstration_mask"].sum(2).clamp_min(1)
    nll = nll.gather(1, batch["teacher_index"].clamp_min(0)[:, None])[:, 0]
    step_by_hand(model, (batch["rl_weight"] * rl + batch["sft_weight"] * nll).mean())
    check_weights(module, model)
    assert logged["train/nll"] == pytest.approx(nll[batch["sft_weight"] != 0].mean().item())


def test_dypo_is_its_loss(tmp_path: Path) -> None:
    """With the gate: one step equals that of the whole objective."""
    recorder = Batches()
    settings = {"beta_gal": 0.7, "kl_coef": 0.2}
    module = policy(gal_weight=0.4, loss_type="prompt", inner_epochs=2, micro_batch_size=3, **settings)
    logged = fit(tmp_path, module, callbacks=[DYPOGate(gamma=0.8), recorder], max_steps=2)
    (batch,) = recorder.seen
    model = tiny_model().double()
    old = plain_log_probs(model, batch, batch["completion_ids"], batch["completion_mask"]).detach()
    for _ in range(2):
        found = dypo_loss(
            plain_log_probs(model, batch, batch["completion_ids"], batch["completion_mask"]),
            old,
            old,
            batch["rewards"],
            batch["completion_mask"],
            teacher_logps=plain_log_probs(model, batch, batch["demonstration_ids"], batch["demonstration_mask"]),
            teacher_token_mask=batch["demonstration_mask"],
            teacher_available=batch["demonstration_available"],
            teacher_index=batch["teacher_index"],
            alpha=0.6,
            gamma=0.8,
            **settings,
        )
        step_by_hand(model, found.loss)
    check_weights(module, model)
    assert set(found.tier.tolist()) == {0, 1}
    for name in ("frac_hard", "frac_mid", "offline_ratio", "reward", "hard_without_teacher"):
        assert logged[f"dypo/{name}"] == pytest.approx(found.stats[name].item())
    for name in ("gal_margin", "pair_accuracy"):  # means of both steps, of which in the first nothing has moved
        assert logged[f"train/{name}"] == pytest.approx(found.stats[name].item() / 2)


def test_before_the_gate_acts_it_is_grpo(tmp_path: Path) -> None:
    """Bit by bit, though GroupPolicy has the pairwise loss and the prompts have teachers; and not a step longer."""
    settings = {"micro_batch_size": 3, "max_grad_norm": 0.1}
    plain, gated = policy(**settings), policy(gal_weight=0.5, **settings)
    fit(tmp_path, plain, max_steps=2)
    logged = fit(tmp_path, gated, callbacks=[DYPOGate(start_step=2)], max_steps=2)
    expected, actual = weights(plain.model), weights(gated.model)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert "train/gal_margin" not in logged
    assert "train/nll" not in logged
    longer = policy(gal_weight=0.5, **settings)
    logged = fit(tmp_path, longer, callbacks=[DYPOGate(start_step=1)], max_steps=2)
    assert "train/gal_margin" in logged
    assert not torch.equal(weights(longer.model)["lm_head.weight"], expected["lm_head.weight"])


def test_the_average_is_the_estimators_unless_given() -> None:
    for estimator, own in (
        (None, "grpo"),
        (MedianCentered(), "grpo"),
        (ReferenceInGroup(), "prompt"),
        (ValueTracker(), "dapo"),
    ):
        model = nn.Identity()
        assert policy(model, advantages=estimator).loss_type == own
        assert policy(model, advantages=estimator, loss_type="bnpo").loss_type == "bnpo"


@pytest.mark.parametrize("reference_in_group", [True, False])
def test_grao_is_its_loss(tmp_path: Path, reference_in_group: bool) -> None:
    """Closed-form weights against the loss function: equal gradients, for prompts with and without demonstration."""
    recorder = Batches()
    estimator = ReferenceInGroup(reference_in_group=reference_in_group, beta=0.3, lam=0.8)
    module = policy(reward=CharacterMatch(), advantages=estimator)
    logged = fit(tmp_path, module, callbacks=[recorder])
    (batch,) = recorder.seen
    model = tiny_model().double()
    logps = plain_log_probs(model, batch, batch["completion_ids"], batch["completion_mask"])
    teachers = plain_log_probs(model, batch, batch["demonstration_ids"], batch["demonstration_mask"])
    available = batch["demonstration_available"]
    first, rows = available.to(torch.uint8).argmax(1), torch.arange(len(available))
    target_reward = torch.tensor(
        [
            CharacterMatch()([""], [ROWS[i][2][j] or ""], [ROWS[i][1]])[0]
            for i, j in zip(batch["index"].tolist(), first.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    a, a_y = grao_advantages(
        batch["rewards"], target_reward, None, available.any(1), reference_in_group=reference_in_group
    )
    loss = group_direct_alignment_loss(
        logps,
        batch["completion_mask"],
        a,
        teachers[rows, first],
        batch["demonstration_mask"][rows, first],
        a_y,
        beta=0.3,
        lam=0.8,
        target_available=available.any(1),
    )
    step_by_hand(model, loss)
    check_weights(module, model)
    assert logged["train/target_reward"] == pytest.approx(target_reward[available.any(1)].mean().item())


def test_median_rollout_is_drawn_and_left_out(tmp_path: Path) -> None:
    recorder = Batches()
    module = policy(reward=CharacterMatch(), advantages=MedianCentered(scale="std"), num_generations=2)
    fit(tmp_path, module, callbacks=[recorder])
    (batch,) = recorder.seen
    assert batch["rewards"].shape == batch["advantages"].shape == batch["completion_ids"].shape[:2] == (8, 2)
    for row, index in enumerate(batch["index"].tolist()):
        judged = CharacterMatch()([""] * 2, batch["completion"][row], [ROWS[index][1]] * 2)
        assert judged == batch["rewards"][row].tolist()


# --- models ----------------------------------------------------------------------------------------------------------


def architectures() -> dict[str, tuple[Any, bool]]:
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    shape = {
        "vocab_size": 17,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 24,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }

    class Foreign(nn.Module):
        """A module that only has logits."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    return {
        "llama": (lambda: LlamaForCausalLM(LlamaConfig(**shape)), True),
        "softcapped": (lambda: Gemma2ForCausalLM(Gemma2Config(**shape, final_logit_softcapping=0.5)), False),
        "scaled": (lambda: CohereForCausalLM(CohereConfig(**shape, logit_scale=0.0625)), False),
        "divided": (lambda: GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=8.0)), False),
        "gpt2": (tiny_model, True),
        "foreign": (Foreign, False),
    }


@pytest.mark.parametrize("name", ["llama", "softcapped", "scaled", "divided", "gpt2", "foreign"])
def test_log_probabilities_of_any_architecture(tmp_path: Path, name: str) -> None:
    """Whatever it does to its logits; from states and output embedding where it does nothing."""
    make, linear = architectures()[name]
    torch.manual_seed(0)
    model = make().eval()
    module = policy(model, generator=FixedGenerator(1.3))
    module.tokenizer = arithmetic_tokenizer()
    data = prompts()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    drawn = FixedGenerator().generate(
        model, batch["prompt_ids"], batch["prompt_mask"], 2, eos_token_id=EOS, pad_token_id=PAD
    )
    found = module._scorer(batch)(*drawn)
    assert module._output_is_linear is linear
    torch.testing.assert_close(found, plain_log_probs(model, batch, *drawn, temperature=1.3), rtol=1e-4, atol=1e-5)
    if linear:
        assert _output_is_linear(make().bfloat16(), batch["prompt_ids"][:1])


def test_lora_reference_is_the_model_without_adapter(tmp_path: Path) -> None:
    """No copy is made, and the base model stays as it is."""
    pytest.importorskip("peft")
    lora = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    logged, modules, recorder = [], [], Batches()
    for steps in (1, 2):
        torch.manual_seed(1)
        module = policy(kl_coef=0.5, lora=lora)
        assert module.reference is None
        before = weights(module)
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        logged.append(fit(tmp_path, module, callbacks=[recorder], max_steps=steps))
        changed = {name for name, value in weights(module).items() if not torch.equal(value, before[name].to(value))}
        assert changed - {"batches"} <= trained == {n for n, p in module.named_parameters() if p.requires_grad}
        modules.append(module.eval())
    assert logged[0]["train/kl"] == 0
    batch = recorder.seen[-1]
    new, old = (
        plain_log_probs(model, batch, batch["completion_ids"], batch["completion_mask"])
        for model in (modules[0].model, tiny_model().double())
    )
    assert logged[1]["train/kl"] == pytest.approx(
        kl_estimate(new, old)[batch["completion_mask"]].mean().item(), rel=0.1
    )


def test_reference_is_what_training_began_with(tmp_path: Path) -> None:
    """Weights may be loaded after the module is made; a resumed run keeps the first ones."""
    module = policy(kl_coef=0.1)
    with torch.no_grad():
        module.model.lm_head.weight.mul_(2)
    first = module.model.lm_head.weight.detach().double().clone()
    trainer = quiet_trainer(tmp_path, max_steps=2, **FLOAT64)
    trainer.fit(module, prompts())
    assert torch.equal(module.reference.network.lm_head.weight, first)
    assert not torch.equal(module.model.lm_head.weight, first)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = policy(kl_coef=0.1)
    quiet_trainer(tmp_path, max_steps=3, **FLOAT64).fit(resumed, prompts(), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(resumed.reference.network.lm_head.weight, first)
    assert not resumed.reference.training


def test_rollouts_depend_on_seed_and_batch_alone(tmp_path: Path) -> None:
    texts = []
    for seed, noise in ((0, 0), (0, 1), (1, 0)):
        recorder = Batches()
        torch.manual_seed(noise)
        module = policy(generator=TransformersGenerator(3), seed=seed)
        fit(tmp_path, module, callbacks=[recorder], max_steps=2)
        texts.append([batch["completion"] for batch in recorder.seen])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0][0] != texts[0][1]


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_validation_is_greedy_and_sampled(tmp_path: Path, two_processes: ProcessPool) -> None:
    """Of seven prompts on two processes, each counts once."""
    expected = _validate(0, tmp_path)
    assert expected["val/accuracy"] == pytest.approx(_share_right(1))
    assert expected["val/reward"] == pytest.approx(_share_right(5))
    for actual in two_processes.run(_validate, tmp_path, "ddp"):
        assert actual == pytest.approx(expected)


def _begins_with_digit(prompts: list[str], completions: list[str], answers: list[str | None]) -> list[float]:
    return [float(text[:1] == "1") for text in completions]


def _validate(rank: int, directory: Path, strategy: str = "auto") -> dict[str, float]:
    module = policy(eval_reward=_begins_with_digit, eval_generations=5)
    data = prompts(val_prompts=ROWS[:7], eval_batch_size=2)
    trainer = quiet_trainer(directory, devices=1 if strategy == "auto" else 2, strategy=strategy)
    trainer.validate(module, data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _share_right(number: int) -> float:
    data = prompts(ROWS[:7])
    data.setup("fit")
    batch = next(iter(data.predict_dataloader()))
    drawn = FixedGenerator().generate(
        nn.Identity(), batch["prompt_ids"], batch["prompt_mask"], number, eos_token_id=EOS, pad_token_id=PAD
    )
    return (drawn.completion_ids[:, :, 0] == 4).double().mean().item()  # the token of "1"


def test_predict_completes(tmp_path: Path) -> None:
    data = prompts()
    texts = quiet_trainer(tmp_path).predict(policy(), data)
    assert [len(batch) for batch in texts] == [8]
    assert all(isinstance(text, str) for text in texts[0])


def test_values_are_not_taken_for_those_of_other_prompts(tmp_path: Path) -> None:
    """As many, in another order: a resumed run would give them each other's values."""

    def spo() -> GroupPolicy:
        return policy(num_generations=1, advantages=ValueTracker(offline_generations=0))

    trainer = quiet_trainer(tmp_path, max_steps=1, **FLOAT64)
    trainer.fit(spo(), prompts())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit(tmp_path, first := spo(), prompts(), max_steps=2, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match="ValueTracker of the checkpoint has the values of other training prompts"):
        fit(tmp_path, spo(), prompts(ROWS[::-1]), max_steps=2, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match="ValueTracker has the values of other training prompts"):
        fit(tmp_path, first, prompts(ROWS[::-1]))


# --- wrong input -----------------------------------------------------------------------------------------------------


def test_nothing_to_learn_on_one_process_or_anywhere(tmp_path: Path, two_processes: ProcessPool) -> None:
    """One prompt of four has signal: the other process passes backward through zero, and both make the same step."""
    expected = _one_with_signal(0, tmp_path)
    assert expected["loss"] != 0
    for actual in two_processes.run(_one_with_signal, tmp_path, "ddp"):
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-8, atol=1e-10, msg=name)
    module = policy(reward=_nothing)
    before = weights(module)
    assert fit(tmp_path, module)["train/no_signal"] == 1
    after = weights(module)
    assert all(torch.equal(after[name], before[name].to(after[name])) for name in before if name != "batches")


def _nothing(prompts: list[str], completions: list[str], answers: list[str | None]) -> list[float]:
    return [0.0] * len(prompts)


def _one_prompt(prompts: list[str], completions: list[str], answers: list[str | None]) -> list[float]:
    return [float(prompt == "1+2=" and text[:1] == "1") for prompt, text in zip(prompts, completions, strict=True)]


def _one_with_signal(rank: int, directory: Path, strategy: str = "auto") -> dict[str, Any]:
    module = policy(reward=_one_prompt, num_generations=8, micro_batch_size=1, max_grad_norm=1.0)
    devices = 1 if strategy == "auto" else 2
    logged = fit(directory, module, prompts(ROWS[:4]), max_steps=2, devices=devices, strategy=strategy)
    return {**weights(module), "loss": torch.tensor(logged["train/loss"])}


def _unjudged(prompts: list[str], completions: list[str], answers: list[str | None]) -> list[float]:
    """NaN for the whole group of one prompt, and for the first of every other."""
    rewards = graded(prompts, completions, answers)
    return [
        math.nan if prompt == "6=" or i % 4 == 0 else reward
        for i, (prompt, reward) in enumerate(zip(prompts, rewards, strict=True))
    ]


def test_rewards_that_are_nan_are_left_out_and_counted(tmp_path: Path) -> None:
    recorder = Batches()
    module = policy(reward=_unjudged, loss_type="prompt")
    with pytest.warns(UserWarning, match=r"reward of 11 of 32 rollouts of a batch is not finite; they are not learned"):
        logged = fit(tmp_path, module, callbacks=[recorder])
    assert logged["train/unjudged"] == pytest.approx(11 / 32)
    assert math.isfinite(logged["train/reward"])
    (batch,) = recorder.seen
    valid = batch["rollout_mask"]
    assert int((~valid).sum()) == 11
    model = tiny_model().double()
    logps = plain_log_probs(model, batch, batch["completion_ids"], batch["completion_mask"])
    loss = clipped_surrogate_loss(logps, logps, batch["advantages"], batch["completion_mask"], valid)
    step_by_hand(model, loss.sum() / 7)  # the prompt without rollouts does not count
    check_weights(module, model)


@pytest.mark.parametrize("estimator", [GroupRelative(), MedianCentered(), ReferenceInGroup(), ValueTracker()])
def test_nothing_but_nan_changes_nothing(tmp_path: Path, estimator: AdvantageEstimator) -> None:
    module = policy(reward=lambda prompts, *_: [math.nan] * len(prompts), advantages=estimator, gal_weight=0.5)
    before = weights(module)
    with pytest.warns(UserWarning, match="not finite"):
        fit(tmp_path, module)
    after = weights(module.model)
    assert all(torch.equal(after[name], before[f"model.{name}"].to(after[name])) for name in after)


def refusals() -> dict[str, tuple[Any, str]]:
    def short(rows: Any = ROWS, **settings: Any) -> Any:
        data = settings.pop("data", {})
        return lambda directory: fit(directory, policy(**settings), prompts(rows, **data))

    def no_eos(directory: Path) -> None:
        tokenizer = arithmetic_tokenizer()
        tokenizer.eos_token = None
        fit(directory, policy(tokenizer=tokenizer))

    def plan(**values: Any) -> Any:
        return lambda directory: fit(directory, policy(), callbacks=[Batches(**values)])

    def foreign_data(directory: Path) -> None:
        module = policy(tokenizer=arithmetic_tokenizer())
        quiet_trainer(directory, max_steps=1).fit(module, torch.utils.data.DataLoader([{"input_ids": 1}]))

    def no_tokenizer(directory: Path) -> None:
        quiet_trainer(directory, max_steps=1).fit(policy(), torch.utils.data.DataLoader([1]))

    def no_count(directory: Path) -> None:
        module = policy(tokenizer=arithmetic_tokenizer(), advantages=ValueTracker())
        quiet_trainer(directory, max_steps=1).fit(module, torch.utils.data.DataLoader([1]))

    long = [("1+" * 9 + "1=", "10", ("10",))] * 2
    said = [("1=", "01", ("0" * 23,)), ("2=", "02", ("02",))]
    return {
        "prompt beyond the context": (
            short(long, generator=TransformersGenerator(8)),
            r"prompt of 20 tokens and a completion of 8 exceed the model's context of 24",
        ),
        "demonstration beyond the context": (short(said), r"its demonstration, 26 tokens, exceeds .* context of 24"),
        "reward of wrong length": (short(reward=lambda *_: [1.0]), r"one number for each completion: got 1 for 32"),
        "reward of no numbers": (
            short(reward=lambda prompts, *_: ["x"] * len(prompts)),
            "must return a list of numbers",
        ),
        "no EOS": (no_eos, "has no EOS token, without which no completion ends"),
        "no tokenizer": (no_tokenizer, "there is none: pass tokenizer="),
        "batch without prompts": (foreign_data, r"needs \['prompt_ids', .*which have \['input_ids'\]"),
        "number of prompts not known": (no_count, "ValueTracker keeps a value for every training prompt"),
        "no demonstrations": (
            short([(p, a, ()) for p, a, _ in ROWS], advantages=ReferenceInGroup()),
            "ReferenceInGroup needs demonstrations in its batches",
        ),
        "weight of wrong shape": (
            plan(rl_weight=torch.ones(3)),
            r"rl_weight must have shape \(B,\) = \(8,\), got \(3,\)",
        ),
        "share out of range": (
            plan(gal_weight=torch.tensor([0.0] * 7 + [1.5])),
            r"gal_weight of a batch must be in \[0, 1\], .* got 0 to 1.5",
        ),
        "share without reference": (
            plan(gal_weight=torch.full((8,), 0.5)),
            r"0 for a GroupPolicy without reference, .* got 0.5 to 0.5 with GroupPolicy\(gal_weight=0, kl_coef=0\)",
        ),
        "nobody to imitate": (
            plan(sft_weight=torch.ones(8)),
            r"sft_weight is not 0 for 1 prompts that have no demonstration",
        ),
        "schedule of unknown length": (
            lambda directory: fit(directory, policy(inner_epochs=2, lr_scheduler="linear"), max_steps=-1, max_epochs=1),
            r"lr_scheduler='linear' with inner_epochs=2 needs the trainer's max_steps",
        ),
    }


@pytest.mark.parametrize("name", list(refusals()))
def test_refusals(tmp_path: Path, name: str) -> None:
    call, message = refusals()[name]
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        call(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 0}, "num_generations must be >= 1"),
        ({"num_generations": 1}, "num_generations must be >= 2 for GroupRelative"),
        ({"num_generations": 3, "advantages": MedianCentered()}, "num_generations must be even for MedianCentered"),
        ({"inner_epochs": 0}, "inner_epochs must be >= 1"),
        ({"micro_batch_size": 0}, "micro_batch_size must be >= 1"),
        ({"clip_low": 1.0}, "clip_low must be in"),
        ({"clip_high": 0.0}, "clip_high must be > 0"),
        ({"kl_coef": -1.0}, "kl_coef must be >= 0"),
        ({"dual_clip": 1.0}, "dual_clip must be > 1"),
        ({"gal_weight": 1.1}, "gal_weight must be in"),
        ({"beta_gal": 0.0}, "beta_gal must be > 0"),
        ({"loss_type": "mean"}, "loss_type must be one of"),
        ({"ratio_level": "word"}, "ratio_level must be one of"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be > 0"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy(nn.Identity(), **settings)


def test_prompt_learning_is_refused() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny_model(), settings)
    with pytest.raises(ValueError, match="PromptTuningConfig, which learns prompts"):
        policy(model)
