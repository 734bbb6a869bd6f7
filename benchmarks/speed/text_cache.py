"""Cached text embeddings: a step of ProCLIP's stage 1 from the cache and with its models on line, and the look-up."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from benchmarks.speed import Case, Factory, Run, Speed
from heliostat import OpenCLIPTextTower, TextEmbedder
from heliostat.components import CachedTextEmbeddings, TextAdapter, representation_inheritance_loss
from heliostat.datamodules.sources.docstrings import docstring_sentences

BATCH = 128
BATCHES = 2  # which steps go through in turn
TEACHER = "ViT-B-32"
ROWS, ROWS_LOOKED_UP = 200_000, 1024


def stage_1(cached: bool, teacher: bool) -> Factory:
    """A step of the adapter alone, as after prepare_data: the cache is built, the models are loaded."""

    def prepare(device: torch.device) -> Run:
        torch.manual_seed(0)
        texts = docstring_sentences("train")[: BATCHES * BATCH]
        embedder = TextEmbedder("minilm").to(device)
        towers: list[TextEmbedder | OpenCLIPTextTower] = [embedder]
        if teacher:
            towers.append(OpenCLIPTextTower(TEACHER).to(device))
        folder = tempfile.TemporaryDirectory()
        caches = (
            [CachedTextEmbeddings.build(texts, t, folder.name, fingerprint=t.fingerprint) for t in towers]
            if cached
            else []
        )
        torch.manual_seed(0)
        fixed_target = torch.randn(BATCH, 512).to(device)
        adapter = TextAdapter(embedder.embedding_dim, 512).to(device)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5)
        batches = itertools.cycle([texts[i : i + BATCH] for i in range(0, len(texts), BATCH)])

        def run(kept: object = folder) -> tuple[Tensor, ...]:  # the folder goes when the run does
            batch = next(batches)
            if cached:
                embedded = [cache.lookup(batch).to(device) for cache in caches]
            else:
                embedded = [tower(batch) for tower in towers]
            target = embedded[1] if teacher else fixed_target
            loss = representation_inheritance_loss(adapter(embedded[0]), target).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return (*embedded, loss.detach())

        return run

    return prepare


def rows_of(texts: Sequence[str], dim: int) -> Tensor:
    """Numbers that depend on the text alone."""
    return torch.outer(torch.tensor([float(text) for text in texts]), torch.linspace(0.1, 1.0, dim)).sin()


def look_up(dim: int, dtype: Literal["float32", "float16"], cached: bool) -> Factory:
    """Random rows of many, by text."""

    def prepare(device: torch.device) -> Run:
        texts = [str(i) for i in range(ROWS)]
        folder = tempfile.TemporaryDirectory()
        cache = CachedTextEmbeddings.build(
            texts, lambda batch: rows_of(batch, dim), folder.name, fingerprint="rows", dtype=dtype
        )
        generator = torch.Generator().manual_seed(0)
        wanted = [str(int(i)) for i in torch.randint(ROWS, (ROWS_LOOKED_UP,), generator=generator)]
        if cached:
            return lambda kept=folder: (cache.lookup(wanted).to(device),)
        index = {text: i for i, text in enumerate(texts)}
        table = torch.cat([cache.lookup(texts[i : i + 1000]).to(getattr(torch, dtype)) for i in range(0, ROWS, 1000)])
        return lambda: (table[torch.tensor([index[text] for text in wanted])].float().to(device),)

    return prepare


def file_size(dim: int, dtype: str) -> str:
    """Size on disk, in MB."""
    return f"{ROWS * (dim * getattr(torch, dtype).itemsize + 24) / 1e6:.0f} MB"


LOOK_UPS: list[tuple[int, Literal["float32", "float16"]]] = [(384, "float32"), (4096, "float16")]
SPEED = Speed(
    summary=f"Stage 1: one step of ProCLIP's adapter on {BATCH} sentences, float32: embeddings of MiniLM (22 M "
    f"parameters, width 384), those of the text half of CLIP {TEACHER} (63 M parameters, at random) or fixed numbers "
    "as the target, loss, backward, AdamW. Peer: both models run in the step. An LLM takes hundreds of times MiniLM's "
    f"work, which widens the gap. Look-up: {ROWS_LOOKED_UP} texts drawn from {ROWS:,} rows on disk, whose "
    "pages are in the system's file cache after the first call. Peer: a dict and a tensor in memory.",
    cases={
        "stage 1, MiniLM": Case(
            ours={"from the cache": stage_1(cached=True, teacher=False)},
            peers={"embedding on line": stage_1(cached=False, teacher=False)},
        ),
        f"stage 1, MiniLM and CLIP {TEACHER}": Case(
            ours={"from the cache": stage_1(cached=True, teacher=True)},
            peers={"embedding on line": stage_1(cached=False, teacher=True)},
            repeats=5,
        ),
        **{
            f"look-up, d={dim} {dtype} ({file_size(dim, dtype)})": Case(
                ours={"CachedTextEmbeddings": look_up(dim, dtype, cached=True)},
                peers={"dict and tensor in memory": look_up(dim, dtype, cached=False)},
            )
            for dim, dtype in LOOK_UPS
        },
    },
)
