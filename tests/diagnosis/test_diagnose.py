"""Tests what `diagnose` measures and finds, and that it changes nothing."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, ops

from helpers import by_hand
from keras_normopt import NormalizedAdam, diagnose

BACKEND = keras.backend.backend()
EXAMPLES, FEATURES = 48, 8
_rng = np.random.default_rng(0)
X = _rng.normal(size=(EXAMPLES, FEATURES)).astype("float32")
Y = np.sin(X.sum(axis=1, keepdims=True))


def make_model(*hidden, optimizer="sgd", dtype=None, **arguments):
    model = keras.Sequential(
        [keras.Input((FEATURES,)), *hidden, layers.Dense(1, dtype=dtype, name="out")]
    )
    model.compile(optimizer, "mse", **arguments)
    return model


def names(report):
    return [finding.name for finding in report.findings]


def variables_of(model):
    metrics = model.metrics_variables
    return [*model.variables, *metrics, *model.optimizer.variables]


def values(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


@contextlib.contextmanager
def unchanged(model):
    variables = variables_of(model)
    before = values(variables)
    yield
    for old, new in zip(before, values(variables), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "normalized_adam", "lion"])
def test_norms_equal_those_of_gradients_by_hand(optimizer):
    model = by_hand.make_model(optimizer, layers.Dense(4, name="linear"))
    report = diagnose(model, by_hand.X, by_hand.Y, batch_size=12, batches=1)
    expected = by_hand.gradients(by_hand.X, by_hand.Y, *by_hand.START)
    for block, gradient, weights in zip(
        report.blocks, expected, by_hand.START, strict=True
    ):
        assert block.shape == weights.shape
        assert block.norms == pytest.approx([np.linalg.norm(gradient)], rel=1e-5)
        assert block.weight_norm == pytest.approx(np.linalg.norm(weights), rel=1e-6)
        rms = np.sqrt(np.mean(gradient**2))
        assert block.rms == pytest.approx(rms, rel=1e-5)
        assert block.relative == pytest.approx(block.norm / block.weight_norm)
    norm = np.sqrt(sum(np.sum(g**2) for g in expected))
    assert report.totals == pytest.approx([norm], rel=1e-5)


def test_sample_weights_scale_the_gradients():
    x, y = by_hand.X, by_hand.Y
    model = by_hand.make_model("sgd", layers.Dense(4, name="linear"))
    [plain] = diagnose(model, x, y, batch_size=12, batches=1).totals
    twice = np.full(len(x), 2.0)
    [weighted] = diagnose(model, x, y, twice, batch_size=12, batches=1).totals
    assert weighted == pytest.approx(2 * plain, rel=1e-5)


def test_diagnose_does_not_change_later_training():
    """The model has dropout, batch normalization, metrics and compiled functions."""

    def train(after_fit):
        keras.utils.set_random_seed(0)
        hidden = [layers.Dense(8), layers.BatchNormalization(), layers.Dropout(0.5)]
        model = make_model(*hidden, optimizer="adam", metrics=["mae"])
        losses = []
        for seed in range(2):
            keras.utils.set_random_seed(seed)
            losses += model.fit(X, Y, epochs=2, verbose=0).history["loss"]
            after_fit(model)
        return losses + values(variables_of(model))

    def diagnose_unchanged(model):
        function, history = model.train_function, getattr(model, "history", None)
        with unchanged(model):
            assert len(diagnose(model, X, Y, batch_size=8).totals) == 4
        assert model.train_function is function
        assert getattr(model, "history", None) is history
        assert not model.run_eagerly

    for plain, diagnosed in zip(
        train(lambda model: None), train(diagnose_unchanged), strict=True
    ):
        np.testing.assert_array_equal(plain, diagnosed)


def test_diagnose_does_not_build_the_optimizer():
    model = make_model(optimizer="adam")
    diagnose(model, X, Y)
    assert not model.optimizer.built
    assert {"apply", "build"}.isdisjoint(vars(model.optimizer))


def test_a_failed_diagnosis_changes_nothing():
    class Failing(layers.Layer):
        fails = False

        def call(self, inputs):
            if self.fails:
                raise RuntimeError("as planned")
            return inputs

    failing = Failing()
    model = make_model(layers.Dense(4), layers.Dropout(0.5), failing, optimizer="adam")
    model.fit(X, Y, verbose=0)
    failing.fails = True
    with unchanged(model), pytest.raises(RuntimeError, match="as planned"):
        diagnose(model, X, Y)
    failing.fails = False
    assert "apply" not in vars(model.optimizer)
    model.fit(X, Y, verbose=0)


def narrow(depth, activation):
    """Returns layers whose kernels are so small that all gradients vanish."""
    small = keras.initializers.RandomNormal(stddev=0.02, seed=0)
    return [layers.Dense(8, activation, kernel_initializer=small) for _ in range(depth)]


def test_vanishing_gradients_are_found():
    report = diagnose(make_model(*narrow(6, "relu")), X, Y)
    assert names(report)[0] == "vanishing"
    assert "NormalizedSGD" in report.findings[0].advice
    assert report.ratio == pytest.approx(
        max(b.rms for b in report.blocks[::2]) / min(b.rms for b in report.blocks[::2])
    )


def sigmoids():
    return [layers.Dense(8, "sigmoid") for _ in range(16)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "normalized_adam"])
def test_the_advice_for_many_sigmoid_layers_is_another_architecture(optimizer):
    """The slope of a sigmoid is at most 1/4, so no optimizer trains this model."""
    report = diagnose(make_model(*sigmoids(), optimizer=optimizer), X, Y)
    assert names(report)[0] == "vanishing"
    assert report.blocks[0].norm < 1e-6 * report.blocks[-2].norm
    first = report.findings[0].advice
    assert "`BatchNormalization` after each layer and use Adam" in first
    assert not any("Normalized" in finding.advice for finding in report.findings)


def test_gradients_that_need_different_learning_rates_are_found():
    inputs = keras.Input((FEATURES,))
    quiet = layers.Rescaling(1e-4)(layers.Dense(FEATURES)(inputs))
    model = keras.Model(inputs, layers.Dense(1)(inputs + quiet))
    model.compile("sgd", "mse")
    report = diagnose(model, X, Y)
    assert names(report) == ["apart"]
    assert "NormalizedSGD" in report.findings[0].advice
    for optimizer in ["adam", "lion", "normalized_sgd"]:
        model.compile(optimizer, "mse")
        assert "apart" not in names(diagnose(model, X, Y))


def test_gradients_below_the_epsilon_of_adam_are_found():
    model = make_model(*narrow(6, "relu"), optimizer="adam")
    report = diagnose(model, X, Y)
    assert "below_epsilon" in names(report)
    model.compile(keras.optimizers.Adam(epsilon=1e-30), "mse")
    assert "below_epsilon" not in names(diagnose(model, X, Y))
    model.compile("normalized_adam", "mse")
    assert "below_epsilon" not in names(diagnose(model, X, Y))
    for optimizer in ["clipped_adam", NormalizedAdam(norm=None)]:
        model.compile(optimizer, "mse")
        advice = {f.name: f.advice for f in diagnose(model, X, Y).findings}
        assert "`NormalizedAdam`" in advice["below_epsilon"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "normalized_sgd"])
def test_a_healthy_network_needs_no_change(optimizer):
    report = diagnose(make_model(layers.Dense(16, "relu"), optimizer=optimizer), X, Y)
    assert names(report) == ["nothing"]
    assert "Keep the optimizer" in str(report)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradients_that_are_not_finite_are_found(value):
    x = X.copy()
    x[:, 0] = value
    report = diagnose(make_model(layers.Dense(4)), x, Y)
    assert names(report)[0] == "not_finite"
    assert all(block.not_finite > 0 for block in report.blocks)
    assert "4 of 4 variables" in str(report)


def test_a_variable_without_a_gradient_is_found():
    class Idle(layers.Layer):
        def build(self, shape):
            self.idle = self.add_weight(shape=(3, 3), name="idle")

        def call(self, inputs):
            return inputs

    report = diagnose(make_model(Idle()), X, Y)
    assert names(report) == ["no_gradient"]
    assert "1 of 3 variables" in report.findings[0].fact
    assert "idle" in report.findings[0].fact


def test_a_batch_of_large_gradients_is_found():
    x = np.tile(X[:8], (4, 1))
    x[24:] *= 100

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return x[8 * i : 8 * i + 8], Y[:8]

    report = diagnose(make_model(optimizer="adam"), Batches())
    assert names(report) == ["first_loss", "spikes"]
    assert "ClippedAdam" in report.findings[1].advice
    assert report.totals[3] > 1000 * report.totals[0]


def test_steps_longer_than_weights_are_found():
    report = diagnose(make_model(optimizer=keras.optimizers.SGD(100.0)), X, Y)
    assert names(report) == ["long_steps"]


def test_the_gradient_of_a_bias_before_batch_normalization_is_reported_as_noise():
    model = make_model(layers.Dense(16), layers.BatchNormalization())
    report = diagnose(model, X, Y)
    assert names(report) == ["nothing", "noise"]
    assert "dense" in report.findings[1].fact
    assert "exclude" in report.findings[1].advice


def test_reported_norms_are_divided_by_the_loss_scale():
    policy = keras.dtype_policies.DTypePolicy("mixed_float16")
    hidden = [layers.Dense(8, "sigmoid", dtype=policy) for _ in range(2)]
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.01), initial_scale=1024.0
    )
    model = make_model(*hidden, dtype=policy, optimizer=optimizer)
    plain = make_model(*(layers.Dense(8, "sigmoid") for _ in range(2)))
    plain.set_weights(model.get_weights())
    scaled, expected = diagnose(model, X, Y), diagnose(plain, X, Y)
    assert scaled.loss_scale == 1024.0
    assert scaled.optimizer == "SGD"
    assert scaled.totals == pytest.approx(expected.totals, rel=0.01)
    assert {block.dtype for block in scaled.blocks} == {"float16"}
    assert {block.dtype for block in expected.blocks} == {"float32"}


def test_underflow_in_half_precision_is_found():
    policy = keras.dtype_policies.DTypePolicy("mixed_float16")
    model = make_model(
        layers.Dense(64, "relu", dtype=policy),
        dtype=policy,
        optimizer="adam",
        auto_scale_loss=False,
        loss_weights=[1e-4],
    )
    report = diagnose(model, X, Y)
    assert "underflow" in names(report)
    assert report.blocks[0].underflow > 0.5
    assert "Scale the loss" in str(report)


def test_diagnose_reads_only_the_requested_batches_of_endless_data():
    def forever():
        while True:
            yield X[:4], Y[:4]

    report = diagnose(make_model(), forever(), batches=3)
    assert len(report.totals) == 3
    assert len(set(report.totals)) == 1


def test_tensors_and_data_frames_give_the_same_norms_as_arrays():
    pandas = pytest.importorskip("pandas")
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    output = layers.Dense(1)(layers.Concatenate()([left, right]))
    model = keras.Model({"left": left, "right": right}, output)
    model.compile("sgd", "mse")
    arrays = {"left": X[:, :4], "right": X[:, 4:]}
    report = diagnose(model, arrays, Y)
    tensors = {name: ops.convert_to_tensor(value) for name, value in arrays.items()}
    assert diagnose(model, tensors, Y).totals == pytest.approx(report.totals)
    frames = {name: pandas.DataFrame(value) for name, value in arrays.items()}
    assert diagnose(model, frames, pandas.Series(Y[:, 0])).totals == pytest.approx(
        report.totals
    )


def test_a_model_that_is_not_compiled_needs_a_loss():
    inputs = keras.Input((FEATURES,))
    model = keras.Model(inputs, layers.Dense(1)(inputs))
    with pytest.raises(ValueError, match="pass `loss`"):
        diagnose(model, X, Y)
    report = diagnose(model, X, Y, loss="mse")
    assert report.optimizer is None
    assert not model.compiled
    paths = [variable.path for variable in model.trainable_variables]
    assert [block.name for block in report.blocks] == paths
    model.compile("sgd", "mse")
    assert report.totals == pytest.approx(diagnose(model, X, Y).totals)


def test_the_optimizer_that_the_train_step_uses_is_measured():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = layers.Dense(4), layers.Dense(1)

        def call(self, inputs):
            return self.second(self.first(inputs))

        def compile(self, *args, **kwargs):
            super().compile(*args, **kwargs)
            self.other = keras.optimizers.SGD(0.1)

        def _shares(self):
            return self.first.trainable_variables, self.second.trainable_variables

        if BACKEND == "jax":

            def train_step(self, state, data):
                import jax

                weights, fixed, optimizer_state, metric_state = state
                compute = jax.grad(self.compute_loss_and_updates, has_aux=True)
                grads, _ = compute(
                    weights, fixed, metric_state, *data, None, True, optimizer_state
                )
                # This step gets as many variables as `build` got.
                self.other.apply(grads[2:], self.second.trainable_variables)
                return {"loss": 0.0}, state

        else:

            def train_step(self, data):
                x, y = data
                if BACKEND == "torch":
                    self.zero_grad()
                    self.compute_loss(x, y, self(x, training=True)).backward()
                    weights = self.trainable_variables
                    grads = [v.value.grad for v in weights]
                else:
                    import tensorflow as tf

                    with tf.GradientTape() as tape:
                        loss = self.compute_loss(x, y, self(x, training=True))
                    weights = self.trainable_variables
                    grads = tape.gradient(loss, weights)
                self.other.apply(grads[2:], weights[2:])
                return {"loss": 0.0}

    model = Two()
    model.compile("adam", "mse")
    model(X)
    with unchanged(model):
        report = diagnose(model, X, Y)
    assert [block.shape for block in report.blocks] == [(4, 1), (1,)]
    assert report.optimizer == "SGD"  # `compile` got Adam.


def test_a_train_step_without_an_optimizer_is_an_error():
    class WithoutOptimizer(keras.Sequential):
        def train_step(self, *data):
            logs = {"loss": 0.0}
            return (logs, data[0]) if BACKEND == "jax" else logs

    model = WithoutOptimizer([keras.Input((FEATURES,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="No optimizer of the model received a"):
        diagnose(model, X, Y)


@pytest.mark.parametrize("name", ["batches", "batch_size"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1.*=0"):
        diagnose(make_model(), X, Y, **{name: 0})


def test_the_report_of_many_layers_is_short():
    hidden = [layers.Dense(8, "relu") for _ in range(40)]
    text = str(diagnose(make_model(*hidden), X, Y))
    assert len(text.splitlines()) < 40
    assert max(map(len, text.splitlines())) <= 88
    assert "12 of 82 variables" in text
