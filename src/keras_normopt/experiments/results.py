"""Reads and writes results.csv and summary.json, the results of a directory."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import tempfile
from typing import Any

import keras
import numpy as np
import pandas as pd

from keras_normopt.experiments import objective
from keras_normopt.experiments.runs import Run

KINDS = {field.name: field.type for field in dataclasses.fields(Run)}
RUN_COLUMNS = list(KINDS)
KINDS |= {"epoch": int, "learning_rate": float, "seconds": float}
KINDS |= {"judged_by": str, "versions": str}
# Runs of one comparison that differ only in the seed are averaged.
SERIES = ["network", "batch_size", "optimizer", "norm", "scope", "momentum"]
SERIES.append("initial_learning_rate")


class ResultsError(ValueError):
    """Raised if results.csv is not of this version, damaged, or not writable."""


class Results:
    """The finished runs in a directory. `rows` has a row for each epoch of each run.

    Without a directory, the runs are only in memory.
    """

    def __init__(self, directory=None):
        self.directory = directory
        self.path = directory and directory / "results.csv"
        self.rows = pd.DataFrame(columns=list(KINDS))
        if directory:
            self._check_writable()
        self.read()

    def _check_writable(self):
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Permissions do not show this for mounted directories, or for root.
            tempfile.TemporaryFile(dir=self.directory).close()
        except OSError as error:
            raise ResultsError(
                f"Cannot write to the directory of results: {error}. Choose another "
                f"`out`. Received: {self.directory}"
            ) from error

    def read(self):
        if self.path and self.path.exists():
            self.rows = read(self.path)
        self._finished = set(_keys(self.rows))

    def __contains__(self, run):
        return dataclasses.astuple(run) in self._finished

    def of(self, runs):
        """Returns the rows of the runs that have finished."""
        wanted = {dataclasses.astuple(run) for run in runs} & self._finished
        return self.rows[[key in wanted for key in _keys(self.rows)]]

    def add(self, rows):
        """Adds the rows of a finished run, in memory and to the file."""
        self.read()  # Another process may have added runs, even the same run.
        new = pd.DataFrame(rows).assign(versions=_versions())
        (key,) = set(_keys(new))
        others = self.rows[[other != key for other in _keys(self.rows)]]
        both = new if others.empty else pd.concat([others, new], ignore_index=True)
        order = [*RUN_COLUMNS, "epoch", *metrics(both)]
        self.rows = both[[*order, *(c for c in KINDS if c not in order)]]
        if self.path:
            with replacing(self.path) as path:
                self.rows.to_csv(path, index=False, na_rep="nan")
        self.read()

    def summarize(self, runs, judge, arguments):
        """Writes summary.json about the runs that have finished."""
        rows = self.of(runs)
        summary = {
            "arguments": arguments,
            "judged_by": str(judge),
            "versions": sorted(rows["versions"].unique()),
            "runs": len(runs),
            "finished_runs": len(rows.drop_duplicates(RUN_COLUMNS)),
            "last_epoch": last_epoch(rows),
        }
        with replacing(self.directory / "summary.json") as path:
            text = json.dumps(summary, indent=2, allow_nan=False, default=str)
            path.write_text(text + "\n")


def read(path):
    """Reads the rows of a file.

    Raises:
        ResultsError: If it is damaged, or this version did not write it.
    """
    way_out = "Move it away, or choose another `out`."
    try:
        columns = list(pd.read_csv(path, nrows=0).columns)
        if set(KINDS) <= set(columns):
            # Python's own `float` reads exactly what was written.
            kinds = {column: KINDS.get(column, float) for column in columns}
            return pd.read_csv(path, converters=kinds, keep_default_na=False)
    except (ValueError, OSError) as error:  # No table, or text in place of numbers.
        raise ResultsError(f"{path} is damaged: {error}. {way_out}") from error
    raise ResultsError(
        f"{path} was not written by this version of the experiments. It has "
        f"the columns {', '.join(columns)}. Expected: {', '.join(KINDS)}. {way_out}"
    )


def _keys(rows):
    """Returns, for each row, the values that identify its run."""
    return rows[RUN_COLUMNS].itertuples(index=False, name=None)


def metrics(rows):
    """Returns the metrics of the rows. Their file may have metrics of other models."""
    judged = {text.partition(" ")[2] for text in rows["judged_by"].unique()}
    # If all runs diverged, these metrics have no number, but belong to the rows.
    always = judged | {"loss"} | {"val_loss" for m in judged if m.startswith("val_")}
    found = [m for m in rows if m not in KINDS]
    return [m for m in found if m in always or rows[m].notna().any()]


def groups(rows):
    """Yields pairs of a name and rows, for each network and batch size."""
    several = rows["batch_size"].nunique() > 1
    for network, network_rows in rows.groupby("network", sort=False):
        found = list(network_rows.groupby("batch_size", sort=False))
        if several:
            found.sort(key=lambda group: int(group[0]))
        for size, group_rows in found:
            name = f"{network}, batches of {size}" if several else network
            yield name, group_rows


def reported(rows, judge):
    """Returns the `Judge` for reports. It uses test data if the runs have them."""
    name = judge.monitor.replace("val_", "test_", 1)
    return objective.Judge(name, judge.mode) if name in metrics(rows) else judge


def shown(rows, judge):
    """Returns the metrics to show: the losses, and the metric to judge by."""
    trained = judge.monitor.removeprefix("val_")
    wanted = dict.fromkeys(["loss", trained, "val_loss", judge.monitor])
    return [metric for metric in wanted if metric in metrics(rows)]


def last_epoch(rows):
    """Returns a dictionary for each setting, with mean and range over the seeds.

    A setting is an optimizer with its options, a rate, a network and a batch size.
    Metrics that are not finite in one run are `None`, so no average hides a divergence.
    """
    entries = []
    # A callback may have stopped a run before the others.
    last = rows.groupby(RUN_COLUMNS, sort=False).tail(1)
    for key, runs in last.groupby(SERIES, sort=False):
        entry = dict(zip(SERIES, key, strict=True)) | {"seeds": len(runs)}
        for metric in metrics(rows):
            values = runs[metric]
            found = {"mean": values.mean(), "min": values.min(), "max": values.max()}
            finite = np.isfinite(values).all()
            entry[metric] = {k: float(v) if finite else None for k, v in found.items()}
        entry["seconds"] = float(rows.loc[_mask(rows, entry), "seconds"].sum())
        entries.append(entry)
    return entries


def best(rows, judge):
    """Returns the entries of `last_epoch` with the best learning rates."""
    chosen: dict[tuple[Any, ...], Any] = {}
    for entry in last_epoch(rows):
        key = tuple(entry[column] for column in SERIES[:-1])
        if key not in chosen or score(entry, judge) > score(chosen[key], judge):
            chosen[key] = entry
    return list(chosen.values())


def rows_at_best(rows, judge):
    """Returns the rows of the entries of `best`."""
    masks = [_mask(rows, entry) for entry in best(rows, judge)]
    return rows[np.any(masks, axis=0)]


def by_seed(rows, entry, metric):
    """Returns the last value of a metric for each seed of an entry, as a `Series`."""
    last = rows[_mask(rows, entry)].groupby("seed").tail(1)
    return last.set_index("seed")[metric]


def score(entry, judge):
    """Returns a number that is higher for a better entry, and -∞ for divergence."""
    if diverged(entry, judge):
        return -math.inf
    return judge.score(entry[judge.monitor]["mean"])


def diverged(entry, judge):
    """Returns whether a loss or the metric is not finite in some run."""
    # An accuracy is a number even if the loss is not.
    metrics = {"loss", "val_loss", judge.monitor} & set(entry)
    return any(entry[metric]["mean"] is None for metric in metrics)


def _mask(rows, entry):
    return (rows[SERIES] == pd.Series(entry)[SERIES]).all(axis=1)


def table(rows, judge):
    """Returns the best results of each optimizer and norm, as text."""
    lines = []
    wanted = dict.fromkeys([*shown(rows, judge), reported(rows, judge).monitor])
    for name, group_rows in groups(rows):
        for entry in best(group_rows, judge):
            line = {
                "network": name,
                "optimizer": name_of(entry),
                "best rate": f"{entry['initial_learning_rate']:g}",
                "seeds": entry["seeds"],
            }
            line |= {metric: range_of(entry, metric) for metric in wanted}
            lines.append(line)
    return pd.DataFrame(lines).to_string(index=False)


def name_of(row):
    """Returns an optimizer's name in figures and tables: `normalized_sgd (l2)`."""
    details = [row["norm"]] if row["norm"] else []
    if row["scope"] not in ("", "variable"):
        details.append(f"per {row['scope']}")
    name, options = row["optimizer"], ""
    if name.endswith(")"):
        name, _, options = name.removesuffix(")").partition("(")
    # `details` already has the scope.
    shown_options = [o for o in options.split(", ") if o and not o.startswith("scope=")]
    text = ", ".join([*shown_options, *details])
    return name.strip() + (f" ({text})" if text else "")


def range_of(entry, metric):
    """Returns the mean and range over the seeds: `0.93 (0.92 to 0.94)`."""
    if entry[metric]["mean"] is None:
        return "diverged"
    spread = " ({min:.4g} to {max:.4g})" if entry["seeds"] > 1 else ""
    return ("{mean:.4g}" + spread).format(**entry[metric])


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path. Moves the file there to `path` when it is complete."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _versions():
    found = [f"python {platform.python_version()}"]
    backend = keras.backend.backend()
    # TensorFlow without GPU support is another package.
    for name in ("keras-normopt", "keras", backend, f"{backend}-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)
