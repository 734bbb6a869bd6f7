from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heliostat.components import (
    SoftTokenBank,
    attach_soft_tokens,
    denoising_contrastive_loss,
    pairwise_denoising_errors,
)
from tests.harness import GoldenCase, OperatorContract, golden, relative_error, word_tokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def tiny_unet(**settings: object) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 24,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return diffusers.UNet2DConditionModel(**{**config, **settings}).eval().requires_grad_(False)


def tiny_sd3(num_layers: int = 3, **settings: object) -> diffusers.SD3Transformer2DModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": num_layers,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 10,
        "pos_embed_max_size": 8,
    }
    return diffusers.SD3Transformer2DModel(**{**config, **settings}).eval().requires_grad_(False)


def inputs(model: nn.Module, rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    """Keyword arguments of a tiny model."""
    generator = torch.Generator().manual_seed(1)
    given = {
        "encoder_hidden_states": torch.randn(rows, length, 24, generator=generator),
        "timestep": torch.tensor([15.0, 731.0, 999.9, 0.0][:rows]),
    }
    noisy = torch.randn(rows, 3, 8, 8, generator=generator)
    if isinstance(model, diffusers.SD3Transformer2DModel):
        return {**given, "hidden_states": noisy, "pooled_projections": torch.randn(rows, 10, generator=generator)}
    return {**given, "sample": noisy}


def bank_of(model: nn.Module, **settings: object) -> SoftTokenBank:
    torch.manual_seed(2)
    return SoftTokenBank.for_model(model, **{"num_tokens": 2, "init_std": 1.0, **settings})


MODELS = pytest.mark.parametrize("make", [tiny_unet, tiny_sd3], ids=["UNet", "SD3"])

# --- the loss --------------------------------------------------------------------------------------------------------


class TestLoss(OperatorContract):
    differentiable = ("errors",)

    def call(self, errors: Tensor, targets: Tensor | None = None, negative_mask: Tensor | None = None) -> Tensor:
        settings = {"temperature": 0.5, "denoising_weight": 0.7}
        return denoising_contrastive_loss(errors, targets, negative_mask=negative_mask, **settings).loss

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        errors = torch.rand(rows, rows + 2, generator=torch.Generator().manual_seed(0)) + 0.2
        return {"errors": errors, "targets": torch.arange(rows) + 1, "negative_mask": errors > 1.1}

    def golden_cases(self) -> dict[str, GoldenCase]:
        return {name: self._golden_case(case) for name, case in golden("softrepa").items() if "loss" in name}

    @staticmethod
    def _golden_case(case: dict) -> GoldenCase:
        def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            settings = {n: float(case[n]) for n in ("temperature", "logit_scale", "denoising_weight")}
            return {"loss": denoising_contrastive_loss(inputs["errors"], inputs.get("targets"), **settings).loss}

        given = {name: case[name] for name in ("errors", "targets") if name in case}
        if case["errors"].shape[0] != case["errors"].shape[1] and "targets" not in case:
            given["targets"] = torch.arange(len(case["errors"])).numpy()
        gradients = {"errors": case["grad_errors"]}
        return GoldenCase(given, call, {"loss": case["loss"]}, gradients, ("loss", 1.0), TOLERANCE)

    def degenerate_cases(self):
        return {
            "one pair": {"errors": torch.ones(1, 1)},
            "one prompt": {"errors": torch.rand(3, 1), "targets": torch.zeros(3, dtype=torch.int64)},
            "no image": {"errors": torch.ones(0, 3), "targets": torch.zeros(0, dtype=torch.int64)},
            "no error": {"errors": torch.zeros(4, 4)},
            "huge": {"errors": torch.full((4, 4), 1e30)},
            "all negatives masked": {"errors": torch.rand(4, 4), "negative_mask": torch.ones(4, 4, dtype=torch.bool)},
        }

    def error_cases(self):
        loss, e = denoising_contrastive_loss, torch.rand(3, 4)
        square, i = torch.rand(3, 3), torch.arange(3)
        return {
            "shape": (lambda: loss(e[0]), r"errors must have shape \(N, M\) .* got \(4,\)"),
            "targets are needed": (lambda: loss(e), "targets are needed: errors has 3 images but 4 prompts"),
            "number of targets": (lambda: loss(e, i[:2]), "targets must be 3 numbers of int64, got \\(2,\\)"),
            "type of targets": (lambda: loss(e, i.float()), "int64"),
            "range of targets": (lambda: loss(e, i + 2), r"targets must lie in 0..3, got 2..4"),
            "temperature": (lambda: loss(square, temperature=0.0), "temperature must be > 0 or 'auto', got 0.0"),
            "word": (lambda: loss(square, temperature="median"), "temperature must be .* got 'median'"),
            "scale": (lambda: loss(square, logit_scale=-1.0), "logit_scale must be > 0, got -1.0"),
            "weight": (lambda: loss(square, denoising_weight=-1.0), "denoising_weight must be >= 0"),
            "mask": (lambda: loss(square, negative_mask=square), "negative_mask must be bool .* got .* torch.float32"),
            "reduction": (lambda: loss(square, reduction="median"), "reduction must be 'mean', 'sum' or 'none'"),
        }


def errors_of(rows: int = 5, columns: int = 5) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(3)) + 0.1


