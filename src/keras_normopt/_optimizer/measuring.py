"""Measures how each step changes the weights, for `track_norms="all"`."""

from typing import Any

import keras
from keras import ops

from keras_normopt._backend.tracing import ThreadLocal
from keras_normopt._optimizer.types import MixinBase

_BACKEND = keras.backend.backend()


class _WeightsBeforeStep(ThreadLocal):
    """The weights before a step."""

    weights: Any = ()


def copy_values(variables):
    """Returns copies of the values of variables. Later steps do not change them."""
    if _BACKEND == "jax":  # JAX never changes a tensor in place.
        return [ops.convert_to_tensor(v) for v in variables]
    if _BACKEND == "torch":  # `ops.copy` takes three times as long.
        return [v.value.detach().clone() for v in variables]
    return [ops.copy(v) for v in variables]


class Measuring(MixinBase):
    """Compares the weights before and after a step.

    The difference includes weight decay and rounding.
    """

    _blocks: Any
    _norm_tracker: Any
    _is_step_made: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._before = _WeightsBeforeStep()

    def _measures_updates(self):
        tracker = self._norm_tracker
        return tracker is not None and "updates" in tracker.statistics

    # Keras calls this first in each step, with and without weight decay.
    def _apply_weight_decay(self, variables):
        if self._measures_updates():
            self._before.weights = copy_values(self._measured_variables())
        super()._apply_weight_decay(variables)

    def _measured_variables(self):
        """Returns the variables, except variables that their gradient overwrites."""
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
        self._norm_tracker.add_update_norms(
            before,
            changes,
            self._blocks.positions_by_block(indices),
            self._is_step_made(),
        )
