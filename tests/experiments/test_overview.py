"""Tests the map of all results, batch sizes, held-out data and options."""

import dataclasses
import re
import shlex

import keras
import numpy as np
import pandas as pd
import pytest

from helpers.command import PNG, command, printed, refused, summary
from helpers.pages import ROOT
from keras_normopt import directions, experiments, step_sizes
from keras_normopt.experiments import comparing, results, runs
from keras_normopt.experiments.cli import main
from keras_normopt.experiments.published import data, overview

pytestmark = pytest.mark.once

DEFAULTS = dict.fromkeys((field.name for field in dataclasses.fields(runs.Run)), "")
DEFAULTS |= {"task": "batches", "dataset": "digits", "fraction": 1.0, "network": "2x64"}
DEFAULTS |= {"batch_size": "32", "epochs": 2}


def write(directory, runs, mode="max val_accuracy", **changes):
    """Writes results. Each run is an optimizer, a rate, and the values of all seeds."""
    rows = []
    for optimizer, rate, values in runs:
        for seed, (validation, test) in enumerate(values):
            row = DEFAULTS | {"optimizer": optimizer, "seed": seed} | changes
            row["initial_learning_rate"] = rate
            kind = mode.rpartition("_")[2]
            for epoch in (1, 2):
                last = epoch == 2
                rows.append(
                    {name: row[name] for name in DEFAULTS}
                    | {"epoch": epoch, "loss": 1.0, "val_loss": 1.0}
                    | {f"val_{kind}": validation if last else 0.5}
                    | {f"test_{kind}": test if last else np.nan}
                    | {"learning_rate": rate, "seconds": 1.0}
                    | {"judged_by": mode, "versions": "0"}
                )
    directory.mkdir(exist_ok=True)
    path = directory / "results.csv"
    pd.DataFrame(rows).to_csv(path, index=False, na_rep="nan")
    return path


def seeds(*values):
    """Returns pairs of a validation value and a test value, which are equal."""
    return [(value, value) for value in values]


def test_ratios_compare_errors_with_the_smallest_error(tmp_path):
    write(
        tmp_path / "one",
        [
            ("adam", 0.1, seeds(0.9, 0.9, 0.9)),
            # Validation data choose the rate. Test data give the reported value.
            ("sgd", 0.1, [(0.9, 0.6), (0.9, 0.7), (0.9, 0.8)]),
            ("sgd", 0.01, [(0.8, 0.99)] * 3),
            ("sgd", 1.0, [(0.8, 0.99)] * 3),
            ("normalized_sgd(apply_to=update)", 0.1, seeds(0.7, 0.8, 0.9)),
            # This rate is better, but has one seed instead of three.
            ("normalized_sgd(apply_to=update)", 1.0, seeds(1.0)),
            ("lion", 0.1, seeds(0.2, 0.2, 0.2)),
            ("lion", 1.0, seeds(0.1, 0.1, 0.1)),
        ],
    )
    table = overview.read(tmp_path).set_index("method")
    assert set(table["task"]) == {"batches, digits, 2x64"}
    expected = {"adam": 0.1, "sgd": 0.3, "normalized_sgd (apply_to=update)": 0.2}
    expected["lion"] = 0.8
    assert table["value"].to_dict() == pytest.approx(expected)
    ratios = {method: value / 0.1 for method, value in expected.items()}
    assert table["ratio"].to_dict() == pytest.approx(ratios)
    # The errors of normalized SGD range from 0.1 to 0.3. The best error is 0.1.
    assert table["is_level"].tolist() == [True, False, True, False]
    assert table["is_at_end"].tolist() == [False, False, False, True]
    words = overview.markdown(table.reset_index()).splitlines()[-1]
    assert words == (
        "| 2 layers of 64, digits: batches of 32 | Adam: 0.1 | "
        "NormalizedSGD, of the update: 2 |  | SGD: 3; Lion: 8* |"
    )


def test_a_diverged_method_has_an_infinite_ratio(tmp_path):
    runs = [("sgd", 0.1, seeds(1.0, 1.0, 1.5)), ("adam", 0.1, seeds(3.0, 3.0, 3.0))]
    runs.append(("lion", 0.1, seeds(0.1, 0.1, np.nan)))
    write(tmp_path / "one", runs, mode="min val_loss")
    table = overview.read(tmp_path).set_index("method")
    found = table["ratio"].to_dict()
    assert found == pytest.approx({"sgd": 1, "adam": 3 / (3.5 / 3), "lion": np.inf})
    assert "Lion: ∞" in overview.markdown(table.reset_index())


