"""A table of methods × seeds from the `results.json` of their runs; no model and no data set is needed."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from .errors import InputError
from .objective import METHODS, RECOMMENDED
from .plots import save_comparison_plots
from .results import RESULTS_NAME, adjusts_itself, effective_batch_size, load_results

#: Columns of the tables, and their keys in `long_tail_metrics`.
METRICS = {
    "overall": "accuracy",
    "many": "many_shot_accuracy",
    "medium": "medium_shot_accuracy",
    "few": "few_shot_accuracy",
    "worst class": "worst_class_accuracy",
    "ECE": "expected_calibration_error",
}
#: Methods that the others are compared with, seed by seed.
BASELINES = ("ce", "kd")
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, in percent.

    Attributes:
        mean: Mean.
        std: Standard deviation with n − 1 in the denominator; `None` for n = 1.
        n: Number of seeds.
    """

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"


@dataclass(frozen=True)
class Difference:
    """A mean of differences to a baseline, paired by seed, in percentage points.

    Attributes:
        mean: Mean.
        low: Lower end of the 95 % confidence interval by Student's t; `None` for n = 1.
        high: Upper end.
        n: Number of seeds that both have.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:+.1f}, {self.high:+.1f}]"
        return f"{self.mean:+.1f}{interval}"


class Comparison:
    """The cells of a table, by method and seed.

    Args:
        cells: The contents of `results.json` files.
        sources: Where each is from, for messages.

    Raises:
        InputError: If there are none, two of the same method and seed differ, the seeds of a method were run with
            different options, or they are of different images.
    """

    def __init__(self, cells: Sequence[dict[str, Any]], sources: Sequence[str] | None = None):
        if not cells:
            raise InputError("There is no results.json to compare.")
        names = list(sources or (f"results {number}" for number in range(len(cells))))
        self.cells: dict[str, dict[int, dict[str, Any]]] = {}
        found: dict[tuple[str, int], str] = {}
        self.data = cells[0]["data"]
        for results, source in zip(cells, names, strict=True):
            if "method" not in results:
                raise InputError(
                    f"{source} does not tell its method: an earlier version of bkd_hf wrote it. Run it again, or "
                    "leave it out."
                )
            key = (results["method"], results["seed"])
            other = self.cells.get(key[0], {}).get(key[1])
            if other is not None and other["student"]["metrics"] != results["student"]["metrics"]:
                raise InputError(
                    f"{found[key]} and {source} are both {key[0]} with seed {key[1]}, with different results: keep "
                    "one of them."
                )
            found.setdefault(key, source)
            self.cells.setdefault(key[0], {})[key[1]] = results
        for results, source in zip(cells, names, strict=True):
            if any(results["data"][part] != self.data[part] for part in ("fingerprint", "eval_fingerprint")):
                raise InputError(
                    f"{names[0]} and {source} are of different images (data set, ratio or split): a comparison would "
                    "tell nothing."
                )
        for method, seeds in self.cells.items():
            differing = _differing_options(list(seeds.values()), within_a_method=True)
            if differing:
                raise InputError(
                    f"The seeds of {method} were not run with the same options, so they have no common mean: "
                    f"{_listed(differing)}. Leave out what does not belong there."
                )
        order = {name: number for number, name in enumerate(METHODS)}
        self.methods = sorted(self.cells, key=lambda name: (order.get(name.partition(" ")[0], len(order)), name))
        self.differing_options = _differing_options(cells)

    def estimate(self, method: str, metric: str, post_hoc: bool = False) -> Estimate | None:
        """Mean and spread of a metric (a key of `METRICS`) over the seeds of a method; `None` if it has none."""
        values = list(self.values(method, metric, post_hoc).values())
        if not values:
            return None
        return Estimate(
            float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values)
        )

    def difference(self, method: str, baseline: str, metric: str) -> Difference | None:
        """Difference of a metric (a key of `METRICS`) to a baseline, over the seeds that both have."""
        values, others = self.values(method, metric), self.values(baseline, metric)
        differences = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
        if not differences:
            return None
        n, mean = len(differences), float(np.mean(differences))
        if n == 1:
            return Difference(mean, None, None, n)
        half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, n - 1) * np.std(differences, ddof=1) / math.sqrt(n))
        return Difference(mean, mean - half, mean + half, n)

    def shown_metrics(self) -> list[str]:
        """Metrics (keys of `METRICS`) that any cell has: without few-shot classes there is no such column."""
        return [name for name in METRICS if any(self.estimate(method, name) for method in self.methods)]

    def num_seeds(self, method: str) -> int:
        """How many seeds a method has."""
        return len(self.cells[method])

    def adjusts_itself(self, method: str) -> bool:
        """Whether a method corrects for the class frequencies while training, by loss, weights or sampler."""
        return adjusts_itself(next(iter(self.cells[method].values())))

    def baselines(self) -> list[str]:
        """The baselines that are among the methods."""
        return [name for name in BASELINES if name in self.cells]

    def values(self, method: str, metric: str, post_hoc: bool = False) -> dict[int, float]:
        """A metric (a key of `METRICS`) of each seed of a method, in percent."""
        values = {}
        for seed, results in self.cells.get(method, {}).items():
            metrics = results["student"].get("post_hoc_metrics" if post_hoc else "metrics") or {}
            if metrics.get(METRICS[metric]) is not None:
                values[seed] = 100 * metrics[METRICS[metric]]
        return values


def load_comparison(folders: Iterable[str | os.PathLike[str]]) -> Comparison:
    """Read every `results.json` in folders and the folders below them.

    Raises:
        InputError: As [`Comparison`] and [`load_results`].
    """
    paths: list[Path] = []
    for folder in map(Path, folders):
        found = [folder] if folder.is_file() else sorted(folder.rglob(RESULTS_NAME))
        if not found:
            raise InputError(f"There is no {RESULTS_NAME} in {folder} or below it.")
        paths += found
    paths = list(dict.fromkeys(path.resolve() for path in paths))
    return Comparison([load_results(path) for path in paths], [str(path) for path in paths])


def save_comparison(comparison: Comparison, folder: str | os.PathLike[str], notes: Sequence[str] = ()) -> list[Path]:
    """Write `comparison.md`, `comparison.csv`, `cells.csv` and the figures.

    Args:
        comparison: What to write.
        folder: Where to; made if it is not there.
        notes: Lines for the top of the Markdown, e.g. cells that failed, or the command.

    Returns:
        The paths written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = save_comparison_plots(comparison, folder)
    markdown = folder / "comparison.md"
    markdown.write_text(to_markdown(comparison, [path.name for path in figures], notes), encoding="utf-8")
    _write_csv(folder / "comparison.csv", _summary_rows(comparison))
    _write_csv(folder / "cells.csv", _cell_rows(comparison))
    return [markdown, folder / "comparison.csv", folder / "cells.csv", *figures]


