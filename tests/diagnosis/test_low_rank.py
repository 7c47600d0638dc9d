"""Tests how `diagnose` measures the rank of gradients, and what it recommends."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_normopt
from helpers import sick
from keras_normopt import diagnose
from keras_normopt.diagnosis import measure

pytestmark = pytest.mark.once


def relu_network(depth, optimizer):
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(64, "relu") for _ in range(depth)]
    return sick.classifier(hidden, optimizer, sick.DIGITS, sick.LABELS)


def names(model, x, y):
    return [finding.name for finding in diagnose(model, x, y).findings]


def expected(*matrices):
    """Returns the largest singular value divided by the Frobenius norm, from NumPy.

    For several matrices, it returns the median.
    """
    shares = [np.linalg.norm(matrix, 2) / np.linalg.norm(matrix) for matrix in matrices]
    return np.median(shares)


@pytest.mark.parametrize(
    ("layer", "x", "split"),
    [
        (layers.Dense(6), (16, 9), lambda g: [g]),
        (layers.Conv2D(6, 3), (16, 5, 5, 4), lambda g: [g.reshape(-1, 6)]),
        (
            layers.MultiHeadAttention(2, 3),
            (16, 5, 4),
            lambda g: [g.reshape(4, 6) if len(g) == 4 else g.reshape(6, 4)],
        ),
        (layers.LSTM(6), (16, 5, 4), lambda g: np.split(g, 4, axis=1)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_concentration_is_the_largest_singular_value_over_the_norm(layer, x, split):
    x = np.random.default_rng(0).normal(size=x).astype("float32")
    inputs = keras.Input(x.shape[1:])
    is_attention = isinstance(layer, layers.MultiHeadAttention)
    outputs = layer(inputs, inputs) if is_attention else layer(inputs)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(1.0), "mse")
    y = np.random.default_rng(1).normal(size=(len(x), *outputs.shape[1:]))
    blocks = {b.name: b for b in diagnose(model, x, y, batch_size=16, batches=1).blocks}
    before = {v.path: keras.ops.convert_to_numpy(v) for v in model.trainable_variables}
    model.train_on_batch(x, y)
    kernels = [v for v in model.trainable_variables if v.name.endswith("kernel")]
    assert kernels
    for variable in kernels:
        gradient = before[variable.path] - keras.ops.convert_to_numpy(variable)
        found = blocks[variable.path].concentration
        assert found == pytest.approx(expected(*split(gradient)), rel=1e-3)


@pytest.mark.parametrize("rank", [1, 2, 20])
def test_power_iteration_agrees_with_a_decomposition(rank):
    rng = np.random.default_rng(rank)
    # Each singular value is a tenth smaller than the one before, as in some gradients.
    values = 1e-25 * 0.9 ** np.arange(rank)
    left, _ = np.linalg.qr(rng.normal(size=(40, rank)))
    right, _ = np.linalg.qr(rng.normal(size=(30, rank)))
    matrix = (left * values) @ right.T
    found = measure._largest_share(matrix)
    assert found == pytest.approx(expected(matrix), rel=0.02)


def test_vectors_and_tables_have_no_concentration():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Embedding(9, 3), layers.Flatten(), layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).integers(0, 9, size=(32, 4))
    blocks = diagnose(model, x, x[:, :1] / 9).blocks
    has = {b.name.split("/")[-1]: np.isfinite(b.concentration) for b in blocks}
    assert has == {"embeddings": False, "kernel": True, "bias": False}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_orthogonal_steps_are_recommended_for_deep_networks_without_problems(optimizer):
    found = diagnose(*relu_network(20, optimizer))
    assert [finding.name for finding in found.findings] == ["nothing", "low_rank"]
    assert "OrthogonalSGD(0.01)" in found.findings[1].advice
    typical = np.nanmedian([block.concentration for block in found.blocks])
    assert f"is {typical:.2f} of its norm" in found.findings[1].fact


def test_nothing_is_recommended_if_orthogonal_steps_gain_nothing():
    assert names(*relu_network(2, "adam")) == ["nothing"]


@pytest.mark.parametrize(
    "optimizer", [lambda: keras_normopt.OrthogonalSGD(0.01), keras.optimizers.Muon]
)
def test_optimizers_that_make_orthogonal_steps_get_no_recommendation(optimizer):
    assert names(*relu_network(20, optimizer())) == ["nothing"]
