"""A Gradio app of a finished run: `OUTPUT_DIR/space`, which works locally and as a Space on the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from .card import choices_of_card
from .data import IMAGE_COLUMN, fingerprint, labels_of
from .decoding import upright_rgb
from .errors import InputError
from .files import write_text
from .hub import CARD_NAME, FACTS_NAME, prepare
from .inputs import load_splits
from .metrics import wilson_interval
from .onnx_export import recorded_arguments
from .options import UNKNOWN_LICENSE
from .reading import read_text
from .results import ONNX_FILES, RESULTS_NAME, load_results, save_json
from .schema import check_repo_id
from .tasks import check_of_images, task_of
from .text import one_line

SPACE_FOLDER = "space"
_TEMPLATE = Path(__file__).with_name("space")
_PROCESSOR = "preprocessor_config.json"
_CPU_BUILDS = "https://download.pytorch.org/whl/cpu"  # other builds take gigabytes


def build_space(
    folder: Path, space_id: str, model_id: str | None = None, license: str | None = None, examples: int = 0
) -> Path:
    """Write the app of the finished run in a folder; return the app's folder, for [`bkd_hf.hub.publish_folder`].

    It uses the ONNX file if the student was exported, otherwise transformers and torch. It links the model `model_id`,
    and shows this number of `examples` of the evaluation set, each of another class, from common to rare.

    Raises:
        InputError: If the id is malformed, there is no finished run, or the evaluation images are not available.
    """
    check_repo_id(space_id)
    publication = prepare(folder, model_id or space_id, license=license)
    results = load_results(folder) if RESULTS_NAME in publication.files else {}
    check_of_images("--space", task_of(results.get("data", {})).name)
    if RESULTS_NAME not in publication.files or _PROCESSOR not in publication.files:
        raise InputError(
            f"--space: {folder} has no {RESULTS_NAME} or no {_PROCESSOR}: name the output folder of a run."
        )
    space = folder / SPACE_FOLDER
    images = _examples(folder, results, examples) if examples else []
    versions = {name: results["versions"][name].partition("+")[0] for name in ("torch", "transformers")}
    of_model = {name: path for name, path in publication.files.items() if "/" not in name and name != RESULTS_NAME}
    needed = f"--extra-index-url {_CPU_BUILDS}\ntorch>={versions['torch']}"
    if onnx := publication.files.get(ONNX_FILES["onnx"]):
        of_model = {"model.onnx": onnx, _PROCESSOR: of_model[_PROCESSOR]}
        needed = f"onnxruntime>={results['export']['onnxruntime']}"
    for part in ("model", "examples"):
        shutil.rmtree(space / part, ignore_errors=True)
        (space / part).mkdir(parents=True)
    for name, path in of_model.items():
        shutil.copyfile(path, space / "model" / name)
    for number, image in enumerate(images):
        upright_rgb(image).save(space / "examples" / f"{number:03}.png")
    shutil.copyfile(_TEMPLATE / "app.py", space / "app.py")
    write_text(space / "requirements.txt", f"{needed}\ntransformers>={versions['transformers']}\npillow\n")
    facts = class_facts(results)
    save_json(facts, space / FACTS_NAME)
    card = read_text(_TEMPLATE / CARD_NAME).format(
        title=json.dumps(facts["title"], ensure_ascii=False),
        license=license or choices_of_card(folder / CARD_NAME).get("license", UNKNOWN_LICENSE),
        models=json.dumps([model_id] if model_id else []),
        about=facts["about"],
    )
    write_text(space / CARD_NAME, card)
    return space


def class_facts(results: dict[str, Any]) -> dict[str, Any]:
    """Return the app's data: title, a line about the model, and facts about each class, in the model's order."""
    data, metrics = results["data"], results["student"]["metrics"]
    tested = np.array(data["eval_class_counts"])
    accuracies = np.array(metrics["per_class_accuracy"], dtype=float)
    bounds = wilson_interval(np.round(np.nan_to_num(accuracies) * tested), np.maximum(tested, 1))
    known = zip(data["class_names"], data["class_counts"], tested.tolist(), accuracies, *bounds, strict=True)
    return {
        "title": f"What is it? {one_line(data['name'], 60)}",
        "about": f"This model of {len(tested):,} classes recognises {metrics['accuracy']:.1%} of {tested.sum():,} "
        f"test images; of its worst class, {metrics['worst_class_accuracy']:.0%}.",
        "few_shot_threshold": data["few_shot_threshold"],
        "classes": [
            {
                "name": one_line(name), "training_images": trained, "test_images": number,
                "accuracy": round(accuracy, 4) if number else None, "interval": [round(low, 4), round(high, 4)],
            }
            for name, trained, number, accuracy, low, high in known
        ],
    }  # fmt: skip


def _examples(folder: Path, results: dict[str, Any], number: int) -> list[Any]:
    """The first evaluation images of some classes, spread evenly from the most to the fewest training images."""
    evaluation = load_splits(recorded_arguments(folder, "--space_examples"))["eval"]
    if fingerprint(evaluation) != results["data"]["eval_fingerprint"]:
        raise InputError(
            f"--space_examples: {folder} was evaluated on other images: put them back, or leave the option out."
        )
    labels = np.asarray(labels_of(evaluation))
    order = [c for c in np.argsort(-np.asarray(results["data"]["class_counts"]), kind="stable") if (labels == c).any()]
    chosen = dict.fromkeys(np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int).tolist())
    return [evaluation[int((labels == order[rank]).argmax())][IMAGE_COLUMN] for rank in chosen]
