"""Several machines (nodes), with or without a shared disk: the main process decides, and its files count.

Without a shared disk, checkpoints and results are only on the main node. Files that the other nodes must read, a
checkpoint or the trained teacher, are sent to them.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .errors import InputError
from .files import UNFINISHED, replacing, write_text

T = TypeVar("T")

_PATIENCE = 3.0  # seconds after which other machines see a new file on a shared disk
_PART = 1 << 26  # bytes sent at a time
_seen: dict[Path, tuple[bool, bool]] = {}


def on_main_process(work: Callable[[], T]) -> T:
    """Call a function in the main process only, and return its result in all. All processes must call this.

    Raises:
        InputError: In all processes, if the function raises one.
    """
    found: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            found = [work()]
        except InputError as error:
            found = [error]
    outcome = broadcast_object_list(found)[0]
    if isinstance(outcome, InputError):
        raise outcome
    return outcome


@contextmanager
def in_turn() -> Iterator[None]:
    """Let the main process go first, then one of each other node, then the rest, for shared and separate disks."""
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        yield


def check_same(told: T, refusal: Callable[[T, T], str]) -> None:
    """Check that a value is the same in all processes. All must call it.

    Args:
        told: The value in this process.
        refusal: Called with the main process's value and another process's; returns the error message.

    Raises:
        InputError: In all processes.
    """
    first, *others = gather_object([told])
    for other in others:
        if other != first:
            raise InputError(refusal(first, other))


def sees_main_disk(folder: Path) -> tuple[bool, bool]:
    """Return whether this process sees the main process's folder, and whether all do. All must call it.

    The main process writes a file there, for which all look; the result is cached for a folder and its contents.
    """
    state, folder = PartialState(), folder.absolute()
    if state.num_processes == 1 or sum(gather_object([state.is_local_main_process])) == 1:
        return True, True
    for known in (folder, *folder.parents):
        if known in _seen:
            return _seen[known]
    path, token = folder / f".node{UNFINISHED}", on_main_process(lambda: uuid.uuid4().hex)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, token)
    state.wait_for_everyone()
    end, is_seen = time.monotonic() + _PATIENCE, False
    while not is_seen and time.monotonic() < end:
        with suppress(OSError):
            is_seen = path.read_text(encoding="utf-8") == token
        time.sleep(0 if is_seen else 0.1)
    found = is_seen, all(gather_object([is_seen]))
    if state.is_main_process:
        path.unlink(missing_ok=True)
    _seen[folder] = found
    return found


def send_folder(folder: Path, run_folder: Path) -> None:
    """Send the files of a folder (not its subfolders) to nodes that do not see the main node's disk.

    Args:
        folder: A folder of a run. All processes must call this, each with its own path.
        run_folder: The run's folder.
    """
    sees, all_see = sees_main_disk(run_folder)
    if all_see:
        return
    state = PartialState()
    receives = state.is_local_main_process and not sees
    if receives:
        folder.mkdir(parents=True, exist_ok=True)
    for name in on_main_process(lambda: sorted(path.name for path in folder.iterdir() if path.is_file())):
        with ExitStack() as files:
            path = files.enter_context(replacing(folder / name)) if receives else os.devnull
            target = files.enter_context(open(path, "wb"))
            source: Any = files.enter_context(open(folder / name if state.is_main_process else os.devnull, "rb"))
            while part := on_main_process(functools.partial(source.read, _PART)):
                target.write(part)
    state.wait_for_everyone()


@contextmanager
def kept_by_main(folder: Path, run_folder: Path) -> Iterator[Path]:
    """Yield a folder to write to, whose files end up in this folder on the main node's disk. All must call it."""
    sees, all_see = sees_main_disk(run_folder)
    if all_see:
        yield folder
        return
    with tempfile.TemporaryDirectory() as elsewhere:
        own = folder if sees else Path(elsewhere)
        yield own
        written = {} if sees else {path.name: path.read_bytes() for path in own.iterdir()}
    for files in gather_object([written]):
        for name, content in files.items() if PartialState().is_main_process else ():
            (folder / name).write_bytes(content)
