"""Compares our optimizers with their peers in docs/coming_from.md.

A peer is an optimizer of another library that makes the same steps. Peers that can be
installed run their own code. NumPy code replaces the other peers.

Both optimizers of a pair start from the same weights and get the same gradients, in
float64. The tests compare how far the weights move.
"""

import functools
import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt as kn
from helpers.pages import ROOT
from helpers.peers import (
    BACKEND,
    RATE,
    SHAPES,
    TINY,
    Pair,
    assert_same,
    check,
    draw,
    each,
    length,
    train,
    train_optax,
    train_torch,
)
from keras_normopt import RunningNorm, WeightNorm

# On PyTorch, Keras computes powers of these numbers in float32. The numbers have few
# binary digits, so the rounding errors are small.
BETAS = (0.875, 0.96875)


NOT_RANK_3 = [name for name in SHAPES if name != "conv1d"]


pytestmark = [pytest.mark.newest_keras, pytest.mark.usefixtures("float64")]


# Compared with Keras.

KERAS_PAIRS = {
    "clipnorm": Pair(
        lambda k: k.SGD(RATE, clipnorm=0.5),
        lambda: kn.ClippedSGD(RATE, max_norm=0.5),
    ),
    "clipnorm-Adam": Pair(
        lambda k: k.Adam(RATE, clipnorm=0.5),
        lambda: kn.ClippedAdam(RATE, max_norm=0.5),
    ),
    "global_clipnorm": Pair(
        lambda k: k.SGD(RATE, momentum=0.9, global_clipnorm=0.5),
        lambda: kn.ClippedSGD(RATE, momentum=0.9, max_norm=0.5, scope="global"),
    ),
    "Lamb": Pair(
        lambda k: k.Lamb(RATE, epsilon=TINY),
        lambda: kn.NormalizedAdam(
            RATE, epsilon=TINY, apply_to="update", step_size=WeightNorm()
        ),
    ),
    "Lamb-global_clipnorm": Pair(  # timm's Lamb clips by default.
        lambda k: k.Lamb(RATE, epsilon=TINY, global_clipnorm=1.0),
        lambda: kn.NormalizedAdam(
            RATE,
            epsilon=TINY,
            global_clipnorm=1.0,
            apply_to="update",
            step_size=WeightNorm(),
        ),
    ),
    "Lamb-weight_decay": Pair(
        lambda k: k.Lamb(RATE, epsilon=TINY, weight_decay=0.1),
        lambda: kn.NormalizedAdam(
            RATE,
            epsilon=TINY,
            weight_decay=0.1,
            apply_to="update",
            step_size=WeightNorm(),
        ),
    ),
}


@each(KERAS_PAIRS)
def test_ours_equal_stock_keras(pair):
    check(pair, train(pair.peer(keras.optimizers), *draw(pair)))


# Compared with NumPy code for published definitions.


def by_unit(change, *arrays):
    """Applies a function to each output unit. The last axis counts the units."""
    if arrays[0].ndim < 2:
        return change(*arrays)
    units = zip(*(np.moveaxis(a, -1, 0) for a in arrays), strict=True)
    return np.stack([change(*unit) for unit in units], axis=-1)


def agc(factor, floor):
    def clip(gradient, weight):
        limit = factor * max(length(weight), floor)
        return gradient * min(1, limit / length(gradient))

    return lambda gradients, weights: {
        n: by_unit(clip, g, weights[n]) for n, g in gradients.items()
    }


def each_gradient(change):
    return lambda gradients, _: {n: change(g) for n, g in gradients.items()}


def lars(coefficient, decay=0.0):
    """Returns a function that scales gradients as LARS does, before momentum."""

    def scaled(gradient, weight):
        gradient = gradient + decay * weight
        sizes = length(weight), length(gradient)
        ratio = coefficient * sizes[0] / sizes[1] if all(sizes) else 1
        return ratio * gradient

    return lambda gradients, weights: {
        n: scaled(g, weights[n]) for n, g in gradients.items()
    }


def larc(coefficient):
    def clipped(gradient, weight):
        if not length(weight):
            return gradient
        ratio = coefficient * length(weight) / length(gradient)
        return gradient * min(1, ratio / RATE)

    return lambda gradients, weights: {
        n: clipped(g, weights[n]) for n, g in gradients.items()
    }


