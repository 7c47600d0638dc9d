"""The norms that a gradient can be divided by, and the registry of their names.

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
    dtype = keras.backend.standardize_dtype(gradient.dtype)
    return ops.cast(gradient, "float64" if dtype == "float64" else "float32")


def compute(norm, gradients):
    """Stacks the norms of a non-empty list of widened tensors into one vector.

    A definition such as sqrt(sum(square(g))) overflows or vanishes long before its
    exact result does (float32: beyond 1e19 and below 1e-23). Homogeneity is the way
    out, norm(g) = m * norm(g / m) with m = max|g|, but two more passes over every
    gradient are taken only when a plain result is out of its safe range.
    """
    if norm not in _BUILT_IN.values():
        return ops.stack([_custom(norm, g) for g in gradients])

    plain = ops.stack([_of(norm.definition, g) for g in gradients])
    floors = [_safe_floor(norm, g) for g in gradients]
    safe = ops.logical_and(ops.greater_equal(plain, floors), ops.isfinite(plain))

    def rescaled():
        return ops.stack([_of(norm.definition, g, rescale=True) for g in gradients])

    try:
        all_safe = bool(ops.all(safe))
    except TypeError:  # Being traced: the values are not known yet.
        return ops.cond(ops.all(safe), lambda: plain, rescaled)
    return plain if all_safe else rescaled()


def _of(definition, gradient, rescale=False):
    if 0 in gradient.shape:
        return ops.zeros((), dtype=gradient.dtype)
    if not rescale:
        return definition(gradient)
    largest = ops.max(ops.abs(gradient))
    scale = ops.where(ops.equal(largest, 0), ops.ones_like(largest), largest)
    return ops.multiply(scale, definition(ops.divide(gradient, scale)))


def _safe_floor(norm, gradient):
    """The smallest plain result that is accurate to rounding.

    Each of the N squares may have lost up to the smallest normal number to underflow,
    which must be nothing beside the square of the result.
    """
    if not norm.squares:
        return 0.0
    dtype = np.finfo(keras.backend.standardize_dtype(gradient.dtype))
    return float(np.sqrt(math.prod(gradient.shape) * dtype.tiny / (8 * dtype.eps)))


def _custom(norm, gradient):
    value = ops.cast(ops.convert_to_tensor(norm(gradient)), gradient.dtype)
    if len(value.shape):
        raise ValueError(
            "A norm must return one scalar per gradient. "
            f"{_describe(norm)} returned a tensor of shape {tuple(value.shape)} for a "
            f"gradient of shape {tuple(gradient.shape)}. Reduce over all axes."
        )
    return value


def _describe(function):
    return getattr(function, "__qualname__", None) or reprlib.repr(function)


def _built_in(*, squares=False):
    """Makes a public norm of a definition that only works at ordinary magnitudes."""

    def decorate(definition):
        @functools.wraps(definition)
        def norm(gradient):
            return compute(norm, [widen(gradient)])[0]

        norm.definition = definition
        norm.squares = squares
        return norm

    return decorate


@_built_in()
def l1(gradient):
    """Sum of the absolute values, Σ|g|."""
    return ops.sum(ops.abs(gradient))


@_built_in(squares=True)
def l2(gradient):
    """Euclidean norm, √Σg²."""
    # One kernel instead of three on PyTorch, but TensorFlow's takes ranks 1 and 2 only.
    if len(gradient.shape) in (1, 2):
        return ops.norm(gradient)
    return ops.sqrt(ops.sum(ops.square(gradient)))


@_built_in(squares=True)
def l1_l2(gradient):
    """Mean of the l1 and the l2 norm, (l1 + l2) / 2."""
    return (l1.definition(gradient) + l2.definition(gradient)) / 2


@_built_in()
def avg_l1(gradient):
    """Mean absolute value, l1 / N for N entries."""
    return ops.mean(ops.abs(gradient))


@_built_in(squares=True)
def avg_l2(gradient):
    """Root mean square, √mean(g²), which is l2 / √N for N entries."""
    return l2.definition(gradient) / math.sqrt(math.prod(gradient.shape))


@_built_in(squares=True)
def avg_l1_l2(gradient):
    """Mean of the averaged norms, (avg_l1 + avg_l2) / 2."""
    return (avg_l1.definition(gradient) + avg_l2.definition(gradient)) / 2


@_built_in()
def max(gradient):
    """Largest absolute value, max|g|. `linf` is the same norm."""
    return ops.max(ops.abs(gradient))


linf = max


@_built_in()
def min_max(gradient):
    """Mean of the largest and the smallest absolute value, (max|g| + min|g|) / 2."""
    magnitudes = ops.abs(gradient)
    return (ops.max(magnitudes) + ops.min(magnitudes)) / 2


@_built_in(squares=True)
def std(gradient):
    """Population standard deviation of the entries, or their root mean square.

    The root mean square stands in where the gradient has one element or is constant up
    to rounding (std below √eps of the root mean square, eps of the dtype computed in).
    There the deviation is zero or rounding noise, and dividing by it would blow up the
    gradient of, say, the bias of ``Dense(1)`` a million times.
    """
    deviation = ops.std(gradient)
    root_mean_square = ops.sqrt(ops.square(deviation) + ops.square(ops.mean(gradient)))
    eps = np.finfo(keras.backend.standardize_dtype(gradient.dtype)).eps
    constant = ops.less(deviation, float(np.sqrt(eps)) * root_mean_square)
    return ops.where(constant, root_mean_square, deviation)


_BUILT_IN = {
    norm.__name__: norm
    for norm in (l1, l2, l1_l2, avg_l1, avg_l2, avg_l1_l2, max, min_max, std)
} | {"linf": linf}
_registered = {}


class ReturnsGradient:
    """A registered function that returns the normalized gradient instead of a norm."""

    def __init__(self, function):
        self.function = function

    def __call__(self, gradient):
        result = ops.convert_to_tensor(self.function(gradient))
        if tuple(result.shape) != tuple(gradient.shape):
            raise ValueError(
                f"{_describe(self.function)} was registered as a function that returns "
                "the normalized gradient, so the shapes must match. It returned shape "
                f"{tuple(result.shape)} for a gradient of shape "
                f"{tuple(gradient.shape)}."
            )
        return result


def names():
    """Lists every name that `norm=` takes, built-in and registered, sorted."""
    return sorted(_BUILT_IN | _registered)


def register_norm(name, function=None, *, overwrite=False):
    """Gives a norm of your own a name, for `norm=` and for saved files.

    A saved optimizer holds the name only, so register the norm again, under the same
    name, before you load the file.

    Args:
        name: String. Any name but those of the built-in norms.
        function: Callable from one gradient to its norm, a scalar tensor. It is called
            with a tensor of any shape in float32 (float64 for a float64 gradient) and
            should use `keras.ops` only, to work on every backend and when compiled.
            Left out, `register_norm` is a decorator.
        overwrite: Boolean, whether to replace another function that was registered
            under this name. Defaults to `False`. The same function defined again, as by
            a notebook cell that is run twice, needs no `overwrite`.

    Returns:
        The function, unchanged.

    Raises:
        TypeError: If the name is not a string or the function not callable.
        ValueError: If the name is empty, is a built-in one, or stands for another
            function and `overwrite` is not set.

    Example:
        >>> import keras_normopt
        >>> from keras import ops
        >>> @keras_normopt.register_norm("median")
        ... def median(gradient):
        ...     return ops.median(ops.abs(gradient))
        >>> optimizer = keras_normopt.NormalizedSGD(norm="median")
    """
    if function is None:
        return functools.partial(register_norm, name, overwrite=overwrite)
    if not callable(function):
        raise TypeError(
            "`function` must be a callable from a gradient to its norm. "
            f"Received: function={reprlib.repr(function)}"
        )
    _register(name, function, overwrite)
    return function


def register_normalizer(name, function):
    """Registers a function that returns the normalized gradient, the 2018 form."""
    _register(name, ReturnsGradient(function), overwrite=False)


def _register(name, entry, overwrite):
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a string. Received: name={reprlib.repr(name)}")
    if not name:
        raise ValueError("`name` must not be empty. Received: name=''")
    if name in _BUILT_IN:
        raise ValueError(
            f"`name` must not be that of a built-in norm. Received: name={name!r}. "
            f"Built in are {_listed(_BUILT_IN)}; choose another name."
        )
    if name in _registered and not overwrite:
        if not _same(_registered[name], entry):
            raise ValueError(
                f"Another function is registered under name={name!r} already. Pass "
                "`overwrite=True` to replace it, or choose another name."
            )
    _registered[name] = entry


def _same(one, other):
    """Whether two functions are one definition, run twice."""
    if isinstance(one, ReturnsGradient) and isinstance(other, ReturnsGradient):
        return _same(one.function, other.function)
    if one is other:
        return True
    try:
        return _definition_of(one) == _definition_of(other)
    except (AttributeError, ValueError):  # No plain function, or an empty closure cell.
        return False


def _definition_of(function):
    return (
        function.__module__,
        function.__qualname__,
        function.__code__,
        function.__defaults__,
        function.__kwdefaults__,
        # Captured values may be tensors, which do not compare to one truth value.
        [id(cell.cell_contents) for cell in function.__closure__ or ()],
    )


def get(identifier):
    """Finds what `norm=` stands for.

    Args:
        identifier: A registered name, a callable, or `None`.

    Returns:
        A callable, a `ReturnsGradient`, or `None`.

    Raises:
        ValueError: If it is none of these, or a name that is not registered.
    """
    if identifier is None or callable(identifier):
        return identifier
    if isinstance(identifier, str):
        if identifier in _BUILT_IN:
            return _BUILT_IN[identifier]
        if identifier in _registered:
            return _registered[identifier]
    raise ValueError(
        f"Unknown norm. Received: norm={reprlib.repr(identifier)}. Choose one of "
        f"{_listed(names())}, None for no normalization, or a function from a gradient "
        "to its scalar norm. `keras_normopt.register_norm` adds a name of your own, and "
        "must have run before a file that uses the name is loaded."
    )


def serialize(identifier):
    """Finds the name under which `norm=` can be saved.

    Raises:
        ValueError: If it is a function that is not registered.
    """
    if not callable(identifier):
        return identifier
    for name, function in (_BUILT_IN | _registered).items():
        if function is identifier:
            return name
    raise ValueError(
        f"Cannot save norm={_describe(identifier)}: only the name of a norm is saved, "
        "and this function has none. Register it with "
        "`keras_normopt.register_norm(name, function)`, here and before loading."
    )


def _listed(choices):
    return ", ".join(repr(name) for name in sorted(choices))
