"""Tests learning rates that depend on path patterns.

One stock optimizer for each variable gives the expected weights.
"""

import inspect
import json
import re

import keras
import numpy as np
import pytest
from keras import ops
from keras.optimizers import Adafactor, Adam, Ftrl, Lion, Muon, schedules

import keras_normopt
from helpers import by_hand
from keras_normopt import GradientCorrelation, NormalizedAdam, NormalizedSGD, WeightNorm

BACKEND = keras.backend.backend()
IS_OLDEST = keras.version() == "3.12.0"
ENCODER, BIAS, HEAD, OFFSET = "encoder/kernel", "encoder/bias", "head/kernel", "offset"
SHAPES = {ENCODER: (3, 4), BIAS: (4,), HEAD: (4, 2), OFFSET: (2,)}
PATTERNS = {"^encoder/": 0.25, "head/": 4}
FACTORS = dict(zip(SHAPES, [0.25, 0.25, 4.0, 1.0], strict=True))
RATE, DECAY = 0.01, {"weight_decay": 0.5}
FOREACH = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Lion"]
RNG = np.random.default_rng(0)
START = {p: RNG.normal(size=s).astype("float32") for p, s in SHAPES.items()}
STEPS = [{p: RNG.normal(size=s) for p, s in SHAPES.items()} for _ in range(3)]


