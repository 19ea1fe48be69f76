"""A check of the distillation targets before training: do they still match the labels?

If the teacher is not confident on its training images, re-weighting by class can make the rarest class the target of
all images (see `bkd_hf.losses`). A student would learn this faithfully, so such targets are rejected before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .config import BKDConfig
from .errors import InputError
from .loss_inputs import are_labelled
from .metrics import FEW_SHOT_THRESHOLD, MANY_SHOT_THRESHOLD, LongTailEvaluation, shot_groups
from .nodes import on_main_process
from .objective import Objective
from .teacher import FrozenTeacher, split_inputs
from .teacher_logits import TeacherLogitsError
from .training_data import TrainingData

#: Number of training images that are checked.
NUM_IMAGES = 1024
# Least mean probability of the classes other than the label for which a prior can be measured.
_LEAST_LEFT = 0.05
# The targets collapse if they are right less than a quarter as often as the teacher, …
_LEAST_AGREEMENT = 0.25
# … or favour one class for most images, far more often than it occurs.
_MOST_FAVOURED, _FAR_BEYOND_ITS_SHARE = 0.75, 5.0


def strongest_power(
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    class_weights: torch.Tensor,
    temperature: float = 2.0,
    share_kept: float = 0.95,
) -> float:
    """Return the largest p in [1/T, min(1, 2/T)] at which targets softmax(z_t/T + p · log w) still match the labels.

    If the teacher is right about image i, the label is also the most likely class of its target as long as p is below

        p_i = min_c (z_y − z_c) / (T · (log w_c − log w_y))    over the classes c with a larger weight than y's

    The result is the 5 % quantile of these p_i (the lower of its neighbours): 95 % reach it. A teacher that has
    memorised its training images gives 1, the paper's p; one that has not gives 1/T, which is right for a teacher
    whose softmax(z_t) is calibrated on them. Above 2/T, the targets would remove the class frequencies more than
    twice, which no loss on the labels makes up for (see `Objective.tau`).

    Args:
        teacher_logits: N×C, of training images.
        labels: N class numbers.
        class_weights: C positive weights, w.
        temperature: T > 0.
        share_kept: Share of the teacher's correct predictions that the targets must keep.
    """
    logits, labels = teacher_logits.double(), labels.long()[:, None]
    log_weights = class_weights.double().log().to(logits.device)
    right = logits.argmax(dim=1) == labels[:, 0]
    lead = logits.gather(1, labels) - logits
    rise = log_weights - log_weights[labels]
    limits = torch.where(rise > 0, lead / (temperature * rise.clamp_min(1e-12)), torch.inf).amin(dim=1)[right]
    least, most = min(1.0, 1 / temperature), min(1.0, 2 / temperature)
    if not limits.numel():
        return least
    limits = limits.sort().values  # an interpolated quantile may compute ∞ − ∞
    return float(limits[int((1 - share_kept) * (limits.numel() - 1))].clamp(least, most))


def prior_in_teacher(
    teacher_logits: torch.Tensor, labels: torch.Tensor, class_counts: Sequence[int] | np.ndarray | torch.Tensor
) -> float:
    """Return κ, how much of the class frequencies a teacher's logits contain: 1 for plain training, 0 for balanced.

    With z = log p(x|c) + κ · log π_c, κ is the number in [0, 1] at which softmax(z − κ · log n), renormalised over the
    classes other than the label, does not depend on the class counts: the slope of the logarithm of a class's mean
    probability over log n_c, by least squares over the classes, is 0. A teacher that has memorised its training
    images, and gives other classes less than 5 % on average, is right whatever its prior; it cannot be measured, and
    the result is 1. So it is with two classes, where there is only one other class.

    Args:
        teacher_logits: N×C, of training images.
        labels: N class numbers.
        class_counts: C numbers of training images. If all are equal, there is nothing to measure, and the result is 1.
    """
    z, counts = teacher_logits.double(), torch.as_tensor(class_counts).to(teacher_logits.device, torch.float64)
    of_label = torch.nn.functional.one_hot(labels, len(counts)).bool()
    left = 1 - z.softmax(dim=1)[of_label]
    # Equal weight for each class of images.
    weights = (-torch.bincount(labels, minlength=len(counts)).double().log()).to(z.device)[labels][:, None]
    num_images = weights.masked_fill(of_label, -torch.inf).logsumexp(dim=0)
    known = (counts > 0) & num_images.isfinite() & z.isfinite().any(dim=0)
    log_n = counts.clamp_min(1).log()
    x = log_n[known] - log_n[known].mean()
    if len(x) < 3 or (x * x).sum() <= 1e-9 or left.mean() < _LEAST_LEFT:
        return 1.0

    def slope(kappa: float) -> float:
        others = (z - kappa * log_n).masked_fill(of_label, -torch.inf).log_softmax(dim=1)
        return float((x * ((others + weights).logsumexp(dim=0) - num_images)[known]).sum())

    low, high = 0.0, 1.0
    if slope(low) <= 1e-9:  # sums are not exact
        return low
    if slope(high) >= -1e-9:
        return high
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2


def target_statistics(
    log_targets: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    class_counts: Sequence[int] | np.ndarray,
    many_shot_threshold: int = MANY_SHOT_THRESHOLD,
    few_shot_threshold: int = FEW_SHOT_THRESHOLD,
) -> dict[str, Any]:
    """Return statistics of the distillation targets of some training images, as fractions.

    Args:
        log_targets: N×C, logarithms of the targets (see `bkd_hf.losses.balanced_log_targets`).
        teacher_logits: N×C.
        labels: N class numbers.
        class_counts: C numbers of training images.
        many_shot_threshold: As for `long_tail_metrics`.
        few_shot_threshold: As for `long_tail_metrics`.

    Returns:
        `num_images`; `target_agreement` and `teacher_agreement` (how often the best class of the target, or of the
        teacher, is the label); `mass` and `labels` (shares of many-, medium- and few-shot classes in the targets and
        in the labels); and for the class that most targets favour, `favoured_class` (its number), `favoured_share`
        (its share of the targets) and `favoured_label_share` (its share of the labels).
    """
    num_classes, best = log_targets.shape[1], log_targets.argmax(dim=1)
    mass = log_targets.double().exp().mean(dim=0).cpu().numpy()
    named, labelled = (torch.bincount(c, minlength=num_classes).cpu().numpy() / len(labels) for c in (best, labels))
    groups = shot_groups(class_counts, many_shot_threshold, few_shot_threshold)
    favoured = int(named.argmax())
    return {
        "num_images": len(labels),
        "target_agreement": float((best == labels).double().mean()),
        "teacher_agreement": float((teacher_logits.argmax(dim=1) == labels).double().mean()),
        "mass": {name: float(mass[group].sum()) for name, group in groups.items() if group.any()},
        "labels": {name: float(labelled[group].sum()) for name, group in groups.items() if group.any()},
        "favoured_class": favoured,
        "favoured_share": float(named[favoured]),
        "favoured_label_share": float(labelled[favoured]),
    }


def why_collapsed(statistics: dict[str, Any], class_names: Sequence[str]) -> str | None:
    """Return why a student should not learn these targets; `None` if there is no reason.

    Args:
        statistics: From [`target_statistics`].
        class_names: C names.
    """
    target, teacher = statistics["target_agreement"], statistics["teacher_agreement"]
    share, own = statistics["favoured_share"], statistics["favoured_label_share"]
    if share > _MOST_FAVOURED and share > _FAR_BEYOND_ITS_SHARE * own:
        return (
            f"{100 * share:.0f} % of the distillation targets name {class_names[statistics['favoured_class']]!r}, the "
            f"class of {100 * own:.1f} % of the examples"
        )
    if target < _LEAST_AGREEMENT * teacher:
        return (
            f"the distillation targets are right for {100 * target:.0f} % of the training examples, the teacher for "
            f"{100 * teacher:.0f} %"
        )
    return None


def describe_targets(statistics: dict[str, Any], class_names: Sequence[str]) -> str:
    """Return the statistics in one line (arguments as [`why_collapsed`])."""

    def share(of_targets: float, of_examples: float) -> str:
        return f"{100 * of_targets:.0f} % ({100 * of_examples:.0f} % of the examples)"

    shares = [
        f"{name.removesuffix('_shot')}-shot classes {share(mass, statistics['labels'][name])}"
        for name, mass in statistics["mass"].items()
    ]
    about = [f"class_balance_power {statistics['power']:.2g}"] if "power" in statistics else []
    if "prior_in_teacher" in statistics:
        kappa = statistics["prior_in_teacher"]
        about.append(f"class frequencies in the teacher's confusions: κ = {kappa:.2f}, where 1 is all and 0 none")
    most = share(statistics["favoured_share"], statistics["favoured_label_share"])
    kept = f"; {100 * statistics['top_k_mass']:.1f} % of it is kept" if "top_k_mass" in statistics else ""
    told = f" ({'; '.join(about)})" if about else ""
    return (
        f"Targets{told} of {statistics['num_images']:,} training examples: right "
        f"for {100 * statistics['target_agreement']:.0f} % (teacher {100 * statistics['teacher_agreement']:.0f} %); "
        f"probability of {', '.join(shares)}{kept}; most often "
        f"{class_names[statistics['favoured_class']]!r}, {most}."
    )


@torch.no_grad()
def answers_about_sample(
    teacher: FrozenTeacher, data: TrainingData, num_images: int, args: BKDConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a teacher's logits for some training images, N×C, and their labels; only for classes that it knows.

    Args:
        teacher: The teacher.
        data: The training images.
        num_images: Number of images, drawn by the seed.
        args: Options.

    Raises:
        InputError: If the teacher knows the class of none of the images.
        TeacherLogitsError: If the logits are not finite.
    """
    numbers = np.random.default_rng(args.seed).permutation(len(data.examples))[:num_images]
    logits, labels = data.answers(lambda batch: teacher(**split_inputs(batch)[1]), np.sort(numbers))
    if logits.isnan().any():
        raise TeacherLogitsError(
            "The teacher's logits are not finite (NaN) for training examples, before the first step. Check the "
            "teacher's weights and precision (try without --fp16/--bf16), and the examples."
        )
    labelled, labels = are_labelled(labels), labels.long()
    logits, labels = logits[labelled], labels[labelled]
    if teacher.known_classes is not None:
        kept = (labels[:, None] == teacher.known_classes.cpu()).any(dim=1)
        logits, labels = logits[kept], labels[kept]
    if not len(labels):
        raise InputError(
            "No training example that was looked at is of a class that the teacher knows: there is nothing to "
            "distil. Use another teacher, or a --method without one."
        )
    return logits, labels


