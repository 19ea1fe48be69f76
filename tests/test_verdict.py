"""The verdict on a student: is it better than alternatives without training?"""

from __future__ import annotations

import copy

import pytest

from bkd_hf import load_results
from bkd_hf.card import build
from bkd_hf.inputs import long_tail_evaluation
from bkd_hf.verdict import free_alternatives, judge
from tests.test_card import CARDS

ADJUSTED = "the teacher after post-hoc logit adjustment (τ = 1)"


def results_of(student: float, teacher: float, adjusted: float | None, balanced: float | None = None, **parts) -> dict:
    """Results with these accuracies; `balanced` is the student's mean over classes, where it is another."""
    results = copy.deepcopy(load_results(CARDS / "digits"))
    for model, accuracy in (("student", student), ("teacher", teacher)):
        results[model]["metrics"] |= {"accuracy": accuracy, "balanced_accuracy": accuracy}
        results[model]["post_hoc_metrics"] = None
    if balanced is not None:
        results["student"]["metrics"]["balanced_accuracy"] = balanced
    if adjusted is not None:
        metrics = {"accuracy": adjusted, "balanced_accuracy": adjusted}
        results["teacher"]["post_hoc_metrics"] = {**results["teacher"]["metrics"], "tau": 1.0, **metrics}
    results["teacher"]["method"] = "ce"
    return {**results, "method": "bkd", **parts}


def test_better_than_all_that_is_free():
    verdict = judge(results_of(0.7, 0.45, 0.57))
    assert verdict.is_better is True
    assert (
        verdict.sentence
        == f"The student is better than {ADJUSTED}, which takes no training: 70.0 against 57.0 % overall."
    )
    assert verdict.warnings == []


@pytest.mark.parametrize(("student", "what"), [(0.46, "seems better"), (0.44, "is NOT better")])
def test_a_difference_of_a_few_images_may_be_chance(student, what):
    verdict = judge(results_of(student, 0.45, None))
    assert verdict.is_better is (what == "seems better")
    # 1.96 · √((0.46 · 0.54 + 0.45 · 0.55) / 400) = 0.069; and the teacher as it is is none that takes no training
    assert verdict.sentence.startswith(
        f"The student {what} than its teacher: {100 * student:.1f} against 45.0 % overall; with 400 test images a "
        "difference below 6.9 points may be chance."
    )


def test_sums_in_another_order_are_no_difference():
    verdict = judge(results_of(0.45, 0.45, None, balanced=0.45 + 1e-16))
    assert verdict.sentence.startswith("The student is NOT better than its teacher: 45.0 against 45.0 % overall;")


@pytest.mark.parametrize("student", [0.5, 0.57])
def test_no_better_than_the_adjusted_teacher(student):
    results = results_of(student, 0.45, 0.57)
    verdict = judge(results)
    assert verdict.is_better is False
    assert verdict.sentence.startswith(f"The student is NOT better than {ADJUSTED}, which takes no training: ")
    assert "--method bkd-calibrated" in verdict.sentence
    card = str(build(results))
    table, _, below = card.partition("\n\nThe student is NOT better than")
    assert table.splitlines()[-1].startswith("|")  # it is the first line under the table
    assert "Distillation gained nothing here" in below
    assert "what needs no training may serve you better" in below.partition("**For whom:**")[2].splitlines()[0]


def test_better_in_the_mean_over_classes_alone():
    verdict = judge(results_of(0.55, 0.45, 0.57, balanced=0.6))
    assert verdict.is_better is False
    assert f"better only in the mean over classes than {ADJUSTED}" in verdict.sentence
    assert "55.0 against 57.0 % overall; 60.0 against 57.0 % in the mean over classes" in verdict.sentence


def test_nothing_is_said_of_adjusting_a_teacher_that_never_saw_this_tail():
    results = results_of(0.5, 0.45, None)
    assert list(free_alternatives(results)) == ["its teacher"]
    assert "adjust" not in judge(results).sentence
    assert "adjust" not in str(build(results)).partition("## How it was trained")[0]


@pytest.mark.parametrize(
    "method",
    ["balanced-softmax (label_smoothing_factor 0.1)", "ce (focal_gamma 2, classification_loss balanced_softmax)"],
)
def test_nor_of_adjusting_a_teacher_that_corrects_itself(method):
    results = results_of(0.5, 0.45, 0.4)
    results["teacher"]["method"] = method
    assert list(free_alternatives(results)) == ["its teacher"]
    for nothing in ("logit-adjustment (logit_adjustment_tau 0)", "cb-ce (class_balance_beta 0)"):
        results["teacher"]["method"] = nothing
        assert len(free_alternatives(results)) == 2


