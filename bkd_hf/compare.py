"""Runs a comparison, methods × seeds, each cell as a process of its own, and writes its tables and figures."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .arguments import parse_arguments
from .comparison import BASELINES, METRICS, Comparison
from .config import BKDConfig
from .errors import InputError
from .machine import available_cores
from .objective import METHODS, RECOMMENDED
from .options import RunArguments
from .plots import save_comparison_plots
from .results import load_results, told_arguments
from .run_folder import run_state
from .text import code, markdown, spreadsheet

_TIMED_STEPS = 24
# A comparison decides about these itself.
_NOT_FOR_CELLS = {
    "--method": "use --methods",
    "--seed": "use --seeds",
    "--output_dir": "give it once",
    "--overwrite": "delete the folders of the cells that are to run anew",
    "--resume_from_checkpoint": "an interrupted cell resumes by itself",
    "--max_steps": "use --num_train_epochs",
    "--push_to_hub": "push the cells that you choose by scripts/publish.py",
}
_CE_IS_TEACHER = "the teacher of a seed is that seed's ce cell"


# ---- The cells ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One run: a method with a seed.

    Attributes:
        method: A preset.
        seed: Seed of its training.
        folder: Its output folder.
        script: Path of `run_bkd.py`.
        options: Further options of `run_bkd.py`, the same for all cells.
        teacher: The cell whose student is this one's teacher.
    """

    method: str
    seed: int
    folder: Path
    script: Path
    options: tuple[str, ...]
    teacher: Cell | None = None

    @property
    def name(self) -> str:
        """For messages, e.g. "kd seed 1"."""
        return f"{self.method} seed {self.seed}"

    def arguments(self) -> list[str]:
        """Return the command line for `run_bkd.py`."""
        teacher = ["--teacher_model_name_or_path", str(self.teacher.folder)] if self.teacher else []
        own = ["--method", self.method, "--seed", str(self.seed), "--output_dir", str(self.folder)]
        return [*self.options, *own, *teacher]

    def command(self, launcher: Sequence[str] = ()) -> str:
        """Return the command: without secrets, and of places outside of the current folder the names alone."""
        words = [str(self.script), *told_arguments(self.arguments(), lambda value, _: value)]
        return shlex.join([*(launcher or ["python"]), *map(_seen_from_here, words)])

    def parse(self) -> RunArguments:
        """Parse the command line; raises an `InputError` if it cannot work."""
        return parse_arguments(self.arguments(), digits_recipe=self.script.with_name("recipes") / "digits.yaml")

    def state(self) -> str:
        """Return `"new"`, `"interrupted"` or `"finished"`; raises an `InputError` if the folder holds another run."""
        return run_state(self.parse())


