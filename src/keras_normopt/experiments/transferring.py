"""Compares the best learning rates of several sizes of a model."""

import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

import pandas as pd

from keras_normopt.experiments import comparing, coordinates, results, runs, summary

SIZES = (32, 64, 128, 256)
OPTIMIZERS = ("adam", "orthogonal_sgd")
RATE = "initial_learning_rate"
# Tune a small model only if its rate makes a large model worse by at most this share.
TOLERATED = 0.01


def transfer(
    make_model: Callable[[Any], Any],
    x: Any,
    y: Any = None,
    *,
    sizes: Iterable[float] = SIZES,
    optimizers: Any = OPTIMIZERS,
    learning_rates: Iterable[float] = comparing.LEARNING_RATES,
    seeds: int = 3,
    epochs: int = 10,
    monitor: str | None = None,
    mode: Literal["auto", "min", "max"] = "auto",
    test_data: Any = None,
    out: str | os.PathLike[str] | None = None,
    **fit_arguments: Any,
) -> "Transfer":
    """Shows whether a small and a large model have the same best learning rate.

    `transfer` trains each size of a model with each optimizer and learning rate, as
    `compare` does. It finds the best rate of each size. If the best rate of the
    smallest size is good for the largest size too, tune the small model and train the
    large one.

    Args:
        make_model: Function from a size, such as a width or a number of blocks, to a
            new model of that size. The model is compiled. Or the function returns a
            tuple `(model, loss, metrics)`, as for `compare`.
        x, y: For `fit`, as for `compare`.
        sizes: List of two or more numbers above 0. Defaults to `(32, 64, 128, 256)`.
        optimizers: As for `compare`. Defaults to `("adam", "orthogonal_sgd")`.
        learning_rates: List of positive numbers. Defaults to .0003 to .1, half a decade
            apart.
        seeds: Positive integer, the number of runs with each setting. Defaults to 3.
            With fewer, there is no advice.
        epochs: Positive integer. Defaults to 10.
        monitor, mode, test_data, out: As for `compare`.
        **fit_arguments: More arguments of `fit`.

    Returns:
        A `Transfer`. `print` shows its table and its summary.

    Raises:
        ValueError: If an argument is not as above, or `compare` does not take it.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> from keras_normopt import experiments
        >>> x = np.random.default_rng(0).normal(size=(64, 3))
        >>> y = x.sum(axis=1)
        >>> def make_model(width):
        ...     hidden, output = keras.layers.Dense(width), keras.layers.Dense(1)
        ...     model = keras.Sequential([keras.Input((3,)), hidden, output])
        ...     model.compile(loss="mse")
        ...     return model
        >>> found = experiments.transfer(
        ...     make_model,
        ...     x,
        ...     y,
        ...     sizes=(4, 8),
        ...     optimizers=["sgd"],
        ...     learning_rates=[0.01, 0.1],
        ...     seeds=1,
        ...     epochs=1,
        ... )
        >>> found.rows["network"].unique().tolist()
        ['4', '8']
    """
    comparing.check(learning_rates, seeds, epochs, mode)
    fit_arguments = {"x": x, "y": y} | fit_arguments
    subjects = subjects_of(make_model, sizes, fit_arguments, test_data)
    settings: dict[str, Any] = {"learning_rates": list(learning_rates)}
    settings |= {"seeds": seeds, "epochs": epochs}
    named = [optimizers] if isinstance(optimizers, str) else list(optimizers)
    parsed = comparing.parse(optimizers)
    plan: dict[runs.Run, Any] = {}
    for subject in subjects:
        plan |= runs.plan(subject, parsed, **settings)
    result = Transfer(
        plan,
        None if out is None else pathlib.Path(out),
        monitor,
        mode,
        {"optimizers": named, "sizes": list(sizes)} | settings,
        subjects=subjects,
        optimizers=parsed,
    )
    result.train()
    result.write()
    return result


def subjects_of(make_model, sizes, fit_arguments, test_data=None):
    """Returns a `Subject` for each size, whose network has the size as its name."""
    return [
        comparing.subject_of(
            functools.partial(make_model, size), fit_arguments, test_data, f"{size:g}"
        )
        for size in coordinates.check_sizes(sizes)
    ]


