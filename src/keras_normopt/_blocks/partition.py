"""Divides the variables of an optimizer into blocks. A norm measures a block."""

import re
import reprlib
import warnings
from typing import Any

from keras_normopt._blocks import layers
from keras_normopt._blocks.patterns import warn_of_unused_patterns

SCOPES = ("variable", "unit", "layer", "global")


class Blocks:
    """The blocks of an optimizer's variables.

    Args:
        scope: One of `SCOPES`.
        exclude: Regular expressions. If one is found in the path of a variable, the
            variable is in no block.
        variables: List of the variables. A variable with `overwrite_with_gradient` is
            in no block either.
        paths: List of their paths.
        axes: List of their `Axes`. Only `scope="unit"` needs it.

    Attributes:
        names: The names of the blocks, all different.
        block_of: For each variable, the index of its block in `names`. `None` if the
            variable is in no block.
        excluded: For each variable, whether `exclude` matches its path.
    """

    def __init__(self, scope, exclude, variables, paths, axes=None):
        #: The axes of each variable with `scope="unit"`, else `None`.
        self.units = axes if scope == "unit" else None
        self.excluded = [any(re.search(p, path) for p in exclude) for path in paths]
        for pattern in exclude:
            warn_of_unused_patterns("exclude", [pattern], paths, stacklevel=4)
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
        containers: list[list[Any]] = [[] for _ in included]
        if scope == "layer" or len(set(paths)) < len(paths):
            containers = layers.containing_layers([variables[i] for i in included])
        self.names, numbers = partition(scope, paths, containers)
        self.block_of: list[int | None] = [None] * len(variables)
        for i, number in zip(included, numbers, strict=True):
            self.block_of[i] = number

    def units_shape(self, index, variable):
        """Returns the shape in which a gradient is measured.

        With `scope="unit"`, the units are on the last axis. With other scopes, it is
        the shape of the variable.

        Args:
            index: Index of the variable in the optimizer.
            variable: The variable.
        """
        shape = tuple(variable.shape)
        return shape if self.units is None else self.units[index].units_shape(shape)

    def norm_shape(self, index, variable):
        """Returns the shape of one variable's norm. Arguments: see `units_shape`."""
        if self.units is None:
            return ()
        shape = self.units_shape(index, variable)
        return shape[-1:] if len(shape) > 1 else ()

    def norm_shapes(self, variables):
        """Returns the shape of each block's norm."""
        # A block of several variables has a scalar norm, and so has its first variable.
        first = [self.block_of.index(number) for number in range(len(self.names))]
        return [self.norm_shape(i, variables[i]) for i in first]

    def positions_by_block(self, indices):
        """Returns the positions of each block's gradients in one step.

        Args:
            indices: List of the indices of the variables that have a gradient.

        Returns:
            Dict from the index of each block to a list of positions in `indices`.
        """
        positions: dict[int, list[int]] = {}
        for position, index in enumerate(indices):
            if self.block_of[index] is not None:
                positions.setdefault(self.block_of[index], []).append(position)
        return positions


def partition(scope, paths, containers):
    """Divides variables into blocks.

    Args:
        scope: One of `SCOPES`.
        paths: List of the variables' paths.
        containers: For each variable, a list of its known layers, the innermost first.

    Returns:
        A pair of lists. The first list has the names of the blocks, which are all
        different. The second list has the index of each variable's block.
    """
    if scope == "global":
        return ["global"] * bool(paths), [0] * len(paths)
    keys = [(path, position) for position, path in enumerate(paths)]
    if scope == "layer":
        keys = _layer_keys(paths, containers)
    blocks = list(dict.fromkeys(keys))
    names = [name for name, _ in blocks]
    for number, name in enumerate(list(names)):
        if [n for n, _ in blocks].count(name) > 1:
            first = keys.index(blocks[number])
            names[number] = layers.prefix_with_layer(name, containers[first])
    return make_unique(names), [blocks.index(key) for key in keys]


def _layer_keys(paths, containers):
    """Returns a key for each variable. Variables of one layer have equal keys."""
    keys, without_layer, repeated = [], [], []
    seen: set[str] = set()
    start = 0
    for position, (path, owners) in enumerate(zip(paths, containers, strict=True)):
        layer, slash, _ = path.rpartition("/")
        if not slash:
            keys.append((path, position))
            without_layer += [path] if owners else []
        elif owners:
            keys.append((layer, id(owners[0])))
        else:
            if path in seen:  # Paths differ within a layer, so another layer begins.
                seen, start = set(), position
                repeated.append(path)
            seen.add(path)
            keys.append((layer, start))
    if without_layer:
        warnings.warn(
            f'scope="layer" found no layer in the path of {len(without_layer)} of '
            f"{len(paths)} variables. Each of them is a separate block: "
            f"{reprlib.repr(without_layer)}.",
            stacklevel=5,
        )
    if repeated:
        warnings.warn(
            'scope="layer" found variables with equal paths, but not their layers. It '
            "assumes that each repeated path begins another layer: "
            f"{reprlib.repr(repeated)}. Give the variables different paths.",
            stacklevel=5,
        )
    return keys


def make_unique(names, taken=()):
    """Appends a number to each name that is taken already."""
    result = []
    for name in names:
        number, new = 1, name
        while new in result or new in taken:
            number += 1
            new = f"{name}_{number}"
        result.append(new)
    return result
