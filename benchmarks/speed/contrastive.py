"""Image-text contrastive loss, forward and backward, against open_clip's ClipLoss and against checkpointed chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.speed import Case, Factory, Run, Speed
from heliostat.components import grouped_contrastive_loss

DIM, CHUNK = 512, 1024

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def open_clip() -> Loss:
    """The loss that CLIP models are trained with; it wants features of unit length."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda image, text, scale: loss(F.normalize(image, dim=1), F.normalize(text, dim=1), scale)


def checkpointed() -> Loss:
    """What one writes where the logits do not fit: chunks of rows whose logits are computed again in backward."""

    def chunk(rows: Tensor, columns: Tensor, scale: Tensor, start: int) -> Tensor:
        own = torch.arange(start, start + len(rows), device=rows.device)
        return F.cross_entropy(scale * rows @ columns.mT, own, reduction="sum")

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        total = image.new_zeros(())
        for start in range(0, len(image), CHUNK):
            for rows, columns in ((image, text), (text, image)):
                part = rows[start : start + CHUNK]
                total = total + checkpoint(chunk, part, columns, scale, start, use_reentrant=False)
        return total / (2 * len(image))

    return loss


def contender(rows: int, make: Callable[[], Loss]) -> Factory:
    """Build the factory of one forward and backward; it returns the loss and the gradients."""

    def prepare(device: torch.device) -> Run:
        generator = torch.Generator().manual_seed(0)  # the same data for all contenders, on every device
        image = torch.randn(rows, DIM, generator=generator)
        text = image + 3 * torch.randn(rows, DIM, generator=generator)
        scale = torch.tensor(1 / 0.07, device=device, requires_grad=True)
        inputs = (image.to(device).requires_grad_(), text.to(device).requires_grad_(), scale)
        loss = make()

        def run() -> tuple[Tensor, ...]:
            value = loss(*inputs)
            return value.detach(), *torch.autograd.grad(value, inputs)

        return run

    return prepare


def _case(rows: int) -> Case:
    peer = ("open_clip ClipLoss", open_clip) if rows < 20_000 else ("checkpointed chunks", checkpointed)
    return Case(
        ours={"heliostat": contender(rows, lambda: grouped_contrastive_loss)},
        peers={peer[0]: contender(rows, peer[1])},
        repeats=3 if rows > 10_000 else None,
    )


SPEED = Speed(
    summary=f"Normalisation, InfoNCE both ways, forward and backward to images, texts and logit scale, float32, "
    f"d = {DIM}, one process. Peers: open_clip's `ClipLoss` on features that are normalised by `F.normalize`, up to "
    f"N = 16384, where it takes many times the 1 GiB of the logits; and, beyond that, cross entropy over chunks of "
    f"{CHUNK} rows under `torch.utils.checkpoint`, which is what one would write without them.",
    cases={f"N={rows}": _case(rows) for rows in (1024, 4096, 16384, 32768)},
)
