"""The registries of losses, and the presets of `--method`.

A method combines a classification loss, its class weighting, a distillation loss and a sampler. All methods use the
same trainer, data and schedule, and differ only in these four choices.

To add a loss, write a function of logits in `losses.py` and add one line to a registry below. Arguments other than its
inputs become its options (`--classification_loss_args`, `--distillation_loss_args`); the card reads title, source and
formula from its docstring.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any

import torch

from .distillation_losses import (
    dist_loss,
    dive_log_targets,
    dive_loss,
    dkd_loss,
    ltkd_log_targets,
    ltkd_loss,
    wsl_loss,
)
from .losses import (
    balanced_distillation_loss,
    balanced_log_targets,
    balanced_softmax_loss,
    cross_entropy_loss,
    focal_loss,
    kd_loss,
    ldam_loss,
    logit_adjustment_loss,
)
from .top_k import top_k_distillation_loss

# Inputs of losses and mixtures; their other arguments are options.
_OF_LOSSES = {"logits", "student_logits", "teacher_logits", "labels", "class_counts", "class_weights", "reduction"}
_OF_MIXTURES = {"epoch", "weight"}


@lru_cache
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def call(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """Call a function with those of the given arguments that it accepts."""
    return function(**{name: value for name, value in given.items() if name in _parameters(function)})


def constant(epoch: float, weight: float) -> tuple[float, float]:
    """1 and α."""
    return 1.0, weight


def complementary(epoch: float, *, alpha: float = 0.5) -> tuple[float, float]:
    """1 − α and α (He et al., 2021, arXiv 2103.15042, eq. 9)."""
    return 1.0 - alpha, alpha


def warm_up(epoch: float, *, warmup_epochs: int = 20) -> tuple[float, float]:
    """1, and (e + 1)/`warmup_epochs` in epoch e, at most 1, as in the public code of DKD."""
    return 1.0, min(1.0, (int(epoch) + 1) / max(1, warmup_epochs))


@dataclass(frozen=True)
class Loss:
    """A line of a registry.

    Attributes:
        function: Takes some of the inputs `logits` or `student_logits` and `teacher_logits` (B×C), `labels` (B),
            `class_counts` and `class_weights` (C) and `reduction` by name; all its other arguments are options.
        shared: Options shared with other losses: argument → name in [`BKDConfig`]. Any other argument is the option
            LOSS_ARGUMENT, if [`BKDConfig`] has it, and can be given by `--…_loss_args`.
        targets: For a distillation loss: returns the logarithm of the target distribution, B×C; `None` if it has no
            targets, so nothing can be checked before training.
        mixture: For a distillation loss: weights of classification and distillation after some epochs.
        mean_over_examples: Whether its weighted mean divides by the number of examples, not by the sum of weights.
        top_k: For a distillation loss: its version for the teacher's k best classes (see `bkd_hf.top_k`), if any.
    """

    function: Callable[..., torch.Tensor]
    shared: Mapping[str, str] = field(default_factory=dict)
    targets: Callable[..., torch.Tensor] | None = None
    mixture: Callable[..., tuple[float, float]] = constant
    mean_over_examples: bool = False
    top_k: Callable[..., torch.Tensor] | None = None

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Its options and their defaults."""
        parameters = [
            parameter for function in (self.function, self.mixture) for parameter in _parameters(function).values()
        ]
        return {p.name: p.default for p in parameters if p.name not in _OF_LOSSES | _OF_MIXTURES}

    @property
    def title(self) -> str:
        """First line of its docstring, without the source; its name without a docstring."""
        return (self._docstring or self.function.__name__).partition("\n")[0].partition(" (")[0].rstrip(".:")

    @property
    def source(self) -> str | None:
        """Number on arXiv of the paper that its docstring names."""
        found = re.search(r"arXiv (\d{4}\.\d{4,5})\b", self._docstring)
        return found and found[1]

    @property
    def formula(self) -> str:
        """The first indented paragraph of its docstring; empty if there is none."""
        paragraphs = re.split(r"\n\s*?\n", self._docstring)[1:]
        found = [text for text in paragraphs if text.startswith("    ")]
        if not found and len(paragraphs) == 1 and " = " in paragraphs[0]:
            found = paragraphs  # alone, it has lost its indent: getdoc removes the common indent
        return "\n".join(line.strip() for text in found[:1] for line in text.splitlines())

    @property
    def _docstring(self) -> str:
        return inspect.getdoc(self.function) or ""

    def needs(self, name: str) -> bool:
        """Whether its function, or its mixture, takes an input."""
        return any(name in _parameters(function) for function in (self.function, self.mixture))

    def option(self, loss: str, argument: str) -> str:
        """The option that gives an argument its value, for the loss of this name."""
        return self.shared.get(argument, f"{loss}_{argument}")


_SMOOTHED = {"label_smoothing": "label_smoothing_factor"}
_SOFTENED = {"temperature": "temperature", "power": "class_balance_power", "standardize": "logit_standardization"}

