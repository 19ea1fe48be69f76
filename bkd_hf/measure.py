"""Results of a trainer used from Python, as `bkd-hf run` collects them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch.utils.data import Dataset

from .callbacks import Clock
from .config import BKDConfig
from .models import label_names
from .results import describe_classes, describe_model, describe_run, described_task, history_of
from .tasks import task_of_model
from .teacher import TEACHER_PREFIX, gives_teacher_inputs


def measure(trainer: Any, dataset_name: str | None = None, dataset_id: str | None = None) -> dict[str, Any]:
    """Measure a trainer's student and teacher on its `eval_dataset`; all processes must call it.

    Args:
        trainer: A `BKDTrainer`.
        dataset_name: Name of the data set.
        dataset_id: Its id on the Hub, if it has one.

    Returns:
        The content of a `results.json` (see `bkd_hf.results`).

    Raises:
        ValueError: If there is no `eval_dataset`, there are no class counts, or `eval_dataset` lacks the teacher's
            inputs.
    """
    counts, images = trainer.class_counts, trainer.eval_dataset
    if images is None or isinstance(images, dict) or counts is None:
        raise ValueError(
            "Results are measured on one eval_dataset, with known class counts: pass both to the trainer."
        )
    teacher_images = _seen_by_teacher(trainer) if trainer.teacher_model is not None else None  # before any work
    _, measured = trainer.measure(images)
    names = label_names(getattr(trainer.model, "config", None)) or [str(number) for number in range(len(counts))]
    data = {
        **describe_classes(names, counts.tolist(), measured.labelled.tolist(), *trainer.long_tail.thresholds),
        "name": dataset_name or dataset_id or "own data",
        "hub_id": dataset_id,
        **described_task(task_of_model(trainer.model)),
    }
    student = describe_model(_name(trainer.model), trainer.model, measured)
    if trainer.num_trained_parameters is not None:
        student["num_trained_parameters"] = trainer.num_trained_parameters
    if (training := Clock.summary(trainer.state, trainer.examples_in_pass)) is not None:
        student["training"] = training
        student["history"] = history_of(trainer.state)
    teacher = None
    if trainer.teacher_model is not None:
        own = {"push_to_hub": False, "report_to": "none", "bf16_full_eval": False, "fp16_full_eval": False}
        evaluation = trainer.plain(
            model=trainer.teacher_model.as_classifier(),
            args=dataclasses.replace(trainer.args, **own),  # full_eval would convert the teacher for good
            data_collator=trainer.data_collator,
            eval_dataset=teacher_images,
            compute_metrics=trainer.long_tail,
        )
        _, measured = evaluation.measure(teacher_images)
        teacher = describe_model(_name(trainer.teacher_model.model), trainer.teacher_model, measured)
    return describe_run(options_used(trainer), data, student, teacher)


def options_used(trainer: Any) -> BKDConfig:
    """Return a trainer's options, with the batch size that `auto_find_batch_size` found."""
    args = copy.copy(trainer.args)
    if args.auto_find_batch_size and trainer.state.train_batch_size:
        args.per_device_train_batch_size = trainer.state.train_batch_size
    return args


def _name(model: Any) -> str:
    """Name from which a model was loaded; empty if it was made from a configuration."""
    return getattr(getattr(model, "config", None), "_name_or_path", "")


def _seen_by_teacher(trainer: Any) -> Any:
    """Return the evaluation images as the teacher's inputs."""
    of_training, of_evaluation = map(gives_teacher_inputs, (trainer.train_dataset, trainer.eval_dataset))
    if of_training and not of_evaluation:
        raise ValueError(
            "The teacher takes inputs of its own, which eval_dataset does not give, so it cannot be measured: give "
            "both data sets the same teacher_processor."
        )
    return _TeacherInputs(trainer.eval_dataset) if of_evaluation else trainer.eval_dataset


class _TeacherInputs(Dataset):
    """The teacher's inputs in place of the student's."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.dataset[index]
        inputs = {
            key.removeprefix(TEACHER_PREFIX): value for key, value in example.items() if key.startswith(TEACHER_PREFIX)
        }
        return {**{key: example[key] for key in ("labels", "label") if key in example}, **inputs}
