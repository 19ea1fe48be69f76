"""Methods × seeds: the statistics against values computed by hand, and the script with real cells."""

from __future__ import annotations

import copy
import csv
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bkd_hf import InputError, load_classifier, load_processor, load_results
from bkd_hf.arguments import DIGITS_RECIPE, parse_arguments
from bkd_hf.cells import CellRunner, plan_cells
from bkd_hf.compare import save_comparison, to_markdown
from bkd_hf.comparison import Comparison, load_comparison, resampled
from bkd_hf.comparison_plots import plot_comparison
from bkd_hf.errors import TrainingStopped
from bkd_hf.results import describe_command, save_json
from bkd_hf.run_folder import claim_output_dir, record_run
from tests.conftest import REPOSITORY
from tests.faults import main_of, run
from tests.test_plots import make_results
from tests.tiny_models import tiny_vit

RUN_SCRIPT = REPOSITORY / "scripts" / "run_bkd.py"
SHORT = ["--num_train_epochs", "2", "--lr_step_epochs", "1", "--lr_step_factors", "0.1", "--num_threads", "1"]


def metrics_of(accuracy: float) -> dict:
    """Where every class has the same accuracy."""
    names = ["accuracy", "balanced_accuracy", "worst_class_accuracy"]
    names += [f"{group}_shot_accuracy" for group in ("many", "medium", "few")]
    return {**dict.fromkeys(names, accuracy), "per_class_accuracy": [accuracy] * 10}


def cell(method: str, seed: int, accuracy: float, **metrics: float) -> dict:
    results = make_results(10, 130, 2, epochs=1)
    for model in ("teacher", "student"):
        results[model]["metrics"] = metrics_of(accuracy)
    results |= {
        "method": method,
        "seed": seed,
        "options": {
            "model": {},
            "data": {},
            "training": {"method": method, "num_train_epochs": 3},
            "teacher_training": {},
        },
        "hardware": {"device": "CPU", "precision": "fp32", "cpu_threads": 1, "num_processes": 1},
        "versions": {"bkd_hf": "0", "torch": "2", "transformers": "5", "accelerate": "1"},
    }
    results["data"] |= {"fingerprint": "a", "eval_fingerprint": "b"}
    results["student"]["metrics"] |= {"expected_calibration_error": 0.1, **metrics}
    results["student"]["training"] = {"epochs": 3.0, "steps": 3, "seconds": 1.0, "images_per_second": 1.0}
    if method == "ce":
        results["teacher"] = None
    return results


@pytest.fixture
def cells() -> list[dict]:
    return [
        cell("ce", 0, 0.30), cell("ce", 1, 0.32), cell("ce", 2, 0.37),
        cell("bkd", 0, 0.40), cell("bkd", 1, 0.41), cell("bkd", 2, 0.51),
        cell("kd", 0, 0.33),
    ]  # fmt: skip


# ---- Statistics


def test_mean_and_standard_deviation(cells):
    comparison = Comparison(cells)
    assert comparison.methods == ["ce", "kd", "bkd"]
    estimate = comparison.estimate("ce", "overall")
    # (30 + 32 + 37)/3 = 33; deviations −3, −1, 4: √(26/2)
    assert (estimate.mean, estimate.std, estimate.n) == (pytest.approx(33), pytest.approx(13**0.5), 3)
    assert str(estimate) == "33.0 ± 3.6"
    single = comparison.estimate("kd", "overall")
    assert (single.std, str(single)) == (None, "33.0")


def test_classes_of_few_test_images_are_told(cells):
    told = (
        "**2 of 9 classes have fewer than 10 test images**, down to 4: one image moves the accuracy of a class by up"
    )
    for counts, is_told in (([4, 9, 0, *[40] * 7], True), ([40] * 10, False)):
        for each in cells:
            each["data"]["eval_class_counts"] = counts
        assert (told in (markdown := to_markdown(Comparison(cells)))) == is_told
        assert ("25 points" in markdown) == is_told


def test_differences_are_paired_by_seed(cells):
    comparison = Comparison(cells)
    difference = comparison.difference("bkd", "ce", "overall")
    # 10, 9, 14: mean 11, standard deviation √7; t with 2 degrees of freedom at 97.5 % is 4.3027
    half = 4.302652729911275 * (7 / 3) ** 0.5
    assert difference.mean == pytest.approx(11)
    assert (difference.low, difference.high) == (pytest.approx(11 - half), pytest.approx(11 + half))
    assert difference.n == 3
    # Of the seeds that both have: only seed 0.
    to_kd = comparison.difference("bkd", "kd", "overall")
    assert (to_kd.mean, to_kd.n) == (pytest.approx(7), 1)
    assert comparison.difference("bkd", "focal", "overall") is None


def test_two_seeds_that_agree_are_not_bold(cells):
    two = [cell("ce", 0, 0.30), cell("ce", 1, 0.32), cell("bkd", 0, 0.355), cell("bkd", 1, 0.375)]
    markdown = to_markdown(Comparison(two))
    assert "| bkd | 2 | +5.5 [+5.5, +5.5] |" in markdown
    assert "Bold: the interval leaves out 0, and n ≥ 3." in markdown


