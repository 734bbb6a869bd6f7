"""Group whitening of several views, forward and backward, against the loops of Shuffled-DBN and WhitenedCSE."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import Case, Factory, Run, Speed
from heliostat.components import group_whiten_views

VIEWS = 3
EPS = 1e-5
SHAPES = [  # N, d, m
    (64, 384, 6),
    (128, 768, 6),
    *((256, 768, m) for m in (2, 4, 8, 16, 48, 96, 192)),
]


def whiten_as_published(x: Tensor, permutations: Tensor, *, group_size: int, detach_transform: bool) -> Tensor:
    """Whiten as the released code does: one call a view, `torch.linalg.eigh`, and autograd for the backward.

    Shuffled-DBN (arXiv 2105.00470) differentiates through eigh; WhitenedCSE (arXiv 2305.17746) copies the covariance
    out of the graph first. Its release also moves the covariance to the CPU for eigh: left out here, in its favour.
    """
    rows, dim = x.shape[1:]
    ridge = EPS * torch.eye(group_size, device=x.device)
    outputs = []
    for view, permutation in zip(x, permutations, strict=True):
        slabs = view[:, permutation].view(rows, dim // group_size, group_size).permute(1, 2, 0)  # (G, m, N)
        centred = slabs - slabs.mean(-1, keepdim=True)
        covariance = centred.bmm(centred.transpose(1, 2)) / rows + ridge
        lam, u = torch.linalg.eigh(covariance.detach() if detach_transform else covariance)
        transform = u.bmm(torch.diag_embed(lam.rsqrt())).bmm(u.transpose(1, 2))
        whitened = transform.bmm(centred).permute(2, 0, 1).reshape(rows, dim)
        outputs.append(whitened[:, permutation.argsort()])
    return torch.stack(outputs)


def contender(rows: int, dim: int, whiten: Any) -> Factory:
    """Build the factory of one forward and backward; it returns the whitened views and the gradient."""

    def prepare(device: torch.device) -> Run:
        generator = torch.Generator().manual_seed(0)  # the same data for all contenders, on every device
        x = torch.randn(VIEWS, rows, dim, generator=generator).to(device).requires_grad_()
        cotangent = torch.randn(VIEWS, rows, dim, generator=generator).to(device)
        permutations = torch.stack([torch.randperm(dim, generator=generator) for _ in range(VIEWS)]).to(device)

        def run() -> tuple[Tensor, Tensor]:
            y = whiten(x, permutations)
            (grad,) = torch.autograd.grad(y, x, cotangent)
            return y.detach(), grad

        return run

    return prepare


def _case(rows: int, dim: int, group_size: int, detach_transform: bool) -> Case:
    settings: dict[str, Any] = {"group_size": group_size, "detach_transform": detach_transform}
    ours = {"heliostat, eigh": partial(group_whiten_views, eps=EPS, **settings)}
    if group_size >= 48:  # where eigh becomes the larger part
        ours["heliostat, newton_schulz"] = partial(group_whiten_views, eps=EPS, method="newton_schulz", **settings)
    peer = "WhitenedCSE's loop, detached eigh" if detach_transform else "Shuffled-DBN's loop, autograd through eigh"
    return Case(
        ours={label: contender(rows, dim, whiten) for label, whiten in ours.items()},
        peers={peer: contender(rows, dim, partial(whiten_as_published, **settings))},
    )


SPEED = Speed(
    summary=f"Forward and backward of group whitening, {VIEWS} views (N, d), float32, standard normal data, a random "
    "channel permutation a view. Peers: the published codes' way, one call a view, covariance, eigh, back. With the "
    "full gradient theirs is autograd through eigh and ours the closed form; detached, the whitening matrix is a "
    "constant in both. Newton-Schulz approximates the same matrix by products alone.",
    cases={
        f"{'detached' if detached else 'full gradient'}, N={n} d={d} m={m}": _case(n, d, m, detached)
        for detached in (False, True)
        for n, d, m in SHAPES
        if not detached or n >= 2 * m  # a constant transform is unusable (and warned about) with fewer rows
    },
)
