"""Which layer a variable belongs to, which Keras does not tell.

A path is no identity: it leaves out the name of an enclosing functional model, so that
two layers may have one. But a layer knows its weights.
"""

import gc

import keras


def around(variables):
    """Finds the layers that are around each variable.

    Args:
        variables: List of variables.

    Returns:
        For each a list of the layers and models, of those that are alive, that have it
        among their weights; the innermost first.
    """
    found: dict[int, list[keras.Layer]] = {id(v): [] for v in variables}
    weights = [(layer, _weights_of(layer)) for layer in _alive()]
    for layer, of_layer in sorted(weights, key=lambda pair: len(pair[1])):
        for weight in of_layer:
            if id(weight) in found:
                found[id(weight)].append(layer)
    return [found[id(v)] for v in variables]


def creators(variables):
    """Finds the layers that created each variable, or hold it as their own.

    Unlike `around` it leaves out the layers and models around these.

    Args:
        variables: List of variables.

    Returns:
        For each a list of layers. A shared variable has several.
    """
    found: dict[int, list[keras.Layer]] = {id(v): [] for v in variables}
    for layer in _alive():
        for name in ("_trainable_variables", "_non_trainable_variables"):
            for variable in vars(layer).get(name, ()):
                if id(variable) in found:
                    found[id(variable)].append(layer)
    return [found[id(v)] for v in variables]


def _alive():
    """Returns all layers that exist."""
    # `type`, as `isinstance` asks the objects, some of which do more than answer.
    return [o for o in gc.get_objects() if issubclass(type(o), keras.Layer)]


def _weights_of(layer):
    # Of all layers there are, some may be half made, or not be Keras's to ask.
    try:
        return list(layer.weights)
    except Exception:
        return []


def told_apart(name, layers):
    """A name, behind that of the innermost layer that it does not name yet."""
    parts = name.split("/")
    outer = next((layer.name for layer in layers if layer.name not in parts), None)
    return name if outer is None else f"{outer}/{name}"
