"""The output folder of a run: its owner, the run's arguments, images and weights, and its progress."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import try_to_load_from_cache

from .config import BATCH_CUT, USED_BY, BKDConfig, method_defaults, option_is_used
from .errors import InputError
from .files import LOCK_NAME, UNFINISHED, hash_of, lock, try_json, why_broken
from .methods import METHODS
from .options import ABOUT_TEACHER, WITHOUT_INFLUENCE, ModelArguments, RunArguments
from .ranges import defaults_of
from .results import RESULTS_NAME, save_json
from .tasks import fresh_task

#: Marks an output folder as ours, and records its run's arguments.
RUN_NAME = "bkd_run.json"
#: Marks a checkpoint as complete, and lists its contents.
COMPLETE_NAME = "complete.json"

_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
# In the order of deletion: first the file that marks the run as finished, last the one that marks it as ours.
_LEFT_BY_A_RUN = (
    RESULTS_NAME, "figures", "onnx", "teacher", "checkpoint-[0-9]*", "model*.safetensors*", "config.json",
    "preprocessor_config.json", *_TOKENIZER, "modeling_cifar_resnet.py", "modeling_cosine_head.py",
    "training_args.bin", "trainer_state.json", "*_results.json", "README.md", ".tmp??????", RUN_NAME,
)  # fmt: skip
_WEIGHTS = ("config.json", "preprocessor_config.json", "*.safetensors", "pytorch_model*.bin")
_PROCESSES = "num_processes"  # when a run was begun, or last continued
#: What the hashes among them are of.
_HASHES = {
    "fingerprint": "hashes of the training examples",
    "eval_fingerprint": "hashes of the evaluation examples",
    "model_weights": "hashes of the model's first weights",
    "teacher_weights": "hashes of the teacher's weights",
}
_IDENTITY = ("fingerprint", "eval_fingerprint", "class_names", "model_weights", "teacher_weights", "precision_rates")

# Options for evaluating, logging and saving have no influence on the training. When these happen has none either,
# unless it decides about the best model.
_WATCHING = (
    "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "prediction_loss_only",
    "per_device_eval_batch_size", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object",
    "batch_eval_metrics", "include_for_metrics", "include_num_input_tokens_seen", "torch_empty_cache_steps",
    "save_only_model", "save_on_each_node",
)  # fmt: skip
_WATCHING_TIMES = (
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps",
    "metric_for_best_model", "greater_is_better",
)  # fmt: skip


def run_state(arguments: RunArguments, identity: dict[str, str | None] | None = None, is_to_train: bool = True) -> str:
    """Return the state of this run in its output folder: `"new"` (nothing there), `"interrupted"` or `"finished"`.

    Args:
        arguments: The run's arguments.
        identity: Identity of its images and weights (see [`identity_of`]), as far as known.
        is_to_train: Whether these processes would train it; otherwise as many processes as began it are assumed.

    Raises:
        InputError: If it holds something else, or a run with other options, on other images or from other weights.
    """
    output_dir = Path(arguments.training.output_dir)
    with _usable(output_dir):
        if output_dir.is_symlink() and not output_dir.exists():
            raise InputError(
                f"--output_dir {output_dir} is a link to {os.readlink(output_dir)}, which is not there: make that "
                "folder, or name another."
            )
        if output_dir.exists() and not output_dir.is_dir():
            raise InputError(f"--output_dir {output_dir} is a file: name a folder.")
        content = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    content -= {LOCK_NAME, RUN_NAME + UNFINISHED}
    record = try_json(output_dir / RUN_NAME)
    if RUN_NAME in content and record is None:
        raise InputError(
            f"--output_dir {output_dir} holds a run whose {RUN_NAME} is damaged, so nobody knows which: name another "
            "folder, or use --overwrite to delete that run and start anew."
        )
    if content and record is None:
        raise InputError(
            f"--output_dir {output_dir} is not empty and was not made by run_bkd.py: name a new or an empty folder."
        )
    if content <= {RUN_NAME}:  # nothing was computed yet, so there is nothing to protect
        return "new"
    has_results = RESULTS_NAME in content
    damage = _damage(output_dir, arguments.is_teacher) if has_results else ""
    now: int = arguments.training.world_size
    then: int = (record or {}).get(_PROCESSES, now)
    found = _why_other(record or {}, arguments, identity, now)
    if found and (not is_to_train or (has_results and not damage)):
        found = _why_other(_as_chosen_here(record or {}, arguments), arguments, identity, then)
    batches = re.findall(r"(--\w*global_batch_size) is (\d+) there", found)
    keep = f"; {' '.join(map(' '.join, batches))} keeps the examples of a step" if batches else ""
    if found and arguments.is_teacher:
        raise InputError(
            f"The teacher in {output_dir} was trained otherwise: {found}{keep}. Use --overwrite to train it anew, "
            "another --output_dir, or --teacher_model_name_or_path to use it all the same."
        )
    if found:
        has_teacher = (output_dir / "teacher" / RESULTS_NAME).exists()
        place = shlex.quote(f"{output_dir}/teacher")
        teacher = f" (and that run's teacher, by --teacher_model_name_or_path {place})"
        raise InputError(
            f"--output_dir {output_dir} holds a run with other options: {found}{keep}. Use another folder"
            f"{teacher if has_teacher else ''}, or --overwrite to delete that run and start anew."
        )
    if damage:
        warnings.warn(f"{output_dir} was finished, but {damage}: the run goes on, and makes it again.", stacklevel=2)
    return "finished" if has_results and not damage else "interrupted"


def claim_output_dir(arguments: RunArguments, identity: dict[str, str | None] | None = None) -> bool:
    """Claim the output folder; True if it holds the finished results of this run (arguments as for [`run_state`]).

    The folder of an unfinished run is locked until this process ends or unlocks all. Nothing in it is changed.

    Raises:
        InputError: As [`run_state`]; also if the folder cannot be written, or another process has locked it.
    """
    found, output_dir = _state(arguments, identity), Path(arguments.training.output_dir)
    if PartialState().is_main_process and found != "finished":
        with _usable(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
            lock(output_dir)
        found = _state(arguments, identity)  # another process may have changed it before
    return found == "finished"


def record_run(arguments: RunArguments, identity: dict[str, str | None]) -> None:
    """Record the run in a claimed folder; `overwrite` first deletes an earlier one (arguments as for [`run_state`]).

    Raises:
        InputError: If the folder cannot be written.
    """
    found, output_dir = _state(arguments, identity), Path(arguments.training.output_dir)
    with _usable(output_dir):
        if arguments.overwrite and (output_dir / RUN_NAME).exists():
            _delete_run(output_dir)
        old = {} if found == "new" else try_json(output_dir / RUN_NAME) or {}
        told = what_is_told(arguments, identity)
        known = {name: old[name] for name in _IDENTITY if told.get(name) is None and name in old}
        save_json({**told, **known, _PROCESSES: arguments.training.world_size}, output_dir / RUN_NAME)


def precision_begun_in(output_dir: str | os.PathLike[str]) -> tuple[str | None, dict[str, float] | None]:
    """Return the precision of the run in a folder (`None` without a run), and the rates that it measured."""
    record = try_json(Path(output_dir) / RUN_NAME) or {}
    is_bf16 = record.get("training", {}).get("bf16")
    return None if is_bf16 is None else ("bf16" if is_bf16 else "fp32"), record.get("precision_rates")


def _state(arguments: RunArguments, identity: dict[str, str | None] | None) -> str:
    output_dir = Path(arguments.training.output_dir)
    with _usable(output_dir):
        is_overwritten = arguments.overwrite and (output_dir / RUN_NAME).exists()
    return "new" if is_overwritten else run_state(arguments, identity)


def identity_of(arguments: RunArguments, data: dict[str, Any], with_teacher: bool = True) -> dict[str, str | None]:
    """Return the identity of a run's images, classes and weights, as far as known yet.

    Args:
        arguments: The run's arguments.
        data: The `data` section of its results.
        with_teacher: Whether a teacher trained in the run already exists.
    """
    options, given = arguments.model, arguments.model.given_teacher
    teacher = given or (f"{arguments.training.output_dir}/teacher" if with_teacher else None)
    return {
        "fingerprint": data["fingerprint"],
        "eval_fingerprint": data["eval_fingerprint"],
        "class_names": hashlib.blake2b(json.dumps(data["class_names"]).encode(), digest_size=16).hexdigest(),
        "model_weights": _identity_of_weights(options.model_name_or_path, options),
        "teacher_weights": _identity_of_weights(teacher, arguments.for_teacher().model)
        if teacher and arguments.distils
        else None,
    }


def _identity_of_weights(name: str, options: ModelArguments) -> str | None:
    """Hash of a model's files, or its commit on the Hub; `None` for fresh weights, and if unknown."""
    if fresh_task(name) is not None:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        is_id = name.count("/") < 2 and not name.startswith((".", "/", "~"))
        revision, cache_dir = options.model_revision, options.cache_dir
        path = try_to_load_from_cache(name, "config.json", cache_dir, revision) if is_id else None
        return Path(path).parent.name if isinstance(path, str) else None
    patterns = {*_WEIGHTS, *(_TOKENIZER if options.task == "text" else ())}
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if not any(path.suffix != ".json" for path in files):
        return None
    text = " ".join(f"{path.name} {hash_of(path)}" for path in files)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _damage(output_dir: Path, needs_weights: bool) -> str:
    """Say which files of a finished run do not load; deleted weights only count if they are needed."""
    if try_json(output_dir / RESULTS_NAME) is None:
        return f"{RESULTS_NAME} is damaged"
    files = [path for name in ("config.json", "model*.safetensors") for path in output_dir.glob(name)]
    if needs_weights and len(files) < 2:
        return "its weights are not there"
    return "; ".join(f"{path.name} is damaged ({why})" for path in files if (why := why_broken(path)))


