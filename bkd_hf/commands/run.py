"""`bkd-hf run`: trains a balanced student on long-tailed images."""

from __future__ import annotations

from collections.abc import Sequence

from ..arguments import DIGITS_RECIPE, parse_arguments
from ..errors import run_script
from ..machine import leave_process_group
from ..metrics import NotFiniteError
from ..run import run
from ..run_folder import has_checkpoint
from ..stopping import at_sigterm, stop


def main(argv: Sequence[str] | None = None) -> int:
    """Run; prints one line with exit code 2 for bad input, 1 for a diverged training, 75 after SIGTERM."""
    output_dir = None

    def work() -> None:
        nonlocal output_dir
        arguments = parse_arguments(argv, digits_recipe=DIGITS_RECIPE)
        output_dir = arguments.training.output_dir
        with at_sigterm(stop if arguments.training.enable_jit_checkpoint else None):
            run(arguments)

    def interrupted() -> str:
        if output_dir is not None and has_checkpoint(output_dir):
            return "the same command continues from the last checkpoint"
        return "there is no checkpoint yet, so the same command begins anew"

    try:
        return run_script(work, interrupted, NotFiniteError)
    finally:
        leave_process_group()
