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
            ops.cast(norm(w), g.dtype) for g, w in zip(gradients, wide, strict=True)
        ]

    values, known_safe = norms.compute(norm, wide)
    if known_safe:
        divisors, factors = ops.unstack(_divisor(values, epsilon)), [None] * len(wide)
    else:
        divided = [
            _small_divisor(v, epsilon, norms.safe_ceiling(w))
            for v, w in zip(values, wide, strict=True)
        ]
        divisors, factors = zip(*divided, strict=True)
    return [
        sparse.map_values(lambda v, d=d, f=f: _quotient(v, d, f), g)
        for g, d, f in zip(gradients, divisors, factors, strict=True)
    ]


def _divisor(norm, epsilon):
    # Comparisons, as they let NaN through: a NaN in a gradient must reach the user. A
    # norm of 0 is that of an all-zero gradient, which is to stay zero, not NaN.
    floor = norms.like(norm, epsilon)
    divisor = ops.where(ops.less(norm, floor), floor, norm)
    return ops.where(ops.equal(divisor, 0), ops.ones_like(divisor), divisor)


def _small_divisor(norm, epsilon, ceiling):
    """A divisor that has a reciprocal, and the factor that makes up for it."""
    divisor = _divisor(norm, epsilon)
    is_large = ops.greater(divisor, norms.like(divisor, ceiling))
    factor = ops.where(is_large, norms.like(divisor, 2.0**-8), ops.ones_like(divisor))
    return ops.multiply(divisor, factor), factor


def _quotient(values, divisor, factor=None):
    wide = norms.widen(values)
    if factor is not None:
        wide = ops.multiply(wide, factor)
    return ops.cast(ops.divide(wide, divisor), values.dtype)
