"""A `results.json` may come from anywhere: it is valid, or one line says what is wrong."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest

from bkd_hf import InputError, load_results
from bkd_hf.card import build
from bkd_hf.results import save_json
from tests.campaign_results import CARDS, mutations


@pytest.fixture(scope="module")
def digits() -> dict:
    return load_results(CARDS / "digits")


def test_all_committed_results_are_read():
    paths = sorted(CARDS.rglob("results.json"))
    assert len(paths) > 100
    for path in paths:
        load_results(path)


def test_numbers_that_json_has_not_count_as_missing(digits, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({**digits, "teacher": math.inf}))
    assert load_results(tmp_path)["teacher"] is None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("student.metrics.accuracy", "0.5", "student.metrics.accuracy: Input should be a valid number .it is '0.5'."),
        ("student.metrics.accuracy", 1.5, "student.metrics.accuracy: Input should be less than or equal to 1"),
        ("student.metrics.accuracy", 0.5, "student.metrics.accuracy: the accuracies of the classes give 0.892"),
        ("student.metrics.expected_calibration_error", -0.1, "greater than or equal to 0"),
        ("student.metrics.per_class_accuracy", [0.5] * 9, "per_class_accuracy: not one for each class"),
        ("student.metrics.few_shot_accuracy", None, "few_shot_accuracy: Input should be a valid number"),
        ("student.confusions", [[0, 99, 1]], "student.confusions: there is no such class"),
        ("student.confusions", [[0, 1]], "at least 3 items"),
        ("student.hub_id", "x](http://evil)", "student.hub_id: String should match"),
        ("data.class_names", ["x" * 2_000_000] * 10, "at most 1000000 characters"),
        ("data.class_counts", [1] * 9, "data.class_counts: not a number for each of 10 classes"),
        ("data.num_eval_images", 7, "data.num_eval_images: it is not the sum of eval_class_counts"),
        ("data.few_shot_threshold", 1000, "few_shot_threshold"),
        ("options.training.temperature", "2", "options.training.temperature"),
        ("options.training.method", "magic", "options.training.method: there is no 'magic' here"),
        ("options.model", {"x": [[[]]] * 3}, None),
        ("hardware.num_processes", True, "hardware.num_processes"),
        ("seed", 10**30, "seed: Input should be less"),
        ("something_new", {"of": "a later version"}, None),
    ],
)
def test_what_is_checked(digits, tmp_path, place, value, message):
    results = copy.deepcopy(digits)
    *parents, name = place.split(".")
    part = results
    for parent in parents:
        part = part[parent]
    part[name] = value
    save_json(results, tmp_path / "results.json")
    if message is None:
        assert load_results(tmp_path) == results
        return
    with pytest.raises(InputError, match=message):
        load_results(tmp_path)


def test_numbers_that_are_none_are_refused_in_memory_and_on_the_disk(digits, tmp_path):
    results = copy.deepcopy(digits)
    results["student"]["metrics"]["accuracy"] = math.nan
    with pytest.raises(InputError, match="accuracy: Input should be a valid number"):
        build(results)
    text = (CARDS / "digits" / "results.json").read_text(encoding="utf-8")
    for spelling in ("NaN", "Infinity", "1e400"):
        (tmp_path / "results.json").write_text(text.replace('"seconds":', f'"seconds": {spelling}, "x":', 1))
        with pytest.raises(InputError, match="Input should be a"):
            load_results(tmp_path)


def test_changed_files_give_one_line_or_a_card(tmp_path):
    lines = []
    for _, content in mutations(seed=5, n=60):
        (tmp_path / "results.json").write_bytes(content)
        try:
            str(build(tmp_path)).encode()
        except InputError as error:
            lines.append(str(error))
    assert 30 <= len(lines) < 60
    assert all(len(line) < 1000 and line.isprintable() for line in lines)


def test_a_file_that_never_ends(tmp_path):
    (tmp_path / "results.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"results.json cannot be read: it is no regular file"):
        load_results(Path(tmp_path))
