"""Tests the command `python -m keras_normopt.experiments`."""

import dataclasses
import itertools
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

from helpers.command import END, PNG, RUN, command, printed, read, refused, summary
from helpers.processes import SCRIPTS, finish, start
from keras_normopt.experiments import figures, runs
from keras_normopt.experiments.cli import main
from keras_normopt.experiments.figures import draw
from keras_normopt.experiments.published import networks

pytestmark = pytest.mark.once

METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")
TASKS = "quadratic, mlp, cnn, rnn, transformer, batches, spiked_labels, spiked_inputs, "
TASKS += "no_spikes, large_batches, starts, transformer_width, transformer_depth, "
TASKS += "plain_width, plain_depth, cnn_width"
# This command makes four runs of two epochs, on the cheapest task.
FOUR_RUNS = "quadratic --optimizers sgd,normalized_sgd --seeds 2 --epochs 2"
FOUR_RUNS += " --learning-rates 0.001"


@pytest.fixture
def fake_training(monkeypatch):
    """Replaces training by made-up results. Returns a list of runs and subjects."""
    calls = []

    def train(run, subject, *rest, **choice):
        calls.append((run, subject))
        rng = np.random.default_rng(zlib.crc32(repr(run).encode()))
        for epoch in range(1, run.epochs + 1):
            made_up = dict(zip(METRICS, rng.random(4).tolist(), strict=True))
            # This rate has the best accuracy, but one of its seeds diverges.
            if run.initial_learning_rate == 0.3:
                made_up["val_accuracy"] = 1.0
                if run.seed == 1 and (run.optimizer == "sgd" or epoch == 2):
                    made_up |= {"loss": math.nan, "val_loss": math.inf}
            row = {"epoch": epoch, "learning_rate": 0.1, "seconds": rng.random()}
            row["judged_by"] = "max val_accuracy"
            yield dataclasses.asdict(run) | made_up | row

    def fake_train(*arguments, **choice):
        return list(train(*arguments, **choice))

    monkeypatch.setattr(runs, "train", fake_train)
    monkeypatch.setattr(figures, "draw", lambda *arguments: [])
    return calls


# Whole runs.


@pytest.mark.parametrize(
    ("task", "network", "rates"),
    [
        ("quadratic", "quadratic", [0.001] * 3),
        ("mlp", "mlp", [0.01, 0.001, 0.0001]),
        ("cnn", "cnn", [0.01, 0.005, 0.001, 0.0001]),
        ("rnn", "lstm_rows", [0.01, 0.001, 0.0001]),
    ],
)
def test_each_task_writes_results_and_a_figure(
    task, network, rates, tmp_path, capsys, monkeypatch
):
    # All 30 layers take a minute to compile.
    monkeypatch.setattr(networks, "MLP_LAYERS", 1)
    arguments = f"{task} --quick --networks {network} --optimizers normalized_sgd"
    rows = command(tmp_path, f"{arguments} --fraction 0.05 --batch-size 75")
    assert [row["epoch"] for row in rows] == [*range(1, len(rates) + 1)]
    actual = [row["learning_rate"] for row in rows]
    np.testing.assert_allclose(actual, rates, rtol=1e-6)
    for row in rows:
        assert (row["network"], row["backend"]) == (network, keras.backend.backend())
        assert f"keras {keras.version()}, {row['backend']}" in row["versions"]
        assert row["seconds"] > 0
        assert math.isfinite(row["loss"])
        assert math.isfinite(row["val_loss"])
        # Training uses 75 of 1497 images, and validation uses all 300.
        if task == "quadratic":
            assert row["judged_by"] == "min val_loss"
            assert "val_accuracy" not in row
        else:
            assert row["judged_by"] == "max val_accuracy"
            right = np.array([75 * row["accuracy"], 300 * row["val_accuracy"]])
            np.testing.assert_allclose(right, right.round(), atol=1e-3)
    totals = summary(tmp_path)
    assert totals["runs"] == totals["finished_runs"] == 1
    assert totals["arguments"]["batch_size"] == [75]
    assert totals["versions"] == [rows[0]["versions"]]
    (line,), picture = printed(capsys)
    assert line.split()[:2] == [network, "normalized_sgd"]
    (picture,) = picture
    assert [pathlib.Path(picture)] == [*tmp_path.glob("*.png")]
    assert pathlib.Path(picture).read_bytes().startswith(PNG)


