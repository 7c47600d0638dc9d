"""Tests `transfer` and `coordinate_check` with one model in several sizes."""

import dataclasses
import functools
import itertools
import math
import re
import sys

import keras
import numpy as np
import pandas as pd
import pytest

from keras_normopt import experiments
from keras_normopt.experiments import comparing, figures, runs
from keras_normopt.experiments.cli import main
from keras_normopt.experiments.published import networks
from keras_normopt.experiments.published.tasks import MUON, TASKS

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 3)).astype("float32")
Y = X.sum(axis=1, keepdims=True)
SIZED = [name for name, task in TASKS.items() if task.size]


def make_model(width):
    hidden, output = keras.layers.Dense(width, "tanh"), keras.layers.Dense(1)
    model = keras.Sequential([keras.Input((3,)), hidden, output])
    model.compile(loss="mse")
    return model


def transfer(**changes):
    arguments = {"sizes": (2, 4), "optimizers": ["sgd"], "learning_rates": [0.1]}
    arguments |= {"seeds": 1, "epochs": 1, "batch_size": 16} | changes
    return experiments.transfer(make_model, X, Y, **arguments)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(figures, "draw", lambda *arguments: [])


# Training.


def test_transfer_trains_each_size_like_compare():
    arguments = {"optimizers": ["sgd", "adam:0.03"], "learning_rates": [0.1, 0.01]}
    arguments |= {"seeds": 2, "epochs": 2, "batch_size": 16}
    rows = transfer(sizes=(4, 2), **arguments).rows
    # Small sizes come first. Each seed trains every size before the next seed starts.
    order = rows.drop_duplicates(["seed", "network"])[["seed", "network"]]
    assert order.to_numpy().tolist() == [[0, "2"], [0, "4"], [1, "2"], [1, "4"]]
    for size in (2, 4):
        make = functools.partial(make_model, size)
        expected = experiments.compare(make, X, Y, **arguments).rows
        actual = rows[rows["network"] == str(size)]
        columns = ["optimizer", "initial_learning_rate", "seed", "epoch", "loss"]
        pd.testing.assert_frame_equal(
            actual[columns].reset_index(drop=True),
            expected[columns].reset_index(drop=True),
        )


