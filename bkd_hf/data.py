"""Labels, class counts and content hash of a data set, and long-tailed subsets of it."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.utils import logging

from .errors import InputError
from .image_folders import IMAGE_COLUMN, LABEL_COLUMN
from .reading import check_file
from .sampling import hash_uniform
from .tasks import TEXT_COLUMN, task_of_columns
from .text import quoted

logger = logging.get_logger(__name__)

Profile = Literal["exp", "step", "pareto"]
PROFILES: tuple[Profile, ...] = get_args(Profile)
#: Shape of ImageNet-LT's tail (Liu et al., 2019).
PARETO_ALPHA = 6.0

#: At most this many bytes of images are read for a fingerprint: a minute on a slow disk.
READABLE_BYTES = 10_000_000_000
# Sets up to this size are read for each fingerprint; for larger ones, results are cached by the hash of this much.
_QUICK_BYTES = 64_000_000
_SAMPLED = "-sampled"
_fingerprints: dict[tuple[str, bool, bool], str] = {}

_MOST_CLASSES = 2**24


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

    The q_i are quantiles of a Pareto distribution that starts at 0 (Lomax). They replace the random draw from a Pareto
    distribution by which Liu et al. made ImageNet-LT: 1000 classes, 1280 images in the largest, ratio 256 and α = 6
    give 117,059 images (ImageNet-LT has 115,846), with 1280 to 5 per class as in ImageNet-LT.

    Args:
        max_count: Images of the largest class.
        num_classes: C ≥ 2.
        imbalance_ratio: Images of the largest class per image of the smallest, ≥ 1.
        profile: `"exp"`, `"step"` or `"pareto"`. With an odd C the middle class of `"step"` is a head class.
        pareto_alpha: α > 0 of `"pareto"`; a smaller α gives a smaller tail.

    Returns:
        C counts, truncated; a count is 0 if `max_count` is too small for the ratio.

    Raises:
        InputError: If an argument is out of its range.
    """
    if max_count < 1:
        raise InputError(f"max_count must be at least 1, got {max_count}.")
    shares = _profile_shares(num_classes, imbalance_ratio, profile, pareto_alpha)
    # 49 · (1/49) is below 1 in floating point.
    return [int(max_count * share * (1 + 1e-12)) for share in shares]


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
    """Select a long-tailed subset with the class counts of [`long_tailed_counts`].

    The subset depends only on (`split_seed`, labels, index). With the same `max_count`, a subset with a higher ratio
    is contained in one with a lower ratio.

    Args:
        dataset: A set with enough images in each class, usually balanced.
        label_column: Name of its label column.
        imbalance_ratio: Images of the largest class per image of the smallest, ≥ 1.
        profile: `"exp"`, `"step"` or `"pareto"`.
        split_seed: Selects which images are kept.
        max_count: Images of the largest class; by default the largest number for which every class has enough images.
        class_order: All class numbers, the largest class first; by default 0, 1, 2, …
        pareto_alpha: α of `"pareto"`.

    Returns:
        A selection of `dataset`, in its order.

    Raises:
        InputError: If an argument is out of its range, or a class would have no images or has fewer than it needs.
    """
    available = np.asarray(class_counts(dataset, label_column))
    num_classes = available.size
    order = np.arange(num_classes) if class_order is None else np.asarray(class_order)
    if not np.array_equal(np.sort(order), np.arange(num_classes)):
        raise InputError(f"class_order must name each of the {num_classes} classes once, got {list(order)}.")
    unit = task_of_columns(dataset.column_names).name
    name_those = functools.partial(name_classes, dataset, label_column)
    if (available == 0).any():
        raise InputError(f"{name_those(available == 0)} without {unit}s: nothing to select from.")

    def counts(ratio: float) -> np.ndarray:
        largest = max_count
        if largest is None:
            shares = np.asarray(_profile_shares(num_classes, ratio, profile, pareto_alpha))
            largest = int(np.min(available[order] / shares) * (1 + 1e-12))  # 1 / (1/93) is below 93
        found = np.zeros(num_classes, dtype=np.int64)
        found[order] = long_tailed_counts(largest, num_classes, ratio, profile, pareto_alpha)
        return found

    wanted = counts(imbalance_ratio)
    is_long_tailed = available.max() > 2 * available.min()
    if (wanted == 0).any():
        most = int(min(imbalance_ratio, available.max()))
        fitting = next(ratio for ratio in range(most, 0, -1) if counts(ratio).all())
        message = (
            f"imbalance_ratio {imbalance_ratio:g} leaves {name_those(wanted == 0)} without {unit}s, as the largest "
            f"class has {wanted.max():,}: choose a ratio of {fitting} or below."
        )
        if is_long_tailed:
            message += (
                f" The {unit}s are long-tailed already ({available.max():,} to {available.min():,} per class): to use "
                "them all, leave the ratio out."
            )
        raise InputError(message)
    if (wanted > available).any():
        first = int(np.argmax(wanted > available))
        raise InputError(
            f"{name_those(wanted > available)} cannot give the {unit}s asked for: class {first} has "
            f"{available[first]}, its share is {wanted[first]}. Lower max_count ({max_count}) or change class_order."
        )
    if is_long_tailed and class_order is None:
        warnings.warn(
            f"The {unit}s are long-tailed already ({available.max():,} to {available.min():,} per class), and "
            f"imbalance_ratio {imbalance_ratio:g} keeps {wanted.sum():,} of {available.sum():,}: it makes class 0 the "
            "largest, class 1 the next, and so on. To use them all, leave the ratio out; to cut by the numbers of "
            f"{unit}s, give class_order.",
            stacklevel=2,
        )
    return dataset.select(choose_per_class(labels_of(dataset, label_column), wanted, split_seed))


