"""Compares several optimizers on one model."""

import ast
import collections.abc
import functools
import json
import math
import operator
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import joblib
import keras
import numpy as np

from keras_normopt._transforms.thresholds import RunningNorm
from keras_normopt.directions import Orthogonal, Rows, Sign
from keras_normopt.experiments import figures, objective, results, runs, summary
from keras_normopt.experiments.progress import Progress
from keras_normopt.step_sizes import GradientCorrelation, WeightNorm

OPTIMIZERS = ("sgd", "normalized_sgd", "adam", "normalized_adam")
# The classes that options in a string may name: "clipped_sgd(direction=Sign())".
_OBJECTS: dict[str, Any] = {
    cls.__name__: cls
    for cls in (GradientCorrelation, Orthogonal, Rows, RunningNorm, Sign, WeightNorm)
}
LEARNING_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)


def compare(
    make_model: Callable[[], Any],
    x: Any,
    y: Any = None,
    *,
    optimizers: Iterable[Any] = OPTIMIZERS,
    learning_rates: Iterable[float] = LEARNING_RATES,
    seeds: int = 3,
    epochs: int = 10,
    monitor: str | None = None,
    mode: Literal["auto", "min", "max"] = "auto",
    test_data: Any = None,
    out: str | os.PathLike[str] | None = None,
    **fit_arguments: Any,
) -> "Comparison":
    """Trains your model with several optimizers, and says which is best.

    Optimizers are compared at their best learning rates. The best rate has the best
    mean over the seeds in the last epoch. Runs of the same seed start from the same
    weights. With `out`, each finished run is saved, and the same call resumes after an
    interruption.

    Args:
        make_model: Function without arguments that returns a new model, compiled with a
            loss, metrics and any optimizer. `compare` replaces the optimizer. Or it
            returns a tuple `(model, loss, metrics)`.
        x, y: As for `fit`: arrays, a `tf.data.Dataset`, a `DataLoader` or a
            `PyDataset`. A generator is not allowed, because the first run would use it
            up.
        optimizers: List of optimizers. An item is a name that `model.compile` takes, a
            pair of a name and its own learning rate, or both in one string,
            `"adam:0.001"`. Options may follow a name,
            `"normalized_adam(apply_to=update):0.01"`. A dictionary maps your own labels
            to such items, or to functions from the learning rate to an optimizer.
            Defaults to SGD and Adam, plain and normalized.
        learning_rates: List of positive numbers. Defaults to .0003 to .1, half a decade
            apart.
        seeds: Positive integer, the number of runs with each setting. Defaults to 3.
            With fewer, there is no ranking.
        epochs: Positive integer. Defaults to 10.
        monitor: String, the metric to judge by, as `fit` logs it. Defaults to the last
            validation metric, or the validation loss. Without validation data, it is
            the last training metric, or the training loss.
        mode: `"max"` if higher is better, `"min"` if lower is better, or `"auto"` to
            ask the metric. Defaults to `"auto"`.
        test_data: Tuple `(x, y)`, or one argument for `evaluate`. Each run is evaluated
            on these data once, at its end. The results are reported on these data, but
            other data choose the learning rates. Defaults to `None`: the metric that
            chooses the learning rates is also reported.
        out: Directory for `results.csv`, `summary.json` and figures. Defaults to
            `None`, which writes nothing. Saved runs are reused only if the
            configuration of the model and optimizer, and the values of arrays, are the
            same.
        **fit_arguments: More arguments of `fit`, such as `batch_size`,
            `validation_data` or `callbacks` (the same objects in each run).

    Returns:
        A `Comparison`. `print` shows its table and its summary.

    Raises:
        ValueError: If an argument is not as above, if `out` cannot be written, or if a
            metric does not say whether higher is better.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> from keras_normopt import experiments
        >>> x = np.random.default_rng(0).normal(size=(64, 3))
        >>> y = x.sum(axis=1)
        >>> def make_model():
        ...     model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        ...     model.compile(loss="mse")
        ...     return model
        >>> comparison = experiments.compare(
        ...     make_model,
        ...     x,
        ...     y,
        ...     optimizers=["sgd", "normalized_sgd"],
        ...     learning_rates=[0.01, 0.1],
        ...     seeds=1,
        ...     epochs=2,
        ... )
        >>> comparison.rows["optimizer"].unique().tolist()
        ['sgd', 'normalized_sgd']
    """
    fit_arguments = {"x": x, "y": y} | fit_arguments
    subject = subject_of(make_model, fit_arguments, test_data)
    check(learning_rates, seeds, epochs, mode)
    settings: dict[str, Any] = {"learning_rates": list(learning_rates)}
    settings |= {"seeds": seeds, "epochs": epochs}
    plan = runs.plan(subject, parse(optimizers), **settings)
    named = [optimizers] if isinstance(optimizers, str) else list(optimizers)
    arguments = {"optimizers": named} | settings
    out = None if out is None else pathlib.Path(out)
    comparison = Comparison(plan, out, monitor, mode, arguments)
    comparison.train()
    comparison.write()
    return comparison


