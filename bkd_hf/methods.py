"""Methods of long-tailed training: classification loss × its class weighting × distillation loss × sampler.

A method is a choice from each of the four tables, and every choice runs through the same `BKDTrainer`, data and
schedule: what differs between two methods is what their names say. In the losses of the tables, `o` are the options,
`z` logits (`z_s` student, `z_t` teacher), `y` labels, `n` class counts, and `w` class weights or `None`, in the
distillation losses raised to `class_balance_power`; they return B numbers, one per example.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from .losses import (
    balanced_distillation_loss,
    balanced_log_targets,
    balanced_softmax_loss,
    cross_entropy_loss,
    dive_loss,
    dkd_loss,
    example_weights,
    focal_loss,
    kd_loss,
    ldam_loss,
    logit_adjustment_loss,
)

if TYPE_CHECKING:
    from .config import BKDConfig

#: What `--classification_loss` may be.
CLASSIFICATION_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "cross_entropy": lambda o, z, y, n, w: cross_entropy_loss(z, y, o.label_smoothing_factor, "none", w),
    "focal": lambda o, z, y, n, w: focal_loss(z, y, o.focal_gamma, "none", w),
    "ldam": lambda o, z, y, n, w: ldam_loss(z, y, n, o.ldam_max_margin, o.ldam_scale, "none", w),
    "balanced_softmax": lambda o, z, y, n, w: balanced_softmax_loss(z, y, n, o.label_smoothing_factor, "none", w),
    "logit_adjustment": lambda o, z, y, n, w: logit_adjustment_loss(
        z, y, n, o.logit_adjustment_tau, o.label_smoothing_factor, "none", w
    ),
}
#: Whose mean divides by the number of examples even where these are weighted.
MEAN_OVER_EXAMPLES = frozenset({"focal"})
#: Which take the logarithm of the class counts, so that no class may be empty.
NEED_CLASS_COUNTS = frozenset({"ldam", "balanced_softmax", "logit_adjustment"})
# Choices that correct for the class frequencies.
_CORRECTING = {"balanced_softmax", "logit_adjustment", "reweight", "drw", "bkd", "dive", "class_balanced"}
#: Which know no label smoothing.
WITHOUT_LABEL_SMOOTHING = frozenset({"focal", "ldam"})

#: What `--class_weighting` may be; `drw` is deferred re-weighting (Cao et al., 2019, arXiv 1906.07413).
CLASS_WEIGHTINGS = ("none", "reweight", "drw")

#: What `--distillation_loss` may be.
DISTILLATION_LOSSES: dict[str, Callable[..., torch.Tensor] | None] = {
    "none": None,
    "kd": lambda o, z_s, z_t, y, w: kd_loss(z_s, z_t, o.temperature, "none"),
    "bkd": lambda o, z_s, z_t, y, w: balanced_distillation_loss(z_s, z_t, w, o.temperature, "none"),
    "dive": lambda o, z_s, z_t, y, w: dive_loss(z_s, z_t, o.dive_temperature, o.dive_power, "none"),
    "dkd": lambda o, z_s, z_t, y, w: dkd_loss(z_s, z_t, y, o.dkd_temperature, o.dkd_alpha, o.dkd_beta, "none"),
}

#: What the student imitates, by distillation loss: the logarithm of a distribution over the classes, B×C.
DISTILLATION_TARGETS: dict[str, Callable[..., torch.Tensor]] = {
    "kd": lambda o, z_t, w: balanced_log_targets(z_t, None, o.temperature),
    "bkd": lambda o, z_t, w: balanced_log_targets(z_t, w, o.temperature),
    "dive": lambda o, z_t, w: balanced_log_targets(o.dive_power * z_t, None, o.dive_temperature),
    "dkd": lambda o, z_t, w: balanced_log_targets(z_t, None, o.dkd_temperature),
}

#: What `--student_init` may be: the student's own weights, or the teacher's; `auto`: the teacher's where they fit and
#: the teacher is not so sure of its training images that its answers bear `class_balance_power` 1.
STUDENT_INITS = ("model", "teacher", "auto")

#: What `--sampler` may be; `class_balanced` draws each class equally often (Kang et al., 2020, arXiv 1910.09217).
SAMPLERS = ("instance", "class_balanced")


def classification_loss(
    options: BKDConfig,
    class_counts: torch.Tensor | None,
    own: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    tau: Callable[[], float] | None = None,
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """The classification loss that the options choose, a function of logits, labels and class weights.

    Args:
        options: The options.
        class_counts: C numbers of training images, where they are known.
        own: A user's loss instead, of logits and labels; its values are multiplied by the labels' weights.
        tau: Returns τ of logit adjustment at the time of the call; that of the options if not given.

    Raises:
        ValueError: When called, if the loss does not return one value per example.
    """

    def values(z: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
        if own is not None:
            return _per_example("classification", own(z, y), y) * example_weights(y, w, like=z)
        loss = CLASSIFICATION_LOSSES[options.classification_loss or "cross_entropy"]
        resolved = options if tau is None else _Resolved(options, tau())
        return _per_example("classification", loss(resolved, z, y, class_counts, w), y)

    return values


class _Resolved:
    """Options in which τ of logit adjustment is a number."""

    def __init__(self, options: BKDConfig, logit_adjustment_tau: float):
        self.options, self.logit_adjustment_tau = options, logit_adjustment_tau

    def __getattr__(self, name: str) -> Any:
        return getattr(self.options, name)


def distillation_loss(
    options: BKDConfig, own: Callable[..., torch.Tensor] | None = None
) -> Callable[..., torch.Tensor] | None:
    """The distillation loss that the options choose, a function of student logits, teacher logits, labels and weights.

    Args:
        options: The options.
        own: A user's loss instead, of the same arguments.

    Returns:
        The loss; `None` if the method has none.

    Raises:
        ValueError: When called, if the loss does not return one value per example.
    """
    named = DISTILLATION_LOSSES[options.distillation_loss or "none"]
    loss = own or (functools.partial(named, options) if named else None)
    if loss is None:
        return None
    return lambda z_s, z_t, y, w: _per_example("distillation", loss(z_s, z_t, y, w), y)


def _per_example(kind: str, losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if losses.shape != labels.shape:
        raise ValueError(
            f"The {kind} loss must return one value per example, shape {tuple(labels.shape)}; it returned shape "
            f"{tuple(losses.shape)}. Leave the mean to the trainer, which takes it over the whole optimizer step."
        )
    return losses


def corrects(options: Mapping[str, Any]) -> bool:
    """Whether a method corrects for the class frequencies, by loss, weights or sampler.

    Args:
        options: By name, those of [`Method`] among them.
    """
    parts = ("classification_loss", "class_weighting", "distillation_loss", "sampler")
    return any(options.get(part) in _CORRECTING for part in parts)


def mixture(options: BKDConfig, epoch: float) -> tuple[float, float]:
    """Weights of the classification loss and of the distillation loss, after `epoch` epochs of training.

    1 and α, but for `dive` 1 − α and α, and for `dkd`, whose parts are weighted already, 1 and a linear warm-up:
    (e + 1)/`dkd_warmup_epochs` in epoch e, at most 1.
    """
    if options.distillation_loss == "dive":
        return 1.0 - options.dive_alpha, options.dive_alpha
    if options.distillation_loss == "dkd":
        return 1.0, min(1.0, (int(epoch) + 1) / max(1, options.dkd_warmup_epochs))
    return 1.0, options.distillation_weight


@dataclass(frozen=True)
class Method:
    """A preset.

    Attributes:
        classification_loss: Key of `CLASSIFICATION_LOSSES`.
        class_weighting: Of the classification loss, one of `CLASS_WEIGHTINGS`.
        distillation_loss: Key of `DISTILLATION_LOSSES`.
        sampler: One of `SAMPLERS`.
        student_init: One of `STUDENT_INITS`.
        class_balance_power: Of the weights in the distillation loss.
        logit_adjustment_tau: Of the classification loss.
        deferred_reweighting_start: Of the weights in the distillation loss.
        teacher: The method by which its teacher is trained.
    """

    classification_loss: str = "cross_entropy"
    class_weighting: str = "none"
    distillation_loss: str = "none"
    sampler: str = "instance"
    student_init: str = "model"
    class_balance_power: float | str = 1.0
    logit_adjustment_tau: float | str = 1.0
    deferred_reweighting_start: float | None = None
    teacher: str = "ce"

    def options(self) -> dict[str, Any]:
        """Options of [`BKDConfig`] that the preset gives a value."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "teacher"}


#: What `--method` may be.
METHODS = {
    "ce": Method(),
    "cb-ce": Method(class_weighting="reweight"),
    "focal": Method("focal"),
    "ldam": Method("ldam"),
    "ldam-drw": Method("ldam", "drw"),
    "balanced-softmax": Method("balanced_softmax"),
    "logit-adjustment": Method("logit_adjustment"),
    "resample": Method(sampler="class_balanced"),
    "kd": Method(distillation_loss="kd"),
    "bkd": Method(distillation_loss="bkd"),
    "bkd-drw": Method(distillation_loss="bkd", deferred_reweighting_start=0.8),
    "bkd-calibrated": Method(
        "logit_adjustment",
        distillation_loss="bkd",
        student_init="auto",
        class_balance_power="measured",
        logit_adjustment_tau="auto",
    ),
    "dive": Method("balanced_softmax", distillation_loss="dive", teacher="balanced-softmax"),
    "dkd": Method(distillation_loss="dkd"),
}

#: The preset for data and budgets of people's own, and the default of `scripts/run_bkd.py`.
RECOMMENDED = "bkd-calibrated"
