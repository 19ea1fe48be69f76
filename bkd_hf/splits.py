"""Long-tailed splits as data sets of their own: built, written as parquet with a card, and read again to check."""

from __future__ import annotations

import html
import json
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from huggingface_hub import DatasetCard, DatasetCardData

from .data import (
    IMAGE_COLUMN,
    LABEL_COLUMN,
    PARETO_ALPHA,
    Profile,
    class_counts,
    fingerprint,
    load_image_dataset,
    make_long_tailed,
    stored_images,
)
from .errors import InputError
from .metrics import FEW_SHOT_THRESHOLD, MANY_SHOT_THRESHOLD, shot_groups
from .plots import plot_class_counts
from .results import save_json

SPLIT_NAME = "split.json"
SCHEMA_VERSION = 1
#: Stands in a card for the id that the repository will have.
PLACEHOLDER = "USER/NAME"

_CARD_TEMPLATE = Path(__file__).with_name("dataset_card_template.md")
_FIGURE_NAME = "class_counts.png"
_SHARD_BYTES = 500_000_000
#: A card lists every class up to this number; of more classes, the largest and the smallest.
_MAX_LISTED_CLASSES = 500
_LISTED_OF_MORE = 100


# ---- Splits from lists of files ------------------------------------------------------------------------------------


def read_list_file(path: str | os.PathLike[str], image_folder: str | os.PathLike[str]) -> tuple[list[Path], list[int]]:
    """Read a list of images as ImageNet-LT and Places-LT are published: a line is `path label`.

    Args:
        path: The list; blank lines in it are skipped, and a path may have blanks.
        image_folder: What the paths are relative to, also where they begin with a slash.

    Returns:
        The files, and their labels.

    Raises:
        InputError: Naming the line, if there is no label in it, or one that is no whole number ≥ 0.
    """
    files, labels = [], []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        *name, label = line.rsplit(maxsplit=1)
        if not name or not label.isdecimal():
            raise InputError(f"{path}, line {number}: expected `path label`, the label a number ≥ 0, got {line!r}.")
        files.append(Path(image_folder, name[0].strip().lstrip("/")))
        labels.append(int(label))
    if not files:
        raise InputError(f"{path} lists no image.")
    return files, labels


def read_inaturalist_json(
    path: str | os.PathLike[str], image_folder: str | os.PathLike[str]
) -> tuple[list[Path], list[int], list[str]]:
    """Read a list of images as iNaturalist 2018 is published (COCO's layout).

        {"images": [{"id": 1, "file_name": "train_val2018/Aves/2/a.jpg"}, …],
         "annotations": [{"image_id": 1, "category_id": 2}, …],
         "categories": [{"id": 2, "name": "Turdus merula"}, …]}

    Args:
        path: The file; other fields in it do not matter.
        image_folder: What the file names are relative to.

    Returns:
        The files and their labels, in the order of `images`, and the class names. Classes are the categories in the
        order of their ids, numbered from 0. A category without a name is called by its id; of categories that share
        a name, as species of two kingdoms may, each has its id added: "Ficus variegata (12)".

    Raises:
        InputError: If something is missing or said twice, or an image has not one annotation.
    """
    try:
        content = json.loads(_read_text(path))
        images = {image["id"]: Path(image_folder, image["file_name"].lstrip("/")) for image in content["images"]}
        categories = {category["id"]: str(category.get("name", category["id"])) for category in content["categories"]}
        annotations = [(annotation["image_id"], annotation["category_id"]) for annotation in content["annotations"]]
        repeated = len(images) < len(content["images"]) or len(categories) < len(content["categories"])
        label_of = {category: label for label, category in enumerate(sorted(categories))}
        category_of = dict(annotations)
        foreign = set(category_of.values()) - set(categories)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no JSON: {error}.") from error
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
    if unknown := set(category_of) - set(images):
        raise InputError(f"{path}: annotations for images that it does not list: {_some(unknown)}.")
    if foreign:
        raise InputError(f"{path}: annotations of categories that it does not list: {_some(foreign)}.")
    if bare := set(images) - set(category_of):
        raise InputError(f"{path}: images without an annotation: {_some(bare)}.")
    if several := [image for image, number in Counter(image for image, _ in annotations).items() if number > 1]:
        raise InputError(f"{path}: images with several annotations: {_some(several)}. One class per image is needed.")

    frequency = Counter(categories.values())
    names = [categories[i] if frequency[categories[i]] == 1 else f"{categories[i]} ({i})" for i in label_of]
    return list(images.values()), [label_of[category_of[image]] for image in images], names