def lars_of_momentum(coefficient):
    """Returns a function that turns SGD into LARS with `classic_momentum=False`."""
    velocity = {}

    def change(gradients, weights):
        for n, g in gradients.items():
            velocity[n] = 0.9 * velocity.get(n, 0) + g
        return lars(coefficient)(velocity, weights)

    return change


DEFINITION_PAIRS = {
    "AGC": Pair(
        lambda: (keras.optimizers.Adam(RATE), agc(0.1, 0.3)),
        lambda: kn.ClippedAdam(
            RATE, scope="unit", max_norm=WeightNorm(0.1, minimum=0.3)
        ),
        zeros=("bias", "dense"),
    ),
    "centralization": Pair(
        lambda: (
            keras.optimizers.RMSprop(RATE),
            each_gradient(
                lambda g: by_unit(lambda u: u - u.mean(), g) if g.ndim > 1 else g
            ),
        ),
        lambda: kn.NormalizedRMSprop(RATE, norm=None, centralize=True),
    ),
    "LARS": Pair(
        lambda: (keras.optimizers.SGD(RATE, 0.9, nesterov=True), lars(0.1)),
        lambda: kn.NormalizedSGD(RATE, 0.9, nesterov=True, step_size=WeightNorm(0.1)),
    ),
    "LARS-classic_momentum=False": Pair(
        lambda: (keras.optimizers.SGD(RATE), lars_of_momentum(0.1)),
        lambda: kn.NormalizedSGD(
            RATE, 0.9, apply_to="update", step_size=WeightNorm(0.1)
        ),
    ),
    "LARC": Pair(
        lambda: (keras.optimizers.SGD(RATE, 0.9), larc(0.02)),
        lambda: kn.ClippedSGD(RATE, 0.9, max_norm=WeightNorm(0.02 / RATE)),
        zeros=("bias",),
    ),
    "2018-l2": Pair(
        lambda: (
            keras.optimizers.SGD(RATE, 0.9),
            each_gradient(lambda g: g / (length(g) + TINY)),  # The 2018 code adds 1e-7.
        ),
        lambda: kn.NormalizedOptimizer(keras.optimizers.SGD(RATE, 0.9), "l2"),
    ),
    "2018-clipped": Pair(
        lambda: (
            keras.optimizers.SGD(RATE, 0.9),
            each_gradient(lambda g: g * min(1, 0.5 / np.abs(g).max())),
        ),
        lambda: kn.ClippedOptimizer(
            keras.optimizers.SGD(RATE, 0.9), normalization="max", clipnorm=0.5
        ),
    ),
}


@each(DEFINITION_PAIRS)
def test_ours_equal_published_definitions(pair):
    plain, change = pair.peer()
    check(pair, train(plain, *draw(pair), change))


def test_weight_decay_of_lars_equals_a_regularizer():
    # LARS adds the decay to the gradient before it scales the gradient.
    pair = Pair(None, None)
    expected = train(keras.optimizers.SGD(RATE, 0.9), *draw(pair), lars(0.1, 0.25))
    regularizer = keras.regularizers.L2(0.25 / 2)

    def change(gradients, weights):
        def slope(weight):  # A central difference, exact for a square.
            above, below = (
                [regularizer(ops.convert_to_tensor([w + d], "float64")) for w in flat]
                for flat, d in ((np.ravel(weight), 0.5), (np.ravel(weight), -0.5))
            )
            pairs = zip(above, below, strict=True)
            return np.reshape([float(a) - float(b) for a, b in pairs], weight.shape)

        return {n: g + slope(weights[n]) for n, g in gradients.items()}

    ours = kn.NormalizedSGD(RATE, 0.9, step_size=WeightNorm(0.1))
    assert_same(train(ours, *draw(pair), change), expected)
    ours = kn.NormalizedSGD(RATE, 0.9, step_size=WeightNorm(0.1), weight_decay=0.25)
    with pytest.raises(AssertionError):  # Our weight decay is decoupled.
        assert_same(train(ours, *draw(pair)), expected)