def look(
    objective: Objective,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    evaluation: LongTailEvaluation,
) -> dict[str, Any]:
    """Compute statistics of the targets of some training images, with the power of the class weights in training.

    Args:
        objective: Has a distillation loss with targets.
        teacher_logits: N×C.
        labels: N.
        evaluation: Has the class counts, and the thresholds of many- and few-shot classes.

    Returns:
        The result of [`target_statistics`]; with class weights also their `power` and `prior_in_teacher`, and with
        `teacher_cache_top_k` the mass of the kept classes in the targets, `top_k_mass`.
    """
    found: dict[str, float] = {}
    exponent = None
    if objective.balances_distillation:
        options, weights, counts = objective.options, objective.final_weights(), objective.known_class_counts().clone()
        if objective.known_classes is not None:
            counts[np.setdiff1d(np.arange(len(counts)), objective.known_classes.cpu())] = 0
        # Both numbers come from the main process: other devices may round differently.
        prior = on_main_process(lambda: prior_in_teacher(teacher_logits, labels, counts))
        share = prior if options.distillation_prior == "teacher" else 1.0
        if options.class_balance_power == "measured":
            power = on_main_process(
                lambda: strongest_power(objective.as_seen(teacher_logits), labels, weights**share, options.temperature)
            )
        else:
            power = objective.power
        found, exponent = {"power": power, "prior_in_teacher": prior}, power * share
    log_targets = objective.log_targets(teacher_logits, exponent)
    if k := objective.options.teacher_cache_top_k:
        best = log_targets.double().exp().topk(min(k, log_targets.shape[1])).values
        found["top_k_mass"] = min(1.0, float(best.sum(dim=1).mean()))
    statistics = target_statistics(
        log_targets, teacher_logits, labels, evaluation.class_counts, *evaluation.thresholds
    )
    return {**statistics, **found}
