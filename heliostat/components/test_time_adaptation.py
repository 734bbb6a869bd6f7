"""Adapt a trained classifier to shifted, unlabelled data while it predicts: batch statistics, TENT and CAFA.

Only the scale and shift of normalisation layers change, by one gradient step a batch. The methods differ in the loss:
none at all (BatchNorm statistics of the test batch, arXiv 2006.10963), entropy (TENT, arXiv 2006.10726), or class-aware
feature alignment (CAFA, arXiv 2206.00205). Batches must be large enough, and mixed enough in their classes, for
statistics of their own.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from heliostat.components.cafa import class_aware_alignment_loss
from heliostat.components.distributed import default_group, gather_rows
from heliostat.components.gaussians import ClassGaussians, Covariance, mahalanobis_sq

AdaptationMethod = Literal["none", "batchnorm", "tent", "cafa"]
AdaptedParameters = Literal["batchnorm_affine", "norm_affine"]

_NORMALISATION = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_NO_STATISTICS = "a BatchNorm layer saw one value a channel and took the source's running statistics"


def configure_batchnorm_adaptation(
    model: nn.Module, parameters: AdaptedParameters = "batchnorm_affine"
) -> dict[str, nn.Parameter]:
    """Prepare a network, in place, to be adapted at test time.

    All of it goes to eval mode, so that dropout is off. BatchNorm layers drop their running statistics and normalise by
    those of the current batch, whatever ``train()`` or ``eval()`` is called later. Gradients are asked for the chosen
    parameters alone.

    Args:
        model: The network. Pass a copy if the source is still needed.
        parameters: ``"batchnorm_affine"``: scale and shift of BatchNorm layers; ``"norm_affine"``: also of LayerNorm,
            GroupNorm, InstanceNorm and RMSNorm, for networks without BatchNorm.

    Returns:
        The parameters to adapt, by name.

    Raises:
        ValueError: If the network has none of these layers, or they have no scale and shift.
    """
    if parameters not in get_args(AdaptedParameters):
        raise ValueError(f"parameters must be one of {get_args(AdaptedParameters)}, got {parameters!r}")
    kinds = _BatchNorm if parameters == "batchnorm_affine" else _NORMALISATION
    model.eval().requires_grad_(False)
    adapted = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        if isinstance(layer, kinds):
            for own, parameter in layer.named_parameters(name, recurse=False):
                parameter.requires_grad_()
                adapted[own] = parameter
    if not adapted:
        raise ValueError(
            "the model has no BatchNorm layer with scale and shift; parameters='norm_affine' adapts those of "
            "LayerNorm, GroupNorm, InstanceNorm and RMSNorm"
            if parameters == "batchnorm_affine"
            else "the model has no normalisation layer with scale or shift, so there is nothing to adapt"
        )
    return adapted


class _GlobalBatchNorm(TorchFunctionMode):
    """Within it, batch normalisation is over the rows of all processes, also where their numbers differ."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_global_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _global_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    channels_last = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(1, -1)
    rows = channels_last.flatten(0, -2)  # (M, C), M = N times the positions of a map
    total = gather_rows(torch.cat([rows.sum(0), rows.new_tensor([len(rows)])])[None]).sum(0)
    centred = rows - total[:-1] / total[-1]
    variance = gather_rows(centred.square().sum(0)[None]).sum(0) / total[-1]
    y = centred * (variance + eps).rsqrt()
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.view(channels_last.shape).movedim(-1, 1).to(x.dtype)


def find_head(model: nn.Module, head: str | nn.Module | None) -> str:
    """Name of the classification head within the model."""
    if isinstance(head, str):
        try:
            model.get_submodule(head)
        except AttributeError:
            raise ValueError(
                f"head: the model has no module {head!r}; its top modules are "
                + ", ".join(name for name, _ in model.named_children())
            ) from None
        return head
    module: Any = head
    if head is None and callable(getattr(model, "get_classifier", None)):  # timm's way to name it
        module = model.get_classifier()  # type: ignore[operator]
    elif head is None:
        module = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    for name, candidate in model.named_modules():
        if candidate is module:
            return name
    raise ValueError(
        "head: the given module is not part of the model"
        if head is not None
        else "no classification head was found: give head=, the module (or its name) whose input are the features"
    )