class Sign(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        learning_rate = ops.cast(learning_rate, variable.dtype)
        self.assign_sub(variable, ops.sign(gradient) * learning_rate)


NAMES = [cls.__name__ for cls in keras_normopt.optimizers.NORMALIZED.values()]
BASES = [getattr(keras.optimizers, n.removeprefix("Normalized")) for n in NAMES]
BASES += [Sign]


def make_variables(dtype="float32"):
    variables = []
    for path, value in START.items():
        layer, _, name = path.rpartition("/")
        with keras.name_scope(layer):
            variables.append(keras.Variable(value, dtype=dtype, name=name))
    return variables


def values(variables):
    return {v.path: ops.convert_to_numpy(ops.cast(v, "float32")) for v in variables}


def apply(optimizer, steps=STEPS, variables=None):
    variables = make_variables() if variables is None else variables
    for step in steps:
        tensors = [ops.convert_to_tensor(step[v.path], v.dtype) for v in variables]
        optimizer.apply(tensors, variables)
    return values(variables)


def stock(base, steps=STEPS, factors=FACTORS, dtype="float32", **arguments):
    """Returns the values after training each variable with its own stock optimizer."""
    result = {}
    for variable in make_variables(dtype):
        optimizer = base(RATE * factors[variable.path], **arguments)
        result |= apply(optimizer, steps, [variable])
    return result


def assert_same(actual, expected, rtol=1e-6, atol=5e-7):
    by_hand.assert_same(actual.values(), expected.values(), rtol, atol)


def arguments_of(base):
    if base is Muon and IS_OLDEST and BACKEND == "tensorflow":
        pytest.skip("Muon of Keras 3.12.0 fails on TensorFlow")
    arguments = DECAY | ({"relative_step": False} if base is Adafactor else {})
    if "adam_weight_decay" in inspect.signature(base).parameters:
        arguments |= {"adam_weight_decay": 0.5}
    return arguments


HALF = [(b, d) for b in (Sign, Adam, Lion) for d in ("float16", "bfloat16")]


@pytest.mark.parametrize(("base", "dtype"), [*((b, "float32") for b in BASES), *HALF])
def test_every_base_equals_one_stock_optimizer_per_variable(base, dtype):
    arguments = arguments_of(base)
    rtol = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    if dtype == "float16" and base is Adam:
        arguments |= {"epsilon": 1e-3}
    cls = keras_normopt.normalized(base)
    optimizer = cls(RATE, norm=None, exclude="head", step_size=PATTERNS, **arguments)
    actual = apply(optimizer, variables=make_variables(dtype))
    assert_same(actual, stock(base, dtype=dtype, **arguments), rtol)


@pytest.mark.parametrize(
    ("step_size", "factors"),
    [
        ([PATTERNS, {"kernel": 0.5}], [0.125, 0.25, 2.0, 1.0]),
        ([{"bias": 2.0, "^encoder/": 0.25, ".*": 0.5}], [0.25, 2.0, 0.5, 0.5]),
        ([{".*": 2}, {".*": 0}, PATTERNS], [0.0] * 4),
        ({}, [1.0] * 4),
    ],
)
def test_factors_of_a_list_are_multiplied_and_first_matches_apply(step_size, factors):
    optimizer = NormalizedAdam(RATE, norm=None, step_size=step_size, **DECAY)
    factors = dict(zip(SHAPES, factors, strict=True))
    assert_same(apply(optimizer), stock(Adam, factors=factors, **DECAY))


UPDATE = {"apply_to": "update", "exclude": "bias"} | DECAY


@pytest.mark.parametrize(
    ("name", "arguments", "steps"),
    [
        ("OrthogonalSGD", DECAY, 3),
        ("ClippedAdam", UPDATE, 3),
        ("NormalizedAdam", {"scope": "unit"} | UPDATE, 3),
        # The steps of Adafactor depend on the weights. The rate is only a bound.
        ("NormalizedAdafactor", {}, 1),
    ],
)
def test_patterns_multiply_the_finished_update(name, arguments, steps):
    cls, weights, variables = getattr(keras_normopt, name), START, make_variables()
    plain = cls(0.1, **arguments | {"weight_decay": None})
    for step in STEPS[:steps]:
        old, new = values(variables), apply(plain, [step], variables)
        kept = {
            p: 1 - 0.1 * f * arguments.get("weight_decay", 0)
            for p, f in FACTORS.items()
        }
        weights = {
            p: kept[p] * w + FACTORS[p] * (new[p] - old[p]) for p, w in weights.items()
        }
    optimizer = cls(0.1, step_size=PATTERNS, **arguments)
    assert_same(apply(optimizer, STEPS[:steps]), weights, rtol=1e-5, atol=1e-5)


def rescaled(step, scope):
    """Divides gradients by an l2 norm, or clips them at 2. Leaves out the bias."""
    norms = {p: np.linalg.norm(g.ravel()) for p, g in step.items() if p != BIAS}
    if scope == "global":
        norms = dict.fromkeys(norms, np.linalg.norm([*norms.values()]))
    if scope == "clip":
        norms = {p: max(1.0, n / 2) for p, n in norms.items()}
    return {p: g / norms.get(p, 1.0) for p, g in step.items()}


@pytest.mark.parametrize("scope", ["layer", "global", "clip"])
def test_rescaled_gradients_use_the_rates_of_patterns(scope):
    arguments = {"exclude": "bias", "step_size": PATTERNS, "momentum": 0.9} | DECAY
    if scope == "clip":
        optimizer = keras_normopt.ClippedSGD(RATE, max_norm=2.0, **arguments)
    else:
        optimizer = NormalizedSGD(RATE, scope=scope, **arguments)
    steps = [rescaled(step, scope) for step in STEPS]
    expected = stock(keras.optimizers.SGD, steps, momentum=0.9, **DECAY)
    assert_same(apply(optimizer), expected)


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
@pytest.mark.parametrize("other", ["weight_norm", GradientCorrelation(0.5)])
def test_a_list_multiplies_patterns_and_an_adaptive_rate(other, apply_to):
    step_size = [PATTERNS, other] if apply_to == "update" else [other, PATTERNS]
    optimizer = NormalizedSGD(
        0.1, norm=None, exclude="bias", apply_to=apply_to, step_size=step_size
    )
    expected = {}
    for p, w in START.items():
        adapted, before = 1.0, np.zeros(SHAPES[p])
        for g in [step[p] for step in STEPS]:
            if other == "weight_norm":
                adapted = np.linalg.norm(w)
            else:
                norms = np.linalg.norm(g) * np.linalg.norm(before)
                adapted *= 1 + 0.5 * np.sum(g * before) / (norms or 1.0)
            w, before = w - 0.1 * FACTORS[p] * (1 if p == BIAS else adapted) * g, g
        expected[p] = w
    assert_same(apply(optimizer), expected, rtol=1e-5, atol=1e-6)


def schedule():
    return schedules.PiecewiseConstantDecay([0, 1], [2.0, 0.0, 0.5])


@pytest.mark.parametrize("batches", [1, 2])
def test_schedules_count_optimizer_steps(batches):
    step_size = [PATTERNS, {"kernel": schedule()}]
    optimizer = NormalizedAdam(RATE, norm=None, step_size=step_size, **DECAY)
    optimizer.gradient_accumulation_steps = batches if batches > 1 else None
    actual = apply(optimizer, [step for step in STEPS for _ in range(batches)])
    variables = make_variables()
    for v in variables:
        plain = Adam(**DECAY)
        for step, factor in zip(STEPS, [2.0, 0.0, 0.5], strict=True):
            factor = factor if "kernel" in v.path else 1.0
            plain.learning_rate = RATE * FACTORS[v.path] * factor
            apply(plain, [step], [v])
    assert_same(actual, values(variables))


@pytest.mark.parametrize("case", ["compiled", "eager", "accumulated", "scaled"])
def test_fit_multiplies_rates_by_pattern(case):
    batches = 2 if case == "accumulated" else None
    arguments = {"gradient_accumulation_steps": batches, "norm": None}
    step_size = {"kernel": schedule(), "bias": 0.25}
    optimizer = NormalizedSGD(0.1, step_size=step_size, **arguments)
    if case == "scaled":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
    model = by_hand.make_model(optimizer, run_eagerly=case == "eager")
    by_hand.fit(model)
    kernel_factors = iter([2.0, 0.0, *[0.5] * 9])

    def step(i, gradient):
        return 0.1 * (0.25 if i else next(kernel_factors)) * gradient

    expected = by_hand.descend(by_hand.EPOCHS, step, batches or 1)
    by_hand.assert_same(model.get_weights(), expected)


@pytest.mark.parametrize("base", [base for base in BASES if base is not Ftrl])
def test_a_factor_of_0_keeps_weights_exactly_and_updates_slots(base):
    arguments, cls = arguments_of(base), keras_normopt.normalized(base)
    optimizer = cls(RATE, step_size={"^encoder/": 0}, **arguments)
    for path, value in apply(optimizer).items():
        # ScheduleFreeAdamW computes weights from its slots, with rounding errors.
        error = 1e-6 if base.__name__ == "ScheduleFreeAdamW" else 0
        moves = not np.allclose(value, START[path], 0, error)
        assert moves == (not path.startswith("encoder/"))
    if base is Adam:
        plain = cls(RATE, **arguments)
        apply(plain)
        for slot, expected in zip(optimizer.variables, plain.variables, strict=True):
            np.testing.assert_array_equal(*map(ops.convert_to_numpy, (slot, expected)))


def test_a_negative_value_of_a_schedule_counts_as_0():
    schedule = schedules.PiecewiseConstantDecay([1], [1.0, -1.0])
    optimizer = NormalizedSGD(RATE, norm=None, step_size={"": schedule})
    variable = keras.Variable([1.0])
    for _ in range(3):
        optimizer.apply([keras.ops.ones((1,))], [variable])
    # At the boundary, the schedule still gives the first value.
    np.testing.assert_allclose(variable.numpy(), [1.0 - 2 * RATE], rtol=1e-6)


def test_changing_the_returned_step_size_does_not_change_the_optimizer():
    optimizer = NormalizedSGD(RATE, step_size=[{"head": 0.5}, "weight_norm"])
    optimizer.step_size[0]["head"] = 7.0
    optimizer.step_size.append({"encoder": 3.0})
    assert optimizer.step_size[0] == {"head": 0.5}
    assert len(optimizer.step_size) == 2


def test_a_product_of_factors_that_overflows_is_refused():
    optimizer = NormalizedAdam(RATE, step_size=[{"head": 1e38}, {"head": 1e38}])
    with pytest.raises(ValueError, match=r"step_size of .*head.* in the range of fl"):
        optimizer.build(make_variables())


@pytest.mark.parametrize("missing", ["__hash__", "get_config"])
def test_a_schedule_needs_neither_a_hash_nor_a_config(missing):
    class Constant(schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.25

        if missing == "__hash__":
            __hash__ = None

            def get_config(self):
                return {}

    step_size = {"^encoder": Constant(), "head": 4.0}
    optimizer = NormalizedAdam(RATE, norm=None, step_size=step_size, **DECAY)
    assert_same(apply(optimizer), stock(Adam, **DECAY))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's sparse gradients")
@pytest.mark.parametrize("base", ["SGD", "Adam", "Adagrad"])
def test_patterns_multiply_the_rate_of_sparse_gradients(base):
    import tensorflow as tf

    rows = tf.constant([[3.0, 1.0], [2.0, 4.0], [-1.0, 8.0]])
    slices = tf.IndexedSlices(rows, tf.constant([1, 3, 1]), tf.constant([4, 2]))
    variable, expected = (make_variables()[2] for _ in range(2))
    cls = getattr(keras_normopt, f"Normalized{base}")
    optimizer = cls(RATE, norm=None, step_size={"head": schedule()})
    plain = getattr(keras.optimizers, base)()
    for factor in (2.0, 0.0, 0.5):
        optimizer.apply([slices], [variable])
        plain.learning_rate = RATE * factor
        plain.apply([slices], [expected])
    np.testing.assert_allclose(variable.numpy(), expected.numpy(), rtol=1e-6)


@pytest.mark.nightly
def test_replicas_multiply_rates_by_pattern(strategy):
    def train():
        optimizer = NormalizedSGD(0.1, 0.9, step_size={"kernel": 0.25}, **DECAY)
        model = by_hand.make_model(optimizer, jit_compile=False)
        by_hand.fit(model)
        return model.get_weights()

    with strategy.scope():
        on_two = train()
    by_hand.assert_same(on_two, train())


@pytest.mark.parametrize(
    ("step_size", "message"),
    [
        ([PATTERNS, {"decoder": 0.1}], "`step_size`: the pattern 'decoder' matches no"),
        ({"kernel": 2, "head/": 4}, "'head/' has no effect.*first.*'head/kernel'"),
    ],
)
def test_patterns_without_an_effect_cause_a_warning(step_size, message):
    optimizer = NormalizedSGD(step_size=step_size)
    with pytest.warns(UserWarning, match=message) as warned:
        optimizer.build(make_variables())
    assert [warning.filename for warning in warned] == [__file__]


class Together(keras.optimizers.SGD):
    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        pass


FLOATS = (-0.1, np.nan, np.inf, 1e39, "2", True, None, [0.1])
LISTS = [], [PATTERNS, WeightNorm(), "gradient_correlation"], [[PATTERNS]]


@pytest.mark.parametrize(
    ("base", "step_size", "error", "message"),
    [
        *((Adam, {"head": f}, ValueError, "factors") for f in FLOATS),
        *((Adam, {k: 0.1}, TypeError, "keys") for k in (1, re.compile("head"))),
        (Adam, {"(": 0.1}, ValueError, "keys"),
        *((Adam, step_size, ValueError, "`step_size`") for step_size in LISTS),
        (Ftrl, [PATTERNS, {"head": 0}], ValueError, "Ftrl divides by"),
        (Together, PATTERNS, ValueError, "Together updates all"),
        (Adafactor, [PATTERNS, "weight_norm"], ValueError, "sets the size"),
    ],
)
def test_wrong_factors_and_patterns_are_refused(base, step_size, error, message):
    with pytest.raises(error, match=f"{message}.*step_size="):
        keras_normopt.normalized(base)(step_size=step_size)


@pytest.mark.parametrize(
    "step_size",
    [
        {"head/": 4, "^encoder/k": 0, ".*": schedule()},
        [{"head/": schedule()}, WeightNorm(0.5), {"kernel": np.float32(0.1)}],
    ],
)
def test_a_config_keeps_patterns_in_their_order(step_size):
    optimizer = NormalizedAdam(RATE, step_size=step_size)
    config = json.dumps(keras.optimizers.serialize(optimizer), sort_keys=True)
    loaded = keras.optimizers.deserialize(json.loads(config))
    assert loaded.get_config() == optimizer.get_config()
    assert_same(apply(loaded), apply(optimizer), 0, 0)


def make_model(step_size):
    layers = [keras.layers.Dense(4, name="body"), keras.layers.Dense(4, name="head")]
    model = keras.Sequential([keras.Input((3,)), *layers], name="encoder")
    model.compile(NormalizedAdam(0.1, step_size=step_size, **DECAY), "mse")
    return model


def test_a_loaded_model_keeps_and_describes_the_matched_rates(tmp_path):
    step_size = [{"/body/": 0, "kernel": schedule()}, {"^encoder": 0.5}]
    model, file = make_model(step_size), tmp_path / "model.keras"
    assert model.weights[0].path == "encoder/body/kernel"
    by_hand.fit(model, epochs=1)
    model.save(file)
    keras.models.load_model(file).save(file)  # Keras drops the name of the model.
    loaded = keras.models.load_model(file)
    before = loaded.get_weights()
    rates = [row.rate for row in keras_normopt.describe(loaded)]
    assert rates == ["0", "0", "0.5 · PiecewiseConstantDecay", "0.5"]
    by_hand.fit(loaded)
    by_hand.fit(model)
    by_hand.assert_same(loaded.get_weights(), model.get_weights(), 1e-6, 1e-7)
    for i, (old, new) in enumerate(zip(before, loaded.get_weights(), strict=True)):
        assert np.array_equal(old, new) == (i < 2)


@pytest.mark.skipif(BACKEND != "torch", reason="needs foreach of PyTorch")
@pytest.mark.parametrize("base", FOREACH)
def test_variables_with_the_same_factor_are_updated_together(base, monkeypatch):
    cls = getattr(keras_normopt, f"Normalized{base}")
    optimizer = cls(RATE, step_size=PATTERNS | {"offset": 0.25})
    keras_classes = [c for c in cls.__mro__ if c.__module__.startswith("keras.")]
    owner = next(c for c in keras_classes if "_parallel_update_step" in vars(c))
    update, calls = owner._parallel_update_step, []

    def spy(self, grads, variables, learning_rate):
        calls.append(([v.path for v in variables], float(learning_rate)))
        update(self, grads, variables, learning_rate)

    monkeypatch.setattr(owner, "_parallel_update_step", spy)
    monkeypatch.setattr(getattr(keras.optimizers, base), "update_step", None)
    apply(optimizer, STEPS[:1])
    rates = [pytest.approx(RATE * factor) for factor in (0.25, 4)]
    assert calls == [([ENCODER, BIAS, OFFSET], rates[0]), ([HEAD], rates[1])]


@pytest.mark.skipif(
    BACKEND != "torch" or IS_OLDEST, reason="needs PyTorch, and Keras above 3.12.0"
)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_pytorch_compiles_a_whole_step_once():
    import torch._dynamo.testing as dynamo

    step_size, variables = [PATTERNS, {"kernel": schedule()}], make_variables()
    optimizer = NormalizedSGD(RATE, 0.9, norm=None, step_size=step_size)
    optimizer.build(variables)
    counter, torch = dynamo.CompileCounter(), dynamo.torch
    optimizer.apply = torch.compile(optimizer.apply, backend=counter, fullgraph=True)
    with torch.no_grad():
        actual = apply(optimizer, variables=variables)
    expected = apply(NormalizedSGD(RATE, 0.9, norm=None, step_size=step_size))
    np.testing.assert_allclose(actual[HEAD], expected[HEAD], 1e-5)
    assert counter.frame_count == 1
