"""What is classified: images, or texts. What a run has to know of either, beside how its examples are made.

How data of a task are found is in `bkd_hf.sources`, how its examples become a model's inputs in `bkd_hf.inputs`.
Cards, tables and figures call an example by the name of its task ([`task_of`]); a message that runs of any task may
give says "example".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from .errors import InputError
from .image_folders import IMAGE_COLUMN
from .text import one_line

#: Column name of a text in what `load_text_dataset` returns.
TEXT_COLUMN = "text"


@dataclass(frozen=True)
class Task:
    """What is classified.

    Attributes:
        name: `"image"`, …: what an example is called, too.
        title: Of the task, on the Hub.
        column: Of the examples, in a data set as it was loaded.
        main_input: Name of a model's first input.
        auto_model: Loads its classifiers; `configurations` holds the types of theirs.
        auto_processor: Loads what makes a model's inputs.
        fresh: Names of models with fresh weights, and, as a sentence tells them, `fresh_names`.
    """

    name: str
    title: str
    column: str
    main_input: str
    auto_model: Any
    configurations: Any
    auto_processor: Any
    fresh: re.Pattern[str]
    fresh_names: str

    @property
    def tag(self) -> str:
        """The pipeline's name, on the Hub and in `transformers`."""
        return f"{self.name}-classification"

    def takes(self, config: Any) -> bool:
        """Whether there is a classifier for this configuration, in transformers or in code that comes with it."""
        own_code = getattr(config, "auto_map", None) or {}
        return type(config) in self.configurations or self.auto_model.__name__ in own_code

    def check(self, name: str, config: Any) -> None:
        """Raise an `InputError` if a model, given by its configuration, classifies something else."""
        others = [task.name for task in TASKS.values() if task is not self and task.takes(config)]
        if others and not self.takes(config):
            raise InputError(
                f"The model {one_line(name, 80)} ({config.model_type}) classifies {others[0]}s, not {self.name}s: "
                f"name another, or use --task {others[0]}."
            )


TASKS = {
    task.name: task
    for task in (
        Task(
            "image",
            "Image classification",
            IMAGE_COLUMN,
            "pixel_values",
            AutoModelForImageClassification,
            MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
            AutoImageProcessor,
            re.compile(r"cifar-resnet-([0-9]{1,9})"),
            "cifar-resnet-20, -32, -44, -56 or -110",
        ),
        Task(
            "text",
            "Text classification",
            TEXT_COLUMN,
            "input_ids",
            AutoModelForSequenceClassification,
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
            AutoTokenizer,
            re.compile(r"bert-([0-9]{1,2})x([0-9]{1,4})"),
            "bert-LAYERSxWIDTH (bert-2x128)",
        ),
    )
}
#: The task where nothing is said, and that of older results.
DEFAULT_TASK = "image"


def fresh_task(name: str) -> str | None:
    """Return what a model classifies whose name asks for fresh weights; `None` for one that has weights."""
    return next((task.name for task in TASKS.values() if task.fresh.fullmatch(name)), None)


def check_task(
    task: str,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    options_of: Callable[[str], Collection[str]],
    has_cosine_head: bool,
) -> None:
    """Refuse what another task's runs have.

    Args:
        task: Of a run.
        options: What it is told, by name.
        defaults: What the options are if they are not given.
        options_of: Returns the names of those that mean something in one task alone.
        has_cosine_head: Whether its model gets a cosine head.

    Raises:
        InputError: For the first that does not go with the task.
    """
    name = options["model_name_or_path"]
    for other in TASKS.keys() - {task}:
        for option in sorted(options_of(other)):
            if options[option] != defaults[option]:
                raise InputError(f"--{option} is for --task {other}, and this is --task {task}: leave it out.")
    if fresh_task(name) not in (None, task):
        raise InputError(
            f"{name} classifies {fresh_task(name)}s, and this is --task {task}: name a Hub id, a folder, or "
            f"{TASKS[task].fresh_names} by --model_name_or_path."
        )
    if task != DEFAULT_TASK and has_cosine_head:
        raise InputError(
            "--head cosine, which --classification_loss ldam needs, is for --task image: use balanced_softmax or "
            "logit_adjustment, which work with any head."
        )
    if options["export"] == "onnx":
        check_of_images("--export onnx", task)


def check_of_images(option: str, task: str) -> None:
    """Raise an `InputError` if an option is given for another task than images, the only one that has it."""
    if task != DEFAULT_TASK:
        raise InputError(f"{option} is for --task {DEFAULT_TASK}, and this is --task {task}: leave it out.")


def task_of_columns(columns: list[str]) -> Task:
    """Return the task of a data set as it was loaded."""
    return next((task for task in TASKS.values() if task.column in columns), TASKS[DEFAULT_TASK])


def task_of(data: Mapping[str, Any]) -> Task:
    """Return the task of a run, from the `data` section of its results."""
    return TASKS[data.get("task", DEFAULT_TASK)]


def task_of_model(model: Any) -> str:
    """Return the name of a model's task, by its first input."""
    first = getattr(model, "main_input_name", None)
    return next((task.name for task in TASKS.values() if task.main_input == first), DEFAULT_TASK)
