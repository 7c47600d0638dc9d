"""What one norm spans: which gradients it takes together, and how it reduces them."""

import functools
import math

import keras
from keras import ops

SCOPES = ("variable", "unit", "layer", "global")


def partition(scope, paths):
    """Divides variables into blocks, each with a norm of its own.

    Args:
        scope: One of `SCOPES`.
        paths: List of the variables' paths.

    Returns:
        A list of the blocks' names, no two the same, and a list that holds the number
        of its block for each variable.
    """
    keys = []
    for position, path in enumerate(paths):
        layer, slash, _ = path.rpartition("/")
        if scope == "global":
            keys.append(("global", None))
        elif scope == "layer" and slash:
            keys.append((layer, None))
        else:
            keys.append((path, position))
    blocks = list(dict.fromkeys(keys))
    names = []
    for name, _ in blocks:
        number, unique = 1, name
        while unique in names:
            number += 1
            unique = f"{name}_{number}"
        names.append(unique)
    return names, [blocks.index(key) for key in keys]


class Block:
    """Tensors whose entries are taken as one long vector, or as one for each unit.

    Args:
        tensors: Non-empty list of tensors in float32 or float64.
        per_unit: Whether to take all axes of the tensor but the last together, for a
            value of shape (1, …, 1, units), if it has more than one axis. Then there
            must be one tensor only.
    """

    def __init__(self, tensors, per_unit=False):
        dtypes = {keras.backend.standardize_dtype(t.dtype) for t in tensors}
        self.dtype = "float64" if "float64" in dtypes else "float32"
        if len(dtypes) > 1:
            tensors = [ops.cast(t, self.dtype) for t in tensors]
        self.tensors = tensors
        shape = tuple(tensors[0].shape)
        self.is_per_unit = per_unit and len(shape) > 1
        self.shape = (1,) * (len(shape) - 1) + shape[-1:] if self.is_per_unit else ()
        self.size = sum(math.prod(t.shape) for t in tensors)
        if self.is_per_unit:
            self.size //= max(shape[-1], 1)
        self._over = {}
        if self.is_per_unit:
            self._over = {"axis": tuple(range(len(shape) - 1)), "keepdims": True}

    @property
    def is_one_tensor(self):
        return len(self.tensors) == 1 and not self.is_per_unit

    def divided_by(self, scale):
        return Block([ops.divide(t, scale) for t in self.tensors], self.is_per_unit)

    def total(self, function=lambda tensor: tensor):
        """The sum over all entries of a function of them."""
        parts = [ops.sum(function(t), **self._over) for t in self.tensors]
        return functools.reduce(ops.add, parts)

    def largest(self):
        """The largest magnitude."""
        return self._extreme(ops.max)

    def smallest(self):
        """The smallest magnitude."""
        return self._extreme(ops.min)

    def _extreme(self, reduce):
        parts = [
            reduce(ops.abs(t), **self._over)
            for t in self.tensors
            if self.is_per_unit or math.prod(t.shape)
        ]
        return parts[0] if len(parts) == 1 else reduce(ops.stack(parts))

    def deviation(self, mean):
        """The standard deviation, given the mean."""
        if len(self.tensors) == 1:
            return ops.std(self.tensors[0], **self._over)
        squares = self.total(lambda t: ops.square(ops.subtract(t, mean)))
        return ops.sqrt(squares / self.size)

    def as_one_tensor(self):
        if len(self.tensors) == 1:
            return self.tensors[0]
        return ops.concatenate([ops.reshape(t, (-1,)) for t in self.tensors])
