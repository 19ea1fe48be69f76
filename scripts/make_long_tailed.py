#!/usr/bin/env python
"""Write a long-tailed split as a data set of its own: `python scripts/make_long_tailed.py --help`."""

import sys

from bkd_hf.commands.split import main

if __name__ == "__main__":
    sys.exit(main())