def test_one_seed_is_resampled_over_test_images(cells):
    images = [40] * 10
    for results in cells:
        results["data"]["eval_class_counts"] = images
    difference = Comparison(cells).difference("bkd", "kd", "overall")
    half = 196 * ((0.4 * 0.6 + 0.33 * 0.67) / 400) ** 0.5  # two independent binomials, as normal
    assert difference.low == pytest.approx(7 - half, abs=0.6)
    assert difference.high == pytest.approx(7 + half, abs=0.6)
    assert str(difference).startswith("+7.0 [")  # which no single seed makes clear
    assert str(difference).endswith("]*")
    markdown = to_markdown(Comparison(cells))
    assert (
        "One seed: the interval is of a bootstrap over the test images" in markdown.split("## Differences to `kd`")[1]
    )
    assert "One seed" not in markdown.split("## Differences to `ce`")[1].split("| bkd |")[1].split("## ")[0]
    assert Comparison(cells).difference("bkd", "kd", "ECE").low is None  # which is of no images one by one
    # Of a group of classes it is the mean of their accuracies, as in the table.
    rare = resampled(cells[6], "few_shot_accuracy")
    assert (rare.mean(), len(rare)) == (pytest.approx(0.33, abs=0.02), 2000)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_the_interval_of_one_seed_holds_with_few_test_images_of_a_class(images):
    """Of two equally good models, it contains 0 about 95 times of 100."""
    rng, num_classes, found = np.random.default_rng(0), 100, []
    for _ in range(100):
        chances = rng.uniform(0.2, 0.8, num_classes)
        drawn = []
        for side in range(2):
            results = cell("bkd", 0, 0.5)
            results["data"] |= {"eval_class_counts": [images] * num_classes, "class_counts": [10] * num_classes}
            rates = rng.binomial(images, chances) / images
            results["student"]["metrics"]["per_class_accuracy"] = rates.tolist()
            drawn.append(resampled(results, "accuracy", seed=side, repetitions=400))
        low, high = np.quantile(drawn[0] - drawn[1], [0.025, 0.975])
        found.append(low <= 0 <= high)
    assert np.mean(found) > 0.88


def test_methods_are_sorted_by_a_metric(cells):
    cells[6]["student"]["metrics"]["expected_calibration_error"] = 0.01
    assert Comparison(cells, sort="few").methods == ["bkd", "ce", "kd"]
    assert Comparison(cells, sort="ECE").methods[0] == "kd"


def test_metrics_that_no_cell_has_are_no_columns(cells):
    for results in cells:
        del results["student"]["metrics"]["few_shot_accuracy"]
    markdown = to_markdown(Comparison(cells))
    assert "| few |" not in markdown
    assert "| many |" in markdown


def test_results_of_an_earlier_version_are_refused(cells):
    del cells[1]["method"]
    with pytest.raises(InputError, match="second does not tell its method"):
        Comparison(cells[:2], ["first", "second"])


def test_cells_of_other_images_are_refused(cells):
    cells[3]["data"]["fingerprint"] = "another split"
    with pytest.raises(InputError, match=r"first.* and fourth are of different examples"):
        Comparison(cells, ["first", "second", "third", "fourth", "fifth", "sixth", "seventh"])


def test_the_same_cell_twice_is_refused(cells):
    other = cell("ce", 0, 0.5)
    with pytest.raises(InputError, match="here and there are both ce with seed 0"):
        Comparison([cells[0], other], ["here", "there"])
    # The same run, found twice (each comparison has its own copy of a teacher), counts once.
    assert Comparison([cells[0], copy.deepcopy(cells[0])]).num_seeds("ce") == 1


@pytest.mark.parametrize("name", ["num_train_epochs", "teacher"])
def test_seeds_of_a_method_with_other_options_have_no_mean(cells, name):
    if name == "teacher":
        cells[4]["teacher"]["method"] = "balanced-softmax"
        message = (
            "The seeds of bkd were not run with the same options.*`method of the teacher` is None or balanced-softmax"
        )
    else:
        cells[4]["options"]["training"][name] = 30
        message = "`num_train_epochs` is 3 or 30"
    with pytest.raises(InputError, match=message):
        Comparison(cells)


def test_an_option_that_is_not_recorded_has_its_default():
    old, new = cell("bkd", 0, 0.40), cell("bkd", 1, 0.41)
    new["options"]["training"]["precision"] = "auto"  # which there was not when the other was run
    assert Comparison([old, new]).estimate("bkd", "overall").n == 2
    new["options"]["training"]["head_bias"] = "learned"  # what the method says, where nothing was said
    assert Comparison([old, new]).num_seeds("bkd") == 2
    # `auto` is recorded where it took the class counts; where it measured, `teacher` is.
    old["options"]["training"]["distillation_prior"] = "counts"
    new["options"]["training"]["distillation_prior"] = "auto"
    assert Comparison([old, new]).num_seeds("bkd") == 2
    new["options"]["training"]["precision"] = "fp32"
    with pytest.raises(InputError, match="`precision` is auto or fp32"):
        Comparison([old, new])


