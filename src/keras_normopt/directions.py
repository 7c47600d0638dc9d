"""Values for the argument `direction` of the normalized optimizers.

A direction replaces each gradient by a tensor of the same shape. With
`apply_to="update"`, it replaces each update instead.

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
