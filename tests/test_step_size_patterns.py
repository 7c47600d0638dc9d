"""Learning rates by patterns of paths, against one stock optimizer per variable."""

import inspect
import json
import re

import keras
import numpy as np
import pytest
from keras import ops
from keras.optimizers.schedules import PiecewiseConstantDecay

import by_hand
import keras_normopt
from keras_normopt import GradientCorrelation, NormalizedAdam, NormalizedSGD, WeightNorm
from stored import stored

BACKEND = keras.backend.backend()
SHAPES = {
    "encoder/kernel": (3, 4),
    "encoder/bias": (4,),
    "head/kernel": (4, 2),
    "offset": (2,),
}
PATTERNS = {"^encoder/": 0.25, "head/": 4}
FACTORS = dict(zip(SHAPES, [0.25, 0.25, 4.0, 1.0], strict=True))
RATE, DECAY = 0.01, 0.5
NAMES = [
    c.__name__.removeprefix("Normalized")
    for c in keras_normopt.optimizers.NORMALIZED.values()
]
BASES = [getattr(keras.optimizers, name) for name in NAMES]
FOREACH = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Lion"]


def make_variables(dtype="float32", shapes=SHAPES):
    rng, variables = np.random.default_rng(1), []
    for path, shape in shapes.items():
        layer, _, name = path.rpartition("/")
        with keras.name_scope(layer):
            value = rng.normal(size=shape)
            variables.append(keras.Variable(value, dtype=dtype, name=name))
    return variables


def gradients(number=3):
    rng = np.random.default_rng(0)
    return [{p: rng.normal(size=s) for p, s in SHAPES.items()} for _ in range(number)]


def as_numpy(value):
    return ops.convert_to_numpy(
        ops.cast(value, "float64" if BACKEND != "jax" else "float32")
    )


def values(variables):
    return {v.path: as_numpy(v) for v in variables}


START = values(make_variables())


def apply(optimizer, steps, dtype="float32"):
    """Returns the variables after steps of one optimizer, by path."""
    variables = make_variables(dtype)
    for of_step in steps:
        tensors = [ops.convert_to_tensor(g, dtype) for g in of_step.values()]
        optimizer.apply(tensors, variables)
    return values(variables)


def apply_one_by_one(make, steps, factors=FACTORS, dtype="float32"):
    """Returns the variables after steps of one optimizer each, by path.

    Args:
        make: Function from a factor to an optimizer.
        steps: List of dicts from paths to gradients.
        factors: Dict from paths to factors.
        dtype: The dtype of the variables.
    """
    variables = make_variables(dtype)
    for variable in variables:
        optimizer = make(factors[variable.path])
        for of_step in steps:
            tensor = ops.convert_to_tensor(of_step[variable.path], dtype)
            optimizer.apply([tensor], [variable])
    return values(variables)


def assert_same(actual, expected, rtol=1e-6, atol=1e-7):
    assert list(actual) == list(expected)
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol, atol, err_msg=path)


def l2(array):
    return np.linalg.norm(np.ravel(array))


def arguments_of(base):
    arguments = {"weight_decay": DECAY}
    if "adam_weight_decay" in inspect.signature(base).parameters:
        arguments["adam_weight_decay"] = DECAY
    if base is keras.optimizers.Adafactor:
        arguments["relative_step"] = False
    return arguments


def skip_muon_where_it_fails(base):
    is_oldest = BACKEND == "tensorflow" and keras.version() == "3.12.0"
    if base is keras.optimizers.Muon and is_oldest:
        pytest.skip("Muon of Keras 3.12.0 fails on TensorFlow")


@pytest.mark.parametrize("base", BASES)
def test_every_base_equals_one_stock_optimizer_per_variable(base):
    skip_muon_where_it_fails(base)
    arguments = arguments_of(base)
    optimizer = keras_normopt.normalized(base)(
        RATE, norm=None, exclude="head", step_size=PATTERNS, **arguments
    )
    expected = apply_one_by_one(lambda f: base(RATE * f, **arguments), gradients())
    assert_same(apply(optimizer, gradients()), expected)


def test_relative_steps_are_multiplied():
    """The learning rate of Adafactor is only a bound by default."""

    def step(factor):
        return keras.optimizers.Adafactor(0.9, weight_decay=None)

    [of_step] = gradients(1)
    stock = apply_one_by_one(step, [of_step])
    optimizer = keras_normopt.NormalizedAdafactor(0.9, norm=None, step_size=PATTERNS)
    expected = {p: w + FACTORS[p] * (stock[p] - w) for p, w in START.items()}
    assert_same(apply(optimizer, [of_step]), expected, rtol=1e-5, atol=1e-6)


