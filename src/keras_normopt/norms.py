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
import math
import reprlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

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
    return ops.cast(gradient, "float64" if _dtype(gradient) == "float64" else "float32")


def compute(norm, gradients):
    """Computes the norms of a non-empty list of widened tensors.

    A definition such as sqrt(sum(square(g))) overflows or vanishes long before its
    exact result does (float32: beyond 1e19 and below 1e-23). Homogeneity is the way
    out, norm(g) = m * norm(g / m) with m = max|g|, but two more passes over a
    gradient are taken only when a plain result is out of its safe range.

    Returns:
        The norms, and whether they are known to be in the safe range. Eagerly the norms
        are one vector, on which a few calls do what would take many. While a graph is
        traced nothing is known, and the norms are a list of scalars: compilers take
        long over what is stacked and taken apart again.
    """
    is_built_in = norm in BUILT_IN.values()
    if is_built_in:
        plain = [_of(norm.definition, g) for g in gradients]
    else:
        plain = [_custom(norm, g) for g in gradients]

    def rescaled(gradient):
        return _of(norm.definition, gradient, rescale=True)

    vector = ops.stack(plain)
    has_floor = is_built_in and norm.squares
    floors = [_safe_floor(g) if has_floor else 0.0 for g in gradients]
    ceilings = [safe_ceiling(g) for g in gradients]
    safe = ops.logical_and(
        ops.greater_equal(vector, like(vector, floors)),
        ops.less_equal(vector, like(vector, ceilings)),
    )
    all_safe = ops.all(safe)
    try:
        known_safe = bool(all_safe)
    except TypeError:  # Being traced: there are no values yet.
        if is_built_in:
            plain = ops.cond(
                all_safe,
                lambda: tuple(plain),
                lambda: tuple(rescaled(g) for g in gradients),
            )
        return list(plain), False
    if is_built_in and not known_safe:
        vector = ops.stack(
            [
                p if s else rescaled(g)
                for p, s, g in zip(
                    plain, ops.convert_to_numpy(safe), gradients, strict=True
                )
            ]
        )
    return vector, known_safe


def _of(definition, gradient, rescale=False):
    if 0 in gradient.shape:
        return ops.zeros((), dtype=gradient.dtype)
    if not rescale:
        return definition(gradient)
    # Not `ops.minimum`, which on PyTorch returns float32 for float64.
    scale, ceiling = ops.max(ops.abs(gradient)), like(gradient, safe_ceiling(gradient))
    scale = ops.where(ops.greater(scale, ceiling), ceiling, scale)
    scale = ops.where(ops.equal(scale, 0), ops.ones_like(scale), scale)
    return ops.multiply(scale, definition(ops.divide(gradient, scale)))


def _safe_floor(gradient):
    """The smallest plain result, of a norm that squares, that is accurate to rounding.

    Each of the N squares may have lost up to the smallest normal number to underflow,
    which must be nothing beside the square of the result.
    """
    limits = np.finfo(_dtype(gradient))
    return float(np.sqrt(math.prod(gradient.shape) * limits.tiny / (8 * limits.eps)))


def safe_ceiling(gradient):
    """The largest divisor that can safely divide a tensor of the gradient's dtype.

    XLA divides a tensor by a scalar as it multiplies it by the scalar's reciprocal,
    which for the largest numbers is too small to be a normal number, and flushed to 0.
    """
    return float(np.finfo(_dtype(gradient)).max / 8)


def like(tensor, values):
    """Converts numbers to the dtype of a tensor, where Keras would take float32."""
    return ops.convert_to_tensor(values, dtype=_dtype(tensor))


def _dtype(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def _custom(norm, gradient):
    result = norm(gradient)
    expected = "A norm must return one scalar tensor per gradient. "
    try:
        value = ops.convert_to_tensor(result)
        if "complex" in _dtype(value):
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
    *, squares: bool = False
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Makes a public norm of a definition that only works at ordinary magnitudes."""

    def decorate(definition):
        @functools.wraps(definition)
        def norm(gradient):
            norms, _ = compute(norm, [widen(gradient)])
            return norms[0]

        norm.definition = definition
        norm.squares = squares
        return norm

    return decorate


@_built_in()
def l1(gradient: Any) -> Any:
    """Sum of the absolute values, Σ|g|."""
    return ops.sum(ops.abs(gradient))


@_built_in(squares=True)
def l2(gradient: Any) -> Any:
    """Euclidean norm, √Σg²."""
    # One kernel instead of three on PyTorch, but TensorFlow's takes ranks 1 and 2 only,
    # and JAX's returns float32 for float64.
    if len(gradient.shape) in (1, 2) and _dtype(gradient) == "float32":
        return ops.norm(gradient)
    return ops.sqrt(ops.sum(ops.square(gradient)))


@_built_in(squares=True)
def l1_l2(gradient: Any) -> Any:
    """Mean of the l1 and the l2 norm, (l1 + l2) / 2."""
    return (l1.definition(gradient) + l2.definition(gradient)) / 2


@_built_in()
def avg_l1(gradient: Any) -> Any:
    """Mean absolute value, l1 / N for N entries."""
    return l1.definition(gradient) / math.prod(gradient.shape)


@_built_in(squares=True)
def avg_l2(gradient: Any) -> Any:
    """Root mean square, √mean(g²), which is l2 / √N for N entries."""
    return l2.definition(gradient) / math.sqrt(math.prod(gradient.shape))


@_built_in(squares=True)
def avg_l1_l2(gradient: Any) -> Any:
    """Mean of the averaged norms, (avg_l1 + avg_l2) / 2."""
    return (avg_l1.definition(gradient) + avg_l2.definition(gradient)) / 2


@_built_in()
def max(gradient: Any) -> Any:
    """Largest absolute value, max|g|. `linf` is the same norm."""
    return ops.max(ops.abs(gradient))


linf = max


@_built_in()
def min_max(gradient: Any) -> Any:
    """Mean of the largest and the smallest absolute value, (max|g| + min|g|) / 2."""
    magnitudes = ops.abs(gradient)
    return (ops.max(magnitudes) + ops.min(magnitudes)) / 2


@_built_in(squares=True)
def std(gradient: Any) -> Any:
    """Population standard deviation of the entries, or their root mean square.

    The root mean square stands in where the gradient has one element or is constant up
    to rounding (std below √eps of the root mean square, eps of the dtype computed in).
    There the deviation is zero or rounding noise, and dividing by it would blow up the
    gradient of, say, the bias of ``Dense(1)`` a million times.
    """
    # Not `ops.mean`, which on JAX computes in float32 for float64 as well.
    mean = ops.sum(gradient) / math.prod(gradient.shape)
    deviation = ops.std(gradient)
    root_mean_square = ops.sqrt(ops.square(deviation) + ops.square(mean))
    root_eps = float(np.sqrt(np.finfo(_dtype(gradient)).eps))
    constant = ops.less(deviation, root_eps * root_mean_square)
    return ops.where(constant, root_mean_square, deviation)


BUILT_IN = {
    norm.__name__: norm
    for norm in (l1, l2, l1_l2, avg_l1, avg_l2, avg_l1_l2, max, min_max, std)
} | {"linf": linf}
