"""The one place where a list of gradients becomes a list of rescaled gradients."""

import functools

from keras import ops

from keras_normopt import norms, sparse
from keras_normopt.blocks import Opaque, stack
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

    stacks = stack(gradients, blocks, per_unit)
    values, none_huge = norms.compute(norm, stacks)
    if none_huge:
        divisors = norms.split(divisor(values), stacks)
        factors = [None] * len(stacks)
    else:
        divided = [_small_divisor(divisor(v)) for v in _as_list(values, stacks)]
        divisors, factors = zip(*divided, strict=True)
    divide = _divide_each if isinstance(values, list) else _divide_stacked
    for some, d, f in zip(stacks, divisors, factors, strict=True):
        divide(some, result, d, f)
    return result, lambda: _by_block(values, stacks)


def measure(gradients, blocks, norm, per_unit=False):
    """Computes the list of the blocks' norms; the arguments are those of `rescale`."""
    stacks = stack(gradients, blocks, per_unit)
    values, _ = norms.compute(norm, stacks)
    return _by_block(values, stacks)


def _as_list(values, stacks):
    return values if isinstance(values, list) else norms.split(values, stacks)


def _by_block(values, stacks):
    result = {}
    for some, value in zip(stacks, _as_list(values, stacks), strict=True):
        result |= zip(some.numbers, _unstacked(value, some), strict=True)
    return [result[number] for number in range(len(result))]


def _unstacked(value, stack):
    if stack.is_single:
        return [value]
    return ops.unstack(value, len(stack.blocks))


def _divide_stacked(stack, gradients, divisor, factor):
    d, f = stack.spread(divisor), stack.spread(factor)
    divide = functools.partial(_quotient, divisor=d, factor=f)
    while stack.tensors:  # Each copy is let go before the next is divided.
        positions, tensor = stack.positions.pop(), stack.tensors.pop()
        first = gradients[positions[0]]
        if len(positions) == 1:
            gradients[positions[0]] = sparse.map_values(divide, first)
            continue
        quotient = ops.cast(divide(tensor), first.dtype)
        shape = Opaque([len(positions), *first.shape])
        parts = ops.unstack(ops.reshape(quotient, shape), len(positions))
        for position, part in zip(positions, parts, strict=True):
            gradients[position] = part


def _divide_each(stack, gradients, divisor, factor):
    # What compilers fuse with the update by itself, but slowly if it comes in a stack.
    divided = zip(
        stack.blocks,
        _unstacked(divisor, stack),
        _unstacked(factor, stack),
        strict=True,
    )
    for block, d, f in divided:
        for i in block:
            divide = functools.partial(_quotient, divisor=d, factor=f)
            gradients[i] = sparse.map_values(divide, gradients[i])


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
