"""What U-REPA costs: a training step with it, the teacher's features cached, against a plain one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import UNet2DModel
from torch import Tensor

from benchmarks.speed import Case, Factory, Run, Speed
from heliostat import UREPA, Diffusion
from heliostat.components import manifold_alignment_loss

SMALL: dict[str, Any] = {  # the recipe's
    "denoiser": {"sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 48, 64)},
    "batch": 64,
    "tokens": (16, 1280),
    "projector": 128,
}
LARGE: dict[str, Any] = {  # Stable Diffusion's widths, without its second layers and last level
    "denoiser": {"sample_size": 32, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280)},
    "batch": 2,
    "tokens": (256, 768),
    "projector": 2048,
}


def step(size: dict[str, Any], aligned: bool) -> Factory:
    """Forward, backward and AdamW, as in training."""

    def prepare(device: torch.device) -> Run:
        torch.manual_seed(0)
        levels = len(size["denoiser"]["block_out_channels"])
        denoiser = UNet2DModel(
            **size["denoiser"],
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            norm_num_groups=16,
        )
        side, channels = size["denoiser"]["sample_size"], size["denoiser"]["in_channels"]
        tokens, width = size["tokens"]
        batch = {"pixel_values": torch.randn(size["batch"], channels, side, side, device=device)}
        if aligned:
            batch["teacher_features"] = torch.randn(size["batch"], tokens, width, device=device)
            module: Diffusion = UREPA(denoiser, teacher_dim=width, hidden_dim=size["projector"])
        else:
            module = Diffusion(denoiser)
        module.to(device)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

        def run() -> tuple[Tensor, ...]:
            loss, _ = module.training_loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return ()  # noise is drawn anew in every call

        return run

    return prepare


def manifold(relation: Literal["token", "batch"], by_hand: bool) -> Factory:
    """Loss and gradient for the tokens of DINOv2 ViT-B/14 at 224 pixels."""

    def prepare(device: torch.device) -> Run:
        generator = torch.Generator().manual_seed(0)
        target, projected = (torch.randn(16, 256, 768, generator=generator).to(device) for _ in range(2))
        projected.requires_grad_()

        def run() -> tuple[Tensor, ...]:
            if by_hand:
                p, y = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (projected, target))
                if relation == "batch":
                    p, y = p.flatten(0, 1), y.flatten(0, 1)
                value = (p @ p.mT - y @ y.mT).pow(2).mean()
            else:
                value = manifold_alignment_loss(projected, target, relation=relation)
            return value.detach(), *torch.autograd.grad(value, projected)

        return run

    return prepare


def _title(size: dict[str, Any]) -> str:
    denoiser = size["denoiser"]
    return (
        f"widths {denoiser['block_out_channels']}, {denoiser['sample_size']} x {denoiser['sample_size']} x "
        f"{denoiser['in_channels']}, batch {size['batch']}, {size['tokens'][0]} tokens of {size['tokens'][1]}, "
        f"projector {size['projector']}"
    )


RELATIONS: tuple[Literal["token", "batch"], ...] = ("token", "batch")
SPEED = Speed(
    summary="One training step of an unconditional U-Net of diffusers with one layer a level, float32: noise, forward, "
    "loss, backward, AdamW. Ours: with U-REPA, lambda 0.5, w 3, of teacher's features that are in memory. Peer: the "
    "same step without; its time in ours is what alignment leaves of it. The second is of Stable Diffusion's widths, "
    "in pictures of 256 pixels; a larger U-Net and batch make the projector's share smaller. Manifold loss: forward "
    "and backward, 16 pictures of 256 tokens of 768; peer: the equations as one writes them.",
    cases={
        _title(SMALL): Case(ours={"U-REPA": step(SMALL, True)}, peers={"plain step": step(SMALL, False)}),
        _title(LARGE): Case(ours={"U-REPA": step(LARGE, True)}, peers={"plain step": step(LARGE, False)}, repeats=5),
        **{
            f"manifold loss, relation {relation}": Case(
                ours={"heliostat": manifold(relation, False)}, peers={"as written": manifold(relation, True)}
            )
            for relation in RELATIONS
        },
    },
)
