"""What a comparison says, in sentences."""

from keras_normopt.experiments import results

SEEDS = 3  # Of fewer, a range says nothing.


def sentences(rows, judge):
    """Yields what can be said of the rows: for each network the order, then caveats."""
    for network, of_network in rows.groupby("network", sort=False):
        entries = results.last_epoch(of_network)
        best = results.best(of_network, judge)
        best.sort(key=lambda entry: results.score(entry, judge), reverse=True)
        trained = [entry for entry in best if not results.diverged(entry, judge)]
        yield _values(network, trained, judge) + _verdict(trained, judge)
        yield from _pairs(trained, judge)
        yield from _ends(trained, entries)
        yield from _divergences(entries, judge)
    if not judge.monitor.startswith("val_"):
        yield (
            "There were no validation data, so this is about the data trained on: pass "
            "`validation_data` to learn about others."
        )


def _values(network, trained, judge):
    better = "higher" if judge.mode == "max" else "lower"
    values = "; ".join(
        f"{_at(entry)}: {results.range_of(entry, judge.monitor)}" for entry in trained
    )
    return f"{network}, {judge.monitor}, {better} is better: {values or 'nothing'}"


def _at(entry):
    return f"{results.name_of(entry)} at {entry['initial_learning_rate']:g}"


def _verdict(trained, judge):
    if not trained:
        return ", all diverged. Try lower learning rates."
    seeds = min(entry["seeds"] for entry in trained)
    if seeds < SEEDS:
        number = "one seed is" if seeds == 1 else f"{seeds} seeds are"
        return f". No ranking: {number} too few, take {SEEDS} or more."
    if len(trained) == 1:
        return "."
    first, *others = trained
    level = [entry for entry in others if _overlap(first, entry, judge)]
    behind = [entry for entry in others if entry not in level]
    if not behind:
        return ": their ranges overlap, no ranking."
    ahead = f". {results.name_of(first)} is ahead of {_names(behind)}: ranges do not"
    if not level:
        return f"{ahead} overlap."
    return f"{ahead} overlap. That of {_names(level)} does: no ranking of these."


def _pairs(trained, judge):
    """What normalizing or clipping changed, which may be far from the best."""
    if len(trained) < 3 or min(entry["seeds"] for entry in trained) < SEEDS:
        return
    bases = {entry["optimizer"]: entry for entry in trained}
    for entry in trained:
        change, _, name = entry["optimizer"].partition("_")
        if change not in ("normalized", "clipped") or name not in bases:
            continue
        # In the order of `trained`, the better first.
        one, other = sorted([entry, bases[name]], key=trained.index)
        if _overlap(one, other, judge):
            yield (
                f"{_names([one])} and {_names([other])}: their ranges overlap, no "
                "ranking."
            )
        else:
            yield (
                f"{_names([one])} is ahead of {_names([other])}: ranges do not overlap."
            )


def _overlap(one, other, judge):
    one, other = one[judge.monitor], other[judge.monitor]
    return one["min"] <= other["max"] and other["min"] <= one["max"]


def _names(entries):
    return ", ".join(results.name_of(entry) for entry in entries)


def _ends(trained, entries):
    """Whose best learning rate may lie beyond those that were tried."""
    tried = {_names([entry]): [] for entry in trained}
    for entry in entries:
        tried.setdefault(_names([entry]), []).append(entry["initial_learning_rate"])
    for end, which, other in (("higher", max, "highest"), ("lower", min, "lowest")):
        at_end = [
            entry
            for entry in trained
            if len(rates := tried[_names([entry])]) > 1
            and entry["initial_learning_rate"] == which(rates)
        ]
        if at_end:
            yield f"Best at the {other} rate tried, so try {end}: {_names(at_end)}."
    single = [entry for entry in trained if len(tried[_names([entry])]) == 1]
    if single:
        yield f"At one learning rate only, so try others: {_names(single)}."


def _divergences(entries, judge):
    rates = {}
    for entry in entries:
        if results.diverged(entry, judge):
            rate = f"{entry['initial_learning_rate']:g}"
            rates.setdefault(_names([entry]), []).append(rate)
    if rates:
        found = "; ".join(f"{name} at {', '.join(of)}" for name, of in rates.items())
        yield f"Diverged, with one seed or more: {found}."
