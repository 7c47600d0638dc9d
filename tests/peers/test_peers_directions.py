"""Compares directions with Muon, Scion, Signum and others.

test_peers.py explains how the tests compare two optimizers.
"""

import functools
import inspect

import keras
import numpy as np
import pytest

import keras_normopt as kn
from helpers import peers
from helpers.peers import (
    BACKEND,
    RATE,
    TINY,
    assert_same,
    check,
    each,
    length,
    train,
    train_optax,
    train_torch,
)
from keras_normopt.directions import Orthogonal, Rows, Sign

SHAPES = {
    "wide": (3, 5),
    "tall": (4, 3),
    "column": (4, 1),
    "conv1d": (3, 2, 4),
    "conv2d": (2, 3, 2, 5),
    "heads": (2, 4, 3),
    "embedding": (6, 3),
    "output": (4, 6),
    "bias": (5,),
    "scale": (),
}
MATRICES = ("wide", "tall", "column")
# Each value holds the input axes and the output axes.
CONVOLUTIONS = {"conv1d": ((0, 1), (2,)), "conv2d": ((0, 1, 2), (3,))}
KERNELS = (*MATRICES, *CONVOLUTIONS)
LAYERS = (*KERNELS, "embedding", "output", "bias", "scale")

M = 0.9
MATCH_RMS = "match_rms_adamw"
# On PyTorch, Keras computes 1 - rate · decay in float32. Powers of 2 keep it exact.
DECAY = 0.125
CUBIC = (1.5, -0.5, 0.0)
# The third and later iterations repeat the last triple of coefficients.
TWO_TRIPLES = [(3.0, -3.2, 1.2), (1.875, -1.25, 0.375)]

Pair = functools.partial(peers.Pair, shapes=SHAPES)
MatrixPair = functools.partial(Pair, names=MATRICES)

pytestmark = [pytest.mark.newest_keras, pytest.mark.usefixtures("float64")]


def muon(direction, rate=RATE, **options):
    return kn.OrthogonalSGD(rate, M, direction=direction, **options)


def momentum_sgd(direction, rate=RATE, m=M, **options):
    return kn.NormalizedSGD(rate, m, apply_to="update", direction=direction, **options)


# Compared with Keras.


def keras_muon(k, **options):
    options = {"momentum": M, "weight_decay": None, "ns_steps": 5} | options
    return k.Muon(RATE, **options)


KERAS_PAIRS = {
    "default": MatrixPair(keras_muon, lambda: muon(Orthogonal(MATCH_RMS, "jordan"))),
    "nesterov=False": MatrixPair(
        functools.partial(keras_muon, nesterov=False),
        lambda: muon(Orthogonal(MATCH_RMS, "jordan"), nesterov=False),
    ),
    "weight_decay": MatrixPair(
        functools.partial(keras_muon, weight_decay=DECAY),
        lambda: muon(Orthogonal(MATCH_RMS, "jordan"), weight_decay=DECAY),
    ),
    "rms_rate": MatrixPair(
        functools.partial(keras_muon, rms_rate=0.4, weight_decay=DECAY),
        lambda: muon(
            Orthogonal(MATCH_RMS, "jordan"), rate=2 * RATE, weight_decay=DECAY / 2
        ),
    ),
    "rms_rate=None": MatrixPair(
        functools.partial(keras_muon, rms_rate=None),
        lambda: muon(Orthogonal(scale=None, coefficients="jordan")),
    ),
    "coefficients": MatrixPair(
        functools.partial(keras_muon, muon_a=1.5, muon_b=-0.5, muon_c=0, ns_steps=7),
        lambda: muon(Orthogonal(MATCH_RMS, CUBIC, steps=7)),
    ),
}
KERAS_3_12_PAIR = MatrixPair(
    keras_muon,
    lambda: muon(Orthogonal("original", "jordan"), axes={".*": ((1,), (0,))}),
)
HAS_RMS_RATE = "rms_rate" in inspect.signature(keras.optimizers.Muon).parameters


