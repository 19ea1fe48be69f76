"""The frozen teacher, and the matching of its outputs with the classes of the data.

Teacher and student may come from different people. Mismatches are fixed or reported:

- **Pixels.** If the teacher's image processor differs (size, crop, mean, standard deviation, interpolation, order of
  channels), each view of an image, with its crop and flip, is rendered for both models; otherwise once.
- **Classes** are matched by name, ignoring case, hyphens and underscores. A different order is fixed; surplus outputs,
  such as those of an ImageNet-21k teacher, are dropped. `--teacher_label_map FILE` maps renamed classes, in JSON:
  `{"name in the data": "name or number at the teacher"}`. A teacher that lacks classes is rejected, with their names;
  `--allow_partial_teacher` distils only the others. A teacher without class names (`LABEL_0`, …) is rejected unless
  `--assume_label_order` is given.
- **A head for other classes** is replaced, and the teacher is first fine-tuned on the data, with its own image
  processor. `--finetune_teacher` does this in any case.
- **Final check**: a teacher whose accuracy on the evaluation images is no better than guessing is rejected, unless
  `--force_teacher` is given.

Tested as student and as teacher with tiny random weights (`tests/test_architectures.py`: two steps, save, reload in a
new process, `pipeline`, resumption to the same weights bit for bit):

transformers: ViT, DeiT, BEiT, Swin, Swin v2, ConvNeXt, ConvNeXt v2, DINOv2, PVT, LeViT, SigLIP, CLIP
convolutional: CIFAR ResNet, ResNet, RegNet, EfficientNet, MobileNet v2, MobileViT
timm: through TimmWrapper, where timm is installed; not tried on a CPU build of torch, which has no torchvision
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import AutoConfig
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_utils import has_length

from . import modeling_cifar_resnet, modeling_cosine_head  # noqa: F401 (makes them known to the Auto classes)
from .errors import InputError
from .head import num_labels
from .models import label_names, place_of, why_not_alike
from .tasks import DEFAULT_TASK, TASKS
from .text import normal, one_line

#: Inputs with this prefix go to the teacher, without the prefix.
TEACHER_PREFIX = "teacher_"
#: Key of precomputed teacher logits in an example and in a batch.
TEACHER_LOGITS = "teacher_logits"


class FrozenTeacher(nn.Module):
    """A model for inference only: without gradients, always in evaluation mode.

    `train()` has no effect, so switching a whole tree of modules to training cannot change its BatchNorm statistics or
    activate its dropout.

    Args:
        model: Any classifier whose output is logits, has `.logits`, or has them as its first element.
        columns: For each of the C classes of the data, the number of the model's output for it, or `None` if there is
            none (see [`align_labels`]). Not given: the outputs are the data's classes, in the same order.
    """

    #: Whether it was trained by a method that corrects for the class frequencies; `None` if that is not known.
    is_balanced: bool | None = None
    _columns: torch.Tensor | None
    #: The classes of the data that the teacher knows, if not all.
    known_classes: torch.Tensor | None

    def __init__(self, model: nn.Module, columns: Sequence[int | None] | None = None):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.num_classes = num_labels(model) if columns is None else len(columns)
        numbers = None if columns is None else torch.tensor([-1 if c is None else c for c in columns])
        if numbers is not None and numbers.tolist() == list(range(num_labels(model) or 0)):
            numbers = None  # no change
        known = None if numbers is None or (numbers >= 0).all() else (numbers >= 0).nonzero().flatten()
        self.register_buffer("_columns", numbers, persistent=False)
        self.register_buffer("known_classes", known, persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in evaluation mode, whatever `mode` is."""
        super().train(False)
        return self

    def as_classifier(self) -> TeacherAsClassifier:
        """Return a module whose output has `.logits`, which a `Trainer` can evaluate."""
        return TeacherAsClassifier(self)

    @property
    def input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return list(inspect.signature(self.model.forward).parameters)

    @property
    def columns(self) -> list[int] | None:
        """Number of the output for each class of the data, −1 for none; `None` if outputs are used unchanged."""
        return None if self._columns is None else self._columns.tolist()

    @torch.no_grad()
    def forward(self, **inputs: Any) -> torch.Tensor:
        """Return the logits, B×C; −∞ for classes that the teacher does not know."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        if dtype != torch.float32:  # a module given in half precision; images are in float32
            inputs = {
                name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for name, x in inputs.items()
            }
        # Avoids autograd's overhead; compiled code has none, and fails if it changes this mode itself.
        with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode():
            logits = self.model(**inputs)
        if not isinstance(logits, torch.Tensor):
            logits = logits.logits if hasattr(logits, "logits") else logits[0]
        if dtype != torch.float32:
            logits = logits.float()
        logits = logits.clone()  # an ordinary tensor, which autograd may save
        if self._columns is None:
            return logits
        aligned = logits.index_select(1, self._columns.clamp_min(0))
        return aligned.masked_fill(self._columns < 0, float("-inf"))


class TeacherAsClassifier(nn.Module):
    """A teacher whose output has `.logits`, with any inputs."""

    def __init__(self, teacher: FrozenTeacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, **inputs: Any) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.teacher(**inputs))


def gives_teacher_inputs(dataset: Any) -> bool:
    """Whether the examples of a data set have separate inputs for the teacher."""
    if isinstance(dataset, IterableDataset) or not (has_length(dataset) and hasattr(dataset, "__getitem__")):
        return False
    example = dataset[0] if len(dataset) else {}
    return isinstance(example, Mapping) and any(key.startswith(TEACHER_PREFIX) for key in example)


def why_not_start_from(teacher: FrozenTeacher, student: nn.Module, dataset: Any) -> str | None:
    """Return why a student cannot start from a teacher's weights and learn from these examples; `None` if it can."""
    why_not = why_not_alike(student, teacher.model)
    if why_not is None and teacher.columns is not None:
        why_not = "the teacher's outputs are in another order"
    if why_not is None and gives_teacher_inputs(dataset):
        why_not = "the teacher takes other inputs than the student"
    return why_not


