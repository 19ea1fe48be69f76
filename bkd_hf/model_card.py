"""The model card of a run, written from its `results.json` alone (see `bkd_hf.results`)."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .arguments import SCRIPT_DEFAULTS
from .config import METHOD_OPTIONS, method_defaults, option_is_used, used_by
from .errors import InputError
from .methods import METHODS
from .metrics import shot_groups, wilson_interval
from .models import cifar_resnet_depth
from .options import NOT_FOR_TEACHER, UNKNOWN_LICENSE, WITHOUT_INFLUENCE, options_with
from .plots import figure_names
from .results import check_schema, effective_batch_size, load_results, training_options
from .targets import describe_targets
from .verdict import free_alternatives, judge

_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_REFERENCES = Path(__file__).with_name("references.bib")
#: Classes below this accuracy are named among the limitations.
_WEAK_ACCURACY = 0.2
_FEW_TEST_IMAGES = 10
_MAX_LISTED_CLASSES = 500
_MAX_WEAKEST_CLASSES = 100
_MAX_NAMED_CLASSES = 100
_NUM_RANK_GROUPS = 20

_METRICS = (  # title, key in `long_tail_metrics`, and its name in the metadata, for those that are there too
    ("overall", "accuracy", "accuracy"),
    ("balanced (mean over classes)", "balanced_accuracy", "balanced_accuracy"),
    ("top 5", "top5_accuracy", None),
    ("many-shot", "many_shot_accuracy", "accuracy"),
    ("medium-shot", "medium_shot_accuracy", "accuracy"),
    ("few-shot", "few_shot_accuracy", "accuracy"),
    ("worst class", "worst_class_accuracy", None),
    ("calibration error (ECE; lower is better)", "expected_calibration_error", None),
)
# What a method is made of, by option and choice: what it does, and its entry in `references.bib`.
_SOURCES: dict[str, dict[str, tuple[str, str]]] = {
    "classification_loss": {
        "cross_entropy": ("cross-entropy", ""),
        "focal": ("the focal loss", "lin2017focal"),
        "ldam": ("the LDAM loss", "cao2019learning"),
        "balanced_softmax": ("balanced softmax", "ren2020balanced"),
        "logit_adjustment": ("the logit-adjusted cross-entropy", "menon2021longtail"),
    },
    "class_weighting": {
        "reweight": ("class weights by the effective number of examples", "cui2019class"),
        "drw": ("deferred re-weighting", "cao2019learning"),
    },
    "sampler": {"class_balanced": ("class-balanced sampling", "kang2020decoupling")},
    "distillation_loss": {
        "bkd": (
            "Balanced Knowledge Distillation: a teacher's answers, re-weighted by class so that rare ones count",
            "zhang2021balanced",
        ),
        "kd": ("knowledge distillation", "hinton2015distilling"),
        "dive": ("DiVE: the teacher's answers are flattened into virtual examples", "he2021distilling"),
        "dkd": ("decoupled knowledge distillation", "zhao2022decoupled"),
    },
}


def build(
    results: dict[str, Any] | str | os.PathLike[str],
    repo_id: str | None = None,
    license: str | None = None,
    dataset_id: str | None = None,
    base_model: str | None = None,
    tags: Sequence[str] = (),
    language: str | None = None,
    title: str | None = None,
) -> ModelCard:
    """Write the card of a student.

    Args:
        results: The content of a `results.json`, the file, or its folder.
        repo_id: The student's id on the Hub, for the snippet; the name of its model if not known yet.
        license: As the Hub calls it (`apache-2.0`, `mit`, …); said to be unknown if not given.
        dataset_id: Id on the Hub of the training data, where it was read from a folder.
        base_model: Id on the Hub of the model that the student started from, where that was a folder.
        tags: Further tags.
        language: For the metadata; images have none.
        title: Headline; made of model, method and data if not given.

    Returns:
        The card: `str(card)` is its Markdown, `card.save(path)` writes it, `card.validate()` asks the Hub.

    Raises:
        InputError: If it is no `results.json`, or of another schema version, or `dataset_id` is malformed.
    """
    if isinstance(results, dict):
        check_schema(results)
    else:
        results = load_results(results)
    if dataset_id is not None:
        check_repo_id(dataset_id)
    license = license or UNKNOWN_LICENSE
    data, student, teacher = results["data"], results["student"], results["teacher"]
    dataset_id = dataset_id or data.get("hub_id")
    name = student["model"].rpartition("/")[2]
    title = title or f"{name}, trained by {results.get('method') or 'bkd'} on {data['name'].rpartition('/')[2]}"
    metadata = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys(["long-tailed", "imbalanced-data", *_method_tags(results), "bkd_hf", *tags])),
        datasets=[dataset_id] if dataset_id else None,
        base_model=base_model or student.get("hub_id"),
        metrics=["accuracy", "balanced_accuracy"],
        model_name=repo_id.rpartition("/")[2] if repo_id else name,
        eval_results=_evaluation_results(results, dataset_id),
        **({"teacher_model": teacher["hub_id"]} if teacher and teacher.get("hub_id") else {}),  # a word of our own
    )
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"text": _escape, "percent": _percent, "time": _time}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    body = template.render(
        title=title,
        repo_id=repo_id or name,
        license=license,
        unknown_license=license == UNKNOWN_LICENSE,
        results=results,
        verdict=judge(results),
        alternatives={name: found for name, found in free_alternatives(results).items() if "tau" in found},
        targets=describe_targets(student["targets"], data["class_names"]) if student.get("targets") else None,
        data=data,
        dataset_id=dataset_id,
        student=student,
        teacher=teacher,
        needs_code=_is_cifar_resnet(student),
        figures={figure.removesuffix(".png"): f"figures/{figure}" for figure in figure_names(results)},
        parts=[what for what, _ in _parts(results)],
        citations=_citations(results),
        accuracies=_accuracy_rows(results),
        classes=_class_table(results),
        test_images=_test_images(results),
        is_best_checkpoint=training_options(results)["load_best_model_at_end"],
        limitations=_limitations(results),
        trainings=_training_rows(results),
        recipe=to_recipe(results, dataset_id),
        is_from_script=bool(results["options"]["model"]),
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")


def choices_of_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what somebody chose for a card that [`build`] wrote, as arguments of `build`; nothing without a card."""
    if not Path(path).exists():
        return {}
    metadata = ModelCard.load(Path(path), ignore_metadata_errors=True).data
    found = {
        "license": None if metadata.license == UNKNOWN_LICENSE else metadata.license,
        "dataset_id": next(iter(metadata.datasets or []), None),
        "base_model": metadata.base_model,
        "language": metadata.language,
        "tags": metadata.tags,
    }
    return {name: value for name, value in found.items() if value}


