from __future__ import annotations

import gc
import json
import os
import warnings
import weakref
from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser

from bkd_hf import BKDConfig, ImageDataset, InputError
from bkd_hf.arguments import parse_arguments
from bkd_hf.inputs import choose_workers
from bkd_hf.machine import collect_only_new_garbage, default_precision, options_alone, precision_of
from bkd_hf.optimization import OptimizingTrainer
from bkd_hf.options import RunArguments
from bkd_hf.run_folder import claim_output_dir, identity_of, record_run, run_state
from tests.conftest import REPOSITORY
from tests.test_images import photos, vit_processor
from tests.tiny_models import tiny_vit

RECIPES = REPOSITORY / "scripts" / "recipes"
DIGITS = RECIPES / "digits.yaml"
COUNTS = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "eval_accumulation_steps", "seed", "data_seed", "split_seed", "max_steps", "dataloader_num_workers",
    "num_threads", "image_size", "max_train_samples", "max_class_count", "teacher_cache_views",
)  # fmt: skip
NUMBERS = (
    *COUNTS, "learning_rate", "head_learning_rate", "weight_decay", "adam_beta1", "adam_epsilon", "max_grad_norm",
    "warmup_steps", "momentum", "num_train_epochs", "save_steps", "eval_steps", "logging_steps", "imbalance_ratio",
    "label_smoothing_factor", "temperature",
)  # fmt: skip


def parse(line: str, tmp_path: Path | None = None, yaml_text: str | None = None):
    if yaml_text is not None:
        (tmp_path / "recipe.yaml").write_text(yaml_text)
        line += f" --config {tmp_path / 'recipe.yaml'}"
    return parse_arguments(line.split(), digits_recipe=DIGITS)


def test_nothing_given_is_the_digits_recipe():
    arguments = parse("")
    recipe = yaml.safe_load(DIGITS.read_text())
    assert arguments.data.dataset_name == "digits"
    assert arguments.data.imbalance_ratio == recipe["imbalance_ratio"]
    assert arguments.training.lr_step_epochs == recipe["lr_step_epochs"]
    assert arguments.training.output_dir == "outputs/digits_cifar-resnet-8_seed42"
    assert arguments.for_teacher().training.output_dir == arguments.training.output_dir + "/teacher"


def test_another_data_set_does_not_get_the_digits_recipe():
    arguments = parse("--dataset_name some/data --model_name_or_path some/vit --output_dir out")
    assert arguments.data.imbalance_ratio is None
    assert arguments.training.learning_rate == 5e-5


def test_fresh_weights_are_not_trained_with_fine_tuning_defaults(tmp_path):
    line = "--dataset_name some/data --model_name_or_path cifar-resnet-32"
    training = parse(f"{line} --num_train_epochs 30").training
    assert (training.optim, training.learning_rate, training.momentum) == ("sgd", 0.1, 0.9)
    assert (training.lr_scheduler_type, training.num_train_epochs) == ("cosine", 30)
    assert parse(f"{line} --optim adamw_torch").training.learning_rate == 5e-5
    assert parse(line, tmp_path, "temperature: 3\n").training.learning_rate == 0.1
    assert parse(line, tmp_path, "optim: adamw_torch\n").training.learning_rate == 5e-5


