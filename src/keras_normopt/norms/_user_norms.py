"""Calls users' functions, and checks their results."""

import math
import reprlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_normopt._backend.devices import to_device_of
from keras_normopt._backend.tensors import dtype_of, pack
from keras_normopt._backend.tracing import concrete_value, eagerly
from keras_normopt.norms._definitions import l2
from keras_normopt.norms._norm import Norm

# Checks before training skip larger gradients, to save memory and time.
_LARGEST = 2**16


class UserNorm(Norm):
    """A user's function from a gradient to its norm."""

    expected = "A norm must be a finite number of at least 0"

    def measure(self, blocks, divisor=None):
        # Divides the entries, because a user's function may not be homogeneous.
        if divisor is not None:
            blocks = [block.divided(divisor) for block in blocks]
        return pack(
            [self._measure_block(block) for block in blocks], [False] * len(blocks)
        )

    def _measure_block(self, block):
        tensors = block.tensors
        if len(tensors) > 1:
            flat = [to_device_of(ops.reshape(t, (-1,)), tensors[0]) for t in tensors]
            tensors = [ops.concatenate(flat)]
        (tensor,) = tensors
        if not block.per_unit:
            return self._call_for_scalar(tensor)
        return ops.vectorized_map(self._call_for_scalar, ops.moveaxis(tensor, -1, 0))

    def _call_for_scalar(self, gradient):
        result = _call(self.function, gradient)
        expected = "A norm must return one scalar tensor per gradient. "
        name = function_name(self.function)
        try:
            value = ops.convert_to_tensor(result)
            if "complex" in dtype_of(value):
                raise TypeError(
                    "A complex number cannot be compared with `norm_epsilon`."
                )
            value = ops.cast(value, gradient.dtype)
        except Exception as error:
            raise TypeError(
                f"{expected}norm={name} returned {reprlib.repr(result)}, which is not "
                "a real number."
            ) from error
        if len(value.shape):
            raise ValueError(
                f"{expected}norm={name} returned a tensor of shape "
                f"{tuple(value.shape)} for a gradient of shape "
                f"{tuple(gradient.shape)}. Reduce over all axes."
            )
        return value

    def stands_for(self, function):
        """Returns whether this norm's name may replace a function in saved files."""
        return self.function == function

    def check(self, blocks, variables):
        """Calls the function on made-up gradients, and checks the results.

        A NaN or a negative norm would make weights NaN without an error. Gradients have
        shapes of the model, because the function may fail on others. Only the smallest
        shape of each rank is tried.

        Args:
            blocks: The `Blocks` of the variables.
            variables: List of the variables.

        Raises:
            ValueError: If the result is not finite, or is a negative norm.
        """
        smallest: dict[int, Any] = {}
        arguments = _argument_shapes(blocks, variables)
        for shape, dtype in sorted(arguments, key=lambda a: math.prod(a[0])):
            smallest.setdefault(len(shape), (shape, dtype))
        for shape, dtype in smallest.values():
            count = np.arange(math.prod(shape)).reshape(shape)
            # The first gradient has both signs and a negative sum. The second has no
            # positive entry.
            mixed = -(np.sin(1 + count) + 0.25)
            for gradient in (mixed, -np.abs(mixed)):
                with eagerly():
                    self._check_result(gradient.astype(dtype))

    def _check_result(self, gradient):
        tensor = ops.convert_to_tensor(gradient)
        if concrete_value(tensor) is None:  # A program is being traced.
            return
        result = concrete_value(self._checked_result(tensor))
        if result is not None and not self._is_valid(result):
            raise ValueError(
                f"{self.expected}, or weights become NaN. norm="
                f"{function_name(self.function)} returned "
                f"{reprlib.repr(result.tolist())} for a gradient of shape "
                f"{gradient.shape} with entries from "
                f"{gradient.min():.2g} to {gradient.max():.2g}. Begin with "
                "`ops.abs(gradient)` or `ops.square(gradient)`. "
                "`keras_normopt.testing.check_norm` finds other errors."
            )

    def _checked_result(self, gradient):
        return self._call_for_scalar(gradient)

    def _is_valid(self, result):
        return 0 <= result < math.inf


class UserNormalizer(UserNorm):
    """A registered function that returns the normalized gradient."""

    expected = "A normalized gradient must be finite"
    tracked = l2.norm

    def normalize(self, gradients, divisors):
        for position in gradients.positions:
            gradients.replace(
                lambda stack: self._checked_result(stack[0])[None], [position]
            )

    def stands_for(self, function):
        return False

    def require_norm(self, norm, reason):
        raise ValueError(
            f"norm={norm!r} returns the normalized gradient and not its norm. "
            f"{reason}. Pass the name of a norm, or a function that returns one."
        )

    def _checked_result(self, gradient):
        result = ops.convert_to_tensor(_call(self.function, gradient))
        if tuple(result.shape) != tuple(gradient.shape):
            raise ValueError(
                f"{function_name(self.function)} was registered as a function that "
                "returns the normalized gradient, so the shapes must match. It "
                f"returned shape {tuple(result.shape)} for a gradient of shape "
                f"{tuple(gradient.shape)}."
            )
        return result

    def _is_valid(self, result):
        return np.isfinite(result).all()


def _call(function, gradient):
    try:
        return function(gradient)
    except Exception as error:
        if not _works_on_values(function, gradient):
            raise
        raise TypeError(
            f"norm={function_name(function)} needs the values of a gradient. While a "
            "step is compiled, a gradient has no values. On an accelerator, it is not "
            f"a NumPy array. Received: {type(gradient).__name__} of shape "
            f"{tuple(gradient.shape)}. Use the functions of `keras.ops` instead of "
            "NumPy's. Do not use `float()`, `.numpy()` or `if` on values."
        ) from error


def _works_on_values(function, gradient):
    """Returns whether a function that failed on a gradient works on values."""
    shape = [size or 1 for size in gradient.shape]  # Unknown sizes are `None`.
    array = np.ones(shape, dtype_of(gradient))
    with eagerly():
        for convert in (ops.convert_to_tensor, np.asarray):
            try:
                function(convert(array))
            except Exception:  # The caller raises the function's own error.
                continue
            return True
    return False


def _argument_shapes(blocks, variables):
    """Yields shape and dtype of each small argument of the function in a step."""
    members: dict[int | None, list[int]] = {}
    for i, number in enumerate(blocks.block_of):
        members.setdefault(number, []).append(i)
    members.pop(None, None)
    for block in members.values():
        dtypes = {keras.backend.standardize_dtype(variables[i].dtype) for i in block}
        shape = blocks.units_shape(block[0], variables[block[0]])
        if len(block) > 1:
            shape = (sum(math.prod(variables[i].shape) for i in block),)
        elif blocks.norm_shape(block[0], variables[block[0]]):
            shape = shape[:-1]
        if 0 < math.prod(shape) <= _LARGEST:
            yield shape, "float64" if "float64" in dtypes else "float32"


def function_name(function):
    """Returns the name of a function for messages."""
    return getattr(function, "__qualname__", None) or reprlib.repr(function)
