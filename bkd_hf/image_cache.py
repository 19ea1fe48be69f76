"""Decoded images in files that all processes of a machine share: written once, mapped into memory by each.

An entry of the cache is a folder: for each kind of image one file with the pixels of all, one image after another, and
one with their sizes. One process writes it, under another name, and renames it when it is whole: what has its own name
is complete, and what a killed process left behind is removed by the next that writes. Entries never change; to free
the disk, delete them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import filelock
import numpy as np
from transformers.utils import logging

logger = logging.get_logger(__name__)

_PARTIAL, _LOCK = ".partial", ".lock"


class MappedImages:
    """Images of one kind in an entry of the cache, read from the disk, or from what memory has of it, when looked at.

    Pickled as its place on the disk: it costs nothing to send it to a worker.

    Args:
        folder: The entry.
        name: What this kind of image is called in it.

    Raises:
        OSError: If there is no such entry.
        ValueError: If it is damaged.
    """

    def __init__(self, folder: Path, name: str):
        self._place = (folder, name)
        self._sizes = np.load(folder / f"{name}.sizes.npy")
        self._ends = np.cumsum(3 * self._sizes.prod(axis=1))
        # A plain view of the map: indexing numpy's memmap class itself takes several times as long.
        path = folder / f"{name}.pixels"
        self._pixels = np.zeros(0, np.uint8)  # as a file without content cannot be mapped
        if path.stat().st_size:
            self._pixels = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        if self._pixels.size != self._ends[-1]:
            raise ValueError(f"{self._pixels.size} bytes of {name}, where there should be {self._ends[-1]}")

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int | np.ndarray) -> np.ndarray:
        """An image: H×W×3 bytes, read-only. Or, of an array of B indices into images of one size, B×H×W×3 bytes."""
        if isinstance(index, np.ndarray):
            return self._pixels.reshape(len(self), *self._sizes[0], 3)[index]
        (height, width), end = self._sizes[index], self._ends[index]
        return self._pixels[end - 3 * height * width : end].reshape(height, width, 3)

    def __reduce__(self) -> tuple[type[MappedImages], tuple[Path, str]]:
        return MappedImages, self._place


def shared_images(
    folder: Path,
    names: Sequence[str],
    decode: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    num_bytes: Callable[[], float],
) -> dict[str, MappedImages]:
    """Open an entry of the cache; write it before, if there is none.

    Processes may call this at the same time: one writes, the others wait for it.

    Args:
        folder: The entry; its name should say all that the images depend on.
        names: The kinds of images.
        decode: Yields the images of all kinds, H×W×3 bytes, of one example (of at least one) after another.
        num_bytes: Says how large all images are, about.

    Returns:
        The images of each kind.

    Raises:
        OSError: If they do not fit on the disk, or cannot be written there.
    """
    images = _open(folder, names)
    if images is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}{_LOCK}"):
            images = _open(folder, names)  # another process may have written it in the meantime
            if images is None:
                _remove_what_is_not_whole(folder)
                needed, free = num_bytes(), shutil.disk_usage(folder.parent).free
                if needed > free:
                    raise OSError(f"{needed / 1e9:.1f} GB are needed there, {free / 1e9:.1f} GB are free")
                _write(folder, names, decode)
                images = {name: MappedImages(folder, name) for name in names}
    return images


def _open(folder: Path, names: Sequence[str]) -> dict[str, MappedImages] | None:
    try:
        return {name: MappedImages(folder, name) for name in names}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logger.warning(f"The decoded images in {folder} cannot be read, and are decoded anew: {error}.")
        return None


def _remove_what_is_not_whole(folder: Path) -> None:
    """Remove what killed processes left, of this entry (whose lock is held) and of others, and this entry itself."""
    shutil.rmtree(folder, ignore_errors=True)
    for partial in folder.parent.glob(f"*{_PARTIAL}"):
        entry = partial.with_name(partial.name.removesuffix(_PARTIAL))
        if entry == folder:
            shutil.rmtree(partial)
            continue
        try:
            with filelock.FileLock(f"{entry}{_LOCK}", timeout=0):  # nobody is writing it
                shutil.rmtree(partial, ignore_errors=True)
        except filelock.Timeout:
            pass


def _write(folder: Path, names: Sequence[str], decode: Callable[[], Iterable[Mapping[str, np.ndarray]]]) -> None:
    partial = folder.with_name(folder.name + _PARTIAL)
    partial.mkdir()
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(partial / f"{name}.pixels", "wb")) for name in names}
            sizes: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}
            for images in decode():
                for name, file in files.items():
                    file.write(np.ascontiguousarray(images[name]).data)
                    sizes[name].append(images[name].shape[:2])
            for name, file in files.items():
                np.save(partial / f"{name}.sizes.npy", np.array(sizes[name], dtype=np.int64))
                file.flush()
                os.fsync(file.fileno())  # its new name must not reach the disk before its content
        partial.rename(folder)
    except BaseException:  # the disk is full, an image is broken, Ctrl-C
        shutil.rmtree(partial, ignore_errors=True)
        raise
