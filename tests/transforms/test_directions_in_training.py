"""A direction beside everything else that training does, against NumPy in float64."""

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
# What is the same code on each backend is asked on the one that compiles nothing.
once = pytest.mark.skipif(BACKEND != "torch", reason="does not depend on the backend")
RATE, MOMENTUM = 0.1, 0.9
KERNEL = np.array([[3.0, -4.0, 0.5], [1.0, 0.2, -2.0]])
BIAS = np.array([3.0, -4.0, 0.0])


def orthogonal(matrix):
    """The direction with the default scale."""
    inputs, outputs = matrix.shape
    return math.sqrt(max(1, outputs / inputs)) * orthogonalized(matrix)


def descend(
    epochs=EPOCHS,
    rate=lambda step: RATE,
    average=1,
    decay=0.0,
    ema=None,
):
    """What `OrthogonalSGD` does in `by_hand.fit`, written out.

    Args:
        epochs: How many.
        rate: Function of the number of a step.
        average: Over how many batches a gradient is the mean.
        decay: Factor of the weight decay.
        ema: `None`, or the momentum of the mean weights that training ends with.
    """
    weights = [w.astype("float64") for w in START]
    slots, mean, seen = [np.zeros_like(w) for w in weights], None, []
    for step, (x, y) in enumerate(epochs * by_hand.batches()):
        seen.append(by_hand.gradients(x, y, *weights))
        if len(seen) < average:
            continue
        gradients = [np.mean(g, axis=0) for g in zip(*seen, strict=True)]
        lr, seen = rate(step), []
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


def moved(optimizer, gradients, start=None, names=("kernel", "bias"), dtype="float32"):
    """The steps that an optimizer makes with a gradient for each variable."""
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
    # Keras's boundary is the last step of the rate before it.
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
def test_fit_with_arguments_of_the_base(name):
    arguments, by_numpy = ARGUMENTS[name]
    arguments = {"learning_rate": RATE, "momentum": MOMENTUM} | arguments
    model = fitted(OrthogonalSGD(**arguments))
    by_hand.assert_same(model.get_weights(), descend(**by_numpy))


COMPILED = {"eager": {"run_eagerly": True}}
if BACKEND != "torch":  # Of its compiler tests/clients/test_compiled_step.py asks.
    COMPILED |= {
        "plain": {"jit_compile": False},
        "several steps": {"steps_per_execution": 3, "jit_compile": True},
    }


@pytest.mark.parametrize("compiled", COMPILED)
def test_fit_is_the_same_however_it_is_compiled(compiled):
    model = fitted("orthogonal_sgd", **COMPILED[compiled])
    by_hand.assert_same(model.get_weights(), descend(rate=lambda step: 0.01))


def test_a_loss_scale_is_divided_out_before_the_direction():
    model = fitted(keras.optimizers.LossScaleOptimizer(OrthogonalSGD(RATE)))
    by_hand.assert_same(model.get_weights(), descend())


@pytest.mark.parametrize("name", ["orthogonal_sgd", "OrthogonalSGD"])
def test_keras_finds_it_by_name(name):
    found = keras.optimizers.get(name)
    assert type(found) is OrthogonalSGD
    found = keras.optimizers.get({"class_name": name, "config": {"momentum": 0.5}})
    assert type(found) is OrthogonalSGD
    assert (found.momentum, found.direction.name) == (0.5, "orthogonal")


@once
def test_the_direction_of_a_gradient_differs_from_that_of_an_update():
    """Adam receives directions, and not the other way round."""
    optimizer = keras_normopt.NormalizedAdam(RATE, direction="orthogonal")
    model = fitted(optimizer)

    def point(grads, weights):
        return [orthogonal(grads[0]), grads[1]]

    adam = keras.optimizers.Adam(RATE)
    expected = by_hand.train(adam, lambda gradient: gradient, change=point)
    by_hand.assert_same(model.get_weights(), expected)