def test_strong_recipe_is_a_modern_one():
    recipe = f"--config {RECIPES / 'cifar100_lt_strong.yaml'}"
    data, training = parse(recipe).data, parse(recipe).training
    assert (data.train_augmentation, data.train_operations) == ("pad_crop", ["autoaugment", "cutout"])
    sgd = OptimizingTrainer.get_optimizer_cls_and_kwargs(training)[1]
    assert sgd == {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    assert (training.lr_scheduler_type, training.get_warmup_steps(1000), training.weight_decay) == ("cosine", 25, 5e-4)
    assert parse(f"{recipe} --train_operations none").data.train_operations is None


def test_recipes_go_by_name_but_a_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a data set, maybe: no file
    by_name, by_path = parse("--config digits"), parse(f"--config {DIGITS}")
    assert (by_name.training, by_name.data, by_name.model) == (by_path.training, by_path.data, by_path.model)
    (tmp_path / "cifar10_lt").write_text("temperature: 3\n")
    assert parse("--config cifar10_lt").training.temperature == 3


@pytest.mark.parametrize("name", ["cifar100_lt", "cifar10_lt"])
def test_recipes_are_the_papers(name):
    arguments = parse(f"--config {RECIPES / name}.yaml")
    training, data = arguments.training, arguments.data
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (200, 128)
    assert (training.optim, training.learning_rate, training.momentum) == ("sgd", 0.1, 0.9)
    assert (training.weight_decay, training.decay_all_parameters, training.max_grad_norm) == (2e-4, True, 0)
    assert (training.lr_warmup_epochs, training.lr_step_epochs) == (5, [160, 180])
    assert training.lr_step_factors == [0.01, 0.0001]
    assert (training.temperature, training.distillation_weight, training.class_balance_beta) == (2, 1, 0.9999)
    assert training.deferred_reweighting_start == (160 if name == "cifar10_lt" else None)
    assert not training.load_best_model_at_end
    assert (data.imbalance_ratio, data.imbalance_profile) == (100, "exp")
    assert arguments.model.model_name_or_path == "cifar-resnet-32"
    assert arguments.for_teacher().training.num_train_epochs == 200


def test_command_line_wins_over_the_file(tmp_path):
    text = (
        "temperature: 3\nlearning_rate: 2e-4\nhorizontal_flip: false\n"
        "lr_step_epochs: [1, 2]\nlr_step_factors: [.1, .01]\n"
    )
    arguments = parse("--temperature 4 --alpha 0.5 --beta 0.99", tmp_path, text)
    assert arguments.training.temperature == 4
    assert arguments.training.learning_rate == 2e-4  # which PyYAML reads as a string
    assert arguments.data.horizontal_flip is False
    assert arguments.training.lr_step_factors == [0.1, 0.01]
    assert (arguments.training.distillation_weight, arguments.training.class_balance_beta) == (0.5, 0.99)


def test_teacher_has_its_own_options(tmp_path):
    text = (
        "learning_rate: 0.1\n"
        "teacher:\n  model_name_or_path: cifar-resnet-56\n  learning_rate: 2e-2\n  weight_decay: 1e-4\n"
    )
    arguments = parse("--teacher_num_train_epochs 7 --teacher-weight-decay=1e-3", tmp_path, text)
    assert arguments.model.teacher_model_name_or_path == "cifar-resnet-56"
    assert (arguments.training.learning_rate, arguments.training.num_train_epochs) == (0.1, 200)
    teacher = arguments.for_teacher().training
    assert (teacher.learning_rate, teacher.num_train_epochs, teacher.weight_decay) == (0.02, 7, 1e-3)


_BATCHES = "--per_device_train_batch_size 16 --gradient_accumulation_steps 2 --teacher_per_device_train_batch_size 4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (_BATCHES, None),
        ("--per_device_train_batch_size 32 --teacher_per_device_train_batch_size 8", None),
        ("--per_device_train_batch_size 8 --global_batch_size 32 --teacher_global_batch_size 8", None),
        (_BATCHES.replace("16", "8"), "--global_batch_size is 32 there, 16 here; --global_batch_size 32 keeps the ex"),
        (
            _BATCHES.replace(" 4", " 2"),
            "--teacher_global_batch_size is 8 there, 4 here; --teacher_global_",
        ),
    ],
    ids=str,
)
def test_global_batches_are_compared_not_how_they_are_cut(tmp_path, options, message):
    line = f"--dataset_name some/data --output_dir {tmp_path / 'out'}"
    claim_output_dir(there := parse(f"{line} {_BATCHES}"))
    record_run(there, {})
    (tmp_path / "out" / "checkpoint-1").mkdir()
    record = json.loads((tmp_path / "out" / "bkd_run.json").read_text())
    assert (record["training"]["global_batch_size"], record["num_processes"]) == (32, 1)
    if message is None:
        assert run_state(parse(f"{line} {options}")) == "interrupted"
    else:
        with pytest.raises(InputError, match=message):
            run_state(parse(f"{line} {options}"))


