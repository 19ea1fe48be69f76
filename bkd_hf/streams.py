"""Streaming of training images from shards (parquet, webdataset), which need not fit on a machine.

The shards are divided into *lanes*: in each pass, lane l reads every L-th shard, in an order drawn by (seed, pass),
and shuffles block by block. Micro-batch m of the training comes from lane m mod L. L is the largest multiple of the
number of readers (processes × data workers) up to 8, or up to the number of shards if there are fewer; with more
readers than that, it is their number. Therefore:

- Each pass has each example once, for any number of readers. A lane with fewer examples begins its next pass earlier.
- While L stays the same, each step has the same examples for any number of readers: 1, 2, 4 or 8 with at least 8
  shards. With fewer shards, or more than 8 readers, L changes with the readers, and so do the steps.
- A lane keeps a block of the shuffle buffer in memory, and what `datasets` reads at a time (a row group of parquet).
- The position of a lane is the `state_dict()` of its shard at the beginning of its block, and an index in the block.
  It comes with each batch, so a checkpoint has the position of the training, even if workers have read ahead. To
  resume, a lane reads its block again.

An example is augmented by (seed, pass, hash of its bytes).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
from accelerate import PartialState
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi
from transformers.utils import logging

from .data import fingerprint
from .errors import InputError, first_line
from .image_folders import IMAGE_COLUMN, LABEL_COLUMN, class_features
from .images import ImageDataset, collate_images
from .loading import check_are_classes, find_columns, find_splits
from .reading import read_json
from .sources import DEMOS, open_splits
from .text import normal, one_line

logger = logging.get_logger(__name__)
T = TypeVar("T")

#: Key of a batch: its lane, and the lane's position.
POSITION = "stream_position"
NUM_LANES, SAMPLE_SIZE = 8, 1024
#: Passes in a row in which a lane may get only shards without examples.
_MOST_EMPTY = 100


class Stream:
    """A training set that is streamed.

    Args:
        shards: With columns of undecoded images and labels.
        class_counts: Numbers of images by name of the C classes, in the order of the class numbers.
        buffer_size: Number of undecoded images in the shuffle buffers of all lanes together.
        columns: Names of the columns of images and labels.

    Raises:
        InputError: If `shards` were divided among processes before.
    """

    def __init__(
        self,
        shards: datasets.IterableDataset,
        class_counts: Mapping[str, int],
        buffer_size: int = 10_000,
        columns: Sequence[str] = (IMAGE_COLUMN, LABEL_COLUMN),
    ):
        if getattr(shards, "_distributed", None) is not None:
            raise InputError(SPLIT_TWICE)
        self.shards, self.buffer_size, self.columns = shards, buffer_size, columns
        self.features = class_features(list(class_counts))
        self.class_counts, self._numbers = list(class_counts.values()), {n: i for i, n in enumerate(class_counts)}
        self.split, feature = shards.split, (shards.features or {}).get(columns[1])
        #: Whether integer labels are class numbers. If not, they are names of classes, as in {"3": 20, "7": 5}.
        self._are_numbered = not isinstance(feature, datasets.Value) or not all(map(str.isdecimal, class_counts))
        num_lanes = min(NUM_LANES, shards.num_shards)
        each = -(-SAMPLE_SIZE // num_lanes)
        found = [e for number in range(num_lanes) for e in Lane(self, number, num_lanes, 0).take(each, 1)[1]]
        #: Some examples from the beginning of each lane, for checks before training.
        self.sample = datasets.Dataset.from_dict(
            {
                IMAGE_COLUMN: [example[IMAGE_COLUMN] for example in found],
                LABEL_COLUMN: [self.number_of(example[LABEL_COLUMN]) for example in found],
            },
            self.features,
        )
        told = json.dumps([shards.num_shards, class_counts, fingerprint(self.sample)])
        self.fingerprint = hashlib.blake2b(told.encode(), digest_size=16).hexdigest() + "-sampled"

    def number_of(self, label: Any) -> int:
        """Return the number of a class; raises an `InputError` if it has none."""
        number = label
        if label is not None and not (self._are_numbered and isinstance(label, int)):
            number = self._numbers.get(normal(str(label)))
        if number is None or not 0 <= number < len(self.class_counts):
            if label in (None, -1):
                which = "" if self.split is None else f" (split {self.split})"
                raise InputError(
                    f"An example of the stream{which} has no label. Remove such examples, or name a split with labels "
                    "by --train_split_name or --eval_split_name."
                )
            raise InputError(
                f"An example of the stream has the label {label!r}, of which --class_counts says nothing. Count anew."
            )
        return number


#: Why a stream must be whole.
SPLIT_TWICE = (
    "The training set was divided among processes by split_dataset_by_node, and would be once more here: most of its "
    "images would never be seen. Give the whole of it."
)


class Lane:
    """Every L-th shard of each pass, shuffled block by block, without end.

    Args:
        stream: The stream.
        number: Number of this lane.
        num_lanes: L. With fewer shards, each lane reads all of them, and keeps every L-th example.
        seed: Seed of the order.
        position: Position to begin at.
    """

    def __init__(self, stream: Any, number: int, num_lanes: int, seed: int, position: dict[str, Any] | None = None):
        self.stream, self.number, self.num_lanes, self.seed = stream, number, num_lanes, seed
        self.position = {"pass": 0, "shard": 0, "inside": None, "seen": 0, "taken": 0} | (position or {})
        self._blocks = self._read(**self.position)
        self._block: list[dict[str, Any]] | None = None

    def take(self, number: int, most_passes: float = float("inf")) -> tuple[list[int], list[dict[str, Any]]]:
        """Return the next examples and the pass of each; fewer if `most_passes` are over."""
        passes: list[int] = []
        found: list[dict[str, Any]] = []
        while len(found) < number:
            if self._block is None or self.position["taken"] >= len(self._block):
                taken = self.position["taken"] if self._block is None else 0
                begin, self._block = next(self._blocks)
                self.position = {**begin, "taken": taken}
                continue
            if self.position["pass"] >= most_passes:
                break
            part = self._block[self.position["taken"] :][: number - len(found)]
            self.position["taken"] += len(part)
            found += part
            passes += [self.position["pass"]] * len(part)
        return passes, found

    def _read(self, shard: int, inside: Any, seen: int, **position: int) -> Iterator[tuple[dict[str, Any], list]]:
        """Yield blocks with their positions."""
        count, shares = self.stream.shards.num_shards, self.stream.shards.num_shards < self.num_lanes
        size, without = max(1, self.stream.buffer_size // self.num_lanes), 0
        for number in itertools.count(position["pass"]):
            order = np.random.default_rng([self.seed, number]).permutation(count).tolist()
            for place, index in enumerate(order if shares else order[self.number :: self.num_lanes]):
                if place < shard:
                    continue
                source = self.stream.shards.shard(count, index)
                if inside is not None:
                    source.load_state_dict(inside)
                begin = {"pass": number, "shard": place, "inside": inside, "seen": seen}
                for columns in readable(source.iter(size)):  # unlike iter(source), not divided among workers again
                    rows = zip(*(columns[name] for name in self.stream.columns), strict=True)
                    block = [dict(zip((IMAGE_COLUMN, LABEL_COLUMN), row, strict=True)) for row in rows]
                    shuffled = np.random.default_rng([self.seed, number, self.number, seen]).permutation(len(block))
                    kept = [i for i in shuffled if not shares or (seen + i) % self.num_lanes == self.number]
                    seen += len(block)
                    if kept:
                        without = -1
                        yield begin, [block[i] for i in kept]
                    begin = {**begin, "inside": source.state_dict(), "seen": seen}
                inside = None
            if (without := without + 1) > (1 if shares else _MOST_EMPTY):
                raise InputError("--streaming: a lane of the stream has no example. Use fewer processes or workers.")
            shard, seen = 0, 0


class StreamedImages(torch.utils.data.IterableDataset):
    """Batches of a [`Stream`] as model inputs, without end; they include the stream's position (`POSITION`).

    Args:
        stream: The stream.
        sample: The stream's `sample` as model inputs, which defines how images are rendered and augmented.
    """

    needs_workers, in_memory, collator = True, False, staticmethod(collate_images)

    def __init__(self, stream: Stream, sample: ImageDataset):
        self.stream, self.sample, self.class_counts = stream, sample, stream.class_counts
        self.augmentation, self.operations, self.data_seed = sample.augmentation, sample.operations, sample.data_seed
        self.batch_size, self.seed, self.num_readers = 1, 0, 1
        self.start: tuple[int, dict[int, dict[str, Any]]] = (0, {})
        #: Index and number of the processes: a worker that was not forked would join their group to learn them.
        self.process: tuple[int, int] | None = None

    @property
    def num_lanes(self) -> int:
        """L (see the top of this module)."""
        at_most = min(NUM_LANES, self.stream.shards.num_shards)
        return max(1, at_most // self.num_readers) * self.num_readers

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        process, num_processes = self.process or (PartialState().process_index, PartialState().num_processes)
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        done, positions = self.start
        lanes: dict[int, Lane] = {}
        for batch in itertools.count(done + number, workers):
            lane = (batch * num_processes + process) % self.num_lanes
            if lane not in lanes:
                lanes[lane] = Lane(self.stream, lane, self.num_lanes, self.seed, positions.get(lane))
            examples = self._examples(*lanes[lane].take(self.batch_size))
            yield {**collate_images(examples), POSITION: (lane, json.dumps(lanes[lane].position))}

    def _examples(self, passes: list[int], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        examples = []
        for number, group in itertools.groupby(zip(passes, found, strict=True), key=lambda pair: pair[0]):
            members = [example for _, example in group]
            images = [example[IMAGE_COLUMN] for example in members]
            labels = np.array([self.stream.number_of(example[LABEL_COLUMN]) for example in members])
            keys = [hashlib.blake2b(_content(image), digest_size=8).digest() for image in images]
            numbers = np.frombuffer(b"".join(keys), np.int64)
            examples += self.sample.of_others(images, numbers, labels, self.data_seed, number)
        return examples


def _content(image: dict[str, Any] | None) -> bytes:
    if image is None or (image["bytes"] is None and not image["path"]):
        raise InputError("An example of the stream has no image: remove it from its shard.")
    if image["bytes"] is None:
        image["bytes"] = Path(image["path"]).read_bytes()
    return image["bytes"]


def sample_of(dataset: Any) -> Any:
    """Return the sample of a stream, for access to examples by index; any other data set unchanged."""
    return dataset.sample if isinstance(dataset, (Stream, StreamedImages)) else dataset


# ---- From a folder or the Hub -------------------------------------------------------------------------------------


def load_stream(
    name: str,
    counts: str,
    config_name: str | None = None,
    columns: tuple[str | None, str | None] = (None, None),
    splits: tuple[str | None, str | None] = (None, None),
    buffer_size: int = 10_000,
    cache_dir: str | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Open a training set as a stream, `"train"`; the evaluation set, `"eval"`, is written to the disk.

    Arguments are those of [`load_image_dataset`] and [`Stream`]: `counts` is a JSON file of class counts, `columns`
    names the columns of images and labels, `splits` the splits for training and evaluation.

    Raises:
        InputError: If something does not exist, or the counts do not match the classes.
    """
    found, names, columns = open_columns(name, config_name, columns, splits, cache_dir, token)
    if "eval" not in found:
        raise InputError(
            f"--streaming: {name} has no split to evaluate on. Name one by --eval_split_name, or add one."
        )
    stream = Stream(found["train"], read_counts(counts, found["train"].features[columns[1]]), buffer_size, columns)
    about = json.dumps(
        [name, config_name, names, columns, list(stream.features[LABEL_COLUMN].names), _state_of(name, token)]
    )
    try:
        evaluation = datasets.Dataset.from_generator(
            _numbered,
            stream.features,
            cache_dir,
            gen_kwargs={"stream": stream, "examples": found["eval"]},
            split=datasets.NamedSplit(names[1]),
            fingerprint=hashlib.blake2b(about.encode(), digest_size=16).hexdigest(),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from None
        raise
    return {"train": stream, "eval": evaluation}


def open_columns(
    name: str,
    config_name: str | None,
    columns: tuple[str | None, str | None],
    splits: tuple[str | None, str | None],
    cache_dir: str | None = None,
    token: str | None = None,
) -> tuple[dict[str, datasets.IterableDataset], list[str], tuple[str, str]]:
    """Open splits as streams of undecoded images and labels; return them, and the names of both in the data."""
    data: Any = open_splits("image", name, config_name, cache_dir, token, streaming=True)
    names = [split for split in find_splits(name, data, *splits, untouched_test=False) if split]
    opened = [data[split] if data[split].features else data[split]._resolve_features() for split in names]
    image, label = find_columns("image", name, opened[0], *columns)
    check_are_classes(name, opened[0].features[label], label, "image")
    # Not renamed, which would call a function for each example.
    stored = [each.select_columns([image, label]).cast_column(image, datasets.Image(decode=False)) for each in opened]
    return dict(zip(("train", "eval"), stored, strict=False)), names, (image, label)


def count_labels(
    name: str,
    config_name: str | None = None,
    columns: tuple[str | None, str | None] = (None, None),
    split: str | None = None,
    token: str | None = None,
) -> dict[str, int]:
    """Count the training images of each class in one pass over their labels, for `--class_counts`.

    Arguments and errors are those of [`load_stream`].
    """
    found, _, (_, column) = open_columns(name, config_name, columns, (split, None), None, token)
    names, counts = getattr(found["train"].features[column], "names", None), Counter[Any]()
    for part in readable(found["train"].select_columns([column]).iter(10_000)):
        counts.update(part[column])
    if None in counts or -1 in counts:
        raise InputError(f"{name}: {counts[None] + counts[-1]} training images have no label. Remove them.")
    keys = range(len(names)) if names else sorted(counts)
    found = Counter[str]()
    for key in keys:
        found[normal(names[key] if names else str(key))] += counts[key]
    return dict(found)


def read_counts(path: str, labels: Any) -> dict[str, int]:
    """Return class counts by name, in the order of the class numbers, from a JSON file with names or numbers.

    `labels` is the feature of the label column.

    Raises:
        InputError: If they are not counts, or do not match the classes of the labels.
    """
    content, names = read_json(path), getattr(labels, "names", None)
    names = names and [normal(each) for each in names]
    if names and len(set(names)) < len(names):
        raise InputError("Two classes of the stream have one name, whose accents are spelled twice. Rename one.")
    if not isinstance(content, dict) or not content or any(type(n) is not int or n < 0 for n in content.values()):
        raise InputError(f'--class_counts {path}: expected {{"name or number of a class": number of its images, …}}.')
    are_numbers = all(key.isdecimal() for key in content)
    if names is None and getattr(labels, "dtype", "").startswith(("int", "uint")):
        names = [str(number) for number in sorted(int(key) for key in content if are_numbers)]
        if names and int(names[-1]) >= len(names):
            logger.warning(
                f"--class_counts {path}: classes are not numbered 0 to {len(names) - 1}; they are renumbered."
            )
    elif names is None:
        names = sorted(map(normal, content))
    elif are_numbers and not {*content} <= {*names}:
        content = {names[int(key)] if int(key) < len(names) else key: n for key, n in content.items()}
    counts = {normal(key): number for key, number in content.items()}
    if unknown := [key for key in counts if key not in names]:
        raise InputError(f"--class_counts {path}: there is no class {unknown[0]!r} in the data. Count anew.")
    return {key: counts.get(key, 0) for key in names}


def _numbered(stream: Stream, examples: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    image, label = stream.columns
    for example in readable(examples):
        yield {IMAGE_COLUMN: example[image], LABEL_COLUMN: stream.number_of(example[label])}


def readable(parts: Iterable[T]) -> Iterator[T]:
    """Yield what `datasets` reads from shards; raises an `InputError` if one is damaged or unavailable."""
    try:
        yield from parts
    except Exception as error:  # from pyarrow, tarfile, HTTP, …; the log of `datasets` names the file
        raise InputError(
            f"A shard of --dataset_name cannot be read: {one_line(first_line(error), 200)}. Replace it; or if it came "
            "by a network, run the same again."
        ) from error


def _state_of(name: str, token: str | None) -> Any:
    """A value that changes when a data set does."""
    if name in DEMOS:
        return None
    if not Path(name).expanduser().exists():
        return HfApi(token=token).dataset_info(name).sha
    files = sorted(path for path in Path(name).expanduser().rglob("*") if path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
