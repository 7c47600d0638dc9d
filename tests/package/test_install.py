"""What a user is told who lacks something, and what the project's files say of it."""

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
    """An entry of `sys.meta_path` that keeps one module from being found.

    `sys.modules[name] = None` would not do: the error then has the name of whatever
    part of the module is asked for first.
    """

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def last_line_without(name, **environment):
    """Of what is printed by a process that imports the package."""
    code = [
        inspect.getsource(Without),
        "import sys",
        f"sys.meta_path.insert(0, Without({name!r}))",
        "import keras_normopt",
    ]
    [printed] = finish(start("-c", "\n".join(code), **environment), returncode=1)
    return printed.splitlines()[-1]


def test_without_the_backend():
    assert last_line_without("tensorflow", KERAS_BACKEND="tensorflow") == (
        "ModuleNotFoundError: Keras is set to the backend tensorflow, which is not "
        'installed: pip install "keras_normopt[tensorflow]", or set the environment '
        "variable KERAS_BACKEND to one that is (jax, tensorflow or torch)"
    )


def test_other_missing_modules_keep_their_error():
    error = "ModuleNotFoundError: No module named 'keras'"
    assert last_line_without("keras") == error


@pytest.fixture
def hide(monkeypatch):
    """Has a module of ours imported anew, where another module is not installed."""

    def hidden(module, name):
        # Or what was imported before would still be there.
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
def test_a_command_without_its_extra(command, name, hide):
    hide(command, name)
    module = f"keras_normopt.{command}" + ".__main__" * (command == "experiments")
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module(module)
    hint = f'{name}: pip install "keras_normopt[{command}]"'
    assert str(error.value).endswith(hint)


@pytest.mark.parametrize("name", ["joblib", "seaborn"])
def test_compare_needs_its_extra_when_it_is_used(name, hide):
    hide("experiments", name)
    experiments = importlib.import_module("keras_normopt.experiments")
    hint = f'{name}: pip install "keras_normopt\\[experiments\\]"'
    with pytest.raises(ModuleNotFoundError, match=hint):
        experiments.compare  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'comparison'"):
        experiments.comparison  # noqa: B018


def test_the_experiments_come_with_the_package():
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
    [found] = [line for line in lines if line.startswith("True [")]
    assert "'compare'" in found
    assert "False" in lines  # Nothing is imported that only the extra has.
    assert lines[-1].endswith('need seaborn: pip install "keras_normopt[experiments]"')


def test_files_agree_on_the_version():
    version = keras_normopt.__version__
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_oldest_that_is_declared_is_the_oldest_that_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [oldest] = re.findall('OLDEST_KERAS = "(.+)"', (ROOT / "noxfile.py").read_text())
    extras = project["optional-dependencies"].values()
    declared = itertools.chain(project["dependencies"], *extras)
    bounds = [package for package in declared if re.search("[<=>~]", package)]
    assert bounds == [f"keras>={oldest.removesuffix('.0')}"]
