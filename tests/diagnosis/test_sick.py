"""Tests the findings of `diagnose` for models that train badly."""

import keras
import numpy as np
import pytest
from keras import layers, optimizers
from keras.optimizers import schedules

import keras_normopt
from helpers import sick

pytestmark = pytest.mark.once


def diagnose(model, x, y=None, batches=1, **arguments):
    return keras_normopt.diagnose(model, x, y, batches=batches, **arguments)


def findings(*data, **arguments):
    return {f.name: f for f in diagnose(*data, **arguments).findings}


def test_pixels_from_0_to_255_are_found():
    results = findings(*sick.images_of_bytes())
    assert {"input_scale", "first_loss"} <= results.keys()
    assert "exploding" not in results
    assert "from 0 to 255" in results["input_scale"].fact
    assert results["input_scale"].advice.startswith("Scale the inputs")
    assert "guessing among 10 classes, 2.3" in results["first_loss"].fact


def test_pixels_before_a_rescaling_layer_are_no_problem():
    hidden = [layers.Rescaling(1 / 255), layers.Dense(64, "relu")]
    report = diagnose(*sick.classifier(hidden, "adam", sick.DIGITS * 255, sick.LABELS))
    assert [finding.name for finding in report.findings] == ["nothing"]
    assert report.inputs.high == pytest.approx(1)


def test_tokens_are_not_checked_for_scale():
    hidden = [layers.Embedding(300, 8), layers.GlobalAveragePooling1D()]
    tokens = (sick.DIGITS * 255).astype("int32")
    report = diagnose(*sick.classifier(hidden, "adam", tokens, sick.LABELS))
    assert [finding.name for finding in report.findings] == ["nothing"]
    assert report.inputs is None


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ((1, 1), {"nothing"}),
        ((1000, 1), {"input_scale"}),
        ((1e-3, 1), {"input_scale"}),
        ((1, 1000), {"target_scale"}),
        ((1, 1e-3), {"target_scale"}),
    ],
)
def test_inputs_and_targets_of_a_wrong_scale_are_found(scales, expected):
    results = findings(*sick.regression(*scales))
    assert results.keys() & {"input_scale", "target_scale", "nothing"} == expected


def test_a_model_without_trainable_variables_is_found():
    model, x, y = sick.dense()
    model.trainable = False
    model.compile("adam", model.loss)
    [finding] = diagnose(model, x, y).findings
    assert finding.name == "nothing_trainable"
    assert "6 of 6 variables" in finding.fact


def test_a_frozen_backbone_is_listed_but_is_no_problem():
    model, x, y = sick.dense()
    for layer in model.layers[:-1]:
        layer.trainable = False
    model.compile("adam", model.loss)
    report = diagnose(model, x, y)
    assert [finding.name for finding in report.findings] == ["nothing", "frozen"]
    assert "4 of 6 variables" in report.findings[1].fact
    backbone = [variable.path for variable in model.variables[:4]]
    assert list(report.frozen) == backbone


def test_moving_averages_do_not_count_as_frozen():
    between = [layers.BatchNormalization, lambda: layers.Dropout(0.1)]
    model, x, y = sick.dense(between=between)
    assert diagnose(model, x, y).frozen == ()


def warmup(peak):
    return schedules.CosineDecay(0.0, 100, warmup_target=peak, warmup_steps=70)


class Noam(schedules.LearningRateSchedule):
    """A schedule without a config, as in Keras's tutorials."""

    def __init__(self, peak, turn=4000):
        self.peak, self.turn = peak, turn

    def __call__(self, step):
        step = keras.ops.cast(step, "float32") + 1
        rise, fall = step / self.turn, keras.ops.rsqrt(step / self.turn)
        return self.peak * keras.ops.minimum(rise, fall)


def steps(peak):
    return schedules.PiecewiseConstantDecay([5000], [0.01, peak])


def scaled(peak):
    return optimizers.LossScaleOptimizer(optimizers.Adam(peak))


# Each function makes an optimizer whose learning rate is multiplied by a factor.
RATES = {
    "Adam": lambda factor: optimizers.Adam(0.01 * factor),
    "SGD": lambda factor: optimizers.SGD(0.1 * factor),
    "momentum": lambda factor: optimizers.SGD(0.001 * factor, momentum=0.99),
    "NormalizedSGD": lambda factor: keras_normopt.NormalizedSGD(0.1 * factor),
    "warmup": lambda factor: optimizers.Adam(warmup(0.01 * factor)),
    "steps": lambda factor: optimizers.Adam(steps(0.01 * factor)),
    "own_schedule": lambda factor: optimizers.Adam(Noam(0.01 * factor)),
    "loss_scale": lambda factor: scaled(0.01 * factor),
    "accumulation": lambda factor: optimizers.Adam(
        0.01 * factor, gradient_accumulation_steps=3
    ),
}


@pytest.mark.parametrize(
    ("name", "factor"),
    [*((name, 100) for name in RATES), ("momentum", 1), ("warmup", 1)],
)
def test_the_largest_rate_of_a_schedule_is_checked(name, factor):
    results = findings(*sick.dense(optimizer=RATES[name](factor)))
    assert list(results) == ["nothing" if factor == 1 else "long_steps"]


