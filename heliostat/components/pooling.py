"""From token vectors to one vector a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Pooling = Literal["cls", "mean", "last", "mean_first_last", "mean_top2"]


def pool_tokens(hidden_states: Sequence[Tensor], attention_mask: Tensor, pooling: Pooling = "cls") -> Tensor:
    """Pool the hidden states of a transformer over its tokens.

    Args:
        hidden_states: Layers' outputs, each ``(B, T, d)``, the last layer at the end; all but ``mean_first_last``
            (embeddings and last layer) and ``mean_top2`` (last two) need only the last.
        attention_mask: ``(B, T)``, nonzero on real tokens; left and right padding both work.
        pooling: ``"cls"``: the first real token. ``"mean"``: mean of the real tokens. ``"last"``: the last real token
            (decoders). ``"mean_first_last"``, ``"mean_top2"``: mean over two layers' means.

    Returns:
        Shape ``(B, d)``, in the dtype of the hidden states.

    Raises:
        ValueError: If ``pooling`` is unknown, shapes do not fit, or two layers are needed and one was given.
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling must be one of {get_args(Pooling)}, got {pooling!r}")
    last = hidden_states[-1]
    if last.ndim != 3 or attention_mask.shape != last.shape[:2]:
        raise ValueError(
            "hidden_states must be (B, T, d) and attention_mask (B, T), got "
            f"{tuple(last.shape)} and {tuple(attention_mask.shape)}"
        )
    mask = attention_mask != 0
    if pooling in ("cls", "last"):
        position = torch.arange(mask.shape[1], device=mask.device)
        index = (mask * (position + 1)).argmax(1) if pooling == "last" else mask.int().argmax(1)
        return last[torch.arange(len(last), device=last.device), index]
    layers = [last]
    if pooling != "mean":
        if len(hidden_states) < 2:
            raise ValueError(f"pooling {pooling!r} needs the hidden states of two layers, got {len(hidden_states)}")
        layers.append(hidden_states[0 if pooling == "mean_first_last" else -2])
    weights = mask[:, :, None].to(last.dtype)
    summed = torch.stack(layers).mean(0).mul(weights).sum(1)
    return summed / weights.sum(1).clamp_min(1)
