"""Tests normalization together with the other features of `fit`."""

import functools
import itertools
import shutil
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import by_hand, oracle
from helpers.by_hand import EPOCHS, START, X, Y, assert_same, batches, fit, make_model

BACKEND = keras.backend.backend()

ARGUMENTS = {
    "none": {},
    "weight decay": {"weight_decay": 0.1},
    "ema": {"use_ema": True, "ema_momentum": 0.5},
    "ema overwriting": {
        "use_ema": True,
        "ema_momentum": 0.5,
        "ema_overwrite_frequency": 2,
    },
    "schedule": {
        "learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    },
}
# `fit` multiplies the loss by this factor, and the optimizer divides gradients by it.
SCALED = ARGUMENTS | {"loss scale": {"loss_scale_factor": 1024.0}}


BASES, NORMS = ["SGD", "Adam", "RMSprop"], ["l2", "std", "max"]


# Keras applies these arguments before or after the step of any base.
@pytest.mark.parametrize(
    ("name", "base", "norm"),
    [
        *zip(SCALED, itertools.cycle(BASES), itertools.cycle(NORMS)),
        ("none", "Adam", "std"),
        ("none", "RMSprop", "max"),
        ("weight decay", "RMSprop", "l2"),
    ],
)
def test_arguments_of_the_base_act_on_the_normalized_gradient(name, base, norm):
    arguments = {"learning_rate": 0.1} | SCALED[name]
    cls = getattr(keras_normopt, f"Normalized{base}")
    model = make_model(cls(norm=norm, **arguments))
    fit(model)
    arguments = {k: v for k, v in arguments.items() if k != "loss_scale_factor"}
    expected = by_hand.train(getattr(keras.optimizers, base)(**arguments), norm)
    assert_same(model.get_weights(), expected)


@pytest.mark.parametrize("base", ["SGD", "Adam", "RMSprop"])
def test_accumulated_batches_equal_one_large_batch(base):
    cls = getattr(keras_normopt, f"Normalized{base}")
    model = make_model(cls(0.1, gradient_accumulation_steps=3))
    fit(model)
    expected = by_hand.train(
        getattr(keras.optimizers, base)(0.1), size=3 * by_hand.BATCH
    )
    assert_same(model.get_weights(), expected)


def test_regularizers_are_normalized_with_the_loss():
    dense = keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(0.5))
    model = make_model(keras_normopt.NormalizedSGD(0.1), dense)
    fit(model)

    def add_penalty(grads, weights):
        return [grads[0] + 2 * 0.5 * weights[0], grads[1]]

    assert_same(
        model.get_weights(),
        by_hand.train(keras.optimizers.SGD(0.1), change=add_penalty),
    )


def test_a_frozen_layer_keeps_its_weights():
    frozen = keras.layers.Dense(3, trainable=False, name="frozen")
    model = keras.Sequential([keras.Input((3,)), frozen, keras.layers.Dense(4)])
    frozen.set_weights([np.eye(3), np.zeros(3)])
    model.layers[1].set_weights(START)
    model.compile(keras_normopt.NormalizedAdam(0.1), "mse")
    fit(model)
    expected = by_hand.train(keras.optimizers.Adam(0.1))
    assert_same(model.get_weights(), [np.eye(3), np.zeros(3), *expected])


def test_an_unfrozen_layer_moves_once_the_model_is_compiled_again():
    layer = keras.layers.Dense(4, trainable=False)
    extra = keras.layers.Dense(4)
    model = keras.Sequential([keras.Input((3,)), layer, extra])
    for _ in range(2):
        model.compile(keras_normopt.NormalizedSGD(0.1), "mse")
        before = layer.get_weights()[0]
        model.train_on_batch(X, Y)
        step = np.linalg.norm(layer.get_weights()[0] - before)
        np.testing.assert_allclose(step, 0.1 * layer.trainable, rtol=1e-5)
        layer.trainable = True


