"""Makes single steps of Keras, of this package and of optimizers written by hand."""

import functools
import math

import keras
import numpy as np

import keras_normopt

BACKEND = keras.backend.backend()

# As in `fit`, XLA compiles steps on JAX and TensorFlow, and PyTorch steps are eager.
# TensorFlow without XLA is like a custom loop under `tf.function`.
if BACKEND == "jax":
    import jax
    import optax
elif BACKEND == "tensorflow":
    import tensorflow as tf
else:
    import torch

BASES = {
    "SGD": (keras.optimizers.SGD, keras_normopt.NormalizedSGD, {"momentum": 0.9}),
    "Adam": (keras.optimizers.Adam, keras_normopt.NormalizedAdam, {}),
}


def sizes(quick=False):
    """Returns the shapes of many small or a few large variables, by name."""
    many, large = (20, 512) if quick else (80, 1536)
    return {
        f"{2 * many} small": [(64, 64), (64,)] * many,
        "8 large": [(large, large), (large,)] * 4,
    }


def models(quick=False):
    """Returns the shapes of common models, and of variables too different to stack."""
    distinct = 10 if quick else 30
    return {
        "transformer": _transformer(blocks=2 if quick else 8),
        "narrow ResNet": _resnet(blocks=1 if quick else 3),
        f"{2 * distinct} shapes": [
            shape for i in range(distinct) for shape in ((32 + i, 48), (100 + i,))
        ],
    }


def _transformer(width=64, heads=4, blocks=8, tokens=1000, context=64):
    """Returns the shapes of a pre-norm transformer, with Keras layers."""
    head = width // heads
    projection = [(width, heads, head), (heads, head)]
    attention = [*projection * 3, (heads, head, width), (width,)]
    dense = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    norm = [(width,), (width,)]
    block = [*norm, *attention, *norm, *dense]
    ends = [(tokens, width), (context, width)], [*norm, (width, tokens), (tokens,)]
    return [*ends[0], *block * blocks, *ends[1]]


def _resnet(blocks=3, classes=10):
    """Returns shapes of a ResNet of `6 * blocks + 2` layers and 16 to 64 channels."""
    shapes, channels = [(3, 3, 3, 16), (16,), (16,)], 16
    for width in [16, 32, 64]:
        for _ in range(blocks):
            shapes += [(3, 3, channels, width), (width,), (width,)]
            shapes += [(3, 3, width, width), (width,), (width,)]
            if channels != width:
                shapes.append((1, 1, channels, width))
            channels = width
    return [*shapes, (channels, classes), (classes,)]


def kernels(quick=False):
    """Returns shapes of kernels as matrices (in, out), without embeddings."""
    many, large = (10, 256) if quick else (80, 1024)
    result = {
        f"{many} of 64×64": [(64, 64)] * many,
        f"4 of {large}²": [(large,) * 2] * 4,
    }
    for name, shapes in models(quick).items():
        # The first shapes of the transformer are embeddings, 1000 × 64 and 64 × 64.
        shapes = shapes[2:] if name == "transformer" else shapes
        result[name] = [_as_matrix(shape) for shape in shapes if _is_kernel(shape)]
    return result


def _is_kernel(shape):
    return len(shape) > 2 or (len(shape) == 2 and shape[0] > 4)


def _as_matrix(shape):
    """Returns the shape of a kernel as a matrix.

    Only attention has kernels of rank 3: (d, heads, key) or (heads, key, d).
    """
    *inputs, outputs = shape
    if len(shape) == 3 and shape[0] > shape[1]:
        return shape[0], shape[1] * shape[2]
    return math.prod(inputs), outputs


def muon_by_hand(shapes, grads):
    """Returns a step of another library's Muon, or `None` on TensorFlow."""
    if BACKEND == "jax":
        transform = optax.contrib.muon(1e-3)

        def step(state, grads, weights):
            updates, state = transform.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state

        weights = [jax.numpy.asarray(a) for a in arrays(shapes)]
        return _jitted(step, transform.init(weights), grads, weights)
    if BACKEND == "torch":
        weights = [torch.nn.Parameter(torch.as_tensor(a)) for a in arrays(shapes)]
        optimizer = torch.optim.Muon(weights, lr=1e-3)
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        return optimizer.step
    return None


def count(shapes):
    return sum(math.prod(shape) for shape in shapes)


