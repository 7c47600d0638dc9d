"""Captures the update of the base optimizer, to transform it.

Every optimizer of Keras changes a weight once in `update_step`, with its method
`assign_add` or `assign_sub`. The argument of this method is the exact update. The
difference of the weights before and after would lose most digits.
"""

from typing import Any

import keras
from keras import ops

from keras_normopt._backend import sparse
from keras_normopt._backend.tracing import ThreadLocal
from keras_normopt._optimizer.hook import Hook

_BACKEND = keras.backend.backend()

if _BACKEND == "tensorflow":
    import tensorflow as tf
elif _BACKEND == "torch":
    import torch

# These optimizers recompute weights from slots, or slots from weights.
_COUPLE_WEIGHTS_AND_SLOTS = ("Ftrl", "ScheduleFreeAdamW")


class _Captured(ThreadLocal):
    """The updates of this step so far."""

    def __init__(self):
        #: The weight that is being updated.
        self.variable: Any = None
        #: The update of each weight, by the weight's index.
        self.updates: dict[int, Any] = {}


class _Shared:
    """For each weight, a tuple with the update of each local replica."""

    updates: Any = ()


class _ZeroWeight:
    """Replaces a weight by zeros. The base adds the update to the zeros.

    This is for PyTorch, where Keras's optimizers change all weights in one call.
    """

    def __init__(self, variable):
        self.variable = variable
        self.value = ops.zeros_like(variable.value)


