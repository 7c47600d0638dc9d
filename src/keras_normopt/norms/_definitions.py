"""Defines the built-in norms over the entries of one block."""

import math

import numpy as np
from keras import ops

from keras_normopt.norms._overflow import built_in

__all__ = [
    "avg_l1",
    "avg_l1_l2",
    "avg_l2",
    "l1",
    "l1_l2",
    "l2",
    "linf",
    "max",
    "min_max",
    "std",
]


@built_in(leaves_range=False)
def l1(g):
    """Returns the sum of absolute values, Σ|g|."""
    return g.sum(ops.abs)


@built_in(squares=True)
def l2(g):
    """Returns the Euclidean norm, √Σg²."""
    return g.l2()


@built_in(squares=True)
def l1_l2(g):
    """Returns the mean of the l1 and l2 norms, (l1 + l2) / 2."""
    return (g.sum(ops.abs) + g.l2()) / 2


@built_in()
def avg_l1(g):
    """Returns the mean absolute value, l1 / N for N entries."""
    return g.sum(ops.abs) / g.size


@built_in(squares=True)
def avg_l2(g):
    """Returns the root mean square, √mean(g²) = l2 / √N for N entries."""
    return g.l2() / math.sqrt(g.size)


@built_in(squares=True)
def avg_l1_l2(g):
    """Returns the mean of the averaged norms, (avg_l1 + avg_l2) / 2."""
    return (g.sum(ops.abs) / g.size + g.l2() / math.sqrt(g.size)) / 2


@built_in(leaves_range=False)
def max(g):
    """Returns the largest absolute value, max|g|. `linf` is the same norm."""
    return g.max_abs()


linf = max


@built_in()
def min_max(g):
    """Returns the mean of the extreme absolute values, (max|g| + min|g|) / 2."""
    return (g.max_abs() + g.min_abs()) / 2


@built_in(squares=True)
def std(g):
    """Returns the population standard deviation, or the root mean square.

    The result is the root mean square if std is below √eps of the root mean square. eps
    belongs to the dtype of the computation. Then the gradient has one element, or it is
    constant up to rounding, and std is zero or rounding noise. Dividing by std would
    multiply the gradient of a ``Dense(1)`` bias, for example, by a million.
    """
    std = g.std()
    root_mean_square = g.l2() / math.sqrt(g.size)
    root_eps = float(np.sqrt(np.finfo(g.dtype).eps))
    is_constant = ops.less(std, root_eps * root_mean_square)
    return ops.where(is_constant, root_mean_square, std)


BUILT_IN = {
    norm.__name__: norm
    for norm in (l1, l2, l1_l2, avg_l1, avg_l2, avg_l1_l2, max, min_max, std)
} | {"linf": linf}