def test_a_base_with_its_own_update_step():
    class Sign(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            self.assign_sub(variable, ops.sign(gradient) * learning_rate)

    optimizer = keras_normopt.normalized(Sign)(RATE, norm=None, step_size=PATTERNS)
    [of_step] = gradients(1)
    expected = {
        p: w - RATE * FACTORS[p] * np.sign(of_step[p]) for p, w in START.items()
    }
    assert_same(apply(optimizer, [of_step]), expected)


def norms_of(of_step, scope):
    """The divisor of each gradient. The bias is excluded."""
    if scope == "layer":
        return {p: 1.0 if "bias" in p else l2(g) for p, g in of_step.items()}
    total = np.sqrt(sum(l2(g) ** 2 for p, g in of_step.items() if "bias" not in p))
    return {p: 1.0 if "bias" in p else total for p in of_step}


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
@pytest.mark.parametrize("kind", ["layer", "global", "clipped"])
def test_rescaled_steps_by_hand(kind, apply_to):
    arguments = {"weight_decay": DECAY, "exclude": "bias", "step_size": PATTERNS}
    arguments |= {"apply_to": apply_to}
    if kind == "clipped":
        optimizer = keras_normopt.ClippedSGD(0.1, 0.9, max_norm=2.0, **arguments)
    else:
        optimizer = NormalizedSGD(0.1, 0.9, scope=kind, **arguments)
    weights, velocity = dict(START), dict.fromkeys(START, 0.0)
    for of_step in gradients():
        if apply_to == "update":
            velocity = {p: 0.9 * velocity[p] - 0.1 * g for p, g in of_step.items()}
            of_step = {p: v / 0.1 for p, v in velocity.items()}
        divisors = norms_of(of_step, "layer" if kind == "clipped" else kind)
        if kind == "clipped":
            divisors = {p: max(1.0, d / 2.0) for p, d in divisors.items()}
        rescaled = {p: g / divisors[p] for p, g in of_step.items()}
        for p, f in FACTORS.items():
            kept = weights[p] * (1 - DECAY * 0.1 * f)
            if apply_to == "update":
                weights[p] = kept + 0.1 * f * rescaled[p]
            else:
                velocity[p] = 0.9 * velocity[p] - 0.1 * f * rescaled[p]
                weights[p] = kept + velocity[p]
    assert_same(apply(optimizer, gradients()), weights, rtol=1e-5, atol=1e-6)


def test_orthogonal_steps_scale():
    plain = apply(keras_normopt.OrthogonalSGD(0.1), gradients())
    scaled = apply(keras_normopt.OrthogonalSGD(0.1, step_size=PATTERNS), gradients())
    expected = {p: w + FACTORS[p] * (plain[p] - w) for p, w in START.items()}
    assert_same(scaled, expected, rtol=1e-5, atol=1e-6)


def test_a_skipped_step_decays_nothing():
    optimizer = keras_normopt.ClippedAdam(
        RATE,
        weight_decay=DECAY,
        max_norm=100.0,
        scope="global",
        skip=True,
        step_size=PATTERNS,
    )
    first, second, third = gradients()
    huge = {p: 1e6 * g for p, g in second.items()}
    actual = apply(optimizer, [first, huge, third])
    assert optimizer.skipped_steps == 1
    expected = apply_one_by_one(
        lambda f: keras.optimizers.Adam(RATE * f, weight_decay=DECAY), [first, third]
    )
    assert_same(actual, expected)


@pytest.mark.parametrize(
    ("step_size", "factors"),
    [
        ([PATTERNS, {"kernel": 0.5}], [0.125, 0.25, 2.0, 1.0]),
        ([{"bias": 2.0, "^encoder/": 0.25, ".*": 0.5}], [0.25, 2.0, 0.5, 0.5]),
        ([{".*": 2}, {".*": 0}, PATTERNS], [0.0] * 4),
        ({}, [1.0] * 4),
    ],
)
def test_factors_of_a_list_multiply_and_the_first_match_counts(step_size, factors):
    optimizer = NormalizedAdam(RATE, weight_decay=DECAY, norm=None, step_size=step_size)
    expected = apply_one_by_one(
        lambda f: keras.optimizers.Adam(RATE * f, weight_decay=DECAY),
        gradients(),
        dict(zip(SHAPES, factors, strict=True)),
    )
    assert_same(apply(optimizer, gradients()), expected)


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
@pytest.mark.parametrize(
    "step_size", [[PATTERNS, WeightNorm()], ["weight_norm", PATTERNS]]
)
def test_with_weight_norm(step_size, apply_to):
    optimizer = NormalizedSGD(
        0.1, norm=None, exclude="bias", apply_to=apply_to, step_size=step_size
    )
    weights = dict(START)
    for of_step in gradients():
        for p, w in weights.items():
            factor = FACTORS[p] * (1.0 if "bias" in p else l2(w))
            weights[p] = w - 0.1 * factor * of_step[p]
    assert_same(apply(optimizer, gradients()), weights, rtol=1e-5, atol=1e-6)


def test_with_gradient_correlation():
    optimizer = NormalizedSGD(
        0.1, norm=None, step_size=[PATTERNS, GradientCorrelation(0.5)]
    )
    weights, factors = dict(START), dict(FACTORS)
    before = {p: np.zeros(s) for p, s in SHAPES.items()}
    for of_step in gradients():
        for p, g in of_step.items():
            cosine = np.sum(g * before[p]) / (l2(g) * (l2(before[p]) or 1.0))
            factors[p] *= 1 + 0.5 * cosine
            weights[p] = weights[p] - 0.1 * factors[p] * g
        before = of_step
    assert_same(apply(optimizer, gradients()), weights, rtol=1e-5, atol=1e-6)


def schedule():
    return PiecewiseConstantDecay([0, 2], [2.0, 0.0, 0.5])


@pytest.mark.parametrize("average", [None, 2])
def test_schedules_count_optimizer_steps(average):
    optimizer = NormalizedAdam(
        RATE,
        norm=None,
        weight_decay=DECAY,
        gradient_accumulation_steps=average,
        step_size=[PATTERNS, {"kernel": schedule()}],
    )
    steps = gradients(5)
    actual = apply(optimizer, [s for s in steps for _ in range(average or 1)])
    variables = make_variables()
    for v in variables:
        stock = keras.optimizers.Adam(weight_decay=DECAY)
        for of_step, factor in zip(steps, [2.0, 0.0, 0.0, 0.5, 0.5], strict=True):
            rate = FACTORS[v.path] * (factor if "kernel" in v.path else 1.0)
            stock.learning_rate = RATE * rate
            stock.apply([ops.convert_to_tensor(of_step[v.path], "float32")], [v])
    assert_same(actual, values(variables))


@pytest.mark.parametrize(
    ("average", "eagerly", "scaled"),
    [(1, False, False), (1, True, False), (2, False, False), (1, False, True)],
)
def test_fit(average, eagerly, scaled):
    step_size = {"kernel": schedule(), "bias": 0.25}
    optimizer = NormalizedSGD(
        0.1,
        norm=None,
        step_size=step_size,
        gradient_accumulation_steps=None if average == 1 else average,
    )
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
    model = by_hand.make_model(optimizer, run_eagerly=eagerly)
    by_hand.fit(model, epochs=2)
    of_kernel = iter([2.0, 0.0, 0.0, *[0.5] * 9])

    def step(i, gradient):
        return 0.1 * (0.25 if i else next(of_kernel)) * gradient

    by_hand.assert_same(model.get_weights(), by_hand.descend(2, step, average))


@pytest.mark.parametrize("base", [b for b in BASES if b is not keras.optimizers.Ftrl])
def test_with_0_weights_stay_to_the_bit(base):
    skip_muon_where_it_fails(base)
    optimizer = keras_normopt.normalized(base)(
        RATE, step_size={"^encoder/": 0}, **arguments_of(base)
    )
    after = apply(optimizer, gradients())
    for path, value in after.items():
        if path.startswith("encoder/"):
            np.testing.assert_array_equal(value, START[path])
        else:
            assert not np.any(value == START[path])


def test_with_0_slots_move():
    one, other = NormalizedAdam(RATE), NormalizedAdam(RATE, step_size={".*": 0})
    apply(one, gradients())
    apply(other, gradients())
    for actual, expected in zip(other.variables, one.variables, strict=True):
        np.testing.assert_array_equal(as_numpy(actual), as_numpy(expected))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("base", ["SGD", "Adam", "Lion"])
def test_half_precision(base, dtype):
    cls = getattr(keras.optimizers, base)
    arguments = {"weight_decay": DECAY}
    if base == "Adam":
        arguments["epsilon"] = 1e-3
    optimizer = getattr(keras_normopt, f"Normalized{base}")(
        0.1, norm=None, step_size=PATTERNS, **arguments
    )
    expected = apply_one_by_one(
        lambda f: cls(0.1 * f, **arguments), gradients(), dtype=dtype
    )
    rtol = 2e-3 if dtype == "float16" else 2e-2
    assert_same(apply(optimizer, gradients(), dtype), expected, rtol, atol=rtol)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's sparse gradients")
@pytest.mark.parametrize("base", ["SGD", "Adam", "Adagrad"])
@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_sparse_gradients(base, apply_to):
    import tensorflow as tf

    slices = tf.IndexedSlices(
        tf.constant([[3.0, 1.0], [2.0, 4.0], [-1.0, 8.0]]),
        tf.constant([1, 3, 1]),
        tf.constant([4, 2]),
    )
    [one], [other] = (make_variables(shapes={"head/kernel": (4, 2)}) for _ in "ab")
    optimizer = getattr(keras_normopt, f"Normalized{base}")(
        RATE, norm=None, apply_to=apply_to, step_size={"head": schedule()}
    )
    stock = getattr(keras.optimizers, base)()
    for factor in (2.0, 0.0, 0.0, 0.5):
        optimizer.apply([slices], [one])
        stock.learning_rate = RATE * factor
        stock.apply([slices], [other])
    np.testing.assert_allclose(as_numpy(one), as_numpy(other), rtol=1e-6)


def test_replicas(strategy):
    def train():
        model = by_hand.make_model(
            NormalizedSGD(0.1, 0.9, weight_decay=DECAY, step_size={"kernel": 0.25}),
            jit_compile=False,
        )
        by_hand.fit(model)
        return model.get_weights()

    with strategy.scope():
        on_two = train()
    by_hand.assert_same(on_two, train())


def test_ratios_of_updates_are_multiplied():
    arguments = {"norm": None, "track_norms": "all"}
    one, other = (
        NormalizedSGD(RATE, step_size=s, **arguments) for s in (None, PATTERNS)
    )
    for optimizer in (one, other):
        apply(optimizer, gradients(1))
    for path, factor in FACTORS.items():
        expected = factor * one.update_ratios[path]
        assert other.update_ratios[path] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("step_size", "message"),
    [
        ({"decoder": 0.1}, "`step_size`: the pattern 'decoder' matches none"),
        ([PATTERNS, {"decoder": 0.1}], "`step_size`: the pattern 'decoder' matches"),
        ({"kernel": 2, "head/": 4}, "'head/' has no effect.*'head/kernel'.*first"),
    ],
)
def test_patterns_without_effect_warn(step_size, message):
    optimizer = NormalizedSGD(step_size=step_size)
    with pytest.warns(UserWarning, match=message) as warned:
        optimizer.build(make_variables())
    assert len(warned) == 1
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("step_size", "error"),
    [
        *(({"head": f}, ValueError) for f in (-0.1, np.nan, np.inf, 1e39, "2", True)),
        *(({"head": f}, ValueError) for f in (None, [0.1], lambda step: 0.1)),
        ({1: 0.1}, TypeError),
        ({re.compile("head"): 0.1}, TypeError),
        ({"(": 0.1}, ValueError),
        ([], ValueError),
        ([PATTERNS, WeightNorm(), "gradient_correlation"], ValueError),
        ([PATTERNS, None], ValueError),
        ([[PATTERNS]], ValueError),
    ],
    ids=str,
)
def test_wrong_arguments(step_size, error):
    with pytest.raises(error, match="step_size="):
        NormalizedSGD(step_size=step_size)


