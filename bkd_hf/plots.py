"""Figures of runs, made only from the content of their `results.json` (see `bkd_hf.results`), here `results`."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import LogLocator, MaxNLocator

from .config import option_is_used
from .confusion_plots import plot_confusion
from .export_report import FIGURE_NAME, plot_latency
from .figures import (
    GREEN,
    NEUTRAL,
    ORANGE,
    PERCENT,
    SMALL,
    TEXT,
    TICK_STEPS,
    class_accuracies,
    fit_beside,
    largest_first,
    line_style,
    models_of,
    names_of_classes,
    of_the,
    percent,
    point_style,
    save_figures,
    set_names,
    tidy,
    titled_figure,
)
from .metrics import FEW_SHOT_THRESHOLD, MANY_SHOT_THRESHOLD, groups_of
from .tasks import task_of

_GROUP_SHADES = {"many_shot": "#ffffff", "medium_shot": "#f1f1f1", "few_shot": "#e2e2e2"}

_MAX_NAMED_CLASSES = 30
_MAX_POINTS = 200
_MIN_NAMED_STRETCH = 0.09  # fraction of the axis that has room for a group's name

_PART = {"linewidth": 1.2, "markersize": 4, "zorder": 2}
_FEW_SHOT = {"linewidth": 1.0, "markersize": 4}
# Panel, model, key in its history, label, and what differs from the model's own style.
_CURVES: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("training loss", "teacher", "loss", "teacher", {}),
    ("training loss", "student", "loss", "student: total", {}),
    (
        "training loss", "student", "ce_loss", "student: classification",
        {"color": ORANGE, "linestyle": ":", "marker": "^", **_PART},
    ),
    (
        "training loss", "student", "kd_loss", "student: distillation",
        {"color": GREEN, "linestyle": "-.", "marker": "v", **_PART},
    ),
    ("test accuracy (%)", "teacher", "eval_accuracy", "teacher: all classes", {}),
    ("test accuracy (%)", "teacher", "eval_few_shot_accuracy", "teacher: few-shot", {"marker": "s", **_FEW_SHOT}),
    ("test accuracy (%)", "student", "eval_accuracy", "student: all classes", {}),
    ("test accuracy (%)", "student", "eval_few_shot_accuracy", "student: few-shot", {"marker": "^", **_FEW_SHOT}),
    # Often equal: the student's line shows through the gaps of the teacher's dashed line above it.
    ("learning rate", "teacher", "learning_rate", "teacher", {"zorder": 3}),
    ("learning rate", "student", "learning_rate", "student", {"zorder": 2}),
)  # fmt: skip


def save_plots(results: dict[str, Any], folder: str | os.PathLike[str], only_missing: bool = False) -> list[Path]:
    """Save all figures that the results allow into a folder, which is created if needed; return their paths.

    These are `class_accuracy.png` (see `plot_class_accuracy`), `training_curves.png` (see `plot_training_curves`; only
    with a history), `confusion_student.png` and `confusion_teacher.png` (see `plot_confusion`); without a teacher
    `confusion.png`; for an exported model `latency.png`. With `only_missing`, existing figures that load are kept.
    """
    return save_figures(_figures(results), folder, only_missing)


def figure_names(results: dict[str, Any]) -> list[str]:
    """Return the names of the files that [`save_plots`] writes."""
    return list(_figures(results))


def _figures(results: dict[str, Any]) -> dict[str, Callable[[], Figure]]:
    figures: dict[str, Callable[[], Figure]] = {"class_accuracy.png": functools.partial(plot_class_accuracy, results)}
    if _training_panels(results):
        figures["training_curves.png"] = functools.partial(plot_training_curves, results)
    for model in reversed(models_of(results)):
        name = f"confusion{of_the(model, results, '_')}.png"
        figures[name] = functools.partial(plot_confusion, results, model)
    if "export" in results:
        figures[FIGURE_NAME] = functools.partial(plot_latency, results)
    return figures


# ---- Classes --------------------------------------------------------------------------------------------------------


def plot_class_accuracy(results: dict[str, Any]) -> Figure:
    """Draw the training images and the accuracy of each class.

    Classes are on the x axis, from the most to the fewest training images: by name, or by rank if there are more than
    30. Above are the training images per class (log scale), below is each class's accuracy on the test images (in
    percent) for teacher and student, and beside it the accuracies over all test images and of the groups (the mean
    over the classes of a group), shaded like their part of the x axis. With more than 30 classes, a moving average
    shows the trend; with more than 200, points are means over neighbouring ranks. Classes without test images leave a
    gap.

    The figure's axes are the training images, the accuracies per class, those per group, and the legend's.
    """
    data, width = results["data"], 5.0
    figure = titled_figure("Accuracy per class", results, height=5.6 + (not fit_beside(_class_labels(data), width)))
    grid = figure.add_gridspec(2, 2, width_ratios=(2.7, 1), height_ratios=(1, 1.6))
    images_axes = figure.add_subplot(grid[0, 0])
    class_axes = figure.add_subplot(grid[1, 0], sharex=images_axes)
    group_axes = figure.add_subplot(grid[1, 1], sharey=class_axes)
    legend_axes = figure.add_subplot(grid[0, 1])
    _draw_training_images(images_axes, data, width)
    _draw_classes(class_axes, data, width)
    handles = _draw_class_accuracies(class_axes, results)
    if len(models_of(results)) == 1:  # e.g. a teacher's own run, which has no student
        handles[0].set_label("this model")
    _draw_group_accuracies(group_axes, results)
    images_axes.tick_params(labelbottom=False, bottom=len(data["class_counts"]) <= _MAX_NAMED_CLASSES)
    if untested := sum(count == 0 for count in data["eval_class_counts"]):
        class_axes.set_xlabel(f"{class_axes.get_xlabel()}; {untested:,} without test {task_of(data).name}s")
    legend_axes.set_axis_off()
    legend_axes.legend(handles=handles, loc="center", frameon=False, fontsize=TEXT, handlelength=3)
    return figure


def plot_class_counts(name: str, class_names: Sequence[str], class_counts: Sequence[int]) -> Figure:
    """Draw the training images per class of a data set, like the upper part of `plot_class_accuracy`.

    Args:
        name: The data set's name.
        class_names: C names.
        class_counts: C numbers of training images.
    """
    data = {
        "name": name,
        "class_names": class_names,
        "class_counts": class_counts,
        "many_shot_threshold": MANY_SHOT_THRESHOLD,
        "few_shot_threshold": FEW_SHOT_THRESHOLD,
    }
    height = 3.2 + (not fit_beside(_class_labels(data), 7.0))
    figure = titled_figure("Training images per class", {"data": data}, height)
    axes = figure.add_subplot()
    _draw_training_images(axes, data, 7.0)
    _draw_classes(axes, data, 7.0)
    return figure


def _draw_training_images(axes: Axes, data: dict[str, Any], width: float) -> None:
    counts = np.sort(data["class_counts"])[::-1]
    ranks = np.arange(1, counts.size + 1)
    smallest, largest = max(1, counts.min()), max(1, counts.max())
    # A log scale has no zero: starting at half of the smallest class leaves it a visible bar.
    top = largest * (largest / smallest) ** 0.12 * 1.4
    axes.set(yscale="log", ylim=(smallest / 2, top), ylabel=f"training {task_of(data).name}s\n(log scale)")
    if counts.size <= _MAX_NAMED_CLASSES:
        bars = axes.bar(ranks, counts, width=0.7, color=NEUTRAL, zorder=2)
        numbers = [f"{count:,}" for count in counts]
        if fit_beside(numbers, width):
            axes.bar_label(bars, labels=numbers, fontsize=SMALL, padding=1)
    else:
        axes.fill_between(ranks, counts, smallest / 2, step="mid", color=NEUTRAL, linewidth=0, zorder=2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if largest / smallest > 30 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
    axes.yaxis.set_minor_formatter("")
    _shade_groups(axes, data)
    tidy(axes)


def _draw_classes(axes: Axes, data: dict[str, Any], width: float) -> None:
    """Label the x axis, `width` inches wide, with the classes' names or ranks, and name the groups above it."""
    num_classes, names = len(data["class_counts"]), _class_labels(data)
    if names:
        set_names(axes, "x", range(1, num_classes + 1), names, width)
        axes.set_xlabel(f"class (most training {task_of(data).name}s first)")
    else:
        ticks = MaxNLocator(7, integer=True, steps=TICK_STEPS).tick_values(1, num_classes)
        ticks = [1, *(tick for tick in ticks if 1 < tick <= num_classes)]
        axes.set(xticks=ticks, xlabel=f"rank of the class (1: most training {task_of(data).name}s)")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    for name, (start, end) in _shade_groups(axes, data).items():
        if end - start >= _MIN_NAMED_STRETCH * num_classes:
            text = axes.text((start + end) / 2, 1.01, name.removesuffix("_shot"), ha="center", fontsize=SMALL)
            text.set(transform=axes.get_xaxis_transform(), va="bottom")
    axes.set_xlim(0.5, num_classes + 0.5)
    tidy(axes)


