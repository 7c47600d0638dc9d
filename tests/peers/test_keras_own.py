"""Runs Keras's tests of its optimizers on ours, in most cases with `norm=None`."""

import importlib
import unittest

import keras
import pytest

import keras_normopt

# Each base optimizer, and the module of Keras that tests it.
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


def replacement_of(base, norm=None):
    normalized = getattr(keras_normopt, f"Normalized{base.__name__}")
    default = norm

    @keras.saving.register_keras_serializable("keras_own_tests")
    class Replacement(normalized):
        def __init__(self, *args, norm=default, **kwargs):
            super().__init__(*args, norm=norm, **kwargs)

    return Replacement


def from_keras(module):
    return pytest.importorskip(
        f"keras.src.optimizers.{module}",
        reason="the oldest supported Keras comes without its tests",
        exc_type=ModuleNotFoundError,
    )


def assert_all_pass(tests, at_least):
    result = unittest.TestResult()
    tests.run(result)
    failures = [f"{case}\n{text}" for case, text in result.failures + result.errors]
    assert not failures, "\n\n".join(failures)
    assert result.testsRun - len(result.skipped) >= at_least


@pytest.mark.filterwarnings("ignore")  # Keras's tests may warn.
@pytest.mark.parametrize("name", MODULES)
def test_our_optimizers_pass_the_tests_of_keras(name, monkeypatch):
    if not hasattr(keras.optimizers, name):
        pytest.skip(f"this Keras has no {name}")
    module = from_keras(MODULES[name])
    replacement = replacement_of(getattr(keras.optimizers, name))
    monkeypatch.setattr(module, name, replacement)
    # The tests also use other optimizers, which remain those of Keras.
    assert_all_pass(unittest.defaultTestLoader.loadTestsFromModule(module), 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", [None, "l2", "std"])
@pytest.mark.parametrize("test", ["test_sparse_gradients", "test_sparse_correctness"])
def test_our_optimizers_pass_the_sparse_gradient_tests_of_keras(
    norm, test, monkeypatch
):
    if not keras.src.backend.SUPPORTS_SPARSE_TENSORS:
        pytest.skip("no sparse gradients on this backend")
    if keras.backend.backend() == "jax" and test == "test_sparse_gradients" and norm:
        pytest.skip(
            "norms make JAX's sparse arrays dense; `fit` never makes sparse arrays"
        )
    module = from_keras("optimizer_sparse_test")
    for name in MODULES:
        if hasattr(keras.src.optimizers, name):
            replacement = replacement_of(getattr(keras.optimizers, name), norm)
            monkeypatch.setattr(keras.src.optimizers, name, replacement)
    module = importlib.reload(module)  # The import creates the test cases.
    names = [n for n in dir(module.OptimizerSparseTest) if n.startswith(test)]
    tests = [module.OptimizerSparseTest(name) for name in names]
    assert_all_pass(unittest.TestSuite(tests), 15)


def test_the_list_of_modules_names_every_base():
    ours = {c.__name__ for c in keras_normopt.optimizers.NORMALIZED.values()}
    assert {f"Normalized{name}" for name in MODULES} >= ours
