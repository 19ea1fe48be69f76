"""Class counts of any training set."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch
from transformers.trainer_utils import has_length

from .data import class_counts as count_classes
from .data import labels_of


def count_training_examples(dataset: Any, num_classes: int | None) -> np.ndarray | None:
    """Class counts of a training set, from its `class_counts` or its labels; `None` if it can be read only once."""
    if hasattr(dataset, "class_counts"):
        counts = np.asarray(dataset.class_counts, dtype=np.int64)
    elif isinstance(dataset, datasets.Dataset) and (column := _label_column(dataset)) is not None:
        counts = np.asarray(count_classes(dataset, column))
    else:
        labels = training_labels(dataset)
        if labels is None:
            return None
        if labels.min(initial=0) < 0:
            raise ValueError(f"Label {labels.min()} of the training set is negative.")
        counts = np.bincount(labels)
    if num_classes is not None and len(counts) > num_classes:
        raise ValueError(
            f"The training set has the label {len(counts) - 1}, outside the range of the model's {num_classes} "
            "classes. Load the model with num_labels set to the number of classes of the data."
        )
    return np.pad(counts, (0, (num_classes or len(counts)) - len(counts)))


def training_labels(dataset: Any) -> np.ndarray | None:
    """Class number of each training example; `None` if the set can be read only once.

    Looks, in this order, for: a label column of a `datasets.Dataset`, a `labels` attribute, `targets` as in
    torchvision, and the labels in the examples themselves, which may take as long as reading all of them.
    """
    if isinstance(dataset, datasets.Dataset) and (column := _label_column(dataset)) is not None:
        return labels_of(dataset, column)
    for name in ("labels", "targets"):
        if hasattr(dataset, name):
            return np.asarray(getattr(dataset, name))
    if isinstance(dataset, torch.utils.data.IterableDataset) or not has_length(dataset):
        return None
    return np.asarray([int(_label_of(dataset[i])) for i in range(len(dataset))])


def _label_of(example: Any) -> Any:
    for name in ("labels", "label"):
        if name in example:
            return example[name]
    raise ValueError(f'The training examples have no "labels" to count, only {", ".join(example)}: pass class_counts.')


def _label_column(dataset: datasets.Dataset) -> str | None:
    named = [name for name in ("labels", "label") if name in dataset.column_names]
    typed = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    return next(iter(named or (typed if len(typed) == 1 else [])), None)
