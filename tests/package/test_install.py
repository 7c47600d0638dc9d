"""Tests the errors for missing packages, and the versions in the project's files."""

import importlib
import inspect
import itertools
import re
import sys
import tomllib

import pytest

import keras_normopt
from helpers.pages import ROOT
from helpers.processes import finish, start

pytestmark = pytest.mark.sdist


class Without:
    """An entry of `sys.meta_path` that hides one module.

    `sys.modules[name] = None` would not work. Its error names the part of the module
    that is imported first.
    """

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def last_line_without(name, **environment):
    """Returns the last line of a process that imports our package without a module."""
    code = [
        inspect.getsource(Without),
        "import sys",
        f"sys.meta_path.insert(0, Without({name!r}))",
        "import keras_normopt",
    ]
    [printed] = finish(start("-c", "\n".join(code), **environment), returncode=1)
    return printed.splitlines()[-1]


def test_the_error_names_a_missing_backend():
    assert last_line_without("tensorflow", KERAS_BACKEND="tensorflow") == (
        "ModuleNotFoundError: Keras uses the backend tensorflow, which is not "
        'installed. Run `pip install "keras_normopt[tensorflow]"`, or set the '
        "environment variable KERAS_BACKEND to an installed backend (jax, tensorflow "
        "or torch)"
    )


def test_other_missing_modules_keep_their_error():
    error = "ModuleNotFoundError: No module named 'keras'"
    assert last_line_without("keras") == error


@pytest.fixture
def hide(monkeypatch):
    """Lets a test import one of our modules again while another module is missing."""

    def hidden(module, name):
        # Modules that are imported already would hide the missing module.
        for imported in list(sys.modules):
            if imported.startswith((f"keras_normopt.{module}", name)):
                monkeypatch.delitem(sys.modules, imported)
        before = getattr(keras_normopt, module, None)
        monkeypatch.setattr(keras_normopt, module, before, raising=False)
        monkeypatch.setattr(sys, "meta_path", [Without(name), *sys.meta_path])

    return hidden


@pytest.mark.parametrize(
    ("command", "name"),
    [("demo", name) for name in ("matplotlib", "sklearn", "tqdm")]
    + [("experiments", name) for name in ("pandas", "seaborn", "tqdm")],
)
def test_a_command_names_its_missing_extra(command, name, hide):
    hide(command, name)
    module = f"keras_normopt.{command}" + ".__main__" * (command == "experiments")
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module(module)
    hint = f'{name}: pip install "keras_normopt[{command}]"'
    assert str(error.value).endswith(hint)


@pytest.mark.parametrize("name", ["joblib", "seaborn"])
def test_compare_needs_its_extra_only_when_it_is_used(name, hide):
    hide("experiments", name)
    experiments = importlib.import_module("keras_normopt.experiments")
    hint = f'{name}: pip install "keras_normopt\\[experiments\\]"'
    with pytest.raises(ModuleNotFoundError, match=hint):
        experiments.compare  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'comparison'"):
        experiments.comparison  # noqa: B018


def test_the_package_imports_experiments_only_when_they_are_used():
    code = [
        inspect.getsource(Without),
        "import sys",
        'sys.meta_path.insert(0, Without("seaborn"))',
        "import keras_normopt",
        'print("experiments" in dir(keras_normopt), dir(keras_normopt.experiments))',
        'print("keras_normopt.experiments.comparing" in sys.modules)',
        "keras_normopt.experiments.compare",
    ]
    [printed] = finish(start("-c", "\n".join(code)), returncode=1)
    lines = printed.splitlines()
    [listed] = [line for line in lines if line.startswith("True [")]
    assert "'compare'" in listed
    assert "False" in lines  # No package of the extra is imported.
    assert lines[-1].endswith('need seaborn: pip install "keras_normopt[experiments]"')


def test_files_agree_on_the_version():
    version = keras_normopt.__version__
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_oldest_declared_keras_is_the_oldest_tested_keras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [oldest] = re.findall('OLDEST_KERAS = "(.+)"', (ROOT / "noxfile.py").read_text())
    extras = project["optional-dependencies"].values()
    declared = itertools.chain(project["dependencies"], *extras)
    bounds = [package for package in declared if re.search("[<=>~]", package)]
    assert bounds == [f"keras>={oldest.removesuffix('.0')}"]
