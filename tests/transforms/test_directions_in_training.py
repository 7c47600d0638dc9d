"""Tests training with directions against NumPy code in float64.

The tests cover `fit`, arguments of the base, precision, other options, and saving.
"""

import copy
import inspect
import json
import math
import pickle

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import by_hand
from helpers.by_hand import EPOCHS, START, X, Y
from helpers.oracle import orthogonalized
from keras_normopt import OrthogonalSGD, WeightNorm, directions

BACKEND = keras.backend.backend()
# Marks tests of code that all backends share. They run only on PyTorch, which compiles
# nothing.
once = pytest.mark.skipif(BACKEND != "torch", reason="does not depend on the backend")
RATE, MOMENTUM = 0.1, 0.9
KERNEL = np.array([[3.0, -4.0, 0.5], [1.0, 0.2, -2.0]])
BIAS = np.array([3.0, -4.0, 0.0])


def orthogonal(matrix):
    """Returns the orthogonal direction with its default scale."""
    inputs, outputs = matrix.shape
    return math.sqrt(max(1, outputs / inputs)) * orthogonalized(matrix)


def descend(
    epochs=EPOCHS,
    rate=lambda step: RATE,
    average=1,
    decay=0.0,
    ema=None,
):
    """Computes in NumPy the weights after `by_hand.fit` with `OrthogonalSGD`.

    Args:
        epochs: Number of epochs.
        rate: Function from the number of a step to its learning rate.
        average: Number of batches whose gradients are averaged.
        decay: Weight decay.
        ema: `None`, or the momentum of the moving average that becomes the weights.
    """
    weights = [w.astype("float64") for w in START]
    slots, mean, pending = [np.zeros_like(w) for w in weights], None, []
    for step, (x, y) in enumerate(epochs * by_hand.batches()):
        pending.append(by_hand.gradients(x, y, *weights))
        if len(pending) < average:
            continue
        gradients = [np.mean(g, axis=0) for g in zip(*pending, strict=True)]
        lr, pending = rate(step), []
        slots = [MOMENTUM * s - lr * g for s, g in zip(slots, gradients, strict=True)]
        kernel, bias = (
            MOMENTUM * s - lr * g for s, g in zip(slots, gradients, strict=True)
        )
        kernel = lr * orthogonal(kernel / lr) if lr else 0 * kernel
        weights = [w - decay * lr * w for w in weights]
        weights = [weights[0] + kernel, weights[1] + bias]
        if ema is not None:
            pairs = zip(mean or weights, weights, strict=True)
            mean = [ema * m + (1 - ema) * w for m, w in pairs]
    return mean or weights


def fitted(optimizer, **compile_arguments):
    model = by_hand.make_model(optimizer, **compile_arguments)
    by_hand.fit(model)
    return model


def variable_of(value, dtype="float32", name="kernel"):
    return keras.Variable(np.asarray(value), dtype=dtype, name=name)


def tensor(value, dtype="float32"):
    return ops.convert_to_tensor(np.asarray(value), dtype)


def numpy(variable):
    wide = "float64" if "64" in str(variable.dtype) else "float32"
    return ops.convert_to_numpy(ops.cast(variable, wide))


def changes(
    optimizer, gradients, start=None, names=("kernel", "bias"), dtype="float32"
):
    """Returns how far one step with these gradients moves each variable."""
    start = start or [np.zeros_like(g) for g in gradients]
    variables = [
        variable_of(value, dtype, name)
        for value, name in zip(start, names, strict=False)
    ]
    optimizer.apply([tensor(g, dtype) for g in gradients], variables)
    return [numpy(v) - s for v, s in zip(variables, start, strict=True)]


# `fit`, and the arguments of the base optimizer.


def halved(step):
    return 0.1 * 0.5 ** (step / 2)


def stops(step):
    return RATE if step < 3 else 0.0


def stopping():
    # In Keras, the step at the boundary still has the first rate.
    return keras.optimizers.schedules.PiecewiseConstantDecay([2], [RATE, 0.0])


