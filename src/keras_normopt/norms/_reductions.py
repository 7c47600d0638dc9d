"""Reduces the entries of a block, which may span several tensors."""

import functools
import math

from keras import ops

from keras_normopt._backend import sparse
from keras_normopt._backend.devices import to_device_of
from keras_normopt._backend.tensors import dtype_of, safe_sqrt, widen


class Reductions:
    """Reduces the entries of a block, or of stacked blocks, to one number per norm.

    Args:
        tensors: Non-empty list of tensors of one floating-point dtype.
        per_unit: Whether each unit has its own norm. Units lie on the last axis of a
            tensor.
        stacked: Whether the first axis of each tensor counts blocks of equal shape.
        rows: List with an item for each tensor. If the tensor holds only some rows of a
            gradient, the item is the number of all rows. The other rows are 0. If the
            tensor holds all rows, the item is `None`.
    """

    def __init__(self, tensors, per_unit=False, stacked=False, rows=None):
        self.tensors, self.per_unit, self.stacked = tensors, per_unit, stacked
        self._rows = rows or [None] * len(tensors)
        first = tuple(tensors[0].shape)
        self.dtype = dtype_of(tensors[0])
        #: The shape of the norms. It is empty for a single block without units.
        self.shape = first[:stacked] + first[len(first) - per_unit :]
        #: The number of entries that one norm covers.
        self.size = sum(map(self._size_of, tensors, self._rows))

    def sum(self, function=lambda tensor: tensor):
        """Returns the sum of `function(entry)`. The function maps 0 to 0."""
        parts = [ops.sum(function(t), axis=self._axes(t)) for t in self.tensors]
        return functools.reduce(lambda a, b: a + to_device_of(b, a), parts)

    def l2(self):
        """Returns the Euclidean norm."""
        return safe_sqrt(self.sum(ops.square))

    def std(self):
        """Returns the population standard deviation."""
        mean = self.sum() / self.size  # `ops.mean` computes in float32 on JAX.
        squares = self.sum(lambda t: ops.square(t - self.broadcast(mean, t)))
        absent = self._absent()
        if absent is not None:
            squares = squares + absent * ops.square(mean)
        return safe_sqrt(squares / self.size)

    def max_abs(self):
        """Returns the largest magnitude."""
        present = self._extreme(ops.amax)
        if self._absent() is None:
            return present
        # The maximum over no rows is -∞.
        return ops.maximum(present, ops.zeros_like(present))

    def min_abs(self):
        """Returns the smallest magnitude."""
        present, absent = self._extreme(ops.amin), self._absent()
        if absent is None:
            return present
        return ops.where(absent > 0, ops.zeros_like(present), present)

    def scaled(self, where):
        """Returns the reductions of the entries multiplied by factors.

        Args:
            where: Dict from each factor to a boolean tensor with one value for each
                norm. The factor applies where the value is true.
        """
        # Factors are constants. XLA squares a tensor of factors and a constant
        # gradient of 0 separately, and the factor's square overflows.
        tensors = self.tensors
        for factor, chosen in where.items():
            tensors = [
                ops.where(self.broadcast(chosen, t), t * factor, t) for t in tensors
            ]
        return type(self)(tensors, self.per_unit, self.stacked, self._rows)

    def divided(self, divisor):
        """Returns the reductions of the entries divided by a scalar."""
        divisor = ops.cast(divisor, self.dtype)
        tensors = [tensor / to_device_of(divisor, tensor) for tensor in self.tensors]
        return type(self)(tensors, self.per_unit, self.stacked, self._rows)

    def broadcast(self, values, tensor):
        """Reshapes a tensor of one value per norm, to broadcast against `tensor`."""
        reduced = len(tensor.shape) - len(self.shape)
        values = to_device_of(values, tensor)
        if not self.stacked:
            return values
        return values[(slice(None), *[None] * reduced)]  # Faster than `reshape`.

    def _size_of(self, tensor, rows):
        """Returns the number of entries of one tensor in each norm."""
        shape = tuple(tensor.shape)
        if rows is not None:
            shape = (rows, *shape[1:])
        return math.prod(shape[self.stacked : len(shape) - self.per_unit])

    def _absent(self):
        """Returns the number of entries in absent rows, or `None` for dense tensors."""
        counts = [
            ops.cast(rows - ops.shape(tensor)[0], self.dtype)
            * (self._size_of(tensor, rows) // max(rows, 1))
            for tensor, rows in zip(self.tensors, self._rows, strict=True)
            if rows is not None
        ]
        return functools.reduce(ops.add, counts) if counts else None

    def _extreme(self, reduce):
        parts = [
            reduce(ops.abs(t), axis=self._axes(t))
            for t, rows in zip(self.tensors, self._rows, strict=True)
            if self._size_of(t, rows)
        ]
        if len(parts) == 1:
            return parts[0]
        return reduce(
            ops.stack([to_device_of(part, parts[0]) for part in parts]), axis=0
        )

    def _axes(self, tensor):
        if not (self.stacked or self.per_unit):
            return None
        return tuple(range(self.stacked, len(tensor.shape) - self.per_unit))


def reductions_of(tensors, per_unit=False, stacked=False, cls=Reductions):
    """Returns the reductions of one block, in a dtype wide enough for norms.

    Args:
        tensors: The gradients of the block, of any dtypes, sparse or dense.
        per_unit: Whether each unit has its own norm. A gradient with one axis has no
            units.
        stacked: As for `Reductions`.
        cls: The class of the result.
    """
    per_unit = per_unit and len(tensors[0].shape) > 1
    values, rows = zip(*map(sparse.rows_of, tensors), strict=True)
    return cls(widen(values), per_unit, stacked, rows)
