"""Arranges a variable as a stack of matrices, or with units on the last axis."""

import dataclasses
import math
from typing import Any

from keras import ops


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one variable.

    An axis that is neither input nor output counts separate matrices.

    Attributes:
        role: `"kernel"`, `"embedding"` or `"vector"`. A kernel is a matrix. An
            embedding is a table, and a step uses some of its rows. A vector is a bias,
            gain or scalar of any rank.
        inputs: Tuple of the input axes.
        outputs: Tuple of the output axes.
        parts: The number of matrices that the outputs are split into, such as the
            gates of an LSTM or the groups of a convolution.
    """

    role: str
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    parts: int = 1

    def __str__(self) -> str:
        if self.role == "vector":
            return "vector"
        sides = (", ".join(map(str, axes)) for axes in (self.inputs, self.outputs))
        text = f"({' | '.join(sides)})"
        return f"{text} in {self.parts} parts" if self.parts > 1 else text

    def get_config(self) -> list[Any]:
        """Returns a list. `of_config` makes equal axes from it."""
        return [self.role, list(self.inputs), list(self.outputs), self.parts]

    @classmethod
    def of_config(cls, config: Any) -> "Axes":
        role, inputs, outputs, parts = config
        return cls(role, tuple(inputs), tuple(outputs), parts)

    def batch(self, rank):
        """Returns the axes that count separate matrices."""
        listed = (*self.inputs, *self.outputs)
        return tuple([i for i in range(rank) if i not in listed])

    def sizes(self, shape):
        """Returns the number of matrices, and how many inputs and outputs each has."""
        count, inputs, outputs = [
            math.prod([shape[i] for i in axes])
            for axes in (self.batch(len(shape)), self.inputs, self.outputs)
        ]
        return count * self.parts, inputs, outputs // self.parts

    def to_matrices(self, stack):
        """Arranges a stack of kernels of one shape as a stack of matrices.

        Args:
            stack: Tensor of shape `(n, *shape)`.

        Returns:
            Tensor of shape `(n · matrices, inputs, outputs)`.
        """
        n, *shape = stack.shape
        count, inputs, outputs = self.sizes(shape)
        stack = _transposed(stack, self._order(len(shape)))
        if self.parts > 1:
            split = (n * count // self.parts, inputs, self.parts, outputs)
            stack = ops.transpose(ops.reshape(stack, split), (0, 2, 1, 3))
        return _reshaped(stack, (n * count, inputs, outputs))

    def from_matrices(self, matrices, n, shape):
        """Reverses `to_matrices`. Returns a stack of `n` kernels of a shape."""
        count, inputs, outputs = self.sizes(shape)
        if self.parts > 1:
            split = (n * count // self.parts, self.parts, inputs, outputs)
            matrices = ops.transpose(ops.reshape(matrices, split), (0, 2, 1, 3))
        order = self._order(len(shape))
        sizes = [n, *shape]
        stack = _reshaped(matrices, tuple([sizes[i] for i in order]))
        return _transposed(stack, [order.index(i) for i in range(len(order))])

    def _order(self, rank):
        axes = (*self.batch(rank), *self.inputs, *self.outputs)
        return [0, *[i + 1 for i in axes]]

    # A unit has one index on each axis that is not an input. In most layers, units are
    # on the last axis already. Then the four methods below change nothing.

    def units_shape(self, shape):
        """Returns the shape with units on the last axis. Vectors get a single axis."""
        if self.ends_with_units(len(shape)):
            return tuple(shape)
        if self.role == "vector":
            return (math.prod(shape),)
        inputs = math.prod([shape[i] for i in self.inputs])
        units = [size for i, size in enumerate(shape) if i not in self.inputs]
        return inputs, math.prod(units)

    def to_units(self, tensor):
        """Moves the units of a gradient to the last axis."""
        rank = len(tensor.shape)
        if self.ends_with_units(rank):
            return tensor
        shape = self.units_shape(tensor.shape)
        return ops.reshape(_transposed(tensor, self._unit_order(rank)), shape)

    def from_units(self, tensor, shape):
        """Reverses `to_units`."""
        if self.ends_with_units(len(shape)):
            return tensor
        order = self._unit_order(len(shape))
        tensor = ops.reshape(tensor, [shape[i] for i in order])
        return _transposed(tensor, [order.index(i) for i in range(len(order))])

    def broadcast(self, values, shape):
        """Reshapes a vector of one value per unit, to broadcast against a gradient."""
        if not len(values.shape):
            return values
        sizes = [1 if i in self.inputs else size for i, size in enumerate(shape)]
        return self.from_units(values, sizes)

    def ends_with_units(self, rank):
        """Returns whether units are on the last axis already. True below rank 2."""
        return rank < 2 or (
            self.role != "vector" and self.inputs == tuple(range(rank - 1))
        )

    def _unit_order(self, rank):
        if self.role == "vector":
            return list(range(rank))
        return [*self.inputs, *[i for i in range(rank) if i not in self.inputs]]


def _reshaped(tensor, shape):
    return tensor if tuple(tensor.shape) == shape else ops.reshape(tensor, shape)


def _transposed(tensor, order):
    return tensor if order == sorted(order) else ops.transpose(tensor, order)


def dense_axes(shape):
    """Returns the axes of a kernel whose only output is its last axis."""
    rank = len(shape)
    if rank < 2:
        return Axes("vector")
    return Axes("kernel", tuple(range(rank - 1)), (rank - 1,))