ARGUMENTS = {
    "none": ({}, {}),
    "weight decay": ({"weight_decay": 0.1}, {"decay": 0.1}),
    "ema": ({"use_ema": True, "ema_momentum": 0.5}, {"ema": 0.5}),
    "accumulation": ({"gradient_accumulation_steps": 3}, {"average": 3}),
    "loss scale": ({"loss_scale_factor": 1024.0}, {}),
    "negative rate": ({"learning_rate": -0.01}, {"rate": lambda step: -0.01}),
    "schedule": (
        {"learning_rate": keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)},
        {"rate": halved},
    ),
    "rate of 0": ({"learning_rate": stopping()}, {"rate": stops}),
}


@pytest.mark.parametrize(
    "name",
    ["accumulation", *(pytest.param(n, marks=once) for n in ARGUMENTS if n[0] != "a")],
)
def test_fit_applies_the_arguments_of_the_base(name):
    arguments, numpy_arguments = ARGUMENTS[name]
    arguments = {"learning_rate": RATE, "momentum": MOMENTUM} | arguments
    model = fitted(OrthogonalSGD(**arguments))
    by_hand.assert_same(model.get_weights(), descend(**numpy_arguments))


COMPILED = {"eager": {"run_eagerly": True}}
if BACKEND != "torch":  # test_compiled_step tests PyTorch's compiler.
    COMPILED |= {
        "plain": {"jit_compile": False},
        "several steps": {"steps_per_execution": 3, "jit_compile": True},
    }


@pytest.mark.parametrize("compiled", COMPILED)
def test_fit_gives_the_same_weights_compiled_and_eagerly(compiled):
    model = fitted("orthogonal_sgd", **COMPILED[compiled])
    by_hand.assert_same(model.get_weights(), descend(rate=lambda step: 0.01))


def test_the_loss_scale_is_removed_before_the_direction():
    model = fitted(keras.optimizers.LossScaleOptimizer(OrthogonalSGD(RATE)))
    by_hand.assert_same(model.get_weights(), descend())


@pytest.mark.parametrize("name", ["orthogonal_sgd", "OrthogonalSGD"])
def test_keras_finds_orthogonal_sgd_by_name(name):
    optimizer = keras.optimizers.get(name)
    assert type(optimizer) is OrthogonalSGD
    optimizer = keras.optimizers.get({"class_name": name, "config": {"momentum": 0.5}})
    assert type(optimizer) is OrthogonalSGD
    assert (optimizer.momentum, optimizer.direction.name) == (0.5, "orthogonal")


@once
def test_adam_receives_directions_as_its_gradients_by_default():
    optimizer = keras_normopt.NormalizedAdam(RATE, direction="orthogonal")
    model = fitted(optimizer)

    def to_directions(grads, weights):
        return [orthogonal(grads[0]), grads[1]]

    adam = keras.optimizers.Adam(RATE)
    expected = by_hand.train(adam, lambda gradient: gradient, change=to_directions)
    by_hand.assert_same(model.get_weights(), expected)


def test_a_new_norm_epsilon_takes_effect_in_compiled_steps():
    optimizer = keras_normopt.NormalizedSGD(
        RATE, direction={"kernel": "orthogonal", "bias": "rows"}
    )
    model = by_hand.make_model(optimizer)
    model.train_on_batch(X, Y)
    before = [w.astype("float64") for w in model.get_weights()]
    kernel, bias = by_hand.gradients(X, Y, *before)
    optimizer.norm_epsilon = 100.0  # Larger than all entries.
    model.train_on_batch(X, Y)
    steps = [
        RATE * direction * np.abs(gradient).max() / 100
        for direction, gradient in (
            (orthogonal(kernel), kernel),
            (bias / np.linalg.norm(bias), bias),
        )
    ]
    for old, new, step in zip(before, model.get_weights(), steps, strict=True):
        np.testing.assert_allclose(old - new, step, rtol=1e-2, atol=1e-6)


# Precision.


