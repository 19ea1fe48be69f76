"""Runs the cells of a comparison, methods × seeds, each as a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import torch

from .arguments import parse_arguments
from .config import BKDConfig
from .errors import InputError
from .machine import available_cores
from .objective import METHODS
from .options import RunArguments
from .results import load_results
from .run_folder import run_state

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
        if option in _NOT_FOR_CELLS:
            raise InputError(f"{option} cannot be set for a comparison: {_NOT_FOR_CELLS[option]}.")
        if option.startswith("--teacher_"):
            raise InputError(f"{option} cannot be set for a comparison: the teacher of a seed is that seed's ce cell.")

    def cell(method: str, seed: int) -> Cell:
        preset = METHODS[method]
        teacher = cell(preset.teacher, seed) if preset.distillation_loss != "none" else None
        return Cell(method, seed, output_dir / method / f"seed{seed}", script, tuple(options), teacher)

    for method in dict.fromkeys(methods):
        arguments = Cell(method, seeds[0], output_dir, script, tuple(options)).parse()
        if arguments.model.teacher_model_name_or_path is not None or arguments.teacher_options:
            raise InputError(
                "The section `teacher:` of --config cannot be used in a comparison: the teacher of a seed is that "
                "seed's ce cell. Take it out."
            )

    planned: dict[str, Cell] = {}
    for seed in seeds:
        for method in methods:
            wanted = cell(method, seed)
            for each in (wanted.teacher, wanted):
                if each is not None:
                    planned.setdefault(each.name, each)
    return list(planned.values())


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
    _processes: set[subprocess.Popen] = field(default_factory=set)

    def run(self, cells: Sequence[Cell]) -> list[str]:
        """Run what is not finished yet; a cell that fails does not stop the others.

        Returns:
            A line for each cell that failed, or could not run because its teacher failed.
        """
        states = {cell.name: cell.state() for cell in cells}  # raises before anything has run
        done = {name for name, state in states.items() if state == "finished"}
        for cell in cells:
            if cell.name in done:
                self.say(f"{cell.name}: finished before. {_summary(cell)}")
        todo = [cell for cell in cells if cell.name not in done]
        failures: dict[str, str] = {}
        self.logs.mkdir(parents=True, exist_ok=True)
        started, num_todo = time.monotonic(), len(todo)
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(self.jobs):
            slots.put(slot)
        running: dict[Future[int], Cell] = {}
        with ThreadPoolExecutor(self.jobs) as executor:
            try:
                while todo or running:
                    for cell in list(todo):
                        if cell.teacher and cell.teacher.name in failures:
                            todo.remove(cell)
                            failures[cell.name] = f"{cell.name}: not run, as its teacher ({cell.teacher.name}) failed."
                            self.say(failures[cell.name])
                        elif len(running) < self.jobs and (cell.teacher is None or cell.teacher.name in done):
                            todo.remove(cell)
                            verb = "continues" if states[cell.name] == "interrupted" else "starts"
                            self.say(f"{cell.name} {verb} (log: {self._log(cell)})")
                            running[executor.submit(self._run_cell, cell, slots)] = cell
                    for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                        cell = running.pop(future)
                        code = future.result()
                        if code == 0:
                            done.add(cell.name)
                            outcome = f"finished. {_summary(cell)}"
                        else:
                            why = f"killed by signal {-code}" if code < 0 else _last_error(self._log(cell))
                            outcome = f"failed: {why} (exit code {code}, log: {self._log(cell)})"
                            failures[cell.name] = f"{cell.name}: {outcome}"
                        num_left = len(todo) + len(running)
                        elapsed = time.monotonic() - started
                        left = elapsed / max(1, num_todo - num_left) * num_left
                        remaining = f"; {num_left} to go, about {duration(left)}" if num_left else ""
                        self.say(f"[{num_todo - num_left}/{num_todo}] {cell.name} {outcome}{remaining}")
            except BaseException:
                for process in self._processes:
                    process.terminate()
                raise
        return list(failures.values())

    def _run_cell(self, cell: Cell, slots: SimpleQueue[int]) -> int:
        slot = slots.get()
        try:
            with self._log(cell).open("a", encoding="utf-8") as log:
                return self._call(cell, log, slot)
        finally:
            slots.put(slot)

    def _call(self, cell: Cell, log: IO[str], slot: int = 0, options: Sequence[str] = ()) -> int:
        launcher = list(self.launcher) or [sys.executable]
        environment = {**os.environ, **({} if self.launcher else _one_gpu(slot))}
        process = subprocess.Popen(
            [*launcher, str(cell.script), *cell.arguments(), *options, "--disable_tqdm", "true", *self._threads(cell)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        self._processes.add(process)
        try:
            return process.wait()
        finally:
            self._processes.discard(process)

    def _threads(self, cell: Cell) -> list[str]:
        if self.jobs == 1 or self.launcher or any(option.startswith("--num_threads") for option in cell.options):
            return []
        return ["--num_threads", str(max(1, available_cores() // self.jobs))]

    def _log(self, cell: Cell) -> Path:
        return self.logs / f"{cell.method}-seed{cell.seed}.log"

    # ---- How long it will take ------------------------------------------------------------------------------------

    def estimate(self, cells: Sequence[Cell]) -> dict[str, float]:
        """Seconds that each unfinished cell will take, from a few steps of one method without and one with a teacher.

        Raises:
            InputError: If the timed runs fail.
        """
        todo = [cell for cell in cells if cell.state() != "finished"]
        seconds: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as scratch:
            timed: dict[bool, float] = {}
            for distils in sorted({False, *(cell.teacher is not None for cell in todo)} if todo else ()):
                examples = [cell for cell in cells if (cell.teacher is not None) == distils]
                timed[distils] = self._time(examples[0], Path(scratch), teacher=Path(scratch, "False"))
            for cell in todo:
                seconds[cell.name] = timed[cell.teacher is not None]
        return seconds

    def _time(self, cell: Cell, scratch: Path, teacher: Path) -> float:
        folder = scratch / str(cell.teacher is not None)
        log_path = scratch / f"{cell.name}.log"
        window = _TIMED_STEPS // 3
        timed = replace(cell, folder=folder, teacher=cell.teacher and replace(cell.teacher, folder=teacher))
        steps = [
            "--max_steps", str(_TIMED_STEPS), "--logging_strategy", "steps", "--logging_steps", str(window),
            "--eval_strategy", "no", "--save_strategy", "no",
            "--force_distillation",  # the teacher is hardly trained
        ]  # fmt: skip
        started = time.monotonic()
        with log_path.open("w", encoding="utf-8") as log:
            if self._call(timed, log, options=steps):
                raise InputError(f"--dry_run: {_TIMED_STEPS} steps of {cell.method} failed: {_last_error(log_path)}")
        wall = time.monotonic() - started
        results = load_results(folder)
        history = [entry for entry in results["student"]["history"] if "loss" in entry]
        per_step = (history[-1]["elapsed_seconds"] - history[0]["elapsed_seconds"]) / (_TIMED_STEPS - window)
        args = cell.parse().training
        evaluating = _eval_seconds(folder) * _num_evaluations(args)
        per_epoch = results["data"]["num_train_images"] / (args.train_batch_size * args.gradient_accumulation_steps)
        per_epoch /= results["hardware"]["num_processes"]
        starting = wall - results["student"]["training"]["seconds"]
        return starting + evaluating + per_step * args.num_train_epochs * -(-per_epoch // 1)


def _eval_seconds(folder: Path) -> float:
    """Return how long the last evaluation of a run took."""
    return float(json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))["eval_runtime"])


def duration(seconds: float) -> str:
    """E.g. "3 h 5 min", "12 min", "40 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def shown_command(cell: Cell, launcher: Sequence[str] = ()) -> str:
    """Return the command of a cell, to be copied."""
    return shlex.join([*(launcher or ["python"]), os.path.relpath(cell.script), *cell.arguments()])


def _summary(cell: Cell) -> str:
    metrics = load_results(cell.folder)["student"]["metrics"]
    few = f", few-shot {100 * metrics['few_shot_accuracy']:.1f}" if "few_shot_accuracy" in metrics else ""
    return f"Overall {100 * metrics['accuracy']:.1f} %{few}"


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it printed nothing"])[-1]


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
