"""One Gaussian per class of labelled features, and the squared Mahalanobis distance to each of them.

Statistics of a trained classifier's features say where its classes lie: for class-aware test-time adaptation (CAFA,
arXiv 2206.00205), out-of-distribution scores (arXiv 1807.03888), drift. They are gathered in float64, batch by batch
and process by process, to the same result as one pass over everything. A covariance matrix a class takes
8 C D^2 bytes, 33 GB for C = 1000 and D = 2048; the tied covariance, one for all classes, takes 8 D^2.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heliostat.components.distributed import default_group

Covariance = Literal["class", "tied"]

_BLOCK_NUMBERS = 2**22  # numbers worked on at a time: 32 MB in float64
_JITTER_RAISES = 3


@dataclass(eq=False)
class ClassGaussians:
    """Number of samples, mean and covariance of C classes in D dimensions.

    Start from `class_gaussians` or `ClassGaussians.empty`, then `update` it with further batches. What is held are
    three plain tensors: ``torch.save(gaussians.state_dict(), path)`` keeps it, and
    ``ClassGaussians(**torch.load(path, weights_only=True))`` brings it back.

    Attributes:
        count: n_c, int64 ``(C,)``.
        mean: mu_c, float64 ``(C, D)``; zero for a class without samples.
        covariance: Sigma_c with divisor n_c, float64 ``(C, D, D)``; or their mean weighted by n_c, ``(D, D)``, if only
            the tied covariance is kept.

    Raises:
        ValueError: If the shapes do not fit together.
    """

    count: Tensor
    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        if self.count.ndim != 1 or self.mean.ndim != 2 or len(self.mean) != len(self.count):
            raise ValueError(
                f"count must be (C,) and mean (C, D), got {tuple(self.count.shape)} and {tuple(self.mean.shape)}"
            )
        classes, dim = self.mean.shape
        if self.covariance.shape not in ((classes, dim, dim), (dim, dim)):
            raise ValueError(
                f"covariance must be {(classes, dim, dim)} or, tied, {(dim, dim)}, got {tuple(self.covariance.shape)}"
            )
        with torch.inference_mode(False):  # statistics gathered in inference mode serve autograd later
            count, mean, covariance = self.count.long(), self.mean.double(), self.covariance.double()
            self.count, self.mean, self.covariance = (
                t.clone() if t.is_inference() else t for t in (count, mean, covariance)
            )

    @classmethod
    def empty(
        cls, num_classes: int, dim: int, covariance: Covariance = "class", device: torch.device | str | None = None
    ) -> ClassGaussians:
        """Gaussians of no samples, to be updated.

        Args:
            num_classes: C >= 1.
            dim: D >= 1.
            covariance: ``"class"`` keeps ``(C, D, D)``, of which the tied one can still be made; ``"tied"`` keeps
                ``(D, D)`` only.
            device: Where to gather.
        """
        if num_classes < 1 or dim < 1:
            raise ValueError(f"num_classes and dim must be >= 1, got {num_classes} and {dim}")
        _check_covariance(covariance)
        shape = (num_classes, dim, dim) if covariance == "class" else (dim, dim)
        return cls(
            torch.zeros(num_classes, dtype=torch.int64, device=device),
            torch.zeros(num_classes, dim, dtype=torch.float64, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
        )

    @property
    def tied(self) -> bool:
        """Whether only the tied covariance is kept."""
        return self.covariance.ndim == 2

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add samples in place. Only the classes that occur are touched, so small batches stay cheap with large C.

        Args:
            features: ``(N, D)``, finite, any floating dtype.
            labels: Integers in 0..C-1, ``(N,)``.

        Raises:
            ValueError: If shapes do not fit, a label is out of range or a feature is not finite.
        """
        classes, dim = self.mean.shape
        _check_samples(features, labels, classes)
        if features.shape[1] != dim:
            raise ValueError(f"features must have shape (N, {dim}), got {tuple(features.shape)}")
        x, labels = features.to(self.mean.device).double(), labels.to(self.mean.device).long()
        if not x.isfinite().all():
            broken = int((~x.isfinite().all(1)).sum())
            raise ValueError(f"features hold NaN or infinite values in {broken} of {len(x)} rows; drop these rows")
        added = torch.bincount(labels, minlength=classes)
        count = self.count + added
        shift = torch.zeros_like(self.mean).index_add_(0, labels, x - self.mean[labels])
        mean = self.mean + shift / count.clamp_min(1)[:, None]
        # About the new mean, old samples are their covariance and n_c times one point, the old mean. So a class's new
        # covariance is a sum of squares: of the new rows, and of that point weighted by sqrt(n_c).
        x = x - mean[labels]
        old = (self.mean - mean) * self.count.double().sqrt()[:, None]
        if self.tied:
            total = int(count.sum())
            self.covariance *= int(self.count.sum()) / max(total, 1)
            for rows in (x, old):
                self.covariance.addmm_(rows.mT, rows, alpha=1 / max(total, 1))
        else:
            self._update_each_class(x, labels, added, count.double(), old)
        self.count, self.mean = count, mean

    def _update_each_class(self, x: Tensor, labels: Tensor, added: Tensor, count: Tensor, old: Tensor) -> None:
        """Blocks of classes of similar size, their rows padded to the largest, so that a block is one product."""
        dim = x.shape[1]
        classes = added.argsort(descending=True)[: int((added > 0).sum())]  # those that occur, the most frequent first
        sizes = added[classes].tolist()
        position = torch.empty_like(added).index_copy_(0, classes, torch.arange(len(classes), device=x.device))
        position, order = position[labels].sort(stable=True)
        first_row = added[classes].cumsum(0) - added[classes]  # of a class in this order
        slot = torch.arange(len(x), device=x.device) - first_row[position]  # number of a row within its class
        start, row = 0, 0
        while start < len(classes):
            most = sizes[start]
            stop = start + max(1, _BLOCK_NUMBERS // ((most + 1 + dim) * dim))
            block, rows = classes[start:stop], slice(row, row + sum(sizes[start:stop]))
            points = x.new_zeros(len(block), most + 1, dim)
            points[position[rows] - start, slot[rows]] = x[order[rows]]
            points[:, most] = old[block]
            points /= count[block].sqrt()[:, None, None]
            kept = self.covariance[block].mul_((self.count[block] / count[block])[:, None, None])
            self.covariance[block] = kept.baddbmm_(points.mT, points)
            start, row = stop, rows.stop

    def merge(self, other: ClassGaussians) -> ClassGaussians:
        """Gaussians of the samples of both.

        Raises:
            ValueError: If number of classes, dimension or kind of covariance differ.
        """
        if self.mean.shape != other.mean.shape or self.covariance.shape != other.covariance.shape:
            raise ValueError(
                "only Gaussians of the same classes, features and kind of covariance can be merged, got mean "
                f"{tuple(self.mean.shape)} and {tuple(other.mean.shape)}, covariance {tuple(self.covariance.shape)} "
                f"and {tuple(other.covariance.shape)}"
            )
        count = self.count + other.count
        mean = self._share_of_mean(count) + other._share_of_mean(count)
        return self._finish(count, mean, self._scatter_about(mean).add_(other._scatter_about(mean)))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> ClassGaussians:
        """Gaussians of the samples of all processes, the same on each of them.

        Args:
            group: The processes; default: all of them. With one process, ``self`` is returned as it is.
        """
        group = group or default_group()
        if group is None or group.size() == 1:
            return self
        count = self.count.clone()
        dist.all_reduce(count, group=group)
        mean = self._share_of_mean(count)
        dist.all_reduce(mean, group=group)
        scatter = self._scatter_about(mean)
        dist.all_reduce(scatter, group=group)
        return self._finish(count, mean, scatter)

    def _share_of_mean(self, count: Tensor) -> Tensor:
        return self.mean * (self.count.double() / count.clamp_min(1))[:, None]

    def _scatter_about(self, mean: Tensor) -> Tensor:
        """Sum over the samples of (x - mean_c)(x - mean_c)^T, in the shape of the covariance."""
        moved = (self.mean - mean) * self.count.double().sqrt()[:, None]
        if self.tied:
            return (self.covariance * self.count.sum()).addmm_(moved.mT, moved)
        return (self.covariance * self.count[:, None, None]).baddbmm_(moved[:, :, None], moved[:, None, :])

    def _finish(self, count: Tensor, mean: Tensor, scatter: Tensor) -> ClassGaussians:
        divisor = count.sum() if self.tied else count[:, None, None]
        return ClassGaussians(count, mean, scatter.div_(divisor.clamp_min(1)))

    def class_mask(self, covariance: Covariance = "class") -> Tensor:
        """Which classes have a Gaussian, boolean ``(C,)``: two samples are needed, one if the covariance is tied."""
        _check_covariance(covariance)
        return self.count >= (2 if covariance == "class" else 1)

    @torch.no_grad()
    def precision_factor(
        self, covariance: Covariance = "class", shrinkage: float = 0.1, jitter: float = 1e-5
    ) -> Tensor:
        """Cholesky factor L of the regularised covariance, for `mahalanobis_sq`.

            R_c = (1 - gamma) S_c + gamma (tr S_c / D) I + eps I = L_c L_c^T,
            S_c = Sigma_c, or tied: S = sum_c n_c Sigma_c / sum_c n_c

        A matrix that is not positive definite to working precision gets ten times the jitter, up to three times, with a
        warning.

        Args:
            covariance: ``"class"`` (one matrix a class) or ``"tied"`` (one for all).
            shrinkage: gamma in [0, 1], towards a sphere of the same mean variance. Without it, a class of fewer samples
                than dimensions is measured along directions in which it never varied.
            jitter: eps >= 0, in units of a feature squared.

        Returns:
            Lower triangular, float64: ``(C, D, D)``, or ``(D, D)`` if tied.

        Raises:
            ValueError: On settings out of range, if only the tied covariance was kept and ``"class"`` is asked for, or
                if a matrix cannot be factorised.
        """
        _check_covariance(covariance)
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must be in [0, 1], got {shrinkage}")
        if not jitter >= 0:
            raise ValueError(f"jitter must be >= 0, got {jitter}")
        if covariance == "class" and self.tied:
            raise ValueError(
                "these Gaussians keep the tied covariance only: ask for covariance='tied', or gather them anew with "
                "covariance='class'"
            )
        dim = self.mean.shape[1]
        if covariance == "class":
            matrices, counts = self.covariance, self.count
        else:
            matrices, counts = self._tied_covariance()[None], self.count.sum()[None]
        if shrinkage == 0 and ((counts > 1) & (counts <= dim)).any():
            warnings.warn(
                f"{int(((counts > 1) & (counts <= dim)).sum())} of {len(counts)} covariance matrices are singular, "
                f"made of no more samples than the D = {dim} features, so that distances hang on the jitter alone: use "
                "shrinkage > 0" + (" or covariance='tied'" if covariance == "class" else ""),
                stacklevel=2,
            )
        factor = torch.empty_like(matrices)
        for block in _blocks(len(matrices), dim * dim):
            lower, failed = _regularised_cholesky(matrices[block], shrinkage, jitter)
            if failed is not None:
                name = f"covariance of class {block.start + failed}" if covariance == "class" else "tied covariance"
                raise ValueError(
                    f"the {name} ({int(counts[block.start + failed])} samples) is not positive definite even with "
                    f"jitter {jitter * 10**_JITTER_RAISES:g}: raise jitter (now {jitter:g}) or shrinkage "
                    f"(now {shrinkage:g})"
                )
            factor[block] = lower
        return factor if covariance == "class" else factor[0]

    def _tied_covariance(self) -> Tensor:
        if self.tied:
            return self.covariance
        weights = self.count.double() / self.count.sum().clamp_min(1)
        return torch.tensordot(weights, self.covariance, dims=1)

    def to(self, device: torch.device | str) -> ClassGaussians:
        """The same on another device."""
        return ClassGaussians(self.count.to(device), self.mean.to(device), self.covariance.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """``count``, ``mean`` and ``covariance``."""
        return {"count": self.count, "mean": self.mean, "covariance": self.covariance}


def _check_covariance(covariance: str) -> None:
    if covariance not in get_args(Covariance):
        raise ValueError(f"covariance must be one of {get_args(Covariance)}, got {covariance!r}")


def _check_samples(features: Tensor, labels: Tensor, num_classes: int) -> None:
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"features must be floating, (N, D), got {features.dtype} {tuple(features.shape)}")
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers of shape (N,) with N = features.shape[0] = {len(features)}, got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}; drop rows "
            "without a class, or raise num_classes"
        )