def test_norm_epsilon_set_during_training_acts_in_compiled_steps():
    optimizer = keras_normopt.NormalizedSGD(
        RATE, direction={"kernel": "orthogonal", "bias": "rows"}
    )
    model = by_hand.make_model(optimizer)
    model.train_on_batch(X, Y)
    before = [w.astype("float64") for w in model.get_weights()]
    kernel, bias = by_hand.gradients(X, Y, *before)
    optimizer.norm_epsilon = 100.0  # Above the entries of both.
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
    # The layer computes with 11 or 8 significant bits, and so steps may differ by that.
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
def test_directions_of_gradients_whose_squares_leave_their_dtype(
    dtype, value, apply_to, float64
):
    # The squares of these are beyond the range of their dtype.
    optimizer = keras_normopt.NormalizedSGD(
        0.5,
        direction={"kernel": "orthogonal", "bias": "rows"},
        apply_to=apply_to,
        norm_epsilon=0,
    )
    gradients = [value * KERNEL, value * BIAS]
    kernel, bias = moved(optimizer, gradients, dtype=dtype)
    # The second singular value depends on digits that the narrow ones do not have.
    np.testing.assert_allclose(kernel, -0.5 * orthogonal(KERNEL), rtol=0.02, atol=0.004)
    np.testing.assert_allclose(bias, -0.5 * BIAS / 5, rtol=0.01)


# Beside other options.


@once
def test_excluded_variables_step_with_raw_gradients():
    optimizer = keras_normopt.NormalizedSGD(1.0, direction="sign", exclude="kernel")
    kernel, bias = moved(optimizer, [KERNEL, BIAS])
    np.testing.assert_allclose(kernel, -KERNEL, rtol=1e-6)
    np.testing.assert_array_equal(bias, -np.sign(BIAS))


@once
def test_gradients_are_centralized_before_their_direction():
    optimizer = keras_normopt.NormalizedSGD(
        1.0, direction="orthogonal", centralize=True
    )
    kernel, bias = moved(optimizer, [KERNEL, BIAS])
    expected = -orthogonal(KERNEL - KERNEL.mean(axis=0))
    np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, -BIAS, rtol=1e-6)


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_a_step_size_multiplies_the_direction(apply_to):
    optimizer = keras_normopt.NormalizedSGD(
        RATE, direction="orthogonal", step_size=WeightNorm(0.5), apply_to=apply_to
    )
    start = [np.arange(6.0).reshape(2, 3), np.array([3.0, 0.0, 4.0])]
    kernel, bias = moved(optimizer, [KERNEL, BIAS], start)
    factor = 0.5 * np.linalg.norm(start[0])
    expected = -RATE * factor * orthogonal(KERNEL)
    np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, -RATE * 2.5 * BIAS, rtol=1e-5, atol=1e-6)