def build_split_from_files(
    train: str | os.PathLike[str],
    test: str | os.PathLike[str],
    image_folder: str | os.PathLike[str],
    validation: str | os.PathLike[str] | None = None,
    class_names: str | os.PathLike[str] | None = None,
) -> datasets.DatasetDict:
    """Build a split from published lists of its files.

    Without `class_names` the classes are called as in the JSON files, or else by the folders of their training images
    (the last part of their paths, or all parts below the folder of all, if only these tell them apart), or, where a
    class is not one folder, by their numbers.

    Args:
        train: The training images: a list (see `read_list_file`), or a `.json` (see `read_inaturalist_json`).
        test: The test images, in the same format.
        image_folder: Where the images are.
        validation: The validation images, if any, in the same format.
        class_names: File with one class name per line, in the order of the labels.

    Returns:
        `"train"`, `"test"` and, if given, `"validation"`, each with the columns `"image"` and `"label"`, in the order
        of the lists. The images are still files.

    Raises:
        InputError: If a file is missing, naming all that are, or the lists do not fit together.
    """
    lists = {"train": Path(train), "test": Path(test)} | ({"validation": Path(validation)} if validation else {})
    inputs = [*lists.values(), *([Path(class_names)] if class_names else [])]
    missing = [str(path) for path in inputs if not path.is_file()]
    if not Path(image_folder).is_dir():
        missing.append(f"{image_folder} (a folder)")
        raise InputError("\n".join(["These are not there:", *missing]))
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
    images = [str(file.relative_to(image_folder)) for file in listed if not file.is_file()]
    if missing or images:
        lines = ["These are not there:", *missing] if missing else []
        lines += [f"{len(images):,} of {len(listed):,} images are not in {image_folder}:", *images] if images else []
        raise InputError("\n".join(lines))
    num_classes = len(names) if names else max(labels["train"]) + 1
    _check_labels(lists, labels, num_classes)
    if class_names is not None:
        names = _read_class_names(class_names, num_classes)
    elif names is None:
        names = _folder_names(files["train"], labels["train"]) or [str(label) for label in range(num_classes)]
    features = datasets.Features({IMAGE_COLUMN: datasets.Image(), LABEL_COLUMN: datasets.ClassLabel(names=names)})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {IMAGE_COLUMN: [str(file) for file in files[split]], LABEL_COLUMN: labels[split]}, features=features
            )
            for split in lists
        }
    )


def _read_text(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}.") from error


def _read_class_names(path: str | os.PathLike[str], num_classes: int) -> list[str]:
    names = [line.strip() for line in _read_text(path).splitlines()]
    if len(names) != num_classes or "" in names:
        raise InputError(
            f"--class_names {path} has {len(names) - names.count('')} names in {len(names)} lines; there are "
            f"{num_classes} classes. Give each of them one line."
        )
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise InputError(f"--class_names {path} has names of several classes: {_some(twice)}.")
    return names


def _check_labels(lists: Mapping[str, Path], labels: Mapping[str, Sequence[int]], num_classes: int) -> None:
    if num_classes < 2:
        raise InputError(f"{lists['train']} has one class only; there is nothing to learn.")
    if bare := set(range(num_classes)) - set(labels["train"]):
        raise InputError(
            f"{lists['train']} has no image of {len(bare)} of {num_classes} classes: {_some(bare)}. Labels are the "
            "numbers from 0 on, and each class needs a training image."
        )
    for split, path in lists.items():
        if unknown := set(labels[split]) - set(labels["train"]):
            raise InputError(f"{path} has classes that {lists['train']} does not have: {_some(unknown)}.")


def _folder_names(files: Sequence[Path], labels: Sequence[int]) -> list[str] | None:
    """Name each class by the one folder of its images, if it is one and the names differ."""
    folders = defaultdict(set)
    for file, label in zip(files, labels, strict=True):
        folders[label].add(file.parent)
    if any(len(found) > 1 for found in folders.values()):
        return None
    ordered = [next(iter(folders[label])) for label in range(len(folders))]
    top = os.path.commonpath(ordered)
    for names in ([folder.name for folder in ordered], [str(folder.relative_to(top)) for folder in ordered]):
        if len(set(names)) == len(names):
            return names
    return None


