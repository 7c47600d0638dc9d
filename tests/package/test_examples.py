"""Runs the examples of README, docstrings and the page on loops.

test_guide runs the other pages.
"""

import doctest
import importlib
import pkgutil

import keras
import pytest

import keras_normopt
from helpers import by_hand
from helpers.pages import ROOT, evaluate

pytestmark = [pytest.mark.newest_keras, pytest.mark.sdist]

MODULES = ["keras_normopt"] + [
    module.name
    for module in pkgutil.walk_packages(keras_normopt.__path__, "keras_normopt.")
    if not module.name.endswith("__main__")
]
WITH_EXAMPLES = {
    "keras_normopt",
    "keras_normopt.callbacks",
    "keras_normopt.compat",
    "keras_normopt.description",
    "keras_normopt.diagnosis.diagnosing",
    "keras_normopt.directions",
    "keras_normopt.experiments.comparing",
    "keras_normopt.experiments.coordinates",
    "keras_normopt.experiments.transferring",
    "keras_normopt.norms",
    "keras_normopt.optimizers",
    "keras_normopt.plotting",
    "keras_normopt.step_sizes",
    "keras_normopt.testing",
}


def test_the_programs_of_the_readme_run(tmp_path, monkeypatch, custom_norms):
    monkeypatch.chdir(tmp_path)
    evaluate(ROOT / "README.md")


# Steps and loops of docs/custom_loops.md, compared with training by hand.


@pytest.fixture(scope="module")
def page():
    return evaluate(ROOT / "docs/custom_loops.md")


@pytest.mark.parametrize("base", ["SGD", "Adam", "RMSprop"])
def test_the_train_step_in_the_page_on_loops_normalizes_gradients(page, base):
    optimizer = getattr(keras_normopt, f"Normalized{base}")(0.1)
    inputs = keras.Input((3,))
    model = page["OwnStep"](inputs, keras.layers.Dense(4)(inputs))
    model.set_weights(by_hand.START)
    model.compile(optimizer=optimizer, loss="mse")
    losses = by_hand.fit(model).history["loss"]
    assert 0 < losses[-1] < losses[0]
    plain = getattr(keras.optimizers, base)(0.1)
    by_hand.assert_same(model.get_weights(), by_hand.train(plain))


@pytest.mark.parametrize("base", ["SGD", "Adam", "RMSprop"])
def test_the_loop_in_the_page_on_loops_normalizes_gradients(page, base):
    optimizer = getattr(keras_normopt, f"Normalized{base}")(0.1)
    model = by_hand.make_model(None)
    page["train"](model, optimizer, by_hand.EPOCHS * by_hand.batches())
    plain = getattr(keras.optimizers, base)(0.1)
    by_hand.assert_same(model.get_weights(), by_hand.train(plain))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name, custom_norms):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert bool(result.attempted) == (name in WITH_EXAMPLES)


def test_the_docstring_of_every_class_has_an_example_with_this_class():
    for cls in keras_normopt.optimizers.ALIASES.values():
        examples = doctest.DocTestParser().get_examples(cls.__doc__)
        assert any(cls.__name__ in example.source for example in examples)


def test_every_option_is_documented():
    for cls in keras_normopt.optimizers.ALIASES.values():
        for option in cls.OPTIONS:
            assert f"\n    {option}: " in cls.__doc__
