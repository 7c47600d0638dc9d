"""Trains in a loop of its own, to compare the results with those of `fit`.

NumPy computes gradients in closed form, the oracle normalizes them, and a plain
optimizer applies them.
"""

import keras
import numpy as np
from keras import ops

from helpers import oracle

_rng = np.random.default_rng(0)
X = _rng.normal(size=(12, 3)).astype("float32")
Y = _rng.normal(size=(12, 4)).astype("float32")
START = [_rng.normal(size=shape).astype("float32") for shape in [(3, 4), (4,)]]
EPOCHS, BATCH = 3, 4


def gradients(x, y, kernel, bias):
    """Returns the gradients of the mean squared error of one linear layer."""
    error = 2 * (x.astype("float64") @ kernel + bias - y) / y.size
    return [x.T @ error, error.sum(axis=0)]


def batches(size=BATCH):
    return [(X[i : i + size], Y[i : i + size]) for i in range(0, len(X), size)]


def rescaled(norm, gradient):
    return norm(gradient) if callable(norm) else oracle.normalize(norm, gradient)


def train(plain, norm="l2", size=BATCH, change=lambda grads, weights: grads):
    variables = [keras.Variable(w) for w in START]
    for _ in range(EPOCHS):
        for x, y in batches(size):
            weights = [ops.convert_to_numpy(v) for v in variables]
            grads = change(gradients(x, y, *weights), weights)
            grads = [np.asarray(rescaled(norm, g), "float32") for g in grads]
            plain.apply([ops.convert_to_tensor(g) for g in grads], variables)
    plain.finalize_variable_values(variables)
    return [ops.convert_to_numpy(v) for v in variables]


def descend(epochs, step, average=1):
    """Subtracts a function of each gradient from the weights, in float64.

    Args:
        epochs: Number of epochs.
        step: Function of the index of a weight and of its gradient.
        average: Number of batches whose gradients are averaged.
    """
    weights, pending = [w.astype("float64") for w in START], []
    for _ in range(epochs):
        for x, y in batches():
            pending.append(gradients(x, y, *weights))
            if len(pending) == average:
                means = [np.mean(g, axis=0) for g in zip(*pending, strict=True)]
                weights = [w - step(i, means[i]) for i, w in enumerate(weights)]
                pending = []
    return weights


def make_model(optimizer, dense=None, **compile_arguments):
    model = keras.Sequential([keras.Input((3,)), dense or keras.layers.Dense(4)])
    model.set_weights(START)
    model.compile(optimizer=optimizer, loss="mse", **compile_arguments)
    return model


def fit(model, **arguments):
    arguments = {"batch_size": BATCH, "epochs": EPOCHS, "verbose": 0} | arguments
    return model.fit(X, Y, shuffle=False, **arguments)


def assert_same(actual, expected, rtol=2e-5, atol=2e-6):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def running_mean(rule, kept):
    """Returns the running mean of earlier norms, or infinity during warm-up."""
    if len(kept) < rule.warmup:
        return np.inf
    mean = np.mean(kept[: rule.warmup])
    for clipped in kept[rule.warmup :]:
        mean = rule.decay * mean + (1 - rule.decay) * clipped
    return mean
