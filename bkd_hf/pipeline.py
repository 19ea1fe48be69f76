"""The whole path of `scripts/run_bkd.py`: data, teacher, student, results."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import PredictionOutput
from transformers.utils import logging

from .arguments import CHOOSE_WORKERS
from .config import BKDConfig
from .data import LABEL_COLUMN, limit_examples, load_image_dataset, make_long_tailed
from .errors import InputError
from .machine import keep_freed_memory, set_num_threads
from .methods import METHODS
from .metrics import LongTailEvaluation, shot_groups
from .model_card import build as build_card
from .model_card import check_repo_id
from .models import cifar_resnet_depth, load_classifier, load_processor, prefer_channels_last
from .options import DataArguments, ModelArguments, RunArguments
from .plots import save_plots
from .precision import precision_of
from .publishing import CARD_NAME, check_repo_access, publish_run
from .results import (
    RESULTS_NAME,
    describe_data,
    describe_model,
    describe_run,
    history_of,
    load_results,
    save_json,
    summarize_training,
    without_folders,
)
from .run_folder import (
    TEACHER_NAME,
    claim_output_dir,
    differences,
    influential_for_teacher,
    last_complete_checkpoint,
    origin_of,
    read_json,
)
from .targets import describe_targets, why_collapsed
from .teacher import FrozenTeacher, align_labels, beats_guessing, load_teacher, teacher_label_names
from .trainer import BKDTrainer
from .transforms import ImageDataset, channel_statistics, default_augmentation, default_num_workers
from .verdict import judge
from .views import same_pixels

_TABLE_ROWS = (
    ("overall", "accuracy"),
    ("many-shot", "many_shot_accuracy"),
    ("medium-shot", "medium_shot_accuracy"),
    ("few-shot", "few_shot_accuracy"),
    ("worst class", "worst_class_accuracy"),
)


def run(arguments: RunArguments) -> dict[str, Any]:
    """Train a teacher (unless one is given, or the method has none) and a student, evaluate, and leave all on disk.

    The output folder holds the student as `transformers` saves it, `results.json`, the figures, and, if it was trained
    here, the teacher. A run that was interrupted is continued; one that is finished is reported again.

    Returns:
        The content of `results.json`.

    Raises:
        InputError: If something that the user gave cannot work.
    """
    started = time.perf_counter()
    output_dir = Path(arguments.training.output_dir)
    say = _Announcer()
    threads = set_num_threads(arguments.model.num_threads)
    keep_freed_memory()
    if arguments.training.disable_tqdm:
        logging.disable_progress_bar()
    for name, reason in arguments.options_without_effect().items():
        warnings.warn(f"--{name} has no effect: {reason}.", stacklevel=2)
    _check_publishing(arguments)

    with PartialState().main_process_first():
        if claim_output_dir(output_dir, arguments):
            results = load_results(output_dir)
            say(f"This run is finished: its results are in {output_dir}. To start anew, use --overwrite.")
            say.table(results)
            _publish(arguments, say)
            return results

    say.stage("Data")
    with PartialState().main_process_first():
        splits = _load_splits(arguments.data, arguments.model)
    data = describe_data(
        arguments.data.dataset_name,
        splits["train"],
        splits["eval"],
        arguments.data.many_shot_threshold,
        arguments.data.few_shot_threshold,
    )
    counts = data["class_counts"]
    _warn_of_untested_classes(data)
    for args in (arguments.training, arguments.for_teacher().training):
        _check_metric_for_best_model(args, data)
    say(
        f"{data['name']}: {data['num_train_images']:,} training images of {len(counts)} classes, {max(counts):,} to "
        f"{min(counts):,} each; {data['num_eval_images']:,} for evaluation. "
        f"{_device_name(arguments.training, threads)}"
    )

    processor = _load_processor(arguments.model, splits["train"])
    distils = arguments.distils
    teacher_processor = _load_teacher_processor(arguments.for_teacher().model, processor) if distils else processor
    # Before any image is decoded: a teacher that does not fit should not cost that time.
    match = _match_teacher(arguments.model, arguments.for_teacher().model, data["class_names"]) if distils else None
    if arguments.publishing.push_to_hub and arguments.publishing.push_teacher and not (match and match.why_trained):
        raise InputError(
            "--push_teacher: no teacher is trained in this run, and one that was given is where it comes from. Leave "
            "the option out."
        )
    if not same_pixels(processor, teacher_processor):
        say("The teacher takes other pixels than the student: each view of an image is rendered for both.")
    images = {
        "train": _decode(splits["train"], processor, arguments, augmented=True, teacher=teacher_processor),
        "eval": _decode(splits["eval"], processor, arguments),
    }
    choose_workers(arguments.for_teacher().training, images["train"], threads)
    if choose_workers(arguments.training, images["train"], threads):
        workers = arguments.training.dataloader_num_workers
        why = "" if images["train"].in_memory else ": they do not stay in memory"
        say(f"Images are prepared by {workers} worker{'s' if workers > 1 else ''} a process{why}.")
    make_stage = functools.partial(
        _Stage,
        data=data,
        post_hoc_tau=arguments.data.post_hoc_tau,
        force_distillation=arguments.model.force_distillation,
        say=say,
    )
    student = make_stage(arguments.model.model_name_or_path, arguments.training, processor, images)
    # Before the teacher is trained: a student that cannot be loaded should not cost that time.
    student_model = student.load_model(arguments.model)

    teacher, teacher_results = None, None
    if match is not None:
        say.stage("Teacher")
        processors = (processor, teacher_processor)
        teacher, teacher_results = _provide_teacher(arguments, match, splits, images, processors, make_stage)
        gc.collect()  # its trainer and callbacks know each other: their workers would stay, idle, beside the student's

    say.stage("Student")
    student_results = student.train(student_model, teacher)

    results = describe_run(
        arguments.training,
        data,
        student_results,
        teacher_results,
        teacher_training=arguments.for_teacher().training,
        model_options=dataclasses.asdict(arguments.model),
        data_options=dataclasses.asdict(arguments.data),
        command=arguments.command_line,
    )
    if PartialState().is_main_process:
        save_json(results, output_dir / RESULTS_NAME)
        figures = save_plots(results, output_dir / "figures")
        publishing = arguments.publishing
        card = build_card(results, arguments.repo_id, publishing.hub_license, publishing.hub_dataset_id)
        card.save(output_dir / CARD_NAME)
        say.stage("Results")
        say.table(results)
        seconds = time.perf_counter() - started
        say(
            f"Student, {RESULTS_NAME}, {len(figures)} figures and a model card ({CARD_NAME}): {output_dir}  "
            f"({seconds:.0f} s)"
        )
    _publish(arguments, say)
    return results


def choose_workers(args: BKDConfig, dataset: ImageDataset, num_threads: int) -> bool:
    """Have other processes prepare the images, if the options do not say how many and it pays; whether they do.

    They stay alive from epoch to epoch, unless the options say otherwise. Started anew, they would be copies of a
    process that holds a training: on a CPU, whose memory is then copied page by page as the training goes on, an epoch
    of a ResNet-18 began 2 s late.

    Args:
        args: The options, which are changed.
        dataset: The training images.
        num_threads: CPU threads of this process.
    """
    chooses = args.dataloader_num_workers == CHOOSE_WORKERS
    if chooses:
        args.dataloader_num_workers = default_num_workers(dataset, num_threads, args.device.type == "cuda")
    if not args.dataloader_num_workers:  # what is about workers, torch refuses without any
        args.dataloader_persistent_workers, args.dataloader_prefetch_factor = False, None
    return chooses and args.dataloader_num_workers > 0


# ---- The stages ---------------------------------------------------------------------------------------------------


@dataclass
class _Stage:
    """One model trained on the run's data: the teacher or the student."""

    name: str
    args: BKDConfig
    processor: BaseImageProcessor
    images: dict[str, ImageDataset]
    data: dict[str, Any]
    post_hoc_tau: float
    force_distillation: bool
    say: _Announcer

    def load_model(self, options: ModelArguments) -> PreTrainedModel:
        """Load the model that is to be trained, with a head for the data's classes."""
        if self.args.freeze_backbone and cifar_resnet_depth(self.name) is not None:
            raise InputError(
                f"--freeze_backbone: {self.name} starts from fresh weights, so its features would stay random. Give a "
                "trained model, or leave the option out."
            )
        kwargs = options.from_pretrained_kwargs()
        torch.manual_seed(self.args.seed)  # fresh weights, and fresh heads of pretrained models
        cosine_scale = self.args.ldam_scale if self.args.classification_loss == "ldam" else None
        model = load_classifier(self.name, self.data["class_names"], options.image_size, cosine_scale, **kwargs)
        prefer_channels_last(model)
        if model.new_parameters and cifar_resnet_depth(self.name) is None:
            shown = ", ".join(model.new_parameters[:8]) + (", …" if len(model.new_parameters) > 8 else "")
            self.say(f"{self.name}: learned from scratch: {shown}; all else starts from its weights.")
        return model

    def train(self, model: PreTrainedModel, teacher: nn.Module | None) -> dict[str, Any]:
        """Train, save and evaluate; continue from the last checkpoint if there is one."""
        args, clock = self.args, _StageClock()
        self.images["train"].data_seed = args.seed if args.data_seed is None else args.data_seed
        trainer = BKDTrainer(
            model=model,
            teacher_model=teacher,
            args=args,
            train_dataset=self.images["train"],
            eval_dataset=self.images["eval"],
            processing_class=self.processor,
            compute_metrics=LongTailEvaluation(
                self.data["class_counts"], self.data["many_shot_threshold"], self.data["few_shot_threshold"]
            ),
            callbacks=[clock],
        )
        trainer.add_callback(_TellOfCache(trainer, self.say))
        length = f"steps: {args.max_steps:,}" if args.max_steps > 0 else f"epochs: {args.num_train_epochs:g}"
        self.say(f"{self.name}: {model.num_parameters():,} parameters, {length}")
        about_teacher = {}
        if teacher is not None:
            about_teacher = {
                "started_from_teacher": trainer.student_started_from_teacher,
                "targets": self._look_at_targets(trainer),
            }
        checkpoint = last_complete_checkpoint(args.output_dir)
        if checkpoint is not None:
            self.say(f"Continuing from {Path(checkpoint).name}.")
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", outcome.metrics)
        trainer.save_metrics("train", outcome.metrics)
        evaluation = trainer.predict(self.images["eval"], metric_key_prefix="eval")
        trainer.save_metrics("eval", evaluation.metrics)
        return {
            **self._describe(model, evaluation),
            **about_teacher,
            "training": clock.summary(trainer, len(self.images["train"])),
            "history": history_of(trainer.state),
        }

    def _look_at_targets(self, trainer: BKDTrainer) -> dict[str, Any] | None:
        """Say what the student is to imitate, and refuse it if it knows the labels no more."""
        names = self.data["class_names"]
        if trainer.student_started_from_teacher:
            self.say("The student starts from the teacher's weights (--student_init).")
        statistics = trainer.look_at_targets()
        if statistics is None:
            return None
        self.say(describe_targets(statistics, names))
        if collapse := why_collapsed(statistics, names):
            over_corrects = statistics.get("power", 0.0) > 1 / self.args.temperature
            if over_corrects and not self.force_distillation:
                raise InputError(
                    f"The distillation targets collapse: {collapse}. A student would learn that. In another "
                    "--output_dir, try --class_balance_power auto, a lower --temperature, or a teacher that was "
                    "trained longer; --force_distillation uses these targets all the same."
                )
            # Not the re-weighting, but the teacher is to blame for the rest, as after the first steps of a training.
            self.say(
                f"WARNING: The distillation targets collapse: {collapse}. Train the teacher longer "
                "(--teacher_num_train_epochs)."
            )
        return statistics

    def evaluate(self, teacher: FrozenTeacher) -> dict[str, Any]:
        """Evaluate a teacher that was trained elsewhere, by its answers about the classes of the data."""
        trainer = BKDTrainer(
            model=teacher.as_classifier(),
            args=self.args,
            eval_dataset=self.images["eval"],
            class_counts=self.data["class_counts"],
        )
        return self._describe(teacher, trainer.predict(self.images["eval"]))

    def _describe(self, model: nn.Module, evaluation: PredictionOutput) -> dict[str, Any]:
        logits, labels = evaluation.predictions, evaluation.label_ids
        return describe_model(self.name, model, logits, labels, self.data, self.post_hoc_tau)


