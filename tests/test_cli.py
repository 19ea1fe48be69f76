"""The real command line, in real processes."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import bkd_hf
from bkd_hf import InputError, load_classifier, load_processor, load_results
from bkd_hf.arguments import parse_arguments
from bkd_hf.card import to_recipe
from bkd_hf.run import run as run_bkd
from tests import faults
from tests.conftest import REPOSITORY

SCRIPT = str(REPOSITORY / "scripts" / "run_bkd.py")
RECIPE = REPOSITORY / "scripts" / "recipes" / "digits.yaml"
SHORT = ["--num_train_epochs", "4", "--lr_step_epochs", "2", "3", "--save_strategy", "epoch", "--disable_tqdm", "true"]
QUICK = [*SHORT, "--num_threads", "1"]
ENVIRONMENT = {**os.environ, "COLUMNS": "120"}


def run(*options: str, launcher: tuple[str, ...] = ()) -> str:
    """Run the script to its end; without a launcher in a process forked from this one, with a single thread.

    The threads that this one has computed with are not there after a fork, and would be waited for.
    """
    if launcher:
        words = [*launcher, SCRIPT, *options]
        process = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=280)
        code, output = process.returncode, process.stdout + process.stderr
    else:
        code, output = faults.run(*options, "--num_threads", "1")
    assert code == 0, output
    return output


def refused(*options: str) -> str:
    """The error of the same path without a new process."""
    with pytest.raises(InputError) as error:
        run_bkd(parse_arguments(options, digits_recipe=RECIPE))
    return str(error.value)


@pytest.fixture
def run_here(capsys):
    """The same path as `run`, without a new process; returns what is printed, and the warnings."""

    def run_here(*options: str) -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run_bkd(parse_arguments(options, digits_recipe=RECIPE))
        return capsys.readouterr().out + "\n".join(str(warning.message) for warning in caught)

    return run_here


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    output = run(*SHORT, "--output_dir", str(folder), launcher=("accelerate", "launch", "--num_processes", "1"))
    for expected in ("Data", "Teacher", "Student", "Results", "few-shot", "worst class"):
        assert expected in output
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# ---- What a run leaves


def test_results(finished):
    results = load_results(finished)
    counts = results["data"]["class_counts"]
    assert counts == [130, 81, 51, 32, 20, 12, 8, 5, 3, 2]
    assert results["data"]["eval_class_counts"] == [40] * 10
    for model in ("teacher", "student"):
        metrics = results[model]["metrics"]
        assert len(metrics["per_class_accuracy"]) == 10
        assert metrics["accuracy"] == pytest.approx(np.mean(metrics["per_class_accuracy"]))
        assert metrics["few_shot_accuracy"] == pytest.approx(np.mean(metrics["per_class_accuracy"][5:]))
        wrong = sum(count for _, _, count in results[model]["confusions"])
        assert wrong == round((1 - metrics["accuracy"]) * 400)
        assert results[model]["training"]["steps"] == 4 * 11
        assert results[model]["training"]["images_per_second"] > 0
        assert [entry["epoch"] for entry in results[model]["history"] if "loss" in entry] == [1, 2, 3, 4]
    assert "kd_loss" in results["student"]["history"][0]
    assert "kd_loss" not in results["teacher"]["history"][0]
    assert results["options"]["training"]["temperature"] == 2.0
    assert results["seed"] == 42
    assert results["hardware"]["num_processes"] == 1
    assert results["hardware"]["cpu_threads"] == len(os.sched_getaffinity(0))  # accelerate launch alone leaves 1


def test_results_tell_nothing_of_the_machine(finished):
    text = (finished / "results.json").read_text()
    assert str(finished.parent) not in text
    assert str(Path.home()) + "/" not in text
    assert getpass.getuser() not in json.loads(text)["options"]["data"].values()
    assert '"/' not in text  # no value begins like an absolute path


def test_folder_is_one_that_transformers_understands(finished, tmp_path):
    for file in ("model.safetensors", "config.json", "preprocessor_config.json", "trainer_state.json",
                 "all_results.json", "train_results.json", "eval_results.json"):  # fmt: skip
        assert (finished / file).exists(), file
    for figure in ("class_accuracy", "training_curves", "confusion_student"):
        assert Image.open(finished / "figures" / f"{figure}.png").size[0] >= 900
    code = f"""
