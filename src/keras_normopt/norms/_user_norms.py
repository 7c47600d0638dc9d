"""Calls the functions that users wrote, and checks what they return."""

import functools
import math
import reprlib

import keras
import numpy as np
from keras import ops

from keras_normopt._backend.devices import near
from keras_normopt._backend.tracing import eagerly, known

# Larger gradients are not tried before the training: it would take memory and time.
_LARGEST = 2**16


class ReturnsGradient:
    """A registered function that returns the normalized gradient instead of a norm."""

    def __init__(self, function):
        self.function = function

    def __call__(self, gradient):
        result = ops.convert_to_tensor(_called(self.function, gradient))
        if tuple(result.shape) != tuple(gradient.shape):
            raise ValueError(
                f"{describe(self.function)} was registered as a function that "
                "returns the normalized gradient, so the shapes must match. It "
                f"returned shape {tuple(result.shape)} for a gradient of shape "
                f"{tuple(gradient.shape)}."
            )
        return result


def norm_of(function, entries):
    """Calls a norm on the entries of one block, as one tensor or unit by unit."""
    tensors = entries.tensors
    if len(tensors) > 1:
        flat = [near(ops.reshape(t, (-1,)), tensors[0]) for t in tensors]
        tensors = [ops.concatenate(flat)]
    (tensor,) = tensors
    if not entries.per_unit:
        return _scalar(function, tensor)
    units = ops.moveaxis(tensor, -1, 0)
    return ops.vectorized_map(functools.partial(_scalar, function), units)


def _scalar(norm, gradient):
    result = _called(norm, gradient)
    expected = "A norm must return one scalar tensor per gradient. "
    try:
        value = ops.convert_to_tensor(result)
        if "complex" in keras.backend.standardize_dtype(value.dtype):
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


def _called(function, gradient):
    try:
        return function(gradient)
    except Exception as error:
        if not _works_on_values(function, gradient):
            raise
        raise TypeError(
            f"norm={describe(function)} needs the values of a gradient, and works on a "
            "NumPy array. A gradient has no values yet while a step is compiled, and "
            f"is no NumPy array on an accelerator. Received: {type(gradient).__name__} "
            f"of shape {tuple(gradient.shape)}. Use the functions of `keras.ops` in "
            "place of NumPy's, and no `float()`, `.numpy()` or `if` on values."
        ) from error


def _works_on_values(function, gradient):
    """Whether a function that failed on a gradient succeeds on values in its place."""
    shape = [size or 1 for size in gradient.shape]  # Unknown sizes are `None`.
    array = np.ones(shape, keras.backend.standardize_dtype(gradient.dtype))
    with eagerly():
        for convert in (ops.convert_to_tensor, np.asarray):
            try:
                function(convert(array))
            except Exception:  # It has an error of its own, which the caller raises.
                continue
            return True
    return False


def check(function, blocks, variables):
    """Calls a user's function on made-up gradients, to see what it returns.

    A NaN or a negative norm would make weights NaN without an error. Of each rank the
    smallest gradient of the model is tried: what holds for its shape need not hold for
    others.

    Args:
        function: A norm or a `ReturnsGradient`.
        blocks: The `Blocks` of the variables.
        variables: List of the variables.

    Raises:
        ValueError: If what it returns is not finite, or is a negative norm.
    """
    smallest = {}
    arguments = _arguments(blocks, variables)
    for shape, dtype in sorted(arguments, key=lambda a: math.prod(a[0])):
        smallest.setdefault(len(shape), (shape, dtype))
    for shape, dtype in smallest.values():
        count = np.arange(math.prod(shape)).reshape(shape)
        # Of both signs with a negative sum, and without a positive entry.
        mixed = -(np.sin(1 + count) + 0.25)
        for gradient in (mixed, -np.abs(mixed)):
            with eagerly():
                _check_on(function, gradient.astype(dtype))


def _arguments(blocks, variables):
    """The shapes and dtypes that a function is called with, but for large ones."""
    members = {}
    for number, variable in zip(blocks.of, variables, strict=True):
        members.setdefault(number, []).append(variable)
    members.pop(None, None)
    for block in members.values():
        shapes = [tuple(v.shape) for v in block]
        dtypes = {keras.backend.standardize_dtype(v.dtype) for v in block}
        shape = shapes[0]
        if len(block) > 1:
            shape = (sum(map(math.prod, shapes)),)
        elif blocks.per_unit and len(shape) > 1:
            shape = shape[:-1]
        if 0 < math.prod(shape) <= _LARGEST:
            yield shape, "float64" if "float64" in dtypes else "float32"


def _check_on(function, gradient):
    tensor = ops.convert_to_tensor(gradient)
    if known(tensor) is None:  # A program is being traced.
        return
    if isinstance(function, ReturnsGradient):
        expected = "A normalized gradient must be finite"
        result, name = known(function(tensor)), describe(function.function)
        is_right = result is None or np.isfinite(result).all()
    else:
        expected = "A norm must be a finite number of at least 0"
        result, name = known(_scalar(function, tensor)), describe(function)
        is_right = result is None or 0 <= result < math.inf
    if not is_right:
        raise ValueError(
            f"{expected}, or weights become NaN. norm={name} returned "
            f"{reprlib.repr(result.tolist())} for a gradient of shape {gradient.shape} "
            f"with entries from {gradient.min():.2g} to {gradient.max():.2g}. Take "
            "magnitudes first, as `ops.abs(gradient)` or `ops.square(gradient)` do. "
            "`keras_normopt.testing.check_norm` looks for other faults."
        )


def describe(function):
    """What to call a function in a message."""
    return getattr(function, "__qualname__", None) or reprlib.repr(function)
