"""Runs `python -m keras_normopt.experiments` and reads its files and its output."""

import csv
import json

import pytest

from keras_normopt.experiments.cli import main

RUN = (
    "task,dataset,fraction,network,backend,optimizer,norm,scope,momentum,schedule,"
    "initial_learning_rate,epochs,batch_size,seed,fingerprint,epoch"
)
# The columns between RUN and END are the metrics of the task.
END = "learning_rate,seconds,judged_by,versions"
PNG = b"\x89PNG\r\n\x1a\n"


def command(out, arguments):
    """Runs the command and returns the rows of results.csv, as texts and numbers."""
    assert main([*arguments.split(), "--out", str(out)]) == 0
    return read(out)


def read(out):
    header, *lines = (out / "results.csv").read_text().splitlines()
    assert header.startswith(f"{RUN},")
    assert header.endswith(f",{END}")
    rows = csv.DictReader(lines, header.split(","))
    return [{name: _value(text) for name, text in row.items()} for row in rows]


def _value(text):
    try:
        return float(text)
    except ValueError:
        return text


def refused(capsys, arguments):
    """Runs the command, which must fail, and returns its error message."""
    with pytest.raises(SystemExit) as error:
        main(arguments if isinstance(arguments, list) else arguments.split())
    assert error.value.code == 2
    return " ".join(capsys.readouterr().err.partition("error: ")[2].split())


def printed(capsys):
    """Returns the printed lines of the table, without its head, and the figures."""
    _, *lines = capsys.readouterr().out.splitlines()
    figures = [line for line in lines if line.endswith(".png")]
    return lines[: lines.index("")], figures


def summary(out):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (out / "summary.json").read_text()
    return json.loads(text, parse_constant=refuse)
