"""Makes the optimizer classes: `normalized`, `clipped` and `with_defaults`."""

import copyreg
import difflib
import functools
import inspect
import reprlib
import sys
import threading
from typing import Any

import keras

from keras_normopt._optimizer import docstrings
from keras_normopt._optimizer.clipped import ClippedMixin
from keras_normopt._optimizer.hook import HOOK
from keras_normopt._optimizer.mixin import OptimizerMixin
from keras_normopt._optimizer.normalized import NormalizedMixin

_class_lock = threading.Lock()


def normalized(optimizer_class: type) -> type[Any]:
    """Makes the normalized subclass of a Keras optimizer class.

    The subclass takes the arguments of its base and the keyword arguments `norm`,
    `norm_epsilon`, `scope`, `exclude`, `step_size`, `direction`, `axes`, `apply_to`,
    `centralize` and `track_norms`. Before the update of the base, it divides each
    gradient by its norm, `g ← g / max(norm(g), norm_epsilon)`. With
    `apply_to="update"`, it divides the update instead.

    Every call with the same base returns the same class. The class is registered for
    saving, as `keras_normopt>Normalized<Name>` for an optimizer of Keras. For your own
    optimizer, the first part of the name is the package that your class is registered
    under, or its module. Call `normalized(MyOptimizer)` before you load a file that
    uses it.

    Args:
        optimizer_class: A subclass of `keras.optimizers.Optimizer`. It may override
            `update_step`, `_backend_update_step` and `build`. It must not override
            `apply`, `apply_gradients`, `stateless_apply` or `_backend_apply_gradients`,
            because these methods call the code that normalizes gradients. If the class
            wraps another optimizer, normalize the inner optimizer.

    Returns:
        The class, named `Normalized<Name>`.

    Raises:
        TypeError: If `optimizer_class` is not an optimizer class. Instances and names
            are not classes.
        ValueError: If the class cannot be normalized.

    Example:
        >>> import keras, keras_normopt
        >>> class MySGD(keras.optimizers.SGD):
        ...     pass
        >>> NormalizedMySGD = keras_normopt.normalized(MySGD)
        >>> NormalizedMySGD(learning_rate=0.1, norm="max")
        NormalizedMySGD(learning_rate=0.1, norm='max')
    """
    return _optimizer_class(optimizer_class, NormalizedMixin)


def clipped(optimizer_class: type) -> type[Any]:
    """Makes the clipping subclass of a Keras optimizer class.

    The subclass takes the arguments of its base and the keyword arguments `norm`,
    `max_norm`, `skip`, `max_skips`, `scope`, `exclude`, `step_size`, `axes`,
    `apply_to`, `centralize` and `track_norms`. Before the update of the base, it scales
    down each gradient whose norm is above `max_norm`,
    `g ← g · min(1, max_norm / norm(g))`. The class of an optimizer of Keras is
    registered as `keras_normopt>Clipped<Name>`. All else is as for `normalized`.

    Args:
        optimizer_class: As for `normalized`.

    Returns:
        The class, named `Clipped<Name>`.

    Raises:
        TypeError: If `optimizer_class` is not an optimizer class.
        ValueError: If the class cannot be clipped. A normalized class cannot be
            clipped, because its norms are 1 already.

    Example:
        >>> import keras, keras_normopt
        >>> ClippedNadam = keras_normopt.clipped(keras.optimizers.Nadam)
        >>> ClippedNadam(norm="max", max_norm=0.1)
        ClippedNadam(norm='max', max_norm=0.1)

    References:
        - [Pascanu et al., 2013, On the difficulty of training recurrent neural
          networks](https://arxiv.org/abs/1211.5063)
    """
    return _optimizer_class(optimizer_class, ClippedMixin)


_FACTORIES = {NormalizedMixin: normalized, ClippedMixin: clipped}
for _factory in _FACTORIES.values():
    _factory.__module__ = "keras_normopt"  # For pickles.


def _optimizer_class(base, mixin):
    _check_base(base, mixin)
    with _class_lock:
        return _make_class(_implementation_class(base), mixin)


