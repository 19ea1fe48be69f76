"""A `Trainer` that trains with one set of weights, and measures, saves and publishes their moving average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from .adapters import AdaptingTrainer
from .callbacks import WeightAverage
from .errors import InputError

#: In a checkpoint, the weights that training goes on from; its `model.safetensors` holds their average.
RAW_WEIGHTS_NAME = "raw_weights.pt"


class AveragingTrainer(AdaptingTrainer):
    """A `Trainer` whose model is, with `ema_decay`, the average of its weights to all who look ([`WeightAverage`]).

    Evaluations, saved models and checkpoints are those of the average, and so is the model when training is over; a
    checkpoint also keeps the weights themselves.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._average = WeightAverage()
        self.callback_handler.callbacks.insert(0, self._average)  # others see the average when training ends

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer`."""
        self._average.forget()
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as `Trainer`."""
        with self._average.in_place_of_weights(self.model):
            return super().evaluation_loop(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with self._average.in_place_of_weights(self.model):
            super()._save(output_dir, state_dict)

    def _complete_checkpoint(self, folder: Path) -> None:
        if self.args.ema_decay is not None:
            torch.save(self.model.state_dict(), folder / RAW_WEIGHTS_NAME)
        super()._complete_checkpoint(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        raw, decay = Path(resume_from_checkpoint, RAW_WEIGHTS_NAME), self.args.ema_decay
        if raw.exists() != (decay is not None):
            raise InputError(
                f"--ema_decay is {decay}, but {resume_from_checkpoint} was saved with{'' if raw.exists() else 'out'} "
                "an average of weights: continue as it began, or start anew."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._average.raw_weights = raw

    def _load_best_model(self) -> None:
        self._average.forget()  # that of the last step; the checkpoint holds the best one
        super()._load_best_model()