def _own(value: Any) -> Any:
    """An input without the caller's graph, and one that autograd may save if it was made in inference mode."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if value.is_inference() else value.detach()


def _adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


class TestTimeAdapter(nn.Module):
    """A classifier that adapts to the stream of batches it is asked to classify.

    It works on a deep copy: the model it was given stays as it is, and several adapters can be compared on it. Call it
    like the model, under `torch.no_grad` and `torch.inference_mode` too. It returns the logits of the forward before
    the update that the batch causes, and keeps no graph. It always is in eval mode.

    With several processes, every process gives its part of a batch, and all must call equally often. BatchNorm
    statistics, the loss and its gradient are then those of the joint batch, and parameters stay equal.

    A layer that sees one value a channel, as BatchNorm1d does for a batch of one, has no batch statistics: it takes
    the source's running statistics for that batch, which is predicted without an update, with a warning.

    Args:
        model: A trained classifier that returns logits ``(N, C)``, or an object with ``logits``.
        method: ``"none"``: the source model in eval mode. ``"batchnorm"``: batch statistics, no update. ``"tent"``:
            minimise the entropy of the predictions. ``"cafa"``: minimise `class_aware_alignment_loss`.
        gaussians: Statistics of the head's inputs over source data, the model in eval mode; for ``"cafa"``.
        head: The classification head of ``"cafa"``, whose input are the features ``(N, D)``: a module or its name.
            Default: timm's ``get_classifier()`` where the model has it, else its last `torch.nn.Linear`.
        parameters: What is adapted, see `configure_batchnorm_adaptation`.
        optimizer: Makes the optimizer from the adapted parameters; default: Adam with learning rate 1e-3. For
            ImageNet-sized networks SGD with momentum 0.9 and 2.5e-4 is usual.
        steps: Updates a batch.
        episodic: Forget everything before each batch, so that batches do not depend on each other.
        min_batch_size: Smaller batches are predicted without an update.
        covariance: ``"class"`` or ``"tied"``; see `ClassGaussians.precision_factor`, as ``shrinkage``, ``jitter``.
        shrinkage: gamma of the covariance.
        jitter: eps of the covariance.
        include_predicted_class: See `class_aware_alignment_loss`.

    Attributes:
        diagnostics: Of the last step: ``samples``, of which ``used`` in the loss and ``dropped`` as not finite,
            ``loss``, and for CAFA ``intra`` and ``inter``, the mean distance to the predicted class and the mean sum
            of distances to all. Over all processes.
        updates: Gradient steps since the source model.
        dropped_samples: Samples left out of a loss for NaN or infinite features or logits, so far.
        skipped_batches: Batches that were too small, or whose gradient was not finite, so far.

    Raises:
        ValueError: On settings out of range, a model without layers to adapt, a head that is not found or not called
            once, statistics of another width or number of classes.
    """

    __test__ = False  # not for pytest

    def __init__(
        self,
        model: nn.Module,
        method: AdaptationMethod = "none",
        *,
        gaussians: ClassGaussians | None = None,
        head: str | nn.Module | None = None,
        parameters: AdaptedParameters = "batchnorm_affine",
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = _adam,
        steps: int = 1,
        episodic: bool = False,
        min_batch_size: int = 2,
        covariance: Covariance = "class",
        shrinkage: float = 0.1,
        jitter: float = 1e-5,
        include_predicted_class: bool = True,
    ) -> None:
        super().__init__()
        if method not in get_args(AdaptationMethod):
            raise ValueError(f"method must be one of {get_args(AdaptationMethod)}, got {method!r}")
        if steps < 1 or min_batch_size < 1:
            raise ValueError(f"steps and min_batch_size must be >= 1, got {steps} and {min_batch_size}")
        if method == "cafa" and gaussians is None:
            raise ValueError("method 'cafa' needs gaussians: statistics of source features, see class_gaussians")
        self.method, self.steps, self.episodic, self.min_batch_size = method, steps, episodic, min_batch_size
        self.covariance, self.shrinkage, self.jitter = covariance, shrinkage, jitter
        self.include_predicted_class = include_predicted_class
        self.updates = self.dropped_samples = self.skipped_batches = 0
        self.diagnostics: dict[str, float] = {}
        self.gaussians: ClassGaussians | None = None
        self._head: str | None = None
        if method == "cafa" and gaussians is not None:
            self._head = find_head(model, head)
            self._set_gaussians(gaussians)
        self._adapted: dict[str, nn.Parameter] = {}
        self._running_statistics: dict[str, tuple[Tensor, Tensor]] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        with torch.inference_mode(False):  # tensors made in inference mode could never be adapted
            self.model = copy.deepcopy(model).eval().requires_grad_(False)
            if method != "none":
                self._running_statistics = {
                    name: (layer.running_mean, layer.running_var)
                    for name, layer in self.model.named_modules()
                    if isinstance(layer, _BatchNorm)
                    and layer.running_mean is not None
                    and layer.running_var is not None
                }
                self._adapted = configure_batchnorm_adaptation(self.model, parameters)
            self._source = {name: parameter.detach().clone() for name, parameter in self._adapted.items()}
            if method in ("tent", "cafa"):
                self.optimizer = optimizer(list(self._adapted.values()))
                self._new_optimizer_state = copy.deepcopy(self.optimizer.state_dict())
        self.eval()

    def _set_gaussians(self, gaussians: ClassGaussians) -> None:
        mask = gaussians.class_mask(self.covariance)
        if int(mask.sum()) < 2:
            raise ValueError(
                "gaussians: CAFA tells classes apart and needs two with statistics, got "
                f"{int(mask.sum())} of {len(mask)}"
            )
        if not mask.all():
            warnings.warn(
                f"gaussians: {int((~mask).sum())} of {len(mask)} classes have too few source samples; they and samples "
                "predicted as one of them are left out of the loss",
                stacklevel=3,
            )
        self.gaussians = gaussians
        with torch.inference_mode(False):
            factor = gaussians.precision_factor(self.covariance, self.shrinkage, self.jitter)
            self._mean_factor_mask = gaussians.mean.clone(), factor, mask.clone()

    def train(self, mode: bool = True) -> TestTimeAdapter:
        """Stay in eval mode: adaptation must not switch dropout on."""
        return super().train(False)

    # --- one batch ---------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **named_inputs: Any) -> Tensor:
        """Classify a batch, then adapt to it.

        Args:
            *inputs: What the model takes.
            **named_inputs: The same.

        Returns:
            Logits ``(N, C)`` of before the update, without graph.
        """
        with torch.inference_mode(False):
            inputs = tuple(_own(value) for value in inputs)
            named_inputs = {name: _own(value) for name, value in named_inputs.items()}
            if self.episodic:
                self.reset()
            if self.optimizer is None:
                with torch.no_grad():
                    logits, _, has_statistics = self._run(inputs, named_inputs)
                if not has_statistics:
                    self._skip(_NO_STATISTICS)
                samples = torch.tensor([len(logits)], device=logits.device)
                self.diagnostics = {"samples": int(self._sum_over_processes(samples))}
                return logits
            with torch.enable_grad():
                logits, updated = self._step(inputs, named_inputs)
                self._count_dropped()
                for _ in range(self.steps - 1):
                    if updated:
                        _, updated = self._step(inputs, named_inputs)
            return logits

    def _run(self, inputs: Any, named_inputs: Any) -> tuple[Tensor, Tensor | None, bool]:
        """One forward: logits, features for CAFA, and whether every layer had batch statistics."""
        captured: list[Tensor] = []
        borrowers: list[_BatchNorm] = []

        def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured.append(args[0] if args else next(iter(kwargs.values())))

        def lend(name: str, layer: _BatchNorm, args: tuple[Tensor, ...]) -> None:
            if args[0].numel() == args[0].shape[1]:  # one value a channel
                borrowers.append(layer)
                layer.running_mean, layer.running_var = (t.to(args[0].device) for t in self._running_statistics[name])

        with ExitStack() as stack:
            if self._head is not None:
                handle = self.model.get_submodule(self._head).register_forward_pre_hook(capture, with_kwargs=True)
                stack.callback(handle.remove)
            if self.method != "none" and default_group() is not None:
                stack.enter_context(_GlobalBatchNorm())
            else:
                for name in self._running_statistics:
                    layer = self.model.get_submodule(name)
                    stack.callback(layer.register_forward_pre_hook(functools.partial(lend, name)).remove)
            try:
                output = self.model(*inputs, **named_inputs)
            finally:
                for layer in borrowers:
                    layer.running_mean = layer.running_var = None
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"the model must return logits (N, C), or an object that holds them as `logits`, got {got}"
            )
        if self._head is None:
            return logits, None, not borrowers
        if len(captured) != 1:
            raise ValueError(
                f"head: {self._head!r} must be called once in a forward, but was called {len(captured)} times; name "
                "the classification head by head="
            )
        return logits, self._checked_features(captured[0], logits), not borrowers

    def _checked_features(self, features: Tensor, logits: Tensor) -> Tensor:
        classes, dim = self._mean_factor_mask[0].shape
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(logits):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"head: the input of {self._head!r} must be features (N, D) with N = {len(logits)}, got {got}; name "
                "the classification head by head="
            )
        if features.shape[1] != dim or logits.shape[1] != classes:
            raise ValueError(
                f"gaussians: the statistics are of C = {classes} classes and D = {dim} features, but the model has "
                f"C = {logits.shape[1]} and, before {self._head!r}, D = {features.shape[1]}"
            )
        return features

    def _step(self, inputs: Any, named_inputs: Any) -> tuple[Tensor, bool]:
        """One forward, and one update if the batch allows it. Returns the logits, and whether there was an update."""
        logits, features, has_statistics = self._run(inputs, named_inputs)
        finite = logits.detach().isfinite().all(1)
        if features is not None:
            finite &= features.detach().isfinite().all(1)
        pseudo_labels = logits.detach().argmax(1)
        used = finite
        if features is not None:
            mean, factor, mask = self._distance_statistics(features)
            used = finite & mask[pseudo_labels]
        own = int(used.sum())
        counts = torch.tensor([len(logits), int((~finite).sum()), own], device=logits.device)
        samples, dropped, total = self._sum_over_processes(counts).tolist()
        self.diagnostics = {"samples": samples, "used": total, "dropped": dropped}
        if samples < self.min_batch_size or not has_statistics:
            too_small = f"a batch of {samples} is too small to adapt to (min_batch_size={self.min_batch_size})"
            self._skip(too_small if has_statistics else _NO_STATISTICS)
            return logits.detach(), False
        if total == 0:  # the optimizer's momentum would move the parameters even so
            return logits.detach(), False
        # Processes without a used sample go on: the others wait for them in the collectives of backward.
        if features is None:
            log_p = logits[used].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
            loss = -(log_p.exp() * log_p).sum() / total
            sums = [loss.detach() * total]
        else:
            distances = mahalanobis_sq(features[used], mean, factor)
            labels = pseudo_labels[used]
            loss = class_aware_alignment_loss(
                distances, labels, include_predicted_class=self.include_predicted_class, class_mask=mask
            )
            loss = loss * (own / total)  # of all processes' losses, the sum is the mean over all samples
            d = distances.detach()
            sums = [loss.detach() * total, d.gather(1, labels[:, None]).sum(), d[:, mask].sum()]
        names = ("loss", "intra", "inter")[: len(sums)]
        values = self._sum_over_processes(torch.stack(sums)) / total
        self.diagnostics.update(zip(names, values.tolist(), strict=True))
        return logits.detach(), self._update(loss)

    def _count_dropped(self) -> None:
        dropped, samples = self.diagnostics["dropped"], self.diagnostics["samples"]
        if dropped:
            self.dropped_samples += int(dropped)
            self._warn(
                f"{dropped} of {samples} samples have NaN or infinite features or logits and were left out of the loss "
                f"({self.dropped_samples} so far)"
            )

    def _update(self, loss: Tensor) -> bool:
        assert self.optimizer is not None
        parameters = list(self._adapted.values())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        if default_group() is not None:
            flat = self._sum_over_processes(torch.cat([g.flatten() for g in gradients]))
            parts = flat.split([g.numel() for g in gradients])
            gradients = tuple(part.view_as(g) for part, g in zip(parts, gradients, strict=True))
        if not all(gradient.isfinite().all() for gradient in gradients):
            self._skip("the gradient of a batch is not finite")
            return False
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return True

    def _distance_statistics(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, factor and class mask where the features are, in their precision; moved once."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        mean, factor, mask = self._mean_factor_mask
        if mean.device != features.device or mean.dtype != dtype:
            mean, factor, mask = mean.to(features.device), factor.to(features.device), mask.to(features.device)
            self._mean_factor_mask = mean.to(dtype), factor.to(dtype), mask
        return self._mean_factor_mask

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        if self.method != "none" and default_group() is not None:
            dist.all_reduce(values)
        return values

    def _skip(self, reason: str) -> None:
        self.skipped_batches += 1
        self._warn(f"{reason}: predicted without an update ({self.skipped_batches} so far)")

    def _warn(self, message: str) -> None:
        warnings.warn(message, stacklevel=4)

    # --- state -------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Return to the source model and a new optimizer, exactly."""
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in self._adapted.items():
                parameter.copy_(self._source[name])
            if self.optimizer is not None:
                self.optimizer.load_state_dict(copy.deepcopy(self._new_optimizer_state))
        self.updates = 0
        self.diagnostics = {}

    def get_extra_state(self) -> dict[str, Any]:
        """All that the stream depends on besides the model's tensors: plain tensors and numbers."""
        return {
            "settings": self._settings(),
            "counts": [self.updates, self.dropped_samples, self.skipped_batches],
            "source": dict(self._source),
            "running_statistics": dict(self._running_statistics),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "gaussians": None if self.gaussians is None else self.gaussians.state_dict(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the stream where `get_extra_state` left it."""
        if state["settings"] != self._settings():
            raise ValueError(f"the state is of an adapter with {state['settings']}, this one has {self._settings()}")
        self.updates, self.dropped_samples, self.skipped_batches = state["counts"]
        with torch.inference_mode(False):  # copies: an optimizer would share its tensors with the one that made them
            self._source = copy.deepcopy(state["source"])
            self._running_statistics = copy.deepcopy(state["running_statistics"])
            if self.optimizer is not None:
                self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if state["gaussians"] is not None:
            self._set_gaussians(ClassGaussians(**state["gaussians"]))

    def _settings(self) -> dict[str, Any]:
        """What gives the state its meaning."""
        settings: dict[str, Any] = {"method": self.method}
        if self.method == "cafa":
            settings |= {"covariance": self.covariance, "shrinkage": self.shrinkage, "jitter": self.jitter}
        return settings
