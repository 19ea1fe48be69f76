"""The exceptions that scripts print as one line, and how scripts print."""

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

#: Exit code after a stop that can be continued: EX_TEMPFAIL of sysexits.h, "the user is invited to retry".
STOPPED = 75


class InputError(ValueError):
    """Invalid input of the user; the message names the option, the value and a solution.

    Scripts print only the message, without a traceback. All other exceptions are bugs.
    """

    def __init__(self, message: str = ""):
        # For an error in a data loader's worker, torch raises a new one, with the worker's traceback as the message.
        is_passed_on = message.startswith("Caught InputError in ")
        super().__init__(message.rpartition("InputError: ")[2].strip() if is_passed_on else message)


class PublishError(RuntimeError):
    """The Hub rejected a publication; the message says why, and what to do.

    Attributes:
        is_temporary: Whether a retry may succeed: no connection, too many requests, an error of the Hub.
    """

    def __init__(self, message: str, is_temporary: bool):
        super().__init__(message)
        self.is_temporary = is_temporary


class TrainingStopped(SystemExit):
    """SIGTERM ended a training, or related work, early; if it is not caught, the process exits with code 75."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


def run_script(
    work: Callable[[], int | None], interrupted: str | Callable[[], str], *failures: type[Exception]
) -> int:
    """Run a script; return its exit code: 2 for bad input, 1 for failures, 130 for Ctrl-C, 75 for SIGTERM.

    Failures to print do not stop it: see [`keep_printing`].

    Args:
        work: The script's function; it returns the exit code, or `None` for 0.
        interrupted: Message after Ctrl-C or SIGTERM, or a function that returns it.
        failures: Further errors printed as one line with exit code 1, like those of the Hub and the disk.
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
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from a launcher after another process has ended
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: {told(interrupted)}", file=sys.stderr)
        return STOPPED


def why_not_stored(error: BaseException) -> str | None:
    """Say which file could not be written or read, and why; `None` for other errors."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"{error.filename or 'A file'}: {error.strerror}"
    # Write errors of safetensors and torch.
    if type(error).__name__ == "SafetensorError" and "os error" in str(error):
        return f"Weights cannot be written: {first_line(error).rpartition('I/O error: ')[2]}"
    if isinstance(error, RuntimeError) and "inline_container" in str(error) and "Reader" not in str(error):
        return "A checkpoint cannot be written: its disk is full, or takes no file of that size"
    return None


def why_alone(error: BaseException) -> str | None:
    """Say that another process of a run has ended or does not respond, if torch's error means that; else `None`."""
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
    """Let no print fail, even if the terminal lacks characters, the reader has gone, or the disk is full."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="replace"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):  # not replaced by a test or a notebook
            stream.flush()
            raw = _Unfailing(stream.fileno(), "w", closefd=False)
            # An unbuffered stream (`python -u`) writes directly; here there is a buffer, so each line is flushed.
            buffered, lines = io.BufferedWriter(raw), stream.line_buffering or stream.write_through
            safe = io.TextIOWrapper(buffered, stream.encoding, "replace", None, lines, stream.write_through)
            setattr(sys, name, safe)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Printable())


class _Unfailing(io.FileIO):
    """A file that drops what cannot be written, and reports it once, unless the reader has gone."""

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
    """First line of another library's error, without its full stop, for use in a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
