"""Distillation losses of other methods, to compare with; arguments as in `bkd_hf.losses`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .loss_inputs import (
    IGNORE_INDEX,
    Reduction,
    are_labelled,
    at_least_float32,
    check_not_negative,
    check_positive,
    checked_counts,
    checked_logits,
    indices,
    reduce,
    reduce_labelled,
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

    The teacher, trained with balanced softmax, is already balanced; a power below 1 flattens its targets further.
    The method's loss is (1 − α) · [`balanced_softmax_loss`] + α · DiVE.

    Args:
        temperature: T > 0. The paper uses 3 on CIFAR-100-LT; the default 2 is ours, as for the other losses.
        power: Power of the teacher's probabilities, > 0; 0.5, with α = 0.5, as in the paper. A public reproduction,
            whose teacher had flatter outputs than the paper's, did better with T = 6 and power 1, the same targets.
    """
    student_logits, teacher_logits = checked_logits(student_logits, teacher_logits, temperature)
    log_targets = dive_log_targets(teacher_logits, temperature, power)
    return reduce(softened_divergence(log_targets, student_logits, temperature), reduction)


def dive_log_targets(teacher_logits: torch.Tensor, temperature: float = 2.0, power: float = 0.5) -> torch.Tensor:
    """Logarithm of the target distribution of [`dive_loss`]: B×C. Arguments as there."""
    check_positive(temperature=temperature, power=power)
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
    others alone, all from softmax(z / T). Both are computed as softmaxes: q of the other logits, b of the label's
    logit and the log-sum-exp of the others. This avoids dividing by a vanishing 1 − p_y.

    Args:
        student_logits: B×C, C ≥ 2.
        alpha: α ≥ 0, weight of the target class.
        beta: β ≥ 0, weight of the non-target classes.
    """
    check_not_negative(alpha=alpha, beta=beta)
    student_logits, teacher_logits = checked_logits(student_logits, teacher_logits, temperature, labels)
    require(student_logits.shape[-1] >= 2, f"dkd needs at least 2 classes, got {student_logits.shape[-1]}.")
    student_others, teacher_others = _without_label(student_logits, labels), _without_label(teacher_logits, labels)
    student_pair = _label_and_others(student_logits / temperature, student_others / temperature, labels)
    teacher_pair = _label_and_others(teacher_logits / temperature, teacher_others / temperature, labels)
    target = softened_divergence(F.log_softmax(teacher_pair, dim=-1), student_pair, 1.0)
    others = F.log_softmax(teacher_others / temperature, dim=-1)
    non_target = softened_divergence(others, student_others, temperature)
    return reduce_labelled(alpha * temperature**2 * target + beta * non_target, labels, reduction)


def wsl_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 2.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Weighted soft labels (Zhou et al., 2021, arXiv 2102.00650, eq. 15-16).

        WSL = ω · T² · KL( softmax(z_t / T) ‖ softmax(z_s / T) ),    ω = 1 − exp( −CE(z_s, y) / CE(z_t, y) )

    An example that the student already knows better than the teacher counts less. No gradient flows through ω. On
    ImageNet, the paper weights WSL by 2.5 relative to the cross-entropy (`--alpha 2.5`).
    """
    student_logits, teacher_logits = checked_logits(student_logits, teacher_logits, temperature, labels)
    student_ce, teacher_ce = (
        F.cross_entropy(logits, labels.long(), ignore_index=IGNORE_INDEX, reduction="none")
        for logits in (student_logits.detach(), teacher_logits)
    )
    weights = -torch.expm1(-student_ce / (teacher_ce + 1e-7))  # 0 where the label is ignored
    log_targets = F.log_softmax(teacher_logits / temperature, dim=-1)
    losses = weights * softened_divergence(log_targets, student_logits, temperature)
    return reduce_labelled(losses, labels, reduction)


