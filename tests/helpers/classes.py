"""The ready-made classes whose bases have an update to normalize."""

import inspect

import keras
import pytest

import keras_normopt

BACKEND = keras.backend.backend()
REFUSED = ("NormalizedFtrl", "NormalizedScheduleFreeAdamW")
MUON = pytest.mark.skipif(
    BACKEND == "tensorflow", reason="there stock Muon fails on float64"
)
CLASSES = [
    pytest.param(cls, marks=[MUON] * (cls.__name__ == "NormalizedMuon"))
    for cls in keras_normopt.optimizers.NORMALIZED.values()
    if cls.__name__ not in REFUSED
]


def without_decay(cls, **arguments):
    """What is not part of the update, set to nothing."""
    for name in ("weight_decay", "adam_weight_decay"):
        if name in inspect.signature(cls).parameters:
            arguments[name] = 0.0
    return arguments