import sys
sys.modules["bkd_hf"] = None  # an import of it would fail
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from transformers import pipeline
classify = pipeline("image-classification", {str(finished)!r}, trust_remote_code=True)
image = Image.fromarray((load_digits().images[0] * 255 / 16).astype(np.uint8))
assert {{answer["label"] for answer in classify(image, top_k=10)}} == set("0123456789")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_reported_accuracy_is_that_of_the_saved_model(finished):
    from bkd_hf import ImageDataset, load_image_dataset

    data = ImageDataset(load_image_dataset("digits")["eval"], load_processor(str(finished)))
    model = load_classifier(str(finished), data.class_names).eval()
    with torch.no_grad():
        images = torch.stack([example["pixel_values"] for example in data.__getitems__(list(range(400)))])
        accuracy = (model(images).logits.argmax(-1).numpy() == data.labels).mean()
    assert accuracy == pytest.approx(load_results(finished)["student"]["metrics"]["accuracy"], abs=0.0051)


# ---- Running again


def test_finished_run_says_so(finished, run_here):
    before = (finished / "results.json").read_bytes()
    output = run_here(*QUICK, "--output_dir", str(finished))
    assert "This run is finished" in output
    assert "worst class" in output
    assert (finished / "results.json").read_bytes() == before


def test_a_finished_run_takes_a_licence(copy, run_here):
    assert "This run is finished" in run_here(*QUICK, "--output_dir", str(copy), "--hub_license", "apache-2.0")
    assert "license: apache-2.0" in (copy / "README.md").read_text(encoding="utf-8")
    run_here(*QUICK, "--output_dir", str(copy))
    assert "license: apache-2.0" in (copy / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("step", "file"), [("save_plots", "figures/class_accuracy.png"), ("build_card", "README.md")])
def test_results_outlive_what_cannot_be_written(copy, run_here, monkeypatch, step, file):
    for name in ("results.json", file):
        (copy / name).unlink()

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(f"bkd_hf.run.{step}", fail)
        with pytest.raises(OSError, match="no space left"):
            run_here(*QUICK, "--output_dir", str(copy))
    assert "This run is finished" in run_here(*QUICK, "--output_dir", str(copy))
    assert (copy / file).exists()


def test_other_options_are_refused_naming_what_differs(finished):
    output = refused(*QUICK, "--output_dir", str(finished), "--temperature", "4", "--split_seed", "1")
    assert "--temperature is 2.0 there, 4.0 here" in output
    assert "--split_seed is 0 there, 1 here" in output
    assert "--overwrite" in output
    assert "--teacher_" not in output.split("Use another folder")[0]  # the teacher's options are not concerned


@pytest.mark.slow
def test_overwrite_starts_anew(copy, run_here):
    (copy / "results.json").write_text("{}")
    (copy / "notes.txt").write_text("mine")
    output = run_here(*QUICK, "--num_train_epochs", "1", "--output_dir", str(copy), "--overwrite")
    assert "are never reached" in output  # the steps of the learning rate
    assert load_results(copy)["student"]["training"]["epochs"] == 1
    assert (copy / "notes.txt").read_text() == "mine"


def test_a_mistake_at_the_start_does_not_block_the_folder(tmp_path):
    for _ in range(2):  # the second time the folder is not empty
        for name in ("./nowhere", "./nowhere/else"):
            message = refused("--output_dir", str(tmp_path / "run"), "--dataset_name", name)
            assert f"--dataset_name {name}: there is no such" in message


