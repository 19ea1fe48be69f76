#!/usr/bin/env python
"""Train a balanced student on long-tailed images: `accelerate launch scripts/run_bkd.py --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bkd_hf.arguments import parse_arguments
from bkd_hf.errors import run_script
from bkd_hf.machine import leave_process_group
from bkd_hf.metrics import NotFiniteError
from bkd_hf.run import run
from bkd_hf.run_folder import has_checkpoint
from bkd_hf.stopping import at_sigterm, stop


def main(argv: Sequence[str] | None = None) -> int:
    """Run; one line and exit code 2 for bad input, 1 for a training that diverges, 75 for one that SIGTERM stopped."""
    output_dir = None

    def work() -> None:
        nonlocal output_dir
        arguments = parse_arguments(argv, digits_recipe=Path(__file__).parent / "recipes" / "digits.yaml")
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


if __name__ == "__main__":
    sys.exit(main())
