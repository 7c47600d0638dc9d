"""What a file holds of an optimizer."""

import numpy as np


def stored(optimizer):
    """The arrays that an optimizer saves: the base's, in order, and then others."""
    store = {}
    optimizer.save_own_variables(store)
    return [np.asarray(value) for value in store.values()]
