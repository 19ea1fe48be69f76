"""The benchmark: its report follows from its measurements, and it measures real trainings. No time is asserted."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import REPOSITORY, load_script

pytestmark = pytest.mark.slow

SCRIPT = REPOSITORY / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a quick benchmark leaves."""
    folder = tmp_path_factory.mktemp("benchmark")
    words = ["--quick", "--settings", "cifar", "--contestants", "a", "b", "c", "--num_threads", "1", "--use_cpu"]
    subprocess.run([sys.executable, str(SCRIPT), *words, "--output_dir", str(folder)], check=True)
    return folder


def test_ratios_are_medians_over_turns(folder):
    measured = json.loads((folder / "benchmark.json").read_text())["settings"]["cifar"]
    windows, rates = measured["windows"], measured["rates"]
    assert list(windows) == ["a", "b", "c"]
    speeds = {}
    for letter, each in windows.items():
        assert len(each) == 2
        assert all(window["peak_memory"] > 10**8 for window in each)  # torch alone takes more
        assert all(window["steps"] >= 3 for window in each)
        speeds[letter] = [4 * window["steps"] / window["seconds"] for window in each]
        assert rates[letter]["median"] == pytest.approx(statistics.median(speeds[letter]))
        assert rates[letter]["low"] == pytest.approx(min(speeds[letter]))
    for name, under in (("b/a", "a"), ("b/c", "c")):
        quotients = [ours / theirs for ours, theirs in zip(speeds["b"], speeds[under], strict=True)]
        assert rates[name]["median"] == pytest.approx(statistics.median(quotients))
        assert rates[name]["high"] == pytest.approx(max(quotients))


def test_the_table_has_the_ratios_first_and_names_no_folder(folder):
    report = (folder / "benchmark.md").read_text()
    assert report.index("| b/a |") < report.index("| b/c |") < report.index("| a: bare loop")
    assert "| cifar: cifar-resnet-8 from cifar-resnet-8, 32 px, batch 4 |" in report
    assert "f/b" not in report  # f did not take part
    for name in ("benchmark.md", "benchmark.json"):
        assert str(folder) not in (folder / name).read_text()


def test_a_contestant_that_fails_is_told_with_its_log(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "words", lambda *_: ["--temprature", "2"])
    words = ["--quick", "--settings", "resnet18", "--contestants", "b", "--use_cpu", "--output_dir", str(tmp_path)]
    assert script.main(words) == 1
    error = capsys.readouterr().err
    assert "error: b ended; its log ends with:" in error
    assert "--temprature" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--windows", "0"], "--windows must be at least 1, got 0."),
        (["--window_seconds", "-1"], "--window_seconds must be at least 0, got -1.0."),
        (["--settings", "mnist"], "invalid choice: 'mnist'"),
        (["--other_checkout", "nowhere"], "--other_checkout nowhere: there is no scripts/run_bkd.py in it."),
    ],
)
def test_bad_options_are_refused(script, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        script.main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