def test_the_place_of_the_work_is_no_other_option(cells):
    places = (
        {"teacher_cache": "/scratch/1"},
        {"teacher_cache": "/scratch/2", "use_cpu": True},
        {"teacher_cache": "auto"},
    )
    for results, options in zip(cells, places, strict=False):
        results["options"]["training"] |= options
    Comparison(cells)
    cells[0]["options"]["training"]["teacher_cache"] = "off"
    with pytest.raises(InputError, match="`teacher_cache` is off or on"):
        Comparison(cells)


def test_other_options_are_pointed_out(cells):
    cells[6]["options"]["training"] |= {"num_train_epochs": 30, "disable_tqdm": True}
    markdown = to_markdown(Comparison(cells))
    assert "**Not all methods were run with the same options**: `num_train_epochs` is 3 or 30.\n" in markdown
    cells[6]["options"]["training"] = {"method": "kd", "temperature": 4.0, "num_train_epochs": 3}
    assert "Not all methods" not in to_markdown(Comparison(cells))


def test_post_hoc_adjustment_is_not_applied_twice(cells):
    for results in cells:
        results["student"]["post_hoc_metrics"] = {"tau": 1.0, **results["student"]["metrics"]}
        distils = results["method"] if results["method"] != "ce" else "none"
        results["options"]["training"] |= {"classification_loss": "cross_entropy", "distillation_loss": distils}
    adjusted = to_markdown(Comparison(cells)).split("## After post-hoc")[1]
    assert "| ce |" in adjusted
    assert "| kd |" in adjusted
    assert "| bkd |" not in adjusted


def test_files(cells, tmp_path):
    for number, results in enumerate(cells):
        results["student"]["post_hoc_metrics"] = {"tau": 1.0, **metrics_of(0.5)}
        (tmp_path / "in" / str(number)).mkdir(parents=True)
        save_json(results, tmp_path / "in" / str(number) / "results.json")
    comparison = load_comparison([tmp_path / "in"])
    paths = save_comparison(comparison, tmp_path / "out", ["**Missing**: dkd seed 0"])
    names = [
        "comparison.md",
        "comparison.csv",
        "cells.csv",
        "comparison.png",
        "teacher_and_student.png",
        "leaderboard.png",
    ]
    assert [path.name for path in paths] == names
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    assert "| ce | 3 | 33.0 ± 3.6 |" in markdown
    assert "## Differences to `ce`" in markdown
    assert "| bkd | 3 | **+11.0** [+4.4, +17.6] |" in markdown
    assert "## After post-hoc logit adjustment (τ = 1)" in markdown
    assert markdown.index("**Missing**: dkd seed 0") < markdown.index("| ce |")
    rows = list(csv.DictReader((tmp_path / "out" / "comparison.csv").open()))
    row = next(row for row in rows if (row["method"], row["metric"]) == ("bkd", "overall"))
    assert (float(row["mean"]), float(row["difference_to_ce_mean"]), row["n"]) == (44.0, 11.0, "3")
    assert float(row["post_hoc_mean"]) == 50.0
    assert next(row for row in rows if row["method"] == "kd")["std"] == ""
    assert {row["difference_to_kd_mean"] for row in rows if row["method"] == "kd"} == {""}  # from itself
    assert len(list(csv.DictReader((tmp_path / "out" / "cells.csv").open()))) == 7
    for name in names[3:]:
        assert Image.open(tmp_path / "out" / name).size[0] >= 600


def test_equal_numbers_are_equal_options_and_teachers_have_options_too():
    whole, fraction, other = (cell("bkd", seed, 0.5) for seed in range(3))
    whole["options"]["training"]["num_train_epochs"] = 60
    fraction["options"]["training"]["num_train_epochs"] = 60.0
    assert Comparison([whole, fraction]).estimate("bkd", "overall").n == 2
    other["options"]["training"]["num_train_epochs"] = 60
    other["options"]["teacher_training"] = {"num_train_epochs": 300.0}
    for results in (whole, other):
        results["teacher"]["training"] = whole["student"]["training"]
    with pytest.raises(InputError, match="`teacher_num_train_epochs` is 300 or 60"):
        Comparison([whole, other])
    other["options"] |= {"teacher_training": {}, "teacher_model": {"image_size": 64}}
    with pytest.raises(InputError, match="`teacher_image_size` is 64 or None"):
        Comparison([whole, other])


