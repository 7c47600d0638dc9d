"""The one place where a list of gradients becomes a list of normalized gradients."""

from keras import ops

from keras_normopt import norms, sparse
from keras_normopt.registry import ReturnsGradient


def normalize(gradients, norm, epsilon):
    """Divides each gradient by its norm, g / max(norm(g), epsilon).

    Args:
        gradients: List of tensors, or on TensorFlow of `tf.IndexedSlices` in which no
            index repeats.
        norm: Callable from a gradient to a scalar norm, or a `ReturnsGradient`.
        epsilon: Float, the floor of the norm. Has no part in a `ReturnsGradient`.

    Returns:
        List of gradients of the same shapes and dtypes.
    """
    wide = [norms.widen(sparse.densify(g)) for g in gradients]
    if isinstance(norm, ReturnsGradient):
        return [
            ops.cast(norm(w), ops.convert_to_tensor(g).dtype)
            for g, w in zip(gradients, wide, strict=True)
        ]

    divisors, known_safe = norms.compute(norm, wide)
    # Comparisons, as they let NaN through: a NaN in a gradient must reach the user. A
    # norm of 0 is that of an all-zero gradient, which is to stay zero, not NaN.
    floor = norms.like(divisors, epsilon)
    divisors = ops.where(ops.less(divisors, floor), floor, divisors)
    divisors = ops.where(ops.equal(divisors, 0), ops.ones_like(divisors), divisors)
    if known_safe:
        return [
            sparse.map_values(lambda v, d=d: _quotient(v, d), g)
            for g, d in zip(gradients, ops.unstack(divisors), strict=True)
        ]
    # Dividend and divisor are made smaller together where the divisor is too large to
    # have a reciprocal. This costs nothing when compiled into the division.
    ceilings = norms.like(divisors, [norms.safe_ceiling(w) for w in wide])
    factors = ops.where(ops.greater(divisors, ceilings), 2.0**-8, 1.0)
    divisors = ops.unstack(ops.multiply(divisors, factors))
    return [
        sparse.map_values(lambda v, d=d, f=f: _quotient(v, d, f), g)
        for g, d, f in zip(gradients, divisors, ops.unstack(factors), strict=True)
    ]


def _quotient(values, divisor, factor=None):
    values = ops.convert_to_tensor(values)
    wide = norms.widen(values)
    if factor is not None:
        wide = ops.multiply(wide, factor)
    return ops.cast(ops.divide(wide, divisor), values.dtype)