torch_only = pytest.mark.skipif(BACKEND != "torch", reason="runs on PyTorch only")


@torch_only
@pytest.mark.skipif(not HAS_RMS_RATE, reason="Muon has other scales in Keras 3.12")
@each(KERAS_PAIRS)
def test_directions_equal_keras_muon(pair):
    check(pair, train(pair.peer(keras.optimizers), *peers.draw(pair)))


@torch_only
@pytest.mark.skipif(HAS_RMS_RATE, reason="for Muon of Keras 3.12")
def test_muon_of_keras_3_12_scales_by_inputs_over_outputs():
    pair = KERAS_3_12_PAIR
    check(pair, train(pair.peer(keras.optimizers), *peers.draw(pair)))


# Compared with Optax.


TWO_MATRICES = ("wide", "tall")
# Axis 0 of `heads` counts the heads.
DIMENSION_NUMBERS = {"conv2d": CONVOLUTIONS["conv2d"], "heads": ((1,), (2,))}


def optax_muon(o, names=TWO_MATRICES, **options):
    numbers = {
        n: o.contrib.MuonDimensionNumbers(*DIMENSION_NUMBERS.get(n, (0, 1)))
        for n in names
    }
    options = {"beta": M, "eps": TINY, "nesterov": False} | options
    return o.contrib.muon(RATE, muon_weight_dimension_numbers=numbers, **options)


def with_count(o, transform, count):
    """Returns a transform whose step count starts at the given value."""

    def init(params):
        return o.tree.set(transform.init(params), count=np.int32(count))

    return o.GradientTransformation(init, transform.update)


def plain_muon(direction, **options):
    return muon(direction, nesterov=False, **options)


OPTAX_PAIRS = {
    "muon": Pair(
        functools.partial(optax_muon, weight_decay=DECAY),
        lambda: plain_muon(Orthogonal("original", "jordan"), weight_decay=DECAY),
        names=TWO_MATRICES,
    ),
    "muon-nesterov-ns_coeffs": Pair(
        lambda o: with_count(
            o, optax_muon(o, nesterov=True, ns_coeffs=CUBIC, ns_steps=7), 1000
        ),
        lambda: muon(Orthogonal("original", CUBIC, steps=7)),
        names=TWO_MATRICES,
    ),
    "muon-dion-consistent_rms": Pair(
        functools.partial(optax_muon, ns_coeffs="dion", consistent_rms=0.2),
        lambda: plain_muon(Orthogonal(MATCH_RMS)),
        names=TWO_MATRICES,
    ),
    "muon-dimension_numbers": Pair(
        functools.partial(optax_muon, names=("conv2d", "heads")),
        lambda: plain_muon(Orthogonal("original", "jordan"), axes=DIMENSION_NUMBERS),
        names=("conv2d", "heads"),
    ),
    "scale_by_sign": Pair(
        lambda o: o.chain(o.trace(M), o.scale_by_sign(), o.scale(-RATE)),
        lambda: momentum_sgd("sign"),
        names=("wide",),
    ),
}


def train_compiled(transform, pair):
    import jax

    update = jax.jit(transform.update)
    return train_optax(transform._replace(update=update), *peers.draw(pair))


@each(OPTAX_PAIRS)
def test_directions_equal_optax(pair, optax):
    check(pair, train_compiled(pair.peer(optax), pair))


def test_nesterov_of_optax_differs_in_the_first_steps(optax):
    pair = OPTAX_PAIRS["muon-nesterov-ns_coeffs"]
    peer = optax_muon(optax, nesterov=True, ns_coeffs=CUBIC, ns_steps=7)
    expected = train_compiled(peer, pair)
    with pytest.raises(AssertionError):
        assert_same(train(pair.ours(), *peers.draw(pair)), expected)


# Compared with PyTorch.