def test_a_shared_teacher_is_trained_as_a_run_trains_it(tmp_path):
    """Alone, it would have the defaults of its own weights, and its students' loss."""
    tiny_vit(0, num_labels=10, image_size=16).save_pretrained(tmp_path / "vit")
    options = [
        "--dataset_name", "digits", "--model_name_or_path", str(tmp_path / "vit"), "--learning_rate", "1e-4",
        "--classification_loss", "balanced_softmax", "--teacher_model_name_or_path", "cifar-resnet-8",
    ]  # fmt: skip
    (cell,) = (each for each in plan_cells(["kd"], [0], tmp_path, RUN_SCRIPT, options) if each.method == "kd")
    assert cell.teacher.parse().model.image_size == 32  # of fresh weights; the demo of digits has 16
    teacher = cell.teacher.parse().training
    expected = parse_arguments([*options, "--method", "kd"], digits_recipe=DIGITS_RECIPE).for_teacher().training
    for name in ("optim", "learning_rate", "num_train_epochs", "classification_loss", "per_device_train_batch_size"):
        assert getattr(teacher, name) == getattr(expected, name), name
    with pytest.raises(InputError, match="--teacher_seed cannot be set for a comparison"):
        plan_cells(["kd"], [0], tmp_path, RUN_SCRIPT, [*options, "--teacher_seed", "7"])


def test_a_shared_teacher_has_the_precision_of_its_students(tmp_path, monkeypatch):
    """Also when it has been found by a measurement, and the comparison goes on after that."""
    monkeypatch.setattr("bkd_hf.arguments.default_precision", lambda _: "bf16")
    options = ["--teacher_learning_rate", "0.01"]

    def plan() -> tuple[str, ...]:
        return plan_cells(["kd"], [0], tmp_path, RUN_SCRIPT, options)[0].options

    first, teacher = plan(), tmp_path / "shared_teachers" / "ce" / "seed0"
    teacher.mkdir(parents=True)
    save_json({"training": {"bf16": False}}, teacher / "bkd_run.json")
    assert plan() == first


def test_a_teacher_is_fine_tuned_in_the_size_that_is_told(tmp_path):
    load_classifier("cifar-resnet-8", ["cat", "dog"], image_size=16).save_pretrained(tmp_path / "pets")
    load_processor("cifar-resnet-8", image_size=16).save_pretrained(tmp_path / "pets")
    options = ["--teacher_model_name_or_path", str(tmp_path / "pets"), "--image_size", "32"]
    with pytest.raises(InputError, match=r"--image_size 32 is for the students: .* by --teacher_image_size"):
        plan_cells(["kd"], [0], tmp_path / "out", RUN_SCRIPT, options)
    (teacher, _) = plan_cells(["kd"], [0], tmp_path / "out", RUN_SCRIPT, [*options, "--teacher_image_size", "16"])
    assert teacher.parse().model.image_size == 16


def test_only_what_was_compared_is_called_better(cells):
    alone = to_markdown(Comparison([cell("ce", 0, 0.9), cell("bkd", 1, 0.3)]))
    assert "## Differences" not in alone  # there are none
    assert alone.rstrip().endswith("No method was run with a seed of `ce`.")
    assert "`ce`, which was not adjusted, in the mean over the same seeds" in to_markdown(Comparison(cells))
    for results in cells:
        results["student"]["post_hoc_metrics"] = {"tau": 1.0, **metrics_of(0.31)}
    told = to_markdown(Comparison([*cells, cell("dkd", 7, 0.9)]))
    assert "`kd`, `bkd` are better overall than `ce`, as it is and after post-hoc adjustment, in the mean" in told


def test_the_best_checkpoint_is_not_called_the_last(cells):
    assert "last epoch, never the best on the test set" in to_markdown(Comparison(cells))
    for results in cells:
        results["options"]["training"]["load_best_model_at_end"] = True
    told = to_markdown(Comparison(cells))
    assert "the checkpoint that was best on these test examples, which flatters the numbers" in told
    assert "never the best" not in told


def test_a_runs_own_teacher_is_no_cell(cells, tmp_path):
    for name, results in (("a", cells[3]), ("b", cells[6])):
        for folder, content in ((tmp_path / name, results), (tmp_path / name / "teacher", cell("ce", 0, 0.2))):
            folder.mkdir()
            save_json(content, folder / "results.json")
    assert load_comparison([tmp_path]).methods == ["kd", "bkd"]
    assert load_comparison([tmp_path / "a", tmp_path / "b" / "teacher"]).methods == ["ce", "bkd"]


def test_the_teacher_of_an_unfinished_run_is_no_cell(cells, tmp_path):
    (tmp_path / "bkd" / "teacher").mkdir(parents=True)
    (tmp_path / "kd").mkdir()
    save_json(cells[6], tmp_path / "kd" / "results.json")
    save_json(cell("ce", 0, 0.2), tmp_path / "bkd" / "teacher" / "results.json")
    (tmp_path / "bkd" / "bkd_run.json").write_text("{}")
    assert load_comparison([tmp_path]).methods == ["kd"]


def test_results_without_fingerprints_are_compared_by_their_classes(cells):
    for number, results in enumerate(cells[:2]):
        results["data"] |= {
            "fingerprint": None,
            "eval_fingerprint": None,
            "class_names": [f"{number}{i}" for i in range(10)],
        }
    with pytest.raises(InputError, match="are of different examples"):
        Comparison(cells[:2])


