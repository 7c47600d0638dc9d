"""Compares each norm with examples by hand and with the NumPy oracle."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

from helpers import oracle
from helpers.single import normalize
from keras_normopt import norms
from keras_normopt.norms._reductions import Reductions

pytestmark = [pytest.mark.newest_keras, pytest.mark.sdist]

GRADIENT = [[3.0, -4.0], [0.0, 0.0]]
COMPILERS = {"eager": lambda function: function}
if keras.backend.backend() == "jax":
    import jax

    COMPILERS["jit"] = jax.jit
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    COMPILERS["graph"] = tf.function
    COMPILERS["xla"] = functools.partial(tf.function, jit_compile=True)

BY_HAND = {
    "l1": 7.0,
    "l2": 5.0,
    "l1_l2": 6.0,
    "avg_l1": 7 / 4,
    "avg_l2": 5 / 2,
    "avg_l1_l2": (7 / 4 + 5 / 2) / 2,
    "max": 4.0,
    "linf": 4.0,
    "min_max": 2.0,
    "std": np.sqrt(25 / 4 - 1 / 16),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_norms_equal_examples_by_hand(name):
    assert float(getattr(norms, name)(GRADIENT)) == pytest.approx(BY_HAND[name])


def test_every_norm_is_public():
    assert set(norms.__all__) == set(BY_HAND)


@pytest.mark.parametrize("name", oracle.NORMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32"])
def test_norms_compute_and_return_float32(name, dtype):
    gradient = ops.cast(ops.reshape(ops.arange(-3, 5), (2, 4)), dtype)
    norm = getattr(norms, name)(gradient)
    assert norm.shape == ()
    assert keras.backend.standardize_dtype(norm.dtype) == "float32"
    np.testing.assert_allclose(
        float(norm), float(oracle.norm(name, np.arange(-3, 5))), rtol=1e-6
    )


@pytest.mark.parametrize("name", oracle.NORMS)
def test_norms_keep_the_precision_of_float64(name, float64):
    values = np.linspace(-1, 3, 12).reshape(3, 4)
    norm = getattr(norms, name)(ops.convert_to_tensor(values, "float64"))
    assert keras.backend.standardize_dtype(norm.dtype) == "float64"
    np.testing.assert_allclose(float(norm), float(oracle.norm(name, values)), 1e-14)


@pytest.mark.parametrize("name", oracle.NORMS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 4), (2, 1, 3, 2, 2)])
def test_norms_take_gradients_of_any_shape(name, shape):
    values = np.random.default_rng(0).normal(size=shape).astype("float32")
    norm = getattr(norms, name)(values)
    assert norm.shape == ()
    np.testing.assert_allclose(float(norm), float(oracle.norm(name, values)), 2e-6)


@pytest.mark.parametrize("name", oracle.NORMS)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2, 2)])
def test_the_norm_of_an_empty_gradient_is_zero(name, shape):
    assert float(getattr(norms, name)(np.zeros(shape, "float32"))) == 0


@functools.cache  # Without a cache, each magnitude would compile again.
def compiled_to_normalize(name, compiler):
    norm = getattr(norms, name)
    return COMPILERS[compiler](lambda g: normalize([g], norm, 0.0)[0])


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("name", oracle.NORMS)
@pytest.mark.parametrize(
    ("dtype", "value", "size"),
    [
        ("float16", 300.0, 500),
        ("float16", 6.2e-5, 500),
        ("bfloat16", 3e38, 50),
        ("float32", 1e30, 500),
        ("float32", 3e38, 500),
        ("float32", 1e-25, 500),
        ("float32", 1.2e-38, 500),
        ("float64", 1e300, 500),
        ("float64", 1.5e308, 500),
        ("float64", 1e-300, 500),
    ],
)
def test_extreme_magnitudes_neither_overflow_nor_underflow(
    name, dtype, value, size, compiler, float64
):
    signs = np.where(np.arange(size) % 3, 1, -1)
    gradient = ops.cast(ops.convert_to_tensor(value * signs, "float64"), dtype)
    exact = ops.convert_to_numpy(ops.cast(gradient, "float64"))
    limits = np.finfo("float64" if dtype == "float64" else "float32")
    if not limits.tiny <= oracle.norm(name, exact) <= limits.max:
        pytest.skip("the exact norm is outside the range of the dtype")
    result = compiled_to_normalize(name, compiler)(gradient)
    assert result.dtype == gradient.dtype
    np.testing.assert_allclose(
        ops.convert_to_numpy(ops.cast(result, "float64")),
        oracle.normalize(name, exact).astype("float64"),
        rtol={"float16": 1e-3, "bfloat16": 8e-3, "float32": 3e-6, "float64": 1e-14}[
            dtype
        ],
    )


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize("value", [0.1, -3.0, 1e-20])
def test_std_of_a_constant_is_the_root_mean_square(value, size):
    # In float32, the standard deviation of many values of 0.1 is 1.5e-8, not 0.
    gradient = np.full(size, value, "float32")
    np.testing.assert_allclose(float(norms.std(gradient)), abs(value), rtol=1e-6)


def test_std_falls_back_to_avg_l2_only_below_its_threshold():
    root_eps = np.sqrt(np.finfo("float32").eps)  # 3.5e-4
    above = np.array([1 - 2 * root_eps, 1 + 2 * root_eps], "float32")
    below = np.array([1 - root_eps / 2, 1 + root_eps / 2], "float32")
    np.testing.assert_allclose(float(norms.std(above)), 2 * root_eps, rtol=1e-3)
    np.testing.assert_allclose(float(norms.std(below)), 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", oracle.NORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_normalizing_does_not_hide_non_finite_entries(name, bad):
    gradient = np.array([1.0, bad, 3.0], "float32")
    (result,) = normalize([gradient], getattr(norms, name), 1e-30)
    assert not np.isfinite(ops.convert_to_numpy(result)[1])


@pytest.mark.parametrize("name", oracle.NORMS)
@pytest.mark.parametrize("epsilon", [0.0, 1e-30, 1e-7])
def test_a_zero_gradient_stays_exactly_zero(name, epsilon):
    gradients = [np.zeros((2, 3), "float32"), np.ones(2, "float32")]
    zero, one = normalize(gradients, getattr(norms, name), epsilon)
    np.testing.assert_array_equal(ops.convert_to_numpy(zero), 0)
    np.testing.assert_allclose(
        ops.convert_to_numpy(one), oracle.normalize(name, np.ones(2)).astype("float64")
    )


@pytest.mark.parametrize("name", oracle.NORMS)
def test_epsilon_is_the_smallest_divisor(name):
    small = np.array([3e-9, -4e-9], "float32")
    (result,) = normalize([small], getattr(norms, name), 1e-7)
    np.testing.assert_allclose(ops.convert_to_numpy(result), small / 1e-7, rtol=1e-6)


def test_each_gradient_of_a_step_keeps_its_dtype(float64):
    gradients = [
        ops.convert_to_tensor([3.0, 4.0], dtype)
        for dtype in ("float16", "bfloat16", "float32", "float64")
    ]
    results = normalize(gradients, norms.l2, 1e-30)
    for gradient, result in zip(gradients, results, strict=True):
        assert result.dtype == gradient.dtype
        np.testing.assert_allclose(
            ops.convert_to_numpy(ops.cast(result, "float32")), [0.6, 0.8], rtol=4e-3
        )


def test_a_custom_norm_may_call_a_built_in_norm():
    @functools.wraps(norms.l2)
    def doubled(gradient):
        return 2 * norms.l2(gradient)

    (result,) = normalize([np.array([3.0, 4.0], "float32")], doubled, 0.0)
    np.testing.assert_allclose(ops.convert_to_numpy(result), [0.3, 0.4], rtol=1e-6)


def test_a_norm_that_returns_no_scalar_is_refused():
    def per_row(gradient):
        return ops.norm(gradient, axis=-1)

    with pytest.raises(ValueError, match=r"per_row.*shape \(2,\).*shape \(2, 2\)"):
        normalize([np.ones((2, 2), "float32")], per_row, 0.0)


def test_only_norms_out_of_range_are_computed_at_another_scale(monkeypatch):
    def scaled(self, scales):
        raise ArithmeticError("computed at another scale")

    monkeypatch.setattr(Reductions, "scaled", scaled)
    ones = np.ones(3, "float32")
    # Zeros need no second scale.
    normalize([ones, np.zeros(4, "float32")], norms.l2)
    with pytest.raises(ArithmeticError, match="another scale"):
        normalize([ones, 1e-30 * ones], norms.l2)