@dataclass(frozen=True)
class _Match:
    """Whether a given teacher can be used as it is.

    Attributes:
        columns: For each class of the data the teacher's output that is about it, `None` where there is none.
        missing: The classes without one.
        why_trained: Why the teacher has to be trained on the data first; `None` if it has not.
    """

    columns: list[int | None] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    why_trained: str | None = None


def _match_teacher(options: ModelArguments, of_teacher: ModelArguments, class_names: list[str]) -> _Match:
    """Match a given teacher's outputs with the classes of the data, by name.

    Raises:
        InputError: If it lacks classes, or does not name them.
    """
    name = options.teacher_model_name_or_path
    if name is None or cifar_resnet_depth(name) is not None:
        return _Match(why_trained="there is none yet")
    if options.finetune_teacher:
        return _Match(why_trained="--finetune_teacher")
    option = f"--teacher_model_name_or_path {name}"
    names = teacher_label_names(name, **of_teacher.from_pretrained_kwargs())
    if isinstance(names, int):
        if names != len(class_names):
            return _Match(
                why_trained=f"its head has {names} outputs without names, the data {len(class_names)} classes"
            )
        if not options.assume_label_order:
            raise InputError(
                f"{option} does not name its {names} classes (LABEL_0, …), so they cannot be matched with those of "
                "the data. If they are in the same order, say --assume_label_order; to train it on the data first, "
                "--finetune_teacher."
            )
        return _Match(list(range(names)))
    columns = align_labels(names, class_names, options.read_teacher_label_map())
    missing = [name for name, column in zip(class_names, columns, strict=True) if column is None]
    if len(missing) == len(class_names):
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        return _Match(why_trained=f"its head is for other classes ({shown})")
    if missing and not options.allow_partial_teacher:
        raise InputError(
            f"{option} {_lacking(missing, class_names)}. --teacher_label_map tells what they are called there; "
            "--allow_partial_teacher leaves them without distillation; --finetune_teacher trains the teacher on the "
            "data first."
        )
    return _Match(columns, missing)