def plan_cells(
    methods: Sequence[str], seeds: Sequence[int], output_dir: Path, script: Path, options: Sequence[str] = ()
) -> list[Cell]:
    """List the cells, seed by seed, with those that are needed as teachers, each teacher before its students.

    Args:
        methods: Presets.
        seeds: Seeds of the training; the data split is the same for all.
        output_dir: Where the cells' folders go: METHOD/seedSEED.
        script: Path of `run_bkd.py`.
        options: Options of `run_bkd.py` for all cells.

    Raises:
        InputError: If a method is unknown, something comes twice, or an option is not for all cells.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise InputError(f"--methods: there is no {', '.join(unknown)}; choose from {', '.join(METHODS)}.")
    for name, values in (("methods", list(methods)), ("seeds", list(seeds))):
        if len(set(values)) < len(values):
            raise InputError(f"--{name} {' '.join(map(str, values))}: each may be given once.")
    for token in options:
        option = token.split("=")[0].replace("-", "_").replace("__", "--", 1)
        why_not = _CE_IS_TEACHER if option.startswith("--teacher_") else _NOT_FOR_CELLS.get(option)
        if why_not:
            raise InputError(f"{option} cannot be set for a comparison: {why_not}.")

    def cell(method: str, seed: int) -> Cell:
        preset = METHODS[method]
        teacher = cell(preset.teacher, seed) if preset.distillation_loss != "none" else None
        return Cell(method, seed, output_dir / method / f"seed{seed}", script, tuple(options), teacher)

    for method in methods:
        arguments = replace(cell(method, seeds[0]), teacher=None).parse()
        if arguments.model.teacher_model_name_or_path is not None or arguments.teacher_options:
            raise InputError(
                f"The section `teacher:` of --config cannot be used in a comparison: {_CE_IS_TEACHER}. Take it out."
            )
    wanted = [cell(method, seed) for seed in seeds for method in methods]
    return list(dict.fromkeys(each for cell in wanted for each in (cell.teacher, cell) if each))


@dataclass
class CellRunner:
    """Runs cells, as many at a time as asked for, and says how they fare.

    Attributes:
        logs: Folder for what the cells print.
        launcher: What is put before the script, e.g. `accelerate launch --num_processes 2`; plain Python if empty.
        jobs: Cells at a time. They share the CPU cores, and take turns on the GPUs.
        say: Called with each message.
    """

    logs: Path
    launcher: Sequence[str] = ()
    jobs: int = 1
    say: Callable[[str], None] = print

    def run(self, cells: Sequence[Cell]) -> list[str]:
        """Run what is not finished yet; a cell that fails does not stop the others.

        Returns:
            A line for each cell that failed, or could not run because its teacher failed.
        """
        states = {cell: cell.state() for cell in cells}  # raises before anything has run
        todo = [cell for cell in cells if states[cell] != "finished"]
        for cell in cells:
            if cell not in todo:
                self.say(f"{cell.name}: finished before. {_summary(cell)}")
        self.logs.mkdir(parents=True, exist_ok=True)
        started, num_todo = time.monotonic(), len(todo)
        failures: dict[Cell, str] = {}
        running: dict[Cell, subprocess.Popen] = {}
        slots: dict[Cell, int] = {}  # whose GPU
        try:
            while todo or running:
                for cell in list(todo):
                    log = self._log(cell)
                    if cell.teacher in failures:
                        todo.remove(cell)
                        failures[cell] = f"{cell.name}: not run, as its teacher ({cell.teacher.name}) failed."
                        self.say(failures[cell])
                    elif len(running) < self.jobs and cell.teacher not in (*todo, *running):
                        todo.remove(cell)
                        verb = "continues" if states[cell] == "interrupted" else "starts"
                        self.say(f"{cell.name} {verb} (log: {log})")
                        slots[cell] = min({*range(self.jobs)} - {slots[other] for other in running})
                        running[cell] = self._start(cell, log, slots[cell])
                time.sleep(0.05)
                for cell in [cell for cell, process in running.items() if process.poll() is not None]:
                    code, log = running.pop(cell).returncode, self._log(cell)
                    if code == 0:
                        outcome = f"finished. {_summary(cell)}"
                    else:
                        why = f"killed by signal {-code}" if code < 0 else _last_error(log)
                        outcome = f"failed: {why} (exit code {code}, log: {log})"
                        failures[cell] = f"{cell.name}: {outcome}"
                    num_left = len(todo) + len(running)
                    left = (time.monotonic() - started) / max(1, num_todo - num_left) * num_left
                    remaining = f"; {num_left} to go, about {duration(left)}" if num_left else ""
                    self.say(f"[{num_todo - num_left}/{num_todo}] {cell.name} {outcome}{remaining}")
        except BaseException:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
            raise
        return list(failures.values())

    def _start(self, cell: Cell, log: Path, slot: int = 0, options: Sequence[str] = ()) -> subprocess.Popen:
        words = [*(self.launcher or [sys.executable]), str(cell.script), *cell.arguments(), *options]
        words += ["--disable_tqdm", "true"]
        if self.jobs > 1 and not self.launcher and not any(word.startswith("--num_threads") for word in cell.options):
            words += ["--num_threads", str(max(1, available_cores() // self.jobs))]
        environment = {**os.environ, **({} if self.launcher else _one_gpu(slot))}
        with log.open("a", encoding="utf-8") as file:
            return subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def _log(self, cell: Cell) -> Path:
        return self.logs / f"{cell.method}-seed{cell.seed}.log"

    def estimate(self, cells: Sequence[Cell]) -> dict[str, float]:
        """Seconds that each unfinished cell will take, from a few steps of one method without and one with a teacher.

        Raises:
            InputError: If the timed runs fail.
        """
        todo = [cell for cell in cells if cell.state() != "finished"]
        timed: dict[bool, float] = {}
        with tempfile.TemporaryDirectory() as scratch:
            # What has a teacher is timed after what is its teacher.
            for distils in sorted({False, *(cell.teacher is not None for cell in todo)} if todo else ()):
                example = next(cell for cell in cells if (cell.teacher is not None) == distils)
                timed[distils] = self._time(example, Path(scratch))
        return {cell.name: timed[cell.teacher is not None] for cell in todo}

    def _time(self, cell: Cell, scratch: Path) -> float:
        teacher = cell.teacher and replace(cell.teacher, folder=scratch / "teacher")
        folder, log = scratch / ("student" if teacher else "teacher"), scratch / f"{cell.name}.log"
        window = _TIMED_STEPS // 3
        steps = [
            "--max_steps", str(_TIMED_STEPS), "--logging_strategy", "steps", "--logging_steps", str(window),
            "--eval_strategy", "no", "--save_strategy", "no",
            "--force_distillation",  # the teacher is hardly trained
        ]  # fmt: skip
        started = time.monotonic()
        process = self._start(replace(cell, folder=folder, teacher=teacher), log, options=steps)
        try:
            failed = process.wait()
        finally:
            process.kill()
        if failed:
            raise InputError(f"--dry_run: {_TIMED_STEPS} steps of {cell.method} failed: {_last_error(log)}")
        wall = time.monotonic() - started
        results, args = load_results(folder), cell.parse().training
        student, num_processes = results["student"], results["hardware"]["num_processes"]
        times = [entry["elapsed_seconds"] for entry in student["history"] if "loss" in entry]
        per_step = (times[-1] - times[0]) / (_TIMED_STEPS - window)
        images_per_step = args.train_batch_size * args.gradient_accumulation_steps * num_processes
        num_steps = args.num_train_epochs * math.ceil(results["data"]["num_train_images"] / images_per_step)
        evaluated = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
        evaluating = float(evaluated["eval_runtime"]) * _num_evaluations(args)
        return wall - student["training"]["seconds"] + evaluating + per_step * num_steps


def _seen_from_here(path: str) -> str:
    """Return an absolute path from the current folder on, of one outside of it the name; other text as it is."""
    if not os.path.isabs(path):
        return path
    inside = os.path.relpath(path)
    return f"…/{os.path.basename(path)}" if inside.startswith(os.pardir) else inside


def duration(seconds: float) -> str:
    """E.g. "3 h 5 min", "12 min", "40 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _summary(cell: Cell) -> str:
    metrics = load_results(cell.folder)["student"]["metrics"]
    few = f", few-shot {100 * metrics['few_shot_accuracy']:.1f}" if "few_shot_accuracy" in metrics else ""
    return f"Overall {100 * metrics['accuracy']:.1f} %{few}"


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return ([line for line in lines if "error" in line.lower()] or lines or ["it printed nothing"])[-1]


