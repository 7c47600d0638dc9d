"""Checks and saves the values of arguments, such as numbers and `WeightNorm`."""

import numbers
import reprlib
from typing import Any

import keras
import numpy as np

_LARGEST = float(np.finfo("float32").max)


class Configured:
    """The base class of `WeightNorm` and others. Its arguments never change."""

    def __setattr__(self, name, value):
        # Compiled steps would not see the change.
        if name in vars(self):
            raise AttributeError(
                f"`{name}` of {type(self).__name__} cannot change. "
                f"Received: {name}={reprlib.repr(value)}. Make a new object, and a new "
                "optimizer with it."
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({arguments})"

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, by name."""
        raise NotImplementedError


def find_object(identifier: Any, argument: str, classes: dict[str, Any]) -> Any:
    """Converts the value of an argument to an object.

    Args:
        identifier: The value. It is an object of one of the classes, the name of a
            class, or a result of `config_of`.
        argument: Name of the argument, for the error message.
        classes: Dict from names to classes.

    Returns:
        The object. `None` if the value has another form.

    Raises:
        ValueError: If the class rejects the arguments in the config.
    """
    if isinstance(identifier, tuple(classes.values())):
        return identifier
    name, arguments = identifier, {}
    if isinstance(identifier, dict) and set(identifier) == {"name", "config"}:
        name, arguments = identifier["name"], identifier["config"]
    if not (isinstance(name, str) and name in classes and isinstance(arguments, dict)):
        return None
    try:
        return classes[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Cannot make the object {name!r}: {error}. "
            f"Received: {argument}={identifier!r}"
        ) from error


def config_of(configured: Any) -> dict[str, Any] | None:
    """Returns a JSON-compatible config. `find_object` makes an equal object from it."""
    if configured is None:
        return None
    return {"name": configured.name, "config": configured.get_config()}


def is_real(value: Any) -> bool:
    """Returns whether a value is a real number, not a boolean."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def checked_float(
    value: Any,
    name: str,
    *,
    above: float | None = None,
    below: float | None = None,
    at_least: float | None = None,
    up_to: float | None = None,
) -> float:
    """Checks a number, and returns it as a float.

    Args:
        value: The number.
        name: Name of the argument, for the error message.
        above: The number must be larger than this.
        below: The number must be smaller than this.
        at_least: The number must not be smaller than this.
        up_to: The number must not be larger than this.

    Raises:
        ValueError: If the value is not a real number, is not finite, or is outside the
            bounds or the range of float32.
    """
    is_valid = (
        is_real(value)
        and -_LARGEST <= value <= _LARGEST
        and (above is None or value > above)
        and (below is None or value < below)
        and (at_least is None or value >= at_least)
        and (up_to is None or value <= up_to)
    )
    if not is_valid:
        bounds = {
            "above": above,
            "below": below,
            "of at least": at_least,
            "of at most": up_to,
        }
        text = " and ".join(f"{k} {v}" for k, v in bounds.items() if v is not None)
        if below is None and up_to is None:
            text += ", in the range of float32"
        raise ValueError(
            f"`{name}` must be a finite float {text}. "
            f"Received: {name}={reprlib.repr(value)}"
        )
    return float(value)


def schedule_of(value: Any) -> Any:
    """Converts the value of an argument to a `LearningRateSchedule`.

    Args:
        value: A schedule, or a result of `schedule_config`.

    Returns:
        The schedule. `None` if the value is neither.

    Raises:
        ValueError: If Keras cannot load the config.
    """
    schedules = keras.optimizers.schedules
    if isinstance(value, schedules.LearningRateSchedule):
        return value
    if not isinstance(value, dict) or "class_name" not in value:
        return None
    try:
        schedule = schedules.deserialize(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{reprlib.repr(value)} is not a `LearningRateSchedule` config: {error}"
        ) from error
    return schedule if isinstance(schedule, schedules.LearningRateSchedule) else None


def schedule_config(schedule: Any) -> Any:
    """Returns a config. `schedule_of` makes an equal schedule from it."""
    return keras.optimizers.schedules.serialize(schedule)
