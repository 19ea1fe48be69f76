"""Where examples come from: data sets, folders of images, long-tailed subsets of them, class counts."""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetsError
from datasets.table import CastError
from transformers.utils import logging
from yaml import YAMLError

from .errors import InputError, first_line
from .image_folders import IMAGE_COLUMN, LABEL_COLUMN, class_features, files_below, load_image_folder
from .reading import check_file
from .sampling import hash_uniform
from .text import normal, one_line

logger = logging.get_logger(__name__)

Profile = Literal["exp", "step", "pareto"]
PROFILES: tuple[Profile, ...] = ("exp", "step", "pareto")
#: Shape of ImageNet-LT's tail (Liu et al., 2019).
PARETO_ALPHA = 6.0

#: Up to so many bytes of image files are read to tell whether they are the same: a minute of a slow disk.
READABLE_BYTES = 10_000_000_000

_LABEL_COLUMN_NAMES = ("label", "labels", "fine_label", "target", "class", "category")
_EVAL_SPLIT_NAMES = ("validation", "valid", "val", "dev", "test", "eval")
_MOST_CLASSES = 2**24
_CARVED_SHARE = 0.2
_DIGITS_TEST_IMAGES_PER_CLASS = 40


# ---- Long-tailed subsets ------------------------------------------------------------------------------------------


def long_tailed_counts(
    max_count: int,
    num_classes: int,
    imbalance_ratio: float,
    profile: Profile = "exp",
    pareto_alpha: float = PARETO_ALPHA,
) -> list[int]:
    """Class counts of a long-tailed training set (Cui et al., 2019; Cao et al., 2019; Liu et al., 2019), head first.

        exp:     n_i = int(max_count · ratio^(−i / (C − 1)))
        step:    n_i = max_count for the first half of the classes, int(max_count / ratio) for the others
        pareto:  n_i = int(max_count · max(q_i / q_0, 1 / ratio)),  q_i = ((i + 1) / C)^(−1/α) − 1

    The q_i are quantiles of a Pareto distribution that starts at 0 (Lomax). They stand in for the random draw from a
    Pareto distribution by which Liu et al. made ImageNet-LT: 1000 classes, 1280 images in the largest, ratio 256 and
    α = 6 give 117,059 images, where theirs has 115,846, and 1280 to 5 in a class, as theirs.

    Args:
        max_count: Images of the largest class.
        num_classes: C ≥ 2.
        imbalance_ratio: Images of the largest class per image of the smallest, ≥ 1.
        profile: `"exp"`, `"step"` or `"pareto"`. With an odd C the middle class of `"step"` is a head class.
        pareto_alpha: α > 0 of `"pareto"`; the smaller, the fewer images the tail has.

    Returns:
        C counts, truncated; a count is 0 where `max_count` is too small for the ratio.

    Raises:
        InputError: If an argument is out of its range.
    """
    if max_count < 1:
        raise InputError(f"max_count must be at least 1, got {max_count}.")
    shares = _profile_shares(num_classes, imbalance_ratio, profile, pareto_alpha)
    return [int(max_count * share) for share in shares]


