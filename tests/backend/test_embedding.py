"""Tests gradients of embeddings, which are sparse on TensorFlow.

Indices of rows may be repeated.
"""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import oracle
from helpers.oracle import orthogonalized
from keras_normopt import directions
from keras_normopt._backend import sparse

TOKENS = np.array([[1, 1, 4], [4, 1, 0]])
TARGETS = np.array([[1.0, -2.0], [30.0, 0.5]], "float32")
TABLE = np.linspace(-1, 1, 12).reshape(6, 2).astype("float32")


def dense_gradient():
    """Returns the gradient of the loss with respect to the table, from NumPy."""
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
# One base for each norm is enough: a base receives only normalized gradients.
@pytest.mark.parametrize(
    ("norm", "base"),
    [*zip(oracle.NORMS, itertools.cycle(["SGD", "Adam", "RMSprop"]))],
)
def test_a_sparse_step_equals_the_dense_step(base, norm, run_eagerly):
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
def test_rows_without_a_gradient_do_not_change(norm):
    model = make_model(keras_normopt.NormalizedSGD(0.5, norm=norm))
    model.train_on_batch(TOKENS, TARGETS)
    untouched = [2, 3, 5]
    np.testing.assert_array_equal(model.get_weights()[0][untouched], TABLE[untouched])


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="needs TensorFlow")
@pytest.mark.parametrize("compiled", ["eager", "graph", "xla"])
def test_a_normalized_gradient_stays_sparse(compiled, monkeypatch):
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


KERNEL = np.array([[0.3, -2.0], [0.0, 1.0]])
# Indices with repetitions, one index for each row, and no indices.
ROWS = {"some": [1, 4, 1], "every": [5, 4, 3, 2, 1, 0], "none": []}


