"""Tests what custom norms may return, and which errors they cause."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import by_hand
from keras_normopt import norms
from keras_normopt.norms import _registry, _user_norms

pytestmark = pytest.mark.newest_keras

BACKEND = keras.backend.backend()


def build(norm, shapes=((3, 4), (4,)), cls=keras_normopt.NormalizedSGD, **arguments):
    optimizer = cls(0.1, norm=norm, **arguments)
    optimizer.build([keras.Variable(np.ones(shape, "float32")) for shape in shapes])
    return optimizer


WRONG = {
    "sum": ops.sum,
    "mean": ops.mean,
    "largest": ops.max,
    "root of a sum": lambda g: ops.sqrt(ops.sum(g)),
    "logarithm": lambda g: ops.exp(ops.mean(ops.log(g))),
    "negative": lambda g: -norms.l2(g),
    "infinite": lambda g: norms.l2(g) / 0.0,
    "not of one entry": lambda g: (
        ops.sqrt(ops.sum(ops.square(g - ops.mean(g))) / 0)
        if g.shape == (1,)
        else norms.l2(g)
    ),
}


@pytest.mark.parametrize("cls", ["NormalizedSGD", "ClippedSGD"])
@pytest.mark.parametrize("name", WRONG)
def test_a_norm_that_returns_a_negative_or_non_finite_number_is_refused(name, cls):
    def theirs(gradient):
        return WRONG[name](gradient)

    message = r"norm=.*theirs returned (-|nan|inf).* for a gradient of shape \(.*abs"
    with pytest.raises(ValueError, match=message):
        build(theirs, [(3, 4), (1,)], getattr(keras_normopt, cls))


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_fit_refuses_a_wrong_norm_before_weights_change(apply_to):
    optimizer = keras_normopt.NormalizedSGD(norm=ops.sum, apply_to=apply_to)
    model = by_hand.make_model(optimizer)
    with pytest.raises(ValueError, match=r"norm=sum returned -.*check_norm"):
        by_hand.fit(model)
    by_hand.assert_same(model.get_weights(), by_hand.START)


@pytest.mark.parametrize("cls", ["NormalizedSGD", "ClippedSGD"])
@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_weights_do_not_change_after_build_has_failed(cls, apply_to):
    optimizer = getattr(keras_normopt, cls)(norm=ops.sum, apply_to=apply_to)
    model = by_hand.make_model(optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"norm=sum returned -"):
            by_hand.fit(model)
    by_hand.assert_same(model.get_weights(), by_hand.START)


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_a_step_without_a_complete_build_raises_an_error(apply_to):
    class Incomplete(keras_normopt.NormalizedSGD):
        def _make_transforms(self, variables):
            raise MemoryError

    optimizer = Incomplete(apply_to=apply_to)
    variable = keras.Variable(np.ones(2, "float32"))
    for error in (MemoryError, RuntimeError):
        with pytest.raises(error):
            optimizer.apply([ops.ones(2)], [variable])
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), 1.0)


def test_a_function_that_returns_a_gradient_must_not_return_nan(custom_norms):
    def theirs(gradient):
        return gradient / ops.sqrt(ops.sum(gradient))

    _registry.register_normalizer("theirs", theirs)
    with pytest.raises(
        ValueError, match=r"normalized gradient.*norm=.*theirs ret.*nan"
    ):
        build("theirs")
    _registry.register_normalizer("negative", lambda g: -g)
    build("negative")


@pytest.mark.parametrize("scope", ["variable", "unit", "layer", "global"])
def test_build_tries_a_custom_norm_on_the_ranks_and_dtypes_of_a_step(scope):
    calls = []

    def theirs(gradient):
        calls.append((tuple(gradient.shape), gradient.dtype))
        return ops.max(ops.abs(gradient))

    shapes = [(3, 4), (4,), (2, 3)]
    optimizer = build(theirs, shapes, scope=scope)
    tried = set(calls)
    ranks = [len(shape) for shape, _ in tried]
    assert len(calls) == 2 * len(set(ranks)) == 2 * len(ranks)
    calls.clear()
    gradients = [ops.ones(shape) for shape in shapes]
    optimizer.apply(gradients, optimizer._trainable_variables)
    assert tried <= set(calls)


def test_a_custom_norm_may_reject_shapes_that_the_model_lacks():
    def theirs(gradient):
        if tuple(gradient.shape) not in [(3, 4), (4,)]:
            raise NotImplementedError
        return norms.l2(gradient)

    model = by_hand.make_model(keras_normopt.NormalizedSGD(0.1, norm=theirs))
    by_hand.fit(model)
    expected = by_hand.train(keras.optimizers.SGD(0.1))
    by_hand.assert_same(model.get_weights(), expected)


def test_build_does_not_try_a_norm_on_large_gradients():
    shape = (_user_norms._LARGEST + 1,)
    assert build(ops.sum, [shape]).built
    with pytest.raises(ValueError, match="norm=sum returned"):
        build(ops.sum, [shape, (2,)])


def test_build_does_not_try_built_in_norms(monkeypatch):
    monkeypatch.setattr(_user_norms.UserNorm, "check", None)
    for norm in (*norms.__all__, norms.l2, None):
        build(norm)
    with pytest.raises(TypeError, match="not callable"):
        build(lambda g: norms.l2(g))


def by_numpy(gradient):
    return np.sqrt(np.sum(np.square(np.asarray(gradient))))


def by_float(gradient):
    return float(ops.sum(ops.abs(gradient)))


def by_branch(gradient):
    length = norms.l2(gradient)
    return length if length > 1 else ops.ones_like(length)


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch compiles no step by itself")
# The optimizer tries a function only on the smaller gradient.
@pytest.mark.parametrize("size", [3, _user_norms._LARGEST])
@pytest.mark.parametrize("norm", [by_numpy, by_float, by_branch])
def test_a_norm_that_needs_concrete_values_is_refused_in_compiled_steps(norm, size):
    inputs, dense = keras.Input((size,)), keras.layers.Dense(2, use_bias=False)
    model = keras.Model(inputs, dense(inputs))
    model.compile(keras_normopt.NormalizedSGD(norm=norm), "mse")
    message = rf"norm={norm.__name__} needs the values.*Received: \w+ of.*keras\.ops"
    with pytest.raises(TypeError, match=message):
        model.fit(np.ones((2, size)), np.ones((2, 2)), verbose=0)


@pytest.mark.parametrize("norm", [by_numpy, by_float])
def test_a_norm_that_needs_concrete_values_is_refused_for_units(norm):
    # A vectorized map computes all units, so no backend has concrete values.
    optimizer = build(norm, scope="unit")
    weights = optimizer._trainable_variables
    with pytest.raises(TypeError, match=f"norm={norm.__name__} needs the values"):
        optimizer.apply([ops.ones((3, 4)), ops.ones(4)], weights)


@pytest.mark.parametrize("norm", [by_numpy, by_float, by_branch])
def test_a_norm_that_needs_concrete_values_works_eagerly(norm):
    model = by_hand.make_model(keras_normopt.NormalizedSGD(norm=norm), run_eagerly=True)
    assert np.isfinite(by_hand.fit(model, epochs=1).history["loss"]).all()


@pytest.mark.parametrize("size", [3, _user_norms._LARGEST])
def test_errors_of_a_custom_norm_reach_the_user(size):
    class TheirError(Exception):
        pass

    def theirs(gradient):
        raise TheirError("mine")

    inputs = keras.Input((size,))
    model = keras.Model(inputs, keras.layers.Dense(2, use_bias=False)(inputs))
    model.compile(keras_normopt.NormalizedSGD(norm=theirs), "mse")
    with pytest.raises(TheirError, match="mine"):
        model.fit(np.ones((2, size)), np.ones((2, 2)), verbose=0)
