"""Figures of comparisons: methods × seeds (see `bkd_hf.comparison`)."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .comparison import Comparison, Mean
from .figures import (
    BLUE,
    COLOURS,
    DPI,
    GROUP_POINTS,
    NEUTRAL,
    PERCENT,
    RED,
    SMALL,
    TEXT,
    WIDTH,
    add_title,
    class_accuracies,
    save_figures,
    set_names,
    tidy,
)
from .metrics import groups_of
from .text import figure as figure_text

_DIAMOND: dict[str, Any] = {"fmt": "D", "markersize": 5, "capsize": 2}


def save_comparison_plots(comparison: Comparison, folder: str | os.PathLike[str]) -> list[Path]:
    """Draw `comparison.png`, with a teacher also `teacher_and_student.png`, with few-shot classes also
    `leaderboard.png`; return their paths.
    """
    figures = {"comparison.png": functools.partial(plot_comparison, comparison)}
    if any(_distilled(comparison, method) for method in comparison.methods):
        figures["teacher_and_student.png"] = functools.partial(plot_teacher_and_student, comparison)
    if "few" in comparison.shown_metrics():
        figures["leaderboard.png"] = functools.partial(plot_leaderboard, comparison)
    return save_figures(figures, folder)


def plot_comparison(comparison: Comparison) -> Figure:
    """Draw each metric of each method: a dot for every seed, the mean, and its standard deviation as a bar."""
    metrics, methods = comparison.shown_metrics(), comparison.methods
    seeds = sorted({len(comparison.cells[method]) for method in methods})
    number = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    figure, panels = _panels(metrics, 3, WIDTH, 1.2, 0.8 + 0.24 * len(methods))
    title = f"Methods on {figure_text(comparison.data['name'], 40)}, {number} seed{'s' if seeds[-1] > 1 else ''} each"
    note = "diamond: mean over seeds; bar: its standard deviation, within 0 to 100; dots: the seeds"
    add_title(figure, title, note if seeds[-1] > 1 else "one seed")
    dots: dict[str, Any] = {"color": NEUTRAL, "markersize": 3, "alpha": 0.7, "zorder": 2}
    for metric, axes in panels.items():
        lowest, highest = 100.0, 0.0
        for y, method in enumerate(methods):
            values = list(comparison.values(method, metric).values())
            estimate = comparison.estimate(method, metric)
            if estimate is None:
                continue
            if len(values) > 1:
                axes.plot(values, [y] * len(values), "o", clip_on=False, **dots)
            bar = _bar(estimate)
            axes.errorbar(estimate.mean, y, xerr=bar, clip_on=False, color=_colour(method), linewidth=1.2, **_DIAMOND)
            left, right = (0.0, 0.0) if bar is None else bar.ravel()
            lowest, highest = min(lowest, *values, estimate.mean - left), max(highest, *values, estimate.mean + right)
        set_names(axes, "y", range(len(methods)), [figure_text(method, 40) for method in methods])
        room = max(0.15 * (highest - lowest), 2.0)
        # Values lie in 0 to 100; markers at the ends may overlap the border.
        axes.set(xlim=(max(0.0, lowest - room), min(100.0, highest + room)), ylim=(len(methods) - 0.4, -0.6))
        axes.set_title(f"{metric} (%)" + (", lower is better" if metric == "ECE" else ""))
        tidy(axes, grid="both", colour="#dddddd")
    return figure


def plot_leaderboard(comparison: Comparison) -> Figure:
    """Draw each method's few-shot accuracy over its overall accuracy; methods above and to the right are better."""
    figure = Figure(figsize=(WIDTH, 5.2), dpi=DPI, layout="constrained")
    title = f"Overall and few-shot: {figure_text(comparison.data['name'], 40)}"
    add_title(figure, title, "means over seeds; bars: standard deviation, within 0 to 100 %")
    axes = figure.subplots()
    points = {}
    for method in comparison.methods:
        overall, few = comparison.estimate(method, "overall"), comparison.estimate(method, "few")
        if overall is not None and few is not None:
            points[method] = overall.mean, few.mean
            x_bar, y_bar = _bar(overall), _bar(few)
            axes.errorbar(*points[method], y_bar, x_bar, color=_colour(method), linewidth=1.0, **_DIAMOND)
    axes.margins(0.08)
    # Names are in a column beside the axes, as the points of good methods are close together.
    heights = np.linspace(0.02, 0.98, max(len(points), 2))
    for height, method in zip(heights, sorted(points, key=lambda method: points[method][::-1]), strict=False):
        axes.annotate(
            figure_text(method, 40),
            points[method],
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=SMALL,
            color=_colour(method),
            arrowprops={"arrowstyle": "-", "color": NEUTRAL, "linewidth": 0.5, "shrinkB": 4, "relpos": (0, 0.5)},
        )
    axes.set_xlabel("overall accuracy (%)")
    axes.set_ylabel("few-shot accuracy (%)")
    tidy(axes, grid="both", colour="#dddddd")
    return figure


def plot_teacher_and_student(comparison: Comparison) -> Figure:
    """Draw each class's student accuracy over its teacher accuracy, in a panel for each distilled method.

    Values are means over seeds; above the diagonal, the student is better. Colours and markers show the class groups.
    """
    methods = [method for method in comparison.methods if _distilled(comparison, method)]
    columns = min(3, len(methods))
    figure, panels = _panels(methods, columns, max(5.5, WIDTH * columns / 3), 1.3, 2.7)
    add_title(figure, f"Accuracy of each class: {figure_text(comparison.data['name'], 40)}")
    for method, axes in panels.items():
        cells = _distilled(comparison, method)
        accuracies = {model: np.mean([class_accuracies(cell[model]) for cell in cells], axis=0) for model in COLOURS}
        axes.plot([0, 100], [0, 100], color=NEUTRAL, linewidth=0.8, zorder=1)
        for name, group in groups_of(comparison.data).items():
            colour, marker = GROUP_POINTS[name]
            style: dict[str, Any] = {"color": colour, "marker": marker, "s": 14, "alpha": 0.7, "linewidths": 0}
            x, y = (values[group] for values in accuracies.values())
            axes.scatter(x, y, label=name.replace("_", "-"), zorder=2, **style)
        axes.set_title(figure_text(method))
        axes.set(xlim=PERCENT["ylim"], xticks=PERCENT["yticks"], **PERCENT)
        tidy(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=SMALL)
    for axes in [*panels.values()][-columns:]:  # those with nothing below
        axes.set_xlabel("teacher (%)", fontsize=TEXT)
    figure.supylabel("student (%)", fontsize=TEXT)
    return figure


def _bar(estimate: Mean) -> np.ndarray | None:
    """The standard deviation below and above a mean (2×1), clipped to 0 to 100 %; `None` for one seed."""
    if estimate.std is None:
        return None
    return np.array([[min(estimate.std, estimate.mean)], [min(estimate.std, 100 - estimate.mean)]])


def _colour(method: str) -> str:
    return RED if method.startswith("bkd") else BLUE


def _panels(
    names: Sequence[str], columns: int, width: float, margin: float, height: float
) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with an axes for each name, each `height` inches high."""
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(width, margin + rows * height), dpi=DPI, layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axes in all_axes[len(names) :]:
        axes.set_axis_off()
    return figure, dict(zip(names, all_axes, strict=False))


def _distilled(comparison: Comparison, method: str) -> list[dict[str, Any]]:
    return [results for results in comparison.cells[method].values() if results.get("teacher")]
