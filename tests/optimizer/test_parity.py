"""Tests that a normalized optimizer equals its base on normalized gradients."""

import inspect
import itertools

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import oracle
from helpers.stored import stored

CLASSES = list(keras_normopt.optimizers.NORMALIZED.values())
STEPS = 4

# Moments remember the magnitudes of the steps. A single magnitude for all steps would
# cancel out in many update rules.
SCALES = [1e3, 1.0, 1e-9, 1e-4]


def gradients():
    rng = np.random.default_rng(0)
    for scale in SCALES:
        yield [
            (scale * rng.normal(size=shape)).astype("float32")
            for shape in [(4, 3), (3,), (2, 2, 3), ()]
        ]


def train(optimizer, steps):
    """Returns every variable and every slot after the steps."""
    rng = np.random.default_rng(1)
    variables = [
        keras.Variable(rng.normal(size=gradient.shape).astype("float32"))
        for gradient in next(gradients())
    ]
    for step in steps:
        optimizer.apply_gradients(
            zip([ops.convert_to_tensor(g) for g in step], variables, strict=True)
        )
    return [*map(ops.convert_to_numpy, variables), *stored(optimizer)]


def base_of(cls):
    return getattr(keras.optimizers, cls.__name__.removeprefix("Normalized"))


def assert_same(results, expected, **tolerance):
    for result, value in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, value, **tolerance)


# Every base gets normalized gradients, so one norm for each base is enough.
@pytest.mark.parametrize(
    ("cls", "norm"),
    [
        *zip(CLASSES, itertools.cycle(oracle.NORMS)),
        *((keras_normopt.NormalizedSGD, norm) for norm in list(oracle.NORMS)[1:]),
    ],
)
@pytest.mark.every_base
def test_each_optimizer_equals_its_base_on_normalized_gradients(cls, norm):
    normalized_by_hand = [
        [oracle.normalize(norm, g).astype("float32") for g in step]
        for step in gradients()
    ]
    results = train(cls(norm=norm), gradients())
    expected = train(base_of(cls)(), normalized_by_hand)
    # Muon's five iterations of a polynomial of degree 5 amplify rounding errors.
    rtol = 1e-3 if cls.__name__ == "NormalizedMuon" else 2e-5
    assert_same(results, expected, rtol=rtol, atol=1e-6)
    unnormalized = train(base_of(cls)(), gradients())
    with pytest.raises(AssertionError):  # The comparison can fail.
        assert_same(results, unnormalized, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.every_base
def test_norm_none_equals_the_base_exactly(cls):
    assert_same(
        train(cls(norm=None), gradients()),
        train(base_of(cls)(), gradients()),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("cls", CLASSES)
def test_the_arguments_are_those_of_the_base_plus_our_options(cls):
    parameters = dict(inspect.signature(cls).parameters)
    assert parameters.pop("norm").kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters.pop("scope").default == "variable"
    assert parameters.pop("exclude").default == ()
    assert parameters.pop("step_size").default is None
    assert parameters.pop("track_norms").default is False
    assert parameters.pop("apply_to").default == "gradient"
    assert parameters.pop("centralize").default is False
    assert parameters.pop("norm_epsilon").default is None
    assert parameters.pop("axes").default is None
    assert parameters.pop("direction").default is None
    assert parameters == dict(inspect.signature(base_of(cls)).parameters)
    assert cls().norm == "l2"
    assert cls().norm_epsilon == 1e-30


@pytest.mark.parametrize("cls", CLASSES)
def test_each_optimizer_saves_only_the_variables_of_its_base(cls):
    variable = keras.Variable(np.ones((2, 2)))
    optimizer, base = cls(), base_of(cls)()
    optimizer.build([variable])
    base.build([variable])
    assert [v.shape for v in stored(optimizer)] == [v.shape for v in stored(base)]


def test_one_step_of_sgd_by_hand():
    variable = keras.Variable([1.0, 1.0])
    optimizer = keras_normopt.NormalizedSGD(learning_rate=0.1)
    optimizer.apply_gradients([(ops.convert_to_tensor([3e-9, -4e-9]), variable)])
    np.testing.assert_allclose(variable, [1 - 0.06, 1 + 0.08], rtol=1e-6)


def test_positional_arguments_are_those_of_the_base():
    optimizer = keras_normopt.NormalizedSGD(0.5, 0.9, True, norm="max")
    assert (float(optimizer.learning_rate), optimizer.momentum) == (0.5, 0.9)
    assert optimizer.nesterov is True