def test_one_prompt_costs_nothing_but_its_denoising_error() -> None:
    e = errors_of(4, 1).requires_grad_()
    parts = denoising_contrastive_loss(e, torch.zeros(4, dtype=torch.int64), denoising_weight=3.0)
    torch.testing.assert_close(parts.loss, 3 * e.mean())
    (gradient,) = torch.autograd.grad(parts.loss, e)
    torch.testing.assert_close(gradient, torch.full_like(e, 3 / 4))
    assert parts.accuracy == 1
    assert parts.negative_error.isnan()


def test_masked_negatives_are_as_if_they_were_not_there() -> None:
    e = errors_of()
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[:, 3:] = True
    masked = denoising_contrastive_loss(e, negative_mask=mask, temperature=0.5, reduction="none")
    for row in range(5):  # positives stay, masked or not
        kept = [0, 1, 2] + [row] * (row > 2)
        alone = denoising_contrastive_loss(
            e[row : row + 1, kept], torch.tensor([kept.index(row)]), temperature=0.5, reduction="none"
        )
        torch.testing.assert_close(masked.loss[row], alone.loss[0])
    torch.testing.assert_close(masked.negative_error, e[~(mask | torch.eye(5, dtype=torch.bool))].mean())


def test_parts_say_how_it_goes() -> None:
    e = torch.tensor([[0.1, 0.5], [0.2, 0.4]])
    parts = denoising_contrastive_loss(e, temperature=0.1)
    assert parts.accuracy == 0.5
    assert parts.positive_error == pytest.approx(0.25)
    assert parts.negative_error == pytest.approx(0.35)
    assert parts.saturated == 0.5  # exp(-5), exp(-4) are below a twentieth, exp(-1), exp(-2) are not
    assert not any(part.requires_grad for part in denoising_contrastive_loss(e.clone().requires_grad_())[1:])


def test_temperature_far_below_the_errors_learns_nothing_and_says_so() -> None:
    e = (errors_of() + 2).requires_grad_()
    low, auto = (denoising_contrastive_loss(e, temperature=t) for t in (0.05, "auto"))
    assert low.loss.item() == pytest.approx(math.log(5), abs=1e-6)
    assert (low.saturated, auto.saturated) == (1, 0)
    assert torch.autograd.grad(low.loss, e)[0].abs().max() < 1e-9
    expected = denoising_contrastive_loss(e, temperature=e.detach().diagonal().median())
    assert torch.equal(auto.loss, expected.loss)
    for parts in (auto, expected):  # a constant, for the gradient too
        (gradient,) = torch.autograd.grad(parts.loss, e)
        torch.testing.assert_close(gradient, gradient.clone())


def test_gradient_of_a_negative_is_bounded_by_a_over_tau() -> None:
    e = torch.linspace(0, 20, 50).diag_embed().add(torch.linspace(0, 3, 50)).requires_grad_()
    (gradient,) = torch.autograd.grad(denoising_contrastive_loss(e, temperature=0.3, reduction="sum").loss, e)
    assert gradient.abs().max() <= 4.0 / 0.3


def test_reductions_agree_and_rows_are_independent() -> None:
    e = errors_of(5, 7)
    targets = torch.tensor([6, 0, 3, 3, 1])
    rows = denoising_contrastive_loss(e, targets, reduction="none").loss
    torch.testing.assert_close(denoising_contrastive_loss(e, targets).loss, rows.mean())
    torch.testing.assert_close(denoising_contrastive_loss(e, targets, reduction="sum").loss, rows.sum())
    torch.testing.assert_close(denoising_contrastive_loss(e[:2], targets[:2], reduction="none").loss, rows[:2])


def test_nan_propagates() -> None:
    e = errors_of()
    e[1, 2] = torch.nan
    assert denoising_contrastive_loss(e).loss.isnan()