class Transfer(comparing.Comparison):
    """The result of `transfer`. `print` shows its table and its summary.

    Attributes:
        paths: List of the figures in `out`.
    """

    def __init__(self, plan, *arguments, subjects, optimizers, size="size", **more):
        # Trains one seed of all sizes before the next.
        plan = dict(sorted(plan.items(), key=lambda item: item[0].seed))
        super().__init__(plan, *arguments, **more)
        self.size, self._subjects, self._optimizers = size, subjects, optimizers

    @property
    def table(self) -> str:
        """The best learning rate of each size and optimizer, as text."""
        reported = results.reported(self.rows, self.judge)
        lines = []
        for name, by_size in self._results_by_optimizer():
            start = min(by_size)
            rate = by_size[start].best[RATE]
            for size, size_results in by_size.items():
                lines.append(
                    {
                        "optimizer": name,
                        self.size: f"{size:g}",
                        "best rate": f"{size_results.best[RATE]:g}",
                        "seeds": size_results.best["seeds"],
                        reported.monitor: results.range_of(
                            size_results.best, reported.monitor
                        ),
                        f"at the rate of {start:g}": size_results.at(
                            rate, reported.monitor
                        ),
                    }
                )
        return pd.DataFrame(lines).to_string(index=False)

    @property
    def summary(self) -> str:
        """The conclusions on all sizes, and those of `compare` on each size."""
        reported = results.reported(self.rows, self.judge)
        lines = [
            _sentence(name, by_size, reported, self.size)
            for name, by_size in self._results_by_optimizer()
        ]
        others = summary.sentences(self.rows, self.judge, self.size)
        return "\n".join([*lines, *others])

    def coordinates(self, steps: Iterable[int] = coordinates.STEPS) -> pd.DataFrame:
        """Runs the coordinate check at the best rates of the smallest size.

        Args:
            steps: As for `coordinate_check`.

        Returns:
            DataFrame, as `coordinate_check` returns it.
        """
        results_of_all = self._results_by_optimizer()
        best = {name: by_size[min(by_size)].best for name, by_size in results_of_all}
        chosen = [
            (name, identifier, entry[RATE])
            for label, identifier, _ in self._optimizers
            for name, entry in best.items()
            if entry["optimizer"] == label
        ]
        networks = [
            item for subject in self._subjects for item in subject.networks.items()
        ]
        makers = {pd.to_numeric(size): make for size, make in networks}
        fit_arguments = self._subjects[0].fit_arguments
        return coordinates.measure(makers, fit_arguments, chosen, sorted(steps))

    def _results_by_optimizer(self):
        """Returns pairs of an optimizer's name and `{size: _SizeResults}`."""
        entries = results.last_epoch(self.rows)
        best = results.best(self.rows, self.judge)
        by_optimizer: dict[str, dict[float, _SizeResults]] = {}
        for entry in sorted(best, key=lambda entry: float(entry["network"])):
            tried = [e for e in entries if _is_alike(e, entry)]
            sizes = by_optimizer.setdefault(results.name_of(entry), {})
            sizes[float(entry["network"])] = _SizeResults(entry, tried, self.judge)
        return list(by_optimizer.items())


class _SizeResults:
    """The results of one optimizer at one size.

    Attributes:
        best: The entry of `results.last_epoch` with the best learning rate.
        is_at_end: Whether the best rate is the highest or lowest of several rates.
    """

    def __init__(self, best, tried, judge):
        self.best, self._judge = best, judge
        self._by_rate = {entry[RATE]: entry for entry in tried}
        self.is_at_end = len(tried) > 1 and best[RATE] in (
            min(self._by_rate),
            max(self._by_rate),
        )

    @property
    def rates(self):
        return list(self._by_rate)

    @property
    def has_trained(self):
        return not results.diverged(self.best, self._judge)

    def entry(self, rate):
        """Returns the entry of a rate, or `None` if it was not tried or diverged."""
        entry = self._by_rate.get(rate)
        if entry is None or results.diverged(entry, self._judge):
            return None
        return entry

    def at(self, rate, metric):
        """Returns the result of a rate, as text."""
        if rate not in self._by_rate:
            return "not tried"
        entry = self.entry(rate)
        return "diverged" if entry is None else results.range_of(entry, metric)


def _is_alike(one, other):
    return all(one[name] == other[name] for name in results.SERIES[:-1])


def _sentence(name, by_size, reported, size_name):
    """Returns how far the best rate moves, and the cost of tuning the smallest size."""
    small, large = min(by_size), max(by_size)
    if small == large:
        return f"{name}: there is only one {size_name}, so nothing can be compared."
    if not all(size_results.has_trained for size_results in by_size.values()):
        return f"{name}: at some {size_name} every rate diverged. Try lower rates."
    rates = [size_results.best[RATE] for size_results in by_size.values()]
    decades = math.log10(max(rates) / min(rates))
    text = (
        f"{name}: the best rate is {rates[0]:g} at {size_name} {small:g} and "
        f"{rates[-1]:g} at {large:g}. Over all of them it moves by {decades:.1f} "
        "decades."
    )
    return f"{text} {_cost(by_size, reported)}{_compromise(by_size, reported)}"


def _cost(by_size, reported):
    small, large = min(by_size), max(by_size)
    size_results, rate = by_size[large], by_size[small].best[RATE]
    entry = size_results.entry(rate)
    if entry is None:
        outcome = size_results.at(rate, "")
        return f"At {large:g} the rate {rate:g} {outcome}: tune each size."
    best, value = (
        size_results.best[reported.monitor]["mean"],
        entry[reported.monitor]["mean"],
    )
    share = _share_lost(size_results, entry, reported)
    text = f"At {large:g} the rate tuned at {small:g} gives {value:.4g}"
    if share:
        text += f", the best one {best:.4g}"
    seeds = min(size_results.best["seeds"], entry["seeds"])
    if seeds < summary.SEEDS:
        return f"{text}. No advice: use {summary.SEEDS} seeds or more."
    advice = "tune the smallest size" if share <= TOLERATED else "tune each size"
    text = f"{text} ({share:.1%} worse): {advice}."
    if ends := [f"{size:g}" for size, f in by_size.items() if f.is_at_end]:
        text += (
            f" The best rate is the first or last that was tried at {', '.join(ends)}."
        )
    return text


def _share_lost(size_results, entry, reported):
    """Returns the share by which a rate is worse than the best rate, at least 0."""
    best, value = (
        size_results.best[reported.monitor]["mean"],
        entry[reported.monitor]["mean"],
    )
    lost = max(0.0, reported.score(best) - reported.score(value))
    return lost and (lost / abs(best) if best else math.inf)


def _compromise(by_size, reported):
    """Returns a sentence on the one rate that suits all sizes best."""
    losses = {}
    for rate in next(iter(by_size.values())).rates:
        entries = [size_results.entry(rate) for size_results in by_size.values()]
        if all(entries):
            pairs = zip(by_size.values(), entries, strict=True)
            losses[rate] = max(_share_lost(f, e, reported) for f, e in pairs)
    if not losses:
        return " No rate trained all sizes."
    rate = min(losses, key=lambda rate: losses[rate])
    return f" One rate for all: {rate:g}, at most {losses[rate]:.1%} worse."