@pytest.fixture(params=["mixed_float16", "mixed_bfloat16"])
def policy(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


@once
def test_a_direction_in_mixed_precision_trains_as_in_float64(policy):
    optimizer = OrthogonalSGD(0.05, momentum=MOMENTUM)
    model = fitted(optimizer)
    is_scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled == (policy == "mixed_float16")
    # The layer computes with 11 or 8 significant bits, so steps may differ.
    size = 0.01 if policy == "mixed_float16" else 0.06
    expected = descend(rate=lambda step: 0.05)
    by_hand.assert_same(model.get_weights(), expected, rtol=0, atol=size)


def test_singular_values_of_a_step_in_mixed_precision_are_near_the_rate(policy):
    model = by_hand.make_model(OrthogonalSGD(0.05))
    model.train_on_batch(X, Y)
    step = model.get_weights()[0] - START[0].astype("float64")
    values = np.linalg.svd(step, compute_uv=False) / (0.05 * math.sqrt(4 / 3))
    assert values.min() > 0.95
    assert values.max() < 1.15


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 300.0), ("bfloat16", 1e30), ("float64", 1e-200)]
)
@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_directions_are_right_if_squares_exceed_the_range_of_the_dtype(
    dtype, value, apply_to, float64
):
    optimizer = keras_normopt.NormalizedSGD(
        0.5,
        direction={"kernel": "orthogonal", "bias": "rows"},
        apply_to=apply_to,
        norm_epsilon=0,
    )
    gradients = [value * KERNEL, value * BIAS]
    kernel, bias = changes(optimizer, gradients, dtype=dtype)
    # The second singular value depends on digits that float16 and bfloat16 lack.
    np.testing.assert_allclose(kernel, -0.5 * orthogonal(KERNEL), rtol=0.02, atol=0.004)
    np.testing.assert_allclose(bias, -0.5 * BIAS / 5, rtol=0.01)


# Directions with other options.


@once
def test_excluded_variables_step_with_raw_gradients():
    optimizer = keras_normopt.NormalizedSGD(1.0, direction="sign", exclude="kernel")
    kernel, bias = changes(optimizer, [KERNEL, BIAS])
    np.testing.assert_allclose(kernel, -KERNEL, rtol=1e-6)
    np.testing.assert_array_equal(bias, -np.sign(BIAS))


@once
def test_gradients_are_centralized_before_their_direction():
    optimizer = keras_normopt.NormalizedSGD(
        1.0, direction="orthogonal", centralize=True
    )
    kernel, bias = changes(optimizer, [KERNEL, BIAS])
    expected = -orthogonal(KERNEL - KERNEL.mean(axis=0))
    np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, -BIAS, rtol=1e-6)


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_a_step_size_multiplies_the_direction(apply_to):
    optimizer = keras_normopt.NormalizedSGD(
        RATE, direction="orthogonal", step_size=WeightNorm(0.5), apply_to=apply_to
    )
    start = [np.arange(6.0).reshape(2, 3), np.array([3.0, 0.0, 4.0])]
    kernel, bias = changes(optimizer, [KERNEL, BIAS], start)
    factor = 0.5 * np.linalg.norm(start[0])
    expected = -RATE * factor * orthogonal(KERNEL)
    np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, -RATE * 2.5 * BIAS, rtol=1e-5, atol=1e-6)


