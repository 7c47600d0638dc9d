"""Tests that `check_norm` accepts the built-in norms and finds planted faults."""

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
def test_built_in_norms_pass_check_norm(name):
    # Few gradients are enough: test_properties tests the same with many gradients.
    check_norm(getattr(norms, name), max_examples=10)


def l4(gradient):
    largest = ops.max(ops.abs(gradient))
    safe = ops.where(ops.equal(largest, 0), ops.ones_like(largest), largest)
    return largest * ops.sum((gradient / safe) ** 4) ** 0.25


def test_a_correct_custom_norm_passes_check_norm():
    check_norm(l4)


def squared(gradient):
    return ops.sum(ops.square(gradient))


def per_entry(gradient):
    return ops.abs(gradient)


def total(gradient):
    return ops.sum(gradient)


def overflowing(gradient):
    return ops.sqrt(ops.sum(ops.square(gradient)))


def positive_part(gradient):
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
        (
            squared,
            "homogeneous",
            "for 1. it returns 1.0, and for 2.0 times this gradient it returns 4.0",
        ),
        (per_entry, "scalar", r"for \[0.\] it returns a tensor of shape \(1,\)"),
        (total, "non-negative", "for -1. it returns -1.0"),
        (overflowing, "finite", r"for 1.8\d*e\+19 it returns inf"),
        (positive_part, "zero only at zero", "for -1. it returns 0.0"),
        (floored, "zero only at zero", "for 0. it returns 0.001"),
        (constant, "scalar", r"for 0. it returns a tensor of shape \(\) and dtype int"),
        (Counting(), "repeatable", "and then"),
        (concrete, "traceable", "it raises"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_check_norm_names_a_fault_with_a_counterexample(
    function, point, counterexample
):
    with pytest.raises(
        AssertionError, match=f"must be {point}, but .*{counterexample}"
    ):
        check_norm(function, max_examples=20)


def test_check_norm_lists_every_fault():
    with pytest.raises(AssertionError, match="breaks the rules for norms:") as caught:
        check_norm(total, max_examples=20)
    points = ["non-negative", "homogeneous"]
    assert [p for p in points if f"\n- It must be {p}, " in str(caught.value)] == points


@pytest.mark.parametrize("given", [None, "l2", 5])
def test_check_norm_refuses_anything_but_a_function(given):
    with pytest.raises(TypeError, match="`function` must be a callable"):
        check_norm(given)


def test_check_norm_writes_no_files_and_restores_global_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_norm(norms.l1, max_examples=5)
    assert not list(tmp_path.iterdir())
    assert keras.backend.floatx() == "float32"
    assert np.random.get_state()[1][0] == np.random.RandomState(0).get_state()[1][0]


def test_without_hypothesis_check_norm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match="pip install hypothesis"):
        check_norm(l4)
