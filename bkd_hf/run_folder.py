"""The output folder of a run: whose it is, what the run in it was told, how far it came."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .config import BKDConfig
from .errors import InputError
from .options import NOT_FOR_TEACHER, WITHOUT_INFLUENCE, RunArguments
from .results import RESULTS_NAME, SCHEMA_VERSION, save_json

#: Marks an output folder as ours and records what the run in it was told.
RUN_NAME = "bkd_run.json"
#: Marks a trained teacher and records what it was trained on.
TEACHER_NAME = "bkd_teacher.json"

_LEFT_BY_A_RUN = (
    RUN_NAME, RESULTS_NAME, "figures", "teacher", "checkpoint-*", "model*.safetensors*", "config.json",
    "preprocessor_config.json", "modeling_cifar_resnet.py", "training_args.bin", "trainer_state.json",
    "*_results.json", "README.md",
)  # fmt: skip


def run_state(arguments: RunArguments) -> str:
    """Return what the output folder holds of this very run: `"new"` (nothing), `"interrupted"` or `"finished"`.

    Raises:
        InputError: If it holds something else, or a run with other options.
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
    if found := differences(record or {}, _told(arguments)):
        teacher = f" (and that run's teacher, by --teacher_model_name_or_path {output_dir}/teacher)"
        raise InputError(
            f"--output_dir {output_dir} holds a run with other options: {found}. Use another folder"
            f"{teacher if 'teacher' in content else ''}, or --overwrite to delete that run and start anew."
        )
    return "finished" if RESULTS_NAME in content else "interrupted"


def claim_output_dir(output_dir: Path, arguments: RunArguments) -> bool:
    """Make the output folder ours; True if it holds the finished results of this very run."""
    starts_anew = arguments.overwrite and (output_dir / RUN_NAME).exists()
    state = "new" if starts_anew else run_state(arguments)
    if state == "new" and PartialState().is_main_process:
        if starts_anew:
            _delete_run(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        save_json(_told(arguments), output_dir / RUN_NAME)
    return state == "finished"


def _told(arguments: RunArguments) -> dict[str, Any]:
    told = {
        "model": _influential(dataclasses.asdict(arguments.model)),
        "data": _influential(dataclasses.asdict(arguments.data)),
        "training": _influential(arguments.training.options_in_use()),
        "teacher_training": options_of_teacher_alone(arguments),
    }
    return json.loads(json.dumps(told))  # as it will be read back


def _delete_run(output_dir: Path) -> None:
    """Delete what a run leaves, and nothing that somebody put beside it."""
    for pattern in _LEFT_BY_A_RUN:
        for path in output_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _influential(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in WITHOUT_INFLUENCE}


def influential_for_teacher(args: BKDConfig) -> dict[str, Any]:
    """Return the options that decide what a teacher's training computes."""
    return {name: value for name, value in _influential(args.to_dict()).items() if name not in NOT_FOR_TEACHER}


def options_of_teacher_alone(arguments: RunArguments) -> dict[str, Any]:
    """Options that were given for the teacher alone and decide what it computes."""
    teacher = arguments.for_teacher()
    used = {**dataclasses.asdict(teacher.model), **teacher.training.options_in_use()}
    return _influential({name: used[name] for name in arguments.teacher_options})


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


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a model was trained from and on; `None` where nothing is known.

    Attributes:
        model: What was trained, e.g. `cifar-resnet-32`.
        fingerprint: Of the training images.
        method: The preset.
    """

    model: str | None = None
    fingerprint: str | None = None
    method: str | None = None


def origin_of(folder: Path) -> Origin:
    """Return what is known of the model in a folder."""
    record = read_json(folder / TEACHER_NAME)
    if record is not None:
        told = record["told"]
        return Origin(told["model"], told["fingerprint"], told["training"].get("method"))
    results = read_json(folder / RESULTS_NAME)
    if results is not None and results.get("schema_version") == SCHEMA_VERSION:
        return Origin(results["student"]["model"], results["data"]["fingerprint"], results.get("method"))
    return Origin()


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the latest checkpoint that was written to its end, `None` without one.

    Trainer writes `trainer_state.json` last: a process killed while saving leaves a checkpoint without it, or half.
    """
    for folder in sorted(Path(output_dir).glob("checkpoint-*"), key=_checkpoint_step, reverse=True):
        if read_json(folder / "trainer_state.json") is not None:
            return str(folder)
    return None
