"""Order and batching of the training examples; random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .loss_inputs import IGNORE_INDEX


class GlobalBatchSampler:
    """Splits each epoch into *global* batches, and each of these into the micro-batches of all processes.

    One optimizer step uses one global batch: `batch_size` × `accumulation_steps` × `num_processes` examples, fewer in
    the last step of an epoch. Its examples depend only on (seed, epoch), not on how the batch is split. So 32 × 1,
    8 × 4 accumulated and 2 processes × 16 train the same model up to rounding, including the short last step.

    Micro-batches come in the order (step, accumulation step, process), their number is a multiple of the number of
    processes, and their sizes within a step differ by at most one. So accelerate's `BatchSamplerShard` gives each
    process its own without padding. If the last step has fewer examples than processes, the idle processes get an
    *ignored copy* of an example. Indices also encode repetitions and ignored copies, see [`SampledExamples`].

    With `class_balanced_labels`, an epoch has the same length, but each example is drawn independently: first a class,
    uniformly, then an example of it (Kang et al., 2020, arXiv 1910.09217). Examples of rare classes occur many times.

    Args:
        num_examples: Size of the training set.
        batch_size: Examples per process and micro-batch.
        accumulation_steps: Micro-batches per process and optimizer step.
        num_processes: Number of processes.
        seed: Seed of the order.
        shuffle: Whether to shuffle in each epoch.
        drop_last: Whether to drop the last global batch of an epoch if it is not full.
        pad_last: Whether to pad its micro-batches with ignored copies of the epoch's first examples, so that all have
            the same size. The loss is the same mean, but BatchNorm's statistics of that step include the copies.
        class_balanced_labels: The class number of each example (−100: none, so it is not drawn), for class-balanced
            sampling; `None` to use each example once per epoch.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        accumulation_steps: int = 1,
        num_processes: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        pad_last: bool = False,
        class_balanced_labels: np.ndarray | None = None,
    ):
        self.num_examples = num_examples
        self.num_processes = num_processes
        self.accumulation_steps = accumulation_steps
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        # For accelerate: batches vary in size, and none must be dropped.
        self.batch_size = None
        self.drop_last = False

        self._by_class: list[np.ndarray] | None = None
        if class_balanced_labels is not None:
            labels = np.asarray(class_balanced_labels)
            self._by_class = [np.flatnonzero(labels == number) for number in np.unique(labels[labels >= 0])]
        self._per_round = batch_size * num_processes
        self._global_batch_size = self._per_round * accumulation_steps
        self._num_full = num_examples // self._global_batch_size
        remainder = num_examples % self._global_batch_size
        self._num_last = 0 if drop_last else remainder
        self._padded_size = batch_size if pad_last and self._num_full else 0

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch whose order the next iteration uses."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of micro-batches of all processes in an epoch."""
        rounds = self._num_full * self.accumulation_steps + math.ceil(self._num_last / self._per_round)
        return rounds * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        end_of_full = self._num_full * self._global_batch_size
        for start in range(0, end_of_full, self._global_batch_size):
            yield from self._cut(order[start : start + self._global_batch_size], self.accumulation_steps)
        if self._num_last:
            for batch in self._cut(order[end_of_full:], math.ceil(self._num_last / self._per_round)):
                yield batch + (-1 - order[: max(0, self._padded_size - len(batch))]).tolist()

    def _order(self) -> np.ndarray:
        generator = np.random.default_rng([self.seed, self.epoch])
        if self._by_class is not None:
            classes = generator.integers(len(self._by_class), size=self.num_examples)
            sizes = np.array([members.size for members in self._by_class])
            picks = (generator.random(self.num_examples) * sizes[classes]).astype(np.int64)
            members = np.concatenate(self._by_class)
            first = np.cumsum(sizes) - sizes
            return self._with_repetitions(members[first[classes] + picks])
        return generator.permutation(self.num_examples) if self.shuffle else np.arange(self.num_examples)

    def _with_repetitions(self, examples: np.ndarray) -> np.ndarray:
        """Turn the r-th occurrence of example i, r = 0, 1, …, into index i + r · num_examples."""
        sorting = np.argsort(examples, kind="stable")
        _, first, counts = np.unique(examples[sorting], return_index=True, return_counts=True)
        repetitions = np.empty(examples.size, dtype=np.int64)
        repetitions[sorting] = np.arange(examples.size) - np.repeat(first, counts)
        return examples + repetitions * self.num_examples

    def _cut(self, global_batch: np.ndarray, rounds: int) -> Iterator[list[int]]:
        for part in np.array_split(global_batch, rounds * self.num_processes):
            yield part.tolist() if part.size else [-1 - int(global_batch[0])]


