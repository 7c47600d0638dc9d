"""The arrays that an optimizer saves."""

import numpy as np


def stored(optimizer):
    """Returns the saved arrays: first those of the base, in order, then the others."""
    store = {}
    optimizer.save_own_variables(store)
    return [np.asarray(value) for value in store.values()]