def torch_muon(torch, params, **options):
    options = {"momentum": M, "weight_decay": 0.0} | options
    return torch.optim.Muon(params, RATE, **options)


TORCH_PAIRS = {
    "original": MatrixPair(torch_muon, lambda: muon(Orthogonal("original", "jordan"))),
    "match_rms_adamw": MatrixPair(
        functools.partial(torch_muon, adjust_lr_fn="match_rms_adamw"),
        lambda: muon(Orthogonal(MATCH_RMS, "jordan")),
    ),
    "nesterov=False": MatrixPair(
        functools.partial(torch_muon, nesterov=False),
        lambda: muon(Orthogonal("original", "jordan"), nesterov=False),
    ),
    "weight_decay": MatrixPair(
        functools.partial(torch_muon, weight_decay=DECAY),
        lambda: muon(Orthogonal("original", "jordan"), weight_decay=DECAY),
    ),
    "coefficients": MatrixPair(
        functools.partial(torch_muon, ns_coefficients=CUBIC, ns_steps=7),
        lambda: muon(Orthogonal("original", CUBIC, steps=7)),
    ),
}


@torch_only
@each(TORCH_PAIRS)
def test_directions_equal_torch_muon_without_its_rounding(pair, monkeypatch):
    import torch

    # Muon changes the rounded tensor in place. So its replacement must be a copy, too.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    check(pair, train_torch(pair.peer, *peers.draw(pair), unit_first=True))


@torch_only
@each(TORCH_PAIRS)
def test_torch_muon_rounds_to_bfloat16(pair):
    drawn = peers.draw(pair)
    peer = train_torch(pair.peer, *drawn, unit_first=True)
    for name, ours in train(pair.ours(), *drawn).items():
        difference = length(ours - peer[name]) / length(ours)
        assert 1e-4 < difference < 0.04


# Compared with pytorch_optimizer.


def po_muon(po, params, names, **options):
    options = {"momentum": M} | options
    return po.Muon([{"params": params, "use_muon": True}], RATE, **options)


def po_scion(po, params, names, norms=None, **options):
    """Returns SCION. Each variable has a norm, arguments of the norm, and a scale."""
    kinds = inspect.getmodule(po.SCION).LMONorm
    groups = []
    for parameter, name in zip(params, names, strict=True):
        norm, arguments, scale = (norms or SCION).get(name, ("SPECTRAL", {}, 1.0))
        group = {"norm_type": kinds[norm], "norm_kwargs": arguments, "scale": scale}
        groups.append(group | {"params": [parameter]})
    return po.SCION(groups, RATE, momentum=1 - M, **options)


SCION = {
    # For a filter with p positions, pytorch_optimizer divides steps by p, and we divide
    # by √p. The scale √p cancels this difference.
    "conv1d": ("SPECTRALCONV", {}, 3**0.5),
    "conv2d": ("SPECTRALCONV", {}, 6**0.5),
    "embedding": ("COL", {"transpose": True}, 1.0),
    "output": ("SIGN", {}, 1.0),
    "bias": ("BIAS", {}, 1.0),
    "scale": ("BIAS", {}, 1.0),
}


def with_norm(norm, **arguments):
    """Returns SCION with the same norm for all variables."""
    norms = dict.fromkeys(SHAPES, (norm, arguments, 1.0))
    return functools.partial(po_scion, norms=norms)


def po_signum(po, params, names, **options):
    return po.SignSGD(params, RATE, momentum=M, **options)


