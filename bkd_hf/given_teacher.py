"""A given teacher: whether its outputs match the classes of the data, and how good it is."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError
from .inputs import Inputs, long_tail_evaluation
from .methods import METHODS, is_balanced_by
from .models import prefer_channels_last
from .options import ModelArguments, RunArguments
from .reading import read_option_file
from .results import RESULTS_NAME, describe_model, load_results
from .teacher import FrozenTeacher, align_labels, beats_guessing, load_teacher, teacher_label_names
from .text import quoted
from .trainer import BKDTrainer


@dataclass(frozen=True)
class Match:
    """Whether a teacher can be used without training.

    Attributes:
        columns: For each class of the data, the teacher's output for it, `None` if there is none.
        why_trained: Why the teacher must be trained on the data first; `None` if it need not be.
    """

    columns: list[int | None] = field(default_factory=list)
    why_trained: str | None = None

    def lack(self, class_names: list[str]) -> str:
        """Name the classes it lacks."""
        missing = [name for name, column in zip(class_names, self.columns, strict=True) if column is None]
        return f"has no output for {len(missing)} of {len(class_names)} classes: {quoted(missing, 20)}"


def read_label_map(path: str | None) -> dict[str, str | int]:
    """Content of `--teacher_label_map`; empty if it is not given."""
    if path is None:
        return {}
    try:
        content = json.loads(read_option_file("teacher_label_map", path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"--teacher_label_map {path} is no JSON: {error}.") from error
    if not isinstance(content, dict) or not all(type(value) in (str, int) for value in content.values()):
        raise InputError(
            f'--teacher_label_map {path}: expected {{"name in the data": "name (or number) of the teacher", …}}.'
        )
    return content


def match_teacher(arguments: RunArguments, class_names: list[str]) -> Match:
    """Match a given teacher's outputs with the classes of the data by name, or find that it must be trained.

    Raises:
        InputError: If it lacks classes, or does not name them.
    """
    options, name = arguments.model, arguments.model.given_teacher
    if name is None:
        return Match(why_trained="there is none yet")
    if options.finetune_teacher:
        return Match(why_trained="--finetune_teacher")
    option = f"--teacher_model_name_or_path {name}"
    names = teacher_label_names(name, **arguments.for_teacher().model.from_pretrained_kwargs())
    if isinstance(names, int):
        if names != len(class_names):
            return Match(
                why_trained=f"its head has {names} outputs without names, the data {len(class_names)} classes"
            )
        if not options.assume_label_order:
            raise InputError(
                f"{option} does not name its {names} classes (LABEL_0, …), so they cannot be matched with those of "
                "the data. If they are in the same order, say --assume_label_order; to train it on the data first, "
                "--finetune_teacher."
            )
        return Match(list(range(names)))
    columns = align_labels(names, class_names, read_label_map(options.teacher_label_map))
    match = Match(columns)
    if not any(column is not None for column in columns):
        return Match(why_trained=f"its head is for other classes ({quoted(names, 3)})")
    if None in columns and not options.allow_partial_teacher:
        raise InputError(
            f"{option} {match.lack(class_names)}. --teacher_label_map tells what they are called there; "
            "--allow_partial_teacher leaves them without distillation; --finetune_teacher trains the teacher on the "
            "data first."
        )
    return match


def warn_of_unused_options(arguments: RunArguments) -> None:
    """Warn about options for the training of a teacher that is not trained."""
    of_model = {field.name for field in dataclasses.fields(ModelArguments)}
    for alone in sorted(arguments.teacher_options.keys() - of_model):
        if f"teacher_{alone}" not in arguments.from_recipe:
            name = arguments.model.given_teacher
            warnings.warn(f"--teacher_{alone} has no effect: the teacher {name} is not trained here.", stacklevel=3)


def was_trained_on(data: dict[str, Any], is_streamed: bool, origin: dict[str, Any]) -> bool | None:
    """Whether a model was trained on the training examples of a run; `None` if nobody knows.

    Args:
        data: The `data` section of the run.
        is_streamed: Whether the run streams its data.
        origin: The results of the model; without `data` if it has none.
    """
    theirs = origin.get("data", {})
    if (fingerprint := theirs.get("fingerprint")) is None:
        return None
    if is_streamed or origin["options"]["data"].get("streaming"):
        # The hash of a stream covers few of its images, and how they are stored.
        theirs, ours = (dict(zip(each["class_names"], each["class_counts"], strict=True)) for each in (theirs, data))
        return theirs == ours
    return fingerprint == data["fingerprint"]


def use_given_teacher(arguments: RunArguments, inputs: Inputs, match: Match) -> tuple[FrozenTeacher, dict[str, Any]]:
    """Load a teacher trained elsewhere, with its outputs in the order of the data's classes, and its results."""
    options, data, name = arguments.for_teacher().model, inputs.data, arguments.model.given_teacher or ""
    option, class_names = f"--teacher_model_name_or_path {name}", data["class_names"]
    if None in match.columns:
        about = match.lack(class_names)
        inputs.say(f"WARNING: {option} {about}. These classes are learned from the labels alone.")
    elif match.columns != list(range(len(class_names))):
        inputs.say(
            f"The teacher's outputs are put into the order of the data, by name ({len(class_names)} of its classes)."
        )

    def warn(message: str) -> None:
        warnings.warn(message, stacklevel=3)

    warn_of_unused_options(arguments)
    origin: dict[str, Any] = {"student": {}}
    if Path(name, RESULTS_NAME).exists():
        try:
            origin = load_results(name)
        except InputError as error:
            warn(f"{option}: nobody knows what it was trained on. {error}")
    has_same_data, method = was_trained_on(data, arguments.data.streaming, origin), origin.get("method")
    if has_same_data is False:
        warn(f"{option} was trained on other examples (another data set, ratio or split) than the student will be.")
    of_student = arguments.training.method
    if method not in (None, METHODS[of_student].teacher):
        published = f"the published teacher of {of_student} is trained by {METHODS[of_student].teacher}"
        warn(f"{option} was trained by {method}; {published}.")
    teacher = load_teacher(name, match.columns, **options.from_pretrained_kwargs())
    prefer_channels_last(teacher)
    # A teacher trained on other images has not learned this tail's class frequencies.
    teacher.is_balanced = is_balanced_by(origin.get("options", {}).get("training", {})) or (
        False if has_same_data else None
    )
    tau = arguments.data.post_hoc_tau if has_same_data else 0.0
    args = copy.copy(arguments.training)  # evaluated as it will teach, in its own dtype
    args.bf16_full_eval = args.fp16_full_eval = False
    args.report_to = []  # not to the student's trackers
    trainer = BKDTrainer(
        model=teacher.as_classifier(),
        args=args,
        eval_dataset=inputs.images["eval"],
        compute_metrics=long_tail_evaluation(data, tau),
    )
    results = describe_model(name, teacher, trainer.measure(inputs.images["eval"])[1])
    _check_above_chance(option, results["metrics"], data, match.columns, arguments.model.force_teacher)
    return teacher, {**results, "model": origin["student"].get("model", results["model"]), "method": method}