def starts_from(teacher: FrozenTeacher, student: nn.Module, dataset: Any, args: Any, objective: Any) -> bool:
    """Whether a student is to start from its teacher's weights, by the option `student_init`.

    Args:
        teacher: The teacher.
        student: The student.
        dataset: Training examples.
        args: A [`BKDConfig`].
        objective: The [`Objective`], whose power may have to be measured for this.

    Raises:
        InputError: If it must, and cannot.
    """
    if args.student_init == "model":
        return False
    why_not = why_not_start_from(teacher, student, dataset)
    if why_not is not None and args.student_init == "teacher":
        raise InputError(f"--student_init teacher: {why_not}. Use model, or a teacher like the student.")
    # With p = 1 the teacher has learned all it can: its logits are worth more than its weights.
    has_own_start = objective.power >= 1 or args.head_init != "random"
    return why_not is None and not (args.student_init == "auto" and has_own_start)


def split_inputs(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], torch.Tensor]:
    """Split a batch into inputs of the student, inputs of the teacher (the same without separate ones), and labels.

    Raises:
        ValueError: If there are no labels, or nothing else.
    """
    own = {k: v for k, v in inputs.items() if not k.startswith(TEACHER_PREFIX)}
    labels = own.pop("labels", None)
    if labels is None:
        raise ValueError(f'The batch has no "labels", only {", ".join(inputs)}.')
    if not own:
        raise ValueError(
            'The batch has labels, but nothing that the model takes, such as "pixel_values": columns of other names '
            "have been removed. Use ImageDataset(images, processor), or TextDataset for texts."
        )
    names = [k for k in inputs if k.startswith(TEACHER_PREFIX) and k != TEACHER_LOGITS]
    return own, {k.removeprefix(TEACHER_PREFIX): inputs[k] for k in names} or own, labels


