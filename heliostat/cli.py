"""The ``heliostat`` command: list and copy recipes, and hand fit, validate, test and predict to LightningCLI.

This module imports neither torch nor Lightning, so that ``heliostat --help``, ``ls`` and ``cp`` answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import heliostat

_RUN = ("fit", "validate", "test", "predict")
_COMMANDS = (*_RUN, "ls", "cp", "recover")
_HELP = """\
usage: heliostat COMMAND ...

Published alignment methods for PyTorch Lightning.

Run a recipe, or a YAML file of your own:
  fit        train             heliostat fit --config NAME --trainer.max_epochs 3
  validate   validate          heliostat validate --config NAME --ckpt_path runs/NAME/.../checkpoints/last.ckpt
  test       test
  predict    predict

Recipes:
  ls         list the recipes
  cp         copy a recipe, to edit it: heliostat cp NAME [DEST] [--force]

Saved models:
  recover    restore the alignment of a fine-tuned language model: heliostat recover --help

Options:
  --version  print the version
  --help     print this; heliostat COMMAND --help explains one command
"""
# The keys that take a class: only there a bare name such as WhitenedCSE stands for heliostat.WhitenedCSE.
_TAKES_CLASS = re.compile(r"--(model|data|trainer\.callbacks\+?|\S+\.class_path)")


def main() -> int | None:
    """Run the command in ``sys.argv``.

    Returns:
        The exit status; None stands for success.
    """
    command, *args = sys.argv[1:] or [""]
    if command in ("-h", "--help", "help"):
        print(_HELP, end="")
    elif command == "--version":
        print(f"heliostat {heliostat.__version__}")
    elif command == "ls":
        argparse.ArgumentParser(prog="heliostat ls", description="List the recipes.").parse_args(args)
        _list()
    elif command == "cp":
        _copy(args)
    elif command == "recover":
        _recover(args)
    elif command in _RUN:
        # DDP starts its other processes from sys.argv, perhaps in another folder: what was resolved has to stand there.
        sys.argv[1:] = [command, *_resolve(args)]
        from heliostat.training_cli import run

        run()
    elif not command:
        sys.stderr.write(_HELP)
        return 2
    elif command.startswith("-"):
        run_command = next((arg for arg in args if arg in _RUN), "fit")
        options = [arg for arg in sys.argv[1:] if arg != run_command]
        _fail(f"{command} goes after the command: heliostat {run_command} {' '.join(options)}")
    else:
        _fail(f"no command {command!r}.{did_you_mean(command, _COMMANDS)} Commands: {', '.join(_COMMANDS)}.")
    return None


def recipes() -> dict[str, Path]:
    """Find the packaged recipes.

    Returns:
        Recipe name -> its YAML file, sorted by name.
    """
    package = Path(__file__).resolve().parent
    folder = package / "configs"  # in a wheel
    if not folder.is_dir():
        folder = package.parent / "configs"  # in a checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Suggest the nearest name.

    Returns:
        The sentence, after a blank (``" Did you mean 'fit'?"``), or the empty string if nothing is near.
    """
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


def _header(recipe: Path) -> list[str]:
    """Read the leading comment of a recipe, without the ``#`` and without empty lines."""
    header = []
    with recipe.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith("#"):
                break
            header.append(line.lstrip("#").strip())
    return [line for line in header if line]


def _list() -> None:
    rows = [("RECIPE", "TIME", "WHAT")]
    for name, path in recipes().items():
        header = _header(path)
        time = next((line.removeprefix("Time:").strip() for line in header if line.startswith("Time:")), "")
        rows.append((name, time, header[0] if header else ""))
    name_width, time_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, time, what in rows:
        print(f"{name:{name_width}}  {time:{time_width}}  {what}".rstrip())


def _copy(args: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="heliostat cp", description="Copy a recipe, to edit it.")
    parser.add_argument("name", metavar="NAME", help="recipe; heliostat ls lists them")
    parser.add_argument("dest", metavar="DEST", nargs="?", type=Path, default=Path(), help="file or existing folder")
    parser.add_argument("--force", action="store_true", help="overwrite DEST")
    given = parser.parse_args(args)
    source = recipes().get(given.name)
    if source is None:
        _fail(_no_recipe("recipe", given.name))
    dest = given.dest / source.name if given.dest.is_dir() else given.dest
    if dest.exists() and not given.force:
        _fail(f"{dest} exists. Name another file (heliostat cp {given.name} DEST), or overwrite it with --force.")
    if not dest.parent.is_dir():
        _fail(f"folder {dest.parent} does not exist. Create it, or name another DEST.")
    shutil.copyfile(source, dest)
    print(f"copied to {dest}; run it with: heliostat fit --config {dest}")


def _recover(args: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="heliostat recover",
        description="Put the few weights of a fine-tuned language model back that restore its alignment.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory of the fine-tuned model or LoRA adapter")
    parser.add_argument("--aligned", required=True, metavar="DIR", help="directory of the aligned model")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write, new or empty")
    parser.add_argument("--harmful", required=True, metavar="FILE", help=".jsonl with prompt, or a prompt a line")
    parser.add_argument("--task", required=True, metavar="FILE", help=".jsonl with prompt and answer")
    parser.add_argument("--layer_end", type=int, help="blocks that are looked at; default: two thirds")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recovery_rate", type=float, default=0.002, help="share of the weights restored in a step")
    parser.add_argument("--metric_drop", type=float, default=0.05, help="share of the task score that may be lost")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    options = vars(parser.parse_args(args))
    names = [options.pop(name) for name in ("checkpoint", "aligned", "output", "harmful", "task")]
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from heliostat.recovery import recover_checkpoint

    try:
        recover_checkpoint(*names, **options)
    except (ValueError, OSError, ModuleNotFoundError, MisconfigurationException) as error:
        _fail(str(error))
    print(f"recovered model: {names[2]}")


def _no_recipe(kind: str, name: str) -> str:
    names = recipes()
    return f"no {kind} {name!r}.{did_you_mean(name, names)} Recipes: {', '.join(names) or 'none'}."


def _resolve(args: list[str]) -> list[str]:
    """Replace the recipe names after ``--config`` by absolute paths, and bare class names of ours by full ones."""
    resolved = []
    for previous, arg in zip(["", *args], args, strict=False):
        option, equals, value = arg.partition("=")
        if equals and option.startswith("-"):
            resolved.append(f"{option}={_resolve_value(option, value)}")
        else:
            resolved.append(_resolve_value(previous, arg))
    return resolved


def _resolve_value(option: str, value: str) -> str:
    if option in ("-c", "--config"):
        return _resolve_config(value)
    if _TAKES_CLASS.fullmatch(option) and value in heliostat.__all__:
        return f"heliostat.{value}"
    return value


def _resolve_config(name: str) -> str:
    if "://" in name:  # a remote file, which Lightning reads through fsspec
        return name
    path = Path(name) if Path(name).is_file() else recipes().get(name)
    if path is None:
        _fail(_no_recipe("recipe or file", name))
    return str(path.absolute())
