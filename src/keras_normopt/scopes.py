"""What one norm spans: the variables of an optimizer, divided into blocks."""

import re

SCOPES = ("variable", "unit", "layer", "global")


class Blocks:
    """The blocks of an optimizer's variables, each with a norm of its own.

    Args:
        scope: One of `SCOPES`.
        exclude: Regular expressions. A variable in whose path one is found is in no
            block.
        variables: List of the variables. One that its gradient overwrites is in no
            block either.

    Attributes:
        names: The names of the blocks, no two the same.
        of: For each variable the number of its block, or `None`.
        per_unit: Whether every unit of a block has a norm of its own.
        excluded: Whether each variable is excluded.
    """

    def __init__(self, scope, exclude, variables):
        self.per_unit = scope == "unit"
        self.paths = [getattr(v, "path", v.name) for v in variables]
        self.excluded = [
            any(re.search(pattern, path) for pattern in exclude) for path in self.paths
        ]
        included = [
            i
            for i, variable in enumerate(variables)
            if not self.excluded[i]
            and not getattr(variable, "overwrite_with_gradient", False)
        ]
        self.names, numbers = partition(scope, [self.paths[i] for i in included])
        self.of = [None] * len(variables)
        for i, number in zip(included, numbers, strict=True):
            self.of[i] = number

    def norm_shape(self, variable):
        """The shape of the norm of one variable."""
        has_units = self.per_unit and len(variable.shape) > 1
        return tuple(variable.shape[-1:]) if has_units else ()

    def of_step(self, indices):
        """The blocks of those variables that have a gradient in a step.

        Args:
            indices: The numbers of these variables.

        Returns:
            List of blocks, each a list of positions in `indices`.
        """
        positions = {}
        for position, index in enumerate(indices):
            if self.of[index] is not None:
                positions.setdefault(self.of[index], []).append(position)
        return list(positions.values())


def partition(scope, paths):
    """Divides variables into blocks.

    Args:
        scope: One of `SCOPES`.
        paths: List of the variables' paths.

    Returns:
        A list of the blocks' names, no two the same, and a list that holds the number
        of its block for each variable.
    """
    keys = []
    for position, path in enumerate(paths):
        layer, slash, _ = path.rpartition("/")
        if scope == "global":
            keys.append(("global", None))
        elif scope == "layer" and slash:
            keys.append((layer, None))
        else:
            keys.append((path, position))
    blocks = list(dict.fromkeys(keys))
    return unique([name for name, _ in blocks]), [blocks.index(key) for key in keys]


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
