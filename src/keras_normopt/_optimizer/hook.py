"""Transforms gradients in one method of Keras, and checks that Keras calls it.

In `fit`, JAX calls `stateless_apply` of an optimizer, TensorFlow `apply_gradients` and
PyTorch `apply`. The first two methods call `apply` too. `apply` drops missing
gradients, divides out the loss scale, accumulates, clips and decays weights. Gradients
may be transformed only after that. So the hook is the method that Keras calls next. It
is `_backend_update_step`, or on TensorFlow `_all_reduce_sum_gradients`, which sums over
replicas.

Keras may rename these private methods. So each public method checks that Keras called
the hook. A base with its own `_backend_update_step` may skip the sum over replicas.
With one replica, gradients of such a base are transformed before that method.
"""

import reprlib

import keras

from keras_normopt._backend.tracing import ThreadLocal
from keras_normopt._optimizer.types import MixinBase

_ON_TENSORFLOW = keras.backend.backend() == "tensorflow"

HOOK = "_all_reduce_sum_gradients" if _ON_TENSORFLOW else "_backend_update_step"


class _HookFlag(ThreadLocal):
    """Whether the current step reached the hook, or did not need to."""

    reached = False


class Hook(MixinBase):
    """Transforms gradients at the hook. Raises an error if Keras did not reach it."""

    VERB = "rescale"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._hook_flag = _HookFlag()

    def apply_gradients(self, grads_and_vars):
        """Makes one step.

        Args:
            grads_and_vars: Iterable of (gradient, variable) pairs. Pairs with the
                gradient `None` are ignored. If there are no pairs, nothing happens.

        Returns:
            The iteration counter.

        Raises:
            ValueError: If an item is not a pair, or if a gradient is known to have
                another shape than its variable.
        """
        pairs = list(grads_and_vars)
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ValueError(
                    "`grads_and_vars` must be an iterable of (gradient, variable) "
                    f"pairs. Received the item {reprlib.repr(pair)}"
                )
        if not pairs:
            return self._iterations
        self._hook_flag.reached = False
        result = super().apply_gradients(pairs)
        self._check_hook_reached()
        return result

    def apply(self, grads, trainable_variables=None):
        """Makes one step.

        Args:
            grads: List of gradients, one for each variable.
            trainable_variables: List of variables. Defaults to the variables that the
                optimizer was built on.

        Raises:
            ValueError: If there are more or fewer gradients than variables, or if a
                gradient is known to have another shape than its variable.
        """
        grads = list(grads)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        variables = trainable_variables
        if variables is None:
            variables = self._trainable_variables
        # Keras itself raises an error if variables are missing.
        if grads and (trainable_variables is not None or self.built):
            _check_shapes(grads, variables)
        self._hook_flag.reached = False
        super().apply(grads, trainable_variables)
        if not self._hook_flag.reached:
            self._hook_flag.reached = not self._should_reach_hook(grads, variables)
        self._check_hook_reached()

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        self._hook_flag.reached = False
        result = super().stateless_apply(
            optimizer_variables, grads, trainable_variables
        )
        self._check_hook_reached()
        return result

    def _should_reach_hook(self, grads, variables):
        """Returns whether this step should have reached the hook."""
        if not any(
            grad is not None and not getattr(variable, "overwrite_with_gradient", False)
            for grad, variable in zip(grads, variables, strict=False)
        ):
            return False
        if not self.gradient_accumulation_steps:
            return True
        try:
            steps_so_far = int(keras.ops.convert_to_numpy(self._iterations))
        except (AttributeError, NotImplementedError, TypeError):
            # Tracing runs both branches, so the update should have reached the hook.
            return True
        return steps_so_far % self.gradient_accumulation_steps == 0

    def _check_hook_reached(self):
        if not self._hook_flag.reached:
            raise RuntimeError(
                f"{type(self).__name__} could not {self.VERB} its gradients: Keras "
                f"{keras.version()} or the base optimizer did not call `{HOOK}`, "
                "where keras_normopt does this. Training stops, after at most one step "
                "of the base optimizer. Install a version of Keras that this version "
                "of keras_normopt supports, or a newer keras_normopt."
            )

    def _require_methods(self, option, *names):
        """Raises an error if Keras lacks a private method that an option needs."""
        missing = [name for name in names if self._base_that_defines(name) is None]
        if missing:
            raise RuntimeError(
                f"{type(self).__name__} does not support {option} here, because Keras "
                f"{keras.version()} has no `{missing[0]}`. Leave the option out. Or "
                "install a version of Keras that this version of keras_normopt "
                "supports, or a newer keras_normopt."
            )

    def _transform_gradients(self, grads, variables):
        """Returns the gradients for the base optimizer."""
        raise NotImplementedError

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if not _ON_TENSORFLOW or self._has_own_update():
            self._hook_flag.reached = True
            grads = self._transform_gradients(grads, trainable_variables)
        super()._backend_update_step(grads, trainable_variables, learning_rate)

    if _ON_TENSORFLOW:

        def _all_reduce_sum_gradients(self, grads_and_vars):
            pairs = super()._all_reduce_sum_gradients(grads_and_vars)
            if self._has_own_update():
                return pairs
            grads, variables = zip(*pairs, strict=True)
            self._hook_flag.reached = True
            grads = self._transform_gradients(grads, variables)
            return list(zip(grads, variables, strict=True))

        def _has_own_update(self):
            """Returns whether the base has its own update, which may skip the sum.

            The result is `False` with several replicas, where a base must not skip the
            sum.
            """
            replicas = self._distribution_strategy.num_replicas_in_sync
            return replicas == 1 and not self._is_keras_method("_backend_update_step")

    def _base_that_defines(self, name):
        """Returns the first class after `Hook` that has a method, or `None`."""
        mro = type(self).__mro__
        return next((c for c in mro[mro.index(Hook) + 1 :] if name in vars(c)), None)

    def _is_keras_method(self, name):
        """Returns whether a method is Keras's own, or does not exist."""
        owner = self._base_that_defines(name)
        return owner is None or owner.__module__.partition(".")[0] == "keras"


def _check_shapes(grads, variables):
    if len(grads) != len(variables):
        raise ValueError(
            "Pass one gradient, or None, for each variable. Received: "
            f"{len(grads)} gradients for {len(variables)} variables"
        )
    for grad, variable in zip(grads, variables, strict=True):
        given, expected = _known_shape(grad), _known_shape(variable)
        if given is None or expected is None or given == expected:
            continue
        # While TensorFlow traces a graph, dimensions may be unknown.
        if len(given) == len(expected) and all(
            a == b or a is None or b is None
            for a, b in zip(given, expected, strict=True)
        ):
            continue
        raise ValueError(
            "A gradient must have the shape of its variable. Received a gradient of "
            f"shape {given} for the variable "
            f"{getattr(variable, 'path', variable.name)!r} of shape {expected}."
        )


def _known_shape(tensor):
    shape = getattr(tensor, "shape", None)
    if shape is None or getattr(shape, "rank", 0) is None:
        return None
    return tuple(shape)
