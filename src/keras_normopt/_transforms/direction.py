"""Replaces a gradient by a direction: the best-aligned step of a set length.

A direction is the step that maximizes <gradient, step>, among all steps of norm 1 in
one norm. This step is the negated linear minimization oracle of the norm (arXiv
2502.07529). It is then multiplied by the set length.
"""

import math
import reprlib
from typing import Any, ClassVar

import numpy as np
from keras import ops

from keras_normopt._backend import sparse
from keras_normopt._backend.devices import device_of, to_device_of
from keras_normopt._backend.tensors import constant_like, dtype_of
from keras_normopt._transforms.config import Configured, find_object

#: The largest number of entries in one stack. A stack is a copy, and stacking large
#: matrices does not speed up their products.
_STACK_ENTRIES = 2**18

#: The root mean square of the entries of a step with `scale="match_rms_adamw"`.
RMS = 0.2


class Direction(Configured):
    """The base class of directions. Subclasses have a `name`."""

    #: The classes, by name.
    classes: ClassVar[dict[str, type["Direction"]]] = {}
    name: str
    #: The word for what `length` measures, such as "rows".
    unit: str

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):  # A user's subclass inherits a name.
            Direction.classes[cls.name] = cls

    def of_role(self, role):
        """Returns the direction for a role of `Axes`, or `None` for raw gradients."""
        return self

    @property
    def uses_axes(self):
        """Whether the direction depends on which axes are inputs and outputs."""
        return True

    def is_by_row(self, axes):
        """Returns whether each row of a gradient has its own direction."""
        return False

    def point(self, stack, axes, floor, factor):
        """Returns the directions of gradients of one shape.

        Args:
            stack: Tensor of n gradients, of shape `(n, *shape)`, in float32 or float64.
            axes: The `Axes` that all n variables have.
            floor: Scalar tensor above 0. If the magnitudes of a gradient are below the
                floor, its step is shorter.
            factor: Float or scalar tensor that multiplies the steps.
        """
        raise NotImplementedError

    def length(self, axes, shape):
        """Returns the length of a step as a float. `unit` says what it measures."""
        raise NotImplementedError


def checked_scale(scale, choices):
    """Returns the argument `scale`. Raises a `ValueError` if it is no choice."""
    if scale is not None and not (isinstance(scale, str) and scale in choices):
        raise ValueError(
            f"`scale` must be None or one of {', '.join(map(repr, choices))}. "
            f"Received: scale={reprlib.repr(scale)}"
        )
    return scale


def unit_vectors(tensor, axes, floor):
    """Divides a tensor by its Euclidean norm over some axes, at any magnitude.

    Args:
        tensor: Tensor.
        axes: Tuple of the axes that one vector spans.
        floor: Scalar tensor above 0.

    Returns:
        A pair of tensors. The first has the quotients, or 0 if the norm is 0. The
        second has min(1, largest magnitude / floor) for each vector.
    """
    # Operators, because on PyTorch the checks of `keras.ops` are slower than the math.
    largest = ops.amax(abs(tensor), axis=axes, keepdims=True)
    limits = np.finfo(dtype_of(tensor))
    # Compilers flush numbers below the smallest normal number to 0.
    one_if_zero = ops.cast(largest < limits.tiny, tensor.dtype)
    # XLA multiplies by reciprocals. It would flush the reciprocals of the largest
    # numbers to 0.
    maximum = constant_like(largest, 2.0 ** (limits.maxexp - 2))
    divisor = ops.where(largest > maximum, maximum, largest + one_if_zero)
    # The quotients do not depend on this scale, so its derivative is left out.
    tensor = tensor / ops.stop_gradient(divisor)
    squares = ops.sum(tensor * tensor, axis=axes, keepdims=True)
    unit = tensor / ops.sqrt(squares + one_if_zero)
    return unit, ops.where(largest < floor, largest, floor) / floor


def point(gradients, directions, axes, epsilon):
    """Replaces each gradient by its direction.

    Args:
        gradients: The `Gradients`.
        directions: List with the direction of each variable of the optimizer. It is
            `None` for variables that keep their raw gradients.
        axes: List of the `Axes` of all variables of the optimizer.
        epsilon: Scalar tensor, variable or float, the argument `norm_epsilon`. If the
            magnitudes of a gradient are below it, its step is shorter.
    """
    equal: dict[Any, list[int]] = {}
    for position in gradients.positions:
        number = gradients.indices[position]
        tensor = gradients.tensors[position]
        direction, variable_axes = directions[number], axes[number]
        if direction is None or not math.prod(tensor.shape):
            continue
        key = (
            id(direction),
            variable_axes,
            tuple(tensor.shape),
            tensor.dtype,
            position if sparse.is_sparse(tensor) else device_of(tensor),
        )
        equal.setdefault(key, []).append(position)
    floor_and_factor = _FloorAndFactor(epsilon, gradients.rate)
    for (_, variable_axes, shape, *_), positions in equal.items():
        direction = directions[gradients.indices[positions[0]]]

        def function(stack, direction=direction, variable_axes=variable_axes):
            return direction.point(
                stack, variable_axes, *floor_and_factor.on_device_of(stack)
            )

        size = max(1, _STACK_ENTRIES // math.prod(shape))
        for start in range(0, len(positions), size):
            gradients.replace(
                function,
                positions[start : start + size],
                by_row=direction.is_by_row(variable_axes),
                divide_by_rate=False,
            )


class _FloorAndFactor:
    """Computes floor and factor of `Direction.point`, once per dtype and device."""

    def __init__(self, epsilon, rate):
        self._epsilon, self._rate = epsilon, rate
        self._cache: dict[Any, Any] = {}

    def on_device_of(self, stack):
        """Returns the floor, which is above 0, and the factor, on a tensor's device."""
        key = stack.dtype, device_of(stack)
        if key not in self._cache:
            self._cache[key] = self._compute(stack)
        return self._cache[key]

    def _compute(self, stack):
        floor, factor = ops.cast(self._epsilon, stack.dtype), 1.0
        if self._rate is not None:
            # With the floor lr · ε, lr · u has the direction of u, or of -u.
            factor = ops.abs(ops.cast(self._rate, stack.dtype))
            floor = to_device_of(floor, factor) * factor
            factor = to_device_of(factor, stack)
        tiny = constant_like(floor, np.finfo(dtype_of(stack)).tiny)
        return to_device_of(ops.where(floor < tiny, tiny, floor), stack), factor


def get_direction(identifier, argument):
    """Converts the value of an argument to a `Direction`. `None` stays `None`.

    Args:
        identifier: `None`, a `Direction`, its name, or a result of `config_of`.
        argument: Name of the argument, for the error message.

    Raises:
        ValueError: If the value is none of these.
    """
    found = find_object(identifier, argument, Direction.classes)
    if found is None and identifier is not None:
        raise ValueError(
            f"`{argument}` must be None, {', '.join(map(repr, Direction.classes))}, or "
            "an object of `keras_normopt.directions`. "
            f"Received: {argument}={reprlib.repr(identifier)}"
        )
    return found
