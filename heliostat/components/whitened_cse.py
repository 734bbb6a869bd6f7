"""WhitenedCSE: contrastive sentence embeddings with shuffled group whitening (ACL 2023, arXiv 2305.17746).

Unsupervised SimCSE encodes a sentence several times under dropout and pulls the copies together by InfoNCE.
WhitenedCSE whitens every view in small random groups of channels before the loss: uniformity comes from the whitening,
and each sentence gets several differently distorted positives. For encoders whose space is anisotropic, with all
cosines near 1; one that is already isotropic gains nothing. Training only: inference is the plain encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heliostat.components.distributed import default_group, gather_rows
from heliostat.components.group_whitening import ShuffledGroupWhitening, WhiteningMethod

RowOrder = Literal["view", "instance"]


def whitened_infonce_loss(
    views: Tensor,
    temperature: float = 0.05,
    view_weights: Tensor | Sequence[float] | None = None,
    *,
    candidates: Tensor | None = None,
    first_candidate: int = 0,
) -> Tensor:
    """InfoNCE of view 0 against each other view, summed over the views.

        L = sum_{v=1..V-1} omega_v / B sum_i -log( e^{cos(z_0i, z_vi) / tau} / sum_j e^{cos(z_0i, z_vj) / tau} )

    View 0 is the only anchor; view v brings its own positives and negatives. The V - 1 terms are summed, so the
    gradient grows with V, as in the released code. With V = 2 this is SimCSE's loss.

    Args:
        views: Projected views z, shape ``(V, B, d)``, V >= 2, any scale.
        temperature: tau > 0.
        view_weights: omega, V - 1 numbers; default: ones.
        candidates: Rows to tell apart, ``(V, M, d)``, e.g. those of all processes; default: ``views``.
        first_candidate: Where the B rows of ``views`` stand among the candidates.

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: On shapes that do not fit or ``temperature <= 0``.
    """
    if views.ndim != 3 or views.shape[0] < 2 or views.shape[1] == 0:
        raise ValueError(f"views must have shape (V, B, d) with V >= 2 and B >= 1, got {tuple(views.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    count, rows, _ = views.shape
    candidates = views if candidates is None else candidates
    if candidates.ndim != 3 or candidates.shape[::2] != views.shape[::2]:
        raise ValueError(f"candidates must have shape ({count}, M, {views.shape[2]}), got {tuple(candidates.shape)}")
    if not 0 <= first_candidate <= candidates.shape[1] - rows:
        raise ValueError(
            f"first_candidate must lie in 0..{candidates.shape[1] - rows}, got {first_candidate}: "
            f"{rows} rows among {candidates.shape[1]} candidates"
        )
    dtype = torch.promote_types(views.dtype, torch.float32)
    weights = torch.ones(count - 1) if view_weights is None else torch.as_tensor(view_weights)
    if weights.shape != (count - 1,):
        raise ValueError(f"view_weights must hold V - 1 = {count - 1} numbers, got shape {tuple(weights.shape)}")
    with torch.autocast(views.device.type, enabled=False):
        anchors = F.normalize(views[0].to(dtype), dim=-1, eps=1e-8)  # (B, d)
        others = F.normalize(candidates[1:].to(dtype), dim=-1, eps=1e-8)  # (V-1, M, d)
        logits = anchors @ others.mT / temperature  # (V-1, B, M)
        target = torch.arange(first_candidate, first_candidate + rows, device=views.device).repeat(count - 1)
        terms = F.cross_entropy(logits.flatten(0, 1), target, reduction="none").view(count - 1, rows).mean(1)
        return terms @ weights.to(terms)


class WhitenedInfoNCELoss(nn.Module):
    """`whitened_infonce_loss` over the rows of all processes.

    Args:
        temperature: tau > 0.
        view_weights: omega, one number for each view but the first; default: ones.
        gather: Use the other processes' rows as negatives whenever `torch.distributed` runs. Averaged over processes,
            value and gradient are then those of one process with the whole batch.
    """

    def __init__(
        self, temperature: float = 0.05, view_weights: Sequence[float] | None = None, gather: bool = True
    ) -> None:
        super().__init__()
        self.temperature, self.view_weights, self.gather = temperature, view_weights, gather

    def forward(self, views: Tensor) -> Tensor:
        """Loss of ``views`` of shape ``(V, B, d)``."""
        group = default_group() if self.gather else None
        if group is None:
            return whitened_infonce_loss(views, self.temperature, self.view_weights)
        candidates = gather_rows(views.transpose(0, 1), group).transpose(0, 1)  # rows first: they are what is gathered
        return whitened_infonce_loss(
            views,
            self.temperature,
            self.view_weights,
            candidates=candidates,
            first_candidate=group.rank() * views.shape[1],
        )


def bert_linear(dim: int) -> nn.Linear:
    """A square `torch.nn.Linear` with BERT's initialisation: weights of standard deviation 0.02, no bias."""
    linear = nn.Linear(dim, dim)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