def test_a_finished_run_of_more_processes_is_reported_by_one(tmp_path):
    line = f"--dataset_name some/data --output_dir {tmp_path / 'out'} --per_device_train_batch_size 16"
    claim_output_dir(there := parse(line))
    record_run(there, {})
    path = tmp_path / "out" / "bkd_run.json"
    record = json.loads(path.read_text())
    record["training"]["global_batch_size"], record["num_processes"] = 32, 2
    path.write_text(json.dumps(record))
    (tmp_path / "out" / "results.json").write_text("{}")
    assert run_state(there) == "finished"
    (tmp_path / "out" / "results.json").write_text("")  # damaged: these processes would train it
    with pytest.raises(InputError, match="--global_batch_size is 32 there, 16 here"):
        run_state(there)
    assert run_state(there, is_to_train=False) == "interrupted"


@pytest.mark.parametrize(
    ("options", "differences"),
    [
        ("--method ce", ["--method is bkd-calibrated there, ce here"]),
        (
            "--method bkd --temperature 3 --teacher_num_train_epochs 9",
            ["--method is bkd-calibrated there, bkd here", "--temperature is 2.0 there"],
        ),
        ("--teacher_model_name_or_path other/model", ["--teacher_model_name_or_path is None there, other/model here"]),
    ],
)
def test_what_follows_from_another_difference_is_not_told(tmp_path, options, differences):
    line = f"--dataset_name some/data --output_dir {tmp_path / 'out'}"
    claim_output_dir(there := parse(f"{line} --teacher_num_train_epochs 9"))
    record_run(there, {})
    (tmp_path / "out" / "checkpoint-1").mkdir()
    with pytest.raises(InputError, match="holds a run with other options") as raised:
        run_state(parse(f"{line} {options}"))
    told = str(raised.value).partition("other options: ")[2].partition(". Use another folder")[0]
    assert len(differences) == len(told.split("; "))
    assert all(each.startswith(one) for each, one in zip(told.split("; "), differences, strict=True))


def test_a_finished_run_is_reported_on_another_machine(tmp_path, monkeypatch):
    """Whose accelerator and launcher are others; not where something else was asked for, or it is to be trained."""
    line = f"--dataset_name some/data --output_dir {tmp_path / 'out'}"
    claim_output_dir(there := parse(line))
    record_run(there, {})
    record = json.loads((path := tmp_path / "out" / "bkd_run.json").read_text())
    path.write_text(json.dumps({**record, "training": {**record["training"], "use_cpu": False}}))
    (tmp_path / "out" / "results.json").write_text("{}")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert run_state(parse(line)) == "finished"
    for option, name in (("--precision bf16", "bf16"), ("--torch_compile true", "torch_compile")):
        with pytest.raises(InputError, match=f"--{name} is False there, True here"):
            run_state(parse(f"{line} {option}"))
    (tmp_path / "out" / "results.json").unlink()
    (tmp_path / "out" / "checkpoint-1").mkdir()
    with pytest.raises(InputError, match="--torch_compile is False there, True here"):
        run_state(parse(line))
    assert run_state(parse(line), is_to_train=False) == "interrupted"