def check_repo_id(repo_id: str) -> None:
    """Raise an `InputError` unless this can be the id of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(
            f"{repo_id!r} cannot be the id of a repository: expected USER/NAME, of letters, digits, '-', '_' and '.'."
        ) from error


def to_recipe(results: dict[str, Any], dataset_id: str | None = None) -> str:
    """Return the options of a run as a YAML file for `--config`: all that decide what it computes.

    Args:
        results: The content of a `results.json`.
        dataset_id: Used instead of the name of a folder.
    """

    def chosen(options: dict[str, Any], without: set[str], defaults: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in options.items()
            if name not in without
            and value not in (None, [], {})
            # Not what the method says already, nor what it does not look at.
            and (
                name not in METHOD_OPTIONS
                or name == "method"
                or value != defaults.get(name)
                or option_is_used(name, {**defaults, **options})
            )
        }

    options = results["options"]
    # What is recorded differs from transformers' defaults; these have others on the command line.
    told = training_options(results)
    training = {**{name: told[name] for name in SCRIPT_DEFAULTS if name in told}, **options["training"]}
    method = training.get("method", "bkd")
    of_machine = WITHOUT_INFLUENCE | options_with("place")
    recipe = {
        **chosen(options["model"], of_machine, {}),
        **chosen(options["data"], of_machine, {}),
        **chosen(training, of_machine, method_defaults(method)),
    }
    if dataset_id is not None:
        recipe["dataset_name"] = dataset_id
    teacher_method = METHODS[method].teacher
    teacher = chosen(options["teacher_training"], of_machine | NOT_FOR_TEACHER, method_defaults(teacher_method))
    if teacher.get("method") == teacher_method:
        del teacher["method"]
    if teacher:
        recipe["teacher"] = teacher
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


# ---- Metadata ------------------------------------------------------------------------------------------------------


def _method_tags(results: dict[str, Any]) -> list[str]:
    has_teacher = bool(results.get("teacher"))
    return (["knowledge-distillation"] if has_teacher else []) + [(results.get("method") or "bkd").partition(" ")[0]]


def _evaluation_results(results: dict[str, Any], dataset_id: str | None) -> list[EvalResult]:
    data, metrics = results["data"], results["student"]["metrics"]
    counts = data["class_counts"]
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=dataset_id or data["name"],
            dataset_name=f"{data['name']} (training images per class: {max(counts):,} to {min(counts):,})",
            dataset_split=data.get("eval_split") or results["options"]["data"].get("eval_split_name"),
            metric_type=metric_type,
            metric_name=f"Accuracy, {title}",
            metric_value=round(float(metrics[key]), 6),
        )
        for title, key, metric_type in _METRICS
        if metric_type and metrics.get(key) is not None
    ]


def _is_cifar_resnet(model: dict[str, Any]) -> bool:
    """Whether a model's code travels with it; results of earlier versions tell by the name alone."""
    if "architecture" in model:
        return model["architecture"] == "CifarResNetForImageClassification"
    return cifar_resnet_depth(model["model"]) is not None


