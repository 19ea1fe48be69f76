"""`BKDTrainer`: a `transformers.Trainer` that distils from a frozen teacher with class-balanced weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import DynamoBackend, send_to_device
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, has_length, seed_worker
from transformers.training_args import ParallelMode
from transformers.utils import logging

from .callbacks import EpochSetter, EvaluationMeter, FiniteGuard, LossMeter, TeacherLogitsError, TrainingDivergedError
from .config import BKDConfig
from .counting import count_training_examples, training_labels
from .errors import InputError
from .images import ImageDataset, collate_images
from .losses import IGNORE_INDEX, cross_entropy_loss, example_weights
from .metrics import LongTailAccumulator, LongTailEvaluation, check_class_counts
from .models import freeze_backbone, load_weights_strictly, start_from_teacher, the_head, why_not_alike
from .objective import Objective, Progress, corrects
from .publishing_trainer import PublishingTrainer
from .run_folder import check_checkpoint
from .sampling import GlobalBatchSampler, SampledExamples, innermost
from .schedules import StepDecay
from .targets import NUM_IMAGES, answers_about_sample, look, sample_of
from .teacher import (
    TEACHER_PREFIX,
    FrozenTeacher,
    TeacherAsClassifier,
    check_numbers_of_classes,
    gives_teacher_inputs,
    load_teacher,
    num_labels,
)
from .teacher_logits import (
    DEFAULT_VIEWS,
    TEACHER_LOGITS,
    LogitsFolder,
    WithTeacherLogits,
    describe_teacher,
    open_logits_folder,
    precompute_logits,
)

logger = logging.get_logger(__name__)

__all__ = ["BKDTrainer", "TeacherLogitsError", "TrainingDivergedError"]


class BKDTrainer(PublishingTrainer):
    """Trains a student with Balanced Knowledge Distillation (Zhang et al., 2021, arXiv 2104.10510).

        L = CE(z_s, y) + α · T² · KL( softmax(z_t / T + log w) ‖ softmax(z_s / T) )     mean over the global batch

    or by another method of [`BKDConfig`]: λ_c · classification loss + λ_d · distillation loss (`bkd_hf.objective`).
    In every other respect a [`~transformers.Trainer`]. What it does differently, and why:

    - **One mean.** The loss is the mean over all examples of an optimizer step, however these are cut into
      accumulation steps and processes, the short last step of an epoch included.
    - **Resumption** restores every weight (by `from_pretrained`, strictly), whatever names a checkpoint uses.
    - **Publishing**, by `push_to_hub()`, is of what others need, and once: checkpoints stay here.
    - **Evaluation** counts each example once under several processes; its loss is the plain cross-entropy, without
      the teacher. Without a `compute_metrics` of your own, [`long_tail_metrics`] are reported.

    The trainer does not look into the inputs: those whose names start with `teacher_` go to the teacher (without the
    prefix) and all others to the student; if there are none, both models get the same.

    Args:
        model: The student, a classifier with `.logits` in its output.
        teacher_model: A module, a folder or a Hub id. It is frozen, kept in evaluation mode, and never saved.
            `None` trains with the method's classification loss alone, on the very same path.
        args: Options.
        data_collator: As for `Trainer`; by default `collate_images` for an [`ImageDataset`], or parts of one.
        train_dataset: As for `Trainer`; a map-style data set gives the guarantees above.
        eval_dataset: As for `Trainer`.
        processing_class: Saved with the model.
        class_counts: C numbers of training images; counted in `train_dataset` if not given.
        model_init: As for `Trainer`.
        compute_metrics: As for `Trainer`.
        callbacks: As for `Trainer`.
        optimizers: As for `Trainer`.
        preprocess_logits_for_metrics: As for `Trainer`.
        classification_loss: Used instead of the method's: called with logits (B×C) and labels (B), it returns B
            values. Class weights are applied to them.
        distillation_loss: Used instead of the method's: called with the logits of student and teacher (B×C), labels
            (B) and class weights (C), it returns B values.

    Raises:
        ValueError: If the numbers of classes of student, teacher and class counts differ, labels are out of range,
            a class that needs images has none, there is a teacher but no distillation, or the student of `ldam` has no
            cosine head.
        TeacherLogitsError: While training, if the teacher's logits are not finite.
        TrainingDivergedError: While training, if the student's loss is not finite: at the next log, evaluation or
            checkpoint, and before the latter if its weights are not.
    """

    # The loss is a mean over the whole optimizer step: Trainer must not divide it by the accumulation steps again.
    loss_is_scaled_for_ga = True
    _meter: LossMeter

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        teacher_model: nn.Module | str | None = None,
        args: BKDConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | datasets.Dataset | None = None,
        eval_dataset: Dataset | datasets.Dataset | dict[str, Any] | None = None,
        processing_class: Any | None = None,
        class_counts: Sequence[int] | np.ndarray | torch.Tensor | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        classification_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        distillation_loss: Callable[..., torch.Tensor] | None = None,
    ):
        args = BKDConfig() if args is None else args
        if not isinstance(args, BKDConfig):
            raise ValueError(f"args must be a BKDConfig, got {type(args).__name__}.")
        if teacher_model is not None and teacher_model is model:
            raise ValueError("teacher_model is the student itself: freezing it would stop all training. Pass a copy.")

        if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            # Trainer would cut each batch among the GPUs by DataParallel, and the number of its examples with it.
            logger.warning_once(
                f"The first of {args.n_gpu} GPUs is used: start with `accelerate launch` to use all, or choose one by "
                "CUDA_VISIBLE_DEVICES."
            )
            args._n_gpu = 1
        any_dataset = eval_dataset if train_dataset is None else train_dataset
        if data_collator is None and all(isinstance(part, ImageDataset) for part in innermost(any_dataset)):
            data_collator = collate_images
        # Trainer collects all logits for a compute_metrics; the long-tail metrics are added up batch by batch.
        adds_up = isinstance(compute_metrics, LongTailEvaluation) and preprocess_logits_for_metrics is None
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=None if adds_up else compute_metrics,
            callbacks=[EpochSetter(lambda: self._meter.restore(self), self._begin_epoch), *(callbacks or [])],
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        # Has Trainer count the examples of each optimizer step, over its micro-batches and processes.
        self.model_accepts_loss_kwargs = True
        # The loss is computed here: a model need not take labels itself.
        self.label_names = self.label_names or ["labels"]  # type: ignore[has-type]
        if args.freeze_backbone and train_dataset is not None and model_init is None:
            freeze_backbone(self.model)

        self.class_counts: np.ndarray | None = None
        if class_counts is not None:
            self.class_counts = check_class_counts(class_counts).astype(np.int64)
        elif train_dataset is not None:
            self.class_counts = count_training_examples(train_dataset, num_labels(self.model))
        self.long_tail = compute_metrics if isinstance(compute_metrics, LongTailEvaluation) else None
        if self.long_tail is None and self.class_counts is not None:
            self.long_tail = LongTailEvaluation(self.class_counts)
        self._evaluation, self._is_measuring = EvaluationMeter(self.accelerator, 0.0, None), False

        self.teacher_model: FrozenTeacher | None = None
        if teacher_model is not None:
            teacher = load_teacher(teacher_model)
            if args.teacher_cache != "off":
                self._about_teacher = describe_teacher(teacher)  # before it may be spread over devices
            self.teacher_model = self._prepare_teacher(teacher)
        self.teacher_cache: LogitsFolder | None = None  # opened when training begins
        self._with_teacher_logits: WithTeacherLogits | None = None
        check_numbers_of_classes(self.model, self.teacher_model, self.class_counts)

        self.objective = Objective(
            args,
            self.class_counts,
            args.device,
            self.teacher_model is not None,
            None if self.teacher_model is None else self.teacher_model.known_classes,
            classification_loss,
            distillation_loss,
            self._measured_power,
        )
        if train_dataset is not None or self.teacher_model is not None:
            self.objective.check(getattr(self.model, "config", None))
        self._looks: dict[tuple, dict[str, Any]] = {}  # at the targets, by what they depend on
        self._guard, self._meter = FiniteGuard(self.accelerator, args), LossMeter(self.accelerator)
        self._first_batch_checked = False
        self._mean_weight_of_step: torch.Tensor | None = None
        self._has_new_weights = False  # that results.json does not tell of
        self._train_batch_sampler: GlobalBatchSampler | None = None
        self._loader_generator = torch.Generator()
        self._update_steps_per_epoch: int | None = None
        self.student_started_from_teacher = False
        self._initialise_student(self.model)

    # ---- The loss -------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """While training the objective (see [`Objective`]); the cross-entropy in evaluation.

        Args:
            model: The student, as wrapped for training.
            inputs: A batch with `labels`; examples labelled −100 count for nothing.
            return_outputs: Whether to return the student's outputs too.
            num_items_in_batch: Labelled examples in the optimizer step, over all its micro-batches and processes.

        Returns:
            The batch's share of the loss, scaled so that gradients summed over micro-batches and averaged over
            processes are those of the mean over the step.
        """
        student_inputs, teacher_inputs, labels = self._split_inputs(inputs)
        outputs = model(**student_inputs)
        counted = labels != IGNORE_INDEX
        if model.training:
            teacher_logits = self._teacher_logits(teacher_inputs, inputs.get(TEACHER_LOGITS))
            losses = self.objective(outputs.logits, teacher_logits, labels, self._progress(num_items_in_batch))
            self._meter.add(losses, counted)
        else:
            smoothing = self.args.label_smoothing_factor
            losses = {"loss": cross_entropy_loss(outputs.logits, labels, smoothing, reduction="none")}
        loss = self._share_of_mean(losses["loss"], counted, num_items_in_batch)
        if model.training:
            self._guard.watch("student", loss.detach().isfinite(), self.state.global_step + 1)
        return (loss, outputs) if return_outputs else loss

    def _split_inputs(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], torch.Tensor]:
        own = {k: v for k, v in inputs.items() if not k.startswith(TEACHER_PREFIX)}
        labels = own.pop("labels", None)
        if labels is None:
            raise ValueError(f'The batch has no "labels", only {", ".join(inputs)}.')
        of_teacher = {
            k.removeprefix(TEACHER_PREFIX): v
            for k, v in inputs.items()
            if k.startswith(TEACHER_PREFIX) and k != TEACHER_LOGITS
        }
        return own, of_teacher or own, labels

    def _share_of_mean(
        self, losses: torch.Tensor, counted: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        losses = losses * counted
        if num_items_in_batch is None:
            return losses.sum() / counted.sum()
        # Processes average their gradients; the count is over all of them (unless that was switched off).
        num_averaged = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return losses.sum() / num_items_in_batch * num_averaged

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Count the labelled examples of an optimizer step, as `Trainer`, and take the mean of their class weights."""
        num_items = super()._get_num_items_in_batch(batch_samples, device)
        weights = self.classification_weights
        if weights is not None and batch_samples and num_items is not None:
            total = torch.stack([example_weights(b["labels"].to(device), weights).sum() for b in batch_samples]).sum()
            if self.args.average_tokens_across_devices:
                total = self.accelerator.reduce(total, reduction="sum")
            self._mean_weight_of_step = total / num_items
        return num_items

    def _progress(self, num_items_in_batch: torch.Tensor | int | None = None) -> Progress:
        """Progress by optimizer steps; `state.epoch` counts micro-batches and depends on how steps are cut."""
        args, per_epoch = self.args, self._update_steps_per_epoch
        epoch = self.state.global_step / per_epoch if per_epoch else self.state.epoch or 0.0
        num_epochs = args.max_steps / per_epoch if args.max_steps > 0 and per_epoch else args.num_train_epochs
        return Progress(epoch, num_epochs, None if num_items_in_batch is None else self._mean_weight_of_step)

    @property
    def class_weights(self) -> torch.Tensor | None:
        """The C weights w^p in the distillation loss at this point of training; `None` where it takes none."""
        return self.objective.distillation_weights(self._progress())

    @property
    def classification_weights(self) -> torch.Tensor | None:
        """The C weights in the classification loss at this point of training; `None` without `class_weighting`."""
        return self.objective.classification_weights(self._progress())

    # ---- The teacher ----------------------------------------------------------------------------------------------

    def _prepare_teacher(self, teacher: FrozenTeacher) -> FrozenTeacher:
        """Place the teacher, under the student's autocast, but outside everything that is trained or saved."""
        num_known = len(self.accelerator._models)
        prepared = self.accelerator.prepare_model(teacher, device_placement=True, evaluation_mode=True)
        # Or Trainer.evaluate() before train() would take the student for prepared.
        del self.accelerator._models[num_known:]
        return prepared

    def _initialise_student(self, student: nn.Module) -> None:
        """Have the student start from the teacher's weights, if the options say so.

        Where labels or targets leave the class frequencies out, so do the logits that it starts with: those of the
        teacher after post-hoc logit adjustment.
        """
        args, teacher = self.args, self.teacher_model
        if teacher is None or args.student_init == "model" or self.train_dataset is None:
            return
        why_not = why_not_alike(student, teacher.model)
        if why_not is None and teacher.columns is not None:
            why_not = "the teacher's outputs are in another order"
        if why_not is None and gives_teacher_inputs(self.train_dataset):
            why_not = "the teacher takes other inputs than the student"
        if why_not is not None:
            if args.student_init == "teacher":
                raise InputError(
                    f"--student_init teacher: {why_not}. Use --student_init model, or a teacher like the student."
                )
            return
        if args.student_init == "auto" and self.objective.power >= 1:
            return  # the teacher has learned all there is: its answers teach more than its weights
        start_from_teacher(student, teacher.model, self.class_counts if corrects(vars(args)) else None)
        self.student_started_from_teacher = True

    def _teacher_logits(self, inputs: dict[str, Any], computed: torch.Tensor | None) -> torch.Tensor | None:
        """B×C logits of the teacher: those of the batch, if it has some; `None` if they are not looked at."""
        teacher = self.teacher_model
        if teacher is None or not self.objective.mixture(self._progress().epoch)[1]:
            return None
        logits = teacher(**inputs) if computed is None else computed
        known = logits if teacher.known_classes is None else logits[:, teacher.known_classes]
        self._guard.watch("teacher", known.isfinite(), self.state.global_step + 1)
        if not self._first_batch_checked:
            self._first_batch_checked = True
            self._guard.stop_if_not_finite()
        return logits

    def _ask_teacher(self, batch: dict[str, Any]) -> torch.Tensor:
        assert self.teacher_model is not None
        return self.teacher_model(**self._split_inputs(send_to_device(batch, self.args.device))[1])

    @property
    def num_views(self) -> int | None:
        """Number of views of a training image, after which they come again; `None` if each epoch has its own.

        It does not depend on whether there is a teacher: methods that are compared see the same views.
        """
        if self.args.teacher_cache_views is not None:
            return self.args.teacher_cache_views
        if self.args.teacher_cache == "off" or not self._numbers_examples:
            return None
        parts = innermost(self.train_dataset)
        return DEFAULT_VIEWS if any(getattr(part, "augmentation", "none") != "none" for part in parts) else 1

    def _measured_power(self) -> float:
        statistics = self.look_at_targets()
        if statistics is None:
            raise InputError(
                "--class_balance_power measured looks at training images first, which needs a training set with a "
                "length and random access, and a distillation loss that is not your own. Use --class_balance_power "
                "auto."
            )
        return statistics["power"]

    @torch.no_grad()
    def look_at_targets(self, num_images: int = NUM_IMAGES) -> dict[str, Any] | None:
        """Look at the distillation targets of a sample of the training images (see `bkd_hf.targets`).

        With a deferred start the targets are those of its end. All processes have to call it; each looks at the same
        images.

        Args:
            num_images: How many images to look at, drawn by the seed.

        Returns:
            The statistics of [`target_statistics`], and the `power` of the class weights where there are any; `None`
            without a teacher, with a distillation loss of your own, or without random access to the training images.

        Raises:
            InputError: If none of these images is of a class that the teacher knows.
            TeacherLogitsError: If the teacher's logits are not finite.
        """
        args, dataset, objective = self.args, self.train_dataset, self.objective
        if self.teacher_model is None or not objective.has_known_targets or self.class_counts is None:
            return None
        if not has_length(dataset) or not hasattr(dataset, "__getitem__"):
            return None
        seen = num_images, args.distillation_loss, args.temperature, args.class_balance_beta, args.class_balance_power
        if seen not in self._looks:
            self.set_epoch(0)
            dataset, collator = self._with_used_columns(dataset)
            sample = sample_of(dataset, num_images, args.seed)
            loader = DataLoader(sample, args.eval_batch_size, collate_fn=collator)
            logits, labels = answers_about_sample(self.teacher_model, loader, self._split_inputs, args.device)
            assert self.long_tail is not None  # there are class counts
            thresholds = self.long_tail.many_shot_threshold, self.long_tail.few_shot_threshold
            self._looks[seen] = look(objective, logits, labels, self.class_counts, *thresholds)
        return self._looks[seen]

    # ---- Logging --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `ce_loss` and `kd_loss` to a training log: means over all examples, in all processes, since the last.

        `kd_loss` includes T² but not α.

        Raises:
            TeacherLogitsError: If the teacher's logits were not finite since the last log.
            TrainingDivergedError: If the loss was not.
        """
        if self.is_in_train:
            self._guard.stop_if_not_finite()
        if "loss" in logs:
            logs.update(self._meter.pop())
        super().log(logs, start_time)

    # ---- Training data --------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return the training data, cut into global batches (see [`GlobalBatchSampler`]).

        Iterable data sets, other sampling strategies than random and sequential, and accelerate's `split_batches` and
        `dispatch_batches` take `Trainer`'s own path, without the guarantee for the last step of an epoch.
        """
        dataset, args = self.train_dataset, self.args
        if not self._numbers_examples:
            self._open_teacher_cache()
            if args.sampler == "class_balanced":
                raise ValueError(
                    "--sampler class_balanced needs a training set with a length and random access, "
                    "--train_sampling_strategy random, and neither split_batches nor dispatch_batches of accelerate."
                )
            loader = super().get_train_dataloader()
            if has_length(loader):
                self._update_steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
            return loader

        dataset, collator = self._with_used_columns(dataset)
        self.teacher_cache = self._open_teacher_cache()
        if self.teacher_cache is not None:
            self._precompute_logits = functools.partial(
                precompute_logits,
                self._ask_teacher,
                dataset,
                self.teacher_cache,
                batch_size=self._train_batch_size,
                collate_fn=collator,
                num_workers=args.dataloader_num_workers,
                multiprocessing_context=args.dataloader_multiprocessing_context,
            )
            alone = dataset.for_student_alone() if isinstance(dataset, ImageDataset) else dataset
            dataset = self._with_teacher_logits = WithTeacherLogits(alone, self.teacher_cache)
        sampler = GlobalBatchSampler(
            len(dataset),
            batch_size=self._train_batch_size,
            accumulation_steps=args.gradient_accumulation_steps,
            num_processes=self.accelerator.num_processes,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy == "random",
            drop_last=args.dataloader_drop_last,
            # A step of another size would be compiled anew, for any size, and all later ones would be slower.
            pad_last=self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
            class_balanced_labels=training_labels(self.train_dataset) if args.sampler == "class_balanced" else None,
        )
        loader = DataLoader(
            SampledExamples(dataset),
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            # Its own, seeded by the epoch: a loader takes a number from it whenever it begins, or starts workers; from
            # the common generator that would shift all dropout after it, and not alike after a resumption.
            generator=self._loader_generator,
            worker_init_fn=functools.partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
        )
        self._train_batch_sampler = sampler
        prepared = self.accelerator.prepare(loader)
        self._update_steps_per_epoch = math.ceil(len(prepared) / args.gradient_accumulation_steps)
        return prepared

    def _with_used_columns(self, dataset: Any) -> tuple[Any, Callable]:
        """A training set and its collator, one of which leaves out what no model takes."""
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description="training"), self.data_collator
        return dataset, self._get_collator_with_removed_columns(self.data_collator, description="training")

    def _open_teacher_cache(self) -> LogitsFolder | None:
        return None if self.teacher_model is None else open_logits_folder(self)

    @property
    def _numbers_examples(self) -> bool:
        """Whether batches are cut by a [`GlobalBatchSampler`], which knows the numbers of their examples."""
        dataset, config = self.train_dataset, self.args.accelerator_config
        return not (
            dataset is None
            or isinstance(dataset, torch.utils.data.IterableDataset)
            or not has_length(dataset)
            or self.args.train_sampling_strategy not in ("random", "sequential")
            or config.split_batches
            or config.dispatch_batches
        )

    def set_epoch(self, epoch: int) -> None:
        """Tell sampler and data set which epoch begins: accelerate reaches them in some set-ups only.

        The order is that of the epoch, the augmentation that of its view.
        """
        self._loader_generator.manual_seed(self.args.seed + epoch)
        view = self._view(epoch)
        if self._with_teacher_logits is not None:
            self._with_teacher_logits.set_epoch(view)
        if self._train_batch_sampler is not None:
            self._train_batch_sampler.set_epoch(epoch)
        for part in innermost(self.train_dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(view)

    def _view(self, epoch: int) -> int:
        return epoch % self.num_views if self.num_views else epoch

    def _begin_epoch(self, epoch: int) -> None:
        self.set_epoch(epoch)
        if self.teacher_cache is not None:
            self._precompute_logits(self._view(epoch))

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:  # type: ignore[has-type]
            super()._set_signature_columns_if_needed()
            columns = ["labels", TEACHER_LOGITS, *(self._signature_columns or [])]  # type: ignore[has-type]
            if isinstance(self.model, TeacherAsClassifier):
                columns += self.model.teacher.input_names
            if self.teacher_model is not None:
                columns += [f"{TEACHER_PREFIX}{name}" for name in self.teacher_model.input_names]
            self._signature_columns = columns

    def _remove_unused_columns(self, dataset: datasets.Dataset, description: str | None = None) -> datasets.Dataset:
        # What `with_transform` makes of the columns is not known; removing them first would take away the images.
        return dataset if dataset.format["type"] == "custom" else super()._remove_unused_columns(dataset, description)

    # ---- Optimisation ---------------------------------------------------------------------------------------------

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: BKDConfig, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        """Return the optimizer class and its arguments; `momentum` goes to SGD."""
        optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if optimizer_cls is torch.optim.SGD and args.momentum:
            kwargs["momentum"] = args.momentum
        return optimizer_cls, kwargs

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer as `Trainer`; the head gets its own learning rate, if one is given."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.head_learning_rate is not None:
            head = {id(parameter) for module in the_head(self.model).values() for parameter in module.parameters()}
            groups = []
            for group in optimizer.param_groups:
                for in_head, rate in ((False, group["lr"]), (True, self.args.head_learning_rate)):
                    parameters = [p for p in group["params"] if (id(p) in head) == in_head]
                    groups += [{**group, "params": parameters, "lr": rate}] if parameters else []
            optimizer.param_groups = groups
        return optimizer

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a student by `model_init`, at the start and again when training begins; its backbone may be frozen."""
        model = super().call_model_init(trial)
        if hasattr(self, "student_started_from_teacher"):  # not while the trainer itself is made
            self._initialise_student(model)
        if self.args.freeze_backbone:
            freeze_backbone(model)
        return model

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Norm of the gradients; where nothing is clipped it is for the log alone, and taken at logged steps only."""
        if grad_norm is None and not self._logs_after(self.state.global_step + 1):
            return None
        return super()._get_grad_norm(model, grad_norm)

    def _logs_after(self, step: int) -> bool:
        args, per_epoch = self.args, self._update_steps_per_epoch
        if args.logging_strategy == IntervalStrategy.STEPS:
            return step % self.state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        if args.logging_strategy == IntervalStrategy.EPOCH:
            return not per_epoch or step % per_epoch == 0 or step >= self.state.max_steps
        return False

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count none: the estimate of `Trainer` is for tokens, and walks through all parameters at every step."""
        return 0

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that decay: all with `decay_all_parameters`, else as in `Trainer`."""
        if self.args.decay_all_parameters:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the step-decay schedule if it is chosen, else `Trainer`'s."""
        if self.args.uses_step_decay and self.lr_scheduler is None:  # type: ignore[has-type]
            steps_per_epoch = self._update_steps_per_epoch or math.ceil(
                num_training_steps / self._progress().num_epochs
            )
            schedule = StepDecay(
                steps_per_epoch=steps_per_epoch,
                warmup_epochs=self.args.lr_warmup_epochs,
                step_epochs=self.args.lr_step_epochs,
                step_factors=self.args.lr_step_factors,
            )
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, schedule)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- Evaluation -----------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as `Trainer`, with a loss and metrics that are added up by each process, and then merged."""
        if self.is_in_train:
            self._guard.stop_if_not_finite()
        accumulator = None
        if self.long_tail is not None and self._is_measuring:
            prediction_loss_only, accumulator = True, self.long_tail.accumulator(self.long_tail.post_hoc_tau)
        elif self.long_tail is not None and not (self.compute_metrics or self.preprocess_logits_for_metrics):
            accumulator = self.long_tail.accumulator()
        self._evaluation = EvaluationMeter(self.accelerator, self.args.label_smoothing_factor, accumulator)
        # Loaders take numbers from the common generator, how many depends on their workers: the training must not
        # notice.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        found = self._evaluation.finish()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Predict logits; hidden states and other outputs, which some models add, are not gathered."""
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        logits = logits[0] if isinstance(logits, tuple) else logits
        if logits is not None and labels is not None:
            self._evaluation.add(logits, labels)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def measure(self, dataset: Dataset, metric_key_prefix: str = "eval") -> tuple[dict, LongTailAccumulator]:
        """Measure the model as `predict` does, but keep no logits; all processes have to call it.

        Args:
            dataset: As for `predict`.
            metric_key_prefix: As for `predict`.

        Returns:
            The metrics of `predict`, and the accumulator that has seen all examples, with post-hoc adjustment where
            the trainer's [`LongTailEvaluation`] has a τ.

        Raises:
            ValueError: Without class counts, or if the examples have no labels.
        """
        if self.long_tail is None:
            self.objective.known_class_counts()  # raises
        self._is_measuring = True
        try:
            metrics = self.predict(dataset, metric_key_prefix=metric_key_prefix).metrics
        finally:
            self._is_measuring = False
        assert metrics is not None
        assert self._evaluation.accumulator is not None
        return metrics, self._evaluation.accumulator

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does, also after an `evaluate()`."""
        if self.model_wrapped is self.model:
            # evaluate() marks the bare model as prepared; accelerate would then not wrap it for several processes.
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        self._meter = LossMeter(self.accelerator)
        self._guard.reset()
        self._has_new_weights = True
        _ = self.class_weights  # their power may have to be measured first
        outcome = super().train(*args, **kwargs)
        self._guard.check_weights(self.model, self.state.global_step)
        return outcome

    # ---- Checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._guard.check_weights(self.model, self.state.global_step)
        self._meter.keep(self)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_pretrained_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_pretrained_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_pretrained_weights(self, checkpoint: str) -> bool:
        """Load a checkpoint as users will; False if the model is of a kind that only `Trainer` knows to load.

        Trainer loads with `strict=False`, which silently skips all weights that `save_pretrained` renamed (ViT's).
        """
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if (
            is_sharded
            or type(self.model).__module__.startswith("peft.")
            or not isinstance(self.model, PreTrainedModel)
        ):
            return False
        check_checkpoint(checkpoint)
        load_weights_strictly(self.model, checkpoint)
        return True
