"""Chooses the metric to judge runs by, and whether higher is better."""

import dataclasses

MODES = ("auto", "min", "max")


@dataclasses.dataclass(frozen=True)
class Judge:
    """The metric to judge by, and whether its `"min"` or `"max"` is best."""

    monitor: str
    mode: str

    def __str__(self):
        return f"{self.mode} {self.monitor}"

    def is_loss(self):
        return _is_loss(self.monitor)

    def score(self, value):
        """Returns a number that is higher for a better value."""
        return value if self.mode == "max" else -value


def choose(model, names, monitor=None, mode="auto"):
    """Chooses the metric to judge a trained model by.

    Args:
        model: The model. Its metrics know whether higher is better.
        names: The names that `fit` logged.
        monitor: One of the names. Defaults to the first of these that was logged: the
            last validation metric, the validation loss, the last training metric, the
            training loss.
        mode: `"min"`, `"max"`, or `"auto"`, as in Keras's callbacks.

    Raises:
        ValueError: If `monitor` was not logged, or `mode` cannot be inferred.
    """
    metrics = {name: _metric(name, model) for name in names}
    if monitor is None:
        # `fit` sorts its logs by name. The model has the order of `compile`.
        ours = [
            name
            for metric in _metrics(model)
            for name in names
            if metrics[name] is metric and not _is_loss(name)
        ]
        ours = ["loss", *ours, "val_loss"]
        ours += [name for name in ours[1:-1] if name.startswith("val_")]
        monitor = [name for name in ours if name in names][-1]
    check_monitor(monitor, names)
    if mode == "auto":
        mode = infer_mode(monitor, metrics.get(monitor))
    return Judge(monitor, mode)


def check_monitor(monitor, names):
    """Raises a `ValueError` if `fit` did not log the metric."""
    if monitor not in names:
        raise ValueError(
            f"`monitor` must be a metric that `fit` logs: {', '.join(names)}. "
            f"Received: monitor={monitor!r}"
        )


def infer_mode(monitor, metric=None):
    """Returns `"min"` or `"max"`, as Keras's callbacks infer it."""
    if _is_loss(monitor):
        return "min"
    direction = getattr(metric, "_direction", None)
    if direction is None:
        raise ValueError(
            f"Cannot tell whether higher or lower is better for {monitor!r}. Pass "
            "`mode='max'` or `mode='min'`, or judge by another metric with `monitor=`."
        )
    return "max" if direction == "up" else "min"


def _is_loss(name):
    return name.endswith("loss")


def _metric(name, model):
    """Returns the metric of a model that is logged as `name`, or `None`.

    With several outputs, the output's name precedes the metric's. The callbacks of
    Keras do not find such metrics.
    """
    name = name.removeprefix("val_")
    found = [m for m in _metrics(model) if f"_{name}".endswith(f"_{m.name}")]
    return max(found, key=lambda metric: len(metric.name), default=None)


def _metrics(model):
    """Returns all metrics. Keras wraps those of `compile` in another metric."""
    return [m for metric in model.metrics for m in getattr(metric, "metrics", [metric])]
