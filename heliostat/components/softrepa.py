"""SoftREPA (NeurIPS 2025, arXiv 2503.08250): contrastive tuning of a frozen denoiser through soft text tokens.

A few learned vectors are spliced into the text that a pretrained text-to-image denoiser reads. They are trained so that
a picture is denoised better under its own prompt than under the others of the batch. For better prompt adherence from
ordinary picture-caption pairs, with less than a million parameters and a file of a few megabytes; the denoiser stays as
it is, bit for bit.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from heliostat._extras import require
from heliostat.components.chunking import chunked_forward

STAGES = ("down", "mid", "up")
_TRAINING_STEPS = 1000  # the scale of timesteps
_SATURATED = 0.05  # of the logit scale: below it hardly any gradient is left
_FILE_FORMAT = "heliostat.soft_tokens"
_KEY = "heliostat_soft_tokens"
_FALLBACK = (
    "soft tokens go into UNet2DConditionModel (Stable Diffusion 1, 2 and XL) and SD3Transformer2DModel of diffusers; "
    "for another model with cross-attention list in modules= the modules that are called with encoder_hidden_states"
)

# --- the loss --------------------------------------------------------------------------------------------------------


class DenoisingContrast(NamedTuple):
    """The loss and what shows how it goes; all but ``loss`` are detached.

    Attributes:
        loss: The contrastive loss with the weighted denoising loss.
        accuracy: Share of images whose own prompt has the smallest error.
        positive_error: Mean error of images under their own prompts.
        negative_error: Mean error under the other prompts, but for masked ones; NaN if there are none.
        saturated: Share of logits below a twentieth of the logit scale. Near 1 the temperature is too low for these
            errors, and nothing is learned.
    """

    loss: Tensor
    accuracy: Tensor
    positive_error: Tensor
    negative_error: Tensor
    saturated: Tensor


def denoising_contrastive_loss(
    errors: Tensor,
    targets: Tensor | None = None,
    *,
    temperature: float | Tensor | Literal["auto"] = 0.07,
    logit_scale: float = 4.0,
    denoising_weight: float = 0.0,
    negative_mask: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> DenoisingContrast:
    """InfoNCE from images to prompts, where a small denoising error is a large logit.

        l_ij = a exp(-e_ij / tau)
        L = 1/N sum_i [ log sum_j e^{l_ij} - l_i,y(i) ] + w / N sum_i e_i,y(i)

    The exponential bounds the push on negatives: l is in (0, a], and its gradient vanishes for errors far above tau.

    Args:
        errors: e >= 0, ``(N, M)``: mean squared error of image i denoised under prompt j.
        targets: y, ``(N,)`` in [0, M): the prompt of each image; default: prompt i, if there are N.
        temperature: tau > 0, of the size of the errors. The paper's 0.07 is for latents of Stable Diffusion;
            ``"auto"`` takes the median of these positive errors, as a constant.
        logit_scale: a > 0.
        denoising_weight: w >= 0; the released code has 0 for SD3, 10 for SD 1.5 and XL.
        negative_mask: ``(N, M)``, true where a prompt is no negative of an image, for instance because it repeats its
            own: such entries are left out of the sum over j. Positives are never left out.
        reduction: ``"mean"`` over the images, ``"sum"``, or ``"none"`` for ``(N,)``.

    Returns:
        `DenoisingContrast`, float32 (float64 for float64 errors).

    Raises:
        ValueError: On shapes that do not fit, targets out of range, or settings out of range.
    """
    if errors.ndim != 2 or errors.shape[1] == 0:
        raise ValueError(f"errors must have shape (N, M) with M >= 1, got {tuple(errors.shape)}")
    rows, columns = errors.shape
    if targets is None:
        if rows != columns:
            raise ValueError(f"targets are needed: errors has {rows} images but {columns} prompts")
        targets = torch.arange(rows, device=errors.device)
    elif targets.shape != (rows,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be {rows} numbers of int64, got {tuple(targets.shape)} of {targets.dtype}")
    elif rows and not targets.is_cuda and not torch.compiler.is_compiling():  # a GPU's gather checks without waiting
        smallest, largest = targets.aminmax()
        if smallest < 0 or largest >= columns:
            raise ValueError(f"targets must lie in 0..{columns - 1}, got {int(smallest)}..{int(largest)}")
    if isinstance(temperature, str):
        if temperature != "auto":
            raise ValueError(f"temperature must be > 0 or 'auto', got {temperature!r}")
    elif not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature must be > 0 or 'auto', got {temperature}")
    if not logit_scale > 0:
        raise ValueError(f"logit_scale must be > 0, got {logit_scale}")
    if not denoising_weight >= 0:
        raise ValueError(f"denoising_weight must be >= 0, got {denoising_weight}")
    if negative_mask is not None and (negative_mask.shape != errors.shape or negative_mask.dtype != torch.bool):
        raise ValueError(
            f"negative_mask must be bool of the errors' shape {tuple(errors.shape)}, got {tuple(negative_mask.shape)} "
            f"of {negative_mask.dtype}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    with torch.autocast(errors.device.type, enabled=False):
        e = errors.to(torch.promote_types(errors.dtype, torch.float32))
        own = torch.zeros_like(e, dtype=torch.bool).scatter(1, targets[:, None], True)
        left_out = torch.zeros_like(own) if negative_mask is None else negative_mask & ~own
        positive = e.gather(1, targets[:, None])[:, 0]
        tau = median_error(positive) if isinstance(temperature, str) else temperature
        logits = logit_scale * (-e / tau).exp()
        terms = logits.masked_fill(left_out, -torch.inf).logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]
        if denoising_weight:  # else an infinite error would make NaN of the zero
            terms = terms + denoising_weight * positive
        loss = terms if reduction == "none" else terms.sum()
        if reduction == "mean":
            loss = loss / max(1, rows)
        with torch.no_grad():
            nearest = e.masked_fill(left_out, torch.inf).argmin(1)
            return DenoisingContrast(
                loss,
                accuracy=_mean(nearest == targets),
                positive_error=_mean(positive),
                negative_error=_mean(e, ~(own | left_out)),
                saturated=_mean(logits < _SATURATED * logit_scale, ~left_out),
            )


def median_error(positive: Tensor) -> Tensor:
    """The temperature ``"auto"`` for positive errors ``(N,)``: their median, as a constant."""
    return positive.detach().median() if len(positive) else positive.new_ones(())


def _mean(values: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean in float32 at least of ``values``, or of those where ``where``; NaN of nothing."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.mean() if where is None else values.where(where, 0.0).sum() / where.sum()


# --- errors of all pairs ---------------------------------------------------------------------------------------------


def pairwise_denoising_errors(
    denoise_fn: Callable[[Tensor, Tensor, Any], Tensor],
    latents: Tensor,
    prompt_embeds: Tensor | Mapping[str, Tensor],
    timestep: float | Tensor,
    noise: Tensor,
    *,
    schedule: Literal["flow", "ddpm"] = "flow",
    alphas_cumprod: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """How well a denoiser restores each image under each prompt, at one timestep and with one noise map for all.

        flow:  z_i = (1 - t/1000) x_i + t/1000 eps,                u_i = eps - x_i
        ddpm:  z_i = sqrt(abar_t) x_i + sqrt(1 - abar_t) eps,      u_i = eps
        e_ij = mean( (f(z_i, t, c_j) - u_i)^2 )

    Args:
        denoise_fn: f, maps z ``(B, C, H, W)``, t ``()`` and B prompts to a prediction of the shape of z.
        latents: x, ``(N, C, H, W)``.
        prompt_embeds: c, ``(M, L, d)``; or a dict of tensors with M rows each, of which ``denoise_fn`` then gets a dict
            of B rows: prompts with their pooled embeddings.
        timestep: t from 0 to 1000, one for all.
        noise: eps, ``(1, C, H, W)``, one for all.
        schedule: ``"flow"`` (SD3) or ``"ddpm"`` with prediction of the noise (SD 1.5, XL).
        alphas_cumprod: abar of all timesteps, as the scheduler has it, or that of t alone; for ``"ddpm"``.
        chunk_size: Pairs that pass through the denoiser at once. Activations are kept of none but recomputed in
            backward, chunk by chunk, so that memory does not grow with N M; value and gradient stay those of one call,
            for one more forward. None: one call, all activations are kept.

    Returns:
        e, ``(N, M)``, float32 (float64 for float64 predictions): rows are images, columns prompts.

    Raises:
        ValueError: On shapes that do not fit, a timestep out of range, or if ``"ddpm"`` lacks ``alphas_cumprod``.
    """
    if noise.shape != (1, *latents.shape[1:]):
        raise ValueError(
            f"noise must be one map for all images, {(1, *latents.shape[1:])}, got {tuple(noise.shape)} for latents of "
            f"shape {tuple(latents.shape)}"
        )
    if isinstance(timestep, Tensor):
        if timestep.ndim:
            raise ValueError(f"timestep must be one number for all images, got shape {tuple(timestep.shape)}")
    else:
        timestep = torch.tensor(timestep, dtype=torch.promote_types(latents.dtype, torch.float32))
    t = timestep.to(latents.device)
    if not 0 <= t <= _TRAINING_STEPS:
        raise ValueError(f"timestep must lie in 0..{_TRAINING_STEPS}, got {timestep.item()}")
    if schedule == "flow":
        sigma = (t / _TRAINING_STEPS).to(latents.dtype)
        noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
    elif schedule == "ddpm":
        if alphas_cumprod is None:
            raise ValueError(
                "schedule='ddpm' needs alphas_cumprod, of the scheduler that the denoiser was trained with"
            )
        if alphas_cumprod.ndim and t >= len(alphas_cumprod):
            raise ValueError(f"timestep must be below {len(alphas_cumprod)}, alphas_cumprod's length, got {t.item()}")
        signal = (alphas_cumprod if alphas_cumprod.ndim == 0 else alphas_cumprod.to(t.device)[t.long()]).to(latents)
        noisy, target = signal.sqrt() * latents + (1 - signal).sqrt() * noise, noise.expand_as(latents)
    else:
        raise ValueError(f"schedule must be 'flow' or 'ddpm', got {schedule!r}")
    prompts = prompt_embeds if isinstance(prompt_embeds, Mapping) else {"": prompt_embeds}
    counts = {len(value) for value in prompts.values()}
    if len(counts) != 1:
        raise ValueError(f"prompt_embeds must have the same number of rows throughout, got {sorted(counts)}")

    def denoise(i: Tensor, j: Tensor) -> Tensor:
        rows = {name: value[j] for name, value in prompts.items()}
        return denoise_fn(noisy[i], t, rows if isinstance(prompt_embeds, Mapping) else rows[""])

    return error_grid(denoise, target, counts.pop(), chunk_size)


def error_grid(
    denoise: Callable[[Tensor, Tensor], Tensor], target: Tensor, num_prompts: int, chunk_size: int | None = None
) -> Tensor:
    """Mean squared errors of all pairs of an image and a prompt; what `pairwise_denoising_errors` is made of.

    Args:
        denoise: Maps numbers of B images and of B prompts to predictions ``(B, ...)`` for these pairs.
        target: What is to be predicted of each image, ``(N, ...)``.
        num_prompts: M.
        chunk_size: As in `pairwise_denoising_errors`.

    Returns:
        ``(N, M)``.

    Raises:
        ValueError: If predictions do not have the shape of their targets.
    """
    pairs = torch.arange(len(target) * num_prompts, device=target.device)
    if not len(pairs):
        return target.new_zeros(len(target), num_prompts)

    def errors(chunk: dict[str, Tensor]) -> Tensor:
        i, j = chunk["pair"] // num_prompts, chunk["pair"] % num_prompts
        prediction = denoise(i, j)
        if prediction.shape != (len(i), *target.shape[1:]):
            raise ValueError(
                f"the denoiser must predict the shape of its input, {(len(i), *target.shape[1:])}, got "
                f"{tuple(prediction.shape)}"
            )
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        return (prediction.to(dtype) - target[i].to(dtype)).square().flatten(1).mean(1)

    return chunked_forward(errors, {"pair": pairs}, chunk_size).view(len(target), num_prompts)


# --- soft tokens -----------------------------------------------------------------------------------------------------


class SoftTokenBank(nn.Module):
    """The soft tokens of one denoiser, in float32 at least: all that is trained, and all that is saved.

        s(t) = T + P[b(t)]        b(t) = clamp(floor(t) n / 1000, 0, n - 1), rounded down

    Of cross-attention (UNets): m tokens, the same for all layers that read them. Of joint attention (SD3): m for each
    of the first K blocks, in the space behind the context embedder.

    Args:
        num_tokens: m >= 1.
        dim: Width of a token: the UNet's ``cross_attention_dim``, or SD3's ``caption_projection_dim``.
        num_layers: K >= 1 for joint attention; None for cross-attention.
        num_time_buckets: n, rows of the table P of offsets; None for tokens that do not depend on time, as the
            released code has it for SDXL. Short trainings want 10 to 20.
        init: What normal noise is added to: ``"normal"`` for nothing, or a tensor that broadcasts to the tokens, such
            as the embedding of a prompt's first token. Without noise equal tokens of a UNet would stay equal for ever,
            as those that are released for SD 1.5 are.
        init_std: Standard deviation of the noise in the tokens and of the table, >= 0.

    Attributes:
        tokens: T, ``(m, d)`` or ``(K, m, D)``.
        time_table: P, ``(n, d)`` or ``(n, K D)``, or None.
        stages: Where a UNet reads them; `attach_soft_tokens` remembers it here, and `save` writes it down.
        position: Before which text token a UNet reads them; likewise.

    Raises:
        ValueError: For settings out of range, or an ``init`` that does not fit.
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        num_layers: int | None = None,
        num_time_buckets: int | None = 100,
        init: Literal["normal"] | Tensor = "normal",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        counts = {"num_tokens": num_tokens, "dim": dim, "num_layers": num_layers, "num_time_buckets": num_time_buckets}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not init_std >= 0:
            raise ValueError(f"init_std must be >= 0, got {init_std}")
        shape = (num_tokens, dim) if num_layers is None else (num_layers, num_tokens, dim)
        self.num_tokens, self.dim, self.num_layers, self.num_time_buckets = (
            num_tokens,
            dim,
            num_layers,
            num_time_buckets,
        )
        self.stages: tuple[str, ...] = ("down",) if num_layers is None else ()
        self.position = 1 if num_layers is None else 0
        self.tokens = nn.Parameter(torch.randn(shape) * init_std)
        if isinstance(init, Tensor):
            if init.shape[-1:] != (dim,) or torch.broadcast_shapes(init.shape, shape) != shape:
                raise ValueError(f"init must broadcast to the tokens' shape {shape}, got {tuple(init.shape)}")
            self.tokens.data += init.detach().to(self.tokens)
        elif init != "normal":
            raise ValueError(f"init must be 'normal' or a tensor, got {init!r}")
        self.time_table: nn.Parameter | None = None
        if num_time_buckets is not None:
            self.time_table = nn.Parameter(torch.randn(num_time_buckets, (num_layers or 1) * dim) * init_std)

    @classmethod
    def for_model(
        cls, model: nn.Module, num_tokens: int = 4, num_layers: int | None = None, **settings: Any
    ) -> SoftTokenBank:
        """A bank of the width that a denoiser takes.

        Args:
            model: A UNet2DConditionModel or SD3Transformer2DModel.
            num_tokens: m.
            num_layers: K of an SD3; default: 5 as in the paper, or all blocks if there are fewer.
            **settings: The other arguments of the class.

        Raises:
            ValueError: For another model, or settings out of range.
        """
        layout = _layout(model)
        if layout.kind == "joint" and num_layers is None:
            num_layers = min(5, layout.num_layers)
        return cls(num_tokens, layout.dim, num_layers, **settings)

    def forward(self, timesteps: float | Tensor) -> Tensor:
        """Soft tokens s at ``timesteps``, B of them or one, from 0 to 1000: ``(B, m, d)``, or ``(K, B, m, D)``."""
        t = torch.as_tensor(timesteps, device=self.tokens.device).reshape(-1)
        tokens = self.tokens.unsqueeze(-3)  # (1, m, d) or (K, 1, m, D)
        if self.time_table is None:
            return tokens.expand(*self.tokens.shape[:-2], len(t), -1, -1)
        n = len(self.time_table)
        bucket = (t.floor().long() * n // _TRAINING_STEPS).clamp(0, n - 1)
        offsets = self.time_table[bucket]  # (B, d) or (B, K D)
        if self.num_layers is not None:
            offsets = offsets.unflatten(1, (self.num_layers, self.dim)).transpose(0, 1)
        return tokens + offsets.unsqueeze(-2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SoftTokenBank:
        def moved(tensor: Tensor) -> Tensor:  # in half precision small steps would be lost
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype in (torch.float16, torch.bfloat16) else result

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        """The settings."""
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())

    def _settings(self) -> dict[str, Any]:
        names = ("num_tokens", "dim", "num_layers", "num_time_buckets", "stages", "position")
        return {name: getattr(self, name) for name in names}

    def save(self, path: str | Path) -> None:
        """Write tokens, time table and where they belong to a safetensors file, in float32."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().float().cpu().contiguous() for name, value in self.state_dict().items()}
        kind = "cross_attention" if self.num_layers is None else "joint"
        metadata = {"format": _FILE_FORMAT, "layout": json.dumps({"kind": kind, **self._settings()})}
        require("safetensors.torch", "SoftTokenBank.save").save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> SoftTokenBank:
        """Read what `save` has written.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is another one, or does not hold what it says.
        """
        safetensors = require("safetensors", "SoftTokenBank.load")
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r} of soft tokens")
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ValueError(f"{str(path)!r} cannot be read as a safetensors file: {error}") from error
        if metadata.get("format") != _FILE_FORMAT:
            raise ValueError(
                f"{str(path)!r} is no file of SoftTokenBank.save: its metadata lack format={_FILE_FORMAT!r}, and it "
                f"holds {', '.join(sorted(tensors)[:3]) or 'nothing'}"
            )
        try:
            settings = json.loads(metadata["layout"])
            settings.pop("kind")
            stages, position = tuple(settings.pop("stages")), settings.pop("position")
            bank = cls(**settings)
            bank.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{str(path)!r} does not hold what its metadata say: {error}") from error
        bank.stages, bank.position = stages, position
        return bank


class _Layout(NamedTuple):
    kind: Literal["cross_attention", "joint"]
    dim: int
    num_layers: int  # that can have tokens of their own


def _layout(model: nn.Module) -> _Layout:
    """What a denoiser takes, told by the name of its class."""
    names = {kind.__name__ for kind in type(model).__mro__}
    config: Any = getattr(model, "config", None)
    if "UNet2DConditionModel" in names:
        dims = config.cross_attention_dim
        dims = {dims} if isinstance(dims, int) else set(dims)
        if len(dims) != 1:
            raise ValueError(
                f"model has blocks of different cross_attention_dim, {sorted(dims)}: one bank fits not all"
            )
        return _Layout("cross_attention", dims.pop(), 0)
    if "SD3Transformer2DModel" in names:
        return _Layout("joint", config.caption_projection_dim, len(model.transformer_blocks))  # type: ignore[arg-type]
    if "OptimizedModule" in names:
        raise ValueError("model is compiled already: attach the soft tokens first, then call torch.compile")
    raise ValueError(f"model is a {type(model).__name__}; {_FALLBACK}")


def attach_soft_tokens(
    model: nn.Module,
    bank: SoftTokenBank,
    stages: Sequence[str] | None = None,
    position: int | None = None,
    *,
    modules: Sequence[nn.Module] | None = None,
) -> SoftTokenHandle:
    """Let a denoiser of diffusers read soft tokens in every call, wherever it is called: in training or a pipeline.

    The model itself is not changed: the bank is no part of its parameters, state dict or saved files, and without the
    tokens (`SoftTokenHandle.disabled`, `SoftTokenHandle.remove`) it computes what it did before, bit for bit. Tokens
    are cast to type and device of the text. A copy of the model (``copy.deepcopy``) has a copy of the bank. Attach
    before ``torch.compile``.

    Args:
        model: A UNet2DConditionModel (Stable Diffusion 1, 2, XL) or SD3Transformer2DModel.
        bank: Of the model's width, see `SoftTokenBank.for_model`.
        stages: Of a UNet, among ``"down"``, ``"mid"``, ``"up"``: whose cross-attention reads the tokens. The released
            code has ``("down",)`` for SD 1.5, ``("down", "mid")`` for SDXL. Default: the bank's.
        position: Of a UNet: text tokens that stand before the soft ones. Default: the bank's, 1 for a new one: behind
            the token that begins the text.
        modules: For any other model with cross-attention: its modules that are called with ``encoder_hidden_states``
            and shall read the tokens. Takes the place of ``stages``.

    Returns:
        A handle to switch the tokens off and on, and to take them away.

    Raises:
        ValueError: If bank and model do not fit, the model has soft tokens already, or is of another family and
            ``modules`` is not given.
    """
    hooks = [getattr(hook, "func", None) for hook in model._forward_pre_hooks.values()]
    if any(isinstance(getattr(hook, "__self__", None), SoftTokenHandle) for hook in hooks):
        raise ValueError("model has soft tokens already: remove() their handle first")
    if modules is not None:
        if bank.num_layers is not None:
            raise ValueError("modules are of cross-attention: they take a bank with num_layers=None")
        layout = _Layout("cross_attention", bank.dim, 0)
    else:
        layout = _layout(model)
    if bank.dim != layout.dim:
        raise ValueError(f"bank has tokens of width dim={bank.dim}, but the {type(model).__name__} takes {layout.dim}")
    if layout.kind == "joint":
        if bank.num_layers is None:
            raise ValueError(f"bank is one of cross-attention; {type(model).__name__} takes one with num_layers")
        if bank.num_layers > layout.num_layers:
            raise ValueError(f"bank has tokens for num_layers={bank.num_layers} blocks, the model {layout.num_layers}")
        if stages is not None or position is not None:
            raise ValueError(f"stages and position are of UNets; {type(model).__name__} reads the tokens first")
        blocks: Any = model.transformer_blocks
        return SoftTokenHandle(model, bank, blocks, carrier="joint_attention_kwargs")
    if bank.num_layers is not None:
        raise ValueError(f"bank has num_layers={bank.num_layers}; {type(model).__name__} takes one with None")
    if position is not None and position < 0:
        raise ValueError(f"position must be >= 0, got {position}")
    if modules is None:
        stages = bank.stages if stages is None else tuple(stages)
        if not stages or not set(stages) <= set(STAGES) or len(set(stages)) < len(stages):
            raise ValueError(f"stages must be some of {STAGES}, each once, got {stages!r}")
        of_stage: dict[str, Any] = {"down": model.down_blocks, "mid": [model.mid_block], "up": model.up_blocks}
        readers = [b for stage in stages for b in of_stage[stage] if getattr(b, "has_cross_attention", False)]
        if not readers:
            raise ValueError(f"stages={stages!r} of this UNet have no cross-attention")
        bank.stages = stages
    else:
        readers = list(dict.fromkeys(modules))
        if not readers or not all("encoder_hidden_states" in _parameters(module) for module in readers):
            raise ValueError("modules must be some whose forward has an argument encoder_hidden_states")
    bank.position = bank.position if position is None else position
    return SoftTokenHandle(model, bank, readers, recomputed=modules is not None)


class SoftTokenHandle:
    """Soft tokens attached to a denoiser, by `attach_soft_tokens`.

    Attributes:
        bank: The tokens.
        enabled: Whether the model reads them; `enable`, `disable` and `disabled` set it.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: SoftTokenBank,
        modules: Sequence[nn.Module],
        carrier: str | None = None,
        recomputed: bool = False,
    ) -> None:
        # Under gradient checkpointing SD3's blocks run again in backward, when the model may have been called since at
        # another time: there the timestep travels with the block's arguments, in the dict `carrier`. Blocks of UNets
        # are never run again. Of other modules (`recomputed`) one cannot know.
        self.bank, self.carrier, self.recomputed = bank, carrier, recomputed
        self.enabled = True
        self._timestep: Any = None
        names = _parameters(model)
        if bank.time_table is not None and "timestep" not in names:
            raise ValueError(
                f"bank depends on time, and forward of {type(model).__name__} has no argument timestep; use a bank "
                "with num_time_buckets=None"
            )
        self._hooks: list[Any] = [model.register_forward_pre_hook(partial(self._before_model, names), with_kwargs=True)]
        for layer, module in enumerate(modules):
            names = _parameters(module)
            before = partial(self._before_module, names, layer)
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            if bank.num_layers is not None and layer < bank.num_layers:
                self._hooks.append(module.register_forward_hook(self._after_module))

    def enable(self) -> None:
        """Let the model read the tokens, as it does from the beginning."""
        if not self._hooks:
            raise ValueError("these soft tokens were removed from their model: attach the bank again")
        self.enabled = True

    def disable(self) -> None:
        """Let the model compute what it did before the tokens were attached."""
        self.enabled = False

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without its tokens, for a while."""
        enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = enabled

    def remove(self) -> None:
        """Take the tokens away for good."""
        self.enabled = False  # for what torch.compile has made of the hooks
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _before_model(self, names: list[str], model: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.enabled:
            return None
        if self.recomputed and self.bank.time_table is not None and torch.is_grad_enabled():
            checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
            if checkpointed:
                raise ValueError(
                    "gradient checkpointing runs modules again when the timestep may be another: turn it off, or take "
                    "a bank with num_time_buckets=None"
                )
        arguments = _by_name(names, args, kwargs)
        timestep = arguments.get("timestep", 0)
        if self.carrier is None:
            self._timestep = timestep
            return None
        arguments[self.carrier] = {**(arguments.get(self.carrier) or {}), _KEY: timestep}
        return (), arguments

    def _before_module(self, names: list[str], layer: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.enabled:
            return None
        arguments, timestep = _by_name(names, args, kwargs), self._timestep
        if self.carrier is not None:
            carried = dict(arguments.get(self.carrier) or {})
            timestep = carried.pop(_KEY, None)
            arguments[self.carrier] = carried or None
        if timestep is None:
            raise ValueError(
                f"{type(module).__name__} reads soft tokens, and must be called by the model it belongs to"
            )
        if self.bank.num_layers is None:
            tokens, position = self.bank(timestep), self.bank.position
        elif layer < self.bank.num_layers:
            tokens, position = self.bank(timestep)[layer], 0
        else:
            return (), arguments
        text = arguments["encoder_hidden_states"]
        arguments["encoder_hidden_states"] = (  # a tuple: with the pictures of an IP-Adapter
            (_insert(text[0], tokens, position), *text[1:])
            if isinstance(text, tuple)
            else _insert(text, tokens, position)
        )
        mask = arguments.get("encoder_attention_mask")
        if mask is not None:  # (B, 1, L), added to the logits; (B, L) of ones and zeros
            seen = torch.full_like(mask[..., :1], 0 if mask.ndim == 3 else 1).expand(*mask.shape[:-1], tokens.shape[1])
            arguments["encoder_attention_mask"] = torch.cat([mask[..., :position], seen, mask[..., position:]], -1)
        return (), arguments

    def _after_module(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.enabled:
            return None
        text, image = output
        return (text if text is None else text[:, self.bank.num_tokens :]), image  # None behind the last block


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _by_name(names: list[str], args: Any, kwargs: Any) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _insert(text: Tensor, tokens: Tensor, position: int) -> Tensor:
    """Text ``(B, L, d)`` with tokens ``(B, m, d)`` or ``(1, m, d)``, in the text's type, at ``position``."""
    tokens = tokens.to(text).expand(len(text), -1, -1)
    return torch.cat([text[:, :position], tokens, text[:, position:]], 1)