class Comparison:
    """The result of `compare`. `print` shows its table and its summary.

    Attributes:
        paths: List of the figures in `out`.
    """

    # The word for the size, such as "width", if networks differ in size.
    size: str | None = None

    def __init__(
        self, plan, out=None, monitor=None, mode="auto", arguments=None, epoch="epoch"
    ):
        self.plan, self.out, self.epoch = plan, out, epoch
        self.monitor, self.mode = monitor, mode
        self.arguments = arguments or {}
        self.results = results.Results(out)
        self.paths: list[Any] = []

    def train(self):
        """Trains the runs that have not finished yet."""
        unfinished = [run for run in self.plan if run not in self.results]
        with Progress(self.plan, unfinished) as progress:
            for run in unfinished:
                progress.begin(run)
                if run not in self.results:  # Another process may have trained it.
                    self.results.add(self._train(run, progress))
                progress.end(run, self.results.of([run]))

    def _train(self, run, progress):
        choice = {"monitor": self.monitor, "mode": self.mode}
        return self.plan[run](progress.on_epoch, **choice)

    def write(self):
        """Writes the summary and figures to `out`, if there are results."""
        if self.out and len(self.rows):
            self.results.summarize(self.plan, self.judge, self.arguments)
            drawn = (self.rows, self.judge, self.out, self.epoch, self.size)
            self.paths = figures.draw(*drawn)

    @property
    def rows(self) -> Any:
        """DataFrame with a row for each epoch of each finished run."""
        return self.results.of(self.plan)

    @functools.cached_property
    def judge(self):
        """The metric that the runs chose, unless `monitor` names another metric."""
        mode, monitor = self.rows["judged_by"].iloc[-1].split(" ", 1)
        if self.monitor not in (None, monitor):
            monitor = self.monitor
            objective.check_monitor(monitor, results.metrics(self.rows))
            if self.mode == "auto":
                mode = objective.infer_mode(monitor)
        return objective.Judge(monitor, mode if self.mode == "auto" else self.mode)

    @property
    def table(self) -> str:
        """The best learning rate of each optimizer and its results, as text."""
        return results.table(self.rows, self.judge)

    @property
    def summary(self) -> str:
        """The conclusions, one on each line."""
        return "\n".join(summary.sentences(self.rows, self.judge))

    def plot(self) -> dict[str, Any]:
        """Draws the figures. Returns them as `{name: figure}`."""
        return dict(figures.figures(self.rows, self.judge, self.epoch, self.size))

    def __str__(self) -> str:
        return f"{self.table}\n\n{self.summary}"

    __repr__ = __str__


def parse(optimizers):
    """Converts `optimizers` to triples: label, identifier, and rate or `None`.

    An identifier is a name, a pair of a name and a dictionary of options, or a
    function.
    """
    if isinstance(optimizers, collections.abc.Mapping):
        return [
            (str(label), *_parse_value(value)) for label, value in optimizers.items()
        ]
    if isinstance(optimizers, str):
        optimizers = [optimizers]
    return [_parse_item(item) for item in optimizers]


def _parse_value(value):
    """Returns the identifier and the rate of a value in a dictionary."""
    if callable(value):
        return value, None
    _, identifier, rate = _parse_item(value)
    return identifier, rate


def _parse_item(item):
    name, rate = item, None
    if isinstance(item, str):
        name, colon, rate = item.rpartition(":")
        if not colon or ")" in rate:
            name, rate = item, None
    elif isinstance(item, tuple) and len(item) == 2:
        name, rate = item
    if not isinstance(name, str):
        raise ValueError(
            "`optimizers` must be a list or a dictionary. A list has names, such as "
            "'adam' or 'adam:0.001', or pairs (name, rate). A dictionary has these as "
            "values, or functions from the learning rate to an optimizer. "
            f"Received: {item!r}"
        )
    label, identifier = _parse_name(name)
    return label, identifier, None if rate is None else check_rate(rate)


def _parse_name(text):
    """Returns the label and identifier of `normalized_adam(apply_to=update)`."""
    if "(" not in text:
        return text, text
    # Quotes bare words, as Python cannot parse keywords such as `global` as names.
    quoted = re.sub(
        r"=\s*(?!True\b|False\b|None\b)([a-zA-Z_]\w*)\s*(?=[,)])", r"='\1'", text
    )
    try:
        call: Any = ast.parse(quoted, mode="eval").body
        options = {keyword.arg: _evaluate(keyword.value) for keyword in call.keywords}
        if call.args or None in options:
            raise ValueError("each option must have a name")
        label = ", ".join(part.strip() for part in text.split(","))
        return label, (call.func.id, options)
    except (SyntaxError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            "Write an optimizer with options as normalized_adam(apply_to=update) "
            "or clipped_sgd(max_norm=WeightNorm(0.01), scope=unit). "
            f"Received: {text!r} ({error})"
        ) from error


