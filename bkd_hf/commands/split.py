r"""Write a long-tailed split as a data set of its own, which others can load and cite.

It gets parquet files with the images as they are, the test split, untouched, and a validation split if there is one
(without a test split a fifth of each class becomes it), a card with counts and figure, and a
record of how it was made. The same command makes the same files again, or publishes a split that is finished.

  bkd-hf split --dataset_name uoft-cs/cifar100 --label_column_name fine_label \
      --imbalance_ratio 100 --push_to_hub USER/cifar100-lt
  bkd-hf split --dataset_name leaves    # has a tail already, which stays as it is
  bkd-hf split --train_list ImageNet_LT_train.txt --test_list ImageNet_LT_test.txt \
      --val_list ImageNet_LT_val.txt --image_folder ILSVRC2012
  bkd-hf split --train_list train2018.json --test_list val2018.json --image_folder inat2018
  bkd-hf split --dataset_name user/shards --count_only    # class_counts.json, for bkd-hf run --streaming
"""

from __future__ import annotations

import argparse
import functools
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..data import LABEL_COLUMN, PARETO_ALPHA, PROFILES, class_counts, make_long_tailed
from ..errors import InputError, run_script
from ..loading import NoTestSplitError, load_image_dataset
from ..program import path_given, program
from ..ranges import check_ranges
from ..results import hub_id, save_json, without_folders
from ..splits import SPLIT_NAME, check_output_folder, exact, save_split
from ..text import printable

