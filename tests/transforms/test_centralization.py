"""Compares centralized gradients with NumPy."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import by_hand, oracle
from helpers.variables import SHAPES, as_numpy, gradient_steps, make_gradients

pytestmark = pytest.mark.newest_keras


def centralized(gradient):
    if gradient.ndim < 2 or not gradient.size:
        return gradient
    return gradient - gradient.mean(axis=tuple(range(gradient.ndim - 1)))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4), (2, 2, 3, 4), (0, 3)])
@pytest.mark.parametrize("norm", ["l2", None])
def test_the_mean_of_each_unit_is_subtracted(norm, shape):
    gradient = np.random.default_rng(0).normal(size=shape) + 1.0
    optimizer = keras_normopt.NormalizedSGD(1.0, norm=norm, centralize=True)
    variable = keras.Variable(np.zeros(shape), dtype="float64")
    optimizer.apply([ops.convert_to_tensor(gradient, "float64")], [variable])
    expected = centralized(gradient)
    if norm and expected.size:
        expected = expected / np.linalg.norm(expected)
    np.testing.assert_allclose(-as_numpy(variable), expected, rtol=1e-6, atol=1e-12)


def test_centralizing_and_dividing_by_std_gives_z_scores_of_units():
    gradient = np.random.default_rng(0).normal(size=(5, 4)) + 3.0
    optimizer = keras_normopt.NormalizedSGD(
        1.0, norm="std", scope="unit", centralize=True
    )
    variable = keras.Variable(np.zeros((5, 4)))
    optimizer.apply([ops.convert_to_tensor(gradient, "float32")], [variable])
    expected = (gradient - gradient.mean(axis=0)) / gradient.std(axis=0)
    np.testing.assert_allclose(-as_numpy(variable), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_centralizing_comes_after_tracking_and_before_clipping(apply_to):
    gradients = {path: g + 5.0 for path, g in make_gradients().items()}
    optimizer = keras_normopt.ClippedSGD(
        1.0,
        max_norm=1.5,
        centralize=True,
        exclude="^b/",
        track_norms=True,
        apply_to=apply_to,
    )
    (step,) = gradient_steps(optimizer, [gradients])
    expected = dict(gradients)
    for path, gradient in gradients.items():
        if not path.startswith("b/"):
            centered = centralized(gradient)
            expected[path] = centered * min(1, 1.5 / np.linalg.norm(centered))
            tracked = optimizer.gradient_norms[path]
            assert tracked == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    for path in SHAPES:
        size = np.abs(expected[path]).max()
        np.testing.assert_allclose(
            step[path], expected[path], rtol=1e-4, atol=1e-6 * size, err_msg=path
        )


def test_fit_centralizes_before_it_normalizes():
    model = by_hand.make_model(keras_normopt.NormalizedAdam(0.1, centralize=True))
    by_hand.fit(model)
    expected = by_hand.train(
        keras.optimizers.Adam(0.1),
        lambda g: oracle.normalize("l2", centralized(np.asarray(g, "float64"))),
    )
    by_hand.assert_same(model.get_weights(), expected)


@pytest.mark.parametrize("centralize", [1, None, "yes"])
def test_centralize_must_be_true_or_false(centralize):
    with pytest.raises(ValueError, match="`centralize` must be True or False"):
        keras_normopt.NormalizedSGD(centralize=centralize)
