"""What the experiments train, and how."""

import keras
import numpy as np
import pytest
from sklearn.datasets import make_spd_matrix

import keras_normopt
from keras_normopt.experiments import runs
from keras_normopt.experiments.published import data, spikes, tasks
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


@pytest.mark.parametrize(
    ("task", "network", "depth", "width"),
    [("batches", "12x64", 12, 64), ("starts", "30x32", 30, 32)],
)
def test_plain(task, network, depth, width):
    found, model = layers_of(network, task, (8, 8, 1))
    assert found[0] == ["Flatten"]
    assert found[1:] == [["Dense", width, "relu"]] * depth + [["Dense", 10, "softmax"]]
    config = model.layers[1].get_config()
    assert config["kernel_initializer"]["class_name"] == "GlorotUniform"


def test_transformer():
    classes, width = 103, 64
    model, _, [metric] = tasks.TASKS["transformer"].make("transformer", (64,), classes)
    attention = 4 * (width * width + width)
    dense = width * 256 + 256 + 256 * width + width
    block = attention + dense + 2 * 2 * width
    around = classes * width + 64 * width + 2 * width + width * classes + classes
    assert model.count_params() == 2 * block + around

    x = np.random.default_rng(0).integers(0, classes, (1, 64))
    changed = x.copy()
    changed[0, 40] = (x[0, 40] + 1) % classes
    before, after = model.predict(x, verbose=0), model.predict(changed, verbose=0)
    np.testing.assert_allclose(before.sum(axis=-1), 1, rtol=1e-5)
    # Each character is predicted from those before it, and from all of them.
    np.testing.assert_allclose(after[0, :40], before[0, :40], rtol=1e-4)
    assert (np.abs(after[0, 40:] - before[0, 40:]).max(axis=-1) > 1e-6).all()
    # Nor are all places alike.
    alike = model.predict(np.zeros((1, 64)), verbose=0)
    assert np.abs(alike[0, 1:] - alike[0, :1]).max(axis=-1).min() > 1e-6

    predicted = np.array([[[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]])
    metric.update_state(np.array([[0, 2]]), predicted)
    np.testing.assert_allclose(metric.result(), (1 + 3) / 2, rtol=1e-5)


@pytest.mark.parametrize("spoil", [spikes.random_labels, spikes.large_inputs])
def test_one_batch_in_200_is_spoilt(spoil):
    x = np.arange(1, 1001, dtype="float32")[:, None]
    y = np.arange(1, 1001)

    def epochs(seed):
        batches = spikes.Spiked(spoil, x, y, 32, seed=seed)
        for _ in range(2):
            yield [batches[i] for i in range(len(batches))]
            batches.on_epoch_end()

    first, second = epochs(seed=0)
    assert len(first) == 200
    for epoch in (first, second):
        for inputs, labels in epoch[:-1]:
            np.testing.assert_array_equal(inputs[:, 0], labels)
        inputs, labels = epoch[-1]
        if spoil is spikes.large_inputs:
            np.testing.assert_array_equal(inputs[:, 0], 100 * labels)
        else:
            assert sorted(inputs[:, 0]) == sorted(labels)
            assert np.mean(inputs[:, 0] == labels) < 0.5
    plain = spikes.Spiked(spikes.nothing, x, y, 32, seed=0)
    for i, (inputs, _) in enumerate(first[:-1]):
        np.testing.assert_array_equal(plain[i][0], inputs)
    inputs, labels = plain[199]
    np.testing.assert_array_equal(inputs[:, 0], labels)
    # Drawn anew: within an epoch, in the next one, and with another seed.
    labels = [first[0][1], first[1][1], second[0][1], next(epochs(seed=1))[0][1]]
    assert len({tuple(drawn) for drawn in labels}) == 4
    for (one, _), (other, _) in zip(first, next(epochs(seed=0)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_spoilt_batches_come_last(tmp_path, monkeypatch):
    losses = []

    class Spy(runs.Record):
        def on_train_batch_end(self, batch, logs=None):
            losses.append(float(logs["loss"]) * (batch + 1))

    monkeypatch.setattr(runs, "Record", Spy)
    arguments = "spiked_inputs --networks 2x64 --optimizers sgd --learning-rates 1e-30"
    rows = command(tmp_path, f"{arguments} --seeds 1 --epochs 2")
    assert len(losses) == 400
    for epoch in (losses[:200], losses[200:]):
        each = np.diff(epoch, prepend=0)  # `fit` logs the mean so far.
        assert each[-1] > 3 * each[:-1].max()
    assert {"test_loss", "test_accuracy"} <= set(rows[0])


@pytest.mark.parametrize("schedule", ["cosine", "warmup"])
def test_decaying_rates(schedule, tmp_path):
    arguments = "quadratic --optimizers sgd --learning-rates 0.01 --seeds 1 --epochs 4"
    rows = command(tmp_path, f"{arguments} --schedule {schedule}")
    found = [row["learning_rate"] for row in rows]
    # Of 40 steps; the warm-up takes the first 4.
    warmup = 4 if schedule == "warmup" else 0
    steps = np.array([10, 20, 30, 40])
    expected = 0.005 * (1 + np.cos(np.pi * (steps - warmup) / (40 - warmup)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
    assert rows[0]["schedule"] == schedule


def test_warmup_begins_at_a_tenth(tmp_path):
    arguments = "quadratic --optimizers sgd --learning-rates 0.01 --seeds 1 --epochs 20"
    rows = command(tmp_path, f"{arguments} --schedule warmup")
    # Twenty steps of 200: after ten of them half way from a tenth.
    assert rows[0]["learning_rate"] == pytest.approx(0.0055, rel=1e-4)
    assert max(row["learning_rate"] for row in rows) == pytest.approx(0.01, rel=1e-4)


def test_what_is_chosen_by_is_not_what_is_reported_on(tmp_path, capsys, monkeypatch):
    models = []

    class Spy(runs.Record):
        def on_train_end(self, logs=None):
            models.append(self.model)

    monkeypatch.setattr(runs, "Record", Spy)
    arguments = "batches --networks 2x64 --optimizers normalized_sgd --batch-size 32"
    rows = command(tmp_path, f"{arguments} --learning-rates 0.1 --seeds 1 --epochs 2")
    loaded = data.load("digits", holds_out=True)
    [model] = models
    expected = model.evaluate(loaded.x_test, loaded.y_test, verbose=0)
    found = rows[1]["test_loss"], rows[1]["test_accuracy"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    chosen_by = model.evaluate(loaded.x_validation, loaded.y_validation, verbose=0)
    assert rows[1]["val_accuracy"] == pytest.approx(chosen_by[1])
    assert rows[1]["judged_by"] == "max val_accuracy"
    assert np.isnan(rows[0]["test_loss"])  # Once, at the end.
    assert "2x64, test_accuracy, higher is better: normalized_sgd (l2) at 0.1: " in (
        capsys.readouterr().out
    )


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
