"""Option cases of the fault campaign: the options, the exit code, and a word that the error line must contain.

This is plain data made from tables of values; `tests/campaign.py` runs it. For a case without an error (exit code 0),
the word must be in the output.
"""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """One call of `scripts/run_bkd.py`.

    Attributes:
        argv: What follows the script; `{file}` stands for the file with `content`, `{folder}` for a new folder.
        exit_code: 2 for bad input.
        word: What the line of the error must contain.
        content: Of the file, if there is one.
        environment: Variables to set.
    """

    argv: tuple[str, ...]
    exit_code: int
    word: str
    content: bytes | None = None
    environment: dict[str, str] = {}  # noqa: RUF012 (a constant)


_FOLDER = ("--output_dir", "{folder}")
_NOT_FINITE = ("nan", "inf", "-inf", "1e400")
_WORDS = ("", "foo", "{}", "[]", "ünï", "x" * 5000)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_COUNTS = _names("""
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps
    max_train_samples max_eval_samples max_class_count teacher_cache_views num_threads
""")
_SEEDS = _names("seed data_seed split_seed")
_POSITIVE = _names("num_train_epochs logging_steps save_steps eval_steps temperature ldam_scale dive_temperature")
_NOT_NEGATIVE = _names("""
    learning_rate head_learning_rate weight_decay adam_epsilon max_grad_norm warmup_steps eval_delay focal_gamma
    distillation_weight dkd_alpha dkd_beta deferred_reweighting_start class_weighting_start
""")
_BELOW_ONE = _names("adam_beta1 adam_beta2 momentum class_balance_beta label_smoothing_factor")
_BOOLEANS = _names("horizontal_flip bf16 torch_compile load_best_model_at_end dataloader_drop_last use_cpu")
_CHOICES = _names("""
    method precision optim lr_scheduler_type eval_strategy save_strategy logging_strategy log_level debug
    train_augmentation train_operations imbalance_profile cache_images hub_strategy train_sampling_strategy ddp_backend
""")
_DICTIONARIES = _names("lr_scheduler_kwargs activation_checkpointing_kwargs classification_loss_args")

_VALUES = [
    *((name, value) for name in (*_COUNTS, *_SEEDS) for value in ("-1", "0.5", "nan", "1" + "0" * 30, *_WORDS[:3])),
    *((name, "0") for name in _COUNTS),
    *((name, value) for name in _POSITIVE for value in ("0", "-1", *_NOT_FINITE, *_WORDS[:2])),
    *((name, value) for name in _NOT_NEGATIVE for value in ("-1", *_NOT_FINITE, *_WORDS[:2])),
    *((name, value) for name in _BELOW_ONE for value in ("1", "-0.1", *_NOT_FINITE, *_WORDS[:2])),
    *((name, value) for name in _BOOLEANS for value in ("2", "perhaps", *_WORDS[2:])),
    *((name, value) for name in _CHOICES for value in _WORDS[1:]),
    *((name, value) for name in _DICTIONARIES for value in ("{", "7", "[]", "foo", '"a"')),
    ("max_steps", "0"), ("max_steps", "-2"), ("dataloader_num_workers", "-2"), ("dataloader_num_workers", "100000"),
    ("num_threads", "100000"), ("image_size", "7"), ("image_size", "100000"), ("imbalance_ratio", "0.5"),
    ("post_hoc_tau", "nan"), ("few_shot_threshold", "1000"), ("report_to", "nonesuch"), ("optim", "adamw_8bit"),
    ("optim", "lion_8bit"), ("optim", "galore_adamw"), ("optim_args", "foo"), ("accelerator_config", '{"a": 1}'),
    ("accelerator_config", "nowhere.json"), ("deepspeed", "nowhere.json"), ("fsdp", "full_shard"),
    ("save_strategy", "best"), ("label_names", "foo"), ("bf16_full_eval", "true"), ("fp16_full_eval", "true"),
    ("use_liger_kernel", "true"), ("neftune_noise_alpha", "5"), ("torch_compile_backend", "nonesuch"),
    ("torch_compile_mode", "nonesuch"), ("teacher_label_map", "nowhere.json"),
    ("teacher_cache", "/dev/null/x"), ("output_dir", "/dev/null"), ("output_dir", "x" * 5000),
    ("dataset_name", "x" * 5000), ("teacher_model_name_or_path", "x" * 5000), ("class_balance_power", "foo"),
    ("logit_adjustment_tau", "foo"), ("distillation_loss_args", "{"), ("config", "nowhere.yaml"), ("config", ""),
    ("teacher_optim", "adamw_8bit"), ("teacher_num_train_epochs", "0"), ("teacher_seed", "-1"),
]  # fmt: skip

