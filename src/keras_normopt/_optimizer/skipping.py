"""Skips whole steps: the option `skip` of clipping optimizers."""

from typing import Any

import keras
from keras import ops

from keras_normopt._backend.tracing import ThreadLocal, is_compiling
from keras_normopt._optimizer.measuring import copy_values
from keras_normopt._optimizer.types import MixinBase

_BACKEND = keras.backend.backend()


class _PendingDecay(ThreadLocal):
    """The variables that decay only if the step is made."""

    variables: Any = ()


class _Skipped(Exception):  # noqa: N818
    """Ends an eager step on PyTorch before it changes anything."""


class Skipping(MixinBase):
    """Restores all state if the gradient of a step is too large.

    JAX, TensorFlow and compiled PyTorch make a step and then undo it on the device, so
    nothing waits for the decision. Eager PyTorch ends the step early instead, because a
    copy of all state would double its memory.
    """

    _blocks: Any
    _own_variables: Any
    _changed_when_skipped: Any
    _add_own_variable: Any
    _call_once_for_replicas: Any
    _require_methods: Any
    max_skips: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        #: Three variables: whether this step is skipped, how many steps in a row were
        #: skipped, and how many steps in total.
        self._is_skipped: Any = None
        self._skips_in_a_row: Any = None
        self._all_skips: Any = None
        self._pending_decay = _PendingDecay()

    def _add_skip_variables(self):
        """Adds the variables for skipped steps. After that, steps may be skipped."""
        self._require_methods(
            "`skip`", "_apply_weight_decay", "_backend_apply_gradients"
        )
        self._is_skipped, self._skips_in_a_row, self._all_skips = (
            self._add_own_variable(
                name,
                shape=(),
                dtype="int32",
                initializer="zeros",
                changes_when_skipped=True,
            )
            for name in ("is_skipped", "skips_in_a_row", "skipped_steps")
        )

    def _is_step_made(self):
        """Returns a boolean tensor, whether the step is made. `None` means always."""
        if self._is_skipped is None:
            return None
        return ops.equal(ops.convert_to_tensor(self._is_skipped), 0)

    def _decide_skip(self, norm, limit, total):
        """Decides whether to skip the step, and counts skipped steps.

        Args:
            norm: Scalar tensor, the norm of the gradient.
            limit: Scalar tensor, its limit.
            total: Scalar tensor, a norm of all gradients, including excluded ones.

        Returns:
            Scalar boolean tensor, whether to skip.
        """
        row = ops.convert_to_tensor(self._skips_in_a_row)
        may_skip = ops.less(row, self.max_skips)
        # TensorFlow turns the negation of `<=` into `>`, which is false for NaN.
        is_above = norm > ops.cast(limit, norm.dtype)
        is_finite = ops.isfinite(norm) & ops.isfinite(total)
        skips = (is_above & may_skip) | ops.logical_not(is_finite)
        count = ops.cast(skips, "int32")
        self._is_skipped.assign(count)
        # If the count became 0, steps would be skipped again while gradients stay
        # large.
        row_if_made = ops.where(is_above, row, ops.zeros_like(row))
        self._skips_in_a_row.assign(ops.where(skips, row + 1, row_if_made))
        self._all_skips.assign(ops.convert_to_tensor(self._all_skips) + count)
        return skips

    def _end_if_skipped(self):
        """Ends a skipped step on eager PyTorch, after counting it."""
        if self._ends_early() and bool(self._is_skipped.value):
            raise _Skipped

    def _ends_early(self):
        return _BACKEND == "torch" and not is_compiling()

    def _apply_weight_decay(self, variables):
        if self._is_skipped is None:
            super()._apply_weight_decay(variables)
        else:
            self._pending_decay.variables = variables

    def _apply_pending_decay(self):
        if self._is_skipped is not None:
            variables, self._pending_decay.variables = self._pending_decay.variables, ()
            super()._apply_weight_decay(variables)

    def _backend_apply_gradients(self, grads, trainable_variables):
        if self._is_skipped is None:
            super()._backend_apply_gradients(grads, trainable_variables)
            return
        # On JAX a batch that is only accumulated restores this value.
        self._is_skipped.assign(0)
        variables = self._variables_of_step()
        if self._ends_early():
            variables = [v for v in self._own_variables.values() if id(v) in variables]
        else:
            variables = [*variables.values()]
        before = copy_values(variables)
        try:
            super()._backend_apply_gradients(grads, trainable_variables)
        except _Skipped:
            if self.gradient_accumulation_steps:
                self._backend_reset_gradient_accumulators()
        self._restore(variables, before)
        # Keras adds 1 for each accumulated batch.
        batches = self.gradient_accumulation_steps or 1
        count = ops.cast(self._is_skipped, self._iterations.dtype) * batches
        self._iterations.assign(self._iterations - count)

    def _backend_reset_gradient_accumulators(self):
        # On PyTorch Keras multiplies by 0, which keeps NaN.
        if self._is_skipped is None:
            super()._backend_reset_gradient_accumulators()
            return
        for variable in self._accumulated_gradients:
            if variable is not None:
                variable.assign(ops.zeros_like(variable))

    def _variables_of_step(self):
        """Returns the variables that a step changes, by `id`."""
        excluded = [self._iterations, *getattr(self, "_accumulated_gradients", ())]
        left_out = {id(v) for v in excluded} | self._changed_when_skipped
        all_variables = [*self._trainable_variables, *self.variables]
        return {id(v): v for v in all_variables if id(v) not in left_out}

    def _restore(self, variables, before):
        """Assigns the old values to variables if the step is skipped."""
        if _BACKEND != "tensorflow":
            is_made = self._is_step_made()
            for variable, old in zip(variables, before, strict=True):
                new = ops.convert_to_tensor(variable)
                variable.assign(ops.where(is_made, new, old))
            return

        def restore(distribution, variables, before, is_made):
            def assign(variable, old, is_made):
                variable.assign(ops.where(is_made, variable, old))

            for variable, old in zip(variables, before, strict=True):
                distribution.extended.update(
                    variable, assign, args=(old, is_made), group=False
                )

        self._call_once_for_replicas(
            restore, [v.value for v in variables], before, self._is_step_made()
        )