def _lacking(missing: list[str], class_names: list[str]) -> str:
    shown = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
    return f"has no output for {len(missing)} of {len(class_names)} classes: {shown}"


def _provide_teacher(
    arguments: RunArguments,
    match: _Match,
    splits: datasets.DatasetDict,
    images: dict[str, ImageDataset],
    processors: tuple[BaseImageProcessor, BaseImageProcessor],
    make_stage: Callable[..., _Stage],
) -> tuple[FrozenTeacher, dict[str, Any]]:
    """Train a teacher, or use the one that was given; with its results.

    `processors` are the student's and the teacher's, `images` the student's.
    """
    given = arguments.model.teacher_model_name_or_path
    processor = processors[1]
    if not same_pixels(*processors):
        decode = functools.partial(_decode, processor=processor, arguments=arguments)
        images = {"eval": decode(splits["eval"])}
        if match.why_trained:
            images["train"] = decode(splits["train"], augmented=True)
    name = given or arguments.model.model_name_or_path
    if not match.why_trained:
        return _use_teacher(arguments, make_stage(name, arguments.training, processor, images), match)
    stage = make_stage(name, arguments.for_teacher().training, processor, images)
    if given is not None and cifar_resnet_depth(given) is None:
        stage.say(f"The teacher {given} is fine-tuned on the data first: {match.why_trained}.")
    return _train_teacher(arguments, stage)


