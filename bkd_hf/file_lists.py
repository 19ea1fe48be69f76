"""Published splits, as lists of files and labels, turned into a data set."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from .errors import InputError
from .image_folders import IMAGE_COLUMN, LABEL_COLUMN, class_features
from .reading import check_file, read_json, read_text
from .text import normal, one_line

logger = logging.get_logger(__name__)

_SOME = 10  # how many an error names
_LONGEST_LABEL = 18  # most digits that a table can store


def read_list_file(path: str | os.PathLike[str], image_folder: str | os.PathLike[str]) -> tuple[list[Path], list[int]]:
    """Read a list of images in the format of ImageNet-LT and Places-LT, with lines `path label`.

    Args:
        path: The list; blank lines are skipped, and a path may contain blanks.
        image_folder: Folder that the paths are relative to, even if they begin with a slash.

    Returns:
        The files, and their labels.

    Raises:
        InputError: If a line has no label, or one that is not an integer ≥ 0; the message names the line.
    """
    files, labels = [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        *name, label = line.rsplit(maxsplit=1)
        if not name or not label.isdecimal() or len(label) > _LONGEST_LABEL:
            shown = one_line(line, 200)
            raise InputError(f"{path}, line {number}: expected `path label`, the label a number ≥ 0, got {shown!r}.")
        files.append(_file(image_folder, name[0].strip()))
        labels.append(int(label))
    if not files:
        raise InputError(f"{path} lists no image.")
    return files, labels


def read_inaturalist_json(
    path: str | os.PathLike[str], image_folder: str | os.PathLike[str]
) -> tuple[list[Path], list[int], list[str]]:
    """Read a list of images in the format of iNaturalist 2018 (COCO's layout).

        {"images": [{"id": 1, "file_name": "train_val2018/Aves/2/a.jpg"}, …],
         "annotations": [{"image_id": 1, "category_id": 2}, …],
         "categories": [{"id": 2, "name": "Turdus merula"}, …]}

    Args:
        path: The file; other fields are ignored.
        image_folder: Folder that the file names are relative to.

    Returns:
        The files and their labels, in the order of `images`, and the class names. Classes are the categories sorted by
        id, numbered from 0. A category without a name is called by its id. If categories share a name, as species of
        two kingdoms may, their ids are added: "Ficus variegata (12)".

    Raises:
        InputError: If something is missing or duplicate, or an image does not have exactly one annotation.
    """
    try:
        content = read_json(path)
        images = {image["id"]: _file(image_folder, image["file_name"]) for image in content["images"]}
        names = {c["id"]: normal(str(c.get("name", c["id"]))) for c in content["categories"]}
        annotated = Counter(annotation["image_id"] for annotation in content["annotations"])
        category_of = {annotation["image_id"]: annotation["category_id"] for annotation in content["annotations"]}
        repeated = len(images) < len(content["images"]) or len(names) < len(content["categories"])
        label_of = {category: label for label, category in enumerate(sorted(names))}
        foreign = set(category_of.values()) - set(names)
    except KeyError as error:
        raise InputError(f"{path}: something in it has no field {error}; iNaturalist 2018 has the layout.") from error
    except (TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: expected lists `images`, `annotations` and `categories`, as in iNaturalist 2018 ({error})."
        ) from error
    if not images:
        raise InputError(f"{path} lists no image.")
    if repeated:
        raise InputError(f"{path}: an id is given to two images, or to two categories.")
    for wrong, what, rest in (
        (set(annotated) - set(images), "annotations for images that it does not list", ""),
        (foreign, "annotations of categories that it does not list", ""),
        (set(images) - set(annotated), "images without an annotation", ""),
        (annotated - Counter(set(annotated)), "images with several annotations", " One class per image is needed."),
    ):
        if wrong:
            raise InputError(f"{path}: {what}: {_some(wrong)}.{rest}")
    frequency = Counter(names.values())
    class_names = [names[i] if frequency[names[i]] == 1 else f"{names[i]} ({i})" for i in label_of]
    return list(images.values()), [label_of[category_of[image]] for image in images], class_names


def build_split_from_files(
    train_list: str | os.PathLike[str],
    test_list: str | os.PathLike[str],
    image_folder: str | os.PathLike[str],
    val_list: str | os.PathLike[str] | None = None,
    class_names: str | os.PathLike[str] | None = None,
) -> datasets.DatasetDict:
    """Build a split from published lists of its files.

    Without `class_names`, the names come from the JSON files, otherwise from the folders of the training images: the
    last part of the path, or all parts below the common folder if needed to distinguish them. If a class is not one
    folder, classes are named by their numbers.

    Args:
        train_list: The training images: a list (see `read_list_file`), or a `.json` (see `read_inaturalist_json`).
        test_list: The test images, in the same format.
        image_folder: Folder of the images.
        val_list: The validation images, if any, in the same format.
        class_names: File with one class name per line, in the order of the labels.

    Returns:
        `"train"`, `"test"` and, if given, `"validation"`, each with the columns `"image"` and `"label"`, in the order
        of the lists. The images are still files.

    Raises:
        InputError: If files are missing (the message names them), or the lists are inconsistent.
    """
    lists = {"train": Path(train_list), "test": Path(test_list)}
    lists |= {"validation": Path(val_list)} if val_list else {}
    missing = [str(path) for path in (*lists.values(), class_names) if path and not _is_there(Path(path))]
    if not Path(image_folder).is_dir():
        raise InputError("\n".join(["These are not there:", *missing, f"{image_folder} (a folder)"]))
    are_json = {path.suffix.lower() == ".json" for path in lists.values()}
    if len(are_json) > 1:
        raise InputError(f"{', '.join(map(str, lists.values()))}: give all as lists, or all as .json files.")

    files, labels, names = {}, {}, None
    for split, path in lists.items():
        if str(path) in missing:
            continue
        if are_json == {True}:
            files[split], labels[split], categories = read_inaturalist_json(path, image_folder)
            if names not in (None, categories):
                raise InputError(f"{path} has other categories than {lists['train']}.")
            names = categories
        else:
            files[split], labels[split] = read_list_file(path, image_folder)
    listed = dict.fromkeys(file for part in files.values() for file in part)
    images = [str(file.relative_to(image_folder)) for file in listed if not _is_there(file)]
    lines = ["These are not there:", *missing] if missing else []
    lines += [f"{len(images):,} of {len(listed):,} images are not in {image_folder}:", *images] if images else []
    if lines:
        raise InputError("\n".join(lines))
    for split in lists:
        if split != "train" and (shared := set(files["train"]) & set(files[split])):
            logger.warning(f"{len(shared):,} images of {lists[split]} are in {lists['train']}, too: {_some(shared)}.")
    num_classes = len(names) if names else max(labels["train"]) + 1
    _check_labels(lists, labels, num_classes)
    if class_names is not None:
        names = _read_class_names(class_names, num_classes)
    elif names is None:
        names = _folder_names(files["train"], labels["train"]) or [str(label) for label in range(num_classes)]
    features, splits = class_features(names), datasets.DatasetDict()
    for split in lists:
        columns = {IMAGE_COLUMN: [str(file) for file in files[split]], LABEL_COLUMN: labels[split]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return splits


def _file(folder: str | os.PathLike[str], name: str) -> Path:
    """Return the path of a listed file; accents may be encoded differently on the disk than in the list."""
    name = name.lstrip("/")
    if name.isascii():
        return Path(folder, name)
    spellings = name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)
    return next(filter(_is_there, (Path(folder, spelling) for spelling in spellings)), Path(folder, name))


def _is_there(path: Path) -> bool:
    try:
        check_file(path)
        return True
    except OSError:
        return False


def _read_class_names(path: str | os.PathLike[str], num_classes: int) -> list[str]:
    names = [normal(line.strip()) for line in read_text(path).removesuffix("\n").split("\n")]
    if len(names) != num_classes or "" in names:
        raise InputError(
            f"--class_names {path} has {len(names) - names.count('')} names in {len(names)} lines; there are "
            f"{num_classes} classes. Give each of them one line."
        )
    if twice := Counter(names) - Counter(set(names)):
        raise InputError(f"--class_names {path} has names of several classes: {_some(twice)}.")
    return names


def _check_labels(lists: Mapping[str, Path], labels: Mapping[str, Sequence[int]], num_classes: int) -> None:
    known = set(labels["train"])
    if num_classes < 2:
        raise InputError(f"{lists['train']} has one class only; there is nothing to learn.")
    if num_bare := num_classes - len(known):
        # Lazily, as a label may be arbitrarily large.
        bare = itertools.islice((label for label in range(num_classes) if label not in known), _SOME)
        raise InputError(
            f"{lists['train']} has no image of {num_bare} of {num_classes} classes: {_some(bare, num_bare)}. Labels "
            "are the numbers from 0 on, and each class needs a training image."
        )
    for split, path in lists.items():
        if unknown := set(labels[split]) - known:
            raise InputError(f"{path} has classes that {lists['train']} does not have: {_some(unknown)}.")


def _folder_names(files: Sequence[Path], labels: Sequence[int]) -> list[str] | None:
    """Name each class by the folder of its images, if each has exactly one and the names differ."""
    pairs = sorted({(label, Path(normal(str(file.parent)))) for file, label in zip(files, labels, strict=True)})
    folders = [folder for _, folder in pairs]
    if len(pairs) > len(set(labels)):
        return None
    top = os.path.commonpath(folders)
    for names in ([folder.name for folder in folders], [str(folder.relative_to(top)) for folder in folders]):
        if len(set(names)) == len(names):
            return names
    return None


def _some(items: Iterable[Any], number: int | None = None) -> str:
    names = sorted(items, key=lambda item: (str(type(item)), item))  # ids may be of two types
    number = number or len(names)
    shown = ", ".join(one_line(name, 100) for name in names[:_SOME])
    return shown + (f", … ({number:,} in all)" if number > _SOME else "")
