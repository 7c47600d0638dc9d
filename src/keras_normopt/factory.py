"""`normalized`, the class factory, and the one mixin that every class it makes shares.

Where normalization sits: Keras reaches an optimizer by three roads. In `fit`, JAX calls
`stateless_apply`, TensorFlow `apply_gradients` and PyTorch `apply`; all of them come
together in `apply`, which then drops missing gradients, divides out the loss scale,
accumulates, clips and decays weights. Only after all that is a gradient the one to
normalize. The place is `_backend_update_step`, or on TensorFlow the end of
`_all_reduce_sum_gradients`, where the replicas' gradients have been summed. Both names
are private to Keras, so `apply` checks that the place was reached.
"""

import copyreg
import functools
import inspect
import math
import numbers
import reprlib
import sys
import threading

import keras

from keras_normopt import documentation, norms
from keras_normopt.normalization import normalize

DEFAULT_NORM = "l2"
DEFAULT_NORM_EPSILON = 1e-30

_ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
_PLACE = "_all_reduce_sum_gradients" if _ON_TENSORFLOW else "_backend_update_step"


class _Ledger(threading.local):
    """Counts, per thread, the steps known to be right: a replica has its own thread."""

    steps = 0


_ledger = _Ledger()
_making = threading.Lock()


class Normalization:
    """What a normalized optimizer adds to its base. Not for use by itself."""

    def __init__(
        self, *args, norm=DEFAULT_NORM, norm_epsilon=DEFAULT_NORM_EPSILON, **kwargs
    ):
        # Before Keras's own: a wrong argument should not leave half an optimizer.
        norms.get(norm)
        _check_epsilon(norm_epsilon)
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.norm_epsilon = norm_epsilon

    @property
    def norm(self):
        """A registered name, a function from a gradient to its norm, or `None`."""
        return self._norm

    @norm.setter
    def norm(self, norm):
        self._norm_function = norms.get(norm)
        self._norm = norm

    @property
    def norm_epsilon(self):
        """The floor of the norm, a finite float of at least 0."""
        return self._norm_epsilon

    @norm_epsilon.setter
    def norm_epsilon(self, norm_epsilon):
        _check_epsilon(norm_epsilon)
        self._norm_epsilon = float(norm_epsilon)

    def get_config(self):
        return super().get_config() | {
            "norm": norms.serialize(self.norm),
            "norm_epsilon": self.norm_epsilon,
        }

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
        before = _ledger.steps
        result = super().apply_gradients(pairs)
        self._check_ledger(before)
        return result

    def apply(self, grads, trainable_variables=None):
        """Makes one normalized step.

        Args:
            grads: List of gradients, one for each variable.
            trainable_variables: List of variables. May be left out once the optimizer
                is built; then they are those that it was built on.

        Raises:
            ValueError: If a gradient's shape is known and is not its variable's.
        """
        grads = list(grads)
        variables = trainable_variables
        if variables is None:
            variables = self._trainable_variables
        else:
            variables = trainable_variables = list(variables)
        _check_shapes(grads, variables)
        before = _ledger.steps
        super().apply(grads, trainable_variables)
        if _ledger.steps == before and not self._has_step_due(grads, variables):
            _ledger.steps += 1
        self._check_ledger(before)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        before = _ledger.steps
        result = super().stateless_apply(
            optimizer_variables, grads, trainable_variables
        )
        self._check_ledger(before)
        return result

    def _has_step_due(self, grads, variables):
        """Whether a step that was not normalized should have been."""
        if not any(
            grad is not None and not getattr(variable, "overwrite_with_gradient", False)
            for grad, variable in zip(grads, variables)
        ):
            return False
        if not self.gradient_accumulation_steps:
            return True
        try:
            taken = int(keras.ops.convert_to_tensor(self._iterations))
        except TypeError:
            # Being traced. Then the branch that updates was traced as well, and its
            # gradients should have been normalized, whichever step this will be.
            return True
        return taken % self.gradient_accumulation_steps == 0

    def _check_ledger(self, before):
        if _ledger.steps == before:
            raise RuntimeError(
                f"{type(self).__name__} was about to train on gradients that are not "
                f"normalized: Keras {keras.version()} or the base optimizer did not "
                f"call `{_PLACE}`, where keras_normopt normalizes them. Training "
                "stopped here. Install a version of Keras that this version of "
                "keras_normopt supports, or a newer keras_normopt."
            )

    def _normalize(self, grads):
        _ledger.steps += 1
        return normalize(grads, self._norm_function, self.norm_epsilon)

    if _ON_TENSORFLOW:

        def _all_reduce_sum_gradients(self, grads_and_vars):
            pairs = super()._all_reduce_sum_gradients(grads_and_vars)
            grads, variables = zip(*pairs, strict=True)
            return list(zip(self._normalize(list(grads)), variables, strict=True))

    else:

        def _backend_update_step(self, grads, trainable_variables, learning_rate):
            super()._backend_update_step(
                self._normalize(grads), trainable_variables, learning_rate
            )


