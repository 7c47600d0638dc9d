"""The norms that can divide a gradient.

Each norm maps one tensor of any shape to a scalar tensor. It is computed and returned
in float32 (float64 for a float64 tensor): half precision overflows at 1000 entries of
300. Norms are absolutely homogeneous, ``norm(c * g) == abs(c) * norm(g)``, so
``g / norm(g)`` does not depend on the gradient's magnitude.

Example:
    >>> from keras_normopt import norms
    >>> float(norms.l2([3.0, -4.0]))
    5.0
    >>> float(norms.avg_l1([[1.0, -2.0], [3.0, -4.0]]))
    2.5
"""

from keras_normopt.norms._definitions import *  # noqa: F403
from keras_normopt.norms._definitions import __all__ as __all__
