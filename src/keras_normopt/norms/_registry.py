"""Keeps the names that `norm=` accepts, built-in or registered by users."""

import functools
import reprlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar, overload

from keras_normopt.norms import _definitions
from keras_normopt.norms._overflow import BuiltIn
from keras_normopt.norms._user_norms import UserNorm, UserNormalizer, function_name

_Norm = TypeVar("_Norm", bound=Callable[[Any], Any])

_registered: dict[str, UserNorm] = {}
_registry_lock = threading.Lock()


def names() -> list[str]:
    """Returns all names that `norm=` accepts, built-in and registered, sorted."""
    return sorted(_definitions.BUILT_IN | _registered)


@overload
def register_norm(name: str, function: _Norm, *, overwrite: bool = ...) -> _Norm: ...
@overload
def register_norm(
    name: str, function: None = ..., *, overwrite: bool = ...
) -> Callable[[_Norm], _Norm]: ...
def register_norm(name, function=None, *, overwrite=False):
    """Registers your own norm under a name, for `norm=` and for saved files.

    A saved optimizer contains only the name. Register the norm under this name in each
    process, before you load the file or unpickle the optimizer.

    Args:
        name: String, not empty, and not the name of a built-in norm.
        function: Callable from one gradient to its norm, a scalar tensor. The gradient
            has any shape, in float32 (float64 for a float64 gradient). Use only
            `keras.ops`, to support every backend and compiled steps. If omitted,
            `register_norm` is a decorator.
        overwrite: Boolean, whether to replace another function under this name.
            Defaults to `False`. To run the same definition again, as in a notebook
            cell, you need no `overwrite`.

    Returns:
        The function, unchanged.

    Raises:
        TypeError: If the name is not a string, or the function is not callable.
        ValueError: If the name is empty or built-in. Also if another function has the
            name and `overwrite` is `False`.

    Example:
        >>> import keras_normopt
        >>> from keras import ops
        >>> @keras_normopt.register_norm("median")
        ... def median(gradient):
        ...     return ops.median(ops.abs(gradient))
        >>> keras_normopt.NormalizedSGD(norm="median")
        NormalizedSGD(norm='median')
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
    """Registers a function that returns the normalized gradient, for `compat`."""
    _register(name, UserNormalizer(function), overwrite=False)


def _register(name, norm, overwrite):
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a string. Received: name={reprlib.repr(name)}")
    if not name:
        raise ValueError("`name` must not be empty. Received: name=''")
    if name in _definitions.BUILT_IN:
        raise ValueError(
            f"`name` must not name a built-in norm. Received: name={name!r}. The "
            f"built-in norms are {_quoted(_definitions.BUILT_IN)}. Choose another name."
        )
    with _registry_lock:
        if name in _registered and not (
            overwrite or _is_same_norm(_registered[name], norm)
        ):
            raise ValueError(
                f"Another function is registered under name={name!r} already. Pass "
                "`overwrite=True` to replace it, or choose another name."
            )
        _registered[name] = norm


def _is_same_norm(one, other):
    """Returns whether two norms have the same function, or equal definitions."""
    if type(one) is not type(other):
        return False
    if one.function is other.function:
        return True
    try:
        return _definition_of(one.function) == _definition_of(other.function)
    except (AttributeError, ValueError):  # Not a function, or an empty closure cell.
        return False


def _definition_of(function):
    return (
        function.__module__,
        function.__qualname__,
        function.__code__,
        function.__defaults__,
        function.__kwdefaults__,
        # By id, because comparing captured tensors gives no single boolean.
        [id(cell.cell_contents) for cell in function.__closure__ or ()],
    )


def get(identifier):
    """Converts the argument `norm` to a `Norm`. `None` stays `None`.

    Args:
        identifier: A registered name, a callable, or `None`.

    Raises:
        ValueError: If `identifier` is none of these, or a name that is not registered.
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
        # `functools.wraps` copies the attribute to other functions.
        is_built_in = isinstance(norm, BuiltIn) and norm.function is identifier
        return norm if is_built_in else UserNorm(identifier)
    raise ValueError(
        f"Unknown norm. Received: norm={reprlib.repr(identifier)}. Choose one of "
        f"{_quoted(names())}, None for no normalization, or a function from a gradient "
        "to its scalar norm. `keras_normopt.register_norm` adds a name of your own. "
        "Call it in each process, before you load a file that uses the name."
    )


def serialize(identifier):
    """Returns the name under which the argument `norm` is saved.

    Raises:
        ValueError: If `identifier` is a function that is not registered.
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
        f"Cannot save norm={function_name(identifier)}: only the name of a norm is "
        "saved, and this function has none. Register it with "
        "`keras_normopt.register_norm(name, function)`, here and before loading."
    )


def _quoted(choices):
    return ", ".join(repr(name) for name in sorted(choices))