# --- errors of all pairs ---------------------------------------------------------------------------------------------


def toy_denoiser(z: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
    return (t / 1000).cos() * z + prompts.mean((1, 2)).view(-1, 1, 1, 1)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("name", [name for name in golden("softrepa") if name.startswith("pair")])
def test_errors_of_the_reference_vectors(name: str, chunk_size: int | None) -> None:
    case = {key: torch.as_tensor(value) for key, value in golden("softrepa")[name].items() if key != "kind"}
    errors = pairwise_denoising_errors(
        toy_denoiser,
        case["latents"].double(),
        case["prompt_embeds"].double(),
        float(case["timestep"]),
        case["noise"].double(),
        schedule=str(golden("softrepa")[name]["kind"]),
        alphas_cumprod=case.get("alpha_cumprod_t"),
        chunk_size=chunk_size,
    )
    assert relative_error(errors, case["errors"]) < 1e-9


def test_table_of_the_scheduler_is_read_at_the_timestep() -> None:
    table = torch.linspace(0.99, 0.01, 1000)
    x, c, eps = torch.randn(2, 1, 2, 2), torch.randn(3, 4, 5), torch.randn(1, 1, 2, 2)
    given = (toy_denoiser, x, c, torch.tensor(700), eps)
    whole = pairwise_denoising_errors(*given, schedule="ddpm", alphas_cumprod=table)
    assert torch.equal(whole, pairwise_denoising_errors(*given, schedule="ddpm", alphas_cumprod=table[700]))


@MODELS
def test_chunks_give_the_gradient_of_one_call_and_keep_no_activations(make) -> None:
    model = make()
    bank = bank_of(model)
    attach_soft_tokens(model, bank)
    given = inputs(model, 2)
    latents = given.pop("hidden_states", None)
    latents = given.pop("sample") if latents is None else latents
    prompts = {name: given[name] for name in ("encoder_hidden_states", "pooled_projections") if name in given}

    def gradients(chunk_size: int | None, denoise) -> tuple[list[Tensor], list[int]]:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            errors = pairwise_denoising_errors(
                denoise, latents, prompts, torch.tensor(412.0), latents[:1], chunk_size=chunk_size
            )
        loss = denoising_contrastive_loss(errors, temperature=0.5, denoising_weight=0.3).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(bank.parameters()))], kept

    def denoise(z: Tensor, t: Tensor, prompts: dict[str, Tensor]) -> Tensor:
        return model(z, timestep=t.expand(len(z)), **prompts).sample

    expected, all_kept = gradients(None, denoise)
    for chunk_size in (3, 9):  # a remainder; all in one chunk
        actual, kept = gradients(chunk_size, denoise)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
        assert sum(kept) < sum(all_kept) / 50
    model.enable_gradient_checkpointing()
    for a, b in zip(gradients(3, denoise)[0], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert expected[1].abs().max() > 0


def test_half_precision_predictions_are_compared_in_float32() -> None:
    x, eps = torch.randn(2, 4, 16, 16), torch.randn(1, 4, 16, 16)

    def denoise(z, t, c):
        return z.bfloat16()

    errors = pairwise_denoising_errors(denoise, x, torch.zeros(2, 1, 1), 500, eps)
    z = 0.5 * x + 0.5 * eps
    expected = (z.bfloat16().float() - (eps - x)).square().flatten(1).mean(1)
    torch.testing.assert_close(errors, expected[:, None].expand(2, 2))


@pytest.mark.parametrize("timestep", [0, 1000.0])
def test_both_ends_of_time(timestep: float) -> None:
    assert (
        pairwise_denoising_errors(
            toy_denoiser, torch.randn(2, 1, 2, 2), torch.randn(2, 1, 3), timestep, torch.randn(1, 1, 2, 2)
        )
        .isfinite()
        .all()
    )


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        (
            {"noise": torch.zeros(2, 1, 2, 2)},
            r"noise must be one map for all images, \(1, 1, 2, 2\), got \(2, 1, 2, 2\)",
        ),
        ({"timestep": torch.tensor([1, 2])}, r"timestep must be one number for all images, got shape \(2,\)"),
        ({"timestep": 1001}, "timestep must lie in 0..1000, got 1001"),
        ({"schedule": "ddpm"}, "needs alphas_cumprod"),
        ({"schedule": "ddpm", "alphas_cumprod": torch.ones(9)}, "timestep must be below 9"),
        ({"schedule": "edm"}, "schedule must be 'flow' or 'ddpm', got 'edm'"),
        ({"prompt_embeds": {"a": torch.ones(2, 1), "b": torch.ones(3, 1)}}, r"the same number of rows .* \[2, 3\]"),
        ({"denoise_fn": lambda z, t, c: z[:, :, :1]}, r"must predict the shape of its input, \(4, 1, 2, 2\)"),
        ({"chunk_size": 0}, "chunk_size must be >= 1"),
    ],
)
def test_wrong_pairs(changes: dict, pattern: str) -> None:
    given = {
        "denoise_fn": toy_denoiser,
        "latents": torch.zeros(2, 1, 2, 2),
        "prompt_embeds": torch.zeros(2, 3, 4),
        "timestep": 500,
        "noise": torch.zeros(1, 1, 2, 2),
    }
    with pytest.raises(ValueError, match=pattern):
        pairwise_denoising_errors(**{**given, **changes})


