"""The command `python -m keras_normopt.experiments`."""

import csv
import dataclasses
import itertools
import json
import math
import pathlib
import runpy
import signal
import sys
import zlib

import keras
import numpy as np
import pytest
from matplotlib import pyplot as plt
from sklearn.datasets import make_spd_matrix

import keras_normopt
from keras_normopt.experiments import figures, runs, tasks
from keras_normopt.experiments.__main__ import main
from keras_normopt.experiments.figures import draw
from processes import SCRIPTS, finish, start

COLUMNS = (
    "task,dataset,fraction,network,backend,optimizer,norm,scope,momentum,schedule,"
    "initial_learning_rate,epochs,batch_size,seed,epoch,loss,accuracy,val_loss,"
    "val_accuracy,learning_rate,seconds,versions"
)
METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")
PNG = b"\x89PNG\r\n\x1a\n"
# Four runs of two epochs, on the cheapest of the tasks.
FOUR_RUNS = "quadratic --optimizers sgd,normalized_sgd --seeds 2 --epochs 2"
FOUR_RUNS += " --learning-rates 0.001"


def command(out, arguments):
    """Runs the command, and returns the rows of results.csv, words and numbers."""
    assert main([*arguments.split(), "--out", str(out)]) == 0
    return read(out)


def read(out):
    header, *lines = (out / "results.csv").read_text().splitlines()
    assert header == COLUMNS
    rows = csv.DictReader(lines, COLUMNS.split(","))
    return [{name: _value(text) for name, text in row.items()} for row in rows]


def _value(text):
    try:
        return float(text)
    except ValueError:
        return text


def refused(capsys, arguments):
    """Runs the command in vain, and returns what the error says."""
    with pytest.raises(SystemExit) as error:
        main(arguments.split())
    assert error.value.code == 2
    return " ".join(capsys.readouterr().err.partition("error: ")[2].split())


def summary(out):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (out / "summary.json").read_text()
    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def pretended(monkeypatch):
    """Makes numbers up instead of training; lists the runs, and what they are for."""
    calls = []

    def train(run, task, loaded, bar):
        calls.append((run, loaded))
        rng = np.random.default_rng(zlib.crc32(repr(run).encode()))
        for epoch in range(run.epochs):
            made_up = dict(zip(METRICS, rng.random(4).tolist(), strict=True))
            # At one of the learning rates all seems best, but one seed has failed.
            if (run.optimizer, run.initial_learning_rate) == ("sgd", 0.3):
                made_up["val_accuracy"] = 1.0
                if run.seed == 1:
                    made_up |= {"loss": math.nan, "val_loss": math.inf}
            row = {"epoch": epoch + 1, "learning_rate": 0.1, "seconds": rng.random()}
            yield dataclasses.asdict(run) | made_up | row

    monkeypatch.setattr(runs, "train", lambda *arguments: list(train(*arguments)))
    monkeypatch.setattr(figures, "draw", lambda *arguments: [])
    return calls


# From end to end.


@pytest.mark.parametrize(
    ("task", "network", "rates"),
    [
        ("quadratic", "quadratic", [0.001] * 3),
        ("mlp", "mlp", [0.01, 0.001, 0.0001]),
        ("cnn", "cnn", [0.01, 0.005, 0.001, 0.0001]),
        ("rnn", "lstm_rows", [0.01, 0.001, 0.0001]),
    ],
)
def test_a_task(task, network, rates, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tasks, "MLP_LAYERS", 1)  # All 30 compile for a minute.
    arguments = f"{task} --quick --networks {network} --optimizers normalized_sgd"
    rows = command(tmp_path, f"{arguments} --fraction 0.05 --batch-size 75")
    assert [row["epoch"] for row in rows] == [*range(1, len(rates) + 1)]
    found = [row["learning_rate"] for row in rows]
    np.testing.assert_allclose(found, rates, rtol=1e-6)
    for row in rows:
        assert (row["network"], row["backend"]) == (network, keras.backend.backend())
        assert f"keras {keras.version()}, {row['backend']}" in row["versions"]
        assert row["seconds"] > 0
        assert math.isfinite(row["loss"])
        assert math.isfinite(row["val_loss"])
        # Of the 1497 images 75, and all 300 of the others.
        right = np.array([75 * row["accuracy"], 300 * row["val_accuracy"]])
        if task == "quadratic":
            assert np.isnan(right).all()
        else:
            np.testing.assert_allclose(right, right.round(), atol=1e-3)
    told = summary(tmp_path)
    assert told["runs"] == told["finished_runs"] == 1
    assert told["arguments"]["batch_size"] == 75
    assert told["versions"] == [rows[0]["versions"]]
    _, table, picture = capsys.readouterr().out.splitlines()
    assert table.split()[:2] == [network, "normalized_sgd"]
    assert [pathlib.Path(picture)] == [*tmp_path.glob("*.png")]
    assert pathlib.Path(picture).read_bytes().startswith(PNG)


