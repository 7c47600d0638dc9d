"""What a normalized optimizer adds to its base."""

import warnings

import keras
from keras import ops

from keras_normopt._backend.devices import near
from keras_normopt._optimizer import options
from keras_normopt._optimizer.base import Rescaling
from keras_normopt._transforms import rescale, step_sizes
from keras_normopt.norms._overflow import is_built_in
from keras_normopt.norms._user_norms import ReturnsGradient


class Normalization(Rescaling):
    """What a normalized optimizer adds to its base. Not for use by itself."""

    norm_epsilon = options.NORM_EPSILON
    step_size = options.STEP_SIZE

    PREFIX = "Normalized"
    VERB = "normalize"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._kept = {}
        if self.step_size is not None and self.apply_to == "gradient":
            self._check_base_takes_factors()

    def _check_base_takes_factors(self):
        # Ftrl finds its weights anew each time, from sums over all rates so far.
        scales = isinstance(self, keras.optimizers.Lamb | keras.optimizers.Ftrl)
        if isinstance(self, keras.optimizers.Adafactor):
            scales = self.relative_step
        if scales:
            raise ValueError(
                f"{type(self).__name__} sets the size of its steps by itself: there is "
                "no learning rate of a step to multiply. Received: "
                f"step_size={step_sizes.serialize(self.step_size)}. Leave it out, or "
                "take another base (or Adafactor with `relative_step=False`)."
            )
        if not self._is_keras_own("_backend_update_step"):
            owner = self._next_in_line("_backend_update_step")
            raise ValueError(
                f"{owner.__name__} updates all variables together, in its "
                "`_backend_update_step`, with one learning rate. Received: "
                f"step_size={step_sizes.serialize(self.step_size)}. Leave it out, or "
                "move the update to `update_step`."
            )

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._warn_of_clipping_in_vain()

    def _build_transforms(self, variables):
        super()._build_transforms(variables)
        if self._norm_function is not None:
            self._add_live_number("norm_epsilon")
        if self.step_size is None:
            return
        # The factors are variables, as TensorFlow hands nothing else on from where
        # gradients are rescaled to the replicas' updates.
        for i, variable in enumerate(variables):
            if self._blocks.of[i] is not None:
                self._kept[i] = self.step_size.add_variables(
                    self._add_own_variable,
                    i,
                    variable,
                    self._blocks.norm_shape(variable),
                )

    def _transforms(self):
        transforms = super()._transforms()
        if self.step_size is not None:  # First, from raw gradients.
            transforms.insert(0, self._set_factors)
        return transforms

    def _rescaling(self):
        transforms = [] if self._norm_function is None else [self._normalize]
        if self.step_size is not None and self.apply_to == "update":
            transforms.append(self._multiply)
        return transforms

    def _normalize(self, step):
        if isinstance(self._norm_function, ReturnsGradient):
            step.replace(self._norm_function)
        else:
            epsilon = self._live_number("norm_epsilon")
            rescale.normalize(step, self._norm_function, epsilon)

    def _set_factors(self, step):
        kept = [self._kept.get(self._get_variable_index(v)) for v in step.weights]
        for position, factor in self.step_size.factors(step, kept).items():
            variable, *_ = kept[position]
            variable.assign(ops.cast(factor, "float32"))

    def _multiply(self, step):
        numbers = enumerate(self._get_variable_index(v) for v in step.weights)
        factors = {i: self._kept[n][0] for i, n in numbers if n in self._kept}
        step.multiply({i: ops.convert_to_tensor(f) for i, f in factors.items()})

    def _multiplies_rates(self):
        return self.step_size is not None and self.apply_to == "gradient"

    def update_step(self, gradient, variable, learning_rate):
        if self._multiplies_rates():
            kept = self._kept.get(self._get_variable_index(variable))
            if kept:
                learning_rate = ops.multiply(
                    ops.cast(learning_rate, variable.dtype),
                    near(
                        ops.cast(ops.convert_to_tensor(kept[0]), variable.dtype),
                        ops.convert_to_tensor(variable),
                    ),
                )
        super().update_step(gradient, variable, learning_rate)

    def _update(self, grads, variables, learning_rate):
        if not (self._multiplies_rates() and hasattr(self, "_parallel_update_step")):
            super()._update(grads, variables, learning_rate)
            return
        # Keras's foreach classes for PyTorch know one learning rate only. Past their
        # override is the base's own, which steps variable by variable.
        foreach = self._next_in_line("_backend_update_step")
        super(foreach, self)._backend_update_step(grads, variables, learning_rate)

    def _warn_of_clipping_in_vain(self):
        # Known of the built-in norms, all of which are homogeneous.
        if (
            self.apply_to == "update"
            or any(self._blocks.excluded)
            or self._norm_function is None
            or not is_built_in(self._norm_function)
        ):
            return
        in_vain = ["global_clipnorm"]
        if self.scope in ("variable", "unit"):
            in_vain.append("clipnorm")
        for name in in_vain:
            if (getattr(self, name) or 0) > 0:
                warnings.warn(
                    f"{name}={getattr(self, name)} has no effect on "
                    f"{type(self).__name__} with norm={self.norm!r}: it clips the raw "
                    "gradient, which keeps its direction, and its length is divided "
                    f"out after that. Leave `{name}` out, or use `clipvalue`, which "
                    "bounds each entry.",
                    stacklevel=3,
                )