def normalized(optimizer_class):
    """Makes the normalized subclass of a Keras optimizer class.

    The subclass takes what its base takes, and the keyword arguments `norm` and
    `norm_epsilon`. Before the base's own update, each gradient is divided by its norm:
    `g ← g / max(norm(g), norm_epsilon)`.

    A base has one normalized class, made on the first call and returned on later ones.
    That of a Keras optimizer is registered for saving as
    `keras_normopt>Normalized<Name>`. That of your own optimizer is registered under the
    package that your class is registered under, or else under its module: a file that
    uses it loads once `normalized(MyOptimizer)` has run.

    Args:
        optimizer_class: A subclass of `keras.optimizers.Optimizer`. It may override
            `update_step` and `build`, as optimizers do, but none of `apply`,
            `apply_gradients`, `stateless_apply` and `_backend_apply_gradients`: those
            lead to the place where gradients are normalized.

    Returns:
        The class, named `Normalized<Name>`.

    Raises:
        TypeError: If `optimizer_class` is not an optimizer class, but an instance, say,
            or a name.
        ValueError: If it is a class that cannot be normalized.

    Example:
        >>> import keras, keras_normopt
        >>> class MySGD(keras.optimizers.SGD):
        ...     pass
        >>> NormalizedMySGD = keras_normopt.normalized(MySGD)
        >>> optimizer = NormalizedMySGD(learning_rate=0.1, norm="max")
    """
    _check_base(optimizer_class)
    with _making:
        return _make(_used_by_keras(optimizer_class))


def _check_base(base):
    problem = "`optimizer_class` must be a subclass of `keras.optimizers.Optimizer`. "
    received = f"Received: optimizer_class={reprlib.repr(base)}. "
    if not isinstance(base, type):
        way_out = "Pass a class, as in `normalized(keras.optimizers.Adam)`."
        if isinstance(base, keras.optimizers.Optimizer):
            way_out = (
                f"That is an instance: pass its class, {type(base).__name__}, or give "
                "the instance to `keras_normopt.NormalizedOptimizer`."
            )
        raise TypeError(problem + received + way_out)
    if not issubclass(base, keras.optimizers.Optimizer):
        raise TypeError(problem + received + "Pass a Keras optimizer class.")
    if base is keras.optimizers.Optimizer:
        raise ValueError(
            problem + received + "The abstract class itself makes no step: pass an "
            "optimizer such as `keras.optimizers.SGD`."
        )
    for outer in (keras.optimizers.LossScaleOptimizer, keras.optimizers.MultiOptimizer):
        if issubclass(base, outer):
            raise ValueError(
                f"`optimizer_class` must make steps of its own. {received}"
                f"{outer.__name__} goes around a normalized optimizer, as in "
                f"`{outer.__name__}(...NormalizedAdam()...)`."
            )
    if issubclass(base, Normalization):
        raise ValueError(
            f"`optimizer_class` is normalized already. {received}Use it as it is, or "
            "pass its base."
        )
    taken = {"norm", "norm_epsilon"} & set(inspect.signature(base.__init__).parameters)
    if taken:
        raise ValueError(
            "`optimizer_class` must leave the argument names `norm` and `norm_epsilon` "
            f"to its normalized class. {received}Rename {', '.join(sorted(taken))}."
        )
    _check_road(base, received)


