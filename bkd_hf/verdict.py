"""The verdict on a student: is it better than alternatives without training, and does it predict all its classes?

Such alternatives are the teacher itself, and the teacher after post-hoc logit adjustment (τ = 1 unless the run says
otherwise, never chosen on the test images). The latter only makes sense for a teacher that learned the tail's class
frequencies: one trained on the same images, without a correction of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .methods import METHODS, RECOMMENDED, is_balanced_by
from .results import adjusts_itself
from .tasks import task_of

# Below this fraction of the teacher's accuracy, or of tested classes that are ever predicted, something went wrong.
_FAR_BELOW = 0.8
_FEW_ANSWERED = 0.5
# How much more often than it occurs a class may be predicted, unless only a few images are concerned.
_TOO_OFTEN, _MANY_ANSWERS = 3.0, 0.1
_COMPARED = {"accuracy": "overall", "balanced_accuracy": "in the mean over classes"}


@dataclass(frozen=True)
class Verdict:
    """The summary of a student's result.

    Attributes:
        is_better: Whether it is better than every free alternative, overall and in the mean over classes; `None` if
            there is none to compare with.
        sentence: The comparison in words; empty without one.
        warnings: Serious problems, one sentence each.
    """

    is_better: bool | None = None
    sentence: str = ""
    warnings: list[str] = field(default_factory=list)


def judge(results: dict[str, Any]) -> Verdict:
    """Judge the student of a run, from the content of its `results.json`."""
    return Verdict(*_compare(results), _warnings(results))


def free_alternatives(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics of the alternatives that need no training beyond the teacher's, by name.

    Without a teacher, this is the student itself after post-hoc logit adjustment, if its method has no correction.
    """
    teacher, student = results["teacher"], results["student"]
    if not teacher:
        adjusted = None if adjusts_itself(results) else student.get("post_hoc_metrics")
        return {_adjusted("model", adjusted): adjusted} if adjusted else {}
    found, adjusted = {"its teacher": teacher["metrics"]}, teacher.get("post_hoc_metrics")
    if adjusted and not is_balanced_by(_options_of(teacher.get("method") or "ce")):
        found[_adjusted("teacher", adjusted)] = adjusted
    return found


def _options_of(label: str) -> dict[str, Any]:
    """Return the options that a method's label tells, e.g. "ce (classification_loss balanced_softmax)"."""
    name, _, changed = label.removesuffix(")").partition(" (")
    preset = METHODS[name].options() if name in METHODS else {}
    return preset | dict(each.split(" ", 1) for each in changed.split(", ") if " " in each)


def _adjusted(name: str, metrics: dict[str, Any]) -> str:
    return f"the {name} after post-hoc logit adjustment (τ = {metrics['tau']:g})"


def _compare(results: dict[str, Any]) -> tuple[bool | None, str]:
    alternatives = free_alternatives(results)
    if not alternatives:
        return None, ""
    student = results["student"]["metrics"]
    best = max(alternatives, key=lambda name: [alternatives[name][key] for key in reversed(_COMPARED)])
    if all(_exceeds(student, alternatives[best], key) for key in _COMPARED):  # then it must beat the others too
        best = next((name for name, each in alternatives.items() if not _exceeds(student, each, "accuracy")), best)
    other = alternatives[best]
    better = [words for key, words in _COMPARED.items() if _exceeds(student, other, key)]
    # On a balanced test set overall and balanced accuracy are the same.
    is_balanced = all(abs(each["accuracy"] - each["balanced_accuracy"]) < 0.0005 for each in (student, other))
    numbers = "; ".join(
        f"{100 * student[key]:.1f} against {100 * other[key]:.1f} % {words}"
        for key, words in _COMPARED.items()
        if key == "accuracy" or not is_balanced
    )
    subject = "student" if results["teacher"] else "model as it was trained"
    free = ", which takes no training" if "tau" in other else ""
    may_be_chance = _may_be_chance(student, other, results["data"])
    compared = f"{best}{free}: {numbers}{may_be_chance}."
    found = "seems" if may_be_chance else "is"
    if len(better) == len(_COMPARED):
        return True, f"The {subject} {found} better than {compared}"
    what = f"{found} better only {better[0]} than" if better else "is NOT better than"
    return False, f"The {subject} {what} {compared} {_try(results, best)}"


def _exceeds(first: dict[str, Any], second: dict[str, Any], key: str) -> bool:
    return first[key] > second[key] + 1e-9  # the same images may be added up in another order


def _may_be_chance(first: dict[str, Any], second: dict[str, Any], data: dict[str, Any]) -> str:
    """Return a note if the 95 % interval of the difference of two overall accuracies contains 0.

    The results do not say which images each model is right about, so the interval is unpaired, and rather wide.
    """
    p, n = np.array([first["accuracy"], second["accuracy"]]), data["num_eval_images"]
    half = 1.96 * np.sqrt((p * (1 - p)).clip(0).sum() / n)
    if abs(p[0] - p[1]) >= half:
        return ""
    return f"; with {n:,} test {task_of(data).name}s a difference below {100 * half:.1f} points may be chance"


def _try(results: dict[str, Any], best: str) -> str:
    if not results["teacher"]:
        return f"Try --method {RECOMMENDED}, or balanced-softmax."
    if (results.get("method") or "bkd").partition(" ")[0] != RECOMMENDED:
        is_trained_here = "training" in results["teacher"]
        stronger = (
            "more epochs for the teacher (--teacher_num_train_epochs)" if is_trained_here else "a stronger teacher"
        )
        return f"Try --method {RECOMMENDED}, or {stronger}."
    return f"Try more epochs (--num_train_epochs), or a stronger teacher; or use {best} instead of the student."


def _warnings(results: dict[str, Any]) -> list[str]:
    data, student, teacher = results["data"], results["student"], results["teacher"]
    found = []
    if teacher and all(student["metrics"][key] < _FAR_BELOW * teacher["metrics"][key] for key in _COMPARED):
        ours, theirs = (100 * model["metrics"]["accuracy"] for model in (student, teacher))
        found.append(f"The student is far below its teacher: {ours:.1f} against {theirs:.1f} % overall.")
    if "answers" not in student:  # results of an earlier version
        return found
    answers, images = np.asarray(student["answers"]), np.asarray(data["eval_class_counts"])
    tested = images > 0
    num_answered, num_tested = int((answers[tested] > 0).sum()), int(tested.sum())
    if num_answered <= _FEW_ANSWERED * num_tested:
        are = "is" if num_answered == 1 else "are"
        found.append(f"Only {num_answered:,} of the {num_tested:,} tested classes {are} ever answered.")
    times = np.where(tested, answers / np.maximum(images, 1), 0)
    most = times.argmax()
    if times[most] > _TOO_OFTEN and answers[most] > _MANY_ANSWERS * answers.sum():
        name = data["class_names"][most]
        among = f"among the test {task_of(data).name}s"
        found.append(f"{name!r} is answered {times[most]:.1f} times as often as it occurs {among}.")
    return found
