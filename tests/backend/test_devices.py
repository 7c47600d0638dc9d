"""Tests that training on several devices equals training on one device.

The global batch is the same.
"""

import functools
import json
import re
import socket

import keras
import numpy as np
import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

from helpers.pages import ROOT
from helpers.processes import SCRIPTS, finish, start
from scripts import training

BACKEND = keras.backend.backend()
GUIDE = ROOT / "docs/devices.md"


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@functools.cache
def on_one_device(case):
    model = training.fit(case)
    return training.outcome(model, model.optimizer)


def assert_equal_to_one_device(weights, case):
    for actual, expected in zip(weights, on_one_device(case), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6)


def read(path, case):
    with np.load(path) as arrays:
        return [arrays[f"{'-'.join(case)}-{i}"] for i in range(5)]


def free_ports(number):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(number)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module", params=["data", "model"])
def sharded(request, tmp_path_factory):
    if BACKEND != "jax":
        pytest.skip("keras.distribution needs JAX")
    path = tmp_path_factory.mktemp("jax") / "weights.npz"
    finish(start(SCRIPTS / "jax_sharding.py", request.param, path))
    return path


@pytest.mark.parametrize("case", training.CASES, ids="-".join)
def test_keras_distribution_trains_like_one_device(sharded, case):
    assert_equal_to_one_device(read(sharded, case), case)


@pytest.mark.parametrize("case", training.CASES, ids="-".join)
def test_mirrored_strategy_trains_like_one_device(strategy, case):
    with strategy.scope():
        model = training.fit(case, jit_compile=False)
    assert_equal_to_one_device(training.outcome(model, model.optimizer), case)


@pytest.fixture(scope="module")
def from_two_workers(tmp_path_factory):
    if BACKEND != "tensorflow":
        pytest.skip("needs TensorFlow")
    path = tmp_path_factory.mktemp("tensorflow") / "weights.npz"
    script = SCRIPTS / "tensorflow_workers.py"
    finish(*[start(script, path, TF_CONFIG=config) for config in tf_configs()])
    return path


def tf_configs():
    cluster = {"worker": [f"localhost:{port}" for port in free_ports(2)]}
    return [
        json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}})
        for i in range(2)
    ]


@pytest.mark.parametrize("case", training.CASES, ids="-".join)
def test_multi_worker_mirrored_strategy_trains_like_one_device(from_two_workers, case):
    assert_equal_to_one_device(read(from_two_workers, case), case)


@pytest.fixture(scope="module")
def from_data_parallel(tmp_path_factory):
    if BACKEND != "torch":
        pytest.skip("needs PyTorch")
    path = tmp_path_factory.mktemp("torch") / "weights.npz"
    finish(start(*TORCHRUN, SCRIPTS / "torch_workers.py", path, OMP_NUM_THREADS="1"))
    return path


@pytest.mark.parametrize("case", training.CASES, ids="-".join)
def test_distributed_data_parallel_trains_like_one_device(from_data_parallel, case):
    assert_equal_to_one_device(read(from_data_parallel, case), case)


# Programs in docs/devices.md.


def program(position, tmp_path):
    examples = list(Document.parse(str(GUIDE), PythonCodeBlockParser()).examples())
    assert len(examples) == 4
    path = tmp_path / "train.py"
    path.write_text(examples[position].parsed)
    return path


def assert_trained(printed, devices):
    assert f"devices {devices}\n" in printed
    before, after = re.search(r"^loss (\S+) to (\S+)$", printed, re.M).groups()
    assert float(after) < 0.9 * float(before)


@pytest.mark.skipif(BACKEND != "jax", reason="the guide for JAX")
def test_the_guide_to_keras_distribution_trains(tmp_path):
    (printed,) = finish(start(program(0, tmp_path)))
    assert_trained(printed, 4)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the guide for TensorFlow")
def test_the_guide_to_mirrored_strategy_trains(tmp_path):
    (printed,) = finish(start(program(1, tmp_path)))
    assert_trained(printed, 2)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the guide for TensorFlow")
def test_the_guide_to_multi_worker_mirrored_strategy_trains(tmp_path):
    path = program(2, tmp_path)
    printed = finish(*[start(path, TF_CONFIG=config) for config in tf_configs()])
    assert_trained(printed[0], 2)


@pytest.mark.skipif(BACKEND != "torch", reason="the guide for PyTorch")
def test_the_guide_to_distributed_data_parallel_trains(tmp_path):
    (printed,) = finish(start(*TORCHRUN, program(3, tmp_path), OMP_NUM_THREADS="1"))
    assert_trained(printed, 2)
