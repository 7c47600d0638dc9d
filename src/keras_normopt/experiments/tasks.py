"""The tasks: what is trained, and the settings it was published with."""

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import make_spd_matrix

from keras_normopt.experiments import data as datasets
from keras_normopt.experiments import runs
from keras_normopt.experiments.data import CLASSES

MLP_LAYERS = 30


@dataclasses.dataclass(frozen=True)
class Task:
    """What to train, with the default of each option.

    `networks` maps names to functions from the shape of an image to a model. `stages`
    are the factors of the learning rate in the published schedule, each for an equal
    share of the epochs.
    """

    networks: dict[str, Callable]
    optimizers: list[str]
    norms: list[str]
    learning_rates: list[float]
    epochs: int
    batch_size: int
    schedule: str
    stages: tuple[float, ...]
    has_images: bool = True
    epoch: str = "epoch"
    momentum: float = 0.9

    def subject(self, options):
        """What the options ask for."""
        unknown = set(options.networks) - set(self.networks)
        if unknown:
            raise ValueError(
                f"--networks of {options.task} are {', '.join(self.networks)}. "
                f"Received: {', '.join(sorted(unknown))}"
            )
        loaded = self._load(options)
        shape = loaded.x.shape[1:]
        return runs.Subject(
            task=options.task,
            networks={
                network: functools.partial(self.make, network, shape)
                for network in options.networks
            },
            fit_arguments={
                "x": loaded.x,
                "y": loaded.y,
                "batch_size": options.batch_size,
                "validation_data": (loaded.x_validation, loaded.y_validation),
            },
            dataset=options.dataset if self.has_images else "",
            fraction=options.fraction if self.has_images else 1.0,
            schedule=options.schedule,
            stages=self.stages if options.schedule == "stages" else (1,),
            epoch=self.epoch,
        )

    def _load(self, options):
        if not self.has_images:  # Ten steps an epoch, on nothing.
            nothing = np.zeros((10 * options.batch_size, 1), "float32")
            return datasets.Data(nothing, nothing, nothing[:1], nothing[:1])
        return datasets.load(options.dataset, options.data_dir, options.fraction)

    def make(self, network, shape):
        model = self.networks[network](shape)
        if self.has_images:
            return model, "sparse_categorical_crossentropy", ["accuracy"]
        return model, _mean_of_output, []


def _mean_of_output(_, output):
    return ops.mean(output)


class Quadratic(layers.Layer):
    """L(w) = ½ wᵀQw - bᵀw of a random positive definite Q, one row for each input.

    Q and b are always the same. w starts at a standard normal point.
    """

    DIMENSION = 100

    def build(self, input_shape):
        self.matrix = make_spd_matrix(self.DIMENSION, random_state=0).astype("float32")
        self.vector = np.random.default_rng(0).normal(size=self.DIMENSION)
        self.w = self.add_weight(
            shape=(self.DIMENSION,),
            initializer=keras.initializers.RandomNormal(stddev=1.0),
        )

    def call(self, inputs):
        w = ops.convert_to_tensor(self.w)
        curved = ops.sum(w * ops.matmul(ops.convert_to_tensor(self.matrix), w)) / 2
        straight = ops.sum(ops.convert_to_tensor(self.vector, "float32") * w)
        return inputs * 0 + curved - straight

    def compute_output_shape(self, input_shape):
        return input_shape


def quadratic(shape):
    return keras.Sequential([keras.Input(shape), Quadratic()])


def mlp(shape):
    """As deep as the published one."""
    hidden = [
        layer
        for _ in range(MLP_LAYERS)
        for layer in (
            layers.Dense(
                128,
                "relu",
                kernel_initializer="he_normal",
                kernel_regularizer=keras.regularizers.L2(1e-5),
            ),
            layers.BatchNormalization(),
            layers.Dropout(0.2),
        )
    ]
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Flatten(),
            *hidden,
            layers.Dense(CLASSES, "softmax"),
        ]
    )


def cnn(shape):
    """Keras's classical convolutional network for CIFAR-10."""
    # Two poolings need 14 pixels or more. Digits have 8.
    enlarge = [layers.UpSampling2D(2)] if shape[0] < 14 else []
    blocks = [
        layer
        for filters in (32, 64)
        for layer in (
            layers.Conv2D(filters, 3, activation="relu", padding="same"),
            layers.Conv2D(filters, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Dropout(0.25),
        )
    ]
    return keras.Sequential(
        [
            keras.Input(shape),
            *enlarge,
            *blocks,
            layers.Flatten(),
            layers.Dense(512, "relu"),
            layers.Dropout(0.5),
            layers.Dense(CLASSES, "softmax"),
        ]
    )


def _recurrent(cell, features):
    """Reads an image row by row, or pixel by pixel where `features` is 1."""

    def make(shape):
        return keras.Sequential(
            [
                keras.Input(shape),
                layers.Reshape((-1, features or shape[1] * shape[2])),
                cell(64),
                layers.Dense(CLASSES, "softmax"),
            ]
        )

    return make


TASKS = {
    "quadratic": Task(
        networks={"quadratic": quadratic},
        optimizers=["normalized_sgd", "normalized_adam", "adam", "rmsprop"],
        norms=["std"],
        learning_rates=[0.001, 0.005, 0.01, 0.03, 0.05, 0.1],
        epochs=100,
        batch_size=1,
        schedule="constant",
        stages=(1, 0.1, 0.01),
        has_images=False,
        epoch="epoch (ten steps)",
    ),
    "mlp": Task(
        networks={"mlp": mlp},
        optimizers=["sgd", "normalized_sgd", "adam", "normalized_adam"],
        norms=["max"],
        learning_rates=[0.01, 0.001],
        epochs=30,
        batch_size=128,
        schedule="stages",
        stages=(1, 0.1, 0.01),
    ),
    "cnn": Task(
        networks={"cnn": cnn},
        optimizers=["sgd", "normalized_sgd", "adam", "normalized_adam"],
        norms=["l2"],
        learning_rates=[0.01, 0.001],
        epochs=60,
        batch_size=128,
        schedule="stages",
        stages=(1, 0.5, 0.1, 0.01),
    ),
    "rnn": Task(
        networks={
            "lstm_rows": _recurrent(layers.LSTM, None),
            "lstm_pixels": _recurrent(layers.LSTM, 1),
            "plain_rows": _recurrent(layers.SimpleRNN, None),
            "plain_pixels": _recurrent(layers.SimpleRNN, 1),
        },
        optimizers=["sgd", "normalized_sgd", "adam", "normalized_adam"],
        norms=["l2"],
        learning_rates=[0.01, 0.001],
        epochs=30,
        batch_size=64,
        schedule="stages",
        stages=(1, 0.1, 0.01),
    ),
}
