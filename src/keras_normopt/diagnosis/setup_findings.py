"""Finds what is wrong before the first step: in data, loss, variables and rate."""

import math

import ml_dtypes
import numpy as np

from keras_normopt.diagnosis.finding import Finding, kernels, some

# `docs/results/diagnosis.md` has the measurements behind these numbers.
LARGE = 30  # The rms of inputs and targets.
SMALL = 0.03  # The rms of inputs and targets.
# The size of outputs over that of a healthy model. A cross-entropy grows with it, and a
# squared error with its square.
FIRST_LOSS = 4
TRAINED = 0.05  # The loss, over that of the best constant prediction.
UPDATE = 0.5  # The first update, over the weights.
USUAL = 0.05  # The first update, over the weights, of a model that trains well.
EXAMPLES = 32  # Fewer may be of one class by chance.


def frozen(diagnosis, optimizer):
    """Finds variables that the model does not train."""
    names = diagnosis.frozen
    if not names:
        return None
    total = len(names) + len(diagnosis.blocks)
    if diagnosis.blocks:
        return Finding(
            "frozen",
            f"{some(names, total)} are frozen.",
            "If that is not what you want, set `trainable = True` on their layers, and "
            "compile again.",
        )
    return Finding(
        "nothing_trainable",
        f"Nothing is trainable: {some(names, total)} are frozen.",
        "Set `trainable = True` on the layers that should learn, and compile again.",
    )


def constant_targets(diagnosis, optimizer):
    """Finds targets that are all the same."""
    targets = diagnosis.targets
    if not targets or targets.examples < EXAMPLES:
        return None
    if targets.classes == 1:
        what = f"`y` has one class: all {targets.examples} labels are the same."
    elif targets.classes is None and targets.range.low == targets.range.high:
        what = f"All {targets.examples} targets are the same: {targets.range.low:.3g}."
    else:
        return None
    return Finding(
        "constant_targets",
        what,
        "A model can only learn this value from them. Check how `y` is made. If the "
        "data is sorted, shuffle it. If the other classes are rare, draw them more "
        "often.",
    )


def label_range(diagnosis, optimizer):
    """Finds labels for which the model has no output."""
    targets = diagnosis.targets
    if not targets or not targets.outputs:
        return None
    low, high = targets.range.low, targets.range.high
    if low >= 0 and high < targets.outputs:
        return None
    return Finding(
        "label_range",
        f"Labels go from {low:g} to {high:g}, and the loss expects 0 to "
        f"{targets.outputs - 1}.",
        "Number the classes from 0, or give the last layer more units.",
    )


def input_scale(diagnosis, optimizer):
    """Finds inputs that are too large or too small."""
    inputs = diagnosis.inputs
    if not inputs or SMALL <= inputs.rms <= LARGE or not inputs.rms:
        return None
    return Finding(
        "input_scale",
        f"Inputs go from {inputs.low:.3g} to {inputs.high:.3g}. A typical value is "
        f"{inputs.rms:.3g}.",
        "Scale the inputs: layers are made for a mean of 0 and a standard deviation of "
        "1. Divide pixels by 255, or adapt a `Normalization` layer. If you cannot, a "
        "normalized optimizer depends least on the scale.",
    )


def is_unscaled(diagnosis):
    """Returns whether the scale of inputs or targets does not suit layers."""
    return bool(input_scale(diagnosis, None) or target_scale(diagnosis, None))


def target_scale(diagnosis, optimizer):
    """Finds targets that are too large or too small."""
    targets = diagnosis.targets
    if not targets or targets.classes is not None:
        return None
    size = targets.range.rms
    if SMALL <= size <= LARGE or not size:
        return None
    return Finding(
        "target_scale",
        f"Targets go from {targets.range.low:.3g} to {targets.range.high:.3g}. A "
        f"typical value is {size:.3g}.",
        "Scale the targets to a mean of 0 and a standard deviation of 1, and scale "
        "predictions back.",
    )


def first_loss(diagnosis, optimizer):
    """Finds a first loss far above that of guessing."""
    loss, constants = diagnosis.logs.get("loss"), diagnosis.constants
    if not constants or loss is None or not math.isfinite(loss):
        return None
    factor = FIRST_LOSS**2 if constants.squared else FIRST_LOSS
    if loss <= factor * constants.zero or not constants.zero:
        return None
    classes = diagnosis.targets.outputs
    guess = f"guessing among {classes} classes" if classes else "predicting 0"
    return Finding(
        "first_loss",
        f"The first loss, {loss:.3g}, is far above that of {guess}, "
        f"{constants.zero:.3g}.",
        "The outputs of the model are too large. Look at the scale of the inputs and "
        "at the initialization. Normalization layers keep outputs small.",
    )


