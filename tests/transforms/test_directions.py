"""Compares directions with NumPy, and tests extreme gradients and wrong arguments."""

import math
import re
import warnings

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import keras_normopt
from helpers.oracle import QUINTIC, orthogonalized, polynomial
from helpers.variables import as_numpy
from keras_normopt.directions import Orthogonal, Rows, Sign

pytestmark = pytest.mark.newest_keras

BACKEND = keras.backend.backend()
DTYPES = ["float16", "bfloat16", "float32"]
JORDAN = [(3.4445, -4.7750, 2.0315)] * 5


def direction_of(gradient, direction, dtype="float32", **options):
    """Returns what one step of SGD at rate 1 subtracts from a variable."""
    options = {"norm_epsilon": 0.0} | options
    optimizer = keras_normopt.NormalizedSGD(1.0, direction=direction, **options)
    gradient = ops.convert_to_tensor(gradient, dtype)
    variable = keras.Variable(np.zeros(gradient.shape), dtype=dtype, name="kernel")
    optimizer.apply([gradient], [variable])
    wide = "float64" if dtype == "float64" else "float32"
    return -ops.convert_to_numpy(ops.cast(variable, wide))


def random(shape, rank=None, seed=0):
    rng = np.random.default_rng(seed)
    if rank is None:
        return rng.normal(size=shape)
    rows, columns = shape
    return rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))


UNSCALED = Orthogonal(scale=None)


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize(
    ("name", "triples"), [("quintic", QUINTIC), ("jordan", JORDAN)]
)
def test_orthogonal_equals_the_polynomials_in_numpy(shape, rank, name, triples):
    gradient = random(shape, rank)
    actual = direction_of(gradient, Orthogonal(scale=None, coefficients=name))
    expected = orthogonalized(gradient.astype("float32"), triples)
    np.testing.assert_allclose(actual, expected, atol=2e-4)


@settings(max_examples=100 if BACKEND == "torch" else 25)
@given(
    shape=st.sampled_from([(8, 8), (3, 11), (11, 3)]),  # Each shape is compiled.
    smallest=st.floats(0.005, 1.0),
    magnitude=st.integers(-30, 30),
    seed=st.integers(0, 2**16),
)
def test_large_singular_values_become_about_1(shape, smallest, magnitude, seed):
    rng = np.random.default_rng(seed)
    u, s, v = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    s = np.geomspace(1.0, smallest, len(s))
    gradient = (u * s) @ v * 10.0**magnitude
    actual = direction_of(gradient, UNSCALED)
    values = np.linalg.svd(actual, compute_uv=False)  # In descending order.
    is_large = s >= 0.0051 * np.linalg.norm(s)  # The limit allows for rounding.
    assert values[: np.count_nonzero(is_large)].min() >= 0.95
    assert values.max() <= 1.15
    assert np.sum(gradient / 10.0**magnitude * actual) > 0


@pytest.mark.parametrize("direction", [UNSCALED, Rows(), Sign()], ids=lambda d: d.name)
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_the_magnitude_of_a_gradient_does_not_change_its_direction(direction, scale):
    gradient = random((5, 8)).astype("float32")
    actual = direction_of(gradient * np.float32(scale), direction)
    np.testing.assert_allclose(actual, direction_of(gradient, direction), atol=1e-4)


