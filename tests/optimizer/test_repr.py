"""Tests that `repr` shows an optimizer as the call that makes it."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from keras_normopt import directions, step_sizes

CosineDecay = keras.optimizers.schedules.CosineDecay
NAMES = {
    **vars(directions),
    **vars(step_sizes),
    **vars(keras_normopt),
    "CosineDecay": CosineDecay,
}


@pytest.mark.parametrize("cls", keras_normopt.optimizers.ALIASES.values())
def test_arguments_at_their_defaults_are_not_shown(cls):
    assert repr(cls()) == f"{cls.__name__}()"


@pytest.mark.parametrize(
    "code",
    [
        "NormalizedSGD(learning_rate=0.1, norm='max')",
        "NormalizedSGD(momentum=0.9, exclude=('bias', 'beta'))",
        "NormalizedAdam(learning_rate=0.003, weight_decay=0.01, clipvalue=0.5)",
        "NormalizedAdam(learning_rate=1e-07, name='mine', norm_epsilon=1e-09)",
        "NormalizedSGD(norm=None, track_norms='all')",
        "NormalizedSGD(scope='unit', axes={'kernel': [[0], [1]]})",
        "NormalizedMuon(exclude_layers=['head'], apply_to='update')",
        "OrthogonalSGD(momentum=0.8)",
        "OrthogonalSGD(direction={'head': None, '.*': Rows(scale='operator')})",
        "ClippedAdam(scope='global', max_norm=0.5, skip=True, max_skips=3)",
        "OrthogonalSGD(direction=Orthogonal(scale='operator', embeddings=Sign()))",
        "ClippedSGD(max_norm=RunningNorm(factor=1.5, warmup=20))",
        "NormalizedSGD(step_size=[{'head': 0.5}, WeightNorm(coefficient=0.5)])",
        "NormalizedSGD(learning_rate=CosineDecay(initial_learning_rate=0.1, "
        "decay_steps=20))",
        "NormalizedSGD(step_size={'head': CosineDecay(initial_learning_rate=0.1, "
        "decay_steps=20, alpha=0.5)})",
        "ClippedSGD(max_norm=CosineDecay(initial_learning_rate=1.0, decay_steps=9))",
    ],
)
def test_the_text_is_code_that_makes_an_equal_optimizer(code):
    optimizer = eval(code, dict(NAMES))
    text = repr(optimizer)
    twin = eval(text, dict(NAMES))
    # Without the argument `name`, Keras makes up a numbered name.
    automatic = {} if "name=" in code else {"name": ""}
    assert twin.get_config() | automatic == optimizer.get_config() | automatic
    assert repr(twin) == text
    assert text == code


def test_objects_that_are_given_by_name_are_shown_as_objects():
    optimizer = keras_normopt.NormalizedSGD(step_size="weight_norm")
    assert repr(optimizer) == "NormalizedSGD(step_size=WeightNorm())"
    optimizer = keras_normopt.ClippedSGD(max_norm="running_norm")
    assert repr(optimizer) == "ClippedSGD(max_norm=RunningNorm())"
    optimizer = keras_normopt.NormalizedSGD(direction="sign")
    assert repr(optimizer) == "NormalizedSGD(direction=Sign())"


def half_of_max(gradient):
    return ops.max(ops.abs(gradient)) / 2


def a_tenth():
    return 0.1


def test_functions_are_shown_by_name(custom_norms):
    make = keras_normopt.NormalizedSGD
    # Without a registered name, Keras cannot save the function.
    optimizer = make(0.5, norm=half_of_max)
    assert repr(optimizer) == "NormalizedSGD(learning_rate=0.5, norm=half_of_max)"
    keras_normopt.register_norm("half", half_of_max)
    text = repr(make(a_tenth, norm="half"))
    assert text == "NormalizedSGD(learning_rate=a_tenth, norm='half')"
    text = repr(make(lambda: 0.5))
    assert text == "NormalizedSGD(learning_rate=<lambda>)"


@pytest.mark.parametrize(
    "make", [keras_normopt.NormalizedSGD, keras_normopt.ClippedAdam]
)
def test_only_arguments_that_were_set_are_shown_after_training(make):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(optimizer=make(0.25), loss="mse")
    text = repr(model.optimizer)
    assert text == f"{make.__name__}(learning_rate=0.25)"
    before = model.optimizer.get_config()
    model.fit(np.ones((8, 3)), np.ones((8, 1)), epochs=2, verbose=0)
    assert repr(model.optimizer) == text
    assert model.optimizer.get_config() == before
    model.optimizer.learning_rate = 0.125
    assert repr(model.optimizer) == f"{make.__name__}(learning_rate=0.125)"


def test_an_optimizer_inside_a_loss_scale_optimizer_is_shown():
    inner = keras_normopt.NormalizedSGD(0.5)
    outer = keras.optimizers.LossScaleOptimizer(inner)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(optimizer=outer, loss="mse")
    model.fit(np.ones((8, 3)), np.ones((8, 1)), verbose=0)
    assert repr(model.optimizer.inner_optimizer) == "NormalizedSGD(learning_rate=0.5)"
    assert "NormalizedSGD" in str(outer.get_config())


class Mine(keras_normopt.NormalizedSGD):
    def __init__(self, warmth, **kwargs):
        super().__init__(**kwargs)
        self.warmth = warmth

    def get_config(self):
        return super().get_config() | {"warmth": self.warmth}


def test_subclasses_of_users_show_their_own_arguments():
    assert repr(Mine(3, norm="max")) == "Mine(warmth=3, norm='max')"


class Broken(keras_normopt.NormalizedSGD):
    def get_config(self):
        raise NotImplementedError


def test_repr_never_raises_an_error():
    assert repr(Broken()) == "<Broken>"
    cls = keras_normopt.NormalizedSGD
    assert repr(cls.__new__(cls)) == "<NormalizedSGD>"


def test_repr_does_not_change_what_a_step_compiles():
    texts = []

    class Telling(keras_normopt.NormalizedSGD):
        def update_step(self, gradient, variable, learning_rate):
            texts.append(repr(self))
            super().update_step(gradient, variable, learning_rate)

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(optimizer=Telling(0.5), loss="mse")
    model.fit(np.ones((8, 3)), np.ones((8, 1)), epochs=3, batch_size=4, verbose=0)
    assert set(texts) <= {"Telling(learning_rate=0.5)", "<Telling>"}
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    plain.compile(optimizer=keras_normopt.NormalizedSGD(0.5), loss="mse")
    if keras.backend.backend() != "torch":  # Compilers trace each variable once.
        assert len(texts) <= 4
