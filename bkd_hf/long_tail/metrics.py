"""Long-tail metrics: numpy in, a dict of numbers out.

This file needs only numpy: it travels with `long_tail.py` to a Space, where bkd_hf is not installed.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

#: More training images than this: many-shot (Liu et al., 2019, arXiv 1904.05160).
MANY_SHOT_THRESHOLD = 100
#: Fewer training images than this: few-shot.
FEW_SHOT_THRESHOLD = 20

#: Equal bins of the largest softmax probability, for the calibration error.
NUM_BINS = 15
#: Largest number of reported confusions.
MAX_CONFUSIONS = 2000

_VALUES_AT_A_TIME = 2**17  # fits in a cache
# After so many logits, exponentials are computed in float32, which takes a third of the time. After removing their
# bias, they change the mean confidence of many images by less than 1e-9. Images at the border of a calibration bin are
# computed again in float64, so that none changes its bin.
_EXACT_VALUES, _AT_THE_BORDER = 2**24, 1e-5
_GRID = np.linspace(-16, 0, 2**14, dtype=np.float32)
_FLOAT32_BIAS = (np.exp(_GRID) / np.exp(_GRID, dtype=np.float64)).mean()


class NotFiniteError(ValueError):
    """A model's output is not finite: a diverged training, or a broken teacher."""


