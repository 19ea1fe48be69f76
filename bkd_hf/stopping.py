"""What happens at SIGTERM, by which schedulers take a machine back: a training keeps what it has learned, and ends."""

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

#: Exit code of what was stopped and can be continued: EX_TEMPFAIL of sysexits.h, "the user is invited to retry".
STOPPED = 75


class TrainingStopped(SystemExit):
    """SIGTERM ended a training, or what goes with it, early; if nobody catches it, the process ends with code 75."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


@contextmanager
def at_sigterm(act: Callable[[], Any] | None) -> Iterator[None]:
    """Call a function when SIGTERM comes, instead of what was called so far; a thread of a program cannot have that.

    Args:
        act: Called in the midst of anything; `None` to change nothing.
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
    """Raise [`TrainingStopped`]: for work that is lost, or on disk already."""
    raise TrainingStopped


class StopAtSigterm(TrainerCallback):
    """Has a training that gets SIGTERM stop after the step that it is in; all processes stop after the same one.

    transformers' own callback for `enable_jit_checkpoint` would not do: it saves in the middle of a step, when
    BatchNorm has seen it and the weights have not; each process sees its own signal, seconds later, so that several
    stop at different steps; and the evaluation of an epoch that is not over follows.

    Attributes:
        has_stopped: Whether this training is to end before its time.
        saved_step: Step of the last checkpoint.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._forget()

    def _forget(self) -> None:
        self.has_stopped, self.saved_step = False, -1
        self._is_asked = self._is_stepping = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen, while a training goes on.

        Raises:
            TrainingStopped: At SIGTERM where no step is to be finished, or if something fails after it: other
                processes, and the workers of loaders, may have got it too, and be gone.
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
        if self._is_asked:  # after the last step: for whoever listens else
            signal.raise_signal(signal.SIGTERM)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Stop in the midst of something that is kept as far as it comes, or takes longer than a step."""
        self._is_stepping = False
        yield
        self._is_stepping = True

    def _ask(self) -> None:
        self._is_asked = True
        if not self._is_stepping:
            stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.enable_jit_checkpoint and _is_one_of_several() and distributed.get_backend() != "gloo":
            # On the host: to ask the devices, each step would have to wait for them.
            self._group = distributed.new_group(backend="gloo", timeout=args.ddp_timeout_delta)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_stepping = args.enable_jit_checkpoint

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_stepping and self._is_anyone_asked():
            self.has_stopped = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.has_stopped and state.epoch != int(state.epoch) and state.global_step < state.max_steps:
            # It goes on when the training does.
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
    """Have the workers of a loader outlive a SIGTERM that goes to all processes, as SLURM sends it.

    torch would have them die of it, and the step that they work for fail.
    """
    inner: Any = getattr(loader, "base_dataloader", loader)
    inner.worker_init_fn = functools.partial(_start_worker, inner.worker_init_fn)
    return loader


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
