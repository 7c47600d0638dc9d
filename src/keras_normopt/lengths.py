"""The length that each block of gradients gets: u ← u · length(‖u‖) / ‖u‖.

A gradient is divided by ‖u‖ / length, which is written out for each, as the quotient
itself would lose what it is there for where ‖u‖ is 0, tiny or huge.
"""

import numpy as np
from keras import ops

from keras_normopt.entries import like

_SMALLEST = float(np.finfo("float32").tiny)


def normalize(step, norm, epsilon):
    """Length 1, or ‖u‖ / ε of a block whose norm is below ε: u ← u / max(‖u‖, ε)."""
    step.divide([_at_least(epsilon, n) for n in step.norms(norm)])


def clip(step, norm, limits):
    """Length min(‖u‖, limit): u ← u / max(1, ‖u‖ / limit).

    Args:
        step: The `Step`.
        norm: The norm.
        limits: A list arranged as norms are, infinite where there is no limit.
    """
    divisors = [
        ops.where(n <= limit, ops.ones_like(n), n / limit)  # Which is false of NaN.
        for n, limit in zip(step.norms(norm), limits, strict=True)
    ]
    step.divide(divisors)


def _at_least(floor, norm):
    """max(floor, norm), or 1 where that is 0."""
    # Comparisons, as they let NaN through: a NaN in a gradient must reach the user. A
    # norm of 0 is that of an all-zero gradient, which is to stay zero, not NaN.
    divisor = ops.where(norm < floor, like(norm, floor), norm)
    if floor >= _SMALLEST:  # Compilers take a smaller one for 0.
        return divisor
    return ops.where(divisor == 0, ops.ones_like(divisor), divisor)
