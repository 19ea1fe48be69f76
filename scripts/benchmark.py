#!/usr/bin/env python
"""Measure how fast training is, and where its time goes: `python scripts/benchmark.py --help`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from bkd_hf.benchmark import BenchmarkOptions, run
from bkd_hf.benchmark_report import save_benchmark, tables
from bkd_hf.errors import InputError, tell


def parse(argv: Sequence[str] | None = None) -> BenchmarkOptions:
    """Return the options.

    Raises:
        InputError: If one is out of its range.
    """
    parser = HfArgumentParser(
        BenchmarkOptions,
        description="Measure images per second and peak memory of BKDTrainer and of what it is to be compared with, "
        "by turns; its input pipeline; its start; and what takes long for many images. One run, one table.",
        allow_abbrev=False,
    )
    return parser.parse_args_into_dataclasses(None if argv is None else list(argv))[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; exit code 1 if something that is measured failed, 2 for bad input."""
    words = sys.argv[1:] if argv is None else list(argv)
    console = Console(highlight=False)
    datasets.disable_progress_bars()
    try:
        options = parse(words)
        # As others may see it: without the folders of this machine.
        shown = [Path(word).name if word.startswith(("/", "~", "..")) else word for word in words]
        command = shlex.join(["python", "scripts/benchmark.py", *shown])
        results = run(options, Path(__file__).with_name("run_bkd.py"), command, say=console.print)
        paths = save_benchmark(results, options.output_dir)
    except (InputError, RuntimeError) as error:
        return tell(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for title, head, rows in tables(results):
        table = Table(title=title, title_justify="left")
        for name in head:
            table.add_column(name)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"Written: {', '.join(map(str, paths))}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
