"""Multiplies the learning rate of each variable: the option `step_size`."""

import functools
from typing import Any

import keras
from keras import ops

from keras_normopt._backend import sparse
from keras_normopt._backend.devices import to_device_of
from keras_normopt._backend.tracing import ThreadLocal
from keras_normopt._optimizer.arguments import read_only
from keras_normopt._optimizer.types import MixinBase
from keras_normopt._transforms import step_size_argument, step_sizes

_BACKEND = keras.backend.backend()


# On TensorFlow it is not local to a thread, because weights decay outside a replica's
# thread.
class _Decay(object if _BACKEND == "tensorflow" else ThreadLocal):  # type: ignore[misc]
    """The `Multiplier` of the weights that decay now, or `None`."""

    multiplier: Any = None


class Rates(MixinBase):
    """Multiplies the learning rate by the factors of patterns and of an object.

    Factors of patterns act on every variable and its weight decay. Factors of an object
    act on the variables in blocks.
    """

    step_size = read_only("step_size", "An object, a dictionary, a list, or `None`.")
    _blocks: Any
    _paths: Any
    _add_own_variable: Any
    _require_methods: Any
    apply_to: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        #: The `Multiplier` of each variable that a pattern matches, by the variable's
        #: index.
        self._multipliers: dict[int, Any] = {}
        #: The results of `add_factor_variables` for the variables in blocks, by index.
        self._factors: dict[int, Any] = {}
        self._decay = _Decay()

    def _check_base_takes_factors(self):
        # Ftrl recomputes its weights from sums over all learning rates so far.
        sets_step_size = isinstance(self, keras.optimizers.Lamb | keras.optimizers.Ftrl)
        sets_step_size = sets_step_size or bool(getattr(self, "relative_step", False))
        received = f"Received: step_size={self.step_size}."
        if (
            sets_step_size
            and self._factor_object is not None
            and self.apply_to == "gradient"
        ):
            raise ValueError(
                f"{type(self).__name__} sets the size of its steps itself, so there is "
                f"no learning rate to multiply. {received} Leave `step_size` out, or "
                "use another base (or Adafactor with `relative_step=False`)."
            )
        patterns = step_size_argument.patterns_of(self.step_size)
        if isinstance(self, keras.optimizers.Ftrl) and not all(
            isinstance(factor, float) and factor > 0
            for patterns_of_one in patterns
            for factor in patterns_of_one.values()
        ):
            raise ValueError(
                f"{type(self).__name__} divides by the learning rate, so factors must "
                f"be floats above 0, not schedules. {received} To freeze layers, "
                "set `trainable = False` on them."
            )
        if self.apply_to == "gradient" and not self._is_keras_method(
            "_backend_update_step"
        ):
            owner = self._base_that_defines("_backend_update_step")
            raise ValueError(
                f"{owner.__name__} updates all variables together in its "
                f"`_backend_update_step`, with one learning rate. {received} Leave "
                "`step_size` out, or move the update to `update_step`."
            )

    @property
    def _factor_object(self):
        return step_size_argument.object_of(self.step_size)

    def _multiplies_updates(self):
        """Returns whether factors multiply updates instead of learning rates."""
        # Adafactor's relative steps are not proportional to the learning rate.
        is_relative = getattr(self, "relative_step", False)
        return self.apply_to == "update" or bool(is_relative)

    def _make_step_sizes(self, variables):
        """Makes the transforms of `step_size`, and adds their variables.

        Returns:
            A pair of lists: functions for raw gradients, and functions for rescaled
            updates.
        """
        on_gradients: list[Any] = []
        on_updates: list[Any] = []
        self._multipliers = step_size_argument.multipliers(self.step_size, self._paths)
        if self._multipliers:
            names = "_apply_weight_decay", "_get_current_learning_rate"
            self._require_methods("`step_size`", *names)
        if self._multipliers and self._multiplies_updates():
            on_updates.append(self._multiply_updates)
        step_size = self._factor_object
        if step_size is not None:
            self._add_factors(step_size, variables)
            on_gradients.append(
                functools.partial(
                    step_sizes.set_factors, step_size=step_size, state=self._factors
                )
            )
            if self._multiplies_updates():
                on_updates.append(
                    functools.partial(step_sizes.multiply, state=self._factors)
                )
        return on_gradients, on_updates

    def _add_factors(self, step_size, variables):
        # Factors are variables, because TensorFlow passes nothing else from the hook to
        # the updates of the replicas.
        for i, variable in enumerate(variables):
            if self._blocks.block_of[i] is not None:
                self._factors[i] = step_size.add_factor_variables(
                    self._add_own_variable,
                    i,
                    variable,
                    self._blocks.norm_shape(i, variable),
                )

    def _multiply_updates(self, updates):
        step_sizes.multiply_by_patterns(updates, self._multipliers, self.iterations)

    def _multiplies_rates(self):
        is_used = self._factors or self._multipliers
        return bool(is_used) and not self._multiplies_updates()

    def _multiply_rate(self, learning_rate, multiplier):
        if multiplier is None:
            return learning_rate
        factor = multiplier.at(self.iterations)
        return ops.convert_to_tensor(learning_rate) * factor

    def _group_by_multiplier(self, variables):
        """Returns pairs of a `Multiplier`, or `None`, and its variables' positions."""
        groups: dict[Any, tuple[Any, list[int]]] = {}
        for position, variable in enumerate(variables):
            multiplier = self._multipliers.get(self._get_variable_index(variable))
            key = multiplier and multiplier.key
            _, positions = groups.setdefault(key, (multiplier, []))
            positions.append(position)
        return list(groups.values())

    def update_step(self, gradient, variable, learning_rate):
        if self._multiplies_rates():
            index = self._get_variable_index(variable)
            learning_rate = self._multiply_rate(
                learning_rate, self._multipliers.get(index)
            )
            state = self._factors.get(index)
            if state:
                factor = ops.cast(ops.convert_to_tensor(state[0]), variable.dtype)
                if self._blocks.units is not None:
                    factor = self._blocks.units[index].broadcast(factor, variable.shape)
                factor = to_device_of(factor, ops.convert_to_tensor(variable))
                learning_rate = ops.cast(learning_rate, variable.dtype) * factor
                if factor.shape:  # Keras would also gather rows of the factor.
                    gradient = sparse.densify(gradient)
        super().update_step(gradient, variable, learning_rate)

    def _apply_weight_decay(self, variables):
        if not self._multipliers:
            super()._apply_weight_decay(variables)
            return
        # `_use_weight_decay` adds an attribute, and PyTorch would compile once more. So
        # this calls it only if weights decay. On PyTorch, an empty list would fail.
        if self.weight_decay is not None:
            variables = [v for v in variables if self._use_weight_decay(v)]
        for multiplier, positions in self._group_by_multiplier(variables):
            self._decay.multiplier = multiplier
            try:
                super()._apply_weight_decay([variables[i] for i in positions])
            finally:
                self._decay.multiplier = None

    def _get_current_learning_rate(self):
        rate = super()._get_current_learning_rate()
        return self._multiply_rate(rate, self._decay.multiplier)

    if _BACKEND == "torch":

        def _parallel_update_step(self, grads, variables, learning_rate):
            # Keras's optimizers for PyTorch update all weights with one learning rate.
            if not self._multiplies_rates():
                super()._parallel_update_step(grads, variables, learning_rate)
                return
            # Nadam would multiply its product of momenta once for each group.
            if self._factors or isinstance(self, keras.optimizers.Nadam):
                # The class after `foreach` updates one weight after another.
                foreach = self._base_that_defines("_backend_update_step")
                super(foreach, self)._backend_update_step(
                    grads, variables, learning_rate
                )
                return
            for multiplier, positions in self._group_by_multiplier(variables):
                super()._parallel_update_step(
                    [grads[i] for i in positions],
                    [variables[i] for i in positions],
                    self._multiply_rate(learning_rate, multiplier),
                )