def test_orthogonal_sgd_steps_on_vanishing_gradients_and_muon_does_not():
    gradient = random((5, 8)) * 1e-15

    def step_length(optimizer):
        variable = keras.Variable(np.zeros((5, 8)), name="kernel")
        optimizer.apply([ops.convert_to_tensor(gradient, "float32")], [variable])
        return np.linalg.norm(as_numpy(variable))

    muon = keras.optimizers.Muon(0.01, weight_decay=None, rms_rate=None)
    orthogonal = keras_normopt.OrthogonalSGD(0.01)
    assert step_length(muon) < 1e-6
    expected = 0.01 * math.sqrt(8 / 5) * np.linalg.norm(orthogonalized(gradient))
    np.testing.assert_allclose(step_length(orthogonal), expected, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_is_computed_in_float32(dtype):
    gradient = random((6, 9))
    rounded = ops.cast(ops.convert_to_tensor(gradient, dtype), "float32")
    expected = orthogonalized(ops.convert_to_numpy(rounded))
    actual = direction_of(gradient, UNSCALED, dtype)
    np.testing.assert_allclose(actual, expected, atol=0.01)


@pytest.mark.usefixtures("float64")
def test_directions_keep_the_precision_of_float64():
    gradient = random((6, 9))
    actual = direction_of(gradient, UNSCALED, "float64")
    np.testing.assert_allclose(actual, orthogonalized(gradient), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("direction", ["orthogonal", "rows", "sign"])
def test_zero_gradients_stay_zero_and_nan_stays_in_its_variable(direction):
    gradients = [np.zeros((3, 4)), random((3, 4)), random((3, 4)), np.zeros((0, 4))]
    gradients[2][0, 0] = np.nan
    variables = [keras.Variable(np.zeros(g.shape), name="kernel") for g in gradients]
    optimizer = keras_normopt.NormalizedSGD(1.0, direction=direction)
    optimizer.apply([ops.convert_to_tensor(g, "float32") for g in gradients], variables)
    zero, finite, nan, _ = map(as_numpy, variables)
    np.testing.assert_array_equal(zero, 0)
    assert np.isfinite(finite).all()
    assert np.abs(finite).min() > 0
    assert np.isnan(nan).any()


SCALES = {
    None: lambda i, o: 1.0,
    "original": lambda i, o: math.sqrt(max(1, o / i)),
    "match_rms_adamw": lambda i, o: 0.2 * math.sqrt(max(i, o)),
    "operator": lambda i, o: math.sqrt(o / i),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (2, 3, 9)])
def test_scale_multiplies_orthogonal_steps(scale, shape):
    gradient = random(shape)
    inputs, outputs = math.prod(shape[:-1]), shape[-1]
    axes = {"kernel": (tuple(range(len(shape) - 1)), (len(shape) - 1,))}
    actual = direction_of(gradient, Orthogonal(scale), axes=axes)
    expected = orthogonalized(gradient.reshape(inputs, outputs))
    expected = SCALES[scale](inputs, outputs) * expected
    np.testing.assert_allclose(actual.reshape(inputs, outputs), expected, atol=1e-3)


def test_each_part_at_each_place_of_a_batch_axis_is_one_matrix():
    gradient = random((2, 5, 12))
    actual = direction_of(gradient, UNSCALED, axes={"kernel": ((1,), (2,), 3)})
    for i in range(2):
        for part in np.split(np.arange(12), 3):
            expected = orthogonalized(gradient[i][:, part])
            np.testing.assert_allclose(actual[i][:, part], expected, atol=2e-4)


def test_one_or_several_stacks_give_the_same_directions(monkeypatch):
    gradients = [random((4, 6), seed=i) * 10.0 ** (9 * i - 18) for i in range(5)]

    def weights():
        variables = [keras.Variable(np.zeros((4, 6)), name="k") for _ in gradients]
        optimizer = keras_normopt.NormalizedSGD(1.0, direction=UNSCALED)
        tensors = [ops.convert_to_tensor(g, "float32") for g in gradients]
        optimizer.apply(tensors, variables)
        return np.array([as_numpy(v) for v in variables])

    one_stack = weights()
    expected = [-orthogonalized(g) for g in gradients]
    np.testing.assert_allclose(one_stack, expected, atol=2e-4)
    monkeypatch.setattr("keras_normopt._transforms.direction._STACK_ENTRIES", 50)
    np.testing.assert_allclose(weights(), one_stack, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "triples"),
    [(None, QUINTIC), (2, QUINTIC[:2]), (7, QUINTIC + QUINTIC[-1:] * 2)],
)
def test_the_argument_steps_shortens_or_extends_a_list_of_polynomials(steps, triples):
    gradient = random((4, 6))
    direction = Orthogonal(None, coefficients=QUINTIC, steps=steps)
    expected = orthogonalized(gradient, triples)
    np.testing.assert_allclose(direction_of(gradient, direction), expected, atol=5e-4)