def test_bases_that_refuse_factors():
    for step_size in ({"head": 0}, [PATTERNS, {"head": 0.0}]):
        with pytest.raises(ValueError, match=r"Ftrl divides by .*step_size="):
            keras_normopt.NormalizedFtrl(step_size=step_size)

    class Together(keras.optimizers.SGD):
        def _backend_update_step(self, grads, trainable_variables, learning_rate):
            pass

    with pytest.raises(ValueError, match=r"Together updates all .*step_size="):
        keras_normopt.normalized(Together)(step_size=PATTERNS)
    for name in ("Lamb", "Adafactor"):
        with pytest.raises(ValueError, match=r"sets the size of .*step_size="):
            getattr(keras_normopt, f"Normalized{name}")(
                step_size=[PATTERNS, "weight_norm"]
            )


@pytest.mark.parametrize(
    "step_size",
    [
        {"head/": 4, "^encoder/k": 0, ".*": schedule()},
        [{"head/": schedule()}, WeightNorm(0.5), {"kernel": np.float32(0.1)}],
    ],
)
def test_config(step_size):
    optimizer = NormalizedAdam(RATE, step_size=step_size)
    config = json.dumps(keras.optimizers.serialize(optimizer), sort_keys=True)
    loaded = keras.optimizers.deserialize(json.loads(config))
    assert loaded.get_config() == optimizer.get_config()
    assert_same(apply(loaded, gradients()), apply(optimizer, gradients()), 0, 0)


