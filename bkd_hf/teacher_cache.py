"""The teacher's logits, computed once for each view of each training image and read ever after.

With augmentation that is a function of (seed, epoch, index), the view of image i in epoch e is that of epoch e mod K,
where K is the number of views: after K epochs the teacher has said all that it will ever say. What it said lies in a
memory-mapped file of K × N × C numbers, which processes and runs share.

The file is named by all that the logits depend on: the teacher's weights, its precision, the images, what is made of
them, the augmentation and its seed, and K. An entry counts from the moment its flag is written, which happens after
the entry itself is on disk; a process that is killed leaves entries without flags, and these are computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from huggingface_hub import constants
from transformers import DataCollatorWithPadding, DefaultDataCollator, PreTrainedConfig, default_data_collator
from transformers.utils import logging

from .errors import InputError
from .images import collate_images
from .sampling import innermost

if TYPE_CHECKING:
    from .teacher import FrozenTeacher

#: What `teacher_cache_dtype` may be.
DTYPES: dict[str, type[np.floating]] = {"float16": np.float16, "float32": np.float32}

#: K for augmented images where nothing else is said.
DEFAULT_VIEWS = 16

logger = logging.get_logger(__name__)

# Entries of a model's configuration; the type of its weights is known from these.
_WITHOUT_INFLUENCE = {
    "transformers_version", "_name_or_path", "_commit_hash", "architectures", "auto_map", "dtype", "torch_dtype",
    "id2label", "label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states",
}  # fmt: skip

_LOGITS, _FLAGS, _ABOUT, _LOCK = "logits.bin", "flags.bin", "about.json", "lock"


class TeacherCache:
    """Logits of K views of N examples for C classes, in a folder.

    The first run that opens it fills it; one that opens it meanwhile reads what was there when it began, and computes
    the rest for itself.

    Args:
        folder: Where the caches are; this one gets a folder in it, named by `about`.
        about: All that the logits depend on; must be writable as JSON.
        num_views: K.
        num_examples: N.
        num_classes: C.
        dtype: `"float16"` or `"float32"`, as the logits are stored.

    Raises:
        InputError: If the folder cannot be written, or its disk has no room.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        about: dict[str, Any],
        num_views: int,
        num_examples: int,
        num_classes: int,
        dtype: str = "float16",
    ):
        self.shape = (num_views, num_examples, num_classes)
        self.dtype = DTYPES[dtype]
        about = {**about, "shape": self.shape, "dtype": dtype}
        text = json.dumps(about, sort_keys=True)
        self.folder = Path(folder).expanduser() / hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        self._make(about)
        self._lock = FileLock(self.folder / _LOCK)
        self._logits: np.memmap | None = None
        self._flags: np.memmap | None = None
        self._known = np.zeros(self.shape[:2], dtype=bool)
        self._pending = np.zeros(self.shape[:2], dtype=bool)
        self.is_filling = False

    @staticmethod
    def default_folder() -> Path:
        """Where `--teacher_cache auto` keeps its files."""
        return Path(constants.HF_HOME) / "bkd_hf" / "teacher_logits"

    @staticmethod
    def size_in_bytes(num_views: int, num_examples: int, num_classes: int, dtype: str = "float16") -> int:
        """Size of a full cache."""
        return num_views * num_examples * (num_classes * np.dtype(DTYPES[dtype]).itemsize + 1)

    def try_to_lock(self) -> bool:
        """Become the run that fills the cache, unless another is; the lock falls with its process."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def open(self, fill: bool) -> None:
        """Map the file into memory.

        Args:
            fill: Whether to write what is computed; of all runs that use a cache, one may.
        """
        mode: Literal["r+", "r"] = "r+" if fill else "r"
        self.is_filling = fill
        self._logits = np.memmap(self.folder / _LOGITS, self.dtype, mode, shape=self.shape)
        self._flags = np.memmap(self.folder / _FLAGS, np.uint8, mode, shape=self.shape[:2])
        self._known = self._flags[:] == 1

    def __str__(self) -> str:
        views, examples, classes = self.shape
        size = self.size_in_bytes(*self.shape, dtype=np.dtype(self.dtype).name)
        known = self.num_known / (views * examples)
        state = "all of it is there" if known == 1 else f"{100 * known:.0f} % of it is there"
        return (
            f"{views:,} view{'s' if views > 1 else ''} × {examples:,} images × {classes:,} classes, "
            f"{size / 1e6:,.1f} MB in {self.folder.parent}; {state}"
        )

    @property
    def num_known(self) -> int:
        """Entries that can be read."""
        return int(self._known.sum())

    def is_complete(self, view: int | None = None) -> bool:
        """Whether everything can be read, of one view or of all."""
        return bool((self._known if view is None else self._known[view]).all())

    def read(self, view: int, examples: np.ndarray) -> torch.Tensor | None:
        """Return B×C float32 logits; `None` if one of them is not known yet."""
        assert self._logits is not None
        if not self._known[view, examples].all():
            return None
        return torch.from_numpy(self._logits[view, examples].astype(np.float32))

    def write(self, view: int, examples: np.ndarray, logits: torch.Tensor) -> torch.Tensor:
        """Store logits that are not known yet; known ones stay as they are.

        Args:
            view: Number of the view.
            examples: B numbers.
            logits: B×C.

        Returns:
            B×C float32 logits as they will be read: rounded to the stored precision. A run that fills the cache then
            computes the very numbers of one that reads it.

        Raises:
            InputError: If a logit is too large for the stored precision.
        """
        assert self._logits is not None
        values = logits.detach().float().cpu().numpy()
        with np.errstate(over="ignore"):
            stored = values.astype(self.dtype)
        if (np.isinf(stored) & np.isfinite(values)).any():
            raise InputError(
                f"A logit of the teacher ({np.abs(values[np.isfinite(values)]).max():.0f}) is too large for "
                "--teacher_cache_dtype float16: use float32."
            )
        known = self._known[view, examples]
        if self.is_filling:
            # −∞ stands for a class that the teacher does not know; anything else that is not finite is an accident.
            new = ~known & ~(np.isnan(stored) | np.isposinf(stored)).any(axis=1)
            self._logits[view, examples[new]] = stored[new]
            self._pending[view, examples[new]] = True
            self._known[view, examples[new]] = True
        stored[known] = self._logits[view, examples[known]]
        return torch.from_numpy(stored.astype(np.float32))

    def flush(self) -> None:
        """Bring what was written to disk, then say that it is there."""
        if self._pending.any():
            assert self._logits is not None
            assert self._flags is not None
            self._logits.flush()
            self._flags[self._pending] = 1
            self._flags.flush()
            self._pending[:] = False

    def close(self) -> None:
        """Flush, and let another run fill the rest."""
        self.flush()
        self._lock.release()

    def _make(self, about: dict[str, Any]) -> None:
        """Make the empty files, unless they are there: whole, or not at all."""
        if (self.folder / _ABOUT).exists():
            return
        size = self.size_in_bytes(*self.shape, dtype=np.dtype(self.dtype).name)
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder.parent).free
            if size > free:
                raise InputError(
                    f"--teacher_cache {self.folder.parent}: the logits take {size / 1e9:.1f} GB, and {free / 1e9:.1f} "
                    "GB are free there. Choose another folder, fewer --teacher_cache_views, or --teacher_cache off."
                )
            making = Path(tempfile.mkdtemp(prefix=".making-", dir=self.folder.parent))
            for name, length in (
                (_LOGITS, size - self.shape[0] * self.shape[1]),
                (_FLAGS, self.shape[0] * self.shape[1]),
            ):
                with open(making / name, "wb") as file:
                    file.truncate(length)
            (making / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            try:
                making.rename(self.folder)
            except OSError:  # another process was faster
                shutil.rmtree(making)
                if not (self.folder / _ABOUT).exists():
                    raise
        except OSError as error:
            raise InputError(
                f"--teacher_cache {self.folder.parent} cannot be written: {error.strerror or error}. Choose another "
                "folder, or --teacher_cache off."
            ) from error


def describe_teacher(teacher: FrozenTeacher) -> dict[str, Any]:
    """Return what a teacher's logits depend on, beside its inputs: architecture, weights, order of its outputs."""
    model = teacher.model
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = getattr(model, "config", None)
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "modules": re.sub(r" at 0x[0-9a-f]+", "", repr(model)),
        "config": _influential(json.loads(config.to_json_string(use_diff=False)))
        if isinstance(config, PreTrainedConfig)
        else None,
        "weights": digest.hexdigest(),
        "columns": teacher.columns,
    }


