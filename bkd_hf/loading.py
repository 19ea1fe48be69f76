"""Where data sets come from: the Hub, files, folders of images, the digits of scikit-learn, Python's docstrings."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError
from datasets.table import CastError
from transformers.utils import logging
from yaml import YAMLError

from .data import check_complete, choose_per_class, class_counts, labels_of, name_classes, selected
from .docstrings import GROUPS, docstrings
from .errors import InputError, first_line
from .image_folders import IMAGE_COLUMN, LABEL_COLUMN, class_features, files_below, load_image_folder
from .tasks import TASKS, TEXT_COLUMN, task_of_columns
from .text import have, normal, one_line

logger = logging.get_logger(__name__)

_LABEL_COLUMN_NAMES = ("label", "labels", "fine_label", "target", "class", "category", "cls")
_VALIDATION_SPLIT_NAMES = ("validation", "valid", "val", "dev")
_EVAL_SPLIT_NAMES = (*_VALIDATION_SPLIT_NAMES, "test", "eval")
_CARVED_SHARE = 0.2
_TEXT_COLUMN_NAMES = ("text", "sentence", "content", "document", "review")


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
    """Load a labelled text data set from wherever it is.

    Args:
        name: `"docstrings"` (comes with Python, needs no network), a Hub id, a folder written by `save_to_disk`, a
            folder of CSV, JSON or parquet files, or one such file.
        text_column: Name of the text column; the only column of text beside the labels, or `"text"` and the like, if
            not given.
        config_name: Configuration of a Hub data set.
        label_column: As for [`load_image_dataset`], and the following.
        train_split: Name of the training split.
        eval_split: Name of the evaluation split.
        split_seed: Which texts are carved out.
        cache_dir: Where `datasets` keeps its files.
        token: Token for private data sets.

    Returns:
        The splits `"train"` and `"eval"`, each with the columns `"text"` and `"label"` (a `ClassLabel`).

    Raises:
        InputError: If something is not there, or the labels are not classes.
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
    source, kind = _SOURCES[task], TASKS[task]
    if name in source.demo:
        data = source.demo[name]()
    else:
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
        splits[split] = _standard_columns(data[split_name], names, source.feature)
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
    return _with_test_split(everything, per_class=40)


def _load_docstrings() -> datasets.DatasetDict:
    """Return the docstrings of the standard library, 60 of each class for evaluation."""
    texts, labels = docstrings()
    features = datasets.Features(
        {TEXT_COLUMN: datasets.Value("string"), LABEL_COLUMN: datasets.ClassLabel(names=list(GROUPS))}
    )
    everything = datasets.Dataset.from_dict({TEXT_COLUMN: texts, LABEL_COLUMN: labels}, features=features)
    return _with_test_split(everything, per_class=60)


def _with_test_split(everything: datasets.Dataset, per_class: int) -> datasets.DatasetDict:
    wanted = np.full(everything.features[LABEL_COLUMN].num_classes, per_class)
    train, test = _set_aside(everything, wanted, seed=0)
    return datasets.DatasetDict({"train": train, "test": test})


