"""Tests thresholds that follow weights or earlier norms against rules in NumPy."""

import json

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import by_hand, oracle
from helpers.variables import (
    LAYERS,
    SHAPES,
    as_numpy,
    gradient_steps,
    make_gradients,
)
from keras_normopt import ClippedOptimizer, RunningNorm, WeightNorm

pytestmark = pytest.mark.newest_keras

BACKEND = keras.backend.backend()
SCOPES = ["variable", "unit", "layer", "global"]


def blocks(scope):
    """Returns the blocks of a scope, each a list of (path, index) pairs."""
    if scope == "unit":
        return [
            [(path, (..., unit))]
            for path, shape in SHAPES.items()
            for unit in (range(shape[-1]) if len(shape) > 1 else [slice(None)])
            if shape
        ] + [[(path, ...)] for path, shape in SHAPES.items() if not shape]
    groups = {"variable": [[p] for p in SHAPES], "layer": LAYERS}
    groups["global"] = [list(SHAPES)]
    return [[(path, ...) for path in block] for block in groups[scope]]


def norm_of(norm, arrays, block):
    vector = np.concatenate([np.ravel(arrays[path][index]) for path, index in block])
    return float(oracle.norm(norm, vector))


def scaled(arrays, scope, factors):
    result = {path: np.array(array, "float64") for path, array in arrays.items()}
    for block, factor in zip(blocks(scope), factors, strict=True):
        for path, index in block:
            result[path][index] *= factor
    return result


def make_weights():
    rng = np.random.default_rng(1)
    weights = {path: rng.normal(size=shape) for path, shape in SHAPES.items()}
    weights["a/kernel"][:, 0] = 0.0
    return weights | {"b/bias": np.zeros(SHAPES["b/bias"])}


def assert_same(actual, expected, rtol=1e-5, atol=1e-6):
    for path in SHAPES:
        np.testing.assert_allclose(
            actual[path], expected[path], rtol=rtol, atol=atol, err_msg=path
        )


# WeightNorm.


@pytest.mark.parametrize("minimum", [0.0, 0.1])
@pytest.mark.parametrize("norm", ["l2", "max", "avg_l1"])
@pytest.mark.parametrize("scope", SCOPES)
def test_weight_norm_clips_by_the_norm_of_the_weights(scope, norm, minimum):
    weights = make_weights()
    gradients = {path: 0.01 * g for path, g in make_gradients().items()}
    optimizer = keras_normopt.ClippedSGD(
        1.0,
        norm=norm,
        scope=scope,
        max_norm=WeightNorm(0.25, minimum=minimum),
        track_norms=True,
    )
    (actual,) = gradient_steps(optimizer, [gradients], weights)
    factors = []
    for block in blocks(scope):
        limit = 0.25 * max(norm_of(norm, weights, block), minimum)
        # Without a minimum, weights of 0 set no limit.
        ratio = limit / norm_of(norm, gradients, block) if limit else np.inf
        factors.append(min(1.0, ratio))
    assert_same(actual, scaled(gradients, scope, factors), atol=1e-4 / 255)
    assert any(f < 1 for f in factors)
    clipped_shares = optimizer.norm_tracker.clipped
    if scope != "unit":
        assert list(clipped_shares.values()) == [float(f < 1) for f in factors]


def test_agc_moves_weights_of_zero():
    # The first two steps of a bias, with the published values.
    optimizer = keras_normopt.ClippedSGD(1.0, max_norm=WeightNorm(0.01, minimum=1e-3))
    variable = keras.Variable(np.zeros(2))
    for _ in range(2):
        optimizer.apply([ops.convert_to_tensor([3.0, 4.0])], [variable])
    # Both steps have length 1e-5, as the norm stays below the minimum.
    expected = [-3 / 5 * 2e-5, -4 / 5 * 2e-5]
    np.testing.assert_allclose(ops.convert_to_numpy(variable), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4), (2, 2, 3, 4), (2,) * 5])
def test_agc_clips_variables_of_every_rank(shape):
    rng = np.random.default_rng(len(shape))
    weight, gradient = rng.normal(size=shape), 0.05 * rng.normal(size=shape)
    optimizer = keras_normopt.ClippedSGD(
        1.0, scope="unit", max_norm=WeightNorm(0.05, minimum=1e-3)
    )
    variable = keras.Variable(weight)
    optimizer.apply([ops.convert_to_tensor(gradient, "float32")], [variable])
    axes = tuple(range(max(len(shape) - 1, min(len(shape), 1))))
    weight_norms = np.sqrt(np.sum(weight**2, axis=axes))
    gradient_norms = np.sqrt(np.sum(gradient**2, axis=axes))
    factor = np.minimum(1, 0.05 * np.maximum(weight_norms, 1e-3) / gradient_norms)
    actual = weight - as_numpy(variable)
    np.testing.assert_allclose(actual, factor * gradient, rtol=1e-4, atol=1e-6)