# Resuming.


def test_the_command_resumes_after_a_kill_and_an_interrupt(
    tmp_path, monkeypatch, capsys
):
    results = tmp_path / "results.csv"
    arguments = [*FOUR_RUNS.split(), "--out", str(tmp_path)]
    process = start(SCRIPTS / "kill_experiments.py", *arguments)
    finish(process, returncode=-signal.SIGKILL)
    (half,) = tmp_path.glob("*.part")  # The process died while it wrote this file.
    assert half.stat().st_size > 0
    killed = results.read_text()
    assert len(read(tmp_path)) == 2

    class Interrupter(runs.Record):
        def on_epoch_end(self, epoch, logs):
            super().on_epoch_end(epoch, logs)
            if len(read(tmp_path)) == 4:
                signal.raise_signal(signal.SIGINT)

    module = "keras_normopt.experiments"
    # In the background, a shell may make processes ignore this signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(runs, "Record", Interrupter)
            patch.setattr(sys, "argv", [module, *arguments])
            with pytest.raises(SystemExit) as stopped:
                runpy.run_module(module, run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert stopped.value.code == 130
    message = (
        f"Interrupted with 2 of 4 runs in {results}. To continue, run the same com"
    )
    assert message in capsys.readouterr().err
    interrupted = results.read_text()
    assert interrupted.startswith(killed)
    assert len(read(tmp_path)) == 4
    assert (summary(tmp_path)["runs"], summary(tmp_path)["finished_runs"]) == (4, 2)
    assert (tmp_path / "best.png").read_bytes().startswith(PNG)

    rows = command(tmp_path, FOUR_RUNS)
    assert results.read_text().startswith(interrupted)
    expected = command(tmp_path / "at once", FOUR_RUNS)
    assert len(rows) == len(expected) == 8
    for row, expected_row in zip(rows, expected, strict=True):
        for name in set(row) - {"seconds", "versions"}:
            value = expected_row[name]
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-5, nan_ok=True)
            assert row[name] == value


def test_finished_runs_are_not_trained_again(tmp_path, fake_training):
    command(tmp_path, FOUR_RUNS)
    before = (tmp_path / "results.csv").read_text()
    command(tmp_path, FOUR_RUNS)
    assert len(fake_training) == 4
    assert (tmp_path / "results.csv").read_text() == before
    # Two of these four runs are finished.
    command(tmp_path, f"{FOUR_RUNS} --norms std,max --optimizers normalized_sgd")
    assert [run.norm for run, _ in fake_training[4:]] == ["max", "max"]
    assert (tmp_path / "results.csv").read_text().startswith(before)
    assert summary(tmp_path)["runs"] == summary(tmp_path)["finished_runs"] == 4


def test_two_commands_at_once_share_their_results(tmp_path, fake_training, monkeypatch):
    fake_train = runs.train

    def train(*arguments, **choice):
        monkeypatch.setattr(runs, "train", fake_train)
        command(tmp_path, FOUR_RUNS)  # This replaces another process.
        return fake_train(*arguments, **choice)

    monkeypatch.setattr(runs, "train", train)
    assert len(command(tmp_path, FOUR_RUNS)) == 8
    assert len(fake_training) == 4 + 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("optimizer,loss\nsgd,0.5\n", "It has the columns optimizer, loss. Expected"),
        ("", "is damaged"),
        (f"{RUN},loss,{END}\n{'x,' * 20}x\n", "is damaged"),
    ],
)
def test_a_file_with_other_content_is_refused_and_kept(
    text, problem, tmp_path, fake_training, capsys
):
    (tmp_path / "results.csv").write_text(text)
    message = refused(capsys, f"{FOUR_RUNS} --out {tmp_path}")
    assert f"{tmp_path}/results.csv" in message
    assert problem in message
    assert message.endswith("Move it away, or choose another `out`.")
    assert (tmp_path / "results.csv").read_text() == text
    assert not fake_training