def test_what_a_recipe_may_not_set(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for line, message in (
        ("push_to_hub: true", "push_to_hub in the recipe cannot"),
        ("max_steps: 5", "max_steps in the"),
        ("teacher:\n  seed: 5", "teacher_seed in the recipe cannot"),
    ):
        recipe.write_text(f"dataset_name: digits\nmodel_name_or_path: cifar-resnet-8\n{line}\n")
        with pytest.raises(InputError, match=message):
            plan_cells(["kd"], [0], tmp_path, RUN_SCRIPT, ["--config", str(recipe)])
    recipe.write_text("dataset_name: digits\nmethod: bkd\nseed: 3\npush_to_hub: false\n")
    assert len(plan_cells(["ce"], [0], tmp_path, RUN_SCRIPT, ["--config", str(recipe)])) == 1


def test_options_that_changed_the_baseline_are_told():
    cells = [cell("ce", 0, 0.3), cell("bkd", 0, 0.4)]
    for results in cells:
        results["method"] += " (head_bias balanced)"
    assert "no plain `ce` to compare with: `ce (head_bias balanced)`" in to_markdown(Comparison(cells))


def test_axes_end_where_accuracies_do(cells):
    for cell in cells:
        cell["student"]["metrics"]["worst_class_accuracy"] = 0.0
    for number, accuracy in enumerate([1.0, 1.0, 0.9]):
        cells[number]["student"]["metrics"]["accuracy"] = accuracy  # 96.7 ± 5.8
    for axes in plot_comparison(Comparison(cells)).axes:
        low, high = axes.get_xlim()
        assert 0 <= low < high <= 100
        for container in axes.containers:
            x = np.concatenate([line.get_xdata() for line in container[1]] or [[low]])
            assert low <= x.min() <= x.max() <= high


def test_no_figure_of_teachers_without_teachers(cells, tmp_path):
    paths = save_comparison(Comparison(cells[:3]), tmp_path)
    assert [path.name for path in paths if path.suffix == ".png"] == ["comparison.png", "leaderboard.png"]


# ---- The plan


def test_teachers_are_planned_before_their_students(tmp_path):
    cells = plan_cells(["bkd", "dive"], [3, 4], tmp_path, RUN_SCRIPT, ["--bf16", "true"])
    assert [cell.name for cell in cells] == [
        f"{method} seed {seed}" for seed in (3, 4) for method in ("ce", "bkd", "balanced-softmax", "dive")
    ]
    teachers = {cell.name: cell.teacher.name if cell.teacher else None for cell in cells}
    assert teachers["bkd seed 3"] == "ce seed 3"
    assert teachers["dive seed 4"] == "balanced-softmax seed 4"
    arguments = cells[1].parse()
    assert arguments.model.teacher_model_name_or_path == str(tmp_path / "ce" / "seed3")
    assert (arguments.training.method, arguments.training.seed, arguments.training.bf16) == ("bkd", 3, True)


@pytest.fixture(scope="module")
def given_teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("given")
    load_classifier("cifar-resnet-8", [str(digit) for digit in range(10)], image_size=16).save_pretrained(folder)
    load_processor("cifar-resnet-8", image_size=16).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("options", "teacher", "told"),
    [
        (["--teacher_model_name_or_path", "GIVEN"], None, {}),
        (["--teacher_model_name_or_path", "GIVEN", "--finetune_teacher"], "teacher ce seed 3", {"model": "GIVEN"}),
        (["--teacher_model_name_or_path", "cifar-resnet-56"], "teacher ce seed 3", {"model": "cifar-resnet-56"}),
        (["--teacher_num_train_epochs", "7"], "teacher ce seed 3", {"epochs": 7}),
        (["--teacher_lr_step_epochs", "1", "4"], "teacher ce seed 3", {"steps": [1, 4]}),
        (["--teacher_method", "focal"], "focal seed 3", {"method": "focal"}),
    ],
)
def test_teachers_as_they_are_asked_for(tmp_path, given_teacher, options, teacher, told):
    options = [given_teacher if word == "GIVEN" else word for word in options]
    cells = plan_cells(["ce", "kd"], [3], tmp_path, RUN_SCRIPT, options)
    kd = next(cell for cell in cells if cell.method == "kd")
    assert (kd.teacher.name if kd.teacher else None) == teacher
    assert kd.parse().model.teacher_model_name_or_path == (str(kd.teacher.folder) if teacher else given_teacher)
    assert not kd.parse().model.finetune_teacher
    assert (tmp_path / "ce" / "seed3") in [cell.folder for cell in cells if not cell.is_teacher]
    if teacher:
        found, model = kd.teacher.parse().training, kd.teacher.parse().model.model_name_or_path
        model = "GIVEN" if model == given_teacher else model
        seen = {
            "model": model,
            "epochs": found.num_train_epochs,
            "steps": found.lr_step_epochs,
            "method": found.method,
        }
        assert {name: seen[name] for name in told} == told


def test_a_teacher_for_other_classes_is_trained_once_a_seed(tmp_path):
    load_classifier("cifar-resnet-8", ["cat", "dog"], image_size=16).save_pretrained(tmp_path / "pets")
    load_processor("cifar-resnet-8", image_size=16).save_pretrained(tmp_path / "pets")
    options = ["--teacher_model_name_or_path", str(tmp_path / "pets")]
    cells = plan_cells(["kd", "bkd"], [0, 1], tmp_path / "out", RUN_SCRIPT, options)
    assert [cell.name for cell in cells if cell.is_teacher] == ["teacher ce seed 0", "teacher ce seed 1"]


