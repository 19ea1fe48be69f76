"""Atomic writes, checks whether files load, and folders locked by one process at a time."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
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
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]

#: Suffix of the file of an unfinished write.
UNFINISHED = ".tmp"
LOCK_NAME = "bkd_run.lock"

# Exceptions of parsers and decoders for damaged files.
_DAMAGED = (ValueError, TypeError, AttributeError, LookupError, SyntaxError, RecursionError)

# Errors of file systems without locks, e.g. of Lustre mounted without them.
_WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}

_held: dict[Path, IO[str]] = {}


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to; its content then replaces the file atomically, once it is on the disk.

    A reader finds the old file or the complete new one. The file gets the process's usual permissions.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())  # the content must reach the disk before the new name
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text atomically (see [`replacing`])."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def as_others_are(paths: Iterable[Path]) -> None:
    """Give files the process's usual permissions; safetensors makes its files readable only by their owner."""
    os.umask(umask := os.umask(0o077))
    for path in paths:
        path.chmod(0o666 & ~umask)


def try_json(path: Path) -> dict[str, Any] | None:
    """Return the content of a file; `None` if it does not exist, or is damaged."""
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
    """Say why a file (weights, a figure, a table, JSON or code) does not load or exist; `None` if it loads."""
    try:
        if not path.stat().st_size:
            return "it is empty"
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:  # compares the file's size with its header
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
    """Lock a folder for this process, until [`unlock`] or the end of the process, however it ends.

    Raises:
        InputError: If another process has locked it; the message says which.
    """
    path = Path(folder, LOCK_NAME).resolve()
    held = _held.get(path)
    if fcntl is None or (held and path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat())):
        return
    file = path.open("a+", encoding="utf-8")
    if _is_taken(file, fcntl.lockf):  # not flock(), which workers that outlive a killed process would keep
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InputError(f"{folder} is in use, by {holder}: wait for it, end it, or name another folder.")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    _held[path] = file


def unlock() -> None:
    """Release the locks of all folders."""
    while _held:
        _held.popitem()[1].close()


def holder_of(folder: str | os.PathLike[str]) -> str | None:
    """Say which other process has locked a folder, e.g. "process 7 on host, since …"; `None` if none has."""
    path = Path(folder, LOCK_NAME)
    if fcntl is None or path.resolve() in _held or not path.exists():
        return None
    with path.open("r+", encoding="utf-8") as file:
        return (file.read().strip() or "another process") if _is_taken(file, fcntl.lockf) else None


def is_open_in_a_run(log: IO[str]) -> bool:
    """Mark a log file as in use; True if another process, or a child of it, still writes to it.

    Child processes inherit the mark with the open file; it disappears when the last of them ends.
    """
    return fcntl is not None and _is_taken(log, fcntl.flock)


def _is_taken(file: IO[str], lock: Callable[[IO[str], int], Any]) -> bool:
    """Lock a file; True if another process has."""
    try:
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return False