def teacher_label_names(teacher: str, task: str = DEFAULT_TASK, **from_pretrained_kwargs: Any) -> list[str] | int:
    """Return the names of a teacher's outputs; their number if they have no names or generic ones (`LABEL_0`, …).

    Raises:
        InputError: If there is no such model, or it is for another task.
    """
    try:
        config = AutoConfig.from_pretrained(teacher, **from_pretrained_kwargs)
        names = label_names(config)
    except Exception as error:  # libraries may raise any exception for broken files
        raise _not_loadable(teacher, error, task) from error
    TASKS[task].check(teacher, config)
    return config.num_labels if names is None else names


def align_labels(
    teacher_names: Sequence[str], class_names: Sequence[str], label_map: Mapping[str, str | int] | None = None
) -> list[int | None]:
    """Find, for each class of the data, the teacher's output of that name.

    Case, underscores, hyphens and spaces are ignored, unless that makes names ambiguous.

    Args:
        teacher_names: Names of the teacher's outputs.
        class_names: Names of the C classes of the data.
        label_map: For renamed classes: name in the data → name (or number) of the teacher's output.

    Returns:
        For each class the number of an output, `None` if there is none.

    Raises:
        InputError: If the map has an unknown name, a name is ambiguous, or two classes get the same output.
    """
    label_map = {normal(name): other for name, other in (label_map or {}).items()}
    class_names = [normal(name) for name in class_names]
    if unknown := [name for name in label_map if name not in set(class_names)]:
        raise InputError(f"--teacher_label_map: the data has no class {', '.join(map(repr, unknown[:5]))}.")
    exact, similar = _numbers_by_name(teacher_names, normal), _numbers_by_name(teacher_names, _plain)

    columns: list[int | None] = []
    for name in class_names:
        wanted = label_map.get(name, name)
        if isinstance(wanted, int):
            found = [wanted] if 0 <= wanted < len(teacher_names) else []
        else:
            found = exact.get(normal(wanted)) or similar.get(_plain(wanted), [])
        if len(found) > 1:
            raise InputError(
                f"The teacher has {len(found)} outputs called {wanted!r} (numbers {', '.join(map(str, found))}): "
                "choose one by its number with --teacher_label_map."
            )
        if not found and name in label_map:
            raise InputError(f"--teacher_label_map: the teacher has no output {wanted!r} (for {name!r}).")
        columns.append(found[0] if found else None)
    for number, names in _numbers_by_name(columns, lambda column: column).items():
        if number is not None and len(names) > 1:
            first, second = (class_names[i] for i in names[:2])
            raise InputError(
                f"The teacher's output {number} ({teacher_names[number]!r}) would stand for both {first!r} and "
                f"{second!r}: each class needs its own; see --teacher_label_map."
            )
    return columns


def _numbers_by_name(names: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[int]]:
    numbers: dict[Any, list[int]] = {}
    for number, name in enumerate(names):
        numbers.setdefault(key(name), []).append(number)
    return numbers


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", normal(name)).strip().casefold()


def beats_guessing(accuracies: Sequence[float], num_images: Sequence[int]) -> bool | None:
    """Decide whether a classifier is better than guessing.

    Guessing is right for 1/C of the images of a class on average. The mean over C classes then has the standard
    deviation σ = √( (1/C) · (1 − 1/C) · Σ_c 1/n_c ) / C. An accuracy three σ above 1/C is better than guessing, or,
    with few images, one half of the way from 1/C to 1; in any case it must be a fiftieth of that way above 1/C.

    Args:
        accuracies: Of C classes, fractions.
        num_images: n > 0 of each, on which they were measured.

    Returns:
        `None` if it cannot be decided.
    """
    number = len(accuracies)
    chance, mean = 1 / number, sum(accuracies) / number
    sigma = math.sqrt(chance * (1 - chance) * sum(1 / n for n in num_images)) / number
    least, half = 0.02 * (1 - chance), 0.5 * (1 - chance)
    if mean >= chance + max(min(3 * sigma, half), least):
        return True
    return None if 3 * sigma > half or mean >= chance + max(sigma, least) else False


