"""Tests `compare`, which trains a user's own model with several optimizers."""

import functools
import itertools
import json
import re
import sys
import types

import keras
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

import keras_normopt
from keras_normopt import experiments
from keras_normopt.experiments import (
    comparing,
    figures,
    objective,
    progress,
    runs,
    styles,
    summary,
)
from keras_normopt.experiments.cli import main

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3)).astype("float32")
Y = (X.sum(axis=1, keepdims=True) > 0).astype("float32")
ONE = {"optimizers": ["sgd"], "learning_rates": [0.1], "seeds": 1, "epochs": 1}


def make_model(loss="binary_crossentropy", units=1, **arguments):
    output = keras.layers.Dense(units, "sigmoid", name="output")
    model = keras.Sequential([keras.Input((3,)), output])
    model.compile(loss=loss, **arguments)
    return model


def compare(make=make_model, x=X, y=Y, **arguments):
    return experiments.compare(make, x, y, **ONE | arguments)


class Spy(keras.callbacks.Callback):
    """Collects the trained models."""

    def __init__(self):
        super().__init__()
        self.models = []

    def on_train_begin(self, logs=None):
        self.models.append(self.model)


@pytest.fixture
def no_figures(monkeypatch):
    """Skips the figures, which take most of the time."""
    monkeypatch.setattr(figures, "draw", lambda *arguments: [])


# Training.


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return X[8 * index :][:8], Y[8 * index :][:8]


def as_dataset():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)


def as_loader():
    data = pytest.importorskip("torch.utils.data")
    return data.DataLoader(list(zip(X, Y, strict=True)), batch_size=8)


@pytest.mark.parametrize("make", [Batches, as_dataset, as_loader])
def test_batched_data_train_like_arrays(make):
    arguments = {"seeds": 2, "shuffle": False}
    arrays = compare(batch_size=8, **arguments).rows
    rows = compare(x=make(), y=None, **arguments).rows
    np.testing.assert_allclose(rows["loss"], arrays["loss"], rtol=1e-5)


def test_compare_equals_fit_with_each_optimizer():
    class_weight = {0: 1.0, 1: 3.0}
    arguments = {"batch_size": 6, "class_weight": class_weight, "epochs": 3}
    rows = compare(
        lambda: (make_model(), "mse", ["mae"]),
        optimizers=["sgd", ("normalized_adam", 0.03)],
        seeds=2,
        validation_split=0.25,
        **arguments,
    ).rows
    expected = []
    for seed, optimizer in itertools.product(
        range(2),
        [
            functools.partial(keras.optimizers.SGD, 0.1),
            functools.partial(keras_normopt.NormalizedAdam, 0.03),
        ],
    ):
        keras.utils.set_random_seed(seed)
        model = make_model("mse", metrics=["mae"], optimizer=optimizer())
        history = model.fit(X, Y, validation_split=0.25, verbose=0, **arguments).history
        expected.append(pd.DataFrame(history))
    expected = pd.concat(expected)
    assert set(expected) == {"loss", "mae", "val_loss", "val_mae"}
    np.testing.assert_allclose(rows[list(expected)], expected, rtol=1e-5)
    assert rows["epoch"].tolist() == [1, 2, 3] * 4


def test_compare_keeps_the_other_arguments_of_compile():
    steps = 1 if keras.backend.backend() == "torch" else 2  # PyTorch supports only 1.

    def make():
        inputs = keras.Input((3,))
        outputs = {n: keras.layers.Dense(1, name=n)(inputs) for n in ("a", "b")}
        model = keras.Model(inputs, outputs)
        model.compile(
            keras.optimizers.Adam(0.5),
            {"a": "mse", "b": "mse"},
            loss_weights={"a": 3.0, "b": 0.5},
            steps_per_execution=steps,
            jit_compile=False,
        )
        return model

    spy = Spy()
    rows = compare(make, y={"a": Y, "b": Y}, batch_size=12, callbacks=spy).rows
    (model,) = spy.models
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    assert (model.steps_per_execution, model.jit_compile) == (steps, False)
    parts = 3 * rows["a_loss"] + 0.5 * rows["b_loss"]
    np.testing.assert_allclose(rows["loss"], parts, rtol=1e-5)


