"""Draws the mean over the seeds as a line, and their range as a band."""

import functools
import textwrap

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt

from keras_normopt.experiments import results, styles

# If a page shows figures at 700 pixels, their text is as large as the page's.
WIDTH, DPI, TEXT = 7.3, 130, 10
EXIT = "exit"


def draw(rows, judge, directory, epoch="epoch", size=None):
    """Draws a comparison into PNG files, and returns their paths."""
    paths = []
    for name, figure in figures(rows, judge, epoch, size):
        paths.append(directory / f"{name}.png")
        with results.replacing(paths[-1]) as path:
            figure.savefig(path, dpi=DPI, format="png", bbox_inches="tight")
        plt.close(figure)
    return paths


def figures(rows, judge, epoch="epoch", size=None):
    """Yields pairs of a name and a figure, one network after another.

    Several batch sizes, or several sizes of a network, share one figure.

    Args:
        rows: Rows of `Results`.
        judge: The `Judge` that chooses the best learning rates.
        epoch: The label of the axis of epochs.
        size: The word for the size, such as "width", if networks differ in size.
    """
    groups = list(results.groups(rows))
    drawings = [
        ("" if len(groups) == 1 else f"{_file_name(name)}_", group_rows, _grids)
        for name, group_rows in groups
    ]
    if rows["batch_size"].nunique() > 1:
        drawings = [("", rows, _over_batch_sizes)]
    if size:
        drawings = [("", rows, functools.partial(_over_sizes, size=size))]
    for prefix, drawn, grids in drawings:
        # This keeps the user's own settings.
        with mpl.rc_context():
            sns.set_theme(style="whitegrid", font_scale=TEXT / 12)
            for name, grid in grids(drawn, judge, epoch):
                caption = textwrap.fill(_caption(drawn, grid), 75)
                grid.figure.suptitle(caption, y=1, va="bottom", size=TEXT)
                yield prefix + name, grid.figure


def _caption(rows, grid):
    first = rows.iloc[0]
    dataset = first["dataset"]
    if first["fraction"] < 1:
        dataset += f" ({first['fraction']:.0%} of the training images)"
    one = {c: rows[c].nunique() == 1 for c in ("network", "batch_size")}
    batches = f"batches of {first['batch_size']}" if first["batch_size"] else ""
    parts = [one["network"] and first["network"], dataset]
    parts += [one["batch_size"] and batches]
    seeds = rows.groupby(results.SERIES)["seed"].nunique()
    number = " to ".join(map(str, sorted({seeds.min(), seeds.max()})))
    caption = f"mean and range of {number} seeds" if seeds.max() > 1 else "one seed"
    if any(text.get_gid() == EXIT for axes in grid.axes.flat for text in axes.texts):
        caption += "; ▲: above the panel, or diverged"
    return ", ".join(filter(None, parts)) + f"; {caption}"


def _grids(rows, judge, epoch):
    shown = results.shown(rows, judge)
    limits = {
        metric: _axis_limits(rows, metric)
        for metric in shown
        if metric.endswith("loss") or judge.mode == "min"
    }
    named = rows.rename(columns={"epoch": epoch}).assign(
        optimizer=[results.name_of(row) for _, row in rows.iterrows()],
        rate=[f"{rate:g}" for rate in rows["initial_learning_rate"]],
    )
    at_best = named.loc[results.rows_at_best(rows, judge).index]
    at_best = at_best.assign(
        optimizer=at_best["optimizer"] + ", rate " + at_best["rate"]
    )
    long = at_best.melt(["optimizer", "seed", epoch], shown, "metric")
    yield "best", _curves(long, epoch, "value", "optimizer", "metric", limits)
    if rows["initial_learning_rate"].nunique() > 1:
        metric = judge.monitor
        for panel, line in (("rate", "optimizer"), ("optimizer", "rate")):
            grid = _curves(named, epoch, metric, line, panel, limits)
            yield f"by_{panel}", grid
        reported = results.reported(rows, judge).monitor
        limits.setdefault(reported, limits.get(metric))
        yield "rates", _over_rates(_last_epochs(named), reported, limits)


