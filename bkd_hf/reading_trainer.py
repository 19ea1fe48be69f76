"""How training examples come to the models: global batches, and what was computed of them beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import has_length

from .config import BKDConfig
from .features import FEATURES, answer_features
from .head import the_head
from .objective import Objective
from .stopping import outlive_sigterm
from .teacher import TEACHER_LOGITS, TEACHER_PREFIX, FrozenTeacher, TeacherAsClassifier, split_inputs
from .teacher_logits import LogitsFolder, describe_weights
from .training_data import TrainingData


class ReadingTrainer(Trainer):
    """A `Trainer` that cuts its training examples into global batches, for a student and maybe its teacher."""

    args: BKDConfig
    bkd_objective: Objective
    teacher_model: FrozenTeacher | None
    class_counts: np.ndarray | None
    _training_data: TrainingData
    _about_teacher: dict[str, Any]
    _about_backbone: dict[str, Any]
    _update_steps_per_epoch: int | None = None
    _compute_features: Callable[[dict[str, Any]], torch.Tensor] | None = None

    @property
    def teacher_cache(self) -> LogitsFolder | None:
        """Where the teacher's logits are kept; known when training begins."""
        return self._training_data.computed.get(TEACHER_LOGITS)

    @property
    def feature_cache(self) -> LogitsFolder | None:
        """Where the features of the frozen backbone are kept; known when training begins."""
        return self._training_data.computed.get(FEATURES)

    def get_train_dataloader(self) -> DataLoader:
        """Return the training data, cut into global batches (see [`GlobalBatchSampler`]).

        Iterable data sets, other sampling strategies than random and sequential, and accelerate's `split_batches` and
        `dispatch_batches` take `Trainer`'s own path, without the guarantee for the last step of an epoch.
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
        if data.numbers_examples:
            loader = self.accelerator.prepare(data.loader(self._train_batch_size, self.accelerator))
        else:
            loader = super().get_train_dataloader()
        if has_length(loader):
            self._update_steps_per_epoch = math.ceil(len(loader) / self.args.gradient_accumulation_steps)
        return outlive_sigterm(loader) if self.args.enable_jit_checkpoint else loader

    def _new_training_data(self) -> TrainingData:
        dataset, examples, collator = self.train_dataset, self.train_dataset, self.data_collator
        if isinstance(dataset, datasets.Dataset):
            examples = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        return TrainingData(dataset, examples, collator, self.args)

    def _begin_epoch(self, epoch: int) -> None:
        self._training_data.set_epoch(epoch)
        teacher, top_k = self.teacher_model, self.bkd_objective.top_k
        asked = {
            TEACHER_LOGITS: lambda batch: (top_k.take if top_k else nn.Identity())(teacher(**split_inputs(batch)[1])),  # type: ignore[misc]
            FEATURES: self._compute_features,
        }
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
        # What `with_transform` makes of the columns is not known; removing them first would take away the images.
        return dataset if dataset.format["type"] == "custom" else super()._remove_unused_columns(dataset, description)
