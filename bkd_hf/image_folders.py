"""Image folders in which each image's class is the name of its folder."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import datasets
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from transformers.utils import logging

from .errors import InputError
from .reading import read_card
from .text import normal

logger = logging.get_logger(__name__)

#: Column names of data sets returned by `load_image_dataset`.
IMAGE_COLUMN = "image"
LABEL_COLUMN = "label"

# For image folders: words that name a split in `datasets`, and other files that `datasets` uses.
_SPLITS = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}
_IMAGE_SUFFIXES = set(ImageFolder.EXTENSIONS)
_TABLE_SUFFIXES = {".parquet", ".arrow"}
_METADATA = {"metadata.csv", "metadata.jsonl"}
_HIDDEN = (".", "__MACOSX")  # .DS_Store, …


def class_features(class_names: list[str]) -> datasets.Features:
    """Return the columns of images and labels."""
    return datasets.Features({IMAGE_COLUMN: datasets.Image(), LABEL_COLUMN: datasets.ClassLabel(names=class_names)})


def load_image_folder(folder: str | os.PathLike[str]) -> datasets.DatasetDict | None:
    """Read images whose class is the name of their folder: `train/cat/1.jpg`, or `cat/1.jpg`.

    The top folders are splits if they have such names (train, val, Test, …) and contain folders; otherwise they are
    classes. In deeper trees, the innermost folder is the class. `datasets` finds splits by words anywhere in a path,
    so a class "steam_train" or a file "my_test_3.png" ends up in the wrong split; it also takes 2 ms for each file.

    Args:
        folder: Folder of the images. If it only contains a single folder, that one is used.

    Returns:
        The splits, with the names of `datasets` (`"train"`, `"validation"`, `"test"`), each with the columns `"image"`
        (files) and `"label"`; `None` if the folder holds something else: tables, images with `metadata.csv`, a data
        set with its own configuration.

    Raises:
        InputError: If an image is not in a class folder, or two class folders of a split have the same name.
    """
    folder = Path(os.path.abspath(folder))
    files = sorted(files_below(folder))
    images = [file for file in files if file.suffix.lower() in _IMAGE_SUFFIXES]
    if not images or _is_described(folder, files):
        return None
    others = [file for file in files if file.suffix.lower() not in _IMAGE_SUFFIXES and len(file.parts) > 1]
    empty = _empty_folders(folder, files, images)
    for left_out, why in ((others, "they are no images by their names"), (empty, "there is no file in it")):
        if left_out:
            more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
            logger.warning(f"{folder}: left out, as {why}: {left_out[0]}{more}.")
    while len({image.parts[0] for image in images}) == 1 and all(len(image.parts) > 2 for image in images):
        if _split_of(images[0].parts[0]) is not None:
            break
        folder /= images[0].parts[0]
        images = [PurePath(*image.parts[1:]) for image in images]

    first = {image.parts[0] for image in images if len(image.parts) > 1}
    with_folders = {image.parts[0].lower() for image in images if len(image.parts) > 2}
    has_splits = "train" in with_folders or (bool(with_folders) and all(_split_of(name) for name in first))
    loose = [image for image in images if len(image.parts) <= 1 + has_splits]
    if loose:
        raise InputError(
            f"{folder} has images that lie in no class folder ({len(loose)} of {len(images)}), such as {loose[0]}: "
            f"expected {'SPLIT/' * has_splits}CLASS/IMAGE. Move or remove them."
        )
    class_names = sorted({normal(image.parent.name) for image in images})
    numbers = {name: number for number, name in enumerate(class_names)}
    columns: dict[str, dict[str, list[Any]]] = {}
    class_folders: dict[tuple[str, str], PurePath] = {}
    for image in images:
        split = (_split_of(image.parts[0]) or image.parts[0]) if has_splits else "train"
        class_name = normal(image.parent.name)
        other = class_folders.setdefault((split, class_name), image.parent)
        if normal(str(other)) != normal(str(image.parent)):
            raise InputError(
                f"{folder}: which folder is the class? {other} and {image.parent} have the same name. Have one folder "
                "for each class, with its images in it."
            )
        members = columns.setdefault(split, {IMAGE_COLUMN: [], LABEL_COLUMN: []})
        members[IMAGE_COLUMN].append(str(folder / image))
        members[LABEL_COLUMN].append(numbers[class_name])
    features = class_features(class_names)
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(members, features=features, split=datasets.NamedSplit(split))
            for split, members in columns.items()
        }
    )


def _empty_folders(folder: Path, files: list[PurePath], images: list[PurePath]) -> list[PurePath]:
    """Folders without files beside those of classes."""
    known = {parent for file in files for parent in file.parents}
    with_classes = {image.parent.parent for image in images if len(image.parts) > 1}
    beside = (above / entry.name for above in with_classes for entry in os.scandir(folder / above) if entry.is_dir())
    return sorted(path for path in beside if path not in known and not path.name.startswith(_HIDDEN))


def files_below(folder: Path) -> Iterator[PurePath]:
    """Paths of all files relative to the folder, without hidden ones.

    Raises:
        InputError: If a folder or file cannot be read.
    """
    todo: list[tuple[PurePath, frozenset[tuple[int, int]]]] = [(PurePath(), frozenset())]
    while todo:
        inner, above = todo.pop()
        try:
            status = os.stat(folder / inner)
            entries = [entry for entry in os.scandir(folder / inner) if not entry.name.startswith(_HIDDEN)]
        except OSError as error:
            raise InputError(f"{folder / inner} cannot be read: {error.strerror}.") from error
        if (place := (status.st_dev, status.st_ino)) in above:
            raise InputError(f"{folder / inner} is a link back to a folder that it lies in. Remove it.")
        for entry in entries:
            try:
                entry.name.encode()
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except UnicodeEncodeError as error:
                encoding = sys.getfilesystemencoding()
                raise InputError(f"{entry.path}: this name is no text in {encoding}. Rename it.") from error
            except OSError:  # a link to itself
                is_folder = is_file = False
            if is_folder:
                todo.append((inner / entry.name, above | {place}))
            elif is_file:
                yield inner / entry.name
            else:
                raise InputError(f"{entry.path} is no file: it is a pipe, a device, or a link to nothing. Remove it.")


def _is_described(folder: Path, files: list[PurePath]) -> bool:
    """Whether something other than folders describes the images."""
    if any(file.name in _METADATA or file.suffix in _TABLE_SUFFIXES for file in files):
        return True
    card = folder / "README.md"
    return card.exists() and bool(read_card(card).get("configs"))


def _split_of(name: str) -> str | None:
    """The split named by a folder: Train, test-images, train_val2018, …"""
    return next((_SPLITS[word] for word in re.split(r"[-._ 0-9]+", name.lower()) if word in _SPLITS), None)
