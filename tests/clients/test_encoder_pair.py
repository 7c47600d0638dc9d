"""Tests models with two encoders whose layers have the same paths."""

import keras
import numpy as np
import pytest

import keras_normopt

X = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
Y = np.ones((8, 1), "float32")


def encoder(name, use_bias=True):
    inputs = keras.Input((6,))
    dense = keras.layers.Dense(4, name="dense1", use_bias=use_bias)
    return keras.Model(inputs, dense(inputs), name=name)


def pair(optimizer, use_bias=(True, True)):
    inputs = keras.Input((6,))
    codes = [
        encoder(name, bias)(inputs)
        for name, bias in zip(["left", "right"], use_bias, strict=True)
    ]
    head = keras.layers.Dense(1, name="head")(keras.layers.concatenate(codes))
    model = keras.Model(inputs, head)
    model.compile(optimizer=optimizer, loss="mse")
    return model


def steps_of_layers(model):
    """Returns how far the weights of each layer move in one step, in the l2 norm."""
    layers = [model.get_layer(name).get_layer("dense1") for name in ("left", "right")]
    layers.append(model.get_layer("head"))
    before = [layer.get_weights() for layer in layers]
    model.fit(X, Y, batch_size=8, epochs=1, verbose=0)
    return [
        np.sqrt(
            sum(
                np.sum(np.square(new - old))
                for new, old in zip(layer.get_weights(), weights, strict=True)
            )
        )
        for layer, weights in zip(layers, before, strict=True)
    ]


@pytest.mark.parametrize("use_bias", [(True, True), (False, True), (True, False)])
def test_each_layer_is_normalized_by_itself(use_bias):
    optimizer = keras_normopt.NormalizedSGD(0.01, scope="layer", track_norms=True)
    model = pair(optimizer, use_bias)
    np.testing.assert_allclose(steps_of_layers(model), [0.01] * 3, rtol=1e-4)
    assert list(optimizer.gradient_norms)[:-1] == [
        "left/dense1",
        "right/dense1",
        "head",
    ]


def test_layers_with_the_same_path_but_different_variables_are_separate():
    inputs = keras.Input((6,))
    dense = keras.layers.Dense(4, use_bias=False, name="block")
    scale = keras.layers.BatchNormalization(name="block")
    outer = keras.Model(inputs, dense(inputs), name="outer")
    inner_inputs = keras.Input((4,))
    inner = keras.Model(inner_inputs, scale(inner_inputs), name="inner")
    model = keras.Sequential([outer, inner])
    optimizer = keras_normopt.NormalizedSGD(scope="layer", track_norms=True)
    optimizer.build(model.trainable_variables)
    assert list(optimizer.gradient_norms)[:-1] == ["outer/block", "inner/block"]


@pytest.mark.parametrize("scope", ["variable", "unit"])
def test_variables_with_the_same_path_are_separate(scope):
    optimizer = keras_normopt.NormalizedSGD(scope=scope, track_norms=True)
    pair(optimizer).fit(X, Y, verbose=0)
    assert list(optimizer.gradient_norms)[:-1] == [
        "left/dense1/kernel",
        "left/dense1/bias",
        "right/dense1/kernel",
        "right/dense1/bias",
        "head/kernel",
        "head/bias",
    ]


def test_variables_without_a_layer_are_grouped_with_a_warning():
    def variables():
        with keras.name_scope("dense"):
            return [keras.Variable(np.ones(2), name=n) for n in ("kernel", "bias")]

    optimizer = keras_normopt.NormalizedSGD(scope="layer", track_norms=True)
    with pytest.warns(UserWarning, match="path begins another layer: .'dense/kernel'"):
        optimizer.build([*variables(), *variables()])
    assert list(optimizer.gradient_norms)[:-1] == ["dense", "dense_2"]


class Wrapper(keras.layers.Layer):
    """Names its weights as Keras's wrapper of PyTorch modules does."""

    def __init__(self):
        super().__init__()
        self.weight = keras.Variable(np.ones(2), name="variable_4")


def test_paths_without_a_name_of_a_layer_cause_a_warning():
    layer = Wrapper()
    optimizer = keras_normopt.NormalizedSGD(scope="layer")
    with pytest.warns(UserWarning, match=r"in the path of 1 of 1 variables.*_4'"):
        optimizer.build(layer.trainable_variables)


def test_an_unfinished_layer_does_not_affect_other_layers():
    unfinished = keras.layers.Dense.__new__(keras.layers.Dense)
    del unfinished.__dict__["_trainable_variables"]
    with pytest.raises(AttributeError):
        unfinished.weights  # noqa: B018
    test_each_layer_is_normalized_by_itself((True, True))