def make_model(name, step_size):
    layers = [keras.layers.Dense(4, name="body"), keras.layers.Dense(4, name="head")]
    inputs = keras.Input((3,))
    if name == "encoder":
        model = keras.Sequential([inputs, *layers], name=name)
    else:
        model = keras.Model(inputs, layers[1](layers[0](inputs)), name=name)
    optimizer = NormalizedAdam(0.1, weight_decay=0.1, step_size=step_size)
    model.compile(optimizer, "mse")
    return model


def test_a_loaded_model_keeps_what_was_matched(tmp_path):
    step_size = [{"^encoder/body": 0, "kernel": schedule()}, {"^encoder": 0.5}]
    model, file = make_model("encoder", step_size), tmp_path / "model.keras"
    by_hand.fit(model, epochs=1)
    model.save(file)
    loaded = keras.models.load_model(file)
    loaded.save(file)  # Under the paths of the first one.
    loaded = keras.models.load_model(file)
    before = loaded.get_weights()
    by_hand.fit(loaded)
    by_hand.fit(model)
    by_hand.assert_same(loaded.get_weights(), model.get_weights(), 1e-6, 1e-7)
    for i, (old, new) in enumerate(zip(before, loaded.get_weights(), strict=True)):
        assert np.array_equal(old, new) == (i < 2)


