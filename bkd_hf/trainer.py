"""`BKDTrainer`: a `transformers.Trainer` that distils from a frozen teacher with class-balanced weights.

Its competitors run through it too (`bkd_hf.methods`), so that comparisons are of methods and of nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import DynamoBackend, broadcast_object_list, send_to_device
from huggingface_hub import HfApi
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import (
    DataCollatorWithPadding,
    DefaultDataCollator,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, has_length, seed_worker
from transformers.training_args import ParallelMode
from transformers.utils import logging

from . import methods
from .config import BKDConfig
from .data import class_counts as count_classes
from .data import labels_of
from .errors import InputError
from .losses import IGNORE_INDEX, cross_entropy_loss, example_weights
from .methods import MEAN_OVER_EXAMPLES, NEED_CLASS_COUNTS, corrects, mixture
from .metrics import LongTailEvaluation, NotFiniteError, shot_thresholds
from .models import head_modules, start_from_teacher, why_not_alike
from .precision import precision_of
from .sampling import GlobalBatchSampler, SampledExamples, innermost
from .schedules import StepDecay
from .targets import NUM_IMAGES, strongest_power, target_statistics
from .teacher import (
    TEACHER_PREFIX,
    FrozenTeacher,
    TeacherAsClassifier,
    gives_teacher_inputs,
    load_teacher,
    num_labels,
)
from .teacher_logits import (
    DEFAULT_FOLDER,
    DEFAULT_VIEWS,
    TEACHER_LOGITS,
    LogitsFolder,
    TeacherLogitsError,
    WithTeacherLogits,
    describe_teacher,
    describe_views,
    precompute_logits,
)
from .transforms import ImageDataset, collate_images
from .weights import check_class_counts, class_balanced_weights, deferred_weights

logger = logging.get_logger(__name__)

_TEACHER, _STUDENT = 0, 1
_NO_STEP = torch.iinfo(torch.int64).max


class TrainingDivergedError(NotFiniteError):
    """The student's loss or weights are not finite; the message names the training step."""