def limit_examples(
    dataset: datasets.Dataset, max_examples: int | None, option: str, seed: int = 0
) -> datasets.Dataset:
    """Select about `max_examples` examples (for quick tests), in proportion to the class counts.

    Each class with images keeps at least one.

    Raises:
        InputError: If `max_examples` is smaller than the number of classes; the message names `option`.
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
        # q_i = exp(t_i) − 1, divided by q_0 without overflow for any α.
        exponents = [math.log(num_classes / (i + 1)) / pareto_alpha for i in range(num_classes)]
        first = exponents[0]
        return [max(math.exp(t - first) * math.expm1(-t) / math.expm1(-first), smallest) for t in exponents]
    raise InputError(f"imbalance_profile must be one of {', '.join(PROFILES)}, got {profile!r}.")


def choose_per_class(labels: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Ascending indices of `counts[c]` examples of each class c ≥ 0: those with the smallest hashes."""
    labelled = np.flatnonzero(labels >= 0)
    priority = hash_uniform(seed, labelled)
    by_class = labelled[np.lexsort((priority, labels[labelled]))]
    class_sizes = np.bincount(labels[labelled], minlength=len(counts))
    first_of_class = np.cumsum(class_sizes) - class_sizes
    rank = np.arange(labelled.size) - first_of_class[labels[by_class]]
    return np.sort(by_class[rank < np.asarray(counts)[labels[by_class]]])


