#!/usr/bin/env python
"""Compare methods over seeds, every one on the same path: `python scripts/compare.py --help`."""

import sys

from bkd_hf.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