# Compared with TensorFlow functions, which Keras 2 took as `gradient_transformers=`.

TENSORFLOW_PAIRS = {
    "clip_by_norm": Pair(
        lambda tf: lambda pairs: [(tf.clip_by_norm(g, 0.5), v) for g, v in pairs],
        lambda: kn.ClippedSGD(RATE, 0.9, max_norm=0.5),
    ),
    "clip_by_global_norm": Pair(
        lambda tf: (
            lambda pairs: zip(
                tf.clip_by_global_norm([g for g, _ in pairs], 0.5)[0],
                [v for _, v in pairs],
                strict=True,
            )
        ),
        lambda: kn.ClippedSGD(RATE, 0.9, max_norm=0.5, scope="global"),
    ),
    "l2_normalize": Pair(
        lambda tf: lambda pairs: [(tf.math.l2_normalize(g), v) for g, v in pairs],
        lambda: kn.NormalizedSGD(RATE, 0.9, norm_epsilon=1e-6),
    ),
}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's functions")
@each(TENSORFLOW_PAIRS)
def test_ours_equal_tensorflow_clipping(pair):
    import tensorflow as tf

    transformer = pair.peer(tf)

    def change(gradients, _):
        pairs = [(tf.constant(g), n) for n, g in gradients.items()]
        return {n: g.numpy() for g, n in transformer(pairs)}

    check(pair, train(keras.optimizers.SGD(RATE, 0.9), *draw(pair), change))


# Compared with Optax.


def each_alone(optax, transform):
    """Applies a transform of a whole tree to each leaf separately."""
    names = {n: n for n in SHAPES}
    return optax.partition(dict.fromkeys(SHAPES, transform), names)


def unit_first(optax, transform):
    """Moves units to axis 0 for a transform that needs this, such as `centralize`."""

    def moved(tree, source, target):
        return {
            n: a if a.ndim < 2 else np.moveaxis(a, source, target)
            for n, a in tree.items()
        }

    def init(params):
        return transform.init(moved(params, -1, 0))

    def update(updates, state, params=None):
        updates, state = transform.update(moved(updates, -1, 0), state)
        return moved(updates, 0, -1), state

    return optax.GradientTransformation(init, update)


