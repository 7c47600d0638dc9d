"""Shows how far each method is from the best one on each task."""

import re
import textwrap
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm

from keras_normopt.experiments import figures, objective, results, summary
from keras_normopt.optimizers import ALIASES, NORMALIZED

TWICE = 2.0
# In inches, for text of 9 points that can be read if a phone shows the whole width.
WIDTH, LEFT, CELL, ROW, DPI = 4.2, 1.62, 0.62, 0.27, 220
POINTS = 9

_DATA = {"mnist": "MNIST", "cifar10": "CIFAR-10", "topics": "Python's help"}
_DATA |= {"bible": "Bible"}
# The name of each network in the table, and its short name above a column.
_NETWORKS = {
    "mlp": ("30 layers with batch normalization", "30 layers"),
    "cnn": ("convolutional network", "CNN"),
    "lstm_rows": ("LSTM over rows", "LSTM over rows"),
    "lstm_pixels": ("LSTM over pixels", "LSTM"),
    "plain_rows": ("plain recurrent network over rows", "RNN over rows"),
    "plain_pixels": ("plain recurrent network over pixels", "RNN"),
    "transformer": ("transformer of width 64", "transformer"),
}
_SPIKES = {
    "no_spikes": "nothing",
    "spiked_labels": "labels",
    "spiked_inputs": "inputs",
}
_SIZED = {
    "transformer_width": "transformer",
    "transformer_depth": "transformer",
    "plain_width": "12 layers",
    "plain_depth": "layers of 64",
    "cnn_width": "convolutional network",
}
# The figures in the order of the table, by the start of their names.
_ORDER = ("batches", "networks", "transformer", "spikes", "large_batches")
# The first rows of each figure. Other methods follow in the order of their runs.
_FIRST = ("sgd", "normalized_sgd", "orthogonal_sgd", "adam", "normalized_adam")
_METHODS = {
    "normalized_sgd (step_size=weight_norm, per layer)": "LARS",
    "normalized_adam (apply_to=update, step_size=weight_norm)": "LAMB",
    "lamb": "Lamb of Keras",
}
_OPTIONS = {
    "apply_to=update": "of the update",
    r"max_norm=RunningNorm\(\)": "AdaGC",
    r"max_norm=WeightNorm\([^)]*\), per unit": "AGC",
    "global_clipnorm=": "clipped at ",
    r"exclude_layers=\[[^]]*\]": "",
    "per global": "one norm",
}
_NAMES = {alias: cls.__name__ for alias, cls in ALIASES.items()}
_NAMES |= {
    alias.removeprefix("normalized_"): cls._made_from[0].__name__
    for alias, cls in NORMALIZED.items()
}


def read(directory):
    """Reads the results of all directories in `directory`.

    Returns:
        DataFrame with a row for each task and method. `name` is the task in words, and
        `figure` the name of its figure. `value` is the mean error or loss at the best
        learning rate, and `low` to `high` is its range. `ratio` compares it to the
        lowest value of the task. `is_level` says whether both ranges overlap.
        `is_at_end` says whether the best rate is the highest or lowest of several.

    Raises:
        ValueError: If there are no results.
    """
    return _compare(_rows(directory).values())


def _compare(all_rows):
    found = [_of_task(group) for rows in all_rows for group in _tasks(rows)]
    table = pd.concat([table for table in found if table is not None])

    def order(figures):
        starts = [figures.str.startswith(start) for start in _ORDER]
        return np.select(starts, range(len(_ORDER)), len(_ORDER))

    return table.sort_values("figure", key=order, kind="stable", ignore_index=True)


def _rows(directory):
    """Returns the rows of each file of results."""
    paths = sorted([*directory.glob("*/results.csv"), *directory.glob("*/*.csv.gz")])
    if not paths:
        raise ValueError(
            f"There must be directories with a results.csv in {directory}; choose "
            "another --out."
        )
    return {path: _complete(results.read(path)) for path in paths}


def _tasks(rows):
    for (task, dataset, fraction), of_task in rows.groupby(
        ["task", "dataset", "fraction"], sort=False
    ):
        share = "" if fraction == 1 else f" ({fraction:.0%})"
        for name, of_group in results.groups(of_task):
            parts = [task, f"{dataset}{share}", "" if name == task else name]
            network = str(of_group["network"].iloc[0])
            size = f"{int(of_group['batch_size'].iloc[0]):,}"
            place = _place(task, dataset, share, network, size, name != network)
            yield {"task": ", ".join(filter(None, parts))} | place, of_group