@contextmanager
def _usable(output_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--output_dir {output_dir} cannot be used: {error.strerror or error}. Name another folder."
        ) from error


def _why_other(
    record: dict[str, Any], arguments: RunArguments, identity: dict[str, str | None] | None, num_processes: int
) -> str:
    """Describe how a recorded run differs from one with this number of processes; empty if it does not."""
    here = what_is_told(arguments, identity, num_processes)
    there = {name: value for name, value in record.items() if name != _PROCESSES}
    there = _with_same_models(_with_later_options(there, here, arguments), arguments)
    names = {*there.get("teacher_training", {}), *here["teacher_training"]}
    there, here = (_with_teacher(told, names if arguments.distils else None) for told in (there, here))
    implied = {name: None for name in _IDENTITY if None in (there.get(name), here.get(name))}
    if len({told.get("model", {}).get("teacher_model_name_or_path") for told in (there, here)}) > 1:
        implied["teacher_training"] = None  # options of another teacher
    there, here = _without_presets({**there, **implied}, {**here, **implied})
    return differences(there, here)


def _as_chosen_here(record: dict[str, Any], arguments: RunArguments) -> dict[str, Any]:
    """Replace in a record what a machine or a launcher chooses where it is not told: here it may be another one."""
    training, here = record.get("training", {}), arguments.training
    chosen = {"use_cpu": here.use_cpu}
    if not arguments.are_told("precision", "bf16", "fp16"):
        chosen |= {"bf16": here.bf16, "fp16": here.fp16}
    if not arguments.are_told("torch_compile", "torch_compile_backend"):
        chosen |= {"torch_compile": here.torch_compile, "torch_compile_backend": here.torch_compile_backend}
    kept = {name: value for name, value in record.items() if name != "precision_rates" or "bf16" not in chosen}
    return {**kept, "training": {**training, **{n: value for n, value in chosen.items() if n in training}}}