# RunningNorm.


class ByHand:
    """Computes the rule of `RunningNorm`, one step at a time."""

    def __init__(self, scope, norm, factor, decay, warmup):
        self.scope, self.norm = scope, norm
        self.factor, self.decay, self.warmup = factor, decay, warmup
        self.kept = [[] for _ in blocks(scope)]

    def factors(self, gradients):
        for block, kept in zip(blocks(self.scope), self.kept, strict=True):
            size = norm_of(self.norm, gradients, block)
            limit = self.factor * by_hand.running_mean(self, kept)
            if 0 < size < np.inf:
                kept.append(min(size, limit))
            yield min(1.0, limit / size) if size else 1.0


SIZES = [1.0, 3.0, 0.5, 20.0, 1e-3, 1e4, 2.0]


@pytest.mark.parametrize("warmup", [1, 3])
@pytest.mark.parametrize("norm", ["l2", "max"])
@pytest.mark.parametrize("scope", SCOPES)
def test_running_norm_clips_by_the_mean_of_earlier_norms(scope, norm, warmup):
    arguments = {"factor": 1.5, "decay": 0.75, "warmup": warmup}
    optimizer = keras_normopt.ClippedSGD(
        1.0, norm=norm, scope=scope, max_norm=RunningNorm(**arguments)
    )
    rule = ByHand(scope, norm, **arguments)
    steps = [make_gradients(s, seed=i) for i, s in enumerate(SIZES)]
    actual = gradient_steps(optimizer, steps)
    clipped = 0
    for gradients, step in zip(steps, actual, strict=True):
        factors = list(rule.factors(gradients))
        expected = scaled(gradients, scope, factors)
        clipped += sum(f < 1 for f in factors)
        for path in SHAPES:
            size = np.abs(expected[path]).max()
            np.testing.assert_allclose(
                step[path], expected[path], rtol=1e-5, atol=1e-5 * size, err_msg=path
            )
    assert clipped >= 2 * len(blocks(scope))


def running_norms(optimizer):
    variable = optimizer._own_variables["running_norm"]
    return ops.convert_to_numpy(variable).tolist()


def feed(optimizer, variable, sizes):
    for size in sizes:
        gradient = np.array([size, 0.0], "float32")
        optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
    return running_norms(optimizer)[0]


