"""The command line: the torch-free front door, and LightningCLI behind it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import heliostat
from heliostat import cli

TOY = """
from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn


class Encoder(nn.Module):
    def __init__(self, dim: int = 4, width: int = 2) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be >= 1, got {width}")
        self.linear = nn.Linear(dim, width)

    def forward(self, x):
        return self.linear(x)


class Lit(pl.LightningModule):
    def __init__(
        self, encoder: nn.Module | None = None, lr: float = 0.1, scale: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.SGD,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = encoder or Encoder()
        self.lr, self.scale, self.optimizer = lr, scale, optimizer

    def training_step(self, batch, batch_idx):
        loss = self.scale * self.encoder(batch).square().mean()
        self.log("train/loss", loss, on_step=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.encoder(batch).square().mean(), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.encoder(batch).square().mean(), sync_dist=True)
        self.log("test/step", float(self.tested_step))

    def on_load_checkpoint(self, checkpoint):
        self.tested_step = checkpoint["global_step"]

    tested_step = -1

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Other(Lit):
    pass


class NeedsEncoder(pl.LightningModule):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


class Callback(pl.Callback):
    def __init__(self, weight: float = 1.0, mode: str = "min") -> None:
        if weight < 0:
            raise ValueError(f"weight must be >= 0, got {weight}")


class NeedsPackage(pl.Callback):
    def __init__(self) -> None:
        from heliostat._extras import missing_package_error

        raise missing_package_error("transformers", "Reading text")
"""
CONFIG = """
# A toy that shows nothing.
# Time: a second
model: {class_path: cli_toy.Lit}
data: {class_path: cli_toy.Data}
trainer:
  max_epochs: 1
  accelerator: cpu
  devices: 1
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {monitor: val/loss, save_last: true}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with a module of toy classes and a config toy.yaml."""
    (tmp_path / "cli_toy.py").write_text(TOY)
    (tmp_path / "toy.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_toy", raising=False)
    monkeypatch.setattr(sys, "argv", ["heliostat"])
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


Heliostat = Callable[..., int]


@pytest.fixture
def heliostat_command(monkeypatch: pytest.MonkeyPatch) -> Heliostat:
    """Run the command in this process; the result is its exit status."""

    def run(*args: str) -> int:
        monkeypatch.setattr(sys, "argv", ["heliostat", *args])
        try:
            return cli.main() or 0
        except SystemExit as stop:
            return int(stop.code or 0)

    return run


def subprocess_run(*args: str, cwd: Path, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True, check=False
    )


def only_run(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


# The front door


@pytest.mark.parametrize(
    "args",
    [["--help"], ["--version"], ["ls"], ["cp", "--help"], ["recover", "--help"], ["fitt"], ["fit", "--config=x"]],
)
def test_front_door_imports_no_torch(args: list[str], tmp_path: Path) -> None:
    script = f"""
        import sys
        from heliostat.cli import main
        sys.argv[1:] = {args!r}
        try:
            main()
        except SystemExit:
            pass
        heavy = {{"torch", "lightning", "jsonargparse", "numpy"}} & set(sys.modules)
        assert not heavy, heavy
    """
    result = subprocess_run("-c", textwrap.dedent(script), cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_module_is_the_command(tmp_path: Path) -> None:
    result = subprocess_run("-m", "heliostat", "--version", cwd=tmp_path)
    assert result.stdout == f"heliostat {heliostat.__version__}\n"


def test_recipes_in_checkout_and_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "heliostat"
    package.mkdir()
    monkeypatch.setattr(cli, "__file__", str(package / "cli.py"))
    for folder, names in [(tmp_path / "configs", ["b", "a"]), (package / "configs", ["c"])]:
        folder.mkdir()
        for name in names:
            (folder / f"{name}.yaml").write_text("")
        assert list(cli.recipes()) == sorted(names)  # the wheel's, once both are there
        assert all(path == folder / f"{name}.yaml" for name, path in cli.recipes().items())


def test_the_repository_has_its_recipes_where_they_are_looked_for() -> None:
    configs = Path(__file__).parents[1] / "configs"
    if configs.is_dir():
        assert sorted(cli.recipes()) == sorted(path.stem for path in configs.glob("*.yaml"))


@pytest.fixture
def toy_recipe(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A packaged recipe named whitened_toy."""
    recipe = toy / "package" / "whitened_toy.yaml"
    recipe.parent.mkdir()
    recipe.write_text(CONFIG.lstrip())
    monkeypatch.setattr(cli, "recipes", lambda: {"whitened_toy": recipe})
    return recipe


def test_ls(toy_recipe: Path, heliostat_command: Heliostat, capsys: pytest.CaptureFixture[str]) -> None:
    assert heliostat_command("ls") == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows == ["RECIPE        TIME      WHAT", "whitened_toy  a second  A toy that shows nothing."]


def test_cp(toy_recipe: Path, toy: Path, heliostat_command: Heliostat, capsys: pytest.CaptureFixture[str]) -> None:
    copy = toy / "whitened_toy.yaml"
    assert heliostat_command("cp", "whitened_toy") == 0
    assert copy.read_text() == toy_recipe.read_text()
    copy.write_text("mine")
    capsys.readouterr()
    assert heliostat_command("cp", "whitened_toy") == 2
    assert "whitened_toy.yaml exists" in capsys.readouterr().err
    assert copy.read_text() == "mine"
    assert heliostat_command("cp", "whitened_toy", "--force") == 0
    assert copy.read_text() == toy_recipe.read_text()
    assert heliostat_command("cp", "whitened_toy", "mine.yaml") == 0
    assert (toy / "mine.yaml").exists()
    assert heliostat_command("cp", "whitened_toy", "nowhere/mine.yaml") == 2
    assert "folder nowhere does not exist" in capsys.readouterr().err
    assert heliostat_command("cp", "whitend_toy") == 2
    assert "no recipe 'whitend_toy'. Did you mean 'whitened_toy'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fitt"], "no command 'fitt'. Did you mean 'fit'?"),
        (
            ["fit", "--config", "whitend_toy"],
            "no recipe or file 'whitend_toy'. Did you mean 'whitened_toy'? Recipes: wh",
        ),
        (["fit", "-c=nothing"], "no recipe or file 'nothing'. Recipes: whitened_toy."),
        (["--config", "x", "test"], "--config goes after the command: heliostat test --config x"),
        (["--config=x"], "--config=x goes after the command: heliostat fit --config=x"),
    ],
)
def test_front_door_errors(
    args: list[str],
    message: str,
    toy_recipe: Path,
    heliostat_command: Heliostat,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert heliostat_command(*args) == 2
    assert message in capsys.readouterr().err


def test_argv_holds_absolute_paths_and_full_names(
    toy_recipe: Path, toy: Path, monkeypatch: pytest.MonkeyPatch, heliostat_command: Heliostat
) -> None:
    seen: list[str] = []
    stand_in = SimpleNamespace(run=lambda: seen.extend(sys.argv[1:]))
    monkeypatch.setitem(sys.modules, "heliostat.training_cli", stand_in)  # type: ignore[arg-type]
    given = [
        "--print_config",
        "--config",
        "whitened_toy",
        "-c",
        "toy.yaml",
        "--config=whitened_toy",
        "--config",
        "s3://x/y.yaml",
    ]
    name = next(name for name in heliostat.__all__ if name[0].isupper())
    classes = ["--model", name, f"--trainer.callbacks+={name}", "--model.title", name]
    assert heliostat_command("fit", *given, *classes) == 0
    recipe, file = str(toy_recipe), str(toy / "toy.yaml")
    assert seen[:9] == [
        "fit",
        "--print_config",
        "--config",
        recipe,
        "-c",
        file,
        f"--config={recipe}",
        "--config",
        "s3://x/y.yaml",
    ]
    full = f"heliostat.{name}"
    assert seen[9:] == ["--model", full, f"--trainer.callbacks+={full}", "--model.title", name]
    (toy / "whitened_toy").write_text("a file of the user's comes first")
    seen.clear()
    heliostat_command("fit", "-c", "whitened_toy")
    assert seen == ["fit", "-c", str(toy / "whitened_toy")]


# Run directories


def test_run_directory_and_reusable_config(
    toy: Path, heliostat_command: Heliostat, capsys: pytest.CaptureFixture[str]
) -> None:
    assert heliostat_command("fit", "--config", "toy.yaml") == 0
    first = only_run(toy / "runs" / "toy")
    assert f"run directory: {first}" in capsys.readouterr().out
    assert sys.argv[-1] == f"--trainer.default_root_dir={first}"
    assert {path.name for path in first.iterdir()} == {"checkpoints", "config.yaml", "hparams.yaml", "metrics.csv"}
    assert (first / "checkpoints" / "last.ckpt").exists()
    saved = yaml.safe_load((first / "config.yaml").read_text())
    assert saved["seed_everything"] == 42
    assert saved["trainer"]["default_root_dir"] is None
    assert str(first) not in (first / "config.yaml").read_text()

    # The saved config makes a run of its own, named like the first.
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert heliostat_command("fit", "--config", str(first / "config.yaml")) == 0
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    (second,) = set((toy / "runs" / "toy").iterdir()) - {first}
    assert (second / "metrics.csv").read_bytes() == (first / "metrics.csv").read_bytes()

    assert heliostat_command("validate", "--config", str(second / "config.yaml")) == 0
    (validation,) = set((toy / "runs" / "toy").iterdir()) - {first, second}
    assert validation.name.endswith("-validate")
    assert (validation / "metrics.csv").exists()
    assert sorted(path.name for path in toy.iterdir() if not path.name.startswith("__")) == [
        "cli_toy.py",
        "runs",
        "toy.yaml",
    ]


@pytest.mark.parametrize(("monitor", "tested_step"), [("val/loss", 2), ("null", -1)])
def test_fit_that_ends_with_a_test(toy: Path, heliostat_command: Heliostat, monitor: str, tested_step: int) -> None:
    """Of the best checkpoint, the one of the first epoch here; or of the weights as they are."""
    config = CONFIG.replace("val/loss", monitor).replace("max_epochs: 1", "max_epochs: 2")
    (toy / "toy.yaml").write_text("test_after_fit: true\n" + config)
    assert heliostat_command("fit", "--config", "toy.yaml", "--model.scale=-1000") == 0
    run = only_run(toy / "runs" / "toy")
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("test/loss")]
    assert [float(row["test/step"]) for row in rows] == [tested_step]
    assert heliostat_command("validate", "--config", str(run / "config.yaml")) == 0  # accepted there, and unused


