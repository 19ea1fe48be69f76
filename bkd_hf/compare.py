"""Writes the tables and figures of a comparison."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .comparison import BASELINES, ENOUGH_SEEDS, METRICS, Comparison
from .comparison_plots import save_comparison_plots
from .files import replacing, write_text
from .methods import RECOMMENDED
from .metrics import FEW_TEST_IMAGES
from .tasks import task_of
from .text import code, markdown, spreadsheet

_ONE_SEED = (
    "\\* One seed: the interval is of a bootstrap over the test {task}s, each model's drawn apart. It tells what "
    "other test {task}s would give, not what other seeds would, which often differ by more."
)


def save_comparison(comparison: Comparison, folder: str | os.PathLike[str], notes: Sequence[str] = ()) -> list[Path]:
    """Write `comparison.md`, `comparison.csv`, `cells.csv` and the figures.

    Args:
        comparison: What to write.
        folder: Output folder; created if needed.
        notes: Lines for the top of the Markdown, e.g. cells that failed, or the command.

    Returns:
        The paths written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = save_comparison_plots(comparison, folder)
    paths = [folder / name for name in ("comparison.md", "comparison.csv", "cells.csv")]
    write_text(paths[0], to_markdown(comparison, [path.name for path in figures], notes))
    _write_csv(paths[1], _summary_rows(comparison))
    _write_csv(paths[2], _cell_rows(comparison))
    return [*paths, *figures]


def to_markdown(comparison: Comparison, figures: Sequence[str] = (), notes: Sequence[str] = ()) -> str:
    """Return the tables as Markdown."""
    data, shown, methods = comparison.data, comparison.shown_metrics(), comparison.methods
    counts, head, task = data["class_counts"], ["method", "n", *shown], task_of(data).name
    if comparison.differing_options:
        differing = [f"{code(k)} is {markdown(' or '.join(v))}" for k, v in comparison.differing_options.items()]
        notes = [f"**Not all methods were run with the same options**: {'; '.join(differing)}.", *notes]

    def means(methods: Sequence[str], post_hoc: bool = False) -> str:
        rows = [
            [
                markdown(method),
                comparison.num_seeds(method),
                *(comparison.estimate(method, name, post_hoc) for name in shown),
            ]
            for method in methods
        ]
        return _table(head, rows)

    parts = [
        f"# Methods compared on {markdown(data['name'])}",
        f"{data['num_train_images']:,} training {task}s of {len(counts)} classes, {max(counts):,} to {min(counts):,} "
        f"each; {data['num_eval_images']:,} test {task}s. {_how(comparison)}",
        *_few_tested(data),
        *notes,
        f"Accuracy and expected calibration error (ECE) in %, {_which_epoch(comparison)}; mean ± standard deviation "
        "(n − 1) over n seeds.",
        means(methods),
    ]
    for baseline in BASELINES:
        rows, is_resampled = [], False
        for method in [method for method in methods if method != baseline and baseline in methods]:
            differences = [comparison.difference(method, baseline, name) for name in shown]
            n = getattr(comparison.difference(method, baseline, "overall"), "n", 0)
            rows.append([markdown(method), n, *differences])
            is_resampled |= n == 1 and any(each is not None and each.low is not None for each in differences)
        if any(n for _, n, *_ in rows):
            parts += [
                f"## Differences to `{baseline}`",
                "Percentage points, paired by seed; in brackets the 95 % confidence interval (Student's t, n ≥ 2). "
                f"Bold: the interval leaves out 0, and n ≥ {ENOUGH_SEEDS}.",
                *([_ONE_SEED.format(task=task)] if is_resampled else []),
                _table(head, rows),
            ]
    if "ce" not in methods and (changed := [method for method in methods if method.startswith("ce (")]):
        parts.append(f"There is no plain `ce` to compare with: {code(changed[0])} has the options of all cells.")
    adjusted = [method for method in methods if not comparison.adjusts_itself(method)]
    adjusted = [method for method in adjusted if comparison.estimate(method, "overall", post_hoc=True)]
    if adjusted:
        students = [results["student"] for results in comparison.all_cells()]
        taus = {student["post_hoc_metrics"]["tau"] for student in students if student.get("post_hoc_metrics")}
        parts += [
            f"## After post-hoc logit adjustment (τ = {', '.join(f'{tau:g}' for tau in sorted(taus))})",
            "The same models; the logarithm of the training frequencies is taken off their logits. Methods that "
            "correct for the frequencies while training would be corrected twice, and are left out (cells.csv has "
            "them).",
            means(adjusted, post_hoc=True),
        ]
    if verdict := _against_what_is_free(comparison):
        parts += ["## Against what takes no training beyond `ce`", verdict]
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures]
    return "\n\n".join(parts) + "\n"


