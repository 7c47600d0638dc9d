"""Tests worker processes, which import only what their objects need."""

import sys

import cloudpickle  # A dependency of joblib.
import keras
import numpy as np
import pytest

import keras_normopt
from helpers.processes import finish, start

pytestmark = pytest.mark.once

# Runs tasks one after another, as a worker of joblib does.
WORKER = """
import pickle, sys
for path in sys.argv[1:]:
    try:
        with open(path, "rb") as file:
            function, *arguments = pickle.load(file)
        print("returned", function(*arguments))
    except Exception as error:
        print("raised", type(error).__name__, str(error).replace(chr(10), " "))
"""


def make_model(optimizer):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(optimizer, "mse")
    return model


# These functions are pickled by value, like those of a script or a notebook.


def by_string():
    return type(make_model("normalized_adam").optimizer).__name__


def by_class():
    return type(make_model(keras_normopt.NormalizedAdam()).optimizer).__name__


def steps(*arguments):
    return int(arguments[-1].optimizer.iterations)


@pytest.fixture
def run(tmp_path):
    def started(*tasks):
        paths = []
        for task in tasks:
            paths.append(tmp_path / f"{task[0].__name__}-{len(task)}.pickle")
            paths[-1].write_bytes(cloudpickle.dumps(task))
        return start("-c", WORKER, *paths)

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield started
    cloudpickle.unregister_pickle_by_value(module)


def test_a_worker_must_import_the_package(run):
    model = make_model("normalized_adam")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), batch_size=2, verbose=0)
    without = run(
        (by_string,), (steps, model), (steps, keras_normopt.NormalizedAdam, model)
    )
    printed = finish(without, run((by_class,)))
    lines = [
        [line for line in text.splitlines() if line.startswith(("returned", "raised"))]
        for text in printed
    ]
    # If Keras learns to find these classes itself, docs/saving.md can be shorter.
    assert lines[0][0].endswith("interpret optimizer identifier: normalized_adam")
    assert "Could not locate class 'NormalizedAdam'" in lines[0][1]
    assert "'registered_name': 'keras_normopt>NormalizedAdam'" in lines[0][1]
    # These tasks follow the advice in docs/saving.md.
    assert lines[0][2:] == ["returned 2"]
    assert lines[1] == ["returned NormalizedAdam"]
