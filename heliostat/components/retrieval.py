"""Exact nearest neighbours by cosine, and what retrieval is measured by: Recall@k and MAP@R (arXiv 2003.08505).

Recall@k asks whether one of a picture's k nearest neighbours shares its class. MAP@R looks at the R nearest, where R is
how many others its class has, and counts right ones that come early; it keeps growing when Recall@1 is near 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RetrievalMetrics(NamedTuple):
    """What `retrieval_metrics` returns."""

    recall_at: dict[int, Tensor]
    """Recall@k by k, scalars in [0, 1]."""
    map_at_r: Tensor
    """MAP@R, a scalar in [0, 1]."""
    num_queries: int
    """Rows that the means are over: those whose class has another row."""


@torch.no_grad()
def nearest_neighbors(
    queries: Tensor, references: Tensor | None = None, k: int = 1, *, block_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Find the k references of largest cosine to each query, exactly.

    Memory grows with ``block_size * M + N * k``, not with N * M. Of equally similar references the first ones win, so
    that no order of computation decides. A NaN among the embeddings shows as a NaN similarity.

    Args:
        queries: ``(N, d)``, any scale.
        references: ``(M, d)``, any scale; None: the other queries, so that no row is its own neighbour.
        k: Neighbours a query, from 1 to M (to N - 1 without ``references``).
        block_size: Queries compared at a time, >= 1.

    Returns:
        Cosines ``(N, k)``, falling, float32 (float64 for float64 input), and indices of the references ``(N, k)``.

    Raises:
        ValueError: On shapes that do not fit, or ``k`` or ``block_size`` out of range.
    """
    blocks = [(cosines, indices) for _, cosines, indices in _ranked(queries, references, k, block_size)]
    cosines, indices = zip(*blocks, strict=True)
    return torch.cat(cosines), torch.cat(indices)


@torch.no_grad()
def retrieval_metrics(
    embeddings: Tensor, labels: Tensor, k: Sequence[int] = (1, 5, 10), *, block_size: int = 1024
) -> RetrievalMetrics:
    """Recall@k and MAP@R of a set that is searched in itself, in one pass.

    With R_i the number of other rows of row i's class, and rel_i(r) = 1 if its r-th neighbour is one of them:

        Recall@k = mean_i max_{r <= k} rel_i(r)
        MAP@R    = mean_i 1 / R_i sum_{r <= R_i} rel_i(r) (1 / r sum_{s <= r} rel_i(s))

    Rows with R_i = 0 have no right answer. They stay among the references, but the means leave them out, with a warning
    that counts them. Ties are broken as in `nearest_neighbors`. The metrics are NaN if there is a NaN among the
    embeddings, and if there is no query at all.

    Args:
        embeddings: ``(N, d)``, any scale.
        labels: ``(N,)`` integers.
        k: Depths, each >= 1. A depth of N - 1 and more looks at all other rows.
        block_size: Rows compared at a time, >= 1.

    Returns:
        Recall by k, MAP@R, and the number of queries.

    Raises:
        ValueError: On shapes that do not fit, or ``k`` or ``block_size`` out of range.
    """
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels must have shape ({len(embeddings)},), one a row, got {tuple(labels.shape)}")
    if not k or min(k) < 1:
        raise ValueError(f"k must hold depths >= 1, got {list(k)}")
    _, members, counts = labels.unique(return_inverse=True, return_counts=True)
    others = counts[members] - 1  # R_i
    is_query = others > 0
    num_queries = int(is_query.sum())
    if left_out := len(labels) - num_queries:
        warnings.warn(
            f"{left_out} of {len(labels)} rows are the only one of their class: as queries they have no right answer, "
            "and Recall@k and MAP@R leave them out",
            stacklevel=3,
        )
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    scores = embeddings.new_full((len(labels), len(k) + 1), torch.nan, dtype=dtype)
    if num_queries:
        depth = min(max(*k, int(others.max())), len(labels) - 1)
        rank = torch.arange(1, depth + 1, device=embeddings.device)
        for rows, cosines, indices in _ranked(embeddings, None, depth, block_size):
            right = (labels[indices] == labels[rows, None]).to(dtype) + 0 * cosines  # rel_i(r); NaN stays NaN
            wanted = others[rows, None]
            precision = right.cumsum(1) / rank * right * (rank <= wanted)
            average = precision.sum(1) / wanted[:, 0].clamp_min(1)
            scores[rows] = torch.stack([*(right[:, :depth_k].amax(1) for depth_k in k), average], dim=1)
    *recalls, map_at_r = scores[is_query].mean(0).unbind()
    return RetrievalMetrics(dict(zip(k, recalls, strict=True)), map_at_r, num_queries)


