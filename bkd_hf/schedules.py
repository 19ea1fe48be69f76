"""Learning-rate schedules that `transformers` does not have."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


class StepDecay:
    """Factor of the initial learning rate at an optimizer step: linear warm-up by epochs, then steps.

    As in the long-tail literature (Cao et al., 2019): constant within an epoch, (e + 1)/n of the rate in epoch e of n
    warm-up epochs, and given factors of the *initial* rate from given epochs on. For `LambdaLR`, which saves the
    attributes of such an object in its state.

    Args:
        steps_per_epoch: Optimizer steps per epoch.
        warmup_epochs: n.
        step_epochs: Increasing epochs, counted from 0.
        step_factors: As many factors.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        warmup_epochs: int = 0,
        step_epochs: Sequence[int] = (),
        step_factors: Sequence[float] = (),
    ):
        self.steps_per_epoch = steps_per_epoch
        self.warmup_epochs = warmup_epochs
        self.step_epochs = list(step_epochs)
        self.step_factors = list(step_factors)

    def __call__(self, step: int) -> float:
        epoch = step // self.steps_per_epoch
        if epoch < self.warmup_epochs:
            return (epoch + 1) / self.warmup_epochs
        num_passed = bisect_right(self.step_epochs, epoch)
        return self.step_factors[num_passed - 1] if num_passed else 1.0
