"""Long-tailed splits as separate data sets: written as parquet with a card, and read back for verification."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import datasets
import numpy as np
import pyarrow.parquet as pq
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from huggingface_hub import DatasetCard, DatasetCardData

from .data import class_counts, fingerprint, stored_images
from .errors import InputError
from .files import write_text
from .image_folders import LABEL_COLUMN, class_features
from .metrics import FEW_SHOT_THRESHOLD, MANY_SHOT_THRESHOLD, shot_groups
from .plots import plot_class_counts
from .reading import read_json
from .results import describe_command, save_json
from .text import code, code_block, markdown, one_line

SPLIT_NAME = "split.json"
SCHEMA_VERSION = 1
#: Placeholder in a card for the repository's id.
PLACEHOLDER = "USER/NAME"

_CARD_TEMPLATE = Path(__file__).with_name("dataset_card_template.md")
_FIGURE_NAME = "class_counts.png"
_SHARD_BYTES = 500_000_000
#: A card lists all classes up to this number; with more, only the largest and the smallest.
_MAX_LISTED_CLASSES = 500
_LISTED_OF_MORE = 100
_SIZE_CATEGORIES = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B"]


def save_split(
    splits: datasets.DatasetDict,
    folder: str | os.PathLike[str],
    how: Mapping[str, Any],
    license: str = "unknown",
) -> dict[str, Any]:
    """Write a split as a data set that `datasets.load_dataset` reads, from the folder or from the Hub.

    It writes `data/SPLIT-00000-of-0000N.parquet` with the unchanged bytes of the stored images, a card (`README.md`),
    `class_counts.png` and a record of its contents and origin (`split.json`). The same split gives the same files,
    byte for byte. Everything is read back and compared before it is moved to its place. This temporarily takes twice
    the images' size on the disk of `folder`, and the memory of three parquet files (1.5 GB).

    Args:
        splits: `"train"`, `"test"` and optionally `"validation"`, with the columns `"image"` and `"label"`.
        folder: Output folder. If it already holds this split, only the card is written again.
        how: How it was made, for record and card: `name`, `command`, and the relevant options, without folders.
        license: License of the images, by its name on the Hub.

    Returns:
        The record: `schema_version`, `how`, `class_names`, and for each of the `splits` its `num_images`,
        `class_counts` and `fingerprint` (see `fingerprint`, with `read_all`).

    Raises:
        InputError: If the folder holds something else, or cannot be written.
        RuntimeError: If the data read back differs from what was written.
    """
    folder = Path(folder)
    check_output_folder(folder, how)
    # Written beside its place, so that an interruption leaves nothing that looks like a split.
    place = folder.resolve()
    partial = place.with_name(f".{place.name}.partial")
    try:
        record = {
            "schema_version": SCHEMA_VERSION,
            "how": dict(how),
            "class_names": splits["train"].features[LABEL_COLUMN].names,
            "splits": {
                split: {
                    "num_images": len(dataset),
                    "class_counts": class_counts(dataset),
                    "fingerprint": fingerprint(dataset, read_all=True),
                }
                for split, dataset in splits.items()
            },
        }
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
    """Check, before a split is built, that `save_split` would accept a folder.

    Raises:
        InputError: If it holds anything but a split made in the same way.
    """
    folder = Path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    way_out = "Choose another --output_dir, or delete it."
    if not (folder / SPLIT_NAME).is_file():
        raise InputError(f"--output_dir {folder} is there already, and holds no split. {way_out}")
    try:
        record = read_json(folder / SPLIT_NAME)
        there = dict(record["how"]) if record["schema_version"] == SCHEMA_VERSION else None
    except (ValueError, KeyError, TypeError):  # includes InputError
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


def _check_unchanged(folder: Path, record: dict[str, Any]) -> None:
    """Reject a split made in the same way, but from other images, or incomplete."""
    there = read_json(folder / SPLIT_NAME)
    way_out = "Delete it to make it again, or choose another --output_dir."
    if any(there.get(part) != record[part] for part in ("class_names", "splits")):
        raise InputError(f"--output_dir {folder} holds this split of other images: they have changed. {way_out}")
    try:
        found = {split: sum(footer.num_rows for footer in _footers(folder, split)) for split in record["splits"]}
    except (OSError, ValueError):  # raised by `pyarrow` for a truncated file
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
    """Read everything back as users will, and compare."""
    names = record["class_names"]
    expected = {split: (content["fingerprint"], names) for split, content in record["splits"].items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".reload") as cache:
        loaded = datasets.load_dataset(str(folder), cache_dir=cache)
        found = {
            split: (fingerprint(dataset, read_all=True), dataset.features[LABEL_COLUMN].names)
            for split, dataset in loaded.items()
        }
        del loaded
    if found != expected:
        raise RuntimeError(
            "The split was written, but what is read again is not the same: the versions of datasets and pyarrow here "
            "do not keep its labels or images."
        )


# ---- Card ----------------------------------------------------------------------------------------------------------


def _write_card(folder: Path, record: dict[str, Any], license: str) -> None:
    how, parts = record["how"], record["splits"]
    num_images = sum(content["num_images"] for content in parts.values())
    data_files = [{"split": split, "path": f"data/{split}-*"} for split in parts]
    counts = {split: np.asarray(content["class_counts"]) for split, content in parts.items()}
    metadata = DatasetCardData(
        license=one_line(license),
        pretty_name=one_line(_title(how)),
        task_categories=["image-classification"],
        tags=["long-tailed", "bkd_hf"],
        size_categories=[_SIZE_CATEGORIES[max(0, len(str(num_images)) - 3)]],
        source_datasets=[how["source_id"]] if how.get("source_id") else None,
        configs=[{"config_name": "default", "data_files": data_files}],
    )
    infos = datasets.SplitDict()
    for split, content in parts.items():
        groups = [footer.row_group(i) for footer in _footers(folder, split) for i in range(footer.num_row_groups)]
        infos.add(datasets.SplitInfo(split, sum(group.total_byte_size for group in groups), content["num_images"]))
    info = datasets.DatasetInfo(features=class_features(record["class_names"]), splits=infos)
    DatasetInfosDict({"default": info}).to_dataset_card_data(metadata)
    card = DatasetCard.from_template(
        metadata,
        template_path=str(_CARD_TEMPLATE),
        title=markdown(_title(how)),
        how=how,
        code=code,
        code_block=code_block,
        counts=counts,
        groups={name.replace("_", "-"): group.sum() for name, group in shot_groups(counts["train"]).items()},
        group_ranges={
            "many-shot": f"> {MANY_SHOT_THRESHOLD}",
            "medium-shot": f"{FEW_SHOT_THRESHOLD} to {MANY_SHOT_THRESHOLD}",
            "few-shot": f"< {FEW_SHOT_THRESHOLD}",
        },
        class_lists=_class_lists(record["class_names"], list(counts.values())),
        source=_source(how),
        where=PLACEHOLDER,
        run=describe_command([]),
        exact=exact,
    )
    write_text(folder / "README.md", str(card))


def exact(value: float) -> str:
    """Return a number as usually written, with all its digits."""
    return repr(float(value)).removesuffix(".0")


def _title(how: Mapping[str, Any]) -> str:
    drawn = f", long-tailed ({how['profile']}, ratio {exact(how['imbalance_ratio'])})" if "profile" in how else ""
    return how["name"] + drawn


def _source(how: Mapping[str, Any]) -> str:
    if how.get("source_id"):
        return f"[{markdown(how['source_id'])}](https://huggingface.co/datasets/{quote(how['source_id'])})"
    if "train_list" in how:
        return "the data set whose lists these are"
    return "the 8×8 digits that come with scikit-learn" if how["name"] == "digits" else code(how["name"])


def _class_lists(class_names: Sequence[str], counts: list[np.ndarray]) -> dict[str, list[tuple[int, str, list[int]]]]:
    """Tables of classes, the largest first: by title, rows of label, name and images per split."""
    order = np.argsort(-counts[0], kind="stable")
    rows = [(int(i), markdown(class_names[i]), [int(part[i]) for part in counts]) for i in order]
    if len(rows) <= _MAX_LISTED_CLASSES:
        return {"Images per class": rows}
    return {
        f"Images per class, the {_LISTED_OF_MORE} largest": rows[:_LISTED_OF_MORE],
        f"Images per class, the {_LISTED_OF_MORE} smallest": rows[-_LISTED_OF_MORE:],
    }
