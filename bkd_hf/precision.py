"""`--precision auto` on a CPU with bf16 instructions: the faster of fp32 and bf16, as measured on the student.

Even with bf16 instructions, not every model becomes faster: large matrix products do, depthwise convolutions and tiny
layers become slower. So training steps are timed once per model, batch and machine, and the result is cached.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from torch import nn
from transformers import PreTrainedTokenizerBase

from .adapters import add_adapter
from .files import try_json, write_text
from .head import prepare_head
from .inputs import Inputs
from .options import RunArguments
from .results import cpu_name
from .tasks import TASKS, task_of_model
from .views import output_size

#: Least speed-up of bf16 over fp32 that is worth the lost digits; less is noise.
LEAST_GAIN = 1.1
#: File of the measured rates, by everything they depend on.
CACHE = Path(constants.HF_HOME) / "bkd_hf" / "precision.json"

_MEASURED = ("fp32", "bf16")
_LONG_ENOUGH = 0.2  # seconds of a step for a reliable time
_BUDGET = 1.5  # seconds for such steps
_MAX_ROUNDS = 5


def seconds_of_step(model: nn.Module, inputs: torch.Tensor, precision: str) -> float:
    """Time of one forward and backward pass of a classifier, in seconds.

    Args:
        model: Returns B×C logits; its gradients are deleted.
        inputs: B×3×H×W images, or B×L numbers of tokens.
        precision: `"fp32"` or `"bf16"` (mixed precision, by autocast).
    """
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = model(**{TASKS[task_of_model(model)].main_input: inputs}).logits
    logits.float().logsumexp(-1).mean().backward()  # costs as much as any loss
    elapsed = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return elapsed


def measure_rates(step: Callable[[str, int], float], batch_size: int) -> dict[str, float]:
    """Return how many images per second each precision trains, measured in at most about three seconds.

    The steps use the whole batch, or as many of its images as take a fifth of a second. The two precisions take turns,
    and the fastest step counts, to reduce noise. A slow model gets fewer steps, with at least two images.

    Args:
        step: Takes a precision and a number of images; returns the seconds of a step.
        batch_size: Batch size of the training on one device.
    """

    def both(num_images: int) -> dict[str, float]:
        return {precision: step(precision, num_images) for precision in _MEASURED}

    def slower(num_images: int) -> float:
        seconds = max(both(num_images).values())
        loads = _LONG_ENOUGH <= seconds < 5 * _LONG_ENOUGH  # possibly: the first step of a shape creates its kernels
        return max(both(num_images).values()) if loads else seconds

    num_images = min(2, batch_size)  # one alone is too few for BatchNorm
    while (seconds := slower(num_images)) < _LONG_ENOUGH and num_images < batch_size:
        num_images = min(2 * num_images, batch_size)
    num_rounds = max(1, min(_MAX_ROUNDS, int(_BUDGET / max(2 * seconds, 1e-9))))
    rounds = [both(num_images) for _ in range(num_rounds)]
    return {precision: num_images / min(each[precision] for each in rounds) for precision in _MEASURED}


def faster_precision(rates: dict[str, float]) -> str:
    """Return `"bf16"` if it is faster than fp32 by more than noise, else `"fp32"`."""
    return "bf16" if rates["bf16"] >= LEAST_GAIN * rates["fp32"] else "fp32"


def settle_precision(options: RunArguments, model: nn.Module, inputs: Inputs) -> None:
    """Choose the precision of a run by measurement, if its options ask for that; all processes must call it.

    The main process measures, or reads an earlier measurement, and decides for all. Teacher and student share it.

    Args:
        options: The run's arguments; sets the precision of the run and of its teacher's run.
        model: The student, before adding an adapter or freezing; it is not changed.
        inputs: The run's inputs.
    """
    if not options.measures_precision:
        return
    shape = _shape_of_example(inputs)
    with torch.random.fork_rng(devices=[]):
        args, twin = options.training, copy.deepcopy(model)
        if args.adapter is not None:
            add_adapter(twin, args)
        prepare_head(twin, args)
        batch_size, is_main = args.per_device_train_batch_size, args.process_index == 0
        found = [_rates(twin.train(), shape, batch_size) if is_main else {}]
    rates = options.precision_rates = broadcast_object_list(found)[0]
    precision = faster_precision(rates)
    _set_precision(options, precision)
    shown = ", ".join(f"{rate:,.1f} in {name}" for name, rate in rates.items())
    inputs.say(f"Precision: {precision}. Examples a second of a training step, measured on this machine: {shown}.")


def share_precision(options: RunArguments) -> None:
    """Share the precision that the main process found in its folder, or that it is still to be measured."""
    told = options.measures_precision, options.training.bf16, options.precision_rates
    measures, is_bf16, options.precision_rates = broadcast_object_list([told])[0]
    if (measures, is_bf16) != told[:2]:
        _set_precision(options, "bf16" if is_bf16 else "fp32")
        options.measures_precision = measures


def _set_precision(options: RunArguments, precision: str) -> None:
    options.measures_precision = False
    for told in options.with_teacher:
        told.options["bf16"] = told.training.bf16 = precision == "bf16"
        told.training.mixed_precision = "bf16" if told.training.bf16 else "no"
    AcceleratorState._reset_state()  # accelerate would keep the precision of the first model, the rehearsal's


def _shape_of_example(inputs: Inputs) -> tuple[int, ...]:
    """3×H×W of an image; the usual number of tokens of a text."""
    if isinstance(inputs.processor, PreTrainedTokenizerBase):
        return (inputs.images["train"].usual_length,)
    return (3, *output_size(inputs.processor))


def _rates(model: nn.Module, shape: tuple[int, ...], batch_size: int) -> dict[str, float]:
    """Return cached rates, or measure them, one process of a machine at a time."""

    def step(precision: str, num_images: int) -> float:
        return seconds_of_step(model, examples[:num_images], precision)

    # For texts only the length matters.
    examples = torch.randn(batch_size, *shape) if len(shape) == 3 else torch.full((batch_size, *shape), 2)
    key = _key(model, shape, batch_size)
    try:
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(CACHE.with_suffix(".lock")):
            known = try_json(CACHE) or {}
            if not _is_whole(known.get(key)):
                known[key] = measure_rates(step, batch_size)
                write_text(CACHE, json.dumps(known, indent=1))
            return known[key]
    except OSError:  # the folder cannot be written, so each run measures
        return measure_rates(step, batch_size)


def _is_whole(rates: Any) -> bool:
    values = [rates.get(precision) for precision in _MEASURED] if isinstance(rates, dict) else [None]
    return all(isinstance(value, float) and 0 < value < math.inf for value in values)


def _key(model: nn.Module, shape: tuple[int, ...], batch_size: int) -> str:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # A module's repr lists its layers with their sizes and strides.
    told = repr(model), trained, shape, batch_size, cpu_name(), torch.get_num_threads(), torch.__version__
    return blake2b(repr(told).encode(), digest_size=16).hexdigest()
