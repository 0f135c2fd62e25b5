"""Imports other trainers' files as records: `python -m data_prep.importers --help`."""

import sys

from data_prep.records.importers import main

if __name__ == "__main__":
    sys.exit(main())