def test_streams_are_compared_by_their_steps(tmp_path):
    options = ["--dataset_name", "shards", "--streaming", "true", "--class_counts", "counts.json", "--max_steps", "5"]
    cells = plan_cells(["ce", "kd"], [0], tmp_path, RUN_SCRIPT, options)
    assert [cell.parse().training.max_steps for cell in cells] == [5, 5]


def test_secrets_and_folders_are_told_to_nobody(cells, tmp_path, monkeypatch):
    secret, place = "hf_" + "x" * 30, str(tmp_path / "private")
    options = ["--hub_token", secret, f"--token={secret}", "--hub-token", secret, "--dataset_name", place]
    (cell,) = plan_cells(["ce"], [0], tmp_path / "out", RUN_SCRIPT, options)
    (tmp_path / "results").mkdir()
    save_json(cells[0], tmp_path / "results" / "results.json")
    words = ["--from", str(tmp_path / "results"), f"--output_dir={tmp_path}/tables"]
    monkeypatch.setattr(sys, "argv", ["scripts/compare.py", *words])
    assert main_of("compare.py")() == 0
    page = (tmp_path / "tables" / "comparison.md").read_text(encoding="utf-8")
    assert "Made by `python scripts/compare.py --from results --output_dir=tables`." in page
    command = describe_command([*words, *options], called_by=["python", "scripts/compare.py"])
    for told in (cell.command(), command, page):
        assert secret not in told
        assert str(tmp_path) not in told
    assert "--dataset_name …/private" in cell.command().replace("'", "")


@pytest.mark.parametrize(
    ("methods", "seeds", "options", "message"),
    [
        (["bdk"], [0], [], "--methods: there is no bdk"),
        (["ce", "ce"], [0], [], "--methods ce ce: each may be given once"),
        (["ce"], [0, 0], [], "--seeds 0 0"),
        (["ce"], [0], ["--seed", "3"], "--seed cannot be set for a comparison: use --seeds"),
        (["ce"], [0], ["--method=kd"], "--method cannot be set"),
        (["ce"], [0], ["--max_steps", "5"], "--max_steps cannot be set for a comparison: use --num_train_epochs"),
        (["ce"], [0], ["--teacher_learning_rate", "1"], "--teacher_learning_rate: none of --methods ce has"),
        (
            ["ce", "kd"],
            [0],
            ["--teacher_method", "bkd"],
            "--teacher_method bkd: a teacher is trained without a teacher",
        ),
    ],
)
def test_bad_plans(tmp_path, methods, seeds, options, message):
    with pytest.raises(InputError, match=message):
        plan_cells(methods, seeds, tmp_path, RUN_SCRIPT, options)


# ---- The runner, with a stand-in for run_bkd.py that takes no time


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """Fails for some methods, is stopped for another; notes when it ran."""
    script = tmp_path / "script" / "run.py"
    shutil.copytree(REPOSITORY / "scripts" / "recipes", script.with_name("recipes"))
    script.write_text(
        textwrap.dedent(f"""
        import json, shutil, sys, time
        from pathlib import Path
        option = lambda name: sys.argv[sys.argv.index(name) + 1]
        folder = Path(option("--output_dir"))
        if option("--method") in {{"focal", "balanced-softmax", "ltkd"}}:
            print("error: no such luck")
            sys.exit(3)
        if option("--method") == "wsl":
            print("stopped: the same command continues", file=sys.stderr)
            sys.exit(75)
        started = time.time()
        time.sleep(1.5)
        folder.mkdir(parents=True)
        shutil.copy({str(tmp_path / "results.json")!r}, folder)
        (folder / "times").write_text(f"{{started}} {{time.time()}}")
        (folder / "bkd_run.json").write_text("{{}}")
        """)
    )
    save_json(cell("ce", 0, 0.3), tmp_path / "results.json")
    return script


def test_a_failed_cell_does_not_stop_the_others_but_its_students(tmp_path, stand_in):
    said: list[str] = []
    cells = plan_cells(["focal", "dive", "kd"], [0], tmp_path / "out", stand_in)
    failures = CellRunner(logs=tmp_path / "logs", say=said.append).run(cells)
    assert [line.split(":")[0] for line in failures] == ["focal seed 0", "balanced-softmax seed 0", "dive seed 0"]
    assert "error: no such luck" in failures[0]
    assert "not run, as its teacher (balanced-softmax seed 0) failed" in failures[2]
    assert (tmp_path / "out" / "kd" / "seed0" / "results.json").exists()
    assert any(line.startswith("[5/5]") or line.startswith("[4/5]") for line in said)


