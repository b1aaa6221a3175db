"""``python -m dpquant``: the command line, also for ``torchrun -m dpquant train``."""

import sys

from dpquant.cli import main

if __name__ == "__main__":
    sys.exit(main())
