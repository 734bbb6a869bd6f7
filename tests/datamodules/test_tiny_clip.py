from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from heliostat import ImageTextDataModule
from heliostat.components import cross_modal_recall
from heliostat.datamodules.sources import tiny_clip
from heliostat.datamodules.sources.tiny_clip import WordTower, fit_towers

CAPTIONS = ["red apple", "green apple", "red car, side view"]


def test_words_and_padding() -> None:
    tower = WordTower.of_captions(CAPTIONS, 8).eval()
    assert set(tower.ids) == {"<unknown>", "red", "green", "apple", "car", "side", "view"}
    both = tower(["Red apple!", "red car, side view"])
    assert both.shape == (2, 8)
    torch.testing.assert_close(both[:1], tower(["red apple"]))  # neither case, nor punctuation, nor padding
    torch.testing.assert_close(tower(["blue apple"]), tower(["violet apple"]))  # words that it does not know
    assert tower([""]).isfinite().all()


def test_fingerprint_is_of_words_and_weights() -> None:
    torch.manual_seed(0)
    tower = WordTower.of_captions(CAPTIONS, 8)
    torch.manual_seed(0)
    assert WordTower.of_captions(CAPTIONS, 8).fingerprint == tower.fingerprint
    torch.manual_seed(0)
    assert WordTower.of_captions(["blue apple", *CAPTIONS[1:]], 8).fingerprint != tower.fingerprint
    before = tower.fingerprint
    with torch.no_grad():
        tower.projection.weight.add_(1)
    assert tower.fingerprint != before


def test_towers_come_to_agree() -> None:
    torch.manual_seed(0)
    image, text = nn.Linear(6, 8), WordTower.of_captions(CAPTIONS, 8)
    pictures = torch.randn(3, 6)
    log_scale = fit_towers(image, text, pictures, CAPTIONS, steps=60)
    assert log_scale != pytest.approx(torch.tensor(1 / 0.07).log().item())
    with torch.no_grad():
        recall = cross_modal_recall(image(pictures), text(CAPTIONS), torch.arange(3), torch.arange(3))
    assert recall[1] == 1


def test_pair_finds_emoji_by_names_it_has_not_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    state = torch.get_rng_state()
    image = tiny_clip.tiny_clip_image_tower(size=48, trainable_blocks=1)
    text = tiny_clip.tiny_clip_text_tower(size=48)
    assert torch.equal(torch.get_rng_state(), state)
    trained = {name.split(".")[0] + "." + name.split(".")[1] for name, p in image.named_parameters() if p.requires_grad}
    assert trained == {"network.blocks", "network.conv_head", "network.bn2", "projection.weight"}
    assert not any(p.requires_grad for p in image.network.blocks[:-1].parameters())
    assert tiny_clip.tiny_clip_text_tower(size=48).fingerprint == text.fingerprint
    data = ImageTextDataModule(size=48, mean=image.image_mean, std=image.image_std)
    data.setup("validate")
    pictures, texts, _ = data.val_dataloader()
    with torch.no_grad():
        embeddings = torch.cat([image(batch["pixel_values"]) for batch in pictures])
        captions = [caption for batch in texts for caption in batch["text"]]
        groups = [torch.cat([batch["group"] for batch in loader]) for loader in (pictures, texts)]
        recall = cross_modal_recall(embeddings, text(captions), *groups)
    assert recall[10] > 0.25  # 0.03 by chance
