"""Images in class folders, with or without a folder for each split: `train/cat/1.jpg`, or `cat/1.jpg`.

`datasets` finds splits by words anywhere in a path, so that a class "steam_train" or a file "my_test_3.png" would
change its split, and `Test/` would be part of the training data. Here only the first folders decide.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

import datasets
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import DatasetCard
from transformers.utils import logging

from .errors import InputError

logger = logging.get_logger(__name__)

_SPLITS = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}
_IMAGE_SUFFIXES = set(ImageFolder.EXTENSIONS)
_TABLE_SUFFIXES = {".parquet", ".arrow"}
_HIDDEN = (".", "__")  # as `datasets` has it: .DS_Store, __MACOSX, …


def load_image_folder(folder: str | os.PathLike[str]) -> datasets.DatasetDict | None:
    """Read images whose class is the name of their folder.

    The first folders are splits if they are called so (train, val, Test, …) and hold folders themselves; else they are
    classes. In deeper trees the innermost folder is the class.

    Args:
        folder: Of the images. A single folder in it that holds all others is looked through.

    Returns:
        The splits, under the names that `datasets` gives them (`"train"`, `"validation"`, `"test"`), each with the
        columns `"image"` (files) and `"label"`; `None` where the folder holds something else: tables, images with
        `metadata.csv`, a data set with a configuration of its own.

    Raises:
        InputError: If an image lies in no class folder, or two class folders of a split have one name.
    """
    folder = Path(os.path.abspath(folder))
    files = sorted(_files_below(folder))
    images = [file for file in files if file.suffix.lower() in _IMAGE_SUFFIXES]
    if not images or _is_described(folder, files):
        return None
    others = [file for file in files if file.suffix.lower() not in _IMAGE_SUFFIXES and len(file.parts) > 1]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        logger.warning(f"{folder}: left out, as they are no images by their names: {others[0]}{more}.")
    while len({image.parts[0] for image in images}) == 1 and all(len(image.parts) > 2 for image in images):
        if _split_of(images[0].parts[0]) is not None:
            break
        folder /= images[0].parts[0]
        images = [PurePath(*image.parts[1:]) for image in images]

    depth = 2 if _first_folders_are_splits(images) else 1
    loose = [image for image in images if len(image.parts) <= depth]
    if loose:
        raise InputError(
            f"{folder} has images that lie in no class folder ({len(loose)} of {len(images)}), such as {loose[0]}: "
            f"expected {'SPLIT/' * (depth - 1)}CLASS/IMAGE. Move or remove them."
        )
    by_split: dict[str, list[PurePath]] = {}
    for image in images:
        split = (_split_of(image.parts[0]) or image.parts[0]) if depth == 2 else "train"
        by_split.setdefault(split, []).append(image)
    class_names = sorted({image.parent.name for image in images})
    numbers = {name: number for number, name in enumerate(class_names)}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=class_names)})
    splits = {}
    for split, members in by_split.items():
        _check_one_folder_a_class(folder, members)
        columns = {
            "image": [str(folder / image) for image in members],
            "label": [numbers[image.parent.name] for image in members],
        }
        splits[split] = datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))
    return datasets.DatasetDict(splits)


def _files_below(folder: Path) -> Iterable[PurePath]:
    """Paths relative to the folder, without what is hidden."""
    for directory, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(_HIDDEN)]
        inner = PurePath(directory).relative_to(folder)
        yield from (inner / name for name in names if not name.startswith(_HIDDEN))


def _is_described(folder: Path, files: list[PurePath]) -> bool:
    """Whether something other than folders says what the images are."""
    if any(file.stem == "metadata" or file.suffix in _TABLE_SUFFIXES for file in files):
        return True
    card = folder / "README.md"
    return card.exists() and bool(DatasetCard.load(card, ignore_metadata_errors=True).data.get("configs"))


def _split_of(name: str) -> str | None:
    """The split that a folder's name tells: Train, test-images, train_val2018, …"""
    return next((_SPLITS[word] for word in re.split(r"[-._ 0-9]+", name.lower()) if word in _SPLITS), None)


def _first_folders_are_splits(images: list[PurePath]) -> bool:
    first = {image.parts[0] for image in images if len(image.parts) > 1}
    with_folders = {image.parts[0] for image in images if len(image.parts) > 2}
    return any(name.lower() == "train" for name in with_folders) or (
        bool(with_folders) and all(_split_of(name) for name in first)
    )


def _check_one_folder_a_class(folder: Path, images: list[PurePath]) -> None:
    seen: dict[str, PurePath] = {}
    for image in images:
        other = seen.setdefault(image.parent.name, image.parent)
        if other != image.parent:
            raise InputError(
                f"{folder}: which folder is the class? {other} and {image.parent} have the same name. Have one folder "
                "for each class, with its images in it."
            )
