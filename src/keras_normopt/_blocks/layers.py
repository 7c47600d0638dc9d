"""Finds the layers of a variable.

A path does not identify a layer: it omits the name of an enclosing functional model, so
two layers may share a path. But each layer knows its weights.
"""

import gc

import keras


def containing_layers(variables):
    """Finds the layers and models that contain each variable.

    Args:
        variables: List of variables.

    Returns:
        For each variable, a list of the existing layers and models with it among their
        weights, the innermost first.
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

    Unlike `containing_layers`, it omits the layers and models around these.

    Args:
        variables: List of variables.

    Returns:
        For each variable, a list of layers. A shared variable has several.
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
    # Not `isinstance`: it reads `__class__`, which runs code of some objects.
    return [o for o in gc.get_objects() if issubclass(type(o), keras.Layer)]


def _weights_of(layer):
    # Some layers may be half made, or their `weights` may raise errors.
    try:
        return list(layer.weights)
    except Exception:
        return []


def prefix_with_layer(name, layers):
    """Prefixes a name with the innermost layer that it does not contain yet."""
    parts = name.split("/")
    outer = next((layer.name for layer in layers if layer.name not in parts), None)
    return name if outer is None else f"{outer}/{name}"