class BKDTrainer(Trainer):
    """Trains a student with Balanced Knowledge Distillation (Zhang et al., 2021, arXiv 2104.10510).

        L = CE(z_s, y) + α · T² · KL( softmax(z_t / T + log w) ‖ softmax(z_s / T) )     mean over the global batch

    or by another method of [`BKDConfig`]: λ_c · classification loss + λ_d · distillation loss (`bkd_hf.methods`).
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

        has_counts = class_counts is not None or train_dataset is not None
        if isinstance(compute_metrics, LongTailEvaluation) or (
            compute_metrics is None and preprocess_logits_for_metrics is None and has_counts
        ):
            _check_that_metrics_see_all(args)
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
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            callbacks=[_SetEpoch(self), *(callbacks or [])],
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        # Has Trainer count the examples of each optimizer step, over its micro-batches and processes.
        self.model_accepts_loss_kwargs = True
        # The loss is computed here: a model need not take labels itself.
        self.label_names = self.label_names or ["labels"]  # type: ignore[has-type]

        # Student
        if args.freeze_backbone and train_dataset is not None and model_init is None:
            self._freeze_backbone(self.model)

        # Data
        self.class_counts: np.ndarray | None = None
        if class_counts is not None:
            self.class_counts = check_class_counts(class_counts).astype(np.int64)
        elif train_dataset is not None:
            self.class_counts = _count_training_examples(train_dataset, num_labels(self.model))
        if compute_metrics is None and preprocess_logits_for_metrics is None and self.class_counts is not None:
            self.compute_metrics = LongTailEvaluation(self.class_counts)

        # Teacher
        self.teacher_model: FrozenTeacher | None = None
        if teacher_model is not None:
            teacher = load_teacher(teacher_model)
            if args.teacher_cache != "off":
                self._about_teacher = describe_teacher(teacher)  # before it may be spread over devices
            self.teacher_model = self._prepare_teacher(teacher)
        self.teacher_cache: LogitsFolder | None = None  # opened when training begins
        self._with_teacher_logits: WithTeacherLogits | None = None
        self._check_numbers_of_classes()

        # Losses
        counts = None if self.class_counts is None else torch.as_tensor(self.class_counts).to(args.device)
        self._classification_loss = methods.classification_loss(
            args, counts, own=classification_loss, tau=lambda: self.logit_adjustment_tau
        )
        self._distillation_loss = methods.distillation_loss(args, own=distillation_loss)
        self._divides_by_weights = bool(classification_loss) or args.classification_loss not in MEAN_OVER_EXAMPLES
        self._has_own_distillation_loss = distillation_loss is not None
        self._balances_distillation = bool(distillation_loss) or args.distillation_loss == "bkd"
        self._check_method(own_loss=classification_loss is not None)
        self._class_weights: torch.Tensor | None = None
        self._looks: dict[tuple, dict[str, Any]] = {}  # at the targets, by what they depend on
        if args.class_weighting != "none" or (self.teacher_model is not None and self._balances_distillation):
            weights = class_balanced_weights(self._known_class_counts(), args.class_balance_beta)
            self._class_weights = weights.to(device=args.device, dtype=torch.float32)
        self._mean_weight_of_step: torch.Tensor | None = None
        self._loss_parts: dict[str, torch.Tensor] = {}
        self._has_new_weights = False  # that results.json does not tell of
        self._first_bad_steps = torch.full((2,), _NO_STEP, device=args.device)  # of teacher and student
        self._first_batch_checked = False
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
        """While training λ_c · classification loss + λ_d · distillation loss; the cross-entropy in evaluation.

        For BKD that is CE + α · BKD (see `bkd_hf.methods` for the other methods).

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

        if not model.training:
            loss = cross_entropy_loss(outputs.logits, labels, self.args.label_smoothing_factor, reduction="none")
        else:
            ce = self._classification_loss(outputs.logits, labels, self.classification_weights)
            loss = ce = ce / self._mean_weight(labels, num_items_in_batch)
            kd = None
            classification_weight, distillation_weight = mixture(self.args, self._epochs_trained())
            if self.teacher_model is not None and distillation_weight:
                teacher_logits = self._teacher_logits(self.teacher_model, teacher_inputs, inputs.get(TEACHER_LOGITS))
                kd = self._distil(outputs.logits, teacher_logits, self.teacher_model.known_classes, labels)
                loss = classification_weight * ce + distillation_weight * kd
            self._add_loss_parts(labels != IGNORE_INDEX, ce_loss=ce, kd_loss=kd)

        loss = self._share_of_mean(loss, labels != IGNORE_INDEX, num_items_in_batch)
        if model.training:
            self._watch(_STUDENT, loss.detach().isfinite(), self.state.global_step + 1)
        return (loss, outputs) if return_outputs else loss

    def _distil(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        known: torch.Tensor | None,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """B values of the distillation loss.

        Where the teacher does not know all classes, it is a loss between distributions over those that it knows, and
        examples of the others have none: nothing is taught about a class that the teacher has no idea of.
        """
        assert self._distillation_loss is not None  # or the teacher would have been refused
        weights = self.class_weights
        if known is not None:
            student_logits, teacher_logits = student_logits[:, known], teacher_logits[:, known]
            weights = None if weights is None else weights[known]
            labels = self._among(known, labels)
        self._watch(_TEACHER, teacher_logits.isfinite().all(), self.state.global_step + 1)
        if not self._first_batch_checked:
            self._first_batch_checked = True
            self._stop_if_not_finite()
        losses = self._distillation_loss(student_logits, teacher_logits, labels, weights)
        return losses if known is None else torch.where(labels == IGNORE_INDEX, 0.0, losses)

    @staticmethod
    def _among(classes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Number labels by their place among some classes; −100 for all others."""
        places = (labels[:, None] == classes).int()
        return torch.where(places.any(dim=1), places.argmax(dim=1), IGNORE_INDEX)

    @property
    def class_weights(self) -> torch.Tensor | None:
        """The C weights w^p in the distillation loss at this point of training: uniform before a deferred start.

        `None` where the distillation loss takes none.
        """
        if self.teacher_model is None or not self._balances_distillation:
            return None
        weights, power = self._weights_from(self.args.deferred_reweighting_start), self.class_balance_power
        return weights if power == 1 else weights.pow(power)

    @property
    def classification_weights(self) -> torch.Tensor | None:
        """The C weights in the classification loss at this point of training; `None` without `class_weighting`."""
        if self.args.class_weighting == "none":
            return None
        return self._weights_from(self.args.class_weighting_start if self.args.class_weighting == "drw" else None)

    def _weights_from(self, start: float | None) -> torch.Tensor:
        assert self._class_weights is not None
        return deferred_weights(
            self._class_weights, start=start, epoch=self._epochs_trained(), num_epochs=self._num_epochs()
        )

    def _epochs_trained(self) -> float:
        """Progress by optimizer steps; `state.epoch` counts micro-batches and depends on how steps are cut."""
        if self._update_steps_per_epoch:
            return self.state.global_step / self._update_steps_per_epoch
        return self.state.epoch or 0.0

    def _num_epochs(self) -> float:
        if self.args.max_steps > 0 and self._update_steps_per_epoch:
            return self.args.max_steps / self._update_steps_per_epoch
        return self.args.num_train_epochs

    def _split_inputs(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], torch.Tensor]:
        student_inputs = {key: value for key, value in inputs.items() if not key.startswith(TEACHER_PREFIX)}
        labels = student_inputs.pop("labels", None)
        if labels is None:
            raise ValueError(f'The batch has no "labels", only {", ".join(inputs)}.')
        teacher_inputs = {
            key.removeprefix(TEACHER_PREFIX): value
            for key, value in inputs.items()
            if key.startswith(TEACHER_PREFIX) and key != TEACHER_LOGITS
        }
        return student_inputs, teacher_inputs or student_inputs, labels

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

    def _mean_weight(
        self, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor | float:
        """Mean of the labels' weights over the optimizer step.

        A weighted mean divides by their sum over the whole step; divided by their mean, the values of all losses have
        one and the same plain mean.
        """
        weights = self.classification_weights
        if weights is None or not self._divides_by_weights:
            return 1.0
        if num_items_in_batch is None or self._mean_weight_of_step is None:  # the batch is all there is
            return example_weights(labels, weights).sum() / (labels != IGNORE_INDEX).sum()
        return self._mean_weight_of_step

    def _share_of_mean(
        self, losses: torch.Tensor, counted: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        losses = losses * counted
        if num_items_in_batch is None:
            return losses.sum() / counted.sum()
        # Processes average their gradients; the count is over all of them (unless that was switched off).
        num_averaged = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return losses.sum() / num_items_in_batch * num_averaged

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
        if args.student_init == "auto" and self.class_balance_power >= 1:
            return  # the teacher has learned all there is: its answers teach more than its weights
        shift = None
        if self.class_counts is not None and corrects(vars(args)):
            log_counts = torch.from_numpy(self.class_counts).clamp_min(1).double().log()
            shift = log_counts.mean() - log_counts
        start_from_teacher(student, teacher.model, shift)
        self.student_started_from_teacher = True

    def _teacher_logits(
        self, teacher: FrozenTeacher, inputs: dict[str, Any], computed: torch.Tensor | None
    ) -> torch.Tensor:
        """B×C logits of the teacher: those of the batch, if it has some."""
        return teacher(**inputs) if computed is None else computed

    def _open_teacher_cache(self) -> LogitsFolder | None:
        """Open the folder that the options ask for; `None` without one.

        Raises:
            InputError: If there can be none, and it was not left open by `"auto"`.
        """
        args = self.args
        if args.teacher_cache == "off" or self.teacher_model is None:
            return None
        folder = DEFAULT_FOLDER if args.teacher_cache == "auto" else args.teacher_cache
        try:
            self._check_that_batches_come_again()
            images = describe_views(self.train_dataset, args.sampler)
            about = {"teacher": self._about_teacher, "precision": args.mixed_precision, "images": images}
            shape = self.num_views or 1, len(self.train_dataset), len(self._known_class_counts())
            return LogitsFolder(folder, about, shape, args.teacher_cache_dtype)
        except InputError as error:
            if args.teacher_cache != "auto":
                raise
            again = ""
            if self.num_views is not None:
                again = (
                    " Views come again all the same, as for methods that are compared with this one "
                    "(--teacher_cache_views)."
                )
            logger.warning(f"The teacher's logits are not cached: {error}{again}")
            return None

    def _ask_teacher(self, batch: dict[str, Any]) -> torch.Tensor:
        assert self.teacher_model is not None
        return self.teacher_model(**self._split_inputs(send_to_device(batch, self.args.device))[1])

    def _check_that_batches_come_again(self) -> None:
        if not self._numbers_examples:
            raise InputError(
                "--teacher_cache needs a training set with a length and random access, --train_sampling_strategy "
                "random or sequential, and neither split_batches nor dispatch_batches of accelerate. Use "
                "--teacher_cache off."
            )
        known = default_data_collator, collate_images
        if self.data_collator not in known and not isinstance(
            self.data_collator, (DefaultDataCollator, DataCollatorWithPadding)
        ):
            raise InputError(
                "--teacher_cache does not go with a data_collator of your own, which may change the examples, or mix "
                "them, each time in another way. Use --teacher_cache off."
            )

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

    @property
    def class_balance_power(self) -> float:
        """p, the power of the class weights in the distillation loss."""
        power = self.args.class_balance_power
        if power == "auto":
            return 1 / self.args.temperature
        if power != "measured":
            return power
        statistics = self.look_at_targets()
        if statistics is None:
            raise InputError(
                "--class_balance_power measured looks at training images first, which needs a training set with a "
                "length and random access, and a distillation loss that is not your own. Use --class_balance_power "
                "auto."
            )
        return statistics["power"]

    @property
    def logit_adjustment_tau(self) -> float:
        """τ of the logit-adjusted classification loss.

        `"auto"` is 2 − p · T, at least 0: the targets take the class frequencies out p · T times, the labels the rest
        of twice. With p = 1/T both do so once; with the paper's p = 1, at T = 2, the labels not at all, as there.
        """
        tau = self.args.logit_adjustment_tau
        if tau != "auto":
            return tau
        if self.teacher_model is None:
            return 1.0
        return max(0.0, 2.0 - self.class_balance_power * self.args.temperature)

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
        args, counts = self.args, self.class_counts
        targets_of = methods.DISTILLATION_TARGETS.get(args.distillation_loss or "none")
        if self.teacher_model is None or targets_of is None or self._has_own_distillation_loss or counts is None:
            return None
        if not has_length(self.train_dataset) or not hasattr(self.train_dataset, "__getitem__"):
            return None
        seen = num_images, args.temperature, args.class_balance_beta, args.class_balance_power
        if seen not in self._looks:
            logits, labels = self._teacher_logits_of_sample(num_images)
            weights = self._class_weights if self._balances_distillation else None
            found = {}
            if weights is not None:
                # One power for all processes, whose devices may round otherwise.
                is_measured = args.class_balance_power == "measured"
                power = strongest_power(logits, labels, weights, args.temperature) if is_measured else None
                found["power"] = broadcast_object_list([power])[0] if is_measured else self.class_balance_power
                weights = weights.pow(found["power"])
            thresholds = shot_thresholds(self.compute_metrics)
            statistics = target_statistics(targets_of(args, logits, weights), logits, labels, counts, *thresholds)
            self._looks[seen] = statistics | found
        return self._looks[seen]

    def _teacher_logits_of_sample(self, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the teacher's logits, N×C, and the labels of some training images as they are seen in epoch 0.

        Images of classes that the teacher does not know are left out.
        """
        assert self.teacher_model is not None
        self.set_epoch(0)
        dataset, collator = self.train_dataset, self.data_collator
        sample = np.random.default_rng(self.args.seed).permutation(len(dataset))[:num_images]
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        found = []
        with torch.random.fork_rng(devices=[]):  # the training must not notice
            subset = Subset(dataset, np.sort(sample).tolist())
            for batch in DataLoader(subset, self.args.eval_batch_size, collate_fn=collator):
                _, inputs, labels = self._split_inputs(send_to_device(batch, self.args.device))
                found.append((self.teacher_model(**inputs).float(), labels))
        logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        if logits.isnan().any():
            raise TeacherLogitsError(
                "The teacher's logits are not finite (NaN) for training images, before the first step. Check the "
                "teacher's weights and precision (try without --fp16/--bf16), and the images."
            )
        known = self.teacher_model.known_classes
        if known is not None:
            kept = (labels[:, None] == known).any(dim=1)
            logits, labels = logits[kept], labels[kept]
        if not len(labels):
            raise InputError(
                "No training image that was looked at is of a class that the teacher knows: there is nothing to "
                "distil. Use another teacher, or a --method without one."
            )
        return logits, labels

    # ---- Numbers that are none ------------------------------------------------------------------------------------

    def _watch(self, model: int, is_finite: torch.Tensor, step: int) -> None:
        """Note the first step at which something of a model is not finite, without waiting for the device."""
        first = self._first_bad_steps[model]
        torch.minimum(first, torch.where(is_finite, _NO_STEP, step), out=first)

    def _stop_if_not_finite(self) -> None:
        # Over all processes, so that they stop together.
        steps = self.accelerator.gather(self._first_bad_steps).view(-1, 2).amin(dim=0).tolist()
        first = min(steps)
        if first == _NO_STEP:
            return
        saved = f"at step {first}. The student was not saved since; the last checkpoint, if there is one, is good."
        if steps[_TEACHER] == first:  # which spoils the student's loss at once
            raise TeacherLogitsError(
                f"The teacher's logits are not finite (NaN or Inf) {saved} Check the teacher's weights and precision "
                "(try without --fp16/--bf16), and the images of this step."
            )
        raise TrainingDivergedError(
            f"The training diverged: loss or weights are not finite (NaN or Inf) {saved} Try a lower --learning_rate "
            f"(it is {self.args.learning_rate:g}), --max_grad_norm 1 (it is {self.args.max_grad_norm or 'off'}), or "
            f"--precision fp32 (it is {precision_of(self.args)}), in a new --output_dir."
        )

    def _stop_unless_good_to_save(self) -> None:
        # A step with a finite loss can be the one that spoils the weights. In buffers −∞ may be a mask.
        tensors = [_local(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())]
        fine = torch.stack([(tensor < math.inf).all().to(self.args.device) for tensor in tensors]).all()
        self._watch(_STUDENT, fine, self.state.global_step)
        self._stop_if_not_finite()

    # ---- Logging --------------------------------------------------------------------------------------------------

    def _add_loss_parts(self, counted: torch.Tensor, **losses: torch.Tensor | None) -> None:
        parts = {name: (loss.detach() * counted).sum() for name, loss in losses.items() if loss is not None}
        parts["count"] = counted.sum()
        for name, value in parts.items():
            # In float64 where the device has it: sums may run over a whole epoch.
            value = value.to(torch.float32 if value.device.type == "mps" else torch.float64)
            self._loss_parts[name] = self._loss_parts.get(name, 0.0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `ce_loss` and `kd_loss` to a training log: means over all examples, in all processes, since the last.

        `kd_loss` includes T² but not α.

        Raises:
            TeacherLogitsError: If the teacher's logits were not finite since the last log.
            TrainingDivergedError: If the loss was not.
        """
        if self.is_in_train:
            self._stop_if_not_finite()
        if "loss" in logs and self._loss_parts:
            totals = self.accelerator.reduce(self._loss_parts, reduction="sum")
            count = totals.pop("count").item()
            logs.update({name: total.item() / count for name, total in totals.items()})
            self._loss_parts = {}
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

        collator = self.data_collator
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
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
            class_balanced_labels=_training_labels(self.train_dataset) if args.sampler == "class_balanced" else None,
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
            head = {id(parameter) for module in self._head(self.model).values() for parameter in module.parameters()}
            groups = []
            for group in optimizer.param_groups:
                for in_head, rate in ((False, group["lr"]), (True, self.args.head_learning_rate)):
                    parameters = [p for p in group["params"] if (id(p) in head) == in_head]
                    groups += [{**group, "params": parameters, "lr": rate}] if parameters else []
            optimizer.param_groups = groups
        return optimizer

    @staticmethod
    def _head(model: nn.Module) -> dict[str, nn.Module]:
        head = head_modules(model)
        if not head:
            raise ValueError(
                f"--freeze_backbone and --head_learning_rate need a model whose head can be told from the rest, which "
                f"{type(model).__name__} is not: call it `classifier`."
            )
        return head

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a student by `model_init`, at the start and again when training begins; its backbone may be frozen."""
        model = super().call_model_init(trial)
        if hasattr(self, "student_started_from_teacher"):  # not while the trainer itself is made
            self._initialise_student(model)
        if self.args.freeze_backbone:
            self._freeze_backbone(model)
        return model

    def _freeze_backbone(self, model: nn.Module) -> None:
        """Train the head alone, with the rest in evaluation mode: not even statistics of BatchNorm change."""
        head = self._head(model)
        model.requires_grad_(False)
        for module in head.values():
            module.requires_grad_(True)

        def keep_in_evaluation_mode(model: nn.Module, _: Any) -> None:
            if model.training:
                for module in model.children():
                    module.eval()
                for module in head.values():
                    module.train()

        model.register_forward_pre_hook(keep_in_evaluation_mode)

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
            steps_per_epoch = self._update_steps_per_epoch or math.ceil(num_training_steps / self._num_epochs())
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
        """Evaluate as `Trainer`, with a loss that counts each example once."""
        if self.is_in_train:
            self._stop_if_not_finite()
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        # The loss is computed from gathered logits: means per process count the padding of the last batch. Loaders
        # take numbers from the common generator, how many depends on their workers: the training must not notice.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        logits, labels = output.predictions, output.label_ids
        if self.preprocess_logits_for_metrics is None and isinstance(logits, np.ndarray) and labels is not None:
            loss = cross_entropy_loss(
                torch.from_numpy(logits), torch.from_numpy(labels), self.args.label_smoothing_factor
            )
            output.metrics[f"{metric_key_prefix}_loss"] = loss.item()
        return output._replace(predictions=None, label_ids=None) if prediction_loss_only else output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Predict logits; hidden states and other outputs, which some models add, are not gathered."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, logits[0] if isinstance(logits, tuple) else logits, labels

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does, also after an `evaluate()`."""
        if self.model_wrapped is self.model:
            # evaluate() marks the bare model as prepared; accelerate would then not wrap it for several processes.
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        self._loss_parts = {}
        self._has_new_weights = True
        _ = self.class_weights  # their power may have to be measured first
        self._first_bad_steps.fill_(_NO_STEP)
        outcome = super().train(*args, **kwargs)
        self._stop_unless_good_to_save()
        return outcome

    # ---- Checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._stop_unless_good_to_save()
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
        if type(self.model).__module__.startswith("peft.") or not isinstance(self.model, PreTrainedModel):
            return False
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        try:
            saved, info = type(self.model).from_pretrained(
                checkpoint, config=self.model.config, dtype=self.model.dtype, output_loading_info=True
            )
        except RuntimeError as error:  # other shapes
            raise ValueError(f"The checkpoint {checkpoint} does not fit the model: {error}") from error
        problems = {name: keys for name, keys in info.items() if keys and name.endswith("_keys")}
        if problems:
            raise ValueError(f"The checkpoint {checkpoint} does not fit the model: {problems}.")
        self.model.load_state_dict(saved.state_dict(), strict=True)
        return True

    # ---- Publishing -----------------------------------------------------------------------------------------------

    def save_results(self, dataset_name: str | None = None, dataset_id: str | None = None) -> dict[str, Any]:
        """Measure student and teacher on `eval_dataset`; write `results.json` and the figures into `output_dir`.

        All processes have to call it.

        Args:
            dataset_name: What the data is called.
            dataset_id: Its id on the Hub, where it is there.

        Returns:
            The content of `results.json` (see `bkd_hf.results`).

        Raises:
            ValueError: As [`bkd_hf.measure.measure`].
        """
        from .measure import measure
        from .plots import save_plots
        from .results import RESULTS_NAME, save_json

        results = measure(self, dataset_name, dataset_id)
        self._has_new_weights = False
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_json(results, folder / RESULTS_NAME)
            save_plots(results, folder / "figures")
        return results

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the model card, `README.md`, from the `results.json` in `output_dir` (see `bkd_hf.model_card`).

        If there is none, or this trainer has trained since, all is measured first, for which all processes have to
        call it.

        Args:
            language: As for `Trainer`.
            license: As for `Trainer`.
            tags: As for `Trainer`.
            model_name: The headline.
            finetuned_from: Id on the Hub of the model that the student started from.
            tasks: Known from the results, and ignored.
            dataset_tags: Id on the Hub of the data; of several the first.
            dataset: What the data is called.
            dataset_args: Known from the results, and ignored.
        """
        from .model_card import build
        from .results import RESULTS_NAME

        folder = Path(self.args.output_dir)
        if not (folder / RESULTS_NAME).exists() or self._has_new_weights:
            self.save_results(_joined(dataset), _first(dataset_tags))
        if self.is_world_process_zero():
            card = build(
                folder,
                self.hub_model_id or self._repo_id(),
                **_card_options(language, license, tags, model_name, finetuned_from, dataset_tags),
            )
            card.save(folder / "README.md")

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | Future[str] | None:
        """Measure student and teacher, and publish the student: weights, figures, results and card, in one commit.

        Nothing else that lies in `output_dir` is pushed: no checkpoint, no teacher, no `training_args.bin`. All
        processes have to call it; the main one pushes, the others return at once.

        Args:
            commit_message: As for `Trainer`.
            blocking: As for `Trainer`.
            token: As for `Trainer`.
            revision: As for `Trainer`.
            private: As for `Trainer`.
            kwargs: For [`~BKDTrainer.create_model_card`].

        Returns:
            The URL of the repository, or a `Future` of it if `blocking=False`; `None` in other processes.

        Raises:
            InputError: If the repository's name or the token cannot be right.
            PublishError: If the Hub does not take it.
        """
        from .publishing import publish_folder

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        self.save_results(_joined(kwargs.pop("dataset", None)), _first(kwargs.get("dataset_tags")))
        known = {name: value for name, value in kwargs.items() if name not in ("tasks", "dataset_args")}
        if not self.is_world_process_zero():
            return None
        publish = functools.partial(
            publish_folder,
            self.args.output_dir,
            self.hub_model_id or self._repo_id(),
            private=self.args.hub_private_repo if private is None else private,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            **_card_options(**known),
        )
        return publish() if blocking else HfApi().run_as_future(publish)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Find or make the repository, so that a wrong name or token is noticed before training."""
        from .publishing import check_repo_access

        if self.is_world_process_zero():
            private = self.args.hub_private_repo if private is None else private
            check_repo_access(self._repo_id(), token or self.args.hub_token, private=private)
        self.hub_model_id = self._repo_id()
        self.push_in_progress = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push nothing: checkpoints hold optimizer states, and a student is published when it is measured."""

    def _repo_id(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    # ---- Checks ---------------------------------------------------------------------------------------------------

    def _known_class_counts(self) -> np.ndarray:
        if self.class_counts is None:
            raise ValueError("BKDTrainer needs class_counts, or a train_dataset to count them in.")
        return self.class_counts

    def _check_method(self, own_loss: bool) -> None:
        args, config = self.args, getattr(self.model, "config", None)
        if self.teacher_model is not None and self._distillation_loss is None:
            raise ValueError(
                f"--method {args.method} has no distillation loss: the teacher would not be used. Leave it out, or "
                "choose a --distillation_loss."
            )
        if own_loss or self.train_dataset is None:
            return
        if args.classification_loss in NEED_CLASS_COUNTS and (self._known_class_counts() == 0).any():
            empty = np.flatnonzero(self._known_class_counts() == 0)
            raise ValueError(
                f"--classification_loss {args.classification_loss} takes the logarithm of the class counts, but "
                f"{empty.size} classes have no training image (first: class {empty[0]}). Remove them."
            )
        if args.classification_loss == "ldam":
            if not getattr(config, "cosine_head", True):
                raise ValueError(
                    "--classification_loss ldam needs a student whose logits are scale · cos: load it with "
                    "cosine_head=True."
                )
            scale = getattr(config, "cosine_scale", args.ldam_scale)
            if scale != args.ldam_scale:
                raise ValueError(
                    f"--ldam_scale is {args.ldam_scale}, but the student's cosine head has the scale {scale}."
                )

    def _check_numbers_of_classes(self) -> None:
        numbers = {
            "student": num_labels(self.model),
            "teacher": self.teacher_model.num_classes if self.teacher_model is not None else None,
            "class counts": None if self.class_counts is None else len(self.class_counts),
        }
        known = {name: number for name, number in numbers.items() if number is not None}
        if len(set(known.values())) > 1:
            raise ValueError(
                "Student, teacher and data must have the same classes; their numbers are "
                + ", ".join(f"{name}: {number}" for name, number in known.items())
                + ". Load the models with num_labels set to the number of classes of the data."
            )


class _SetEpoch(TrainerCallback):
    def __init__(self, trainer: BKDTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: BKDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, epoch = self.trainer, int(state.epoch or 0)
        trainer.set_epoch(epoch)
        if trainer.teacher_cache is not None:
            trainer._precompute_logits(trainer._view(epoch))


def _check_that_metrics_see_all(args: BKDConfig) -> None:
    for option, is_refused in (
        ("batch_eval_metrics true", args.batch_eval_metrics),
        ("eval_do_concat_batches false", not args.eval_do_concat_batches),
    ):
        if is_refused:
            raise InputError(
                f"--{option}: the long-tail metrics are those of all evaluation examples at once. Leave the option "
                "out, or pass a compute_metrics of your own."
            )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that this process has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _card_options(
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset_tags: str | list[str] | None = None,
) -> dict[str, Any]:
    """What `Trainer.create_model_card` takes, as `bkd_hf.model_card.build` takes it."""
    return {
        "language": language,
        "license": license,
        "tags": [tags] if isinstance(tags, str) else tags or [],
        "title": model_name,
        "base_model": finetuned_from,
        "dataset_id": _first(dataset_tags),
    }


def _first(names: str | list[str] | None) -> str | None:
    return names if names is None or isinstance(names, str) else next(iter(names), None)


def _joined(names: str | list[str] | None) -> str | None:
    return names if names is None or isinstance(names, str) else ", ".join(names)


def _count_training_examples(dataset: Any, num_classes: int | None) -> np.ndarray | None:
    """Class counts of a training set, from its `class_counts` or its labels; `None` if it can be read only once."""
    if hasattr(dataset, "class_counts"):
        counts = np.asarray(dataset.class_counts, dtype=np.int64)
    elif isinstance(dataset, datasets.Dataset) and (column := _label_column(dataset)) is not None:
        counts = np.asarray(count_classes(dataset, column))
    else:
        labels = _training_labels(dataset)
        if labels is None:
            return None
        if labels.min(initial=0) < 0:
            raise ValueError(f"Label {labels.min()} of the training set is negative.")
        counts = np.bincount(labels)
    if num_classes is not None and len(counts) > num_classes:
        raise ValueError(
            f"The training set has the label {len(counts) - 1}, outside the range of the model's {num_classes} "
            "classes. Load the model with num_labels set to the number of classes of the data."
        )
    return np.pad(counts, (0, (num_classes or len(counts)) - len(counts)))


def _training_labels(dataset: Any) -> np.ndarray | None:
    """Class number of each training example; `None` if the set can be read only once.

    Looks, in this order, for: a label column of a `datasets.Dataset`, a `labels` attribute, `targets` as in
    torchvision, and the labels in the examples themselves, which may take as long as reading all of them.
    """
    if isinstance(dataset, datasets.Dataset) and (column := _label_column(dataset)) is not None:
        return labels_of(dataset, column)
    for name in ("labels", "targets"):
        if hasattr(dataset, name):
            return np.asarray(getattr(dataset, name))
    if isinstance(dataset, torch.utils.data.IterableDataset) or not has_length(dataset):
        return None
    return np.asarray([int(_label_of(dataset[i])) for i in range(len(dataset))])


def _label_of(example: Any) -> Any:
    for name in ("labels", "label"):
        if name in example:
            return example[name]
    raise ValueError(f'The training examples have no "labels" to count, only {", ".join(example)}: pass class_counts.')


def _label_column(dataset: datasets.Dataset) -> str | None:
    named = [name for name in ("labels", "label") if name in dataset.column_names]
    typed = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    return next(iter(named or (typed if len(typed) == 1 else [])), None)
