"""The house rules: floors, lazy imports, the public surface, one stem for everything of a paper, clean code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import heliostat
import heliostat.components

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "heliostat"
FLOORS = {  # folder -> what it may import of heliostat
    "cuda": {"cuda"},
    "components": {"components", "cuda"},
    "datamodules": {"datamodules", "components", "pretrained", "towers", "token_encoders"},
    "lit_models": {"lit_models", "components", "pretrained", "towers", "generation", "advantages", "rewards"},
    "callbacks": {"callbacks", "components", "pretrained"},
}
SMALL_TOOLS = {"_lazy", "_extras"}
# Plain fine-tuning, plain diffusion and the policy that papers plug into are themselves no papers.
PAPERS = [
    p
    for p in sorted((PACKAGE / "lit_models").glob("[a-z]*.py"))
    if p.stem not in ("fine_tuning", "diffusion", "group_policy")
]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("floor", FLOORS)
def test_floors(floor: str) -> None:
    for path in (PACKAGE / floor).rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "heliostat" and len(parts) > 1:
                assert parts[1] in FLOORS[floor] | SMALL_TOOLS, f"{path.relative_to(ROOT)} imports {name}"
            if floor in ("components", "cuda"):
                assert parts[0] not in ("lightning", "transformers", "torchmetrics"), f"{path} imports {name}"


def test_import_loads_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, heliostat, heliostat.components, heliostat.lit_models, heliostat.callbacks, heliostat.datamodules;"
        "print([m for m in ('torch', 'lightning', 'numpy', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("module", [heliostat, heliostat.components], ids=["heliostat", "components"])
def test_every_public_name_exists_and_typing_knows_it(module) -> None:
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module) or name == "__version__"
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        getattr(module, "nonsense")  # noqa: B009
    source = Path(module.__file__).read_text("utf-8")
    for name in module._EXPORTS:
        assert f"{name} as {name}" in source, f"{name} is missing under TYPE_CHECKING"


def test_public_surface_is_the_committed_one() -> None:
    """A name that vanishes breaks users: change tests/public_names.txt only on purpose, with a changelog entry."""
    names = [f"heliostat.{name}" for name in heliostat._EXPORTS]
    names += [f"heliostat.components.{name}" for name in heliostat.components._EXPORTS]
    assert sorted(names) == (Path(__file__).parent / "public_names.txt").read_text().split()


@pytest.mark.parametrize("path", PAPERS, ids=lambda p: p.stem)
def test_one_stem_finds_everything_of_a_paper(path: Path) -> None:
    stem = path.stem
    for place in (
        f"heliostat/components/{stem}.py",
        f"configs/{stem}.yaml",
        f"tests/components/test_{stem}.py",
        f"tests/lit_models/test_{stem}.py",
        f"benchmarks/claims/{stem}.py",
        f"docs/methods/{stem}.md",
    ):
        assert (ROOT / place).is_file(), place


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_code_is_clean(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
