"""Tests clipping by every norm."""

import pickle

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import by_hand, oracle
from helpers.stored import stored
from helpers.variables import LAYERS, make_gradients, steps_of

CLASSES = keras_normopt.optimizers.CLIPPED


def clip(norm, gradients, max_norm):
    flat = np.concatenate([np.ravel(g) for g in gradients])
    factor = min(1.0, max_norm / float(oracle.norm(norm, flat)))
    return [g * factor for g in gradients]


def step(optimizer, gradient):
    variable = keras.Variable(np.zeros_like(gradient))
    optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
    return -ops.convert_to_numpy(variable)


@pytest.mark.parametrize("size", [0.9, 1.0, 1.1, 1e-28, 1e30])
@pytest.mark.parametrize("max_norm", [1.0, 1e-6, 3e7])
@pytest.mark.parametrize("norm", oracle.NORMS)
def test_only_gradients_above_the_threshold_are_shortened(norm, max_norm, size):
    gradient = np.random.default_rng(0).normal(size=(3, 4))
    gradient = oracle.normalize(norm, gradient) * size * max_norm
    gradient = gradient.astype("float32")
    optimizer = keras_normopt.ClippedSGD(1.0, norm=norm, max_norm=max_norm)
    expected = clip(norm, [gradient.astype("float64")], max_norm)[0]
    moved = step(optimizer, gradient)
    np.testing.assert_allclose(moved, expected, rtol=1e-5)
    if size < 1:  # The norm is below the threshold.
        np.testing.assert_array_equal(moved, gradient)


# Every base gets clipped gradients, so one norm for each base is enough.
@pytest.mark.parametrize(
    ("base", "norm"),
    [("SGD", "l2"), ("Adam", "std"), ("AdamW", "max"), ("RMSprop", "l2")],
)
def test_fit_clips_gradients_before_the_step_of_the_base(base, norm):
    cls = getattr(keras_normopt, f"Clipped{base}")
    model = by_hand.make_model(cls(0.1, norm=norm, max_norm=0.5))
    by_hand.fit(model)
    expected = by_hand.train(
        getattr(keras.optimizers, base)(0.1), lambda g: clip(norm, [g], 0.5)[0]
    )
    by_hand.assert_same(model.get_weights(), expected)


def test_global_scope_equals_global_clipnorm_of_keras():
    gradients = make_gradients()
    ours = steps_of(keras_normopt.ClippedSGD(1.0, scope="global"), gradients)
    expected = steps_of(keras.optimizers.SGD(1.0, global_clipnorm=1.0), gradients)
    for path in gradients:
        np.testing.assert_allclose(ours[path], expected[path], rtol=1e-5, atol=1e-12)


def test_a_layer_is_clipped_as_one_block_and_excluded_layers_are_not():
    gradients = make_gradients()
    optimizer = keras_normopt.ClippedSGD(1.0, scope="layer", exclude="^a/")
    steps = steps_of(optimizer, gradients)
    for layer in LAYERS[1:]:
        clipped = clip("l2", [gradients[path] for path in layer], 1.0)
        for path, expected in zip(layer, clipped, strict=True):
            np.testing.assert_allclose(steps[path], expected, rtol=1e-5, atol=1e-12)
    for path in LAYERS[0]:
        np.testing.assert_allclose(steps[path], gradients[path], rtol=1e-6)


def test_norm_none_clips_nothing():
    gradient = np.array([3e9, -4.0], "float32")
    optimizer = keras_normopt.ClippedSGD(1.0, norm=None)
    np.testing.assert_array_equal(step(optimizer, gradient), gradient)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_clipping_does_not_hide_non_finite_entries(bad):
    optimizer = keras_normopt.ClippedSGD(1.0)
    assert not np.isfinite(step(optimizer, np.array([1.0, bad], "float32"))[1])


@pytest.mark.parametrize("alias", CLASSES)
def test_clipped_classes_are_found_by_name_and_loaded_from_files(alias, tmp_path):
    model = by_hand.make_model(alias)
    cls = CLASSES[alias]
    assert type(model.optimizer) is cls
    assert type(keras.optimizers.get(cls.__name__)) is cls
    model.compile(cls(norm="max", max_norm=0.25), "mse")
    by_hand.fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    config = loaded.optimizer.get_config()
    assert (config["norm"], config["max_norm"]) == ("max", 0.25)
    assert type(loaded.optimizer) is cls
    assert pickle.loads(pickle.dumps(cls)) is cls
    by_hand.fit(model)
    by_hand.fit(loaded)
    by_hand.assert_same(loaded.get_weights(), model.get_weights())


def test_any_other_base_can_be_clipped():
    cls = keras_normopt.clipped(keras.optimizers.Nadam)
    assert cls is keras_normopt.clipped(keras.optimizers.Nadam)
    assert cls.__name__ == "ClippedNadam"
    assert issubclass(cls, keras.optimizers.Nadam)
    assert pickle.loads(pickle.dumps(cls)) is cls
    loaded = keras.optimizers.deserialize(keras.optimizers.serialize(cls(max_norm=2)))
    assert (type(loaded), loaded.max_norm) == (cls, 2.0)


def test_a_class_cannot_be_clipped_and_normalized():
    with pytest.raises(ValueError, match="is normalized already"):
        keras_normopt.clipped(keras_normopt.NormalizedSGD)
    with pytest.raises(ValueError, match="is clipped already"):
        keras_normopt.normalized(keras_normopt.ClippedSGD)
    with pytest.raises(ValueError, match="is clipped already"):
        keras_normopt.clipped(keras_normopt.ClippedSGD)
    with pytest.raises(ValueError, match="is normalized already"):
        keras_normopt.ClippedOptimizer("normalized_sgd")


@pytest.mark.parametrize("max_norm", [0, -1.0, np.nan, np.inf, "1", None, True, 10**99])
def test_max_norm_is_checked(max_norm):
    with pytest.raises(ValueError, match=r"`max_norm` must be.*Received: max_norm="):
        keras_normopt.ClippedSGD(max_norm=max_norm)
    optimizer = keras_normopt.ClippedSGD()
    with pytest.raises(ValueError, match="max_norm="):
        optimizer.max_norm = max_norm
    assert optimizer.max_norm == 1.0


def test_the_interface_of_2018_makes_clipped_optimizers():
    variable = keras.Variable([1.0, 1.0])
    adam = keras.optimizers.Adam(0.125)
    adam.apply([ops.convert_to_tensor([3.0, 4.0])], [variable])
    optimizer = keras_normopt.ClippedOptimizer(adam, normalization="max", clipnorm=0.5)
    assert type(optimizer) is keras_normopt.ClippedAdam
    assert isinstance(optimizer, keras_normopt.ClippedOptimizer)
    assert not isinstance(optimizer, keras_normopt.NormalizedOptimizer)
    assert (optimizer.norm, optimizer.max_norm) == ("max", 0.5)
    assert float(optimizer.learning_rate) == 0.125
    for ours, expected in zip(stored(optimizer), stored(adam), strict=True):
        np.testing.assert_array_equal(ours, expected)
    default = keras_normopt.ClippedOptimizer("sgd")
    assert (default.norm, default.max_norm) == ("l2", 1.0)
