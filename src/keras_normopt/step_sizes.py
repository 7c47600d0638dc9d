"""Values for the argument `step_size`: factors of the learning rate.

Each block or variable has its own factor, which adapts during training. A factor
multiplies the learning rate of the base optimizer, so it works with any base. A factor
of the gradient would not change Adam's steps. With momentum, the factor is inside the
momentum, as in LARS.

Example:
    >>> import keras_normopt
    >>> from keras_normopt import step_sizes
    >>> step_size = step_sizes.WeightNorm(coefficient=0.1)
    >>> keras_normopt.NormalizedSGD(momentum=0.9, step_size=step_size)  # LARS
    NormalizedSGD(momentum=0.9, step_size=WeightNorm(coefficient=0.1))
"""

from keras_normopt._transforms.step_sizes import GradientCorrelation, WeightNorm

__all__ = ["GradientCorrelation", "WeightNorm"]