def _check_above_chance(
    option: str, metrics: dict[str, Any], data: dict[str, Any], columns: list[int | None], force: bool
) -> None:
    """Reject a teacher that guesses; this check catches every mistake in its classes and pixels."""
    known = [
        (accuracy, num_images)
        for accuracy, num_images, column in zip(
            metrics["per_class_accuracy"], data["eval_class_counts"], columns, strict=True
        )
        if accuracy is not None and column is not None
    ]
    if not known:
        return
    accuracies, num_images = zip(*known, strict=True)
    verdict = beats_guessing(accuracies, num_images)
    if verdict:
        return
    accuracy, chance = sum(accuracies) / len(accuracies), 1 / len(accuracies)
    message = (
        f"{option} is right for {100 * accuracy:.1f} % of the evaluation examples (mean over classes), where guessing "
        f"gives {100 * chance:.1f} %"
    )
    if verdict is None:
        warnings.warn(f"{message}: {sum(num_images)} examples are too few to tell whether it guesses.", stacklevel=3)
        return
    if not force:
        raise InputError(
            f"{message}: its classes or its inputs are not what they seem. Check id2label and its image "
            "processor or tokenizer; --force_teacher uses it all the same, --finetune_teacher trains it first."
        )
    warnings.warn(f"{message}; it is used all the same (--force_teacher).", stacklevel=3)
