"""The published comparisons of normalized optimizers, as one command.

Trains the same network with several optimizers, norms, learning rates and seeds, and
writes tables and figures. Goes on where it was cut off.

`python -m keras_normopt.experiments TASK`, where `--help` lists the options. Needs the
extra `experiments`.
"""
