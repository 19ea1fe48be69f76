"""The output folder of a run: whose it is, what the run in it was told, how far it came."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .errors import InputError
from .options import WITHOUT_INFLUENCE, RunArguments
from .results import RESULTS_NAME, save_json

#: Marks an output folder as ours and records what the run in it was told.
RUN_NAME = "bkd_run.json"

_LEFT_BY_A_RUN = (
    RUN_NAME, RESULTS_NAME, "figures", "teacher", "checkpoint-*", "model*.safetensors*", "config.json",
    "preprocessor_config.json", "modeling_cifar_resnet.py", "training_args.bin", "trainer_state.json",
    "*_results.json", "README.md",
)  # fmt: skip


def run_state(arguments: RunArguments, fingerprint: str | None = None) -> str:
    """Return what the output folder holds of this very run: `"new"` (nothing), `"interrupted"` or `"finished"`.

    Args:
        arguments: What the run is told.
        fingerprint: Of its training images, once they are known.

    Raises:
        InputError: If it holds something else, or a run with other options or on other images.
    """
    output_dir = Path(arguments.training.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir} is a file: name a folder.")
    content = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    record = read_json(output_dir / RUN_NAME)
    if content and record is None:
        raise InputError(
            f"--output_dir {output_dir} is not empty and was not made by run_bkd.py: name a new or an empty folder."
        )
    if content <= {RUN_NAME}:  # at most stopped by an error before anything was computed: nothing to protect
        return "new"
    there, here = record or {}, _told(arguments, fingerprint)
    if None in (there.get("fingerprint"), fingerprint):  # not known yet
        there, here = ({**told, "fingerprint": None} for told in (there, here))
    found = differences(there, here)
    if found and arguments.is_teacher:
        raise InputError(
            f"The teacher in {output_dir} was trained otherwise: {found}. Use --overwrite to train it anew, another "
            "--output_dir, or --teacher_model_name_or_path to use it all the same."
        )
    if found:
        teacher = f" (and that run's teacher, by --teacher_model_name_or_path {output_dir}/teacher)"
        raise InputError(
            f"--output_dir {output_dir} holds a run with other options: {found}. Use another folder"
            f"{teacher if 'teacher' in content else ''}, or --overwrite to delete that run and start anew."
        )
    return "finished" if RESULTS_NAME in content else "interrupted"


def claim_output_dir(arguments: RunArguments, fingerprint: str | None = None) -> bool:
    """Make the output folder ours; True if it holds the finished results of this very run (arguments as there)."""
    output_dir = Path(arguments.training.output_dir)
    starts_anew = arguments.overwrite and (output_dir / RUN_NAME).exists()
    state = "new" if starts_anew else run_state(arguments, fingerprint)
    if PartialState().is_main_process and (state == "new" or (state == "interrupted" and fingerprint is not None)):
        if starts_anew:
            _delete_run(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        save_json(_told(arguments, fingerprint), output_dir / RUN_NAME)
    return state == "finished"


def _told(arguments: RunArguments, fingerprint: str | None = None) -> dict[str, Any]:
    of_teacher = {}
    if arguments.teacher_options:
        teacher = arguments.for_teacher()
        used = {**dataclasses.asdict(teacher.model), **teacher.training.options_in_use()}
        of_teacher = {name: used[name] for name in arguments.teacher_options}
    told = {
        "model": dataclasses.asdict(arguments.model),
        "data": dataclasses.asdict(arguments.data),
        "training": arguments.training.options_in_use(),
        "teacher_training": of_teacher,
    }
    influential = {
        part: {name: value for name, value in options.items() if name not in WITHOUT_INFLUENCE}
        for part, options in told.items()
    }
    return json.loads(json.dumps({**influential, "fingerprint": fingerprint}))  # as it will be read back


def _delete_run(output_dir: Path) -> None:
    """Delete what a run leaves, and nothing that somebody put beside it."""
    for pattern in _LEFT_BY_A_RUN:
        for path in output_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> str:
    """E.g. "--temperature is 2.0 there, 4.0 here"; empty if nothing differs."""
    found = []
    for name in sorted({*there, *here}):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and not prefix:
            inner = differences(old, new, "--teacher_" if name == "teacher_training" else "--")
            found += [inner] if inner else []
        elif old != new:
            found.append(f"{prefix}{name} is {old} there, {new} here")
    return "; ".join(found)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a file; `None` if it is not there, or is not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def _checkpoint_step(folder: Path) -> int:
    suffix = folder.name.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else -1


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the latest checkpoint that was written to its end, `None` without one.

    Trainer writes `trainer_state.json` last: a process killed while saving leaves a checkpoint without it, or half.
    """
    for folder in sorted(Path(output_dir).glob("checkpoint-*"), key=_checkpoint_step, reverse=True):
        if read_json(folder / "trainer_state.json") is not None:
            return str(folder)
    return None
