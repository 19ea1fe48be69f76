"""`results.json`: the one hand-off from a run to everything that reports on it.

Schema, version 1 (fractions for metrics, seconds for times; `null` where something is not known):

    schema_version      1
    options             {"model": {…}, "data": {…}, "training": {…}, "teacher_training": {…}}: of `training` what
                        differs from the defaults of `transformers`, and all options of distillation; of
                        `teacher_training` what differs from `training`
    method              the preset, and in brackets what was chosen otherwise, e.g. "bkd (temperature 4)"
    seed                seed of the training
    data                name, fingerprint and eval_fingerprint (hashes of labels and images), num_train_images,
                        num_eval_images, class_names, class_counts (training), eval_class_counts,
                        many_shot_threshold, few_shot_threshold
    teacher, student    model, num_parameters, metrics (see `long_tail_metrics`), post_hoc_metrics (the same after
                        post-hoc logit adjustment, and its tau), confusions, and where it was trained in this run:
                        training {seconds, images_per_second, seconds_per_step, steps, epochs} and history (what was
                        logged: step, epoch, loss, ce_loss, kd_loss, eval_loss, eval_accuracy, …). The teacher has
                        its method too, where it is known, and is null where the student's method has none.
      confusions        [true class, predicted class, test images], the most frequent first (2,000 at most)
    versions            of Python and the libraries
    hardware            device, cpu_cores, cpu_threads, num_processes, precision

It holds no absolute path and no user name: a local model or data set is recorded by the name of its folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import TrainingArguments

from . import __version__
from .config import BKDConfig
from .data import LABEL_COLUMN, class_counts, fingerprint
from .errors import InputError
from .metrics import long_tail_metrics, post_hoc_logit_adjustment

RESULTS_NAME = "results.json"
SCHEMA_VERSION = 1

_MAX_CONFUSIONS = 2000
_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "numpy", "scikit-learn")
# Neither a result nor of interest to others.
_NOT_RECORDED = {"output_dir", "hub_token", "hub_model_id", "token", "cache_dir", "run_name", "logging_dir"}


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a `results.json`.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        InputError: If it is not there, is no results file, or is of another schema version.
    """
    path = Path(path)
    path = path / RESULTS_NAME if path.is_dir() else path
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"There is no {path}: the run is not finished, or this is no output folder.") from error
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema version {version}; this version of bkd_hf ({__version__}) reads {SCHEMA_VERSION}. "
            "Run it again, or use the version of bkd_hf that wrote it."
        )
    return results


def save_json(content: Any, path: str | os.PathLike[str]) -> None:
    """Write JSON so that a reader finds the old file or the whole new one, never a part.

    NaN and infinity, which JSON does not have, are written as `null`.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    text = json.dumps(_without_nan(content), indent=1, ensure_ascii=False, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def describe_data(
    name: str, train: datasets.Dataset, evaluation: datasets.Dataset, many_shot_threshold: int, few_shot_threshold: int
) -> dict[str, Any]:
    """Return the `data` section."""
    return {
        "name": without_folders(name),
        "fingerprint": fingerprint(train),
        "eval_fingerprint": fingerprint(evaluation),
        "num_train_images": len(train),
        "num_eval_images": len(evaluation),
        "class_names": train.features[LABEL_COLUMN].names,
        "class_counts": class_counts(train),
        "eval_class_counts": class_counts(evaluation),
        "many_shot_threshold": many_shot_threshold,
        "few_shot_threshold": few_shot_threshold,
    }


def describe_predictions(
    logits: np.ndarray, labels: np.ndarray, data: dict[str, Any], post_hoc_tau: float = 0.0
) -> dict[str, Any]:
    """Return the `metrics`, `post_hoc_metrics` and `confusions` of a model."""
    about = data["class_counts"], data["many_shot_threshold"], data["few_shot_threshold"]
    metrics = long_tail_metrics(logits, labels, *about)
    post_hoc = None
    if post_hoc_tau and all(data["class_counts"]):
        adjusted = post_hoc_logit_adjustment(logits, data["class_counts"], post_hoc_tau)
        post_hoc = {"tau": post_hoc_tau, **long_tail_metrics(adjusted, labels, *about)}
    predictions = logits.argmax(axis=1)
    wrong = predictions != labels
    pairs, counts = np.unique(np.stack([labels[wrong], predictions[wrong]], axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_MAX_CONFUSIONS]
    confusions = np.concatenate([pairs, counts[:, None]], axis=1)[order].tolist()
    return {"metrics": metrics, "post_hoc_metrics": post_hoc, "confusions": confusions}


def describe_training(args: BKDConfig, relative_to: BKDConfig | None = None) -> dict[str, Any]:
    """Return the options of a training: what differs from another, or from the defaults of `transformers`."""
    inherited = {f.name: f.default for f in fields(TrainingArguments)}
    values = recordable(args.to_dict())
    other = inherited if relative_to is None else recordable(relative_to.to_dict())
    # Own options are recorded even at their defaults: they are what the run is about.
    return {
        name: value
        for name, value in values.items()
        if name not in other or value != getattr(other[name], "value", other[name])
    }


def describe_versions() -> dict[str, str]:
    """Return the `versions` section."""
    versions = {"python": platform.python_version(), "bkd_hf": __version__}
    return versions | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def describe_hardware(args: BKDConfig) -> dict[str, Any]:
    """Return the `hardware` section."""
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else _cpu_name()
    return {
        "device": device,
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "num_processes": args.world_size,
        "precision": {"no": "fp32"}.get(args.mixed_precision, args.mixed_precision),
    }


def recordable(options: dict[str, Any]) -> dict[str, Any]:
    """Return options without secrets and without anything that tells where on a machine the run was."""
    return {
        name: without_folders(value) if isinstance(value, str) else value
        for name, value in options.items()
        if name not in _NOT_RECORDED and not name.endswith("_token")
    }


def without_folders(name: str) -> str:
    """Return the last part of a name that is a path on this machine; a Hub id as it is."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_absolute() or name.startswith((".", "~")) or path.exists() else name


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
