"""What one norm spans: the variables of an optimizer, divided into blocks."""

import re
import reprlib
import warnings
from typing import Any

from keras_normopt._blocks import layers
from keras_normopt._blocks.patterns import warn_of_idle

SCOPES = ("variable", "unit", "layer", "global")


class Blocks:
    """The blocks of an optimizer's variables, each with a norm of its own.

    Args:
        scope: One of `SCOPES`.
        exclude: Regular expressions. A variable in whose path one is found is in no
            block.
        variables: List of the variables. One that its gradient overwrites is in no
            block either.
        paths: List of their paths.
        axes: List of their `Axes`. Used for units only.

    Attributes:
        names: The names of the blocks, no two the same.
        of: For each variable the number of its block, or `None`.
        excluded: Whether each variable is excluded.
    """

    def __init__(self, scope, exclude, variables, paths, axes=None):
        #: For each variable its axes if every unit has a norm, or `None`.
        self.units = axes if scope == "unit" else None
        self.excluded = [any(re.search(p, path) for p in exclude) for path in paths]
        for pattern in exclude:
            warn_of_idle("exclude", [pattern], paths, stacklevel=4)
        included = [
            i
            for i, variable in enumerate(variables)
            if not self.excluded[i]
            and not getattr(variable, "overwrite_with_gradient", False)
        ]
        if any(self.excluded) and not included:
            warnings.warn(
                f"exclude={exclude} excludes every variable: nothing is normalized. "
                f"The paths are {reprlib.repr(paths)}.",
                stacklevel=4,
            )
        paths = [paths[i] for i in included]
        around: list[list[Any]] = [[] for _ in included]
        if scope == "layer" or len(set(paths)) < len(paths):
            around = layers.around([variables[i] for i in included])
        self.names, numbers = partition(scope, paths, around)
        self.of: list[int | None] = [None] * len(variables)
        for i, number in zip(included, numbers, strict=True):
            self.of[i] = number

    def units_shape(self, index, variable):
        """The shape of a gradient with the units on its last axis, if they have norms.

        Args:
            index: Number of the variable.
            variable: The variable.
        """
        shape = tuple(variable.shape)
        return shape if self.units is None else self.units[index].units_shape(shape)

    def norm_shape(self, index, variable):
        """The shape of the norm of one variable: see `units_shape`."""
        if self.units is None:
            return ()
        shape = self.units_shape(index, variable)
        return shape[-1:] if len(shape) > 1 else ()

    def norm_shapes(self, variables):
        """The shape of the norm of each block."""
        # Blocks of several variables have no units.
        first = [self.of.index(number) for number in range(len(self.names))]
        return [self.norm_shape(i, variables[i]) for i in first]

    def of_step(self, indices):
        """The blocks of those variables that have a gradient in a step.

        Args:
            indices: The numbers of these variables.

        Returns:
            Dict from the number of each block to a list of positions in `indices`.
        """
        positions: dict[int, list[int]] = {}
        for position, index in enumerate(indices):
            if self.of[index] is not None:
                positions.setdefault(self.of[index], []).append(position)
        return positions


def partition(scope, paths, around):
    """Divides variables into blocks.

    Args:
        scope: One of `SCOPES`.
        paths: List of the variables' paths.
        around: For each variable the layers around it, the innermost first, as far as
            they are known.

    Returns:
        A list of the blocks' names, no two the same, and a list that holds the number
        of its block for each variable.
    """
    if scope == "global":
        return ["global"] * bool(paths), [0] * len(paths)
    keys = [(path, position) for position, path in enumerate(paths)]
    if scope == "layer":
        keys = _layer_keys(paths, around)
    blocks = list(dict.fromkeys(keys))
    names = [name for name, _ in blocks]
    for number, name in enumerate(list(names)):
        if [n for n, _ in blocks].count(name) > 1:
            first = keys.index(blocks[number])
            names[number] = layers.told_apart(name, around[first])
    return unique(names), [blocks.index(key) for key in keys]


def _layer_keys(paths, around):
    """For each variable what it has in common with the others of its layer."""
    keys, alone, repeated = [], [], []
    seen: set[str] = set()
    start = 0
    for position, (path, known) in enumerate(zip(paths, around, strict=True)):
        layer, slash, _ = path.rpartition("/")
        if not slash:
            keys.append((path, position))
            alone += [path] if known else []
        elif known:
            keys.append((layer, id(known[0])))
        else:
            if path in seen:  # One layer has no two of one path: another one begins.
                seen, start = set(), position
                repeated.append(path)
            seen.add(path)
            keys.append((layer, start))
    if alone:
        warnings.warn(
            f'scope="layer" found no layer in the path of {len(alone)} of {len(paths)} '
            f"variables, and makes a block of each: {reprlib.repr(alone)}.",
            stacklevel=5,
        )
    if repeated:
        warnings.warn(
            'scope="layer" found variables of equal paths, in no layer that is alive, '
            f"and took each repetition as the beginning of another layer: "
            f"{reprlib.repr(repeated)}. Give the variables paths of their own.",
            stacklevel=5,
        )
    return keys


def unique(names, taken=()):
    """Appends a number to each name that is there already."""
    result = []
    for name in names:
        number, new = 1, name
        while new in result or new in taken:
            number += 1
            new = f"{name}_{number}"
        result.append(new)
    return result
