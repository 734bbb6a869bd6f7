"""U-REPA (arXiv 2503.18414): pull the middle of a diffusion U-Net towards patch features of a vision transformer.

While a denoiser trains, what its middle stage makes of the noised picture is mapped by a small projector to what a
frozen self-supervised transformer sees in the clean one: position by position, and in the similarities among the
positions. For U-Nets that are trained from scratch or for long; the gain is largest early, and where conditions say
little. Training only: sampling knows nothing of it. The training is `heliostat.UREPA`, or `heliostat.UREPACallback` for
a module of your own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from heliostat.components.distributed import default_group, gather_rows

Relation = Literal["token", "sample", "batch"]
Resize = Literal["bilinear", "bicubic", "nearest"]
Grid = tuple[int, int]


class UREPALoss(NamedTuple):
    """What `u_repa_loss` returns."""

    total: Tensor
    """align_weight * (L_tok + manifold_weight * L_man)."""
    token: Tensor
    """L_tok, in [-1, 1]."""
    manifold: Tensor
    """L_man, in [0, 4]."""


def token_alignment_loss(projected: Tensor, target: Tensor) -> Tensor:
    """Negative mean cosine of each projected token and the teacher's at its place: REPA's loss (arXiv 2410.06940).

        L_tok = -1 / (B N) sum_{b,n} cos(p_bn, y_bn),   cos(x, y) = x / max(|x|, 1e-12) . y / max(|y|, 1e-12)

    A zero token has cosine 0 with every other.

    Args:
        projected: p, ``(B, N, D)``, any scale.
        target: y of the teacher, ``(B, N, D)``. No gradient flows to it.

    Returns:
        Scalar in [-1, 1], float32 (float64 for float64 input).

    Raises:
        ValueError: On shapes that do not fit, or without tokens.
    """
    p, y = _prepare(projected, target)
    with torch.autocast(p.device.type, enabled=False):
        return -(_unit(p) * _unit(y)).sum(-1).mean()


def manifold_alignment_loss(
    projected: Tensor,
    target: Tensor,
    *,
    relation: Relation = "token",
    center: bool = False,
    max_tokens: int | None = None,
    generator: torch.Generator | None = None,
    gather: bool = True,
) -> Tensor:
    """How much the similarities among the projected tokens differ from those among the teacher's.

        S(x)_ij = cos(x_i, x_j),   L_man = mean_ij (S(p)_ij - S(y)_ij)^2

    The loss does not change under a rotation of all p, nor if a token is scaled. Its matrices have B N^2, B^2 or
    (B N)^2 entries, as ``relation`` says; one of them is kept for backward.

    Args:
        projected: p, ``(B, N, D)``, any scale.
        target: y of the teacher, ``(B, N, D)``. No gradient flows to it.
        relation: What i and j are: ``"token"`` the tokens of one sample, averaged over the samples; ``"sample"`` the
            samples, each the mean of its tokens; ``"batch"`` all tokens of all samples.
        center: Subtract the mean of all that is compared before it is scaled to unit length. Not in the paper: for
            teachers whose tokens share so large a component that all cosines are near 1.
        max_tokens: Compare this many positions only, drawn at random, the same ones in all samples and on both sides.
            Not for ``relation="sample"``, which has no matrix of tokens.
        generator: Draws them; default: the global one of the device.
        gather: For ``"sample"`` and ``"batch"``, compare the rows of all processes, which must be as many on each.
            Averaged over processes, value and gradient are then those of one process with the whole batch (with
            ``max_tokens``, if all draw the same positions). ``"token"`` needs none.

    Returns:
        Scalar in [0, 4], float32 (float64 for float64 input).

    Raises:
        ValueError: On shapes that do not fit, without tokens, or for settings out of range.
    """
    check_settings(relation=relation, max_tokens=max_tokens)
    p, y = _prepare(projected, target)
    with torch.autocast(p.device.type, enabled=False):
        return _manifold(p, y, relation, center, max_tokens, generator, gather)


def _manifold(
    p: Tensor,
    y: Tensor,
    relation: Relation,
    center: bool,
    max_tokens: int | None,
    generator: torch.Generator | None,
    gather: bool,
    unit: bool = False,
) -> Tensor:
    """L_man; ``unit``: of tokens that have unit length already."""
    if max_tokens is not None and max_tokens < p.shape[1]:
        device = p.device if generator is None else generator.device
        kept = torch.randperm(p.shape[1], generator=generator, device=device)[:max_tokens].to(p.device)
        p, y = p[:, kept], y[:, kept]
    own, every = _compared(p, relation, center, gather, unit)
    own_teacher, every_teacher = _compared(y, relation, center, gather, unit)
    difference = torch.baddbmm(own_teacher @ every_teacher.mT, own, every.mT, beta=-1)  # S(p) - S(y)
    return difference.square().mean()


def _compared(tokens: Tensor, relation: Relation, center: bool, gather: bool, unit: bool) -> tuple[Tensor, Tensor]:
    """Unit rows ``(G, R, D)`` of this process, and ``(G, K, D)`` of all, compared within each of G groups."""
    group = default_group() if gather and relation != "token" else None
    if relation != "token":
        rows = tokens.mean(1) if relation == "sample" else tokens.flatten(0, 1)
        tokens, count = gather_rows(rows, group)[None] if group is not None else rows[None], len(rows)
    if center:
        tokens = tokens - tokens.mean(1, keepdim=True)
    if not unit:
        tokens = _unit(tokens)
    return (tokens if group is None else tokens[:, group.rank() * count :][:, :count]), tokens


def u_repa_loss(
    projected: Tensor,
    target: Tensor,
    *,
    align_weight: float = 0.5,
    manifold_weight: float = 3.0,
    relation: Relation = "token",
    center: bool = False,
    max_tokens: int | None = None,
    generator: torch.Generator | None = None,
    gather: bool = True,
) -> UREPALoss:
    """What U-REPA adds to the loss of the denoiser.

        L = align_weight * (L_tok + manifold_weight * L_man)

    Args:
        projected: p, ``(B, N, D)``, see `AlignmentProjector`.
        target: y of the teacher, ``(B, N, D)``: of the clean picture, without class token.
        align_weight: lambda, >= 0.
        manifold_weight: w, >= 0.
        relation: See `manifold_alignment_loss`; so are the next four.
        center: Subtract the mean.
        max_tokens: Positions that L_man compares.
        generator: Draws them.
        gather: Compare the rows of all processes.

    Returns:
        The total, and the two terms without their weights.

    Raises:
        ValueError: On shapes that do not fit, without tokens, or for settings out of range.
    """
    check_settings(align_weight, manifold_weight, relation, max_tokens)
    p, y = _prepare(projected, target)
    with torch.autocast(p.device.type, enabled=False):
        unit_p, unit_y = _unit(p), _unit(y)
        token = -(unit_p * unit_y).sum(-1).mean()
        shared = relation != "sample" and not center  # then both terms are of the same unit tokens
        tokens = (unit_p, unit_y) if shared else (p, y)
        manifold = _manifold(*tokens, relation, center, max_tokens, generator, gather, unit=shared)
        return UREPALoss(align_weight * (token + manifold_weight * manifold), token, manifold)


def check_settings(
    align_weight: float = 0.0,
    manifold_weight: float = 0.0,
    relation: Relation = "token",
    max_tokens: int | None = None,
    stop_step: int | None = None,
) -> None:
    """Refuse settings out of range.

    Raises:
        ValueError: With the setting, what was given, and what is possible.
    """
    for name, weight in (("align_weight", align_weight), ("manifold_weight", manifold_weight)):
        if not weight >= 0:
            raise ValueError(f"{name} must be >= 0, got {weight}")
    if relation not in get_args(Relation):
        raise ValueError(f"relation must be one of {get_args(Relation)}, got {relation!r}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be >= 1, or None for all, got {max_tokens}")
    if max_tokens is not None and relation == "sample":
        raise ValueError(
            f"max_tokens={max_tokens} goes with relation 'token' or 'batch': 'sample' compares means of all tokens"
        )
    if stop_step is not None and stop_step < 0:
        raise ValueError(f"stop_step must be >= 0, or None for never, got {stop_step}")


def _prepare(projected: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if projected.ndim != 3 or projected.numel() == 0:
        raise ValueError(f"projected must have shape (B, N, D), without zeros, got {tuple(projected.shape)}")
    if target.shape != projected.shape:
        raise ValueError(
            f"target must have the shape of projected, {tuple(projected.shape)}, got {tuple(target.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(projected.dtype, target.dtype), torch.float32)
    return projected.to(dtype), target.detach().to(dtype)


def _unit(tokens: Tensor) -> Tensor:
    return F.normalize(tokens, dim=-1, eps=1e-12)


# --- from the denoiser to the teacher's tokens -----------------------------------------------------------------------


class AlignmentProjector(nn.Module):
    """Map a denoiser's features to the teacher's tokens: an MLP at every position, then a resize to the teacher's grid.

        z = W_3 silu(W_2 silu(W_1 h + b_1) + b_2) + b_3   at each position,   p = resize(z)

    The order is the paper's, and so is that the teacher is never resized. Weights are drawn from Xavier's uniform
    distribution by a generator of their own, so that a run with a projector has the random numbers of one without;
    biases are 0.

    Args:
        in_channels: Channels C of the features.
        out_dim: Width D of the teacher's tokens.
        hidden_dim: Width P of the MLP.
        grid: Rows and columns (H, W) of the teacher's tokens. Default: those that ``num_tokens`` makes in the shape of
            the features, so that it is needed only where they are of another shape.
        mode: Of the resize, which has ``align_corners=False``.
        generator: Draws the weights, on the CPU; default: a new one, seeded from the seed of the global one.

    Raises:
        ValueError: For settings out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_dim: int,
        hidden_dim: int = 2048,
        grid: Grid | None = None,
        mode: Resize = "bilinear",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if in_channels < 1 or out_dim < 1 or hidden_dim < 1:
            raise ValueError(
                f"in_channels, out_dim and hidden_dim must be >= 1, got {in_channels}, {out_dim} and {hidden_dim}"
            )
        if grid is not None and (len(grid) != 2 or min(grid) < 1):
            raise ValueError(f"grid must be rows and columns of the teacher's tokens, both >= 1, got {tuple(grid)}")
        if mode not in get_args(Resize):
            raise ValueError(f"mode must be one of {get_args(Resize)}, got {mode!r}")
        self.in_channels, self.out_dim, self.mode = in_channels, out_dim, mode
        self.grid: Grid | None = None if grid is None else (int(grid[0]), int(grid[1]))
        if generator is None:
            generator = torch.Generator().manual_seed((torch.initial_seed() + 1) % 2**63)
        self.mlp = nn.Sequential(
            _linear(in_channels, hidden_dim, generator),
            nn.SiLU(),
            _linear(hidden_dim, hidden_dim, generator),
            nn.SiLU(),
            _linear(hidden_dim, out_dim, generator),
        )

    def forward(self, features: Tensor, num_tokens: int | None = None) -> Tensor:
        """Projected tokens p ``(B, N, D)``, float32 at least, row by row of the teacher's grid.

        Args:
            features: h, ``(B, C, h, w)`` of a U-Net, or ``(B, n, C)`` of a transformer: n positions of a grid in the
                shape of ``grid``, or of a square.
            num_tokens: N; not needed with ``grid``. Without both nothing is resized.

        Raises:
            ValueError: If the channels differ, or the tokens make no grid.
        """
        if features.ndim not in (3, 4):
            raise ValueError(f"features must have shape (B, C, h, w) or (B, n, C), got {tuple(features.shape)}")
        tokens = features.flatten(2).mT if features.ndim == 4 else features
        if tokens.shape[2] != self.in_channels:
            raise ValueError(
                f"features {tuple(features.shape)} have {tokens.shape[2]} channels, and the projector was made for "
                f"in_channels={self.in_channels}"
            )
        z = self.mlp(tokens)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.grid is not None and num_tokens not in (None, math.prod(self.grid)):
            raise ValueError(f"grid={self.grid} has {math.prod(self.grid)} tokens, and the teacher gives {num_tokens}")
        count = math.prod(self.grid) if self.grid is not None else num_tokens
        if features.ndim == 4:
            shape: Grid = (features.shape[2], features.shape[3])
        elif count in (None, tokens.shape[1]):
            return z
        else:
            shape = _grid(tokens.shape[1], self.grid or (1, 1), "tokens of the denoiser")
        grid = self.grid or (shape if count is None else _grid(count, shape, "tokens of the teacher"))
        if grid == shape:
            return z
        with torch.autocast(z.device.type, enabled=False):
            corners = None if self.mode == "nearest" else False
            return F.interpolate(z.mT.unflatten(2, shape), grid, mode=self.mode, align_corners=corners).flatten(2).mT