# --- the bank --------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Stands for a module with cross-attention, and notes what it is given."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor | None = None
    ) -> Tensor:
        self.text, self.mask = encoder_hidden_states, encoder_attention_mask
        return hidden_states


class Foreign(nn.Module):
    """A model that only the fallback knows."""

    gradient_checkpointing = False

    def __init__(self) -> None:
        super().__init__()
        self.block = Recorder()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.block(x, text, encoder_attention_mask=mask)


@pytest.mark.parametrize("name", [name for name in golden("softrepa") if name.startswith("unet")])
def test_cross_attention_layout_of_the_reference_vectors(name: str) -> None:
    case = {key: torch.as_tensor(value) for key, value in golden("softrepa")[name].items()}
    table = case.get("time_table")
    bank = SoftTokenBank(*case["tokens"].shape, num_time_buckets=None if table is None else len(table))
    bank.load_state_dict({"tokens": case["tokens"], **({} if table is None else {"time_table": table})})
    model = Foreign()
    attach_soft_tokens(model, bank, position=int(case["position"]), modules=[model.block])
    model(torch.zeros(len(case["timesteps"])), case["timesteps"], case["encoder_hidden_states"])
    assert relative_error(model.block.text, case["expected"]) < 1e-6


@pytest.mark.parametrize("name", [name for name in golden("softrepa") if name.startswith("joint")])
def test_joint_layout_of_the_reference_vectors(name: str) -> None:
    case = {key: torch.as_tensor(value) for key, value in golden("softrepa")[name].items()}
    layers, tokens, dim = case["tokens"].shape
    bank = SoftTokenBank(tokens, dim, layers, num_time_buckets=len(case["time_table"]))
    bank.load_state_dict({"tokens": case["tokens"], "time_table": case["time_table"]})
    assert relative_error(bank(case["timesteps"]), case["expected_soft_tokens"]) < 1e-6

    model = tiny_sd3(len(case["expected_sequence_lengths"]), caption_projection_dim=dim, attention_head_dim=dim // 2)
    attach_soft_tokens(model, bank)
    seen: list[Tensor] = []
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
    given = inputs(model, len(case["timesteps"]), int(case["text_length"]))
    model(**{**given, "timestep": case["timesteps"]})
    assert [x.shape[1] for x in seen] == case["expected_sequence_lengths"].tolist()
    for layer in range(layers):
        assert relative_error(seen[layer][:, :tokens], case["expected_soft_tokens"][layer]) < 1e-6


@pytest.mark.parametrize("buckets", [1, 7, 20, 100])
def test_bucket_is_the_rounded_down_share_of_a_thousand(buckets: int) -> None:
    bank = SoftTokenBank(1, 1, num_time_buckets=buckets, init_std=0.0)
    bank.time_table.data = torch.arange(buckets, dtype=torch.float32)[:, None]
    times = [0, 9.99, 10, 499.999, 999.99, 1000, 1003]
    expected = [min(int(t) * buckets // 1000, buckets - 1) for t in times]
    assert bank(torch.tensor(times))[:, 0, 0].tolist() == expected
    assert bank(999).shape == bank(torch.tensor(999)).shape == (1, 1, 1)


def test_start_of_the_tokens() -> None:
    first = torch.randn(12)
    bank = SoftTokenBank(4, 12, init=first)
    assert float((bank.tokens - first).std().detach()) == pytest.approx(0.02, rel=0.5)
    assert len(bank.tokens.unique(dim=0)) == 4  # equal tokens would get equal gradients for ever
    assert torch.equal(SoftTokenBank(2, 12, 3, init=first, init_std=0.0).tokens, first.expand(3, 2, 12))
    assert sum(p.numel() for p in SoftTokenBank(4, 1536, 5).parameters()) == 798_720  # as published for SD3


@MODELS
def test_saved_bank_is_the_same_and_knows_its_place(make, tmp_path: Path) -> None:
    model, other = make(), make()
    bank = bank_of(model)
    attach_soft_tokens(model, bank, *([("mid", "up"), 2] if make is tiny_unet else []))
    bank.save(tmp_path / "folder" / "tokens.safetensors")
    loaded = SoftTokenBank.load(tmp_path / "folder" / "tokens.safetensors")
    attach_soft_tokens(other, loaded)
    assert repr(loaded) == repr(bank)
    assert torch.equal(model(**inputs(model)).sample, other(**inputs(model)).sample)


def test_foreign_and_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        SoftTokenBank.load(path)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        SoftTokenBank.load(path)
    torch.save({"tokens": torch.zeros(4, 8)}, path)
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        SoftTokenBank.load(path)
    save_file({"lora.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"is no file of SoftTokenBank.save: .* it holds lora.weight"):
        SoftTokenBank.load(path)
    SoftTokenBank(4, 8).save(path)
    tensors = load_file(path)
    layout = {"kind": "cross_attention", "num_tokens": 5, "dim": 8, "num_layers": None, "num_time_buckets": 100}
    layout |= {"stages": ["down"], "position": 1}
    save_file(tensors, path, metadata={"format": "heliostat.soft_tokens", "layout": json.dumps(layout)})
    with pytest.raises(ValueError, match=r"does not hold what its metadata say: [^$]*size mismatch for tokens"):
        SoftTokenBank.load(path)


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"num_tokens": 0}, "num_tokens must be >= 1, got 0"),
        ({"num_layers": 0}, "num_layers must be >= 1, got 0"),
        ({"num_time_buckets": 0}, "num_time_buckets must be >= 1, got 0"),
        ({"init_std": -1.0}, "init_std must be >= 0"),
        ({"init": torch.zeros(7)}, r"init must broadcast to the tokens' shape \(2, 8\), got \(7,\)"),
        ({"init": torch.zeros(3, 1, 8)}, r"init must broadcast to the tokens' shape \(2, 8\), got \(3, 1, 8\)"),
        ({"init": "zeros"}, "init must be 'normal' or a tensor, got 'zeros'"),
    ],
)
def test_wrong_bank(settings: dict, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        SoftTokenBank(**{"num_tokens": 2, "dim": 8, **settings})


# --- attached to models ----------------------------------------------------------------------------------------------


@MODELS
def test_model_without_its_tokens_is_bit_identical(make) -> None:
    model = make()
    given, state = inputs(model), copy.deepcopy(model.state_dict())
    before = model(**given).sample
    handle = attach_soft_tokens(model, bank_of(model))
    with_tokens = model(**given).sample
    assert not torch.allclose(before, with_tokens)
    with handle.disabled():
        assert torch.equal(model(**given).sample, before)
    assert torch.equal(model(**given).sample, with_tokens)
    handle.disable()
    with handle.disabled():
        pass
    assert torch.equal(model(**given).sample, before)
    handle.enable()
    assert torch.equal(model(**given).sample, with_tokens)
    handle.remove()
    assert torch.equal(model(**given).sample, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="were removed from their model"):
        handle.enable()
    attach_soft_tokens(model, handle.bank)
    assert torch.equal(model(**given).sample, with_tokens)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_tokens_of_sd3_stand_first_and_go_no_further_than_their_blocks(layers: int) -> None:
    """Against the splice written out, also where the last block has tokens."""
    model = tiny_sd3()
    bank = bank_of(model, num_layers=layers)
    given = inputs(model)
    soft = bank(given["timestep"])
    image, temb = (
        model.pos_embed(given["hidden_states"]),
        model.time_text_embed(given["timestep"], given["pooled_projections"]),
    )
    text = model.context_embedder(given["encoder_hidden_states"])
    for k, block in enumerate(model.transformer_blocks):
        joined = torch.cat([soft[k], text], 1) if k < layers else text
        text, image = block(hidden_states=image, encoder_hidden_states=joined, temb=temb)
        if k < layers and text is not None:
            text = text[:, bank.num_tokens :]
    expected = model.proj_out(model.norm_out(image, temb))
    expected = expected.view(2, 4, 4, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 8, 8)
    attach_soft_tokens(model, bank)
    torch.testing.assert_close(model(**given).sample, expected)


@pytest.mark.parametrize("stages", [("down",), ("mid",), ("up",), ("down", "mid", "up")])
def test_stages_of_a_unet(stages: tuple[str, ...]) -> None:
    model = tiny_unet()
    attach_soft_tokens(model, bank_of(model), stages)
    lengths: dict[str, set[int]] = {}
    for name, module in model.named_modules():
        if name.endswith("attn2"):
            key = name.split("_")[0]
            module.register_forward_pre_hook(
                lambda _, args, kwargs, key=key: lengths.setdefault(key, set()).add(
                    kwargs["encoder_hidden_states"].shape[1]
                ),
                with_kwargs=True,
            )
    model(**inputs(model))
    assert lengths == {key: {9 if key in stages else 7} for key in ("down", "mid", "up")}


def test_tokens_of_a_unet_are_as_if_they_stood_in_the_prompt() -> None:
    model = tiny_unet()
    bank, given = bank_of(model), inputs(model)
    text = given["encoder_hidden_states"]
    longer = torch.cat([text[:, :1], bank(given["timestep"]), text[:, 1:]], 1)
    expected = model(**{**given, "encoder_hidden_states": longer}).sample
    attach_soft_tokens(model, bank, ("down", "mid", "up"))
    assert torch.equal(model(**given).sample, expected)


def test_mask_is_extended_and_tokens_are_seen() -> None:
    model = tiny_unet()
    bank, given = bank_of(model), inputs(model)
    keep = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    attach_soft_tokens(model, bank)
    masked = model(**given, encoder_attention_mask=keep).sample
    short = {name: value[:1] for name, value in given.items()}
    short["encoder_hidden_states"] = short["encoder_hidden_states"][:, :3]
    torch.testing.assert_close(masked[:1], model(**short).sample)

    other = Foreign()
    attach_soft_tokens(other, SoftTokenBank(2, 3), position=1, modules=[other.block])
    other(torch.zeros(2), 5, torch.zeros(2, 4, 3), torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]]))
    assert other.block.mask.tolist() == [[0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("make", "timestep"),
    [
        *((tiny_unet, t) for t in (731, 731.0, torch.tensor(731), torch.tensor([731.0]), torch.tensor([731, 731]))),
        *((tiny_sd3, t) for t in (torch.tensor([731]), torch.tensor([731.0, 731.0]))),
    ],
    ids=lambda value: value.__name__ if callable(value) else repr(value),
)
def test_every_form_of_timestep_by_name_and_by_place(make, timestep: object) -> None:
    model = make()
    attach_soft_tokens(model, bank_of(model))
    given = inputs(model)
    expected = model(**{**given, "timestep": torch.tensor([731.0, 731.0])}).sample
    given["timestep"] = timestep
    torch.testing.assert_close(model(**given).sample, expected)
    order = {
        tiny_unet: ("sample", "timestep", "encoder_hidden_states"),
        tiny_sd3: ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"),
    }
    torch.testing.assert_close(model(*(given[name] for name in order[make]), return_dict=False)[0], expected)


@MODELS
def test_gradient_checkpointing_gives_the_same_gradient_at_two_times(make) -> None:
    """Two forwards before one backward: what is run again belongs to the earlier time."""
    model = make()
    bank = bank_of(model)
    attach_soft_tokens(model, bank)

    def gradients() -> list[Tensor]:
        given = inputs(model)
        first = model(**given).sample.square().mean()
        later = {**given, "timestep": 999 - given["timestep"]}
        return list(torch.autograd.grad(first + model(**later).sample.square().mean(), list(bank.parameters())))

    expected = gradients()
    model.enable_gradient_checkpointing()
    actual = gradients()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in actual)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fallback_refuses_what_it_cannot_do_right() -> None:
    model = Foreign()
    attach_soft_tokens(model, SoftTokenBank(2, 3), modules=[model.block])
    model.gradient_checkpointing = True
    given = (torch.zeros(2), 5, torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="gradient checkpointing runs modules again"):
        model(*given)
    with torch.no_grad():
        model(*given)


