"""Which metric runs are judged by, and whether higher is better."""

import dataclasses

MODES = ("auto", "min", "max")


@dataclasses.dataclass(frozen=True)
class Judge:
    """The metric to judge by, and its best value: `"min"` or `"max"`."""

    monitor: str
    mode: str

    def __str__(self):
        return f"{self.mode} {self.monitor}"

    def is_loss(self):
        return _is_loss(self.monitor)

    def score(self, value):
        """A number that is higher for what is better."""
        return value if self.mode == "max" else -value


def choose(model, names, monitor=None, mode="auto"):
    """Chooses what a model that has trained is judged by.

    Args:
        model: The model, whose metrics know whether higher is better.
        names: The names of what `fit` logged.
        monitor: One of the names. By default the last metric of the validation data, or
            their loss, or the last metric of the training data, or their loss.
        mode: `"min"`, `"max"`, or `"auto"`, as Keras's own callbacks have it.

    Raises:
        ValueError: If `monitor` was not logged, or `mode` cannot be inferred.
    """
    metrics = {name: _metric(name, model) for name in names}
    if monitor is None:
        # `fit` sorts what it logs by name, the model has it as it was compiled.
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
    if monitor not in names:
        raise ValueError(
            f"`monitor` must be one of what `fit` logs: {', '.join(names)}. "
            f"Received: monitor={monitor!r}"
        )


def infer_mode(monitor, metric=None):
    """Asks the metric what Keras's own callbacks ask it."""
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
    """The metric of a model that is logged as `name`, or `None`.

    That of a model with several outputs has the name of its output before its own,
    which Keras's own callbacks do not see through.
    """
    name = name.removeprefix("val_")
    found = [m for m in _metrics(model) if f"_{name}".endswith(f"_{m.name}")]
    return max(found, key=lambda metric: len(metric.name), default=None)


def _metrics(model):
    """Those that the model was compiled with are in a metric of their own."""
    return [m for metric in model.metrics for m in getattr(metric, "metrics", [metric])]
