"""Losses as pure functions of logits.

Notation, as in the paper: ``z_s`` student logits, ``z_t`` teacher logits, ``y`` labels, ``T`` the temperature, ``w``
the class weights, ``n`` the class counts. Arguments shared by all losses:

- `logits`, `student_logits`, `teacher_logits`: B×C; no gradient flows to the teacher's.
- `labels`: B integers in [0, C); examples labelled −100 are ignored. The mean over no examples is NaN.
- `class_weights`: C positive weights, e.g. of [`class_balanced_weights`]; `None` for 1.
- `class_counts`: C numbers of training images.
- `temperature`: T > 0.
- `label_smoothing`: share ε of the target that is spread evenly over the classes.
- `reduction`: `"mean"` or `"sum"` over the batch (a scalar), or `"none"` (B values).

Losses compute in float32 at least (float64 for float64 inputs). They raise a `ValueError` if shapes do not match, the
reduction is unknown or an option is out of range. On the CPU, they also raise one if a label is out of range, a weight
is not positive or a class has no image; on an accelerator, these checks would cost a synchronisation per step.

Why the power p in the targets softmax(z_t/T + p · log w) matters:

1. With class frequencies π, cross-entropy is minimal at z = log p(x|y) + log π, which reproduces the long tail. By
   Bayes, balanced logits are z − log π, or z + log w with w ∝ 1/π. They minimise balanced softmax, CE(z + log π).
2. softmax(z_t/T + p · log w) = softmax((z_t + pT · log w)/T): the paper's p = 1 subtracts T · log π, twice at T = 2.
3. A teacher that is s times overconfident on its training images, z_t = s · (log p(x|y) + log π), needs s · log w, so
   p = s/T: p = 1/T if it is calibrated there, p = 1 if it has memorised them and is T times overconfident.
4. If it is less confident than that, log w outweighs z_t at p = 1: the target is the rarest class for every image.
5. `--method bkd-calibrated` therefore takes the largest p in [1/T, 1], at most 2/T, at which the targets still match
   the labels (`bkd_hf.targets.strongest_power`), and CE(z + τ · log π) with τ = 2 − pT for the labels. On average, the
   two terms then ask for balanced logits, as long as w ∝ 1/π (n well below 1/(1 − β)): balanced softmax at p = 1/T,
   the paper's CE at p = 1, T = 2. A student that has not fully learned this may favour a class; if p < 1, the bias of
   its head is then fitted after training, on class-balanced training images (`bkd_hf.head`).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from .distillation_losses import (
    dist_loss,
    dive_log_targets,
    dive_loss,
    dkd_loss,
    ltkd_log_targets,
    ltkd_loss,
    wsl_loss,
)
from .loss_inputs import (
    IGNORE_INDEX,
    Reduction,
    are_labelled,
    at_least_float32,
    check_labels,
    check_not_negative,
    check_positive,
    checked_logits,
    checked_weights,
    indices,
    log_counts,
    log_weights,
    reduce,
    reduce_labelled,
    require,
    softened_divergence,
    standardized,
)
from .metrics import check_class_counts
from .text import have

__all__ = [
    "IGNORE_INDEX", "Reduction", "balanced_distillation_loss", "balanced_log_targets", "balanced_softmax_loss",
    "bkd_loss", "class_balanced_weights", "cross_entropy_loss", "deferred_weights", "dist_loss", "dive_log_targets",
    "dive_loss", "dkd_loss", "example_weights", "focal_loss", "have_started", "kd_loss", "ldam_loss",
    "logit_adjustment_loss", "ltkd_log_targets", "ltkd_loss", "wsl_loss",
]  # fmt: skip


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
        missing: For a class without images: `"error"`, or `"clamp"` to count it as one example.

    Returns:
        C weights, float64, on the CPU, summing to C.

    Raises:
        ValueError: If β is outside [0, 1), a count is negative or not an integer, or a class has no image.
    """
    counts = check_class_counts(class_counts)
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}.")
    if missing not in ("error", "clamp"):
        raise ValueError(f'missing must be "error" or "clamp", got {missing!r}.')
    empty = np.flatnonzero(counts == 0)
    if empty.size and missing == "error":
        raise ValueError(
            f"{empty.size} of {counts.size} classes {have(empty.size)} no training example (first: class "
            f'{empty[0]}), so no weight. Remove the class, or pass missing="clamp" to count it as one example.'
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

    Depends only on training progress, so it is also correct after a resume.

    Args:
        class_weights: C weights.
        start: An epoch (≥ 1), a fraction of training (below 1), or `None` for "from the first step".
        epoch: Progress of training in epochs, e.g. 12.5.
        num_epochs: Length of the training in epochs, for a `start` that is a fraction.

    Returns:
        `class_weights`, or ones of the same shape, type and device.
    """
    return class_weights if have_started(start, epoch, num_epochs) else torch.ones_like(class_weights)


def have_started(start: float | None, epoch: float, num_epochs: float) -> bool:
    """Whether [`deferred_weights`] are in force; arguments as there."""
    first = 0.0 if start is None else start * num_epochs if start < 1 else start
    return epoch >= first * (1 - 1e-12)  # 0.14 · 50 is above 7 in floating point


def kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 2.0,
    reduction: Reduction = "mean",
    standardize: bool = False,
) -> torch.Tensor:
    """Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531).

        KD = T² · KL( softmax(z_t / T) ‖ softmax(z_s / T) )

    T² keeps the size of the gradient independent of T. The student inherits the class frequencies that the teacher
    has learned.

    Args:
        standardize: Whether z_t and z_s are standardized first (see [`balanced_distillation_loss`]).
    """
    return balanced_distillation_loss(
        student_logits, teacher_logits, None, temperature, reduction, standardize=standardize
    )


def balanced_distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    class_weights: torch.Tensor | None,
    temperature: float = 2.0,
    reduction: Reduction = "mean",
    power: float | Literal["auto"] = 1.0,
    standardize: bool = False,
) -> torch.Tensor:
    """Class-balanced distillation, as in Balanced Knowledge Distillation (Zhang et al., 2021, arXiv 2104.10510).

        BKD = T² · KL( softmax(z_t / T + p · log w) ‖ softmax(z_s / T) )

    The paper (p = 1, eq. 5-6) multiplies the teacher's softmax by ``w`` and renormalises. This is equal to shifting
    its logits by ``log w``, which cannot underflow. The scale of ``w`` cancels. The weights act on the *classes* of
    each target distribution, not on the examples.

    p = 1 assumes a teacher so confident on its training images that the shift hardly moves its targets; p = 1/T
    assumes one whose softmax(z_t) is calibrated on them (see the top of this module).

    Args:
        power: p ≥ 0; `"auto"` is 1/T, 0 is plain [`kd_loss`].
        standardize: Whether z_t and z_s are first replaced by (z − mean(z)) / std(z), over the classes of an example
            (logit standardization: Sun et al., 2024, arXiv 2403.01427, algorithm 1). The student then need not match
            the scale of the teacher's logits. With class weights this is our combination: the targets get the shift
            after that, so their logits no longer have the student's standard deviation, and the least loss is above 0.
    """
    student_logits, teacher_logits = checked_logits(student_logits, teacher_logits, temperature)
    log_targets = balanced_log_targets(teacher_logits, class_weights, temperature, power, standardize)
    student_logits = standardized(student_logits) if standardize else student_logits
    return reduce(softened_divergence(log_targets, student_logits, temperature), reduction)


def balanced_log_targets(
    teacher_logits: torch.Tensor,
    class_weights: torch.Tensor | None,
    temperature: float = 2.0,
    power: float | Literal["auto"] = 1.0,
    standardize: bool = False,
) -> torch.Tensor:
    """Logarithm of the target distribution of [`balanced_distillation_loss`]: B×C.

        log softmax(z_t / T + p · log w)

    Args:
        power: p ≥ 0, or `"auto"` for 1/T.
        standardize: Whether z_t is standardized first.
    """
    check_positive(temperature=temperature)
    power = 1 / temperature if power == "auto" else power
    is_number = isinstance(power, Real) and 0 <= power < float("inf")
    require(is_number, f'power must be a finite number ≥ 0, or "auto", got {power}.')
    (teacher_logits,) = at_least_float32(teacher_logits)
    target_logits = (standardized(teacher_logits) if standardize else teacher_logits) / temperature
    if class_weights is not None:
        target_logits = target_logits + power * log_weights(class_weights, like=target_logits)
    return F.log_softmax(target_logits, dim=-1)


def cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy (instance-balanced: every example counts once, whatever its class, unless weights are given).

        CE = −w_y · Σ_c q_c · log softmax(z)_c,    q = (1 − ε) · 1_y + ε / C

    Without label smoothing (ε = 0) this is −w_y · log softmax(z)_y. With weights, the mean divides by the sum of the
    labels' weights, as in torch. With weights and smoothing, torch instead weights each term of the sum by its own
    class, not all of it by the label's.
    """
    require(0 <= label_smoothing <= 1, f"label_smoothing must be in [0, 1], got {label_smoothing}.")
    check_labels(logits, labels)
    (logits,) = at_least_float32(logits)
    losses = F.cross_entropy(
        logits, labels.long(), ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing, reduction="none"
    )
    weights = None if class_weights is None else checked_weights(class_weights, logits)
    mass = example_weights(labels, weights, like=losses)
    return reduce(losses * mass, reduction, mass)