def dist_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 4.0,
    beta: float = 2.0,
    gamma: float = 2.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Distillation from a stronger teacher, DIST (Huang et al., 2022, arXiv 2205.10536, eq. 7-10).

        DIST = T² · ( β · (1 − ρ(p_t, p_s)) + γ · mean_c (1 − ρ(P_t[:, c], P_s[:, c])) )

    ρ is Pearson's correlation, p = softmax(z / T) the probabilities of an example, and P those of the batch. The first
    term relates the classes of an example, the second the examples of a class. The second term is the same for each
    example and is computed over the batch that the loss sees, so splitting a step differently into micro-batches or
    processes changes its value.

    Args:
        temperature: T > 0; the paper's 4 is for CIFAR-100, 1 for ImageNet.
        beta: β ≥ 0.
        gamma: γ ≥ 0.
    """
    check_not_negative(beta=beta, gamma=gamma)
    student_logits, teacher_logits = checked_logits(student_logits, teacher_logits, temperature, labels)
    p_s, p_t = (F.softmax(logits / temperature, dim=-1) for logits in (student_logits, teacher_logits))
    counted = are_labelled(labels).to(p_s.dtype)
    between_classes = 1 - _correlation(p_s, p_t, torch.ones_like(p_s), dim=1)
    between_examples = 1 - _correlation(p_s, p_t, counted[:, None], dim=0).mean()
    losses = temperature**2 * (beta * between_classes + gamma * between_examples)
    return reduce_labelled(losses, labels, reduction)


def ltkd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    class_counts: Sequence[int] | np.ndarray | torch.Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Long-tailed knowledge distillation, LTKD (Kim, 2026, arXiv 2506.18496).

        LTKD = T² · ( α · KL(b̂_t ‖ b_s) + β · Σ_G KL(q_t^G ‖ q_s^G) )

    b are the probabilities of three groups of classes (the third with most training images, the next, the rarest), q^G
    those of the classes within a group, all from softmax(z / T). In KL(p_t ‖ p_s) = KL(b_t ‖ b_s) + Σ_G b_t(G) ·
    KL(q_t^G ‖ q_s^G), both parts favour the head. Therefore b_t is scaled so that its mean over the batch would be
    uniform and renormalised to b̂_t, and all groups get the same weight. The mean is over the batch that the loss
    sees, so splitting a step differently into micro-batches or processes changes it. The defaults of α and β are ours.

    Args:
        student_logits: B×C, C ≥ 3.
        alpha: α ≥ 0, weight of the part between groups.
        beta: β ≥ 0, weight of the part within groups.
    """
    check_not_negative(alpha=alpha, beta=beta)
    student_logits, teacher_logits = checked_logits(student_logits, teacher_logits, temperature, labels)
    groups = _thirds(class_counts, like=student_logits)
    log_p_s, log_p_t = (F.log_softmax(logits / temperature, dim=-1) for logits in (student_logits, teacher_logits))
    log_b_s, log_b_t = _log_groups(log_p_s, groups), _balanced_log_groups(log_p_t, groups, labels)
    between = softened_divergence(log_b_t, log_b_s, 1.0)
    within = sum(
        softened_divergence(F.log_softmax(log_p_t[:, group], dim=-1), log_p_s[:, group], 1.0) for group in groups
    )
    return reduce_labelled(temperature**2 * (alpha * between + beta * within), labels, reduction)


def ltkd_log_targets(
    teacher_logits: torch.Tensor,
    class_counts: Sequence[int] | np.ndarray | torch.Tensor,
    temperature: float = 4.0,
) -> torch.Tensor:
    """Logarithm of the target distribution of [`ltkd_loss`], b̂_t(G) · q_t^G: B×C. Arguments as there."""
    check_positive(temperature=temperature)
    (teacher_logits,) = at_least_float32(teacher_logits)
    groups, targets = _thirds(class_counts, like=teacher_logits), F.log_softmax(teacher_logits / temperature, dim=-1)
    everyone = torch.zeros(len(targets), dtype=torch.int64, device=targets.device)
    shifts = _balanced_log_groups(targets, groups, everyone) - _log_groups(targets, groups)
    for group, shift in zip(groups, shifts.unbind(dim=1), strict=True):
        targets[:, group] += shift[:, None]
    return targets


def _correlation(a: torch.Tensor, b: torch.Tensor, mass: torch.Tensor, dim: int) -> torch.Tensor:
    """Pearson's correlation along a dimension, of entries with mass 0 or 1; 0 for constant entries."""
    a, b = (mass * (x - (mass * x).sum(dim, keepdim=True) / mass.sum(dim, keepdim=True).clamp_min(1)) for x in (a, b))
    return F.cosine_similarity(a, b, dim=dim)


def _thirds(class_counts: Sequence[int] | np.ndarray | torch.Tensor, like: torch.Tensor) -> list[torch.Tensor]:
    """Class numbers of the three groups, each a third of the classes, from the most images to the fewest."""
    order = checked_counts(class_counts, like).to(like.device).argsort(descending=True, stable=True)
    require(len(order) >= 3, f"ltkd needs at least 3 classes, got the counts of {len(order)}.")
    third = len(order) // 3
    return list(order.split([third, len(order) - 2 * third, third]))


def _log_groups(log_p: torch.Tensor, groups: list[torch.Tensor]) -> torch.Tensor:
    """B×3 log-probabilities of the groups."""
    return torch.stack([log_p[:, group].logsumexp(dim=1) for group in groups], dim=1)


def _balanced_log_groups(log_p: torch.Tensor, groups: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """B×3 as [`_log_groups`], scaled such that their mean over the examples with a label would be uniform."""
    log_b = _log_groups(log_p, groups)
    ignored = torch.where(are_labelled(labels), 0.0, -torch.inf)[:, None]
    log_mean = (log_b + ignored).logsumexp(dim=0)
    return F.log_softmax(log_b - torch.where(log_mean.isfinite(), log_mean, 0.0), dim=-1)


def _without_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """B×(C−1): the logits of all classes but the label's."""
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, columns + (columns >= indices(labels)[:, None]))


def _label_and_others(logits: torch.Tensor, others: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """B×2: the label's logit, and that of "any other class"."""
    return torch.cat([logits.gather(1, indices(labels)[:, None]), others.logsumexp(dim=1, keepdim=True)], dim=1)
