"""Distillation losses of other methods, to compare with; arguments as in `bkd_hf.losses`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .loss_inputs import (
    IGNORE_INDEX,
    Reduction,
    at_least_float32,
    check_labels,
    check_logits,
    check_temperature,
    indices,
    reduce,
    require,
    softened_divergence,
)


def dive_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 2.0,
    power: float = 0.5,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Distillation of virtual examples, DiVE (He et al., 2021, arXiv 2103.15042, eq. 6-8).

        DiVE = T² · KL( softmax(power · z_t / T) ‖ softmax(z_s / T) )

    The teacher, trained with balanced softmax, has balanced answers already; a power below 1 flattens them further.
    The method's loss is (1 − α) · [`balanced_softmax_loss`] + α · DiVE.

    Args:
        temperature: T > 0.
        power: Power of the teacher's probabilities, > 0.
    """
    require(0 < power < float("inf"), f"power must be a finite number > 0, got {power}.")
    check_temperature(temperature)
    check_logits(student_logits, teacher_logits)
    student_logits, teacher_logits = at_least_float32(student_logits, teacher_logits.detach())
    log_targets = dive_log_targets(teacher_logits, temperature, power)
    return reduce(softened_divergence(log_targets, student_logits, temperature), reduction)


def dive_log_targets(teacher_logits: torch.Tensor, temperature: float = 2.0, power: float = 0.5) -> torch.Tensor:
    """Logarithm of what [`dive_loss`] has the student imitate: B×C. Arguments as there."""
    (teacher_logits,) = at_least_float32(teacher_logits)
    return F.log_softmax(power * teacher_logits / temperature, dim=-1)


def dkd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Decoupled knowledge distillation (Zhao et al., 2022, arXiv 2203.08679, eq. 7).

        DKD = T² · ( α · KL(b_t ‖ b_s) + β · KL(q_t ‖ q_s) )

    with b = (p_y, 1 − p_y) the probabilities of the label's class and of all others, and q the distribution over these
    others alone, all from softmax(z / T). Both are softmaxes themselves: q of the other logits, and b of the label's
    logit beside the log-sum-exp of the others, so nothing is divided by a vanishing 1 − p_y.

    Args:
        student_logits: B×C, C ≥ 2.
        temperature: T > 0.
        alpha: α ≥ 0, weight of the target class.
        beta: β ≥ 0, weight of the non-target classes.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        require(0 <= value < float("inf"), f"{name} must be a finite number ≥ 0, got {value}.")
    check_temperature(temperature)
    check_logits(student_logits, teacher_logits)
    check_labels(student_logits, labels)
    student_logits, teacher_logits = at_least_float32(student_logits, teacher_logits.detach())

    student_others, teacher_others = _without_label(student_logits, labels), _without_label(teacher_logits, labels)
    student_pair = _label_and_others(student_logits / temperature, student_others / temperature, labels)
    teacher_pair = _label_and_others(teacher_logits / temperature, teacher_others / temperature, labels)
    target = softened_divergence(F.log_softmax(teacher_pair, dim=-1), student_pair, 1.0)
    others = F.log_softmax(teacher_others / temperature, dim=-1)
    non_target = softened_divergence(others, student_others, temperature)
    counted = (labels != IGNORE_INDEX).to(target.dtype)
    return reduce((alpha * temperature**2 * target + beta * non_target) * counted, reduction, counted)


def _without_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """B×(C−1): the logits of all classes but the label's."""
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, columns + (columns >= indices(labels)[:, None]))


def _label_and_others(logits: torch.Tensor, others: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """B×2: the label's logit, and that of "any other class"."""
    return torch.cat([logits.gather(1, indices(labels)[:, None]), others.logsumexp(dim=1, keepdim=True)], dim=1)