def test_a_model_that_was_moved_is_the_same(tmp_path, monkeypatch):
    for name, seed in (("here", 0), ("other", 1)):
        tiny_vit(seed, 3).save_pretrained(tmp_path / name)
    line = f"--dataset_name some/data --method bkd --output_dir {tmp_path / 'out'} --teacher_model_name_or_path"
    claim_output_dir(there := parse(f"{line} {tmp_path / 'here'}"))
    record_run(there, identity_of(there, {"fingerprint": "a", "eval_fingerprint": "b", "class_names": ["c"]}))
    (tmp_path / "out" / "checkpoint-1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run_state(parse(f"{line} ./here")) == "interrupted"
    (tmp_path / "here").rename(tmp_path / "there")
    assert run_state(parse(f"{line} there")) == "interrupted"
    with pytest.raises(InputError, match=r"--teacher_model_name_or_path is .*here there, other here"):
        run_state(parse(f"{line} other"))


def test_the_command_line_wins_over_the_precision_of_a_recipe(tmp_path):
    assert not parse("--precision fp32", tmp_path, "dataset_name: some/data\nbf16: true\n").training.bf16
    with pytest.raises(InputError, match="--precision fp32 and --bf16 contradict each other"):
        parse("--precision fp32 --bf16 true", tmp_path, "dataset_name: some/data\n")


def test_a_home_folder_that_the_shell_leaves_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--output_dir=~/x").training.output_dir == str(tmp_path / "x")


def test_a_streamed_run_has_no_images_at_hand():
    record = {"model": {}, "data": {"streaming": True, "class_counts": "counts.json"}}
    with pytest.raises(InputError, match="outputs/x: the images of this run were streamed"):
        RunArguments.from_record(record, "outputs/x")


def test_how_to_resume_is_told():
    with pytest.raises(InputError, match=r"--resume .* The same command continues an interrupted run by itself"):
        parse("--dataset_name some/data --resume")


def test_no_negation_repeats_the_help_of_its_option(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--horizontal_flip" in (shown := capsys.readouterr().out)
    assert "--no_horizontal_flip" not in shown


def test_a_difference_tells_what_was_given_for_the_teacher(tmp_path):
    folder = tmp_path / "out"
    line = f"--dataset_name some/data --head_learning_rate 3e-3 --output_dir {folder}"
    there, same = (parse(f"{line} --teacher_head_learning_rate {rate}") for rate in ("3e-4", "3e-4"))
    folder.mkdir()
    record_run(there, {})
    (folder / "teacher").mkdir()
    assert run_state(same) == "interrupted"
    for has_model in (False, True):
        with pytest.raises(InputError, match=r"--teacher_head_learning_rate is 0\.0003 there, 0\.003 here") as raised:
            run_state(parse(f"{line} --teacher_head_learning_rate 3e-3"))
        assert (f"{folder}/teacher" in str(raised.value)) == has_model  # as long as it holds none, it is no way out
        (folder / "teacher" / "results.json").touch()


def test_what_has_no_effect_is_told_of_the_command_line_alone(tmp_path, recwarn):
    recipe = "dataset_name: some/data\nmomentum: 0.9\nfocal_gamma: 2\npush_teacher: true\nteacher:\n  seed: 3\n"
    arguments = parse("--method ce", tmp_path, recipe)
    assert [str(warning.message) for warning in recwarn if "no effect" in str(warning.message)] == []
    assert arguments.options_without_effect() == {}
    arguments = parse("--method ce --focal_gamma 2 --push_teacher --teacher_seed 3", tmp_path, recipe)
    assert [str(w.message)[:13] for w in recwarn if "no effect" in str(w.message)] == ["--focal_gamma"]
    assert set(arguments.options_without_effect()) == {"push_teacher", "teacher_seed"}


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ("--model_name_or_path facebook/x --image_size 48", (48, 48)),  # a teacher like the student
        ("--model_name_or_path facebook/x --image_size 48 --teacher_model_name_or_path y", (48, None)),
        ("--model_name_or_path facebook/x --teacher_model_name_or_path y --teacher_image_size 64", (None, 64)),
        ("--model_name_or_path cifar-resnet-8 --teacher_model_name_or_path y", (32, None)),
        ("--model_name_or_path cifar-resnet-8 --image_size 48 --teacher_model_name_or_path cifar-resnet-56", (48, 48)),
    ],
)
def test_sizes_of_images(options, sizes):
    arguments = parse(f"--dataset_name some/data {options}")
    assert (arguments.model.image_size, arguments.for_teacher().model.image_size) == sizes


def test_any_option_that_makes_sense_for_a_teacher_can_be_given_for_it(tmp_path):
    text = "image_size: 32\ntoken: hf_secret\nteacher:\n  image_size: 48\n  sampler: class_balanced\n"
    arguments = parse("--teacher_trust_remote_code --method dkd --dkd_beta 2 --hub_model_id me/x", tmp_path, text)
    teacher = arguments.for_teacher()
    assert (arguments.model.image_size, teacher.model.image_size) == (32, 48)
    assert (arguments.model.trust_remote_code, teacher.model.trust_remote_code) == (False, True)
    assert (teacher.training.method, teacher.training.sampler) == ("ce", "class_balanced")
    assert (teacher.training.dkd_beta, teacher.distils, teacher.repo_id) == (8, False, "me/x-teacher")
    assert teacher.data == arguments.data
    assert teacher.model.token == "hf_secret"
    assert parse("--teacher_learning_rate 0.05 --teacher_seed 7").teacher_options == {"seed": 7}  # the recipe's rate


