"""Tests that models learn, also with constraints, clipping and loss scaling."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import oracle
from helpers.digits import digits

pytestmark = pytest.mark.newest_keras


def accuracy(optimizer, epochs=4, **dense_arguments):
    x, y = digits()
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(32, "relu", **dense_arguments),
            keras.layers.Dense(10, "softmax"),
        ]
    )
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.fit(x[:1500], y[:1500], batch_size=32, epochs=epochs, verbose=0)
    # `evaluate` would compile another function.
    predicted = np.argmax(ops.convert_to_numpy(model(x[1500:])), axis=1)
    return model, np.mean(predicted == y[1500:])


# test_parity tests the steps of every base. These few cases show that models learn.
@pytest.mark.parametrize(
    ("base", "arguments"),
    [
        ("SGD", {"learning_rate": 0.2}),
        ("SGD", {"learning_rate": 0.0005, "momentum": 0.9, "norm": "std"}),
        # Ftrl's accumulators start at 0.1, far above the entries of unit vectors.
        ("Ftrl", {"learning_rate": 0.05, "norm": "avg_l2"}),
        ("Adam", {"learning_rate": 0.005, "apply_to": "update", "norm": "avg_l2"}),
    ],
)
def test_models_learn(base, arguments):
    optimizer = getattr(keras_normopt, f"Normalized{base}")(**arguments)
    assert accuracy(optimizer)[1] > 0.8


def test_weights_satisfy_their_constraints():
    model, reached = accuracy(
        keras_normopt.NormalizedSGD(0.1),
        kernel_constraint=keras.constraints.MaxNorm(1.0),
        bias_constraint=keras.constraints.NonNeg(),
    )
    kernel, bias = model.layers[0].get_weights()
    assert np.linalg.norm(kernel, axis=0).max() <= 1 + 1e-5
    assert np.linalg.norm(kernel, axis=0).max() > 0.99
    assert bias.min() >= 0
    assert reached > 0.6


@pytest.mark.filterwarnings("ignore:.*has no effect")
@pytest.mark.parametrize(
    ("clipping", "clip"),
    [
        ({"clipvalue": 1.0}, lambda g: np.clip(g, -1.0, 1.0)),
        ({"clipnorm": 1.0}, lambda g: g / max(1.0, np.linalg.norm(g))),
        ({"global_clipnorm": 1.0}, lambda g: g / max(1.0, np.linalg.norm(g))),
    ],
)
@pytest.mark.parametrize("norm", ["max", "l2", "avg_l1"])
@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_clipping_acts_first_on_the_raw_gradient(clipping, clip, norm, scale):
    gradient = scale * np.array([3.0, -4.0, 0.5], "float32")
    variable = keras.Variable(np.zeros(3))
    optimizer = keras_normopt.NormalizedSGD(1.0, norm=norm, **clipping)
    optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
    expected = -oracle.normalize(norm, clip(gradient)).astype("float32")
    np.testing.assert_allclose(variable, expected, rtol=1e-5)


def test_weight_decay_is_not_normalized():
    variable = keras.Variable([1.0, 1.0])
    optimizer = keras_normopt.NormalizedSGD(0.1, weight_decay=0.5)
    optimizer.apply([ops.convert_to_tensor([3e-9, 4e-9])], [variable])
    np.testing.assert_allclose(variable, [0.95 - 0.06, 0.95 - 0.08], rtol=1e-6)


def test_loss_scaling_wraps_a_normalized_optimizer():
    variable = keras.Variable([0.0, 0.0])
    inner = keras_normopt.NormalizedSGD(1.0)
    optimizer = keras.optimizers.LossScaleOptimizer(inner)
    optimizer.build([variable])
    for gradient in ([3.0, 4.0], [np.inf, 4.0], [np.nan, 4.0]):
        scaled = ops.multiply(gradient, optimizer.dynamic_scale)
        if keras.backend.backend() != "jax":
            optimizer.apply([scaled], [variable])
        else:
            # On JAX, Keras supports only stateless steps of `LossScaleOptimizer`.
            state = [v.value for v in optimizer.variables]
            values, state = optimizer.stateless_apply(state, [scaled], [variable.value])
            for v, value in zip(
                [variable, *optimizer.variables], values + state, strict=True
            ):
                v.assign(value)
        # Steps with gradients that are not finite are skipped.
        np.testing.assert_allclose(variable, [-0.6, -0.8], rtol=1e-6)
    assert int(ops.convert_to_numpy(inner.iterations)) == 1


def test_every_layer_of_a_deep_sigmoid_network_moves():
    # Gradients fall to 1e-15. With an epsilon of 1e-7, most layers would not move.
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(64, "sigmoid") for _ in range(20)]
    model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Dense(10)])
    model.compile(
        keras_normopt.NormalizedSGD(0.125),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    before = model.get_weights()
    x, y = digits()
    model.train_on_batch(x[:64], y[:64])
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_allclose(np.linalg.norm(new - old), 0.125, rtol=1e-3)


def test_a_larger_epsilon_suppresses_rounding_noise():
    # The gradient of a bias before a batch normalization is zero in exact arithmetic.
    def moved(norm_epsilon):
        keras.utils.set_random_seed(1)
        dense = keras.layers.Dense(32)
        model = keras.Sequential(
            [
                keras.Input((64,)),
                dense,
                keras.layers.BatchNormalization(),
                keras.layers.Dense(10, "softmax"),
            ]
        )
        model.compile(
            keras_normopt.NormalizedSGD(1.0, norm_epsilon=norm_epsilon),
            "sparse_categorical_crossentropy",
        )
        x, y = digits()
        model.train_on_batch(x[:64], y[:64])
        return np.linalg.norm(dense.get_weights()[1])

    assert moved(1e-30) == pytest.approx(1.0, rel=1e-3)
    assert moved(1e-5) < 0.1
