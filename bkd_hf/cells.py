"""The cells of a comparison, methods × seeds: their options, and the processes that run them."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .arguments import DIGITS_RECIPE, parse_arguments
from .comparison import SHARED_TEACHERS
from .config import BKDConfig, method_defaults
from .data import LABEL_COLUMN
from .errors import STOPPED, InputError, TrainingStopped
from .files import holder_of, is_open_in_a_run
from .given_teacher import match_teacher, warn_of_unused_options
from .inputs import load_splits
from .machine import available_cores
from .methods import METHODS
from .models import FRESH_IMAGE_SIZE
from .options import NOT_FOR_TEACHER, RunArguments
from .program import program
from .results import describe_data, effective_batch_size, load_results, told_arguments
from .run_folder import identity_of, run_state
from .tasks import fresh_task
from .text import duration

_TIMED_STEPS = 24
# Seconds for a cell to finish its step and save a checkpoint.
_PATIENCE = 60.0
# Options that the comparison sets itself.
_NOT_FOR_CELLS = {
    "--method": "use --methods",
    "--seed": "use --seeds",
    "--teacher_seed": "a teacher has the seed of its students",
    "--output_dir": "give it once",
    "--overwrite": "delete the folders of the cells that are to run anew",
    "--resume_from_checkpoint": "an interrupted cell resumes by itself",
    "--max_steps": "use --num_train_epochs; only with --streaming it is needed",
    "--push_to_hub": f"push the cells that you choose by {' '.join(program('publish'))}",
}
#: Options that belong to a run in its own folder.
_OWN_OF_CELLS = {"method", "seed", "output_dir", "run_name", "hub_model_id", "push_to_hub", "config"}
_KINDS = ("plain", "teacher", "distilling")


@dataclass(frozen=True)
class Cell:
    """One run: a method with a seed.

    Attributes:
        method: A preset.
        seed: Seed of its training.
        folder: Its output folder.
        script: Path of the script of a run; `None`: the command `run` of the package.
        options: Further options of a run, the same for all cells.
        teacher: The cell whose student is this cell's teacher.
        is_teacher: Whether it only trains a teacher shared by other cells, and is not a row of the tables.
    """

    method: str
    seed: int
    folder: Path
    script: Path | None
    options: tuple[str, ...]
    teacher: Cell | None = None
    is_teacher: bool = False

    @property
    def name(self) -> str:
        """For messages, e.g. "kd seed 1"."""
        return f"{'teacher ' if self.is_teacher else ''}{self.method} seed {self.seed}"

    @property
    def kind(self) -> str:
        """What determines its duration: one of `_KINDS`."""
        return "teacher" if self.is_teacher else "distilling" if _distils(self.method) else "plain"

    def arguments(self) -> list[str]:
        """Return the options of the run."""
        teacher = ["--teacher_model_name_or_path", str(self.teacher.folder)] if self.teacher else []
        if self.teacher and self.teacher.is_teacher:
            teacher += ["--finetune_teacher", "false"]  # already done
        own = ["--method", self.method, "--seed", str(self.seed), "--output_dir", str(self.folder)]
        return [*self.options, *own, *teacher]

    def started_by(self, launcher: Sequence[str]) -> list[str]:
        """Return what comes before its options."""
        return [*launcher, *(["-m", "bkd_hf", "run"] if self.script is None else [str(self.script)])]

    def command(self, launcher: Sequence[str] = ()) -> str:
        """Return the command without secrets, and with only the names of paths outside the current folder."""
        words = [*self.started_by(launcher or ["python"]), *told_arguments(self.arguments(), lambda value, _: value)]
        return shlex.join(map(_seen_from_here, words))

    def parse(self) -> RunArguments:
        """Parse the command line; raises an `InputError` if it is invalid."""
        return parse_arguments(self.arguments(), digits_recipe=DIGITS_RECIPE)

    def state(self, data: dict[str, Any] | None = None) -> str:
        """Return `"new"`, `"interrupted"` or `"finished"`; raises an `InputError` if the folder holds another run.

        Args:
            data: The `data` section of the results of all cells, if known.
        """
        arguments = self.parse()
        identity = None if data is None else identity_of(arguments, data)
        return run_state(arguments, identity, is_to_train=False)  # any number of processes may train it


def plan_cells(
    methods: Sequence[str], seeds: Sequence[int], output_dir: Path, script: Path | None, options: Sequence[str] = ()
) -> list[Cell]:
    """List the cells, seed by seed, including the teachers they need, each teacher before its students.

    Args:
        methods: Presets.
        seeds: Seeds of the training; the data split is the same for all.
        output_dir: Parent folder of the cells' folders METHOD/seedSEED.
        script: Path of the script of a run; `None`: the command `run` of the package.
        options: Options of a run, for all cells.

    Raises:
        InputError: If a method is unknown, something is given twice, or an option cannot be set for all cells.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise InputError(f"--methods: there is no {', '.join(unknown)}; choose from {', '.join(METHODS)}.")
    for name, values in (("methods", list(methods)), ("seeds", list(seeds))):
        if len(set(values)) < len(values):
            raise InputError(f"--{name} {' '.join(map(str, values))}: each may be given once.")
    given = [token.split("=")[0].replace("-", "_").replace("__", "--", 1) for token in options]
    for option in given:
        if option in _NOT_FOR_CELLS and option != "--max_steps":  # which streams need
            raise InputError(f"{option} cannot be set for a comparison: {_NOT_FOR_CELLS[option]}.")
        if option.startswith("--teacher_") and not any(map(_distils, methods)):
            distilling = ", ".join(filter(_distils, METHODS))
            raise InputError(
                f"{option}: none of --methods {' '.join(methods)} has a teacher. Leave it out, or add one that has: "
                f"{distilling}."
            )

    def cell(method: str, seed: int) -> Cell:
        return Cell(method, seed, output_dir / method / f"seed{seed}", script, tuple(options))

    told = {method: cell(method, seeds[0]).parse() for method in methods}
    for option, why in _NOT_FOR_CELLS.items():
        name, arguments = option.removeprefix("--"), told[methods[0]]
        is_allowed = option == "--max_steps" and arguments.data.streaming
        is_set = name.startswith("teacher_") or arguments.options.get(name) not in (None, False, -1)
        is_recipes = name in arguments.from_recipe and is_set
        if (is_recipes or option in given) and not is_allowed:
            where = f"{name} in the recipe" if is_recipes else option
            raise InputError(f"{where} cannot be set for a comparison: {why}.")
    source = next((_source_of_teacher(told[method]) for method in methods if _distils(method)), None)

    def with_teacher(method: str, seed: int) -> Cell:
        found = cell(method, seed)
        if source is None or not _distils(method):
            return found
        teacher = cell(told[method].for_teacher().training.method, seed)
        if source:
            folder = output_dir / SHARED_TEACHERS / teacher.method / f"seed{seed}"
            teacher = replace(teacher, folder=folder, options=(*options, *source), is_teacher=True)
            # Alone on a command line, it would have other defaults, and options that are about its students.
            wanted, alone = told[method].for_teacher().options, teacher.parse().options
            preset = {name: value for name, value in method_defaults(teacher.method).items() if wanted[name] is None}
            shared = _OWN_OF_CELLS | NOT_FOR_TEACHER
            wanted = {name: value for name, value in {**wanted, **preset}.items() if name not in shared}
            is_fresh = fresh_task(wanted["model_name_or_path"]) == "image"
            if wanted["image_size"] is None and is_fresh:
                wanted["image_size"] = FRESH_IMAGE_SIZE  # as in a run; alone, digits would be smaller
            elif wanted["image_size"] is None and alone["image_size"] is not None:
                raise InputError(
                    f"--image_size {alone['image_size']} is for the students: say in which size the teacher is "
                    "fine-tuned, by --teacher_image_size."
                )
            own = [_words(name, value) for name, value in wanted.items() if value not in (None, alone[name])]
            teacher = replace(teacher, options=(*teacher.options, *(word for words in own for word in words)))
        return replace(found, teacher=teacher)

    wanted = [with_teacher(method, seed) for seed in seeds for method in methods]
    return list(dict.fromkeys(each for cell in wanted for each in (cell.teacher, cell) if each))


