"""Image-text contrastive loss in groups, with batch accumulation: GBA-ITC of M2-Encoder (2024, arXiv 2401.15896).

InfoNCE both ways, as in CLIP: the one image-text contrastive loss of this library. It lives on many negatives, and they
cost memory and traffic in three places, each of which is dealt with by itself: the logits are evaluated block by block
and never stored whole; rows are exchanged inside groups of processes, so that traffic can stay on fast links; and
several micro-batches meet in one loss without their activations being kept. All three are exact, nothing is detached.
The training loss of the paper is not released: this is our reading of its description.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.checkpoint import get_device_states, set_device_states

from heliostat.components.distributed import default_group, gather_rows

_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # of a block of logits: fits the cache; fills the device
_KEPT_ELEMENTS = 2**25  # logits up to this number are kept for backward, which spares a quarter of the products

Tile = tuple[slice, slice]


def grouped_contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    column_chunk: int | None = None,
) -> Tensor:
    r"""InfoNCE of images and texts, both ways, over the rows of a group of processes.

        Z = s v t^T over the M rows of the group, v and t scaled to unit length
        l = 1/2n sum over the n own rows i of  [ log sum_j e^{Z_ij} - Z_ii ] + [ log sum_j e^{Z_ji} - Z_ii ]

    The mean of l over the processes is the mean over groups of the InfoNCE of their M pairs, and DDP's average is its
    gradient. Each process evaluates the logits of its own images against the group's texts, once for both directions;
    only texts and their log-sums travel. M differs with the group, and so does the loss: an untrained model is at
    about log M.

    Args:
        image: v, ``(n, d)``, any scale; the same n on all processes of the group (use ``drop_last``).
        text: t, ``(n, d)``, any scale; row i belongs to image i.
        logit_scale: s > 0, the factor itself and not its logarithm: a number or a tensor of one element.
        group: The processes whose rows are compared, see `make_contrastive_groups`; default: all.
        column_chunk: Texts of a block of logits, which has at most n x ``column_chunk`` elements; default: chosen by
            the size of the cache or device, and the logits of small batches are kept for backward. Value and gradient
            do not depend on it.

    Returns:
        Scalar, float32 (float64 for float64 input). 0 with zero gradient for one pair. It can be differentiated once.

    Raises:
        ValueError: On shapes that do not fit, a scale that is not one number, or ``column_chunk < 1``.
    """
    if image.ndim != 2 or not image.is_floating_point():
        raise ValueError(f"image must be floating point of shape (n, d), got {image.dtype} {tuple(image.shape)}")
    if text.shape != image.shape or not text.is_floating_point():
        raise ValueError(
            f"text must be floating point and have the shape of image, {tuple(image.shape)}, "
            f"got {text.dtype} {tuple(text.shape)}"
        )
    if column_chunk is not None and column_chunk < 1:
        raise ValueError(f"column_chunk must be >= 1, or None to choose it, got {column_chunk}")
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1:
            raise ValueError(f"logit_scale must be one number, got shape {tuple(logit_scale.shape)}")
    elif not logit_scale > 0:
        raise ValueError(f"logit_scale is the factor itself, not its logarithm, and must be > 0, got {logit_scale}")
    dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
    scale = torch.as_tensor(logit_scale, dtype=dtype, device=image.device).reshape(())
    with torch.autocast(image.device.type, enabled=False):
        own_image = F.normalize(image.to(dtype), dim=1, eps=1e-12)
        own_text = F.normalize(text.to(dtype), dim=1, eps=1e-12)
        return _in_blocks(own_image, own_text, scale, group or default_group(), column_chunk)


@torch.compiler.disable  # a few matrix products, with nothing to fuse that would be worth unrolling their loop
def _in_blocks(
    image: Tensor, text: Tensor, scale: Tensor, group: dist.ProcessGroup | None, column_chunk: int | None
) -> Tensor:
    loss: Tensor = _Contrastive.apply(image, gather_rows(text, group), scale, group, column_chunk)
    return loss


class _Contrastive(torch.autograd.Function):
    """Own images (n, d) against the group's texts (M, d), all of unit length.

    Negatives and positives are kept apart, -log softmax_i = softplus(log sum_{j != i} e^{Z_ij} - Z_ii), so that small
    losses and their gradients keep their digits.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, group: dist.ProcessGroup | None, column_chunk: int | None
    ) -> Tensor:
        rows, columns = len(image), len(text)
        first = 0 if group is None else group.rank() * rows
        own = slice(first, first + rows)
        keep = any(ctx.needs_input_grad) and column_chunk is None and rows * columns <= _KEPT_ELEMENTS
        scaled = image * scale
        positive = (scaled * text[own]).sum(1)  # (n,)
        of_image = image.new_full((rows,), -math.inf)  # log sum over the negatives of each own image, (n,)
        of_text = image.new_full((columns,), -math.inf)  # and of each text, (M,)
        tiles, kept = _tiles(rows, columns, image.device.type, column_chunk), []
        for tile in tiles:
            logits = _negatives(scaled, text, tile, first)
            for log_sum, part, dim in ((of_image, tile[0], 1), (of_text, tile[1], 0)):
                log_sum[part] = torch.logaddexp(log_sum[part], logits.logsumexp(dim))
            if keep:
                kept.append(logits)
        positives = positive
        if group is not None and group.size() > 1:
            of_text, positives = _share(of_text, positive, own, group)
        ctx.group, ctx.own, ctx.tiles = group, own, tiles
        ctx.save_for_backward(image, text, scale, of_image, of_text, positives, *kept)
        terms = F.logsigmoid(positive - of_image) + F.logsigmoid(positive - of_text[own])
        return -terms.sum() / (2 * max(1, rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, of_image, of_text, positives, *kept = ctx.saved_tensors
        own, rows = ctx.own, len(image)
        with torch.autocast(image.device.type, enabled=False):
            weight = grad.reshape(1) / (2 * max(1, rows))
            weights = gather_rows(weight, ctx.group).repeat_interleave(rows)  # of each text, by its process, (M,)
            positive, scaled = positives[own], image * scale
            image_total = torch.logaddexp(of_image, positive)[:, None]
            text_total = torch.logaddexp(of_text, positives)
            # What a positive lacks to probability 1, from both sides.
            missing = weight * (of_image - positive).sigmoid() + weights[own] * (of_text[own] - positive).sigmoid()
            grad_image = grad_text = grad_scale = None
            if ctx.needs_input_grad[0] or not ctx.needs_input_grad[1]:
                grad_image = text[own] * -missing[:, None]
            if ctx.needs_input_grad[1]:
                grad_text = torch.zeros_like(text)
                grad_text[own] = image * -missing[:, None]
            for i, (block, part) in enumerate(ctx.tiles):
                logits = kept[i] if kept else _negatives(scaled, text, (block, part), own.start)
                pair = (logits - image_total[block]).exp_().mul_(weight)  # becomes dL / dZ, (b, c)
                pair.addcmul_((logits - text_total[part]).exp_(), weights[part])
                if grad_image is not None:
                    grad_image[block].addmm_(pair, text[part])
                if grad_text is not None:
                    grad_text[part].addmm_(pair.mT, image[block])
            if ctx.needs_input_grad[2]:  # sum_ij dL/dZ_ij v_i t_j
                grad_scale = (grad_image * image).sum() if grad_image is not None else (grad_text * text).sum()
            return (
                grad_image * scale if ctx.needs_input_grad[0] else None,
                None if grad_text is None else grad_text * scale,
                grad_scale,
                None,
                None,
            )


def _tiles(rows: int, columns: int, device: str, column_chunk: int | None) -> list[Tile]:
    elements = _BLOCK_ELEMENTS.get(device, 2**24)
    side = math.isqrt(elements)
    width = column_chunk or max(side, elements // max(1, rows))
    height = max(side, elements // width)
    return [
        (slice(top, min(top + height, rows)), slice(left, min(left + width, columns)))
        for top in range(0, rows, height)
        for left in range(0, columns, width)
    ]


def _negatives(scaled: Tensor, text: Tensor, tile: Tile, first: int) -> Tensor:
    """Logits of a tile, with -inf in the place of positives: image i belongs to text ``first`` + i."""
    rows, columns = tile
    logits = scaled[rows] @ text[columns].mT
    offset = first + rows.start - columns.start
    if -len(logits) < offset < logits.shape[1]:
        logits.diagonal(offset).fill_(-math.inf)
    return logits


def _share(of_text: Tensor, positive: Tensor, own: slice, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Log-sums over all processes' images from those over own images, and all processes' positives, (M,) each."""
    largest = torch.stack([of_text, torch.full_like(of_text, -math.inf)])
    largest[1, own] = positive
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    shift, positives = largest
    total = (of_text - shift).exp()
    dist.all_reduce(total, group=group)  # a NaN gets lost in a maximum, but not here
    return shift + total.log(), positives


def make_contrastive_groups(group_size: int) -> dist.ProcessGroup | None:
    """Divide all processes into groups of neighbouring ranks, and return this process's own.

    To be called once, by all processes, when they have been joined and before training, e.g. in `setup`.

    Args:
        group_size: Processes a group, a divisor of their number; e.g. those of one machine.

    Returns:
        The group for `grouped_contrastive_loss`; ``None``, for all processes, if all are in one group.

    Raises:
        ValueError: If ``group_size`` does not divide the number of processes.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if group_size < 1 or world % group_size:
        raise ValueError(f"group_size must divide the number of processes, {world}, got {group_size}")
    if group_size == world:
        return None
    # Every process must create every group, also those that it is not in, in the same order.
    groups = [dist.new_group(list(range(first, first + group_size))) for first in range(0, world, group_size)]
    return cast(dist.ProcessGroup, groups[dist.get_rank() // group_size])


class CachedContrastiveStep:
    """Forward and backward of one large batch whose activations would not fit, in micro-batches, with exact gradient.

    All micro-batches are encoded without activations; the loss gives the gradient of the features; then each
    micro-batch is encoded once more, with the random numbers of the first time, and gets its share of that gradient.
    It costs one more forward of the encoders. With one micro-batch it is an ordinary step.

    The gradient is added to the parameters' ``.grad``, of the loss's parameters (the logit scale) once:

        step = CachedContrastiveStep(self.encode_image, self.encode_text, self.loss, micro_batches=8)
        optimizer.zero_grad()
        loss = step(batch["pixel_values"], batch["text_embeddings"], backward=self.manual_backward)
        optimizer.step()

    Args:
        encode_image: Maps a micro-batch of images to features, ``(b, d)``.
        encode_text: Maps a micro-batch of texts to features, ``(b, d)``.
        loss: Maps all features, ``(n, d)`` each, to a scalar, e.g. by `grouped_contrastive_loss`.
        micro_batches: K >= 1, the same on all processes.

    Raises:
        ValueError: If ``micro_batches < 1``.
    """

    def __init__(
        self,
        encode_image: Callable[[Any], Tensor],
        encode_text: Callable[[Any], Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        micro_batches: int = 1,
    ) -> None:
        if micro_batches < 1:
            raise ValueError(f"micro_batches must be >= 1, got {micro_batches}")
        self.encode_image, self.encode_text, self.loss = encode_image, encode_text, loss
        self.micro_batches = micro_batches

    def __call__(
        self,
        image_inputs: Any,
        text_inputs: Any,
        *,
        backward: Callable[[Tensor], object] = Tensor.backward,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        """Add the gradient of the loss to the parameters.

        Args:
            image_inputs: n rows for ``encode_image``: a tensor, a list, or a dict of these. If the encoders draw random
                numbers on a device, some tensor of either input must be there.
            text_inputs: n rows for ``encode_text``, likewise.
            backward: What to call in the place of ``Tensor.backward``: ``manual_backward`` of a LightningModule, or a
                function that scales by a GradScaler first.
            no_sync: DDP's method of that name (``self.trainer.model.no_sync``): gradients are then exchanged once, with
                the last micro-batch. The loss's parameters must belong to the module that DDP wraps.

        Returns:
            The loss, detached.

        Raises:
            ValueError: If there are fewer rows than micro-batches, rows that do not match, a loss that is no scalar,
                or a BatchNorm in training mode: it sees micro-batches, and would update its statistics twice.
        """
        if self.micro_batches == 1:
            loss = self.loss(self.encode_image(image_inputs), self.encode_text(text_inputs))
            backward(loss)
            return loss.detach()
        parts = self._parts(image_inputs, text_inputs)
        # Random numbers are drawn on the CPU and on the inputs' devices.
        tensors = [x for inputs in (image_inputs, text_inputs) for x in _values(inputs) if isinstance(x, Tensor)]
        device = next((x.device.type for x in tensors if x.device.type != "cpu"), "cuda")
        draws, features = [], []
        with torch.no_grad():
            for number, part in enumerate(parts):
                draws.append((torch.get_rng_state(), get_device_states(*tensors)))
                with nullcontext() if number else _refusing_batch_norm():
                    features.append(self._encode(part))
        torch.clear_autocast_cache()  # its copies of the weights know of no gradient
        counts = [len(image) for image, _ in features]
        images, texts = (torch.cat(side).requires_grad_() for side in zip(*features, strict=True))
        del features
        with torch.enable_grad():
            loss = self.loss(images, texts)
        if loss.ndim != 0:
            raise ValueError(f"loss must return a scalar, got shape {tuple(loss.shape)}")
        parameters = [leaf for leaf in _leaves(loss) if leaf is not images and leaf is not texts]
        of_image, of_text, *of_parameters = torch.autograd.grad(
            loss, (images, texts, *parameters), allow_unused=True, materialize_grads=True
        )
        shares = zip(parts, draws, of_image.split(counts), of_text.split(counts), strict=True)
        for number, (part, (cpu_state, (devices, states)), *gradients) in enumerate(shares, start=1):
            last = number == len(parts)
            with nullcontext() if last else no_sync():
                with torch.random.fork_rng(devices, device_type=device), torch.enable_grad():
                    torch.set_rng_state(cpu_state)
                    set_device_states(devices, states, device_type=device)
                    outputs = [*self._encode(part)]
                if last:  # the loss's parameters too, since DDP wants the gradients of all in one backward
                    outputs, gradients = outputs + parameters, gradients + of_parameters
                pairs = [(x, gradient) for x, gradient in zip(outputs, gradients, strict=True) if x.requires_grad]
                if pairs:
                    with torch.enable_grad():
                        surrogate = torch.stack([(x * gradient).sum() for x, gradient in pairs]).sum()
                    backward(surrogate)
        return loss.detach()

    def _encode(self, part: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        image, text = self.encode_image(part[0]), self.encode_text(part[1])
        # In float32 at least: gradients that wait for their micro-batch must not underflow.
        dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
        return image.to(dtype), text.to(dtype)

    def _parts(self, image_inputs: Any, text_inputs: Any) -> list[tuple[Any, Any]]:
        counts = {len(value) for inputs in (image_inputs, text_inputs) for value in _values(inputs)}
        if len(counts) != 1 or min(counts) < self.micro_batches:
            raise ValueError(
                "image_inputs and text_inputs must have the same number of rows, at least one a micro-batch, "
                f"got {sorted(counts)} for micro_batches={self.micro_batches}"
            )
        bounds = [min(counts) * k // self.micro_batches for k in range(self.micro_batches + 1)]
        rows = [slice(start, stop) for start, stop in pairwise(bounds)]
        return [(_rows_of(image_inputs, part), _rows_of(text_inputs, part)) for part in rows]


def _values(inputs: Any) -> list[Any]:
    return list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]


def _rows_of(inputs: Any, rows: slice) -> Any:
    if isinstance(inputs, Mapping):
        return {name: value[rows] for name, value in inputs.items()}
    return inputs[rows]


@contextmanager
def _refusing_batch_norm() -> Iterator[None]:
    def refuse(module: nn.Module, args: object) -> None:
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"{type(module).__name__} in training mode sees single micro-batches and would update its statistics "
                "twice: set it to eval(), replace it by GroupNorm, or set micro_batches=1"
            )

    hook = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


def _leaves(value: Tensor) -> list[Tensor]:
    """The tensors with a ``.grad`` that ``value`` is computed from."""
    nodes, leaves = {value.grad_fn}, []
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):  # AccumulateGrad
            leaves.append(node.variable)
        for following, _ in node.next_functions:
            if following not in nodes:
                nodes.add(following)
                waiting.append(following)
    return leaves