def _without_presets(*records: dict[str, Any]) -> list[dict[str, Any]]:
    """Leave out the options of records with different methods that have the values of these methods."""
    of_training = [record.get("training", {}) for record in records]
    methods = [training.get("method") for training in of_training]
    if len({*methods}) == 1 or not {*methods} <= {*METHODS}:
        return [*records]
    presets = [method_defaults(method) for method in methods]
    preset = {
        name for name in presets[0].keys() - {"method"}
        if all(training.get(name) == values.get(name) for training, values in zip(of_training, presets, strict=True))
    }  # fmt: skip
    kept = [{name: value for name, value in training.items() if name not in preset} for training in of_training]
    return [{**record, "training": training} for record, training in zip(records, kept, strict=True)]


def what_is_told(
    arguments: RunArguments, identity: dict[str, str | None] | None = None, num_processes: int | None = None
) -> dict[str, Any]:
    """Return what identifies a run (arguments as for [`run_state`]), by default with the current processes."""
    of_teacher = {}
    if arguments.teacher_options:
        teacher = arguments.for_teacher()
        used = {**dataclasses.asdict(teacher.model), **_options_in_use(teacher.training, num_processes)}
        compared = ["global_batch_size" if name in BATCH_CUT else name for name in arguments.teacher_options]
        of_teacher = {name: used[name] for name in compared}
    told = {
        "model": dataclasses.asdict(arguments.model),
        "data": dataclasses.asdict(arguments.data),
        "training": _options_in_use(arguments.training, num_processes),
        "teacher_training": of_teacher,
    }
    influential = {
        part: {name: value for name, value in options.items() if name not in WITHOUT_INFLUENCE}
        for part, options in told.items()
    }
    measured = {"precision_rates": arguments.precision_rates} if arguments.precision_rates else {}
    return json.loads(json.dumps({**influential, **(identity or {}), **measured}))  # as when read back


