"""Measures the updates that are really made, for `track_norms="all"`."""

from typing import Any

import keras
from keras import ops

from keras_normopt._backend.tracing import Local
from keras_normopt._blocks.gradients import Gradients
from keras_normopt._optimizer.types import MixinBase

_ON_JAX = keras.backend.backend() == "jax"


class _Before(Local):
    """The weights before a step, by the numbers of the variables."""

    weights: Any = ()


def copies(variables):
    """Returns the values of variables, which later steps do not change."""
    if _ON_JAX:  # It puts a new tensor in the place of the old one.
        return [ops.convert_to_tensor(v) for v in variables]
    return [ops.stop_gradient(ops.copy(v)) for v in variables]


class Measuring(MixinBase):
    """Compares the weights before and after a step.

    The difference includes weight decay, and what rounding leaves of an update.
    """

    _blocks: Any
    _norm_tracker: Any
    _is_made: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._before = _Before()

    def _measures_updates(self):
        tracker = self._norm_tracker
        return tracker is not None and "updates" in tracker.statistics

    # Keras calls this first in each step, with and without weight decay.
    def _apply_weight_decay(self, variables):
        if self._measures_updates():
            self._before.weights = copies(self._measured_variables())
        super()._apply_weight_decay(variables)

    def _measured_variables(self):
        """Returns the variables that gradients update, whether they have one or not."""
        return [
            variable
            for variable in self._trainable_variables
            if not getattr(variable, "overwrite_with_gradient", False)
        ]

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        super()._backend_update_step(grads, trainable_variables, learning_rate)
        if not self._measures_updates():
            return
        before, self._before.weights = self._before.weights, ()
        variables = self._measured_variables()
        after = [ops.convert_to_tensor(v) for v in variables]
        changes = [new - old for new, old in zip(after, before, strict=True)]
        indices = [self._get_variable_index(v) for v in variables]
        blocks = self._blocks.of_step(indices)
        weights, updates = (Gradients(t, blocks) for t in (before, changes))
        self._norm_tracker.update_made(weights, updates, self._is_made())
