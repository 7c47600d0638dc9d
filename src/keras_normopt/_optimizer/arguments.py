"""Checks the keyword arguments that the package adds."""

import numbers
import re
import reprlib
from typing import Any

from keras_normopt._blocks.patterns import check_pattern


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises a `ValueError` if a value is not one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}. "
            f"Received: {name}={reprlib.repr(value)}"
        )


def check_flag(name: str, value: Any) -> None:
    """Raises a `ValueError` if a value is not a boolean."""
    if not isinstance(value, bool):
        raise ValueError(
            f"`{name}` must be True or False. Received: {name}={reprlib.repr(value)}"
        )


def check_count(name: str, value: Any) -> None:
    """Raises a `ValueError` if a value is not an integer from 1 to 2**31 - 1."""
    is_count = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_count or not 1 <= value < 2**31:
        raise ValueError(
            f"`{name}` must be an integer from 1 to 2**31 - 1. "
            f"Received: {name}={reprlib.repr(value)}"
        )


def check_patterns(exclude: Any) -> tuple[str, ...]:
    """Returns the argument `exclude` as a tuple.

    Raises:
        TypeError: If `exclude` is not a string, or a list or tuple of strings.
        ValueError: If a string is empty, or is not a regular expression.
    """
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    problem = "`exclude` must be a regular expression, or a list or tuple of them. "
    received = f"Received: exclude={reprlib.repr(exclude)}"
    if not isinstance(patterns, list | tuple):
        raise TypeError(problem + received)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(problem + received)
        if not pattern:
            raise ValueError(
                f"`exclude` must not contain an empty pattern. {received}. It matches "
                "every path, and nothing would be normalized. Pass exclude=() to "
                "exclude nothing, or norm=None to normalize nothing."
            )
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{problem}{received}: {error}") from error
    return tuple(patterns)


def read_only(name: str, doc: str) -> Any:
    """Returns a property for an argument that cannot change.

    Args:
        name: Name of the argument.
        doc: Docstring of the property, without a colon. Sphinx reads text before a
            colon as a type.
    """

    def get(optimizer: Any) -> Any:
        return _copy(getattr(optimizer, f"_{name}"))

    def refuse(optimizer: Any, value: Any) -> None:
        raise AttributeError(
            f"`{name}` of {type(optimizer).__name__} cannot change. "
            f"Received: {name}={reprlib.repr(value)}. Make a new optimizer."
        )

    return property(get, refuse, doc=doc)


def _copy(value: Any) -> Any:
    """Copies dictionaries and lists, so that users cannot change the original."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, list):
        return [_copy(one) for one in value]
    return value


def refuse_after_build(optimizer: Any, name: str, value: Any, advice: str) -> None:
    """Raises a `ValueError` for an argument that cannot change after `build`.

    Args:
        optimizer: The optimizer.
        name: Name of the argument.
        value: The new value, for the message.
        advice: Text that the message adds after "built".
    """
    raise ValueError(
        f"`{name}` of {type(optimizer).__name__} cannot change after the optimizer is "
        f"built{advice}. It is {reprlib.repr(getattr(optimizer, name))}. "
        f"Received: {name}={reprlib.repr(value)}. Make a new optimizer, and compile "
        "the model with it."
    )


def check_axes(axes: Any) -> dict[str, Any] | None:
    """Returns the argument `axes` as a dictionary that JSON can hold.

    Raises:
        TypeError: If `axes` is not a dictionary, or a key is not a string.
        ValueError: If a pattern is not a regular expression, or a value is wrong.
    """
    if axes is None:
        return None
    if isinstance(axes, list) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in axes
    ):  # From a config.
        axes = dict(axes)
    if not isinstance(axes, dict):
        raise TypeError(
            "`axes` must be a dictionary from regular expressions to axes. "
            f"Received: axes={reprlib.repr(axes)}"
        )
    checked = {}
    for pattern, value in axes.items():
        check_pattern("axes", pattern, axes)
        checked[pattern] = _checked_axes(pattern, value)
    return checked


def _checked_axes(pattern: str, value: Any) -> Any:
    if isinstance(value, str) and value in ("vector", "embedding"):
        return value
    is_valid = isinstance(value, list | tuple) and len(value) in (2, 3)
    if is_valid:
        inputs, outputs, *parts = value
        is_valid = all(
            isinstance(group, list | tuple) and all(type(i) is int for i in group)
            for group in (inputs, outputs)
        ) and all(type(number) is int and number > 0 for number in parts)
    if not is_valid:
        raise ValueError(
            "The values of `axes` must be (inputs, outputs), (inputs, outputs, parts), "
            "'vector' or 'embedding'. Inputs and outputs are tuples of integers, and "
            "parts is a positive integer. "
            f"Received: axes={{{pattern!r}: {reprlib.repr(value)}}}"
        )
    return [list(inputs), list(outputs), *parts]
