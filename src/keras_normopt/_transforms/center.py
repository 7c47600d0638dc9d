"""Subtracts from gradients their mean over each output unit (arXiv 2004.01461)."""

import math

from keras import ops


def center(gradients):
    """Centers each gradient of several axes."""
    gradients.replace(_centered)


def _centered(gradient):
    axes = tuple(range(len(gradient.shape) - 1))
    if not axes or not math.prod(gradient.shape):
        return gradient
    # Not `ops.mean`, which computes float64 in float32 on JAX.
    entries = math.prod(gradient.shape[:-1])
    return gradient - ops.sum(gradient, axis=axes, keepdims=True) / entries
