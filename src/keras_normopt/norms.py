"""The norms that a gradient can be divided by.

Every norm maps one tensor of any shape to a scalar tensor. It is computed, and
returned, in float32 (float64 for a float64 tensor), whatever the dtype of the
tensor: half precision overflows at 1000 entries of 300. All of them are absolutely
homogeneous, ``norm(c * g) == abs(c) * norm(g)``, so ``g / norm(g)`` does not depend on
the gradient's magnitude.

Example:
    >>> from keras_normopt import norms
    >>> float(norms.l2([3.0, -4.0]))
    5.0
    >>> float(norms.avg_l1([[1.0, -2.0], [3.0, -4.0]]))
    2.5
"""

import functools
import inspect
import itertools
import math
import reprlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_normopt import blocks

__all__ = [
    "avg_l1",
    "avg_l1_l2",
    "avg_l2",
    "l1",
    "l1_l2",
    "l2",
    "linf",
    "max",
    "min_max",
    "std",
]


def widen(gradient):
    """Casts a tensor to the dtype that norms are computed in."""
    gradient = ops.convert_to_tensor(gradient)
    is_double = dtype_of(gradient) == "float64"
    return ops.cast(gradient, "float64" if is_double else "float32")


def compute(norm, stacks):
    """Computes the norms of the blocks in a non-empty list of `Stack`.

    A definition such as sqrt(sum(square(g))) overflows or vanishes long before its
    exact result does (float32: beyond 1e19 and below 1e-23). Homogeneity is the way
    out, norm(g) = m * norm(g / m) with m = max|g|, but two more passes over a
    gradient are taken only when a plain result is out of its safe range.

    Returns:
        The norms, and whether none is known to be beyond `safe_ceiling`. Eagerly the
        norms are one vector, on which a few calls do what would take many: `split`
        takes it apart. While a graph is traced nothing is known, and the norms are a
        list, one item per stack: compilers take long over what is joined and taken
        apart again.
    """
    is_built_in = norm in BUILT_IN.values()
    plain = [
        _of(norm.definition, stack) if is_built_in else _custom(norm, stack)
        for stack in stacks
    ]

    def rescaled(stack):
        return _of(norm.definition, stack, rescale=True)

    vector = join(plain)
    has_floor = is_built_in and norm.squares
    floors, ceilings = [], []  # Lists: what NumPy does here PyTorch would compile.
    for stack in stacks:
        count = math.prod(stack.shape)
        floors += [_safe_floor(stack) if has_floor else 0.0] * count
        ceilings += [safe_ceiling(stack.dtype)] * count
    ceilings = like(vector, blocks.Opaque(ceilings))
    safe = ops.less_equal(vector, ceilings)
    if has_floor:
        safe = ops.logical_and(
            safe, ops.greater_equal(vector, like(vector, blocks.Opaque(floors)))
        )
    all_safe = ops.all(safe)
    needs_rescue = is_built_in and norm.leaves_range
    try:
        none_huge = bool(all_safe)
    except (TypeError, RuntimeError):  # Being traced: there are no values yet.
        if needs_rescue:
            plain = _choose(
                all_safe,
                lambda: tuple(plain),
                lambda: tuple(rescaled(s) for s in stacks),
            )
        return list(plain), False
    if needs_rescue and not none_huge:
        parts = [ops.convert_to_numpy(part) for part in split(safe, stacks)]
        vector = join(
            [
                p if ok.all() else rescaled(s)
                for p, ok, s in zip(plain, parts, stacks, strict=True)
            ]
        )
        none_huge = bool(ops.all(ops.less_equal(vector, ceilings)))
    return vector, none_huge


def join(values):
    """Joins the values for the norms of each stack to a vector."""
    flat = [v if len(v.shape) == 1 else ops.reshape(v, (-1,)) for v in values]
    return flat[0] if len(flat) == 1 else ops.concatenate(flat)


def split(vector, stacks):
    """Takes apart what `join` joined."""
    ends = list(itertools.accumulate(math.prod(stack.shape) for stack in stacks))
    # On PyTorch there must be some place to split at.
    parts = ops.split(vector, ends[:-1]) if len(stacks) > 1 else [vector]
    return [
        p if len(s.shape) == 1 else ops.reshape(p, s.shape)
        for p, s in zip(parts, stacks, strict=True)
    ]


def _choose(condition, if_true, if_false):
    # What PyTorch traces (its vmap) cannot branch.
    if keras.backend.backend() != "torch":
        return ops.cond(condition, if_true, if_false)
    return [
        ops.where(condition, a, b) for a, b in zip(if_true(), if_false(), strict=True)
    ]


def _of(definition, stack, rescale=False):
    if not stack.size:
        return ops.zeros(stack.shape, dtype=stack.dtype)
    if not rescale:
        return definition(stack)
    scale = stack.largest()
    # Not `ops.minimum`, which on PyTorch returns float32 for float64.
    ceiling = like(scale, safe_ceiling(stack.dtype))
    scale = ops.where(ops.greater(scale, ceiling), ceiling, scale)
    scale = ops.where(ops.equal(scale, 0), ops.ones_like(scale), scale)
    return ops.multiply(scale, definition(stack.divided_by(scale)))