# The choice of runs.


@pytest.mark.parametrize(
    ("task", "settings", "norm"),
    [("mlp", ("stages", 30, 128), "max"), ("cnn", ("stages", 60, 128), "l2")],
)
def test_defaults_are_the_published_settings(
    task, settings, norm, fake_training, tmp_path
):
    command(tmp_path, f"{task} --seeds 1 --learning-rates 0.01")
    actual = [
        (run.schedule, run.epochs, int(run.batch_size)) for run, _ in fake_training
    ]
    assert actual == [settings] * 4
    actual = [(run.optimizer, run.norm, run.momentum) for run, _ in fake_training]
    sgd, adam = [("sgd", "", "0.9"), ("normalized_sgd", norm, "0.9")], ("adam", "", "")
    assert actual == [*sgd, adam, ("normalized_adam", norm, "")]
    sizes = [len(subject.fit_arguments["x"]) for _, subject in fake_training]
    assert sizes == [1497] * 4


def test_norms_and_scopes_apply_only_to_optimizers_that_have_them(
    tmp_path, fake_training, monkeypatch
):
    trained = []
    fake_train = runs.train

    def train(run, subject, optimizer, *rest, **choice):
        trained.append((run, optimizer))
        return fake_train(run, subject)

    monkeypatch.setattr(runs, "train", train)
    rows = command(
        tmp_path,
        "quadratic --optimizers sgd,normalized_sgd,sgd,clipped_adam:0.5 --norms l2,max "
        "--scopes unit,global,unit --learning-rates 0.1,0.2,0.10 --seeds 1 --epochs 1",
    )
    names = ("optimizer", "norm", "scope", "momentum", "initial_learning_rate")
    actual = [tuple(row[name] for name in names) for row in rows]
    pairs = list(itertools.product(["l2", "max"], ["unit", "global"]))
    expected = [("sgd", "", "", 0.9, rate) for rate in (0.1, 0.2)]
    expected += [
        ("normalized_sgd", *pair, 0.9, rate) for pair in pairs for rate in (0.1, 0.2)
    ]
    expected += [("clipped_adam", *pair, "", 0.5) for pair in pairs]
    assert actual == expected
    for run, optimizer in trained:
        assert isinstance(optimizer, type(keras.optimizers.get(run.optimizer)))
        config = optimizer.get_config()
        assert config["learning_rate"] == pytest.approx(run.initial_learning_rate)
        assert config.get("norm", "") == run.norm
        assert config.get("scope", "") == run.scope
        assert config.get("nesterov", False) == (run.optimizer != "clipped_adam")
        assert f"{config.get('momentum', '')}" == run.momentum


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("quadric", "argument task: invalid choice: 'quadric' (choose from "),
        ("--seeds 1", f"give either one of {TASKS}, or your own --task"),
        ("mlp --task a:b", f"give either one of {TASKS}, or your own --task"),
        ("mlp --dataset digit", "--dataset: invalid choice: 'digit' (choose from "),
        (
            "mlp --optimizers sdg",
            "one of Keras, such as sgd or adam, or one of normalized_sgd,",
        ),
        ("mlp --optimizers sdg", "clipped_rmsprop. Received: 'sdg'"),
        ("mlp --norms l3", "Unknown norm. Received: norm='l3'. Choose one of 'avg_l1'"),
        ("mlp --optimizers sgd --norms l3", "Unknown norm. Received: norm='l3'"),
        ("mlp --scopes all", "one of 'variable', 'unit', 'layer', 'global'. Received:"),
        ("rnn --networks gru", "are lstm_rows, lstm_pixels, plain_rows, plain_pixels."),
        ("rnn --networks gru,lstm_rows", "Received: gru"),
        ("mlp --optimizers ,", "--optimizers: must be one or more values, not ','"),
        (
            "mlp --learning-rates ,",
            "--learning-rates: must be one or more values, not ','",
        ),
        (
            "mlp --learning-rates 0.1,0",
            "--learning-rates: A learning rate must be a number above 0. Received: '0'",
        ),
        ("mlp --learning-rates nan", "must be a number above 0. Received: 'nan'"),
        ("mlp --optimizers sgd:-1", "must be a number above 0. Received: '-1'"),
        ("mlp --optimizers sgd:", "must be a number above 0. Received: ''"),
        ("mlp --epochs 0", "--epochs: must be a whole number of at least 1, not '0'"),
        ("mlp --seeds 1.5", "--seeds: must be a whole number of at least 1, not '1.5'"),
        ("mlp --batch-size -1", "a whole number of at least 1, not '-1'"),
        ("mlp --fraction 0", "--fraction: must be above 0 and at most 1, not '0'"),
        ("mlp --fraction 2", "--fraction: must be above 0 and at most 1, not '2'"),
        ("mlp --momentum 1", "--momentum: must be at least 0 and below 1, not '1'"),
        ("cnn --epochs 3", "has 4 stages, so --epochs must be at least 4. Received: 3"),
        (
            "mlp --dataset mnist --data-dir HERE",
            "Looked for mnist.npz in HERE: no such",
        ),
        ("mlp --out HERE/file", "File exists: 'HERE/file'"),
        ("mlp --out HERE/file/under", "Not a directory: 'HERE/file/under'"),
    ],
)
def test_wrong_arguments_cause_an_error_before_any_training(
    arguments, message, tmp_path, fake_training, capsys
):
    (tmp_path / "file").touch()
    output = refused(capsys, arguments.replace("HERE", str(tmp_path)))
    assert message.replace("HERE", str(tmp_path)) in output
    assert not fake_training