@pytest.mark.parametrize("during_warmup", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_zero_and_non_finite_norms_do_not_change_the_running_norm(bad, during_warmup):
    arguments = {"factor": 2.0, "decay": 0.5, "warmup": 2}
    variable = keras.Variable(np.zeros(2))
    optimizer = keras_normopt.ClippedSGD(1.0, max_norm=RunningNorm(**arguments))
    sizes = [1.0, bad, 3.0] if during_warmup else [1.0, 3.0, bad]
    assert feed(optimizer, variable, sizes) == 2.0
    if np.isnan(bad):  # NaN still reaches the weights, so that users notice it.
        assert np.isnan(ops.convert_to_numpy(variable)).any()
    # The next gradient is clipped as if the bad one had not occurred.
    variable.assign(np.zeros(2))
    assert feed(optimizer, variable, [10.0]) == 3.0
    np.testing.assert_allclose(ops.convert_to_numpy(variable), [-4.0, 0.0])


def test_zero_gradients_do_not_lower_the_running_norm():
    variable = keras.Variable(np.zeros(2))
    optimizer = keras_normopt.ClippedSGD(1.0, max_norm=RunningNorm(warmup=3))
    feed(optimizer, variable, [0.0] * 50)
    feed(optimizer, variable, [1.0, 2.0, 3.0])
    np.testing.assert_allclose(ops.convert_to_numpy(variable), [-6.0, 0.0])
    feed(optimizer, variable, [100.0])
    expected = [-6.0 - 2.0 * 1.05, 0.0]
    np.testing.assert_allclose(ops.convert_to_numpy(variable), expected, rtol=1e-6)


def test_a_missing_gradient_does_not_change_the_running_norm():
    optimizer = keras_normopt.ClippedSGD(1.0, max_norm=RunningNorm(warmup=1))
    first = make_gradients(1.0)
    second = make_gradients(2.0) | {"a/kernel": None, "offset": None}
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        gradient_steps(optimizer, [first, second])
    for path, mean in zip(SHAPES, running_norms(optimizer), strict=True):
        size = np.linalg.norm(first[path])
        updated = 0.98 * size + 0.02 * 1.05 * size
        expected = size if second[path] is None else updated
        assert mean == pytest.approx(expected, rel=1e-5)


def test_the_running_norm_does_not_clip_excluded_variables():
    optimizer = keras_normopt.ClippedSGD(
        1.0, exclude="^b/", max_norm=RunningNorm(warmup=1)
    )
    steps = [make_gradients(1.0), make_gradients(10.0, seed=1)]
    _, second_step = gradient_steps(optimizer, steps)
    for path in SHAPES:
        size = np.linalg.norm(steps[1][path])
        if not path.startswith("b/"):
            size = 1.05 * np.linalg.norm(steps[0][path])
        assert np.linalg.norm(second_step[path]) == pytest.approx(size, rel=1e-4)


def train_by_hand(epochs, rule, average=1, rate=0.5):
    """Trains with clipped SGD in NumPy. Returns the weights and the running means."""
    kept = [[], []]

    def step(i, gradient):
        limit = rule.factor * by_hand.running_mean(rule, kept[i])
        size = np.linalg.norm(gradient)
        kept[i].append(min(size, limit))
        return rate * gradient * min(1, limit / size)

    weights = by_hand.descend(epochs, step, average)
    return weights, [by_hand.running_mean(rule, k) for k in kept]


MODES = {"default": {}, "eager": {"run_eagerly": True}}
if BACKEND != "torch":
    MODES["several steps"] = {"steps_per_execution": 3}


@pytest.mark.parametrize("accumulated", [None, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_running_norm_continues_from_a_file(mode, accumulated, tmp_path):
    # Gradients grow at this high rate. A factor of 1 clips the gradients that grow.
    rate, average = 6.0, accumulated or 1
    rule = RunningNorm(1.0, decay=0.5, warmup=1 if accumulated else 4)
    optimizer = keras_normopt.ClippedSGD(
        rate, max_norm=rule, gradient_accumulation_steps=accumulated
    )
    model = by_hand.make_model(optimizer, **MODES[mode])
    by_hand.fit(model)
    weights, means = train_by_hand(by_hand.EPOCHS, rule, average, rate)
    by_hand.assert_same(model.get_weights(), weights)
    np.testing.assert_allclose(running_norms(optimizer), means, rtol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.max_norm.get_config() == rule.get_config()
    by_hand.fit(loaded)
    weights, means = train_by_hand(2 * by_hand.EPOCHS, rule, average, rate)
    by_hand.assert_same(loaded.get_weights(), weights)
    np.testing.assert_allclose(running_norms(loaded.optimizer), means, rtol=1e-5)
    unclipped = by_hand.descend(
        2 * by_hand.EPOCHS, lambda i, gradient: rate * gradient, average
    )
    assert not np.allclose(weights[0], unclipped[0], rtol=0.01)


def test_a_skipped_step_does_not_change_the_running_norm():
    inner = keras_normopt.ClippedSGD(1.0, max_norm=RunningNorm(warmup=1))
    outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    variable = keras.Variable(np.zeros(2))
    outer.build([variable])

    def apply(size):
        gradients = [ops.convert_to_tensor(np.array([size, 0.0], "float32"))]
        if BACKEND != "jax":
            outer.apply(gradients, [variable])
            return
        # On JAX, Keras supports only stateless steps of `LossScaleOptimizer`.
        values = [v.value for v in outer.variables]
        _, state = outer.stateless_apply(values, gradients, [variable.value])
        for v, value in zip(outer.variables, state, strict=True):
            v.assign(value)

    apply(8.0)
    assert running_norms(inner) == [2.0]
    apply(np.inf)
    apply(np.nan)
    assert running_norms(inner) == [2.0]
    counts = inner._own_variables["running_norm_count"]
    assert ops.convert_to_numpy(counts).tolist() == [1.0]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's sparse gradients")
@pytest.mark.parametrize("max_norm", [RunningNorm(warmup=1), WeightNorm(0.1)])
@pytest.mark.parametrize("scope", ["variable", "unit"])
def test_thresholds_clip_sparse_gradients_like_dense_ones(scope, max_norm):
    import tensorflow as tf

    table = np.linspace(-1, 1, 8).reshape(4, 2)

    def slices(factor):
        values = tf.constant([[3.0, 0.0], [0.0, 4.0], [0.0, 8.0]])
        return tf.IndexedSlices(
            factor * values, tf.constant([1, 3, 1]), tf.constant([4, 2])
        )

    results = []
    for convert in (lambda g: g, tf.convert_to_tensor):
        optimizer = keras_normopt.ClippedSGD(0.5, scope=scope, max_norm=max_norm)
        variable = keras.Variable(table)
        for factor in (1.0, 5.0):
            optimizer.apply([convert(slices(factor))], [variable])
        results.append(variable.numpy())
    np.testing.assert_allclose(*results, rtol=1e-5)


# The argument `max_norm`.


@pytest.mark.parametrize(
    "max_norm", [WeightNorm(0.5, minimum=0.25), RunningNorm(2.0, 0.5, warmup=7), 3.0]
)
def test_a_config_keeps_the_threshold(max_norm):
    optimizer = keras_normopt.ClippedAdam(max_norm=max_norm)
    config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
    loaded = keras.optimizers.deserialize(config).max_norm
    assert type(loaded) is type(max_norm)
    if max_norm == 3.0:
        assert loaded == 3.0
    else:
        assert loaded.get_config() == max_norm.get_config()


def test_a_name_gives_a_threshold_with_defaults():
    assert isinstance(
        keras_normopt.ClippedSGD(max_norm="weight_norm").max_norm, WeightNorm
    )
    running = keras_normopt.ClippedSGD(max_norm="running_norm").max_norm
    assert running.get_config() == {"factor": 1.05, "decay": 0.98, "warmup": 100}


def test_a_threshold_can_be_set_until_the_optimizer_is_built():
    optimizer = keras_normopt.ClippedSGD(1.0)
    optimizer.max_norm = RunningNorm(warmup=1)
    variable = keras.Variable(np.zeros(2))
    assert feed(optimizer, variable, [2.0]) == 2.0
    with pytest.raises(
        ValueError, match=r"cannot change after.*max_norm=0\.5.*Make a new"
    ):
        optimizer.max_norm = 0.5
    assert isinstance(optimizer.max_norm, RunningNorm)


def test_the_2018_interface_takes_a_threshold():
    original = keras.optimizers.SGD(1.0, momentum=0.9)
    original.build([keras.Variable(np.zeros(2))])
    optimizer = ClippedOptimizer(original, clipnorm=RunningNorm(warmup=1))
    assert isinstance(optimizer.max_norm, RunningNorm)
    assert optimizer.built
    with pytest.raises(ValueError, match="`max_norm` must be"):
        ClippedOptimizer("sgd", clipnorm="adaptive")


@pytest.mark.parametrize(
    "max_norm",
    [
        "lars",
        RunningNorm,
        {"name": "running_norm", "config": {"factor": "1"}},
        {"name": "running_norm", "config": {"other": 1.0}},
        {"name": "gradient_correlation", "config": {}},
        keras_normopt.step_sizes.GradientCorrelation(),
        ["weight_norm"],
        None,
        True,
        0.0,
        -1,
        np.inf,
        1e39,
    ],
    ids=repr,
)
def test_an_invalid_threshold_is_refused(max_norm):
    with pytest.raises(ValueError, match="max_norm="):
        keras_normopt.ClippedSGD(max_norm=max_norm)


@pytest.mark.parametrize(
    ("cls", "argument", "value"),
    [
        (RunningNorm, "factor", 0.9),
        (RunningNorm, "factor", np.inf),
        (RunningNorm, "decay", 1.0),
        (RunningNorm, "decay", -0.1),
        (RunningNorm, "decay", "0.5"),
        (RunningNorm, "warmup", 0),
        (RunningNorm, "warmup", 1.5),
        (RunningNorm, "warmup", True),
        (RunningNorm, "warmup", 2**24),
        (RunningNorm, "warmup", 2**25),
        (WeightNorm, "minimum", -1e-9),
        (WeightNorm, "minimum", np.nan),
    ],
)
def test_errors_name_wrong_arguments_of_thresholds(cls, argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be.*{argument}="):
        cls(**{argument: value})


def test_the_error_for_a_wrong_decay_states_its_limits():
    with pytest.raises(ValueError, match=r"float below 1 and of at least 0\. Received"):
        RunningNorm(decay=1.5)
