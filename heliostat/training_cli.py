"""LightningCLI as ``heliostat`` runs it: a directory for every run, resume in place, errors of a few lines."""

from __future__ import annotations

import atexit
import difflib
import os
import pydoc
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from pickle import UnpicklingError
from tempfile import mkdtemp
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import heliostat
from heliostat.callbacks.step_seed import StepSeed
from heliostat.cli import did_you_mean
from heliostat.stages import Stage, split_stages

T = TypeVar("T")

_CKPT_WORDS = ("last", "best", "hpc")  # besides "registry...", what Trainer takes instead of a path
_STAMP = "%Y-%m-%d_%H-%M-%S"
_STAMPED = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")
_USER_ERRORS = (ValueError, TypeError, ModuleNotFoundError, OSError, MisconfigurationException)

# What jsonargparse puts around the error that matters: where it happened, in which class, which types were tried.
_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s+(.*)")
_FACTORY = re.compile(
    r"Type .* expects a function or a callable class: .*Got value: (?:.*?class_path\W+)?([\w.]+)", re.S
)
_UNION = re.compile(
    r"(?:\n- Expected a path .*\n- )?Does not validate against any of the Union subtypes\nSubtypes: (.*)"
)
_WRAPPERS = (_KEY, _CLASS, _FACTORY, _UNION)
# What it says at the end.
_NO_OPTION = re.compile(r"(?:Option|.* does not accept option|unrecognized arguments:) '?(-*[^\s='\"]+)")
_WRONG_VALUE = re.compile(r"(?:Expected a (.+)\. Got value|Expected a dot import path string): (.*)", re.S)


def run() -> None:
    """Run the command in ``sys.argv``: fit, validate, test or predict, with its options."""
    # Lightning 2.6 under torch 2.15, at every step of its own bookkeeping.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec")
    try:
        stages = split_stages(sys.argv[1:])
    except ValueError as error:
        _exit(f"error: {error}", status=2)
    if not stages:
        HeliostatCLI()
        return
    # It is from within Python here; sys.argv stays the command that DDP starts its other processes with.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    before = None
    for stage in stages:
        _say(f"stage {stage.name}")
        cli = HeliostatCLI(stage, before)
        if cli.trainer.interrupted:
            return
        before = Before(cli.model, cli.run_dir)


class Before(NamedTuple):
    """What a stage takes from the one before."""

    model: LightningModule  # whose weights it starts from
    run_dir: str | None  # of all stages


class _Parser(LightningArgumentParser):
    """Parser whose errors are a few lines that name the option, what was given and what is accepted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)  # an abbreviated --config would miss the recipes

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with status 2."""
        if not self.exit_on_error:  # the parser of a class inside the config: its error becomes part of a longer one
            if match := _NO_OPTION.match(message):
                message, ex = _no_option(match[1], _options(self)), None
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", self)
        _exit(_explain(message, ex, _options(parser)), status=2)