def _shade_groups(axes: Axes, data: dict[str, Any]) -> dict[str, tuple[float, float]]:
    ends = 0.5 + np.cumsum([0, *(group.sum() for group in groups_of(data).values())])
    stretches = dict(zip(_GROUP_SHADES, itertools.pairwise(ends.tolist()), strict=True))
    for name, stretch in stretches.items():
        axes.axvspan(*stretch, color=_GROUP_SHADES[name], linewidth=0, zorder=0)
    return stretches


def _draw_class_accuracies(axes: Axes, results: dict[str, Any]) -> list[Line2D]:
    """Draw each class's accuracy; return the handles of a legend."""
    order = largest_first(results["data"])
    accuracies = {model: class_accuracies(results[model])[order] for model in models_of(results)}
    ranks = np.arange(1.0, order.size + 1)
    axes.set(ylabel="test accuracy (%)", **PERCENT)
    if order.size <= _MAX_NAMED_CLASSES:
        if len(accuracies) == 2:
            axes.vlines(ranks, *accuracies.values(), color=NEUTRAL, linewidth=1, zorder=2)
        return [axes.plot(ranks, values, **point_style(model))[0] for model, values in accuracies.items()]

    size = -(-order.size // _MAX_POINTS)  # ranks in a point
    window = max(5, order.size // 12 | 1)  # odd: as many neighbours to the left as to the right
    in_points = functools.partial(np.add.reduceat, indices=np.arange(0, order.size, size))
    small = {"markersize": 3, "markeredgewidth": 0.8, "alpha": 0.5}
    halo = [Stroke(linewidth=4, foreground="white", alpha=0.8), Normal()]  # separates lines and points
    for model, values in accuracies.items():
        axes.plot(_means(ranks, in_points), _means(values, in_points), **point_style(model) | small)
    for model, values in accuracies.items():
        trend = _means(values, lambda part: np.convolve(part, np.ones(window), "same"))
        style = {"label": f"{model} trend", "linewidth": 2, "marker": "", "path_effects": halo, "zorder": 4}
        axes.plot(_means(ranks, in_points), _means(trend, in_points), **line_style(model) | style)
    point = "one class" if size == 1 else f"mean of {size:,} classes"
    return [
        *(Line2D([], [], **line_style(model)) for model in accuracies),
        Line2D([], [], color=NEUTRAL, linestyle="none", marker="o", markersize=3, label=point),
        Line2D([], [], color=NEUTRAL, linewidth=2, label=f"moving average,\n{window:,} classes"),
    ]


def _means(values: np.ndarray, total: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the means over the ranges that `total` sums up, ignoring NaN."""
    known = ~np.isnan(values)
    sums, numbers = total(np.where(known, values, 0.0)), total(known.astype(float))
    return np.divide(sums, numbers, where=numbers > 0, out=np.full(numbers.size, np.nan))


def _draw_group_accuracies(axes: Axes, results: dict[str, Any]) -> None:
    many, few = results["data"]["many_shot_threshold"], results["data"]["few_shot_threshold"]
    labels = {"many_shot": f"many\n> {many}", "medium_shot": f"medium\n{few}–{many}", "few_shot": f"few\n< {few}"}
    present = [name for name, group in groups_of(results["data"]).items() if group.any()]
    for x, name in enumerate(present, start=1):
        axes.axvspan(x - 0.5, x + 0.5, color=_GROUP_SHADES[name], linewidth=0, zorder=0)
    for model in models_of(results):
        metrics = results[model]["metrics"]
        values = percent([metrics["accuracy"], *(metrics.get(f"{name}_accuracy") for name in present)])
        axes.plot(range(len(values)), values, **point_style(model))
    axes.set(xlim=(-0.5, len(present) + 0.5), xlabel=f"classes, by training {task_of(results['data']).name}s")
    axes.set_xticks(range(len(present) + 1), ["all", *(labels[name] for name in present)])
    axes.tick_params(bottom=False, labelleft=False)
    tidy(axes)


def _class_labels(data: dict[str, Any]) -> list[str]:
    """Return the class names, largest class first; empty if there are too many to show."""
    order = largest_first(data)
    names = names_of_classes(data)
    return [names[index] for index in order] if order.size <= _MAX_NAMED_CLASSES else []


# ---- Training -------------------------------------------------------------------------------------------------------


def plot_training_curves(results: dict[str, Any]) -> Figure:
    """Draw the training curves of teacher and student, from their histories.

    There is one panel each, over epochs: the training loss (for the student also its two parts: classification, and
    unweighted distillation), the accuracy on the test images (percent; overall, and of the few-shot classes), and the
    learning rate. Panels without data are left out. Losses and learning rates that span more than a factor of 20 are
    on a log scale.

    Raises:
        ValueError: If neither model has a history.
    """
    panels = _training_panels(results)
    if not panels:
        raise ValueError("There are no training curves to draw: neither teacher nor student has a history.")
    heights = [0.9 if name == "learning rate" else 2.0 for name in panels]
    figure = titled_figure("Training curves", results, 1.2 + 1.1 * sum(heights))
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, curves) in zip(all_axes, panels.items(), strict=True):
        for epochs, values, style in curves:
            # A few markers distinguish lines; a single point is only visible by its marker.
            axes.plot(epochs, values, markevery=max(1, epochs.size // 10), **style)
        # Beside the axes, as curves may be anywhere inside.
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=SMALL, handlelength=3.5)
        axes.set_ylabel(name)
        tidy(axes)
        if name == "test accuracy (%)":
            axes.set(**PERCENT)
            continue
        axes.margins(y=0.1)
        drawn = np.concatenate([values for _, values, _ in curves])
        if np.nanmin(drawn) > 0 and np.nanmax(drawn) > 20 * np.nanmin(drawn):
            axes.set(yscale="log", ylabel=f"{name}\n(log scale)")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter("")
    axes.set_xlim(left=0)
    axes.set_xlabel("epoch", fontsize=TEXT)
    return figure


def _training_panels(results: dict[str, Any]) -> dict[str, list[tuple[np.ndarray, np.ndarray, dict[str, Any]]]]:
    """Return the epochs, values and style of each curve, by panel."""
    histories = {model: results[model].get("history") or [] for model in models_of(results)}
    options = results.get("options", {}).get("training", {})
    is_weighted = option_is_used("distillation_weight", {"distillation_loss": "bkd", **options})
    weight = options.get("distillation_weight", 1.0) if is_weighted else 1.0
    panels: dict[str, list[tuple[np.ndarray, np.ndarray, dict[str, Any]]]] = {}
    for panel, model, key, label, style in _CURVES:
        history = histories.get(model, [])
        if key == "ce_loss" and not any("kd_loss" in entry for entry in history):
            continue  # alone, it would repeat the same line
        entries = [entry for entry in history if key in entry and "epoch" in entry]
        epochs = np.array([entry["epoch"] for entry in entries], dtype=float)
        values = np.array([entry[key] for entry in entries], dtype=float)  # null becomes nan, a gap
        if key == "kd_loss" and weight != 1:
            label += f"\n(× {weight:g} in the total)"
        if np.isfinite(values).any():
            scale = 100 if panel == "test accuracy (%)" else 1
            curve = epochs, scale * values, line_style(model) | {"label": label} | style
            panels.setdefault(panel, []).append(curve)
    return panels
