"""Builds records from clips and annotations: `python -m data_prep.build --help`."""

import sys

from data_prep.records.build import main

if __name__ == "__main__":
    sys.exit(main())
