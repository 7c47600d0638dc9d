"""Tests `normalized` with base optimizers in the style of other libraries."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import oracle

GRADIENT = np.array([3e-4, -4e-4], "float32")


class TogetherSGD(keras.optimizers.SGD):
    """Updates all variables in one function, as AdEMAMix, Prodigy and SOAP do."""

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        for grad, variable in zip(grads, trainable_variables, strict=True):
            self.assign_sub(variable, ops.cast(learning_rate, grad.dtype) * grad)


class CountingSGD(keras.optimizers.SGD):
    """Updates its own variable `steps` once per step, and then the weights.

    Nadam works in the same way.
    """

    def build(self, variables):
        super().build(variables)
        self.steps = self.add_variable((), name="steps")

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self.assign_add(self.steps, ops.ones(()))
        super()._backend_update_step(grads, trainable_variables, learning_rate)


class Lookahead(keras.optimizers.SGD):
    """Wraps another optimizer, whose steps change the fast weights.

    Slow weights follow the fast weights every few steps, and replace them.
    """

    def __init__(self, optimizer, period=2, slow_step=0.5, **kwargs):
        super().__init__(**kwargs)
        self.inner, self.period, self.slow_step = optimizer, period, slow_step
        self.slow, self.count = None, 0

    def apply_gradients(self, grads_and_vars):
        pairs = list(grads_and_vars)
        variables = [v for _, v in pairs]
        if self.slow is None:
            self.slow = [ops.convert_to_numpy(v) for v in variables]
        self.inner.apply_gradients(pairs)
        self.count += 1
        if self.count % self.period == 0:
            for i, variable in enumerate(variables):
                fast = ops.convert_to_numpy(variable)
                self.slow[i] += self.slow_step * (fast - self.slow[i])
                variable.assign(self.slow[i])


def step(optimizer, variable, how):
    gradients = [ops.convert_to_tensor(GRADIENT)]
    if how == "compiled" and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        optimizer.build([variable])
        tf.function(lambda g: optimizer.apply([g], [variable]))(*gradients)
    else:
        optimizer.apply(gradients, [variable])
    return ops.convert_to_numpy(variable)


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("norm", ["l2", "max", None])
@pytest.mark.parametrize("base", [TogetherSGD, CountingSGD])
def test_each_third_party_base_gets_the_normalized_gradient(base, norm, how):
    optimizer = keras_normopt.normalized(base)(0.1, norm=norm)
    moved = step(optimizer, keras.Variable(np.zeros(2)), how)
    expected = oracle.normalize(norm, GRADIENT) if norm else GRADIENT
    np.testing.assert_allclose(moved, -0.1 * np.float64(expected), rtol=1e-5)
    if base is CountingSGD:
        assert float(ops.convert_to_numpy(optimizer.steps)) == 1


@pytest.mark.parametrize("base", [TogetherSGD, CountingSGD])
def test_each_step_of_fit_with_a_third_party_base_has_the_length_of_the_rate(base):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    model.compile(keras_normopt.normalized(base)(0.1, momentum=0.0), loss="mse")
    before = model.get_weights()
    model.fit(np.ones((4, 2)), np.ones((4, 3)), batch_size=4, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.linalg.norm(new - old) == pytest.approx(0.1, rel=1e-4)


def test_replicas_make_normalized_steps_with_a_third_party_base(strategy):
    with strategy.scope():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
        optimizer = keras_normopt.normalized(CountingSGD)(0.1)
        model.compile(optimizer, loss="mse", jit_compile=False)
    before = model.get_weights()
    x = np.random.default_rng(0).normal(size=(4, 2))
    model.fit(x, np.ones((4, 3)), batch_size=4, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.linalg.norm(new - old) == pytest.approx(0.1, rel=1e-4)


def test_a_wrapper_is_refused_but_may_wrap_a_normalized_optimizer():
    advice = r"wrap an optimizer of keras_normopt: `Lookahead\("
    with pytest.raises(ValueError, match=advice):
        keras_normopt.normalized(Lookahead)
    optimizer = Lookahead(keras_normopt.NormalizedSGD(0.1), period=2, slow_step=0.5)
    variable = keras.Variable(np.zeros(2))
    for _ in range(2):
        optimizer.apply_gradients([(ops.convert_to_tensor(GRADIENT), variable)])
    # The optimizer makes two steps of length 0.1, and goes half the way back.
    expected = -0.1 * oracle.normalize("l2", GRADIENT)
    np.testing.assert_allclose(
        ops.convert_to_numpy(variable), np.float64(expected), rtol=1e-5
    )