def is_trained(diagnosis):
    """Returns whether a model predicts far better than a constant."""
    loss, constants = diagnosis.logs.get("loss"), diagnosis.constants
    return bool(constants) and loss is not None and loss < TRAINED * constants.best


def trained(diagnosis, optimizer):
    """Finds that the model is trained already."""
    if not is_trained(diagnosis):
        return None
    return Finding(
        "trained",
        f"The model is trained already: its loss, {diagnosis.logs['loss']:.2g}, is far "
        f"below that of the best constant, {diagnosis.constants.best:.2g}.",
        "Small gradients are normal then. If it predicts badly on other data, it "
        "overfits or the data differs. Another optimizer does not help.",
    )


def half_precision(diagnosis, optimizer):
    """Finds numbers that are too small for a half-precision dtype."""
    half = [b for b in diagnosis.blocks if b.variable_dtype in ("float16", "bfloat16")]
    if not half:
        return None
    dtype = half[0].variable_dtype
    epsilon = getattr(optimizer, "epsilon", None)
    tiny = float(ml_dtypes.finfo(dtype).smallest_normal)
    if dtype == "float16" and epsilon and epsilon < tiny:
        fact = (
            f"float16 holds {some([b.name for b in half], len(diagnosis.blocks))}. "
            f"Squares of their gradients underflow, and so does the optimizer's "
            f"epsilon, {epsilon:g}."
        )
    elif any(b.unmoved > 0.5 for b in kernels(half)):
        worst = max(kernels(half), key=lambda b: b.unmoved)
        fact = (
            f"The first update leaves {worst.unmoved:.0%} of the entries of "
            f"{worst.name} unchanged, as {dtype} rounds it away."
        )
    else:
        return None
    return Finding(
        "half_precision",
        fact,
        f'Set the dtype policy "mixed_{dtype}", which keeps variables in float32. Or '
        "use a larger epsilon.",
    )


def _updates(diagnosis):
    """Returns the known ratios of the first update to the weights, over kernels."""
    updates = [
        b.update / b.weight_norm for b in kernels(diagnosis.blocks) if b.weight_norm
    ]
    return [update for update in updates if update > 0]


def typical_update(diagnosis):
    """Returns the median of the ratios of `_updates`, NaN if there are none."""
    updates = _updates(diagnosis)
    return float(np.median(updates)) if updates else math.nan


def range_of_updates(diagnosis):
    """Returns the largest ratio of `_updates` over the smallest, ∞ without any."""
    updates = _updates(diagnosis)
    return max(updates) / min(updates) if updates else math.inf


def long_steps(diagnosis, optimizer):
    """Finds first updates that are too long."""
    update = typical_update(diagnosis)
    if not update > UPDATE:
        return None
    advice = (
        f"Lower the learning rate by a factor of {update / USUAL:.0f} or more. Updates "
        "of models that train well are .001 to .1 of the weights."
    )
    if is_unscaled(diagnosis):
        advice = "Scale inputs and targets first, and ask again."
    return Finding(
        "long_steps",
        "The learning rate is too high: the first update of a typical kernel is "
        f"{update:.2g} times as long as its weights.",
        advice,
    )


def passed(diagnosis):
    """Returns sentences for the finding "nothing", one for each check that was made."""
    inputs, targets = diagnosis.inputs, diagnosis.targets
    facts = []
    if inputs:
        facts.append(f"Inputs go from {inputs.low:.2g} to {inputs.high:.2g}.")
    if targets and targets.classes:
        facts.append(f"`y` has {targets.classes} classes.")
    elif targets:
        facts.append(
            f"Targets go from {targets.range.low:.2g} to {targets.range.high:.2g}."
        )
    if diagnosis.constants:
        facts.append(f"The best constant has a loss of {diagnosis.constants.best:.3g}.")
    if typical_update(diagnosis) > 0:
        facts.append(
            f"The first update is {typical_update(diagnosis):.2g} of the weights."
        )
    return facts
