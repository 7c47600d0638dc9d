"""Tests the tasks, batches and schedules of the experiments."""

import keras
import numpy as np
import pytest
from keras import ops
from sklearn.datasets import make_spd_matrix

import keras_normopt
from helpers.command import command
from keras_normopt.experiments import runs
from keras_normopt.experiments.published import data, networks, spikes, tasks

pytestmark = pytest.mark.once


def compiled_model(task, network, shape, classes=10):
    """Returns a compiled model of a task, without dropout."""
    model, loss, metrics = tasks.TASKS[task].make(network, shape, classes)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0.0
    model.compile(keras_normopt.NormalizedSGD(0.01), loss, metrics=metrics)
    return model


def predictions(model, x):
    return ops.convert_to_numpy(model(ops.convert_to_tensor(x)))


@pytest.mark.parametrize(
    ("task", "network"),
    [("mlp", "mlp"), ("cnn", "cnn"), ("batches", "12x64"), ("starts", "30x32")],
)
def test_a_few_steps_lower_the_loss_of_an_image_network(task, network, monkeypatch):
    monkeypatch.setattr(networks, "MLP_LAYERS", 3)  # All 30 layers take half a minute.
    model = compiled_model(task, network, (8, 8, 1))
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(20, 8, 8, 1)).astype("float32"), np.arange(20) % 2
    actual = predictions(model, x)
    assert actual.shape == (20, 10)
    np.testing.assert_allclose(actual.sum(axis=-1), 1, rtol=1e-5)
    losses = []
    for _ in range(6):
        losses.append(model.train_on_batch(x, y)[0])
        model.reset_metrics()
    assert losses[-1] < losses[0]


def test_the_output_of_the_cnn_depends_on_the_place_of_a_pattern():
    shape = (32, 32, 3)
    model = networks.cnn(width=8)(shape, 10)
    image = np.zeros((2, *shape), "float32")
    image[0, 4:8, 4:8] = image[1, 20:24, 20:24] = 1.0
    corner, middle = predictions(model, image)
    assert np.abs(corner - middle).max() > 1e-5
    # The first convolution gives the same values at both places.
    first = keras.Model(model.inputs, model.layers[0].output)
    in_corner, in_middle = predictions(first, image)
    np.testing.assert_allclose(in_corner[3:9, 3:9], in_middle[19:25, 19:25], atol=1e-6)


@pytest.mark.parametrize("cell", ["lstm", "plain"])
@pytest.mark.parametrize("reads", ["rows", "pixels"])
def test_recurrent_networks_read_rows_or_pixels_in_order(cell, reads):
    model = compiled_model("rnn", f"{cell}_{reads}", (6, 5, 3))
    x = np.random.default_rng(0).uniform(size=(1, 6, 5, 3)).astype("float32")
    layer = model.layers[1]
    shape = (6, 15) if reads == "rows" else (90, 1)
    steps = x.reshape(1, *shape)
    state = ops.convert_to_numpy(layer(steps))
    whole = predictions(model, x)
    expected = ops.convert_to_numpy(model.layers[2](state))
    np.testing.assert_allclose(whole, expected, rtol=1e-5)
    # The order of the steps matters.
    assert np.abs(predictions(model, x[:, ::-1]) - whole).max() > 1e-5


def transformer():
    return compiled_model("transformer", "transformer", (64,), classes=103)