@once
@pytest.mark.parametrize("apply_to", ["gradient", "update"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_scope_is_tracked_and_does_not_change_directions(scope, apply_to):
    optimizer = keras_normopt.NormalizedSGD(
        1.0,
        direction={"kernel": "orthogonal", "bias": "rows"},
        scope=scope,
        track_norms=True,
        apply_to=apply_to,
    )
    names = ["kernel", "bias"] if scope == "global" else ["d/kernel", "d/bias"]
    for _ in range(2):  # Of the second step, as there was one before.
        kernel, bias = _moved_in_a_layer(optimizer, names)
    np.testing.assert_allclose(kernel, -orthogonal(KERNEL), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, -BIAS / 5, rtol=1e-5)
    norms = optimizer.gradient_norms
    name = "global" if scope == "global" else "d"
    total = np.hypot(np.linalg.norm(KERNEL), 5)
    assert norms == pytest.approx({name: total, "total": total}, rel=1e-5)


def _moved_in_a_layer(optimizer, paths):
    """As `moved`, with one pair of variables for each optimizer."""
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


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # Keras's.
@pytest.mark.parametrize("cls", [OrthogonalSGD, keras_normopt.NormalizedAdam])
def test_missing_gradients_and_empty_variables_are_passed_by(cls):
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
    found = ops.convert_to_numpy(variables[0])
    np.testing.assert_allclose(found, (1 - 1j) * KERNEL, rtol=1e-5)
    found = numpy(variables[1])
    np.testing.assert_allclose(found, -orthogonal(KERNEL), rtol=1e-4, atol=1e-5)


@once
def test_a_direction_leaves_frozen_layers_alone():
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
    seen = ops.convert_to_numpy(hidden.inputs_amax_history)
    np.testing.assert_allclose(seen.max(), np.abs(x).max(), rtol=1e-6)


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


def through_a_file(model, path):
    model.save(path / "model.keras")
    return keras.models.load_model(path / "model.keras")


COPIES = {
    "file": through_a_file,
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
def test_training_goes_on_where_it_stopped(way, accumulated, tmp_path):
    # The first pattern that is found counts, and sorted they would be turned around.
    optimizer = OrthogonalSGD(
        RATE,
        direction={"kernel": directions.Orthogonal(), "b": None, ".*": "sign"},
        # Which is in the middle of a mean where training stops.
        gradient_accumulation_steps=accumulated,
    )
    model = by_hand.make_model(optimizer)
    by_hand.fit(model, epochs=1)
    twin = COPIES[way](model, tmp_path)
    assert type(twin.optimizer) is OrthogonalSGD
    by_hand.fit(twin, epochs=1)
    by_hand.assert_same(twin.get_weights(), descend(2, average=accumulated or 1))


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
def test_patterns_keep_their_order_where_keys_are_sorted(options, expected):
    """The first pattern that is found counts, and it is not the first by name."""
    config = keras_normopt.NormalizedSGD(1.0, **options).get_config()
    twin = keras_normopt.NormalizedSGD.from_config(sorted_json(config))
    (found,) = moved(twin, [KERNEL])
    np.testing.assert_allclose(found, -expected, rtol=1e-5)


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
    now = inspect.getclosurevars(OrthogonalSGD.__init__).nonlocals["defaults"]
    before = dict(now)
    assert set(later) | {"norm"} == set(before)
    for name, value in later.items():
        monkeypatch.setitem(now, name, value)
    assert OrthogonalSGD().momentum == 0.5
    loaded = keras.optimizers.deserialize(saved)
    assert loaded.direction.name == "orthogonal"
    for name in set(later) - {"direction"}:
        assert getattr(loaded, name) == before[name]


@once
@pytest.mark.parametrize("is_built", [False, True])
def test_an_optimizer_made_from_a_config_trains_another_model(is_built):
    first = OrthogonalSGD(RATE)
    if is_built:
        fitted(first)
    second = OrthogonalSGD.from_config(first.get_config())
    model = fitted(second)  # The paths are others, and warnings are errors here.
    by_hand.assert_same(model.get_weights(), descend())


@once
def test_a_copy_of_an_optimizer_is_the_same():
    optimizer = OrthogonalSGD(RATE, direction={"k": directions.Orthogonal(steps=2)})
    for twin in (copy.copy(optimizer), copy.deepcopy(optimizer)):
        assert twin.get_config() == optimizer.get_config()


# The interface of 2018.


@once
def test_an_optimizer_in_use_becomes_a_normalized_one_without_a_direction():
    plain = keras.optimizers.SGD(RATE, MOMENTUM, nesterov=True)
    converted = keras_normopt.NormalizedOptimizer(plain)
    assert converted.direction is None
    with pytest.raises(ValueError, match="normalized already"):
        keras_normopt.NormalizedOptimizer(OrthogonalSGD())


# Layers whose axes are not known.


class Own(keras.layers.Layer):
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
def test_no_warning_of_axes_on_which_nothing_depends(options):
    layer = Own()
    layer.build(None)
    optimizer = keras_normopt.NormalizedSGD(**options)
    optimizer.build(layer.trainable_variables)  # Warnings are errors here.
    assert optimizer.built
