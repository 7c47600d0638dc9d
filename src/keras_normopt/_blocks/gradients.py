"""The gradients of one step, measured and rescaled block by block."""

import functools

from keras import ops

from keras_normopt import norms
from keras_normopt._backend import sparse
from keras_normopt._backend.devices import near
from keras_normopt.norms import _overflow, _user_norms
from keras_normopt.norms._reductions import entries_of, widened


class Step:
    """What is done to the gradients before the base makes its step with them.

    A block has one norm, or one for each unit if it is taken unit by unit. Norms come
    as a list of tensors, as many as suits the backend, in an arrangement that is the
    same for all norms of one step: work on each tensor of the list elementwise, and
    hand the list back.

    Args:
        gradients: List of tensors, or on TensorFlow of `tf.IndexedSlices` in which no
            index repeats.
        weights: List of the variables that they are gradients of.
        blocks: List of blocks, each a non-empty list of positions in
            `gradients`. A gradient in none of them stays as it is.
        per_unit: Whether a gradient of more than one axis has a norm for each unit,
            the last axis. Then a block has one gradient.
        rate: Scalar tensor, the learning rate, if the tensors are updates lr · u and
            not gradients. Norms are then those of u. A rate of 0 makes every update 0,
            even if momentum holds steps of earlier rates, and every norm 0.
    """

    def __init__(self, gradients, weights, blocks, per_unit=False, rate=None):
        self.gradients, self.weights = list(gradients), weights
        self.blocks, self.per_unit, self.rate = blocks, per_unit, rate
        self._moves = None if rate is None else ops.not_equal(rate, 0)
        self._known = {}

    def norms(self, norm):
        """The norms of the blocks' gradients."""
        key = id(norm)  # A function of a user's own need not be hashable.
        if key not in self._known:
            self._known[key] = self._measured(self.gradients, norm, self._unit())
        return self._known[key]

    def total(self):
        """The l2 norm of all gradients together, in blocks or not."""
        inside = {i for block in self.blocks for i in block}
        outside = [g for i, g in enumerate(self.gradients) if i not in inside]
        values = self.norms(norms.l2) if self.blocks else []
        if outside:
            values = values + self.sizes(outside, norms.l2)
        return norms.l2(_overflow.join(values))

    def weight_norms(self, norm):
        """The norms of the blocks' weights, arranged as those of the gradients."""
        return self._measured([ops.convert_to_tensor(w) for w in self.weights], norm)

    def by_block(self, norms):
        """Arranges norms as one tensor for each block."""
        return norms

    def arranged(self, values):
        """Arranges one tensor for each block as norms are."""
        return values

    def divide(self, divisors):
        """Divides the gradients of each block by its divisor.

        Args:
            divisors: A list arranged as norms are.
        """
        divisors = _overflow.stopped(divisors, self._moves)
        for block, divisor in zip(self.blocks, divisors, strict=True):
            for i in block:
                divide = functools.partial(
                    _overflow.quotient, divisor=divisor, moves=self._moves
                )
                self.gradients[i] = sparse.map_values(divide, self.gradients[i])
        self._known.clear()

    def replace(self, function):
        """Puts what a function returns for each gradient in its place."""
        for i in (i for block in self.blocks for i in block):
            gradient = self.gradients[i]
            (tensor,) = widened([sparse.densify(gradient)])
            if self.rate is None:
                result = function(tensor)
            else:
                unit, rate = (
                    near(ops.cast(scalar, tensor.dtype), tensor)
                    for scalar in (self._unit(), self.rate)
                )
                result = function(tensor / unit) * rate
            self.gradients[i] = ops.cast(result, gradient.dtype)
        self._known.clear()

    def multiply(self, factors):
        """Multiplies gradients by tensors.

        Args:
            factors: Dict from the positions of gradients to factors, each a scalar or
                one for each unit.
        """
        for i, factor in factors.items():

            def scaled(values, factor=factor):
                wide, factor = widened([values, near(factor, values)])
                return ops.cast(wide * factor, values.dtype)

            self.gradients[i] = sparse.map_values(scaled, self.gradients[i])
        self._known.clear()

    def sizes(self, tensors, norm):
        """The norm of each of some tensors by itself."""
        alone = [[i] for i in range(len(tensors))]
        other = type(self)(tensors, None, alone)
        return other.by_block(other.norms(norm))

    def _unit(self):
        """What updates are divided by to be u, or `None` for gradients."""
        if self.rate is None:
            return None
        return ops.where(self._moves, self.rate, ops.ones_like(self.rate))

    def _measured(self, tensors, norm, unit=None):
        if _overflow.is_built_in(norm):
            values = _overflow.norms_of(norm, self._entries(tensors), self._arranged)
            if unit is not None:
                # A negative rate turns u around, and the norm of -u is that of u.
                values = [v / near(ops.cast(ops.abs(unit), v.dtype), v) for v in values]
        else:
            blocks = Step._entries(self, [sparse.densify(t) for t in tensors])
            if unit is not None:
                blocks = [entries.over(unit) for entries in blocks]
            values = self.arranged([_user_norms.norm_of(norm, b) for b in blocks])
        if unit is None:
            return values
        return [ops.where(near(self._moves, v), v, ops.zeros_like(v)) for v in values]

    def _entries(self, tensors):
        return [
            entries_of([tensors[i] for i in block], self.per_unit)
            for block in self.blocks
        ]

    def _arranged(self, values):
        """Arranges the norms of what `_entries` returns."""
        return values
