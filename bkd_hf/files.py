"""Files that are whole or not there, whether they load, and folders that one process holds at a time."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors import SafetensorError, safe_open

from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

#: What the file of an unfinished write ends with.
UNFINISHED = ".tmp"
LOCK_NAME = "bkd_run.lock"

# What parsers and decoders raise for damaged files.
_DAMAGED = (ValueError, TypeError, AttributeError, LookupError, SyntaxError, RecursionError)

_held: dict[Path, IO[str]] = {}


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to; what is there then becomes the file, in one step, when all of it is on the disk.

    A reader finds the old file or the whole new one. The file's permissions are those that the process gives any.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())  # its new name must not reach the disk before its content
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text as [`replacing`] does."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def as_others_are(paths: Iterable[Path]) -> None:
    """Give files the permissions that this process gives any: safetensors leaves its own to their owner alone."""
    os.umask(umask := os.umask(0o077))
    for path in paths:
        path.chmod(0o666 & ~umask)


def try_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a file; `None` if it is not there, or is not whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # ValueError: neither JSON nor text
        return None
    return content if isinstance(content, dict) else None


def hash_of(path: Path) -> str:
    """Hash of a file's content, 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def why_broken(path: Path) -> str | None:
    """Say why a file of weights, a figure, a table, JSON or code does not load, or is not there; `None` if it does."""
    try:
        if not path.stat().st_size:
            return "it is empty"
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:  # compares the file's size with what its header tells
                return None if file.keys() else "it holds no weights"
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".parquet":
            pq.read_metadata(path)
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if path.name.endswith(".index.json"):
                missing = {name for name in content["weight_map"].values() if not path.with_name(name).is_file()}
                return f"{min(missing)}, which it names, is missing" if missing else None
        elif path.suffix == ".py":
            ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SafetensorError, pa.ArrowException, *_DAMAGED) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


# ---- Locks --------------------------------------------------------------------------------------------------------


def lock(folder: str | os.PathLike[str]) -> None:
    """Hold a folder for this process, until [`unlock`] or the end of the process, however it comes.

    Raises:
        InputError: If another process holds it; the message says which.
    """
    path = Path(folder, LOCK_NAME).resolve()
    held = _held.get(path)
    if fcntl is None or (held and path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat())):
        return
    file = path.open("a+", encoding="utf-8")
    if _is_taken(file):
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(f"{folder} is in use, by {holder}: wait for it, end it, or name another folder.")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    _held[path] = file


def unlock() -> None:
    """Let go of all folders."""
    while _held:
        _held.popitem()[1].close()


def holder_of(folder: str | os.PathLike[str]) -> str | None:
    """Say which other process holds a folder, e.g. "process 7 on host, since …"; `None` if nobody does."""
    path = Path(folder, LOCK_NAME)
    if fcntl is None or path.resolve() in _held or not path.exists():
        return None
    with path.open("r+", encoding="utf-8") as file:
        return (file.read().strip() or "another process") if _is_taken(file) else None


def is_open_in_a_run(log: IO[str]) -> bool:
    """Mark what a process is to print to; True if that of another is, by which it or a child of it still prints.

    The mark goes with the open file, from process to process, and away with the last that has it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _is_taken(file: IO[str]) -> bool:
    """Lock a file; True if another process has."""
    try:
        # Not flock(), which workers that outlive a killed process would go on holding.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    return False