OPTAX_PAIRS = {
    "clip_by_global_norm": Pair(
        lambda o: o.chain(o.clip_by_global_norm(0.5), o.sgd(RATE, 0.9)),
        lambda: kn.ClippedSGD(RATE, 0.9, max_norm=0.5, scope="global"),
    ),
    "clip_by_global_norm-of-update": Pair(
        lambda o: o.chain(o.trace(0.9), o.clip_by_global_norm(0.5), o.scale(-RATE)),
        lambda: kn.ClippedSGD(
            RATE, 0.9, max_norm=0.5, scope="global", apply_to="update"
        ),
    ),
    "multi_transform": Pair(
        lambda o: o.multi_transform(
            {"conv": o.sgd(0.25 * RATE, 0.9), "other": o.sgd(RATE, 0.9)},
            {n: "conv" if "conv" in n else "other" for n in SHAPES},
        ),
        lambda: kn.NormalizedSGD(RATE, 0.9, norm=None, step_size={"conv": 0.25}),
    ),
    "skip_large_updates": Pair(
        lambda o: o.MultiSteps(
            o.sgd(RATE, 0.9),
            1,
            should_skip_update_fn=functools.partial(
                o.skip_large_updates, max_squared_norm=25.0
            ),
        ),
        lambda: kn.ClippedSGD(RATE, 0.9, scope="global", max_norm=5.0, skip=True),
    ),
    "clip_by_block_rms": Pair(
        lambda o: o.chain(o.clip_by_block_rms(0.5), o.sgd(RATE, 0.9)),
        lambda: kn.ClippedSGD(RATE, 0.9, norm="avg_l2", max_norm=0.5),
    ),
    "clip_by_block_rms-of-update": Pair(
        lambda o: o.chain(
            o.scale_by_adam(eps=TINY), o.clip_by_block_rms(0.5), o.scale(-RATE)
        ),
        lambda: kn.ClippedAdam(
            RATE, epsilon=TINY, norm="avg_l2", max_norm=0.5, apply_to="update"
        ),
    ),
    "adaptive_grad_clip": Pair(
        lambda o: o.chain(o.adaptive_grad_clip(0.1, eps=0.3), o.sgd(RATE, 0.9)),
        lambda: kn.ClippedSGD(
            RATE, 0.9, scope="unit", max_norm=WeightNorm(0.1, minimum=0.3)
        ),
        names=NOT_RANK_3,
        zeros=("bias", "dense"),
    ),
    "adaptive_grad_clip-axis": Pair(
        lambda o: o.chain(
            o.adaptive_grad_clip(0.1, eps=1.2, axis=(0, 1)), o.sgd(RATE, 0.9)
        ),
        lambda: kn.ClippedSGD(
            RATE, 0.9, scope="unit", max_norm=WeightNorm(0.1, minimum=1.2)
        ),
        names=["conv1d"],
    ),
    "normalize_by_update_norm": Pair(
        lambda o: o.chain(o.normalize_by_update_norm(eps=0.0), o.sgd(RATE, 0.9)),
        lambda: kn.NormalizedSGD(RATE, 0.9, scope="global"),
    ),
    "normalize_by_update_norm-of-update": Pair(
        lambda o: o.chain(
            o.trace(0.9), o.normalize_by_update_norm(eps=0.0), o.scale(-RATE)
        ),
        lambda: kn.NormalizedSGD(RATE, 0.9, scope="global", apply_to="update"),
    ),
    "normalize_by_update_norm-of-each": Pair(
        lambda o: o.chain(
            o.trace(0.9),
            each_alone(o, o.normalize_by_update_norm(eps=0.0)),
            o.scale(-RATE),
        ),
        lambda: kn.NormalizedSGD(RATE, 0.9, apply_to="update"),
    ),
    "normalize_by_update_norm-Nesterov": Pair(
        lambda o: o.chain(
            o.trace(0.9, nesterov=True),
            each_alone(o, o.normalize_by_update_norm(eps=0.0)),
            o.scale(-RATE),
        ),
        lambda: kn.NormalizedSGD(RATE, 0.9, nesterov=True, apply_to="update"),
    ),
    "scale_by_trust_ratio": Pair(
        lambda o: o.chain(
            o.trace(0.9), o.scale_by_trust_ratio(trust_coefficient=0.1), o.scale(-RATE)
        ),
        lambda: kn.NormalizedSGD(
            RATE, 0.9, apply_to="update", step_size=WeightNorm(0.1)
        ),
    ),
    "scale_by_trust_ratio-min_norm": Pair(
        lambda o: o.chain(
            o.trace(0.9),
            o.scale_by_trust_ratio(min_norm=0.3, trust_coefficient=0.1),
            o.scale(-RATE),
        ),
        lambda: kn.NormalizedSGD(
            RATE,
            0.9,
            apply_to="update",
            norm_epsilon=0.3,
            step_size=WeightNorm(0.1, minimum=0.3),
        ),
        zeros=("bias", "dense"),
    ),
    "scale_by_param_block_norm": Pair(
        lambda o: o.chain(
            o.scale_by_adam(eps=TINY), o.scale_by_param_block_norm(0.3), o.scale(-RATE)
        ),
        lambda: kn.NormalizedAdam(
            RATE, epsilon=TINY, norm=None, step_size=WeightNorm(minimum=0.3)
        ),
        zeros=("bias", "dense"),
    ),
    "lars": Pair(
        lambda o: o.lars(RATE),
        lambda: kn.NormalizedSGD(RATE, 0.9, step_size=WeightNorm(0.001)),
    ),
    "lars-trust_ratio_mask": Pair(
        lambda o: o.lars(
            RATE,
            trust_coefficient=0.1,
            nesterov=True,
            trust_ratio_mask={n: n not in ("bias", "scale") for n in SHAPES},
        ),
        lambda: kn.NormalizedSGD(
            RATE,
            0.9,
            nesterov=True,
            exclude=("bias", "scale"),
            step_size=WeightNorm(0.1),
        ),
    ),
    "lamb": Pair(
        lambda o: o.lamb(RATE, eps=TINY),
        lambda: kn.NormalizedAdam(
            RATE, epsilon=TINY, apply_to="update", step_size=WeightNorm()
        ),
    ),
    "fromage": Pair(
        lambda o: o.fromage(RATE),
        lambda: kn.NormalizedSGD(
            RATE,
            norm_epsilon=1e-6,
            step_size=WeightNorm(),
            weight_decay=(1 - (1 + RATE**2) ** -0.5) / RATE,
        ),
    ),
    "centralize": Pair(
        lambda o: o.chain(unit_first(o, o.centralize()), o.sgd(RATE, 0.9)),
        lambda: kn.NormalizedSGD(RATE, 0.9, norm=None, centralize=True),
    ),
    "centralize-first": Pair(
        lambda o: o.chain(
            unit_first(o, o.centralize()),
            o.normalize_by_update_norm(eps=0.0),
            o.sgd(RATE, 0.9),
        ),
        lambda: kn.NormalizedSGD(RATE, 0.9, scope="global", centralize=True),
    ),
}


