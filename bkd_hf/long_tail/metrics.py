"""Long-tail metrics: numpy in, a dict of numbers out.

This file needs only numpy: it travels with `long_tail.py` to a Space, where bkd_hf is not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

#: More training images than this: many-shot (Liu et al., 2019, arXiv 1904.05160).
MANY_SHOT_THRESHOLD = 100
#: Fewer training images than this: few-shot.
FEW_SHOT_THRESHOLD = 20

_VALUES_AT_A_TIME = 2**22


class NotFiniteError(ValueError):
    """What a model says is no number: a training that diverged, or a teacher that does not compute."""


def long_tail_metrics(
    logits: np.ndarray,
    labels: np.ndarray,
    class_counts: Sequence[int] | np.ndarray,
    many_shot_threshold: int = MANY_SHOT_THRESHOLD,
    few_shot_threshold: int = FEW_SHOT_THRESHOLD,
) -> dict[str, Any]:
    """All metrics of a classifier on a test set, as fractions.

    A group's accuracy is the mean of the accuracies of its classes, as in Liu et al. (2019): the same as over its
    images where the test set is balanced. Classes without test images are left out of every mean over classes, and
    their own accuracy is `None`.

    Args:
        logits: N×C, unnormalised log-probabilities; anything that has a shape and can be sliced, e.g. a memory map.
        labels: N class numbers.
        class_counts: C numbers of *training* images, which sort the classes into many-shot (more than
            `many_shot_threshold`), few-shot (fewer than `few_shot_threshold`) and medium-shot (the others).
        many_shot_threshold: See above.
        few_shot_threshold: See above.

    Returns:
        `accuracy`, `top5_accuracy` (with more than 5 classes), `balanced_accuracy` (mean over classes), `macro_f1`,
        `many_shot_accuracy`, `medium_shot_accuracy`, `few_shot_accuracy` (each absent if it has no test image),
        `worst_class_accuracy`, `harmonic_mean_accuracy`, `geometric_mean_accuracy` (over classes),
        `expected_calibration_error` (15 bins), and the list `per_class_accuracy`.

    Raises:
        NotFiniteError: If the best logit of an image is not finite. A `ValueError`, as the following.
        ValueError: If there is nothing to measure, shapes do not fit, or a threshold makes no sense.
    """
    logits, labels = (logits if hasattr(logits, "shape") else np.asarray(logits)), np.asarray(labels)
    counts = check_class_counts(class_counts)
    if len(logits.shape) != 2 or labels.shape != logits.shape[:1] or not labels.size:
        raise ValueError(f"Expected N×C logits and N ≥ 1 labels, got shapes {logits.shape} and {labels.shape}.")
    if counts.size != logits.shape[1]:
        raise ValueError(f"There are {counts.size} class counts, but the logits have {logits.shape[1]} classes.")
    if labels.min() < 0 or labels.max() >= counts.size:
        raise ValueError(f"Labels must be in 0 to {counts.size - 1}, got {labels.min()} to {labels.max()}.")
    check_shot_thresholds(many_shot_threshold, few_shot_threshold)

    num_classes = counts.size
    predictions, in_top5, confidence = _answers(logits, labels)
    correct = predictions == labels
    num_labelled = np.bincount(labels, minlength=num_classes)
    num_predicted = np.bincount(predictions, minlength=num_classes)
    num_correct = np.bincount(labels[correct], minlength=num_classes)
    tested = num_labelled > 0
    recall = num_correct[tested] / num_labelled[tested]
    f1 = 2 * num_correct[tested] / (num_labelled[tested] + num_predicted[tested])

    metrics: dict[str, Any] = {"accuracy": correct.mean()}
    if num_classes > 5:
        metrics["top5_accuracy"] = in_top5.mean()
    metrics["balanced_accuracy"] = recall.mean()
    metrics["macro_f1"] = f1.mean()
    for name, group in shot_groups(counts, many_shot_threshold, few_shot_threshold).items():
        if group[tested].any():
            metrics[f"{name}_accuracy"] = recall[group[tested]].mean()
    metrics["worst_class_accuracy"] = recall.min()
    with np.errstate(divide="ignore"):
        metrics["harmonic_mean_accuracy"] = 1 / np.mean(1 / recall)
        metrics["geometric_mean_accuracy"] = np.exp(np.mean(np.log(recall)))
    metrics["expected_calibration_error"] = _calibration_error(confidence, correct)
    metrics = {name: float(value) for name, value in metrics.items()}
    per_class = np.divide(num_correct, num_labelled, where=tested, out=np.full(num_classes, np.nan))
    metrics["per_class_accuracy"] = [float(value) if ok else None for value, ok in zip(per_class, tested, strict=True)]
    return metrics


def post_hoc_logit_adjustment(
    logits: np.ndarray, class_counts: Sequence[int] | np.ndarray, tau: float = 1.0
) -> np.ndarray:
    """Take the training frequencies out of a trained model's answers (Menon et al., 2021, arXiv 2007.07314, eq. 9).

        z − τ · log π,    π_c = n_c / Σ_k n_k

    Args:
        logits: N×C.
        class_counts: C numbers of training images, n.
        tau: τ; 0 changes nothing.

    Returns:
        N×C adjusted logits, float64, to be measured as any others.

    Raises:
        ValueError: If a class has no training image, or the numbers of classes differ.
    """
    counts = check_class_counts(class_counts)
    if counts.size != np.shape(logits)[-1]:
        raise ValueError(f"There are {counts.size} class counts, but the logits have {np.shape(logits)[-1]} classes.")
    if (counts == 0).any():
        raise ValueError(
            f"Class {counts.argmin()} has no training image: the logarithm of its frequency is not finite."
        )
    return np.asarray(logits, dtype=np.float64) - tau * np.log(counts / counts.sum())


def shot_groups(
    class_counts: Sequence[int] | np.ndarray,
    many_shot_threshold: int = MANY_SHOT_THRESHOLD,
    few_shot_threshold: int = FEW_SHOT_THRESHOLD,
) -> dict[str, np.ndarray]:
    """Boolean masks over classes: `many_shot`, `medium_shot` and `few_shot`, by training images."""
    counts = np.asarray(class_counts)
    many, few = counts > many_shot_threshold, counts < few_shot_threshold
    return {"many_shot": many, "medium_shot": ~many & ~few, "few_shot": few}


def check_shot_thresholds(many_shot_threshold: int, few_shot_threshold: int) -> None:
    """Raise a `ValueError` unless 0 ≤ few ≤ many + 1, so that each class falls into one group."""
    if not 0 <= few_shot_threshold <= many_shot_threshold + 1:
        raise ValueError(
            f"--few_shot_threshold ({few_shot_threshold}) must not be negative nor above --many_shot_threshold "
            f"({many_shot_threshold}): a class would be many-shot and few-shot at once."
        )


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """Gap between confidence and accuracy (Naeini et al., 2015; Guo et al., 2017, arXiv 1706.04599, eq. 3).

        ECE = Σ_b (n_b / N) · |accuracy(b) − confidence(b)|

    over `num_bins` equal bins of the largest softmax probability.

    Args:
        logits: N×C.
        labels: N class numbers.
        num_bins: Number of bins.

    Raises:
        NotFiniteError: If the best logit of an image is not finite.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    predictions, _, confidence = _answers(logits, labels)
    return _calibration_error(confidence, predictions == labels, num_bins)


