"""The contents of a `results.json`, as types by which it is checked, as it may come from anywhere.

Metrics are fractions, times are seconds. `NotRequired` fields are missing if they do not apply, and in results of
earlier versions. Any part may have further fields.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NotRequired, get_type_hints

import numpy as np
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from .config import METHOD_OPTIONS, BKDConfig
from .errors import InputError
from .methods import METHODS
from .metrics import check_shot_thresholds, groups_of
from .text import one_line

_CONFIG = ConfigDict(strict=True, allow_inf_nan=False, str_max_length=1_000_000, extra="allow")
#: Pattern of a repository id.
HUB_ID = r"[\w.-]+(/[\w.-]+)?"
_LARGEST = 2**53  # exact in every JSON reader

_READ_OPTIONS = (
    "learning_rate", "weight_decay", "optim", "momentum", "lr_scheduler_type", "warmup_steps", "lr_step_epochs",
    "lr_step_factors", "lr_warmup_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "load_best_model_at_end", "ema_decay", "head", "head_scale", "adapter", "adapter_rank", "adapter_alpha",
    "layer_decay",
)  # fmt: skip

Integer = Annotated[int, Field(ge=-_LARGEST, le=_LARGEST)]
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Positive = Annotated[int, Field(ge=1, le=_LARGEST)]
Real = Annotated[float, Field(ge=-1e39, le=1e39)]  # within single precision, which figures can show
Amount = Annotated[float, Field(ge=0, le=1e39)]
Fraction = Annotated[float, Field(ge=0, le=1.0001)]  # sums in single precision are rounded
HubId = Annotated[str, Field(pattern=f"^{HUB_ID}$")]
Fingerprint = Annotated[str, Field(pattern="^[0-9a-f]+(-sampled)?$")]


class Metrics(TypedDict):
    """See `long_tail_metrics`; groups without classes are missing."""

    accuracy: Fraction
    balanced_accuracy: Fraction
    worst_class_accuracy: Fraction
    top5_accuracy: NotRequired[Fraction]
    many_shot_accuracy: NotRequired[Fraction]
    medium_shot_accuracy: NotRequired[Fraction]
    few_shot_accuracy: NotRequired[Fraction]
    harmonic_mean_accuracy: NotRequired[Fraction]
    geometric_mean_accuracy: NotRequired[Fraction]
    macro_f1: NotRequired[Fraction]
    expected_calibration_error: NotRequired[Fraction]
    per_class_accuracy: list[Fraction | None]  # C; `null` without test images


class PostHocMetrics(Metrics):
    """The same after post-hoc logit adjustment."""

    tau: Real


class TrainingSummary(TypedDict):
    """For a model trained in this run."""

    seconds: Amount
    images_per_second: Amount
    seconds_per_step: NotRequired[Amount]
    steps: Count
    epochs: Amount


class HistoryEntry(TypedDict):
    """An entry of the training log; `null` stands for NaN."""

    step: NotRequired[Count]
    epoch: NotRequired[Amount]
    elapsed_seconds: NotRequired[Amount]
    loss: NotRequired[Real | None]
    ce_loss: NotRequired[Real | None]
    kd_loss: NotRequired[Real | None]
    learning_rate: NotRequired[Real | None]
    eval_accuracy: NotRequired[Fraction | None]
    eval_few_shot_accuracy: NotRequired[Fraction | None]


class Targets(TypedDict):
    """See `bkd_hf.targets.target_statistics`; with `power` if the loss has class weights."""

    num_images: Count
    target_agreement: Fraction
    teacher_agreement: Fraction
    mass: dict[str, Fraction]
    labels: dict[str, Fraction]
    favoured_class: Count
    favoured_share: Fraction
    favoured_label_share: Fraction
    power: NotRequired[Amount]
    prior_in_teacher: NotRequired[Fraction]
    top_k_mass: NotRequired[Fraction]  # with `teacher_cache_top_k`


class SettledOptions(TypedDict):
    """Resolved values of options of the losses that may be `auto` or `measured` (see `Objective.settled`)."""

    class_balance_power: NotRequired[Amount]
    distillation_prior: NotRequired[Fraction]
    logit_adjustment_tau: NotRequired[Real]


class Model(TypedDict):
    """A teacher or a student; a teacher has post-hoc metrics only if it was trained on the same images."""

    model: str
    hub_id: NotRequired[HubId | None]  # `null` if it is not from the Hub
    architecture: NotRequired[str]
    num_parameters: Count
    num_trained_parameters: NotRequired[Count]  # of adapter and head, if there is an adapter
    metrics: Metrics
    post_hoc_metrics: NotRequired[PostHocMetrics | None]
    num_eval_images: NotRequired[Count]  # evaluated images: all of the data
    answers: NotRequired[list[Count]]  # C numbers of evaluation images predicted as each class
    # [true class, predicted class, test images], the most frequent first (2,000 at most)
    confusions: list[Annotated[list[Count], Field(min_length=3, max_length=3)]]
    training: NotRequired[TrainingSummary]
    history: NotRequired[list[HistoryEntry]]
    method: NotRequired[str | None]  # of a teacher, if known
    augmentation: NotRequired[str]  # of its training images, if it was trained on images in this run
    settled_options: NotRequired[SettledOptions]
    head_bias_shift: NotRequired[list[Real]]  # C numbers added after training, if a bias was fitted
    started_from_teacher: NotRequired[bool]  # of a student with a teacher
    targets: NotRequired[Targets | None]  # of a student with a teacher, if its method has targets


class Data(TypedDict):
    """The images of a run."""

    name: str
    hub_id: NotRequired[HubId | None]
    eval_split: NotRequired[str | None]  # "train" for images held out from it; `null` if unknown
    fingerprint: Fingerprint | None  # of labels and images
    eval_fingerprint: Fingerprint | None
    num_train_images: Positive
    num_eval_images: Positive
    class_names: Annotated[list[str], Field(min_length=1)]
    class_counts: list[Count]  # of training images
    eval_class_counts: list[Count]
    many_shot_threshold: Count
    few_shot_threshold: Count
    task: NotRequired[Literal["image", "text"]]  # what the "images" are; missing: images


class Hardware(TypedDict):
    """The hardware of a run."""

    device: str
    cpu_cores: NotRequired[Count | None]
    cpu_threads: Positive
    num_processes: Positive
    precision: str
    precision_rates: NotRequired[dict[str, Amount]]  # images per second, if the precision was chosen by measurement


class Versions(TypedDict):
    """Versions of Python and the libraries, and the commit of bkd_hf if it is a git checkout."""

    bkd_hf: str
    torch: str
    transformers: str
    accelerate: str
    commit: NotRequired[str | None]


class GroupAccuracies(TypedDict):
    """The part of [`Metrics`] reported for an exported model."""

    accuracy: Fraction
    balanced_accuracy: Fraction
    many_shot_accuracy: NotRequired[Fraction]
    medium_shot_accuracy: NotRequired[Fraction]
    few_shot_accuracy: NotRequired[Fraction]


class AnsweringModel(TypedDict):
    """A model in inference, on a CPU in single precision or in int8."""

    bytes: Count  # size of its file; for a torch model, of its weights
    seconds: dict[Literal["1", "32"], Amount]  # median, for this many images at once
    metrics: NotRequired[GroupAccuracies]  # on the evaluation images; a teacher's are in its own section


class ExportedModels(TypedDict):
    """All compared models."""

    teacher: NotRequired[AnsweringModel]
    student: AnsweringModel  # in torch
    onnx: AnsweringModel
    int8: AnsweringModel


class Export(TypedDict):
    """The student without torch; see `bkd_hf.onnx_export`."""

    opset: Positive
    onnxruntime: str
    largest_logit_difference: Amount  # between ONNX and torch, on the evaluation images
    tolerance: Amount
    num_calibration_images: Count  # training images, for int8
    num_eval_images: NotRequired[Count]  # for accuracies and differences; missing: all
    device: str
    cpu_threads: Positive
    models: ExportedModels


def _training_options() -> type:
    """Training options that are read again, with their own types, except for words that may be numbers."""
    names = {name for name in (*METHOD_OPTIONS, *_READ_OPTIONS) if not name.endswith("_args")}
    kinds = {int: Integer, float: Real, str | None: str | Real | None}
    hints = {name: hint for name, hint in get_type_hints(BKDConfig).items() if name in names}
    types = {name: kinds.get(hint, hint) for name, hint in hints.items()}
    return TypedDict("TrainingOptions", types, total=False)  # type: ignore[operator]


TrainingOptions = _training_options()


class DataOptions(TypedDict):
    """Data options that are read again."""

    train_augmentation: NotRequired[str | None]
    train_operations: NotRequired[list[str] | None]


class Options(TypedDict):
    """A run's options, without secrets and paths."""

    model: dict[str, Any]
    teacher_model: NotRequired[dict[str, Any]]  # what was given for the teacher alone
    data: DataOptions
    training: TrainingOptions  # type: ignore[valid-type]  # what differs from the defaults of `transformers`; all own
    teacher_training: TrainingOptions  # type: ignore[valid-type]  # what differs from `training`


