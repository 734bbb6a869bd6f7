"""A training step of SimCSE and of WhitenedCSE against sentence-transformers' way of training unsupervised SimCSE."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import MultipleNegativesRankingLoss
from torch import Tensor

from benchmarks.speed import Case, Factory, Run, Speed
from heliostat import WhitenedCSE
from heliostat.datamodules.sources.docstrings import docstring_sentences

LAYERS, LENGTH = 2, 24


def step_of(parameters: Sequence[torch.nn.Parameter], loss: object) -> Run:
    """Loss, backward and AdamW, as each library's trainer does them."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)

    def run() -> list[Tensor]:
        value = loss()  # type: ignore[operator]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return []  # dropout makes each loss another one: nothing to compare

    return run


def ours(rows: int, **settings: object) -> Factory:
    def build(device: torch.device) -> Run:
        module = WhitenedCSE("minilm", num_layers=LAYERS, freeze=["embeddings"], **settings).to(device)  # type: ignore[arg-type]
        module.log = lambda *_, **__: None  # type: ignore[method-assign]
        module.trainer = type("Alone", (), {"world_size": 1})()
        sentences = docstring_sentences("train")[:rows]

        def loss() -> Tensor:
            tokens = module.tokenizer(sentences, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
            return module.training_step(tokens.to(device), 0)

        return step_of([p for p in module.parameters() if p.requires_grad], loss)

    return build


def sentence_transformers(rows: int) -> Factory:
    """Its documented recipe: pairs (sentence, sentence) under MultipleNegativesRankingLoss, scale 20 = 1 / 0.05."""

    def build(device: torch.device) -> Run:
        with tempfile.TemporaryDirectory() as directory:
            WhitenedCSE("minilm", num_layers=LAYERS).save_pretrained(directory)
            model = SentenceTransformer(directory, device=str(device))
        model.max_seq_length = LENGTH
        model[0].auto_model.embeddings.requires_grad_(False)
        model.train()
        loss_function = MultipleNegativesRankingLoss(model, scale=20.0)
        sentences = docstring_sentences("train")[:rows]

        def loss() -> Tensor:
            columns = []
            for _ in range(2):  # its collator tokenizes each column
                tokens = model.tokenizer(
                    sentences, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
                )
                columns.append({name: value.to(device) for name, value in tokens.items()})
            return loss_function(columns, torch.zeros(rows, device=device))

        return step_of([p for p in model.parameters() if p.requires_grad], loss)

    return build


def case(rows: int) -> Case:
    return Case(
        ours={
            "heliostat SimCSE (V=2)": ours(rows, whiten=False, num_views=2),
            "heliostat WhitenedCSE (V=2, m=6)": ours(rows, num_views=2),
            "heliostat WhitenedCSE (V=3, m=6)": ours(rows),
            "heliostat WhitenedCSE (V=3, m=24, full gradient)": ours(rows, group_size=24, detach_transform=False),
        },
        peers={"sentence-transformers SimCSE": sentence_transformers(rows)},
    )


SPEED = Speed(
    summary=(
        "Tokenisation, forward, backward and AdamW step; two MiniLM layers, [CLS] pooling, frozen token embeddings, at "
        "most 24 tokens, float32. The first contender computes what sentence-transformers computes, with the "
        "projection that SimCSE trains with on top; V=3 encodes each sentence three times instead of twice."
    ),
    cases={f"batch of {rows} sentences": case(rows) for rows in (64, 128)},
)
