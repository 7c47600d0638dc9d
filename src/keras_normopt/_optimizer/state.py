"""What is saved beyond what the base saves, and how it comes back."""

import warnings
from typing import Any

import keras
from keras import ops

from keras_normopt._optimizer.types import MixinBase


class Paths(MixinBase):
    """Keeps the paths under which the variables were first seen.

    Patterns to exclude and names of blocks go by them. `load_model` drops the name of
    a model from them, and patterns would come to mean something else.
    """

    _paths: Any = None
    exclude: Any
    track_norms: Any

    @classmethod
    def from_config(cls, config, custom_objects=None):
        paths = config.get("variable_paths")
        config = {k: v for k, v in config.items() if k != "variable_paths"}
        exclude = config.get("exclude")
        if exclude == "" or (isinstance(exclude, list | tuple) and "" in exclude):
            # Earlier versions took it. What it matched is excluded still.
            warnings.warn(
                f"{cls.__name__} was saved with an empty pattern, "
                f"exclude={exclude!r}, which excludes every variable: nothing "
                "is normalized. Make a new optimizer without it.",
                stacklevel=2,
            )
            config["exclude"] = [".*"]
        optimizer = super().from_config(config, custom_objects)
        optimizer._paths = paths and tuple(paths)
        return optimizer

    def _with_paths(self, config):
        """Adds the paths to a config, where something goes by them."""
        if self._paths and (self.exclude or self.track_norms):
            config["variable_paths"] = list(self._paths)
        return config

    def _paths_of(self, variables):
        """The paths that variables have, or had when the optimizer was saved."""
        paths = tuple(getattr(v, "path", v.name) for v in variables)
        saved = self._paths or paths
        if len(saved) == len(paths) and all(map(_are_one, saved, paths)):
            return saved
        if self.exclude:
            warnings.warn(
                f"{type(self).__name__} was saved with other variables than it is "
                f"built on, so that exclude={self.exclude} is searched for in the "
                "paths of the latter. Look whether the same ones are excluded.",
                stacklevel=4,
            )
        return paths


def _are_one(path, other):
    """Whether two paths differ at most by what stands before one of them."""
    return path == other or path.endswith(f"/{other}") or other.endswith(f"/{path}")


class OwnVariables(MixinBase):
    """Keeps variables apart from those of the base.

    So the slots of the base are loaded from a file that was saved with other options,
    and the other way round.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._own_variables: dict[str, Any] = {}
        self._not_saved: set[str] = set()

    def _add_own_variable(self, name, value=None, **arguments):
        """Adds a variable, the same on all replicas.

        Args:
            name: Name of the variable.
            value: Float or `None`. A float makes a scalar of this value, which is not
                saved, because the config holds the number.
            arguments: Arguments of `add_variable`.
        """
        if value is not None:
            self._not_saved.add(name)
            initializer = keras.initializers.Constant(value)
            arguments = {"shape": (), "dtype": "float32", "initializer": initializer}
        variable = self.add_variable(
            name=name, aggregation="only_first_replica", **arguments
        )
        self._own_variables[name] = variable
        return variable

    def _assign_own_variable(self, name, value):
        """Assigns a value to a variable, if there is one of this name."""
        if name in self._own_variables:
            self._own_variables[name].assign(value)

    @property
    def _base_variables(self) -> list[Any]:
        """The variables that the base would have by itself."""
        own = {id(v) for v in self._own_variables.values()}
        return [v for v in self.variables if id(v) not in own]

    def save_own_variables(self, store):
        of_base = self._base_variables
        own = {n: v for n, v in self._own_variables.items() if n not in self._not_saved}
        for key, variable in [*enumerate(of_base), *own.items()]:
            store[str(key)] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        of_base = self._base_variables
        stored = [key for key in store.keys() if key.isdecimal()]  # noqa: SIM118
        if len(stored) != len(of_base):
            super().load_own_variables(store)  # Which says what is wrong.
            return
        for i, variable in enumerate(of_base):
            variable.assign(store[str(i)])
        for name, variable in self._own_variables.items():
            if name in store and tuple(store[name].shape) == tuple(variable.shape):
                variable.assign(store[name])