def _blocks(count: int, numbers_each: int) -> Iterator[slice]:
    size = max(1, _BLOCK_NUMBERS // max(1, numbers_each))
    return (slice(start, start + size) for start in range(0, count, size))


def _regularised_cholesky(matrices: Tensor, shrinkage: float, jitter: float) -> tuple[Tensor, int | None]:
    """Factors of a block, and which of its matrices has none, if one has not."""
    variance = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
    eps = torch.full_like(variance, jitter)
    for _ in range(1 + _JITTER_RAISES):
        regularised = (1 - shrinkage) * matrices
        regularised.diagonal(dim1=-2, dim2=-1).add_((shrinkage * variance + eps)[:, None])
        lower, info = torch.linalg.cholesky_ex(regularised)
        failed = info != 0
        if not failed.any():
            raised = eps > jitter
            if raised.any():
                warnings.warn(
                    f"{int(raised.sum())} covariance matrices needed more jitter to be positive definite: "
                    f"{float(eps.max()):g} in place of {jitter:g}",
                    stacklevel=4,
                )
            return lower, None
        eps[failed] *= 10
    return lower, int(failed.nonzero()[0])


def class_gaussians(
    features: Tensor, labels: Tensor, num_classes: int, *, covariance: Covariance = "class"
) -> ClassGaussians:
    """Fit one Gaussian per class to labelled features: count, mean and biased covariance, in float64.

    Args:
        features: ``(N, D)``, finite, any floating dtype.
        labels: Integers in 0..C-1, ``(N,)``. Classes may be missing.
        num_classes: C.
        covariance: ``"class"``: one matrix a class, ``(C, D, D)``; ``"tied"``: only their weighted mean, ``(D, D)``.

    Returns:
        Statistics on the device of ``features``; `ClassGaussians.update` adds further batches.

    Raises:
        ValueError: On shapes that do not fit, labels out of range or features that are not finite.
    """
    _check_samples(features, labels, num_classes)
    gaussians = ClassGaussians.empty(num_classes, features.shape[1], covariance, features.device)
    gaussians.update(features, labels)
    return gaussians


def _distances_of_block(features: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    centred = features - mean[:, None]  # (c, N, D)
    return torch.linalg.solve_triangular(factor, centred.mT, upper=False).square().sum(1).mT  # (N, c)


def mahalanobis_sq(features: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Squared Mahalanobis distance of every feature to every class.

        D_c(z) = (z - mu_c)^T R_c^-1 (z - mu_c) = |L_c^-1 (z - mu_c)|^2 with R_c = L_c L_c^T

    A sum of squares, never negative. Differentiable in all arguments. Classes are worked off in blocks that backward
    computes again, so that memory grows with N C and not with N C D. A tied factor costs a single solve.

    Args:
        features: z, ``(N, D)``.
        mean: mu, ``(C, D)``.
        factor: L, lower triangular, ``(C, D, D)`` or ``(D, D)`` for all classes; see
            `ClassGaussians.precision_factor`.

    Returns:
        ``(N, C)`` in the widest dtype of the arguments, float32 at least.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    if features.ndim != 2 or mean.ndim != 2 or features.shape[1] != mean.shape[1]:
        raise ValueError(
            "features must be (N, D) and mean (C, D) of the same D, got "
            f"{tuple(features.shape)} and {tuple(mean.shape)}"
        )
    classes, dim = mean.shape
    if factor.shape not in ((classes, dim, dim), (dim, dim)):
        raise ValueError(f"factor must be {(classes, dim, dim)} or {(dim, dim)}, got {tuple(factor.shape)}")
    dtype = torch.promote_types(torch.promote_types(features.dtype, mean.dtype), factor.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        z, mu, lower = features.to(dtype), mean.to(dtype), factor.to(dtype)
        if factor.ndim == 2:
            origin = mu.detach().mean(0)  # near the data, so that a large common offset does not cost digits
            z, mu = (torch.linalg.solve_triangular(lower, (x - origin).mT, upper=False).mT for x in (z, mu))
            return torch.cdist(z, mu, compute_mode="donot_use_mm_for_euclid_dist").square()
        keep_no_block: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat(
            [
                checkpoint(_distances_of_block, z, mu[block], lower[block], **keep_no_block)
                for block in _blocks(classes, len(z) * dim)
            ],
            dim=1,
        )