def _safe_floor(stack):
    """The smallest plain result, of a norm that squares, that is accurate to rounding.

    Each of the N squares may have lost up to the smallest normal number to underflow,
    which must be nothing beside the square of the result.
    """
    limits = np.finfo(stack.dtype)
    return float(np.sqrt(stack.size * limits.tiny / (8 * limits.eps)))


def safe_ceiling(dtype):
    """The largest divisor that can safely divide a tensor of a dtype.

    XLA divides a tensor by a scalar as it multiplies it by the scalar's reciprocal,
    which for the largest numbers is too small to be a normal number, and flushed to 0.
    """
    return float(np.finfo(dtype).max / 8)


def like(tensor, values):
    """Converts numbers to the dtype of a tensor, where Keras would take float32."""
    return ops.convert_to_tensor(values, dtype=dtype_of(tensor))


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def _custom(norm, stack):
    values = [_custom_of_one(norm, t, stack) for t in stack.each_as_one_tensor()]
    return values[0] if stack.is_single else ops.stack(values)


def _custom_of_one(norm, tensor, stack):
    if not stack.is_per_unit:
        return _scalar(norm, tensor)
    units = ops.moveaxis(tensor, -1, 0)
    return ops.vectorized_map(functools.partial(_scalar, norm), units)


def _scalar(norm, gradient):
    result = norm(gradient)
    expected = "A norm must return one scalar tensor per gradient. "
    try:
        value = ops.convert_to_tensor(result)
        if "complex" in dtype_of(value):
            raise TypeError("A complex number cannot be compared with `norm_epsilon`.")
        value = ops.cast(value, gradient.dtype)
    except Exception as error:
        raise TypeError(
            f"{expected}norm={describe(norm)} returned {reprlib.repr(result)}, which "
            "is no real number."
        ) from error
    if len(value.shape):
        raise ValueError(
            f"{expected}norm={describe(norm)} returned a tensor of shape "
            f"{tuple(value.shape)} for a gradient of shape {tuple(gradient.shape)}. "
            "Reduce over all axes."
        )
    return value


def describe(function):
    """What to call a function in a message."""
    return getattr(function, "__qualname__", None) or reprlib.repr(function)


def _built_in(
    *, squares: bool = False, leaves_range: bool = True
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Makes a public norm of a definition that only works at ordinary magnitudes.

    Args:
        squares: Whether it vanishes before its exact result does, too.
        leaves_range: Whether it overflows, or vanishes, before its exact result does.
    """

    def decorate(definition):
        @functools.wraps(definition)
        def norm(gradient):
            values, _ = compute(norm, blocks.stack([widen(gradient)], [[0]]))
            return values[0]

        # What users see takes a gradient; what is defined below takes a `Stack`.
        norm.__signature__ = inspect.Signature(
            [inspect.Parameter("gradient", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        )
        norm.definition = definition
        norm.squares, norm.leaves_range = squares, leaves_range
        return norm

    return decorate


@_built_in(leaves_range=False)
def l1(stack):
    """Sum of the absolute values, Σ|g|."""
    return stack.total(ops.abs)


@_built_in(squares=True)
def l2(stack):
    """Euclidean norm, √Σg²."""
    return stack.length()


@_built_in(squares=True)
def l1_l2(stack):
    """Mean of the l1 and the l2 norm, (l1 + l2) / 2."""
    return (l1.definition(stack) + l2.definition(stack)) / 2


@_built_in()
def avg_l1(stack):
    """Mean absolute value, l1 / N for N entries."""
    return l1.definition(stack) / stack.size


@_built_in(squares=True)
def avg_l2(stack):
    """Root mean square, √mean(g²), which is l2 / √N for N entries."""
    return l2.definition(stack) / math.sqrt(stack.size)


@_built_in(squares=True)
def avg_l1_l2(stack):
    """Mean of the averaged norms, (avg_l1 + avg_l2) / 2."""
    return (avg_l1.definition(stack) + avg_l2.definition(stack)) / 2


@_built_in(leaves_range=False)
def max(stack):
    """Largest absolute value, max|g|. `linf` is the same norm."""
    return stack.largest()


linf = max


@_built_in()
def min_max(stack):
    """Mean of the largest and the smallest absolute value, (max|g| + min|g|) / 2."""
    return (stack.largest() + stack.smallest()) / 2


@_built_in(squares=True)
def std(stack):
    """Population standard deviation of the entries, or their root mean square.

    The root mean square stands in where the gradient has one element or is constant up
    to rounding (std below √eps of the root mean square, eps of the dtype computed in).
    There the deviation is zero or rounding noise, and dividing by it would blow up the
    gradient of, say, the bias of ``Dense(1)`` a million times.
    """
    # Not `ops.mean`, which on JAX computes in float32 for float64 as well.
    mean = stack.total() / stack.size
    deviation = stack.deviation(mean)
    root_mean_square = ops.sqrt(ops.square(deviation) + ops.square(mean))
    root_eps = float(np.sqrt(np.finfo(stack.dtype).eps))
    constant = ops.less(deviation, root_eps * root_mean_square)
    return ops.where(constant, root_mean_square, deviation)


BUILT_IN = {
    norm.__name__: norm
    for norm in (l1, l2, l1_l2, avg_l1, avg_l2, avg_l1_l2, max, min_max, std)
} | {"linf": linf}
