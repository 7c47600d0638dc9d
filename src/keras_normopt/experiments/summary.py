"""Puts the results of a comparison into sentences."""

import itertools
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from keras_normopt.experiments import results

SEEDS = 3  # With fewer, a range says nothing.
PAIRED = 5  # With fewer, a confidence interval is too wide to help.
RATE = "initial_learning_rate"


def sentences(rows, judge, size=None):
    """Yields sentences: the ranking of each group and its caveats.

    Args:
        rows: Rows of `Results`.
        judge: A `Judge`.
        size: The word for the size, such as "width", if networks differ in size.
    """
    for network, group_rows in results.groups(rows):
        name = f"{size} {network}" if size else network
        entries = results.last_epoch(group_rows)
        best = results.best(group_rows, judge)
        trained = [entry for entry in best if not results.diverged(entry, judge)]
        reported = results.reported(group_rows, judge)
        trained.sort(key=lambda entry: results.score(entry, reported), reverse=True)
        yield _values(name, trained, reported) + _ranking(trained, reported)
        yield from _pairs(trained, reported)
        yield from _intervals(trained, group_rows, reported)
        yield from _rates_at_ends(trained, entries)
        yield from _divergences(entries, judge)
    others = [
        name for name in results.metrics(rows) if _is_alternative(name, judge.monitor)
    ]
    if others:
        yield f"Judge by another metric with `monitor`: {', '.join(others)}."
    if not any(name.startswith("val_") for name in results.metrics(rows)):
        yield (
            "There were no validation data, so these are results on the training data. "
            "Pass `validation_data` to compare on other data."
        )


def _is_alternative(name, monitor):
    """Returns whether the user may judge by this metric instead of `monitor`."""
    is_alike = name.startswith("val_") == monitor.startswith("val_")
    return is_alike and name != monitor and not name.endswith("loss")


def _values(name, trained, judge):
    better = "higher" if judge.mode == "max" else "lower"
    values = "; ".join(
        f"{_at(entry)}: {results.range_of(entry, judge.monitor)}" for entry in trained
    )
    return f"{name}, {judge.monitor}, {better} is better: {values or 'no results'}"


def _at(entry):
    return f"{results.name_of(entry)} at {entry[RATE]:g}"


def _ranking(trained, judge):
    if not trained:
        return ", because all diverged. Try lower learning rates."
    seeds = min(entry["seeds"] for entry in trained)
    if seeds < SEEDS:
        number = "one seed is" if seeds == 1 else f"{seeds} seeds are"
        return f". No ranking: {number} too few. Use {SEEDS} or more."
    if len(trained) == 1:
        return "."
    first, *others = trained
    overlapping = [entry for entry in others if _overlap(first, entry, judge)]
    behind = [entry for entry in others if entry not in overlapping]
    if not behind:
        return ". No ranking: their ranges overlap."
    ahead = f". {_ahead(first, behind)}"
    if overlapping:
        ahead += f" {_unranked(first, overlapping)}"
    return ahead


def _pairs(trained, judge):
    """Yields comparisons of optimizers with their normalized or clipped classes."""
    if not trained or min(entry["seeds"] for entry in trained) < SEEDS:
        return
    # `_ranking` covers the first entry. In each pair, the better optimizer comes first.
    for one, other in itertools.combinations(trained[1:], 2):
        has_same_base = _base_name(one) == _base_name(other)
        if one["optimizer"] == other["optimizer"] or not has_same_base:
            continue
        if _overlap(one, other, judge):
            yield _unranked(one, [other])
        else:
            yield _ahead(one, [other])


def _intervals(trained, rows, judge):
    """Yields the differences of the best optimizer to the others, over common seeds.

    A seed gives all optimizers the same initial weights and batches. So the differences
    between two optimizers vary less than their results.
    """
    if not trained:
        return
    first, *others = trained
    best = results.by_seed(rows, first, judge.monitor)
    for other in others:
        values = results.by_seed(rows, other, judge.monitor)
        pairs = pd.concat([best, values], axis=1, join="inner").to_numpy()
        if len(pairs) < PAIRED:
            continue
        low, high = stats.ttest_rel(*pairs.T).confidence_interval(0.95)
        yield (
            f"{_names([first])} minus {_names([other])}: "
            f"{np.subtract(*pairs.T).mean():.3g}, with a 95 % confidence interval from "
            f"{low:.3g} to {high:.3g} (paired t-test over {len(pairs)} seeds)."
        )


def _base_name(entry):
    name = entry["optimizer"].partition("(")[0]
    return name.removeprefix("normalized_").removeprefix("clipped_")


def _ahead(first, others):
    return f"{_names([first])} is ahead of {_names(others)}: ranges do not overlap."


def _unranked(first, others):
    names = f"{_names([first])} against {_names(others)}"
    return f"No ranking of {names}: their ranges overlap."


def _overlap(one, other, judge):
    one, other = one[judge.monitor], other[judge.monitor]
    return one["min"] <= other["max"] and other["min"] <= one["max"]


def _names(entries):
    return ", ".join(results.name_of(entry) for entry in entries)


def _rates_at_ends(trained, entries):
    """Yields which optimizers may be better at rates that were not tried."""
    rates = _rates_of(entries)
    alone = [entry for entry in trained if len(rates[_names([entry])]) == 1]
    others = [entry for entry in trained if entry not in alone]
    for end, better, choose in (
        ("highest", "higher", max),
        ("lowest", "lower", min),
    ):
        at_end = [e for e in others if e[RATE] == choose(rates[_names([e])])]
        if at_end:
            yield f"Best at the {end} rate tried, so try {better}: {_names(at_end)}."
    if alone:
        yield f"At one learning rate only, so try others: {_names(alone)}."


def _divergences(entries, judge):
    rates = _rates_of(entry for entry in entries if results.diverged(entry, judge))
    if rates:
        found = "; ".join(
            f"{name} at {', '.join(f'{rate:g}' for rate in diverged)}"
            for name, diverged in rates.items()
        )
        yield f"Diverged, with one seed or more: {found}."


def _rates_of(entries):
    rates: dict[Any, list[float]] = {}
    for entry in entries:
        rates.setdefault(_names([entry]), []).append(entry[RATE])
    return rates