def _train_teacher(arguments: RunArguments, stage: _Stage) -> tuple[FrozenTeacher, dict[str, Any]]:
    """Train a vanilla teacher, from fresh or from given weights, unless it was before; with its results."""
    args, say = stage.args, stage.say
    folder = Path(args.output_dir)
    told = {
        "model": stage.name,
        "image_size": arguments.model.image_size,
        "fingerprint": stage.data["fingerprint"],
        "augmentation": [stage.images["train"].augmentation, stage.images["train"].horizontal_flip],
        "training": influential_for_teacher(args),
    }
    record = read_json(folder / TEACHER_NAME)
    if record is not None and (found := differences(record["told"], told)):
        raise InputError(
            f"The teacher in {folder} was trained otherwise: {found}. Use --overwrite to train it anew, another "
            "--output_dir, or --teacher_model_name_or_path to use it all the same."
        )
    if record is not None and "results" in record:
        say(f"Using the teacher in {folder}, trained on the same data with the same options.")
    else:
        if PartialState().is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            save_json({"told": told}, folder / TEACHER_NAME)
        model = stage.load_model(arguments.for_teacher().model)
        record = {"told": told, "results": {**stage.train(model, None), "method": args.method_label}}
        if PartialState().is_main_process:
            save_json(record, folder / TEACHER_NAME)
    PartialState().wait_for_everyone()
    teacher = load_teacher(str(folder), **arguments.for_teacher().model.from_pretrained_kwargs())
    prefer_channels_last(teacher)
    return teacher, record["results"]


