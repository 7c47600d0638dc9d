"""Tests skipped steps and thresholds from schedules.

A skipped step changes nothing. A stock optimizer that gets only the other gradients
ends with the same weights, slots, moving averages and number of iterations.
"""

import json

import keras
import numpy as np
import pytest
from keras import ops
from keras.optimizers import schedules

import keras_normopt
from helpers import by_hand
from helpers.stored import stored
from keras_normopt import ClippedAdam, ClippedSGD, RunningNorm, WeightNorm
from keras_normopt.callbacks import GradientNorms

BACKEND = keras.backend.backend()
COMPILED = {"jax": "jit", "tensorflow": "xla", "torch": "compiled"}[BACKEND]
every_mode = pytest.mark.parametrize("mode", ["eager", COMPILED])
pytestmark = [  # PyTorch's compiler warns of caches in Keras and in itself.
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]
SHAPES = {"a/kernel": (3, 2), "a/bias": (2,)}
NAN, INF, SPIKE = np.nan, np.inf, 1e4
SCALES = [NAN, 1, 1, SPIKE, 1, -INF, NAN, 1, SPIKE, 1]
SKIPS = 5
SKIP = {"scope": "global", "max_norm": 100.0, "skip": True}


def make_variables():
    rng = np.random.default_rng(1)
    variables = []
    for path, shape in SHAPES.items():
        layer, name = path.split("/")
        with keras.name_scope(layer):
            value = rng.normal(size=shape).astype("float32")
            variables.append(keras.Variable(value, name=name))
    return variables


def make_gradients(scales, places=(1, 0)):
    """Returns gradients of each scale. NaN and infinity replace only one entry."""
    rng = np.random.default_rng(0)
    steps = []
    for i, scale in enumerate(scales):
        arrays = [rng.normal(size=s).astype("float32") for s in SHAPES.values()]
        if np.isfinite(scale):
            arrays = [np.float32(scale) * a for a in arrays]
        else:
            arrays[places[i % 2]].flat[-1] = scale
        steps.append(arrays)
    return steps


def not_skipped(steps):
    return [step for step, scale in zip(steps, SCALES, strict=True) if scale == 1]


def stepper(optimizer, variables, mode):
    """Returns a function that makes a step with a list of arrays."""
    optimizer.build(variables)

    def apply(*gradients):
        optimizer.apply(list(gradients), variables)

    if mode == "jit":
        import jax

        pure = jax.jit(optimizer.stateless_apply)

        def apply(*gradients):
            state = [v.value for v in optimizer.variables]
            weights, state = pure(state, gradients, [v.value for v in variables])
            every = zip(variables + optimizer.variables, weights + state, strict=True)
            for variable, value in every:
                variable.assign(value)

    elif mode in ("graph", "xla"):
        import tensorflow as tf

        apply = tf.function(apply, jit_compile=mode == "xla")
    elif mode == "compiled":
        if keras.version() == "3.12.0":
            pytest.skip("PyTorch cannot compile the steps of this Keras as one graph")
        import torch._dynamo

        torch._dynamo.reset()
        # A step that is one graph never waits for the device.
        apply = torch.compile(apply, backend="eager", fullgraph=True)
    return lambda gradients: apply(*[ops.convert_to_tensor(g) for g in gradients])


def train(optimizer, steps, mode="eager"):
    """Returns the weights, the saved variables of the base, and then our variables."""
    variables = make_variables()
    step = stepper(optimizer, variables, mode)
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    for gradients in steps:
        if optimizer is not inner:
            scale = ops.convert_to_numpy(optimizer.dynamic_scale)
            gradients = [scale * g for g in gradients]
        step(gradients)
    return [ops.convert_to_numpy(v) for v in variables] + stored(inner)


def assert_same(actual, expected, **tolerance):
    """Asserts that the arrays are equal. `expected` may have fewer arrays."""
    assert len(actual) >= len(expected)
    for one, other in zip(actual, expected, strict=False):
        np.testing.assert_allclose(one, other, **{"rtol": 0, "atol": 0} | tolerance)


CLOSE = {"rtol": 2e-6, "atol": 1e-7}


