"""What one norm spans: which gradients it takes together, and how it reduces them."""

import copy
import functools
import math

import keras
from keras import ops

from keras_normopt import sparse

SCOPES = ("variable", "unit", "layer", "global")

# How much is stacked at most. A call on PyTorch costs the same however small its tensor
# is, so that a stack of many is cheap; but compilers take long over one of very many,
# and it is a copy.
STACK_LENGTH = 64 if keras.backend.backend() == "torch" else 16
STACK_ENTRIES = 2**18


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


class Opaque(list):
    """A list that Keras does not search for symbolic tensors, slowly on PyTorch."""


def stack(gradients, blocks, per_unit=False):
    """Puts the blocks that are alike together, small ones in stacks.

    Args:
        gradients: List of tensors, or on TensorFlow of `tf.IndexedSlices`.
        blocks: List of blocks, each a non-empty list of positions in `gradients`.
        per_unit: As for `Stack`.

    Returns:
        List of `Stack`. Each block is in one of them.
    """
    alike = {}
    for number, block in enumerate(blocks):
        kinds = tuple(_kind(gradients[i], i) for i in block)
        alike.setdefault(kinds, []).append(number)
    stacks = []
    for kinds, numbers in alike.items():
        length = _length(sum(math.prod(shape) for shape, *_ in kinds))
        for start in range(0, len(numbers), length):
            some = numbers[start : start + length]
            stacks.append(
                Stack(gradients, some, [blocks[n] for n in some], kinds, per_unit)
            )
    return stacks


def _kind(gradient, position):
    shape = tuple(gradient.shape)
    if sparse.is_sparse(gradient):
        return shape, gradient.dtype, position  # Like no other.
    return shape, gradient.dtype


def _length(entries):
    return max(1, min(STACK_LENGTH, STACK_ENTRIES // max(entries, 1)))


def norm_shape(shape, per_unit):
    """The shape of the norm of one tensor."""
    return tuple(shape[-1:]) if per_unit and len(shape) > 1 else ()


class Stack:
    """Blocks that are alike, side by side, so that one call reduces them all.

    The entries of each block are taken as one long vector, or as one for each unit.

    Args:
        gradients: As for `stack`.
        numbers: List of the numbers of the blocks.
        blocks: List of the blocks.
        kinds: For each gradient of a block, its shape and dtype.
        per_unit: Whether to take all axes but the last together, for a norm for each
            unit, if there are more axes than one. Then a block has one gradient only.
    """

    def __init__(self, gradients, numbers, blocks, kinds, per_unit):
        self.numbers, self.blocks, self._gradients = numbers, blocks, gradients
        dtypes = {keras.backend.standardize_dtype(dtype) for _, dtype, *_ in kinds}
        self.dtype = "float64" if "float64" in dtypes else "float32"
        units = norm_shape(kinds[0][0], per_unit)
        self.is_per_unit = bool(units)
        self.is_single = len(blocks) == 1
        self.shape = units if self.is_single else (len(blocks), *units)
        self.size = sum(math.prod(shape) for shape, *_ in kinds)
        if self.is_per_unit:
            self.size //= max(units[0], 1)
        # Each tensor is made of gradients of one kind, those at `positions`.
        self.positions = list(self._slots(kinds))
        self.tensors = [self._joined(positions) for positions in self.positions]

    def _slots(self, kinds):
        members = {}
        for member, kind in enumerate(kinds):
            members.setdefault(kind, []).append(member)
        for (shape, *_), alike in members.items():
            length = max(1, _length(math.prod(shape)) // len(self.blocks))
            for start in range(0, len(alike), length):
                some = alike[start : start + length]
                yield [block[member] for block in self.blocks for member in some]

    def _joined(self, positions):
        tensors = [sparse.densify(self._gradients[i]) for i in positions]
        if len(tensors) == 1:
            return ops.cast(tensors[0], self.dtype)
        rows = () if self.is_single else (len(self.blocks),)
        units = self.shape[-1:] if self.is_per_unit else ()
        shape = Opaque([*rows, -1, *units])
        tensor = ops.reshape(ops.stack(Opaque(tensors)), shape)
        return ops.cast(tensor, self.dtype)

    def _over(self, tensor):
        if not self.is_single:
            return 1
        return tuple(range(len(tensor.shape) - self.is_per_unit))

    def spread(self, values):
        """Shapes one value for each norm so that a tensor can be divided by it."""
        if values is None or self.is_single:
            return values
        return ops.expand_dims(values, 1)

    def divided_by(self, values):
        """Divides the entries of each norm by its value."""
        result = copy.copy(self)
        values = self.spread(values)
        result.tensors = [ops.divide(t, values) for t in self.tensors]
        return result

    def total(self, function=lambda tensor: tensor):
        """The sum over all entries of a function of them."""
        parts = [ops.sum(function(t), axis=self._over(t)) for t in self.tensors]
        return functools.reduce(ops.add, parts)

    def length(self):
        """The Euclidean length."""
        # One kernel instead of three on PyTorch, though slow over the first axis; but
        # TensorFlow's takes one axis, or two, and JAX's returns float32 for float64.
        is_alone = len(self.tensors) == 1 and not self.is_per_unit
        if is_alone and self.dtype == "float32":
            (tensor,) = self.tensors
            over = self._over(tensor)
            if over == 1 or over in ((0,), (0, 1)):
                return ops.norm(tensor, axis=over)
        return ops.sqrt(self.total(ops.square))

    def largest(self):
        """The largest magnitude."""
        return self._extreme(ops.max)

    def smallest(self):
        """The smallest magnitude."""
        return self._extreme(ops.min)

    def _extreme(self, reduce):
        parts = [
            reduce(ops.abs(t), axis=self._over(t))
            for t in self.tensors
            if math.prod(t.shape)
        ]
        return parts[0] if len(parts) == 1 else reduce(ops.stack(parts), axis=0)

    def deviation(self, mean):
        """The standard deviation, given the mean."""
        if len(self.tensors) == 1 and not self.is_per_unit:
            (tensor,) = self.tensors
            return ops.std(tensor, axis=self._over(tensor))
        mean = self.spread(mean)
        squares = self.total(lambda t: ops.square(ops.subtract(t, mean)))
        return ops.sqrt(squares / self.size)

    def each_as_one_tensor(self):
        """One tensor for each block."""
        result = []
        for block in self.blocks:
            tensors = [
                ops.cast(sparse.densify(self._gradients[i]), self.dtype) for i in block
            ]
            if len(tensors) > 1:
                tensors = [ops.reshape(t, (-1,)) for t in tensors]
                tensors = [ops.concatenate(tensors)]
            result += tensors
        return result
