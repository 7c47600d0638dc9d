"""A step that takes alike blocks together. It is there for speed alone.

Without this file `Step` does the same, block by block. On PyTorch a call costs the same
however small its tensor is; compiled programs gain less, and pay in compile time.
"""

import math

import keras
from keras import ops

from keras_normopt._backend import sparse
from keras_normopt._backend.devices import device_of
from keras_normopt._blocks.gradients import Step
from keras_normopt.norms import _overflow
from keras_normopt.norms._reductions import Entries, cast, entries_of

_ON_TORCH = keras.backend.backend() == "torch"

# How many tensors, and of how many entries together, are stacked at most: a stack is a
# copy, compilers take long over one of very many, and from 2¹⁵ entries on PyTorch
# splits the work over threads, which wait for each other on a machine that is busy.
STACK_LENGTH = 64 if _ON_TORCH else 16
STACK_ENTRIES = 2**15 - 1 if _ON_TORCH else 2**18


class GroupedStep(Step):
    """A step that reduces blocks of equal shapes in one call, side by side."""

    def __init__(self, gradients, weights, blocks, per_unit=False, rate=None):
        super().__init__(gradients, weights, blocks, per_unit, rate)
        groups = _groups(self.gradients, blocks, per_unit)
        # Those with a single norm first, as `join` has it.
        self._groups = sorted(groups, key=lambda group: bool(group.shape))

    def _entries(self, tensors):
        return [group.entries(tensors) for group in self._groups]

    def _arranged(self, values):
        result = [None] * len(self.blocks)
        for group, value in zip(self._groups, values, strict=True):
            parts = ops.unstack(value, len(group.numbers)) if group.stacked else [value]
            for number, part in zip(group.numbers, parts, strict=True):
                result[number] = part
        return result


class JoinedStep(GroupedStep):
    """A grouped step that works on all norms as one vector, and divides by group."""

    _stacks = None

    def by_block(self, norms):
        return super()._arranged(self._apart(norms))

    def divide(self, divisors):
        stacks = self._stacks or self._entries(self.gradients)
        self._stacks = None
        parts = self._apart(_overflow.stopped(divisors, self._moves))
        for group, entries, divisor in zip(self._groups, stacks, parts, strict=True):
            for positions in reversed(group.slots):
                # Each copy is let go before the next is divided.
                tensor = entries.tensors.pop()
                self._divide_slot(positions, tensor, entries.spread(divisor, tensor))
        self._known.clear()

    def _divide_slot(self, positions, tensor, divisor):
        first = self.gradients[positions[0]]
        if len(positions) == 1:
            self.gradients[positions[0]] = _overflow.quotient(first, divisor)
            return
        quotient = cast(
            _overflow.quotient(tensor, divisor),
            keras.backend.standardize_dtype(first.dtype),
        )
        shape = (len(positions), *first.shape)
        if tuple(quotient.shape) != shape:
            quotient = ops.reshape(quotient, shape)
        parts = ops.unstack(quotient, len(positions))
        for position, part in zip(positions, parts, strict=True):
            self.gradients[position] = part

    def _entries(self, tensors):
        stacks = super()._entries(tensors)
        if tensors is self.gradients:
            self._stacks = stacks
        return stacks

    def _arranged(self, values):
        return [_overflow.join(values)]

    def arranged(self, values):
        by_group = [[values[n] for n in group.numbers] for group in self._groups]
        return self._arranged([v[0] if len(v) == 1 else ops.stack(v) for v in by_group])

    def _apart(self, norms):
        """The norms of each group, from the vector of all."""
        if not self._groups:
            return []
        (vector,) = norms
        return _overflow.apart(vector, [group.shape for group in self._groups])


FastStep = JoinedStep if _ON_TORCH else GroupedStep


def _groups(tensors, blocks, per_unit):
    alike = {}
    for number, block in enumerate(blocks):
        kinds = tuple(_kind(tensors[i], i) for i in block)
        alike.setdefault(kinds, []).append(number)
    for kinds, numbers in alike.items():
        length = _length(sum(math.prod(shape) for shape, *_ in kinds))
        for start in range(0, len(numbers), length):
            some = numbers[start : start + length]
            yield _Group(some, [blocks[n] for n in some], kinds, per_unit)


def _kind(tensor, position):
    shape = tuple(tensor.shape)
    if sparse.is_sparse(tensor):
        return shape, tensor.dtype, position  # Like no other.
    return shape, tensor.dtype, device_of(tensor)


def _length(entries):
    return max(1, min(STACK_LENGTH, STACK_ENTRIES // max(entries, 1)))


class _Group:
    """Blocks that are alike.

    Args:
        numbers: List of the numbers of the blocks.
        blocks: List of the blocks.
        kinds: For each gradient of a block, its shape and dtype.
        per_unit: As for `Step`.
    """

    def __init__(self, numbers, blocks, kinds, per_unit):
        self.numbers = numbers
        self.stacked = len(numbers) > 1
        shape, *_ = kinds[0]
        units = shape[-1:] if per_unit and len(shape) > 1 else ()
        self.shape = (len(numbers),) * self.stacked + units
        self._per_unit = bool(units)
        # In each slot are gradients of one kind, which become one tensor.
        self.slots = list(self._slots(blocks, kinds))

    def _slots(self, blocks, kinds):
        members = {}
        for member, kind in enumerate(kinds):
            members.setdefault(kind, []).append(member)
        for (shape, *_), alike in members.items():
            length = max(1, _length(math.prod(shape)) // len(blocks))
            for start in range(0, len(alike), length):
                some = alike[start : start + length]
                yield [block[member] for block in blocks for member in some]

    def entries(self, tensors):
        """The `Entries` of the blocks, from one tensor for each gradient."""
        tensors = [self._as_one([tensors[i] for i in slot]) for slot in self.slots]
        return entries_of(tensors, self._per_unit, self.stacked, _Entries)

    def _as_one(self, tensors):
        if len(tensors) == 1:
            return tensors[0]
        stack = ops.stack(_overflow.Leaf(tensors))
        one_each = self.stacked and len(tensors) == len(self.numbers)
        if one_each and len(stack.shape) > len(self.shape):  # There is what to reduce.
            return stack
        rows, units = self.shape[: self.stacked], self.shape[self.stacked :]
        return ops.reshape(stack, (*rows, -1, *units))


class _Entries(Entries):
    """Entries that PyTorch reduces in one kernel instead of three."""

    if _ON_TORCH:

        def length(self):
            # Keras computes the norms of float64 in float32.
            if not self._is_one() or self.dtype != "float32":
                return super().length()
            (tensor,) = self.tensors
            if len(tensor.shape) - self.stacked > 2:
                return super().length()
            return ops.norm(tensor, axis=self._axes(tensor))

        def deviation(self):
            if not self._is_one():
                return super().deviation()
            (tensor,) = self.tensors
            return ops.std(tensor, axis=self._axes(tensor))

        def _is_one(self):
            return len(self.tensors) == 1 and not self.per_unit
