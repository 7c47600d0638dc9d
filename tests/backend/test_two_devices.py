"""Tests that eager JAX makes the same steps on two devices as on one device."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers.variables import SHAPES, make_gradients, make_variables
from keras_normopt import RunningNorm, WeightNorm
from keras_normopt.directions import Orthogonal

if keras.backend.backend() != "jax":
    pytest.skip("only JAX refuses to mix devices", allow_module_level=True)

import jax

pytestmark = pytest.mark.newest_keras

nightly = pytest.mark.nightly  # Eager JAX compiles each call for each shape.
CLASSES = {
    cls.__name__: cls for cls in (keras_normopt.NormalizedSGD, keras_normopt.ClippedSGD)
}
AXES = {"axes": {"b/kernel": ((0, 1), (2,))}}


def put(value, number):
    return jax.device_put(np.asarray(value, "float32"), jax.devices()[number])


def train(cls, arguments, devices):
    """Trains variables that alternate between devices. Returns weights and norms."""
    optimizer = CLASSES[cls](0.1, momentum=0.9, track_norms=True, **arguments)
    variables = make_variables()
    for i, variable in enumerate(variables):
        weights = np.random.default_rng(i).normal(size=variable.shape)
        variable._value = put(weights, i % devices)
    for seed in range(3):
        gradients = make_gradients(seed=seed).values()
        gradients = [put(g, i % devices) for i, g in enumerate(gradients)]
        optimizer.apply(gradients, variables)
    used = [v.value.devices() for v in variables]
    assert used == [{jax.devices()[i % devices]} for i in range(len(variables))]
    tracker = optimizer.norm_tracker
    tracked = [tracker.last, tracker.mean, tracker.clipped]
    return [ops.convert_to_numpy(v) for v in variables], tracked


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        pytest.param("NormalizedSGD", {"scope": "unit"}, marks=nightly),
        ("NormalizedSGD", {"scope": "layer", "norm": "std"}),
        ("NormalizedSGD", {"scope": "global", "norm": "min_max", "exclude": "bias"}),
        ("NormalizedSGD", {"scope": "layer", "norm": lambda g: ops.max(ops.abs(g))}),
        ("NormalizedSGD", {"scope": "layer", "step_size": "weight_norm"}),
        ("NormalizedSGD", {"step_size": "gradient_correlation", "centralize": True}),
        (
            "NormalizedSGD",
            {"apply_to": "update", "scope": "layer", "step_size": WeightNorm()},
        ),
        (
            "NormalizedSGD",
            {
                "direction": {"a/kernel": Orthogonal(steps=1), ".*": "rows"},
                **AXES,
            },
        ),
        pytest.param(
            "NormalizedSGD",
            {"direction": "sign", "apply_to": "update", **AXES},
            marks=nightly,
        ),
        ("ClippedSGD", {"max_norm": RunningNorm(warmup=1), "scope": "layer"}),
        ("ClippedSGD", {"max_norm": WeightNorm(0.01), "apply_to": "update"}),
    ],
)
def test_steps_on_two_devices_equal_steps_on_one_device(cls, arguments):
    weights, tracked = train(cls, arguments, devices=2)
    expected, expected_tracked = train(cls, arguments, devices=1)
    for path, a, b in zip(SHAPES, weights, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7, err_msg=path)
    for a, b in zip(tracked, expected_tracked, strict=True):
        assert list(a.values()) == pytest.approx(list(b.values()), rel=1e-5)


def test_the_norm_of_a_block_on_two_devices_does_not_overflow():
    gradients = make_gradients(1e25)
    optimizer = keras_normopt.NormalizedSGD(1.0, scope="global")
    variables = make_variables()
    for i, variable in enumerate(variables):
        variable._value = put(np.zeros(variable.shape), i % 2)
    optimizer.apply(
        [put(g, i % 2) for i, g in enumerate(gradients.values())], variables
    )
    step = np.concatenate([ops.convert_to_numpy(v).ravel() for v in variables])
    assert np.linalg.norm(step) == pytest.approx(1.0, rel=1e-5)