def focal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    gamma: float = 1.0,
    reduction: Reduction = "mean",
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Focal loss (Lin et al., 2017, arXiv 1708.02002, eq. 4).

        FL = (1 − p)^γ · ce,    ce = −w_y · log softmax(z)_y,    p = exp(−ce)

    Without weights, p is the probability of the label. With weights, this is the form in the public code of LDAM (Cao
    et al., 2019) and BKD, not Cui et al.'s w_y · (1 − p)^γ · (−log p): p is computed from the weighted ce, and the
    mean divides by the number of examples.

    Args:
        gamma: γ ≥ 0; 0 gives the cross-entropy. The default is that of the long-tail literature (Cao et al., 2019);
            Lin et al. use 2, for detection.
    """
    check_not_negative(gamma=gamma)
    ce = cross_entropy_loss(logits, labels, reduction="none", class_weights=class_weights)
    # 1 − exp(−ce) without cancellation; the floor keeps the gradient finite at ce = 0 for γ < 1.
    uncertainty = -torch.expm1(-ce)
    focus = uncertainty.clamp_min(torch.finfo(ce.dtype).tiny) ** gamma if gamma else torch.ones_like(ce)
    return reduce_labelled(focus * ce, labels, reduction)


def ldam_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_counts: Sequence[int] | np.ndarray | torch.Tensor,
    max_margin: float = 0.5,
    scale: float = 30.0,
    reduction: Reduction = "mean",
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Label-distribution-aware margin loss (Cao et al., 2019, arXiv 1906.07413, eq. 10-13).

        LDAM = CE(s · (cos − Δ_y · 1_y), y),    Δ_c = max_margin · (min_k n_k / n_c)^{1/4}

    The logits come from a cosine head, ``z = s · cos``. The rarer the label's class, the larger the margin s · Δ_y
    subtracted from its logit during training. The model's own logits stay s · cos.

    Args:
        logits: B×C, ``scale`` times a cosine.
        max_margin: Margin of the rarest class, in units of the cosine.
        scale: s > 0, already contained in the logits.
    """
    check_not_negative(max_margin=max_margin)
    check_positive(scale=scale)
    check_labels(logits, labels)
    (logits,) = at_least_float32(logits)
    log_n = log_counts(class_counts, like=logits)
    margins = max_margin * torch.exp((log_n.min() - log_n) / 4)
    of_label = torch.zeros_like(logits).scatter_(1, indices(labels)[:, None], 1.0)
    return cross_entropy_loss(
        logits - scale * margins * of_label, labels, reduction=reduction, class_weights=class_weights
    )


