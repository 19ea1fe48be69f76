"""Long-tail metrics; the numbers are computed in `long_tail/metrics.py`, which can stand alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .long_tail.metrics import (
    FEW_SHOT_THRESHOLD,
    MANY_SHOT_THRESHOLD,
    NotFiniteError,
    check_class_counts,
    check_shot_thresholds,
    expected_calibration_error,
    long_tail_metrics,
    post_hoc_logit_adjustment,
    shot_groups,
    wilson_interval,
)

if TYPE_CHECKING:
    from transformers import EvalPrediction

__all__ = [
    "FEW_SHOT_THRESHOLD",
    "MANY_SHOT_THRESHOLD",
    "LongTailEvaluation",
    "NotFiniteError",
    "check_class_counts",
    "check_shot_thresholds",
    "expected_calibration_error",
    "long_tail_metrics",
    "post_hoc_logit_adjustment",
    "shot_groups",
    "shot_thresholds",
    "wilson_interval",
]


@dataclass(frozen=True)
class LongTailEvaluation:
    """[`long_tail_metrics`] as `compute_metrics` of a `Trainer`: the scalars, which it logs at every evaluation.

    Args:
        class_counts: C numbers of *training* images.
        many_shot_threshold: As for [`long_tail_metrics`].
        few_shot_threshold: As for [`long_tail_metrics`].
    """

    class_counts: Sequence[int] | np.ndarray
    many_shot_threshold: int = MANY_SHOT_THRESHOLD
    few_shot_threshold: int = FEW_SHOT_THRESHOLD

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        metrics = long_tail_metrics(
            prediction.predictions,
            prediction.label_ids,
            self.class_counts,
            self.many_shot_threshold,
            self.few_shot_threshold,
        )
        del metrics["per_class_accuracy"]
        return metrics


def shot_thresholds(compute_metrics: Any) -> tuple[int, int]:
    """Return the bounds of many- and few-shot classes that a trainer's evaluations have."""
    if isinstance(compute_metrics, LongTailEvaluation):
        return compute_metrics.many_shot_threshold, compute_metrics.few_shot_threshold
    return MANY_SHOT_THRESHOLD, FEW_SHOT_THRESHOLD
