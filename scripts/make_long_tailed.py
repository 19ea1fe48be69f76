#!/usr/bin/env python
"""Make a long-tailed split that others can load and cite: `python scripts/make_long_tailed.py --help`."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from bkd_hf.data import PARETO_ALPHA, PROFILES
from bkd_hf.errors import InputError, PublishError, tell
from bkd_hf.results import hub_id, without_folders
from bkd_hf.splits import SPLIT_NAME, build_split_from_files, check_output_folder, draw_split, exact, save_split

_EPILOG = r"""examples:
  python scripts/make_long_tailed.py --dataset_name uoft-cs/cifar100 --label_column_name fine_label \
      --imbalance_ratio 100 --push_to_hub USER/cifar100-lt
  python scripts/make_long_tailed.py --train_list ImageNet_LT_train.txt --test_list ImageNet_LT_test.txt \
      --val_list ImageNet_LT_val.txt --image_folder ILSVRC2012
  python scripts/make_long_tailed.py --train_list train2018.json --test_list val2018.json --image_folder inat2018
"""
#: What a drawn split is made by if nothing else is said.
_DRAWING_DEFAULTS: dict[str, Any] = {"imbalance_ratio": 100.0, "profile": "exp", "seed": 0}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options, with the defaults of the way that is taken.

    Raises:
        InputError: If options are missing, or contradict each other.
    """
    parser = argparse.ArgumentParser(
        description="Write a long-tailed split as a data set of its own: parquet with the images as they are, the "
        "untouched\ntest split, a card with counts and figure, and a record of how it was made.",
        epilog=_EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=118),
        allow_abbrev=False,
    )
    draw = parser.add_argument_group("a split drawn from a balanced data set")
    draw.add_argument(
        "--dataset_name", metavar="NAME", help="A Hub id, a folder of class folders, a saved set, parquet, or digits."
    )
    draw.add_argument("--dataset_config_name", metavar="NAME", help="Configuration of a Hub data set.")
    draw.add_argument("--image_column_name", metavar="NAME", help="Found by its type if not given.")
    draw.add_argument("--label_column_name", metavar="NAME", help="Found by its type or a usual name if not given.")
    draw.add_argument("--train_split_name", metavar="NAME", help="train, or the only split, if not given.")
    draw.add_argument("--eval_split_name", metavar="NAME", help="What becomes test: test, or else validation, val, …")
    draw.add_argument(
        "--imbalance_ratio",
        type=float,
        metavar="RATIO",
        help="Images of the largest class per image of the smallest (default: 100).",
    )
    draw.add_argument(
        "--profile",
        choices=PROFILES,
        help="Shape of the tail: exponential, half head and half tail, or Pareto (default: exp).",
    )
    draw.add_argument(
        "--pareto_alpha", type=float, metavar="ALPHA", help=f"For --profile pareto (default: {PARETO_ALPHA:g})."
    )
    draw.add_argument(
        "--max_class_count", type=int, metavar="COUNT", help="Images of the largest class; by default all it can give."
    )
    draw.add_argument("--seed", type=int, help="Which images are kept (default: 0).")
    lists = parser.add_argument_group("a published split, from the lists of its files")
    lists.add_argument(
        "--train_list", metavar="FILE", help="Lines of the form `path label`, or JSON as that of iNaturalist 2018."
    )
    lists.add_argument("--test_list", metavar="FILE", help="The same for the test split.")
    lists.add_argument("--val_list", metavar="FILE", help="The same for a validation split.")
    lists.add_argument("--image_folder", metavar="DIR", help="What the paths in the lists are relative to.")
    lists.add_argument(
        "--class_names", metavar="FILE", help="One name per line; names in the JSON, or of folders, if not given."
    )
    to = parser.add_argument_group("where it goes")
    to.add_argument("--output_dir", type=Path, metavar="DIR", help="Named after the split, in outputs/, if not given.")
    to.add_argument("--push_to_hub", metavar="USER/NAME", help="Publish it there too.")
    to.add_argument("--private", action="store_true", default=None, help="Publish it as a private data set.")
    to.add_argument("--token", help="Hub token, if not stored by `hf auth login`.")
    to.add_argument("--license", default="unknown", help="License of the images, for the card (default: %(default)s).")
    options = parser.parse_args(argv)

    def given(group: argparse._ArgumentGroup) -> list[str]:
        return [a.dest for a in group._group_actions if getattr(options, a.dest) is not None]

    if options.private and not options.push_to_hub:
        raise InputError("--private: without --push_to_hub nothing is published, so it has no effect. Leave it out.")
    if options.dataset_name is not None:
        if given(lists):
            raise InputError(f"--{given(lists)[0]}: with --dataset_name no lists are read. Give one or the other.")
        if options.pareto_alpha is not None and options.profile != "pareto":
            raise InputError("--pareto_alpha has no effect without --profile pareto. Leave it out, or add that.")
        if options.profile == "pareto" and options.pareto_alpha is None:
            options.pareto_alpha = PARETO_ALPHA
        for name, default in _DRAWING_DEFAULTS.items():
            setattr(options, name, default if getattr(options, name) is None else getattr(options, name))
    else:
        if not given(lists):
            raise InputError("Give --dataset_name, or --train_list, --test_list and --image_folder (--help).")
        if given(draw):
            raise InputError(
                f"--{given(draw)[0]}: it is for a split that is drawn from --dataset_name; lists are fixed."
            )
        missing = [
            f"--{name}" for name in ("train_list", "test_list", "image_folder") if getattr(options, name) is None
        ]
        if missing:
            raise InputError(f"{', '.join(missing)}: needed with --{given(lists)[0]}.")
    options.how = describe(options, [*given(draw), *given(lists)])
    if options.output_dir is None:
        options.output_dir = Path("outputs", default_name(options))
    return options