def assert_equal_to_stock(ours, stock, mode="eager", **arguments):
    steps = make_gradients(SCALES, **arguments)
    actual, expected = train(ours, steps, mode), train(stock, not_skipped(steps))
    assert_same(actual, expected, **{} if mode == "eager" else CLOSE)
    assert ours.skipped_steps == SKIPS


AVERAGE = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2}
RATE = schedules.ExponentialDecay(0.5, 1, 0.5)
ARGUMENTS = {"SGD": {"momentum": 0.9, "learning_rate": RATE, "weight_decay": 0.1}}
ARGUMENTS["Adam"] = AVERAGE
BASES = keras_normopt.optimizers.NORMALIZED.values()
BASES = [cls.__name__.removeprefix("Normalized") for cls in BASES]
# PyTorch cannot compile the branch in which Keras overwrites weights by averages.
OF_COMPILED = ["AdamW"] if BACKEND == "torch" else [*ARGUMENTS]


@pytest.mark.parametrize(
    ("mode", "name"),
    [("eager", name) for name in BASES] + [(COMPILED, name) for name in OF_COMPILED],
)
def test_a_skipped_step_changes_nothing(mode, name):
    is_oldest = keras.version() == "3.12.0"
    if BACKEND == "tensorflow" and is_oldest and name == "Muon":
        pytest.skip("the base itself fails")
    base, arguments = getattr(keras.optimizers, name), ARGUMENTS.get(name, {})
    ours = keras_normopt.clipped(base)(**SKIP, **arguments)
    assert_equal_to_stock(ours, base(**arguments), mode)


@every_mode
def test_accumulated_gradients_are_skipped_together(mode):
    if mode == "compiled":
        pytest.skip("Keras branches on the number of batches")
    arguments = {"momentum": 0.9, "weight_decay": 0.1, "gradient_accumulation_steps": 2}
    steps = make_gradients([1, 1, NAN, 1, 1, 1, 1, INF, SPIKE, 1, 1, 1, NAN])
    ours = ClippedSGD(0.1, **SKIP, **arguments)
    actual = train(ours, steps[:-1], mode)
    assert ours.skipped_steps == 3
    good = steps[:2] + steps[4:6] + steps[10:12]
    expected = train(keras.optimizers.SGD(0.1, **arguments), good)
    assert_same(actual, expected, **CLOSE)


NORMS = [{"norm": norm} for norm in ("l1", "max", "min_max", "std", "avg_l1_l2")]


@pytest.mark.parametrize("arguments", [*NORMS, {"max_norm": WeightNorm(20.0)}], ids=str)
def test_every_norm_and_threshold_skips_the_same_steps(arguments):
    ours = ClippedSGD(0.1, 0.9, **SKIP | arguments)
    assert_equal_to_stock(ours, keras.optimizers.SGD(0.1, 0.9))


def test_a_skipped_step_keeps_excluded_variables():
    ours = ClippedSGD(0.1, 0.9, weight_decay=0.1, exclude="bias", **SKIP)
    steps = make_gradients(SCALES, places=(0, 0))
    for scale, gradients in zip(SCALES, steps, strict=True):
        # The excluded gradient must not decide which steps are skipped.
        gradients[1] *= {1: 1e3, SPIKE: 1e-4}.get(scale, 1)
    stock = keras.optimizers.SGD(0.1, 0.9, weight_decay=0.1)
    assert_same(train(ours, steps), train(stock, not_skipped(steps)))


def test_nan_in_an_excluded_variable_skips_the_step():
    ours = ClippedSGD(0.1, 0.9, exclude="bias", **SKIP)
    steps = make_gradients([1, 1, 1])
    steps[1][1][0] = NAN
    expected = train(keras.optimizers.SGD(0.1, 0.9), [steps[0], steps[2]])
    assert_same(train(ours, steps), expected)
    assert ours.skipped_steps == 1


def test_a_skipped_step_changes_nothing_with_step_size_patterns():
    factors = {"kernel": 0.5, "bias": 0.25}
    ours = ClippedSGD(0.5, 0.5, weight_decay=0.5, step_size=factors, **SKIP)
    steps = make_gradients(SCALES)
    actual = train(ours, steps)
    for i, factor in enumerate(factors.values()):
        stock = keras.optimizers.SGD(0.5 * factor, 0.5, weight_decay=0.5)
        np.testing.assert_allclose(
            actual[i], train(stock, not_skipped(steps))[i], **CLOSE
        )


