"""Tiny denoisers of diffusers and rows to train them on, for tests of diffusion methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from heliostat.datamodules.loading import GlobalBatchSampler, ResumableLoader

_BLOCKS = {"layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
_SIZES = {"sample_size": 8, "in_channels": 3, "out_channels": 3}
WIDTH, POOLED_WIDTH, CLASSES = 12, 10, 4  # of the conditions


def tiny_denoiser(family: str, **settings: Any) -> Any:
    """A seeded denoiser for pictures (3, 8, 8): ``unet``, ``classes``, ``text``, ``sdxl``, ``sd3`` or ``dit``."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    if family in ("unet", "classes"):
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, **_BLOCKS}
        if family == "classes":
            settings = {"num_class_embeds": CLASSES + 1, **settings}
        return diffusers.UNet2DModel(**{**_SIZES, **blocks, "add_attention": False, **settings})
    if family in ("text", "sdxl"):
        kinds = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
        blocks = {"down_block_types": kinds[0], "up_block_types": kinds[1], **_BLOCKS}
        blocks |= {"cross_attention_dim": WIDTH, "attention_head_dim": 4}
        if family == "sdxl":
            blocks |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
            blocks["projection_class_embeddings_input_dim"] = POOLED_WIDTH + 6 * 4
        return diffusers.UNet2DConditionModel(**{**_SIZES, **blocks, **settings})
    blocks = {"patch_size": 2, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    if family == "sd3":
        blocks |= {"joint_attention_dim": WIDTH, "caption_projection_dim": 16, "pooled_projection_dim": POOLED_WIDTH}
        return diffusers.SD3Transformer2DModel(**{**_SIZES, **blocks, "pos_embed_max_size": 8, **settings})
    blocks |= {"num_embeds_ada_norm": CLASSES, "out_channels": 6, "norm_num_groups": 4}
    return diffusers.DiTTransformer2DModel(**{**_SIZES, **blocks, **settings})


def rows(count: int = 48, *, teacher: tuple[int, int] | None = None) -> list[dict[str, Tensor]]:
    """Seeded rows with every condition; ``teacher`` is the shape (N, D) of their ``teacher_features``."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"pixel_values": (3, 8, 8), "prompt_embeds": (5, WIDTH), "pooled_prompt_embeds": (POOLED_WIDTH,)}
    if teacher is not None:
        shapes["teacher_features"] = teacher
    made = []
    for index in range(count):
        row = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        row |= {f"negative_{name}": torch.zeros_like(row[name]) for name in row if name.endswith("prompt_embeds")}
        label = torch.tensor(index % CLASSES)
        made.append({**row, "labels": label, "negative_labels": torch.tensor(CLASSES), "index": torch.tensor(index)})
    return made


def batch_of(count: int = 4, **settings: Any) -> dict[str, Tensor]:
    """The first of `rows` in a batch."""
    made = rows(count, **settings)
    return {name: torch.stack([row[name] for row in made]) for name in made[0]}


class Rows(LightningDataModule):
    """Rows in batches of 16, that a resumed run goes on in; 20 a batch in evaluation."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.rows: Any = rows

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        sampler = GlobalBatchSampler(self.rows, 16, num_replicas=self.trainer.world_size, rank=self.trainer.global_rank)
        return ResumableLoader(self.rows, batch_size=sampler.local_batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=20)

    test_dataloader = val_dataloader