def test_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    output = refused(*QUICK, "--output_dir", str(tmp_path), "--overwrite")
    assert "is not empty and was not made by run_bkd.py" in output
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def kill_when(condition, *options: str) -> None:
    run = faults.Run(*options)
    deadline = time.monotonic() + 120
    while not condition():
        assert run.process.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_run_continues_in_either_stage(tmp_path):
    # One thread: sums over threads may be rounded in another order.
    options = (*QUICK, "--num_train_epochs", "12", "--eval_strategy", "no")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(*options, "--output_dir", str(whole))
    arguments = (*options, "--output_dir", str(killed))
    kill_when(lambda: list(killed.glob("teacher/checkpoint-*/trainer_state.json")), *arguments)
    assert not (killed / "teacher" / "model.safetensors").exists()
    kill_when(lambda: list(killed.glob("checkpoint-*/trainer_state.json")), *arguments)
    assert not (killed / "results.json").exists()
    output = run(*arguments)
    assert "Using the teacher in" in output
    assert "Continuing from checkpoint-" in output
    for model in ("model.safetensors", "teacher/model.safetensors"):
        assert (killed / model).read_bytes() == (whole / model).read_bytes()
    whole_results, killed_results = load_results(whole), load_results(killed)
    for model in ("teacher", "student"):
        assert killed_results[model]["metrics"] == whole_results[model]["metrics"]
        assert len(killed_results[model]["history"]) == len(whole_results[model]["history"]) == 12


# ---- Teachers


def test_teacher_that_is_trained_here_is_a_run_of_its_own(finished):
    results = load_results(finished / "teacher")
    assert {**results["student"], "method": results["method"]} == load_results(finished)["teacher"]
    assert (results["teacher"], results["method"], results["command"]) == (None, "ce", None)
    card = (finished / "teacher" / "README.md").read_text()
    assert "| accuracy in % | this model |" in card
    assert (finished / "teacher" / "figures" / "class_accuracy.png").exists()
    recipe = yaml.safe_load(to_recipe(results))
    assert (recipe["model_name_or_path"], recipe["method"]) == ("cifar-resnet-8", "ce")
    assert not [name for name in recipe if name.startswith("teacher")]


def test_teacher_trained_otherwise_is_refused(copy):
    (copy / "results.json").unlink()
    record = json.loads((copy / "teacher" / "bkd_run.json").read_text())
    for change, message in (
        ({"fingerprint": "other"}, "fingerprint is other there"),
        ({"training": {**record["training"], "momentum": 0.5}}, "--momentum is 0.5 there, 0.9 here"),
    ):
        (copy / "teacher" / "bkd_run.json").write_text(json.dumps({**record, **change}))
        output = refused(*QUICK, "--output_dir", str(copy))
        assert output.startswith(f"The teacher in {copy / 'teacher'} was trained otherwise: {message}")
        assert "Use --overwrite to train it anew" in output


def test_other_images_under_an_interrupted_run_are_refused(copy):
    (copy / "results.json").unlink()
    record = json.loads((copy / "bkd_run.json").read_text())
    (copy / "bkd_run.json").write_text(json.dumps({**record, "fingerprint": "other"}))
    assert "holds a run with other options: fingerprint is other there" in refused(*QUICK, "--output_dir", str(copy))


def test_options_of_later_versions_are_as_by_default(copy, run_here):
    record = json.loads((copy / "bkd_run.json").read_text())
    training = {
        name: value for name, value in record["training"].items() if name not in ("empty_classes", "head_init")
    }
    (copy / "bkd_run.json").write_text(json.dumps({**record, "training": training}))
    assert "This run is finished" in run_here(*QUICK, "--output_dir", str(copy))
    message = refused(*QUICK, "--output_dir", str(copy), "--empty_classes", "clamp")
    assert "--empty_classes is None there, clamp here" in message


@pytest.mark.slow
def test_given_teacher_is_used_as_it_is(finished, tmp_path, run_here):
    output = run_here(
        *QUICK, "--output_dir", str(tmp_path / "run"), "--teacher_model_name_or_path", str(finished / "teacher"),
        "--teacher_learning_rate", "0.7", "--model_name_or_path", "cifar-resnet-14",
    )  # fmt: skip
    assert "--teacher_learning_rate has no effect" in output
    results = load_results(tmp_path / "run")
    assert results["teacher"]["metrics"] == load_results(finished)["teacher"]["metrics"]
    assert results["teacher"]["model"] == "cifar-resnet-8"  # what was trained, not the folder it lies in
    assert "training" not in results["teacher"]
    assert not (tmp_path / "run" / "teacher").exists()


