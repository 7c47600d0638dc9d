"""Adaptive learning rates: what the step of each block, or variable, is multiplied by.

The factor multiplies the learning rate that the base's own update receives, so that it
acts on the step of any base: a factor on the gradient would change nothing under Adam.
Under momentum it is inside, as in LARS.

Example:
    >>> import keras_normopt
    >>> from keras_normopt import step_sizes
    >>> lars = keras_normopt.NormalizedSGD(
    ...     0.1, momentum=0.9, step_size=step_sizes.WeightNorm(coefficient=0.1)
    ... )
"""

from keras_normopt._transforms.step_sizes import GradientCorrelation, WeightNorm

__all__ = ["GradientCorrelation", "WeightNorm"]
