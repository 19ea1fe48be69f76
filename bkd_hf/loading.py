"""Where data sets come from: the Hub, files, folders of images, lists of files, the digits of scikit-learn."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError
from datasets.table import CastError
from transformers.utils import logging
from yaml import YAMLError

from .data import check_complete, choose_per_class, class_counts, labels_of, name_classes, selected
from .errors import InputError, first_line
from .image_folders import IMAGE_COLUMN, LABEL_COLUMN, class_features, files_below, load_image_folder
from .text import normal, one_line

logger = logging.get_logger(__name__)

_LABEL_COLUMN_NAMES = ("label", "labels", "fine_label", "target", "class", "category", "cls")
_VALIDATION_SPLIT_NAMES = ("validation", "valid", "val", "dev")
_EVAL_SPLIT_NAMES = (*_VALIDATION_SPLIT_NAMES, "test", "eval")
_CARVED_SHARE = 0.2
_DIGITS_TEST_IMAGES_PER_CLASS = 40


class NoTestSplitError(InputError):
    """There is no split that others measure on too."""


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
    """Load a labelled image data set from wherever it is.

    Args:
        name: `"digits"` (comes with scikit-learn, needs no network), a Hub id, a folder written by `save_to_disk`, a
            folder of class folders, a folder of parquet files, or one parquet file.
        config_name: Configuration of a Hub data set.
        image_column: Name of the image column: images, with or without the type that `datasets` gives them, or paths;
            found by its type if not given, unless it holds paths.
        label_column: Name of the label column; found by its type or a usual name if not given.
        train_split: Name of the training split; `"train"`, or the only one, if not given.
        eval_split: Name of the evaluation split. If not given, the first of validation, val, test, … that exists;
            without any, a fifth of each class is carved out of the training split.
        split_seed: Which images are carved out.
        cache_dir: Where `datasets` keeps its files.
        token: Token for private data sets.
        untouched_test: Whether the evaluation split is one that others measure on too: `"test"` before `"validation"`
            where it is not named, which then comes along, and none is carved out.

    Returns:
        The splits `"train"` and `"eval"`, with `untouched_test` maybe `"validation"`, each with the columns `"image"`
        and `"label"` (a `ClassLabel`).

    Raises:
        NoTestSplitError: With `untouched_test`, if there is no such split.
        InputError: If something is not there, or the labels are not classes.
    """
    data = _load_digits() if name == "digits" else open_splits(name, config_name, cache_dir, token)
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
        if left := [f"{split} ({len(data[split]):,} images)" for split in left if split != found["validation"]]:
            logger.warning(f"{name}: left out: {', '.join(left)}.")
    image_column, label_column = find_columns(name, data[train_name], image_column, label_column)
    splits = {}
    for split, split_name in found.items():
        if split_name is None:
            continue
        missing = {image_column, label_column} - set(data[split_name].column_names)
        if missing:
            raise InputError(f"{name}: split {split_name!r} has no column {sorted(missing)[0]!r}.")
        if len(data[split_name]) == 0:
            raise InputError(f"{name}: split {split_name!r} is empty; name another by --{split}_split_name.")
        splits[split] = _standard_columns(data[split_name], image_column, label_column)
        check_complete(splits[split], IMAGE_COLUMN, "image", f"{name}: split {split_name!r}, column {image_column!r}")

    splits = _to_class_labels(name, splits, label_column)
    counts = np.asarray(class_counts(splits["train"]))
    if counts.size < 2:
        raise InputError(f"{name}: column {label_column!r} has one class only; there is nothing to learn.")
    if (counts == 0).any():
        raise InputError(
            f"{name}: {name_classes(splits['train'], LABEL_COLUMN, counts == 0)} have a name but no image in split "
            f"{train_name!r}. Remove these names, or give the split that has their images."
        )
    if "eval" not in splits:
        splits = _carve_evaluation_split(name, splits["train"], counts, split_seed)
    class_counts(splits["eval"])  # refuses unlabelled examples
    return datasets.DatasetDict(splits)


def _load_digits() -> datasets.DatasetDict:
    """Return the 1,797 8×8 digits that come with scikit-learn, 40 of each for evaluation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = []
    for pixels in digits.images:
        Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(file := io.BytesIO(), format="PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    features = class_features([str(name) for name in digits.target_names])
    everything = datasets.Dataset.from_dict({IMAGE_COLUMN: images, LABEL_COLUMN: digits.target}, features=features)
    test = choose_per_class(digits.target, np.full(10, _DIGITS_TEST_IMAGES_PER_CLASS), seed=0)
    train = np.setdiff1d(np.arange(len(everything)), test)
    return datasets.DatasetDict({"train": everything.select(train), "test": everything.select(test)})


def open_splits(
    name: str, config_name: str | None, cache_dir: str | None, token: str | None, streaming: bool = False
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load what is there, with its own columns and splits; `streaming`: nothing of it yet."""
    path = Path(name).expanduser()
    if not path.exists() and name.startswith((".", "/", "~")):
        raise InputError(f"--dataset_name {name}: there is no such file or folder.")
    try:
        if (
            path.is_dir()
            and not streaming
            and any((path / file).exists() for file in ("dataset_dict.json", "state.json"))
        ):
            list(files_below(path))
            data = datasets.load_from_disk(str(path))
        elif path.exists() and not path.is_dir():
            if path.suffix != ".parquet" or not path.is_file():
                raise InputError(f"--dataset_name {name}: a single file must be a .parquet file.")
            data = datasets.load_dataset("parquet", data_files=str(path), cache_dir=cache_dir, streaming=streaming)
        else:
            data = load_image_folder(path) if path.is_dir() and config_name is None and not streaming else None
            if data is None:
                source = str(path) if path.is_dir() else name
                data = datasets.load_dataset(
                    source, config_name, cache_dir=cache_dir, token=token, streaming=streaming
                )
    except InputError:
        raise
    except Exception as error:  # of `datasets`, and of all that it reads with: there is no end of kinds
        where = (
            "It is a folder here, but holds no data set that `datasets` can read"
            if path.is_dir()
            else "The file here cannot be read"
            if path.exists()
            else "It is no file or folder here, and the Hub does not give it"
        )
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ is not None else error
        reason = first_line(cause)
        if isinstance(cause, IndexError):  # how `load_from_disk` fails on a split without rows
            reason = "one of its splits is empty"
        elif isinstance(cause, CastError):
            reason = f"its files differ in their columns, or in their types ({one_line(cause)})"
        elif isinstance(cause, YAMLError):
            reason = f"the metadata in its README.md are no YAML ({one_line(cause)})"
        elif isinstance(cause, UnicodeDecodeError):
            reason = f"a text in it is not in UTF-8 ({reason}): save it as such"
        raise InputError(
            f"--dataset_name {name} cannot be loaded. {where}: {reason}. Give a Hub id, a folder with one folder per "
            'class, a saved data set, a parquet file, or "digits".'
        ) from error
    return data if isinstance(data, dict) else datasets.DatasetDict({"train": data})


def find_splits(
    name: str,
    data: datasets.DatasetDict | datasets.IterableDatasetDict,
    train_split: str | None,
    eval_split: str | None,
    untouched_test: bool,
) -> tuple[str, str | None]:
    """Return the names of the splits to train and to evaluate on; `None` if none is for the latter."""
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
    name: str, dataset: datasets.Dataset | datasets.IterableDataset, image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Return the names of the columns of images and labels."""
    features = dataset.features
    columns = f"The columns are {', '.join(features)}."
    for option, column in (("image_column_name", image_column), ("label_column_name", label_column)):
        if column is not None and column not in features:
            raise InputError(f"--{option} {column}: {name} has the columns {', '.join(features)}.")
    if image_column is None:
        found = _image_columns(features)
        if len(found) != 1:
            raise InputError(
                f"{name} has {len(found)} image columns; name the one to use by --image_column_name. {columns}"
            )
        image_column = found[0]
    elif not _image_columns({image_column: features[image_column]}) and not _is(features[image_column], "string"):
        raise InputError(f"--image_column_name {image_column}: the column holds {features[image_column]}, not images.")
    if label_column is None:
        found = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        usual = [column for column in _LABEL_COLUMN_NAMES if column in features]
        if len(found) != 1 and not usual:
            raise InputError(f"{name}: no label column found; name it by --label_column_name. {columns}")
        label_column = found[0] if len(found) == 1 else usual[0]
    return image_column, label_column


def _image_columns(features: Mapping[str, Any]) -> list[str]:
    """Columns of images, whether or not the file says so: tables of pandas, polars and others do not.

    A plain column of bytes may hold anything; it is one of images where no other is.
    """
    images = [
        column
        for column, feature in features.items()
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and _is(feature.get("bytes"), "binary"))
    ]
    return images or [column for column, feature in features.items() if _is(feature, "binary")]


def _is(feature: Any, kind: str) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in (kind, f"large_{kind}")


def _standard_columns(dataset: datasets.Dataset, image_column: str, label_column: str) -> datasets.Dataset:
    dataset = dataset.select_columns([image_column, label_column])
    if not isinstance(dataset.features[image_column], datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image())
    names = {image_column: IMAGE_COLUMN, label_column: LABEL_COLUMN}
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def _to_class_labels(name: str, splits: dict[str, datasets.Dataset], label_column: str) -> dict[str, datasets.Dataset]:
    """Give the label column of every split the same `ClassLabel` feature."""
    for split, dataset in splits.items():
        check_complete(dataset, LABEL_COLUMN, "label", f"{name}: {split} split, column {label_column!r}")
    feature = splits["train"].features[LABEL_COLUMN]
    if isinstance(feature, datasets.ClassLabel):
        of_splits = [dataset.features[LABEL_COLUMN] for dataset in splits.values()]
        names = [[normal(each) for each in getattr(other, "names", None) or ()] for other in of_splits]
        if names[0] != names[-1]:
            raise InputError(
                f"{name}: the training and the evaluation split name their classes differently in {label_column!r}."
            )
        if len(set(names[0])) < len(names[0]):
            raise InputError(
                f"{name}: two classes in {label_column!r} have one name, whose accents are spelled twice."
            )
        if all(other.names == names[0] for other in of_splits):
            return splits
        classes = datasets.ClassLabel(names=names[0])
        return {split: dataset.cast_column(LABEL_COLUMN, classes) for split, dataset in splits.items()}
    if not isinstance(feature, datasets.Value) or not (
        feature.dtype in ("string", "large_string", "bool") or feature.dtype.startswith(("int", "uint"))
    ):
        several = isinstance(feature, (list, datasets.List, datasets.LargeList))
        raise InputError(
            f"{name}: the labels in column {label_column!r} are not classes. One class per image is needed, a whole "
            f"number or a name; the column holds {feature}"
            + (": several labels per image (multi-label), which this method is not for." if several else ".")
        )

    values = {split: selected(dataset, dataset.data.column(LABEL_COLUMN)) for split, dataset in splits.items()}
    if values["train"].dtype == object:
        values = {split: np.array([normal(label) for label in labels], object) for split, labels in values.items()}
    known = np.unique(values["train"])
    if known.dtype.kind in "iu" and not np.array_equal(known, np.arange(known.size)):
        logger.warning(
            f"{name}: the {known.size} labels in {label_column!r} are not numbered 0 to {known.size - 1}; they are "
            "renumbered, and their old numbers become the class names."
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


def _carve_evaluation_split(
    name: str, dataset: datasets.Dataset, counts: np.ndarray, split_seed: int
) -> dict[str, datasets.Dataset]:
    wanted = np.minimum(np.maximum(np.round(counts * _CARVED_SHARE), 1), counts - 1).astype(np.int64)
    chosen = choose_per_class(labels_of(dataset), wanted, split_seed)
    if chosen.size == 0:
        raise InputError(f"{name}: no evaluation split, and too few images to carve one out. Add a test split.")
    logger.warning(
        f"{name} has no evaluation split: {chosen.size} of its {len(dataset)} images, a fifth of each class, are set "
        "aside for evaluation."
    )
    return {"train": dataset.select(np.setdiff1d(np.arange(len(dataset)), chosen)), "eval": dataset.select(chosen)}