def test_a_skipped_step_does_not_change_adaptive_rates():
    arguments = {"learning_rate": 0.01, "step_size": "gradient_correlation"}
    plain = ClippedSGD(**arguments, **SKIP | {"skip": False})
    assert_equal_to_stock(ClippedSGD(**arguments, **SKIP), plain)


def test_gradients_are_divided_by_the_loss_scale_before_a_step_is_skipped():
    inner, steps = ClippedAdam(0.1, **SKIP), make_gradients(SCALES)
    outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    # Keras supports only stateless steps on JAX, and only eager steps on PyTorch.
    actual = train(outer, steps, "eager" if BACKEND == "torch" else COMPILED)
    assert_same(actual, train(keras.optimizers.Adam(0.1), not_skipped(steps)), **CLOSE)
    assert inner.skipped_steps == 2  # `outer` skips non-finite steps.


def test_constraints_apply_in_a_skipped_step():
    variable = keras.Variable(np.ones(2, "float32"))
    variable.constraint = keras.constraints.MaxNorm(0.5)
    step = stepper(ClippedSGD(1.0, **SKIP), [variable], "eager")
    step([np.array([NAN, 0], "float32")])
    assert np.linalg.norm(variable.numpy()) == pytest.approx(0.5, rel=1e-5)


# Compared with hand-computed values.


def feed(optimizer, sizes, mode="eager"):
    """Returns how far each step moves a weight, and each running norm after a step."""
    variable = keras.Variable(np.zeros(2, "float32"))
    step = stepper(optimizer, [variable], mode)
    moved, means = [], []
    for size in sizes:
        variable.assign(np.zeros(2, "float32"))
        step([np.array([size, 0], "float32")])
        moved.append(-float(ops.convert_to_numpy(variable)[0]))
        mean = optimizer._own_variables.get("running_norm", np.zeros(1))
        means.append(float(ops.convert_to_numpy(mean)[0]))
    return moved, means


@every_mode
def test_a_finite_step_is_clipped_after_max_skips(mode):
    rule = RunningNorm(2.0, decay=0.5, warmup=2)
    arguments = SKIP | {"max_norm": rule, "max_skips": 2, "track_norms": True}
    optimizer = ClippedSGD(1.0, **arguments)
    rows = [  # A row holds the norm, the step, and the next running norm.
        *[(1, 1, 1), (NAN, 0, 1), (3, 3, 2)],  # The warm-up ends.
        *[(INF, 0, 2), (4, 4, 3)],  # The norm is not above the threshold.
        *[(50, 0, 3), (50, 0, 3), (50, 6, 4.5), (50, 9, 6.75), (50, 13.5, 10.125)],
        (2.25, 2.25, 6.1875),  # Below the threshold, so two more may be skipped.
        *[(50, 0, 6.1875), (NAN, 0, 6.1875), (NAN, 0, 6.1875), (50, 12.375, 9.28125)],
    ]
    sizes, steps, means = zip(*rows, strict=True)
    np.testing.assert_allclose(feed(optimizer, sizes, mode), [steps, means], rtol=1e-6)
    skips = steps.count(0)
    assert optimizer.skipped_steps == skips
    tracker = optimizer.norm_tracker
    assert tracker.skipped == {"global": pytest.approx(skips / len(rows))}
    assert tracker.clipped == {"global": pytest.approx(4 / len(rows))}
    count = optimizer._own_variables["running_norm_count"]
    assert ops.convert_to_numpy(count).tolist() == [len(rows) - skips]
    tracker.reset()
    assert tracker.skipped == {"global": 0.0}


@keras.saving.register_keras_serializable("test_skipping")
class Halves(schedules.LearningRateSchedule):
    """Returns start, start / 2, start / 4, …"""

    def __init__(self, start):
        self.start = start

    def __call__(self, step):
        return self.start * 0.5 ** ops.cast(step, "float32")

    def get_config(self):
        return {"start": self.start}


