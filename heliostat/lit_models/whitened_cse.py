"""WhitenedCSE (ACL 2023, arXiv 2305.17746), with unsupervised SimCSE (arXiv 2104.08821) as its special case.

Adapts a pretrained sentence encoder to unlabelled sentences. The mathematics is in `heliostat.components.whitened_cse`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.functional.regression import spearman_corrcoef

from heliostat.components.chunking import chunked_forward
from heliostat.components.embedding_geometry import alignment, uniformity
from heliostat.components.group_whitening import WhiteningMethod
from heliostat.components.pooling import Pooling, pool_tokens
from heliostat.components.whitened_cse import (
    RowOrder,
    ShuffledGroupWhiteningHead,
    WhitenedInfoNCELoss,
    bert_linear,
)
from heliostat.lit_models._evaluation import gather_once
from heliostat.lit_models._hparams import save_plain_hyperparameters
from heliostat.lit_models._optimization import Schedule, configure_optimizers
from heliostat.pretrained import load_text_encoder, load_tokenizer

POSITIVE_SCORE = 0.8  # pairs graded at least this count as positives for alignment, as in SimCSE (4 of 5 on STS-B)


class WhitenedCSE(LightningModule):
    """Contrastive sentence embeddings with shuffled group whitening.

    Training batches hold ``input_ids`` and ``attention_mask``; evaluation batches hold two such dicts, ``first`` and
    ``second``, with ``score`` in [0, 1] and the pair's ``index`` (see `heliostat.TextDataModule`). Logged are
    ``train/loss``, ``train/negatives`` and, for ``val`` and ``test``, ``spearman`` (rank correlation of cosine and
    score), ``alignment`` and ``uniformity`` (lower is better), all of the plain pooled embedding.

    Args:
        encoder: A transformers encoder: ``"minilm"`` (packaged, no download), a local directory, a hub id, or a module
            whose outputs have ``last_hidden_state`` and whose ``config`` has ``hidden_size``.
        tokenizer: Directory, hub id or tokenizer object; default: the encoder's own, if the encoder is a name.
        num_layers: Keep only the first layers of an encoder given by name.
        pooling: Which vector stands for the sentence, see `heliostat.components.pool_tokens`.
        whiten: Whiten the views; ``whiten=False, num_views=2`` is unsupervised SimCSE.
        num_views: How often a sentence is encoded, V >= 2. The loss sums V - 1 terms.
        group_size: Channels a whitening group; must divide the hidden size and be well below the batch size.
        eps: Ridge of the covariance, absolute; ``None``: 1e-5 of the group's mean variance.
        detach_transform: Take the whitening matrix as a constant in backward, as the released code does.
        shuffle: Draw new groups for every view and step.
        whitening_method: ``"eigh"``, ``"newton_schulz"`` or ``"cholesky"``, see `heliostat.components.group_whiten`.
        row_order: ``"view"`` is the paper's figure, ``"instance"`` the released code.
        share_encoder_pass: Encode once and let only the shuffled whitening tell the views apart: 1/V of the cost.
        temperature: tau of the loss.
        view_weights: Weights of the V - 1 terms; default: ones.
        freeze: Prefixes of encoder parameter names to keep fixed, such as ``embeddings``.
        chunk_size: Encode this many rows at a time and recompute them in backward: less memory, a third more time.
        optimizer: Makes the optimizer from the trainable parameters.
        lr_scheduler: ``"linear"`` (to zero), ``"cosine"``, ``"constant"``, or a callable.
    """

    def __init__(
        self,
        encoder: str | nn.Module,
        tokenizer: Any = None,
        *,
        num_layers: int | None = None,
        pooling: Pooling = "cls",
        whiten: bool = True,
        num_views: int = 3,
        group_size: int = 6,
        eps: float | None = None,
        detach_transform: bool = True,
        shuffle: bool = True,
        whitening_method: WhiteningMethod = "eigh",
        row_order: RowOrder = "view",
        share_encoder_pass: bool = False,
        temperature: float = 0.05,
        view_weights: Sequence[float] | None = None,
        freeze: Sequence[str] = (),
        chunk_size: int | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0),
        lr_scheduler: Schedule | LRSchedulerCallable = "linear",
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        if num_views < 2:
            raise ValueError(f"num_views must be >= 2, one anchor and at least one positive, got {num_views}")
        if share_encoder_pass and not (whiten and shuffle):
            raise ValueError("share_encoder_pass needs whiten and shuffle: without them all views would be equal")
        network: Any = encoder
        if isinstance(encoder, str):
            network, own_tokenizer = load_text_encoder(encoder, num_layers=num_layers)
            tokenizer = own_tokenizer if tokenizer is None else tokenizer
        elif num_layers is not None:
            raise ValueError("num_layers cuts an encoder given by name; build a module with the layers you want")
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        self.encoder = network
        self.encoder.train()  # transformers hands models over in eval mode, and dropout is what tells views apart
        self.tokenizer = tokenizer
        self._freeze(freeze)
        dim = self.encoder.config.hidden_size
        self.head: nn.Module
        if whiten:
            self.head = ShuffledGroupWhiteningHead(
                dim,
                group_size,
                eps=eps,
                detach_transform=detach_transform,
                shuffle=shuffle,
                method=whitening_method,
                row_order=row_order,
            )
        else:
            self.head = nn.Sequential(bert_linear(dim), nn.Tanh())
        self.loss = WhitenedInfoNCELoss(temperature, view_weights)
        self.pooling, self.num_views, self.share_encoder_pass = pooling, num_views, share_encoder_pass
        self.chunk_size, self.optimizer, self.lr_scheduler = chunk_size, optimizer, lr_scheduler
        self._pairs: list[tuple[Tensor, ...]] = []

    def _freeze(self, prefixes: Sequence[str]) -> None:
        for prefix in prefixes:
            matched = [p for name, p in self.encoder.named_parameters() if name.startswith(prefix)]
            if not matched:
                children = ", ".join(name for name, _ in self.encoder.named_children())
                raise ValueError(f"freeze: no encoder parameter begins with {prefix!r}; the encoder has: {children}")
            for parameter in matched:
                parameter.requires_grad_(False)

    def forward(self, **tokens: Tensor) -> Tensor:
        """Sentence embeddings ``(B, d)`` of ``input_ids``, ``attention_mask`` and whatever else the tokenizer made."""
        several = self.pooling in ("mean_first_last", "mean_top2")
        output = self.encoder(**tokens, **({"output_hidden_states": True} if several else {}))
        hidden = output.hidden_states if several else (output.last_hidden_state,)
        return pool_tokens(hidden, tokens["attention_mask"], self.pooling)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Encode every sentence ``num_views`` times, whiten, project, contrast."""
        rows = len(batch["input_ids"])
        repeats = 1 if self.share_encoder_pass else self.num_views
        tokens = {name: value.repeat(repeats, 1) for name, value in batch.items()}  # view-major: all of view 0 first
        hidden = chunked_forward(lambda chunk: self(**chunk), tokens, self.chunk_size)
        views = hidden.view(repeats, rows, -1).expand(self.num_views, -1, -1)  # (V, B, d)
        loss = self.loss(self.head(views))
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=rows)
        self.log("train/negatives", float(rows * self.trainer.world_size - 1), batch_size=rows)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Embed graded pairs."""
        self._pairs.append((batch["index"], batch["score"], self(**batch["first"]), self(**batch["second"])))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation set."""
        self._log_pair_metrics("val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Embed graded pairs."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole test set."""
        self._log_pair_metrics("test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Sentence embeddings."""
        return self(**batch)

    def _log_pair_metrics(self, stage: str) -> None:
        score, first, second = gather_once(*(torch.cat(parts) for parts in zip(*self._pairs, strict=True)))
        first, second = first.float(), second.float()
        self._pairs.clear()
        metrics = {
            "spearman": spearman_corrcoef(F.cosine_similarity(first, second), score),
            "uniformity": uniformity(torch.cat([first, second])),
        }
        positive = score >= POSITIVE_SCORE
        if positive.any():
            metrics["alignment"] = alignment(first[positive], second[positive])
        for name, value in metrics.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "spearman", sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and schedule given to ``__init__``."""
        return configure_optimizers(self, self.optimizer, self.lr_scheduler)

    @torch.no_grad()
    def encode(self, sentences: str | Sequence[str], *, batch_size: int = 64, max_length: int | None = None) -> Tensor:
        """Embed sentences, without whitening and projection, which belong to training.

        Args:
            sentences: One sentence or several.
            batch_size: Sentences at a time, sorted by length.
            max_length: Cut to this many tokens; default: what the encoder can take.

        Returns:
            ``(n, d)`` float32 on the CPU, in the order given; ``(d,)`` for a single string.
        """
        if isinstance(sentences, str):
            return self.encode([sentences], max_length=max_length)[0]
        tokenizer = self._require_tokenizer("encode")
        embeddings = torch.empty(len(sentences), self.encoder.config.hidden_size)
        by_length = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        training = self.training
        self.eval()
        try:
            for start in range(0, len(by_length), batch_size):
                rows = by_length[start : start + batch_size]
                tokens = tokenizer(
                    [sentences[i] for i in rows],
                    padding=True,
                    truncation=True,
                    max_length=max_length or self._max_tokens(),
                    return_tensors="pt",
                )
                embeddings[rows] = self(**tokens.to(self.device)).float().cpu()
        finally:
            self.train(training)
        return embeddings

    def _require_tokenizer(self, purpose: str) -> Any:
        if self.tokenizer is None:
            raise ValueError(f"{purpose} needs a tokenizer: pass tokenizer= with the encoder")
        return self.tokenizer

    def _max_tokens(self) -> int:
        positions = getattr(self.encoder.config, "max_position_embeddings", None) or 512
        return min(positions, self._require_tokenizer("encode").model_max_length)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write encoder and tokenizer so that transformers and sentence-transformers load the directory.

        ``AutoModel.from_pretrained(directory)`` gives the encoder, ``SentenceTransformer(directory)`` the encoder with
        its pooling. The projection and the whitening belong to training and are dropped.

        Args:
            directory: Where to write; made if missing.

        Raises:
            ValueError: If there is no tokenizer, or sentence-transformers has no such pooling.
        """
        if self.pooling not in _SENTENCE_TRANSFORMERS_POOLING:
            raise ValueError(
                f"sentence-transformers has no pooling {self.pooling!r}, only {list(_SENTENCE_TRANSFORMERS_POOLING)}. "
                "Save the encoder alone by `.encoder.save_pretrained(directory)`."
            )
        tokenizer = self._require_tokenizer("save_pretrained")
        directory = Path(directory)
        self.encoder.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        modes = {mode: name == self.pooling for name, mode in _SENTENCE_TRANSFORMERS_POOLING.items()}
        files: dict[str, Any] = {
            "modules.json": [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            ],
            "sentence_bert_config.json": {"max_seq_length": self._max_tokens(), "do_lower_case": False},
            "1_Pooling/config.json": {"word_embedding_dimension": self.encoder.config.hidden_size, **modes},
        }
        (directory / "1_Pooling").mkdir(exist_ok=True)
        for name, content in files.items():
            (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_SENTENCE_TRANSFORMERS_POOLING: Mapping[Pooling, str] = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}
