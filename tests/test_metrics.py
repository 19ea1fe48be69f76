from __future__ import annotations

import doctest
import math
import pickle
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, top_k_accuracy_score

import bkd_hf
from bkd_hf import (
    NotFiniteError,
    expected_calibration_error,
    long_tail_metrics,
    post_hoc_logit_adjustment,
    shot_groups,
    wilson_interval,
)
from bkd_hf.metrics import LongTailAccumulator


def one_hot(predictions: list[int], classes: int) -> np.ndarray:
    return 5.0 * np.eye(classes)[predictions]


def flat(metrics: dict) -> dict:
    return {**metrics, **dict(enumerate(metrics["per_class_accuracy"])), "per_class_accuracy": None}


@pytest.mark.parametrize("row", [[0, math.nan, 0], [0, math.inf, 0], [-math.inf] * 3])
def test_answers_that_are_no_numbers_are_refused(row):
    logits, labels = np.stack([np.zeros(3), np.asarray(row)]), np.array([0, 1])
    for measure in (
        lambda: long_tail_metrics(logits, labels, [5, 5, 5]),
        lambda: expected_calibration_error(logits, labels),
    ):
        with pytest.raises(NotFiniteError, match="logits of example 1 are not finite"):
            measure()
    # A teacher that does not know a class says −∞ of it.
    assert long_tail_metrics(np.array([[0, -math.inf]]), np.array([0]), [5, 5])["accuracy"] == 1.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("classes", [4, 30])
def test_batches_and_merged_parts_are_measured_as_the_whole(dtype, classes):
    generator = np.random.default_rng(0)
    labels, counts = generator.integers(0, classes, 200), generator.integers(1, 300, classes)
    logits = (generator.normal(size=(200, classes)) + 2 * np.eye(classes)[labels]).astype(dtype)
    parts = [LongTailAccumulator(counts, post_hoc_tau=0.5) for _ in range(2)]
    for number, (start, stop) in enumerate([(0, 1), (1, 90), (90, 97), (97, 200)]):
        parts[number % 2].update(logits[start:stop], labels[start:stop])
    found = parts[0].merge(parts[1]).compute()
    adjusted = post_hoc_logit_adjustment(logits, counts, 0.5)
    assert flat(found["metrics"]) == pytest.approx(flat(long_tail_metrics(logits, labels, counts)), abs=1e-12)
    expected = {"tau": 0.5, **long_tail_metrics(adjusted, labels, counts)}
    assert flat(found["post_hoc_metrics"]) == pytest.approx(flat(expected), abs=1e-12)
    predictions = logits.argmax(axis=1)
    assert found["answers"] == np.bincount(predictions, minlength=classes).tolist()
    confused = confusion_matrix(labels, predictions, labels=range(classes)) * (1 - np.eye(classes, dtype=int))
    assert sorted(found["confusions"]) == [[i, j, confused[i, j]] for i, j in np.argwhere(confused)]
    numbers = [number for _, _, number in found["confusions"]]
    assert numbers == sorted(numbers, reverse=True)


def test_many_logits_are_measured_as_few(monkeypatch):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 500, 2000)
    logits = (generator.normal(size=(2000, 500)) + 4 * np.eye(500)[labels]).astype(np.float32)
    logits[0] = 0
    logits[0, 0] = math.log(499)  # its confidence is one half, the border of two bins
    exact = expected_calibration_error(logits, labels, num_bins=10)
    monkeypatch.setattr("bkd_hf.long_tail.metrics._EXACT_VALUES", 0)
    assert exact != expected_calibration_error(logits, labels, num_bins=10) == pytest.approx(exact, abs=1e-9)


def test_ten_thousand_classes_need_no_matrix():
    accumulator = LongTailAccumulator(np.ones(10_000))
    accumulator.update(np.eye(2, 10_000), np.array([0, 9_999]))
    assert accumulator.compute()["confusions"] == [[9_999, 1, 1]]
    assert len(pickle.dumps(accumulator)) < 5 * 8 * 10_000


def test_of_equal_logits_the_first_are_the_best():
    metrics = long_tail_metrics(np.zeros((10, 10)), np.arange(10), [1] * 10)
    assert (metrics["accuracy"], metrics["top5_accuracy"]) == (0.1, 0.5)


def test_after_an_image_without_an_answer_parts_have_no_metrics():
    parts = [LongTailAccumulator([5, 5]) for _ in range(2)]
    parts[0].update(np.zeros((2, 2)), np.array([0, 1]), first=0)
    parts[1].update(np.array([[0, 1], [0, math.nan]]), np.array([0, 1]), first=2)
    with pytest.raises(NotFiniteError, match="logits of example 3 are not finite"):
        parts[0].merge(parts[1]).compute()
    with pytest.raises(ValueError, match="No example has been measured"):
        LongTailAccumulator([5, 5]).compute()


