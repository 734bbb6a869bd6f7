"""Training in stages: what the key ``stages`` of a recipe makes of one command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Stage(NamedTuple):
    """One run of the command."""

    name: str
    args: list[str]  # the whole command line, with what is peculiar to the stage


def split_stages(args: list[str]) -> list[Stage]:
    """Take a command line apart into its stages.

    A configuration file may hold ``stages``: a mapping from names to what a stage changes in the configuration. It
    stands for the same command once for each, in order, with the changes right after that file, so that later files and
    options win over them. ``--ckpt_path`` of a checkpoint in the directory of a stage goes on there.

    Args:
        args: Subcommand and options; names of recipes are paths already.

    Returns:
        The stages to run; none if no file has the key.

    Raises:
        ValueError: ``stages`` is no mapping of mappings, or the checkpoint is of no stage.
    """
    if args[:1] != ["fit"]:  # a saved model is of one stage, and its configuration says of which
        return []
    place, stages = 0, None
    for position, path in _options(args, "--config", "-c"):
        found = _stages_of(path)
        place, stages = (position, found) if found else (place, stages)
    if not stages:
        return []
    first, resumed = 0, False
    names = list(stages)
    for _, checkpoint in _options(args, "--ckpt_path"):
        if checkpoint and checkpoint != "null":
            stage = Path(checkpoint).resolve().parent.parent.name
            if stage not in names:
                raise ValueError(
                    f"ckpt_path={checkpoint!r} does not say which stage to go on with: give a checkpoint in "
                    f"{' or '.join(f'.../{name}/checkpoints' for name in names)}"
                )
            first, resumed = names.index(stage), True
    return [
        Stage(
            name,
            [*args[:place], "--config", json.dumps(stages[name]), *args[place:]]
            + (["--ckpt_path=null"] if resumed and name != names[first] else []),
        )
        for name in names[first:]
    ]


def _options(args: list[str], *names: str) -> Iterator[tuple[int, str]]:
    """Yield the values given to an option, each with the position after it."""
    for position, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if option in names:
            if equals:
                yield position + 1, value
            elif position + 1 < len(args):
                yield position + 2, args[position + 1]


def _stages_of(path: str) -> dict[str, dict[str, Any]]:
    if not Path(path).is_file():  # remote, or for the parser to refuse
        return {}
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError:  # the parser says where
        return {}
    stages = (config.get("stages") if isinstance(config, dict) else None) or {}
    if not isinstance(stages, dict) or not all(isinstance(changes, dict) for changes in stages.values()):
        raise ValueError(
            f"stages in {path} must map the name of each stage to what it changes in the configuration, got {stages!r}"
        )
    return {str(name): changes for name, changes in stages.items()}
