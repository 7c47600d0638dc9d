"""The names that `norm=` takes: the built-in norms and those that users register."""

import functools
import reprlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar, overload

from keras_normopt.norms import _definitions
from keras_normopt.norms._overflow import BuiltIn
from keras_normopt.norms._user_norms import UserNorm, UserNormalizer, describe

_Norm = TypeVar("_Norm", bound=Callable[[Any], Any])

_registered: dict[str, UserNorm] = {}
_registering = threading.Lock()


def names() -> list[str]:
    """Lists every name that `norm=` takes, built-in and registered, sorted."""
    return sorted(_definitions.BUILT_IN | _registered)


@overload
def register_norm(name: str, function: _Norm, *, overwrite: bool = ...) -> _Norm: ...
@overload
def register_norm(
    name: str, function: None = ..., *, overwrite: bool = ...
) -> Callable[[_Norm], _Norm]: ...
def register_norm(name, function=None, *, overwrite=False):
    """Gives a norm of your own a name, for `norm=` and for saved files.

    A saved optimizer holds the name only. So register the norm in each process, under
    the same name, before you load the file or unpickle the optimizer.

    Args:
        name: String. Any name but those of the built-in norms.
        function: Callable from one gradient to its norm, a scalar tensor. It is called
            with a tensor of any shape in float32 (float64 for a float64 gradient) and
            should use `keras.ops` only, to work on every backend and when compiled.
            Left out, `register_norm` is a decorator.
        overwrite: Boolean, whether to replace another function that was registered
            under this name. Defaults to `False`. The same function defined again, as by
            a notebook cell that is run twice, needs no `overwrite`.

    Returns:
        The function, unchanged.

    Raises:
        TypeError: If the name is not a string or the function not callable.
        ValueError: If the name is empty, is a built-in one, or stands for another
            function and `overwrite` is not set.

    Example:
        >>> import keras_normopt
        >>> from keras import ops
        >>> @keras_normopt.register_norm("median")
        ... def median(gradient):
        ...     return ops.median(ops.abs(gradient))
        >>> optimizer = keras_normopt.NormalizedSGD(norm="median")
    """
    if function is None:
        return functools.partial(register_norm, name, overwrite=overwrite)
    if not callable(function):
        raise TypeError(
            "`function` must be a callable from a gradient to its norm. "
            f"Received: function={reprlib.repr(function)}"
        )
    _register(name, UserNorm(function), overwrite)
    return function


register_norm.__module__ = "keras_normopt"  # For pickles.


def register_normalizer(name, function):
    """Registers a function that returns the normalized gradient, as in 2018."""
    _register(name, UserNormalizer(function), overwrite=False)


def _register(name, norm, overwrite):
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a string. Received: name={reprlib.repr(name)}")
    if not name:
        raise ValueError("`name` must not be empty. Received: name=''")
    if name in _definitions.BUILT_IN:
        raise ValueError(
            f"`name` must not be that of a built-in norm. Received: name={name!r}. "
            f"Built in are {_listed(_definitions.BUILT_IN)}; choose another name."
        )
    with _registering:
        if name in _registered and not (overwrite or _same(_registered[name], norm)):
            raise ValueError(
                f"Another function is registered under name={name!r} already. Pass "
                "`overwrite=True` to replace it, or choose another name."
            )
        _registered[name] = norm


def _same(one, other):
    """Whether two norms have the same function, or one definition that ran twice."""
    if type(one) is not type(other):
        return False
    if one.function is other.function:
        return True
    try:
        return _definition_of(one.function) == _definition_of(other.function)
    except (AttributeError, ValueError):  # No plain function, or an empty closure cell.
        return False


def _definition_of(function):
    return (
        function.__module__,
        function.__qualname__,
        function.__code__,
        function.__defaults__,
        function.__kwdefaults__,
        # Captured values may be tensors, which do not compare to one truth value.
        [id(cell.cell_contents) for cell in function.__closure__ or ()],
    )


def get(identifier):
    """Returns the `Norm` that `norm=` stands for, or `None` for `None`.

    Args:
        identifier: A registered name, a callable, or `None`.

    Raises:
        ValueError: If it is none of these, or a name that is not registered.
    """
    if identifier is None:
        return None
    if isinstance(identifier, str):
        if identifier in _definitions.BUILT_IN:
            return _definitions.BUILT_IN[identifier].norm
        if identifier in _registered:
            return _registered[identifier]
    elif callable(identifier):
        norm = getattr(identifier, "norm", None)
        # `functools.wraps` copies the attribute to a function that does something else.
        is_built_in = isinstance(norm, BuiltIn) and norm.function is identifier
        return norm if is_built_in else UserNorm(identifier)
    raise ValueError(
        f"Unknown norm. Received: norm={reprlib.repr(identifier)}. Choose one of "
        f"{_listed(names())}, None for no normalization, or a function from a gradient "
        "to its scalar norm. `keras_normopt.register_norm` adds a name of your own. "
        "Call it in each process, before a file that uses the name is loaded."
    )


def serialize(identifier):
    """Returns the name under which `norm=` can be saved.

    Raises:
        ValueError: If it is a function that is not registered.
    """
    if not callable(identifier):
        return identifier
    for name, function in _definitions.BUILT_IN.items():
        if function == identifier:
            return name
    for name, norm in _registered.items():
        if norm.stands_for(identifier):
            return name
    raise ValueError(
        f"Cannot save norm={describe(identifier)}: only the name of a norm is "
        "saved, and this function has none. Register it with "
        "`keras_normopt.register_norm(name, function)`, here and before loading."
    )


def _listed(choices):
    return ", ".join(repr(name) for name in sorted(choices))
