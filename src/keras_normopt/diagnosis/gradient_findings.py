"""Finds problems in measured gradients, and says what helps."""

import math
from typing import Any

import numpy as np

from keras_normopt._optimizer.factory import spelled
from keras_normopt._optimizer.normalized import NormalizedMixin
from keras_normopt.diagnosis import setup_findings as setup
from keras_normopt.diagnosis.finding import Finding, kernels, some, typical

# `docs/results/diagnosis.md` has the measurements behind these numbers.
APART = 1000  # The largest rms of a kernel over the smallest.
VANISHED = 1e-4  # The norm of a gradient over the norm of its weights.
MOVES = 1e-5  # The norm of the first update over the norm of its weights.
EXPLODED = 10  # The norm of a gradient over the norm of its weights.
GAIN = 1.5  # The gain of a recurrent kernel.
NOISE = 1e-5  # The rms of a bias over the rms of its kernel.
SPIKE = 5  # The norm in one batch over the median norm.
SHARE = 0.01  # The share of the entries of a gradient.
DEEP = 4  # The number of kernels.
CONCENTRATED = 0.9  # The largest singular value of a gradient over its norm.

# These findings ask for no change. A model without other findings is healthy.
BENIGN = {"frozen", "noise"}


def findings(diagnosis, optimizer):
    """Returns a tuple of findings, the gravest first. It is never empty."""
    if not diagnosis.blocks:
        return (setup.frozen(diagnosis, optimizer),)
    checks = (
        _not_finite,
        setup.constant_targets,
        setup.label_range,
        setup.input_scale,
        setup.target_scale,
        setup.half_precision,
        _no_gradient,
        _underflow,
        _exploding,
        setup.long_steps,
        setup.first_loss,
        _vanishing,
        _apart,
        _below_epsilon,
        _noise,
        _spikes,
        setup.trained,
        setup.frozen,
    )
    found = [check(diagnosis, optimizer) for check in checks]
    if {finding.name for finding in found if finding} <= BENIGN:
        found = [_nothing(diagnosis), _low_rank(diagnosis, optimizer), *found]
    return tuple([finding for finding in found if finding])


def _not_finite(diagnosis, optimizer):
    bad = [block for block in diagnosis.blocks if block.not_finite]
    if not bad:
        return None
    fact = f"NaN or infinity in the gradient of {_some(bad, diagnosis)}."
    if diagnosis.loss_scale != 1:
        return Finding(
            "not_finite",
            fact,
            f"The loss was multiplied by {diagnosis.loss_scale:g}, so gradients may "
            "overflow. `LossScaleOptimizer` then skips the step and halves the scale, "
            "which is usual in the first steps. Train a little, and ask again.",
        )
    return Finding(
        "not_finite",
        fact,
        "No norm and no clipping repairs that. Find where it comes from: look at the "
        "inputs, at logarithms, roots and divisions in the loss, and at the weights.",
    )


def _no_gradient(diagnosis, optimizer):
    without = [
        block
        for block in diagnosis.blocks
        if block.missing or (not block.not_finite and not any(block.norms))
    ]
    if not without:
        return None
    return Finding(
        "no_gradient",
        f"The gradient is missing or zero for {_some(without, diagnosis)}.",
        "Zero stays zero, whatever divides it. Does the loss depend on these "
        "variables? Dead ReLU units and saturated sigmoids pass no gradient back. "
        "Another initialization or activation, shortcuts or normalization layers help.",
    )


def _underflow(diagnosis, optimizer):
    small = [block for block in diagnosis.blocks if block.underflow >= SHARE]
    if not small:
        return None
    worst = max(small, key=lambda block: block.underflow)
    advice = (
        "No norm restores what underflow loses. Scale the loss, as `compile` does "
        'under "mixed_float16", or compute in "mixed_bfloat16".'
        if worst.dtype == "float16"
        else "Gradients vanish before they reach the optimizer. Shortcuts, "
        "normalization layers or another initialization prevent that."
    )
    return Finding(
        "underflow",
        f"Some entries of gradients are too small for {worst.dtype}: "
        f"{worst.underflow:.0%} of the entries of {worst.name}, and 1 % or more of the "
        f"entries of {_some(small, diagnosis)}.",
        advice,
    )


