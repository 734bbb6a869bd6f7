"""Cross-batch memory (XBM, CVPR 2020, arXiv 1912.06798): compare a batch with the embeddings of earlier batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heliostat.components.distributed import default_group, gather_rows


class CrossBatchMemory(nn.Module):
    """A pair-based loss against the batch, with gradient, and a queue of past embeddings, without.

    Embeddings drift slowly once training has settled, so those of earlier batches are negatives and positives for the
    price of a product. The queue holds the rows of all processes, the same on each, and is part of the state dict: a
    resumed training goes on with it. Rows enter it, as they are, after the loss, in training mode only.

    Args:
        loss: Called as ``loss(embeddings, labels, ref_embeddings=, ref_labels=, own_index=)``, such as
            `heliostat.components.MultiSimilarityLoss` or `heliostat.components.PairLoss`.
        size: Rows remembered; the oldest are replaced.
        embedding_dim: d.
        warmup: Calls before the memory is used (the paper: 1,000), while embeddings still change much.

    Raises:
        ValueError: If ``size`` or ``embedding_dim`` is not positive, ``warmup`` is negative, or embeddings have another
            width.
    """

    features: Tensor
    labels: Tensor
    calls: Tensor
    stored: Tensor

    def __init__(self, loss: nn.Module, size: int, embedding_dim: int, *, warmup: int = 0) -> None:
        super().__init__()
        if size < 1 or embedding_dim < 1 or warmup < 0:
            raise ValueError(
                f"size and embedding_dim must be >= 1 and warmup >= 0, got {size}, {embedding_dim} and {warmup}"
            )
        self.loss, self.warmup = loss, warmup
        self.register_buffer("features", torch.zeros(size, embedding_dim))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("stored", torch.tensor(0))  # rows that ever entered; modulo size: where the next one goes

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Loss of ``embeddings`` ``(N, d)`` with ``labels`` ``(N,)`` against batch and memory."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.features.shape[1]:
            raise ValueError(
                f"embeddings must have shape (N, {self.features.shape[1]}), the memory's embedding_dim, "
                f"got {tuple(embeddings.shape)}"
            )
        group = default_group()
        batch, batch_labels = gather_rows(embeddings, group), gather_rows(labels, group)
        first = 0 if group is None else group.rank() * len(embeddings)
        own = torch.arange(first, first + len(embeddings), device=embeddings.device)
        usable = min(int(self.stored), len(self.features)) if int(self.calls) >= self.warmup else 0
        value: Tensor = self.loss(
            embeddings,
            labels,
            ref_embeddings=torch.cat([batch, self.features[:usable].to(batch)]),
            ref_labels=torch.cat([batch_labels, self.labels[:usable].to(labels)]),
            own_index=own,
        )
        if self.training:
            self._remember(batch.detach(), batch_labels)
        return value

    def _remember(self, rows: Tensor, labels: Tensor) -> None:
        size = len(self.features)
        rows, labels = rows[-size:], labels[-size:]
        places = (self.stored + torch.arange(len(rows), device=rows.device)) % size
        self.features[places] = rows.to(self.features)
        self.labels[places] = labels.to(self.labels)
        self.stored += len(rows)
        self.calls += 1
