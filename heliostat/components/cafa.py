"""CAFA: class-aware feature alignment for test-time adaptation (ICCV 2023, arXiv 2206.00205).

A classifier that meets shifted, unlabelled test data pulls each feature towards the Gaussian of the class it predicts,
relative to all classes. The Gaussians are those of source features, gathered once. There is no weight to tune, no
source data at test time and no change to training. The loss is here; the Gaussians are in
`heliostat.components.gaussians`, the adapter that takes a step a batch in
`heliostat.components.test_time_adaptation`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def class_aware_alignment_loss(
    distances: Tensor,
    pseudo_labels: Tensor,
    *,
    include_predicted_class: bool = True,
    class_mask: Tensor | None = None,
    floor: float = 1e-12,
) -> Tensor:
    """Log ratio of a feature's distance to its predicted class over its distances to the classes, mean over rows.

        L = 1/N sum_n [ log max(intra_n, fl) - log max(inter_n, fl) ]
        intra_n = D_{y_n}(z_n),   inter_n = sum_c D_c(z_n)   (or c != y_n)

    Scaling all distances changes nothing. With the predicted class in ``inter`` L <= 0, and a sample's gradient is that
    of the other form times 1 / (1 + intra / rest): doubtful samples weigh less.

    Args:
        distances: D, squared Mahalanobis distances ``(N, C)``, C >= 2; see `heliostat.components.mahalanobis_sq`.
        pseudo_labels: y, the classes that the head predicts, integers ``(N,)``.
        include_predicted_class: Whether ``inter`` counts the predicted class.
        class_mask: Boolean ``(C,)``, classes that have statistics; default: all. The others are left out of ``inter``,
            and samples predicted as one of them out of the mean.
        floor: fl > 0. A feature nearer than this to its class is pulled no further.

    Returns:
        Scalar, float32 (float64 for float64 input); 0, attached to the graph, if no sample is left.

    Raises:
        ValueError: On shapes that do not fit, C < 2 or ``floor <= 0``.
    """
    if distances.ndim != 2 or distances.shape[1] < 2:
        raise ValueError(
            f"distances must have shape (N, C) with C >= 2 classes to tell apart, got {tuple(distances.shape)}"
        )
    rows, classes = distances.shape
    if pseudo_labels.shape != (rows,) or pseudo_labels.is_floating_point():
        raise ValueError(
            f"pseudo_labels must be integers of shape (N,) with N = distances.shape[0] = {rows}, got "
            f"{pseudo_labels.dtype} {tuple(pseudo_labels.shape)}"
        )
    if class_mask is not None and (class_mask.shape != (classes,) or class_mask.dtype != torch.bool):
        raise ValueError(
            f"class_mask must be boolean of shape (C,) with C = distances.shape[1] = {classes}, got "
            f"{class_mask.dtype} {tuple(class_mask.shape)}"
        )
    if not floor > 0:
        raise ValueError(f"floor must be > 0, got {floor}")
    labels = pseudo_labels.long()[:, None]
    valid = distances.new_ones(classes, dtype=torch.bool) if class_mask is None else class_mask
    with torch.autocast(distances.device.type, enabled=False):
        d = distances.to(torch.promote_types(distances.dtype, torch.float32))
        counted = valid.expand_as(d)
        if not include_predicted_class:
            counted = counted.scatter(1, labels, False)
        used = valid[labels[:, 0]] & counted.any(1)
        intra = d.gather(1, labels)[:, 0].where(used, 1.0)  # a sample left out is log 1 - log 1
        inter = d.where(counted, 0.0).sum(1).where(used, 1.0)
        ratios = intra.clamp_min(floor).log() - inter.clamp_min(floor).log()
        return ratios.sum() / used.sum().clamp_min(1)
