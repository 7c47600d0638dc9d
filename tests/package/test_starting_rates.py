"""Tests that the starting rates on all pages agree with the runs."""

import collections
import csv
import gzip
import re

import pytest

from helpers.pages import ROOT

pytestmark = pytest.mark.once

CHANCE = {"starts": 0.1, "starts-breast_cancer": 0.63}
NETWORKS = ["2x32", "12x32", "12x128", "30x32"]
# One page shows all measurements, and the guide shows a few of them.
ALL = ("docs/results/starting_rates.md", "Digits")
SOME = ("docs/evidence.md", "Starting rates")


def table(page, heading, first):
    """Returns the rows of a table below a heading. `first` is its first head cell."""
    text = (ROOT / page).read_text().split(f"\n## {heading}\n")[1]
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    # A pipe within a formula is escaped.
    return [re.split(r"\s*(?<!\\)\|\s*", line)[1:-1] for line in lines[2:]]


@pytest.fixture(scope="module")
def worst():
    """Returns the worst test accuracy of three seeds for each configuration."""
    found = collections.defaultdict(list)
    for name in CHANCE:
        path = ROOT / "docs" / "results" / name / "results.csv.gz"
        with gzip.open(path, "rt") as file:
            for row in csv.DictReader(file):
                if row["momentum"] == "0.9" and row["epoch"] == row["epochs"]:
                    rate = float(row["initial_learning_rate"])
                    key = name, row["network"], row["norm"], rate
                    found[key].append(float(row["test_accuracy"]))
    assert {len(values) for values in found.values()} == {3}
    return {key: min(values) for key, values in found.items()}


def recommended():
    rows = table("README.md", "Norms and learning rates", "`norm`")
    assert len(rows) == 9
    for names, _, _, few, thirty in rows:
        yield re.findall(r'"(\w+)"', names)[0], few, thirty


def test_recommended_rates_work_with_every_seed(worst):
    def works(norm, rate, network):
        runs = {name: worst[name, network, norm, rate] for name in CHANCE}
        return all(accuracy > 1.1 * CHANCE[name] for name, accuracy in runs.items())

    for norm, few, thirty in recommended():
        assert works(norm, float(few), "2x32")
        assert works(norm, float(few), "12x32")
        if thirty != "none":
            assert works(norm, float(thirty), "30x32")
            continue
        tried = {r for _, net, name, r in worst if (net, name) == ("30x32", norm)}
        digits = [worst["starts", "30x32", norm, rate] for rate in tried]
        assert max(digits) < 1.01 * CHANCE["starts"]


@pytest.mark.parametrize("place", [ALL, SOME], ids=["all", "some"])
def test_the_table_of_measurements_equals_the_runs(place, worst):
    rows = table(*place, "norm")
    marked, norm = collections.defaultdict(dict), None
    for name, rate, *cells in rows:
        norm = name.strip("`") or norm
        mark, rate = re.fullmatch(r"(\**)(\.\d+)\**", rate).groups()
        marked[norm][mark] = rate
        for network, cell in zip(NETWORKS, cells, strict=True):
            found = worst.get(("starts", network, norm, float(rate)))
            expected = "" if found is None else f"{found:.2f}".removeprefix("0")
            assert cell == expected, (norm, rate, network)
    shown = {norm for norm, *_ in recommended()} if place == ALL else set(marked)
    assert shown >= {"l2", "max", "avg_l2"}
    for norm, few, thirty in recommended():
        if norm in shown:
            assert marked[norm]["**"] == few
            assert marked[norm].get("*", "none") == thirty
