"""Plans runs, trains them, and returns their results."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable

import keras
import numpy as np
from keras.optimizers import LossScaleOptimizer

from keras_normopt.experiments import objective
from keras_normopt.optimizers import ALIASES, NormalizedSGD


@dataclasses.dataclass(frozen=True)
class Subject:
    """Models and data to train on: a published task, or the arguments of `compare`.

    Attributes:
        networks: Dictionary from names to functions that make a model.
        fit_arguments: Arguments of `fit`.
        test_data: Data to report on. Validation data chooses the learning rates.
        batches: Function from a seed to batches that replace `x` and `y` of `fit`.
        stages: Factors of the learning rate, each for an equal share of the epochs.
        steps: Number of steps in an epoch.
        epoch: The name of epochs in figures.
        fingerprint: Function from an optimizer to text. The text changes with the
            optimizer, the model and the data.
    """

    task: str
    networks: dict[str, Callable]
    fit_arguments: dict
    test_data: object = None
    batches: Callable | None = None
    dataset: str = ""
    fraction: float = 1.0
    schedule: str = "constant"
    stages: tuple[float, ...] = (1,)
    steps: int = 0
    epoch: str = "epoch"
    fingerprint: Callable[..., str] = lambda optimizer: ""


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of a run, in the order of the columns of results.csv."""

    task: str
    dataset: str
    fraction: float
    network: str
    backend: str
    optimizer: str
    norm: str
    scope: str
    momentum: str
    schedule: str
    initial_learning_rate: float
    epochs: int
    batch_size: str
    seed: int
    fingerprint: str


def plan(
    subject,
    optimizers,
    learning_rates,
    seeds,
    epochs,
    norms=(None,),
    scopes=(None,),
    momentum=None,
):
    """Lists the runs, all runs of one seed before the runs of the next seed.

    Args:
        subject: A `Subject`.
        optimizers: List of triples: a label, an identifier, and the optimizer's own
            learning rate or `None`. `comparing.parse` makes them.
        learning_rates: List of rates for optimizers without their own rate.
        seeds, epochs: Numbers of seeds and of epochs.
        norms, scopes, momentum: Options for the optimizers that are given by name and
            have these options. `None` stands for the optimizer's default.

    Returns:
        Dictionary from runs to functions that train them. The functions take the
        arguments of `train` after `optimizer`.

    Raises:
        ValueError: If an optimizer, norm or scope is unknown, or if a stage of the
            schedule would have no epoch.
    """
    if epochs < len(subject.stages):
        raise ValueError(
            f"--schedule stages of {subject.task} has {len(subject.stages)} stages, so "
            f"--epochs must be at least {len(subject.stages)}. Received: {epochs}"
        )
    for norm, scope in itertools.product(norms, scopes):
        changes = {"norm": norm, "scope": scope}
        NormalizedSGD(**_without_none(changes))  # Fails if one is unknown.
    runs = {}  # A list would repeat an optimizer without a norm for each norm.
    for seed, network, (label, identifier, rate), norm, scope in itertools.product(
        range(seeds), subject.networks, optimizers, norms, scopes
    ):
        for learning_rate in [rate] if rate else learning_rates:
            arguments = (identifier, learning_rate, norm, scope, momentum)
            optimizer = make_optimizer(*arguments)
            # `momentum` of RMSprop has another meaning.
            has_momentum = hasattr(optimizer, "nesterov")
            run = Run(
                task=subject.task,
                dataset=subject.dataset,
                fraction=subject.fraction,
                network=network,
                backend=keras.backend.backend(),
                optimizer=label,
                norm=_as_text(getattr(optimizer, "norm", None)),
                scope=_as_text(getattr(optimizer, "scope", None)),
                momentum=f"{optimizer.momentum:g}" if has_momentum else "",
                schedule=subject.schedule,
                initial_learning_rate=learning_rate,
                epochs=epochs,
                batch_size=_as_text(subject.fit_arguments.get("batch_size")),
                seed=seed,
                fingerprint=subject.fingerprint(optimizer),
            )
            runs[run] = functools.partial(_train_planned, run, subject, arguments)
    return runs


def _train_planned(run, subject, arguments, *others, **choice):
    identifier, learning_rate, *options = arguments
    scheduled = _schedule(subject, learning_rate, run.epochs)
    optimizer = make_optimizer(identifier, scheduled, *options)
    return train(run, subject, optimizer, *others, **choice)