def make_long_tailed(
    dataset: datasets.Dataset,
    label_column: str = LABEL_COLUMN,
    imbalance_ratio: float = 100.0,
    profile: Profile = "exp",
    split_seed: int = 0,
    max_count: int | None = None,
    class_order: Sequence[int] | None = None,
    pareto_alpha: float = PARETO_ALPHA,
) -> datasets.Dataset:
    """Select a long-tailed subset, with class counts as [`long_tailed_counts`] gives them.

    The subset depends on (`split_seed`, labels, index) and on nothing else; a subset with a higher ratio is contained
    in one with a lower ratio.

    Args:
        dataset: A set with enough images in each class; a balanced one, usually.
        label_column: Name of its label column.
        imbalance_ratio: Images of the largest class per image of the smallest, ≥ 1.
        profile: `"exp"`, `"step"` or `"pareto"`.
        split_seed: Which images are kept.
        max_count: Images of the largest class; by default the most for which every class has enough images.
        class_order: All class numbers, the largest class first; by default 0, 1, 2, …
        pareto_alpha: α of `"pareto"`.

    Returns:
        A selection of `dataset`, in its order.

    Raises:
        InputError: If an argument is out of its range, or a class would be left without images or has fewer images
            than its share.
    """
    available = np.asarray(class_counts(dataset, label_column))
    num_classes = available.size
    order = np.arange(num_classes) if class_order is None else np.asarray(class_order)
    if not np.array_equal(np.sort(order), np.arange(num_classes)):
        raise InputError(f"class_order must name each of the {num_classes} classes once, got {list(order)}.")
    name_those = functools.partial(_name_classes, dataset, label_column)
    if max_count is None:
        shares = _profile_shares(num_classes, imbalance_ratio, profile, pareto_alpha)
        max_count = int(np.min(available[order] / np.asarray(shares)))
        if max_count < 1:
            raise InputError(f"{name_those(available == 0)} without images: nothing to select from.")
    wanted = np.zeros(num_classes, dtype=np.int64)
    wanted[order] = long_tailed_counts(max_count, num_classes, imbalance_ratio, profile, pareto_alpha)
    if (wanted == 0).any():
        raise InputError(
            f"imbalance_ratio {imbalance_ratio:g} leaves {name_those(wanted == 0)} without images, as the largest "
            f"class has {max_count}: choose a ratio of {max_count} or below."
        )
    if (wanted > available).any():
        first = int(np.argmax(wanted > available))
        raise InputError(
            f"{name_those(wanted > available)} cannot give the images asked for: class {first} has "
            f"{available[first]}, its share is {wanted[first]}. Lower max_count ({max_count}) or change class_order."
        )
    return dataset.select(choose_per_class(labels_of(dataset, label_column), wanted, split_seed))


