"""The report of a benchmark: tables, Markdown and a figure, from what `bkd_hf.benchmark` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .benchmark import CONTESTANTS
from .results import save_json

#: A table: title, head, rows.
Table = tuple[str, list[str], list[list[str]]]


def save_benchmark(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write `benchmark.json`, `benchmark.md` and, if steps were profiled, `benchmark.png`; return their paths."""
    paths = [folder / "benchmark.json", folder / "benchmark.md"]
    save_json(results, paths[0])
    has_figure = any(measured["contestants"] for measured in results["settings"].values())
    paths[1].write_text(to_markdown(results, "benchmark.png" if has_figure else None), encoding="utf-8")
    if has_figure:
        paths.append(folder / "benchmark.png")
        plot_steps(results).savefig(paths[-1], dpi=150, facecolor="white")
    return paths


def tables(results: dict[str, Any]) -> list[Table]:
    """Return what was measured as tables, the ratios first."""
    found = [("Ratios", ["", "setting", "measured", "range", "target", "reached"], _ratio_rows(results["ratios"]))]
    for name, measured in results["settings"].items():
        setting, images = (
            measured["setting"],
            "JPEG files" if measured["setting"]["from_files"] else "images in memory",
        )
        models = f"{setting['student']} from {setting['teacher']}, {setting['image_size']} px"
        rows = [[_titled(who), *_rate_cells(contestant)] for who, contestant in measured["contestants"].items()]
        rows += [[_titled(who), f"– ({reason})", *[""] * 4] for who, reason in measured["skipped"].items()]
        head = ["", "images/s", "range", "ms/step", "batch", "peak memory"]
        found.append((f"{name}: {models}, {measured['num_images']:,} {images}", head, rows))
    if "pipeline" in results:
        names = {"decoder": "JPEG files to RGB", "loader": "BKDTrainer's training data"}
        rows = [[names[who], *_rate_cells(measured)[:2]] for who, measured in results["pipeline"].items()]
        found.append(("Input pipeline alone, 224 px", ["", "images/s", "range"], rows))
    if results["projections"]:
        head = ["", "images", "classes", "epochs", "hours", "on 8", "cached", "on 8", "cache", "decoded"]
        title = "On paper: hours of a student with its teacher"
        found.append((title, head, [_projection_row(projection) for projection in results["projections"]]))
    if "scale" in results:
        found.append(("Scale", ["", "time", "memory"], _scale_rows(results["scale"])))
    return found


def _titled(contestant: str) -> str:
    return f"{CONTESTANTS[contestant][0]}  {contestant}"


