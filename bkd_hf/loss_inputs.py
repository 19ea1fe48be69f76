"""Functions shared by losses: check and convert inputs, compare two distributions, reduce the values."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from .metrics import check_class_counts
from .text import have

Reduction = Literal["mean", "sum", "none"]

#: Examples with this label are ignored, as in `torch.nn.functional.cross_entropy` and throughout `transformers`.
IGNORE_INDEX = -100


def are_labelled(labels: torch.Tensor) -> torch.Tensor:
    """B booleans: whether an example has a label; B labels of any type (in uint8, −100 would be class 156)."""
    return labels.long() != IGNORE_INDEX


def at_least_1(num_labelled: torch.Tensor | int) -> torch.Tensor:
    """A divisor for a sum over labelled examples: without any, the sum is 0, and so is the mean."""
    return torch.as_tensor(num_labelled).clamp_min(1)


def at_least_float32(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Convert tensors to the widest of their types, at least float32."""
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors], torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)


def standardized(logits: torch.Tensor) -> torch.Tensor:
    """Logits, B×C, with mean 0 and standard deviation 1 over the classes of each example; `ValueError` if C is 1."""
    require(logits.shape[-1] > 1, "Standardized logits need two classes or more, got 1.")
    variance = logits.var(dim=-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)  # no gradient of √ at 0
    return (logits - logits.mean(dim=-1, keepdim=True)) / (variance.sqrt() + 1e-7)


def softened_divergence(log_targets: torch.Tensor, student_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """B values T² · KL( q ‖ softmax(z_s / T) ), given log q, B×C; T² keeps gradients independent of T in size."""
    log_student = F.log_softmax(student_logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_targets, reduction="none", log_target=True).sum(dim=-1)


def log_weights(class_weights: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """C logarithms of class weights, with type and device of `like`."""
    # The logarithm is taken before rounding to the logits' precision.
    return checked_weights(class_weights, like).log().to(device=like.device, dtype=like.dtype)


def checked_weights(class_weights: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Check that there are C positive, finite class weights, and return them; raises a `ValueError` otherwise."""
    num_classes = logits.shape[-1]
    class_weights = torch.as_tensor(class_weights)
    if class_weights.shape != (num_classes,):
        raise ValueError(
            f"class_weights must hold one weight per class: the logits have {num_classes} classes, "
            f"the weights have shape {tuple(class_weights.shape)}."
        )
    if class_weights.device.type == "cpu" and not bool(((class_weights > 0) & class_weights.isfinite()).all()):
        raise ValueError("class_weights must be positive and finite: a weight of 0 would leave the class out.")
    return class_weights


def reduce(losses: torch.Tensor, reduction: str, mass: torch.Tensor | None = None) -> torch.Tensor:
    """Reduce values; a mean divides by the sum of `mass`, B weights by which the values have been multiplied."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.mean() if mass is None else losses.sum() / mass.sum()
    raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}.')


def reduce_labelled(losses: torch.Tensor, labels: torch.Tensor, reduction: str) -> torch.Tensor:
    """As [`reduce`], but ignoring examples labelled −100."""
    counted = are_labelled(labels).to(losses.dtype)
    return reduce(losses * counted, reduction, counted)


def checked_counts(class_counts: Sequence[int] | np.ndarray | torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """C class counts; raises a `ValueError` unless there is a whole number ≥ 0 (on the CPU) per class."""
    if isinstance(class_counts, torch.Tensor) and class_counts.device.type != "cpu":
        counts = class_counts.to(logits.dtype)  # checked on the CPU only
    else:
        counts = torch.as_tensor(check_class_counts(class_counts))
    require(
        counts.shape == logits.shape[-1:],
        f"class_counts must hold one number per class: the logits have {logits.shape[-1]} classes, the counts have "
        f"shape {tuple(counts.shape)}.",
    )
    return counts


def log_counts(class_counts: Sequence[int] | np.ndarray | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """C logarithms of class counts, with type and device of `like`; raises a `ValueError` if a count is 0."""
    counts = checked_counts(class_counts, like)
    empty = (counts == 0).nonzero().flatten().tolist() if counts.device.type == "cpu" else []
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(counts)} classes {have(len(empty))} no training example (first: class "
            f"{empty[0]}): the logarithm of a frequency of 0 is not finite. Remove the class."
        )
    return counts.log().to(device=like.device, dtype=like.dtype)


def indices(labels: torch.Tensor) -> torch.Tensor:
    """Labels usable as indices: ignored examples get class 0."""
    return labels.long().clamp_min(0)


def require(holds: bool, message: str) -> None:
    """Raise a `ValueError` with a message unless a condition holds."""
    if not holds:
        raise ValueError(message)


def check_positive(**numbers: float) -> None:
    """Raise a `ValueError` unless all are finite numbers > 0."""
    for name, number in numbers.items():
        require(0 < number < float("inf"), f"{name} must be a finite number > 0, got {number}.")


def check_not_negative(**numbers: float) -> None:
    """Raise a `ValueError` unless all are finite numbers ≥ 0."""
    for name, number in numbers.items():
        require(0 <= number < float("inf"), f"{name} must be a finite number ≥ 0, got {number}.")


def checked_logits(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float, labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Logits of both models in one type, the teacher's detached; raises a `ValueError` unless all inputs match."""
    check_positive(temperature=temperature)
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
    if labels is not None:
        check_labels(student_logits, labels)
    return at_least_float32(student_logits, teacher_logits.detach())


def check_labels(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Raise a `ValueError` unless the logits are B×C and the labels B integers, in range (on the CPU)."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"Expected logits (batch, classes) and one integer label per example, got shapes {tuple(logits.shape)} "
            f"and {tuple(labels.shape)}, labels of type {labels.dtype}."
        )
    if labels.device.type == "cpu":
        outside = are_labelled(labels) & ((labels < 0) | (labels >= logits.shape[1]))
        if bool(outside.any()):
            raise ValueError(
                f"Label {labels[outside][0].item()} is outside the range of the {logits.shape[1]} classes, "
                f"0 to {logits.shape[1] - 1}."
            )
