"""Logs the norms of gradients in `fit`."""

import gc
import itertools
import reprlib
import warnings
from typing import Any

import keras
import numpy as np

from keras_normopt._optimizer.factory import spelled
from keras_normopt._optimizer.model_optimizers import (
    named_optimizers,
    named_trackers,
    tracking_optimizers,
)

__all__ = ["GradientNorms"]

_MEAN, _MAX = "grad_norm/", "grad_norm_max/"
_PREFIXES = (
    _MEAN,
    _MAX,
    "clipped/",
    "skipped/",
    "weight_norm/",
    "update_norm/",
    "update_ratio/",
)
# Names, to avoid imports. We cannot know whether other callbacks read the logs.
_WRITERS = {"CSVLogger", "RemoteMonitor", "TensorBoard"}
_WRITERS |= {"MlflowCallback", "WandbCallback", "WandbMetricsLogger"}


class GradientNorms(keras.callbacks.Callback):
    """Adds the norms of gradients to the logs of `fit`.

    The optimizer must have `track_norms=True`. For each of its blocks, the logs get
    `grad_norm/<block>`, the mean over the steps, and `grad_norm_max/<block>`, the
    largest norm. The block `total` stands for the l2 norm of the whole gradient. A
    clipping optimizer adds `clipped/<block>`, the share of clipped steps. With
    `skip=True` it adds `skipped/<block>`, the share of skipped steps.

    With `track_norms="all"` the logs get three more means for each block and for
    `total`. `weight_norm/<block>` is ‖weights‖ before the step. `update_norm/<block>`
    is ‖update‖, including weight decay. `update_ratio/<block>` is their ratio. As a
    rule of thumb, this ratio is near 1e-3.

    To watch a plain Adam, use `NormalizedAdam(norm=None, track_norms=True)`. The
    optimizer may be inside a `LossScaleOptimizer` or a `MultiOptimizer`.

    A model with its own `train_step` may hold several optimizers as attributes, alone
    or in lists and dictionaries. If more than one of them keeps norms, the attribute's
    name comes first: `grad_norm/d_opt/total`.

    `History` and the callbacks after this one see these logs. Put callbacks that read
    logs, such as `CSVLogger` and `TensorBoard`, after this one in the list.
    `GradientNorms` warns you if a known callback of this kind comes before it.
    `EarlyStopping(monitor="grad_norm/…")` needs a `mode`, because Keras cannot know
    whether a norm should grow or shrink. Names of blocks follow the names of layers. If
    you name the layers, every run has the same columns.

    Args:
        frequency: `"epoch"`, or an integer n of at least 1. With n, the logs of every
            n-th batch also get the norms over the last n batches. The logs of an epoch
            always get the norms over the whole epoch. Defaults to `"epoch"`.
        progress_bar: Whether the progress bar shows every block. Deep models fill the
            screen. Defaults to `False`: the bar shows only `grad_norm/total`.

    Raises:
        ValueError: If `frequency` is neither of these. Also when training begins, if no
            optimizer of the model keeps norms.

    Example:
        >>> import keras, keras_normopt
        >>> import numpy as np
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> optimizer = keras_normopt.NormalizedSGD(track_norms=True)
        >>> model.compile(optimizer=optimizer, loss="mse")
        >>> callback = keras_normopt.callbacks.GradientNorms()
        >>> history = model.fit(
        ...     np.ones((8, 2)), np.ones((8, 1)), callbacks=[callback], verbose=0
        ... )
        >>> sum(key.startswith("grad_norm/") for key in history.history)
        3
        >>> "grad_norm/total" in history.history
        True
    """

    def __init__(self, frequency: Any = "epoch", progress_bar: bool = False) -> None:
        super().__init__()
        is_count = isinstance(frequency, int) and not isinstance(frequency, bool)
        if frequency != "epoch" and not (is_count and frequency >= 1):
            raise ValueError(
                '`frequency` must be "epoch" or an integer of at least 1. '
                f"Received: frequency={reprlib.repr(frequency)}"
            )
        self.frequency = frequency
        self.progress_bar = progress_bar
        self._totals: set[str] = set()

    def on_train_begin(self, logs: Any = None) -> None:
        held = named_optimizers(self.model)
        if not any(map(tracking_optimizers, held.values())):
            found = [f"model.{name} = {_describe(o)}" for name, o in held.items()]
            raise ValueError(
                "GradientNorms needs an optimizer that keeps the norms of its "
                f"gradients. Received: {', '.join(found) or 'no optimizer'}. "
                f"{_advice(*next(iter(held.items()), (None, None)))}"
            )
        # Keras gives a callback no access to other callbacks. So this finds lists that
        # contain the callback.
        lists = [h for h in gc.get_referrers(self) if isinstance(h, list)]
        self._warn_of_readers_before(lists)
        if not self.progress_bar:
            for other in itertools.chain(*lists):
                if isinstance(other, keras.callbacks.ProgbarLogger):
                    _hide_blocks(other, self._totals)

    def _warn_of_readers_before(self, lists):
        before = [itertools.takewhile(lambda c: c is not self, one) for one in lists]
        readers = {type(c).__name__ for c in itertools.chain(*before) if _reads_logs(c)}
        if readers:
            *some, last = sorted(readers)
            names = f"{', '.join(some)} and {last}" if some else last
            warnings.warn(
                f"GradientNorms comes after {names} in the list of callbacks. Put it "
                f"first, or {names} will not see the norms of gradients.",
                stacklevel=2,
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._sums: dict[str, float] = {}
        self._largest: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        for tracker, _ in self._trackers():
            tracker.reset()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.frequency != "epoch" and (batch + 1) % self.frequency == 0:
            means, largest = self._collect()
            if logs is not None:
                logs.update(means | largest)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._collect()
        counts = self._counts
        means = {
            k: s / counts[k] if counts[k] else np.nan for k, s in self._sums.items()
        }
        if logs is not None:
            logs.update(means | self._largest)

    def _trackers(self):
        # Reading `self.model` makes Keras update JAX's variables.
        trackers = named_trackers(self.model)
        # In place, because the progress bar reads the set.
        self._totals.update(_MEAN + list(names.values())[-1] for _, names in trackers)
        return trackers

    def _collect(self):
        """Returns means and maxima since the last call. Also adds them to the epoch."""
        means: dict[str, float] = {}
        largest: dict[str, float] = {}
        for tracker, names in self._trackers():
            if not tracker.count:
                continue
            for prefix, count, values in _means(tracker):
                for name, mean in values.items():
                    key = prefix + names[name]
                    # If no step was made, logs still need a value for each epoch.
                    means[key] = mean if count else np.nan
                    # Optimizers of one model may make different numbers of steps.
                    self._sums[key] = self._sums.get(key, 0.0) + count * mean
                    self._counts[key] = self._counts.get(key, 0) + count
            largest |= {_MAX + names[name]: v for name, v in tracker.max.items()}
            tracker.reset()
        for key, value in largest.items():
            # Python's own `max` would lose NaN.
            before = self._largest.get(key, value)
            self._largest[key] = float(np.maximum(before, value))
        return means, largest


def _means(tracker):
    """Returns triples: prefix in the logs, number of steps, and means by block."""
    statistics = tracker.statistics
    prefixes = {
        "gradients": _MEAN,
        "weights": "weight_norm/",
        "updates": "update_norm/",
        "ratios": "update_ratio/",
    }
    found = [(prefixes[name], one.count, one.mean) for name, one in statistics.items()]
    found += [("clipped/", tracker.count, tracker.clipped)]
    found += [("skipped/", tracker.count, tracker.skipped)]
    return found


def _describe(optimizer):
    name = type(optimizer).__name__
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return f"{name} around {_describe(optimizer.inner_optimizer)}"
    if hasattr(optimizer, "optimizers"):  # A MultiOptimizer.
        return f"{name} of {', '.join(map(_describe, optimizer.optimizers))}"
    return name


def _advice(attribute, optimizer):
    if optimizer is None:
        return (
            "Compile the model with an optimizer that is made with `track_norms=True`, "
            "or make such an optimizer an attribute of the model."
        )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        attribute = f"{attribute}.inner_optimizer"
        return (
            f"{_advice(attribute, optimizer.inner_optimizer)} Then "
            f"`model.{attribute}.gradient_norms` has the norms of the last step."
        )
    if hasattr(optimizer, "optimizers"):  # A MultiOptimizer.
        return _advice(attribute, optimizer.optimizers[0])
    name = type(optimizer).__name__
    if hasattr(optimizer, "track_norms"):
        return f"Use `{name}(..., track_norms=True)`."
    return (
        f"To keep the norms of a plain {name}, use `keras_normopt."
        f"{spelled(optimizer)}(..., norm=None, track_norms=True)`."
    )


def _reads_logs(callback):
    if str(getattr(callback, "monitor", "")).startswith(_PREFIXES):
        return True
    return any(cls.__name__ in _WRITERS for cls in type(callback).__mro__)


def _hide_blocks(bar, totals):
    """Hides the values of blocks in a progress bar, except the totals."""

    def without_blocks(show):
        def show_rest(step, logs=None):
            logs = logs or {}
            shown = [k for k in logs if k in totals or not k.startswith(_PREFIXES)]
            show(step, {k: logs[k] for k in shown})

        return show_rest

    bar.on_train_batch_end = without_blocks(bar.on_train_batch_end)
    bar.on_epoch_end = without_blocks(bar.on_epoch_end)
