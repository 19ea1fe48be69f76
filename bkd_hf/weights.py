"""Class-balanced weights, and when they are in force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from .metrics import check_class_counts


def class_balanced_weights(
    class_counts: Sequence[int] | np.ndarray | torch.Tensor,
    beta: float = 0.9999,
    missing: Literal["error", "clamp"] = "error",
) -> torch.Tensor:
    """Weights by the effective number of examples (Cui et al., 2019, arXiv 1901.05555, eq. 2 and 4).

        w_c ∝ (1 − β) / (1 − β^{n_c}),    Σ_c w_c = C

    β = 0 gives uniform weights; β → 1 tends to the inverse class frequency.

    Args:
        class_counts: C numbers of training images.
        beta: β in [0, 1).
        missing: What to do with a class that has no image: `"error"`, or `"clamp"` to count it as one image.

    Returns:
        C weights, float64, on the CPU, summing to C.

    Raises:
        ValueError: If β is outside [0, 1), a count is negative or no whole number, or a class has no image.
    """
    counts = check_class_counts(class_counts)
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}.")
    if missing not in ("error", "clamp"):
        raise ValueError(f'missing must be "error" or "clamp", got {missing!r}.')
    empty = np.flatnonzero(counts == 0)
    if empty.size and missing == "error":
        raise ValueError(
            f"{empty.size} of {counts.size} classes have no training image (first: class {empty[0]}): their "
            'weight is not defined. Remove the class, or pass missing="clamp" to count it as one image.'
        )
    counts = np.maximum(counts, 1)
    with np.errstate(divide="ignore"):
        # 1 − β^n without cancellation as β → 1.
        effective = -np.expm1(counts * np.log1p(beta - 1.0)) / (1.0 - beta)
    weights = 1.0 / effective
    return torch.from_numpy(weights * (counts.size / weights.sum()))


def deferred_weights(
    class_weights: torch.Tensor, start: float | None, epoch: float, num_epochs: float
) -> torch.Tensor:
    """Deferred re-weighting (Cao et al., 2019, arXiv 1906.07413): uniform weights, then `class_weights`.

    A function of training progress alone, so it is right after a resume as well.

    Args:
        class_weights: C weights.
        start: An epoch (≥ 1), a fraction of training (below 1), or `None` for "from the first step".
        epoch: Progress of training in epochs, e.g. 12.5.
        num_epochs: Length of the training in epochs; what a fraction refers to.

    Returns:
        `class_weights`, or ones of the same shape, type and device.
    """
    start_epoch = 0.0 if start is None else start * num_epochs if start < 1 else start
    return class_weights if epoch >= start_epoch else torch.ones_like(class_weights)