@MODELS
def test_half_precision_model_and_autocast(make) -> None:
    model = make()
    bank = bank_of(model)
    attach_soft_tokens(model, bank)
    expected = model(**inputs(model)).sample
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs(model)).sample
    torch.testing.assert_close(loss.float(), expected, rtol=0.1, atol=0.1)
    model.bfloat16()
    given = {name: value if name == "timestep" else value.bfloat16() for name, value in inputs(model).items()}
    output = model(**given).sample
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
    output.float().square().mean().backward()
    assert bank.tokens.dtype == bank.tokens.grad.dtype == torch.float32


@MODELS
def test_copies_and_pickles_have_tokens_of_their_own(make) -> None:
    model = make()
    handle = attach_soft_tokens(model, bank_of(model))
    given = inputs(model)
    expected = model(**given).sample
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301
    with torch.no_grad():
        handle.bank.tokens.add_(1.0)
    handle.disable()
    assert all(torch.equal(other(**given).sample, expected) for other in copies)


def test_compiled_model_follows_the_switch() -> None:
    model = tiny_sd3(1)
    given = inputs(model)
    without = model(**given).sample
    handle = attach_soft_tokens(model, bank_of(model))
    expected = model(**given).sample
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**given).sample, expected)
    later = {**given, "timestep": given["timestep"].flip(0)}
    torch.testing.assert_close(compiled(**later).sample, model(**later).sample)
    with handle.disabled():
        torch.testing.assert_close(compiled(**given).sample, without)
    handle.remove()
    torch.testing.assert_close(compiled(**given).sample, without)
    with pytest.raises(ValueError, match="compiled already: attach the soft tokens first"):
        attach_soft_tokens(compiled, handle.bank)