# PyTorch's compiler warns of code in Keras and in PyTorch.
@pytest.mark.filterwarnings("ignore:::torch")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_gives_the_same_weights_with_and_without_a_compiler(jit_compile):
    if jit_compile and BACKEND == "torch" and not shutil.which("g++"):
        pytest.skip("PyTorch's compiler needs a C++ compiler")
    optimizer = keras_normopt.NormalizedAdam(0.1, scope="unit", track_norms=True)
    model = make_model(optimizer, jit_compile=jit_compile)
    fit(model)
    seen = []

    def record(grads, weights):
        seen.append(np.concatenate([g.ravel() for g in grads]))
        return grads

    by_units = functools.partial(oracle.normalize_units, "l2")
    expected = by_hand.train(keras.optimizers.Adam(0.1), by_units, change=record)
    assert_same(model.get_weights(), expected)
    total = optimizer.gradient_norms["total"]
    assert total == pytest.approx(np.linalg.norm(seen[-1]), rel=1e-4)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras does not support it on PyTorch")
def test_each_of_several_steps_per_execution_is_normalized():
    model = make_model(keras_normopt.NormalizedAdam(0.1), steps_per_execution=3)
    fit(model)
    assert_same(model.get_weights(), by_hand.train(keras.optimizers.Adam(0.1)))


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="not in this Keras"
)
def test_a_normalized_and_a_plain_optimizer_share_a_model():
    by_path = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.01))
    by_path[".*kernel"] = keras_normopt.NormalizedAdam(0.1)
    model = make_model(keras.optimizers.MultiOptimizer(by_path))
    fit(model)

    kernel, bias = (keras.Variable(w) for w in START)
    adam, sgd = keras.optimizers.Adam(0.1), keras.optimizers.SGD(0.01)
    for _ in range(EPOCHS):
        for x, y in batches():
            weights = [ops.convert_to_numpy(v) for v in (kernel, bias)]
            kernel_gradient, bias_gradient = by_hand.gradients(x, y, *weights)
            kernel_gradient = oracle.normalize("l2", kernel_gradient).astype("float32")
            adam.apply([ops.convert_to_tensor(kernel_gradient)], [kernel])
            sgd.apply([ops.convert_to_tensor(bias_gradient, "float32")], [bias])
    expected = [ops.convert_to_numpy(v) for v in (kernel, bias)]
    assert_same(model.get_weights(), expected)


# Callbacks that change the learning rate. With SGD and l2, the rate is the step length.


class StepLengths(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.before = self.model.get_weights()[0]

    def on_epoch_end(self, epoch, logs):
        length = np.linalg.norm(self.model.get_weights()[0] - self.before)
        logs["step_length"] = float(length)


def fit_in_single_steps(callback, epochs=6):
    model = make_model(keras_normopt.NormalizedSGD(0.4))
    callbacks = [StepLengths(), callback]
    return fit(model, batch_size=len(X), epochs=epochs, callbacks=callbacks).history


def test_steps_follow_a_learning_rate_scheduler():
    rates = [0.4, 0.2, 0.1, 0.3, 0.05, 0.01]
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: rates[epoch])
    history = fit_in_single_steps(schedule)
    np.testing.assert_allclose(history["step_length"], rates, rtol=1e-4)


def test_steps_shorten_when_the_loss_stops_falling():
    # With steps of 0.4, training circles around the minimum at a constant loss.
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=2)
    history = fit_in_single_steps(plateau, epochs=30)
    rates = history["learning_rate"]
    assert rates[0] == pytest.approx(0.4)
    assert rates[-1] < 0.21
    np.testing.assert_allclose(history["step_length"], rates, rtol=1e-4)
    assert history["loss"][-1] < history["loss"][8]


# Half precision.


