"""A small CLIP to start from, offline: EfficientNet-Lite0 and a tower of whole words, made to agree on emoji.

Its image tower has real ImageNet weights; its text tower knows the words of the training captions and no others. The
two are trained contrastively on the training part of `heliostat.datamodules.sources.twemoji`, with the network frozen:
a stand-in for a pretrained CLIP where none can be downloaded.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.components.contrastive import grouped_contrastive_loss
from heliostat.components.source_statistics import weights_fingerprint
from heliostat.datamodules.image_text import ImageTextDataModule
from heliostat.towers import TimmImageTower

_UNKNOWN = "<unknown>"


class WordTower(nn.Module):
    """Text tower of one transformer block over whole words in any order; those that it does not know are one to it.

    Args:
        words: Its vocabulary.
        output_dim: Width d of an embedding.
        width: Of the block.
    """

    def __init__(self, words: Sequence[str], output_dim: int, width: int = 128) -> None:
        super().__init__()
        self.ids = {word: i for i, word in enumerate([_UNKNOWN, *sorted(set(words))], start=1)}  # 0: padding
        self.output_dim = output_dim
        self.embedding = nn.Embedding(len(self.ids) + 1, width, padding_idx=0)
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.projection = nn.Linear(width, output_dim, bias=False)

    @classmethod
    def of_captions(cls, captions: Sequence[str], output_dim: int) -> WordTower:
        """A tower that knows the words of these captions."""
        return cls([word for caption in captions for word in _words(caption)], output_dim)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embeddings ``(N, d)`` of N texts, not normalised."""
        device = self.embedding.weight.device
        rows = [[self.ids.get(word, self.ids[_UNKNOWN]) for word in _words(text)] or [1] for text in texts]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
        known = ids > 0
        hidden = self.block(self.embedding(ids), src_key_padding_mask=~known)
        return self.projection((hidden * known[..., None]).sum(1) / known.sum(1, keepdim=True))

    @property
    def fingerprint(self) -> str:
        """A hash of vocabulary and weights."""
        words = hashlib.blake2b("\n".join(self.ids).encode(), digest_size=16).hexdigest()
        return f"{words}{weights_fingerprint(self)}"


def tiny_clip_image_tower(
    seed: int = 0, output_dim: int = 128, size: int = 64, trainable_blocks: int | None = None
) -> nn.Module:
    """The image tower: a `heliostat.TimmImageTower` of 3.5 million parameters for pictures of ``size`` pixels.

    Made in about half a minute on one core, at once when asked for again in the same process. Random numbers outside
    are left alone.

    Args:
        seed: Of the projections and of the text tower.
        output_dim: Width of both towers' embeddings.
        size: Height and width of the pictures, normalised by the mean 127 / 255 and the deviation 128 / 255.
        trainable_blocks: Freeze all but the last of seven stages of blocks and what follows them; None: nothing.
    """
    tower = copy.deepcopy(_tiny_clip(seed, output_dim, size)[0])
    if trainable_blocks is not None:
        network = tower.network
        frozen = [network.conv_stem, network.bn1, *network.blocks[: len(network.blocks) - trainable_blocks]]
        for part in frozen:
            part.requires_grad_(False)
    return tower


def tiny_clip_text_tower(seed: int = 0, output_dim: int = 128, size: int = 64) -> nn.Module:
    """The text tower that belongs to `tiny_clip_image_tower` with the same arguments, a `WordTower` in eval mode."""
    return copy.deepcopy(_tiny_clip(seed, output_dim, size)[1])


@cache
def _tiny_clip(seed: int, output_dim: int, size: int) -> tuple[Any, nn.Module]:
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        torch.set_num_threads(1)  # sums, and so weights, do not depend on the number of cores then
        try:
            image: Any = TimmImageTower("package:efficientnet_lite0", output_dim).eval()
            data = ImageTextDataModule(size=size, mean=image.image_mean, std=image.image_std)
            data.setup("fit")
            features, captions = [], []
            with torch.no_grad():
                for batch in data.train_dataloader():
                    features.append(image.network(batch["pixel_values"]))
                    captions += batch["text"]
            text = WordTower.of_captions(captions, output_dim)
            log_scale = fit_towers(image.projection, text, torch.cat(features), captions)
        finally:
            torch.set_num_threads(threads)
    image.logit_scale = log_scale
    return image, text.requires_grad_(False).eval()


def fit_towers(
    image: nn.Module,
    text: nn.Module,
    pictures: Tensor,
    captions: Sequence[str],
    steps: int = 400,
    batch_size: int = 256,
) -> float:
    """Train an image and a text tower contrastively on pairs, from global random numbers.

    Args:
        image: Maps rows of ``pictures`` to ``(B, d)``.
        text: Maps a list of B strings to ``(B, d)``.
        pictures: ``(N, ...)``.
        captions: N texts.
        steps: Of AdamW, at up to 1e-3 by a one-cycle schedule.
        batch_size: Pairs a step, drawn with replacement.

    Returns:
        The logarithm of the logit scale.
    """
    log_scale = torch.tensor(1 / 0.07).log().requires_grad_()
    parameters = [*image.parameters(), *text.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(captions), (batch_size,))
        loss = grouped_contrastive_loss(
            image(pictures[rows]), text([captions[i] for i in rows.tolist()]), log_scale.exp()
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return float(log_scale.detach())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