def _few_tested(data: dict[str, Any]) -> list[str]:
    tested = [number for number in data.get("eval_class_counts", []) if number]
    barely = sum(number < FEW_TEST_IMAGES for number in tested)
    if not barely:
        return []
    name = task_of(data).name
    have = "class has" if barely == 1 else "classes have"
    return [
        f"**{barely:,} of {len(tested):,} {have} fewer than {FEW_TEST_IMAGES} test {name}s**, down to {min(tested)}: "
        f"one {name} moves the accuracy of a class by up to {100 / min(tested):.0f} points, and with it the worst "
        "class and the groups. No interval over seeds tells of that."
    ]


def _which_epoch(comparison: Comparison) -> str:
    chosen = [cell["options"]["training"].get("load_best_model_at_end") for cell in comparison.all_cells()]
    if any(chosen):
        return "of the checkpoint that was best on these test examples, which flatters the numbers"
    return "last epoch, never the best on the test set"


def _against_what_is_free(comparison: Comparison) -> str | None:
    """Name the methods that are not better overall than `ce`, before or after adjustment; `None` without `ce`."""
    others = [method for method in comparison.methods if method != "ce"]
    if not others or "ce" not in comparison.methods:
        return None
    plain, adjusted = (comparison.values("ce", "overall", post_hoc) for post_hoc in (False, True))
    compared = [method for method in others if comparison.values(method, "overall").keys() & plain.keys()]
    if not compared:
        return "No method was run with a seed of `ce`."
    beaten = []
    for method in compared:
        values = comparison.values(method, "overall")
        free: list[tuple[float, float, str]] = []  # mean of ce, mean of the method over the same seeds, name
        for name, theirs in (("`ce`", plain), ("`ce` after post-hoc adjustment", adjusted)):
            if seeds := values.keys() & theirs.keys():
                best, mean = (float(np.mean([each[seed] for seed in seeds])) for each in (theirs, values))
                free.append((best, mean, name))
        best, mean, name = max(free, key=lambda each: each[0])
        if mean <= best:
            beaten.append(f"{code(method)} ({mean:.1f} against {best:.1f} of {name})")
    if not beaten:
        subject = "Every method" if compared == others else ", ".join(map(code, compared))
        are = "is" if compared == others or len(compared) == 1 else "are"
        what = "as it is and after post-hoc adjustment" if adjusted else "which was not adjusted"
        return (
            f"{subject} {are} better overall than `ce`, {what}, in the mean over the same seeds; an interval that "
            "contains 0 may be chance."
        )
    return (
        "**Not better overall than what needs no training beyond `ce`**, over the same seeds: "
        f"{', '.join(beaten)}. Longer training, or --method {RECOMMENDED}, may help."
    )


def _how(comparison: Comparison) -> str:
    """Model, length, precision, hardware and versions, as far as all cells share them."""

    def shared(*keys: str) -> str:
        found = set()
        for results in comparison.all_cells():
            for key in keys:
                results = results.get(key, {})
            found.add(f"{results:g}" if isinstance(results, float) else markdown(results or "unknown"))
        return " / ".join(sorted(found))

    versions = ", ".join(f"{name} {shared('versions', name)}" for name in ("torch", "transformers", "accelerate"))
    return (
        f"Student {shared('student', 'model')}, {shared('student', 'training', 'epochs')} epochs, "
        f"{shared('hardware', 'precision')}, on {shared('hardware', 'device')} "
        f"(processes: {shared('hardware', 'num_processes')}, CPU threads: {shared('hardware', 'cpu_threads')}); "
        f"{versions}."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join("–" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def _summary_rows(comparison: Comparison) -> list[dict[str, Any]]:
    rows = []
    for method in comparison.methods:
        for metric in comparison.shown_metrics():
            row: dict[str, Any] = {"method": method, "metric": metric}
            for prefix, post_hoc in (("", False), ("post_hoc_", True)):
                estimate = comparison.estimate(method, metric, post_hoc)
                row |= {f"{prefix}{part}": getattr(estimate, part, None) for part in ("mean", "std")}
            row["n"] = getattr(comparison.estimate(method, metric), "n", 0)
            for baseline in BASELINES:
                difference = None if method == baseline else comparison.difference(method, baseline, metric)
                for part in ("mean", "low", "high", "n"):
                    row[f"difference_to_{baseline}_{part}"] = getattr(difference, part, None)
            rows.append(row)
    return rows


def _cell_rows(comparison: Comparison) -> list[dict[str, Any]]:
    rows = []
    for method in comparison.methods:
        for seed, results in sorted(comparison.cells[method].items()):
            student = results["student"]
            row: dict[str, Any] = {"method": method, "seed": seed}
            for prefix, metrics in (("", student["metrics"]), ("post-hoc ", student.get("post_hoc_metrics") or {})):
                row |= {f"{prefix}{name}": 100 * metrics.get(key, math.nan) for name, key in METRICS.items()}
            rows.append(row | {"training seconds": student.get("training", {}).get("seconds")})
    return rows


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    def rounded(value: Any) -> Any:
        return ("" if math.isnan(value) else round(value, 4)) if isinstance(value, float) else value

    with replacing(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({name: spreadsheet(rounded(value)) for name, value in row.items()} for row in rows)
