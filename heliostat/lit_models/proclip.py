"""ProCLIP (arXiv 2510.18795): a language model's text embedder for a CLIP image tower, without forgetting.

Two stages, one module each: `ProCLIP(stage=1)` distils CLIP's own text tower into an adapter on the embedder, from
texts alone; `ProCLIP(stage=2)` tunes adapter and image tower contrastively, held near a slow average of the tower. The
mathematics is in `heliostat.components.proclip`. Embedder and CLIP's text tower are frozen throughout, so their vectors
come with the batches (`heliostat.ImageTextDataModule`), and this module holds neither.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from heliostat.components.proclip import (
    ContrastiveTuningLoss,
    Penalty,
    Reduction,
    TextAdapter,
    ema_update_,
    representation_inheritance_loss,
)
from heliostat.components.retrieval import cross_modal_recall
from heliostat.lit_models._evaluation import gather_once
from heliostat.lit_models._hparams import save_plain_hyperparameters
from heliostat.lit_models._optimization import Schedule, configure_optimizers

MAX_LOG_SCALE = math.log(100)
_HANDED_ON = ("adapter.", "log_logit_scale")  # what stage 2 takes from stage 1
_HALF = (torch.bfloat16, torch.float16)


class ProCLIP(LightningModule):
    """An image tower and an adapter on a text embedder, in one embedding space.

    Training batches hold ``text_embeddings`` ``(B, d_L)`` and, in stage 1, ``teacher_embeddings`` ``(B, d)`` of CLIP's
    own text tower, in stage 2 ``pixel_values`` ``(B, C, H, W)``. In stage 1 a second caption of each row may come as
    ``second_text_embeddings`` and ``second_teacher_embeddings``. Evaluation has a loader of pictures (``pixel_values``,
    ``group``, ``labels``, ``index``), one of texts (``text_embeddings``, ``group``, ``index``) and, if wanted, one of
    class prompts (``text_embeddings``, ``labels``, ``index``), told apart by these keys, in any order. A text fits a
    picture if their groups are equal; the label of a picture without a class is -1.

    Stage 1 trains the adapter and nothing else. Stage 2 trains adapter, image tower and the logarithm of the logit
    scale, which is kept in [0, ln 100]; its teacher is a copy of the image tower as training begins, which follows it
    by ``ema_decay`` a step of the optimizer, in float32 and in evaluation mode. BatchNorm layers of the tower keep
    their statistics, as otherwise it would be compared with a teacher that normalises differently. Hand over by
    ``stage2.load_state_dict(stage1.state_dict(), strict=False)`` or by ``init_from``.

    Logged are ``train/loss``, ``train/instance``, ``train/structure``, in stage 2 also ``train/contrastive`` and
    ``train/logit_scale``; and for ``val`` and ``test``, of the whole set: ``image_to_text_recall@K`` and
    ``text_to_image_recall@K``, the share of queries with a match among the K nearest; ``zero_shot_accuracy``, with the
    mean of a class's prompts as its classifier; in stage 1 ``loss``, the mean squared distance of a text to its
    teacher, if texts have ``teacher_embeddings``.

    Args:
        image_encoder: Maps ``pixel_values`` to ``(B, d)``, any scale, such as `heliostat.OpenCLIPImageTower`. Stage 1
            freezes it and uses it only to evaluate, so that it may be None there. Stage 2 trains what requires
            gradient, or all of it if nothing does, as stage 1 leaves it.
        embedding_dim: Width d_L of the text embedder.
        output_dim: Width d of the image tower; default: its attribute ``output_dim``.
        stage: 1 for representation inheritance, 2 for contrastive tuning.
        init_from: A checkpoint of stage 1, from which adapter and logit scale are taken.
        expansion_factor: See `heliostat.components.TextAdapter`; so are the next two.
        num_blocks: Residual blocks of the adapter.
        dropout: Of the adapter.
        reg_weight: lambda of stage 2, >= 0; 0 needs no teacher, and has none. The paper's 4e-4 is for
            ``reduction="sum"`` and 512 images a process.
        instance_weight: Weight of L_ins, in both stages.
        structure_weight: Weight of L_struct, in both stages.
        structure_penalty: ``"smooth_l1"`` of the released code or ``"squared"`` of the paper.
        reduction: ``"sum"`` is the paper's; ``"mean"`` makes both terms independent of the batch size.
        gather: Take both terms over the rows of all processes, so that n processes equal one. The released code takes
            each process's own. The contrastive term always is over all.
        ema_decay: alpha in [0, 1]; 1 keeps the teacher as it was when stage 2 began, as the released code does.
        init_logit_scale: The logarithm of the logit scale; default: the image tower's attribute ``logit_scale``, or
            ln(1 / 0.07) if it has none.
        image_lr_scale: Factor of the image tower's learning rate, > 0.
        recall_at: Depths K of Recall@K.
        optimizer: Makes the optimizer from parameter groups. Biases, parameters of less than two dimensions and the
            logit scale are not decayed, whatever its ``weight_decay``.
        lr_scheduler: ``"linear"`` (to zero), ``"cosine"``, ``"constant"``, or a callable.
        warmup_steps: Steps over which ``"linear"`` and ``"cosine"`` first rise.

    Raises:
        ValueError: For settings out of range or in contradiction, or if ``init_from`` does not fit.
        MisconfigurationException: If a batch lacks what its stage needs.
    """

    def __init__(
        self,
        image_encoder: nn.Module | None,
        embedding_dim: int,
        output_dim: int | None = None,
        *,
        stage: Literal[1, 2] = 1,
        init_from: str | Path | None = None,
        expansion_factor: int = 8,
        num_blocks: int = 1,
        dropout: float = 0.0,
        reg_weight: float = 4e-4,
        instance_weight: float = 1.0,
        structure_weight: float = 1.0,
        structure_penalty: Penalty = "smooth_l1",
        reduction: Reduction = "sum",
        gather: bool = False,
        ema_decay: float = 0.999,
        init_logit_scale: float | None = None,
        image_lr_scale: float = 1.0,
        recall_at: Sequence[int] = (1, 5, 10),
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05
        ),
        lr_scheduler: Schedule | LRSchedulerCallable = "cosine",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        if stage not in (1, 2):
            raise ValueError(f"stage must be 1 (representation inheritance) or 2 (contrastive tuning), got {stage!r}")
        if image_encoder is None and stage == 2:
            raise ValueError("image_encoder is what stage 2 trains, got None")
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay must be in [0, 1], got {ema_decay}")
        if not image_lr_scale > 0:
            raise ValueError(
                f"image_lr_scale must be > 0, got {image_lr_scale}; requires_grad_(False) keeps parts of a tower fixed"
            )
        if not recall_at or min(recall_at) < 1:
            raise ValueError(f"recall_at must hold depths >= 1, got {list(recall_at)}")
        width = getattr(image_encoder, "output_dim", output_dim)
        if width is None:
            raise ValueError(f"output_dim is needed: {type(image_encoder).__name__} has no attribute of that name")
        if output_dim not in (None, width):
            raise ValueError(f"output_dim is {output_dim}, but the image encoder's is {width}")
        if init_logit_scale is None:
            init_logit_scale = float(getattr(image_encoder, "logit_scale", math.log(1 / 0.07)))
        if not 0 <= init_logit_scale < MAX_LOG_SCALE + 1e-3:  # CLIP's own is ln 100, rounded
            raise ValueError(
                f"init_logit_scale is a logarithm, from 0 to ln 100 = {MAX_LOG_SCALE:.3f}, got {init_logit_scale}"
            )
        self.stage, self.reg_weight, self.ema_decay = stage, reg_weight, ema_decay
        self.image_encoder = image_encoder
        self.adapter = TextAdapter(embedding_dim, width, expansion_factor, num_blocks, dropout)
        self.log_logit_scale = nn.Parameter(torch.tensor(min(init_logit_scale, MAX_LOG_SCALE)))
        self.inheritance: dict[str, Any] = {
            "instance_weight": instance_weight,
            "structure_weight": structure_weight,
            "penalty": structure_penalty,
            "reduction": reduction,
            "gather": gather,
        }
        self.loss = ContrastiveTuningLoss(reg_weight, **self.inheritance)
        self.teacher = None
        if stage == 1:
            self.log_logit_scale.requires_grad_(False)
            if image_encoder is not None:
                image_encoder.requires_grad_(False)
        elif image_encoder is not None:
            if not any(p.requires_grad for p in image_encoder.parameters()):
                image_encoder.requires_grad_(True)
            if reg_weight > 0:
                self.teacher = _Teacher(image_encoder)
        if init_from is not None:
            self._init_from(Path(init_from))
            if "init_from" in self.hparams:  # its checkpoints hold the weights, and load without that file
                self.hparams["init_from"] = None
        self.image_lr_scale, self.recall_at = image_lr_scale, tuple(recall_at)
        self.optimizer, self.lr_scheduler, self.warmup_steps = optimizer, lr_scheduler, warmup_steps
        self.train()  # pretrained towers may come in eval mode
        self._rows: dict[str, list[tuple[Tensor, ...]]] = {}

    def _init_from(self, path: Path) -> None:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = checkpoint.get("state_dict", {}) if isinstance(checkpoint, dict) else {}
        saved = {name: value for name, value in saved.items() if name.startswith(_HANDED_ON)}
        wanted = {name: value.shape for name, value in self.state_dict().items() if name.startswith(_HANDED_ON)}
        missing, unknown = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
        differing = [
            f"{name} {tuple(saved[name].shape)} instead of {tuple(shape)}"
            for name, shape in wanted.items()
            if name in saved and saved[name].shape != shape
        ]
        if missing or unknown or differing:
            raise ValueError(
                f"init_from={str(path)!r} does not fit: it lacks {missing}, has besides {unknown} and {differing}. "
                "Take a checkpoint of ProCLIP with these embedding_dim, output_dim, expansion_factor and num_blocks"
            )
        self.load_state_dict(saved, strict=False)

    def train(self, mode: bool = True) -> ProCLIP:
        """Set training mode, in which teacher, the image tower of stage 1, and BatchNorm stay in evaluation mode."""
        super().train(mode)
        if self.image_encoder is not None:
            for module in self.image_encoder.modules():
                if self.stage == 1 or isinstance(module, _BatchNorm):
                    module.training = False
        return self

    def forward(self, pixel_values: Tensor, text_embeddings: Tensor) -> Tensor:
        """Logits ``(N, M)`` of N pictures and M texts: cosines times the logit scale."""
        return self.log_logit_scale.exp() * self.encode_image(pixel_values) @ self.encode_text(text_embeddings).mT

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Unit-length embeddings ``(B, d)``, float32 at least, of pictures ``(B, C, H, W)``."""
        return _unit(self._image_features(pixel_values))

    def encode_text(self, text_embeddings: Tensor) -> Tensor:
        """Unit-length embeddings ``(B, d)``, float32 at least, of the embedder's ``(B, d_L)``."""
        return _unit(self.adapter(text_embeddings))

    def _image_features(self, pixel_values: Tensor) -> Tensor:
        if self.image_encoder is None:
            raise MisconfigurationException(
                "image_encoder is None, and there are pictures to embed: give it, or leave them out of the evaluation"
            )
        features = self.image_encoder(pixel_values)
        if features.shape != (len(pixel_values), self.adapter.output_dim):
            raise MisconfigurationException(
                f"image_encoder must map B pictures to (B, output_dim = {self.adapter.output_dim}), got "
                f"{tuple(features.shape)} for {len(pixel_values)}"
            )
        return features

    # --- training ----------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Take the image tower as it is now, its weights loaded, for the teacher, unless this run is a resumed one."""
        if self.teacher is not None and not self.teacher.started:
            assert self.image_encoder is not None
            ema_update_(self.teacher.network, self.image_encoder, 0.0)
            self.teacher.started.fill_(True)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Align the texts with their teacher, or contrast them with their pictures."""
        text = self.adapter(self._field(batch, "text_embeddings"))
        if self.stage == 1:
            second = batch.get("second_text_embeddings")
            parts = representation_inheritance_loss(
                text,
                self._field(batch, "teacher_embeddings"),
                student_second=None if second is None else self.adapter(second),
                teacher_second=None if second is None else self._field(batch, "second_teacher_embeddings"),
                **self.inheritance,
            )._asdict()
        else:
            pixels = self._field(batch, "pixel_values")
            teacher = None if self.teacher is None else self.teacher(pixels)
            scale = self.log_logit_scale.exp()
            parts = self.loss(self._image_features(pixels), text, scale, teacher)._asdict()
            self.log("train/logit_scale", scale, batch_size=len(text))
        loss = parts.pop("total")
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(text))
        self.log_dict({f"train/{k}": v for k, v in parts.items()}, sync_dist=True, batch_size=len(text))
        return loss

    def _field(self, batch: dict[str, Any], name: str) -> Tensor:
        if name not in batch:
            raise MisconfigurationException(
                f"stage {self.stage} needs {name!r} in its training batches, which have {sorted(batch)}: "
                + _REMEDIES.get(name, "see heliostat.ProCLIP")
            )
        return batch[name]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and schedule given to ``__init__``, in groups, with what follows each of its steps."""
        tower = () if self.image_encoder is None else self.image_encoder.named_parameters(prefix="image_encoder")
        rest = [("log_logit_scale", self.log_logit_scale), *self.adapter.named_parameters(prefix="adapter")]
        groups = []
        for named, lr_scale in ((rest, 1.0), (list(tower), self.image_lr_scale)):
            decayed: list[Tensor] = []
            others: list[Tensor] = []
            for name, parameter in named:
                if parameter.requires_grad:
                    (others if parameter.ndim < 2 or name.endswith("bias") else decayed).append(parameter)
            groups += [
                {"params": decayed, "lr_scale": lr_scale},
                {"params": others, "lr_scale": lr_scale, "weight_decay": 0.0},
            ]
        configured: Any = configure_optimizers(
            self,
            self.optimizer,
            self.lr_scheduler,
            groups=[group for group in groups if group["params"]],
            warmup_steps=self.warmup_steps,
        )
        if self.stage == 2:
            optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
            # Not a hook of the batch: callbacks save checkpoints before those of the module are called. And a step that
            # a gradient scaler leaves out does not come here.
            optimizer.register_step_post_hook(self._after_step)
        return configured

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.log_logit_scale.clamp_(0, MAX_LOG_SCALE)
        if self.teacher is not None:
            assert self.image_encoder is not None
            ema_update_(self.teacher.network, self.image_encoder, self.ema_decay)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embed pictures, texts or class prompts."""
        if "pixel_values" in batch:
            kind, columns = "images", [batch["group"], batch["labels"], self.encode_image(batch["pixel_values"])]
        else:
            text = self.encode_text(batch["text_embeddings"])
            kind, key = ("texts", "group") if "group" in batch else ("prompts", "labels")
            columns = [batch[key], text]
            if kind == "texts" and self.stage == 1 and "teacher_embeddings" in batch:
                columns.append((text - _unit(batch["teacher_embeddings"])).square().sum(1))
        self._rows.setdefault(kind, []).append((batch["index"], *columns))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation set."""
        with warnings.catch_warnings():
            if self.trainer.sanity_checking:  # on a few batches, of which most have no match
                warnings.simplefilter("ignore")
            self._log_metrics("val")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embed pictures, texts or class prompts."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole test set."""
        self._log_metrics("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Unit-length ``image_embeds`` and ``text_embeds``, of what the batch has."""
        encoders: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
            "pixel_values": ("image_embeds", self.encode_image),
            "text_embeddings": ("text_embeds", self.encode_text),
        }
        return {name: encode(batch[field]) for field, (name, encode) in encoders.items() if field in batch}

    def _log_metrics(self, stage: str) -> None:
        rows, self._rows = self._rows, {}
        whole = {
            kind: gather_once(*map(torch.cat, zip(*rows[kind], strict=True)))
            for kind in ("images", "texts", "prompts")  # in one order on all processes
            if kind in rows
        }
        if "texts" in whole and len(whole["texts"]) == 3:
            self.log(f"{stage}/loss", whole["texts"][2].mean(), sync_dist=True)
        if "images" not in whole:
            return
        image_groups, labels, images = whole["images"]
        if "texts" in whole:
            text_groups, texts, *_ = whole["texts"]
            found = {
                "image_to_text": cross_modal_recall(images, texts, image_groups, text_groups, self.recall_at),
                "text_to_image": cross_modal_recall(texts, images, text_groups, image_groups, self.recall_at),
            }
            for direction, recalls in found.items():
                for k, recall in recalls.items():
                    name = f"{stage}/{direction}_recall@{k}"
                    self.log(name, recall, prog_bar=k == self.recall_at[0], sync_dist=True)
        if "prompts" in whole and (labels != -1).any():
            accuracy = _zero_shot_accuracy(images[labels != -1], labels[labels != -1], *reversed(whole["prompts"]))
            self.log(f"{stage}/zero_shot_accuracy", accuracy, prog_bar=True, sync_dist=True)


