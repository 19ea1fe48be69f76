"""The teacher's logits for views of the training images: precomputed, then read as one more column of the batch.

As augmentation is a function of (seed, epoch, index), image i can look in epoch e as in epoch e mod K, where K is the
number of views. The logits for one view of all images form one file: N×C numbers and their checksum. Its folder is
named by everything that the logits depend on: the teacher's weights, configuration and precision, the images and their
processing, the augmentation and its seed.

The features of a frozen backbone are cached in the same way (`bkd_hf.features`).

A file gets its name only when it is complete, so runs need no coordination: two that compute the same view write
equally good files. A file with a wrong checksum is never used, but computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from huggingface_hub import constants
from numpy.lib.recfunctions import structured_to_unstructured, unstructured_to_structured
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedConfig
from transformers.utils import logging

from .data import hash_of_table
from .errors import InputError
from .metrics import NotFiniteError
from .teacher import TEACHER_LOGITS, FrozenTeacher
from .top_k import TopK

logger = logging.get_logger(__name__)

#: Where `--teacher_cache auto` and `--feature_cache auto` keep their files.
DEFAULT_FOLDERS = {name: Path(constants.HF_HOME) / "bkd_hf" / name for name in ("teacher_logits", "features")}

# Entries of a model's configuration without influence on its logits; the weights themselves tell their type.
_WITHOUT_INFLUENCE = {
    "transformers_version", "_name_or_path", "_commit_hash", "architectures", "auto_map", "dtype", "torch_dtype",
    "id2label", "label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states",
}  # fmt: skip


class TeacherLogitsError(NotFiniteError):
    """The teacher's logits are not finite; the message names the training step, or the view."""


