"""Reads the argument `direction`, and finds the direction of each variable."""

import re
import reprlib
import warnings
from typing import Any

from keras_normopt._blocks.patterns import (
    check_pattern,
    first_match,
    warn_of_unused_patterns,
)
from keras_normopt._transforms.config import config_of
from keras_normopt._transforms.direction import get_direction


def get(identifier: Any) -> Any:
    """Converts the argument `direction` to objects.

    Args:
        identifier: `None`, a `Direction`, its name, or a result of `serialize`. Or a
            dictionary from regular expressions to `None`, objects and names.

    Returns:
        `None` or a `Direction`. For a dictionary, a dictionary from the same regular
        expressions to `None` and `Direction` objects.

    Raises:
        TypeError: If a key of the dictionary is not a string.
        ValueError: If `identifier` is none of these, if a key is not a regular
            expression, or if the arguments of a direction are invalid.
    """
    patterns = identifier
    pairs = identifier.get("patterns") if isinstance(identifier, dict) else None
    if isinstance(pairs, list):
        patterns = dict(pairs)
    elif isinstance(identifier, dict) and set(identifier) == {"name", "config"}:
        patterns = None
    if not isinstance(patterns, dict):
        return get_direction(identifier, "direction")
    if not patterns:
        raise ValueError(
            "`direction` must not be an empty dictionary. Received: direction={}. Add "
            "a pattern, or pass None for no direction."
        )
    for pattern in patterns:
        check_pattern("direction", pattern, identifier)
    return {p: get_direction(d, "direction") for p, d in patterns.items()}


def serialize(direction: Any) -> Any:
    """Returns a JSON-compatible config. `get` makes an equal direction from it."""
    if isinstance(direction, dict):
        # Pairs, because some file formats sort the keys of dictionaries.
        return {"patterns": [[p, config_of(d)] for p, d in direction.items()]}
    return config_of(direction)


def direction_of_path(direction: Any, path: str) -> Any:
    """Returns the direction for a variable, or `None` for its raw gradient.

    Args:
        direction: A result of `get`.
        path: The path of the variable.
    """
    if not isinstance(direction, dict):
        return direction
    pattern = first_match(direction, path)
    return None if pattern is None else direction[pattern]


def resolve(direction: Any, paths: Any, axes: list[Any]) -> list[Any]:
    """Returns a list with the direction of each variable, or `None` for raw gradients.

    Args:
        direction: A result of `get`.
        paths: List of the variables' paths. It has `None` for a variable in no block,
            whose gradient stays raw.
        axes: List of their `Axes`.
    """
    directions = [
        None if path is None else direction_of_path(direction, path) for path in paths
    ]
    result = [d and d.of_role(a.role) for d, a in zip(directions, axes, strict=True)]
    if isinstance(direction, dict):
        roles = zip(paths, axes, strict=True)
        _warn_of_patterns(direction, {p: a.role for p, a in roles if p is not None})
    return result


def _warn_of_patterns(direction, roles):
    """Warns of patterns without effect, and of matrices that match no pattern.

    Args:
        direction: Dictionary from patterns to directions.
        roles: Dictionary from the paths of the variables to the roles of their axes.
    """
    warn_of_unused_patterns("direction", direction, roles, stacklevel=6)
    matches = {path: first_match(direction, path) for path in roles}
    for pattern, of_pattern in direction.items():
        matched = [path for path, first in matches.items() if first == pattern]
        is_for_all = all(re.search(pattern, path) for path in roles)
        if not (matched and of_pattern) or is_for_all:
            continue
        if not any(of_pattern.of_role(roles[path]) for path in matched):
            warnings.warn(
                f"direction={{{pattern!r}: {of_pattern}}} does not change "
                f"{reprlib.repr(matched)}. These are vectors or embeddings, so they "
                "keep their raw gradients. To give them a direction, set its `vectors` "
                "or `embeddings`.",
                stacklevel=6,
            )
    without = [p for p, first in matches.items() if not first and roles[p] != "vector"]
    if without:
        warnings.warn(
            f"`direction` has no pattern for {reprlib.repr(without)}. These variables "
            'keep their raw gradients. Add a last pattern, ".*", for all other '
            "variables. Its value is a direction, or None for raw gradients.",
            stacklevel=6,
        )
