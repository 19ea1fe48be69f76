"""The benchmark: what it says follows from what it measured, and it measures real trainings. No time is asserted."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import psutil
import pytest

from bkd_hf import BKDConfig, BKDTrainer
from bkd_hf import benchmark as benchmark_module
from bkd_hf.benchmark import (
    CONTESTANTS,
    PARTS,
    SETTINGS,
    BenchmarkOptions,
    Contestant,
    Gate,
    GateCallback,
    Job,
    Stopwatch,
    project,
    seconds_until,
    synthetic_image,
)
from tests.conftest import REPOSITORY
from tests.tiny_models import tiny_vit


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_script", REPOSITORY / "scripts" / "benchmark.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(script, tmp_path_factory):
    """What a quick benchmark leaves."""
    folder = tmp_path_factory.mktemp("benchmark")
    words = ["--quick", "--settings", "cifar", "--measure", "training", "pipeline", "scale", "--num_threads", "1"]
    assert script.main([*words, "--use_cpu", "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))


# ---- A whole run


def test_everyone_takes_part(results):
    measured = results["settings"]["cifar"]
    assert list(measured["contestants"]) == list(CONTESTANTS)
    assert measured["skipped"] == {}
    for contestant in measured["contestants"].values():
        assert len(contestant["windows"]) == 2
        assert contestant["peak_memory"] > 10**8  # torch alone takes more
        assert set(contestant["parts"]) == set(PARTS)
        assert contestant["global_batch_size"] == 4
    parts = {name: contestant["parts"] for name, contestant in measured["contestants"].items()}
    assert parts["ce"]["teacher"] == 0
    assert parts["cache"]["teacher"] < parts["trainer"]["teacher"]
    assert all(part["student"] > 0 and part["backward"] > 0 and part["optimizer"] > 0 for part in parts.values())
    assert measured["contestants"]["processes"]["num_processes"] == 2
    assert set(results["pipeline"]) == {"decoder", "loader"}
    assert {"versions", "hardware", "options", "command", "scale"} <= set(results)
    assert [projection["name"] for projection in results["projections"]] == ["CIFAR-100-LT"]


def test_rates_are_those_of_the_windows(results):
    for contestant in results["settings"]["cifar"]["contestants"].values():
        rates = [4 * window["steps"] / window["seconds"] for window in contestant["windows"]]
        assert contestant["images_per_second"]["median"] == pytest.approx(statistics.median(rates))
        assert contestant["images_per_second"]["min"] == pytest.approx(min(rates))
        assert contestant["seconds_per_step"]["max"] == pytest.approx(4 / min(rates))


def step_seconds(contestant: dict) -> np.ndarray:
    return np.array([window["seconds"] / window["steps"] for window in contestant["windows"]])


def test_ratios_are_medians_over_turns(results):
    contestants = results["settings"]["cifar"]["contestants"]
    ratios = {ratio["name"]: ratio for ratio in results["ratios"]}
    assert list(ratios) == ["b/a", "b/c", "e/d", "f/b", "pipeline/decode"]
    names = {letter: name for name, (letter, _) in CONTESTANTS.items()}
    for name in ("b/a", "b/c", "f/b"):
        over, under = (step_seconds(contestants[names[letter]]) for letter in name.split("/"))
        assert ratios[name]["value"] == pytest.approx(np.median(under / over))
        assert ratios[name]["high"] == pytest.approx(max(under / over))
        if name == "b/a":
            assert ratios[name]["overhead_seconds_per_step"] == pytest.approx(np.median(over - under))
    over, under = (step_seconds(contestants[names[letter]]) for letter in "ed")
    assert ratios["e/d"]["value"] == pytest.approx(np.median(over / under))
    targets = {name: (ratio["target"], ratio["at_least"]) for name, ratio in ratios.items()}
    assert targets["b/a"] == (0.95, True)
    assert targets["b/c"] == (2.0, True)
    assert targets["e/d"] == (1.05, False)
    assert targets["pipeline/decode"] == (0.9, True)
    for ratio in results["ratios"]:
        assert ratio["low"] <= ratio["high"]
        if ratio["target"] is not None:
            better = ratio["value"] >= ratio["target"] if ratio["at_least"] else ratio["value"] <= ratio["target"]
            assert ratio["reached"] == better


def test_the_report_states_targets_and_names_no_folder(folder):
    report = (folder / "benchmark.md").read_text(encoding="utf-8")
    for target in ("≥ 0.95", "≥ 2", "≤ 1.05", "≥ 0.9"):
        assert f"| {target}" in report
    assert report.index("## Ratios") < report.index("## cifar")
    assert "| CIFAR-100-LT | 10,847 | 100 | 200 |" in report
    assert "![" in report
    assert (folder / "benchmark.png").stat().st_size > 10_000
    for name in ("benchmark.md", "benchmark.json"):
        assert str(folder) not in (folder / name).read_text(encoding="utf-8")


def measured_at(rate: float, **other) -> dict:
    return {"images_per_second": {"median": rate}, "global_batch_size": 128, "num_processes": 1} | other


def test_published_sets_at_measured_rates():
    contestants = {"trainer": measured_at(1000), "cache": measured_at(2000)}
    names = [projection["name"] for projection in project({"resnet18": {"contestants": contestants}})]
    assert names == ["ImageNet-LT", "Places-LT", "iNaturalist 2018"]  # the other's rates were not measured
    places = project({"resnet18": {"contestants": contestants}})[1]
    assert places["hours"]["1"] == pytest.approx(90 * 62.5 / 3600)
    assert places["hours"]["8"] == pytest.approx(90 * 62.5 / 3600 / 8)
    assert places["cached_hours"]["1"] == pytest.approx((16 * 62.5 + 74 * 31.25) / 3600)
    assert places["cache_size"] == 16 * 62_500 * (2 * 365 + 1)
    assert places["decoded_size"] == 62_500 * 256 * 256 * 3
    # Two GPUs that are 1.5 times as fast as one; two processes that share a batch are no devices.
    for others, speed_up in (({"global_batch_size": 256}, 6), ({}, 8)):
        several = contestants | {"processes": measured_at(1500, num_processes=2, **others)}
        hours = project({"resnet18": {"contestants": several}})[0]["hours"]
        assert hours["1"] / hours["8"] == pytest.approx(speed_up)
    assert project({"resnet18": {"contestants": {"limit": measured_at(1)}}}) == []


# ---- Contestants


class ScriptedConnection:
    """Asks for windows, and keeps what is reported."""

    def __init__(self, *commands):
        self.commands, self.reports = list(commands), []

    def recv(self):
        return self.commands.pop(0)

    def send(self, report):
        self.reports.append(report)


def test_a_gated_trainer_takes_the_steps_of_its_windows(tmp_path):
    pixels = np.random.default_rng(0).standard_normal((10, 3, 8, 8)).astype(np.float32)
    examples = datasets.Dataset.from_dict({"pixel_values": list(pixels), "labels": [0, 1] * 5}).with_format("torch")
    args = BKDConfig(
        output_dir=str(tmp_path), num_train_epochs=100, per_device_train_batch_size=4, use_cpu=True, save_strategy="no"
    )
    trainer = BKDTrainer(model=tiny_vit(0, 2), teacher_model=tiny_vit(1, 2), args=args, train_dataset=examples)
    connection = ScriptedConnection((4, False), (2, True), (3, False), None)
    methods = [(trainer, "compute_loss", "student"), (trainer, "get_batch_samples", "data")]
    gate = Gate(connection, lambda: None, lambda: methods)
    trainer.add_callback(GateCallback(gate))
    trainer.train()

    assert trainer.state.global_step == 1 + 4 + 2 + 3
    epochs = [report["epoch"] for report in connection.reports]
    assert epochs == pytest.approx([1 / 3, 5 / 3, 7 / 3, 10 / 3])
    profile = connection.reports[2]["parts"]
    assert [report["parts"] for report in connection.reports if report["parts"] is not profile] == [None] * 3
    assert sum(profile.values()) <= connection.reports[2]["seconds"]
    assert min(profile["student"], profile["data"], profile["overhead"]) > 0
    assert not {"compute_loss", "get_batch_samples"} & set(vars(trainer))  # put back


def quick_job(folder: Path, contestant: str = "limit") -> Job:
    options = BenchmarkOptions(output_dir=folder, quick=True, num_threads=1, use_cpu=True)
    (folder / "logs").mkdir(exist_ok=True)
    source = benchmark_module._provide_images(options, contestant == "loader", lambda line: None)
    setting = options.setting("resnet18" if contestant == "loader" else "cifar")
    return benchmark_module._job("quick", contestant, setting, source, options, threads=1)


def test_a_contestant_is_frozen_between_its_windows(tmp_path):
    contestant = Contestant(quick_job(tmp_path, "loader"), benchmark_module._process_context("cpu"))
    try:
        process = psutil.Process(contestant._processes[0].pid)
        for _ in range(2):
            workers = process.children()
            assert [worker.status() for worker in workers] == [psutil.STATUS_STOPPED]
            before = process.cpu_times()[:2]
            time.sleep(0.05)
            assert process.cpu_times()[:2] == before  # it waits
            assert contestant.advance(3)["steps"] == 3
        contestant.finish()  # compares the steps taken with those asked for
        assert contestant.steps == 7
    finally:
        contestant.kill()


def test_nothing_is_left_of_a_benchmark_that_is_gone(tmp_path):
    contestant = Contestant(quick_job(tmp_path, "loader"), benchmark_module._process_context("cpu"))
    process = psutil.Process(contestant._processes[0].pid)
    processes = [process, *process.children()]
    contestant._connection.close()  # as when the main process was killed
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    contestant._join()


def test_a_contestant_that_fails_is_told_with_its_log(tmp_path):
    job = quick_job(tmp_path)
    broken = dataclasses.replace(job, source=dataclasses.replace(job.source, name=str(tmp_path / "missing")))
    with pytest.raises(RuntimeError, match=r"(?s)quick failed.*missing: there is no such file"):
        Contestant(broken, benchmark_module._process_context("cpu"))


# ---- Parts


def test_a_stopwatch_tells_parts_from_what_they_are_within(monkeypatch):
    now = 0.0

    def passes(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(benchmark_module.time, "perf_counter", lambda: now)
    worker = SimpleNamespace(inner=lambda: passes(2.0))
    worker.outer = lambda: (passes(1.0), worker.inner(), passes(4.0))
    inner, outer = worker.inner, worker.outer
    watch = Stopwatch(lambda: None)
    watch.instrument(worker, "outer", "student")
    watch.instrument(worker, "inner", "teacher")
    passes(100.0)
    watch.start()
    passes(8.0)
    worker.outer()
    seconds = watch.stop()
    assert seconds == dict.fromkeys(PARTS, 0.0) | {"overhead": 8.0, "student": 5.0, "teacher": 2.0}
    assert (worker.inner, worker.outer) == (inner, outer)


def test_synthetic_images_are_as_large_as_real_ones():
    generator = np.random.default_rng(0)

    def mean_size(width, height, **options):
        files = [io.BytesIO() for _ in range(10)]
        for file in files:
            synthetic_image(generator, width, height).save(file, **options)
        return statistics.mean(len(file.getvalue()) for file in files)

    assert mean_size(32, 32, format="PNG") == pytest.approx(2236, rel=0.1)  # CIFAR-100's
    assert mean_size(500, 375, format="JPEG", quality=90) == pytest.approx(100_000, rel=0.1)


def test_seconds_until_a_line_is_printed():
    code = "import time; print('ready', flush=True); time.sleep(60)"
    assert 0 < seconds_until([sys.executable, "-c", code], "ready") < 30
    with pytest.raises(RuntimeError, match="other words"):
        seconds_until([sys.executable, "-c", "print('other words')"], "ready")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--windows", "1"], "--windows must be at least 2, got 1."),
        (["--settings", "mnist"], f"--settings takes any of {', '.join(SETTINGS)}, got mnist."),
        (["--num_images", "10"], "--num_images must be at least 200, got 10."),
        (["--window_seconds", "-1"], "--window_seconds must be a finite number ≥ 0, got -1.0."),
        (["--imbalance_ratio", "100"], "--imbalance_ratio is about --dataset_name, which is not given."),
    ],
)
def test_bad_options_are_refused(script, capsys, words, message):
    assert script.main(words) == 2
    assert message in capsys.readouterr().err
