"""What a run prints."""

from __future__ import annotations

import sys
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .tasks import task_of
from .text import difference, one_line, printable
from .verdict import judge

_TABLE_ROWS = (
    ("overall", "accuracy"),
    ("many-shot", "many_shot_accuracy"),
    ("medium-shot", "medium_shot_accuracy"),
    ("few-shot", "few_shot_accuracy"),
    ("worst class", "worst_class_accuracy"),
)


class Announcer:
    """Speaks for the main process."""

    def __init__(self) -> None:
        self._console = Console(
            file=sys.stdout, quiet=not PartialState().is_main_process, highlight=False, emoji=False, soft_wrap=True
        )

    def __call__(self, message: str) -> None:
        """Print a line."""
        self._console.print(printable(message), markup=False)

    def stage(self, name: str) -> None:
        """Print a headline."""
        self._console.rule(f"[bold]{name}", align="left")

    def table(self, results: dict[str, Any]) -> None:
        """Print teacher | student | difference in percent, a single model alone, and the verdict."""
        data, models = results["data"], {name: results[name] for name in ("teacher", "student") if results.get(name)}
        title = f"{one_line(data['name'], 80)}, accuracy in % ({data['num_eval_images']:,} {task_of(data).name}s)"
        table = Table(title=Text(title))
        for name in ("", *models, "difference") if len(models) == 2 else ("", "this model"):
            table.add_column(name, justify="right" if name else "left")
        for title, key in _TABLE_ROWS:
            values = [model["metrics"][key] for model in models.values() if key in model["metrics"]]
            differences = [f"{difference(*values):+.1f}"] if len(values) == 2 else []
            if values:
                table.add_row(title, *(f"{100 * value:.1f}" for value in values), *differences)
        self._console.print(table)
        verdict = judge(results)
        for sentence in (verdict.sentence, *verdict.warnings):
            if sentence:
                bad = sentence in verdict.warnings
                self._console.print(
                    printable(f"WARNING: {sentence}" if bad else sentence),
                    style="bold red" if bad else "yellow" if verdict.is_better is False else None,
                    markup=False,
                )
        model = next(iter(models.values()))
        if post_hoc := model.get("post_hoc_metrics"):
            shown = (f"{title} {100 * post_hoc[key]:.1f}" for title, key in _TABLE_ROWS if key in post_hoc)
            name = "teacher" if len(models) == 2 else "model"
            self(f"The {name} after post-hoc logit adjustment (τ = {post_hoc['tau']:g}): {', '.join(shown)}")
