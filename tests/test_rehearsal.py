"""Invalid options are rejected before any work, in one line."""

from __future__ import annotations

import json

import pytest
import torch._inductor.config

from bkd_hf import InputError, load_processor
from bkd_hf.arguments import parse_arguments
from bkd_hf.rehearsal import check_before_work, rehearse
from tests.conftest import REPOSITORY
from tests.tiny_models import tiny_vit

DIGITS = REPOSITORY / "scripts" / "recipes" / "digits.yaml"
# Without the recipe, whose step-decay schedule replaces all others.
PLAIN = ("--dataset_name", "some/data")


def check(*options: str) -> None:
    check_before_work(parse_arguments([*options, "--use_cpu", "true"], digits_recipe=DIGITS))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--method", "bkd", "--teacher_learning_rate", "1"],
        ["--learning_rate", "1e30"],  # may diverge, which the training finds out
        ["--prediction_loss_only", "true"],
        ["--precision", "bf16", "--bf16_full_eval", "true"],
        [
            "--save_strategy",
            "epoch",
            "--eval_strategy",
            "epoch",
            "--load_best_model_at_end",
            "true",
            "--metric_for_best_model",
            "few_shot_accuracy",
        ],
        ["--eval_strategy", "epoch", "--save_strategy", "best", "--metric_for_best_model", "accuracy"],
        [*PLAIN, "--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "epoch"],
        [*PLAIN, "--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-6}'],
        [*PLAIN, "--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 10}'],
        ["--optim", "adafactor", "--optim_args", "scale_parameter=False,relative_step=False"],
        ["--accelerator_config", '{"dispatch_batches": true, "split_batches": false}'],
        ["--max_grad_norm", "1", "--full_determinism", "false", "--torch_empty_cache_steps", "2"],
        ["--include_for_metrics", "loss", "inputs", "--batch_eval_metrics", "true", "--debug", "underflow_overflow"],
        ["--skip_memory_metrics", "false", "--dataloader_num_workers", "2", "--dataloader_prefetch_factor", "3"],
        ["--gradient_accumulation_steps", "7", "--dataloader_drop_last", "true", "--sampler", "class_balanced"],
    ],
    ids=" ".join,
)
def test_what_works_is_not_refused(tmp_path, options):
    check(*options, "--output_dir", str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_a_cache_in_the_output_folder_does_not_occupy_it(tmp_path):
    check("--method", "bkd", "--output_dir", str(tmp_path / "run"), "--teacher_cache", str(tmp_path / "run" / "cache"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--report_to", "nonesuch"], "--report_to nonesuch cannot be used: nonesuch is not supported"),
        (["--optim", "adamw_8bit"], "--optim adamw_8bit cannot be used: You need to install `bitsandbytes`"),
        (["--optim_args", "foo"], "--optim_args foo"),
        ([*PLAIN, "--lr_scheduler_type", "cosine_with_min_lr"], "--lr_scheduler_type cosine_with_min_lr"),
        ([*PLAIN, "--lr_scheduler_kwargs", '{"a": 1}'], "--lr_scheduler_kwargs"),
        (["--lr_scheduler_kwargs", "7"], "--lr_scheduler_kwargs must be a JSON object"),
        (["--train_sampling_strategy", "group_by_length"], "--train_sampling_strategy group_by_length"),
        (["--use_liger_kernel", "true"], "--use_liger_kernel True"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha 5.0"),
        (["--torch_compile_backend", "nonesuch"], "--torch_compile_backend nonesuch"),
        (["--torch_compile_mode", "nonesuch"], "--torch_compile_mode nonesuch"),
        (["--accelerator_config", '{"a": 1}'], "--accelerator_config"),
        (["--accelerator_config", "nowhere.json"], "--accelerator_config nowhere.json"),
        (["--ddp_backend", "nccl"], "--ddp_backend nccl"),
        (["--deepspeed", "nowhere.json"], "--deepspeed must be left out, or installed first: "),
        (["--fsdp", "full_shard"], "--fsdp"),
        (["--save_strategy", "best"], "--save_strategy must be no, steps or epoch without --metric_for_best_model"),
        (["--load_best_model_at_end", "true", "--eval_strategy", "no"], "--load_best_model_at_end"),
        (["--label_names", "foo"], "--label_names must be left out"),
        (["--bf16_full_eval", "true", "--precision", "fp32"], "--bf16_full_eval must be left out, or given with"),
        (["--fp16_full_eval", "true"], "--fp16_full_eval must be left out"),
        (["--teacher_cache", "/dev/null/x"], "--teacher_cache /dev/null/x cannot be written"),
        (
            ["--teacher_cache", "/x", "--sampler", "class_balanced"],
            "--teacher_cache /x needs --sampler instance",
        ),
        (["--freeze_backbone", "true"], "--freeze_backbone: cifar-resnet-8 starts from fresh weights"),
        (["--output_dir", "x" * 5000], "--output_dir xxx"),
        (["--dataset_name", "x" * 5000], "--dataset_name xxx"),
        (["--teacher_model_name_or_path", "x" * 5000], "--teacher_model_name_or_path xxx"),
        (["--model_name_or_path", "no/where"], "The model no/where cannot be loaded"),
        (["--model_name_or_path", "cifar-resnet-6000000000000002"], "cannot be loaded"),
        (["--model_name_or_path", "cifar-resnet-600002"], "There is no cifar-resnet-600002"),
        (["--teacher_model_name_or_path", "no/where"], "The teacher 'no/where' cannot be loaded"),
        (["--teacher_optim", "adamw_8bit"], "--teacher_optim adamw_8bit cannot be used"),
        (["--teacher_per_device_train_batch_size", "0"], "--teacher_per_device_train_batch_size must be at least 1"),
        (["--teacher_model_name_or_path", "no/where", "--teacher_label_map", "/dev/null"], "/dev/null is no JSON"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_options_are_refused_before_any_work(options, message):
    with pytest.raises(InputError) as error:
        check(*options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "vit", "hidden_size": "foo"}'),
        ("config.json", b'{"model_type": "nonesuch"}'),
        ("config.json", b"[]"),
        ("config.json", '{"é": 1}'.encode("latin-1")),
        ("model.safetensors", b"garbage"),
        ("model.safetensors", b""),
        ("preprocessor_config.json", b"{"),
        ("preprocessor_config.json", b'{"size": "foo"}'),
    ],
)
def test_garbage_in_a_folder_is_one_line(tmp_path, name, content):
    from bkd_hf import load_classifier, load_teacher

    names = ["a", "b", "c"]
    tiny_vit(0, 3).save_pretrained(tmp_path)
    load_processor("cifar-resnet-8", 8).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    attempts = {
        "config.json": [
            lambda: check("--model_name_or_path", str(tmp_path)),
            lambda: check("--teacher_model_name_or_path", str(tmp_path)),
            lambda: load_classifier(str(tmp_path), names),
        ],
        "model.safetensors": [lambda: load_classifier(str(tmp_path), names), lambda: load_teacher(str(tmp_path))],
        "preprocessor_config.json": [lambda: load_processor(str(tmp_path))],
    }
    for attempt in attempts[name]:
        with pytest.raises(InputError) as error:
            attempt()
        assert "cannot be loaded" in str(error.value)
        assert "\n" not in str(error.value)


def test_rehearsal_leaves_no_trace(tmp_path):
    arguments = parse_arguments(["--output_dir", str(tmp_path / "run"), "--use_cpu", "true"], digits_recipe=DIGITS)
    before = json.dumps(arguments.training.to_dict(), default=str)
    rehearse(arguments.training)
    assert json.dumps(arguments.training.to_dict(), default=str) == before
    assert not list(tmp_path.iterdir())


def test_a_machine_without_a_compiler_is_named(tmp_path):
    arguments = parse_arguments(
        ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--torch_compile", "true"], digits_recipe=DIGITS
    )
    with (
        torch._inductor.config.patch({"cpp.cxx": ("nonesuch",), "force_disable_caches": True}),
        pytest.raises(InputError, match=r"--torch_compile cannot work on this machine: .*nonesuch"),
    ):
        rehearse(arguments.training)


@pytest.mark.parametrize("option", [("--train_sampling_strategy", "group_by_length"), ("--neftune_noise_alpha", "5")])
def test_texts_are_rehearsed_on_texts(tmp_path, option):
    text = ("--task", "text", "--dataset_name", "docstrings", "--output_dir", str(tmp_path / "run"))
    check(*text, *option)
    with pytest.raises(InputError, match=option[0]):
        check(*option, "--output_dir", str(tmp_path / "run"))


@pytest.mark.parametrize(("option", "place"), [("model_name_or_path", ""), ("teacher_model_name_or_path", "teacher")])
def test_overwrite_deletes_no_model_that_the_run_starts_from(tmp_path, option, place):
    folder = tmp_path / place
    tiny_vit(0, num_labels=10, image_size=16).save_pretrained(folder)
    words = (f"--{option}", str(folder), "--method", "bkd", "--output_dir")
    with pytest.raises(InputError, match=f"--{option} .* is in --output_dir .*, whose run --overwrite would delete"):
        check(*words, str(tmp_path), "--overwrite")