@pytest.fixture
def never_dense(monkeypatch):
    """Fails if the package makes a sparse gradient dense."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("needs sparse gradients of TensorFlow")
    densify = sparse.densify

    def refuse(gradient):
        assert not sparse.is_sparse(gradient)
        return densify(gradient)

    monkeypatch.setattr(sparse, "densify", refuse)


def sparse_and_dense(rows):
    import tensorflow as tf

    values = np.random.default_rng(0).normal(size=(len(rows), 2))
    dense = np.zeros((6, 2))
    np.add.at(dense, np.array(rows, "int64"), values)
    slices = tf.IndexedSlices(
        tf.constant(values, "float32"), tf.constant(rows, "int64"), tf.constant([6, 2])
    )
    return slices, dense


def steps_of(optimizer, slices):
    import tensorflow as tf

    variables = [keras.Variable(np.zeros(shape)) for shape in [(6, 2), (2, 2)]]
    optimizer.build(variables)

    @tf.function
    def step():
        optimizer.apply([slices, tf.constant(KERNEL, "float32")], variables)

    step()
    return [-v.numpy() for v in variables]


# Each norm runs in each scope and with each kind of rows, but not with every pair of a
# scope and a kind.
CASES = [
    (norm, scope, list(ROWS)[(i + j) % 3])
    for i, norm in enumerate(oracle.NORMS)
    for j, scope in enumerate(["variable", "unit", "global"])
]


@pytest.mark.parametrize(("norm", "scope", "rows"), CASES)
def test_norms_never_make_a_sparse_gradient_dense(never_dense, norm, scope, rows):
    slices, dense = sparse_and_dense(ROWS[rows])
    steps = steps_of(keras_normopt.NormalizedSGD(1.0, norm=norm, scope=scope), slices)
    normalize = oracle.normalize_units if scope == "unit" else oracle.normalize
    expected = [normalize(norm, g) for g in (dense, KERNEL)]
    if scope == "global":
        size = oracle.norm(norm, np.concatenate([dense.ravel(), KERNEL.ravel()]))
        expected = [dense / size, KERNEL / size]
    for a, b in zip(steps, expected, strict=True):
        np.testing.assert_allclose(a, b.astype("float32"), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["max", "min_max", "std"])
def test_a_sparse_gradient_without_rows_has_norm_0(never_dense, norm):
    optimizer = keras_normopt.NormalizedSGD(1.0, norm=norm, track_norms=True)
    steps_of(optimizer, sparse_and_dense([])[0])
    table, _, total = optimizer.gradient_norms.values()
    assert table == 0
    assert total == pytest.approx(np.linalg.norm(KERNEL), rel=1e-6)


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
@pytest.mark.parametrize(
    "max_norm", [0.1, keras_normopt.RunningNorm(1.0, warmup=1)], ids=str
)
def test_clipping_and_tracking_never_make_a_sparse_gradient_dense(
    never_dense, max_norm, apply_to
):
    slices, dense = sparse_and_dense(ROWS["some"])
    optimizer = keras_normopt.ClippedSGD(
        1.0, max_norm=max_norm, apply_to=apply_to, track_norms=True
    )
    step, _ = steps_of(optimizer, slices)
    size = np.linalg.norm(dense)
    length = 0.1 if max_norm == 0.1 else size  # Warm-up does not clip.
    np.testing.assert_allclose(step, dense / size * length, rtol=2e-5, atol=1e-7)
    table, _, total = optimizer.gradient_norms.values()
    assert table == pytest.approx(size, rel=1e-5)
    assert total == pytest.approx(np.hypot(size, np.linalg.norm(KERNEL)), rel=1e-5)


@pytest.mark.parametrize("norm", ["l2", "std", "min_max"])
def test_replicas_sum_sparse_gradients_before_they_normalize(norm, strategy):
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
def test_jax_sparse_arrays_are_normalized(norm):
    from jax.experimental.sparse import BCOO

    dense = dense_gradient()
    gradient = BCOO.fromdense(dense)
    variable = keras.Variable(TABLE)
    optimizer = keras_normopt.NormalizedSGD(0.5, norm=norm)
    optimizer.apply([gradient], [variable])
    expected = TABLE - 0.5 * oracle.normalize(norm, dense)
    np.testing.assert_allclose(
        ops.convert_to_numpy(variable), expected.astype("float32"), rtol=2e-5, atol=1e-6
    )


# These axes make the table a kernel with six inputs.
AS_KERNEL = ((0,), (1,))
SIGN, ROOT = np.sign, np.sqrt(2)


def unit_rows(gradient):
    sizes = np.linalg.norm(gradient, axis=1, keepdims=True)
    return gradient / np.where(sizes == 0, 1, sizes)


@pytest.mark.parametrize(
    ("direction", "axes", "expected"),
    [
        ("sign", "embedding", SIGN),
        ("sign", "vector", SIGN),
        (directions.Sign("operator"), "embedding", SIGN),
        ("rows", "embedding", unit_rows),
        (directions.Rows("operator"), "embedding", lambda g: ROOT * unit_rows(g)),
    ],
    ids=["sign", "sign of a vector", "scaled sign", "rows", "scaled rows"],
)
@pytest.mark.parametrize(
    ("rows", "apply_to"),
    [("some", "gradient"), ("every", "update"), ("none", "update")],
)
def test_row_wise_directions_never_make_a_sparse_gradient_dense(
    never_dense, direction, axes, expected, rows, apply_to
):
    slices, dense = sparse_and_dense(ROWS[rows])
    optimizer = keras_normopt.NormalizedSGD(
        1.0, direction={".*": direction}, axes={".*": axes}, apply_to=apply_to
    )
    step, _ = steps_of(optimizer, slices)
    np.testing.assert_allclose(step, expected(dense), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("direction", "axes", "expected"),
    [
        ("orthogonal", AS_KERNEL, orthogonalized),
        ("rows", AS_KERNEL, lambda g: unit_rows(g.T).T),
        ("rows", "vector", lambda g: g / np.linalg.norm(g)),
        (directions.Sign("operator"), AS_KERNEL, lambda g: SIGN(g) / 6),
    ],
    ids=["orthogonal", "rows of a kernel", "rows of a vector", "sign of a kernel"],
)
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_other_directions_use_the_whole_table(direction, axes, expected, run_eagerly):
    optimizer = keras_normopt.NormalizedSGD(
        0.5, direction=direction, axes={"embeddings": axes}
    )
    model = make_model(optimizer, run_eagerly=run_eagerly)
    model.train_on_batch(TOKENS, TARGETS)
    step = model.get_weights()[0] - TABLE
    np.testing.assert_allclose(step, -0.5 * expected(dense_gradient()), atol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="needs TensorFlow")
@pytest.mark.parametrize("direction", ["sign", "rows"])
@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_row_wise_directions_allocate_nothing_as_large_as_the_table(
    direction, apply_to
):
    import tensorflow as tf

    size = 9973  # No other array of the step has this size.
    table = keras.Variable(np.zeros((size, 2)), name="embeddings")
    optimizer = keras_normopt.NormalizedSGD(direction=direction, apply_to=apply_to)
    optimizer.build([table])

    @tf.function
    def step(values, indices):
        slices = tf.IndexedSlices(values, indices, tf.constant([size, 2]))
        optimizer.apply([slices], [table])

    graph = step.get_concrete_function(tf.ones((3, 2)), tf.constant([1, 3, 1])).graph
    large = [
        operation.type
        for operation in graph.get_operations()
        for output in operation.outputs
        if output.shape.rank is None or size in output.shape
    ]
    # Reading a variable copies nothing.
    assert set(large) <= {"ReadVariableOp"}
