"""What a run and its teacher share: splits, their description, and the inputs of each model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from .announcer import Announcer
from .arguments import CHOOSE_WORKERS
from .augmentations import default_augmentation
from .config import BKDConfig
from .data import LABEL_COLUMN, limit_examples, make_long_tailed
from .errors import InputError
from .images import ImageDataset, channel_statistics, default_num_workers
from .loading import load_dataset_of
from .metrics import LongTailEvaluation, shot_groups
from .models import FRESH_IMAGE_SIZE, cifar_resnet_depth, load_config, load_processor
from .options import ModelArguments, RunArguments
from .streams import Stream, StreamedImages, load_stream, sample_of
from .tasks import TEXT_COLUMN, fresh_task, task_of
from .text import have, quoted
from .text_data import TextDataset, fresh_tokenizer, limit_length, same_tokens, set_max_length
from .views import same_pixels, set_image_size

#: Turns an image or a text into a model's inputs.
Processor: TypeAlias = BaseImageProcessor | PreTrainedTokenizerBase
Examples: TypeAlias = ImageDataset | StreamedImages | TextDataset


@dataclass(frozen=True)
class Inputs:
    """A model's training inputs: the data shared by a run and its teacher, and the examples for this model.

    Attributes:
        splits: `train` and `eval`.
        data: The `data` section of the results.
        processor: The model's processor.
        images: By split: images, or other examples of the task.
        threads: CPU threads of this process.
        say: Prints a message.
    """

    splits: dict[str, Any]
    data: dict[str, Any]
    processor: Processor
    images: dict[str, Any]
    threads: int
    say: Announcer


def load_own_processor(options: ModelArguments, train: Any) -> Processor:
    """Load a model's processor; for fresh weights it is made from the data's mean and deviation, or words."""
    if options.task == "text":
        return load_tokenizer(options, train)
    name = options.model_name_or_path
    if cifar_resnet_depth(name) is not None:
        return load_processor(name, options.image_size or FRESH_IMAGE_SIZE, *channel_statistics(sample_of(train)))
    processor = load_processor(name, **options.from_pretrained_kwargs())
    if options.image_size is not None:
        set_image_size(processor, options.image_size)
    return processor


def load_tokenizer(options: ModelArguments, train: Any = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model (made from the training texts for fresh weights), and set its maximal length.

    Raises:
        InputError: If the model accepts fewer tokens than requested.
    """
    name = options.model_name_or_path
    if fresh_task(name) is not None:
        tokenizer = fresh_tokenizer(() if train is None else train[TEXT_COLUMN])
    else:
        tokenizer = load_processor(name, **options.from_pretrained_kwargs())
        limit_length(tokenizer, load_config(name, **options.from_pretrained_kwargs()))
    set_max_length(tokenizer, name, options.max_length)
    return tokenizer


def load_teacher_processor(arguments: RunArguments, of_student: Processor, train: Any) -> Processor:
    """Load the processor of a teacher with weights; a fresh teacher uses the student's by default."""
    of_teacher = arguments.for_teacher()
    is_fresh = fresh_task(of_teacher.model.model_name_or_path) is not None
    decisive = ["image_size", "max_length", *([] if is_fresh else ["model_name_or_path", "model_revision"])]
    is_same = all(of_teacher.options[name] == arguments.options[name] for name in decisive)
    return of_student if is_same else load_own_processor(of_teacher.model, train)


def prepare(
    arguments: RunArguments,
    split: Any,
    processor: Processor,
    for_training: bool = False,
    teacher: Processor | None = None,
) -> Examples:
    """Make a model's inputs for a split, augmented for training, and those of its teacher if they differ."""
    if arguments.model.task == "text":
        return TextDataset(split, processor, teacher)
    options, trainings = arguments.data, [each.training for each in arguments.with_teacher]
    augmentation = options.train_augmentation if for_training else "none"
    is_stream = isinstance(split, Stream)
    images = ImageDataset(
        split.sample if is_stream else split,
        processor,
        augmentation=default_augmentation(processor) if augmentation == "auto" else augmentation,
        operations=(options.train_operations if for_training else None) or (),
        horizontal_flip=options.horizontal_flip,
        cache_images="none" if is_stream else options.cache_images,  # type: ignore[arg-type]
        teacher_processor=teacher,
        reduced_decoding=options.reduced_decoding,
        # With dispatch_batches, accelerate can only split tensors.
        as_bytes=not any(args.accelerator_config.dispatch_batches for args in trainings),
    )
    return StreamedImages(split, images) if is_stream else images


