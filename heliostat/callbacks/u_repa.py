"""U-REPA as a callback (arXiv 2503.18414): for the diffusion training that you have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from heliostat.components.u_repa import AlignmentProjector, Relation, RepresentationAligner, check_settings

_NAME = "heliostat_u_repa"  # of the module that is lent to the user's


class UREPACallback(Callback):
    """Align a layer of anyone's denoiser with a frozen teacher's view of the clean pictures.

    Works with any LightningModule under automatic optimisation; nothing in it is changed. From ``setup`` to the end of
    the fit the projector is a submodule of it, so that every strategy on whole modules trains it, and what
    ``training_step`` returns has the alignment added to its loss: precision, accumulation, clipping and processes meet
    one loss. A projector that ``configure_optimizers`` has not given to the optimizer joins its first parameter group,
    with that group's learning rate, schedule and weight decay.

    The module's state dict does not hold the projector, so that checkpoints load without the callback, and the
    callback's state does: a training is resumed with it. To go on without alignment, keep the callback and set
    ``stop_step``.

    Logged: ``train/u_repa_cosine``, the mean cosine of the projected tokens and the teacher's;
    ``train/u_repa_shuffled_cosine``, that to the teacher's tokens of other pictures; ``train/u_repa_manifold``, L_man.

    Args:
        layer: What is aligned: the path of a module in the LightningModule, or the end of one, if only one ends so. For
            the ``mid_block`` that a U-Net has not it is the last down block. It returns ``(B, C, h, w)`` or
            ``(B, N, C)``.
        teacher: Maps the clean pictures to patch tokens ``(B, N, D)``, such as a `heliostat.PatchEncoder`. A module is
            frozen, put into evaluation mode and moved to the device; it is in no checkpoint. None: the batches have the
            tokens.
        teacher_dim: Width D of the tokens; default: the teacher's attribute ``output_dim``.
        pixels_key: Where in the batch the clean pictures are, for ``teacher``: a key, or a position in a tuple.
        features_key: Where in the batch the teacher's tokens are, without ``teacher``.
        in_channels: Channels C that the layer returns. Default: those of the last convolution or linear layer in it.
        hidden_dim: Width of the projector.
        grid: Rows and columns (H, W) of the teacher's tokens; needed only if they are not in the shape of the layer's.
        align_weight: lambda, >= 0; 0 changes nothing, bit by bit.
        manifold_weight: w, >= 0.
        relation: See `heliostat.components.manifold_alignment_loss`; so are the next two.
        center: Subtract the tokens' mean before similarities are taken.
        max_tokens: Positions that are compared, drawn anew in each step.
        stop_step: Step of the optimizer from which on nothing is aligned; None: never.

    Attributes:
        projector: `heliostat.components.AlignmentProjector`, or None before the first fit.

    Raises:
        ValueError: For settings out of range, or without a width of the teacher's tokens.
        MisconfigurationException: In ``setup``: the layer is not to be found; manual optimisation; a callback that
            averages weights stands before this one; FSDP, DeepSpeed or tensor parallelism. When training starts: an
            optimizer that takes no parameters later. In training: no clean pictures or tokens in a batch.
    """

    def __init__(
        self,
        layer: str = "mid_block",
        teacher: nn.Module | Callable[[Tensor], Tensor] | None = None,
        *,
        teacher_dim: int | None = None,
        pixels_key: str | int = "pixel_values",
        features_key: str | int = "teacher_features",
        in_channels: int | None = None,
        hidden_dim: int = 2048,
        grid: tuple[int, int] | None = None,
        align_weight: float = 0.5,
        manifold_weight: float = 3.0,
        relation: Relation = "token",
        center: bool = False,
        max_tokens: int | None = None,
        stop_step: int | None = None,
    ) -> None:
        check_settings(align_weight, manifold_weight, relation, max_tokens, stop_step)
        width = getattr(teacher, "output_dim", None) if teacher_dim is None else teacher_dim
        if width is None:
            raise ValueError(
                "teacher_dim, the width D of the teacher's tokens, is needed: "
                + ("there is no teacher" if teacher is None else f"{type(teacher).__name__} has no output_dim")
            )
        self.layer, self.teacher = layer, teacher
        self.pixels_key, self.features_key = pixels_key, features_key
        self._settings: dict[str, Any] = {
            "teacher_dim": width,
            "in_channels": in_channels,
            "hidden_dim": hidden_dim,
            "grid": grid,
            "align_weight": align_weight,
            "manifold_weight": manifold_weight,
            "relation": relation,
            "center": center,
            "max_tokens": max_tokens,
            "stop_step": stop_step,
        }
        self.projector: AlignmentProjector | None = None
        self._guest: _Guest | None = None
        self._steps: tuple[Any, Any] = (None, None)  # the attribute `training_step` of the instance: before, and ours

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the layer and lend the module the projector, or refuse."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
            raise MisconfigurationException(
                f"UREPACallback does not work with {type(trainer.strategy).__name__}, which shards the parameters: use "
                "strategy='ddp'"
            )
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "UREPACallback adds to the loss that training_step returns, which a module with manual optimisation "
                "does not. Add heliostat.components.u_repa_loss to your loss there"
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for other in callbacks[: callbacks.index(self)]:
            if isinstance(other, (WeightAveraging, StochasticWeightAveraging)):
                raise MisconfigurationException(
                    f"{type(other).__name__} has copied the module before UREPACallback could add the projector: list "
                    f"UREPACallback before {type(other).__name__}"
                )
        try:
            aligner = RepresentationAligner(pl_module, self.layer, **self._settings)
        except ValueError as error:
            raise MisconfigurationException(f"UREPACallback: {error}") from error
        if not aligner.enabled:
            aligner.tap.remove()
            return
        if self.projector is not None:  # of an earlier fit, which this one continues
            aligner.projector = self.projector
        self.projector = aligner.projector
        self._guest = _Guest(aligner)
        pl_module.add_module(_NAME, self._guest)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the projector is trained, and add the alignment to the loss of ``training_step``."""
        if self._guest is None:
            return
        self._join(trainer.optimizers[0])
        if isinstance(self.teacher, nn.Module):
            self.teacher.eval().requires_grad_(False).to(pl_module.device)
        own_step = pl_module.training_step

        @functools.wraps(own_step)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            return self._align(pl_module, batch, functools.partial(own_step, batch, *args, **kwargs))

        self._steps = vars(pl_module).get("training_step"), training_step
        vars(pl_module)["training_step"] = training_step

    def _join(self, optimizer: Any) -> None:
        assert self._guest is not None
        known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        missing = {n: p for n, p in self._guest.named_parameters(_NAME) if p not in known}
        if not missing:
            return
        # Adagrad makes its state when it is made itself, and a sharded optimizer divides what it has then.
        if not known or optimizer.state or isinstance(optimizer, ZeroRedundancyOptimizer):
            raise MisconfigurationException(
                f"the projector cannot be added to {type(optimizer).__name__} any more: let configure_optimizers give "
                "it self.parameters(), of which the projector is a part"
            )
        group = optimizer.param_groups[0]  # joined, because a group of its own would be unknown to schedulers
        group["params"].extend(missing.values())
        if "param_names" in group:
            group["param_names"].extend(missing)
        rank_zero_info(f"UREPACallback: the projector joins the first parameter group, of learning rate {group['lr']}")

    def _align(self, pl_module: LightningModule, batch: Any, own_step: Callable[[], Any]) -> Any:
        if self._guest is None:  # it is over, and another callback has kept this function
            return own_step()
        aligner = self._guest.aligner
        if not aligner.active(pl_module.global_step):
            return _with_term(own_step(), aligner.nothing())
        target = self._teacher_features(batch)
        with aligner.tap:
            output = own_step()
        if output is None:
            aligner.tap.clear()
            return None
        term, report = aligner(target)
        named = {f"train/u_repa_{name}": value for name, value in report.items()}
        pl_module.log_dict(named, sync_dist=True, batch_size=len(target))
        return _with_term(output, term)

    def _teacher_features(self, batch: Any) -> Tensor:
        key = self.features_key if self.teacher is None else self.pixels_key
        try:
            value: Tensor = batch[key]
        except (KeyError, IndexError, TypeError) as error:
            has = f"has only {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else f"is a {type(batch)}"
            raise MisconfigurationException(
                f"UREPACallback looks for {key!r} in the batch, which {has}: "
                + (
                    "give the batches the teacher's tokens, or the callback a teacher"
                    if self.teacher is None
                    else "give pixels_key, where the clean pictures are"
                )
            ) from error
        if self.teacher is None:
            return value
        if isinstance(self.teacher, nn.Module):
            parameter = next(self.teacher.parameters(), value)
            value = value.to(parameter.dtype)
        with torch.no_grad():
            return self.teacher(value)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._leave(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._leave(pl_module)

    def _leave(self, pl_module: LightningModule) -> None:
        if self._guest is None:
            return
        self._guest.aligner.tap.remove()
        self._guest = None
        before, ours = self._steps
        self._steps = (None, None)
        if ours is not None and vars(pl_module).get("training_step") is ours:
            del pl_module.training_step
            if before is not None:
                vars(pl_module)["training_step"] = before
        del pl_module._modules[_NAME]

    def state_dict(self) -> dict[str, Any]:
        """The projector."""
        return {} if self.projector is None else {"projector": self.projector.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the projector of the run that is continued."""
        if self.projector is not None and state_dict:
            self.projector.load_state_dict(state_dict["projector"])


class _Guest(nn.Module):
    """A submodule whose parameters are its host's to train, but not in the host's state dict."""

    def __init__(self, aligner: RepresentationAligner) -> None:
        super().__init__()
        self.aligner = aligner
        self.register_load_state_dict_post_hook(_not_missed)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return {} if destination is None else destination


def _not_missed(guest: nn.Module, incompatible: Any) -> None:
    keys = incompatible.missing_keys
    keys[:] = [key for key in keys if f"{_NAME}." not in key]


def _with_term(output: Any, term: Tensor | int) -> Any:
    """What ``training_step`` returned, with ``term`` added to its loss."""
    if isinstance(output, Mapping) and "loss" in output:
        return {**output, "loss": output["loss"] + term}
    return output + term if isinstance(output, Tensor) else output