def arrays(shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def variables(shapes):
    return [
        keras.Variable(value, name=f"variable_{i}", dtype="float32")
        for i, value in enumerate(arrays(shapes))
    ]


def gradients(shapes):
    """Returns gradients of one magnitude that differ from the variables' values."""
    return [keras.ops.convert_to_tensor(a[::-1] * 1e-3) for a in arrays(shapes)]


def make_step(optimizer, shapes, grads, jit_compile=True):
    """Returns a function that makes one step and waits for its end."""
    weights = variables(shapes)
    optimizer.build(weights)
    if BACKEND == "torch":

        def step():
            with torch.no_grad():
                optimizer.apply(grads, weights)

    elif BACKEND == "tensorflow":

        @functools.partial(tf.function, jit_compile=jit_compile)
        def compiled():
            optimizer.apply_gradients(zip(grads_in, weights, strict=True))
            return optimizer.iterations.value

        # Variables, because tensors would be constants to the compiler.
        grads_in = [tf.Variable(g, trainable=False) for g in grads]

        def step():
            compiled().numpy()

    else:
        step = _jitted(
            optimizer.stateless_apply,
            [v.value for v in optimizer.variables],
            grads,
            [v.value for v in weights],
        )
    return step


def make_embedding_steps(optimizers, rows, width, touched):
    """Returns steps of TensorFlow on one table and a small kernel, by optimizer."""
    rng = np.random.default_rng(0)
    table = keras.Variable(np.full((rows, width), 0.1, "float32"), name="table")
    kernel = keras.Variable(np.zeros((64, 64), "float32"), name="kernel")
    indices = tf.Variable(rng.integers(0, rows, touched), trainable=False)
    values = tf.Variable(arrays([(touched, width)])[0], trainable=False)
    gradient = tf.Variable(arrays([(64, 64)])[0], trainable=False)

    def step_of(optimizer):
        optimizer.build([table, kernel])

        @tf.function
        def compiled():
            slices = tf.IndexedSlices(values, indices, tf.constant([rows, width]))
            optimizer.apply([slices, gradient], [table, kernel])
            return optimizer.iterations.value

        return lambda: compiled().numpy()

    return {name: step_of(optimizer) for name, optimizer in optimizers.items()}


def lower(optimizer, shapes):
    """Returns the program of one step on JAX, before XLA compiles it."""
    weights = variables(shapes)
    optimizer.build(weights)
    state = [v.value for v in optimizer.variables]
    jitted = jax.jit(optimizer.stateless_apply, donate_argnums=(0, 2))
    return jitted.lower(state, gradients(shapes), [v.value for v in weights])


def _jitted(function, state, grads, weights):
    jitted = jax.jit(function, donate_argnums=(0, 2))
    # JAX deletes donated buffers. The step gets copies, so the variables keep their own
    # buffers.
    carried = [jax.tree.map(jax.numpy.copy, (weights, state))]

    def step():
        weights, state = carried[0]
        carried[0] = jitted(state, grads, weights)
        jax.block_until_ready(carried[0])

    return step


def stock(base, **options):
    optimizer_class, _, arguments = BASES[base]
    return optimizer_class(1e-3, **arguments, **options)


def normalized(base, **options):
    _, optimizer_class, arguments = BASES[base]
    return optimizer_class(1e-3, **arguments, **options)


def clipped(base, **options):
    return getattr(keras_normopt, f"Clipped{base}")(1e-3, **BASES[base][2], **options)


def by_hand(base, shapes, grads):
    """Returns a step written for this backend alone, without a guard against overflow.

    Returns `None` on TensorFlow, which has no peer to compare with.
    """
    if BACKEND == "jax":
        base = {"SGD": lambda: optax.sgd(1e-3, 0.9), "Adam": lambda: optax.adam(1e-3)}[
            base
        ]()
        return _optax_step(base, shapes, grads)
    if BACKEND == "torch":
        base = {
            "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
            "Adam": torch.optim.Adam,
        }[base]
        return _torch_step(base, shapes, grads)
    return None


def _optax_step(base, shapes, grads):
    @optax.stateless
    def normalize(updates, _):
        return jax.tree.map(
            lambda g: g / jax.numpy.maximum(jax.numpy.linalg.norm(g), 1e-30), updates
        )

    transform = optax.chain(normalize, base)

    def step(state, grads, weights):
        updates, state = transform.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    weights = [jax.numpy.asarray(a) for a in arrays(shapes)]
    return _jitted(step, transform.init(weights), grads, weights)


def _torch_step(base, shapes, grads):
    weights = [torch.nn.Parameter(torch.as_tensor(a)) for a in arrays(shapes)]
    optimizer = base(weights, lr=1e-3, foreach=True)

    def step():
        norms = torch._foreach_norm(grads)
        torch._foreach_clamp_min_(norms, 1e-30)
        for weight, grad in zip(weights, torch._foreach_div(grads, norms), strict=True):
            weight.grad = grad
        optimizer.step()

    return step


def memory_of(optimizer, shapes):
    """Returns the peak and the final number of bytes that a PyTorch step allocates."""
    step = make_step(optimizer, shapes, gradients(shapes))
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, now
