"""The gradient of an embedding, sparse on TensorFlow, with indices that repeat."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
import oracle

TOKENS = np.array([[1, 1, 4], [4, 1, 0]])
TARGETS = np.array([[1.0, -2.0], [30.0, 0.5]], "float32")
TABLE = np.linspace(-1, 1, 12).reshape(6, 2).astype("float32")


def dense_gradient():
    """Of the mean squared error of the sum over tokens of their rows."""
    error = TABLE[TOKENS].sum(axis=1) - TARGETS
    gradient = np.zeros_like(TABLE)
    np.add.at(gradient, TOKENS, 2 * error[:, None, :] / error.size)
    return gradient


def make_model(optimizer, **compile_arguments):
    embed = keras.layers.Embedding(*TABLE.shape)
    tokens = keras.Input((3,), dtype="int32")
    model = keras.Model(tokens, keras.layers.Lambda(sum_tokens)(embed(tokens)))
    embed.set_weights([TABLE])
    model.compile(optimizer=optimizer, loss="mse", **compile_arguments)
    return model


def sum_tokens(rows):
    return ops.sum(rows, axis=1)


@pytest.mark.parametrize("run_eagerly", [False, True])
# A base sees a normalized gradient, sparse or not, whatever the norm was.
@pytest.mark.parametrize(
    ("norm", "base"),
    [*zip(oracle.NORMS, itertools.cycle(["SGD", "Adam", "RMSprop"]))],
)
def test_equals_the_dense_step(base, norm, run_eagerly):
    cls = getattr(keras_normopt, f"Normalized{base}")
    model = make_model(cls(0.5, norm=norm), run_eagerly=run_eagerly)
    model.train_on_batch(TOKENS, TARGETS)

    expected = keras.Variable(TABLE)
    gradient = oracle.normalize(norm, dense_gradient()).astype("float32")
    plain = getattr(keras.optimizers, base)(0.5)
    plain.apply([ops.convert_to_tensor(gradient)], [expected])
    np.testing.assert_allclose(
        model.get_weights()[0], ops.convert_to_numpy(expected), rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("norm", oracle.NORMS)
def test_untouched_rows_stay_where_they_are(norm):
    model = make_model(keras_normopt.NormalizedSGD(0.5, norm=norm))
    model.train_on_batch(TOKENS, TARGETS)
    untouched = [2, 3, 5]
    np.testing.assert_array_equal(model.get_weights()[0][untouched], TABLE[untouched])


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="only there is it sparse"
)
@pytest.mark.parametrize("compiled", ["eager", "graph", "xla"])
def test_stays_sparse(compiled, monkeypatch):
    import tensorflow as tf

    received = []
    original = keras.optimizers.SGD.update_step

    def spy(self, gradient, variable, learning_rate):
        received.append(gradient)
        return original(self, gradient, variable, learning_rate)

    monkeypatch.setattr(keras.optimizers.SGD, "update_step", spy)
    optimizer = keras_normopt.NormalizedSGD(1.0)
    variable = keras.Variable(np.zeros((4, 2)))
    optimizer.build([variable])

    def step(values, indices):
        slices = tf.IndexedSlices(values, indices, tf.constant([4, 2]))
        optimizer.apply_gradients([(slices, variable)])

    if compiled != "eager":
        step = tf.function(step, jit_compile=compiled == "xla")
    step(tf.constant([[3.0, 0.0], [0.0, 4.0], [0.0, 8.0]]), tf.constant([1, 3, 1]))
    (gradient,) = received
    assert isinstance(gradient, tf.IndexedSlices)
    dense = np.array([[0, 0], [3, 8], [0, 0], [0, 4]])
    np.testing.assert_allclose(
        variable.numpy(), -dense / np.linalg.norm(dense), rtol=1e-6
    )


@pytest.mark.parametrize("norm", ["l2", "std", "min_max"])
def test_replicas(norm, strategy):
    with strategy.scope():
        model = make_model(
            keras_normopt.NormalizedSGD(0.5, norm=norm), jit_compile=False
        )
    model.fit(TOKENS, TARGETS, batch_size=2, verbose=0)
    expected = TABLE - 0.5 * oracle.normalize(norm, dense_gradient())
    np.testing.assert_allclose(
        model.get_weights()[0], expected.astype("float32"), rtol=2e-5, atol=1e-6
    )


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX's sparse arrays")
@pytest.mark.parametrize("norm", ["l2", "std", "min_max"])
def test_sparse_arrays_of_jax(norm):
    from jax.experimental import sparse

    dense = dense_gradient()
    gradient = sparse.BCOO.fromdense(dense)
    variable = keras.Variable(TABLE)
    optimizer = keras_normopt.NormalizedSGD(0.5, norm=norm)
    optimizer.apply([gradient], [variable])
    expected = TABLE - 0.5 * oracle.normalize(norm, dense)
    np.testing.assert_allclose(
        ops.convert_to_numpy(variable), expected.astype("float32"), rtol=2e-5, atol=1e-6
    )