def _check_road(base, received):
    if not hasattr(keras.optimizers.Optimizer, _PLACE):
        raise RuntimeError(
            f"Keras {keras.version()} has no `Optimizer.{_PLACE}`, where keras_normopt "
            "normalizes gradients. Install a version of Keras that this version of "
            "keras_normopt supports, or a newer keras_normopt."
        )
    for name in (
        "apply",
        "apply_gradients",
        "stateless_apply",
        "_backend_apply_gradients",
    ):
        owner = next((c for c in base.__mro__ if name in vars(c)), None)
        if owner and owner not in keras.optimizers.Optimizer.__mro__:
            raise ValueError(
                f"`optimizer_class` must not override `{name}`: a gradient might not "
                "reach the place where it is normalized, and the model would train "
                f"un-normalized. {received}{owner.__name__} overrides it. Move what it "
                "does to `update_step`, or to a subclass of the normalized class."
            )


def _is_keras_own(optimizer_class):
    return optimizer_class.__module__.partition(".")[0] == "keras"


def _used_by_keras(optimizer_class):
    """The class that Keras instantiates: on PyTorch, a faster subclass of its own."""
    if not _is_keras_own(optimizer_class):
        return optimizer_class
    return type(optimizer_class.__new__(optimizer_class))


@functools.cache
def _make(base):
    public = base
    if _is_keras_own(base):
        public = getattr(keras.optimizers, base.__name__, base)
    name = f"Normalized{public.__name__}"
    construction = f"keras_normopt.{name}(norm={DEFAULT_NORM!r})"
    module = "keras_normopt.optimizers"
    if not _is_keras_own(base):
        construction = f"keras_normopt.normalized({public.__name__})(...)"
        module = public.__module__

    def __init__(self, *args, **kwargs):
        Normalization.__init__(self, *args, **kwargs)

    # On the function: a class-level __signature__ would be that of subclasses as well.
    __init__.__signature__ = documentation.signature(
        base, {"norm": DEFAULT_NORM, "norm_epsilon": DEFAULT_NORM_EPSILON}
    )
    __init__.__qualname__ = f"{name}.__init__"
    __init__.__module__ = module

    members = {
        "__init__": __init__,
        "__module__": module,
        "__doc__": documentation.docstring(
            public, construction, __init__.__signature__
        ),
        "_normalized_from": public,
    }
    cls = _metaclass(type(base))(name, (Normalization, base), members)
    return keras.saving.register_keras_serializable(*_registration(public))(cls)


def _registration(public):
    """The package and name that the normalized class of a base is saved under."""
    if _is_keras_own(public):
        return "keras_normopt", f"Normalized{public.__name__}"
    package, _, name = keras.saving.get_registered_name(public).rpartition(">")
    # Keras's default package is nobody's own: two classes of one name would collide.
    if package in ("", "Custom"):
        package, name = public.__module__, public.__qualname__
    scope, dot, name = name.rpartition(".")
    return package, f"{scope}{dot}Normalized{name}"


@functools.cache
def _metaclass(base):
    """A metaclass whose only purpose is how the classes themselves are pickled."""
    metaclass = type("NormalizedType", (base,), {})
    copyreg.pickle(metaclass, _reduce)
    return metaclass


def _reduce(cls):
    module = sys.modules.get(cls.__module__)
    is_importable = getattr(module, cls.__qualname__, None) is cls
    if "_normalized_from" in vars(cls) and not is_importable:
        return normalized, (cls._normalized_from,)
    return cls.__qualname__


def _check_epsilon(norm_epsilon):
    if (
        not isinstance(norm_epsilon, numbers.Real)
        or isinstance(norm_epsilon, bool)
        or not 0 <= norm_epsilon < math.inf
    ):
        raise ValueError(
            "`norm_epsilon` must be a finite float of at least 0. "
            f"Received: norm_epsilon={reprlib.repr(norm_epsilon)}"
        )


def _check_shapes(grads, variables):
    for grad, variable in zip(grads, variables):
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