def test_tasks_that_allow_no_ratio_are_left_out(tmp_path):
    some = [
        ("sgd", 0.1, seeds(-3.0, -2.0, -1.0)),
        ("adam", 0.1, seeds(-3.0, -2.0, -1.0)),
    ]
    write(tmp_path / "below_zero", some, mode="min val_loss")
    write(tmp_path / "too_few_seeds", [(n, r, v[:2]) for n, r, v in some])
    write(tmp_path / "one_optimizer", some[:1])
    kept = [("sgd", 0.1, seeds(0.1, 0.2, 0.3)), ("adam", 0.1, seeds(0.1, 0.2, 0.3))]
    write(tmp_path / "kept", kept, task="mlp", network="mlp", fraction=0.1)
    overview.write(tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["map-networks.png"]
    assert set(overview.read(tmp_path)["task"]) == {"mlp, digits (10%)"}


def test_the_command_map_writes_a_table_and_figures(tmp_path, capsys):
    for number, task in enumerate(("a", "b", "c")):
        values = seeds(0.1, 0.2, 0.3 + number / 10)
        methods = ["sgd", "adam", *["lion"] * (number == 2)]
        path = write(tmp_path / task, [(m, 0.1, values) for m in methods], task=task)
        if task == "b":  # This file holds results of two commands.
            rows = pd.read_csv(path, keep_default_na=False)
            both = pd.concat([rows.assign(batch_size=100), rows])
            both.to_csv(path, index=False, na_rep="nan")
    # Published results are compressed.
    pd.read_csv(path, keep_default_na=False).to_csv(path.with_suffix(".csv.gz"))
    path.unlink()
    assert main(["map", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "map-others.png").read_bytes().startswith(PNG)
    table = pd.read_csv(tmp_path / "map.csv")
    assert len(table) == 9
    lines = (tmp_path / "map.md").read_text().splitlines()
    tasks = [line.split(" |")[0] for line in lines]
    assert tasks[2:] == [
        "| a, 2 layers of 64, digits",
        "| b, 2 layers of 64, digits, batches of 32",
        "| b, 2 layers of 64, digits, batches of 100",
        "| c, 2 layers of 64, digits",
    ]
    assert [picture.parent.name for picture in tmp_path.glob("*/*.png")] == ["b"]
    assert (tmp_path / "b/batch_sizes.png").read_bytes().startswith(PNG)
    told = refused(capsys, f"map --out {tmp_path / 'a'}")
    assert f"directories with a results.csv in {tmp_path / 'a'}" in told


def test_each_group_of_tasks_has_a_figure_with_all_its_methods(tmp_path, monkeypatch):
    one, other = seeds(0.7, 0.8, 0.9), seeds(0.5, 0.6, 0.7)
    runs = [("adam", 0.1, one), ("sgd", 0.1, other)]
    for task, dataset, network in [
        ("spiked_labels", "digits", "2x64"),
        ("no_spikes", "digits", "2x64"),
        ("large_batches", "mnist", "2x64"),
        ("rnn", "digits", "plain_pixels"),
        ("cnn", "cifar10", "cnn"),
        ("transformer", "bible", "transformer"),
        ("plain_width", "digits", "64"),
    ]:
        changes = {"task": task, "dataset": dataset, "network": network}
        write(tmp_path / task, runs, **changes)
    # A method that was added later gets a row in the figure, even with one task only.
    write(
        tmp_path / "no_spikes",
        [*runs, ("orthogonal_sgd", 0.01, one)],
        task="no_spikes",
    )
    drawn = {}
    make_figure = overview._figure

    def spy(table):
        figure = make_figure(table)
        [axes], [title] = figure.axes, figure.texts
        labels = axes.get_yticklabels(), axes.get_xticklabels()
        drawn[title.get_text()] = tuple([t.get_text() for t in ts] for ts in labels)
        # Text outside the figure would be cut off.
        figure.canvas.draw()
        for text in [title, *labels[0], *labels[1]]:
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0, text
            assert box.x1 <= figure.bbox.x1, text
        return figure

    monkeypatch.setattr(overview, "_figure", spy)
    overview.write(tmp_path)
    two = ["SGD", "Adam"]
    recurrent = "Recurrent, convolutional or with batch normalization"
    assert drawn == {
        recurrent: (two, ["CNN, CIFAR-10", "RNN, digits"]),
        "Transformer of width 64, Bible: batches of": (two, ["32"]),
        "2 layers of 64, digits: spikes in": (
            ["SGD", "OrthogonalSGD", "Adam"],
            ["nothing", "labels"],
        ),
        "2 layers of 64, MNIST: batches of": (two, ["32"]),
        "12 layers, digits: width": (two, ["64"]),
    }
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == [
        "map-large_batches-mnist-2x64",
        "map-networks",
        "map-plain_width-digits",
        "map-spikes-digits-2x64",
        "map-transformer-bible",
    ]
    first, *_ = (tmp_path / "map.md").read_text().splitlines()[2:]
    assert first.startswith("| convolutional network, CIFAR-10 | Adam: 0.2 |")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sgd", "SGD"),
        ("rmsprop", "RMSprop"),
        ("normalized_sgd (apply_to=update)", "NormalizedSGD, of the update"),
        ("normalized_adam (per global)", "NormalizedAdam, one norm"),
        ("sgd (global_clipnorm=0.1)", "SGD, clipped at 0.1"),
        ("muon (exclude_layers=[classes])", "Muon"),
        ("clipped_adam (max_norm=RunningNorm())", "ClippedAdam, AdaGC"),
        (
            "clipped_sgd (max_norm=WeightNorm(0.01, minimum=0.001), per unit)",
            "ClippedSGD, AGC",
        ),
        ("normalized_sgd (step_size=weight_norm, per layer)", "LARS"),
        ("orthogonal_sgd (momentum=0.8)", "OrthogonalSGD, momentum=0.8"),
        ("mine (a=1)", "mine (a=1)"),
    ],
)
def test_methods_have_names_in_words(name, words):
    assert overview.method_name(name) == words