def _evaluate(node: Any) -> Any:
    """Returns a literal, a name as a string, or an object of this package."""
    if isinstance(node, ast.Call):
        named = {str(k.arg): _evaluate(k.value) for k in node.keywords}
        name: str = getattr(node.func, "id", "")
        if name not in _OBJECTS:
            raise ValueError(f"{name} is not one of {', '.join(_OBJECTS)}")
        return _OBJECTS[name](*map(_evaluate, node.args), **named)
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.List | ast.Tuple):
        return [_evaluate(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        return dict(
            zip(map(_evaluate, node.keys), map(_evaluate, node.values), strict=True)
        )
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{node and ast.unparse(node)} is not a value") from None


def check_rate(rate):
    """Returns a learning rate as a float. Raises an error if it is not above 0."""
    try:
        if 0 < float(rate) < math.inf:
            return float(rate)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"A learning rate must be a number above 0. Received: {rate!r}")


def check(learning_rates, seeds, epochs, mode):
    """Raises a `ValueError` if an argument of `compare` is wrong."""
    if not list(map(check_rate, learning_rates)):
        raise ValueError(
            "`learning_rates` must be one or more numbers. "
            f"Received: learning_rates={learning_rates!r}"
        )
    for name, value in (("seeds", seeds), ("epochs", epochs)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"`{name}` must be a whole number of at least 1. "
                f"Received: {name}={value!r}"
            )
    if mode not in objective.MODES:
        raise ValueError(
            f"`mode` must be one of {', '.join(map(repr, objective.MODES))}. "
            f"Received: mode={mode!r}"
        )


def subject_of(make_model, fit_arguments, test_data=None, network=None):
    """Returns the `Subject` that `compare` trains.

    Args:
        make_model, fit_arguments, test_data: As for `compare`.
        network: The model's name in the results. Defaults to its own name.

    Raises:
        ValueError: If the function or the data can serve only one run.
    """
    given = fit_arguments | ({} if test_data is None else {"test_data": test_data})
    check_data(given)
    # A model is callable, too.
    if not callable(make_model) or isinstance(make_model, keras.Model):
        raise ValueError(
            "`make_model` must be a function without arguments that returns a new "
            "model, because each run needs a new one. "
            f"Received: make_model={make_model!r}"
        )
    model, other = runs.compiled(make_model()), runs.compiled(make_model())
    weight_ids = {id(v) for v in model.trainable_variables}
    if model is other or weight_ids & {id(v) for v in other.trainable_variables}:
        raise ValueError(
            "`make_model` must return a model with new weights at each call. Received: "
            "two models that share weights. Make their layers inside the function."
        )
    name = network or _without_counters(model.name)
    subject_hash = joblib.hash([_model_key(model), _data_key(given)])
    return runs.Subject(
        task="compare",
        networks={name: make_model},
        fit_arguments=fit_arguments,
        test_data=test_data,
        fingerprint=functools.partial(_fingerprint, subject_hash),
    )


def check_data(arguments):
    """Raises a `ValueError` for data that serve only one run."""
    for name, value in arguments.items():
        if isinstance(value, collections.abc.Iterator):
            raise ValueError(
                f"The first run would use up `{name}`. Pass arrays, a "
                "`keras.utils.PyDataset`, a `tf.data.Dataset` or a `DataLoader`, not a "
                f"generator or iterator. Received: {name}={value!r}"
            )


# Names often stay the same when a user changes the model, so results could be mixed.
# The fingerprint detects most changes. It misses changes within functions, subclassed
# layers and data sets that are not arrays.


def _fingerprint(subject_hash, optimizer):
    return joblib.hash([subject_hash, _config(optimizer.get_config)])[:8]


def _model_key(model):
    compiled = _config(lambda: model.get_compile_config() | {"optimizer": None})
    shapes = [tuple(variable.shape) for variable in model.variables]
    return type(model).__name__, _config(model.get_config), compiled, shapes


def _config(get):
    """Returns a configuration as text that is the same in each process."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of lambdas.
            text = json.dumps(get(), default=lambda value: type(value).__name__)
    except Exception:  # Classes of users may raise anything.
        return ""
    return _without_counters(text)


def _without_counters(text):
    """Drops the number of `dense_7`, which counts the layers of a process."""
    return re.sub(r"_\d+\b", "", text)


def _data_key(fit_arguments):
    relevant = {k: v for k, v in fit_arguments.items() if k != "verbose"}
    return keras.tree.map_structure(_value_key, relevant)


def _value_key(value):
    if keras.ops.is_tensor(value):
        value = keras.ops.convert_to_numpy(value)
    if hasattr(value, "__array__"):
        value = np.asarray(value)
        return str(value.dtype), value.shape, joblib.hash(value)
    if isinstance(value, str | int | float | None):
        return repr(value)
    return type(value).__name__, operator.length_hint(value, -1)
