"""Runs the command line of `python -m keras_normopt.experiments`."""

import sys

from keras_normopt.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