def _options_in_use(args: BKDConfig, num_processes: int | None) -> dict[str, Any]:
    """All options; those that the method does not use have their defaults, and `None` means without influence."""
    defaults = method_defaults(args.method)
    unused = {name: defaults[name] for name in USED_BY if not option_is_used(name, vars(args))}
    chooses = args.load_best_model_at_end or args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    without = (*_WATCHING, *(() if chooses else _WATCHING_TIMES), *BATCH_CUT)
    batch = {"global_batch_size": args.images_in_step(num_processes or args.world_size)}
    return {**args.to_dict(), **unused, **caches_in_use(vars(args)), **dict.fromkeys(without), **batch}


def caches_in_use(training: Mapping[str, Any]) -> dict[str, str]:
    """Return whether a training uses caches, whose place has no influence; using one may change the last digits."""
    return {name: "off" if training.get(name, "off") == "off" else "on" for name in ("teacher_cache", "feature_cache")}


def _with_same_models(there: dict[str, Any], arguments: RunArguments) -> dict[str, Any]:
    """Give models that have only been moved, or are named otherwise, their present names."""
    present = {}
    for name, weights in (("model_name_or_path", "model_weights"), ("teacher_model_name_or_path", "teacher_weights")):
        here = getattr(arguments.model, name)
        if here is None or here == there.get("model", {}).get(name) or there.get(weights) is None:
            continue
        options = arguments.for_teacher().model if weights == "teacher_weights" else arguments.model
        if _identity_of_weights(here, options) == there[weights]:
            present[name] = here
    return {**there, "model": {**there["model"], **present}} if present else there


def _with_later_options(there: dict[str, Any], here: dict[str, Any], arguments: RunArguments) -> dict[str, Any]:
    """Add options to an older record that did not exist then, if they have their defaults now."""
    filled = dict(there)
    for section in ("model", "data", "training"):
        defaults, known = defaults_of(type(getattr(arguments, section))), there.get(section, {})
        new = {name: value for name, value in here[section].items() if name not in known}
        filled[section] = {**{n: value for n, value in new.items() if value in (defaults.get(n), False)}, **known}
    return filled


def _with_teacher(told: dict[str, Any], names: set[str] | None) -> dict[str, Any]:
    """Add the teacher's options, given for it or shared with the student, to a record; `None` without a teacher."""
    model, training = told.get("model", {}), told.get("training", {})
    if names is None:
        model = {name: value for name, value in model.items() if name not in ABOUT_TEACHER}
        return {**told, "model": model, "teacher_training": {}}
    method = METHODS[training["method"]].teacher if training.get("method") in METHODS else "ce"
    values = {**model, **training, **method_defaults(method), **told.get("teacher_training", {})}
    return {**told, "teacher_training": {name: values.get(name) for name in names}}


