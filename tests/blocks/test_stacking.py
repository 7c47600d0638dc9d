"""Tests norms of stacked gradients, and the calls and the memory that they need."""

import gc
import math
import weakref

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import keras_normopt
from helpers import oracle
from helpers.single import make_gradients, normalize
from keras_normopt import norms
from keras_normopt._blocks import stacking
from keras_normopt._blocks.stacking import STACK_ENTRIES, STACK_SIZE
from keras_normopt._transforms import rescale
from keras_normopt.norms import _registry

pytestmark = pytest.mark.newest_keras

BACKEND = keras.backend.backend()
#: This many gradients do not fit in one stack. The number is lower on JAX and
#: TensorFlow, because XLA takes long to compile a stack.
MANY = (2 if BACKEND == "torch" else 1) * STACK_SIZE + 3

compilers = {"eager": lambda function: function}
if BACKEND == "jax":
    import jax

    compilers["jit"] = jax.jit
elif BACKEND == "tensorflow":
    import tensorflow as tf

    compilers["graph"] = tf.function
else:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode


def of_many_magnitudes(shape, number=MANY):
    """Returns gradients of one shape with many magnitudes, some of them zero."""
    rng = np.random.default_rng(0)
    magnitudes = [1.0, 1e-30, 1e30, 0.0, 1e-15]
    return [
        (rng.normal(size=shape) * magnitudes[i % len(magnitudes)]).astype("float32")
        for i in range(number)
    ]


# Every norm runs with the last entry of `compilers`. Eager JAX and TensorFlow compile
# each call for each shape, so they run only one norm of each kind.
every_norm = pytest.mark.parametrize(
    ("name", "compiled"),
    [
        pytest.param(name, compiler, id=f"{name}-{how}")
        for how, compiler in compilers.items()
        for name in oracle.NORMS
        if how == list(compilers)[-1] or name in ("l2", "std")
    ],
)


@every_norm
def test_each_stacked_gradient_has_its_own_norm(name, compiled):
    # Gradients of one shape fill more than a stack. A few gradients have other shapes.
    gradients = of_many_magnitudes((4, 3))
    gradients += of_many_magnitudes((5,), 6) + of_many_magnitudes((2, 2, 2), 6)
    gradients = gradients[::2] + gradients[1::2]
    norm = getattr(norms, name)
    results = compiled(lambda *g: normalize(g, norm))(*map(ops.array, gradients))
    for result, gradient in zip(results, gradients, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(result),
            oracle.normalize(name, gradient).astype("float64"),
            rtol=2e-5 if name == "std" else 3e-6,
            atol=1e-37,
        )


@every_norm
def test_each_stacked_layer_is_normalized_as_one_vector(name, compiled):
    kernels, biases = of_many_magnitudes((4, 3)), of_many_magnitudes((3,))
    second = [k[::-1].copy() for k in kernels]
    gradients = [*kernels, *biases, *second]
    blocks = [[i, i + MANY, i + 2 * MANY] for i in range(MANY)]
    norm = getattr(norms, name)
    results = compiled(lambda *g: normalize(g, norm, blocks=blocks))(
        *map(ops.array, gradients)
    )
    for block in blocks:
        vector = np.concatenate([gradients[i].ravel() for i in block])
        result = [ops.convert_to_numpy(results[i]).ravel() for i in block]
        np.testing.assert_allclose(
            np.concatenate(result),
            oracle.normalize(name, vector).astype("float64"),
            rtol=2e-5 if name == "std" else 3e-6,
            atol=1e-37,
        )


