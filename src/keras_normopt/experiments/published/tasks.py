"""Defines the tasks and the settings that they were published with."""

import dataclasses
import functools
import math
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops

from keras_normopt.experiments import runs
from keras_normopt.experiments.published import data as datasets
from keras_normopt.experiments.published import networks, spikes
from keras_normopt.experiments.published.data import CLASSES

IMAGES = ("digits", "mnist", "cifar10")
OPTIMIZERS = ("sgd", "normalized_sgd", "adam", "normalized_adam")
ADAPTIVE = "scope=layer, step_size=weight_norm"
LAMB = "normalized_adam(apply_to=update, step_size=weight_norm)"
MUON = f"muon(exclude_layers=[{networks.OUTPUT}])"


class BitsPerCharacter(keras.metrics.MeanMetricWrapper):
    """The cross-entropy, in bits."""

    def __init__(self, name="bits", dtype=None):
        super().__init__(self._bits, name, dtype)
        self._direction = "down"

    @staticmethod
    def _bits(y_true, y_pred):
        nats = keras.losses.sparse_categorical_crossentropy(y_true, y_pred)
        return nats / math.log(2)


def _mean_of_output(_, output):
    return ops.mean(output)


def _check(option, given, known, task):
    if unknown := set(given) - set(known):
        raise ValueError(
            f"--{option} of {task} are {', '.join(known)}. "
            f"Received: {', '.join(sorted(unknown))}"
        )


@dataclasses.dataclass(frozen=True)
class Task:
    """Networks and data to train on, with the default of each option.

    Attributes:
        networks: Dictionary from names to functions that make a model from the shape of
            an input and the number of classes.
        stages: Factors of the learning rate in the published schedule, each for an
            equal share of the epochs.
        datasets: Tuple of names of data sets. The first data set is the default.
        holds_out: Whether to choose learning rates on a part of the training data, and
            to report on other data. Otherwise the same data serve for both.
        batches: Function that makes the batches of a run.
        size: The word for the size, such as "width", if networks differ in size.
    """

    networks: dict[str, Callable]
    optimizers: list[str]
    norms: list[str]
    learning_rates: list[float]
    epochs: int
    batch_size: list[int]
    schedule: str
    stages: tuple[float, ...] = (1,)
    datasets: tuple[str, ...] = IMAGES
    loss: str | Callable = "sparse_categorical_crossentropy"
    metrics: Callable[[], list] = lambda: ["accuracy"]
    holds_out: bool = False
    batches: Callable | None = None
    epoch: str = "epoch"
    momentum: float = 0.9
    size: str = ""

    def subjects(self, options):
        """Returns a subject for each batch size in the options."""
        _check("networks", options.networks, self.networks, options.task)
        if self.datasets:
            _check("dataset", [options.dataset], self.datasets, options.task)
            loaded = datasets.load(
                options.dataset, options.data_dir, options.fraction, self.holds_out
            )
            return [self._subject(options, size, loaded) for size in options.batch_size]
        # Zeros for ten steps an epoch.
        nothing = {n: np.zeros((10 * n, 1), "float32") for n in options.batch_size}
        return [
            self._subject(options, n, datasets.Data(x, x, x[:1], x[:1]))
            for n, x in nothing.items()
        ]

    def _subject(self, options, batch_size, loaded):
        batches, steps = None, math.ceil(len(loaded.x) / batch_size)
        if self.batches:
            batches = functools.partial(self.batches, loaded.x, loaded.y, batch_size)
            steps = len(batches(seed=0))
        return runs.Subject(
            task=options.task,
            networks={
                network: functools.partial(
                    self.make, network, loaded.x.shape[1:], loaded.classes
                )
                for network in options.networks
            },
            fit_arguments={
                "x": loaded.x,
                "y": loaded.y,
                "batch_size": batch_size,
                "validation_data": (loaded.x_validation, loaded.y_validation),
            },
            test_data=(loaded.x_test, loaded.y_test) if self.holds_out else None,
            batches=batches,
            dataset=options.dataset if self.datasets else "",
            fraction=options.fraction if self.datasets else 1.0,
            schedule=options.schedule,
            stages=self.stages if options.schedule == "stages" else (1,),
            steps=steps,
            epoch=self.epoch,
        )

    def make(self, network, shape, classes=CLASSES):
        return self.networks[network](shape, classes), self.loss, self.metrics()


def _spiked(spoil, epoch="epoch (200 steps, the last one spoilt)"):
    return Task(
        networks={f"{n}x64": networks.plain(n, 64) for n in (2, 12)},
        optimizers=["sgd", "adam"],
        norms=["l2"],
        learning_rates=[0.001, 0.003, 0.01, 0.03],
        epochs=8,
        batch_size=[32],
        schedule="cosine",
        holds_out=True,
        batches=functools.partial(spikes.Spiked, spoil),
        epoch=epoch,
    )


