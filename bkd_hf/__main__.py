"""`bkd-hf COMMAND …`, or `python -m bkd_hf COMMAND …`: what `scripts/` does, without a checkout."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from . import __version__
from .errors import InputError, run_script
from .program import PROGRAM
from .text import one_line, suggestion

_COMMANDS = {
    "run": "Train a balanced student on long-tailed images.",
    "compare": "Run methods × seeds, and tabulate what they reach.",
    "split": "Write a long-tailed split as a data set of its own.",
    "publish": "Publish a finished run, a split, or the metric on the Hub.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Call a command; return its exit code, or 2 for an unknown command."""
    return run_script(lambda: _call(*(sys.argv[1:] if argv is None else argv)), "nothing has begun")


def _call(name: str = "--help", *options: str) -> int:
    if name in ("-h", "--help"):
        print(f"usage: {PROGRAM} COMMAND [--OPTION VALUE …]\n")
        print(*(f"  {command:9}{text}" for command, text in _COMMANDS.items()), sep="\n")
        print(f"\n{PROGRAM} COMMAND --help lists its options. With a launcher: accelerate launch -m bkd_hf COMMAND …")
        return 0
    if name == "--version":
        print(f"bkd_hf {__version__}")
        return 0
    if name not in _COMMANDS:
        known = ", ".join(_COMMANDS)
        raise InputError(f"{PROGRAM} {one_line(name, 60)}: no such command; {known}.{suggestion(name, [*_COMMANDS])}")
    sys.argv = [f"{PROGRAM} {name}", *options]  # for its help, and the command that it records
    return importlib.import_module(f"bkd_hf.commands.{name}").main()


if __name__ == "__main__":
    sys.exit(main())