_REMEDIES = {
    "pixel_values": "let the data module load pictures",
    "teacher_embeddings": "they are what is distilled: give the data module CLIP's text tower as its teacher",
    "second_teacher_embeddings": "a second caption needs its teacher too",
}


class _Teacher(nn.Module):
    """A copy of the image tower that is never trained: in evaluation mode, without gradient, in float32 or better."""

    started: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.network._apply(lambda t: t.float() if t.dtype in _HALF else t)
        # Whether it has begun to follow the student; saved, so that a resumed run goes on with it.
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.train(False)

    def train(self, mode: bool = True) -> _Teacher:
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Teacher:
        # Trainer(precision="bf16-true") turns the whole module into bfloat16, in which the average would stand still.
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype in _HALF else result

        return super()._apply(moved, recurse)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.dtype not in _HALF:
            return self.network(pixel_values)
        with torch.autocast(pixel_values.device.type, dtype=pixel_values.dtype):
            return self.network(pixel_values)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


def _zero_shot_accuracy(images: Tensor, labels: Tensor, prompts: Tensor, prompt_labels: Tensor) -> Tensor:
    """Share of pictures, of unit length, nearest to the mean of their own class's prompts."""
    classes, members = prompt_labels.unique(return_inverse=True)
    means = F.normalize(prompts.new_zeros(len(classes), prompts.shape[1]).index_add(0, members, prompts), dim=1)
    without = int((~torch.isin(labels, classes)).sum())
    if without:
        rank_zero_warn(f"{without} of {len(labels)} pictures are of a class without a prompt, and count as wrong")
    return (classes[(images @ means.T).argmax(1)] == labels).float().mean()