def test_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predictions = [0, 0, 0, 1, 1, 1, 2, 0]
    metrics = long_tail_metrics(one_hot(predictions, 3), labels, class_counts=[500, 50, 5])
    assert metrics["accuracy"] == 6 / 8
    assert metrics["per_class_accuracy"] == [0.75, 1.0, 0.5]
    assert metrics["balanced_accuracy"] == pytest.approx(0.75)
    assert (metrics["many_shot_accuracy"], metrics["medium_shot_accuracy"]) == (0.75, 1.0)
    assert metrics["few_shot_accuracy"] == metrics["worst_class_accuracy"] == 0.5
    assert metrics["harmonic_mean_accuracy"] == pytest.approx(3 / (1 / 0.75 + 1 + 2))
    assert metrics["geometric_mean_accuracy"] == pytest.approx(0.375 ** (1 / 3))
    confidence = math.exp(5) / (math.exp(5) + 2)
    assert metrics["expected_calibration_error"] == pytest.approx(confidence - 0.75)
    assert "top5_accuracy" not in metrics


@given(seed=st.integers(0, 1000), classes=st.integers(6, 20))
def test_agrees_with_scikit_learn(seed, classes):
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), generator.integers(0, classes, 100)])
    logits = generator.normal(size=(labels.size, classes)) + 2 * np.eye(classes)[labels]
    metrics = long_tail_metrics(logits, labels, [10] * classes)
    predictions = logits.argmax(1)
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predictions))
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert metrics["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))


def test_groups_by_training_counts_with_the_published_borders():
    groups = shot_groups([101, 100, 20, 19])
    assert [mask.tolist() for mask in groups.values()] == [
        [True, False, False, False],
        [False, True, True, False],
        [False, False, False, True],
    ]
    moved = shot_groups([101, 100, 20, 19], many_shot_threshold=50, few_shot_threshold=5)
    assert moved["many_shot"].tolist() == [True, True, False, False]


def test_group_accuracy_is_the_mean_over_its_classes():
    labels = np.array([0] * 8 + [1] * 2)
    metrics = long_tail_metrics(one_hot([0] * 8 + [0, 0], 2), labels, [500, 200])
    assert metrics["many_shot_accuracy"] == 0.5


def test_what_is_missing_is_absent_not_zero():
    metrics = long_tail_metrics(one_hot([0, 1], 3), np.array([0, 1]), class_counts=[500, 50, 5])
    assert "few_shot_accuracy" not in metrics  # class 2 has no test image
    assert metrics["per_class_accuracy"] == [1.0, 1.0, None]
    assert metrics["balanced_accuracy"] == metrics["worst_class_accuracy"] == 1.0
    assert "medium_shot_accuracy" not in long_tail_metrics(one_hot([0, 1], 2), np.array([0, 1]), [500, 5])


def test_calibration():
    # Sure and right: no error. Sure (in the limit) and right half of the time: 0.5.
    assert expected_calibration_error(100 * np.eye(2)[[0, 1]], np.array([0, 1])) == pytest.approx(0)
    assert expected_calibration_error(100 * np.eye(2)[[0, 1]], np.array([0, 0])) == pytest.approx(0.5)
    # Unsure, and right as often as it says.
    assert expected_calibration_error(np.zeros((4, 2)), np.array([0, 1, 0, 1])) == pytest.approx(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 3)), np.array([0, 1]), [1, 2]), "2 class counts, but the logits have 3"),
        ((np.zeros((2, 3)), np.array([0, 3]), [1, 2, 3]), "Labels must be in 0 to 2"),
        ((np.zeros((2, 3)), np.array([0.0, 1.0]), [1, 2, 3]), "Labels must be whole numbers, got float64"),
        ((np.zeros((0, 3)), np.array([], dtype=int), [1, 2, 3]), "N ≥ 1"),
        ((np.zeros((2, 3)), np.array([0]), [1, 2, 3]), "N×C"),
        ((np.zeros((1, 2)), np.array([0]), [1, 2], 10, 20), "few_shot_threshold"),
        ((np.zeros((1, 2)), np.array([0]), [1, 2], -1, 0), "many_shot_threshold"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        long_tail_metrics(*arguments)


def test_evaluate_metric_loads_from_its_folder_offline():
    metric = evaluate.load(str(Path(bkd_hf.__file__).parent / "long_tail"))
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(50, 6)).astype(np.float32), generator.integers(0, 6, 50)
    counts = [500, 200, 50, 30, 10, 5]
    assert metric.compute(predictions=logits, references=labels, class_counts=counts) == long_tail_metrics(
        logits, labels, counts
    )
    # The example in its documentation runs.
    parsed = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, "long_tail", None, 0)
    assert doctest.DocTestRunner().run(parsed).failed == 0
    assert parsed.examples


@given(num_images=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_interval_is_that_of_scipy(num_images, share):
    num_correct = round(share * num_images)
    expected = binomtest(num_correct, num_images).proportion_ci(method="wilson")
    assert wilson_interval(num_correct, num_images) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_of_many_classes_at_once():
    low, high = wilson_interval(np.array([0, 2, 5]), np.array([5, 5, 5]))
    assert low == pytest.approx([0.0, 0.117621, 0.565518], abs=1e-6)  # 2 of 5 may well be 12 or 77 %
    assert high == pytest.approx([0.434482, 0.769276, 1.0], abs=1e-6)
