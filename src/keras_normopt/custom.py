"""Calls the functions that users wrote, and checks what they return."""

import functools
import reprlib

import keras
from keras import ops

from keras_normopt._devices import near


class ReturnsGradient:
    """A registered function that returns the normalized gradient instead of a norm."""

    def __init__(self, function):
        self.function = function

    def __call__(self, gradient):
        result = ops.convert_to_tensor(self.function(gradient))
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
    result = norm(gradient)
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


def describe(function):
    """What to call a function in a message."""
    return getattr(function, "__qualname__", None) or reprlib.repr(function)
