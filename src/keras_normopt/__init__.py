"""Normalized-gradient optimizers for Keras 3, on JAX, TensorFlow and PyTorch."""

try:
    # Imports Keras, which imports its backend.
    from keras_normopt import (
        callbacks,
        directions,
        experiments,
        norms,
        optimizers,
        step_sizes,
        testing,
    )
except ModuleNotFoundError as error:
    if error.name not in ("jax", "tensorflow", "torch"):
        raise
    raise ModuleNotFoundError(
        f"Keras uses the backend {error.name}, which is not installed. Run "
        f'`pip install "keras_normopt[{error.name}]"`, or set the environment variable '
        "KERAS_BACKEND to an installed backend (jax, tensorflow or torch)",
        name=error.name,
    ) from error
from keras_normopt import _earlier_names  # noqa: F401  (It adds modules.)
from keras_normopt._optimizer.factory import clipped, normalized
from keras_normopt._transforms.thresholds import RunningNorm
from keras_normopt.compat import ClippedOptimizer, NormalizedOptimizer
from keras_normopt.description import describe
from keras_normopt.diagnosis import diagnose
from keras_normopt.norms._registry import register_norm
from keras_normopt.optimizers import *  # noqa: F403  (its __all__ is the list of them)
from keras_normopt.plotting import plot_gradient_norms
from keras_normopt.step_sizes import GradientCorrelation, WeightNorm

__version__ = "0.1.0"

__all__ = [
    "ClippedOptimizer",
    "GradientCorrelation",
    "NormalizedOptimizer",
    "RunningNorm",
    "WeightNorm",
    "callbacks",
    "clipped",
    "describe",
    "diagnose",
    "directions",
    "experiments",
    "normalized",
    "norms",
    "plot_gradient_norms",
    "register_norm",
    "step_sizes",
    "testing",
]
__all__ += optimizers.__all__
