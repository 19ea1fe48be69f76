"""The frozen teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification

from .errors import InputError


class FrozenTeacher(nn.Module):
    """A model that only answers: no gradient, evaluation mode for ever.

    `train()` has no effect, so nothing that switches a whole tree of modules to training can make its BatchNorm drift
    or its dropout active.

    Args:
        model: Any classifier whose output is logits, has `.logits`, or has them as its first element.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in evaluation mode, whatever `mode` says."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, **inputs: Any) -> torch.Tensor:
        """Return the logits, B×C."""
        outputs = self.model(**inputs)
        if isinstance(outputs, torch.Tensor):
            return outputs
        return outputs.logits if hasattr(outputs, "logits") else outputs[0]


def num_labels(model: nn.Module) -> int | None:
    """Return a model's number of classes, where its configuration tells."""
    return getattr(getattr(model, "config", None), "num_labels", None)


def load_teacher(teacher: str | nn.Module, **from_pretrained_kwargs: Any) -> FrozenTeacher:
    """Freeze a model, or load one and freeze it.

    Args:
        teacher: A module, a folder written by `save_pretrained`, or a Hub id.
        from_pretrained_kwargs: For `AutoModelForImageClassification.from_pretrained` (`token`, `revision`, …).

    Raises:
        InputError: If the teacher cannot be loaded, or parts of its weights are missing (a classifier with a random
            head teaches nonsense).
    """
    if isinstance(teacher, FrozenTeacher):
        return teacher
    if isinstance(teacher, nn.Module):
        return FrozenTeacher(teacher)
    from . import modeling_cifar_resnet  # noqa: F401 (makes the architecture known to the Auto classes)

    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            teacher, output_loading_info=True, **from_pretrained_kwargs
        )
    except (OSError, ValueError) as error:
        raise InputError(f"The teacher {teacher!r} cannot be loaded as an image classifier: {error}") from error
    incomplete = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if incomplete:
        raise InputError(
            f"The teacher {teacher!r} lacks trained weights for {', '.join(incomplete[:3])}"
            f"{', …' if len(incomplete) > 3 else ''}: distilling from them would teach nonsense. Give a teacher that "
            "was trained for image classification."
        )
    return FrozenTeacher(model)