def _num_evaluations(args: BKDConfig) -> float:
    """How often a run evaluates, the last time after training included."""
    strategy = str(args.eval_strategy.value)
    if strategy == "epoch":
        return args.num_train_epochs + 1
    if strategy == "steps" and args.eval_steps and args.eval_steps < 1:
        return 1 / args.eval_steps + 1
    return 1


def _one_gpu(slot: int) -> dict[str, str]:
    """A GPU for each cell: a process that sees several would split its batches among them."""
    if torch.cuda.device_count() < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}


# ---- The tables -----------------------------------------------------------------------------------------------------


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
    paths = [folder / name for name in ("comparison.md", "comparison.csv", "cells.csv")]
    paths[0].write_text(to_markdown(comparison, [path.name for path in figures], notes), encoding="utf-8")
    _write_csv(paths[1], _summary_rows(comparison))
    _write_csv(paths[2], _cell_rows(comparison))
    return [*paths, *figures]


def to_markdown(comparison: Comparison, figures: Sequence[str] = (), notes: Sequence[str] = ()) -> str:
    """Return the tables as Markdown."""
    data, shown, methods = comparison.data, comparison.shown_metrics(), comparison.methods
    counts, head = data["class_counts"], ["method", "n", *shown]
    if comparison.differing_options:
        differing = [f"{code(k)} is {markdown(' or '.join(v))}" for k, v in comparison.differing_options.items()]
        notes = [f"**Not all methods were run with the same options**: {'; '.join(differing)}.", *notes]

    def means(methods: Sequence[str], post_hoc: bool = False) -> str:
        rows = [
            [
                markdown(method),
                comparison.num_seeds(method),
                *(comparison.estimate(method, name, post_hoc) for name in shown),
            ]
            for method in methods
        ]
        return _table(head, rows)

    parts = [
        f"# Methods compared on {markdown(data['name'])}",
        f"{data['num_train_images']:,} training images of {len(counts)} classes, {max(counts):,} to {min(counts):,} "
        f"each; {data['num_eval_images']:,} test images. {_how(comparison)}",
        *notes,
        "Accuracy and expected calibration error (ECE) in %, last epoch, never the best on the test set; mean ± "
        "standard deviation (n − 1) over n seeds.",
        means(methods),
    ]
    for baseline in BASELINES:
        rows = []
        for method in [method for method in methods if method != baseline and baseline in methods]:
            differences = [comparison.difference(method, baseline, name) for name in shown]
            n = getattr(comparison.difference(method, baseline, "overall"), "n", 0)
            rows.append([markdown(method), n, *differences])
        if rows:
            parts += [
                f"## Differences to `{baseline}`",
                "Percentage points, paired by seed; in brackets the 95 % confidence interval (Student's t, n ≥ 2).",
                _table(head, rows),
            ]
    adjusted = [method for method in methods if not comparison.adjusts_itself(method)]
    adjusted = [method for method in adjusted if comparison.estimate(method, "overall", post_hoc=True)]
    if adjusted:
        students = [results["student"] for results in comparison.all_cells()]
        taus = {student["post_hoc_metrics"]["tau"] for student in students if student.get("post_hoc_metrics")}
        parts += [
            f"## After post-hoc logit adjustment (τ = {', '.join(f'{tau:g}' for tau in sorted(taus))})",
            "The same models; the logarithm of the training frequencies is taken off their logits. Methods that "
            "correct for the frequencies while training would be corrected twice, and are left out (cells.csv has "
            "them).",
            means(adjusted, post_hoc=True),
        ]
    if verdict := _against_what_is_free(comparison):
        parts += ["## Against what costs nothing", verdict]
    parts += [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures]
    return "\n\n".join(parts) + "\n"


