"""Reads the arrays that an optimizer saves."""

import numpy as np


def stored(optimizer):
    """Returns the saved arrays. The arrays of the base come first, in order."""
    store = {}
    optimizer.save_own_variables(store)
    return [np.asarray(value) for value in store.values()]
