"""The tasks, image or text classification, and what a run must know about them.

`bkd_hf.sources` finds the data of a task, `bkd_hf.inputs` turns examples into a model's inputs. Cards, tables and
figures call an example by the name of its task ([`task_of`]); messages shared by all tasks say "example".
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
    """A classification task.

    Attributes:
        name: `"image"`, …; also the name of an example.
        title: Title of the task on the Hub.
        column: Column of the examples in a loaded data set.
        main_input: Name of a model's first input.
        auto_model: Loads its classifiers; `configurations` holds their configuration classes.
        auto_processor: Loads a model's processor.
        fresh: Names of models with fresh weights; `fresh_names` for sentences.
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
        """Whether there is a classifier for this configuration, in transformers or in code of the model."""
        own_code = getattr(config, "auto_map", None) or {}
        return type(config) in self.configurations or self.auto_model.__name__ in own_code

    def check(self, name: str, config: Any) -> None:
        """Raise an `InputError` if a model, according to its configuration, is for another task."""
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
#: The default task, and that of older results.
DEFAULT_TASK = "image"


def fresh_task(name: str) -> str | None:
    """Return the task of a name that stands for fresh weights; `None` for a model with weights."""
    return next((task.name for task in TASKS.values() if task.fresh.fullmatch(name)), None)


def check_task(
    task: str,
    options: Mapping[str, Any],
    defaults: Mapping[str, Any],
    options_of: Callable[[str], Collection[str]],
    has_cosine_head: bool,
) -> None:
    """Check that a run uses no options of another task.

    Args:
        task: Task of the run.
        options: Its options by name.
        defaults: Defaults of the options.
        options_of: Returns the names of the options that only one task has.
        has_cosine_head: Whether its model gets a cosine head.

    Raises:
        InputError: For the first option of another task.
    """
    name = options["model_name_or_path"]
    for other in TASKS.keys() - {task}:
        for option in sorted(options_of(other)):
            if options[option] != defaults[option]:
                raise InputError(
                    f"--{option} is for --task {other}, and this is --task {task}: leave it out or use --task {other}."
                )
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
    """Raise an `InputError` if an option for images is given in another task."""
    if task != DEFAULT_TASK:
        raise InputError(f"{option} is for --task {DEFAULT_TASK}, and this is --task {task}: leave it out.")


def task_of_columns(columns: list[str]) -> Task:
    """Return the task of a loaded data set."""
    return next((task for task in TASKS.values() if task.column in columns), TASKS[DEFAULT_TASK])


def task_of(data: Mapping[str, Any]) -> Task:
    """Return the task of a run, from the `data` section of its results."""
    return TASKS[data.get("task", DEFAULT_TASK)]


def task_of_model(model: Any) -> str:
    """Return the name of a model's task, by its first input."""
    first = getattr(model, "main_input_name", None)
    return next((task.name for task in TASKS.values() if task.main_input == first), DEFAULT_TASK)