def describe(options: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Return what split and card say of how the split was made."""
    told = {name: getattr(options, name) for name in names}
    told = {name: without_folders(value) if isinstance(value, str) else value for name, value in told.items()}
    words = [exact(value) if isinstance(value, float) else str(value) for value in told.values()]
    pairs = zip((f"--{name}" for name in told), words, strict=True)
    command = shlex.join(["python", "scripts/make_long_tailed.py", *(word for pair in pairs for word in pair)])
    source = options.dataset_name
    return {
        "name": told.pop("dataset_name", None) or split_name(told["train_list"]),
        "source_id": None if source is None else hub_id(source),
        **told,
        "command": command,
    }


def split_name(train_list: str) -> str:
    """Name a published split by the file of its training images: ImageNet_LT for ImageNet_LT_train.txt."""
    stem = Path(train_list).stem
    return re.sub(r"[_-]train$", "", stem)


def default_name(options: argparse.Namespace) -> str:
    """Name the output folder after what is not a default."""
    name = Path(options.how["name"]).name
    if options.dataset_name is None:
        return name
    parts = [name, "lt", f"{options.imbalance_ratio:g}"]
    parts += [] if options.profile == "exp" else [options.profile]
    return "_".join(parts + ([] if options.seed == 0 else [f"seed{options.seed}"]))


def main(argv: list[str] | None = None) -> int:
    """Make a split; exit code 2 for bad input, 1 if the Hub does not take it."""
    warnings.formatwarning = lambda message, category, *_: f"warning: {message}\n"
    try:
        make(parse(argv))
    except (InputError, PublishError) as error:
        return tell(error)
    except KeyboardInterrupt:
        print("interrupted: the same command makes it, and publishes it where it is finished", file=sys.stderr)
        return 130
    return 0


def make(options: argparse.Namespace) -> None:
    """Build, save, and publish."""
    check_output_folder(options.output_dir, options.how)
    splits = None
    if options.dataset_name is None:  # quick, so that what is missing is named before the Hub is asked
        splits = build_split_from_files(
            options.train_list, options.test_list, options.image_folder, options.val_list, options.class_names
        )
    if options.push_to_hub:
        from bkd_hf.publishing import check_repo_access, publish_folder

        check_repo_access(options.push_to_hub, options.token, "dataset", options.private)
    if splits is None:
        splits = draw_split(
            options.dataset_name,
            options.imbalance_ratio,
            options.profile,
            options.seed,
            options.max_class_count,
            PARETO_ALPHA if options.pareto_alpha is None else options.pareto_alpha,
            config_name=options.dataset_config_name,
            image_column=options.image_column_name,
            label_column=options.label_column_name,
            train_split=options.train_split_name,
            eval_split=options.eval_split_name,
            token=options.token,
        )
    was_there = (options.output_dir / SPLIT_NAME).exists()
    record = save_split(splits, options.output_dir, options.how, options.license)
    for split, content in record["splits"].items():
        counts = content["class_counts"]
        shape = f"{max(counts):,} to {min(counts):,} in each of {len(counts):,} classes"
        print(f"{split}: {content['num_images']:,} images, {shape}")
    print(f"{'Already there' if was_there else 'Written'}: {options.output_dir}")
    if options.push_to_hub:
        url = publish_folder(options.output_dir, options.push_to_hub, private=options.private, token=options.token)
        print(f"Published: {url}")


if __name__ == "__main__":
    sys.exit(main())