@every_norm
def test_each_stacked_unit_has_its_own_norm(name, compiled):
    gradients = of_many_magnitudes((2, 4, 3))
    norm = getattr(norms, name)
    results = compiled(lambda *g: normalize(g, norm, per_unit=True))(
        *map(ops.array, gradients)
    )
    for result, gradient in zip(results, gradients, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(result),
            oracle.normalize_units(name, gradient).astype("float64"),
            rtol=2e-5 if name == "std" else 3e-6,
            atol=1e-37,
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stacked_gradients_keep_half_precision(dtype):
    gradients = [ops.cast(g, dtype) for g in np.full((MANY, 2, 8), 0.25, "float32")]
    results = normalize(gradients, norms.avg_l1)
    for result in results:
        assert keras.backend.standardize_dtype(result.dtype) == dtype
        np.testing.assert_array_equal(
            ops.convert_to_numpy(ops.cast(result, "int32")), 1
        )


def test_norms_have_the_order_of_the_blocks():
    shapes = [(2,), (3,), (2,), (1, 2), (3,)]
    gradients = [np.full(s, i + 1.0, "float32") for i, s in enumerate(shapes)]
    gradients = make_gradients(gradients)
    measured = gradients.by_block(gradients.norms(norms.max.norm))
    assert [float(measured[i]) for i in range(5)] == [1, 2, 3, 4, 5]


def test_custom_norms_receive_one_gradient_at_a_time():
    shapes = []

    def norm(gradient):
        shapes.append(tuple(gradient.shape))
        return ops.sum(ops.abs(gradient))

    gradients = of_many_magnitudes((4, 3), 5) + of_many_magnitudes((2,), 5)
    results = normalize(list(map(ops.array, gradients)), norm)
    assert sorted(shapes) == [(2,)] * 5 + [(4, 3)] * 5
    for result, gradient in zip(results, gradients, strict=True):
        expected = oracle.normalize("l1", gradient).astype("float64")
        np.testing.assert_allclose(ops.convert_to_numpy(result), expected, rtol=3e-6)


# The fast path must give the results of the plain path. The plain path computes the
# norm of one block at a time.


@st.composite
def gradients_and_blocks(draw):
    shapes = [(4, 3), (3,), (2, 2, 3), (), (1, 3)]
    chosen = draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=24))
    exponents = draw(
        st.lists(st.integers(-120, 120), min_size=len(chosen), max_size=len(chosen))
    )
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    gradients = [
        (rng.normal(size=shape) * 2.0**e).astype("float32") * draw(st.booleans())
        for shape, e in zip(chosen, exponents, strict=True)
    ]
    numbers = draw(
        st.lists(st.integers(0, 5), min_size=len(chosen), max_size=len(chosen))
    )
    blocks = [[i for i, n in enumerate(numbers) if n == number] for number in range(6)]
    return gradients, [block for block in blocks if block]


@pytest.mark.parametrize("scope", ["variable", "unit", "blocks"])
@pytest.mark.parametrize("norm", ["l2", "min_max", "std", "of one's own"])
# Few examples, because eager JAX and TensorFlow compile each call for each shape.
@settings(max_examples=100 if BACKEND == "torch" else 5)
@given(drawn=gradients_and_blocks())
def test_the_fast_path_equals_the_plain_path(norm, scope, drawn):
    gradients, blocks = drawn
    if scope != "blocks":
        blocks = [[i] for i in range(len(gradients))]

    def custom(gradient):
        return ops.sum(ops.sqrt(ops.abs(gradient)))

    norm = _registry.get(getattr(norms, norm, custom))
    gradients = [ops.convert_to_tensor(g) for g in gradients]
    fast = make_gradients(gradients, blocks, scope == "unit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacking, "STACK_SIZE", 1)
        patch.setattr(stacking, "FastReductions", stacking.Reductions)
        plain = make_gradients(gradients, blocks, scope == "unit")
        expected = plain.by_block(plain.norms(norm))
        rescale.normalize(plain, norm, 1e-30)
    measured = fast.by_block(fast.norms(norm))
    for number in range(len(blocks)):
        pair = measured[number], expected[number]
        np.testing.assert_allclose(*map(ops.convert_to_numpy, pair), rtol=1e-5)
    rescale.normalize(fast, norm, 1e-30)
    for pair in zip(fast.tensors, plain.tensors, strict=True):
        pair = map(ops.convert_to_numpy, pair)
        np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-30)


def variables(number, shape):
    return [keras.Variable(np.ones(shape, "float32")) for _ in range(number)]


