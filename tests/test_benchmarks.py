import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("benchmarks", reason="the benchmarks are in the checkout, not in the wheel")

import benchmarks.claims
import benchmarks.speed
from benchmarks.claims import Claim, Metric
from benchmarks.claims.__main__ import main as claims_main
from benchmarks.claims.__main__ import verdict
from benchmarks.frame import table, write_json
from benchmarks.speed import Case
from benchmarks.speed.__main__ import difference, measure, peak_bytes, time_interleaved, verdicts
from benchmarks.speed.__main__ import main as speed_main

CPU = torch.device("cpu")

CLAIM = '''"""A toy claim.

More about it.
"""
from pathlib import Path
import torch
from benchmarks.claims import Claim, Metric

HERE = Path(__file__).parent

def arm(name, gain):
    def run(seed, data):
        if seed == 1 and gain and (HERE / "interrupt").exists():
            raise KeyboardInterrupt
        with (HERE / "log").open("a") as log:
            log.write(f"{name} {seed} {data and data.read_text()}\\n")
        return {"score": 10 * seed + gain + torch.rand(()).item(), "cost": gain}  # the noise must cancel in pairs
    return run

CLAIM = Claim(
    statement="ours scores higher",
    source="Toy et al., Table 1",
    metrics={"score": Metric("higher", ".2f"), "cost": Metric("lower", ".0f")},
    arms={"plain": arm("plain", 0), "ours": arm("ours", 3), "other": arm("other", 1)},
    baseline="plain",
    method="ours",
    budget="nothing",
)
'''

