#!/usr/bin/env python
"""Train a balanced student on long-tailed images: `accelerate launch scripts/run_bkd.py --help`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from bkd_hf.arguments import parse_arguments
from bkd_hf.errors import InputError
from bkd_hf.pipeline import run


def main() -> int:
    """Run; exit code 2 and one line for bad input."""
    warnings.formatwarning = lambda message, category, *_: (
        f"warning: {message}\n" if category is UserWarning else f"{category.__name__}: {message}\n"
    )
    try:
        run(parse_arguments(digits_recipe=Path(__file__).parent / "recipes" / "digits.yaml"))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
