"""Tests properties of norms and of normalized gradients, on random gradients.

The tests skip a gradient if its exact norm is not a normal number of the dtype that
computes it. Entries range from the smallest normal number of each dtype to the largest.
"""

import functools
import math

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from keras import ops

from helpers import oracle
from helpers.single import normalize
from keras_normopt import norms

pytestmark = pytest.mark.newest_keras

# All ranks from 0 to 5, but few shapes, because each shape compiles again.
SHAPES = [
    (),
    (1,),
    (5,),
    (64,),
    (3, 4),
    (1, 7),
    (2, 3, 4),
    (2, 1, 3, 2),
    (2, 1, 2, 3, 2),
]
LIMITS = {
    "float16": np.finfo(np.float16),
    "bfloat16": ml_dtypes.finfo(ml_dtypes.bfloat16),
    "float32": np.finfo(np.float32),
}
DTYPES = sorted(LIMITS)

every_norm = pytest.mark.parametrize("name", sorted(oracle.NORMS))


def numbers(dtype):
    """Returns a strategy for 0 and for normal numbers of a dtype."""
    limits = LIMITS[dtype]
    size = st.floats(math.log2(float(limits.tiny)), math.log2(float(limits.max)) - 1e-3)
    sign = st.sampled_from([-1.0, 1.0])
    anywhere = st.builds(lambda s, e: s * 2.0**e, sign, size)
    return st.one_of(
        st.just(0.0), anywhere, st.floats(-2, 2).map(lambda x: round(x, 3))
    )


@st.composite
def gradients(draw, dtypes=DTYPES):
    """Draws a gradient, as a float64 array of numbers of a dtype, and the dtype.

    The entries have different magnitudes or about the same one.
    """
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.sampled_from(SHAPES))
    limits = LIMITS[dtype]
    if draw(st.booleans()):
        values = draw(arrays(np.float64, shape, elements=numbers(dtype)))
    else:
        values = draw(arrays(np.float64, shape, elements=st.floats(-1, 1)))
        exponent = st.integers(int(limits.minexp), int(limits.maxexp) - 1)
        values = np.ldexp(values, draw(exponent))
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    with np.errstate(over="ignore", under="ignore"):
        values = np.array(values).astype(numpy_dtype).astype(np.float64)
    values = np.where(np.abs(values) < float(limits.tiny), 0.0, values)
    assume(np.isfinite(values).all())
    return values, dtype


def has_normal_norm(name, values):
    limits = np.finfo(np.float32)
    norm = oracle.norm(name, values)
    if name == "std" and oracle.is_near_std_fallback(values):
        return False
    return bool(limits.tiny <= norm <= limits.max)


def tensor(values, dtype):
    # NumPy has no bfloat16. The conversion through float32 is exact.
    return ops.cast(ops.convert_to_tensor(values.astype(np.float32)), dtype)


def normalized(name, values, dtype, epsilon=0.0):
    (result,) = normalize([tensor(values, dtype)], getattr(norms, name), epsilon)
    assert keras.backend.standardize_dtype(result.dtype) == dtype
    return ops.convert_to_numpy(ops.cast(result, "float32")).astype(np.float64)


def measured(name, values):
    return float(getattr(norms, name)(values.astype(np.float32)))


def tolerance(dtype, exact):
    """Returns a bound on rounding errors. It grows with the largest exact entry."""
    eps = float(LIMITS[dtype].eps) + 16 * np.finfo(np.float32).eps
    return 2 * eps * max(1.0, np.max(np.abs(exact), initial=0.0))


@every_norm
@given(gradient=gradients())
def test_random_gradients_are_normalized_like_the_oracle(name, gradient):
    values, dtype = gradient
    assume(has_normal_norm(name, values))
    exact = oracle.normalize(name, values)
    error_factor = 1.0
    if name == "std":
        # Rounding errors of `std` grow with the ratio of the entries to `std`.
        error_factor = max(1.0, float(np.max(np.abs(exact))))
    result = normalized(name, values, dtype)
    atol = float(LIMITS[dtype].tiny)
    rtol = float(LIMITS[dtype].eps) + 32 * error_factor * np.finfo(np.float32).eps
    assume(np.max(np.abs(exact)) <= float(LIMITS[dtype].max))
    np.testing.assert_allclose(result, exact.astype(np.float64), rtol=rtol, atol=atol)


@every_norm
@given(gradient=gradients())
def test_a_normalized_gradient_has_norm_1(name, gradient):
    values, dtype = gradient
    assume(has_normal_norm(name, values))
    result = normalized(name, values, dtype)
    assume(name != "std" or not oracle.is_near_std_fallback(result))
    flushed = result.size * float(LIMITS[dtype].tiny)
    assert abs(float(oracle.norm(name, result)) - 1) <= (
        tolerance(dtype, result) + flushed
    )