def _check_base(base, mixin):
    problem = "`optimizer_class` must be a subclass of `keras.optimizers.Optimizer`. "
    received = f"Received: optimizer_class={reprlib.repr(base)}. "
    if not isinstance(base, type):
        advice = "Pass a class, as in `normalized(keras.optimizers.Adam)`."
        if isinstance(base, keras.optimizers.Optimizer):
            advice = (
                f"This is an instance. Pass its class, {type(base).__name__}, or pass "
                f"the instance to `keras_normopt.{mixin.PREFIX}Optimizer`."
            )
        raise TypeError(problem + received + advice)
    if not issubclass(base, keras.optimizers.Optimizer):
        raise TypeError(problem + received + "Pass a Keras optimizer class.")
    if base is keras.optimizers.Optimizer:
        raise ValueError(
            problem + received + "This abstract class cannot make steps. Pass an "
            "optimizer such as `keras.optimizers.SGD`."
        )
    for outer in ("LossScaleOptimizer", "MultiOptimizer"):
        # The oldest supported Keras has no MultiOptimizer.
        if issubclass(base, getattr(keras.optimizers, outer, ())):
            raise ValueError(
                f"`optimizer_class` must update weights itself. {received}{outer} "
                "wraps another optimizer. Wrap an optimizer of keras_normopt with it: "
                f"`{outer}(...{mixin.PREFIX}Adam()...)`."
            )
    if issubclass(base, OptimizerMixin):
        has = "normalized" if issubclass(base, NormalizedMixin) else "clipped"
        raise ValueError(
            f"`optimizer_class` is {has} already. {received}Use it as it is, or pass "
            "its base."
        )
    taken = set(mixin.OPTIONS) & set(inspect.signature(base.__init__).parameters)
    if taken:
        names = " and ".join(f"`{name}`" for name in sorted(taken))
        argument = "argument" if len(taken) == 1 else "arguments"
        raise ValueError(
            f"`optimizer_class` must not have the {argument} {names}, which "
            f"keras_normopt adds. {received}Rename the {argument}."
        )
    _check_hook(base, mixin, received)


def _check_hook(base, mixin, received):
    if not hasattr(keras.optimizers.Optimizer, HOOK):
        raise RuntimeError(
            f"Keras {keras.version()} has no `Optimizer.{HOOK}`, where keras_normopt "
            "receives gradients. Install a version of Keras that this version of "
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
                f"`optimizer_class` must not override `{name}`, because keras_normopt "
                f"might then miss gradients. {received}{owner.__name__} overrides it. "
                "If it wraps another optimizer, as Lookahead does, wrap an optimizer "
                f"of keras_normopt: `{base.__name__}({mixin.PREFIX}Adam())`. If not, "
                "move the code to `update_step` or `_backend_update_step`. Or move it "
                f"to a subclass: `class Mine({mixin.PREFIX}SGD)` may override `{name}` "
                "and call `super()`."
            )


def _is_from_keras(optimizer_class):
    return optimizer_class.__module__.partition(".")[0] == "keras"


def _implementation_class(optimizer_class):
    """Returns the class that Keras instantiates. On PyTorch it is a subclass."""
    if not _is_from_keras(optimizer_class):
        return optimizer_class
    return type(optimizer_class.__new__(optimizer_class))


@functools.cache
def _make_class(base, mixin):
    public = base
    if _is_from_keras(base):
        public = getattr(keras.optimizers, base.__name__, base)
    name = f"{mixin.PREFIX}{public.__name__}"
    printed = f"{name}(norm='max')"
    construction = f"keras_normopt.{printed}"
    module = "keras_normopt.optimizers"
    if not _is_from_keras(base):
        factory = mixin.PREFIX.lower()
        construction = f"keras_normopt.{factory}({public.__name__})(...)"
        printed = f"{name}(...)"
        module = public.__module__

    def __init__(self, *args, **kwargs):  # noqa: N807
        try:
            mixin.__init__(self, *args, **kwargs)
        except (TypeError, ValueError) as error:
            hints = _hints(self, kwargs, str(error))
            if not hints or type(error) not in (TypeError, ValueError):
                raise
            text = str(error).rstrip(".")
            raise type(error)(f"{text}. {' '.join(hints)}") from error

    # On the function, because subclasses would inherit a class's `__signature__`.
    signature = docstrings.signature(base, mixin)
    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{name}.__init__"
    __init__.__module__ = module

    members = {
        "__init__": __init__,
        "__module__": module,
        "__doc__": docstrings.docstring(
            public, mixin, construction, printed, signature
        ),
        "_made_from": (public, mixin),
    }
    metaclass: Any = _metaclass(type(base))  # type: ignore[arg-type]
    cls = metaclass(name, (mixin, base), members)
    return keras.saving.register_keras_serializable(*_registration(public, mixin))(cls)


