"""A run, from data to results: `run` trains a student and, with the same function, its teacher."""

from __future__ import annotations

import dataclasses
import functools
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .adapters import check_adapter
from .announcer import Announcer
from .callbacks import Clock
from .card import build as build_card
from .card import repo_of
from .errors import InputError
from .files import unlock, why_broken, write_text
from .given_teacher import Match, match_teacher, use_given_teacher
from .head import check_head_bias, the_head
from .head_fitting import check_means, class_vectors, describe_bias_shift
from .hub import CARD_NAME, card_of, publish_run
from .inputs import (
    Inputs,
    Processor,
    check_metric_for_best_model,
    choose_workers,
    how_they_differ,
    load_own_processor,
    load_splits,
    load_teacher_processor,
    long_tail_evaluation,
    prepare,
    same_inputs,
    warn_of_untested_classes,
)
from .machine import (
    collect_only_new_garbage,
    keep_freed_memory,
    options_alone,
    precision_of,
    set_num_threads,
)
from .measure import options_used
from .methods import is_balanced_by
from .models import FRESH_IMAGE_SIZE, load_classifier, prefer_channels_last, why_not_alike
from .nodes import check_same, in_turn, on_main_process, send_folder
from .objective import Objective
from .onnx_export import export_run
from .optimization import layer_depths
from .options import UNKNOWN_LICENSE, RunArguments
from .plots import save_plots
from .precision import settle_precision, share_precision
from .progress import show_progress, tell_of_targets
from .rehearsal import check_before_work
from .results import (
    RESULTS_NAME,
    describe_data,
    describe_model,
    describe_run,
    history_of,
    load_results,
    save_json,
)
from .run_folder import (
    claim_output_dir,
    differences,
    identity_of,
    is_cut_otherwise,
    last_complete_checkpoint,
    record_run,
    what_is_told,
)
from .stopping import end_workers
from .tasks import fresh_task, task_of
from .teacher import FrozenTeacher, load_teacher
from .trainer import BKDTrainer
from .training_data import check_features


@options_alone()
@collect_only_new_garbage()
def run(arguments: RunArguments) -> dict[str, Any]:
    """Train a teacher (unless one is given, or the method has none) and a student, evaluate, and save everything.

    The output folder holds the student as `transformers` saves it, `results.json`, the figures, a model card, and in
    `teacher` the same for a teacher trained in the run. An interrupted run is continued; a finished one is reported
    again.

    Returns:
        The content of `results.json`.

    Raises:
        InputError: If the user's input is invalid.
    """
    started, say = time.perf_counter(), Announcer()
    given = _findable(arguments)
    output_dir = Path(arguments.training.output_dir)
    threads = set_num_threads(arguments.model.num_threads)
    keep_freed_memory()
    if arguments.training.disable_tqdm or not sys.stderr.isatty():
        logging.disable_progress_bar()
    for name, reason in arguments.options_without_effect().items():
        warnings.warn(f"--{name} has no effect: {reason}.", stacklevel=2)
    check_before_work(arguments)
    try:
        is_finished = _claim(arguments)
        _agree(arguments)
        if is_finished and _is_still_the_same(arguments, say):
            results = on_main_process(lambda: load_results(output_dir))
            say(f"This run is finished: its results are in {output_dir}. To start anew, use --overwrite.")
            say.table(results)
        else:
            results = _prepare_and_train(arguments, threads, say)
            say.stage("Results")
            say.table(results)
            figures = len(list((output_dir / "figures").iterdir())) if PartialState().is_main_process else 0
            say(
                f"Student, {RESULTS_NAME}, {figures} figures and a model card ({CARD_NAME}): {output_dir}  "
                f"({time.perf_counter() - started:.0f} s)"
            )
        if arguments.publishing.export == "onnx" and PartialState().is_main_process:
            results = export_run(arguments, say)
        _publish(arguments, say)
    finally:
        for each, values in zip(arguments.with_teacher, given, strict=True):
            each.training.__dict__.update(values)
        unlock()
    return results


def _findable(arguments: RunArguments) -> list[dict[str, Any]]:
    """Options that a training may find out itself, which are no options of the next run with these arguments."""
    names = "distillation_prior", "per_device_train_batch_size"
    return [{name: getattr(each.training, name) for name in names} for each in arguments.with_teacher]


def _is_still_the_same(arguments: RunArguments, say: Announcer) -> bool:
    """Refuse to report a finished run on other images or weights; recreate its missing reports."""
    try:
        _, data = _load_data(arguments)
    except InputError as error:
        say(f"WARNING: Nobody knows whether the examples of this run are still the same: {error}")
    else:
        if not _claim(arguments, identity_of(arguments, data)):
            return False
    if PartialState().is_main_process:
        for each in arguments.with_teacher:
            if not each.is_teacher or (Path(each.training.output_dir) / RESULTS_NAME).exists():
                _report(each, load_results(each.training.output_dir), only_missing=True)
    return True