@each(OPTAX_PAIRS)
def test_ours_equal_optax(pair, optax):
    check(pair, train_optax(pair.peer(optax), *draw(pair)))


def test_skipping_equals_apply_if_finite_of_optax(optax):
    pair = Pair(None, lambda: kn.ClippedAdam())
    weights, steps = draw(pair)
    steps[2]["dense"][0, 0], steps[3]["bias"][1] = np.nan, np.inf
    peer = optax.apply_if_finite(optax.adam(RATE, *BETAS, eps=TINY), 5)
    ours = kn.ClippedAdam(
        RATE, *BETAS, epsilon=TINY, scope="global", max_norm=1e30, skip=True
    )
    moved = train(ours, weights, steps)
    assert_same(moved, train_optax(peer, weights, steps))
    assert ours.skipped_steps == 2
    assert all(np.isfinite(m).all() for m in moved.values())


def test_adaptive_grad_clip_of_optax_has_other_units_at_rank_3(optax):
    pair = OPTAX_PAIRS["adaptive_grad_clip-axis"]
    peer = optax.chain(optax.adaptive_grad_clip(0.1, eps=1.2), optax.sgd(RATE, 0.9))
    with pytest.raises(AssertionError):
        check(pair, train_optax(peer, *draw(pair)))


# Compared with PyTorch.


class SGDWithChangedGradients:
    """Lets a function change the gradients before each step of SGD."""

    def __init__(self, torch, params, change):
        self.params, self.change = params, change
        self.optimizer = torch.optim.SGD(params, RATE, momentum=0.9)

    def step(self):
        self.change(self.params)
        self.optimizer.step()


def with_sgd(change):
    return lambda torch, params: SGDWithChangedGradients(torch, params, change)


def clip_each(torch, params, limit):
    for p in params:
        torch.nn.utils.clip_grad_norm_(p, limit)


TORCH_PAIRS = {
    "clip_grad_norm_": Pair(
        lambda t: lambda params: t.nn.utils.clip_grad_norm_(params, 5.0),
        lambda: kn.ClippedSGD(RATE, 0.9, max_norm=5.0, scope="global"),
    ),
    "clip_grad_norm_-inf": Pair(
        lambda t: (
            lambda params: t.nn.utils.clip_grad_norm_(
                params, 5.0, norm_type=float("inf")
            )
        ),
        lambda: kn.ClippedSGD(RATE, 0.9, norm="max", max_norm=5.0, scope="global"),
    ),
    "clip_grad_norm_-1": Pair(
        lambda t: lambda params: t.nn.utils.clip_grad_norm_(params, 5.0, norm_type=1),
        lambda: kn.ClippedSGD(RATE, 0.9, norm="l1", max_norm=5.0, scope="global"),
    ),
    "clip_grad_norm_-of-each": Pair(
        lambda t: lambda params: clip_each(t, params, 5.0),
        lambda: kn.ClippedSGD(RATE, 0.9, max_norm=5.0),
    ),
}


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's optimizers")
def test_step_size_patterns_equal_parameter_groups_of_torch():
    def groups(torch, params):
        own = [{"params": params[3:], "lr": 0.25 * RATE}, {"params": params[:3]}]
        return torch.optim.AdamW(own, RATE, BETAS, TINY, weight_decay=0.125)

    pair = Pair(
        groups,
        lambda: kn.NormalizedAdamW(
            RATE, 0.125, *BETAS, TINY, norm=None, step_size={"conv": 0.25}
        ),
    )
    assert list(SHAPES)[3:] == ["conv1d", "conv2d", "conv3d"]
    check(pair, train_torch(pair.peer, *draw(pair)))


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's functions")
@each(TORCH_PAIRS)
def test_ours_equal_torch_clipping(pair):
    import torch

    check(pair, train_torch(with_sgd(pair.peer(torch)), *draw(pair)))