@once
@pytest.mark.parametrize("apply_to", ["gradient", "update"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_scope_groups_tracked_norms_and_does_not_change_directions(scope, apply_to):
    optimizer = keras_normopt.NormalizedSGD(
        1.0,
        direction={"kernel": "orthogonal", "bias": "rows"},
        scope=scope,
        track_norms=True,
        apply_to=apply_to,
    )
    names = ["kernel", "bias"] if scope == "global" else ["d/kernel", "d/bias"]
    for _ in range(2):  # The test compares the second step.
        kernel, bias = _changes_in_a_layer(optimizer, names)
    np.testing.assert_allclose(kernel, -orthogonal(KERNEL), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, -BIAS / 5, rtol=1e-5)
    norms = optimizer.gradient_norms
    name = "global" if scope == "global" else "d"
    total = np.hypot(np.linalg.norm(KERNEL), 5)
    assert norms == pytest.approx({name: total, "total": total}, rel=1e-5)


def _changes_in_a_layer(optimizer, paths):
    """Returns the same as `changes`. Later calls step the same variables again."""
    if not optimizer.built:
        variables = []
        for path, gradient in zip(paths, (KERNEL, BIAS), strict=True):
            layer, _, name = path.rpartition("/")
            with keras.name_scope(layer) if layer else keras.name_scope("e"):
                variables.append(variable_of(0 * gradient, name=name))
        optimizer.build(variables)
    variables = optimizer._trainable_variables
    for variable in variables:
        variable.assign(ops.zeros(variable.shape))
    optimizer.apply([tensor(KERNEL), tensor(BIAS)], variables)
    return [numpy(v) for v in variables]


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # Keras warns.
@pytest.mark.parametrize("cls", [OrthogonalSGD, keras_normopt.NormalizedAdam])
def test_missing_gradients_and_empty_variables_are_skipped(cls):
    optimizer = cls(RATE, direction="orthogonal", apply_to="update", norm=None)
    values = [KERNEL, KERNEL, np.zeros((0, 3)), np.zeros((2, 0))]
    variables = [variable_of(0 * v, name=f"kernel_{i}") for i, v in enumerate(values)]
    optimizer.build(variables)
    optimizer.apply([None, *map(tensor, values[1:])], variables)
    first, second, *_ = map(numpy, variables)
    np.testing.assert_array_equal(first, 0 * KERNEL)
    values = np.linalg.svd(second, compute_uv=False)
    assert np.all(np.abs(values / (RATE * math.sqrt(3 / 2)) - 1) < 0.15)


def test_complex_variables_are_refused_unless_excluded():
    variables = [
        variable_of(KERNEL, "complex64", "spectrum"),
        variable_of(0 * KERNEL, name="kernel"),
    ]
    with pytest.raises(ValueError, match=r"complex variables \['spectrum'\]"):
        OrthogonalSGD().build(variables)
    optimizer = keras_normopt.NormalizedSGD(
        1.0, direction="orthogonal", exclude="spectrum"
    )
    optimizer.apply([tensor(1j * KERNEL, "complex64"), tensor(KERNEL)], variables)
    spectrum = ops.convert_to_numpy(variables[0])
    np.testing.assert_allclose(spectrum, (1 - 1j) * KERNEL, rtol=1e-5)
    kernel = numpy(variables[1])
    np.testing.assert_allclose(kernel, -orthogonal(KERNEL), rtol=1e-4, atol=1e-5)


@once
def test_orthogonal_sgd_does_not_change_frozen_layers():
    frozen = keras.layers.Dense(3, trainable=False, name="frozen")
    model = keras.Sequential([keras.Input((3,)), frozen, keras.layers.Dense(4)])
    frozen.set_weights([np.eye(3), np.zeros(3)])
    model.layers[1].set_weights(START)
    model.compile(OrthogonalSGD(RATE), "mse")
    by_hand.fit(model)
    expected = [np.eye(3), np.zeros(3), *descend()]
    by_hand.assert_same(model.get_weights(), expected)


def test_float8_scales_have_no_direction():
    x, y = (np.tile(a, (4, 1)) for a in (X, Y))
    inputs = keras.Input((3,))
    hidden, outputs = keras.layers.Dense(16), keras.layers.Dense(4)
    model = keras.Model(inputs, outputs(hidden(inputs)))
    hidden.quantize("float8")
    optimizer = keras_normopt.NormalizedSGD(0.01, direction="sign", apply_to="update")
    model.compile(optimizer, "mse")
    kernel = ops.convert_to_numpy(hidden.kernel)
    model.fit(x, y, batch_size=48, shuffle=False, verbose=0)
    steps = np.abs(ops.convert_to_numpy(hidden.kernel) - kernel)
    np.testing.assert_allclose(steps[steps > 0], 0.01, rtol=1e-3)
    assert steps.max() > 0
    history = ops.convert_to_numpy(hidden.inputs_amax_history)
    np.testing.assert_allclose(history.max(), np.abs(x).max(), rtol=1e-6)


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="not in this Keras"
)
def test_a_direction_and_a_plain_optimizer_share_a_model():
    plain = keras.optimizers.SGD(RATE, MOMENTUM, nesterov=True)
    by_path = keras.optimizers.OptimizerMap(plain)
    by_path[".*kernel"] = OrthogonalSGD(RATE)
    model = fitted(keras.optimizers.MultiOptimizer(by_path))
    by_hand.assert_same(model.get_weights(), descend())


# Saving.


def save_and_load(model, path):
    model.save(path / "model.keras")
    return keras.models.load_model(path / "model.keras")


COPIES = {
    "file": save_and_load,
    "pickle": lambda model, path: pickle.loads(pickle.dumps(model)),
    "copy": lambda model, path: copy.deepcopy(model),
}


@pytest.mark.parametrize(
    ("way", "accumulated"),
    [
        ("file", 2),
        pytest.param("file", None, marks=once),
        pytest.param("pickle", None, marks=once),
        pytest.param("copy", 2, marks=once),
    ],
)
def test_a_loaded_or_copied_model_continues_training(way, accumulated, tmp_path):
    # The first matching pattern counts. Sorting would reverse these patterns.
    optimizer = OrthogonalSGD(
        RATE,
        direction={"kernel": directions.Orthogonal(), "b": None, ".*": "sign"},
        # With accumulation, training stops before a step is complete.
        gradient_accumulation_steps=accumulated,
    )
    model = by_hand.make_model(optimizer)
    by_hand.fit(model, epochs=1)
    loaded = COPIES[way](model, tmp_path)
    assert type(loaded.optimizer) is OrthogonalSGD
    by_hand.fit(loaded, epochs=1)
    by_hand.assert_same(loaded.get_weights(), descend(2, average=accumulated or 1))


def sorted_json(config):
    return json.loads(json.dumps(config, sort_keys=True))


@once
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"direction": {"kernel": "sign", ".*": None}}, np.sign(KERNEL)),
        (
            {
                "direction": "rows",
                "axes": {"kernel": ((1,), (0,)), ".*": "vector"},
            },
            KERNEL / np.linalg.norm(KERNEL, axis=1, keepdims=True),
        ),
    ],
    ids=["direction", "axes"],
)
def test_patterns_keep_their_order_if_json_sorts_keys(options, expected):
    """The first matching pattern counts. Sorting would put another pattern first."""
    config = keras_normopt.NormalizedSGD(1.0, **options).get_config()
    loaded = keras_normopt.NormalizedSGD.from_config(sorted_json(config))
    (step,) = changes(loaded, [KERNEL])
    np.testing.assert_allclose(step, -expected, rtol=1e-5)