def test_the_revision_is_that_of_the_students_model():
    line = "--dataset_name some/data --model_name_or_path a/b --model_revision v2"
    assert parse(line).for_teacher().model.model_revision == "v2"
    line += " --teacher_model_name_or_path c/d"
    assert parse(line).for_teacher().model.model_revision == "main"
    assert parse(f"{line} --teacher_model_revision v3").for_teacher().model.model_revision == "v3"


def test_roles_do_not_get_in_the_way_of_other_parsers():
    (training,) = HfArgumentParser(BKDConfig).parse_args_into_dataclasses(["--temperature", "3", "--use_cpu"])
    assert training.temperature == 3


def test_dictionaries_in_yaml(tmp_path):
    arguments = parse("", tmp_path, "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}\n")
    assert arguments.training.lr_scheduler_kwargs == {"min_lr": 1e-6}


@pytest.mark.filterwarnings("error")
def test_steps_of_the_learning_rate_are_the_whole_schedule():
    training = parse("--lr_step_epochs 100 --lr_step_factors 0.1 --dataset_name some/data").training
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_steps) == (0.1, "linear", 0)


def test_the_script_sets_what_differs_from_transformers():
    training = parse("--dataset_name some/data").training
    assert (training.save_strategy, training.save_total_limit, training.logging_strategy) == ("epoch", 1, "epoch")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--lr_step_epochs 1 2 --lr_step_factors 0.1 0.01 --teacher_lr_step_epochs 1 2 3",
            "--teacher_lr_step_factors must",
        ),
        ("--label_smoothing_factor 0.1 --teacher_method focal", "--teacher_label_smoothing_factor must be 0"),
        (
            "--global_batch_size 64 --per_device_train_batch_size 64 --teacher_per_device_train_batch_size 48",
            "Use --teacher_global_batch_size 48 or .*--teacher_per_device_train_batch_size 32",
        ),
    ],
)
def test_errors_about_the_teacher_name_what_helps_it(line, message):
    with pytest.raises(InputError, match=message):
        parse(f"--dataset_name some/data --method bkd {line}")


def test_warnings_about_the_teacher_name_its_options():
    with pytest.warns(UserWarning, match="--teacher_class_balance_beta 0.9 has no effect"):
        parse("--dataset_name some/data --method bkd --teacher_beta 0.9")


