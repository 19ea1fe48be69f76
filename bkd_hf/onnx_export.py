"""ONNX export of a finished run's student: `onnx/model.onnx`, and `onnx/model_quantized.onnx` in 8-bit integers.

The first is only kept if its outputs match torch's. The second has a fourth of the size. As rounding first affects
rare classes, which have the smallest margins, accuracies are reported by group.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from .announcer import Announcer
from .card import repo_of
from .data import fingerprint, labels_of, limit_examples
from .errors import InputError
from .export_report import FIGURE_NAME, lines
from .files import lock, replacing, try_json, write_text
from .hub import CARD_NAME, TEACHER_FOLDER, card_of
from .images import ImageDataset, collate_images
from .inputs import load_splits, long_tail_evaluation
from .models import load_classifier, load_processor, prefer_channels_last
from .onnx_files import (
    OPSET,
    choose_calibration_images,
    compare,
    describe,
    import_onnx,
    latencies,
    onnx_answers,
    quantize,
    to_onnx,
    torch_answers,
)
from .options import RunArguments
from .plots import save_plots
from .results import ONNX_FILES, RESULTS_NAME, cpu_name, load_results, save_json
from .run_folder import RUN_NAME
from .tasks import check_of_images
from .teacher import load_teacher
from .text import one_line
from .views import output_size

#: Most evaluation images used, in proportion to the classes, at least one of each. More could take three models hours
#: on a CPU, and these show the cost of rounding.
EVALUATION_IMAGES = 10_000
_BATCH = 32


def export_run(arguments: RunArguments, say: Announcer) -> dict[str, Any]:
    """Export the student of a finished run, and update its results, figures and card; in one process.

    A complete earlier export is kept.

    Args:
        arguments: The run's arguments (see [`recorded_arguments`]).
        say: Prints a message.

    Returns:
        The content of `results.json`, with the section `export`.

    Raises:
        InputError: If libraries are missing, the data are not those of the run, the model cannot be exported, or the
            file's outputs differ from torch's. No file is written then.
    """
    check_of_images("--export onnx", arguments.model.task)
    import_onnx()
    folder = Path(arguments.training.output_dir)
    results = load_results(folder)
    if _is_exported(folder, results):
        say(f"The student is exported already: {', '.join(ONNX_FILES.values())} in {folder}.")
        return results
    say.stage("ONNX")
    lock(folder)
    for name in ONNX_FILES.values():
        (folder / name).unlink(missing_ok=True)
    if results.pop("export", None):  # results must not list deleted files
        save_json(results, folder / RESULTS_NAME)
    results["export"] = _export(arguments, results, say)
    save_json(results, folder / RESULTS_NAME)
    (folder / "figures" / FIGURE_NAME).unlink(missing_ok=True)  # from an earlier export
    save_plots(results, folder / "figures", only_missing=True)
    card = folder / CARD_NAME
    write_text(card, card_of(folder, results, repo_of(card, arguments.repo_id)))
    for line in lines(results):
        say(line)
    return results


def recorded_arguments(folder: Path, option: str = "--export onnx") -> RunArguments:
    """Return a run's arguments about models and data, from the record in its folder.

    Args:
        folder: The run's folder.
        option: The option that needs it, for messages.

    Raises:
        InputError: If there is no record.
    """
    record = try_json(folder / RUN_NAME)
    if record is None:
        raise InputError(
            f"{option}: {folder} has no {RUN_NAME}, which tells its data: name the output folder of a run, or leave "
            "the option out."
        )
    return RunArguments.from_record(record, str(folder))


def _is_exported(folder: Path, results: dict[str, Any]) -> bool:
    models = results.get("export", {}).get("models", {})
    paths = {name: folder / file for name, file in ONNX_FILES.items()}
    return bool(models) and all(p.is_file() and p.stat().st_size == models[n]["bytes"] for n, p in paths.items())


def _export(arguments: RunArguments, results: dict[str, Any], say: Announcer) -> dict[str, Any]:
    """Write both files, and return the section `export` of the results."""
    import onnxruntime

    folder, kwargs = Path(arguments.training.output_dir), arguments.model.from_pretrained_kwargs()
    names, threads = results["data"]["class_names"], torch.get_num_threads()
    processor = load_processor(str(folder), **kwargs)
    calibration, evaluation = _images(arguments, results, processor)
    student = load_classifier(str(folder), names, **kwargs).eval()
    metadata, size = describe(processor, names), output_size(processor)
    for name in ONNX_FILES.values():
        (folder / name).parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=(folder / ONNX_FILES["onnx"]).parent) as place:  # until files are checked
        paths = {name: Path(place, f"{name}.onnx") for name in ONNX_FILES}
        to_onnx(student, size, paths["onnx"], metadata)
        quantize(paths["onnx"], paths["int8"], (pixels for pixels, _ in _batches(calibration)), metadata)
        prefer_channels_last(student)
        answers = {"student": torch_answers(student)}
        answers |= {name: onnx_answers(path, threads) for name, path in paths.items()}
        of = f"{len(evaluation):,} of {results['data']['num_eval_images']:,} evaluation images"
        say(f"{of} are answered in torch, as ONNX and in int8, on the CPU.")
        metrics, difference, tolerance = compare(
            answers, _batches(evaluation), long_tail_evaluation(results["data"], 0.0)
        )
        num_bytes = {"student": _num_bytes(student), **{name: path.stat().st_size for name, path in paths.items()}}
        sizes = dict.fromkeys(answers, size)
        if (teacher := _load_teacher(arguments, results, say)) is not None:
            answers["teacher"], num_bytes["teacher"] = torch_answers(teacher[0]), _num_bytes(teacher[0])
            sizes["teacher"] = teacher[1]
        seconds = latencies(answers, sizes)
        for name, path in paths.items():
            with replacing(folder / ONNX_FILES[name]) as unfinished:
                shutil.move(path, unfinished)
    models = {name: {"bytes": num_bytes[name], "seconds": seconds[name]} for name in answers}
    for name, found in metrics.items():
        models[name]["metrics"] = found
    return {
        "opset": OPSET,
        "onnxruntime": onnxruntime.__version__,
        "largest_logit_difference": difference,
        "tolerance": tolerance,
        "num_calibration_images": len(calibration),
        "num_eval_images": len(evaluation),
        "device": cpu_name(),
        "cpu_threads": threads,
        "models": models,
    }


def _images(
    arguments: RunArguments, results: dict[str, Any], processor: BaseImageProcessor
) -> tuple[ImageDataset, ImageDataset]:
    """Training images for calibration, and evaluation images, as the model's inputs."""
    splits, data = load_splits(arguments), results["data"]
    recorded = {"train": data["fingerprint"], "eval": data["eval_fingerprint"]}
    if any(fingerprint(split) != recorded[name] for name, split in splits.items()):
        raise InputError(
            f"--export onnx: {one_line(arguments.data.dataset_name, 80)} does not hold the images that this run was "
            "trained and evaluated on: put them back, or train anew."
        )
    chosen = choose_calibration_images(labels_of(splits["train"]), results["seed"])
    number = max(EVALUATION_IMAGES, len(data["class_names"]))
    asked = limit_examples(splits["eval"], number, "export", results["seed"])
    # Not cached, as each is used once.
    views = [ImageDataset(split, processor, cache_images="none") for split in (splits["train"].select(chosen), asked)]
    return views[0], views[1]


def _batches(images: ImageDataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """B×3×H×W numbers, and B labels."""
    for start in range(0, len(images), _BATCH):
        batch = collate_images(images.__getitems__(list(range(start, min(start + _BATCH, len(images))))))
        yield np.ascontiguousarray(batch["pixel_values"].to("cpu").numpy()), batch["labels"].numpy()


def _load_teacher(
    arguments: RunArguments, results: dict[str, Any], say: Announcer
) -> tuple[nn.Module, tuple[int, int]] | None:
    """The run's teacher, and height and width of its images; `None` if there is none, or it was deleted."""
    if results["teacher"] is None:
        return None
    own = Path(arguments.training.output_dir, TEACHER_FOLDER)
    name = str(own) if (own / "config.json").exists() else arguments.model.given_teacher or str(own)
    kwargs = arguments.for_teacher().model.from_pretrained_kwargs()
    try:
        teacher = load_teacher(name, **kwargs).model
        size = output_size(load_processor(name, **kwargs))
    except InputError as error:
        say(f"WARNING: The teacher's time is not measured. {error}")
        return None
    prefer_channels_last(teacher)
    return teacher, size


def _num_bytes(model: nn.Module) -> int:
    """Size of the weights in memory, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