def _set_aside(dataset: datasets.Dataset, wanted: np.ndarray, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return a data set without so many examples of each class, and these."""
    chosen = choose_per_class(labels_of(dataset), wanted, seed)
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), chosen)), dataset.select(chosen)


def open_splits(
    task: str, name: str, config_name: str | None, cache_dir: str | None, token: str | None, streaming: bool = False
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load what is there, with its own columns and splits; `streaming`: nothing of it yet."""
    source = _SOURCES[task]
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
            if path.suffix not in source.files or not path.is_file():
                others = [other for other in _SOURCES if path.suffix in _SOURCES[other].files]
                hint = f" For {others[0]}s say --task {others[0]}." if others and path.is_file() else ""
                kinds = " or ".join(source.files)
                raise InputError(f"--dataset_name {name}: a single file must be a {kinds} file.{hint}")
            data = datasets.load_dataset(
                source.files[path.suffix], data_files=str(path), cache_dir=cache_dir, streaming=streaming
            )
        else:
            data = source.folder(path) if path.is_dir() and config_name is None and not streaming else None
            if data is None:
                place = str(path) if path.is_dir() else name
                data = datasets.load_dataset(place, config_name, cache_dir=cache_dir, token=token, streaming=streaming)
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
            f"--dataset_name {name} cannot be loaded. {where}: {reason}. Give a Hub id, {source.others}, or "
            f'"{next(iter(source.demo))}".'
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
    task: str,
    name: str,
    dataset: datasets.Dataset | datasets.IterableDataset,
    column: str | None,
    label_column: str | None,
) -> tuple[str, str]:
    """Return the names of the columns of images (or texts) and labels."""
    features, option, source = dataset.features, f"{task}_column_name", _SOURCES[task]
    columns = f"The columns are {', '.join(features)}."
    for given, chosen in ((option, column), ("label_column_name", label_column)):
        if chosen is not None and chosen not in features:
            raise InputError(f"--{given} {chosen}: {name} has the columns {', '.join(features)}.")
    if column is not None and not source.find({column: features[column]}) and not _is(features[column], "string"):
        raise InputError(f"--{option} {column}: the column holds {features[column]}, not {task}s.")
    labels = [each for each, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(labels) != 1:
        labels = [each for each in _LABEL_COLUMN_NAMES if each in features][:1]
    labels = labels if label_column is None else [label_column]
    if column is None:
        found = source.find({each: feature for each, feature in features.items() if each not in labels})
        if len(found) != 1:
            others = [
                other for other in _SOURCES if other != task and len(_SOURCES[other].find(features)) > len(found)
            ]
            hint = f" For {others[0]}s say --task {others[0]}." if others and not found else ""
            raise InputError(
                f"{name} has {len(found)} {task} columns; name the one to use by --{option}. {columns}{hint}"
            )
        column = found[0]
    if not labels:
        raise InputError(f"{name}: no label column found; name it by --label_column_name. {columns}")
    return column, labels[0]


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


def _text_columns(features: Mapping[str, Any]) -> list[str]:
    """Columns of strings; of several those that are called as texts usually are."""
    texts = [column for column, feature in features.items() if _is(feature, "string")]
    usual = [column for column in _TEXT_COLUMN_NAMES if column in texts]
    return usual[:1] if len(texts) > 1 and usual else texts


@dataclass(frozen=True)
class _Source:
    """Where data of a task come from.

    Attributes:
        demo: What is always there, by name.
        files: Formats of a single file, by suffix.
        folder: Reads a folder that `datasets` should not read by itself; `None` where it should.
        others: What there is beside the Hub, for messages.
        find: Which columns hold examples.
        feature: The type of their column.
    """

    demo: dict[str, Callable[[], datasets.DatasetDict]]
    files: dict[str, str]
    folder: Callable[[Path], datasets.DatasetDict | None]
    others: str
    find: Callable[[Mapping[str, Any]], list[str]]
    feature: Any


_SOURCES = {
    "image": _Source(
        {"digits": _load_digits},
        {".parquet": "parquet"},
        load_image_folder,
        "a folder with one folder per class, a saved data set, a parquet file",
        _image_columns,
        datasets.Image(),
    ),
    "text": _Source(
        {"docstrings": _load_docstrings},
        {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"},
        lambda _: None,
        "a saved data set, a CSV, JSON or parquet file, a folder of such files",
        _text_columns,
        datasets.Value("string"),
    ),
}
#: What is always there, by name; the task of each.
DEMOS = {name: task for task, source in _SOURCES.items() for name in source.demo}


def _is(feature: Any, kind: str) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in (kind, f"large_{kind}")


def _standard_columns(dataset: datasets.Dataset, names: dict[str, str], feature: Any) -> datasets.Dataset:
    """Keep the columns of examples and labels, under these names, the first of this type."""
    column = next(iter(names))
    dataset = dataset.select_columns([*names])
    given = dataset.features[column]
    if not isinstance(given, type(feature)) or (isinstance(given, datasets.Value) and given != feature):
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
        unit = task_of_columns(splits["train"].column_names).name
        raise InputError(
            f"{name}: the labels in column {label_column!r} are not classes. One class per {unit} is needed, a whole "
            f"number or a name; the column holds {feature}"
            + (f": several labels per {unit} (multi-label), which this method is not for." if several else ".")
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
    task: str, name: str, dataset: datasets.Dataset, counts: np.ndarray, split_seed: int
) -> dict[str, datasets.Dataset]:
    wanted = np.minimum(np.maximum(np.round(counts * _CARVED_SHARE), 1), counts - 1).astype(np.int64)
    train, evaluation = _set_aside(dataset, wanted, split_seed)
    if len(evaluation) == 0:
        raise InputError(f"{name}: no evaluation split, and too few {task}s to carve one out. Add a test split.")
    logger.warning(
        f"{name} has no evaluation split: {len(evaluation)} of its {len(dataset)} {task}s, a fifth of each class, are "
        "set aside for evaluation."
    )
    return {"train": train, "eval": evaluation}
