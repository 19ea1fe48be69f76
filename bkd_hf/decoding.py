"""Decoding of stored images, and caches of decoded images."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import filelock
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.utils import logging

from .data import IMAGE_COLUMN
from .errors import InputError, first_line
from .reading import check_file
from .views import Box

logger = logging.get_logger(__name__)

# Formats that can be decoded at 1/2, 1/4 and 1/8 of the size; MPO is several JPEGs in a file.
_REDUCIBLE_FORMATS = ("JPEG", "MPO")
# EXIF orientations in which the stored image's rows are columns; its last column, or row, comes first.
_TURNED, _FROM_THE_RIGHT, _FROM_BELOW = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
# After one broken image: how long to search for others, and how many to name.
_SEARCH_SECONDS, _MOST_NAMED = 20.0, 10


class StoredImages:
    """The stored images of a data set: `bytes`, or None and the `path` of a file.

    They are read directly from the data set's table, as its own indexing takes five times as long, a third of the time
    to decode 32×32 pixels. Pickling stores the files that the table is mapped from.
    """

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset.select_columns([IMAGE_COLUMN]).cast_column(IMAGE_COLUMN, datasets.Image(decode=False))
        self._column = self.dataset.data.column(IMAGE_COLUMN)
        self._rows = None if self.dataset._indices is None else self.dataset._indices.column(0)

    def __reduce__(self) -> tuple[type[StoredImages], tuple[datasets.Dataset]]:
        return StoredImages, (self.dataset,)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._column[index if self._rows is None else self._rows[index].as_py()].as_py()


@contextmanager
def reading(images: StoredImages | Sequence[dict[str, Any]], index: int) -> Iterator[dict[str, Any]]:
    """Yield a stored image for decoding, e.g. by [`decode_image`]; an `InputError` names the broken ones."""
    stored = images[index]
    try:
        yield stored
    except InputError:
        raise
    except Exception as error:  # PIL's decoders may raise any exception
        reason = "it is no image of a known format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise InputError(
            f"Image {index}{_place(stored)} cannot be decoded: {reason}.{_others_broken(images, index)} "
            "Repair what is broken, or remove it from the data set."
        ) from error


def _place(stored: dict[str, Any] | None) -> str:
    return f" ({stored['path']})" if stored and stored.get("path") else ""


def _others_broken(images: StoredImages | Sequence[dict[str, Any]], known: int) -> str:
    """Name the other images that cannot be decoded, as far as they are found in `_SEARCH_SECONDS`."""
    broken, searched, end = [], 0, time.monotonic() + _SEARCH_SECONDS
    while searched < len(images) and (searched == 0 or time.monotonic() < end):
        try:
            decode_image(images[searched])
        except Exception:  # as in `reading`
            broken.append(searched)
        searched += 1
    broken = [index for index in broken if index != known]
    named = ", ".join(f"{index}{_place(images[index])}" for index in broken[:_MOST_NAMED])
    named += ", …" if len(broken) > _MOST_NAMED else ""
    found = f" Nor can {len(broken):,} more: {named}." if broken else ""
    return found if searched == len(images) else f"{found} Only {searched:,} of {len(images):,} were looked at."


def decode_image(stored: dict[str, Any]) -> Image.Image:
    """Decode an image as `datasets` stores it (`{"bytes", "path"}`) to RGB, upright as its EXIF data says."""
    with open_image(stored) as image:
        return upright_rgb(image)


def decode_part(
    stored: dict[str, Any],
    choose: Callable[[int, int], tuple[Box, bool]],
    sizes: Sequence[tuple[int, int]] | None,
) -> tuple[Image.Image, Box, bool]:
    """Decode only as much of an image as is needed to show a part of it.

    A JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8 of its size at which the part is still as large as it
    will be shown; the decoder skips the fine detail. Other formats are decoded in full. For views of 224×224 pixels
    this takes 0.5 times as long with photographs of 2000×1500, 0.8 times with 1024×768, and saves nothing with
    500×375, whose crops need all pixels. Pixels of these views differ by 0.6 to 1.2 of 255 on average.

    Args:
        stored: As for [`decode_image`].
        choose: Called with width and height of the upright image; returns the part, and whether it is mirrored.
        sizes: Width and height in pixels at which each model will see the part; `None` to decode in full.

    Returns:
        The image, RGB and upright, the part's place in it, and whether it is mirrored.
    """
    with open_image(stored) as image:
        if sizes is None or image.format not in _REDUCIBLE_FORMATS:
            image = upright_rgb(image)
            box, mirrored = choose(*image.size)
            return image, box, mirrored
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        width, height = image.size[::-1] if orientation in _TURNED else image.size
        (left, top, right, bottom), mirrored = choose(width, height)
        spare = min(min((right - left) / w, (bottom - top) / h) for w, h in sizes)
        factor = next((factor for factor in (8, 4, 2) if factor <= spare), 1)
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
        image = upright_rgb(image)
        # The decoder pads the last column and row; if these come first now, everything else is shifted.
        x = image.width - width / factor if orientation in _FROM_THE_RIGHT else 0
        y = image.height - height / factor if orientation in _FROM_BELOW else 0
        return image, (left / factor + x, top / factor + y, right / factor + x, bottom / factor + y), mirrored


def may_be_reduced(image: Image.Image, sizes: Sequence[tuple[int, int]] | None) -> bool:
    """Whether [`decode_part`] decodes some parts of a stored image at half of its size or less."""
    if sizes is None or image.format not in _REDUCIBLE_FORMATS:
        return False
    either_way_up = (image.size, image.size[::-1])
    return any(all(w >= 2 * width and h >= 2 * height for width, height in sizes) for w, h in either_way_up)


def open_image(stored: dict[str, Any]) -> Image.Image:
    if stored["bytes"] is None:
        check_file(stored["path"])  # reading a pipe would block
    return Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"])


def upright_rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # convert() would clip these
        image = Image.fromarray(_eight_bits(np.asarray(image), image.mode))
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; avoids a Pillow warning that names no file
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Bytes of 16-bit, 32-bit and floating-point images; if the mode does not define white, the values determine it.

    Raises:
        ValueError: If they do not determine it.
    """
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= (255 if mode == "F" else 65535)):
        known = "0 to 1 or 0 to 255" if mode == "F" else "0 to 255 or 0 to 65535"
        raise ValueError(f"its values run from {low:g} to {high:g}, where {known} is understood")
    if mode == "F":
        return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    if mode != "I" and 0 < high < 4096:
        logger.warning_once(
            "A 16-bit image has only values below 4096, and becomes nearly black, as 65535 is white. If the images of "
            "this data set have 8 or 12 bits, scale them to 16 first."
        )
    # Some versions of Pillow open 16-bit files as 32-bit ones.
    return (values >> (0 if mode == "I" and high <= 255 else 8)).astype(np.uint8)


