"""Figures of runs, made from the content of their `results.json` alone (see `bkd_hf.results`)."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .metrics import FEW_SHOT_THRESHOLD, MANY_SHOT_THRESHOLD, shot_groups

if TYPE_CHECKING:
    from .comparison import Comparison

# `Figure` throughout, never pyplot: no display, no state that threads share, nothing to close.

_DPI = 150
_WIDTH = 8.0  # inches
_SMALL, _TEXT, _TITLE = 8, 9, 11  # points

# Okabe and Ito's colours, which the colour-blind can tell apart; line styles and markers say the same once more.
_COLOURS = {"teacher": "#0072B2", "student": "#D55E00"}
_LINES = {"teacher": "--", "student": "-"}
# The teacher's ring stays visible around the student's diamond where both are equal.
_MARKERS: dict[str, dict[str, Any]] = {
    "teacher": {"marker": "o", "markersize": 7.5, "markerfacecolor": "none", "markeredgewidth": 1.4},
    "student": {"marker": "D", "markersize": 4.5},
}
_PARTS = {
    "ce_loss": {"label": "student: classification", "color": "#E69F00", "linestyle": ":", "marker": "^"},
    "kd_loss": {"label": "student: distillation", "color": "#009E73", "linestyle": "-.", "marker": "v"},
}
_NEUTRAL = "#8c8c8c"
_NOT_TESTED = "#d9d9d9"
_GROUP_SHADES = {"many_shot": "#ffffff", "medium_shot": "#f1f1f1", "few_shot": "#e2e2e2"}

_MAX_NAMED_CLASSES = 30
_MAX_NUMBERED_CLASSES = 12
_MAX_POINTS = 200
_NUM_CONFUSIONS = 20
_TICK_STEPS = (1, 2, 5, 10)
# A narrower stretch of the axis (a share of it) has no room for the name of its group.
_MIN_NAMED_STRETCH = 0.09


def save_plots(results: dict[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Draw all figures that the results allow.

    These are `class_accuracy.png` (see `plot_class_accuracy`), `training_curves.png` (see `plot_training_curves`; only
    if there is a history), `confusion_student.png` and `confusion_teacher.png` (see `plot_confusion`).

    Args:
        results: The content of a `results.json`.
        folder: Where to; made if it is not there.

    Returns:
        The paths of the figures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in _figures(results).items():
        paths.append(folder / name)
        draw().savefig(paths[-1], dpi=_DPI, facecolor="white")
    return paths


def figure_names(results: dict[str, Any]) -> list[str]:
    """Return the names of the files that [`save_plots`] writes."""
    return list(_figures(results))


def _figures(results: dict[str, Any]) -> dict[str, Callable[[], Figure]]:
    figures: dict[str, Callable[[], Figure]] = {"class_accuracy.png": lambda: plot_class_accuracy(results)}
    if _training_panels(results):
        figures["training_curves.png"] = lambda: plot_training_curves(results)
    for model in reversed(_models(results)):
        figures[f"confusion_{model}.png"] = functools.partial(plot_confusion, results, model)
    return figures


# ---- Classes --------------------------------------------------------------------------------------------------------


def plot_class_accuracy(results: dict[str, Any]) -> Figure:
    """Draw what each class has to learn from, and how well it is learned.

    Classes lie on the x axis, from the most to the fewest training images: by name, or by rank if they are more than
    30. Above are the training images per class (a number, on a log scale), below is each class's accuracy on the test
    images (percent) for teacher and student, and beside it the accuracies over all test images and of the groups (the
    mean over the classes of a group), whose shade is that of their stretch of the x axis. Of more than 30 classes a
    moving average shows the trend; of more than 200, points are means over neighbouring ranks. Classes without test
    images leave a gap.

    Args:
        results: The content of a `results.json`.

    Returns:
        The figure; its axes are the training images, the accuracies per class, those per group, and the legend's.
    """
    data = results["data"]
    counts = np.asarray(data["class_counts"])
    order = _largest_first(counts)
    named = counts.size <= _MAX_NAMED_CLASSES
    names = [_shortened(data["class_names"][index]) for index in order] if named else []
    room = 5.0 / counts.size  # inches for each class
    height = 5.6 if _fit(names, room) else 6.6
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(2.7, 1), height_ratios=(1, 1.6))
    images_axes = figure.add_subplot(grid[0, 0])
    class_axes = figure.add_subplot(grid[1, 0], sharex=images_axes)
    group_axes = figure.add_subplot(grid[1, 1], sharey=class_axes)
    legend_axes = figure.add_subplot(grid[0, 1])

    _add_title(figure, "Accuracy per class", results)
    _draw_training_images(images_axes, counts[order], room)
    _draw_class_accuracies(class_axes, results, order)
    _draw_group_accuracies(group_axes, results)
    _shade_groups(images_axes, class_axes, data, order)
    label = _set_classes(class_axes, counts.size, names, room)
    untested = int((np.asarray(data["eval_class_counts"]) == 0).sum())
    class_axes.set_xlabel(f"{label}; {untested:,} without test images" if untested else label, fontsize=_TEXT)
    images_axes.tick_params(labelbottom=False, bottom=named)
    _draw_class_legend(legend_axes, _models(results), counts.size)
    return figure


def plot_class_counts(
    name: str,
    class_names: Sequence[str],
    class_counts: Sequence[int],
    many_shot_threshold: int = MANY_SHOT_THRESHOLD,
    few_shot_threshold: int = FEW_SHOT_THRESHOLD,
) -> Figure:
    """Draw the training images per class of a data set, as above the accuracies of `plot_class_accuracy`.

    Args:
        name: The data set's.
        class_names: C names.
        class_counts: C numbers of training images.
        many_shot_threshold: Classes with more images are many-shot.
        few_shot_threshold: Classes with fewer images are few-shot.

    Returns:
        The figure; its only axes are the training images.
    """
    counts = np.asarray(class_counts)
    data = {
        "name": name,
        "class_counts": class_counts,
        "many_shot_threshold": many_shot_threshold,
        "few_shot_threshold": few_shot_threshold,
    }
    order = _largest_first(counts)
    names = [_shortened(class_names[index]) for index in order] if counts.size <= _MAX_NAMED_CLASSES else []
    room = 7.0 / counts.size  # inches for each class
    figure = Figure(figsize=(_WIDTH, 3.2 if _fit(names, room) else 4.2), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    _add_title(figure, "Training images per class", {"data": data})
    _draw_training_images(axes, counts[order], room)
    _shade_groups(axes, axes, data, order)
    axes.set_xlabel(_set_classes(axes, counts.size, names, room), fontsize=_TEXT)
    return figure


def _set_classes(axes: Axes, num_classes: int, names: list[str], room: float) -> str:
    """Label the x axis with the classes' names, or with their ranks if there are no names; return its title."""
    if names:
        _set_names(axes, "x", range(1, num_classes + 1), names, room)
        return "class (most training images first)"
    ticks = MaxNLocator(7, integer=True, steps=_TICK_STEPS).tick_values(1, num_classes)
    axes.set_xticks([1, *(tick for tick in ticks if 1 < tick <= num_classes)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return "rank of the class (1: most training images)"


def _draw_training_images(axes: Axes, counts: np.ndarray, room: float) -> None:
    ranks = np.arange(1, counts.size + 1)
    smallest, largest = max(1, counts.min()), max(1, counts.max())
    # A log scale has no zero to start from: half of the smallest class leaves it a bar that can be seen.
    axes.set_yscale("log")
    axes.set_ylim(smallest / 2, largest * (largest / smallest) ** 0.12 * 1.4)
    if counts.size <= _MAX_NAMED_CLASSES:
        bars = axes.bar(ranks, counts, width=0.7, color=_NEUTRAL, zorder=2)
        numbers = [f"{count:,}" for count in counts]
        if _fit(numbers, room):
            axes.bar_label(bars, labels=numbers, fontsize=_SMALL, padding=1)
    else:
        axes.fill_between(ranks, counts, smallest / 2, step="mid", color=_NEUTRAL, linewidth=0, zorder=2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if largest / smallest > 30 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else ""))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("training images\n(log scale)", fontsize=_TEXT)
    _tidy(axes)


def _draw_class_accuracies(axes: Axes, results: dict[str, Any], order: np.ndarray) -> None:
    accuracies = {model: _class_accuracies(results[model])[order] for model in _models(results)}
    ranks = np.arange(1, order.size + 1)
    if order.size <= _MAX_NAMED_CLASSES:
        if len(accuracies) == 2:
            axes.vlines(ranks, *accuracies.values(), color=_NEUTRAL, linewidth=1, zorder=2)
        for model, values in accuracies.items():
            axes.plot(ranks, values, **_point_style(model))
    else:
        size = _bin_size(order.size)
        centres = _bin_means(ranks.astype(float), size)
        for model, values in accuracies.items():
            small = {"markersize": 3, "markeredgewidth": 0.8, "alpha": 0.5}
            axes.plot(centres, _bin_means(values, size), **_point_style(model) | small)
        halo = [Stroke(linewidth=4, foreground="white", alpha=0.8), Normal()]  # apart from the points, and each other
        for model, values in accuracies.items():
            trend = _bin_means(_moving_average(values, _window(order.size)), size)
            style = {"label": f"{model} trend", "linewidth": 2, "marker": "", "path_effects": halo, "zorder": 4}
            axes.plot(centres, trend, **_line_style(model) | style)
    _scale_to_percent(axes)
    axes.set_ylabel("test accuracy (%)", fontsize=_TEXT)


def _draw_group_accuracies(axes: Axes, results: dict[str, Any]) -> None:
    data = results["data"]
    many, few = data["many_shot_threshold"], data["few_shot_threshold"]
    groups = shot_groups(data["class_counts"], many, few)
    labels = {"many_shot": f"many\n> {many}", "medium_shot": f"medium\n{few}–{many}", "few_shot": f"few\n< {few}"}
    present = [name for name, group in groups.items() if group.any()]
    for x, name in enumerate(present, start=1):
        axes.axvspan(x - 0.5, x + 0.5, color=_GROUP_SHADES[name], linewidth=0, zorder=0)
    for model in _models(results):
        metrics = results[model]["metrics"]
        values = _percent([metrics["accuracy"], *(metrics.get(f"{name}_accuracy") for name in present)])
        axes.plot(range(len(values)), values, **_point_style(model))
    axes.set_xlim(-0.5, len(present) + 0.5)
    axes.set_xticks(range(len(present) + 1), ["all", *(labels[name] for name in present)])
    axes.set_xlabel("classes, by training images", fontsize=_TEXT)
    axes.tick_params(bottom=False, labelleft=False)
    _tidy(axes)


def _shade_groups(images_axes: Axes, class_axes: Axes, data: dict[str, Any], order: np.ndarray) -> None:
    groups = shot_groups(data["class_counts"], data["many_shot_threshold"], data["few_shot_threshold"])
    start = 0.5
    for name, group in groups.items():
        end = start + group.sum()
        for axes in (images_axes, class_axes):
            axes.axvspan(start, end, color=_GROUP_SHADES[name], linewidth=0, zorder=0)
        if end - start >= _MIN_NAMED_STRETCH * order.size:
            class_axes.text(
                (start + end) / 2,
                1.01,
                name.removesuffix("_shot"),
                transform=class_axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=_SMALL,
            )
        start = end
    class_axes.set_xlim(0.5, order.size + 0.5)


def _draw_class_legend(axes: Axes, models: Sequence[str], num_classes: int) -> None:
    axes.set_axis_off()
    many = num_classes > _MAX_NAMED_CLASSES
    handles = [Line2D([], [], **_line_style(m) if many else _point_style(m)) for m in models]
    if many:
        size = _bin_size(num_classes)
        point = "one class" if size == 1 else f"mean of {size:,} classes"
        line = f"moving average,\n{_window(num_classes):,} classes"
        handles.append(Line2D([], [], color=_NEUTRAL, linestyle="none", marker="o", markersize=3, label=point))
        handles.append(Line2D([], [], color=_NEUTRAL, linewidth=2, label=line))
    axes.legend(handles=handles, loc="center", frameon=False, fontsize=_TEXT, handlelength=3)


def _bin_size(num_classes: int) -> int:
    return -(-num_classes // _MAX_POINTS)


def _window(num_classes: int) -> int:
    return max(5, num_classes // 12 | 1)  # odd: as many neighbours to the left as to the right


def _bin_means(values: np.ndarray, size: int) -> np.ndarray:
    """Return the means of runs of `size` values, without those that are not a number."""
    starts = np.arange(0, values.size, size)
    known = ~np.isnan(values)
    totals = np.add.reduceat(np.where(known, values, 0.0), starts)
    numbers = np.add.reduceat(known.astype(float), starts)
    return np.divide(totals, numbers, where=numbers > 0, out=np.full(starts.size, np.nan))


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Return the means over `window` neighbours, fewer at the ends, without those that are not a number."""
    known = ~np.isnan(values)
    sums = [np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, values, 0.0), known)]
    centres = np.arange(values.size)
    first, last = np.maximum(centres - window // 2, 0), np.minimum(centres + window // 2 + 1, values.size)
    totals, numbers = (total[last] - total[first] for total in sums)
    return np.divide(totals, numbers, where=numbers > 0, out=np.full(values.size, np.nan))


# ---- Training -------------------------------------------------------------------------------------------------------


def plot_training_curves(results: dict[str, Any]) -> Figure:
    """Draw the course of training of teacher and student, as far as it is in their histories.

    One panel each, over epochs: the training loss (for the student also its two parts: classification, and
    distillation before it is weighted), the accuracy on the test images (percent; overall, and of the few-shot
    classes), and the learning rate. A panel without any data is left out. Losses and learning rates that span more
    than a factor of 20 are on a log scale.

    Args:
        results: The content of a `results.json`.

    Returns:
        The figure.

    Raises:
        ValueError: If neither model has a history.
    """
    panels = _training_panels(results)
    if not panels:
        raise ValueError("There are no training curves to draw: neither teacher nor student has a history.")
    heights = [0.9 if name == "learning rate" else 2.0 for name in panels]
    figure = Figure(figsize=(_WIDTH, 1.2 + 1.1 * sum(heights)), dpi=_DPI, layout="constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _add_title(figure, "Training curves", results)
    for axes, (name, curves) in zip(all_axes, panels.items(), strict=True):
        _draw_curves(axes, curves)
        axes.set_ylabel(name, fontsize=_TEXT)
        _tidy(axes)
        if name == "test accuracy (%)":
            _scale_to_percent(axes)
        else:
            axes.margins(y=0.1)
            _log_if_wide(axes)
    all_axes[-1].set_xlim(left=0)
    all_axes[-1].set_xlabel("epoch", fontsize=_TEXT)
    return figure


_History = list[dict[str, Any]]
_Curve = tuple[np.ndarray, np.ndarray, dict[str, Any]]  # epochs, values, style


def _training_panels(results: dict[str, Any]) -> dict[str, list[_Curve]]:
    histories = {model: results[model].get("history") or [] for model in _models(results)}
    options = results.get("options", {}).get("training", {})
    weight = (
        options.get("distillation_weight", 1.0) if options.get("distillation_loss", "bkd") in ("kd", "bkd") else 1.0
    )
    panels = {
        "training loss": _loss_curves(histories, weight),
        "test accuracy (%)": _accuracy_curves(histories),
        "learning rate": _rate_curves(histories),
    }
    drawable = {name: [c for c in curves if np.isfinite(c[1]).any()] for name, curves in panels.items()}
    return {name: curves for name, curves in drawable.items() if curves}


def _loss_curves(histories: dict[str, _History], distillation_weight: float) -> list[_Curve]:
    curves: list[_Curve] = []
    for model, history in histories.items():
        label = "teacher" if model == "teacher" else "student: total"
        curves.append((*_series(history, "loss"), _line_style(model) | {"label": label}))
    # The teacher's loss is its cross-entropy: a part of its own would be the same line again.
    student = histories.get("student", [])
    if any("kd_loss" in entry for entry in student):
        for key, part in _PARTS.items():
            weighted = key == "kd_loss" and distillation_weight != 1
            label = part["label"] + (f"\n(× {distillation_weight:g} in the total)" if weighted else "")
            style = {"linewidth": 1.2, "markersize": 4} | part | {"label": label}
            curves.append((*_series(student, key), style))
    return curves


def _accuracy_curves(histories: dict[str, _History]) -> list[_Curve]:
    curves: list[_Curve] = []
    for model, history in histories.items():
        for key, label in (("eval_accuracy", "all classes"), ("eval_few_shot_accuracy", "few-shot")):
            epochs, values = _series(history, key)
            style = _line_style(model) | {"label": f"{model}: {label}"}
            if key != "eval_accuracy":
                style |= {"linewidth": 1.0, "marker": "s" if model == "teacher" else "^", "markersize": 4}
            curves.append((epochs, 100 * values, style))
    return curves


def _rate_curves(histories: dict[str, _History]) -> list[_Curve]:
    # Often the same for both: the student's line shows through the gaps between the teacher's dashes above it.
    order = {"teacher": 3, "student": 2}
    return [
        (*_series(history, "learning_rate"), _line_style(m) | {"zorder": order[m]}) for m, history in histories.items()
    ]


def _series(history: _History, key: str) -> tuple[np.ndarray, np.ndarray]:
    entries = [entry for entry in history if key in entry and "epoch" in entry]
    epochs = np.array([entry["epoch"] for entry in entries], dtype=float)
    return epochs, np.array([entry[key] for entry in entries], dtype=float)  # null becomes nan, a gap


def _draw_curves(axes: Axes, curves: list[_Curve]) -> None:
    for epochs, values, style in curves:
        # A few markers are enough to tell lines apart; a single point is seen only by its marker.
        axes.plot(epochs, values, markevery=max(1, epochs.size // 10), **style)
    # Beside the axes: curves may run anywhere within.
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=_SMALL, handlelength=3.5)


def _log_if_wide(axes: Axes) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()])
    values = values[np.isfinite(values)]
    if values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(f"{axes.get_ylabel()}\n(log scale)")


# ---- Confusions -----------------------------------------------------------------------------------------------------


def plot_confusion(results: dict[str, Any], model: str = "student", max_classes: int = 30) -> Figure:
    """Draw which classes a model takes for which.

    With few classes this is the confusion matrix, from the class with the most to that with the fewest training
    images: of the test images of the true class (row), the share (percent) taken for the predicted class (column).
    With more, it is a bar each for the 20 confusions that befall most test images: their share (percent) of the true
    class's test images. Numbers of training images are given beside the names.

    Args:
        results: The content of a `results.json`.
        model: `student` or `teacher`.
        max_classes: With more classes than this there are bars.

    Returns:
        The figure.
    """
    if len(results["data"]["class_counts"]) <= max_classes:
        return _plot_confusion_matrix(results, model)
    return _plot_largest_confusions(results, model)


def _plot_confusion_matrix(results: dict[str, Any], model: str) -> Figure:
    data = results["data"]
    order = _largest_first(data["class_counts"])
    num_classes = order.size
    shares = _confusion_shares(results, model)[np.ix_(order, order)]
    names = [_shortened(data["class_names"][index]) for index in order]
    sized = [f"{name} ({data['class_counts'][index]:,})" for name, index in zip(names, order, strict=True)]

    figure = Figure(figsize=(_WIDTH, 7.0), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["Blues"].with_extremes(bad=_NOT_TESTED)
    # A root scale: most confusions are a few percent, which a linear one would leave white.
    scale = PowerNorm(0.5, vmin=0, vmax=100)
    image = axes.imshow(np.ma.masked_invalid(shares), cmap=colours, norm=scale, aspect="auto")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, ticks=[0, 1, 5, 10, 20, 40, 60, 80, 100])
    bar.set_label("share of the true class's test images (%)", fontsize=_TEXT)
    bar.ax.tick_params(labelsize=_SMALL)
    for row in np.flatnonzero(np.isnan(shares).all(axis=1)).tolist():
        axes.text((num_classes - 1) / 2, row, "no test images", ha="center", va="center", fontsize=_SMALL)
    if num_classes <= _MAX_NUMBERED_CLASSES:
        for row, column in np.argwhere(shares > 0).tolist():
            share = shares[row, column]
            colour = "white" if scale(share) > 0.7 else "black"
            axes.text(column, row, f"{round(share, 1):g}", ha="center", va="center", color=colour, fontsize=_SMALL)
    _set_names(axes, "x", range(num_classes), names, 5.0 / num_classes)
    _set_names(axes, "y", range(num_classes), sized)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class", fontsize=_TEXT)
    axes.set_ylabel("true class (training images)", fontsize=_TEXT)
    _add_title(figure, f"Confusions of the {model}", results)
    return figure


def _plot_largest_confusions(results: dict[str, Any], model: str) -> Figure:
    data = results["data"]
    counts, tested = data["class_counts"], data["eval_class_counts"]
    # By images, not by share: only the most frequent ones are in the results, and a class with a single test image
    # would always come first.
    largest = sorted(results[model]["confusions"], key=lambda c: (-c[2], tested[c[0]]))
    confusions, others = largest[:_NUM_CONFUSIONS], largest[_NUM_CONFUSIONS:]
    least = confusions[-1][2] if confusions else 0
    label = "share of the true class's test images (%)"
    if others and others[0][2] == least:
        label += f"\nnot drawn: other confusions of {least:,} test image{'s' if least > 1 else ''} each"
    confusions.sort(key=lambda c: -c[2] / tested[c[0]])
    shares = [100 * number / tested[true] for true, _, number in confusions]
    labels = [
        f"{_shortened(data['class_names'][true])} ({counts[true]:,}) → "
        f"{_shortened(data['class_names'][predicted])} ({counts[predicted]:,})"
        for true, predicted, _ in confusions
    ]

    figure = Figure(figsize=(_WIDTH, 1.4 + 0.23 * max(4, len(shares))), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(range(len(shares)), shares, height=0.7, color=_COLOURS[model], zorder=2)
    numbers = [f"{number:,} of {tested[true]:,}" for true, _, number in confusions]
    axes.bar_label(bars, labels=numbers, fontsize=_SMALL, padding=3)
    if not confusions:
        axes.text(0.5, 0.5, "every test image is classified correctly", transform=axes.transAxes, ha="center")
    _set_names(axes, "y", range(len(labels)), labels)
    axes.set_ylim(max(1, len(shares)) - 0.4, -0.6)
    longest = max(shares, default=100.0)
    axes.set_xlim(0, 1.25 * longest)  # room for the numbers
    ticks = MaxNLocator(6, steps=_TICK_STEPS).tick_values(0, longest)
    axes.set_xticks([tick for tick in ticks if tick <= min(100, 1.25 * longest)])
    axes.set_xlabel(label, fontsize=_TEXT)
    axes.set_ylabel("true → predicted class\n(training images)", fontsize=_TEXT)
    axes.tick_params(axis="y", length=0)
    _tidy(axes, grid=False)  # it would run through the numbers
    _add_title(figure, f"Largest confusions of the {model}", results)
    return figure


def _confusion_shares(results: dict[str, Any], model: str) -> np.ndarray:
    """Return the row-normalised confusion matrix in percent; rows without test images are nan."""
    tested = np.asarray(results["data"]["eval_class_counts"], dtype=float)
    shares = np.diag(_class_accuracies(results[model]))
    for true, predicted, number in results[model]["confusions"]:
        shares[true, predicted] = 100 * number / tested[true]
    shares[tested == 0] = np.nan
    return shares


# ---- Methods --------------------------------------------------------------------------------------------------------


def save_comparison_plots(comparison: Comparison, folder: str | os.PathLike[str]) -> list[Path]:
    """Draw `comparison.png` and, where a method has a teacher, `teacher_and_student.png`.

    Args:
        comparison: Methods × seeds.
        folder: Where to.

    Returns:
        The paths of the figures.
    """
    figures = {"comparison": plot_comparison(comparison)}
    if any(_distilled(comparison, method) for method in comparison.methods):
        figures["teacher_and_student"] = plot_teacher_and_student(comparison)
    paths = []
    for name, figure in figures.items():
        paths.append(Path(folder) / f"{name}.png")
        figure.savefig(paths[-1], dpi=_DPI, facecolor="white")
    return paths


def plot_comparison(comparison: Comparison) -> Figure:
    """Draw each metric of each method: a dot for every seed, the mean, and its standard deviation as a bar.

    Args:
        comparison: Methods × seeds.

    Returns:
        The figure; one axes for each metric that any cell has.
    """
    metrics, methods = comparison.shown_metrics(), comparison.methods
    rows = -(-len(metrics) // 3)
    figure = Figure(figsize=(_WIDTH, 1.2 + rows * (0.8 + 0.24 * len(methods))), dpi=_DPI, layout="constrained")
    all_axes = figure.subplots(rows, 3, squeeze=False, sharey=True).flat
    for axes, metric in itertools.zip_longest(all_axes, metrics):
        if metric is None:
            axes.set_axis_off()
            continue
        lowest, highest = 100.0, 0.0
        for y, method in enumerate(methods):
            estimate = comparison.estimate(method, metric)
            if estimate is None:
                continue
            values = list(comparison.values(method, metric).values())
            if len(values) > 1:
                axes.plot(values, [y] * len(values), "o", color=_NEUTRAL, markersize=3, alpha=0.7, zorder=2)
            colour = _COLOURS["student"] if method.startswith("bkd") else _COLOURS["teacher"]
            style = {"fmt": "D", "color": colour, "markersize": 5, "capsize": 2, "linewidth": 1.2}
            axes.errorbar(estimate.mean, y, xerr=estimate.std, **style)
            lowest, highest = min(lowest, *values), max(highest, *values)
        axes.set_title(f"{metric} (%)" + (", lower is better" if metric == "ECE" else ""), fontsize=_TEXT)
        axes.set_yticks(range(len(methods)), [_shortened(m, 40) for m in methods], fontsize=_SMALL, parse_math=False)
        axes.set_ylim(len(methods) - 0.4, -0.6)
        room = max(0.15 * (highest - lowest), 2.0)
        axes.set_xlim(max(-1.0, lowest - room), min(101.0, highest + room))
        _tidy(axes, grid=False)
        axes.grid(color="#dddddd", linewidth=0.6)
    seeds = sorted({comparison.num_seeds(method) for method in methods})
    number = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    figure.supxlabel(
        "diamond: mean over seeds; bar: its standard deviation; dots: the seeds" if seeds[-1] > 1 else "one seed",
        x=0.01, ha="left", fontsize=_SMALL, color="#555555",
    )  # fmt: skip
    figure.suptitle(
        f"Methods on {_shortened(comparison.data['name'], 40)}, {number} seed{'s' if seeds[-1] > 1 else ''} each",
        x=0.01, ha="left", fontsize=_TITLE, fontweight="bold", parse_math=False,
    )  # fmt: skip
    return figure


def plot_teacher_and_student(comparison: Comparison) -> Figure:
    """Draw each class's accuracy with the student over that with its teacher, a panel for each distilled method.

    Means over seeds; above the diagonal the student is better. Colours and markers are the groups of classes.

    Args:
        comparison: Methods × seeds, at least one of them distilled.

    Returns:
        The figure.
    """
    data = comparison.data
    groups = shot_groups(data["class_counts"], data["many_shot_threshold"], data["few_shot_threshold"])
    methods = [method for method in comparison.methods if _distilled(comparison, method)]
    columns = min(3, len(methods))
    rows = -(-len(methods) // columns)
    figure = Figure(figsize=(max(5.5, _WIDTH * columns / 3), 1.3 + 2.7 * rows), dpi=_DPI, layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    styles = {"many_shot": ("#0072B2", "o"), "medium_shot": ("#009E73", "s"), "few_shot": ("#D55E00", "^")}
    for axes, method in itertools.zip_longest(all_axes, methods):
        if method is None:
            axes.set_axis_off()
            continue
        cells = _distilled(comparison, method)
        teacher, student = (
            np.mean([_class_accuracies(results[model]) for results in cells], axis=0)
            for model in ("teacher", "student")
        )
        axes.plot([0, 100], [0, 100], color=_NEUTRAL, linewidth=0.8, zorder=1)
        for name, group in groups.items():
            colour, marker = styles[name]
            style = {"color": colour, "marker": marker, "s": 14, "alpha": 0.7, "linewidths": 0, "zorder": 2}
            axes.scatter(teacher[group], student[group], label=name.replace("_", "-"), **style)
        axes.set_title(_shortened(method), fontsize=_TEXT, parse_math=False)
        axes.set_xlim(-4, 104)
        axes.set_xticks(range(0, 101, 20))
        _scale_to_percent(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=_SMALL)
    for axes in figure.axes[-columns:]:
        axes.set_xlabel("teacher (%)", fontsize=_TEXT)
    figure.supylabel("student (%)", fontsize=_TEXT)
    figure.suptitle(
        f"Accuracy of each class: {_shortened(data['name'], 40)}",
        x=0.01, ha="left", fontsize=_TITLE, fontweight="bold", parse_math=False,
    )  # fmt: skip
    return figure


def _distilled(comparison: Comparison, method: str) -> list[dict[str, Any]]:
    return [results for results in comparison.cells[method].values() if results.get("teacher")]


# ---- All -----------------------------------------------------------------------------------------------------------


def _models(results: dict[str, Any]) -> list[str]:
    return [model for model in ("teacher", "student") if results.get(model)]


def _point_style(model: str) -> dict[str, Any]:
    return {"label": model, "color": _COLOURS[model], "linestyle": "none", "zorder": 3, **_MARKERS[model]}


def _line_style(model: str) -> dict[str, Any]:
    return _point_style(model) | {"linestyle": _LINES[model], "linewidth": 1.7}


def _largest_first(class_counts: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.argsort(-np.asarray(class_counts), kind="stable")


def _percent(fractions: Sequence[float | None]) -> np.ndarray:
    return 100 * np.array(fractions, dtype=float)  # None becomes nan


def _class_accuracies(model_results: dict[str, Any]) -> np.ndarray:
    return _percent(model_results["metrics"]["per_class_accuracy"])


def _shortened(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _add_title(figure: Figure, title: str, results: dict[str, Any]) -> None:
    models = "; ".join(f"{model}: {_shortened(results[model]['model'], 45)}" for model in _models(results))
    title = f"{title}: {_shortened(results['data']['name'], 40)}"
    # `parse_math`: names are the user's, a dollar sign in them is one.
    figure.suptitle(title, x=0.01, ha="left", fontsize=_TITLE, fontweight="bold", parse_math=False)
    figure.supxlabel(models, x=0.01, ha="left", fontsize=_SMALL, color="#555555", parse_math=False)


def _set_names(axes: Axes, axis: str, positions: Sequence[int], names: list[str], room: float | None = None) -> None:
    """Label an axis with names, slanted if they do not fit into `room` (inches each)."""
    slanted = room is not None and not _fit(names, room)
    slant: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    set_ticks = axes.set_xticks if axis == "x" else axes.set_yticks
    set_ticks(positions, names, fontsize=_SMALL, parse_math=False, **slant)


def _fit(texts: list[str], room: float) -> bool:
    """Return whether small texts fit beside each other, into `room` (inches) each."""
    width = 0.65 * _SMALL / 72  # of a character
    return all((len(text) + 1) * width <= room for text in texts)


def _scale_to_percent(axes: Axes) -> None:
    axes.set_ylim(-4, 104)  # room for markers at 0 and 100
    axes.set_yticks(range(0, 101, 20))
    _tidy(axes)


def _tidy(axes: Axes, grid: bool = True) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_SMALL)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis="y", color="#cccccc", linewidth=0.6)
