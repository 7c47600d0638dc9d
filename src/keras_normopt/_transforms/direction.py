"""Replaces a gradient by a direction: a step of a set length, best aligned with it.

Each direction maximizes <gradient, step> over the steps of length 1 in one norm: the
linear minimization oracle of that norm, turned around (arXiv 2502.07529).
"""

import math
import re
import reprlib
import warnings
from typing import Any, ClassVar

import numpy as np
from keras import ops

from keras_normopt._backend import sparse
from keras_normopt._backend.devices import device_of, near
from keras_normopt._backend.tensors import constant_like, divide, dtype_of, safe_sqrt
from keras_normopt._transforms.config import (
    Configured,
    check_pattern,
    config_of,
    find,
)

#: More entries than these are not stacked: a stack is a copy.
_STACK_ENTRIES = 2**22

#: The root mean square of the entries of a step under `scale="match_rms_adamw"`.
RMS = 0.2


class Direction(Configured):
    """What replaces a gradient. Subclasses have a `name`."""

    #: The classes, by name.
    classes: ClassVar[dict[str, type["Direction"]]] = {}
    name: str
    #: What has the length of a step.
    unit: str

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        Direction.classes[cls.name] = cls

    def of_role(self, role):
        """Returns what acts on variables of a role, or `None`: see `Axes`."""
        return self

    @property
    def uses_axes(self):
        """Whether it depends on which axes are inputs and which are outputs."""
        return True

    def is_by_row(self, axes):
        """Whether each row of a gradient has a direction of its own."""
        return False

    def point(self, stack, axes, floor):
        """Returns the directions of equal gradients.

        Args:
            stack: Tensor of shape `(n, *shape)`, in float32 or float64.
            axes: The `Axes` of the variables.
            floor: Scalar tensor. Where the gradient is shorter, so is the step.
        """
        raise NotImplementedError

    def length(self, axes, shape):
        """Returns the length of a step, in the norm of the direction, as a float."""
        raise NotImplementedError


def checked_scale(scale, choices):
    """Returns the argument `scale`, or raises a `ValueError`."""
    if scale is not None and not (isinstance(scale, str) and scale in choices):
        raise ValueError(
            f"`scale` must be None or one of {', '.join(map(repr, choices))}. "
            f"Received: scale={reprlib.repr(scale)}"
        )
    return scale


def unit_vectors(tensor, axes):
    """Divides by the Euclidean norm over some axes, at any magnitude.

    Returns:
        The quotients, 0 where the norm is 0; the norms, divided by the largest
        magnitudes; and these magnitudes.
    """
    # The result does not depend on the scale, so its derivative is left out.
    largest = ops.stop_gradient(ops.amax(ops.abs(tensor), axis=axes, keepdims=True))
    tensor = divide(tensor, _not_zero(largest))
    norms = safe_sqrt(ops.sum(ops.square(tensor), axis=axes, keepdims=True))
    return tensor / _not_zero(norms), norms, largest


def _not_zero(tensor):
    """Replaces zeros by ones."""
    return ops.where(ops.equal(tensor, 0), ops.ones_like(tensor), tensor)


def fade(norms, largest, floor):
    """Returns min(1, norm / floor) of norms = `norms` · `largest`."""
    # The norm itself may overflow.
    ratio = norms * (ops.where(largest < floor, largest, floor) / floor)
    return ops.where(ratio < 1, ratio, ops.ones_like(ratio))