def to_markdown(comparison: Comparison, figures: Sequence[str] = (), notes: Sequence[str] = ()) -> str:
    """Return the tables as Markdown."""
    data, shown = comparison.data, comparison.shown_metrics()
    counts = data["class_counts"]
    if comparison.differing_options:
        differing = _listed(comparison.differing_options)
        notes = [f"**Not all methods were run with the same options**: {differing}.", *notes]
    parts = [
        f"# Methods compared on {data['name']}",
        f"{data['num_train_images']:,} training images of {len(counts)} classes, {max(counts):,} to {min(counts):,} "
        f"each; {data['num_eval_images']:,} test images. {_how(comparison)}",
        *notes,
        "Accuracy and expected calibration error (ECE) in %, last epoch, never the best on the test set; mean ± "
        "standard deviation (n − 1) over n seeds.",
        _table(
            ["method", "n", *shown],
            [
                [method, comparison.num_seeds(method), *(comparison.estimate(method, metric) for metric in shown)]
                for method in comparison.methods
            ],
        ),
    ]
    for baseline in comparison.baselines():
        others = [method for method in comparison.methods if method != baseline]
        rows = [
            [
                method,
                getattr(comparison.difference(method, baseline, "overall"), "n", 0),
                *(comparison.difference(method, baseline, metric) for metric in shown),
            ]
            for method in others
        ]
        if rows:
            parts += [
                f"## Differences to `{baseline}`",
                "Percentage points, paired by seed; in brackets the 95 % confidence interval (Student's t, n ≥ 2).",
                _table(["method", "n", *shown], rows),
            ]
    adjusted = [
        [method, comparison.num_seeds(method), *(comparison.estimate(method, metric, True) for metric in shown)]
        for method in comparison.methods
        if not comparison.adjusts_itself(method) and comparison.estimate(method, "overall", post_hoc=True)
    ]
    if adjusted:
        taus = {r["student"]["post_hoc_metrics"]["tau"] for r in _all_cells(comparison) if _is_adjusted(r)}
        parts += [
            f"## After post-hoc logit adjustment (τ = {', '.join(f'{tau:g}' for tau in sorted(taus))})",
            "The same models; the logarithm of the training frequencies is taken off their logits. Methods that "
            "correct for the frequencies while training would be corrected twice, and are left out (cells.csv has "
            "them).",
            _table(["method", "n", *shown], adjusted),
        ]
    if verdict := _against_what_is_free(comparison):
        parts += ["## Against what costs nothing", verdict]
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures]
    return "\n\n".join(parts) + "\n"