class ShuffledGroupWhiteningHead(nn.Module):
    """Shuffled group whitening, then Linear and tanh: what stands between encoder and loss in training.

    Args:
        dim: Hidden size d of the encoder.
        group_size: Channels a group; the authors' 128 groups of 768 channels.
        num_groups: The same said by the number of groups; takes the place of ``group_size``.
        eps: Ridge of the covariance, absolute; ``None``: 1e-5 of the group's mean variance. The authors use 0.
        detach_transform: Take the whitening matrix as a constant in backward, as the released code does.
        shuffle: Draw new groups for every view and step; ``False``: neighbouring channels.
        generator: CPU generator of the permutations; see `ShuffledGroupWhitening`.
        method: How the whitening matrix is found, see `group_whiten`.
        row_order: ``"view"``, the paper's figure: every view of the batch is whitened by itself. ``"instance"``, the
            released code: rows are laid out sentence by sentence and cut into V parts, so that all views of a sentence
            share permutation and statistics, and a sentence and most of its negatives do not.
        sync: Whiten with the statistics of all processes whenever `torch.distributed` runs (row order "view" only
            equals one process then).
    """

    def __init__(
        self,
        dim: int,
        group_size: int | None = None,
        *,
        num_groups: int | None = None,
        eps: float | None = None,
        detach_transform: bool = True,
        shuffle: bool = True,
        generator: torch.Generator | None = None,
        method: WhiteningMethod = "eigh",
        row_order: RowOrder = "view",
        sync: bool = True,
    ) -> None:
        super().__init__()
        if row_order not in get_args(RowOrder):
            raise ValueError(f"row_order must be one of {get_args(RowOrder)}, got {row_order!r}")
        self.shuffle, self.row_order = shuffle, row_order
        self.whitening = ShuffledGroupWhitening(
            dim,
            group_size=6 if group_size is None and num_groups is None else group_size,
            num_groups=num_groups,
            eps=eps,
            method=method,
            detach_transform=detach_transform,
            generator=generator,
            sync=sync,
        )
        self.linear = bert_linear(dim)

    def whiten(self, views: Tensor, permutations: Tensor | None = None) -> Tensor:
        """Whiten ``(V, B, d)``, the part before the projection; ``permutations`` ``(V, d)`` replace random ones."""
        if permutations is None and not self.shuffle:
            permutations = torch.arange(views.shape[2], device=views.device).repeat(len(views), 1)
        if self.row_order == "view":
            return self.whitening(views, permutations)
        parts = views.transpose(0, 1).reshape(views.shape)  # s0v0 s0v1 ... cut into V runs of B rows
        whitened = self.whitening(parts, permutations)
        return whitened.reshape(views.shape[1], views.shape[0], -1).transpose(0, 1)

    def forward(self, views: Tensor, permutations: Tensor | None = None) -> Tensor:
        """Projected views z ``(V, B, d)`` of the pooled encoder outputs h ``(V, B, d)``."""
        if views.ndim != 3:
            raise ValueError(f"views must have shape (V, B, d), got {tuple(views.shape)}")
        return self.linear(self.whiten(views, permutations)).tanh()