def _exploding(diagnosis, optimizer):
    size = typical(diagnosis.blocks)
    recurrent = _exploding_cells(diagnosis)
    if not recurrent and (size < EXPLODED or setup.is_unscaled(diagnosis)):
        return None
    if not recurrent:
        return Finding(
            "exploding",
            f"The gradient of a typical kernel is {size:.2g} times as long as its "
            "weights.",
            "Initialize kernels smaller, or add normalization layers. Clipping or "
            "normalizing bounds the step, and leaves the cause.",
        )
    block = max(recurrent, key=lambda block: block.gain)
    clipping = spelled(optimizer, "clipped") if optimizer else "ClippedAdam"
    return Finding(
        "exploding",
        f"{block.name} multiplies the state by up to {block.gain:.2g} in "
        "each step of time. The gradient of its layer is more than "
        f"{EXPLODED} times as long as the weights.",
        "Initialize the recurrent kernel smaller: the default of Keras has a gain of "
        f"1. If you cannot, clip: `{clipping}` bounds the step.",
    )


def _exploding_cells(diagnosis):
    """Returns the too large recurrent kernels of cells with an exploding gradient."""
    sizes: dict[Any, float] = {}
    for block in kernels(diagnosis.blocks):
        cell = _layer_of(block)
        sizes[cell] = max(sizes.get(cell, 0), block.relative)
    return [
        block
        for block in diagnosis.blocks
        if block.gain > GAIN and sizes.get(_layer_of(block), 0) > EXPLODED
    ]


def _layer_of(block):
    return block.name.rpartition("/")[0]


def _shrinkage(diagnosis):
    """Returns the factor by which gradients shrink from a kernel to the previous one.

    The factor is below 1 if gradients grow. It is 1 if their size does not change
    steadily with depth.
    """
    sizes = np.log10([block.rms for block in kernels(diagnosis.blocks)])
    if len(sizes) < 4:
        return 1.0
    steps = np.arange(len(sizes))
    if abs(np.corrcoef(steps, sizes)[0, 1]) < 0.8:
        return 1.0
    return float(10 ** np.polyfit(steps, sizes, 1)[0])


def _is_lost(diagnosis):
    """Returns whether the inputs hardly reach the outputs, as after many sigmoids."""
    return diagnosis.ratio > APART and _shrinkage(diagnosis) > 1


def _vanishing(diagnosis, optimizer):
    if setup.is_trained(diagnosis):
        return None
    fact = (
        f"The gradient of a typical kernel is {typical(diagnosis.blocks):.1g} times as "
        "long as its weights."
    )
    if _is_lost(diagnosis):
        return Finding(
            "vanishing",
            f"{fact} From the last layer to the first it shrinks by a factor of "
            f"{diagnosis.ratio:.1g}, {_shrinkage(diagnosis):.2g} for each kernel.",
            "The inputs hardly reach the outputs. Add `BatchNormalization` after each "
            "layer and use Adam. Shortcuts, or another activation such as ReLU, help "
            "too. If you must keep the layers, try `OrthogonalSGD(0.03)`, which trains "
            "eight sigmoid layers.",
        )
    moves = setup.typical_update(diagnosis)
    if typical(diagnosis.blocks) > VANISHED or moves > MOVES or _normalizes(optimizer):
        return None
    if math.isfinite(moves):
        fact += f" The first update moves it by {moves:.1g} of its length."
    return Finding(
        "vanishing",
        fact,
        "`OrthogonalSGD(0.01)` moves every kernel as far as the learning rate says, "
        f"however small gradients are. {_normalized(optimizer)} does too, and trains "
        "deep networks less well. Shortcuts, normalization layers or another "
        "initialization remove the cause.",
    )


def _apart(diagnosis, optimizer):
    if diagnosis.ratio < APART or setup.is_trained(diagnosis) or _is_lost(diagnosis):
        return None
    if _normalizes(optimizer) or hasattr(optimizer, "epsilon"):
        # Their updates have one size. `below_epsilon` reports the exceptions.
        return None
    if setup.range_of_updates(diagnosis) < APART:
        return None
    compared = kernels(diagnosis.blocks)
    smallest = min(compared, key=lambda block: block.rms)
    largest = max(compared, key=lambda block: block.rms)
    return Finding(
        "apart",
        f"The typical entry of {largest.name} is {largest.rms:.2g}, that of "
        f"{smallest.name} {smallest.rms:.2g}: a factor of {diagnosis.ratio:.2g}."
        f"{_trend(diagnosis)}",
        f"No learning rate suits them all. {_normalized(optimizer)} gives every "
        "variable a step of the same length. Adam is the alternative.",
    )


