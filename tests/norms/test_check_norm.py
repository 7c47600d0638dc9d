"""`check_norm` passes every norm of ours and catches faults that were planted."""

import sys

import keras
import numpy as np
import pytest
from keras import ops

from helpers import oracle
from keras_normopt import norms
from keras_normopt.testing import check_norm

pytestmark = pytest.mark.newest_keras


@pytest.mark.parametrize("name", oracle.NORMS)
def test_our_own_norms_pass(name):
    # For few gradients: test_properties asks the same of many.
    check_norm(getattr(norms, name), max_examples=10)


def l4(gradient):
    largest = ops.max(ops.abs(gradient))
    safe = ops.where(ops.equal(largest, 0), ops.ones_like(largest), largest)
    return largest * ops.sum((gradient / safe) ** 4) ** 0.25


def test_a_right_norm_of_a_user_passes():
    check_norm(l4)


def squared(gradient):
    return ops.sum(ops.square(gradient))


def per_entry(gradient):
    return ops.abs(gradient)


def total(gradient):
    return ops.sum(gradient)


def overflowing(gradient):
    return ops.sqrt(ops.sum(ops.square(gradient)))


def blind(gradient):
    return ops.max(ops.maximum(gradient, ops.zeros_like(gradient)))


def floored(gradient):
    return ops.max(ops.abs(gradient)) + 1e-3


def constant(gradient):
    return 1


class Counting:
    calls = 0

    def __call__(self, gradient):
        self.calls += 1
        return ops.max(ops.abs(gradient)) * self.calls


def concrete(gradient):
    return ops.convert_to_tensor(float(ops.max(ops.abs(gradient))), "float32")


@pytest.mark.parametrize(
    ("function", "point", "counterexample"),
    [
        (squared, "homogeneous", "of 1. it is 1.0, and of 2.0 times that it is 4.0"),
        (per_entry, "scalar", r"of \[0.\] it is a tensor of shape \(1,\)"),
        (total, "non negative", "of -1. it is -1.0"),
        (overflowing, "finite", r"of 1.8\d*e\+19 it is inf"),
        (blind, "zero only at zero", "of -1. it is 0.0"),
        (floored, "zero only at zero", "of 0. it is 0.001"),
        (constant, "scalar", r"of 0. it is a tensor of shape \(\) and dtype int"),
        (Counting(), "repeatable", "and then"),
        (concrete, "traceable", "it raises"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_planted_fault_is_named_with_a_counterexample(
    function, point, counterexample
):
    with pytest.raises(AssertionError, match=f"not {point}: .*{counterexample}"):
        check_norm(function, max_examples=20)


def test_every_fault_is_listed():
    with pytest.raises(AssertionError, match="is no norm to normalize by:") as caught:
        check_norm(total, max_examples=20)
    points = ["non negative", "homogeneous"]
    assert [p for p in points if f"\n- not {p}: " in str(caught.value)] == points


@pytest.mark.parametrize("given", [None, "l2", 5])
def test_what_is_no_function_is_refused(given):
    with pytest.raises(TypeError, match="`function` must be a callable"):
        check_norm(given)


def test_neither_state_nor_files_are_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_norm(norms.l1, max_examples=5)
    assert not list(tmp_path.iterdir())
    assert keras.backend.floatx() == "float32"
    assert np.random.get_state()[1][0] == np.random.RandomState(0).get_state()[1][0]


def test_without_hypothesis_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match="pip install hypothesis"):
        check_norm(l4)
