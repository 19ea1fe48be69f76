"""Faults by the dozen, for hours rather than for the suite; exit code 1 if anything failed.

    python tests/campaign.py [kills|disk|checkpoints|caches|options|results] --seed N --output DIR

Without a section, all of them. Prints what failed, and how much was tried, held and failed of each kind.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}

from bkd_hf.files import LOCK_NAME
from tests.campaign_options import CASES, Case
from tests.campaign_results import mutations, read_by_all
from tests.faults import CHEAP, DAMAGES, RECIPE, Run, damage, interrupt, main_of, paint, refused_in_one_line, run

from tests.faults import same_outcome, small_disk, start_two, weights  # isort: skip

#: What was tried, and a check that raises if it does not hold.
Checks = Iterator[tuple[str, Callable[[], None]]]


def finish(*argv: Any, folder: Path) -> str:
    """Run to the end; return what was said."""
    code, said = run(*argv, "--output_dir", folder)
    assert code == 0, said
    return said


def kills(output: Path, seed: int, number: int = 20) -> Checks:
    """Kill −9 at random times, one process or two, and go on: weights and losses are those of a run without a kill."""
    generator = random.Random(seed)

    def start(processes: int, folder: Path) -> list[Run]:
        argv = (*CHEAP, "--output_dir", folder)
        return [Run(*argv)] if processes == 1 else start_two(*argv)

    def check(processes: int, folder: Path, after: float) -> None:
        runs = start(processes, folder)
        time.sleep(after)
        for each in runs:
            each.kill()
        for each in runs:
            each.wait()
        for each in start(processes, folder):
            assert each.wait() == 0, each.output
        same_outcome(folder, output / f"whole{processes}")

    for processes, count in ((1, number), (2, max(1, number // 4))):
        started = time.monotonic()
        for each in start(processes, output / f"whole{processes}"):
            assert each.wait() == 0, each.output
        seconds = time.monotonic() - started
        for index in range(count):
            after, folder = generator.uniform(0.1, seconds), output / f"{processes}-{index}"
            yield f"{processes} process(es), after {after:.2f} s", functools.partial(check, processes, folder, after)


def disk(output: Path, seed: int) -> Checks:
    """Points at which a disk is full: one line says so, and the same command goes on when there is room."""
    finish(*CHEAP, folder=output / "whole")

    def limited(folder: Path, size: int) -> None:
        refused_in_one_line(*run(*CHEAP, "--output_dir", folder, file_size=size))
        finish(*CHEAP, folder=folder)
        same_outcome(folder, output / "whole")

    def full(folder: Path, kilobytes: int) -> None:
        with small_disk(folder, kilobytes) as enlarge:
            refused_in_one_line(*run(*CHEAP, "--output_dir", folder / "run"))
            enlarge()
            finish(*CHEAP, folder=folder / "run")
            same_outcome(folder / "run", output / "whole")

    for size in (0, 30, 500, 5000, 100_000, 306_000):
        yield f"files of up to {size} bytes", functools.partial(limited, output / f"limit{size}", size)
    for kilobytes in (4, 16, 200, 700, 1000, 2000, 2500):
        yield f"a disk of {kilobytes} kB", functools.partial(full, output / f"disk{kilobytes}", kilobytes)


def checkpoints(output: Path, seed: int) -> Checks:
    """Damaged checkpoints: each is named, and the one before it is used."""
    whole, killed = output / "whole", output / "killed"
    finish(*CHEAP, folder=whole)
    interrupt(shutil.copytree(whole, killed), last=20)

    def check(folder: Path, name: str, how: str) -> None:
        damage(shutil.copytree(killed, folder) / "checkpoint-20" / name, how)
        said = finish(*CHEAP, folder=folder)
        assert "checkpoint-20 is not used: " in said, said
        assert "Continuing from checkpoint-16" in said, said
        same_outcome(folder, whole)

    for name in (
        *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
        *("trainer_state.json", "config.json", "complete.json"),
    ):
        for how in DAMAGES:
            yield f"{name} {how}", functools.partial(check, output / f"{name}-{how}", name, how)


def caches(output: Path, seed: int) -> Checks:
    """Caches that are damaged, or of other images, are not read."""
    teacher, whole = output / "teacher", output / "whole"
    distilled = (*CHEAP, "--method", "bkd", "--force_distillation")
    given = (*distilled, "--teacher_model_name_or_path", teacher, "--force_teacher")
    cached = ("--teacher_cache", output / "logits", "--cache_images", "disk")
    places = {"view0.bin": output / "logits", "views-*[0-9a-f]": Path(datasets.config.HF_DATASETS_CACHE)}
    finish(*CHEAP, folder=teacher)
    finish(*given, *cached, folder=whole)

    def natural(data: Path) -> tuple[Any, ...]:
        return "--config", RECIPE, "--dataset_name", data, "--imbalance_ratio", "2", "--max_class_count", "12"

    def damaged(folder: Path, path: Path, how: str) -> None:
        damage(path, how)
        finish(*given, *cached, folder=folder)
        assert path.exists()
        same_outcome(folder, whole)

    for pattern, place in places.items():
        for path, how in itertools.product(sorted(place.rglob(pattern)), DAMAGES):
            yield f"{path.name} {how}", functools.partial(damaged, output / f"{path.name}-{how}", path, how)

    def repainted(suffix: str) -> None:
        first, second, plain = (output / f"{suffix}-{name}" for name in ("first", "second", "plain"))
        tail = (
            "--config",
            RECIPE,
            "--dataset_name",
            output / suffix,
            "--imbalance_ratio",
            "2",
            "--max_class_count",
            12,
        )
        paint(output / suffix, suffix, seed)
        finish(*tail, *distilled, *cached, folder=first)
        paint(output / suffix, suffix, seed + 1)
        refused_in_one_line(*run(*tail, *distilled, *cached, "--output_dir", first))
        finish(*tail, *distilled, *cached, folder=second)
        views = ("--teacher_cache", output / "logits of none", "--cache_images", "none")
        finish(*tail, *distilled, *views, folder=plain)
        assert weights(second) == weights(plain) != weights(first)

    def changed(what: str, change: Callable[[Path], None]) -> None:
        data, folder = output / what / "data", output / what / "run"
        paint(data, "bmp", seed)
        own = shutil.copytree(teacher, output / what / "teacher")
        of_teacher = (*distilled, "--teacher_model_name_or_path", own, "--force_teacher")
        argv = of_teacher if "teacher" in what else (*distilled, *natural(data))
        finish(*argv, folder=folder)
        change(output / what)
        refused_in_one_line(*run(*argv, "--output_dir", folder))

    for suffix in ("bmp", "ppm", "tif"):
        yield f"other pixels in .{suffix} files", functools.partial(repainted, suffix)
    changes: dict[str, Callable[[Path], Any]] = {
        "other evaluation images": lambda base: shutil.copy(base / "data/val/cat/0.bmp", base / "data/val/cat/1.bmp"),
        "a class of another name": lambda base: [
            (base / "data" / split / "cat").rename(base / "data" / split / "bat") for split in ("train", "val")
        ],
        "an image of another class": lambda base: [
            (base / "data/train/cat/0.bmp").rename(base / "data/train/dog/99.bmp"),
            shutil.copy(base / "data/train/cat/1.bmp", base / "data/train/cat/0.bmp"),
        ],
        "another teacher": lambda base: damage(base / "teacher/model.safetensors", "flipped"),
    }
    for what, change in changes.items():
        yield what, functools.partial(changed, what, change)


def options(output: Path, seed: int) -> Checks:
    """Command lines of `tests/campaign_options.py`: those that cannot work are refused in one line that says why."""

    def check(case: Case, folder: Path) -> None:
        if case.content is not None:
            folder.mkdir(parents=True)
            (folder / "options.yaml").write_bytes(case.content)
        places = {"file": folder / "options.yaml", "folder": folder / "run"}
        argv = [
            functools.reduce(lambda text, name: text.replace(f"{{{name}}}", str(places[name])), places, each)
            for each in case.argv
        ]
        code, said = run(*argv, **case.environment)
        assert code == case.exit_code, (code, said)
        assert case.word in refused_in_one_line(code, said), said
        assert not {*(folder / "run").glob("*")} - {folder / "run" / LOCK_NAME}, "left something"

    for index, case in enumerate(CASES):
        yield (
            " ".join(case.argv)[:200] + f" {case.content!r}"[:80],
            functools.partial(check, case, output / str(index)),
        )


def results(output: Path, seed: int) -> Checks:
    """Damaged files of `tests/campaign_results.py` are read by all that read results, or refused in one line."""

    def check(folder: Path, content: bytes) -> None:
        folder.mkdir(parents=True)
        read_by_all(content, folder)
        code, said = run("--from", folder, "--output_dir", folder / "out", script="compare.py")
        if code:
            refused_in_one_line(code, said)

    for index, (name, content) in enumerate(mutations(seed, 250)):
        yield name, functools.partial(check, output / str(index), content)


SECTIONS = {section.__name__: section for section in (kills, disk, checkpoints, caches, options, results)}


def main() -> int:
    """Try all that is asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--seed", type=int, default=0, help="Of times and damages.")
    parser.add_argument("--output", type=Path, required=True, help="A new folder.")
    told = parser.parse_args()
    if unknown := set(told.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(unknown)}")
    output = told.output.resolve()
    datasets.config.HF_DATASETS_CACHE = output / "cache"
    for script in ("run_bkd.py", "compare.py"):
        main_of(script)  # imports what all runs need, once
    rows = []
    for name in told.sections or SECTIONS:
        tried = failed = 0
        for what, check in SECTIONS[name](output / name, told.seed):
            tried += 1
            try:
                check()
            except Exception as error:
                failed += 1
                print(f"{name}: {what}: {type(error).__name__}: {error}", flush=True)
        rows.append(f"{name:12}{tried:7}{tried - failed:7}{failed:8}")
    print("\n".join([f"{'kind':12}{'tried':>7}{'held':>7}{'failed':>8}", *rows]))
    return int(any(not row.endswith(" 0") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
