"""The one place where a list of gradients becomes a list of rescaled gradients."""

from keras import ops

from keras_normopt import norms, sparse
from keras_normopt.blocks import Block
from keras_normopt.registry import ReturnsGradient


def rescale(gradients, blocks, norm, divisor, per_unit=False):
    """Divides the gradients of each block by a function of the block's norm.

    Args:
        gradients: List of tensors, or on TensorFlow of `tf.IndexedSlices` in which no
            index repeats.
        blocks: Non-empty list of blocks, each a list of positions in `gradients`. A
            gradient in none of them stays as it is.
        norm: Callable from a gradient to a scalar norm, or a `ReturnsGradient`.
        divisor: Callable from a tensor of norms to a tensor of divisors. Has no part in
            a `ReturnsGradient`.
        per_unit: Whether there is one norm for each unit, the last axis, of a gradient.

    Returns:
        List of gradients of the same shapes and dtypes, and a function without
        arguments that returns the list of the blocks' norms.
    """
    result = list(gradients)
    if isinstance(norm, ReturnsGradient):
        for i in (i for block in blocks for i in block):
            gradient = norms.widen(sparse.densify(gradients[i]))
            result[i] = ops.cast(norm(gradient), gradients[i].dtype)
        return result, lambda: measure(gradients, blocks, norms.l2)

    positions = blocks
    blocks = _blocks(gradients, positions, per_unit)
    values, known_safe = norms.compute(norm, blocks)
    if known_safe:
        divisors = norms.split(divisor(values), blocks)
        factors = [None] * len(blocks)
    else:
        divided = [_small_divisor(divisor(v)) for v in _as_list(values, blocks)]
        divisors, factors = zip(*divided, strict=True)
    for block, d, f in zip(positions, divisors, factors, strict=True):
        for i in block:
            result[i] = sparse.map_values(
                lambda values, d=d, f=f: _quotient(values, d, f), gradients[i]
            )
    return result, lambda: _as_list(values, blocks)


def measure(gradients, blocks, norm, per_unit=False):
    """Computes the list of the blocks' norms; the arguments are those of `rescale`."""
    blocks = _blocks(gradients, blocks, per_unit)
    values, _ = norms.compute(norm, blocks)
    return _as_list(values, blocks)


def _blocks(gradients, positions, per_unit):
    return [
        Block([norms.widen(sparse.densify(gradients[i])) for i in block], per_unit)
        for block in positions
    ]


def _as_list(values, blocks):
    return values if isinstance(values, list) else norms.split(values, blocks)


def floored(norm, floor):
    """max(norm, floor), or 1 where that is 0."""
    # Comparisons, as they let NaN through: a NaN in a gradient must reach the user. A
    # norm of 0 is that of an all-zero gradient, which is to stay zero, not NaN.
    floor = norms.like(norm, floor)
    divisor = ops.where(ops.less(norm, floor), floor, norm)
    return ops.where(ops.equal(divisor, 0), ops.ones_like(divisor), divisor)


def _small_divisor(divisor):
    """A divisor that has a reciprocal, and the factor that makes up for it."""
    ceiling = norms.safe_ceiling(norms.dtype_of(divisor))
    is_large = ops.greater(divisor, norms.like(divisor, ceiling))
    factor = ops.where(is_large, norms.like(divisor, 2.0**-8), ops.ones_like(divisor))
    return ops.multiply(divisor, factor), factor


def _quotient(values, divisor, factor=None):
    wide = ops.cast(values, divisor.dtype)
    if factor is not None:
        wide = ops.multiply(wide, factor)
    return ops.cast(ops.divide(wide, divisor), values.dtype)
