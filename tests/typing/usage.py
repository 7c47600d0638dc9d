"""How a typed program uses the package. Type-checked by the lint session, never run.

An unused `type: ignore` is an error there, so that each of them is a test.
"""

from typing import Any

import keras

import keras_normopt
from keras_normopt import NormalizedOptimizer, norms, register_norm


def largest(gradient: Any) -> Any:
    return norms.max(gradient)


keras_normopt.NormalizedAdam(0.001, 0.9, norm="avg_l2", norm_epsilon=1e-7)
keras_normopt.NormalizedAdam(learning_rate=0.001, norm=None, clipnorm=1.0)
keras_normopt.NormalizedSGD(norm=largest)
keras_normopt.NormalizedSGD(norm=3)  # type: ignore[arg-type]
keras_normopt.NormalizedSGD(norm_epsilon="1e-7")  # type: ignore[arg-type]

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