def test_whole_model_under_a_checkpoint() -> None:
    model = tiny_unet()
    bank = bank_of(model)
    attach_soft_tokens(model, bank)
    given = inputs(model)

    def call(timestep: Tensor) -> Tensor:
        return model(**{**given, "timestep": timestep}).sample.square().mean()

    times = [torch.tensor([5.0, 5.0]), torch.tensor([700.0, 700.0])]
    expected = torch.autograd.grad(sum(map(call, times)), bank.time_table)[0]
    actual = torch.autograd.grad(sum(checkpoint(call, t, use_reentrant=False) for t in times), bank.time_table)[0]
    torch.testing.assert_close(actual, expected)


def test_guidance_and_other_arguments_of_attention_pass_through() -> None:
    model = tiny_sd3()
    attach_soft_tokens(model, bank_of(model))
    given = inputs(model)
    options: dict = {"scale": 1.0}
    torch.testing.assert_close(model(**given, joint_attention_kwargs=options).sample, model(**given).sample)
    assert options == {"scale": 1.0}
    with pytest.raises(ValueError, match="must be called by the model it belongs to"):
        model.transformer_blocks[0](torch.zeros(1, 4, 16), torch.zeros(1, 4, 16), torch.zeros(1, 16))


def test_pictures_of_an_ip_adapter_stay_behind_the_text() -> None:
    model = Foreign()
    attach_soft_tokens(model, SoftTokenBank(2, 3), modules=[model.block])
    pictures = [torch.ones(2, 1, 4, 3)]
    model(torch.zeros(2), 5, (torch.zeros(2, 4, 3), pictures))
    text, rest = model.block.text
    assert text.shape == (2, 6, 3)
    assert rest is pictures


