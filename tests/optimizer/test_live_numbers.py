"""Tests that numbers changed during training affect the next step."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers.stored import stored
from keras_normopt import RunningNorm, WeightNorm
from keras_normopt.step_sizes import GradientCorrelation

X, Y = np.ones((4, 3), "float32"), np.full((4, 1), 1e3, "float32")


def make_model(optimizer, **arguments):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", **arguments)
    return model


class Lengths(keras.callbacks.Callback):
    """Records how far the kernel moves in each batch, then sets an argument."""

    def __init__(self, name, value):
        super().__init__()
        self.name, self.value, self.lengths = name, value, []

    def on_train_batch_begin(self, batch, logs=None):
        self.before = self.model.get_weights()[0]

    def on_train_batch_end(self, batch, logs=None):
        moved = self.model.get_weights()[0] - self.before
        self.lengths.append(float(np.linalg.norm(moved)))
        optimizer = self.model.optimizer
        setattr(getattr(optimizer, "inner_optimizer", optimizer), self.name, self.value)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("make", "name", "value", "expected"),
    [
        (lambda: keras_normopt.ClippedSGD(1.0), "max_norm", 0.25, 0.25),
        (
            lambda: keras_normopt.ClippedSGD(1.0, apply_to="update"),
            "max_norm",
            0.25,
            0.25,
        ),
        # The gradient is about 3,000, far below this epsilon.
        (lambda: keras_normopt.NormalizedSGD(1.0), "norm_epsilon", 1e9, 0.0),
    ],
    ids=["max_norm", "max_norm of updates", "norm_epsilon"],
)
def test_a_number_set_by_a_callback_affects_the_next_step(
    make, name, value, expected, wrapped
):
    optimizer = make()
    if wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1.0)
    model = make_model(optimizer)
    callback = Lengths(name, value)
    model.fit(X, Y, batch_size=1, verbose=0, callbacks=[callback])
    first, *rest = callback.lengths
    assert first == pytest.approx(1.0, rel=1e-5)
    assert rest == pytest.approx([expected] * 3, rel=1e-3, abs=1e-5)


def test_a_number_set_between_two_fits_affects_the_second_fit():
    model = make_model(keras_normopt.ClippedSGD(1.0))
    model.fit(X, Y, verbose=0)
    before = model.get_weights()[0]
    model.optimizer.max_norm = 0.25
    assert model.optimizer.max_norm == 0.25
    model.fit(X, Y, verbose=0)
    moved = np.linalg.norm(model.get_weights()[0] - before)
    assert moved == pytest.approx(0.25, rel=1e-4)


def test_a_changed_number_is_saved_in_the_config(tmp_path):
    model = make_model(keras_normopt.ClippedAdam(1.0, track_norms=True))
    model.fit(X, Y, verbose=0)
    model.optimizer.max_norm = 0.25
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.max_norm == 0.25
    loaded.fit(X, Y, verbose=0)
    clipped = loaded.optimizer.norm_tracker.clipped
    assert set(clipped.values()) == {1.0}
    # The file stores variables of the base and tracked norms. The config alone stores
    # the number.
    adam = keras.optimizers.Adam()
    adam.build(model.trainable_variables)
    assert len(stored(model.optimizer)) == len(stored(adam)) + 5


@pytest.mark.parametrize(
    ("make", "name", "values"),
    [
        (keras_normopt.NormalizedSGD, "norm", ["max", None, lambda g: ops.max(g)]),
        (lambda: keras_normopt.NormalizedSGD(norm=None), "norm", ["l2"]),
        (keras_normopt.ClippedSGD, "norm", ["max"]),
        (keras_normopt.ClippedSGD, "max_norm", [WeightNorm(), RunningNorm()]),
        (
            lambda: keras_normopt.ClippedSGD(max_norm=WeightNorm()),
            "max_norm",
            [1.0, WeightNorm(0.5)],
        ),
    ],
)
def test_arguments_that_are_no_numbers_are_fixed_once_the_optimizer_is_built(
    make, name, values
):
    optimizer = make()
    optimizer.build([keras.Variable(np.zeros(2))])
    old = getattr(optimizer, name)
    setattr(optimizer, name, old)
    for value in values:
        with pytest.raises(
            ValueError, match=f"`{name}` .*cannot change after.*Make a new"
        ):
            setattr(optimizer, name, value)
        assert getattr(optimizer, name) is old


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (WeightNorm(), "coefficient"),
        (RunningNorm(), "factor"),
        (GradientCorrelation(), "rate"),
    ],
)
def test_arguments_of_rules_are_fixed(rule, name):
    """Compiled steps would not see a change."""
    with pytest.raises(
        AttributeError, match=f"`{name}` of .* cannot change.*{name}=2.0"
    ):
        setattr(rule, name, 2.0)
    assert rule.get_config()[name] != 2.0


def test_a_number_set_by_a_callback_affects_replicas(strategy):
    with strategy.scope():
        model = make_model(keras_normopt.ClippedSGD(1.0), jit_compile=False)
    callback = Lengths("max_norm", 0.25)
    model.fit(X, Y, batch_size=2, verbose=0, callbacks=[callback])
    assert callback.lengths == pytest.approx([1.0, 0.25], rel=1e-3)
