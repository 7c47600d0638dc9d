"""Whatever README and docstrings show, runs; and so does the demo."""

import doctest
import importlib
import pathlib
import pkgutil

import keras
import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

import keras_normopt
from keras_normopt import demo

README = pathlib.Path(__file__).parents[1] / "README.md"
MODULES = [
    module.name
    for module in pkgutil.iter_modules(keras_normopt.__path__, "keras_normopt.")
]
WITHOUT_EXAMPLES = {"demo", "documentation", "mixin", "normalization", "sparse"}


def test_readme(tmp_path, monkeypatch, custom_norms):
    monkeypatch.chdir(tmp_path)
    examples = list(Document.parse(str(README), PythonCodeBlockParser()).examples())
    assert len(examples) >= 7
    for example in examples:
        example.evaluate()


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


def test_demo(tmp_path, capsys):
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