def test_fast_dev_run_leaves_nothing(toy: Path, heliostat_command: Heliostat) -> None:
    before = set(toy.iterdir())
    assert heliostat_command("fit", "--config", "toy.yaml", "--trainer.fast_dev_run", "true") == 0
    assert {path for path in toy.iterdir() if path.name != "__pycache__"} == before


def test_without_logger_and_without_config(toy: Path, heliostat_command: Heliostat) -> None:
    options = ["--model", "cli_toy.Lit", "--data", "cli_toy.Data", "--trainer.max_steps=1", "--trainer.accelerator=cpu"]
    assert heliostat_command("fit", *options, "--trainer.logger", "false") == 0
    run = only_run(toy / "runs" / "run")
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml"}


def test_run_directories_of_one_second_differ(tmp_path: Path) -> None:
    from heliostat.training_cli import _make_unique

    names = [_make_unique(tmp_path / "2025-01-31_12-00-00").name for _ in range(3)]
    assert names == ["2025-01-31_12-00-00", "2025-01-31_12-00-00-2", "2025-01-31_12-00-00-3"]


def test_trainer_error_leaves_no_directory(
    toy: Path, heliostat_command: Heliostat, capsys: pytest.CaptureFixture[str]
) -> None:
    assert heliostat_command("fit", "--config", "toy.yaml", "--trainer.strategy", "ddpp") == 1
    assert "error: You selected an invalid strategy name" in capsys.readouterr().err
    assert not list((toy / "runs" / "toy").iterdir())