def test_help_shows_the_defaults_of_each_task(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    assert (
        "cnn --optimizers sgd,normalized_sgd,adam,normalized_adam --norms l2" in output
    )
    assert "--learning-rates 0.01,0.001 --epochs 60 --batch-size 128 --sch" in output
    assert "of rnn: lstm_rows, lstm_pixels, plain_rows, plain_pixels;" in output


# Summaries and figures.


@pytest.fixture
def drawn(monkeypatch):
    """Collects the figures."""
    closed = []
    monkeypatch.setattr(plt, "close", closed.append)
    yield closed
    monkeypatch.undo()
    plt.close("all")


def curves(figure):
    """Returns the curves of each panel, without the empty curves of the legend."""
    panels = ([line.get_ydata() for line in axes.get_lines()] for axes in figure.axes)
    return [[curve for curve in panel if len(curve)] for panel in panels]


def test_summary_table_and_curves_hold_means_and_ranges_over_seeds(
    tmp_path, drawn, fake_training, capsys, monkeypatch
):
    monkeypatch.setattr(figures, "draw", draw)
    arguments = "mlp --optimizers sgd,normalized_adam --learning-rates 0.1,0.2,0.3"
    rows = command(tmp_path, f"{arguments} --epochs 3")
    entries = summary(tmp_path)["last_epoch"]
    assert len(entries) == 6
    means, last = {}, {}
    for entry in entries:
        key = name, rate = entry["optimizer"], entry["initial_learning_rate"]
        name_rows = [row for row in rows if row["optimizer"] == name]
        key_rows = [row for row in name_rows if row["initial_learning_rate"] == rate]
        assert [row["seed"] for row in key_rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert entry["seeds"] == 3
        assert entry["seconds"] == pytest.approx(sum(r["seconds"] for r in key_rows))
        for metric in METRICS:
            values = np.reshape([row[metric] for row in key_rows], (3, 3))
            means[*key, metric] = np.mean(values, axis=0)
            statistics = [f(values[:, -1]) for f in (np.mean, np.min, np.max)]
            last.setdefault(key, []).extend(statistics)
            if key == ("sgd", 0.3) and metric.endswith("loss"):
                statistics = [None] * 3
            expected = dict(zip(["mean", "min", "max"], statistics, strict=True))
            assert entry[metric] == pytest.approx(expected)

    # The rates with the best mean validation accuracy and a finite last loss.
    sgd = max([0.1, 0.2], key=lambda rate: means["sgd", rate, "val_accuracy"][-1])
    best = {"sgd": sgd, "normalized_adam": 0.3}
    table, pictures = printed(capsys)
    names = ["best", "by_rate", "by_optimizer", "rates"]
    assert pictures == [str(tmp_path / f"{name}.png") for name in names]
    for (name, rate), line in zip(best.items(), table, strict=True):
        words = line.replace("(max)", "").split()
        assert words[:4] == ["mlp", name, f"{rate:g}", "3"]
        numbers = [float(word.strip("()")) for word in words[4:] if word != "to"]
        np.testing.assert_allclose(numbers, last[name, rate], rtol=1e-3)
    for metric, panel in zip(METRICS, curves(drawn[0]), strict=True):
        for (name, rate), curve in zip(best.items(), panel, strict=True):
            expected = means[name, rate, metric]
            np.testing.assert_allclose(curve, expected[np.isfinite(expected)])
    assert [len(curve) for curve in curves(drawn[0])[0]] == [3, 2]


@pytest.mark.parametrize(("more", "pictures"), [("", 1), (",normalized_sgd:0.1", 4)])
def test_a_diverged_run_is_named_and_drawn_as_diverged(
    more, pictures, tmp_path, drawn, capsys
):
    arguments = f"quadratic --optimizers sgd:1000{more} --epochs 3 --seeds 1"
    rows = command(tmp_path, arguments)
    assert not any(math.isfinite(row["val_loss"]) for row in rows[:3])
    entry, *rest = summary(tmp_path)["last_epoch"]
    assert entry["val_loss"] == {"mean": None, "min": None, "max": None}
    assert all(math.isfinite(other["val_loss"]["mean"]) for other in rest)
    (line, *lines), paths = printed(capsys)
    assert line.split() == ["quadratic", "sgd", "1000", "1", "diverged", "diverged"]
    assert (len(lines), len(paths)) == (len(rest), pictures)
    for path in paths:
        assert pathlib.Path(path).read_bytes().startswith(PNG)
    for panel in curves(drawn[0]):
        assert [len(curve) for curve in panel] == [3] * len(rest)
    title = drawn[0].get_suptitle().replace("\n", " ")
    assert title.endswith("; ▲: above the panel, or diverged")


def test_each_network_gets_a_figure(
    tmp_path, drawn, fake_training, capsys, monkeypatch
):
    monkeypatch.setattr(figures, "draw", draw)
    arguments = "rnn --quick --optimizers adam --networks lstm_rows,plain_pixels"
    command(tmp_path, arguments)
    networks = ["lstm_rows", "plain_pixels"]
    pictures = [str(tmp_path / f"{network}_best.png") for network in networks]
    assert printed(capsys)[1] == pictures
    about = "digits (10% of the training images), batches of 64; one seed"
    titles = [figure.get_suptitle() for figure in drawn]
    assert titles == [f"{network}, {about}" for network in networks]


def test_an_interrupted_command_draws_the_finished_runs(
    tmp_path, drawn, fake_training, monkeypatch
):
    train = runs.train

    def interrupted(*arguments, **choice):
        if len(fake_training) == 3:
            raise KeyboardInterrupt
        return train(*arguments, **choice)

    monkeypatch.setattr(figures, "draw", draw)
    monkeypatch.setattr(runs, "train", interrupted)
    arguments = "mlp --quick --optimizers adam,sgd --seeds 2 --out"
    assert main([*arguments.split(), str(tmp_path)]) == 130
    title = drawn[0].get_suptitle().replace("\n", " ")
    assert "; mean and range of 1 to 2 seeds" in title