def test_the_cause_of_a_failure_is_that_of_its_last_attempt(tmp_path, stand_in):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "focal-seed0.log").write_text("error: an earlier one\n")
    print_more = "; print('traceback : see errors.html'); sys.exit(3)"
    stand_in.write_text(stand_in.read_text().replace("\n    sys.exit(3)", print_more, 1))
    runner = CellRunner(logs=tmp_path / "logs", say=lambda _: None)
    (failure,) = runner.run(plan_cells(["focal"], [0], tmp_path / "out", stand_in))
    assert "failed: error: no such luck (exit code 3" in failure
    stand_in.write_text("print('Killed'); raise SystemExit(3)")
    (failure,) = runner.run(plan_cells(["focal"], [0], tmp_path / "out", stand_in))
    assert "failed: Killed (exit code 3" in failure


def test_jobs_run_at_the_same_time_and_after_their_teachers(tmp_path, stand_in):
    cells = plan_cells(["ce", "kd", "bkd", "dkd"], [0], tmp_path / "out", stand_in)
    assert CellRunner(logs=tmp_path / "logs", jobs=3, say=lambda _: None).run(cells) == []
    times = {cell.method: [float(t) for t in (cell.folder / "times").read_text().split()] for cell in cells}
    students = [times[method] for method in ("kd", "bkd", "dkd")]
    assert all(start >= times["ce"][1] for start, _ in students)
    assert max(start for start, _ in students) < min(end for _, end in students)


@pytest.mark.parametrize("launcher", [(), ("sh", "-c", '"$@" || exit 1', "sh", sys.executable)], ids=["75", "1"])
def test_a_stopped_cell_stops_the_comparison(tmp_path, stand_in, launcher):
    """Launchers have exit codes of their own."""
    said: list[str] = []
    cells = plan_cells(["ce", "wsl", "kd"], [0], tmp_path / "out", stand_in)
    with pytest.raises(TrainingStopped):
        CellRunner(tmp_path / "logs", launcher, say=said.append).run(cells)
    assert said[-1] == "Stopped: wsl seed 0. 1 of 3 cells are finished: ce seed 0."
    assert not (tmp_path / "out" / "kd").exists()
    # What a cell said when it was begun the last time is not said now.
    failing = plan_cells(["focal"], [0], tmp_path / "out", stand_in)
    (tmp_path / "logs" / "focal-seed0.log").write_text("stopped: then\n")
    assert len(CellRunner(tmp_path / "logs", launcher, say=said.append).run(failing)) == 1


# ---- The script, with real cells


def compare(*options: object, expected: int = 0) -> str:
    code, output = run(*options, script="compare.py")
    assert code == expected, output
    return output


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "out"
    output = compare("--methods", "bkd", "--seeds", 0, 1, "--jobs", 2, "--output_dir", folder, *SHORT)
    assert "[4/4]" in output
    assert "## Differences to `ce`" in output
    return folder


@pytest.mark.slow
def test_cells_share_the_split_and_a_seed_its_teacher(compared):
    results = {(m, s): load_results(compared / m / f"seed{s}") for m in ("ce", "bkd") for s in (0, 1)}
    assert len({r["data"]["fingerprint"] for r in results.values()}) == 1
    for seed in (0, 1):
        assert results["bkd", seed]["teacher"]["metrics"] == results["ce", seed]["student"]["metrics"]
        assert results["ce", seed]["teacher"] is None
    assert results["ce", 0]["student"]["metrics"] != results["ce", 1]["student"]["metrics"]


