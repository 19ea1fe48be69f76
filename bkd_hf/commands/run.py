"""`bkd-hf run`: trains a balanced student on long-tailed images."""

from __future__ import annotations

from collections.abc import Sequence

from ..arguments import DIGITS_RECIPE, parse_arguments
from ..errors import run_script
from ..machine import leave_process_group
from ..metrics import NotFiniteError
from ..options import RunArguments
from ..run import run
from ..run_folder import has_checkpoint
from ..stopping import at_sigterm, stop


def main(argv: Sequence[str] | None = None) -> int:
    """Run; prints one line with exit code 2 for bad input, 1 for a diverged training, 75 after SIGTERM."""
    arguments: RunArguments | None = None
    without = ""

    def work() -> None:
        nonlocal arguments, without
        arguments = parse_arguments(argv, digits_recipe=DIGITS_RECIPE)
        without = " without --overwrite" if arguments.overwrite else ""
        with at_sigterm(stop if arguments.training.enable_jit_checkpoint else None):
            run(arguments)

    def interrupted() -> str:
        # `overwrite` is reset when the earlier run has been deleted.
        if arguments is not None and not arguments.overwrite and has_checkpoint(arguments.training.output_dir):
            return f"the same command{without} continues from the last checkpoint"
        return "there is no checkpoint yet, so the same command begins anew"

    try:
        return run_script(work, interrupted, NotFiniteError)
    finally:
        leave_process_group()
