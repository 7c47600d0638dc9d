"""The length that each block of gradients gets: u ← u · length(‖u‖) / ‖u‖.

A gradient is divided by ‖u‖ / length, which is written out for each, as the quotient
itself would lose what it is there for where ‖u‖ is 0, tiny or huge.
"""

import keras
import numpy as np
from keras import ops

from keras_normopt._backend.devices import near
from keras_normopt.norms._reductions import like

#: A limit that stands for none. Not infinity: checks for infinities abort at those.
NO_LIMIT = float(np.finfo("float32").max)


def normalize(step, norm, epsilon):
    """Length 1, or ‖u‖ / ε of a block whose norm is below ε: u ← u / max(‖u‖, ε).

    Args:
        step: The `Step`.
        norm: The norm.
        epsilon: Scalar tensor or float, ε.
    """
    step.divide([_at_least(epsilon, n) for n in step.norms(norm)])


def clip(step, norm, limits):
    """Length min(‖u‖, limit): u ← u / max(1, ‖u‖ / limit).

    Args:
        step: The `Step`.
        norm: The norm.
        limits: A list arranged as norms are, `NO_LIMIT` where there is no limit.

    Returns:
        A list arranged as norms are: whether each was above its limit.
    """
    above, divisors = [], []
    for n, limit in zip(step.norms(norm), limits, strict=True):
        limit = near(limit, n)
        has_limit = limit < NO_LIMIT
        above.append((n > limit) & has_limit)
        # Comparisons let NaN through: a NaN in a gradient must reach the user.
        is_free = (n <= limit) | ops.logical_not(has_limit)
        divisors.append(ops.where(is_free, ops.ones_like(n), n / limit))
    step.divide(divisors)
    return above


def _at_least(floor, norm):
    """max(floor, norm), above 0."""
    dtype = keras.backend.standardize_dtype(norm.dtype)
    # A gradient of zeros has the norm 0, and is to stay zero, not NaN. Below the
    # smallest normal number compilers take numbers for 0.
    floor, smallest = ops.cast(floor, dtype), np.finfo(dtype).tiny
    floor = near(ops.where(floor < smallest, like(floor, smallest), floor), norm)
    return ops.where(norm < floor, floor, norm)  # Which is false of NaN.
