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


def draw(rows, task, directory):
    """Draws the results of a command into PNG files, and returns their paths."""
    mpl.use("Agg")
    sns.set_theme(style="whitegrid")
    paths = []
    for network, of_network in rows.groupby("network", sort=False):
        prefix = f"{network}_" if rows["network"].nunique() > 1 else ""
        for name, grid in _figures(of_network, task):
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
    seeds = rows.groupby(results.SERIES)["seed"].nunique()
    number = " to ".join(map(str, sorted({seeds.min(), seeds.max()})))
    spread = f"mean and range of {number} seeds" if seeds.max() > 1 else "one seed"
    if not np.isfinite(rows[["loss", "val_loss"]]).all(axis=None):
        spread += "; no curve where a run diverged"
    return ", ".join(filter(None, parts)) + f"; {spread}"


def _figures(rows, task):
    metrics = results.metrics(rows)
    judged = metrics[-1]
    named = rows.rename(columns={"epoch": task.epoch}).assign(
        optimizer=[results.name_of(row) for _, row in rows.iterrows()],
        rate=[f"{rate:g}" for rate in rows["initial_learning_rate"]],
    )
    at_best = named.loc[results.rows_at_best(rows).index]
    at_best = at_best.assign(
        optimizer=at_best["optimizer"] + ", rate " + at_best["rate"]
    )
    ids = ["optimizer", "seed", task.epoch]
    long = at_best.melt(ids, metrics, var_name="metric")
    yield "best", _curves(long, task, "value", line="optimizer", panel="metric")
    if rows["initial_learning_rate"].nunique() > 1:
        for panel, line in (("rate", "optimizer"), ("optimizer", "rate")):
            yield f"by_{panel}", _curves(named, task, judged, line, panel)
        last = named[named[task.epoch] == named["epochs"]]
        yield "rates", _over_rates(last, task, judged)


def _curves(rows, task, metric, line, panel):
    rows = _without_divergence(rows, [line, panel, task.epoch], metric)
    grid = sns.relplot(
        kind="line",
        data=rows,
        x=task.epoch,
        y=metric,
        # Told apart by colour, dashes and markers, so that none of them is needed.
        hue=line,
        style=line,
        markers=True,
        markevery=max(1, rows[task.epoch].nunique() // 8),
        col=panel,
        col_wrap=min(3, rows[panel].nunique()) if metric != "value" else 2,
        errorbar=("pi", 100),
        height=3.2,
        aspect=1.3,
        facet_kws={"sharey": metric != "value"},
    )
    grid.set_titles("{col_name}" if panel != "rate" else "learning rate {col_name}")
    for key, axes in grid.axes_dict.items():
        shown, drawn = metric, rows[metric]
        if metric == "value":
            shown, drawn = key, drawn[rows["metric"] == key]
            axes.set_title("")
        axes.set_ylabel(LABELS[shown])
        axes.xaxis.get_major_locator().set_params(integer=True)
        _limit(axes, task, shown, drawn)
    grid.tight_layout()
    return grid


def _over_rates(last, task, metric):
    last = _without_divergence(last, ["optimizer", "rate"], metric)
    grid = sns.relplot(
        kind="line",
        data=last,
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
    _limit(grid.ax, task, metric, last[metric])
    return grid


def _without_divergence(rows, columns, metric):
    """Has no mean drawn of which a part is not finite, rather than average the rest."""
    finite = np.isfinite(rows[metric]).groupby([rows[c] for c in columns])
    # Infinity keeps its panel and its place in the legend.
    return rows.assign(**{metric: rows[metric].where(finite.transform("all"), np.inf)})


def _limit(axes, task, metric, values):
    """Lets a loss that explodes leave the panel, so that the others can be seen."""
    values = values[np.isfinite(values)]
    low, top = values.min(), 2 * task.loss_at_start
    if metric.endswith("loss") and low < top < values.max():
        axes.set_ylim(low - 0.05 * (top - low), top)