# Content of --config, and what the error says.
_YAMLS: list[tuple[str | bytes, str]] = [
    ("", "option: value"), ("- a\n", "option: value"), ("a: b: c\n", "no YAML"), ("a: [\n", "no YAML"),
    ("\tseed: 1\n", "no YAML"), ("seed: 1\nseed: 2\n", "twice"), ("alpha: 1\ndistillation_weight: 2\n", "twice"),
    ("teacher:\n  seed: 1\n  seed: 2\n", "twice"), ("teacher:\n  1: 2\n", "--1"), ("1: 2\n", "'1'"),
    ("teacher: 3\n", "teacher"), ("teacher:\n  temperature: 2\n", "temperature"), ("? [a]\n: 1\n", "name"),
    ("lr_scheduler_kwargs: {a: 1, a: 2}\n", "twice"), ("temprature: 2\n", "temperature"), ("seed: 7e4\n", "seed"),
    ("seed: 1.0\n", "seed"), ("seed: [1]\n", "seed"), ("seed: {a: 1}\n", "seed"), ("seed: .inf\n", "seed"),
    ("learning_rate: .nan\n", "learning_rate"), ("learning_rate: 1:30\n", "learning_rate"),
    ("horizontal_flip: perhaps\n", "horizontal_flip"), ("run_name: ''\n", "run_name"),
    ("seed: !!python/name:os.x\n", "seed"),
    ("lr_step_epochs: [1, a]\n", "lr_step_epochs"), ("a: " + "[" * 5000, "no YAML"), ("&a [*a]\n", "option: value"),
    ("run_name: Zürich\n".encode("latin-1"), "UTF-8"), ("seed: 1\n".encode("utf-16"), "UTF-8"),
    (b"seed: \x00\n", "no YAML"), (b"\xff\xfe\x00", "UTF-8"),
]  # fmt: skip

#: All cases.
CASES = [
    *(
        Case((*(() if name == "output_dir" else _FOLDER), f"--{name}={value}"), 2, name)
        for name, value in _VALUES
    ),
    *(
        Case((*_FOLDER, "--config", "{file}"), 2, word, text if isinstance(text, bytes) else text.encode())
        for text, word in _YAMLS
    ),
    Case((*_FOLDER, "--teacher_cache", "{folder}", "--sampler", "class_balanced"), 2, "teacher_cache"),
    Case((*_FOLDER, "--freeze_backbone", "true"), 2, "freeze_backbone"),
    Case((*_FOLDER, "--precision", "fp32", "--bf16", "true"), 2, "contradict"),
    Case((*_FOLDER, "--precision", "fp16", "--use_cpu", "true"), 2, "fp16"),
    Case((*_FOLDER, "--dataset_name", "some/data"), 2, "precision", environment={"ACCELERATE_MIXED_PRECISION": "fp8"}),
    Case((*_FOLDER, "--student_init", "teacher", "--teacher_model_name_or_path", "cifar-resnet-14"), 2, "--student"),
    *(
        Case((*_FOLDER, "--config", "{file}"), 2, "nowhere-else", f"{name}: {value}\n".encode()
             + b"dataset_name: ./nowhere-else\n")
        for name, value in (
            ("teacher_cache", "off"), ("horizontal_flip", "off"), ("disable_tqdm", "on"), ("seed", "010"),
            ("run_name", "no"), ("run_name", "7e4"), ("learning_rate", "7e-4"), ("learning_rate", "null"),
        )
    ),
]  # fmt: skip