def _against_what_is_free(comparison: Comparison) -> str | None:
    """Say which methods are not better overall than `ce`, as it is and after post-hoc adjustment; `None` without."""
    if "ce" not in comparison.cells:
        return None
    beaten = []
    others = [method for method in comparison.methods if method != "ce"]
    for method in others:
        values = comparison.values(method, "overall")
        free = {
            name: {
                seed: value for seed, value in comparison.values("ce", "overall", post_hoc).items() if seed in values
            }
            for name, post_hoc in (("`ce`", False), ("`ce` after post-hoc adjustment", True))
        }
        means = {name: float(np.mean(list(found.values()))) for name, found in free.items() if found}
        if not means:
            continue
        best = max(means, key=lambda name: means[name])
        mean = float(np.mean([values[seed] for seed in free[best]]))
        if mean <= means[best]:
            beaten.append(f"`{method}` ({mean:.1f} against {means[best]:.1f} of {best})")
    if not others:
        return None
    if not beaten:
        return "Every method is better overall than `ce`, as it is and after post-hoc adjustment, over the same seeds."
    return (
        "**Not better overall than what needs no training beyond `ce`**, over the same seeds: "
        f"{', '.join(beaten)}. Longer training, or --method {RECOMMENDED}, may help."
    )


# ---- Rows -----------------------------------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join("–" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def _summary_rows(comparison: Comparison) -> list[dict[str, Any]]:
    rows = []
    for method in comparison.methods:
        for metric in comparison.shown_metrics():
            row: dict[str, Any] = {"method": method, "metric": metric}
            for name, post_hoc in (("", False), ("post_hoc_", True)):
                estimate = comparison.estimate(method, metric, post_hoc)
                row |= {f"{name}mean": getattr(estimate, "mean", None), f"{name}std": getattr(estimate, "std", None)}
            row["n"] = getattr(comparison.estimate(method, metric), "n", 0)
            for baseline in BASELINES:
                difference = comparison.difference(method, baseline, metric)
                for part in ("mean", "low", "high", "n"):
                    row[f"difference_to_{baseline}_{part}"] = getattr(difference, part, None)
            rows.append(row)
    return rows


def _cell_rows(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {"method": method, "seed": seed}
        | {name: 100 * results["student"]["metrics"].get(key, math.nan) for name, key in METRICS.items()}
        | {
            f"post-hoc {name}": 100 * (results["student"].get("post_hoc_metrics") or {}).get(key, math.nan)
            for name, key in METRICS.items()
        }
        | {"training seconds": results["student"].get("training", {}).get("seconds")}
        for method in comparison.methods
        for seed, results in sorted(comparison.cells[method].items())
    ]


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({name: _rounded(value) for name, value in row.items()} for row in rows)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else round(value, 4)
    return value


def _all_cells(comparison: Comparison) -> list[dict[str, Any]]:
    return [results for seeds in comparison.cells.values() for results in seeds.values()]


def _is_adjusted(results: dict[str, Any]) -> bool:
    return bool(results["student"].get("post_hoc_metrics"))


def _how(comparison: Comparison) -> str:
    """Model, length, precision, hardware and versions, as far as all cells share them."""

    def shared(*keys: str) -> str:
        found = set()
        for results in _all_cells(comparison):
            for key in keys:
                results = results[key]
            found.add(f"{results:g}" if isinstance(results, float) else str(results))
        return " / ".join(sorted(found))

    versions = ", ".join(f"{name} {shared('versions', name)}" for name in ("torch", "transformers", "accelerate"))
    return (
        f"Student {shared('student', 'model')}, {shared('student', 'training', 'epochs')} epochs, "
        f"{shared('hardware', 'precision')}, on {shared('hardware', 'device')} "
        f"(processes: {shared('hardware', 'num_processes')}, CPU threads: {shared('hardware', 'cpu_threads')}); "
        f"{versions}."
    )


def _differing_options(cells: Sequence[dict[str, Any]], within_a_method: bool = False) -> dict[str, list[str]]:
    """Options that are not the same in all cells, and their values; across methods, beside those of the methods.

    One that is not recorded, because it is not told or was not there yet, has its default.
    """
    from .config import METHOD_OPTIONS, BKDConfig
    from .options import WITHOUT_INFLUENCE, DataArguments, ModelArguments  # loads transformers

    may_differ = {*WITHOUT_INFLUENCE, "seed", "data_seed", "teacher_model_name_or_path"}
    if not within_a_method:
        may_differ |= {*METHOD_OPTIONS, "method of the teacher"}
    values: dict[str, set[str]] = {}
    groups = [
        {
            **results["options"]["model"],
            **results["options"]["data"],
            **results["options"]["training"],
            "method of the teacher": (results.get("teacher") or {}).get("method"),
            "images in a step": effective_batch_size(results),
        }
        for results in cells
    ]
    told = [f for kind in (ModelArguments, DataArguments, BKDConfig) for f in dataclasses.fields(kind)]
    defaults = {f.name: getattr(f.default, "value", f.default) for f in told}
    for name in sorted({name for options in groups for name in options} - may_differ):
        values[name] = {str(options.get(name, defaults.get(name))) for options in groups}
    return {name: sorted(found) for name, found in values.items() if len(found) > 1}


def _listed(differing: dict[str, list[str]]) -> str:
    return "; ".join(f"`{name}` is {' or '.join(values)}" for name, values in differing.items())
