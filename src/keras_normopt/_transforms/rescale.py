"""Normalizes or clips each block of gradients."""

import numpy as np
from keras import ops

from keras_normopt._backend.devices import to_device_of
from keras_normopt._backend.tensors import constant_like, dtype_of

#: The limit of a block that is not clipped. It is finite, because a user's check for
#: infinities would stop the program.
NO_LIMIT = float(np.finfo("float32").max)


def normalize(gradients, norm, epsilon):
    """Normalizes each block: u ← u / max(‖u‖, ε).

    Args:
        gradients: The `Gradients`.
        norm: The `Norm`.
        epsilon: Scalar tensor, variable or float, ε.
    """
    norm.normalize(gradients, lambda norms: [_at_least(epsilon, n) for n in norms])


def clip(gradients, norm, limits):
    """Clips each block: u ← u / max(1, ‖u‖ / limit).

    Args:
        gradients: The `Gradients`.
        norm: The `Norm`.
        limits: Packed limits of the norms. `NO_LIMIT` means that a block is not
            clipped.

    Returns:
        Packed booleans, which are true for norms above their limit.
    """
    above, divisors = [], []
    for n, limit in zip(gradients.norms(norm), limits, strict=True):
        limit = to_device_of(ops.cast(limit, dtype_of(n)), n)
        has_limit = limit < NO_LIMIT
        above.append((n > limit) & has_limit)
        # A NaN is neither above nor below its limit. It must reach the user.
        is_within_limit = (n <= limit) | ops.logical_not(has_limit)
        divisors.append(ops.where(is_within_limit, ops.ones_like(n), n / limit))
    gradients.divide(divisors)
    return above


def _at_least(floor, norm):
    """Returns the larger of a norm and a floor above 0."""
    # The norm of a zero gradient is 0, and 0 / 0 is NaN. Compilers flush numbers below
    # the smallest normal number to 0.
    floor, smallest = ops.cast(floor, dtype_of(norm)), np.finfo(dtype_of(norm)).tiny
    floor = ops.where(floor < smallest, constant_like(floor, smallest), floor)
    floor = to_device_of(floor, norm)
    # The comparison is false for NaN, so NaN stays.
    return ops.where(norm < floor, floor, norm)
