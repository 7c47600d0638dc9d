"""Tests that steps on healthy gradients pass the numeric checks of each backend.

The checks of TensorFlow and JAX look for NaN and infinity in every intermediate result.
"""

import keras
import numpy as np
import pytest

from keras_normopt import (
    ClippedSGD,
    NormalizedAdam,
    NormalizedSGD,
    OrthogonalSGD,
    RunningNorm,
    WeightNorm,
)

pytestmark = pytest.mark.newest_keras

BACKEND = keras.backend.backend()
_rng = np.random.default_rng(0)
X = _rng.normal(size=(12, 3)).astype("float32")
Y = X.sum(axis=1, keepdims=True)


@pytest.fixture
def checks():
    """Turns on the checks of the backend for numbers that are not finite."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.debugging.enable_check_numerics()
        yield
        tf.debugging.disable_check_numerics()
    elif BACKEND == "jax":
        import jax

        with jax.debug_nans(True), jax.debug_infs(True):
            yield
    else:
        import torch

        with torch.autograd.set_detect_anomaly(True):
            yield


def make_model(optimizer, eagerly):
    # Biases start at 0, and units of ReLU may have no gradient.
    layers = [keras.layers.Dense(4, "relu"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    # XLA cannot compile the checks of TensorFlow.
    model.compile(
        optimizer,
        "mse",
        run_eagerly=eagerly,
        jit_compile=BACKEND == "jax" and not eagerly,
    )
    return model


OPTIMIZERS = {
    "running norm": lambda: ClippedSGD(
        max_norm=RunningNorm(warmup=2), apply_to="update", momentum=0.9
    ),
    "weight norm": lambda: ClippedSGD(max_norm=WeightNorm(), scope="unit"),
    "units": lambda: NormalizedSGD(scope="unit", norm="std", centralize=True),
    "layers": lambda: NormalizedSGD(scope="layer", norm="min_max", track_norms=True),
    "lars": lambda: NormalizedSGD(
        step_size="weight_norm", scope="layer", norm_epsilon=0.0
    ),
    "correlation": lambda: NormalizedSGD(step_size="gradient_correlation"),
    "update": lambda: NormalizedAdam(apply_to="update", step_size=WeightNorm()),
    "orthogonal": lambda: OrthogonalSGD(norm_epsilon=0.0),
    "rows": lambda: NormalizedSGD(direction="rows", norm_epsilon=0.0),
    "sign": lambda: NormalizedSGD(direction="sign", norm_epsilon=0.0),
    "a rate of 0": lambda: NormalizedSGD(0.0, momentum=0.9, apply_to="update"),
}


# These optimizers branch or divide. TensorFlow takes seconds to trace the checks of one
# optimizer.
COMPILED = ["running norm", "weight norm"]


@pytest.mark.parametrize(
    ("name", "eagerly"),
    [(name, True) for name in OPTIMIZERS] + [(name, False) for name in COMPILED],
)
def test_steps_on_healthy_gradients_pass_the_checks(checks, name, eagerly):
    model = make_model(OPTIMIZERS[name](), eagerly)
    model.fit(X, Y, batch_size=4, verbose=0)
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_the_checks_find_gradients_that_are_not_finite(checks):
    """If the checks were off, the tests above could not fail."""
    if BACKEND == "torch":
        pytest.skip("PyTorch checks derivatives, of which steps have none")
    model = make_model("sgd", eagerly=True)
    with pytest.raises(Exception, match=r"(?i)nan|inf"):
        model.fit(X * np.inf, Y, verbose=0)
