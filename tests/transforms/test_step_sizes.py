"""Compares adaptive learning rates with their rules in NumPy."""

import inspect
import json

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import by_hand, oracle
from helpers.variables import LAYERS, SHAPES, as_numpy, make_gradients, make_variables
from keras_normopt.step_sizes import GradientCorrelation, WeightNorm

BACKEND = keras.backend.backend()
OWN_SCALE = ("NormalizedLamb", "NormalizedFtrl", "NormalizedAdafactor")
CLASSES = [
    cls
    for cls in keras_normopt.optimizers.NORMALIZED.values()
    if cls.__name__ not in OWN_SCALE
]


def make_weights(seed=1):
    rng = np.random.default_rng(seed)
    weights = {path: rng.normal(size=shape) for path, shape in SHAPES.items()}
    return weights | {"b/bias": np.zeros(SHAPES["b/bias"])}


def train(optimizer, steps, weights):
    variables = make_variables()
    for variable, value in zip(variables, weights.values(), strict=True):
        variable.assign(value)
    for gradients in steps:
        tensors = [ops.convert_to_tensor(g, "float32") for g in gradients.values()]
        optimizer.apply(tensors, variables)
    return {p: as_numpy(v) for p, v in zip(SHAPES, variables, strict=True)}


def norm_or_1(*arrays):
    """Returns the l2 norm of all entries, or 1 if it is 0."""
    return np.sqrt(sum(np.sum(a**2) for a in arrays)) or 1.0


def factors(scope, weights):
    if scope == "global":
        return dict.fromkeys(weights, norm_or_1(*weights.values()))
    if scope == "layer":
        return {p: norm_or_1(*(weights[q] for q in b)) for b in LAYERS for p in b}
    if scope == "unit":
        return {
            p: np.array([norm_or_1(u) for u in np.moveaxis(w, -1, 0)])
            if w.ndim > 1
            else norm_or_1(w)
            for p, w in weights.items()
        }
    return {path: norm_or_1(w) for path, w in weights.items()}


@pytest.mark.parametrize("exclude", [(), "bias$"])
@pytest.mark.parametrize("scope", ["variable", "unit", "layer", "global"])
def test_weight_norm_multiplies_steps_by_the_norm_of_the_weights(scope, exclude):
    weights, gradients = make_weights(), make_gradients()
    optimizer = keras_normopt.NormalizedSGD(
        0.5, norm=None, scope=scope, exclude=exclude, step_size="weight_norm"
    )
    actual = train(optimizer, [gradients], weights)
    included = {p: w for p, w in weights.items() if not (exclude and "bias" in p)}
    if scope == "layer" and exclude:
        factor_by_path = {p: norm_or_1(included[p]) for p in included}
    else:
        factor_by_path = factors(scope, included)
    for path, weight in weights.items():
        expected = weight - 0.5 * factor_by_path.get(path, 1.0) * gradients[path]
        np.testing.assert_allclose(
            actual[path], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()
        )