def _below_epsilon(diagnosis, optimizer):
    epsilon = getattr(optimizer, "epsilon", None)
    if not epsilon or _normalizes(optimizer) or setup.is_trained(diagnosis):
        return None
    below = [b for b in kernels(diagnosis.blocks) if b.rms < epsilon]
    if not below:
        return None
    name = type(optimizer).__name__
    cure = "A smaller epsilon"
    if not _is_lost(diagnosis):
        cure = (
            f"{_normalized(optimizer)} brings gradients to norm 1 before {name} sees "
            "them. A smaller epsilon"
        )
    return Finding(
        "below_epsilon",
        f"The typical entry of the gradient is smaller than the epsilon of {name}, "
        f"{epsilon:g}, for {_some(below, diagnosis)}.",
        f"{name} divides by epsilon there, so these variables hardly move. {cure} "
        "helps as well.",
    )


def _noise(diagnosis, optimizer):
    # A kernel with an exploding gradient proves nothing about its bias.
    sizes = {
        _layer_of(block): block.rms
        for block in kernels(diagnosis.blocks)
        if not block.relative > EXPLODED
    }
    found = [
        block
        for block in diagnosis.blocks
        if 0 < block.rms < NOISE * sizes.get(_layer_of(block), 0)
    ]
    if not found:
        return None
    return Finding(
        "noise",
        f"The gradient is probably only rounding errors for {_some(found, diagnosis)}. "
        f"It is less than {NOISE:g} of the gradient of the layer's kernel.",
        "A bias before a batch normalization, or the bias of attention's keys, changes "
        "nothing. If you normalize, `exclude` them, or noise becomes full steps.",
    )


def _spikes(diagnosis, optimizer):
    totals = np.array(diagnosis.totals)
    if len(totals) < 3 or not np.isfinite(totals).all():
        return None
    median = np.median(totals)
    if totals.max() < SPIKE * median or not median:
        return None
    clipping = spelled(optimizer, "clipped") if optimizer else "clipped(...)"
    return Finding(
        "spikes",
        f"The gradient of one batch is {totals.max() / median:.2g} times as long as "
        "that of the typical one.",
        f"`{clipping}` with `max_norm=RunningNorm()` clips such a step and leaves the "
        "others alone. A larger batch helps too.",
    )


def _low_rank(diagnosis, optimizer):
    values = [block.concentration for block in kernels(diagnosis.blocks)]
    values = [value for value in values if math.isfinite(value)]
    if len(values) < DEEP or np.median(values) < CONCENTRATED:
        return None
    if setup.is_trained(diagnosis) or _orthogonalizes(optimizer):
        return None
    return Finding(
        "low_rank",
        "The gradient of a typical kernel is close to rank 1: its largest singular "
        f"value is {np.median(values):.2f} of its norm.",
        "The steps of SGD and Adam move such a kernel mostly in one direction. "
        "`OrthogonalSGD(0.01)` moves it equally far in all of them. Compare it with "
        "your optimizer (`experiments.compare`).",
    )


def _orthogonalizes(optimizer):
    direction = getattr(optimizer, "direction", None)
    return direction is not None or type(optimizer).__name__ == "Muon"


def _nothing(diagnosis):
    checked = [
        "All gradients are finite, and none is missing.",
        f"The typical entries of kernels are within a factor of {diagnosis.ratio:.2g}.",
        "No batch stands out.",
        *setup.passed(diagnosis),
    ]
    return Finding(
        "nothing",
        " ".join(checked),
        "Keep the optimizer. If the model trains badly, look at what `diagnose` "
        "cannot see. Do labels belong to their inputs? Is the model large enough? Is "
        "the learning rate too low (`experiments.compare`)? Ask again after an epoch.",
    )


def _trend(diagnosis):
    """Returns a sentence on how gradients change with depth, or an empty string."""
    factor = _shrinkage(diagnosis)
    if factor == 1:
        return ""
    what = "shrink" if factor > 1 else "grow"
    return (
        f" From the last kernel to the first they {what} by a factor of about "
        f"{max(factor, 1 / factor):.2g} each."
    )


def _normalizes(optimizer):
    return isinstance(optimizer, NormalizedMixin) and optimizer.norm is not None


def _normalized(optimizer):
    """Returns the code of the normalized class of an optimizer."""
    if optimizer is None:
        return "`NormalizedSGD` or `NormalizedAdam`"
    return f"`{spelled(optimizer)}`"


def _some(blocks, diagnosis):
    return some([block.name for block in blocks], len(diagnosis.blocks))