# ---- The default, the look before training and the verdict after it


def test_the_default_is_for_data_of_peoples_own(finished, copy, run_here):
    results = load_results(finished)
    training, student = results["options"]["training"], results["student"]
    assert results["method"] == training["method"] == "bkd-calibrated"
    assert (training["classification_loss"], training["class_balance_power"]) == ("logit_adjustment", "measured")
    assert 0.5 <= student["targets"]["power"] < 1  # after four epochs the teacher is not sure yet
    assert student["started_from_teacher"] is True
    assert student["targets"]["num_images"] == 344
    assert sum(student["answers"]) == 400
    card = (finished / "README.md").read_text()
    assert "The student started from the teacher's weights." in card
    assert "of 344 training examples: right for" in card
    # The first line under the table.
    output = run_here(*QUICK, "--output_dir", str(copy))
    assert output.partition("└")[2].splitlines()[1].startswith("The student is ")
    recipe = (RECIPE.parent / "cifar100_lt.yaml").read_text()
    assert "\nmethod: bkd " in recipe


@pytest.mark.slow
def test_collapsing_targets_are_refused_unless_forced(tmp_path, run_here):
    options = (*QUICK, "--output_dir", str(tmp_path / "run"), "--method", "bkd", "--class_balance_power", "5")
    message = refused(*options)
    assert message.startswith("The distillation targets collapse: ")
    for way_out in ("--class_balance_power auto", "--temperature", "trained longer", "--force_distillation"):
        assert way_out in message
    assert not (tmp_path / "run" / "results.json").exists()
    output = run_here(*options, "--force_distillation")  # the same folder: the teacher is kept
    assert "Using the teacher in" in output
    assert "WARNING: The distillation targets collapse" in output
    assert "Try --class_balance_power auto, a lower --temperature, or" in output
    targets = load_results(tmp_path / "run")["student"]["targets"]
    assert targets["power"] == 5.0
    assert targets["target_agreement"] < 0.25 * targets["teacher_agreement"]


def test_bad_powers_are_refused(tmp_path):
    options = (*QUICK, "--output_dir", str(tmp_path / "run"))
    for power in ("-1", "inf", "nan", "much"):
        message = refused(*options, f"--class_balance_power={power}")
        assert message.startswith("--class_balance_power must be a finite number ≥ 0, auto or measured, got")
    assert "--distillation_loss kd has no class weights" in refused(
        *options, "--method", "kd", "--class_balance_power=2"
    )


# ---- Methods


def test_batches_can_come_from_the_main_process(tmp_path, run_here):
    """What accelerate cuts then are tensors; pixels as bytes are none."""
    dispatch = ["--accelerator_config", '{"dispatch_batches": true}', "--max_steps", "2"]
    run_here(*QUICK, *dispatch, "--method", "ce", "--output_dir", str(tmp_path / "run"))
    assert load_results(tmp_path / "run")["student"]["training"]["steps"] == 2


@pytest.mark.slow
def test_ldam_trains_a_cosine_head_that_is_saved_with_the_model(tmp_path, run_here):
    output = run_here(
        *QUICK, "--output_dir", str(tmp_path / "run"), "--method", "ldam-drw", "--teacher_learning_rate", "1"
    )
    assert "Teacher ──" not in output
    assert "--teacher_learning_rate has no effect: --method ldam-drw has no distillation loss" in output
    assert "The model after post-hoc logit adjustment (τ = 1): overall" in output
    results = load_results(tmp_path / "run")
    assert (results["method"], results["teacher"]) == ("ldam-drw", None)
    assert results["student"]["post_hoc_metrics"]["tau"] == 1.0
    assert sorted(path.name for path in (tmp_path / "run" / "figures").iterdir()) == [
        "class_accuracy.png", "confusion.png", "training_curves.png"
    ]  # fmt: skip
    model = load_classifier(str(tmp_path / "run"), [str(number) for number in range(10)]).eval()
    assert (model.config.cosine_head, model.config.cosine_scale) == (True, 30.0)
    logits = model(torch.randn(8, 3, 16, 16)).logits
    assert logits.abs().max() <= 30.0