@every_norm
@given(gradient=gradients())
def test_normalization_keeps_the_direction(name, gradient):
    values, dtype = gradient
    assume(has_normal_norm(name, values))
    result = normalized(name, values, dtype)
    kept = np.abs(result) > 0
    np.testing.assert_array_equal(np.sign(result[kept]), np.sign(values[kept]))
    np.testing.assert_array_equal(result[values == 0], 0)
    wide = values.astype(np.longdouble)
    cosine = np.sum(result * wide) / np.sqrt(np.sum(result**2) * np.sum(wide**2))
    assert cosine >= 1 - 2 * float(LIMITS[dtype].eps)


@every_norm
@given(gradient=gradients(), exponent=st.integers(-60, 60), negative=st.booleans())
def test_normalization_is_scale_invariant(name, gradient, exponent, negative):
    values, dtype = gradient
    factor = -(2.0**exponent) if negative else 2.0**exponent
    limits = LIMITS[dtype]
    scaled = values * factor
    nonzero = np.abs(scaled[scaled != 0])
    assume(nonzero.size)
    assume(float(limits.tiny) <= nonzero.min())
    assume(nonzero.max() <= float(limits.max))
    assume(has_normal_norm(name, values))
    assume(has_normal_norm(name, scaled))
    expected = np.sign(factor) * normalized(name, values, dtype)
    result = normalized(name, scaled, dtype)
    atol = tolerance(dtype, expected) + float(limits.tiny)
    np.testing.assert_allclose(result, expected, rtol=0, atol=atol)


@every_norm
@given(gradient=gradients())
def test_normalization_is_idempotent(name, gradient):
    values, dtype = gradient
    assume(has_normal_norm(name, values))
    once = normalized(name, values, dtype)
    assume(has_normal_norm(name, once))
    twice = normalized(name, once, dtype)
    atol = tolerance(dtype, once) * max(1.0, np.max(np.abs(once)))
    np.testing.assert_allclose(twice, once, rtol=0, atol=atol)


@every_norm
@given(gradient=gradients(["float32"]), seed=st.integers(0, 2**32 - 1))
def test_order_and_shape_of_entries_do_not_change_a_norm(name, gradient, seed):
    values, _ = gradient
    assume(has_normal_norm(name, values))
    shuffled = np.random.default_rng(seed).permutation(values.ravel())
    exact = oracle.normalize(name, values)
    rtol = tolerance("float32", exact) * 4
    np.testing.assert_allclose(
        measured(name, shuffled), measured(name, values), rtol=rtol
    )
    np.testing.assert_allclose(
        measured(name, values.reshape(-1, 1)), measured(name, values), rtol=rtol
    )


@every_norm
@given(shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES))
def test_zero_gradients_have_norm_0_and_stay_zero(name, shape, dtype):
    np.testing.assert_array_equal(normalized(name, np.zeros(shape), dtype), 0)
    assert measured(name, np.zeros(shape)) == 0


@every_norm
@given(gradient=gradients(["float32"]))
def test_norms_of_nonzero_gradients_are_positive(name, gradient):
    values, _ = gradient
    assume(has_normal_norm(name, values))
    assert measured(name, values) > 0


@every_norm
@given(gradient=gradients(["float32"]), exponent=st.integers(-100, 100))
def test_norms_are_homogeneous(name, gradient, exponent):
    values, _ = gradient
    with np.errstate(over="ignore", under="ignore"):
        scaled = (values * 2.0**exponent).astype(np.float32).astype(np.float64)
    # Scaling by a power of two is exact if all entries stay normal numbers.
    assume(np.array_equal(scaled / 2.0**exponent, values))
    assume(not np.any((scaled != 0) & (np.abs(scaled) < np.finfo(np.float32).tiny)))
    assume(has_normal_norm(name, values))
    assume(has_normal_norm(name, scaled))
    rtol = 4 * tolerance("float32", oracle.normalize(name, values))
    np.testing.assert_allclose(
        measured(name, -scaled), 2.0**exponent * measured(name, values), rtol=rtol
    )


@given(gradient=gradients(["float32"]))
def test_norms_are_ordered_by_size(gradient):
    values, _ = gradient
    assume(all(has_normal_norm(name, values) for name in ("l1", "l2", "max", "avg_l1")))
    measure = functools.partial(measured, values=values)
    slack = 1 + 64 * np.finfo(np.float32).eps
    assert measure("max") <= measure("l2") * slack
    assert measure("l2") <= measure("l1") * slack
    assert measure("avg_l1") <= measure("avg_l2") * slack
    assert measure("avg_l2") <= measure("max") * slack