FALLING = schedules.PiecewiseConstantDecay([1, 3], [2.0, 1.0, 0.5])
LIMITS = [2, 2, 1, 1, 0.5]
SCHEDULED = {
    "gradients": (FALLING, {}, [10] * 4 + [0.25, 10], [2, 2, 1, 1, 0.25, 0.5]),
    "updates": (FALLING, {"apply_to": "update"}, [10] * 5, LIMITS),
    "batches": (
        *(FALLING, {"gradient_accumulation_steps": 2}),
        *([10] * 10, [s for limit in LIMITS for s in (0, limit)]),
    ),
    "skips": (
        schedules.PiecewiseConstantDecay([0], [5.0, 2.0]),
        {"scope": "global", "skip": True, "max_skips": 2},
        *([9, 4, 4, 1, NAN, 4, 4], [0, 4, 0, 1, 0, 0, 2]),
    ),
    "ends at 0": (
        schedules.PolynomialDecay(1.0, 2, 0.0),
        *({}, [10, 10, 10, 0, 1e30, 1e-30], [1, 0.5, 0, 0, 0, 0]),
    ),
    "own": (Halves(8.0), {}, [10, 10, 10, 1], [8, 4, 2, 1]),
}


@pytest.mark.parametrize("name", SCHEDULED)
@every_mode
def test_thresholds_follow_a_schedule(mode, name):
    if mode == "compiled" and name not in ("gradients", "skips"):
        pytest.skip("takes a second each, and Keras branches on the number of batches")
    schedule, arguments, sizes, expected = SCHEDULED[name]
    moved, _ = feed(ClippedSGD(1.0, max_norm=schedule, **arguments), sizes, mode)
    np.testing.assert_allclose(moved, expected, rtol=1e-6, atol=1e-37)


# In `fit`.

X, Y, BATCH = by_hand.X, by_hand.Y, 2  # This makes six batches.
BAD_X, BAD_Y = X.copy(), Y.copy()
BAD_X[3], BAD_Y[6:8] = NAN, 1e6
GOOD = np.repeat([True, False, True, False, True, True], BATCH)
ADAM_ARGUMENTS = {"learning_rate": schedules.CosineDecay(0.1, 8), "weight_decay": 0.1}
ADAM_ARGUMENTS |= {"use_ema": True, "ema_momentum": 0.5}