def _some(items: Iterable[Any], number: int = 10) -> str:
    names = sorted(items, key=lambda item: (str(type(item)), item))  # ids may be of two types
    return ", ".join(map(str, names[:number])) + (f", … ({len(names):,} in all)" if len(names) > number else "")


# ---- Splits drawn from a balanced set ------------------------------------------------------------------------------


def draw_split(
    dataset_name: str,
    imbalance_ratio: float = 100.0,
    profile: Profile = "exp",
    seed: int = 0,
    max_class_count: int | None = None,
    pareto_alpha: float = PARETO_ALPHA,
    **load_options: Any,
) -> datasets.DatasetDict:
    """Draw a long-tailed training set, and take the test set as it is.

    Args:
        dataset_name: See [`load_image_dataset`].
        imbalance_ratio: See [`make_long_tailed`], as for the following.
        profile: `"exp"`, `"step"` or `"pareto"`.
        seed: Which images are kept.
        max_class_count: Images of the largest class; by default the most for which every class has enough.
        pareto_alpha: α of `"pareto"`.
        load_options: For [`load_image_dataset`].

    Returns:
        `"train"` and `"test"`, each with the columns `"image"` and `"label"`.

    Raises:
        InputError: If the data set has no test split, or cannot give what is asked for.
    """
    source = load_image_dataset(dataset_name, untouched_test=True, **load_options)
    train = make_long_tailed(
        source["train"], LABEL_COLUMN, imbalance_ratio, profile, seed, max_class_count, pareto_alpha=pareto_alpha
    )
    return datasets.DatasetDict({"train": train, "test": source["eval"]})


# ---- Saving --------------------------------------------------------------------------------------------------------


