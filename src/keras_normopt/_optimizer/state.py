"""Saves and loads the state that the base optimizer does not save."""

import re
import warnings
from typing import Any

import keras
from keras import ops

from keras_normopt._blocks.arrangement import Axes, dense_axes
from keras_normopt._blocks.axes import axes_from_user, find
from keras_normopt._optimizer.types import MixinBase
from keras_normopt._transforms.step_size_argument import patterns_of


class Paths(MixinBase):
    """Keeps the paths and axes that variables had when the optimizer was first built.

    Patterns and names of blocks depend on paths. `load_model` drops the name of a model
    from paths, so patterns could match other variables.
    """

    _paths: Any = None
    #: The `Axes` of each variable. `None` before `build`, and if no option uses axes.
    _variable_axes: Any = None
    #: The layers of variables with guessed axes, by the variables' indices.
    _guessed: Any = ()
    #: The axes and shapes of all variables in a loaded file, and whether the version
    #: that saved the file had axes.
    _saved_axes: Any = None
    _saved_shapes: Any = None
    _knows_axes = True
    _paths_match = True
    exclude: Any
    track_norms: Any
    step_size: Any
    axes: Any
    scope: Any
    centralize: Any

    @classmethod
    def from_config(cls, config, custom_objects=None):
        own = ("variable_paths", "variable_axes", "variable_shapes")
        paths, axes, shapes = map(config.get, own)
        earlier_options = {"norm", "scope", "exclude", "apply_to", "centralize"}
        # A whole config without `axes` is from an earlier version.
        knows_axes = "axes" in config or not earlier_options <= set(config)
        config = {k: v for k, v in config.items() if k not in own}
        exclude = config.get("exclude")
        if exclude == "" or (isinstance(exclude, list | tuple) and "" in exclude):
            # Earlier versions allowed it. It still excludes every variable.
            warnings.warn(
                f"{cls.__name__} was saved with an empty pattern, "
                f"exclude={exclude!r}, which excludes every variable: nothing "
                "is normalized. Make a new optimizer without this pattern.",
                stacklevel=2,
            )
            config["exclude"] = [".*"]
        with keras.saving.CustomObjectScope(custom_objects or {}):
            optimizer = super().from_config(config, custom_objects)
        optimizer._paths = paths and tuple(paths)
        optimizer._knows_axes = knows_axes
        if axes and shapes:
            optimizer._saved_axes = [Axes.of_config(one) for one in axes]
            optimizer._saved_shapes = [tuple(shape) for shape in shapes]
        return optimizer

    def _add_paths(self, config):
        """Adds paths, axes and shapes to a config, if an option uses them."""
        if not self._knows_axes:
            del config["axes"]
        axes = self._variable_axes or self._saved_axes
        patterns = patterns_of(self.step_size)
        if self._paths and (self.exclude or self.track_norms or axes or patterns):
            config["variable_paths"] = list(self._paths)
        if axes and self._knows_axes:
            config["variable_axes"] = [one.get_config() for one in axes]
            config["variable_shapes"] = [list(shape) for shape in self._saved_shapes]
        return config

    def _paths_of(self, variables):
        """Returns the saved paths if they fit the variables, or the current paths."""
        paths = tuple(getattr(v, "path", v.name) for v in variables)
        saved = self._paths or paths
        if len(saved) == len(paths) and all(map(_is_same_path, saved, paths)):
            return saved
        self._paths_match = False
        used = {"exclude": self.exclude, "step_size": patterns_of(self.step_size)}
        for name, patterns in used.items():
            if patterns:
                warnings.warn(
                    f"{type(self).__name__} was saved with other variables than it is "
                    f"built on now. It searches for {name}={patterns} in the new "
                    "paths. Check that the patterns match the right variables.",
                    stacklevel=4,
                )
        return paths

    def _axes_of(self, variables):
        """Returns the saved axes if they fit the variables, or finds the axes."""
        shapes = [tuple(v.shape) for v in variables]
        has_saved_axes = self._saved_axes and self._paths_match
        has_saved_axes = has_saved_axes and self._saved_shapes == shapes
        self._saved_shapes = shapes
        if not self._knows_axes:
            # The axes that the earlier version used, so that running norms belong to
            # the same units.
            return [dense_axes(shape) for shape in shapes]
        if has_saved_axes:
            # The user may have set `axes` after the file was saved.
            return [
                axes_from_user(self.axes, path, shape) or saved
                for path, shape, saved in zip(
                    self._paths, shapes, self._saved_axes, strict=True
                )
            ]
        found, self._guessed = find(variables, self._paths, self.axes)
        if self._saved_axes and self._saved_axes != found:
            warnings.warn(
                f"{type(self).__name__} was saved with variables of other paths or "
                "shapes than it is built on now. It searched for the input and output "
                "axes of kernels again, and found other axes. Pass `axes` to set them.",
                stacklevel=4,
            )
        self._warn_of_guesses(variables, found, self._guessed)
        return found

    def _warn_of_guesses(self, variables, axes, guessed):
        named = [
            f"{self._paths[i]} of shape {tuple(variables[i].shape)} in "
            f"{'no layer' if layer is None else type(layer).__name__}: {axes[i]}"
            for i, layer in guessed.items()
            if self._is_doubtful(self._paths[i], layer, variables[i])
            and not any(re.search(p, self._paths[i]) for p in self.exclude)
        ]
        if named:
            warnings.warn(
                f"{type(self).__name__} does not know the layers of some variables, "
                "and guesses which axes are inputs and which are outputs (inputs | "
                f"outputs): {'; '.join(named[:4])}{'; …' if len(named) > 4 else ''}. "
                "Pass `axes` to set them.",
                stacklevel=5,
            )

    def _is_doubtful(self, path, layer, variable):
        """Returns whether to warn of guessed axes."""
        is_used = self.scope == "unit" or self.centralize
        return is_used and layer is not None and len(variable.shape) > 2


