"""Norms and quotients that are right at any magnitude.

A definition such as √Σg² overflows or vanishes long before its exact result does
(float32: beyond 1e19 and below 1e-23). Homogeneity is the way out,
norm(g) = norm(c · g) / c, taken only where the plain result is out of its safe range.
"""

import functools
import inspect
import math

import keras
import numpy as np
from keras import ops

from keras_normopt._backend.devices import near
from keras_normopt._backend.tracing import choose, known
from keras_normopt.norms._reductions import cast, entries_of, like

_BACKEND = keras.backend.backend()


def built_in(*, squares=False, leaves_range=True):
    """Makes a public norm of a definition that only works at ordinary magnitudes.

    Args:
        squares: Whether the definition squares the entries, so that it vanishes before
            its exact result does, too. None may raise them to a higher power: one
            rescue would not span the range.
        leaves_range: Whether it overflows, or vanishes, before its exact result does.
    """

    def decorate(definition):
        @functools.wraps(definition)
        def norm(gradient):
            entries = entries_of([ops.convert_to_tensor(gradient)])
            return norms_of(norm, [entries])[0]

        # What users see takes a gradient; what is defined takes its `Entries`.
        norm.__signature__ = inspect.Signature(
            [inspect.Parameter("gradient", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        )
        norm.__module__ = "keras_normopt.norms"
        norm.definition = definition
        norm.squares, norm.leaves_range = squares, leaves_range
        norm.itself = norm
        return norm

    return decorate


def is_built_in(norm):
    """Whether a function is a built-in norm, and does not merely wrap one."""
    return getattr(norm, "itself", None) is norm


def norms_of(norm, blocks, arranged=list):
    """Computes a built-in norm of each block.

    Args:
        norm: The norm.
        blocks: Non-empty list of `Entries`.
        arranged: Callable that arranges the list of the norms as the caller wants
            them. It is called here since compilers are quick over what leaves a branch
            arranged, and slow over what is rearranged behind it.

    Returns:
        What `arranged` returned.
    """
    plain = [_plain(norm, entries) for entries in blocks]
    if not norm.leaves_range:
        return arranged(plain)
    # One floor for all is the highest: above it, every result is accurate.
    floor = max(_floor(norm, entries) for entries in blocks)
    safe = _is_safe(join(plain), floor)

    def rescued():
        # Each by itself, so that one gradient of zeros does not cost all others time.
        each = zip(blocks, plain, _flags(safe, plain), strict=True)
        return arranged([_rescued(norm, *those, floor) for those in each])

    return choose(ops.all(safe), lambda: arranged(plain), rescued)


def _flags(safe, plain):
    """For each block, which of its results are safe, as far as they have values."""
    flags = known(safe)
    if flags is None:
        return [None] * len(plain)
    # Known at once, where PyTorch would have to be asked for each.
    result, start = [None] * len(plain), 0
    for i in sorted(range(len(plain)), key=lambda i: bool(len(plain[i].shape))):
        end = start + math.prod(plain[i].shape)
        result[i], start = flags[start:end], end
    return result


def _plain(norm, entries):
    if not entries.size:
        return ops.zeros(entries.shape, dtype=entries.dtype)
    return norm.definition(entries)


def _floor(norm, entries):
    """The smallest plain result that is accurate to rounding.

    Each of N squares may have lost up to the smallest normal number to underflow,
    which must be nothing beside the square of the result.
    """
    if not norm.squares:
        return 0.0
    limits = np.finfo(entries.dtype)
    return float(np.sqrt(entries.size * limits.tiny / (8 * limits.eps)))


def _is_safe(values, floor):
    # Comparisons that are false of NaN, as an overflow may end in one.
    return (values >= floor) & (values <= _largest(values))


def _rescued(norm, entries, plain, flags, floor):
    """The norm of a block, computed at another scale if need be.

    The scale is one by which no safe result leaves its range either: a compiler may
    compute this for all blocks, and a derivative of what is not taken must be finite.
    """
    if not entries.size:
        return plain

    def rescaled():
        exponent = np.finfo(entries.dtype).maxexp
        up, down = 2.0 ** (exponent * 25 // 32), 2.0 ** -(exponent * 5 // 8)
        is_small = plain < floor
        is_large = ops.logical_not(plain <= _largest(plain))  # Or it is NaN.
        scale = ops.where(is_large, like(plain, down), ops.ones_like(plain))
        scale = ops.where(is_small, like(plain, up), scale)
        scaled = entries.scaled({up: is_small, down: is_large})
        return norm.definition(scaled) / scale

    if flags is None:
        return choose(ops.all(_is_safe(plain, floor)), lambda: plain, rescaled)
    if not flags.all():  # Of zeros the norm is 0, which is quicker found out.
        flags = flags | known(entries.largest() == 0).ravel()
    return plain if flags.all() else rescaled()


def _largest(tensor):
    return float(np.finfo(keras.backend.standardize_dtype(tensor.dtype)).max)


def quotient(values, divisor, moves=None):
    """Divides in the dtype of the divisor, and casts back.

    Args:
        values: Tensor.
        divisor: Tensor that broadcasts against it, not 0.
        moves: Scalar boolean tensor. The quotient is 0 if it is false. Not on PyTorch,
            which has `stopped`.
    """
    dtype = keras.backend.standardize_dtype(values.dtype)
    wide = cast(values, keras.backend.standardize_dtype(divisor.dtype))
    divisor = near(divisor, wide)
    if _BACKEND != "torch":
        # XLA multiplies by the reciprocal of a scalar instead, which for the largest
        # is too small to be a normal number, and flushed to 0.
        exponent = np.finfo(keras.backend.standardize_dtype(divisor.dtype)).maxexp
        scale = 2.0 ** (exponent // 2 - 1)
        factor = ops.where(divisor > scale, like(divisor, 1 / scale), like(divisor, 1))
        if _BACKEND == "jax":  # Which differentiates by way of the divisor's square.
            factor = ops.where(divisor < 1 / scale, like(divisor, scale), factor)
        divisor = divisor * factor
        if moves is not None:
            moves = near(moves, wide)
            factor = ops.where(moves, factor, ops.zeros_like(factor))
        wide = wide * factor
    return cast(wide / divisor, dtype)


def stopped(divisors, moves):
    """On PyTorch, makes divisors infinite unless a scalar boolean tensor is true.

    To multiply the quotients by 0 instead would take another pass over all gradients.
    """
    if _BACKEND != "torch" or moves is None:
        return divisors
    return [ops.where(moves, d, like(d, float("inf"))) for d in divisors]


def join(values):
    """Makes one vector of tensors: of the scalars first, and then of the others."""
    values = [near(value, values[0]) for value in values]
    scalars = [v for v in values if not len(v.shape)]  # A `TensorShape` is true.
    flat = [
        v if len(v.shape) == 1 else ops.reshape(v, (-1,))
        for v in values
        if len(v.shape)
    ]
    if scalars:
        flat.insert(0, ops.stack(Leaf(scalars)))
    return flat[0] if len(flat) == 1 else ops.concatenate(flat)


def apart(vector, shapes):
    """Takes what `join` made of tensors of some shapes apart again."""
    start = sum(not shape for shape in shapes)
    scalars = iter(ops.unstack(vector[:start], start) if start else [])
    result = []
    for shape in shapes:
        if not shape:
            result.append(next(scalars))
            continue
        part = vector[start : start + math.prod(shape)]
        start += math.prod(shape)
        result.append(ops.reshape(part, shape) if len(shape) > 1 else part)
    return result


class Leaf(list):
    """A list that Keras does not search for symbolic tensors, slowly on PyTorch."""
