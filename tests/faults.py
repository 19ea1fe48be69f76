"""Faults for tests and the campaign: killing a run, filling its disk, damaging its files.

Runs are real processes, forked from this one, so that none has to import torch again; kills, limits and full disks are
real too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.conftest import REPOSITORY, free_port, load_script

RECIPE = REPOSITORY / "scripts" / "recipes" / "digits.yaml"
#: The cheapest run that has checkpoints within an epoch: 11 steps each, cifar-resnet-8 on the digits.
CHEAP = (
    *("--method", "ce", "--num_train_epochs", "2", "--lr_step_epochs", "1", "--lr_step_factors", "0.1"),
    *("--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "3", "--eval_strategy", "no"),
    *("--disable_tqdm", "true", "--num_threads", "1", "--max_eval_samples", "100"),
)


def main_of(script: str) -> Callable[..., int]:
    """Return what a script in `scripts/` runs."""
    return load_script(script).main


class Run:
    """A script, running in a process of its own.

    Args:
        argv: Its command line.
        script: Its name.
        file_size: Bytes that a file may have: a disk that is full at that point.
        environment: Of the process.
    """

    def __init__(self, *argv: Any, script: str = "run_bkd.py", file_size: int | None = None, **environment: str):
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)  # what is said does not count as a file
        arguments = script, list(map(str, argv)), writer, file_size, environment
        self.process = multiprocessing.get_context("fork").Process(target=_work, args=arguments)
        self.process.start()
        os.close(writer)
        self._reader, self.output = reader, ""

    def kill(self, way: signal.Signals = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, way)

    def wait(self) -> int:
        """Return the exit code; what it printed is the `output` then."""
        self.process.join()
        os.set_blocking(self._reader, False)
        with os.fdopen(self._reader, "rb") as file:
            self.output = (file.read() or b"").decode(errors="replace")
        return self.process.exitcode


def _work(script: str, argv: list[str], output: int, file_size: int | None, environment: dict[str, str]) -> None:
    code = 70
    try:
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.update(environment)
        sys.argv = [script, *argv]
        # As in a process that pytest does not watch.
        warnings.showwarning = lambda *told, **_: sys.stderr.write(warnings.formatwarning(*told[:4]))
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        main = main_of(script)
        code = main() if script == "compare.py" else main(argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(*argv: Any, **options: Any) -> tuple[int, str]:
    """Run a script to its end; return exit code and output."""
    process = Run(*argv, **options)
    return process.wait(), process.output


def start_two(*argv: Any, nodes: Sequence[Sequence[Any]] = ()) -> list[Run]:
    """Start a run of two processes, of one machine or, with options for each, of two."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    local = [{"LOCAL_WORLD_SIZE": "1" if nodes else "2", "LOCAL_RANK": "0" if nodes else rank} for rank in "01"]
    own = nodes or ((), ())
    return [Run(*argv, *own[rank], "--use_cpu", "true", RANK=str(rank), **local[rank], **shared) for rank in range(2)]


def in_two_processes(work: Callable[..., Any], *arguments: Any, max_restarts: int = 0) -> dict[int, Any]:
    """Call a function in two processes, as torchrun starts them, but forked; return what it does, by their ranks."""
    config = LaunchConfig(
        1, 1, 2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", rdzv_configs={"is_host": True},
        max_restarts=max_restarts, monitor_interval=0.1, start_method="fork",
    )  # fmt: skip
    return elastic_launch(config, work)(*arguments)


def refused_in_one_line(code: int, output: str) -> str:
    """Check that a run ended with one line of error, and no traceback; return it."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code in (1, 2), (code, output)
    assert len(lines) == 1, output
    assert "Traceback" not in output, output
    return lines[0]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def same_outcome(folder: Path, whole: Path) -> None:
    """Check that a run ended as another that nothing happened to: weights, losses, and what it left."""
    assert weights(folder) == weights(whole)
    histories = [json.loads((each / "results.json").read_text())["student"]["history"] for each in (folder, whole)]
    told = [[(e["step"], e["loss"], e["ce_loss"]) for e in history if "loss" in e] for history in histories]
    assert told[0] == told[1]
    names = [{*each.glob("figures/*"), *each.glob("[!c.]*")} for each in (folder, whole)]
    assert {path.relative_to(folder) for path in names[0]} == {path.relative_to(whole) for path in names[1]}


def interrupt(folder: Path, last: int) -> None:
    """Make of a finished run one that was interrupted after its checkpoint `last`."""
    for path in folder.iterdir():
        step = path.name.removeprefix("checkpoint-")
        if path.is_dir() and not (step.isdigit() and int(step) <= last):
            shutil.rmtree(path)
        elif path.is_file() and path.name != "bkd_run.json":
            path.unlink()


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "flipped": _flipped,
    "deleted": lambda content: b"",
}


def damage(path: Path, how: str) -> None:
    path.write_bytes(DAMAGES[how](path.read_bytes()))
    if how == "deleted":
        path.unlink()


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[], None]]:
    """Mount a small disk as a folder, and give a function that makes it large; needs to be root."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=200M", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def paint(folder: Path, suffix: str, seed: int) -> None:
    """Make a data set of files whose names, sizes and times are the same whatever they show."""
    generator = np.random.default_rng(seed)
    for name, number in (("train/cat", 12), ("train/dog", 6), ("val/cat", 4), ("val/dog", 4)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in (folder / name / f"{i}.{suffix}" for i in range(number)):
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
            os.utime(path, (1e9, 1e9))
