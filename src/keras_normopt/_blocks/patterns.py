"""Checks regular expressions, and finds them in the paths of variables."""

import re
import reprlib
import warnings
from typing import Any


def check_pattern(name: str, pattern: Any, received: Any) -> None:
    """Raises an error if a key of a dictionary is not a regular expression.

    Args:
        name: The name of the argument that holds the dictionary.
        pattern: The key.
        received: The dictionary, for the error message.
    """
    problem = f"The keys of `{name}` must be regular expressions. "
    text = f"Received: {name}={reprlib.repr(received)}"
    if not isinstance(pattern, str):
        raise TypeError(problem + text)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{problem}{text}: {error}") from error


def first_match(patterns: Any, path: str) -> str | None:
    """Returns the first pattern that is found in a path, or `None`."""
    return next((p for p in patterns if re.search(p, path)), None)


def warn_of_unused_patterns(
    name: str, patterns: Any, paths: Any, stacklevel: int
) -> None:
    """Warns of patterns that are not the first match of any path.

    A pattern that matches every path causes no warning, because it serves as a default.

    Args:
        name: The name of the argument.
        patterns: The patterns in order. For each path, the first match counts.
        paths: List of the paths.
        stacklevel: As for `warnings.warn`, but 1 is the caller of this function.
    """
    used = {first_match(patterns, path) for path in paths}
    for pattern in patterns:
        matched = [path for path in paths if re.search(pattern, path)]
        if pattern in used or len(matched) == len(paths):
            continue
        why = f"matches none of the paths {reprlib.repr(list(paths))}"
        if matched:
            why = (
                "has no effect, because only the first match counts. An earlier "
                f"pattern also matches {reprlib.repr(matched)}"
            )
        warnings.warn(
            f"`{name}`: the pattern {pattern!r} {why}.", stacklevel=stacklevel + 1
        )
