import pytest

from helpers.peers import BACKEND


@pytest.fixture
def optax():
    if BACKEND != "jax":
        pytest.skip("Optax is for JAX")
    return pytest.importorskip("optax")


@pytest.fixture
def pytorch_optimizer():
    if BACKEND != "torch":
        pytest.skip("pytorch_optimizer is for PyTorch")
    return pytest.importorskip("pytorch_optimizer")