@pytest.fixture(params=["mixed_float16", "mixed_bfloat16"])
def policy(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("base", ["SGD", "Adam", "RMSprop"])
def test_mixed_precision_trains_like_float32(policy, base):
    cls = getattr(keras_normopt, f"Normalized{base}")
    model = make_model(cls(0.05))
    # Keras itself scales the loss if float16 needs it.
    is_scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled == (policy == "mixed_float16")
    fit(model)
    expected = by_hand.train(getattr(keras.optimizers, base)(0.05))
    # The layer computes with 11 or 8 significant bits, so steps differ from float32.
    atol = 0.01 if policy == "mixed_float16" else 0.06
    assert_same(model.get_weights(), expected, rtol=0, atol=atol)
    assert all(str(w.dtype) == "float32" for w in model.get_weights())


def test_a_step_in_mixed_precision_is_as_long_as_the_rate(policy):
    model = make_model(keras_normopt.NormalizedSGD(0.05))
    model.train_on_batch(X, Y)
    for old, new in zip(START, model.get_weights(), strict=True):
        np.testing.assert_allclose(np.linalg.norm(new - old), 0.05, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 300.0), ("bfloat16", 1e30), ("float64", 1e-200)]
)
def test_gradients_whose_squares_overflow_or_underflow_are_normalized(
    dtype, value, float64
):
    # The squares of these values are outside the range of the dtype.
    gradient = np.full((40, 50), value)
    variable = keras.Variable(np.zeros((40, 50)), dtype=dtype)
    optimizer = keras_normopt.NormalizedSGD(0.5, norm_epsilon=0)
    optimizer.apply([ops.convert_to_tensor(gradient, dtype)], [variable])
    assert keras.backend.standardize_dtype(variable.dtype) == dtype
    result = ops.convert_to_numpy(ops.cast(variable.value, "float64"))
    expected = -0.5 * oracle.normalize("l2", gradient).astype("float64")
    np.testing.assert_allclose(result, expected, rtol=0.01)


def test_float8_scales_are_not_normalized():
    x, y = (np.tile(a, (4, 1)) for a in (X, Y))
    inputs = keras.Input((3,))
    hidden, outputs = keras.layers.Dense(16), keras.layers.Dense(4)
    model = keras.Model(inputs, outputs(hidden(inputs)))
    hidden.quantize("float8")
    model.compile(keras_normopt.NormalizedSGD(0.01), "mse")
    kernel = ops.convert_to_numpy(hidden.kernel)
    model.fit(x, y, batch_size=48, shuffle=False, verbose=0)
    moved = ops.convert_to_numpy(hidden.kernel) - kernel
    np.testing.assert_allclose(np.linalg.norm(moved), 0.01, rtol=1e-4)
    # The history holds inputs of the forward pass, and no normalized gradient.
    seen = ops.convert_to_numpy(hidden.inputs_amax_history)
    np.testing.assert_allclose(seen.max(), np.abs(x).max(), rtol=1e-6)


# Clipping without effect.


@pytest.mark.parametrize("name", ["clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("norm", ["l2", "std", keras_normopt.norms.l1])
def test_clipping_without_effect_warns_once(name, norm):
    optimizer = keras_normopt.NormalizedSGD(0.1, norm=norm, **{name: 1.0})
    model = make_model(optimizer)
    with pytest.warns(UserWarning, match=rf"{name}=1.0 has no effect on Norm"):
        fit(model)
    weights = model.get_weights()
    fit(model)  # Warnings are errors here.
    # The clipping has no effect.
    name = norm if isinstance(norm, str) else "l1"
    assert_same(weights, by_hand.train(keras.optimizers.SGD(0.1), name))


@pytest.mark.parametrize(
    "arguments",
    [
        {"clipvalue": 1.0},
        {"clipnorm": 1.0, "norm": None},
        {"clipnorm": -1.0},  # Keras does not clip at a negative norm.
        # A function of the user may depend on the magnitude.
        {"clipnorm": 1.0, "norm": lambda gradient: 2 + ops.max(gradient)},
    ],
)
def test_clipping_with_an_effect_does_not_warn(arguments):
    model = make_model(keras_normopt.NormalizedSGD(0.1, **arguments))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model)
    messages = [str(warning.message) for warning in caught]
    assert not any("has no effect" in message for message in messages)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_clipnorm_clips_each_variable_before_a_block_is_normalized(scope):
    with keras.name_scope("dense"):
        both = [keras.Variable(np.zeros(2), name=name) for name in ("kernel", "bias")]
    gradients = [ops.array([30.0, 40.0]), ops.array([0.3, 0.4])]
    optimizer = keras_normopt.NormalizedSGD(1.0, scope=scope, clipnorm=1.0)
    optimizer.apply(gradients, both)
    lengths = [np.linalg.norm(ops.convert_to_numpy(variable)) for variable in both]
    np.testing.assert_allclose(lengths, np.array([1, 0.5]) / 1.25**0.5, rtol=1e-5)
