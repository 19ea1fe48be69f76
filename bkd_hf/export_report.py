"""What is told of an export, from the section `export` of `results.json`: a line, a table, a figure."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from .figures import COLOURS, DPI, GREEN, ORANGE, SMALL, WIDTH, add_title, tidy
from .text import figure as figure_text

FIGURE_NAME = "latency.png"
#: Of the models, in the order in which they are told of.
_TITLES = {"teacher": "teacher (torch)", "student": "student (torch)", "onnx": "student (ONNX)",
           "int8": "student (ONNX, int8)"}  # fmt: skip
_LOOKS = {"teacher": (COLOURS["teacher"], "o"), "student": (COLOURS["student"], "D"), "onnx": (GREEN, "s"),
          "int8": (ORANGE, "^")}  # fmt: skip
_GROUPS = ("accuracy", "many_shot_accuracy", "medium_shot_accuracy", "few_shot_accuracy")


def _models(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured of each model, with its metrics."""
    found = results["export"]["models"]
    of_teacher = {"metrics": (results["teacher"] or {}).get("metrics", {})}
    return {name: {**of_teacher, **found[name]} for name in _TITLES if name in found}


def table(results: dict[str, Any]) -> list[list[str]]:
    """Return size, time and accuracy of each model as rows for the card, the first of which is the header."""
    models = _models(results)
    known = [key for key in _GROUPS if key in models["student"]["metrics"]]
    names = [key.removesuffix("_accuracy").replace("_", "-").replace("accuracy", "overall") for key in known]
    rows = [["", "MB", "ms for 1 image", "for 32", *names]]
    for name, model in models.items():
        times = [f"{1000 * model['seconds'][batch]:.3g}" for batch in ("1", "32")]
        accuracies = [f"{100 * model['metrics'][key]:.1f}" if key in model["metrics"] else "–" for key in known]
        rows.append([_TITLES[name], f"{model['bytes'] / 1e6:.3g}", *times, *accuracies])
    return rows


def summary(results: dict[str, Any]) -> str:
    """Return a line for the terminal."""
    header, *rows = table(results)
    about = (f"{row[0]}: {', '.join(f'{value} {name}' for name, value in zip(header[1:], row[1:], strict=True))}"
             for row in rows)  # fmt: skip
    difference = results["export"]["largest_logit_difference"]
    return f"Logits differ from torch's by {difference:.1g} at most. {'; '.join(about)}."


def plot_latency(results: dict[str, Any]) -> Figure:
    """Draw accuracy (percent; few-shot, or over all images where no class is) against the time for one image.

    The time is on a log scale, in milliseconds on the CPU that the results name; beside each model is its size.
    """
    models, about = _models(results), results["export"]
    key = "few_shot_accuracy" if "few_shot_accuracy" in models["student"]["metrics"] else "accuracy"
    figure = Figure(figsize=(WIDTH, 3.6), dpi=DPI, layout="constrained")
    threads = f"{about['cpu_threads']} thread{'s' if about['cpu_threads'] > 1 else ''}"
    title = f"Accuracy and time of an answer: {figure_text(results['data']['name'], 40)}"
    add_title(figure, title, f"{figure_text(about['device'], 60)}, {threads}")
    axes = figure.add_subplot()
    drawn = {name: model for name, model in models.items() if key in model["metrics"]}
    for name, model in drawn.items():
        colour, marker = _LOOKS[name]
        point = 1000 * max(model["seconds"]["1"], 1e-9), 100 * model["metrics"][key]
        label = f"{_TITLES[name]}, {model['bytes'] / 1e6:.3g} MB"
        axes.plot(*point, marker=marker, color=colour, markersize=8, linestyle="none", label=label, zorder=3)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.25)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, (low + high) / 2 - 2), max(high, (low + high) / 2 + 2))
    axes.set_xlabel("milliseconds for one image")
    axes.set_ylabel("few-shot accuracy (%)" if key != "accuracy" else "test accuracy (%)")
    axes.tick_params(which="minor", labelsize=SMALL)
    figure.legend(loc="outside right upper", fontsize=SMALL, frameon=False)
    tidy(axes, "both")
    return figure