def steps(metrics: Path) -> list[int]:
    with metrics.open() as lines:
        return [int(row["step"]) for row in csv.DictReader(lines) if row["train/loss"]]


def test_resume_continues_in_the_run_directory(
    toy: Path, heliostat_command: Heliostat, recwarn: pytest.WarningsRecorder
) -> None:
    heliostat_command("fit", "--config", "toy.yaml")
    run = only_run(toy / "runs" / "toy")
    first_metrics, first_config = (run / "metrics.csv").read_bytes(), (run / "config.yaml").read_bytes()
    last = run / "checkpoints" / "last.ckpt"
    best = torch.load(last, weights_only=True)["callbacks"]
    recwarn.clear()
    for epochs in ("2", "3"):
        resume = ["--ckpt_path", os.path.relpath(last), "--trainer.max_epochs", epochs]
        assert heliostat_command("fit", "--config", "toy.yaml", *resume) == 0
    assert only_run(toy / "runs" / "toy") == run
    assert (run / "metrics.1.csv").read_bytes() == first_metrics
    assert (run / "config.1.yaml").read_bytes() == first_config
    assert [steps(run / f"metrics{n}.csv") for n in (".1", ".2", "")] == [[0, 1], [2, 3], [4, 5]]
    assert (run / "config.2.yaml").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["ckpt_path"] is None
    state = next(v for k, v in torch.load(last, weights_only=True)["callbacks"].items() if "ModelCheckpoint" in k)
    old = next(v for k, v in best.items() if "ModelCheckpoint" in k)
    assert state["dirpath"] == old["dirpath"]
    assert state["best_model_score"] <= old["best_model_score"]
    assert not [w for w in recwarn if "Experiment logs directory" in str(w.message) or "dirpath" in str(w.message)]