TASKS = {
    "quadratic": Task(
        networks={"quadratic": networks.quadratic},
        optimizers=["normalized_sgd", "normalized_adam", "adam", "rmsprop"],
        norms=["std"],
        learning_rates=[0.001, 0.005, 0.01, 0.03, 0.05, 0.1],
        epochs=100,
        batch_size=[1],
        schedule="constant",
        stages=(1, 0.1, 0.01),
        datasets=(),
        loss=_mean_of_output,
        metrics=list,
        epoch="epoch (ten steps)",
    ),
    "mlp": Task(
        networks={"mlp": networks.mlp},
        optimizers=[*OPTIMIZERS],
        norms=["max"],
        learning_rates=[0.01, 0.001],
        epochs=30,
        batch_size=[128],
        schedule="stages",
        stages=(1, 0.1, 0.01),
    ),
    "cnn": Task(
        networks={"cnn": networks.cnn()},
        optimizers=[*OPTIMIZERS],
        norms=["l2"],
        learning_rates=[0.01, 0.001],
        epochs=60,
        batch_size=[128],
        schedule="stages",
        stages=(1, 0.5, 0.1, 0.01),
    ),
    "rnn": Task(
        networks={
            "lstm_rows": networks.recurrent(layers.LSTM, None),
            "lstm_pixels": networks.recurrent(layers.LSTM, 1),
            "plain_rows": networks.recurrent(layers.SimpleRNN, None),
            "plain_pixels": networks.recurrent(layers.SimpleRNN, 1),
        },
        optimizers=[*OPTIMIZERS],
        norms=["l2"],
        learning_rates=[0.01, 0.001],
        epochs=30,
        batch_size=[64],
        schedule="stages",
        stages=(1, 0.1, 0.01),
    ),
    "transformer": Task(
        networks={"transformer": networks.transformer(blocks=2, width=64)},
        optimizers=[*OPTIMIZERS, "lion", "muon", "lamb"],
        norms=["l2"],
        learning_rates=[0.001, 0.003, 0.01, 0.03],
        epochs=2,
        batch_size=[32],
        schedule="warmup",
        datasets=("topics", "bible"),
        metrics=lambda: [BitsPerCharacter()],
        holds_out=True,
    ),
    "batches": Task(
        networks={f"{n}x64": networks.plain(n, 64) for n in (2, 12)},
        optimizers=[*OPTIMIZERS, "normalized_sgd(apply_to=update)"],
        norms=["l2"],
        learning_rates=[0.001, 0.003, 0.01, 0.03],
        epochs=8,
        batch_size=[1, 2, 8, 32, 128, 512],
        schedule="cosine",
        holds_out=True,
    ),
    "spiked_labels": _spiked(spikes.random_labels),
    "spiked_inputs": _spiked(spikes.large_inputs),
    "no_spikes": _spiked(spikes.nothing, "epoch (200 steps)"),
    "large_batches": Task(
        networks={"2x64": networks.plain(2, 64)},
        optimizers=[*OPTIMIZERS, f"normalized_sgd({ADAPTIVE})", "lamb", LAMB],
        norms=["l2"],
        learning_rates=[0.001, 0.003, 0.01, 0.03, 0.1],
        epochs=20,
        batch_size=[3125, 12500, 50000],
        schedule="warmup",
        datasets=("mnist", "digits"),
        holds_out=True,
    ),
    "starts": Task(
        networks={
            f"{n}x{m}": networks.plain(n, m) for n in (2, 12, 30) for m in (32, 128)
        },
        optimizers=["normalized_sgd"],
        norms=["l2", "max", "avg_l2"],
        learning_rates=[0.0003, 0.001, 0.003, 0.01, 0.03, 0.1],
        epochs=20,
        batch_size=[32],
        schedule="cosine",
        datasets=("digits", "breast_cancer", "mnist", "cifar10"),
        holds_out=True,
    ),
}

# One network in several sizes, to see whether a learning rate suits all.
_SIZED = {
    "optimizers": ["orthogonal_sgd", "adam", MUON],
    "norms": ["l2"],
    "learning_rates": [0.003, 0.01, 0.03],
    "holds_out": True,
}
TASKS |= {
    "transformer_width": dataclasses.replace(
        TASKS["transformer"],
        networks={str(n): networks.transformer(2, n) for n in (32, 64, 128, 256)},
        epochs=3,
        size="width",
        **_SIZED,
    ),
    "transformer_depth": dataclasses.replace(
        TASKS["transformer"],
        networks={str(n): networks.transformer(n, 64) for n in (1, 2, 4, 8)},
        epochs=3,
        size="depth",
        **_SIZED,
    ),
    "plain_width": dataclasses.replace(
        TASKS["starts"],
        networks={str(n): networks.plain(12, n) for n in (32, 64, 128, 256, 512)},
        size="width",
        **_SIZED,
    ),
    "plain_depth": dataclasses.replace(
        TASKS["starts"],
        networks={str(n): networks.plain(n, 64) for n in (2, 6, 12, 30)},
        size="depth",
        **_SIZED,
    ),
    "cnn_width": dataclasses.replace(
        TASKS["cnn"],
        networks={str(n): networks.cnn(n) for n in (8, 16, 32)},
        epochs=5,
        batch_size=[32],
        schedule="cosine",
        stages=(1,),
        size="width",
        **_SIZED,
    ),
}