def limit_examples(
    dataset: datasets.Dataset, max_examples: int | None, option: str, seed: int = 0
) -> datasets.Dataset:
    """Select about `max_examples` examples (for quick tries), in proportion to the class counts.

    Each class that has images keeps at least one.

    Raises:
        InputError: Naming `option`, if `max_examples` is smaller than the number of classes.
    """
    if max_examples is None or max_examples >= len(dataset):
        return dataset
    available = np.asarray(class_counts(dataset, LABEL_COLUMN))
    num_present = int((available > 0).sum())
    if max_examples < num_present:
        raise InputError(
            f"--{option} {max_examples} is fewer than one example for each of the {num_present} classes: "
            f"use {num_present} or more."
        )
    wanted = np.minimum(np.maximum(available * max_examples // len(dataset), 1), available)
    return dataset.select(choose_per_class(labels_of(dataset, LABEL_COLUMN), wanted, seed))


def _profile_shares(num_classes: int, imbalance_ratio: float, profile: str, pareto_alpha: float) -> list[float]:
    """Counts relative to the largest class."""
    if num_classes < 2:
        raise InputError(f"A long tail needs at least two classes, got {num_classes}.")
    if not 1 <= imbalance_ratio < float("inf"):
        raise InputError(f"imbalance_ratio must be a finite number ≥ 1, got {imbalance_ratio}.")
    smallest = 1.0 / imbalance_ratio
    if profile == "exp":
        return [smallest ** (i / (num_classes - 1.0)) for i in range(num_classes)]
    if profile == "step":
        num_tail = num_classes // 2
        return [1.0] * (num_classes - num_tail) + [smallest] * num_tail
    if profile == "pareto":
        if not 0 < pareto_alpha < float("inf"):
            raise InputError(f"pareto_alpha must be a finite number > 0, got {pareto_alpha}.")
        # q_i = exp(t_i) − 1, divided by q_0 in a form that overflows for no α.
        exponents = [math.log(num_classes / (i + 1)) / pareto_alpha for i in range(num_classes)]
        first = exponents[0]
        return [max(math.exp(t - first) * math.expm1(-t) / math.expm1(-first), smallest) for t in exponents]
    raise InputError(f"imbalance_profile must be one of {', '.join(PROFILES)}, got {profile!r}.")


def choose_per_class(labels: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Indices, ascending, of `counts[c]` examples of each class c: those whose hash is smallest."""
    priority = hash_uniform(seed, np.arange(labels.size))
    by_class = np.lexsort((priority, labels))
    class_sizes = np.bincount(labels, minlength=len(counts))
    first_of_class = np.cumsum(class_sizes) - class_sizes
    rank = np.arange(labels.size) - first_of_class[labels[by_class]]
    return np.sort(by_class[rank < np.asarray(counts)[labels[by_class]]])


# ---- Labels -------------------------------------------------------------------------------------------------------


def labels_of(dataset: datasets.Dataset, label_column: str = LABEL_COLUMN) -> np.ndarray:
    """Return the labels as int64, without reading any image.

    Raises:
        InputError: If there is no such column, it does not hold whole numbers, or an example has none.
    """
    if label_column not in dataset.column_names:
        raise InputError(f"There is no label column {label_column!r}; the columns are {dataset.column_names}.")
    _check_complete(dataset, label_column, "label", f"Column {label_column!r}")
    labels = _selected(dataset, dataset.data.column(label_column))
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise InputError(
            f"The labels in column {label_column!r} are not classes: expected one whole number per image, "
            f"got {dataset.features[label_column]}."
        )
    return labels.astype(np.int64)


def class_counts(dataset: datasets.Dataset, label_column: str = LABEL_COLUMN) -> list[int]:
    """Count the examples of each class.

    Returns:
        One count per class: per name of a `ClassLabel` column, else per number from 0 to the largest label.

    Raises:
        InputError: If the labels are not classes, or one is negative or has no name.
    """
    labels = labels_of(dataset, label_column)
    feature = dataset.features[label_column]
    num_named = feature.num_classes if isinstance(feature, datasets.ClassLabel) else None
    num_classes = num_named if num_named is not None else int(labels.max(initial=-1)) + 1
    if num_classes > _MOST_CLASSES:
        raise InputError(f"Label {num_classes - 1} in column {label_column!r}: no data set has so many classes.")
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise InputError(
            f"Label {wrong} in column {label_column!r} is outside the range of the {num_classes} classes"
            + (": these examples have no label." if wrong == -1 else ".")
        )
    return np.bincount(labels, minlength=num_classes).tolist()


def fingerprint(dataset: datasets.Dataset, read_files: bool = False) -> str:
    """Hash of the labels and of the stored images, in order; files outside the data set are as if stored in it.

    Where these files are more than `READABLE_BYTES`, each enters by its name, size and time of change, and by its
    content only every so many, as many as can be read.

    Args:
        dataset: A set with the columns `"image"` and `"label"`, or with images alone.
        read_files: Whether to read all files, however many they are.

    Returns:
        32 hexadecimal digits; after them "-sampled", if not all files were read.

    Raises:
        InputError: If an image is missing, or its file is.
    """
    digest = hashlib.blake2b(digest_size=16)
    if LABEL_COLUMN in dataset.column_names:
        digest.update(labels_of(dataset, LABEL_COLUMN).tobytes())
    _check_complete(dataset, IMAGE_COLUMN, "image", f"Column {IMAGE_COLUMN!r}")
    stored = dataset.data.column(IMAGE_COLUMN)
    every = 1
    if not read_files:
        paths = _selected(dataset, pc.struct_field(stored, "path"))
        files = np.flatnonzero(_selected(dataset, pc.is_null(pc.struct_field(stored, "bytes")))).tolist()
        size = sum(_of_file(index, paths[index], check_file).st_size for index in files)
        every = max(1, math.ceil(size / READABLE_BYTES))
    for index, image in enumerate(stored_images(dataset)):
        if image["bytes"] is not None:
            digest.update(image["bytes"])
            continue
        path = Path(image["path"])
        if every > 1:
            status = _of_file(index, path, check_file)
            digest.update(f"{path.parent.name}/{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        if index % every == 0:
            digest.update(_of_file(index, path, lambda file: check_file(file) and file.read_bytes()))
    return digest.hexdigest() + ("-sampled" if every > 1 else "")


def _of_file(index: int, path: str | Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(Path(path))
    except OSError as error:
        raise InputError(
            f"Image {index} ({path}) cannot be read: {error.strerror or error}. Repair its path (if relative, "
            "it is looked up in the current folder), or remove the image."
        ) from error


def stored_images(dataset: datasets.Dataset) -> Iterable[dict[str, Any]]:
    """Iterate over the images as they are stored, undecoded: `bytes`, or None and the `path` of a file."""
    return dataset.cast_column(IMAGE_COLUMN, datasets.Image(decode=False))[IMAGE_COLUMN]


def _selected(dataset: datasets.Dataset, column: pa.ChunkedArray) -> np.ndarray:
    # Reading a selection through the data set's own indexing takes 10 s for a million shuffled rows; this, 10 ms.
    values = column.to_numpy()
    return values if dataset._indices is None else values[dataset._indices.column(0).to_numpy()]


def _check_complete(dataset: datasets.Dataset, column: str, what: str, where: str) -> None:
    """Raise an `InputError` if examples have no label, or no image: neither bytes nor the path of a file."""
    values = dataset.data.column(column)
    parts = [pc.struct_field(values, part) for part in ("bytes", "path")] if what == "image" else [values]
    missing = np.flatnonzero(np.all([_selected(dataset, pc.is_null(part)) for part in parts], axis=0))
    if missing.size:
        have, them = ("examples have", "them") if missing.size > 1 else ("example has", "it")
        raise InputError(
            f"{where}: {missing.size} {have} no {what} (first: example {missing[0]}); remove {them} from the data set."
        )


def _name_classes(dataset: datasets.Dataset, label_column: str, classes: np.ndarray) -> str:
    """E.g. "2 of 10 classes (cat, dog)", given which as booleans."""
    feature = dataset.features[label_column]
    named = isinstance(feature, datasets.ClassLabel)
    names = [feature.int2str(c) if named else str(c) for c in np.flatnonzero(classes).tolist()]
    total = feature.num_classes if named else classes.size
    return f"{len(names)} of {total} classes ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"


# ---- Loading ------------------------------------------------------------------------------------------------------


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
            where it is not named, and none is carved out.

    Returns:
        The splits `"train"` and `"eval"`, each with the columns `"image"` and `"label"` (a `ClassLabel`).

    Raises:
        InputError: If something is not there, or the labels are not classes.
    """
    data = _load_digits() if name == "digits" else _load_splits(name, config_name, cache_dir, token)
    train_name, eval_name = _find_splits(name, data, train_split, eval_split, untouched_test)
    if untouched_test and eval_name is None:
        raise InputError(
            f"{name} has no test split, which nobody trains on: it has {', '.join(data)}. Name one by "
            "--eval_split_name, or add one to the data set."
        )
    image_column, label_column = _find_columns(name, data[train_name], image_column, label_column)
    splits = {}
    for split, split_name in (("train", train_name), ("eval", eval_name)):
        if split_name is None:
            continue
        missing = {image_column, label_column} - set(data[split_name].column_names)
        if missing:
            raise InputError(f"{name}: split {split_name!r} has no column {sorted(missing)[0]!r}.")
        if len(data[split_name]) == 0:
            raise InputError(f"{name}: split {split_name!r} is empty; name another by --{split}_split_name.")
        splits[split] = _standard_columns(data[split_name], image_column, label_column)
        _check_complete(splits[split], IMAGE_COLUMN, "image", f"{name}: split {split_name!r}, column {image_column!r}")

    splits = _to_class_labels(name, splits, label_column)
    counts = np.asarray(class_counts(splits["train"]))
    if counts.size < 2:
        raise InputError(f"{name}: column {label_column!r} has one class only; there is nothing to learn.")
    if (counts == 0).any():
        raise InputError(
            f"{name}: {_name_classes(splits['train'], LABEL_COLUMN, counts == 0)} have a name but no image in split "
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


def _load_splits(name: str, config_name: str | None, cache_dir: str | None, token: str | None) -> datasets.DatasetDict:
    path = Path(name).expanduser()
    if not path.exists() and name.startswith((".", "/", "~")):
        raise InputError(f"--dataset_name {name}: there is no such file or folder.")
    try:
        if path.is_dir() and any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
            list(files_below(path))
            data = datasets.load_from_disk(str(path))
        elif path.exists() and not path.is_dir():
            if path.suffix != ".parquet" or not path.is_file():
                raise InputError(f"--dataset_name {name}: a single file must be a .parquet file.")
            data = datasets.load_dataset("parquet", data_files=str(path), cache_dir=cache_dir)
        else:
            data = load_image_folder(path) if path.is_dir() and config_name is None else None
            if data is None:
                source = str(path) if path.is_dir() else name
                data = datasets.load_dataset(source, config_name, cache_dir=cache_dir, token=token)
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
    return data if isinstance(data, datasets.DatasetDict) else datasets.DatasetDict({"train": data})


def _find_splits(
    name: str, data: datasets.DatasetDict, train_split: str | None, eval_split: str | None, untouched_test: bool
) -> tuple[str, str | None]:
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


def _find_columns(
    name: str, dataset: datasets.Dataset, image_column: str | None, label_column: str | None
) -> tuple[str, str]:
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
        _check_complete(dataset, LABEL_COLUMN, "label", f"{name}: {split} split, column {label_column!r}")
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

    values = {split: _selected(dataset, dataset.data.column(LABEL_COLUMN)) for split, dataset in splits.items()}
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
