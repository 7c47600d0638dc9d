"""Tests that numbers which pages state are those of the stored results."""

import collections
import csv
import re

import pytest

from helpers.pages import ROOT

pytestmark = pytest.mark.once

OLDER = ("sgd", "normalized_sgd", "adam", "normalized_adam")


def read(page):
    """Returns the text of a page in one line."""
    return " ".join((ROOT / page).read_text().split())


@pytest.fixture(scope="module")
def all_tasks():
    """Returns, for each task of the map, a dictionary from methods to rows."""
    tasks = collections.defaultdict(dict)
    with open(ROOT / "docs/results/map.csv") as file:
        for row in csv.DictReader(file):
            tasks[row["task"]][row["method"]] = row
    return list(tasks.values())


def compare(one, other):
    """Returns whether one method is ahead of another: lower errors are better."""
    if float(one["low"]) > float(other["high"]):
        return "behind"
    return "ahead" if float(one["high"]) < float(other["low"]) else "level"


def test_pages_count_the_tasks_of_the_map(all_tasks):
    both = [m for m in all_tasks if {"orthogonal_sgd", "adam"} <= set(m)]
    results = collections.Counter(
        compare(methods["orthogonal_sgd"], methods["adam"]) for methods in both
    )
    ahead, level, behind = (results[name] for name in ("ahead", "level", "behind"))
    readme = f"ahead of Adam on {ahead}, level on {level}, and behind on {behind}."
    assert f"On {len(both)} small tasks with tuned rates it is {readme}" in read(
        "README.md"
    )
    counts = f"on {ahead} of {len(both)} tasks, level on {level}, and behind on"
    assert f"is ahead of Adam {counts} {behind}." in read("docs/which.md")


def test_the_page_counts_the_tasks_with_the_older_methods(all_tasks):
    older = [methods for methods in all_tasks if set(OLDER) <= set(methods)]
    level = {n: sum(m[n]["is_level"] == "True" for m in older) for n in OLDER}
    text = read("docs/which.md")
    adams = f"{level['adam']} and {level['normalized_adam']}"
    assert f"are level with the best on {adams} of {len(older)} tasks" in text
    sgd = f"best on {level['normalized_sgd']} of these {len(older)} tasks"
    assert f"{sgd}, SGD on {level['sgd']}." in text


def test_readme_and_the_evidence_agree_on_batches_of_one():
    rows = {
        cells[0].strip(): cells[1:]
        for line in (ROOT / "docs/evidence.md").read_text().splitlines()
        if line.startswith("|") and len(cells := line.strip("|").split("|")) == 5
    }
    base, normalized = (rows[name][2] for name in ("SGD", "normalized SGD"))
    found = re.search(r"an accuracy fell from (\.\d+) to (\.\d+)", read("README.md"))
    for stated, measured in zip(found.groups(), (base, normalized), strict=True):
        assert float(stated) == pytest.approx(float(measured.strip(" *")), abs=0.005)


def test_readme_and_the_page_on_costs_agree():
    [stated] = re.findall(r"(\d+ to \d+ %) of a step", read("README.md"))
    assert f"adds {stated} to a step" in read("docs/costs.md")
