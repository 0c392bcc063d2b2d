"""`python -m prefopt` is the `prefopt` command."""

import sys

from prefopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