def save_split(
    splits: datasets.DatasetDict,
    folder: str | os.PathLike[str],
    how: Mapping[str, Any],
    license: str = "unknown",
) -> dict[str, Any]:
    """Write a split as a data set that `datasets.load_dataset` reads, from the folder or from the Hub.

    It writes `data/SPLIT-00000-of-0000N.parquet` with the images byte for byte as they are stored, a card
    (`README.md`), `class_counts.png` and the record of what it is and how it was made (`split.json`). The same split
    gives the same files, byte for byte. All of it is read again, and compared, before it gets its place; on the way
    that takes twice the room of the images on the disk of `folder`, and the memory of three parquet files (1.5 GB).

    Args:
        splits: `"train"`, `"test"` and maybe `"validation"`, with the columns `"image"` and `"label"`.
        folder: Where to. If it holds this split already, only the card is written again.
        how: How it was made, for record and card: `name`, `command`, and the options that matter, without folders.
        license: License of the images, as the Hub calls it.

    Returns:
        The record: `schema_version`, `how`, `class_names`, and for each of the `splits` its `num_images`,
        `class_counts` and `fingerprint` (see `fingerprint`, with `read_files`).

    Raises:
        InputError: If the folder holds something else, or cannot be written.
        RuntimeError: If what is read again is not what was written.
    """
    folder = Path(folder)
    check_output_folder(folder, how)
    # Beside its place, so that an interruption leaves nothing that looks like a split.
    place = folder.resolve()
    partial = place.with_name(f".{place.name}.partial")
    try:
        record = _describe(splits, how)
        if (folder / SPLIT_NAME).exists():
            _check_unchanged(folder, record)
            _write_card(folder, record, license)
        else:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "data").mkdir(parents=True)
            for split, dataset in splits.items():
                _write_parquet(dataset, partial / "data", split)
            figure = plot_class_counts(_title(how), record["class_names"], record["splits"]["train"]["class_counts"])
            figure.savefig(partial / _FIGURE_NAME, facecolor="white")
            save_json(record, partial / SPLIT_NAME)
            _write_card(partial, record, license)
            _check_reload(partial, record)
            os.replace(partial, place)
    except OSError as error:
        raise InputError(f"The split cannot be written to --output_dir {folder}: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def check_output_folder(folder: str | os.PathLike[str], how: Mapping[str, Any]) -> None:
    """Refuse a folder that `save_split` would refuse, before a split is built.

    Raises:
        InputError: If it holds anything but a split that was made in the same way.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    way_out = "Choose another --output_dir, or delete it."
    if not (folder / SPLIT_NAME).is_file():
        raise InputError(f"--output_dir {folder} is there already, and holds no split. {way_out}")
    try:
        record = json.loads((folder / SPLIT_NAME).read_text(encoding="utf-8"))
        there = dict(record["how"]) if record["schema_version"] == SCHEMA_VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        there = None
    if there is None:
        raise InputError(f"--output_dir {folder} holds a split that this version of bkd_hf cannot read. {way_out}")
    differences = [
        f"{name} is {there.get(name)} there, not {how.get(name)}"
        for name in {**there, **how}
        if there.get(name) != how.get(name) and name != "command"
    ]
    if differences:
        raise InputError(f"--output_dir {folder} holds another split: {'; '.join(differences)}. {way_out}")


def split_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """List what of a folder that `save_split` wrote belongs to the split: {path in the repository: file}."""
    folder = Path(folder)
    files = [folder / name for name in ("README.md", _FIGURE_NAME, SPLIT_NAME)]
    return {
        path.relative_to(folder).as_posix(): path for path in [*files, *sorted((folder / "data").glob("*.parquet"))]
    }


def _describe(splits: datasets.DatasetDict, how: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "how": dict(how),
        "class_names": splits["train"].features[LABEL_COLUMN].names,
        "splits": {
            split: {
                "num_images": len(dataset),
                "class_counts": class_counts(dataset),
                "fingerprint": fingerprint(dataset, read_files=True),
            }
            for split, dataset in splits.items()
        },
    }


def _check_unchanged(folder: Path, record: dict[str, Any]) -> None:
    """Refuse a split that was made in the same way, but of other images, or is not whole."""
    there = json.loads((folder / SPLIT_NAME).read_text(encoding="utf-8"))
    way_out = "Delete it to make it again, or choose another --output_dir."
    if any(there.get(part) != record[part] for part in ("class_names", "splits")):
        raise InputError(f"--output_dir {folder} holds this split of other images: they have changed. {way_out}")
    try:
        found = {split: sum(footer.num_rows for footer in _footers(folder, split)) for split in record["splits"]}
    except (OSError, ValueError):  # what `pyarrow` raises for a file that is cut off
        found = {}
    expected = {split: content["num_images"] for split, content in record["splits"].items()}
    if found != expected or not (folder / _FIGURE_NAME).is_file():
        raise InputError(f"--output_dir {folder} holds this split, but not all of its files. {way_out}")


def _footers(folder: Path, split: str) -> list[pq.FileMetaData]:
    return [pq.read_metadata(path) for path in sorted((folder / "data").glob(f"{split}-*.parquet"))]


def _write_parquet(dataset: datasets.Dataset, folder: Path, split: str) -> None:
    size = sum(
        Path(image["path"]).stat().st_size if image["bytes"] is None else len(image["bytes"])
        for image in stored_images(dataset)
    )
    num_shards = min(len(dataset), 1 + size // _SHARD_BYTES)
    for index in range(num_shards):
        shard = dataset.shard(num_shards, index, contiguous=True)
        shard = shard.with_format("arrow").map(
            embed_table_storage, batched=True, batch_size=100, keep_in_memory=True, load_from_cache_file=False
        )
        shard.to_parquet(folder / f"{split}-{index:05d}-of-{num_shards:05d}.parquet")


def _check_reload(folder: Path, record: dict[str, Any]) -> None:
    """Read everything as a user will, and compare."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".reload") as cache:
        loaded = datasets.load_dataset(str(folder), cache_dir=cache)
        found = {
            split: (fingerprint(dataset), dataset.features[LABEL_COLUMN].names) for split, dataset in loaded.items()
        }
        del loaded
    if found != {
        split: (content["fingerprint"], record["class_names"]) for split, content in record["splits"].items()
    }:
        raise RuntimeError(
            "The split was written, but what is read again is not the same: the versions of datasets and pyarrow here "
            "do not keep its labels or images."
        )


# ---- Card ----------------------------------------------------------------------------------------------------------


def _write_card(folder: Path, record: dict[str, Any], license: str) -> None:
    how, parts = record["how"], record["splits"]
    card_data = DatasetCardData(
        license=license,
        pretty_name=_title(how),
        task_categories=["image-classification"],
        tags=["long-tailed", "bkd_hf"],
        size_categories=[_size_category(sum(content["num_images"] for content in parts.values()))],
        source_datasets=[how["source_id"]] if how.get("source_id") else None,
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*"} for split in parts],
            }
        ],
    )
    info = datasets.DatasetInfo(
        features=datasets.Features(
            {IMAGE_COLUMN: datasets.Image(), LABEL_COLUMN: datasets.ClassLabel(names=record["class_names"])}
        ),
        splits=datasets.SplitDict(
            {
                split: datasets.SplitInfo(split, _num_bytes(folder, split), content["num_images"])
                for split, content in parts.items()
            }
        ),
    )
    DatasetInfosDict({"default": info}).to_dataset_card_data(card_data)
    card = DatasetCard.from_template(
        card_data,
        template_path=str(_CARD_TEMPLATE),
        title=_title(how),
        how=how,
        splits=list(parts),
        summary=_summary(record),
        class_lists=_class_lists(record),
        num_classes=len(record["class_names"]),
        largest=max(parts["train"]["class_counts"]),
        many_shot_threshold=MANY_SHOT_THRESHOLD,
        few_shot_threshold=FEW_SHOT_THRESHOLD,
        source=_source(how),
        where=PLACEHOLDER,
        exact=exact,
    )
    card.save(folder / "README.md")


