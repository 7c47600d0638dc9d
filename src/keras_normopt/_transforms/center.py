"""Subtracts the mean from each output unit's gradient (arXiv 2004.01461)."""

import functools
import math

from keras import ops


def center(gradients, axes):
    """Centers each gradient that has output units.

    Args:
        gradients: The `Gradients`.
        axes: List of the `Axes` of each variable of the optimizer.
    """
    for position in gradients.positions:
        inputs = axes[gradients.indices[position]].inputs
        if inputs and math.prod(gradients.tensors[position].shape):
            centered = functools.partial(_centered, axes=tuple(i + 1 for i in inputs))
            gradients.replace(centered, [position])


def _centered(stack, axes):
    # Not `ops.mean`, which computes float64 in float32 on JAX.
    entries = math.prod([stack.shape[i] for i in axes])
    return stack - ops.sum(stack, axis=axes, keepdims=True) / entries
