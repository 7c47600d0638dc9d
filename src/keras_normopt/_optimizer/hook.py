"""Where gradients are rescaled in Keras, and the guard that they are.

In `fit`, JAX calls `stateless_apply` of an optimizer, TensorFlow `apply_gradients` and
PyTorch `apply`. All of them come together in `apply`, which drops missing gradients,
divides out the loss scale, accumulates, clips and decays weights. Only then is a
gradient the one to rescale, in `_backend_update_step`, or on TensorFlow at the end of
`_all_reduce_sum_gradients`, where the gradients of the replicas have been summed. Both
names are private to Keras: a release could rename them, so each entry checks that the
hook was reached. A base with a `_backend_update_step` of its own may not sum over
replicas; where there is one only, its gradients are rescaled before it.
"""

import reprlib

import keras

from keras_normopt._backend.tracing import Local
from keras_normopt._optimizer.types import MixinBase

_ON_TENSORFLOW = keras.backend.backend() == "tensorflow"

HOOK = "_all_reduce_sum_gradients" if _ON_TENSORFLOW else "_backend_update_step"


class _Guard(Local):
    """Whether the step being made is known to be right."""

    passed = False


class Hook(MixinBase):
    """Transforms gradients at the hook. Raises an error if Keras did not reach it."""

    VERB = "rescale"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._guard = _Guard()

    def apply_gradients(self, grads_and_vars):
        """Makes one step.

        Args:
            grads_and_vars: Any iterable of (gradient, variable) pairs. A pair whose
                gradient is `None` is left out; with no pairs at all nothing happens.

        Returns:
            The iteration counter.

        Raises:
            ValueError: If an item is not a pair, or a gradient's shape is known and is
                not its variable's.
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
        self._guard.passed = False
        result = super().apply_gradients(pairs)
        self._check_guard()
        return result

    def apply(self, grads, trainable_variables=None):
        """Makes one step.

        Args:
            grads: List of gradients, one for each variable.
            trainable_variables: List of variables. May be left out once the optimizer
                is built; then they are those that it was built on.

        Raises:
            ValueError: If there are more or fewer gradients than variables, or a
                gradient's shape is known and is not its variable's.
        """
        grads = list(grads)
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
        variables = trainable_variables
        if variables is None:
            variables = self._trainable_variables
        # Keras itself complains of variables that are missing.
        if grads and (trainable_variables is not None or self.built):
            _check_shapes(grads, variables)
        self._guard.passed = False
        super().apply(grads, trainable_variables)
        if not self._guard.passed:
            self._guard.passed = not self._has_step_due(grads, variables)
        self._check_guard()

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        self._guard.passed = False
        result = super().stateless_apply(
            optimizer_variables, grads, trainable_variables
        )
        self._check_guard()
        return result

    def _has_step_due(self, grads, variables):
        """Whether a step that did not reach the hook should have."""
        if not any(
            grad is not None and not getattr(variable, "overwrite_with_gradient", False)
            for grad, variable in zip(grads, variables, strict=False)
        ):
            return False
        if not self.gradient_accumulation_steps:
            return True
        try:
            taken = int(keras.ops.convert_to_numpy(self._iterations))
        except (AttributeError, NotImplementedError, TypeError):
            # Being traced. Then the branch that updates was traced as well, and its
            # gradients should have been rescaled, whichever step this will be.
            return True
        return taken % self.gradient_accumulation_steps == 0

    def _check_guard(self):
        if not self._guard.passed:
            raise RuntimeError(
                f"{type(self).__name__} could not {self.VERB} its gradients: Keras "
                f"{keras.version()} or the base optimizer did not call `{HOOK}`, "
                "where keras_normopt does it. Training stops here, at the latest after "
                "one step of the base optimizer. Install a version of Keras that "
                "this version of keras_normopt supports, or a newer keras_normopt."
            )

    def _require(self, option, *names):
        """Raises an error if Keras lacks a private method that an option needs."""
        missing = [name for name in names if self._next_in_line(name) is None]
        if missing:
            raise RuntimeError(
                f"{type(self).__name__} cannot take {option}: Keras "
                f"{keras.version()} has no `{missing[0]}`, which keras_normopt needs "
                "for it. Leave the option out, or install a version of Keras that this "
                "version of keras_normopt supports, or a newer keras_normopt."
            )

    def _transform_gradients(self, grads, variables):
        """Returns the gradients that the base optimizer makes its step with."""
        raise NotImplementedError

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if not _ON_TENSORFLOW or self._has_own_update():
            self._guard.passed = True
            grads = self._transform_gradients(grads, trainable_variables)
        super()._backend_update_step(grads, trainable_variables, learning_rate)

    if _ON_TENSORFLOW:

        def _all_reduce_sum_gradients(self, grads_and_vars):
            pairs = super()._all_reduce_sum_gradients(grads_and_vars)
            if self._has_own_update():
                return pairs
            grads, variables = zip(*pairs, strict=True)
            self._guard.passed = True
            grads = self._transform_gradients(grads, variables)
            return list(zip(grads, variables, strict=True))

        def _has_own_update(self):
            """Whether the base updates in its own way, which may pass the sum by.

            With several replicas that would be wrong with or without us, so that
            then only a base will do that comes back to Keras's own way.
            """
            replicas = self._distribution_strategy.num_replicas_in_sync
            return replicas == 1 and not self._keeps("_backend_update_step")

    def _next_in_line(self, name):
        """The class of the base that a call of a method goes to, if there is one."""
        mro = type(self).__mro__
        return next((c for c in mro[mro.index(Hook) + 1 :] if name in vars(c)), None)

    def _keeps(self, name):
        """Whether no base but Keras's own overrides a method."""
        owner = self._next_in_line(name)
        return owner is None or owner.__module__.partition(".")[0] == "keras"


def _check_shapes(grads, variables):
    if len(grads) != len(variables):
        raise ValueError(
            "Pass one gradient, or None, for each variable. Received: gradients: "
            f"{len(grads)}, variables: {len(variables)}"
        )
    for grad, variable in zip(grads, variables, strict=True):
        given, expected = _known_shape(grad), _known_shape(variable)
        if given is None or expected is None or given == expected:
            continue
        # On TensorFlow a dimension may be unknown while a graph is traced.
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