def same_inputs(arguments: RunArguments, first: Processor, second: Processor) -> bool:
    """Whether two processors give the same numbers for the same image or text."""
    return (same_tokens if arguments.model.task == "text" else same_pixels)(first, second)


def how_they_differ(task: str) -> str:
    """Return a sentence that teacher and student take different inputs."""
    if task == "text":
        return "The teacher takes other tokens than the student: each text is tokenized for both."
    return "The teacher takes other pixels than the student: each view of an image is rendered for both."


def load_splits(arguments: RunArguments) -> dict[str, Any]:
    """Load `train` and `eval`, reduced as the options say; with `--streaming`, `train` is a [`Stream`]."""
    options, task = arguments.data, arguments.model.task
    if options.streaming:
        splits: Any = load_stream(
            options.dataset_name,
            str(options.class_counts),
            options.dataset_config_name,
            (options.image_column_name, options.label_column_name),
            (options.train_split_name, options.eval_split_name),
            options.shuffle_buffer_size,
            arguments.model.cache_dir,
            arguments.model.token,
        )
    else:
        splits = load_dataset_of(
            task,
            options.dataset_name,
            config_name=options.dataset_config_name,
            column=getattr(options, f"{task}_column_name"),
            label_column=options.label_column_name,
            train_split=options.train_split_name,
            eval_split=options.eval_split_name,
            split_seed=options.split_seed,
            cache_dir=arguments.model.cache_dir,
            token=arguments.model.token,
        )
    if options.imbalance_ratio is not None:
        splits["train"] = make_long_tailed(
            splits["train"],
            LABEL_COLUMN,
            options.imbalance_ratio,
            options.imbalance_profile,  # type: ignore[arg-type]
            options.split_seed,
            options.max_class_count,
        )
    splits["train"] = limit_examples(splits["train"], options.max_train_samples, "max_train_samples")
    splits["eval"] = limit_examples(splits["eval"], options.max_eval_samples, "max_eval_samples")
    return splits


def choose_workers(args: BKDConfig, dataset: Any, num_threads: int) -> bool:
    """Choose the number of data workers if the options do not; return whether this gave any.

    Workers stay alive between epochs, unless the options say otherwise. Restarted workers would be forks of a process
    with a large memory, which is then copied page by page as training continues: on a CPU, this delayed an epoch of a
    ResNet-18 by 2 s.
    """
    chooses = args.dataloader_num_workers == CHOOSE_WORKERS
    if chooses:
        args.dataloader_num_workers = default_num_workers(dataset, num_threads, args.device.type == "cuda")
    if not args.dataloader_num_workers:  # torch rejects worker options without workers
        args.dataloader_persistent_workers, args.dataloader_prefetch_factor = False, None
    return chooses and args.dataloader_num_workers > 0


def long_tail_evaluation(data: dict[str, Any], post_hoc_tau: float) -> LongTailEvaluation:
    """The metrics of a run, from the `data` section of its results; without a tail there is nothing to adjust."""
    thresholds, counts = (data["many_shot_threshold"], data["few_shot_threshold"]), data["class_counts"]
    return LongTailEvaluation(counts, *thresholds, post_hoc_tau if len({*counts}) > 1 else 0.0)


def check_metric_for_best_model(args: BKDConfig, data: dict[str, Any]) -> None:
    """Reject a metric name that no evaluation returns; `Trainer` would fail only at the first evaluation."""
    name = args.metric_for_best_model
    if name is None:
        return
    evaluation = long_tail_evaluation(data, post_hoc_tau=0.0)
    groups = shot_groups(np.asarray(evaluation.class_counts), *evaluation.thresholds).values()
    tested = np.asarray(data["eval_class_counts"]) > 0
    labels = np.array([np.flatnonzero(group & tested)[0] for group in groups if (group & tested).any()])
    answers = EvalPrediction(np.zeros((len(labels), len(tested))), labels)
    names = ["loss", *evaluation(answers)]
    if name.removeprefix("eval_") not in names:
        raise InputError(f"--metric_for_best_model {name}: the evaluations of this run give {', '.join(names)}.")


def warn_of_untested_classes(data: dict[str, Any]) -> None:
    """Warn about classes without an evaluation example."""
    counts, unit = data["eval_class_counts"], task_of(data).name
    untested = [name for name, count in zip(data["class_names"], counts, strict=True) if not count]
    if untested:
        warnings.warn(
            f"{len(untested)} of {len(counts)} classes ({quoted(untested)}) {have(len(untested))} no evaluation "
            f"{unit}: no accuracy tells of {'it' if len(untested) == 1 else 'them'}, nor can the worst class.",
            stacklevel=3,
        )
