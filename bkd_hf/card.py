"""The model card of a run, written from its `results.json` alone (see `bkd_hf.results`)."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .arguments import SCRIPT_DEFAULTS
from .card_training import losses_of, method_options, sources_of, sources_of_operations, training_rows
from .config import METHOD_OPTIONS, method_defaults, option_is_used
from .export_report import share_asked
from .export_report import table as export_table
from .head_fitting import describe_bias_shift
from .methods import METHODS
from .metrics import FEW_TEST_IMAGES, groups_of, wilson_interval
from .models import cifar_resnet_depth
from .options import NOT_FOR_TEACHER, UNKNOWN_LICENSE, WITHOUT_INFLUENCE, options_with
from .plots import figure_names
from .program import without_checkout
from .reading import read_card, read_text
from .results import check_schema, describe_command, load_results, training_options
from .schema import check_repo_id
from .targets import describe_targets, why_collapsed
from .tasks import TASKS, fresh_task, task_of
from .text import code, code_block, difference, markdown, one_line
from .verdict import free_alternatives, judge

# Models that are not part of transformers: what each is, and the file with its code.
_WITH_CODE = {
    "CifarResNetForImageClassification": ("a CIFAR ResNet", "modeling_cifar_resnet.py"),
    "CosineHeadForImageClassification": ("a classifier with a cosine head", "modeling_cosine_head.py"),
}
#: What the symbols in formulas mean, by a pattern that finds them.
_SYMBOLS = {
    r"\bz\b": "`z` are the logits",
    r"\bz_s\b": "`z_s` the student's logits",
    r"\bz_t\b": "`z_t` the teacher's logits",
    r"(\b|_)y\b": "`y` is the label",
    r"\bT(\b|²)": "`T` is the temperature",
    r"\bw\b|\bw_y\b": "`w` are the weights of the classes (1 in a loss without class weights)",
    r"\bn\b|\bn_c\b": "`n` are the class counts",
    r"\bπ\b": "`π` are the class frequencies",
    r"\bp · log w": "`p` is `class_balance_power`",
    r"\bτ\b": "`τ` is `logit_adjustment_tau`",
    r"\bε\b": "`ε` is `label_smoothing_factor`",
}
_SIGNATURE = re.compile(r"<!-- Written by bkd_hf(?: for (?P<repo_id>\S+))? \((?P<digest>\w+)\)\. -->")
_TEMPLATE = Path(__file__).with_name("card_template.md")
_REFERENCES = Path(__file__).with_name("references.bib")
_WEAK_ACCURACY = 0.2  # classes below it are named among the limitations
_MAX_LISTED_CLASSES = 500
_MAX_WEAKEST_CLASSES = 100
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
    """Write the card of a student (`str(card)` is its Markdown, `card.save(path)` writes it).

    Args:
        results: The content of a `results.json`, the file, or its folder.
        repo_id: The student's id on the Hub, for the snippet; the name of its model if not known yet.
        license: The Hub's name for it (`apache-2.0`, `mit`, …); "unknown" if not given.
        dataset_id: Id on the Hub of training data that was read from a folder.
        base_model: Id on the Hub of the student's initial model, if that was a folder.
        tags: Further tags.
        language: For the metadata, for texts; images have none.
        title: Headline; by default made of model, method and data.

    Raises:
        InputError: If it is no `results.json`, has another schema version, or `dataset_id` is malformed.
    """
    if isinstance(results, dict):
        check_schema(results)
    else:
        results = load_results(results)
    if dataset_id is not None:
        check_repo_id(dataset_id)
    license = license or UNKNOWN_LICENSE
    data, student, teacher = results["data"], results["student"], results["teacher"]
    task = task_of(data)
    dataset_id = dataset_id or data.get("hub_id")
    name, method = one_line(student["model"].rpartition("/")[2]), one_line(results.get("method") or "bkd")
    distillation_tags = ["knowledge-distillation"] if teacher else []
    has_tail = max(data["class_counts"]) > min(data["class_counts"])
    tail_tags = ["long-tailed", "imbalanced-data"] if has_tail else []
    metadata = ModelCardData(
        language=one_line(language) if isinstance(language, str) else language,
        license=one_line(license),
        library_name="transformers",
        pipeline_tag=task.tag,
        tags=list(
            dict.fromkeys(
                [*tail_tags, *distillation_tags, method.partition(" ")[0], "bkd_hf"] + [one_line(tag) for tag in tags]
            )
        ),
        datasets=[dataset_id] if dataset_id else None,
        base_model=base_model or student.get("hub_id"),
        metrics=["accuracy", "balanced_accuracy"],
        model_name=repo_id.rpartition("/")[2] if repo_id else name,
        eval_results=_evaluation_results(results, dataset_id),
        **({"teacher_model": teacher["hub_id"]} if teacher and teacher.get("hub_id") else {}),  # our own key
    )
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"text": markdown, "code": code, "code_block": code_block}
    literal = functools.partial(json.dumps, ensure_ascii=False)
    environment.filters |= {"literal": literal, "percent": _percent, "number": "{:,}".format}
    options = method_options(results)
    sources = [*sources_of(options), *sources_of_operations(results["options"]["data"])]
    body = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        task=task,
        has_tail=has_tail,
        title=title or f"{name}, trained by {method} on {data['name'].rpartition('/')[2]}",
        repo_id=repo_id or name,
        license=None if license == UNKNOWN_LICENSE else license,
        results=results,
        verdict=judge(results),
        alternatives={name: found for name, found in free_alternatives(results).items() if "tau" in found},
        targets=describe_targets(student["targets"], data["class_names"]) if student.get("targets") else None,
        collapse=why_collapsed(student["targets"], data["class_names"]) if student.get("targets") else None,
        bias_shift=describe_bias_shift(student["head_bias_shift"], data["class_names"])
        if "head_bias_shift" in student
        else None,
        data=data,
        eval_split=data.get("eval_split"),
        dataset_id=dataset_id,
        student=student,
        teacher=teacher,
        code_of=_code_of(student),
        figures={figure.removesuffix(".png"): f"figures/{figure}" for figure in figure_names(results)},
        parts=[title for title, _ in sources_of(options)],
        formulas=(formulas := [loss.formula for loss in losses_of(options) if loss.formula]),
        legend=", ".join(words for symbol, words in _SYMBOLS.items() if re.search(symbol, " ".join(formulas))),
        citations=_citations(source for _, source in sources if source),
        accuracies=_accuracy_rows(results),
        classes=_class_table(results),
        is_best_checkpoint=options["load_best_model_at_end"],
        limits=_limits(results),
        trainings=training_rows(results),
        command=without_checkout(results.get("command") or describe_command(["--config", "recipe.yaml"])),
        recipe=to_recipe(results, dataset_id),
        exported=export_table(results) if "export" in results else None,
        share_asked=share_asked(results) if "export" in results else "",
    )
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")
    return ModelCard(_signed(str(card), repo_id))


def _signed(text: str, repo_id: str | None) -> str:
    """Return a card with a last line by which [`kept_edits`] finds out whether somebody has edited it."""
    return f"{text.rstrip()}\n\n{_signature(repo_id, _digest(text))}\n"


def _signature(repo_id: str | None, digest: str) -> str:
    return f"<!-- Written by bkd_hf{f' for {repo_id}' if repo_id else ''} ({digest}). -->"


def kept_edits(path: str | os.PathLike[str], repo_id: str) -> str | None:
    """Return a card that was edited by hand, for a repository; `None` if there is none, or it is as it was written."""
    if not Path(path).exists():
        return None
    text = read_text(path)
    found = _SIGNATURE.search(text)
    if found is not None and _digest(text[: found.start()] + text[found.end() :]) == found["digest"]:
        return None
    if found is None or (before := found["repo_id"]) is None:
        return text
    # The name of a folder may be a word of the text, or the data set's; in quotes it is the model's.
    pattern = rf"(?<![\w./-]){re.escape(before)}(?!\.?[\w/-])" if "/" in before else f'(?<="){re.escape(before)}(?=")'
    above, below = (re.sub(pattern, lambda _: repo_id, part) for part in (text[: found.start()], text[found.end() :]))
    return above + _signature(repo_id, found["digest"]) + below


def repo_of(path: str | os.PathLike[str], otherwise: str) -> str:
    """Return the repository that a card was written for; `otherwise` if there is none, or that names one itself."""
    found = _SIGNATURE.search(read_text(path)) if "/" not in otherwise and Path(path).exists() else None
    return (found and found["repo_id"]) or otherwise


def _digest(text: str) -> str:
    return hashlib.blake2b(text.strip().encode(), digest_size=8).hexdigest()


def choices_of_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the user's choices in a card written by [`build`], as arguments of `build`; empty without a card."""
    if not Path(path).exists():
        return {}
    metadata = read_card(path)
    found = {name: metadata.get(name) for name in ("license", "base_model", "language")}
    listed = {name: metadata.get(name) or [] for name in ("datasets", "tags")}
    dataset_ids, tags = (value if isinstance(value, list) else [value] for value in listed.values())
    found |= {"dataset_id": next(iter(dataset_ids), None), "tags": tags}
    if found["license"] == UNKNOWN_LICENSE:
        del found["license"]
    return {name: value for name, value in found.items() if value}