# What is trained, as it was published.


def layers_of(network, task, shape):
    """The class of each layer, and the settings of it that matter."""
    model, loss, _ = tasks.TASKS[task].make(network, shape)
    assert loss == "sparse_categorical_crossentropy"
    found = []
    for layer in model.layers:
        config = layer.get_config()
        names = ("units", "filters", "kernel_size", "padding", "activation", "rate")
        names += ("pool_size",)
        found.append([type(layer).__name__])
        found[-1] += [config[name] for name in names if name in config]
        if config.get("kernel_regularizer"):
            assert config["kernel_regularizer"]["class_name"] == "L2"
            l2 = config["kernel_regularizer"]["config"]["l2"]
            found[-1] += [config["kernel_initializer"]["class_name"], float(l2)]
    return found, model


def test_mlp():
    found, _ = layers_of("mlp", "mlp", (28, 28, 1))
    hidden = [
        ["Dense", 128, "relu", "HeNormal", pytest.approx(1e-5)],
        ["BatchNormalization"],
        ["Dropout", 0.2],
    ]
    assert found == [["Flatten"], *hidden * 30, ["Dense", 10, "softmax"]]


def test_cnn():
    found, model = layers_of("cnn", "cnn", (32, 32, 3))
    convolutions = [
        [
            ["Conv2D", n, (3, 3), "same", "relu"],
            ["Conv2D", n, (3, 3), "valid", "relu"],
            ["MaxPooling2D", "valid", (2, 2)],
            ["Dropout", 0.25],
        ]
        for n in (32, 64)
    ]
    dense = [["Dense", 512, "relu"], ["Dropout", 0.5], ["Dense", 10, "softmax"]]
    assert found == [*convolutions[0], *convolutions[1], ["Flatten"], *dense]
    assert model.count_params() == 1_250_858


@pytest.mark.parametrize("cell", ["lstm", "plain"])
@pytest.mark.parametrize(
    ("reads", "steps"), [("rows", (32, 96)), ("pixels", (3072, 1))]
)
def test_rnn(cell, reads, steps):
    _, model = layers_of(f"{cell}_{reads}", "rnn", (32, 32, 3))
    layer = model.layers[1]
    assert type(layer).__name__ == {"lstm": "LSTM", "plain": "SimpleRNN"}[cell]
    assert layer.units == 64
    assert layer.input.shape[1:] == steps


