"""Trains our optimizers and those of other libraries on the same gradients."""

import inspect
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
from keras import ops

BACKEND = keras.backend.backend()
RATE = 2.0**-5
# A value for epsilons. Each library adds its epsilon at another place.
TINY = 1e-30
SHAPES = {
    "scale": (),
    "bias": (5,),
    "dense": (4, 3),
    "conv1d": (3, 2, 4),
    "conv2d": (2, 3, 2, 4),
    "conv3d": (2, 2, 1, 2, 3),
}
OF_WEIGHTS = dict(zip(SHAPES, [1.5, 0.1, 1.0, 0.5, 0.02, 0.8], strict=True))
OF_GRADIENTS = dict(zip(SHAPES, [1.0, 3.0, 0.2, 1.0, 0.5, 0.05], strict=True))
OF_STEPS = [1.0, 100.0, 1e-8, 0.02, 10.0, 0.3]


class Pair(NamedTuple):
    """Two optimizers that must make equal steps.

    Attributes:
        peer: Function of the peer's library that returns its optimizer.
        ours: Function that returns our optimizer.
        names: Names of the variables to train. `None` means all.
        zeros: Names of the variables whose weights start at 0.
        shapes: Shapes of all variables, by name.
    """

    peer: Any
    ours: Any
    names: Any = None
    zeros: Any = ()
    shapes: Any = SHAPES


def draw(pair):
    """Returns the weights, and the gradients of each step, by name."""
    rng = np.random.default_rng(0)
    names = pair.shapes if pair.names is None else pair.names

    def normal(sizes, factor):
        arrays = {
            n: factor * sizes.get(n, 1.0) * rng.normal(size=s)
            for n, s in pair.shapes.items()
        }
        return {n: arrays[n] for n in names}

    weights = normal(OF_WEIGHTS, 1.0)
    weights = {n: w * (n not in pair.zeros) for n, w in weights.items()}
    return weights, [normal(OF_GRADIENTS, size) for size in OF_STEPS]


def train(optimizer, weights, steps, change=lambda gradients, weights: gradients):
    """Returns how far an optimizer moves weights. `change` may replace gradients."""
    variables = {n: keras.Variable(w, "float64", name=n) for n, w in weights.items()}
    for gradients in steps:
        now = {n: ops.convert_to_numpy(v) for n, v in variables.items()}
        changed = change(gradients, now)
        tensors = [ops.convert_to_tensor(changed[n], "float64") for n in variables]
        optimizer.apply(tensors, list(variables.values()))
    return {n: ops.convert_to_numpy(v) - weights[n] for n, v in variables.items()}


def base_of(optimizer):
    """Returns the plain optimizer of Keras with the same arguments."""
    ancestors = [cls.__name__ for cls in type(optimizer).__mro__]
    base = getattr(
        keras.optimizers, next(n for n in ancestors if hasattr(keras.optimizers, n))
    )
    config = optimizer.get_config()
    return base(
        **{n: config[n] for n in inspect.signature(base).parameters if n in config}
    )


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, step in expected.items():
        atol = 1e-6 * np.abs(step).max()
        np.testing.assert_allclose(actual[name], step, rtol=1e-5, atol=atol)


def check(pair, expected):
    weights, steps = draw(pair)
    ours = pair.ours()
    moved = train(ours, weights, steps)
    assert_same(moved, expected)
    plain = train(base_of(ours), weights, steps)
    with pytest.raises(AssertionError):  # Shows that the comparison can fail.
        assert_same(plain, expected)


def each(pairs):
    return pytest.mark.parametrize("pair", pairs.values(), ids=pairs)


def length(array):
    return np.linalg.norm(np.ravel(array))


def train_optax(transform, weights, steps):
    import jax.numpy as jnp
    import optax

    params = {n: jnp.asarray(w) for n, w in weights.items()}
    state = transform.init(params)
    for gradients in steps:
        gradients = {n: jnp.asarray(g) for n, g in gradients.items()}
        updates, state = transform.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return {n: np.asarray(p) - weights[n] for n, p in params.items()}


def train_torch(make, weights, steps, unit_first=False):
    """Trains with PyTorch.

    With `unit_first`, kernels have the shape (out, in, spatial…). Embeddings keep their
    shape.
    """
    import torch

    def moved(name, array, source, target):
        is_kernel = unit_first and array.ndim > 1 and name != "embedding"
        return np.moveaxis(array, source, target) if is_kernel else array

    def to(name, array):
        array = moved(name, array, (-1, -2), (0, 1))
        return torch.tensor(np.ascontiguousarray(array).reshape(array.shape))

    params = {n: torch.nn.Parameter(to(n, w)) for n, w in weights.items()}
    optimizer = make(torch, list(params.values()))
    for gradients in steps:
        for n, p in params.items():
            p.grad = to(n, gradients[n])
        optimizer.step()
    return {
        n: moved(n, p.detach().numpy(), (0, 1), (-1, -2)) - weights[n]
        for n, p in params.items()
    }
