"""`bkd-hf compare`: compares methods over seeds, all on the same code path."""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import sys

from ..cells import CellRunner, plan_cells
from ..compare import save_comparison, to_markdown
from ..comparison import METRICS, load_comparison
from ..errors import InputError, run_script
from ..files import lock
from ..program import path_given, program, script_of
from ..results import RESULTS_NAME, describe_command, without_folders
from ..text import code, duration, markdown, one_line, printable


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the comparison, and those for every cell."""
    parser = argparse.ArgumentParser(
        description="Run methods × seeds, one process a cell, and tabulate what they reach. An interrupted comparison "
        "goes on with the same command. All other options (--config, --dataset_name, --bf16, …) go to the runs. "
        "The teacher of a seed is its ce cell; or the one that --teacher_model_name_or_path gives; or, by "
        "--teacher_OPTION or a section `teacher:` in the recipe, one that is trained for it and "
        "shared by all methods that distil.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--methods", nargs="+", default=["ce", "kd", "bkd"], metavar="METHOD", help="Presets.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="Training seeds.")
    parser.add_argument(
        "--output_dir",
        type=path_given,
        help="Where cells, tables and figures go; with --from its first folder if not given.",
    )
    parser.add_argument("--launcher", default="", help='Put before the script: "accelerate launch --num_processes 2".')
    parser.add_argument("--jobs", type=int, default=1, help="Cells that run at the same time.")
    parser.add_argument("--dry_run", action="store_true", help="Show the plan, and how long it will take.")
    parser.add_argument(
        "--sort",
        choices=[name.replace(" ", "_") for name in METRICS],
        help="Order the methods by the mean of this metric, the best first; not given: from simple to elaborate.",
    )
    parser.add_argument(
        "--from",
        dest="folders",
        nargs="+",
        type=path_given,
        metavar="DIR",
        help="Only tabulate the results.json files in these folders; nothing is run.",
    )
    options, rest = parser.parse_known_args(argv)
    if options.jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {options.jobs}.")
    if options.folders and rest:
        raise InputError(f"{' '.join(rest)}: with --from nothing is run, so options of a run have no effect.")
    for name in ("methods", "seeds", "launcher", "jobs", "dry_run"):
        if options.folders and getattr(options, name) != parser.get_default(name):
            raise InputError(f"--{name}: with --from nothing is run, so it has no effect. Leave it out.")
    try:
        options.launcher = shlex.split(options.launcher)
    except ValueError as error:
        raise InputError(f"--launcher {options.launcher}: {error}.") from error
    if options.launcher and shutil.which(options.launcher[0]) is None:
        raise InputError(f"--launcher {options.launcher[0]}: there is no such program.")
    if options.output_dir is None:
        if not options.folders:
            raise InputError("--output_dir is needed: the folder for cells, tables and figures.")
        first = options.folders[0]
        options.output_dir = first.parent if first.is_file() else first
    return options, rest


def main() -> int:
    """Compare; exit code 1 if a cell failed, 2 for bad input, 75 if SIGTERM stopped one."""

    def work() -> int:
        options, rest = parse()
        return tabulate(options) if options.folders else compare(options, rest)

    return run_script(work, "the same command goes on with the cells that are not finished")


def tabulate(options: argparse.Namespace, notes: list[str] | None = None) -> int:
    """Write the tables and figures of finished cells."""
    comparison = load_comparison(options.folders, options.sort and options.sort.replace("_", " "))
    command = describe_command(sys.argv[1:], called_by=program("compare"))
    notes = [*(notes or []), f"Made by {code(command)}."]
    paths = save_comparison(comparison, options.output_dir, notes)
    print(to_markdown(comparison, notes=notes))
    print(printable("Written: " + ", ".join(map(str, paths))))
    return 0


def compare(options: argparse.Namespace, rest: list[str]) -> int:
    """Run the unfinished cells, and tabulate all; SIGTERM ends the cells too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cells = plan_cells(options.methods, options.seeds, options.output_dir, script_of("run"), rest)
    runner = CellRunner(
        logs=options.output_dir / "logs",
        launcher=options.launcher,
        jobs=options.jobs,
        say=lambda message: print(one_line(message), flush=True),
    )
    if options.dry_run:
        for cell in cells:
            print(printable(f"{cell.state():11}  {cell.command(runner.launcher)}"))
        print("Timing a few steps …", flush=True)
        seconds = runner.estimate(cells)
        for name, value in seconds.items():
            print(f"{name}: about {duration(value)}")
        print(f"In all about {duration(sum(seconds.values()))}, one cell at a time.")
        return 0
    options.output_dir.mkdir(parents=True, exist_ok=True)
    lock(options.output_dir)
    _check_earlier_seeds(options, rest)
    failures = runner.run(cells)
    for line in failures:
        print(f"error: {one_line(line)}", file=sys.stderr)
    if any((cell.folder / RESULTS_NAME).exists() for cell in cells if not cell.is_teacher):
        # Includes the methods of earlier comparisons in the same folder.
        options.folders = [options.output_dir]
        tabulate(options, [f"**Missing**: {markdown(without_folders(line))}" for line in failures])
    return 1 if failures else 0


def _check_earlier_seeds(options: argparse.Namespace, rest: list[str]) -> None:
    """Refuse, before anything runs, options that finished seeds of the same methods do not have."""
    finished = [
        path for method in options.methods for path in options.output_dir.glob(f"{method}/seed*/{RESULTS_NAME}")
    ]
    names = {path.parent.name.removeprefix("seed") for path in finished}
    earlier = sorted({int(name) for name in names if name.isdigit()} - {*options.seeds})
    for cell in plan_cells(options.methods, earlier, options.output_dir, script_of("run"), rest) if earlier else ():
        if (cell.folder / RESULTS_NAME).exists():
            cell.state()