PYTORCH_OPTIMIZER_PAIRS = {
    "Muon": Pair(
        po_muon,
        lambda: muon(Orthogonal("original", "jordan"), axes=CONVOLUTIONS),
        names=KERNELS,
    ),
    "Muon-use_adjusted_lr": Pair(
        functools.partial(po_muon, use_adjusted_lr=True, ns_coeffs="quintic"),
        lambda: muon(Orthogonal(MATCH_RMS), axes=CONVOLUTIONS),
        names=KERNELS,
    ),
    "Muon-list-of-ns_coeffs": MatrixPair(
        functools.partial(po_muon, ns_coeffs=TWO_TRIPLES, ns_steps=4),
        lambda: muon(Orthogonal("original", TWO_TRIPLES, steps=4)),
    ),
    "Muon-weight_decay": Pair(
        functools.partial(po_muon, nesterov=False, weight_decay=DECAY),
        lambda: muon(
            Orthogonal("original", "jordan"),
            nesterov=False,
            weight_decay=DECAY,
            axes=CONVOLUTIONS,
        ),
        names=KERNELS,
    ),
    "SCION": Pair(
        po_scion,
        lambda: momentum_sgd(
            {
                "output": Sign("operator"),
                ".*": Orthogonal(
                    "operator",
                    "jordan",
                    embeddings=Rows("operator"),
                    vectors=Rows("operator"),
                ),
            },
            axes=CONVOLUTIONS,
        ),
        names=LAYERS,
    ),
    "SCION-constraint": MatrixPair(
        functools.partial(
            po_scion,
            norms=dict.fromkeys(MATRICES, ("SPECTRAL", {}, 4.0)),
            constraint=True,
        ),
        lambda: momentum_sgd(
            Orthogonal("operator", "jordan"), rate=4 * RATE, weight_decay=1 / 4
        ),
    ),
    "SCION-max_scale": MatrixPair(
        with_norm("SPECTRAL", max_scale=True),
        lambda: momentum_sgd(Orthogonal("original", "jordan")),
    ),
    "SCION-sign": MatrixPair(
        with_norm("SIGN", normalize=False), lambda: momentum_sgd("sign")
    ),
    "SCION-row": MatrixPair(with_norm("ROW"), lambda: momentum_sgd(Rows("operator"))),
    "SCION-row-normalized=False": MatrixPair(
        with_norm("ROW", normalized=False), lambda: momentum_sgd("rows")
    ),
    "SCION-col": MatrixPair(
        with_norm("COL"), lambda: momentum_sgd(Rows("operator", over="outputs"))
    ),
    "SignSGD": Pair(
        functools.partial(po_signum, weight_decay=DECAY),
        lambda: momentum_sgd("sign", weight_decay=DECAY, axes=CONVOLUTIONS),
        names=LAYERS,
    ),
}


@pytest.fixture
def unrounded(pytorch_optimizer, monkeypatch):
    """Returns pytorch_optimizer with its Newton-Schulz iteration in float64."""
    import torch

    name = "zero_power_via_newton_schulz_5"
    for optimizer in (pytorch_optimizer.Muon.__base__, pytorch_optimizer.SCION):
        module = inspect.getmodule(optimizer)
        iteration = functools.partial(getattr(module, name), dtype=torch.float64)
        monkeypatch.setattr(module, name, iteration)
    return pytorch_optimizer


@each(PYTORCH_OPTIMIZER_PAIRS)
def test_directions_equal_pytorch_optimizer(pair, unrounded):
    def make(_, params):
        return pair.peer(unrounded, params, pair.names)

    check(pair, train_torch(make, *peers.draw(pair), unit_first=True))


# Compared with NumPy code for published definitions.


def to_rows(gradient):
    """Returns a kernel as in PyTorch: one row for each output unit."""
    return np.reshape(gradient, (-1, gradient.shape[-1])).T


def from_rows(rows, shape):
    return np.reshape(rows.T, shape)


def average(m=M, nesterov=False):
    """Returns a function that updates a moving average of each variable's gradients."""
    averages = {}

    def add(name, gradient):
        averages[name] = m * averages.get(name, 0) + (1 - m) * gradient
        if nesterov:
            return (1 - m) * gradient + m * averages[name]
        return averages[name]

    return add