class HeliostatCLI(LightningCLI):
    """LightningCLI with a directory for every run, resume in that directory, and errors of a few lines.

    Args:
        stage: What to run instead of the command line as it is.
        before: The stage before, if there is one.

    Attributes:
        run_dir: The directory of this run; with stages, of all of them.
    """

    def __init__(self, stage: Stage | None = None, before: Before | None = None) -> None:
        self._stage, self._before = stage, before
        self.run_dir: str | None = before.run_dir if before else None
        self._refusal: Exception | None = None
        self._verbose = True
        super().__init__(
            args=stage.args if stage else None,
            parser_class=_Parser,
            parser_kwargs={"prog": "heliostat"},
            seed_everything_default=42,  # a number: True would be another seed each time, and 1 == True is not printed
            save_config_kwargs={"overwrite": True},  # an existing config.yaml has been moved out of the way
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only the requested subcommand: a parser takes 0.2 s to build."""
        return {sys.argv[1]: LightningCLI.subcommands()[sys.argv[1]]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a configuration says beside model, data and trainer."""
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="After fit, test the best checkpoint, or the last weights if no ModelCheckpoint has a monitor.",
        )
        parser.add_argument(
            "--stages",
            type=dict[str, dict] | None,
            help="In a file only: fit once for each entry, which changes the configuration, on the weights so far.",
        )

    def before_instantiate_classes(self) -> None:
        """What is saved is the configuration of this stage alone."""
        if self._stage is not None:
            self.config[self.config.subcommand].stages = None

    def after_fit(self) -> None:
        """Test, if the configuration asks for it and training came to its end."""
        if not self._get(self.config, "test_after_fit") or self.trainer.interrupted:
            return
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        monitored = getattr(self.trainer.checkpoint_callback, "monitor", None)
        ckpt_path = "best" if best and monitored else None
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=ckpt_path, verbose=False)
        self.after_test()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Lightning's table of results has a column a loader, and what is logged of all of them in each."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        self._verbose = kwargs.get("verbose", True)
        return {**kwargs, "verbose": False} if "verbose" in kwargs else kwargs

    def after_test(self) -> None:
        """Print what was measured."""
        metrics = self.trainer.callback_metrics
        if self._verbose and metrics:
            width = max(len(name) for name in metrics)
            _say("\n".join(f"{name:{width}}  {float(value):.4f}" for name, value in sorted(metrics.items())))

    after_validate = after_test

    def _parse_ckpt_path(self) -> None:
        """Fill in the hyper-parameters of the checkpoint: command line > config > checkpoint > default.

        LightningCLI lets the checkpoint win over the command line, without a word.
        """
        command = self.config.subcommand
        ckpt_path = str(self.config[command].get("ckpt_path") or "")
        if not ckpt_path or ckpt_path in _CKPT_WORDS or ckpt_path.startswith("registry") or "://" in ckpt_path:
            return
        if not Path(ckpt_path).exists():
            _exit(f"error in ckpt_path: there is no checkpoint {ckpt_path!r} (seen from {Path.cwd()}).", status=2)
        if not Path(ckpt_path).is_file():  # a folder: sharded, without hyper-parameters that could be read here
            return
        weights_only = self.config[command].get("weights_only") is not False
        try:
            checkpoint = torch.load(ckpt_path, map_location="cpu", mmap=True, weights_only=weights_only)
        except (RuntimeError, UnpicklingError) as error:
            _exit(f"error in ckpt_path: {ckpt_path!r} cannot be read as a checkpoint: {error}", status=2)
        saved = {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if k != "_instantiator"}
        class_path = self.config[command].model.class_path
        if not saved:
            return
        if saved.pop("_class_path", class_path) != class_path:
            _say(f"the checkpoint is of another class than {class_path}: its hyper-parameters are not used")
            return
        known = _Parser().add_class_arguments(pydoc.locate(class_path), fail_untyped=False)
        # A resume shall survive an option that a newer version has dropped.
        for name in sorted(saved.keys() - set(known)):
            _say(f"model.{name} is {saved.pop(name)!r} in the checkpoint; {class_path} has no such option any more")
        self._subcommand_parsers[command].set_defaults({"model": {"class_path": class_path, "init_args": saved}})
        try:
            self.parse_arguments(self.parser, self._stage.args if self._stage else None)
        except SystemExit:
            _exit(f"That is a hyper-parameter in {ckpt_path!r}, which this version cannot use.", status=2)
        dump = self._subcommand_parsers[command].dump(self.config[command], skip_none=False, format="yaml")
        used = dict(_leaves(yaml.safe_load(dump)["model"].get("init_args", {})))
        was = dict(_leaves(saved))
        for key in used:
            if key in was and used[key] != was[key]:
                _say(f"model.{key} is {used[key]!r}; in the checkpoint it was {was[key]!r}")

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        self.parser.add_instantiator(self._instantiate, object)

    def _instantiate(self, class_type: type[T], *args: Any, **kwargs: Any) -> T:
        """Remember what a class refuses: of a union, jsonargparse keeps only the error of the first type."""
        try:
            return class_type(*args, **kwargs)
        except Exception as error:
            self._refusal = error
            raise

    def instantiate_classes(self) -> None:
        """Instantiate; what a class refuses becomes one line instead of a traceback."""
        try:
            super().instantiate_classes()
        except Exception as error:
            if os.environ.get("HELIOSTAT_TRACEBACK"):
                raise
            reports = (*_WRAPPERS, _WRONG_VALUE)
            own = (e for e in _causes(error) if not any(report.match(str(e)) for report in reports))
            reason = next(own, self._refusal or error)
            if isinstance(reason, _USER_ERRORS):
                _exit(f"error: {reason}\nHELIOSTAT_TRACEBACK=1 shows the traceback.", status=1)
            raise reason from None  # a bug: its traceback, without the report of jsonargparse after it
        if self._before is not None:
            self._take_over(self._before.model)

    def _take_over(self, trained: LightningModule) -> None:
        """Start from the weights of the stage before."""
        weights = trained.state_dict()
        try:
            missing, unexpected = self.model.load_state_dict(weights, strict=False)
        except RuntimeError as error:  # shapes differ
            _exit(f"error: the weights of the stage before do not fit: {error}", status=1)
        if len(unexpected) == len(weights):
            _exit("error: the model of this stage has no weight in common with that of the stage before", status=1)
        for names, what in ((missing, "new in this stage"), (unexpected, "of the stage before, not used any more")):
            if names:
                _say(f"{len(names)} weights are {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; what our own code refuses, such as a missing file, becomes one line instead of a traceback."""
        try:
            super()._run_subcommand(subcommand)
        except _USER_ERRORS as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if os.environ.get("HELIOSTAT_TRACEBACK") or not frame.f_globals["__name__"].startswith("heliostat."):
                raise
            _exit(f"error: {error}\nHELIOSTAT_TRACEBACK=1 shows the traceback.", status=1)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the Trainer, on the directory of this run.

        The directory goes to the Trainer alone, not into the config: a saved config then serves for a new run.
        """
        config = self._get(self.config_init, "trainer")
        run_dir = self.run_dir = config.default_root_dir or self.run_dir
        callbacks = config.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if not any(isinstance(callback, StepSeed) for callback in callbacks):
            kwargs["callbacks"] = [*callbacks, StepSeed()]  # every run can be resumed exactly
        if config.fast_dev_run:
            if run_dir is None:  # leave nothing behind, neither of Lightning nor of callbacks that write
                run_dir = mkdtemp(prefix="heliostat-")
                atexit.register(shutil.rmtree, run_dir, ignore_errors=True)
            return super().instantiate_trainer(default_root_dir=run_dir, **kwargs)
        if run_dir is None:
            run_dir = self.run_dir = self._decide_run_dir()
            sys.argv.append(f"--trainer.default_root_dir={run_dir}")  # for the other processes that DDP will start
        if self._stage is not None:
            run_dir = str(Path(run_dir) / self._stage.name)
        if config.logger in (None, True) and not config.barebones:
            # It says that it will delete the earlier metrics.csv, which _keep_previous has moved.
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            kwargs["logger"] = CSVLogger(save_dir=run_dir, name="", version="")
        if self.subcommand != "fit":  # ModelCheckpoint says that it forgets what it will not need
            warnings.filterwarnings("ignore", message="The dirpath has changed")
        try:
            trainer = super().instantiate_trainer(default_root_dir=run_dir, **kwargs)
        except BaseException:
            with suppress(OSError):
                Path(run_dir if self._stage is None else Path(run_dir).parent).rmdir()  # only if nothing is in it
            raise
        if _is_main_process():
            _keep_previous(Path(run_dir))
        _say(f"run directory: {run_dir}")
        return trainer

    def _decide_run_dir(self) -> str:
        """Continue in the directory of the checkpoint if it lies in a run's directory, else make a new one."""
        command = self.config.subcommand
        config = self.config[command]
        if command == "fit" and config.ckpt_path:
            checkpoints = Path(config.ckpt_path).resolve().parent
            if checkpoints.name == "checkpoints" and any(checkpoints.parent.glob("config*.yaml")):
                config.ckpt_path = None  # for the saved config only: run anew, it shall not continue in here
                return str(checkpoints.parent if self._stage is None else checkpoints.parent.parent)
        name = "run"
        if files := [file for file in config.config or () if file is not None]:  # None: the changes of a stage
            path = Path(str(files[-1]))
            # The config.yaml that a run has saved belongs to what ran there.
            run = next((folder for folder in path.resolve().parents[:2] if _STAMPED.match(folder.name)), None)
            name = run.parent.name if run else path.stem
        stamp = datetime.now().strftime(_STAMP) + ("" if command == "fit" else f"-{command}")
        run_dir = Path.cwd() / "runs" / name / stamp
        # Under torchrun or SLURM every process comes by here: Lightning broadcasts the paths of the first one.
        return str(_make_unique(run_dir) if _is_main_process() else run_dir)


def _is_main_process() -> bool:
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank == 0 and os.environ.get("NODE_RANK", "0") == "0"


def _say(message: str) -> None:
    if _is_main_process():
        print(message, flush=True)


def _exit(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    raise SystemExit(status)


def _make_unique(path: Path) -> Path:
    """Create ``path``, or ``path-2`` and so on if it is taken, even by a run that starts in the same second."""
    number = 1
    while True:
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return candidate


def _keep_previous(run_dir: Path) -> None:
    """Rename metrics.csv and config.yaml of an earlier run, which would be deleted and overwritten."""
    files = [path for path in (run_dir / "metrics.csv", run_dir / "config.yaml") if path.exists()]
    number = 1
    while any(path.with_suffix(f".{number}{path.suffix}").exists() for path in files):
        number += 1
    for path in files:
        path.rename(path.with_suffix(f".{number}{path.suffix}"))


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted names and values of nested dicts, ``class_path`` and ``init_args`` levels included."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        # jsonargparse looks a failed module import up again as an attribute: the import says what is missing
        hidden = error.__context__ if isinstance(error, AttributeError) else None
        error = error.__cause__ or (hidden if isinstance(hidden, ModuleNotFoundError) else None)


def _options(parser: LightningArgumentParser) -> list[str]:
    return [a.dest for a in parser._actions if a.option_strings and a.dest != "help" and not a.dest.endswith(".help")]


class _Trace(NamedTuple):
    """What the chain of causes of a jsonargparse error says."""

    key: str  # dotted key whose value, or whose class, is wrong; empty if no key is
    owner: str  # the class there, if one was named
    option: str  # the option of that class whose value is wrong
    types: str  # what the value may be
    reason: BaseException  # the error at the end of the chain


def _trace(error: BaseException) -> _Trace:
    keys: list[str] = []
    owner, depth, types, text, union = "", 0, "", "", ""
    reason = error
    for reason in _causes(error):
        if str(reason) == text:  # the same error, raised again
            continue
        text = str(reason)
        if match := _KEY.match(text):
            keys.append(match[1])
            types = union = ""
        elif match := _CLASS.match(text) or _FACTORY.match(text):
            owner, depth = match[1], len(keys)
            types = union = ""
        elif match := _UNION.match(text):
            types, union = match[1], text
        elif match := _WRONG_VALUE.match(text):
            types = types or match[1] or "a class"
            # The chain follows the first type of a union. If another one is a class, that is what was meant.
            if found := _CLASS.search(union[union.rfind("Subtypes: ") :]):
                owner, depth, reason = found[1], len(keys), ValueError(found[2])
    depth = depth or len(keys)
    types = re.sub(r"<class '([^']+)'>", r"\1", types).replace("NoneType", "None")
    types = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", types)
    return _Trace(".".join(keys[:depth]), owner, ".".join(keys[depth:]), types, reason)


def _explain(message: str, error: BaseException | None, options: list[str]) -> str:
    """Say in a line or two what jsonargparse says in sixty.

    Args:
        message: Its own message.
        error: The exception behind it, if there is one; its chain of causes leads from the outermost key of the config
            to what is wrong.
        options: What the command accepts.

    Returns:
        The text to print.
    """
    command = sys.argv[1]
    key, owner, option, types, reason = _trace(error or ValueError(message))
    text = str(reason)
    where = f"error in {key}:" if key else "error:"
    if match := _NO_OPTION.match(text):
        name = match[1]
        dashes = "--" if name.startswith("--") else ""
        near = did_you_mean(name, [dashes + option for option in options])
        return f"{where} {command} has no option {name!r}.{near} See: heliostat {command} --help"
    if match := re.match(r"the following arguments are required: (.+)", text):
        if match[1] == f"{command}.model":
            return (
                f"error: {command} needs a model: --config NAME (heliostat ls lists recipes) or --model package.Class"
            )
        return f"{where} {owner or command} needs a value for {match[1]}."
    if option:
        where, owner = f"{where} {owner} option {option!r}", ""
    if match := _WRONG_VALUE.match(text):
        hint = "" if match[1] else f" A class is written package.Class.{_near_class(match[2])}"
        return f"{where} expects {types}, got {match[2]!r}.{hint}"
    if isinstance(reason, (ImportError, AttributeError)) or re.match(
        "module .* has no attribute|No module named", text
    ):
        return f"{where} cannot import {owner}: {text}.{_near_class(owner)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(reason).__name__]
    return " ".join([where, *([owner] if owner else []), *lines[:4]])


def _no_option(name: str, options: list[str]) -> str:
    if not options:  # a base class, which stands in for the class that was not named
        return f"has no option {name!r}, nor any other: name the class that has it first."
    return f"has no option {name!r}.{did_you_mean(name, options)} Options: {', '.join(options)}."


def _near_class(path: str) -> str:
    """Suggest a class of ours, or of the module in ``path``, of nearly the same name."""
    module, _, name = path.rpartition(".")
    known = {other: f"{module}.{other}" for other in vars(sys.modules.get(module, object))}
    known |= {ours: f"heliostat.{ours}" for ours in heliostat.__all__}
    near = difflib.get_close_matches(name, [other for other in known if known[other] != path], n=1)
    return f" Did you mean {known[near[0]]!r}?" if near else ""
