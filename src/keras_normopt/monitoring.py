"""Keeps the norms that normalization takes out of sight."""

import keras
import numpy as np
from keras import ops


class NormTracker:
    """The norm of each block: that of the last step, and mean and maximum over steps.

    They are kept in variables of the optimizer, so that they are right in compiled
    steps, in several steps per execution, and after loading.
    """

    def __init__(self, names, add_variable):
        self.names = names
        shape = (len(names),)
        self._last = add_variable("gradient_norm_last", shape=shape, dtype="float32")
        self._mean = add_variable("gradient_norm_mean", shape=shape, dtype="float32")
        self._max = add_variable("gradient_norm_max", shape=shape, dtype="float32")
        self._count = add_variable("gradient_norm_count", shape=(), dtype="float32")

    def update(self, numbers, values):
        """Takes in the norms of one step.

        Args:
            numbers: List of the numbers of the blocks that have a gradient.
            values: List of their norms. Where the units of a block have a norm each,
                their mean is taken.
        """
        zero = ops.zeros((), "float32")
        norms = [zero] * len(self.names)
        for number, value in zip(numbers, values, strict=True):
            norms[number] = ops.cast(ops.mean(value), "float32")
        norms = ops.stack(norms)
        count = ops.add(self._count, 1.0)
        change = ops.divide(ops.subtract(norms, self._mean), count)
        self._last.assign(norms)
        self._mean.assign(ops.add(self._mean, change))
        self._max.assign(ops.maximum(self._max, norms))
        self._count.assign(count)

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
    def count(self):
        """The number of steps since the last reset."""
        return int(ops.convert_to_numpy(self._count))

    def reset(self):
        """Starts mean and maximum afresh."""
        for variable in (self._mean, self._max, self._count):
            variable.assign(np.zeros(variable.shape, "float32"))

    def _read(self, variable):
        values = ops.convert_to_numpy(variable)
        return dict(zip(self.names, values.tolist(), strict=True))


def tracking_optimizers(optimizer):
    """Finds the optimizers that keep norms, in what may be wrapped around them."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return tracking_optimizers(optimizer.inner_optimizer)
    if hasattr(optimizer, "optimizers"):  # A MultiOptimizer.
        return [o for inner in optimizer.optimizers for o in tracking_optimizers(inner)]
    return [optimizer] if getattr(optimizer, "track_norms", False) else []
