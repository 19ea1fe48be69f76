"""The exceptions that scripts print as one line, and how they do."""

from __future__ import annotations

import sys


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


def tell(error: Exception) -> int:
    """Print an error as one line; return the exit code of a script: 2 for bad input, else 1."""
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, InputError) else 1


def first_line(error: BaseException) -> str:
    """What an error of another library says, as far as it fits into one of ours: without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