def _load_data(arguments: RunArguments) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load the splits; return them, and the `data` section of the results."""
    options = arguments.data
    with in_turn():
        splits = load_splits(arguments)
    thresholds = options.many_shot_threshold, options.few_shot_threshold
    data = describe_data(options.dataset_name, splits["train"], splits["eval"], *thresholds)
    check_same(
        (data["fingerprint"], data["eval_fingerprint"]),
        lambda *_: f"--dataset_name {options.dataset_name} has other examples on one machine than on the main one.",
    )
    return splits, data


def _prepare_and_train(arguments: RunArguments, threads: int, say: Announcer) -> dict[str, Any]:
    """Check everything that may be wrong, the quickest checks first, and train."""
    say.stage("Data")
    splits, data = _load_data(arguments)
    counts, unit = data["class_counts"], task_of(data).name
    warn_of_untested_classes(data)
    names = dict(enumerate(data["class_names"]))
    for args in (each.training for each in arguments.with_teacher):
        check_metric_for_best_model(args, data)
        # What the teacher's answers will tell is not known yet: any number does for a check.
        measured = {"power": 1.0, "prior_in_teacher": 1.0}
        objective = Objective(args, counts, has_teacher=args.distillation_loss != "none", look=measured.copy)
        objective.check_empty_classes(names)
        objective.check_values()
        if args.head_init == "class_mean":
            check_means(counts, names)
    split = data["eval_split"]
    evaluated = "" if split is None else " (held out)" if split == "train" else f" (split {split})"
    say(
        f"{data['name']}: {data['num_train_images']:,} training {unit}s of {len(counts)} classes, {max(counts):,} to "
        f"{min(counts):,} each; {data['num_eval_images']:,} for evaluation{evaluated}. "
        f"{_device_name(arguments, threads)}"
    )

    processor = load_own_processor(arguments.model, splits["train"])
    distils, publishing = arguments.distils, arguments.publishing
    teacher_processor = load_teacher_processor(arguments, processor, splits["train"]) if distils else processor
    # Before any image is decoded, to fail early if the teacher does not fit.
    match = match_teacher(arguments, data["class_names"]) if distils else Match()
    if publishing.push_to_hub and publishing.push_teacher and not match.why_trained:
        raise InputError(
            "--push_teacher: no teacher is trained in this run, and one that was given is where it comes from. Leave "
            "the option out."
        )
    if not same_inputs(arguments, processor, teacher_processor):
        if arguments.training.student_init == "teacher":
            raise InputError(
                "--student_init teacher: the teacher takes other inputs than the student. Use --student_init model, "
                "or give both the same processor and size."
            )
        say(how_they_differ(arguments.model.task))
    images = {
        "train": prepare(arguments, splits["train"], processor, for_training=True, teacher=teacher_processor),
        "eval": prepare(arguments, splits["eval"], processor),
    }
    inputs = Inputs(splits, data, processor, images, threads, say)
    provide = functools.partial(_provide_teacher, arguments, inputs, teacher_processor, match)
    return _train(arguments, inputs, provide if distils else None)


def _train(
    options: RunArguments,
    inputs: Inputs,
    provide_teacher: Callable[[], tuple[FrozenTeacher, dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Train one model, teacher or student, in its run folder, unless it is finished; write all results there."""
    args, data, say, folder = options.training, inputs.data, inputs.say, Path(options.training.output_dir)
    if choose_workers(args, inputs.images["train"], inputs.threads) and not options.is_teacher:
        workers = args.dataloader_num_workers
        why = "" if inputs.images["train"].in_memory else ": they do not stay in memory"
        say(f"Examples are prepared by {workers} worker{'s' if workers > 1 else ''} a process{why}.")
    check_features(inputs.images["train"], args)
    identity = identity_of(options, data, with_teacher=False)
    if _claim(options, identity):
        say(f"Using the teacher in {folder}, trained on the same data with the same options.")
        return on_main_process(lambda: load_results(folder))
    # First, so that a failure to load costs neither an earlier run nor the training of the teacher.
    model = _load_model(options, data, inputs.processor, say)
    teacher, teacher_results = None, None
    is_to_come = provide_teacher is not None and options.model.given_teacher is None
    if is_to_come and args.student_init == "teacher":
        why_not = why_not_alike(model, _load_model(options.for_teacher(), data, inputs.processor))
        if why_not is not None:
            raise InputError(f"--student_init teacher: {why_not}. Use --student_init model, or a teacher like it.")
    settle_precision(options, model, inputs)
    _record(options, identity)
    if provide_teacher is not None:
        say.stage("Teacher")
        teacher, teacher_results = provide_teacher()
        _record(options, identity_of(options, data))  # with its teacher, now that there is one
        gc.collect()  # its trainer and callbacks form cycles, which keep its optimizer's memory
    if not options.is_teacher:
        say.stage("Student")
    section = _fit(options, inputs, model, teacher, teacher_results)
    is_trained_here = teacher_results is not None and "training" in teacher_results
    results = describe_run(
        args,
        data,
        section,
        teacher_results,
        teacher_training=options.for_teacher().training if is_trained_here else None,
        model_options=dataclasses.asdict(options.model),
        teacher_model_options=options.model_options_of_teacher if provide_teacher is not None else None,
        data_options=dataclasses.asdict(options.data),
        command=options.command_line,
        precision_rates=options.precision_rates,
    )
    if PartialState().is_main_process:
        try:
            _report(options, results)
        finally:  # results must not be lost because a figure or the card cannot be written
            save_json(results, folder / RESULTS_NAME)  # last: it says that the run is finished
    PartialState().wait_for_everyone()
    return results


