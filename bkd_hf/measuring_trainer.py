"""Evaluation in a `Trainer`: loss and metrics are accumulated batch by batch; no rank keeps all logits."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, has_length

from .errors import InputError
from .loss_inputs import are_labelled
from .losses import cross_entropy_loss
from .metrics import LongTailAccumulator, LongTailEvaluation
from .stopping import end_workers, outlive_sigterm
from .teacher import TEACHER_PREFIX


class EvaluationMeter:
    """Loss and metrics of an evaluation, accumulated per process and then merged; each example counts once.

    Args:
        accelerator: The trainer's.
        label_smoothing: For the cross-entropy.
        accumulator: For metrics; `None` to compute only the loss.
    """

    def __init__(self, accelerator: Accelerator, label_smoothing: float, accumulator: LongTailAccumulator | None):
        self.accelerator, self.label_smoothing, self.accumulator = accelerator, label_smoothing, accumulator
        self._sums = [torch.zeros(2, device=accelerator.device)]
        self._num_seen = 0
        #: Examples evaluated by this process; after `finish` by all.
        self.num_answers = 0

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch of this process, without the examples that pad the last global batch."""
        number, rank, state = len(labels), self.accelerator.process_index, self.accelerator.gradient_state
        first = self._num_seen + rank * number
        self._num_seen += self.accelerator.num_processes * number
        if state.end_of_dataloader and state.remainder > 0:
            number = min(max(state.remainder - rank * number, 0), number)
        if not number:
            return
        logits, labels = logits[:number], labels[:number]
        self.num_answers += number
        loss = cross_entropy_loss(logits, labels, self.label_smoothing, reduction="sum")
        self._sums.append(torch.stack([loss, are_labelled(labels).sum()]))
        if self.accumulator is not None:
            at_least_float32 = torch.promote_types(logits.dtype, torch.float32)
            logits, labels = logits.to("cpu", at_least_float32), labels.cpu()
            counted = are_labelled(labels)
            if counted.any():
                self.accumulator.update(logits[counted].numpy(), labels[counted].numpy(), first)

    def finish(self) -> dict[str, float]:
        """Merge the results of all processes, and return loss and metrics; all processes must call it."""
        sums = torch.stack(self._sums).cpu().double().sum(dim=0)
        gathered = gather_object([(sums, self.num_answers, self.accumulator)])
        all_sums, answers, accumulators = zip(*gathered, strict=True)
        self.num_answers = sum(answers)
        loss, number = sum(all_sums).tolist()
        found = {"loss": loss / number} if number else {}
        if self.accumulator is not None:
            self.accumulator = functools.reduce(LongTailAccumulator.merge, accumulators)
            found |= self.accumulator.scalars() if self.accumulator.num_images else {}
        return found


