"""Statistics over methods × seeds, from the `results.json` of their runs, without models or data sets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from .config import BATCH_CUT, METHOD_OPTIONS, BKDConfig, method_defaults
from .errors import InputError
from .methods import METHODS
from .metrics import groups_of
from .options import ABOUT_TEACHER, WITHOUT_INFLUENCE, DataArguments, ModelArguments, options_with
from .results import (
    RESULTS_NAME,
    adjusts_itself,
    effective_batch_size,
    load_results,
    recorded_defaults,
    training_options,
)
from .run_folder import RUN_NAME, caches_in_use

#: Columns of the tables, and their keys in `long_tail_metrics`.
METRICS = {
    "overall": "accuracy",
    "many": "many_shot_accuracy",
    "medium": "medium_shot_accuracy",
    "few": "few_shot_accuracy",
    "worst class": "worst_class_accuracy",
    "ECE": "expected_calibration_error",
}
#: Folder of teachers shared by cells; they are not cells themselves, so not in the tables.
SHARED_TEACHERS = "shared_teachers"
#: Methods that the others are compared with, seed by seed.
BASELINES = ("ce", "kd")
#: Seeds needed to call a difference clear; two that happen to agree can give an arbitrarily small interval.
ENOUGH_SEEDS = 3
_CONFIDENCE = 0.95
#: Parts of `data` that cells share. Results from Python have no fingerprints.
_SAME_DATA = (
    "fingerprint", "eval_fingerprint", "class_names", "class_counts", "eval_class_counts", "many_shot_threshold",
    "few_shot_threshold",
)  # fmt: skip
# Batch options are compared as "examples in a step".
_MAY_DIFFER = {
    *WITHOUT_INFLUENCE, *options_with("place"), *BATCH_CUT, "global_batch_size", "seed", "data_seed",
    "teacher_model_name_or_path",
}  # fmt: skip


@dataclass(frozen=True)
class Mean:
    """A mean over seeds in percent, or of differences paired by seed in percentage points.

    Attributes:
        mean: Mean.
        n: Number of seeds.
        std: Standard deviation with n − 1 in the denominator; `None` for n = 1.
        low: Lower end of the 95 % confidence interval: by Student's t, or for one seed by a bootstrap over the test
            images, if available.
        high: Upper end.
        paired: Whether it is a mean of differences, which are shown with sign and interval.
    """

    mean: float
    n: int
    std: float | None = None
    low: float | None = None
    high: float | None = None
    paired: bool = False

    @property
    def is_clear(self) -> bool:
        """Whether its interval excludes 0, with enough seeds."""
        return self.n >= ENOUGH_SEEDS and self.low is not None and self.high is not None and self.low * self.high > 0

    @classmethod
    def of(cls, values: Sequence[float], paired: bool = False) -> Mean | None:
        """Summarise values; `None` without values."""
        if len(values) < 2:
            return cls(values[0], 1, paired=paired) if values else None
        n, mean, std = len(values), float(np.mean(values)), float(np.std(values, ddof=1))
        half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, n - 1)) * std / n**0.5
        return cls(mean, n, std, mean - half, mean + half, paired)

    def __str__(self) -> str:
        if self.paired:
            if self.low is None:
                return f"{self.mean:+.1f}"
            mean = f"**{self.mean:+.1f}**" if self.is_clear else f"{self.mean:+.1f}"
            return f"{mean} [{self.low:+.1f}, {self.high:+.1f}]{'*' if self.n == 1 else ''}"
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"


class Comparison:
    """The cells of a table, by method and seed.

    Args:
        cells: The contents of `results.json` files.
        sources: The source of each, for messages.
        sort: Metric (a key of `METRICS`) by whose mean the methods are sorted, best first; by default in the order of
            `METHODS`.

    Raises:
        InputError: If there are no cells, two of the same method and seed differ, the seeds of a method were run with
            different options, or the images differ.
    """

    def __init__(self, cells: Sequence[dict[str, Any]], sources: Sequence[str] | None = None, sort: str | None = None):
        if not cells:
            raise InputError("There is no results.json to compare.")
        names = list(sources or (f"results {number}" for number in range(len(cells))))
        self.cells: dict[str, dict[int, dict[str, Any]]] = {}
        self.data = cells[0]["data"]
        self._draws: dict[tuple[str, int, str, int], np.ndarray | None] = {}
        found: dict[tuple[str, int], str] = {}
        for results, source in zip(cells, names, strict=True):
            if "method" not in results:
                raise InputError(
                    f"{source} does not tell its method: an earlier version of bkd_hf wrote it. Run it again, or "
                    "leave it out."
                )
            if any(results["data"][part] != self.data[part] for part in _SAME_DATA):
                raise InputError(
                    f"{names[0]} and {source} are of different examples (data set, ratio or split): a comparison "
                    "would tell nothing."
                )
            method, seed = results["method"], results["seed"]
            other = self.cells.setdefault(method, {}).setdefault(seed, results)
            first = found.setdefault((method, seed), source)
            if other["student"]["metrics"] != results["student"]["metrics"]:
                raise InputError(
                    f"{first} and {source} are both {method} with seed {seed}, with different results: keep one of "
                    "them."
                )
        for method, seeds in self.cells.items():
            if differing := _differing_options(list(seeds.values())):
                told = "; ".join(f"`{name}` is {' or '.join(values)}" for name, values in differing.items())
                raise InputError(
                    f"The seeds of {method} were not run with the same options, so they have no common mean: "
                    f"{told}. Leave out what does not belong there."
                )
        order = {name: number for number, name in enumerate(METHODS)}
        self.methods = sorted(self.cells, key=lambda name: (order.get(name.partition(" ")[0], len(order)), name))
        if sort is not None:
            means = {method: self.estimate(method, sort) for method in self.methods}
            sign = 1 if sort == "ECE" else -1
            self.methods.sort(key=lambda method: (means[method] is None, sign * getattr(means[method], "mean", 0.0)))
        #: Differing options and their values, except those that define the methods.
        self.differing_options = _differing_options(cells, {"method of the teacher", *METHOD_OPTIONS})

    def estimate(self, method: str, metric: str, post_hoc: bool = False) -> Mean | None:
        """Mean and spread of a metric (a key of `METRICS`) over the seeds of a method; `None` if it has none."""
        return Mean.of(list(self.values(method, metric, post_hoc).values()))

    def difference(self, method: str, baseline: str, metric: str) -> Mean | None:
        """Difference of a metric (a key of `METRICS`) to a baseline, over the seeds that both have.

        For one seed, the interval is a bootstrap over the test images (see [`resampled`]): it shows the variation over
        images, not over seeds.
        """
        values, others = self.values(method, metric), self.values(baseline, metric)
        seeds = sorted(values.keys() & others.keys())
        mean = Mean.of([values[seed] - others[seed] for seed in seeds], paired=True)
        if mean is None or len(seeds) > 1:
            return mean
        a, b = (self._resampled(name, seeds[0], metric, side) for side, name in enumerate((method, baseline)))
        if a is None or b is None:
            return mean
        tails = (1 - _CONFIDENCE) / 2
        low, high = np.quantile(100 * (a - b), [tails, 1 - tails]).tolist()
        return dataclasses.replace(mean, low=low, high=high)

    def _resampled(self, method: str, seed: int, metric: str, side: int) -> np.ndarray | None:
        """Samples of [`resampled`] for one side of a difference; cached, as tables and files need the same."""
        key = method, seed, metric, side
        if key not in self._draws:
            self._draws[key] = resampled(self.cells[method][seed], METRICS[metric], side)
        return self._draws[key]

    def shown_metrics(self) -> list[str]:
        """Metrics (keys of `METRICS`) that any cell has; without few-shot classes, their column is missing."""
        return [name for name in METRICS if any(self.estimate(method, name) for method in self.methods)]

    def num_seeds(self, method: str) -> int:
        """Number of seeds of a method."""
        return len(self.cells[method])

    def adjusts_itself(self, method: str) -> bool:
        """Whether a method corrects for the class frequencies while training (see `is_balanced_by`)."""
        return adjusts_itself(next(iter(self.cells[method].values())))

    def values(self, method: str, metric: str, post_hoc: bool = False) -> dict[int, float]:
        """A metric (a key of `METRICS`) for each seed of a method, in percent."""
        values = {}
        for seed, results in self.cells.get(method, {}).items():
            metrics = results["student"].get("post_hoc_metrics" if post_hoc else "metrics") or {}
            if metrics.get(METRICS[metric]) is not None:
                values[seed] = 100 * metrics[METRICS[metric]]
        return values

    def all_cells(self) -> list[dict[str, Any]]:
        """The results of all methods and seeds."""
        return [results for seeds in self.cells.values() for results in seeds.values()]


def resampled(results: dict[str, Any], key: str, seed: int = 0, repetitions: int = 2000) -> np.ndarray | None:
    """Return a metric of a student on test sets resampled from the test images, class by class, as fractions.

    The number of correct images in a class of n images is then binomial(n, accuracy of the class), whose deviations
    are scaled by √(n/(n − 1)), as the accuracy is an estimate itself. A single image says nothing about its class: all
    such classes have their mean accuracy. Two students are resampled independently, as the results do not say which
    images each is right about. As both tend to be right about the same images, the interval of their difference is
    rather too wide.

    Args:
        results: The content of `results.json`.
        key: Key in `long_tail_metrics`; the result is `None` if it is not an accuracy.
        seed: Seed of the draws.
        repetitions: Number of test sets.
    """
    data, rates = results["data"], results["student"]["metrics"].get("per_class_accuracy")
    images = np.asarray(data["eval_class_counts"])
    members = groups_of(data).get(key.removesuffix("_accuracy"), np.full(len(images), key == "accuracy")) & (
        images > 0
    )
    if rates is None or not members.any():
        return None
    generator, n, p = np.random.default_rng(seed), images[members], np.array(rates, dtype=float)[members].clip(0, 1)
    if (single := n == 1).any():
        p[single] = p[single].mean()
    scale = np.sqrt(n / np.maximum(n - 1, 1))
    right = n * p + scale * (np.array([generator.binomial(n, p) for _ in range(repetitions)]) - n * p)
    return right.sum(axis=1) / n.sum() if key == "accuracy" else (right / n).mean(axis=1)


def load_comparison(folders: Iterable[str | os.PathLike[str]], sort: str | None = None) -> Comparison:
    """Read every `results.json` in and below some folders, but those of teachers; `sort` as in [`Comparison`].

    Raises:
        InputError: As [`Comparison`] and [`load_results`].
    """
    paths: dict[Path, None] = {}  # without duplicates
    for folder in map(Path, folders):
        found = [folder] if folder.is_file() else sorted(folder.rglob(RESULTS_NAME))
        if not found:
            raise InputError(f"There is no {RESULTS_NAME} in {folder} or below it.")
        # The teacher that a run trained is no cell, unless its folder is named.
        begun = [] if folder.is_file() else folder.rglob(RUN_NAME)
        runs = {path.parent for path in (*found, *begun)}
        own = {run / "teacher" / RESULTS_NAME for run in runs}
        cells = [path for path in found if SHARED_TEACHERS not in path.relative_to(folder).parts and path not in own]
        paths |= dict.fromkeys(Path(os.path.realpath(path)) for path in cells)
    return Comparison([load_results(path) for path in paths], [str(path) for path in paths], sort)


def _differing_options(cells: Sequence[dict[str, Any]], may_differ: Iterable[str] = ()) -> dict[str, list[str]]:
    """Return the options that differ between cells, and their values, e.g. {"num_train_epochs": ["3", "30"]}.

    An option that is not recorded, as it was private or did not exist yet, has the default of its method. Without a
    teacher, options about it match any value.
    """
    defaults = recorded_defaults(ModelArguments) | recorded_defaults(DataArguments) | recorded_defaults(BKDConfig)
    parts = [results["options"].get(part, {}) for results in cells for part in ("teacher_model", "teacher_training")]
    of_teachers = set().union(*parts)
    of_teachers -= {*METHOD_OPTIONS, *_MAY_DIFFER}

    def of_own_teacher(results: dict[str, Any]) -> dict[str, Any]:
        if "training" not in (results.get("teacher") or {}):
            return {f"teacher_{name}": ... for name in of_teachers}
        own = results["options"].get("teacher_model", {})
        options = {**defaults, **results["options"]["model"], **training_options(results, "teacher"), **own}
        return {f"teacher_{name}": options.get(name) for name in of_teachers}

    told = [
        method_defaults(results["options"]["training"].get("method", "bkd"))
        | {**results["options"]["model"], **results["options"]["data"], **results["options"]["training"]}
        | {"method of the teacher": (results.get("teacher") or {}).get("method")}
        | {"examples in a step": effective_batch_size(results)}
        | _settled_prior(results["options"]["training"])
        | caches_in_use(results["options"]["training"])
        | of_own_teacher(results)
        | ({} if results.get("teacher") else dict.fromkeys(ABOUT_TEACHER, ...))
        for results in cells
    ]
    found = {}
    for name in sorted(set().union(*told) - {*may_differ} - _MAY_DIFFER):
        given = [options.get(name, defaults.get(name)) for options in told]
        values = sorted({_shown(value) for value in given if value is not ...})
        if len(values) > 1:
            found[name] = values
    return found


def _shown(value: Any) -> str:
    """A value as text; equal numbers have equal texts."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _settled_prior(training: dict[str, Any]) -> dict[str, str]:
    """Return what `auto` stood for: `teacher` if the run recorded that it measured the prior, otherwise the counts."""
    return {"distillation_prior": "counts"} if training.get("distillation_prior") == "auto" else {}