# ---- Decoded images, kept -----------------------------------------------------------------------------------------


class KeptImages:
    """Decoded images one after another, followed by their sizes and a checksum, in memory or in a mapped file.

    A file is pickled as its path, so sending it to a worker is cheap.

    Args:
        source: Output of `write`: bytes, or a file.
        number: N, the number of images.

    Raises:
        OSError: If the file does not exist, or cannot be read.
        ValueError: If it is damaged.
    """

    def __init__(self, source: Path | bytes, number: int):
        self._source = source
        # A plain view of the map, as indexing numpy's memmap class takes several times as long.
        content = (
            np.memmap(source, np.uint8, "r").view(np.ndarray)
            if isinstance(source, Path)
            else np.frombuffer(source, np.uint8)
        )
        self._all, self._checksum = content[:-16], content[-16:].tobytes()
        self._pixels, sizes = self._all[: -16 * number], self._all[-16 * number :]
        self._sizes = np.frombuffer(sizes.tobytes(), np.int64).reshape(number, 2)
        self._ends = np.cumsum(3 * self._sizes.prod(axis=1))
        if self._pixels.size != self._ends[-1]:
            raise ValueError(f"{self._pixels.size} bytes, where there should be {self._ends[-1]}")

    def __reduce__(self) -> tuple[type[KeptImages], tuple[Path | bytes, int]]:
        return KeptImages, (self._source, len(self._sizes))

    def __getitem__(self, index: int) -> np.ndarray:
        """H×W×3 bytes, read-only."""
        (height, width), end = self._sizes[index], self._ends[index]
        return self._pixels[end - 3 * height * width : end].reshape(height, width, 3)

    @property
    def rows(self) -> np.ndarray:
        """N rows of bytes: all images, if they have the same size."""
        return self._pixels.reshape(len(self._sizes), -1)

    def check(self) -> KeptImages:
        """Read everything (a second per GB) and return this; raise a `ValueError` if it is not what was written."""
        if hashlib.blake2b(self._all.data, digest_size=16).digest() != self._checksum:
            raise ValueError("its checksum is wrong")
        return self

    @staticmethod
    def write(file: BinaryIO, images: Iterable[np.ndarray]) -> None:
        """Write images, each H×W×3 bytes."""
        sizes, digest = [], hashlib.blake2b(digest_size=16)

        def write(part: Any) -> None:
            file.write(part)
            digest.update(part)

        for image in images:
            write(np.ascontiguousarray(image).data)
            sizes.append(image.shape[:2])
        write(np.array(sizes, np.int64).tobytes())
        file.write(digest.digest())


def shared_images(
    path: Path, number: int, decode: Callable[[], Iterable[np.ndarray]], num_bytes: Callable[[], float]
) -> KeptImages:
    """Map a file of decoded images; create it first if it does not exist.

    If several processes call this at the same time, one writes, and the others wait for it. A file gets its name only
    when it is complete, and never changes. The next writer removes what a killed process left behind. To free disk
    space, delete the files.

    Args:
        path: The file; its name should include everything that the images depend on.
        number: Number of images.
        decode: Yields them, H×W×3 bytes each.
        num_bytes: Returns their approximate total size.

    Raises:
        OSError: If they do not fit on the disk, or cannot be written.
    """
    if (images := _mapped(path, number)) is not None:
        return images
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        if (images := _mapped(path, number)) is not None:  # written by another process in the meantime
            return images
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        for left in path.parent.glob("*.partial"):
            with suppress(filelock.Timeout), filelock.FileLock(left.with_suffix(".lock"), timeout=0):
                left.unlink(missing_ok=True)  # no process is writing it
        needed, free = num_bytes(), shutil.disk_usage(path.parent).free
        if needed > free:
            raise OSError(f"{needed / 1e9:.1f} GB are needed there, {free / 1e9:.1f} GB are free")
        try:
            with open(partial, "wb") as file:
                KeptImages.write(file, decode())
                file.flush()
                os.fsync(file.fileno())  # the content must reach the disk before the new name
            partial.replace(path)
        except BaseException:  # the disk is full, an image is broken, Ctrl-C
            partial.unlink(missing_ok=True)
            raise
        return KeptImages(path, number)


def _mapped(path: Path, number: int) -> KeptImages | None:
    try:
        return KeptImages(path, number).check()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning(f"The decoded images in {path} cannot be read, and are decoded anew: {error}.")
        return None