# Compared with pytorch_optimizer. The first pairs apply its functions and then SGD.


def clip_by_agc(po, params):
    for p in params:
        p.grad = po.agc(p.detach(), p.grad, 0.3, 0.1)


def centralize_each(po, params):
    for p in params:
        po.centralize_gradient(p.grad)


PYTORCH_OPTIMIZER_PAIRS = {
    "agc": Pair(
        lambda po: with_sgd(lambda params: clip_by_agc(po, params)),
        lambda: kn.ClippedSGD(
            RATE, 0.9, scope="unit", max_norm=WeightNorm(0.1, minimum=0.3)
        ),
        names=NOT_RANK_3,
        zeros=("bias", "dense"),
    ),
    "centralize_gradient": Pair(
        lambda po: with_sgd(lambda params: centralize_each(po, params)),
        lambda: kn.NormalizedSGD(RATE, 0.9, norm=None, centralize=True),
    ),
    "use_gc": Pair(
        lambda po: (
            lambda _, params: po.Lion(
                params, RATE, betas=(0.9, 0.99), weight_decay=0.0, use_gc=True
            )
        ),
        lambda: kn.NormalizedLion(
            RATE, beta_1=0.9, beta_2=0.99, norm=None, centralize=True
        ),
    ),
    "AdaGC": Pair(
        lambda po: (
            lambda _, params: po.AdaGC(
                params,
                RATE,
                betas=BETAS,
                beta=0.9,
                lambda_abs=1e30,
                lambda_rel=1.5,
                warmup_steps=1,
                weight_decay=0.1,
                eps=TINY,
            )
        ),
        lambda: kn.ClippedAdamW(
            RATE,
            beta_1=BETAS[0],
            beta_2=BETAS[1],
            weight_decay=0.1,
            epsilon=TINY,
            max_norm=RunningNorm(1.5, decay=0.9, warmup=1),
        ),
    ),
    "LARS": Pair(
        lambda po: lambda _, params: po.LARS(params, RATE, trust_coefficient=0.1),
        lambda: kn.NormalizedSGD(
            RATE, 0.9, exclude=("bias", "scale"), step_size=WeightNorm(0.1)
        ),
    ),
    "Lamb": Pair(
        lambda po: lambda _, params: po.Lamb(params, RATE, eps=TINY, adam_debias=True),
        lambda: kn.NormalizedAdam(
            RATE, epsilon=TINY, apply_to="update", step_size=WeightNorm()
        ),
    ),
    "StableAdamW": Pair(
        lambda po: (
            lambda _, params: po.StableAdamW(
                params, RATE, betas=(0.0, 0.99), weight_decay=0.0, eps=TINY
            )
        ),
        lambda: kn.ClippedAdam(
            RATE,
            beta_1=0.0,
            beta_2=0.99,
            epsilon=TINY,
            norm="avg_l2",
            max_norm=1.0,
            apply_to="update",
        ),
    ),
}


@each(PYTORCH_OPTIMIZER_PAIRS)
def test_ours_equal_pytorch_optimizer(pair, pytorch_optimizer):
    make = pair.peer(pytorch_optimizer)
    check(pair, train_torch(make, *draw(pair), unit_first=True))


# An argument of Keras itself.


