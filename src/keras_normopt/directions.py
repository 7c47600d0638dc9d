"""Directions, which replace gradients: the argument `direction` of optimizers.

Example:
    >>> import keras_normopt
    >>> from keras_normopt import directions
    >>> direction = directions.Orthogonal(scale="operator")
    >>> keras_normopt.NormalizedSGD(momentum=0.9, direction=direction)
    NormalizedSGD(momentum=0.9, direction=Orthogonal(scale='operator'))
"""

from keras_normopt._transforms.orthogonal import Orthogonal
from keras_normopt._transforms.vector_directions import Rows, Sign

__all__ = ["Orthogonal", "Rows", "Sign"]
