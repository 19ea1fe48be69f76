#!/usr/bin/env python
# For `uv run scripts/run_bkd.py`: bkd_hf is this checkout, and brings what setup.cfg asks for.
# /// script
# requires-python = ">=3.11"
# dependencies = ["bkd_hf"]
#
# [tool.uv.sources]
# bkd_hf = { path = "..", editable = true }
# ///
"""Train a balanced student on long-tailed images: `accelerate launch scripts/run_bkd.py --help`."""

import sys

from bkd_hf.commands.run import main

if __name__ == "__main__":
    sys.exit(main())
