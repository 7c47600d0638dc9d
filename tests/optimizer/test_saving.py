"""Tests that configs and files keep all state, so that training can resume."""

import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers.processes import SCRIPTS, finish, start
from helpers.stored import stored
from scripts import training

CLASSES = list(keras_normopt.optimizers.NORMALIZED.values())
RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 8)).astype("float32")
Y = RNG.normal(size=(32, 1)).astype("float32")


def make_model(optimizer):
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(4, "tanh", kernel_initializer=initializer(1)),
            keras.layers.Dense(1, kernel_initializer=initializer(2)),
        ]
    )
    model.compile(optimizer=optimizer, loss="mse")
    return model


def initializer(seed):
    return keras.initializers.GlorotUniform(seed=seed)


def fit(model, epochs):
    model.fit(X, Y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)


def state(model):
    return [*map(ops.convert_to_numpy, model.weights), *stored(model.optimizer)]


def assert_same_state(one, other):
    for a, b in zip(state(one), state(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def run_in_a_new_process(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("cls", CLASSES)
def test_a_config_makes_an_equal_optimizer(cls):
    optimizer = cls(learning_rate=0.125, norm="avg_l1", norm_epsilon=1e-9, clipnorm=2.0)
    config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
    assert config["registered_name"] == f"keras_normopt>{cls.__name__}"
    twin = keras.optimizers.deserialize(config)
    assert type(twin) is cls
    assert twin.get_config() == optimizer.get_config()
    assert (twin.norm, twin.norm_epsilon, twin.clipnorm) == ("avg_l1", 1e-9, 2.0)


def test_a_config_of_an_older_version_gets_the_defaults():
    config = keras.optimizers.Adam(learning_rate=0.125).get_config()
    optimizer = keras_normopt.NormalizedAdam.from_config(config)
    assert (optimizer.norm, optimizer.norm_epsilon) == ("l2", 1e-30)
    assert float(optimizer.learning_rate) == 0.125


@pytest.mark.parametrize("norm", [None, "linf"])
def test_norm_is_saved_as_given(norm):
    config = keras_normopt.NormalizedSGD(norm=norm).get_config()
    assert config["norm"] == norm
    assert keras_normopt.NormalizedSGD.from_config(config).norm == norm


def test_a_function_is_saved_by_its_name(custom_norms):
    @keras_normopt.register_norm("largest_two")
    def largest_two(gradient):
        return ops.sum(ops.top_k(ops.ravel(ops.abs(gradient)), 2)[0])

    for function, name in [
        (largest_two, "largest_two"),
        (keras_normopt.norms.std, "std"),
    ]:
        config = keras_normopt.NormalizedSGD(norm=function).get_config()
        assert config["norm"] == name


@pytest.mark.parametrize(
    "norm", [lambda g: ops.sum(g * g), initializer], ids=["lambda", "def"]
)
def test_an_unregistered_function_is_not_saved(norm, tmp_path):
    optimizer = keras_normopt.NormalizedSGD(norm=norm)
    message = "Cannot save norm=.*only the name of a norm is saved.*register_norm"
    with pytest.raises(ValueError, match=message):
        optimizer.get_config()
    with pytest.raises(ValueError, match=message):
        make_model(optimizer).save(tmp_path / "model.keras")


def test_a_name_that_is_not_registered_cannot_be_loaded():
    config = keras_normopt.NormalizedSGD().get_config() | {"norm": "forgotten"}
    with pytest.raises(ValueError, match=r"norm='forgotten'.*Call it in each process"):
        keras_normopt.NormalizedSGD.from_config(config)


def test_a_learning_rate_schedule_is_saved():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.1)
    optimizer = keras_normopt.NormalizedSGD(schedule)
    twin = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    variable = keras.Variable([0.0, 0.0])
    for expected in (-0.5, -0.55, -0.555):
        twin.apply([ops.convert_to_tensor([3e-9, 0.0])], [variable])
        np.testing.assert_allclose(variable, [expected, 0.0], rtol=1e-6)


# In this order, the classes save slots of each variable, one more variable, slots of
# other shapes, and no slots.
KINDS = ["NormalizedAdam", "NormalizedNadam", "NormalizedAdafactor", "NormalizedSGD"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_resumes_from_a_file(kind, tmp_path):
    cls = getattr(keras_normopt, kind)
    model = make_model(cls())
    fit(model, 2)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is cls
    assert_same_state(loaded, model)
    fit(loaded, 2)
    fit(model, 2)
    assert_same_state(loaded, model)


def test_training_resumes_in_a_new_process(tmp_path, monkeypatch):
    """A process loads one of our optimizers and an optimizer with a third-party base.

    The same process loads both, because the import of a backend takes seconds.
    """
    source = """
        import keras

        class TheirSGD(keras.optimizers.SGD):
            pass
        """
    (tmp_path / "theirs.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module("theirs")
    optimizer = keras_normopt.normalized(theirs.TheirSGD)(norm="max")
    make_model(optimizer).save(tmp_path / "theirs.keras")
    (tmp_path / "optimizer.pickle").write_bytes(pickle.dumps(optimizer))
    model = make_model("normalized_adam")
    fit(model, 2)
    model.save(tmp_path / "ours.keras")
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    run_in_a_new_process(
        """
        import pathlib
        import pickle
        import sys

        import keras_normopt
        import keras
        import numpy as np

        folder = pathlib.Path(sys.argv[1])
        model = keras.models.load_model(folder / "ours.keras")
        assert type(model.optimizer) is keras_normopt.NormalizedAdam
        data = np.load(folder / "data.npz")
        model.fit(
            data["x"], data["y"], batch_size=16, epochs=2, shuffle=False, verbose=0
        )
        model.save(folder / "gone_on.keras")

        sys.path.insert(0, str(folder))
        import theirs

        optimizer = pickle.loads((folder / "optimizer.pickle").read_bytes())
        assert type(optimizer) is keras_normopt.normalized(theirs.TheirSGD)
        model = keras.models.load_model(folder / "theirs.keras")
        assert type(model.optimizer) is type(optimizer)
        assert model.optimizer.norm == optimizer.norm == "max"
        """,
        tmp_path,
    )
    fit(model, 2)
    assert_same_state(keras.models.load_model(tmp_path / "gone_on.keras"), model)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("factory", "normalized"),
        ("norms", "l2"),
        ("optimizers", "NormalizedSGD"),
        ("registry", "register_norm"),
        ("step_sizes", "GradientCorrelation"),
        ("step_sizes", "WeightNorm"),
        ("thresholds", "RunningNorm"),
    ],
)
def test_pickles_with_earlier_module_names_load(module, name):
    home = getattr(keras_normopt, module, keras_normopt)
    loaded = pickle.loads(f"ckeras_normopt.{module}\n{name}\n.".encode())
    assert loaded is getattr(home, name)
    assert pickle.loads(pickle.dumps(loaded)) is loaded


@pytest.mark.parametrize(
    ("module", "mixin", "cls"),
    [
        ("normalization", "Normalization", keras_normopt.NormalizedSGD),
        ("clipping", "Clipping", keras_normopt.ClippedSGD),
    ],
)
def test_pickled_classes_with_earlier_module_names_load(module, mixin, cls):
    call = "ckeras_normopt.factory\n_made\n(ckeras.optimizers\nSGD\n"
    arguments = f"ckeras_normopt.{module}\n{mixin}\ntR."
    assert pickle.loads((call + arguments).encode()) is cls


def test_a_pickled_model_carries_its_state():
    model = make_model(keras_normopt.NormalizedAdam(norm="max"))
    fit(model, 1)
    twin = pickle.loads(pickle.dumps(model))
    assert_same_state(twin, model)
    fit(twin, 1)
    fit(model, 1)
    assert_same_state(twin, model)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.every_base
def test_state_can_move_between_a_base_and_its_normalized_class(cls, tmp_path):
    base = getattr(keras.optimizers, cls.__name__.removeprefix("Normalized"))
    for first, second in [(base, cls), (cls, base)]:
        model = make_model(first())
        variables = model.trainable_variables
        model.optimizer.apply([ops.ones(v.shape) for v in variables], variables)
        model.save_weights(tmp_path / "half.weights.h5")
        half = state(model)

        # Keras's file of weights also holds the variables of the optimizer.
        other = make_model(second())
        other.optimizer.build(other.trainable_variables)
        other.load_weights(tmp_path / "half.weights.h5")
        for a, b in zip(state(other), half, strict=True):
            np.testing.assert_array_equal(a, b)

        store = {}
        model.optimizer.save_own_variables(store)
        optimizer = second()
        optimizer.build(model.trainable_variables)
        optimizer.load_own_variables(store)
        for a, b in zip(stored(optimizer), stored(model.optimizer), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_cloned_model_compiles_from_config():
    model = make_model(keras_normopt.NormalizedAdam(0.125, norm="std"))
    clone = keras.models.clone_model(model)
    clone.compile_from_config(model.get_compile_config())
    assert clone.optimizer.get_config() == model.optimizer.get_config()


def test_training_resumes_after_a_kill_during_an_epoch(tmp_path):
    script, backup = SCRIPTS / "kill_in_epoch.py", tmp_path / "backup"
    resumed = tmp_path / "resumed.npz"
    finish(start(script, backup, resumed, 2), returncode=-signal.SIGKILL)
    assert not resumed.exists()
    assert any(backup.iterdir())
    finish(start(script, backup, resumed))
    expected = training.state(training.fit(("Adam", "l2"), epochs=4))
    assert len(expected) > 4
    with np.load(resumed) as actual:
        for value, expected_value in zip(actual.values(), expected, strict=True):
            np.testing.assert_allclose(value, expected_value, rtol=1e-6, atol=1e-7)
