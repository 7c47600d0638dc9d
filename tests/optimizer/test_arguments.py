"""Tests that any argument gives a working optimizer or an error that names it.

Configs may come from files of strangers, so they must run no code.
"""

import json
import sys
import threading

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

import keras_normopt
from helpers import oracle
from keras_normopt.norms import _registry

pytestmark = pytest.mark.newest_keras

GRADIENT = np.array([[3.0, -4.0], [0.5, 0.0]], "float32")

numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.fractions(),
    st.decimals(),
    st.complex_numbers(),
    st.booleans(),
)
anything = st.recursive(
    st.one_of(st.none(), numbers, st.text(), st.binary(), st.just(object())),
    lambda inner: st.one_of(
        st.lists(inner), st.tuples(inner, inner), st.dictionaries(st.text(), inner)
    ),
    max_leaves=5,
)
norms = st.one_of(st.sampled_from([*_registry.names(), "L2", "l2 ", "print"]), anything)
epsilons = st.one_of(st.floats(0, 1e30), numbers, anything)
# Values that a norm function of a user may return.
returned_values = st.one_of(
    st.floats(0.125, 8, width=32),
    st.sampled_from([np.float32(2), np.float64(2), np.ones((2, 2)), np.ones(3)]),
    anything,
)


def step(optimizer):
    variable = keras.Variable(np.zeros_like(GRADIENT))
    optimizer.apply([ops.convert_to_tensor(GRADIENT)], [variable])
    return ops.convert_to_numpy(variable)


def assert_names(error, *names):
    assert any(name in str(error) for name in names)
    assert len(str(error)) < 1000


def assert_works(optimizer, norm, epsilon):
    expected = -GRADIENT
    if norm is not None:
        name = "max" if norm == "linf" else norm
        expected = -oracle.normalize(name, GRADIENT, np.longdouble(epsilon))
    np.testing.assert_allclose(
        step(optimizer), expected.astype("float32"), rtol=1e-5, atol=2e-38
    )


@given(norm=norms, epsilon=epsilons)
def test_the_constructor_works_or_names_the_wrong_argument(norm, epsilon):
    try:
        optimizer = keras_normopt.NormalizedSGD(1.0, norm=norm, norm_epsilon=epsilon)
    except (ValueError, TypeError) as error:
        assert_names(error, "norm=", "norm_epsilon=")
    else:
        assert_works(optimizer, norm, epsilon)


@given(norm=norms, epsilon=epsilons)
def test_from_config_works_or_names_the_wrong_argument(norm, epsilon):
    config = keras_normopt.NormalizedSGD(1.0).get_config()
    config |= {"norm": norm, "norm_epsilon": epsilon}
    try:
        optimizer = keras_normopt.NormalizedSGD.from_config(config)
    except (ValueError, TypeError) as error:
        assert_names(error, "norm=", "norm_epsilon=")
    else:
        assert_works(optimizer, norm, epsilon)


@given(result=returned_values)
def test_a_result_of_a_norm_function_works_or_is_named_in_the_error(result):
    def theirs(gradient):
        return result

    optimizer = keras_normopt.NormalizedSGD(1.0, norm=theirs)
    try:
        moved = step(optimizer)
    except (ValueError, TypeError) as error:
        assert_names(error, "norm=")
        assert_names(error, "theirs returned")
    else:
        with np.errstate(over="ignore"):
            norm = max(np.float32(result), np.float32(1e-30))
        np.testing.assert_allclose(moved, -GRADIENT / norm, rtol=1e-6, atol=2e-38)


OPTIONS = {
    "scope": st.one_of(st.sampled_from(["unit", "layer", "global"]), anything),
    "exclude": st.one_of(st.from_regex(r"[a-z*+?()|\[\]]{0,8}"), anything),
    "step_size": st.one_of(st.just("weight_norm"), anything),
    "apply_to": st.one_of(st.just("update"), anything),
    "centralize": st.one_of(st.booleans(), anything),
    "track_norms": anything,
    "max_norm": epsilons,
}