def _is_same_path(path, other):
    """Returns whether two paths are equal, except for a prefix of one of them."""
    return path == other or path.endswith(f"/{other}") or other.endswith(f"/{path}")


class OwnVariables(MixinBase):
    """Keeps the variables of this package apart from the base optimizer's variables.

    So the slots of the base load from files that were saved with other options.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._own_variables: dict[str, Any] = {}
        self._not_saved: set[str] = set()
        #: The ids of variables that skipped steps also change.
        self._changed_when_skipped: set[int] = set()

    def _add_own_variable(
        self, name, value=None, changes_when_skipped=False, **arguments
    ):
        """Adds a variable that has the same value on all replicas.

        Args:
            name: Name of the variable.
            value: Float or `None`. A float makes a scalar variable of this value. The
                variable is not saved, because the config holds the value. `None` makes
                a variable with `arguments`.
            changes_when_skipped: Whether skipped steps also change the variable.
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
        if changes_when_skipped:
            self._changed_when_skipped.add(id(variable))
        return variable

    def _assign_own_variable(self, name, value):
        """Assigns a value to the variable of this name, if it exists already."""
        if name in self._own_variables:
            self._own_variables[name].assign(value)

    @property
    def _base_variables(self) -> list[Any]:
        """The variables of the base optimizer itself."""
        own = {id(v) for v in self._own_variables.values()}
        return [v for v in self.variables if id(v) not in own]

    def save_own_variables(self, store):
        base_variables = self._base_variables
        own = {n: v for n, v in self._own_variables.items() if n not in self._not_saved}
        for key, variable in [*enumerate(base_variables), *own.items()]:
            store[str(key)] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        base_variables = self._base_variables
        stored = [key for key in store.keys() if key.isdecimal()]  # noqa: SIM118
        if len(stored) != len(base_variables):
            super().load_own_variables(store)  # Its error says what is wrong.
            return
        for i, variable in enumerate(base_variables):
            variable.assign(store[str(i)])
        for name, variable in self._own_variables.items():
            if name in store and tuple(store[name].shape) == tuple(variable.shape):
                variable.assign(store[name])
