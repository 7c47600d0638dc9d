"""Makes the networks of the tasks, for a shape of inputs and a number of classes."""

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import make_spd_matrix

MLP_LAYERS = 30
HEADS = 4
# The last layer, which Muon excludes. No other path contains this name.
OUTPUT = "classes"


class Quadratic(layers.Layer):
    """The loss ½ wᵀQw - bᵀw with a random positive definite Q, for each input row.

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


def quadratic(shape, classes):
    """Makes a model that returns a quadratic function of its weights."""
    return keras.Sequential([keras.Input(shape), Quadratic()])


def mlp(shape, classes):
    """Makes a network as deep as the published one."""
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
            layers.Dense(classes, "softmax"),
        ]
    )


def cnn(width=32):
    """Makes Keras's classical network for CIFAR-10, which has a width of 32."""

    def make(shape, classes):
        # Two poolings need 14 pixels or more. Digits have 8.
        enlarge = [layers.UpSampling2D(2)] if shape[0] < 14 else []
        blocks = [
            layer
            for filters in (width, 2 * width)
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
                layers.Dense(16 * width, "relu"),
                layers.Dropout(0.5),
                layers.Dense(classes, "softmax", name=OUTPUT),
            ]
        )

    return make


def recurrent(cell, features):
    """Makes a network that reads images by rows, or by pixels if `features` is 1."""

    def make(shape, classes):
        return keras.Sequential(
            [
                keras.Input(shape),
                layers.Reshape((-1, features or shape[1] * shape[2])),
                cell(64),
                layers.Dense(classes, "softmax"),
            ]
        )

    return make


def plain(depth, width):
    """Makes dense ReLU layers with Keras's initialization and nothing between."""

    def make(shape, classes):
        hidden = [layers.Dense(width, "relu") for _ in range(depth)]
        output = layers.Dense(classes, "softmax", name=OUTPUT)
        return keras.Sequential([keras.Input(shape), layers.Flatten(), *hidden, output])

    return make


def transformer(blocks, width):
    """Makes a pre-norm transformer that predicts the next character."""

    def make(shape, classes):
        inputs = keras.Input(shape, dtype="int32")
        positions = ops.cumsum(ops.ones_like(inputs), axis=1) - 1
        x = layers.Embedding(classes, width)(inputs)
        x = x + layers.Embedding(shape[0], width)(positions)
        for _ in range(blocks):
            normalized = layers.LayerNormalization()(x)
            attention = layers.MultiHeadAttention(HEADS, width // HEADS)
            x = x + attention(normalized, normalized, use_causal_mask=True)
            normalized = layers.LayerNormalization()(x)
            wide = layers.Dense(4 * width, "gelu")(normalized)
            x = x + layers.Dense(width)(wide)
        x = layers.LayerNormalization()(x)
        output = layers.Dense(classes, "softmax", name=OUTPUT)
        return keras.Model(inputs, output(x))

    return make