@pytest.mark.parametrize(
    ("task", "settings", "norm"),
    [("mlp", ("stages", 30, 128), "max"), ("cnn", ("stages", 60, 128), "l2")],
)
def test_published_settings(task, settings, norm, pretended, tmp_path):
    command(tmp_path, f"{task} --seeds 1 --learning-rates 0.01")
    found = [(run.schedule, run.epochs, run.batch_size) for run, _ in pretended]
    assert found == [settings] * 4
    found = [(run.optimizer, run.norm, run.momentum) for run, _ in pretended]
    sgd, adam = [("sgd", "", "0.9"), ("normalized_sgd", norm, "0.9")], ("adam", "", "")
    assert found == [*sgd, adam, ("normalized_adam", norm, "")]
    assert all(len(loaded.x) == 1497 for _, loaded in pretended)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_quadratic_by_hand(momentum, tmp_path):
    arguments = f"{FOUR_RUNS} --seeds 1 --epochs 3 --norms l2 --momentum {momentum}"
    rows = command(tmp_path, arguments)
    matrix = make_spd_matrix(100, random_state=0)
    vector = np.random.default_rng(0).normal(size=100)

    def loss(w):
        return w @ matrix @ w / 2 - vector @ w

    expected = []
    for is_normalized in (False, True):
        keras.utils.set_random_seed(0)
        model, *_ = tasks.TASKS["quadratic"].make("quadratic", (1,))
        w, velocity = model.get_weights()[0].astype("float64"), 0
        np.testing.assert_allclose([w.mean(), w.std()], [0, 1], atol=0.25)
        for _ in range(3):
            losses = []
            for _ in range(10):
                losses.append(loss(w))
                gradient = matrix @ w - vector
                if is_normalized:
                    gradient /= np.linalg.norm(gradient)
                velocity = momentum * velocity - 0.001 * gradient
                w = w + momentum * velocity - 0.001 * gradient
            expected.append((np.mean(losses), loss(w)))
    found = [(row["loss"], row["val_loss"]) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_each_stage_begins_with_a_new_optimizer(tmp_path):
    arguments = "quadratic --optimizers normalized_adam --learning-rates 0.01 --seeds 1"
    rows = command(tmp_path, f"{arguments} --schedule stages --epochs 6")
    keras.utils.set_random_seed(0)
    model, loss, _ = tasks.TASKS["quadratic"].make("quadratic", (1,))
    nothing = np.zeros((10, 1))
    expected = []
    for rate in (0.01, 0.001, 0.0001):
        model.compile(keras_normopt.NormalizedAdam(rate, norm="std"), loss)
        arguments = {"validation_data": (nothing, nothing), "verbose": 0}
        history = model.fit(nothing, nothing, 1, epochs=2, **arguments).history
        losses = zip(history["loss"], history["val_loss"], strict=True)
        expected += [(rate, *pair) for pair in losses]
    found = [(row["learning_rate"], row["loss"], row["val_loss"]) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_optimizers_of_a_seed_begin_alike_and_see_the_same(tmp_path, monkeypatch):
    losses = []

    class Spy(runs.Record):
        def on_train_begin(self, logs=None):
            losses.append([])

        def on_train_batch_end(self, batch, logs=None):
            losses[-1].append(float(logs["loss"]))

    def make(shape):
        layers = [keras.layers.Flatten(), keras.layers.Dropout(0.5)]
        layers.append(keras.layers.Dense(10, "softmax"))
        return keras.Sequential([keras.Input(shape), *layers])

    monkeypatch.setattr(runs, "Record", Spy)
    monkeypatch.setitem(tasks.TASKS["mlp"].networks, "mlp", make)
    # Without moving anywhere.
    arguments = "--learning-rates 1e-30 --schedule constant --epochs 2 --batch-size 50"
    arguments = f"mlp --fraction 0.1 {arguments} --optimizers"
    command(tmp_path, f"{arguments} sgd,normalized_adam --seeds 1")
    command(tmp_path, f"{arguments} sgd --seeds 2")
    sgd, adam, other_seed = losses
    assert len(sgd) == 6
    np.testing.assert_allclose(adam, sgd, rtol=1e-5)
    assert np.abs(np.subtract(sgd, other_seed)).min() > 1e-3


# Going on.


def test_going_on_after_kill_and_interrupt(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.csv"
    arguments = [*FOUR_RUNS.split(), "--out", str(tmp_path)]
    process = start(SCRIPTS / "kill_experiments.py", *arguments)
    finish(process, returncode=-signal.SIGKILL)
    (half,) = tmp_path.glob("*.part")  # That was its moment.
    assert half.stat().st_size > 0
    killed = results.read_text()
    assert len(read(tmp_path)) == 2

    class Interrupter(runs.Record):
        def on_epoch_end(self, epoch, logs):
            super().on_epoch_end(epoch, logs)
            if len(read(tmp_path)) == 4:
                signal.raise_signal(signal.SIGINT)

    # As from a shell, where none has set them to be ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    module = "keras_normopt.experiments"
    with monkeypatch.context() as patch:
        patch.setattr(runs, "Record", Interrupter)
        patch.setattr(sys, "argv", [module, *arguments])
        patch.delitem(sys.modules, f"{module}.__main__")
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(module, run_name="__main__")
    signal.signal(signal.SIGINT, handler)
    assert stopped.value.code == 130
    said = f"Interrupted with 2 of 4 runs in {results}. The same command goes on from"
    assert said in capsys.readouterr().err
    interrupted = results.read_text()
    assert interrupted.startswith(killed)
    assert len(read(tmp_path)) == 4
    assert (summary(tmp_path)["runs"], summary(tmp_path)["finished_runs"]) == (4, 2)
    assert (tmp_path / "best.png").read_bytes().startswith(PNG)

    rows = command(tmp_path, FOUR_RUNS)
    assert results.read_text().startswith(interrupted)
    expected = command(tmp_path / "at once", FOUR_RUNS)
    assert len(rows) == len(expected) == 8
    for row, wanted in zip(rows, expected, strict=True):
        for name in set(row) - {"seconds", "versions"}:
            value = wanted[name]
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-5, nan_ok=True)
            assert row[name] == value


def test_finished_runs_stay(tmp_path, pretended):
    command(tmp_path, FOUR_RUNS)
    before = (tmp_path / "results.csv").read_text()
    command(tmp_path, FOUR_RUNS)
    assert len(pretended) == 4
    assert (tmp_path / "results.csv").read_text() == before
    # Of this, two are there already.
    command(tmp_path, f"{FOUR_RUNS} --norms std,max --optimizers normalized_sgd")
    assert [run.norm for run, _ in pretended[4:]] == ["max", "max"]
    assert (tmp_path / "results.csv").read_text().startswith(before)
    assert summary(tmp_path)["runs"] == summary(tmp_path)["finished_runs"] == 4


def test_a_run_that_lacks_epochs_is_trained_again(tmp_path, pretended):
    command(tmp_path, FOUR_RUNS)
    before = (tmp_path / "results.csv").read_text()
    lines = before.splitlines(keepends=True)
    (tmp_path / "results.csv").write_text("".join(lines[:-1]))
    command(tmp_path, FOUR_RUNS)
    assert [run for run, _ in pretended[4:]] == [pretended[3][0]]
    assert (tmp_path / "results.csv").read_text() == before


def test_two_at_once(tmp_path, pretended, monkeypatch):
    pretend = runs.train

    def train(*arguments):
        monkeypatch.setattr(runs, "train", pretend)
        command(tmp_path, FOUR_RUNS)  # As another process would.
        return pretend(*arguments)

    monkeypatch.setattr(runs, "train", train)
    assert len(command(tmp_path, FOUR_RUNS)) == 8
    assert len(pretended) == 4 + 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("optimizer,loss\nsgd,0.5\n", "It has the columns optimizer, loss; expected"),
        ("", "is damaged"),
        (f"{COLUMNS}\n{'x,' * 21}x\n", "is damaged"),
    ],
)
def test_results_of_something_else(text, problem, tmp_path, pretended, capsys):
    (tmp_path / "results.csv").write_text(text)
    said = refused(capsys, f"{FOUR_RUNS} --out {tmp_path}")
    assert f"{tmp_path}/results.csv" in said
    assert problem in said
    assert said.endswith("Move it away, or choose another --out.")
    assert (tmp_path / "results.csv").read_text() == text
    assert not pretended


