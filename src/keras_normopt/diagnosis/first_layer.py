"""Measures the values that reach the first layer with a kernel.

The range of a model's inputs says little: tokens are large numbers, and many models
scale their inputs in a layer.
"""

import dataclasses

import keras
import numpy as np
from keras import ops, tree


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of inputs or targets.

    Attributes:
        low: The smallest value.
        high: The largest value.
        rms: The root mean square of the nonzero values. If the last axis holds several
            features, this is the largest rms of a feature.
    """

    low: float
    high: float
    rms: float


def range_of(values):
    """Returns the `Range` of an array."""
    features = np.reshape(values, (-1, np.shape(values)[-1] if np.ndim(values) else 1))
    features = features.astype("float64")
    some = np.maximum(np.count_nonzero(features, axis=0), 1)
    return Range(
        low=float(np.min(features)),
        high=float(np.max(features)),
        rms=float(np.sqrt(np.max(np.sum(np.square(features), axis=0) / some))),
    )


def range_of_inputs(model, x):
    """Calls the model until it reaches a layer with a kernel.

    The call may change the state of the model. The caller restores it.

    Returns:
        The `Range` of the values that the layer receives. `None` if the layer is an
        embedding or receives integers, or if no layer has a kernel.
    """
    values = _inputs_of_first_kernel(model, x)
    return None if values is None else range_of(values)


def _inputs_of_first_kernel(model, x):
    layers = [layer for layer in model._flatten_layers() if "call" not in vars(layer)]
    try:
        for layer in layers:
            object.__setattr__(layer, "call", _Until(layer, layer.call))
        model(x, training=True)
    except _Reached as reached:
        return reached.values
    finally:
        for layer in layers:
            if "call" in vars(layer):
                object.__delattr__(layer, "call")
    return None


class _Reached(BaseException):
    """Raised to leave a model's call. Keras would wrap an `Exception`."""

    def __init__(self, values):
        super().__init__()
        self.values = values


class _Until:
    """Replaces the `call` of a layer. Leaves the model if the layer has a kernel."""

    def __init__(self, layer, call):
        self.layer = layer
        self.call = call

    def __call__(self, *args, **kwargs):
        if isinstance(self.layer, keras.layers.Embedding):
            raise _Reached(None)
        if _has_kernel(self.layer):
            tensor = tree.flatten((args, kwargs))[0]
            values = ops.convert_to_numpy(tensor)
            raise _Reached(values if values.dtype.kind not in "iub" else None)
        return self.call(*args, **kwargs)


def _has_kernel(layer):
    # The cell of an RNN runs in a loop, where values are symbolic.
    return isinstance(layer, keras.layers.RNN) or any(
        len(variable.shape) > 1 for variable in layer._trainable_variables
    )
