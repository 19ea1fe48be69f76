"""`BKDTrainer`: a `transformers.Trainer` that distils from a frozen teacher with class-balanced weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_utils import EvalLoopOutput, has_length
from transformers.training_args import ParallelMode
from transformers.utils import logging

from .averaging_trainer import AveragingTrainer
from .callbacks import (
    Beginning,
    Clock,
    FiniteGuard,
    LossMeter,
    PassCounter,
    SaveAfterEpoch,
    TeacherLogitsError,
    TrainingDivergedError,
)
from .config import METHOD_OPTIONS, BKDConfig, values_for_now
from .errors import TrainingStopped
from .head import check_has_weights_to_train, num_labels, prepare_head
from .head_fitting import fit_bias
from .loss_inputs import are_labelled, at_least_1
from .losses import cross_entropy_loss, example_weights
from .methods import corrects
from .metrics import LongTailEvaluation, check_class_counts
from .models import start_from_teacher
from .objective import Objective, Progress
from .optimization import OptimizingTrainer
from .reading_trainer import ReadingTrainer
from .sharding import check_engine, forget_precision, spread_large_teacher, start_deepspeed_anew, tell_of_layers
from .stopping import StopAtSigterm, end_workers
from .streams import StreamedImages, sample_of
from .targets import NUM_IMAGES, answers_about_sample, look
from .tasks import task_of_model
from .teacher import (
    TEACHER_LOGITS,
    FrozenTeacher,
    check_numbers_of_classes,
    check_order_of_classes,
    load_teacher,
    split_inputs,
    starts_from,
)
from .teacher_logits import describe_teacher
from .tracking import ClassFigures
from .training_data import collator_of, count_training_examples

logger = logging.get_logger(__name__)

__all__ = ["BKDTrainer", "TeacherLogitsError", "TrainingDivergedError"]


class BKDTrainer(ReadingTrainer, OptimizingTrainer, AveragingTrainer):
    """Trains a student with Balanced Knowledge Distillation (Zhang et al., 2021, arXiv 2104.10510).

        L = CE(z_s, y) + α · T² · KL( softmax(z_t / T + log w) ‖ softmax(z_s / T) )     mean over the global batch

    or by another method of [`BKDConfig`]: λ_c · classification loss + λ_d · distillation loss (`bkd_hf.objective`).
    The loss is one mean over all examples of an optimizer step, no matter how they are split into accumulation steps
    and processes. In all other respects this is a [`~transformers.Trainer`]. The base classes document their changes:
    reading (`ReadingTrainer`), evaluation (`MeasuringTrainer`), optimizers and schedules (`OptimizingTrainer`),
    `ema_decay` (`AveragingTrainer`), `adapter` (`AdaptingTrainer`) and `push_to_hub()` (`PublishingTrainer`).

    Inputs whose names start with `teacher_` go to the teacher (without the prefix), all others to the student. If no
    name does, both models get the same inputs.

    Args:
        model: The student, a classifier with `.logits` in its output.
        teacher_model: A module, a folder or a Hub id, whose classes are in the student's order. It is frozen, kept in
            evaluation mode, and never saved.
            `None` trains with the method's classification loss alone, on the same code path.
        args: Options.
        data_collator: As for `Trainer`; by default that of an [`ImageDataset`] or `TextDataset`, or of parts of one.
        train_dataset: As for `Trainer`; the guarantee above needs a map-style data set.
        class_counts: C numbers of training images; counted in `train_dataset` if not given.
        eval_dataset, processing_class, model_init, compute_metrics, callbacks, optimizers,
            preprocess_logits_for_metrics: As for `Trainer`.
        classification_loss: Used instead of the method's: called with logits (B×C) and labels (B), it returns B
            values. Class weights are applied to them.
        distillation_loss: Used instead of the method's: called with the logits of student and teacher (B×C), labels
            (B) and class weights (C), it returns B values.

    Raises:
        ValueError: If the classes of student, teacher and class counts differ, labels are out of range, a class that
            needs images has none, there is a teacher but no distillation, or the student of `ldam` has no cosine head.
        TeacherLogitsError, TrainingDivergedError: During training, if the teacher's logits, or the student's loss or
            weights, are not finite; raised at the next log, evaluation or checkpoint.
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

        if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            # Trainer would split each batch, and its number of examples, among the GPUs by DataParallel.
            logger.warning_once(f"The first of {args.n_gpu} GPUs is used: `accelerate launch` uses all.")
            args._n_gpu = 1
        if data_collator is None:
            data_collator = collator_of(eval_dataset if train_dataset is None else train_dataset)
        is_endless = isinstance(train_dataset, StreamedImages)
        self._stop, self.class_figures, self.clock = StopAtSigterm(is_endless), ClassFigures(self), Clock()
        # Trainer collects all logits for compute_metrics; the long-tail metrics are accumulated batch by batch.
        are_ours = isinstance(compute_metrics, LongTailEvaluation) and compute_metrics.adds_up
        adds_up = are_ours and preprocess_logits_for_metrics is None
        if model is not None:
            forget_precision(model)
        # Instead of Trainer's callback for SIGTERM, which would listen from now on, and its smoothing.
        with values_for_now(args, enable_jit_checkpoint=False, label_smoothing_factor=0.0):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                model_init=model_init,
                compute_metrics=None if adds_up else compute_metrics,
                callbacks=[
                    self.clock,
                    Beginning(self._begin_training),
                    self._stop,
                    SaveAfterEpoch(),
                    PassCounter(self._steps_in_pass, is_endless),
                    *([self.class_figures] if args.report_to else []),
                    *(callbacks or []),
                ],
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        tell_of_layers(self.accelerator, args, self.model)
        # Has Trainer count the examples of each optimizer step, over its micro-batches and processes.
        self.model_accepts_loss_kwargs = True
        # The loss is computed here, so a model need not accept labels.
        self.label_names = ["labels"]
        if train_dataset is not None and model_init is None:
            prepare_head(self.model, args)

        if class_counts is None and train_dataset is not None:
            class_counts = count_training_examples(train_dataset, num_labels(self.model))
        self.class_counts = None if class_counts is None else check_class_counts(class_counts).astype(np.int64)
        self.long_tail = compute_metrics if isinstance(compute_metrics, LongTailEvaluation) else None
        self._has_own_metrics = compute_metrics is not None
        if self.long_tail is None and self.class_counts is not None:
            self.long_tail = LongTailEvaluation(self.class_counts)
        self.teacher_model: FrozenTeacher | None = None
        self._about_teacher: dict[str, Any] = {}
        if teacher_model is not None:
            teacher = load_teacher(teacher_model, task=task_of_model(self.model))
            if teacher is not teacher_model:  # a FrozenTeacher has its own order
                check_order_of_classes(self.model, teacher)
            if args.teacher_cache != "off":
                self._about_teacher = describe_teacher(teacher)  # before it may be spread over devices
            self.teacher_model = self._prepare_teacher(teacher)
        self._training_data = self._new_training_data()
        check_numbers_of_classes(self.model, self.teacher_model, self.class_counts)

        # Trainer itself writes `objective` in a search for hyperparameters.
        self.bkd_objective = Objective(
            args,
            self.class_counts,
            args.device,
            has_teacher=self.teacher_model is not None,
            known_classes=getattr(self.teacher_model, "known_classes", None),
            classification_loss=classification_loss,
            distillation_loss=distillation_loss,
            look=self.look_at_targets,
        )
        if train_dataset is not None or self.teacher_model is not None:
            self.bkd_objective.check(getattr(self.model, "config", None))
        self._looks: dict[tuple, dict[str, Any]] = {}  # target statistics, by the options they depend on
        self._guard, self._meter = FiniteGuard(self.accelerator, args), LossMeter(self.accelerator)
        self._first_batch_checked = False
        self._mean_weight_of_step: torch.Tensor | None = None
        self._has_new_weights = False  # newer than results.json
        self.student_started_from_teacher = False
        self.head_bias_shift: torch.Tensor | None = None  # C numbers, if `--head_bias` fitted them
        self._initialise_student(self.model)
        self._add_adapter(self.model)

    @staticmethod
    def plain(**kwargs: Any) -> BKDTrainer:
        """Make a trainer that is no subclass, whose constructor may take other arguments."""
        return BKDTrainer(**kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as `Trainer` does, and check its engine."""
        start_deepspeed_anew(self.args)
        super().create_accelerator_and_postprocess()
        unset_hf_deepspeed_config()  # as in BKDConfig; it has been set again
        check_engine(self.args, self.accelerator)

    # ---- The loss -------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute the objective in training (see [`Objective`]), and the cross-entropy in evaluation.

        Args:
            model: The student, as wrapped for training.
            inputs: A batch with `labels`; examples labelled −100 are ignored.
            return_outputs: Whether to return the student's outputs too.
            num_items_in_batch: Labelled examples in the optimizer step, over all its micro-batches and processes.

        Returns:
            The batch's share of the loss, scaled so that gradients summed over micro-batches and averaged over
            processes are those of the mean over the step.
        """
        student_inputs, teacher_inputs, labels = split_inputs(inputs)
        outputs = model(**student_inputs)
        counted = are_labelled(labels)
        trains = model.training or (self.is_in_train and torch.is_grad_enabled())  # a model may keep itself in eval()
        if trains:
            z_s, z_t = outputs.logits, self._teacher_logits(teacher_inputs, inputs.get(TEACHER_LOGITS))
            is_top_k = self.args.teacher_cache_top_k is not None and self.teacher_cache is not None
            losses = self.bkd_objective(z_s, z_t, labels, self._progress(num_items_in_batch), is_top_k)
            self._meter.add(losses, counted)
        else:
            smoothing = self.args.label_smoothing_factor
            losses = {"loss": cross_entropy_loss(outputs.logits, labels, smoothing, reduction="none")}
        loss = self._share_of_mean(losses["loss"], counted, num_items_in_batch)
        if trains:
            self._guard.watch("student", loss.detach().isfinite(), self.state.global_step + 1)
        return (loss, outputs) if return_outputs else loss

    def _share_of_mean(self, losses: torch.Tensor, counted: torch.Tensor, num_items_in_step: Any) -> torch.Tensor:
        losses = losses * counted
        if num_items_in_step is None:
            return losses.sum() / at_least_1(counted.sum())
        # Processes average their gradients; the count is over all processes (unless that is switched off).
        num_averaged = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return losses.sum() / at_least_1(num_items_in_step) * num_averaged

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Count the labelled examples of an optimizer step, and compute their mean class weight."""
        num_items = super()._get_num_items_in_batch(batch_samples, device)
        weights = self.classification_weights
        if weights is not None and batch_samples and num_items is not None:
            labels = [batch["labels"].to(device) for batch in batch_samples]
            total = torch.stack([example_weights(each, weights, like=weights).sum() for each in labels]).sum()
            if self.args.average_tokens_across_devices:
                total = self.accelerator.reduce(total, reduction="sum")
            self._mean_weight_of_step = torch.where(total > 0, total, 1) / at_least_1(num_items)
        return num_items

    def _progress(self, num_items_in_batch: torch.Tensor | int | None = None) -> Progress:
        """Progress by optimizer steps; `state.epoch` counts micro-batches and depends on how steps are split."""
        args, per_epoch = self.args, self._update_steps_per_epoch
        epoch = self.state.global_step / per_epoch if per_epoch else self.state.epoch or 0.0
        num_epochs = args.max_steps / per_epoch if args.max_steps > 0 and per_epoch else args.num_train_epochs
        return Progress(epoch, num_epochs, None if num_items_in_batch is None else self._mean_weight_of_step)

    @property
    def class_weights(self) -> torch.Tensor | None:
        """The C weights w^(p · κ) in the distillation loss at this point of training; `None` if it uses none."""
        return self.bkd_objective.distillation_weights(self._progress())

    @property
    def classification_weights(self) -> torch.Tensor | None:
        """The C weights in the classification loss at this point of training; `None` without `class_weighting`."""
        return self.bkd_objective.classification_weights(self._progress())

    # ---- The teacher ----------------------------------------------------------------------------------------------

    def _prepare_teacher(self, teacher: FrozenTeacher) -> FrozenTeacher:
        """Place the teacher under the student's autocast, but outside everything that is trained or saved."""
        num_known = len(self.accelerator._models)
        forget_precision(teacher)
        prepared = self.accelerator.prepare_model(teacher, device_placement=True, evaluation_mode=True)
        spread_large_teacher(teacher.model, self.accelerator)
        # Otherwise Trainer.evaluate() before train() would consider the student prepared.
        del self.accelerator._models[num_known:]
        return prepared

    def _initialise_student(self, student: nn.Module) -> None:
        """Initialise the student with the teacher's weights, if the options say so.

        If the method corrects for the class frequencies, the student starts with the teacher's logits after post-hoc
        logit adjustment.
        """
        teacher, objective = self.teacher_model, self.bkd_objective
        if teacher is None or self.train_dataset is None:
            return
        if starts_from(teacher, student, sample_of(self.train_dataset), self.args, objective):
            counts = self.class_counts if corrects(vars(self.args)) else None
            start_from_teacher(student, teacher.model, counts, objective.prior)
            self.student_started_from_teacher = True

    def _teacher_logits(self, inputs: dict[str, Any], computed: torch.Tensor | None) -> torch.Tensor | None:
        """B×C logits of the teacher, those in the batch if there are any; `None` if the loss does not use them."""
        teacher = self.teacher_model
        if teacher is None or not self.bkd_objective.mixture(self._progress().epoch)[1]:
            return None
        logits = teacher(**inputs) if computed is None else computed
        known = logits if teacher.known_classes is None else logits[:, teacher.known_classes]
        self._guard.watch("teacher", known.isfinite(), self.state.global_step + 1)
        if not self._first_batch_checked:
            self._first_batch_checked = True
            self._guard.stop_if_not_finite()
        return logits

    @torch.no_grad()
    def look_at_targets(self, num_images: int = NUM_IMAGES) -> dict[str, Any] | None:
        """Check the final distillation targets of some training images (see `bkd_hf.targets`).

        All processes must call it; each uses the same images.

        Args:
            num_images: Number of images, drawn by the seed.

        Returns:
            See `bkd_hf.targets.look`; `None` without a teacher, with a user-defined distillation loss, or without
            random access to the training images.

        Raises:
            InputError: If the teacher knows the class of none of these images.
            TeacherLogitsError: If the teacher's logits are not finite.
        """
        args, objective = self.args, self.bkd_objective
        dataset = sample_of(self.train_dataset)
        is_readable = has_length(dataset) and hasattr(dataset, "__getitem__") and objective.has_known_targets
        if self.teacher_model is None or self.long_tail is None or not is_readable:
            return None
        seen = num_images, args.seed, *(str(getattr(args, name)) for name in ("empty_classes", *METHOD_OPTIONS))
        if seen not in self._looks:
            data = self._new_training_data()
            logits, labels = answers_about_sample(self.teacher_model, data, num_images, args)
            self._looks[seen] = look(objective, logits, labels, self.long_tail)
        return self._looks[seen]

    # ---- Logging --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `loss`, `ce_loss` and `kd_loss` (with T², without α) to a training log.

        All are means over all examples since the last log. `Trainer` averages over steps instead, which gives the
        examples of a short last step more weight, so the total would differ from the sum of its parts.

        Raises:
            TeacherLogitsError, TrainingDivergedError: If something has not been finite since the last log.
        """
        if self.is_in_train:
            self._guard.stop_if_not_finite()
        if "loss" in logs:
            logs.update(self._meter.pop())
        super().log(logs, start_time)

    # ---- The course of a training ----------------------------------------------------------------------------------

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Create a student by `model_init`, now and again when training begins; its backbone may be frozen."""
        model = super().call_model_init(trial)
        self._compute_features = None  # of the model before
        prepare_head(model, self.args)
        if hasattr(self, "student_started_from_teacher"):  # not while the trainer itself is made
            self._initialise_student(model)
            self._add_adapter(model)
            self._start_head(model.to(self.args.device))
        return model

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as `Trainer`, unless the training has diverged."""
        if self.is_in_train:
            self._guard.stop_if_not_finite()
        return super().evaluation_loop(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does, also after an `evaluate()`.

        Raises:
            TrainingStopped: With `enable_jit_checkpoint`, after SIGTERM; ends the process if it is not caught.
        """
        resume_from_checkpoint = self._resolved(resume_from_checkpoint)
        if (trial := kwargs.get("trial")) is not None:
            self._hp_search_setup(trial)  # Trainer would first create the student with the options of the last trial
        wrapped: Any = self.model_wrapped  # type: ignore[has-type]
        if self.model is not None and getattr(wrapped, "_orig_mod", wrapped) is self.model:
            # evaluate() marks the bare model as prepared; accelerate would then not wrap it for several processes.
            forget_precision(self.model)
            self.model_wrapped = self.model  # not compiled, for the same reason
        self._guard, self._meter = FiniteGuard(self.accelerator, self.args), LossMeter(self.accelerator)
        if self.model is not None:
            check_has_weights_to_train(self.model)
        self._has_new_weights = True
        _ = self.class_weights  # their power may have to be measured first
        if self.model_init is None and not resume_from_checkpoint:  # a new model gets its head when it is made
            self._start_head(self.model)
        with self._stop.listening() if self.args.enable_jit_checkpoint else nullcontext():
            outcome = super().train(resume_from_checkpoint, *args, **kwargs)
        end_workers(self.callback_handler.train_dataloader)
        self._guard.check_weights(self.model, self.state.global_step)
        if self.args.head_bias == "balanced" or (self.args.head_bias == "auto" and self.bkd_objective.is_calibrated):
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            self._share_buffers()
            with self.compute_loss_context_manager():
                self.head_bias_shift = fit_bias(self.model.eval(), self._new_training_data(), self.args, sharded)
        return outcome

    def _begin_training(self) -> None:
        self._meter.restore(self)
        self._restore_stream()

    def _begin_epoch(self, epoch: int) -> None:
        with self._stop.at_once() if self._training_data.computed else nullcontext():  # computed columns are kept
            super()._begin_epoch(epoch)

    def _finalize_training(self, trial: Any, *args: Any) -> Any:
        if not self._stop.has_stopped:
            return super()._finalize_training(trial, *args)
        # As if it had been killed, except for the checkpoint: no best model, final model or results.
        if self._stop.saved_step != self.state.global_step:
            self._save_checkpoint(self.model, trial)
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        self.accelerator.wait_for_everyone()  # a launcher ends all processes when one has ended
        raise TrainingStopped

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._guard.check_weights(self.model, self.state.global_step)
        self._meter.keep(self)
        self.clock.keep(self.state)
        self._keep_stream()
        super()._save_checkpoint(model, trial)