def point(gradients, directions, axes, epsilon):
    """Replaces each gradient by its direction.

    Args:
        gradients: The `Gradients`.
        directions: List of what acts on each variable of the optimizer, or `None`.
        axes: List of the `Axes` of each variable.
        epsilon: Scalar tensor, variable or float. Shorter gradients make shorter steps.
    """
    equal: dict[Any, list[int]] = {}
    for position in gradients.positions:
        number = gradients.indices[position]
        tensor = gradients.tensors[position]
        direction, of_variable = directions[number], axes[number]
        if direction is None or not math.prod(tensor.shape):
            continue
        key = (
            id(direction),
            of_variable,
            tuple(tensor.shape),
            tensor.dtype,
            position if sparse.is_sparse(tensor) else device_of(tensor),
        )
        equal.setdefault(key, []).append(position)
    for (_, of_variables, shape, *_), positions in equal.items():
        direction = directions[gradients.indices[positions[0]]]
        size = max(1, _STACK_ENTRIES // math.prod(shape))

        def function(stack, direction=direction, of_variables=of_variables):
            return direction.point(stack, of_variables, _floor(epsilon, stack))

        for start in range(0, len(positions), size):
            gradients.replace(
                function,
                positions[start : start + size],
                by_row=direction.is_by_row(of_variables),
            )


def _floor(epsilon, tensor):
    """Returns a floor above 0 in the dtype of a tensor."""
    floor, smallest = ops.cast(epsilon, dtype_of(tensor)), np.finfo(dtype_of(tensor))
    tiny = constant_like(floor, smallest.tiny)
    return near(ops.where(floor < tiny, tiny, floor), tensor)


class ByPattern(Configured):
    """The direction of each variable by the first pattern that its path contains.

    Args:
        patterns: List of pairs of a regular expression and a direction or `None`.
    """

    def __init__(self, patterns):
        self.patterns = patterns

    def get_config(self):
        """The arguments, by name."""
        return {"patterns": [[p, config_of(d)] for p, d in self.patterns]}

    def of(self, path):
        """Returns the direction for a path."""
        return next((d for p, d in self.patterns if re.search(p, path)), None)


def get(identifier: Any) -> Any:
    """Returns what `direction=` stands for.

    Args:
        identifier: `None`, a name, an object, what `serialize` made of one, or a
            dictionary from regular expressions to these.

    Raises:
        TypeError: If a key of the dictionary is not a string.
        ValueError: If it is none of these, or its arguments are wrong.
    """
    if isinstance(identifier, ByPattern):
        return identifier
    patterns = identifier
    if isinstance(identifier, dict) and set(identifier) == {"patterns"}:
        patterns = dict(identifier["patterns"])
    elif isinstance(identifier, dict) and set(identifier) == {"name", "config"}:
        patterns = None
    if not isinstance(patterns, dict):
        return get_one(identifier, "direction")
    if not patterns:
        raise ValueError("`direction` must not be an empty dictionary.")
    for pattern in patterns:
        check_pattern("direction", pattern, identifier)
    return ByPattern([(p, get_one(d, "direction")) for p, d in patterns.items()])


def serialize(direction: Any) -> Any:
    """Returns what `get` makes the same direction of, in types that JSON has."""
    if isinstance(direction, ByPattern):
        return direction.get_config()
    return config_of(direction)


def of_path(direction: Any, path: str) -> Any:
    """Returns the direction for a path, or `None`, of what `get` returned."""
    return direction.of(path) if isinstance(direction, ByPattern) else direction


def resolve(direction: Any, paths: list[str], axes: list[Any]) -> list[Any]:
    """Returns what acts on each variable, or `None`.

    Args:
        direction: What `get` returned.
        paths: The paths of the variables.
        axes: Their `Axes`.
    """
    of_each = [of_path(direction, path) for path in paths]
    if isinstance(direction, ByPattern):
        for pattern, _ in direction.patterns:
            if not any(re.search(pattern, path) for path in paths):
                warnings.warn(
                    f"direction={{{pattern!r}: …}} matches none of the variables. "
                    f"Their paths are {reprlib.repr(paths)}.",
                    stacklevel=5,
                )
    return [d and d.of_role(a.role) for d, a in zip(of_each, axes, strict=True)]


def get_one(identifier, argument):
    """Returns the `Direction` that an argument stands for, or `None`: see `get`."""
    found = find(identifier, argument, Direction.classes)
    if found is None and identifier is not None:
        raise ValueError(
            f"`{argument}` must be None, {', '.join(map(repr, Direction.classes))}, or "
            "an object of `keras_normopt.directions`. "
            f"Received: {argument}={reprlib.repr(identifier)}"
        )
    return found
