"""The gradients of one step. Transforms measure and rescale them block by block."""

from typing import Any

import keras
from keras import ops

from keras_normopt._backend import sparse
from keras_normopt._backend.devices import to_device_of
from keras_normopt._backend.tensors import (
    Leaf,
    cast,
    divide,
    dtype_of,
    join,
    l2_norms_at_once,
    mask_divisors,
    pack,
    split,
    unstack,
    widen,
)
from keras_normopt._blocks.stacking import (
    group_blocks,
    shape_with_units_last,
    with_units_last,
)
from keras_normopt.norms import l2
from keras_normopt.norms._norm import Norm
from keras_normopt.norms._reductions import Reductions, reductions_of

_ON_TORCH = keras.backend.backend() == "torch"


class Gradients:
    """The gradients, or updates, of one step.

    Norms are packed: they are a list of tensors. All packed norms of a step have the
    same shapes, so elementwise functions apply to one tensor after another. `join`
    converts the list to a vector, and `from_vector` converts the vector back.
    `by_block` returns the norms of each block.

    Args:
        tensors: List of tensors. On TensorFlow it may hold `tf.IndexedSlices` without
            repeated indices.
        blocks: Dict from the index of each block to a non-empty list of positions in
            `tensors`. Gradients in no block stay unchanged.
        units: List of the `Axes` of each tensor, to compute a norm for each output
            unit. Then each block has one gradient. `None` to compute one norm for each
            block.
        variables: List of the variables that the gradients belong to.
        indices: List of the indices of these variables in the optimizer.
        rate: `None` for gradients. For updates lr · u, a scalar tensor, the learning
            rate lr. Norms are then norms of u. A rate of 0 makes all norms and updates
            0, even if the momentum is not 0.
    """

    def __init__(
        self,
        tensors,
        blocks,
        units=None,
        variables=(),
        indices=(),
        rate=None,
    ):
        self.tensors, self.blocks = list(tensors), blocks
        self.variables, self.indices, self.rate = variables, indices, rate
        self._rate_is_nonzero = None if rate is None else ops.not_equal(rate, 0)
        self._units = units
        for i, axes in enumerate(units or ()):
            # A sparse gradient holds rows of the first axis only.
            if not axes.ends_with_units(len(self.tensors[i].shape)):
                self.tensors[i] = sparse.densify(self.tensors[i])
        self._groups = group_blocks(self.tensors, blocks, units)
        self._clear_cache()

    def _clear_cache(self):
        """Discards norms and reductions, because the gradients have changed."""
        self._norms: dict[Norm, Any] = {}
        self._reductions: list[Reductions] | None = None

    @property
    def positions(self):
        """The positions of all gradients that are in blocks."""
        return [i for positions in self.blocks.values() for i in positions]

    @property
    def numbers(self):
        """The indices of the blocks, in the order of their packed norms."""
        return [number for group in self._groups for number in group.numbers]

    def norms(self, norm):
        """Returns the norms of the gradients, packed.

        Args:
            norm: The `Norm`.
        """
        if norm not in self._norms:
            values = self._measure(norm, self.tensors, self._rate_divisor())
            if self.rate is not None:
                is_nonzero = self._rate_is_nonzero
                values = [
                    ops.where(to_device_of(is_nonzero, v), v, ops.zeros_like(v))
                    for v in values
                ]
            self._norms[norm] = values
        return self._norms[norm]

    def weight_norms(self, norm):
        """Returns the norms of the variables, packed like norms of gradients."""
        weights = [sparse.densify(ops.convert_to_tensor(v)) for v in self.variables]
        return self._measure(norm, weights)

    def l2_norms_at_once(self):
        """Returns a vector of the tensors' l2 norms from a few calls, or `None`.

        See the function `l2_norms_at_once`.
        """
        if self._units or any(map(sparse.is_sparse, self.tensors)):
            return None
        return l2_norms_at_once(widen(self.tensors))

    def total(self):
        """Returns the l2 norm of all gradients together, even those in no block."""
        inside = set(self.positions)
        outside = [g for i, g in enumerate(self.tensors) if i not in inside]
        values = self.norms(l2.norm)
        if outside:
            values = values + norms_of_each(outside, l2.norm)
        return l2(join(values))

    def from_vector(self, vector):
        """Converts a vector from `join` back to packed norms."""
        if _ON_TORCH:
            return [vector]
        units = [g.shape[g.stacked :] for g in self._groups for _ in g.numbers]
        return split(vector, units)

    def _by_group(self, packed):
        """Splits packed norms into one tensor for each group. Only for PyTorch."""
        return split(packed[0], [group.shape for group in self._groups])

    def by_block(self, packed):
        """Unpacks norms or other packed values.

        Returns:
            Dict from the index of each block to a scalar, or to a vector with one value
            for each of its units.
        """
        if _ON_TORCH:
            stacked = [group.stacked for group in self._groups]
            packed = unstack(self._by_group(packed), stacked)
        return dict(zip(self.numbers, packed, strict=True))

    def block_means(self, packed):
        """Returns a vector with the mean of the packed values of each block.

        Blocks are in the order of `numbers`.
        """
        parts = packed
        if _ON_TORCH:
            parts = self._by_group(packed)
            has_units = [group.has_units for group in self._groups]
        else:
            has_units = [len(part.shape) > 0 for part in parts]
        return join(
            [
                ops.mean(part, axis=-1) if units else part
                for part, units in zip(parts, has_units, strict=True)
            ]
        )

    def divide(self, divisors):
        """Divides each block by its divisor.

        Args:
            divisors: Packed divisors, in the form of `norms`.
        """
        if _ON_TORCH:
            self._divide_stacks(mask_divisors(divisors, self._rate_is_nonzero))
            return
        self._clear_cache()
        for number, divisor in self.by_block(divisors).items():
            for i in self.blocks[number]:
                self._divide([i], None, divisor)

    def _divide_stacks(self, divisors):
        stacks = self._reductions or self._reduce(self.tensors)
        self._clear_cache()
        parts = self._by_group(divisors)
        for group, reductions, part in zip(self._groups, stacks, parts, strict=True):
            for positions in reversed(group.stack_positions):
                # `pop` frees each copy before the next one is divided.
                stack = reductions.tensors.pop()
                self._divide(positions, stack, reductions.broadcast(part, stack))

    def _divide(self, positions, stack, divisor):
        """Divides one gradient, or stacked gradients.

        This code is a method, so that its copies are freed before the next call.

        Args:
            positions: List of the positions of the gradients.
            stack: The stack of the gradients. `None` for a single gradient.
            divisor: Tensor. It broadcasts against the stack. For a single gradient, it
                is a scalar or has one value for each unit.
        """
        first = self.tensors[positions[0]]
        if len(positions) == 1:
            divisor = self._broadcast_units(divisor, positions[0])
            self.tensors[positions[0]] = sparse.map_values(
                lambda values: divide(values, divisor, self._rate_is_nonzero), first
            )
            return
        quotients = cast(divide(stack, divisor), dtype_of(first))
        axes = self._units and self._units[positions[0]]
        shape = shape_with_units_last(first, axes)
        if tuple(quotients.shape) != (len(positions), *shape):
            quotients = ops.reshape(quotients, (len(positions), *shape))
        each = ops.unstack(quotients, len(positions))
        for position, tensor in zip(positions, each, strict=True):
            if axes is not None:
                tensor = axes.from_units(tensor, first.shape)
            self.tensors[position] = tensor

    def multiply(self, factors):
        """Multiplies gradients by tensors.

        Args:
            factors: Dict from the positions of gradients to tensors. A tensor is a
                scalar, or a vector with one factor for each unit.
        """
        for i, factor in factors.items():

            def scale(values, factor=factor, i=i):
                factor = to_device_of(self._broadcast_units(factor, i), values)
                wide, factor = widen([values, factor])
                return ops.cast(wide * factor, values.dtype)

            self.tensors[i] = sparse.map_values(scale, self.tensors[i])
        self._clear_cache()

    def replace(self, function, positions, by_row=False, divide_by_rate=True):
        """Replaces gradients by the results of a function.

        Args:
            function: Callable from a stack of shape `(n, *shape)` to a stack of
                replacements. The stack holds n gradients or updates.
            positions: List of n positions. Their gradients have one shape, dtype and
                device.
            by_row: Whether the function treats each row of a gradient separately, and
                maps zeros to zeros. Then sparse gradients stay sparse.
            divide_by_rate: For updates lr · u, whether to call the function with u. The
                results are then multiplied by lr.
        """
        first = self.tensors[positions[0]]
        if by_row and sparse.is_sparse(first):
            results = [
                sparse.map_values(
                    lambda v: self._call_on_stack(function, [v], divide_by_rate)[0],
                    first,
                )
            ]
        else:
            dense = [sparse.densify(self.tensors[i]) for i in positions]
            results = self._call_on_stack(function, dense, divide_by_rate)
        for i, result in zip(positions, results, strict=True):
            self.tensors[i] = result
        self._clear_cache()

    def _call_on_stack(self, function, tensors, divide_by_rate):
        dtype, n = dtype_of(tensors[0]), len(tensors)
        wide = widen(tensors)
        stack = wide[0][None] if n == 1 else ops.stack(Leaf(wide))
        if self.rate is None or not divide_by_rate:
            result = function(stack)
        else:
            divisor, rate = (
                to_device_of(ops.cast(scalar, stack.dtype), stack)
                for scalar in (self._rate_divisor(), self.rate)
            )
            result = function(stack / divisor) * rate
        result = cast(result, dtype)
        return [result[0]] if n == 1 else ops.unstack(result, n)

    def _broadcast_units(self, values, position):
        """Reshapes a vector of one value per unit, to broadcast against a gradient."""
        if self._units is None:
            return values
        shape = tuple(self.tensors[position].shape)
        return self._units[position].broadcast(values, shape)

    def _rate_divisor(self):
        """Returns lr, or 1 if lr is 0, to divide updates by. `None` for gradients."""
        if self.rate is None:
            return None
        return ops.where(self._rate_is_nonzero, self.rate, ops.ones_like(self.rate))

    def _measure(self, norm, tensors, divisor=None):
        if not self._groups:
            return pack([], [])
        if norm.takes_stacks:
            if tensors is not self.tensors:
                return norm.measure(self._reduce(tensors), divisor)
            reductions = self._reductions = self._reductions or self._reduce(tensors)
        else:
            dense = {
                number: [
                    with_units_last(
                        sparse.densify(tensors[i]), self._units and self._units[i]
                    )
                    for i in self.blocks[number]
                ]
                for number in self.numbers
            }
            per_unit = self._units is not None
            reductions = [reductions_of(d, per_unit) for d in dense.values()]
        return norm.measure(reductions, divisor)

    def _reduce(self, tensors):
        return [group.reductions(tensors) for group in self._groups]


def norms_of_each(tensors, norm):
    """Returns a list of the norms of tensors."""
    gradients = Gradients(tensors, {i: [i] for i in range(len(tensors))})
    found = gradients.by_block(gradients.norms(norm))
    return [found[i] for i in range(len(tensors))]


def l2_norms(tensors):
    """Returns a vector of the l2 norms of dense tensors."""
    norms = l2_norms_at_once(widen(tensors))
    if norms is None:
        norms = join(norms_of_each(tensors, l2.norm))
    return norms
