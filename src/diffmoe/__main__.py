"""`python -m diffmoe`: the command line."""

import sys

from diffmoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
