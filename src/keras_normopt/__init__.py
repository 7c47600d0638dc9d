"""Normalized-gradient optimizers for Keras 3, on JAX, TensorFlow and PyTorch alike."""

from keras_normopt import norms, optimizers
from keras_normopt.compat import NormalizedOptimizer
from keras_normopt.factory import normalized
from keras_normopt.optimizers import *  # noqa: F403  (its __all__ is the list of them)
from keras_normopt.registry import register_norm

__version__ = "0.1.0"

__all__ = ["NormalizedOptimizer", "normalized", "norms", "register_norm"]
__all__ += optimizers.__all__
