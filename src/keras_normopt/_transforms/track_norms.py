"""Tracks the norms of gradients, which normalization removes."""

from typing import Any

import numpy as np
from keras import ops

from keras_normopt._backend.devices import constant_near, near
from keras_normopt._backend.tensors import cast
from keras_normopt._blocks.partition import unique

#: The name of the l2 norm of the whole gradient, beside those of the blocks.
TOTAL = "total"


class NormTracker:
    """The norm of each block: that of the last step, and mean and maximum over steps.

    They are kept in variables of the optimizer, so that they are right in compiled
    steps, in several steps per execution, and after loading.

    Args:
        blocks: List of the names of the blocks.
        add_variable: Callable like `add_variable` of an optimizer.
        clips: Whether to keep how often each block was clipped, too.
    """

    def __init__(self, blocks, add_variable, clips=False):
        self.blocks = blocks
        self.names = unique([*blocks, TOTAL])
        shape = (len(self.names),)
        self._last = add_variable("gradient_norm_last", shape=shape, dtype="float32")
        self._mean = add_variable("gradient_norm_mean", shape=shape, dtype="float32")
        self._max = add_variable("gradient_norm_max", shape=shape, dtype="float32")
        self._count = add_variable("gradient_norm_count", shape=(), dtype="float32")
        self._clipped: Any = None
        if clips:
            self._clipped = add_variable(
                "clipped_share", shape=(len(blocks),), dtype="float32"
            )

    def update(self, gradients, norm):
        """Takes in the norms of one step.

        Args:
            gradients: The `Gradients`.
            norm: The `Norm` that is tracked. Of the units of a block it is the mean.
        """
        norms = self._means(gradients, gradients.norms(norm))
        total = near(cast(gradients.total(), "float32"), norms)
        norms = ops.append(norms, total)
        count = ops.add(self._count, 1.0)
        change = ops.divide(ops.subtract(norms, self._mean), count)
        self._last.assign(norms)
        self._mean.assign(ops.add(self._mean, change))
        self._max.assign(ops.maximum(self._max, norms))
        self._count.assign(count)

    def update_clipped(self, gradients, above):
        """Takes in which norms of a step were clipped, after `update`.

        Args:
            gradients: The `Gradients`.
            above: Packed booleans. Of the units of a block it is the share.
        """
        change = self._means(gradients, above) - self._clipped
        self._clipped.assign(self._clipped + change / self._count)

    def _means(self, gradients, packed):
        """Returns the mean of packed values over each block, 0 if it has none."""
        values = [cast(value, "float32") for value in packed]
        means = near(gradients.block_means(values), ops.convert_to_tensor(self._last))
        place = {number: i for i, number in enumerate(gradients.numbers)}
        absent = len(place)
        indices = [place.get(number, absent) for number in range(len(self.blocks))]
        padded = ops.append(means, near(ops.zeros((1,)), means))
        return ops.take(padded, constant_near(indices, "int32", means))

    @property
    def last(self):
        """The norms of the last step, `{block: float}`."""
        return self._read(self._last)

    @property
    def mean(self):
        """The mean norms over the steps since the last reset, `{block: float}`."""
        return self._read(self._mean)

    @property
    def max(self):
        """The largest norms over the steps since the last reset, `{block: float}`."""
        return self._read(self._max)

    @property
    def clipped(self):
        """The share of the steps since the last reset that clipped, `{block: float}`.

        Empty where nothing clips.
        """
        if self._clipped is None:
            return {}
        shares = ops.convert_to_numpy(self._clipped).tolist()
        return dict(zip(self.blocks, shares, strict=True))

    @property
    def count(self):
        """The number of steps since the last reset."""
        return int(ops.convert_to_numpy(self._count))

    def reset(self):
        """Starts mean and maximum afresh."""
        for variable in (self._mean, self._max, self._count, self._clipped):
            if variable is not None:
                variable.assign(np.zeros(variable.shape, "float32"))

    def _read(self, variable):
        values = ops.convert_to_numpy(variable)
        return dict(zip(self.names, values.tolist(), strict=True))