def _linear(in_dim: int, out_dim: int, generator: torch.Generator) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, in_dim, out_dim)  # whose own weights would come from the global generator
    nn.init.xavier_uniform_(linear.weight, generator=generator)
    nn.init.zeros_(linear.bias)
    return linear


def _grid(count: int, aspect: Grid, what: str) -> Grid:
    """Rows and columns of ``count`` tokens whose proportion is that of ``aspect``."""
    rows = round(math.sqrt(count * aspect[0] / aspect[1])) or 1
    columns = count // rows
    if rows * columns != count or rows * aspect[1] != columns * aspect[0]:
        raise ValueError(
            f"{count} {what} make no grid in the shape of {aspect[0]} x {aspect[1]}: give grid=(H, W), the rows and "
            "columns of the teacher's tokens"
        )
    return rows, columns


def last_tensor(output: Any) -> Any:
    """The output itself, or the last tensor of a tuple: the hidden state of every block of diffusers.

    Down blocks of U-Nets return (hidden, residuals), blocks of SD3 (text, hidden).
    """
    if isinstance(output, (tuple, list)):
        return next((item for item in reversed(output) if isinstance(item, Tensor)), output)
    return output


class FeatureTap:
    """Read what a module inside a network returns while the network is called.

        tap = FeatureTap(unet.mid_block)
        with tap:
            prediction = unet(noisy, timestep)
        features = tap.take()

    A hook stays on the module from the beginning, because `torch.compile` does not see one that comes later. Outside
    ``with`` it keeps nothing, such as samples, or what gradient checkpointing computes again in backward; nor inside it
    of a call without gradient, unless ``with`` was entered without gradient. Of several calls the last one counts.

    Args:
        module: To be read.
        select: Picks the tensor from what the module returns; default: `last_tensor`.
    """

    def __init__(self, module: nn.Module, select: Callable[[Any], Any] = last_tensor) -> None:
        self.select = select
        self._features: Tensor | None = None
        self._with_gradient: bool | None = None  # None: closed
        self._handle = module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._with_gradient is torch.is_grad_enabled():
            self._features = self.select(output)

    def __enter__(self) -> FeatureTap:
        self._features, self._with_gradient = None, torch.is_grad_enabled()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._with_gradient = None
        if error is not None:
            self._features = None

    def take(self) -> Tensor:
        """What the module returned last, which is then let go.

        Raises:
            ValueError: It was not called inside ``with``, or returned no tensor.
        """
        features, self._features = self._features, None
        if not isinstance(features, Tensor):
            raise ValueError(
                "the layer that U-REPA reads was not called with gradient in this step: is it a part of the network "
                "that is trained?"
                if features is None
                else f"the layer that U-REPA reads returned {type(features).__name__}, in which there is no tensor to "
                "be found: choose a layer inside it"
            )
        return features

    def clear(self) -> None:
        """Let go of what was read."""
        self._features = None

    def remove(self) -> None:
        """Take the hook off the module."""
        self.clear()
        self._handle.remove()


