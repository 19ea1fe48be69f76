"""Long-tail metrics; they are computed in `long_tail/metrics.py`, which also works without this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .long_tail.metrics import (
    FEW_SHOT_THRESHOLD,
    MANY_SHOT_THRESHOLD,
    LongTailAccumulator,
    NotFiniteError,
    check_class_counts,
    check_shot_thresholds,
    expected_calibration_error,
    long_tail_metrics,
    post_hoc_logit_adjustment,
    shot_groups,
    wilson_interval,
)

if TYPE_CHECKING:  # losses need no transformers
    from transformers import EvalPrediction

__all__ = [
    "FEW_SHOT_THRESHOLD",
    "MANY_SHOT_THRESHOLD",
    "LongTailAccumulator",
    "LongTailEvaluation",
    "NotFiniteError",
    "check_class_counts",
    "check_shot_thresholds",
    "expected_calibration_error",
    "groups_of",
    "long_tail_metrics",
    "post_hoc_logit_adjustment",
    "shot_groups",
    "wilson_interval",
]

#: With fewer test images of a class, its accuracy is a guess.
FEW_TEST_IMAGES = 10


def groups_of(data: dict[str, Any]) -> dict[str, np.ndarray]:
    """Masks of the many-, medium- and few-shot classes of the `data` section of results."""
    return shot_groups(data["class_counts"], data["many_shot_threshold"], data["few_shot_threshold"])


@dataclass(frozen=True)
class LongTailEvaluation:
    """[`long_tail_metrics`] as `compute_metrics` of a `Trainer`, which logs the scalars at every evaluation.

    `BKDTrainer` accumulates them batch by batch, without collecting logits.

    Args:
        class_counts: C numbers of *training* images.
        many_shot_threshold: As for [`long_tail_metrics`].
        few_shot_threshold: As for [`long_tail_metrics`].
        post_hoc_tau: τ of the post-hoc logit adjustment in `BKDTrainer.measure`; 0 for none.
    """

    class_counts: Sequence[int] | np.ndarray
    many_shot_threshold: int = MANY_SHOT_THRESHOLD
    few_shot_threshold: int = FEW_SHOT_THRESHOLD
    post_hoc_tau: float = 0.0

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        is_cut = isinstance(logits, (list, tuple))  # into batches, by `eval_do_concat_batches=False`
        accumulator = self.accumulator()
        for part in zip(logits, labels, strict=True) if is_cut else [(logits, labels)]:
            accumulator.update(*part)
        return accumulator.scalars()

    @property
    def adds_up(self) -> bool:
        """Whether an accumulator gives these metrics; a subclass may compute others."""
        return type(self).__call__ is LongTailEvaluation.__call__

    def accumulator(self, post_hoc_tau: float = 0.0) -> LongTailAccumulator:
        """Return an empty accumulator of these metrics."""
        return LongTailAccumulator(self.class_counts, *self.thresholds, post_hoc_tau)

    @property
    def thresholds(self) -> tuple[int, int]:
        """Thresholds of many-shot and of few-shot classes."""
        return self.many_shot_threshold, self.few_shot_threshold