class Results(TypedDict):
    """A `results.json`, schema version 1."""

    __pydantic_config__ = _CONFIG  # type: ignore[misc]  # of all parts

    schema_version: int
    options: Options
    method: NotRequired[str]  # the preset, with differing options in brackets, e.g. "bkd (temperature 4)"
    seed: Integer
    command: NotRequired[str | None]  # the command; `null` from Python
    command_is_shortened: NotRequired[bool]  # whether parent folders were removed from paths in it
    data: Data
    teacher: Model | None  # `null` if the student's method has none
    student: Model
    versions: Versions
    hardware: Hardware
    export: NotRequired[Export]


def find_fault(results: Any, adds_up: bool = True) -> str | None:
    """Return what is wrong with the content of a `results.json`, as a predicate; `None` if nothing is.

    Args:
        results: The content as read.
        adds_up: Whether sums and means must match their parts, for files that others may have changed.
    """
    try:
        _adapter().validate_python(results)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        where = [".".join(one_line(part, 40) for part in fault["loc"]) for fault in faults]
        if missing := [place for place, fault in zip(where, faults, strict=True) if fault["type"] == "missing"]:
            return f"is not whole: it has no {one_line(', '.join(missing), 200)}"
        value, said = faults[0]["input"], faults[0]["msg"]
        shown = f" (it is {one_line(repr(value), 40)})" if isinstance(value, (str, int, float)) else ""
        return f"is not valid: {where[0]}: {said}{shown}"
    faults_between_parts = itertools.chain(_misfits(results), _wrong_sums(results) if adds_up else ())
    fault = next(faults_between_parts, None)
    return fault and f"is not valid: {fault}"