class LogitsFolder:
    """Files of a teacher's logits, or of other rows of numbers, one for each view. All processes create it together.

    Args:
        folder: Parent folder; the files go into a subfolder named by `about`.
        about: Everything that the logits depend on; must be serialisable as JSON.
        shape: Numbers of views K, examples N and classes C.
        dtype: `"float16"` or `"float32"`, as the logits are stored; or that of the rows of a [`TopKFolder`].
        what: Name of the contents, for messages.
        option: The option that requested them.
        unit: What each of the C numbers stands for.

    Raises:
        InputError: If the folder cannot be written, or its disk is too full.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        about: dict[str, Any],
        shape: tuple[int, int, int],
        dtype: str | np.dtype = "float16",
        what: str = "The teacher's logits",
        option: str = "--teacher_cache",
        unit: str = "classes",
    ):
        self.what, self.option, self.unit = what, option, unit
        self.num_views, *self.shape = shape
        self.dtype = np.dtype(dtype)
        self._num_bytes = math.prod(self.shape) * self.dtype.itemsize
        text = json.dumps({**about, "shape": self.shape, "dtype": str(dtype)}, sort_keys=True, indent=1)
        self.folder = Path(folder).expanduser() / hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        for problem in gather_object([self._prepare(text)]):  # so that all processes fail together
            if problem:
                raise InputError(problem)

    def __str__(self) -> str:
        size, missing = self.num_views * self._num_bytes / 1e6, self._num_missing / self.num_views
        state = f"{100 * (1 - missing):.0f} % of it is there" if missing else "all of it is there"
        return (
            f"{self.num_views:,} view{'s' if self.num_views > 1 else ''} × {self.shape[0]:,} examples × "
            f"{self.shape[1]:,} {self.unit}, {size:,.1f} MB in {self.folder.parent}; {state}"
        )

    def path(self, view: int) -> Path:
        """Path of the logits of a view."""
        return self.folder / f"view{view}.bin"

    def open(self, view: int) -> np.ndarray | None:
        """Map the N×C logits of a view into memory; `None` if they are missing or damaged."""
        path, digest = self.path(view), self._digest(view)
        if not path.exists():
            return None
        content = np.memmap(path, np.uint8, "r").view(np.ndarray) if path.stat().st_size else np.zeros(0, np.uint8)
        digest.update(content[: self._num_bytes].data)
        if content[self._num_bytes :].tobytes() == digest.digest():
            return content[: self._num_bytes].view(self.dtype).reshape(self.shape)
        logger.warning(f"{self.what} in {path} are damaged: they are not read.")
        return None

    def write(self, view: int, batches: Iterable[np.ndarray]) -> None:
        """Write the logits of a view batch by batch, and give the file its name once it is complete on disk."""
        digest, partial = self._digest(view), self.folder / f"view{view}-{uuid.uuid4().hex}.partial"
        try:
            for rows in batches:
                digest.update(rows.tobytes())
                with self._writing(), open(partial, "ab") as file:
                    file.write(rows.tobytes())
            with self._writing(), open(partial, "ab") as file:
                file.write(digest.digest())
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, self.path(view))
        finally:
            partial.unlink(missing_ok=True)

    def pack(self, rows: np.ndarray) -> np.ndarray:
        """Convert N×C float32 to the stored format."""
        return rows.astype(self.dtype)

    def unpack(self, stored: np.ndarray) -> np.ndarray:
        """Convert the stored format to N×C float32."""
        return stored.astype(np.float32)

    @property
    def _num_missing(self) -> int:
        return sum(not self.path(view).exists() for view in range(self.num_views))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.option} {self.folder.parent} cannot be written: {error.strerror or error}. Choose another "
                f"folder, or {self.option} off."
            ) from error

    def _digest(self, view: int) -> hashlib.blake2b:
        return hashlib.blake2b(f"{self.folder.name} {view}".encode(), digest_size=16)

    def _prepare(self, about: str) -> str:
        """Create the folder; return why that fails, if it does."""
        try:
            with self._writing():
                self.folder.mkdir(parents=True, exist_ok=True)
                if not (self.folder / "about.json").exists():
                    (self.folder / "about.json").write_text(about + "\n", encoding="utf-8")
                free = shutil.disk_usage(self.folder).free
                for path in self.folder.glob("*.partial"):
                    with suppress(FileNotFoundError):  # its run may rename or remove it at any time
                        if time.time() - path.stat().st_mtime > 3600:  # its process was killed
                            path.unlink()
        except InputError as error:
            return str(error)
        size = self._num_missing * self._num_bytes
        if size <= free:
            return ""
        return (
            f"{self.option} {self.folder.parent}: {self.what[0].lower()}{self.what[1:]} take {size / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free there. Choose another folder, fewer --teacher_cache_views, or "
            f"{self.option} off."
        )


class TopKFolder(LogitsFolder):
    """A [`LogitsFolder`] of the rows of [`TopK.take`]: 4k + 4R bytes an image with float16 and up to 65,536 classes.

    Args:
        folder, about, shape: As for [`LogitsFolder`].
        dtype: Type of the k logits.
        top_k: What is kept.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        about: dict[str, Any],
        shape: tuple[int, int, int],
        dtype: str,
        top_k: TopK,
    ):
        *images, num_classes = shape
        parts = (("logits", dtype, top_k.k), ("classes", "u2" if num_classes <= 1 << 16 else "u4", top_k.k),
                 ("rest", "f4", len(top_k.shifts)))  # fmt: skip
        row = np.dtype([(name, kind, (width,)) for name, kind, width in parts])
        unit = f"row of the best {top_k.k} of {num_classes:,} classes"
        super().__init__(folder, {**about, "top_k": top_k.describe()}, (*images, 1), row, unit=unit)  # type: ignore

    def pack(self, rows: np.ndarray) -> np.ndarray:
        """As there."""
        return unstructured_to_structured(rows, self.dtype)[:, None]

    def unpack(self, stored: np.ndarray) -> np.ndarray:
        """As there."""
        return structured_to_unstructured(stored[:, 0], np.float32)


def precompute_logits(
    teacher: Callable[[Any], torch.Tensor],
    dataset: Any,
    folder: LogitsFolder,
    view: int,
    batch_size: int = 128,
    **loader_options: Any,
) -> None:
    """Write the teacher's logits of a view of all examples, unless they exist. All processes share the work.

    Args:
        teacher: Called with a batch on the host; returns B×C logits, or other numbers that the folder holds.
        dataset: Map-style, N examples, rendered in this view.
        folder: Where one process of each machine writes them.
        view: Number of the view.
        batch_size: Examples per process and call of the teacher.
        loader_options: For torch's `DataLoader`.

    Raises:
        InputError: If the file cannot be written, or a logit is too large for its precision.
        TeacherLogitsError: If a logit is NaN or +∞; −∞ stands for a class that the teacher does not know.
    """
    state, num_examples = PartialState(), len(dataset)
    if all(gather_object([folder.open(view) is not None])):
        return
    # All processes compute the same number of batches, all of the same size, as compiled and sharded teachers need.
    # The processes take consecutive batches.
    batch_size = min(batch_size, math.ceil(num_examples / state.num_processes))
    per_round = batch_size * state.num_processes
    examples = np.arange(math.ceil(num_examples / per_round) * per_round).clip(max=num_examples - 1)
    ours = examples.reshape(-1, state.num_processes, batch_size)[:, state.process_index].flatten().tolist()
    loader = DataLoader(Subset(dataset, ours), batch_size, generator=torch.Generator(), **loader_options)

    def batches() -> Iterator[np.ndarray]:
        for number, batch in enumerate(loader):
            logits = gather(teacher(batch)).detach().float().cpu().numpy()[: num_examples - number * per_round]
            if (np.isnan(logits) | np.isposinf(logits)).any():
                raise TeacherLogitsError(
                    f"{folder.what} are not finite (NaN or Inf) for training examples, in view {view}. Check the "
                    "weights and the precision (try without --fp16/--bf16), and the examples."
                )
            with np.errstate(over="ignore"):
                stored = folder.pack(logits)
            if np.isposinf(np.abs(folder.unpack(stored)[np.isfinite(logits)])).any():
                raise InputError(
                    f"A logit of the teacher ({np.abs(logits[np.isfinite(logits)]).max():.0f}) is too large for "
                    "--teacher_cache_dtype float16: use float32."
                )
            yield stored

    if state.is_local_main_process:
        folder.write(view, batches())
    else:
        for _ in batches():
            pass
    state.wait_for_everyone()