# ---- Tables --------------------------------------------------------------------------------------------------------


def _accuracy_rows(results: dict[str, Any]) -> list[list[str]]:
    data, student, teacher = results["data"], results["student"]["metrics"], (results["teacher"] or {}).get("metrics")
    sizes = {f"{name}_accuracy": int(group.sum()) for name, group in _groups(data).items()}
    bounds = {
        "many_shot_accuracy": f"> {data['many_shot_threshold']}",
        "medium_shot_accuracy": f"{data['few_shot_threshold']} to {data['many_shot_threshold']}",
        "few_shot_accuracy": f"< {data['few_shot_threshold']}",
    }
    rows = []
    for title, key, _ in _METRICS:
        if student.get(key) is None:
            continue
        if key in bounds:
            title += f" ({bounds[key]} training images; classes: {sizes[key]:,})"
        row = [title]
        if teacher is not None:
            row += [_percent(teacher.get(key)), f"**{_percent(student[key])}**"]
            row += [f"{100 * (student[key] - teacher[key]):+.1f}" if teacher.get(key) is not None else "–"]
        else:
            row += [f"**{_percent(student[key])}**"]
        rows.append(row)
    return rows


def _class_table(results: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of each class; of very many classes a summary by rank, and those that are weakest for certain."""
    data = results["data"]
    counts, tested = np.asarray(data["class_counts"]), np.asarray(data["eval_class_counts"])
    accuracies = {model: _class_accuracies(results[model]) for model in ("teacher", "student") if results.get(model)}
    correct = np.round(np.nan_to_num(accuracies["student"]) * tested).astype(int)
    low, high = wilson_interval(correct, np.maximum(tested, 1))
    order = np.argsort(-counts, kind="stable")

    def row(index: int) -> list[str]:
        cells = [_escape(data["class_names"][index]), f"{counts[index]:,}", f"{tested[index]:,}"]
        if not tested[index]:
            return [*cells, *(["–"] * (len(accuracies) + 1))]
        if "teacher" in accuracies:
            cells.append(_percent(accuracies["teacher"][index]))
        return [*cells, _percent(accuracies["student"][index]), f"{100 * low[index]:.0f} – {100 * high[index]:.0f}"]

    header = ["class", "training images", "test images", *accuracies, "95 % interval"]
    if counts.size <= _MAX_LISTED_CLASSES:
        return {"header": header, "rows": [row(index) for index in order], "groups": None}
    groups = [
        [
            f"{part[0] + 1:,} – {part[-1] + 1:,}",
            f"{counts[order[part]].max():,} – {counts[order[part]].min():,}",
            *(_percent(_mean_of_known(values[order[part]])) for values in accuracies.values()),
            f"{int((accuracies['student'][order[part]] == 0).sum()):,}",
        ]
        for part in np.array_split(np.arange(counts.size), _NUM_RANK_GROUPS)
    ]
    known = np.flatnonzero(tested)
    weakest = known[np.argsort(high[known], kind="stable")[:_MAX_WEAKEST_CLASSES]]
    return {
        "header": header,
        "rows": [row(index) for index in weakest],
        "groups": {"header": ["rank", "training images", *accuracies, "never recognised"], "rows": groups},
    }


def _training_rows(results: dict[str, Any]) -> dict[str, Any]:
    """What was trained, and how: a row for each question, a column for each model that was trained in this run."""
    models = [model for model in ("teacher", "student") if (results.get(model) or {}).get("training")]
    rows: dict[str, list[str]] = {}
    for model in models:
        options, about = training_options(results, model), results[model]["training"]
        method = (results["teacher"] or {}).get("method") if model == "teacher" else results.get("method")
        schedule = options["lr_scheduler_type"]
        if options.get("lr_step_epochs"):
            steps = zip(options["lr_step_epochs"], options["lr_step_factors"], strict=True)
            schedule = "steps: " + ", ".join(f"× {factor:g} from epoch {epoch:g}" for epoch, factor in steps)
            if options.get("lr_warmup_epochs"):
                schedule += f"; epochs of warm-up: {options['lr_warmup_epochs']:g}"
        elif options.get("warmup_steps"):
            schedule += f", warm-up {options['warmup_steps']:g}"
        momentum = f" with momentum {options['momentum']:g}" if options.get("momentum") else ""
        processes = results["hardware"]["num_processes"]
        per_device, accumulated = options["per_device_train_batch_size"], options["gradient_accumulation_steps"]
        for title, value in {
            "model": f"{results[model]['model']} ({results[model]['num_parameters']:,} parameters)",
            "method": f"{method or ('ce' if model == 'teacher' else 'bkd')}: {_loss(options)}",
            "epochs, steps": f"{about['epochs']:g}, {about['steps']:,}",
            "images in a step": f"{effective_batch_size(results, model):,} = {per_device} × {accumulated} accumulated "
            f"× {processes} process{'es' if processes > 1 else ''}",
            "optimizer": f"{options['optim']}{momentum}, learning rate {options['learning_rate']:g}, weight decay "
            f"{options['weight_decay']:g}",
            "schedule": schedule,
            "time": f"{_time(about['seconds'])}, {about['images_per_second']:,.0f} images a second",
        }.items():
            rows.setdefault(title, []).append(_escape(value))
    return {"models": models, "rows": rows}


def _loss(options: dict[str, Any]) -> str:
    """E.g. "cross_entropy + bkd (temperature 2, distillation_weight 1, class_balance_beta 0.9999)"."""
    terms = []
    for part in ("classification_loss", "distillation_loss"):
        if options.get(part) not in (None, "none"):
            told = {name: options.get(name) for name in used_by(part, options)}
            numbers = [
                f"{name} {value if isinstance(value, str) else f'{value:g}'}"
                for name, value in told.items()
                if value is not None
            ]
            terms.append(options[part] + (f" ({', '.join(numbers)})" if numbers else ""))
    about = {"class_weighting": "none", "sampler": "instance"}
    others = [f"{part} {options[part]}" for part, usual in about.items() if options.get(part) not in (None, usual)]
    return " + ".join(terms) + "".join(f", {other}" for other in others)


# ---- Limitations ---------------------------------------------------------------------------------------------------


def _limitations(results: dict[str, Any]) -> list[str]:
    """Sentences that follow from the numbers."""
    data, student, teacher = results["data"], results["student"], results["teacher"]
    metrics, accuracies = student["metrics"], _class_accuracies(student)
    tested = np.asarray(data["eval_class_counts"])
    names = data["class_names"]
    found = []

    weak = np.flatnonzero(accuracies < _WEAK_ACCURACY)
    weak = weak[np.argsort(accuracies[weak], kind="stable")]
    if weak.size:
        listed = _listed([f"{_escape(names[index])} ({_percent(accuracies[index])} %)" for index in weak])
        number = f"{weak.size:,} of {len(names):,} classes {'is' if weak.size == 1 else 'are'}"
        found.append(
            f"**{number} recognised less than one time in five**: {listed}. Do not rely on it for {_them(weak)}."
        )
    else:
        worst = int(np.nanargmin(accuracies))
        low, high = wilson_interval(round(accuracies[worst] * tested[worst]), tested[worst])
        found.append(
            f"The weakest class is {_escape(names[worst])}: {_percent(accuracies[worst])} % of its {tested[worst]:,} "
            f"test images (95 % interval {100 * low:.0f} to {100 * high:.0f} %)."
        )
    groups = {"many": metrics.get("many_shot_accuracy"), "few": metrics.get("few_shot_accuracy")}
    if None not in groups.values() and groups["few"] < groups["many"]:
        found.append(
            f"Rare classes are still recognised less often than common ones: {_percent(groups['few'])} % (few-shot) "
            f"against {_percent(groups['many'])} % (many-shot)."
        )
    for name in ("many", "medium", "few"):
        key = f"{name}_shot_accuracy"
        lost = ((teacher or {}).get("metrics") or {}).get(key, 0) - metrics.get(key, np.inf)
        if lost >= 0.005:
            found.append(f"{name.capitalize()}-shot classes lose {100 * lost:.1f} points against the teacher.")
    untested, barely = np.flatnonzero(tested == 0), np.flatnonzero((tested > 0) & (tested < _FEW_TEST_IMAGES))
    if untested.size:
        listed = _listed([_escape(names[index]) for index in untested])
        found.append(f"{_classes(untested)} no test image, so nothing is known of {_them(untested)}: {listed}.")
    if barely.size:
        found.append(
            f"{_classes(barely)} fewer than {_FEW_TEST_IMAGES} test images: what is said of {_them(barely)} alone is "
            "a guess; see the intervals."
        )
    if teacher and judge(results).is_better is False:
        found.append("Distillation gained nothing here, or not everywhere, beyond what costs nothing: see the table.")
    if training_options(results)["load_best_model_at_end"]:
        found.append(
            "The checkpoint was chosen by the images that all these numbers are of, which flatters them: expect less."
        )
    error = metrics["expected_calibration_error"]
    if error >= 0.05:
        found.append(
            f"Its probabilities are not to be taken at their word: confidence and accuracy differ by "
            f"{_percent(error)} points on average."
        )
    low, high = wilson_interval(round(metrics["accuracy"] * data["num_eval_images"]), data["num_eval_images"])
    found.append(
        f"The overall accuracy is known to {100 * low:.1f} – {100 * high:.1f} % from {data['num_eval_images']:,} test "
        f"images (95 %). It is of one training run (seed {results['seed']}), and another seed moves it further."
    )
    found.append(
        f"It names one of its {len(names):,} classes for every image, also for one that shows none of them; only "
        "images like those of its test set were tried."
    )
    return found


def _test_images(results: dict[str, Any]) -> str:
    """Which images the accuracies are of."""
    data = results["data"]
    split = data.get("eval_split")
    number = f"{data['num_eval_images']:,} test images"
    if split is None:
        return number
    if split == "train":
        return f"{number}, which were set aside of the training data"
    return f"{number} (split `{split}`)"


def _parts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What the student was trained with, and the keys of the papers."""
    options = training_options(results)
    choices = ((part, options.get(part)) for part in _SOURCES)
    return [_SOURCES[part][choice] for part, choice in choices if choice in _SOURCES[part]]


def _citations(results: dict[str, Any]) -> list[str]:
    entries = _REFERENCES.read_text(encoding="utf-8").strip().split("\n\n")
    by_key = {entry.partition("{")[2].partition(",")[0]: entry for entry in entries}
    return [by_key[key] for key in dict.fromkeys(key for _, key in _parts(results) if key)]


# ---- Values --------------------------------------------------------------------------------------------------------


def _groups(data: dict[str, Any]) -> dict[str, np.ndarray]:
    return shot_groups(data["class_counts"], data["many_shot_threshold"], data["few_shot_threshold"])


def _class_accuracies(model: dict[str, Any]) -> np.ndarray:
    """Accuracy of each class, NaN for those without test images."""
    return np.asarray(model["metrics"]["per_class_accuracy"], dtype=np.float64)


def _mean_of_known(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _percent(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{100 * value:.1f}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMED_CLASSES
    return ", ".join(names[:_MAX_NAMED_CLASSES]) + (f" and {more:,} more" if more > 0 else "")


def _classes(numbers: np.ndarray) -> str:
    return "1 class has" if numbers.size == 1 else f"{numbers.size:,} classes have"


def _them(numbers: np.ndarray) -> str:
    return "it" if numbers.size == 1 else "them"


def _escape(text: Any) -> str:
    """Return text that neither Markdown nor HTML takes for markup, in one line: class names may hold anything."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", escaped) or "(no name)"