def test_compare_keeps_loss_scaling():
    scale = 2.0**4

    def make():
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model = make_model()
            inner = keras.optimizers.Adam()
            optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=scale)
            model.compile(optimizer, "mse")
        finally:
            keras.config.set_dtype_policy("float32")
        return model

    spy = Spy()
    rows = compare(make, optimizers=["normalized_sgd"], callbacks=[spy]).rows
    optimizer = spy.models[0].optimizer
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    assert isinstance(optimizer.inner_optimizer, keras_normopt.NormalizedSGD)
    assert optimizer.initial_scale == scale
    assert np.isfinite(rows["loss"]).all()
    assert rows["learning_rate"].tolist() == pytest.approx([0.1])


def test_a_dictionary_may_hold_functions_that_make_optimizers():
    spy = Spy()
    make = functools.partial(keras_normopt.NormalizedSGD, momentum=0.5, norm="max")
    comparison = compare(
        optimizers={"mine": make, "theirs": "adam"}, callbacks=spy, learning_rates=[0.2]
    )
    mine, adam = (model.optimizer for model in spy.models)
    assert (mine.momentum, float(mine.learning_rate)) == (0.5, pytest.approx(0.2))
    assert isinstance(adam, keras.optimizers.Adam)
    columns = ["optimizer", "norm", "momentum"]
    actual = comparison.rows[columns].to_numpy().tolist()
    assert actual == [["mine", "max", "0.5"], ["theirs", "", ""]]


@pytest.mark.parametrize(
    "item",
    [
        "sgd",
        "adam:0.001",
        ("adam", 0.001),
        "sgd(momentum=0.9)",
        "normalized_adam(apply_to=update, norm=max):0.01",
        "clipped_sgd(max_norm=WeightNorm(0.01))",
    ],
)
def test_a_dictionary_accepts_the_same_items_as_a_list(item):
    [(_, *expected)] = comparing.parse([item])
    [(label, *actual)] = comparing.parse({"mine": item})
    assert label == "mine"
    assert repr(actual) == repr(expected)


def test_a_dictionary_accepts_optimizers_with_options():
    spy = Spy()
    comparison = compare(optimizers={"mine": "sgd(momentum=0.9):0.2"}, callbacks=spy)
    [model] = spy.models
    assert model.optimizer.momentum == 0.9
    assert float(model.optimizer.learning_rate) == pytest.approx(0.2)
    assert comparison.rows["optimizer"].unique().tolist() == ["mine"]
    with pytest.raises(ValueError, match="Write an optimizer with options as"):
        compare(optimizers={"mine": "sgd(0.9)"})
    with pytest.raises(ValueError, match=r"must be a list or a.*Received: <"):
        compare(optimizers={"mine": keras.optimizers.SGD()})


# The metric that ranks optimizers.


def share(y_true, y_pred):
    return keras.ops.mean(y_pred)


@pytest.mark.parametrize(
    ("metrics", "validated", "choice", "judged_by"),
    [
        ([], False, {}, "min loss"),
        ([], True, {}, "min val_loss"),
        (["accuracy"], False, {}, "max accuracy"),
        (["accuracy", "mse"], True, {}, "min val_mse"),
        # `fit` itself sorts metrics by name.
        (["mae", "auc"], True, {}, "max val_auc"),
        ([keras.metrics.MeanAbsoluteError(name="off")], True, {}, "min val_off"),
        (["mae", "auc"], True, {"monitor": "val_mae"}, "min val_mae"),
        (["mae", "auc"], True, {"monitor": "val_loss"}, "min val_loss"),
        ([share], True, {"mode": "max"}, "max val_share"),
        ([share], True, {"mode": "min"}, "min val_share"),
    ],
)
def test_optimizers_are_judged_by_the_last_metric_unless_another_metric_is_chosen(
    metrics, validated, choice, judged_by
):
    data = {"validation_data": (X, Y)} if validated else {}
    comparison = compare(lambda: (make_model(), "mse", metrics), **choice, **data)
    assert str(comparison.judge) == judged_by
    better = "higher" if judged_by.startswith("max") else "lower"
    assert f", {judged_by[4:]}, {better} is better:" in comparison.summary
    assert ("no validation data" in comparison.summary) != validated


