"""Reports of an export, from the section `export` of `results.json`: lines, a table, a figure."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .figures import COLOURS, DPI, GREEN, ORANGE, SMALL, WIDTH, add_title, tidy
from .results import ONNX_FILES
from .text import figure as figure_text

FIGURE_NAME = "latency.png"
#: Titles of the models, in the order of the reports.
_TITLES = {"teacher": "teacher (torch)", "student": "student (torch)", "onnx": "student (ONNX)",
           "int8": "student (ONNX, int8)"}  # fmt: skip
_LOOKS = {"teacher": (COLOURS["teacher"], "o"), "student": (COLOURS["student"], "D"), "onnx": (GREEN, "s"),
          "int8": (ORANGE, "^")}  # fmt: skip
_GROUPS = ("accuracy", "many_shot_accuracy", "medium_shot_accuracy", "few_shot_accuracy")
_MUCH_LOST = 2.0  # points of accuracy


def _name(key: str) -> str:
    return "overall" if key == "accuracy" else key.removesuffix("_accuracy").replace("_", "-")


def _models(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Measurements of each model, with its metrics."""
    found = results["export"]["models"]
    of_teacher = {"metrics": (results["teacher"] or {}).get("metrics", {})}
    return {name: {**of_teacher, **found[name]} for name in _TITLES if name in found}


def share_asked(results: dict[str, Any]) -> str:
    """Return a sentence if not all evaluation images were used; otherwise an empty string."""
    asked, known = results["export"].get("num_eval_images"), results["data"]["num_eval_images"]
    if asked in (None, known):
        return ""
    return f"The student was asked about {asked:,} of {known:,} test images, of each class in proportion."


def table(results: dict[str, Any]) -> list[list[str]]:
    """Return size, time and accuracy of each model as rows for the card; the first row is the header."""
    models = _models(results)
    known = [key for key in _GROUPS if key in models["student"]["metrics"]]
    rows = [["", "MB", "ms for 1 image", "for 32", *map(_name, known)]]
    for name, model in models.items():
        times = [f"{1000 * model['seconds'][batch]:.3g}" for batch in ("1", "32")]
        accuracies = [f"{100 * model['metrics'][key]:.1f}" if key in model["metrics"] else "–" for key in known]
        rows.append([_TITLES[name], f"{model['bytes'] / 1e6:.3g}", *times, *accuracies])
    return rows


def lines(results: dict[str, Any]) -> list[str]:
    """Return the same for the terminal, with the largest logit difference."""
    header, *rows = table(results)
    difference = results["export"]["largest_logit_difference"]
    told = [f"ONNX: logits as torch's, to {difference:.1g}. Accuracies in %, times on this CPU:"]
    told += filter(None, [share_asked(results)])
    for title, size, one, many, *accuracies in rows:
        groups = ", ".join(f"{name} {value}" for name, value in zip(header[4:], accuracies, strict=True))
        told.append(f"{title}: {size} MB, {one} ms for 1 image, {many} for 32; {groups}")
    exact, rounded = (results["export"]["models"][name]["metrics"] for name in ("onnx", "int8"))
    lost = {key: 100 * (exact[key] - rounded.get(key, 0.0)) for key in _GROUPS if key in exact}
    if worse := [f"{points:.1f} points {_name(key)}" for key, points in lost.items() if points >= _MUCH_LOST]:
        told.append(f"WARNING: int8 loses {', '.join(worse)}: use {ONNX_FILES['onnx']} where that matters.")
    return told


def plot_latency(results: dict[str, Any]) -> Figure:
    """Draw accuracy (percent; few-shot, or overall without few-shot classes) against the time for one image.

    The time is on a log scale, in milliseconds on the CPU named in the results; each model's size is beside it.
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
    axes.set_ylim(max(-4, min(low, (low + high) / 2 - 2)), min(104, max(high, (low + high) / 2 + 2)))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("milliseconds for one image")
    axes.set_ylabel("few-shot accuracy (%)" if key != "accuracy" else "test accuracy (%)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=SMALL, frameon=False)
    tidy(axes, "both")
    return figure