SPEED = '''"""A toy race."""
import time
import torch
from benchmarks.speed import Case, Speed

def sleeper(seconds):
    def prepare(device):
        ones = torch.ones(4, device=device)
        def run():
            time.sleep(seconds)
            return (ones * (1 + seconds),)
        return run
    return prepare

SPEED = Speed(
    summary="Sleeping.",
    cases={
        "short": Case(ours={"us": sleeper(0.002), "us too": sleeper(0.004)}, peers={"them": sleeper(0.03)}),
        "long": Case(ours={"us": sleeper(0.03)}, peers={"them": sleeper(0.002)}),
    },
)
'''


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Folder whose modules are benchmarks of both kinds."""
    folder = tmp_path / "toys"
    folder.mkdir()
    (folder / "_helper.py").write_text("raise AssertionError('listing must not import')")
    (folder / "toy_claim.py").write_text(CLAIM)
    (folder / "toy_speed.py").write_text(SPEED)
    for package in (benchmarks.claims, benchmarks.speed):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)
    forget()


def forget():
    for name in [name for name in sys.modules if ".toy_" in name]:
        del sys.modules[name]
    importlib.invalidate_caches()


def run_claim(tmp_path, *options):
    forget()
    claims_main(["toy_claim", "--out", str(tmp_path / "out"), *options])
    return json.loads((tmp_path / "out/claims/toy_claim.json").read_text())


def logged(toys):
    return [line.rsplit(" ", 1)[0] for line in (toys / "log").read_text().splitlines()]


def test_claim_writes_figures_verdicts_and_origin(toys, tmp_path, capsys):
    document = run_claim(tmp_path)

    assert logged(toys) == [f"{arm} {seed}" for seed in (0, 1, 2) for arm in ("plain", "ours", "other")]
    summary = document["summary"]
    assert summary["seeds"] == [0, 1, 2]
    assert summary["metrics"]["score"]["differences"] == pytest.approx([3, 3, 3])
    scores = [run["metrics"]["score"] for run in document["runs"] if run["arm"] == "ours"]
    assert summary["metrics"]["score"]["arms"]["ours"] == {
        "mean": pytest.approx(statistics.mean(scores)),
        "sd": pytest.approx(statistics.stdev(scores)),
    }
    page = (tmp_path / "out/claims/toy_claim.md").read_text()
    won = "score: won in 3 of 3 seeds (difference +3.00 on average, +3.00 to +3.00; higher is better)"
    lost = "cost: did not win: better in 0 of 3 seeds (difference +3 on average, +3 to +3; lower is better)"
    printed = capsys.readouterr().out
    for text in (won, lost):
        assert text in page
        assert text in printed
    mean, sd = statistics.mean(scores), statistics.stdev(scores)
    assert f"| ours (method) | {mean:.2f} ± {sd:.2f} | 3 ± 0 | 0.0 |" in page
    assert "Toy et al., Table 1" in page

    for key in ("command", "environment", "config_hash", "claim"):
        assert document[key]
    assert set(document["environment"]) == {"versions", "device", "cpu", "threads"}
    assert set(document["environment"]["versions"]) == {"python", "torch", "lightning", "transformers"}
    assert all({"seconds", "date", "commit", "dirty"} <= set(run) for run in document["runs"])
    assert torch.__version__.split("+")[0] in page


def test_interrupted_claim_resumes_after_the_last_finished_run(toys, tmp_path):
    (toys / "interrupt").touch()
    with pytest.raises(KeyboardInterrupt):
        run_claim(tmp_path)
    partial = tmp_path / "out/claims/toy_claim.partial.json"
    assert len(json.loads(partial.read_text())["runs"]) == 4
    assert not (tmp_path / "out/claims/toy_claim.json").exists()

    (toys / "interrupt").unlink()
    document = run_claim(tmp_path)
    assert len(logged(toys)) == len(set(logged(toys))) == 9
    assert document["summary"]["metrics"]["score"]["differences"] == pytest.approx([3, 3, 3])
    assert not partial.exists()


def test_finished_runs_are_kept_until_code_changes_or_fresh(toys, tmp_path, capsys):
    run_claim(tmp_path, "--seeds", "0")
    document = run_claim(tmp_path, "--seeds", "0", "5")
    assert logged(toys) == [f"{arm} {seed}" for seed in (0, 5) for arm in ("plain", "ours", "other")]
    assert document["summary"]["seeds"] == [0, 5]

    source = toys / "toy_claim.py"
    source.write_text(CLAIM + "# a comment\n")
    run_claim(tmp_path, "--seeds", "0")
    assert len(logged(toys)) == 6
    assert "kept from" in capsys.readouterr().out

    source.write_text(CLAIM.replace('budget="nothing"', 'budget="something"'))
    assert run_claim(tmp_path, "--seeds", "0")["summary"]["seeds"] == [0]
    assert len(logged(toys)) == 9
    assert "another configuration" in capsys.readouterr().out

    run_claim(tmp_path, "--seeds", "0", "--fresh")
    assert len(logged(toys)) == 12


def test_other_data_reaches_the_arms_and_names_the_file(toys, tmp_path):
    data = tmp_path / "other.txt"
    data.write_text("pairs")
    claims_main(["toy_claim", "--seeds", "0", "--data", str(data), "--out", str(tmp_path / "out")])

    document = json.loads((tmp_path / "out/claims/toy_claim-other.json").read_text())
    assert document["data"]["name"] == "other"
    assert "SHA-256" in (tmp_path / "out/claims/toy_claim-other.md").read_text()
    assert (toys / "log").read_text().splitlines()[0] == "plain 0 pairs"

    first = document["config_hash"]
    data.write_text("other pairs")
    claims_main(["toy_claim", "--seeds", "0", "--data", str(data), "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/claims/toy_claim-other.json").read_text())["config_hash"] != first


@pytest.mark.parametrize(
    ("differences", "better", "expected"),
    [
        ([1.0, 2.0], "higher", "won in 2 of 2 seeds (difference +1.5 on average, +1.0 to +2.0; higher is better)"),
        ([-1.0], "lower", "won in 1 of 1 seed (difference -1.0 on average, -1.0 to -1.0; lower is better)"),
        (
            [3.0, -1.0, 1.0],
            "higher",
            "did not win: better in 2 of 3 seeds (difference +1.0 on average, -1.0 to +3.0; higher is better)",
        ),
        (
            [0.0],
            "higher",
            "did not win: better in 0 of 1 seed (difference +0.0 on average, +0.0 to +0.0; higher is better)",
        ),
        ([1.0, float("nan")], "higher", "did not win: better in 1 of 2 seeds (1 of 2 seeds gave no finite difference)"),
        ([float("inf")], "higher", "did not win: better in 0 of 1 seed (1 of 1 seed gave no finite difference)"),
    ],
)
def test_verdict_wording(differences, better, expected):
    assert verdict(differences, Metric(better, ".1f")) == expected


def test_diverged_run_is_written_as_null_and_reported(toys, tmp_path):
    source = toys / "toy_claim.py"
    source.write_text(CLAIM.replace('"cost": gain}', '"cost": float("nan") if gain else 0.0}'))
    document = run_claim(tmp_path, "--seeds", "0", "1")
    assert document["runs"][1]["metrics"]["cost"] is None
    assert (
        "cost: did not win: better in 0 of 2 seeds (2 of 2 seeds gave no finite difference)"
        in (tmp_path / "out/claims/toy_claim.md").read_text()
    )
    run_claim(tmp_path, "--seeds", "0", "1", "2")  # null is read back


def test_claim_refuses_what_does_not_fit(toys, tmp_path):
    (toys / "toy_claim.py").write_text(CLAIM.replace('"cost": gain}', '"price": gain}'))
    with pytest.raises(ValueError, match=r"arm 'plain' must return the metrics \['cost', 'score'\], got \['price'"):
        run_claim(tmp_path)
    with pytest.raises(SystemExit, match=r"no benchmark 'absent'; there are: .*toy_claim"):
        claims_main(["absent"])
    with pytest.raises(SystemExit):
        claims_main(["toy_claim", "--data", str(tmp_path / "absent")])
    arms = {"a": dict, "b": dict}
    for baseline, method in (("a", "a"), ("a", "c")):
        with pytest.raises(ValueError, match="must be two of the arms"):
            Claim("s", "s", {"m": Metric("higher")}, arms, baseline=baseline, method=method, budget="b")
    with pytest.raises(ValueError, match="at least one metric"):
        Claim("s", "s", {}, arms, baseline="a", method="b", budget="b")


@pytest.mark.parametrize("main", [claims_main, speed_main])
def test_without_a_name_all_are_listed_and_none_imported(main, toys, capsys):
    main([])
    listing = capsys.readouterr().out
    assert "toy_claim                A toy claim.\n" in listing
    assert "toy_speed" in listing
    assert "_helper" not in listing
    assert not any(".toy_" in name for name in sys.modules)


def test_speed_publishes_wins_and_losses(toys, tmp_path, capsys):
    speed_main(["toy_speed", "--repeats", "7", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "speed/toy_speed.json").read_text())
    assert {"command", "environment", "date", "commit", "dirty", "repeats"} <= set(document)
    assert document["environment"]["threads"] == 1
    ours, second, peer = document["cases"]["short"]
    assert (ours["ours"], second["ours"], peer["ours"]) == (True, True, False)
    assert len(peer["samples_ms"]) == 7
    assert peer["q1_ms"] <= peer["median_ms"] <= peer["q3_ms"]
    assert peer["time_ratio"] == pytest.approx(peer["median_ms"] / ours["median_ms"])
    assert ours["difference"] == 0
    assert peer["difference"] == pytest.approx(0.028 / 1.002, rel=1e-3)

    page = (tmp_path / "speed/toy_speed.md").read_text()
    for text in (page, capsys.readouterr().out):
        assert "- faster in 1 of 2 comparisons\n  - short, against them" in text
        assert "- slower in 1 of 2 comparisons\n  - long, against them" in text
    assert "| short | ours: us |" in page
    assert "|  | peer: them |" in page
    with pytest.raises(SystemExit):
        speed_main(["toy_speed", "--repeats", "2"])


def test_verdict_is_level_when_quartiles_overlap():
    def record(ours, q1, q3, peak):
        return {"label": "x", "ours": ours, "q1_ms": q1, "q3_ms": q3, "time_ratio": 1.1, "peak_bytes": peak}

    lines = verdicts({"case": [record(True, 1, 3, 2 << 20), record(False, 2, 4, 1 << 20)]})
    assert lines[2] == "- level in 1 of 1 comparisons"
    assert lines[-2:] == ["- more peak memory in 1 of 1 comparisons", "  - case, against x: 2.00 MiB against 1.00 MiB"]


def test_contenders_take_turns():
    calls = []
    samples = time_interleaved({"a": lambda: calls.append("a") or (), "b": lambda: calls.append("b") or ()}, 4, CPU)
    assert "".join(calls) == "ab" * 7
    assert {label: len(times) for label, times in samples.items()} == {"a": 4, "b": 4}


def test_peak_memory_of_a_known_allocation():
    size = 1 << 20
    outside = torch.ones(size)

    def two_then_one():
        a = torch.empty(size)  # 4 MiB
        b = torch.empty(size)  # 8 MiB
        del a, b
        return (torch.empty(size),)  # 4 MiB

    assert peak_bytes(two_then_one, CPU) == 8 * size
    assert peak_bytes(lambda: (outside.mul_(1),), CPU) < 1024  # what was there before does not count

    x = torch.ones(size, requires_grad=True)

    def forward_backward():
        y = x.exp()  # 4 MiB, kept for backward
        return torch.autograd.grad(y, x, outside)  # 4 MiB more

    assert peak_bytes(forward_backward, CPU) == 8 * size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_and_file_name_on_cuda(toys, tmp_path):
    size = 1 << 20
    cuda = torch.device("cuda")

    def two_then_one():
        a, b = torch.empty(size, device=cuda), torch.empty(size, device=cuda)
        del a, b
        return (torch.empty(size, device=cuda),)

    assert peak_bytes(two_then_one, cuda) == 8 * size
    speed_main(["toy_speed", "--repeats", "3", "--device", "cuda", "--out", str(tmp_path)])
    (written,) = (tmp_path / "speed").glob("toy_speed-*.json")
    assert "nvidia" in written.name


def test_case_refuses_ambiguous_labels():
    with pytest.raises(ValueError, match="different labels"):
        Case(ours={"a": lambda device: tuple}, peers={"a": lambda device: tuple})
    assert difference((), ()) is None


def test_small_helpers(tmp_path):
    assert table(["a", "b"], [["1", "x|y"]]) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"
    path = Path(tmp_path, "new", "file.json")
    write_json(path, {"a": [float("inf"), 1.0]})
    assert json.loads(path.read_text()) == {"a": [None, 1.0]}
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("detached", [False, True])
def test_group_whitening_contenders_compute_the_same(detached):
    from benchmarks.speed.group_whitening import _case

    ours, peer = measure(_case(64, 24, 6, detached), 3, CPU)
    assert ours["ours"]
    assert not peer["ours"]
    assert peer["difference"] < 1e-4