# --- stock pipelines -------------------------------------------------------------------------------------------------


def clip(kind: type, width: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "hidden_size": width, "intermediate_size": 16, "max_position_embeddings": 7}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 5}
    return kind(transformers.CLIPTextConfig(**sizes, bos_token_id=2, eos_token_id=3, pad_token_id=0)).eval()


def vae() -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    sizes = {"latent_channels": 4, "block_out_channels": (8,), "norm_num_groups": 4, "shift_factor": 0.1}
    return diffusers.AutoencoderKL(**blocks, **sizes).eval()


def tokenizer() -> transformers.PreTrainedTokenizerBase:
    words = word_tokenizer(["a", "red", "cat"])
    words.model_max_length = 7
    return words


def stable_diffusion() -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(transformers.CLIPTextModel, 24),
        tokenizer=tokenizer(),
        unet=tiny_unet(in_channels=4, out_channels=4),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_3() -> diffusers.StableDiffusion3Pipeline:
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=8, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()
    clips = (clip(transformers.CLIPTextModelWithProjection, 12) for _ in range(2))
    return diffusers.StableDiffusion3Pipeline(
        transformer=tiny_sd3(in_channels=4, out_channels=4),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=next(clips),
        tokenizer=tokenizer(),
        text_encoder_2=next(clips),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5,
        tokenizer_3=tokenizer(),
    )


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_3], ids=["SD", "SD3"])
def test_stock_pipeline_reads_the_tokens_of_a_file(make, tmp_path: Path) -> None:
    """In both branches of guidance, and is the pipeline it was without them."""
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    denoiser = pipeline.unet if make is stable_diffusion else pipeline.transformer
    bank_of(denoiser).save(tmp_path / "tokens.safetensors")
    rows: list[list[int]] = []  # number and length of the texts, of each call

    def draw(**settings: object) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        given = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 8, "width": 8, "output_type": "pt"}
        return pipeline("a red cat", **{**given, **settings}, generator=generator).images

    before = draw()
    handle = attach_soft_tokens(denoiser, SoftTokenBank.load(tmp_path / "tokens.safetensors"))
    block = denoiser.down_blocks[0] if make is stable_diffusion else denoiser.transformer_blocks[0]
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(list(kwargs["encoder_hidden_states"].shape[:2])), with_kwargs=True
    )
    after = draw()
    unguided = draw(guidance_scale=1.0)
    assert not torch.allclose(before, after)
    assert not torch.allclose(after, unguided)
    with handle.disabled():
        assert torch.equal(draw(), before)
    hook.remove()
    assert [batch for batch, _ in rows] == [2, 2, 1, 1, 2, 2]
    lengths = [length for _, length in rows]
    assert [length - lengths[-1] for length in lengths] == [2, 2, 2, 2, 0, 0]
    pipeline.save_pretrained(tmp_path / "pipeline")  # as if there were no tokens
    saved = type(denoiser).from_pretrained(
        tmp_path / "pipeline" / ("unet" if make is stable_diffusion else "transformer")
    )
    assert saved.state_dict().keys() == denoiser.state_dict().keys()
    handle.remove()
    assert torch.equal(draw(), before)


