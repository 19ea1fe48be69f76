"""What a run prints and measures during training: its duration, and what it stores on disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState

from .config import BKDConfig
from .errors import InputError
from .targets import describe_targets, why_collapsed
from .text import duration
from .trainer import BKDTrainer


class TellOfCaches(TrainerCallback):
    """Prints the size of the caches of the teacher's logits and of features, before they are filled."""

    def __init__(self, trainer: BKDTrainer, say: Callable[[str], Any]):
        self.trainer, self.say = trainer, say

    def on_train_begin(self, args: BKDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        for name, cache in (("Teacher", self.trainer.teacher_cache), ("Feature", self.trainer.feature_cache)):
            if cache is not None:
                self.say(f"{name} cache: {cache}.")


class TellOfTime(TrainerCallback):
    """Prints the estimated duration of a training after its first steps, if it is more than a minute.

    Args:
        say: Called with a sentence.
    """

    FIRST, LAST = 3, 13  # time is measured between these steps; the first ones also load and compile

    def __init__(self, say: Callable[[str], Any]):
        self.say = say
        self.num_steps, self.started = 0, 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Reset the measurement."""
        self.num_steps = 0

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Measure the time."""
        self.num_steps += 1
        if self.num_steps == self.FIRST:
            self.started = time.perf_counter()
        if self.num_steps == self.LAST:
            of_step = (time.perf_counter() - self.started) / (self.LAST - self.FIRST)
            of_epoch = of_step * state.max_steps / max(1, state.num_train_epochs)
            left = of_step * (state.max_steps - state.global_step)
            if left > 60:
                epoch = f"An epoch takes about {duration(of_epoch)}, all" if state.num_train_epochs < 1e9 else "All"
                self.say(f"{epoch} of the training {duration(left)} more.")


#: What is logged, and its format, by the title of its column; accuracies are in %.
_COLUMNS = {
    "    epoch": ("epoch", ""),
    "  loss": ("loss", ".3f"),
    "test loss": ("eval_loss", ".3f"),
    "accuracy %": ("eval_accuracy", ".1f"),
    "  many": ("eval_many_shot_accuracy", ".1f"),
    "medium": ("eval_medium_shot_accuracy", ".1f"),
    "   few": ("eval_few_shot_accuracy", ".1f"),
    " worst": ("eval_worst_class_accuracy", ".1f"),
}


class ProgressTable(TrainerCallback):
    """Prints a table line for each evaluation, or for each log without one, unless `log_level` is higher.

    Args:
        say: Called with a line.
    """

    def __init__(self, say: Callable[[str], Any]):
        self.say = say
        self.known: dict[str, Any] = {}  # since the last line
        self.titles: list[str] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Print the line, and the titles wherever there is a new one."""
        if args.log_level in ("warning", "error", "critical") or not {"loss", "eval_loss"} & {*logs}:
            return
        self.known |= {name: 100 * value if name.endswith("_accuracy") else value for name, value in logs.items()}
        if "loss" in logs and control.should_evaluate:
            return  # will be in the same line
        known, self.known = self.known | {"epoch": f"{logs['epoch']:.4g}/{state.num_train_epochs}"}, {}
        titles = [title for title, (name, _) in _COLUMNS.items() if name in known or title in self.titles]
        cells = ((title, *_COLUMNS[title]) for title in titles)
        line = " ".join(f"{format(known[name], style) if name in known else '':>{len(t)}}" for t, name, style in cells)
        with tqdm.external_write_mode():  # keeps a progress bar intact
            for text in [line] if titles == self.titles else [" ".join(titles), line]:
                self.say(text)
        self.titles = titles


class _Bar(ProgressCallback):
    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Leave the log to the table."""


def show_progress(trainer: BKDTrainer, say: Callable[[str], Any]) -> None:
    """Let a trainer print a table instead of its logs, a bar on terminals, cache sizes, and its duration."""
    has_bar = trainer.pop_callback(ProgressCallback) is not None
    if has_bar or trainer.pop_callback(PrinterCallback) is not None:
        trainer.add_callback(ProgressTable(say))
    if has_bar and sys.stderr.isatty():
        trainer.add_callback(_Bar())
    trainer.add_callback(TellOfCaches(trainer, say))
    trainer.add_callback(TellOfTime(say))


def tell_of_targets(
    trainer: BKDTrainer, class_names: list[str], say: Callable[[str], Any], are_forced: bool
) -> dict[str, Any] | None:
    """Print and return the target statistics; reject targets that no longer match the labels, unless forced."""
    if trainer.student_started_from_teacher:
        say("The student starts from the teacher's weights (--student_init).")
    statistics = trainer.look_at_targets()
    if statistics is None:
        return None
    say(describe_targets(statistics, class_names))
    prior, counts = statistics.get("prior_in_teacher", 1.0), trainer.class_counts
    is_long_tailed = counts is not None and max(counts) > 2 * min(counts)
    may_be_balanced = getattr(trainer.teacher_model, "is_balanced", None) is not False
    if prior < 0.5 and is_long_tailed and may_be_balanced and trainer.args.distillation_prior != "teacher":
        say(
            f"WARNING: The teacher's confusions show the class frequencies only to a share of κ = {prior:.2f}, but "
            "the targets are corrected for all of them. If it was trained on balanced data, or by a method that "
            "balances the classes, use --distillation_prior teacher, which corrects for what is left; otherwise it "
            "has learned little yet."
        )
    if collapse := why_collapsed(statistics, class_names):
        # At p = 1/T the cause is not the re-weighting but the teacher, as after the first steps of a training.
        over_corrects = statistics.get("power", 0.0) > 1 / trainer.args.temperature
        wrong, way_out = f"The distillation targets collapse: {collapse}.", "a teacher that was trained longer"
        if over_corrects:
            way_out = f"--class_balance_power auto, a lower --temperature, or {way_out}"
        if over_corrects and not are_forced:
            raise InputError(
                f"{wrong} A student would learn that. In another --output_dir, try {way_out}; --force_distillation "
                "uses these targets all the same."
            )
        say(f"WARNING: {wrong} Try {way_out}.")
    return statistics