def test_other_advice_for_the_method_that_is_recommended():
    sentence = judge(results_of(0.5, 0.45, 0.57, method="bkd-calibrated")).sentence
    assert "--method bkd-calibrated" not in sentence
    assert "--num_train_epochs" in sentence


def test_a_model_without_a_teacher():
    results = results_of(0.5, 0.45, None)
    results["student"]["post_hoc_metrics"] = {**results["student"]["metrics"], "tau": 1.0, "accuracy": 0.6,
                                              "balanced_accuracy": 0.6}  # fmt: skip
    results |= {"teacher": None, "method": "ce"}
    results["options"]["training"] |= {"classification_loss": "cross_entropy", "distillation_loss": "none"}
    verdict = judge(results)
    assert verdict.sentence.startswith("The model as it was trained is NOT better than the model after post-hoc")
    of_training = results["options"]["training"]
    of_training["classification_loss"] = "balanced_softmax"
    assert judge(results).is_better is None  # it would be corrected twice
    of_training |= {"classification_loss": "logit_adjustment", "logit_adjustment_tau": 0.0}
    assert judge(results).sentence == verdict.sentence  # it is plain cross-entropy


def test_a_collapse_is_a_warning_on_top():
    results = results_of(0.11, 0.45, 0.57)
    results["student"]["answers"] = [0] * 9 + [400]
    first, second, third = judge(results).warnings
    assert first == "The student is far below its teacher: 11.0 against 45.0 % overall."
    assert second == "Only 1 of the 10 tested classes is ever answered."
    assert third == "'9' is answered 10.0 times as often as it occurs among the test images."
    assert f"**Warning: {second}**" in str(build(results))


def test_a_class_of_few_images_is_no_warning():
    results = results_of(0.6, 0.45, 0.57)
    results["student"]["answers"] = [40] * 9 + [40]
    results["data"]["eval_class_counts"] = [40] * 9 + [8]
    assert judge(results).warnings == []  # five times too often, but a tenth of the answers
    results["student"]["answers"] = [30] * 9 + [130]
    assert "'9' is answered 16.2 times" in judge(results).warnings[0]


def test_results_of_earlier_versions_are_judged_too():
    results = copy.deepcopy(load_results(CARDS / "digits"))
    for model in ("teacher", "student"):
        results[model].pop("answers", None)
    assert judge(results).is_better is not None


@pytest.mark.parametrize(("answers", "is_warned_of"), [([80, 0], True), ([60, 20], False)])
def test_one_of_two_classes_is_few(answers, is_warned_of):
    results = results_of(0.7, 0.45, None)
    results["student"]["answers"], results["data"]["eval_class_counts"] = answers, [40, 40]
    told = ["Only 1 of the 2 tested classes is ever answered."] if is_warned_of else []
    assert judge(results).warnings == told


def test_each_alternative_must_be_beaten_everywhere():
    results = results_of(0.85, 0.9, 0.8, balanced=0.75)
    results["teacher"]["metrics"]["balanced_accuracy"] = 0.5
    results["teacher"]["post_hoc_metrics"]["balanced_accuracy"] = 0.7
    verdict = judge(results)
    assert verdict.is_better is False
    assert verdict.sentence.startswith(
        "The student is better only in the mean over classes than its teacher: 85.0 against 90.0 % overall; "
        "75.0 against 50.0 % in the mean over classes"
    )


@pytest.mark.parametrize("training", [None, {"epochs": 3.0}])
def test_a_teacher_that_was_given_cannot_be_trained_longer(training):
    results = results_of(0.4, 0.45, None)
    results["teacher"].pop("training", None)
    if training:
        results["teacher"]["training"] = training
    assert ("--teacher_num_train_epochs" in judge(results).sentence) is bool(training)


@pytest.mark.parametrize(("counts", "tau"), [([5, 5], 0.0), ([5, 4], 1.0)])
def test_there_is_nothing_to_adjust_without_a_tail(counts, tau):
    """The model "after adjustment" would be itself, which it cannot be better than."""
    data = {"class_counts": counts, "many_shot_threshold": 100, "few_shot_threshold": 20}
    assert long_tail_evaluation(data, 1.0).post_hoc_tau == tau
