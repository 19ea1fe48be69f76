"""`results.json`: the only interface between a run and everything that reports on it.

The types in `bkd_hf.schema` describe its parts, and check a file when it is read.

It contains no absolute paths and no user names: a local model or data set is recorded by the name of its folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from . import __version__
from .config import BKDConfig
from .data import LABEL_COLUMN, class_counts, shared_fingerprint
from .errors import InputError
from .files import replacing
from .machine import precision_of
from .methods import is_balanced_by
from .metrics import (
    FEW_SHOT_THRESHOLD,
    MANY_SHOT_THRESHOLD,
    LongTailAccumulator,
)
from .options import OPTIONS, WITHOUT_INFLUENCE, options_with
from .program import program
from .reading import read_json
from .schema import HUB_ID, find_fault
from .sharding import bare_type
from .sources import DEMOS
from .tasks import DEFAULT_TASK, fresh_task, task_of_columns
from .teacher import FrozenTeacher
from .text import one_line

RESULTS_NAME = "results.json"
SCHEMA_VERSION = 1
#: Files of the exported student (see `bkd_hf.onnx_export`).
ONNX_FILES = {"onnx": "onnx/model.onnx", "int8": "onnx/model_quantized.onnx"}

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "numpy", "scikit-learn")
# Matches folders in the text of an option, such as JSON.
_FOLDERS = re.compile(r"""(?<![\w.:/~-])~?/(?:[^\s"',;:/]+/)*""")
# With those of the scripts: --from.
_FOLDER_OPTIONS = options_with("path") | {"config", "from"}
_OF_PUBLISHING = options_with("publishing")
_SECRETS = options_with("secret")
# Neither results nor relevant to others.
_NOT_RECORDED = _OF_PUBLISHING | (options_with("path") & WITHOUT_INFLUENCE)


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a `results.json`.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        InputError: If it does not exist, is no results file, or has another schema version.
    """
    path = Path(path)
    path = path / RESULTS_NAME if path.is_dir() else path
    if not path.exists():
        raise InputError(f"There is no {path}: the run is not finished, or this is no output folder.")
    results = _without_nan(read_json(path))
    check_schema(results, path, adds_up=True)
    return results


def check_schema(results: Any, source: str | os.PathLike[str] = "This run", adds_up: bool = False) -> None:
    """Check that something is the content of a `results.json` of this version.

    Args:
        results: The content as read.
        source: Its source, for the message.
        adds_up: Whether sums and means must be consistent (see [`find_fault`]).

    Raises:
        InputError: If it has another schema version, or does not match `bkd_hf.schema`.
    """
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{source} has schema version {one_line(repr(version), 40)}; this version of bkd_hf ({__version__}) reads "
            f"{SCHEMA_VERSION}. Run it anew (with --overwrite), or use the version of bkd_hf that wrote it."
        )
    if fault := find_fault(_without_nan(results), adds_up):
        raise InputError(f"{source} {fault}. Run it anew (with --overwrite).")


def save_json(content: Any, path: str | os.PathLike[str]) -> None:
    """Write JSON atomically: a reader finds the old file or the complete new one.

    NaN and infinity, which JSON does not have, are written as `null`.
    """
    text = json.dumps(_without_nan(content), indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as unfinished:
        # Lone surrogates, which UTF-8 does not allow, are written as JSON escapes.
        unfinished.write_bytes((text + "\n").encode("utf-8", "backslashreplace"))


def describe_data(
    name: str,
    train: Any,
    evaluation: datasets.Dataset,
    many_shot_threshold: int,
    few_shot_threshold: int,
) -> dict[str, Any]:
    """Return the `data` section of a run (counts as in [`describe_classes`]); all processes must call it."""
    names, of_training, of_evaluation = (
        train.features[LABEL_COLUMN].names,
        getattr(train, "class_counts", None) or class_counts(train),  # given for streams
        class_counts(evaluation),
    )
    split = None if evaluation.split is None else str(evaluation.split)
    return {
        **describe_classes(names, of_training, of_evaluation, many_shot_threshold, few_shot_threshold),
        "name": without_folders(name),
        "hub_id": hub_id(name),
        "eval_split": "train" if split and evaluation.split == train.split else split,
        "fingerprint": getattr(train, "fingerprint", None) or shared_fingerprint(train),
        "eval_fingerprint": shared_fingerprint(evaluation),
        **described_task(task_of_columns(evaluation.column_names).name),
    }


def described_task(task: str) -> dict[str, str]:
    """Return the `data` section's entry for the task; none for images, the only task of older results."""
    return {} if task == DEFAULT_TASK else {"task": task}


def describe_classes(
    class_names: list[str],
    counts: list[int],
    eval_counts: list[int],
    many_shot_threshold: int = MANY_SHOT_THRESHOLD,
    few_shot_threshold: int = FEW_SHOT_THRESHOLD,
) -> dict[str, Any]:
    """Return the `data` section of data of which only the classes are known.

    Args:
        class_names: Names of the C classes.
        counts: C numbers of training images.
        eval_counts: C numbers of evaluation images.
        many_shot_threshold: Classes with more training images are many-shot.
        few_shot_threshold: Classes with fewer training images are few-shot.
    """
    return {
        "name": "own data",
        "hub_id": None,
        "eval_split": None,
        "fingerprint": None,
        "eval_fingerprint": None,
        "num_train_images": sum(counts),
        "num_eval_images": sum(eval_counts),
        "class_names": class_names,
        "class_counts": counts,
        "eval_class_counts": eval_counts,
        "many_shot_threshold": many_shot_threshold,
        "few_shot_threshold": few_shot_threshold,
    }


def describe_run(
    training: BKDConfig,
    data: dict[str, Any],
    student: dict[str, Any],
    teacher: dict[str, Any] | None = None,
    *,
    teacher_training: BKDConfig | None = None,
    model_options: dict[str, Any] | None = None,
    teacher_model_options: dict[str, Any] | None = None,
    data_options: dict[str, Any] | None = None,
    command: Sequence[str] | None = None,
    precision_rates: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Return the content of a `results.json`.

    Args:
        training: Options of the student's training.
        data: The `data` section (see [`describe_data`]).
        student: The `student` section (see [`describe_model`]), with its training and history.
        teacher: The same for the teacher, if there is one.
        teacher_training: Options of the teacher's training, if it was trained in the same run.
        model_options: Options about models.
        teacher_model_options: Those of them that were given for the teacher alone.
        data_options: Options about data.
        command: The options on its command line.
        precision_rates: Images per second in each precision, if the precision was chosen by measurement.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "options": {
            "model": recordable(model_options or {}),
            "teacher_model": recordable(teacher_model_options or {}),
            "data": recordable(data_options or {}),
            "training": describe_training(training),
            "teacher_training": describe_training(teacher_training or training, relative_to=training),
        },
        "method": training.method_label,
        "seed": training.seed,
        "command": None if command is None else describe_command(command, training.world_size),
        "command_is_shortened": command is not None and _told(command) != _told(command, lambda value, option: value),
        "data": data,
        "teacher": teacher,
        "student": student,
        "versions": describe_versions(),
        "hardware": describe_hardware(training) | ({"precision_rates": precision_rates} if precision_rates else {}),
    }


def describe_model(name: str, model: nn.Module, measured: LongTailAccumulator) -> dict[str, Any]:
    """Return the description of a model and its metrics.

    Args:
        name: Folder, Hub id, or `cifar-resnet-…`; empty for a model made from a configuration.
        model: The model.
        measured: Its metrics on the evaluation images.
    """
    classifier = model.model if isinstance(model, FrozenTeacher) else model
    return {
        "model": without_folders(name) if name else bare_type(classifier).__name__,
        "hub_id": hub_id(name) if name and fresh_task(name) is None else None,
        "architecture": bare_type(classifier).__name__,
        "num_parameters": sum(getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters()),
        "num_eval_images": measured.num_images,
        **measured.compute(),
    }


def summarize_training(state: TrainerState, seconds: float, num_images: int) -> dict[str, float]:
    """Return the `training` of a model: its time and speed.

    Args:
        state: The trainer's state.
        seconds: Duration of the training, without evaluations.
        num_images: Training images in an epoch.
    """
    return {
        "seconds": round(seconds, 2),
        "images_per_second": round(num_images * (state.epoch or 0) / seconds, 1),
        "seconds_per_step": round(seconds / max(state.global_step, 1), 4),
        "steps": state.global_step,
        "epochs": round(state.epoch or 0, 3),
    }


def history_of(state: TrainerState) -> list[dict[str, float]]:
    """Return the `history` of a model: the training log without its final summary."""
    return [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry]


def describe_training(args: BKDConfig, relative_to: BKDConfig | None = None) -> dict[str, Any]:
    """Return the options of a training that differ from another, or from the defaults of `transformers`."""
    other = recorded_defaults(TrainingArguments) if relative_to is None else recordable(relative_to.to_dict())
    # bkd_hf's own options are always recorded, even at their defaults.
    return {
        name: value for name, value in recordable(args.to_dict()).items() if name not in other or value != other[name]
    }


def recorded_defaults(options: type) -> dict[str, Any]:
    """Return the defaults of a dataclass of options, as `results.json` has them."""
    return {field.name: getattr(field.default, "value", field.default) for field in fields(options)}


def training_options(results: dict[str, Any], model: str = "student") -> dict[str, Any]:
    """Return all options of a training: those recorded, and the defaults of `transformers` for the others.

    Args:
        results: The content of a `results.json`.
        model: `"student"` or `"teacher"`.
    """
    own = results["options"]["teacher_training"] if model == "teacher" else {}
    return {**recorded_defaults(TrainingArguments), **results["options"]["training"], **own}


def effective_batch_size(results: dict[str, Any], model: str = "student") -> int:
    """Images in an optimizer step, over accumulation steps and processes (arguments as [`training_options`])."""
    options = training_options(results, model)
    per_process = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    return per_process * results["hardware"]["num_processes"]


def adjusts_itself(results: dict[str, Any]) -> bool:
    """Whether the student's training corrects for the class frequencies (see [`is_balanced_by`])."""
    return is_balanced_by(results["options"]["training"])


def describe_versions() -> dict[str, str | None]:
    """Return the `versions` section."""
    versions = {"python": platform.python_version(), "bkd_hf": __version__, "commit": _commit()}
    return versions | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def describe_command(arguments: Sequence[str], num_processes: int = 1, called_by: Sequence[str] | None = None) -> str:
    """Return a command line that others can use: without secrets, publishing options and local folders.

    Args:
        arguments: The options.
        num_processes: Number of processes of the launcher.
        called_by: The words before the options; by default those that launch a run.
    """
    processes = ["--num_processes", str(num_processes)] if num_processes > 1 else []
    words = called_by or program("run", ["accelerate", "launch", *processes])
    return shlex.join([*words, *_told(arguments)])


def told_arguments(
    arguments: Sequence[str], show: Callable[[str, str], str], left_out: Collection[str] = ()
) -> list[str]:
    """Return the words of a command line without secrets.

    Args:
        arguments: The words.
        show: Called with each value and its option; returns what to show.
        left_out: Further options to leave out.
    """
    told: list[str] = []
    option = ""
    for argument in arguments:
        is_option = argument.startswith("--")
        given, equals, value = argument.partition("=") if is_option else ("", "", argument)
        option = given.lstrip("-").replace("-", "_") if is_option else option
        if not _is_secret(option) and option not in left_out:
            own = option if option in OPTIONS else option.removeprefix("teacher_")
            told.append(given + equals + show(value, own))
    return told


def _shown(value: str, option: str) -> str:
    if value.startswith("scripts/"):  # the recipes of a checkout, at the same place for everybody
        return value
    if option in _FOLDER_OPTIONS and not value.lstrip().startswith("{"):  # no JSON
        return Path(value).name or (Path(os.path.abspath(value)).name if value else "")  # of "."
    return without_folders(value)


def _told(arguments: Sequence[str], show: Callable[[str, str], str] = _shown) -> list[str]:
    return told_arguments(arguments, show, _OF_PUBLISHING)


def describe_hardware(args: BKDConfig) -> dict[str, Any]:
    """Return the `hardware` section."""
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else cpu_name()
    return {
        "device": device,
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "num_processes": args.world_size,
        "precision": precision_of(args),
    }


def recordable(options: dict[str, Any]) -> dict[str, Any]:
    """Return options without secrets and local paths."""

    def told(value: Any, option: str) -> Any:
        if isinstance(value, dict):
            return {name: told(inner, option) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [told(inner, option) for inner in value]
        return _shown(value, option) if isinstance(value, str) else value

    return {
        name: told(value, name)
        for name, value in options.items()
        if not _is_secret(name) and name not in _NOT_RECORDED
    }


def hub_id(name: str) -> str | None:
    """Return the name of a data set or model on the Hub; `None` for a local one."""
    here = name in DEMOS or _is_path(name) or os.path.exists(name)
    return None if here or not re.fullmatch(HUB_ID, name) else name


def without_folders(text: str) -> str:
    """Return the last part of a local path, a Hub id unchanged, and other text without the folders in it."""
    if _is_path(text) or os.path.exists(text):
        return os.path.basename(os.path.realpath(os.path.expanduser(text)))
    return _FOLDERS.sub("", text)


def _is_path(text: str) -> bool:
    """Whether a text without blanks is a path, not a Hub id, which has at most one slash."""
    is_word = not any(character.isspace() or character in "{[,;:" for character in text)
    return is_word and (text.startswith((".", "~", "/")) or text.count("/") > 1)


def _is_secret(name: str) -> bool:
    return name in _SECRETS or name.split("_")[-1] == "token"


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _commit() -> str | None:
    """Commit of the checkout that this package runs from; `None` without a checkout or git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails inside another project's repository
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    """Name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(encoding="utf-8"), re.M) if path.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