# A drawn pattern may match no variable or all variables.
@pytest.mark.filterwarnings("ignore:`?exclude")
@pytest.mark.filterwarnings("ignore:.step_size.. the pattern")
@pytest.mark.filterwarnings("ignore:NormalizedSGD was saved with an empty pattern")
@pytest.mark.filterwarnings("ignore:Possible (nested )?set:FutureWarning")
@pytest.mark.parametrize("from_config", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@given(data=st.data())
def test_each_option_works_or_is_named_in_the_error(option, from_config, data):
    value = data.draw(OPTIONS[option])
    cls = keras_normopt.NormalizedSGD
    if option == "max_norm":
        cls = keras_normopt.ClippedSGD
    try:
        if from_config:
            optimizer = cls.from_config(cls().get_config() | {option: value})
        else:
            optimizer = cls(**{option: value})
    except (ValueError, TypeError) as error:
        assert_names(error, f"{option}=")
    else:
        assert np.isfinite(step(optimizer)).all()


# Files from strangers.

CALLED = []


def not_to_be_called(*args):
    CALLED.append(args)
    return 1.0


HOSTILE = {
    "norm": [
        "eval",
        "builtins.eval",
        "test_arguments.not_to_be_called",
        "os:system",
        "__import__('test_arguments').not_to_be_called()",
        "x" * 10_000_000,
        {"class_name": "eval", "module": "builtins", "config": "1/0"},
        {
            "module": "builtins",
            "class_name": "function",
            "config": "eval",
            "registered_name": "function",
        },
        {
            "module": "test_arguments",
            "class_name": "function",
            "config": "not_to_be_called",
            "registered_name": "function",
        },
        {"class_name": "__lambda__", "config": {"value": "4wAAAAA="}},
        ["l2"],
        7,
        True,
    ],
    "norm_epsilon": ["1e-7", "x" * 10_000_000, [], {}, 10**400, -1, "nan"],
    "scope_of_theirs": [1, "eval"],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, values in HOSTILE.items() for value in values],
    ids=lambda value: repr(value)[:30],
)
def test_hostile_configs_run_no_code(key, value):
    config = keras.optimizers.serialize(keras_normopt.NormalizedAdam())
    config = json.loads(
        json.dumps(config | {"config": config["config"] | {key: value}})
    )
    modules = set(sys.modules)
    with pytest.raises((ValueError, TypeError), match=key) as caught:
        keras.optimizers.deserialize(config)
    assert len(str(caught.value)) < 1000
    assert not CALLED
    assert set(sys.modules) == modules


def test_a_hostile_file_runs_no_code(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras_normopt.NormalizedSGD(), "mse")
    file = tmp_path / "model.keras"
    for value in HOSTILE["norm"]:
        # This assignment skips the check. The result is like a file written by hand.
        model.optimizer._norm = value
        model.save(file)
        with pytest.raises((ValueError, TypeError), match="norm="):
            keras.models.load_model(file)
    assert not CALLED


# Threads.


def test_norms_can_be_registered_while_another_thread_trains(custom_norms):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    model.set_weights([np.zeros((2, 2))])
    model.compile(keras_normopt.NormalizedSGD(0.5), "mse")
    done = threading.Event()
    failures = []

    def register():
        number = 0
        while not done.is_set() or not number:
            name = f"theirs_{number}"
            try:
                keras_normopt.register_norm(name, lambda g: ops.max(ops.abs(g)))
                assert name in _registry.names()
                keras_normopt.NormalizedSGD(norm=name).get_config()
            except Exception as error:
                failures.append(error)
                return
            number = (number + 1) % 1000
            if not number:
                _registry._registered.clear()

    thread = threading.Thread(target=register)
    thread.start()
    x, y = np.eye(2, dtype="float32"), 1e6 * np.ones((2, 2), "float32")
    model.fit(x, y, batch_size=2, epochs=20, verbose=0)
    done.set()
    thread.join()
    assert not failures
    # All entries are equal, so every step moves each entry by 0.5 / 2.
    np.testing.assert_allclose(model.get_weights()[0], 20 * 0.25, rtol=1e-4)


def test_only_one_of_several_threads_can_register_a_name(custom_norms):
    barrier = threading.Barrier(8)
    outcomes = []

    def register(number):
        barrier.wait()
        try:
            keras_normopt.register_norm("contested", lambda g: number * ops.sum(g))
            outcomes.append("registered")
        except ValueError:
            outcomes.append("refused")

    threads = [threading.Thread(target=register, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 7 + ["registered"]