def find_layer(network: nn.Module, layer: str) -> nn.Module:
    """The module of that name; for the ``mid_block`` that a U-Net has not, its last down block.

    Args:
        network: Searched.
        layer: The module's path, or the end of one, if only one ends so.

    Raises:
        ValueError: There is none, or several.
    """
    modules = dict(network.named_modules())
    if layer in modules:
        return modules[layer]
    found = {name: module for name, module in modules.items() if name.endswith("." + layer)}
    if not found and layer.split(".")[-1] == "mid_block":
        parent = layer.removesuffix("mid_block").removesuffix(".")
        found = {
            f"{name}.down_blocks": module.down_blocks[-1]
            for name, module in modules.items()
            if (not parent or name == parent or name.endswith("." + parent))
            and getattr(module, "mid_block", module) is None
            and getattr(module, "down_blocks", None)
        }
    if len(found) != 1:
        names = sorted(found) or [name for name in modules if name.count(".") < 2 and name]
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise ValueError(
            f"layer {layer!r} is the name of {'several modules' if found else 'no module'} of "
            f"{type(network).__name__}: {'give one of' if found else 'it has'} {shown}"
        )
    return next(iter(found.values()))


def output_channels(module: nn.Module) -> int:
    """Channels that a block returns: those of the last convolution or linear layer inside it.

    Raises:
        ValueError: There is no such layer.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, (_ConvNd, nn.Linear))]
    if not layers:
        raise ValueError(
            f"the channels that {type(module).__name__} returns are not to be seen from its layers: give in_channels"
        )
    last = layers[-1]
    return last.out_channels if isinstance(last, _ConvNd) else last.out_features


class RepresentationAligner(nn.Module):
    """All that U-REPA adds to a denoiser in training: the tap on one of its layers, the projector, and the loss.

        with aligner.tap:
            loss = ...  # calls the denoiser
        alignment, report = aligner(teacher_features)

    Args:
        network: Has the layer; it is not a part of this module.
        layer: See `find_layer`.
        teacher_dim: Width D of the teacher's tokens.
        in_channels: Channels that the layer returns; default: see `output_channels`.
        hidden_dim: See `AlignmentProjector`; so is the next.
        grid: Rows and columns of the teacher's tokens.
        align_weight: See `u_repa_loss`; so are the next four.
        manifold_weight: Weight of L_man.
        relation: What L_man compares.
        center: Subtract the mean.
        max_tokens: Positions that L_man compares.
        stop_step: Step of the optimizer from which on nothing is aligned; None: never.

    Raises:
        ValueError: The layer is not to be found, or for settings out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        layer: str,
        teacher_dim: int,
        *,
        in_channels: int | None = None,
        hidden_dim: int = 2048,
        grid: Grid | None = None,
        align_weight: float = 0.5,
        manifold_weight: float = 3.0,
        relation: Relation = "token",
        center: bool = False,
        max_tokens: int | None = None,
        stop_step: int | None = None,
    ) -> None:
        super().__init__()
        check_settings(align_weight, manifold_weight, relation, max_tokens, stop_step)
        module = find_layer(network, layer)
        channels = output_channels(module) if in_channels is None else in_channels
        self.projector = AlignmentProjector(channels, teacher_dim, hidden_dim, grid)
        self.tap = FeatureTap(module)
        self.enabled, self.stop_step = align_weight > 0 and stop_step != 0, stop_step
        self.projector.requires_grad_(self.enabled)  # no optimizer and no clipping then sees a difference
        self.settings: dict[str, Any] = {
            "align_weight": align_weight,
            "manifold_weight": manifold_weight,
            "relation": relation,
            "center": center,
            "max_tokens": max_tokens,
        }

    def active(self, step: int) -> bool:
        """Whether anything is aligned at this step of the optimizer."""
        return self.enabled and (self.stop_step is None or step < self.stop_step)

    def nothing(self) -> Tensor | int:
        """Zero, attached to the projector: DistributedDataParallel wants every parameter to be used in every step."""
        return sum(0 * parameter.sum() for parameter in self.parameters() if parameter.requires_grad)

    def forward(self, teacher_features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Align what the tap has read.

        In evaluation the rows are this process's alone, and the positions of ``max_tokens`` always the same.

        Args:
            teacher_features: y, ``(B, N, D)``, in the order of the denoiser's rows.

        Returns:
            What is added to the loss; and to be logged, without gradient, ``cosine``, which is -L_tok, ``manifold``,
            L_man, and ``shuffled_cosine``, the cosine to the teacher of other rows: what the position alone gives.

        Raises:
            ValueError: On shapes that do not fit.
        """
        features = self.tap.take()
        expected = (len(features), self.projector.out_dim)
        if teacher_features.ndim != 3 or teacher_features.shape[::2] != expected:
            raise ValueError(
                f"teacher_features must have shape (B, N, D) with B = {expected[0]} rows, as the denoiser has, and D = "
                f"teacher_dim = {expected[1]}, got {tuple(teacher_features.shape)}"
            )
        projected = self.projector(features, teacher_features.shape[1])
        generator = None if self.training else torch.Generator(projected.device).manual_seed(0)
        loss = u_repa_loss(projected, teacher_features, **self.settings, generator=generator, gather=self.training)
        with torch.no_grad():
            others = teacher_features.roll(len(teacher_features) // 2, 0)
            shuffled = -token_alignment_loss(projected, others)
        report = {"cosine": -loss.token, "manifold": loss.manifold, "shuffled_cosine": shuffled}
        return loss.total, {name: value.detach() for name, value in report.items()}