def _use_teacher(arguments: RunArguments, stage: _Stage, match: _Match) -> tuple[FrozenTeacher, dict[str, Any]]:
    """Load a teacher that was trained elsewhere, its outputs in the order of the data's classes; with its results."""
    options, name, data, say = arguments.model, stage.name, stage.data, stage.say
    option, class_names = f"--teacher_model_name_or_path {name}", data["class_names"]
    if match.missing:
        about = _lacking(match.missing, class_names)
        say(f"WARNING: {option} {about}. These classes are learned from the labels alone.")
    elif match.columns != list(range(len(class_names))):
        say(f"The teacher's outputs are put into the order of the data, by name ({len(class_names)} of its classes).")

    for alone in arguments.teacher_options:
        warnings.warn(f"--teacher_{alone} has no effect: the teacher {name} is not trained here.", stacklevel=2)
    origin = origin_of(Path(name))
    if origin.fingerprint not in (None, data["fingerprint"]):
        warnings.warn(
            f"{option} was trained on other images (another data set, ratio or split) than the student will be.",
            stacklevel=2,
        )
    method = arguments.training.method
    if origin.method not in (None, METHODS[method].teacher):
        warnings.warn(
            f"{option} was trained by {origin.method}; the published teacher of {method} is trained by "
            f"{METHODS[method].teacher}.",
            stacklevel=2,
        )
    teacher = load_teacher(name, match.columns, **arguments.for_teacher().model.from_pretrained_kwargs())
    prefer_channels_last(teacher)
    if origin.fingerprint != data["fingerprint"]:
        stage.post_hoc_tau = 0.0  # the class frequencies of this tail are not in its answers
    results = stage.evaluate(teacher)
    _check_above_chance(option, results["metrics"], data, match.columns, options.force_teacher)
    model = without_folders(origin.model) if origin.model else results["model"]
    return teacher, {**results, "model": model, "method": origin.method}


def _check_above_chance(
    option: str, metrics: dict[str, Any], data: dict[str, Any], columns: list[int | None], force: bool
) -> None:
    """Refuse a teacher that guesses: the one check that catches every mistake in its classes and in its pixels."""
    known = [
        (accuracy, num_images)
        for accuracy, num_images, column in zip(
            metrics["per_class_accuracy"], data["eval_class_counts"], columns, strict=True
        )
        if accuracy is not None and column is not None
    ]
    if not known:
        return
    accuracies, num_images = zip(*known, strict=True)
    verdict = beats_guessing(accuracies, num_images)
    if verdict:
        return
    accuracy, chance = sum(accuracies) / len(accuracies), 1 / len(accuracies)
    message = (
        f"{option} is right for {100 * accuracy:.1f} % of the evaluation images (mean over classes), where guessing "
        f"gives {100 * chance:.1f} %"
    )
    if verdict is None:
        warnings.warn(f"{message}: {sum(num_images)} images are too few to tell whether it guesses.", stacklevel=3)
        return
    if not force:
        raise InputError(
            f"{message}: its classes or its image processor are not what they seem. Check id2label and "
            "preprocessor_config.json; --force_teacher uses it all the same, --finetune_teacher trains it first."
        )
    warnings.warn(f"{message}; it is used all the same (--force_teacher).", stacklevel=3)