def _distils(method: str) -> bool:
    return METHODS[method].distillation_loss != "none"


def _source_of_teacher(arguments: RunArguments) -> tuple[str, ...] | None:
    """Return the options for training a cell's teacher, beside those of all cells.

    Empty without such options: the teacher is then the cell of its method. `None` if no teacher is trained, as a given
    one can be used unchanged.
    """
    name = arguments.model.teacher_model_name_or_path
    if arguments.model.given_teacher is not None:
        classes = load_splits(arguments)["train"].features[LABEL_COLUMN]
        if not match_teacher(arguments, classes.names).why_trained:
            warn_of_unused_options(arguments)
            return None
    alone = dict(arguments.teacher_options)
    if name is not None:
        alone = {"model_name_or_path": name, "model_revision": arguments.for_teacher().model.model_revision, **alone}
    alone.pop("method", None)  # the cell has its own
    return tuple(word for option, value in alone.items() for word in _words(option, value))


def _words(option: str, value: Any) -> list[str]:
    """Return an option as command-line words."""
    if isinstance(value, list):
        return [f"--{option}", *map(str, value)]
    return [f"--{option}={json.dumps(value) if isinstance(value, dict) else value}"]


@dataclass
class CellRunner:
    """Runs cells, several at a time if asked for, and reports their progress.

    Attributes:
        logs: Folder for the output of the cells.
        launcher: Words before the script, e.g. `accelerate launch --num_processes 2`; plain Python if empty.
        jobs: Cells at a time. They share the CPU cores, and are distributed over the GPUs.
        say: Called with each message.
    """

    logs: Path
    launcher: Sequence[str] = ()
    jobs: int = 1
    say: Callable[[str], None] = print
    _log_begins: dict[Cell, int] = field(default_factory=dict, init=False)  # of the last start of a cell

    def run(self, cells: Sequence[Cell]) -> list[str]:
        """Run the unfinished cells; a cell that fails does not stop the others.

        Returns:
            A line for each cell that failed, or could not run because its teacher failed.

        Raises:
            TrainingStopped: If SIGTERM stopped a cell or this process; all cells are stopped then.
        """
        data = self._data(cells) if any(cell.folder.exists() for cell in cells) else None
        states = {cell: cell.state(data) for cell in cells}  # raises before anything runs
        todo = [cell for cell in cells if states[cell] != "finished"]
        for cell in cells:
            if cell not in todo:
                self.say(f"{cell.name}: finished before. {_summary(cell)}")
        self.logs.mkdir(parents=True, exist_ok=True)
        for cell in todo:
            with self._log(cell).open("a") as file:
                if is_open_in_a_run(file):
                    who = holder_of(cell.folder) or "a process that has just begun"
                    raise InputError(f"{cell.name} still runs ({who}): wait for it, or end it, and start again.")
        started, num_todo = time.monotonic(), len(todo)
        failures: dict[Cell, str] = {}
        running: dict[Cell, subprocess.Popen] = {}
        slots: dict[Cell, int] = {}  # GPU of each cell
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
                ended = [cell for cell, process in running.items() if process.poll() is not None]
                if any(self._was_stopped(cell, running[cell]) for cell in ended):
                    raise TrainingStopped
                for cell in ended:
                    code, log = running.pop(cell).returncode, self._log(cell)
                    if code == 0:
                        outcome = f"finished. {_summary(cell)}"
                    else:
                        begin = self._log_begins[cell]
                        why = f"killed by signal {-code}" if code < 0 else _last_error(log, begin)
                        outcome = f"failed: {why} (exit code {code}, log: {log})"
                        failures[cell] = f"{cell.name}: {outcome}"
                    num_left = len(todo) + len(running)
                    left = (time.monotonic() - started) / max(1, num_todo - num_left) * num_left
                    remaining = f"; {num_left} to go, about {duration(left)}" if num_left else ""
                    self.say(f"[{num_todo - num_left}/{num_todo}] {cell.name} {outcome}{remaining}")
        except SystemExit:
            _end(running.values())
            stopped = [cell.name for cell, process in running.items() if self._was_stopped(cell, process)]
            if not stopped:
                raise
            open_ones = {*todo, *failures, *(cell for cell, process in running.items() if process.returncode)}
            finished = [cell.name for cell in cells if cell not in open_ones]
            done = f"{len(finished)} of {len(cells)} cells are finished"
            self.say(f"Stopped: {', '.join(stopped)}. {done}{': ' if finished else ''}{', '.join(finished)}.")
            raise TrainingStopped from None
        finally:
            _end(running.values())  # if this was interrupted
        return list(failures.values())

    def _was_stopped(self, cell: Cell, process: subprocess.Popen) -> bool:
        """Whether SIGTERM stopped a cell so that it can be continued; launchers have their own exit codes."""
        if not process.returncode or not self.launcher:
            return process.returncode == STOPPED
        lines = self._log(cell).read_bytes()[self._log_begins[cell] :].splitlines()
        return any(line.startswith(b"stopped: ") for line in lines)

    def _data(self, cells: Sequence[Cell]) -> dict[str, Any] | None:
        """The `data` section of the results, shared by all cells."""
        arguments = cells[0].parse()
        options = arguments.data
        thresholds = options.many_shot_threshold, options.few_shot_threshold
        try:
            splits = load_splits(arguments)
            return describe_data(options.dataset_name, splits["train"], splits["eval"], *thresholds)
        except InputError as error:
            self.say(f"WARNING: Nobody knows whether the examples of finished cells are still the same: {error}")
            return None

    def _start(self, cell: Cell, log: Path, slot: int = 0, options: Sequence[str] = ()) -> subprocess.Popen:
        words = [*cell.started_by(self.launcher or [sys.executable]), *cell.arguments(), *options]
        words += ["--disable_tqdm", "true"]
        if self.jobs > 1 and not self.launcher and cell.parse().model.num_threads is None:
            words += ["--num_threads", str(max(1, available_cores() // self.jobs))]
        environment = {**os.environ, **({} if self.launcher else _one_gpu(slot))}
        with log.open("a", encoding="utf-8") as file:
            is_open_in_a_run(file)  # from here on, as long as the cell, or its launcher, lives
            self._log_begins[cell] = file.tell()
            # Its own process group, which can be ended with everything a launcher started.
            return subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def _log(self, cell: Cell) -> Path:
        return self.logs / f"{cell.name.replace(' seed ', '-seed').replace(' ', '-')}.log"

    def estimate(self, cells: Sequence[Cell]) -> dict[str, float]:
        """Estimate the seconds of each unfinished cell from a few steps of one of each kind: without, as, and with a
        teacher.

        Raises:
            InputError: If the timed runs fail.
        """
        todo = [cell for cell in cells if cell.state() != "finished"]
        needed = {each.kind: each for cell in reversed(todo) for each in (cell, cell.teacher) if each}
        with tempfile.TemporaryDirectory() as scratch:
            # Students are timed after their teachers.
            timed = {kind: self._time(needed[kind], Path(scratch)) for kind in _KINDS if kind in needed}
        return {cell.name: timed[cell.kind] for cell in todo}

    def _time(self, cell: Cell, scratch: Path) -> float:
        teacher = cell.teacher and replace(cell.teacher, folder=scratch / cell.teacher.kind)
        folder, log = scratch / cell.kind, scratch / f"{cell.name}.log"
        window = _TIMED_STEPS // 3
        steps = [
            "--max_steps", str(_TIMED_STEPS), "--logging_strategy", "steps", "--logging_steps", str(window),
            "--eval_strategy", "no", "--save_strategy", "no",
            "--force_distillation", *(["--force_teacher"] if cell.teacher else []),  # which is hardly trained
        ]  # fmt: skip
        started = time.monotonic()
        process = self._start(replace(cell, folder=folder, teacher=teacher), log, options=steps)
        try:
            failed = process.wait()
        finally:
            _end([process])
        if failed:
            raise InputError(f"--dry_run: {_TIMED_STEPS} steps of {cell.method} failed: {_last_error(log)}")
        wall = time.monotonic() - started
        results, args = load_results(folder), cell.parse().training
        student = results["student"]
        times = [entry["elapsed_seconds"] for entry in student["history"] if "loss" in entry]
        per_step = (times[-1] - times[0]) / (_TIMED_STEPS - window)
        steps_per_epoch = math.ceil(results["data"]["num_train_images"] / effective_batch_size(results))
        num_steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * steps_per_epoch
        evaluated = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
        evaluating = float(evaluated["eval_runtime"]) * _num_evaluations(args, num_steps)
        return wall - student["training"]["seconds"] + evaluating + per_step * num_steps


def _end(processes: Iterable[subprocess.Popen]) -> None:
    """End cells with all their processes: first by SIGTERM, after a while by force."""
    left, deadline = list(processes), time.monotonic() + _PATIENCE
    for way in (signal.SIGTERM, signal.SIGKILL):
        for process in left:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, way)
        while left and (way == signal.SIGKILL or time.monotonic() < deadline):
            left = [process for process in left if process.poll() is None]
            time.sleep(0.05)


def _seen_from_here(path: str) -> str:
    """Return an absolute path relative to the current folder, only its name if outside; other text unchanged."""
    if not os.path.isabs(path):
        return path
    inside = os.path.relpath(path)
    return f"…/{os.path.basename(path)}" if inside.startswith(os.pardir) else inside


def _summary(cell: Cell) -> str:
    metrics = load_results(cell.folder)["student"]["metrics"]
    few = f", few-shot {100 * metrics['few_shot_accuracy']:.1f}" if "few_shot_accuracy" in metrics else ""
    return f"Overall {100 * metrics['accuracy']:.1f} %{few}"


def _last_error(log: Path, begin: int = 0) -> str:
    """Return the line of a log, from this byte on, that says why; a launcher may print more about it."""
    text = log.read_bytes()[begin:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours, any_error = ([line for line in lines if re.match(e, line)] for e in ("error: ", "(?i).*error"))
    return (ours or any_error or lines or ["it printed nothing"])[-1]


def _num_evaluations(args: BKDConfig, num_steps: float) -> float:
    """How often a run evaluates, including after training."""
    strategy = str(args.eval_strategy.value)
    if strategy == "epoch":
        return args.num_train_epochs + 1
    if strategy == "steps" and args.eval_steps:
        return (1 if args.eval_steps < 1 else num_steps) / args.eval_steps + 1
    return 1


def _one_gpu(slot: int) -> dict[str, str]:
    """Give each cell one GPU: a process that sees several would split its batches among them."""
    if torch.cuda.device_count() < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}
