"""What the experiments train, and how."""

import keras
import numpy as np
import pytest
from sklearn.datasets import make_spd_matrix

import keras_normopt
from keras_normopt.experiments import runs, tasks
from test_experiments import command

SETTINGS = ["units", "filters", "kernel_size", "padding", "activation", "rate"]
SETTINGS.append("pool_size")


def layers_of(network, task, shape):
    """The class of each layer, and the settings of it that matter."""
    model, loss, _ = tasks.TASKS[task].make(network, shape)
    assert loss == "sparse_categorical_crossentropy"
    found = []
    for layer in model.layers:
        config = layer.get_config()
        settings = [config[name] for name in SETTINGS if name in config]
        if config.get("kernel_regularizer"):
            assert config["kernel_regularizer"]["class_name"] == "L2"
            l2 = config["kernel_regularizer"]["config"]["l2"]
            settings += [config["kernel_initializer"]["class_name"], float(l2)]
        found.append([type(layer).__name__, *settings])
    return found, model


def test_mlp():
    found, _ = layers_of("mlp", "mlp", (28, 28, 1))
    hidden = [
        ["Dense", 128, "relu", "HeNormal", pytest.approx(1e-5)],
        ["BatchNormalization"],
        ["Dropout", 0.2],
    ]
    assert found == [["Flatten"], *hidden * 30, ["Dense", 10, "softmax"]]


def test_cnn():
    found, model = layers_of("cnn", "cnn", (32, 32, 3))
    convolutions = [
        [
            ["Conv2D", n, (3, 3), "same", "relu"],
            ["Conv2D", n, (3, 3), "valid", "relu"],
            ["MaxPooling2D", "valid", (2, 2)],
            ["Dropout", 0.25],
        ]
        for n in (32, 64)
    ]
    dense = [["Dense", 512, "relu"], ["Dropout", 0.5], ["Dense", 10, "softmax"]]
    assert found == [*convolutions[0], *convolutions[1], ["Flatten"], *dense]
    assert model.count_params() == 1_250_858


@pytest.mark.parametrize("cell", ["lstm", "plain"])
@pytest.mark.parametrize(
    ("reads", "steps"), [("rows", (32, 96)), ("pixels", (3072, 1))]
)
def test_rnn(cell, reads, steps):
    _, model = layers_of(f"{cell}_{reads}", "rnn", (32, 32, 3))
    layer = model.layers[1]
    assert type(layer).__name__ == {"lstm": "LSTM", "plain": "SimpleRNN"}[cell]
    assert layer.units == 64
    assert layer.input.shape[1:] == steps


@pytest.mark.parametrize(("momentum", "batch_size"), [(0, 1), (0.9, 3)])
def test_quadratic_by_hand(momentum, batch_size, tmp_path):
    arguments = "quadratic --optimizers sgd,normalized_sgd --norms l2 --epochs 3"
    arguments += f" --learning-rates 0.001 --seeds 1 --momentum {momentum}"
    arguments += f" --batch-size {batch_size}"
    rows = command(tmp_path, arguments)
    matrix = make_spd_matrix(100, random_state=0)
    vector = np.random.default_rng(0).normal(size=100)

    def loss(w):
        return w @ matrix @ w / 2 - vector @ w

    expected = []
    for is_normalized in (False, True):
        keras.utils.set_random_seed(0)
        model, *_ = tasks.TASKS["quadratic"].make("quadratic", (1,))
        w, velocity = model.get_weights()[0].astype("float64"), 0
        np.testing.assert_allclose([w.mean(), w.std()], [0, 1], atol=0.25)
        for _ in range(3):
            losses = []
            for _ in range(10):
                losses.append(loss(w))
                gradient = matrix @ w - vector
                if is_normalized:
                    gradient /= np.linalg.norm(gradient)
                velocity = momentum * velocity - 0.001 * gradient
                w = w + momentum * velocity - 0.001 * gradient
            expected.append((np.mean(losses), loss(w)))
    found = [(row["loss"], row["val_loss"]) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_each_stage_begins_with_a_new_optimizer(tmp_path):
    arguments = "quadratic --optimizers normalized_adam --learning-rates 0.01 --seeds 1"
    rows = command(tmp_path, f"{arguments} --schedule stages --epochs 6")
    keras.utils.set_random_seed(0)
    model, loss, _ = tasks.TASKS["quadratic"].make("quadratic", (1,))
    nothing = np.zeros((10, 1))
    expected = []
    for rate in (0.01, 0.001, 0.0001):
        model.compile(keras_normopt.NormalizedAdam(rate, norm="std"), loss)
        arguments = {"validation_data": (nothing, nothing), "verbose": 0}
        history = model.fit(nothing, nothing, 1, epochs=2, **arguments).history
        losses = zip(history["loss"], history["val_loss"], strict=True)
        expected += [(rate, *pair) for pair in losses]
    found = [(row["learning_rate"], row["loss"], row["val_loss"]) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_optimizers_of_a_seed_begin_alike_and_see_the_same(tmp_path, monkeypatch):
    losses = []

    class Spy(runs.Record):
        def on_train_begin(self, logs=None):
            losses.append([])

        def on_train_batch_end(self, batch, logs=None):
            losses[-1].append(float(logs["loss"]))

    def make(shape, classes):
        layers = [keras.layers.Flatten(), keras.layers.Dropout(0.5)]
        layers.append(keras.layers.Dense(classes, "softmax"))
        return keras.Sequential([keras.Input(shape), *layers])

    monkeypatch.setattr(runs, "Record", Spy)
    monkeypatch.setitem(tasks.TASKS["mlp"].networks, "mlp", make)
    # Without moving anywhere.
    arguments = "--learning-rates 1e-30 --schedule constant --epochs 2 --batch-size 50"
    arguments = f"mlp --fraction 0.1 {arguments} --optimizers"
    command(tmp_path, f"{arguments} sgd,normalized_adam --seeds 1")
    command(tmp_path, f"{arguments} sgd --seeds 2")
    sgd, adam, other_seed = losses
    assert len(sgd) == 6
    np.testing.assert_allclose(adam, sgd, rtol=1e-5)
    assert np.abs(np.subtract(sgd, other_seed)).min() > 1e-3