def _delete_run(output_dir: Path) -> None:
    """Delete the files of a run, and nothing else in its folder."""
    for pattern in _LEFT_BY_A_RUN:
        for path in list(output_dir.iterdir()):
            if not fnmatch(path.name.removesuffix(UNFINISHED), pattern):
                continue
            if path.is_symlink() or not path.is_dir():
                path.unlink()
                continue
            if path.name == "teacher":
                _delete_run(path)  # otherwise the rest, after a kill, would not be recognised as ours
            shutil.rmtree(path)


def differences(
    there: dict[str, Any], here: dict[str, Any], prefix: str = "", where: tuple[str, str] = ("there", "here")
) -> str:
    """E.g. "--temperature is 2.0 there, 4.0 here", or with other words; empty if nothing differs."""
    found = []
    for name in sorted({*there, *here}):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and not prefix:
            inner = differences(old, new, "--teacher_" if name == "teacher_training" else "--", where)
            found += [inner] if inner else []
        elif old != new:
            what = "" if prefix or name not in _HASHES else f" ({_HASHES[name]})"
            found.append(f"{prefix}{name} is {old} {where[0]}, {new} {where[1]}{what}")
    return "; ".join(found)


# ---- Checkpoints --------------------------------------------------------------------------------------------------


def mark_complete(checkpoint: str | os.PathLike[str]) -> None:
    """Record the hashes of a checkpoint's files; one that is still to be renamed is recorded under its final name."""
    folder = Path(checkpoint)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE_NAME)
    names = [path.relative_to(folder).as_posix().removesuffix(UNFINISHED) for path in files]
    save_json(dict(zip(names, map(hash_of, files), strict=True)), folder / COMPLETE_NAME)


def why_not_complete(checkpoint: str | os.PathLike[str]) -> str | None:
    """Say what is missing or damaged in a checkpoint; `None` if it is as [`mark_complete`] recorded it."""
    folder = Path(checkpoint)
    files = try_json(folder / COMPLETE_NAME)
    if not files:
        return "it was not written to its end"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"its {name} is missing"
        if hash_of(folder / name) != expected:
            return f"its {name} is damaged"
    return None


def check_checkpoint(checkpoint: str | os.PathLike[str]) -> None:
    """Raise an `InputError` if a checkpoint is damaged; one without a record of [`mark_complete`] is not checked."""
    if Path(checkpoint, COMPLETE_NAME).exists() and (why := why_not_complete(checkpoint)):
        raise InputError(f"The checkpoint {checkpoint} cannot be used: {why}. Remove it, and run the same again.")


def has_checkpoint(output_dir: str | os.PathLike[str]) -> bool:
    """Whether a run, or the teacher's run in it, has a complete checkpoint, or is finished."""
    folder = Path(output_dir)
    left = (f"checkpoint-*/{COMPLETE_NAME}", f"teacher/checkpoint-*/{COMPLETE_NAME}", f"teacher/{RESULTS_NAME}")
    return any(next(folder.glob(pattern), None) for pattern in (*left, RESULTS_NAME))


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the latest complete checkpoint, `None` without one; a warning names incomplete ones."""
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdigit()]
    for folder in sorted(folders, key=lambda folder: int(folder.name[11:]), reverse=True):
        why = why_not_complete(folder)
        if why is None:
            return str(folder)
        warnings.warn(f"{folder} is not used: {why}.", stacklevel=2)
    if folders:
        warnings.warn(f"{output_dir} has no whole checkpoint: its training begins anew.", stacklevel=2)
    return None


def is_cut_otherwise(checkpoint: str | os.PathLike[str], args: BKDConfig) -> str:
    """Say what changes if batches were split differently when a checkpoint was saved; empty if they were not."""
    size = (try_json(Path(checkpoint, "trainer_state.json")) or {}).get("train_batch_size")
    processes = len(list(Path(checkpoint).glob("rng_state*.pth")))
    is_known = size and processes and not args.auto_find_batch_size
    if not is_known or (size, processes) == (args.per_device_train_batch_size, args.world_size):
        return ""
    return (
        f" It was saved by {processes} process{'es' if processes > 1 else ''} with {size} examples at a time, now "
        f"there are {args.world_size} with {args.per_device_train_batch_size}: each step has the same examples in the "
        "same views, and the weights agree up to rounding, unless there is BatchNorm (it sees other parts of a batch) "
        "or dropout (it draws other numbers)."
    )