def test_named_directory_keeps_earlier_files(toy: Path, heliostat_command: Heliostat) -> None:
    named = ["--trainer.default_root_dir", "mine"]
    for _ in range(2):
        assert heliostat_command("fit", "--config", "toy.yaml", *named) == 0
    assert not (toy / "runs").exists()
    names = {path.name for path in (toy / "mine").iterdir()}
    assert {"config.yaml", "config.1.yaml", "metrics.csv", "metrics.1.csv", "checkpoints"} <= names


def test_other_processes_of_a_run_move_nothing(
    toy: Path, heliostat_command: Heliostat, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    heliostat_command("fit", "--config", "toy.yaml", "--trainer.default_root_dir", "mine")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    before = {path.name for path in (toy / "mine").iterdir()}
    heliostat_command("fit", "--config", "toy.yaml", "--trainer.default_root_dir", "mine", "--trainer.max_epochs", "0")
    assert {path.name for path in (toy / "mine").iterdir()} >= before - {"metrics.csv"}
    assert not list((toy / "mine").glob("*.1.*"))


# Checkpoints


def hyper_parameters(run: Path) -> dict[str, object]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]


def test_ckpt_path_precedence(toy: Path, heliostat_command: Heliostat, capsys: pytest.CaptureFixture[str]) -> None:
    # encoder.width and lr come from the checkpoint unless the config or the command line says otherwise
    first = [
        "--model.encoder",
        "cli_toy.Encoder",
        "--model.encoder.width",
        "3",
        "--model.lr",
        "0.5",
        "--model.scale",
        "7",
    ]
    assert heliostat_command("fit", "--config", "toy.yaml", *first, "--trainer.default_root_dir", "first") == 0
    (toy / "scale.yaml").write_text("model: {class_path: cli_toy.Lit, init_args: {scale: 2.0}}")
    capsys.readouterr()
    resume = [
        "--ckpt_path",
        "first/checkpoints/last.ckpt",
        "--trainer.max_epochs",
        "2",
        "--trainer.default_root_dir",
        "second",
    ]
    assert heliostat_command("fit", "-c", "toy.yaml", "-c", "scale.yaml", "--model.lr", "0.25", *resume) == 0
    used = hyper_parameters(toy / "second")
    assert (used["lr"], used["scale"]) == (0.25, 2.0)
    assert used["encoder"]["init_args"]["width"] == 3  # type: ignore[index]
    said = capsys.readouterr().out
    assert "model.lr is 0.25; in the checkpoint it was 0.5" in said
    assert "model.scale is 2.0; in the checkpoint it was 7.0" in said
    assert "width" not in said


