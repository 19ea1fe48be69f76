"""How training examples reach the models: global batches and precomputed columns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, MutableMapping
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import has_length

from .config import BKDConfig
from .errors import InputError
from .features import FEATURES, answer_features
from .head import the_head
from .head_fitting import start_from_class_means
from .objective import Objective
from .stopping import outlive_sigterm
from .streams import POSITION, SPLIT_TWICE, StreamedImages, sample_of
from .teacher import TEACHER_LOGITS, TEACHER_PREFIX, FrozenTeacher, TeacherAsClassifier, split_inputs
from .teacher_logits import LogitsFolder, describe_weights
from .training_data import TrainingData


class ReadingTrainer(Trainer):
    """A `Trainer` that splits its training examples into global batches, for a student and optionally a teacher."""

    args: BKDConfig
    bkd_objective: Objective
    teacher_model: FrozenTeacher | None
    class_counts: np.ndarray | None
    _training_data: TrainingData
    _about_teacher: dict[str, Any]
    _about_backbone: dict[str, Any]
    _update_steps_per_epoch: float | None = None
    _stream_positions: dict[int, str]  # by lane
    _compute_features: Callable[[dict[str, Any]], torch.Tensor] | None = None
    _model_with_started_head: torch.nn.Module | None = None

    @property
    def teacher_cache(self) -> LogitsFolder | None:
        """Cache of the teacher's logits; available once training begins."""
        return self._training_data.computed.get(TEACHER_LOGITS)

    @property
    def feature_cache(self) -> LogitsFolder | None:
        """Cache of the frozen backbone's features; available once training begins."""
        return self._training_data.computed.get(FEATURES)

    @property
    def examples_in_pass(self) -> int:
        """Number of training examples in an epoch: all, or those of full steps with `dataloader_drop_last`."""
        assert self.class_counts is not None
        total, of_step = int(self.class_counts.sum()), self.args.images_in_step(self.args.world_size)
        return total - total % of_step if self.args.dataloader_drop_last else total

    def get_train_dataloader(self) -> DataLoader:
        """Return the training data, split into global batches (see [`GlobalBatchSampler`]).

        Iterable data sets, sampling strategies other than random and sequential, and accelerate's `split_batches` and
        `dispatch_batches` use `Trainer`'s own path, without the guarantee for the last step of an epoch.
        """
        data = self._training_data = self._new_training_data()
        if self.teacher_model is not None:
            num_classes = 0 if self.class_counts is None else len(self.class_counts)
            data.open_logits(self._about_teacher, num_classes, self.bkd_objective.top_k)
        if self.args.feature_cache != "off" and self._compute_features is None:
            self._compute_features = answer_features(self.model)
            self._about_backbone = describe_weights(self.model, the_head(self.model))
        if self._compute_features is not None:
            data.open_features(self._about_backbone, self._compute_features)
        data.check_sampler()
        if isinstance(self.train_dataset, StreamedImages):
            self.args.ignore_data_skip = True  # the stream resumes by itself
            loader = data.stream_loader(self._train_batch_size, self.accelerator)
        elif data.numbers_examples:
            loader = self.accelerator.prepare(data.loader(self._train_batch_size, self.accelerator))
        else:
            if getattr(self.train_dataset, "_distributed", None) is not None and self.accelerator.num_processes > 1:
                raise InputError(SPLIT_TWICE)
            loader = super().get_train_dataloader()
        if has_length(loader):
            self._update_steps_per_epoch = math.ceil(len(loader) / self.args.gradient_accumulation_steps)
        elif self.class_counts is not None:
            of_step = self.args.images_in_step(self.args.world_size)
            self._update_steps_per_epoch = float(self.class_counts.sum()) / of_step
        return outlive_sigterm(loader) if self.args.enable_jit_checkpoint else loader

    def _new_training_data(self) -> TrainingData:
        dataset, examples, collator = self.train_dataset, self.train_dataset, self.data_collator
        if isinstance(dataset, datasets.Dataset):
            examples = self._remove_unused_columns(dataset, description="training")
        else:
            examples = sample_of(dataset)
            collator = self._get_collator_with_removed_columns(collator, description="training")
        return TrainingData(dataset, examples, collator, self.args)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Count the labelled examples of an optimizer step as `Trainer` does; unsigned labels become signed."""
        for batch in batch_samples:
            if isinstance(batch, MutableMapping) and getattr(batch.get("labels"), "dtype", None) == torch.uint8:
                batch["labels"] = batch["labels"].long()  # Trainer compares with −100, which in uint8 is class 156
        return super()._get_num_items_in_batch(batch_samples, device)

    def _start_head(self, model: torch.nn.Module) -> None:
        """Set a model's head to class means, if the options say so and it has not been set before."""
        if self.args.head_init == "class_mean" and model is not self._model_with_started_head:
            self._model_with_started_head = model
            with self.compute_loss_context_manager():
                start_from_class_means(model.eval(), self._new_training_data(), self.args)

    # ---- Streams --------------------------------------------------------------------------------------------------

    def _steps_in_pass(self) -> float | None:
        return None if has_length(self.train_dataset) else self._update_steps_per_epoch

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor | int | None]:
        """Get the batches of a step as `Trainer`, and record the stream's position after them."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            if isinstance(batch, dict) and POSITION in batch:
                lane, self._stream_positions[lane] = batch.pop(POSITION)
        return batches, num_items

    def _keep_stream(self) -> None:
        """Save the stream's position in the state of a checkpoint; all processes must call it."""
        if isinstance(self.train_dataset, StreamedImages):
            positions = {lane: at for part in gather_object([self._stream_positions]) for lane, at in part.items()}
            cut = {"num_lanes": self.train_dataset.num_lanes, "batch_size": self._train_batch_size}
            self.state.stateful_callbacks[POSITION] = {**cut, "positions": positions}

    def _restore_stream(self) -> None:
        """Restore the stream's position if training resumes from a checkpoint."""
        if not isinstance(self.train_dataset, StreamedImages):
            return
        kept = self.state.stateful_callbacks.get(POSITION, {"positions": {}})
        for name, now in (("num_lanes", self.train_dataset.num_lanes), ("batch_size", self._train_batch_size)):
            if kept.get(name, now) != now:
                raise InputError(
                    f"The checkpoint was saved with a stream of {name} {kept[name]}, which is {now} here: go on with "
                    "as many processes, workers and images per device as there were."
                )
        self._stream_positions = {int(lane): at for lane, at in kept["positions"].items()}
        done = self.state.global_step * self.args.gradient_accumulation_steps
        self.train_dataset.start = done, {lane: json.loads(at) for lane, at in self._stream_positions.items()}

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train for an epoch as `Trainer`, which takes a step too many after a checkpoint of the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        self._begin_epoch(kwargs["epoch"])  # state.epoch is a fraction where a callback has ended an epoch
        super()._run_epoch(*args, **kwargs)

    def _begin_epoch(self, epoch: int) -> None:
        self._training_data.set_epoch(epoch)
        teacher, top_k = self.teacher_model, self.bkd_objective.top_k

        def ask_teacher(batch: dict[str, Any]) -> torch.Tensor:
            logits = teacher(**split_inputs(batch)[1])  # type: ignore[misc]
            return logits if top_k is None else top_k.take(logits)

        asked = {TEACHER_LOGITS: ask_teacher, FEATURES: self._compute_features}
        self._training_data.fill(epoch, asked, self._train_batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:  # type: ignore[has-type]
            super()._set_signature_columns_if_needed()
            columns = ["labels", TEACHER_LOGITS, FEATURES, *(self._signature_columns or [])]  # type: ignore[has-type]
            if isinstance(self.model, TeacherAsClassifier):
                columns += self.model.teacher.input_names
            if self.teacher_model is not None:
                columns += [f"{TEACHER_PREFIX}{name}" for name in self.teacher_model.input_names]
            self._signature_columns = columns

    def _remove_unused_columns(self, dataset: datasets.Dataset, description: str | None = None) -> datasets.Dataset:
        # It is unknown which columns `with_transform` needs; removing them first would remove the images.
        return dataset if dataset.format["type"] == "custom" else super()._remove_unused_columns(dataset, description)
