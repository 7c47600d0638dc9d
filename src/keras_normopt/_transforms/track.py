"""Keeps the norms that normalization takes out of sight."""

import keras
import numpy as np
from keras import ops

from keras_normopt._backend.devices import near
from keras_normopt._blocks.partition import unique
from keras_normopt.norms._overflow import Leaf
from keras_normopt.norms._reductions import cast

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
        self._clipped = None
        if clips:
            self._clipped = add_variable(
                "clipped_share", shape=(len(blocks),), dtype="float32"
            )

    def update(self, numbers, values, total):
        """Takes in the norms of one step.

        Args:
            numbers: List of the numbers of the blocks that have a gradient.
            values: List of their norms. Where the units of a block have a norm each,
                their mean is taken.
            total: The norm of the whole gradient.
        """
        norms = self._vector(numbers, values, [cast(total, "float32")])
        count = ops.add(self._count, 1.0)
        change = ops.divide(ops.subtract(norms, self._mean), count)
        self._last.assign(norms)
        self._mean.assign(ops.add(self._mean, change))
        self._max.assign(ops.maximum(self._max, norms))
        self._count.assign(count)

    def update_clipped(self, numbers, values):
        """Takes in whether blocks were clipped in a step, after `update`.

        Args:
            numbers: As for `update`.
            values: List of boolean tensors. Of the units of a block it is the share.
        """
        change = self._vector(numbers, values) - self._clipped
        self._clipped.assign(self._clipped + change / self._count)

    def _vector(self, numbers, values, more=()):
        vector = [ops.zeros((), "float32")] * len(self.blocks)
        for number, value in zip(numbers, values, strict=True):
            value = cast(value, "float32")
            vector[number] = ops.mean(value) if len(value.shape) else value
        last = ops.convert_to_tensor(self._last)
        return ops.stack(Leaf([near(value, last) for value in [*vector, *more]]))

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


def tracking_optimizers(optimizer):
    """Finds the optimizers that keep norms, in what may be wrapped around them."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return tracking_optimizers(optimizer.inner_optimizer)
    if hasattr(optimizer, "optimizers"):  # A MultiOptimizer.
        return [o for inner in optimizer.optimizers for o in tracking_optimizers(inner)]
    return [optimizer] if getattr(optimizer, "track_norms", False) else []


def optimizers_of(model):
    """Finds the optimizers that a training step of the model may call."""
    return list(named_optimizers(model).values())


def named_optimizers(model):
    """Finds the optimizers that a model holds, by the name of the attribute.

    Those of a list or dictionary have their index or key behind the name.
    """
    held = {"optimizer": getattr(model, "optimizer", None)} | vars(model)
    found = {}
    for attribute, value in held.items():
        if attribute.startswith("_self_"):  # What TensorFlow notes of the others.
            continue
        # Not by `keras.tree`, which sorts dictionaries.
        items = value.items() if isinstance(value, dict) else ()
        items = enumerate(value) if isinstance(value, list | tuple) else items
        inner = [(f"{attribute}_{key}", item) for key, item in items]
        for name, item in [(attribute, value), *inner]:
            if isinstance(item, keras.optimizers.Optimizer):
                # Under its own name, if `model.optimizer` is one of the others.
                found[id(item)] = name, item
    return dict(found.values())


def named_trackers(model):
    """Finds what keeps the norms of a model's gradients.

    Returns:
        A list of pairs: a `NormTracker`, and a dictionary from the names of its blocks
        to what the logs call them. If several attributes of the model hold optimizers
        that keep norms, the name of the attribute comes first.
    """
    held, seen = {}, []
    for attribute, optimizer in named_optimizers(model).items():
        # One may be held as it is, and in a `LossScaleOptimizer` as well.
        found = [o for o in tracking_optimizers(optimizer) if id(o) not in seen]
        seen += map(id, found)
        if found:
            held[attribute] = found
    trackers, taken = [], []
    for attribute, found in held.items():
        prefix = f"{attribute}/" if len(held) > 1 else ""
        for tracker in (o.norm_tracker for o in found if o.norm_tracker):
            # The optimizers of a `MultiOptimizer` may each have a block `global`.
            names = unique([prefix + name for name in tracker.names], taken)
            taken += names
            trackers.append((tracker, dict(zip(tracker.names, names, strict=True))))
    return trackers
