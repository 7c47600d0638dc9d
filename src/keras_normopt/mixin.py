"""The mixin that every normalized optimizer class shares: where and when to normalize.

Keras reaches an optimizer by three roads. In `fit`, JAX calls `stateless_apply`,
TensorFlow `apply_gradients` and PyTorch `apply`. All of them come together in `apply`,
which drops missing gradients, divides out the loss scale, accumulates, clips and decays
weights. Only then is a gradient the one to normalize. The place is
`_backend_update_step`, or on TensorFlow the end of `_all_reduce_sum_gradients`, where
the gradients of the replicas have been summed. Both names are private to Keras: a
release could rename them, so each entry checks that the place was reached.
"""

import numbers
import reprlib
import threading
import warnings
from typing import Any

import keras
import numpy as np

from keras_normopt import norms, registry, sparse
from keras_normopt.normalization import normalize

DEFAULT_NORM = "l2"
DEFAULT_NORM_EPSILON = 1e-30

_ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
_LARGEST_EPSILON = float(np.finfo("float32").max)

PLACE = "_all_reduce_sum_gradients" if _ON_TENSORFLOW else "_backend_update_step"


# On TensorFlow and JAX several threads may trace one optimizer at once, as replicas do.
# PyTorch's compiler cannot follow a thread's own variables.
class _Ledger(object if keras.backend.backend() == "torch" else threading.local):
    """Whether the step being made is known to be right."""

    settled = False


class Normalization:
    """What a normalized optimizer adds to its base. Not for use by itself."""

    def __init__(
        self, *args, norm=DEFAULT_NORM, norm_epsilon=DEFAULT_NORM_EPSILON, **kwargs
    ):
        # Before Keras's own: a wrong argument should not leave half an optimizer.
        registry.get(norm)
        _check_epsilon(norm_epsilon)
        super().__init__(*args, **kwargs)
        self._ledger = _Ledger()
        self.norm = norm
        self.norm_epsilon = norm_epsilon

    @property
    def norm(self) -> Any:
        """A registered name, a function from a gradient to its norm, or `None`."""
        return self._norm

    @norm.setter
    def norm(self, norm: Any) -> None:
        self._norm_function = registry.get(norm)
        self._norm = norm

    @property
    def norm_epsilon(self) -> float:
        """The floor of the norm, a finite float of at least 0."""
        return self._norm_epsilon

    @norm_epsilon.setter
    def norm_epsilon(self, norm_epsilon: float) -> None:
        _check_epsilon(norm_epsilon)
        self._norm_epsilon = float(norm_epsilon)

    def get_config(self):
        return super().get_config() | {
            "norm": registry.serialize(self.norm),
            "norm_epsilon": self.norm_epsilon,
        }

    def build(self, variables):
        if not self.built:
            self._warn_of_clipping_in_vain()
        super().build(variables)

    def _warn_of_clipping_in_vain(self):
        # Known of the built-in norms, all of which are homogeneous.
        if self._norm_function not in norms.BUILT_IN.values():
            return
        for name in ("clipnorm", "global_clipnorm"):
            if (getattr(self, name) or 0) > 0:
                warnings.warn(
                    f"{name}={getattr(self, name)} has no effect on "
                    f"{type(self).__name__} with norm={self.norm!r}: it clips the raw "
                    "gradient, which keeps its direction, and its length is divided "
                    f"out after that. Leave `{name}` out, or use `clipvalue`, which "
                    "bounds each entry.",
                    stacklevel=3,
                )

    def apply_gradients(self, grads_and_vars):
        """Makes one normalized step.

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
        self._ledger.settled = False
        result = super().apply_gradients(pairs)
        self._check_ledger()
        return result

    def apply(self, grads, trainable_variables=None):
        """Makes one normalized step.

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
        self._ledger.settled = False
        super().apply(grads, trainable_variables)
        if not self._ledger.settled:
            self._ledger.settled = not self._has_step_due(grads, variables)
        self._check_ledger()

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        self._ledger.settled = False
        result = super().stateless_apply(
            optimizer_variables, grads, trainable_variables
        )
        self._check_ledger()
        return result

    def _has_step_due(self, grads, variables):
        """Whether a step that was not normalized should have been."""
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
            # gradients should have been normalized, whichever step this will be.
            return True
        return taken % self.gradient_accumulation_steps == 0

    def _check_ledger(self):
        if not self._ledger.settled:
            raise RuntimeError(
                f"{type(self).__name__} could not normalize its gradients: Keras "
                f"{keras.version()} or the base optimizer did not call `{PLACE}`, "
                "where keras_normopt does it. Training stops here, at the latest after "
                "one step that was not normalized. Install a version of Keras that "
                "this version of keras_normopt supports, or a newer keras_normopt."
            )

    def _normalize(self, grads, variables):
        self._ledger.settled = True
        if self._norm_function is None:
            return grads
        grads = [sparse.prepare(g, v) for g, v in zip(grads, variables, strict=True)]
        return normalize(grads, self._norm_function, self.norm_epsilon)

    if _ON_TENSORFLOW:

        def _all_reduce_sum_gradients(self, grads_and_vars):
            pairs = super()._all_reduce_sum_gradients(grads_and_vars)
            grads, variables = zip(*pairs, strict=True)
            return list(zip(self._normalize(grads, variables), variables, strict=True))

    else:

        def _backend_update_step(self, grads, trainable_variables, learning_rate):
            grads = self._normalize(grads, trainable_variables)
            super()._backend_update_step(grads, trainable_variables, learning_rate)


def _check_epsilon(norm_epsilon):
    if (
        not isinstance(norm_epsilon, numbers.Real)
        or isinstance(norm_epsilon, bool)
        or not 0 <= norm_epsilon <= _LARGEST_EPSILON
    ):
        raise ValueError(
            "`norm_epsilon` must be a finite float of at least 0, within float32. "
            f"Received: norm_epsilon={reprlib.repr(norm_epsilon)}"
        )


def _check_shapes(grads, variables):
    if len(grads) != len(variables):
        raise ValueError(
            f"Received {len(grads)} gradients for {len(variables)} variables. Pass one "
            "gradient, or None, for each variable."
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