# Which runs.


def test_norms_and_scopes_are_for_optimizers_that_have_them(tmp_path, pretended):
    rows = command(
        tmp_path,
        "quadratic --optimizers sgd,normalized_sgd,sgd,clipped_adam:0.5 --norms l2,max "
        "--scopes unit,global,unit --learning-rates 0.1,0.2,0.10 --seeds 1 --epochs 1",
    )
    names = ("optimizer", "norm", "scope", "momentum", "initial_learning_rate")
    found = [tuple(row[name] for name in names) for row in rows]
    pairs = list(itertools.product(["l2", "max"], ["unit", "global"]))
    expected = [("sgd", "", "", 0.9, rate) for rate in (0.1, 0.2)]
    expected += [
        ("normalized_sgd", *pair, 0.9, rate) for pair in pairs for rate in (0.1, 0.2)
    ]
    expected += [("clipped_adam", *pair, "", 0.5) for pair in pairs]
    assert found == expected
    for run, _ in pretended:
        optimizer = runs.make_optimizer(run)
        classes = {
            "sgd": keras.optimizers.SGD,
            "clipped_adam": keras_normopt.ClippedAdam,
        }
        assert isinstance(
            optimizer, classes.get(run.optimizer, keras_normopt.NormalizedSGD)
        )
        config = optimizer.get_config()
        assert config["learning_rate"] == pytest.approx(run.initial_learning_rate)
        assert config.get("norm", "") == run.norm
        assert config.get("scope", "") == run.scope
        assert config.get("nesterov", False) == (run.optimizer != "clipped_adam")
        assert f"{config.get('momentum', '')}" == run.momentum


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "qudratic",
            "argument task: invalid choice: 'qudratic' (choose from ",
        ),
        ("mlp --dataset digit", "--dataset: invalid choice: 'digit' (choose from "),
        ("mlp --optimizers sdg", "Keras's, such as sgd or adam, and normalized_sgd,"),
        ("mlp --optimizers sdg", "clipped_rmsprop. Received: 'sdg'"),
        ("mlp --norms l3", "Unknown norm. Received: norm='l3'. Choose one of 'avg_l1'"),
        ("mlp --optimizers sgd --norms l3", "Unknown norm. Received: norm='l3'"),
        ("mlp --scopes all", "one of 'variable', 'unit', 'layer', 'global'. Received:"),
        ("rnn --networks gru", "are lstm_rows, lstm_pixels, plain_rows, plain_pixels."),
        ("rnn --networks gru,lstm_rows", "Received: gru"),
        ("mlp --optimizers ,", "--optimizers: must be one or more, not ','"),
        ("mlp --learning-rates ,", "--learning-rates: must be one or more, not ','"),
        ("mlp --learning-rates 0.1,0", "--learning-rates: must be above 0, not '0'"),
        ("mlp --learning-rates nan", "--learning-rates: must be above 0, not 'nan'"),
        ("mlp --optimizers sgd:-1", "--optimizers: must be above 0, not '-1'"),
        ("mlp --optimizers sgd:", "--optimizers: must be above 0, not ''"),
        ("mlp --epochs 0", "--epochs: must be a whole number of at least 1, not '0'"),
        ("mlp --seeds 1.5", "--seeds: must be a whole number of at least 1, not '1.5'"),
        ("mlp --batch-size -1", "a whole number of at least 1, not '-1'"),
        ("mlp --fraction 0", "--fraction: must be above 0, at most 1, not '0'"),
        ("mlp --fraction 2", "--fraction: must be above 0, at most 1, not '2'"),
        ("mlp --momentum 1", "--momentum: must be at least 0, below 1, not '1'"),
        ("cnn --epochs 3", "has 4 stages, so --epochs must be at least 4. Received: 3"),
        (
            "mlp --dataset mnist --data-dir HERE/file",
            "Looked for mnist.npz in HERE/file",
        ),
        ("mlp --out HERE/file", "File exists: 'HERE/file'"),
    ],
)
def test_errors_before_any_training(arguments, said, tmp_path, pretended, capsys):
    (tmp_path / "file").touch()
    arguments, said = (
        text.replace("HERE", str(tmp_path)) for text in (arguments, said)
    )
    assert said in refused(capsys, arguments)
    assert not pretended