def test_the_transformer_predicts_each_character_from_those_before_it():
    model = transformer()
    x = np.random.default_rng(0).integers(0, 103, (1, 64))
    changed = x.copy()
    changed[0, 40] = (x[0, 40] + 1) % 103
    before, after = predictions(model, x), predictions(model, changed)
    assert before.shape == (1, 64, 103)
    np.testing.assert_allclose(before.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(after[0, :40], before[0, :40], rtol=1e-4)
    # The change affects all predictions from this character on.
    assert (np.abs(after[0, 40:] - before[0, 40:]).max(axis=-1) > 1e-6).all()


def test_the_transformer_distinguishes_places_of_the_same_character():
    alike = predictions(transformer(), np.zeros((1, 64), "int32"))
    assert np.abs(alike[0, 1:] - alike[0, :1]).max(axis=-1).min() > 1e-6


def test_a_few_steps_lower_the_bits_per_character():
    model = transformer()
    x = np.random.default_rng(0).integers(0, 103, (4, 64))
    bits = []
    for _ in range(6):
        bits.append(model.train_on_batch(x, np.roll(x, -1, axis=1))[1])
        model.reset_metrics()
    assert bits[0] == pytest.approx(np.log2(103), rel=0.2)
    assert bits[-1] < bits[0]


def test_bits_per_character_are_the_mean_of_logarithms_to_base_2():
    metric = tasks.BitsPerCharacter()
    predicted = np.array([[[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]])
    metric.update_state(np.array([[0, 2]]), predicted)
    np.testing.assert_allclose(metric.result(), (1 + 3) / 2, rtol=1e-5)


@pytest.mark.parametrize("corrupt", [spikes.random_labels, spikes.large_inputs])
def test_one_batch_in_200_is_corrupted(corrupt):
    x = np.arange(1, 1001, dtype="float32")[:, None]
    y = np.arange(1, 1001)

    def epochs(seed):
        batches = spikes.Spiked(corrupt, x, y, 32, seed=seed)
        for _ in range(2):
            yield [batches[i] for i in range(len(batches))]
            batches.on_epoch_end()

    first, second = epochs(seed=0)
    assert len(first) == 200
    for epoch in (first, second):
        for inputs, labels in epoch[:-1]:
            np.testing.assert_array_equal(inputs[:, 0], labels)
        inputs, labels = epoch[-1]
        if corrupt is spikes.large_inputs:
            np.testing.assert_array_equal(inputs[:, 0], 100 * labels)
        else:
            assert sorted(inputs[:, 0]) == sorted(labels)
            assert np.mean(inputs[:, 0] == labels) < 0.5
    plain = spikes.Spiked(spikes.nothing, x, y, 32, seed=0)
    for i, (inputs, _) in enumerate(first[:-1]):
        np.testing.assert_array_equal(plain[i][0], inputs)
    inputs, labels = plain[199]
    np.testing.assert_array_equal(inputs[:, 0], labels)
    # Batches differ within an epoch, between epochs and between seeds.
    labels = [first[0][1], first[1][1], second[0][1], next(epochs(seed=1))[0][1]]
    assert len({tuple(drawn) for drawn in labels}) == 4
    for (one, _), (other, _) in zip(first, next(epochs(seed=0)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_corrupted_batch_comes_last_in_each_epoch(tmp_path, monkeypatch):
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
def test_rates_decay_by_a_cosine(schedule, tmp_path):
    arguments = "quadratic --optimizers sgd --learning-rates 0.01 --seeds 1 --epochs 4"
    rows = command(tmp_path, f"{arguments} --schedule {schedule}")
    actual = [row["learning_rate"] for row in rows]
    # The warm-up takes the first 4 of 40 steps.
    warmup = 4 if schedule == "warmup" else 0
    steps = np.array([10, 20, 30, 40])
    expected = 0.005 * (1 + np.cos(np.pi * (steps - warmup) / (40 - warmup)))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-9)
    assert rows[0]["schedule"] == schedule


def test_warmup_starts_at_a_tenth_of_the_rate(tmp_path):
    arguments = "quadratic --optimizers sgd --learning-rates 0.01 --seeds 1 --epochs 20"
    rows = command(tmp_path, f"{arguments} --schedule warmup")
    # The warm-up takes 20 of 200 steps. An epoch has 10 steps, half of the warm-up.
    assert rows[0]["learning_rate"] == pytest.approx(0.0055, rel=1e-4)
    assert max(row["learning_rate"] for row in rows) == pytest.approx(0.01, rel=1e-4)


def test_validation_data_rank_the_runs_and_results_on_test_data_are_reported(
    tmp_path, capsys, monkeypatch
):
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
    actual = rows[1]["test_loss"], rows[1]["test_accuracy"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    validation = model.evaluate(loaded.x_validation, loaded.y_validation, verbose=0)
    assert rows[1]["val_accuracy"] == pytest.approx(validation[1])
    assert rows[1]["judged_by"] == "max val_accuracy"
    assert np.isnan(rows[0]["test_loss"])  # Only the last epoch is tested.
    assert "2x64, test_accuracy, higher is better: normalized_sgd (l2) at 0.1: " in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(("momentum", "batch_size"), [(0, 1), (0.9, 3)])
def test_the_quadratic_task_equals_training_by_hand(momentum, batch_size, tmp_path):
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
    actual = [(row["loss"], row["val_loss"]) for row in rows]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_each_stage_starts_with_a_new_optimizer(tmp_path):
    arguments = "quadratic --optimizers normalized_adam --learning-rates 0.01 --seeds 1"
    rows = command(tmp_path, f"{arguments} --schedule stages --epochs 6")
    keras.utils.set_random_seed(0)
    model, loss, _ = tasks.TASKS["quadratic"].make("quadratic", (1,))
    zeros = np.zeros((10, 1))
    expected = []
    for rate in (0.01, 0.001, 0.0001):
        model.compile(keras_normopt.NormalizedAdam(rate, norm="std"), loss)
        arguments = {"validation_data": (zeros, zeros), "verbose": 0}
        history = model.fit(zeros, zeros, 1, epochs=2, **arguments).history
        losses = zip(history["loss"], history["val_loss"], strict=True)
        expected += [(rate, *pair) for pair in losses]
    actual = [(row["learning_rate"], row["loss"], row["val_loss"]) for row in rows]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_optimizers_with_the_same_seed_share_initial_weights_and_batches(
    tmp_path, monkeypatch
):
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
    # This rate does not move the weights.
    arguments = "--learning-rates 1e-30 --schedule constant --epochs 2 --batch-size 50"
    arguments = f"mlp --fraction 0.1 {arguments} --optimizers"
    command(tmp_path, f"{arguments} sgd,normalized_adam --seeds 1")
    command(tmp_path, f"{arguments} sgd --seeds 2")
    sgd, adam, other_seed = losses
    assert len(sgd) == 6
    np.testing.assert_allclose(adam, sgd, rtol=1e-5)
    assert np.abs(np.subtract(sgd, other_seed)).min() > 1e-3
