"""A `Trainer` that trains one set of weights, and evaluates, saves and publishes their moving average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from .adapters import AdaptingTrainer
from .errors import InputError

#: In a checkpoint, the weights from which training continues; its `model.safetensors` holds their average.
RAW_WEIGHTS_NAME = "raw_weights.pt"


class WeightAverage(TrainerCallback):
    """The exponential moving average of a model's weights, if the option `ema_decay` is set.

        average ← d · average + (1 − d) · weights,    d = min(ema_decay, (1 + n) / (10 + n))

    after each optimizer step, where n is the number of earlier steps. The average starts with the weights after the
    first step. d grows as in TensorFlow's `ExponentialMovingAverage`; otherwise the first weights would dominate the
    average for 1 / (1 − ema_decay) steps. BatchNorm statistics are averaged too, as in timm's `ModelEmaV3` and
    torchvision's references, as statistics of the latest weights do not match the averaged ones. Integers and
    non-finite buffers (masks) are copied.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop the average."""
        self._average: AveragedModel | None = None
        #: File with the weights of a resumed training, whose model holds their average.
        self.raw_weights: Path | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.ema_decay is None or self._average is not None:  # the same training retries with a smaller batch
            return
        short = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
        if short:
            raise InputError(
                f"--ema_decay {args.ema_decay:g} needs a student in float32: in {short.pop()} the small steps of an "
                "average are rounded away. Load it with dtype=torch.float32; --precision bf16 may stay."
            )
        self._average = AveragedModel(model, use_buffers=True)
        self._average.n_averaged.fill_(state.global_step)
        buffers = zip(self._average.module.buffers(), model.buffers(), strict=True)
        self._copied = [(to, of) for to, of in buffers if not (of.is_floating_point() and of.isfinite().all())]
        if self.raw_weights is not None:
            model.load_state_dict(torch.load(self.raw_weights, map_location="cpu", weights_only=True))

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._average is None:
            return
        n = int(self._average.n_averaged)  # on the CPU: no synchronisation
        self._average.multi_avg_fn = get_ema_multi_avg_fn(min(args.ema_decay, (1 + n) / (10 + n)))
        self._average.update_parameters(model)
        for to, of in self._copied:
            to.copy_(of)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._average is not None:
            self._show(model)
        self.forget()

    @contextmanager
    def in_place_of_weights(self, model: nn.Module) -> Iterator[None]:
        """Put the average into a model temporarily; all processes must call it."""
        if self._average is None:
            yield
            return
        self._show(model)
        try:
            yield
        finally:
            self._swap(model)

    def _show(self, model: nn.Module) -> None:
        # Each process has its own statistics; those of the main process are saved.
        broadcast([buffer for buffer in self._average.module.buffers() if buffer.is_floating_point()])  # type: ignore
        self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        """Swap weights and average in place, as optimizers and wrappers hold the model's tensors."""
        average: Any = self._average.module  # type: ignore[union-attr]
        pairs = list(zip(*(chain(each.parameters(), each.buffers()) for each in (model, average)), strict=True))
        for weight, mean in pairs:
            kept = weight.clone()
            weight.copy_(mean)
            mean.copy_(kept)


class AveragingTrainer(AdaptingTrainer):
    """A `Trainer` that, with `ema_decay`, uses the average of the weights outside of training ([`WeightAverage`]).

    Evaluations, saved models and checkpoints hold the average, and so does the model after training. A checkpoint also
    keeps the weights themselves.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._average = WeightAverage()
        self.callback_handler.callbacks.insert(0, self._average)  # others see the average when training ends

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer`; raises an `InputError` if the weights have too few digits for an average."""
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
        self._average.forget()  # from the last step; the checkpoint holds the best one
        super()._load_best_model()