def load_teacher(
    teacher: str | nn.Module,
    columns: Sequence[int | None] | None = None,
    task: str = DEFAULT_TASK,
    **from_pretrained_kwargs: Any,
) -> FrozenTeacher:
    """Freeze a model, or load one and freeze it.

    Args:
        teacher: A module, a folder written by `save_pretrained`, or a Hub id.
        columns: As for [`FrozenTeacher`].
        task: What it classifies: `"image"` or `"text"`.
        from_pretrained_kwargs: For `from_pretrained` (`token`, `revision`, …).

    Raises:
        InputError: If the teacher cannot be loaded, or parts of its weights are missing (a classifier with a random
            head teaches nonsense).
    """
    if isinstance(teacher, FrozenTeacher):
        return teacher
    if isinstance(teacher, nn.Module):
        return FrozenTeacher(teacher, columns)
    try:
        model, info = TASKS[task].auto_model.from_pretrained(
            teacher, output_loading_info=True, **{"dtype": torch.float32, **from_pretrained_kwargs}
        )
    except Exception as error:  # as in `teacher_label_names`
        raise _not_loadable(teacher, error, task) from error
    incomplete = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if incomplete:
        raise InputError(
            f"The teacher {teacher!r} lacks trained weights for {', '.join(incomplete[:3])}"
            f"{', …' if len(incomplete) > 3 else ''}: distilling from them would teach nonsense. Give a teacher that "
            f"was trained for {task} classification, or have it trained on the data first (--finetune_teacher)."
        )
    return FrozenTeacher(model, columns)


def _not_loadable(teacher: str, error: Exception, task: str) -> InputError:
    return InputError(
        f"The teacher {teacher!r} cannot be loaded as a classifier of {task}s ({place_of(teacher)}): "
        f"{one_line(error, 300)}"
    )


def check_numbers_of_classes(
    student: nn.Module, teacher: FrozenTeacher | None, class_counts: Sequence[int] | np.ndarray | None
) -> None:
    """Raise a `ValueError` unless student, teacher and data have the same number of classes, as far as known."""
    numbers = {
        "student": num_labels(student),
        "teacher": None if teacher is None else teacher.num_classes,
        "class counts": None if class_counts is None else len(class_counts),
    }
    known = {name: number for name, number in numbers.items() if number is not None}
    if len(set(known.values())) > 1:
        raise ValueError(
            "Student, teacher and data must have the same classes; their numbers are "
            + ", ".join(f"{name}: {number}" for name, number in known.items())
            + ". Load the models with num_labels set to the number of classes of the data."
        )


def check_order_of_classes(student: nn.Module, teacher: FrozenTeacher) -> None:
    """Check that a teacher whose outputs are used unchanged has the student's classes in the same order.

    Warns if the two have names, but none in common.

    Raises:
        ValueError: If a class of the student is another output of the teacher, by name.
    """
    ours, theirs = (label_names(getattr(model, "config", None)) for model in (student, teacher.model))
    if ours is None or theirs is None or ours == theirs or len(ours) != len(theirs):
        return
    columns = align_labels(theirs, ours)
    if all(column is None for column in columns):
        warnings.warn(
            f"Student and teacher have no class name in common ({ours[0]!r}, … and {theirs[0]!r}, …): their classes "
            "are taken to be in the same order.",
            stacklevel=3,
        )
    for number, column in enumerate(columns):
        if column not in (None, number):
            raise ValueError(
                f"Class {number} of the student, {ours[number]!r}, is output {column} of the teacher: teacher_model "
                "must have the student's order. Pass FrozenTeacher(teacher, align_labels(teacher_names, "
                "student_names)), which puts its outputs into this order by name."
            )