def to_recipe(results: dict[str, Any], dataset_id: str | None = None) -> str:
    """Return the options that determine the result of a run as a YAML file for `--config`.

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
            # Neither what the method sets already, nor what it does not use.
            and (
                name not in METHOD_OPTIONS
                or name == "method"
                or value != defaults.get(name)
                or option_is_used(name, {**defaults, **options})
            )
        }

    options = results["options"]
    # Recorded options differ from transformers' defaults; these have other defaults on the command line.
    # Fresh weights have others too, unless an optimizer is named.
    told, name = training_options(results), options["model"].get("model_name_or_path", "")
    kinds = [fresh_task(model) for model in (name, options["model"].get("teacher_model_name_or_path") or name)]
    others = [*SCRIPT_DEFAULTS, *(["optim"] if kinds[0] else [])]
    training = {**{name: told[name] for name in others if name in told}, **options["training"]}
    method = training.get("method", "bkd")
    of_machine = WITHOUT_INFLUENCE | options_with("place", *TASKS.keys() - {task_of(results["data"]).name})
    if told.get("distillation_loss", METHODS[method].distillation_loss) == "none":
        of_machine |= options_with("student")  # about the missing teacher
    recipe = {
        **chosen(options["model"], of_machine, {}),
        **chosen(options["data"], of_machine, {}),
        **chosen(training, of_machine, method_defaults(method)),
    }
    if dataset_id is not None:
        recipe["dataset_name"] = dataset_id
    if options["data"].get("train_augmentation") == "none":
        recipe.pop("horizontal_flip", None)  # there is nothing to mirror
    teacher_method = METHODS[method].teacher
    has_own_kind = "training" in (results["teacher"] or {}) and kinds[0] != kinds[1]
    optim = {"optim": training_options(results, "teacher")["optim"]} if has_own_kind else {}
    of_teacher = {**options.get("teacher_model", {}), **optim, **options["teacher_training"]}
    teacher = chosen(of_teacher, of_machine | NOT_FOR_TEACHER, method_defaults(teacher_method))
    if teacher.get("method") == teacher_method:
        del teacher["method"]
    if teacher:
        recipe["teacher"] = teacher
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


# ---- Parts ---------------------------------------------------------------------------------------------------------


def _evaluation_results(results: dict[str, Any], dataset_id: str | None) -> list[EvalResult]:
    data, metrics = results["data"], results["student"]["metrics"]
    counts, name = data["class_counts"], one_line(data["name"])
    task = task_of(data)
    split = data.get("eval_split") or results["options"]["data"].get("eval_split_name")
    return [
        EvalResult(
            task_type=task.tag,
            task_name=task.title,
            dataset_type=dataset_id or name,
            dataset_name=f"{name} (training {task.name}s per class: {max(counts):,} to {min(counts):,})",
            dataset_split="held out of train" if split == "train" else split and one_line(split),
            metric_type=metric_type,
            metric_name=f"Accuracy, {title}",
            metric_value=round(float(metrics[key]), 6),
        )
        for title, key, metric_type in _METRICS
        if metric_type and metrics.get(key) is not None
    ]


def _code_of(model: dict[str, Any]) -> tuple[str, str] | None:
    """Description and code file of a model saved with its code; older results have only the name."""
    if "architecture" not in model and cifar_resnet_depth(model["model"]) is not None:
        return _WITH_CODE["CifarResNetForImageClassification"]
    return _WITH_CODE.get(model.get("architecture", ""))


def _citations(sources: Iterable[str]) -> list[str]:
    """BibTeX entries for papers on arXiv; one missing in `references.bib` gets only its number."""
    entries = _REFERENCES.read_text(encoding="utf-8").strip().split("\n\n")
    known = {re.search(r"eprint\s*= {(.*?)}", entry)[1]: entry for entry in entries}  # type: ignore[index]
    return [
        known.get(source) or f"@misc{{arxiv{source},\n  eprint = {{{source}}}\n}}" for source in dict.fromkeys(sources)
    ]


def _accuracy_rows(results: dict[str, Any]) -> list[list[str]]:
    data, student, teacher = results["data"], results["student"]["metrics"], (results["teacher"] or {}).get("metrics")
    many, few, task = data["many_shot_threshold"], data["few_shot_threshold"], task_of(data).name
    groups = groups_of(data)
    bounds = {"many_shot": f"> {many}", "medium_shot": f"{few} to {many}", "few_shot": f"< {few}"}
    rows = []
    for title, key, _ in _METRICS:
        if student.get(key) is None:
            continue
        if (group := key.removesuffix("_accuracy")) in groups:
            untested = groups[group] & (np.asarray(data["eval_class_counts"]) == 0)
            of_which = f", {untested.sum():,} of them not tested" if untested.any() else ""
            title += f" ({bounds[group]} training {task}s; classes: {groups[group].sum():,}{of_which})"
        row = [title, f"**{_percent(student[key])}**"]
        if teacher is not None:
            row.insert(1, _percent(teacher.get(key)))
            row.append(f"{difference(teacher[key], student[key]):+.1f}" if teacher.get(key) is not None else "–")
        rows.append(row)
    return rows


def _class_table(results: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of each class; with very many classes, a summary by rank and the classes that are certainly weakest."""
    data = results["data"]
    counts, tested = np.asarray(data["class_counts"]), np.asarray(data["eval_class_counts"])
    accuracies = {model: _class_accuracies(results[model]) for model in ("teacher", "student") if results.get(model)}
    correct = np.round(np.nan_to_num(accuracies["student"]) * tested)
    low, high = wilson_interval(correct, np.maximum(tested, 1))
    order = np.argsort(-counts, kind="stable")

    def row(index: int) -> list[str]:
        cells = [markdown(data["class_names"][index]), f"{counts[index]:,}", f"{tested[index]:,}"]
        cells += [_percent(values[index]) for values in accuracies.values()]
        return [*cells, f"{100 * low[index]:.0f} – {100 * high[index]:.0f}" if tested[index] else "–"]

    task = task_of(data).name
    models = [*accuracies] if results.get("teacher") else ["this model"]
    header = ["class", f"training {task}s", f"test {task}s", *models, "95 % interval"]
    if counts.size <= _MAX_LISTED_CLASSES:
        return {"header": header, "rows": [row(index) for index in order], "groups": None}
    groups = [
        [
            f"{part[0] + 1:,} – {part[-1] + 1:,}",
            f"{counts[order[part]].max():,} – {counts[order[part]].min():,}",
            *(_percent(np.ma.masked_invalid(values[order[part]]).mean()) for values in accuracies.values()),
            f"{int((accuracies['student'][order[part]] == 0).sum()):,}",
        ]
        for part in np.array_split(np.arange(counts.size), _NUM_RANK_GROUPS)
    ]
    known = np.flatnonzero(tested)
    weakest = known[np.argsort(high[known], kind="stable")[:_MAX_WEAKEST_CLASSES]]
    return {
        "header": header,
        "rows": [row(index) for index in weakest],
        "groups": {"header": ["rank", f"training {task}s", *models, "never recognised"], "rows": groups},
    }