def _last_epochs(rows):
    return rows.groupby(results.RUN_COLUMNS, sort=False).tail(1)


def _over_batch_sizes(rows, judge, epoch):
    """Yields one figure of the results at the best rates of each batch size."""
    metric = results.reported(rows, judge).monitor
    groups = [group_rows for _, group_rows in results.groups(rows)]
    chosen = [results.rows_at_best(group_rows, judge) for group_rows in groups]
    last = _last_epochs(pd.concat(chosen))
    last = last.assign(
        optimizer=[results.name_of(row) for _, row in last.iterrows()],
        batch_size=last["batch_size"].astype(int),
    )
    limits = _axis_limits(rows, judge.monitor) if judge.mode == "min" else None
    panel = "network"
    last = _without_divergence(last, [panel, "optimizer", "batch_size"], metric)
    line_styles = _line_styles(last["optimizer"], "optimizer")
    grid = sns.relplot(
        kind="line",
        data=last,
        x="batch_size",
        y=metric,
        col=panel,
        col_wrap=min(2, last[panel].nunique()),
        errorbar=("pi", 100),
        err_style="bars",
        facet_kws={"legend_out": False},
        **_panel_size(last[panel].nunique()),
        **line_styles,
    )
    sizes = sorted(last["batch_size"].unique())
    grid.set(xscale="log", xlabel="batch size", xticks=sizes, xticklabels=sizes)
    grid.set_titles("{col_name}")
    grid.set_ylabels(_label(metric))
    for key, axes in grid.axes_dict.items():
        axes.minorticks_off()
        _cut_off(axes, last[metric], limits)
        panel_rows = last[last[panel] == key]
        _mark_exits(
            axes, panel_rows, "batch_size", metric, "optimizer", line_styles["palette"]
        )
    yield "batch_sizes", _finish(grid, "optimizer")


def _over_sizes(rows, judge, epoch, size):
    """Yields one figure of all rates: a line per size, a panel per optimizer."""
    metric, last = results.reported(rows, judge).monitor, _last_epochs(rows)
    names = [results.name_of(row) for _, row in last.iterrows()]
    last = last.assign(**{"optimizer": names, size: last["network"]})
    limits = {metric: _axis_limits(rows, judge.monitor)} if judge.mode == "min" else {}
    grid = _over_rates(last, metric, limits, size, "optimizer", is_number=True)
    yield "sizes", grid


def _axis_limits(rows, metric):
    """Returns axis limits for a loss that may explode, from its median first value."""
    values = rows[metric][np.isfinite(rows[metric])]
    start = values[rows["epoch"] == 1].quantile(0.5, interpolation="lower")
    low = values.min()
    return low - 0.1 * (start - low), low + 2 * (start - low)