class MeasuringTrainer(Trainer):
    """A `Trainer` that counts each evaluation example once, and measures times by a monotonic clock."""

    #: The long-tail metrics; `None` without class counts.
    long_tail: LongTailEvaluation | None = None
    _is_measuring = False
    is_deepspeed_enabled: bool

    def __init__(self, *args: Any, **kwargs: Any):
        self._clock_offsets: dict[str, float] = {}
        super().__init__(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Create a loader as `Trainer`, which with persistent workers would return the loader of its own data set."""
        if eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset:
            return super().get_eval_dataloader(eval_dataset)
        return self.get_test_dataloader(eval_dataset)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        """Create a loader as `Trainer`; for evaluation, one that yields all examples in order."""
        if is_training:
            return super()._get_dataloader(*args, is_training=True, **kwargs)
        told, config = self.args, self.accelerator.dataloader_config
        of_training = told.dataloader_drop_last, told.train_sampling_strategy, config.even_batches
        told.dataloader_drop_last, told.train_sampling_strategy, config.even_batches = False, "sequential", True
        # Processes that read a set without length by themselves do not know which of their last examples pad.
        dispatches, config.dispatch_batches = config.dispatch_batches, None
        try:
            loader = super()._get_dataloader(*args, **kwargs)
            return outlive_sigterm(loader) if told.enable_jit_checkpoint else loader
        finally:
            told.dataloader_drop_last, told.train_sampling_strategy, config.even_batches = of_training
            config.dispatch_batches = dispatches

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as `Trainer`, with loss and metrics accumulated per process and then merged."""
        self._note_clock(metric_key_prefix)
        if self.is_fsdp_enabled and not self.accelerator._models:  # accelerate shards no model without its optimizer
            self.accelerator.prepare_model(self.model, device_placement=True, evaluation_mode=True)
        self._share_buffers()
        accumulator = None
        if self.long_tail is not None and self._is_measuring:
            prediction_loss_only, accumulator = True, self.long_tail.accumulator(self.long_tail.post_hoc_tau)
        elif self.long_tail is not None and not (self.compute_metrics or self.preprocess_logits_for_metrics):
            accumulator = self.long_tail.accumulator()
        self._evaluation = EvaluationMeter(self.accelerator, self.args.label_smoothing_factor, accumulator)
        uses_deepspeed, trains = self.is_deepspeed_enabled, self.deepspeed is not None
        self.is_deepspeed_enabled = uses_deepspeed and trains  # DeepSpeed accepts only models that it trains
        try:
            # Loaders draw from the global generator, depending on their workers; this must not affect training.
            with torch.random.fork_rng(devices=[]):
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
        finally:
            self.is_deepspeed_enabled = uses_deepspeed
            if dataloader not in getattr(self, "_eval_dataloaders", {}).values():  # so it is not used again
                end_workers(dataloader)
        found = self._evaluation.finish()
        dataset: Any = dataloader.dataset
        num_answers = self._evaluation.num_answers
        if has_length(dataset) and num_answers != len(dataset) and (num_answers or self._is_measuring):
            raise InputError(
                f"The evaluation has answers about {num_answers} of {len(dataset)} examples, so it is not what it is "
                "called. Check --accelerator_config, and that all examples have labels."
            )
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    @property
    def last_measured(self) -> LongTailAccumulator | None:
        """The long-tail metrics of the last evaluation, over all processes; `None` if none were accumulated."""
        return self._evaluation.accumulator

    def _share_buffers(self) -> None:
        """Broadcast the BatchNorm statistics of the main process, which it saves: each has its own after a step."""
        if self.accelerator.num_processes > 1:
            broadcast([each for each in self.model.buffers() if each.device.type == self.accelerator.device.type])

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Predict logits; other model outputs, such as hidden states, are not gathered."""
        inputs = self._prepare_inputs(inputs)
        loss, labels = None, inputs.get("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            if labels is None:
                outputs = model(**{k: v for k, v in inputs.items() if not k.startswith(TEACHER_PREFIX)})
            else:
                number = self._get_num_items_in_batch([inputs], self.args.device)
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=number)
        if labels is not None:
            self._evaluation.add(outputs.logits, labels)
        return (loss, None, None) if prediction_loss_only else (loss, outputs.logits, labels)

    def measure(self, dataset: Dataset, metric_key_prefix: str = "eval") -> tuple[dict, LongTailAccumulator]:
        """Measure the model as `predict` does, but without keeping logits; all processes must call it.

        Args:
            dataset: As for `predict`.
            metric_key_prefix: As for `predict`.

        Returns:
            The metrics of `predict`, and the accumulator over all examples, with post-hoc adjustment if the trainer's
            [`LongTailEvaluation`] has a τ.

        Raises:
            ValueError: Without class counts, or if the examples have no labels.
        """
        if self.long_tail is None:
            raise ValueError("Long-tail metrics need class_counts, or a train_dataset to count them in.")
        self._is_measuring = True
        try:
            metrics = self.predict(dataset, metric_key_prefix=metric_key_prefix).metrics
        finally:
            self._is_measuring = False
        assert metrics is not None
        assert self._evaluation.accumulator is not None
        return metrics, self._evaluation.accumulator

    # ---- Times, by a clock that does not jump ---------------------------------------------------------------------

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predict as `Trainer`."""
        output = super().predict(*args, **kwargs)
        self._take_off_clock_jumps(output.metrics or {})
        return output

    def _note_clock(self, prefix: str) -> None:
        """Note how the wall clock stands where `Trainer` begins what it reports as `{prefix}_runtime`."""
        self._clock_offsets[prefix] = _clock_offset()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer`."""
        self._take_off_clock_jumps(logs)
        super().log(logs, start_time)

    def _take_off_clock_jumps(self, metrics: dict[str, float]) -> None:
        """Correct times and speeds: `Trainer` uses the wall clock, which may be changed meanwhile."""
        for prefix, before in self._clock_offsets.items():
            name, jump = f"{prefix}_runtime", _clock_offset() - before
            if name in metrics and abs(jump) > 0.1:
                wrong, right = metrics[name], max(metrics[name] - jump, 1e-3)
                for speed in (f"{prefix}_samples_per_second", f"{prefix}_steps_per_second"):
                    if speed in metrics:
                        metrics[speed] = round(metrics[speed] * wrong / right, 3)
                metrics[name] = round(right, 4)


def _clock_offset() -> float:
    return time.time() - time.monotonic()
