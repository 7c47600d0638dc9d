"""Compares norms of blocks with the oracle on concatenated vectors."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import oracle
from helpers.variables import (
    LAYERS,
    SCOPES,
    SHAPES,
    as_numpy,
    make_gradients,
    make_variables,
    steps_of,
)
from keras_normopt._blocks import partition

pytestmark = pytest.mark.newest_keras

BACKEND = keras.backend.backend()
every_scope = pytest.mark.parametrize("scope", SCOPES)


def steps_by_block(norm, gradients, blocks):
    result = dict(gradients)
    for block in blocks:
        vector = np.concatenate([gradients[path].ravel() for path in block])
        divisor = oracle.norm(norm, vector)
        result |= {path: gradients[path] / divisor for path in block}
    return result


def expected_steps(scope, norm, gradients):
    if scope == "layer":
        return steps_by_block(norm, gradients, LAYERS)
    if scope == "global":
        return steps_by_block(norm, gradients, [list(gradients)])
    normalize = oracle.normalize_units if scope == "unit" else oracle.normalize
    return {path: normalize(norm, g) for path, g in gradients.items()}


def assert_close(actual, expected, rtol=1e-5):
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        value = np.asarray(value, "float64")
        np.testing.assert_allclose(
            actual[path], value, rtol, rtol * np.abs(value).max(), err_msg=path
        )


# Every norm runs in every scope. One norm of each kind also runs with squares outside
# the range of float32.
@pytest.mark.parametrize(
    ("norm", "scale", "compiled"),
    [(norm, 1.0, False) for norm in oracle.NORMS]
    + [
        (norm, *case)
        for norm in ("l1", "l2", "max", "std")
        for case in [(1e-35, False), (1e32, False), (1e-35, True)]
    ],
)
@every_scope
def test_each_block_is_divided_by_its_own_norm(scope, norm, scale, compiled):
    gradients = make_gradients(scale)
    optimizer = keras_normopt.NormalizedSGD(1.0, norm=norm, scope=scope, norm_epsilon=0)
    actual = steps_of(optimizer, gradients, compiled=compiled)
    expected = expected_steps(scope, norm, gradients)
    # Rounding errors of `std` grow with the ratio of the entries to `std`.
    rounding = (
        max(1.0, *(np.abs(w).max() for w in expected.values())) if norm == "std" else 1
    )
    assert_close(actual, expected, 1e-5 * float(rounding))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@every_scope
def test_blocks_of_every_dtype_are_normalized(scope, dtype, float64):
    gradients = make_gradients(1e-2)
    optimizer = keras_normopt.NormalizedSGD(1.0, scope=scope)
    steps = steps_of(optimizer, gradients, dtype)
    rtol = {"float16": 4e-3, "bfloat16": 3e-2, "float64": 1e-12}[dtype]
    assert_close(steps, expected_steps(scope, "l2", gradients), rtol)


def test_dtypes_may_differ_within_a_block(float64):
    variables = [
        keras.Variable([0.0, 0.0], dtype=dtype)
        for dtype in ("float16", "bfloat16", "float32", "float64")
    ]
    optimizer = keras_normopt.NormalizedSGD(1.0, scope="global")
    optimizer.apply(
        [ops.convert_to_tensor([3, 4], v.dtype) for v in variables], variables
    )
    for variable in variables:
        np.testing.assert_allclose(as_numpy(variable), [-0.3, -0.4], rtol=0.01)


@pytest.mark.skipif(BACKEND != "jax", reason="Optax needs JAX")
def test_global_scope_equals_optax():
    import optax

    gradients = make_gradients()
    tree = {path: ops.convert_to_tensor(g, "float32") for path, g in gradients.items()}
    transformation = optax.normalize_by_update_norm(eps=0)
    expected, _ = transformation.update(tree, transformation.init(tree))
    optimizer = keras_normopt.NormalizedSGD(1.0, scope="global")
    assert_close(steps_of(optimizer, gradients), expected, 1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@every_scope
def test_a_custom_norm_receives_each_block(scope, compiled):
    def l4(gradient):
        return ops.sum(gradient**4) ** 0.25

    def l4_in_numpy(gradient):
        return np.sum(np.asarray(gradient, np.longdouble) ** 4) ** 0.25

    optimizer = keras_normopt.NormalizedSGD(1.0, norm=l4, scope=scope)
    gradients = make_gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(oracle.NORMS, "l4", l4_in_numpy)
        expected = expected_steps(scope, "l4", gradients)
    assert_close(steps_of(optimizer, gradients, compiled=compiled), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_custom_norm_may_call_a_built_in_norm_for_units(compiled):
    def doubled(gradient):
        return 2 * keras_normopt.norms.l2(gradient)

    gradients = make_gradients(1e-25)
    optimizer = keras_normopt.NormalizedSGD(1.0, norm=doubled, scope="unit")
    steps = steps_of(optimizer, gradients, compiled=compiled)
    expected = {p: g / 2 for p, g in expected_steps("unit", "l2", gradients).items()}
    assert_close(steps, expected)


@every_scope
def test_zero_entries_stay_zero_and_no_step_is_nan(scope):
    gradients = {path: np.zeros(shape) for path, shape in SHAPES.items()}
    gradients["b/kernel"][0, 0, 0] = 3.0  # All other entries are zero.
    for norm in oracle.NORMS:
        optimizer = keras_normopt.NormalizedSGD(1.0, norm=norm, scope=scope)
        steps = steps_of(optimizer, gradients)
        for path, value in steps.items():
            assert np.isfinite(value).all()
            np.testing.assert_array_equal(value != 0, gradients[path] != 0)


def test_missing_gradients_are_left_out_of_their_block():
    gradients = make_gradients()
    variables = make_variables()
    tensors = [ops.convert_to_tensor(g, "float32") for g in gradients.values()]
    tensors[1] = None
    optimizer = keras_normopt.NormalizedSGD(1.0, scope="layer")
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply(tensors, variables)
    expected = oracle.normalize("l2", gradients["a/kernel"])
    np.testing.assert_allclose(
        -ops.convert_to_numpy(variables[0]), np.float64(expected), rtol=1e-5
    )


@every_scope
def test_a_single_variable_is_normalized_in_every_scope(scope):
    gradient = make_gradients()["b/kernel"]
    variable = keras.Variable(np.zeros(gradient.shape))
    optimizer = keras_normopt.NormalizedSGD(1.0, scope=scope)
    optimizer.apply([ops.convert_to_tensor(gradient, "float32")], [variable])
    expected = oracle.normalize("l2", gradient)
    if scope == "unit":
        expected = expected_steps(scope, "l2", {"x": gradient})["x"]
    np.testing.assert_allclose(-as_numpy(variable), np.float64(expected), rtol=1e-5)


def test_variables_with_the_same_path_are_separate_blocks():
    names, numbers = partition.partition("variable", ["x", "x", "x_2"], [[], [], []])
    assert numbers == [0, 1, 2]
    assert len(set(names)) == 3


# Exclusion.


@pytest.mark.filterwarnings("ignore:.*'nothing at all' matches none")
@pytest.mark.parametrize("exclude", ["bias$", ("bias", "nothing at all"), ["b.as"]])
@every_scope
def test_excluded_variables_step_with_their_raw_gradient(scope, exclude):
    gradients = make_gradients()
    optimizer = keras_normopt.NormalizedSGD(1.0, scope=scope, exclude=exclude)
    biases = {path: g for path, g in gradients.items() if path.endswith("bias")}
    included = {path: g for path, g in gradients.items() if path not in biases}
    expected = expected_steps(scope, "l2", included) if scope != "layer" else None
    if scope == "layer":
        layers = [[p for p in layer if p in included] for layer in LAYERS]
        expected = steps_by_block("l2", included, layers)
    assert_close(
        steps_of(optimizer, gradients), {p: (expected | biases)[p] for p in SHAPES}
    )


def test_excluding_every_variable_gives_the_steps_of_the_base():
    gradients = make_gradients()
    optimizer = keras_normopt.NormalizedSGD(1.0, exclude="bias|")
    with pytest.warns(UserWarning, match=r"exclude=\('bias\|',\) excludes every"):
        steps = steps_of(optimizer, gradients)
    assert_close(steps, gradients, 1e-6)


@pytest.mark.parametrize("exclude", ["", [""], ("bias", "")])
def test_an_empty_pattern_is_refused_but_can_still_be_loaded(exclude):
    """The expression `"".split(",")` returns such a pattern."""
    cls = keras_normopt.NormalizedSGD
    with pytest.raises(ValueError, match=r"empty pattern.*exclude=.*Pass exclude"):
        cls(exclude=exclude)
    # A file with an empty pattern loads, and still excludes every variable.
    config = cls(1.0).get_config() | {"exclude": list(exclude) or [""]}
    with pytest.warns(UserWarning, match="saved with an empty pattern"):
        optimizer = cls.from_config(config)
    gradients = make_gradients()
    with pytest.warns(UserWarning, match="excludes every variable"):
        assert_close(steps_of(optimizer, gradients), gradients, 1e-6)


def test_an_exclude_pattern_without_a_match_causes_one_warning():
    optimizer = keras_normopt.NormalizedSGD(1.0, exclude="gamma")
    with pytest.warns(
        UserWarning, match=r"`exclude`.*'gamma' matches none.*'a/kernel'"
    ):
        optimizer.build(make_variables())
    optimizer.build(make_variables())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"exclude": "(unbalanced"}, ValueError, r"exclude='\(unbalanced'.*\)"),
        ({"exclude": ["fine", "*"]}, ValueError, "exclude="),
        ({"exclude": 5}, TypeError, "exclude=5"),
        ({"exclude": [None]}, TypeError, r"exclude=\[None\]"),
        ({"exclude": None}, TypeError, "exclude=None"),
        ({"scope": "model"}, ValueError, "one of 'variable', 'unit', .*scope='model'"),
        ({"scope": None}, ValueError, "scope=None"),
        ({"scope": ["layer"]}, ValueError, "scope="),
        ({"track_norms": "yes"}, ValueError, "track_norms='yes'"),
    ],
)
@pytest.mark.parametrize("cls", ["NormalizedAdam", "ClippedAdam"])
def test_errors_name_wrong_scopes_and_patterns(cls, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(keras_normopt, cls)(**arguments)


def test_functions_that_return_gradients_are_refused_if_norms_are_needed(
    custom_norms,
):
    keras_normopt.NormalizedOptimizer.set_normalization_function(
        "signs", lambda gradient: ops.sign(gradient)
    )
    for scope in SCOPES[1:]:
        with pytest.raises(ValueError, match=f"norm='signs'.*scope='{scope}'"):
            keras_normopt.NormalizedSGD(norm="signs", scope=scope)
    optimizer = keras_normopt.NormalizedSGD(scope="global")
    with pytest.raises(ValueError, match="norm='signs'"):
        optimizer.norm = "signs"
    with pytest.raises(ValueError, match=r"norm='signs'.*compares a norm"):
        keras_normopt.ClippedSGD(norm="signs")
    optimizer = keras_normopt.ClippedSGD()
    with pytest.raises(ValueError, match="norm='signs'"):
        optimizer.norm = "signs"


def test_a_saved_model_keeps_scope_exclude_and_track_norms(tmp_path):
    optimizer = keras_normopt.NormalizedAdam(
        norm="max", scope="layer", exclude="bias", track_norms=True
    )
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    model.train_on_batch(np.ones((1, 2)), np.ones((1, 1)))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert loaded.get_config() == optimizer.get_config()
    assert (loaded.scope, loaded.exclude) == ("layer", ("bias",))
    assert loaded.track_norms is True


# Tests with every base optimizer.


@pytest.mark.parametrize("scope", SCOPES[1:])
@pytest.mark.parametrize("cls", keras_normopt.optimizers.NORMALIZED.values())
@pytest.mark.every_base
def test_every_base_steps_with_the_normalized_gradient_in_every_scope(cls, scope):
    gradients = make_gradients()
    base = getattr(keras.optimizers, cls.__name__.removeprefix("Normalized"))
    raw = {
        p: np.asarray(g, "float64")
        for p, g in expected_steps(scope, "l2", gradients).items()
    }
    actual = steps_of(cls(0.5, scope=scope), gradients)
    assert_close(actual, steps_of(base(0.5), raw), 1e-3)