def test_the_measured_update_equals_the_first_update_of_fit():
    model, x, y = sick.dense(
        optimizer=keras_normopt.NormalizedAdam(0.01, exclude=["head"])
    )
    x, y = x[:32], y[:32]
    report = diagnose(model, x, y)
    before = model.get_weights()
    # `fit` sees the same examples in another order.
    model.fit(x, y, verbose=0)
    for block, old, new in zip(report.blocks, before, model.get_weights(), strict=True):
        assert block.update == pytest.approx(np.linalg.norm(new - old), rel=1e-3)


def test_a_trained_optimizer_keeps_its_state():
    model, x, y = sick.dense(optimizer=optimizers.Adam(0.01))
    model.fit(x[:320], y[:320], verbose=0)
    before = [
        np.array(keras.ops.convert_to_numpy(v)) for v in model.optimizer.variables
    ]
    report = diagnose(model, x[:32], y[:32])
    for old, variable in zip(before, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(old, keras.ops.convert_to_numpy(variable))
    weights = model.get_weights()
    model.fit(x[:32], y[:32], verbose=0)
    for block, old, new in zip(
        report.blocks, weights, model.get_weights(), strict=True
    ):
        assert block.update == pytest.approx(np.linalg.norm(new - old), rel=1e-3)


def test_an_optimizer_without_a_config_is_not_checked():
    class Own(optimizers.SGD):
        def __init__(self, needed):
            super().__init__(0.01)

    report = diagnose(*sick.dense(optimizer=Own(3)))
    [unchecked] = report.unchecked
    assert "first update" in unchecked
    assert "Not checked: first update" in str(report)


def test_small_gradients_of_a_trained_model_are_not_reported_as_vanishing():
    """The labels are the predictions of the model itself."""
    model, x, _ = sick.classifier([], "adam", 2 * sick.DIGITS - 1, sick.LABELS)
    model.set_weights([300 * weights for weights in model.get_weights()])
    y = keras.ops.convert_to_numpy(model(x)).argmax(axis=1)
    results = findings(model, x, y)
    assert list(results) == ["trained"]
    assert "far below that of the best constant" in results["trained"].fact


@pytest.mark.parametrize(
    ("dtype", "epsilon", "is_found"),
    [("float16", 1e-7, True), ("float16", 1e-3, False), ("mixed_float16", 1e-7, False)],
)
def test_a_small_epsilon_in_half_precision_is_found(dtype, epsilon, is_found):
    optimizer = optimizers.Adam(epsilon=epsilon)
    results = findings(*sick.dense(optimizer=optimizer, dtype=dtype))
    assert ("half_precision" in results) == is_found
    if is_found:
        assert '"mixed_float16"' in results["half_precision"].advice


def test_updates_that_are_rounded_away_are_found():
    optimizer = optimizers.Adam(1e-5)
    results = findings(*sick.dense(optimizer=optimizer, dtype="bfloat16"))
    assert "rounds it away" in results["half_precision"].fact


@pytest.mark.parametrize("loss", ["sparse", "categorical", "binary", "mse"])
def test_constant_targets_are_found(loss):
    model, x, y = sick.dense()
    y = np.zeros_like(y)
    if loss == "categorical":
        model.compile("adam", keras.losses.CategoricalCrossentropy(from_logits=True))
        y = np.eye(10)[y]
    elif loss in ("binary", "mse"):
        model, _, _ = sick.regression()
        model.compile("adam", {"binary": "binary_crossentropy"}.get(loss, loss))
    results = findings(model, x, y)
    assert "constant_targets" in results
    # One other target is enough. Targets outside the measured batches count, too.
    y[:1] += 1
    y[:1] %= 2
    if loss != "categorical":
        assert "constant_targets" not in findings(model, x, y)


def test_labels_that_are_too_large_for_the_outputs_are_found():
    model, x, y = sick.dense()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    y = y.copy()
    y[7] = 10
    # If a batch contains the wrong label, PyTorch itself raises an error.
    if 7 in np.random.default_rng(0).permutation(len(y))[:128]:
        pytest.fail("A batch contains the wrong label. Give it to another example.")
    assert "from 0 to 10" in findings(model, x, y)["label_range"].fact


def targets(kind, n=64, k=5):
    rng = np.random.default_rng(0)
    labels = rng.choice(k, size=n, p=[0.5, 0.2, 0.1, 0.1, 0.1])
    onehot = np.eye(k)[labels]
    frequencies = onehot.mean(axis=0)
    entropy = -np.sum(frequencies * np.log(frequencies))
    if kind == "sparse":
        return labels, entropy, np.log(k)
    if kind == "categorical":
        return onehot, entropy, np.log(k)
    if kind == "binary":
        p = frequencies
        return onehot, np.mean(-p * np.log(p) - (1 - p) * np.log(1 - p)), np.log(2)
    y = rng.normal(size=(n, k)) + 3
    if kind == "mse":
        return y, y.var(axis=0).mean(), np.mean(y**2)
    return y, np.abs(y - np.median(y, axis=0)).mean(), np.abs(y).mean()


LOSSES = {
    "sparse": keras.losses.SparseCategoricalCrossentropy,
    "categorical": keras.losses.CategoricalCrossentropy,
    "binary": keras.losses.BinaryCrossentropy,
}


@pytest.mark.parametrize(
    ("kind", "from_logits"),
    [
        ("sparse", False),
        ("sparse", True),
        ("categorical", True),
        ("binary", False),
        ("binary", True),
        ("mse", False),
        ("mae", False),
    ],
)
def test_losses_of_constant_predictions_agree_with_numpy(kind, from_logits):
    y, best, zero = targets(kind)
    activation = None
    if kind in LOSSES and not from_logits:
        activation = "sigmoid" if kind == "binary" else "softmax"
    loss = LOSSES[kind](from_logits=from_logits) if kind in LOSSES else kind
    head = layers.Dense(5, activation, kernel_regularizer=keras.regularizers.L2(0.1))
    model = keras.Sequential([keras.Input((8,)), head])
    model.compile("sgd", loss)
    [kernel, _] = model.get_weights()
    weights = np.full(64, 2.0)
    x = np.ones((64, 8), "float32")
    report = diagnose(model, x, y, batches=2, sample_weight=weights)
    penalty = 0.1 * np.sum(kernel**2)
    assert report.constants.best == pytest.approx(2 * best + penalty, rel=1e-4)
    assert report.constants.zero == pytest.approx(2 * zero + penalty, rel=1e-4)


def own_loss(y, outputs):
    return keras.ops.mean(keras.ops.square(y - outputs), axis=-1)


def test_the_report_says_what_was_not_checked():
    model, x, y = sick.regression()
    model.compile("adam", own_loss)
    report = diagnose(model, x, y)
    assert "Not checked: targets (the loss is own_loss); first loss" in str(report)
    inputs = keras.Input((64,))
    several = keras.Model(inputs, [model(inputs), model.layers[0](inputs)])
    several.compile("adam", ["mse", "mse"])
    report = diagnose(several, x, (y, np.zeros((len(x), 32))))
    assert "the model has several outputs" in str(report)


def test_a_report_without_problems_says_what_was_checked_and_what_to_do_next():
    text = str(diagnose(*sick.dense())).replace("\n ", "")
    for part in [
        "- nothing: ",
        "10 classes",
        "best constant",
        "first update",
        "-1 to 1",
    ]:
        assert part in text
    assert "look at what `diagnose` cannot see" in text


def test_batched_data_are_checked():
    model, x, _ = sick.dense()

    def batches():
        while True:
            yield 255 * x[:32], np.zeros(32, "int32")

    results = findings(model, batches(), None, batches=2)
    assert {"input_scale", "constant_targets"} <= results.keys()
    assert "all 64 labels" in results["constant_targets"].fact


def test_missing_targets_are_an_error_if_the_loss_needs_them():
    model, x, _ = sick.dense()
    with pytest.raises(ValueError, match=r"needs targets.*Pass `y`.*y=None"):
        diagnose(model, x)


def test_a_model_that_adds_its_loss_needs_no_targets():
    class Difference(layers.Layer):
        def call(self, inputs):
            self.add_loss(keras.ops.mean(keras.ops.square(inputs[0] - inputs[1])))
            return inputs[1]

    inputs = keras.Input((64,))
    outputs = Difference()([inputs, layers.Dense(64)(inputs)])
    model = keras.Model(inputs, outputs)
    model.compile("adam")
    report = diagnose(model, sick.DIGITS)
    assert len(report.blocks) == 2


def test_the_report_shows_a_dash_for_variables_whose_weights_are_all_0():
    text = str(diagnose(*sick.dense()))
    assert "–" in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("layer", "gain", "activation"),
    [(layers.LSTM, 6.0, "tanh"), (layers.SimpleRNN, 2.0, "relu")],
)
def test_an_exploding_recurrent_kernel_is_found(layer, gain, activation):
    results = findings(*sick.recurrent(layer, gain, "sgd", activation))
    assert "multiplies the state by up to" in results["exploding"].fact
    assert "recurrent_kernel" in results["exploding"].fact
    assert results["exploding"].advice.startswith("Initialize the recurrent kernel")
    assert "ClippedSGD" in results["exploding"].advice
    assert not results.keys() & {"input_scale", "target_scale", "noise"}
    results = findings(*sick.recurrent(layer, 1.0, "sgd", activation))
    assert "exploding" not in results


def test_diagnose_does_not_change_random_states():
    import random

    model, x, y = sick.dense(between=[lambda: layers.Dropout(0.5)])

    def states():
        drawn = [random.getstate(), str(np.random.get_state())]
        if keras.backend.backend() == "torch":
            import torch

            drawn.append(torch.get_rng_state().tolist())
        return drawn

    before = states()
    diagnose(model, x, y)
    assert states() == before