def _schedule(subject, learning_rate, epochs):
    """Returns the rate, or its cosine decay, perhaps after a warm-up."""
    steps = epochs * subject.steps
    if subject.schedule == "cosine":
        return keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    if subject.schedule == "warmup":
        warmup = max(1, steps // 10)
        return keras.optimizers.schedules.CosineDecay(
            learning_rate / 10,
            max(1, steps - warmup),
            warmup_target=learning_rate,
            warmup_steps=warmup,
        )
    return learning_rate


def _as_text(value):
    if value is None:
        return ""
    return getattr(value, "__name__", str(value))


def _without_none(arguments):
    return {name: value for name, value in arguments.items() if value is not None}


def make_optimizer(identifier, learning_rate, norm=None, scope=None, momentum=None):
    """Makes an optimizer from a name and options, or calls a function for it."""
    if callable(identifier):
        optimizer = identifier(learning_rate)
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise ValueError(
                "A function in `optimizers` must take a learning rate and return a "
                f"Keras optimizer. Received: {optimizer!r}"
            )
        return optimizer
    name, options = (identifier, {}) if isinstance(identifier, str) else identifier
    default = _get_optimizer(name)
    config = default.get_config()
    changes = {"learning_rate": learning_rate, "norm": norm, "scope": scope}
    if momentum is not None and "nesterov" in config:
        changes |= {"momentum": momentum, "nesterov": momentum > 0}
    changes = {k: v for k, v in _without_none(changes).items() if k in config}
    settings = config | changes | options
    if settings.get("direction") is not None and "norm" not in options:
        settings["norm"] = None  # The direction also sets the length.
    try:
        return type(default).from_config(settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"The options of {name} are wrong: {error}") from error


def _get_optimizer(name):
    if name == "lamb":  # The only name that Keras does not know.
        return keras.optimizers.Lamb()
    try:
        return keras.optimizers.get(name)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "Unknown optimizer. Choose a name that `model.compile` takes: one of "
            f"Keras, such as sgd or adam, or one of {', '.join(ALIASES)}. "
            f"Received: {name!r}"
        ) from error


def compiled(made):
    """Returns the model in a result of `make_model`. Compiles it if it is in a tuple.

    Raises:
        ValueError: If the result has no model, or if the model has no optimizer.
    """
    model, *settings = made if isinstance(made, tuple) and len(made) == 3 else (made,)
    is_model = isinstance(model, keras.Model)
    if is_model and settings:
        loss, metrics = settings
        model.compile(loss=loss, metrics=metrics)
    if not (is_model and getattr(model, "optimizer", None)):
        received = "a model that is not compiled" if is_model else repr(made)
        raise ValueError(
            "`make_model` must return a model that is compiled with a loss, metrics "
            "and any optimizer, or a tuple (model, loss, metrics). "
            f"Received: {received}"
        )
    return model


def replace_optimizer(model, optimizer):
    """Replaces the optimizer of a compiled model. Loss scaling stays."""
    if isinstance(model.optimizer, LossScaleOptimizer):
        config = model.optimizer.get_config()
        scaling = {k: config[k] for k in ("initial_scale", "dynamic_growth_steps")}
        optimizer = LossScaleOptimizer(optimizer, **scaling)
    model.optimizer = optimizer


def train(run, subject, optimizer, on_epoch, monitor=None, mode="auto"):
    """Trains one run. Returns a row of results for each epoch."""
    keras.utils.set_random_seed(run.seed)
    model = compiled(subject.networks[run.network]())
    replace_optimizer(model, optimizer)
    record = Record(on_epoch, monitor, mode)
    user_callbacks = keras.tree.flatten(subject.fit_arguments.get("callbacks") or [])
    arguments = {"verbose": 0} | subject.fit_arguments | {"epochs": run.epochs}
    if subject.batches:
        arguments |= {"x": subject.batches(seed=run.seed), "shuffle": False}
        arguments |= {"y": None, "batch_size": None}
    # The record comes last, so it also has what other callbacks log.
    arguments["callbacks"] = [*user_callbacks, *_stages(run, subject), record]
    model.fit(**arguments)
    if subject.test_data is not None:
        test = subject.test_data
        test = test if isinstance(test, tuple) else (test,)
        found = model.evaluate(*test, verbose=0, return_dict=True)
        record.rows[-1] |= {f"test_{name}": float(v) for name, v in found.items()}
    judged = {"judged_by": str(record.judge)}
    return [dataclasses.asdict(run) | row | judged for row in record.rows]


def _stages(run, subject):
    if subject.stages == (1,):
        return []
    starts = np.linspace(0, run.epochs, len(subject.stages) + 1).round().astype(int)
    rates = run.initial_learning_rate * np.array(subject.stages)
    return [Stages(dict(zip(starts.tolist(), rates.tolist(), strict=False)))]


class Stages(keras.callbacks.Callback):
    """Resets the optimizer at some epochs, with new rates and without compiling."""

    def __init__(self, rates):
        super().__init__()
        self.rates = rates

    def on_train_begin(self, logs=None):
        optimizer = self.model.optimizer
        optimizer.build(self.model.trainable_variables)
        self.fresh = [keras.ops.convert_to_numpy(v) for v in optimizer.variables]

    def on_epoch_begin(self, epoch, logs=None):
        if epoch in self.rates:
            optimizer = self.model.optimizer
            for variable, value in zip(optimizer.variables, self.fresh, strict=True):
                variable.assign(value)
            optimizer.learning_rate = self.rates[epoch]


class Record(keras.callbacks.Callback):
    """Records the results of each epoch, and the metric to judge them by."""

    def __init__(self, on_epoch, monitor=None, mode="auto"):
        super().__init__()
        self.on_epoch = on_epoch
        self.choice = {"monitor": monitor, "mode": mode}
        self.rows = []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs):
        metrics = {k: float(v) for k, v in logs.items() if np.size(v) == 1}
        metrics.pop("learning_rate", None)
        # Metrics exist after the first epoch. An error then loses little time.
        self.judge = objective.choose(self.model, list(metrics), **self.choice)
        row = {"epoch": epoch + 1} | metrics
        row["learning_rate"] = float(self.model.optimizer.learning_rate)
        row["seconds"] = round(time.perf_counter() - self.start, 3)
        self.rows.append(row)
        self.on_epoch(row)