def _load_processor(options: ModelArguments, train: datasets.Dataset) -> BaseImageProcessor:
    """Load the student's image processor."""
    name = options.model_name_or_path
    if cifar_resnet_depth(name) is not None:
        mean, std = channel_statistics(train)
        return load_processor(name, options.image_size, mean, std)
    return load_processor(name, **options.from_pretrained_kwargs())


def _load_teacher_processor(options: ModelArguments, of_student: BaseImageProcessor) -> BaseImageProcessor:
    """Load the image processor of a given teacher; a teacher that is trained from scratch takes the student's."""
    name = options.model_name_or_path
    if cifar_resnet_depth(name) is not None:
        return of_student
    return load_processor(name, **options.from_pretrained_kwargs())


def _decode(
    split: datasets.Dataset,
    processor: BaseImageProcessor,
    arguments: RunArguments,
    augmented: bool = False,
    teacher: BaseImageProcessor | None = None,
) -> ImageDataset:
    options = arguments.data
    augmentation = options.train_augmentation if augmented else "none"
    return ImageDataset(
        split,
        processor,
        augmentation=default_augmentation(processor) if augmentation == "auto" else augmentation,  # type: ignore[arg-type]
        horizontal_flip=options.horizontal_flip,
        cache_images=options.cache_images,  # type: ignore[arg-type]
        teacher_processor=teacher,
        reduced_decoding=options.reduced_decoding,
        # accelerate, where it sends the main process's batches to the others, knows how to cut tensors only.
        as_bytes=not any(
            args.accelerator_config.dispatch_batches for args in (arguments.training, arguments.for_teacher().training)
        ),
    )


