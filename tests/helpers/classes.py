"""Lists the ready-made classes whose updates can be normalized."""

import inspect

import keras
import pytest

import keras_normopt

BACKEND = keras.backend.backend()
REFUSED = ("NormalizedFtrl", "NormalizedScheduleFreeAdamW")
MUON = pytest.mark.skipif(
    BACKEND == "tensorflow", reason="stock Muon fails with float64 on TensorFlow"
)
CLASSES = [
    pytest.param(cls, marks=[MUON] * (cls.__name__ == "NormalizedMuon"))
    for cls in keras_normopt.optimizers.NORMALIZED.values()
    if cls.__name__ not in REFUSED
]


def without_decay(cls, **arguments):
    """Returns arguments that turn off weight decay, which is no part of the update."""
    for name in ("weight_decay", "adam_weight_decay"):
        if name in inspect.signature(cls).parameters:
            arguments[name] = 0.0
    return arguments