def _influential(config: Any) -> Any:
    """Return a model's configuration, and those in it, without names and origins."""
    if not isinstance(config, dict):
        return config
    return {name: _influential(value) for name, value in config.items() if name not in _WITHOUT_INFLUENCE}


def describe_views(dataset: Any, sampler: str) -> dict[str, Any]:
    """Return what the views of a data set's examples depend on, beside their numbers and the epoch.

    Raises:
        InputError: If they depend on more than that.
    """
    if sampler != "instance":
        raise InputError(
            f"--teacher_cache does not go with --sampler {sampler}: how often an image is drawn in an epoch, and so "
            "how many views it has, differs from epoch to epoch. Use --teacher_cache off."
        )
    if hasattr(dataset, "describe_views"):
        return dataset.describe_views()
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        return {"fingerprint": dataset._fingerprint}
    raise InputError(
        "--teacher_cache needs training examples that are a function of (seed, epoch, number), as ImageDataset's are "
        f"and those of a {type(dataset).__name__} need not be: a cached answer would be about another view. Give it a "
        "method describe_views() that returns all that they depend on, or use --teacher_cache off."
    )


def is_augmented(dataset: Any) -> bool:
    """Whether the examples of a data set differ from epoch to epoch."""
    return any(getattr(part, "augmentation", "none") != "none" for part in innermost(dataset))


