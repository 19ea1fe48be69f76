"""Load any data set (see `bkd_hf.sources`) with standard splits, columns and classes."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from transformers.utils import logging

from .data import check_complete, class_counts, name_classes, selected, set_aside
from .errors import InputError
from .image_folders import LABEL_COLUMN
from .sources import SOURCES, holds, open_splits
from .tasks import TASKS, task_of_columns
from .text import have, normal

logger = logging.get_logger(__name__)

_LABEL_COLUMN_NAMES = ("label", "labels", "fine_label", "target", "class", "category", "cls")
_VALIDATION_SPLIT_NAMES = ("validation", "valid", "val", "dev")
_EVAL_SPLIT_NAMES = (*_VALIDATION_SPLIT_NAMES, "test", "eval")
_CARVED_SHARE = 0.2


class NoTestSplitError(InputError):
    """There is no published evaluation split."""


def load_image_dataset(
    name: str,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    split_seed: int = 0,
    cache_dir: str | None = None,
    token: str | None = None,
    untouched_test: bool = False,
) -> datasets.DatasetDict:
    """Load a labelled image data set from any source.

    Args:
        name: `"digits"` (comes with scikit-learn, needs no network), a Hub id, a folder written by `save_to_disk`, a
            folder of class folders, a folder of parquet files, or one parquet file.
        config_name: Configuration of a data set that has several.
        image_column: Name of the image column: images, with or without the type of `datasets`, or paths. If not given,
            it is found by its type; a column of paths must be given.
        label_column: Name of the label column; found by its type or a usual name if not given.
        train_split: Name of the training split; `"train"`, or the only one, if not given.
        eval_split: Name of the evaluation split. If not given, the first of validation, val, test, … that exists;
            without any, a fifth of each class is held out from the training split.
        split_seed: Selects which images are held out.
        cache_dir: Where `datasets` keeps its files.
        token: Token for private data sets.
        untouched_test: Whether the evaluation split must be a published one. If it is not named, `"test"` is then
            preferred to `"validation"`, which is returned too, and nothing is held out.

    Returns:
        The splits `"train"` and `"eval"`, and with `untouched_test` possibly `"validation"`, each with the columns
        `"image"` and `"label"` (a `ClassLabel`).

    Raises:
        NoTestSplitError: With `untouched_test`, if there is no such split.
        InputError: If something does not exist, or the labels are not classes.
    """
    options = config_name, image_column, label_column, train_split, eval_split, split_seed, cache_dir, token
    return load_dataset_of("image", name, *options, untouched_test)


def load_text_dataset(
    name: str,
    config_name: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    split_seed: int = 0,
    cache_dir: str | None = None,
    token: str | None = None,
) -> datasets.DatasetDict:
    """Load a labelled text data set from any source.

    Args:
        name: `"docstrings"` (comes with Python, needs no network), a Hub id, a folder written by `save_to_disk`, a
            folder of CSV, JSON or parquet files, or one such file.
        text_column: Name of the text column. If not given, the only text column beside the labels, or one with a usual
            name such as `"text"`.
        config_name: Configuration of a data set that has several.
        label_column: As for [`load_image_dataset`], like the following arguments.
        train_split: Name of the training split.
        eval_split: Name of the evaluation split.
        split_seed: Selects which texts are held out.
        cache_dir: Where `datasets` keeps its files.
        token: Token for private data sets.

    Returns:
        The splits `"train"` and `"eval"`, each with the columns `"text"` and `"label"` (a `ClassLabel`).

    Raises:
        InputError: If something does not exist, or the labels are not classes.
    """
    options = config_name, text_column, label_column, train_split, eval_split, split_seed, cache_dir, token
    return load_dataset_of("text", name, *options)


def load_dataset_of(
    task: str,
    name: str,
    config_name: str | None = None,
    column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    split_seed: int = 0,
    cache_dir: str | None = None,
    token: str | None = None,
    untouched_test: bool = False,
) -> datasets.DatasetDict:
    """Load a labelled data set of a task, as [`load_image_dataset`] and [`load_text_dataset`] do."""
    kind = TASKS[task]
    data = open_splits(task, name, config_name, cache_dir, token)
    train_name, eval_name = find_splits(name, data, train_split, eval_split, untouched_test)
    if untouched_test and eval_name is None:
        raise NoTestSplitError(
            f"{name} has no test split, which nobody trains on: it has {', '.join(data)}. Name one by "
            "--eval_split_name, or add one to the data set."
        )
    found = {"train": train_name, "eval": eval_name}
    if untouched_test:
        left = [split for split in data if split not in found.values()]
        found["validation"] = next((split for split in _VALIDATION_SPLIT_NAMES if split in left), None)
        if left := [f"{split} ({len(data[split]):,} {task}s)" for split in left if split != found["validation"]]:
            logger.warning(f"{name}: left out: {', '.join(left)}.")
    column, label_column = find_columns(task, name, data[train_name], column, label_column)
    splits = {}
    for split, split_name in found.items():
        if split_name is None:
            continue
        missing = {column, label_column} - set(data[split_name].column_names)
        if missing:
            raise InputError(f"{name}: split {split_name!r} has no column {sorted(missing)[0]!r}.")
        if len(data[split_name]) == 0:
            raise InputError(f"{name}: split {split_name!r} is empty; name another by --{split}_split_name.")
        names = {column: kind.column, label_column: LABEL_COLUMN}
        splits[split] = _standard_columns(data[split_name], names, SOURCES[task].feature)
        check_complete(splits[split], kind.column, task, f"{name}: split {split_name!r}, column {column!r}")

    splits = _to_class_labels(name, splits, label_column)
    counts = np.asarray(class_counts(splits["train"]))
    if counts.size < 2:
        raise InputError(f"{name}: column {label_column!r} has one class only; there is nothing to learn.")
    if (empty := counts == 0).any():
        raise InputError(
            f"{name}: {name_classes(splits['train'], LABEL_COLUMN, empty)} {have(empty.sum())} a name but no {task} "
            f"in split {train_name!r}. Remove such names, or give the split that has their {task}s."
        )
    if "eval" not in splits:
        splits = _carve_evaluation_split(task, name, splits["train"], counts, split_seed)
    class_counts(splits["eval"])  # refuses unlabelled examples
    return datasets.DatasetDict(splits)


def find_splits(
    name: str,
    data: datasets.DatasetDict | datasets.IterableDatasetDict,
    train_split: str | None,
    eval_split: str | None,
    untouched_test: bool,
) -> tuple[str, str | None]:
    """Return the names of the training and the evaluation split; `None` for the latter if there is none."""
    for option, split in (("train_split_name", train_split), ("eval_split_name", eval_split)):
        if split is not None and split not in data:
            raise InputError(f"--{option} {split}: {name} has the splits {', '.join(data)}.")
    if train_split is None:
        if "train" not in data and len(data) != 1:
            raise InputError(f"{name} has no split called train: name one of {', '.join(data)} by --train_split_name.")
        train_split = "train" if "train" in data else next(iter(data))
    if eval_split is None:
        usual = ("test", *_EVAL_SPLIT_NAMES) if untouched_test else _EVAL_SPLIT_NAMES
        eval_split = next((split for split in usual if split in data and split != train_split), None)
    if eval_split == train_split:
        raise InputError(f"--eval_split_name {eval_split} is the training split: an evaluation on it says nothing.")
    return train_split, eval_split


def find_columns(
    task: str,
    name: str,
    dataset: datasets.Dataset | datasets.IterableDataset,
    column: str | None,
    label_column: str | None,
) -> tuple[str, str]:
    """Return the names of the image (or text) column and of the label column."""
    features, option, source = dataset.features, f"{task}_column_name", SOURCES[task]
    columns = f"The columns are {', '.join(features)}."
    for given, chosen in ((option, column), ("label_column_name", label_column)):
        if chosen is not None and chosen not in features:
            raise InputError(f"--{given} {chosen}: {name} has the columns {', '.join(features)}.")
    if column is not None and not source.find({column: features[column]}) and not holds(features[column], "string"):
        raise InputError(f"--{option} {column}: the column holds {features[column]}, not {task}s.")
    labels = [each for each, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [each for each in _LABEL_COLUMN_NAMES if each in features]
    if label_column is None and len(labels) == 1 and usual and labels[0] not in usual:
        raise InputError(f"{name}: are the labels in {labels[0]!r} or in {usual[0]!r}? Say it by --label_column_name.")
    labels = labels if len(labels) == 1 else usual[:1]
    labels = labels if label_column is None else [label_column]
    if column is None:
        found = source.find({each: feature for each, feature in features.items() if each not in labels})
        if len(found) != 1:
            others = [other for other in SOURCES if other != task and len(SOURCES[other].find(features)) > len(found)]
            hint = f" For {others[0]}s say --task {others[0]}." if others and not found else ""
            raise InputError(
                f"{name} has {len(found)} {task} columns; name the one to use by --{option}. {columns}{hint}"
            )
        column = found[0]
    if not labels:
        raise InputError(f"{name}: no label column found; name it by --label_column_name. {columns}")
    if column == labels[0]:
        raise InputError(f"--{option} {column}: the labels are in this column, too. Name another for one of them.")
    return column, labels[0]


def _standard_columns(dataset: datasets.Dataset, names: dict[str, str], feature: Any) -> datasets.Dataset:
    """Keep only the columns of examples and labels, rename them, and cast the examples to this type."""
    column = next(iter(names))
    dataset = dataset.with_format(None).select_columns([*names])
    given = dataset.features[column]
    # Large texts stay large: `datasets` would write a copy beside a saved set.
    is_text = isinstance(feature, datasets.Value)
    if not (holds(given, feature.dtype) if is_text else isinstance(given, type(feature))):
        dataset = dataset.cast_column(column, feature)
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def _to_class_labels(name: str, splits: dict[str, datasets.Dataset], label_column: str) -> dict[str, datasets.Dataset]:
    """Give the label column of every split the same `ClassLabel` feature."""
    for split, dataset in splits.items():
        check_complete(dataset, LABEL_COLUMN, "label", f"{name}: {split} split, column {label_column!r}")
    feature = splits["train"].features[LABEL_COLUMN]
    if isinstance(feature, datasets.ClassLabel):
        of_splits = [dataset.features[LABEL_COLUMN] for dataset in splits.values()]
        names = [[normal(each) for each in getattr(other, "names", None) or ()] for other in of_splits]
        other = next((split for split, each in zip(splits, names, strict=True) if each != names[0]), None)
        if other is not None:
            other = "evaluation" if other == "eval" else other
            raise InputError(
                f"{name}: the training and the {other} split name their classes differently in {label_column!r}."
            )
        if len(set(names[0])) < len(names[0]):
            raise InputError(
                f"{name}: two classes in {label_column!r} have one name, whose accents are spelled twice."
            )
        if all(other.names == names[0] for other in of_splits):
            return splits
        classes = datasets.ClassLabel(names=names[0])
        return {split: dataset.cast_column(LABEL_COLUMN, classes) for split, dataset in splits.items()}
    check_are_classes(name, feature, label_column, task_of_columns(splits["train"].column_names).name)
    values = {split: selected(dataset, dataset.data.column(LABEL_COLUMN)) for split, dataset in splits.items()}
    if len({each.dtype == object for each in values.values()}) > 1:
        kinds = ", ".join(f"{split}: {dataset.features[LABEL_COLUMN].dtype}" for split, dataset in splits.items())
        raise InputError(
            f"{name}: the labels in column {label_column!r} are of other types in other splits ({kinds}). Give all "
            "splits names, or all numbers."
        )
    if values["train"].dtype == object:
        values = {split: np.array([normal(label) for label in labels], object) for split, labels in values.items()}
    known = np.unique(values["train"])
    if known.dtype.kind in "iu" and not np.array_equal(known, np.arange(known.size)):
        logger.warning(
            f"{name}: the {known.size} labels in {label_column!r} are not numbered 0 to {known.size - 1}; they are "
            "renumbered, and their old numbers become the class names."
            + (" -1 is a class, too: if it stands for no label, remove its examples." if known[0] == -1 else "")
        )
    renamed = {}
    for split, dataset in splits.items():
        numbers = np.minimum(np.searchsorted(known, values[split]), known.size - 1)
        unknown = np.flatnonzero(known[numbers] != values[split])
        if unknown.size:
            raise InputError(
                f"{name}: the {split} split has the label {values[split][unknown[0]]!r}, which the training split "
                "does not have."
            )
        renamed[split] = dataset.remove_columns(LABEL_COLUMN).add_column(
            LABEL_COLUMN, numbers.tolist(), feature=datasets.ClassLabel(names=[str(value) for value in known])
        )
    return renamed


def check_are_classes(name: str, feature: Any, label_column: str, unit: str) -> None:
    """Raise an `InputError` if a column, of this type, cannot hold one class for each example (a `unit`)."""
    if isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value)
        and (feature.dtype in ("string", "large_string", "bool") or feature.dtype.startswith(("int", "uint")))
    ):
        return
    several = isinstance(feature, (list, datasets.List, datasets.LargeList))
    raise InputError(
        f"{name}: the labels in column {label_column!r} are not classes. One class per {unit} is needed, a whole "
        f"number or a name; the column holds {feature}"
        + (f": several labels per {unit} (multi-label), which this method is not for." if several else ".")
    )


def _carve_evaluation_split(
    task: str, name: str, dataset: datasets.Dataset, counts: np.ndarray, split_seed: int
) -> dict[str, datasets.Dataset]:
    wanted = np.minimum(np.maximum(np.round(counts * _CARVED_SHARE), 1), counts - 1).astype(np.int64)
    train, evaluation = set_aside(dataset, wanted, split_seed)
    if len(evaluation) == 0:
        raise InputError(f"{name}: no evaluation split, and too few {task}s to carve one out. Add a test split.")
    logger.warning(
        f"{name} has no evaluation split: {len(evaluation)} of its {len(dataset)} {task}s, a fifth of each class, are "
        "set aside for evaluation."
    )
    return {"train": train, "eval": evaluation}
