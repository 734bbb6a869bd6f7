from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

import heliostat._extras
from heliostat import AdaptationReport
from heliostat.callbacks.adaptation_report import figure, table
from tests.harness import quiet_trainer


def right(count: int, total: int = 40) -> Tensor:
    """So many right predictions, evenly spread."""
    return (torch.arange(1, total + 1) * count) // total != (torch.arange(total) * count) // total


RESULTS = {
    "fog": {"none": right(4), "batchnorm": right(30), "cafa": right(32)},
    "jpeg_compression": {"none": right(20), "batchnorm": right(20), "cafa": right(18)},
}


class Streams(BoringModel):
    """Nothing of ours but the attribute."""

    stream_results: dict[str, dict[str, Tensor]] = {}  # noqa: RUF012

    def on_test_epoch_end(self) -> None:
        self.stream_results = RESULTS
        self.log("test/cafa", 0.625)


def test_table() -> None:
    assert table(RESULTS).splitlines() == [
        "accuracy (%)      test/none   test/batchnorm   test/cafa",
        "fog                    10.0             75.0        80.0*",
        "jpeg_compression       50.0*            50.0*       45.0",
        "mean                   30.0             62.5*       62.5*",
        "gain over none                         +32.5       +32.5",
    ]


def test_table_of_one_stream_or_one_method() -> None:
    assert table({"fog": {"tent": right(30)}}).split() == ["accuracy", "(%)", "test/tent", "fog", "75.0"]
    lines = table({"fog": RESULTS["fog"]}).splitlines()
    assert [line.split()[0] for line in lines] == ["accuracy", "fog", "gain"]


def test_prints_draws_and_writes(tmp_path: Path, capsys) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[AdaptationReport()], limit_test_batches=1)
    trainer.test(Streams())
    out = capsys.readouterr().out
    assert table(RESULTS) in out
    assert "Test metric" not in out  # Lightning's table says the same at greater length
    assert (tmp_path / "adaptation.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "adaptation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[2] == {"stream": "fog", "method": "cafa", "samples": "40", "accuracy": "0.800000"}


def test_figure_shows_the_accuracy_so_far() -> None:
    axes = figure(RESULTS).axes
    assert [a.get_title(loc="left") for a in axes] == ["fog", "jpeg compression", "mean of 2 streams"]
    for panel, curves in zip(axes, RESULTS.values(), strict=False):
        for line, flags in zip(panel.lines, curves.values(), strict=True):
            seen = torch.as_tensor(line.get_xdata())
            so_far = 100 * flags.double().cumsum(0)[seen - 1] / seen
            torch.testing.assert_close(torch.as_tensor(line.get_ydata()), so_far)
            assert seen[-1] == 40
    mean = axes[2].lines[2].get_ydata()[-1]
    assert mean == pytest.approx(62.5)
    assert axes[0].get_title(loc="right") == "none: 10.0"  # below the panel's range
    assert axes[1].get_title(loc="right") == ""  # in it


@pytest.mark.parametrize("streams", [1, 3, 5])
def test_any_number_of_streams_of_any_length(streams: int) -> None:
    results = {f"s{i}": {"none": right(1, 3 + i), "own method": right(2, 3 + i)} for i in range(streams)}
    drawn = figure(results)
    assert len([a for a in drawn.axes if a.axison]) == streams + (streams > 1)
    figure({name: {"none": curves["none"]} for name, curves in results.items()})


def test_loggers_with_pictures_get_the_figure(tmp_path: Path) -> None:
    class Images(CSVLogger):
        sent: list

        def log_image(self, key: str, images: list) -> None:
            self.sent = [key, *images]

    logger = Images(tmp_path, name="", version="")
    callbacks = [AdaptationReport("streams.png")]
    quiet_trainer(tmp_path, callbacks=callbacks, limit_test_batches=1, logger=logger).test(Streams())
    assert logger.sent == ["streams", str(tmp_path / "streams.png")]
    assert (tmp_path / "streams.csv").exists()


def test_fast_dev_run_leaves_nothing(tmp_path: Path, capsys) -> None:
    quiet_trainer(tmp_path, callbacks=[AdaptationReport()], fast_dev_run=True).test(Streams())
    assert "gain over none" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_module_without_results_is_refused_at_once(tmp_path: Path, stage: str) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[AdaptationReport()], max_steps=1)
    with pytest.raises(MisconfigurationException, match="reads `stream_results` .* BoringModel does not have"):
        getattr(trainer, stage)(BoringModel())


def test_missing_matplotlib_is_said_before_the_test(tmp_path: Path, monkeypatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(heliostat._extras.importlib, "import_module", absent)
    with pytest.raises(ModuleNotFoundError, match=r"AdaptationReport needs .* pip install 'heliostat\[data\]'"):
        quiet_trainer(tmp_path, callbacks=[AdaptationReport()]).test(Streams())