def open_teacher_cache(trainer: Any) -> TeacherCache | None:
    """Open the cache that the options ask for; `None` without one.

    Raises:
        InputError: If there can be none, and it was not left open by `"auto"`.
    """
    args = trainer.args
    if args.teacher_cache == "off" or trainer.teacher_model is None:
        return None
    folder = TeacherCache.default_folder() if args.teacher_cache == "auto" else args.teacher_cache
    try:
        _check_that_batches_come_again(trainer)
        images = describe_views(trainer.train_dataset, args.sampler)
        about = {"teacher": trainer._about_teacher, "precision": args.mixed_precision, "images": images}
        size = trainer.num_views or 1, len(trainer.train_dataset), len(trainer.objective.known_class_counts())
        cache = TeacherCache(folder, about, *size, dtype=args.teacher_cache_dtype)
    except InputError as error:
        if args.teacher_cache != "auto":
            raise
        again = ""
        if trainer.num_views is not None:
            again = (
                " Views come again all the same, as for methods that are compared with this one "
                "(--teacher_cache_views)."
            )
        logger.warning(f"The teacher's logits are not cached: {error}{again}")
        return None
    fill = [trainer.is_world_process_zero() and cache.try_to_lock()]  # one run of all, with all its processes
    cache.open(fill=broadcast_object_list(fill)[0])
    return cache


def _check_that_batches_come_again(trainer: Any) -> None:
    if not trainer._numbers_examples:
        raise InputError(
            "--teacher_cache needs a training set with a length and random access, --train_sampling_strategy "
            "random or sequential, and neither split_batches nor dispatch_batches of accelerate. Use "
            "--teacher_cache off."
        )
    known = default_data_collator, collate_images
    if trainer.data_collator not in known and not isinstance(
        trainer.data_collator, (DefaultDataCollator, DataCollatorWithPadding)
    ):
        raise InputError(
            "--teacher_cache does not go with a data_collator of your own, which may change the examples, or mix "
            "them, each time in another way. Use --teacher_cache off."
        )
