"""Finds the layers that contain a variable.

The path of a variable does not identify its layer. The path omits the name of an
enclosing functional model, so variables of two layers may have equal paths. But each
layer knows its weights.
"""

import gc

import keras


def containing_layers(variables):
    """Finds the layers and models that contain each variable.

    Args:
        variables: List of variables.

    Returns:
        For each variable, a list of the existing layers and models whose weights
        include the variable. The list starts with the innermost layer.
    """
    by_variable: dict[int, list[keras.Layer]] = {id(v): [] for v in variables}
    weights = [(layer, _weights_of(layer)) for layer in _existing_layers()]
    for layer, of_layer in sorted(weights, key=lambda pair: len(pair[1])):
        for weight in of_layer:
            if id(weight) in by_variable:
                by_variable[id(weight)].append(layer)
    return [by_variable[id(v)] for v in variables]


def creators(variables):
    """Finds the layers that created each variable, or hold it directly.

    Unlike `containing_layers`, `creators` omits layers and models that contain the
    variable only through an inner layer.

    Args:
        variables: List of variables.

    Returns:
        For each variable, a list of layers. If several layers share the variable, the
        list contains all of them.
    """
    by_variable: dict[int, list[keras.Layer]] = {id(v): [] for v in variables}
    for layer in _existing_layers():
        for name in ("_trainable_variables", "_non_trainable_variables"):
            for variable in vars(layer).get(name, ()):
                if id(variable) in by_variable:
                    by_variable[id(variable)].append(layer)
    return [by_variable[id(v)] for v in variables]


def _existing_layers():
    """Returns all layers that exist."""
    # Not `isinstance`, because it reads `__class__`, which runs code of some objects.
    return [o for o in gc.get_objects() if issubclass(type(o), keras.Layer)]


def _weights_of(layer):
    # A layer may be incomplete, or its `weights` may raise an error.
    try:
        return list(layer.weights)
    except Exception:
        return []


def prefix_with_layer(name, layers):
    """Adds the name of a layer before the name of a block.

    Args:
        name: The name of the block. Slashes separate its parts.
        layers: List of the layers that contain the block, the innermost first. The
            function takes the first of them whose name is not a part of `name`.

    Returns:
        The new name, or `name` if it contains the names of all layers.
    """
    parts = name.split("/")
    outer = next((layer.name for layer in layers if layer.name not in parts), None)
    return name if outer is None else f"{outer}/{name}"
