"""The published comparisons of normalized optimizers, as one command.

`python -m keras_normopt.experiments TASK` trains the same network with several
optimizers, norms, learning rates and seeds, and writes tables and figures. Needs the
extra `experiments`. `--help` lists the options.
"""