def _report(options: RunArguments, results: dict[str, Any], only_missing: bool = False) -> None:
    """Draw the figures of a run, and write its card."""
    folder, publishing = Path(options.training.output_dir), options.publishing
    save_plots(results, folder / "figures", only_missing)
    card, license, dataset_id = folder / CARD_NAME, publishing.hub_license, publishing.hub_dataset_id
    if not only_missing or why_broken(card):
        write_text(card, str(build_card(results, options.repo_id, license, dataset_id)))
    elif license != UNKNOWN_LICENSE or dataset_id is not None:  # the run may have been finished without
        told = {"license": None if license == UNKNOWN_LICENSE else license, "dataset_id": dataset_id}
        told = {name: value for name, value in told.items() if value is not None}
        write_text(card, card_of(folder, results, repo_of(card, options.repo_id), told))


# ---- One model ----------------------------------------------------------------------------------------------------


def _load_model(
    options: RunArguments, data: dict[str, Any], processor: Processor, say: Announcer | None = None
) -> PreTrainedModel:
    """Load the model to train, with a head for the data's classes; a fresh model is made for this processor."""
    name, args = options.model.model_name_or_path, options.training
    torch.manual_seed(args.seed)  # fresh weights, and fresh heads of pretrained models
    kwargs = options.model.from_pretrained_kwargs()
    size = options.model.image_size or FRESH_IMAGE_SIZE
    with _without("modeling_utils", "LOAD REPORT"):  # a table; the message below replaces it
        model = load_classifier(name, data["class_names"], size, args.cosine_scale, processor=processor, **kwargs)
    if args.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise InputError(f"--activation_checkpointing: {name} ({type(model).__name__}) knows none. Leave it out.")
    if args.head_learning_rate is not None:
        the_head(model)  # raises if it cannot be identified
    if args.layer_decay is not None:
        layer_depths(model)  # likewise
    if args.head_init == "class_mean":
        class_vectors(model)
    check_head_bias(model, args)
    check_adapter(model, args)
    prefer_channels_last(model)
    if say is not None and model.new_parameters and fresh_task(name) is None:
        shown = ", ".join(model.new_parameters[:8]) + (", …" if len(model.new_parameters) > 8 else "")
        say(f"{name}: learned from scratch: {shown}; all else starts from its weights.")
    return model


@contextmanager
def _without(module: str, words: str) -> Iterator[None]:
    """Suppress log messages of a transformers module that contain these words."""

    def is_something_else(record: Any) -> bool:
        return words not in record.getMessage()

    logger = logging.get_logger(f"transformers.{module}")
    logger.addFilter(is_something_else)
    try:
        yield
    finally:
        logger.removeFilter(is_something_else)


