"""Checks, before any work, which options of the trainer are incompatible or have no effect."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

from transformers.trainer_utils import HubStrategy

from .errors import InputError
from .machine import launcher_shards
from .methods import CLASSIFICATION_LOSSES, DISTILLATION_LOSSES, METHODS, PRIORS, Loss
from .objective import Objective
from .ranges import check_ranges
from .text import one_line

#: The registries of losses, by option.
LOSSES: dict[str, Mapping[str, Loss | None]] = {
    "classification_loss": CLASSIFICATION_LOSSES,
    "distillation_loss": DISTILLATION_LOSSES,
}
#: What `head` may be.
HEADS = ("linear", "cosine")
#: What `adapter` may be, beside `none`.
ADAPTERS = ("lora", "bitfit")
#: What `teacher_cache_dtype` may be.
DTYPES = ("float16", "float32")
_CHOICES: dict[str, Collection[str]] = {
    "head_init": ("random", "class_mean"),
    "empty_classes": ("error", "clamp"),
    "distillation_prior": PRIORS,
    "teacher_cache_dtype": DTYPES,
}
#: Options that may need a whole model on each process: the value that does not, and why others do.
_WHOLE_MODEL = {
    "ema_decay": (None, "left out with FSDP and DeepSpeed: no process has all the weights that it averages"),
    "adapter": (None, "left out with FSDP and DeepSpeed: no process has all the weights that it is merged into"),
    "head_init": ("random", "random with FSDP and DeepSpeed: no process has all the weights"),
    "feature_cache": ("off", "off with FSDP and DeepSpeed, which spread the head"),
}


def require(options: Any, holds: bool, name: str, condition: str) -> None:
    """Raise an `InputError` that names an option and its value, unless a condition holds."""
    if not holds:
        raise InputError(f"--{name} must be {condition}, got {one_line(getattr(options, name), 80)}.")


def check_together(options: Any, defaults: Mapping[str, Any]) -> None:
    """Check the loss arguments and ranges of a `BKDConfig`, and that its options are compatible.

    Args:
        options: The `BKDConfig`.
        defaults: The method's values of the options that choose a method and its losses.

    Raises:
        InputError: For the first option that is out of its range or incompatible.
    """
    _check_loss_arguments(options)
    check_ranges(options)
    check = functools.partial(require, options)
    for name, choices in _CHOICES.items():
        check(getattr(options, name) in choices, name, f"one of {', '.join(choices)}")
    check(options.adapter in (None, *ADAPTERS), "adapter", f"none, {' or '.join(ADAPTERS)}")
    for name in ("teacher_cache", "feature_cache"):
        check(bool(getattr(options, name)), name, "off, auto or a folder")
    if options.deepspeed or options.fsdp or launcher_shards():
        for name, (without, condition) in _WHOLE_MODEL.items():
            check(getattr(options, name) == without, name, condition)
    is_asked = options.deepspeed or launcher_shards("DEEPSPEED")
    is_there = not is_asked or importlib.util.find_spec("deepspeed") is not None
    check(is_there, "deepspeed", 'left out, or installed first: pip install "bkd_hf[deepspeed]"')
    _check_losses(options, defaults)
    _check_schedule(options)
    check(
        options.sampler != "class_balanced" or options.train_sampling_strategy == "random",
        "train_sampling_strategy",
        "random with --sampler class_balanced, which draws by itself",
    )
    check(
        HubStrategy(options.hub_strategy) in (HubStrategy.END, HubStrategy.EVERY_SAVE),
        "hub_strategy",
        "end: checkpoints with their optimizer states are not for others",
    )
    check(
        options.adapter is None or not options.freeze_backbone,
        "adapter",
        "left out with --freeze_backbone, which trains the head alone",
    )
    loss = DISTILLATION_LOSSES[options.distillation_loss]
    check(
        options.teacher_cache_top_k is None or loss is None or loss.top_k is not None,
        "teacher_cache_top_k",
        f"left out with --distillation_loss {options.distillation_loss}, which needs all of the teacher's logits",
    )
    check(
        options.student_init != "teacher" or options.head_init == "random",
        "head_init",
        "random with --student_init teacher, which takes over the teacher's head",
    )
    check(options.feature_cache == "off" or options.freeze_backbone, "feature_cache", "off without --freeze_backbone")
    check(options.label_names in (None, ["labels"]), "label_names", "left out: the labels of a batch are `labels`")
    check(
        options.save_strategy != "best" or options.metric_for_best_model is not None,
        "save_strategy",
        "no, steps or epoch without --metric_for_best_model",
    )


def _check_loss_arguments(options: Any) -> None:
    """Check the names in `…_loss_args` against the signature of the loss, which checks the values."""
    for part, registry in LOSSES.items():
        option, name = f"{part}_args", getattr(options, part)
        given, loss = getattr(options, option), registry[name]
        require(options, given is None or isinstance(given, dict), option, "a JSON object")
        if not given:
            continue
        shared, arguments = ({}, {}) if loss is None else (loss.shared, loss.arguments)
        known = [argument for argument in arguments if argument not in shared]
        for argument, value in given.items():
            if argument in shared:  # only settable by the shared option, which other code uses too
                raise InputError(f"--{option}: give {argument!r} of --{part} {name} by --{shared[argument]}.")
            if argument not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                raise InputError(f"--{option}: --{part} {name} has no argument {argument!r}; {takes}.")
            is_number = type(value) in (int, float)  # true is no number
            if type(arguments[argument]) in (int, float) and not is_number:
                raise InputError(f"--{option}: {argument} of {name} must be a number, got {json.dumps(value)}.")
        try:
            Objective(options, [1, 1, 1], has_teacher=part == "distillation_loss").try_out(part)
        except (TypeError, ValueError) as error:
            raise InputError(f"--{option} {json.dumps(given)}: {error}") from error


def _check_losses(options: Any, defaults: Mapping[str, Any]) -> None:
    check = functools.partial(require, options)
    power, tau = options.class_balance_power, options.logit_adjustment_tau
    if power == "measured" and options.distillation_loss not in ("bkd", "none"):
        loss = options.distillation_loss
        way_out = f"--method {loss}" if loss in METHODS else f"--method bkd --distillation_loss {loss}"
        raise InputError(
            f"--distillation_loss {loss} does not go with --method {options.method}: it has no class weights whose "
            f"power could be measured. Use {way_out}."
        )
    is_power = 0 <= power < math.inf if isinstance(power, float) else power in ("auto", "measured")
    check(is_power, "class_balance_power", "a finite number ≥ 0, auto or measured")
    check(
        options.distillation_loss == "bkd" or power == defaults["class_balance_power"],
        "class_balance_power",
        f"left out: --distillation_loss {options.distillation_loss} has no class weights that it could be a power of",
    )
    is_tau = math.isfinite(tau) if isinstance(tau, float) else tau == "auto"
    check(is_tau, "logit_adjustment_tau", "a finite number, or auto")
    check(
        tau != "auto" or options.distillation_loss == "bkd" or options.classification_loss != "logit_adjustment",
        "logit_adjustment_tau",
        f"a number with --distillation_loss {options.distillation_loss}, or another --method chosen: auto, as "
        "--method bkd-calibrated has it, is what the targets of bkd leave",
    )
    check(
        not options.label_smoothing_factor or "label_smoothing" in options.loss_arguments("classification_loss"),
        "label_smoothing_factor",
        f"0 with --classification_loss {options.classification_loss}, which knows no label smoothing",
    )
    is_ldam = options.classification_loss == "ldam"
    heads = HEADS[1:] if is_ldam else HEADS
    check(options.head in (None, *heads), "head", f"{' or '.join(heads)} with {options.classification_loss}")
    fits = not is_ldam or options.head_scale in (None, options.cosine_scale)
    check(fits, "head_scale", "left out with ldam, whose --ldam_scale it is")


def _check_schedule(options: Any) -> None:
    check = functools.partial(require, options)
    if options.lr_step_epochs is None:
        check(options.lr_step_factors is None, "lr_step_factors", "given together with --lr_step_epochs")
        check(options.lr_warmup_epochs == 0, "lr_warmup_epochs", "given together with --lr_step_epochs")
        return
    epochs, factors = options.lr_step_epochs, options.lr_step_factors or []
    increasing = all(a < b for a, b in pairwise(epochs))
    check(increasing and all(e >= 0 for e in epochs), "lr_step_epochs", "increasing numbers ≥ 0")
    check(len(factors) == len(epochs), "lr_step_factors", f"{len(epochs)} numbers, as lr_step_epochs has")
    check(all(0 <= f < math.inf for f in factors), "lr_step_factors", "finite numbers ≥ 0")


#: Options that may need random access to all images, and the values that do not.
_NOT_STREAMED: dict[str, tuple[Any, ...]] = {
    "teacher_cache": ("off",), "feature_cache": ("off",), "teacher_cache_views": (None,), "sampler": ("instance",),
    "train_sampling_strategy": ("random",), "head_init": ("random",), "head_bias": ("auto", "learned"),
    "imbalance_ratio": (None,), "max_train_samples": (None,), "cache_images": ("auto", "none"),
    "auto_find_batch_size": (False,), "export": ("none",),
}  # fmt: skip


def check_streaming(options: Mapping[str, Any], training: Any) -> None:
    """Raise an `InputError` if options of a run are incompatible with `--streaming`, or required ones are missing.

    Args:
        options: All options by name.
        training: The `BKDConfig` made from them.
    """
    if options["class_counts"] is None:
        raise InputError(
            "--streaming needs --class_counts FILE: how many images a class has is not known before. bkd-hf split "
            f"--dataset_name {one_line(options['dataset_name'], 80)} --count_only makes one."
        )
    if training.max_steps <= 0:
        raise InputError("--streaming needs --max_steps: a stream has no end. Give the number of optimizer steps.")
    for name, allowed in _NOT_STREAMED.items():
        value = getattr(training, name, options[name])
        if value not in allowed:
            raise InputError(
                f"--{name} {value} does not go with --streaming: it needs all images at hand. Leave it out."
            )
    by_accelerate = training.accelerator_config
    if by_accelerate.split_batches or by_accelerate.dispatch_batches:
        raise InputError("--accelerator_config: split_batches and dispatch_batches do not go with --streaming.")


def check_precision(options: Any) -> None:
    """Raise an `InputError` if the device of a `BKDConfig` does not support its precision."""
    if options.mixed_precision == "fp16" and options.device.type == "cpu":
        raise InputError(
            "--fp16 (--precision fp16) needs a GPU: a CPU would compute in fp32 all the same. Use --precision bf16 or "
            "fp32."
        )
    for precision in ("bf16", "fp16"):  # images stay in fp32, which weights of another type do not accept
        fits = not getattr(options, f"{precision}_full_eval") or options.mixed_precision == precision
        require(options, fits, f"{precision}_full_eval", f"left out, or given with --precision {precision}")


def check_checkpointing(options: Any) -> None:
    """Raise an `InputError` if activation checkpointing would keep gradients of a `BKDConfig` from its adapter."""
    given = options.activation_checkpointing_kwargs
    is_reentrant = options.activation_checkpointing and given is not None and given.get("use_reentrant", True)
    condition = f'{{"use_reentrant": false}} with --adapter {options.adapter}, which no gradient would reach'
    require(options, options.adapter is None or not is_reentrant, "activation_checkpointing_kwargs", condition)


def find_accumulation(options: Any) -> int:
    """Return the `gradient_accumulation_steps` that give the `global_batch_size` of a `BKDConfig`.

    Raises:
        InputError: If there are none, others are given, or something else determines the batches.
    """
    wanted, given = options.global_batch_size, options.gradient_accumulation_steps
    others = {"--auto_find_batch_size": options.auto_find_batch_size, "DeepSpeed": options.deepspeed_plugin}
    for name, holds in others.items():
        require(options, not holds, "global_batch_size", f"left out with {name}, which chooses batches itself")
    per_device, processes = options.per_device_train_batch_size, options.world_size
    steps, rest = divmod(wanted, per_round := per_device * processes)
    shown = f"{per_device} (--per_device_train_batch_size) × {processes} process{'es' if processes > 1 else ''}"
    if rest or not steps:
        near = {max(steps, 1) * per_round, (steps + 1) * per_round}
        ways = [f"--global_batch_size {number}" for number in sorted(near)]
        fitting = [n for n in range(1, min(per_device, 4096)) if wanted % (n * processes) == 0]
        ways += [f"--per_device_train_batch_size {number}" for number in fitting[-1:]]
        raise InputError(
            f"--global_batch_size {wanted} is no multiple of {shown} = {per_round}. Use {' or '.join(ways)}."
        )
    if given not in (1, steps):
        raise InputError(
            f"--gradient_accumulation_steps {given} does not go with --global_batch_size {wanted}, which needs "
            f"{steps} with {shown}. Leave one of them out."
        )
    return steps


def options_without_effect(
    options: Any, defaults: Mapping[str, Any], users: Mapping[str, Mapping[str, Collection[str]]]
) -> list[str]:
    """Return a line for each given option of a `BKDConfig` that has no effect.

    Args:
        options: The `BKDConfig`.
        defaults: The method's values of the options that choose a method and its losses.
        users: Which choices of which part of the method use an option, for options that not all use.
    """
    messages: list[str] = []

    def add(is_so: bool, given: str, why: str) -> None:
        if is_so:
            messages.append(f"--{given} has no effect: {why}.")

    has_momentum = options.momentum != 0 and options.optim.value != "sgd"
    add(has_momentum, f"momentum {options.momentum}", f"it belongs to --optim sgd, not {options.optim.value}")
    add(options.decay_all_parameters and options.weight_decay == 0, "decay_all_parameters", "--weight_decay is 0")
    has_scale = options.head_scale is not None and options.cosine_scale is None
    add(has_scale, f"head_scale {options.head_scale or 0:g}", "it belongs to --head cosine")
    has_decay = options.layer_decay is not None and options.freeze_backbone
    add(has_decay, "layer_decay", "--freeze_backbone trains the head alone")
    has_noise = options.neftune_noise_alpha is not None and options.freeze_backbone
    add(has_noise, "neftune_noise_alpha", "--freeze_backbone keeps its embeddings as they are")
    has_start = options.student_init == "teacher" and options.distillation_loss == "none"
    add(has_start, "student_init teacher", f"--method {options.method} has no teacher")
    for name in ("adapter_rank", "adapter_alpha", "adapter_target_modules"):
        is_given = getattr(options, name) is not None
        add(is_given and options.adapter != "lora", name, "it belongs to --adapter lora")
    for name, default in (("teacher_cache_top_k", None), ("teacher_cache_dtype", DTYPES[0])):
        value = getattr(options, name)
        add(value != default and options.teacher_cache == "off", f"{name} {value}", "--teacher_cache is off")
    for name, used_by in users.items():
        value = getattr(options, name)
        is_used = any(getattr(options, part) in choices for part, choices in used_by.items())
        belongs_to = " or ".join(f"--{part} {'|'.join(choices)}" for part, choices in used_by.items())
        shown = value if value is None or isinstance(value, (str, bool)) else f"{value:g}"
        add(value != defaults[name] and not is_used, f"{name} {shown}", f"it belongs to {belongs_to}")
    return [*messages, *_never_reached(options)]


def _never_reached(options: Any) -> list[str]:
    """Settings that would start only after the end of the training, or are overridden."""
    messages, epochs = [], math.inf if options.max_steps > 0 else options.num_train_epochs
    starts = {
        "deferred_reweighting_start": options.distillation_loss == "bkd",
        "class_weighting_start": options.class_weighting == "drw",
    }
    for name, is_used in starts.items():
        start = getattr(options, name)
        if not is_used or start is None:
            continue
        zero = "class_balance_beta" if options.class_balance_beta == 0 else None
        if name == "deferred_reweighting_start" and options.class_balance_power == 0:
            zero = "class_balance_power"
        if zero is not None:
            messages.append(f"--{name} {start:g} has no effect: with --{zero} 0 the weights are uniform all the time.")
        elif start >= max(1, epochs):
            messages.append(
                f"--{name} {start:g} is never reached: training ends after {epochs:g} epochs, with uniform weights "
                "throughout."
            )
    if options.distillation_loss == "dkd" and options.dkd_warmup_epochs > epochs:
        messages.append(
            f"--dkd_warmup_epochs {options.dkd_warmup_epochs} is longer than the training: dkd never gets its full "
            f"weight in {epochs:g} epochs."
        )
    if not options.uses_step_decay:
        return messages
    if str(options.lr_scheduler_type.value) != "linear" or options.warmup_steps:
        messages.append(
            "--lr_scheduler_type and --warmup_steps have no effect: --lr_step_epochs chooses the step-decay schedule."
        )
    first = min(options.lr_step_epochs or [], default=math.inf)
    if options.lr_warmup_epochs > 0 and first <= options.lr_warmup_epochs:
        messages.append(
            f"--lr_warmup_epochs {options.lr_warmup_epochs:g} is not below the first of --lr_step_epochs ({first:g}): "
            "the warm-up goes before, so steps in it are skipped and the full rate is not held."
        )
    if late := [epoch for epoch in options.lr_step_epochs if epoch >= epochs]:
        messages.append(
            f"--lr_step_epochs {' '.join(map(str, late))} are never reached: training ends after {epochs:g} epochs."
        )
    return messages
