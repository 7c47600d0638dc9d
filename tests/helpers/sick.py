"""Makes models with one fault each, and models in which the fault is cured.

Each function returns a compiled model, inputs and targets. Its arguments set the fault
or the cure. The default arguments make a model without a fault, except in
`images_of_bytes`.
"""

import keras
from keras import initializers, layers
from sklearn.datasets import load_digits

DIGITS, LABELS = load_digits(return_X_y=True)
DIGITS = (DIGITS / 16).astype("float32")


def classifier(hidden, optimizer, x, y, classes=10, dtype=None):
    head = layers.Dense(classes, name="head", dtype=dtype)
    model = keras.Sequential([keras.Input(x.shape[1:]), *hidden, head])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model, x, y


def images_of_bytes(scale=1.0, optimizer="sgd"):
    """A small convolutional network on pixels from 0 to 255."""
    hidden = [
        layers.Conv2D(16, 3, activation="relu"),
        layers.Conv2D(32, 3, activation="relu"),
        layers.Flatten(),
    ]
    x = 255 * DIGITS.reshape(-1, 8, 8, 1) * scale
    return classifier(hidden, optimizer, x, LABELS)


def dense(depth=2, activation="relu", optimizer="adam", dtype=None, between=()):
    hidden = []
    for _ in range(depth):
        hidden += [layers.Dense(64, activation, dtype=dtype)]
        hidden += [make() for make in between]
    return classifier(hidden, optimizer, 2 * DIGITS - 1, LABELS, dtype=dtype)


def recurrent(layer, gain=1.0, optimizer="adam", activation="tanh"):
    """A recurrent network that reads the 64 pixels of a digit one after the other."""
    kernel = initializers.Orthogonal(gain=gain, seed=0)
    hidden = [
        layers.Reshape((64, 1)),
        layer(32, activation, recurrent_initializer=kernel),
    ]
    x = (DIGITS - DIGITS.mean()) / DIGITS.std()
    return classifier(hidden, optimizer, x, LABELS)


def regression(inputs=1.0, targets=1.0, optimizer="adam"):
    """A dense network that predicts the brightness of a digit."""
    y = DIGITS.mean(axis=1, keepdims=True)
    y = (y - y.mean()) / y.std()
    hidden = [layers.Dense(32, "relu"), layers.Dense(32, "relu")]
    model = keras.Sequential([keras.Input((64,)), *hidden, layers.Dense(1)])
    model.compile(optimizer, "mse")
    return model, (2 * DIGITS - 1) * inputs, y * targets
