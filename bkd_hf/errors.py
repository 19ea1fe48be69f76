"""The exceptions that scripts print as one line, how they do, and how they print at all."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

from .text import one_line, printable

#: Exit code of what was stopped and can be continued: EX_TEMPFAIL of sysexits.h, "the user is invited to retry".
STOPPED = 75


class InputError(ValueError):
    """What the user gave cannot work; the message names the option, the value and the way out.

    Scripts print the message alone, without a traceback. Everything else that is raised is a bug.
    """

    def __init__(self, message: str = ""):
        # From a worker of a data loader torch raises it anew, with the worker's traceback as the message.
        is_passed_on = message.startswith("Caught InputError in ")
        super().__init__(message.rpartition("InputError: ")[2].strip() if is_passed_on else message)


class PublishError(RuntimeError):
    """The Hub did not take what was to be published; the message says why and how to go on.

    Attributes:
        is_temporary: Whether the same may succeed later: no connection, too many requests, a fault of the Hub.
    """

    def __init__(self, message: str, is_temporary: bool):
        super().__init__(message)
        self.is_temporary = is_temporary


class TrainingStopped(SystemExit):
    """SIGTERM ended a training, or what goes with it, early; if nobody catches it, the process ends with code 75."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


def run_script(
    work: Callable[[], int | None], interrupted: str | Callable[[], str], *failures: type[Exception]
) -> int:
    """Do the work of a script; return its exit code: 2 for bad input, 1 for failures, 130 for Ctrl-C, 75 for SIGTERM.

    What fails to be printed does not stop it: see [`keep_printing`].

    Args:
        work: What the script does; what it returns is the exit code, 0 for `None`.
        interrupted: What to say after Ctrl-C or SIGTERM, or what finds that out then.
        failures: Further errors that are one line and the exit code 1, as those of the Hub and of the disk are.
    """
    keep_printing()
    warnings.formatwarning = lambda message, category, *_: (
        f"{'warning' if category is UserWarning else category.__name__}: {one_line(message)}\n"
    )

    def told(message: str | Callable[[], str]) -> str:
        return message if isinstance(message, str) else message()

    one_line_each: tuple[type[Exception], ...] = (InputError, PublishError, *failures)
    try:
        return work() or 0
    except one_line_each as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except Exception as error:
        reason = why_not_stored(error) or why_alone(error)
        if reason is None:
            raise
        print(f"error: {reason}. What was computed before is kept: {told(interrupted)}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {told(interrupted)}", file=sys.stderr)
        return 130
    except TrainingStopped:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a launcher, whose other process has ended first
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: {told(interrupted)}", file=sys.stderr)
        return STOPPED


def why_not_stored(error: BaseException) -> str | None:
    """Say which file could not be written or read, and why, if it is that which an error tells; else `None`."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"{error.filename or 'A file'}: {error.strerror}"
    # How safetensors and torch fail to write.
    if type(error).__name__ == "SafetensorError" and "os error" in str(error):
        return f"Weights cannot be written: {first_line(error).rpartition('I/O error: ')[2]}"
    if isinstance(error, RuntimeError) and "inline_container" in str(error) and "Reader" not in str(error):
        return "A checkpoint cannot be written: its disk is full, or takes no file of that size"
    return None


def why_alone(error: BaseException) -> str | None:
    """Say that another process of a run is gone or silent, if an error of torch tells that; else `None`."""
    names = {kind.__name__ for kind in type(error).__mro__}
    is_of_gloo = isinstance(error, RuntimeError) and re.search("gloo|pair closure", str(error))
    if "DistError" not in names and not is_of_gloo:
        return None
    said = re.sub(r"^\[\S*\] ", "", first_line(error))
    return (
        f"Another process of this run has ended, or has been silent for as long as --ddp_timeout says ({said}). What "
        "it printed last says why"
    )


def keep_printing() -> None:
    """Let no print fail, whatever the terminal can show, whether anybody reads, and whether the disk is full."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed by whoever began this process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):  # not what a test or a notebook put there
            stream.flush()
            raw = _Unfailing(stream.fileno(), "w", closefd=False)
            # An unbuffered one, as of `python -u`, writes through to where nothing waits; here the buffer does.
            buffered, lines = io.BufferedWriter(raw), stream.line_buffering or stream.write_through
            safe = io.TextIOWrapper(buffered, stream.encoding, "replace", None, lines, stream.write_through)
            setattr(sys, name, safe)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Printable())


class _Unfailing(io.FileIO):
    """A file that drops what cannot be written, and says so once, unless the reader has gone."""

    _said = False

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if not (self._said or isinstance(error, BrokenPipeError) or self.fileno() == 2):
                self._said = True
                print(f"warning: what is printed gets lost ({error.strerror}); the work goes on.", file=sys.stderr)
            return len(content)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def first_line(error: BaseException) -> str:
    """What an error of another library says, as far as it fits into one of ours: without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