@pytest.mark.slow
def test_teacher_of_dive_is_trained_with_balanced_softmax(tmp_path, run_here):
    output = run_here(
        *QUICK, "--output_dir", str(tmp_path / "run"), "--method", "dive", "--dive_temperature", "3",
        "--num_train_epochs", "2", "--lr_step_epochs", "1", "--lr_step_factors", "0.1",
    )  # fmt: skip
    assert "no effect" not in output
    results = load_results(tmp_path / "run")
    assert results["method"] == "dive (dive_temperature 3)"
    assert results["options"]["teacher_training"]["method"] == "balanced-softmax"
    assert results["options"]["teacher_training"]["distillation_loss"] == "none"
    told = json.loads((tmp_path / "run" / "teacher" / "bkd_run.json").read_text())["training"]
    assert (told["method"], told["sampler"]) == ("balanced-softmax", "instance")
    assert refused(
        *QUICK, "--output_dir", str(tmp_path / "run"), "--method", "dive", "--teacher_method", "resample"
    ).startswith(f"--output_dir {tmp_path / 'run'} holds a run with other options")


@pytest.mark.slow
def test_what_a_run_finds_out_is_no_option_of_the_next(tmp_path):
    options = [*QUICK, "--method", "bkd", "--teacher_method", "balanced-softmax", "--force_distillation"]
    arguments = parse_arguments([*options, "--output_dir", str(tmp_path / "run")], digits_recipe=RECIPE)
    results = run_bkd(arguments)
    assert results["options"]["training"]["distillation_prior"] == "teacher"  # which is balanced already
    assert arguments.training.distillation_prior == "auto"
    assert run_bkd(arguments)["student"]["metrics"] == results["student"]["metrics"]  # the finished run


def test_bad_methods_are_refused(tmp_path):
    options = (*QUICK, "--output_dir", str(tmp_path / "run"))
    message = refused(*options, "--teacher_method", "kd")
    assert message == "--teacher_method kd: a teacher is trained without a teacher."
    assert "--method must be one of ce, cb-ce" in refused(*options, "--method", "bdk")
    assert "--temperature cannot be set for the teacher alone" in refused(*options, "--teacher_temperature", "3")
    assert "--post_hoc_tau must be a finite number" in refused(*options, "--post_hoc_tau", "nan")


# ---- Launchers and data


@pytest.mark.slow
def test_two_processes(finished, tmp_path, run_here):
    both = faults.start_two(*QUICK, "--output_dir", tmp_path / "run", "--per_device_train_batch_size", 16)
    assert [process.wait() for process in both] == [0, 0], [process.output for process in both]
    assert ["│ worst class" in process.output for process in both] == [True, False]  # the main process speaks
    results, alone = load_results(tmp_path / "run"), load_results(finished)
    assert results["hardware"]["num_processes"] == 2
    assert results["student"]["training"]["steps"] == alone["student"]["training"]["steps"]
    # The same examples in each step; BatchNorm sees halves of them.
    first, first_alone = results["teacher"]["history"][0], alone["teacher"]["history"][0]
    assert first["loss"] == pytest.approx(first_alone["loss"], rel=0.2)
    assert "This run is finished" in run_here(
        *QUICK, "--output_dir", str(tmp_path / "run"), "--use_cpu", "--per_device_train_batch_size", "16"
    )