def with_defaults(cls, name, summary, references, **defaults):
    """Makes a subclass of a generated class with other defaults.

    Args:
        cls: Class made by `normalized` or `clipped`.
        name: Name of the subclass.
        summary: Its docstring, up to the arguments.
        references: The list of references in its docstring.
        defaults: The new defaults.
    """
    signature = docstrings.with_defaults(inspect.signature(cls.__init__), defaults)

    def __init__(self, *args, **kwargs):  # noqa: N807
        try:
            given = signature.bind_partial(self, *args, **kwargs).arguments
        except TypeError:  # The error of `cls` is clearer.
            cls.__init__(self, *args, **kwargs)
            return
        missing = {k: v for k, v in defaults.items() if k not in given}
        cls.__init__(self, *args, **kwargs, **missing)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{name}.__init__"
    __init__.__module__ = cls.__module__
    base, mixin = cls._made_from
    printed = f"{name}(learning_rate=0.03)"
    text = docstrings.docstring(
        base,
        mixin,
        f"keras_normopt.{printed}",
        printed,
        signature,
        summary,
        references,
        defaults,
    )
    members = {"__init__": __init__, "__module__": cls.__module__, "__doc__": text}
    made = type(cls)(name, (cls,), members)
    return keras.saving.register_keras_serializable("keras_normopt", name)(made)


def _hints(optimizer, given, message):
    """Returns a hint for each keyword that an error message calls unknown."""
    known = _keywords(type(optimizer))
    all_options = NormalizedMixin.OPTIONS | ClippedMixin.OPTIONS
    hints = []
    for name in given:
        if name in known or f"'{name}'" not in message:
            continue
        close = difflib.get_close_matches(name, known | set(all_options), n=1)
        if not close:
            takes = ", ".join(sorted(known))
            hints.append(f"{type(optimizer).__name__} takes {takes}.")
        elif close[0] in known:
            hints.append(f"Did you mean `{close[0]}`?")
        else:
            hints.append(_hint_other_class(optimizer, close[0]))
    return hints


def _keywords(cls):
    """Returns the names of all keyword arguments of a class and its bases."""
    names = set()
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(owner.__init__).parameters.values()
        kinds = {p.name: p.kind for p in parameters if p.name != "self"}
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names |= {name for name, kind in kinds.items() if kind not in variable}
        if inspect.Parameter.VAR_KEYWORD not in kinds.values():
            break  # This class passes no other keywords to its bases.
    return names


def _hint_other_class(optimizer, option):
    """Returns a hint for an option that only the other kind of class has."""
    other = NormalizedMixin if option in NormalizedMixin.OPTIONS else ClippedMixin
    name = spelled(optimizer, other.PREFIX.lower())
    return (
        f"`{option}` is an argument of `keras_normopt.{name}`, which can "
        f"{other.VERB} gradients."
    )


def spelled(optimizer, factory="normalized"):
    """Returns the code for the class that a factory makes from the same base.

    The code is the name of the class if `keras_normopt` exports it, or else a call of
    the factory.
    """
    cls = type(optimizer)
    base, _ = getattr(cls, "_made_from", (cls, None))
    name = f"{factory.capitalize()}{base.__name__}"
    is_exported = name in keras.saving.get_custom_objects()
    return name if is_exported else f"{factory}({base.__name__})"


def _registration(public, mixin):
    """Returns the package and the name under which a class is registered."""
    if _is_from_keras(public):
        return "keras_normopt", f"{mixin.PREFIX}{public.__name__}"
    package, _, name = keras.saving.get_registered_name(public).rpartition(">")
    # All users share Keras's default package, where equal names would collide.
    if package in ("", "Custom"):
        package, name = public.__module__, public.__qualname__
    scope, dot, name = name.rpartition(".")
    return package, f"{scope}{dot}{mixin.PREFIX}{name}"


@functools.cache
def _metaclass(base):
    """Makes the metaclass, which decides how the classes are pickled."""
    metaclass = type("NormalizedType", (base,), {})
    copyreg.pickle(metaclass, _reduce)
    return metaclass


def _reduce(cls):
    module = sys.modules.get(cls.__module__)
    is_importable = getattr(module, cls.__qualname__, None) is cls
    if "_made_from" in vars(cls) and not is_importable:
        base, mixin = cls._made_from
        return _FACTORIES[mixin], (base,)
    return cls.__qualname__