def test_a_config_for_a_model_of_another_name(tmp_path):
    first = make_model("encoder", {"^encoder/body": 0})
    first.optimizer.build(first.trainable_variables)
    second = make_model("other", None)
    config = json.loads(json.dumps(keras.optimizers.serialize(first.optimizer)))
    second.compile(keras.optimizers.deserialize(config), "mse")
    before = second.get_weights()
    by_hand.fit(second, epochs=1)
    moved = [
        not np.array_equal(old, new)
        for old, new in zip(before, second.get_weights(), strict=True)
    ]
    assert moved == [False, False, True, True]


def test_describe():
    model = make_model(
        "other", [{"body": 0.25, "head/bias": schedule()}, {"kernel": 2}]
    )
    rates = [row.rate for row in keras_normopt.describe(model)]
    assert rates == ["0.5", "0.25", "2", "1 · PiecewiseConstantDecay"]
    rates = [row.rate for row in keras_normopt.describe(make_model("other", None))]
    assert rates == ["1"] * 4


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's foreach")
@pytest.mark.parametrize("base", FOREACH)
def test_variables_of_one_factor_are_updated_together(base, monkeypatch):
    optimizer = getattr(keras_normopt, f"Normalized{base}")(
        RATE, step_size=PATTERNS | {"offset": 0.25}
    )
    [owner, *_] = [
        cls
        for cls in type(optimizer).__mro__
        if cls.__module__.startswith("keras.") and "_parallel_update_step" in vars(cls)
    ]
    stock, calls = owner._parallel_update_step, []

    def spy(self, grads, variables, learning_rate):
        calls.append(([v.path for v in variables], float(learning_rate)))
        stock(self, grads, variables, learning_rate)

    def fail(*args):
        raise AssertionError

    monkeypatch.setattr(owner, "_parallel_update_step", spy)
    monkeypatch.setattr(getattr(keras.optimizers, base), "update_step", fail)
    apply(optimizer, gradients(1))
    kernel, bias, head, offset = SHAPES
    assert calls == [
        ([kernel, bias, offset], pytest.approx(RATE / 4)),
        ([head], pytest.approx(RATE * 4)),
    ]


@pytest.mark.skipif(
    BACKEND != "torch" or keras.version() == "3.12.0", reason="compiles no Adam whole"
)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_pytorch_compiles_a_whole_step_once():
    import torch

    def train(wrap):
        variables = make_variables()
        optimizer = NormalizedAdam(
            RATE, weight_decay=DECAY, step_size=[PATTERNS, {"kernel": schedule()}]
        )
        optimizer.build(variables)
        step = wrap(lambda *tensors: optimizer.apply(list(tensors), variables))
        with torch.no_grad():
            for of_step in gradients(5):
                step(*[ops.convert_to_tensor(g, "float32") for g in of_step.values()])
        return values(variables)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = train(lambda f: torch.compile(f, backend=counter, fullgraph=True))
    assert counter.frame_count == 1
    assert_same(compiled, train(lambda f: f), rtol=1e-5, atol=1e-6)
