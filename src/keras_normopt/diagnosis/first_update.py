"""Measures the first update of an optimizer, at the largest rate of its schedule."""

import contextlib
import math
import warnings

import keras
import numpy as np
from keras import ops

_ON_TORCH = keras.backend.backend() == "torch"
# The schedule of a user may have any length. Its rate changes slowly on a logarithmic
# scale of steps.
_STEPS = np.geomspace(1, 1e6, 31)


def largest_rate(optimizer):
    """Returns the largest learning rate of an optimizer over all its steps."""
    rate = getattr(optimizer, "_learning_rate", None)
    if not isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return float(ops.convert_to_numpy(optimizer.learning_rate))
    rates = [
        float(ops.convert_to_numpy(rate(ops.convert_to_tensor(step, "int32"))))
        for step in _steps_of(rate)
    ]
    return max(rates, key=abs)


def _steps_of(schedule):
    """Returns the steps at which a rate may rise or fall, and steps between them."""
    turns = {0}
    for value in vars(schedule).values():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        turns |= {int(n) for n in numbers if isinstance(n, (int, float)) and n >= 1}
    turns |= {sum(turns)}
    around = {step + shift for step in turns for shift in (-1, 0, 1)}
    steps = around | {int(step) for step in _STEPS}
    return sorted(step for step in steps if 0 <= step < 2**31)


def measure(optimizer, pairs):
    """Makes one step with a copy of the optimizer, and undoes the step.

    The step changes the variables themselves. Copies of the variables would have other
    paths and belong to no layer.

    Args:
        optimizer: An optimizer, which stays unchanged.
        pairs: List of pairs `(gradient, variable)`. A gradient is an array or `None`.

    Returns:
        Dictionary from the `id` of each variable to a dictionary of the fields `update`
        and `unmoved` of its `Block`.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    pairs = [(gradient, v) for gradient, v in pairs if gradient is not None]
    variables = [variable for _, variable in pairs]
    gradients = [ops.convert_to_tensor(g, v.dtype) for g, v in pairs]
    before = [np.array(ops.convert_to_numpy(variable)) for variable in variables]
    try:
        with warnings.catch_warnings(), _no_grad():
            warnings.simplefilter("ignore")  # The original has warned already.
            copy = _copy(optimizer, variables)
            for _ in range(copy.gradient_accumulation_steps or 1):
                copy.apply(gradients, variables)
        after = [np.array(ops.convert_to_numpy(variable)) for variable in variables]
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
    return {
        id(variable): _compared(old, new, gradient != 0, _summed(optimizer))
        for (gradient, variable), old, new in zip(pairs, before, after, strict=True)
    }


def _compared(old, new, has_gradient, summed):
    with np.errstate(all="ignore"):
        change = new.astype("float64") - old.astype("float64")
        return {
            "update": float(np.linalg.norm(change)) * summed,
            "unmoved": float(np.mean(change[has_gradient] == 0))
            if has_gradient.any()
            else 0.0,
        }


def _copy(optimizer, variables):
    """Copies an optimizer, with its state if it is built. Sets its largest rate."""
    copy = type(optimizer).from_config(_config(optimizer))
    if not optimizer.built:
        copy.build(variables)
        return copy
    copy.build(optimizer._trainable_variables)
    for new, old in zip(_state(copy), _state(optimizer), strict=True):
        new.assign(old)
    return copy


def _config(optimizer):
    rate = largest_rate(optimizer)
    # Schedules of users often have no config, so a number replaces them.
    bare = object.__new__(type(optimizer))
    vars(bare).update(vars(optimizer), _learning_rate=ops.convert_to_tensor(rate))
    return bare.get_config() | {"learning_rate": rate}


def _state(optimizer):
    return [v for v in optimizer.variables if v is not optimizer._learning_rate]


def _summed(optimizer):
    """Returns the factor by which momentum lengthens many equal updates."""
    if not isinstance(optimizer, (keras.optimizers.SGD, keras.optimizers.RMSprop)):
        return 1.0
    momentum = optimizer.momentum or 0.0
    return 1 / (1 - momentum) if momentum < 1 else math.inf


def _no_grad():
    if not _ON_TORCH:
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()
