"""The training objective, built from the options and the class counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .errors import InputError
from .loss_inputs import IGNORE_INDEX, are_labelled, standardized
from .losses import class_balanced_weights, deferred_weights, example_weights, have_started
from .methods import CLASSIFICATION_LOSSES, DISTILLATION_LOSSES, Loss, call, constant
from .text import have, names_of
from .top_k import TopK

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Progress:
    """Training progress, measured in optimizer steps.

    Attributes:
        epoch: Epochs trained, e.g. 12.5.
        num_epochs: Length of the training in epochs.
        mean_weight: Mean class weight of the labels in this optimizer step; that of the batch if not given.
    """

    epoch: float = 0.0
    num_epochs: float = 1.0
    mean_weight: torch.Tensor | None = None


class Objective:
    """λ_c · classification loss + λ_d · distillation loss, one value per example. For BKD that is

        L = CE(z_s, y) + α · T² · KL( softmax(z_t / T + p · log w) ‖ softmax(z_s / T) )

    Everything is derived from the options on use, so changing an option changes the objective.

    Args:
        options: A [`BKDConfig`].
        class_counts: C numbers of training images, if known.
        device: Where the logits are.
        has_teacher: Whether there is a teacher; without one, only the classification loss is used.
        known_classes: Numbers of the classes that the teacher knows, if not all. The distillation loss then compares
            distributions over these classes only, and is 0 for examples of other classes.
        classification_loss: Used instead of the option's: called with logits (B×C) and labels (B), it returns B
            values, which are multiplied by the labels' class weights.
        distillation_loss: Used instead of the option's: called with the logits of student and teacher (B×C), labels
            (B) and class weights (C), it returns B values.
        look: Measures the targets (see `bkd_hf.targets.look`), or returns `None` if it cannot; called if
            `class_balance_power` is `"measured"` or `distillation_prior` is `"teacher"`.
    """

    def __init__(
        self,
        options: Any,
        class_counts: Sequence[int] | np.ndarray | torch.Tensor | None = None,
        device: torch.device | str = "cpu",
        has_teacher: bool = True,
        known_classes: torch.Tensor | None = None,
        classification_loss: Callable[..., torch.Tensor] | None = None,
        distillation_loss: Callable[..., torch.Tensor] | None = None,
        look: Callable[[], dict[str, Any] | None] | None = None,
    ):
        self.options = options
        self.device = device
        self.class_counts = None if class_counts is None else torch.as_tensor(class_counts)
        self.has_teacher = has_teacher
        self.known_classes = known_classes
        self.own = {
            "classification_loss": classification_loss and partial(_own_classification, classification_loss),
            "distillation_loss": distillation_loss and partial(_own_distillation, distillation_loss),
        }
        self.look = look
        self._weights_of: dict[float, torch.Tensor] = {}  # by β

    def __call__(
        self,
        z_s: torch.Tensor,
        z_t: torch.Tensor | None,
        y: torch.Tensor,
        progress: Progress,
        is_top_k: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Return `loss`, `ce_loss` and, with a teacher, `kd_loss` (with T², without α): B values each.

        Args:
            z_s: Student logits, B×C.
            z_t: Teacher logits, B×C, or what [`top_k`] keeps of them; `None` for the classification loss alone.
            is_top_k: Whether `z_t` is what [`top_k`] keeps.
            y: Labels, B; −100 is ignored.
            progress: Training progress, for deferred weights and warm-up.

        Raises:
            ValueError: If a loss does not return one value per example.
        """
        ce = self._classification(z_s, y, progress)
        ce_weight, kd_weight = self.mixture(progress.epoch)
        if z_t is None or not kd_weight:
            return {"loss": ce, "ce_loss": ce}
        kd = self._top_k(z_s, z_t, progress) if is_top_k else self._distillation(z_s, z_t, y, progress)
        return {"loss": ce_weight * ce + kd_weight * kd, "ce_loss": ce, "kd_loss": kd}

    # ---- The two terms --------------------------------------------------------------------------------------------

    def _classification(self, z: torch.Tensor, y: torch.Tensor, progress: Progress) -> torch.Tensor:
        w = self.classification_weights(progress)
        values = self._values("classification_loss", logits=z, labels=y, class_weights=w)
        _per_example("classification", values, y)
        if w is None or self.loss("classification_loss").mean_over_examples:  # type: ignore[union-attr]
            return values
        # A weighted mean divides by the sum of the weights over the whole step. Dividing the values by the mean weight
        # instead lets all losses use the same plain mean.
        mean = progress.mean_weight
        return values / (example_weights(y, w, like=w).sum() / are_labelled(y).sum() if mean is None else mean)

    def _distillation(self, z_s: torch.Tensor, z_t: torch.Tensor, y: torch.Tensor, progress: Progress) -> torch.Tensor:
        w, n = map(self._of_known, (self.distillation_weights(progress), self._device_counts))
        known = self.known_classes
        if known is not None:
            z_s, z_t, y = z_s[:, known], z_t[:, known], _among(known, y)
        inputs = {"student_logits": z_s, "teacher_logits": z_t, "labels": y, "class_weights": w, "class_counts": n}
        values = self._values("distillation_loss", **inputs)
        _per_example("distillation", values, y)
        return values if known is None else torch.where(are_labelled(y), values, 0.0)

    @property
    def top_k(self) -> TopK | None:
        """What `teacher_cache_top_k` keeps of the teacher's logits; `None` if the option is not set."""
        options = self.options
        if options.teacher_cache_top_k is None or not self.has_teacher or not self.distils:
            return None
        if self.known_classes is not None or self.own["distillation_loss"] is not None:
            why = "distillation_loss of your own" if self.known_classes is None else "teacher that lacks classes"
            raise InputError(f"--teacher_cache_top_k {options.teacher_cache_top_k} does not go with a {why}.")
        num_classes = len(self.known_class_counts())
        if options.teacher_cache_top_k >= num_classes:
            raise InputError(
                f"--teacher_cache_top_k must be less than the {num_classes} classes, got "
                f"{options.teacher_cache_top_k}. Leave it out to keep all logits."
            )
        shifts = torch.zeros(1, num_classes)
        if self.balances_distillation:
            final = self._raised(self.final_weights().double()).log().float().cpu()[None]
            shifts = final if options.deferred_reweighting_start is None else torch.cat([shifts, final])
        return TopK(options.teacher_cache_top_k, shifts.to(self.device), **self._arguments("distillation_loss"))

    def _top_k(self, z_s: torch.Tensor, rows: torch.Tensor, progress: Progress) -> torch.Tensor:
        k, start = self.options.teacher_cache_top_k, self.options.deferred_reweighting_start
        w = self.distillation_weights(progress)
        phase = -1 if have_started(start, progress.epoch, progress.num_epochs) else 0
        given = {"student_logits": z_s, "top_k": rows, "class_weights": w, "k": k, "phase": phase}
        given |= {"reduction": "none", **self._arguments("distillation_loss")}
        return call(self.loss("distillation_loss").top_k, given)  # type: ignore[union-attr, arg-type]

    def log_targets(self, z_t: torch.Tensor, power: float | None = None) -> torch.Tensor:
        """Logarithm of the target distribution at the end of training, B×C.

        Args:
            z_t: Teacher logits, B×C.
            power: Power of the class weights; that of the options if not given.
        """
        targets = self.loss("distillation_loss").targets  # type: ignore[union-attr]
        w = self._raised(self.final_weights(), power) if self.balances_distillation else None
        w, n = map(self._of_known, (w, self._device_counts))
        given = {"class_weights": w, "class_counts": n, **self._arguments("distillation_loss")}
        return self._on_known(z_t, lambda logits: call(targets, {"teacher_logits": logits, **given}))  # type: ignore[arg-type]

    def as_seen(self, z_t: torch.Tensor) -> torch.Tensor:
        """Teacher logits, B×C, as the targets see them: standardized, if the options say so."""
        return self._on_known(z_t, standardized) if self.options.logit_standardization else z_t

    def _of_known(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """Values of the classes that the teacher knows, of C values."""
        known = self.known_classes
        return values if values is None or known is None else values[known.to(values.device)]

    def _on_known(self, z_t: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Change the columns, of B×C, of the classes that the teacher knows; those of the others become −∞."""
        if self.known_classes is None:
            return change(z_t)
        known = self.known_classes.to(z_t.device)
        changed = change(z_t[:, known])
        return changed.new_full(z_t.shape, -torch.inf).index_copy(1, known, changed)

    def mixture(self, epoch: float) -> tuple[float, float]:
        """Weights of the classification loss and of the distillation loss, after `epoch` epochs of training."""
        loss = self.loss("distillation_loss")
        if loss is None:
            return constant(epoch, 0.0)
        given = {"epoch": epoch, "weight": self.options.distillation_weight}
        return call(loss.mixture, given | self.options.loss_arguments("distillation_loss"))

    # ---- Weights --------------------------------------------------------------------------------------------------

    def classification_weights(self, progress: Progress) -> torch.Tensor | None:
        """The C weights in the classification loss; `None` without `class_weighting`."""
        if self.options.class_weighting == "none":
            return None
        start = self.options.class_weighting_start if self.options.class_weighting == "drw" else None
        return deferred_weights(self.final_weights(), start, progress.epoch, progress.num_epochs)

    def distillation_weights(self, progress: Progress) -> torch.Tensor | None:
        """The C weights w^(p · κ) in the distillation loss, uniform before a deferred start; `None` for none."""
        if not self.has_teacher or not self.balances_distillation:
            return None
        start = self.options.deferred_reweighting_start
        return self._raised(deferred_weights(self.final_weights(), start, progress.epoch, progress.num_epochs))

    def final_weights(self) -> torch.Tensor:
        """The C weights by the effective number, without deferral."""
        beta = self.options.class_balance_beta
        if beta not in self._weights_of:
            weights = class_balanced_weights(self.known_class_counts(), beta)
            self._weights_of[beta] = weights.to(device=self.device, dtype=torch.float32)
        return self._weights_of[beta]

    def known_class_counts(self) -> torch.Tensor:
        """The class counts, empty classes as `empty_classes` says; raises a `ValueError` if they are not known."""
        if self.class_counts is None:
            raise ValueError("BKDTrainer needs class_counts, or a train_dataset to count them in.")
        return self.class_counts.clamp_min(1) if self.options.empty_classes == "clamp" else self.class_counts

    # ---- What the options choose ----------------------------------------------------------------------------------

    def loss(self, part: str) -> Loss | None:
        """The registry entry for `"classification_loss"` or `"distillation_loss"`, or the user's; `None` for none."""
        registry = CLASSIFICATION_LOSSES if part == "classification_loss" else DISTILLATION_LOSSES
        line, own = registry[getattr(self.options, part)], self.own[part]
        return line if own is None else Loss(own, mixture=constant if line is None else line.mixture)

    @property
    def distils(self) -> bool:
        """Whether there is a distillation loss."""
        return self.loss("distillation_loss") is not None

    @property
    def has_known_targets(self) -> bool:
        """Whether the distillation targets are known (see [`log_targets`])."""
        loss = self.loss("distillation_loss")
        return loss is not None and loss.targets is not None

    @property
    def balances_distillation(self) -> bool:
        """Whether the distillation loss takes class weights."""
        loss = self.loss("distillation_loss")
        return loss is not None and loss.needs("class_weights")

    @property
    def power(self) -> float:
        """p, the power of the class weights in the distillation loss."""
        power = self.options.class_balance_power
        if power == "auto":
            return 1 / self.options.temperature
        if power != "measured":
            return power
        return self._measured("power", "--class_balance_power measured", "--class_balance_power auto")

    @property
    def prior(self) -> float:
        """κ, the share of the class frequencies that the teacher is assumed to have learned: 1, or as measured."""
        if self.options.distillation_prior != "teacher" or not self.balances_distillation:
            return 1.0
        return self._measured("prior_in_teacher", "--distillation_prior teacher", "--distillation_prior counts")

    def _measured(self, name: str, option: str, way_out: str) -> float:
        if self.look is None:
            raise ValueError(f"{option} needs a trainer, which looks at training examples.")
        statistics = self.look()
        if statistics is None:
            raise InputError(
                f"{option} looks at training examples first, which needs a training set with a length and random "
                f"access, and a known distillation loss. Use {way_out}."
            )
        return statistics[name]

    @property
    def is_calibrated(self) -> bool:
        """Whether there is a teacher, and the power is below 1."""
        return self.has_teacher and self.distils and self.power < 1

    @property
    def tau(self) -> float:
        """τ of the logit-adjusted classification loss.

        `"auto"` is 1 + κ · (1 − p · T), at least 0. With κ = 1, this is 2 − p · T: the targets remove the class
        frequencies p · T times, and the loss on the labels 2 − p · T times. At p = 1/T each removes them once. At the
        paper's p = 1 and T = 2, the loss on the labels does not remove them, as in the paper.
        """
        tau = self.options.logit_adjustment_tau
        if tau != "auto":
            return tau
        if not self.has_teacher:
            return 1.0
        return max(0.0, 1.0 + self.prior * (1.0 - self.power * self.options.temperature))

    @property
    def settled(self) -> dict[str, float]:
        """The resolved values of the options that the losses use and that may be `auto` or `measured`: p, κ, τ."""
        found = {}
        if self.has_teacher and self.balances_distillation:
            found = {"class_balance_power": self.power, "distillation_prior": self.prior}
        if "tau" in self.loss("classification_loss").shared:  # type: ignore[union-attr]
            found["logit_adjustment_tau"] = self.tau
        return found

    def _raised(self, weights: torch.Tensor, power: float | None = None) -> torch.Tensor:
        """The weights to the power of p · κ, as passed to all distillation losses, user-defined ones too."""
        power = self.power * self.prior if power is None else power
        return weights if power == 1 else weights.pow(power)

    def _arguments(self, part: str) -> dict[str, Any]:
        """Option values of a loss, with `auto` resolved; without the power, which the weights already include."""
        arguments = self.options.loss_arguments(part) if self.own[part] is None else {}
        if "power" in self.loss(part).shared:  # type: ignore[union-attr]
            arguments.pop("power", None)
        if arguments.get("tau") == "auto":
            arguments["tau"] = self.tau
        return arguments

    def _values(self, part: str, **inputs: Any) -> torch.Tensor:
        given = {"class_counts": self._device_counts, **inputs, "reduction": "none", **self._arguments(part)}
        return call(self.loss(part).function, given)  # type: ignore[union-attr]

    @cached_property
    def _device_counts(self) -> torch.Tensor | None:
        return None if self.class_counts is None else self.known_class_counts().to(self.device)

    def try_out(self, part: str) -> None:
        """Call a loss once with a batch of one example, so that it checks the values of its arguments."""
        z, y, w = torch.zeros(1, len(self.known_class_counts())), torch.zeros(1, dtype=torch.int64), None
        self._values(part, logits=z, student_logits=z, teacher_logits=z, labels=y, class_weights=w)
        self.mixture(0.0)

    def check_values(self) -> None:
        """Check that the losses accept this number of classes and these class counts.

        Raises:
            InputError: If one does not; the message names the option.
        """
        for part in ("classification_loss", *(["distillation_loss"] if self.has_teacher and self.distils else [])):
            try:
                self.try_out(part)
            except (TypeError, ValueError) as error:
                raise InputError(f"--{part} {getattr(self.options, part)}: {error}") from error
        _ = self.top_k  # raises
        self._check_power()

    def check(self, model_config: Any) -> None:
        """Check, before training, that the objective works with a student.

        Raises:
            ValueError: If there is a teacher but no distillation, a class that needs images has none, or the student
                does not have the head that `head` or `ldam` requires.
        """
        options = self.options
        if self.has_teacher and not self.distils:
            raise ValueError(
                f"The method {options.method!r} has no distillation loss: the teacher would not be used. Leave "
                "teacher_model out, or choose a distillation_loss."
            )
        self.check_empty_classes(getattr(model_config, "id2label", None) or {})
        self._check_power()
        if self.own["classification_loss"] is None:
            check_head(options, model_config)
        elif options.label_smoothing_factor:
            raise InputError(
                f"--label_smoothing_factor {options.label_smoothing_factor:g} does not reach a classification_loss of "
                "your own: leave it out, and smooth the labels there."
            )

    def _check_power(self) -> None:
        power, beta = self.options.class_balance_power, self.options.class_balance_beta
        if not self.has_teacher or not self.balances_distillation:
            return
        if power in ("auto", "measured"):  # for weights like 1/n
            if beta == 0:
                raise InputError(
                    f"--beta 0 gives all classes the same weight, so that --class_balance_power {power} balances "
                    "nothing. Use --method kd, or the default --beta."
                )
            counts = self.known_class_counts()
            if (largest := int(counts.max())) * (1 - beta) > 1 and largest > counts.min():
                enough = 1 - 10.0 ** -math.ceil(math.log10(10 * largest))
                logger.warning_once(
                    f"--beta {beta:g} gives classes of more than about {1 / (1 - beta):,.0f} training examples nearly "
                    f"the same weight; the largest has {largest:,}. Use --beta {enough:.12g} to balance them too."
                )
            return
        weights = self.final_weights()
        raised = self._raised(weights, power)
        if not bool(((raised > 0) & raised.isfinite()).all()):
            raise InputError(
                f"--class_balance_power {power:g} is too large: the class weights, {weights.min():.1e} to "
                f"{weights.max():.1e}, to this power leave the range of float32. The paper's power is 1."
            )

    def check_empty_classes(self, class_names: Mapping[int, str]) -> None:
        """Check that no class is without training images, if the losses need their number.

        Args:
            class_names: Names by number; a class without a name is called by its number.

        Raises:
            InputError: If there is such a class; the message names it.
        """
        options, needing = self.options, []
        if options.class_weighting != "none":
            needing.append(f"--class_weighting {options.class_weighting}")
        if self.loss("classification_loss").needs("class_counts"):  # type: ignore[union-attr]
            needing.append(f"--classification_loss {options.classification_loss}")
        if self.has_teacher and self.balances_distillation:
            needing.append(f"--distillation_loss {options.distillation_loss}")
        counts = self.known_class_counts() if needing else torch.ones(1)
        if empty := (counts == 0).nonzero().flatten().tolist():
            raise InputError(
                f"{len(empty)} of {len(counts)} classes {have(len(empty))} no training example "
                f"({names_of(empty, class_names)}), and {needing[0]} needs a number of each. Remove such classes, or "
                "count each as one example by --empty_classes clamp."
            )


def check_head(options: Any, model_config: Any) -> None:
    """Check that a student's head, according to its configuration, is the requested one.

    Raises:
        InputError: If it is not.
    """
    has_cosine, wanted = getattr(model_config, "cosine_head", None), options.cosine_scale
    if options.head == "linear" and has_cosine:
        raise InputError("--head linear: the student was made with a cosine head. Leave --head out to train that on.")
    if wanted is None or model_config is None:
        return
    why = "--head cosine" if options.head == "cosine" else "--classification_loss ldam"
    if has_cosine is False or (has_cosine is None and options.head == "cosine"):
        raise InputError(
            f"{why} needs a student whose logits are scale · cos: load it by load_classifier with "
            f"cosine_scale={wanted:g}."
        )
    scale, option = getattr(model_config, "cosine_scale", wanted), "head" if "--head" in why else "ldam"
    if scale != wanted:
        raise InputError(f"--{option}_scale is {wanted}, but the student's cosine head has the scale {scale}.")


def _own_classification(
    own: Callable[..., torch.Tensor], logits: torch.Tensor, labels: torch.Tensor, class_weights: torch.Tensor | None
) -> torch.Tensor:
    values = _per_example("classification", own(logits, labels), labels)
    return values * example_weights(labels, class_weights, like=logits)


def _own_distillation(
    own: Callable[..., torch.Tensor], student_logits: Any, teacher_logits: Any, labels: Any, class_weights: Any
) -> torch.Tensor:
    return own(student_logits, teacher_logits, labels, class_weights)


def _per_example(kind: str, losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if losses.shape != labels.shape:
        raise ValueError(
            f"The {kind} loss must return one value per example, shape {tuple(labels.shape)}; it returned shape "
            f"{tuple(losses.shape)}. Leave the mean to the trainer, which takes it over the whole optimizer step."
        )
    return losses


def _among(classes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Renumber labels by their position among some classes; −100 for all other classes."""
    places = (labels[:, None] == classes).int()
    return torch.where(places.any(dim=1), places.argmax(dim=1), IGNORE_INDEX)
