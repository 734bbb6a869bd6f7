"""English sentences that every Python installation has: the docstrings of the standard library.

The sources are parsed with ``ast``, so nothing is imported; a sentence is the first sentence of the docstring of a
function, a method or a class. Pairs of sentences are graded by where their docstrings stand: 3 in the same class, 2 in
the same module, 1 in the same package, 0 in different packages. These are structural grades, good for ranking
embeddings without a download; no human judged the similarity, and the numbers compare with no published benchmark.

The sentences change with the Python version: report ``sys.version_info`` beside any figure made from them.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

Split = Literal["train", "validation", "test"]

# Tests, demonstrations, generated tables, and an application (idlelib): not documentation of an interface.
_SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings", "pydoc_data"}
# Any salt gives disjoint splits. This one was searched for by counts alone: on Python 3.10 to 3.13 it puts a tenth of
# the sentences into validation and a tenth into test, with packages of many modules in both, which grade 1 needs.
_SALT = 41572


class _Docstring(NamedTuple):
    sentence: str
    package: str  # top-level name
    module: str  # dotted name
    owner: str  # "module:Class" of the class that it documents or stands in, "" outside classes


def docstring_sentences(split: Split) -> list[str]:
    """Return the sentences of one split, each once, in the order of the source files.

    Splits are made of whole top-level packages, chosen by a hash of the package's name: no sentence is in two splits,
    and a package that Python gains or loses moves no other.

    Args:
        split: ``"train"`` (about 5,000 sentences), ``"validation"`` or ``"test"`` (about 600 each).

    Raises:
        ValueError: ``split`` is something else.
        FileNotFoundError: This Python comes without the sources of its standard library.
    """
    return [docstring.sentence for docstring in _docstrings(split)]


def docstring_pairs(split: Split, n: int = 2000, seed: int = 0) -> list[tuple[str, str, float]]:
    """Draw graded pairs of sentences from one split.

    A pair's class, module or package is drawn first and its sentences second, so that no large class rules the set.
    No pair comes twice; a sentence may be in several pairs.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``; see :func:`docstring_sentences`.
        n: Number of pairs, as many of one grade as of another (the remainder has grade 0).
        seed: Seed of the draw.

    Returns:
        ``n`` tuples (sentence, sentence, grade) with grades 0.0, 1.0, 2.0, 3.0 in shuffled order.

    Raises:
        ValueError: ``split`` is unknown, or the split has not enough pairs of some grade.
        FileNotFoundError: This Python comes without the sources of its standard library.
    """
    rng = random.Random(seed)
    quota = n // 4
    pairs = []
    for grade in (3, 2, 1, 0):
        wanted = quota if grade else n - 3 * quota
        found = _draw_pairs(_docstrings(split), grade, wanted, rng)
        if len(found) < wanted:
            raise ValueError(
                f"n={n} asks for {wanted} pairs of grade {grade}, but split={split!r} gave only {len(found)}; "
                f"give n <= {4 * len(found)}"
            )
        pairs += found
    rng.shuffle(pairs)
    return pairs


def _grade(a: _Docstring, b: _Docstring) -> int:
    if a.owner and a.owner == b.owner:
        return 3
    if a.module == b.module:
        return 2
    return 1 if a.package == b.package else 0


def _draw_pairs(docstrings: list[_Docstring], grade: int, n: int, rng: random.Random) -> list[tuple[str, str, float]]:
    """Draw up to ``n`` different pairs of one grade; fewer if repeated tries find no new one."""
    pools = defaultdict(list)
    for docstring in docstrings:
        group = {3: docstring.owner, 2: docstring.module, 1: docstring.package, 0: "all"}[grade]
        if group:
            pools[group].append(docstring)
    candidates = [pool for pool in pools.values() if any(_grade(pool[0], other) == grade for other in pool[1:])]
    pairs: dict[frozenset[str], tuple[str, str, float]] = {}
    tries_in_vain = 0
    while candidates and len(pairs) < n and tries_in_vain < 1000:
        tries_in_vain += 1
        a, b = rng.sample(rng.choice(candidates), 2)
        key = frozenset((a.sentence, b.sentence))
        if _grade(a, b) == grade and key not in pairs:
            pairs[key] = (a.sentence, b.sentence, float(grade))
            tries_in_vain = 0
    return list(pairs.values())


def _docstrings(split: Split) -> list[_Docstring]:
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(map(repr, get_args(Split)))}, got {split!r}")
    return [docstring for docstring in _all_docstrings() if _split_of(docstring.package) == split]


def _split_of(package: str) -> Split:
    # hashlib, because hash() of a string differs from process to process
    tenth = int.from_bytes(hashlib.sha256(f"{_SALT}/{package}".encode()).digest()[:8], "big") % 10
    return "validation" if tenth == 0 else "test" if tenth == 1 else "train"


@cache
def _all_docstrings() -> tuple[_Docstring, ...]:
    """Read the whole standard library once per process (about 3 s of CPU time)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    unique: dict[str, _Docstring] = {}
    for path in _source_files(root):
        relative = path.relative_to(root).with_suffix("")
        module = ".".join(part for part in relative.parts if part != "__init__")
        source = path.read_text("utf-8", errors="replace")
        if '"""' not in source:
            continue
        for docstring in _docstrings_of(source, module):
            unique.setdefault(docstring.sentence.casefold(), docstring)
    if not unique:
        raise FileNotFoundError(
            f"no docstrings under {root}: this Python comes without the sources of its standard library; "
            "give your own files instead of 'docstrings'"
        )
    return tuple(unique.values())


def _source_files(root: Path) -> list[Path]:
    files = []
    # Not root.rglob: site-packages stands below root and may hold 100,000 files.
    for entry in sorted(root.iterdir()):
        if entry.stem in sys.stdlib_module_names and entry.stem not in _SKIPPED:
            files += sorted(entry.rglob("*.py")) if entry.is_dir() else [entry] if entry.suffix == ".py" else []
    return [file for file in files if not _SKIPPED.intersection(file.relative_to(root).parts)]


def _docstrings_of(source: str, module: str) -> Iterator[_Docstring]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a Linux distribution may add files that are templates
        return
    yield from _walk(tree.body, module, owner="")


def _walk(statements: Iterable[ast.stmt], module: str, owner: str) -> Iterator[_Docstring]:
    package = module.split(".")[0]
    for statement in statements:
        if isinstance(statement, ast.ClassDef):
            inner = f"{owner or module}:{statement.name}"
            if sentence := _first_sentence(ast.get_docstring(statement)):
                yield _Docstring(sentence, package, module, inner)
            yield from _walk(statement.body, module, inner)
        elif isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if sentence := _first_sentence(ast.get_docstring(statement)):
                yield _Docstring(sentence, package, module, owner)
        else:  # definitions under `if` and `try`
            for field in ("body", "orelse", "handlers", "finalbody"):
                yield from _walk(getattr(statement, field, ()), module, owner)


def _first_sentence(docstring: str | None) -> str | None:
    """Return the first sentence on one line, or None if it is no sentence: under 3 words or over 200 characters."""
    if not docstring:
        return None
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())
    sentence = re.split(r"(?<=[a-z)\]'\"])(?<!e\.g)(?<!i\.e)\.(?:\s|$)", paragraph)[0].rstrip(".")
    if len(sentence) > 200 or len(re.findall(r"[A-Za-z]{2,}", sentence)) < 3:
        return None
    return sentence
