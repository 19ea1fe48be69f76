#!/usr/bin/env python
"""Publish a finished run, a split, or the metric: `python scripts/publish.py --help`."""

import sys

from bkd_hf.commands.publish import main

if __name__ == "__main__":
    sys.exit(main())
