"""U-REPA (arXiv 2503.18414): train a diffusion U-Net whose middle is aligned with a vision transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from heliostat.components.diffusion import Path
from heliostat.components.u_repa import Relation, RepresentationAligner
from heliostat.lit_models._hparams import save_plain_hyperparameters
from heliostat.lit_models._optimization import Schedule
from heliostat.lit_models.diffusion import Diffusion, Noised


class UREPA(Diffusion):
    """Diffusion or flow matching, with a layer of the denoiser aligned with a frozen teacher's view of the clean data.

    Training batches also hold ``teacher_features`` ``(B, N, D)``, the teacher's patch tokens of the clean pictures,
    without class token; `heliostat.DiffusionDataModule` gives them, from a cache, if it has a ``teacher``. The
    projector is trained by the denoiser's optimizer. Sampling does not use it.

    Logged besides what `heliostat.Diffusion` logs, in training, and in evaluation of batches that have
    ``teacher_features``: ``cosine``, the mean cosine of the projected tokens and the teacher's, which is -L_tok;
    ``shuffled_cosine``, that to the teacher's tokens of other pictures, which shows how much the position alone gives;
    ``manifold``, L_man. In evaluation a process compares its own rows.

    Args:
        denoiser: See `heliostat.Diffusion`; so is the next.
        scheduler: A scheduler of diffusers.
        teacher_dim: Width D of the teacher's tokens.
        layer: What is aligned: the path of a module in the denoiser, such as ``"mid_block"``, ``"down_blocks.1"`` or
            ``"transformer_blocks.7"``. It returns ``(B, C, h, w)`` or ``(B, N, C)``. For a U-Net without a
            ``mid_block`` it is its last down block.
        in_channels: Channels C that the layer returns. Default: those of the last convolution or linear layer in it.
        hidden_dim: Width of the projector.
        grid: Rows and columns (H, W) of the teacher's tokens; needed only if they are not in the shape of the layer's.
        align_weight: lambda, >= 0; 0 is `heliostat.Diffusion`, bit by bit.
        manifold_weight: w, >= 0.
        relation: ``"token"``, ``"sample"`` or ``"batch"``: whose similarities are aligned. See
            `heliostat.components.manifold_alignment_loss`; so are the next two.
        center: Subtract the tokens' mean before similarities are taken.
        max_tokens: Positions that are compared, drawn anew in each step.
        stop_step: Step of the optimizer from which on nothing is aligned; None: never.
        path: See `heliostat.Diffusion`; so are the next two.
        optimizer: Makes the optimizer.
        lr_scheduler: Its schedule.

    Raises:
        ValueError: For settings out of range, a layer that is not there, or features of another shape.
        MisconfigurationException: A training batch has no ``teacher_features``.
    """

    def __init__(
        self,
        denoiser: str | nn.Module,
        scheduler: Any = None,
        *,
        teacher_dim: int,
        layer: str = "mid_block",
        in_channels: int | None = None,
        hidden_dim: int = 2048,
        grid: tuple[int, int] | None = None,
        align_weight: float = 0.5,
        manifold_weight: float = 3.0,
        relation: Relation = "token",
        center: bool = False,
        max_tokens: int | None = None,
        stop_step: int | None = None,
        path: Path = "linear",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0),
        lr_scheduler: Schedule | LRSchedulerCallable = "constant",
    ) -> None:
        super().__init__(denoiser, scheduler, path=path, optimizer=optimizer, lr_scheduler=lr_scheduler)
        save_plain_hyperparameters(self)
        self.aligner = RepresentationAligner(
            self.denoiser,
            layer,
            teacher_dim,
            in_channels=in_channels,
            hidden_dim=hidden_dim,
            grid=grid,
            align_weight=align_weight,
            manifold_weight=manifold_weight,
            relation=relation,
            center=center,
            max_tokens=max_tokens,
            stop_step=stop_step,
        )
        self._to_align: Tensor | None = None  # teacher's features, in evaluation

    def training_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The denoiser's loss and the alignment's."""
        if not self.aligner.active(self.global_step):
            loss, parts = super().training_loss(batch)
            return loss + self.aligner.nothing(), parts
        if "teacher_features" not in batch:
            raise MisconfigurationException(
                f"U-REPA needs 'teacher_features' in its training batches, which have only "
                f"{', '.join(map(repr, batch))}. DiffusionDataModule gives them with teacher=..., such as a "
                "heliostat.PatchEncoder"
            )
        with self.aligner.tap:
            loss, parts = super().training_loss(batch)
        alignment, report = self.aligner(batch["teacher_features"])
        return loss + alignment, {**parts, **report}

    def _measure(self, batch: dict[str, Any]) -> None:
        self._to_align = batch.get("teacher_features")
        super()._measure(batch)

    def _squared_errors(self, noised: Noised, batch: Mapping[str, Any]) -> Tensor:
        teacher_features, self._to_align = self._to_align, None  # of the right prompts, which come first
        if teacher_features is None:
            return super()._squared_errors(noised, batch)
        with self.aligner.tap:
            errors = super()._squared_errors(noised, batch)
        _, report = self.aligner(teacher_features)
        stage = "test" if self.trainer.testing else "val"
        self.log_dict({f"{stage}/{k}": v for k, v in report.items()}, sync_dist=True, batch_size=len(errors))
        return errors
