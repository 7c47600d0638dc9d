"""A direction in two dimensions, and the singular values of one kernel's step."""

import keras
import numpy as np
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

import keras_normopt

COLORS = {"gradient": "0.35", "l2": "tab:blue", "sign": "tab:orange"}
COLORS |= {'norm="l2"': "tab:blue", 'direction="orthogonal"': "tab:green"}


def kernel_step(optimizer):
    """Returns what one step on a batch of digits adds to the second kernel."""
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(48, "relu") for _ in range(3)]
    output = keras.layers.Dense(10, "softmax")
    model = keras.Sequential([keras.Input((64,)), *hidden, output])
    model.compile(optimizer=optimizer, loss="sparse_categorical_crossentropy")
    before = hidden[1].kernel.numpy()
    x, y = load_digits(return_X_y=True)
    model.train_on_batch(x[:64] / 16, y[:64])
    return hidden[1].kernel.numpy() - before


figure, (balls, values) = plt.subplots(1, 2, figsize=(8.5, 3.6))

gradient = np.array([1.0, 0.35])
angle = np.linspace(0, 2 * np.pi, 200)
balls.plot(np.cos(angle), np.sin(angle), color=COLORS["l2"], lw=1)
balls.plot([1, -1, -1, 1, 1], [1, 1, -1, -1, 1], color=COLORS["sign"], lw=1)
for name, step in {
    "gradient": 1.5 * gradient,
    "l2": gradient / np.linalg.norm(gradient),
    "sign": np.sign(gradient),
}.items():
    arrow = {"arrowstyle": "-|>", "lw": 2, "shrinkA": 0, "shrinkB": 0}
    balls.annotate("", step, (0, 0), arrowprops=arrow | {"color": COLORS[name]})
    balls.annotate(name, step, (4, 4), textcoords="offset points", color=COLORS[name])
balls.set(xlim=(-1.2, 2.1), ylim=(-1.2, 1.4), aspect="equal", xticks=[], yticks=[])
balls.set_title("Two balls, and their best steps")

for name, optimizer in {
    'norm="l2"': keras_normopt.NormalizedSGD(1.0),
    'direction="orthogonal"': keras_normopt.NormalizedSGD(
        1.0, direction=keras_normopt.directions.Orthogonal(scale=None)
    ),
}.items():
    singular = np.linalg.svd(kernel_step(optimizer), compute_uv=False)
    values.semilogy(range(1, 49), singular, label=name, color=COLORS[name])
values.set(xlabel="singular value of the step of a kernel", ylim=(1e-6, 3))
values.set_title("One kernel of 48 inputs and 48 outputs")
values.legend()
figure.tight_layout()