def test_each_batch_size_has_rows_and_all_sizes_share_one_figure(tmp_path, capsys):
    arguments = "batches --networks 2x64 --optimizers sgd,adam --learning-rates 0.01"
    arguments += " --fraction 0.1 --seeds 1 --epochs 1 --batch-size 30,12"
    rows = command(tmp_path, arguments)
    assert [row["batch_size"] for row in rows] == [30, 30, 12, 12]
    table, pictures = printed(capsys)
    names = ["2x64, batches of 12", "2x64, batches of 30"]
    assert [line.split(maxsplit=4)[3] for line in table] == ["12", "12", "30", "30"]
    assert [name for name in names for _ in range(2)] == [
        " ".join(line.split()[:4]) for line in table
    ]
    assert pictures == [str(tmp_path / "batch_sizes.png")]
    entries = summary(tmp_path)["last_epoch"]
    assert [entry["batch_size"] for entry in entries] == ["30", "30", "12", "12"]


@pytest.mark.parametrize(
    ("optimizer", "norm", "scope", "name"),
    [
        ("sgd", "", "", "sgd"),
        ("normalized_sgd", "l2", "variable", "normalized_sgd (l2)"),
        ("adam(beta_1=0.8)", "", "", "adam (beta_1=0.8)"),
        ("clipped_sgd(max_norm=f())", "l2", "", "clipped_sgd (max_norm=f(), l2)"),
        ("lion(a=2, scope=unit)", "l2", "unit", "lion (a=2, l2, per unit)"),
        ("with (a name) of mine", "", "", "with (a name) of mine"),
    ],
)
def test_names_show_options_norm_and_scope(optimizer, norm, scope, name):
    row = {"optimizer": optimizer, "norm": norm, "scope": scope}
    assert results.name_of(row) == name


def test_results_on_test_data_of_the_user_are_reported(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(20, 1))

    def make_model():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(loss="mse")
        return model

    def compare(test_data, out=None):
        return experiments.compare(
            make_model,
            x,
            y,
            validation_data=(x, y),
            test_data=test_data,
            optimizers=["sgd(momentum=0.5):0.1", "normalized_sgd(scope=global):0.1"],
            seeds=3,
            epochs=1,
            out=out,
        )

    far, same = compare((x, y + 100)), compare((x, y))
    assert far.rows["optimizer"].unique().tolist() == [
        "sgd(momentum=0.5)",
        "normalized_sgd(scope=global)",
    ]
    np.testing.assert_allclose(same.rows["test_loss"], same.rows["val_loss"], rtol=1e-5)
    np.testing.assert_allclose(far.rows["val_loss"], same.rows["val_loss"], rtol=1e-5)
    assert far.rows["test_loss"].min() > 5000
    assert "sequential, test_loss, lower is better: " in far.summary
    assert "test" not in compare(None).summary
    # Other test data make new runs.
    compare((x, y), tmp_path)
    assert len(compare((x, y + 100), tmp_path).results.rows) == 12


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("adam(0.1)", "each option must have a name"),
        ("adam(beta=", "with options as normalized_adam"),
        ("clipped_adam(max_norm=Running())", "Running is not one of GradientC"),
        ("adam(beta_1=-x)", "(-x is not a value)"),
        ("adam(beta_1={**x})", "with options as normalized_adam"),
        ("normalized_sgd(direction=sign, norm=l2)", "so `norm` must be None. Received"),
        ("adam(beta=0.8)", "The options of adam are wrong: "),
        ("normalized_adam(scope=all)", "The options of normalized_adam are wrong: "),
    ],
)
def test_errors_name_wrong_options_of_an_optimizer(text, problem, capsys):
    told = refused(capsys, ["batches", "--optimizers", text])
    assert problem in told


