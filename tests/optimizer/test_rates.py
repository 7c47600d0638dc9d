"""Tests learning rates of any sign and size, constant and scheduled."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.optimizers import schedules

import keras_normopt
from helpers.classes import CLASSES, without_decay
from keras_normopt import ClippedSGD, NormalizedSGD, RunningNorm, WeightNorm

pytestmark = pytest.mark.newest_keras

GRADIENT = np.array([[3.0, 4.0, 0.0], [0.0, -6.0, 8.0]], "float32") / 5
RATES = [-1e-20, 0.0, 1e20]


def steps_of(optimizer, number, gradient=GRADIENT):
    """Returns the updates that are added to zero weights, one array for each step."""
    updates = []
    variable = keras.Variable(np.zeros_like(gradient))
    for _ in range(number):
        # Each step starts at 0. In float32, 1 + 1e-20 is 1.
        variable.assign(np.zeros_like(gradient))
        optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
        updates.append(ops.convert_to_numpy(variable).astype("float64"))
    return updates


def sizes(steps):
    return [np.linalg.norm(step) for step in steps]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_negative_rate_reverses_the_step_of_every_base(cls):
    arguments = without_decay(cls)
    up = steps_of(cls(0.1, apply_to="update", **arguments), 2)
    down = steps_of(cls(-0.1, apply_to="update", **arguments), 2)
    assert sizes(up) == pytest.approx([0.1, 0.1], rel=1e-5)
    np.testing.assert_allclose(down, np.negative(up), rtol=1e-5)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"scope": "unit"},
        {"norm": "max"},
        {"norm": "std"},
        {"norm": lambda g: ops.max(ops.abs(g))},
        {"centralize": True},
        {"norm_epsilon": 0.0},
    ],
    ids=["default", "unit", "max", "std", "own norm", "centralize", "no floor"],
)
def test_normalized_steps_are_multiples_of_the_rate(arguments, rate):
    arguments = {"momentum": 0.9, "apply_to": "update"} | arguments
    expected = steps_of(NormalizedSGD(1.0, **arguments), 2)
    actual = steps_of(NormalizedSGD(rate, **arguments), 2)
    np.testing.assert_allclose(actual, rate * np.array(expected), rtol=1e-5)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    "max_norm",
    [0.5, 10.0, WeightNorm(), RunningNorm(warmup=1, factor=1.0)],
    ids=repr,
)
def test_clipped_steps_are_multiples_of_the_rate(max_norm, rate):
    arguments = {"momentum": 0.9, "apply_to": "update", "track_norms": True}
    arguments |= {"max_norm": max_norm}
    one, other = ClippedSGD(1.0, **arguments), ClippedSGD(rate, **arguments)
    expected, actual = steps_of(one, 3), steps_of(other, 3)
    np.testing.assert_allclose(actual, rate * np.array(expected), rtol=1e-5)
    [clipped] = other.norm_tracker.clipped.values()
    # A step of 0 needs no clipping.
    assert [clipped] == (list(one.norm_tracker.clipped.values()) if rate else [0.0])


def test_steps_with_a_negative_rate_go_along_the_gradient():
    def step(optimizer):
        variable = keras.Variable([1.0, 1.0])
        optimizer.apply([ops.convert_to_tensor([3.0, 4.0])], [variable])
        return ops.convert_to_numpy(variable)

    expected = [1.06, 1.08]
    for norm in ("l2", lambda g: ops.sqrt(ops.sum(ops.square(g)))):
        optimizer = NormalizedSGD(-0.1, norm=norm, apply_to="update")
        np.testing.assert_allclose(step(optimizer), expected, rtol=1e-6)
    np.testing.assert_allclose(step(NormalizedSGD(-0.1)), expected, rtol=1e-6)
    for arguments in ({}, {"apply_to": "update"}):
        optimizer = ClippedSGD(-0.1, max_norm=1.0, track_norms=True, **arguments)
        np.testing.assert_allclose(step(optimizer), expected, rtol=1e-6)
        assert list(optimizer.norm_tracker.clipped.values()) == [1.0]


def test_steps_are_multiples_of_the_rate_if_a_function_returns_the_update(custom_norms):
    register = keras_normopt.NormalizedOptimizer.set_normalization_function
    register("positive", lambda g: ops.where(g > 0, ops.ones_like(g), 0.5 * g))
    arguments = {"norm": "positive", "momentum": 0.9, "apply_to": "update"}
    expected = steps_of(NormalizedSGD(1.0, **arguments), 2)
    for rate in RATES:
        actual = steps_of(NormalizedSGD(rate, **arguments), 2)
        np.testing.assert_allclose(actual, rate * np.array(expected), rtol=1e-5)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("step_size", ["weight_norm", "gradient_correlation"])
def test_step_sizes_multiply_any_rate(step_size, rate):
    for apply_to in ("gradient", "update"):
        arguments = {"step_size": step_size, "apply_to": apply_to}
        expected = steps_of(NormalizedSGD(1.0, **arguments), 3)
        actual = steps_of(NormalizedSGD(rate, **arguments), 3)
        np.testing.assert_allclose(actual, rate * np.array(expected), rtol=1e-5)


# Each schedule ends after at most ten steps. Most schedules end at 0.
SCHEDULES = {
    "CosineDecay": [
        schedules.CosineDecay(0.01, 5),
        schedules.CosineDecay(0.0, 3, warmup_target=0.01, warmup_steps=2),
    ],
    "CosineDecayRestarts": [schedules.CosineDecayRestarts(0.01, 4)],
    "ExponentialDecay": [schedules.ExponentialDecay(0.01, 1, 1e-3)],
    "InverseTimeDecay": [schedules.InverseTimeDecay(0.01, 1, 0.5)],
    "PiecewiseConstantDecay": [
        schedules.PiecewiseConstantDecay([2, 5, 8], [0.01, -0.1, 0.0, 1e-3])
    ],
    "PolynomialDecay": [
        schedules.PolynomialDecay(0.01, 5, 0.0),
        schedules.PolynomialDecay(0.01, 4, -0.01),
    ],
}


def test_no_schedule_of_keras_is_missing():
    names = {n for n in dir(schedules) if isinstance(getattr(schedules, n), type)}
    assert set(SCHEDULES) == names - {"LearningRateSchedule"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_follow_a_schedule_beyond_its_end(name):
    for schedule in SCHEDULES[name]:
        rates = [float(ops.convert_to_numpy(schedule(i))) for i in range(20)]
        # Compilers may replace the smallest numbers by 0.
        expected = [abs(rate) if abs(rate) > 1e-35 else 0.0 for rate in rates]
        optimizers = [
            NormalizedSGD(schedule, momentum=0.9, nesterov=True, apply_to="update"),
            ClippedSGD(schedule, momentum=0.9, max_norm=1.0, apply_to="update"),
        ]
        for optimizer in optimizers:
            actual = sizes(steps_of(optimizer, 20))
            if isinstance(optimizer, ClippedSGD):  # The rate is only a bound.
                bounds = [min(a, e) for a, e in zip(actual, expected, strict=True)]
                assert actual == pytest.approx(bounds, rel=1e-4, abs=1e-35)
            else:
                assert actual == pytest.approx(expected, rel=1e-4, abs=1e-35)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_fit_beyond_the_end_of_its_schedule_changes_no_weight(compiled):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    optimizer = NormalizedSGD(
        schedules.CosineDecay(0.01, 4), momentum=0.9, apply_to="update"
    )
    model.compile(optimizer, "mse", run_eagerly=not compiled)
    x, y = np.ones((4, 3), "float32"), np.full((4, 2), 9.0, "float32")
    model.fit(x, y, batch_size=1, verbose=0)
    before = model.get_weights()
    model.fit(x, y, batch_size=1, epochs=2, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
