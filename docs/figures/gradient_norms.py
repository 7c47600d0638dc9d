"""Gradients of a deep plain network, under SGD and under normalized SGD."""

import keras
from keras import layers
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import keras_normopt

digits = load_digits()
OPTIMIZERS = {
    "SGD": keras_normopt.NormalizedSGD(0.1, 0.9, norm=None, track_norms=True),
    "Normalized SGD": keras_normopt.NormalizedSGD(0.003, 0.9, track_norms=True),
}

figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.6), layout="constrained")
for ax, (title, optimizer) in zip(axes, OPTIMIZERS.items(), strict=True):
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(64, "relu", name=f"hidden_{i}") for i in range(24)]
    head = layers.Dense(10, "softmax", name="head")
    model = keras.Sequential([keras.Input((64,)), *hidden, head])
    model.compile(optimizer, "sparse_categorical_crossentropy")
    history = model.fit(
        digits.data / 16,
        digits.target,
        epochs=10,
        callbacks=[keras_normopt.callbacks.GradientNorms()],
        verbose=0,
    )
    keras_normopt.plot_gradient_norms(history, ax=ax)
    ax.set_title(title)
