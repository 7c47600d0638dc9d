"""The figures: the mean over the seeds as a line, their range as a band."""

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib import pyplot as plt

from keras_normopt.experiments import results

LABELS = {
    "loss": "training loss",
    "accuracy": "training accuracy",
    "val_loss": "validation loss",
    "val_accuracy": "validation accuracy",
}


def draw(rows, epoch, directory):
    """Draws the results of a command into PNG files, and returns their paths.

    `epoch` is the label of the horizontal axis.
    """
    mpl.use("Agg")
    sns.set_theme(style="whitegrid")
    paths = []
    for network, of_network in rows.groupby("network", sort=False):
        prefix = f"{network}_" if rows["network"].nunique() > 1 else ""
        for name, grid in _figures(of_network, epoch):
            grid.figure.suptitle(_about(of_network), y=1.02)
            paths.append(directory / f"{prefix}{name}.png")
            with results.replacing(paths[-1]) as path:
                grid.figure.savefig(path, dpi=80, format="png", bbox_inches="tight")
            plt.close(grid.figure)
    return paths


def _about(rows):
    first = rows.iloc[0]
    dataset = first["dataset"]
    if first["fraction"] < 1:
        dataset += f" ({first['fraction']:.0%} of the training images)"
    batches = f"batches of {first['batch_size']}" if dataset else ""
    parts = [first["network"], dataset, batches]
    seeds = rows["seed"].nunique()
    spread = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    return ", ".join(filter(None, parts)) + f"; {spread}"


def _figures(rows, epoch):
    metrics = results.metrics(rows)
    judged = metrics[-1]
    named = rows.rename(columns={"epoch": epoch}).assign(
        optimizer=[results.name_of(row) for _, row in rows.iterrows()],
        rate=[f"{rate:g}" for rate in rows["initial_learning_rate"]],
    )
    at_best = named.loc[results.rows_at_best(rows).index]
    at_best = at_best.assign(
        optimizer=at_best["optimizer"] + ", rate " + at_best["rate"]
    )
    ids = ["optimizer", "seed", epoch]
    long = at_best.melt(ids, metrics, var_name="metric")
    yield "best", _curves(long, epoch, "value", line="optimizer", panel="metric")
    if rows["initial_learning_rate"].nunique() > 1:
        for panel, line in (("rate", "optimizer"), ("optimizer", "rate")):
            yield f"by_{panel}", _curves(named, epoch, judged, line, panel)
        last = named[named[epoch] == named["epochs"]]
        yield "rates", _over_rates(last, judged)


def _curves(rows, epoch, metric, line, panel):
    grid = sns.relplot(
        kind="line",
        data=_without_divergence(rows, [line, panel, epoch], metric),
        x=epoch,
        y=metric,
        # Told apart by colour, dashes and markers, so that none of them is needed.
        hue=line,
        style=line,
        markers=True,
        markevery=max(1, rows[epoch].nunique() // 8),
        col=panel,
        col_wrap=min(3, rows[panel].nunique()) if metric != "value" else 2,
        errorbar=("pi", 100),
        height=3.2,
        aspect=1.3,
        facet_kws={"sharey": metric != "value"},
    )
    grid.set_titles("{col_name}" if panel != "rate" else "learning rate {col_name}")
    for key, axes in grid.axes_dict.items():
        shown = key if metric == "value" else metric
        axes.set_ylabel(LABELS[shown])
        if metric == "value":
            axes.set_title("")
        if shown.endswith("loss"):
            values = rows[metric][(metric != "value") | (rows[panel] == key)]
            first = values[rows[epoch] == rows[epoch].min()]
            # A loss that explodes leaves the panel; all began at about the same loss.
            low, high = values.min(), first.median()
            axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    return grid


def _over_rates(last, metric):
    grid = sns.relplot(
        kind="line",
        data=_without_divergence(last, ["optimizer", "rate"], metric),
        x="initial_learning_rate",
        y=metric,
        hue="optimizer",
        style="optimizer",
        markers=True,
        errorbar=("pi", 100),
        err_style="bars",
        height=4,
        aspect=1.5,
    )
    grid.set(xscale="log", xlabel="initial learning rate", ylabel=LABELS[metric])
    return grid


def _without_divergence(rows, columns, metric):
    """Leaves out a mean of which a part is not finite, rather than average the rest."""
    finite = np.isfinite(rows[metric]).groupby([rows[c] for c in columns])
    return rows[finite.transform("all")]