def test_weight_norm_with_a_coefficient_and_momentum_equals_lars():
    # The loop below applies the rule of the paper, without weight decay. The velocity
    # contains the factor.
    weights, velocity = make_weights(), 0
    optimizer = keras_normopt.NormalizedSGD(
        0.5, 0.9, step_size=WeightNorm(0.25), norm_epsilon=0
    )
    steps = [make_gradients(seed=s) for s in range(3)]
    actual = train(optimizer, steps, weights)
    path, w = "a/kernel", make_weights()["a/kernel"]
    for gradients in steps:
        g = gradients[path]
        velocity = 0.9 * velocity - 0.5 * 0.25 * norm_or_1(w) / norm_or_1(g) * g
        w = w + velocity
    np.testing.assert_allclose(actual[path], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.every_base
def test_weight_norm_multiplies_the_step_of_every_base(cls):
    # If the factor multiplied the gradient, the steps of Adam would stay the same.
    weights, gradients = make_weights(), make_gradients()
    decay = {"weight_decay": 0.0}  # Weight decay is not part of the step.
    # Recent versions of Muon have a second weight decay.
    if "adam_weight_decay" in inspect.signature(cls).parameters:
        decay["adam_weight_decay"] = 0.0
    plain = train(cls(1e-2, **decay), [gradients], weights)
    scaled = train(cls(1e-2, step_size=WeightNorm(3.0), **decay), [gradients], weights)
    for path, w in weights.items():
        factor = 3 * norm_or_1(w) if w.any() else 1.0
        np.testing.assert_allclose(
            scaled[path] - w, factor * (plain[path] - w), rtol=1e-3, atol=2e-6
        )


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("step_size", [WeightNorm(1.0), GradientCorrelation()])
@pytest.mark.every_base
def test_a_factor_of_1_gives_the_steps_of_the_base(cls, step_size):
    # The second gradient is 0, so its cosine with the first one is 0, too.
    weights = {path: np.zeros(shape) for path, shape in SHAPES.items()}
    first = make_gradients()
    steps = [first, {path: np.zeros(shape) for path, shape in SHAPES.items()}]
    if isinstance(step_size, WeightNorm):
        steps = [first]  # Weights of 0 have a factor of 1.
    with_factor = train(cls(0.01, step_size=step_size), steps, weights)
    without = train(cls(0.01), steps, weights)
    for path in weights:
        np.testing.assert_allclose(
            with_factor[path], without[path], rtol=1e-5, atol=1e-7
        )


def test_gradient_correlation_follows_the_cosine_of_successive_gradients():
    steps = [
        make_gradients(1.0),
        make_gradients(1e-30),  # The same direction, but much smaller.
        make_gradients(-1e25),
        make_gradients(1.0, seed=3),
    ]
    rate, smallest, largest = 0.5, 0.7, 1.4
    optimizer = keras_normopt.NormalizedSGD(
        0.1,
        norm_epsilon=0,
        step_size=GradientCorrelation(rate, minimum=smallest, maximum=largest),
    )
    weights = make_weights()
    actual = train(optimizer, steps, weights)
    for path, weight in weights.items():
        w, factor, before = weight, 1.0, np.zeros(SHAPES[path])
        for gradients in steps:
            g = gradients[path]
            cosine = np.sum((g / norm_or_1(g)) * (before / norm_or_1(before)))
            factor = np.clip(factor * (1 + rate * cosine), smallest, largest)
            w, before = w - 0.1 * factor * g / norm_or_1(g), g
        np.testing.assert_allclose(actual[path], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step_size", ["gradient_correlation", "weight_norm"])
def test_fit_gives_variables_of_equal_shapes_their_own_step_sizes(step_size):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(4, use_bias=False) for _ in range(2)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    x = np.ones((1, 4), "float32")
    before = [w.copy() for w in model.get_weights()]
    model.compile(keras_normopt.NormalizedSGD(0.1, step_size=step_size), loss="mse")
    model.fit(x, np.full((1, 4), 100.0), verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        expected = 0.1 * (norm_or_1(old) if step_size == "weight_norm" else 1.0)
        assert norm_or_1(new - old) == pytest.approx(expected, rel=1e-4)


# Tests above check the rule on all backends. Eager steps take ten times as long on JAX
# and TensorFlow as on PyTorch.
@pytest.mark.skipif(BACKEND != "torch", reason="a thousand steps of one rule")
def test_correlation_factors_grow_if_gradients_agree_and_shrink_under_noise():
    def factors(steps, rate, noise):
        rng = np.random.default_rng(0)
        optimizer = keras_normopt.NormalizedSGD(
            rate, step_size=GradientCorrelation(rate=0.05)
        )
        w = keras.Variable(np.ones(20))
        for _ in range(steps):
            gradient = ops.convert_to_numpy(w) + noise * rng.normal(size=20)
            optimizer.apply([ops.convert_to_tensor(gradient, "float32")], [w])
            yield float(ops.convert_to_numpy(optimizer._own_variables["step_size_0"]))

    *_, last = factors(200, rate=1e-4, noise=0.0)
    assert last == 100.0
    # docs/options.md gives these values. Its 3,000 steps would take too long here.
    under_noise = list(factors(1001, rate=0.5, noise=1.0))
    assert under_noise[500] == pytest.approx(0.547, abs=0.01)
    assert under_noise[1000] == pytest.approx(0.318, abs=0.01)


def test_weight_norm_multiplies_the_rate_of_a_schedule():
    weights = {path: np.ones(shape) for path, shape in SHAPES.items()}
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.125])
    optimizer = keras_normopt.NormalizedSGD(schedule, step_size=WeightNorm())
    gradients = {path: np.ones(shape) for path, shape in SHAPES.items()}
    actual = train(optimizer, [gradients] * 3, weights)
    w = 1.0
    for rate in (0.5, 0.5, 0.125):
        w -= rate * abs(w)
    np.testing.assert_allclose(actual["offset"], w, rtol=1e-5)


@pytest.mark.parametrize(
    ("base", "step_size"), [("SGD", "weight_norm"), ("Adam", "gradient_correlation")]
)
def test_training_with_a_step_size_continues_from_a_file(base, step_size, tmp_path):
    def make():
        cls = getattr(keras_normopt, f"Normalized{base}")
        return by_hand.make_model(cls(0.05, step_size=step_size, track_norms=True))

    model, uninterrupted = make(), make()
    by_hand.fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    config = loaded.optimizer.step_size.get_config()
    assert config == model.optimizer.step_size.get_config()
    by_hand.fit(loaded)
    by_hand.fit(uninterrupted, epochs=2 * by_hand.EPOCHS)
    for actual, expected in zip(
        [*loaded.weights, *loaded.optimizer.variables],
        [*uninterrupted.weights, *uninterrupted.optimizer.variables],
        strict=True,
    ):
        if "mean" not in actual.path and "count" not in actual.path:
            np.testing.assert_allclose(
                ops.convert_to_numpy(actual),
                ops.convert_to_numpy(expected),
                rtol=1e-5,
                atol=1e-6,
            )


@pytest.mark.parametrize("with_options", [True, False])
def test_slots_load_into_an_optimizer_with_other_options(with_options, tmp_path):
    options = {"step_size": "gradient_correlation", "track_norms": True}
    first, second = (options, {}) if with_options else ({}, options)
    model = by_hand.make_model(keras_normopt.NormalizedAdam(**first))
    by_hand.fit(model)
    model.save_weights(tmp_path / "model.weights.h5")
    other = by_hand.make_model(keras_normopt.NormalizedAdam(**second))
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    slots = 2 + 2 * len(model.trainable_variables)
    pairs = zip(
        model.optimizer.variables[:slots],
        other.optimizer.variables[:slots],
        strict=True,
    )
    for saved, loaded in pairs:
        np.testing.assert_array_equal(
            ops.convert_to_numpy(saved), ops.convert_to_numpy(loaded)
        )
    assert int(ops.convert_to_numpy(other.optimizer.iterations)) > 0


def test_a_config_keeps_the_step_size():
    optimizer = keras_normopt.NormalizedAdam(step_size=WeightNorm(0.5))
    config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
    loaded = keras.optimizers.deserialize(config)
    assert isinstance(loaded.step_size, WeightNorm)
    assert loaded.step_size.coefficient == 0.5
    assert keras_normopt.NormalizedAdam().get_config()["step_size"] is None


@pytest.mark.parametrize(
    "step_size",
    [
        "lars",
        5,
        WeightNorm,
        {"name": "weight_norm", "config": {"coefficient": "1"}},
        {"name": "weight_norm", "config": {"other": 1.0}},
        {"name": "eval", "config": {}},
        {"class_name": "WeightNorm", "module": "os", "config": {}},
        ["lars"],
        [],
        [None],
        ["weight_norm", GradientCorrelation()],
    ],
    ids=repr,
)
def test_an_invalid_step_size_is_refused(step_size):
    with pytest.raises(ValueError, match="step_size="):
        keras_normopt.NormalizedSGD(step_size=step_size)


@pytest.mark.parametrize(
    ("cls", "argument", "value"),
    [
        (WeightNorm, "coefficient", 0),
        (WeightNorm, "coefficient", np.nan),
        (WeightNorm, "coefficient", None),
        (GradientCorrelation, "rate", 1.0),
        (GradientCorrelation, "rate", -0.1),
        (GradientCorrelation, "minimum", 0.0),
        (GradientCorrelation, "minimum", 1.5),
        (GradientCorrelation, "maximum", 0.5),
        (GradientCorrelation, "maximum", np.inf),
        (GradientCorrelation, "maximum", "2"),
    ],
)
def test_errors_name_wrong_arguments_of_step_sizes(cls, argument, value):
    with pytest.raises(ValueError, match=f"`{argument}` must be.*{argument}="):
        cls(**{argument: value})


def test_weight_norm_refuses_bases_that_set_their_own_step_size():
    for name in OWN_SCALE:
        with pytest.raises(ValueError, match=f"{name} sets the size of its steps"):
            getattr(keras_normopt, name)(step_size="weight_norm")

    class Together(keras.optimizers.SGD):
        def _backend_update_step(self, grads, trainable_variables, learning_rate):
            pass

    with pytest.raises(ValueError, match="Together updates all variables together"):
        keras_normopt.normalized(Together)(step_size="weight_norm")
    adafactor = keras_normopt.NormalizedAdafactor(
        relative_step=False, step_size="weight_norm"
    )
    assert adafactor.step_size.coefficient == 1.0


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's sparse gradients")
def test_step_sizes_scale_sparse_gradients_like_dense_ones():
    import tensorflow as tf

    table = np.linspace(-1, 1, 8).reshape(4, 2)
    slices = tf.IndexedSlices(
        tf.constant([[3.0, 0.0], [0.0, 4.0], [0.0, 8.0]]),
        tf.constant([1, 3, 1]),
        tf.constant([4, 2]),
    )
    dense = np.array([[0, 0], [3, 8], [0, 0], [0, 4]])
    for step_size, factor in [
        ("weight_norm", norm_or_1(table)),
        ("gradient_correlation", 1.0),
    ]:
        variable = keras.Variable(table)
        optimizer = keras_normopt.NormalizedSGD(0.5, step_size=step_size)
        optimizer.apply([slices], [variable])
        expected = table - 0.5 * factor * np.float64(oracle.normalize("l2", dense))
        np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5)
    # Each column has its own factor. Keras itself would gather rows of the factors.
    variable = keras.Variable(table)
    optimizer = keras_normopt.NormalizedSGD(
        0.5, norm=None, scope="unit", step_size="weight_norm"
    )
    optimizer.apply([slices], [variable])
    expected = table - 0.5 * np.sqrt(np.square(table).sum(axis=0)) * dense
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5)
