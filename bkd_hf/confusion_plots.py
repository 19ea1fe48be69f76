"""Figures of a model's confusions, made from the content of a `results.json` (`bkd_hf.results`)."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .figures import (
    COLOURS,
    NOT_TESTED,
    SMALL,
    TEXT,
    TICK_STEPS,
    class_accuracies,
    largest_first,
    names_of_classes,
    of_the,
    set_names,
    tidy,
    titled_figure,
)
from .tasks import task_of

_MAX_NUMBERED_CLASSES = 12
_NUM_CONFUSIONS = 20


def plot_confusion(results: dict[str, Any], model: str = "student", max_classes: int = 30) -> Figure:
    """Draw which classes a model confuses.

    With few classes this is the confusion matrix, from the class with the most to that with the fewest training
    images: the percentage of the true class's (row) test images predicted as a class (column). With more classes, it
    has a bar for each of the 20 confusions with the most test images: their percentage of the true class's test
    images. Numbers of training images are beside the names.

    Args:
        results: The content of a `results.json`.
        model: `student` or `teacher`.
        max_classes: With more classes than this, bars are drawn.
    """
    data = results["data"]
    names = names_of_classes(data)
    sized = [f"{name} ({count:,})" for name, count in zip(names, data["class_counts"], strict=True)]
    if len(names) <= max_classes:
        return _plot_confusion_matrix(results, model, names, sized)
    return _plot_largest_confusions(results, model, sized)


def _plot_confusion_matrix(results: dict[str, Any], model: str, names: list[str], sized: list[str]) -> Figure:
    tested, order = np.asarray(results["data"]["eval_class_counts"]), largest_first(results["data"])
    unit = task_of(results["data"]).name
    shares = np.diag(class_accuracies(results[model]))
    for true, predicted, number in results[model]["confusions"]:
        shares[true, predicted] = 100 * number / tested[true]
    shares[tested == 0] = np.nan
    shares = shares[np.ix_(order, order)]

    figure = titled_figure(f"Confusions{of_the(model, results, ' of the ')}", results, height=7.0)
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["Blues"].with_extremes(bad=NOT_TESTED)
    # A square-root scale: most confusions are a few percent, which would be white on a linear scale.
    scale = PowerNorm(0.5, vmin=0, vmax=100)
    # scikit-learn's ConfusionMatrixDisplay writes every zero, and cannot leave rows out.
    image = axes.imshow(shares, cmap=colours, norm=scale, aspect="auto")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, ticks=[0, 1, 5, 10, 20, 40, 60, 80, 100])
    bar.set_label(f"share of the true class's test {unit}s (%)", fontsize=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL}
    for row in np.flatnonzero(tested[order] == 0).tolist():
        axes.text((order.size - 1) / 2, row, f"no test {unit}s", **centred)
    if order.size <= _MAX_NUMBERED_CLASSES:
        for row, column in np.argwhere(shares > 0).tolist():
            share = shares[row, column]
            axes.text(column, row, f"{round(share, 1):g}", color="white" if scale(share) > 0.7 else "black", **centred)
    set_names(axes, "x", range(order.size), [names[index] for index in order], 5.0)
    set_names(axes, "y", range(order.size), [sized[index] for index in order])
    axes.tick_params(length=0)
    axes.set(xlabel="predicted class", ylabel=f"true class (training {unit}s)")
    axes.xaxis.label.set_fontsize(TEXT)
    axes.yaxis.label.set_fontsize(TEXT)
    return figure


def _plot_largest_confusions(results: dict[str, Any], model: str, sized: list[str]) -> Figure:
    tested, unit = results["data"]["eval_class_counts"], task_of(results["data"]).name
    # By images, not by share: only the most frequent ones are in the results, and a class with a single test image
    # would always come first.
    largest = sorted(results[model]["confusions"], key=lambda c: (-c[2], tested[c[0]]))
    confusions, others = largest[:_NUM_CONFUSIONS], largest[_NUM_CONFUSIONS:]
    label = f"share of the true class's test {unit}s (%)"
    if others and others[0][2] == (least := confusions[-1][2]):
        label += f"\nnot drawn: other confusions of {least:,} test {unit}{'s' if least > 1 else ''} each"
    confusions.sort(key=lambda c: -c[2] / tested[c[0]])
    shares = [100 * number / tested[true] for true, _, number in confusions]

    figure = titled_figure(
        f"Largest confusions{of_the(model, results, ' of the ')}", results, 1.4 + 0.23 * max(4, len(shares))
    )
    axes = figure.add_subplot()
    bars = axes.barh(range(len(shares)), shares, height=0.7, color=COLOURS[model], zorder=2)
    numbers = [f"{number:,} of {tested[true]:,}" for true, _, number in confusions]
    axes.bar_label(bars, labels=numbers, fontsize=SMALL, padding=3)
    if not confusions:
        axes.text(0.5, 0.5, f"every test {unit} is classified correctly", transform=axes.transAxes, ha="center")
    labels = [f"{sized[true]} → {sized[predicted]}" for true, predicted, _ in confusions]
    set_names(axes, "y", range(len(labels)), labels)
    longest = max(shares, default=100.0)
    end = 1.25 * longest  # room for the numbers
    ticks = MaxNLocator(6, steps=TICK_STEPS).tick_values(0, longest)
    axes.set(xlim=(0, end), xticks=[tick for tick in ticks if tick <= min(100, end)], xlabel=label)
    axes.set(ylim=(max(1, len(shares)) - 0.4, -0.6), ylabel=f"true → predicted class\n(training {unit}s)")
    axes.tick_params(axis="y", length=0)
    tidy(axes, grid=None)  # a grid would cross the numbers
    return figure
