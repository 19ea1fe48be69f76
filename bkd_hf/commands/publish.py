"""Publish on the Hub what a folder holds for others, in one commit.

A finished run (weights, configuration, figures, results, model card), a split written by `bkd-hf split`, or the
metric (bkd_hf/long_tail). Exit code 2 for bad input, 1 if the Hub does not take it: the same command tries again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError, run_script
from ..program import path_given


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", metavar="OUTPUT_DIR", type=path_given, help="The folder.")
    parser.add_argument("--repo_id", help="USER/NAME; made if it is not there. This, --space or --export.")
    parser.add_argument(
        "--space",
        metavar="USER/NAME",
        help="Of a run: also make OUTPUT_DIR/space, a Gradio app that names what is in a picture and says how "
        "far to trust each answer, and push it to this Space. `python OUTPUT_DIR/space/app.py` shows it here.",
    )
    parser.add_argument(
        "--space_examples",
        type=int,
        default=0,
        help="So many test images, each of another class, for the app to show; if their license lets you. Default: 0.",
    )
    parser.add_argument("--export", choices=("none", "onnx"), default="none", help="onnx: first export the student.")
    parser.add_argument("--private", action="store_true", default=None, help="Make a new repository private.")
    parser.add_argument("--license", help="License of a student, as the Hub calls it: apache-2.0, mit, …")
    parser.add_argument("--dataset_id", help="Id on the Hub of the training data, where it was read from a folder.")
    parser.add_argument("--push_teacher", action="store_true", help="Also push the teacher, to REPO_ID-teacher.")
    parser.add_argument("--revision", help="Branch to push to.")
    parser.add_argument("--token", help="Token with write access, if not stored by `hf auth login` or in HF_TOKEN.")
    parser.add_argument("--dry_run", action="store_true", help="Write the card and list the files; push nothing.")
    options = parser.parse_args(argv)
    if options.repo_id is None and options.space is None and options.export == "none":
        parser.error("one of the following arguments is required: --repo_id, --space, --export")
    return options


def _publish(options: argparse.Namespace) -> None:
    from ..hub import folders_of_run, prepare, publish_folder, publish_run, write_card
    from ..text import printable

    if options.space_examples < 0:
        raise InputError(f"--space_examples must be 0 or more, got {options.space_examples}.")
    if options.space_examples and options.space is None:
        raise InputError("--space_examples is for --space USER/NAME: give both, or leave it out.")
    if options.push_teacher and options.repo_id is None:
        raise InputError("--push_teacher is for --repo_id USER/NAME: give both, or leave it out.")
    folder, repo_id, with_teacher = options.folder, options.repo_id, options.push_teacher
    if options.export == "onnx":
        _export(folder)
    about = {"license": options.license, "dataset_id": options.dataset_id}
    access = {"private": options.private, "token": options.token, "revision": options.revision}
    app = {}
    if options.space is not None:
        from ..spaces import build_space

        app = {options.space: build_space(folder, options.space, repo_id, options.license, options.space_examples)}
    if not options.dry_run:
        if repo_id is not None:
            for url in publish_run(folder, repo_id, with_teacher, **about, **access):
                print(f"Published: {url}")
        for name, part in app.items():
            print(f"Published: {publish_folder(part, name, **access)}")
        return
    folders = {} if repo_id is None else folders_of_run(folder, repo_id, with_teacher)
    for name, part in {**folders, **app}.items():
        publication = prepare(part, name, **({} if name in app else about))
        print(f"Would be pushed to {name} ({publication.repo_type}):")
        for file, size in publication.sizes().items():
            print(f"  {size:>13,}  {file}")
        if card := write_card(publication, part):
            print(printable(f"The card is in {card}."))


def _export(folder: Path) -> None:
    from transformers.utils import logging

    from ..announcer import Announcer
    from ..machine import set_num_threads
    from ..onnx_export import export_run, recorded_arguments

    logging.disable_progress_bar()
    set_num_threads()
    export_run(recorded_arguments(folder), Announcer())


def main(argv: Sequence[str] | None = None) -> int:
    """Publish; return the exit code."""
    return run_script(lambda: _publish(_parse(argv)), "nothing was published; the same command tries again")