def _against_what_is_free(comparison: Comparison) -> str | None:
    """Say which methods are not better overall than `ce`, as it is and after post-hoc adjustment; `None` without."""
    others = [method for method in comparison.methods if method != "ce"]
    if not others or "ce" not in comparison.methods:
        return None
    beaten = []
    for method in others:
        values = comparison.values(method, "overall")
        free: list[tuple[float, float, str]] = []  # mean of ce, of the method over the same seeds, and the name
        for name, post_hoc in (("`ce`", False), ("`ce` after post-hoc adjustment", True)):
            theirs = comparison.values("ce", "overall", post_hoc)
            if seeds := values.keys() & theirs.keys():
                best, mean = (float(np.mean([each[seed] for seed in seeds])) for each in (theirs, values))
                free.append((best, mean, name))
        best, mean, name = max(free, key=lambda each: each[0], default=(-math.inf, 0.0, ""))
        if mean <= best:
            beaten.append(f"{code(method)} ({mean:.1f} against {best:.1f} of {name})")
    if not beaten:
        return "Every method is better overall than `ce`, as it is and after post-hoc adjustment, over the same seeds."
    return (
        "**Not better overall than what needs no training beyond `ce`**, over the same seeds: "
        f"{', '.join(beaten)}. Longer training, or --method {RECOMMENDED}, may help."
    )


def _how(comparison: Comparison) -> str:
    """Model, length, precision, hardware and versions, as far as all cells share them."""

    def shared(*keys: str) -> str:
        found = set()
        for results in comparison.all_cells():
            for key in keys:
                results = results.get(key, {})
            found.add(f"{results:g}" if isinstance(results, float) else markdown(results or "unknown"))
        return " / ".join(sorted(found))

    versions = ", ".join(f"{name} {shared('versions', name)}" for name in ("torch", "transformers", "accelerate"))
    return (
        f"Student {shared('student', 'model')}, {shared('student', 'training', 'epochs')} epochs, "
        f"{shared('hardware', 'precision')}, on {shared('hardware', 'device')} "
        f"(processes: {shared('hardware', 'num_processes')}, CPU threads: {shared('hardware', 'cpu_threads')}); "
        f"{versions}."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join("–" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def _summary_rows(comparison: Comparison) -> list[dict[str, Any]]:
    rows = []
    for method in comparison.methods:
        for metric in comparison.shown_metrics():
            row: dict[str, Any] = {"method": method, "metric": metric}
            for prefix, post_hoc in (("", False), ("post_hoc_", True)):
                estimate = comparison.estimate(method, metric, post_hoc)
                row |= {f"{prefix}{part}": getattr(estimate, part, None) for part in ("mean", "std")}
            row["n"] = getattr(comparison.estimate(method, metric), "n", 0)
            for baseline in BASELINES:
                difference = comparison.difference(method, baseline, metric)
                for part in ("mean", "low", "high", "n"):
                    row[f"difference_to_{baseline}_{part}"] = getattr(difference, part, None)
            rows.append(row)
    return rows


def _cell_rows(comparison: Comparison) -> list[dict[str, Any]]:
    rows = []
    for method in comparison.methods:
        for seed, results in sorted(comparison.cells[method].items()):
            student = results["student"]
            row: dict[str, Any] = {"method": method, "seed": seed}
            for prefix, metrics in (("", student["metrics"]), ("post-hoc ", student.get("post_hoc_metrics") or {})):
                row |= {f"{prefix}{name}": 100 * metrics.get(key, math.nan) for name, key in METRICS.items()}
            rows.append(row | {"training seconds": student.get("training", {}).get("seconds")})
    return rows


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    def rounded(value: Any) -> Any:
        return ("" if math.isnan(value) else round(value, 4)) if isinstance(value, float) else value

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({name: spreadsheet(rounded(value)) for name, value in row.items()} for row in rows)