def innermost(dataset: Any) -> Iterator[Any]:
    """Yield the data sets inside one: those in a `Subset` (`.dataset`) or a `ConcatDataset` (`.datasets`).

    Does not descend into a data set with its own `set_epoch`, which may pass the call on.
    """
    parts = getattr(dataset, "datasets", None)
    if not isinstance(parts, Sequence):
        parts = [dataset.dataset] if hasattr(dataset, "dataset") else []
    if hasattr(dataset, "set_epoch") or not parts:
        yield dataset
    else:
        for part in parts:
            yield from innermost(part)


class IgnoredCopy(NamedTuple):
    """An example that only fills a batch."""

    example: Any


class SampledExamples(torch.utils.data.Dataset):
    """A map-style dataset as [`GlobalBatchSampler`] indexes it.

    Index `i + r · len(dataset)` is the r-th repetition of example `i` within an epoch. A dataset that says
    `distinguishes_repetitions`, or one of which this is a `Subset`, gets this index (and augments each repetition
    differently), any other gets `i`. A negative index `−1 − i` is an [`IgnoredCopy`] of example `i`, which
    [`CollateSampled`] labels −100.

    Args:
        dataset: The data set.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        wanted = [index if index >= 0 else -1 - index for index in indices]
        dataset: Any = self.dataset
        while type(dataset) is torch.utils.data.Subset:
            inner: Any = dataset.dataset
            wanted = [index // len(dataset) * len(inner) + dataset.indices[index % len(dataset)] for index in wanted]
            dataset = inner
        if not getattr(dataset, "distinguishes_repetitions", False):
            wanted = [index % len(dataset) for index in wanted]
        if hasattr(dataset, "__getitems__"):
            examples = dataset.__getitems__(wanted)
        else:
            examples = [dataset[index] for index in wanted]
        return [e if index >= 0 else IgnoredCopy(e) for index, e in zip(indices, examples, strict=True)]


class CollateSampled:
    """Combines [`SampledExamples`] into a batch, in which ignored copies are labelled −100.

    Args:
        collator: Combines examples of the data set.
    """

    def __init__(self, collator: Callable[[list], Any]):
        self.collator = collator

    def __call__(self, examples: list) -> Any:
        """Return the batch; labels may be in the examples, or made by the collator."""
        ignored = [isinstance(example, IgnoredCopy) for example in examples]
        batch = self.collator([e.example if isinstance(e, IgnoredCopy) else e for e in examples])
        if any(ignored) and "labels" in batch:  # whatever lacks labels is refused later, by name
            batch["labels"] = batch["labels"].long().masked_fill(torch.tensor(ignored), IGNORE_INDEX)
        return batch


# ---- Random numbers as a function of counters, such as (seed, epoch, index): no generator, so no state. They are the
# same for any number of workers and processes, and right after a resume.

_WEYL = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def hash_uniform(*counters: npt.ArrayLike) -> np.ndarray:
    """Numbers in [0, 1), each a hash of its counters (SplitMix64's finaliser, Steele et al., 2014).

    Args:
        counters: Integers or integer arrays that broadcast; their order matters.

    Returns:
        float64, of the broadcast shape.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        state = np.zeros((), dtype=np.uint64)
        for counter in counters:
            bits = np.asarray(counter, dtype=np.int64).astype(np.uint64)
            state = _mix(state ^ _mix(bits + _WEYL)) + _WEYL
        state = _mix(state)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))