#: What `--classification_loss` may be.
CLASSIFICATION_LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(cross_entropy_loss, _SMOOTHED),
    "focal": Loss(focal_loss, mean_over_examples=True),
    "ldam": Loss(ldam_loss),
    "balanced_softmax": Loss(balanced_softmax_loss, _SMOOTHED),
    "logit_adjustment": Loss(logit_adjustment_loss, {**_SMOOTHED, "tau": "logit_adjustment_tau"}),
}
#: What `--distillation_loss` may be.
DISTILLATION_LOSSES: dict[str, Loss | None] = {
    "none": None,
    "kd": Loss(kd_loss, _SOFTENED, balanced_log_targets, top_k=top_k_distillation_loss),
    "bkd": Loss(balanced_distillation_loss, _SOFTENED, balanced_log_targets, top_k=top_k_distillation_loss),
    "dive": Loss(dive_loss, targets=dive_log_targets, mixture=complementary),
    "dkd": Loss(dkd_loss, targets=balanced_log_targets, mixture=warm_up),
    "wsl": Loss(wsl_loss, {"temperature": "temperature"}, balanced_log_targets),
    "dist": Loss(dist_loss, targets=balanced_log_targets),
    "ltkd": Loss(ltkd_loss, targets=ltkd_log_targets),
}
#: What `--class_weighting` may be; `drw` is deferred re-weighting (Cao et al., 2019, arXiv 1906.07413).
CLASS_WEIGHTINGS = ("none", "reweight", "drw")
#: What `--sampler` may be; `class_balanced` draws each class equally often (Kang et al., 2020, arXiv 1910.09217).
SAMPLERS = ("instance", "class_balanced")
#: What `--student_init` may be: the student's own weights, or the teacher's; `auto`: the teacher's if they fit and
#: `class_balance_power` is below 1, as the teacher is not confident enough on its training images for 1.
STUDENT_INITS = ("model", "teacher", "auto")
#: What `--head_bias` may be: as learned, or fitted to balanced data after training; `auto`: fitted if the student
#: favours a class and `class_balance_power` is below 1.
HEAD_BIASES = ("learned", "balanced", "auto")
#: What `--distillation_prior` may be: the teacher's class prior follows the counts, or is measured from its logits on
#: training images; `auto`: measured if the record of its run says that its training balanced the classes.
PRIORS = ("auto", "counts", "teacher")
# Choices that correct for class frequencies.
_CORRECTING = {"balanced_softmax", "logit_adjustment", "reweight", "drw", "bkd", "dive", "ltkd", "class_balanced"}
# Those of them that correct nothing where an option is 0.
_NOTHING_AT_0: dict[str, set[str]] = {
    "logit_adjustment_tau": {"logit_adjustment"},
    "class_balance_beta": {"reweight", "drw", "bkd"},
    "class_balance_power": {"bkd"},
}


@dataclass(frozen=True)
class Method:
    """A preset.

    Attributes:
        classification_loss: Key of `CLASSIFICATION_LOSSES`.
        class_weighting: Of the classification loss, one of `CLASS_WEIGHTINGS`.
        distillation_loss: Key of `DISTILLATION_LOSSES`.
        sampler: One of `SAMPLERS`.
        student_init: One of `STUDENT_INITS`.
        head_bias: One of `HEAD_BIASES`.
        class_balance_power: p of the weights in the distillation loss.
        logit_adjustment_tau: τ of the classification loss.
        deferred_reweighting_start: Start of the weights in the distillation loss.
        teacher: The method that trains its teacher.
    """

    classification_loss: str = "cross_entropy"
    class_weighting: str = "none"
    distillation_loss: str = "none"
    sampler: str = "instance"
    student_init: str = "model"
    head_bias: str = "learned"
    class_balance_power: float | str = 1.0
    logit_adjustment_tau: float | str = 1.0
    deferred_reweighting_start: float | None = None
    teacher: str = "ce"

    def options(self) -> dict[str, Any]:
        """Options of [`BKDConfig`] that the preset sets."""
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
        head_bias="auto",
        class_balance_power="measured",
        logit_adjustment_tau="auto",
    ),
    "dive": Method("balanced_softmax", distillation_loss="dive", teacher="balanced-softmax"),
    "dkd": Method(distillation_loss="dkd"),
    "wsl": Method(distillation_loss="wsl"),
    "dist": Method(distillation_loss="dist"),
    "ltkd": Method(distillation_loss="ltkd"),
}
#: The preset recommended for new data, and the default of `bkd-hf run`.
RECOMMENDED = "bkd-calibrated"


def corrects(options: Mapping[str, Any]) -> bool:
    """Whether a method corrects for the class frequencies, by loss, weights or sampler.

    Args:
        options: Options by name, including those of [`Method`]; values may be as a method's label tells them.
    """
    parts = ("classification_loss", "class_weighting", "distillation_loss", "sampler")
    chosen = {options.get(part) for part in parts}
    for option, without_effect in _NOTHING_AT_0.items():
        if options.get(option) in (0, "0"):
            chosen -= without_effect
    return not chosen.isdisjoint(_CORRECTING)


def is_balanced_by(options: Mapping[str, Any]) -> bool:
    """Whether training with these options ends with balanced answers: as [`corrects`], or by the bias of the head."""
    return options.get("head_bias") == "balanced" or corrects(options)
