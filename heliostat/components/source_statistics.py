"""Class statistics of a trained classifier's features, and a mark of the weights that they belong to.

What class-aware methods at test time need of the source data (CAFA, arXiv 2206.00205): one pass of labelled data
through the network in eval mode, the inputs of its classification head gathered as one Gaussian a class.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.components.gaussians import ClassGaussians, Covariance
from heliostat.components.test_time_adaptation import find_head


def fit_class_gaussians(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    head: str | nn.Module | None = None,
    covariance: Covariance = "class",
) -> ClassGaussians:
    """Pass labelled data through a classifier once and fit a Gaussian to the features of every class.

    The model is in eval mode meanwhile, and without gradients; its modes are as before when the function returns. The
    features are the inputs of the classification head, as in `TestTimeAdapter`. With several processes each gives its
    share of the data, at least one batch, and all get the statistics of the whole.

    Args:
        model: A trained classifier that returns logits ``(N, C)``, or an object with ``logits``.
        batches: Dicts with ``pixel_values`` and ``labels``, or pairs of inputs and labels. Moved to the model's device.
            Rows whose features are not finite are left out, and counted in a warning.
        head: The classification head, see `TestTimeAdapter`.
        covariance: ``"class"`` or ``"tied"``, see `class_gaussians`.

    Returns:
        Statistics on the model's device.

    Raises:
        ValueError: If there is no batch, or one of another form; if the head is not found, not called once a forward,
            or its inputs are not ``(N, D)``; on labels outside 0..C-1.
    """
    layer = model.get_submodule(find_head(model, head))
    device = next((parameter.device for parameter in model.parameters()), None)
    captured: list[Tensor] = []

    def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.append(args[0] if args else next(iter(kwargs.values())))

    gaussians: ClassGaussians | None = None
    dropped = 0
    modes = [(module, module.training) for module in model.modules()]
    handle = layer.register_forward_pre_hook(capture, with_kwargs=True)
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            for batch in batches:
                inputs, labels = (value.to(device) for value in _inputs_and_labels(batch))
                captured.clear()
                output = model(inputs)
                features = _checked(captured, len(labels))
                if gaussians is None:
                    num_classes = getattr(output, "logits", output).shape[1]
                    gaussians = ClassGaussians.empty(num_classes, features.shape[1], covariance, features.device)
                finite = features.isfinite().all(1)
                dropped += int((~finite).sum())
                gaussians.update(features[finite], labels[finite])
            if gaussians is None:
                raise ValueError("batches: there is none, so there is nothing to fit Gaussians to")
            gaussians = gaussians.all_reduce()
    finally:
        handle.remove()
        for module, training in modes:
            module.training = training
    if dropped:
        warnings.warn(
            f"{dropped} samples have NaN or infinite features and were left out of the statistics", stacklevel=2
        )
    return gaussians


def _inputs_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping):
        if missing := [key for key in ("pixel_values", "labels") if key not in batch]:
            raise ValueError(
                f"batches: a dict lacks {' and '.join(missing)}; it has {', '.join(map(str, batch)) or 'no key'}"
            )
        return batch["pixel_values"], batch["labels"]
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
        raise ValueError(
            "batches must be dicts with pixel_values and labels, or pairs of tensors, inputs and labels; got "
            f"{type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        )
    return batch[0], batch[1]


def _checked(captured: list[Tensor], rows: int) -> Tensor:
    if len(captured) != 1:
        raise ValueError(f"head must be called once in a forward, but was called {len(captured)} times")
    features = captured[0]
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != rows:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"head: its input must be features (N, D) with N = {rows}, got {got}; name the classification head by head="
        )
    return features


def weights_fingerprint(model: nn.Module) -> str:
    """A short text that tells whether weights and buffers are the same, on any device and in any precision.

    Args:
        model: Any module.

    Returns:
        32 hexadecimal digits, a hash of shapes and values in the order of the state dict, whatever their names. A
        precision that cannot hold the values makes other weights of them.
    """
    digest = hashlib.blake2b(digest_size=16)
    for value in model.state_dict().values():
        if isinstance(value, Tensor):
            wide = value.detach().cpu().to(torch.float64 if value.is_floating_point() else torch.int64)
            digest.update(f"{tuple(value.shape)}".encode() + wide.contiguous().numpy().tobytes())
    return digest.hexdigest()
