"""Reading arbitrary files: every fault is one `InputError`, and reading never blocks."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard
from yaml import YAMLError

from .errors import InputError, first_line
from .text import one_line

_DEEPEST = 30  # nested lists and objects


def check_file(path: str | os.PathLike[str]) -> os.stat_result:
    """Return the status of a file.

    Raises:
        OSError: If it does not exist, or is a pipe, a device, a socket or a folder, which have no end.
    """
    try:
        status = os.stat(path)
    except ValueError as error:  # not a valid file name
        raise FileNotFoundError(errno.ENOENT, f"there cannot be such a file: {first_line(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    return status


def read_text(path: str | os.PathLike[str], kind: str = "text") -> str:
    """Return the text in a file.

    Args:
        path: The file.
        kind: What it should hold, for the message.

    Raises:
        InputError: If it cannot be read, or is not UTF-8.
    """
    try:
        check_file(path)
        text = Path(path).read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds zeros, as UTF-16 does")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{path} cannot be read as {kind}: {first_line(error)}. Save it as UTF-8.") from error
    return text


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return what a JSON file holds.

    Raises:
        InputError: If it is not JSON, or an object in it repeats a name.
    """
    text = read_text(path, "JSON")
    try:
        content = json.loads(text, object_pairs_hook=_each_once)
        level = [content]
        for _ in range(_DEEPEST):
            level = [inner for part in level if isinstance(part, (dict, list)) for inner in _inside(part)]
        if level:
            raise ValueError("it is nested too deeply")
        return content
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: its text is no JSON ({first_line(error)}).") from error


def read_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of a card of the Hub.

    Raises:
        InputError: If it cannot be read, or they are not YAML.
    """
    text = read_text(path)
    try:
        return RepoCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, AttributeError, YAMLError) as error:
        reason = one_line(error)
        raise InputError(
            f"{path}: its metadata, between the lines ---, are no YAML: {reason}. Repair them."
        ) from error


def _inside(part: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return part.values() if isinstance(part, dict) else part


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


def read_option_file(option: str, path: str | Path) -> str:
    """Return the content of a text file that an option names; raises an `InputError` if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"--{option} {path} is not in UTF-8: {error}. Save it in UTF-8.") from error
    except (OSError, ValueError) as error:  # ValueError: not a valid file name
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--{option} {one_line(path, 80)} cannot be read: {why}.") from error
