"""Finds the axes of each variable of a layer."""

import numpy as np
from keras import layers, ops

from keras_normopt._blocks import axes


def find(layer, *, given=None):
    """Returns variables and axes by name, and the names of guessed variables."""
    variables = list({id(v): v for v in layer.trainable_variables}.values())
    paths = [v.path for v in variables]
    variable_axes, guessed = axes.find(variables, paths, given)
    names = [v.name for v in variables]
    pairs = zip(variables, variable_axes, strict=True)
    return dict(zip(names, pairs, strict=True)), [names[i] for i in guessed]


def to_numpy(tensor):
    return np.asarray(ops.convert_to_numpy(tensor), "float64")


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def einsum_dense_qkv():
    return layers.EinsumDense("abc,cde->abde", (1, 2, 5))