def _fit(
    options: RunArguments,
    inputs: Inputs,
    model: PreTrainedModel,
    teacher: nn.Module | None,
    teacher_results: dict[str, Any] | None,
) -> dict[str, Any]:
    """Train (from the last checkpoint, if any), save and evaluate a model; return its section of the results."""
    args, data, images, say = options.training, inputs.data, inputs.images, inputs.say
    name, size = options.model.model_name_or_path, model.num_parameters()
    images["train"].data_seed = args.seed if args.data_seed is None else args.data_seed
    if args.distillation_prior == "auto" and isinstance(teacher, FrozenTeacher) and teacher.is_balanced:
        args.distillation_prior = "teacher"
    trainer = BKDTrainer(
        model=model,
        teacher_model=teacher,
        args=args,
        train_dataset=images["train"],
        eval_dataset=images["eval"],
        processing_class=inputs.processor,
        compute_metrics=long_tail_evaluation(data, options.data.post_hoc_tau),
    )
    show_progress(trainer, say)
    trainer.clock.in_logs = True
    trainer.class_figures.known = {"data": data, "teacher": teacher_results}
    length = f"steps: {args.max_steps:,}" if args.max_steps > 0 else f"epochs: {args.num_train_epochs:g}"
    about: dict[str, Any] = {}
    trained, why = trainer.num_trained_parameters, f"adapter {args.adapter}"
    if trained is not None:
        about["num_trained_parameters"] = trained
    elif args.freeze_backbone:
        trained, why = sum(p.numel() for p in model.parameters() if p.requires_grad), "freeze_backbone"
    some = f" (--{why} trains {trained:,}, {trained / size:.2%} of that)" if trained else ""
    say(f"{name}: {size:,} parameters{some}, {length}")
    if teacher is not None:
        about["started_from_teacher"] = trainer.student_started_from_teacher
        about["targets"] = tell_of_targets(trainer, data["class_names"], say, options.model.force_distillation)
    settled = trainer.bkd_objective.settled
    checkpoint = on_main_process(lambda: last_complete_checkpoint(args.output_dir))
    if checkpoint is not None:
        say(f"Continuing from {Path(checkpoint).name}.{is_cut_otherwise(checkpoint, args)}")
    # Steps given as a fraction are absolute numbers in a checkpoint; other differences have been rejected before.
    with _without("trainer_utils", "do not match the ones in the `trainer_state.json`"):
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.head_bias_shift is not None:
        about["head_bias_shift"] = trainer.head_bias_shift.tolist()
        say(describe_bias_shift(about["head_bias_shift"], data["class_names"]))
    args.per_device_train_batch_size = options_used(trainer).per_device_train_batch_size
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", outcome.metrics)
    metrics, measured = trainer.measure(images["eval"])
    end_workers(trainer.callback_handler.eval_dataloader)
    trainer.save_metrics("eval", metrics)
    if options.model.task == "image":
        about["augmentation"] = images["train"].augmentation
    return {
        **describe_model(name, model, measured),
        **about,
        "settled_options": settled,
        "training": Clock.summary(trainer.state, trainer.examples_in_pass),
        "history": history_of(trainer.state),
    }


def _provide_teacher(
    arguments: RunArguments, inputs: Inputs, processor: Processor, match: Match
) -> tuple[FrozenTeacher, dict[str, Any]]:
    """Train the teacher as its own run, or use the given one; return it with its results."""
    images, options, given = inputs.images, arguments.for_teacher(), arguments.model.given_teacher
    if not same_inputs(arguments, inputs.processor, processor):
        images = {"eval": prepare(arguments, inputs.splits["eval"], processor)}
        if match.why_trained:
            images["train"] = prepare(arguments, inputs.splits["train"], processor, for_training=True)
    inputs = dataclasses.replace(inputs, processor=processor, images=images)
    if not match.why_trained:
        return use_given_teacher(arguments, inputs, match)
    if given is not None:
        inputs.say(f"The teacher {given} is fine-tuned on the data first: {match.why_trained}.")
    results = _train(options, inputs)
    send_folder(Path(options.training.output_dir), Path(arguments.training.output_dir))
    teacher = load_teacher(options.training.output_dir, **options.model.from_pretrained_kwargs())
    prefer_channels_last(teacher)
    teacher.is_balanced = is_balanced_by(results["options"]["training"])
    return teacher, {**results["student"], "method": results["method"]}


# ---- What is said, checked and published --------------------------------------------------------------------------


def _claim(options: RunArguments, identity: dict[str, str | None] | None = None) -> bool:
    return on_main_process(lambda: claim_output_dir(options, identity))


def _agree(options: RunArguments) -> None:
    """Make all processes do the same run, in the precision that the main process found in its folder."""
    share_precision(options)
    check_same(
        what_is_told(options),
        lambda first, other: (
            "The processes of this run are told different things: "
            f"{differences(first, other, where=('for the first', 'for another'))}."
        ),
    )


def _record(options: RunArguments, identity: dict[str, str | None]) -> None:
    PartialState().wait_for_everyone()  # all have inspected the folder
    if PartialState().is_main_process:
        record_run(options, identity)
    options.overwrite = False  # that is done


def _device_name(options: RunArguments, threads: int) -> str:
    """E.g. "2 processes, 1 CPU thread each, fp32."."""
    args = options.training
    precision = "fp32 or bf16" if options.measures_precision else precision_of(args)
    device = f"{threads} CPU thread{'s' if threads > 1 else ''}" if args.device.type == "cpu" else str(args.device)
    processes = f"{args.world_size} process{'es' if args.world_size > 1 else ''}, {device}"
    return f"{processes}{' each' if args.world_size > 1 else ''}, {precision}."


def _publish(arguments: RunArguments, say: Announcer) -> None:
    """Push the finished student in the main process; the others need not wait."""
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
