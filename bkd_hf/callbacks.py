"""Callbacks and meters of a training: non-finite numbers, mean losses, time, epochs, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import DefaultFlowCallback, TrainerCallback, TrainerState, TrainingArguments

from .machine import precision_of
from .metrics import NotFiniteError
from .results import summarize_training
from .sharding import own_part
from .teacher_logits import TeacherLogitsError

# In the state of a checkpoint; not the names of classes, which transformers takes for those of callbacks.
_LOSSES, _TIME = "losses_since_log", "training_time"
_NO_STEP = torch.iinfo(torch.int64).max
_MODELS = ("teacher", "student")


class TrainingDivergedError(NotFiniteError):
    """The student's loss or weights are not finite; the message names the training step."""


class FiniteGuard:
    """Records the first step at which something of a model is not finite, without synchronising with the device.

    Args:
        accelerator: The trainer's.
        args: The options, for messages.
    """

    def __init__(self, accelerator: Accelerator, args: TrainingArguments):
        self.accelerator, self.args = accelerator, args
        self._first_bad_steps = torch.full((len(_MODELS),), _NO_STEP, device=args.device)

    def watch(self, model: str, is_finite: torch.Tensor, step: int) -> None:
        """Record whether something is finite.

        Args:
            model: `"teacher"` or `"student"`.
            is_finite: One or several booleans.
            step: Training step, counted from 1.
        """
        first = self._first_bad_steps[_MODELS.index(model)]
        torch.minimum(first, torch.where(is_finite.all(), _NO_STEP, step), out=first)

    def stop_if_not_finite(self) -> None:
        """Wait for the device, and stop all processes together if one of them recorded something.

        Raises:
            TeacherLogitsError: If the teacher's logits were the first.
            TrainingDivergedError: If the student's loss or weights were.
        """
        steps = self.accelerator.gather(self._first_bad_steps).view(-1, len(_MODELS)).amin(dim=0).tolist()
        first = min(steps)
        if first == _NO_STEP:
            return
        saved = f"at step {first}. The student was not saved since; the last checkpoint, if there is one, is good."
        if steps[_MODELS.index("teacher")] == first:  # the student's loss is then not finite either
            raise TeacherLogitsError(
                f"The teacher's logits are not finite (NaN or Inf) {saved} Check the teacher's weights and precision "
                "(try without --fp16/--bf16), and the examples of this step."
            )
        raise TrainingDivergedError(
            f"The training diverged: loss or weights are not finite (NaN or Inf) {saved} Try a lower --learning_rate "
            f"(it is {self.args.learning_rate:g}), --max_grad_norm 1 (it is {self.args.max_grad_norm or 'off'}), or "
            f"--precision fp32 (it is {precision_of(self.args)}), in a new --output_dir."
        )

    def check_weights(self, model: nn.Module, step: int) -> None:
        """Stop before saving a student with non-finite weights after a step with a finite loss; raises as above."""
        tensors = [own_part(tensor) for tensor in (*model.parameters(), *model.buffers())]
        # In buffers −∞ may be a mask.
        self.watch("student", torch.stack([(t < math.inf).all().to(self.args.device) for t in tensors]), step)
        self.stop_if_not_finite()