def fit(model, x, y, epochs=1, **arguments):
    arguments |= {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    return model.fit(x, y, epochs=epochs, **arguments).history


def check_fit(make):
    arguments = SKIP | {"max_norm": 1e3, "track_norms": "all"} | ADAM_ARGUMENTS
    model = make(lambda: ClippedAdam(**arguments))
    logs = fit(model, BAD_X, BAD_Y, epochs=2, callbacks=[GradientNorms()])
    assert model.optimizer.skipped_steps == 4
    assert logs["skipped/global"] == pytest.approx([2 / 6] * 2)
    assert logs["clipped/global"] == [0, 0]
    # The logs leave out skipped steps.
    assert 0 < min(logs["update_norm/total"]) < 10
    assert np.isfinite(logs["update_ratio/global"]).all()
    plain = by_hand.make_model(
        keras.optimizers.Adam(**ADAM_ARGUMENTS), run_eagerly=True
    )
    fit(plain, X[GOOD], Y[GOOD], epochs=2)
    actual = model.get_weights() + stored(model.optimizer)
    expected = plain.get_weights() + stored(plain.optimizer)
    assert_same(actual, expected, rtol=1e-5, atol=1e-6)
    return model


def test_fit_skips_steps():
    arguments = {} if BACKEND == "torch" else {"steps_per_execution": 3}
    check_fit(lambda make: by_hand.make_model(make(), **arguments))


def test_replicas_skip_the_same_steps(strategy):
    def make_on_replicas(make):
        with strategy.scope():
            return by_hand.make_model(make(), jit_compile=False)

    model = check_fit(make_on_replicas)
    for variable in model.trainable_variables + model.optimizer.variables:
        first, *rest = getattr(variable.value, "values", [variable.value])
        for other in rest:
            np.testing.assert_array_equal(first, other)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's eager steps end early")
def test_a_skipped_step_never_touches_weights_and_slots():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    optimizer = ClippedAdam(0.1, **SKIP, weight_decay=0.1, use_ema=True)
    variables = make_variables()
    step = stepper(optimizer, variables, "eager")
    slots = [v for v in optimizer.variables if tuple(v.shape) in SHAPES.values()]
    assert len(slots) == 6
    places = {v.value.data_ptr() for v in variables + slots}
    touching = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tensors = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
            touching.extend(func.name() for t in tensors if t.data_ptr() in places)
            return func(*args, **(kwargs or {}))

    for gradients, scale in zip(make_gradients(SCALES), SCALES, strict=True):
        touching.clear()
        with Spy():
            step(gradients)
        assert bool(touching) == (scale == 1), touching
    assert places == {v.value.data_ptr() for v in variables + slots}


# Files and arguments.


@pytest.mark.parametrize(
    "max_norm", [RunningNorm(1.5, warmup=2), Halves(50.0)], ids=["running", "schedule"]
)
def test_skipping_resumes_from_a_file(max_norm, tmp_path):
    """The model is saved between two skipped steps."""
    arguments = SKIP | {"max_norm": max_norm, "max_skips": 2}
    whole, model = (
        by_hand.make_model(ClippedAdam(0.1, **arguments), run_eagerly=True)
        for _ in range(2)
    )
    y, cut = Y.copy(), 3 * BATCH
    y[2 * BATCH : 5 * BATCH] *= 1e3
    fit(whole, X, y)
    fit(model, X[:cut], y[:cut])
    model.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    assert model.optimizer.skipped_steps == 1
    fit(model, X[cut:], y[cut:])
    assert model.optimizer.skipped_steps == 2
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 4
    actual = model.get_weights() + stored(model.optimizer)
    assert_same(actual, whole.get_weights() + stored(whole.optimizer), **CLOSE)


@pytest.mark.parametrize("schedule", [FALLING, Halves(1.0)], ids=["Keras's", "own"])
def test_a_config_keeps_the_skip_arguments_and_the_schedule(schedule):
    optimizer = ClippedAdam(**SKIP | {"max_norm": schedule}, max_skips=3)
    config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
    loaded = keras.optimizers.deserialize(config)
    assert (loaded.skip, loaded.max_skips, loaded.skipped_steps) == (True, 3, 0)
    assert type(loaded.max_norm) is type(schedule)
    assert loaded.max_norm.get_config() == schedule.get_config()
    default = ClippedAdam().get_config()
    assert (default["skip"], default["max_skips"]) == (False, 10)
    assert "skip" not in keras_normopt.NormalizedAdam().get_config()


WRONG = [{"scope": s} for s in ("variable", "unit", "layer")]
WRONG += [{"apply_to": "update"}, {"norm": None}]
WRONG += [{"skip": value} for value in (1, "yes", None)]
WRONG += [{"max_skips": value} for value in (0, -1, 1.5, True, None)]
ADAM = {"class_name": "Adam", "config": {}}
WRONG += [{"max_norm": value} for value in (schedules.CosineDecay, len, ADAM)]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_errors_name_wrong_arguments_of_skipping(wrong):
    [(name, value)] = wrong.items()
    received = f"{name}=" if name == "max_norm" else f"{name}={value!r}$"
    with pytest.raises(ValueError, match=f"^`.*Received: {received}"):
        ClippedSGD(**SKIP | wrong)


def test_the_skip_arguments_are_fixed_and_need_the_global_scope():
    with pytest.raises(ValueError, match=r"needs `scope=.global.`\. Received: scope"):
        ClippedSGD(skip=True)
    optimizer = ClippedSGD(scope="global")
    with pytest.raises(AttributeError, match=r"ClippedSGD skips no.*`skip=True`"):
        _ = optimizer.skipped_steps
    for name, value in (("skip", True), ("max_skips", 3)):
        with pytest.raises(AttributeError, match=f"`{name}` of .* cannot change"):
            setattr(optimizer, name, value)


def test_a_schedule_is_fixed_once_the_optimizer_is_built():
    for first, value in ((2.0, FALLING), (FALLING, 2.0), (FALLING, Halves(1.0))):
        optimizer = ClippedSGD(max_norm=value)
        optimizer.max_norm = first  # This is allowed before `build`.
        optimizer.build([keras.Variable(np.zeros(2))])
        with pytest.raises(
            ValueError, match=r"`max_norm` .*cannot change after.*Make a new"
        ):
            optimizer.max_norm = value
        assert optimizer.max_norm is first