def _ratio_rows(ratios: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for ratio in ratios:
        unit = f" {ratio['unit']}".rstrip()
        overhead = ratio.get("overhead_seconds_per_step")
        extra = "" if overhead is None else f" ({1000 * overhead:+.1f} ms a step)"
        target = f"{'≥' if ratio['at_least'] else '≤'} {ratio['target']}{unit}" if ratio["target"] is not None else ""
        rows.append(
            [
                ratio["name"],
                ratio["setting"],
                f"{ratio['value']:.2f}{unit}{extra}",
                f"{ratio['low']:.2f} to {ratio['high']:.2f}",
                target,
                {None: "", True: "yes", False: "NO"}[ratio["reached"]],
            ]
        )
    return rows


def _rate_cells(measured: dict[str, Any]) -> list[str]:
    rate = measured["images_per_second"]
    processes = f"{measured['num_processes']} × " if measured["num_processes"] > 1 else ""
    return [
        f"{rate['median']:,.1f}",
        f"{rate['min']:,.1f}–{rate['max']:,.1f}",
        f"{1000 * measured['seconds_per_step']['median']:,.1f}",
        str(measured["global_batch_size"]),
        f"{processes}{measured['peak_memory'] / 1e9:.2f} GB",
    ]


def _projection_row(projection: dict[str, Any]) -> list[str]:
    hours = [projection.get(kind, {}).get(devices) for kind in ("hours", "cached_hours") for devices in ("1", "8")]
    return [
        projection["name"],
        *(f"{projection[name]:,}" for name in ("num_images", "num_classes", "epochs")),
        *("–" if value is None else f"{value:,.2g}" if value < 10 else f"{value:,.0f}" for value in hours),
        *(f"{projection[name] / 1e9:,.2f} GB" for name in ("cache_size", "decoded_size")),
    ]


def _scale_rows(scale: dict[str, Any]) -> list[list[str]]:
    counted = f"{scale['num_images']:,} images × {scale['num_classes']:,} classes"
    tested = f"{scale['num_tested']:,} images × {scale['num_tested_classes']:,} classes"
    memory = f"{scale['metrics_peak_memory'] / 1e9:.2f} GB beyond the logits"
    return [
        [f"counting classes, {counted}", f"{scale['counting_seconds']:.3f} s", ""],
        [f"the same in a shuffled selection, {counted}", f"{scale['counting_shuffled_seconds']:.3f} s", ""],
        [f"long_tail_metrics, {tested}", f"{scale['metrics_seconds']:.1f} s", memory],
    ]


def to_markdown(results: dict[str, Any], figure: str | None = None) -> str:
    """Return the report; `figure` is the path of the picture in it."""
    hardware, options = results["hardware"], results["options"]
    threads = f"{hardware['cpu_threads']} CPU thread{'s' if hardware['cpu_threads'] > 1 else ''}"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    ratios = dict.fromkeys((ratio["name"], ratio["meaning"]) for ratio in results["ratios"])
    parts = [
        "# Benchmark",
        f"{hardware['device']}, {threads}, {hardware['precision']}; {versions}. Made by `{results['command']}`.",
        f"Rates are medians over {options['windows']} windows of about {options['window_seconds']:g} s, after a "
        "warm-up. Contestants take turns, a window each, in processes of their own whose data workers are frozen in "
        "between; a ratio is the median over turns, each compared within itself. All but c run in the precision "
        "above, with channels-last convolutions, in a process set up as `run_bkd.py` sets up its own. Peak memory is "
        "that of a process without its data workers, or what it allocated on the GPU.",
        "\n".join(f"- **{letter}** ({name}): {meaning}" for name, (letter, meaning) in CONTESTANTS.items()),
        "\n".join(f"- **{name}**: {meaning}" for name, meaning in ratios),
    ]
    if results["projections"]:
        parts.append(
            "On paper, models and rates are those above (of cifar for CIFAR-100-LT, of resnet18 for all others); 8 "
            "devices are eight times as fast, unless several GPUs were measured; *cached* is with the teacher cache "
            "of 16 views, in float16, filled on the way; *decoded* is the memory that all images would take: if it is "
            "not there, they are decoded when they are seen."
        )
    for title, head, rows in tables(results):
        lines = [head, ["---"] * len(head), *rows]
        parts += [f"## {title}", "\n".join(f"| {' | '.join(cells)} |" for cells in lines)]
    if figure is not None:
        parts += ["## Where the time of a step goes", f"![Time of a step by its parts]({figure})"]
    return "\n\n".join(parts) + "\n"


# Okabe and Ito's colours, as in the other figures.
_PART_STYLES = {
    "data": ("waiting for data", "#E69F00"),
    "teacher": ("teacher", "#0072B2"),
    "student": ("student forward, loss", "#D55E00"),
    "backward": ("backward", "#CC79A7"),
    "optimizer": ("optimizer", "#009E73"),
    "overhead": ("all else (the Trainer)", "#8c8c8c"),
}


def plot_steps(results: dict[str, Any]) -> Figure:
    """Draw where the time of a step goes: a stacked bar for each contestant, a panel for each setting.

    The bars are of windows of their own, in which every part was timed; a black line marks the median time of a step
    in the windows without, so that the cost of looking shows.
    """
    settings = {name: measured for name, measured in results["settings"].items() if measured["contestants"]}
    heights = [len(measured["contestants"]) for measured in settings.values()]
    figure = Figure(
        figsize=(8.0, 1.3 + sum(0.45 * height + 0.75 for height in heights)), dpi=150, layout="constrained"
    )
    panels = figure.subplots(len(settings), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, measured) in zip(panels, settings.items(), strict=True):
        contestants = measured["contestants"]
        rows, left = range(len(contestants)), np.zeros(len(contestants))
        for part, (label, colour) in _PART_STYLES.items():
            widths = 1000 * np.array([contestant["parts"][part] for contestant in contestants.values()])
            axes.barh(rows, widths, left=left, height=0.7, color=colour, label=label)
            left += widths
        medians = [1000 * contestant["seconds_per_step"]["median"] for contestant in contestants.values()]
        bottoms, tops = (np.array(rows) + side for side in (-0.42, 0.42))
        axes.vlines(medians, bottoms, tops, color="black", linewidth=1.5, label="not instrumented (median)")
        axes.set_yticks(rows, [_titled(who) for who in contestants], fontsize=8)
        axes.invert_yaxis()
        setting = measured["setting"]
        title = f"{name}: {setting['student']} from {setting['teacher']}, {setting['image_size']} px"
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("milliseconds per optimizer step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Where the time of a step goes", x=0.01, ha="left", fontsize=11, fontweight="bold")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure
