"""Builds the embedded corpus: `python -m data_prep.corpus --help`."""

import sys

from data_prep.corpus.build import main

if __name__ == "__main__":
    sys.exit(main())
