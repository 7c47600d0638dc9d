"""Tests gradients that are zero, constant, empty, extreme or not finite."""

import functools
import itertools

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import oracle

pytestmark = pytest.mark.newest_keras

every_norm = pytest.mark.parametrize("norm", oracle.NORMS)
BASES = ["SGD", "Adam", "RMSprop"]
every_base = pytest.mark.parametrize("base", BASES)


def make(base, norm, rate=0.1, **arguments):
    return getattr(keras_normopt, f"Normalized{base}")(rate, norm=norm, **arguments)


def step(optimizer, *gradients, dtype="float32"):
    variables = [keras.Variable(np.zeros(g.shape), dtype=dtype) for g in gradients]
    tensors = [ops.convert_to_tensor(g, dtype) for g in gradients]
    optimizer.apply(tensors, variables)
    return [ops.convert_to_numpy(v) for v in variables]


DEGENERATE = {
    "zero": np.zeros((2, 3)),
    "one element": np.array([-3e-9]),
    "scalar": np.array(5e20),
    "constant": np.full(7, 0.1),
    "constant up to rounding": np.full(100, 0.1) + np.spacing(np.float32(0.1)),
    "one entry that is not zero": np.eye(1, 50).ravel(),
    "two that cancel": np.array([1e-3, -1e-3]),
    "no elements": np.zeros(0),
    "subnormal": np.full(3, 1e-40),
}


@every_base
@every_norm
def test_steps_on_degenerate_gradients_are_finite_and_equal_the_oracle(base, norm):
    gradients = [g.astype("float32") for g in DEGENERATE.values()]
    actual_steps = step(make(base, norm), *gradients)
    plain = getattr(keras.optimizers, base)(0.1)
    # Some compilers round subnormal numbers to zero. So a subnormal gradient may give a
    # step or none.
    normalized = [oracle.normalize(norm, g, 1e-30) for g in gradients]
    expected_steps = step(plain, *[np.asarray(g, "float32") for g in normalized])
    for name, actual, expected in zip(
        DEGENERATE, actual_steps, expected_steps, strict=True
    ):
        assert np.isfinite(actual).all(), name
        if name != "subnormal":
            np.testing.assert_allclose(actual, expected, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("norm", "run_eagerly"),
    # The test above makes eager steps with every norm.
    [*itertools.product(oracle.NORMS, [False]), ("l2", True), ("std", True)],
)
def test_fit_changes_only_weights_with_a_nonzero_gradient(norm, run_eagerly):
    # The loss does not depend on one layer, and another layer has only dead units.
    # So only the bias of the last layer has a gradient.
    inputs = keras.Input((4,))
    dead = keras.layers.Dense(
        3, "relu", bias_initializer=keras.initializers.Constant(-9)
    )
    outputs = keras.layers.Dense(1)(dead(inputs)) + 0 * keras.layers.Dense(1)(inputs)
    model = keras.Model(inputs, outputs)
    model.compile(make("SGD", norm), "mse", run_eagerly=run_eagerly)
    before = model.get_weights()
    model.fit(np.ones((8, 4)), np.ones((8, 1)), batch_size=8, verbose=0)
    changes = [
        np.abs(new - old).max()
        for new, old in zip(model.get_weights(), before, strict=True)
    ]
    names = [w.path.split("/", 1)[0] + "/" + w.name for w in model.weights]
    changed_names = [n for n, m in zip(names, changes, strict=True) if m]
    assert len(changed_names) == 1
    np.testing.assert_allclose(max(changes), 0.1, rtol=1e-5)


# NaN and infinity.


def fit_with(bad, optimizer, *callbacks, **compile_arguments):
    """Fits a model on four batches. The second has a bad number, or is left out."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 3)).astype("float32")
    y = rng.normal(size=(16, 2)).astype("float32")
    if bad is None:
        x, y = np.delete(x, slice(4, 8), 0), np.delete(y, slice(4, 8), 0)
    else:
        y[5, 0] = bad
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.set_weights([np.ones((3, 2)), np.zeros(2)])
    model.compile(optimizer, "mse", **compile_arguments)
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model


class CountBatches(keras.callbacks.Callback):
    seen = 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1


@functools.cache
def weights_of_plain(bad, base):
    stop = keras.callbacks.TerminateOnNaN()
    return fit_with(bad, getattr(keras.optimizers, base)(0.1), stop).get_weights()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("base", "norm"),
    [("SGD", norm) for norm in oracle.NORMS] + [("Adam", "l2"), ("RMSprop", "l2")],
)
def test_nan_and_infinity_reach_the_weights_and_stop_training(bad, base, norm):
    counter = CountBatches()
    stop = keras.callbacks.TerminateOnNaN()
    model = fit_with(bad, make(base, norm), counter, stop)
    assert counter.seen == 2
    plain = weights_of_plain(bad, base)
    for actual, expected in zip(model.get_weights(), plain, strict=True):
        assert not np.isfinite(expected).all()
        assert not np.isfinite(actual[~np.isfinite(expected)]).any()


def state(model):
    variables = [*model.weights, *model.optimizer.inner_optimizer.variables]
    return [ops.convert_to_numpy(v) for v in variables]


@pytest.mark.parametrize(
    ("base", "run_eagerly"), [*itertools.product(BASES, [False]), ("Adam", True)]
)
def test_a_loss_scale_optimizer_skips_steps_that_are_not_finite(base, run_eagerly):
    def train(bad):
        optimizer = keras.optimizers.LossScaleOptimizer(make(base, "l2"), 1.0)
        return fit_with(bad, optimizer, run_eagerly=run_eagerly)

    without = state(train(None))
    for bad in (np.nan, np.inf):
        skipped = train(bad)
        for actual, expected in zip(state(skipped), without, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)
        assert int(ops.convert_to_numpy(skipped.optimizer.iterations)) == 3


# Complex gradients. Casts to real dtypes would silently drop the imaginary parts.


@pytest.mark.parametrize(
    "arguments",
    [{}, {"apply_to": "update"}, {"norm": None, "track_norms": True}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["Normalized", "Clipped"])
def test_complex_variables_are_refused(kind, arguments):
    optimizer = getattr(keras_normopt, f"{kind}SGD")(1.0, **arguments)
    real = keras.Variable(np.zeros(2), name="real")
    variable = keras.Variable(np.array([1 + 1j]), dtype="complex64", name="phase")
    with pytest.raises(
        ValueError, match=r"complex gradients.*\['phase'\].*leave these"
    ):
        optimizer.build([real, variable])


@pytest.mark.parametrize("arguments", [{"exclude": "phase"}, {"norm": None}], ids=str)
def test_complex_variables_are_accepted_if_they_are_not_normalized(arguments):
    optimizer = keras_normopt.NormalizedSGD(1.0, **arguments)
    variables = [
        keras.Variable(np.array([1 + 1j]), dtype="complex64", name="phase"),
        keras.Variable(np.zeros(2), name="real"),
    ]
    gradients = [np.array([3 + 4j], "complex64"), np.array([3.0, 4.0], "float32")]
    optimizer.apply([ops.convert_to_tensor(g) for g in gradients], variables)
    [weight] = ops.convert_to_numpy(variables[0])
    assert weight == -2 - 3j
