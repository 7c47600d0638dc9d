"""Normalizes a list of gradients without an optimizer."""

import numpy as np
from keras import ops

from keras_normopt._blocks.arrangement import dense_axes
from keras_normopt._blocks.gradients import Gradients
from keras_normopt._transforms import rescale
from keras_normopt.norms import _registry


def make_gradients(tensors, blocks=None, per_unit=False):
    tensors = [
        ops.convert_to_tensor(t) if isinstance(t, np.ndarray) else t for t in tensors
    ]
    blocks = blocks or [[i] for i in range(len(tensors))]
    units = [dense_axes(tuple(t.shape)) for t in tensors] if per_unit else None
    return Gradients(tensors, dict(enumerate(blocks)), units)


def normalize(tensors, norm, epsilon=0.0, blocks=None, per_unit=False):
    gradients = make_gradients(tensors, blocks, per_unit)
    rescale.normalize(gradients, _registry.get(norm), epsilon)
    return gradients.tensors
