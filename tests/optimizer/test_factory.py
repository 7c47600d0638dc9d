"""Tests the class factory, and the bases and arguments that it refuses."""

import copy
import inspect
import math
import pickle
import sys
import types
import typing

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers.processes import finish, start
from keras_normopt import normalized
from keras_normopt._blocks import partition
from keras_normopt._optimizer.types import NormLike, Scope

BACKEND = keras.backend.backend()
needs_multi_optimizer = pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"),
    reason="this Keras has no MultiOptimizer",
)


class MySGD(keras.optimizers.SGD):
    """Plain gradient descent from another library.

    Args:
        warmth: Float. How warm it is.
    """

    def __init__(self, learning_rate=0.25, *, warmth=1.0, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.warmth = warmth

    def get_config(self):
        return super().get_config() | {"warmth": self.warmth}


def step(optimizer, gradient=(3.0, 4.0)):
    variable = keras.Variable([0.0, 0.0])
    optimizer.apply_gradients([(ops.convert_to_tensor(gradient), variable)])
    return -ops.convert_to_numpy(variable)


def test_the_import_loads_no_optional_package():
    code = """
import sys, keras
before = set(sys.modules)  # Keras itself imports some.
import keras_normopt
optional = {"jax", "tensorflow", "torch", "matplotlib", "hypothesis", "sklearn"}
print(sorted((sys.modules.keys() - before) & optional))
"""
    (printed,) = finish(start("-c", code))
    assert printed.splitlines()[-1] == "[]"


def test_a_third_party_base_keeps_its_arguments_and_documentation():
    cls = normalized(MySGD)
    assert cls.__name__ == "NormalizedMySGD"
    assert issubclass(cls, MySGD)
    optimizer = cls(warmth=3.0, norm="max")
    assert optimizer.warmth == 3.0
    np.testing.assert_allclose(step(optimizer), [0.25 * 0.75, 0.25], rtol=1e-6)
    assert list(inspect.signature(cls).parameters) == [
        "learning_rate",
        "warmth",
        "norm",
        "scope",
        "exclude",
        "track_norms",
        "apply_to",
        "centralize",
        "axes",
        "step_size",
        "norm_epsilon",
        "direction",
        "kwargs",
    ]
    assert "warmth: Float. How warm it is." in cls.__doc__
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_each_base_has_one_class():
    assert normalized(MySGD) is normalized(MySGD)
    for cls in keras_normopt.optimizers.NORMALIZED.values():
        base = getattr(keras.optimizers, cls.__name__.removeprefix("Normalized"))
        assert normalized(base) is cls
        # On PyTorch, `base()` returns an instance of another class than `base`.
        assert normalized(type(base())) is cls
        assert issubclass(cls, type(base()))


@pytest.mark.skipif(BACKEND != "torch", reason="foreach is PyTorch's")
def test_our_classes_use_foreach_like_their_bases(monkeypatch):
    import torch

    calls = []
    original = torch._foreach_add_
    monkeypatch.setattr(
        torch, "_foreach_add_", lambda *a, **k: (calls.append(1), original(*a, **k))
    )
    step(keras_normopt.NormalizedAdam())
    assert calls


def package_of(name, module, register_as=None):
    """Returns an optimizer class with the given name, in another module."""
    cls = type(name, (keras.optimizers.SGD,), {"__module__": module})
    sys.modules.setdefault(module, types.ModuleType(module))
    setattr(sys.modules[module], name, cls)
    if register_as:
        keras.saving.register_keras_serializable(package=register_as)(cls)
    return cls


@pytest.mark.parametrize("register_as", [None, "Custom", "theirs"])
def test_bases_with_the_same_name_do_not_collide(register_as):
    first = normalized(package_of("Twin", "first_party", register_as and "Custom"))
    second = normalized(package_of("Twin", "second_party", register_as))
    assert first is not second
    for cls in (first, second):
        config = keras.optimizers.serialize(cls(norm="max"))
        loaded = keras.optimizers.deserialize(config)
        assert type(loaded) is cls
        assert loaded.norm == "max"
        assert type(pickle.loads(pickle.dumps(cls()))) is cls


def test_a_class_is_registered_in_the_package_of_its_base():
    cls = normalized(package_of("Lender", "third_party", "their_package"))
    name = keras.saving.get_registered_name(cls)
    assert name == "their_package>NormalizedLender"


@pytest.mark.parametrize(
    ("optimizer_class", "error", "message"),
    [
        (keras.optimizers.SGD(), TypeError, "This is an instance. Pass its class"),
        ("adam", TypeError, "Received: optimizer_class='adam'. Pass a class"),
        (None, TypeError, "Received: optimizer_class=None. Pass a class"),
        (dict, TypeError, "Pass a Keras optimizer class"),
        (keras.optimizers.Optimizer, ValueError, "This abstract class"),
        (
            keras.optimizers.LossScaleOptimizer,
            ValueError,
            "LossScaleOptimizer wraps another optimizer",
        ),
        (keras_normopt.NormalizedSGD, ValueError, "is normalized already"),
        (
            type("Mine", (keras_normopt.NormalizedSGD,), {}),
            ValueError,
            "is normalized already",
        ),
    ],
)
def test_normalized_refuses_other_classes(optimizer_class, error, message):
    with pytest.raises(error, match=message) as raised:
        normalized(optimizer_class)
    assert "`optimizer_class`" in str(raised.value)


@needs_multi_optimizer
def test_normalized_refuses_multi_optimizer():
    message = "`optimizer_class`.*MultiOptimizer wraps another optimizer"
    with pytest.raises(ValueError, match=message):
        normalized(keras.optimizers.MultiOptimizer)


@pytest.mark.parametrize(
    "method",
    ["apply", "apply_gradients", "stateless_apply", "_backend_apply_gradients"],
)
def test_normalized_refuses_a_base_that_might_bypass_the_normalization(method):
    base = type("Detour", (keras.optimizers.SGD,), {method: lambda self, *args: None})
    with pytest.raises(ValueError, match=f"must not override `{method}`.*Detour over"):
        normalized(base)


def test_normalized_refuses_a_base_with_an_argument_that_we_add():
    class Taken(keras.optimizers.SGD):
        def __init__(self, norm="mine", **kwargs):
            super().__init__(**kwargs)

    class TakenTwice(keras.optimizers.SGD):
        def __init__(self, scope, norm="mine", **kwargs):
            super().__init__(**kwargs)

    with pytest.raises(ValueError, match=r"must not have the argument `norm`,"):
        normalized(Taken)
    with pytest.raises(ValueError, match=r"not have the arguments `norm` and `scope`,"):
        normalized(TakenTwice)


@pytest.mark.parametrize(
    "norm",
    ["L2", "", 2, 1.5, {"class_name": "builtins.print"}, ["l2"], b"l2", "x" * 9999],
)
def test_a_wrong_norm_lists_the_choices(norm):
    message = r"Unknown norm\. Received: norm=.*'avg_l1', .*'std'.*None.*function"
    with pytest.raises(ValueError, match=message) as raised:
        keras_normopt.NormalizedAdam(norm=norm)
    assert len(str(raised.value)) < 1000
    optimizer = keras_normopt.NormalizedAdam()
    with pytest.raises(ValueError, match=message):
        optimizer.norm = norm
    assert optimizer.norm == "l2"


@pytest.mark.parametrize(
    "norm_epsilon",
    [-1e-9, math.nan, math.inf, -math.inf, 1e39, "1e-7", True, [0]],
)
def test_the_error_names_a_wrong_norm_epsilon(norm_epsilon):
    message = "`norm_epsilon` must be a finite float of at least 0.*Received: norm_ep"
    with pytest.raises(ValueError, match=message):
        keras_normopt.NormalizedAdam(norm_epsilon=norm_epsilon)
    with pytest.raises(ValueError, match=message):
        keras_normopt.NormalizedAdam().norm_epsilon = norm_epsilon


@pytest.mark.parametrize("norm_epsilon", [0, 0.0, np.float32(0.5), 1e30])
def test_norm_epsilon_is_kept_as_a_float(norm_epsilon):
    optimizer = keras_normopt.NormalizedSGD(norm_epsilon=norm_epsilon)
    assert type(optimizer.norm_epsilon) is float
    assert optimizer.norm_epsilon == norm_epsilon


def test_norm_can_be_set_later():
    optimizer = keras_normopt.NormalizedSGD(learning_rate=1.0)
    optimizer.norm = "max"
    np.testing.assert_allclose(step(optimizer), [0.75, 1.0], rtol=1e-6)


class NoMore(keras.optimizers.SGD):
    def __init__(self, learning_rate=0.25):
        super().__init__(learning_rate)


class Warm(keras_normopt.NormalizedSGD):
    def __init__(self, *, warmth=1.0, **kwargs):
        super().__init__(**kwargs)


KERAS_ERROR = r"Argument\(s\) not recognized: \{'\w+': 1\}\. "
PYTHON_ERROR = r"__init__\(\) got an unexpected keyword argument '\w+'.* "


@pytest.mark.parametrize(
    ("cls", "keyword", "hint"),
    [
        ("NormalizedSGD", "nrom", "Did you mean `norm`?"),
        ("NormalizedSGD", "momentun", "Did you mean `momentum`?"),
        ("NormalizedAdam", "clip_norm", "Did you mean `clipnorm`?"),
        ("ClippedSGD", "maxnorm", "Did you mean `max_norm`?"),
        ("NormalizedAdam", "max_norm", "argument of `keras_normopt.ClippedAdam`, "),
        ("NormalizedAdam", "maxnorm", "`max_norm` is an argument of `keras_normopt.C"),
        ("NormalizedLion", "max_norm", "of `keras_normopt.clipped(Lion)`, which can c"),
        ("ClippedAdam", "norm_epsilon", "`keras_normopt.NormalizedAdam`, which can no"),
        ("ClippedAdam", "direction", "argument of `keras_normopt.NormalizedAdam`, "),
        ("NormalizedSGD", "betas", "NormalizedSGD takes apply_to, axes, centralize"),
        (normalized(MySGD), "wramth", "Did you mean `warmth`?"),
        (normalized(MySGD), "momentun", "Did you mean `momentum`?"),
        (Warm, "wramth", "Did you mean `warmth`?"),
        (Warm, "nrom", "Did you mean `norm`?"),
        (Warm, "max_norm", "argument of `keras_normopt.ClippedSGD`, "),
        (normalized(NoMore), "nrom", "Did you mean `norm`?"),
        (normalized(NoMore), "mmentum", "NormalizedNoMore takes apply_to, axes"),
        (normalized(NoMore), "max_norm", "of `keras_normopt.clipped(NoMore)`, "),
    ],
)
def test_an_unknown_keyword_is_refused_with_a_hint(cls, keyword, hint):
    cls = getattr(keras_normopt, cls) if isinstance(cls, str) else cls
    error, message = ValueError, KERAS_ERROR
    if cls is normalized(NoMore):
        error, message = TypeError, PYTHON_ERROR
    with pytest.raises(error, match=message) as raised:
        cls(**{keyword: 1})
    assert raised.type is error
    assert hint in str(raised.value)


def test_each_unknown_keyword_has_a_hint():
    with pytest.raises(ValueError, match=r"`norm`.*ClippedSGD") as raised:
        keras_normopt.NormalizedSGD(nrom=1, max_norm=1, momentum=0.5)
    assert "momentum" not in str(raised.value)


def test_other_errors_of_the_base_stay_the_same():
    with pytest.raises(ValueError, match="`momentum` must be a float between"):
        keras_normopt.NormalizedSGD(momentum=2)
    with pytest.raises(ValueError, match=r"^Unknown norm"):
        keras_normopt.NormalizedSGD(norm="L2", nrom=1)


@pytest.mark.parametrize("alias", keras_normopt.optimizers.NORMALIZED)
def test_each_class_is_found_by_its_names(alias):
    cls = keras_normopt.optimizers.NORMALIZED[alias]
    assert type(keras.optimizers.get(alias)) is cls
    assert type(keras.optimizers.get(cls.__name__)) is cls
    assert getattr(keras_normopt, cls.__name__) is cls
    assert cls.__name__ in keras_normopt.__all__


def test_every_keras_optimizer_has_a_normalized_class():
    outer = {"Optimizer", "LossScaleOptimizer", "MultiOptimizer"}
    bases = {
        name
        for name, value in vars(keras.optimizers).items()
        if isinstance(value, type) and issubclass(value, keras.optimizers.Optimizer)
    }
    ours = {c.__name__ for c in keras_normopt.optimizers.NORMALIZED.values()}
    assert {f"Normalized{name}" for name in bases - outer} == ours


@pytest.mark.parametrize("cls", keras_normopt.optimizers.NORMALIZED.values())
def test_each_docstring_names_all_arguments_and_the_rule(cls):
    for name in list(inspect.signature(cls).parameters)[:-1]:
        assert f"\n    {name}: " in cls.__doc__, name
    for part in ("g ← g / max(norm(g), norm_epsilon)", "Raises:", "1707.04822"):
        assert part in cls.__doc__


@pytest.mark.parametrize("cls", keras_normopt.optimizers.NORMALIZED.values())
def test_classes_and_optimizers_can_be_copied_and_pickled(cls):
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert copy.deepcopy(cls) is cls
    optimizer = cls(learning_rate=0.125, norm="std", norm_epsilon=1e-9)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(twin) is cls
        assert twin.get_config() == optimizer.get_config()


def test_a_subclass_is_an_ordinary_class():
    class Mine(keras_normopt.NormalizedSGD):
        def __init__(self, **kwargs):
            super().__init__(1.0, norm="max", **kwargs)

    assert list(inspect.signature(Mine).parameters) == ["kwargs"]
    np.testing.assert_allclose(step(Mine()), [0.75, 1.0], rtol=1e-6)
    with pytest.raises((pickle.PicklingError, AttributeError), match="Mine"):
        pickle.dumps(Mine)


def test_type_annotations_list_every_norm_and_scope():
    literal, *_ = typing.get_args(NormLike)
    assert sorted(typing.get_args(literal)) == sorted(keras_normopt.norms.__all__)
    assert typing.get_args(Scope) == partition.SCOPES