def _calibration_error(confidence: np.ndarray, correct: np.ndarray, num_bins: int = 15) -> float:
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def _answers(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each image the predicted class, whether the label is among the five best, and the largest probability.

    Some images at a time: a copy of a million images × ten thousand classes in float64 would take 80 GB.
    """
    num_images, num_classes = logits.shape
    predictions, confidence = np.empty(num_images, dtype=np.int64), np.empty(num_images)
    in_top5 = np.ones(num_images, dtype=bool)
    rows = max(1, _VALUES_AT_A_TIME // num_classes)
    for start in range(0, num_images, rows):
        part = slice(start, start + rows)
        values = np.asarray(logits[part], dtype=np.float64)
        largest = values.max(axis=1, keepdims=True)  # NaN where one of them is
        wrong = np.flatnonzero(~np.isfinite(largest))
        if wrong.size:
            raise NotFiniteError(
                f"The logits of image {start + wrong[0]} are not finite (NaN or Inf): they answer nothing. The "
                "model has diverged, or its precision has too small a range."
            )
        predictions[part] = values.argmax(axis=1)
        if num_classes > 5:
            best = np.argpartition(values, -5, axis=1)[:, -5:]
            in_top5[part] = (best == labels[part, None]).any(axis=1)
        confidence[part] = 1 / np.exp(values - largest).sum(axis=1)
    return predictions, in_top5, confidence


def wilson_interval(
    num_correct: np.ndarray, num_images: np.ndarray, z: float = 1.959963984540054
) -> tuple[np.ndarray, np.ndarray]:
    """Confidence interval of an accuracy (Wilson, 1927; Brown et al., 2001, eq. 4), which holds for few images too.

        (p + z²/2n ± z · √( p(1−p)/n + z²/4n² )) / (1 + z²/n),    p = correct / n

    Args:
        num_correct: Images that are recognised, of any shape.
        num_images: n > 0, of the same shape.
        z: Quantile of the standard normal distribution; by default that of 95 % confidence.

    Returns:
        Lower and upper bounds, fractions.
    """
    n = np.asarray(num_images, dtype=np.float64)
    p = np.asarray(num_correct) / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # At p = 0 and 1 a bound is 0 or 1 exactly, but for rounding.
    return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)


def check_class_counts(class_counts: Any) -> np.ndarray:
    """Return class counts (a sequence, an array or a tensor) as a float64 array of shape (C,).

    Raises:
        ValueError: If they are empty, not one-dimensional, negative, or no whole numbers.
    """
    if hasattr(class_counts, "detach"):  # a tensor
        class_counts = class_counts.detach().cpu().numpy()
    counts = np.asarray(class_counts, dtype=np.float64)
    if counts.ndim != 1 or counts.size == 0:
        raise ValueError(f"class_counts must be one number per class, got shape {counts.shape}.")
    wrong = np.flatnonzero(~(np.isfinite(counts) & (counts >= 0) & (counts == np.floor(counts))))
    if wrong.size:
        raise ValueError(f"class_counts must be whole numbers ≥ 0, got {counts[wrong[0]]} for class {wrong[0]}.")
    return counts
