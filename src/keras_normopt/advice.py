"""What follows from measured gradients, in words."""

import dataclasses
import math
import textwrap

import keras
import numpy as np

from keras_normopt import optimizers
from keras_normopt.mixin import Rescaling
from keras_normopt.normalization import Normalization

# Where to draw lines was measured, at the start of training. Kernels of dense,
# convolutional and recurrent networks were apart by factors of 2 to 30, those of a
# transformer by 300; of 30 layers with batch normalization, which normalizing helped,
# by 1,300, and of 30 sigmoid layers by 10¹⁸.
APART = 1000
# Over weights, gradients of 12 plain layers, which SGD trains, were .002, and of 24,
# which it does not, .00002.
VANISHED = 1e-4
# Of networks on scaled inputs .002 to 2, on inputs that were not scaled 80 to 100.
EXPLODED = 10
# A bias whose gradient is zero in exact arithmetic came out at 10⁻⁷ of its kernel's.
NOISE = 1e-5
SPIKE = 5
SHARE = 0.01
ROWS = 12


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        name: `"not_finite"`, `"no_gradient"`, `"underflow"`, `"vanishing"`,
            `"exploding"`, `"apart"`, `"below_epsilon"`, `"noise"`, `"spikes"`,
            `"long_steps"` or `"nothing"`.
        fact: What was measured.
        advice: What follows, and why.
    """

    name: str
    fact: str
    advice: str

    def __str__(self) -> str:
        return f"{self.fact} {self.advice}"


def kernels(blocks):
    """Those whose sizes can be compared: of two or more axes, with a gradient."""
    return [b for b in blocks if _is_kernel(b) and b.rms > 0 and math.isfinite(b.rms)]


def _is_kernel(block):
    # Biases of attention and of recurrent layers have several axes.
    return len(block.shape) > 1 and not block.name.endswith("bias")


def findings(diagnosis, optimizer):
    """Tuple of what was found, the gravest first; never empty."""
    checks = (
        _not_finite,
        _no_gradient,
        _underflow,
        _vanishing,
        _exploding,
        _apart,
        _below_epsilon,
        _noise,
        _spikes,
        _long_steps,
    )
    found = [check(diagnosis, optimizer) for check in checks]
    return tuple(filter(None, found)) or (_nothing(diagnosis),)


def _not_finite(diagnosis, optimizer):
    bad = [block for block in diagnosis.blocks if block.not_finite]
    if not bad:
        return None
    fact = f"NaN or infinity in the gradient of {_some(bad, diagnosis.blocks)}."
    if diagnosis.loss_scale != 1:
        return Finding(
            "not_finite",
            fact,
            f"The loss was multiplied by {diagnosis.loss_scale:g}, so that they may "
            "have overflowed: `LossScaleOptimizer` then leaves the step out and halves "
            "the scale, which is usual in the first steps. Train some, and ask again.",
        )
    return Finding(
        "not_finite",
        fact,
        "No norm and no clipping mends that: find where it comes from. Look at the "
        "inputs, at logarithms, roots and divisions in the loss, and at what weights "
        "have become.",
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
        f"No gradient, or zero, for {_some(without, diagnosis.blocks)}.",
        "Zero stays zero, whatever it is divided by. Does the loss depend on these "
        "variables? Units of ReLU that are never on, and saturated sigmoids, pass "
        "nothing back either: another initialization or activation, shortcuts or "
        "normalization layers do.",
    )


def _underflow(diagnosis, optimizer):
    small = [block for block in diagnosis.blocks if block.underflow >= SHARE]
    if not small:
        return None
    worst = max(small, key=lambda block: block.underflow)
    advice = (
        "What is lost there no norm brings back. Scale the loss, as `compile` does by "
        'itself under "mixed_float16", or compute in "mixed_bfloat16".'
        if worst.dtype == "float16"
        else "Gradients have vanished before they come to the optimizer: shortcuts, "
        "normalization layers or another initialization keep them from it."
    )
    return Finding(
        "underflow",
        f"Too small for {worst.dtype}: {worst.underflow:.0%} of the entries of "
        f"{worst.name}, and 1 % or more of those of {_some(small, diagnosis.blocks)}.",
        advice,
    )


def _typical(diagnosis):
    """The median, over kernels, of the gradient over the weights; 1 without kernels."""
    sizes = [block.relative for block in kernels(diagnosis.blocks)]
    sizes = [size for size in sizes if math.isfinite(size)]
    return float(np.median(sizes)) if sizes else 1.0


def _vanishing(diagnosis, optimizer):
    typical = _typical(diagnosis)
    if typical > VANISHED or _normalizes(optimizer):
        return None
    fact = (
        f"Vanishing: the gradient of a typical kernel is {typical:.1g} times as long "
        "as its weights."
    )
    rate = _rate(optimizer)
    if rate is not None:
        fact += (
            f" At this learning rate it takes {1 / (rate * typical):.1g} steps to move "
            "it by its own length."
        )
    return Finding(
        "vanishing",
        fact,
        "If the model is not trained already, its loss hardly depends on what these "
        f"layers do. {_normalized(optimizer)} steps as far as the learning rate says, "
        "however small gradients are; shortcuts, normalization layers or another "
        "initialization remove the cause.",
    )


def _noise(diagnosis, optimizer):
    sizes = {b.name.rpartition("/")[0]: b.rms for b in kernels(diagnosis.blocks)}
    found = [
        block
        for block in diagnosis.blocks
        if 0 < block.rms < NOISE * sizes.get(block.name.rpartition("/")[0], 0)
    ]
    if not found:
        return None
    return Finding(
        "noise",
        f"Nothing but rounding errors, it seems: the gradient of "
        f"{_some(found, diagnosis.blocks)}, less than {NOISE:g} of that of its kernel.",
        "So it is with a bias before a batch normalization, or that of the keys of "
        "attention, which change nothing. If you normalize, `exclude` them, or noise "
        "becomes full steps.",
    )


def _below_epsilon(diagnosis, optimizer):
    epsilon = getattr(optimizer, "epsilon", None)
    if not epsilon or _normalizes(optimizer):
        return None
    below = [b for b in kernels(diagnosis.blocks) if b.rms < epsilon]
    if not below:
        return None
    name = type(optimizer).__name__
    return Finding(
        "below_epsilon",
        f"Smaller than the epsilon of {name}, {epsilon:g}: the typical entry of "
        f"{_some(below, diagnosis.blocks)}.",
        f"What {name} divides by is epsilon there, so that these variables hardly "
        f"move. {_normalized(optimizer)} brings gradients to norm 1 before {name} "
        "sees them; a smaller epsilon helps as well.",
    )


def _apart(diagnosis, optimizer):
    ratio = diagnosis.ratio
    if ratio < APART:
        return None
    compared = kernels(diagnosis.blocks)
    smallest = min(compared, key=lambda block: block.rms)
    largest = max(compared, key=lambda block: block.rms)
    fact = (
        f"Apart by a factor of {ratio:.2g}: the typical entry of {largest.name} "
        f"is {largest.rms:.2g}, that of {smallest.name} {smallest.rms:.2g}."
        f"{_trend(diagnosis)}"
    )
    if _normalizes(optimizer):
        advice = (
            f"{type(optimizer).__name__} divides each block by its norm, so that this "
            "is taken care of."
        )
    elif hasattr(optimizer, "epsilon"):
        name = type(optimizer).__name__
        advice = (
            f"{name} evens out by itself what lasts, if it is above its epsilon. "
            f"Where sizes change from step to step {_normalized(optimizer)} did "
            "better on very deep networks, and otherwise no better: compare the two."
        )
    else:
        advice = (
            f"No learning rate suits them all. {_normalized(optimizer)} gives every "
            "variable a step of the same length; Adam is the other thing to try."
        )
    return Finding("apart", fact, advice)


def _exploding(diagnosis, optimizer):
    typical = _typical(diagnosis)
    if typical < EXPLODED:
        return None
    return Finding(
        "exploding",
        f"Large: the gradient of a typical kernel is {typical:.2g} times as long as "
        "its weights.",
        "Are inputs and targets scaled? A mean of 0 and a standard deviation of 1 are "
        "what layers are made for. To normalize or to clip bounds the step, and leaves "
        "the cause.",
    )


def _trend(diagnosis):
    """How sizes change with depth, if they do so steadily."""
    sizes = np.log10([block.rms for block in kernels(diagnosis.blocks)])
    if len(sizes) < 4:
        return ""
    steps = np.arange(len(sizes))
    if abs(np.corrcoef(steps, sizes)[0, 1]) < 0.8:
        return ""
    slope = np.polyfit(steps, sizes, 1)[0]
    what = "shrink" if slope > 0 else "grow"
    return (
        f" From the last kernel to the first they {what}, by a factor of about "
        f"{10 ** abs(slope):.2g} each."
    )


def _spikes(diagnosis, optimizer):
    totals = np.array(diagnosis.totals)
    if len(totals) < 3 or not np.isfinite(totals).all():
        return None
    typical = np.median(totals)
    if totals.max() < SPIKE * typical:
        return None
    clipping = optimizers.spelled(optimizer, "clipped") if optimizer else "clipped(...)"
    return Finding(
        "spikes",
        f"The gradient of one batch is {totals.max() / typical:.2g} times as long as "
        "that of the typical one.",
        f"`{clipping}`, made with `max_norm=RunningNorm()`, clips such a step and "
        "leaves the others alone; a larger batch helps too.",
    )


def _rate(optimizer):
    """The learning rate of plain SGD, with momentum made up; `None` for others."""
    if not isinstance(optimizer, keras.optimizers.SGD) or isinstance(
        optimizer, Rescaling
    ):
        return None
    rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
    return rate / (1 - optimizer.momentum)


def _long_steps(diagnosis, optimizer):
    rate = _rate(optimizer)
    found = [b for b in kernels(diagnosis.blocks) if math.isfinite(b.relative)]
    if rate is None or not found:
        return None
    block = max(found, key=lambda b: b.relative)
    if rate * block.relative < 1:
        return None
    return Finding(
        "long_steps",
        f"At this learning rate {block.name} moves by {rate * block.relative:.2g} "
        "times its own length in a step, momentum included.",
        "That is likely to diverge: lower the rate, or clip.",
    )


def _nothing(diagnosis):
    return Finding(
        "nothing",
        f"All finite, none missing, the typical entries of kernels within a factor of "
        f"{diagnosis.ratio:.2g}, no batch that stands out.",
        "There is nothing here that normalizing would put right: leave the optimizer "
        "as it is.",
    )


def _normalizes(optimizer):
    return isinstance(optimizer, Normalization) and optimizer.norm is not None


def _normalized(optimizer):
    """What to write to have the gradients of an optimizer normalized."""
    if optimizer is None:
        return "`NormalizedSGD` or `NormalizedAdam`"
    return f"`{optimizers.spelled(optimizer)}`"


def _some(blocks, of):
    names = [block.name for block in blocks]
    if len(names) > 3:
        names = [names[0], "…", names[-1]]
    return f"{len(blocks)} of {len(of)} variables ({', '.join(names)})"


def report(diagnosis):
    """What a `Diagnosis` prints."""
    of = f" for {diagnosis.optimizer}" if diagnosis.optimizer else ""
    lines = [
        f"Gradients of {len(diagnosis.totals)} batches{of}: "
        + ", ".join(f"{name} {value:.4g}" for name, value in diagnosis.logs.items()),
        f"l2 norm of all: {np.median(diagnosis.totals):.3g}",
        "",
        *_table(diagnosis.blocks),
    ]
    for finding in diagnosis.findings:
        lines += ["", *_wrapped(finding.fact, "- "), *_wrapped(finding.advice, "  ")]
    return "\n".join(lines)


def _wrapped(text, indent):
    return textwrap.wrap(
        text,
        88,
        initial_indent=indent,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(blocks):
    shown = _thinned(blocks)
    rows = [["", "norm", "rms", "/ weights", "zeros"]]
    rows += [
        [block.name]
        + [f"{value:.2g}" for value in (block.norm, block.rms, block.relative)]
        + [f"{block.zeros:.0%}"]
        for block in shown
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([f"{name:{widths[0]}}", *map(str.rjust, numbers, widths[1:])])
        for name, *numbers in rows
    ]
    if len(shown) < len(blocks):
        lines.append(f"({len(shown)} of {len(blocks)} variables; `blocks` has all)")
    return lines


def _thinned(blocks):
    """All if they are few, else kernels, evenly over the depth."""
    if len(blocks) <= ROWS:
        return blocks
    of = [block for block in blocks if _is_kernel(block)] or blocks
    even = np.linspace(0, len(of) - 1, min(ROWS, len(of)))
    return [of[round(position)] for position in even]