# --- what is refused -------------------------------------------------------------------------------------------------


def wrong(model: nn.Module, bank: SoftTokenBank, *args: object, twice: bool = False, **settings: object):
    def call() -> None:
        if twice:
            attach_soft_tokens(model, bank)
        attach_soft_tokens(model, bank, *args, **settings)

    return call


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (wrong(tiny_unet(), SoftTokenBank(2, 24), twice=True), "model has soft tokens already: remove"),
        (wrong(tiny_sd3(), SoftTokenBank(2, 16, 3), twice=True), "model has soft tokens already: remove"),
        (wrong(tiny_unet(), SoftTokenBank(2, 32)), "width dim=32, but the UNet2DConditionModel takes 24"),
        (wrong(tiny_sd3(), SoftTokenBank(2, 24, 3)), "width dim=24, but the SD3Transformer2DModel takes 16"),
        (wrong(tiny_sd3(), SoftTokenBank(2, 16, 4)), "tokens for num_layers=4 blocks, the model 3"),
        (wrong(tiny_sd3(), SoftTokenBank(2, 16)), "bank is one of cross-attention"),
        (
            wrong(tiny_unet(), SoftTokenBank(2, 24, 3)),
            "bank has num_layers=3; UNet2DConditionModel takes one with None",
        ),
        (wrong(tiny_sd3(), SoftTokenBank(2, 16, 3), ("down",)), "stages and position are of UNets"),
        (wrong(tiny_unet(), SoftTokenBank(2, 24), ("top",)), r"stages must be some of .* got \('top',\)"),
        (wrong(tiny_unet(), SoftTokenBank(2, 24), ()), "stages must be some of"),
        (wrong(tiny_unet(), SoftTokenBank(2, 24), ("down", "down")), "stages must be some of .*, each once"),
        (wrong(tiny_unet(), SoftTokenBank(2, 24), None, -1), "position must be >= 0, got -1"),
        (
            wrong(tiny_unet(up_block_types=("UpBlock2D", "UpBlock2D")), SoftTokenBank(2, 24), ("up",)),
            r"stages=\('up',\) of this UNet have no cross-attention",
        ),
        (wrong(tiny_unet(cross_attention_dim=(24, 32)), SoftTokenBank(2, 24)), r"different cross_attention_dim"),
        (
            wrong(
                diffusers.UNet2DModel(
                    block_out_channels=(16, 32),
                    norm_num_groups=4,
                    down_block_types=("DownBlock2D",) * 2,
                    up_block_types=("UpBlock2D",) * 2,
                ),
                SoftTokenBank(2, 24),
            ),
            "model is a UNet2DModel; soft tokens go into UNet2DConditionModel .* and SD3Transformer2DModel .* modules=",
        ),
        (wrong(Foreign(), SoftTokenBank(2, 24, 1), modules=[Recorder()]), "they take a bank with num_layers=None"),
        (wrong(Foreign(), SoftTokenBank(2, 24), modules=[]), "modules must be some whose forward has"),
        (wrong(Foreign(), SoftTokenBank(2, 24), modules=[nn.Linear(2, 2)]), "modules must be some whose forward has"),
        (wrong(Recorder(), SoftTokenBank(2, 24), modules=[Recorder()]), "has no argument timestep"),
    ],
)
def test_what_does_not_fit_is_refused(call, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        call()