def test_a_new_size_trains_only_its_own_runs(tmp_path, no_figures, monkeypatch):
    transfer(out=tmp_path)
    train, trained = runs.train, []

    def record(run, *arguments, **choice):
        trained.append(run.network)
        return train(run, *arguments, **choice)

    monkeypatch.setattr(runs, "train", record)
    result = transfer(out=tmp_path, sizes=(2, 4, 8))
    assert trained == ["8"]
    assert result.rows["network"].tolist() == ["2", "4", "8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [32]}, "`sizes` must be two or more different numbers above 0."),
        ({"sizes": [32, 32]}, "Received: sizes=[32, 32]"),
        ({"sizes": [0, 32]}, "Received: sizes=[0, 32]"),
        ({"sizes": ["small", "large"]}, "Received: sizes=['small', 'large']"),
        ({"seeds": 0}, "`seeds` must be a whole number of at least 1."),
        ({"learning_rates": [-1]}, "A learning rate must be a number above 0."),
        ({"optimizers": ["sdg"]}, "Received: 'sdg'"),
        ({"validation_data": iter([])}, "first run would use up `validation_data`."),
    ],
)
def test_errors_name_wrong_arguments_of_transfer(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        transfer(**arguments)


# The summary.


@pytest.fixture
def fake_losses(monkeypatch, no_figures):
    """Replaces training by a function that computes a loss from size, rate and seed."""

    def use_loss(loss):
        def train(run, subject, *rest, **choice):
            size, rate = float(run.network), run.initial_learning_rate
            value = loss(run.optimizer, size, rate, run.seed)
            row = {"epoch": 1, "loss": value, "val_loss": value}
            row |= {"learning_rate": rate, "seconds": 1.0, "judged_by": "min val_loss"}
            return [dataclasses.asdict(run) | row]

        monkeypatch.setattr(runs, "train", train)

    return use_loss


def valley(best):
    """Returns a loss function: 1 plus the distance to the best rate, in decades."""

    def loss(optimizer, size, rate, seed):
        return 1 + abs(math.log10(rate / best(optimizer, size))) + 1e-4 * seed

    return loss


RATES = [0.0001, 0.001, 0.01, 0.1, 1.0]


def summary_line(result, name):
    (line,) = [line for line in result.summary.split("\n") if f"{name}: the" in line]
    return line


def test_the_summary_says_how_far_the_best_rate_moves(fake_losses):
    # As the size grows from 1 to 100, the best rate of SGD falls from 0.1 to 0.001.
    fake_losses(valley(lambda name, size: 0.1 / size if name == "sgd" else 0.01))
    result = transfer(
        sizes=(1, 10, 100), optimizers=["sgd", "adam"], learning_rates=RATES, seeds=3
    )
    line = summary_line(result, "sgd")
    assert "the best rate is 0.1 at size 1 and 0.001 at 100." in line
    assert "Over all of them it moves by 2.0 decades." in line
    assert "At 100 the rate tuned at 1 gives 3, the best one 1" in line
    assert "(200.0% worse): tune each size." in line
    # 0.01 is one decade from the best rates of the first and the last size.
    assert line.endswith("One rate for all: 0.01, at most 100.0% worse.")
    line = summary_line(result, "adam")
    assert "it moves by 0.0 decades. At 100 the rate tuned at 1 gives 1" in line
    assert "(0.0% worse): tune the smallest size." in line
    assert "One rate for all: 0.01, at most 0.0%" in line
    table = result.table.split("\n")
    assert table[0].split()[-5:] == ["at", "the", "rate", "of", "1"]
    sgd = [line.split() for line in table if line.split()[0] == "sgd"]
    assert [line[1:4] for line in sgd] == [
        ["1", "0.1", "3"],
        ["10", "0.01", "3"],
        ["100", "0.001", "3"],
    ]
    assert [line[4] for line in sgd] == ["1", "1", "1"]
    assert [line[-4] for line in sgd] == ["1", "2", "3"]
    # The summary also compares the optimizers of each size.
    assert "size 10, val_loss, lower is better: " in result.summary


def test_no_advice_is_given_without_enough_seeds_or_rates(fake_losses):
    fake_losses(valley(lambda name, size: 0.1))
    line = summary_line(transfer(learning_rates=RATES, seeds=2), "sgd")
    assert "No advice: use 3 seeds or more." in line
    line = summary_line(transfer(learning_rates=[0.1, 1.0], seeds=3), "sgd")
    assert "is the first or last that was tried at 2, 4." in line
    line = summary_line(transfer(learning_rates=[0.1], seeds=3), "sgd")
    assert "tune the smallest size. One rate" in line


def test_a_diverged_size_changes_the_advice(fake_losses):
    def loss(optimizer, size, rate, seed):
        if optimizer == "adam" or (size == 4 and rate == 0.1 and seed == 1):
            return math.nan
        return 1 / rate

    fake_losses(loss)
    result = transfer(optimizers=["sgd", "adam"], learning_rates=RATES[2:4], seeds=3)
    line = summary_line(result, "sgd")
    assert "0.1 at size 2 and 0.01 at 4" in line
    assert "At 4 the rate 0.1 diverged: tune each size." in line
    assert line.endswith("One rate for all: 0.01, at most 900.0% worse.")
    assert "adam: at some size every rate diverged. Try lower rates." in result.summary
    assert "diverged" in result.table


def test_the_figure_shows_the_mean_loss_of_each_rate_and_size(tmp_path):
    result = transfer(
        out=tmp_path, optimizers=["sgd", "adam"], learning_rates=[0.1, 0.01], seeds=2
    )
    assert result.paths == [tmp_path / "sizes.png"]
    panels = result.plot()["sizes"].axes
    assert [axes.get_title() for axes in panels] == ["sgd", "adam"]
    last = result.rows.groupby(["optimizer", "network", "initial_learning_rate"])
    means = last["loss"].mean()
    for axes, network in itertools.product(panels, ("2", "4")):
        expected = means[axes.get_title(), network]
        drawn = [line.get_xydata() for line in axes.lines if len(line.get_xydata())]
        assert any(
            np.allclose(line, np.column_stack([expected.index, expected]))
            for line in drawn
            if len(line) == 2
        )


# The coordinate check.


def check(make=make_model, x=X, y=Y, **changes):
    arguments = {"sizes": (2, 4), "optimizers": ["sgd:0.1"], "batch_size": 16}
    return experiments.coordinate_check(make, x, y, **arguments | changes)


def rms(values):
    return np.sqrt(np.mean(np.square(values)))


@pytest.mark.parametrize(
    ("name", "cls"),
    [("sgd", keras.optimizers.SGD), ("adam", keras.optimizers.Adam)],
)
def test_coordinate_check_measures_how_far_outputs_move(name, cls):
    result = check(optimizers=[f"{name}:0.1"], steps=(3, 1), shuffle=False, seed=5)
    for size in (2, 4):
        keras.utils.set_random_seed(5)
        model = make_model(size)
        model.compile(cls(0.1), "mse")
        outputs = keras.Model(model.inputs, [layer.output for layer in model.layers])
        before = outputs.predict(X[:16], verbose=0)
        for step in range(3):
            batch = slice(16 * step, 16 * step + 16)
            model.train_on_batch(X[batch], Y[batch])
            after = outputs.predict(X[:16], verbose=0)
            if step in (0, 2):
                changes = result[size][f"{name} at 0.1", step + 1]
                assert list(changes.index) == ["dense", "dense_1"]
                expected = [rms(b - a) for a, b in zip(before, after, strict=True)]
                np.testing.assert_allclose(changes, expected, rtol=1e-3)
    slopes = np.log(result[4] / result[2]) / np.log(2)
    np.testing.assert_allclose(result["power"], slopes, rtol=1e-6)


def test_an_orthogonal_step_moves_outputs_equally_far_in_all_widths():
    def make(width):
        model = networks.plain(2, width)((16,), 4)
        model.compile(loss="sparse_categorical_crossentropy")
        return model

    x = np.random.default_rng(1).normal(size=(64, 16)).astype("float32")
    y = np.arange(64) % 4
    rates = ["adam:0.001", "orthogonal_sgd:0.001"]
    result = check(make, x, y, sizes=(32, 256), optimizers=rates, steps=[1])
    # Adam moves each weight equally far in all widths, but a wide kernel has more
    # weights. In theory, its outputs move at least with the root of the width. An
    # orthogonal step moves outputs equally far in all widths.
    powers = result["power"].xs("dense_1", level="layer")
    assert powers.loc["adam at 0.001"].item() > 1 / 4
    assert abs(powers.loc["orthogonal_sgd at 0.001"].item()) < 1 / 4


class Subclassed(keras.Model):
    """A model without a graph. It has a recurrent layer and calls one layer twice."""

    def __init__(self, units):
        super().__init__()
        self.lstm = keras.layers.LSTM(units, return_sequences=True)
        self.twice = keras.layers.Dense(units)
        self.spread = keras.layers.TimeDistributed(keras.layers.Dense(1))

    def call(self, x):
        return self.spread(self.twice(self.twice(self.lstm(x))))


def test_coordinate_check_measures_layers_of_a_subclassed_model():
    def make(units):
        model = Subclassed(units)
        model.compile(loss="mse")
        return model

    x = np.random.default_rng(1).normal(size=(8, 5, 3)).astype("float32")
    result = check(make, x, x[..., :1], steps=[1])
    names = [name for *_, name in result.index]
    # Layers inside a traced loop have no values.
    assert names in (["lstm", "dense"], ["lstm", "dense", "dense_1"])
    assert (result[[2, 4]] > 0).all(axis=None)


def test_coordinate_check_has_no_value_for_layers_that_a_size_lacks():
    def make(depth):
        hidden = [keras.layers.Dense(3) for _ in range(depth)]
        output = keras.layers.Dense(1, name="output")
        model = keras.Sequential([keras.Input((3,)), *hidden, output])
        model.compile(loss="mse")
        return model

    result = check(make, sizes=(1, 2, 3), steps=[1]).droplevel([0, 1])
    assert list(result.index) == ["dense", "output", "dense_1", "dense_2"]
    assert result.isna()[[1, 2, 3]].to_numpy().tolist() == [
        [False] * 3,
        [False] * 3,
        [True, False, False],
        [True, True, False],
    ]
    assert result["power"].isna().tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizers": ["sgd", "adam:0.1"]}, "Received without one: sgd"),
        ({"steps": []}, "`steps` must be one or more positive integers."),
        ({"steps": [0, 1]}, "Received: steps=[0, 1]"),
        ({"sizes": [4]}, "`sizes` must be two or more different numbers"),
        ({"x": iter([])}, "The first run would use up `x`."),
        (
            {"callbacks": [keras.callbacks.TerminateOnNaN()], "y": Y * np.nan},
            "`fit` ended after 1 steps. Leave out callbacks that end it",
        ),
    ],
)
def test_errors_name_wrong_arguments_of_the_coordinate_check(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(**arguments)


# The command line.

MODULE = """
import keras
import numpy as np


def make_model(width):
    hidden, output = keras.layers.Dense(width, "tanh"), keras.layers.Dense(1)
    model = keras.Sequential([keras.Input((3,)), hidden, output])
    model.compile(loss="mse")
    return model


def my_task():
    x = np.ones((8, 3))
    return make_model, {"x": x, "y": x[:, 0], "epochs": 1, "batch_size": 4}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "sized_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield "sized_module:my_task"
    sys.modules.pop("sized_module", None)


def test_the_command_transfers_a_task_of_the_user(module, capsys, no_figures):
    arguments = f"--task {module} --sizes 8,4 --optimizers sgd,adam:0.01 --seeds 1"
    arguments += " --learning-rates 0.1,0.01 --coordinates"
    assert main(arguments.split()) == 0
    output = capsys.readouterr().out
    assert "adam: the best rate is 0.01 at size 4 and 0.01 at 8." in output
    lines = output.partition("\n\n")[2].split("\n\n")[-1].split("\n")
    assert lines[0].split() == ["4", "8", "power"]
    labels = [" ".join(line.split()[:3]) for line in lines if " at 0." in line]
    assert [label.split()[0] for label in labels] == ["sgd", "adam"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task MODULE --sizes 4", "`sizes` must be two or more different numbers"),
        ("--task MODULE --sizes 4,-1", "--sizes: must be a number above 0, not '-1'"),
        ("--task MODULE --sizes 4,8 --batch-size 1,2", "--batch-size must be one num"),
        ("plain_width --sizes 4,8", "--sizes needs --task. Published tasks have"),
        ("batches --coordinates", "--coordinates needs a task with two or more sizes"),
        ("plain_width --networks 32 --coordinates", "needs a task with two or more"),
    ],
)
def test_errors_name_wrong_arguments_of_the_command(arguments, message, module, capsys):
    with pytest.raises(SystemExit):
        main(arguments.replace("MODULE", module).split())
    assert message in " ".join(capsys.readouterr().err.split())


# Published tasks.


@pytest.mark.parametrize("name", SIZED)
def test_published_sizes_grow_and_muon_leaves_out_the_last_layer(name):
    task = TASKS[name]
    shapes = {"topics": (64,), "digits": (8, 8, 1), "mnist": (28, 28, 1)}
    shape = shapes[task.datasets[0]]
    first, second = list(task.networks)[:2]
    models = [task.make(size, shape)[0] for size in (first, second)]
    counts = [model.count_params() for model in models]
    assert counts[0] < counts[1]
    # Besides embeddings, Muon leaves out only the matrix of the output layer.
    [(_, identifier, _)] = comparing.parse([MUON])
    muon = runs.make_optimizer(identifier, 0.1)
    kernels = [v for v in models[0].trainable_variables if len(v.shape) == 2]
    left_out = [v.path for v in kernels if muon._should_use_adamw(v)]
    left_out = [path for path in left_out if "embedding" not in path]
    assert left_out == [models[0].layers[-1].kernel.path]
