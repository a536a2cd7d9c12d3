"""The flat command line: `python main.py --dataset cifar10 --mode train --epochs 10`. A shim for `diffmoe`."""

import sys

from diffmoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
