import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("matplotlib")

from heliostat.datamodules.sources import glyphs as source
from heliostat.datamodules.sources.glyphs import CHARACTERS, FONTS, glyphs


def test_what_there_is():
    rendered = glyphs("aβЖ5", size=20, jitter=3)
    assert rendered.images.dtype == torch.uint8
    assert rendered.images.shape == (len(rendered.labels), 1, 20, 20)
    assert rendered.characters == ("a", "β", "Ж", "5")
    # Computer Modern has no Greek and no Cyrillic
    assert rendered.labels.bincount().tolist() == [60, 48, 48, 60]
    assert rendered.fonts.unique().tolist() == list(range(len(FONTS)))
    ink = rendered.images.flatten(1).amax(1)
    assert (ink > 100).all()  # no picture is empty
    assert len(rendered.images.flatten(1).unique(dim=0)) == len(rendered.images)


def test_default_characters_are_different_and_all_there():
    assert len(set(CHARACTERS)) == len(CHARACTERS) == 186
    rendered = glyphs(size=8, jitter=1)
    assert len(rendered.labels.unique()) == 186


def test_characters_of_one_font_look_different():
    """Placeholders for characters that a font has not, or look-alikes of two scripts, would be one picture."""
    files = source._font_files()
    for font in ("DejaVuSans", "STIXGeneral", "cmr10"):
        present, ink = source._render(files[FONTS.index(font)], CHARACTERS, 48)
        assert len(present) == (62 if font == "cmr10" else 186)
        assert len(ink.flatten(1).unique(dim=0)) == len(present)


def test_deterministic():
    first = glyphs.__wrapped__("abc", size=16, jitter=2, seed=1)
    again = glyphs.__wrapped__("abc", size=16, jitter=2, seed=1)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, glyphs("abc", size=16, jitter=2, seed=2).images)
    without = glyphs("ac", size=16, jitter=2, seed=1)
    assert torch.equal(without.images, first.images[first.labels != 1])  # no character depends on another
    assert glyphs("abc", size=16, jitter=2) is glyphs("abc", size=16, jitter=2)


def test_same_in_every_process():
    code = (
        "import hashlib; from heliostat.datamodules.sources.glyphs import glyphs;"
        "print(hashlib.sha256(glyphs('ab', size=16, jitter=1).images.numpy().tobytes()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    images = glyphs("ab", size=16, jitter=1).images
    assert run.stdout.strip() == source.hashlib.sha256(images.numpy().tobytes()).hexdigest()


def test_fonts_of_another_matplotlib(tmp_path, monkeypatch):
    """A font less is said, a font more is not taken."""
    import matplotlib

    original = source._font_files()[0].parent
    folder = tmp_path / "fonts" / "ttf"
    folder.mkdir(parents=True)
    for file in original.glob("*.ttf"):
        if file.stem not in ("cmr10", "STIXGeneral"):
            (folder / file.name).symlink_to(file)
    (folder / "Another.ttf").symlink_to(original / "DejaVuSans.ttf")
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.warns(UserWarning, match=r"2 of 20 fonts are not in .*: STIXGeneral, cmr10\."):
        fewer = glyphs.__wrapped__("ab", size=16, jitter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.undo()
        whole = glyphs.__wrapped__("ab", size=16, jitter=1)
    kept = torch.tensor([FONTS[font] not in ("cmr10", "STIXGeneral") for font in whole.fonts])
    assert torch.equal(fewer.images, whole.images[kept])
    assert torch.equal(fewer.fonts, whole.fonts[kept])
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="none of matplotlib's fonts"):
        glyphs.__wrapped__("ab", size=16, jitter=1)


def test_errors():
    for characters in ("", "aba", ("ab", "c")):
        with pytest.raises(ValueError, match="different single characters"):
            glyphs(characters)
    with pytest.raises(ValueError, match="no font has '漢'; leave them out"):
        glyphs("a漢")
    with pytest.raises(ValueError, match="size and jitter must be >= 1, got 0 and 4"):
        glyphs("a", size=0)