def test_a_warning_about_both_models_is_given_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parse("--dataset_name some/data --method bkd --lr_step_epochs 900 --lr_step_factors 0.1")
    assert [str(each.message).split(":")[0] for each in caught] == ["--lr_step_epochs 900 are never reached"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temperatur: 3\n", "unknown option 'temperatur'. Did you mean temperature?"),
        ("teacher_learning_rate: 3\n", "write teacher_learning_rate as learning_rate into a section `teacher:`"),
        ("teacher:\n  beta: 0.9\n  class_balance_beta: 0.8\n", "class_balance_beta is given twice"),
        (
            "teacher_model_name_or_path: a/b\nteacher:\n  model_name_or_path: c/d\n",
            "teacher_model_name_or_path is given twice, once as model_name_or_path in the section `teacher:`",
        ),
        ("overwrite: true\n", "overwrite belongs on the command line, as --overwrite"),
        ("temperature: hot\n", "temperature: 'hot' is not valid there: .*invalid float"),
        ("temperature: [1, 2]\n", "temperature takes a single value"),
        ("num_train_epochs: {a: 1}\n", "num_train_epochs takes a single value"),
        ("per_device_train_batch_size: 1.5\n", "per_device_train_batch_size: 1.5 is not valid there"),
        ("horizontal_flip: perhaps\n", "horizontal_flip: 'perhaps' is not valid there"),
        ("teacher:\n  learnin_rate: 1\n", "there is no training option --learnin_rate. Did you mean learning_rate?"),
        ("teacher:\n  temperature: 1\n", "--temperature cannot be set for the teacher alone"),
        ("teacher: cifar-resnet-56\n", "section `teacher:` must hold lines"),
        ("- temperature\n", "expected lines of the form"),
        ("a: b: c\n", "is no YAML"),
        ("temperature: 0\n", "--temperature must be a finite number > 0, got 0.0"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        parse("", tmp_path, text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--config nowhere.yaml",
            "--config nowhere.yaml cannot be read: .* no such recipe among cifar100_lt, .*, foundation",
        ),
        ("--config elsewhere/cifar100-lt.yaml", "Did you mean cifar100_lt?"),
        (
            "recipe.yaml --seed 1",
            r"recipe\.yaml: options begin with --\. A recipe, a YAML file, is given by --config FILE",
        ),
        ("--temprature 3", "unrecognized arguments: --temprature 3 .* Did you mean --temperature"),
        ("--temperature 0", "--temperature must be"),
        ("--alpha -1", "--distillation_weight must be"),
        ("--beta 1", "--class_balance_beta must be"),
        ("--imbalance_ratio 0.5", "--imbalance_ratio must be a finite number ≥ 1, got 0.5"),
        ("--imbalance_ratio inf", "--imbalance_ratio"),
        ("--imbalance_profile zipf", "--imbalance_profile must be one of exp, step, pareto, got 'zipf'"),
        ("--train_augmentation mixup", "--train_augmentation must be one of"),
        ("--train_operations cutout mixup", "--train_operations must be one of autoaugment, .*, got 'mixup'"),
        ("--cache_images tape", "--cache_images must be one of"),
        ("--max_train_samples 0", "--max_train_samples must be at least 1"),
        ("--image_size 4", "--image_size must be at least 8"),
        ("--num_threads 0", "--num_threads must be at least 1"),
        ("--few_shot_threshold 200", "--few_shot_threshold"),
        ("--teacher_foo 1", "--teacher_foo: there is no training option --foo"),
        ("--teacher_output_dir x", "--teacher_output_dir: --output_dir cannot be set for the teacher alone"),
        ("--teacher_dataset_name x", "--dataset_name cannot be set for the teacher alone"),
        ("--teacher_hub_token x", "--hub_token cannot be set for the teacher alone"),
        ("--teacher_precision fp32", "--precision cannot be set for the teacher alone"),
        ("--teacher_method kd", "--teacher_method kd: a teacher is trained without a teacher"),
        ("--teacher_learning_rat 1", "there is no training option --learning_rat. Did you mean learning_rate"),
        ("--fp16 --bf16", "At most one of fp16 and bf16"),
    ],
)
def test_bad_command_line(line, message):
    with pytest.raises(InputError, match=message):
        parse(line)


@pytest.mark.parametrize(
    ("options", "bf16", "fp16"),
    [
        ("--precision fp32", False, False),
        ("--precision bf16", True, False),
        ("--bf16", True, False),
        ("--bf16 true --precision bf16", True, False),
        ("--bf16 false", False, False),  # said, so not for auto to choose
        (f"--config {RECIPES / 'digits.yaml'}", False, False),
        (f"--config {RECIPES / 'digits.yaml'} --bf16", True, False),
        ("", default_precision(use_cpu=True) == "bf16", False),
    ],
)
def test_precision(options, bf16, fp16):
    arguments = parse_arguments([*options.split(), "--use_cpu", "true"])
    for args in (arguments.training, arguments.for_teacher().training):
        assert (args.bf16, args.fp16) == (bf16, fp16)


@pytest.mark.parametrize(("options", "workers"), [("", 2), ("--dataloader_num_workers 0", 0)])
def test_number_of_workers_is_chosen_where_it_is_not_given(options, workers):
    images = ImageDataset(photos(), vit_processor(), cache_images="none")
    arguments = parse_arguments([*options.split(), "--use_cpu", "true"])
    for args in (arguments.training, arguments.for_teacher().training):
        assert choose_workers(args, images, num_threads=2) == (not options)
        assert (args.dataloader_num_workers, args.dataloader_persistent_workers) == (workers, workers > 0)
    arguments = parse_arguments([*options.split(), "--teacher_dataloader_num_workers", "1"])
    assert arguments.for_teacher().training.dataloader_num_workers == 1


