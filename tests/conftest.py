import os

import hypothesis
import keras
import pytest

# Failed assertions in helpers show their values, too.
pytest.register_assert_rewrite("helpers")

# Matplotlib opens no windows.
os.environ.setdefault("MPLBACKEND", "agg")

hypothesis.settings.register_profile(
    "ci",
    # Enough to find most faults. The nightly job uses 3,000.
    max_examples=30,
    # The first call for a shape compiles, and test machines are shared.
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
)
for name, max_examples in {"quick": 10, "thorough": 3000}.items():
    hypothesis.settings.register_profile(
        name, parent=hypothesis.settings.get_profile("ci"), max_examples=max_examples
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser):
    parser.addoption(
        "--plain",
        action="store_true",
        help="turn off code that only saves time: all tests of results must pass",
    )
    parser.addoption(
        "--nightly", action="store_true", help="also run the tests that take minutes"
    )


def pytest_configure(config):
    if config.getoption("plain"):
        from keras_normopt._blocks import stacking

        stacking.STACK_SIZE, stacking.FastReductions = 1, stacking.Reductions


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


@pytest.fixture
def custom_norms():
    """Removes the norms that a test registers. The registry is global."""
    from keras_normopt.norms import _registry

    before = dict(_registry._registered)
    yield
    _registry._registered.clear()
    _registry._registered.update(before)


@pytest.fixture
def float64():
    """Lets JAX compute in float64. The other backends always do."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield


if keras.backend.backend() == "jax":
    # Some tests put variables on two devices. JAX cannot add devices later.
    import jax

    jax.config.update("jax_num_cpu_devices", 2)

if keras.backend.backend() == "tensorflow":
    # Replicas need two devices. TensorFlow cannot add devices after its first use.
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )


@pytest.fixture(scope="session")
def strategy():
    """Returns one strategy for all tests.

    With several strategies, TensorFlow mixes up their collectives.
    """
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only replicas of TensorFlow are threads")
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def pytest_collection_modifyitems(config, items):
    for item in items:
        if config.getoption("plain") and item.get_closest_marker("speed"):
            item.add_marker(pytest.mark.skip(reason="tests speed"))
        if item.get_closest_marker("nightly") and not config.getoption("nightly"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --nightly runs it"))
    if keras.backend.backend() != "tensorflow" or keras.version() != "3.12.0":
        return
    for item in items:
        if item.get_closest_marker("every_base") and "NormalizedMuon" in item.name:
            # Muon reads `path` of TensorFlow's own variables, which have none.
            reason = "Muon of Keras 3.12.0 fails on TensorFlow"
            item.add_marker(
                pytest.mark.xfail(raises=AttributeError, strict=True, reason=reason)
            )
