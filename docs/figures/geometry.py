"""One step with and without normalization: its length, and its direction."""

import keras
import numpy as np
from matplotlib import pyplot as plt

import keras_normopt
from keras_normopt.experiments import styles

# As in all figures of these optimizers.
SGD, NORMALIZED = (
    look["color"] for look in styles.of(["SGD", "NormalizedSGD"]).values()
)
STYLES = {
    "SGD": {"color": SGD, "linestyle": "-"},
    'scope="global"': {"color": NORMALIZED, "linestyle": "--"},
    'scope="variable"': {"color": NORMALIZED, "linestyle": "-"},
}


def step(optimizer, start, gradient):
    """Where one step leads; each number is a variable of its own."""
    variables = [keras.Variable(value) for value in start]
    gradients = [keras.ops.convert_to_tensor(g, "float32") for g in gradient]
    optimizer.apply(gradients, variables)
    return [float(v.numpy()) for v in variables]


def arrow(ax, start, end, label):
    style = STYLES[label]
    ax.annotate(
        "",
        end,
        start,
        arrowprops={"arrowstyle": "-|>", "lw": 2, "shrinkA": 0, "shrinkB": 0} | style,
    )


figure, (length, direction) = plt.subplots(1, 2, figsize=(8.5, 3.6))

# A plateau, where gradients vanish, above a cliff, where they explode.
w = np.linspace(-6, 3.4, 400)


def loss(w):
    return np.log1p(np.exp(-3 * w)) - 0.92 * np.log1p(np.exp(-3 * (w + 2)))


def slope(w):
    return -3 / (1 + np.exp(3 * w)) + 0.92 * 3 / (1 + np.exp(3 * (w + 2)))


length.plot(w, loss(w), color="0.4")
for start in (-5.0, -1.0, 1.2):
    for height, label, optimizer in (
        (0.35, "SGD", keras.optimizers.SGD(1.0)),
        (0.85, 'scope="variable"', keras_normopt.NormalizedSGD(1.0)),
    ):
        (end,) = step(optimizer, [start], [slope(start)])
        y = loss(start) + height
        arrow(length, (start, y), (end, y), label)
    length.plot(start, loss(start), "o", color="black")
length.set(xlabel="w", ylabel="loss", ylim=(-0.5, 9))
length.set_title("Length: on a plateau, a cliff, a floor")

# Two variables, say two layers, whose gradients differ by an order of magnitude.
u, v = np.meshgrid(np.linspace(-2.6, 1.2, 200), np.linspace(-1.6, 1.2, 200))
direction.contour(u, v, (u**2 + 9 * v**2) / 2, levels=12, colors="0.8")
start = (-2.0, 0.7)
gradient = (start[0], 9 * start[1])
for label, optimizer in (
    ("SGD", keras.optimizers.SGD(0.3)),
    ('scope="global"', keras_normopt.NormalizedSGD(1.0, scope="global")),
    ('scope="variable"', keras_normopt.NormalizedSGD(1.0)),
):
    arrow(direction, start, step(optimizer, start, gradient), label)
    direction.plot([], [], lw=2, label=label, **STYLES[label])
direction.plot(*start, "o", color="black")
direction.plot(0, 0, "+", color="black", markersize=10)
direction.set(xlabel="u, a variable", ylabel="v, another", aspect="equal")
direction.set_title("Direction: two variables of unlike gradients")
direction.legend(loc="lower right")
figure.tight_layout()
