"""Losses as pure functions of logits.

Notation, as in the paper: ``z_s`` student logits, ``z_t`` teacher logits (both B×C), ``y`` labels, ``T`` the
temperature, ``w`` the class weights. Every function returns the mean over the batch unless `reduction` says otherwise,
works in float32 at least (float64 for float64 inputs), and sends no gradient to the teacher.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Reduction = Literal["mean", "sum", "none"]

#: Examples with this label count for nothing, as in `torch.nn.functional.cross_entropy` and throughout `transformers`.
IGNORE_INDEX = -100


def kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 2.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531).

        KD = T² · KL( softmax(z_t / T) ‖ softmax(z_s / T) )

    T² keeps the size of the gradient independent of T.

    Args:
        student_logits: B×C.
        teacher_logits: B×C, taken as constants.
        temperature: T > 0.
        reduction: `"mean"` or `"sum"` over the batch (a scalar), or `"none"` (B values).

    Raises:
        ValueError: If shapes differ, T is not positive, or the reduction is unknown.
    """
    return balanced_distillation_loss(student_logits, teacher_logits, None, temperature, reduction)


def balanced_distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    class_weights: torch.Tensor | None,
    temperature: float = 2.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Class-balanced distillation (Zhang et al., 2021, arXiv 2104.10510, eq. 5-6).

        BKD = T² · KL( softmax(z_t / T + log w) ‖ softmax(z_s / T) )

    The paper multiplies the teacher's softmax by ``w`` and renormalises; that is exactly a shift of its logits by
    ``log w``, which cannot underflow. The scale of ``w`` cancels. The weights act on the *classes* of each target
    distribution, not on the examples.

    Args:
        student_logits: B×C.
        teacher_logits: B×C, taken as constants.
        class_weights: C positive weights, or `None` for plain [`kd_loss`].
        temperature: T > 0.
        reduction: `"mean"` or `"sum"` over the batch (a scalar), or `"none"` (B values).

    Raises:
        ValueError: If shapes differ, T is not positive, a weight is not positive (looked at on the CPU only: on an
            accelerator it would cost a synchronisation per step), or the reduction is unknown.
    """
    _check_temperature(temperature)
    _check_logits(student_logits, teacher_logits)
    student_logits, teacher_logits = _at_least_float32(student_logits, teacher_logits.detach())

    target_logits = teacher_logits / temperature
    if class_weights is not None:
        target_logits = target_logits + _log_weights(class_weights, like=target_logits)
    log_target = F.log_softmax(target_logits, dim=-1)
    log_student = F.log_softmax(student_logits / temperature, dim=-1)
    divergence = F.kl_div(log_student, log_target, reduction="none", log_target=True).sum(dim=-1)
    return _reduce(temperature**2 * divergence, reduction)


def cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Instance-balanced cross-entropy: every example counts once, whatever its class.

        CE = −log softmax(z)_y

    Args:
        logits: B×C.
        labels: B integers in [0, C); examples labelled −100 are ignored.
        label_smoothing: Share of the target spread evenly over the classes.
        reduction: `"mean"` or `"sum"` over the batch (a scalar), or `"none"` (B values).

    Raises:
        ValueError: If shapes do not fit, a label is out of range (looked at on the CPU only), or the reduction is
            unknown.
    """
    _check_labels(logits, labels)
    (logits,) = _at_least_float32(logits)
    losses = F.cross_entropy(
        logits, labels.long(), ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing, reduction="none"
    )
    return _reduce(losses, reduction, counted=labels != IGNORE_INDEX)


def bkd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    class_weights: torch.Tensor | None,
    temperature: float = 2.0,
    alpha: float = 1.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Balanced Knowledge Distillation (Zhang et al., 2021, arXiv 2104.10510, eq. 7).

        L = CE(z_s, y) + α · T² · KL( softmax(z_t / T + log w) ‖ softmax(z_s / T) )

    The classification term is *instance*-balanced and learns the representation; the distillation term is
    *class*-balanced and lifts the tail.

    Args:
        student_logits: B×C.
        teacher_logits: B×C, taken as constants.
        labels: B integers in [0, C); examples labelled −100 are ignored by both terms.
        class_weights: C positive weights, e.g. of [`class_balanced_weights`]; `None` gives CE + α · KD.
        temperature: T > 0.
        alpha: α ≥ 0, the weight of the distillation term.
        reduction: `"mean"` or `"sum"` over the batch (a scalar), or `"none"` (B values).

    Raises:
        ValueError: As [`balanced_distillation_loss`] and [`cross_entropy_loss`], and if α is negative or not finite.
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be a finite number ≥ 0, got {alpha}.")
    ce = cross_entropy_loss(student_logits, labels, reduction="none")
    kd = balanced_distillation_loss(student_logits, teacher_logits, class_weights, temperature, reduction="none")
    counted = labels != IGNORE_INDEX
    return _reduce((ce + alpha * kd) * counted, reduction, counted)


def _at_least_float32(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _log_weights(class_weights: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    num_classes = like.shape[-1]
    class_weights = torch.as_tensor(class_weights)
    if class_weights.shape != (num_classes,):
        raise ValueError(
            f"class_weights must hold one weight per class: the logits have {num_classes} classes, "
            f"the weights have shape {tuple(class_weights.shape)}."
        )
    if class_weights.device.type == "cpu" and not bool(((class_weights > 0) & class_weights.isfinite()).all()):
        raise ValueError("class_weights must be positive and finite: a weight of 0 would forbid the class.")
    # The logarithm is taken before rounding to the logits' precision.
    return class_weights.log().to(device=like.device, dtype=like.dtype)


def _reduce(losses: torch.Tensor, reduction: str, counted: torch.Tensor | None = None) -> torch.Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.mean() if counted is None else losses.sum() / counted.sum()
    raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}.')


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}.")


def _check_logits(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> None:
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if logits.dim() != 2:
            raise ValueError(f"{name} must be (batch, classes), got shape {tuple(logits.shape)}.")
    if student_logits.shape[1] != teacher_logits.shape[1]:
        raise ValueError(
            f"Student and teacher must have the same classes: the student has {student_logits.shape[1]}, "
            f"the teacher {teacher_logits.shape[1]}."
        )
    if student_logits.shape[0] != teacher_logits.shape[0]:
        raise ValueError(
            f"Student and teacher must see the same batch: {student_logits.shape[0]} examples against "
            f"{teacher_logits.shape[0]}."
        )


def _check_labels(logits: torch.Tensor, labels: torch.Tensor) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"Expected logits (batch, classes) and one integer label per example, got shapes {tuple(logits.shape)} "
            f"and {tuple(labels.shape)}, labels of type {labels.dtype}."
        )
    if labels.device.type == "cpu":
        outside = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= logits.shape[1]))
        if bool(outside.any()):
            raise ValueError(
                f"Label {labels[outside][0].item()} is outside the range of the {logits.shape[1]} classes, "
                f"0 to {logits.shape[1] - 1}."
            )
