"""The exceptions that scripts print as one line, and how they do."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable


class InputError(ValueError):
    """What the user gave cannot work; the message names the option, the value and the way out.

    Scripts print the message alone, without a traceback. Everything else that is raised is a bug.
    """


class PublishError(RuntimeError):
    """The Hub did not take what was to be published; the message says why and how to go on.

    Attributes:
        is_temporary: Whether the same may succeed later: no connection, too many requests, a fault of the Hub.
    """

    def __init__(self, message: str, is_temporary: bool):
        super().__init__(message)
        self.is_temporary = is_temporary


def run_script(work: Callable[[], int | None], interrupted: str, *failures: type[Exception]) -> int:
    """Do the work of a script; return its exit code: 2 for bad input, 1 if Hub or disk do not take it, 130 for Ctrl-C.

    Args:
        work: What the script does; what it returns is the exit code, 0 for `None`.
        interrupted: What to say after Ctrl-C.
        failures: Further errors that are one line and the exit code 1.
    """
    warnings.formatwarning = lambda message, category, *_: (
        f"warning: {message}\n" if category is UserWarning else f"{category.__name__}: {message}\n"
    )
    one_line: tuple[type[Exception], ...] = (InputError, PublishError, *failures)
    try:
        return work() or 0
    except one_line as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except Exception as error:
        reason = why_not_stored(error)
        if reason is None:
            raise
        print(f"error: {reason}. What was computed before is kept: {interrupted}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130


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


def first_line(error: BaseException) -> str:
    """What an error of another library says, as far as it fits into one of ours: without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