class LossMeter:
    """Means of the loss and of its parts over all examples, in all processes, since the last log.

    Args:
        accelerator: The trainer's.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, losses: dict[str, torch.Tensor], counted: torch.Tensor) -> None:
        """Add a batch.

        Args:
            losses: B values of each part.
            counted: B booleans: whether an example counts.
        """
        sums = {name: (values.detach() * counted).sum() for name, values in losses.items()}
        for name, value in {**sums, "count": counted.sum()}.items():
            value = value.to(_sum_dtype(value.device))
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def pop(self) -> dict[str, float]:
        """Return the means, and reset them; all processes must call it."""
        if not self.sums:
            return {}
        totals = self._totals()
        self.sums = {}
        count = totals.pop("count")
        return {name: total / max(count, 1) for name, total in totals.items()}

    def keep(self, trainer: Any) -> None:
        """Save the sums since the last log in the state of a checkpoint; all processes must call it.

        The next log of a resumed training then covers all steps since the last log.
        """
        trainer.state.stateful_callbacks[_LOSSES] = {
            "since": trainer._globalstep_last_logged,
            "loss": self.accelerator.gather(trainer._tr_loss).mean().item(),
            "totals": self._totals() if self.sums else {},
        }

    def restore(self, trainer: Any) -> None:
        """Restore the sums from the state of a checkpoint if training resumes; otherwise begin with none."""
        self.sums = {}
        if kept := trainer.state.stateful_callbacks.get(_LOSSES):
            trainer._globalstep_last_logged = kept["since"]
            trainer._tr_loss += kept["loss"]
            trainer._total_loss_scalar = -kept["loss"]  # its mean, train_loss, covers the steps of this session only
            share, device = float(self.accelerator.is_main_process), self.accelerator.device
            self.sums = {
                name: torch.tensor(total * share, dtype=_sum_dtype(device), device=device)
                for name, total in kept["totals"].items()
            }

    def _totals(self) -> dict[str, float]:
        return {name: total.item() for name, total in self.accelerator.reduce(self.sums, reduction="sum").items()}


def _sum_dtype(device: torch.device) -> torch.dtype:
    """float64 if the device has it, as sums may run over a whole epoch."""
    return torch.float32 if device.type == "mps" else torch.float64


class Clock(TrainerCallback):
    """Measures training time over all sessions of an interrupted training.

    Attributes:
        in_logs: Whether each log includes the time so far; otherwise only the last does.
    """

    def __init__(self) -> None:
        self.in_logs = False
        self.before = 0.0
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = state.stateful_callbacks.get(_TIME, {}).get("seconds", 0.0)
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.log_history and self.started and (self.in_logs or "train_runtime" in state.log_history[-1]):
            state.log_history[-1]["elapsed_seconds"] = self.seconds

    def keep(self, state: TrainerState) -> None:
        """Save the time so far in the state of a checkpoint."""
        state.stateful_callbacks[_TIME] = {"seconds": self.seconds}

    @property
    def seconds(self) -> float:
        """Time since the training began, over all sessions."""
        return round(self.before + time.perf_counter() - self.started, 3)

    @staticmethod
    def summary(state: TrainerState, num_images: int) -> dict[str, float] | None:
        """Time and speed of the training itself, without evaluations; `None` if there was none."""
        ends = [i for i, entry in enumerate(state.log_history) if {"train_runtime", "elapsed_seconds"} <= {*entry}]
        if not ends:
            return None
        *before, end = state.log_history[: ends[-1] + 1]
        evaluating = sum(entry.get("eval_runtime", 0.0) for entry in before)
        return summarize_training(state, max(end["elapsed_seconds"] - evaluating, 1e-9), num_images)


class Beginning(TrainerCallback):
    """Reports the beginning of training, when the state of a checkpoint has been loaded.

    Args:
        begin_training: Called before the first step.
    """

    def __init__(self, begin_training: Callable[[], None]):
        self.begin_training = begin_training

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin_training()


class SaveAfterEpoch(TrainerCallback):
    """Delays the checkpoint of an epoch's last step until it includes the epoch's log and evaluation.

    `Trainer` saves it first; a training killed in between would resume without them.
    """

    def __init__(self) -> None:
        self.is_due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save and (control.should_training_stop or state.epoch == int(state.epoch)):
            self.is_due, control.should_save = True, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self.is_due
        self.is_due = False


class PassCounter(TrainerCallback):
    """Counts the passes over a training set without length by its examples, instead of `Trainer`'s epochs.

    Args:
        steps_in_pass: Returns the number of steps in a pass; `None` if `Trainer` counts epochs.
        is_endless: Whether the whole training is a single epoch for `Trainer`. A pass then ends like an epoch: with
            what `logging_strategy`, `eval_strategy` and `save_strategy` say.
    """

    def __init__(self, steps_in_pass: Callable[[], float | None], is_endless: bool):
        self.steps_in_pass, self.is_endless = steps_in_pass, is_endless

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if steps := self.steps_in_pass():
            state.num_train_epochs = math.ceil(state.max_steps / steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (steps := self.steps_in_pass()):
            return
        before, state.epoch = (state.global_step - 1) / steps, state.global_step / steps
        if self.is_endless and int(before) < int(state.epoch) and state.global_step < state.max_steps:
            DefaultFlowCallback().on_epoch_end(args, state, control)