def _limits(results: dict[str, Any]) -> dict[str, Any]:
    """Contents of the section on limitations: names of classes (escaped), and numbers."""
    data, metrics = results["data"], results["student"]["metrics"]
    teacher = (results["teacher"] or {}).get("metrics") or {}
    accuracies, tested = _class_accuracies(results["student"]), np.asarray(data["eval_class_counts"])
    names = [f"'{markdown(name)}'" for name in data["class_names"]]  # quoted, as they may contain commas
    order = np.argsort(accuracies, kind="stable")  # nan comes last
    worst, num_images = order[0], data["num_eval_images"]
    groups = {name: f"{name}_shot_accuracy" for name in ("many", "medium", "few")}
    lost = {
        name: difference(metrics[key], teacher[key]) for name, key in groups.items() if key in {*metrics} & {*teacher}
    }
    rare = metrics.get("few_shot_accuracy", metrics.get("medium_shot_accuracy"))
    return {
        "is_weak_on_rare": rare is not None and rare < _WEAK_ACCURACY,
        "weak": [f"{names[i]} ({_percent(accuracies[i])} %)" for i in order if accuracies[i] < _WEAK_ACCURACY],
        "worst": {"name": names[worst], "accuracy": accuracies[worst], "images": int(tested[worst])},
        "worst_interval": wilson_interval(round(accuracies[worst] * tested[worst]), tested[worst]),
        "lost": {name: points for name, points in lost.items() if points >= 0.5},
        "untested": [names[i] for i in np.flatnonzero(tested == 0)],
        "barely": [names[i] for i in np.flatnonzero((tested > 0) & (tested < FEW_TEST_IMAGES))],
        "few_test_images": FEW_TEST_IMAGES,
        "interval": wilson_interval(round(metrics["accuracy"] * num_images), num_images),
    }


def _class_accuracies(model: dict[str, Any]) -> np.ndarray:
    """Accuracy of each class, NaN for those without test images."""
    return np.asarray(model["metrics"]["per_class_accuracy"], dtype=np.float64)


def _percent(value: Any, digits: int = 1) -> str:
    return "–" if value is None or value is np.ma.masked or np.isnan(value) else f"{100 * value:.{digits}f}"
