"""Sources of data sets: the Hub, files, folders of images, scikit-learn's digits, Python's docstrings."""

from __future__ import annotations

import glob
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.table import CastError
from transformers.utils import logging
from yaml import YAMLError

from .data import set_aside
from .docstrings import GROUPS, docstrings
from .errors import InputError, first_line
from .image_folders import IMAGE_COLUMN, LABEL_COLUMN, class_features, files_below, load_image_folder
from .tasks import TEXT_COLUMN
from .text import one_line

logger = logging.get_logger(__name__)

_TEXT_COLUMN_NAMES = ("text", "sentence", "content", "document", "review")


def _load_digits() -> datasets.DatasetDict:
    """Return the 1,797 8×8 digits that come with scikit-learn, 40 of each for evaluation."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = []
    for pixels in digits.images:
        Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(file := io.BytesIO(), format="PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    features = class_features([str(name) for name in digits.target_names])
    everything = datasets.Dataset.from_dict({IMAGE_COLUMN: images, LABEL_COLUMN: digits.target}, features=features)
    return _with_test_split(everything, per_class=40)


def _load_docstrings() -> datasets.DatasetDict:
    """Return the docstrings of the standard library, 60 of each class for evaluation."""
    texts, labels = docstrings()
    features = datasets.Features(
        {TEXT_COLUMN: datasets.Value("string"), LABEL_COLUMN: datasets.ClassLabel(names=list(GROUPS))}
    )
    everything = datasets.Dataset.from_dict({TEXT_COLUMN: texts, LABEL_COLUMN: labels}, features=features)
    return _with_test_split(everything, per_class=60)


def _with_test_split(everything: datasets.Dataset, per_class: int) -> datasets.DatasetDict:
    wanted = np.full(everything.features[LABEL_COLUMN].num_classes, per_class)
    train, test = set_aside(everything, wanted, seed=0)
    return datasets.DatasetDict({"train": train, "test": test})


def _image_columns(features: Mapping[str, Any]) -> list[str]:
    """Image columns, even if not declared as such: tables of pandas, polars and others are not.

    A plain column of bytes may hold anything; it counts as an image column only if there is no other.
    """
    images = [
        column
        for column, feature in features.items()
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and holds(feature.get("bytes"), "binary"))
    ]
    return images or [column for column, feature in features.items() if holds(feature, "binary")]


def _text_columns(features: Mapping[str, Any]) -> list[str]:
    """Columns of strings; if there are several, those with usual names for texts."""
    texts = [column for column, feature in features.items() if holds(feature, "string")]
    usual = [column for column in _TEXT_COLUMN_NAMES if column in texts]
    return usual[:1] if len(texts) > 1 and usual else texts


def holds(feature: Any, kind: str) -> bool:
    """Whether a column holds values of a kind, such as `"string"`."""
    return isinstance(feature, datasets.Value) and feature.dtype in (kind, f"large_{kind}")


@dataclass(frozen=True)
class Source:
    """Where the data of a task come from.

    Attributes:
        demo: Data sets that are always available, by name.
        files: Formats of a single file, by suffix.
        folder: Reads folders that `datasets` should not read by itself; `None` if it should.
        others: Sources beside the Hub, for messages.
        find: Finds the columns that hold examples.
        feature: The type of their column.
    """

    demo: dict[str, Callable[[], datasets.DatasetDict]]
    files: dict[str, str]
    folder: Callable[[Path], datasets.DatasetDict | None]
    others: str
    find: Callable[[Mapping[str, Any]], list[str]]
    feature: Any


SOURCES = {
    "image": Source(
        {"digits": _load_digits},
        {".parquet": "parquet"},
        load_image_folder,
        "a folder with one folder per class, a saved data set, a parquet file",
        _image_columns,
        datasets.Image(),
    ),
    "text": Source(
        {"docstrings": _load_docstrings},
        {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"},
        lambda _: None,
        "a saved data set, a CSV, JSON or parquet file, a folder of such files",
        _text_columns,
        datasets.Value("string"),
    ),
}
#: The task of each data set that is always available, by name.
DEMOS = {name: task for task, source in SOURCES.items() for name in source.demo}


def open_splits(
    task: str, name: str, config_name: str | None, cache_dir: str | None, token: str | None, streaming: bool = False
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load a data set with its own columns and splits.

    Args:
        task: `"image"` or `"text"`.
        name: As for [`load_image_dataset`], like the following arguments.
        config_name: Configuration of a data set that has several (a Hub data set, a folder with a README.md).
        cache_dir: Where `datasets` keeps its files.
        token: Token for private data sets.
        streaming: Whether to open it without loading.

    Raises:
        InputError: If it does not exist, or cannot be read.
    """
    source = SOURCES[task]
    path = Path(name).expanduser()
    is_demo = name in source.demo
    if is_demo and path.is_dir():
        logger.warning(f"--dataset_name {name} is the demo of this name. For the folder here, write ./{name}.")
    if not is_demo and not path.exists() and name.startswith((".", "/", "~")):
        raise InputError(f"--dataset_name {name}: there is no such file or folder.")
    is_saved = not streaming and any((path / file).exists() for file in ("dataset_dict.json", "state.json"))
    if config_name is not None and (is_demo or is_saved or path.is_file()):
        raise InputError(f"--dataset_config_name {config_name}: {name} has no configurations. Leave it out.")
    try:
        if is_demo:
            data = source.demo[name]()
            if streaming:
                return datasets.IterableDatasetDict({key: each.to_iterable_dataset() for key, each in data.items()})
        elif is_saved:
            list(files_below(path))
            data = datasets.load_from_disk(str(path))
        elif path.exists() and not path.is_dir():
            if path.suffix not in source.files or not path.is_file():
                others = [other for other in SOURCES if path.suffix in SOURCES[other].files]
                hint = f" For {others[0]}s say --task {others[0]}." if others and path.is_file() else ""
                kinds = " or ".join(source.files)
                raise InputError(f"--dataset_name {name}: a single file must be a {kinds} file.{hint}")
            options = {"data_files": glob.escape(str(path)), "cache_dir": cache_dir}
            data = _load(source.files[path.suffix], name, streaming, options, is_local=True)
        else:
            data = source.folder(path) if path.is_dir() and config_name is None and not streaming else None
            if data is None:
                place = str(path) if path.is_dir() else name
                if path.is_dir() and glob.has_magic(place):
                    raise InputError(
                        f"--dataset_name {name}: `datasets` takes brackets, * and ? in a name for a pattern. Rename "
                        "the folder."
                    )
                options = {"name": config_name, "cache_dir": cache_dir, "token": token}
                data = _load(place, name, streaming, options, is_local=path.is_dir())
    except InputError:
        raise
    except Exception as error:  # `datasets` and the libraries it uses may raise any exception
        where = (
            "It is a folder here, but holds no data set that `datasets` can read"
            if path.is_dir()
            else "The file here cannot be read"
            if path.exists()
            else "It is no file or folder here, and the Hub does not give it"
        )
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ is not None else error
        reason = first_line(cause)
        if found := re.search(r"[Aa]vailable(?: configs)?: \[(.+)\]", str(cause)):
            option = "--dataset_config_name" + ("" if config_name is None else f" {config_name}")
            raise InputError(f"{option}: {name} has the configurations {found[1]}. Choose one of them.") from error
        if isinstance(cause, IndexError):  # how `load_from_disk` fails on a split without rows
            reason = "one of its splits is empty"
        elif isinstance(cause, CastError):
            reason = f"its files differ in their columns, or in their types ({one_line(cause)})"
        elif isinstance(cause, YAMLError):
            reason = f"the metadata in its README.md are no YAML ({one_line(cause)})"
        elif isinstance(cause, UnicodeDecodeError):
            reason = f"a text in it is not in UTF-8 ({reason}): save it as such"
        raise InputError(
            f"--dataset_name {name} cannot be loaded. {where}: {reason}. Give a Hub id, {source.others}, or "
            f'"{next(iter(source.demo))}".'
        ) from error
    return data if isinstance(data, dict) else datasets.DatasetDict({"train": data})