def test_folder_of_class_folders_with_a_natural_tail(tmp_path):
    generator = np.random.default_rng(0)
    for name, number, colour in (("red", 12, 0), ("green", 6, 1), ("blue", 3, 2), ("grey", 1, 0)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(number):
            pixels = generator.integers(0, 100, (20 + i, 24, 3), dtype=np.uint8)
            pixels[:, :, colour] += 150
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    output = run(
        "--dataset_name", str(tmp_path / "data"), "--model_name_or_path", "cifar-resnet-8", "--output_dir",
        str(tmp_path / "run"), "--cache_images", "none", "--num_train_epochs", "1", "--disable_tqdm", "true",
        "--max_class_count", "5", "--num_threads", "1", launcher=(sys.executable,),
    )  # fmt: skip
    assert "--max_class_count has no effect" in output
    assert "has no evaluation split" in output
    assert " for evaluation (held out)." in output
    assert "Examples are prepared by" in output
    results = load_results(tmp_path / "run")
    assert results["data"]["name"] == "data"
    assert "1 of 4 classes ('grey') has no evaluation image" in output
    assert results["data"]["class_names"] == ["blue", "green", "grey", "red"]
    assert results["data"]["class_counts"] == [2, 5, 1, 10]
    assert results["student"]["metrics"]["per_class_accuracy"][2] is None
    assert "many_shot_accuracy" not in results["student"]["metrics"]


# ---- Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset_name", "./nowhere"], "--dataset_name ./nowhere: there is no such file or folder"),
        (["--model_name_or_path", "cifar-resnet-33"], "There is no cifar-resnet-33"),
        (["--temperature", "0"], "--temperature must be a finite number > 0"),
        (["--imbalance_ratio", "1000"], "without images, as the largest class has 130"),
        (["--max_class_count", "5000"], "Lower max_count"),
        (
            ["--metric_for_best_model", "acuracy"],
            "--metric_for_best_model acuracy: the evaluations of this run give loss, accuracy, top5_accuracy",
        ),
        (["--max_train_samples", "3"], "--max_train_samples 3 is fewer than one example for each of the 10 classes"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_training(tmp_path, options, message):
    assert message in refused(*options, "--output_dir", str(tmp_path / "run"))
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_bad_input_is_one_line_without_a_traceback(tmp_path):
    code, output = faults.run("--temperature", 0, "--output_dir", tmp_path / "run")
    assert (code, output) == (2, "error: --temperature must be a finite number > 0, got 0.0.\n")
    assert not (tmp_path / "run").exists()


def test_diverged_training_is_one_line_and_no_result(tmp_path):
    options = [*QUICK, "--method", "ce", "--max_train_samples", "100", "--learning_rate", "1e30"]
    code, output = faults.run(*options, "--output_dir", tmp_path / "run")
    assert code == 1
    assert "error: The training diverged: loss or weights are not finite (NaN or Inf) at step" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "results.json").exists()


def test_corrupt_images_are_named_before_training(tmp_path):
    data = tmp_path / "data"
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (data / folder).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(data / folder / f"{i}.png")
    broken = [data / "train" / name for name in ("a/1.png", "b/2.png", "b/4.png")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:40])
    output = refused("--dataset_name", str(data), "--output_dir", str(tmp_path / "run"))
    first, second, third = (re.escape(str(path)) for path in broken)
    why = "cannot be decoded: it is no image of a known format"
    assert re.search(rf"Image 1 \({first}\) {why}\. Nor can 2 more: 7 \({second}\), 9 \({third}\)\. R", output)


def test_help_is_readable(capsys):
    def help_of(option: str) -> str:
        with pytest.raises(SystemExit, match="0"):
            parse_arguments([option])
        return capsys.readouterr().out

    output = help_of("--help")
    assert max(map(len, output.splitlines())) <= 120
    for option in ("--temperature", "--alpha", "--method", "--imbalance_ratio", "--teacher_label_map", "--output_dir"):
        assert option in output
    assert "--fsdp" not in output
    assert "--fsdp" in help_of("--help_all")


def test_importing_the_package_is_light():
    code = "import sys, bkd_hf; assert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in bkd_hf.__all__:
        getattr(bkd_hf, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teacher_cache", "auto", "--teacher_cache_top_k", "10"], "--teacher_cache_top_k must be less than the 10"),
        (["--head", "cosine", "--head_bias", "balanced"], "--head_bias balanced: the head of .* has no bias"),
        (
            ["--student_init", "teacher", "--teacher_image_size", "24"],
            "--student_init teacher: the teacher takes other",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_a_teacher_is_trained(tmp_path, options, message):
    folder = tmp_path / "run"
    assert re.search(message, refused(*QUICK, *options, "--output_dir", str(folder)))
    assert not (folder / "teacher").exists()