def test_contradicting_precisions_are_refused():
    with pytest.raises(InputError, match="--precision fp32 and --bf16 contradict each other"):
        parse_arguments(["--precision", "fp32", "--bf16"])
    with pytest.raises(InputError, match="--precision must be one of auto, fp32, bf16, fp16, got 'int8'"):
        parse_arguments(["--precision", "int8"])


@pytest.mark.parametrize(
    ("text", "option", "expected"),
    [
        ("teacher_cache: off\n", "teacher_cache", "off"),
        ("teacher_cache: 010\n", "teacher_cache", "010"),
        ("run_name: 7e4\n", "run_name", "7e4"),
        ("run_name: no\n", "run_name", "no"),
        ("run_name: 2020-01-01\n", "run_name", "2020-01-01"),
        ("run_name: 'null'\n", "run_name", "null"),
        ("run_name: null\n", "run_name", None),
        ("seed: 010\n", "seed", 10),
        ("learning_rate: 7e-4\n", "learning_rate", 7e-4),
        ("tf32: off\n", "tf32", False),
        ("disable_tqdm: On\n", "disable_tqdm", True),
        ("disable_tqdm: yes\n", "disable_tqdm", True),
        ("lr_scheduler_kwargs: {a: off, b: 010, c: 7e4, d: true}\n", "lr_scheduler_kwargs",
         {"a": "off", "b": 10, "c": 7e4, "d": True}),
        ("\ufeffrun_name: bom\n", "run_name", "bom"),
    ],
)  # fmt: skip
def test_scalars_in_yaml_are_read_by_the_type_of_their_option(tmp_path, text, option, expected):
    assert getattr(parse("", tmp_path, text).training, option) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"temperature: 2\ntemperature: 3\n", "line 2: temperature is given twice"),
        (b"teacher:\n  seed: 2\n  seed: 3\n", "line 3: seed is given twice"),
        (b"alpha: 1\ndistillation_weight: 1\n", "distillation_weight is given twice"),
        (b"lr_scheduler_kwargs: {a: 1, a: 2}\n", "a is given twice"),
        (b"teacher:\n  1: 2\n", "there is no training option --1"),
        (b"1: 2\n", "unknown option '1'"),
        (b"? [a]\n: 2\n", "line 1: expected a name"),
        ("run_name: Zürich\n".encode("latin-1"), "is not in UTF-8"),
        ("run_name: a\n".encode("utf-16"), "is not in UTF-8"),
        (b"run_name: \x00\n", "is no YAML"),
        (b"a: " + b"[" * 5000, "is no YAML"),
        (b"run_name: &a [*a]\n", "run_name"),
        (b"run_name: ''\n", "--run_name is empty"),
        (b"", "expected lines of the form"),
        (b"per_device_train_batch_size: 1_0.5\n", "per_device_train_batch_size: '1_0.5' is not valid there"),
    ],
)
def test_yaml_that_is_none(tmp_path, content, message):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        parse(f"--config {tmp_path / 'recipe.yaml'}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("launcher", "options", "precision", "warned"),
    [
        ("bf16", "--precision fp32", "fp32", "mixed_precision bf16 of the launcher"),
        ("fp16", "--precision bf16", "bf16", "mixed_precision fp16 of the launcher"),
        ("bf16", "--bf16 false", "fp32", "mixed_precision bf16 of the launcher"),
        ("bf16", "", "bf16", None),  # nothing else was said
        ("no", "--precision bf16", "bf16", None),
    ],
)
def test_options_win_over_the_launcher(monkeypatch, launcher, options, precision, warned):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    arguments = parse_arguments([*options.split(), "--dataset_name", "some/data", "--use_cpu", "true"])
    for args in (arguments.training, arguments.for_teacher().training):
        assert precision_of(args) == precision
    assert [name for name in arguments.options_without_effect() if "launcher" in name] == ([warned] if warned else [])
    with options_alone():
        assert "ACCELERATE_MIXED_PRECISION" not in os.environ
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == launcher