@functools.cache
def _adapter() -> TypeAdapter:
    return TypeAdapter(Results)


def _models(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from ((name, results[name]) for name in ("student", "teacher") if results[name])


def _misfits(results: dict[str, Any]) -> Iterator[str]:
    """Parts that are inconsistent with each other, or with this version of bkd_hf."""
    options, data = results["options"], results["data"]
    for part in ("training", "teacher_training"):
        if (method := options[part].get("method", "bkd")) not in METHODS:
            yield f"options.{part}.method: there is no {one_line(method, 40)!r} here"
        told = {**options["training"], **options[part]}
        if len(told.get("lr_step_epochs") or ()) != len(told.get("lr_step_factors") or ()):
            yield f"options.{part}: lr_step_epochs and lr_step_factors differ in length"
    try:
        check_shot_thresholds(data["many_shot_threshold"], data["few_shot_threshold"])
    except ValueError as error:
        yield f"data: {error}"
    for name, model in results.get("export", {}).get("models", {}).items():
        if len(model["seconds"]) != 2:
            yield f"export.models.{name}.seconds: not one for 1 and one for 32 images"
        if name != "teacher" and "metrics" not in model:
            yield f"export.models.{name}: it has no metrics"
    images = data["eval_class_counts"]
    for name in ("class_counts", "eval_class_counts"):
        if len(data[name]) != len(data["class_names"]) or not any(data[name]):
            yield f"data.{name}: not a number for each of {len(data['class_names'])} classes, or no example at all"
    for name, model in _models(results):
        for part in ("metrics", "post_hoc_metrics"):
            accuracies = (model.get(part) or {}).get("per_class_accuracy")
            if accuracies is not None and [value is None for value in accuracies] != [not n for n in images]:
                yield f"{name}.{part}.per_class_accuracy: not one for each class with test examples"
        for part in ("answers", "head_bias_shift"):
            if len(model.get(part, images)) != len(images):
                yield f"{name}.{part}: not a number for each class"
        if any(max(confusion[:2]) >= len(images) for confusion in model["confusions"]):
            yield f"{name}.confusions: there is no such class"
        if targets := model.get("targets"):
            if targets["favoured_class"] >= len(images):
                yield f"{name}.targets.favoured_class: there is no such class"
            if targets["mass"].keys() != targets["labels"].keys():
                yield f"{name}.targets: mass and labels are of different groups"


def _wrong_sums(results: dict[str, Any]) -> Iterator[str]:
    data = results["data"]
    for name, total in (("class_counts", "num_train_images"), ("eval_class_counts", "num_eval_images")):
        if sum(data[name]) != data[total]:
            yield f"data.{total}: it is not the sum of {name}"
    images = np.asarray(data["eval_class_counts"], dtype=float)
    for name, model in _models(results):
        if sum(model.get("answers", data["eval_class_counts"])) != data["num_eval_images"]:
            yield f"{name}.answers: their sum is not data.num_eval_images"
        for true, predicted, number in model["confusions"]:
            if true == predicted or not 0 < number <= images[true]:
                yield f"{name}.confusions: {[true, predicted, number]} cannot be"
        for part in ("metrics", "post_hoc_metrics"):
            if not (metrics := model.get(part)):
                continue
            accuracies = np.array(metrics["per_class_accuracy"], dtype=float)
            means = {"accuracy": np.nansum(accuracies * images) / images.sum()}
            means |= {"balanced_accuracy": np.nanmean(accuracies), "worst_class_accuracy": np.nanmin(accuracies)}
            for group, members in groups_of(data).items():
                if f"{group}_accuracy" in metrics or images[members].any():
                    means[f"{group}_accuracy"] = np.nansum(accuracies[members]) / max(1, (images[members] > 0).sum())
            for key, mean in means.items():
                if not abs(metrics.get(key, np.nan) - mean) < 1e-6:
                    yield f"{name}.{part}.{key}: the accuracies of the classes give {mean:.6f}"


def check_repo_id(repo_id: str) -> None:
    """Raise an `InputError` unless this is a valid repository id."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(
            f"{repo_id!r} cannot be the id of a repository: expected USER/NAME, of letters, digits, '-', '_' and '.'."
        ) from error
