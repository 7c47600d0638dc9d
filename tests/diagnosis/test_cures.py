"""Tests that the advice of `diagnose` helps, by training with and without it."""

import math

import keras
import numpy as np
import pytest
from keras import layers, optimizers

import keras_normopt as kn
from helpers import sick

pytestmark = [pytest.mark.once, pytest.mark.nightly]


def accuracy(make, epochs=5, seeds=(0, 1, 2)):
    """Returns the training accuracy after the last epoch, for each seed."""
    accuracies = []
    for seed in seeds:
        keras.utils.set_random_seed(seed)
        model, x, y = make()
        logs = model.fit(x, y, epochs=epochs, batch_size=32, verbose=0)
        accuracies.append(logs.history["accuracy"][-1])
    return np.array(accuracies)


def test_scaled_inputs_or_normalized_gradients_improve_training_on_pixels():
    unscaled = accuracy(lambda: sick.images_of_bytes(1, optimizers.SGD(0.01)))
    assert unscaled.min() < 0.2  # Some seeds stay near chance.
    scaled = accuracy(lambda: sick.images_of_bytes(1 / 255, optimizers.SGD(0.1)))
    normalized = accuracy(lambda: sick.images_of_bytes(1, kn.NormalizedSGD(0.01)))
    assert scaled.min() > 0.85
    assert normalized.min() > 0.6


def test_a_lower_rate_improves_training():
    assert accuracy(lambda: sick.dense(optimizer=optimizers.Adam(1.0))).max() < 0.3
    # The finding says by how much to lower the rate.
    diagnosis = kn.diagnose(*sick.dense(optimizer=optimizers.Adam(1.0)))
    update = np.median([b.update / b.weight_norm for b in diagnosis.blocks[::2]])
    rate = 0.05 / update
    assert accuracy(lambda: sick.dense(optimizer=optimizers.Adam(rate))).min() > 0.9


@pytest.mark.parametrize("layer", [layers.LSTM, layers.GRU])
def test_a_smaller_recurrent_kernel_or_clipping_improves_training(layer):
    def make(gain, optimizer):
        return lambda: sick.recurrent(layer, gain, optimizer())

    exploding = accuracy(make(6.0, lambda: optimizers.SGD(0.1)), seeds=[0])
    clipped = accuracy(make(6.0, lambda: kn.ClippedSGD(0.1, max_norm=1.0)), seeds=[0])
    assert clipped > exploding
    exploding = accuracy(make(6.0, lambda: optimizers.Adam(0.003)), seeds=[0])
    smaller = accuracy(make(1.0, lambda: optimizers.Adam(0.003)), seeds=[0])
    assert smaller > exploding + 0.05


def test_a_relu_rnn_needs_a_smaller_kernel():
    def make(gain, optimizer):
        return lambda: sick.recurrent(layers.SimpleRNN, gain, optimizer, "relu")

    assert accuracy(make(2.0, optimizers.Adam(0.003)), seeds=[0]) < 0.2
    clipping = kn.ClippedSGD(0.1, max_norm=1.0)
    assert accuracy(make(2.0, clipping), seeds=[0]) < 0.2
    assert accuracy(make(1.0, optimizers.Adam(0.003)), seeds=[0]) > 0.45


def decaying(optimizer, rate, epochs):
    steps = epochs * math.ceil(len(sick.DIGITS) / 32)
    return optimizer(optimizers.schedules.CosineDecay(rate, steps))


def test_orthogonal_steps_train_deep_networks_without_normalization():
    def accuracy_of(optimizer, rate, seeds=(0, 1, 2)):
        def make():
            return sick.dense(30, "relu", decaying(optimizer, rate, 8))

        return accuracy(make, 8, seeds)

    diagnosis = kn.diagnose(*sick.dense(30, "relu", optimizers.SGD(0.01)))
    [finding] = diagnosis.findings
    assert finding.name == "vanishing"
    assert "`OrthogonalSGD(0.01)`" in finding.advice
    orthogonal = accuracy_of(kn.OrthogonalSGD, 0.01)
    assert orthogonal.min() > 0.95
    assert orthogonal.min() > accuracy_of(optimizers.Adam, 0.001).max() + 0.2
    assert orthogonal.min() > accuracy_of(kn.NormalizedSGD, 0.01).max() + 0.2


def test_orthogonal_steps_train_eight_sigmoid_layers():
    def make():
        optimizer = decaying(kn.OrthogonalSGD, 0.03, 8)
        return sick.dense(8, "sigmoid", optimizer)

    assert accuracy(make, 8).min() > 0.95


@pytest.mark.parametrize("depth", [12, 40])
def test_batch_normalization_cures_many_sigmoid_layers_but_normalized_steps_fail(depth):
    for optimizer in [
        kn.NormalizedSGD(0.01, 0.9),
        kn.NormalizedAdam(0.001),
        optimizers.Adam(0.001),
    ]:
        sick_model = sick.dense(depth, "sigmoid", optimizer)
        assert accuracy(lambda sick_model=sick_model: sick_model, seeds=[0]) < 0.3
    between = [layers.BatchNormalization]
    cured = accuracy(
        lambda: sick.dense(depth, "sigmoid", optimizers.Adam(0.001), between=between),
        epochs=10,
        seeds=[0],
    )
    assert cured > 0.6


def test_mixed_precision_or_a_larger_epsilon_improves_training_in_float16():
    def make(dtype, epsilon):
        adam = optimizers.Adam(epsilon=epsilon)
        if dtype == "mixed_float16":
            adam = optimizers.LossScaleOptimizer(adam)
        return lambda: sick.dense(optimizer=adam, dtype=dtype)

    pure = accuracy(make("float16", 1e-7), seeds=[0])
    assert accuracy(make("mixed_float16", 1e-7), seeds=[0]) > pure + 0.1
    assert accuracy(make("float16", 1e-3), seeds=[0]) > pure + 0.1


def test_a_model_learns_only_if_it_is_not_frozen():
    def make(trainable):
        model, x, y = sick.dense()
        model.trainable = trainable
        model.compile("adam", model.loss, metrics=["accuracy"])
        return model, x, y

    # This uses `evaluate`. Backends warn differently if `fit` trains a frozen model.
    frozen, x, y = make(False)
    assert frozen.evaluate(x, y, verbose=0)[1] < 0.3
    assert accuracy(lambda: make(True), seeds=[0]) > 0.9


def test_a_trained_model_gains_nothing_from_normalized_gradients():
    model, x, y = sick.dense(optimizer=optimizers.Adam(0.01))
    x, y = x[:512], y[:512]
    model.fit(x, y, epochs=40, verbose=0)
    assert model.evaluate(x, y, verbose=0)[1] == 1
    diagnosis = kn.diagnose(model, x, y)
    assert [finding.name for finding in diagnosis.findings][-1] == "trained"
    assert not {"vanishing", "apart", "below_epsilon"} & {
        finding.name for finding in diagnosis.findings
    }
    model.compile(kn.NormalizedAdam(0.001), model.loss, metrics=["accuracy"])
    model.fit(x, y, epochs=2, verbose=0)
    assert model.evaluate(x, y, verbose=0)[1] == 1


def test_a_model_predicts_one_class_if_all_labels_are_equal():
    model, x, y = sick.dense()
    model.fit(x, np.full_like(y, 3), epochs=3, verbose=0)
    predictions = model.predict(x, verbose=0).argmax(axis=1)
    assert (predictions == 3).all()
    assert accuracy(sick.dense, seeds=[0]) > 0.9