def test_compiler_of_the_launcher_is_an_option(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert parse("").training.torch_compile_backend == "eager"
    arguments = parse("--torch_compile false")
    assert not arguments.training.torch_compile
    assert "dynamo_backend eager of the launcher" in arguments.options_without_effect()


def test_precision_of_the_launcher_has_to_be_one_of_ours(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="asks for mixed_precision fp8: give --precision"):
        parse("--dataset_name some/data")


@pytest.mark.parametrize(
    "options",
    [
        "--logging_steps 3 --logging_strategy steps --report_to none --disable_tqdm true --run_name other",
        "--dataloader_num_workers 1 --num_threads 2 --cache_images none --cache_dir elsewhere",
        "--eval_strategy epoch --save_strategy steps --save_steps 7 --save_total_limit 3 --save_only_model true",
        "--prediction_loss_only true --per_device_eval_batch_size 3 --eval_accumulation_steps 2",
        "--hub_model_id me/x --token hf_x --push_to_hub",
    ],
)
def test_what_cannot_change_the_result_does_not_block_a_run(tmp_path, options):
    output_dir = ["--output_dir", str(tmp_path / "run")]
    arguments = parse_arguments(output_dir, digits_recipe=DIGITS)
    claim_output_dir(arguments)
    record_run(arguments, {})
    (tmp_path / "run" / "checkpoint-1").mkdir()
    assert run_state(parse_arguments([*output_dir, *options.split()], digits_recipe=DIGITS)) == "interrupted"
    with pytest.raises(InputError, match="--learning_rate"):
        run_state(parse_arguments([*output_dir, "--learning_rate", "1"], digits_recipe=DIGITS))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in NUMBERS for value in ("nan", "inf", "-1e9", "1e400", "", "{}")),
        *((name, value) for name in COUNTS for value in ("-2", "1" + "0" * 30)),
        *((name, "0") for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs")),
    ],
)
def test_numbers_that_make_no_sense_are_refused(name, value):
    with pytest.raises(InputError, match=f"--{name}") as error:
        parse_arguments(["--dataset_name", "some/data", f"--{name}={value}"])
    assert "\n" not in str(error.value)


def test_teacher_and_student_of_different_kinds_have_each_its_defaults(tmp_path):
    def trained(line: str, *file) -> list[tuple]:
        run = parse(line, *file)
        return [(t.optim, t.learning_rate, t.num_train_epochs) for t in (run.training, run.for_teacher().training)]

    sgd, adamw = ("sgd", 0.1, 200), (BKDConfig("unused").optim, 5e-5, 3)
    data = "--dataset_name some/data"
    fresh_teacher = f"{data} --model_name_or_path some/vit --teacher_model_name_or_path cifar-resnet-32"
    fresh_student = f"{data} --model_name_or_path cifar-resnet-32 --teacher_model_name_or_path some/vit"
    assert trained(fresh_teacher) == [adamw, sgd]
    assert trained(fresh_student) == [sgd, adamw]
    assert trained(f"{fresh_student} --num_train_epochs 30") == [(*sgd[:2], 30), (*adamw[:2], 30)]
    assert trained(f"{fresh_student} --teacher_learning_rate 1e-3")[1] == (adamw[0], 1e-3, 3)
    assert trained(f"{fresh_student} --optim sgd --learning_rate 0.1 --num_train_epochs 9") == [("sgd", 0.1, 9)] * 2
    assert not parse(f"{fresh_student} --method ce").options_without_effect().keys() - {"teacher_model_name_or_path"}


def test_old_objects_are_spared_by_collections_until_the_end():
    class Ring:
        def __init__(self):
            self.itself = self

    gc.unfreeze()
    try:
        with collect_only_new_garbage():
            number = gc.get_freeze_count()
            new = weakref.ref(Ring())
            with collect_only_new_garbage():  # a run in a run
                pass
            assert gc.get_freeze_count() == number > 0
            gc.collect()
            assert new() is None
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()  # as it was
