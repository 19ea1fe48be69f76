"""Options of the trainer."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from transformers import TrainingArguments


@dataclass
class BKDConfig(TrainingArguments):
    """`transformers.TrainingArguments` and the options of Balanced Knowledge Distillation.

    Inherited defaults are those of `transformers`; a recipe or a script sets what differs. The step-decay schedule is
    chosen by `lr_step_epochs` and replaces `lr_scheduler_type`:

        rate(epoch e) = learning_rate · (e + 1) / lr_warmup_epochs      while e < lr_warmup_epochs
                        learning_rate · lr_step_factors[k]              from epoch lr_step_epochs[k] on
                        learning_rate                                   otherwise

    with whole epochs e counted from 0. Each field is described by its help text.

    Raises:
        ValueError: If a value is out of its range; the message names the option.

    Warns:
        UserWarning: If an option has no effect.
    """

    temperature: float = field(
        default=2.0,
        metadata={"help": "T > 0: softens both distributions; raising it also strengthens the rebalancing."},
    )
    distillation_weight: float = field(
        default=1.0,
        metadata={"help": "α ≥ 0: weight of the distillation loss beside the cross-entropy.", "aliases": ["--alpha"]},
    )
    class_balance_beta: float = field(
        default=0.9999,
        metadata={
            "help": "β in [0, 1) of the class weights (1-β)/(1-β^n): 0 gives uniform weights (plain distillation), "
            "→ 1 the inverse class frequency.",
            "aliases": ["--beta"],
        },
    )
    deferred_reweighting_start: float | None = field(
        default=None,
        metadata={
            "help": "Class weights are uniform until this epoch (≥ 1), or this fraction of training (below 1), and "
            "class-balanced from then on. Not given: class-balanced from the first step."
        },
    )
    momentum: float = field(default=0.0, metadata={"help": "Momentum of --optim sgd (without Nesterov), in [0, 1)."})
    decay_all_parameters: bool = field(
        default=False,
        metadata={
            "help": "Apply weight_decay to all parameters, biases and normalisation layers too, as published "
            "long-tail recipes do."
        },
    )
    lr_step_epochs: list[int] | None = field(
        default=None,
        metadata={"help": "Step-decay schedule: epochs (counted from 0) from which lr_step_factors hold."},
    )
    lr_step_factors: list[float] | None = field(
        default=None,
        metadata={"help": "Step-decay schedule: factors of the *initial* learning rate, one per lr_step_epochs."},
    )
    lr_warmup_epochs: int = field(
        default=0,
        metadata={"help": "Step-decay schedule: the first n epochs run at 1/n, 2/n, … of the learning rate."},
    )

    def __post_init__(self) -> None:
        self._check_ranges()
        super().__post_init__()
        for message in self._options_without_effect():
            warnings.warn(message, UserWarning, stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its arguments into every checkpoint, and pushes them: never with the token.
        return {**self.__dict__, "hub_token": None}

    @property
    def uses_step_decay(self) -> bool:
        """Whether the step-decay schedule replaces `lr_scheduler_type`."""
        return self.lr_step_epochs is not None

    def _check_ranges(self) -> None:
        def require(holds: bool, name: str, condition: str) -> None:
            if not holds:
                raise ValueError(f"--{name} must be {condition}, got {getattr(self, name)}.")

        require(0 < self.temperature < math.inf, "temperature", "a finite number > 0")
        require(0 <= self.distillation_weight < math.inf, "distillation_weight", "a finite number ≥ 0")
        require(0 <= self.class_balance_beta < 1, "class_balance_beta", "in [0, 1)")
        start = self.deferred_reweighting_start
        require(start is None or 0 <= start < math.inf, "deferred_reweighting_start", "a finite number ≥ 0")
        require(0 <= self.momentum < 1, "momentum", "in [0, 1)")
        require(self.lr_warmup_epochs >= 0, "lr_warmup_epochs", "≥ 0")
        if self.lr_step_epochs is None:
            require(self.lr_step_factors is None, "lr_step_factors", "given together with --lr_step_epochs")
            require(self.lr_warmup_epochs == 0, "lr_warmup_epochs", "given together with --lr_step_epochs")
        else:
            epochs, factors = self.lr_step_epochs, self.lr_step_factors or []
            increasing = all(a < b for a, b in pairwise(epochs))
            require(increasing and all(e >= 0 for e in epochs), "lr_step_epochs", "increasing numbers ≥ 0")
            require(len(factors) == len(epochs), "lr_step_factors", f"{len(epochs)} numbers, as lr_step_epochs has")
            require(all(0 <= f < math.inf for f in factors), "lr_step_factors", "finite numbers ≥ 0")

    def _options_without_effect(self) -> list[str]:
        messages = []
        if self.momentum and str(self.optim.value) != "sgd":
            messages.append(f"--momentum {self.momentum} has no effect: it belongs to --optim sgd, not {self.optim}.")
        if self.decay_all_parameters and self.weight_decay == 0:
            messages.append("--decay_all_parameters has no effect: --weight_decay is 0.")
        start = self.deferred_reweighting_start
        if start is not None and self.class_balance_beta == 0:
            messages.append(
                f"--deferred_reweighting_start {start:g} has no effect: with --class_balance_beta 0 the weights are "
                "uniform all the time."
            )
        elif start is not None and self.max_steps <= 0 and start >= max(1, self.num_train_epochs):
            messages.append(
                f"--deferred_reweighting_start {start:g} is never reached: training ends after "
                f"{self.num_train_epochs:g} epochs, with uniform weights throughout."
            )
        if self.uses_step_decay:
            if str(self.lr_scheduler_type.value) != "linear" or self.warmup_steps:
                messages.append(
                    "--lr_scheduler_type and --warmup_steps have no effect: --lr_step_epochs chooses the step-decay "
                    "schedule."
                )
            late = [e for e in self.lr_step_epochs or [] if self.max_steps <= 0 and e >= self.num_train_epochs]
            if late:
                messages.append(
                    f"--lr_step_epochs {' '.join(map(str, late))} are never reached: training ends after "
                    f"{self.num_train_epochs:g} epochs."
                )
        return messages