@once
def test_a_saved_optimizer_keeps_defaults_that_later_versions_change(monkeypatch):
    saved = sorted_json(keras.optimizers.serialize(OrthogonalSGD()))
    later = {
        "momentum": 0.5,
        "nesterov": False,
        "apply_to": "gradient",
        "norm_epsilon": 1.0,
        "direction": "sign",
    }
    defaults = inspect.getclosurevars(OrthogonalSGD.__init__).nonlocals["defaults"]
    saved_defaults = dict(defaults)
    assert set(later) | {"norm"} == set(saved_defaults)
    for name, value in later.items():
        monkeypatch.setitem(defaults, name, value)
    assert OrthogonalSGD().momentum == 0.5
    loaded = keras.optimizers.deserialize(saved)
    assert loaded.direction.name == "orthogonal"
    for name in set(later) - {"direction"}:
        assert getattr(loaded, name) == saved_defaults[name]


@once
@pytest.mark.parametrize("is_built", [False, True])
def test_an_optimizer_made_from_a_config_trains_another_model(is_built):
    first = OrthogonalSGD(RATE)
    if is_built:
        fitted(first)
    second = OrthogonalSGD.from_config(first.get_config())
    model = fitted(second)  # The paths differ. A warning would fail the test.
    by_hand.assert_same(model.get_weights(), descend())


@once
def test_a_copied_optimizer_has_the_same_config():
    optimizer = OrthogonalSGD(RATE, direction={"k": directions.Orthogonal(steps=2)})
    for copied in (copy.copy(optimizer), copy.deepcopy(optimizer)):
        assert copied.get_config() == optimizer.get_config()


# The interface of 2018.


@once
def test_the_2018_interface_adds_no_direction_and_refuses_orthogonal_sgd():
    plain = keras.optimizers.SGD(RATE, MOMENTUM, nesterov=True)
    converted = keras_normopt.NormalizedOptimizer(plain)
    assert converted.direction is None
    with pytest.raises(ValueError, match="normalized already"):
        keras_normopt.NormalizedOptimizer(OrthogonalSGD())


# Layers with unknown axes.


class Unknown(keras.layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(*KERNEL.shape, 2), name="kernel")
        self.gain = self.add_weight(shape=(2,), name="gain")


@once
@pytest.mark.parametrize(
    "options",
    [
        {"direction": "orthogonal", "exclude": "kernel"},
        {"direction": {"gain": "sign", ".*": None}},
    ],
    ids=["excluded", "without direction"],
)
def test_unknown_axes_cause_no_warning_if_no_option_uses_them(options):
    layer = Unknown()
    layer.build(None)
    optimizer = keras_normopt.NormalizedSGD(**options)
    optimizer.build(layer.trainable_variables)  # A warning would fail the test.
    assert optimizer.built