def test_ckpt_path_of_another_class(
    toy: Path, heliostat_command: Heliostat, capsys: pytest.CaptureFixture[str]
) -> None:
    heliostat_command("fit", "--config", "toy.yaml", "--model.lr", "0.5", "--trainer.default_root_dir", "first")
    resume = [
        "--ckpt_path",
        "first/checkpoints/last.ckpt",
        "--trainer.max_epochs",
        "2",
        "--trainer.default_root_dir",
        "second",
    ]
    assert heliostat_command("fit", "-c", "toy.yaml", "--model", "cli_toy.Other", *resume) == 0
    assert hyper_parameters(toy / "second")["lr"] == 0.1
    assert "another class than cli_toy.Other" in capsys.readouterr().out


def test_ckpt_path_with_options_that_are_gone(
    toy: Path, heliostat_command: Heliostat, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = ["--model.encoder", "cli_toy.Encoder"]
    heliostat_command("fit", "--config", "toy.yaml", *encoder, "--trainer.default_root_dir", "first")
    checkpoint = torch.load(toy / "first" / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["gone"] = 3
    torch.save(checkpoint, "old.ckpt")
    resume = ["--trainer.max_epochs", "2", "--trainer.default_root_dir", "second", "--ckpt_path"]
    assert heliostat_command("fit", "--config", "toy.yaml", *resume, "old.ckpt") == 0
    assert "model.gone is 3 in the checkpoint; cli_toy.Lit has no such option any more" in capsys.readouterr().out
    assert "gone" not in hyper_parameters(toy / "second")

    checkpoint["hyper_parameters"]["encoder"]["init_args"]["gone"] = 3
    torch.save(checkpoint, "older.ckpt")
    assert heliostat_command("fit", "--config", "toy.yaml", *resume, "older.ckpt") == 2
    said = capsys.readouterr().err
    assert "error in model.encoder: cli_toy.Encoder has no option 'gone'. Options: dim, width.\n" in said
    assert "That is a hyper-parameter in 'older.ckpt'" in said


@pytest.mark.parametrize("ckpt_path", ["nothing.ckpt", "toy.yaml"])
def test_ckpt_path_that_is_none(
    ckpt_path: str, toy: Path, heliostat_command: Heliostat, capsys: pytest.CaptureFixture[str]
) -> None:
    assert heliostat_command("fit", "--config", "toy.yaml", "--ckpt_path", ckpt_path) == 2
    assert capsys.readouterr().err.startswith("error in ckpt_path: ")
    assert not (toy / "runs").exists()


# Errors


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            "trainer: {callbacks: [{class_path: cli_toy.Callback, init_args: {wieght: 1}}]}",
            "error in trainer.callbacks: cli_toy.Callback has no option 'wieght'. Did you mean 'weight'? "
            "Options: weight, mode.\n",
        ),
        (
            "trainer: {callbacks: [{class_path: cli_toy.Callback, init_args: {weight: x}}]}",
            "error in trainer.callbacks: cli_toy.Callback option 'weight' expects float, got 'x'.\n",
        ),
        (
            "trainer: {callbacks: [{class_path: cli_toy.Callbck}]}",
            "error in trainer.callbacks: cannot import cli_toy.Callbck: module 'cli_toy' has no attribute 'Callbck'. "
            "Did you mean 'cli_toy.Callback'?\n",
        ),
        (
            "trainer: {strategy: {class_path: lightning.pytorch.strategies.DDPStrategyy}}",
            "error in trainer.strategy: cannot import lightning.pytorch.strategies.DDPStrategyy: module "
            "'lightning.pytorch.strategies' has no attribute 'DDPStrategyy'. "
            "Did you mean 'lightning.pytorch.strategies.DDPStrategy'?\n",
        ),
        (
            "model: {class_path: cli_toy.Lit, init_args: "
            "{encoder: {class_path: cli_toy.Encoder, init_args: {widht: 1}}}}",
            "error in model.encoder: cli_toy.Encoder has no option 'widht'. Did you mean 'width'? "
            "Options: dim, width.\n",
        ),
        (
            "model: {class_path: cli_toy.Lit, init_args: "
            "{optimizer: {class_path: torch.optim.SGD, init_args: {lrr: 1}}}}",
            "error in model.optimizer: torch.optim.SGD has no option 'lrr'. Did you mean 'lr'? Options: lr, momentum",
        ),
        (
            "trainer: {max_epoch: 1}",
            "error: fit has no option 'trainer.max_epoch'. Did you mean 'trainer.max_epochs'? "
            "See: heliostat fit --help\n",
        ),
        ("trainer: {max_epochs: x}", "error in trainer.max_epochs: expects [int, None], got 'x'.\n"),
        (
            "model: {class_path: nopackage.Lit}",
            "error in model: cannot import nopackage.Lit: No module named 'nopackage'.\n",
        ),
        ("model: {class_path: cli_toy.Data}", "error in model: Import path cli_toy.Data does not correspond to a"),
        ("model: {", "error: while parsing a flow node did not find expected node content"),
    ],
)
def test_errors_in_a_config(
    extra: str, message: str, toy: Path, heliostat_command: Heliostat, capsys: pytest.CaptureFixture[str]
) -> None:
    (toy / "extra.yaml").write_text(extra)
    assert heliostat_command("fit", "--config", "toy.yaml", "--config", "extra.yaml") == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            "--trianer.max_epochs 1",
            "error: fit has no option '--trianer.max_epochs'. Did you mean '--trainer.max_epochs'?",
        ),
        ("--conf toy.yaml", "error: fit has no option '--conf'. Did you mean '--config'?"),
        (
            "--model.encoder.width 1",
            "error in model.encoder: torch.nn.Module has no option 'width', nor any other: name",
        ),
        ("--model cli_toy.NeedsEncoder", "error in model: cli_toy.NeedsEncoder needs a value for encoder.\n"),
        (
            "--model cli_toy.NeedsEncoder --model.encoder Encodr",
            "error in model: cli_toy.NeedsEncoder option 'encoder' expects a class, got 'Encodr'. A class is written",
        ),
        ("--model.lrr 1", "error in model: cli_toy.Lit has no option 'lrr'. Did you mean 'lr'?"),
        ("--model.optimizer cli_toy.No", "error in model.optimizer: cannot import cli_toy.No: module 'cli_toy' has no"),
    ],
)
def test_errors_on_the_command_line(
    args: str, message: str, toy: Path, heliostat_command: Heliostat, capsys: pytest.CaptureFixture[str]
) -> None:
    assert heliostat_command("fit", "--config", "toy.yaml", *args.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_near_miss_of_a_class_of_ours(
    toy: Path, heliostat_command: Heliostat, capsys: pytest.CaptureFixture[str]
) -> None:
    name = next(name for name in heliostat.__all__ if name[0].isupper())
    for wrong in (f"heliostat.{name[:-1]}", name[:-1]):
        assert heliostat_command("fit", "--model", wrong) == 2
        assert f"Did you mean 'heliostat.{name}'?" in capsys.readouterr().err


def test_no_model(toy: Path, heliostat_command: Heliostat, capsys: pytest.CaptureFixture[str]) -> None:
    assert heliostat_command("fit") == 2
    assert "fit needs a model: --config NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.encoder", "cli_toy.Encoder", "--model.encoder.width", "-1"], "width must be >= 1, got -1"),
        (
            ["--trainer.callbacks", "cli_toy.Callback", "--trainer.callbacks.weight", "-1"],
            "weight must be >= 0, got -1.0",
        ),
        (["--trainer.callbacks", "cli_toy.NeedsPackage"], "Run: pip install 'heliostat[text]'"),
    ],
)
def test_what_a_class_refuses_is_one_line(
    args: list[str],
    message: str,
    toy: Path,
    heliostat_command: Heliostat,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert heliostat_command("fit", "--config", "toy.yaml", *args) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-2].startswith("error: ")
    assert said[-2].endswith(message)
    assert said[-1] == "HELIOSTAT_TRACEBACK=1 shows the traceback."
    assert not (toy / "runs").exists()
    monkeypatch.setenv("HELIOSTAT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="Union subtypes"):
        heliostat_command("fit", "--config", "toy.yaml", *args)


def test_help_of_one_command(toy: Path, heliostat_command: Heliostat, capsys: pytest.CaptureFixture[str]) -> None:
    assert heliostat_command("fit", "--help") == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: heliostat [options] fit")
    assert "--ckpt_path" in said


# Stages

STAGED = """
stages:
  first:
    model: {init_args: {scale: 2.0}}
    trainer: {max_epochs: 2}
  second:
    model: {class_path: cli_toy.Other}
"""


def test_stages_run_one_after_the_other_on_the_weights_so_far(
    toy: Path, heliostat_command: Heliostat, capsys: pytest.CaptureFixture[str]
) -> None:
    (toy / "toy.yaml").write_text(STAGED + CONFIG)
    assert heliostat_command("fit", "--config", "toy.yaml", "--model.lr=0.01") == 0
    run = only_run(toy / "runs" / "toy")
    assert sorted(path.name for path in run.iterdir()) == ["first", "second"]
    assert [steps(run / stage / "metrics.csv") for stage in ("first", "second")] == [[0, 1, 2, 3], [0, 1]]
    saved = {stage: yaml.safe_load((run / stage / "config.yaml").read_text()) for stage in ("first", "second")}
    assert [config["stages"] for config in saved.values()] == [None, None]
    assert [config["trainer"]["default_root_dir"] for config in saved.values()] == [None, None]
    assert saved["first"]["model"]["init_args"]["scale"] == 2.0
    assert saved["second"]["model"]["class_path"] == "cli_toy.Other"
    assert saved["second"]["model"]["init_args"]["lr"] == 0.01  # an option wins in every stage
    first = torch.load(run / "first" / "checkpoints" / "last.ckpt", weights_only=True)
    assert first["global_step"] == 4

    # The second stage alone, from the first one's weights and by its own saved config, gives the same.
    expected = torch.load(run / "second" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(value, first["state_dict"][name]) for name, value in expected.items())
    config = yaml.safe_load((run / "second" / "config.yaml").read_text())
    (toy / "second.yaml").write_text(yaml.safe_dump(config))
    import cli_toy

    initial = cli_toy.Encoder.__init__
    try:
        cli_toy.Encoder.__init__ = lambda self: (  # type: ignore[method-assign]
            initial(self),
            self.load_state_dict({k.removeprefix("encoder."): v for k, v in first["state_dict"].items()}),
        )[0]
        assert heliostat_command("fit", "--config", "second.yaml") == 0
    finally:
        cli_toy.Encoder.__init__ = initial  # type: ignore[method-assign]
    alone = torch.load(only_run(toy / "runs" / "second") / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in expected.items():
        torch.testing.assert_close(alone["state_dict"][name], value, rtol=0, atol=0)


def test_resume_goes_on_in_the_stage_of_the_checkpoint(toy: Path, heliostat_command: Heliostat) -> None:
    (toy / "toy.yaml").write_text(STAGED + CONFIG)
    heliostat_command("fit", "--config", "toy.yaml")
    run = only_run(toy / "runs" / "toy")
    last = run / "first" / "checkpoints" / "last.ckpt"
    assert heliostat_command("fit", "--config", "toy.yaml", "--ckpt_path", str(last), "--trainer.max_epochs=3") == 0
    assert only_run(toy / "runs" / "toy") == run
    assert steps(run / "first" / "metrics.csv") == [4, 5]
    assert steps(run / "second" / "metrics.csv") == [0, 1, 2, 3, 4, 5]
    last = run / "second" / "checkpoints" / "last-v1.ckpt"  # ModelCheckpoint keeps that of the first time
    assert heliostat_command("fit", "--config", "toy.yaml", f"--ckpt_path={last}", "--trainer.max_epochs=4") == 0
    assert steps(run / "second" / "metrics.csv") == [6, 7]
    assert not (run / "first" / "metrics.2.csv").exists()
    # The saved config of a stage is of that stage alone.
    config = str(run / "second" / "config.yaml")
    assert heliostat_command("fit", "--config", config, f"--ckpt_path={last}", "--trainer.max_epochs=5") == 0
    assert steps(run / "second" / "metrics.csv") == [8, 9]
    assert heliostat_command("test", "--config", config, f"--ckpt_path={last}") == 0


@pytest.mark.parametrize(
    ("stages", "args", "message"),
    [
        ("stages: [first]", [], "stages in {folder}/toy.yaml must map the name of each stage"),
        ("stages: {first: {modle: 1}}", [], "error: fit has no option 'modle'"),
        (
            STAGED,
            ["--ckpt_path=some/checkpoints/last.ckpt"],
            "give a checkpoint in .../first/checkpoints",
        ),
        ("stages: {first: {trainer: {strategy: ddpp}}}", [], "error: You selected an invalid strategy name"),
    ],
)
def test_wrong_stages(
    stages: str, args: list[str], message: str, toy: Path, heliostat_command: Heliostat, capsys
) -> None:
    (toy / "toy.yaml").write_text(stages + CONFIG)
    assert heliostat_command("fit", "--config", "toy.yaml", *args) in (1, 2)
    assert message.format(folder=toy) in capsys.readouterr().err
    assert not [path for path in (toy / "runs").rglob("*") if path.is_file()]


def test_next_stage_refuses_weights_that_do_not_fit(toy: Path, heliostat_command: Heliostat, capsys) -> None:
    second = "stages: {a: {}, b: {model: {init_args: {encoder: {class_path: cli_toy.Encoder, init_args: {width: 3}}}}}}"
    (toy / "toy.yaml").write_text(second + CONFIG)
    assert heliostat_command("fit", "--config", "toy.yaml") == 1
    assert "the weights of the stage before do not fit" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_run_directory(toy: Path) -> None:
    ddp = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    result = subprocess_run("-m", "heliostat", "fit", "--config", "toy.yaml", *ddp, cwd=toy, timeout=240)
    assert result.returncode == 0, result.stderr
    run = only_run(toy / "runs" / "toy")
    assert result.stdout.count("run directory: ") == 1
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "hparams.yaml", "metrics.csv"}
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in result.stderr


@pytest.mark.slow
def test_two_processes_run_all_stages(toy: Path) -> None:
    (toy / "toy.yaml").write_text(STAGED + CONFIG)
    ddp = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    result = subprocess_run("-m", "heliostat", "fit", "--config", "toy.yaml", *ddp, cwd=toy, timeout=240)
    assert result.returncode == 0, result.stderr
    run = only_run(toy / "runs" / "toy")
    assert sorted(path.name for path in run.iterdir()) == ["first", "second"]
    assert [steps(run / stage / "metrics.csv") for stage in ("first", "second")] == [[0, 1], [0]]
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in result.stderr