def _load_splits(options: DataArguments, model_options: ModelArguments) -> datasets.DatasetDict:
    splits = load_image_dataset(
        options.dataset_name,
        config_name=options.dataset_config_name,
        image_column=options.image_column_name,
        label_column=options.label_column_name,
        train_split=options.train_split_name,
        eval_split=options.eval_split_name,
        split_seed=options.split_seed,
        cache_dir=model_options.cache_dir,
        token=model_options.token,
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


# ---- Publishing ---------------------------------------------------------------------------------------------------


def _check_publishing(arguments: RunArguments) -> None:
    """Notice a wrong name or token before any work."""
    if arguments.publishing.hub_dataset_id is not None:
        check_repo_id(arguments.publishing.hub_dataset_id)
    if arguments.publishing.push_to_hub and PartialState().is_main_process:
        token, private = arguments.training.hub_token or arguments.model.token, arguments.training.hub_private_repo
        check_repo_access(arguments.repo_id, token, private=private)


def _publish(arguments: RunArguments, say: _Announcer) -> None:
    """Push the finished student, in the main process alone: the others need not wait."""
    training, publishing = arguments.training, arguments.publishing
    if not publishing.push_to_hub or not PartialState().is_main_process:
        return
    for url in publish_run(
        training.output_dir,
        arguments.repo_id,
        publishing.push_teacher,
        private=training.hub_private_repo,
        token=training.hub_token or arguments.model.token,
        license=publishing.hub_license,
        dataset_id=publishing.hub_dataset_id,
        revision=training.hub_revision,
    ):
        say(f"Published: {url}")


# ---- What is said and measured ------------------------------------------------------------------------------------


class _Announcer:
    """Speaks for the main process."""

    def __init__(self) -> None:
        self.console = Console(quiet=not PartialState().is_main_process, highlight=False, soft_wrap=True)

    def __call__(self, message: str) -> None:
        self.console.print(message, markup=False)

    def stage(self, name: str) -> None:
        self.console.rule(f"[bold]{name}", align="left")

    def table(self, results: dict[str, Any]) -> None:
        """Teacher | student | difference, in percent; the student alone where the method has no teacher."""
        data, models = results["data"], {name: results[name] for name in ("teacher", "student") if results.get(name)}
        table = Table(title=f"{data['name']}, accuracy in % ({data['num_eval_images']:,} images)")
        for name in ("", *models, *(["difference"] if len(models) == 2 else [])):
            table.add_column(name, justify="right" if name else "left")
        for title, key in _TABLE_ROWS:
            values = [100 * model["metrics"][key] for model in models.values() if key in model["metrics"]]
            differences = [f"{values[1] - values[0]:+.1f}"] if len(values) == 2 else []
            if values:
                table.add_row(title, *(f"{value:.1f}" for value in values), *differences)
        self.console.print(table)
        verdict = judge(results)
        for sentence in (verdict.sentence, *verdict.warnings):
            if sentence:
                bad = sentence in verdict.warnings
                self.console.print(
                    f"WARNING: {sentence}" if bad else sentence,
                    style="bold red" if bad else "yellow" if verdict.is_better is False else None,
                    markup=False,
                )
        name, model = next(iter(models.items()))
        if post_hoc := model.get("post_hoc_metrics"):
            shown = (f"{title} {100 * post_hoc[key]:.1f}" for title, key in _TABLE_ROWS if key in post_hoc)
            self(f"The {name} after post-hoc logit adjustment (τ = {post_hoc['tau']:g}): {', '.join(shown)}")


class _StageClock(TrainerCallback):
    """Measures training time over all sessions of a run that was interrupted: each log carries what has passed."""

    def __init__(self) -> None:
        self.before = 0.0
        self.started = 0.0

    def on_train_begin(self, args: BKDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = max((entry.get("elapsed_seconds", 0.0) for entry in state.log_history), default=0.0)
        self.started = time.perf_counter()

    def on_log(self, args: BKDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        if state.log_history and self.started:
            state.log_history[-1]["elapsed_seconds"] = round(self.before + time.perf_counter() - self.started, 3)

    def summary(self, trainer: BKDTrainer, num_images: int) -> dict[str, float]:
        """Time and speed of the training itself; evaluations in between are taken off."""
        history, state = trainer.state.log_history, trainer.state
        elapsed = next(e["elapsed_seconds"] for e in reversed(history) if "train_runtime" in e)
        evaluating = sum(entry.get("eval_runtime", 0.0) for entry in history if "train_runtime" not in entry)
        return summarize_training(state, max(elapsed - evaluating, 1e-9), num_images)


class _TellOfCache(TrainerCallback):
    """Says how large the cache of the teacher's logits is, before it is filled."""

    def __init__(self, trainer: BKDTrainer, say: _Announcer):
        self.trainer, self.say = trainer, say

    def on_train_begin(self, args: BKDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        cache = self.trainer.teacher_cache
        if cache is not None:
            computed = "" if cache.is_complete() or cache.is_filling else " (another run is filling it)"
            self.say(f"Teacher cache: {cache}{computed}.")


def _device_name(args: BKDConfig, threads: int) -> str:
    """E.g. "2 processes, 1 CPU thread each, fp32."."""
    device = f"{threads} CPU thread{'s' if threads > 1 else ''}" if args.device.type == "cpu" else str(args.device)
    processes = f"{args.world_size} process{'es' if args.world_size > 1 else ''}, {device}"
    return f"{processes}{' each' if args.world_size > 1 else ''}, {precision_of(args)}."


def _check_metric_for_best_model(args: BKDConfig, data: dict[str, Any]) -> None:
    """Refuse a name that no evaluation will give; `Trainer` would at the first one."""
    name = args.metric_for_best_model
    if name is None:
        return
    thresholds = data["many_shot_threshold"], data["few_shot_threshold"]
    groups = shot_groups(np.asarray(data["class_counts"]), *thresholds).values()
    tested = np.asarray(data["eval_class_counts"]) > 0
    labels = np.array([np.flatnonzero(group & tested)[0] for group in groups if (group & tested).any()])
    answers = EvalPrediction(np.zeros((len(labels), len(tested))), labels)
    names = ["loss", *LongTailEvaluation(data["class_counts"], *thresholds)(answers)]
    if name.removeprefix("eval_") not in names:
        raise InputError(f"--metric_for_best_model {name}: the evaluations of this run give {', '.join(names)}.")


def _warn_of_untested_classes(data: dict[str, Any]) -> None:
    counts = data["eval_class_counts"]
    untested = [name for name, count in zip(data["class_names"], counts, strict=True) if not count]
    if untested:
        shown = ", ".join(untested[:5]) + (", …" if len(untested) > 5 else "")
        warnings.warn(
            f"{len(untested)} of {len(counts)} classes ({shown}) have no evaluation image: they are in no accuracy "
            "and cannot be the worst class.",
            stacklevel=3,
        )