class LongTailAccumulator:
    """All metrics of a classifier, from batches of any size; it keeps no logits, only counts per class.

    A group's accuracy is the mean of the accuracies of its classes, as in Liu et al. (2019). On a balanced test set,
    this equals the accuracy over its images. Classes without test images are left out of every mean over classes, and
    their own accuracy is `None`.

    Args:
        class_counts: C numbers of *training* images, which sort the classes into many-shot (more than
            `many_shot_threshold`), few-shot (fewer than `few_shot_threshold`) and medium-shot (the others).
        many_shot_threshold: See above.
        few_shot_threshold: See above.
        post_hoc_tau: τ of [`post_hoc_logit_adjustment`], after which everything is measured again; 0 for none.
        num_bins: Number of bins of the calibration error.

    Raises:
        ValueError: If class counts or thresholds make no sense.
    """

    def __init__(
        self,
        class_counts: Sequence[int] | np.ndarray,
        many_shot_threshold: int = MANY_SHOT_THRESHOLD,
        few_shot_threshold: int = FEW_SHOT_THRESHOLD,
        post_hoc_tau: float = 0.0,
        num_bins: int = NUM_BINS,
    ):
        check_shot_thresholds(many_shot_threshold, few_shot_threshold)
        self.class_counts = check_class_counts(class_counts)
        self.thresholds = many_shot_threshold, few_shot_threshold
        # Images of each class, images predicted as it, and both.
        self.labelled, self.answered, self.correct = np.zeros((3, self.class_counts.size), dtype=np.int64)
        self.num_images = self.num_in_top5 = 0
        self.gaps = np.zeros(num_bins)  # correct − confidence, summed in each bin
        self.confusions: Counter[int] = Counter()  # by true class · C + prediction
        self.not_finite: int | None = None  # the first image without a prediction
        self.post_hoc_tau, self.adjusted = post_hoc_tau, None
        if post_hoc_tau and self.class_counts.all():
            self.adjusted = LongTailAccumulator(self.class_counts, *self.thresholds, num_bins=num_bins)
            self._adjustment = _log_frequencies(self.class_counts, post_hoc_tau)

    def update(self, logits: np.ndarray, labels: np.ndarray, first: int | None = None) -> None:
        """Add a batch.

        Args:
            logits: N×C, unnormalised log-probabilities; anything with a shape that can be sliced, e.g. a memory map.
            labels: N class numbers.
            first: Number of the first of these images, for errors; by default they follow the previous ones.

        Raises:
            ValueError: If shapes do not match, or a label is no whole number or out of range.
        """
        logits, labels = (logits if hasattr(logits, "shape") else np.asarray(logits)), np.asarray(labels)
        num_classes = self.class_counts.size
        if len(logits.shape) != 2 or labels.shape != logits.shape[:1] or not labels.size:
            raise ValueError(f"Expected N×C logits and N ≥ 1 labels, got shapes {logits.shape} and {labels.shape}.")
        if logits.shape[1] != num_classes:
            raise ValueError(f"There are {num_classes} class counts, but the logits have {logits.shape[1]} classes.")
        if labels.dtype.kind not in "iub":
            raise ValueError(f"Labels must be whole numbers, got {labels.dtype}.")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"Labels must be in 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}.")
        labels = labels.astype(np.int64, copy=False)
        first = self.num_images if first is None else first
        rows = max(1, _VALUES_AT_A_TIME // num_classes)
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            self._add(np.asarray(logits[part]), labels[part], first + start)

    def _add(self, logits: np.ndarray, labels: np.ndarray, first: int) -> None:
        logits = logits.astype(np.result_type(logits, np.float32), copy=False)
        answers = logits.argmax(axis=1)
        largest = np.take_along_axis(logits, answers[:, None], axis=1)  # NaN if any logit is
        self.num_images += len(labels)
        np.add.at(self.labelled, labels, 1)
        if not np.isfinite(largest).all():
            bad = first + int(np.isfinite(largest[:, 0]).argmin())
            self.not_finite = bad if self.not_finite is None else min(bad, self.not_finite)
            return  # there will be no metrics
        right = answers == labels
        np.add.at(self.answered, answers, 1)
        np.add.at(self.correct, labels[right], 1)
        self.confusions.update((labels[~right] * self.class_counts.size + answers[~right]).tolist())
        self.num_in_top5 += int(right.sum()) + _num_in_top5(logits, labels, ~right)
        num_bins = len(self.gaps)
        is_exact = self.num_images * self.class_counts.size < _EXACT_VALUES
        confidence = _confidence(logits, largest, num_bins, np.float64 if is_exact else np.float32)
        bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
        self.gaps += np.bincount(bins, weights=right - confidence, minlength=num_bins)
        if self.adjusted is not None:
            self.adjusted._add(logits - self._adjustment, labels, first)

    def merge(self, other: LongTailAccumulator) -> LongTailAccumulator:
        """Add the counts of another accumulator with the same classes and options; return this one."""
        for name in ("labelled", "answered", "correct", "num_images", "num_in_top5", "gaps"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.confusions.update(other.confusions)
        bad = [each.not_finite for each in (self, other) if each.not_finite is not None]
        self.not_finite = min(bad, default=None)
        if self.adjusted is not None and other.adjusted is not None:
            self.adjusted.merge(other.adjusted)
        return self

    def compute(self) -> dict[str, Any]:
        """Return the results.

        Returns:
            `metrics`: as [`long_tail_metrics`];
            `post_hoc_metrics`: `tau`, and the metrics after post-hoc logit adjustment; `None` without it, or if a
            class has no training image;
            `answers`: C numbers of images predicted as each class;
            `confusions`: lists [true class, prediction, images], the most frequent first (2,000 at most).

        Raises:
            NotFiniteError: If the best logit of an image is not finite. A subclass of `ValueError`.
            ValueError: If there is nothing to measure.
        """
        metrics = self._metrics()
        most = heapq.nsmallest(MAX_CONFUSIONS, self.confusions.items(), key=lambda pair: (-pair[1], pair[0]))
        return {
            "metrics": metrics,
            "post_hoc_metrics": self.adjusted and {"tau": self.post_hoc_tau, **self.adjusted._metrics()},
            "answers": self.answered.tolist(),
            "confusions": [[*divmod(pair, self.class_counts.size), number] for pair, number in most],
        }

    def scalars(self) -> dict[str, float]:
        """Return the `metrics` of [`compute`] that are single numbers."""
        return {name: value for name, value in self._metrics().items() if name != "per_class_accuracy"}

    def _metrics(self) -> dict[str, Any]:
        if not self.num_images:
            raise ValueError("No example has been measured.")
        if self.not_finite is not None:
            raise NotFiniteError(
                f"The logits of example {self.not_finite} are not finite (NaN or Inf): they answer nothing. The model "
                "has diverged, or its precision has too small a range."
            )
        tested = self.labelled > 0
        recall = self.correct[tested] / self.labelled[tested]
        f1 = 2 * self.correct[tested] / (self.labelled[tested] + self.answered[tested])

        metrics: dict[str, Any] = {"accuracy": self.correct.sum() / self.num_images}
        if tested.size > 5:
            metrics["top5_accuracy"] = self.num_in_top5 / self.num_images
        metrics["balanced_accuracy"] = recall.mean()
        metrics["macro_f1"] = f1.mean()
        for name, group in shot_groups(self.class_counts, *self.thresholds).items():
            if group[tested].any():
                metrics[f"{name}_accuracy"] = recall[group[tested]].mean()
        metrics["worst_class_accuracy"] = recall.min()
        with np.errstate(divide="ignore"):
            metrics["harmonic_mean_accuracy"] = 1 / np.mean(1 / recall)
            metrics["geometric_mean_accuracy"] = np.exp(np.mean(np.log(recall)))
        metrics["expected_calibration_error"] = np.abs(self.gaps).sum() / self.num_images
        metrics = {name: float(value) for name, value in metrics.items()}
        per_class = iter(recall.tolist())
        metrics["per_class_accuracy"] = [next(per_class) if is_tested else None for is_tested in tested]
        return metrics


def long_tail_metrics(
    logits: np.ndarray,
    labels: np.ndarray,
    class_counts: Sequence[int] | np.ndarray,
    many_shot_threshold: int = MANY_SHOT_THRESHOLD,
    few_shot_threshold: int = FEW_SHOT_THRESHOLD,
) -> dict[str, Any]:
    """All metrics of a classifier on a test set, as fractions (see [`LongTailAccumulator`], also for the arguments).

    Returns:
        `accuracy`, `top5_accuracy` (with more than 5 classes), `balanced_accuracy` (mean over classes), `macro_f1`,
        `many_shot_accuracy`, `medium_shot_accuracy`, `few_shot_accuracy` (each absent if it has no test image),
        `worst_class_accuracy`, `harmonic_mean_accuracy`, `geometric_mean_accuracy` (over classes),
        `expected_calibration_error` (15 bins), and the list `per_class_accuracy`.

    Raises:
        NotFiniteError: If the best logit of an image is not finite. A subclass of `ValueError`.
        ValueError: If there is nothing to measure, shapes do not match, or a threshold makes no sense.
    """
    accumulator = LongTailAccumulator(class_counts, many_shot_threshold, few_shot_threshold)
    accumulator.update(logits, labels)
    return accumulator.compute()["metrics"]


def post_hoc_logit_adjustment(
    logits: np.ndarray, class_counts: Sequence[int] | np.ndarray, tau: float = 1.0
) -> np.ndarray:
    """Remove the training frequencies from a trained model's logits (Menon et al., 2021, arXiv 2007.07314, eq. 9).

        z − τ · log π,    π_c = n_c / Σ_k n_k

    Args:
        logits: N×C.
        class_counts: C numbers of training images, n.
        tau: τ; 0 changes nothing.

    Returns:
        N×C adjusted logits, float64.

    Raises:
        ValueError: If a class has no training image, or the numbers of classes differ.
    """
    counts = check_class_counts(class_counts)
    if counts.size != np.shape(logits)[-1]:
        raise ValueError(f"There are {counts.size} class counts, but the logits have {np.shape(logits)[-1]} classes.")
    if (counts == 0).any():
        raise ValueError(
            f"Class {counts.argmin()} has no training example: the logarithm of its frequency is not finite."
        )
    return np.asarray(logits, dtype=np.float64) - _log_frequencies(counts, tau)


def _log_frequencies(counts: np.ndarray, tau: float) -> np.ndarray:
    return tau * np.log(counts / counts.sum())


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
    """Raise a `ValueError` unless 0 ≤ few ≤ many + 1 and 0 ≤ many, so that each class falls into one group."""
    if many_shot_threshold < 0:
        raise ValueError(f"--many_shot_threshold must not be negative, got {many_shot_threshold}.")
    if not 0 <= few_shot_threshold <= many_shot_threshold + 1:
        raise ValueError(
            f"--few_shot_threshold ({few_shot_threshold}) must not be negative nor above --many_shot_threshold "
            f"({many_shot_threshold}): a class would be many-shot and few-shot at once."
        )


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS) -> float:
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
    accumulator = LongTailAccumulator(np.ones(np.shape(logits)[-1]), num_bins=num_bins)
    accumulator.update(logits, labels)
    return accumulator.compute()["metrics"]["expected_calibration_error"]


def _num_in_top5(logits: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> int:
    """How many labels of the requested rows are among the five best classes; among equals, the first is best."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    better = (logits > own).view(np.uint8).sum(axis=1, dtype=np.uint32)
    rows = np.flatnonzero(asked & (better < 5))
    before = np.arange(logits.shape[1]) < labels[rows, None]
    return int((better[rows] + ((logits[rows] == own[rows]) & before).sum(axis=1) < 5).sum())


def _confidence(logits: np.ndarray, largest: np.ndarray, num_bins: int, dtype: Any) -> np.ndarray:
    """Largest softmax probability of each row, by exponentials of this type."""
    with np.errstate(over="ignore"):  # overflow of float32 gives −∞, whose exponential is 0
        shifted = np.subtract(logits, largest, dtype=np.result_type(logits, dtype)).astype(dtype, copy=False)
    total = np.exp(shifted, out=shifted).sum(axis=1, dtype=np.float64)
    confidence = 1 / total
    if dtype is np.float32:
        confidence = 1 / (1 + (total - 1) / _FLOAT32_BIAS)  # the largest is 1
        border = np.rint(confidence * num_bins)
        near = (np.abs(confidence * num_bins - border) < _AT_THE_BORDER) & (border > 0) & (border < num_bins)
        confidence[near] = _confidence(logits[near], largest[near], num_bins, np.float64)
    return confidence


def wilson_interval(
    num_correct: np.ndarray, num_images: np.ndarray, z: float = 1.959963984540054
) -> tuple[np.ndarray, np.ndarray]:
    """Confidence interval of an accuracy (Wilson, 1927; Brown et al., 2001, eq. 4), valid for few images too.

        (p + z²/2n ± z · √( p(1−p)/n + z²/4n² )) / (1 + z²/n),    p = correct / n

    Args:
        num_correct: Numbers of correctly classified images, of any shape.
        num_images: n > 0, of the same shape.
        z: Quantile of the standard normal distribution; by default that of 95 % confidence.

    Returns:
        Lower and upper bounds, fractions.
    """
    n = np.asarray(num_images, dtype=np.float64)
    p = np.asarray(num_correct) / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # At p = 0 and 1, a bound is exactly 0 or 1 except for rounding.
    return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)


def check_class_counts(class_counts: Any) -> np.ndarray:
    """Return class counts (a sequence, an array or a tensor) as a float64 array of shape (C,).

    Raises:
        ValueError: If they are empty, not one-dimensional, negative, or not integers.
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
