"""How to call a command: by `bkd-hf` in every installation, or by its script in a checkout."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAM = "bkd-hf"
#: The corresponding scripts of a checkout, by command.
SCRIPTS = {"run": "run_bkd.py", "compare": "compare.py", "split": "make_long_tailed.py", "publish": "publish.py"}

_FOLDER = Path(__file__).parent.parent / "scripts"


def script_of(command: str) -> Path | None:
    """Return the script to call for a command; `None` outside of a checkout, and if `bkd-hf` itself was called."""
    path = _FOLDER / SCRIPTS[command]
    return path if path.is_file() and not sys.argv[0].startswith(f"{PROGRAM} ") else None


def without_checkout(command: str) -> str:
    """Return a command for users of the installed package: scripts by module, recipes by name."""
    for name, script in SCRIPTS.items():
        command = re.sub(
            rf"^([a-z][\w ]*(?: --num_processes \d+)?) scripts/{script}(?= |$)", rf"\1 -m bkd_hf {name}", command
        )
    return re.sub(r"( --config[ =])scripts/recipes/(\w+)\.yaml(?= |$)", r"\1\2", command)


def program(command: str, launcher: Sequence[str] = ()) -> list[str]:
    """Return the words that call a command, as others can use them.

    Args:
        command: One of `SCRIPTS`.
        launcher: What starts it, e.g. `accelerate launch`; plain Python if empty.
    """
    if script_of(command):
        return [*(launcher or ["python"]), f"scripts/{SCRIPTS[command]}"]
    return [*launcher, "-m", "bkd_hf", command] if launcher else [PROGRAM, command]


def path_given(name: str) -> Path:
    """Return a path from a command line; a shell leaves the "~" in "--output_dir=~/x" as it is."""
    return Path(name).expanduser()