def _place(task, dataset, share, network, size, is_one_of_several):
    """Returns the name of a task, its figure, and its title and label in the figure.

    Args:
        task: Name of the task.
        dataset: Name of the data.
        share: The part of the data in words, or an empty string.
        network: Name of the network.
        size: The batch size.
        is_one_of_several: Whether the task has other batch sizes, too.
    """
    batches = f", batches of {size}" if is_one_of_several else ""
    plain = re.sub(r"(\d+)x(\d+)", r"\1 layers of \2", network)
    words, short = _NETWORKS.get(network, (plain, plain))
    data = f"{_DATA.get(dataset, dataset)}{share}"
    where = f"{words}, {data}"
    parts: tuple[str, ...]
    match task:
        case "batches" | "large_batches" | "transformer":
            parts, label = (task, dataset, share, network), size
            title = f"{where}: batches of"
        case "no_spikes" | "spiked_labels" | "spiked_inputs":
            parts, label = ("spikes", dataset, share, network), _SPIKES[task]
            title = f"{where}: spikes in"
        case "cnn" | "rnn" | "mlp":
            parts, label = ("networks",), f"{short}, {data}{batches}"
            title = "Recurrent, convolutional or with batch normalization"
        case _ if task in _SIZED:
            parts, label = (task, dataset, share), f"{network}{batches}"
            title = f"{_SIZED[task]}, {data}: {task.partition('_')[2]}"
        case _:
            parts, title = ("others",), "Other tasks"
            label = f"{task}, {where}{batches}" if task != network else where + batches
    kept = dict.fromkeys(re.sub(r"[^\w-]+", "", part) for part in parts)
    figure = "-".join(part for part in kept if part)
    is_own_name = figure in ("networks", "others")
    name = where + batches if figure == "networks" else label
    return {
        "name": name if is_own_name else f"{title} {label}",
        "figure": figure,
        "title": title[0].upper() + title[1:],
        "label": label,
    }


def method_name(method):
    """Returns a method in words: `NormalizedSGD, of the update`."""
    if method in _METHODS:
        return _METHODS[method]
    name, _, options = method.partition(" (")
    if name not in _NAMES:
        return method
    options = options.removesuffix(")")
    for pattern, text in _OPTIONS.items():
        options = re.sub(pattern, text, options)
    return ", ".join(filter(None, [_NAMES[name], options]))


def _complete(rows):
    """Drops rates with fewer seeds. They only helped to find the other rates."""
    seeds = rows.groupby(results.SERIES)["seed"].transform("nunique")
    most = seeds.groupby([rows["network"], rows["batch_size"]]).transform("max")
    return rows[seeds == most]


def _of_task(group):
    place, rows = group
    judge = _judge(rows)
    reported = results.reported(rows, judge).monitor
    entries = results.last_epoch(rows)
    most = max(entry["seeds"] for entry in entries)
    if most < summary.SEEDS:
        return None
    methods: dict[str, list[Any]] = {}
    for entry in entries:
        methods.setdefault(results.name_of(entry | {"norm": ""}), []).append(entry)
    if len({method.partition(" ")[0] for method in methods}) < 2:
        return None
    lines = []
    for method, tried in methods.items():
        best = max(tried, key=lambda entry: results.score(entry, judge))
        rates = sorted(entry["initial_learning_rate"] for entry in tried)
        value = dict.fromkeys(("mean", "min", "max"), np.inf)
        if not results.diverged(best, judge):
            value = best[reported]
        ends = {rates[0], rates[-1]} if len(rates) > 1 else ()
        lines.append(
            place
            | {"method": method, "rate": best["initial_learning_rate"]}
            | _as_error(value, judge.mode)
            | {"seeds": most, "is_at_end": best["initial_learning_rate"] in ends}
        )
    table = pd.DataFrame(lines)
    first = table.loc[table["value"].idxmin()]
    if first["value"] <= 0:  # A loss without a scale has no ratio.
        return None
    return table.assign(
        ratio=table["value"] / first["value"], is_level=table["low"] <= first["high"]
    )


def _judge(rows):
    mode, monitor = rows["judged_by"].iloc[-1].split(" ", 1)
    return objective.Judge(monitor, mode)


def _as_error(value, mode):
    """Returns a loss or error rate, which is lower if better, and its range."""
    if mode == "max":
        value = {
            "mean": 1 - value["mean"],
            "min": 1 - value["max"],
            "max": 1 - value["min"],
        }
    return {"value": value["mean"], "low": value["min"], "high": value["max"]}


def draw(table, directory):
    """Draws the ratios as heat maps, in a PNG file for each figure.

    A row is a method, and a column a task.

    Returns:
        List of the paths.
    """
    paths = []
    for name, of_figure in table.groupby("figure", sort=False):
        paths.append(directory / f"map-{name}.png")
        with mpl.rc_context():
            sns.set_theme(style="white", font="DejaVu Sans")
            plt.rcParams["font.size"] = POINTS
            figure = _figure(of_figure)
            with results.replacing(paths[-1]) as part:
                figure.savefig(part, dpi=DPI, format="png")
            plt.close(figure)
    return paths