class WithColumn(Subset):
    """All examples of a map-style data set, each with its C float32 `teacher_logits`, or another row of numbers.

    Args:
        dataset: N examples.
        folder: Their logits; those of a view must exist when an example is read.
        name: Name of the column.
    """

    def __init__(self, dataset: Any, folder: LogitsFolder, name: str = TEACHER_LOGITS):
        super().__init__(dataset, range(len(dataset)))
        self.folder, self.name = folder, name
        # Shared with workers. The second number is a counter, as the file of a view may be replaced.
        self._view = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._opened: dict[tuple[int, ...], np.ndarray | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # a pickled map would be a copy

    def set_epoch(self, view: int) -> None:
        """Select the view whose logits the next examples get."""
        self._view.copy_(torch.tensor([view, self._view[1] + 1]))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return the examples of these indices, with their logits as arrays, which all collators can batch."""
        view = tuple(self._view.tolist())
        if view not in self._opened:
            self._opened = {view: self.folder.open(view[0])}
        stored = self._opened[view]
        if stored is None:
            raise InputError(f"{self.folder.what} of view {view[0]} are not in {self.folder.folder}, or damaged.")
        rows = self.folder.unpack(stored[indices])
        return [{**e, self.name: row} for e, row in zip(super().__getitems__(indices), rows, strict=True)]


def describe_teacher(teacher: FrozenTeacher) -> dict[str, Any]:
    """Return what a teacher's logits depend on beside its inputs: architecture, weights, order of outputs."""
    return {**describe_weights(teacher.model), "columns": teacher.columns}


def describe_weights(model: nn.Module, without: Iterable[str] = ()) -> dict[str, Any]:
    """Return what a model's outputs depend on beside its inputs: architecture and weights.

    Args:
        model: The model.
        without: Names of modules whose weights have no influence.
    """
    digest, skipped = hashlib.blake2b(digest_size=16), tuple(f"{name}." for name in without)
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(skipped):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = getattr(model, "config", None)
    text = config.to_json_string(use_diff=False) if isinstance(config, PreTrainedConfig) else "null"
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "modules": re.sub(r" at 0x[0-9a-f]+", "", repr(model)),
        "config": json.loads(
            text, object_hook=lambda entries: {k: v for k, v in entries.items() if k not in _WITHOUT_INFLUENCE}
        ),
        "weights": digest.hexdigest(),
    }


def describe_views(dataset: Any, sampler: str, option: str = "--teacher_cache") -> dict[str, Any]:
    """Return what the views of a data set's examples depend on beside their index and the epoch.

    Raises:
        InputError: If they depend on more than can be described.
    """
    if sampler != "instance":
        raise InputError(
            f"{option} does not go with --sampler {sampler}: how often an example is drawn in an epoch, and so "
            f"how many views it has, differs from epoch to epoch. Use {option} off."
        )
    if hasattr(dataset, "describe_views"):
        return dataset.describe_views()
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        return {"examples": hash_of_table(dataset)}
    raise InputError(
        f"{option} needs training examples that are a function of (seed, epoch, number), as ImageDataset's are "
        f"and those of a {type(dataset).__name__} need not be: a cached answer would be about another view. Give it a "
        f"method describe_views() that returns all that they depend on, or use {option} off."
    )