def _curves(rows, epoch, metric, line, panel, limits):
    rows = _without_divergence(rows, [line, panel, epoch], metric)
    line_styles = _line_styles(rows[line], line, is_number=line == "rate")
    grid = sns.relplot(
        kind="line",
        data=rows,
        x=epoch,
        y=metric,
        markevery=max(1, rows[epoch].nunique() // 8),
        col=panel,
        col_wrap=min(2, rows[panel].nunique()),
        errorbar=("pi", 100),
        facet_kws={"sharey": metric != "value", "legend_out": False},
        **_panel_size(rows[panel].nunique()),
        **line_styles,
    )
    grid.set_titles("{col_name}" if panel != "rate" else "learning rate {col_name}")
    for key, axes in grid.axes_dict.items():
        panel_rows = rows[rows[panel] == key]
        shown, drawn = metric, rows
        if metric == "value":
            shown, drawn = key, panel_rows
            axes.set_title("")
        axes.set_ylabel(_label(shown))
        axes.xaxis.get_major_locator().set_params(integer=True)
        _cut_off(axes, drawn[metric], limits.get(shown))
        _mark_exits(axes, panel_rows, epoch, metric, line, line_styles["palette"])
    return _finish(grid, line)


def _over_rates(last, metric, limits, line="optimizer", panel=None, is_number=False):
    """Draws a metric over the learning rate, with a line for each value of a column."""
    x = "initial_learning_rate"
    if panel is None:
        panel, last = "panel", last.assign(panel="")
    last = _without_divergence(last, [line, panel, x], metric)
    line_styles = _line_styles(last[line], line, is_number)
    panels = last[panel].nunique()
    grid = sns.relplot(
        kind="line",
        data=last,
        x=x,
        y=metric,
        col=panel,
        col_wrap=min(2, panels),
        errorbar=("pi", 100),
        err_style="bars",
        facet_kws={"legend_out": False},
        **_panel_size(panels),
        **line_styles,
    )
    # This leaves room for the rates that diverged.
    ends, rates = (last[x].min() / 1.3, last[x].max() * 1.3), sorted(last[x].unique())
    grid.set(xscale="log", xlim=ends, xlabel="initial learning rate")
    grid.set(xticks=rates, xticklabels=[f"{rate:g}".lstrip("0") for rate in rates])
    grid.set_titles("{col_name}")
    grid.set_ylabels(_label(metric))
    for key, axes in grid.axes_dict.items():
        axes.minorticks_off()
        _cut_off(axes, last[metric], limits.get(metric))
        panel_rows = last[last[panel] == key]
        _mark_exits(axes, panel_rows, x, metric, line, line_styles["palette"])
    return _finish(grid, line, title=line if is_number else None)


def _line_styles(labels, line, is_number=False):
    """Returns colours, dashes and markers. Lines differ even without colours."""
    labels = list(dict.fromkeys(labels))
    if is_number:  # A palette for numbers, without the colours of optimizers.
        labels.sort(key=float)
        palette = dict(
            zip(labels, sns.color_palette("crest", len(labels)), strict=True)
        )
        return {"hue": line, "style": line, "palette": palette, "markers": True}
    by_label = styles.of(labels)
    return {
        "hue": line,
        "style": line,
        "palette": {label: style["color"] for label, style in by_label.items()},
        "dashes": {label: style["dashes"] for label, style in by_label.items()},
        "markers": {label: style["marker"] for label, style in by_label.items()},
    }


def _panel_size(panels):
    height = 3.6 if panels == 1 else 2.7
    width = WIDTH / (1.2 if panels == 1 else 2)
    return {"height": height, "aspect": width / height}


def _finish(grid, line, title=None):
    """Puts the legend below, where it takes no width."""
    grid.tight_layout()
    title = "learning rate" if line == "rate" else title
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncol": 2}
    sns.move_legend(grid, title=title, frameon=False, **place)
    return grid


def _label(metric):
    part, _, name = metric.partition("_")
    known = {"val": "validation", "test": "test"}
    text = f"{known[part]} {name}" if part in known else f"training {metric}"
    return text.replace("_", " ")


def _file_name(name):
    return name.replace(", ", "_").replace(" ", "_")


def _without_divergence(rows, columns, metric):
    """Sets a metric to infinity if one seed diverges, so that no mean hides this."""
    finite = np.isfinite(rows[metric]).groupby([rows[c] for c in columns])
    # With infinity, a line keeps its panel and its place in the legend.
    return rows.assign(**{metric: rows[metric].where(finite.transform("all"), np.inf)})


def _cut_off(axes, values, limits):
    """Cuts off a loss that explodes, so that the others can be seen."""
    values = values[np.isfinite(values)]
    if limits and values.min() < limits[1] < values.max():
        axes.set_ylim(*limits)


def _mark_exits(axes, rows, x, metric, line, palette):
    """Marks where a curve leaves its panel or diverges."""
    top = axes.get_ylim()[1]
    means = rows.groupby([line, x])[metric].mean()
    exits = means[means > top].reset_index().groupby(line, sort=False)[x].min()
    for label, where in exits.items():
        # Side by side, if several leave at once.
        beside = 9 * (exits[:label] == where).sum() - 9
        axes.annotate(
            "▲",
            (where, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(beside, 0),
            textcoords="offset points",
            color=palette[label],
            ha="center",
            va="center",
            gid=EXIT,
        )
