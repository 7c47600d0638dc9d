"""Tests that numbers which pages state are those of the stored results."""

import csv
import re

import pytest

from helpers.pages import ROOT

pytestmark = pytest.mark.once

PAIRS = ("sgd", "normalized_sgd", "adam", "normalized_adam")


def read(page):
    """Returns the text of a page in one line."""
    return " ".join((ROOT / page).read_text().split())


@pytest.fixture(scope="module")
def tasks():
    """Returns the tasks that have all four methods.

    Each task maps a method to two truth values. The first says whether the method is
    level with the best method. The second says whether its error is near the best.
    """
    found = {}
    with open(ROOT / "docs/results/map.csv") as file:
        for row in csv.DictReader(file):
            is_level = row["is_level"] == "True"
            near = is_level or float(row["ratio"]) <= 1.5
            found.setdefault(row["task"], {})[row["method"]] = is_level, near
    return [methods for methods in found.values() if set(PAIRS) <= set(methods)]


def count(tasks, method, place):
    return sum(methods[method][place] for methods in tasks)


def test_readme_and_the_map_agree_on_adam(tasks):
    level = count(tasks, "adam", 0)
    assert f"on {level} of {len(tasks)} tasks, Adam is level with" in read("README.md")


def test_the_page_on_choosing_and_the_map_agree_on_counts(tasks):
    text = read("docs/which.md")
    assert f"{len(tasks)} tasks have SGD, Adam and both normalized" in text
    level, near = (count(tasks, "adam", place) for place in (0, 1))
    assert f"Adam is level with the best on {level}, and" in text
    assert f"within 1.5 times its error on {near}. So is normalized" in text
    level, near = (count(tasks, "normalized_adam", place) for place in (0, 1))
    assert f"normalized Adam on {level} and {near}." in text
    sgd, normalized = (count(tasks, name, 0) for name in PAIRS[:2])
    assert f"best on {normalized} of these tasks, SGD on {sgd}." in text


def test_readme_and_the_evidence_agree_on_batches_of_one():
    rows = {
        cells[0].strip(): cells[1:]
        for line in (ROOT / "docs/evidence.md").read_text().splitlines()
        if line.startswith("|") and len(cells := line.strip("|").split("|")) == 5
    }
    base, normalized = (rows[name][2] for name in ("SGD", "normalized SGD"))
    found = re.search(r"lowered an accuracy from (\.\d+) to (\.\d+)", read("README.md"))
    for stated, measured in zip(found.groups(), (base, normalized), strict=True):
        assert float(stated) == pytest.approx(float(measured.strip(" *")), abs=0.005)


def test_readme_and_the_page_on_costs_agree():
    [stated] = re.findall(r"(\d+ to \d+ %) of a step", read("README.md"))
    assert f"adds {stated} to a step" in read("docs/costs.md")