# What is told of the results.


@pytest.fixture
def drawn(monkeypatch):
    """Collects the figures."""
    found = []
    monkeypatch.setattr(plt, "close", found.append)
    yield found
    monkeypatch.undo()
    plt.close("all")


def curves(figure):
    """The curves of each panel; those of the legend are empty."""
    found = ([line.get_ydata() for line in axes.get_lines()] for axes in figure.axes)
    return [[curve for curve in panel if len(curve)] for panel in found]


def test_means_and_ranges(tmp_path, drawn, pretended, capsys, monkeypatch):
    monkeypatch.setattr(figures, "draw", draw)
    arguments = "mlp --optimizers sgd,normalized_adam --learning-rates 0.1,0.2,0.3"
    rows = command(tmp_path, f"{arguments} --epochs 3")
    entries = summary(tmp_path)["last_epoch"]
    assert len(entries) == 6
    means = {}
    for entry in entries:
        key = entry["optimizer"], entry["initial_learning_rate"]
        of_key = [
            r for r in rows if (r["optimizer"], r["initial_learning_rate"]) == key
        ]
        assert [row["seed"] for row in of_key] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert entry["seeds"] == 3
        assert entry["seconds"] == pytest.approx(sum(r["seconds"] for r in of_key))
        for metric in METRICS:
            values = np.reshape([row[metric] for row in of_key], (3, 3))
            means[*key, metric] = np.mean(values, axis=0)
            last = values[:, -1]
            expected = {"mean": np.mean(last), "min": min(last), "max": max(last)}
            if key == ("sgd", 0.3) and metric.endswith("loss"):
                expected = dict.fromkeys(expected)
            assert entry[metric] == pytest.approx(expected)

    # Of each optimizer, the rate with the best mean validation accuracy.
    best = {
        name: max(rates, key=lambda rate: means[name, rate, "val_accuracy"][-1])
        for name, rates in [("sgd", [0.1, 0.2]), ("normalized_adam", [0.1, 0.2, 0.3])]
    }
    _, *lines = capsys.readouterr().out.splitlines()
    table, pictures = lines[:-4], lines[-4:]
    names = ["best", "by_rate", "by_optimizer", "rates"]
    assert pictures == [str(tmp_path / f"{name}.png") for name in names]
    for (name, rate), line in zip(best.items(), table, strict=True):
        words = line.replace("(max)", "").split()
        assert words[:4] == ["mlp", name, f"{rate:g}", "3"]
        numbers = [float(word.strip("[],")) for word in words[4:]]
        (entry,) = (
            e
            for e in entries
            if (e["optimizer"], e["initial_learning_rate"]) == (name, rate)
        )
        expected = [entry[m][part] for m in METRICS for part in ("mean", "min", "max")]
        np.testing.assert_allclose(numbers, expected, rtol=1e-3)
    for metric, panel in zip(METRICS, curves(drawn[0]), strict=True):
        for (name, rate), curve in zip(best.items(), panel, strict=True):
            np.testing.assert_allclose(curve, means[name, rate, metric])