@pytest.mark.speed
@pytest.mark.skipif(BACKEND != "torch", reason="counts operations of PyTorch")
@pytest.mark.parametrize("norm", oracle.NORMS)
def test_the_number_of_calls_does_not_grow_with_the_number_of_variables(norm):
    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    def calls(number):
        gradients = [torch.ones(4, 4) for _ in range(number)]
        with Counter() as counter:
            normalize(gradients, getattr(norms, norm))
        return counter.calls

    assert calls(3) == calls(STACK_SIZE)


def keras_frees_operands():
    # On PyTorch, Keras before 3.15 leaves its operands to Python's garbage collector,
    # which may run at any time.
    operand = torch.ones(2)
    alive = weakref.ref(operand)
    gc.disable()
    try:
        ops.abs(operand)
        del operand
        return alive() is None
    finally:
        gc.enable()


@pytest.mark.speed
@pytest.mark.skipif(BACKEND != "torch", reason="reads the memory profile of PyTorch")
@pytest.mark.parametrize("shape", [(64, 64), (1024, 1024)])
def test_normalization_allocates_one_copy_of_the_gradients(shape):
    gradients = [torch.randn(shape) for _ in range(2**22 // shape[0] ** 2)]
    normalize(gradients, norms.l2)
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        results = normalize(gradients, norms.l2)
        gc.collect()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    size = sum(g.nbytes for g in results)
    stack = 4 * STACK_ENTRIES
    assert size <= now <= size + stack / 4
    if keras_frees_operands():
        assert peak <= size + 2 * stack


@pytest.mark.skipif(BACKEND != "jax", reason="reads the memory analysis of XLA")
@pytest.mark.parametrize("shapes", [[(64, 64)] * 40, [(1024, 1024)] * 3])
def test_a_compiled_step_needs_about_as_much_memory_as_clipnorm(shapes):
    def temporary(optimizer):
        weights = [keras.Variable(np.ones(shape, "float32")) for shape in shapes]
        optimizer.build(weights)
        step = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
        state, values = ([v.value for v in vs] for vs in (optimizer.variables, weights))
        compiled = step.lower(state, values, values).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    clipnorm = temporary(keras.optimizers.SGD(0.1, momentum=0.9, clipnorm=1.0))
    ours = temporary(keras_normopt.NormalizedSGD(0.1, momentum=0.9))
    # A stack is a copy. XLA may keep all stacks until the norms are known.
    stacked = sum(
        4 * math.prod(s) for s in shapes if math.prod(s) <= STACK_ENTRIES // 2
    )
    assert ours <= clipnorm + max(stacked, STACK_ENTRIES)


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch does not compile this step")
def test_a_step_with_stacks_compiles_once():
    weights = variables(MANY, (2, 3))
    optimizer = keras_normopt.NormalizedAdam()
    optimizer.build(weights)
    gradients = of_many_magnitudes((2, 3))
    if BACKEND == "tensorflow":
        step = tf.function(optimizer.apply)
        for sign in (1, -1, 0):
            step([tf.constant(sign * g) for g in gradients])
        assert step.experimental_get_tracing_count() == 1
        return
    step = jax.jit(optimizer.stateless_apply)
    state, values = ([v.value for v in vs] for vs in (optimizer.variables, weights))
    for sign in (1, -1, 0):
        values, state = step(state, [sign * g for g in gradients], values)
    assert step._cache_size() == 1


@pytest.mark.skipif(BACKEND != "jax", reason="reads the program for XLA")
def test_without_a_norm_xla_gets_the_program_of_the_base():
    def program(optimizer):
        weights = variables(3, (2, 3))
        optimizer.build(weights)
        state, values = ([v.value for v in vs] for vs in (optimizer.variables, weights))
        return jax.jit(optimizer.stateless_apply).lower(state, values, values).as_text()

    expected = program(keras.optimizers.Adam())
    assert program(keras_normopt.NormalizedAdam(norm=None)) == expected
    assert program(keras_normopt.NormalizedAdam()) != expected