def test_the_metric_of_the_last_output_ranks_optimizers():
    def make():
        inputs = keras.Input((3,))
        outputs = [keras.layers.Dense(1, name=name)(inputs) for name in ("b", "a")]
        model = keras.Model(inputs, outputs)
        model.compile(loss="mse", metrics=[["mae"], ["accuracy"]])
        return model

    comparison = compare(make, y=[Y, Y], validation_data=(X, [Y, Y]))
    assert str(comparison.judge) == "max val_a_accuracy"
    assert "another metric with `monitor`: val_b_mae." in comparison.summary


def test_ranking_by_another_metric_needs_no_new_training(tmp_path, no_figures):
    def make():
        return make_model(metrics=["accuracy", "mae"])

    spy = Spy()
    arguments = {"callbacks": spy, "out": tmp_path, "validation_data": (X, Y)}
    for choice, judged_by in [
        ({}, "min val_mae"),
        ({"monitor": "val_loss"}, "min val_loss"),
        ({"monitor": "val_accuracy", "mode": "max"}, "max val_accuracy"),
    ]:
        comparison = compare(make, **arguments, **choice)
        assert str(comparison.judge) == judged_by
        assert len(spy.models) == 1
    with pytest.raises(ValueError, match="Cannot tell whether higher or lower is"):
        compare(make, **arguments, monitor="val_accuracy")


# Resuming.


def test_each_changed_argument_trains_new_runs_once(tmp_path, no_figures):
    spy = Spy()
    changed = X.copy()
    changed[-1, -1] += 1
    momentum = {
        value: functools.partial(keras.optimizers.SGD, momentum=value)
        for value in (0.5, 0.6)
    }
    calls = [
        {},
        {"seeds": 2},
        {"x": changed},
        {"make": functools.partial(make_model, metrics=["mae"])},
        {"make": functools.partial(make_model, "mse")},
        {"batch_size": 5},
        {"sample_weight": Y[:, 0]},
        {"optimizers": {"mine": momentum[0.5]}},
        {"optimizers": {"mine": momentum[0.6]}},
    ]
    for number, call in enumerate(calls, start=1):
        compare(out=tmp_path, callbacks=[spy], **call)
        assert len(spy.models) == number
    for call in calls:
        compare(out=tmp_path, callbacks=[spy], verbose=0, **call)
    assert len(spy.models) == len(calls)


def test_a_run_that_a_callback_stops_counts_as_finished(tmp_path):
    spy = Spy()
    stop = keras.callbacks.EarlyStopping("loss", min_delta=100, patience=1)
    for _ in range(2):
        arguments = {"epochs": 9, "callbacks": [stop, spy], "out": tmp_path}
        comparison = compare(**arguments)
    assert len(spy.models) == 1
    assert comparison.rows["epoch"].tolist() == [1, 2]
    assert f"{comparison.rows['loss'].iloc[-1]:.4g}" in comparison.table


def test_files_are_written_to_a_new_directory(tmp_path):
    comparison = compare(out=tmp_path / "new" / "one")
    actual = {path.name for path in (tmp_path / "new" / "one").iterdir()}
    assert actual == {"results.csv", "summary.json", "best.png"}
    assert [path.name for path in comparison.paths] == ["best.png"]