class UpdateCapture(Hook):
    """Transforms updates instead of gradients if `_captures_updates` returns `True`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._captured, self._shared = _Captured(), _Shared()

    def _check_base_can_be_captured(self):
        name = type(self).__name__
        advice = 'Use another base optimizer, or apply_to="gradient".'
        for excluded in _COUPLE_WEIGHTS_AND_SLOTS:
            if isinstance(self, getattr(keras.optimizers, excluded, ())):
                raise ValueError(
                    f"{excluded} computes weights from slots, or slots from weights, "
                    f"so other updates would break it. {name} received: "
                    f'apply_to="update". {advice}'
                )
        if not self._is_keras_method("_backend_update_step"):
            owner = self._base_that_defines("_backend_update_step")
            raise ValueError(
                f"{owner.__name__} updates all variables together in its "
                "`_backend_update_step`, so keras_normopt cannot change the updates. "
                f'{name} received: apply_to="update". {advice}'
            )

    def _captures_updates(self):
        """Returns whether updates are transformed."""
        raise NotImplementedError

    def _transform_updates(self, updates, variables, learning_rate):
        """Returns the updates that replace the captured updates."""
        raise NotImplementedError

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self._captured.updates, self._shared.updates = {}, ()
        super()._backend_update_step(grads, trainable_variables, learning_rate)
        if self._captures_updates():
            variables = trainable_variables
            updates = self._pop_updates(variables)
            if len(updates) < len(variables):
                raise RuntimeError(
                    f"{type(self).__name__} could not {self.VERB} its updates: Keras "
                    f"{keras.version()} did not call `update_step`, where "
                    "keras_normopt receives them. Training stops, after one step of "
                    "the base optimizer. Install a version of Keras that this version "
                    "of keras_normopt supports, or a newer keras_normopt."
                )
            updates = self._transform_updates(updates, variables, learning_rate)
            self._add_updates(variables, updates)

    def update_step(self, gradient, variable, learning_rate):
        if not self._captures_updates():
            super().update_step(gradient, variable, learning_rate)
            return
        self._captured.variable = variable
        try:
            super().update_step(gradient, variable, learning_rate)
        finally:
            self._captured.variable = None
        if self._get_variable_index(variable) not in self._captured.updates:
            raise RuntimeError(
                f"The base of {type(self).__name__} did not change a weight by "
                "`self.assign_add` or `self.assign_sub` in its `update_step`, so "
                'apply_to="update" has no update to rescale. Call one of them, or use '
                'apply_to="gradient".'
            )

    def _capture(self, variable, update):
        number = self._get_variable_index(variable)
        if number in self._captured.updates:
            raise RuntimeError(
                f"The base of {type(self).__name__} updates a weight twice in one "
                '`update_step`, but apply_to="update" can rescale only one update. Add '
                'the two updates before you assign them, or use apply_to="gradient".'
            )
        self._captured.updates[number] = update

    def assign(self, variable, value):
        if variable is self._captured.variable:
            raise RuntimeError(
                f"The base of {type(self).__name__} calls `assign` for a weight, so "
                "rounding hides most digits of the update. Call `assign_add` or "
                '`assign_sub` instead, or use apply_to="gradient".'
            )
        super().assign(variable, value)

    def assign_add(self, variable, value):
        if variable is self._captured.variable:
            self._capture(variable, value)
        else:
            super().assign_add(variable, value)

    def assign_sub(self, variable, value):
        if variable is self._captured.variable:
            self._capture(variable, sparse.map_values(ops.negative, value))
        else:
            super().assign_sub(variable, value)

    if _BACKEND == "tensorflow":
        # For each weight, one thread updates the copies of all replicas.

        def _distributed_tf_update_step(self, distribution, grads_and_vars, rate):
            if not self._captures_updates():
                super()._distributed_tf_update_step(distribution, grads_and_vars, rate)
                return

            def capture(variable, gradient, rate):
                self.update_step(gradient, variable, rate)
                update = self._captured.updates.pop(self._get_variable_index(variable))
                is_alone = distribution.num_replicas_in_sync == 1
                return update if is_alone else sparse.densify(update)

            self._shared.updates = [
                distribution.extended.update(v, capture, args=(g, rate), group=False)
                for g, v in grads_and_vars
            ]

        def _pop_updates(self, variables):
            """Returns the updates of this replica."""
            context = tf.distribute.get_replica_context()
            number = int(tf.get_static_value(context.replica_id_in_sync_group))
            return [
                replica_updates[number % len(replica_updates)]
                for replica_updates in self._shared.updates
            ]

        def _add_updates(self, variables, updates):
            def add(distribution, variables, updates):
                for variable, update in zip(variables, updates, strict=True):
                    distribution.extended.update(
                        variable, self.assign_add, args=(update,), group=False
                    )

            values = [
                v.value if isinstance(v, keras.Variable) else v for v in variables
            ]
            self._call_once_for_replicas(add, values, updates)

        def _call_once_for_replicas(self, function, *args):
            """Calls a function once for all replicas."""
            return tf.__internal__.distribute.interim.maybe_merge_call(
                function, self._distribution_strategy, *args
            )

    else:

        def _get_variable_index(self, variable):
            if isinstance(variable, _ZeroWeight):
                variable = variable.variable
            return super()._get_variable_index(variable)

        def _is_foreach(self):
            """Returns whether Keras's own method updates all weights at once."""
            owner = self._base_that_defines("_parallel_update_step")
            return owner is not None and self._is_keras_method("_parallel_update_step")

        def _parallel_update_step(self, grads, variables, learning_rate):
            if not (self._captures_updates() and self._is_foreach()):
                super()._parallel_update_step(grads, variables, learning_rate)
                return
            zeros = [_ZeroWeight(variable) for variable in variables]
            super()._parallel_update_step(grads, zeros, learning_rate)
            for zero in zeros:
                self._captured.updates[self._get_variable_index(zero)] = zero.value

        def _pop_updates(self, variables):
            numbers = [self._get_variable_index(variable) for variable in variables]
            captured, self._captured.updates = self._captured.updates, {}
            return [captured[number] for number in numbers if number in captured]

        def _add_updates(self, variables, updates):
            if self._is_foreach():
                with torch.no_grad():
                    torch._foreach_add_([v.value for v in variables], updates)
                return
            for variable, update in zip(variables, updates, strict=True):
                self.assign_add(variable, update)