@torch.no_grad()
def cross_modal_recall(
    queries: Tensor,
    references: Tensor,
    query_groups: Tensor,
    reference_groups: Tensor,
    k: Sequence[int] = (1, 5, 10),
    *,
    block_size: int = 1024,
) -> dict[int, Tensor]:
    """Recall@k from one set into another, such as from pictures to their captions.

    Recall@k is the share of queries one of whose k nearest references, by cosine, has the query's group. Queries whose
    group no reference has are left out, with a warning that counts them. Ties are broken as in `nearest_neighbors`. The
    result is NaN if there is a NaN among the embeddings, and if no query is left.

    Args:
        queries: ``(N, d)``, any scale.
        references: ``(M, d)``, any scale.
        query_groups: ``(N,)`` integers: what belongs together has the same.
        reference_groups: ``(M,)`` integers.
        k: Depths, each >= 1. A depth of M and more looks at all references.
        block_size: Queries compared at a time, >= 1.

    Returns:
        Recall by k, scalars in [0, 1].

    Raises:
        ValueError: On shapes that do not fit, no references, or ``k`` or ``block_size`` out of range.
    """
    given = {"query_groups": (query_groups, queries), "reference_groups": (reference_groups, references)}
    for name, (labels, embeddings) in given.items():
        if labels.shape != embeddings.shape[:1]:
            raise ValueError(f"{name} must have shape ({len(embeddings)},), one a row, got {tuple(labels.shape)}")
    if not k or min(k) < 1:
        raise ValueError(f"k must hold depths >= 1, got {list(k)}")
    if len(references) == 0:
        raise ValueError("references must have at least one row to be found, got none")
    matched = torch.isin(query_groups, reference_groups)
    if left_out := int((~matched).sum()):
        warnings.warn(
            f"{left_out} of {len(queries)} queries have no reference of their group, and Recall@k leaves them out",
            stacklevel=3,
        )
    groups, depth = query_groups[matched], min(max(k), len(references))
    found = queries.new_zeros(len(groups), len(k), dtype=torch.promote_types(queries.dtype, torch.float32))
    for rows, cosines, indices in _ranked(queries[matched], references, depth, block_size):
        right = (reference_groups[indices] == groups[rows, None]).to(found) + 0 * cosines  # NaN stays NaN
        found[rows] = torch.stack([right[:, :depth_k].amax(1) for depth_k in k], dim=1)
    return dict(zip(k, found.mean(0).unbind(), strict=True))


def _ranked(
    queries: Tensor, references: Tensor | None, k: int, block_size: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield, block by block, the rows of the queries, their ``k`` largest cosines and where those stand."""
    itself = references is None
    if queries.ndim != 2 or (references is not None and references.shape[1:] != queries.shape[1:]):
        given = tuple(queries.shape) if references is None else (tuple(queries.shape), tuple(references.shape))
        raise ValueError(f"queries must be (N, d) and references (M, d), got {given}")
    most = len(queries) - 1 if references is None else len(references)
    if not 1 <= k <= most:
        raise ValueError(f"k must be from 1 to {most}, the number of rows to find, got {k}")
    if block_size < 1:
        raise ValueError(f"block_size must be >= 1, got {block_size}")
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        unit = F.normalize(queries.to(dtype), dim=1)
        targets = unit if references is None else F.normalize(references.to(dtype), dim=1)
        for start in range(0, len(unit), block_size):
            cosines = unit[start : start + block_size] @ targets.T
            rows = slice(start, start + len(cosines))
            if itself:
                cosines.diagonal(offset=start).fill_(-torch.inf)
            yield rows, *_largest(cosines, k)


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` along the rows, with ties going to the lower index."""
    top, where = values.topk(k, dim=1)
    where, order = where.sort(dim=1)
    top, order = top.gather(1, order).sort(dim=1, descending=True, stable=True)
    where = where.gather(1, order)
    cut = (values >= top[:, -1:]).sum(1) > k  # a tie that topk has cut in two, of which it may keep any part
    if cut.any():
        sorted_, order = values[cut].sort(dim=1, descending=True, stable=True)
        top[cut], where[cut] = sorted_[:, :k], order[:, :k]
    return top, where
