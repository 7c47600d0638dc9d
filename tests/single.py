"""Normalization of a list of gradients, without an optimizer."""

import numpy as np
from keras import ops

from keras_normopt._optimizer import base
from keras_normopt._transforms import rescale
from keras_normopt.norms._user_norms import ReturnsGradient


def make_step(gradients, blocks=None, per_unit=False, kind=None):
    gradients = [
        ops.convert_to_tensor(g) if isinstance(g, np.ndarray) else g for g in gradients
    ]
    blocks = blocks or [[i] for i in range(len(gradients))]
    kind = kind or base.FastStep  # Another one with `--plain`.
    return kind(gradients, None, blocks, per_unit)


def normalize(gradients, norm, epsilon=0.0, blocks=None, per_unit=False, kind=None):
    step = make_step(gradients, blocks, per_unit, kind)
    if isinstance(norm, ReturnsGradient):
        step.replace(norm)
    else:
        rescale.normalize(step, norm, epsilon)
    return step.gradients
