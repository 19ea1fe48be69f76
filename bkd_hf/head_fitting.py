"""Fitting a classifier's head to training images: class means before training, a balanced bias after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from .config import HEAD_SCALE, BKDConfig
from .data import choose_per_class
from .errors import InputError
from .head import (
    balancing_shift,
    favours_a_class,
    head_biases,
    least_lowering,
    sample_for_bias,
    shift_logits,
    the_head,
)
from .nodes import on_main_process
from .teacher import split_inputs
from .text import names_of
from .training_data import TrainingData, training_labels

logger = logging.get_logger(__name__)

#: Maximal numbers of training images, per class and in total, whose features are averaged.
IMAGES_PER_CLASS, NUM_IMAGES = 1000, 100_000


def fit_bias(student: nn.Module, data: TrainingData, args: BKDConfig, sharded: bool) -> torch.Tensor | None:
    """Fit the bias of a student's head so that the student favours no class.

    First the remaining prior is removed (see [`balancing_shift`]), then classes that are still predicted too often are
    lowered (see [`least_lowering`]).

    Args:
        student: In evaluation mode; the bias of its head is changed.
        data: The training images.
        args: With `head_bias` `"balanced"`, or `"auto"` to fit only if a class is favoured.
        sharded: Whether the weights are sharded over processes.

    Returns:
        The C numbers that were added, or `None` if the bias was not changed.
    """
    try:
        labels = training_labels(data.dataset)
    except ValueError:  # the collator makes them
        labels = None
    if labels is None or sharded or not head_biases(student):
        logger.warning("The head's bias stays as it was learned: it cannot be fitted here (--head_bias).")
        return None
    sample = sample_for_bias(labels, args.seed)
    logits, labels_of_sample = data.answers(lambda batch: student(**split_inputs(batch)[0]).logits, sample)

    def fitted() -> torch.Tensor | None:
        if args.head_bias == "auto" and not favours_a_class(logits, labels_of_sample):
            return None
        shift = balancing_shift(logits, labels_of_sample)
        return shift + least_lowering(logits.cpu() + shift, labels_of_sample)

    shift = on_main_process(fitted)  # other processes may round differently
    if shift is not None:
        shift_logits(student, shift)
    return shift


def describe_bias_shift(shift: Sequence[float], class_names: Sequence[str]) -> str:
    """Describe what was added to the logits of C classes (see [`fit_bias`])."""
    ends = (f"{end:+.2f} ({class_names[shift.index(end)]!r})" for end in (min(shift), max(shift)))
    return (
        "In the end the head's bias was fitted to training examples, balanced over the classes (--head_bias): from "
        f"{' to '.join(ends)}."
    )


def start_from_class_means(student: nn.Module, data: TrainingData, args: BKDConfig) -> None:
    """Set each class vector of the head to the normalised mean feature of the class's training images.

    As in LIFT (Shi et al., 2024, arXiv 2309.10019): a tail class starts at its images, not at random. A linear head
    starts with logits as large as those of a cosine head, and without a bias.

    Args:
        student: In evaluation mode, with C×F weights in its head.
        data: The training images, as in the first epoch; at most `IMAGES_PER_CLASS` of each class are used.
        args: Options.

    Raises:
        InputError: If a class has no training image, or a head has no class vectors.
        ValueError: If the training set can be read only once.
    """
    labels, layers = training_labels(data.dataset), class_vectors(student)
    if labels is None:
        raise ValueError("--head_init class_mean needs a training set that can be read more than once.")
    num_classes = len(layers[0].weight)
    names = getattr(getattr(student, "config", None), "id2label", None) or {}
    check_means(np.bincount(labels[labels >= 0], minlength=num_classes), names)
    most = max(1, min(IMAGES_PER_CLASS, NUM_IMAGES // num_classes))
    seen: dict[nn.Module, torch.Tensor] = {}
    hooks = [layer.register_forward_pre_hook(lambda layer, given: seen.update({layer: given[0]})) for layer in layers]

    def features(batch: dict[str, Any]) -> torch.Tensor:
        student(**split_inputs(batch)[0])
        return torch.cat([seen[layer].flatten(1) for layer in layers], dim=1)

    try:
        found, of_class = data.answers(features, choose_per_class(labels, np.full(num_classes, most), args.seed))
    finally:
        for hook in hooks:
            hook.remove()
    one_hot = F.one_hot(of_class, num_classes).double()
    means = on_main_process(lambda: one_hot.T @ found.double() / one_hot.sum(dim=0)[:, None])
    scale, widths = args.cosine_scale or HEAD_SCALE, [layer.weight.shape[1] for layer in layers]
    with torch.no_grad():
        for layer, vectors, inputs in zip(layers, means.split(widths, dim=1), found.split(widths, dim=1), strict=True):
            layer.weight.copy_(F.normalize(vectors, dim=1) * scale / inputs.norm(dim=1).mean().clamp_min(1e-6))
            if getattr(layer, "bias", None) is not None:
                layer.bias.zero_()


def check_means(class_counts: Sequence[int] | np.ndarray, class_names: Mapping[int, str]) -> None:
    """Raise an `InputError` naming the classes without training images, which have no mean."""
    if empty := np.flatnonzero(np.asarray(class_counts) == 0).tolist():
        raise InputError(
            f"--head_init class_mean: there is no training example of {names_of(empty, class_names)}, so no mean. Use "
            "--head_init random."
        )


def class_vectors(model: nn.Module) -> list[Any]:
    """Return the layers whose C×F weights hold the class vectors: one for each head.

    Raises:
        InputError: If a head has none.
    """
    found = []
    for head in the_head(model).values():
        layers = [layer for layer in head.modules() if getattr(getattr(layer, "weight", None), "ndim", 0) == 2]
        if not layers:
            raise InputError(
                f"--head_init class_mean: the head of {type(model).__name__} has no vector for each class. Use "
                "--head_init random."
            )
        found.append(layers[-1])
    return found
