"""A training set in a run: class counts, global batches, recurring views, cached logits and features."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, DynamoBackend, gather_object, send_to_device
from torch.utils.data import DataLoader, StackDataset, Subset
from transformers import DataCollatorWithPadding, DefaultDataCollator, default_data_collator
from transformers.trainer_utils import has_length, seed_worker
from transformers.utils import logging

from .config import DEFAULT_VIEWS, BKDConfig
from .data import class_counts as count_classes
from .data import labels_of
from .errors import InputError
from .features import FEATURES
from .loss_inputs import IGNORE_INDEX
from .sampling import CollateSampled, GlobalBatchSampler, SampledExamples, innermost
from .teacher import TEACHER_LOGITS
from .teacher_logits import DEFAULT_FOLDERS, LogitsFolder, TopKFolder, WithColumn, describe_views, precompute_logits
from .top_k import TopK

logger = logging.get_logger(__name__)


def count_training_examples(dataset: Any, num_classes: int | None) -> np.ndarray | None:
    """Class counts of a training set, from its `class_counts` or labels; `None` if it can be read only once."""
    if hasattr(dataset, "class_counts"):
        counts = np.asarray(dataset.class_counts, dtype=np.int64)
    elif isinstance(dataset, datasets.Dataset) and (column := _label_column(dataset)) is not None:
        labelled = np.flatnonzero(labels_of(dataset, column) != IGNORE_INDEX)
        counts = np.asarray(count_classes(dataset.select(labelled), column))
    else:
        labels = training_labels(dataset)
        if labels is None:
            return None
        labels = labels[labels != IGNORE_INDEX]
        if labels.min(initial=0) < 0:
            raise ValueError(f"Label {labels.min()} of the training set is negative.")
        counts = np.bincount(labels)
    if num_classes is not None and len(counts) > num_classes:
        raise ValueError(
            f"The training set has the label {len(counts) - 1}, outside the range of the model's {num_classes} "
            "classes. Load the model with num_labels set to the number of classes of the data."
        )
    return np.pad(counts, (0, (num_classes or len(counts)) - len(counts)))


def training_labels(dataset: Any) -> np.ndarray | None:
    """Class number of each training example; `None` if the set can be read only once.

    It uses the first that exists: a label column of a `datasets.Dataset`, a `labels` attribute, `targets` as in
    torchvision, or the labels in the examples themselves, which may take as long as reading them all.
    """
    if isinstance(dataset, datasets.Dataset) and (column := _label_column(dataset)) is not None:
        return labels_of(dataset, column)
    if type(dataset) is Subset:
        inner = training_labels(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=np.int64)]
    # A transform of torchvision's may give the targets other numbers.
    for name in ("labels", "targets") if getattr(dataset, "target_transform", None) is None else ("labels",):
        found = np.asarray(getattr(dataset, name, None))
        # The attribute of another data set may list its classes.
        if found.dtype.kind in "iu" and found.ndim == 1 and (not has_length(dataset) or len(found) == len(dataset)):
            return found
    if isinstance(dataset, torch.utils.data.IterableDataset) or not has_length(dataset):
        return None
    return np.asarray([int(_label_of(dataset[i])) for i in range(len(dataset))], dtype=np.int64)


def _label_of(example: Any) -> Any:
    if not isinstance(example, Mapping):
        raise ValueError(
            f"A training example is a {type(example).__name__}; a dict is expected, with what the model takes and "
            '"labels", e.g. {"pixel_values": tensor of 3×H×W, "labels": 3}.'
        )
    for name in ("labels", "label"):
        if name in example:
            if math.prod(np.shape(example[name])) != 1:
                raise ValueError(f'"{name}" of a training example is {example[name]}: one class number is expected.')
            return example[name]
    raise ValueError(
        f'The training examples have no "labels", only {", ".join(example)}: name the class number so. If a '
        "data_collator adds it, pass class_counts."
    )


def _label_column(dataset: datasets.Dataset) -> str | None:
    named = [name for name in ("labels", "label") if name in dataset.column_names]
    typed = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    return next(iter(named or (typed if len(typed) == 1 else [])), None)


def is_augmented(dataset: Any) -> bool:
    """Whether training images look different in each epoch."""
    return any(
        getattr(part, "augmentation", "none") != "none" or getattr(part, "operations", ())
        for part in innermost(dataset)
    )


def collator_of(dataset: Any) -> Callable | None:
    """Return the collator of a data set, or of a dict of them, if all its parts bring the same one."""
    sets = dataset.values() if isinstance(dataset, dict) else [dataset]
    found = [getattr(part, "collator", None) for each in sets for part in innermost(each)]
    return found[0] if found and all(each == found[0] for each in found) else None


def check_features(dataset: Any, args: BKDConfig) -> None:
    """Raise an `InputError` if features are to be cached for images that differ in each epoch."""
    if args.feature_cache != "off" and args.teacher_cache_views is None and is_augmented(dataset):
        raise InputError(
            "--feature_cache: the training images are augmented, so their features differ from epoch to epoch. Use "
            "--train_augmentation none (without --train_operations), --teacher_cache_views K for the features of K "
            "epochs, or --feature_cache off."
        )


class TrainingData:
    """The training examples of a `BKDTrainer`, epoch after epoch.

    Args:
        dataset: The training set.
        examples: The training set without columns that no model uses.
        collator: Combines examples into a batch.
        args: Options.
    """

    def __init__(self, dataset: Any, examples: Any, collator: Callable, args: BKDConfig):
        self.dataset, self.examples, self.collator, self.args = dataset, examples, collator, args
        self.computed: dict[str, LogitsFolder] = {}  # precomputed columns of a batch, by name
        self._with_columns: list[WithColumn] = []
        self._sampler: GlobalBatchSampler | None = None
        self._generator = torch.Generator()

    @property
    def numbers_examples(self) -> bool:
        """Whether batches come from a [`GlobalBatchSampler`], which knows the indices of their examples."""
        config = self.args.accelerator_config
        return not (
            self.dataset is None
            or isinstance(self.dataset, torch.utils.data.IterableDataset)
            or not has_length(self.dataset)
            or self.args.train_sampling_strategy not in ("random", "sequential")
            or config.split_batches
            or config.dispatch_batches
        )

    def check_sampler(self) -> None:
        """Raise a `ValueError` if the examples cannot be sampled as `--sampler` says."""
        if self.args.sampler == "class_balanced" and not self.numbers_examples:
            raise ValueError(
                "--sampler class_balanced needs a training set with a length and random access, "
                "--train_sampling_strategy random, and neither split_batches nor dispatch_batches of accelerate."
            )

    @property
    def num_views(self) -> int | None:
        """Number of views of a training image, after which they recur; `None` if each epoch has its own.

        It does not depend on the teacher, so that compared methods use the same views.
        """
        if self.args.teacher_cache_views is not None:
            return self.args.teacher_cache_views
        if (self.args.teacher_cache == "off" and self.args.feature_cache == "off") or not self.numbers_examples:
            return None
        return DEFAULT_VIEWS if is_augmented(self.dataset) else 1

    def _view(self, epoch: int) -> int:
        return epoch % self.num_views if self.num_views else epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of sampler and data set, which accelerate does only in some set-ups.

        The order depends on the epoch, the augmentation on its view.
        """
        self._generator.manual_seed(self.args.seed + epoch)
        view = self._view(epoch)
        for column in self._with_columns:
            column.set_epoch(view)
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)
        for part in innermost(self.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(view)

    @torch.no_grad()
    def answers(self, ask: Callable[[dict[str, Any]], torch.Tensor], indices: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return a model's logits of some examples, as in the first epoch. All processes share the work.

        Args:
            ask: Called with a batch on the device; returns its logits.
            indices: Indices of N examples, the same in all processes.

        Returns:
            Logits, N×C, in float32 and on the CPU, and labels, N; both in the same order.
        """
        state, found = PartialState(), []
        ours = indices[state.process_index :: state.num_processes].tolist()
        # A sharded model needs all processes for each batch.
        is_spread = state.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        num_added = math.ceil(len(indices) / state.num_processes) - len(ours) if is_spread else 0
        ours = Subset(self.examples, ours + indices[-1:].tolist() * num_added)
        self.set_epoch(0)
        with torch.random.fork_rng(devices=[]):  # this must not affect training
            for batch in DataLoader(ours, self.args.eval_batch_size, collate_fn=self.collator):
                batch = send_to_device(batch, self.args.device)
                found.append((ask(batch).float().cpu(), batch["labels"].cpu().long()))
        if num_added:
            found[-1] = found[-1][0][:-num_added], found[-1][1][:-num_added]
        return tuple(torch.cat(parts) for parts in zip(*gather_object(found), strict=True))

    # ---- The teacher's logits, and features -----------------------------------------------------------------------

    def open_logits(self, teacher: dict[str, Any], num_classes: int, top_k: TopK | None = None) -> None:
        """Open the logits cache, if the options ask for one; all processes must call it.

        Args:
            teacher: What the logits depend on (see `teacher_logits.describe_teacher`).
            num_classes: C.
            top_k: What is kept of each image's logits; all of them if not given.

        Raises:
            InputError: If there can be no cache; with `--teacher_cache auto`, none is used instead.
        """
        args = self.args
        if args.teacher_cache == "off":
            return
        folder = DEFAULT_FOLDERS[TEACHER_LOGITS] if args.teacher_cache == "auto" else args.teacher_cache
        try:
            self._check_that_batches_come_again("--teacher_cache")
            images = describe_views(self.dataset, args.sampler or "instance")
            about = {"teacher": teacher, "precision": args.mixed_precision, "images": images}
            shape = self.num_views or 1, len(self.dataset), num_classes
            if top_k is not None:
                self.computed[TEACHER_LOGITS] = TopKFolder(folder, about, shape, args.teacher_cache_dtype, top_k)
            else:
                self.computed[TEACHER_LOGITS] = LogitsFolder(folder, about, shape, args.teacher_cache_dtype)
        except InputError as error:
            if args.teacher_cache != "auto" or top_k is not None:  # all logits would give other results than top_k
                raise
            again = ""
            if self.num_views is not None:
                again = (
                    " Views come again all the same, as for methods that are compared with this one "
                    "(--teacher_cache_views)."
                )
            logger.warning(f"The teacher's logits are not cached: {error}{again}")

    def open_features(self, backbone: dict[str, Any], compute: Callable[[dict[str, Any]], torch.Tensor]) -> None:
        """Open the feature cache, if the options ask for one; all processes must call it.

        Args:
            backbone: What the features depend on (see `teacher_logits.describe_weights`).
            compute: Called with a batch on the device; returns B×F features.

        Raises:
            InputError: If there can be no cache.
        """
        args, option = self.args, "--feature_cache"
        if args.feature_cache == "off":
            return
        self._check_that_batches_come_again(option)
        check_features(self.dataset, args)
        # With a single view, repetitions of an image have the same features.
        sampler = "instance" if self.num_views == 1 else args.sampler or "instance"
        about = {
            "backbone": backbone,
            "precision": args.mixed_precision,
            "images": describe_views(self.dataset, sampler, option),
        }
        self.set_epoch(0)
        width = compute(send_to_device(self.collator([self.examples[0]]), args.device)).shape[1]
        folder = DEFAULT_FOLDERS[FEATURES] if args.feature_cache == "auto" else args.feature_cache
        shape = self.num_views or 1, len(self.dataset), width
        self.computed[FEATURES] = LogitsFolder(folder, about, shape, "float32", "The features", option, "features")

    def fill(
        self, epoch: int, asked: Mapping[str, Callable[[dict[str, Any]], torch.Tensor] | None], batch_size: int
    ) -> None:
        """Compute the columns for the view of this epoch, unless they are cached.

        `asked` holds, by column name, the function to call with `batch_size` examples on the device.
        """
        for name, folder in self.computed.items():
            ask = asked[name]
            precompute_logits(
                lambda batch, ask=ask: ask(send_to_device(batch, self.args.device)),  # type: ignore[misc]
                self.examples,
                folder,
                self._view(epoch),
                batch_size,
                collate_fn=self.collator,
                num_workers=self.args.dataloader_num_workers,
                multiprocessing_context=self.args.dataloader_multiprocessing_context,
            )

    def _check_that_batches_come_again(self, option: str) -> None:
        if not self.numbers_examples:
            raise InputError(
                f"{option} needs a training set with a length and random access, --train_sampling_strategy random or "
                f"sequential, and neither split_batches nor dispatch_batches of accelerate. Use {option} off."
            )
        collator = getattr(self.collator, "data_collator", self.collator)  # Trainer's wrapper only drops columns
        known = isinstance(collator, (DefaultDataCollator, DataCollatorWithPadding))
        if not known and collator not in (default_data_collator, collator_of(self.dataset)):
            raise InputError(
                f"{option} does not go with a data_collator of your own, which may change the examples, or mix them, "
                f"each time in another way. Use {option} off."
            )

    # ---- Batches --------------------------------------------------------------------------------------------------

    def stream_loader(self, batch_size: int, accelerator: Accelerator) -> DataLoader:
        """Return the batches of a stream, which itself divides them among processes and workers."""
        args, images = self.args, self.dataset
        images.batch_size, images.seed = batch_size, args.seed if args.data_seed is None else args.data_seed
        images.num_readers = accelerator.num_processes * max(1, args.dataloader_num_workers)
        images.process = accelerator.process_index, accelerator.num_processes
        loader = DataLoader(
            images,
            batch_size=None,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            generator=self._generator,
        )
        device = accelerator.device
        # As for a single process; accelerate would divide the batches among processes again.
        return prepare_data_loader(loader, device, 1, 0, put_on_device=True, rng_types=[], dispatch_batches=False)

    def loader(self, batch_size: int, accelerator: Accelerator) -> DataLoader:
        """Return the examples in global batches (see [`GlobalBatchSampler`]), to be prepared by accelerate."""
        args, examples, collator = self.args, self.examples, self.collator
        if FEATURES in self.computed:
            labels: Any = training_labels(self.dataset)
            examples, collator = StackDataset(labels=labels.tolist()), default_data_collator
        elif self.computed and hasattr(examples, "for_student_alone"):
            examples = examples.for_student_alone()
        step = batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        if args.dataloader_drop_last and len(examples) < step:
            raise InputError(
                f"--dataloader_drop_last true leaves no step of {len(examples):,} training examples: a step takes "
                f"{step:,}. Use false, or a smaller --per_device_train_batch_size."
            )
        self._with_columns = []
        for name, folder in self.computed.items():
            examples = WithColumn(examples, folder, name)
            self._with_columns.append(examples)
        self._sampler = GlobalBatchSampler(
            len(examples),
            batch_size=batch_size,
            accumulation_steps=args.gradient_accumulation_steps,
            num_processes=accelerator.num_processes,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy == "random",
            drop_last=args.dataloader_drop_last,
            # A step of another size would be recompiled for dynamic sizes, and all later ones would be slower.
            pad_last=accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
            class_balanced_labels=training_labels(self.dataset) if args.sampler == "class_balanced" else None,
        )
        return DataLoader(
            SampledExamples(examples),
            batch_sampler=self._sampler,
            collate_fn=CollateSampled(collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            # Its own generator, seeded by the epoch: a loader draws a number whenever it starts (workers). With
            # the global generator, this would change all later dropout, and differently after a resume.
            generator=self._generator,
            worker_init_fn=functools.partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
        )