@pytest.mark.parametrize(("others", "pictures"), [("", 1), (",normalized_sgd:0.1", 4)])
def test_divergence(others, pictures, tmp_path, drawn, capsys):
    arguments = f"quadratic --optimizers sgd:1000{others} --epochs 3 --seeds 1"
    rows = command(tmp_path, arguments)
    assert not any(math.isfinite(row["val_loss"]) for row in rows[:3])
    entry, *rest = summary(tmp_path)["last_epoch"]
    assert entry["val_loss"] == {"mean": None, "min": None, "max": None}
    assert all(math.isfinite(other["val_loss"]["mean"]) for other in rest)
    _, line, *lines = capsys.readouterr().out.splitlines()
    assert line.split() == ["quadratic", "sgd", "1000", "1", "diverged", "diverged"]
    assert len(lines) == len(rest) + pictures
    for path in lines[len(rest) :]:
        assert pathlib.Path(path).read_bytes().startswith(PNG)
    for panel in curves(drawn[0]):
        assert [len(curve) for curve in panel] == [3] * len(rest)


def test_figures_of_each_network(tmp_path, drawn, pretended, capsys, monkeypatch):
    monkeypatch.setattr(figures, "draw", draw)
    arguments = "rnn --quick --optimizers adam --networks lstm_rows,plain_pixels"
    command(tmp_path, arguments)
    networks = ["lstm_rows", "plain_pixels"]
    pictures = [str(tmp_path / f"{network}_best.png") for network in networks]
    assert capsys.readouterr().out.splitlines()[-2:] == pictures
    about = "digits (10% of the training images), batches of 64; one seed"
    titles = [figure.get_suptitle() for figure in drawn]
    assert titles == [f"{network}, {about}" for network in networks]
