"""A typed program that uses the package. The lint session checks its types only.

There, an unused `type: ignore` is an error, so each one is a test.
"""

from typing import Any

import keras

import keras_normopt
from keras_normopt import NormalizedOptimizer, norms, register_norm, step_sizes


def largest(gradient: Any) -> Any:
    return norms.max(gradient)


keras_normopt.NormalizedAdam(0.001, 0.9, norm="avg_l2", norm_epsilon=1e-7)
keras_normopt.NormalizedAdam(learning_rate=0.001, norm=None, clipnorm=1.0)
keras_normopt.NormalizedSGD(norm=largest)
keras_normopt.NormalizedSGD(norm=3)  # type: ignore[arg-type]
keras_normopt.NormalizedSGD(norm_epsilon="1e-7")  # type: ignore[arg-type]

keras_normopt.NormalizedAdam(scope="layer", exclude=("bias",), track_norms=True)
keras_normopt.NormalizedAdam(scope="model")  # type: ignore[arg-type]
keras_normopt.NormalizedAdam(step_size=step_sizes.WeightNorm(coefficient=0.1))
keras_normopt.NormalizedAdam(step_size="lars")  # type: ignore[arg-type]
keras_normopt.NormalizedAdam(apply_to="update", centralize=True)
keras_normopt.NormalizedAdam(apply_to="updates")  # type: ignore[arg-type]
keras_normopt.ClippedSGD(max_norm=keras_normopt.WeightNorm(0.01, minimum=1e-3))
keras_normopt.ClippedSGD(max_norm=keras_normopt.RunningNorm(warmup=10))
keras_normopt.ClippedSGD(max_norm="running_norm")
keras_normopt.ClippedSGD(max_norm=None)  # type: ignore[arg-type]
clipped = keras_normopt.ClippedAdam(norm="max", max_norm=2.0, track_norms=True)
sizes: dict[str, float] = clipped.gradient_norms
keras_normopt.testing.check_norm(norms.l2, max_examples=10)
keras_normopt.callbacks.GradientNorms(frequency=10, progress_bar=True)
keras_normopt.plot_gradient_norms({"grad_norm/a": [1.0]}, statistic="max", exclude=())
keras_normopt.plot_gradient_norms({}, statistic="median")  # type: ignore[arg-type]
keras_normopt.NormalizedSGD(step_size=keras_normopt.GradientCorrelation(rate=0.1))

optimizer = keras_normopt.NormalizedMuon()
floor: float = optimizer.norm_epsilon

register_norm("largest", largest)
register_norm(5, largest)  # type: ignore[call-overload]


@register_norm("own", overwrite=True)
def own(gradient: Any) -> Any:
    return gradient


NormalizedOptimizer("adam", normalization="own")
names: list[str] = NormalizedOptimizer.get_normalization_functions()
keras_normopt.normalized(keras.optimizers.SGD)
keras_normopt.normalized("adam")  # type: ignore[arg-type]
version: str = keras_normopt.__version__