def set_aside(dataset: datasets.Dataset, wanted: np.ndarray, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split off the wanted number of examples of each class; return the rest, and these."""
    chosen = choose_per_class(labels_of(dataset), wanted, seed)
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), chosen)), dataset.select(chosen)


# ---- Labels -------------------------------------------------------------------------------------------------------


def labels_of(dataset: datasets.Dataset, label_column: str = LABEL_COLUMN) -> np.ndarray:
    """Return the labels as int64, without reading any image.

    Raises:
        InputError: If there is no such column, it does not hold whole numbers, or an example has none.
    """
    if label_column not in dataset.column_names:
        raise InputError(f"There is no label column {label_column!r}; the columns are {dataset.column_names}.")
    check_complete(dataset, label_column, "label", f"Column {label_column!r}")
    labels = selected(dataset, dataset.data.column(label_column))
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise InputError(
            f"The labels in column {label_column!r} are not classes: expected one whole number per example, got "
            f"{dataset.features[label_column]}. Use dataset.class_encode_column({label_column!r})."
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
    num_classes = feature.num_classes if isinstance(feature, datasets.ClassLabel) else int(labels.max(initial=-1)) + 1
    if num_classes > _MOST_CLASSES:
        raise InputError(f"Label {num_classes - 1} in column {label_column!r}: no data set has so many classes.")
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise InputError(
            f"Label {wrong} in column {label_column!r} is outside the range of the {num_classes} classes"
            + (": these examples have no label." if wrong == -1 else ".")
        )
    return np.bincount(labels, minlength=num_classes).tolist()


def class_names(dataset: datasets.Dataset, label_column: str = LABEL_COLUMN) -> list[str]:
    """Return the names of a `ClassLabel` column, or the numbers of whole-number labels as names."""
    feature = dataset.features[label_column]
    named = isinstance(feature, datasets.ClassLabel)
    return feature.names if named else [str(number) for number in range(len(class_counts(dataset, label_column)))]


def fingerprint(dataset: datasets.Dataset, read_all: bool = False, with_times: bool = False) -> str:
    """Hash of the labels and the stored images (or texts), in order; external files count as if stored in the set.

    If the images exceed `READABLE_BYTES`, the hash covers the size of each (for files also the name), and the content
    of a regular sample of them. It is computed once per process.

    Args:
        dataset: A set with the columns `"image"` (or `"text"`) and `"label"`, or with images alone.
        read_all: Whether to read all images, whatever their size.
        with_times: Whether the change times of files count where not all are read: for caches of this machine, which
            must notice every change. Copies of a file have other times.

    Returns:
        32 hexadecimal digits, followed by "-sampled" if not all images were read.

    Raises:
        InputError: If an image is missing, or its file is.
    """
    quick = _quick_digest(dataset)
    if not quick.endswith(_SAMPLED):
        return quick
    key = quick, read_all, with_times
    if key not in _fingerprints:
        found = _digest(dataset, None if read_all else READABLE_BYTES, with_times=with_times)
        _remember(quick, read_all, with_times, found)
    return _fingerprints[key]


def _remember(quick: str, read_all: bool, with_times: bool, found: str) -> None:
    """Keep a fingerprint; one of all images is the same in each way."""
    both = (False, True)
    ways = [(read_all, with_times)] if found.endswith(_SAMPLED) else itertools.product(both, both)
    _fingerprints.update({(quick, *way): found for way in ways})


def shared_fingerprint(dataset: datasets.Dataset) -> str:
    """[`fingerprint`], computed by one process of each machine; all processes must call it.

    Raises:
        InputError: As [`fingerprint`].
    """
    found, problem = None, ""
    if PartialState().is_local_main_process:
        try:
            found = fingerprint(dataset)
        except InputError as error:
            problem = str(error)
    everywhere = gather_object([(found, problem)])
    if problem := next((problem for _, problem in everywhere if problem), ""):
        raise InputError(problem)
    found = found or next(value for value, _ in everywhere if value)
    if not PartialState().is_local_main_process:
        _remember(_quick_digest(dataset), False, False, found)
    return found


def _quick_digest(dataset: datasets.Dataset) -> str:
    return _digest(dataset, min(_QUICK_BYTES, READABLE_BYTES), with_times=True)


def _digest(dataset: datasets.Dataset, readable: int | None, with_times: bool) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if LABEL_COLUMN in dataset.column_names:
        digest.update(labels_of(dataset, LABEL_COLUMN).tobytes())
    if TEXT_COLUMN in dataset.column_names:
        for text in selected(dataset, dataset.data.column(TEXT_COLUMN)):
            digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()
    check_complete(dataset, IMAGE_COLUMN, "image", f"Column {IMAGE_COLUMN!r}")
    every = 1
    if readable is not None:
        stored = dataset.data.column(IMAGE_COLUMN)
        paths = selected(dataset, pc.struct_field(stored, "path"))
        sizes = selected(dataset, pc.fill_null(pc.binary_length(pc.struct_field(stored, "bytes")), -1)).astype(int)
        found = (_of_file(i, paths[i], check_file) for i in np.flatnonzero(sizes < 0).tolist())
        files = np.fromiter(((status.st_size, status.st_mtime_ns) for status in found), "i8, i8")
        size = int(files["f0"].sum()) + int(sizes.clip(0).sum())
        every = max(1, math.ceil(size / readable))
    if every == 1:
        for index, image in enumerate(stored_images(dataset)):
            digest.update(_content(index, image))
        return digest.hexdigest()
    # For each file first its name and size, then its content.
    images, statuses = iter(stored_images(dataset.select(range(0, len(dataset), every)))), iter(files.tolist())
    for index, number in enumerate(sizes.tolist()):
        if number < 0:
            path, (length, changed) = Path(paths[index]), next(statuses)
            time = f" {changed}" if with_times else ""
            digest.update(f"{path.parent.name}/{path.name} {length}{time}".encode())
        else:
            digest.update(f"{number} ".encode())
        if index % every == 0:
            digest.update(_content(index, next(images)))
    return digest.hexdigest() + _SAMPLED


def _content(index: int, image: dict[str, Any]) -> bytes:
    if image["bytes"] is not None:
        return image["bytes"]
    return _of_file(index, image["path"], lambda file: check_file(file) and file.read_bytes())


def hash_of_table(dataset: datasets.Dataset) -> str:
    """Hash of everything that a data set stores, in order, and of its output format."""
    digest = hashlib.blake2b(repr((dataset.features, dataset.format)).encode(), digest_size=16)
    for table in dataset.with_format("arrow").iter(1000):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


def _of_file(index: int, path: str | Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(Path(path))
    except OSError as error:
        raise InputError(
            f"Image {index} ({path}) cannot be read: {error.strerror or error}. Repair its path (if relative, "
            "it is looked up in the current folder), or remove the image."
        ) from error


def stored_images(dataset: datasets.Dataset) -> Iterable[dict[str, Any]]:
    """Iterate over the stored images, undecoded: `bytes`, or None and the `path` of a file."""
    return dataset.with_format(None).cast_column(IMAGE_COLUMN, datasets.Image(decode=False))[IMAGE_COLUMN]


def selected(dataset: datasets.Dataset, column: pa.ChunkedArray) -> np.ndarray:
    # For a million shuffled rows, the data set's own indexing takes 10 s; this takes 10 ms.
    values = column.to_numpy()
    return values if dataset._indices is None else values[dataset._indices.column(0).to_numpy()]


def check_complete(dataset: datasets.Dataset, column: str, what: str, where: str) -> None:
    """Raise an `InputError` if examples have no label, no text, or no image: neither bytes nor the path of a file."""
    values = dataset.data.column(column)
    parts = [pc.struct_field(values, part) for part in ("bytes", "path")] if what == "image" else [values]
    missing = np.flatnonzero(np.all([selected(dataset, pc.is_null(part)) for part in parts], axis=0))
    if missing.size:
        have, them = ("examples have", "them") if missing.size > 1 else ("example has", "it")
        raise InputError(
            f"{where}: {missing.size} {have} no {what} (first: example {missing[0]}); remove {them} from the data set."
        )


def name_classes(dataset: datasets.Dataset, label_column: str, classes: np.ndarray) -> str:
    """E.g. "2 of 10 classes ('cat', 'dog')", selected by booleans."""
    feature = dataset.features[label_column]
    named = isinstance(feature, datasets.ClassLabel)
    names = [feature.int2str(c) if named else c for c in np.flatnonzero(classes).tolist()]
    total = feature.num_classes if named else classes.size
    return f"{len(names)} of {total} classes ({quoted(names)})"
