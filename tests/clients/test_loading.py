"""Tests models whose variables have shorter paths after loading."""

import warnings

import keras
import numpy as np
import pytest

import keras_normopt

X = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
Y = np.ones((8, 2), "float32")
EXCLUDE = ("^net/head", "body/bias")


@keras.saving.register_keras_serializable("clients")
class Net(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.body = keras.layers.Dense(4, name="body")
        self.head = keras.layers.Dense(2, name="head")

    def call(self, x):
        return self.head(self.body(x))


def sequential():
    layers = [keras.layers.Dense(4, name="body"), keras.layers.Dense(2, name="head")]
    return keras.Sequential([keras.Input((3,)), *layers], name="net")


def subclassed():
    model = Net(name="net")
    model(X)
    return model


@pytest.mark.parametrize("make", [sequential, subclassed])
def test_a_loaded_model_excludes_and_names_the_same_variables(make, tmp_path):
    model = make()
    optimizer = keras_normopt.NormalizedSGD(0.01, exclude=EXCLUDE, track_norms=True)
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(X, Y, batch_size=8, verbose=0)
    model.save(tmp_path / "model.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    # Keras drops the name of the model. Keras 3.16 keeps it for a `Sequential`.
    paths = [v.path.removeprefix("net/") for v in loaded.trainable_variables]
    assert paths == ["body/kernel", "body/bias", "head/kernel", "head/bias"]
    assert loaded.optimizer.gradient_norms == optimizer.gradient_norms
    assert list(optimizer.gradient_norms) == ["net/body/kernel", "total"]
    for each in (model, loaded):
        each.fit(X, Y, batch_size=8, epochs=3, shuffle=False, verbose=0)
    for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_warning_names_each_pattern_that_matches_nothing():
    optimizer = keras_normopt.NormalizedSGD(exclude=("bias", "gamma", "beta"))
    with pytest.warns(UserWarning, match="exclude.*'(gamma|beta)' matches") as warned:
        optimizer.build(sequential().trainable_variables)
    assert len(warned) == 2


def dense(name):
    layer = keras.layers.Dense(3, name=name)
    layer.build((None, 2))
    return layer


# The first case has another number of variables. The second case has the same number.
@pytest.mark.parametrize("saved", [sequential, lambda: dense("one")])
def test_variables_that_differ_from_the_saved_variables_cause_a_warning(saved):
    optimizer = keras_normopt.NormalizedSGD(exclude="bias")
    optimizer.build(saved().trainable_variables)
    other = keras_normopt.NormalizedSGD.from_config(optimizer.get_config())
    with pytest.warns(UserWarning, match="was saved with other variables"):
        other.build(dense("other").trainable_variables)
    assert other.get_config()["variable_paths"][0] == "other/kernel"


def test_configs_without_paths_can_be_loaded():
    config = keras_normopt.NormalizedSGD(exclude="bias").get_config()
    assert "variable_paths" not in config
    optimizer = keras_normopt.NormalizedSGD.from_config(config)
    optimizer.build(sequential().trainable_variables)
    assert optimizer.get_config()["variable_paths"][0] == "net/body/kernel"
