"""Tests derivatives of the loss after a step, as in meta-learning.

These tests skip TensorFlow. Its steps assign to variables, and assignments have no
derivative. On PyTorch, Keras's own optimizers step under `no_grad`, so the tests use
another base.
"""

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from keras_normopt import directions, norms

pytestmark = pytest.mark.newest_keras

BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    pytest.skip("Keras has no stateless step on TensorFlow", allow_module_level=True)
if BACKEND == "jax":
    import jax
else:
    import torch


class PlainSGD(keras.optimizers.Optimizer):
    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, ops.cast(learning_rate, variable.dtype) * gradient)


NormalizedSGD = keras_normopt.normalized(PlainSGD)
ClippedSGD = keras_normopt.clipped(PlainSGD)
RNG = np.random.default_rng(0)
SHAPES = [(3, 4), (4,), (4, 2)]
GRADIENTS = [RNG.normal(size=shape) for shape in SHAPES]
WEIGHTS = [RNG.normal(size=shape) for shape in SHAPES]
OPTIMIZERS = {
    f"{norm.__name__}, {scope}": lambda norm=norm, scope=scope: NormalizedSGD(
        0.1, norm=norm, scope=scope
    )
    for norm, scope in [
        (norms.l2, "variable"),
        (norms.l2, "unit"),
        (norms.l2, "global"),
        (norms.std, "unit"),
        (norms.max, "variable"),
        (norms.avg_l1_l2, "global"),
    ]
} | {
    "clipped": lambda: ClippedSGD(0.1, max_norm=0.5),
    "clipped units": lambda: ClippedSGD(0.1, max_norm=0.5, scope="unit"),
    "correlation": lambda: NormalizedSGD(0.1, step_size="gradient_correlation"),
    "weight norm": lambda: NormalizedSGD(0.1, step_size="weight_norm"),
    "clipped by weights": lambda: ClippedSGD(
        0.1, max_norm=keras_normopt.WeightNorm(0.2, minimum=0.1)
    ),
    "centralized": lambda: NormalizedSGD(0.1, centralize=True),
    "update": lambda: NormalizedSGD(0.1, apply_to="update"),
    "direction": lambda: NormalizedSGD(
        0.1,
        direction=directions.Orthogonal(steps=2, vectors="rows"),
        apply_to="update",
    ),
    "a floor above the norms": lambda: NormalizedSGD(
        0.1,
        direction=directions.Orthogonal(steps=1, vectors="sign"),
        norm_epsilon=100.0,
    ),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def loss_after_a_step(make, dtype):
    """Returns the loss after a step, as a function of gradients."""
    optimizer = make()
    variables = [keras.Variable(w, dtype=dtype) for w in WEIGHTS]
    optimizer.build(variables)
    state = [v.value for v in optimizer.variables]
    weights = [ops.convert_to_tensor(w, dtype) for w in WEIGHTS]

    def loss(gradients):
        stepped, _ = optimizer.stateless_apply(state, gradients, weights)
        return sum(ops.sum(w * w * w) for w in stepped)

    return loss


def test_stock_optimizers_on_pytorch_step_under_no_grad():
    if BACKEND != "torch":
        pytest.skip("for PyTorch")
    with pytest.raises(RuntimeError, match="does not require grad"):
        derivative(loss_after_a_step(keras.optimizers.SGD, "float32"))(GRADIENTS)


def derivative(loss, dtype="float32", compiled=False):
    """Returns the derivative of a loss, as a function of gradients."""
    if BACKEND == "jax":
        differentiate = jax.jit(jax.grad(loss)) if compiled else jax.grad(loss)
    else:

        def differentiate(tensors):
            tensors = [t.requires_grad_() for t in tensors]
            return torch.autograd.grad(loss(tensors), tensors)

    def evaluate(gradients):
        tensors = [ops.convert_to_tensor(g, dtype) for g in gradients]
        return [np.asarray(d) for d in differentiate(tensors)]

    return evaluate


@every_optimizer
def test_the_derivative_equals_finite_differences(make, float64):
    loss = loss_after_a_step(make, "float64")
    actual = derivative(loss, "float64")(GRADIENTS)
    for i, shape in enumerate(SHAPES):
        for index in [0, int(np.prod(shape)) - 1]:

            def at(change, i=i, index=index):
                moved = [g.copy() for g in GRADIENTS]
                moved[i].flat[index] += change
                value = loss([ops.convert_to_tensor(g, "float64") for g in moved])
                return float(ops.convert_to_numpy(value))

            expected = (at(1e-6) - at(-1e-6)) / 2e-6
            assert actual[i].flat[index] == pytest.approx(expected, rel=1e-5, abs=1e-8)


@every_optimizer
@pytest.mark.parametrize("compiled", [False, True])
def test_the_derivative_is_finite_for_zero_gradients(make, compiled):
    if compiled and BACKEND == "torch":
        pytest.skip("differentiated eagerly")
    differentiate = derivative(loss_after_a_step(make, "float32"), compiled=compiled)
    kernel, bias, other = GRADIENTS
    without_a_unit = kernel * [1, 0, 1, 1]
    for gradients in (
        [0 * kernel, 0 * bias, 0 * other],
        [kernel, 0 * bias, other],
        [1e-25 * kernel, 0 * bias, 1e-25 * other],
        [without_a_unit, bias, other],
        [1e25 * without_a_unit, 1e25 * bias, 1e25 * other],
    ):
        for result in differentiate(gradients):
            assert np.isfinite(result).all()


@pytest.mark.skipif(
    BACKEND != "jax", reason="only JAX has vmap of a derivative, which MAML uses"
)
@every_optimizer
def test_a_vectorized_derivative_of_many_tasks_is_finite(make):
    loss = loss_after_a_step(make, "float32")
    scales = np.array([1, 0, 1e-12, 1e12, 1e-25, 1e22], "float32")
    stacked = [np.stack([s * g for s in scales]).astype("float32") for g in GRADIENTS]
    for result in jax.jit(jax.vmap(jax.grad(loss)))(stacked):
        assert np.isfinite(result).all()
