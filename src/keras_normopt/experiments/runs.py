"""One training after another: what makes a run, and what it leaves."""

import dataclasses
import itertools
import time

import keras
import numpy as np

import keras_normopt

METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a run depends on, in the order of the columns of results.csv."""

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
    batch_size: int
    seed: int


def plan(task, options):
    """Lists the runs that the options ask for, one seed of all before the next.

    Raises:
        ValueError: If a network, optimizer, norm or scope is unknown, or a stage of the
            schedule would have no epoch.
    """
    unknown = set(options.networks) - set(task.networks)
    if unknown:
        raise ValueError(
            f"--networks of {options.task} are {', '.join(task.networks)}. "
            f"Received: {', '.join(sorted(unknown))}"
        )
    if options.schedule == "stages" and options.epochs < len(task.stages):
        raise ValueError(
            f"--schedule stages of {options.task} has {len(task.stages)} stages, so "
            f"--epochs must be at least {len(task.stages)}. Received: {options.epochs}"
        )
    for norm, scope in itertools.product(options.norms, options.scopes):
        keras_normopt.NormalizedSGD(norm=norm, scope=scope)  # Fails if one is unknown.
    configs = {name: _get(name).get_config() for name, _ in options.optimizers}
    runs = {}  # An optimizer without norm would come once for each norm.
    for seed, network, (optimizer, rate), norm, scope in itertools.product(
        range(options.seeds),
        options.networks,
        options.optimizers,
        options.norms,
        options.scopes,
    ):
        config = configs[optimizer]
        for learning_rate in [rate] if rate else options.learning_rates:
            run = Run(
                task=options.task,
                dataset=options.dataset if task.has_images else "",
                fraction=options.fraction if task.has_images else 1.0,
                network=network,
                backend=keras.backend.backend(),
                optimizer=optimizer,
                norm=norm if "norm" in config else "",
                scope=scope if "norm" in config else "",
                momentum=f"{options.momentum:g}" if "nesterov" in config else "",
                schedule=options.schedule,
                initial_learning_rate=learning_rate,
                epochs=options.epochs,
                batch_size=options.batch_size,
                seed=seed,
            )
            runs[run] = None
    return list(runs)


def _get(name):
    try:
        return keras.optimizers.get(name)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "--optimizers must be names that model.compile takes: Keras's, such as sgd "
            f"or adam, and {', '.join(keras_normopt.optimizers.ALIASES)}. "
            f"Received: {name!r}"
        ) from error


def make_optimizer(run):
    default = _get(run.optimizer)
    changes = {"learning_rate": run.initial_learning_rate}
    if run.norm:
        changes |= {"norm": run.norm, "scope": run.scope}
    if run.momentum:
        momentum = float(run.momentum)
        changes |= {"momentum": momentum, "nesterov": momentum > 0}
    return type(default).from_config(default.get_config() | changes)


def train(run, task, data, bar):
    """Trains once; returns a row of results for each epoch."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(run.seed)
    model, loss, metrics = task.make(run.network, data.x.shape[1:])
    optimizer = make_optimizer(run)
    optimizer.build(model.trainable_variables)
    fresh = [keras.ops.convert_to_numpy(v) for v in optimizer.variables]
    model.compile(optimizer, loss, metrics=metrics)
    record = Record(bar)
    stages = task.stages if run.schedule == "stages" else (1,)
    ends = np.linspace(0, run.epochs, len(stages) + 1).round().astype(int)
    for factor, (start, end) in zip(stages, itertools.pairwise(ends), strict=True):
        # As with a new optimizer, but what is compiled stays compiled.
        for variable, value in zip(optimizer.variables, fresh, strict=True):
            variable.assign(value)
        optimizer.learning_rate = run.initial_learning_rate * factor
        model.fit(
            data.x,
            data.y,
            batch_size=run.batch_size,
            initial_epoch=int(start),
            epochs=int(end),
            validation_data=(data.x_validation, data.y_validation),
            verbose=0,
            callbacks=[record],
        )
    return [dataclasses.asdict(run) | row for row in record.rows]


class Record(keras.callbacks.Callback):
    """Keeps the results of each epoch, and moves the progress bar."""

    def __init__(self, bar):
        super().__init__()
        self.bar = bar
        self.rows = []

    def on_train_batch_end(self, batch, logs=None):
        self.bar.update()

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs):
        row = {"epoch": epoch + 1}
        row |= {name: float(logs.get(name, "nan")) for name in METRICS}
        row["learning_rate"] = float(self.model.optimizer.learning_rate)
        row["seconds"] = round(time.perf_counter() - self.start, 3)
        self.rows.append(row)
        self.bar.set_postfix_str(f"loss {row['loss']:.4g}")
