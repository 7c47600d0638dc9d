"""Shows how far each method is from the best one on each task."""

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm

from keras_normopt.experiments import figures, objective, results, summary

# A method has a column if at least this many tasks have it.
TASKS = 3
TWICE = 2.0


def read(directory):
    """Reads the results of all directories in one.

    Returns:
        DataFrame with a row for each task and method. `value` is the mean error or loss
        at the best learning rate, and `low` to `high` is its range. `ratio` compares it
        to the lowest value of the task. `is_level` says whether both ranges overlap.
        `is_at_end` says whether the best rate is the highest or lowest of several.

    Raises:
        ValueError: If there are no results.
    """
    return _compare(_rows(directory).values())


def _compare(all_rows):
    found = [_of_task(group) for rows in all_rows for group in _tasks(rows)]
    return pd.concat([table for table in found if table is not None])


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
            yield ", ".join(filter(None, parts)), of_group


def _complete(rows):
    """Drops rates with fewer seeds, which only helped to find the others."""
    seeds = rows.groupby(results.SERIES)["seed"].transform("nunique")
    most = seeds.groupby([rows["network"], rows["batch_size"]]).transform("max")
    return rows[seeds == most]


def _of_task(group):
    name, rows = group
    judge = _judge(rows)
    told = results.reported(rows, judge).monitor
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
            value = best[told]
        ends = {rates[0], rates[-1]} if len(rates) > 1 else ()
        lines.append(
            {"task": name, "method": method, "rate": best["initial_learning_rate"]}
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


def draw(table, path):
    """Draws the ratios as a heat map, in a PNG file."""
    counts = table.groupby("method")["task"].nunique()
    enough = min(TASKS, table["task"].nunique())
    shown = table[table["method"].map(counts) >= enough]
    order = {c: list(dict.fromkeys(shown[c])) for c in ("task", "method")}
    ratios = shown.pivot(index="task", columns="method", values="ratio")
    ratios = ratios.loc[order["task"], order["method"]]
    labels = shown.assign(label=[_cell(row) for _, row in shown.iterrows()])
    labels = labels.pivot(index="task", columns="method", values="label")
    labels = labels.loc[order["task"], order["method"]].fillna("")
    with mpl.rc_context():
        sns.set_theme(style="white", font_scale=figures.TEXT / 12)
        size = 3.2 + 0.5 * ratios.shape[1], 1.8 + 0.28 * ratios.shape[0]
        figure, axes = plt.subplots(figsize=size)
        # Colours do not distinguish ratios above 4.
        sns.heatmap(
            ratios.clip(upper=4.0),
            annot=labels,
            fmt="",
            norm=LogNorm(1, 4),
            cmap="crest",
            cbar=False,
            linewidths=1,
            ax=axes,
        )
        axes.set(xlabel="", ylabel="")
        axes.tick_params(axis="x", rotation=90)
        with results.replacing(path) as part:
            figure.savefig(part, dpi=figures.DPI, format="png", bbox_inches="tight")
        plt.close(figure)


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
    for task, of_task in table.groupby("task", sort=False):
        of_task = of_task.sort_values("ratio")
        first, others = of_task.iloc[0], of_task.iloc[1:]
        near = ~others["is_level"] & (others["ratio"] <= TWICE)
        far = ~others["is_level"] & (others["ratio"] > TWICE)
        mark = "*" if first["is_at_end"] else ""
        cells = [f"{first['method']} {first['value']:.3g}{mark}"]
        for chosen in (others["is_level"], near, far):
            cells.append(
                "; ".join(
                    f"{row['method']} {_cell(row).rstrip('≈')}"
                    for _, row in others[chosen].iterrows()
                )
            )
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(directory):
    """Writes `map.png`, `map.md` and `map.csv` beside the directories of results.

    This also draws the figure of all batch sizes in a directory, because each may come
    from another command.
    """
    found = _rows(directory)
    for path, rows in found.items():
        if rows["batch_size"].nunique() > 1:
            figures.draw(rows, _judge(rows), path.parent)
    table = _compare(found.values())
    draw(table, directory / "map.png")
    for name, text in (
        ("map.md", markdown(table)),
        ("map.csv", table.to_csv(index=False)),
    ):
        with results.replacing(directory / name) as part:
            part.write_text(text)
    return table
