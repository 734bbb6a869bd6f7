"""Labelled pictures without a download: characters, rendered from the TrueType files that matplotlib brings.

The class is the character; its pictures differ in font, size, rotation and place. Almost two hundred classes allow
whole classes to be held out (metric learning), a few dozen make a classifier in seconds, and the fonts are domains.
The fonts are DejaVu, STIX and (letters and digits alone) Computer Modern, all under free licences.

Fonts that another matplotlib adds are not used. Pillow's renderer may move a grey level from version to version: report
its version beside any figure made from these pictures.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from heliostat._extras import require
from heliostat.datamodules.affine import jitter_affine

# Without letters of two scripts that look the same (Greek Α and Β as Latin A and B, Cyrillic Г and П as Greek Γ and Π).
CHARACTERS = (
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρστφχψω"
    "БДЖЗИЛФЦЧШЩЫЭЮЯбвгджзиклптфцчшщыэюя"
    "ÀÄÅÆÇÈÊËÑÒÖØÙÜÝßàäåæçèêëñòöøùüýÿ"
    "!?&@#$%+=<>{}[]()/*§©®±×÷€£¥"  # noqa: RUF001
)
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSans-Oblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique", "DejaVuSansMono-Oblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "STIXGeneralItalic"),
    *("cmb10", "cmr10", "cmss10", "cmtt10"),
)
# Computer Modern, whose other places are in TeX's own encoding: its "<" is "¡".
_ONLY_ALPHANUMERIC = frozenset(FONTS[-4:])

_EM = 0.7  # of the picture's side, before scaling
_SCALE = 0.14  # either way: a small capital stays larger than the same letter's large lower case
_DEGREES = 14
_SHIFT = 0.12  # of the side, either way


class Glyphs(NamedTuple):
    """Rendered characters, ordered by font, character and draw."""

    images: Tensor  # (N, 1, size, size) uint8; 255 is ink
    labels: Tensor  # (N,) int64, positions in `characters`
    fonts: Tensor  # (N,) int64, positions in `FONTS`
    characters: tuple[str, ...]


@cache
def glyphs(characters: str | tuple[str, ...] = CHARACTERS, *, size: int = 32, jitter: int = 4, seed: int = 0) -> Glyphs:
    """Render characters in every font that has them, at random sizes, angles and places.

    The numbers of a picture follow from ``seed``, font, character and draw, so leaving characters out moves nothing
    else. The result is kept for the next call with the same arguments: do not write into it.

    Args:
        characters: One class each; default: 186 letters, digits and signs (62 of them ASCII letters and digits).
        size: Side of the pictures in pixels.
        jitter: Pictures of each character in each font.
        seed: Seed of sizes, angles and places.

    Returns:
        N = ``jitter`` times the number of (character, font) pairs: 12,896 pictures by default.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: No character, one given twice or that is in no font, or ``size`` or ``jitter`` < 1.
        FileNotFoundError: matplotlib has none of the fonts. One that is missing is only warned of.
    """
    if not characters or len(set(characters)) < len(characters) or any(len(c) != 1 for c in characters):
        raise ValueError(f"characters must be different single characters, at least one, got {characters!r:.200}")
    if size < 1 or jitter < 1:
        raise ValueError(f"size and jitter must be >= 1, got {size} and {jitter}")
    images, labels, fonts = [], [], []
    for font, file in enumerate(_font_files()):
        if file is None:
            continue
        present, ink = _render(file, characters, size)
        if not present:
            continue
        images.append(_place(ink, [f"{seed}/{FONTS[font]}/{characters[i]}" for i in present], jitter))
        labels += [i for i in present for _ in range(jitter)]
        fonts += [font] * len(present) * jitter
    if missing := [c for i, c in enumerate(characters) if i not in set(labels)]:
        raise ValueError(f"characters: no font has {', '.join(map(repr, missing))}; leave them out")
    return Glyphs(torch.cat(images), torch.tensor(labels), torch.tensor(fonts), tuple(characters))


def _font_files() -> list[Path | None]:
    """The file of each of `FONTS`, None where this matplotlib has it no more."""
    folder = Path(require("matplotlib", "Rendering 'glyphs'").get_data_path()) / "fonts" / "ttf"
    files = [folder / f"{name}.ttf" for name in FONTS]
    missing = [file.stem for file in files if not file.is_file()]
    if len(missing) == len(FONTS):
        raise FileNotFoundError(f"there is none of matplotlib's fonts in {str(folder)!r}; reinstall matplotlib")
    if missing:
        warnings.warn(
            f"glyphs: {len(missing)} of {len(FONTS)} fonts are not in {str(folder)!r}: {', '.join(missing)}. "
            "Figures compare only with others made without them",
            stacklevel=2,
        )
    return [file if file.is_file() else None for file in files]


def _render(file: Path, characters: Sequence[str], size: int) -> tuple[list[int], Tensor]:
    """The positions of the characters that a font has, and each of them upright and centred ``(n, 1, size, size)``."""
    purpose = "Rendering 'glyphs'"
    image, draw, font = (require(f"PIL.{name}", purpose) for name in ("Image", "ImageDraw", "ImageFont"))
    with require("fontTools.ttLib", purpose).TTFont(file, lazy=True) as tables:
        known = tables.getBestCmap() or {}
    if file.stem in _ONLY_ALPHANUMERIC:
        known = {code: name for code, name in known.items() if code < 128 and chr(code).isalnum()}
    present = [i for i, character in enumerate(characters) if ord(character) in known]
    face = font.truetype(str(file), size * _EM)
    pictures = []
    for i in present:
        left, top, right, bottom = face.getbbox(characters[i])
        picture = image.new("L", (size, size))
        corner = ((size - left - right) / 2, (size - top - bottom) / 2)
        draw.Draw(picture).text(corner, characters[i], fill=255, font=face)
        pictures.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, size, size))
    return present, torch.stack(pictures) if pictures else torch.empty(0, 1, size, size, dtype=torch.uint8)


def _place(ink: Tensor, names: Sequence[str], jitter: int) -> Tensor:
    """Scale, turn and shift each picture ``jitter`` times, by numbers that its name determines."""
    generator = torch.Generator()
    draws = [torch.rand(jitter, 4, generator=generator.manual_seed(_hash(name))) for name in names]
    placed = jitter_affine(
        ink.repeat_interleave(jitter, 0).float(), torch.cat(draws), degrees=_DEGREES, scale=_SCALE, shift=_SHIFT
    )
    return placed.round().clamp(0, 255).to(torch.uint8)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