def balanced_softmax_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_counts: Sequence[int] | np.ndarray | torch.Tensor,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Balanced softmax (Ren et al., 2020, arXiv 2007.10740, eq. 4): cross-entropy under the training frequencies.

        BS = CE(z + log n, y)

    with CE as in [`cross_entropy_loss`], label smoothing and class weights included.
    """
    return logit_adjustment_loss(
        logits, labels, class_counts, 1.0, label_smoothing, reduction=reduction, class_weights=class_weights
    )


def logit_adjustment_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_counts: Sequence[int] | np.ndarray | torch.Tensor,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logit-adjusted cross-entropy (Menon et al., 2021, arXiv 2007.07314, eq. 10).

        LA = CE(z + τ · log π, y),    π_c = n_c / Σ_k n_k

    with CE as in [`cross_entropy_loss`], label smoothing and class weights included. τ = 1 is
    [`balanced_softmax_loss`].

    Args:
        tau: τ, a finite number.
    """
    require(abs(tau) < float("inf"), f"tau must be a finite number, got {tau}.")
    check_labels(logits, labels)
    (logits,) = at_least_float32(logits)
    # The sum of the counts cancels in the softmax.
    adjusted = logits + tau * log_counts(class_counts, like=logits)
    return cross_entropy_loss(adjusted, labels, label_smoothing, reduction, class_weights)


def bkd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    class_weights: torch.Tensor | None,
    temperature: float = 2.0,
    alpha: float = 1.0,
    reduction: Reduction = "mean",
    power: float | Literal["auto"] = 1.0,
) -> torch.Tensor:
    """Balanced Knowledge Distillation (Zhang et al., 2021, arXiv 2104.10510, eq. 7; there p = 1).

        L = CE(z_s, y) + α · T² · KL( softmax(z_t / T + p · log w) ‖ softmax(z_s / T) )

    The classification term is *instance*-balanced and learns the representation; the distillation term is
    *class*-balanced and lifts the tail.

    Args:
        labels: Examples labelled −100 are ignored by both terms.
        class_weights: `None` gives CE + α · KD.
        alpha: α ≥ 0, the weight of the distillation term.
        power: p as in [`balanced_distillation_loss`].
    """
    check_not_negative(alpha=alpha)
    ce = cross_entropy_loss(student_logits, labels, reduction="none")
    kd = balanced_distillation_loss(student_logits, teacher_logits, class_weights, temperature, "none", power)
    return reduce_labelled(ce + alpha * kd, labels, reduction)


def example_weights(labels: torch.Tensor, class_weights: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Weight of each example, in the type of `like`: that of its class, 1 without weights, 0 if the label is −100."""
    counted = are_labelled(labels)
    if class_weights is None:
        return counted.to(like.dtype)
    weights = class_weights.to(device=like.device, dtype=like.dtype)
    # The losses report out-of-range labels; here they only must not crash.
    return weights[labels.long().clamp(0, len(weights) - 1)] * counted
