import os

import hypothesis
import keras
import pytest

# So that a failed assertion in a helper shows its values, too.
pytest.register_assert_rewrite("helpers")

# No test opens a window.
os.environ.setdefault("MPLBACKEND", "agg")

hypothesis.settings.register_profile(
    "ci",
    # Enough to find what a change breaks. The nightly job asks for 3,000.
    max_examples=30,
    # The first call on a shape compiles, and machines that run the tests are shared.
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
        help="leave out what is there for speed alone: every other test must pass",
    )
    parser.addoption(
        "--nightly", action="store_true", help="run the tests that take minutes as well"
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
    """Registered norms are global; a test that adds some leaves none behind."""
    from keras_normopt.norms import _registry

    before = dict(_registry._registered)
    yield
    _registry._registered.clear()
    _registry._registered.update(before)


@pytest.fixture
def float64():
    """Lets JAX compute in float64, as the other backends always do."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield


if keras.backend.backend() == "jax":
    # For variables on two devices. As below, devices cannot be added later.
    import jax

    jax.config.update("jax_num_cpu_devices", 2)

if keras.backend.backend() == "tensorflow":
    # For the tests of replicas. Devices cannot be added once TensorFlow is in use.
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )


@pytest.fixture(scope="session")
def strategy():
    """Two replicas, one strategy: TensorFlow mixes up the collectives of several."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("TensorFlow's replicas are threads")
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def pytest_collection_modifyitems(config, items):
    for item in items:
        if config.getoption("plain") and item.get_closest_marker("speed"):
            item.add_marker(pytest.mark.skip(reason="asks for speed"))
        if item.get_closest_marker("nightly") and not config.getoption("nightly"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --nightly runs it"))
    if keras.backend.backend() != "tensorflow" or keras.version() != "3.12.0":
        return
    for item in items:
        if item.get_closest_marker("every_base") and "NormalizedMuon" in item.name:
            # It asks TensorFlow's variables for a path.
            reason = "Muon of Keras 3.12.0 fails on TensorFlow"
            item.add_marker(
                pytest.mark.xfail(raises=AttributeError, strict=True, reason=reason)
            )
