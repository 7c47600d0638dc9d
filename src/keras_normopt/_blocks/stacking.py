"""Stacks small gradients, so that one call measures or divides all of them.

A block is a set of gradients with a common norm. Two blocks are alike if their
gradients have the same shapes, axes, dtypes and devices. The gradients of alike blocks
form one stack.

Stacks make steps faster, and do not change what the steps compute. On PyTorch, a call
on a tiny tensor takes as long as a call on a small stack. So one call for the stack
replaces many calls. JAX and TensorFlow compile fewer operations.
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

# One stack holds at most this number of tensors and this number of entries. The number
# of tensors is limited because compilers are slow with very many operands. The number
# of entries is limited because a stack is a copy. From 2¹⁵ entries on, PyTorch also
# splits the work over threads, which wait for each other on a busy machine.
STACK_SIZE = 64 if _ON_TORCH else 16
STACK_ENTRIES = 2**15 - 1 if _ON_TORCH else 2**18


class TorchReductions(Reductions):
    """Computes l2 and std with one call of PyTorch instead of three."""

    def l2(self):
        # Keras computes the norms of float64 tensors in float32.
        if not self._is_one_tensor_without_units() or self.dtype != "float32":
            return super().l2()
        (tensor,) = self.tensors
        if len(tensor.shape) - self.stacked > 2:
            return super().l2()
        return ops.norm(tensor, axis=self._axes(tensor))

    def std(self):
        if not self._is_one_tensor_without_units():
            return super().std()
        (tensor,) = self.tensors
        return ops.std(tensor, axis=self._axes(tensor))

    def _is_one_tensor_without_units(self):
        return len(self.tensors) == 1 and not self.per_unit


FastReductions = TorchReductions if _ON_TORCH else Reductions


def group_blocks(tensors, blocks, units=None):
    """Puts alike blocks into groups, whose gradients are stacked.

    Args:
        tensors: List of the gradients.
        blocks: Dict from the index of each block to a list of the positions of its
            gradients in `tensors`.
        units: List of the `Axes` of each tensor, to compute a norm for each output
            unit. `None` to compute one norm for each block.

    Returns:
        List of `Group` objects. Groups with one norm for each block come first.
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
    # `join` of `_backend/tensors.py` puts scalars first. So the norms of whole blocks
    # must come before the norms of units.
    return sorted(groups, key=lambda group: (group.has_units, group.stacked))


def _stacking_key(tensor, position, axes):
    shape = tuple(tensor.shape)
    if sparse.is_sparse(tensor):
        # Each key has another position, so sparse gradients are never stacked.
        return shape, axes, tensor.dtype, position
    return shape, axes, tensor.dtype, device_of(tensor)


def with_units_last(tensor, axes):
    """Moves the output units of a gradient to its last axis.

    Without `axes`, it returns the gradient unchanged.
    """
    return tensor if axes is None else axes.to_units(tensor)


def shape_with_units_last(tensor, axes):
    """Returns the shape of the result of `with_units_last`."""
    shape = tuple(tensor.shape)
    return shape if axes is None else axes.units_shape(shape)


def _stack_size(entries):
    return max(1, min(STACK_SIZE, STACK_ENTRIES // max(entries, 1)))


class Group:
    """A group of alike blocks.

    Args:
        blocks: Dict from the index of each block to a list of the positions of its
            gradients.
        keys: A tuple `(shape, axes, dtype, device)` for each gradient of one block. The
            axes are `None` if the optimizer computes one norm for each block.

    Attributes:
        numbers: List of the indices of the blocks.
        stacked: Whether the group has several blocks.
        has_units: Whether each output unit has its own norm.
        shape: The shape of the tensor of all norms of the group.
        stack_positions: List of lists of positions. The gradients at the positions in
            one list form one stack.
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
        """Returns the `Reductions` of the blocks, whose tensors are in a list."""
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
