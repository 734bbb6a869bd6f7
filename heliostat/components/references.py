"""What the anchors of a pair-based loss are compared with: their own batch, all processes' batches, or a given set."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from heliostat.components.distributed import gather_rows


class References(NamedTuple):
    """Anchors and references with their labels; ``own[i]`` is the place of anchor i among the references, or -1."""

    anchors: Tensor  # (N, d)
    labels: Tensor  # (N,)
    embeddings: Tensor  # (M, d); the very tensor `anchors` where the batch is compared with itself
    ref_labels: Tensor  # (M,)
    own: Tensor  # (N,)


def resolve_references(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    own_index: Tensor | None = None,
    normalize: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> References:
    """Check the arguments that all pair-based losses share, and say what is compared with what, in float32 or better.

    Args:
        embeddings: Anchors, ``(N, d)``.
        labels: Their classes, ``(N,)``, any integers.
        ref_embeddings: References, ``(M, d)``, with gradient if they require it; default: the batch itself.
        ref_labels: Their classes, ``(M,)``.
        own_index: Place of each anchor among the given references, -1 for one that is not there, ``(N,)`` int64;
            default: none is.
        normalize: Scale anchors and references to unit length.
        process_group: Compare with the rows of all its processes, with gradient; they must have as many rows each.

    Raises:
        ValueError: On shapes that do not fit, labels that are no integers, references with and without labels, or
            references together with a process group.
    """
    _check("embeddings", embeddings, "labels", labels)
    dtype = torch.promote_types(embeddings.dtype, torch.float32)

    def prepare(rows: Tensor) -> Tensor:
        return F.normalize(rows.to(dtype), dim=1, eps=1e-12) if normalize else rows.to(dtype)

    anchors, count = prepare(embeddings), len(embeddings)
    if ref_embeddings is None:
        if ref_labels is not None or own_index is not None:
            raise ValueError("ref_labels and own_index belong to ref_embeddings, which is None; pass it too")
        own = torch.arange(count, device=labels.device)
        if process_group is None or process_group.size() == 1:
            return References(anchors, labels, anchors, labels, own)
        own = own + process_group.rank() * count
        return References(anchors, labels, gather_rows(anchors, process_group), gather_rows(labels, process_group), own)
    if process_group is not None:
        raise ValueError(
            "ref_embeddings are all that anchors are compared with, so process_group would have no effect: gather the "
            "references yourself (heliostat.components.gather_rows) and pass process_group=None"
        )
    if ref_labels is None:
        raise ValueError("ref_embeddings needs ref_labels, their classes, got None")
    _check("ref_embeddings", ref_embeddings, "ref_labels", ref_labels)
    if ref_embeddings.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"ref_embeddings must be as wide as embeddings, d = {embeddings.shape[1]}, got {ref_embeddings.shape[1]}"
        )
    own = torch.full_like(labels, -1, dtype=torch.int64) if own_index is None else own_index
    if own.shape != (count,) or own.dtype != torch.int64:
        raise ValueError(
            f"own_index must be int64 of shape (N,) = ({count},), got {own.dtype} of shape {tuple(own.shape)}"
        )
    return References(anchors, labels, prepare(ref_embeddings), ref_labels, own)


def _check(name: str, embeddings: Tensor, labels_name: str, labels: Tensor) -> None:
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(f"{name} must be floating point of shape (N, d), got {embeddings.dtype} {embeddings.shape}")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{labels_name} must have shape (N,) with N = {name}.shape[0] = {len(embeddings)}, "
            f"got {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{labels_name} must be integers, got {labels.dtype}; convert them by .long()")
