"""The one place where a list of gradients becomes a list of normalized gradients."""

from keras import ops

from keras_normopt import norms, sparse


def normalize(gradients, norm, epsilon):
    """Divides each gradient by its norm, g / max(norm(g), epsilon).

    Args:
        gradients: List of tensors, or on TensorFlow of `tf.IndexedSlices`.
        norm: Callable from a gradient to a scalar norm, a `norms.ReturnsGradient`, or
            `None`, which leaves the gradients as they are.
        epsilon: Float, the floor of the norm. Has no part in a `ReturnsGradient`.

    Returns:
        List of gradients of the same shapes and dtypes.
    """
    if norm is None or not gradients:
        return gradients
    gradients = [sparse.sum_repeated_rows(g) for g in gradients]
    wide = [norms.widen(sparse.densify(g)) for g in gradients]
    if isinstance(norm, norms.ReturnsGradient):
        return [
            ops.cast(norm(w), ops.convert_to_tensor(g).dtype)
            for g, w in zip(gradients, wide, strict=True)
        ]

    divisors = ops.maximum(norms.compute(norm, wide), epsilon)
    # A norm of 0 is that of an all-zero gradient, which is to stay zero, not NaN. The
    # comparison lets NaN through: a NaN in a gradient must reach the user.
    divisors = ops.where(ops.equal(divisors, 0), ops.ones_like(divisors), divisors)
    return [
        sparse.map_values(lambda v, d=d: _quotient(v, d), g)
        for g, d in zip(gradients, ops.unstack(divisors), strict=True)
    ]


def _quotient(values, divisor):
    values = ops.convert_to_tensor(values)
    return ops.cast(ops.divide(norms.widen(values), divisor), values.dtype)
