"""In which order, and in which pieces, the training examples are seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .losses import IGNORE_INDEX


class GlobalBatchSampler:
    """Cuts each epoch into *global* batches, and each of those into the micro-batches of all processes.

    One optimizer step sees one global batch: `batch_size` × `accumulation_steps` × `num_processes` examples, fewer in
    the last step of an epoch. Which examples these are depends on (seed, epoch) alone, not on how the batch is cut, so
    32 × 1, 8 × 4 accumulated and 2 processes × 16 train the same model, up to rounding, the short last step included.

    Micro-batches come in the order (step, accumulation step, process), their number is a multiple of the number of
    processes, and those of a step differ by one example at most: what accelerate's `BatchSamplerShard` needs to hand
    each process its own, without padding. If the last step has fewer examples than there are processes, the idle ones
    get an *ignored copy* of an example: index `num_examples + i`, see [`IgnoredCopies`].

    Args:
        num_examples: Size of the training set.
        batch_size: Examples per process and micro-batch.
        accumulation_steps: Micro-batches per process and optimizer step.
        num_processes: Number of processes.
        seed: Seed of the order.
        shuffle: Whether to shuffle each epoch anew.
        drop_last: Whether to leave out the last global batch of an epoch if it is not full.
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
    ):
        self.num_examples = num_examples
        self.num_processes = num_processes
        self.accumulation_steps = accumulation_steps
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        # Read by accelerate: batches of varying size, and nothing for it to drop.
        self.batch_size = None
        self.drop_last = False

        self._per_round = batch_size * num_processes
        self._global_batch_size = self._per_round * accumulation_steps
        self._num_full = num_examples // self._global_batch_size
        remainder = num_examples % self._global_batch_size
        self._num_last = 0 if drop_last else remainder

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of micro-batches of all processes in an epoch."""
        rounds = self._num_full * self.accumulation_steps + math.ceil(self._num_last / self._per_round)
        return rounds * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.num_examples)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_examples)
        end_of_full = self._num_full * self._global_batch_size
        for start in range(0, end_of_full, self._global_batch_size):
            yield from self._cut(order[start : start + self._global_batch_size], self.accumulation_steps)
        if self._num_last:
            yield from self._cut(order[end_of_full:], math.ceil(self._num_last / self._per_round))

    def _cut(self, global_batch: np.ndarray, rounds: int) -> Iterator[list[int]]:
        for part in np.array_split(global_batch, rounds * self.num_processes):
            yield part.tolist() if part.size else [int(global_batch[0]) + self.num_examples]


class IgnoredCopies(torch.utils.data.Dataset):
    """A map-style dataset in which index `len(dataset) + i` is example `i` labelled −100: it counts for nothing."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        size = len(self.dataset)
        originals = [index % size for index in indices]
        if hasattr(self.dataset, "__getitems__"):
            examples = self.dataset.__getitems__(originals)
        else:
            examples = [self.dataset[index] for index in originals]
        return [
            {key: IGNORE_INDEX if key in ("labels", "label") else value for key, value in example.items()}
            if index >= size
            else example
            for index, example in zip(indices, examples, strict=True)
        ]
