"""Handling of SIGTERM, with which schedulers preempt a machine: a training saves a checkpoint, and ends."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from .errors import TrainingStopped


@contextmanager
def at_sigterm(act: Callable[[], Any] | None) -> Iterator[None]:
    """Replace the handler of SIGTERM; without effect outside the main thread.

    Args:
        act: Called at any moment; `None` to change nothing.
    """
    if act is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def stop() -> None:
    """Raise [`TrainingStopped`], for work that may be lost or is already on disk."""
    raise TrainingStopped


class StopAtSigterm(TrainerCallback):
    """Stops a training after its current step at SIGTERM; all processes stop after the same step.

    transformers' own callback for `enable_jit_checkpoint` is not sufficient: it saves in the middle of a step, after
    BatchNorm's update but before that of the weights; the processes handle their signals separately, and stop at
    different steps; and it evaluates the unfinished epoch.

    Args:
        is_endless: Whether the whole training is a single epoch for `Trainer` (see `PassCounter`).

    Attributes:
        has_stopped: Whether this training ends early.
        saved_step: Step of the last checkpoint.
    """

    def __init__(self, is_endless: bool = False) -> None:
        self.is_endless = is_endless
        self._group: Any = None
        self._forget()

    def _forget(self) -> None:
        self.has_stopped, self.saved_step = False, -1
        self._is_asked = self._is_stepping = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM during a training.

        Raises:
            TrainingStopped: At SIGTERM outside of a step, or if something fails after SIGTERM, as other processes and
                data workers may have ended at the same signal.
        """
        self._forget()
        try:
            with at_sigterm(self._ask):
                yield
        except Exception as error:
            if self._is_asked:
                raise TrainingStopped from error
            raise
        finally:
            self._is_stepping = False
        if self._is_asked:  # after the last step: for other handlers
            signal.raise_signal(signal.SIGTERM)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Stop at once, during work whose partial results are kept, or that takes longer than a step."""
        was_stepping, self._is_stepping = self._is_stepping, False
        yield
        self._is_stepping = was_stepping

    def _ask(self) -> None:
        self._is_asked = True
        if not self._is_stepping:
            stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.enable_jit_checkpoint and _is_one_of_several() and distributed.get_backend() != "gloo":
            # On the host, as a collective on the devices would synchronise at each step.
            self._group = distributed.new_group(backend="gloo", timeout=args.ddp_timeout_delta)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_stepping = args.enable_jit_checkpoint

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_stepping and self._is_anyone_asked():
            self.has_stopped = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_in_epoch = self.is_endless or state.epoch != int(state.epoch)
        if self.has_stopped and is_in_epoch and state.global_step < state.max_steps:
            # These follow when the training continues.
            control.should_log = control.should_evaluate = control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_step = state.global_step

    def _is_anyone_asked(self) -> bool:
        if not _is_one_of_several():
            return self._is_asked
        asked = torch.tensor(int(self._is_asked))
        distributed.all_reduce(asked, distributed.ReduceOp.MAX, group=self._group)
        return bool(asked)


def _is_one_of_several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


# ---- Workers of loaders -------------------------------------------------------------------------------------------


def outlive_sigterm(loader: DataLoader) -> DataLoader:
    """Let the workers of a loader survive a SIGTERM that goes to all processes, as SLURM sends it.

    Otherwise they would end, and the step that needs them would fail.
    """
    inner: Any = getattr(loader, "base_dataloader", loader)
    inner.worker_init_fn = functools.partial(_start_worker, inner.worker_init_fn)
    return loader


def end_workers(loader: DataLoader | None) -> None:
    """End the idle workers of a loader at once: garbage collection would wait 5 seconds for each of them."""
    inner: Any = getattr(loader, "base_dataloader", loader)
    if getattr(inner, "_iterator", None) is not None:
        inner._iterator = None  # its workers end with it


def _start_worker(then: Callable[[int], None] | None, number: int) -> None:
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says, daemon=True).start()
    if then is not None:
        then(number)


def _end_when_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