#: Ratio of largest to smallest class from which data counts as unbalanced; default ratio for balanced data.
UNBALANCED, RATIO = 2.0, 100.0
_DRAWING = {
    "dataset_name": "A Hub id, a folder of class folders, a saved set, parquet, or digits.",
    "dataset_config_name": "Configuration of a data set that has several.",
    "image_column_name": "Found by its type if not given.",
    "label_column_name": "Found by its type or a usual name if not given.",
    "train_split_name": "train, or the only split, if not given.",
    "eval_split_name": "What becomes test: test, or else validation, val, …",
    "imbalance_ratio": f"Images of the largest class per image of the smallest. Not given: {RATIO:g}, or the images "
    f"as they are, if the largest class has at least {UNBALANCED:g} times as many as the smallest.",
    "profile": "Shape of the tail: exp, step (half head, half tail) or pareto (default: exp).",
    "pareto_alpha": f"For --profile pareto (default: {PARETO_ALPHA:g}).",
    "max_class_count": "Images of the largest class; by default all it can give.",
    "class_order": "Which classes become the head: the first by label, or the largest by size (default: size where "
    "the data is unbalanced already, else label).",
    "seed": "Which images are kept, or set aside as the test split (default: 0).",
}
_SHAPE = ("profile", "pareto_alpha", "max_class_count", "class_order")
_CHOICES = {"profile": PROFILES, "class_order": ("label", "size")}
_LISTS = {
    "train_list": "Lines of the form `path label`, or JSON as that of iNaturalist 2018.",
    "test_list": "The same for the test split.",
    "val_list": "The same for a validation split.",
    "image_folder": "What the paths in the lists are relative to.",
    "class_names": "File with one name per line; names in the JSON, or of folders, if not given.",
}
_TYPES = {"imbalance_ratio": float, "pareto_alpha": float, "max_class_count": int, "seed": int}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options as given."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=118),
        allow_abbrev=False,
    )
    titles = ("a split drawn from a data set, or its own tail", "a published split, from the lists of its files")
    for title, table in zip(titles, (_DRAWING, _LISTS), strict=True):
        group = parser.add_argument_group(title)
        for name, text in table.items():
            kind, choices = _TYPES.get(name, str), _CHOICES.get(name)
            group.add_argument(f"--{name}", type=kind, choices=choices, metavar=name.split("_")[-1].upper(), help=text)
    text = "Make no split: count the classes of the training images in one pass, for --class_counts of a run."
    parser.add_argument("--count_only", action="store_true", default=None, help=text)
    to = parser.add_argument_group("where it goes")
    named = "Named after the split, in outputs/, if not given."
    to.add_argument("--output_dir", type=path_given, metavar="DIR", help=named)
    to.add_argument("--push_to_hub", metavar="USER/NAME", help="Publish it there too.")
    to.add_argument("--private", action="store_true", default=None, help="Publish it as a private data set.")
    to.add_argument("--token", help="Hub token, if not stored by `hf auth login`.")
    to.add_argument("--license", default="unknown", help="License of the images, for the card (default: %(default)s).")
    return parser.parse_args(argv)


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the options that have a value."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def check(options: argparse.Namespace) -> None:
    """Raise an `InputError` if options are missing, or contradict each other."""
    check_ranges(options)
    drawn, listed = list(given(options, _DRAWING)), list(given(options, _LISTS))
    if options.private and not options.push_to_hub:
        raise InputError("--private: without --push_to_hub nothing is published, so it has no effect. Leave it out.")
    if options.count_only:
        others = given(options, [*_SHAPE, "imbalance_ratio", "eval_split_name", "seed", *_LISTS, "push_to_hub"])
        if others or options.dataset_name is None:
            raise InputError(
                "--count_only counts the training images of --dataset_name, as they are. "
                + (f"Leave --{next(iter(others))} out." if others else "Give that.")
            )
    if options.dataset_name is not None:
        if listed:
            raise InputError(f"--{listed[0]}: with --dataset_name no lists are read. Give one or the other.")
        if options.pareto_alpha is not None and options.profile != "pareto":
            raise InputError("--pareto_alpha has no effect without --profile pareto. Leave it out, or add that.")
        options.seed = options.seed or 0
        return
    if not listed:
        raise InputError("Give --dataset_name, or --train_list, --test_list and --image_folder (--help).")
    if drawn:
        raise InputError(f"--{drawn[0]}: it is for a split that is drawn from --dataset_name; lists are fixed.")
    if missing := [f"--{name}" for name in ("train_list", "test_list", "image_folder") if name not in listed]:
        raise InputError(f"{', '.join(missing)}: needed with --{listed[0]}.")


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Return the description of how the split is made, for record and card, without local folders."""
    told = given(options, _DRAWING | _LISTS)
    told = {name: without_folders(value) if isinstance(value, str) else value for name, value in told.items()}
    command = program("split")
    for name, value in told.items():
        command += [f"--{name}", exact(value) if isinstance(value, float) else str(value)]
    # A published split is named after the file of its training images: ImageNet_LT for ImageNet_LT_train.txt.
    title = told.pop("dataset_name", None) or re.sub(r"[_-]train$", "", Path(told["train_list"]).stem)
    source_id = None if options.dataset_name is None else hub_id(options.dataset_name)
    return {"name": title, "source_id": source_id, **told, "command": shlex.join(command)}


def default_name(how: dict[str, Any]) -> str:
    """Name the output folder after the options that differ from their defaults."""
    parts = [Path(how["name"]).name]
    if "train_list" not in how and "profile" not in how:
        parts += ["lt"]
    if "profile" in how:
        parts += ["lt", f"{how['imbalance_ratio']:g}", *([] if how["profile"] == "exp" else [how["profile"]])]
        parts += [f"seed{how['seed']}"] if how["seed"] else []
    return "_".join(parts)


def load(options: argparse.Namespace) -> tuple[datasets.DatasetDict, dict[str, Any]]:
    """Load the source, and fill in the options that depend on it; also return its description."""
    given_splits = options.train_split_name, options.eval_split_name
    columns = options.dataset_config_name, options.image_column_name, options.label_column_name
    read = functools.partial(
        load_image_dataset, options.dataset_name, *columns, *given_splits, split_seed=options.seed, token=options.token
    )
    about: dict[str, Any] = {}
    try:
        source = read(untouched_test=True)
    except NoTestSplitError:
        source = read()
        about["test"] = "carved"
    counts = class_counts(source["train"])
    is_unbalanced = max(counts) >= UNBALANCED * min(counts)
    if options.imbalance_ratio is None and is_unbalanced:
        if shape := next(iter(given(options, _SHAPE)), None):
            raise InputError(f"--{shape}: it shapes a tail that --imbalance_ratio cuts. Give that, or leave it out.")
        return source, about
    defaults: dict[str, Any] = {"imbalance_ratio": RATIO, "profile": "exp"}
    defaults |= {"class_order": "size"} if is_unbalanced else {}
    defaults |= {"pareto_alpha": PARETO_ALPHA} if options.profile == "pareto" else {}
    vars(options).update({name: value for name, value in defaults.items() if name not in given(options, defaults)})
    return source, about


def make(options: argparse.Namespace) -> None:
    """Build, save and publish a split."""
    from ..file_lists import build_split_from_files
    from ..hub import check_repo_access, publish_folder
    from ..streams import count_labels

    check(options)
    if options.count_only:
        columns = options.image_column_name, options.label_column_name
        told = options.dataset_config_name, columns, options.train_split_name, options.token
        counts = count_labels(options.dataset_name, *told)
        path = (options.output_dir or Path("outputs", Path(options.dataset_name).name)) / "class_counts.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_json(counts, path)
        print(f"{sum(counts.values()):,} images of {len(counts):,} classes: {printable(path)}")
        return
    about: dict[str, Any] = {}
    if options.dataset_name is not None:
        source, about = load(options)
    how = describe(options) | about
    folder = options.output_dir or Path("outputs", default_name(how))
    check_output_folder(folder, how)
    if options.dataset_name is None:  # quick, so missing files are reported before the Hub is contacted
        splits = build_split_from_files(**given(options, _LISTS))
    if options.push_to_hub:
        check_repo_access(options.push_to_hub, options.token, "dataset", options.private)
    if options.dataset_name is not None:
        train = source["train"]
        if options.imbalance_ratio is not None:
            by_size = np.argsort(-np.array(class_counts(train)), kind="stable").tolist()
            order = by_size if how.get("class_order") == "size" else None
            ratio, profile, alpha = options.imbalance_ratio, options.profile, how.get("pareto_alpha", PARETO_ALPHA)
            count, seed = options.max_class_count, options.seed
            train = make_long_tailed(train, LABEL_COLUMN, ratio, profile, seed, count, order, alpha)
        others = {"validation": source["validation"]} if "validation" in source else {}
        splits = datasets.DatasetDict({"train": train, "test": source["eval"], **others})
    was_there = (folder / SPLIT_NAME).exists()
    for split, content in save_split(splits, folder, how, options.license)["splits"].items():
        counts = content["class_counts"]
        tail = f"{max(counts):,} to {min(counts):,} in each of {len(counts):,} classes"
        print(f"{split}: {content['num_images']:,} images, {tail}")
    print(printable(f"{'Already there' if was_there else 'Written'}: {folder}"))
    if options.push_to_hub:
        url = publish_folder(folder, options.push_to_hub, private=options.private, token=options.token)
        print(f"Published: {url}")


def main(argv: list[str] | None = None) -> int:
    """Make a split; return the exit code."""

    def work() -> None:
        make(parse(argv))

    return run_script(work, "the same command makes it, and publishes it where it is finished")
