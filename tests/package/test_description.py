"""Tests that the table of `describe` agrees with the steps of the optimizer."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_normopt

pytestmark = pytest.mark.newest_keras


def make_model(optimizer):
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(10, 8, name="embed"),
            layers.Conv1D(32, 3, name="conv"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(4, name="head"),
        ]
    )
    model.compile(optimizer=optimizer, loss="mse")
    return model


def rows_of(optimizer):
    found = keras_normopt.describe(make_model(optimizer))
    return {"/".join(row.path.split("/")[-2:]): row for row in found}


def test_lengths_in_the_table_agree_with_a_step():
    model = make_model(keras_normopt.OrthogonalSGD(0.5, momentum=0.0, nesterov=False))
    rows = keras_normopt.describe(model)
    assert not model.optimizer.built
    before = [v.numpy() for v in model.trainable_variables]
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=b.shape).astype("float32") for b in before]
    model.optimizer.apply(
        [keras.ops.convert_to_tensor(g) for g in gradients], model.trainable_variables
    )
    for row, old, new in zip(rows, before, model.trainable_variables, strict=True):
        step = (old - new.numpy()) / 0.5
        if row.step == "orthogonal":
            matrix = step.reshape(-1, step.shape[-1])
            sizes = np.linalg.svd(matrix, compute_uv=False)
            assert row.length.startswith("singular values of ")
        elif row.step == "rows":
            sizes = np.linalg.norm(step, axis=1)
            assert row.length.startswith("rows of ")
        else:
            assert (row.step, row.axes, row.length) == ("raw", "vector", "")
            continue
        np.testing.assert_allclose(sizes, float(row.length.split()[-1]), rtol=0.15)
    names = [row.layer for row in rows]
    assert names == ["Embedding", "Conv1D", "Conv1D", "Dense", "Dense"]


@pytest.mark.parametrize(
    ("optimizer", "step", "length", "why"),
    [
        (lambda: keras_normopt.NormalizedSGD(), "divided", "l2 of 1", "variable"),
        (
            lambda: keras_normopt.NormalizedSGD(norm="max", scope="layer"),
            "divided",
            "max of 1",
            'scope="layer"',
        ),
        (lambda: keras_normopt.NormalizedSGD(exclude="head"), "raw", "", "`exclude`"),
        (lambda: keras_normopt.NormalizedSGD(norm=None), "raw", "", "norm=None"),
        (
            lambda: keras_normopt.NormalizedSGD(norm=None, centralize=True),
            "centralized",
            "",
            "norm=None",
        ),
        (
            lambda: keras_normopt.ClippedSGD(max_norm=0.5),
            "clipped",
            "l2 of at most 0.5",
            "variable",
        ),
        (
            lambda: keras_normopt.NormalizedSGD(
                direction={"head": None, ".*": "orthogonal"}
            ),
            "raw",
            "",
            "kernel: the direction does not change it",
        ),
    ],
)
def test_the_table_describes_each_kind_of_step(optimizer, step, length, why):
    row = rows_of(optimizer())["head/kernel"]
    assert (row.step, row.length) == (step, length)
    assert why in row.why


def test_the_title_of_the_table_names_step_sizes():
    optimizer = keras_normopt.NormalizedSGD(step_size="weight_norm")
    text = str(keras_normopt.describe(make_model(optimizer)))
    title, _, header, *rows = text.splitlines()
    assert title.startswith("NormalizedSGD, of its gradients, step_size=WeightNorm(")
    assert header.split() == [
        "path",
        "shape",
        "layer",
        "axes",
        "step",
        "length",
        "rate",
        "why",
    ]
    assert len(rows) == 5


def test_the_table_says_which_axes_are_guessed():
    class Own(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1], 3), name="w")

        def call(self, x):
            return x @ self.w

    model = keras.Sequential([keras.Input((2,)), Own()])
    model.compile(optimizer=keras_normopt.OrthogonalSGD(), loss="mse")
    with pytest.warns(UserWarning, match="w of shape"):
        (row,) = keras_normopt.describe(model)
    assert (row.layer, row.axes, row.why) == ("Own", "(0 | 1)", "kernel, axes guessed")


def test_a_model_that_cannot_be_described_is_refused():
    model = make_model(
        keras_normopt.NormalizedSGD(norm=lambda g: keras.ops.max(abs(g)))
    )
    with pytest.raises(ValueError, match=r"not built yet.*optimizer\.build\("):
        keras_normopt.describe(model)
    model.optimizer.build(model.trainable_variables)
    assert len(keras_normopt.describe(model)) == 5
    with pytest.raises(ValueError, match="needs a model that is compiled with an opt"):
        keras_normopt.describe(make_model("sgd"))
    with pytest.raises(ValueError, match="no trainable variables"):
        keras_normopt.describe(keras.Sequential([layers.Dense(2)]))