def test_the_argument_steps_repeats_a_single_polynomial():
    gradient = random((4, 6))
    direction = Orthogonal(None, coefficients=(1.5, -0.5, 0.0), steps=20)
    u, _, v = np.linalg.svd(gradient, full_matrices=False)
    np.testing.assert_allclose(direction_of(gradient, direction), u @ v, atol=1e-4)


@pytest.mark.parametrize(
    ("scale", "magnitude"), [(None, 1.0), ("match_rms_adamw", 0.2), ("operator", 0.25)]
)
def test_sign_equals_numpy(scale, magnitude):
    gradient = random((4, 6))
    gradient[0] = 0
    actual = direction_of(gradient, Sign(scale))
    np.testing.assert_allclose(actual, magnitude * np.sign(gradient), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "axes", "over", "length"),
    [
        ({}, None, 0, 1.0),
        ({"over": "outputs"}, None, 1, 1.0),
        ({}, "embedding", 1, 1.0),
        ({"over": "inputs"}, "embedding", 0, 1.0),
        ({"scale": "operator"}, None, 0, 0.5),
        ({"scale": "operator"}, "embedding", 1, math.sqrt(6)),
        ({"scale": "match_rms_adamw"}, "embedding", 1, 0.2 * math.sqrt(6)),
        ({}, "vector", (0, 1), 1.0),
        ({"scale": "operator"}, "vector", (0, 1), math.sqrt(24)),
    ],
)
def test_rows_equal_numpy(options, axes, over, length):
    gradient = random((4, 6)) * np.array([1, 1e-20, 1e20, 1e-3])[:, None]
    axes = axes and {"kernel": axes}
    actual = direction_of(gradient, Rows(**options), axes=axes)
    norms = np.linalg.norm(gradient, axis=over, keepdims=True)
    np.testing.assert_allclose(actual, length * gradient / norms, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("direction", [UNSCALED, Rows(), Sign()], ids=lambda d: d.name)
def test_gradients_below_norm_epsilon_make_proportionally_shorter_steps(direction):
    gradient = np.full((2, 4), 2.0**-70)
    above = direction_of(gradient, direction, norm_epsilon=2.0**-71)
    below = direction_of(gradient, direction, norm_epsilon=2.0**-64)
    np.testing.assert_allclose(below, above / 64, rtol=1e-5)


@pytest.mark.parametrize(("size", "moves"), [(1e-15, 1.0), (2.4e-24, 1e-4)])
def test_momentum_that_has_decayed_to_noise_makes_tiny_steps(size, moves):
    optimizer = keras_normopt.OrthogonalSGD(1.0)
    variable = keras.Variable(np.zeros((4, 4)), name="kernel")
    optimizer.build([variable])
    optimizer.momentums[0].assign(size * np.eye(4) / 2)
    optimizer.apply([ops.zeros((4, 4))], [variable])
    # Nesterov applies the momentum of 0.9 twice.
    factor = min(1.0, 0.81 * size / 2 / 1e-20)
    assert moves * 0.9 < factor <= moves
    values = polynomial(np.full(4, 0.5), QUINTIC)
    np.testing.assert_allclose(np.diag(as_numpy(variable)), factor * values, rtol=1e-3)


def test_gradients_of_1e_minus_15_make_full_steps_by_default():
    gradient = random((5, 8))
    optimizers = [keras_normopt.OrthogonalSGD(1.0) for _ in range(2)]
    weights = []
    for optimizer, factor in zip(optimizers, (1.0, 1e-15), strict=True):
        variable = keras.Variable(np.zeros((5, 8)), name="kernel")
        tensor = ops.convert_to_tensor(factor * gradient, "float32")
        optimizer.apply([tensor], [variable])
        weights.append(as_numpy(variable))
    np.testing.assert_allclose(*weights, atol=1e-4)


SHAPES = {"embed": (5, 3), "bias": (4,), "kernel": (4, 6), "scale": (6,)}


def steps_of(optimizer, gradients):
    variables = {n: keras.Variable(np.zeros(SHAPES[n]), name=n) for n in gradients}
    tensors = [ops.convert_to_tensor(g, "float32") for g in gradients.values()]
    optimizer.apply(tensors, list(variables.values()))
    return {n: -as_numpy(v) for n, v in variables.items()}


GRADIENTS = {name: 3 * random(shape) for name, shape in SHAPES.items()}


def test_patterns_choose_directions_and_excluded_variables_have_no_direction():
    patterns = {"embed": "sign", "bias": None, "k|b": Orthogonal(None), ".*": "rows"}
    optimizer = keras_normopt.NormalizedSGD(1.0, direction=patterns, exclude="scale")
    steps = steps_of(optimizer, GRADIENTS)
    np.testing.assert_allclose(steps["embed"], np.sign(GRADIENTS["embed"]))
    np.testing.assert_allclose(steps["bias"], GRADIENTS["bias"], rtol=1e-6)
    np.testing.assert_allclose(steps["scale"], GRADIENTS["scale"], rtol=1e-6)
    expected = orthogonalized(GRADIENTS["kernel"])
    np.testing.assert_allclose(steps["kernel"], expected, atol=2e-4)


@pytest.mark.parametrize("direction", ["orthogonal", {"kern": "sign", ".*": None}])
def test_a_config_keeps_the_direction(direction):
    optimizer = keras_normopt.NormalizedSGD(1.0, direction=direction)
    expected = steps_of(optimizer, GRADIENTS)
    config = optimizer.get_config()
    loaded = keras_normopt.NormalizedSGD.from_config(config)
    assert loaded.get_config() == config
    for name, step in steps_of(loaded, GRADIENTS).items():
        np.testing.assert_array_equal(step, expected[name])


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"nothing": "sign", ".*": "sign"}, r"'nothing'.* matches none"),
        ({".*": None, "kernel": "sign"}, r"'kernel' has no effect.*first match"),
        ({"embed": "sign", "bias": "orthogonal", ".*": "sign"}, r"'bias'.*raw grad"),
        ({"kernel": "sign"}, r"no pattern for \['embed'\]"),
    ],
)
def test_unused_patterns_and_variables_without_a_pattern_cause_a_warning(
    patterns, message
):
    optimizer = keras_normopt.NormalizedSGD(direction=patterns, exclude="scale")
    with pytest.warns(UserWarning, match=message):
        steps_of(optimizer, GRADIENTS)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"direction": "sign", "norm": "l2"}, "`norm` must be None"),
        ({"direction": "orthogonal", "scope": "unit"}, 'scope="unit"'),
        ({"direction": "orthogonl"}, "Received: direction='orthogonl'"),
        ({"direction": {}}, "empty"),
        ({"direction": {"(": "sign"}}, "regular expression"),
        ({"direction": {"a": "sgn"}}, "Received: direction='sgn'"),
        ({"direction": {"name": "rows", "config": {"scale": "x"}}}, "scale='x'"),
        ({"axes": {"k": ((0,), (1,), 0)}}, "(inputs, outputs)"),
        ({"axes": {"k": (0, 1)}}, "(inputs, outputs)"),
        ({"axes": {"k": np.zeros((2, 1))}}, "(inputs, outputs)"),
        ({"axes": {"(": "vector"}}, "regular expression"),
    ],
)
def test_errors_name_wrong_directions_and_axes(options, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        keras_normopt.NormalizedSGD(**options)


@pytest.mark.parametrize("axes", [[((0,), (1,))], {1: "vector"}])
def test_errors_name_axes_of_a_wrong_type(axes):
    with pytest.raises(TypeError, match="`axes`"):
        keras_normopt.NormalizedSGD(axes=axes)


@pytest.mark.parametrize(
    ("axes", "problem"),
    [
        (((0,), (2,)), "no such axes"),
        (((0,), (0, 1)), "named twice"),
        (((0,), (1,), 4), "4 equal parts"),
    ],
)
def test_errors_name_axes_that_do_not_fit_a_variable(axes, problem):
    optimizer = keras_normopt.OrthogonalSGD(axes={"kernel": axes})
    with pytest.raises(ValueError, match=problem):
        steps_of(optimizer, GRADIENTS)


@pytest.mark.parametrize(
    ("cls", "arguments", "name"),
    [
        (Orthogonal, {"scale": "rms"}, "scale"),
        (Orthogonal, {"coefficients": (1.0, 2.0)}, "coefficients"),
        (Orthogonal, {"coefficients": []}, "coefficients"),
        (Orthogonal, {"coefficients": "polar"}, "coefficients"),
        (Orthogonal, {"coefficients": (1.0, math.nan, 2.0)}, "coefficients"),
        (Orthogonal, {"steps": 0}, "steps"),
        (Orthogonal, {"steps": True}, "steps"),
        (Orthogonal, {"embeddings": "row"}, "embeddings"),
        (Orthogonal, {"vectors": 3}, "vectors"),
        (Sign, {"scale": "original"}, "scale"),
        (Rows, {"scale": "original"}, "scale"),
        (Rows, {"over": "rows"}, "over"),
    ],
)
def test_errors_name_wrong_arguments_of_directions(cls, arguments, name):
    with pytest.raises(ValueError, match=f"Received: {name}="):
        cls(**arguments)


def test_clipped_optimizers_refuse_a_direction():
    with pytest.raises(ValueError, match=r"keras_normopt\.NormalizedSGD"):
        keras_normopt.ClippedSGD(direction="sign")


@pytest.mark.parametrize("direction", ["sign", {"bias": None, ".*": "sign"}])
def test_clipnorm_causes_a_warning_if_every_variable_has_a_direction(direction):
    optimizer = keras_normopt.NormalizedSGD(direction=direction, clipnorm=1.0)
    variables = [keras.Variable(np.zeros((2,)), name=n) for n in ("kernel", "bias")]
    if isinstance(direction, str):
        with pytest.warns(UserWarning, match=r"clipnorm=1.0 has no effect.*Sign\("):
            optimizer.build(variables)
    else:
        with warnings.catch_warnings(action="error"):
            optimizer.build(variables)


def test_orthogonal_sgd_tracks_the_norms_of_raw_gradients():
    optimizer = keras_normopt.OrthogonalSGD(track_norms=True)
    steps_of(optimizer, GRADIENTS)
    for name, gradient in GRADIENTS.items():
        norm = optimizer.gradient_norms[name]
        np.testing.assert_allclose(norm, np.linalg.norm(gradient), rtol=1e-5)


def test_orthogonal_sgd_is_normalized_sgd_with_other_defaults():
    orthogonal = keras_normopt.OrthogonalSGD(0.5, 0.25, norm_epsilon=0.0)
    normalized = keras_normopt.NormalizedSGD(
        0.5,
        0.25,
        nesterov=True,
        norm=None,
        apply_to="update",
        norm_epsilon=0.0,
        direction="orthogonal",
    )
    name = {"name": orthogonal.name}
    assert orthogonal.get_config() == normalized.get_config() | name
    assert isinstance(orthogonal, keras_normopt.NormalizedSGD)
    assert keras.optimizers.get("orthogonal_sgd").get_config()["momentum"] == 0.9
    registered = keras.saving.get_registered_name(keras_normopt.OrthogonalSGD)
    assert registered == "keras_normopt>OrthogonalSGD"


def test_a_norm_cannot_be_set_if_there_is_a_direction():
    optimizer = keras_normopt.NormalizedSGD(direction="sign")
    with pytest.raises(ValueError, match="`norm` must be None"):
        optimizer.norm = "l2"
    optimizer.norm = None


def test_a_subclass_of_orthogonal_does_not_replace_the_default_direction():
    class Custom(Orthogonal):
        pass

    assert type(keras_normopt.OrthogonalSGD().direction) is Orthogonal
    assert type(keras_normopt.OrthogonalSGD(direction=Custom()).direction) is Custom


def test_orthogonal_sgd_names_a_duplicate_argument():
    with pytest.raises(TypeError, match="learning_rate"):
        keras_normopt.OrthogonalSGD(0.1, learning_rate=0.2, momentum=0.5)


def test_orthogonal_sgd_names_an_unknown_argument():
    with pytest.raises(ValueError, match="Did you mean `momentum`"):
        keras_normopt.OrthogonalSGD(momentun=0.9)