@pytest.mark.parametrize("peer", ["optax", "torch"])
def test_clipvalue_of_keras_equals_clipping_by_value_of_peers(peer):
    pair = Pair(None, None)
    if {"optax": "jax"}.get(peer, peer) != BACKEND:
        pytest.skip("for another backend")
    module = pytest.importorskip(peer)
    if peer == "optax":
        chain = module.chain(module.clip(0.5), module.sgd(RATE, 0.9))
        expected = train_optax(chain, *draw(pair))
    else:
        clip = module.nn.utils.clip_grad_value_
        expected = train_torch(with_sgd(lambda params: clip(params, 0.5)), *draw(pair))
    assert_same(
        train(keras.optimizers.SGD(RATE, 0.9, clipvalue=0.5), *draw(pair)), expected
    )
    with pytest.raises(AssertionError):
        assert_same(train(keras.optimizers.SGD(RATE, 0.9), *draw(pair)), expected)


# Differences that docs/coming_from.md names.


def one_step(optimizer, weights, gradient):
    variable = keras.Variable(weights, "float64")
    optimizer.apply([ops.convert_to_tensor(gradient, "float64")], [variable])
    return np.linalg.norm(ops.convert_to_numpy(variable) - weights)


def test_zero_weights_move_by_the_learning_rate_but_not_with_lamb():
    zeros, gradient = np.zeros(4), [3.0, 0.5, -1.0, 2.0]
    ours = kn.NormalizedAdam(RATE, apply_to="update", step_size=WeightNorm())
    assert one_step(ours, zeros, gradient) == pytest.approx(RATE, rel=1e-5)
    lamb = keras.optimizers.Lamb(RATE)  # Adam's update has four entries of ±1.
    assert one_step(lamb, zeros, gradient) == pytest.approx(2 * RATE, rel=1e-5)


@pytest.mark.parametrize("scope", ["variable", "global"])
def test_clipping_overflows_in_keras_but_not_in_ours(scope):
    name = {"variable": "clipnorm", "global": "global_clipnorm"}[scope]
    for optimizer, step_length in [
        (kn.ClippedSGD(RATE, scope=scope), RATE),
        (keras.optimizers.SGD(RATE, **{name: 1.0}), 0 if scope == "variable" else None),
    ]:
        variable = keras.Variable(np.zeros(4), "float32")
        gradient = ops.full((4,), 1e25, "float32")
        optimizer.apply([gradient], [variable])
        moved = np.linalg.norm(ops.convert_to_numpy(variable))
        if step_length is None:
            assert np.isnan(moved)
        else:
            assert moved == pytest.approx(step_length, rel=1e-5)


def test_keras_never_calls_get_gradients():
    class WithGetGradients(keras.optimizers.SGD):
        def get_gradients(self, loss, params):
            raise AssertionError

    moved = []
    for optimizer in (WithGetGradients(0.5), keras.optimizers.SGD(0.5)):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.set_weights([np.ones((2, 1)), np.zeros(1)])
        model.compile(optimizer, loss="mse")
        model.fit(np.ones((2, 2)), np.ones((2, 1)), verbose=0)
        moved.append(model.get_weights()[0] - 1)
    np.testing.assert_array_equal(*moved)
    # A centralized gradient with two equal entries would be 0.
    assert np.abs(moved[0]).min() > 0.1
    kernel, gradient = keras.Variable(np.ones((2, 1))), ops.ones((2, 1))
    kn.NormalizedSGD(0.5, norm=None, centralize=True).apply([gradient], [kernel])
    np.testing.assert_array_equal(ops.convert_to_numpy(kernel), 1)


# Calls in docs/coming_from.md.

PAGE = ROOT / "docs/coming_from.md"


def test_every_optimizer_on_the_page_can_be_made():
    rows = [row for row in PAGE.read_text().splitlines() if row.startswith("| ")]
    spans = [s for row in rows for s in re.findall(r"`([^`]+)`", row.split(" | ")[1])]
    calls = {s for s in spans if re.match(r"(Clipped|Normalized|Orthogonal)\w+\(", s)}
    assert len(calls) > 40
    arguments = {"lr": 0.1, "m": 0.9, "c": 0.5, "eps": 1e-3, "wd": 0.1}
    namespace = vars(keras.optimizers) | vars(kn) | vars(kn.directions) | arguments
    for call in calls:
        eval(call, dict(namespace))