def rmnp(nesterov=False, scale=False):
    """Returns a function for RMNP: row-momentum normalized preconditioning.

    The source is arXiv 2603.20527.
    """
    momentum = average(nesterov=nesterov)

    def normalize_rows(name, gradient):
        rows = to_rows(momentum(name, gradient))
        outputs, inputs = rows.shape
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        factor = np.sqrt(max(1, outputs / inputs)) if scale else 1.0
        return factor * from_rows(rows, gradient.shape)

    return lambda gradients, _: {n: normalize_rows(n, g) for n, g in gradients.items()}


def column_normalized(with_momentum=()):
    """Returns a function for SCALE (arXiv 2506.16659).

    The columns of SCALE are the output units of a kernel.
    """
    momentum = average()

    def normalize_columns(name, gradient):
        if name in with_momentum:
            gradient = momentum(name, gradient)
        # SCALE also normalizes the columns of an embedding (tokens, dim).
        columns = np.reshape(gradient, (-1, gradient.shape[-1]))
        columns = columns / np.sqrt(np.mean(columns**2, axis=0))
        return np.reshape(columns, gradient.shape)

    return lambda gradients, _: {
        n: normalize_columns(n, g) for n, g in gradients.items()
    }


def unit_columns(m=0.0, **options):
    rows = Rows("match_rms_adamw", over="inputs")
    return momentum_sgd(rows, rate=5 * RATE, m=m, **options)


NOT_WIDE = ("tall", "column", *CONVOLUTIONS)  # At most as many outputs as inputs.

DEFINITION_PAIRS = {
    "RMNP": Pair(rmnp, lambda: momentum_sgd("rows", axes=CONVOLUTIONS), names=KERNELS),
    "RMNP-nesterov": Pair(
        lambda: rmnp(nesterov=True, scale=True),
        lambda: momentum_sgd("rows", nesterov=True, axes=CONVOLUTIONS),
        names=NOT_WIDE,
    ),
    "SCALE-hidden": Pair(
        column_normalized,
        lambda: unit_columns(axes=CONVOLUTIONS, weight_decay=DECAY / 5),
        names=(*KERNELS, "embedding"),
    ),
    "SCALE-last": Pair(
        lambda: column_normalized(with_momentum=("output",)),
        lambda: unit_columns(M),
        names=("output",),
    ),
}

not_on_jax = pytest.mark.skipif(BACKEND == "jax", reason="JAX compiles for too long")


def train_by_definition(change, pair, **options):
    return train(keras.optimizers.SGD(RATE, **options), *peers.draw(pair), change)


@not_on_jax
@each(DEFINITION_PAIRS)
def test_directions_equal_published_definitions(pair):
    # Only `unit_columns` has weight decay. Its rate is five times the rate of SGD.
    decay = (pair.ours().weight_decay or 0) * 5
    check(pair, train_by_definition(pair.peer(), pair, weight_decay=decay))


@not_on_jax
def test_rmnp_makes_longer_steps_than_ours_if_there_are_more_outputs_than_inputs():
    pair = Pair(None, None, names=("wide",))
    expected = train_by_definition(rmnp(nesterov=True, scale=True), pair)
    ours = train(momentum_sgd("rows", nesterov=True), *peers.draw(pair))
    inputs, outputs = SHAPES["wide"]
    assert_same({"wide": (outputs / inputs) ** 0.5 * ours["wide"]}, expected)


@not_on_jax
@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="not in Keras 3.12"
)
def test_two_of_our_optimizers_together_equal_the_method_scale_but_one_does_not():
    pair = Pair(None, None, names=("wide", "tall", "output"))
    expected = train_by_definition(column_normalized(with_momentum=("output",)), pair)
    last = {"output": unit_columns(M, name="last")}
    ours = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(unit_columns(), last)
    )
    assert_same(train(ours, *peers.draw(pair)), expected)
    for m in (0.0, M):
        with pytest.raises(AssertionError):
            assert_same(train(unit_columns(m), *peers.draw(pair)), expected)