def exact(value: float) -> str:
    """Return a number as one writes it, with all its digits."""
    return repr(float(value)).removesuffix(".0")


def _title(how: Mapping[str, Any]) -> str:
    drawn = f", long-tailed ({how['profile']}, ratio {exact(how['imbalance_ratio'])})" if "profile" in how else ""
    return how["name"] + drawn


def _source(how: Mapping[str, Any]) -> str:
    if how.get("source_id"):
        return f"[{how['source_id']}](https://huggingface.co/datasets/{how['source_id']})"
    if "profile" not in how:
        return "the data set whose lists these are"
    return "the 8×8 digits that come with scikit-learn" if how["name"] == "digits" else f"`{how['name']}`"


def _num_bytes(folder: Path, split: str) -> int:
    footers = _footers(folder, split)
    return sum(footer.row_group(group).total_byte_size for footer in footers for group in range(footer.num_row_groups))


def _size_category(num_images: int) -> str:
    bounds = {"1K": 10**3, "10K": 10**4, "100K": 10**5, "1M": 10**6, "10M": 10**7, "100M": 10**8, "1B": 10**9}
    names = list(bounds)
    reached = sum(num_images >= bound for bound in bounds.values())
    return "n<1K" if reached == 0 else f"{names[reached - 1]}<n<{names[reached]}"


def _summary(record: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Rows of the table of counts: a title, and one cell per split."""
    counts = [np.asarray(content["class_counts"]) for content in record["splits"].values()]
    rows = [
        ("images", [f"{part.sum():,}" for part in counts]),
        ("classes", [f"{(part > 0).sum():,}" for part in counts]),
        ("images of the largest class", [f"{part.max():,}" for part in counts]),
        ("images of the smallest class", [f"{part.min():,}" for part in counts]),
        ("largest / smallest", [f"{part.max() / part.min():,.4g}" if part.min() else "–" for part in counts]),
    ]
    ranges = {
        "many_shot": f"> {MANY_SHOT_THRESHOLD}",
        "medium_shot": f"{FEW_SHOT_THRESHOLD} to {MANY_SHOT_THRESHOLD}",
        "few_shot": f"< {FEW_SHOT_THRESHOLD}",
    }
    for name, group in shot_groups(record["splits"]["train"]["class_counts"]).items():
        title = f"{name.replace('_', '-')} classes ({ranges[name]} training images)"
        rows.append((title, [f"{group.sum():,}", *[""] * (len(counts) - 1)]))
    return rows


def _class_lists(record: dict[str, Any]) -> dict[str, list[tuple[int, str, list[int]]]]:
    """Tables of classes, the largest first: by title, rows of label, name and images per split."""
    counts = np.asarray([content["class_counts"] for content in record["splits"].values()])
    rows = [
        (int(label), _in_table(record["class_names"][label]), counts[:, label].tolist())
        for label in np.argsort(-counts[0], kind="stable")
    ]
    if len(rows) <= _MAX_LISTED_CLASSES:
        return {"Images per class": rows}
    return {
        f"Images per class, the {_LISTED_OF_MORE} largest": rows[:_LISTED_OF_MORE],
        f"Images per class, the {_LISTED_OF_MORE} smallest": rows[-_LISTED_OF_MORE:],
    }


def _in_table(name: str) -> str:
    return html.escape(" ".join(name.split()), quote=False).replace("|", "\\|")