@pytest.mark.slow
def test_finished_cells_are_skipped_and_interrupted_ones_resume(compared, tmp_path):
    folder = Path(shutil.copytree(compared, tmp_path / "out"))
    # The teacher's path is an option of a cell: the copy stands for the folder itself.
    shutil.rmtree(compared)
    shutil.copytree(folder, compared)
    (compared / "bkd" / "seed1" / "results.json").unlink()
    before = (compared / "ce" / "seed0" / "results.json").stat().st_mtime_ns
    output = compare("--methods", "bkd", "--seeds", 0, 1, "--jobs", 2, "--output_dir", compared, *SHORT)
    assert output.count("finished before.") == 3
    assert "bkd seed 1 continues" in output
    assert "Continuing from checkpoint-22" in (compared / "logs" / "bkd-seed1.log").read_text()
    assert (compared / "ce" / "seed0" / "results.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_tables_from_results_alone(compared, tmp_path):
    for path in compared.rglob("results.json"):
        target = tmp_path / "in" / path.relative_to(compared)
        target.parent.mkdir(parents=True)
        shutil.copy(path, target)
    compare("--from", tmp_path / "in" / "ce" / "seed0" / "results.json")  # the tables go beside the file
    assert (tmp_path / "in" / "ce" / "seed0" / "comparison.md").exists()
    output = compare("--from", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert "| bkd | 2 |" in output
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    tables = [
        text[text.index("| method") : text.index("![")]
        for text in (markdown, (compared / "comparison.md").read_text())
    ]
    assert tables[0] == tables[1]
    assert "Made by `python " in markdown


@pytest.mark.slow
def test_dry_run_tells_what_will_run_and_how_long(compared):
    output = compare("--methods", "ce", "kd", "--seeds", 0, "--output_dir", compared, "--dry_run", *SHORT)
    lines = [line for line in output.splitlines() if not line.startswith("warning: ")]
    assert lines[0].startswith("finished")
    assert "--method ce --seed 0" in lines[0]
    assert lines[1].startswith("new")
    assert "--teacher_model_name_or_path '…/seed0'" in lines[1]  # the folder is none below this one
    assert "kd seed 0: about" in output
    assert not (compared / "kd").exists()


@pytest.mark.slow
def test_dry_run_needs_no_good_teacher(tmp_path):
    """The one that it trains for a few steps guesses."""
    options = ["--methods", "bkd", "--seeds", 0, "--learning_rate", "1e-9", *SHORT]
    assert "bkd seed 0: about" in compare(*options, "--output_dir", tmp_path / "out", "--dry_run")


@pytest.mark.slow
def test_other_methods_join_the_table_and_unused_options_do_not_matter(compared):
    # --temperature means nothing to ce, whose finished cells stay what they are.
    output = compare(
        "--methods", "kd", "--seeds", 0, "--output_dir", compared, *SHORT, "--temperature", "4"
    )  # fmt: skip
    assert "ce seed 0: finished before." in output
    assert "| kd (temperature 4) | 1 |" in output
    assert "| bkd | 2 |" in output
    shutil.rmtree(compared / "kd")


@pytest.mark.slow
def test_methods_share_a_teacher_of_its_own(tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "dataset_name: digits\nmodel_name_or_path: cifar-resnet-8\nimage_size: 16\nnum_train_epochs: 1\n"
        "optim: adamw_torch\n"
        "imbalance_ratio: 65\nteacher:\n  model_name_or_path: cifar-resnet-14\n  num_train_epochs: 2\n"
    )
    options = ["--seeds", 0, "--config", config, "--force_distillation", "--num_threads", 1]
    output = compare("--methods", "kd", "--output_dir", tmp_path / "out", *options)
    assert "| kd | 1 |" in output
    assert "Not all methods were run with the same options" not in output
    shared = load_results(tmp_path / "out" / "shared_teachers" / "ce" / "seed0")["student"]
    assert (shared["model"], shared["training"]["epochs"]) == ("cifar-resnet-14", 2)
    results = load_results(tmp_path / "out" / "kd" / "seed0")
    assert (results["student"]["model"], results["teacher"]["metrics"]) == ("cifar-resnet-8", shared["metrics"])
    again = compare("--methods", "kd", "--output_dir", tmp_path / "out", *options, "--dry_run")
    assert [line.split()[0] for line in again.splitlines()[:2]] == ["finished"] * 2


def test_exit_code_and_message_tell_of_a_failure(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr("bkd_hf.commands.compare.script_of", lambda command: stand_in)  # also in the forked process
    output = compare("--methods", "focal", "ce", "--seeds", 0, "--output_dir", tmp_path / "out", *SHORT, expected=1)
    assert "focal seed 0 failed: error: no such luck (exit code 3" in output
    assert "| ce | 1 |" in output
    assert "**Missing**: focal seed 0" in (tmp_path / "out" / "comparison.md").read_text()
    # A shared teacher alone makes no table.
    alone = ("--seeds", 0, "--output_dir", tmp_path / "alone", *SHORT, "--teacher_num_train_epochs", 2)
    assert "error: ltkd seed 0" in compare("--methods", "ltkd", *alone, expected=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "ce"], "--output_dir is needed"),
        (["--output_dir", "x", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--output_dir", "x", "--temprature", "2"], "unrecognized arguments: --temprature"),
        (["--output_dir", "x", "--temperature", "0"], "--temperature must be a finite number > 0"),
        (["--from", "nowhere"], "There is no results.json in nowhere"),
        (["--from", "nowhere", "--bf16"], "--bf16: with --from nothing is run"),
        (["--from", "nowhere", "--methods", "ce"], "--methods: with --from nothing is run"),
        (["--from", "nowhere", "--dry_run"], "--dry_run: with --from nothing is run"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", *options])
    assert main_of("compare.py")() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "x").exists()


def test_other_options_than_those_of_finished_seeds_are_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    (earlier,) = plan_cells(["ce"], [0], tmp_path / "out", RUN_SCRIPT, SHORT)
    claim_output_dir(arguments := earlier.parse())
    record_run(arguments, {})
    save_json(cell("ce", 0, 0.3), earlier.folder / "results.json")
    ran: list[list[str]] = []
    failed = ["x: failed"]
    monkeypatch.setattr(CellRunner, "run", lambda _, cells: ran.append([cell.name for cell in cells]) or failed)
    argv = ["compare.py", "--methods", "ce", "--seeds", "1", "--output_dir", str(tmp_path / "out"), *SHORT]
    monkeypatch.setattr(sys, "argv", [*argv, "--momentum", "0.5"])
    assert main_of("compare.py")() == 2
    assert "--momentum is 0.9 there, 0.5 here" in capsys.readouterr().err
    assert not ran
    monkeypatch.setattr(sys, "argv", argv)
    assert main_of("compare.py")() == 1
    assert ran == [["ce seed 1"]]
    assert "error: x: failed" in capsys.readouterr().err
