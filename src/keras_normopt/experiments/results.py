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
# Runs of one command that differ in the seed only are averaged.
SERIES = ["network", "optimizer", "norm", "scope", "initial_learning_rate"]


class ResultsError(ValueError):
    """A results.csv that this command did not write."""


class Results:
    """The finished runs of a directory: `rows` has a row for each run and epoch."""

    def __init__(self, directory):
        self.directory = directory
        self.path = directory / "results.csv"
        self._read()

    def _read(self):
        if not self.path.exists():
            self.rows = pd.DataFrame(columns=COLUMNS)
            return
        header = pd.read_csv(self.path, nrows=0).columns
        if list(header) != COLUMNS:
            raise ResultsError(
                f"{self.path} was not written by this version of the command. It has "
                f"the columns {', '.join(header)}; expected {', '.join(COLUMNS)}. "
                "Move it away, or choose another --out."
            )
        self.rows = pd.read_csv(
            self.path,
            dtype={field.name: field.type for field in dataclasses.fields(Run)},
            keep_default_na=False,
            na_values={metric: ["nan"] for metric in METRICS},
            float_precision="round_trip",
        )

    def __contains__(self, run):
        return not self.of([run]).empty

    def of(self, runs):
        """The rows of those of the runs that have finished."""
        wanted = {dataclasses.astuple(run) for run in runs}
        keys = self.rows[RUN_COLUMNS].itertuples(index=False, name=None)
        return self.rows[[key in wanted for key in keys]]

    def add(self, rows):
        """Adds the rows of a run that has finished, to the file as well."""
        self._read()  # Another process may have added to it.
        new = pd.DataFrame(rows).assign(versions=_versions())[COLUMNS]
        self.rows = (
            new if self.rows.empty else pd.concat([self.rows, new], ignore_index=True)
        )
        with replacing(self.path) as path:
            self.rows.to_csv(path, index=False, na_rep="nan")

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
    metric, sign = ("val_accuracy", 1) if "val_accuracy" in entry else ("val_loss", -1)
    mean = entry[metric]["mean"]
    return -math.inf if mean is None else sign * mean


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