def _figure(table):
    table = table.assign(text=[_cell(row) for _, row in table.iterrows()])
    tasks = table.drop_duplicates("task")
    labels, title = list(tasks["label"]), table["title"].iloc[0]
    methods = sorted(dict.fromkeys(table["method"]), key=_rank)
    ratios, texts = (
        table.pivot(index="method", columns="task", values=values)
        .loc[methods, list(tasks["task"])]
        .to_numpy()
        for values in ("ratio", "text")
    )
    names = [_broken(method_name(method)) for method in methods]
    # Everything in inches: the size of text must not depend on that of the map.
    longest = max(map(len, labels))
    is_slanted = longest > 8
    top = 0.35 + (0.06 * longest + 0.1 if is_slanted else 0.25)
    height = len(names) * (1.25 * ROW if any("\n" in n for n in names) else ROW)
    space = WIDTH - LEFT - (0.055 * len(labels[-1]) if is_slanted else 0.08)
    width, whole = min(CELL * len(labels), space), top + height + 0.08
    figure = plt.figure(figsize=(WIDTH, whole))
    axes = figure.add_axes(
        (LEFT / WIDTH, 0.08 / whole, width / WIDTH, height / whole), label="map"
    )
    # Colours do not distinguish ratios above 4.
    sns.heatmap(
        np.clip(ratios.astype("float64"), None, 4.0),
        annot=np.where(pd.isna(texts), "", texts),
        fmt="",
        annot_kws={"size": POINTS},
        norm=LogNorm(1, 4),
        cmap="crest",
        cbar=False,
        linewidths=1,
        xticklabels=labels,
        yticklabels=names,
        ax=axes,
    )
    axes.set(xlabel="", ylabel="")
    axes.tick_params(labelsize=POINTS, length=0, pad=2)
    axes.tick_params(axis="x", top=True, bottom=False, labeltop=True, labelbottom=False)
    axes.tick_params(axis="y", rotation=0)
    if is_slanted:
        plt.setp(
            axes.get_xticklabels(),
            rotation=45,
            ha="left",
            va="bottom",
            rotation_mode="anchor",
        )
    figure.text(0.02, 1 - 0.08 / whole, title, size=POINTS, weight="bold", va="top")
    return figure


def _rank(method):
    name = method.partition(" ")[0]
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def _broken(name, width=20):
    """Breaks a long name into two lines, after a comma if it has one."""
    if len(name) <= width:
        return name
    first, comma, rest = name.partition(", ")
    return f"{first},\n{rest}" if comma else textwrap.fill(name, width)


def _cell(row):
    text = "∞" if np.isinf(row["ratio"]) else f"{row['ratio']:.2g}"
    text += "*" if row["is_at_end"] else ""
    return text + ("≈" if row["is_level"] and row["ratio"] > 1 else "")


def markdown(table):
    """Returns a Markdown table of the best method and the others on each task."""
    lines = [
        "| task | best | level: ranges overlap | up to twice | worse |",
        "|---|---|---|---|---|",
    ]
    for _, of_task in table.groupby("task", sort=False):
        of_task = of_task.sort_values("ratio")
        first, others = of_task.iloc[0], of_task.iloc[1:]
        near = ~others["is_level"] & (others["ratio"] <= TWICE)
        far = ~others["is_level"] & (others["ratio"] > TWICE)
        mark = "*" if first["is_at_end"] else ""
        cells = [f"{method_name(first['method'])}: {first['value']:.3g}{mark}"]
        for chosen in (others["is_level"], near, far):
            cells.append(
                "; ".join(
                    f"{method_name(row['method'])}: {_cell(row).rstrip('≈')}"
                    for _, row in others[chosen].iterrows()
                )
            )
        lines.append(f"| {first['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(directory):
    """Writes `map-*.png`, `map.md` and `map.csv` beside the directories of results.

    This also draws the figure of all batch sizes in a directory, because each may come
    from another command.
    """
    found = _rows(directory)
    for path, rows in found.items():
        if rows["batch_size"].nunique() > 1:
            figures.draw(rows, _judge(rows), path.parent)
    table = _compare(found.values())
    draw(table, directory)
    for name, text in (
        ("map.md", markdown(table)),
        ("map.csv", table.drop(columns=["title", "label"]).to_csv(index=False)),
    ):
        with results.replacing(directory / name) as part:
            part.write_text(text)
    return table