def test_the_summary_names_an_optimizer_that_was_given_as_a_string(tmp_path):
    compare(optimizers="sgd", out=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["arguments"]["optimizers"] == ["sgd"]


# Errors.


def shares_a_layer():
    shared = keras.layers.Dense(2)

    def make():
        model = keras.Sequential([keras.Input((3,)), shared, keras.layers.Dense(1)])
        model.compile(loss="mse")
        return model

    return make


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": (batch for batch in [X])}, "The first run would use up `x`. Pass "),
        ({"x": iter([X])}, "not a generator or iterator. Received: x=<list_iter"),
        ({"make": make_model()}, "`make_model` must be a function without argum"),
        ({"make": lambda: None}, "a tuple (model, loss, metrics). Received: None"),
        (
            {"make": lambda: keras.Sequential([keras.layers.Dense(1)])},
            "Received: a model that is not compiled",
        ),
        (
            {"make": functools.cache(make_model)},
            "that share weights. Make their layers",
        ),
        ({"make": shares_a_layer()}, "that share weights. Make their layers inside"),
        ({"optimizers": ["sdg"]}, "clipped_rmsprop. Received: 'sdg'"),
        ({"optimizers": [keras.optimizers.SGD]}, "A dictionary has these as values,"),
        ({"optimizers": ["sgd:x"]}, "must be a number above 0. Received: 'x'"),
        ({"optimizers": {"mine": lambda rate: "sgd"}}, "and return a Keras optimizer"),
        ({"learning_rates": []}, "must be one or more numbers. Received: learning_ra"),
        ({"learning_rates": [0.1, -1]}, "must be a number above 0. Received: -1"),
        ({"seeds": 0}, "`seeds` must be a whole number of at least 1. Received: seed"),
        (
            {"epochs": 1.5},
            "`epochs` must be a whole number of at least 1. Received: ep",
        ),
        ({"mode": "up"}, "`mode` must be one of 'auto', 'min', 'max'. Received: mode"),
        ({"out": __file__}, "Cannot write to the directory of results: "),
        ({"out": f"{__file__}/under"}, "Choose another `out`. Received: "),
        ({"out": "/proc/here"}, "Choose another `out`. Received: /proc/here"),
    ],
)
def test_wrong_arguments_are_refused_before_training(arguments, message):
    spy = Spy()
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(**arguments, callbacks=[spy])
    assert not spy.models


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"monitor": "val_mae"}, "a metric that `fit` logs: loss, share. Received: mo"),
        ({}, "higher or lower is better for 'share'. Pass `mode='max'` or"),
    ],
)
def test_a_metric_that_cannot_rank_is_refused_after_an_epoch(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(lambda: make_model(metrics=[share]), epochs=100, **arguments)


# The summary.


def sentences(results, judge=objective.Judge("val_accuracy", "max")):  # noqa: B008
    """Returns the sentences of a summary. `results` has one value for each seed."""
    rows = []
    for (optimizer, rate), values in results.items():
        for seed, value in enumerate(values):
            run = dict.fromkeys(runs.Run.__dataclass_fields__, "")
            run |= {"network": "net", "optimizer": optimizer, "seed": seed, "epoch": 1}
            run |= {"initial_learning_rate": rate, "judged_by": str(judge)}
            rows.append(run | {"loss": 1.0, "seconds": 1.0, judge.monitor: value})
    return list(summary.sentences(pd.DataFrame(rows), judge))


HIGH, MIDDLE, LOW = [0.9, 0.95, 1.0], [0.8, 0.85, 0.92], [0.1, 0.2, 0.3]
NAN = float("nan")


def test_the_summary_ranks_optimizers_whose_ranges_do_not_overlap():
    lines = sentences({("adam", 0.1): LOW, ("sgd", 0.1): HIGH, ("sgd", 0.2): LOW})
    assert lines[0] == (
        "net, val_accuracy, higher is better: sgd at 0.1: 0.95 (0.9 to 1); adam at "
        "0.1: 0.2 (0.1 to 0.3). sgd is ahead of adam: ranges do not overlap."
    )
    loss = objective.Judge("val_loss", "min")
    lines = sentences({("adam", 0.1): LOW, ("sgd", 0.1): HIGH}, loss)
    assert (
        "lower is better: adam at 0.1: 0.2 (0.1 to 0.3); sgd at 0.1: 0.95" in lines[0]
    )
    assert lines[0].endswith(". adam is ahead of sgd: ranges do not overlap.")


def test_the_summary_does_not_rank_overlapping_ranges():
    lines = sentences({("adam", 0.1): MIDDLE, ("sgd", 0.1): HIGH})
    assert lines[0].endswith(" (0.8 to 0.92). No ranking: their ranges overlap.")
    lines = sentences({("a", 0.1): MIDDLE, ("b", 0.1): HIGH, ("c", 0.1): LOW})
    assert lines[0].endswith(
        "b is ahead of c: ranges do not overlap. No ranking of b against a: their "
        "ranges overlap."
    )
    lines = sentences({("adam", 0.1): LOW[:2], ("sgd", 0.1): HIGH[:2]})
    assert lines[0].endswith("No ranking: 2 seeds are too few. Use 3 or more.")
    lines = sentences({("adam", 0.1): [0.1], ("sgd", 0.1): [0.2]})
    assert "better: sgd at 0.1: 0.2; adam at 0.1: 0.1. No ranking: one seed" in lines[0]


@pytest.mark.parametrize("change", ["normalized", "clipped"])
def test_the_summary_compares_each_base_with_its_normalized_or_clipped_form(change):
    results = {("rmsprop", 0.1): HIGH, ("adam", 0.1): LOW, ("sgd", 0.1): LOW}
    results |= {(f"{change}_sgd", 0.1): MIDDLE, (f"{change}_adam", 0.1): LOW}
    lines = sentences(results)
    assert f"{change}_sgd is ahead of sgd: ranges do not overlap." in lines
    assert f"No ranking of adam against {change}_adam: their ranges overlap." in lines
    assert len(lines) == 4


def test_the_summary_has_confidence_intervals_of_paired_differences():
    # Hours of sleep that ten patients gained with two drugs (Student, 1908).
    # R's manual gives their interval: t.test(..., paired = TRUE) says -2.46 to -0.70.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    loss = objective.Judge("val_loss", "min")
    lines = sentences({("sgd", 0.1): first, ("adam", 0.1): second}, loss)
    expected = (
        "sgd minus adam: -1.58, with a 95 % confidence interval from -2.46 to -0.7 "
        "(paired t-test over 10 seeds)."
    )
    assert expected in lines
    # Only seeds of both optimizers count. Four pairs are too few for an interval.
    lines = sentences({("sgd", 0.1): first, ("adam", 0.1): second[:4]}, loss)
    assert not any("confidence" in line for line in lines)


def test_the_summary_suggests_learning_rates_to_try():
    results = {("sgd", rate): MIDDLE for rate in (0.1, 0.2, 0.4)}
    results |= {("adam", rate): MIDDLE for rate in (0.1, 0.2, 0.4)}
    results |= {("sgd", 0.2): HIGH, ("sgd", 0.4): [*HIGH[:2], NAN], ("adam", 0.4): HIGH}
    results |= {("lion", 0.1): HIGH, ("lion", 0.2): [NAN] * 3, ("ftrl", 0.1): MIDDLE}
    assert sentences(results)[1:] == [
        "Best at the highest rate tried, so try higher: adam.",
        "Best at the lowest rate tried, so try lower: lion.",
        "At one learning rate only, so try others: ftrl.",
        "Diverged, with one seed or more: sgd at 0.4; lion at 0.2.",
    ]
    (lines, diverged) = sentences({("sgd", 0.1): [NAN] * 3})
    assert lines.endswith("no results, because all diverged. Try lower learning rates.")
    assert diverged.endswith("sgd at 0.1.")


# Progress and figures.


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_in_a_terminal_and_in_a_file(
    terminal, capsys, monkeypatch, tmp_path, no_figures
):
    compare(out=tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    comparison = compare(out=tmp_path, seeds=2, epochs=1, optimizers=["sgd", "adam"])
    shown = capsys.readouterr().err
    if terminal:
        assert "run 4 of 4: sequential, adam at 0.1, seed 1: 100%" in shown
        assert "| 1/4 [" in shown  # An earlier call trained one epoch.
        return
    first, *_, last = lines = shown.splitlines()
    assert len(lines) == 3
    assert first.startswith("run 2 of 4: sequential, adam at 0.1, seed 0: loss ")
    losses = comparison.rows["loss"]
    assert f": loss {losses.iloc[-1]:.4g}, 00:00 left" in last


def test_time_left_is_estimated_from_finished_runs(monkeypatch, capsys):
    now = iter([0.0, 60.0, 120.0])
    clock = types.SimpleNamespace(perf_counter=now.__next__)
    monkeypatch.setattr(progress, "time", clock)
    subject = comparing.subject_of(make_model, {"x": X})
    plan = list(runs.plan(subject, [("sgd", "sgd", None)], [0.1], seeds=5, epochs=2))
    shown = progress.Progress(plan, plan[1:])  # One run is finished.
    rows = pd.DataFrame([{"judged_by": "min loss", "loss": 1.0}])
    for run in plan[1:3]:
        shown.begin(run)
        shown.end(run, rows)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(
        "run 2 of 5: sequential, sgd at 0.1, seed 1: loss 1, 03:00 left"
    )
    assert second.endswith(", seed 2: loss 1, 02:00 left")


def test_plot_does_not_change_the_settings_of_matplotlib():
    before = dict(mpl.rcParams)
    comparison = compare(learning_rates=[0.1, 0.2])
    plots = comparison.plot()
    assert list(plots) == ["best", "by_rate", "by_optimizer", "rates"]
    assert dict(mpl.rcParams) == before
    assert str(comparison) == f"{comparison.table}\n\n{comparison.summary}"
    for figure in plots.values():
        mpl.pyplot.close(figure)


def test_each_optimizer_always_has_the_same_style():
    names = ["sgd", "adam", *keras_normopt.optimizers.ALIASES]
    alone = {name: styles.of([name])[name] for name in names}
    together = styles.of(names)
    assert together == alone
    looks = {(s["color"], s["dashes"], s["marker"]) for s in together.values()}
    assert len(looks) == len(names)
    first = ["sgd", "normalized_sgd", "adam", "normalized_adam", "rmsprop"]
    assert len({styles.of(first)[name]["color"] for name in first}) == len(first)
    labels = ["NormalizedSGD", "normalized_sgd (l2), rate 0.1", "mine", "SGD"]
    by_label = styles.of(labels)
    assert by_label["NormalizedSGD"] == alone["normalized_sgd"]
    assert by_label["SGD"] == alone["sgd"]
    assert len({style["color"] for style in by_label.values()}) == len(labels)
    (label,) = styles.of(labels[1:2]).values()
    assert label == alone["normalized_sgd"]


# The command line.


MODULE = """
import numpy as np, keras

def make_model():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(loss="mse")
    return model

def my_task():
    x = np.ones((8, 3))
    return make_model, {"x": x, "y": x[:, 0], "epochs": 2, "batch_size": 4}

def wrong():
    return make_model

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Returns the name of a user's module in the working directory."""
    name = f"module_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_the_command_trains_a_task_of_the_user(module, tmp_path, capsys, no_figures):
    arguments = f"--task {module}:my_task --optimizers sgd,normalized_sgd:0.1 --seeds 2"
    arguments += " --norms l2,max --learning-rates 0.01,0.02"
    assert main(arguments.split()) == 0
    out = tmp_path / "experiments" / f"{module}.my_task"
    rows = pd.read_csv(out / "results.csv", keep_default_na=False)
    assert rows["batch_size"].unique().tolist() == [4]
    last = rows[rows["epoch"] == 2]
    actual = last[["optimizer", "norm", "initial_learning_rate", "seed"]]
    pairs = [("sgd", "", 0.01), ("sgd", "", 0.02)]
    pairs += [("normalized_sgd", norm, 0.1) for norm in ("l2", "max")]
    expected = [[*pair, seed] for seed in range(2) for pair in pairs]
    assert actual.to_numpy().tolist() == expected
    assert "No ranking: 2 seeds are too few" in capsys.readouterr().out
    # A call in Python resumes the runs of the command.
    make, fit_arguments = sys.modules[module].my_task()
    before = (out / "results.csv").read_bytes()
    asked = {"optimizers": ["sgd"], "learning_rates": [0.01], "seeds": 2}
    comparison = experiments.compare(make, **fit_arguments, **asked, out=out)
    assert (out / "results.csv").read_bytes() == before
    assert len(comparison.rows) == 4


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("MODULE", "must be MODULE:FUNCTION. For example, my_module:my_task is the f"),
        ("no_such:my_task", "but there is no module no_such in "),
        ("MODULE:no_such", "has no attribute 'no_such'."),
        ("MODULE:wrong", "arguments of `fit`, including 'x'. Received: <funct"),
        ("MODULE:number", "must be a function without arguments that returns a tuple"),
        ("MODULE:my_task --fraction 0.5", "--fraction cannot be combined with --task."),
        ("MODULE:my_task --out MODULE.py", "Cannot write to the directory of results"),
    ],
)
def test_the_command_explains_why_a_task_is_wrong(task, message, module, capsys):
    with pytest.raises(SystemExit):
        main(["--task", *task.replace("MODULE", module).split()])
    output = " ".join(capsys.readouterr().err.split())
    assert message in output.partition("error: ")[2]
