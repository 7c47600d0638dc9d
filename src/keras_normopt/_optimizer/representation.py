"""Shows an optimizer as the call that makes it."""

import inspect
import re
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_normopt._transforms.config import Configured

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def represent(optimizer: Any) -> str:
    """Returns the call that makes an optimizer, without arguments that are defaults.

    The function never raises an error, because debuggers and error messages use it. If
    the optimizer is incomplete, or while a backend traces a step, arguments may be
    unknown. Then the function returns the name of the class in angle brackets.
    """
    name = type(optimizer).__name__
    try:
        with warnings.catch_warnings():
            # Keras warns when it serializes a lambda, but nothing is saved here.
            warnings.simplefilter("ignore")
            return _call(name, _changed(optimizer))
    except Exception:
        return f"<{name}>"


def _changed(optimizer):
    """Returns the text of each argument that differs from its default, by name."""
    defaults = _defaults(type(optimizer))
    try:
        config = optimizer.get_config()
    except ValueError:  # A function that is not registered cannot be saved.
        config = {n: getattr(optimizer, n) for n in defaults if hasattr(optimizer, n)}
    changed = {}
    for name, default in defaults.items():
        if name not in config:
            continue
        value = config[name]
        if name in optimizer.OPTIONS:
            value = getattr(optimizer, name)
            default = optimizer._kept(name, default)
        elif name == "learning_rate":
            value = _rate(optimizer, value)
        is_automatic = name == "name" and _is_automatic(value, type(optimizer))
        if not _is_default(value, default) and not is_automatic:
            changed[name] = _text(value)
    return changed


def _defaults(cls):
    """Returns the defaults of all arguments of a class and its bases, by name."""
    defaults: dict[str, Any] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind not in _VARIABLE:
                defaults.setdefault(parameter.name, parameter.default)
        if inspect.Parameter.VAR_KEYWORD not in [p.kind for p in parameters]:
            break  # This class passes no other keywords to its bases.
    return defaults


def _is_default(value, default):
    if isinstance(default, str) and isinstance(value, Configured):
        # The name stands for an object with its own defaults.
        return getattr(value, "name", None) == default and not _changed_of(value)
    is_empty = default is None and isinstance(value, list) and not value
    return is_empty or _text(value) == _text(default)


def _changed_of(configured):
    """Returns the text of each argument of an object that differs from its default."""
    defaults = _defaults(type(configured))
    changed = {}
    for name, value in configured.get_config().items():
        if isinstance(configured, Configured):
            value = getattr(configured, name)
        if name not in defaults or not _is_default(value, defaults[name]):
            changed[name] = _text(value)
    return changed


def _is_automatic(name, cls):
    """Returns whether Keras may have made the name, such as `normalized_sgd_1`."""
    return re.sub(r"_\d+$", "", name).replace("_", "") == cls.__name__.lower()


def _rate(optimizer, value):
    kept = optimizer._learning_rate
    if not isinstance(kept, keras.Variable):  # A schedule, or a function.
        return kept
    # Keras keeps 0.01 in float32, and reports 0.009999999776482582.
    return float(str(np.float32(ops.convert_to_numpy(value))))


def _text(value):
    """Returns the code that makes a value, or else the value's `repr`."""
    if isinstance(value, dict):
        items = (f"{key!r}: {_text(one)}" for key, one in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, tuple):
        comma = "," if len(value) == 1 else ""
        return f"({', '.join(map(_text, value))}{comma})"
    has_own_text = any("__repr__" in vars(c) for c in type(value).__mro__[:-1])
    is_plain = hasattr(value, "get_config") and not has_own_text
    if is_plain or isinstance(value, Configured):
        return _call(type(value).__name__, _changed_of(value))
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    return repr(value)


def _call(name, arguments):
    return f"{name}({', '.join(f'{k}={text}' for k, text in arguments.items())})"