def test_options_reach_the_optimizer():
    texts = ["normalized_adam(apply_to=update, scope=global, beta_1=0.8):0.3"]
    texts += ["sgd(global_clipnorm=0.1)", "normalized_sgd(exclude=['bias', 'beta'])"]
    texts += ["clipped_sgd(max_norm=WeightNorm(0.02, minimum=0.5), scope=unit)"]
    parsed = comparing.parse(texts)
    assert [label for label, *_ in parsed] == [
        texts[0].removesuffix(":0.3"),
        *texts[1:],
    ]
    assert [rate for *_, rate in parsed] == [0.3, None, None, None]
    # Options of one optimizer override options of all optimizers.
    adam, plain, excluding, clipped = (
        runs.make_optimizer(identifier, 0.1, "max", "layer", 0.5)
        for _, identifier, _ in parsed
    )
    assert (adam.apply_to, adam.scope, adam.norm) == ("update", "global", "max")
    assert (adam.beta_1, float(adam.learning_rate)) == (0.8, pytest.approx(0.1))
    assert (plain.global_clipnorm, plain.momentum) == (0.1, 0.5)
    assert (excluding.exclude, excluding.scope) == (("bias", "beta"), "layer")
    assert clipped.max_norm.get_config() == {"coefficient": 0.02, "minimum": 0.5}
    assert clipped.scope == "unit"


def test_options_may_contain_objects_with_options():
    texts = ["muon(exclude_layers=[classes, 'a b'])"]
    texts += ["normalized_sgd(direction={'^a': Rows(over=inputs), '.*': orthogonal})"]
    texts += ["normalized_adam(step_size=[{'head/': 0.1}, WeightNorm()])"]
    muon, directed, stepping = (
        runs.make_optimizer(identifier, 0.1, "max")
        for _, identifier, _ in comparing.parse(texts)
    )
    assert muon.exclude_layers == ["classes", "a b"]
    assert isinstance(directed.direction["^a"], directions.Rows)
    assert directed.direction["^a"].over == "inputs"
    assert isinstance(directed.direction[".*"], directions.Orthogonal)
    # If a direction sets the length, an optimizer ignores the norm for all optimizers.
    assert (directed.norm, stepping.norm) == (None, "max")
    patterns, adaptive = stepping.step_size
    assert patterns == {"head/": 0.1}
    assert isinstance(adaptive, step_sizes.WeightNorm)


def shown_commands():
    """Yields the arguments of each command on the pages about results."""
    pages = [ROOT / f"docs/{page}.md" for page in ("results", "evidence", "which")]
    for page in [*pages, *sorted(ROOT.glob("docs/results/*.md"))]:
        text = page.read_text()
        for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S):
            for line in block.replace("\\\n", " ").splitlines():
                _, found, arguments = line.partition("-m keras_normopt.experiments ")
                if found:
                    yield shlex.split(arguments)


@pytest.mark.parametrize("arguments", list(shown_commands()), ids=" ".join)
def test_commands_of_the_pages_run_the_tasks_they_name(
    arguments, tmp_path, monkeypatch
):
    x, y = np.zeros((8, 30, 30, 3), "float32"), np.zeros(8, "int32")
    nothing = data.Data(*[x, y] * 3)
    planned, drawn = [], []
    monkeypatch.setattr(data, "load", lambda *arguments: nothing)
    monkeypatch.setattr(
        comparing.Comparison, "train", lambda self: planned.extend(self.plan)
    )
    monkeypatch.setattr(overview, "write", drawn.append)
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    if "map" in arguments:
        assert drawn == [tmp_path]
    else:
        assert {run.task for run in planned} == {arguments[0]}
