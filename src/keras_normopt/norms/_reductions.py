"""The numbers that one norm is of, whatever tensors they lie in."""

import functools
import math

import keras
from keras import ops

from keras_normopt._backend import sparse
from keras_normopt._backend.devices import near


class Entries:
    """The entries of a block of gradients, which the definition of a norm reduces.

    Args:
        tensors: Non-empty list of tensors of one floating-point dtype.
        per_unit: Whether there is a norm for each unit, the last axis of every tensor,
            instead of one for all.
        stacked: Whether there is a norm for each index of the first axis, along which
            equal blocks were stacked.
        rows: For each tensor `None`, or how many rows the gradient has of which the
            tensor holds only some. The entries of the other rows are 0.
    """

    def __init__(self, tensors, per_unit=False, stacked=False, rows=None):
        self.tensors, self.per_unit, self.stacked = tensors, per_unit, stacked
        self._rows = rows or [None] * len(tensors)
        first = tuple(tensors[0].shape)
        self.dtype = keras.backend.standardize_dtype(tensors[0].dtype)
        #: The shape of the norms: empty, but for stacked blocks and units.
        self.shape = first[:stacked] + first[len(first) - per_unit :]
        #: How many entries each norm is of.
        self.size = sum(map(self._size_of, tensors, self._rows))

    def sum(self, function=lambda tensor: tensor):
        """The sum over the entries of a function of each, which is 0 of 0."""
        parts = [ops.sum(function(t), axis=self._axes(t)) for t in self.tensors]
        return functools.reduce(lambda a, b: a + near(b, a), parts)

    def length(self):
        """The Euclidean length."""
        return root(self.sum(ops.square))

    def deviation(self):
        """The standard deviation, of the population."""
        mean = self.sum() / self.size  # `ops.mean` on JAX computes in float32 always.
        squares = self.sum(lambda t: ops.square(t - self.spread(mean, t)))
        absent = self._absent()
        if absent is not None:
            squares = squares + absent * ops.square(mean)
        return root(squares / self.size)

    def largest(self):
        """The largest magnitude."""
        present = self._extreme(ops.amax)
        if self._absent() is None:
            return present
        return ops.maximum(present, ops.zeros_like(present))  # Of no rows it is -∞.

    def smallest(self):
        """The smallest magnitude."""
        present, absent = self._extreme(ops.amin), self._absent()
        if absent is None:
            return present
        return ops.where(absent > 0, ops.zeros_like(present), present)

    def scaled(self, where):
        """The entries times factors.

        Args:
            where: Dict from each factor to whether it is that of each norm.
        """
        # A factor is a constant: of a tensor of factors and a gradient that is known
        # to be 0, XLA squares each by itself, which overflows.
        tensors = self.tensors
        for factor, chosen in where.items():
            tensors = [
                ops.where(self.spread(chosen, t), t * factor, t) for t in tensors
            ]
        return type(self)(tensors, self.per_unit, self.stacked, self._rows)

    def over(self, divisor):
        """The entries divided by a scalar."""
        divisor = ops.cast(divisor, self.dtype)
        tensors = [tensor / near(divisor, tensor) for tensor in self.tensors]
        return type(self)(tensors, self.per_unit, self.stacked, self._rows)

    def spread(self, values, tensor):
        """Shapes one value for each norm to go with one of the tensors."""
        reduced = len(tensor.shape) - len(self.shape)
        values = near(values, tensor)
        if not self.stacked:
            return values
        return values[(slice(None), *[None] * reduced)]  # Faster than to reshape it.

    def _size_of(self, tensor, rows):
        """How many entries of each norm are those of one tensor."""
        shape = tuple(tensor.shape)
        if rows is not None:
            shape = (rows, *shape[1:])
        return math.prod(shape[self.stacked : len(shape) - self.per_unit])

    def _absent(self):
        """How many entries of each norm are in rows that are absent, if any may be."""
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
        return reduce(ops.stack([near(part, parts[0]) for part in parts]), axis=0)

    def _axes(self, tensor):
        if not (self.stacked or self.per_unit):
            return None
        return tuple(range(self.stacked, len(tensor.shape) - self.per_unit))


def entries_of(tensors, per_unit=False, stacked=False, kind=Entries):
    """The `Entries` of one block, in the dtype that norms are computed in.

    Args:
        tensors: The gradients of the block, of any dtypes, sparse or not.
        per_unit: Whether to take units apart, where there are more axes than one.
        stacked: As for `Entries`.
        kind: The class to make.
    """
    per_unit = per_unit and len(tensors[0].shape) > 1
    values, rows = zip(*map(sparse.rows_of, tensors), strict=True)
    return kind(widened(values), per_unit, stacked, rows)


def widened(tensors):
    """Casts tensors to the dtype that norms are computed in, one for all of a block."""
    dtypes = {keras.backend.standardize_dtype(t.dtype) for t in tensors}
    dtype = "float64" if "float64" in dtypes else "float32"
    return [cast(t, dtype) for t in tensors]


def root(squares):
    """The square root, with a derivative of 0 at 0 instead of an infinite one."""
    is_zero = ops.equal(squares, 0)
    one = ops.ones_like(squares)
    return ops.where(is_zero, squares, ops.sqrt(ops.where(is_zero, one, squares)))


def cast(tensor, dtype):
    """Casts where it is needed, as finding out that it is not takes PyTorch long."""
    if keras.backend.standardize_dtype(tensor.dtype) == dtype:
        return tensor
    return ops.cast(tensor, dtype)


def like(tensor, value):
    """Converts a number to the dtype of a tensor, where Keras would take float32."""
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return ops.convert_to_tensor(value, dtype=dtype)
