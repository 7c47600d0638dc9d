"""What `direction=` stands for, and what it means for each variable."""

import re
import reprlib
import warnings
from typing import Any

from keras_normopt._transforms.config import Configured, check_pattern, config_of
from keras_normopt._transforms.direction import get_one


class ByPattern(Configured):
    """The direction of each variable by the first pattern that its path contains.

    Args:
        patterns: List of pairs of a regular expression and a direction or `None`.
    """

    def __init__(self, patterns):
        self.patterns = patterns

    def get_config(self):
        """The arguments, by name."""
        return {"patterns": [[p, config_of(d)] for p, d in self.patterns]}

    def of(self, path):
        """Returns the direction for a path, or `None`."""
        return next((d for p, d in self.patterns if re.search(p, path)), None)


def get(identifier: Any) -> Any:
    """Returns what `direction=` stands for.

    Args:
        identifier: `None`, a name, an object, what `serialize` made of one, or a
            dictionary from regular expressions to these.

    Raises:
        TypeError: If a key of the dictionary is not a string.
        ValueError: If it is none of these, or its arguments are wrong.
    """
    if isinstance(identifier, ByPattern):
        return identifier
    patterns = identifier
    pairs = identifier.get("patterns") if isinstance(identifier, dict) else None
    if isinstance(pairs, list):
        patterns = dict(pairs)
    elif isinstance(identifier, dict) and set(identifier) == {"name", "config"}:
        patterns = None
    if not isinstance(patterns, dict):
        return get_one(identifier, "direction")
    if not patterns:
        raise ValueError("`direction` must not be an empty dictionary.")
    for pattern in patterns:
        check_pattern("direction", pattern, identifier)
    return ByPattern([(p, get_one(d, "direction")) for p, d in patterns.items()])


def serialize(direction: Any) -> Any:
    """Returns what `get` makes the same direction of, in types that JSON has."""
    if isinstance(direction, ByPattern):
        return direction.get_config()
    return config_of(direction)


def of_path(direction: Any, path: str) -> Any:
    """Returns the direction for a path, or `None`, of what `get` returned."""
    return direction.of(path) if isinstance(direction, ByPattern) else direction


def resolve(direction: Any, paths: Any, axes: list[Any]) -> list[Any]:
    """Returns what acts on each variable, or `None`.

    Args:
        direction: What `get` returned.
        paths: List of the paths of the variables, `None` for those without direction.
        axes: List of their `Axes`.
    """
    if isinstance(direction, ByPattern):
        roles = zip(paths, axes, strict=True)
        _warn_of_patterns(direction, {p: a.role for p, a in roles if p is not None})
    found = [None if path is None else of_path(direction, path) for path in paths]
    return [d and d.of_role(a.role) for d, a in zip(found, axes, strict=True)]


def _warn_of_patterns(direction, roles):
    """Warns of patterns without variables, and of kernels without a pattern.

    Args:
        direction: A `ByPattern`.
        roles: Dict from the paths of the variables to the roles of their axes.
    """
    left = list(roles)
    for pattern, _ in direction.patterns:
        matched = [path for path in left if re.search(pattern, path)]
        left = [path for path in left if path not in matched]
        # A last pattern for all others may find none left.
        is_for_all = all(re.search(pattern, path) for path in roles)
        if not matched and not is_for_all:
            warnings.warn(
                f"direction={{{pattern!r}: …}} matches none of the variables that are "
                "not excluded or matched by a pattern before it. Paths are "
                f"{reprlib.repr(list(roles))}.",
                stacklevel=6,
            )
    without = [path for path in left if roles[path] != "vector"]
    if without:
        warnings.warn(
            f"`direction` has no pattern for {reprlib.repr(without)}. These variables "
            'step with their raw gradients. Add a last pattern, ".*", for all others: '
            "a direction, or None to keep them as they are.",
            stacklevel=6,
        )
