"""Reads the argument `step_size`, and finds the factors of variables."""

import dataclasses
import math
import reprlib
from typing import Any

from keras import ops

from keras_normopt._blocks.patterns import (
    check_pattern,
    first_match,
    warn_of_unused_patterns,
)
from keras_normopt._transforms.config import (
    checked_float,
    config_of,
    find_object,
    schedule_config,
    schedule_of,
)
from keras_normopt._transforms.step_sizes import GradientCorrelation, WeightNorm

_CLASSES = {cls.name: cls for cls in (WeightNorm, GradientCorrelation)}


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """The factor that patterns give to a variable's learning rate.

    Attributes:
        constant: Float, the product of all constant factors.
        schedules: Tuple of `LearningRateSchedule` objects. Their values multiply
            `constant`.
    """

    constant: float
    schedules: tuple[Any, ...] = ()

    @property
    def key(self) -> tuple[float, tuple[int, ...]]:
        """A key that equal multipliers share. It needs no hashable schedules."""
        return self.constant, tuple(map(id, self.schedules))

    def at(self, iterations: Any) -> Any:
        """Returns the factor after a number of steps, a float or a scalar tensor.

        Negative values of schedules count as 0.
        """
        factor: Any = self.constant
        for schedule in self.schedules:
            value = ops.cast(schedule(iterations), "float32")
            factor = factor * ops.where(value < 0, ops.zeros_like(value), value)
        return factor

    def __str__(self) -> str:
        named = [type(schedule).__name__ for schedule in self.schedules]
        if self.constant != 1 or not named:
            named.insert(0, f"{self.constant:g}")
        return " · ".join(named)


def get(identifier: Any) -> Any:
    """Converts the argument `step_size` to objects.

    Args:
        identifier: `None`; a name or an object; a dictionary from regular expressions
            to factors; a list of these; or a result of `serialize`.

    Returns:
        The same value with objects in place of names and configs.

    Raises:
        TypeError: If a key of a dictionary is not a string.
        ValueError: If `identifier` is none of these, or if the arguments of an object
            are invalid.
    """
    if identifier is None:
        return None
    if not isinstance(identifier, list | tuple):
        return _get_part(identifier)
    parts = [_get_part(part) for part in identifier]
    objects = [part for part in parts if not isinstance(part, dict)]
    if not parts or len(objects) > 1:
        raise ValueError(
            "A list in `step_size` must not be empty. It may hold dictionaries, and at "
            f"most one object or name. Received: step_size={reprlib.repr(identifier)}"
        )
    return parts


def _get_part(identifier):
    patterns = identifier
    pairs = identifier.get("patterns") if isinstance(identifier, dict) else None
    if isinstance(pairs, list) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):  # From a config.
        patterns = dict(pairs)
    elif isinstance(identifier, dict) and set(identifier) == {"name", "config"}:
        patterns = None
    if isinstance(patterns, dict):
        return {p: _factor(p, f, identifier) for p, f in patterns.items()}
    found = find_object(identifier, "step_size", _CLASSES)
    if found is None:
        raise ValueError(
            f"`step_size` must be None, {', '.join(map(repr, _CLASSES))}, an object of "
            "`keras_normopt.step_sizes`, a dictionary from regular expressions to "
            "factors, or a list of these. "
            f"Received: step_size={reprlib.repr(identifier)}"
        )
    return found


def _factor(pattern, factor, received):
    check_pattern("step_size", pattern, received)
    schedule = schedule_of(factor)
    if schedule is not None:
        return schedule
    try:
        return checked_float(factor, "factor", at_least=0)
    except ValueError as error:
        raise ValueError(
            "The factors of `step_size` must be finite floats of at least 0 in the "
            "range of float32, or `LearningRateSchedule` objects. "
            f"Received: step_size={{{pattern!r}: {reprlib.repr(factor)}}}"
        ) from error


def serialize(step_size: Any) -> Any:
    """Returns a JSON-compatible config. `get` makes an equal value from it."""
    if isinstance(step_size, list):
        return [serialize(part) for part in step_size]
    if isinstance(step_size, dict):
        # Pairs, because some file formats sort the keys of dictionaries.
        pairs = [
            [pattern, factor if isinstance(factor, float) else schedule_config(factor)]
            for pattern, factor in step_size.items()
        ]
        return {"patterns": pairs}
    return config_of(step_size)


def patterns_of(step_size: Any) -> list[dict[str, Any]]:
    """Returns the dictionaries in a result of `get`."""
    parts = step_size if isinstance(step_size, list) else [step_size]
    return [part for part in parts if isinstance(part, dict)]


def object_of(step_size: Any) -> Any:
    """Returns the object in a result of `get`. `None` if there is no object."""
    parts = step_size if isinstance(step_size, list) else [step_size]
    return next((part for part in parts if not isinstance(part, dict)), None)


def multipliers(step_size: Any, paths: Any) -> dict[int, Multiplier]:
    """Returns a dict from the indices of matched variables to their `Multiplier`.

    Args:
        step_size: A result of `get`.
        paths: List of the paths of the variables.
    """
    dictionaries = patterns_of(step_size)
    for patterns in dictionaries:
        warn_of_unused_patterns("step_size", patterns, paths, stacklevel=6)
    result = {}
    for number, path in enumerate(paths):
        matches = [(patterns, first_match(patterns, path)) for patterns in dictionaries]
        factors = [patterns[match] for patterns, match in matches if match is not None]
        if factors:
            constants = [f for f in factors if isinstance(f, float)]
            schedules = [f for f in factors if not isinstance(f, float)]
            constant = checked_float(
                math.prod(constants), f"step_size of {path!r}", at_least=0
            )
            result[number] = Multiplier(constant, tuple(schedules))
    return result
