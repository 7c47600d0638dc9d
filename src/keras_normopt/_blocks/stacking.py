"""Stacks equal blocks, so that one call reduces and divides them all.

Grouping only saves time. On PyTorch, calls on small tensors all take the same time. JAX
and TensorFlow compile fewer operations.
"""

import math
from typing import Any

import keras
from keras import ops

from keras_normopt._backend import sparse
from keras_normopt._backend.devices import device_of
from keras_normopt._backend.tensors import Leaf
from keras_normopt.norms._reductions import Reductions, reductions_of

_ON_TORCH = keras.backend.backend() == "torch"

# The largest numbers of tensors and of entries in one stack. A stack is a copy, and
# compilers are slow with very many operands. From 2¹⁵ entries on, PyTorch splits the
# work over threads, which wait for each other on a busy machine.
STACK_SIZE = 64 if _ON_TORCH else 16
STACK_ENTRIES = 2**15 - 1 if _ON_TORCH else 2**18


class TorchReductions(Reductions):
    """Reductions that PyTorch computes in one kernel instead of three."""

    def l2(self):
        # Keras computes the norms of float64 tensors in float32.
        if not self._is_simple() or self.dtype != "float32":
            return super().l2()
        (tensor,) = self.tensors
        if len(tensor.shape) - self.stacked > 2:
            return super().l2()
        return ops.norm(tensor, axis=self._axes(tensor))

    def std(self):
        if not self._is_simple():
            return super().std()
        (tensor,) = self.tensors
        return ops.std(tensor, axis=self._axes(tensor))

    def _is_simple(self):
        return len(self.tensors) == 1 and not self.per_unit


FastReductions = TorchReductions if _ON_TORCH else Reductions


def group_blocks(tensors, blocks, units=None):
    """Divides blocks into groups of equal blocks.

    Args:
        tensors: List of the gradients.
        blocks: Dict from the number of each block to the positions of its gradients.
        units: `None`, or a list of the `Axes` of each tensor, if each output unit has a
            norm.

    Returns:
        List of groups, in the order of their packed norms.
    """
    equal: dict[tuple[Any, ...], list[int]] = {}
    for number, positions in blocks.items():
        keys = tuple(
            _stacking_key(tensors[i], i, units and units[i]) for i in positions
        )
        equal.setdefault(keys, []).append(number)
    groups = []
    for keys, numbers in equal.items():
        size = _stack_size(sum(math.prod(shape) for shape, *_ in keys))
        for start in range(0, len(numbers), size):
            chunk = {n: blocks[n] for n in numbers[start : start + size]}
            groups.append(Group(chunk, keys))
    # Norms of blocks come before norms of units, as in `join` without stacks.
    return sorted(groups, key=lambda group: (group.has_units, group.stacked))


def _stacking_key(tensor, position, axes):
    shape = tuple(tensor.shape)
    if sparse.is_sparse(tensor):
        return shape, axes, tensor.dtype, position  # Equal to no other.
    return shape, axes, tensor.dtype, device_of(tensor)


def with_units_last(tensor, axes):
    """Moves the output units of a gradient to its last axis, if they have norms."""
    return tensor if axes is None else axes.to_units(tensor)


def shape_with_units_last(tensor, axes):
    """Returns the shape of the result of `with_units_last`."""
    shape = tuple(tensor.shape)
    return shape if axes is None else axes.units_shape(shape)


def _stack_size(entries):
    return max(1, min(STACK_SIZE, STACK_ENTRIES // max(entries, 1)))


class Group:
    """A group of equal blocks.

    Args:
        blocks: Dict from the number of each block to the positions of its gradients.
        keys: Shape, axes, dtype and device of each gradient of a block. The axes are
            `None` unless output units have norms.

    Attributes:
        numbers: List of the numbers of the blocks.
        stacked: Whether there are several blocks.
        has_units: Whether each unit has a norm.
        shape: The shape of the norms.
        stack_positions: List of lists of positions. Each list forms one stack.
    """

    def __init__(self, blocks, keys):
        self.numbers = list(blocks)
        self.stacked = len(blocks) > 1
        shape, self._axes, *_ = keys[0]
        if self._axes is not None:
            shape = self._axes.units_shape(shape)
        self.has_units = self._axes is not None and len(shape) > 1
        units = shape[-1:] if self.has_units else ()
        self.shape = (len(blocks),) * self.stacked + units
        self.stack_positions = list(
            self._positions_of_stacks(list(blocks.values()), keys)
        )

    def _positions_of_stacks(self, blocks, keys):
        members: dict[tuple[Any, ...], list[int]] = {}
        for member, key in enumerate(keys):
            members.setdefault(key, []).append(member)
        for (shape, *_), equal in members.items():
            size = max(1, _stack_size(math.prod(shape)) // len(blocks))
            for start in range(0, len(equal), size):
                chunk = equal[start : start + size]
                yield [block[member] for block in blocks for member in chunk]

    def reductions(self, tensors):
        """Returns the `Reductions` of the blocks."""
        stacks = [
            self._stack([with_units_last(tensors[i], self._axes) for i in positions])
            for positions in self.stack_positions
        ]
        return reductions_of(stacks, self.has_units, self.stacked, FastReductions)

    def _stack(self, tensors):
        if len(tensors) == 1:
            return tensors[0]
        stack = ops.stack(Leaf(tensors))
        one_per_block = self.stacked and len(tensors) == len(self.numbers)
        has_axes_to_reduce = len(stack.shape) > len(self.shape)
        if one_per_block and has_axes_to_reduce:
            return stack
        rows, units = self.shape[: self.stacked], self.shape[self.stacked :]
        return ops.reshape(stack, (*rows, -1, *units))
