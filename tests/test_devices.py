"""On several devices training is what it is on one, given the same global batch."""

import json
import socket

import keras
import numpy as np
import pytest

from processes import SCRIPTS, finish, start
from scripts import training

BACKEND = keras.backend.backend()


def on_one_device(case):
    return training.fit(*case).get_weights()


def assert_equal_to_one_device(weights, case):
    for actual, expected in zip(weights, on_one_device(case), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6)


def read(path, case):
    with np.load(path) as arrays:
        return [arrays[f"{'-'.join(case)}-{i}"] for i in range(4)]


def free_ports(number):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(number)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module", params=["data", "model"])
def sharded(request, tmp_path_factory):
    if BACKEND != "jax":
        pytest.skip("keras.distribution is for JAX")
    path = tmp_path_factory.mktemp("jax") / "weights.npz"
    finish(start(SCRIPTS / "jax_sharding.py", request.param, path))
    return path


@pytest.mark.parametrize("case", training.CASES, ids="-".join)
def test_keras_distribution(sharded, case):
    assert_equal_to_one_device(read(sharded, case), case)


@pytest.mark.parametrize("case", training.CASES, ids="-".join)
def test_mirrored_strategy(strategy, case):
    with strategy.scope():
        model = training.fit(*case, jit_compile=False)
    assert_equal_to_one_device(model.get_weights(), case)


@pytest.fixture(scope="module")
def from_two_workers(tmp_path_factory):
    if BACKEND != "tensorflow":
        pytest.skip("TensorFlow's strategy")
    path = tmp_path_factory.mktemp("tensorflow") / "weights.npz"
    cluster = {"worker": [f"localhost:{port}" for port in free_ports(2)]}
    configs = [
        json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}})
        for i in range(2)
    ]
    script = SCRIPTS / "tensorflow_workers.py"
    finish(*[start(script, path, TF_CONFIG=config) for config in configs])
    return path


@pytest.mark.parametrize("case", training.CASES, ids="-".join)
def test_multi_worker_mirrored_strategy(from_two_workers, case):
    assert_equal_to_one_device(read(from_two_workers, case), case)


@pytest.fixture(scope="module")
def from_data_parallel(tmp_path_factory):
    if BACKEND != "torch":
        pytest.skip("PyTorch's data parallelism")
    path = tmp_path_factory.mktemp("torch") / "weights.npz"
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    finish(start(*run, SCRIPTS / "torch_workers.py", path, OMP_NUM_THREADS="1"))
    return path


@pytest.mark.parametrize("case", training.CASES, ids="-".join)
def test_distributed_data_parallel(from_data_parallel, case):
    assert_equal_to_one_device(read(from_data_parallel, case), case)
