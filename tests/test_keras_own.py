"""Keras's own tests of its optimizers, with ours, and `norm=None`, in their place."""

import unittest

import keras
import pytest

import keras_normopt

# The name of the base, and the module of the installed Keras that holds its tests.
MODULES = {
    "SGD": "sgd_test",
    "Adam": "adam_test",
    "AdamW": "adamw_test",
    "RMSprop": "rmsprop_test",
    "Adagrad": "adagrad_test",
    "Adadelta": "adadelta_test",
    "Adamax": "adamax_test",
    "Nadam": "nadam_test",
    "Ftrl": "ftrl_test",
    "Lion": "lion_test",
    "Adafactor": "adafactor_test",
    "Lamb": "lamb_test",
    "Muon": "muon_test",
    "ScheduleFreeAdamW": "schedule_free_adamw_test",
}


def in_the_place_of(base):
    normalized = getattr(keras_normopt, f"Normalized{base.__name__}")

    @keras.saving.register_keras_serializable("keras_own_tests")
    class InPlace(normalized):
        def __init__(self, *args, norm=None, **kwargs):
            super().__init__(*args, norm=norm, **kwargs)

    return InPlace


@pytest.mark.filterwarnings("ignore")  # What Keras's tests warn of is theirs.
@pytest.mark.parametrize("name", MODULES)
def test_keras_own(name, monkeypatch):
    if not hasattr(keras.optimizers, name):
        pytest.skip(f"this Keras has no {name}")
    module = pytest.importorskip(
        f"keras.src.optimizers.{MODULES[name]}",
        reason="the oldest supported Keras comes without its tests",
        exc_type=ModuleNotFoundError,
    )
    replacement = in_the_place_of(getattr(keras.optimizers, name))
    monkeypatch.setattr(module, name, replacement)
    # The ones beside our class that compare it with others are theirs as well.
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromModule(module).run(result)
    failures = [f"{case}\n{text}" for case, text in result.failures + result.errors]
    assert not failures, "\n\n".join(failures)
    assert result.testsRun - len(result.skipped) >= 3


def test_the_list_is_whole():
    ours = {c.__name__ for c in keras_normopt.optimizers.ALIASES.values()}
    assert {f"Normalized{name}" for name in MODULES} >= ours
