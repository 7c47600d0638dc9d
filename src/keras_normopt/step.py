"""The gradients of one step, measured and rescaled block by block."""

import functools

from keras import ops

from keras_normopt import _range, custom, norms, sparse
from keras_normopt.entries import entries_of, widened


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
        measure: Scalar tensor above 0 that gradients are measured in, if not in 1: the
            learning rate, where they stand for the steps that are to be made.
    """

    def __init__(self, gradients, weights, blocks, per_unit=False, measure=None):
        self.gradients, self.weights = list(gradients), weights
        self.blocks, self.per_unit, self.measure = blocks, per_unit, measure
        self._known = {}

    def norms(self, norm):
        """The norms of the blocks' gradients."""
        key = id(norm)  # A function of a user's own need not be hashable.
        if key not in self._known:
            self._known[key] = self._measured(self.gradients, norm, self.measure)
        return self._known[key]

    def total(self):
        """The l2 norm of all gradients together, in blocks or not."""
        inside = {i for block in self.blocks for i in block}
        outside = [g for i, g in enumerate(self.gradients) if i not in inside]
        values = self.norms(norms.l2) if self.blocks else []
        if outside:
            values = values + self.sizes(outside, norms.l2)
        return norms.l2(_range.join(values))

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
        for block, divisor in zip(self.blocks, divisors, strict=True):
            for i in block:
                divide = functools.partial(_range.quotient, divisor=divisor)
                self.gradients[i] = sparse.map_values(divide, self.gradients[i])
        self._known.clear()

    def replace(self, function):
        """Puts what a function returns for each gradient in its place."""
        for i in (i for block in self.blocks for i in block):
            gradient = self.gradients[i]
            (tensor,) = entries_of([gradient]).tensors
            if self.measure is None:
                result = function(tensor)
            else:
                measure = ops.cast(self.measure, tensor.dtype)
                result = function(tensor / measure) * measure
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
                wide, factor = widened([values, factor])
                return ops.cast(wide * factor, values.dtype)

            self.gradients[i] = sparse.map_values(scaled, self.gradients[i])
        self._known.clear()

    def sizes(self, tensors, norm):
        """The norm of each of some tensors by itself."""
        alone = [[i] for i in range(len(tensors))]
        other = type(self)(tensors, None, alone)
        return other.by_block(other.norms(norm))

    def _measured(self, tensors, norm, measure=None):
        if _range.is_built_in(norm):
            values = _range.norms_of(norm, self._entries(tensors), self._arranged)
            if measure is None:
                return values
            return [v / ops.cast(measure, v.dtype) for v in values]  # All homogeneous.
        blocks = Step._entries(self, tensors)
        if measure is not None:
            blocks = [entries.over(measure) for entries in blocks]
        return self.arranged([custom.norm_of(norm, b) for b in blocks])

    def _entries(self, tensors):
        return [
            entries_of([tensors[i] for i in block], self.per_unit)
            for block in self.blocks
        ]

    def _arranged(self, values):
        """Arranges the norms of what `_entries` returns."""
        return values
