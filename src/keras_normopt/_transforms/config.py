"""Checks, shows and serializes the objects in options, such as `WeightNorm`."""

import numbers
import reprlib
from typing import Any

import keras
import numpy as np

_LARGEST = float(np.finfo("float32").max)


class Configured:
    """An object whose `repr` shows its arguments, which never change."""

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
    """Returns the object for the value of an argument, or `None` if there is none.

    Args:
        identifier: An object, a name, or a result of `config_of`.
        argument: Name of the argument.
        classes: Dict from names to classes.

    Raises:
        ValueError: If the arguments of the object are invalid.
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
            f"Cannot make {argument}={name!r} from its config: {error}"
        ) from error


def config_of(configured: Any) -> dict[str, Any] | None:
    """Returns a JSON-compatible config, from which `find_object` makes an equal one."""
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

    Raises:
        ValueError: If it is not a finite real number within float32 and the bounds.
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
    """Returns the `LearningRateSchedule` for the value of an argument, or `None`.

    Args:
        value: A schedule, or a result of `schedule_config`.

    Raises:
        ValueError: If a config cannot be loaded.
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
    """Returns a config from which `schedule_of` makes an equal schedule."""
    return keras.optimizers.schedules.serialize(schedule)
