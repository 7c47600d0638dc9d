"""Checks users' norms: `check_norm`."""

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_normopt.norms._user_norms import function_name

__all__ = ["check_norm"]

_LIMITS = np.finfo("float32")
# There are few shapes, because compilers start over for each shape.
_SHAPES = [(), (1,), (4,), (2, 3), (2, 1, 3)]
_RTOL = 1e-4


def check_norm(function: Callable[[Any], Any], *, max_examples: int = 100) -> None:
    """Checks that a function is a norm that can normalize gradients.

    Hypothesis tries float32 gradients of ranks 0 to 3, to find a gradient that breaks a
    rule. A norm must be

    - scalar: one number of a real dtype for each gradient,
    - non-negative,
    - zero only at zero: zero for a gradient of zeros, and for no other,
    - absolutely homogeneous: `norm(c * g) == abs(c) * norm(g)`, to 1e-4, for gradients
      of ordinary size and c from 2⁻¹⁰ to 2¹⁰ in size,
    - finite, and not lost to underflow, for entries of every size from the smallest
      normal number to the largest, if their absolute sum is finite,
    - repeatable: equal results for equal gradients,
    - traceable: the same when compiled by `jax.jit` or `tf.function`, and on PyTorch
      under `torch.func.vmap`, which `scope="unit"` uses.

    Args:
        function: Callable from a gradient to its norm, as for `register_norm`.
        max_examples: Integer, how many gradients to try for each rule. Defaults to 100.

    Raises:
        AssertionError: If the function breaks a rule. The message lists each broken
            rule, with the simplest gradient found that breaks it.
        TypeError: If `function` is not callable.
        ImportError: If Hypothesis is not installed.

    Example:
        >>> import keras_normopt
        >>> from keras import ops
        >>> keras_normopt.testing.check_norm(lambda g: ops.max(ops.abs(g)))
        >>> keras_normopt.testing.check_norm(
        ...     lambda g: ops.sum(ops.square(g))
        ... )  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        AssertionError: <lambda> breaks the rules for norms: ...
    """
    try:
        import hypothesis
        from hypothesis import strategies as st
        from hypothesis.extra.numpy import arrays
    except ImportError as error:
        raise ImportError(
            "`check_norm` searches with Hypothesis, which could not be imported: "
            f"{error}. Run `pip install hypothesis`."
        ) from error
    if not callable(function):
        raise TypeError(
            "`function` must be a callable from a gradient to its norm. "
            f"Received: function={function!r}"
        )
    ordinary = st.floats(-8, 8, width=32).map(
        lambda x: 0.0 if abs(x) < 2**-8 else round(x, 2)
    )
    exponents = st.integers(_LIMITS.minexp, _LIMITS.maxexp - 8)
    any_size = st.builds(
        lambda sign, exponent: sign * 2.0**exponent, st.sampled_from([1, -1]), exponents
    )

    def gradients(elements):
        return st.sampled_from(_SHAPES).flatmap(
            lambda shape: arrays("float32", shape, elements=elements)
        )

    searches = {
        _is_scalar: [gradients(ordinary)],
        _is_non_negative: [gradients(ordinary)],
        _is_zero_only_at_zero: [gradients(ordinary)],
        _is_homogeneous: [
            gradients(ordinary),
            st.integers(-10, 10).map(lambda exponent: 2.0**exponent),
            st.booleans(),
        ],
        _is_finite: [gradients(any_size)],
        _is_repeatable: [gradients(ordinary)],
        _is_traceable: [gradients(ordinary)],
    }
    failures = []
    for check, strategies in searches.items():
        failure = _search(hypothesis, check, function, strategies, max_examples)
        if failure:
            name = check.__name__.removeprefix("_is_").replace("_", " ")
            name = name.replace("non ", "non-")
            failures.append(f"- It must be {name}, but {failure}.")
    if failures:
        raise AssertionError(
            f"{function_name(function)} breaks the rules for norms:\n"
            + "\n".join(failures)
        )


def _search(hypothesis, check, function, strategies, max_examples):
    """Returns the message of the simplest failure, or `None`."""

    # Stop at one kind of failure for each check, and write no files.
    @hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(hypothesis.strategies.tuples(*strategies))
    def searched(arguments):
        check(function, *arguments)

    try:
        searched()
    except Exception as error:
        return (
            f"{error}" if isinstance(error, _ViolationError) else f"it raises {error!r}"
        )
    return None


class _ViolationError(AssertionError):
    pass


def _norm_of(function, gradient):
    result = ops.convert_to_tensor(function(ops.convert_to_tensor(gradient)))
    return ops.convert_to_numpy(result)


def _norm_as_float(function, gradient):
    """Returns the norm as a float. Another check rejects what is not a scalar."""
    return float(np.max(_norm_of(function, gradient)))


def _is_scalar(function, gradient):
    value = _norm_of(function, gradient)
    if value.shape != () or not np.issubdtype(value.dtype, np.floating):
        raise _ViolationError(
            f"for {_format(gradient)} it returns a tensor of shape {value.shape} and "
            f"dtype {value.dtype}, not one floating-point number"
        )


def _is_non_negative(function, gradient):
    value = _norm_of(function, gradient)
    if not np.all(value >= 0):
        raise _ViolationError(f"for {_format(gradient)} it returns {value}")


def _is_zero_only_at_zero(function, gradient):
    value = _norm_as_float(function, gradient)
    if (value == 0) == bool(np.any(gradient)):
        raise _ViolationError(f"for {_format(gradient)} it returns {value}")


def _is_homogeneous(function, gradient, factor, negative):
    factor = -factor if negative else factor
    value, scaled = (
        _norm_as_float(function, gradient),
        _norm_as_float(function, factor * gradient),
    )
    if not math.isclose(scaled, abs(factor) * value, rel_tol=_RTOL, abs_tol=1e-30):
        raise _ViolationError(
            f"for {_format(gradient)} it returns {value}, and for {factor} times this "
            f"gradient it returns {scaled} instead of {abs(factor) * value}"
        )


def _is_finite(function, gradient):
    value = _norm_of(function, gradient)
    if not np.all(np.isfinite(value)) or not np.all(value):
        raise _ViolationError(
            f"for {_format(gradient)} it returns {value}. First divide by the largest "
            "magnitude m, as in `norm(g) = m * norm(g / m)`"
        )


def _is_repeatable(function, gradient):
    first, second = _norm_of(function, gradient), _norm_of(function, gradient)
    if not np.array_equal(first, second, equal_nan=True):
        raise _ViolationError(
            f"for {_format(gradient)} it returns {first}, and then {second}"
        )


def _is_traceable(function, gradient):
    eager = _norm_of(function, gradient)
    traced = ops.convert_to_numpy(
        _compile(function, gradient.shape)(ops.convert_to_tensor(gradient))
    )
    if not np.allclose(traced, eager, rtol=_RTOL, atol=1e-30, equal_nan=True):
        raise _ViolationError(
            f"for {_format(gradient)} it returns {eager}, but {traced} if compiled"
        )


@functools.lru_cache(maxsize=len(_SHAPES))
def _compile(function, shape):
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False)  # As Keras traces a step.
    import torch

    return lambda gradient: torch.func.vmap(function)(gradient[None])[0]


def _format(gradient):
    return np.array2string(gradient, separator=", ").replace("\n", "")
