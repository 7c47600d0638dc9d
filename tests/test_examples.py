"""Whatever README, the documentation and docstrings show, runs; so does the demo."""

import doctest
import functools
import importlib
import pathlib
import pkgutil
import unittest

import keras
import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import by_hand
import keras_normopt
from keras_normopt import demo
from test_devices import GUIDE

ROOT = pathlib.Path(__file__).parents[1]
# The page of programs, each to be run in processes of its own, is for test_devices.
PAGES = [ROOT / "README.md", *sorted({*ROOT.glob("docs/*.md")} - {GUIDE})]
MODULES = [
    module.name
    for module in pkgutil.iter_modules(keras_normopt.__path__, "keras_normopt.")
]
WITHOUT_EXAMPLES = {
    "_branch",
    "_groups",
    "_range",
    "clipping",
    "custom",
    "demo",
    "docstrings",
    "entries",
    "experiments",
    "hook",
    "layers",
    "lengths",
    "mixin",
    "monitoring",
    "normalization",
    "options",
    "saving",
    "scopes",
    "sparse",
    "step",
    "updates",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages(page, tmp_path, monkeypatch, custom_norms):
    monkeypatch.chdir(tmp_path)
    evaluate(page)


@functools.cache
def evaluate(page):
    """Runs the code of a page, and returns the names that it defined."""
    document = Document.parse(str(page), PythonCodeBlockParser(), SkipParser())
    skipped = 0
    for example in document.examples():
        try:
            example.evaluate()
        except unittest.SkipTest:  # A block for another backend.
            skipped += 1
    assert skipped == 2 * page.read_text().count("<!--- skip") / 3
    return document.namespace


# The loops and steps that docs/custom_loops.md shows, against the loop by hand.


@pytest.fixture(scope="module")
def shown():
    return evaluate(ROOT / "docs/custom_loops.md")


@pytest.mark.parametrize("base", ["SGD", "Adam", "RMSprop"])
def test_own_train_step(shown, base):
    optimizer = getattr(keras_normopt, f"Normalized{base}")(0.1)
    inputs = keras.Input((3,))
    model = shown["OwnStep"](inputs, keras.layers.Dense(4)(inputs))
    model.set_weights(by_hand.START)
    model.compile(optimizer=optimizer, loss="mse")
    losses = by_hand.fit(model).history["loss"]
    assert 0 < losses[-1] < losses[0]
    plain = getattr(keras.optimizers, base)(0.1)
    by_hand.assert_same(model.get_weights(), by_hand.train(plain))


@pytest.mark.parametrize("base", ["SGD", "Adam", "RMSprop"])
def test_own_loop(shown, base):
    optimizer = getattr(keras_normopt, f"Normalized{base}")(0.1)
    model = by_hand.make_model(None)
    shown["train"](model, optimizer, by_hand.EPOCHS * by_hand.batches())
    plain = getattr(keras.optimizers, base)(0.1)
    by_hand.assert_same(model.get_weights(), by_hand.train(plain))


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name, custom_norms):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    has_examples = name.removeprefix("keras_normopt.") not in WITHOUT_EXAMPLES
    assert bool(result.attempted) == has_examples


def test_every_class_shows_an_example_of_itself():
    for cls in keras_normopt.optimizers.ALIASES.values():
        examples = doctest.DocTestParser().get_examples(cls.__doc__)
        assert any(cls.__name__ in example.source for example in examples)


def test_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "LAYERS", 4)  # The session `demo` trains all 30.
    picture = tmp_path / "curves.png"
    demo.main(["--epochs", "1", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"backend {keras.backend.backend()}" in printed
    for name in demo.OPTIMIZERS:
        assert f"\n{name} " in printed


def test_demo_refuses_no_epochs(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--epochs", "0"])
    assert "--epochs must be at least 1, not 0" in capsys.readouterr().err


def test_every_option_is_documented():
    for cls in keras_normopt.optimizers.ALIASES.values():
        for option in cls.OPTIONS:
            assert f"\n    {option}: " in cls.__doc__


def test_what_options_say_of_gradient_correlation():
    shown = evaluate(ROOT / "docs/options.md")
    assert shown["fixed"] == pytest.approx(4.44, abs=0.01)
    assert shown["adaptive"] == pytest.approx(2.22, abs=0.01)
