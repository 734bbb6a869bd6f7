"""SoftREPA: errors of all pairs against a double loop and one call, and what soft tokens cost at inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor

from benchmarks.speed import Case, Factory, Run, Speed
from heliostat.components import (
    SoftTokenBank,
    attach_soft_tokens,
    denoising_contrastive_loss,
    pairwise_denoising_errors,
)

LATENT, LENGTH, WIDTH, POOLED = (4, 32, 32), 77, 256, 64
GRID_LATENT = (4, 16, 16)
PAIRS, CHUNK = 6, 6  # pictures and prompts; pairs that pass at once
TOKENS = 4


def unet() -> Any:
    """Stable Diffusion's UNet, narrower."""
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
    )


def sd3() -> Any:
    """SD3's transformer, narrower, with as many blocks to five with tokens."""
    return SD3Transformer2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        num_layers=12,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=WIDTH,
        caption_projection_dim=256,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=32,
    )


def model_and_tokens(make: Callable[[], Any], device: torch.device) -> tuple[Any, SoftTokenBank]:
    """The same weights for all contenders."""
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False).to(device)
    bank = SoftTokenBank.for_model(model, TOKENS).to(device)
    return model, bank


def denoise_with(model: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A call of a UNet or of an SD3, whose pooled prompts are zeros."""
    zeros = {"pooled_projections": POOLED} if isinstance(model, SD3Transformer2DModel) else {}

    def denoise(z: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        more = {name: z.new_zeros(len(z), width) for name, width in zeros.items()}
        return model(z, encoder_hidden_states=prompts, timestep=t.expand(len(z)), **more).sample

    return denoise


def grid(make: Callable[[], Any], errors: Callable[..., Tensor]) -> Factory:
    """The loss of a batch and the gradient of its tokens."""

    def prepare(device: torch.device) -> Run:
        model, bank = model_and_tokens(make, device)
        attach_soft_tokens(model, bank)
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(PAIRS, *GRID_LATENT, generator=generator).to(device)
        prompts = torch.randn(PAIRS, LENGTH, WIDTH, generator=generator).to(device)
        noise = torch.randn(1, *GRID_LATENT, generator=generator).to(device)

        def run() -> list[Tensor]:
            e = errors(denoise_with(model), latents, prompts, 400.0, noise)
            loss = denoising_contrastive_loss(e, temperature=1.0).loss
            return [loss.detach(), *torch.autograd.grad(loss, list(bank.parameters()))]

        return run

    return prepare


def chunked(*arguments: Any) -> Tensor:
    """Ours, a few pairs at a time."""
    return pairwise_denoising_errors(*arguments, chunk_size=CHUNK)


def double_loop(denoise: Callable[..., Tensor], x: Tensor, prompts: Tensor, timestep: float, noise: Tensor) -> Tensor:
    """What one writes first: one pair after the other."""
    t = torch.tensor(timestep, device=x.device)
    sigma = timestep / 1000
    rows = []
    for i in range(len(x)):
        noisy, target = (1 - sigma) * x[i : i + 1] + sigma * noise, noise - x[i : i + 1]
        rows.append(torch.stack([(denoise(noisy, t, c[None]) - target).square().mean() for c in prompts]))
    return torch.stack(rows)


def inference(make: Callable[[], Any], attached: bool) -> Factory:
    """A call of the denoiser as guidance makes it: a picture with a prompt and with nothing."""

    def prepare(device: torch.device) -> Run:
        model, bank = model_and_tokens(make, device)
        if attached:
            attach_soft_tokens(model, bank)
        generator = torch.Generator().manual_seed(1)
        z = torch.randn(2, *LATENT, generator=generator).to(device)
        prompts = torch.randn(2, LENGTH, WIDTH, generator=generator).to(device)
        t = torch.tensor(400.0, device=device)
        denoise = denoise_with(model)

        def run() -> list[Tensor]:
            with torch.no_grad():
                denoise(z, t, prompts)
            return []  # tokens make it another prediction

        return run

    return prepare


def cases() -> dict[str, Case]:
    """Both families."""
    made = {}
    for name, make in (("UNet", unet), ("SD3", sd3)):
        made[f"{name}: {PAIRS} x {PAIRS} pairs, forward and backward"] = Case(
            ours={
                f"chunks of {CHUNK} pairs": grid(make, chunked),
                "one call": grid(make, pairwise_denoising_errors),
            },
            peers={"double loop": grid(make, double_loop)},
            repeats=5,
        )
        made[f"{name}: a denoising step at inference"] = Case(
            ours={f"with {TOKENS} soft tokens": inference(make, attached=True)},
            peers={"without": inference(make, attached=False)},
        )
    return made


SPEED = Speed(
    summary=(
        f"A small UNet and a small SD3 transformer of diffusers on latents of 4 x 32 x 32 (pairs: 16 x 16), {LENGTH} "
        "text tokens, float32. Pairs: errors of all pairs, contrastive loss, and its gradient to the soft tokens; "
        "chunks compute the forward twice and keep the activations of one chunk only, the others keep all. Inference: "
        "one call of the denoiser with the two rows of guidance; tokens stand in the down blocks of the UNet and in 5 "
        "of the 12 blocks of the transformer, with a table over time. Here 'slower' is the price of the tokens."
    ),
    cases=cases(),
)
