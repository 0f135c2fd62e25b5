"""The pipeline from raw videos: `python -m data_prep.run --help`."""

import sys

from data_prep.raw.run import main

if __name__ == "__main__":
    sys.exit(main())
