"""Variables beyond those of the base, and how they are saved and loaded."""

from keras import ops


class OwnVariables:
    """Keeps variables apart from those of the base.

    So the slots of the base are loaded from a file that was saved with other options,
    and the other way round.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._own_variables = {}

    def _add_own_variable(self, name, **arguments):
        """Adds a variable beyond those of the base, the same on all replicas."""
        variable = self.add_variable(
            name=name, aggregation="only_first_replica", **arguments
        )
        self._own_variables[name] = variable
        return variable

    def save_own_variables(self, store):
        own = {id(v) for v in self._own_variables.values()}
        of_base = [v for v in self.variables if id(v) not in own]
        for key, variable in [*enumerate(of_base), *self._own_variables.items()]:
            store[str(key)] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        own = {id(v) for v in self._own_variables.values()}
        of_base = [v for v in self.variables if id(v) not in own]
        stored = [key for key in store.keys() if key.isdecimal()]  # noqa: SIM118
        if len(stored) != len(of_base):
            super().load_own_variables(store)  # Which says what is wrong.
            return
        for i, variable in enumerate(of_base):
            variable.assign(store[str(i)])
        for name, variable in self._own_variables.items():
            if name in store and tuple(store[name].shape) == tuple(variable.shape):
                variable.assign(store[name])
