"""Makes variables of several layers, gradients for them, and steps."""

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()
# Shapes by path. `offset` and `a` belong to no layer, and `a` has the name of a layer.
SHAPES = {
    "a/kernel": (3, 4),
    "a/bias": (4,),
    "b/kernel": (2, 3, 5),
    "b/bias": (5,),
    "offset": (),
    "a": (2, 2),
}
LAYERS = [["a/kernel", "a/bias"], ["b/kernel", "b/bias"], ["offset"], ["a"]]
SCOPES = ["variable", "unit", "layer", "global"]


def make_gradients(scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return {
        # Each gradient has its own magnitude. Tests notice if gradients share a norm.
        path: scale * 10.0**i * rng.normal(size=shape)
        for i, (path, shape) in enumerate(SHAPES.items())
    }


def make_variables(dtype="float32"):
    variables = []
    for path, shape in SHAPES.items():
        layer, _, name = path.rpartition("/")
        with keras.name_scope(layer) if layer else keras.name_scope(""):
            variables.append(keras.Variable(np.zeros(shape), dtype=dtype, name=name))
    return variables


def as_numpy(variable):
    dtype = "float64" if str(variable.dtype) == "float64" else "float32"
    return ops.convert_to_numpy(ops.cast(variable.value, dtype)).astype("float64")


def steps_of(optimizer, gradients, dtype="float32", compiled=False):
    """Returns the step of a new optimizer, by path."""
    variables = make_variables(dtype)
    assert [v.path for v in variables] == list(SHAPES)
    tensors = [ops.convert_to_tensor(g, dtype) for g in gradients.values()]
    if compiled and BACKEND == "tensorflow":
        import tensorflow as tf

        optimizer.build(variables)
        tf.function(lambda *tensors: optimizer.apply(list(tensors), variables))(
            *tensors
        )
    elif compiled and BACKEND == "jax":
        import jax

        optimizer.build(variables)
        state = [v.value for v in optimizer.variables], tensors
        values, _ = jax.jit(optimizer.stateless_apply)(
            *state, [v.value for v in variables]
        )
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
    else:
        optimizer.apply(tensors, variables)
    return {
        path: -as_numpy(variable)
        for path, variable in zip(SHAPES, variables, strict=True)
    }


def gradient_steps(optimizer, steps, weights=None):
    """Returns what SGD at rate 1 subtracts from the same weights in each step."""
    variables = make_variables()
    weights = weights or {path: np.zeros(shape) for path, shape in SHAPES.items()}
    result = []
    for gradients in steps:
        for variable, value in zip(variables, weights.values(), strict=True):
            variable.assign(value)
        before = [as_numpy(v) for v in variables]
        optimizer.apply(
            [
                None if g is None else ops.convert_to_tensor(g, "float32")
                for g in gradients.values()
            ],
            variables,
        )
        step = [b - as_numpy(v) for v, b in zip(variables, before, strict=True)]
        result.append(dict(zip(SHAPES, step, strict=True)))
    return result
