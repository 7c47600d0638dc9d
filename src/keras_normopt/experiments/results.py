"""results.csv and summary.json: written after each run, and read to go on."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform

import keras
import numpy as np
import pandas as pd

from keras_normopt.experiments.runs import METRICS, Run

RUN_COLUMNS = [field.name for field in dataclasses.fields(Run)]
COLUMNS = [*RUN_COLUMNS, "epoch", *METRICS, "learning_rate", "seconds", "versions"]
KINDS = {field.name: field.type for field in dataclasses.fields(Run)}
KINDS |= {"epoch": int} | dict.fromkeys((*METRICS, "learning_rate", "seconds"), float)
# Runs of one command that differ in the seed only are averaged.
SERIES = ["network", "optimizer", "norm", "scope", "initial_learning_rate"]


class ResultsError(ValueError):
    """A results.csv that this command did not write."""


class Results:
    """The finished runs of a directory: `rows` has a row for each run and epoch."""

    def __init__(self, directory):
        self.directory = directory
        self.path = directory / "results.csv"
        self.read()

    def read(self):
        self.rows = (
            self._read() if self.path.exists() else pd.DataFrame(columns=COLUMNS)
        )
        # Of a file that was cut off the last run is to be trained again.
        last = self.rows[self.rows["epoch"] == self.rows["epochs"]]
        self._finished = set(_keys(last))

    def _read(self):
        way_out = "Move it away, or choose another --out."
        try:
            columns = list(pd.read_csv(self.path, nrows=0).columns)
            if columns == COLUMNS:
                # Python's own `float` reads exactly what was written.
                return pd.read_csv(self.path, converters=KINDS, keep_default_na=False)
        except ValueError as error:  # No table, or words in place of numbers.
            raise ResultsError(f"{self.path} is damaged: {error}. {way_out}") from error
        raise ResultsError(
            f"{self.path} was not written by this version of the command. It has the "
            f"columns {', '.join(columns)}; expected {', '.join(COLUMNS)}. {way_out}"
        )

    def __contains__(self, run):
        return dataclasses.astuple(run) in self._finished

    def of(self, runs):
        """The rows of those of the runs that have finished."""
        wanted = {dataclasses.astuple(run) for run in runs} & self._finished
        return self.rows[[key in wanted for key in _keys(self.rows)]]

    def add(self, rows):
        """Adds the rows of a run that has finished, to the file as well."""
        self.read()  # Another process may have added to it, even the same run.
        new = pd.DataFrame(rows).assign(versions=_versions())[COLUMNS]
        (key,) = set(_keys(new))
        others = self.rows[[other != key for other in _keys(self.rows)]]
        both = new if others.empty else pd.concat([others, new], ignore_index=True)
        with replacing(self.path) as path:
            both.to_csv(path, index=False, na_rep="nan")
        self.read()

    def summarize(self, runs, arguments):
        """Writes summary.json, on those of the runs that have finished."""
        rows = self.of(runs)
        summary = {
            "arguments": arguments,
            "versions": sorted(rows["versions"].unique()),
            "runs": len(runs),
            "finished_runs": len(rows.drop_duplicates(RUN_COLUMNS)),
            "last_epoch": last_epoch(rows),
        }
        with replacing(self.directory / "summary.json") as path:
            text = json.dumps(summary, indent=2, allow_nan=False, default=str)
            path.write_text(text + "\n")


def _keys(rows):
    """What tells runs apart, for each of the rows."""
    return rows[RUN_COLUMNS].itertuples(index=False, name=None)


def metrics(rows):
    """The metrics that the task has; the last one is the one to judge by."""
    return [m for m in METRICS if m.endswith("loss") or rows[m].notna().any()]


def last_epoch(rows):
    """For each optimizer, norm, … and learning rate: mean and range over the seeds.

    What is not finite in one of the runs is `None`: no average hides a divergence.
    """
    entries = []
    last = rows[rows["epoch"] == rows["epochs"]]
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


def best(rows):
    """Of the entries of `last_epoch` those with the best learning rate.

    Judged by the mean validation accuracy, or loss where there is no accuracy.
    """
    chosen = {}
    for entry in last_epoch(rows):
        key = tuple(entry[column] for column in SERIES[:-1])
        if key not in chosen or _score(entry) > _score(chosen[key]):
            chosen[key] = entry
    return list(chosen.values())


def rows_at_best(rows):
    """The rows of the entries of `best`."""
    masks = [_mask(rows, entry) for entry in best(rows)]
    return rows[np.any(masks, axis=0)]


def _score(entry):
    # The accuracy stays a number where the loss is none any more.
    if entry["loss"]["mean"] is None or entry["val_loss"]["mean"] is None:
        return -math.inf
    if "val_accuracy" in entry:
        return entry["val_accuracy"]["mean"]
    return -entry["val_loss"]["mean"]


def _mask(rows, entry):
    return (rows[SERIES] == pd.Series(entry)[SERIES]).all(axis=1)


def table(rows):
    """The best of each optimizer and norm after the last epoch, as text."""
    lines = []
    for entry in best(rows):
        line = {
            "network": entry["network"],
            "optimizer": name_of(entry),
            "best rate": f"{entry['initial_learning_rate']:g}",
            "seeds": entry["seeds"],
        }
        line |= {metric: _range(entry[metric]) for metric in metrics(rows)}
        lines.append(line)
    return pd.DataFrame(lines).to_string(index=False)


def name_of(row):
    """How figures and tables name an optimizer: `normalized_sgd (l2)`."""
    details = [row["norm"]] if row["norm"] else []
    if row["scope"] not in ("", "variable"):
        details.append(f"per {row['scope']}")
    return row["optimizer"] + (f" ({', '.join(details)})" if details else "")


def _range(found):
    if found["mean"] is None:
        return "diverged"
    return "{mean:.4g} [{min:.4g}, {max:.4g}]".format(**found)


@contextlib.contextmanager
def replacing(path):
    """Gives a path to write to, and puts it in place of `path` when it is complete."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _versions():
    found = [f"python {platform.python_version()}"]
    backend = keras.backend.backend()
    # The build of TensorFlow without GPU support has a name of its own.
    for name in ("keras-normopt", "keras", backend, f"{backend}-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)