def _load(place: str, name: str, streaming: bool, options: dict[str, Any], is_local: bool) -> Any:
    if is_local:  # for the Hub, these requests would be sent twice
        builder = datasets.load_dataset_builder(place, **options)
        _check_class_names(name, builder)
        if isinstance(config := builder.config, CsvConfig):
            if config.na_values is None:
                # By default, the classes "NA" and "None" and the text "null" are taken for missing values.
                options = {**options, "keep_default_na": False, "na_values": [""]}
            if config.features is None and not streaming:
                return _load_csv(place, config, options)
    return datasets.load_dataset(place, streaming=streaming, **options)


def _load_csv(place: str, config: CsvConfig, options: dict[str, Any]) -> datasets.DatasetDict:
    """Load CSV files with all values as they are written: read as numbers, the classes "01" and "1" would be one.

    Columns that hold nothing but whole numbers, as usually written, become numbers afterwards.
    """
    how = config.pd_read_csv_kwargs | {"nrows": 0, "chunksize": None}
    files = [file for files in (config.data_files or {}).values() for file in files]
    are_plain = all(Path(file).suffix in (".csv", ".tsv") for file in files)
    headers = {tuple(map(str, pd.read_csv(file, **how).columns)) for file in files} if are_plain else set()
    if len(headers) == 1:  # if they differ, `datasets` says how
        texts = datasets.Features({column: datasets.Value("string") for column in headers.pop()})
        options = {**options, "features": texts}
    data = datasets.load_dataset(place, **options)
    for column, feature in next(iter(data.values())).features.items():
        if holds(feature, "string") and all(_are_whole_numbers(each.data.column(column)) for each in data.values()):
            data = data.cast_column(column, datasets.Value("int64"))
    return data


def _are_whole_numbers(texts: pa.ChunkedArray) -> bool:
    return all(
        pc.all(pc.match_substring_regex(part, r"^(0|-?[1-9][0-9]{0,17})$"), min_count=0).as_py()
        for part in (texts.slice(0, 100).combine_chunks(), *texts.chunks)  # most columns of texts fail at once
    )


def _check_class_names(name: str, builder: datasets.DatasetBuilder) -> None:
    """Raise an `InputError` if parquet files number their classes differently; `datasets` reads only one's names."""
    first: dict[str, tuple[str, list[str]]] = {}
    for file in (file for files in (builder.config.data_files or {}).values() for file in files):
        try:
            schema = pq.read_schema(file) if file.endswith(".parquet") else pa.schema([])
        except pa.ArrowInvalid:  # reading the data tells more
            continue
        for column, feature in datasets.Features.from_arrow_schema(schema).items():
            if isinstance(feature, datasets.ClassLabel):
                other, names = first.setdefault(column, (file, feature.names))
                if any(ours != theirs for ours, theirs in zip(feature.names, names, strict=False)):
                    raise InputError(
                        f"{name}: {Path(other).name} and {Path(file).name} name their classes differently in "
                        f"{column!r}. Cast both to one ClassLabel, and save them again."
                    )
