"""Valid ranges of the options, including those of `transformers.TrainingArguments`, which checks only few."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import InputError
from .machine import available_cores
from .text import one_line

_MAX_WORKERS = max(64, 8 * available_cores())

_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "a finite number > 0",
        lambda value: 0 < value < math.inf,
        "temperature ldam_scale head_scale adapter_alpha dive_temperature dive_power dkd_temperature num_train_epochs "
        "logging_steps save_steps eval_steps",
    ),
    (
        "a finite number ≥ 0",
        lambda value: 0 <= value < math.inf,
        "distillation_weight class_weighting_start deferred_reweighting_start focal_gamma ldam_max_margin dkd_alpha "
        "dkd_beta dkd_warmup_epochs learning_rate head_learning_rate weight_decay adam_epsilon max_grad_norm "
        "warmup_steps eval_delay lr_warmup_epochs",
    ),
    ("a finite number ≥ 1", lambda value: 1 <= value < math.inf, "imbalance_ratio"),
    ("a finite number", math.isfinite, "post_hoc_tau"),
    ("above 0 and below 1", lambda value: 0 < value < 1, "ema_decay"),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, "layer_decay"),
    ("in [0, 1]", lambda value: 0 <= value <= 1, "dive_alpha"),
    (
        "in [0, 1)",
        lambda value: 0 <= value < 1,
        "class_balance_beta label_smoothing_factor momentum adam_beta1 adam_beta2",
    ),
    (
        "at least 1",
        lambda value: value >= 1,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps "
        "dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout save_total_limit teacher_cache_views num_threads "
        "teacher_cache_top_k shuffle_buffer_size max_train_samples max_eval_samples max_class_count adapter_rank "
        "global_batch_size",
    ),
    ("at least 8", lambda value: value >= 8, "image_size max_length"),
    ("-1 (no limit) or at least 1", lambda value: value == -1 or value >= 1, "max_steps"),
    ("-1 (as many as speed it up) or more", lambda value: value >= -1, "dataloader_num_workers"),
    (
        f"at most {_MAX_WORKERS} on this machine",
        lambda value: value <= _MAX_WORKERS,
        "dataloader_num_workers num_threads",
    ),
    ("at most 4096", lambda value: value <= 4096, "image_size"),
    ("at most 131072", lambda value: value <= 2**17, "max_length"),
    ("at most 1,000,000", lambda value: value <= 10**6, "dataloader_prefetch_factor ddp_bucket_cap_mb"),
    ("in 0 to 4294967295", lambda value: 0 <= value < 2**32, "seed data_seed split_seed"),
    # Numbers too large for a library's 64 bits.
    (
        "at most 1e18",
        lambda value: value <= 10**18,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps "
        "max_steps num_train_epochs warmup_steps logging_steps save_steps eval_steps ddp_timeout teacher_cache_views "
        "max_train_samples max_eval_samples max_class_count many_shot_threshold few_shot_threshold dkd_warmup_epochs "
        "lr_warmup_epochs global_batch_size teacher_cache_top_k shuffle_buffer_size",
    ),
)


def check_ranges(options: Any) -> None:
    """Raise an `InputError` for the first option of an object that is out of its range; `None` means not given."""
    for condition, holds, names in _RANGES:
        for name in names.split():
            value = getattr(options, name, None)
            if value is not None and not holds(value):
                raise InputError(f"--{name} must be {condition}, got {value}.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise an `InputError` if an option's value is not one of its choices."""
    if value not in choices:
        raise InputError(f"--{name} must be one of {', '.join(choices)}, got {one_line(value, 80)!r}.")


def explain(
    error: Exception, values: Mapping[str, Any], defaults: Mapping[str, Any], attempt: Callable[[dict], Any]
) -> InputError:
    """Turn a library's error about some options into one line, naming the option without which it disappears.

    Args:
        error: The exception.
        values: The options by name.
        defaults: Their defaults.
        attempt: Called with other values; raises an exception, or does not.
    """
    if isinstance(error, InputError):
        return error
    why = one_line(error, 300).rstrip(".") or type(error).__name__
    for name, value in reversed(list(values.items())):  # the more specific options come last
        if name in defaults and value != defaults[name]:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    attempt({**values, name: defaults[name]})
            except Exception:
                continue
            shown = " ".join(map(str, value)) if isinstance(value, list) else getattr(value, "value", value)
            return InputError(
                f"--{name} {one_line(shown, 80)} cannot be used: {why}. Choose another value, or leave it out."
            )
    return InputError(f"The options do not go together: {why}.")


def defaults_of(cls: type) -> dict[str, Any]:
    """Return the defaults of the fields of a dataclass."""
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(cls)
    }
