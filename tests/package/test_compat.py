"""Tests the interface of 2018, with the cases of its original tests."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.optimizers import SGD, Adam

import keras_normopt
from helpers import oracle
from helpers.stored import stored
from keras_normopt import ClippedOptimizer, NormalizedOptimizer

GRADIENT = np.array([[3.0, -4.0], [0.5, 0.0]], "float32")


def step(optimizer, gradient=GRADIENT):
    variable = keras.Variable(np.zeros_like(gradient))
    optimizer.apply_gradients([(ops.convert_to_tensor(gradient), variable)])
    return -ops.convert_to_numpy(variable)


def test_the_example_of_the_2018_readme_makes_normalized_steps(custom_norms):
    sgd = NormalizedOptimizer(
        SGD(0.01, momentum=0.9, nesterov=True), normalization="l2"
    )

    def dummy(grad):
        return grad / (ops.mean(ops.abs(grad)) + 1e-7)

    NormalizedOptimizer.set_normalization_function("mean", dummy)
    adam = NormalizedOptimizer(Adam(0.001), normalization="mean")

    expected = keras.Variable(np.zeros_like(GRADIENT))
    SGD(0.01, momentum=0.9, nesterov=True).apply(
        [ops.convert_to_tensor(oracle.normalize("l2", GRADIENT).astype("float32"))],
        [expected],
    )
    np.testing.assert_allclose(step(sgd), -ops.convert_to_numpy(expected), rtol=1e-6)

    normalized = GRADIENT / np.mean(np.abs(GRADIENT))
    expected = keras.Variable(np.zeros_like(GRADIENT))
    Adam(0.001).apply([ops.convert_to_tensor(normalized)], [expected])
    np.testing.assert_allclose(step(adam), -ops.convert_to_numpy(expected), rtol=1e-6)
    assert adam.get_config()["norm"] == "mean"


@pytest.mark.parametrize("base", ["SGD", "Adam", "RMSprop", "Nadam"])
@pytest.mark.parametrize("kind", ["instance", "class name", "name", "config"])
def test_every_way_to_name_a_base_gives_its_normalized_class(base, kind):
    given = getattr(keras.optimizers, base)()
    if kind != "instance":
        given = {
            "class name": base,
            "name": base.lower(),
            "config": keras.optimizers.serialize(given),
        }[kind]
    optimizer = NormalizedOptimizer(given, normalization="std")
    assert type(optimizer) is getattr(keras_normopt, f"Normalized{base}")
    assert isinstance(optimizer, NormalizedOptimizer)
    assert issubclass(type(optimizer), NormalizedOptimizer)
    assert optimizer.norm == "std"
    assert not isinstance(SGD(), NormalizedOptimizer)


def test_default_norm_is_l2():
    assert NormalizedOptimizer("sgd").norm == "l2"


def test_hyperparameters_of_the_original_are_kept():
    original = Adam(
        0.125,
        beta_1=0.8,
        weight_decay=0.01,
        clipvalue=2.0,
        use_ema=True,
        ema_momentum=0.9,
        gradient_accumulation_steps=2,
        name="mine",
    )
    config = NormalizedOptimizer(original).get_config()
    ours = {"norm", "norm_epsilon", "scope", "exclude", "step_size", "track_norms"}
    ours |= {"apply_to", "centralize", "axes", "direction"}
    assert ours <= set(config)
    config = {key: value for key, value in config.items() if key not in ours}
    assert config == original.get_config()


def constant_rate():
    return 0.25


@pytest.mark.parametrize("rate", [constant_rate, lambda: 0.25], ids=["def", "lambda"])
def test_a_function_as_learning_rate_is_kept(rate):
    optimizer = NormalizedOptimizer(SGD(rate))
    np.testing.assert_allclose(
        step(optimizer), 0.25 * GRADIENT / np.linalg.norm(GRADIENT), rtol=1e-6
    )


def test_a_schedule_that_is_not_registered_is_kept():
    class Mine(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.25

    optimizer = NormalizedOptimizer(SGD(Mine()))
    np.testing.assert_allclose(
        step(optimizer), 0.25 * GRADIENT / np.linalg.norm(GRADIENT), rtol=1e-6
    )


@pytest.mark.parametrize("base", [SGD, Adam, keras.optimizers.Nadam])
def test_the_state_of_a_trained_optimizer_is_kept(base):
    variable = keras.Variable(np.zeros_like(GRADIENT))
    original = base(0.1, use_ema=True, ema_overwrite_frequency=None)
    for _ in range(3):
        original.apply([ops.convert_to_tensor(GRADIENT)], [variable])
    original.learning_rate = 0.05
    expected = stored(original)
    value = ops.convert_to_numpy(variable)

    optimizer = NormalizedOptimizer(original)
    for new, old in zip(stored(optimizer), expected, strict=True):
        np.testing.assert_array_equal(new, old)

    # The next step is the original's step with the normalized gradient.
    optimizer.apply([ops.convert_to_tensor(GRADIENT)])
    result = ops.convert_to_numpy(variable)
    variable.assign(value)
    unit = oracle.normalize("l2", GRADIENT).astype("float32")
    original.apply([ops.convert_to_tensor(unit)])
    np.testing.assert_allclose(result, ops.convert_to_numpy(variable), rtol=1e-6)


def test_variables_excluded_from_weight_decay_stay_excluded():
    original = SGD(0.1, weight_decay=0.5)
    original.exclude_from_weight_decay(var_names=["bias"])
    optimizer = NormalizedOptimizer(original)
    kernel, bias = (
        keras.Variable([1.0, 1.0], name=name) for name in ("kernel", "bias")
    )
    optimizer.apply([ops.zeros(2), ops.zeros(2)], [kernel, bias])
    np.testing.assert_allclose(kernel, [0.95, 0.95], rtol=1e-6)
    np.testing.assert_array_equal(ops.convert_to_numpy(bias), [1.0, 1.0])


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda: None, "`optimizer` must be a Keras optimizer, its name or its config"),
        (lambda: "nonesuch", "nonesuch"),
        (
            lambda: keras.optimizers.LossScaleOptimizer(SGD()),
            "LossScaleOptimizer wraps",
        ),
        pytest.param(
            lambda: keras.optimizers.MultiOptimizer(lambda variable: SGD()),
            "MultiOptimizer wraps another optimizer",
            marks=pytest.mark.skipif(
                not hasattr(keras.optimizers, "MultiOptimizer"),
                reason="this Keras has no MultiOptimizer",
            ),
        ),
        (lambda: keras_normopt.NormalizedSGD(), "is normalized already"),
        (lambda: NormalizedOptimizer("sgd"), "is normalized already"),
    ],
    ids=["None", "name", "loss scale", "multi", "normalized", "compat"],
)
def test_the_2018_interface_refuses_other_optimizers(optimizer, message):
    with pytest.raises(ValueError, match=message):
        NormalizedOptimizer(optimizer())


def test_the_2018_interface_refuses_an_unknown_norm():
    with pytest.raises(ValueError, match=r"norm='l3'.*'avg_l1'"):
        NormalizedOptimizer(SGD(), normalization="l3")


# Functions of the user, in both forms of 2018 and with `register_norm`.


def total(gradient):
    return ops.sum(ops.abs(gradient))


def divided_by_total(gradient):
    return gradient / ops.sum(ops.abs(gradient))


@pytest.mark.parametrize("function", [total, divided_by_total])
def test_a_function_may_return_a_norm_or_a_normalized_gradient(function, custom_norms):
    NormalizedOptimizer.set_normalization_function("own", function)
    optimizer = NormalizedOptimizer(SGD(0.5), normalization="own")
    np.testing.assert_allclose(
        step(optimizer), 0.5 * GRADIENT / np.abs(GRADIENT).sum(), rtol=1e-6
    )
    twin = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert twin.get_config() == optimizer.get_config()
    assert "own" in NormalizedOptimizer.get_normalization_functions()


@pytest.mark.parametrize("function", [total, divided_by_total])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_both_forms_of_functions_get_float32_gradients(function, dtype, custom_norms):
    seen = []

    def spy(gradient):
        seen.append(keras.backend.standardize_dtype(gradient.dtype))
        return function(gradient)

    NormalizedOptimizer.set_normalization_function("spy", spy)
    seen.clear()
    variable = keras.Variable(np.zeros(500), dtype=dtype)
    gradient = ops.cast(300 * ops.ones(500), dtype)  # The sum overflows float16.
    NormalizedOptimizer(SGD(1.0), "spy").apply([gradient], [variable])
    assert set(seen) == {"float32"}
    result = ops.convert_to_numpy(ops.cast(variable, "float32"))
    np.testing.assert_allclose(result, -1 / 500, rtol=4e-3)


@pytest.mark.parametrize("cls", [NormalizedOptimizer, ClippedOptimizer])
def test_names_of_norms_are_listed_in_order(cls, custom_norms):
    built_in = sorted([*oracle.NORMS, "linf"])
    assert cls.get_normalization_functions() == built_in
    cls.set_normalization_function("a_first", total)
    assert cls.get_normalization_functions() == ["a_first", *built_in]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            5,
            TypeError,
            "`function` must be a callable of a gradient. Received: function=5",
        ),
        (lambda g: g[0], ValueError, r"a tensor of shape \(3,\)"),
        (lambda g: ops.sum(g)[None], ValueError, r"tensor of shape \(1,\)"),
        (lambda g: g.nonesuch, ValueError, r"failed on a gradient of shape \(2, 3\)"),
    ],
    ids=["number", "row", "vector", "failing"],
)
def test_functions_of_another_form_are_refused(function, error, message, custom_norms):
    with pytest.raises(error, match=message):
        NormalizedOptimizer.set_normalization_function("own", function)
    assert "own" not in NormalizedOptimizer.get_normalization_functions()


def test_a_gradient_returned_in_another_shape_is_an_error(custom_norms):
    def flattening(gradient):
        return gradient if len(gradient.shape) == 2 else ops.sum(gradient)

    NormalizedOptimizer.set_normalization_function("own", flattening)
    with pytest.raises(ValueError, match=r"flattening was registered.*shape \(\) for"):
        step(keras_normopt.NormalizedSGD(norm="own"), np.ones(3, "float32"))


class TestRegisterNorm:
    @pytest.fixture(autouse=True)
    def _clean(self, custom_norms):
        pass

    def test_register_norm_is_a_function_and_a_decorator(self):
        assert keras_normopt.register_norm("first", total) is total

        @keras_normopt.register_norm("second")
        def second(gradient):
            return 2 * total(gradient)

        by_first = step(keras_normopt.NormalizedSGD(1.0, norm="first"))
        by_second = step(keras_normopt.NormalizedSGD(1.0, norm=second))
        np.testing.assert_allclose(by_first, 2 * by_second, rtol=1e-6)

    @pytest.mark.parametrize("name", [*oracle.NORMS, "linf"])
    def test_a_built_in_name_is_refused(self, name):
        for overwrite in (False, True):
            with pytest.raises(
                ValueError, match=f"built-in norm. Received: name='{name}"
            ):
                keras_normopt.register_norm(name, total, overwrite=overwrite)

    def test_another_function_needs_overwrite(self):
        keras_normopt.register_norm("own", total)
        message = "registered under name='own' already. Pass `overwrite=True`"
        with pytest.raises(ValueError, match=message):
            keras_normopt.register_norm("own", lambda g: 2 * total(g))
        with pytest.raises(ValueError, match=message):
            NormalizedOptimizer.set_normalization_function("own", divided_by_total)
        keras_normopt.register_norm("own", lambda g: 2 * total(g), overwrite=True)
        by_own = step(keras_normopt.NormalizedSGD(1.0, norm="own"))
        np.testing.assert_allclose(
            by_own, GRADIENT / np.abs(GRADIENT).sum() / 2, rtol=1e-6
        )

    def test_a_notebook_cell_may_be_run_twice(self):
        cell = (
            "@keras_normopt.register_norm('own')\n"
            "def own(gradient):\n"
            "    return ops.sum(ops.abs(gradient)) * {factor}\n"
        )
        names = {"keras_normopt": keras_normopt, "ops": ops, "__name__": "__main__"}
        exec(cell.format(factor=1), names)
        exec(cell.format(factor=1), names)
        with pytest.raises(ValueError, match="overwrite=True"):
            exec(cell.format(factor=2), names)

    def test_a_function_with_other_captured_values_is_another_function(self):
        def make(power):
            def norm(gradient):
                return ops.sum(ops.abs(gradient) ** power) ** (1 / power)

            return norm

        three, four = 3.25, 4.25
        keras_normopt.register_norm("lp", make(three))
        keras_normopt.register_norm("lp", make(three))
        with pytest.raises(ValueError, match="overwrite=True"):
            keras_normopt.register_norm("lp", make(four))

    @pytest.mark.parametrize(
        ("name", "function", "error", "message"),
        [
            (5, total, TypeError, "`name` must be a string. Received: name=5"),
            (None, total, TypeError, "`name` must be a string. Received: name=None"),
            ("", total, ValueError, "`name` must not be empty"),
            ("own", 5, TypeError, "`function` must be a callable.*function=5"),
        ],
    )
    def test_a_wrong_name_or_function_is_refused(self, name, function, error, message):
        with pytest.raises(error, match=message):
            keras_normopt.register_norm(name, function)


def test_training_the_original_does_not_change_the_copied_state():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(Adam(0.1), loss="mse")
    x, y = np.ones((4, 2)), np.ones((4, 1))
    model.fit(x, y, verbose=0)
    optimizer = NormalizedOptimizer(model.optimizer)
    expected = stored(model.optimizer)
    model.fit(x, y, verbose=0)  # JAX reuses the buffers of its variables.
    for new, old in zip(stored(optimizer), expected, strict=True):
        np.testing.assert_array_equal(new, old)
