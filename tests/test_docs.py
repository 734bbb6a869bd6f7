"""The documentation is true: its examples run, its links lead somewhere, its paper index names what exists."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from heliostat.cli import recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
INDEXES = [ROOT / "README.md", ROOT / "docs" / "paper_index.md"]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    found = BLOCK.finditer(text)
    return [(text.count("\n", 0, match.start(2)) + 1, match[2]) for match in found if match[1] == language]


def prose(page: Path) -> str:
    return re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in a link."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
@pytest.mark.filterwarnings("ignore")
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, block in blocks(page, "python"):
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + block, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    missing = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert pages
    assert not [page for page in pages if f": {page}\n" not in navigation]


def index_rows(page: Path) -> list[list[str]]:
    """The rows of the table after the marker: paper, symbol, recipe, page, status."""
    table = page.read_text(encoding="utf-8").split("<!-- paper-index -->\n\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("page", INDEXES, ids=name_of)
def test_paper_index_names_what_exists(page: Path) -> None:
    rows = index_rows(page)
    assert rows
    for paper, symbol, recipe, link, _ in rows:
        assert re.search(r"arXiv \d{4}\.\d{5}", paper)
        module, _, name = re.match(r"`([\w.]+)`", symbol)[1].rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
        assert not recipe or recipe.strip("`") in recipes()
        assert LINK.search(link)


def test_paper_indexes_agree() -> None:
    def content(page: Path) -> list[tuple[str, ...]]:
        rows = index_rows(page)
        return [
            (re.search(r"\[arXiv.*\)", paper)[0], symbol, recipe, status) for paper, symbol, recipe, _, status in rows
        ]

    assert content(INDEXES[0]) == content(INDEXES[1])


def test_every_recipe_is_in_the_paper_index() -> None:
    assert set(recipes()) <= {row[2].strip("`") for row in index_rows(INDEXES[0])}


def test_ci_runs_the_test_command_of_readme() -> None:
    shown = subprocess.run([ROOT / ".ci" / "run", "--print"], capture_output=True, text=True, check=True).stdout
    assert shown.strip() in [block.strip() for _, block in blocks(ROOT / "README.md", "sh")]
    assert shown.rstrip().endswith("pytest -n 2")
