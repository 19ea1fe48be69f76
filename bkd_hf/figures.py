"""The look of all figures.

Colours are Okabe and Ito's, for colour-blind readers; line styles and markers repeat the distinction.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import replacing, why_broken
from .text import figure as figure_text

# `Figure` only, never pyplot or rcParams: no display, no shared state, nothing to close.

DPI = 150
WIDTH = 8.0  # inches
SMALL, TEXT, TITLE = 8, 9, 11  # points
TICK_STEPS = (1, 2, 5, 10)

BLUE, RED, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
NEUTRAL, NOT_TESTED = "#8c8c8c", "#d9d9d9"
COLOURS = {"teacher": BLUE, "student": RED}
_POINTS: dict[str, dict[str, Any]] = {
    # The teacher's ring stays visible around the student's diamond where both are equal.
    "teacher": {"marker": "o", "markersize": 7.5, "markerfacecolor": "none", "markeredgewidth": 1.4},
    "student": {"marker": "D", "markersize": 4.5},
}
GROUP_POINTS = {"many_shot": (BLUE, "o"), "medium_shot": (GREEN, "s"), "few_shot": (RED, "^")}

PERCENT: dict[str, Any] = {"ylim": (-4, 104), "yticks": range(0, 101, 20)}  # room for markers at 0 and 100


def save_figures(
    figures: Mapping[str, Callable[[], Figure]], folder: str | os.PathLike[str], only_missing: bool = False
) -> list[Path]:
    """Save figures, by file name, into a folder, which is created if needed; return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        if not only_missing or why_broken(folder / name):
            with replacing(folder / name) as path:
                figure = draw()
                if (engine := figure.get_layout_engine()) is not None:
                    engine.execute(figure)
                    figure.set_layout_engine("none")  # or `savefig` would draw everything once more, for the layout
                figure.savefig(path, format="png", dpi=DPI, facecolor="white")
    return [folder / name for name in figures]


def percent(fractions: Sequence[float | None]) -> np.ndarray:
    """Fractions in percent; `None` becomes NaN."""
    return 100 * np.array(fractions, dtype=float)


def class_accuracies(model_results: dict[str, Any]) -> np.ndarray:
    """C accuracies of a model in percent, from its section of results."""
    return percent(model_results["metrics"]["per_class_accuracy"])


def point_style(model: str) -> dict[str, Any]:
    """Style of the points of the teacher or the student."""
    return {"label": model, "color": COLOURS[model], "linestyle": "none", "zorder": 3, **_POINTS[model]}


def line_style(model: str) -> dict[str, Any]:
    """Style of the curves of the teacher or the student."""
    return point_style(model) | {"linestyle": "--" if model == "teacher" else "-", "linewidth": 1.7}


def add_title(figure: Figure, title: str, note: str | None = None) -> None:
    """Put a title above, and a note below."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=TITLE, fontweight="bold")
    if note is not None:
        figure.supxlabel(note, x=0.01, ha="left", fontsize=SMALL, color="#555555")


def set_names(axes: Axes, axis: str, positions: Sequence[int], names: list[str], width: float | None = None) -> None:
    """Label an axis with names, slanted if they do not fit side by side into `width` inches."""
    slanted = width is not None and not fit_beside(names, width)
    slant: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    set_ticks = axes.set_xticks if axis == "x" else axes.set_yticks
    set_ticks(positions, names, fontsize=SMALL, **slant)


def fit_beside(texts: list[str], width: float) -> bool:
    """Return whether small texts fit side by side into `width` inches."""
    character = 0.65 * SMALL / 72
    return all((len(text) + 1) * character <= width / len(texts) for text in texts)


def tidy(axes: Axes, grid: Literal["y", "both"] | None = "y", colour: str = "#cccccc") -> None:
    """Remove unneeded parts of a figure, and add a grid."""
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_fontsize(TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=colour, linewidth=0.6)


def of_the(model: str, results: dict[str, Any], before: str, after: str = "") -> str:
    """Name one of two models; empty for a single model, which need not be a student."""
    return f"{before}{model}{after}" if all(results.get(name) for name in COLOURS) else ""


def models_of(results: dict[str, Any]) -> list[str]:
    """Return which of teacher and student have results."""
    return [model for model in COLOURS if results.get(model)]


def largest_first(data: dict[str, Any]) -> np.ndarray:
    """Return the class numbers, sorted from the most training images to the fewest."""
    return np.argsort(-np.asarray(data["class_counts"]), kind="stable")


def names_of_classes(data: dict[str, Any]) -> list[str]:
    """Return the names of all classes, with the class number if the fonts lack characters of a name."""
    names = [figure_text(name) for name in data["class_names"]]
    return [f"{name} (class {number})" if "\ufffd" in name else name for number, name in enumerate(names)]


def titled_figure(title: str, results: dict[str, Any], height: float) -> Figure:
    """Return an empty figure titled with the data set, with the names of the models below."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    names = {model: figure_text(results[model]["model"], 45) for model in models_of(results)}
    models = "; ".join(of_the(model, results, "", ": ") + name for model, name in names.items())
    add_title(figure, f"{title}: {figure_text(results['data']['name'], 40)}", models)
    return figure
